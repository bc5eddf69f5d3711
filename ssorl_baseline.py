"""SSORL: offline RL with TD3+BC or IQL on real trajectories, most of whose actions an inverse dynamics model filled in.

1. Trajectories are split: a few keep their actions, drawn from those with low returns; the actions of all others are
   hidden (section 2).
2. There is no world model (section 3 is empty): states and rewards are real.
3. An inverse dynamics model learns from the labelled trajectories which action leads from one state to the next
   (section 4).
4. It fills in the hidden actions (section 5).
5. TD3+BC or IQL, unmodified, learns from all transitions alike (section 6); the policy runs in the simulator
   (section 7).

    python ssorl_baseline.py --env-id local/hopper/medium-v0 --laptop                  # TD3+BC, a tenth labelled
    python ssorl_baseline.py --env-id local/hopper/medium-v0 --laptop --agent iql      # IQL
    python ssorl_baseline.py --env-id local/hopper/medium-v0 --laptop --label-fraction 1 --relabel-all
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
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from common.data import OfflineDataset, load_dataset
from common.evaluation import Evaluator, Stepper, normalized_score, score_report
from common.export import check_export, export_transitions
from common.run import Run, check_range, run_script
from common.stages import Kept, resumable


@dataclass
class Args:
    # ---- Run
    agent: Literal["td3bc", "iql"] = "td3bc"
    """the learner: SSORL-TD3BC, or SSORL-IQL, which is [DAWM]'s own combination"""
    env_id: str = "hopper-medium-v2"
    """data set: a D4RL name, local/ROBOT/QUALITY-v0 (made on this machine), or any Minari id"""
    data_path: Path | None = None
    """a file in D4RL's HDF5 layout to read instead of the published one"""
    laptop: bool = False
    """defaults for two CPU cores and ten minutes instead of the paper's; any flag given still wins"""
    seed: int = 0
    """seed of the agent; world model, inverse dynamics and synthesis have their own"""
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

    # ---- Data: which actions are hidden
    gamma: float = 0.99
    """discount of the agent [DAWM Tab. 7]"""
    traj_filter: Literal["return_topk", "none", "length_topk"] = "return_topk"
    """leave out the worst trajectory [SSORL code], none, or all but the --topk longest [DAWM]"""
    topk: int = 100
    """trajectories that --traj-filter length_topk keeps; [unspecified]"""
    label_fraction: float = 0.1
    """share of trajectories whose actions are known; [unspecified], SSORL's code"""
    label_pool: float = 0.5
    """they are drawn from this share with the lowest returns [SSORL code], here never below --label-fraction"""
    label_seed: int = 0
    """seed of that draw [unspecified]"""
    relabel_all: bool = False
    """replace known actions too [unspecified]"""

    # ---- Inverse dynamics
    idm_seed: int = 100
    """seed of the inverse dynamics training [unspecified]"""
    idm_steps: int = 100_000
    """gradient updates [unspecified]"""
    idm_batch_size: int = 1024
    """state triples per update; [unspecified], SSORL's code"""
    idm_lr: float = 1e-4
    """Adam's rate [DAWM Tab. 7]"""
    idm_width: int = 1024
    """units of each hidden layer [DAWM App.]"""
    idm_dropout: float = 0.1
    """after the last hidden layer; [unspecified], SSORL's code"""
    idm_holdout: float = 0.1
    """share of episodes that choose the best weights; [unspecified], SSORL's code"""
    idm_context: Literal[0, 1] = 1
    """states that it sees before the transition's own two [DAWM Sec. 4]"""

    # ---- Synthesis
    export_hdf5: Path | None = None
    """write the completed trajectories to this new file in D4RL's HDF5 layout"""
    export_minari: str | None = None
    """write them as a new Minari data set NAMESPACE/NAME-vN"""

    # ---- Agent
    agent_updates: int = 1_000_000
    """critic updates; [unspecified] in [DAWM]; 200,000 in SSORL's code"""
    agent_batch_size: int = 256
    """transitions per update; [deviation] SSORL's code ends up with 5,120"""
    agent_lr: float = 3e-4
    """Adam's rate of actor and critics; [unspecified], TD3BC's code"""
    tau: float = 0.005
    """Polyak rate of the target networks; [unspecified], TD3BC's code"""
    policy_delay: int | None = None
    """critic updates per update of actor and targets; default 2 for td3bc [TD3BC], 1 for iql [IQL code]"""
    policy_noise: float = 0.2
    """standard deviation of the target action's noise, in units of the action range's half; 0 as printed [deviation]"""
    noise_clip: float = 0.5
    """bound of that noise [TD3BC]"""
    bc_alpha: float = 2.5
    """weight of Q against behaviour cloning [TD3BC Eq. 5]"""
    expectile: float = 0.7
    """of the value loss [IQL Eq. 5]; 0.5 is the symmetric loss that is printed [deviation]"""
    awr_beta: float = 3.0
    """inverse temperature of the policy's weights; [unspecified], IQL's code"""
    max_weight: float = 100.0
    """cap of the policy's weights; [unspecified], IQL's code"""
    policy: Literal["gaussian", "deterministic"] = "gaussian"
    """free standard deviation and no bounds, or tanh and squared error; [unspecified], IQL's code has both"""
    reward_scaling: bool = True
    """rewards times 1000 / (best - worst episode return of the real data); [unspecified], IQL's code"""
    normalize_obs: bool = False
    """standardise observations for the agent [DWM App.]; off in IQL's code [unspecified]"""

    # ---- Evaluation
    eval_every: int = 5_000
    """critic updates between two evaluations [TD3BC]"""
    eval_episodes: int = 10
    """episodes per evaluation [DWM]"""
    physics: Literal["auto", "d4rl", "stock"] = "auto"
    """capsule masses of the simulator: D4RL's or today's; auto takes what the data set was recorded with"""


