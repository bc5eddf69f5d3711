"""What acting costs once training is over: milliseconds per decision, seconds per episode [DAWM Tab. 3].

    python benchmarks/inference.py                                    # networks at paper scale, every device there is
    python benchmarks/inference.py --scale laptop --out docs/inference_laptop

One process measures all contenders in turn, several rounds, one environment at a time. A decision is a call of the
script's own evaluation policy, NumPy observation in, NumPy action out, so it includes the copies to and from a GPU.
Untrained networks: their time does not depend on their weights. An episode is 1,000 steps of the simulator with D4RL's
physics; a fall starts another, which is not timed. Seconds per episode are 1,000 times the means over the decisions and
steps that were measured. Prints a table, writes OUT.json and OUT.png.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import dawm_iql
import dawm_td3bc
import dd_baseline
import dwm_baseline
from common import UserError
from common.evaluation import make_env
from common.run import processor

# [DAWM Tab. 3], average over nine tasks, seconds per evaluation episode, simulator included, on unknown hardware.
PAPER = {"DD": 7.531, "DWM-TD3BC": 1.894, "DAWM-TD3BC": 1.904}
EPISODE = 1_000  # steps


def actor_policy(actor, device):
    """As `evaluate` in the scripts."""

    @torch.no_grad()
    def policy(obs):
        return actor(torch.as_tensor(obs, device=device)).cpu().numpy()

    return policy


def planner_policy(scale: dict, obs: torch.Tensor, action: torch.Tensor, **changes):
    """DD's planner for one episode, with untrained networks."""
    args = dd_baseline.Args(**{**changes, **scale, "target_return": 0.7})
    torch.manual_seed(0)
    model = dd_baseline.DecisionDiffuser(args, SimpleNamespace(obs=obs, action=action)).to(obs.device).eval()
    planner = dd_baseline.Planner(args, model, 1, obs.device)
    return lambda one: planner(one, np.zeros(1, dtype=int))


