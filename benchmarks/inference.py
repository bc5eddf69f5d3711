"""What acting costs once training is over: milliseconds per decision, seconds per episode [DAWM Tab. 3].

    python benchmarks/inference.py                                    # networks at paper scale, every device there is
    python benchmarks/inference.py --scale laptop --out benchmarks/inference_laptop

One process measures all contenders in turn, several rounds, one environment at a time. A decision is a call of the
script's own evaluation policy, NumPy observation in, NumPy action out, so it includes the copies to and from a GPU.
Untrained networks: their time does not depend on their weights. An episode is 1,000 steps of the simulator with D4RL's
physics; a fall starts another, which is not timed. Seconds per episode are 1,000 times the means of those measured.
Prints a table, writes OUT.json and OUT.png.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dawm_iql
import dawm_td3bc
from baselines import decision_diffuser
from common.cli import Count, run_script
from common.evaluation import make_env
from common.run import processor

import numpy as np
import torch
from matplotlib.figure import Figure

# [DAWM Tab. 3], average over nine tasks, seconds per evaluation episode, simulator included, on unknown hardware. DWM's
# agents are DAWM's networks.
PAPER = {"DD": 7.531, "DAWM-TD3BC": 1.904}
EPISODE = 1_000  # steps


@dataclass
class Args:
    scale: Literal["paper", "laptop"] = "paper"  # of DD's networks; the agents have one size
    rounds: Count = 5
    seconds: Annotated[float, (1e-3, 1e6)] = 8.0  # per contender and round
    threads: Count = os.cpu_count() or 1
    out: Path = Path("benchmarks/inference")  # without suffix


def actor_policy(actor, device):
    """As `evaluate` in common/evaluation.py."""
    return torch.no_grad()(lambda obs: actor(torch.as_tensor(obs, device=device)).cpu().numpy())


def planner_policy(obs: torch.Tensor, action: torch.Tensor, **settings):
    """DD's planner for one episode, with untrained networks."""
    args = decision_diffuser.Args(**settings | {"target_return": 0.7})
    torch.manual_seed(0)
    model = decision_diffuser.DecisionDiffuser(args, SimpleNamespace(obs=obs, action=action)).to(obs.device).eval()
    planner = decision_diffuser.Planner(args, model, 1, obs.device)
    return lambda one: planner(one, np.zeros(1, dtype=int))


def contenders(scale: str, env, device: torch.device) -> dict:
    """Name -> policy: obs [1, obs_dim] float32 -> actions [1, action_dim]."""
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    obs = torch.randn(1000, obs_dim, generator=torch.Generator().manual_seed(0)).to(device)
    data = obs, torch.zeros(1000, action_dim, device=device)
    units = obs.mean(0), obs.std(0), action_dim
    names = ("unet_width", "unet_multipliers", "idm_width", "prediction", "normalizer")
    small = {name: decision_diffuser.LAPTOP[name] for name in names} if scale == "laptop" else {}
    original, rng = decision_diffuser.PRESETS["original"] | small, np.random.default_rng(0)
    return {
        "random": lambda one: rng.uniform(-1, 1, (1, action_dim)),
        "DAWM-TD3BC": actor_policy(dawm_td3bc.Actor(*units).to(device), device),
        "DAWM-IQL": actor_policy(dawm_iql.Policy(*units, "gaussian").to(device), device),
        "DD": planner_policy(*data, **small),
        "DD, warm start 3": planner_policy(*data, **small, warm_start_steps=3),
        "DD original": planner_policy(*data, **original),
        "DD original, warm start 40": planner_policy(*data, **original, warm_start_steps=40),
    }


