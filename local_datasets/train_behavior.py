"""Trains the behaviour policies whose episodes become the local data sets: stable-baselines3's SAC in D4RL's physics.

D4RL's medium and expert data come from SAC policies at two points of one training run, and its replay data from that
run's buffer. This script makes such a run: it keeps a snapshot of the actor every few thousand steps, with its measured
return in the file, and `--export` picks from them the policies that collect.py rolls out.

    pip install stable-baselines3==2.9.2                             # pinned in requirements-dev.txt
    python local_datasets/train_behavior.py --robot hopper           # train, or go on at the last checkpoint
    python local_datasets/train_behavior.py --robot hopper --export  # write behavior/hopper-*.safetensors

The policies in behavior/ are older: they were trained by an SAC of our own, which revision 3bf4306 has in this place.

[SAC]      Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905
[D4RL]     Datasets for Deep Data-Driven RL, arXiv 2004.07219
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError
from common.cli import Signals, Stopped, run_script
from common.data import KNOWN, ROBOTS
from common.evaluation import Evaluator, make_env
from common.files import sha256_of, take_lock, write_whole
from local_datasets.collect import (
    BEHAVIOR_DIR,
    POLICY_FORMAT,
    Policy,
    as_policy,
    read_policy,
    read_sums,
    write_policy,
    write_sums,
)

# Spread of the returns in D4RL's medium sets [D4RL v2 files], whose mean and spread --export aims at.
MEDIUM_STD = {"hopper": 378.95, "walker2d": 1095.44, "halfcheetah": 355.75}
# Mean return below which a policy is not called expert: our own choice, D4RL's experts reach 3511, 4921, 10656.
EXPERT_RETURN = {"hopper": 3000.0, "walker2d": 3800.0, "halfcheetah": 8000.0}
# The library's defaults are [SAC Tab. 1]; [deviation] there the actor has 256, this keeps the shipped files small.
NETWORKS = {"pi": [128, 128], "qf": [256, 256]}


@dataclass
class Args:
    robot: Literal["hopper", "walker2d", "halfcheetah"] = "hopper"
    """which robot, in D4RL's physics"""
    total_steps: int = 1_000_000
    """environment steps of the whole run"""
    seed: int = 0
    """seeds networks, noise, start states and batches"""
    snapshot_every: int = 5_000
    """environment steps between two kept actors"""
    eval_episodes: int = 10
    """episodes that measure each snapshot"""
    checkpoint_every: int = 50_000
    """environment steps between two checkpoints, of 200 to 300 MB; a signal makes one too"""
    folder: Path = Path("runs/behavior")
    """the run goes to FOLDER/ROBOT-SEED"""

    export: bool = False
    """train no further: pick policies from the run's snapshots, for collect.py"""
    replay_snapshots: int = 8
    """policies that stand for the replay buffer of the run up to the medium policy"""
    export_episodes: int = 100
    """episodes that measure each candidate again"""
    allow_weak_expert: bool = False
    """export the best policy as expert even if it falls short of an expert's return"""
    behavior_dir: Path = BEHAVIOR_DIR
    """where --export writes"""


def folder_of(args: Args) -> Path:
    return args.folder / f"{args.robot}-{args.seed}"


def evaluator_of(robot: str, episodes: int) -> Evaluator:
    """Of a policy that needs no data: in D4RL's physics, actions in [-1, 1]."""
    task = SimpleNamespace(spec=gym.spec(ROBOTS[robot]), physics="d4rl", robot=robot, action_low=-1, action_high=1)
    return Evaluator(task, "d4rl", episodes)


def measured(policy: Policy, evaluator: Evaluator, seed: int) -> Policy:
    """The policy with its returns in these episodes among its facts."""
    step = policy.facts["training_step"]
    returns = evaluator(as_policy(policy.weights, noise_seed=step), seed)
    without_noise = evaluator(as_policy(policy.weights, noise_seed=step, deterministic=True), seed)
    facts = {"mean_return": returns.mean(), "std_return": returns.std()}
    facts["deterministic_mean_return"] = without_noise.mean()
    facts = {name: round(float(value), 1) for name, value in facts.items()}
    return Policy(policy.weights, policy.facts | facts | {"episodes": len(returns)})


def told(facts: dict) -> str:
    return (
        f"step {facts['training_step']:,}: return {facts['mean_return']} ± {facts['std_return']}, without noise "
        f"{facts['deterministic_mean_return']}, in {facts['episodes']} episodes"
    )


# ---- Training


def train(args: Args) -> None:
    try:
        from stable_baselines3 import SAC
    except ImportError:
        raise UserError("training takes stable-baselines3: pip install stable-baselines3==2.9.2")
    folder = folder_of(args)
    env, evaluator = make_env(ROBOTS[args.robot], "d4rl"), evaluator_of(args.robot, args.eval_episodes)
    checkpoint, replay = folder / "checkpoint.zip", folder / "replay.pkl"

    def save() -> None:
        Signals.saving = True  # it is finished before a signal ends the process
        write_whole(replay, model.save_replay_buffer)
        write_whole(checkpoint, model.save)
        Signals.saving = False

    def snapshot() -> None:
        facts = {"format": POLICY_FORMAT, "robot": args.robot}
        facts |= {"training_step": model.num_timesteps, "training_seed": args.seed}
        policy = measured(Policy(weights_of(model.actor), facts), evaluator, seed=model.num_timesteps)
        write_policy(folder / f"{model.num_timesteps:07d}.safetensors", policy)
        print(told(policy.facts), flush=True)

    def after_step(*_) -> bool:
        if model.num_timesteps % args.snapshot_every == 0:
            snapshot()
        if model.num_timesteps % args.checkpoint_every == 0:
            save()
        return not Signals.received

    if checkpoint.exists():
        model = SAC.load(checkpoint, env=env, device="cpu")
        model.load_replay_buffer(replay)
        model.set_random_seed(args.seed + model.num_timesteps)  # not the start states and noise of the beginning
        print(f"goes on at step {model.num_timesteps:,}, with a new episode")
    else:
        how = {"policy_kwargs": {"net_arch": NETWORKS}, "buffer_size": args.total_steps, "device": "cpu"}
        model = SAC("MlpPolicy", env, seed=args.seed, **how)
        snapshot()
    left = args.total_steps - model.num_timesteps
    if left > 0:
        model.learn(left, callback=after_step, reset_num_timesteps=False)
        save()
    if Signals.received:
        raise Stopped(f"at step {model.num_timesteps:,}")


