"""One step at a time: DAWM with an ensemble of one-step Gaussian networks in the place of its diffusion model.

1. Each network gives the change of state, the reward and the end of one step, given a state and an action; beside it
   another clones the data's policy: an action, given a state (section 3). No return-to-go is asked for.
2. From every real pair (state, action) rollouts are composed step by step: H+1 complete transitions (section 5).
3. Their later actions come from the cloned policy, once for all pairs, or from the agent's own policy, in its loop; no
   action is inferred (section 4 is empty), and no diffusion runs anywhere.
4. TD3+BC learns from these transitions as DAWM's does, or, as in DWM's baseline OneStep, from imagined sums of H
   rewards at the real pairs (section 6).
5. The actor runs in the simulator (section 7).

    python -m baselines.one_step --env-id local/hopper/medium-v0 --laptop                # DAWM without diffusion
    python -m baselines.one_step --env-id local/hopper/medium-v0 --laptop --actions policy
    python -m baselines.one_step --env-id hopper-medium-v2 --preset dwm                  # OneStep-TD3BC of DWM's tables

Keys:
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]    Diffusion World Model, arXiv 2402.03570 (appendix as reprinted in arXiv 2607.17560)
[PETS]   Deep RL in a Handful of Trials using Probabilistic Dynamics Models, arXiv 1805.12114
[MOPO]   Model-based Offline Policy Optimization, arXiv 2005.13239, and its code
[TD3BC]  A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code
[SSORL]  Semi-Supervised Offline RL with Action-Free Trajectories, arXiv 2210.06518, and its code

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: H is `horizon`; TD3+BC's alpha is `bc_alpha`; `tau` is the Polyak rate only.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Literal

from common import fast
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
    # defaults: dawm: DAWM's; dwm: those of [DWM]'s OneStep-TD3BC. See PRESETS; any flag given still wins
    preset: Literal["dawm", "dwm"] = "dawm"

    # ---- Data
    horizon: Count = 7  # H: a rollout has H+1 transitions [DAWM Sec. 4]; dwm: rewards in a target, 1 to 5 [DWM App.]
    gamma: Share = 0.99  # discount of the agent [DAWM Tab. 7]

    # ---- World model
    world_model_seed: Seed = 100  # seed of its training [unspecified]
    world_model_steps: Count = 2_000_000  # gradient updates, DAWM's number [unspecified]; dwm: 1e6 [DWM App.]
    world_model_batch_size: Count = 64  # transitions per update and network [unspecified]; so many windows in DAWM
    world_model_lr: Rate = 1e-4  # Adam's rate [DWM App.]
    world_model_holdout: Annotated[float, (0.001, 0.9)] = 0.05  # episodes that choose the weights [unspecified]
    ensemble_size: Count = 5  # networks [PETS]; [deviation] 1 in DWM
    ensemble_width: Count = 256  # units of each hidden layer [DWM App.]
    ensemble_layers: Annotated[int, (2, math.inf)] = 4  # of each network [DWM App.], the last one counted [unspecified]

    # ---- Synthesis
    actions: Literal["cloned", "policy"] = "cloned"  # of the later steps: the data's policy, or the agent's [DWM]
    synthesis_seed: Seed = 100  # seed of the rollouts with cloned actions [unspecified]
    synthesis_batch_size: Count = 4096  # rollouts generated together [unspecified]
    termination: Literal["rule", "none"] = "rule"  # end rollouts at falls (mark_ends), or not, as printed [deviation]

    # ---- Agent
    # learn from each transition [DAWM Alg. 2], or only at real pairs, from H imagined rewards and a value [DWM]
    critic_target: Literal["transitions", "expansion"] = "transitions"
    agent_updates: Count = 1_000_000  # critic updates; [unspecified], TD3BC's code; dwm: 200,000 [DWM App.]
    agent_batch_size: Count = 256  # transitions or pairs per update; [unspecified], TD3BC's code; dwm: 128 [DWM App.]
    agent_lr: Rate = 3e-4  # Adam's rate of actor and critics [DWM App.], TD3BC's code
    tau: Share = 0.005  # Polyak rate of the target networks [DWM App.], TD3BC's code
    policy_noise: Amount = 0.2  # std of the target action's noise, actions in [-1, 1] [DWM App.]
    noise_clip: Amount = 0.5  # bound of that noise [TD3BC]
    policy_delay: Count = 2  # critic updates per actor update [TD3BC]
    bc_alpha: Amount = 2.5  # weight of Q against behaviour cloning [TD3BC Eq. 5]


PRESETS = {
    "dawm": {},
    "dwm": dict(
        horizon=2,  # of a grid from 1 to 5, of which DWM prints the best [unspecified]
        world_model_steps=1_000_000,
        ensemble_size=1,
        actions="policy",
        termination="none",
        critic_target="expansion",
        agent_updates=200_000,
        agent_batch_size=128,
    ),
}

# --laptop: fewer updates, the horizon and batch of dawm_td3bc.py --laptop (reasons there) [deviation] throughout.
LAPTOP = dict(
    horizon=1,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    world_model_steps=15_000,
    world_model_lr=1e-3,
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
    synthesis_batch_size=1024,
)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: real pairs and what their step brings
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: single steps; nothing follows a fall, and there is no return-to-go
class Windows:
    """All real pairs (state, action).

    `tokens` [N + E, obs_dim + 1]: what the step from a row brings, the change of state and the reward; rows are the
    states, of which an episode of T transitions has T+1. `terminated` [N]: whether a pair's step ends its episode.
    """

    def __init__(self, dataset: OfflineDataset, device: torch.device):
        self.number_states(dataset)
        self.reward = np.insert(dataset.reward, self.last + 1, 0)
        self.action, self.terminated = dataset.action, dataset.terminated.astype(np.float32)
        self.usable = np.ones(len(self.episode), bool)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.as_tensor(value, device=device))
        self.tokens = torch.cat([self.change, self.reward[:, None]], dim=1)
        self.healthy = None  # the simulator's rule for falls, where it is known
        if dataset.healthy_low is not None:
            self.healthy = tuple(torch.as_tensor(x, device=device) for x in (dataset.healthy_low, dataset.healthy_high))

    def number_states(self, dataset: OfflineDataset) -> None:
        """obs and change [N + E, obs_dim]: T transitions have T+1 states, so pair i of episode e is row i + e.
        `start` and `final` [N] are the rows of a pair's own state and of its episode's last one."""
        self.episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        self.last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        self.obs = np.insert(dataset.obs, self.last + 1, dataset.next_obs[self.last], axis=0)
        self.change = np.insert(dataset.next_obs - dataset.obs, self.last + 1, 0, axis=0)
        self.start = np.arange(len(self.episode)) + self.episode
        self.final = (self.last + 1 + np.arange(len(self.last)))[self.episode]

    def split(self, pairs: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs marked in `pairs` [N]: to train on, and those in a random share of their episodes."""
        episodes = self.episode[pairs].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
        count = min(math.ceil(share * len(episodes)), len(episodes) - 1)  # something must be left to train on
        held_out = torch.isin(self.episode, episodes[order[:count]])
        return (pairs & ~held_out).nonzero()[:, 0], (pairs & held_out).nonzero()[:, 0]


