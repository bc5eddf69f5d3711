"""Diffusion MPC, after D-MPC: one diffusion model proposes actions, a second one imagines what they lead to.

1. A diffusion model learns the next F states, given the current one and F actions (section 3).
2. A second one learns the F actions themselves, given the current state alone; no inverse dynamics is needed, and
   either can be replaced without the other (section 4).
3. Nothing is synthesised: the diffusion runs at every environment step, for candidates that are then thrown away
   (section 5).
4. A third network learns the return of a window of states and actions. The agent is the planner: it draws candidates
   from the second model, their states from the first, scores each with the third and takes the best one's first action
   (section 6).
5. All evaluation episodes are planned as one batch in the simulator (section 6).

DAWM infers actions from states that it has imagined; D-MPC imagines the states from actions that it has proposed.

    python -m baselines.diffusion_mpc --env-id local/hopper/medium-v0 --laptop          # two CPU cores
    python -m baselines.diffusion_mpc --env-id hopper-medium-v2                         # paper scale, one GPU
    python -m baselines.diffusion_mpc --env-id hopper-medium-v2 --dynamics one_step     # the paper's two questions:
    python -m baselines.diffusion_mpc --env-id hopper-medium-v2 --proposal gaussian     # many steps at once? diffusion?

Another --candidates finds the trained networks and costs one evaluation.

[DMPC Sec. 1]                                   here
multi-step dynamics, p_d                        Dynamics, train_dynamics_model
action proposal, rho                            Proposal, train_proposal
objective, J                                    Objective, train_objective
sample, score, rank                             plan
act on the first action, replan                 Planner

Keys:
[DMPC]      Diffusion Model Predictive Control, arXiv 2410.05364 (TMLR 2025). Its authors' code is not public. "second
            hand": not read there, but in others' accounts of its appendix; hence "after D-MPC"
[DIFFUSER]  Planning with Diffusion for Flexible Behavior Synthesis, arXiv 2205.09991v2, and its code
[DDIM]      Denoising Diffusion Implicit Models, arXiv 2010.02502
[IDDPM]     Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine schedule)

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.
docs/method.md has the evidence for each choice.

Symbols: F is `plan_horizon`; a window has F actions and F + 1 states, the first of them real; K is
`dynamics_diffusion_steps` and `proposal_diffusion_steps`; N is `candidates`.
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
from common.cli import Count, Rate, RunArgs, Seed, Share, run_script
from common.data import OfflineDataset, load_dataset
from common.evaluation import Evaluator, score_report
from common.run import Run

import numpy as np
import torch
from torch import nn


@dataclass
class Args(RunArgs):
    seed: Seed = 100  # seed of training and planning [unspecified]; evaluated once, so that --eval-every says nothing

    # ---- Data: windows and return-to-go
    plan_horizon: Annotated[int, (1, 10_000)] = 32  # F: actions of a plan [unspecified]; Diffuser's length [DIFFUSER]
    gamma: Share = 0.99  # discount of return-to-go [unspecified]
    # taken from a fallen episode's last reward before rewards are summed [DMPC App., second hand]
    termination_penalty: Annotated[float, (0, 1e6)] = 100.0

    # ---- World model: dynamics; the proposal and the objective are networks of the same size, trained alike
    world_model_steps: Count = 2_000_000  # gradient updates of each of the three networks [DMPC App., second hand]
    world_model_batch_size: Count = 64  # windows per update [unspecified]
    world_model_lr: Rate = 1e-4  # Adam's rate after the warm-up [DMPC App., second hand]
    final_lr: Rate = 1e-5  # Adam's rate at the end of the cosine [DMPC App., second hand]
    warmup_steps: Annotated[int, (0, math.inf)] = 500  # updates in which the rate rises [DMPC App., second hand]
    world_model_holdout: Annotated[float, (0, 0.9)] = 0.05  # share of episodes for the held-out losses [unspecified]
    ema_decay: Share = 0.99  # of the averaged weights, which plan [DMPC App., second hand]
    transformer_layers: Count = 5  # blocks [DMPC App., second hand]
    transformer_width: Count = 256  # of a token [DMPC App., second hand]
    transformer_heads: Count = 8  # of each attention [DMPC App., second hand]
    attention_width: Count = 1024  # queries of all heads together, as keys and values [DMPC App., second hand]
    mlp_width: Count = 2048  # hidden units of a block [DMPC App., second hand]
    prediction: Literal["noise", "x0"] = "noise"  # predict noise [DMPC App., second hand], or the clean window
    dynamics: Literal["sequence", "one_step"] = "sequence"  # F states at once [DMPC Sec. 1], or one after the other
    dynamics_diffusion_steps: Count = 10  # K, all of which sampling visits [DMPC App., second hand]

    # ---- Action model: proposal
    proposal: Literal["diffusion", "gaussian"] = "diffusion"  # diffusion [DMPC Sec. 1], or a density per step and joint
    proposal_diffusion_steps: Count = 32  # K, all of which sampling visits [DMPC App., second hand]

    # ---- Planner
    candidates: Count = 64  # N: action sequences drawn and ranked at every step [DMPC App., second hand]


# --laptop: the same method with small networks and short plans, [deviation] throughout; not the paper's scale. x0 is
# predicted as in dawm_td3bc.py: with so few steps the first one would multiply an error of the noise by a hundred.
LAPTOP = dict(
    plan_horizon=4,
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    prediction="x0",
    world_model_steps=15_000,
    world_model_lr=1e-3,
    transformer_layers=2,
    transformer_width=64,
    transformer_heads=4,
    attention_width=64,
    mlp_width=128,
    dynamics_diffusion_steps=5,
    proposal_diffusion_steps=5,
    candidates=16,
)


# Adapted from dawm_td3bc.py: a Transformer's sizes
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense together, before anything is loaded."""
    heads = args.transformer_heads
    if args.attention_width % heads:
        raise UserError(
            f"--attention-width {args.attention_width} must be a multiple of --transformer-heads {heads}; take "
            f"{math.ceil(args.attention_width / heads) * heads}"
        )
    if args.final_lr > args.world_model_lr:
        raise UserError(f"--final-lr {args.final_lr} is above --world-model-lr {args.world_model_lr}; lower it")


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