def weights_of(actor: torch.nn.Module) -> dict[str, np.ndarray]:
    """stable-baselines3's actor as a shipped file has it: float16, mean and log_std in one last layer."""
    found = {name: value.numpy().astype(np.float16) for name, value in actor.state_dict().items()}
    weights = {}
    for kind in ("weight", "bias"):
        weights |= {f"trunk.{layer}.{kind}": found[f"latent_pi.{layer}.{kind}"] for layer in (0, 2)}
        weights[f"head.{kind}"] = np.concatenate([found[f"mu.{kind}"], found[f"log_std.{kind}"]])
    return weights


# ---- Export


def export(args: Args) -> None:
    """Choose random, medium, expert and replay policies of one run and write them with their sha256."""
    snapshots = {}
    for path in sorted(folder_of(args).glob("*.safetensors")):
        policy = read_policy(path)
        snapshots[policy.facts["training_step"]] = policy
    returns = {step: policy.facts["mean_return"] for step, policy in snapshots.items() if step > 0}
    if not returns:
        raise UserError(f"{folder_of(args)} holds no snapshot; train first, or name the run with --folder and --seed")
    evaluator = evaluator_of(args.robot, args.export_episodes)

    @cache  # a snapshot may be wanted for two purposes
    def measure(step: int) -> Policy:
        policy = measured(snapshots[step], evaluator, seed=step + 1_000_000_000)  # start states of no other use
        print(told(policy.facts), flush=True)
        return policy

    target = KNOWN[f"{args.robot}-medium-v2"][2]
    nearest = sorted(returns, key=lambda step: abs(returns[step] - target))
    medium = choose_medium([measure(step) for step in nearest[:8]], target, MEDIUM_STD[args.robot])
    until_medium = [step for step in sorted(returns) if step <= medium.facts["training_step"]]
    count = min(args.replay_snapshots, len(until_medium))
    evenly = np.linspace(0, len(until_medium) - 1, count).round().astype(int)
    chosen = {"random": measure(0), "medium": medium}
    chosen |= {f"replay-{i}": measure(until_medium[place]) for i, place in enumerate(evenly)}
    best = max(map(measure, sorted(returns, key=returns.get)[-5:]), key=lambda policy: policy.facts["mean_return"])
    if best.facts["mean_return"] >= EXPERT_RETURN[args.robot] or args.allow_weak_expert:
        chosen["expert"] = best
    else:
        print(
            f"no expert: the best policy has {best.facts['mean_return']:.0f}, an expert needs "
            f"{EXPERT_RETURN[args.robot]:.0f}; train longer, or accept it with --allow-weak-expert"
        )
    for name, policy in chosen.items():
        print(f"{args.robot}-{name}: {told(policy.facts)}")
    ship(args, chosen)


def choose_medium(candidates: list[Policy], target: float, target_std: float) -> Policy:
    """The one most like D4RL's in mean and spread of returns among those within 15% of its mean, else the closest.

    Policies that gain little when their noise is taken away come last: cloning D4RL's hopper-medium, which does that,
    gives about a fifth more than the data's mean. And one that either falls at once or walks to the end has the mean,
    but not the spread.
    """

    def distance(policy: Policy) -> float:
        return abs(policy.facts["mean_return"] - target)

    def unlike(policy: Policy) -> tuple[bool, float]:
        gains_little = policy.facts["deterministic_mean_return"] < 1.1 * policy.facts["mean_return"]
        return gains_little, math.hypot(distance(policy), policy.facts["std_return"] - target_std)

    close = [policy for policy in candidates if distance(policy) <= 0.15 * target]
    return min(close, key=unlike) if close else min(candidates, key=distance)


def ship(args: Args, chosen: dict[str, Policy]) -> None:
    """Replace this robot's files in behavior_dir, and list the sha256 of all there."""
    sums = read_sums(args.behavior_dir)
    for name in [name for name in sums if name.startswith(f"{args.robot}-")]:
        (args.behavior_dir / name).unlink(missing_ok=True)
        del sums[name]
    for quality, policy in chosen.items():
        path = args.behavior_dir / f"{args.robot}-{quality}.safetensors"
        write_policy(path, policy)
        sums[path.name] = sha256_of(path)
    write_sums(args.behavior_dir, sums)
    print(f"wrote {len(chosen)} policies to {args.behavior_dir}")


def main(args: Args) -> None:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    if args.export:
        return export(args)
    folder_of(args).mkdir(parents=True, exist_ok=True)
    with take_lock(folder_of(args)):
        train(args)


if __name__ == "__main__":
    run_script(main, Args)
