"""PolyGRAD, offline: windows whose actions denoising moves along the policy's score, and an actor-critic inside them.

1. A diffusion model makes the states, rewards and ends of a whole window, given its first state and all its actions
   (section 3).
2. These actions begin as noise; between two denoising steps the gradient of the policy's log-density, at the states
   denoised so far, draws them to what the policy would do there: on-policy windows in one pass (section 5).
3. An actor-critic learns from them at every update, with new windows each time: diffusion runs all through its
   training (section 6).
4. Published, this data set grows by what the actor does; here it is fixed, and a cloning term, off in the paper's
   method, ties the actor to it: the offline use is ours.
5. The actor's mean acts in the simulator (section 7).

    python -m baselines.polygrad --env-id local/halfcheetah/medium-v0 --laptop
    python -m baselines.polygrad --env-id local/halfcheetah/medium-v0 --laptop --cloning-weight 0   # nothing holds it
    python -m baselines.polygrad --env-id halfcheetah-medium-v2                                # paper scale, one GPU

Keys:
[PG]     World Models via Policy-Guided Trajectory Diffusion, arXiv 2312.08533, and its code
[DIFF]   Planning with Diffusion for Flexible Behavior Synthesis, arXiv 2205.09991 (windows, known first state)
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672
[GAE]    High-Dimensional Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: H, the states of a window, is `window`; PG's diffusion step i is `k` - 1 here; its lambda is the guidance scale
e^`log_guidance` while denoising, and `gae_lambda` in the advantages; tau is the exponent `schedule_tau`.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
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
    # ---- Data
    window: Annotated[int, (2, math.inf)] = 10  # H: states and actions of a window [PG code]
    gamma: Share = 0.99  # discount of the agent [PG code]

    # ---- World model
    world_model_seed: Seed = 100  # seed of the diffusion training [unspecified]
    world_model_steps: Count = 1_000_000  # gradient updates; as many as steps of the simulator in PG [unspecified]
    world_model_batch_size: Count = 256  # windows per update [PG code]
    world_model_lr: Rate = 3e-4  # Adam's rate [PG code]
    denoiser_width: Annotated[int, (2, math.inf)] = 1024  # units of each residual layer [PG code]
    denoiser_layers: Count = 6  # residual layers [PG code]
    diffusion_steps: Annotated[int, (2, math.inf)] = 128  # K [PG code]
    schedule_tau: Annotated[float, (0.01, 10)] | None = None  # of the noise; default 0.1 for Hopper, else 1 [PG code]
    ema_decay: Share = 0.99  # of the averaged weights [PG code]
    ema_every: Count = 10  # updates between two averagings [PG code]
    ema_start: Annotated[int, (0, math.inf)] = 2_000  # updates with a plain copy instead [PG code]

    # ---- Synthesis
    guidance_start: Annotated[float, (1e-8, 10)] = 0.005  # first guidance scale, in actions [PG code]
    guidance_lr: Amount = 3e-3  # its rate: it grows while actions spread more than the policy; 0: fixed [PG code]
    clip_std: Amount = 3.0  # actions stay within so many standard deviations of the policy's mean [PG code]
    clip_change: Amount = 0.25  # bound of a coordinate's change in the last twelfth of the chain [PG code]
    kept_windows: Count = 10_000  # of the last policy, for experiments/audit.py and common/export.py alone

    # ---- Agent
    agent_updates: Count = 250_000  # of actor and critic, one for each four of the denoiser's [PG code]
    agent_batch_size: Annotated[int, (2, math.inf)] = 1024  # windows imagined for an update [PG code]
    actor_lr: Rate = 3e-5  # AdamW's rate, the largest that is taken [PG code]
    actor_step: Annotated[float, (1e-6, 10)] = 0.01  # mean |change of log pi| of an update, at most [PG code]
    critic_lr: Rate = 3e-4  # AdamW's rate [PG code]
    critic_ema: Share = 0.995  # of the target critic, at each update [PG code]
    gae_lambda: Share = 0.9  # weight of longer returns in the advantages [PG code]
    entropy_weight: Amount = 1e-5  # of the policy's entropy [PG code]
    grad_clip: Amount = 0.1  # largest norm of the gradients of actor and critic [PG code]
    initial_std: Annotated[float, (0.11, 10)] = 1.0  # of the policy's actions [PG code]
    normalize_obs: bool = False  # standardise the agent's observations; off in PG's code
    cloning_weight: Amount = 1.0  # of -log pi at real pairs [deviation]; 0 as published, where the data are the actor's


# --laptop: a small denoiser, a short chain and fewer, smaller updates [deviation]; not the paper's scale.
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    world_model_steps=15_000,
    world_model_lr=1e-3,
    denoiser_width=256,
    denoiser_layers=3,
    diffusion_steps=16,
    agent_updates=10_000,
    agent_batch_size=32,
    actor_lr=3e-4,
    guidance_lr=1e-2,  # fewer updates to find its scale in
    initial_std=0.3,  # about that of the data's actions: farther out nothing has been seen
    normalize_obs=True,  # without it so few updates leave a poor clone
    eval_every=1_000,
)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: episodes to windows
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: rows of states, and what belongs to each
class Windows:
    """All windows of H rows; gathered when asked for.

    `rows` [N + E, obs_dim + 2]: a state, its step's reward and whether that ends the episode; `action` and `obs` in
    the same rows. Behind a fall its last state stays, without reward or action, over and over [deviation]: PG's code
    has zeros there, and the agent takes neither into account. No window crosses a time limit. UserError if none fits.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        obs = np.insert(dataset.obs, last + 1, dataset.next_obs[last], axis=0)
        columns = [dataset.reward[:, None], dataset.terminated[:, None], dataset.action]
        reward, terminated, action = (np.insert(x.astype(np.float32), last + 1, 0, axis=0) for x in columns)
        final = last + 1 + np.arange(len(last))  # rows of the episodes' last states
        terminated[final] = dataset.terminated[last, None]
        start = np.arange(len(episode)) + episode  # of each pair, whose row it is
        fits = start + args.window <= final[episode]
        usable = fits | dataset.terminated[last][episode]
        if not usable.any():
            raise UserError(
                f"--window {args.window} needs {args.window} transitions in a row, but the longest episode has "
                f"{dataset.lengths.max()}; lower it (2 or more)"
            )
        arrays = obs, np.concatenate([obs, reward, terminated], axis=1), action, start[usable], final[episode][usable]
        self.obs, self.rows, self.action, self.start, self.final = (torch.as_tensor(x, device=device) for x in arrays)
        self.offsets = torch.arange(args.window, device=device)

    def index(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows that make up the windows `numbers` [B] -> [B, H]."""
        return torch.minimum(self.start[numbers, None] + self.offsets, self.final[numbers, None])


# Adapted from dawm_td3bc.py: without bounds
class Normalizer(nn.Module):
    """Each dimension of values [N, dim] to mean 0 and standard deviation 1 and back [PG code].

    A dimension that never changes is 0, and whatever is made of it comes back as what it was, within 1e-6 or so.
    """

    def __init__(self, values: torch.Tensor):
        super().__init__()
        changes = values.amax(0) > values.amin(0)
        self.register_buffer("shift", torch.where(changes, values.mean(0), values[0]))
        self.register_buffer("scale", values.std(0) * changes + 1e-6)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] in dataset units."""
        return (x - self.shift) / self.scale

    def denormalize(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., dim] to dataset units."""
        return y * self.scale + self.shift


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: schedule, denoiser, loss
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: PolyGRAD's family of cosines
def cosine_alpha_bar(num_diffusion_steps: int, tau: float) -> torch.Tensor:
    """Cumulative product of 1 - noise_beta for k = 0..K -> [K+1], float64, alpha_bar[0] = 1 [PG code].

    cos(pi/2 k/K)^(2 tau): at tau = 0.1, Hopper's, most of the chain has little noise.
    """
    k = torch.arange(num_diffusion_steps + 1, dtype=torch.float64) / num_diffusion_steps
    f = torch.cos(k * math.pi / 2).clamp(min=0) ** (2 * tau)
    f[-1] = 0  # cos(pi/2) is not quite, and a small power of it far from it
    noise_beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - noise_beta, 0)])


# Copied from dawm_td3bc.py
def posterior_coefficients(alpha_bar: torch.Tensor, steps: list[int]) -> list[tuple[float, float, float]]:
    """For each visited step, ascending: weight of x0, weight of x_k and std of the next x [IDDPM].

    The betas are those of the shortened chain; the full chain's would leave the noise level inconsistent.
    """
    chain = alpha_bar[[0, *steps]]
    coefficients = []
    for previous, current in zip(chain[:-1], chain[1:], strict=True):
        noise_beta = 1 - current / previous
        weight_x0 = previous.sqrt() * noise_beta / (1 - current)
        weight_x_k = (1 - noise_beta).sqrt() * (1 - previous) / (1 - current)
        std = (noise_beta * (1 - previous) / (1 - current)).sqrt()
        coefficients.append((weight_x0.item(), weight_x_k.item(), std.item()))
    return coefficients


class TrajectoryDenoiser(nn.Module):
    """Clean window of x [B, H, obs_dim + 2] and action [B, H, action_dim], given step k [B] -> as x [PG code].

    Both are flattened; residual layers x + W relu(norm(x)) follow, and random frequencies embed k. 6,664,450 parameters
    for Hopper at paper scale.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        size = args.window * (obs_dim + 2)
        in_dim = size + args.window * action_dim
        width, embed_dim = args.denoiser_width, max(in_dim, 128)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(8))
        self.embed_k = nn.Sequential(nn.Linear(17, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.project, self.widen = nn.Linear(in_dim, embed_dim), nn.Linear(embed_dim, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(args.denoiser_layers + 1)])
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(args.denoiser_layers)])
        self.head = nn.Linear(width, size)

    def forward(self, x, action, k):
        angle = k[:, None] * self.frequencies
        embedding = self.embed_k(torch.cat([k[:, None], angle.sin(), angle.cos()], dim=1))
        h = self.widen(self.project(torch.cat([x, action], dim=2).flatten(1)) + embedding)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            h = h + layer(F.relu(norm(h)))
        return self.head(F.relu(self.norms[-1](h))).view(x.shape)