# Adapted from dawm_td3bc.py: states and the actions between them, no rewards
class Windows:
    """All windows of F actions and F + 1 states, one for each real pair (state, action); gathered when asked for.

    `train` and `held_out` are the windows to learn from, and those in other episodes. No window crosses an episode's
    end. A fallen episode goes on with its last state, where the simulator would stop: else no window would start near
    a fall, and no plan could be seen to fall. UserError if no episode is long enough.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        self.number_states(dataset)
        fits = self.start + args.plan_horizon <= self.final
        if not fits.any():
            raise UserError(
                f"--plan-horizon {args.plan_horizon} needs as many transitions in a row, but the longest episode has "
                f"{dataset.lengths.max()}; lower it"
            )
        self.usable = fits | dataset.terminated[self.last][self.episode]
        reward = dataset.reward - args.termination_penalty * dataset.terminated
        label = discounted_return_to_go(reward, dataset.lengths, args.gamma)
        self.return_mean, self.return_std = float(label.mean()), float(label.std()) or 1.0
        self.return_to_go = ((label - self.return_mean) / self.return_std).astype(np.float32)  # [N], as J says it
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, torch.as_tensor(value, device=device))
        self.offsets = torch.arange(args.plan_horizon + 1, device=device)
        self.train, self.held_out = self.split(self.usable, args.world_model_holdout, args.seed)

    def number_states(self, dataset: OfflineDataset) -> None:
        """obs and change [N + E, obs_dim]: T transitions have T+1 states, so pair i of episode e is row i + e.
        `start` and `final` [N] are the rows of a pair's own state and of its episode's last one. action [N, action_dim]
        is that of a pair.
        """
        self.episode = np.repeat(np.arange(len(dataset.lengths)), dataset.lengths)  # of each pair
        self.last = np.cumsum(dataset.lengths) - 1  # last pair of each episode
        self.obs = np.insert(dataset.obs, self.last + 1, dataset.next_obs[self.last], axis=0)
        self.change = np.insert(dataset.next_obs - dataset.obs, self.last + 1, 0, axis=0)
        self.action = dataset.action
        self.start = np.arange(len(self.episode)) + self.episode
        self.final = (self.last + 1 + np.arange(len(self.last)))[self.episode]

    def split(self, pairs: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs marked in `pairs` [N]: to train on, and those in a random share of their episodes."""
        episodes = self.episode[pairs].unique()
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).to(pairs.device)
        count = min(math.ceil(share * len(episodes)), len(episodes) - 1)  # something must be left to train on
        held_out = torch.isin(self.episode, episodes[order[:count]])
        return (pairs & ~held_out).nonzero()[:, 0], (pairs & held_out).nonzero()[:, 0]

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of obs and change that make up the windows `index` [B] -> [B, F+1]."""
        return torch.minimum(self.start[index, None] + self.offsets, self.final[index, None])

    def actions(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions [B, F, action_dim] of the windows `index` [B], and which of them are known [B, F].

        After a fall there is none: any of the data's stands there, drawn anew each time [unspecified]. A constant
        (ancestors have zeros) would tell the dynamics of a fall that only state and action may tell it of.
        """
        pair = index[:, None] + self.offsets[:-1]
        known = pair <= self.last[self.episode[index], None]
        any_pair = torch.randint(len(self.action), pair.shape, device=pair.device)
        return self.action[torch.where(known, pair, any_pair)], known


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
# 3. World model: schedule, Transformer, loss, sampler, dynamics
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
def cosine_alpha_bar(num_diffusion_steps: int) -> torch.Tensor:
    """Cumulative product of 1 - noise_beta for k = 0..K -> [K+1], float64, alpha_bar[0] = 1 [IDDPM Eq. 17]."""
    k = torch.arange(num_diffusion_steps + 1, dtype=torch.float64) / num_diffusion_steps
    f = torch.cos((k + 0.008) / 1.008 * math.pi / 2) ** 2
    noise_beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - noise_beta, 0)])


