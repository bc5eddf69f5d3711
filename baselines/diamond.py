"""DIAMOND on states instead of pixels: an actor-critic that learns in the imagination of a one-step diffusion model.

1. A diffusion model learns the next state, given the last L states and actions; another network learns the reward and
   the end of a step, given the states around it (section 3).
2. There is no model of actions (section 4 is empty): they are the actor's.
3. The actor acts inside these models, one state after another, from states of the data (section 5); the diffusion model
   runs all the time that the agent learns.
4. Actor and critic learn from these rollouts alone, by REINFORCE against lambda-returns (section 6).
5. The actor runs in the simulator; no model is needed any more (section 7).

    python -m baselines.diamond --env-id local/hopper/medium-v0 --laptop      # two CPU cores, data made on this machine
    python -m baselines.diamond --env-id hopper-medium-v2                     # paper's constants on D4RL, one GPU

[DIAMOND] learns online, from the pixels of Atari games; offline, from states, it is ours alone. Nothing keeps the actor
near the data, so that it finds what the models get wrong. docs/method.md tells what pixels would need.

Keys:
[DIAMOND]  Diffusion for World Modeling: Visual Details Matter in Atari, arXiv 2405.12399, and its code
[EDM]      Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364
[SYNTHER]  Synthetic Experience Replay, arXiv 2303.06614, and its code (the network)

Tags: [KEY place] stands there; [unspecified] nobody has published it, our choice; [deviation] the paper says otherwise.

Symbols: EDM's sigma is the standard deviation of the noise in x0 + sigma * noise, its sigma_data is 1 (x0 in standard
deviations of the data); L is `history`, the paper's H `imagination_horizon`, lambda `return_lambda`.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

from common import UserError, fast
from common.cli import Amount, Count, Rate, RunArgs, Seed, Share, run_script
from common.data import OfflineDataset, load_dataset
from common.evaluation import Evaluator, evaluate, score_report
from common.run import Run

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Args(RunArgs):
    history: Count = 4  # L: states and actions that the world model is given [DIAMOND code]; 1: the last alone

    # ---- World model: next state
    world_model_seed: Seed = 100  # seed of the diffusion training [unspecified]
    world_model_steps: Count = 400_000  # gradient updates; 400 an epoch of 1,000 [DIAMOND code]
    world_model_batch_size: Count = 256  # transitions per update [unspecified]; 32 frames in DIAMOND's code
    world_model_lr: Rate = 1e-4  # AdamW's rate after a warm-up [DIAMOND code]
    weight_decay: Share = 0.01  # AdamW's, of both models [DIAMOND code]
    predict: Literal["state", "change"] = "state"  # the next state [DIAMOND], or its change, which is ours
    mlp_width: Count = 1024  # units of a residual layer [unspecified]; a U-Net in DIAMOND
    mlp_depth: Count = 6  # residual layers [unspecified]
    sigma_log_mean: Annotated[float, (-20, 20)] = -0.4  # mean of ln sigma in training [DIAMOND code]
    sigma_log_std: Amount = 1.2  # its standard deviation [DIAMOND code]

    # ---- World model: reward and end
    reward_model_steps: Count = 100_000  # gradient updates [unspecified]; as many as the other's in DIAMOND's code
    reward_model_lr: Rate = 1e-4  # AdamW's rate [DIAMOND code]

    # ---- Imagination
    imagination_horizon: Count = 15  # steps of a rollout [DIAMOND code]
    imagined_rollouts: Count = 1024  # rollouts per update of the agent [unspecified]; 32 in DIAMOND's code
    sampling_steps: Count = 3  # N, Euler's [DIAMOND code]
    sigma_min: Annotated[float, (1e-6, 1e6)] = 0.002  # smallest noise level of sampling above 0 [DIAMOND code]
    sigma_max: Annotated[float, (1e-6, 1e6)] = 5.0  # its largest, where sampling starts [DIAMOND code]
    start_noise: Literal["scaled", "unit"] = "scaled"  # sigma_max times N(0, I) [EDM], or N(0, I) [DIAMOND code]
    kept_rollouts: Count = 2048  # that the finished actor imagines, for experiments/audit.py; no part of the method

    # ---- Agent
    agent_updates: Count = 100_000  # of actor and critic [unspecified]; 400 an epoch of 1,000 in DIAMOND's code
    agent_lr: Rate = 1e-4  # Adam's rate after a warm-up [DIAMOND code]
    gamma: Share = 0.985  # discount [DIAMOND code]
    return_lambda: Share = 0.95  # weight of longer returns [DIAMOND code]
    entropy_weight: Amount = 0.001  # of the actor's entropy [DIAMOND code]


# --laptop: small networks and few updates [deviation]; not the paper's scale.
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    world_model_steps=10_000,
    world_model_lr=1e-3,
    mlp_width=256,
    reward_model_steps=5_000,
    reward_model_lr=1e-3,
    imagined_rollouts=64,
    kept_rollouts=1024,
    agent_updates=2_000,
    agent_lr=1e-3,
    log_every=100,
    eval_every=200,
)


# Adapted from dawm_td3bc.py: its own arguments
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.sigma_min >= args.sigma_max:
        raise UserError(f"--sigma-min {args.sigma_min} must lie below --sigma-max {args.sigma_max}")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: transitions and what came before them
# ---------------------------------------------------------------------------------------------------------------------
# A transition is one row: obs, action, reward, next_obs, terminated. One gather then fetches a whole batch.


# Copied from dawm_td3bc.py
def row_sizes(obs_dim: int, action_dim: int) -> list[int]:
    """Columns of obs, action, reward, next_obs and terminated in a row."""
    return [obs_dim, action_dim, 1, obs_dim, 1]


# Copied from dawm_td3bc.py
def real_transitions(dataset: OfflineDataset, device: torch.device) -> torch.Tensor:
    """The data set as rows [N, row_dim].

    [deviation] Rows at a time limit are kept and bootstrapped, since their successor is known; TD3BC's code skips them.
    """
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs, dataset.terminated[:, None]]
    return torch.as_tensor(np.concatenate(columns, axis=1, dtype=np.float32), device=device)


class Histories:
    """The data's transitions, and the last L states and actions up to each of them; gathered when asked for.

    `rows` [N, row_dim]. At an episode's start its first state and action stand for those before [unspecified]; in
    DIAMOND's code zeros do.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        self.sizes = row_sizes(dataset.obs.shape[1], dataset.action.shape[1])
        self.rows = real_transitions(dataset, device)
        self.obs, self.action, self.reward, self.next_obs, self.terminated = self.rows.split(self.sizes, dim=1)
        first = np.repeat(np.cumsum(dataset.lengths) - dataset.lengths, dataset.lengths)  # row of each episode's start
        back = np.arange(len(first))[:, None] - np.arange(args.history - 1, -1, -1)
        self.past = torch.as_tensor(np.maximum(back, first[:, None]), device=device)

    def of(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs [B, L, obs_dim] and action [B, L, action_dim] up to the rows `index` [B], theirs the last."""
        past = self.past[index]
        return self.obs[past], self.action[past]


# Copied from baselines/synther.py
class Standardizer(nn.Module):
    """Columns of values [N, dim] to mean 0 and standard deviation 1 and back, without bounds.

    The last `raw` columns stay as they are. [SYNTHER code]: one, the end of an episode.
    """

    def __init__(self, values: torch.Tensor, raw: int = 0):
        super().__init__()
        keep = torch.arange(values.shape[1], device=values.device) >= values.shape[1] - raw
        self.register_buffer("mean", values.mean(0).masked_fill(keep, 0))
        self.register_buffer("std", (values.std(0) + 1e-5).masked_fill(keep, 1))

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] in dataset units."""
        return (x - self.mean) / self.std

    def denormalize(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., dim] to dataset units."""
        return y * self.std + self.mean


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: next state by EDM, reward and end
# ---------------------------------------------------------------------------------------------------------------------


# Copied from baselines/synther.py
class ResidualMLP(nn.Module):
    """EDM's network F of a vector x [B, dim], noise_level [B] and, unless condition_dim is 0, condition [B, that].

    Random frequencies embed the noise level; residual layers without norms. 25,520,027 parameters for Hopper's
    transitions at paper scale.
    """

    def __init__(self, dim: int, width: int, depth: int, condition_dim: int = 0):
        super().__init__()
        self.project = nn.Linear(dim + condition_dim, 128)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(8))  # a sine and a cosine each [SYNTHER code]
        self.embed = nn.Sequential(nn.Linear(17, 128), nn.SiLU(), nn.Linear(128, 128))
        self.widen = nn.Linear(128, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, dim)

    def forward(self, x, noise_level, *condition):
        angle = noise_level[:, None] * self.frequencies
        embedding = self.embed(torch.cat([noise_level[:, None], angle.sin(), angle.cos()], dim=1))
        h = self.widen(self.project(torch.cat([x, *condition], dim=1)) + embedding)
        for layer in self.layers:
            h = h + layer(F.relu(h))
        return self.head(F.relu(h))


# Copied from baselines/synther.py
def denoise(network: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *condition) -> torch.Tensor:
    """Expected x0 of x = x0 + sigma * noise, both [B, ...], sigma [B] [EDM Eq. 7, Tab. 1].

    With s = sigma^2 + 1: c_skip = 1 / s, c_out = sigma / sqrt(s), c_in = 1 / sqrt(s), c_noise = ln(sigma) / 4.
    """
    wide = sigma.view(-1, *[1] * (x.dim() - 1))
    root = (wide.square() + 1).sqrt()
    return x / root.square() + wide / root * network(x / root, sigma.log() / 4, *condition)


# Adapted from baselines/synther.py: clipped
def draw_sigma(args: Args, count: int, device: torch.device) -> torch.Tensor:
    """Noise levels [count] to train on: ln sigma is normal, sigma clipped to [0.002, 20] [DIAMOND code]."""
    return (args.sigma_log_mean + args.sigma_log_std * torch.randn(count, device=device)).exp().clamp(0.002, 20)


# Copied from baselines/synther.py
def edm_loss(network: nn.Module, x0: torch.Tensor, sigma: torch.Tensor, *condition) -> torch.Tensor:
    """Mean squared error of the denoised x0 [B, ...] at noise levels sigma [B], weighted by 1 / c_out^2 [EDM Tab. 1].

    That weight makes it the mean squared error of the network's own output, whatever the noise level.
    """
    wide = sigma.view(-1, *[1] * (x0.dim() - 1))
    x0_pred = denoise(network, x0 + wide * torch.randn_like(x0), sigma, *condition)
    return ((wide.square() + 1) / wide.square() * (x0_pred - x0).square()).mean()


# Copied from baselines/synther.py
def karras_sigmas(sampling_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Noise levels that sampling visits: N from sigma_max down to sigma_min, then 0 [EDM Eq. 5]. 1 has no sigma_min."""
    low, high, last = sigma_min ** (1 / rho), sigma_max ** (1 / rho), max(sampling_steps - 1, 1)
    return [*((high + i / last * (low - high)) ** rho for i in range(sampling_steps)), 0.0]


# Copied from baselines/synther.py
@torch.no_grad()
def sample_edm(
    network: nn.Module, x: torch.Tensor, sigmas: list[float], *condition, churn: float = 0.0, heun: bool = True
) -> torch.Tensor:
    """Samples from noise x [B, ...] of standard deviation sigmas[0], down `sigmas`, whose last is 0 [EDM Alg. 2].

    `churn` is S_churn: noise added anew in each step while 0.05 <= sigma <= 50, 1.003 times too much of it [SYNTHER
    code]; 0 makes sampling deterministic. Without `heun` the steps are Euler's: one network evaluation each, not two.
    """
    added = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)  # EDM's gamma

    def slope(x, sigma):
        return (x - denoise(network, x, torch.full((len(x),), sigma, device=x.device), *condition)) / sigma

    for sigma, following in itertools.pairwise(sigmas):
        if added and 0.05 <= sigma <= 50:
            sigma, below = sigma * (1 + added), sigma
            x = x + math.sqrt(sigma**2 - below**2) * 1.003 * torch.randn_like(x)
        here = slope(x, sigma)
        reached = x + (following - sigma) * here
        if heun and following:  # the mean of the slopes at both ends
            reached = x + (following - sigma) * (here + slope(reached, following)) / 2
        x = reached
    return x


