"""Policy-guided diffusion: windows of whole transitions from noise, pulled towards the actions of the current policy.

1. A diffusion model learns whole windows of states, actions, rewards and ends as one array, given nothing (section 3).
2. There is no model of actions (section 4 is empty): they are channels of each sample; while it is denoised, the
   gradient of the policy's log-density moves them towards what the policy would do there (section 5).
3. The set it makes is first drawn unguided, and drawn anew under the current policy every `refresh_every` updates
   while the agent learns (sections 5 and 6).
4. TD3+BC, unmodified, learns from batches of synthetic and a few real transitions (section 6).
5. The actor runs in the simulator; the diffusion model is not needed any more (section 7).

DAWM starts each rollout from a real state and action, and infers the others; here nothing is real, and the policy
itself says where the actions go, which no method with a fixed set can do.

    python -m baselines.policy_guided_diffusion --env-id local/hopper/medium-v0 --laptop    # two CPU cores
    python -m baselines.policy_guided_diffusion --env-id hopper-medium-v2                   # as in PGD's code, one GPU
    python -m baselines.policy_guided_diffusion --env-id hopper-medium-v2 --policy-guidance 0    # the unguided arm

[PGD Alg. 1]                                    here
train the trajectory model                      train_world_model, edm_loss
sample trajectories, guided by the policy       sample_windows, policy_slope
transitions for the agent                       complete_windows, synthesize
agent updates, and again                        train_agent, TD3BC.update

Keys:
[PGD]      Policy-Guided Diffusion, arXiv 2404.06356, and its code
[EDM]      Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364
[SYNTHER]  Synthetic Experience Replay, arXiv 2303.06614 (in copies from baselines/synther.py)
[TD3BC]    A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code
[DAWM]     DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has the evidence for each choice.

Symbols: EDM's sigma is the standard deviation of the noise in x0 + sigma * noise, and its sigma_data is 1, since x0 is
in standard deviations of the data; PGD's lambda is `policy_guidance` times its schedule; TD3+BC's alpha `bc_alpha`.
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
    # ---- Data: windows
    window_length: Annotated[int, (2, 10_000)] = 32  # steps of a window, which give one transition less [PGD code]
    window_stride: Count = 8  # steps between the starts of two windows [PGD code]
    gamma: Share = 0.99  # discount of the agent [PGD code]

    # ---- World model
    world_model_seed: Seed = 100  # seed of the diffusion training [unspecified]
    world_model_steps: Count = 1_000_000  # gradient updates [deviation]: 10,000 epochs in the code, weeks of one GPU
    world_model_batch_size: Count = 32  # windows per update [PGD code]
    world_model_lr: Rate = 2e-3  # Adam's highest rate: a tenth to all of it, then to 0 along a cosine [PGD code]
    world_model_holdout: Annotated[float, (0, 0.9)] = 0.05  # share of episodes for the held-out loss [PGD code]
    unet_width: Annotated[int, (16, math.inf)] = 1024  # channels of the first level; the next have twice it [PGD code]
    unet_levels: Annotated[int, (1, 10)] = 3  # each of half the length [PGD code]
    sigma_log_mean: Annotated[float, (-20, 20)] = -1.2  # mean of ln sigma in training [EDM Tab. 1]
    sigma_log_std: Amount = 1.2  # its standard deviation [EDM Tab. 1]
    ema_decay: Share = 0.995  # of the averaged weights [PGD code]
    ema_every: Count = 10  # updates between two averagings [PGD code]

    # ---- Synthesis
    synthesis_seed: Seed = 100  # seed of the last set's noise [unspecified]
    windows_per_set: Count = 8_192  # drawn anew each time (32 x 256) [PGD code]
    synthesis_batch_size: Count = 1_024  # of them drawn together; 32 in the code [unspecified]
    refresh_every: Count = 10_000  # agent updates from one set to the next [PGD code]
    sampling_steps: Count = 256  # N, each of two network evaluations but the last [PGD code]
    sigma_min: Annotated[float, (1e-6, 1e6)] = 0.002  # smallest noise level of sampling above 0 [EDM Tab. 1]
    sigma_max: Annotated[float, (1e-6, 1e6)] = 80.0  # its largest, where sampling starts [EDM Tab. 1]
    churn: Annotated[float, (0, 1e6)] = 80.0  # S_churn: how much noise each step adds anew [PGD code]; 0: none
    policy_guidance: Amount = 0.1  # of a step along the policy's gradient [unspecified]; 0, unguided, in the code
    policy_guidance_cosine: Amount = 0.3  # how much more of it in the middle of sampling [PGD code]
    guidance_normalized: bool = False  # gradient over its norm in the whole window [PGD code]
    guidance_denoised: bool = False  # gradient at the denoised window, for one more evaluation [PGD code]
    synthetic_fraction: Annotated[float, (0.01, 1)] = 0.9375  # of a batch: 240 of 256 [PGD code]

    # ---- Agent
    agent_updates: Count = 1_000_000  # critic updates; in the code as many actor updates, each after two of the critics
    agent_batch_size: Count = 256  # transitions per update [PGD code]
    agent_lr: Rate = 3e-4  # Adam's rate of actor and critics [PGD code]
    tau: Share = 0.005  # Polyak rate of the target networks [PGD code]
    policy_noise: Amount = 0.2  # std of the target action's noise, actions in [-1, 1] [TD3BC]
    noise_clip: Amount = 0.5  # bound of that noise [TD3BC]
    policy_delay: Count = 2  # critic updates per actor update [TD3BC]
    bc_alpha: Amount = 2.5  # weight of Q against behaviour cloning [TD3BC Eq. 5]


# --laptop: shorter windows, a small network, fewer updates and steps of sampling [deviation]; not the paper's scale.
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    window_length=8,
    window_stride=2,  # a quarter of the window, as at paper scale
    world_model_steps=15_000,
    world_model_batch_size=64,
    world_model_lr=1e-3,
    unet_width=64,
    unet_levels=2,
    windows_per_set=4_096,
    sampling_steps=16,
    policy_guidance=1.0,  # of fewer steps
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
)


# Adapted from dawm_td3bc.py: its own arguments
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.sigma_min >= args.sigma_max:
        raise UserError(f"--sigma-min {args.sigma_min} must lie below --sigma-max {args.sigma_max}")
    if args.unet_width % 8:
        raise UserError(f"--unet-width {args.unet_width} must be 16, 24, ...: its norms have 8 groups")
    if args.policy_guidance and (args.agent_updates <= args.refresh_every or args.sampling_steps == 1):
        raise UserError(
            f"no set would be guided: the first one is drawn behind --refresh-every {args.refresh_every} of "
            f"--agent-updates {args.agent_updates}, and the last of --sampling-steps {args.sampling_steps} is never "
            "guided; lower or raise them, or give --policy-guidance 0"
        )
    shortest = 2 ** (args.unet_levels - 1)
    if args.window_length < shortest:
        raise UserError(
            f"--window-length {args.window_length} is below {shortest}, which a U-Net of --unet-levels "
            f"{args.unet_levels} halves to 1; raise the one or lower the other"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: episodes to windows
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


# Adapted from dawm_td3bc.py: steps with their actions, at strided starts
class Windows:
    """Windows of window_length steps, which no episode's end cuts; gathered when asked for.

    `tokens` [N + E, obs_dim + action_dim + 2]: state, arctanh of the action, reward, end. `train` and `held_out` are
    the rows that windows start from, and those in other episodes: every window_stride-th that fits, each episode's
    first, and the last of a fallen episode. [deviation] That one goes on for one step, with the state where the robot
    lies, action and reward 0 and the end told again: the last step of a window gives no transition, and in the code,
    where it is the fall, no synthetic transition ever ends an episode. UserError if no episode is long enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        final, fell = last + 1 + np.arange(len(last)), dataset.terminated[last].astype(bool)  # rows of the last states
        first = np.append(0, final[:-1] + 1)
        latest = np.where(fell, final, final - 2) - args.window_length + 1  # no window ends in a timeout [PGD code]
        obs = np.insert(dataset.obs, last + 1, dataset.next_obs[last], axis=0)
        action = np.insert(np.arctanh(dataset.action.clip(-0.999, 0.999)), last + 1, 0, axis=0)  # [PGD code]
        columns = dataset.reward[:, None], dataset.terminated[:, None].astype(np.float32)
        reward, ends = (np.insert(x, last + 1, 0, axis=0) for x in columns)
        ends[final[fell]] = 1
        self.tokens = torch.as_tensor(np.concatenate([obs, action, reward, ends], axis=1, dtype=np.float32)).to(device)
        episode = np.repeat(np.arange(len(last)), dataset.lengths + 1)  # of each row
        rows = np.arange(len(episode))
        fits = rows <= latest[episode]
        if not fits.any():
            raise UserError(
                f"--window-length {args.window_length} needs {args.window_length + 1} steps in a row where none falls, "
                f"but the longest episode has {dataset.lengths.max()}; lower it"
            )
        starts = np.zeros(len(rows), bool)
        starts[rows[fits][:: args.window_stride]] = True
        starts |= fits & (np.isin(rows, first) | (np.isin(rows, latest) & fell[episode]))
        self.offsets = torch.arange(args.window_length, device=device)
        self.train, self.held_out = self.split(args, starts, episode, device)

    def split(self, args: Args, starts: np.ndarray, episode: np.ndarray, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows marked in `starts`: to train on, and those in a random share of their episodes."""
        episodes = np.unique(episode[starts])
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(args.world_model_seed)).numpy()
        count = min(math.ceil(args.world_model_holdout * len(episodes)), len(episodes) - 1)  # one is left to train on
        held_out = np.isin(episode, episodes[order[:count]])
        return tuple(torch.as_tensor((starts & x).nonzero()[0], device=device) for x in (~held_out, held_out))

    def rows(self, start: torch.Tensor) -> torch.Tensor:
        """Rows of tokens that make up the windows from rows `start` [B] -> [B, window_length]."""
        return start[:, None] + self.offsets


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: EDM's network, loss, noise levels, sampler
# ---------------------------------------------------------------------------------------------------------------------
# A network F sees x0 + sigma * noise, scaled, and `denoise` makes the expected x0 of what it says. All of it works on x
# [B, ...] of any shape whose entries have standard deviation 1 over the data (EDM's sigma_data).


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


class ConvNorm(nn.Module):
    """Convolution over time that keeps the length, the embedded noise level, group norm and ReLU [PGD code].

    x [B, in, L] and, unless embed_dim is 0, embedding [B, embed_dim] -> [B, out, L].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, embed_dim: int = 0):
        super().__init__()
        self.padding = (kernel - 1) // 2, kernel // 2
        self.conv, self.norm = nn.Conv1d(in_channels, out_channels, kernel), nn.GroupNorm(8, out_channels)
        self.condition = nn.Linear(embed_dim, out_channels) if embed_dim else None

    def forward(self, x, embedding=None):
        h = self.conv(F.pad(x, self.padding))
        if self.condition is not None:
            h = h + self.condition(embedding)[..., None]
        return F.relu(self.norm(h))


