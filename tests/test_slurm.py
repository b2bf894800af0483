"""Experiments under a real Slurm: slurmctld and slurmd on this machine's loopback, one node."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environ, replace
from night import Night

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="needs slurm-wlm"),
    pytest.mark.skipif(os.getuid() != 0, reason="slurmd starts jobs as root"),
]
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=bf_interval=1
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2
PartitionName=night Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which srun and sbatch find a cluster of one node."""
    path = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (path / name).mkdir()
    values = {"control": free_port(), "node": free_port(), "user": getpass.getuser()}
    (path / "slurm.conf").write_text(CONFIG.format(path=path, **values))
    environment = environ(SLURM_CONF=path / "slurm.conf", SRUN_OPTIONS="")
    with contextlib.ExitStack() as stack:
        for words in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            log = stack.enter_context((path / words[0]).with_suffix(".log").open("w"))
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        end = time.monotonic() + 60
        while "idle" not in ask(environment, "sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < end, (path / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment


def ask(environment, *words):
    """What a command of Slurm prints."""
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    return result.stdout + result.stderr


@pytest.fixture
def night(tmp_path, cache, slurm):
    """A clone on the shared disk, with the scripts of dev/slurm and a uv that takes this Python."""
    night = Night(tmp_path, cache / "tokens", limit=600)
    shutil.copytree(ROOT / "dev" / "slurm", night.clone / "dev" / "slurm")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").write_text(f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "uv").chmod(0o755)
    night.slurm = slurm | night.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    return night


def submit(night, *options):
    """Submit an experiment as a job; return its number."""
    wrapped = ["--wrap", f"{night.clone}/dev/slurm/experiment"]
    words = ["sbatch", "--parsable", "--chdir", str(night.clone), *options, *wrapped]
    answer = ask(night.slurm, *words).strip()
    assert answer.isdigit(), answer
    return answer


def wait_for(night, status):
    """Wait until the newest run has a status."""
    end = time.monotonic() + 120
    while not night.statuses() or night.statuses()[-1][0] != status:
        assert time.monotonic() < end, night.statuses()
        time.sleep(0.5)


def test_an_experiment_from_a_login_node_prints_its_summary(night):
    command = [night.clone / "dev/slurm/experiment", "--seed", "43"]
    text = ask(night.slurm, *command)
    assert "val_bpb: " in text, text
    assert night.statuses() == [("finished", 43)]


def test_a_job_that_is_cancelled_or_out_of_time_leaves_a_record_and_the_next_starts(night):
    replace(night.clone / "prepare.py", "TIME_BUDGET = 0.2", "TIME_BUDGET = 300")
    job = submit(night)
    wait_for(night, "running")
    ask(night.slurm, "scancel", job)
    wait_for(night, "stopped")
    submit(night, "--time=1")
    wait_for(night, "running")
    wait_for(night, "stopped")
    replace(night.clone / "prepare.py", "TIME_BUDGET = 300", "TIME_BUDGET = 0.2")
    submit(night)
    wait_for(night, "finished")
    assert night.statuses() == [("stopped", 42), ("stopped", 42), ("finished", 42)]
