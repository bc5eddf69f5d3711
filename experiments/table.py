"""Markdown tables of scores and of model errors from finished runs: python experiments/table.py RUNS_FOLDER

Runs that differ in nothing but the agent's seed form one row. Scores are D4RL's, 0-100: mean and standard deviation
(n - 1) over seeds of the final evaluation, of the mean of the last 10, and of the best, which is hindsight. "minutes"
is the mean wall time of a run beside a second one, without the stages that it found kept.
"""

import json
import re
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
    content = json.loads((folder / "args.json").read_text())
    content["seconds"] = float(re.search(r"^total +([\d.]+) s", (folder / "summary.txt").read_text(), flags=re.M)[1])
    return content, metrics


def command(content: dict) -> str:
    """The command line of a run without what all runs share."""
    words, shared = list(content["command"]), ("--env-id", "--run-dir", "--stage-dir", "--exp-name", "--seed")
    words[0] = Path(words[0]).name
    kept = [w for i, w in enumerate(words) if w not in (*shared, "--laptop") and words[i - 1] not in shared]
    return " ".join(kept)


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
    rows, own = [], {}
    for runs in groups.values():
        content = runs[0][0]
        if "eval/normalized_score" not in runs[0][1]:
            continue  # no reference returns: see the runs' own summary.txt
        scores = [metrics["eval/normalized_score"] for _, metrics in runs]
        is_curve = len(scores[0]) > 1  # DD is evaluated once, after its training
        columns = [
            f"`{command(content)}`",
            content["args"]["env_id"],
            ", ".join(str(found["args"]["seed"]) for found, _ in runs),
            spread([s[-1] for s in scores]),
            spread([statistics.mean(s[-10:]) for s in scores]) if is_curve else "-",
            spread([max(s) for s in scores]) if is_curve else "-",
            f"{statistics.mean(found['seconds'] for found, _ in runs) / 60:.1f}",
        ]
        rows.append("| " + " | ".join(columns) + " |")
        mean_return = content["data"]["mean_return"]
        own[content["args"]["env_id"]] = f"{normalized_score(content['data']['robot'], mean_return):.1f}"
    for path in root.glob("peers.jsonl"):  # experiments/peers.sh
        peers = defaultdict(list)
        for line in path.read_text().splitlines():
            run = json.loads(line)
            peers[f"{run['library']} {run['algorithm']}"].append(run)
        for name, runs in peers.items():
            columns = [name, "the same", ", ".join(str(run["seed"]) for run in runs)]
            columns += [spread([run[key] for run in runs]) for key in ("final", "mean_of_last_10", "best")]
            rows.append("| " + " | ".join([*columns, f"{statistics.mean(r['seconds'] for r in runs) / 60:.1f}"]) + " |")
    print("| command | data set | seeds | final | mean of last 10 | best (hindsight) | minutes |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(sorted(rows, key=lambda row: (row.count("--"), row))))
    for env_id, score in own.items():
        print(f"\nThe mean return of {env_id} itself: {score}")
    told = set()  # many runs share one world model
    for runs in groups.values():
        content, metrics = runs[0]
        errors = tuple(metrics["world_model/val_obs_error_step1"])
        if not errors or errors in told or "idm/best_val_mse" not in metrics:
            continue
        told.add(errors)
        steps = range(1, content["args"]["model_horizon"] + 2)
        name = f"{content['args']['exp_name']}, {content['args']['env_id']}"
        print(f"\n{name}, held-out episodes: RMSE in standard deviations, by rollout step\n")
        print("| | " + " | ".join(map(str, steps)) + " |\n|---" + "|---" * len(steps) + "|")
        for what in ("obs", "reward"):
            row = [f"{metrics[f'world_model/val_{what}_error_step{i}'][-1]:.3f}" for i in steps]
            print(f"| {what} | " + " | ".join(row) + " |")
        print(f"\nInverse dynamics: RMSE {metrics['idm/best_val_mse'][-1] ** 0.5:.3f} of actions in [-1, 1].")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
