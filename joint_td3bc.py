"""DAWM without inverse dynamics, with TD3+BC: offline RL on transitions whose actions the diffusion model makes too.

1. A diffusion model learns windows of future states, actions and rewards, given a real state, a real action and the
   return-to-go (section 3).
2. No inverse dynamics model is learned (section 4 is empty).
3. From every real pair (state, action), asked for a return-to-go, the model imagines the next H+1 states and
   rewards and the H actions between them: H+1 complete transitions per pair (section 5).
4. TD3+BC, unmodified, learns from these transitions alone (section 6).
5. The actor runs in the simulator; the model is not needed any more (section 7).

Not in the DAWM paper: our variant, to ask whether completing the actions by inverse dynamics beats generating them
jointly, as [DIFFUSER] does for trajectories and [SYNTHER] for single transitions. All else is dawm_td3bc.py's.

    python joint_td3bc.py --env-id local/hopper/medium-v0 --laptop     # two CPU cores, data made on this machine
    python joint_td3bc.py --env-id hopper-medium-v2                    # paper scale on D4RL, one GPU

What separates it from DAWM: `git diff --no-index dawm_td3bc.py joint_td3bc.py`, or docs/forking.md.

Keys:
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]    Diffusion World Model, arXiv 2402.03570 (DAWM's generator; appendix as reprinted in arXiv 2607.17560)
[DD]     Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[DIFFUSER] Planning with Diffusion for Flexible Behavior Synthesis, arXiv 2205.09991
[SYNTHER]  Synthetic Experience Replay, arXiv 2303.06614
[TD3BC]  A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code
[CFG]    Classifier-Free Diffusion Guidance, arXiv 2207.12598
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule, strided sampling)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: k in DAWM's Eq. 2 is `k` (diffusion step), in its return-to-go `step` (environment time); H is `horizon`;
g_eval `target_return`; omega `guidance_scale`; DAWM's alpha (0.5) `sampling_temperature`, TD3+BC's `bc_alpha`;
tau is the Polyak rate only.
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
from common.evaluation import Evaluator, Stepper, normalized_score, score_report
from common.export import check_export, export_transitions
from common.run import Run, check_range, run_script
from common.stages import Kept, RowFile, resumable


@dataclass
class Args:
    # ---- Run
    env_id: str = "hopper-medium-v2"
    """data set: a D4RL name, local/ROBOT/QUALITY-v0 (made on this machine), or any Minari id"""
    data_path: Path | None = None
    """a file in D4RL's HDF5 layout to read instead of the published one"""
    laptop: bool = False
    """defaults for two CPU cores and ten minutes instead of the paper's; any flag given still wins"""
    seed: int = 0
    """seed of the agent; world model and synthesis have their own"""
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
    """world models and synthetic sets are kept here, for every run that would make the same"""
    fresh: bool = False
    """make every stage anew, whatever is kept"""
    checkpoint_every: float = 5.0
    """minutes between two checkpoints of a stage, from which an interrupted run goes on; 0 makes none"""

    # ---- Data: windows and return-to-go
    horizon: int = 7
    """H: a rollout has H+1 transitions, so H+2 states, the first one real [DAWM Sec. 4]"""
    model_horizon: int = 7
    """H of the world model's windows, of H+2 tokens [unspecified]; rollouts may take fewer of their steps [DWM]"""
    gamma: float = 0.99
    """discount of return-to-go and agent [DAWM Tab. 7]"""
    return_to_go: Literal["episode", "window"] = "episode"
    """sum rewards to the episode's end, or over the window's H+1 as printed; [deviation] see RETURN-TO-GO below"""
    window_padding: Literal["absorbing", "none"] = "absorbing"
    """go on after a fall with its last state and a reward that tells, or use only windows that fit [unspecified]"""
    normalizer: Literal["limits", "gaussian", "cdf"] = "limits"
    """units of the diffusion; [deviation] DWM takes the empirical CDF (cdf), whose first step errs more (README)"""

    # ---- World model
    world_model_seed: int = 100
    """seed of the diffusion training [DAWM Tab. 7]"""
    world_model_steps: int = 2_000_000
    """gradient updates [DAWM App.]"""
    world_model_batch_size: int = 64
    """windows per update [DAWM Tab. 7]"""
    world_model_lr: float = 1e-4
    """Adam's rate [DAWM Tab. 7]"""
    world_model_holdout: float = 0.05
    """share of episodes kept from the training, to measure the error of rollouts [unspecified]"""
    unet_width: int = 128
    """channels of the U-Net's first level; [unspecified] in DAWM and DWM, DD's code"""
    unet_multipliers: tuple[int, ...] = (1, 4, 8)
    """channels of each level in units of the width; [unspecified], DD's code"""
    diffusion_steps: int = 5
    """K [DAWM Tab. 7]"""
    prediction: Literal["noise", "x0"] = "noise"
    """what the U-Net predicts: noise [DAWM Eq. 2], or the clean window, which is not in the paper"""
    cond_drop_prob: float = 0.25
    """share of samples trained without return-to-go [DAWM App.]"""
    ema_decay: float = 0.995
    """of the averaged weights ("Adam decay") [DAWM Tab. 7]"""
    ema_every: int = 10
    """updates between two averagings [DWM App.]"""
    ema_start: int = 2_000
    """updates before which the average is a plain copy; [unspecified], DD's code"""
    compile: bool = False
    """torch.compile for the U-Net: minutes to start, then faster (docs/speed.md); needs a C++ compiler"""

    # ---- Synthesis
    synthesis: Literal["dataset", "online"] = "dataset"
    """generate once and train on the set [DAWM text], or inside the agent's loop [DAWM Alg. 2]"""
    synthesis_seed: int = 100
    """seed of the sampling noise in dataset mode [unspecified]"""
    synthesis_batch_size: int = 4096
    """rollouts generated together in dataset mode [unspecified]"""
    sampling_steps: int = 3
    """N denoising steps out of K [DAWM App.]"""
    sampling_temperature: float = 0.5
    """multiplies the standard deviation of each denoising step [DAWM Tab. 7, DWM]"""
    guidance_scale: float = 1.2
    """weight of the return condition, 1 is no guidance; [unspecified] in DAWM and DWM, DD's code"""
    target_return: float | Literal["own"] | None = None
    """return-to-go asked for, in return scales; default from TASKS [unspecified]; own: each pair's real one"""
    conditioning_subsample: int = 1
    """use one of so many real pairs, drawn at random; 8 is DAWM-T [DAWM Tab. 5]"""
    termination: Literal["rule", "none"] = "rule"
    """end a rollout by the simulator's rule on its states or the model's own sign; none as printed [deviation]"""
    synthetic_fraction: float = 1.0
    """share of synthetic transitions in a batch [DAWM Tab. 4]; 0 is the agent on the real data, without any model"""
    export_hdf5: Path | None = None
    """write the synthetic set to this new file in D4RL's HDF5 layout, each rollout an episode"""
    export_minari: str | None = None
    """write it as a new Minari data set NAMESPACE/NAME-vN: minutes, which reading takes too (README, Export)"""

    # ---- Agent
    agent_updates: int = 1_000_000
    """critic updates; [unspecified], TD3BC's code"""
    agent_batch_size: int = 256
    """transitions per update; [unspecified], TD3BC's code"""
    agent_lr: float = 3e-4
    """Adam's rate of actor and critics; [unspecified], TD3BC's code"""
    tau: float = 0.005
    """Polyak rate of the target networks; [unspecified], TD3BC's code"""
    policy_noise: float = 0.2
    """standard deviation of the target action's noise, in units of the action range's half; 0 as printed [deviation]"""
    noise_clip: float = 0.5
    """bound of that noise [TD3BC]"""
    policy_delay: int = 2
    """critic updates per actor update, n [TD3BC]; with --synthesis online, rollouts per actor update"""
    bc_alpha: float = 2.5
    """weight of Q against behaviour cloning [TD3BC Eq. 5]"""

    # ---- Evaluation
    eval_every: int = 5_000
    """critic updates between two evaluations [TD3BC]"""
    eval_episodes: int = 10
    """episodes per evaluation [DWM]"""
    physics: Literal["auto", "d4rl", "stock"] = "auto"
    """capsule masses of the simulator: D4RL's or today's; auto takes what the data set was recorded with"""