# Adapted from dawm_td3bc.py: given all actions, with no return
class WorldModel(nn.Module):
    """p(states, rewards, ends of a window | its first state, its actions): a denoiser and the units it works in.

    `denoiser` has the averaged weights [PG code]; training moves a copy.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.obs_dim, action_dim = windows.obs.shape[1], windows.action.shape[1]
        self.units = Normalizer(windows.rows)
        self.action_units = Normalizer(windows.action)
        tau = schedule_tau(args)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.diffusion_steps, tau).float())
        self.denoiser = fast.on_cpu(TrajectoryDenoiser(args, self.obs_dim, action_dim), args.compile)

    def pin(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """x [B, H, obs_dim + 2] with the known state `first` [B, obs_dim] in its first row, both normalised [DIFF]."""
        return torch.cat([torch.cat([first, x[:, 0, self.obs_dim :]], dim=1)[:, None], x[:, 1:]], dim=1)

    def x0(self, denoiser: nn.Module, x, action, k: torch.Tensor, first) -> torch.Tensor:
        """Clean window, of x at step k [B]. The action is shrunk by sqrt(alpha_bar), and gets no noise [PG code]."""
        scale = self.alpha_bar[k].sqrt()[:, None, None]
        return self.pin(denoiser(x, scale * action, k.float()), first)

    def loss(self, denoiser: nn.Module, x0: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the clean window x0 [B, H, obs_dim + 2] at a random k, all normalised [PG code]."""
        k = torch.randint(1, len(self.alpha_bar), (len(x0),), device=x0.device)
        alpha_bar, first = self.alpha_bar[k][:, None, None], x0[:, 0, : self.obs_dim]
        x_k = self.pin(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * torch.randn_like(x0), first)
        return F.mse_loss(self.x0(denoiser, x_k, action, k, first), x0)


