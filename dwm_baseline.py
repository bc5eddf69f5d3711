"""DWM: offline RL with TD3+BC or IQL, whose critics learn from returns that a diffusion world model imagines.

1. A diffusion model learns windows of future states and rewards, given a real state, a real action and the
   return-to-go (section 3): the same model as DAWM's, found again if it is kept.
2. No action is filled in (section 4 is empty): a rollout goes on as the behaviour policy would.
3. From every real pair (state, action), asked for a return-to-go, the model imagines H rewards and states (section 5).
4. Their discounted sum and the value of the last state are the critic's target at the real pair; all else in TD3+BC
   or IQL stays as on real data (section 6).
5. The policy runs in the simulator (section 7).

    python dwm_baseline.py --env-id local/hopper/medium-v0 --laptop                # TD3+BC, two CPU cores
    python dwm_baseline.py --env-id local/hopper/medium-v0 --laptop --agent iql    # IQL with lambda-returns
    python dwm_baseline.py --env-id hopper-medium-v2                               # paper scale on D4RL, one GPU

[DWM], DWM-TD3BC and DWM-IQL                    here
train p_theta on the data                       train_world_model
sample real pairs (s_t, a_t)                    train_agent
sample rewards and states, given g_eval         imagine, sample_rollouts, with mark_ends, which is not in the paper
the value of the last state                     TD3BC.target_value, IQL.vf
sum up the critics' target                      imagined_target: mve_target or lambda_return
critic, value, actor and target updates         TD3BC.update, IQL.update

Keys:
[DWM]    Diffusion World Model, arXiv 2402.03570 (equations and appendix as reprinted in arXiv 2607.17560)
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DD]     Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[TD3BC]  A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code
[IQL]    Offline Reinforcement Learning with Implicit Q-Learning, arXiv 2110.06169; its code: gwthomas/IQL-PyTorch
[CFG]    Classifier-Free Diffusion Guidance, arXiv 2207.12598
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule, strided sampling)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has the equations, and the evidence for each choice.

Symbols: DWM's H is `horizon`, its T (tokens) `model_horizon` + 1 here, its lambda `lambda_weight`; k in DAWM's Eq. 2 is
`k` (diffusion step); g_eval `target_return`; omega `guidance_scale`; DWM's alpha (0.5) `sampling_temperature`,
TD3+BC's `bc_alpha`; IQL's tau `expectile`, its beta `awr_beta`; `tau` is the Polyak rate only.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
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
    agent: Literal["td3bc", "iql"] = "td3bc"  # the learner: DWM-TD3BC or DWM-IQL

    # ---- Data: windows and return-to-go
    horizon: Count = 7  # H: imagined rewards in a target, then the value of state H [DWM App.]
    model_horizon: Count = 7  # H of the world model's windows [unspecified]; rollouts may take fewer steps [DWM]
    gamma: Share = 0.99  # discount of return-to-go and agent [DAWM Tab. 7]
    return_to_go: Literal["episode", "window"] = "episode"  # sum to the episode's end [deviation], or as printed

    # ---- World model
    world_model_seed: Seed = 100  # seed of the diffusion training [DAWM Tab. 7]
    world_model_steps: Count = 2_000_000  # gradient updates [DAWM App.]
    world_model_batch_size: Count = 64  # windows per update [DAWM Tab. 7]
    world_model_lr: Rate = 1e-4  # Adam's rate [DAWM Tab. 7], falling to 0 along a cosine [unspecified]
    world_model_holdout: Annotated[float, (0, 0.9)] = 0.05  # share of episodes for the held-out loss [unspecified]
    unet_width: Annotated[int, (8, math.inf)] = 128  # channels of the U-Net's first level [unspecified], DD's code
    unet_multipliers: Annotated[tuple[int, ...], (1, math.inf)] = (1, 4, 8)  # of each level [unspecified], DD's
    outcome_width: Count = 1024  # units of the network from the real pair straight to the window [unspecified]
    diffusion_steps: Count = 5  # K [DAWM Tab. 7]
    loss: Literal["noise", "x0"] = "noise"  # error of the noise [DAWM Eq. 2], or of the clean window: not in the paper
    cond_drop_prob: Share = 0.25  # share of samples trained without return-to-go [DAWM App.]
    ema_decay: Share = 0.995  # of the averaged weights ("Adam decay") [DAWM Tab. 7]
    ema_every: Count = 10  # updates between two averagings [DWM App.]
    ema_start: Annotated[int, (0, math.inf)] = 2_000  # updates with a plain copy instead [unspecified], DD's code

    # ---- Synthesis
    rollouts: Literal["online", "stored"] = "online"  # imagined for each batch [DWM], or once for all: [deviation]
    synthesis_seed: Seed = 100  # seed of the sampling noise of stored rollouts [unspecified]
    synthesis_batch_size: Count = 4096  # rollouts generated together for storing [unspecified]
    sampling_steps: Count = 3  # N denoising steps out of K [DAWM App.]
    sampling_temperature: Amount = 0.5  # multiplies the standard deviation of each denoising step [DAWM Tab. 7, DWM]
    guidance_scale: Amount = 1.2  # weight of the return condition, 1: no guidance; [unspecified], DD's code
    # return-to-go asked for, in return scales; default from TASKS [unspecified]; own: each pair's real one
    target_return: Annotated[float, (-100, 100)] | Literal["own"] | None = None
    termination: Literal["none", "rule"] = "none"  # go on through falls [DWM], or end there (mark_ends) [deviation]

    # ---- Agent
    agent_updates: Count = 500_000  # critic updates [DWM App.]
    agent_batch_size: Count = 128  # real pairs per update [DWM App.]
    agent_lr: Rate = 3e-4  # Adam's rate [DWM App.]; of IQL's policy falling to 0 by a cosine [deviation], IQL's code
    tau: Share = 0.005  # Polyak rate of the target networks [DWM App.]
    policy_delay: Count | None = None  # critic updates per update of actor and targets; default from AGENTS
    lambda_return: bool | None = None  # mix all horizons up to H instead of H alone; default from AGENTS
    lambda_weight: Share = 0.95  # weight of the longer horizon in that mix [DWM App.]
    lambda_base: Literal["corrected", "printed"] = "corrected"  # its start, [deviation]; printed: a reward too many

    # ---- Agent: TD3+BC
    policy_noise: Amount = 0.2  # std of the target action's noise, actions in [-1, 1] [DWM App.]
    noise_clip: Amount = 0.5  # bound of that noise [DWM App.]
    bc_alpha: Amount = 2.5  # weight of Q against behaviour cloning [DWM App.]

    # ---- Agent: IQL
    expectile: Annotated[float, (0.001, 0.999)] = 0.7  # of the value loss [DWM App.]
    awr_beta: Amount = 3.0  # inverse temperature of the policy's weights [DWM App.]
    max_weight: Annotated[float, (1e-8, 1e8)] = 100.0  # cap of the policy's weights [DWM App.]
    policy: Literal["gaussian", "deterministic"] = "gaussian"  # free deviation, or tanh; [deviation] in class IQL
    reward_scaling: bool = True  # times 1000 / (best - worst real return); [unspecified], IQL's code
    normalize_obs: bool = False  # standardise observations [DWM App.]; off as in IQL's code [deviation]


# Where no flag says otherwise [DWM App.].
AGENTS = {"td3bc": dict(policy_delay=2, lambda_return=False), "iql": dict(policy_delay=1, lambda_return=True)}

# --laptop: the same method with a smaller U-Net and fewer updates, [deviation] throughout; not the paper's scale. What
# dawm_td3bc.py and dawm_iql.py have too is as theirs (reasons there), not DWM's 128 pairs, horizon 7 and rollouts that
# go on through falls: what a rollout is used for shall alone tell the methods apart. DWM keeps its targets at real
# pairs and IQL's lambda-returns, for they are the method; its rollouts are stored, as DAWM's are.
LAPTOP = dict(
    horizon=1,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    loss="x0",
    target_return="own",
    world_model_steps=10_000,
    world_model_lr=2e-3,
    unet_width=32,
    unet_multipliers=(1, 2),
    outcome_width=512,
    sampling_steps=5,
    sampling_temperature=1.0,
    guidance_scale=1.0,
    rollouts="stored",
    synthesis_batch_size=1024,
    termination="rule",
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
    agent_batch_size=256,
    normalize_obs=True,  # iql [DWM App.]; without it so few updates leave a poor clone
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


# Adapted from dawm_td3bc.py: its own rollouts
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.horizon > args.model_horizon:
        raise UserError(f"--horizon {args.horizon} is above --model-horizon {args.model_horizon}; raise that too")
    if args.sampling_steps > args.diffusion_steps:
        raise UserError(f"--sampling-steps {args.sampling_steps} is above --diffusion-steps {args.diffusion_steps}")
    if args.unet_width % 8 or not args.unet_multipliers:
        raise UserError(f"--unet-width {args.unet_width} must be 8, 16, ..., with one of --unet-multipliers or more")


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


# Copied from dawm_td3bc.py
class Windows:
    """All windows of H+2 states and H+1 rewards, one for each real pair (state, action); gathered when asked for.

    H is model_horizon. `tokens` [N + E, obs_dim + 1]: what the step from a row brings, the change of state and the
    reward; nothing changes behind an episode's end, which no window crosses. UserError if no episode is long enough, or
    there is but one.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        self.number_states(dataset)
        self.go_on_after_falls(args, dataset)
        self.label_returns(args, dataset)
        self.action = dataset.action
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.as_tensor(value, device=device))
        self.tokens = torch.cat([self.change, self.reward[:, None]], dim=1)
        self.offsets = torch.arange(args.model_horizon + 2, device=device)
        self.healthy = None  # the simulator's rule for falls, where it is known
        if dataset.healthy_low is not None:
            self.healthy = tuple(torch.as_tensor(x, device=device) for x in (dataset.healthy_low, dataset.healthy_high))

    def number_states(self, dataset: OfflineDataset) -> None:
        """obs and change [N + E, obs_dim]: T transitions have T+1 states, so pair i of episode e is row i + e.
        `start` and `final` [N] are the rows of a pair's own state and of its episode's last one."""
        self.episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        self.has_past = np.insert(self.episode[1:] == self.episode[:-1], 0, False)  # whether a state stands before it
        self.last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        self.obs = np.insert(dataset.obs, self.last + 1, dataset.next_obs[self.last], axis=0)
        self.change = np.insert(dataset.next_obs - dataset.obs, self.last + 1, 0, axis=0)
        self.start = np.arange(len(self.episode)) + self.episode
        self.final = (self.last + 1 + np.arange(len(self.last)))[self.episode]

    def go_on_after_falls(self, args: Args, dataset: OfflineDataset) -> None:
        """Which windows are `usable`: those that fit, and those that meet a fall, which go on with its last state.

        The simulator would stop there; else no window would start within H steps of a fall, and the model could not
        learn what happens next. The reward after a fall lies below all real ones by a quarter of their range, so that
        generated ends can be told (`is_over`) [unspecified].
        """
        longest = int(dataset.lengths.max())
        if longest <= args.model_horizon or len(self.last) < 2:
            raise UserError(
                f"--model-horizon {args.model_horizon} needs two episodes, one of {args.model_horizon + 1} steps, not "
                f"{len(self.last)} of up to {longest}; lower it and --horizon (1 or more), or record more"
            )
        fits = self.start + args.model_horizon + 1 <= self.final
        self.usable = fits | dataset.terminated[self.last][self.episode]
        low, high = float(dataset.reward.min()), float(dataset.reward.max())
        self.end_reward, self.end_margin = low, -math.inf
        if (self.usable & ~fits).any():  # else no window shows an end, and nothing that is generated may count as one
            self.end_reward, self.end_margin = low - (high - low) / 4, low - (high - low) / 8
        self.reward = np.insert(dataset.reward, self.last + 1, self.end_reward)

    def label_returns(self, args: Args, dataset: OfflineDataset) -> None:
        """return_to_go [N] from a window's first step on, in units of the return scale."""
        label = discounted_return_to_go(dataset.reward, dataset.lengths, args.gamma)
        if args.return_to_go == "window":  # less what is earned behind the window
            behind = np.arange(len(label)) + args.model_horizon + 1
            inside = behind <= self.last[self.episode]
            label = label - args.gamma ** (args.model_horizon + 1) * np.where(
                inside, np.append(label, 0)[behind * inside], 0
            )
        self.return_offset, self.return_scale = return_units(args, label)
        self.return_to_go = ((label - self.return_offset) / self.return_scale).astype(np.float32)

    def split(self, pairs: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs marked in `pairs` [N]: to train on, and those in a random share of their episodes."""
        episodes = self.episode[pairs].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
        count = min(math.ceil(share * len(episodes)), len(episodes) - 1)  # something must be left to train on
        held_out = torch.isin(self.episode, episodes[order[:count]])
        return (pairs & ~held_out).nonzero()[:, 0], (pairs & held_out).nonzero()[:, 0]

    def is_over(self, reward: torch.Tensor) -> torch.Tensor:
        """Whether generated rewards say that the episode had ended before their step -> bool."""
        return reward < self.end_margin

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of obs and reward that make up the windows `index` [B] -> [B, H+2]."""
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


# Copied from dawm_td3bc.py
class TemporalUNet(nn.Module):
    """Denoiser of a window x [B, L, channels], given diffusion step k [B], pair [B, pair_dim], return-to-go [B, 1].

    `keep` [B, 1] is 1 or 0: a dropped return-to-go has a zero embedding [DD code]. Output [B, L, channels].
    60,718,988 parameters for Hopper at paper scale.
    """

    def __init__(self, channels: int, pair_dim: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()

        def mlp3(in_dim):  # condition networks of three layers [DAWM App.]
            return nn.Sequential(
                nn.Linear(in_dim, width), nn.Mish(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
            )

        self.embed_k = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.embed_pair, self.embed_return = mlp3(pair_dim), mlp3(1)
        half, embed_dim = width // 2, 3 * width
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

    def forward(self, x, k, pair, return_to_go, keep):
        angle = k[:, None] * self.frequencies
        embedding = [self.embed_k(torch.cat([angle.sin(), angle.cos()], 1)), self.embed_return(return_to_go) * keep]
        embedding = self.mish(torch.cat([*embedding, self.embed_pair(pair)], dim=1))  # [B, 3 * width]
        x, skips = x.transpose(1, 2), []  # [B, channels, L]
        for block1, block2, shorten in self.down:
            x = block2(block1(x, embedding), embedding)
            skips.append(x)
            x = shorten(x)  # [B, width * multiplier, L / 2], rounded up; the last level stays
        for block in self.middle:
            x = block(x, embedding)
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = lengthen(block2(block1(x, embedding), embedding))
            x = x[..., : skips[-1].shape[2]]  # 7 tokens become 4, then 8: the last is cropped [unspecified]
        return self.head(self.mish(self.head_norm(self.head_conv(x)))).transpose(1, 2)


# Copied from dawm_td3bc.py
class Denoiser(nn.Module):
    """The U-Net [DD code] and, beside it, `outcome`: from the pair straight to all that follows from it alone.

    [unspecified] Through the U-Net's narrow conditions the next state is learned half as exactly (docs/method.md).
    """

    def __init__(self, args: Args, length: int, channels: int, pair_dim: int):
        super().__init__()
        self.unet = TemporalUNet(channels, pair_dim, args.unet_width, args.unet_multipliers)
        layers = [nn.Linear(pair_dim, args.outcome_width), nn.Mish()]
        layers += [nn.Linear(args.outcome_width, args.outcome_width), nn.Mish()]
        self.outcome = nn.Sequential(*layers, nn.Linear(args.outcome_width, length * channels))

    def forward(self, x, k, pair, return_to_go, keep):  # as the U-Net's
        return self.unet(x, k, pair, return_to_go, keep) + self.outcome(pair).view(x.shape)


# Copied from dawm_td3bc.py
class WorldModel(nn.Module):
    """p(next states, rewards | state, action, return-to-go) [DAWM Eq. 1]: a denoiser and the units it works in.

    Token h of a window x [B, H+1, obs_dim + 1] is what step h brings, normalised: the change of state and the reward.
    [unspecified] In units of the states it would be lost: one step of Hopper moves a position by 0.04 of its standard
    deviation, no more than a denoiser errs. `denoiser` has the averaged weights [DWM App.]; training moves a copy.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, self.obs_dim, action_dim = args, windows.obs.shape[1], windows.action.shape[1]
        self.obs_units = Normalizer(windows.obs)
        self.register_buffer("obs_range", torch.stack([windows.obs.amin(0), windows.obs.amax(0)]))
        self.units = Normalizer(windows.tokens)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.diffusion_steps).float())
        sizes = args.model_horizon + 1, self.obs_dim + 1, self.obs_dim + action_dim
        self.denoiser = fast.on_cpu(Denoiser(args, *sizes), args.compile)

    def pair(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """State and action that a window starts from, as the denoiser takes them [B, obs_dim + action_dim]."""
        return torch.cat([self.obs_units.normalize(obs), action], dim=1)

    def q_sample(self, x0: torch.Tensor, k: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Noised window x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise [DAWM Eq. 2], k [B] in 1..K."""
        alpha_bar = self.alpha_bar[k][:, None, None]
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def loss(self, denoiser: nn.Module, x0, pair, return_to_go, keep) -> torch.Tensor:
        """Mean squared error of the predicted noise [DAWM Eq. 2], or of x0.

        [unspecified] The network says x0: at k = K (of 5) a network's error in the noise would be multiplied by 103.
        [deviation] Eq. 2 drops the whole condition; as in [DWM App.] only the return-to-go is dropped (`keep` 0), so
        that guidance pushes the return and leaves the rollout tied to its state and action.
        """
        k = torch.randint(1, len(self.alpha_bar), (len(x0),), device=x0.device)
        noise = torch.randn_like(x0)
        x_k = self.q_sample(x0, k, noise)
        x0_pred = denoiser(x_k, k, pair, return_to_go, keep)
        if self.args.loss == "x0":
            return F.mse_loss(x0_pred, x0)
        alpha_bar = self.alpha_bar[k][:, None, None]
        noise_pred = (x_k - alpha_bar.sqrt() * x0_pred) / (1 - alpha_bar).sqrt()  # what x0_pred says of the noise
        return F.mse_loss(noise_pred, noise)


# Copied from dawm_td3bc.py
@torch.no_grad()
def sample_rollouts(
    args: Args, world_model: WorldModel, obs, action, return_to_go
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rollouts from obs [B, obs_dim], action [B, action_dim], return_to_go [B, 1] (in units of the return scale).

    Returns obs [B, H+2, obs_dim], whose first is the given one to the bit, and reward [B, H+1], dataset units (H:
    model_horizon).
    """
    units = world_model.units
    # Both guidance branches, with and without return-to-go, go through the network as one batch; at 1 one will do.
    branches = 1 if args.guidance_scale == 1 else 2
    pair, return_to_go = world_model.pair(obs, action).repeat(branches, 1), return_to_go.repeat(branches, 1)
    keep = (torch.arange(len(pair), device=obs.device) < len(obs)).float()[:, None]
    steps = strided_steps(args.diffusion_steps, args.sampling_steps)
    coefficients = posterior_coefficients(cosine_alpha_bar(args.diffusion_steps), steps)
    x = torch.randn(len(obs), args.model_horizon + 1, len(units.low), device=obs.device)  # [DWM App.]; DD's code: half
    for k, (weight_x0, weight_x_k, std) in reversed([*zip(steps, coefficients, strict=True)]):
        k_batch = torch.full((len(pair),), k, device=obs.device)
        x0 = world_model.denoiser(x.repeat(branches, 1, 1), k_batch, pair, return_to_go, keep)
        if branches == 2:
            cond, uncond = x0.chunk(2)
            x0 = uncond + args.guidance_scale * (cond - uncond)  # [DD Eq. 8] in x0; its omega = 1 + [CFG]'s w
        std = args.sampling_temperature * std  # scales std, not variance [DWM]; 0 at the last step
        x = weight_x0 * x0.clamp(units.low, units.high) + weight_x_k * x + std * torch.randn(x.shape, device=x.device)
    change, reward = units.denormalize(x).split([world_model.obs_dim, 1], dim=2)
    following = (obs[:, None] + change.cumsum(1)).clamp(*world_model.obs_range)  # never outside the data's range
    return torch.cat([obs[:, None], following], dim=1), reward[..., 0]


# Copied from dawm_td3bc.py
def train_world_model(args: Args, windows: Windows, run: Run) -> WorldModel:
    """Fit the denoiser by Eq. 2, or by its x0 form."""
    run.seed("world_model", args.world_model_seed)
    world_model = WorldModel(args, windows).to(run.device)
    denoiser = fast.on_cpu(copy.deepcopy(world_model.denoiser), args.compile)
    parameters, averaged = list(denoiser.parameters()), list(world_model.denoiser.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.world_model_steps)  # [unspecified]
    train, held_out = windows.split(windows.usable, args.world_model_holdout, args.world_model_seed)
    normalized = world_model.units.normalize(windows.tokens)  # once for all

    def loss_of(denoiser, index):
        x0 = normalized[windows.rows(index)[:, :-1]]
        pair = world_model.pair(windows.obs[windows.start[index]], windows.action[index])
        keep = (torch.rand(len(index), 1, device=run.device) >= args.cond_drop_prob).float()
        return world_model.loss(denoiser, x0, pair, windows.return_to_go[index, None], keep)

    @torch.no_grad()
    def held_out_loss():
        with torch.random.fork_rng():  # the same windows and noise every time, and none of the training's
            torch.manual_seed(args.world_model_seed)
            return loss_of(world_model.denoiser, held_out[torch.randint(len(held_out), (512,), device=run.device)])

    with run.stage(
        train_world_model, args.world_model_steps, "update", keeps=world_model, saves=(denoiser, optimizer, schedule)
    ) as stage:
        for step in stage:
            loss = loss_of(
                denoiser, train[torch.randint(len(train), (args.world_model_batch_size,), device=run.device)]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % args.ema_every == 0 or step == args.world_model_steps:
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay if step > args.ema_start else 1.0)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {"world_model/loss": loss})
                if len(held_out):
                    run.log(step, {"world_model/val_loss": held_out_loss()})
    return world_model


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none. DWM uses imagined states and rewards only, never an imagined action.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: real pairs to imagined futures
# ---------------------------------------------------------------------------------------------------------------------
# A future of real pairs [B] is a dict: reward [B, H+1] from the pair's own on, ended [B, H+1] and obs
# [B, H+1, obs_dim] of the states that follow (H: model_horizon). The targets take what they need of it.


# Copied from dawm_td3bc.py
def imagine(args: Args, windows: Windows, world_model: WorldModel, index: torch.Tensor):
    """States [B, model_horizon+2, obs_dim] and rewards [B, model_horizon+1] that follow the real pairs `index` [B]."""
    target = target_return(args)
    if target == "own":
        target = windows.return_to_go[index, None]
    else:  # [DAWM Alg. 2]: one g_eval for every pair
        target = torch.full((len(index), 1), target, device=index.device)
    return sample_rollouts(args, world_model, windows.obs[windows.start[index]], windows.action[index], target)


# Adapted from dawm_td3bc.py: of all steps, whatever the horizon; termination is the target's affair
def mark_ends(windows: Windows, obs: torch.Tensor, reward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Not in the paper: whether the episode is over after each step, and reward without its end signs, [B, H+1].

    Over is what the simulator's rule says of the next state, or the model's own sign, a reward below all real ones.
    """
    over = windows.is_over(reward)
    ended = F.pad(over[:, 1:], (0, 1))  # the step before an episode that is over ended it
    if windows.healthy is not None:
        low, high = windows.healthy
        ended |= ~((obs[:, 1:] > low) & (obs[:, 1:] < high)).all(-1)
    return ended, reward.masked_fill(over, 0)


def imagine_futures(args: Args, windows: Windows, world_model, index: torch.Tensor) -> dict[str, torch.Tensor]:
    """What follows the real pairs `index` [B]."""
    obs, reward = imagine(args, windows, world_model, index)
    ended, reward = mark_ends(windows, obs, reward)
    return {"reward": reward, "ended": ended, "obs": obs[:, 1:]}


# Adapted from dawm_td3bc.py: the futures of all pairs, for --rollouts stored
def synthesize(args: Args, windows: Windows, world_model, run: Run) -> dict[str, torch.Tensor]:
    """The future of every real pair, for any horizon, termination and agent.

    They stay in the CPU's memory, 4 * (obs_dim + 1) bytes for each imagined step; the agent takes them to its device.
    """
    run.seed("synthesis", args.synthesis_seed)
    pairs = torch.arange(len(windows.start), device=run.device)
    shape = len(pairs), args.model_horizon + 1
    futures = {"reward": torch.zeros(shape), "ended": torch.zeros(shape, dtype=torch.bool)}
    futures["obs"] = torch.zeros(*shape, world_model.obs_dim)
    with run.stage(synthesize, len(pairs), "pair", keeps=futures, after=("world model",)) as stage:
        for index in stage.over(pairs.split(args.synthesis_batch_size)):
            for name, values in imagine_futures(args, windows, world_model, index).items():
                futures[name][stage.at : stage.at + len(index)] = values
    run.log(0, {"synthesis/fall_fraction": futures["ended"].any(1).float().mean()})
    return futures


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agents: TD3+BC and IQL with imagined multi-step targets
# ---------------------------------------------------------------------------------------------------------------------


def mve_target(reward, ended, last_value, gamma: float) -> torch.Tensor:
    """sum_{h<H} gamma^h r_h + gamma^H V(s_H) -> [B], Diffusion-MVE [DWM].

    reward [B, H] from the real pair on; ended [B, H] of the states 1..H: what follows an end is worth 0; last_value [B]
    of state H. [deviation] DWM has no `ended` (--termination none: all 0).
    """
    alive = torch.cumprod(1 - ended, dim=1)  # at states 1..H
    discount = gamma ** torch.arange(reward.shape[1], device=reward.device)
    reward = reward * torch.cat([torch.ones_like(alive[:, :1]), alive[:, :-1]], dim=1)
    return (reward * discount).sum(1) + gamma ** reward.shape[1] * alive[:, -1] * last_value


def lambda_return(reward, ended, value, gamma: float, weight: float, extra_reward=None) -> torch.Tensor:
    """G_h = r_h + gamma [(1 - weight) V(s_{h+1}) + weight G_{h+1}] down to G_0 -> [B] [DWM Eq. 6.15 of the reprint].

    reward, ended as above; value [B, H] of the states 1..H. weight 1 is Diffusion-MVE, 0 a one-step target.
    [deviation] the printed recursion starts from G_H = r_H + gamma V(s_H), with `extra_reward` r_H [B]: a reward too
    many, with which weight 1 is not Diffusion-MVE. Ours starts from V(s_H).
    """
    result = value[:, -1] if extra_reward is None else extra_reward + gamma * value[:, -1]
    for h in reversed(range(reward.shape[1])):
        result = reward[:, h] + gamma * (1 - ended[:, h]) * ((1 - weight) * value[:, h] + weight * result)
    return result


@torch.no_grad()
def imagined_target(args: Args, future: dict[str, torch.Tensor], value, reward_factor: float = 1.0) -> torch.Tensor:
    """The critic's target at real pairs [B], from their future; `value` maps states [N, obs_dim] to [N]."""
    steps = args.horizon
    reward, states = reward_factor * future["reward"], future["obs"][:, :steps]
    ended = future["ended"][:, :steps].to(reward.dtype) * (args.termination == "rule")
    if not args.lambda_return:
        return mve_target(reward[:, :steps], ended, value(states[:, -1]), args.gamma)
    values = value(states.flatten(0, 1)).view(len(states), steps)
    extra_reward = reward[:, steps] if args.lambda_base == "printed" else None
    return lambda_return(reward[:, :steps], ended, values, args.gamma, args.lambda_weight, extra_reward)


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


# Adapted from dawm_td3bc.py: its critics learn from imagined futures
class TD3BC(nn.Module):
    """Actor, twin critics and their targets; `update` is one step of [DWM], with its TD3+BC.

    obs [N, obs_dim], the real ones, gives the units of the networks [TD3BC Sec. 5].
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        super().__init__()
        self.args = args
        units = obs.mean(0), obs.std(0) + 1e-3, action_dim
        self.actor, self.qf1, self.qf2 = (net(*units).to(obs.device) for net in (Actor, Critic, Critic))
        self.actor_target, self.qf1_target, self.qf2_target = map(copy.deepcopy, (self.actor, self.qf1, self.qf2))
        self.qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.actor_parameters = list(self.actor.parameters())
        targets = (self.actor_target, self.qf1_target, self.qf2_target)
        self.target_parameters = [parameter for net in targets for parameter in net.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.agent_lr, fused=True)
        self.qf_optimizer = torch.optim.Adam(self.qf_parameters, lr=args.agent_lr, fused=True)

    def update(self, obs, action, future: dict[str, torch.Tensor], update_actor: bool) -> dict[str, torch.Tensor]:
        """One critic update on real pairs [B] and, if asked for, one actor and target update. Returns losses."""
        # DWM: imagined rewards and min Q'(s_H, pi'(s_H)), and a step of each critic on its squared error
        target = imagined_target(self.args, future, self.target_value)
        qf_loss = F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)
        self.qf_optimizer.zero_grad()
        qf_loss.backward(inputs=self.qf_parameters)
        self.qf_optimizer.step()
        losses = {"agent/qf_loss": qf_loss.detach(), "agent/qf_target": target.mean()}
        if update_actor:
            # DWM: every n-th time a step of the actor, and all targets follow
            actor_loss, bc_loss = self.actor_loss(obs, action)
            self.actor_optimizer.zero_grad()
            actor_loss.backward(inputs=self.actor_parameters)
            self.actor_optimizer.step()
            with torch.no_grad():
                online = self.actor_parameters + self.qf_parameters
                torch._foreach_lerp_(self.target_parameters, online, self.args.tau)
            losses |= {"agent/actor_loss": actor_loss.detach(), "agent/bc_loss": bc_loss.detach()}
        return losses

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


# Copied from dawm_iql.py
class Policy(nn.Module):
    """Policy: obs [B, obs_dim], dataset units -> its mean action [B, action_dim], what evaluation runs [IQL code].

    A Gaussian whose mean the network gives unbounded, with one free log standard deviation per action dimension; or a
    deterministic policy in [-1, 1].
    """

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor, action_dim: int, kind: str):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean), action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim)) if kind == "gaussian" else None

    def forward(self, obs):
        mean = self.net((obs - self.obs_mean) / self.obs_std)
        return mean if self.log_std is not None else torch.tanh(mean)

    def log_prob(self, obs, action):
        """Log-density of action -> [B]; of the deterministic policy minus the squared distance [IQL code]."""
        if self.log_std is None:
            return -(self(obs) - action).square().sum(1)
        log_std = self.log_std.clamp(-5, 2)
        return (-0.5 * ((action - self(obs)) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)).sum(1)


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


# Copied from dawm_iql.py
def expectile_loss(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1[difference < 0]| difference^2, averaged [IQL Eq. 5].

    [deviation] [DAWM Alg. 3] prints the plain square: then V is the data policy's value, and nothing improves on it.
    """
    return ((difference < 0).float() - expectile).abs().mul(difference.square()).mean()


# Adapted from dawm_iql.py: its critics learn from imagined futures
class IQL(nn.Module):
    """Policy, value, twin critics and their targets; `update` is one step of [DWM], with its IQL.

    obs [N, obs_dim], the real ones, gives the units of the networks.
    [deviation] DWM bounds the policy by a tanh; ours is DAWM-IQL's, so that the targets alone tell the two apart.
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int, reward_factor: float):
        super().__init__()
        self.args, self.reward_factor = args, reward_factor
        mean, std = obs.mean(0), obs.std(0) + 1e-3
        if not args.normalize_obs:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.actor = Policy(mean, std, action_dim, args.policy).to(obs.device)
        self.qf1, self.qf2 = (Critic(mean, std, action_dim).to(obs.device) for _ in range(2))
        self.vf = Value(mean, std).to(obs.device)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.qf_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.agent_lr, fused=True)
        critic_parameters = [*self.qf_parameters, *self.vf.parameters()]
        self.critic_optimizer = torch.optim.Adam(critic_parameters, lr=args.agent_lr, fused=True)
        actor_updates = max(1, args.agent_updates // args.policy_delay)
        self.actor_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, actor_updates)

    def update(self, obs, action, future: dict[str, torch.Tensor], update_actor: bool) -> dict[str, torch.Tensor]:
        """One update of value and critics on real pairs [B] and, if asked for, of targets and policy. Losses."""
        # Both before any network moves, as in IQL's code.
        target = imagined_target(self.args, future, self.vf, self.reward_factor)
        with torch.no_grad():  # the target critics, as in IQL's code; the online ones are printed [deviation]
            q = torch.minimum(self.qf1_target(obs, action), self.qf2_target(obs, action))
        advantage = q - self.vf(obs)
        # DWM: a step of V on its error to min Q'(s, a), and of each critic on its own to the imagined target
        vf_loss = expectile_loss(advantage, self.args.expectile)
        qf_loss = (F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)) / 2
        self.critic_optimizer.zero_grad()
        (vf_loss + qf_loss).backward()  # they share no parameter, so one step is that of two optimizers
        self.critic_optimizer.step()
        losses = {
            "agent/vf_loss": vf_loss.detach(),
            "agent/qf_loss": qf_loss.detach(),
            "agent/qf_target": target.mean(),
        }
        if update_actor:
            # DWM: the targets follow, and the policy clones what its advantage weighs
            with torch.no_grad():
                torch._foreach_lerp_(self.qf_target_parameters, self.qf_parameters, self.args.tau)
            actor_loss, weight = self.actor_loss(obs, action, advantage.detach())
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            self.actor_schedule.step()
            losses |= {"agent/actor_loss": actor_loss.detach(), "agent/actor_weight": weight.mean()}
        return losses

    def actor_loss(self, obs, action, advantage) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted cloning of the real action, and the weights exp(beta A) up to a cap [IQL Eq. 7], [DWM]."""
        weight = (self.args.awr_beta * advantage).exp().clamp(max=self.args.max_weight)
        return -(weight * self.actor.log_prob(obs, action)).mean(), weight


# Copied from dawm_iql.py
def reward_factor(args: Args, dataset: OfflineDataset) -> float:
    """1000 / (best - worst episode return) of the real data, for generated rewards too [IQL code]."""
    if not args.reward_scaling:
        return 1.0
    spread = float(dataset.returns.max() - dataset.returns.min())
    if not spread > 0:
        raise UserError(f"every episode of {args.env_id} has the same return; use --no-reward-scaling")
    return 1000 / spread


# Adapted from dawm_td3bc.py: two agents, on real pairs and their futures
def train_agent(
    args: Args, dataset: OfflineDataset, windows: Windows, world_model, futures, evaluator: Evaluator, run: Run
) -> TD3BC | IQL:
    """TD3+BC or IQL on real pairs with their `futures` (see synthesize), or, without, on what is imagined for each."""
    run.seed("agent", args.seed)
    obs, action, losses = windows.obs[windows.start], windows.action, {}
    if args.agent == "td3bc":
        factor, agent = 1.0, TD3BC(args, obs, action.shape[1])
        optimizers = agent.actor_optimizer, agent.qf_optimizer
    else:
        factor = reward_factor(args, dataset)
        agent = IQL(args, obs, action.shape[1], factor)
        optimizers = agent.actor_optimizer, agent.critic_optimizer, agent.actor_schedule
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = factor * np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    stored = None if futures is None else {name: values.to(run.device) for name, values in futures.items()}
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses), private=True
    ) as stage:
        for update in stage:
            # DWM: sample real pairs (s_t, a_t), and imagine what follows
            index = torch.randint(len(obs), (args.agent_batch_size,), device=run.device)
            if stored is None:
                future = imagine_futures(args, windows, world_model, index)
            else:
                future = {name: values[index] for name, values in stored.items()}
            losses |= agent.update(obs[index], action[index], future, update_actor=update % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DWM]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    for name, value in AGENTS[args.agent].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows, futures = Windows(args, dataset, run.device), None
    if args.agent == "iql":
        reward_factor(args, dataset)
    run.open(dataset, evaluator, return_scale=windows.return_scale, target_return=target_return(args))
    world_model = train_world_model(args, windows, run)
    if args.rollouts == "stored":
        futures = synthesize(args, windows, world_model, run)
    agent = train_agent(args, dataset, windows, world_model, futures, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, windows=windows, world_model=world_model,
        futures=futures, agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