# Copied from dawm_td3bc.py
class Normalizer(nn.Module):
    """Each dimension of values [N, dim] to mean 0 and standard deviation 1 and back, clipped to the data's range.

    `low` and `high` [dim] are that range in these units; a dimension that never changes is 0.
    """

    def __init__(self, values: torch.Tensor):
        super().__init__()
        low, high = values.amin(0), values.amax(0)
        changes, scale = high > low, values.std(0) + 1e-6
        scale = torch.where(changes, scale, torch.ones_like(scale))
        self.register_buffer("shift", torch.where(changes, values.mean(0), low))
        self.register_buffer("scale", scale)
        self.register_buffer("low", (low - self.shift) / scale)
        self.register_buffer("high", (high - self.shift) / scale)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] in dataset units."""
        return ((x - self.shift) / self.scale).clamp(self.low, self.high)

    def denormalize(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., dim] to dataset units."""
        return y.clamp(self.low, self.high) * self.scale + self.shift


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: an ensemble of one-step Gaussian networks, and a cloned policy
# ---------------------------------------------------------------------------------------------------------------------


class Networks(nn.Module):
    """Multilayer perceptrons with SiLU [PETS], in one batch: x [members, B, in_dim] -> [members, B, out_dim]."""

    def __init__(self, members: int, sizes: list[int]):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in zip(sizes[:-1], sizes[1:], strict=True):  # within 1 / sqrt(in_dim), as in torch's own layers
            self.weights.append((2 * torch.rand(members, i, o) - 1) / math.sqrt(i))
            self.biases.append((2 * torch.rand(members, 1, o) - 1) / math.sqrt(i))

    def forward(self, x):
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.silu(torch.baddbmm(bias, x, weight))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])


