"""Is the synthetic data true? Every transition of a set against the simulator, the data, and the model's own spread.

    python experiments/audit.py runs/local-hopper-medium-v0__dawm_td3bc__0__...      # a run
    python experiments/audit.py runs/stages/synthesis-0123456789abcdef               # a kept synthetic set

Four judges, each step of the rollout by itself; real data goes through the first two beside it, as their floor:

1. The simulator: set to the row's state, given its action, what follows? Errors of next state and reward in standard
   deviations of the data, of a fall by count. Rows with a velocity at the observation's clip cannot be checked. The
   same for real rows, under the data's physics and, to show that the instrument can tell, under the other one.
2. The action: which one would have led to the row's next state? Least squares through finite differences of the
   simulator, from the row's own action. "left" is the error that no action explains, "its part" what the row's own
   action adds to it. The distance of the two actions says less: a small error of the state asks for a large change of
   an action that hardly moves the robot.
3. The data: distance of each column's distribution and of all correlations, as [SynthER] reports them, and of the
   change of state from that of the nearest real neighbours. Copies of the data would get 1 from the first two, two
   halves of it get less. At step 0 state and action are real.
4. The world model's spread: many rollouts from held-out real pairs, asked for their true return-to-go. Spread beside
   error, rank of the truth, and CRPS, beside an ensemble of one-step Gaussian models with as many parameters and at
   most as many updates of as large batches, stopped by held-out episodes [PETS].

Printed, and written as audit.json and audit.png to --out (by default the run's folder, or runs/audit/SET).

[SynthER] Synthetic Experience Replay, arXiv 2303.06614
[PETS]    Deep RL in a Handful of Trials using Probabilistic Dynamics Models, arXiv 1805.12114
"""

import argparse
import dataclasses
import hashlib
import importlib
import json
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import mujoco
import numpy as np
import torch
from matplotlib.colors import LogNorm
from render import first_rows, read_json, read_source
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from common import UserError, tell
from common.data import OfflineDataset, load_dataset
from common.evaluation import Stepper
from common.run import check_range, write_text_whole, write_whole
from common.stages import stage_source

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 5_000  # rows that the simulator takes at once
ITERATIONS = 8  # of the search for an action
FEWEST = 20  # rows of a step that are worth a figure
NAMES = {  # of the observations' dimensions
    "hopper": "z pitch thigh leg foot vx vz w_pitch w_thigh w_leg w_foot".split(),
    "walker2d": "z pitch thigh leg foot thigh_l leg_l foot_l vx vz w_pitch w_thigh w_leg w_foot w_thigh_l w_leg_l "
    "w_foot_l".split(),
    "halfcheetah": "z pitch bthigh bshin bfoot fthigh fshin ffoot vx vz w_pitch w_bthigh w_bshin w_bfoot w_fthigh "
    "w_fshin w_ffoot".split(),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is audited
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """A synthetic set, the arguments and models that made it, and the data they learned from."""

    args: object  # Args of the script `module`
    module: object  # the script whose world model it is
    dataset: OfflineDataset
    transitions: np.ndarray  # rows [M, row_dim]: obs, action, reward, next_obs, terminated
    world_model: Path | None  # folder of the kept world model; None, and `why`, if it cannot be used
    why: str
    out: Path
    facts: dict


def find(path: Path, data_path: Path | None) -> Subject:
    """The subject that a run's folder or a kept set's folder names; UserError says what is missing."""
    source = read_source(path)
    inputs, args, world_model, why = source.manifest["depends"]["inputs"], source.args, None, ""
    names = [Path(command).stem for command in source.run_content.get("command", [])[:1]]
    modules = [
        importlib.import_module(name)
        for name in dict.fromkeys([*names, "dawm_td3bc", "joint_td3bc"])
        if (ROOT / f"{name}.py").exists()
    ]
    module = modules[0]
    for manifest in source.folder.parent.glob("world_model-*/manifest.json"):
        content = read_json(manifest)
        if content["sha256"] == inputs["world model"]:
            args, world_model = {**args, **content["depends"]["args"]}, manifest.parent
            same = [m for m in modules if code_of(m) == content["depends"]["source"]]
            module, why = (same[0], "") if same else (module, f"{world_model} was made by other code than is here now")
            if same:  # else another folder may hold the same weights, from other code
                break
    why = why if world_model else f"the world model is no longer in {source.folder.parent}"
    if data_path is None and args.get("data_path") not in (None, "None"):
        data_path = Path(source.run_content["cwd"]) / args["data_path"]
    fields = {field.name for field in dataclasses.fields(module.Args)}
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items() if name in fields}
    args = module.Args(**{**args, "data_path": data_path, "compile": False})
    dataset = load_dataset(args.env_id, data_path)
    if dataset.fingerprint != inputs["data"]:
        raise UserError(f"{source.folder} was made from other data than {dataset.path} holds; see --data-path")
    facts = {
        "set": str(source.folder),
        "sha256": source.manifest["sha256"],
        "env_id": args.env_id,
        "data": dataset.fingerprint,
        "script": names[0] if names else module.__name__,
        "transitions": len(source.rows),
        "args": source.manifest["depends"]["args"],
    }
    out = path if source.run == path else Path("runs/audit") / path.name
    return Subject(args, module, dataset, source.rows, None if why else world_model, why, out, facts)


def code_of(module) -> str:
    """As the stage store names the code that trains a world model."""
    return hashlib.sha256(stage_source(module.train_world_model)[0].encode()).hexdigest()


