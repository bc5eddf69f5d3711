"""Finished runs, for the commands of this folder: the parts of one by its own script, and the logs of many."""

import importlib
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from common import UserError


def load_run(folder: Path) -> SimpleNamespace:
    """What `load_run` of the run's own script gives, and that `script`."""
    module = read_args(folder).get("module", "")
    try:
        script = importlib.import_module(module)
    except (ImportError, ValueError):
        raise UserError(f"{folder} was made by {module or 'an old version'}, which is not here; put that script back")
    parts = script.load_run(folder)
    parts.script = script
    return parts


def load_rollouts(folder: Path) -> SimpleNamespace:
    """The same of a run that keeps a world model's rollouts, else UserError."""
    parts = load_run(folder)
    if getattr(parts, "rollouts", None) is None or getattr(parts, "world_model", None) is None:
        raise UserError(f"{folder} holds no rollouts of a world model; give a run of dawm_td3bc.py, say, without "
                        "--synthetic-fraction 0 or --synthesis online")  # fmt: skip
    return parts


def read_args(folder: Path) -> dict:
    try:
        return json.loads((folder / "args.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} is not the folder of a run: it holds no readable args.json")


def finished_run(folder: Path) -> SimpleNamespace:
    """Content of args.json, every metric's values in order, seconds of the whole run. UserError if it is none."""
    content, summary, metrics = read_args(folder), folder / "summary.txt", defaultdict(list)
    if not summary.exists():
        raise UserError(f"{folder} has not finished: give its command again")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            metrics[name].append(value)
    seconds = float(re.search(r"^total +([\d.]+) s", summary.read_text(), flags=re.M)[1])
    return SimpleNamespace(content=content, metrics=metrics, seconds=seconds)


def finished_runs(root: Path) -> list[SimpleNamespace]:
    """All finished runs in a folder: see finished_run."""
    runs = [finished_run(summary.parent) for summary in sorted(root.glob("*/summary.txt"))]
    if not runs:
        raise UserError(f"no finished run in {root}; give the --run-dir of the runs")
    return runs