class GaussianEnsemble(nn.Module):
    """Diagonal Gaussians over y, given x [members, B, in_dim]; y in units in which its standard deviation is 1.

    Mean and variance are two networks, the variance through a softplus [DWM App.]. At least 1e-4 [unspecified]: a
    simulator without noise would drive it to 0, and the likelihood to infinity.
    """

    def __init__(self, args: Args, in_dim: int, out_dim: int):
        super().__init__()
        sizes = [in_dim, *[args.ensemble_width] * (args.ensemble_layers - 1), out_dim]
        self.mean, self.variance = Networks(args.ensemble_size, sizes), Networks(args.ensemble_size, sizes)

    def forward(self, x) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, both [members, B, out_dim]."""
        return self.mean(x), F.softplus(self.variance(x)) + 1e-4

    def loss(self, x, y) -> torch.Tensor:
        """Negative log-likelihood of y [members, B, out_dim] but for its constant, mean of its dimensions."""
        mean, variance = self(x)
        return 0.5 * (variance.log() + (y - mean).square() / variance).mean()

    def sample(self, x) -> torch.Tensor:
        mean, variance = self(x)
        return mean + variance.sqrt() * torch.randn_like(mean)


# Adapted from dawm_td3bc.py: single steps and actions, by an ensemble
class WorldModel(nn.Module):
    """p(next state, reward, end | state, action) and p(action | state), with the units that they work in."""

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, self.obs_dim, action_dim = args, windows.obs.shape[1], windows.action.shape[1]
        self.obs_units = Normalizer(windows.obs)
        self.register_buffer("obs_range", torch.stack([windows.obs.amin(0), windows.obs.amax(0)]))
        self.units = Normalizer(windows.tokens[windows.start])
        self.action_units = Normalizer(windows.action)
        dynamics = GaussianEnsemble(args, self.obs_dim + action_dim, self.obs_dim + 1)
        end = Networks(args.ensemble_size, [self.obs_dim + action_dim, args.ensemble_width, 1])
        behaviour = GaussianEnsemble(args, self.obs_dim, action_dim)
        self.dynamics, self.end, self.behaviour = (fast.on_cpu(x, args.compile) for x in (dynamics, end, behaviour))

    def pair(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """State and action as the networks take them [..., obs_dim + action_dim]."""
        return torch.cat([self.obs_units.normalize(obs), action], dim=-1)

    def losses(self, windows: Windows, index: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each member's pairs are a row of `index` [members, B]. The three share no parameter."""
        row, action = windows.start[index], windows.action[index]
        pair, token = self.pair(windows.obs[row], action), self.units.normalize(windows.tokens[row])
        end = F.binary_cross_entropy_with_logits(self.end(pair)[..., 0], windows.terminated[index])
        cloning = self.behaviour.loss(pair[..., : self.obs_dim], self.action_units.normalize(action))
        return {"loss": self.dynamics.loss(pair, token), "end_loss": end, "cloning_loss": cloning}

    def deal(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each of x [B, dim] to one member, at random at every step [MOPO code] -> [members, B / members, dim], and
        where each is when these are put one behind the other [B]."""
        members, order = self.args.ensemble_size, torch.randperm(len(x), device=x.device)
        places = torch.arange(math.ceil(len(x) / members) * members, device=x.device)
        return x[order[places % len(x)]].view(members, -1, x.shape[1]), order.argsort()

    def step(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Next state [B, obs_dim], reward [B] and whether the episode ends [B], dataset units.

        Never outside the data's range, as DAWM's: else a few rollouts leave for infinity [unspecified].
        """
        x, places = self.deal(self.pair(obs, action))
        token, end = (y.flatten(0, 1)[places] for y in (self.dynamics.sample(x), self.end(x)))
        change, reward = self.units.denormalize(token).split([self.obs_dim, 1], dim=1)
        return (obs + change).clamp(*self.obs_range), reward[:, 0], end[:, 0] > 0

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """An action of the cloned policy, drawn from its Gaussian [B, action_dim] [unspecified]."""
        x, places = self.deal(self.obs_units.normalize(obs))
        return self.action_units.denormalize(self.behaviour.sample(x).flatten(0, 1)[places])


# Adapted from dawm_td3bc.py: step by step, so that each state has an action
@torch.no_grad()
def sample_rollouts(args: Args, world_model: WorldModel, obs, action, act=None):
    """Rollouts from obs [B, obs_dim] and action [B, action_dim]; `act` maps later states to actions, by default as the
    cloned policy does.

    Returns obs [B, H+2, obs_dim], whose first is the given one to the bit, action [B, H+1, action_dim], ended [B, H+1]
    by the model's own sign, and reward [B, H+1], dataset units.
    """
    act, states, made = act or world_model.act, [obs], []
    for _ in range(args.horizon + 1):
        action = act(states[-1]) if made else action
        following, reward, ended = world_model.step(states[-1], action)
        states.append(following)
        made.append((action, ended, reward))
    return torch.stack(states, dim=1), *(torch.stack(x, dim=1) for x in zip(*made, strict=True))


PARTS = {"loss": "dynamics", "end_loss": "end", "cloning_loss": "behaviour"}  # each loss, and whose it is


# Adapted from dawm_td3bc.py: three likelihoods, and the weights that were best on held-out episodes
def train_world_model(args: Args, windows: Windows, run: Run) -> WorldModel:
    """Maximum likelihood of what real steps bring and of real actions; each member sees batches of its own [MOPO code].

    [unspecified] Returns the weights of each part that were best on held-out episodes: a likelihood overfits, a
    variance first.
    """
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, windows).to(run.device)
    best, best_loss = copy.deepcopy(world_model), dict.fromkeys(PARTS, math.inf)
    optimizer = torch.optim.Adam(world_model.parameters(), lr=args.world_model_lr, fused=True)
    train, held_out = windows.split(windows.usable, args.world_model_holdout, args.world_model_seed)
    if len(held_out):
        held_out = held_out[torch.linspace(0, len(held_out) - 1, min(len(held_out), 10_000), device=run.device).long()]
    shape = args.ensemble_size, args.world_model_batch_size
    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=best, saves=(world_model, optimizer, best_loss)
    ) as stage:
        for step in stage:
            losses = world_model.losses(windows, train[torch.randint(len(train), shape, device=run.device)])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {f"world_model/{name}": loss for name, loss in losses.items()})
                if len(held_out):
                    with torch.no_grad():
                        losses = world_model.losses(windows, held_out.expand(args.ensemble_size, -1))
                    run.log(step, {f"world_model/val_{name}": loss for name, loss in losses.items()})
                for name, part in PARTS.items():
                    if float(losses[name]) < best_loss[name]:
                        best_loss[name] = float(losses[name])
                        getattr(best, part).load_state_dict(getattr(world_model, part).state_dict())
    return best


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. A one-step model needs the action first, and cannot leave it to be inferred.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: real pairs to full transitions
# ---------------------------------------------------------------------------------------------------------------------
# A transition is one row: obs, action, reward, next_obs, terminated. One gather then fetches a whole batch.