@dataclasses.dataclass
class Rows:
    """Transitions as float64 arrays [N, ...]; step [N] is their place h in the rollout."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    step: np.ndarray

    def __getitem__(self, index) -> "Rows":
        return Rows(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def rollout_step(transitions: np.ndarray, obs_dim: int, horizon: int) -> np.ndarray:
    """The step h of each row [M]."""
    first = first_rows(transitions, obs_dim, horizon)
    return np.arange(len(transitions)) - np.repeat(first, np.diff(first, append=len(transitions)))


def synthetic_rows(subject: Subject, count: int) -> Rows:
    """At most `count` rows of the set, evenly over it."""
    transitions, obs_dim, action_dim = (
        subject.transitions,
        subject.dataset.obs.shape[1],
        subject.dataset.action.shape[1],
    )
    step = rollout_step(transitions, obs_dim, subject.args.horizon)
    chosen = np.random.default_rng(0).permutation(len(transitions))[:count]
    chosen.sort()
    rows = transitions[chosen].astype(float)
    parts = np.split(rows, np.cumsum([obs_dim, action_dim, 1, obs_dim]), axis=1)
    obs, action, reward, next_obs, terminated = parts
    return Rows(obs, action, reward[:, 0], next_obs, terminated[:, 0] > 0, step[chosen])


def real_rows(dataset: OfflineDataset, count: int) -> Rows:
    """At most `count` rows of the data, evenly over it; their step is 0."""
    index = np.sort(np.random.default_rng(1).permutation(len(dataset.reward))[:count])
    columns = (dataset.obs, dataset.action, dataset.reward, dataset.next_obs)
    return Rows(*(column[index].astype(float) for column in columns), dataset.terminated[index], 0 * index)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The simulator
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Units:
    """Standard deviations of the data: obs [obs_dim], reward."""

    obs: np.ndarray
    reward: float

    @classmethod
    def of(cls, dataset: OfflineDataset) -> "Units":
        return cls(dataset.obs.std(0, dtype=float) + 1e-6, float(dataset.reward.std(dtype=float)) + 1e-6)


def simulate(stepper: Stepper, obs: np.ndarray, action: np.ndarray, bar: tqdm) -> tuple[np.ndarray, ...]:
    """The stepper on many rows, part by part, with progress."""
    made = []
    for begin in range(0, len(obs), CHUNK):
        made.append(stepper(obs[begin : begin + CHUNK], action[begin : begin + CHUNK]))
        bar.update(len(made[-1][0]))
    return tuple(map(np.concatenate, zip(*made, strict=True)))


def check(stepper: Stepper, rows: Rows, units: Units, bar: tqdm) -> dict[str, np.ndarray]:
    """For each row: error [N, obs_dim] and reward_error [N] in standard deviations, fell (in the simulator), checkable,
    jerk [N], by how many standard deviations the simulator's own velocities changed, and its next_obs."""
    next_obs, reward, fell = simulate(stepper, rows.obs, rows.action, bar)
    velocity = slice(stepper.env.model.nq - 1, None)
    return {
        "error": (rows.next_obs - next_obs) / units.obs,
        "reward_error": (rows.reward - reward) / units.reward,
        "fell": fell,
        "checkable": stepper.checkable(rows.obs) & np.isfinite(next_obs).all(1),
        "next_obs": next_obs,
        "jerk": np.sqrt(np.square((next_obs - rows.obs)[:, velocity] / units.obs[velocity]).mean(1)),
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Median, 90 % and 99 %, and the largest of absolute values [N]."""
    if not len(values):
        return dict.fromkeys(("median", "90", "99", "max"), math.nan)
    median, p90, p99 = np.quantile(np.abs(values), (0.5, 0.9, 0.99))
    return {"median": median, "90": p90, "99": p99, "max": np.abs(values).max()}


def summary(rows: Rows, checked: dict, keep: np.ndarray, names: list[str]) -> dict:
    """Figures of the rows `keep` [N]: state errors are root mean squares over the dimensions of a row."""
    seen = keep & checked["checkable"]
    error, fell, told = checked["error"][seen], checked["fell"][seen], rows.terminated[seen]
    return {
        "rows": int(keep.sum()),
        "uncheckable": 1 - seen.sum() / max(keep.sum(), 1),
        "state": quantiles(np.sqrt(np.square(error).mean(1))),
        "state_dimensions": {name: quantiles(error[:, i]) for i, name in enumerate(names)},
        "reward": quantiles(checked["reward_error"][seen]),
        "termination_agrees": float((fell == told).mean()) if len(fell) else math.nan,
        "falls": {"simulator": int(fell.sum()), "told": int(told.sum()), "both": int((fell & told).sum())},
        "actions_at_bounds": float((np.abs(rows.action[keep]) > 0.999).mean()) if keep.any() else math.nan,
    }


def exactness(stepper: Stepper, rows: Rows, checked: dict, units: Units, limit: float = 1e-5, draws: int = 200) -> dict:
    """How many checkable rows err by more than limit, and how many of those (of a hundred) are exact from a state that
    float32 cannot tell from theirs: where a contact just begins, the rounding of the stored state decides it."""
    error = np.sqrt(np.square(checked["error"]).mean(1))
    above = np.flatnonzero(checked["checkable"] & (error > limit))
    rng, rounding = np.random.default_rng(0), 0
    for row in above[:100]:
        obs = rows.obs[row] + rng.uniform(-0.5, 0.5, (draws, len(units.obs))) * np.spacing(
            np.abs(rows.obs[row]).astype(np.float32)
        )
        next_obs = stepper(obs, np.repeat(rows.action[row : row + 1], draws, axis=0))[0]
        rounding += np.sqrt(np.square((rows.next_obs[row] - next_obs) / units.obs).mean(1)).min() < limit
    return {"limit": limit, "above": len(above), "tried": min(len(above), 100), "rounding": int(rounding)}


def contacts(stepper: Stepper, obs: np.ndarray) -> np.ndarray:
    """How many contacts the simulator sees in each state [N]: positions decide."""
    model, data, counts = stepper.env.model, mujoco.MjData(stepper.env.model), []
    for position in obs[:, : model.nq - 1]:
        data.qpos[1:] = position
        mujoco.mj_fwdPosition(model, data)
        counts.append(data.ncon)
    return np.array(counts)


def by_contact(stepper: Stepper, rows: Rows, checked: dict, few: np.ndarray) -> dict:
    """State error of the rows `few` in whose step, in the simulator, a contact begins or ends, and of the others."""
    changed = contacts(stepper, rows.obs[few]) != contacts(stepper, checked["next_obs"][few])
    error = np.sqrt(np.square(checked["error"][few]).mean(1))
    parts = {"begins or ends": quantiles(error[changed]), "stays": quantiles(error[~changed])}
    return {"share": float(changed.mean()), **parts}


def by_jerk(checked: dict, count: int = 10) -> dict:
    """Median state error in `count` equal groups of rows, from the smoothest simulated step to the most sudden one."""
    seen = checked["checkable"]
    error, jerk = np.sqrt(np.square(checked["error"][seen]).mean(1)), checked["jerk"][seen]
    groups = np.array_split(np.argsort(jerk), count)
    return {
        "jerk": [float(np.median(jerk[group])) for group in groups],
        "error": [float(np.median(error[group])) for group in groups],
    }


# ---------------------------------------------------------------------------------------------------------------------
# 2. The action that explains a transition
# ---------------------------------------------------------------------------------------------------------------------


def explaining_action(stepper: Stepper, rows: Rows, units: Units, bar: tqdm) -> tuple[np.ndarray, ...]:
    """Action [N, action_dim] in [-1, 1] that brings the simulator nearest to next_obs, the error [N] it leaves, and the
    error that taking the row's own action instead adds [N]: how far apart the two leave the simulator.

    Levenberg and Marquardt's damped least squares from the row's own action. A step that does not help is not taken;
    an action at its bound that would leave it is held there while the others are solved for.
    """
    best = rows.action.clip(-1, 1)
    own = made = simulate(stepper, rows.obs, best, bar)[0]
    made = made.copy()
    residual = (rows.next_obs - made) / units.obs
    damping = np.full(len(best), 1e-3)
    for _ in range(ITERATIONS):
        jacobian = np.empty((*residual.shape, best.shape[1]))
        for column in range(best.shape[1]):
            moved = best.copy()
            moved[:, column] -= 1e-4 * np.where(best[:, column] > 0, 1, -1)  # inwards: controls are clipped
            shift = (moved - best)[:, column, None] * units.obs
            jacobian[:, :, column] = (simulate(stepper, rows.obs, moved, bar)[0] - made) / shift
        jacobian = np.nan_to_num(jacobian)
        gradient = np.einsum("nda,nd->na", jacobian, np.nan_to_num(residual))
        free = ~(((best >= 1) & (gradient > 0)) | ((best <= -1) & (gradient < 0)))
        jacobian, gradient = jacobian * free[:, None], gradient * free
        normal = np.einsum("nda,ndb->nab", jacobian, jacobian)
        scale = np.einsum("naa->n", normal) * damping + 1e-12
        step = np.linalg.solve(normal + scale[:, None, None] * np.eye(best.shape[1]), gradient[..., None])[..., 0]
        trial = (best + step).clip(-1, 1)
        trial_made = simulate(stepper, rows.obs, trial, bar)[0]
        trial_residual = (rows.next_obs - trial_made) / units.obs
        helps = np.square(trial_residual).sum(1) < np.square(residual).sum(1)
        best[helps], made[helps], residual[helps] = trial[helps], trial_made[helps], trial_residual[helps]
        damping = np.where(helps, damping / 10, damping * 10)
    caused = np.sqrt(np.square((made - own) / units.obs).mean(1))
    return best, np.sqrt(np.square(residual).mean(1)), caused


# ---------------------------------------------------------------------------------------------------------------------
# 3. The data
# ---------------------------------------------------------------------------------------------------------------------


def columns(rows: Rows) -> np.ndarray:
    return np.concatenate([rows.obs, rows.action, rows.reward[:, None], rows.next_obs], axis=1)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Largest distance between the cumulative distributions of each column of a [N, d] and b [M, d] -> [d]."""
    distances = []
    for x, y in zip(np.sort(a, axis=0).T, np.sort(b, axis=0).T, strict=True):
        both = np.concatenate([x, y])
        share = [np.searchsorted(z, both, side="right") / len(z) for z in (x, y)]
        distances.append(np.abs(share[0] - share[1]).max())
    return np.array(distances)


def likeness(rows: Rows, real: Rows, obs_dim: int) -> dict:
    """[SynthER]'s two figures, 1 for equal: mean over columns of 1 - Kolmogorov and Smirnov's distance, and mean over
    pairs of columns of 1 - |difference of their correlations| / 2; and the former's distances themselves."""
    a, b = columns(rows), columns(real)
    distance = kolmogorov_smirnov(a, b)
    varies = (a.std(0) > 1e-9) & (b.std(0) > 1e-9)
    upper = np.triu_indices(int(varies.sum()), 1)
    difference = np.abs(np.corrcoef(a[:, varies].T) - np.corrcoef(b[:, varies].T))[upper]
    return {
        "marginals": float(1 - distance.mean()),
        "correlations": float(1 - difference.mean() / 2),
        "distance_obs": distance[:obs_dim].tolist(),
        "distance_action": distance[obs_dim : -obs_dim - 1].tolist(),
        "distance_reward": float(distance[-obs_dim - 1]),
    }


def neighbour_distance(rows: Rows, real: Rows, units: Units, count: int = 10) -> np.ndarray:
    """How far each row's change of state is from the mean of its `count` nearest real rows', in units of their own
    spread around it [N]; what is usual, real rows tell. Near is by state and action, each in standard deviations; the
    row itself does not count. No simulator is needed."""
    place = torch.as_tensor(np.concatenate([real.obs / units.obs, real.action / (real.action.std(0) + 1e-6)], 1))
    query = torch.as_tensor(np.concatenate([rows.obs / units.obs, rows.action / (real.action.std(0) + 1e-6)], 1))
    change = torch.as_tensor((real.next_obs - real.obs) / units.obs)
    own = torch.as_tensor((rows.next_obs - rows.obs) / units.obs)
    distances = []
    for part, change_of_part in zip(query.split(200), own.split(200), strict=True):
        # Not by products: float32 would not see that a row is at no distance from itself.
        far = torch.cdist(part.float(), place.float(), compute_mode="donot_use_mm_for_euclid_dist")
        far, index = far.topk(count + 1, largest=False)
        copies = far[:, :1] < 1e-3  # of the row itself; then the nearest is left out, else the farthest
        index = torch.where(copies, index[:, 1:], index[:, :-1])
        near = change[index]
        spread = near.var(1).sum(1).sqrt()
        distances.append((change_of_part - near.mean(1)).square().sum(1).sqrt() / (spread + 1e-9))
    return torch.cat(distances).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# 4. The world model's spread, beside an ensemble of one-step Gaussian models
# ---------------------------------------------------------------------------------------------------------------------


class GaussianEnsemble(nn.Module):
    """Five networks of two hidden layers, in one batch; each gives mean and log-variance, in normalised units [PETS].

    x [5, B, in_dim] -> mean, log_var [5, B, out_dim].
    """

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor, width: int):
        super().__init__()
        sizes = [inputs.shape[1], width, width, 2 * outputs.shape[1]]
        for name, values in (("in", inputs), ("out", outputs)):
            self.register_buffer(f"{name}_mean", values.mean(0))
            self.register_buffer(f"{name}_std", values.std(0) + 1e-6)
        layers = [torch.randn(5, i, o) / math.sqrt(i) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        self.weights = nn.ParameterList(layers)
        self.biases = nn.ParameterList([torch.zeros(5, 1, size) for size in sizes[1:]])

    def forward(self, x):
        x = (x - self.in_mean) / self.in_std
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = nn.functional.silu(torch.baddbmm(bias, x, weight))
        mean, log_var = torch.baddbmm(self.biases[-1], x, self.weights[-1]).chunk(2, dim=2)
        return mean, 1 - nn.functional.softplus(1 - (nn.functional.softplus(log_var + 12) - 12))  # in [-12, 1], softly

    def loss(self, x, y):
        mean, log_var = self(x)
        error = (y - self.out_mean) / self.out_std - mean
        return (log_var + error.square() / log_var.exp()).mean()

    def sample(self, x):
        """x [5, B, in_dim] -> [5, B, out_dim], dataset units."""
        mean, log_var = self(x)
        return (mean + (log_var / 2).exp() * torch.randn_like(mean)) * self.out_std + self.out_mean

    @classmethod
    def fit(cls, inputs, outputs, measured, width: int, updates: int, batch: int, bar: tqdm):
        """Trained on inputs [N, in_dim], outputs [N, out_dim] outside the rows `measured`; the weights that were best
        there, once they have not improved for a tenth of the updates -> the ensemble, the number of updates made."""
        ensemble = cls(inputs, outputs, width)
        optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
        train, measured = (~measured).nonzero()[:, 0], measured.nonzero()[:10_000, 0]
        best, best_at, weights = math.inf, 0, None
        for update in range(1, updates + 1):
            index = train[torch.randint(len(train), (5, batch))]
            loss = ensemble.loss(inputs[index], outputs[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
            if update % 250 == 0 or update == updates:
                with torch.no_grad():
                    held_out = ensemble.loss(inputs[measured].expand(5, -1, -1), outputs[measured]).item()
                if held_out < best - 1e-3:
                    best, best_at = held_out, update
                    weights = {name: value.clone() for name, value in ensemble.state_dict().items()}
                elif update - best_at > updates / 10:
                    break
        bar.update(updates - update)
        ensemble.load_state_dict(weights)
        return ensemble, update


def crps(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Continuous ranked probability score of samples [P, m, ...] for truth [P, ...], fair for finite m -> [P, ...]."""
    m = samples.shape[1]
    ordered = samples.sort(dim=1).values
    weight = (2 * torch.arange(m) - m + 1).to(samples).view(1, m, *[1] * (samples.dim() - 2))
    return (samples - truth[:, None]).abs().mean(1) - (weight * ordered).sum(1) / (m * (m - 1))


def scores(samples: torch.Tensor, truth: torch.Tensor) -> dict:
    """Of samples [P, m, S, D] for truth [P, S, D], in standard deviations: per step, the error of their mean, their
    spread, CRPS and how often truth lies outside of all of them; and how often it takes each rank [m + 1]."""
    m = samples.shape[1]
    spread = (samples.var(1).mean((0, 2)) * (m + 1) / m).sqrt()  # of a fair ensemble it equals the error
    below, above = (samples < truth[:, None]).sum(1), (samples > truth[:, None]).sum(1)
    ties = m - below - above
    rank = below + (torch.rand(below.shape) * (ties + 1)).long()  # a tie takes any of its places
    return {
        "error": (samples.mean(1) - truth).square().mean((0, 2)).sqrt().tolist(),
        "spread": spread.tolist(),
        "crps": crps(samples, truth).mean((0, 2)).tolist(),
        "outside": ((rank == 0) | (rank == m)).float().mean((0, 2)).tolist(),
        "ranks": torch.stack([torch.bincount(r.flatten(), minlength=m + 1) for r in rank.unbind(1)]).tolist(),
    }


@torch.no_grad()
def calibration(subject: Subject, pairs: int, rollouts: int, updates: int) -> dict:
    """See the module's docstring, 4. UserError if the world model is gone, or no held-out episode is long enough."""
    if subject.why:
        raise UserError(subject.why)
    args, module, dataset = subject.args, subject.module, subject.dataset
    windows = module.Windows(args, dataset, torch.device("cpu"))
    held_out = windows.held_out(args.world_model_holdout, args.world_model_seed)
    index = (windows.fits & held_out).nonzero()[:, 0]
    if not len(index):
        raise UserError("no episode held out from the world model's training is as long as its windows")
    world_model = module.WorldModel(args, windows)
    world_model.load_state_dict(load_file(subject.world_model / "tensors.safetensors"))
    index = index[torch.linspace(0, len(index) - 1, min(pairs, len(index))).long()]
    units, steps, obs_dim = Units.of(dataset), args.model_horizon + 1, dataset.obs.shape[1]
    scale = torch.as_tensor(np.append(units.obs, units.reward), dtype=torch.float32)
    rows = windows.rows(index)
    truth = torch.cat([windows.obs[rows][:, 1:], windows.reward[rows][:, :-1, None]], dim=2) / scale
    torch.manual_seed(0)
    made = []
    with tqdm(total=len(index) * rollouts, desc="rollouts of held-out pairs", unit="rollout") as bar:
        for part in index.repeat_interleave(rollouts).split(1024):
            result = module.sample_rollouts(
                args,
                world_model,
                windows.obs[windows.start[part]],
                windows.action[part],
                windows.return_to_go[part, None],
            )
            made.append(torch.cat([result[0][:, 1:], result[-1][..., None]], dim=2))
            bar.update(len(part))
    result = {"world model": scores(torch.cat(made).view(len(index), rollouts, steps, -1) / scale, truth)}

    drawn = torch.randint(len(dataset.obs), (len(index), rollouts, steps))  # what knowing nothing scores
    guess = torch.cat([windows.obs[windows.start[drawn]], torch.as_tensor(dataset.reward)[drawn][..., None]], dim=3)
    result["any real state"] = scores(guess / scale, truth)

    # The ensemble: (state, action) to change of state and reward, and state to action, since a rollout needs both.
    parameters, batch = sum(p.numel() for p in world_model.denoiser.parameters()), args.world_model_batch_size
    result["facts"] = {
        "pairs": len(index),
        "rollouts": rollouts,
        "world model": {"parameters": parameters, "updates": args.world_model_steps, "batch": batch},
    }
    if not updates:
        return result
    obs, action = torch.as_tensor(dataset.obs), torch.as_tensor(dataset.action)
    outcome = torch.cat([torch.as_tensor(dataset.next_obs) - obs, torch.as_tensor(dataset.reward)[:, None]], dim=1)
    learn = ~held_out
    measured = windows.held_out(0.05, args.world_model_seed + 1)[learn]
    if not measured.any():
        return result  # too few episodes to stop an ensemble by
    ends = obs_dim + action.shape[1] + 2 * outcome.shape[1]  # a width w has 5 (w^2 + (ends + 2) w) weights, about
    width = max(16, int((math.sqrt((ends + 2) ** 2 + 4 * parameters / 5) - ends - 2) / 2))
    with torch.enable_grad(), tqdm(total=2 * updates, desc="ensemble of one-step models", unit="update") as bar:
        started = time.monotonic()
        both = torch.cat([obs, action], dim=1)
        model, made_updates = GaussianEnsemble.fit(both[learn], outcome[learn], measured, width, updates, batch, bar)
        policy, _ = GaussianEnsemble.fit(obs[learn], action[learn], measured, width, updates, batch, bar)
        seconds = time.monotonic() - started
    first, members = windows.start[index], math.ceil(rollouts / 5)
    first_obs = windows.obs[first].repeat_interleave(members, 0).expand(5, -1, -1)
    first_action = windows.action[index].repeat_interleave(members, 0).expand(5, -1, -1)
    true_action = dataset_actions(windows, dataset, index, steps)
    low, high = windows.obs.min(0).values, windows.obs.max(0).values
    for name in ("ensemble, actions cloned", "ensemble, true actions"):
        state, following, particles = first_obs, first_action, []
        for step in range(steps):
            change = model.sample(torch.cat([state, following], dim=2))
            # Inside the data's range, as the world model's own states are: else a few particles leave for infinity.
            state = torch.minimum(torch.maximum(state + change[..., :-1], low), high)
            particles.append(torch.cat([state, change[..., -1:]], dim=2))
            following = policy.sample(state).clamp(-1, 1)
            if name == "ensemble, true actions" and step + 1 < steps:
                following = true_action[:, step + 1].repeat_interleave(members, 0).expand(5, -1, -1)
        particles = torch.stack(particles, dim=2).view(5, len(index), members, steps, -1).transpose(0, 1)
        result[name] = scores(particles.reshape(len(index), 5 * members, steps, -1) / scale, truth)
    result["facts"]["ensemble"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": made_updates,
        "batch": batch,
        "seconds": round(seconds, 1),
    }
    return result


def dataset_actions(windows, dataset: OfflineDataset, index: torch.Tensor, steps: int) -> torch.Tensor:
    """The real actions of the windows `index` [B] -> [B, steps, action_dim]."""
    return torch.as_tensor(dataset.action)[index[:, None] + torch.arange(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# The whole audit
# ---------------------------------------------------------------------------------------------------------------------


def audit(subject: Subject, options) -> dict:
    dataset, units = subject.dataset, Units.of(subject.dataset)
    names = NAMES.get(dataset.robot) or [str(i) for i in range(dataset.obs.shape[1])]
    rows, real = synthetic_rows(subject, options.rows), real_rows(dataset, options.rows)
    physics = subject.args.physics if options.physics == "auto" else options.physics
    physics = dataset.physics if physics == "auto" else physics
    result = {
        "subject": subject.facts,
        "names": names,
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": sys.version.split()[0]},
        "simulator": f"{dataset.simulator}, physics {physics}",
    }
    try:
        stepper = Stepper(dataset.simulator, physics, dataset.simulator_kwargs, options.threads)
        if stepper.obs_dim != dataset.obs.shape[1]:
            raise UserError(f"{dataset.simulator} observes {stepper.obs_dim} dimensions, the data have {len(names)}")
    except UserError as error:
        print(f"no check by the simulator: {error}; what the data alone can tell follows")
        stepper, result["simulator"] = None, f"none: {error}"
    steps = [h for h in range(int(rows.step.max()) + 1) if (rows.step == h).sum() >= FEWEST]
    if steps != list(range(len(steps))) or len(real.obs) < FEWEST:
        raise UserError(f"fewer than {FEWEST} rows of a step were drawn from the set, or of the data; raise --rows")
    rows = rows[rows.step < len(steps)]
    if stepper is not None:
        other = {"d4rl": "stock", "stock": "d4rl"}[physics]
        wrong = (
            Stepper(dataset.simulator, other, dataset.simulator_kwargs, options.threads)
            if dataset.simulator[-3:] == "-v4"
            else None
        )
        per_step = max(1, options.inverse // len(steps))
        few = np.concatenate(
            [np.flatnonzero(rows.step == h)[:: max(1, (rows.step == h).sum() // per_step)] for h in steps]
        )
        few_real = np.arange(len(real.obs))[:: max(1, len(real.obs) // per_step)]
        calls = (len(few) + len(few_real)) * (1 + ITERATIONS * (1 + rows.action.shape[1]))
        total = len(rows.obs) + len(real.obs) * (2 if wrong else 1) + calls
        with tqdm(total=total, desc="simulator", unit="step", unit_scale=True) as bar:
            checked = check(stepper, rows, units, bar)
            floor = check(stepper, real, units, bar)
            parts = {"synthetic": (rows, checked), "real": (real, floor)}
            if wrong:
                parts[f"real, physics {other}"] = (real, check(wrong, real, units, bar))
            few, few_real = few[checked["checkable"][few]], few_real[floor["checkable"][few_real]]
            action, left, caused = explaining_action(stepper, rows[few], units, bar)
            # The search for a real row's action begins a tenth off: else it would begin at its end.
            off = dataclasses.replace(real[few_real])
            off.action = (off.action + np.random.default_rng(3).choice([-0.1, 0.1], off.action.shape)).clip(-1, 1)
            real_action, real_left, _ = explaining_action(stepper, off, units, bar)
            bar.update(bar.total - bar.n)
        for name, (part, found) in parts.items():
            result[name] = {"all": summary(part, found, np.ones(len(part.obs), bool), names)}
        result["real"]["exactness"] = exactness(stepper, real, floor, units)
        result["synthetic"]["steps"] = [summary(rows, checked, rows.step == h, names) for h in steps]
        result["synthetic"]["jerk"] = by_jerk(checked)
        result["synthetic"]["contact"] = by_contact(stepper, rows, checked, few)
        at = rows.step[few]
        difference = np.sqrt(np.square(action - rows.action[few]).mean(1))
        result["action"] = {
            "error": [quantiles(difference[at == h]) for h in steps],
            "unexplained": [quantiles(left[at == h]) for h in steps],
            "caused": [quantiles(caused[at == h]) for h in steps],
            "real_error": quantiles(np.sqrt(np.square(real_action - real.action[few_real]).mean(1))),
            "real_unexplained": quantiles(real_left),
        }
    bounds = [float((np.abs(part.action) > 0.999).mean()) for part in (rows, real)]
    result["actions_at_bounds"] = dict(zip(("synthetic", "real"), bounds, strict=True))

    obs_dim, half = dataset.obs.shape[1], np.arange(len(real.obs)) < len(real.obs) // 2
    result["likeness"] = {
        "synthetic": [likeness(rows[rows.step == h], real, obs_dim) for h in steps],
        "real halves": likeness(real[half], real[~half], obs_dim),  # the earlier episodes against the later ones
    }
    result["neighbours"] = {"steps": []}
    spread = np.random.default_rng(2)
    with tqdm(total=len(steps) + 1, desc="nearest real neighbours", unit="set") as bar:
        for h in steps:
            chosen = spread.permutation(np.flatnonzero(rows.step == h))[: options.neighbours]
            result["neighbours"]["steps"].append(quantiles(neighbour_distance(rows[chosen], real, units)))
            bar.update()
        chosen = spread.permutation(len(real.obs))[: options.neighbours]
        result["neighbours"]["real"] = quantiles(neighbour_distance(real[chosen], real, units))
        bar.update()
    if options.pairs:
        updates = subject.args.world_model_steps if options.ensemble_updates is None else options.ensemble_updates
        try:
            result["calibration"] = calibration(subject, options.pairs, options.rollouts, updates)
        except UserError as error:
            result["calibration"], result["no_calibration"] = None, str(error)
    return result


def plain(content):
    """As JSON has it: None for what could not be measured."""
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    if isinstance(content, list):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def table(result: dict) -> str:
    """The audit as text, one line per step of the rollout, then the floors."""
    lines = [f"{result['subject']['set']}: {result['subject']['transitions']:,} transitions, {result['simulator']}", ""]
    if "synthetic" in result:
        head = f"{'':<24}{'rows':>9}{'not seen':>9}   {'state error, sd':^26}   {'reward error, sd':^26}"
        lines += [f"{head}   {'falls':^21}{'action':>10}{'its part':>10}{'left, sd':>10}"]
        quantile = "".join(f"{q:>9}" for q in ("median", "90%", "99%"))
        falls = "".join(f"{word:>7}" for word in ("sim", "told", "both"))
        lines += [f"{'':<42}{quantile}  {quantile}     {falls}" + 3 * f"{'median':>10}"]
        parts = [(f"synthetic, step {h}", part) for h, part in enumerate(result["synthetic"]["steps"])]
        parts += [(name, part["all"]) for name, part in result.items() if name.startswith("real") and "all" in part]
        for name, part in parts:
            errors = ["".join(f"{part[what][q]:>9.2g}" for q in ("median", "90", "99")) for what in ("state", "reward")]
            falls = "".join(f"{part['falls'][k]:>7,}" for k in ("simulator", "told", "both"))
            line = f"{name:<24}{part['rows']:>9,}{part['uncheckable']:>9.1%}{errors[0]}  {errors[1]}     {falls}"
            if name.startswith("synthetic"):
                h = int(name.split()[-1])
                for what in ("error", "caused", "unexplained"):
                    line += f"{result['action'][what][h]['median']:>10.2g}"
            elif name == "real":
                made, left = result["action"]["real_error"]["median"], result["action"]["real_unexplained"]["median"]
                line += f"{made:>10.2g}{'':>10}{left:>10.2g}"
            lines.append(line)
        contact = result["synthetic"]["contact"]
        medians = contact["begins or ends"]["median"], contact["stays"]["median"]
        share = f"a contact begins or ends ({contact['share']:.0%})"
        lines += [f"steps in which {share} err by a median of {medians[0]:.2g}, the others by {medians[1]:.2g}"]
        largest = result["real"]["all"]
        lines += [f"real rows that can be checked err by {largest['state']['99']:.1e} sd at 99 %, at most "
                  f"{largest['state']['max']:.1e}; rewards by {largest['reward']['max']:.1e}"]  # fmt: skip
        exact = result["real"]["exactness"]
        lines[-1] += f"; {exact['above']} of them by more than {exact['limit']:.0e}"
        if exact["above"]:
            lines[-1] += f" (of {exact['tried']} tried, {exact['rounding']} are exact from a state of equal float32)"
    bounds = result["actions_at_bounds"]
    lines += [f"actions at the bounds: synthetic {bounds['synthetic']:.2%}, real {bounds['real']:.2%}"]
    lines += ["", f"{'':<24}{'marginals':>12}{'correlations':>14}{'neighbours, median':>20}{'90%':>9}"]
    for h, part in enumerate(result["likeness"]["synthetic"]):
        near = result["neighbours"]["steps"][h]
        lines.append(
            f"{f'synthetic, step {h}':<24}{part['marginals']:>12.4f}{part['correlations']:>14.4f}"
            f"{near['median']:>20.2f}{near['90']:>9.2f}"
        )
    part, near = result["likeness"]["real halves"], result["neighbours"]["real"]
    name, figures = "real (two halves)", f"{part['marginals']:>12.4f}{part['correlations']:>14.4f}"
    lines.append(f"{name:<24}{figures}{near['median']:>20.2f}{near['90']:>9.2f}")
    if calibrated := result.get("calibration"):
        facts = calibrated["facts"]
        expected = f"calibrated, the truth lies outside with probability {2 / (facts['rollouts'] + 1):.3f}"
        lines += [
            "",
            f"{facts['pairs']:,} held-out pairs, {facts['rollouts']} rollouts each; {expected}; step 1, 2, ...",
        ]
        for name, found in calibrated.items():
            if name != "facts":
                for what in ("crps", "error", "spread", "outside"):
                    label = f"{name}: {what}"
                    lines.append(f"{label:<34}" + "".join(f"{value:>8.3f}" for value in found[what]))
        for name in ("world model", "ensemble"):
            if name in facts:
                lines += [f"{name}: " + ", ".join(f"{value:,} {what}" for what, value in facts[name].items())]
    elif "calibration" in result:
        lines += ["", f"no calibration: {result['no_calibration']}"]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """One page: what the simulator says above, actions and data in the middle, the model's spread below."""
    figure, axes = plt.subplots(3, 3, figsize=(15, 12.5))
    blue, grey, red, orange, green = "#1f77b4", "#555555", "#d62728", "#ff7f0e", "#2ca02c"
    names = result["names"]
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    if "synthetic" in result:
        steps = np.arange(len(result["synthetic"]["steps"]))
        floors = [name for name in result if name.startswith("real") and "all" in result[name]]
        for axis, what in ((axes[0, 0], "state"), (axes[0, 2], "reward")):
            error = {q: [part[what][q] for part in result["synthetic"]["steps"]] for q in ("median", "90", "99")}
            axis.plot(steps, error["median"], "o-", color=blue, label="synthetic, median")
            axis.fill_between(steps, error["median"], error["90"], color=blue, alpha=0.3, label="to 90 %")
            axis.fill_between(steps, error["90"], error["99"], color=blue, alpha=0.15, label="to 99 %")
            if len(steps) == 1:
                for q in ("90", "99"):
                    axis.plot(steps, error[q], "_", color=blue, markersize=20)
            for name, color in zip(floors, (grey, red), strict=False):
                level = result[name]["all"][what]["median"]
                axis.axhline(max(level, 1e-9), color=color, linestyle="--", label=f"{name}, median")
            axis.set_yscale("log")
            axis.set_xlabel("step of the rollout")
            axis.set_xticks(steps)
            axis.set_title(f"{what} against the simulator's, in sd of the data", fontsize=10)
            axis.legend(fontsize=7)
        cells = np.array(
            [[part["state_dimensions"][n]["median"] for n in names] for part in result["synthetic"]["steps"]]
        )
        axis = axes[0, 1]
        cells = cells.clip(min=1e-6)
        shown = axis.imshow(cells.T, aspect="auto", norm=LogNorm(), cmap="viridis")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.set_xticks(steps)
        axis.set_xlabel("step of the rollout")
        axis.grid(False)
        axis.set_title("median state error by dimension, sd", fontsize=10)
        figure.colorbar(shown, ax=axis)
        axis = axes[1, 0]
        styles = {
            "caused": (blue, "state error that the row's action adds, sd"),
            "unexplained": (orange, "state error that no action explains, sd"),
            "error": (green, "distance to the action that explains it"),
        }
        for what, (color, label) in styles.items():
            found = result["action"][what]
            axis.plot(steps, [part["median"] for part in found], "o-", color=color, label=f"{label}, median")
            if what != "error":
                axis.fill_between(steps, [p["median"] for p in found], [p["90"] for p in found], color=color, alpha=0.2)
        level = max(result["action"]["real_error"]["median"], 1e-9)
        axis.axhline(level, color=grey, linestyle="--", label="real rows: distance, from a start 0.1 off")
        axis.set_yscale("log")
        axis.set_xticks(steps)
        axis.set_xlabel("step of the rollout (its first action is real)")
        axis.set_title("the action that the simulator would have needed", fontsize=10)
        axis.legend(fontsize=7)
        axis = axes[1, 1]
        jerk = result["synthetic"]["jerk"]
        axis.loglog(jerk["jerk"], jerk["error"], "o-", color=blue)
        axis.xaxis.set_minor_formatter("")
        contact = result["synthetic"]["contact"]
        for what, style in (("begins or ends", "-."), ("stays", ":")):
            share = contact["share"] if what != "stays" else 1 - contact["share"]
            label = f"contact {what} ({share:.0%} of rows)"
            axis.axhline(contact[what]["median"], color=grey, linestyle=style, label=label)
        axis.legend(fontsize=7)
        axis.set_xlabel("change of velocity in the simulator's step, sd")
        axis.set_ylabel("median state error, sd")
        axis.set_title("where it errs", fontsize=10)
    else:
        for axis in (*axes[0], axes[1, 0], axes[1, 1]):
            axis.axis("off")
        axes[0, 0].text(0, 0.5, f"no check by the simulator:\n{result['simulator'][:60]}", fontsize=8)
    axis = axes[1, 2]
    found, halves = result["likeness"]["synthetic"], result["likeness"]["real halves"]
    labels = [*names, *(f"a{i}" for i in range(len(halves["distance_action"]))), "reward"]

    def distances(part):
        return [*part["distance_obs"], *part["distance_action"], part["distance_reward"]]

    axis.barh(np.arange(len(labels)), distances(found[-1]), color=blue, label=f"synthetic, step {len(found) - 1}")
    axis.plot(
        distances(halves), np.arange(len(labels)), "|", color="black", markersize=8, label="two halves of the data"
    )
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("Kolmogorov-Smirnov distance from the data")
    axis.set_title("distribution of each column", fontsize=10)
    axis.legend(fontsize=7)
    if calibrated := result.get("calibration"):
        styles = {"world model": blue, "ensemble, actions cloned": orange, "ensemble, true actions": green}
        count = len(calibrated["world model"]["crps"])
        styles = {name: color for name, color in styles.items() if name in calibrated}
        for name, color in styles.items():
            found = calibrated[name]
            axes[2, 0].plot(range(1, count + 1), found["crps"], "o-", color=color, label=name)
            axes[2, 1].plot(range(1, count + 1), found["error"], "-", color=color, label=f"{name}: error of the mean")
            axes[2, 1].plot(range(1, count + 1), found["spread"], ":", color=color, label="spread")
        if guess := calibrated.get("any real state"):
            axes[2, 0].axhline(np.mean(guess["crps"]), color=grey, linestyle="--", label="any real state")
        axes[2, 0].set_ylim(bottom=0)
        axes[2, 0].set_title("CRPS of next states and rewards, sd: lower is better", fontsize=10)
        axes[2, 1].set_title("spread (dotted) should equal the error (solid)", fontsize=10)
        axes[2, 1].set_ylim(bottom=0)
        for axis in axes[2, :2]:
            axis.set_xlabel("rollout step")
            axis.legend(fontsize=7, loc="upper left")
        for name, color in styles.items():
            ranks = np.sum(calibrated[name]["ranks"], axis=0).astype(float)
            place = (np.arange(len(ranks)) + 0.5) / len(ranks)
            axes[2, 2].step(place, ranks / ranks.mean(), where="mid", color=color, label=name)
        axes[2, 2].axhline(1, color=grey, linestyle="--", label="calibrated")
        axes[2, 2].set_yscale("log")
        axes[2, 2].set_xlabel("rank of the truth among the rollouts")
        axes[2, 2].set_title("rank histogram: a U says too little spread", fontsize=10)
        axes[2, 2].legend(fontsize=7)
    else:
        for axis in axes[2]:
            axis.axis("off")
    subject = result["subject"]
    figure.suptitle(f"{subject['env_id']}, {subject['script']}, {subject['transitions']:,} transitions, "
                    f"{result['simulator']}", fontsize=12)  # fmt: skip
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, dpi=80, format="png"))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", type=Path, help="folder of a run, or of a kept synthetic set")
    parser.add_argument("--rows", type=int, default=200_000, help="transitions to check, drawn evenly")
    parser.add_argument("--inverse", type=int, default=4_096, help="of them, whose explaining action is sought")
    parser.add_argument("--neighbours", type=int, default=1_000, help="of each step, compared with real neighbours")
    parser.add_argument("--pairs", type=int, default=512, help="held-out pairs for the calibration; 0 leaves it out")
    parser.add_argument("--rollouts", type=int, default=64, help="of each pair")
    parser.add_argument("--ensemble-updates", type=int, help="at most; default: as many as the world model; 0: none")
    parser.add_argument("--physics", choices=("auto", "d4rl", "stock"), default="auto")
    parser.add_argument("--data-path", type=Path, help="the real data's file, if the run read one")
    parser.add_argument("--out", type=Path, help="folder for audit.json and audit.png")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    options = parser.parse_args()
    for names, least in (
        ("rows", 100),
        ("inverse neighbours rollouts", 2),
        ("threads", 1),
        ("pairs ensemble_updates", 0),
    ):
        check_range(options, least, math.inf, names)
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    subject = find(options.subject, options.data_path)
    out = options.out or subject.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made a folder ({error.strerror}); give another")
    result = audit(subject, options)
    result["seconds"] = round(time.monotonic() - started, 1)
    print(table(result))
    write_text_whole(out / "audit.json", json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
    plot(result, out / "audit.png")
    print(f"\n{out / 'audit.json'}, {out / 'audit.png'}; {result['seconds']} s")


if __name__ == "__main__":
    tell(main)
