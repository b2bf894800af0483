"""What passes before the first training step: uv run tests/bench_startup.py [options of train.py]

Starts train.py twice in processes of their own, with the corpus prepared, and ends them where the five minutes would
begin: first with an empty compiler cache, then with what the first has left there.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each of these prints the seconds since the command was given, as it begins or ends.
TIMED = """
import os, sys, time
since = float(os.environ["BEGAN"])
def tell(what):
    print(f"{time.time() - since:8.2f} s  {what}", flush=True)
def after(owner, name, what):
    function = getattr(owner, name)
    def wrapped(*arguments, **options):
        result = function(*arguments, **options)
        tell(what)
        return result
    setattr(owner, name, wrapped)
tell("Python and uv have started")
import torch
tell("import torch")
import prepare
tell("import prepare")
import train
tell("import train")
after(prepare, "find_sources", "the files of the corpus are listed")
after(prepare, "prepare", "the corpus is found to be prepared")
after(prepare.Tokenizer, "__init__", "the tokenizer is loaded")
after(train, "build_optimizer", "model and optimizer are there")
after(train, "fit", "compiled and warmed up")
after(train, "make_dataloader", "the dataloader is there")
def start(run, model, start=prepare.Run.start):
    start(run, model)
    tell("the five minutes begin")
    os._exit(0)
prepare.Run.start = start
train.main()
"""

with tempfile.TemporaryDirectory() as folder:
    subprocess.run(["uv", "run", "prepare.py", *sys.argv[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for name in ("empty", "full"):
        print(f"with {'an' if name == 'empty' else 'a'} {name} compiler cache:", flush=True)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "BEGAN": str(time.time())}
        command = ["uv", "run", "python", "-c", TIMED, *sys.argv[1:]]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