class TransformerBlock(nn.Module):
    """Attention of all tokens to all, then a hidden layer, each behind its own layer norm [DMPC App., second hand]."""

    def __init__(self, args: Args):
        super().__init__()
        width, self.heads = args.transformer_width, args.transformer_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * args.attention_width)
        self.attended = nn.Linear(args.attention_width, width)
        self.mlp = nn.Sequential(nn.Linear(width, args.mlp_width), nn.GELU(), nn.Linear(args.mlp_width, width))

    def forward(self, x):  # [B, T, width]
        batch, tokens, _ = x.shape
        parts = self.queries_keys_values(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts)  # [B, heads, T, attention_width / heads]
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return x + self.mlp(self.norm2(x))


class TokenTransformer(nn.Module):
    """Groups of tokens [B, L_i, dims[i]] -> [B, L, out_dim] at the tokens of the last group.

    Each group has a projection of its own, and a place in time: `starts[i]` is the step of its first token. With `k`
    [B] the diffusion step is one more token. Places and k as sines and cosines of 16 frequencies [DMPC App., second
    hand; which frequencies: unspecified].
    """

    def __init__(self, args: Args, dims: list[int], starts: list[int], out_dim: int):
        super().__init__()
        width, self.starts = args.transformer_width, starts
        self.register_buffer("frequencies", torch.exp(torch.arange(16) * -math.log(10_000) / 15))
        self.embed = nn.ModuleList([nn.Linear(dim, width) for dim in dims])
        self.embed_place, self.embed_k = nn.Linear(32, width), nn.Linear(32, width)
        self.blocks = nn.ModuleList([TransformerBlock(args) for _ in range(args.transformer_layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_dim))

    def waves(self, place):
        angle = place[..., None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, *groups, k=None):
        tokens = [self.embed_k(self.waves(k))[:, None]] if k is not None else []
        for group, embed, start in zip(groups, self.embed, self.starts, strict=True):
            place = torch.arange(start, start + group.shape[1], device=group.device)
            tokens.append(embed(group) + self.embed_place(self.waves(place)))
        x = torch.cat(tokens, dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -groups[-1].shape[1] :])


