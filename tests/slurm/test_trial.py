"""A grid of 20 runs on a real Slurm of one node: one is preempted, one cancelled, one killed; the end is that of the
same grid here.

pytest tests/slurm --full -s     prints the transcript; as root, with slurm-wlm and munge installed (one_node.sh)
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy import ROOT, hopper_file, metrics, wait_for

EXTRA = "--laptop --device cpu --world-model-steps 60 --unet-width 8 --idm-steps 60 --idm-width 16 --agent-updates 400 "
EXTRA += "--agent-batch-size 32 --eval-every 200 --eval-episodes 2 --log-every 50 "
LEARNERS = "cloning td3bc dawm_td3bc dwm_td3bc"
needs = [program for program in ("sbatch", "munged") if not shutil.which(program)]
pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(needs) or os.geteuid() != 0, reason=f"as root, with {needs}")]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    node = [ROOT / "tests" / "slurm" / "one_node.sh"]
    subprocess.run([*node, "start", tmp_path / "slurm"], check=True)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm" / "slurm.conf"))
    yield
    subprocess.run([*node, "stop", tmp_path / "slurm"], check=True)


def study(folder: Path, *words: str) -> str:
    """experiments/study.py on a grid of toy runs below `folder` -> what it prints; here it is printed too."""
    grid = ["paper", "--tasks", "hopper-medium", "--learners", *LEARNERS.split(), "--seeds", "5"]
    own = [
        "--run-dir",
        str(folder),
        f"--extra={EXTRA} --data-path {folder.parent / 'data.hdf5'} --stage-dir {folder / 'stages'}",
    ]
    command = [sys.executable, "experiments/study.py", *grid, *own, *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"\n$ study.py {' '.join(['GRID', *words])}\n{done.stdout}", flush=True)
    assert done.returncode == 0
    return done.stdout


def in_its_agent(folder: Path, learner: str, seed: int):
    """Whether that run trains its agent."""
    logs = list(folder.glob(f"*__{learner}__{seed}__*/metrics.jsonl"))
    return logs and "agent/" in logs[0].read_text()


def squeue() -> list[str]:
    return subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True).stdout.split()


def signal_job(folder: Path, learner: str, seed: int, name: str | None = None) -> None:
    """A signal to a job whose agent learns, or its end."""
    wait_for(lambda: in_its_agent(folder, learner, seed), minutes=60)
    lines = map(json.loads, (folder / "logs" / "submitted.jsonl").read_text().splitlines())
    (number,) = [number for number, job in lines if job == f"hopper-medium-v2__{learner}__{seed}"]
    words = ["scancel", *(["--signal", name] if name else []), number]
    print(f"$ {shlex.join(words)}    # {learner}, seed {seed}", flush=True)
    subprocess.run(words, check=True)


def outcome(folder: Path) -> dict:
    """Metrics but for times, and the agent's weights, of every run."""
    found = {}
    for summary in folder.glob("*/summary.txt"):
        name = summary.parent.name.split("__")[1:3]
        (agent,) = summary.parent.glob("*.safetensors")
        found[tuple(name)] = metrics(summary.parent), {k: v.tolist() for k, v in load_file(agent).items()}
    return found


def test_a_grid_on_slurm_ends_as_here(tmp_path, slurm):
    hopper_file(tmp_path / "data.hdf5")
    there, here = tmp_path / "there", tmp_path / "here"
    study(there, "--cluster", "slurm", "--memory", "2")
    signal_job(there, "dawm_td3bc", 0, "USR1")
    signal_job(there, "td3bc", 1)
    wait_for(lambda: in_its_agent(there, "cloning", 2), minutes=60)
    print("$ pkill -KILL -f -- '--seed 2 --exp-name cloning'", flush=True)
    subprocess.run(["pkill", "-KILL", "-f", "--", "dawm_td3bc .*--seed 2 --exp-name cloning"], check=True)
    study(there, "--status")
    wait_for(lambda: not squeue(), minutes=60)
    told = study(there, "--status")
    assert "stopped: hopper-medium-v2__td3bc__1: stopped by SIGTERM in stage agent" in told and " 18 " in told
    assert "failed: hopper-medium-v2__cloning__2: killed by SIGKILL" in told
    study(there, "--cluster", "slurm", "--memory", "2")
    wait_for(lambda: not squeue(), minutes=60)
    assert " 20        0        0        0        0        0" in study(there, "--status")
    for learner, seed in (("dawm_td3bc", 0), ("td3bc", 1)):  # the killed one may not have had a checkpoint
        log = (there / "logs" / f"hopper-medium-v2__{learner}__{seed}.log").read_text()
        assert "goes on at" in log, log
        print(f"$ grep agent: {learner}, seed {seed}", *[x for x in log.splitlines() if "agent   " in x], sep="\n")
    study(here, "--memory", "2")
    assert outcome(there) == outcome(here) and len(outcome(here)) == 20
    print("20 of 20 identical to the bit")