def schedule_tau(args: Args) -> float:
    """The flag, or what PG's code sets for the robot."""
    return (0.1 if "hopper" in args.env_id.lower() else 1.0) if args.schedule_tau is None else args.schedule_tau


# Adapted from dawm_td3bc.py: its own loss, with nothing held out
def train_world_model(args: Args, windows: Windows, run: Run) -> WorldModel:
    """Fit the denoiser on real windows. [deviation] Once and before the agent: offline nothing new comes in."""
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, windows).to(run.device)
    denoiser = fast.on_cpu(copy.deepcopy(world_model.denoiser), args.compile)
    parameters, averaged = list(denoiser.parameters()), list(world_model.denoiser.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    normalized = world_model.units.normalize(windows.rows)  # once for all
    actions = world_model.action_units.normalize(windows.action)
    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=world_model, saves=(denoiser, optimizer)
    ) as stage:
        for step in stage:
            numbers = torch.randint(len(windows.start), (args.world_model_batch_size,), device=run.device)
            index = windows.index(numbers)
            loss = world_model.loss(denoiser, normalized[index], actions[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.ema_every == 0 or step == args.world_model_steps:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay if step > args.ema_start else 1.0)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
    return world_model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. The actions are there before the states are, and both become clean together.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: windows that follow the policy
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


def refine_actions(args: Args, action: torch.Tensor, mean, std, guidance_scale) -> torch.Tensor:
    """Actions [B, H, action_dim], dataset units, drawn to a Gaussian policy with this mean and std [PG code].

    First within clip_std standard deviations of the mean, then a step along the gradient of log pi, which for a
    Gaussian is (mean - action) / std^2.
    """
    action = torch.minimum(torch.maximum(action, mean - args.clip_std * std), mean + args.clip_std * std)
    return action + guidance_scale * (mean - action) / std.square()


# Adapted from dawm_td3bc.py: the sampler too, with the agent's policy in it
@torch.no_grad()
def imagine(args: Args, world_model: WorldModel, agent, obs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Windows from real states obs [B, obs_dim] with actions of the agent's policy, dataset units [PG code].

    Returns obs [B, H, obs_dim], whose first is the given one, action [B, H, action_dim], reward and terminated [B, H].
    """
    steps = list(range(1, args.diffusion_steps + 1))
    coefficients = posterior_coefficients(cosine_alpha_bar(args.diffusion_steps, schedule_tau(args)), steps)
    units, action_units, obs_dim = world_model.units, world_model.action_units, world_model.obs_dim
    first = (obs - units.shift[:obs_dim]) / units.scale[:obs_dim]
    guidance_scale = agent.log_guidance.exp()
    x = world_model.pin(torch.randn(len(obs), args.window, obs_dim + 2, device=obs.device), first)
    action = torch.randn(len(obs), args.window, len(action_units.shift), device=obs.device)
    for k, (weight_x0, weight_x_k, std) in reversed([*zip(steps, coefficients, strict=True)]):
        x0 = world_model.x0(world_model.denoiser, x, action, torch.full((len(x),), k, device=x.device), first)
        mean = weight_x0 * x0 + weight_x_k * x
        if (k - 1) / args.diffusion_steps <= 10 / 128:  # PG's last eleven steps of 128
            mean = x + (mean - x).clamp(-args.clip_change, args.clip_change)
        policy_mean, policy_std = agent.actor.distribution(units.denormalize(x0)[..., :obs_dim])
        scale = guidance_scale * (k > 1)  # at the last step the actions are only clipped
        action = refine_actions(args, action_units.denormalize(action), policy_mean, policy_std, scale)
        action = action_units.normalize(action) + std * torch.randn_like(action)  # std is 0 at the last step
        x = world_model.pin(mean + std * torch.randn_like(mean), first)
    made, reward, terminated = units.denormalize(x).split([obs_dim, 1, 1], dim=2)
    made = torch.cat([obs[:, None], made[:, 1:]], dim=1)  # to the bit
    window = {"obs": made, "action": action_units.denormalize(action), "reward": reward[..., 0]}
    return window | {"terminated": (terminated[..., 0] > 0.5).float()}


# Adapted from dawm_td3bc.py: the last policy's windows, from which nothing learns
def synthesize(args: Args, windows: Windows, world_model, agent, run: Run) -> dict[str, torch.Tensor]:
    """Windows of the trained policy as rows [M, H-1, row_dim], valid [M, H-1] until their end: what can be audited."""
    run.seed("synthesis", args.seed)
    chosen = windows.start[torch.randint(len(windows.start), (args.kept_windows,), device=run.device)]
    shape, sizes = (len(chosen), args.window - 1), row_sizes(world_model.obs_dim, windows.action.shape[1])
    rollouts = {"rows": torch.zeros(*shape, sum(sizes)), "valid": torch.zeros(shape, dtype=torch.bool)}
    with run.stage(synthesize, len(chosen), "window", keeps=rollouts, after=("world model", "agent")) as stage:
        for start in stage.over(chosen.split(args.agent_batch_size)):
            here, made = slice(stage.at, stage.at + len(start)), imagine(args, world_model, agent, windows.obs[start])
            obs, terminated = made["obs"], made["terminated"][:, :-1]
            columns = [obs[:, :-1], made["action"][:, :-1], made["reward"][:, :-1, None], obs[:, 1:]]
            rollouts["rows"][here] = torch.cat([*columns, terminated[..., None]], dim=2)
            rollouts["valid"][here] = torch.cumsum(terminated, 1) - terminated == 0
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: an actor-critic on imagined windows
# ---------------------------------------------------------------------------------------------------------------------


def elu_mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers of 256, each with a layer norm and ELU [PG code]."""
    hidden = [nn.Linear(in_dim, 256), nn.LayerNorm(256, eps=1e-3), nn.ELU()]
    return nn.Sequential(*hidden, nn.Linear(256, 256), nn.LayerNorm(256, eps=1e-3), nn.ELU(), nn.Linear(256, out_dim))


# Adapted from baselines/diamond.py: one free standard deviation, no tanh around what is drawn
class GaussianActor(nn.Module):
    """Policy: obs [..., obs_dim], dataset units -> its mean action [..., action_dim] in [-1, 1], what evaluation runs.

    One free standard deviation for each action dimension, 0.1 or more; drawn actions may leave [-1, 1] [PG code].
    """

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor, action_dim: int, initial_std: float):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = elu_mlp(len(obs_mean), action_dim)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(initial_std - 0.1)))

    def forward(self, obs):
        return torch.tanh(self.net((obs - self.obs_mean) / self.obs_std))

    def distribution(self, obs) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, both [..., action_dim]."""
        mean = self(obs)
        return mean, (self.log_std.exp() + 0.1).expand(mean.shape)

    def log_prob(self, obs, action) -> torch.Tensor:
        """Log-density of action -> [...]."""
        mean, std = self.distribution(obs)
        return (-0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def advantages(reward, terminated, value, gamma: float, gae_lambda: float) -> torch.Tensor:
    """Generalized advantages of a window's steps but for its last -> [B, H-1] [GAE].

    reward, terminated and value are of the window's states [B, H]. A terminated step keeps no value behind it.
    """
    going_on = gamma * (1 - terminated[:, :-1])
    difference, found, following = reward[:, :-1] + going_on * value[:, 1:] - value[:, :-1], [], 0.0
    for h in reversed(range(difference.shape[1])):
        following = difference[:, h] + gae_lambda * going_on[:, h] * following
        found.append(following)
    return torch.stack(found[::-1], dim=1)


# Adapted from baselines/diamond.py: advantages in whole windows, a bounded step of the actor
class ActorCritic(nn.Module):
    """Actor, critic and its slow copy, and the guidance scale e^log_guidance; `update` is one step of [PG].

    obs [N, obs_dim] gives the units of the networks, with --normalize-obs.
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        super().__init__()
        self.args = args
        mean, std = obs.mean(0), obs.std(0) + 1e-3
        if not args.normalize_obs:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.register_buffer("obs_mean", mean)
        self.register_buffer("obs_std", std)
        self.actor = GaussianActor(mean, std, action_dim, args.initial_std).to(obs.device)
        self.critic = elu_mlp(len(mean), 1).to(obs.device)
        self.critic_target = copy.deepcopy(self.critic)
        self.register_buffer("log_guidance", torch.tensor(math.log(args.guidance_start), device=obs.device))
        self.actor_parameters, self.critic_parameters = list(self.actor.parameters()), list(self.critic.parameters())
        self.actor_optimizer = torch.optim.AdamW(self.actor_parameters, lr=args.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.AdamW(self.critic_parameters, lr=args.critic_lr, fused=True)

    def update(self, window: dict[str, torch.Tensor], real_obs, real_action) -> dict[str, torch.Tensor]:
        """One step of actor and critic on a window (see imagine) and real pairs [B], and of the scale. Returns losses.

        Steps at and behind an end have no weight [PG code].
        """
        args, reward, terminated = self.args, window["reward"], window["terminated"]
        states = (window["obs"] - self.obs_mean) / self.obs_std
        with torch.no_grad():
            slow, online = list(self.critic_target.parameters()), self.critic_parameters
            torch._foreach_lerp_(slow, online, 1 - args.critic_ema)
            value = self.critic_target(states)[..., 0]
            advantage = advantages(reward, terminated, value, args.gamma, args.gae_lambda)
            target, weight = advantage + value[:, :-1], torch.cumprod(1 - terminated[:, :-1], dim=1)
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        obs, action = window["obs"][:, :-1], window["action"][:, :-1]
        critic_loss = (0.5 * (self.critic(states[:, :-1])[..., 0] - target).square() * weight).mean()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic_parameters, args.grad_clip)
        self.critic_optimizer.step()

        log_prob = self.actor.log_prob(obs, action)
        mean, std = self.actor.distribution(obs)
        entropy = std.log().sum(-1)  # but for a constant
        actor_loss = (-(advantage * log_prob + args.entropy_weight * entropy) * weight).mean()
        cloning_loss = -self.actor.log_prob(real_obs, real_action).mean()
        self.actor_optimizer.zero_grad()
        (actor_loss + args.cloning_weight * cloning_loss).backward()
        nn.utils.clip_grad_norm_(self.actor_parameters, args.grad_clip)
        self.step_actor(obs, action, log_prob.detach())
        with torch.no_grad():  # how far the imagined actions spread, in standard deviations of the policy
            spread = ((action - mean) / std).flatten(0, 1).std(0).mean()
            self.log_guidance += args.guidance_lr * (spread - 1)  # a step of SGD [PG code]
        return {
            "agent/critic_loss": critic_loss.detach(),
            "agent/value": target.mean(),
            "agent/actor_loss": actor_loss.detach(),
            "agent/cloning_loss": cloning_loss.detach(),
            "agent/action_spread": spread,
            "agent/guidance_scale": self.log_guidance.exp(),
        }

    @torch.no_grad()
    def step_actor(self, obs, action, log_prob) -> None:
        """AdamW's step, shortened where it moves log-densities of the window's actions by more than actor_step.

        [deviation] Three times in proportion, which no GPU has to wait for; PG's code searches, at up to 50 places, and
        adapts the rate.
        """
        before = [parameter.clone() for parameter in self.actor_parameters]
        self.actor_optimizer.step()
        for _ in range(3):
            moved = (self.actor.log_prob(obs, action) - log_prob).abs().mean()
            share = (self.args.actor_step / moved.clamp(min=1e-8)).clamp(max=1)
            for parameter, old in zip(self.actor_parameters, before, strict=True):
                parameter.copy_(old + share * (parameter - old))


