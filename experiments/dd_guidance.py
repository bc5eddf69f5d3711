"""Does asking DD for more return give more? Plans and episodes for five targets, Hopper, laptop scale.

    python experiments/dd_guidance.py                   # seeds of dd_baseline.py; trains what is not kept
    python experiments/dd_guidance.py --env-id local/hopper/medium-v0 --out docs/dd_guidance_medium

The targets are percentiles of the data's return-to-go labels, over all states. (Over first states they hardly differ:
discounting ends within any episode.) For each:

* plans: from 1,000 real states, equal ones and equal noise for all targets, one plan each. The simulator is set to
  each planned state, takes the action that the inverse dynamics gives for the next one, and tells the reward; a plan
  counts until its first fallen state. Told is what the sum over a plan gains against the lowest target, for three
  guidance scales, and its standard error over plans.
* episodes: what the planner reaches in the simulator, from equal start states with equal noise.

Prints a table, writes OUT.json and OUT.png.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from true_dynamics import simulate

from common.data import load_dataset
from common.evaluation import Evaluator
from common.run import Run
from dawm_td3bc import has_fallen
from dd_baseline import (
    LAPTOP,
    Args,
    Planner,
    Windows,
    measure_plans,
    sample_plans,
    standard_normal,
    train_decision_diffuser,
)

PERCENTILES = (10, 30, 50, 70, 90)
SCALES = (1.2, 3.0, 6.0)  # of guidance; episodes are run with the first


def plan_rewards(args: Args, model, first: torch.Tensor, target: float) -> np.ndarray:
    """Sum of the simulator's rewards along one plan from each of the states first [B, obs_dim], normalised -> [B]."""
    noises = standard_normal((len(first), args.plan_horizon, first.shape[1]), first.device, seed=args.seed)
    plans = sample_plans(args, model, first, torch.full((len(first), 1), target, device=first.device), noises)
    with torch.no_grad():
        action = model.inverse_dynamics(plans[:, :-1], plans[:, 1:]).clamp(-1, 1)
    obs = model.obs_units.denormalize(plans)
    stands = (~has_fallen("hopper", obs[:, :-1])).cumprod(1).cpu().numpy()
    _, reward = simulate(obs[:, :-1].flatten(0, 1).cpu().numpy(), action.flatten(0, 1).cpu().numpy())
    return (reward.reshape(stands.shape) * stands).sum(1)


def measure(seed: int, options) -> list[dict]:
    args = replace(Args(**{**asdict(Args()), **LAPTOP}), env_id=options.env_id, laptop=True, seed=seed)
    args.physics, args.exp_name, args.run_dir = "d4rl", "dd_guidance", options.run_dir
    dataset, run = load_dataset(args.env_id), Run(args)
    windows = Windows(args, dataset, run.device)
    run.describe(dataset.facts(), return_scale=windows.return_scale)
    model = train_decision_diffuser(args, windows, run)
    measure_plans(args, model, windows, run)
    targets = np.percentile(windows.return_to_go.cpu().numpy(), PERCENTILES)
    index = windows.fits.nonzero()[:, 0]
    index = index[torch.linspace(0, len(index) - 1, 1000, device=run.device).long()]
    first = model.obs_units.normalize(windows.obs[windows.start[index]])
    along = {}
    for scale in SCALES:
        args.guidance_scale = scale
        sums = [plan_rewards(args, model, first, target) for target in targets.tolist()]
        along[scale] = [total - sums[0] for total in sums]  # plan by plan: start and noise are the same
    args.guidance_scale = SCALES[0]
    evaluator, rows = Evaluator("Hopper-v4", "d4rl", options.episodes), []
    for i, (percentile, target) in enumerate(zip(PERCENTILES, targets.tolist(), strict=True)):
        args.target_return = target
        planner = Planner(args, model, options.episodes, run.device)
        with run.stage(f"target {percentile}", evaluator.max_steps, "step") as stage:

            def policy(obs, planner=planner, stage=stage):
                stage.update()
                return planner(obs, evaluator.running)

            returns = evaluator(policy, seed=seed + 100)
        gains = {scale: float(along[scale][i].mean()) for scale in SCALES}
        errors = {scale: float(along[scale][i].std(ddof=1) / len(first) ** 0.5) for scale in SCALES}
        rows.append({
            "seed": seed, "percentile": percentile, "target": target, "plan_gain": gains, "plan_gain_error": errors,
            "episode_return": float(returns.mean()), "episode_returns": returns.tolist(),
        })  # fmt: skip
        run.say("", f"percentile {percentile}: plans gain {gains}, episodes {returns.mean():.0f}")
    run.finish({})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="local/hopper/medium-expert-v0", help="local Hopper data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/dd_guidance"))
    parser.add_argument("--out", type=Path, default=Path("docs/dd_guidance"), help="without suffix")
    options = parser.parse_args()
    if not options.env_id.startswith("local/hopper/"):
        parser.error(f"--env-id {options.env_id}: the simulator's rewards are written for local/hopper/QUALITY-v0 only")
    rows = [row for seed in options.seeds for row in measure(seed, options)]
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    head = [f"plan's gain, guidance {scale}" for scale in SCALES]
    lines = ["| percentile of the labels | target | " + " | ".join(head) + " | return of an episode |"]
    lines.append("|---" * (3 + len(SCALES)) + "|")
    gains = np.zeros((len(SCALES), len(PERCENTILES)))
    errors = np.zeros_like(gains)
    for i, percentile in enumerate(PERCENTILES):
        same = [row for row in rows if row["percentile"] == percentile]
        columns = [f"{percentile}", f"{statistics.mean(row['target'] for row in same):.3f}"]
        for j, scale in enumerate(SCALES):
            gains[j, i] = statistics.mean(row["plan_gain"][scale] for row in same)
            errors[j, i] = sum(row["plan_gain_error"][scale] ** 2 for row in same) ** 0.5 / len(same)
            columns.append(f"{gains[j, i]:.4f} ± {errors[j, i]:.4f}")
        values = [row["episode_return"] for row in same]
        deviation = f" ± {statistics.stdev(values):.0f}" if len(values) > 1 else ""
        lines.append("| " + " | ".join([*columns, f"{statistics.mean(values):.0f}{deviation}"]) + " |")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for scale, gain, error in zip(SCALES, gains, errors, strict=True):
        axes[0].errorbar(PERCENTILES, gain, 2 * error, marker="o", capsize=3, label=f"guidance {scale}")
    axes[0].set_title(
        "simulator's reward along a plan,\nagainst the lowest target (bars: 2 standard errors)", fontsize=10
    )
    axes[0].legend(fontsize=8)
    curves = np.array([[row["episode_return"] for row in rows if row["seed"] == seed] for seed in options.seeds])
    axes[1].plot(PERCENTILES, curves.T, color="tab:blue", linewidth=0.8, alpha=0.6, marker=".")
    axes[1].plot(PERCENTILES, curves.mean(0), color="tab:blue", linewidth=2, marker="o")
    axes[1].set_title(f"return of an episode, guidance {SCALES[0]}\n(thin: seeds, thick: their mean)", fontsize=10)
    for axis in axes:
        axis.set_xlabel("target: percentile of the return-to-go labels")
        axis.set_xticks(PERCENTILES)
        axis.grid(alpha=0.3)
    figure.savefig(options.out.with_suffix(".png"), dpi=100)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