# --laptop: the same method with a smaller U-Net and fewer updates, [deviation] throughout; not the paper's scale.
# Three of the changes are of kind, with their evidence in the README: x0 in units of standard deviations, since few
# updates of noise prediction leave coarse rollouts; each pair's own return as the target, since a constant one out of
# reach asks of states about to fall that they recover; and the horizon with the best Hopper score in [DAWM Tab. 6].
LAPTOP = dict(
    horizon=1,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    prediction="x0",
    normalizer="gaussian",
    target_return="own",
    world_model_steps=15_000,
    world_model_lr=1e-3,
    unet_width=32,
    unet_multipliers=(1, 2),
    synthesis_batch_size=1024,
    agent_updates=25_000,
    bc_alpha=1.0,  # Q has grown to half of its height by then, and lambda divides by it (README)
    eval_every=2_500,
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


# Adapted from dawm_td3bc.py: no idm_ arguments
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense, before anything is loaded."""
    counts = "horizon model_horizon diffusion_steps sampling_steps world_model_steps world_model_batch_size "
    counts += "synthesis_batch_size conditioning_subsample agent_updates agent_batch_size "
    check_range(args, 1, math.inf, counts + "policy_delay eval_every eval_episodes log_every ema_every")
    check_range(args, 0, 1, "cond_drop_prob ema_decay gamma tau synthetic_fraction")
    check_range(args, 0, 0.9, "world_model_holdout")
    check_range(args, 0, 2**31, "threads seed world_model_seed synthesis_seed")
    check_range(args, 0, 100, "sampling_temperature guidance_scale policy_noise noise_clip bc_alpha")
    check_range(args, 0, math.inf, "checkpoint_every")
    check_range(args, 1e-8, 1, "world_model_lr agent_lr")
    check_range(args, -100, 100, "target_return")
    if args.horizon > args.model_horizon:
        raise UserError(f"--horizon {args.horizon} is above --model-horizon {args.model_horizon}; raise that too")
    if args.sampling_steps > args.diffusion_steps:
        raise UserError(f"--sampling-steps {args.sampling_steps} is above --diffusion-steps {args.diffusion_steps}")
    if args.synthesis == "online" and (args.conditioning_subsample > 1 or 0 < args.synthetic_fraction < 1):
        raise UserError(
            "--synthesis online draws from all pairs and mixes nothing: no --conditioning-subsample, and a "
            "--synthetic-fraction of 0 or 1; use --synthesis dataset"
        )
    if args.unet_width % 8 or args.unet_width < 8 or min(args.unet_multipliers, default=0) < 1:
        raise UserError(f"--unet-width {args.unet_width} must be 8, 16, ... and --unet-multipliers positive")
    check_export(args)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: episodes to windows, return-to-go
# ---------------------------------------------------------------------------------------------------------------------
# RETURN-TO-GO. [deviation] DAWM prints a sum over the window's H+1 rewards, but its divisor (400 for Hopper) only fits
# sums to the episode's end: eight rewards give 25; [DWM App.] plots labels up to 0.61 x 400 = 244 for hopper-medium.


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


# Adapted from dawm_td3bc.py: tokens hold actions too
class Windows:
    """All windows of H+2 states, H+1 actions and rewards, one for each real pair (state, action); gathered when asked.

    H is model_horizon. Token i of a window holds state, action and reward at step i; the last token's action and reward
    slots are 0. No window crosses an episode's end. A fallen episode goes on with its last state (the simulator would
    stop there): else no window would start within H steps of a fall, and the model could not learn what happens next.
    Its reward lies below all real ones by a quarter of their range, so that generated ends can be told (`is_over`),
    and its action is 0 [unspecified].
    UserError if no episode is long enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each row
        last = np.cumsum(dataset.lengths) - 1  # last row of each episode
        # One token per state: an episode of T transitions has T+1 of them, so its rows shift by its number.
        obs = np.insert(dataset.obs, last + 1, dataset.next_obs[last], axis=0)
        start, final = np.arange(len(episode)) + episode, (last + 1 + np.arange(len(last)))[episode]
        fits = start + args.model_horizon + 1 <= final
        if not fits.any():
            raise UserError(
                f"--model-horizon {args.model_horizon} needs {args.model_horizon + 1} transitions in a row, but the "
                f"longest episode has {dataset.lengths.max()}; lower it and the rollouts' horizon"
            )
        if len(last) < 2:
            raise UserError(f"{args.env_id} has one episode; held-out measurements need two or more")
        usable = fits | dataset.terminated[last][episode] if args.window_padding == "absorbing" else fits
        low, high = float(dataset.reward.min()), float(dataset.reward.max())
        self.end_reward, self.end_margin = low, -math.inf
        if (usable & ~fits).any():  # else no window shows an end, and nothing that is generated may count as one
            self.end_reward, self.end_margin = low - (high - low) / 4, low - (high - low) / 8
        reward = np.insert(dataset.reward, last + 1, self.end_reward)
        return_to_go = discounted_return_to_go(dataset.reward, dataset.lengths, args.gamma)
        if args.return_to_go == "window":
            beyond = np.append(return_to_go, 0)[
                np.minimum(np.arange(len(episode)) + args.model_horizon + 1, len(episode))
            ]
            inside = np.arange(len(episode)) + args.model_horizon + 1 <= last[episode]
            return_to_go = return_to_go - args.gamma ** (args.model_horizon + 1) * beyond * inside
        self.return_scale = return_scale(args, return_to_go.max())

        def tensor(array):
            return torch.as_tensor(array, device=device)

        self.obs, self.reward = tensor(obs), tensor(reward)
        self.start, self.final = tensor(start), tensor(final)
        self.action = tensor(dataset.action)
        self.token_action = tensor(np.insert(dataset.action, last + 1, 0, axis=0))
        self.return_to_go = tensor((return_to_go / self.return_scale).astype(np.float32))
        self.usable, self.fits, self.episode = tensor(usable), tensor(fits), tensor(episode)
        self.offsets = torch.arange(args.model_horizon + 2, device=device)

    def held_out(self, share: float, seed: int) -> torch.Tensor:
        """Mask [N] of the windows in a random share of the episodes."""
        episodes = int(self.episode[-1]) + 1
        order = torch.randperm(episodes, generator=torch.Generator().manual_seed(seed))
        count = min(math.ceil(share * episodes), episodes - 1)  # something must be left to train on
        return torch.isin(self.episode, order[:count].to(self.episode.device))

    def is_over(self, reward: torch.Tensor) -> torch.Tensor:
        """Whether generated rewards say that the episode had ended before their step -> bool."""
        return reward < self.end_margin

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of obs, token_action and reward that make up the windows `index` [B] -> [B, H+2]."""
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


# Adapted from dawm_td3bc.py: its size, with more channels
class TemporalUNet(nn.Module):
    """Denoiser of a window x [B, L, channels], given diffusion step k [B], action [B, action_dim], return-to-go [B, 1].

    `keep` [B, 1] is 1 or 0: a dropped return-to-go has a zero embedding [DD code]. Output [B, L, channels].
    60,720,271 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, action_dim: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()

        def mlp3(in_dim):  # condition networks of three layers [DAWM App.]
            return nn.Sequential(
                nn.Linear(in_dim, width), nn.Mish(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
            )

        self.embed_k = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.embed_action, self.embed_return = mlp3(action_dim), mlp3(1)
        half = width // 2
        self.register_buffer("frequencies", torch.exp(torch.arange(half) * -math.log(10_000) / (half - 1)))
        embed_dim = 3 * width
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

    def forward(self, x, k, action, return_to_go, keep):
        angle = k[:, None] * self.frequencies
        embedding = [self.embed_k(torch.cat([angle.sin(), angle.cos()], 1)), self.embed_return(return_to_go) * keep]
        embedding = mish(torch.cat([*embedding, self.embed_action(action)], dim=1))
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
            x = x[: len(skips[-1])]  # 9 tokens become 5, then 10: the last is cropped [unspecified]
        return self.head(mish(self.head_norm(self.head_conv(x)))).transpose(0, 1)


# Adapted from dawm_td3bc.py: actions are further channels, the first one known
class WorldModel(nn.Module):
    """p(next states, next actions, rewards | state, action, return-to-go): a denoiser and the units it works in.

    [deviation] [DAWM Eq. 1] has no next actions. The window x [B, H+2, obs_dim + action_dim + 1] is normalised. Two
    places in it are known, not generated: the first state and action, overwritten before every network call
    [DD Alg. 1], and the last action and reward slots, which no data defines, kept 0. The first action stays a condition
    of the denoiser too, which is DAWM's but for its channels [unspecified].
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.obs_dim, self.action_dim = windows.obs.shape[1], windows.action.shape[1]
        self.args = args
        self.obs_units = Normalizer(windows.obs, args.normalizer)
        self.action_units = Normalizer(windows.action, args.normalizer)
        self.reward_units = Normalizer(
            windows.reward[:, None], "gaussian" if args.normalizer == "gaussian" else "limits"
        )
        self.register_buffer("low", torch.cat([self.obs_units.low, self.action_units.low, self.reward_units.low]))
        self.register_buffer("high", torch.cat([self.obs_units.high, self.action_units.high, self.reward_units.high]))
        alpha_bar = cosine_alpha_bar(args.diffusion_steps)
        self.register_buffer("alpha_bar", alpha_bar.float())
        self.denoiser = TemporalUNet(len(self.low), self.action_dim, args.unet_width, args.unet_multipliers)
        if args.compile:  # on a GPU as CUDA graphs
            self.denoiser.compile(mode="default" if windows.obs.device.type == "cpu" else "reduce-overhead")

    def normalize(self, obs: torch.Tensor, action: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
        """obs [..., obs_dim], action [..., action_dim], reward [...] in dataset units -> tokens [..., channels]."""
        tokens = self.obs_units.normalize(obs), self.action_units.normalize(action)
        return torch.cat([*tokens, self.reward_units.normalize(reward[..., None])], dim=-1)

    def pin(self, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """x with the known places of the clean window x0 put back (in place)."""
        x[:, 0, :-1] = x0[:, 0, :-1]
        x[:, -1, self.obs_dim :] = 0
        return x

    def q_sample(self, x0: torch.Tensor, k: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noised window x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise [DAWM Eq. 2], k [B] in 1..K."""
        alpha_bar = self.alpha_bar[k][:, None, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def loss(self, x0, action, return_to_go, keep) -> torch.Tensor:
        """Mean squared error of the prediction over all but the known places [DAWM Eq. 2].

        [deviation] Eq. 2 drops the whole condition; as in [DWM App.] only the return-to-go is dropped (`keep` 0), so
        that guidance pushes the return and leaves the rollout tied to its state and action.
        """
        k = torch.randint(1, len(self.alpha_bar), (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        x_k = self.pin(self.q_sample(x0, k, noise), x0)
        prediction = self.denoiser(x_k, k, action, return_to_go, keep)
        error = prediction - (noise if self.args.prediction == "noise" else x0)
        error = self.pin(error, torch.zeros_like(error))
        return error.square().sum() / (error.numel() - len(error) * (self.obs_dim + 2 * self.action_dim + 1))


# Adapted from dawm_td3bc.py: actions are sampled with the states
@torch.no_grad()
def sample_rollouts(
    args: Args, world_model: WorldModel, obs, action, return_to_go
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rollouts from obs [B, obs_dim], action [B, action_dim], return_to_go [B, 1] (in units of the return scale).

    Returns obs [B, H+2, obs_dim] and action [B, H+1, action_dim], whose first are the given ones to the bit, and reward
    [B, H+1], dataset units (H: model_horizon).
    """
    batch, obs_dim, low, high = len(obs), obs.shape[1], world_model.low, world_model.high
    known = torch.zeros(batch, args.model_horizon + 2, len(low), device=obs.device)
    known[:, 0, :obs_dim] = world_model.obs_units.normalize(obs)
    known[:, 0, obs_dim:-1] = world_model.action_units.normalize(action)
    # Both guidance branches, with and without return-to-go, go through the network as one batch.
    action, return_to_go = torch.cat([action, action]), torch.cat([return_to_go, return_to_go])
    keep = (torch.arange(2 * batch, device=obs.device) < batch).float()[:, None]
    alpha_bar = cosine_alpha_bar(args.diffusion_steps)
    steps = strided_steps(args.diffusion_steps, args.sampling_steps)
    x = torch.randn_like(known)  # [DWM App.]; DD's code starts from half of it
    for k, (weight_x0, weight_x_k, std) in reversed(
        [*zip(steps, posterior_coefficients(alpha_bar, steps), strict=True)]
    ):
        world_model.pin(x, known)
        k_batch = torch.full((2 * batch,), k, device=obs.device)
        cond, uncond = world_model.denoiser(torch.cat([x, x]), k_batch, action, return_to_go, keep).chunk(2)
        prediction = uncond + args.guidance_scale * (cond - uncond)  # [DD Eq. 8], its omega = 1 + [CFG]'s w
        x0 = prediction
        if args.prediction == "noise":
            # At k = K this multiplies the network's error by 103 (K=5): the clamp makes the first step usable.
            x0 = (x - (1 - alpha_bar[k]).sqrt().item() * prediction) / alpha_bar[k].sqrt().item()
        x0 = world_model.pin(x0.clamp(low, high), known)
        std = args.sampling_temperature * std  # scales std, not variance [DWM]; 0 at the last step
        x = weight_x0 * x0 + weight_x_k * x + std * torch.randn_like(x)
    rollout = torch.cat([obs[:, None], world_model.obs_units.denormalize(x[:, 1:, :obs_dim])], dim=1)
    actions = [action[:batch, None], world_model.action_units.denormalize(x[:, 1:-1, obs_dim:-1])]
    return rollout, torch.cat(actions, dim=1), world_model.reward_units.denormalize(x[:, :-1, -1:])[..., 0]


# Adapted from dawm_td3bc.py: tokens hold actions too
def train_world_model(args: Args, windows: Windows, run: Run) -> WorldModel:
    """Fit the denoiser by Eq. 2, or by its x0 form; the returned model carries the averaged weights [DWM App.]."""
    kept = Kept(run, "world model", train_world_model)
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, windows).to(run.device)
    if kept.tensors is not None:
        world_model.load_state_dict(kept.tensors)
        return world_model
    ema_denoiser = copy.deepcopy(world_model.denoiser)
    parameters, ema_parameters = list(world_model.denoiser.parameters()), list(ema_denoiser.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    held_out = windows.held_out(args.world_model_holdout, args.world_model_seed)
    train = (windows.usable & ~held_out).nonzero()[:, 0]
    if not len(train):
        raise UserError(f"--world-model-holdout {args.world_model_holdout} keeps every long episode away; lower it")
    normalized = world_model.normalize(windows.obs, windows.token_action, windows.reward)  # once, not for every batch
    with run.stage("world model", args.world_model_steps, "update", (world_model, ema_denoiser, optimizer)) as stage:
        for step in stage:
            index = train[torch.randint(len(train), (args.world_model_batch_size,), device=run.device)]
            x0 = normalized[windows.rows(index)]
            x0[:, -1, world_model.obs_dim :] = 0
            keep = (torch.rand(len(index), 1, device=run.device) >= args.cond_drop_prob).float()
            loss = world_model.loss(x0, windows.action[index], windows.return_to_go[index, None], keep)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.ema_every == 0:
                with torch.no_grad():
                    rate = 1 - args.ema_decay if step > args.ema_start else 1.0
                    torch._foreach_lerp_(ema_parameters, parameters, rate)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
    if args.world_model_steps >= args.ema_every:
        world_model.denoiser.load_state_dict(ema_denoiser.state_dict())
    kept.keep(world_model.state_dict())
    return world_model


# Adapted from dawm_td3bc.py: the error of the actions too
def measure_world_model(args: Args, world_model: WorldModel, windows: Windows, run: Run) -> None:
    """Log the root mean squared error of rollouts on held-out windows, per step, in standard deviations of the data.

    Each rollout is asked for its window's own return-to-go. Only step 1 measures the model alone: what follows depends
    on the behaviour policy's noise too, which nothing can predict.
    """
    held_out = windows.held_out(args.world_model_holdout, args.world_model_seed)
    index = (windows.fits & held_out).nonzero()[:, 0]
    if not len(index):
        return
    run.seed("measure", args.world_model_seed)
    index = index[torch.linspace(0, len(index) - 1, 2048, device=index.device).long()]
    obs, reward = windows.obs[windows.rows(index)], windows.reward[windows.rows(index)]
    target = windows.return_to_go[index, None]
    made_obs, made_action, made_reward = sample_rollouts(args, world_model, obs[:, 0], windows.action[index], target)
    obs_error = ((made_obs - obs) / (windows.obs.std(0) + 1e-6)).square().mean((0, 2)).sqrt()[1:]
    reward_error = (
        ((made_reward - reward[:, :-1]) / (windows.reward[windows.start].std() + 1e-6)).square().mean(0).sqrt()
    )
    names = [f"world_model/val_{what}_error_step{i + 1}" for what in ("obs", "reward") for i in range(len(obs_error))]
    errors = torch.cat([obs_error, reward_error]).tolist()
    action_error = (made_action - windows.token_action[windows.rows(index)][:, :-1])[:, 1:]  # the first is given
    run.log(
        args.world_model_steps,
        dict(zip(names, errors, strict=True)) | {"world_model/val_action_mse": action_error.square().mean()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. The world model generates the actions with the states.
# ---------------------------------------------------------------------------------------------------------------------

# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: states, actions and rewards to full transitions
# ---------------------------------------------------------------------------------------------------------------------
# A transition is one row: obs, action, reward, next_obs, terminated. One gather then fetches a whole batch.


# Copied from dawm_td3bc.py
def has_fallen(robot: str, obs: torch.Tensor) -> torch.Tensor:
    """The simulator's own rule for the end of an episode, on obs [..., obs_dim] in dataset units -> bool [...]."""
    if robot == "hopper":
        height, angle = obs[..., 0], obs[..., 1]
        return ~((obs[..., 1:].abs() < 100).all(-1) & (height > 0.7) & (angle.abs() < 0.2))
    if robot == "walker2d":
        height, angle = obs[..., 0], obs[..., 1]
        return ~((height > 0.8) & (height < 2.0) & (angle.abs() < 1.0))
    return torch.zeros(obs.shape[:-1], dtype=torch.bool, device=obs.device)  # halfcheetah never ends early


# Copied from dawm_td3bc.py
def real_transitions(dataset: OfflineDataset, device: torch.device) -> torch.Tensor:
    """The data set as rows [N, 2 * obs_dim + action_dim + 2].

    [deviation] Rows at a time limit are kept and bootstrapped, since their successor is known; TD3BC's code skips them.
    """
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs, dataset.terminated[:, None]]
    return torch.as_tensor(np.concatenate(columns, axis=1, dtype=np.float32), device=device)


# Adapted from dawm_td3bc.py: the rollouts bring their actions
class Synthesizer:
    """Turns real pairs into complete synthetic transitions; [deviation] [DAWM Alg. 2] infers the actions."""

    def __init__(self, args: Args, robot: str, windows: Windows, world_model):
        self.args, self.robot, self.windows = args, robot, windows
        self.world_model = world_model

    def __call__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rollouts from the real pairs `index` [B]: rows [B, H+1, row_dim], and valid [B, H+1], false after a fall."""
        args, windows = self.args, self.windows
        target = target_return(args)
        if target == "own":
            target = windows.return_to_go[index, None]
        else:  # [DAWM Alg. 2]: one g_eval for every pair
            target = torch.full((len(index), 1), target, device=index.device)
        obs, action = windows.obs[windows.start[index]], windows.action[index]
        obs, action, reward = sample_rollouts(args, self.world_model, obs, action, target)
        # [deviation] The boxes have no (1 - terminated); without it no critic learns that a fall ends the rewards. The
        # simulator's rule alone misses falls that end just inside its limits, and values can then grow without bound
        # on the frozen states that follow (README).
        over = windows.is_over(reward)
        terminated = has_fallen(self.robot, obs[:, 1:])
        terminated[:, :-1] |= over[:, 1:]
        terminated = terminated[:, : args.horizon + 1] & (args.termination == "rule")
        obs, reward = obs[:, : args.horizon + 2], reward.masked_fill(over, 0)[:, : args.horizon + 1]
        action = action[:, : args.horizon + 1]
        ended_before = torch.cumsum(terminated, 1) - terminated.int() > 0
        rows = [obs[:, :-1], action, reward[..., None], obs[:, 1:], terminated[..., None]]
        return torch.cat(rows, dim=-1), ~ended_before


# Adapted from dawm_td3bc.py: builds on the world model alone
def synthesize(args: Args, synthesizer: Synthesizer, run: Run) -> torch.Tensor:
    """One rollout for every real pair, or one of conditioning_subsample of them -> rows [M, row_dim]."""
    kept = Kept(run, "synthesis", synthesize, after=("world model",))
    if kept.tensors is not None:
        return kept.tensors["transitions"]
    run.seed("synthesis", args.synthesis_seed)
    pairs = len(synthesizer.windows.start)
    chosen = torch.randperm(pairs, device=run.device)[: max(1, pairs // args.conditioning_subsample)]
    obs_dim, action_dim = synthesizer.world_model.obs_dim, synthesizer.windows.action.shape[1]
    stored = RowFile(run, "synthesis", 2 * obs_dim + action_dim + 2)
    made = {"at_bounds": 0.0, "falls": 0.0}
    inference = torch.inference_mode(not args.compile)  # it and CUDA graphs do not mix: pytorch issue 135892
    with inference, run.stage("synthesis", len(chosen), "pair", (made, stored)) as stage:
        for index in stage.over(chosen.split(args.synthesis_batch_size)):
            rows, valid = synthesizer(index)
            stored.append(rows[valid])
            at_bounds = rows[:, 1:, obs_dim : obs_dim + action_dim].abs() > 0.999
            made["at_bounds"] += at_bounds.float().mean() * len(index)
            made["falls"] += rows[..., -1].amax(1).sum()
    transitions = stored.tensor(run.device)
    run.log(
        0,
        {
            "synthesis/transitions": len(transitions),
            "synthesis/mean_reward": transitions[:, -2 - obs_dim].mean(),
            "synthesis/action_clip_fraction": made["at_bounds"] / len(chosen),
            "synthesis/fall_fraction": made["falls"] / len(chosen),
        },
    )
    return kept.keep({"transitions": transitions})["transitions"]


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
class TD3BC:
    """Actor, twin critics and their targets; `update` is one step of [DAWM Alg. 2] in the working form of [TD3BC]."""

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        self.args, obs_dim = args, obs.shape[1]
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]  # of a row's parts
        units = obs.mean(0), obs.std(0) + 1e-3, action_dim  # of the real data, for synthetic data too [TD3BC Sec. 5]
        self.actor, self.qf1, self.qf2 = (net(*units).to(obs.device) for net in (Actor, Critic, Critic))
        self.actor_target, self.qf1_target, self.qf2_target = map(copy.deepcopy, (self.actor, self.qf1, self.qf2))
        self.qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_parameters = list(self.actor.parameters())
        self.parameters = self.actor_parameters + self.qf_parameters
        targets = (self.actor_target, self.qf1_target, self.qf2_target)
        self.target_parameters = [parameter for net in targets for parameter in net.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.agent_lr, fused=True)
        self.qf_optimizer = torch.optim.Adam(self.qf_parameters, lr=args.agent_lr, fused=True)

    def update(self, batch: torch.Tensor, update_actor: bool) -> dict[str, torch.Tensor]:
        """One critic update on rows [B, row_dim] and, if asked for, one actor and target update. Returns losses."""
        obs, action, reward, next_obs, terminated = batch.split(self.sizes, dim=1)
        target = self.td_target(reward[:, 0], next_obs, terminated[:, 0])
        qf_loss = F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)
        self.qf_optimizer.zero_grad()
        qf_loss.backward(inputs=self.qf_parameters)
        self.qf_optimizer.step()
        losses = {"agent/qf_loss": qf_loss.detach(), "agent/qf_target": target.mean()}
        if update_actor:
            actor_loss, bc_loss = self.actor_loss(obs, action)
            self.actor_optimizer.zero_grad()
            actor_loss.backward(inputs=self.actor_parameters)
            self.actor_optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.target_parameters, self.parameters, self.args.tau)
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
def batches(args: Args, real: torch.Tensor, synthetic: torch.Tensor | None, synthesizer: Synthesizer | None, at: dict):
    """Endless (rows, update_actor): what each critic update learns from, and whether the actor follows it.

    `at` begins as {"count": 0, "h": 0} and is kept up, so that an interrupted run goes on there.
    """
    device = real.device
    while args.synthesis == "online" and args.synthetic_fraction > 0:
        h = at["h"]
        if h == 0:  # [DAWM Alg. 2]: fresh rollouts, then one update per step h = 0..H of them
            at["count"] += 1
            at["rows"], at["valid"] = synthesizer(torch.randint(len(real), (args.agent_batch_size,), device=device))
        at["h"] = (h + 1) % (args.horizon + 1)
        batch = at["rows"][:, h][at["valid"][:, h]]
        if len(batch):
            yield batch, at["count"] % args.policy_delay == 0  # n counts outer iterations, as printed
    num_synthetic = round(args.synthetic_fraction * args.agent_batch_size)
    while True:
        at["count"] += 1
        parts = []
        for source, size in ((synthetic, num_synthetic), (real, args.agent_batch_size - num_synthetic)):
            if size:
                index = torch.randint(len(source), (size,), device=device)
                parts.append(source.index_select(0, index.to(source.device)).to(device))
        yield torch.cat(parts) if len(parts) > 1 else parts[0], at["count"] % args.policy_delay == 0


# Copied from dawm_td3bc.py
def train_agent(args: Args, dataset: OfflineDataset, synthetic, synthesizer, evaluator: Evaluator, run: Run):
    """TD3+BC on synthetic and real rows -> the mean return of every evaluation, in order; keeps the actor."""
    run.seed("agent", args.seed)
    real = real_transitions(dataset, run.device)
    agent = TD3BC(args, real[:, : dataset.obs.shape[1]], dataset.action.shape[1])
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    resumable(run, "agent", train_agent)
    progress = {"losses": {}, "returns": [], "at": {"count": 0, "h": 0}}
    with run.stage("agent", args.agent_updates, "update", (agent, progress)) as stage:
        source = batches(args, real, synthetic, synthesizer, progress["at"])
        for update in stage:
            progress["losses"] |= agent.update(*next(source))
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, progress["losses"])
            if update % args.eval_every == 0 or update == args.agent_updates:
                progress["returns"].append(evaluate(agent.actor, evaluator, dataset, update, run))
                stage.bar.set_postfix(episodic_return=f"{progress['returns'][-1]:.0f}")
    run.save("actor", agent.actor.state_dict())
    return progress["returns"]


# Copied from dawm_td3bc.py
def evaluate(actor: nn.Module, evaluator: Evaluator, dataset: OfflineDataset, update: int, run: Run) -> float:
    """Mean return of whole episodes of the deterministic actor [TD3BC]; logs it, and the score where one is defined."""

    @torch.no_grad()
    def policy(obs: np.ndarray) -> np.ndarray:
        return actor(torch.as_tensor(obs, device=run.device)).cpu().numpy()

    with run.timed("evaluation"):
        returns = evaluator(policy, seed=run.args.seed + 100)  # as TD3BC's code
    mean = float(returns.mean())
    score = normalized_score(dataset.robot, mean)
    run.log(
        update,
        {"eval/episodic_return": mean, "eval/episodic_return_std": returns.std()}
        | ({} if score is None else {"eval/normalized_score": score}),
    )
    return mean


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DAWM Alg. 2]
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
    synthetic = synthesizer = None
    if args.synthetic_fraction > 0:
        windows = Windows(args, dataset, run.device)
        run.describe(dataset.facts(), return_scale=windows.return_scale, target_return=target_return(args))
        world_model = train_world_model(args, windows, run)
        measure_world_model(args, world_model, windows, run)
        synthesizer = Synthesizer(args, dataset.robot, windows, world_model)
        synthetic = synthesize(args, synthesizer, run) if args.synthesis == "dataset" else None
        export_transitions(run, synthetic, args.horizon + 1, dataset, evaluator, Stepper, "joint diffusion")
    else:
        run.describe(dataset.facts())
        run.say("control", "--synthetic-fraction 0: no world model, the agent on the real data")
    returns = train_agent(args, dataset, synthetic, synthesizer, evaluator, run)
    run.finish(score_report(dataset.robot, dataset.returns, returns, evaluator))
    return returns[-1]


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
