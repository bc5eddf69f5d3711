"""Scores of finished runs as a Markdown table, and their learning curves.

    python experiments/table.py runs/peers               # the table
    python experiments/table.py runs/peers curves.png    # and the curves

A table for each data set, of D4RL scores (0 to 100), or of returns where there is none. Runs that differ in nothing but
the agent's seed form one row, named by --exp-name: mean and standard deviation (n - 1) over seeds of the final
evaluation and of the mean of the curve. "minutes" is the mean wall time of a run, without the stages that it found
kept. In the picture thin lines are seeds, thick ones their mean.
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


def grouped(root: Path) -> dict[str, list[list]]:
    """Evaluated runs by data set, and those of a method together; `curve`: their scores, or returns without a score."""
    groups = defaultdict(list)
    for run in finished_runs(root):
        run.args, data = run.content["args"], run.content["data"]
        run.curve = run.metrics["eval/normalized_score"] or run.metrics["eval/episodic_return"]
        same = {k: v for k, v in run.args.items() if k not in ("seed", "run_dir")}
        groups[json.dumps(same, sort_keys=True) + data["fingerprint"]].append(run)
    sets = defaultdict(list)
    for runs in sorted(groups.values(), key=lambda runs: (-len(runs), runs[0].args["exp_name"])):
        sets[runs[0].content["data"]["env_id"]].append(runs)
    return sets


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def row(name: str, seeds, curves, seconds) -> str:
    """curves: the scores of each seed's evaluations; one that has a single evaluation is no curve."""
    whole = spread([statistics.mean(c) for c in curves]) if len(curves[0]) > 1 else "-"
    told = [name, ", ".join(map(str, seeds)), spread([c[-1] for c in curves]), whole]
    return "| " + " | ".join([*told, f"{statistics.mean(seconds) / 60:.1f}"]) + " |"


def own_mean(run) -> float | None:
    """Of the data's episodes, in the units of the run's curve; None where it is not known."""
    data = run.content["data"]
    scored = data["mean_return"] is not None and run.metrics["eval/normalized_score"]
    return normalized_score(data["robot"], data["mean_return"]) if scored else data["mean_return"]


def unit(run) -> str:
    return "D4RL score" if run.metrics["eval/normalized_score"] else "return"


def main(root: Path, picture: Path | None) -> None:
    sets, peers = grouped(root), defaultdict(list)
    if (root / "peers.jsonl").exists():  # of experiments/peers.sh, on the runs' own data
        for line in (root / "peers.jsonl").read_text().splitlines():
            run = json.loads(line)
            peers[f"{run['library']} {run['algorithm']}"].append(run)
    for env_id, methods in sets.items():
        print(f"\n{env_id}, {unit(methods[0][0])}\n")
        print("| run | seeds | final | mean of the curve | minutes |\n|---|---|---|---|---|")
        for runs in methods:
            columns = [[run.args["seed"], run.curve, run.seconds] for run in runs]
            print(row(runs[0].args["exp_name"], *zip(*columns, strict=True)))
        for name, runs in peers.items():
            print(row(name, *([run[key] for run in runs] for key in ("seed", "scores", "seconds"))))
        if (own := own_mean(methods[0][0])) is not None:
            print(f"\nThe mean return of {env_id} itself: {own:.1f}\n")
    if picture:
        draw(sets, picture)


def draw(sets: dict[str, list[list]], picture: Path) -> None:
    """All methods that have a curve in one panel for each data set."""
    panels = {name: [runs for runs in methods if len(runs[0].curve) > 1] for name, methods in sets.items()}
    panels = {name: methods for name, methods in panels.items() if methods}
    if not panels:
        raise UserError("no run was evaluated twice, so there is no curve to draw; lower --eval-every")
    figure = Figure(figsize=(9, 4 * len(panels)), layout="constrained")
    for axis, (env_id, methods) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for number, runs in enumerate(methods):
            curves, color = np.array([run.curve for run in runs]), f"C{number % 10}"
            updates = runs[0].args["eval_every"] * np.arange(1, curves.shape[1] + 1)
            axis.plot(updates, curves.T, color=color, linewidth=0.6, alpha=0.4)
            label = f"{runs[0].args['exp_name']}, {len(runs)} seed{'s' * (len(runs) > 1)}"
            axis.plot(updates, curves.mean(0), "-" if number < 10 else "--", color=color, linewidth=2, label=label)
        if (own := own_mean(methods[0][0])) is not None:
            axis.axhline(own, color="black", linewidth=1, linestyle=":", label="mean of the data's episodes")
        axis.set(xlabel="updates of the agent", ylabel=f"{unit(methods[0][0])}, {env_id}")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))