# Adapted from dawm_td3bc.py: on windows that it imagines
def train_agent(
    args: Args, dataset: OfflineDataset, windows: Windows, world_model, evaluator: Evaluator, run: Run
) -> ActorCritic:
    """The actor-critic, each update on new windows from real states."""
    run.seed("agent", args.seed)
    agent, losses = ActorCritic(args, torch.as_tensor(dataset.obs, device=run.device), dataset.action.shape[1]), {}
    # No policy's values lie above this where rewards are like the data's: a mean beyond it means divergence.
    run.bounds["agent/value"] = np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    optimizers = agent.actor_optimizer, agent.critic_optimizer
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses), private=True
    ) as stage:
        for update in stage:
            start = windows.start[torch.randint(len(windows.start), (args.agent_batch_size,), device=run.device)]
            window = imagine(args, world_model, agent, windows.obs[start])
            losses |= agent.update(window, windows.obs[start], windows.action[start])
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method, on a fixed data set
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows = Windows(args, dataset, run.device)
    run.open(dataset, evaluator, schedule_tau=schedule_tau(args))
    world_model = train_world_model(args, windows, run)
    agent = train_agent(args, dataset, windows, world_model, evaluator, run)
    rollouts = synthesize(args, windows, world_model, agent, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, real_windows=windows, world_model=world_model,
        agent=agent, actor=agent.actor, rollouts=rollouts,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
