"""SSORL: offline RL with TD3+BC or IQL on real trajectories, most of whose actions an inverse dynamics model filled in.

1. Trajectories are split: a few keep their actions, drawn from those with low returns; the actions of all others are
   hidden (section 2).
2. There is no world model (section 3 is empty): states and rewards are real.
3. An inverse dynamics model learns from the labelled trajectories which action leads from one state to the next
   (section 4).
4. It fills in the hidden actions (section 5).
5. TD3+BC or IQL, unmodified, learns from all transitions alike (section 6); the policy runs in the simulator
   (section 7).

    python -m baselines.ssorl --env-id local/hopper/medium-v0 --laptop                  # TD3+BC, a tenth labelled
    python -m baselines.ssorl --env-id local/hopper/medium-v0 --laptop --agent iql      # IQL
    python -m baselines.ssorl --env-id local/hopper/medium-v0 --laptop --label-fraction 1 --relabel-all
                                                   # the model learns from all data and replaces all actions

[DAWM] does not say how its SSORL columns were made; the first and the last line are the two readings of it.

Keys:
[SSORL]  Semi-Supervised Offline RL with Action-Free Trajectories, arXiv 2210.06518, and its code
[DAWM]   DAWM: diffusion action world models for offline RL, arXiv 2509.19538v1
[DWM]    Diffusion World Model, arXiv 2402.03570 (appendix as reprinted in arXiv 2607.17560)
[TD3BC]  A Minimalist Approach to Offline RL, arXiv 2106.06860, and its code
[IQL]    Offline Reinforcement Learning with Implicit Q-Learning, arXiv 2110.06169; its code: gwthomas/IQL-PyTorch

Tags: [KEY place] stands there; [unspecified] the paper is silent, our choice; [deviation] the paper says otherwise.

Symbols: TD3+BC's alpha is `bc_alpha`; IQL's tau `expectile`, its beta `awr_beta`; `tau` is the Polyak rate only.
"""

# ---------------------------------------------------------------------------------------------------------------------
# 1. Imports and arguments
# ---------------------------------------------------------------------------------------------------------------------
import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Literal

from common import UserError
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
    agent: Literal["td3bc", "iql"] = "td3bc"  # the learner; SSORL-IQL is [DAWM]'s own combination

    # ---- Data: which actions are hidden
    gamma: Share = 0.99  # discount of the agent [DAWM Tab. 7]
    # leave out the worst trajectory [SSORL code], none, or all but the --topk longest [DAWM]
    traj_filter: Literal["return_topk", "none", "length_topk"] = "return_topk"
    topk: Count = 100  # trajectories that --traj-filter length_topk keeps [unspecified]
    label_fraction: Annotated[float, (0.001, 1)] = 0.1  # share whose actions are known; [unspecified], SSORL's code
    label_pool: Share = 0.5  # drawn from this share with the lowest returns [SSORL code], or from --label-fraction
    label_seed: Seed = 0  # seed of that draw [unspecified]
    relabel_all: bool = False  # replace known actions too [unspecified]

    # ---- Inverse dynamics
    idm_seed: Seed = 100  # seed of the inverse dynamics training [unspecified]
    idm_steps: Count = 100_000  # gradient updates [unspecified]
    idm_batch_size: Count = 1024  # state triples per update; [unspecified], SSORL's code
    idm_lr: Rate = 1e-4  # Adam's rate [DAWM Tab. 7]
    idm_width: Count = 1024  # units of each hidden layer [DAWM App.]
    idm_dropout: Share = 0.1  # after the last hidden layer; [unspecified], SSORL's code
    idm_holdout: Annotated[float, (0.001, 0.9)] = 0.1  # episodes that choose the weights; [unspecified], SSORL's code

    # ---- Agent
    agent_updates: Count = 1_000_000  # critic updates; [unspecified] in [DAWM]; 200,000 in SSORL's code
    agent_batch_size: Count = 256  # transitions per update; [deviation] SSORL's code ends up with 5,120
    agent_lr: Rate = 3e-4  # Adam's rate of actor and critics; [unspecified], TD3BC's and IQL's code
    tau: Share = 0.005  # Polyak rate of the target networks; [unspecified], TD3BC's and IQL's code
    # critic updates per update of actor and targets; default 2 for td3bc [TD3BC], 1 for iql [IQL code]
    policy_delay: Count | None = None
    policy_noise: Amount = 0.2  # std of the target action's noise, actions in [-1, 1]; 0 as printed [deviation]
    noise_clip: Amount = 0.5  # bound of that noise [TD3BC]
    bc_alpha: Amount = 2.5  # weight of Q against behaviour cloning [TD3BC Eq. 5]
    expectile: Annotated[float, (0.001, 0.999)] = 0.7  # of the value loss [IQL Eq. 5]; 0.5 as printed [deviation]
    awr_beta: Amount = 3.0  # inverse temperature of the policy's weights; [unspecified], IQL's code
    max_weight: Annotated[float, (1e-8, 1e8)] = 100.0  # cap of the policy's weights; [unspecified], IQL's code
    # free standard deviation and no bounds, or tanh and squared error; [unspecified], IQL's code has both
    policy: Literal["gaussian", "deterministic"] = "gaussian"
    reward_scaling: bool = True  # times 1000 / (best - worst real return), for iql; [unspecified], IQL's code
    normalize_obs: bool = False  # standardise observations for iql [DWM App.]; not in IQL's code [unspecified]


