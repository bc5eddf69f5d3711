"""SAC in one file: trains the behaviour policies whose episodes become the local data sets.

D4RL's medium and expert data come from SAC policies at two points of one training run, and its replay data from that
run's buffer. This script makes such a run: it keeps a snapshot of the actor every few thousand steps, and
`--export` picks the shipped policies from them by their measured returns.

    python local_datasets/train_behavior.py --robot hopper           # train, or go on where it stopped
    python local_datasets/train_behavior.py --robot hopper --export  # write behavior/hopper-*.safetensors

[SAC]      Soft Actor-Critic Algorithms and Applications, arXiv 1812.05905
[D4RL]     Datasets for Deep Data-Driven RL, arXiv 2004.07219
[DroQ]     Dropout Q-Functions for Doubly Efficient RL, arXiv 2110.02034 (layer norm in the critics)

Symbols: alpha (temperature) is `entropy_weight`; the Polyak rate is `tau`.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError
from common.cli import Signals, Stopped, tell
from common.evaluation import Evaluator, make_env
from common.files import disk_trouble, take_lock, write_text, write_whole
from common.stages import all_finite, load_checkpoint, save_checkpoint

BEHAVIOR_DIR = Path(__file__).resolve().parent / "behavior"
POLICY_FORMAT = 1  # of the shipped files; collect.py refuses others
# Mean and standard deviation of the returns in D4RL's medium sets, which --export aims at [D4RL v2 files].
MEDIUM_RETURN = {"hopper": (1422.06, 378.95), "walker2d": (2852.09, 1095.44), "halfcheetah": (4770.33, 355.75)}
# Mean return below which a policy is not called expert: our own choice, D4RL's experts reach 3511, 4921, 10656.
EXPERT_RETURN = {"hopper": 3000.0, "walker2d": 3800.0, "halfcheetah": 8000.0}
ACTION_STEP = 2.0**-16  # measured and recorded actions are multiples of it
SIMULATOR = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}


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
    """episodes of the stochastic policy that measure each snapshot"""
    checkpoint_every: float = 5.0
    """minutes between two checkpoints"""
    folder: Path = Path("runs/behavior")
    """the run goes to FOLDER/ROBOT"""

    export: bool = False
    """train no further: pick policies from the snapshots of a run with the same --seed, for collect.py"""
    replay_snapshots: int = 8
    """policies that stand for the replay buffer of the run up to the medium policy"""
    export_episodes: int = 100
    """episodes of the stochastic policy that measure each candidate again, with its weights rounded to float16"""
    allow_weak_expert: bool = False
    """export the best policy as expert even if it falls short of an expert's return"""
    expert_only: bool = False
    """export the expert alone, beside what is shipped already from another run"""
    behavior_dir: Path = BEHAVIOR_DIR
    """where --export writes"""

    gamma: float = 0.99
    """discount [SAC Tab. 1]"""
    tau: float = 0.005
    """Polyak rate of the target critics [SAC Tab. 1]"""
    batch_size: int = 128
    """transitions per update; [deviation] SAC has 256, half of it doubles the updates per second on one core"""
    lr: float = 3e-4
    """Adam rate of actor, critics and entropy weight [SAC Tab. 1]"""
    actor_width: int = 128
    """units in each of the actor's two layers; [deviation] SAC has 256, this keeps the shipped files small"""
    critic_width: int = 256
    """units in each of a critic's two layers [SAC Tab. 1]"""
    learning_starts: int = 5_000
    """environment steps of random actions first"""
    actor_every: int = 2
    """critic updates per actor update; [deviation] SAC has 1, this saves a fifth of the time"""


class Actor(nn.Module):
    """Squashed diagonal Gaussian: obs [n, obs_dim] -> action [n, action_dim] in (-1, 1), log-density [n]."""

    def __init__(self, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2 * action_dim)

    def forward(self, obs, deterministic: bool = False):
        mean, log_std = self.head(self.trunk(obs)).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.zeros_like(mean) if deterministic else torch.randn_like(mean)
        pre_tanh = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2) in a form that does not cancel [SAC App. C]
        log_squash = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
        return torch.tanh(pre_tanh), (log_normal - log_squash).sum(-1)


