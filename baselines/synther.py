"""SynthER: offline RL with TD3+BC on transitions that a diffusion model made up from noise alone.

1. A diffusion model learns single transitions (state, action, reward, next state, end) as flat vectors, given nothing
   (section 3).
2. There is no model of actions (section 4 is empty): they are part of each sample.
3. The model runs once, before the agent learns, and draws as many transitions as are asked for (section 5).
4. TD3+BC, unmodified, learns from these alone (section 6).
5. The actor runs in the simulator; the diffusion model is not needed any more (section 7).

    python -m baselines.synther --env-id local/hopper/medium-v0 --laptop      # two CPU cores, data made on this machine
    python -m baselines.synther --env-id hopper-medium-v2                     # paper scale on D4RL, one GPU
    python -m baselines.synther --env-id hopper-medium-v2 --synthetic-fraction 0.5    # half of each batch is real

Section 3 is the home of EDM (`denoise`, `edm_loss`, `karras_sigmas`, `sample_edm`) and of its network, `ResidualMLP`.

Keys:
[SYNTHER]  Synthetic Experience Replay, arXiv 2303.06614, and its code
[EDM]      Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364
[DAWM]     DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]      Diffusion World Model, arXiv 2402.03570 (appendix as reprinted in arXiv 2607.17560)
[TD3BC]    A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: EDM's sigma is the standard deviation of the noise in x0 + sigma * noise, and its sigma_data is 1, since x0 is
in standard deviations of the data; TD3+BC's alpha is `bc_alpha`; `tau` is the Polyak rate only.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated

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
    gamma: Share = 0.99  # discount of the agent [DAWM Tab. 7]

    # ---- World model
    world_model_seed: Seed = 100  # seed of the diffusion training [unspecified]
    world_model_steps: Count = 100_000  # gradient updates [SYNTHER code]
    # transitions per update; default 1,024, or 256 where the data have fewer than 800,000 [SYNTHER code]
    world_model_batch_size: Count | None = None
    world_model_lr: Rate = 3e-4  # Adam's rate, falling to 0 along a cosine [SYNTHER code]
    mlp_width: Count = 2048  # units of a residual layer; 1,024 for some data sets [SYNTHER code]
    mlp_depth: Count = 6  # residual layers [SYNTHER code]
    sigma_log_mean: Annotated[float, (-20, 20)] = -1.2  # mean of ln sigma in training [EDM Tab. 1]
    sigma_log_std: Amount = 1.2  # its standard deviation [EDM Tab. 1]
    ema_decay: Share = 0.995  # of the averaged weights [SYNTHER code]
    ema_every: Count = 10  # updates between two averagings [SYNTHER code]
    ema_start: Annotated[int, (0, math.inf)] = 2_000  # a plain copy until then [deviation]: its code's decay rises

    # ---- Synthesis
    synthesis_seed: Seed = 100  # seed of the sampling noise [unspecified]
    synthetic_transitions: Count = 5_000_000  # drawn in all [SYNTHER code]
    synthesis_batch_size: Count = 100_000  # of them drawn together [SYNTHER code]
    sampling_steps: Count = 128  # N, each of two network evaluations but the last [SYNTHER code]
    sigma_min: Annotated[float, (1e-6, 1e6)] = 0.002  # smallest noise level of sampling above 0 [EDM Tab. 1]
    sigma_max: Annotated[float, (1e-6, 1e6)] = 80.0  # its largest, where sampling starts [EDM Tab. 1]
    churn: Annotated[float, (0, 1e6)] = 80.0  # S_churn: how much noise each step adds anew [SYNTHER code]; 0: none
    synthetic_fraction: Annotated[float, (0.01, 1)] = 1.0  # of a batch; below 1 the rest is real [SYNTHER code]

    # ---- Agent
    agent_updates: Count = 1_000_000  # critic updates [SYNTHER code]
    agent_batch_size: Count = 256  # transitions per update [SYNTHER code]
    agent_lr: Rate = 3e-4  # Adam's rate of actor and critics [SYNTHER code]
    tau: Share = 0.005  # Polyak rate of the target networks [SYNTHER code]
    policy_noise: Amount = 0.2  # std of the target action's noise, actions in [-1, 1] [TD3BC]
    noise_clip: Amount = 0.5  # bound of that noise [TD3BC]
    policy_delay: Count = 2  # critic updates per actor update [TD3BC]
    bc_alpha: Amount = 2.5  # weight of Q against behaviour cloning [TD3BC Eq. 5]


# --laptop: a small network, fewer updates, samples and steps of sampling [deviation]; not the paper's scale.
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    world_model_steps=15_000,
    world_model_batch_size=256,
    world_model_lr=1e-3,
    mlp_width=256,
    synthetic_transitions=200_000,
    synthesis_batch_size=1024,  # so few that a signal is heeded between two of them
    sampling_steps=16,
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
)


# Adapted from dawm_td3bc.py: its own arguments
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.sigma_min >= args.sigma_max:
        raise UserError(f"--sigma-min {args.sigma_min} must lie below --sigma-max {args.sigma_max}")


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: transitions as rows
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
# 3. World model: EDM's network, loss, noise levels, sampler
# ---------------------------------------------------------------------------------------------------------------------
# A network F sees x0 + sigma * noise, scaled, and `denoise` makes the expected x0 of what it says. All of it works on x
# [B, ...] of any shape whose entries have standard deviation 1 over the data (EDM's sigma_data), and hands `condition`,
# whatever that is, on to the network.


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


def denoise(network: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *condition) -> torch.Tensor:
    """Expected x0 of x = x0 + sigma * noise, both [B, ...], sigma [B] [EDM Eq. 7, Tab. 1].

    With s = sigma^2 + 1: c_skip = 1 / s, c_out = sigma / sqrt(s), c_in = 1 / sqrt(s), c_noise = ln(sigma) / 4.
    """
    wide = sigma.view(-1, *[1] * (x.dim() - 1))
    root = (wide.square() + 1).sqrt()
    return x / root.square() + wide / root * network(x / root, sigma.log() / 4, *condition)


def draw_sigma(args: Args, count: int, device: torch.device) -> torch.Tensor:
    """Noise levels [count] to train on: ln sigma is normal [EDM Tab. 1]."""
    return (args.sigma_log_mean + args.sigma_log_std * torch.randn(count, device=device)).exp()


def edm_loss(network: nn.Module, x0: torch.Tensor, sigma: torch.Tensor, *condition) -> torch.Tensor:
    """Mean squared error of the denoised x0 [B, ...] at noise levels sigma [B], weighted by 1 / c_out^2 [EDM Tab. 1].

    That weight makes it the mean squared error of the network's own output, whatever the noise level.
    """
    wide = sigma.view(-1, *[1] * (x0.dim() - 1))
    x0_pred = denoise(network, x0 + wide * torch.randn_like(x0), sigma, *condition)
    return ((wide.square() + 1) / wide.square() * (x0_pred - x0).square()).mean()


def karras_sigmas(sampling_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Noise levels that sampling visits: N from sigma_max down to sigma_min, then 0 [EDM Eq. 5]. 1 has no sigma_min."""
    low, high, last = sigma_min ** (1 / rho), sigma_max ** (1 / rho), max(sampling_steps - 1, 1)
    return [*((high + i / last * (low - high)) ** rho for i in range(sampling_steps)), 0.0]


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


