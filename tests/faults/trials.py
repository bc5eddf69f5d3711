"""Runs of all commands, and stages of a few steps, for children that are killed, signalled and compared."""

import json
import math
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import common.files
import common.stages
from common.cli import Signals

import torch
from safetensors import safe_open
from toy import SCRIPTS, child, hopper_arguments, metrics, new_run, run_script, without_times

KILL, TERM, USR1, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT

MODEL, ROLLOUTS = ["--world-model-steps", "60"], ["--synthesis-batch-size", "32"]
IDM, PLAN = ["--idm-steps", "120"], [*MODEL, "--eval-episodes", "1"]
AGENT = "--agent-updates 60 --eval-every 30 --eval-episodes 1".split()
ONLINE = "--synthesis online --agent-updates 24 --eval-every 12 --agent-batch-size 16".split()
PGD = "--windows-per-set 40 --synthesis-batch-size 4 --refresh-every 25".split()
# Every command, with every stage that it has: its script, and what it is asked for besides toy.SCRIPTS.
COMMANDS = {
    "dawm_td3bc": ("dawm_td3bc", [*MODEL, *IDM, *AGENT, *ROLLOUTS]),
    "dawm_td3bc-online": ("dawm_td3bc", [*MODEL, *IDM, *AGENT, *ONLINE]),
    "dawm_iql": ("dawm_iql", [*MODEL, *IDM, *AGENT, *ROLLOUTS]),
    "dwm_baseline-td3bc": ("dwm_baseline", [*MODEL, *AGENT, *ROLLOUTS]),
    "dwm_baseline-iql": ("dwm_baseline", [*MODEL, *AGENT, "--agent", "iql", "--rollouts", "online"]),
    "ssorl-td3bc": ("baselines.ssorl", [*IDM, *AGENT, "--label-fraction", "0.3"]),
    "ssorl-iql": ("baselines.ssorl", [*IDM, *AGENT, "--agent", "iql", "--label-fraction", "0.3"]),
    "decision_diffuser": ("baselines.decision_diffuser", PLAN),
    "diamond": ("baselines.diamond", [*MODEL, *AGENT, "--reward-model-steps", "60", "--kept-rollouts", "200"]),
    "diffuser": ("baselines.diffuser", [*PLAN, "--value-steps", "60"]),
    "diffusion_mpc": ("baselines.diffusion_mpc", PLAN),
    "one_step": ("baselines.one_step", [*MODEL, *AGENT, *ROLLOUTS]),
    "one_step-dwm": ("baselines.one_step", [*MODEL, *AGENT, "--preset", "dwm", "--horizon", "2"]),
    "polygrad": ("baselines.polygrad", [*MODEL, *AGENT, "--kept-windows", "64"]),
    "policy_guided_diffusion": ("baselines.policy_guided_diffusion", [*MODEL, *AGENT, *PGD]),
    "synther": ("baselines.synther", [*MODEL, *AGENT, "--synthetic-transitions", "500", *ROLLOUTS]),
    "joint_td3bc": ("variants.joint_td3bc", [*MODEL, *AGENT, *ROLLOUTS]),
    "uncertain_td3bc": ("variants.uncertain_td3bc", [*MODEL, *AGENT, *ROLLOUTS, *IDM]),
}


def command(name: str, folder: Path, *more: str) -> tuple[str, list[str]]:
    """Module and arguments of one of COMMANDS, with all that it writes below `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    module, arguments = COMMANDS[name]
    words = hopper_arguments(folder, *SCRIPTS[module], "--log-every", "20", *arguments, *more)
    return module, [str(word) for word in words]


def run_and_stop(module: str, arguments: list[str], stop_in: str, share: float, number: int, delay: float = 0) -> None:
    """The script's command line, in this process, with a dozen checkpoints in each stage.

    In stage `stop_in`, after `share` of its steps, comes a signal; with a delay, in seconds, from a thread of its own:
    anywhere in the code.
    """
    over = common.stages.Stage.over

    def watched(stage, items):
        armed = stage.name == stop_in
        for item in over(stage, items):
            if (stage.done + 1) % -(-len(items) // 12) == 0:
                stage.last_saved = -math.inf  # so long ago that the next one is due
            if armed and stage.done >= int(share * len(items)):
                armed = False
                kill = partial(os.kill, os.getpid(), number)
                threading.Timer(delay, kill).start() if delay else kill()
            yield item

    common.stages.Stage.over = watched
    run_script(module, arguments)


def run_as_other_code(module: str, arguments: list[str]) -> None:
    common.run._code_of = lambda args: "other"
    run_script(module, arguments)


def finish(function, *arguments, log: Path) -> int:
    """function(*arguments) in a child -> exit code, or minus the signal that ended it."""
    process = child(function, *arguments, log=log)
    process.join()
    return process.exitcode


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# ---- What a run gives


def outcome(folder: Path) -> dict:
    """All that a finished run gives: metrics without times, weights and kept results, TensorBoard's numbers."""
    (run,) = (folder / "runs").iterdir()
    results = [*run.glob("*.safetensors"), *(folder / "stages").glob("*.safetensors")]
    assert (run / "summary.txt").exists() and not list(folder.rglob("*.pt"))
    return {
        "metrics": metrics(run),
        "results": {path.name: result(path) for path in results},
        "tensorboard": tensorboard(run),
    }


def result(path: Path) -> tuple:
    """A kept result but for its times: what it depends on, its metrics, its tensors to the bit."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}
    return manifest["depends"], without_times(manifest["metrics"]), tensors


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def stages_of(folder: Path) -> list[str]:
    (stages,) = (folder / "runs").glob("*/stages.json")
    return list(json.loads(stages.read_text()))


# ---- Stages of a few steps


class Counter(torch.nn.Module):
    """Half a megabyte that all says the same number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("number", torch.zeros(2**17))


def counting(folder: Path, keeps=None, total: int = 10**6):
    """A stage that writes a checkpoint at every step."""
    run = new_run(folder, checkpoint_every=1e-9)
    return run.stage(counting, total, "step", keeps=keeps or Counter())


def count_for_ever(folder: Path) -> None:
    counter = Counter()
    with counting(folder, counter) as stage:
        print("begun")
        for step in stage:
            counter.number.fill_(step)


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "stages").glob(".counting-*/*.pt"))


def make(folder: Path, die: str = "") -> None:
    """A kept stage, told as "made" or "found". Whoever makes it writes a line to `makers` and waits for a file `go`."""
    counter, run = Counter(), new_run(folder)
    if die == "before it is on the disk":
        os.fsync = die_at_once
    if die == "before the checksum":
        common.files.sha256_of = die_at_once
    if die == "before the rename":
        Path.replace = lambda path, target: die_at_once() if target.suffix == ".safetensors" else path.rename(target)
    with run.stage(make, 3, "step", keeps=counter) as stage:
        for step in stage:
            if step == 1:
                with open(folder / "makers", "a") as file:
                    file.write(f"{os.getpid()}\n")
            while not (folder / "go").exists():
                time.sleep(0.005)
            counter.number.fill_(step)
    assert (counter.number == 3).all()
    print("found" if stage.found else "made")


def die_at_once(*_) -> None:
    os.kill(os.getpid(), KILL)


def endless() -> None:
    with Signals():
        print("begun")
        while True:
            time.sleep(0.01)