class TwinCritic(nn.Module):
    """Two Q functions in one batched product: obs, action -> [2, n]."""

    def __init__(self, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        sizes = [(obs_dim + action_dim, width), (width, width), (width, 1)]
        uniform = [(n_in, n_out, 1 / math.sqrt(n_in)) for n_in, n_out in sizes]
        self.weights = nn.ParameterList(torch.empty(2, i, o).uniform_(-bound, bound) for i, o, bound in uniform)
        self.biases = nn.ParameterList(torch.empty(2, 1, o).uniform_(-bound, bound) for _, o, bound in uniform)

    def forward(self, obs, action):
        x = torch.cat([obs, action], -1).expand(2, -1, -1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer < 2:
                x = F.relu(F.layer_norm(x, x.shape[-1:]))
        return x.squeeze(-1)


# What a training that goes on must have in common with its beginning.
DECIDING = "robot seed gamma tau batch_size lr actor_width critic_width learning_starts actor_every".split()


class Trainer:
    """Networks, optimisers and replay buffer; `state` is everything a resumed run needs."""

    stateful = ("actor", "critic", "critic_target", "critic_optimizer", "actor_optimizer")

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        self.args = args
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]  # obs, action, reward, next_obs, terminated
        self.replay = torch.zeros(args.total_steps, sum(self.sizes))
        self.actor = Actor(obs_dim, action_dim, args.actor_width)  # first, so that --export can make it again
        self.critic = TwinCritic(obs_dim, action_dim, args.critic_width)
        self.critic_target = TwinCritic(obs_dim, action_dim, args.critic_width)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.log_entropy_weight = nn.Parameter(torch.zeros(1))
        self.target_entropy = -float(action_dim)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.lr, fused=True)
        self.actor_optimizer = torch.optim.Adam(
            [*self.actor.parameters(), self.log_entropy_weight], lr=args.lr, fused=True
        )

    def update(self, step: int) -> None:
        """One SAC update on a uniform batch of the first `step` transitions [SAC Alg. 1]."""
        args = self.args
        batch = self.replay[torch.randint(step, (args.batch_size,))]
        obs, action, reward, next_obs, terminated = batch.split(self.sizes, dim=1)
        entropy_weight = self.log_entropy_weight.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            next_value = self.critic_target(next_obs, next_action).amin(0) - entropy_weight * next_log_prob
            target = reward[:, 0] + args.gamma * (1 - terminated[:, 0]) * next_value
        critic_loss = (self.critic(obs, action) - target).square().mean(1).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.critic_target.parameters()), list(self.critic.parameters()), args.tau)
        if step % args.actor_every == 0:
            self.critic.requires_grad_(False)
            new_action, log_prob = self.actor(obs)
            actor_loss = (entropy_weight * log_prob - self.critic(obs, new_action).amin(0)).mean()
            entropy_loss = -(self.log_entropy_weight.exp() * (log_prob.detach().mean() + self.target_entropy)).sum()
            self.actor_optimizer.zero_grad()
            (actor_loss + entropy_loss).backward()
            self.actor_optimizer.step()
            self.critic.requires_grad_(True)

    def state(self, step: int, episode: int, simulator: dict) -> dict:
        """For a checkpoint in the middle of an episode: `simulator` is all that decides its further course."""
        modules = {name: getattr(self, name).state_dict() for name in self.stateful}
        return {
            **modules,
            "log_entropy_weight": self.log_entropy_weight.detach(),
            "replay": self.replay[:step].clone(),  # of the view, torch would save the whole buffer
            "args": {name: getattr(self.args, name) for name in DECIDING},
            "torch_random": torch.get_rng_state(),
            "step": step,
            "episode": episode,
            "simulator": simulator,
        }

    def load(self, state: dict) -> tuple[int, int, dict]:
        for name in self.stateful:
            getattr(self, name).load_state_dict(state[name])
        self.log_entropy_weight.data.copy_(state["log_entropy_weight"])
        self.replay[: state["step"]] = state["replay"]
        torch.set_rng_state(state["torch_random"])
        return state["step"], state["episode"], state["simulator"]


