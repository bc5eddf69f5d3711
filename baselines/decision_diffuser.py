"""Decision Diffuser: a diffusion model plans states at every environment step, an inverse dynamics model acts on them.

1. A diffusion model learns windows of states alone, given the first state and the return-to-go (section 3).
2. An inverse dynamics model learns, on the same windows and by the same optimiser, which action leads from one state
   to the next (section 4).
3. Nothing is synthesised (section 5 is empty): no transition is ever made, no value learned.
4. The agent is the planner. At every environment step it samples a new plan from the current state, asked for a high
   return-to-go, acts on the plan's first two states and throws the rest away (section 6).
5. All evaluation episodes are planned as one batch in the simulator (section 6).

DAWM samples a diffusion model before it trains its policy and never again; DD does it for every action.

    python -m baselines.decision_diffuser --env-id local/hopper/medium-v0 --laptop             # two CPU cores
    python -m baselines.decision_diffuser --env-id hopper-medium-v2                            # as in DAWM's tables
    python -m baselines.decision_diffuser --env-id hopper-medium-expert-v2 --preset original   # DD's own settings

Another --target-return, --guidance-scale or --warm-start-steps finds the trained model and costs one evaluation.

[DD Alg. 1]                                     here
a trained noise model and f_phi                 train_decision_diffuser, DecisionDiffuser.losses
observe, draw the first noise                   Planner, sample_plans
put the known state into the plan (l. 6)        DecisionDiffuser.pin
guided noise, one step of denoising (l. 7-9)    sample_plans
act on the plan's first two states              Planner, InverseDynamics

Keys:
[DD]     Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[DWM]    Diffusion World Model, arXiv 2402.03570, whose DD is the one in DAWM's tables (appendix: arXiv 2607.17560)
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[CFG]    Classifier-Free Diffusion Guidance, arXiv 2207.12598
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule, strided sampling)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has where DD's paper and code disagree, and the evidence for each choice.

Symbols: DD writes k for environment time and t for diffusion, here `step` and `k`; its H is `plan_horizon` (tokens,
the current state included); its R(tau) `return_to_go`, as in its code; its omega `guidance_scale`; its alpha
`sampling_temperature`; g_eval in [DWM] is `target_return`.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

from common import UserError, fast
from common.cli import Amount, Count, Rate, RunArgs, Seed, Share, run_script
from common.data import OfflineDataset, load_dataset
from common.evaluation import Evaluator, score_report
from common.run import Run

import numpy as np
import torch
from torch import nn


@dataclass
class Args(RunArgs):
    preset: Literal["dwm", "original"] = "dwm"  # as in the papers' tables [DWM], or DD's own; any flag given still wins
    seed: Seed = 100  # seed of training and planning [DD code]; evaluated once, so that --eval-every says nothing

    # ---- Data: windows and return-to-go
    plan_horizon: Annotated[int, (2, 10_000)] = 32  # states of a plan, the current one included [DWM App.]
    gamma: Share = 0.99  # discount of return-to-go [DD code]
    # taken from a fallen episode's last reward before rewards are summed; 100 in DD's code, [DWM] is silent
    termination_penalty: Annotated[float, (0, 1e6)] = 0.0
    normalizer: Literal["limits", "gaussian"] = "limits"  # range or standard deviations; [deviation] DD, DWM: CDF

    # ---- World model: planner of states, and the inverse dynamics trained with it
    world_model_steps: Count = 2_000_000  # gradient updates [DD App.]
    world_model_batch_size: Count = 64  # windows per update; [unspecified] in [DWM], DD's code (2 x 32, accumulated)
    world_model_lr: Rate = 1e-4  # Adam's rate; [unspecified], as [DWM]'s world model
    world_model_holdout: Annotated[float, (0, 0.9)] = 0.05  # share of episodes for the held-out loss [unspecified]
    unet_width: Annotated[int, (8, math.inf)] = 128  # channels of the U-Net's first level [DD code]
    unet_multipliers: Annotated[tuple[int, ...], (1, math.inf)] = (1, 4, 8)  # of each level [DD code]
    diffusion_steps: Count = 5  # K [DWM App.]
    prediction: Literal["noise", "x0"] = "noise"  # predict noise [DD], or the clean window: not in the paper
    cond_drop_prob: Share = 0.25  # share of samples trained without return-to-go [DD App.]
    ema_decay: Share = 0.995  # of the averaged weights [DD code]
    ema_every: Count = 10  # updates between two averagings [DD code]
    ema_start: Annotated[int, (0, math.inf)] = 2_000  # updates with a plain copy instead [DD code]
    idm_width: Count = 1024  # units of the two hidden layers of the inverse dynamics [DWM App.]
    idm_dropout: Share = 0.1  # after each of them [DWM App.]

    # ---- Planner
    sampling_steps: Count = 3  # N denoising steps out of K [DWM App.]
    sampling_temperature: Amount = 0.5  # multiplies the standard deviation of each step [DD code]; DD: the variance
    initial_temperature: Amount = 1.0  # multiplies the noise that sampling starts from [DWM]; 0.5 in DD's code
    guidance_scale: Amount = 1.2  # weight of the return condition, 1: no guidance [DD code]
    # return-to-go asked for at every step, in return scales; default from TASKS [unspecified]; 0.9 in DD's code
    target_return: Annotated[float, (-100, 100)] | None = None
    # denoise the last plan, noised by so many of the K steps, instead of pure noise [DD]; 0: off
    warm_start_steps: Annotated[int, (0, math.inf)] = 0


# --preset: where DD's own settings differ from those that [DWM] gave it. Paper and code of DD disagree on most of
# these; the code is taken (docs/method.md has both).
PRESETS = {
    "dwm": {},
    "original": dict(
        plan_horizon=100,
        termination_penalty=100.0,
        world_model_steps=1_000_000,
        world_model_lr=2e-4,
        diffusion_steps=200,
        idm_width=256,
        idm_dropout=0.0,
        sampling_steps=200,
        initial_temperature=0.5,
        target_return=0.9,
    ),
}

# --laptop: the same method with a smaller U-Net and fewer updates, [deviation] throughout; not the paper's scale. x0 in
# units of standard deviations as in dawm_td3bc.py; short plans, since with 32 states the second one, on which alone the
# planner acts, stays coarse (docs/method.md); and a target that the data reach.
LAPTOP = dict(
    plan_horizon=8,
    target_return=0.55,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    prediction="x0",
    normalizer="gaussian",
    world_model_steps=15_000,
    world_model_lr=1e-3,
    unet_width=32,
    unet_multipliers=(1, 2),
    idm_width=256,
)

# Return scale [DAWM App.] and target return ([unspecified]; from [DWM App.]'s grids) of the paper's tasks. Any other
# data set: the scale that puts its largest return-to-go at 0.6, and target 0.7.
TASKS = {
    "hopper-medium-v2": (400, 0.7),
    "hopper-medium-replay-v2": (400, 0.7),
    "hopper-medium-expert-v2": (400, 0.8),
    "walker2d-medium-v2": (550, 0.7),
    "walker2d-medium-replay-v2": (550, 0.7),
    "walker2d-medium-expert-v2": (550, 0.9),
    "halfcheetah-medium-v2": (1200, 0.5),
    "halfcheetah-medium-replay-v2": (1200, 0.4),
    "halfcheetah-medium-expert-v2": (1200, 0.7),
}


# Adapted from dawm_td3bc.py: plans instead of rollouts, a planner instead of an agent
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.sampling_steps > args.diffusion_steps:
        raise UserError(f"--sampling-steps {args.sampling_steps} is above --diffusion-steps {args.diffusion_steps}")
    lowest = strided_steps(args.diffusion_steps, args.sampling_steps)[0]
    if args.warm_start_steps and not lowest <= args.warm_start_steps <= args.diffusion_steps:
        raise UserError(
            f"--warm-start-steps {args.warm_start_steps} lies outside [{lowest}, {args.diffusion_steps}]: from the "
            "first diffusion step that sampling visits to --diffusion-steps; 0 plans from noise"
        )
    if args.unet_width % 8 or not args.unet_multipliers:
        raise UserError(f"--unet-width {args.unet_width} must be 8, 16, ..., with one of --unet-multipliers or more")
    unit = 2 ** (len(args.unet_multipliers) - 1)
    if args.plan_horizon % unit:
        raise UserError(
            f"--plan-horizon {args.plan_horizon} must be a multiple of {unit}, since a U-Net of "
            f"{len(args.unet_multipliers)} levels halves it {len(args.unet_multipliers) - 1} times; "
            f"take {math.ceil(args.plan_horizon / unit) * unit}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: episodes to windows, return-to-go
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


# Copied from dawm_td3bc.py
def return_units(args: Args, return_to_go: np.ndarray) -> tuple[float, float]:
    """Offset and scale that make labels of this data set's return-to-go [N]: (return_to_go - offset) / scale.

    Not one of TASKS: [unspecified] the largest label is 0.6 and, where there are negative returns, the smallest 0.
    """
    if args.env_id in TASKS:
        return 0.0, float(TASKS[args.env_id][0])
    offset = min(0.0, float(return_to_go.min()))
    return offset, (float(return_to_go.max()) - offset) / 0.6 or 1.0  # where no reward was ever given, 1


# Copied from dawm_td3bc.py
def target_return(args: Args) -> float | str:
    """g_eval, in return scales, or "own"."""
    return TASKS.get(args.env_id, (None, 0.7))[1] if args.target_return is None else args.target_return


# Adapted from dawm_td3bc.py: states and the actions between them, no rewards
class Windows:
    """All windows of plan_horizon states, one for each real pair (state, action); gathered when asked for.

    `train` and `held_out` are the windows to learn from, and those in other episodes. No window crosses an episode's
    end. A fallen episode goes on with its last state, where the simulator would stop: else no window would start near a
    fall, and the model could not plan there. Between such states no action is known. UserError if no episode is long
    enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        self.number_states(dataset)
        self.label_returns(args, dataset)
        fits = self.start + args.plan_horizon - 1 <= self.final
        if not fits.any():
            raise UserError(
                f"--plan-horizon {args.plan_horizon} needs {args.plan_horizon - 1} transitions in a row, but the "
                f"longest episode has {dataset.lengths.max()}; lower it"
            )
        self.usable = fits | dataset.terminated[self.last][self.episode]
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.as_tensor(value, device=device))
        self.offsets = torch.arange(args.plan_horizon, device=device)
        self.train, self.held_out = self.split(self.usable, args.world_model_holdout, args.seed)

    def number_states(self, dataset: OfflineDataset) -> None:
        """obs [N + E, obs_dim]: T transitions have T+1 states, so pair i of episode e is row i + e. `start`
        and `final` [N] are the rows of a pair's own state and of its episode's last one. action [N + E, action_dim],
        in the same rows, is NaN in an episode's last one.
        """
        self.episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        self.last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        self.obs = np.insert(dataset.obs, self.last + 1, dataset.next_obs[self.last], axis=0)
        self.action = np.insert(dataset.action, self.last + 1, np.nan, axis=0)
        self.start = np.arange(len(self.episode)) + self.episode
        self.final = (self.last + 1 + np.arange(len(self.last)))[self.episode]

    def label_returns(self, args: Args, dataset: OfflineDataset) -> None:
        """return_to_go [N] from a window's first step on, in units of the return scale."""
        reward = dataset.reward - args.termination_penalty * dataset.terminated
        label = discounted_return_to_go(reward, dataset.lengths, args.gamma)
        self.return_offset, self.return_scale = return_units(args, label)
        self.return_to_go = ((label - self.return_offset) / self.return_scale).astype(np.float32)

    def split(self, pairs: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs marked in `pairs` [N]: to train on, and those in a random share of their episodes."""
        episodes = self.episode[pairs].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
        count = min(math.ceil(share * len(episodes)), len(episodes) - 1)  # something must be left to train on
        held_out = torch.isin(self.episode, episodes[order[:count]])
        return (pairs & ~held_out).nonzero()[:, 0], (pairs & held_out).nonzero()[:, 0]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of obs and action that make up the windows `index` [B] -> [B, plan_horizon]."""
        return torch.minimum(self.start[index, None] + self.offsets, self.final[index, None])


# Adapted from dawm_td3bc.py: the data's range as units, too
class Normalizer(nn.Module):
    """Each dimension of values [N, dim] to the diffusion's units and back, clipped to the data's range.

    limits: minimum and maximum to -1 and 1. gaussian: mean 0, standard deviation 1. `low` and `high` [dim] are the
    data's range in these units; a dimension that never changes is 0.
    """

    def __init__(self, values: torch.Tensor, kind: str):
        super().__init__()
        low, high = values.amin(0), values.amax(0)
        if kind == "limits":
            shift, scale = (high + low) / 2, (high - low) / 2
        else:
            shift, scale = values.mean(0), values.std(0) + 1e-6
        changes = high > low
        scale = torch.where(changes, scale, torch.ones_like(scale))
        self.register_buffer("shift", torch.where(changes, shift, low))
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
# 3. World model: schedule, denoiser, loss, sampler
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
def cosine_alpha_bar(num_diffusion_steps: int) -> torch.Tensor:
    """Cumulative product of 1 - noise_beta for k = 0..K -> [K+1], float64, alpha_bar[0] = 1 [IDDPM Eq. 17]."""
    k = torch.arange(num_diffusion_steps + 1, dtype=torch.float64) / num_diffusion_steps
    f = torch.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2
    noise_beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - noise_beta, 0)])