# Copied from dawm_td3bc.py
def row_sizes(obs_dim: int, action_dim: int) -> list[int]:
    """Columns of obs, action, reward, next_obs and terminated in a row."""
    return [obs_dim, action_dim, 1, obs_dim, 1]


# Adapted from dawm_td3bc.py: the model's own sign is an output of its own
def mark_ends(args: Args, windows: Windows, obs: torch.Tensor, ended: torch.Tensor):
    """terminated and valid (false after an end) of the H+1 steps between obs [B, H+2, obs_dim], both [B, H+1].

    An end is what the simulator's rule says of the next state, where it is known [MOPO code], or the model's own sign
    `ended` [B, H+1]. [deviation] DWM mentions no ends.
    """
    if windows.healthy is not None:
        low, high = windows.healthy
        ended = ended | ~((obs[:, 1:] > low) & (obs[:, 1:] < high)).all(-1)
    terminated = ended & (args.termination == "rule")
    return terminated, ~(torch.cumsum(terminated, 1) - terminated.int() > 0)


# Adapted from dawm_td3bc.py: actions come with the rollout
def complete_rollouts(args: Args, windows: Windows, world_model, index: torch.Tensor, act=None):
    """From the real pairs `index` [B], H+1 complete transitions each: rows [B, H+1, row_dim] and valid [B, H+1].

    `act` as in sample_rollouts.
    """
    pair = windows.obs[windows.start[index]], windows.action[index]
    obs, action, ended, reward = sample_rollouts(args, world_model, *pair, act)
    terminated, valid = mark_ends(args, windows, obs, ended)
    rows = [obs[:, :-1], action, reward[..., None], obs[:, 1:], terminated[..., None]]
    return torch.cat(rows, dim=-1), valid