def as_policy(actor: Actor, noise_seed: int, deterministic: bool = False):
    """The actor in NumPy: obs [..., obs_dim] -> action [..., action_dim] float32, the same on every x86 CPU.

    CPUs differ in the last digits of products, exp and tanh, in float64 by 1e-16 on average: rounded to ACTION_STEP,
    about one number in 1e11 still differs. Normal noise comes from integers and a table.
    """
    w1, b1, w2, b2, w3, b3 = (weight.detach().numpy().T.astype(np.float64) for weight in actor.parameters())
    noise = np.random.default_rng((1, noise_seed))  # not the numbers of a simulator with this seed

    def policy(obs: np.ndarray) -> np.ndarray:
        x = np.maximum(obs.astype(np.float64) @ w1 + b1, 0)
        head = np.maximum(x @ w2 + b2, 0) @ w3 + b3
        mean, log_std = head[..., : len(b3) // 2], head[..., len(b3) // 2 :]
        if not deterministic:
            mean = mean + np.exp(log_std.clip(-20, 2)) * noise.standard_normal(mean.shape)
        return (np.rint(np.tanh(mean) / ACTION_STEP) * ACTION_STEP).astype(np.float32)

    return policy


def evaluator_of(robot: str, episodes: int) -> Evaluator:
    """Of a policy that needs no data: in D4RL's physics, actions in [-1, 1]."""
    task = SimpleNamespace(spec=gym.spec(SIMULATOR[robot]), physics="d4rl", robot=robot, action_low=-1, action_high=1)
    return Evaluator(task, "d4rl", episodes)


# ---- Training


def train(args: Args) -> None:
    folder = args.folder / args.robot
    try:
        (folder / "snapshots").mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / "training")  # noqa: F841 held until the process ends
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); give another --folder")
    env = make_env(SIMULATOR[args.robot], "d4rl")
    evaluator = evaluator_of(args.robot, args.eval_episodes)
    torch.manual_seed(args.seed)
    trainer = Trainer(args, env.observation_space.shape[0], env.action_space.shape[0])
    checkpoints, log_path = folder / "checkpoints", folder / "snapshots.csv"
    step, episode, simulator = 0, 0, {}
    path, state = load_checkpoint(checkpoints, torch.device("cpu"), print)
    if state:
        other = [name for name in DECIDING if state["args"][name] != getattr(args, name)]
        if other or state["step"] > args.total_steps:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in other) or "more --total-steps"
            raise UserError(f"{path} was made with other {names}; give the same, or another --folder")
        step, episode, simulator = trainer.load(state)
        print(f"resumed {path} at step {step}")
    returns = {snapshot: found for snapshot, found in _read_log(log_path).items() if snapshot <= step}
    last_save = time.monotonic()
    seconds = 5 if sys.stderr.isatty() else 30
    bar = tqdm(total=args.total_steps, initial=step, desc=f"SAC {args.robot}", unit="step", mininterval=seconds)
    obs = _restore_simulator(env, simulator, args.seed, episode) if simulator else None
    in_episode = simulator.get("steps", 0)  # each episode has a seed of its own, so no stream of the simulator is kept
    while step < args.total_steps:
        if Signals.received or time.monotonic() - last_save > 60 * args.checkpoint_every:
            _save(checkpoints, trainer.state(step, episode, _simulator_state(env, obs, in_episode)))
            last_save = time.monotonic()
            if Signals.received:
                raise Stopped(f"at step {step:,}")
        if in_episode == 0:
            obs, _ = env.reset(seed=args.seed * 1_000_000 + episode)
        tensor = torch.as_tensor(obs, dtype=torch.float32)
        if step < args.learning_starts:
            action = 2 * torch.rand(env.action_space.shape) - 1
        else:
            with torch.inference_mode():
                action = trainer.actor(tensor)[0]
        obs, reward, terminated, _, _ = env.unwrapped.step(action.numpy())
        next_tensor = torch.as_tensor(obs, dtype=torch.float32)
        trainer.replay[step] = torch.cat(
            [tensor, action, torch.tensor([reward]), next_tensor, torch.tensor([terminated])]
        )
        step, in_episode = step + 1, in_episode + 1
        if step >= args.learning_starts:
            trainer.update(step)
        if step % args.snapshot_every == 0:
            returns[step] = _snapshot(trainer, evaluator, folder, step)
            _write_log(log_path, returns)
            bar.set_postfix(mean_return=round(returns[step][0], 1))
        bar.update()
        if terminated or in_episode == env.spec.max_episode_steps:
            episode, in_episode = episode + 1, 0
    bar.close()
    _save(checkpoints, trainer.state(step, episode, _simulator_state(env, obs, in_episode)))


