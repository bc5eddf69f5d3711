"""Does asking DD for more return give more? Plans and episodes for five targets, Hopper, laptop scale.

    python experiments/dd_guidance.py --seeds 0 1 2     # of dd_baseline.py; trains what is not kept
    python experiments/dd_guidance.py --env-id local/hopper/medium-v0 --out docs/dd_guidance_medium

The targets are percentiles of the data's return-to-go labels, over all states. (Over first states they hardly differ:
discounting ends within any episode.) For each:

* plans: from 1,000 real states, equal ones and equal noise for all targets, one plan each. The simulator is set to
  each planned state, takes the action that the inverse dynamics gives for the next one, and tells the reward; a plan
  counts until its first fallen state. Their sum, over the plan.
* episodes: what the planner reaches in the simulator, from equal start states with equal noise.

Writes OUT.md, OUT.json and OUT.png.
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
    evaluator, rows = Evaluator("Hopper-v4", "d4rl", options.episodes), []
    for percentile, target in zip(PERCENTILES, targets.tolist(), strict=True):
        args.target_return = target
        planner = Planner(args, model, options.episodes, run.device)
        with run.stage(f"target {percentile}", evaluator.max_steps, "step") as bar:

            def policy(obs, planner=planner, bar=bar):
                bar.update()
                return planner(obs, evaluator.running)

            returns = evaluator(policy, seed=seed + 100)
        along = plan_rewards(args, model, first, target)
        rows.append({
            "seed": seed, "percentile": percentile, "target": target, "plan_reward": float(along.mean()),
            "plan_reward_standard_error": float(along.std(ddof=1) / len(along) ** 0.5),
            "episode_return": float(returns.mean()), "episode_returns": returns.tolist(),
        })  # fmt: skip
        run.say("", f"percentile {percentile}: plans {along.mean():.1f}, episodes {returns.mean():.0f}")
    run.finish({})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="local/hopper/medium-expert-v0", help="local Hopper data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/dd_guidance"))
    parser.add_argument("--out", type=Path, default=Path("docs/dd_guidance"), help="without suffix")
    options = parser.parse_args()
    rows = [row for seed in options.seeds for row in measure(seed, options)]
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| percentile of the labels | target | reward along a plan | return of an episode |",
        "|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for percentile in PERCENTILES:
        same = [row for row in rows if row["percentile"] == percentile]
        columns = [f"{percentile}", f"{statistics.mean(row['target'] for row in same):.3f}"]
        for key, digits in (("plan_reward", 1), ("episode_return", 0)):
            values = [row[key] for row in same]
            deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            columns.append(f"{statistics.mean(values):.{digits}f}{deviation}")
        lines.append("| " + " | ".join(columns) + " |")
    for axis, key, title in zip(
        axes, ("plan_reward", "episode_return"), ("simulator's reward along a plan", "episode return"), strict=True
    ):
        curves = np.array([[r[key] for r in rows if r["seed"] == seed] for seed in options.seeds])
        axis.plot(PERCENTILES, curves.T, color="tab:blue", linewidth=0.8, alpha=0.6, marker=".")
        axis.plot(PERCENTILES, curves.mean(0), color="tab:blue", linewidth=2, marker="o")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("target: percentile of the return-to-go labels")
        axis.set_xticks(PERCENTILES)
        axis.grid(alpha=0.3)
    figure.savefig(options.out.with_suffix(".png"), dpi=100)
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