# Adapted from dawm_td3bc.py: a whole transition, given nothing
class WorldModel(nn.Module):
    """p(state, action, reward, next state, end): a network and the units it works in.

    `network` has the averaged weights [SYNTHER code]; training moves a copy.
    """

    def __init__(self, args: Args, rows: torch.Tensor, row_sizes: list[int]):
        super().__init__()
        self.row_sizes, self.units = row_sizes, Standardizer(rows, raw=1)
        self.network = fast.on_cpu(ResidualMLP(sum(row_sizes), args.mlp_width, args.mlp_depth), args.compile)


# Adapted from dawm_td3bc.py: EDM's loss on single rows, with no condition and none held out
def train_world_model(args: Args, dataset: OfflineDataset, run: Run) -> WorldModel:
    """Fit the network on the data's rows by EDM's loss."""
    run.seed("world_model", args.world_model_seed)
    rows = real_transitions(dataset, run.device)
    world_model = WorldModel(args, rows, row_sizes(dataset.obs.shape[1], dataset.action.shape[1])).to(run.device)
    network = fast.on_cpu(copy.deepcopy(world_model.network), args.compile)
    parameters, averaged = list(network.parameters()), list(world_model.network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, betas=(0.9, 0.99), fused=True)  # [SYNTHER code]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.world_model_steps)
    normalized = world_model.units.normalize(rows)  # once for all
    batch_size = args.world_model_batch_size or (1024 if len(rows) >= 800_000 else 256)
    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=world_model, saves=(network, optimizer, schedule)
    ) as stage:
        for step in stage:
            x0 = normalized[torch.randint(len(rows), (batch_size,), device=run.device)]
            loss = edm_loss(network, x0, draw_sigma(args, batch_size, run.device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)  # [SYNTHER code]
            optimizer.step()
            schedule.step()
            if step % args.ema_every == 0 or step == args.world_model_steps:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay if step > args.ema_start else 1.0)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
    return world_model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. Each sample has its action.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: noise to transitions
