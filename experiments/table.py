"""Scores of finished runs as a Markdown table, and their learning curves.

    python experiments/table.py runs/learners                 # the table
    python experiments/table.py runs/learners learners.png    # and the curves

Runs that differ in nothing but the agent's seed form one row, named by --exp-name. Scores are D4RL's, 0 to 100: mean
and standard deviation (n - 1) over seeds of the final evaluation and of the mean over the curve. "minutes" is the mean
wall time of a run, without the stages that it found kept. In the picture thin lines are seeds, thick ones their mean.
"""

import json
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
    """All methods that have a curve in one panel for each data set."""
    panels = defaultdict(list)
    for runs in groups:
        if len(runs[0].metrics["eval/normalized_score"]) > 1:
            panels[runs[0].content["data"]["env_id"]].append(runs)
    if not panels:
        raise UserError("no run was evaluated twice, so there is no curve to draw; lower --eval-every")
    figure = Figure(figsize=(9, 4 * len(panels)), layout="constrained")
    for axis, (env_id, methods) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for number, runs in enumerate(methods):
            args, color = runs[0].content["args"], f"C{number % 10}"
            curves = np.array([run.metrics["eval/normalized_score"] for run in runs])
            updates = args["eval_every"] * np.arange(1, curves.shape[1] + 1)
            axis.plot(updates, curves.T, color=color, linewidth=0.6, alpha=0.4)
            label = f"{args['exp_name']}, {len(runs)} seed{'s' * (len(runs) > 1)}"
            axis.plot(updates, curves.mean(0), "-" if number < 10 else "--", color=color, linewidth=2, label=label)
        if (own := own_score(methods[0][0].content["data"])) is not None:
            axis.axhline(own, color="black", linewidth=1, linestyle=":", label="mean of the data's episodes")
        axis.set(xlabel="updates of the agent", ylabel=f"D4RL score, {env_id}")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