def _save(folder: Path, state: dict) -> None:
    """A checkpoint, unless this step has one. UserError for NaN; a disk that does not take it is told."""
    if (folder / f"{state['step']:012d}.pt").exists():
        return
    if not all_finite(state):
        raise UserError(f"NaN or infinity in the networks at step {state['step']:,}; lower --lr ({folder} is unharmed)")
    try:
        save_checkpoint(folder, state["step"], state)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        tqdm.write(f"warning: {disk_trouble(folder, error)}; the training goes on without this checkpoint")


def _simulator_state(env, obs: np.ndarray, steps: int) -> dict:
    """MuJoCo's whole state, as plain values, so that the episode goes on to the bit; empty between two episodes."""
    if steps == 0:
        return {}
    model, data, kind = env.unwrapped.model, env.unwrapped.data, mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return {"state": state.tolist(), "obs": obs.tolist(), "steps": steps}


def _restore_simulator(env, simulator: dict, seed: int, episode: int) -> np.ndarray:
    """Put env back into the middle of its episode -> obs."""
    env.reset(seed=seed * 1_000_000 + episode)
    model, data, kind = env.unwrapped.model, env.unwrapped.data, mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, np.array(simulator["state"]), kind)
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, np.array(simulator["state"]), kind)  # forward moves the solver's warm start
    return np.array(simulator["obs"])


def _snapshot(trainer: Trainer, evaluator: Evaluator, folder: Path, step: int) -> tuple[float, float]:
    """Keep the actor -> mean and standard deviation of its returns."""
    returns = evaluator(as_policy(trainer.actor, noise_seed=step), seed=step)
    content = save(trainer.actor.state_dict())
    write_whole(_snapshot_path(folder, step), lambda file: file.write(content))
    return float(returns.mean()), float(returns.std())