# Adapted from dawm_td3bc.py: the next state alone, given a history of states and actions
class WorldModel(nn.Module):
    """p(next state | last L states and actions) [DIAMOND Sec. 3]: a network and the units it works in.

    `target_units` are those of what is predicted, the next state or its change.
    """

    def __init__(self, args: Args, histories: Histories):
        super().__init__()
        self.args, (obs_dim, action_dim, *_) = args, histories.sizes
        self.obs_units = Standardizer(histories.obs)
        self.target_units = Standardizer(self.target(histories.obs, histories.next_obs))
        self.register_buffer("obs_range", torch.stack([histories.next_obs.amin(0), histories.next_obs.amax(0)]))
        condition_dim = args.history * (obs_dim + action_dim)
        self.network = fast.on_cpu(ResidualMLP(obs_dim, args.mlp_width, args.mlp_depth, condition_dim), args.compile)

    def target(self, obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        """What the network predicts of next_obs [B, obs_dim], dataset units."""
        return next_obs - obs if self.args.predict == "change" else next_obs

    def condition(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """obs [B, L, obs_dim] and action [B, L, action_dim] as the network takes them, flat."""
        return torch.cat([self.obs_units.normalize(obs).flatten(1), action.flatten(1)], dim=1)

    def loss(self, obs, action, next_obs) -> torch.Tensor:
        """EDM's, at one noise level for each next_obs [B, obs_dim]."""
        x0 = self.target_units.normalize(self.target(obs[:, -1], next_obs))
        return edm_loss(self.network, x0, draw_sigma(self.args, len(x0), x0.device), self.condition(obs, action))


@torch.no_grad()
def sample_next(args: Args, world_model: WorldModel, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """A next state [B, obs_dim] after obs [B, L, obs_dim] and action [B, L, action_dim], within the data's range.

    DIAMOND's code keeps its frames within what pixels can be, in each step of sampling [deviation: in the last alone].
    """
    noise = torch.randn(obs[:, -1].shape, device=obs.device) * (args.sigma_max if args.start_noise == "scaled" else 1)
    sigmas = karras_sigmas(args.sampling_steps, args.sigma_min, args.sigma_max)
    x = sample_edm(world_model.network, noise, sigmas, world_model.condition(obs, action), heun=False)
    next_obs = world_model.target_units.denormalize(x)
    if args.predict == "change":
        next_obs = obs[:, -1] + next_obs
    return next_obs.clamp(*world_model.obs_range)


# Copied from dawm_td3bc.py
def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    hidden = [nn.Linear(in_dim, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(256, out_dim))


class RewardModel(nn.Module):
    """Reward and probability of an end of the step from obs to next_obs [DIAMOND Sec. 3], in two hidden layers.

    [deviation] The reward is a number, in units of its standard deviation, where DIAMOND samples its sign; no memory.
    Data without ends have none here either.
    """

    def __init__(self, histories: Histories):
        super().__init__()
        obs_dim, action_dim, *_ = histories.sizes
        self.obs_units, self.reward_units = Standardizer(histories.obs), Standardizer(histories.reward)
        self.register_buffer("ends", histories.terminated.any())
        self.net = mlp(2 * obs_dim + action_dim, 2)

    def forward(self, obs, action, next_obs):
        """Normalised reward and logit of an end, both [B], of steps with dataset units."""
        states = self.obs_units.normalize(obs), self.obs_units.normalize(next_obs)
        return self.net(torch.cat([*states, action], dim=1)).unbind(1)

    @torch.no_grad()
    def sample(self, obs, action, next_obs) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward [B, 1], dataset units, and a drawn end, 0 or 1 [B, 1]."""
        reward, logit = self(obs, action, next_obs)
        ends = (torch.rand_like(logit) < logit.sigmoid()) & self.ends
        return self.reward_units.denormalize(reward[:, None]), ends[:, None].float()


def optimizer_of(module: nn.Module, rate: float, weight_decay: float):
    """AdamW and its rate's warm-up over 100 updates [DIAMOND code]; [deviation] biases decay too."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=weight_decay, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))


def descend(module: nn.Module, optimizer, schedule, loss: torch.Tensor, max_norm: float) -> None:
    """One step on the loss, its gradient clipped to `max_norm`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    optimizer.step()
    schedule.step()


# Adapted from dawm_td3bc.py: EDM's loss, given a history; no averaged weights, none held out
def train_world_model(args: Args, histories: Histories, run: Run) -> WorldModel:
    """Fit the network on the data's next states. [DIAMOND code]: no averaged weights, gradients clipped to 1."""
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, histories).to(run.device)
    optimizer, schedule = optimizer_of(world_model, args.world_model_lr, args.weight_decay)
    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=world_model, saves=(optimizer, schedule)
    ) as stage:
        for step in stage:
            index = torch.randint(len(histories.rows), (args.world_model_batch_size,), device=run.device)
            loss = world_model.loss(*histories.of(index), histories.next_obs[index])
            descend(world_model, optimizer, schedule, loss, 1.0)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
    return world_model


def train_reward_model(args: Args, histories: Histories, run: Run) -> RewardModel:
    """Squared error of the reward and cross-entropy of the end, added up [DIAMOND code]."""
    run.seed("reward_model", args.world_model_seed)
    reward_model = RewardModel(histories).to(run.device)
    optimizer, schedule = optimizer_of(reward_model, args.reward_model_lr, args.weight_decay)
    with run.stage(
        train_reward_model, args.reward_model_steps, "update", keeps=reward_model, saves=(optimizer, schedule)
    ) as stage:
        for step in stage:
            index = torch.randint(len(histories.rows), (args.world_model_batch_size,), device=run.device)
            obs, action, reward, next_obs, terminated = histories.rows[index].split(histories.sizes, dim=1)
            reward_pred, logit = reward_model(obs, action, next_obs)
            reward_loss = F.mse_loss(reward_pred, reward_model.reward_units.normalize(reward)[:, 0])
            end_loss = F.binary_cross_entropy_with_logits(logit, terminated[:, 0])
            descend(reward_model, optimizer, schedule, reward_loss + end_loss, 100.0)
            if step % args.log_every == 0 or step == args.reward_model_steps:
                run.log(step, {"reward_model/loss": reward_loss, "reward_model/end_loss": end_loss})
    return reward_model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. The actor acts inside the world model.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: the actor's rollouts in imagination
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: the actor's actions, one state after another
@torch.no_grad()
def imagine(args: Args, histories: Histories, world_model, reward_model, actor, index: torch.Tensor):
    """Rollouts from the data's states `index` [B]: rows [B, T, row_dim], valid [B, T] (false after an end), and what
    the actor drew [B, T, action_dim], before the tanh.

    [deviation] A rollout that ends early stays over; DIAMOND's code begins another in its place.
    """
    obs, action = histories.of(index)
    rows, valid, drawn, going_on = [], [], [], torch.ones(len(index), dtype=torch.bool, device=index.device)
    for _ in range(args.imagination_horizon):
        now = obs[:, -1]
        drawn.append(actor.sample(now))
        action = torch.cat([action[:, :-1], torch.tanh(drawn[-1])[:, None]], dim=1)
        next_obs = sample_next(args, world_model, obs, action)
        reward, ends = reward_model.sample(now, action[:, -1], next_obs)
        rows.append(torch.cat([now, action[:, -1], reward, next_obs, ends], dim=1))
        valid.append(going_on)
        going_on = going_on & (ends[:, 0] == 0)
        obs = torch.cat([obs[:, 1:], next_obs[:, None]], dim=1)
        action = action.roll(-1, dims=1)  # the last one gives way to the actor's next
    return torch.stack(rows, dim=1), torch.stack(valid, dim=1), torch.stack(drawn, dim=1)


# Adapted from dawm_td3bc.py: of the finished actor, to be looked at
def synthesize(args: Args, histories: Histories, world_model, reward_model, agent, run: Run) -> dict[str, torch.Tensor]:
    """Rollouts that the finished actor imagines, as it has learned from: rows [M, T, row_dim], valid [M, T]."""
    run.seed("synthesis", args.seed)
    chosen = torch.randint(len(histories.rows), (args.kept_rollouts,), device=run.device)
    shape = args.kept_rollouts, args.imagination_horizon
    rollouts = {"rows": torch.zeros(*shape, sum(histories.sizes)), "valid": torch.zeros(shape, dtype=torch.bool)}
    with run.stage(synthesize, len(chosen), "rollout", keeps=rollouts, private=True) as stage:
        for index in stage.over(chosen.split(args.imagined_rollouts)):
            here = slice(stage.at, stage.at + len(index))
            rows, valid, _ = imagine(args, histories, world_model, reward_model, agent.actor, index)
            rollouts["rows"][here], rollouts["valid"][here] = rows.cpu(), valid.cpu()
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: REINFORCE with a value baseline, lambda-returns
# ---------------------------------------------------------------------------------------------------------------------


class GaussianActor(nn.Module):
    """Tanh of a diagonal Gaussian [unspecified], DIAMOND's actions are buttons: obs [B, obs_dim] -> mean action.

    Like its heads, it starts at 0 [DIAMOND code]: standard deviation 1 everywhere.
    """

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor, action_dim: int):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean), 2 * action_dim)
        nn.init.zeros_(self.net[-1].weight), nn.init.zeros_(self.net[-1].bias)

    def gaussian(self, obs):
        """Mean and log of the standard deviation, before the tanh, both [B, action_dim]."""
        mean, log_std = self.net((obs - self.obs_mean) / self.obs_std).chunk(2, dim=1)
        return mean, log_std.clamp(-5, 2)

    def forward(self, obs):
        return torch.tanh(self.gaussian(obs)[0])

    def sample(self, obs):
        """A draw of the Gaussian; its tanh is the action."""
        mean, log_std = self.gaussian(obs)
        return mean + log_std.exp() * torch.randn_like(mean)