# --laptop: fewer updates of a smaller inverse dynamics model, as dawm_td3bc.py --laptop [deviation].
LAPTOP = dict(
    threads=1,  # a second one gains 15% at these sizes, and loses tenfold when another process wants the core
    idm_steps=5_000,
    idm_batch_size=256,
    idm_lr=1e-3,
    idm_width=256,
    normalize_obs=True,  # for IQL [DWM App.]; without it so few updates leave a poor clone (README)
    agent_updates=25_000,
    bc_alpha=1.0,  # Q has grown to half of its height by then, and lambda divides by it (README)
    eval_every=2_500,
)


# Adapted from dawm_td3bc.py: labels instead of a world model, two agents
def check_args(args: Args) -> None:
    """UserError for values with which no run makes sense, before anything is loaded."""
    counts = "idm_steps idm_batch_size idm_width agent_updates agent_batch_size policy_delay eval_every eval_episodes "
    check_range(args, 1, math.inf, counts + "log_every topk")
    check_range(args, 0, 1, "idm_dropout gamma tau label_pool")
    check_range(args, 0.001, 1, "label_fraction")
    check_range(args, 0.001, 0.999, "expectile")
    check_range(args, 0.001, 0.9, "idm_holdout")
    check_range(args, 0, 2**31, "threads seed idm_seed label_seed")
    check_range(args, 0, 100, "policy_noise noise_clip bc_alpha awr_beta")
    check_range(args, 1, 1e6, "max_weight")
    check_range(args, 0, math.inf, "checkpoint_every")
    check_range(args, 1e-8, 1, "idm_lr agent_lr")
    check_export(args)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Data: trajectories with and without actions
# ---------------------------------------------------------------------------------------------------------------------


def episode_returns(dataset: OfflineDataset) -> np.ndarray:
    """Undiscounted return of every episode, complete or not -> [E]."""
    return np.add.reduceat(dataset.reward.astype(np.float64), np.cumsum(dataset.lengths) - dataset.lengths)


