"""Commands with every stage there is, and stages of a few steps, for children that are killed, signalled, compared."""

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

# Scripts, as small as toy.SCRIPTS makes them, and what else they are asked for.
COMMANDS = [
    *((module, "") for module in SCRIPTS),
    ("dawm_td3bc", "--synthesis online"),
    ("dwm_baseline", "--agent iql --rollouts online"),
    ("baselines.one_step", "--preset dwm"),
    ("baselines.ssorl", "--agent iql"),
]


def command(folder: Path, *more: str, module: str = "dawm_td3bc") -> tuple[str, list[str]]:
    """Module and arguments of a run with all that it writes below `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return module, [str(word) for word in hopper_arguments(folder, *SCRIPTS[module], *more)]


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


def outcome(run: Path) -> dict:
    """All that a finished run gives: metrics without times, weights and kept results, TensorBoard's numbers."""
    assert (run / "summary.txt").exists()
    return {
        "metrics": metrics(run),
        "results": {stage: result(Path(path)) for stage, path in stages_of(run).items()},
        "tensorboard": tensorboard(run),
    }


def outcome_below(folder: Path) -> dict:
    """That of the one run below `folder`, which has left no checkpoint."""
    (run,) = (folder / "runs").iterdir()
    assert not list(folder.rglob("*.pt"))
    return outcome(run)


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


def stages_of(run: Path) -> dict[str, str]:
    """Stage -> the file of its result."""
    return json.loads((run / "stages.json").read_text())


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
