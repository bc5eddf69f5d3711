"""DAWM with IQL: offline RL on transitions that a diffusion world model and an inverse dynamics model made up.

1. A diffusion model learns windows of future states and rewards, given a real state, a real action and the
   return-to-go (section 3).
2. An inverse dynamics model learns which action leads from one state to the next (section 4).
3. From every real pair (state, action), asked for a return-to-go, the first imagines the next H+1 states and
   rewards and the second fills in the H missing actions: H+1 complete transitions per pair (section 5).
4. IQL learns from these transitions alone: values by expectile regression, the policy by weighted cloning (section 6).
5. The policy runs in the simulator; neither model is needed any more (section 7).

Sections 2 to 5 are those of dawm_td3bc.py to the letter: `git diff --no-index dawm_td3bc.py dawm_iql.py` shows what
differs between the two agents, and both find the same kept world model.

    python dawm_iql.py --env-id local/hopper/medium-v0 --laptop      # two CPU cores, data made on this machine
    python dawm_iql.py --env-id hopper-medium-v2                     # paper scale on D4RL, one GPU
    python dawm_iql.py --env-id hopper-medium-v2 --synthetic-fraction 0    # the control: IQL on the real data

[DAWM Alg. 3]                                   here
train p_theta, f_phi on the data                train_world_model (Eq. 2), train_inverse_dynamics (Eq. 3)
sample pairs (s_t, a_t), ask for g_eval         imagine
sample rewards and states from p_theta          sample_rollouts
infer the missing actions with f_phi            infer_actions
label the H+1 transitions                       complete_rollouts, with mark_ends, which is not in the paper
value, critic, policy and target updates        train_agent, IQL.update

Keys:
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]    Diffusion World Model, arXiv 2402.03570 (DAWM's generator; appendix as reprinted in arXiv 2607.17560)
[DD]     Is Conditional Generative Modeling All You Need for Decision-Making?, arXiv 2211.15657, and its code
[SSORL]  Semi-Supervised Offline RL with Action-Free Trajectories, arXiv 2210.06518, and its code
[IQL]    Offline Reinforcement Learning with Implicit Q-Learning, arXiv 2110.06169; its code: gwthomas/IQL-PyTorch
[CFG]    Classifier-Free Diffusion Guidance, arXiv 2207.12598
[IDDPM]  Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule, strided sampling)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has the equations, and the evidence for each choice.

Symbols: k in DAWM's Eq. 2 is `k` (diffusion step), in its return-to-go `step` (environment time); H is `horizon`;
g_eval `target_return`; omega `guidance_scale`; DAWM's alpha (0.5) `sampling_temperature`; IQL's tau `expectile`, its
beta `awr_beta`; `tau` is the Polyak rate only.
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
    # ---- Data: windows and return-to-go
    horizon: Count = 7  # H: a rollout has H+1 transitions, so H+2 states, the first one real [DAWM Sec. 4]
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

    # ---- Inverse dynamics
    idm_seed: Seed = 100  # seed of the inverse dynamics training [unspecified]
    idm_steps: Count = 100_000  # gradient updates [unspecified]
    idm_batch_size: Count = 1024  # state triples per update; [unspecified], SSORL's code
    idm_lr: Rate = 1e-4  # Adam's rate [DAWM Tab. 7]
    idm_width: Count = 1024  # units of each hidden layer [DAWM App.]
    idm_dropout: Share = 0.1  # after the last hidden layer; [unspecified], SSORL's code
    idm_holdout: Annotated[float, (0.001, 0.9)] = 0.1  # episodes that choose the weights; [unspecified], SSORL's code

    # ---- Synthesis
    synthesis: Literal["dataset", "online"] = "dataset"  # once [DAWM text], or in the agent's loop [DAWM Alg. 2]
    synthesis_seed: Seed = 100  # seed of the sampling noise in dataset mode [unspecified]
    synthesis_batch_size: Count = 4096  # rollouts generated together in dataset mode [unspecified]
    sampling_steps: Count = 3  # N denoising steps out of K [DAWM App.]
    sampling_temperature: Amount = 0.5  # multiplies the standard deviation of each denoising step [DAWM Tab. 7, DWM]
    guidance_scale: Amount = 1.2  # weight of the return condition, 1: no guidance; [unspecified], DD's code
    # return-to-go asked for, in return scales; default from TASKS [unspecified]; own: each pair's real one
    target_return: Annotated[float, (-100, 100)] | Literal["own"] | None = None
    conditioning_subsample: Count = 1  # use one of so many real pairs, drawn at random; 8 is DAWM-T [DAWM Tab. 5]
    termination: Literal["rule", "none"] = "rule"  # end rollouts at falls (mark_ends), or not, as printed [deviation]
    synthetic_fraction: Share = 1.0  # synthetic share of a batch [DAWM Tab. 4]; 0: the agent on real data, no model

    # ---- Agent
    agent_updates: Count = 1_000_000  # updates of all networks; [unspecified], IQL's code
    agent_batch_size: Count = 256  # transitions per update; [unspecified], IQL's code
    agent_lr: Rate = 3e-4  # Adam's rate, of the policy falling to 0 by a cosine; [unspecified], IQL's code
    tau: Share = 0.005  # Polyak rate of the target critics; [unspecified], IQL's code
    policy_delay: Count = 1  # updates per update of policy and targets, n [DAWM Alg. 3]; 1: IQL's code
    expectile: Annotated[float, (0.001, 0.999)] = 0.7  # of the value loss [IQL Eq. 5]; 0.5 as printed [deviation]
    awr_beta: Amount = 3.0  # inverse temperature of the policy's weights; [unspecified], IQL's code
    max_weight: Annotated[float, (1e-8, 1e8)] = 100.0  # cap of the policy's weights; [unspecified], IQL's code
    policy: Literal["gaussian", "deterministic"] = "gaussian"  # or tanh; [unspecified], IQL's code has both
    reward_scaling: bool = True  # times 1000 / (best - worst real return); [unspecified], IQL's code
    normalize_obs: bool = False  # standardise observations for the agent [DWM App.]; not in IQL's code [unspecified]


# --laptop: the same method with a smaller U-Net and fewer updates, [deviation] throughout; not the paper's scale.
# Four changes are of kind (docs/method.md): the loss on x0, since Eq. 2's hardly trains what sampling does first; all
# steps at their full noise, so that rollouts spread as the data do; each pair's own return as the target,
# unguided, so that rollouts are such as the data have; and the horizon with the best Hopper score in [DAWM Tab. 6].
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
    idm_steps=5_000,
    idm_batch_size=256,
    idm_lr=1e-3,
    idm_width=256,
    synthesis_batch_size=1024,
    normalize_obs=True,  # [DWM App.]; without it so few updates leave a poor clone
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
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


# Copied from dawm_td3bc.py
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    if args.horizon > args.model_horizon:
        raise UserError(f"--horizon {args.horizon} is above --model-horizon {args.model_horizon}; raise that too")
    if args.sampling_steps > args.diffusion_steps:
        raise UserError(f"--sampling-steps {args.sampling_steps} is above --diffusion-steps {args.diffusion_steps}")
    if args.synthesis == "online" and (args.conditioning_subsample > 1 or 0 < args.synthetic_fraction < 1):
        raise UserError(
            "--synthesis online draws from all pairs and mixes nothing: no --conditioning-subsample, and a "
            "--synthetic-fraction of 0 or 1; use --synthesis dataset"
        )
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
# 4. Inverse dynamics
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
class InverseDynamics(nn.Module):
    """Tanh-squashed diagonal Gaussian over the action between two states, with one state of context [DAWM Eq. 3].

    Input: obs triples (previous, current, next) [..., 3 * obs_dim], dataset units. [unspecified] tanh: SSORL's code.
    """

    def __init__(self, args: Args, obs: torch.Tensor, change: torch.Tensor, action_dim: int):
        super().__init__()
        parts = (change, obs, change)
        self.register_buffer("mean_in", torch.cat([part.mean(0) for part in parts]))
        self.register_buffer("std_in", torch.cat([part.std(0) for part in parts]) + 1e-6)

        def network():  # two hidden layers, mean and spread apart [DAWM App.]
            layers = [nn.Linear(3 * obs.shape[1], args.idm_width), nn.ReLU()]
            layers += [nn.Linear(args.idm_width, args.idm_width), nn.ReLU()]
            layers += [nn.Dropout(args.idm_dropout), nn.Linear(args.idm_width, action_dim)]
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)  # [SSORL code]
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        self.mean, self.log_std = network(), network()

    def normalize(self, triples: torch.Tensor) -> torch.Tensor:
        """The current state and the changes around it, each in units of its own standard deviation [unspecified]:
        an action shows in the changes, a tenth as large as what the states themselves differ by."""
        previous, current, following = triples.chunk(3, dim=-1)
        changes = torch.cat([current - previous, current, following - current], dim=-1)
        return (changes - self.mean_in) / self.std_in

    def gaussian(self, triples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation, before the tanh, both [..., action_dim]."""
        x = self.normalize(triples)
        log_std = -1.5 + 3.5 * torch.tanh(self.log_std(x))  # in [-5, 2] [SSORL code]; its dropout is drawn first
        return self.mean(x), log_std

    def forward(self, triples: torch.Tensor) -> torch.Tensor:
        """The action at the Gaussian's mean, in (-1, 1)."""
        return torch.tanh(self.mean(self.normalize(triples)))

    def log_prob(self, triples: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log-density of action [B, action_dim] -> [B]."""
        return tanh_normal_log_prob(action, *self.gaussian(triples))


# Copied from dawm_td3bc.py
def tanh_normal_log_prob(action: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-density of action = tanh(u), u ~ N(mean, exp(log_std)^2), summed over the last dimension."""
    action = action.clamp(-1 + 1e-6, 1 - 1e-6)  # else atanh is infinite at the bounds [SSORL code]
    log_normal = -0.5 * ((torch.atanh(action) - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - torch.log1p(-action.square())).sum(-1)


# Copied from dawm_td3bc.py
def train_inverse_dynamics(args: Args, windows: Windows, run: Run) -> InverseDynamics:
    """Maximum likelihood on real triples; returns the weights that were best on held-out episodes."""
    run.seed("idm", args.idm_seed)
    inverse_dynamics = InverseDynamics(args, windows.obs, windows.change, windows.action.shape[1]).to(run.device)
    best, best_loss = copy.deepcopy(inverse_dynamics).eval(), {"value": math.inf}
    optimizer = torch.optim.Adam(inverse_dynamics.parameters(), lr=args.idm_lr, fused=True)
    train, held_out = windows.split(windows.has_past, args.idm_holdout, args.idm_seed)
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(len(held_out), 10_000), device=run.device).long()]

    def triples(index):
        row = windows.start[index]
        return torch.cat([windows.obs[row - 1], windows.obs[row], windows.obs[row + 1]], dim=1)

    with run.stage(
        train_inverse_dynamics, args.idm_steps, "update", keeps=best, saves=(inverse_dynamics, optimizer, best_loss)
    ) as stage:
        for step in stage:
            index = train[torch.randint(len(train), (args.idm_batch_size,), device=run.device)]
            loss = -inverse_dynamics.log_prob(triples(index), windows.action[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.log_every == 0 or step == args.idm_steps:
                inverse_dynamics.eval()
                with torch.no_grad():
                    held_out_loss = -inverse_dynamics.log_prob(triples(held_out), windows.action[held_out]).mean()
                    error = (inverse_dynamics(triples(held_out)) - windows.action[held_out]).square().mean()
                inverse_dynamics.train()
                run.log(step, {"idm/loss": loss, "idm/val_loss": held_out_loss, "idm/val_mse": error})
                if held_out_loss < best_loss["value"]:
                    best_loss["value"] = float(held_out_loss)
                    best.load_state_dict(inverse_dynamics.state_dict())
    return best


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: states and rewards to full transitions
# ---------------------------------------------------------------------------------------------------------------------
# A transition is one row: obs, action, reward, next_obs, terminated. One gather then fetches a whole batch.


# Copied from dawm_td3bc.py
def row_sizes(obs_dim: int, action_dim: int) -> list[int]:
    """Columns of obs, action, reward, next_obs and terminated in a row."""
    return [obs_dim, action_dim, 1, obs_dim, 1]


# Copied from dawm_td3bc.py
def imagine(args: Args, windows: Windows, world_model: WorldModel, index: torch.Tensor):
    """States [B, model_horizon+2, obs_dim] and rewards [B, model_horizon+1] that follow the real pairs `index` [B]."""
    target = target_return(args)
    if target == "own":
        target = windows.return_to_go[index, None]
    else:  # [DAWM Alg. 2]: one g_eval for every pair
        target = torch.full((len(index), 1), target, device=index.device)
    return sample_rollouts(args, world_model, windows.obs[windows.start[index]], windows.action[index], target)


# Copied from dawm_td3bc.py
@torch.no_grad()
def infer_actions(inverse_dynamics: InverseDynamics, obs: torch.Tensor) -> torch.Tensor:
    """Actions of steps 1..H between the states obs [B, H+2, obs_dim] -> [B, H, action_dim] [DAWM Eq. 3].

    At the mean of the Gaussian [SSORL code], [unspecified] in DAWM. The context of the first is the real state.
    """
    return inverse_dynamics(torch.cat([obs[:, :-2], obs[:, 1:-1], obs[:, 2:]], dim=-1))


# Copied from dawm_td3bc.py
def mark_ends(args: Args, windows: Windows, obs: torch.Tensor, reward: torch.Tensor):
    """Not in the paper: terminated, reward and valid (false after an end) of the first H+1 steps, each [B, H+1].

    [deviation] The boxes have no (1 - terminated); without it no critic learns that a fall ends the rewards. The
    simulator's rule alone misses falls that end just inside its limits, and values can then grow without bound on the
    frozen states that follow: so the model's own sign, a reward below all real ones, counts as well.
    """
    over = windows.is_over(reward)
    terminated = F.pad(over[:, 1:], (0, 1))  # the step before an episode that is over ended it
    if windows.healthy is not None:
        low, high = windows.healthy
        terminated |= ~((obs[:, 1:] > low) & (obs[:, 1:] < high)).all(-1)
    terminated = terminated[:, : args.horizon + 1] & (args.termination == "rule")
    ended_before = torch.cumsum(terminated, 1) - terminated.int() > 0
    return terminated, reward.masked_fill(over, 0)[:, : args.horizon + 1], ~ended_before


# Copied from dawm_td3bc.py
def complete_rollouts(args: Args, windows: Windows, world_model, inverse_dynamics, index: torch.Tensor):
    """From the real pairs `index` [B], H+1 complete transitions each: rows [B, H+1, row_dim] and valid [B, H+1]."""
    # Alg. 2: sample rewards and states of H+1 steps from the world model, given s_t, a_t and the return asked for
    obs, reward = imagine(args, windows, world_model, index)
    terminated, reward, valid = mark_ends(args, windows, obs, reward)
    # Alg. 2: infer the missing actions from the states around them
    obs = obs[:, : args.horizon + 2]
    action = torch.cat([windows.action[index, None], infer_actions(inverse_dynamics, obs)], dim=1)
    # Alg. 2: label the transitions h = 0..H; only s_t and a_t of the first are real
    rows = [obs[:, :-1], action, reward[..., None], obs[:, 1:], terminated[..., None]]
    return torch.cat(rows, dim=-1), valid


# Copied from dawm_td3bc.py
def synthesize(args: Args, windows: Windows, world_model, inverse_dynamics, run: Run) -> dict[str, torch.Tensor]:
    """A rollout from every real pair, or one of conditioning_subsample of them: rows [M, H+1, row_dim], valid [M, H+1].

    They stay in the CPU's memory, 4 * row_dim bytes each; the agent takes the valid ones to its device.
    """
    run.seed("synthesis", args.synthesis_seed)
    pairs, action_dim = windows.action.shape
    chosen = torch.randperm(pairs, device=run.device)[: max(1, pairs // args.conditioning_subsample)]
    shape, sizes = (len(chosen), args.horizon + 1), row_sizes(world_model.obs_dim, action_dim)
    rollouts = {"rows": torch.zeros(*shape, sum(sizes)), "valid": torch.zeros(shape, dtype=torch.bool)}
    with run.stage(synthesize, len(chosen), "pair", keeps=rollouts, after=("world model", "inverse dynamics")) as stage:
        for index in stage.over(chosen.split(args.synthesis_batch_size)):
            here = slice(stage.at, stage.at + len(index))
            rows, valid = complete_rollouts(args, windows, world_model, inverse_dynamics, index)
            rollouts["rows"][here], rollouts["valid"][here] = rows, valid
    _, action, reward, _, terminated = rollouts["rows"].split(sizes, dim=-1)
    run.log(
        0,
        {
            "synthesis/transitions": rollouts["valid"].sum(),
            "synthesis/mean_reward": reward[rollouts["valid"]].mean(),
            "synthesis/action_clip_fraction": (action[:, 1:].abs() > 0.999).float().mean(),
            "synthesis/fall_fraction": terminated.amax(1).mean(),
        },
    )
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: IQL
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


class Value(nn.Module):
    """V(obs) -> [B]; obs in dataset units."""

    def __init__(self, obs_mean: torch.Tensor, obs_std: torch.Tensor):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean)
        self.register_buffer("obs_std", obs_std)
        self.net = mlp(len(obs_mean), 1)

    def forward(self, obs):
        return self.net((obs - self.obs_mean) / self.obs_std)[:, 0]


def expectile_loss(difference: torch.Tensor, expectile: float) -> torch.Tensor:
    """|expectile - 1[difference < 0]| difference^2, averaged [IQL Eq. 5].

    [deviation] [DAWM Alg. 3] prints the plain square: then V is the data policy's value, and nothing improves on it.
    """
    return ((difference < 0).float() - expectile).abs().mul(difference.square()).mean()


class IQL(nn.Module):
    """Policy, value, twin critics and their targets; `update` is one step of [DAWM Alg. 3] in the form of [IQL].

    obs [N, obs_dim] gives the units of the networks: those of the real data, for synthetic data too.
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int, reward_factor: float):
        super().__init__()
        self.args, self.reward_factor, self.row_sizes = args, reward_factor, row_sizes(obs.shape[1], action_dim)
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

    def update(self, batch: torch.Tensor, update_actor: bool) -> dict[str, torch.Tensor]:
        """One update of value and critics on rows [B, row_dim] and, if asked for, of targets and policy. Losses."""
        obs, action, reward, next_obs, terminated = batch.split(self.row_sizes, dim=1)
        # Both before any network moves, as in IQL's code.
        target = self.td_target(reward[:, 0], next_obs, terminated[:, 0])
        with torch.no_grad():  # the target critics, as in IQL's code; the online ones are printed [deviation]
            q = torch.minimum(self.qf1_target(obs, action), self.qf2_target(obs, action))
        advantage = q - self.vf(obs)
        # Alg. 3: a step of V on its error to min Q'(s, a), and of each critic on its own to y = r + gamma V(s')
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
            # Alg. 3: every n-th time the targets follow, and the policy clones what its advantage weighs
            with torch.no_grad():
                torch._foreach_lerp_(self.qf_target_parameters, self.qf_parameters, self.args.tau)
            actor_loss, weight = self.actor_loss(obs, action, advantage.detach())
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            self.actor_schedule.step()
            losses |= {"agent/actor_loss": actor_loss.detach(), "agent/actor_weight": weight.mean()}
        return losses

    @torch.no_grad()
    def td_target(self, reward, next_obs, terminated) -> torch.Tensor:
        """r + gamma (1 - terminated) V(s'), all [B]; r scaled [IQL Eq. 6].

        [deviation] [DAWM Alg. 3] does not print the factor (1 - terminated).
        """
        return self.reward_factor * reward + self.args.gamma * (1 - terminated) * self.vf(next_obs)

    def actor_loss(self, obs, action, advantage) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted cloning of the action in the transition, and the weights exp(beta A) up to a cap [IQL Eq. 7].

        [deviation] [DAWM Alg. 3] prints the advantage of the policy's own action and a log-density without an action,
        which would leave the policy without any supervision, and a sign that would drive good actions away.
        """
        weight = (self.args.awr_beta * advantage).exp().clamp(max=self.args.max_weight)
        return -(weight * self.actor.log_prob(obs, action)).mean(), weight


# Copied from dawm_td3bc.py
def draw_batch(args: Args, real: torch.Tensor, synthetic: torch.Tensor | None) -> torch.Tensor:
    """Rows [agent_batch_size, row_dim], synthetic_fraction of them synthetic."""
    num_synthetic = round(args.synthetic_fraction * args.agent_batch_size)
    sources = ((synthetic, num_synthetic), (real, args.agent_batch_size - num_synthetic))
    return torch.cat([rows[torch.randint(len(rows), (n,), device=rows.device)] for rows, n in sources if n])


def reward_factor(args: Args, dataset: OfflineDataset) -> float:
    """1000 / (best - worst episode return) of the real data, for generated rewards too [IQL code]."""
    if not args.reward_scaling:
        return 1.0
    spread = float(dataset.returns.max() - dataset.returns.min())
    if not spread > 0:
        raise UserError(f"every episode of {args.env_id} has the same return; use --no-reward-scaling")
    return 1000 / spread


# Adapted from dawm_td3bc.py: IQL, whose rewards are scaled by the real data's returns
def train_agent(args: Args, dataset: OfflineDataset, rollouts, complete, evaluator: Evaluator, run: Run) -> IQL:
    """IQL on real rows and on `rollouts` (see synthesize), or, online, on those that complete(index) makes."""
    run.seed("agent", args.seed)
    real = real_transitions(dataset, run.device)
    synthetic = None if rollouts is None else rollouts["rows"][rollouts["valid"]].to(run.device)
    factor = reward_factor(args, dataset)
    agent = IQL(args, real[:, : dataset.obs.shape[1]], dataset.action.shape[1], factor)
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = factor * np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    online, losses, now = args.synthesis == "online" and args.synthetic_fraction > 0, {}, {}
    optimizers = agent.actor_optimizer, agent.critic_optimizer, agent.actor_schedule
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses, now), private=True
    ) as stage:
        for update in stage:  # Alg. 3: for i = 1, 2, ...; online, each i is H+1 updates, one for every step h
            if online:
                i, h = divmod(update + args.horizon, args.horizon + 1)
                if h == 0:  # Alg. 3: sample pairs (s_t, a_t) from the data, roll out, fill in the actions
                    pairs = torch.randint(len(real), (args.agent_batch_size,), device=run.device)
                    now["rows"], now["valid"] = complete(pairs)
                batch = now["rows"][:, h][now["valid"][:, h]]
            else:
                i, batch = update, draw_batch(args, real, synthetic)
            if len(batch):  # all rollouts of a small batch may have ended before step h
                losses |= agent.update(batch, update_actor=i % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [DAWM Alg. 3]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    reward_factor(args, dataset)  # what it refuses is told before anything is made
    windows = world_model = inverse_dynamics = rollouts = complete = None
    if args.synthetic_fraction > 0:
        windows = Windows(args, dataset, run.device)
        run.open(dataset, evaluator, return_scale=windows.return_scale, target_return=target_return(args))
        world_model = train_world_model(args, windows, run)
        inverse_dynamics = train_inverse_dynamics(args, windows, run)
        complete = partial(complete_rollouts, args, windows, world_model, inverse_dynamics)
        if args.synthesis == "dataset":
            rollouts = synthesize(args, windows, world_model, inverse_dynamics, run)
    else:
        run.open(dataset, evaluator)
        run.say("control", "--synthetic-fraction 0: no world model, no inverse dynamics, the agent on the real data")
    agent = train_agent(args, dataset, rollouts, complete, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, windows=windows, world_model=world_model,
        inverse_dynamics=inverse_dynamics, rollouts=rollouts, complete=complete, agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
