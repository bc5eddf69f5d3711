"""Decision Diffuser: a diffusion model plans states at every environment step, an inverse dynamics model acts on them.

1. A diffusion model learns windows of states alone, given the first state and the return-to-go (section 3).
2. An inverse dynamics model learns, on the same windows and by the same optimiser, which action leads from one state
   to the next (section 4).
3. Nothing is synthesised (section 5 is empty): no transition is ever made, no value learned.
4. The agent is the planner. At every environment step it samples a new plan from the current state, asked for a high
   return-to-go, acts on the plan's first two states and throws the rest away (section 6).
5. All evaluation episodes are planned as one batch in the simulator (section 7).

DAWM samples a diffusion model before training its policy and never again; DD does it for every action.

    python dd_baseline.py --env-id local/hopper/medium-v0 --laptop              # two CPU cores
    python dd_baseline.py --env-id hopper-medium-v2                             # as in DAWM's tables, one GPU
    python dd_baseline.py --env-id hopper-medium-expert-v2 --preset original    # DD's own settings
    python dd_baseline.py --env-id hopper-medium-v2 --preset original --warm-start-steps 40

What separates it from DAWM: docs/diffs.md.

Keys:
[DD]     Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[DWM]    Diffusion World Model, arXiv 2402.03570, whose DD is the one in DAWM's tables (appendix: arXiv 2607.17560)
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[CFG]    Classifier-Free Diffusion Guidance, arXiv 2207.12598
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule, strided sampling)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: DD writes k for environment time and t for diffusion, here `step` and `k`; its H is `plan_horizon` (tokens,
the current state included); its R(tau) `return_to_go`, as in its code; its omega `guidance_scale`; its alpha
`sampling_temperature`; g_eval in [DWM] is `target_return`.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from common import UserError
from common.data import OfflineDataset, load_dataset
from common.evaluation import Evaluator, normalized_score, score_report
from common.run import Run, check_range, run_script
from common.stages import Kept


@dataclass
class Args:
    # ---- Run
    preset: Literal["dwm", "original"] = "dwm"
    """defaults as in the paper's tables [DWM], or DD's own (PRESETS); any flag given still wins"""
    env_id: str = "hopper-medium-v2"
    """data set: a D4RL name, local/ROBOT/QUALITY-v0 (made on this machine), or any Minari id"""
    data_path: Path | None = None
    """a file in D4RL's HDF5 layout to read instead of the published one"""
    laptop: bool = False
    """defaults for two CPU cores and ten minutes instead of the paper's; any flag given still wins"""
    seed: int = 100
    """seed of training and planning [DD code]"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one"""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice. CPU results depend on it in the last digits"""
    tf32: bool = False
    """on a GPU, products and convolutions of 10 mantissa bits instead of 23: faster; what it costs is not measured"""
    run_dir: Path = Path("runs")
    """each run makes a folder of its own in here"""
    exp_name: str = Path(__file__).stem
    """part of the folder's name"""
    track: bool = False
    """log to Weights & Biases too"""
    wandb_project: str = "dawm"
    """project for --track"""
    log_every: int = 500
    """gradient updates between two logged metrics"""
    stage_dir: Path = Path("runs/stages")
    """world models, inverse dynamics and synthetic sets are kept here, for every run that would make the same"""
    fresh: bool = False
    """make every stage anew, whatever is kept"""
    checkpoint_every: float = 5.0
    """minutes between two checkpoints of a stage, from which an interrupted run goes on; 0 makes none"""

    # ---- Data: windows and return-to-go
    plan_horizon: int = 32
    """states of a plan, the current one included [DWM App.]"""
    gamma: float = 0.99
    """discount of return-to-go [DD code]"""
    termination_penalty: float = 0.0
    """taken from the last reward of a fallen episode before rewards are summed; 100 in DD's code, [DWM] is silent"""
    window_padding: Literal["absorbing", "none"] = "absorbing"
    """go on after a fall with its last state, or use only windows that fit [unspecified]; DD's code pads with zeros"""
    normalizer: Literal["limits", "gaussian", "cdf"] = "limits"
    """units of the diffusion; [deviation] DD's code takes the empirical CDF (cdf); as dawm_td3bc.py here"""

    # ---- World model: planner of states, and the inverse dynamics trained with it
    world_model_steps: int = 2_000_000
    """gradient updates [DD App.]"""
    world_model_batch_size: int = 64
    """windows per update; [unspecified] in [DWM], DD's code (2 x 32, accumulated)"""
    world_model_lr: float = 1e-4
    """Adam's rate; [unspecified], as [DWM]'s world model"""
    world_model_holdout: float = 0.05
    """share of episodes kept from the training, to measure the error of plans [unspecified]"""
    unet_width: int = 128
    """channels of the U-Net's first level [DD code]"""
    unet_multipliers: tuple[int, ...] = (1, 4, 8)
    """channels of each level in units of the width [DD code]"""
    diffusion_steps: int = 5
    """K [DWM App.]"""
    prediction: Literal["noise", "x0"] = "noise"
    """what the U-Net predicts: noise [DD], or the clean window, which is not in the paper"""
    cond_drop_prob: float = 0.25
    """share of samples trained without return-to-go [DD App.]"""
    ema_decay: float = 0.995
    """of the averaged weights [DD code]"""
    ema_every: int = 10
    """updates between two averagings [DD code]"""
    ema_start: int = 2_000
    """updates before which the average is a plain copy [DD code]"""
    compile: bool = False
    """torch.compile for the U-Net: minutes to start, then faster (docs/speed.md); needs a C++ compiler"""
    idm_width: int = 1024
    """units of the two hidden layers of the inverse dynamics [DWM App.]"""
    idm_dropout: float = 0.1
    """after each of them [DWM App.]"""

    # ---- Planner
    sampling_steps: int = 3
    """N denoising steps out of K [DWM App.]"""
    sampling_temperature: float = 0.5
    """multiplies the standard deviation of each denoising step [DD code]; [DD Alg. 1] scales the variance"""
    initial_temperature: float = 1.0
    """multiplies the noise that sampling starts from; 0.5 in DD's code, 1 in [DWM]"""
    guidance_scale: float = 1.2
    """weight of the return condition, 1 is no guidance [DD code]"""
    target_return: float | None = None
    """return-to-go asked for at every step, in return scales; default from TASKS [unspecified]; 0.9 in DD's code"""
    warm_start_steps: int = 0
    """denoise the last plan, noised by so many of the K steps, instead of pure noise [DD]; 0 is off"""

    # ---- Evaluation
    eval_episodes: int = 10
    """episodes, planned as one batch [DD code]"""
    physics: Literal["auto", "d4rl", "stock"] = "auto"
    """capsule masses of the simulator: D4RL's or today's; auto takes what the data set was recorded with"""


