"""Markdown tables of scores and of model errors from finished runs: python experiments/table.py RUNS_FOLDER

Runs that differ in nothing but the agent's seed form one row. Scores are D4RL's, 0-100: mean and standard deviation
(n - 1) over seeds of the final evaluation, of the mean of the last 10, and of the best, which is hindsight. "data" is
the score of the data's own mean return.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.evaluation import normalized_score


def read_run(folder: Path) -> tuple[dict, dict[str, list[float]]]:
    """args.json, and every metric's values in order."""
    metrics = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            metrics[name].append(value)
    return json.loads((folder / "args.json").read_text()), metrics


def spread(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main(root: Path) -> None:
    groups = defaultdict(list)
    for folder in sorted(path.parent for path in root.glob("*/summary.txt")):
        content, metrics = read_run(folder)
        same = {k: v for k, v in content["args"].items() if k not in ("seed", "run_dir")}
        groups[json.dumps(same, sort_keys=True) + content["data"]["sha256"]].append((content, metrics))
    if not groups:
        sys.exit(f"no finished run in {root}; give the --run-dir of the runs")
    print("| script | data set | synthetic fraction | seeds | final | mean of last 10 | best (hindsight) | data |")
    print("|---|---|---|---|---|---|---|---|")
    for runs in groups.values():
        content = runs[0][0]
        args = content["args"]
        if "eval/normalized_score" not in runs[0][1]:
            continue  # no reference returns: see the runs' own summary.txt
        scores = [metrics["eval/normalized_score"] for _, metrics in runs]
        columns = [
            f"`{args['exp_name']}.py`",
            args["env_id"],
            f"{args['synthetic_fraction']:g}",
            ", ".join(str(found["args"]["seed"]) for found, _ in runs),
            spread([s[-1] for s in scores]),
            spread([statistics.mean(s[-10:]) for s in scores]),
            spread([max(s) for s in scores]),
            f"{normalized_score(content['data']['robot'], content['data']['mean_return']):.1f}",
        ]
        print("| " + " | ".join(columns) + " |")
    for runs in groups.values():
        content, metrics = runs[0]
        if "world_model/val_obs_error_step1" not in metrics:
            continue
        steps = range(1, content["args"]["horizon"] + 2)
        print(f"\n{content['args']['env_id']}, held-out episodes: RMSE in standard deviations, by rollout step\n")
        print("| | " + " | ".join(map(str, steps)) + " |\n|---" + "|---" * len(steps) + "|")
        for what in ("obs", "reward"):
            row = [f"{metrics[f'world_model/val_{what}_error_step{i}'][-1]:.3f}" for i in steps]
            print(f"| {what} | " + " | ".join(row) + " |")
        print(f"\nInverse dynamics: RMSE {metrics['idm/best_val_mse'][-1] ** 0.5:.3f} of actions in [-1, 1].")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