def diffusion_loss(args: Args, alpha_bar: torch.Tensor, denoiser, conditions, x0, counts=None) -> torch.Tensor:
    """Mean squared error of the predicted noise, or of x0 [B, L, dim], over the tokens that count [B, L]; all if None.

    x_k = sqrt(alpha_bar_k) x0 + sqrt(1 - alpha_bar_k) noise is the last group of tokens, behind `conditions`.
    """
    k = torch.randint(1, len(alpha_bar), (len(x0),), device=x0.device)
    noise, signal = torch.randn_like(x0), alpha_bar[k][:, None, None]
    x_k = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
    error = (denoiser(*conditions, x_k, k=k) - (noise if args.prediction == "noise" else x0)).square().mean(-1)
    return error.mean() if counts is None else (error * counts).sum() / counts.sum()


def ddim(args: Args, num_diffusion_steps: int, units: Normalizer, denoiser, conditions, x: torch.Tensor):
    """From noise x [B, L, dim] to a window in `units`, through all K steps and without new noise [DDIM Eq. 12, eta 0].

    The clean window is clamped to the data's range at every step [unspecified].
    """
    alpha_bar = cosine_alpha_bar(num_diffusion_steps).tolist()
    for k in range(num_diffusion_steps, 0, -1):
        signal, spread = math.sqrt(alpha_bar[k]), math.sqrt(1 - alpha_bar[k])
        x0 = denoiser(*conditions, x, k=torch.full((len(x),), k, device=x.device))
        if args.prediction == "noise":
            x0 = (x - spread * x0) / signal
        x0 = x0.clamp(units.low, units.high)
        noise_pred = (x - signal * x0) / spread  # what the clamped window says of the noise
        x = math.sqrt(alpha_bar[k - 1]) * x0 + math.sqrt(1 - alpha_bar[k - 1]) * noise_pred
    return x


