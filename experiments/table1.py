"""The measured columns of docs/table1.md, from finished runs, as Markdown.

    python experiments/table1.py runs/study/*medium-replay-v0__*    # any number of run folders, of any scripts here

Runs that differ in nothing but the agent's seed and the data set form one row, named by --exp-name:

* ms per decision: the run's actor or planner on one state of the data, on one thread of this machine; median of
  repeated calls. Of the row's first run.
* generation, s per million transitions: what the run's kept stage took to make its synthetic set, as it was recorded.
  Not of planners, which make none. DWM's steps have no action.
* score: D4RL's, or a return where there is none; mean of the evaluations in the second half of the training, and
  standard deviation (n - 1) over seeds, or of a single seed their range, for each data set.
* audit, next state: median error against the simulator at the first and at the last step of the rollouts, in standard
  deviations of the data; of the row's first run that experiments/audit.py has been through.
* budget: updates of the world model and of the agent, and the mean minutes of a run, without what it found kept.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import tell

import numpy as np
import torch
from policy import policy_of
from run_folders import finished_run, load_run
from safetensors import safe_open
from table import spread

SECONDS = 2.0  # for the decisions of one run, of which three are made at least
APART = ("seed", "run_dir", "env_id", "data_path")  # arguments in which runs of one row may differ


def milliseconds(parts: SimpleNamespace) -> float:
    """Median time of a decision: NumPy observation in, NumPy action out, one environment."""
    one = SimpleNamespace(envs=[None], running=np.zeros(1, dtype=int))
    policy, obs, took = policy_of(parts, one), parts.dataset.obs[:1], []
    policy(obs)  # the first call has more to do
    until = time.perf_counter() + SECONDS
    while len(took) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        policy(obs)
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def generation(folder: Path) -> float | None:
    """Seconds for a million transitions; None where none are made."""
    kept = json.loads((folder / "stages.json").read_text()).get("synthesize")
    if kept is None:
        return None
    with safe_open(kept, "pt") as file:
        seconds = json.loads(file.metadata()["manifest"])["seconds"]
        made = file.get_tensor("valid").sum() if "valid" in file.keys() else file.get_tensor("ended").numel()
    return 1e6 * seconds / int(made) if made else None


def audited(folder: Path) -> str:
    """Errors of the next state, where the audit had a simulator; else nothing."""
    path = folder / "audit.json"
    found = json.loads(path.read_text()).get("simulator", {}) if path.exists() else {}
    errors = [f"{part['state']['median']:.2g}" for name, part in found.items() if name.startswith("step")]
    return ", ".join([errors[0], *errors[1:][-1:]]) if errors else ""


def rows_of(folders: list[Path]) -> list[list[SimpleNamespace]]:
    """The runs of each row, in the order in which they are named."""
    groups = defaultdict(list)
    for folder in folders:
        run = finished_run(folder)
        run.folder, run.args = folder, run.content["args"]
        if not run.metrics["eval/episodic_return"]:
            raise UserError(f"{folder} was never evaluated")
        values = run.metrics["eval/normalized_score"] or run.metrics["eval/episodic_return"]
        run.settled = values[len(values) // 2 :]
        same = {name: value for name, value in run.args.items() if name not in APART}
        groups[run.content["module"] + json.dumps(same, sort_keys=True)].append(run)
    return list(groups.values())


def told(seeds: list[list[float]]) -> str:
    """The settled evaluations of each seed in one cell."""
    if not seeds:
        return "-"
    if len(seeds) == 1:
        return f"{statistics.mean(seeds[0]):.1f} ({min(seeds[0]):.1f} to {max(seeds[0]):.1f})"
    return f"{spread([statistics.mean(values) for values in seeds])} ({len(seeds)})"


def row(runs: list[SimpleNamespace], sets: list[str]) -> list[str]:
    args, first = runs[0].args, runs[0]
    parts = load_run(first.folder)
    torch.set_num_threads(1)  # a run sets its own
    seconds = generation(first.folder)
    scores = [[run.settled for run in runs if run.args["env_id"] == name] for name in sets]
    counts = [f"{args[name]:,}" if name in args else "-" for name in ("world_model_steps", "agent_updates")]
    return [
        args["exp_name"],
        f"{milliseconds(parts):.3g}",
        "-" if seconds is None else f"{seconds:.3g}",
        *map(told, scores),
        next((errors for run in runs if (errors := audited(run.folder))), "-"),
        f"{', '.join(counts)}; {statistics.mean(run.seconds for run in runs) / 60:.1f} min",
    ]


def main(folders: list[Path]) -> None:
    groups = rows_of(folders)
    sets = list(dict.fromkeys(run.args["env_id"] for runs in groups for run in runs))
    names = ["system", "ms per decision", "generation, s per million transitions"]
    names += [
        *(f"{name}, score (range or seeds)" for name in sets),
        "audit, next state: first, last step [sd]",
        "budget",
    ]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for runs in groups:
        print("| " + " | ".join(row(runs, sets)) + " |", flush=True)


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    tell(lambda: main([Path(word) for word in sys.argv[1:]]))
