"""Check that the code stays small: lines, tokens a line and columns. `.ci/run` calls it.

uv run dev/check_size.py
"""

import ast
import io
import json
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = {"prepare.py": 600, "train.py": 700, "harness/": 620, "analysis.ipynb": 200}
MAX_TOKENS_A_LINE, MAX_COLUMNS = 10.5, 100
IGNORED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def read_source(path: Path) -> str:
    """Return the Python code of a file; of a notebook that of its code cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def find_docstrings(source: str) -> set[int]:
    """Return the numbers of the lines that docstrings fill."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines |= set(range(node.lineno, node.end_lineno + 1)) * isinstance(node.value.value, str)
    return lines


def measure(source: str) -> tuple[int, int, int]:
    """Return code lines, tokens in them, and the columns of the longest line."""
    docstrings, lines, tokens = find_docstrings(source), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IGNORED and token.start[0] not in docstrings:
            lines |= set(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return len(lines), tokens, max(map(len, source.splitlines()), default=0)


def main() -> None:
    print("E")