class Dynamics(nn.Module):
    """p(next states | state, actions) [DMPC Sec. 1]: of F steps at once, or of one step after the other (one_step).

    A token is the change of state that a step brings, normalised. [unspecified] In units of the states it would be
    lost: one step of Hopper moves a position by 0.04 of its standard deviation, no more than a denoiser errs.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, self.length = args, args.plan_horizon if args.dynamics == "sequence" else 1
        self.obs_units, self.action_units = Normalizer(windows.obs), Normalizer(windows.action)
        self.units = Normalizer(windows.change)
        self.register_buffer("obs_range", torch.stack([windows.obs.amin(0), windows.obs.amax(0)]))
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.dynamics_diffusion_steps).float())
        obs_dim, action_dim = windows.obs.shape[1], windows.action.shape[1]
        net = TokenTransformer(args, dims=[obs_dim, action_dim, obs_dim], starts=[0, 0, 1], out_dim=obs_dim)
        self.net = fast.on_cpu(net, args.compile)

    def loss(self, net: nn.Module, windows: Windows, index: torch.Tensor) -> torch.Tensor:
        action, _ = windows.actions(index)
        # One step: any of the window's, also behind a fall, from which a candidate may have to go on.
        first = torch.randint(action.shape[1] - self.length + 1, (len(index), 1), device=index.device)
        steps = first + torch.arange(self.length, device=index.device)
        rows = windows.rows(index).gather(1, steps)
        obs = self.obs_units.normalize(windows.obs[rows[:, :1]])
        action = self.action_units.normalize(action.gather(1, steps[..., None].expand(-1, -1, action.shape[2])))
        change = self.units.normalize(windows.change[rows])
        return diffusion_loss(self.args, self.alpha_bar, net, (obs, action), change)

    def sample(self, obs: torch.Tensor, action: torch.Tensor, noise) -> torch.Tensor:
        """obs [B, obs_dim], action [B, F, action_dim], noise(length, dim) -> states [B, F+1, obs_dim]; data units."""
        args, states = self.args, obs[:, None]
        for some in self.action_units.normalize(action).split(self.length, dim=1):  # one part, or F
            here = states[:, -1:]
            conditions, x = (self.obs_units.normalize(here), some), noise(self.length, obs.shape[1])
            x = ddim(args, args.dynamics_diffusion_steps, self.units, self.net, conditions, x)
            following = here + self.units.denormalize(x).cumsum(1)
            states = torch.cat([states, following.clamp(*self.obs_range)], dim=1)  # never outside the data's range
        return states


def scheduled_rate(args: Args, step: int) -> float:
    """Of update 1, 2, ...: up to world_model_lr, then along a cosine down to final_lr [DMPC App., second hand]."""
    if step <= args.warmup_steps:
        return args.world_model_lr * step / args.warmup_steps
    share = (step - args.warmup_steps) / max(1, args.world_model_steps - args.warmup_steps)
    return args.final_lr + (args.world_model_lr - args.final_lr) * (1 + math.cos(math.pi * share)) / 2


def train_averaged(args: Args, windows: Windows, run: Run, stage_function, model: nn.Module, name: str) -> None:
    """Train a copy of model.net by model.loss(net, windows, index); model.net gets its averaged weights."""
    learner = fast.on_cpu(copy.deepcopy(model.net), args.compile)  # a copy is not compiled
    parameters, averaged = list(learner.parameters()), list(model.net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.world_model_lr, fused=True)

    @torch.no_grad()
    def held_out_loss():
        with torch.random.fork_rng():  # the same windows and noise every time, and none of the training's
            torch.manual_seed(args.seed)
            index = torch.randint(len(windows.held_out), (512,), device=run.device)
            return model.loss(model.net, windows, windows.held_out[index])

    with run.stage(stage_function, args.world_model_steps, "update", keeps=model, saves=(learner, optimizer)) as stage:
        for step in stage:
            index = torch.randint(len(windows.train), (args.world_model_batch_size,), device=run.device)
            loss = model.loss(learner, windows, windows.train[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = scheduled_rate(args, step)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - args.ema_decay)
            if step % args.log_every == 0 or step == args.world_model_steps:
                run.log(step, {f"{name}/loss": loss})
                if len(windows.held_out):
                    run.log(step, {f"{name}/val_loss": held_out_loss()})


def train_dynamics_model(args: Args, windows: Windows, run: Run) -> Dynamics:
    run.seed("dynamics", args.seed)
    dynamics = Dynamics(args, windows).to(run.device)
    train_averaged(args, windows, run, train_dynamics_model, dynamics, "world_model")
    return dynamics


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics: none; actions come from a model of their own, the proposal
# ---------------------------------------------------------------------------------------------------------------------


class Proposal(nn.Module):
    """p(actions of the next F steps | state) [DMPC Sec. 1]: what the data would do here.

    diffusion: of all F jointly. gaussian: for each step and dimension a normal distribution by itself, from the same
    Transformer, fitted by maximum likelihood; so the steps of a plan know nothing of each other.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.args, obs_dim, self.action_dim = args, windows.obs.shape[1], windows.action.shape[1]
        self.obs_units, self.units = Normalizer(windows.obs), Normalizer(windows.action)
        self.register_buffer("alpha_bar", cosine_alpha_bar(args.proposal_diffusion_steps).float())
        out_dim = self.action_dim * (2 if args.proposal == "gaussian" else 1)
        self.net = fast.on_cpu(TokenTransformer(args, [obs_dim, self.action_dim], [0, 0], out_dim), args.compile)

    def gaussian(self, net: nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation, both [B, F, action_dim], from obs [B, 1, obs_dim], normalised."""
        empty = obs.new_zeros(len(obs), self.args.plan_horizon, self.action_dim)
        mean, log_std = net(obs, empty).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)

    def loss(self, net: nn.Module, windows: Windows, index: torch.Tensor) -> torch.Tensor:
        """Only over actions that the data know."""
        obs = self.obs_units.normalize(windows.obs[windows.start[index]])[:, None]
        action, known = windows.actions(index)
        action = self.units.normalize(action)
        if self.args.proposal == "diffusion":
            return diffusion_loss(self.args, self.alpha_bar, net, (obs,), action, known)
        mean, log_std = self.gaussian(net, obs)
        error = (log_std + ((action - mean) / log_std.exp()).square() / 2).mean(-1)
        return (error * known).sum() / known.sum()

    def sample(self, obs: torch.Tensor, noise) -> torch.Tensor:
        """obs [B, obs_dim], noise(length, dim) -> actions [B, F, action_dim], dataset units."""
        args, conditions = self.args, (self.obs_units.normalize(obs)[:, None],)
        x = noise(args.plan_horizon, self.action_dim)
        if args.proposal == "diffusion":
            x = ddim(args, args.proposal_diffusion_steps, self.units, self.net, conditions, x)
        else:
            mean, log_std = self.gaussian(self.net, *conditions)
            x = mean + log_std.exp() * x
        return self.units.denormalize(x)


def train_proposal(args: Args, windows: Windows, run: Run) -> Proposal:
    run.seed("proposal", args.seed)
    proposal = Proposal(args, windows).to(run.device)
    train_averaged(args, windows, run, train_proposal, proposal, "proposal")
    return proposal


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: none is kept; candidates are sampled, imagined and scored at every environment step
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plan(model, obs: torch.Tensor, noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One candidate for each of obs [B, obs_dim]: actions [B, F, action_dim], states [B, F+1, obs_dim], score [B].

    All in dataset units but the score, which is in standard deviations of the data's return-to-go. Another reward,
    known only now, is one more term of the score [DMPC Sec. 1].
    """
    action = model.proposal.sample(obs, noise)
    states = model.dynamics.sample(obs, action, noise)
    return action, states, model.objective(states, action)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agent: objective and planner
# ---------------------------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """J [DMPC Sec. 1]: states [B, F+1, obs_dim] and actions [B, F, action_dim], dataset units -> [B].

    The discounted return-to-go from the window's first state to the episode's end, in standard deviations of the
    data's. No reward of the simulator is asked for.
    """

    def __init__(self, args: Args, windows: Windows):
        super().__init__()
        self.obs_units, self.action_units = Normalizer(windows.obs), Normalizer(windows.action)
        dims = [windows.obs.shape[1], windows.action.shape[1], 1]
        self.net = fast.on_cpu(TokenTransformer(args, dims, starts=[0, 0, 0], out_dim=1), args.compile)

    def value(self, net: nn.Module, states: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        states, action = self.obs_units.normalize(states), self.action_units.normalize(action)
        return net(states, action, states.new_zeros(len(states), 1, 1))[:, 0, 0]  # the last token says it

    def forward(self, states, action):
        return self.value(self.net, states, action)

    def loss(self, net: nn.Module, windows: Windows, index: torch.Tensor) -> torch.Tensor:
        value = self.value(net, windows.obs[windows.rows(index)], windows.actions(index)[0])
        return (value - windows.return_to_go[index]).square().mean()


def train_objective(args: Args, windows: Windows, run: Run) -> Objective:
    run.seed("objective", args.seed)
    objective = Objective(args, windows).to(run.device)
    train_averaged(args, windows, run, train_objective, objective, "objective")
    return objective


# Adapted from baselines/decision_diffuser.py: many candidates for an episode, of which the best one acts
class Planner:
    """A policy that plans anew at every environment step, for all of `episodes` at once [DMPC Sec. 1].

    Noise is drawn for all episodes and given to those that still run: so an episode's plans do not depend on how long
    the others last. `model` has the three networks.
    """

    def __init__(self, args: Args, model, episodes: int, device: torch.device):
        self.args, self.model, self.episodes, self.device = args, model, episodes, device
        self.generator = torch.Generator(device).manual_seed(args.seed)

    def __call__(self, obs: np.ndarray, running: np.ndarray) -> np.ndarray:
        """obs [n, obs_dim] of the episodes `running` [n], dataset units -> actions [n, action_dim]."""
        count, running = self.args.candidates, torch.as_tensor(running, device=self.device)

        def noise(length, dim):
            shape = self.episodes, count, length, dim
            return torch.randn(shape, device=self.device, generator=self.generator)[running].flatten(0, 1)

        candidates = torch.as_tensor(obs, device=self.device).repeat_interleave(count, dim=0)
        action, _, score = plan(self.model, candidates, noise)
        first = torch.arange(0, len(score), count, device=self.device)  # candidate of each episode
        best = first + score.view(-1, count).argmax(1)  # rank
        return action[best, 0].cpu().numpy()


# Adapted from baselines/decision_diffuser.py: another model
def evaluate_planner(args: Args, model, evaluator: Evaluator, run: Run) -> None:
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
# 7. The whole method [DMPC Sec. 1]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    check_args(args)
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    windows = Windows(args, dataset, run.device)
    run.open(dataset, evaluator, return_mean=windows.return_mean, return_std=windows.return_std)
    model = SimpleNamespace(
        dynamics=train_dynamics_model(args, windows, run),
        proposal=train_proposal(args, windows, run),
        objective=train_objective(args, windows, run),
    )
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