def filter_trajectories(args: Args, dataset: OfflineDataset) -> OfflineDataset:
    """The data set without the episodes that --traj-filter leaves out, in their old order.

    return_topk: SSORL's code keeps the best trajectories while their steps stay below the number of all steps, and so
    drops exactly one, that of the lowest return. length_topk: [DAWM] speaks of the longest trajectories.
    """
    order = np.argsort(episode_returns(dataset), kind="stable")
    if args.traj_filter == "length_topk":
        order = np.argsort(-dataset.lengths, kind="stable")[: args.topk]
    elif args.traj_filter == "return_topk":
        order = order[1:]
    kept = np.isin(np.arange(len(dataset.lengths)), order)
    if kept.sum() < 3:
        raise UserError(
            f"--traj-filter {args.traj_filter} leaves {kept.sum()} of {len(kept)} trajectories; 3 are needed"
        )
    rows = np.repeat(kept, dataset.lengths)
    by_row = {name: getattr(dataset, name)[rows] for name in ("obs", "action", "reward", "next_obs", "terminated")}
    return dataclasses.replace(dataset, lengths=dataset.lengths[kept], complete=dataset.complete[kept], **by_row)


def hide_actions(args: Args, dataset: OfflineDataset) -> OfflineDataset:
    """The data set with NaN for every hidden action [SSORL code].

    Labelled are label_fraction of all trajectories, drawn at random from the label_pool with the lowest returns: what
    is known about actions comes from poor behaviour.
    """
    episodes = len(dataset.lengths)
    pool = np.argsort(episode_returns(dataset), kind="stable")
    pool = pool[: math.floor(max(args.label_pool, args.label_fraction) * episodes)]
    count = min(round(args.label_fraction * episodes), len(pool))
    if count < 2:
        raise UserError(
            f"--label-fraction {args.label_fraction} labels {count} of {episodes} trajectories; two are needed, one to "
            "train on and one held out"
        )
    labelled = np.isin(np.arange(episodes), np.random.default_rng(args.label_seed).choice(pool, count, replace=False))
    action = np.where(np.repeat(labelled, dataset.lengths)[:, None], dataset.action, np.float32(np.nan))
    return dataclasses.replace(dataset, action=action)