def contenders(scale: str, env, device: torch.device) -> dict:
    """Name -> policy: obs [1, obs_dim] float32 -> actions [1, action_dim]."""
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(1000, obs_dim, generator=generator).to(device)
    action = torch.zeros(1000, action_dim, device=device)
    units = obs.mean(0), obs.std(0), action_dim
    small = {}
    if scale == "laptop":
        small = {name: dd_baseline.LAPTOP[name] for name in ("unet_width", "unet_multipliers", "idm_width")}
        small |= {name: dd_baseline.LAPTOP[name] for name in ("prediction", "normalizer")}
    original = dd_baseline.PRESETS["original"]
    rng = np.random.default_rng(0)
    return {
        "random": lambda one: rng.uniform(-1, 1, (1, action_dim)),
        "DAWM-TD3BC": actor_policy(dawm_td3bc.Actor(*units).to(device), device),
        "DAWM-IQL": actor_policy(dawm_iql.Policy(*units, "gaussian").to(device), device),
        "DWM-TD3BC": actor_policy(dwm_baseline.Actor(*units).to(device), device),
        "DWM-IQL": actor_policy(dwm_baseline.Policy(*units, "gaussian").to(device), device),
        "DD": planner_policy(small, obs, action),
        "DD, warm start 3": planner_policy(small, obs, action, warm_start_steps=3),
        "DD original": planner_policy(small, obs, action, **original),
        "DD original, warm start 40": planner_policy(small, obs, action, **original, warm_start_steps=40),
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
            stepped = time.perf_counter()
            self.decisions.append(1e3 * (decided - start))
            self.steps.append(1e3 * (stepped - decided))
            count += 1
            if terminated:
                self.obs = self.env.reset()[0]


def measure(options, device: torch.device) -> dict[str, dict[str, float]]:
    envs = {}
    players = {}
    for name, policy in contenders(options.scale, make_env(options.simulator, "d4rl"), device).items():
        envs[name] = make_env(options.simulator, "d4rl").unwrapped  # without the wrappers, which only check and count
        players[name] = Player(policy, envs[name])
        players[name].play(0.2, 50)
        players[name].decisions.clear(), players[name].steps.clear()
    for round_ in range(options.rounds):
        for name, player in players.items():
            print(f"{device.type}, round {round_ + 1} of {options.rounds}: {name:<30}", end="\r", file=sys.stderr)
            player.play(options.seconds, EPISODE)
    print(" " * 72, end="\r", file=sys.stderr)
    simulator = statistics.mean(step for player in players.values() for step in player.steps)  # the same for all
    rows = {}
    for name, player in players.items():
        rows[name] = {
            "decisions": len(player.decisions),
            "median_ms": statistics.median(player.decisions),
            "p95_ms": float(np.percentile(player.decisions, 95)),
            "deciding_s_per_episode": statistics.mean(player.decisions) * EPISODE / 1e3,
            "simulator_s_per_episode": simulator * EPISODE / 1e3,
        }
        rows[name]["s_per_episode"] = rows[name]["deciding_s_per_episode"] + rows[name]["simulator_s_per_episode"]
    return rows


def short(number: float) -> str:
    """Three figures, and no exponents."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def table(results: dict) -> str:
    lines = []
    for device, rows in results.items():
        dawm = rows["DAWM-TD3BC"]
        lines += [
            f"| {device} | decisions | ms per decision, median | p95 | s per episode | of it simulator "
            "| decision / DAWM's | episode / DAWM's | paper's episode / DAWM's |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            paper = f"{PAPER[name] / PAPER['DAWM-TD3BC']:.2f}" if name in PAPER else ""
            lines.append(
                f"| {name} | {row['decisions']:,} | {short(row['median_ms'])} | {short(row['p95_ms'])} "
                f"| {short(row['s_per_episode'])} | {short(row['simulator_s_per_episode'])} "
                f"| {short(row['median_ms'] / dawm['median_ms'])} "
                f"| {short(row['s_per_episode'] / dawm['s_per_episode'])} | {paper} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(7 * len(results), 3.6), squeeze=False, layout="constrained")
    for axis, (device, rows) in zip(axes[0], results.items(), strict=True):
        names = list(rows)[::-1]
        dawm = rows["DAWM-TD3BC"]["s_per_episode"]
        axis.barh(names, [rows[n]["s_per_episode"] / dawm for n in names], color="tab:blue", height=0.6)
        for at, name in enumerate(names):
            axis.text(
                rows[name]["s_per_episode"] / dawm * 1.1, at, f"{short(rows[name]['s_per_episode'])} s", va="center"
            )
            if name in PAPER:
                paper = PAPER[name] / PAPER["DAWM-TD3BC"]
                axis.plot([paper], [at], "D", color="tab:orange", label="paper, Table 3" if name == "DD" else None)
        axis.set_xscale("log")
        axis.set_xlim(right=20 * max(row["s_per_episode"] for row in rows.values()) / dawm)
        axis.set_xlabel("time per episode of 1,000 steps, simulator included; DAWM-TD3BC is 1")
        axis.set_title(device, fontsize=10)
        axis.legend(loc="upper right")
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scale", choices=("paper", "laptop"), default="paper", help="of DD's networks; the agents have one size"
    )
    parser.add_argument("--simulator", default="Hopper-v4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="per contender and round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("docs/inference"), help="without suffix")
    options = parser.parse_args()
    if options.rounds < 1 or not options.seconds > 0 or options.threads < 1:
        parser.error("--rounds, --seconds and --threads must be above 0")
    torch.set_num_threads(options.threads)
    try:
        make_env(options.simulator, "d4rl")
    except UserError as error:
        parser.error(str(error))
    results = {}
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        title = torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {options.threads} threads"
        results[title] = measure(options, torch.device(kind))
    text = table(results)
    print(text)
    hardware = {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__}
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {"options": told, "hardware": hardware, "paper_seconds": PAPER, "results": results}
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
