"""Describes the local data sets: the rows of the table in README.md, SHA256SUMS and returns.png, from the data alone.

    python local_datasets/card.py

Sets that are not on this machine yet are made first, as `collect.py --env-id ...` would, and each one that is not what
SHA256SUMS listed until then is told: `git diff` shows what this machine makes otherwise.
"""

import re
import sys
from pathlib import Path

import matplotlib
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError
from common.cli import tell
from common.data import KNOWN, ROBOTS, OfflineDataset, load_dataset, minari_root
from common.evaluation import normalized_score
from common.files import write_text
from local_datasets import collect
from local_datasets.collect import BEHAVIOR_DIR, write_sums

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
# Spread of the returns in D4RL's files, from public training logs; means are in KNOWN.
D4RL_STD = {
    "hopper-medium-v2": 379,
    "hopper-medium-replay-v2": 511,
    "walker2d-medium-v2": 1095,
    "walker2d-medium-replay-v2": 896,
    "halfcheetah-medium-v2": 356,
    "halfcheetah-medium-replay-v2": 1681,
}


def table_row(dataset: OfflineDataset, policies: list[dict]) -> str:
    trained = ", ".join(f"{policy['training_step'] / 1000:g}k" for policy in policies)
    mean, std = dataset.returns.mean(), dataset.returns.std()
    return (
        f"| `{dataset.env_id}` | {trained} | {len(dataset.lengths):,} | {len(dataset.reward):,} | "
        f"{dataset.terminated.sum() / len(dataset.lengths):.0%} | {mean:,.0f} ± {std:,.0f} | "
        f"{normalized_score(dataset.robot, mean):.1f} | {d4rl_return(dataset.env_id)} |"
    )


def d4rl_name(env_id: str) -> str:
    """local/hopper/medium-v0 -> hopper-medium-v2"""
    return "-".join(collect.ENV_IDS[env_id]) + "-v2"


def d4rl_return(env_id: str) -> str:
    name = d4rl_name(env_id)
    spread = f" ± {D4RL_STD[name]:,}" if name in D4RL_STD else ""
    return f"{KNOWN[name][2]:,.0f}{spread}" if name in KNOWN else "not known to us"


def draw_returns(datasets: list[OfflineDataset], path: Path) -> None:
    """One histogram per data set: a row per robot, a column per quality, the same return axis along a row."""
    robots = [robot for robot in ROBOTS if any(dataset.robot == robot for dataset in datasets)]
    qualities = list(collect.POLICIES)
    size = (2.2 * len(qualities), 1.6 * len(robots) + 0.3)
    figure, axes = plt.subplots(len(robots), len(qualities), squeeze=False, sharex="row", figsize=size, dpi=80)
    for axis in axes.flat:
        axis.set_axis_off()
    for dataset in datasets:
        robot, quality = collect.ENV_IDS[dataset.env_id]
        axis = axes[robots.index(robot), qualities.index(quality)]
        axis.set_axis_on()
        axis.hist(dataset.returns, bins=40, color="tab:blue")
        if (name := d4rl_name(dataset.env_id)) in KNOWN:
            axis.axvline(KNOWN[name][2], color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{robot} {quality}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    figure.supxlabel("return of an episode; dashed: mean of the D4RL set of that name", fontsize=8)
    figure.supylabel("episodes", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})  # no version inside: the same data give the same file
    plt.close(figure)


def main(folder: Path = HERE, behavior_dir: Path = BEHAVIOR_DIR, steps: int = collect.Args.steps) -> None:
    datasets, rows, sums = [], [], {}
    for env_id in collect.ENV_IDS:
        try:
            collect.main(collect.Args(env_id, steps, behavior_dir=behavior_dir))
        except collect.NotShipped:
            continue
        found = collect.stored(minari_root() / env_id)
        datasets.append(load_dataset(env_id))
        rows.append(table_row(datasets[-1], found["policies"]) + "\n")
        sums[env_id] = found["sha256"]
    if not datasets:
        raise UserError(f"{behavior_dir} has the policies of no data set; give a folder as collect.py's")
    text = (folder / "README.md").read_text()
    write_text(folder / "README.md", re.sub(r"(?<=---\|\n)(\|.*\n)+", "".join(rows), text))
    write_sums(folder, sums)
    draw_returns(datasets, folder / "returns.png")
    print(f"wrote the table of README.md, SHA256SUMS and returns.png in {folder} for {len(datasets)} data sets")


if __name__ == "__main__":
    tell(lambda: tyro.cli(main))