# ---------------------------------------------------------------------------------------------------------------------


def sample_transitions(args: Args, world_model: WorldModel, count: int) -> torch.Tensor:
    """Rows [count, row_dim] from noise, dataset units; whether one ends its episode is 0 or 1.

    [deviation] Actions are clipped to [-1, 1], as they are when the simulator takes them; SynthER's code leaves a few
    outside. All else is as it was drawn.
    """
    units, network = world_model.units, world_model.network
    sigmas = karras_sigmas(args.sampling_steps, args.sigma_min, args.sigma_max)
    noise = args.sigma_max * torch.randn(count, len(units.mean), device=units.mean.device)
    rows = units.denormalize(sample_edm(network, noise, sigmas, churn=args.churn))
    obs, action, reward, next_obs, terminated = rows.split(world_model.row_sizes, dim=1)
    return torch.cat([obs, action.clamp(-1, 1), reward, next_obs, terminated > 0.5], dim=1)  # [SYNTHER code]


# Adapted from dawm_td3bc.py: single transitions, from nothing
def synthesize(args: Args, world_model: WorldModel, run: Run) -> dict[str, torch.Tensor]:
    """All synthetic transitions: rows [M, 1, row_dim], valid [M, 1], in the CPU's memory, 4 * row_dim bytes each."""
    run.seed("synthesis", args.synthesis_seed)
    shape = args.synthetic_transitions, 1
    rollouts = {"rows": torch.zeros(*shape, sum(world_model.row_sizes)), "valid": torch.ones(shape, dtype=torch.bool)}
    numbers = torch.arange(args.synthetic_transitions)
    with run.stage(synthesize, len(numbers), "transition", keeps=rollouts, after=("world model",)) as stage:
        for here in stage.over(numbers.split(args.synthesis_batch_size)):
            rollouts["rows"][here, 0] = sample_transitions(args, world_model, len(here)).cpu()
    _, action, reward, _, terminated = rollouts["rows"].split(world_model.row_sizes, dim=-1)
    run.log(
        0,
        {
            "synthesis/transitions": len(numbers),
            "synthesis/mean_reward": reward.mean(),
            "synthesis/action_clip_fraction": (action.abs() > 0.999).float().mean(),
            "synthesis/fall_fraction": terminated.mean(),
        },
    )
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: TD3+BC
# ---------------------------------------------------------------------------------------------------------------------


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