# --preset: where DD's own settings differ from those that [DWM] gave it. Paper and code of DD disagree on most of
# these; the code is taken (docs/dd_baseline.md has both).
PRESETS = {
    "dwm": {},
    "original": dict(
        plan_horizon=100,
        termination_penalty=100.0,
        normalizer="cdf",
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
# planner acts, stays coarse (docs/dd_baseline.md); and a target that the data reach.
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
    """UserError for values with which no run makes sense, before anything is loaded."""
    counts = "diffusion_steps sampling_steps world_model_steps world_model_batch_size idm_width eval_episodes "
    check_range(args, 1, math.inf, counts + "log_every ema_every")
    check_range(args, 2, 10_000, "plan_horizon")
    check_range(args, 0, 1, "cond_drop_prob ema_decay idm_dropout gamma")
    check_range(args, 0, 0.9, "world_model_holdout")
    check_range(args, 0, 2**31, "threads seed")
    check_range(args, 0, 100, "sampling_temperature initial_temperature guidance_scale")
    check_range(args, 1e-8, 1, "world_model_lr")
    check_range(args, -100, 100, "target_return")
    check_range(args, 0, 1e6, "termination_penalty")
    check_range(args, 0, math.inf, "checkpoint_every")
    if args.sampling_steps > args.diffusion_steps:
        raise UserError(f"--sampling-steps {args.sampling_steps} is above --diffusion-steps {args.diffusion_steps}")
    lowest = strided_steps(args.diffusion_steps, args.sampling_steps)[0]
    if args.warm_start_steps and not lowest <= args.warm_start_steps <= args.diffusion_steps:
        raise UserError(
            f"--warm-start-steps {args.warm_start_steps} lies outside [{lowest}, {args.diffusion_steps}]: from the "
            "first diffusion step that sampling visits to --diffusion-steps; 0 plans from noise"
        )
    if args.unet_width % 8 or args.unet_width < 8 or min(args.unet_multipliers, default=0) < 1:
        raise UserError(f"--unet-width {args.unet_width} must be 8, 16, ... and --unet-multipliers positive")
    unit = 2 ** (len(args.unet_multipliers) - 1)
    if args.plan_horizon % unit:
        near = args.plan_horizon // unit * unit
        raise UserError(
            f"--plan-horizon {args.plan_horizon} must be a multiple of {unit}, since a U-Net of "
            f"{len(args.unet_multipliers)} levels halves it {len(args.unet_multipliers) - 1} times; "
            f"take {near + unit}" + (f" or {near}" if near else "")
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
def return_scale(args: Args, largest_return_to_go: float) -> float:
    """The divisor of this data set's return-to-go."""
    if not largest_return_to_go > 0:
        raise UserError(
            f"the largest return-to-go of {args.env_id} is {largest_return_to_go:.3g}, no scale for it; "
            "shift its rewards above 0"
        )
    return float(TASKS[args.env_id][0] if args.env_id in TASKS else largest_return_to_go / 0.6)


# Copied from dawm_td3bc.py
def target_return(args: Args) -> float | str:
    """g_eval, in return scales, or "own"."""
    return TASKS.get(args.env_id, (None, 0.7))[1] if args.target_return is None else args.target_return


# Adapted from dawm_td3bc.py: windows of states and of the actions between them, no rewards
class Windows:
    """All windows of plan_horizon states, one for each real pair (state, action); gathered when asked for.

    No window crosses an episode's end. A fallen episode goes on with its last state (the simulator would stop there):
    else no window would start near a fall, and the model could not plan there. No action is known between such states.
    UserError if no episode is long enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each row
        last = np.cumsum(dataset.lengths) - 1  # last row of each episode
        # One token per state: an episode of T transitions has T+1 of them, so its rows shift by its number.
        obs = np.insert(dataset.obs, last + 1, dataset.next_obs[last], axis=0)
        start, final = np.arange(len(episode)) + episode, (last + 1 + np.arange(len(last)))[episode]
        fits = start + args.plan_horizon - 1 <= final
        if not fits.any():
            raise UserError(
                f"--plan-horizon {args.plan_horizon} needs {args.plan_horizon - 1} transitions in a row, but the "
                f"longest episode has {dataset.lengths.max()}; lower it"
            )
        if len(last) < 2:
            raise UserError(f"{args.env_id} has one episode; held-out measurements need two or more")
        usable = fits | dataset.terminated[last][episode] if args.window_padding == "absorbing" else fits
        reward = dataset.reward - args.termination_penalty * dataset.terminated
        return_to_go = discounted_return_to_go(reward, dataset.lengths, args.gamma)
        self.return_scale = return_scale(args, return_to_go.max())

        def tensor(array):
            return torch.as_tensor(array, device=device)

        self.obs, self.start, self.final = tensor(obs), tensor(start), tensor(final)
        self.action = tensor(np.insert(dataset.action, last + 1, np.nan, axis=0))  # by row of obs; none after the last
        self.return_to_go = tensor((return_to_go / self.return_scale).astype(np.float32))
        self.usable, self.fits, self.episode = tensor(usable), tensor(fits), tensor(episode)
        self.offsets = torch.arange(args.plan_horizon, device=device)

    def held_out(self, share: float, seed: int) -> torch.Tensor:
        """Mask [N] of the windows in a random share of the episodes."""
        episodes = int(self.episode[-1]) + 1
        order = torch.randperm(episodes, generator=torch.Generator().manual_seed(seed))
        count = min(math.ceil(share * episodes), episodes - 1)  # something must be left to train on
        return torch.isin(self.episode, order[:count].to(self.episode.device))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of obs and action that make up the windows `index` [B] -> [B, plan_horizon]."""
        return torch.minimum(self.start[index, None] + self.offsets, self.final[index, None])


# Copied from dawm_td3bc.py
class Normalizer(nn.Module):
    """Each dimension of values [N, dim] to the diffusion's units and back, by linear interpolation between quantiles.

    limits: minimum and maximum to -1 and 1. gaussian: mean 0, standard deviation 1. cdf: rank to -1..1, by 10,000 steps
    [DWM App.]. `low` and `high` [dim] are the data's range in these units.
    """

    def __init__(self, values: torch.Tensor, kind: str):
        super().__init__()
        ordered = values.T.sort(dim=1).values  # [dim, N]
        rank = torch.linspace(0, 1, 10_000 if kind == "cdf" else 2, dtype=torch.float64, device=values.device)
        self.register_buffer("quantiles", ordered[:, (rank * (len(values) - 1)).round().long()].contiguous())
        low, high = -torch.ones_like(values[0]), torch.ones_like(values[0])
        if kind == "gaussian":
            low, high = ((ordered[:, end] - values.mean(0)) / (values.std(0) + 1e-6) for end in (0, -1))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def normalize(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] in dataset units, clipped to the data's range."""
        flat = x.reshape(-1, x.shape[-1]).T.contiguous()  # [dim, B]
        last = self.quantiles.shape[1] - 1
        right = torch.searchsorted(self.quantiles, flat, right=True).clamp(1, last)
        below, above = self.quantiles.gather(1, right - 1), self.quantiles.gather(1, right)
        # above equals below only beyond the last of several equal largest values
        fraction = torch.where(above > below, (flat - below) / (above - below), 1.0).clamp(0, 1)
        return torch.lerp(self.low, self.high, ((right - 1 + fraction) / last).T).reshape(x.shape)

    def denormalize(self, y: torch.Tensor) -> torch.Tensor:
        """y [..., dim], clipped to the data's range, to dataset units."""
        last = self.quantiles.shape[1] - 1
        share = (y.reshape(-1, y.shape[-1]) - self.low) / (self.high - self.low).clamp(min=1e-12)
        position = (share.clamp(0, 1) * last).T.contiguous()
        left = position.long().clamp(max=last - 1)
        below, above = self.quantiles.gather(1, left), self.quantiles.gather(1, left + 1)
        return torch.lerp(below, above, position - left).T.reshape(y.shape)


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
class TapProducts(torch.autograd.Function):
    """Convolution of x [L * B, in], time first, by weight [5, in, out]; `reach`: rows each tap reads and adds to."""

    @staticmethod
    def forward(ctx, x, weight, bias, reach):
        ctx.save_for_backward(x, weight)
        ctx.reach, out = reach, x.new_empty(len(x), len(bias)).copy_(bias)
        for tap, (read, add) in zip(weight, reach, strict=True):
            out[add].addmm_(x[read], tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
        for tap, grad_tap, (read, add) in zip(weight, grad_weight, ctx.reach, strict=True):
            grad_x[read].addmm_(grad[add], tap.T)
            torch.mm(x[read].T, grad[add], out=grad_tap)  # zeros where a tap reads nothing
        return grad_x, grad_weight, grad.sum(0), None


# Copied from dawm_td3bc.py
class TemporalConv(nn.Module):
    """nn.Conv1d of 5 taps with zeros beyond both ends, for x [L, B, in_channels] -> [L, B, out_channels].

    Windows are so short that a third to a half of what nn.Conv1d multiplies is padding. A product for each tap leaves
    that out, and with time first what a tap reads lies in one piece: faster on a CPU (docs/speed.md).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        like = nn.Conv1d(in_channels, out_channels, 5)
        self.weight, self.bias = nn.Parameter(like.weight.detach().permute(2, 1, 0).contiguous()), like.bias

    def forward(self, x):
        if x.is_cuda:  # one kernel instead of five; not measured
            return F.conv1d(x.permute(1, 2, 0), self.weight.permute(2, 1, 0), self.bias, padding=2).permute(2, 0, 1)
        length, batch, _ = x.shape
        skipped = ((0, 2), (0, 1), (0, 0), (1, 0), (2, 0))  # tokens that a tap does not read: first ones, last ones
        ends = [max(0, length - tokens) * batch for tokens in range(3)]
        reach = [(slice(a * batch, ends[b]), slice(b * batch, ends[a])) for a, b in skipped]
        out = TapProducts.apply(x.flatten(0, 1).contiguous(), self.weight, self.bias, reach)
        return out.view(length, batch, -1)


# Copied from dawm_td3bc.py
class TemporalNorm(nn.GroupNorm):
    """nn.GroupNorm of x [L, B, channels]; from 64 channels on, a batch norm over a view is the same and faster."""

    def forward(self, x):
        if x.is_cuda or x.shape[2] < 64:
            return F.group_norm(x.permute(1, 2, 0), self.num_groups, self.weight, self.bias, self.eps).permute(2, 0, 1)
        groups = x.reshape(len(x), -1, x.shape[2] // self.num_groups)
        groups = F.batch_norm(groups, None, None, training=True, eps=self.eps)
        return torch.addcmul(self.bias, groups.view(x.shape), self.weight)


# Copied from dawm_td3bc.py
class MishFunction(torch.autograd.Function):
    """x tanh(ln(1 + e^x)) = x - 2 x / m with m = (1 + e^x)^2 + 1, mostly in place: three quarters of F.mish's time."""

    @staticmethod
    def forward(ctx, x):
        m = x.clamp(max=20).exp_().add_(1).square_().add_(1)  # beyond 20 the result is x
        ctx.save_for_backward(x, m)
        return torch.addcdiv(x, x, m, value=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, m = ctx.saved_tensors
        root = (m - 1).sqrt_()  # 1 + e^x
        return (root * (root - 1)).mul_(x).mul_(4).div_(m).sub_(2).div_(m).add_(1).mul_(grad)


# Copied from dawm_td3bc.py
def mish(x: torch.Tensor) -> torch.Tensor:
    return F.mish(x) if x.is_cuda else MishFunction.apply(x)


# Copied from dawm_td3bc.py
class ResidualBlock(nn.Module):
    """Two convolutions over time with group norm and Mish; the condition is added between them [DD code]."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int):
        super().__init__()
        self.conv1, self.norm1 = TemporalConv(in_channels, out_channels), TemporalNorm(8, out_channels)
        self.condition = nn.Linear(embed_dim, out_channels)
        self.conv2, self.norm2 = TemporalConv(out_channels, out_channels), TemporalNorm(8, out_channels)
        self.skip = nn.Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding):
        h = mish(self.norm1(self.conv1(x))) + self.condition(embedding)
        return mish(self.norm2(self.conv2(h))) + self.skip(x)


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
        half = width // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1)))
        embed_dim = 2 * width
        sizes = [channels, *(width * m for m in multipliers)]
        levels = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.down = nn.ModuleList(
            nn.ModuleList(
                [
                    ResidualBlock(i, o, embed_dim),
                    ResidualBlock(o, o, embed_dim),
                    nn.Conv1d(o, o, 3, stride=2, padding=1) if o_is_not_last else nn.Identity(),
                ]
            )
            for (i, o), o_is_not_last in zip(levels, [True] * (len(levels) - 1) + [False], strict=True)
        )
        self.middle = nn.ModuleList([ResidualBlock(sizes[-1], sizes[-1], embed_dim) for _ in range(2)])
        self.up = nn.ModuleList(
            nn.ModuleList(
                [
                    ResidualBlock(2 * o, i, embed_dim),
                    ResidualBlock(i, i, embed_dim),
                    nn.ConvTranspose1d(i, i, 4, stride=2, padding=1),
                ]
            )
            for i, o in reversed(levels[1:])
        )
        self.head_conv, self.head_norm = TemporalConv(width * multipliers[0], width), TemporalNorm(8, width)
        self.head = nn.Linear(width, channels)

    def forward(self, x, k, return_to_go, keep):
        angle = k[:, None] * self.frequencies
        embedding = [self.embed_k(torch.cat([angle.sin(), angle.cos()], 1)), self.embed_return(return_to_go) * keep]
        embedding = mish(torch.cat(embedding, dim=1))
        x, skips = x.transpose(0, 1), []  # time first: [L, B, channels]
        for block1, block2, shorten in self.down:
            x = block2(block1(x, embedding), embedding)
            skips.append(x)
            x = shorten(x.permute(1, 2, 0)).permute(2, 0, 1)
        for block in self.middle:
            x = block(x, embedding)
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=2)
            x = lengthen(block2(block1(x, embedding), embedding).permute(1, 2, 0)).permute(2, 0, 1)
        return self.head(mish(self.head_norm(self.head_conv(x)))).transpose(0, 1)


class DecisionDiffuser(nn.Module):
    """p(next states | state, return-to-go) and p(action | state, next state) [DD], in the diffusion's units.

    A plan x [B, plan_horizon, obs_dim] is normalised. Its first state is known, not generated: it is overwritten
    before every network call [DD Alg. 1].
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, obs_dim, action_dim = args, windows.obs.shape[1], windows.action.shape[1]
        self.obs_units = Normalizer(windows.obs, args.normalizer)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.diffusion_steps).float())
        self.denoiser = TemporalUNet(obs_dim, args.unet_width, args.unet_multipliers)
        if args.compile:  # on a GPU as CUDA graphs
            self.denoiser.compile(mode="default" if windows.obs.device.type == "cpu" else "reduce-overhead")
        self.inverse_dynamics = InverseDynamics(args, obs_dim, action_dim)

    def pin(self, x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """x with its first states [B, obs_dim] put back (in place)."""
        x[:, 0] = first
        return x

    def q_sample(self, x0: torch.Tensor, k: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noised window x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise [DD], k [B] in 1..K."""
        alpha_bar = self.alpha_bar[k][:, None, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def losses(self, x0, action, return_to_go, keep) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared errors of prediction and action [DD]; the training minimises their mean [DD code].

        The first is over all but the known first state; the second over all pairs of the window between which an
        action is known: action [B, plan_horizon, action_dim] has NaN elsewhere. [deviation] DD's code takes all pairs
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
def sample_plans(args: Args, model: DecisionDiffuser, first, return_to_go, noises, previous=None) -> torch.Tensor:
    """Plans [B, plan_horizon, obs_dim] from first states [B, obs_dim] and return_to_go [B, 1], normalised [DD Alg. 1].

    `noises` is an iterator of standard normal tensors like the plan. `previous` are the plans of the step before, for
    a warm start: they are shifted by one step (DD does not say whether its are), noised, and denoised from there.
    """
    batch, low, high = len(first), model.obs_units.low, model.obs_units.high
    alpha_bar = cosine_alpha_bar(args.diffusion_steps)
    steps = strided_steps(args.diffusion_steps, args.sampling_steps)
    coefficients = posterior_coefficients(alpha_bar, steps)
    if previous is None:
        x = args.initial_temperature * next(noises)
    else:
        steps = [k for k in steps if k <= args.warm_start_steps]
        shifted = torch.cat([previous[:, 1:], previous[:, -1:]], dim=1)
        x = model.q_sample(shifted, torch.full((batch,), steps[-1], device=first.device), next(noises))
    # Both guidance branches, with and without return-to-go, go through the network as one batch.
    return_to_go = torch.cat([return_to_go, return_to_go])
    keep = (torch.arange(2 * batch, device=first.device) < batch).float()[:, None]
    for k, (weight_x0, weight_x_k, std) in reversed([*zip(steps, coefficients)]):
        model.pin(x, first)
        k_batch = torch.full((2 * batch,), k, device=first.device)
        cond, uncond = model.denoiser(torch.cat([x, x]), k_batch, return_to_go, keep).chunk(2)
        prediction = uncond + args.guidance_scale * (cond - uncond)  # [DD Eq. 8], its omega = 1 + [CFG]'s w
        x0 = prediction
        if args.prediction == "noise":
            # At k = K this multiplies the network's error by 103 (K=5): the clamp makes the first step usable.
            x0 = (x - (1 - alpha_bar[k]).sqrt().item() * prediction) / alpha_bar[k].sqrt().item()
        x0 = model.pin(x0.clamp(low, high), first)
        std = args.sampling_temperature * std  # 0 at the last step
        x = weight_x0 * x0 + weight_x_k * x + std * next(noises)
    return model.pin(x, first)


def train_decision_diffuser(args: Args, windows: Windows, run: Run) -> DecisionDiffuser:
    """Fit denoiser and inverse dynamics together [DD]; the returned model carries the averaged weights."""
    kept = Kept(run, "decision diffuser", train_decision_diffuser)
    run.seed("decision_diffuser", args.seed)
    model = DecisionDiffuser(args, windows).to(run.device)
    if kept.tensors is not None:
        model.load_state_dict(kept.tensors)
        return model.eval()
    ema_model = copy.deepcopy(model)
    parameters, ema_parameters = list(model.parameters()), list(ema_model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    held_out = windows.held_out(args.world_model_holdout, args.seed)
    train = (windows.usable & ~held_out).nonzero()[:, 0]
    if not len(train):
        raise UserError(f"--world-model-holdout {args.world_model_holdout} keeps every long episode away; lower it")
    normalized = model.obs_units.normalize(windows.obs)  # once, not for every batch
    with run.stage("decision diffuser", args.world_model_steps, "update", (model, ema_model, optimizer)) as stage:
        for step in stage:
            index = train[torch.randint(len(train), (args.world_model_batch_size,), device=run.device)]
            rows = windows.rows(index)
            keep = (torch.rand(len(index), 1, device=run.device) >= args.cond_drop_prob).float()
            target = windows.return_to_go[index, None]
            state_loss, action_loss = model.losses(normalized[rows], windows.action[rows], target, keep)
            optimizer.zero_grad()
            ((state_loss + action_loss) / 2).backward()
            optimizer.step()
            if step % args.ema_every == 0:
                with torch.no_grad():
                    rate = 1 - args.ema_decay if step > args.ema_start else 1.0
                    torch._foreach_lerp_(ema_parameters, parameters, rate)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": state_loss, "idm/loss": action_loss})
    if args.world_model_steps >= args.ema_every:
        model.load_state_dict(ema_model.state_dict())
    kept.keep(model.state_dict())
    return model.eval()


def measure_plans(args: Args, model: DecisionDiffuser, windows: Windows, run: Run) -> None:
    """Log root mean squared errors on held-out windows: of plans, in standard deviations of the data, at their first,
    middle and last new state, each asked for its window's own return-to-go; of the actions that the planner would take
    on them; and of actions between real states (mean squared).

    Later states, and actions, depend on the behaviour policy's noise too, which nothing can predict.
    """
    held_out = windows.held_out(args.world_model_holdout, args.seed)
    index = (windows.fits & held_out).nonzero()[:, 0]
    if not len(index):
        return
    run.seed("measure", args.seed)
    index = index[torch.linspace(0, len(index) - 1, 1024, device=index.device).long()]
    rows = windows.rows(index)
    x0 = model.obs_units.normalize(windows.obs[rows])
    plans = sample_plans(
        args, model, x0[:, 0], windows.return_to_go[index, None], standard_normal(x0.shape, run.device)
    )
    error = (model.obs_units.denormalize(plans) - windows.obs[rows]) / (windows.obs.std(0) + 1e-6)
    with torch.no_grad():
        action_error = model.inverse_dynamics(x0[:, :-1], x0[:, 1:]) - windows.action[rows][:, :-1]
        planned_error = model.inverse_dynamics(plans[:, 0], plans[:, 1]) - windows.action[rows][:, 0]
    steps = sorted({1, args.plan_horizon // 2, args.plan_horizon - 1})
    errors = {f"world_model/val_obs_error_step{i}": error[:, i].square().mean().sqrt() for i in steps}
    errors["world_model/val_action_error"] = planned_error.square().mean().sqrt()
    run.log(args.world_model_steps, errors | {"idm/val_mse": action_error.square().mean()})


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


def standard_normal(shape, device: torch.device, seed: int | None = None):
    """Endless standard normal tensors, from a stream of their own if a seed is given."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    while True:
        yield torch.randn(shape, device=device, generator=generator)


class Planner:
    """A policy that plans anew at every environment step, for all episodes of the evaluator at once [DD Alg. 1].

    Noise is drawn for all episodes and given to those that still run: so an episode's plans do not depend on how long
    the others last.
    """

    def __init__(self, args: Args, model: DecisionDiffuser, episodes: int, device: torch.device):
        self.args, self.model, self.device = args, model, device
        shape = (episodes, args.plan_horizon, len(model.obs_units.low))
        self.noises = standard_normal(shape, device, args.seed)
        self.plans = torch.zeros(shape, device=device)
        self.target = torch.full((episodes, 1), target_return(args), device=device)
        self.started = False

    @torch.no_grad()
    def __call__(self, obs: np.ndarray, running: np.ndarray) -> np.ndarray:
        """obs [n, obs_dim] of the episodes `running` [n], dataset units -> actions [n, action_dim]."""
        running = torch.as_tensor(running, device=self.device)
        first = self.model.obs_units.normalize(torch.as_tensor(obs, device=self.device))
        noises = (noise[running] for noise in self.noises)
        previous = self.plans[running] if self.args.warm_start_steps and self.started else None
        plans = sample_plans(self.args, self.model, first, self.target[running], noises, previous)
        self.plans[running], self.started = plans, True
        return self.model.inverse_dynamics(plans[:, 0], plans[:, 1]).cpu().numpy()


# Adapted from dawm_td3bc.py: a planner, slow enough for a progress bar
def evaluate(args: Args, model: DecisionDiffuser, evaluator: Evaluator, dataset: OfflineDataset, run: Run) -> float:
    """Mean return of whole episodes; logs it, and the score where one is defined."""
    planner = Planner(args, model, len(evaluator.envs), run.device)
    with run.stage("planning", evaluator.max_steps, "step") as stage:

        def policy(obs: np.ndarray) -> np.ndarray:
            stage.update()
            stage.bar.set_postfix(running=len(obs))
            return planner(obs, evaluator.running)

        returns = evaluator(policy, seed=args.seed + 100)
    mean = float(returns.mean())
    score = normalized_score(dataset.robot, mean)
    run.log(
        args.world_model_steps,
        {"eval/episodic_return": mean, "eval/episodic_return_std": returns.std()}
        | ({} if score is None else {"eval/normalized_score": score}),
    )
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DD Alg. 1]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> float:
    check_args(args)
    run = Run(args)
    with run.timed("data"):
        dataset = load_dataset(args.env_id, args.data_path)
    args.physics = dataset.physics if args.physics == "auto" else args.physics
    evaluator = Evaluator(
        dataset.simulator, args.physics, args.eval_episodes, dataset.simulator_kwargs, dataset.obs.shape[1]
    )
    windows = Windows(args, dataset, run.device)
    run.describe(dataset.facts(), return_scale=windows.return_scale, target_return=target_return(args))
    model = train_decision_diffuser(args, windows, run)
    measure_plans(args, model, windows, run)
    mean_return = evaluate(args, model, evaluator, dataset, run)
    run.finish(score_report(dataset.robot, dataset.returns, [mean_return], evaluator))
    return mean_return


if __name__ == "__main__":
    run_script(main, Args, LAPTOP, PRESETS)