class Player:
    """One contender in an environment of its own, with the milliseconds of each decision and each simulator step."""

    def __init__(self, policy, env):
        self.policy, self.env, self.decisions, self.steps = policy, env, [], []
        self.obs = env.reset(seed=0)[0]

    def play(self, seconds: float, most: int) -> None:
        """Decide and step for about `seconds`, three times or more, at most `most` times."""
        until, count = time.perf_counter() + seconds, 0
        while count < most and (count < 3 or time.perf_counter() < until):
            start = time.perf_counter()
            action = self.policy(self.obs[None].astype(np.float32))
            decided = time.perf_counter()
            self.obs, _, terminated, _, _ = self.env.step(np.clip(action[0], -1, 1))
            self.decisions.append(1e3 * (decided - start))
            self.steps.append(1e3 * (time.perf_counter() - decided))
            count += 1
            if terminated:
                self.obs = self.env.reset()[0]


def measure(options: Args, device: torch.device) -> dict[str, dict[str, float]]:
    players = {}
    for name, policy in contenders(options.scale, make_env("Hopper-v4", "d4rl"), device).items():
        players[name] = Player(policy, make_env("Hopper-v4", "d4rl").unwrapped)  # the wrappers only check and count
        players[name].play(0.2, 50)
        players[name].decisions.clear(), players[name].steps.clear()
    for round_ in range(options.rounds):
        for name, player in players.items():
            print(f"{device.type}, round {round_ + 1} of {options.rounds}: {name:<30}", end="\r", file=sys.stderr)
            player.play(options.seconds, EPISODE)
    simulator = statistics.mean(step for player in players.values() for step in player.steps)  # the same for all
    return {
        name: {
            "decisions": len(player.decisions),
            "median_ms": statistics.median(player.decisions),
            "p95_ms": float(np.percentile(player.decisions, 95)),
            "simulator_s_per_episode": simulator * EPISODE / 1e3,
            "s_per_episode": (statistics.mean(player.decisions) + simulator) * EPISODE / 1e3,
        }
        for name, player in players.items()
    }


def short(number: float) -> str:
    """Three figures, and no exponents."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def table(results: dict) -> str:
    lines = []
    for device, rows in results.items():
        lines.append(f"| {device} | decisions | ms per decision, median | p95 | s per episode | of it simulator "
                     "| episode / DAWM's | paper's |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
        for name, row in rows.items():
            figures = [short(row[x]) for x in ("median_ms", "p95_ms", "s_per_episode", "simulator_s_per_episode")]
            figures.append(short(row["s_per_episode"] / rows["DAWM-TD3BC"]["s_per_episode"]))
            figures.append(f"{PAPER[name] / PAPER['DAWM-TD3BC']:.2f}" if name in PAPER else "")
            lines.append(f"| {name} | {row['decisions']:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    figure = Figure(figsize=(7 * len(results), 3.2), layout="constrained")
    for axis, (device, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        dawm = rows["DAWM-TD3BC"]["s_per_episode"]
        for at, (name, row) in enumerate(reversed(rows.items())):
            axis.barh(name, row["s_per_episode"] / dawm, color="tab:blue", height=0.6)
            axis.text(row["s_per_episode"] / dawm * 1.4, at, f"{short(row['s_per_episode'])} s", va="center")
            if name in PAPER:
                label = "paper, Table 3" if name == "DD" else None
                axis.plot([PAPER[name] / PAPER["DAWM-TD3BC"]], [at], "D", color="tab:orange", label=label)
        axis.set(xscale="log")
        axis.set_title(f"Hopper, batch 1, {device}", loc="left", fontsize=10)
        axis.set_xlabel("time of an episode (1,000 steps, simulator included), DAWM-TD3BC = 1")
        axis.set_xlim(right=20 * max(row["s_per_episode"] for row in rows.values()) / dawm)
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def main(options: Args) -> None:
    torch.set_num_threads(options.threads)
    results = {}
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        title = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {options.threads} threads"
        results[title] = measure(options, torch.device(kind))
    print(table(results))
    hardware = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    content = {"options": vars(options), "hardware": hardware, "paper_seconds": PAPER, "results": results}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, Args)