# --laptop: fewer updates of a smaller inverse dynamics model, as dawm_td3bc.py --laptop [deviation].
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    idm_steps=5_000,
    idm_batch_size=256,
    idm_lr=1e-3,
    idm_width=256,
    normalize_obs=True,  # for iql [DWM App.]; without it so few updates leave a poor clone
    agent_lr=1e-3,
    tau=0.02,  # both as dawm_td3bc.py
    agent_updates=50_000,
)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: trajectories with and without actions
# ---------------------------------------------------------------------------------------------------------------------


def keep_trajectories(args: Args, dataset: OfflineDataset) -> np.ndarray:
    """Numbers of the trajectories that --traj-filter leaves, from the lowest return to the highest.

    return_topk: SSORL's code keeps the best trajectories while their steps stay below the number of all steps, and so
    drops exactly one, that of the lowest return. length_topk: [DAWM] speaks of the longest trajectories.
    """
    starts = np.cumsum(dataset.lengths) - dataset.lengths
    returns = np.add.reduceat(dataset.reward.astype(np.float64), starts)  # undiscounted, of complete and cut ones
    kept = np.argsort(returns, kind="stable")
    if args.traj_filter == "return_topk":
        kept = kept[1:]
    elif args.traj_filter == "length_topk":
        kept = kept[np.isin(kept, np.argsort(-dataset.lengths, kind="stable")[: args.topk])]
    if len(kept) < 3:
        raise UserError(
            f"--traj-filter {args.traj_filter} leaves {len(kept)} of {len(returns)} trajectories; 3 are needed"
        )
    return kept


def draw_labelled(args: Args, kept: np.ndarray) -> np.ndarray:
    """Numbers of the trajectories that keep their actions, out of `kept`, which rise by return [SSORL code].

    label_fraction of them, rounded down, drawn at random from the label_pool with the lowest returns: what is known
    about actions comes from poor behaviour. [deviation] The pool grows with the fraction; SSORL's code labels no more
    than half.
    """
    pool = kept[: int(max(args.label_pool, args.label_fraction) * len(kept))]
    count = int(args.label_fraction * len(kept))
    if count < 2:
        raise UserError(
            f"--label-fraction {args.label_fraction} labels {count} of {len(kept)} trajectories; two are needed, one "
            "to train on and one held out"
        )
    return np.random.default_rng(args.label_seed).choice(pool, count, replace=False)


