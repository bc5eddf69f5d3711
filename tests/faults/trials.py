"""Runs of the scripts as children of the test process: started by fork, so that hundreds of kills take minutes."""

import importlib
import json
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toy import hopper_file

import common.run

SMALL = "--unet-width 8 --world-model-steps 120".split()
IDM = "--idm-steps 120 --idm-width 16".split()
AGENT = "--agent-updates 120 --eval-every 60 --eval-episodes 2".split()
ONLINE = "--synthesis online --agent-updates 24 --eval-every 12 --agent-batch-size 16".split()
# Every script, and every stage that it has.
RUNS = {
    "dawm_td3bc": ("dawm_td3bc", [*SMALL, *IDM, *AGENT, "--synthesis-batch-size", "32"]),
    "dawm_td3bc-online": ("dawm_td3bc", [*SMALL, *IDM, *AGENT, *ONLINE]),
    "dawm_iql": ("dawm_iql", [*SMALL, *IDM, *AGENT, "--synthesis-batch-size", "32"]),
    "dwm_baseline-td3bc": ("dwm_baseline", [*SMALL, *AGENT, "--synthesis-batch-size", "32"]),
    "dwm_baseline-iql": ("dwm_baseline", [*SMALL, *AGENT, "--agent", "iql", "--rollouts", "online"]),
    "ssorl_baseline-td3bc": ("ssorl_baseline", [*IDM, *AGENT, "--label-fraction", "0.3"]),
    "ssorl_baseline-iql": ("ssorl_baseline", [*IDM, *AGENT, "--agent", "iql", "--label-fraction", "0.3"]),
    "dd_baseline": ("dd_baseline", [*SMALL, "--idm-width", "16", "--plan-horizon", "8", "--eval-episodes", "2"]),
}


def command(name: str, folder: Path, *more: str) -> tuple[str, list[str]]:
    """Script and arguments of one of RUNS, with all that it writes below `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / "data.hdf5"
    if not data.exists():
        hopper_file(data)
    script, arguments = RUNS[name]
    shared = (
        f"--env-id hopper-medium-v2 --data-path {data} --run-dir {folder / 'runs'} --stage-dir {folder / 'stages'} "
    )
    shared += "--laptop --device cpu --log-every 20 --checkpoint-every 5e-4"
    return script, [*shared.split(), *arguments, *more]


def child(function, log: Path) -> int:
    """Start function() in a fork, its output in `log` -> process id. Exit codes are those of a real run."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70  # of an exception that nobody caught
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def run_script(script: str, arguments: list[str], stop_in: str | None = None, share: float = 0.0, number: int = 0):
    """The script's command line, in this process. In stage `stop_in`, after `share` of its items, comes a signal.

    It comes from a thread of its own, some microseconds to milliseconds later: anywhere in the code.
    """
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *arguments]
    over = common.run.Stage.over

    def watched(stage, items):
        armed = stage.name == stop_in
        for item in over(stage, items):
            if armed and stage.done >= int(share * len(items)):
                armed = False
                threading.Timer(random.uniform(0, 0.02), os.kill, (os.getpid(), number)).start()
            yield item

    if stop_in:
        common.run.Stage.over = watched
    module.run_script(module.main, module.Args, module.LAPTOP, getattr(module, "PRESETS", None))


def finish(script: str, arguments: list[str], log: Path, **stop) -> int:
    """Run to the end -> exit code, or minus the signal that ended it."""
    pid = child(lambda: run_script(script, arguments, **stop), log)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> dict:
    """All that a finished run gives: metrics without times, weights and kept results, TensorBoard's numbers."""
    (run,) = (folder / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [run / "actor.safetensors"] if (run / "actor.safetensors").exists() else []
    files += sorted((folder / "stages").glob("*/tensors.safetensors"))
    assert (run / "summary.txt").exists() and not list(folder.rglob("*.pt"))
    return {
        "metrics": [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines],
        "files": {
            f"{file.parent.name if 'stages' in str(file) else ''}/{file.name}": file.read_bytes() for file in files
        },
        "tensorboard": tensorboard(run),
    }


def tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith("time/")]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def stages_of(folder: Path) -> list[str]:
    """The stages that left checkpoints, in order, from a run's closing table."""
    (summary,) = (folder / "runs").glob("*/summary.txt")
    names = ["world model", "decision diffuser", "inverse dynamics", "synthesis", "rollouts", "agent"]
    return [name for name in names if f"\n{name} " in "\n" + summary.read_text()]


torch.set_num_threads(1)
KILL, TERM, USR1, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
