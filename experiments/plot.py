"""Learning curves of finished runs, one panel for each method: python experiments/plot.py RUNS_FOLDER PICTURE.png

Thin lines are seeds, the thick one their mean; dashed is the score of the data's own mean return.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from table import normalized_score, read_run


def main(root: Path, picture: Path) -> None:
    groups = defaultdict(list)
    for folder in sorted(path.parent for path in root.glob("*/summary.txt")):
        content, metrics = read_run(folder)
        if len(metrics.get("eval/normalized_score", [])) > 1:  # some data have no reference returns, DD has no curve
            groups[content["args"]["exp_name"]].append((content, metrics["eval/normalized_score"]))
    names = sorted(groups, key=lambda name: (-len(groups[name]), name))
    if not names:
        sys.exit(f"no finished run with a score in {root}; give the --run-dir of the runs")
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False, sharex=True, sharey=True
    )
    for axis, name in zip(axes.flat, names, strict=False):
        content = groups[name][0][0]
        every = content["args"]["eval_every"]
        curves = np.array([scores for _, scores in groups[name]])
        updates = every * np.arange(1, curves.shape[1] + 1)
        axis.plot(updates, curves.T, color="tab:blue", linewidth=0.8, alpha=0.5)
        axis.plot(updates, curves.mean(0), color="tab:blue", linewidth=2)
        own = normalized_score(content["data"]["robot"], content["data"]["mean_return"])
        axis.axhline(own, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{name}, {len(curves)} seed{'s' * (len(curves) > 1)}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("D4RL score", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("updates", fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