class Trajectories:
    """The data set, the actions of most trajectories hidden.

    obs and next_obs [N, obs_dim] and action [N, action_dim], NaN where hidden, are parts of rows [N, row_dim]; `kept`
    and `labelled` are numbers of trajectories, rising.
    """

    def __init__(self, args: Args, dataset: OfflineDataset, device: torch.device):
        kept = keep_trajectories(args, dataset)
        self.kept, self.labelled = np.sort(kept), np.sort(draw_labelled(args, kept))
        self.lengths = dataset.lengths
        self.episode = np.repeat(np.arange(len(self.lengths)), self.lengths)  # of each row
        self.sizes = row_sizes(dataset.obs.shape[1], dataset.action.shape[1])
        self.rows = real_transitions(dataset, device)
        self.obs, self.action, _, self.next_obs, _ = self.rows.split(self.sizes, dim=1)
        self.action[torch.as_tensor(~np.isin(self.episode, self.labelled), device=device)] = math.nan
        first = np.diff(self.episode, prepend=-1) != 0
        self.previous = torch.as_tensor(np.arange(len(first)) - ~first, device=device)

    def rows_of(self, numbers: np.ndarray) -> torch.Tensor:
        """Indices of the rows of these trajectories, in the data's order."""
        return torch.as_tensor(np.isin(self.episode, numbers).nonzero()[0], device=self.rows.device)

    def triples(self, index: torch.Tensor) -> torch.Tensor:
        """(previous, current, next) state of the transitions `index` [B] -> [B, 3 * obs_dim].

        [unspecified] The first state of a trajectory is its own predecessor; SSORL's code puts a raw zero there. The
        next state is `next_obs` at a trajectory's end too, where SSORL's code shifts its window by one.
        """
        return torch.cat([self.obs[self.previous[index]], self.obs[index], self.next_obs[index]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: none. States and rewards are those of real trajectories.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics
# ---------------------------------------------------------------------------------------------------------------------


# Adapted from dawm_td3bc.py: the states as they are, as in its code
class InverseDynamics(nn.Module):
    """Tanh-squashed diagonal Gaussian over the action between two states, with one state of context [DAWM Eq. 3].

    Input: obs triples (previous, current, next) [..., 3 * obs_dim], dataset units. [unspecified] tanh: SSORL's code.
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        super().__init__()
        self.register_buffer("obs_mean", obs.mean(0).repeat(3))
        self.register_buffer("obs_std", obs.std(0).repeat(3) + 1e-6)

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

    def gaussian(self, triples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation, before the tanh, both [..., action_dim]."""
        states = (triples - self.obs_mean) / self.obs_std
        log_std = -1.5 + 3.5 * torch.tanh(self.log_std(states))  # in [-5, 2] [SSORL code]; its dropout is drawn first
        return self.mean(states), log_std

    def forward(self, triples: torch.Tensor) -> torch.Tensor:
        """The action at the Gaussian's mean, in (-1, 1)."""
        return torch.tanh(self.mean((triples - self.obs_mean) / self.obs_std))

    def log_prob(self, triples: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log-density of action [B, action_dim] -> [B]."""
        return tanh_normal_log_prob(action, *self.gaussian(triples))


# Copied from dawm_td3bc.py
def tanh_normal_log_prob(action: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-density of action = tanh(u), u ~ N(mean, exp(log_std)^2), summed over the last dimension."""
    action = action.clamp(-1 + 1e-6, 1 - 1e-6)  # else atanh is infinite at the bounds [SSORL code]
    log_normal = -0.5 * ((torch.atanh(action) - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - torch.log1p(-action.square())).sum(-1)


def idm_split(args: Args, trajectories: Trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of labelled rows: to train on, and those of a random share of the labelled trajectories.

    [deviation] That share is rounded up, so that something measures; SSORL's code rounds down.
    """
    order = np.random.default_rng(args.idm_seed).permutation(trajectories.labelled)
    count = min(math.ceil(args.idm_holdout * len(order)), len(order) - 1)  # something must be left to train on
    return trajectories.rows_of(order[count:]), trajectories.rows_of(order[:count])


# Adapted from dawm_td3bc.py: learns from the labelled trajectories only
def train_inverse_dynamics(args: Args, trajectories: Trajectories, run: Run) -> InverseDynamics:
    """Maximum likelihood on labelled triples; returns the weights that were best on held-out labelled trajectories.

    SSORL's code looks for these too, but goes on with the last ones [deviation].
    """
    run.seed("idm", args.idm_seed)
    # In units of all states, of hidden and left out trajectories too [SSORL code].
    inverse_dynamics = InverseDynamics(args, trajectories.obs, trajectories.action.shape[1]).to(run.device)
    best, best_loss = copy.deepcopy(inverse_dynamics).eval(), {"value": math.inf}
    optimizer = torch.optim.Adam(inverse_dynamics.parameters(), lr=args.idm_lr, fused=True)
    train, held_out = idm_split(args, trajectories)
    held_out = held_out[torch.linspace(0, len(held_out) - 1, min(len(held_out), 10_000), device=run.device).long()]
    triples, action = trajectories.triples, trajectories.action
    with run.stage(
        train_inverse_dynamics, args.idm_steps, "update", keeps=best, saves=(inverse_dynamics, optimizer, best_loss)
    ) as stage:
        for step in stage:
            index = train[torch.randint(len(train), (args.idm_batch_size,), device=run.device)]
            loss = -inverse_dynamics.log_prob(triples(index), action[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.log_every == 0 or step == args.idm_steps:
                inverse_dynamics.eval()
                with torch.no_grad():
                    held_out_loss = -inverse_dynamics.log_prob(triples(held_out), action[held_out]).mean()
                    error = (inverse_dynamics(triples(held_out)) - action[held_out]).square().mean()
                inverse_dynamics.train()
                run.log(step, {"idm/loss": loss, "idm/val_loss": held_out_loss, "idm/val_mse": error})
                if held_out_loss < best_loss["value"]:
                    best_loss["value"] = float(held_out_loss)
                    best.load_state_dict(inverse_dynamics.state_dict())
    return best


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: hidden actions to proxy labels
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


# Adapted from dawm_td3bc.py: real trajectories, whose hidden actions are filled in
@torch.no_grad()
def synthesize(args: Args, trajectories: Trajectories, inverse_dynamics, run: Run) -> dict[str, torch.Tensor]:
    """All kept trajectories with actions: rows [E, longest, row_dim], valid [E, longest], false behind their ends.

    Hidden actions, or with --relabel-all every action, are the inverse dynamics' mean [SSORL code].
    """
    lengths = torch.as_tensor(trajectories.lengths[trajectories.kept])
    valid = torch.arange(lengths.max()) < lengths[:, None]
    rollouts = {"rows": torch.zeros(*valid.shape, sum(trajectories.sizes)), "valid": valid}
    rows, places = trajectories.rows_of(trajectories.kept), valid.nonzero()
    hidden = trajectories.action.isnan() | args.relabel_all
    with run.stage(synthesize, len(rows), "transition", keeps=rollouts, after=("inverse dynamics",)) as stage:
        for index in stage.over(rows.split(10_000)):
            obs, action, *others = trajectories.rows[index].split(trajectories.sizes, dim=1)
            action = torch.where(hidden[index], inverse_dynamics(trajectories.triples(index)), action)
            here = places[stage.at : stage.at + len(index)].unbind(1)
            rollouts["rows"][here] = torch.cat([obs, action, *others], dim=1).cpu()
    run.log(0, {"synthesis/transitions": len(rows), "synthesis/proxy_labels": hidden[rows, 0].sum()})
    return rollouts


# ---------------------------------------------------------------------------------------------------------------------
# 6. Agents: TD3+BC and IQL
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


# Copied from dawm_iql.py
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


# Copied from dawm_iql.py
def reward_factor(args: Args, dataset: OfflineDataset) -> float:
    """1000 / (best - worst episode return) of the real data, for generated rewards too [IQL code]."""
    if not args.reward_scaling:
        return 1.0
    spread = float(dataset.returns.max() - dataset.returns.min())
    if not spread > 0:
        raise UserError(f"every episode of {args.env_id} has the same return; use --no-reward-scaling")
    return 1000 / spread


# Adapted from dawm_td3bc.py: two agents, one source
def train_agent(args: Args, dataset: OfflineDataset, rollouts, evaluator: Evaluator, run: Run) -> TD3BC | IQL:
    """TD3+BC or IQL on the transitions of all completed trajectories alike.

    In units of all states of the data set [SSORL code]; [deviation] its agent adds 1e-6 to their standard deviations,
    ours 1e-3 [TD3BC code].
    """
    run.seed("agent", args.seed)
    rows = rollouts["rows"][rollouts["valid"]].to(run.device)
    obs, action_dim = torch.as_tensor(dataset.obs, device=run.device), dataset.action.shape[1]
    if args.agent == "td3bc":
        agent, factor = TD3BC(args, obs, action_dim), 1.0
        optimizers = agent.actor_optimizer, agent.qf_optimizer
    else:
        factor = reward_factor(args, dataset)
        agent = IQL(args, obs, action_dim, factor)
        optimizers = agent.actor_optimizer, agent.critic_optimizer, agent.actor_schedule
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = factor * np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    losses = {}
    with run.stage(
        train_agent, args.agent_updates, "update", keeps=agent, saves=(*optimizers, losses), private=True
    ) as stage:
        for update in stage:
            batch = rows[torch.randint(len(rows), (args.agent_batch_size,), device=run.device)]
            losses |= agent.update(batch, update_actor=update % args.policy_delay == 0)
            if update % args.log_every == 0 or update == args.agent_updates:
                run.log(update, losses)
            if update % args.eval_every == 0 or update == args.agent_updates:
                evaluate(agent.actor, evaluator, run, update)
    return agent


# ---------------------------------------------------------------------------------------------------------------------
# 7. The whole method [SSORL]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args, run: Run | None = None) -> SimpleNamespace:
    """All parts that the method has, made, or found where `run` has finished before."""
    args.policy_delay = args.policy_delay or {"td3bc": 2, "iql": 1}[args.agent]
    run = run or Run(args)
    dataset = load_dataset(args.env_id, args.data_path)
    evaluator = Evaluator(dataset, args.physics, args.eval_episodes)
    trajectories = Trajectories(args, dataset, run.device)
    if args.agent == "iql":
        reward_factor(args, dataset)  # what it refuses is told before anything is made
    known, kept = (dataset.lengths[some] for some in (trajectories.labelled, trajectories.kept))
    share = float(known.sum() / kept.sum())  # far below --label-fraction where poor trajectories are short
    run.open(dataset, evaluator, labelled_trajectories=len(known), labelled_share_of_steps=share)
    inverse_dynamics = train_inverse_dynamics(args, trajectories, run)
    rollouts = synthesize(args, trajectories, inverse_dynamics, run)
    agent = train_agent(args, dataset, rollouts, evaluator, run)
    run.finish(score_report(dataset, run.history["eval/episodic_return"], evaluator))
    return SimpleNamespace(
        args=args, run=run, dataset=dataset, evaluator=evaluator, trajectories=trajectories,
        inverse_dynamics=inverse_dynamics, rollouts=rollouts, agent=agent, actor=agent.actor,
    )  # fmt: skip


# Copied from dawm_td3bc.py
def load_run(folder) -> SimpleNamespace:
    """The parts of a finished run, from its folder alone: `main` once more, with every stage found and none made."""
    run = Run.finished(folder, Args)
    return main(run.args, run)


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
