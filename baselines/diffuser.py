"""Diffuser: a diffusion model plans states and actions together at every environment step, led by a value's gradient.

1. A diffusion model learns windows of actions and states as one array, given the first state alone (section 3).
2. A second network learns, from windows noised like those of the diffusion, the return that follows from them; while
   the first denoises, the second one's gradient moves each plan towards more return (section 3).
3. Actions are channels of the plan: no inverse dynamics, no rewards in the array, no transition is ever made
   (sections 4 and 5 are empty).
4. The diffusion runs at every environment step: 64 plans are sampled from the current state, the one of the highest
   value gives its first action, and all else is thrown away (section 6).
5. The agent is this planner; all evaluation episodes are planned as one batch in the simulator (section 6).

DAWM takes actions from inverse dynamics and trains a policy; Diffuser generates the actions and has no policy.

    python -m baselines.diffuser --env-id local/hopper/medium-v0 --laptop      # two CPU cores
    python -m baselines.diffuser --env-id hopper-medium-v2                     # as in Diffuser's code, one GPU
    python -m baselines.diffuser --env-id hopper-medium-v2 --guide-scale 0     # no guidance: the best of 64 by value

Another --guide-scale, --guide-steps, --guide-stop or --plans finds the trained models and costs one evaluation.

[DIFFUSER Alg. 1]                               here
a trained noise model                           train_world_model, Diffuser.loss
a trained return model J                        train_value, Diffuser.value_loss
observe, draw the first noise                   Planner, sample_plans
guide by the gradient of J, denoise a step      sample_plans, Diffuser.guide
put the known state into the plan               Diffuser.pin
execute the plan's first action                 Planner

Keys:
[DIFFUSER]  Planning with Diffusion for Flexible Behavior Synthesis, arXiv 2205.09991v2, and its code
[DAWM]      DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]       Diffusion World Model, arXiv 2402.03570 (in copies from dawm_td3bc.py)
[DD]        Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[IDDPM]     Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has where Diffuser's paper and code disagree, and the evidence for each choice.

Symbols: Diffuser writes i for the diffusion step and t for environment time, here `k` and `step`; its T is
`plan_horizon` (tokens, the current state included); its alpha `guide_scale`; its J `Diffuser.expected_return`; its
Sigma^i the squared `std` of posterior_coefficients.
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
from common.evaluation import Evaluator, score_report
from common.run import Run

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Args(RunArgs):
    seed: Seed = 0  # seed of training and planning [unspecified]; evaluated once, so that --eval-every says nothing

    # ---- Data: windows and returns
    plan_horizon: Annotated[int, (2, 10_000)] | None = None  # tokens of a plan, the current one included; by TASKS
    gamma: Share = 0.997  # discount of the returns that are learned [DIFFUSER code, of its planner]
    termination_penalty: Annotated[float, (0, 1e6)] = 100.0  # off a fallen episode's last reward [DIFFUSER code]

    # ---- World model: denoiser and value
    world_model_steps: Count = 1_000_000  # gradient updates of the denoiser [DIFFUSER code]; 500,000 in the paper
    world_model_batch_size: Count = 64  # windows per update of both [DIFFUSER code] (2 x 32, accumulated)
    world_model_lr: Rate = 2e-4  # Adam's rate for both [DIFFUSER code]; 4e-5 in the paper
    world_model_holdout: Annotated[float, (0, 0.9)] = 0.05  # share of episodes for the held-out losses [unspecified]
    value_steps: Count = 200_000  # gradient updates of the value [DIFFUSER code]
    unet_width: Annotated[int, (8, math.inf)] = 32  # channels of the first level [DIFFUSER code]
    unet_multipliers: Annotated[tuple[int, ...], (1, math.inf)] | None = None  # of each level; by TASKS
    diffusion_steps: Count = 20  # K, all of them sampled [DIFFUSER code]
    action_weight: Amount = 10.0  # of the first action in the loss; all else has 1 [DIFFUSER code]
    ema_decay: Share = 0.995  # of the averaged weights [DIFFUSER code]
    ema_every: Count = 10  # updates between two averagings [DIFFUSER code]
    ema_start: Annotated[int, (0, math.inf)] = 2_000  # updates with a plain copy instead [DIFFUSER code]

    # ---- Planner
    plans: Count = 64  # sampled at every environment step [DIFFUSER code]
    guide_steps: Annotated[int, (0, 100)] = 2  # gradient steps before each denoising step [DIFFUSER code]
    guide_scale: Annotated[float, (0, 1e6)] | None = None  # of a gradient step, per unit of return; by TASKS
    guide_stop: Annotated[int, (0, math.inf)] | None = None  # the last so many denoising steps are not guided; by TASKS


# --laptop: the same method with a smaller U-Net and fewer updates, [deviation] throughout; not the paper's scale. K as
# in dawm_td3bc.py, the horizon of Diffuser's HalfCheetah, and as many plans as can be sampled 1,000 times in minutes.
LAPTOP = dict(
    plan_horizon=4,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    world_model_steps=15_000,
    world_model_lr=1e-3,
    value_steps=5_000,
    unet_width=32,
    unet_multipliers=(1, 2),
    diffusion_steps=5,
    plans=16,
    guide_steps=1,
    guide_stop=2,
)

# Plan and network of the paper's tasks, scale and end of guidance [DIFFUSER code]. Any other data set: HALFCHEETAH's or
# HOPPER's, with GUIDE_SCALES in the place of the third, in standard deviations of the data's returns instead of units
# of reward [unspecified]: on the local medium sets 0.1 is 24 of them (Hopper) and 31 (Walker2d), 0.001 is 0.4.
HOPPER = 32, (1, 2, 4, 8), 0.1, 2
HALFCHEETAH = 4, (1, 4, 8), 0.001, 4  # [deviation] its code has linear attention in the denoiser, which 4 tokens lack
GUIDE_SCALES = {HOPPER: 30, HALFCHEETAH: 0.4}
TASKS = {
    "hopper-medium-v2": HOPPER,
    "hopper-medium-replay-v2": HOPPER,
    "hopper-medium-expert-v2": (*HOPPER[:2], 0.0001, 4),
    "walker2d-medium-v2": HOPPER,
    "walker2d-medium-replay-v2": HOPPER,
    "walker2d-medium-expert-v2": HOPPER,
    "halfcheetah-medium-v2": HALFCHEETAH,
    "halfcheetah-medium-replay-v2": HALFCHEETAH,
    "halfcheetah-medium-expert-v2": HALFCHEETAH,
}


def usual(args: Args) -> tuple:
    """The values of the task that a data set outside TASKS is most like."""
    return HALFCHEETAH if "halfcheetah" in args.env_id.lower() else HOPPER


def fill_in(args: Args) -> None:
    """The task's own values for what is not given; guide_scale stays None where only the data tell it."""
    task = TASKS.get(args.env_id, (*usual(args)[:2], None, usual(args)[3]))
    for name, value in zip(("plan_horizon", "unet_multipliers", "guide_scale", "guide_stop"), task, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)