def is_labelled(dataset: OfflineDataset) -> np.ndarray:
    """Which episodes have their actions -> bool [E]."""
    return ~np.isnan(dataset.action[np.cumsum(dataset.lengths) - 1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# 3. World model: none. States and rewards are those of real trajectories.
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# 4. Inverse dynamics
# ---------------------------------------------------------------------------------------------------------------------


# Copied from dawm_td3bc.py
class InverseDynamics(nn.Module):
    """Tanh-squashed diagonal Gaussian over the action between two states, with one state of context [DAWM Eq. 3].

    Input: obs triples (previous, current, next) [..., 3 * obs_dim], dataset units; without context the first of them
    is not looked at. [unspecified] tanh: SSORL's code.
    """

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int):
        super().__init__()
        width, states = args.idm_width, 2 + args.idm_context
        self.in_dim = states * obs.shape[1]
        self.register_buffer("obs_mean", obs.mean(0).repeat(states))
        self.register_buffer("obs_std", obs.std(0).repeat(states) + 1e-6)

        def network():  # two hidden layers, mean and spread apart [DAWM App.]
            layers = [nn.Linear(self.in_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            layers += [nn.Dropout(args.idm_dropout), nn.Linear(width, action_dim)]
            for layer in layers:
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)  # [SSORL code]
                    nn.init.zeros_(layer.bias)
            return nn.Sequential(*layers)

        self.mean, self.log_std = network(), network()

    def normalize(self, triples: torch.Tensor) -> torch.Tensor:
        return (triples[..., -self.in_dim :] - self.obs_mean) / self.obs_std

    def gaussian(self, triples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log of the standard deviation, before the tanh, both [..., action_dim]."""
        states = self.normalize(triples)
        log_std = -1.5 + 3.5 * torch.tanh(self.log_std(states))  # in [-5, 2] [SSORL code]; its dropout is drawn first
        return self.mean(states), log_std

    def forward(self, triples: torch.Tensor) -> torch.Tensor:
        """The action at the Gaussian's mean, in (-1, 1)."""
        return torch.tanh(self.mean(self.normalize(triples)))

    def sample(self, triples: torch.Tensor) -> torch.Tensor:
        """An action drawn from the Gaussian, in (-1, 1)."""
        mean, log_std = self.gaussian(triples)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean))

    def log_prob(self, triples: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log-density of action [B, action_dim] -> [B]."""
        return tanh_normal_log_prob(action, *self.gaussian(triples))


# Copied from dawm_td3bc.py
def tanh_normal_log_prob(action: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-density of action = tanh(u), u ~ N(mean, exp(log_std)^2), summed over the last dimension."""
    action = action.clamp(-1 + 1e-6, 1 - 1e-6)  # else atanh is infinite at the bounds [SSORL code]
    log_normal = -0.5 * ((torch.atanh(action) - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - torch.log1p(-action.square())).sum(-1)


def obs_triples(dataset: OfflineDataset, device: torch.device) -> torch.Tensor:
    """(previous, current, next) state of every transition -> [N, 3 * obs_dim].

    [unspecified] The first state of an episode is its own predecessor; SSORL's code puts a raw zero there. The next
    state is `next_obs` at an episode's end too, where SSORL's code shifts its window by one.
    """
    previous = np.concatenate([dataset.obs[:1], dataset.obs[:-1]])
    starts = np.cumsum(dataset.lengths) - dataset.lengths
    previous[starts] = dataset.obs[starts]
    return torch.as_tensor(np.concatenate([previous, dataset.obs, dataset.next_obs], axis=1), device=device)


# Adapted from dawm_td3bc.py: learns from the labelled trajectories only
def train_inverse_dynamics(args: Args, dataset: OfflineDataset, run: Run) -> InverseDynamics:
    """Maximum likelihood on labelled transitions; returns the weights that were best on held-out labelled episodes."""
    kept = Kept(run, "inverse dynamics", train_inverse_dynamics)
    run.seed("idm", args.idm_seed)
    obs = torch.as_tensor(dataset.obs, device=run.device)  # statistics of all states, as SSORL's code
    inverse_dynamics = InverseDynamics(args, obs, dataset.action.shape[1]).to(run.device)
    if kept.tensors is not None:
        inverse_dynamics.load_state_dict(kept.tensors)
        return inverse_dynamics.eval()
    optimizer = torch.optim.Adam(inverse_dynamics.parameters(), lr=args.idm_lr, fused=True)
    triples, action = obs_triples(dataset, run.device), torch.as_tensor(dataset.action, device=run.device)
    labelled = is_labelled(dataset)
    episodes = np.random.default_rng(args.idm_seed).permutation(labelled.nonzero()[0])
    held_out = np.isin(np.arange(len(labelled)), episodes[: math.ceil(args.idm_holdout * len(episodes))])
    train, measure = (
        torch.as_tensor(np.repeat(mask, dataset.lengths).nonzero()[0], device=run.device)
        for mask in (labelled & ~held_out, held_out)
    )
    if not len(train):
        raise UserError(f"--idm-holdout {args.idm_holdout} leaves no labelled trajectory to train on; lower it")
    measure = measure[torch.linspace(0, len(measure) - 1, min(len(measure), 10_000), device=run.device).long()]
    best = {"loss": math.inf}
    with run.stage("inverse dynamics", args.idm_steps, "update", (inverse_dynamics, optimizer, best)) as stage:
        for step in stage:
            index = train[torch.randint(len(train), (args.idm_batch_size,), device=run.device)]
            loss = -inverse_dynamics.log_prob(triples[index], action[index]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.log_every == 0 or step == args.idm_steps:
                inverse_dynamics.eval()
                with torch.no_grad():
                    held_out_loss = -inverse_dynamics.log_prob(triples[measure], action[measure]).mean()
                    error = (inverse_dynamics(triples[measure]) - action[measure]).square().mean()
                inverse_dynamics.train()
                run.log(step, {"idm/loss": loss, "idm/val_loss": held_out_loss, "idm/val_mse": error})
                if held_out_loss < best["loss"]:
                    best["loss"], best["mse"] = float(held_out_loss), float(error)
                    best["weights"] = copy.deepcopy(inverse_dynamics.state_dict())
    inverse_dynamics.load_state_dict(best["weights"])
    run.log(args.idm_steps, {f"idm/best_val_{name}": best[name] for name in ("loss", "mse")})
    kept.keep(best["weights"])
    return inverse_dynamics.eval()


# ---------------------------------------------------------------------------------------------------------------------
# 5. Synthesis: hidden actions to proxy labels
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_in_actions(args: Args, dataset: OfflineDataset, inverse_dynamics, run: Run) -> OfflineDataset:
    """The data set with the inverse dynamics' mean for every hidden action, or, --relabel-all, for every action."""
    with run.timed("labelling"):
        triples = obs_triples(dataset, run.device)
        proxy = torch.cat([inverse_dynamics(part) for part in triples.split(10_000)]).cpu().numpy()
    hidden = np.isnan(dataset.action) | args.relabel_all
    run.log(0, {"synthesis/proxy_labels": hidden[:, 0].sum(), "synthesis/labels": (~hidden[:, 0]).sum()})
    return dataclasses.replace(dataset, action=np.where(hidden, proxy, dataset.action))


# Copied from dawm_td3bc.py
def real_transitions(dataset: OfflineDataset, device: torch.device) -> torch.Tensor:
    """The data set as rows [N, 2 * obs_dim + action_dim + 2].

    [deviation] Rows at a time limit are kept and bootstrapped, since their successor is known; TD3BC's code skips them.
    """
    columns = [dataset.obs, dataset.action, dataset.reward[:, None], dataset.next_obs, dataset.terminated[:, None]]
    return torch.as_tensor(np.concatenate(columns, axis=1, dtype=np.float32), device=device)


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
class IQL:
    """Policy, value, twin critics and their targets; `update` is one step of [DAWM Alg. 3] in the form of [IQL]."""

    def __init__(self, args: Args, obs: torch.Tensor, action_dim: int, reward_factor: float):
        self.args, self.reward_factor, obs_dim = args, reward_factor, obs.shape[1]
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]  # of a row's parts
        mean, std = obs.mean(0), obs.std(0) + 1e-3  # of the real data, for synthetic data too
        if not args.normalize_obs:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        self.actor = Policy(mean, std, action_dim, args.policy).to(obs.device)
        self.qf1, self.qf2 = (Critic(mean, std, action_dim).to(obs.device) for _ in range(2))
        self.vf = Value(mean, std).to(obs.device)
        self.qf1_target, self.qf2_target = copy.deepcopy(self.qf1), copy.deepcopy(self.qf2)
        self.qf_parameters = [*self.qf1.parameters(), *self.qf2.parameters()]
        self.qf_target_parameters = [*self.qf1_target.parameters(), *self.qf2_target.parameters()]
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=args.agent_lr, fused=True)
        self.critic_parameters = [*self.qf_parameters, *self.vf.parameters()]
        self.critic_optimizer = torch.optim.Adam(self.critic_parameters, lr=args.agent_lr, fused=True)
        actor_updates = max(1, args.agent_updates // args.policy_delay)
        self.actor_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, actor_updates)

    def update(self, batch: torch.Tensor, update_actor: bool) -> dict[str, torch.Tensor]:
        """One update of value and critics on rows [B, row_dim] and, if asked for, of targets and policy. Losses."""
        obs, action, reward, next_obs, terminated = batch.split(self.sizes, dim=1)
        # Both before any network moves, as in IQL's code.
        target = self.td_target(reward[:, 0], next_obs, terminated[:, 0])
        with torch.no_grad():  # the target critics, as in IQL's code; the online ones are printed [deviation]
            q = torch.minimum(self.qf1_target(obs, action), self.qf2_target(obs, action))
        advantage = q - self.vf(obs)
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


# Adapted from dawm_td3bc.py: one source
def batches(args: Args, transitions: torch.Tensor, at: dict):
    """Endless (rows, update_actor): what each critic update learns from, and whether the actor follows it.

    `at` begins as {"count": 0} and is kept up, so that an interrupted run goes on there.
    """
    while True:
        at["count"] += 1
        index = torch.randint(len(transitions), (args.agent_batch_size,), device=transitions.device)
        yield transitions.index_select(0, index), at["count"] % args.policy_delay == 0


# Adapted from dawm_td3bc.py: two agents, one source
def train_agent(args: Args, dataset: OfflineDataset, reward_scale: float, evaluator: Evaluator, run: Run):
    """TD3+BC or IQL on all transitions alike -> the mean return of every evaluation, in order; keeps the actor."""
    run.seed("agent", args.seed)
    transitions = real_transitions(dataset, run.device)
    obs, action_dim = transitions[:, : dataset.obs.shape[1]], dataset.action.shape[1]
    factor = 1 if args.agent == "td3bc" else reward_scale
    agent = TD3BC(args, obs, action_dim) if args.agent == "td3bc" else IQL(args, obs, action_dim, factor)
    # No policy's values lie above this where rewards are like the data's: a mean target beyond it means divergence.
    run.bounds["agent/qf_target"] = factor * np.abs(dataset.reward).max() / max(1 - args.gamma, 1e-9)
    resumable(run, "agent", train_agent)
    progress = {"losses": {}, "returns": [], "at": {"count": 0}}
    with run.stage("agent", args.agent_updates, "update", (agent, progress)) as stage:
        source = batches(args, transitions, progress["at"])
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
# 7. The whole method [SSORL]
# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> float:
    args.policy_delay = {"td3bc": 2, "iql": 1}[args.agent] if args.policy_delay is None else args.policy_delay
    check_args(args)
    run = Run(args)
    with run.timed("data"):
        dataset = load_dataset(args.env_id, args.data_path)
    args.physics = dataset.physics if args.physics == "auto" else args.physics
    evaluator = Evaluator(
        dataset.simulator, args.physics, args.eval_episodes, dataset.simulator_kwargs, dataset.obs.shape[1]
    )
    run.describe(dataset.facts(), label_fraction=args.label_fraction, label_pool=args.label_pool)
    own_returns = dataset.returns
    reward_scale = reward_factor(args, dataset) if args.agent == "iql" else 1.0  # of all real data
    dataset = hide_actions(args, filter_trajectories(args, dataset))
    run.fingerprints["data"] = dataset.fingerprint  # the inverse dynamics depends on what was hidden
    labelled = is_labelled(dataset)
    run.say("labels", f"actions of {labelled.sum()} trajectories known, of {(~labelled).sum()} hidden")
    inverse_dynamics = train_inverse_dynamics(args, dataset, run)
    dataset = fill_in_actions(args, dataset, inverse_dynamics, run)
    rows, method = (
        real_transitions(dataset, torch.device("cpu")),
        "SSORL (recorded states and rewards, inferred actions)",
    )
    export_transitions(run, rows, int(dataset.lengths.max()), dataset, evaluator, Stepper, method)
    returns = train_agent(args, dataset, reward_scale, evaluator, run)
    run.finish(score_report(dataset.robot, own_returns, returns, evaluator))
    return returns[-1]


if __name__ == "__main__":
    run_script(main, Args, LAPTOP)