# Adapted from dawm_td3bc.py: from all pairs, by the world model alone
def synthesize(args: Args, windows: Windows, world_model, run: Run) -> dict[str, torch.Tensor]:
    """A rollout with cloned actions from every real pair: rows [N, H+1, row_dim], valid [N, H+1].

    They stay in the CPU's memory, 4 * row_dim bytes each; the agent takes them to its device.
    """
    run.seed("synthesis", args.synthesis_seed)
    pairs = torch.arange(len(windows.action), device=run.device)
    shape, sizes = (len(pairs), args.horizon + 1), row_sizes(world_model.obs_dim, windows.action.shape[1])
    rollouts = {"rows": torch.zeros(*shape, sum(sizes)), "valid": torch.zeros(shape, dtype=torch.bool)}
    with run.stage(synthesize, len(pairs), "pair", keeps=rollouts, after=("world model",)) as stage:
        for index in stage.over(pairs.split(args.synthesis_batch_size)):
            here = slice(stage.at, stage.at + len(index))
            rollouts["rows"][here], rollouts["valid"][here] = complete_rollouts(args, windows, world_model, index)
    _, _, reward, _, terminated = rollouts["rows"].split(sizes, dim=-1)
    run.log(
        0,
        {
            "synthesis/transitions": rollouts["valid"].sum(),
            "synthesis/mean_reward": reward[rollouts["valid"]].mean(),
            "synthesis/fall_fraction": terminated.amax(1).mean(),
        },
    )
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: TD3+BC
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
def real_transitions(dataset: OfflineDataset, device: torch.device) -> torch.Tensor:
    """The data set as rows [N, row_dim].

    [deviation] Rows at a time limit are kept and bootstrapped, since their successor is known; TD3BC's code skips them.
    """
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs, dataset.terminated[:, None]]
    return torch.as_tensor(np.concatenate(columns, axis=1, dtype=np.float32), device=device)


# Copied from dawm_td3bc.py
def mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    hidden = [nn.Linear(in_dim, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, nn.Linear(256, out_dim))


# Copied from dawm_td3bc.py
class Actor(nn.Module):
    """Deterministic policy: obs [B, obs_dim], dataset units -> action [B, action_dim] in [-1, 1]."""

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor, action_dim: int):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean), action_dim)

    def forward(self, obs):
        return torch.tanh(self.net((obs - self.obs_mean) / self.obs_std))


# Copied from dawm_td3bc.py
class Critic(nn.Module):
    """Q(obs, action) -> [B]; obs in dataset units."""

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor, action_dim: int):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean) + action_dim, 1)

    def forward(self, obs, action):
        return self.net(torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=1))[:, 0]


# Copied from dwm_baseline.py
def mve_target(reward, ended, last_value, gamma: float) -> torch.Tensor:
    """sum_{h<H} gamma^h r_h + gamma^H V(s_H) -> [B], Diffusion-MVE [DWM].

    reward [B, H] from the real pair on; ended [B, H] of the states 1..H: what follows an end is worth 0; last_value [B]
    of state H. [deviation] DWM has no `ended` (--termination none: all 0).
    """
    alive = torch.cumprod(1 - ended, dim=1)  # at states 1..H
    discount = gamma ** torch.arange(reward.shape[1], device=reward.device)
    reward = reward * torch.cat([torch.ones_like(alive[:, :1]), alive[:, :-1]], dim=1)
    return (reward * discount).sum(1) + gamma ** reward.shape[1] * alive[:, -1] * last_value