# Adapted from dawm_td3bc.py: plans instead of rollouts, a value's network beside the denoiser
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded; fills in the task's."""
    fill_in(args)
    if args.guide_stop > args.diffusion_steps:
        raise UserError(f"--guide-stop {args.guide_stop} is above --diffusion-steps {args.diffusion_steps}")
    if args.unet_width % 8 or not args.unet_multipliers:
        raise UserError(f"--unet-width {args.unet_width} must be 8, 16, ..., with one of --unet-multipliers or more")
    deepest = args.unet_width * args.unet_multipliers[-1]
    if deepest % 32:
        raise UserError(
            f"--unet-width {args.unet_width} times the last of --unet-multipliers, {deepest}, must be a multiple of "
            "32: the value's network quarters these channels, in groups of 8"
        )
    if deepest == 32 and min(args.plans, args.world_model_batch_size) == 1:
        raise UserError("a batch of one needs 64 channels or more at the last level; raise --unet-width or --plans")
    unit = 2 ** (len(args.unet_multipliers) - 1)
    if args.plan_horizon % unit:
        raise UserError(
            f"--plan-horizon {args.plan_horizon} must be a multiple of {unit}, since a U-Net of "
            f"{len(args.unet_multipliers)} levels halves it {len(args.unet_multipliers) - 1} times; "
            f"take {math.ceil(args.plan_horizon / unit) * unit}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: episodes to windows, returns
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
def discounted_return_to_go(reward: np.ndarray, lengths: np.ndarray, gamma: float) -> np.ndarray:
    """Rewards [N] summed from each step to its episode's end, discounted -> [N]. Nothing is added at a time limit."""
    return_to_go, end = np.zeros(len(reward)), 0
    for length in lengths:
        start, end, following = end, end + length, 0.0
        for row in range(end - 1, start - 1, -1):
            following = reward[row] + gamma * following
            return_to_go[row] = following
    return return_to_go


# Adapted from dawm_td3bc.py: actions and states as one array, returns as they are
class Windows:
    """All windows of plan_horizon tokens, one for each real pair (state, action); gathered when asked for.

    `tokens` [N + E, action_dim + obs_dim]: an action and the state it was taken in. `train` and `held_out` are the
    windows to learn from, and those in other episodes. No window crosses an episode's end. A fallen episode goes on
    with its last state and the action 0, where the simulator would stop: else no window would start near a fall, and
    the model could not plan there. UserError if no episode is long enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        self.number_states(dataset)
        self.label_returns(args, dataset)
        fits = self.start + args.plan_horizon - 1 < self.final  # the last token's action is real too
        if not fits.any():
            raise UserError(
                f"--plan-horizon {args.plan_horizon} needs {args.plan_horizon} transitions in a row, but the "
                f"longest episode has {dataset.lengths.max()}; lower it"
            )
        self.usable = fits | dataset.terminated[self.last][self.episode]
        self.action_dim = dataset.action.shape[1]
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.as_tensor(value, device=device))
        self.tokens = torch.cat([self.action, self.obs], dim=1)
        self.offsets = torch.arange(args.plan_horizon, device=device)
        self.train, self.held_out = self.split(self.usable, args.world_model_holdout, args.seed)

    def number_states(self, dataset: OfflineDataset) -> None:
        """obs [N + E, obs_dim]: T transitions have T+1 states, so pair i of episode e is row i + e. `start`
        and `final` [N] are the rows of a pair's own state and of its episode's last one. action [N + E, action_dim],
        in the same rows, is 0 in an episode's last one.
        """
        self.episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        self.last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        self.obs = np.insert(dataset.obs, self.last + 1, dataset.next_obs[self.last], axis=0)
        self.action = np.insert(dataset.action, self.last + 1, 0, axis=0)
        self.start = np.arange(len(self.episode)) + self.episode
        self.final = (self.last + 1 + np.arange(len(self.last)))[self.episode]

    def label_returns(self, args: Args, dataset: OfflineDataset) -> None:
        """return_to_go [N] from a window's first step to the end of its episode, in units of reward [DIFFUSER code]."""
        reward = dataset.reward - args.termination_penalty * dataset.terminated
        self.return_to_go = discounted_return_to_go(reward, dataset.lengths, args.gamma).astype(np.float32)

    def split(self, pairs: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs marked in `pairs` [N]: to train on, and those in a random share of their episodes."""
        episodes = self.episode[pairs].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
        count = min(math.ceil(share * len(episodes)), len(episodes) - 1)  # something must be left to train on
        held_out = torch.isin(self.episode, episodes[order[:count]])
        return (pairs & ~held_out).nonzero()[:, 0], (pairs & held_out).nonzero()[:, 0]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of tokens that make up the windows `index` [B] -> [B, plan_horizon]."""
        return torch.minimum(self.start[index, None] + self.offsets, self.final[index, None])


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
# 3. World model: schedule, denoiser, value, losses, sampler
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
def cosine_alpha_bar(num_diffusion_steps: int) -> torch.Tensor:
    """Cumulative product of 1 - noise_beta for k = 0..K -> [K+1], float64, alpha_bar[0] = 1 [IDDPM Eq. 17]."""
    k = torch.arange(num_diffusion_steps + 1, dtype=torch.float64) / num_diffusion_steps
    f = torch.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2
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


# Copied from dawm_td3bc.py
class ResidualBlock(nn.Module):
    """Two convolutions over time with group norm and Mish; the condition is added between them [DD code]."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(in_channels, out_channels, 5, padding=2), nn.GroupNorm(8, out_channels)
        self.condition = nn.Linear(embed_dim, out_channels)
        self.conv2, self.norm2 = nn.Conv1d(out_channels, out_channels, 5, padding=2), nn.GroupNorm(8, out_channels)
        self.skip = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.mish = nn.Mish()

    def forward(self, x, embedding):  # [B, in, L], [B, embed_dim] -> [B, out, L]
        h = self.mish(self.norm1(self.conv1(x))) + self.condition(embedding)[..., None]
        return self.mish(self.norm2(self.conv2(h))) + self.skip(x)


class StepEmbedding(nn.Module):
    """Sines and cosines of the diffusion step k [B], and two layers -> [B, width] [DIFFUSER code]."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1)))
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))

    def forward(self, k):
        angle = k[:, None] * self.frequencies
        return self.net(torch.cat([angle.sin(), angle.cos()], 1))