class PoolingUNet(nn.Module):
    """EDM's network F of a window x [B, L, channels] and noise_level [B] -> [B, L, channels] [PGD code].

    Down by pooling, up by repeating; each level has twice the channels of the one above. L is 2^(levels - 1) or more.
    177,619,984 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, width: int, levels: int):
        super().__init__()
        half, sizes = width // 8, [width * 2**level for level in range(levels)]
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1)))
        self.embed = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for above, size in itertools.pairwise([channels, *sizes]):
            self.down.append(nn.ModuleList([ConvNorm(above, size, 3, width), ConvNorm(size, size, 3)]))
        for size, below in reversed([*itertools.pairwise(sizes)]):
            lengthen = ConvNorm(below, size, 2, width)
            self.up.append(nn.ModuleList([lengthen, ConvNorm(2 * size, size, 3), ConvNorm(size, size, 3)]))
        self.head = nn.Conv1d(width, channels, 1)

    def forward(self, x, noise_level):
        angle = noise_level[:, None] * self.frequencies
        embedding = self.embed(torch.cat([angle.sin(), angle.cos()], dim=1))
        x, skips = x.transpose(1, 2), []
        for level, (block1, block2) in enumerate(self.down):
            x = block2(block1(F.max_pool1d(x, 2) if level else x, embedding))
            skips.append(x)
        skips.pop()
        for lengthen, block1, block2 in self.up:
            x = lengthen(F.interpolate(x, skips[-1].shape[2]), embedding)
            x = block2(block1(torch.cat([x, skips.pop()], dim=1)))
        return self.head(x).transpose(1, 2)


# Copied from baselines/synther.py
def denoise(network: nn.Module, x: torch.Tensor, sigma: torch.Tensor, *condition) -> torch.Tensor:
    """Expected x0 of x = x0 + sigma * noise, both [B, ...], sigma [B] [EDM Eq. 7, Tab. 1].

    With s = sigma^2 + 1: c_skip = 1 / s, c_out = sigma / sqrt(s), c_in = 1 / sqrt(s), c_noise = ln(sigma) / 4.
    """
    wide = sigma.view(-1, *[1] * (x.dim() - 1))
    root = (wide.square() + 1).sqrt()
    return x / root.square() + wide / root * network(x / root, sigma.log() / 4, *condition)


# Copied from baselines/synther.py
def draw_sigma(args: Args, count: int, device: torch.device) -> torch.Tensor:
    """Noise levels [count] to train on: ln sigma is normal [EDM Tab. 1]."""
    return (args.sigma_log_mean + args.sigma_log_std * torch.randn(count, device=device)).exp()


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


# Adapted from dawm_td3bc.py: a whole window, given nothing
class WorldModel(nn.Module):
    """p(states, actions, rewards, ends) [PGD]: a network and the units it works in, standard deviations of all four.

    `network` has the averaged weights [PGD code]; training moves a copy. An action's unit is that of its arctanh.
    """

    def __init__(self, args: Args, tokens: torch.Tensor, obs_dim: int):
        super().__init__()
        self.sizes = [obs_dim, tokens.shape[1] - obs_dim - 2, 1, 1]
        self.units = Standardizer(tokens)
        self.network = fast.on_cpu(PoolingUNet(tokens.shape[1], args.unet_width, args.unet_levels), args.compile)


def learning_rate(args: Args, step: int) -> float:
    """Of Adam at a step: from a tenth up to world_model_lr in the first tenth, then to 0 along a cosine [PGD code]."""
    warm = args.world_model_steps / 10
    if step <= warm:
        return args.world_model_lr * (0.1 + 0.9 * step / warm)
    return args.world_model_lr * (1 + math.cos(math.pi * (step - warm) / (args.world_model_steps - warm))) / 2


# Adapted from dawm_td3bc.py: EDM's loss on windows, with no condition
def train_world_model(args: Args, windows: Windows, obs_dim: int, run: Run) -> WorldModel:
    """Fit the network on windows by EDM's loss; the returned model has the averaged weights."""
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, windows.tokens, obs_dim).to(run.device)
    network = fast.on_cpu(copy.deepcopy(world_model.network), args.compile)
    parameters, averaged = list(network.parameters()), list(world_model.network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    normalized = world_model.units.normalize(windows.tokens)  # once for all

    def loss_of(network, start):
        return edm_loss(network, normalized[windows.rows(start)], draw_sigma(args, len(start), run.device))

    @torch.no_grad()
    def held_out_loss():
        with torch.random.fork_rng():  # the same windows and noise every time, and none of the training's
            torch.manual_seed(args.world_model_seed)
            index = torch.randint(len(windows.held_out), (512,), device=run.device)
            return loss_of(world_model.network, windows.held_out[index])

    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=world_model, saves=(network, optimizer)
    ) as stage:
        for step in stage:
            optimizer.param_groups[0]["lr"] = learning_rate(args, step)
            index = torch.randint(len(windows.train), (args.world_model_batch_size,), device=run.device)
            loss = loss_of(network, windows.train[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.ema_every == 0:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
                if len(windows.held_out):
                    run.log(step, {"world_model/val_loss": held_out_loss()})
    return world_model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. Each sample has its actions.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: noise to windows, guided by the policy, to transitions
# ---------------------------------------------------------------------------------------------------------------------


def policy_slope(args: Args, world_model: WorldModel, policy: nn.Module, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gradient of the sum over steps of log N(action; policy(state), 1) by the action channels of x [B, L, channels].

    A deterministic policy counts as a Gaussian of variance 1 around its action [PGD code]. The channels hold the
    arctanh of actions in standard deviations, so that the gradient passes through both. States stay as they are.
    """
    if args.guidance_denoised:
        x = denoise(world_model.network, x, torch.full((len(x),), sigma, device=x.device))
    obs, latent, _, _ = world_model.units.denormalize(x).split(world_model.sizes, dim=-1)
    action, std = torch.tanh(latent), world_model.units.std.split(world_model.sizes)[1]
    slope = (policy(obs) - action) * (1 - action.square()) * std
    if args.guidance_normalized:
        slope = slope / slope.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None]
    return slope


@torch.no_grad()
def sample_windows(args: Args, world_model: WorldModel, policy: nn.Module | None, count: int) -> torch.Tensor:
    """Windows [count, window_length, channels] from noise, dataset units; without a policy they are not guided.

    Before each step of EDM but the last, actions move along the policy's slope, less and less [PGD code]. [deviation]
    EDM's step starts from the noise that it has added; in the code its first half starts from before.
    """
    units, obs_dim, steps = world_model.units, world_model.sizes[0], args.sampling_steps
    sigmas = karras_sigmas(steps, args.sigma_min, args.sigma_max)
    x = args.sigma_max * torch.randn(count, args.window_length, len(units.mean), device=units.mean.device)
    for i, pair in enumerate(itertools.pairwise(sigmas)):
        if policy is not None and i < steps - 1:
            weight = 1 - i / steps + args.policy_guidance_cosine * math.sin(math.pi * (i + 1) / steps)
            slope = policy_slope(args, world_model, policy, x, pair[0])
            x = x + args.policy_guidance * weight * F.pad(slope, (obs_dim, 2))
        x = sample_edm(world_model.network, x, list(pair), churn=args.churn / steps)
    return units.denormalize(x)


def complete_windows(world_model: WorldModel, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, L, channels], dataset units, as rows [B, L - 1, row_dim] and valid [B, L - 1], false after an end."""
    obs, latent, reward, end = windows.split(world_model.sizes, dim=-1)
    terminated = (end > 0.5).float()  # [PGD code]
    rows = torch.cat([obs, torch.tanh(latent), reward, obs.roll(-1, 1), terminated], dim=-1)[:, :-1]
    ended = terminated[:, :-1, 0].cumsum(1) - terminated[:, :-1, 0]
    return rows, ended == 0


# Adapted from dawm_td3bc.py: whole windows, from nothing but the policy
def complete_rollouts(args: Args, world_model: WorldModel, policy: nn.Module | None, count: int):
    """`count` new windows as rows [count, L - 1, row_dim] and valid [count, L - 1]."""
    return complete_windows(world_model, sample_windows(args, world_model, policy, count))


# Adapted from dawm_td3bc.py: the set under the last policy
def synthesize(args: Args, world_model: WorldModel, policy: nn.Module, run: Run) -> dict[str, torch.Tensor]:
    """The set that the agent would learn from next: rows [M, L - 1, row_dim], valid [M, L - 1], in the CPU's memory.

    No agent learns from it; it shows what the guided model makes, to whoever audits or exports the run.
    """
    run.seed("synthesis", args.synthesis_seed)
    shape, sizes = (args.windows_per_set, args.window_length - 1), row_sizes(*world_model.sizes[:2])
    rollouts = {"rows": torch.zeros(*shape, sum(sizes)), "valid": torch.zeros(shape, dtype=torch.bool)}
    numbers = torch.arange(args.windows_per_set)
    with run.stage(synthesize, len(numbers), "window", keeps=rollouts, private=True) as stage:
        for here in stage.over(numbers.split(args.synthesis_batch_size)):
            rows, valid = complete_rollouts(args, world_model, policy, len(here))
            rollouts["rows"][here], rollouts["valid"][here] = rows.cpu(), valid.cpu()
    run.log(args.agent_updates, describe(rollouts["rows"], rollouts["valid"], sizes))
    return rollouts


def describe(rows: torch.Tensor, valid: torch.Tensor, sizes: list[int]) -> dict[str, torch.Tensor]:
    """What is logged of a set."""
    _, action, reward, _, terminated = rows.split(sizes, dim=-1)
    return {
        "synthesis/transitions": valid.sum(),
        "synthesis/mean_reward": reward[valid].mean(),
        "synthesis/action_clip_fraction": (action.abs() > 0.999).float().mean(),
        "synthesis/fall_fraction": terminated.amax(1).mean(),
    }


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


# Adapted from dawm_td3bc.py: the policy in training guides each new set
def train_agent(args: Args, dataset: OfflineDataset, world_model: WorldModel, evaluator: Evaluator, run: Run) -> TD3BC:
    """TD3+BC on real rows and on a set that is drawn anew under the current policy every refresh_every updates."""
    run.seed("agent", args.seed)
    real = real_transitions(dataset, run.device)
    agent = TD3BC(args, real[:, : dataset.obs.shape[1]], dataset.action.shape[1])
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    optimizers, losses, now = (agent.actor_optimizer, agent.qf_optimizer), {}, {}
    batches = torch.arange(args.windows_per_set).split(args.synthesis_batch_size)
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses, now), private=True
    ) as stage:
        for update in stage:
            if (update - 1) % args.refresh_every == 0:
                policy = agent.actor if update > 1 else None  # the first set is not guided [PGD code]
                with run.timed("synthesis"):
                    made = [complete_rollouts(args, world_model, policy, len(batch)) for batch in batches]
                rows, valid = (torch.cat(parts) for parts in zip(*made, strict=True))
                now["rows"] = rows[valid]
                run.log(update, describe(rows, valid, agent.row_sizes))
            losses |= agent.update(draw_batch(args, real, now["rows"]), update_actor=update % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [PGD]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows = Windows(args, dataset, run.device)
    run.open(dataset, evaluator)
    world_model = train_world_model(args, windows, dataset.obs.shape[1], run)
    agent = train_agent(args, dataset, world_model, evaluator, run)
    rollouts = synthesize(args, world_model, agent.actor, run)
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
