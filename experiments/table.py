"""Scores of finished runs as a Markdown table: python experiments/table.py runs/peers

A table for each data set, of D4RL scores (0 to 100), or of returns where there is none. Runs that differ in nothing but
the agent's seed form one row, named by --exp-name: mean and standard deviation (n - 1) over seeds of the final
evaluation and of the mean of the curve. "minutes" is the mean wall time of a run, without the stages that it found
kept.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import tell
from common.evaluation import normalized_score

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


def main(root: Path) -> None:
    sets, peers = grouped(root), defaultdict(list)
    if (root / "peers.jsonl").exists():  # of experiments/peers.sh, on the runs' own data
        for line in (root / "peers.jsonl").read_text().splitlines():
            run = json.loads(line)
            peers[f"{run['library']} {run['algorithm']}"].append(run)
    for env_id, methods in sets.items():
        data, scored = methods[0][0].content["data"], bool(methods[0][0].metrics["eval/normalized_score"])
        print(f"\n{env_id}, {'D4RL score' if scored else 'return'}\n")
        print("| run | seeds | final | mean of the curve | minutes |\n|---|---|---|---|---|")
        for runs in methods:
            columns = [[run.args["seed"], run.curve, run.seconds] for run in runs]
            print(row(runs[0].args["exp_name"], *zip(*columns, strict=True)))
        for name, runs in peers.items():
            print(row(name, *([run[key] for run in runs] for key in ("seed", "scores", "seconds"))))
        own = normalized_score(data["robot"], data["mean_return"]) if scored else data["mean_return"]
        print(f"\nThe mean return of {env_id} itself: {own:.1f}\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1])))