# Adapted from dawm_td3bc.py: no condition but the diffusion step, and lengths that divide
class TemporalUNet(nn.Module):
    """Denoiser of a window x [B, L, channels], given diffusion step k [B] -> [B, L, channels] [DIFFUSER code].

    L is a multiple of 2^(levels - 1). 3,956,302 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()
        self.embed_k, self.mish = StepEmbedding(width), nn.Mish()
        sizes = [channels, *(width * m for m in multipliers)]
        levels = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.down = nn.ModuleList()
        for level, (i, o) in enumerate(levels):
            blocks = [ResidualBlock(i, o, width), ResidualBlock(o, o, width)]
            shorten = nn.Conv1d(o, o, 3, stride=2, padding=1) if level < len(levels) - 1 else nn.Identity()
            self.down.append(nn.ModuleList([*blocks, shorten]))
        self.middle = nn.ModuleList([ResidualBlock(sizes[-1], sizes[-1], width) for _ in range(2)])
        self.up = nn.ModuleList()
        for i, o in reversed(levels[1:]):
            blocks = [ResidualBlock(2 * o, i, width), ResidualBlock(i, i, width)]
            self.up.append(nn.ModuleList([*blocks, nn.ConvTranspose1d(i, i, 4, stride=2, padding=1)]))
        self.head_conv, self.head_norm = nn.Conv1d(sizes[1], width, 5, padding=2), nn.GroupNorm(8, width)
        self.head = nn.Conv1d(width, channels, 1)

    def forward(self, x, k):
        embedding = self.mish(self.embed_k(k))
        x, skips = x.transpose(1, 2), []  # [B, channels, L]
        for block1, block2, shorten in self.down:
            x = block2(block1(x, embedding), embedding)
            skips.append(x)
            x = shorten(x)  # [B, width * multiplier, L / 2]; the last level stays
        for block in self.middle:
            x = block(x, embedding)
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = lengthen(block2(block1(x, embedding), embedding))
        return self.head(self.mish(self.head_norm(self.head_conv(x)))).transpose(1, 2)


class ReturnNetwork(nn.Module):
    """The return that follows from a noised window x [B, L, channels] at diffusion step k [B] -> [B], in standard
    deviations of the data's.

    The way down of the U-Net, two narrower blocks, and a head that sees k again [DIFFUSER code].
    2,294,817 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, length: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()
        self.embed_k, self.mish = StepEmbedding(width), nn.Mish()
        sizes = [channels, *(width * m for m in multipliers)]
        deepest, blocks = sizes[-1], []
        for i, o in zip(sizes[:-1], sizes[1:], strict=True):
            blocks.append([ResidualBlock(i, o, width), ResidualBlock(o, o, width)])
        blocks += [[ResidualBlock(deepest, deepest // 2, width)], [ResidualBlock(deepest // 2, deepest // 4, width)]]
        outs = [*sizes[1:], deepest // 2, deepest // 4]
        shorten = [nn.Conv1d(o, o, 3, stride=2, padding=1) for o in outs]
        self.blocks, self.shorten = nn.ModuleList(map(nn.ModuleList, blocks)), nn.ModuleList(shorten)
        for _ in outs:
            length = math.ceil(length / 2)
        flat = deepest // 4 * length
        self.head = nn.Sequential(nn.Linear(flat + width, flat // 2), nn.Mish(), nn.Linear(flat // 2, 1))

    def forward(self, x, k):
        embedding, x = self.embed_k(k), x.transpose(1, 2)
        for blocks, shorten in zip(self.blocks, self.shorten, strict=True):
            for block in blocks:
                x = block(x, self.mish(embedding))
            x = shorten(x)
        return self.head(torch.cat([x.flatten(1), embedding], dim=1))[:, 0]


class Diffuser(nn.Module):
    """p(actions, next states | state) and the return of a noised plan [DIFFUSER], with the units they work in.

    A plan x [B, plan_horizon, action_dim + obs_dim] is normalised, actions first. Its first state is known, not
    generated: it is put back before every network call.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, self.action_dim, channels = args, windows.action_dim, windows.tokens.shape[1]
        self.units = Normalizer(windows.tokens)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.diffusion_steps).float())
        self.register_buffer("return_mean", windows.return_to_go.mean())
        self.register_buffer("return_std", windows.return_to_go.std() + 1e-6)
        weight = torch.ones(args.plan_horizon, channels)
        weight[0, : self.action_dim] = args.action_weight
        self.register_buffer("weight", weight)
        sizes = args.unet_width, args.unet_multipliers
        self.denoiser = fast.on_cpu(TemporalUNet(channels, *sizes), args.compile)
        self.value = fast.on_cpu(ReturnNetwork(channels, args.plan_horizon, *sizes))

    def first(self, obs: torch.Tensor) -> torch.Tensor:
        """States [B, obs_dim], dataset units, as a plan has them."""
        return self.units.normalize(F.pad(obs, (self.action_dim, 0)))[:, self.action_dim :]

    def pin(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """x with its first states [B, obs_dim] put back."""
        token = torch.cat([x[:, 0, : self.action_dim], first], dim=1)
        return torch.cat([token[:, None], x[:, 1:]], dim=1)

    def q_sample(self, x0: torch.Tensor, k: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noised window x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise [DIFFUSER], k [B] in 1..K."""
        alpha_bar = self.alpha_bar[k][:, None, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def noised(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 at random diffusion steps, the first state in its place, and the steps."""
        k = torch.randint(1, len(self.alpha_bar), (len(x0),), device=x0.device)
        return self.pin(self.q_sample(x0, k, torch.randn_like(x0)), x0[:, 0, self.action_dim :]), k

    def loss(self, denoiser: nn.Module, x0: torch.Tensor, return_to_go: torch.Tensor) -> torch.Tensor:
        """Mean squared error of x0, the first action's times action_weight, the known first state's 0 [DIFFUSER code].

        [deviation] The paper predicts noise, its code x0. return_to_go has no part in it.
        """
        prediction = self.pin(denoiser(*self.noised(x0)), x0[:, 0, self.action_dim :])
        return ((prediction - x0).square() * self.weight).mean()

    def value_loss(self, value: nn.Module, x0: torch.Tensor, return_to_go: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the return, over the variance of the data's: 1 for a network that sees nothing."""
        label = (return_to_go - self.return_mean) / self.return_std
        return (value(*self.noised(x0)) - label).square().mean()

    def expected_return(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """J: the return, in units of reward, of noised plans x at steps k -> [B]."""
        return self.return_mean + self.return_std * self.value(x, k)

    @torch.enable_grad()
    def guide(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Gradient of J by the normalised plan, like x."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.expected_return(x, k).sum(), x)[0]


# Adapted from baselines/decision_diffuser.py: actions in the plan, a value's gradient instead of free guidance
@torch.no_grad()
def sample_plans(args: Args, model: Diffuser, first: torch.Tensor, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans from first states [B, obs_dim], normalised, and the return of each [B] [DIFFUSER Alg. 1].

    noise() gives a standard normal tensor like the plans. The return is that of the plan before its last denoising
    step, by which the code sorts. No clamp: units are standard deviations [DIFFUSER code].
    """
    scale = GUIDE_SCALES[usual(args)] / model.return_std if args.guide_scale is None else args.guide_scale
    steps = range(1, args.diffusion_steps + 1)
    coefficients = posterior_coefficients(cosine_alpha_bar(args.diffusion_steps), [*steps])
    x = noise()
    for k, (weight_x0, weight_x_k, std) in reversed([*zip(steps, coefficients, strict=True)]):
        x, k_batch = model.pin(x, first), torch.full((len(first),), k, device=first.device)
        for _ in range(args.guide_steps if k > args.guide_stop else 0):
            x = model.pin(x + scale * std**2 * model.guide(x, k_batch), first)  # Sigma times the gradient
        if k == 1:
            value = model.expected_return(x, k_batch)
        x = weight_x0 * model.denoiser(x, k_batch) + weight_x_k * x + std * noise()  # std is 0 at the last step
    return model.pin(x, first), value


def fit(args: Args, windows: Windows, model: Diffuser, part: str, run: Run, stage_of, steps: int) -> None:
    """Train model's `part`, "denoiser" or "value", to its averaged weights; `stage_of` is the stage's function."""
    network, loss, name = getattr(model, part), *{
        "denoiser": (model.loss, "world_model"), "value": (model.value_loss, "value")
    }[part]  # fmt: skip
    run.seed(name, args.seed)
    learner = fast.on_cpu(copy.deepcopy(network).train(), args.compile and part == "denoiser")  # a copy is not compiled
    parameters, averaged = list(learner.parameters()), list(network.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    normalized = model.units.normalize(windows.tokens)  # once for all

    def loss_of(network, index):
        return loss(network, normalized[windows.rows(index)], windows.return_to_go[index])

    @torch.no_grad()
    def held_out_loss():
        with torch.random.fork_rng():  # the same windows and noise every time, and none of the training's
            torch.manual_seed(args.seed)
            index = torch.randint(len(windows.held_out), (512,), device=run.device)
            return loss_of(network, windows.held_out[index])

    with run.stage(stage_of, steps, "update", keeps=network, saves=(learner, optimizer)) as stage:
        for step in stage:
            index = torch.randint(len(windows.train), (args.world_model_batch_size,), device=run.device)
            value = loss_of(learner, windows.train[index])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if step % args.ema_every == 0 or step == steps:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay if step > args.ema_start else 1.0)
            if step % args.log_every == 0 or step == steps:
                run.log(step, {f"{name}/loss": value})
                if len(windows.held_out):
                    run.log(step, {f"{name}/val_loss": held_out_loss()})


# Adapted from dawm_td3bc.py: its loop is `fit`, which the value shares
def train_world_model(args: Args, windows: Windows, model: Diffuser, run: Run) -> None:
    """Fit the denoiser [DIFFUSER]."""
    fit(args, windows, model, "denoiser", run, train_world_model, args.world_model_steps)


def train_value(args: Args, windows: Windows, model: Diffuser, run: Run) -> None:
    """Fit the return of noised windows [DIFFUSER code]."""
    fit(args, windows, model, "value", run, train_value, args.value_steps)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none, since the plans have actions
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: none, since Diffuser acts on its plans and makes no transitions
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: the planner
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from baselines/decision_diffuser.py: the best of many plans, whose own action is taken
class Planner:
    """A policy that plans anew at every environment step, for all of `episodes` at once [DIFFUSER Alg. 1].

    Noise is drawn for all episodes and given to those that still run: so an episode's plans do not depend on how long
    the others last.
    """

    def __init__(self, args: Args, model: Diffuser, episodes: int, device: torch.device):
        self.args, self.model, self.device = args, model, device
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.shape = episodes, args.plans, *model.weight.shape

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, running: np.ndarray) -> np.ndarray:
        """obs [n, obs_dim] of the episodes `running` [n], dataset units -> actions [n, action_dim]."""
        running = torch.as_tensor(running, device=self.device)

        def noise():
            return torch.randn(self.shape, device=self.device, generator=self.generator)[running].flatten(0, 1)

        first = self.model.first(torch.as_tensor(obs, device=self.device)).repeat_interleave(self.args.plans, 0)
        plans, value = sample_plans(self.args, self.model, first, noise)
        best = value.view(-1, self.args.plans).argmax(1) + torch.arange(len(obs), device=self.device) * self.args.plans
        return self.model.units.denormalize(plans[best, 0])[:, : self.model.action_dim].cpu().numpy()


# Adapted from baselines/decision_diffuser.py: another model
def evaluate_planner(args: Args, model: Diffuser, evaluator: Evaluator, run: Run) -> None:
    """Log the mean return of whole episodes, all planned as one batch, and the score where one is defined.

    Kept when it is done, like a training; an interrupted one begins anew.
    """
    planner = Planner(args, model, args.eval_episodes, run.device)
    kept, steps = {"returns": torch.zeros(args.eval_episodes, dtype=torch.float64)}, itertools.count(1)
    with run.stage(evaluate_planner, args.eval_episodes, "episode", keeps=kept, private=True) as stage:

        def policy(obs: np.ndarray) -> np.ndarray:
            stage.bar.set_postfix(step=next(steps), running=len(obs))
            return planner(obs, evaluator.running)

        for _ in stage.over([range(args.eval_episodes)]):
            kept["returns"] = torch.as_tensor(evaluator(policy, seed=args.seed + 100))
            mean = kept["returns"].mean().item()
            score = evaluator.score(mean)
            run.log(
                args.world_model_steps,
                {"eval/episodic_return": mean, "eval/episodic_return_std": kept["returns"].std(correction=0)}
                | ({} if score is None else {"eval/normalized_score": score}),
            )


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DIFFUSER Alg. 1]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows = Windows(args, dataset, run.device)
    run.seed("diffuser", args.seed)
    model = Diffuser(args, windows).to(run.device).eval()
    run.open(dataset, evaluator, return_mean=model.return_mean.item(), return_std=model.return_std.item())
    train_world_model(args, windows, model, run)
    train_value(args, windows, model, run)
    evaluate_planner(args, model, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    planner = Planner(args, model, args.eval_episodes, run.device)
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, windows=windows, model=model, planner=planner
    )


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
