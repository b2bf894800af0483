"""Check that the code stays small: `uv run dev/check_size.py` prints a table; `.ci/run` calls it.

Code lines and tokens are counted by Python's tokenize, without comments and docstrings.
"""

import ast
import io
import json
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {"prepare.py": 600, "train.py": 700, "harness/*.py": 710, "analysis.ipynb": 200}
MAX_TOKENS_A_LINE, MAX_COLUMNS = 10.5, 100
LAYOUT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")


def read_code(path: Path) -> str:
    """Return the Python code of a file; of a notebook that of its code cells."""
    if path.suffix == ".py":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def measure(code: str) -> tuple[int, int, int]:
    """Return code lines, tokens, and the columns of the longest line."""
    docstrings, lines, tokens = set(), set(), 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if tokenize.tok_name[token.type] not in LAYOUT and token.start[0] not in docstrings:
            lines |= set(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return len(lines), tokens, max(map(len, code.split("\n")))


def main() -> None:
    """Print the table. Raises SystemExit with what is too large."""
    problems = []
    print(f"{'file':<20}{'lines':>7}{'code':>7}{'tokens':>8}{'a line':>8}{'columns':>9}")
    for pattern, ceiling in CEILINGS.items():
        total = 0
        for path in sorted(ROOT.glob(pattern)):
            name, code = path.relative_to(ROOT).as_posix(), read_code(path)
            lines, tokens, columns = measure(code)
            density, total = tokens / max(lines, 1), total + lines
            print(
                f"{name:<20}{code.count(chr(10)):>7}{lines:>7}{tokens:>8}{density:>8.2f}{columns:>9}"
            )
            if density > MAX_TOKENS_A_LINE:
                problems.append(f"{name} has {density:.2f} tokens a code line: {MAX_TOKENS_A_LINE}")
            if columns > MAX_COLUMNS:
                problems.append(f"{name} has a line of {columns} columns: {MAX_COLUMNS}")
        if total > ceiling:
            problems.append(f"{pattern} has {total} code lines: {ceiling}")
    if problems:
        raise SystemExit("too large, with what is allowed:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