# Copied from dawm_iql.py
class Value(nn.Module):
    """V(obs) -> [B]; obs in dataset units."""

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean), 1)

    def forward(self, obs):
        return self.net((obs - self.obs_mean) / self.obs_std)[:, 0]


def lambda_returns(reward, terminated, next_value, gamma: float, weight: float) -> torch.Tensor:
    """R_t = r_t + gamma (1 - terminated_t) ((1 - weight) V(s_t+1) + weight R_t+1), all [B, T] [DIAMOND App.].

    Behind the last step stands its value.
    """
    following, returns = next_value[:, -1], []
    for step in range(reward.shape[1] - 1, -1, -1):
        mixed = (1 - weight) * next_value[:, step] + weight * following
        following = reward[:, step] + gamma * (1 - terminated[:, step]) * mixed
        returns.append(following)
    return torch.stack(returns[::-1], dim=1)


class ActorCritic(nn.Module):
    """Actor and value network, in units of the data's states; one loss for both [DIAMOND code]."""

    def __init__(self, args: Args, histories: Histories):
        super().__init__()
        self.args, self.sizes = args, histories.sizes
        units = histories.obs.mean(0), histories.obs.std(0) + 1e-3
        self.actor, self.vf = GaussianActor(*units, self.sizes[1]), Value(*units)
        nn.init.zeros_(self.vf.net[-1].weight), nn.init.zeros_(self.vf.net[-1].bias)
        self.register_buffer("most_reward", histories.reward.abs().max() + 1e-6)

    def loss(self, rows, valid, drawn) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Policy's, value's and entropy's of rollouts rows [B, T, row_dim], valid [B, T], drawn [B, T, action_dim]
        [DIAMOND App.].

        [unspecified] Rewards in units of the data's largest, for DIAMOND's signs; density and entropy are the
        Gaussian's. The tanh's part has no gradient, and a draw cannot be had back from an action that it rounds to 1.
        """
        args, (obs, _, reward, next_obs, terminated) = self.args, rows.split(self.sizes, dim=2)
        flat, weight = obs.flatten(0, 1), valid.flatten() / valid.sum()
        with torch.no_grad():
            next_value = self.vf(next_obs.flatten(0, 1)).view(valid.shape)
            reward = reward[..., 0] / self.most_reward
            target = lambda_returns(reward, terminated[..., 0], next_value, args.gamma, args.return_lambda).flatten()
        value, (mean, log_std) = self.vf(flat), self.actor.gaussian(flat)
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(drawn.flatten(0, 1)).sum(1)
        policy_loss = -(weight * log_prob * (target - value).detach()).sum()
        value_loss = (weight * (value - target).square()).sum()
        entropy = (weight * (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(1)).sum()
        told = {"agent/policy_loss": policy_loss, "agent/value_loss": value_loss, "agent/entropy": entropy}
        told |= {"agent/imagined_reward": (weight * reward.flatten()).sum() * self.most_reward}
        told |= {"agent/lambda_return": (weight * target).sum()}
        return policy_loss + value_loss - args.entropy_weight * entropy, {k: v.detach() for k, v in told.items()}


# Adapted from dawm_td3bc.py: an actor-critic in the world model's imagination
def train_agent(args: Args, histories: Histories, world_model, reward_model, evaluator: Evaluator, run: Run):
    """ActorCritic on rollouts from the data's states, each batch imagined with the actor as it is."""
    run.seed("agent", args.seed)
    agent = ActorCritic(args, histories).to(run.device)
    optimizer, schedule = optimizer_of(agent, args.agent_lr, 0.0)
    # No policy's returns lie above this where rewards are like the data's: a mean beyond it means divergence.
    run.bounds["agent/lambda_return"] = 1 / max(1 - args.gamma, 1e-9)
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(optimizer, schedule), private=True
    ) as stage:
        for update in stage:
            index = torch.randint(len(histories.rows), (args.imagined_rollouts,), device=run.device)
            loss, told = agent.loss(*imagine(args, histories, world_model, reward_model, agent.actor, index))
            descend(agent, optimizer, schedule, loss, 100.0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, told)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DIAMOND Alg. 1], offline
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    histories = Histories(args, dataset, run.device)
    run.open(dataset, evaluator)
    world_model = train_world_model(args, histories, run)
    reward_model = train_reward_model(args, histories, run)
    agent = train_agent(args, histories, world_model, reward_model, evaluator, run)
    rollouts = synthesize(args, histories, world_model, reward_model, agent, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, histories=histories, world_model=world_model,
        reward_model=reward_model, rollouts=rollouts, agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