# Copied from dawm_td3bc.py
def strided_steps(num_diffusion_steps: int, sampling_steps: int) -> list[int]:
    """The N of K diffusion steps that sampling visits, ascending, ending at K: 1, 3, 5 for N=3, K=5 [DWM App.]."""
    if sampling_steps == 1:
        return [num_diffusion_steps]
    spacing = (num_diffusion_steps - 1) / (sampling_steps - 1)
    return [math.floor(1 + i * spacing + 0.5) for i in range(sampling_steps)]


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


# Adapted from dawm_td3bc.py: no action among the conditions, and lengths that divide
class TemporalUNet(nn.Module):
    """Denoiser of a window x [B, L, channels], given diffusion step k [B] and return-to-go [B, 1] [DD code].

    `keep` [B, 1] is 1 or 0: a dropped return-to-go has a zero embedding [DD code]. Output [B, L, channels].
    L is a multiple of 2^(levels - 1). 59,732,491 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()
        self.embed_k = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.embed_return = nn.Sequential(
            nn.Linear(1, width), nn.Mish(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        half, embed_dim = width // 2, 2 * width
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1)))
        self.mish = nn.Mish()
        sizes = [channels, *(width * m for m in multipliers)]
        levels = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.down = nn.ModuleList()
        for level, (i, o) in enumerate(levels):
            blocks = [ResidualBlock(i, o, embed_dim), ResidualBlock(o, o, embed_dim)]
            shorten = nn.Conv1d(o, o, 3, stride=2, padding=1) if level < len(levels) - 1 else nn.Identity()
            self.down.append(nn.ModuleList([*blocks, shorten]))
        self.middle = nn.ModuleList([ResidualBlock(sizes[-1], sizes[-1], embed_dim) for _ in range(2)])
        self.up = nn.ModuleList()
        for i, o in reversed(levels[1:]):
            blocks = [ResidualBlock(2 * o, i, embed_dim), ResidualBlock(i, i, embed_dim)]
            self.up.append(nn.ModuleList([*blocks, nn.ConvTranspose1d(i, i, 4, stride=2, padding=1)]))
        self.head_conv, self.head_norm = nn.Conv1d(sizes[1], width, 5, padding=2), nn.GroupNorm(8, width)
        self.head = nn.Conv1d(width, channels, 1)

    def forward(self, x, k, return_to_go, keep):
        angle = k[:, None] * self.frequencies
        embedding = [self.embed_k(torch.cat([angle.sin(), angle.cos()], 1)), self.embed_return(return_to_go) * keep]
        embedding = self.mish(torch.cat(embedding, dim=1))  # [B, 2 * width]
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


class DecisionDiffuser(nn.Module):
    """p(next states | state, return-to-go) and p(action | state, next state) [DD], in the diffusion's units.

    A plan x [B, plan_horizon, obs_dim] is normalised. Its first state is known, not generated: it is put back before
    every network call [DD Alg. 1].
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, obs_dim, action_dim = args, windows.obs.shape[1], windows.action.shape[1]
        self.units = Normalizer(windows.obs, args.normalizer)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.diffusion_steps).float())
        denoiser = TemporalUNet(obs_dim, args.unet_width, args.unet_multipliers)
        self.denoiser = fast.on_cpu(denoiser, args.compile)
        self.inverse_dynamics = InverseDynamics(args, obs_dim, action_dim)

    def pin(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """x with its first states [B, obs_dim] put back."""
        return torch.cat([first[:, None], x[:, 1:]], dim=1)

    def q_sample(self, x0: torch.Tensor, k: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noised window x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise [DD], k [B] in 1..K."""
        alpha_bar = self.alpha_bar[k][:, None, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def losses(self, x0, action, return_to_go, keep) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared errors of prediction and action [DD]; the training minimises their mean [DD code].

        The first is over all but the known first state. The second is over all pairs of the window between which an
        action is known: action [B, plan_horizon, action_dim] is NaN elsewhere. [deviation] DD's code takes all pairs
        with its zero padding.
        """
        k = torch.randint(1, len(self.alpha_bar), (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        x_k = self.pin(self.q_sample(x0, k, noise), x0[:, 0])
        error = self.denoiser(x_k, k, return_to_go, keep) - (noise if self.args.prediction == "noise" else x0)
        action = action[:, :-1]
        known = ~action.isnan()
        action_error = self.inverse_dynamics(x0[:, :-1], x0[:, 1:]) - action.nan_to_num()
        return error[:, 1:].square().mean(), (action_error.square() * known).sum() / known.sum()


@torch.no_grad()
def sample_plans(args: Args, model: DecisionDiffuser, first, return_to_go, noise, previous=None) -> torch.Tensor:
    """Plans [B, plan_horizon, obs_dim] from first states [B, obs_dim] and return_to_go [B, 1], normalised [DD Alg. 1].

    noise() gives a standard normal tensor like the plans. `previous` are the plans of the step before, for a warm
    start: they are shifted by one step (DD does not say whether its are), noised, and denoised from there.
    """
    batch, units = len(first), model.units
    alpha_bar = cosine_alpha_bar(args.diffusion_steps)
    steps = strided_steps(args.diffusion_steps, args.sampling_steps)
    coefficients = posterior_coefficients(alpha_bar, steps)
    if previous is None:
        x = args.initial_temperature * noise()
    else:
        steps = [k for k in steps if k <= args.warm_start_steps]
        shifted = torch.cat([previous[:, 1:], previous[:, -1:]], dim=1)
        x = model.q_sample(shifted, torch.full((batch,), steps[-1], device=first.device), noise())
    # Both guidance branches, with and without return-to-go, go through the network as one batch.
    return_to_go = torch.cat([return_to_go, return_to_go])
    keep = (torch.arange(2 * batch, device=first.device) < batch).float()[:, None]
    for k, (weight_x0, weight_x_k, std) in reversed([*zip(steps, coefficients)]):  # a warm start visits the lower ones
        x = model.pin(x, first)
        k_batch = torch.full((2 * batch,), k, device=first.device)
        cond, uncond = model.denoiser(torch.cat([x, x]), k_batch, return_to_go, keep).chunk(2)
        prediction = uncond + args.guidance_scale * (cond - uncond)  # [DD Eq. 8], its omega = 1 + [CFG]'s w
        x0 = prediction
        if args.prediction == "noise":
            # At k = K this multiplies the network's error by 103 (K=5): the clamp makes the first step usable.
            x0 = (x - (1 - alpha_bar[k]).sqrt().item() * prediction) / alpha_bar[k].sqrt().item()
        x0 = model.pin(x0.clamp(units.low, units.high), first)
        std = args.sampling_temperature * std  # scales std, not variance [DD code]; 0 at the last step
        x = weight_x0 * x0 + weight_x_k * x + std * noise()
    return model.pin(x, first)


def train_decision_diffuser(args: Args, windows: Windows, run: Run) -> DecisionDiffuser:
    """Fit denoiser and inverse dynamics together [DD]; the returned model has the averaged weights."""
    run.seed("decision_diffuser", args.seed)
    model = DecisionDiffuser(args, windows).to(run.device).eval()
    learner = copy.deepcopy(model).train()
    fast.on_cpu(learner.denoiser, args.compile)  # a copy is not compiled
    parameters, averaged = list(learner.parameters()), list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    normalized = model.units.normalize(windows.obs)  # once for all

    def losses_of(model, index):
        rows = windows.rows(index)
        keep = (torch.rand(len(index), 1, device=run.device) >= args.cond_drop_prob).float()
        return model.losses(normalized[rows], windows.action[rows], windows.return_to_go[index, None], keep)

    @torch.no_grad()
    def held_out_losses():
        with torch.random.fork_rng():  # the same windows and noise every time, and none of the training's
            torch.manual_seed(args.seed)
            index = torch.randint(len(windows.held_out), (512,), device=run.device)
            return losses_of(model, windows.held_out[index])

    with run.stage(
        train_decision_diffuser, args.world_model_steps, "update", keeps=model, saves=(learner, optimizer)
    ) as stage:
        for step in stage:
            index = torch.randint(len(windows.train), (args.world_model_batch_size,), device=run.device)
            state_loss, action_loss = losses_of(learner, windows.train[index])
            optimizer.zero_grad()
            ((state_loss + action_loss) / 2).backward()
            optimizer.step()
            if step % args.ema_every == 0 or step == args.world_model_steps:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay if step > args.ema_start else 1.0)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": state_loss, "idm/loss": action_loss})
                if len(windows.held_out):
                    state_loss, action_loss = held_out_losses()
                    run.log(step, {"world_model/val_loss": state_loss, "idm/val_mse": action_loss})
    return model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: a plain action instead of a density, no context, trained with the denoiser
class InverseDynamics(nn.Module):
    """The action between two states [..., obs_dim], both in the diffusion's units -> [..., action_dim] [DD].

    Its output is not bounded [DD code]; the evaluator clips to the action space. [deviation] DD's code predicts actions
    in units of their CDF; here they are as in the data.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        width, layers = args.idm_width, []
        for in_dim in (2 * obs_dim, width):
            layers += [nn.Linear(in_dim, width), nn.ReLU(), nn.Dropout(args.idm_dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(width, action_dim))

    def forward(self, obs: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, next_obs], dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: none, since DD acts on its plans and makes no transitions
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: the planner
# ---------------------------------------------------------------------------------------------------------------------


class Planner:
    """A policy that plans anew at every environment step, for all of `episodes` at once [DD Alg. 1].

    Noise is drawn for all episodes and given to those that still run: so an episode's plans do not depend on how long
    the others last.
    """

    def __init__(self, args: Args, model: DecisionDiffuser, episodes: int, device: torch.device):
        self.args, self.model = args, model
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.plans = torch.zeros(episodes, args.plan_horizon, len(model.units.low), device=device)
        self.target = torch.full((episodes, 1), target_return(args), device=device)
        self.started = False

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, running: np.ndarray) -> np.ndarray:
        """obs [n, obs_dim] of the episodes `running` [n], dataset units -> actions [n, action_dim]."""
        device = self.plans.device
        running = torch.as_tensor(running, device=device)

        def noise():
            return torch.randn(self.plans.shape, device=device, generator=self.generator)[running]

        first = self.model.units.normalize(torch.as_tensor(obs, device=device))
        previous = self.plans[running] if self.args.warm_start_steps and self.started else None
        plans = sample_plans(self.args, self.model, first, self.target[running], noise, previous)
        self.plans[running], self.started = plans, True
        return self.model.inverse_dynamics(plans[:, 0], plans[:, 1]).cpu().numpy()


def evaluate_planner(args: Args, model: DecisionDiffuser, evaluator: Evaluator, run: Run) -> None:
    """Log the mean return of whole episodes, all planned as one batch [DD code], and the score where one is defined.

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
# 7. The whole method [DD Alg. 1]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows = Windows(args, dataset, run.device)
    run.open(dataset, evaluator, return_scale=windows.return_scale, target_return=target_return(args))
    model = train_decision_diffuser(args, windows, run)
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
    run_script(main, Args, LAPTOP, PRESETS)