def _snapshot_path(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"{step:07d}.safetensors"


def _read_log(path: Path) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation of the returns by training step."""
    lines = path.read_text().split()[1:] if path.exists() else []
    return {int(step): (float(mean), float(std)) for step, mean, std in (line.split(",") for line in lines)}


def _write_log(path: Path, returns: dict[int, tuple[float, float]]) -> None:
    lines = "".join(f"{step},{mean:.1f},{std:.1f}\n" for step, (mean, std) in returns.items())
    write_text(path, "step,mean_return,std_return\n" + lines)


# ---- Export


@dataclass
class Candidate:
    """A policy as it would be shipped: float16 weights, and the returns that exactly these give."""

    step: int
    weights: dict[str, torch.Tensor]
    mean: float
    std: float
    deterministic_mean: float  # of the policy without its noise

    def __str__(self) -> str:
        return (
            f"step {self.step:,}: return {self.mean:.1f} ± {self.std:.1f}, without noise {self.deterministic_mean:.1f}"
        )

    def packed(self, robot: str, seed: int, episodes: int) -> bytes:
        """The shipped file. All facts stand under one metadata key, since safetensors keeps no order of keys."""
        facts = {"format": POLICY_FORMAT, "robot": robot, "training_step": self.step, "training_seed": seed}
        facts |= {"mean_return": round(self.mean, 1), "std_return": round(self.std, 1), "episodes": episodes}
        facts["deterministic_mean_return"] = round(self.deterministic_mean, 1)
        return save(self.weights, {"policy": json.dumps(facts)})


def export(args: Args) -> None:
    """Choose random, medium, expert and replay policies of one run and write them with their sha256."""
    folder = args.folder / args.robot
    returns = {step: mean for step, (mean, _) in _read_log(folder / "snapshots.csv").items()}
    if not returns:
        raise UserError(f"{folder / 'snapshots.csv'} lists no snapshot; train first, or name the run with --folder")
    evaluator = evaluator_of(args.robot, args.export_episodes)
    measure = cache(partial(_measure, args, evaluator, folder))  # a snapshot may be wanted for two purposes
    chosen = {}
    if not args.expert_only:
        target, target_std = MEDIUM_RETURN[args.robot]
        nearest = sorted(returns, key=lambda step: abs(returns[step] - target))
        medium = choose_medium([measure(step) for step in nearest[:8]], target, target_std)
        until_medium = [step for step in sorted(returns) if step <= medium.step]
        count = min(args.replay_snapshots, len(until_medium))
        evenly = np.linspace(0, len(until_medium) - 1, count).round().astype(int)
        chosen = {"random": measure(0), "medium": medium}
        chosen |= {f"replay-{i}": measure(until_medium[place]) for i, place in enumerate(evenly)}
    best = max((measure(step) for step in sorted(returns, key=returns.get)[-5:]), key=lambda found: found.mean)
    if best.mean >= EXPERT_RETURN[args.robot] or args.allow_weak_expert:
        chosen["expert"] = best
    else:
        print(
            f"no expert: the best policy has {best.mean:.0f}, an expert needs {EXPERT_RETURN[args.robot]:.0f}; "
            "train longer, or accept it with --allow-weak-expert"
        )
    for name, candidate in chosen.items():
        print(f"{args.robot}-{name}: {candidate}")
    _write_policies(args, chosen)


def _measure(args: Args, evaluator: Evaluator, folder: Path, step: int) -> Candidate:
    """The policy of that training step, 0 for the untrained one, rounded to float16 and rolled out."""
    space = evaluator.envs[0].observation_space, evaluator.envs[0].action_space
    torch.manual_seed(args.seed)  # as in train, so that a new actor is the one the run started from
    actor = Actor(space[0].shape[0], space[1].shape[0], args.actor_width)
    if step > 0:
        actor.load_state_dict(load_file(_snapshot_path(folder, step)))
    weights = {name: tensor.half() for name, tensor in actor.state_dict().items()}
    actor.load_state_dict(weights)  # copies into float32: the rounded weights
    start_seed = step + 1_000_000_000  # start states of no other use
    returns = evaluator(as_policy(actor, noise_seed=step), start_seed)
    without_noise = evaluator(as_policy(actor, noise_seed=step, deterministic=True), start_seed).mean()
    candidate = Candidate(step, weights, float(returns.mean()), float(returns.std()), float(without_noise))
    print(f"{candidate} in {len(returns)} episodes", flush=True)
    return candidate


def choose_medium(candidates: list[Candidate], target: float, target_std: float) -> Candidate:
    """The one most like D4RL's in mean and spread of returns among those within 15% of its mean, else the closest.

    Policies that gain little when their noise is taken away come last: cloning D4RL's hopper-medium, which does that,
    gives about a fifth more than the data's mean. And one that either falls at once or walks to the end has the mean,
    but not the spread.
    """
    close = [candidate for candidate in candidates if abs(candidate.mean - target) <= 0.15 * target]
    if not close:
        return min(candidates, key=lambda candidate: abs(candidate.mean - target))

    def unlike(candidate: Candidate) -> tuple[bool, float]:
        gains_little = candidate.deterministic_mean < 1.1 * candidate.mean
        return gains_little, math.hypot(candidate.mean - target, candidate.std - target_std)

    return min(close, key=unlike)


def _write_policies(args: Args, chosen: dict[str, Candidate]) -> None:
    """Replace this robot's files in behavior_dir (with expert_only: that one), and list the sha256 of all there."""
    args.behavior_dir.mkdir(parents=True, exist_ok=True)
    sums = read_sums(args.behavior_dir)
    if not args.expert_only:
        for name in [name for name in sums if name.startswith(f"{args.robot}-")]:
            (args.behavior_dir / name).unlink(missing_ok=True)
            del sums[name]
    for quality, candidate in chosen.items():
        name = f"{args.robot}-{quality}.safetensors"
        content = candidate.packed(args.robot, args.seed, args.export_episodes)
        write_whole(args.behavior_dir / name, lambda file, content=content: file.write(content))
        sums[name] = hashlib.sha256(content).hexdigest()
    write_sums(args.behavior_dir, sums)
    print(f"wrote {len(chosen)} policies to {args.behavior_dir}")


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    write_text(folder / "SHA256SUMS", "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 of every shipped policy, or published data set, by name; empty if there is none."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return {name: sha256 for sha256, name in (line.split() for line in lines)}
    except ValueError:
        raise UserError(f"{path} is damaged: each line needs a sha256 and a file name; restore it")


def main(args: Args) -> None:
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    tell(lambda: main(tyro.cli(Args)))
