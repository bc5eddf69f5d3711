"""Does asking Decision Diffuser for more return give more? Plans and episodes for five targets, Hopper, laptop scale.

    python experiments/dd_guidance.py              # table and docs/dd_guidance.png from dd_guidance.json beside it
    python experiments/dd_guidance.py --measure    # that file anew: half an hour on one core; kept models are found

The targets are percentiles of the data's return-to-go labels, over all states. (Over first states they hardly differ:
discounting ends within any episode.) For each:

* plans: from 1,000 real states, equal ones and equal noise for all targets, one plan each. The simulator is set to
  each planned state, takes the action that the inverse dynamics gives for the next one, and tells the reward; a plan
  counts until its first fallen state. Told is what the sum over a plan gains against the lowest target, for three
  guidance scales, and its standard error over plans.
* episodes: what the planner reaches in the simulator, from equal start states with equal noise.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines.decision_diffuser import LAPTOP, Args, Planner, main, sample_plans
from common.evaluation import Stepper
from common.files import write_text

import numpy as np
import torch
from matplotlib.figure import Figure

ENV_ID, SEEDS, PERCENTILES = "local/hopper/medium-expert-v0", (0, 1), (10, 30, 50, 70, 90)
SCALES = (1.2, 3.0, 6.0)  # of guidance; episodes are run with the first
RESULTS = Path(__file__).with_suffix(".json")
PICTURE = RESULTS.parent.parent / "docs" / "dd_guidance.png"


def plan_rewards(parts, stepper: Stepper, first: torch.Tensor, target: float, scale: float) -> np.ndarray:
    """Sum of the simulator's rewards along one plan from each of the states first [B, obs_dim], normalised -> [B]."""
    args, shape = replace(parts.args, guidance_scale=scale), (len(first), parts.args.plan_horizon, first.shape[1])
    torch.manual_seed(args.seed)
    plans = sample_plans(args, parts.model, first, torch.full((len(first), 1), target), lambda: torch.randn(shape))
    with torch.no_grad():
        action = parts.model.inverse_dynamics(plans[:, :-1], plans[:, 1:]).flatten(0, 1).numpy()
    obs = parts.model.units.denormalize(plans)[:, :-1].flatten(0, 1).numpy()
    low, high = parts.dataset.healthy_low, parts.dataset.healthy_high
    stands = ((obs > low) & (obs < high)).all(1).reshape(len(first), -1).cumprod(1)
    return (stepper(obs, action)[1].reshape(stands.shape) * stands).sum(1)


def measure(seed: int) -> list[dict]:
    args = Args(**LAPTOP | dict(env_id=ENV_ID, laptop=True, seed=seed, device="cpu", exp_name="dd_guidance"))
    parts = main(args)
    stepper = Stepper(parts.dataset, args.physics)
    targets = np.percentile(parts.windows.return_to_go.numpy(), PERCENTILES).tolist()
    start = parts.windows.start[parts.windows.start + args.plan_horizon - 1 <= parts.windows.final]  # whole windows
    start = start[torch.linspace(0, len(start) - 1, 1000).long()]
    first = parts.model.units.normalize(parts.windows.obs[start])
    sums = {scale: [plan_rewards(parts, stepper, first, target, scale) for target in targets] for scale in SCALES}
    rows = []
    for i, (percentile, target) in enumerate(zip(PERCENTILES, targets, strict=True)):
        # Plan by plan: start and noise are the same for all targets.
        gains = {scale: sums[scale][i] - sums[scale][0] for scale in SCALES}
        asked = replace(args, target_return=target, guidance_scale=SCALES[0])
        planner = Planner(asked, parts.model, args.eval_episodes, parts.run.device)
        returns = parts.evaluator(lambda obs, p=planner: p(obs, parts.evaluator.running), seed=seed + 100)
        rows.append({
            "seed": seed, "percentile": percentile, "target": target,
            "plan_gain": {scale: gain.mean() for scale, gain in gains.items()},
            "plan_gain_error": {scale: gain.std(ddof=1) / len(first) ** 0.5 for scale, gain in gains.items()},
            "episode_return": returns.mean(), "episode_returns": returns.tolist(),
        })  # fmt: skip
        print(f"seed {seed}, percentile {percentile}: episodes return {returns.mean():.0f}", flush=True)
    return rows


def report(rows: list[dict]) -> None:
    """The table, on the console, and the picture."""
    seeds, scales = sorted({row["seed"] for row in rows}), list(rows[0]["plan_gain"])

    def grid(value):  # [seeds, percentiles]
        return np.array([[value(row) for row in rows if row["seed"] == seed] for seed in seeds])

    returns, target = grid(lambda row: row["episode_return"]), grid(lambda row: row["target"]).mean(0)
    gain = [grid(lambda row, s=s: row["plan_gain"][s]).mean(0) for s in scales]
    error = [(grid(lambda row, s=s: row["plan_gain_error"][s]) ** 2).sum(0) ** 0.5 / len(seeds) for s in scales]
    heads = [f"plan's gain, guidance {scale}" for scale in scales]
    print("| percentile of the labels | target | " + " | ".join([*heads, "return of an episode"]) + " |")
    print("|---" * (3 + len(scales)) + "|")
    for i, percentile in enumerate(PERCENTILES):
        gains = " | ".join(f"{gain[j][i]:.4f} ± {error[j][i]:.4f}" for j in range(len(scales)))
        mean, std = returns[:, i].mean(), returns[:, i].std(ddof=1)
        print(f"| {percentile} | {target[i]:.3f} | {gains} | {mean:.0f} ± {std:.0f} |")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    plans, episodes = figure.subplots(1, 2)
    for j, scale in enumerate(scales):
        plans.errorbar(PERCENTILES, gain[j], 2 * error[j], marker="o", capsize=3, label=f"guidance {scale}")
    plans.set_ylabel("reward per plan, gain over\nthe lowest target (± 2 s.e.)")
    for seed, line in zip(seeds, returns, strict=True):
        episodes.plot(PERCENTILES, line, linewidth=0.8, marker=".", label=f"seed {seed}")
    episodes.plot(PERCENTILES, returns.mean(0), color="black", linewidth=2, marker="o", label="their mean")
    episodes.set_ylabel(f"return of an episode,\nguidance {scales[0]}")
    for axis in (plans, episodes):
        axis.set_xlabel("return asked for: percentile of the data's labels")
        axis.set_xticks(PERCENTILES)
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    figure.suptitle(f"Decision Diffuser asked for more: {ENV_ID}, --laptop", fontsize=10)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="instead of taking what dd_guidance.json holds")
    if parser.parse_args().measure:
        write_text(RESULTS, json.dumps([row for seed in SEEDS for row in measure(seed)], indent=1) + "\n")
    report(json.loads(RESULTS.read_text()))
