"""Scores of experiments/peers.sh as a Markdown table: python experiments/table.py runs/peers

D4RL scores, 0 to 100. Runs that differ in nothing but the agent's seed form one row, named by --exp-name: mean and
standard deviation (n - 1) over seeds of the final evaluation and of the mean of the curve. "minutes" is the mean wall
time of a run, without the stages that it found kept.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import tell

from run_folders import finished_runs


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def row(name: str, seeds, curves, seconds) -> str:
    """curves: the scores of each seed's evaluations; one that has a single evaluation is no curve."""
    whole = spread([statistics.mean(c) for c in curves]) if len(curves[0]) > 1 else "-"
    told = [name, ", ".join(map(str, seeds)), spread([c[-1] for c in curves]), whole]
    return "| " + " | ".join([*told, f"{statistics.mean(seconds) / 60:.1f}"]) + " |"


def main(root: Path) -> None:
    rows = defaultdict(list)
    for run in finished_runs(root):
        args = run.content["args"]
        same = json.dumps({k: v for k, v in args.items() if k not in ("seed", "run_dir")}, sort_keys=True)
        rows[args["exp_name"], same].append((args["seed"], run.metrics["eval/normalized_score"], run.seconds))
    for line in (root / "peers.jsonl").read_text().splitlines():
        run = json.loads(line)
        rows[f"{run['library']} {run['algorithm']}", ""].append((run["seed"], run["scores"], run["seconds"]))
    print("| run | seeds | final | mean of the curve | minutes |\n|---|---|---|---|---|")
    for (name, _), runs in rows.items():
        print(row(name, *zip(*runs, strict=True)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1])))
