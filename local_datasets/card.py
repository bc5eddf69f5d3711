"""Describes the local data sets: writes README.md, SHA256SUMS and returns.png beside this file, from the data alone.

    python local_datasets/card.py

Sets that are not on this machine yet are made first, as `collect.py --env-id ...` would, and each one that is not what
SHA256SUMS listed until then is told: `git diff` shows what this machine makes otherwise.
"""

import sys
from dataclasses import dataclass
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
from local_datasets.train_behavior import EXPERT_RETURN

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Spread of the returns in D4RL's files, from public training logs; means are in KNOWN.
D4RL_STD = {
    "hopper-medium-v2": 379,
    "hopper-medium-replay-v2": 511,
    "walker2d-medium-v2": 1095,
    "walker2d-medium-replay-v2": 896,
    "halfcheetah-medium-v2": 356,
    "halfcheetah-medium-replay-v2": 1681,
}
TEXT = """\
# Local data sets

Written by `python local_datasets/card.py`; every figure about our sets is computed from them.

Made on your machine in a minute or two each, without a network, by rolling out the policies in `behavior/`:

    python local_datasets/collect.py --env-id local/hopper/medium-v0

(`--env-id local/hopper/medium-v0` of any script does this by itself the first time.) They are Minari data sets under
`MINARI_DATASETS_PATH`, default `~/.minari/datasets`. **They are not D4RL, and no score on them can stand in a row with
scores on D4RL.**

## What is in them

Returns are undiscounted, over all episodes, mean ± standard deviation; score is the mean on D4RL's scale (0 = random,
100 = expert); falls is the share of episodes that end in one. The last column is the D4RL v2 set of the same name.

| data set | policies, by training step | episodes | steps | falls | return | score | D4RL return |
|---|---|---|---|---|---|---|---|
{rows}

{missing}![Histogram of episode returns per data set, with D4RL's mean as a dashed line](returns.png)

## How they differ from D4RL

- **Size.** {steps} steps per set; D4RL's medium and expert sets have a million, medium-expert two million.
- **Policies.** One SAC run per robot (smaller networks and layer-normalised critics), not D4RL's. Its medium policy is
  the snapshot most like D4RL's medium set in mean and spread of returns, where possible among those that do at least a
  tenth better without their noise: cloning D4RL's hopper-medium does that too, but it makes the data's own mean easier
  to reach. Gait and visited states are others.
- **medium-replay** is not a replay buffer: equal shares of steps from {replay} snapshots between the start of training
  and the medium policy, without the exploration that changes from step to step.
- **random** is the run's untrained policy.
- **medium-expert** is one half each, in steps, as D4RL's.
- **Physics** are D4RL's: the `-v4` environments with the capsule masses of MuJoCo up to 2.1.0 (`--physics d4rl`).
  Minari's `recover_environment()` gives the stock ones.
- **Ends.** Each policy's last episode is cut at the step budget and marked truncated; D4RL leaves it without a mark.
- **Precision.** float32 throughout, as D4RL, and actions are multiples of 2^-16, so that every machine makes the same
  ones. `infos/qpos`, `infos/qvel` and log-probabilities are not stored.

## The same on your machine

`SHA256SUMS` lists the arrays of each set at its default size; collect.py tells if yours came out otherwise. They do not
depend on the make of an x86 CPU with AVX2 and FMA (from 2013 on), on its vector units or on threads: the policies
compute in float64 and their actions are rounded, which leaves a chance of about 1 in 50,000 per set that one action
falls on the other side. MuJoCo itself takes sines and cosines from the C library: an older CPU, Arm, or a system
without glibc gives other last digits, which grow within an episode. Such a set is like ours, not equal.

## The policies

`behavior/*.safetensors` hold float16 weights; `behavior/SHA256SUMS` lists their hashes, and collect.py refuses others.
{experts}
The shipped ones were trained by an SAC of our own (`git show 3bf4306:local_datasets/train_behavior.py`), and picked
from runs, seed 0, of 470,000 steps for hopper (all it ships is from the first 260,000; exported with
`--allow-weak-expert`), 255,000 for walker2d and 240,000 for halfcheetah (these two exported with
`--export-episodes 50`). Today [train_behavior.py](train_behavior.py) trains others of the same kind with
stable-baselines3's SAC (hours, one core per robot):

    python local_datasets/train_behavior.py --robot hopper
    python local_datasets/train_behavior.py --robot hopper --export
"""


@dataclass
class Args:
    steps: int = collect.Args.steps
    """transitions per data set, as in collect.py"""
    behavior_dir: Path = BEHAVIOR_DIR
    """where the policies and their SHA256SUMS are"""
    output_dir: Path = Path(__file__).resolve().parent
    """where README.md, SHA256SUMS and returns.png go"""


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


def main(args: Args) -> None:
    datasets, rows, missing, sums, snapshots = [], [], [], {}, set()
    for env_id in collect.ENV_IDS:
        try:
            collect.main(collect.Args(env_id, args.steps, behavior_dir=args.behavior_dir))
        except collect.NotShipped:
            missing.append(env_id)
            continue
        found = collect.stored(minari_root() / env_id)
        datasets.append(load_dataset(env_id))
        rows.append(table_row(datasets[-1], found["policies"]))
        sums[env_id] = found["sha256"]
        if "medium-replay" in env_id:
            snapshots.add(str(len(found["policies"])))
    if not datasets:
        raise UserError(f"no policies in {args.behavior_dir}; make them with train_behavior.py --export")
    weak = [
        f"{dataset.robot} ({dataset.returns.mean():,.0f})"
        for dataset in datasets
        if "/expert-" in dataset.env_id and dataset.returns.mean() < EXPERT_RETURN[dataset.robot]
    ]
    text = TEXT.format(
        rows="\n".join(rows),
        missing=f"Not shipped, since no policy for them exists: {', '.join(missing)}.\n\n" if missing else "",
        steps=f"{args.steps:,}",
        replay=" or ".join(sorted(snapshots)) or "no",
        experts=f"\nWeaker than an expert should be: {', '.join(weak)}.\n" if weak else "",
    )
    write_text(args.output_dir / "README.md", text)
    write_sums(args.output_dir, sums)
    draw_returns(datasets, args.output_dir / "returns.png")
    print(f"wrote README.md, SHA256SUMS and returns.png in {args.output_dir} for {len(datasets)} data sets")


if __name__ == "__main__":
    tell(lambda: main(tyro.cli(Args)))
