"""The table and picture of experiments/actions.sh: actions filled in, generated jointly, or left out.

    python experiments/actions_table.py runs/actions docs/actions

Scores are mean and standard deviation over the agent's seeds; audits (experiments/audit.py, made here where missing)
are those of one set of eight-step rollouts of each generator. DWM shares DAWM's world model and has no actions after
the first, so only its first step and what no action explains can be checked, and both are DAWM's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from table import normalized_score, read_run

ROOT = Path(__file__).resolve().parent.parent
METHODS = {  # run name: label, audited set, color
    "dawm_td3bc": ("inverse dynamics (DAWM)", "dawm_rollouts", "#1f77b4"),
    "joint_td3bc": ("joint", "joint_rollouts", "#ff7f0e"),
    "dwm_td3bc": ("none (DWM)", None, "#2ca02c"),
    "td3bc": ("real data alone", None, "#555555"),
}


def scores(root: Path, robot: str, name: str) -> np.ndarray:
    """Evaluations [seeds, evaluations] of the newest finished run of each seed."""
    newest = {}
    for folder in sorted(path.parent for path in root.glob(f"local-{robot}-medium-v0__{name}__*/summary.txt")):
        content, metrics = read_run(folder)
        newest[content["args"]["seed"]] = metrics["eval/normalized_score"]
    return np.array(list(newest.values()))


def audit(root: Path, robot: str, name: str) -> dict | None:
    """The audit of the newest run of that name; it is made if it is missing. None if there is no such run."""
    folders = sorted(path.parent for path in root.glob(f"local-{robot}-medium-v0__{name}__*/summary.txt"))
    if not folders:
        return None
    if not (folders[-1] / "audit.json").exists():
        command = [sys.executable, "experiments/audit.py", str(folders[-1].resolve())]
        subprocess.run(command, cwd=ROOT, env=os.environ, check=True, stdout=sys.stderr)
    return json.loads((folders[-1] / "audit.json").read_text())


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main(root: Path, picture: Path) -> None:
    robots = [robot for robot in ("hopper", "walker2d") if list(root.glob(f"local-{robot}-*/summary.txt"))]
    if not robots:
        sys.exit(f"no finished run of experiments/actions.sh in {root}")
    heads = "robot|actions|seeds|final|mean of last 10|best (hindsight)|state error, step 0|steps 1-7|99 %"
    heads += "|its action adds|no action explains|CRPS, step 1|step 8"
    print("| " + " | ".join(heads.split("|")) + " |\n|" + "---|" * len(heads.split("|")))
    figure, axes = plt.subplots(len(robots), 3, figsize=(14, 3.8 * len(robots)), squeeze=False)
    for line, robot in zip(axes, robots, strict=True):
        for name, (label, audited, color) in METHODS.items():
            found = scores(root, robot, name)
            if not len(found):
                continue
            cells = [robot, label, str(len(found)), *map(spread, (found[:, -1], found[:, -10:].mean(1), found.max(1)))]
            content = audit(root, robot, audited) if audited else None
            if content:
                steps, action = content["synthetic"]["steps"], content["action"]
                state = {q: [step["state"][q] for step in steps] for q in ("median", "99")}
                caused, left = ([step["median"] for step in action[what]] for what in ("caused", "unexplained"))
                crps = content["calibration"]["world model"]["crps"]
                values = (state["median"][0], np.mean(state["median"][1:]), np.mean(state["99"][1:]))
                values += (np.mean(caused[1:]), np.mean(left[1:]), crps[0], crps[-1])
                cells += [f"{value:.3f}" for value in values]
                line[1].plot(state["median"], "o-", color=color, label=label)
                line[2].plot(range(1, len(left)), caused[1:], "o-", color=color, label=f"{label}: its action adds")
                line[2].plot(range(1, len(left)), left[1:], ":", color=color, label=f"{label}: no action explains")
            else:
                cells += ["-"] * 7
            print("| " + " | ".join(cells) + " |")
            updates = 2.5 * np.arange(1, found.shape[1] + 1)
            line[0].plot(updates, found.T, color=color, linewidth=0.6, alpha=0.5)
            line[0].plot(updates, found.mean(0), color=color, linewidth=2, label=label)
        content = read_run(next(root.glob(f"local-{robot}-*/summary.txt")).parent)[0]
        own = normalized_score(content["data"]["robot"], content["data"]["mean_return"])
        line[0].axhline(own, color="black", linewidth=0.8, linestyle="--", label="the data's own mean")
        for axis, title in zip(line, ("D4RL score", "median state error, sd", "parts of it, sd"), strict=True):
            axis.set_title(f"{robot}: {title}", fontsize=10)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
        line[0].set_xlabel("thousand updates of the agent")
        for axis in line[1:]:
            axis.set_ylim(bottom=0)
            axis.set_xlabel("step of the rollout")
    figure.tight_layout()
    figure.savefig(picture.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