# Copied from dawm_td3bc.py
class TD3BC(nn.Module):
    """Actor, twin critics and their targets; `update` is one step of [DAWM Alg. 2] in the working form of [TD3BC].

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
        """One critic update on rows [B, row_dim] and, if asked for, one actor and target update. Returns losses."""
        obs, action, reward, next_obs, terminated = batch.split(self.row_sizes, dim=1)
        # Alg. 2: y = r + gamma min Q'(s', pi'(s')), and a step of each critic on its squared error
        target = self.td_target(reward[:, 0], next_obs, terminated[:, 0])
        qf_loss = F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)
        self.qf_optimizer.zero_grad()
        qf_loss.backward(inputs=self.qf_parameters)
        self.qf_optimizer.step()
        losses = {"agent/qf_loss": qf_loss.detach(), "agent/qf_target": target.mean()}
        if update_actor:
            # Alg. 2: every n-th time a step of the actor, and all targets follow
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
    def td_target(self, reward, next_obs, terminated) -> torch.Tensor:
        """r + gamma (1 - terminated) min Q'(s', a'), a' = target policy plus clipped noise [TD3BC], all [B].

        [deviation] [DAWM Alg. 2] prints neither the noise (--policy-noise 0) nor the factor (1 - terminated).
        """
        args, next_action = self.args, self.actor_target(next_obs)
        noise = (torch.randn_like(next_action) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_action = (next_action + noise).clamp(-1, 1)
        next_value = torch.minimum(self.qf1_target(next_obs, next_action), self.qf2_target(next_obs, next_action))
        return reward + args.gamma * (1 - terminated) * next_value

    def actor_loss(self, obs, action) -> tuple[torch.Tensor, torch.Tensor]:
        """-lambda Q + behaviour cloning, and the latter alone; lambda = bc_alpha / mean|Q| [TD3BC Eq. 5].

        [deviation] [DAWM Alg. 2] prints descent on +Q and lambda on both terms, with which the actor would minimise Q.
        """
        policy_action = self.actor(obs)
        q = self.qf1(obs, policy_action)
        bc_loss = F.mse_loss(policy_action, action)
        return -self.args.bc_alpha / q.abs().mean().detach() * q.mean() + bc_loss, bc_loss


# Copied from dawm_td3bc.py
def draw_batch(args: Args, real: torch.Tensor, synthetic: torch.Tensor | None) -> torch.Tensor:
    """Rows [agent_batch_size, row_dim], synthetic_fraction of them synthetic."""
    num_synthetic = round(args.synthetic_fraction * args.agent_batch_size)
    sources = ((synthetic, num_synthetic), (real, args.agent_batch_size - num_synthetic))
    return torch.cat([rows[torch.randint(len(rows), (n,), device=rows.device)] for rows, n in sources if n])


# Adapted from dawm_td3bc.py: rows are made before it learns
def train_agent(args: Args, dataset: OfflineDataset, rollouts, evaluator: Evaluator, run: Run) -> TD3BC:
    """TD3+BC on synthetic rows (see synthesize), mixed with real ones where synthetic_fraction is below 1."""
    run.seed("agent", args.seed)
    real = real_transitions(dataset, run.device)
    synthetic = rollouts["rows"][rollouts["valid"]].to(run.device)
    agent = TD3BC(args, real[:, : dataset.obs.shape[1]], dataset.action.shape[1])
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    optimizers, losses = (agent.actor_optimizer, agent.qf_optimizer), {}
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses), private=True
    ) as stage:
        for update in stage:
            losses |= agent.update(draw_batch(args, real, synthetic), update_actor=update % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [SYNTHER]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    run.open(dataset, evaluator)
    world_model = train_world_model(args, dataset, run)
    rollouts = synthesize(args, world_model, run)
    agent = train_agent(args, dataset, rollouts, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, world_model=world_model, rollouts=rollouts,
        agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
