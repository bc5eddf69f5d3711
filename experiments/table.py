"""Scores of finished runs as a Markdown table, and their learning curves.

    python experiments/table.py runs/learners                 # the table
    python experiments/table.py runs/learners learners.png    # and the curves

Runs that differ in nothing but the agent's seed form one row, named by --exp-name. Scores are D4RL's, 0 to 100: mean
and standard deviation (n - 1) over seeds of the final evaluation and of the mean over the curve. "minutes" is the mean
wall time of a run, without the stages that it found kept. In the picture thin lines are seeds, the thick one is their
mean, the dashed one the data's own mean.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import tell
from common.evaluation import normalized_score

import numpy as np
from matplotlib.figure import Figure
from run_folders import finished_runs


def grouped(root: Path) -> list[list]:
    """Runs with a score, those of a method together."""
    groups = defaultdict(list)
    for run in finished_runs(root):
        if "eval/normalized_score" in run.metrics:
            same = {k: v for k, v in run.content["args"].items() if k not in ("seed", "run_dir")}
            groups[json.dumps(same, sort_keys=True) + run.content["data"]["fingerprint"]].append(run)
    if not groups:
        raise UserError(f"no run in {root} has a D4RL score; summary.txt in each folder has its returns")
    return sorted(groups.values(), key=lambda runs: (-len(runs), runs[0].content["args"]["exp_name"]))


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def row(name: str, seeds, curves, seconds) -> str:
    """curves: the scores of each seed's evaluations; one that has a single evaluation is no curve."""
    whole = spread([statistics.mean(c) for c in curves]) if len(curves[0]) > 1 else "-"
    told = [name, ", ".join(map(str, seeds)), spread([c[-1] for c in curves]), whole]
    return "| " + " | ".join([*told, f"{statistics.mean(seconds) / 60:.1f}"]) + " |"


def own_score(data: dict) -> float | None:
    """Of the data's own mean return; None where that is not known."""
    return None if data["mean_return"] is None else normalized_score(data["robot"], data["mean_return"])


def main(root: Path, picture: Path | None) -> None:
    groups = grouped(root)
    print("| run | seeds | final | mean of the curve | minutes |\n|---|---|---|---|---|")
    for runs in groups:
        seeds, seconds = [run.content["args"]["seed"] for run in runs], [run.seconds for run in runs]
        curves = [run.metrics["eval/normalized_score"] for run in runs]
        print(row(runs[0].content["args"]["exp_name"], seeds, curves, seconds))
    peers = defaultdict(list)
    if (root / "peers.jsonl").exists():  # of experiments/peers.sh
        for line in (root / "peers.jsonl").read_text().splitlines():
            run = json.loads(line)
            peers[f"{run['library']} {run['algorithm']}"].append(run)
    for name, runs in peers.items():
        columns = ([run[key] for run in runs] for key in ("seed", "scores", "seconds"))
        print(row(name, *columns))
    for data in {runs[0].content["data"]["env_id"]: runs[0].content["data"] for runs in groups}.values():
        if own_score(data) is not None:
            print(f"\nThe mean return of {data['env_id']} itself: {own_score(data):.1f}")
    if picture:
        draw(groups, picture)


def draw(groups: list[list], picture: Path) -> None:
    """A panel for each method that has a curve."""
    groups = [runs for runs in groups if len(runs[0].metrics["eval/normalized_score"]) > 1]
    if not groups:
        raise UserError("no run was evaluated twice, so there is no curve to draw; lower --eval-every")
    rows = math.ceil(len(groups) / 4)
    figure = Figure(figsize=(13, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False, sharex=True, sharey=True)
    for axis, runs in zip(panels.flat, groups, strict=False):
        args, data = runs[0].content["args"], runs[0].content["data"]
        curves = np.array([run.metrics["eval/normalized_score"] for run in runs])
        updates = args["eval_every"] * np.arange(1, curves.shape[1] + 1)
        axis.plot(updates, curves.T, color="tab:blue", linewidth=0.8, alpha=0.5)
        axis.plot(updates, curves.mean(0), color="tab:blue", linewidth=2)
        if own_score(data) is not None:
            axis.axhline(own_score(data), color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{args['exp_name']}, {len(runs)} seed{'s' * (len(runs) > 1)}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in panels.flat[len(groups) :]:
        axis.axis("off")
    figure.supxlabel("updates of the agent", fontsize=9)
    figure.supylabel("D4RL score", fontsize=9)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