# Adapted from dawm_td3bc.py: targets of one step or more
class TD3BC(nn.Module):
    """Actor, twin critics and their targets; `update` is one step of [DAWM Alg. 2] or [DWM], with their TD3+BC.

    obs [N, obs_dim] gives the units of the networks: those of the real data, for synthetic data too [TD3BC Sec. 5].
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        super().__init__()
        self.args, self.row_sizes = args, row_sizes(obs.shape[1], action_dim)
        units = obs.mean(0), obs.std(0) + 1e-3, action_dim
        self.actor, self.qf1, self.qf2 = (net(*units).to(obs.device) for net in (Actor, Critic, Critic))
        self.actor_target, self.qf1_target, self.qf2_target = map(copy.deepcopy, (self.actor, self.qf1, self.qf2))
        self.qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_parameters = list(self.actor.parameters())
        targets = (self.actor_target, self.qf1_target, self.qf2_target)
        self.target_parameters = [parameter for net in targets for parameter in net.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.agent_lr, fused=True)
        self.qf_optimizer = torch.optim.Adam(self.qf_parameters, lr=args.agent_lr, fused=True)

    def update(self, batch: torch.Tensor, update_actor: bool) -> dict[str, torch.Tensor]:
        """One critic update at the first steps of `batch` [B, steps, row_dim], whose other steps only make its target,
        and, if asked for, one actor and target update. Returns losses."""
        obs, action, reward, next_obs, terminated = batch.split(self.row_sizes, dim=2)
        # DWM: y = r + gamma r' + ... + gamma^H min Q'(s', pi'(s')); of one step it is DAWM's target
        value = self.target_value(next_obs[:, -1])
        target = mve_target(reward[..., 0], terminated[..., 0], value, self.args.gamma)
        obs, action = obs[:, 0], action[:, 0]
        qf_loss = F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)
        self.qf_optimizer.zero_grad()
        qf_loss.backward(inputs=self.qf_parameters)
        self.qf_optimizer.step()
        losses = {"agent/qf_loss": qf_loss.detach(), "agent/qf_target": target.mean()}
        if update_actor:
            # Every n-th time a step of the actor, and all targets follow
            actor_loss, bc_loss = self.actor_loss(obs, action)
            self.actor_optimizer.zero_grad()
            actor_loss.backward(inputs=self.actor_parameters)
            self.actor_optimizer.step()
            with torch.no_grad():
                online = self.actor_parameters + self.qf_parameters
                torch._foreach_lerp_(self.target_parameters, online, self.args.tau)
            losses |= {"agent/actor_loss": actor_loss.detach(), "agent/bc_loss": bc_loss.detach()}
        return losses

    @torch.no_grad()
    def target_value(self, obs) -> torch.Tensor:
        """min Q'(s, a), a = target policy plus clipped noise [TD3BC], obs [B, obs_dim] -> [B]."""
        args, action = self.args, self.actor_target(obs)
        noise = (torch.randn_like(action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        action = (action + noise).clamp(-1, 1)
        return torch.minimum(self.qf1_target(obs, action), self.qf2_target(obs, action))

    def actor_loss(self, obs, action) -> tuple[torch.Tensor, torch.Tensor]:
        """-lambda Q + behaviour cloning, and the latter alone; lambda = bc_alpha / mean|Q| [TD3BC Eq. 5], [DWM]."""
        policy_action = self.actor(obs)
        q = self.qf1(obs, policy_action)
        bc_loss = F.mse_loss(policy_action, action)
        return -self.args.bc_alpha / q.abs().mean().detach() * q.mean() + bc_loss, bc_loss


# Adapted from dawm_td3bc.py: rollouts with the policy's own actions, and targets of several steps
def train_agent(args: Args, dataset: OfflineDataset, rollouts, complete, evaluator: Evaluator, run: Run) -> TD3BC:
    """TD3+BC on `rollouts` (see synthesize), or, without, on those that complete(pairs, policy) makes in the loop."""
    run.seed("agent", args.seed)
    obs = torch.as_tensor(dataset.obs, device=run.device)
    agent, expansion, now, losses = TD3BC(args, obs, dataset.action.shape[1]), args.critic_target == "expansion", {}, {}
    if rollouts is not None:
        stored = rollouts["rows"][:, : args.horizon] if expansion else rollouts["rows"][rollouts["valid"]][:, None]
        stored = stored.to(run.device)
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    optimizers = agent.actor_optimizer, agent.qf_optimizer
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses, now), private=True
    ) as stage:
        for update in stage:
            if rollouts is not None:
                batch = stored[torch.randint(len(stored), (args.agent_batch_size,), device=run.device)]
            else:  # every update, or, where it uses one step after the other, once they are all used
                h = (update - 1) % (args.horizon + 1)
                if expansion or h == 0:
                    pairs = torch.randint(len(obs), (args.agent_batch_size,), device=run.device)
                    now["rows"], now["valid"] = complete(pairs, agent.actor)
                batch = now["rows"][:, : args.horizon] if expansion else now["rows"][now["valid"][:, h], h : h + 1]
            if len(batch):  # all rollouts of a small batch may have ended before step h
                losses |= agent.update(batch, update_actor=update % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows, rollouts = Windows(dataset, run.device), None
    run.open(dataset, evaluator)
    world_model = train_world_model(args, windows, run)
    complete = partial(complete_rollouts, args, windows, world_model)
    if args.actions == "cloned":
        rollouts = synthesize(args, windows, world_model, run)
    agent = train_agent(args, dataset, rollouts, complete, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, windows=windows, world_model=world_model,
        rollouts=rollouts, complete=complete, agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP, PRESETS)
