"""Is the synthetic data true? A run's generated transitions against the simulator, the data, and their own spread.

    python experiments/audit.py runs/RUN_FOLDER

Each step of the rollout by itself, in standard deviations (sd) of the data, with real rows beside it as the floor:

1. The simulator: set to the row's state, given its action, what follows? Errors of next state and reward, and falls by
   count. Rows with a velocity at the observation's clip cannot be checked. Real rows go through the same, under the
   data's physics and, to show that the instrument can tell, under the other one.
2. The action: which one would have led nearest to the row's next state? "left" is the state error that no action
   explains, "its part" what the row's own action adds to it. Spread of actions beside the data's.
3. The data: distance of each column's distribution and of all correlations, 1 for equal [SynthER].
4. The world model's spread: many rollouts from held-out real pairs, asked for their true return-to-go. Error of their
   mean, spread, CRPS, how often the truth lies outside of all, and the error of a single rollout; beside them five
   one-step Gaussian networks with as many parameters and at most as many updates [PETS].
5. Does the rows' kept uncertainty (variants/uncertain_td3bc.py) rank their errors, or, with --members, an ensemble's?

Printed, and written to the run's folder as audit.json and audit.png.

[SynthER] Synthetic Experience Replay, arXiv 2303.06614
[PETS]    Deep RL in a Handful of Trials using Probabilistic Dynamics Models, arXiv 1805.12114
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import Count, run_script
from common.files import write_text
from variants.uncertain_td3bc import second_answer

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from run_folders import load_rollouts
from stepper import Stepper
from torch import nn
from tqdm import tqdm

LEGS = "thigh leg foot"
NAMES = {  # of the observations' dimensions
    "hopper": f"z pitch {LEGS} vx vz w_pitch w_thigh w_leg w_foot".split(),
    "walker2d": f"z pitch {LEGS} thigh_l leg_l foot_l vx vz w_pitch w_thigh w_leg w_foot w_thigh_l w_leg_l "
    "w_foot_l".split(),
    "halfcheetah": "z pitch bthigh bshin bfoot fthigh fshin ffoot vx vz w_pitch w_bthigh w_bshin w_bfoot w_fthigh "
    "w_fshin w_ffoot".split(),
}


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: Path = tyro.MISSING  # folder of a finished run that made rollouts with a world model
    members: tuple[Path, ...] = ()  # runs of the same with another --world-model-seed: their uncertainty as an ensemble
    rows: Annotated[int, (100, math.inf)] = 200_000  # transitions to check, drawn at random
    actions: Annotated[int, (2, math.inf)] = 4_096  # of them, whose explaining action is sought
    pairs: Annotated[int, (0, math.inf)] = 512  # held-out pairs for the world model's spread; 0 leaves it out
    rollouts: Annotated[int, (2, math.inf)] = 64  # of each pair
    ensemble_updates: Annotated[int, (0, math.inf)] | None = None  # at most; as many as the world model's; 0: none
    physics: Literal["auto", "d4rl", "stock"] = "auto"  # of the simulator that judges; the data's
    threads: Count = os.cpu_count() or 1


@dataclass
class Rows:
    """Transitions as float64 arrays [N, ...]; step [N] is their place h in the rollout."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    step: np.ndarray

    def __getitem__(self, index) -> "Rows":
        return Rows(*(column[index] for column in vars(self).values()))


def draw_rows(rows: torch.Tensor, valid: torch.Tensor, sizes: list[int], count: int) -> Rows:
    """At most `count` of the valid rows [M, H+1, row_dim], at random."""
    places = valid.nonzero()
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:count]]
    obs, action, reward, next_obs, terminated = rows[places[:, 0], places[:, 1]].double().split(sizes, dim=1)
    columns = obs, action, reward[:, 0], next_obs, terminated[:, 0] > 0, places[:, 1]
    return Rows(*(column.numpy() for column in columns))


# ---------------------------------------------------------------------------------------------------------------------
# 1. and 2. The simulator, and the action that explains a transition
# ---------------------------------------------------------------------------------------------------------------------


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Median, 90 % and 99 %, and the largest of absolute values [N]."""
    found = np.quantile(np.abs(values), (0.5, 0.9, 0.99, 1)) if len(values) else [math.nan] * 4
    return dict(zip(("median", "90%", "99%", "max"), map(float, found), strict=True))


def norm(errors: np.ndarray) -> np.ndarray:
    """Root mean square over the dimensions of errors [N, obs_dim] -> [N]."""
    return np.sqrt(np.square(errors).mean(1))


def check(stepper: Stepper, rows: Rows, obs_sd: np.ndarray, reward_sd: float, names: list[str]) -> dict:
    """Errors of rows, and how many could be checked."""
    next_obs, reward, fell = stepper(rows.obs, rows.action)
    seen = stepper.checkable(rows.obs) & np.isfinite(next_obs).all(1)
    error, fell, told = ((rows.next_obs - next_obs) / obs_sd)[seen], fell[seen], rows.terminated[seen]
    return {
        "rows": len(seen),
        "uncheckable": float(1 - seen.mean()),
        "state": quantiles(norm(error)),
        "dimensions": {name: quantiles(error[:, i])["median"] for i, name in enumerate(names)},
        "reward": quantiles(((rows.reward - reward) / reward_sd)[seen]),
        "falls": {"simulator": int(fell.sum()), "told": int(told.sum()), "both": int((fell & told).sum())},
    }


def ranking(stepper: Stepper, parts, members: list, sizes: list[int], count: int) -> dict[str, dict]:
    """Whether uncertainties rank the rows' state errors, by step and of all: Spearman's rank correlation, and the mean
    error of each tenth of the rows in order of uncertainty, in standard deviations of the changes.

    The kept one, if there is any; with other runs as `members`, two of the ensemble of their world models and the
    run's: how far their second answers lie apart, and how far they lie from the row.
    """
    holds, kept = parts.rollouts["rows"].clone(), "uncertainty" in parts.rollouts
    if kept:
        holds[..., sizes[0] + sizes[1]] = parts.rollouts["uncertainty"]  # in the place of the reward
    rows = draw_rows(holds, parts.rollouts["valid"], sizes, count)
    next_obs = stepper(rows.obs, rows.action)[0]
    seen = stepper.checkable(rows.obs) & np.isfinite(next_obs).all(1)
    scale = parts.world_model.units.scale[: sizes[0]].numpy()
    error = norm((rows.next_obs - next_obs) / scale)
    uncertainties = {"uncertainty": rows.reward} if kept else {}
    if members:
        kinds = {(x.dataset.fingerprint, getattr(x.args, "loss", None)) for x in (parts, *members)}
        if kinds != {(parts.dataset.fingerprint, "x0")}:
            raise UserError("--members go with a run of the same data, all with --loss x0, as --laptop has it")
        asked = [torch.as_tensor(x, dtype=torch.float32).split(4096) for x in (rows.obs, rows.action)]
        models = [partial(second_answer, member.args, member.world_model) for member in (parts, *members)]
        answers = np.stack([torch.cat([*map(model, *asked)]).numpy() for model in models])  # [M, N, obs_dim]
        uncertainties["ensemble, apart"] = norm(answers.std(0, ddof=1) / scale)
        uncertainties["ensemble, from row"] = norm((rows.next_obs - answers.mean(0)) / scale)
    found, places = {}, {f"step {h}": seen & (rows.step == h) for h in np.unique(rows.step)} | {"all": seen}
    for name, values in uncertainties.items():
        for place, here in places.items():
            orders = [np.argsort(np.argsort(x[here])) for x in (values, error)]
            tenths = np.array_split(error[here][np.argsort(values[here])], 10)
            rank = float(np.corrcoef(orders)[0, 1])
            found[f"{name}, {place}"] = {"rank": rank, "tenths": [float(x.mean()) for x in tenths]}
    return found


def explaining_action(stepper: Stepper, rows: Rows, obs_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Action [N, action_dim] in [-1, 1] that brings the simulator nearest to next_obs, the error [N] that it leaves,
    and the error [N] that the row's own action adds: how far apart the two leave the simulator.

    Levenberg and Marquardt's damped least squares from the row's own action. A step that does not help is not taken;
    an action at its bound that would leave it is held there while the others are solved for.
    """
    best = rows.action.clip(-1, 1)
    own = stepper(rows.obs, best)[0]
    made, residual = own.copy(), (rows.next_obs - own) / obs_sd
    damping, eye = np.full(len(best), 1e-3), np.eye(best.shape[1])
    for _ in range(8):
        jacobian = np.empty((*residual.shape, len(eye)))
        for column, direction in enumerate(eye):
            moved = best - 1e-4 * direction * np.where(best > 0, 1, -1)  # inwards: controls are clipped
            change = (stepper(rows.obs, moved)[0] - made) / obs_sd
            jacobian[:, :, column] = change / (moved - best)[:, column, None]
        gradient = np.einsum("nda,nd->na", jacobian, residual)
        free = ~((np.abs(best) >= 1) & (gradient * best > 0))
        jacobian, gradient = jacobian * free[:, None], gradient * free
        normal = np.einsum("nda,ndb->nab", jacobian, jacobian)
        scale = np.einsum("naa->n", normal) * damping + 1e-12
        step = np.linalg.solve(normal + scale[:, None, None] * eye, gradient[..., None])[..., 0]
        trial = (best + step).clip(-1, 1)
        trial_made = stepper(rows.obs, trial)[0]
        trial_residual = (rows.next_obs - trial_made) / obs_sd
        helps = norm(trial_residual) < norm(residual)
        best[helps], made[helps], residual[helps] = trial[helps], trial_made[helps], trial_residual[helps]
        damping = np.where(helps, damping / 10, damping * 10)
    return best, norm(residual), norm((made - own) / obs_sd)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The data
# ---------------------------------------------------------------------------------------------------------------------


def likeness(rows: Rows, real: Rows) -> dict[str, float]:
    """[SynthER]'s figures, 1 for equal: mean over columns of 1 - the largest distance of their cumulative distributions
    (Kolmogorov and Smirnov), and mean over pairs of columns of 1 - |difference of their correlations| / 2."""
    a, b = (np.concatenate([x.obs, x.action, x.reward[:, None], x.next_obs], axis=1) for x in (rows, real))
    distances = []
    for x, y in zip(np.sort(a, axis=0).T, np.sort(b, axis=0).T, strict=True):
        both = np.concatenate([x, y])
        shares = [np.searchsorted(z, both, side="right") / len(z) for z in (x, y)]
        distances.append(np.abs(shares[0] - shares[1]).max())
    varies = (a.std(0) > 1e-9) & (b.std(0) > 1e-9)
    difference = np.abs(np.corrcoef(a[:, varies].T) - np.corrcoef(b[:, varies].T))
    difference = difference[np.triu_indices(len(difference), 1)]
    return {"marginals": float(1 - np.mean(distances)), "correlations": float(1 - difference.mean() / 2)}


# ---------------------------------------------------------------------------------------------------------------------
# 4. The world model's spread, beside an ensemble of one-step Gaussian models
# ---------------------------------------------------------------------------------------------------------------------


class GaussianEnsemble(nn.Module):
    """Five networks of two hidden layers, in one batch: x [5, B, in_dim] -> mean, log_var [5, B, out_dim], normalised
    [PETS]. Trained on the rows of inputs [N, in_dim], outputs [N, out_dim] outside of `measured` [N]."""

    def __init__(self, inputs: torch.Tensor, outputs: torch.Tensor, width: int):
        super().__init__()
        self.in_mean, self.in_std, self.out_mean, self.out_std = (
            part for x in (inputs, outputs) for part in (x.mean(0), x.std(0) + 1e-6)
        )
        sizes = [inputs.shape[1], width, width, 2 * outputs.shape[1]]
        layers = [torch.randn(5, i, o) / math.sqrt(i) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        self.weights = nn.ParameterList(layers)
        self.biases = nn.ParameterList([torch.zeros(5, 1, size) for size in sizes[1:]])

    def forward(self, x):
        x = (x - self.in_mean) / self.in_std
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = nn.functional.silu(torch.baddbmm(bias, x, weight))
        mean, log_var = torch.baddbmm(self.biases[-1], x, self.weights[-1]).chunk(2, dim=2)
        return mean, 13 - nn.functional.softplus(13 - nn.functional.softplus(log_var + 12)) - 12  # in [-12, 1], softly

    def loss(self, x, y):
        mean, log_var = self(x)
        return (log_var + ((y - self.out_mean) / self.out_std - mean).square() / log_var.exp()).mean()

    def sample(self, x):
        """x [5, B, in_dim] -> [5, B, out_dim], dataset units."""
        mean, log_var = self(x)
        return (mean + (log_var / 2).exp() * torch.randn_like(mean)) * self.out_std + self.out_mean

    @torch.enable_grad()
    def fit(self, inputs, outputs, measured, updates: int, batch: int) -> int:
        """Keep the weights that were best on `measured`, once they have not improved for a tenth of the updates."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        train, measured = (~measured).nonzero()[:, 0], measured.nonzero()[:10_000, 0]
        best, best_at, weights = math.inf, 0, self.state_dict()
        for update in tqdm(range(1, updates + 1), desc="one-step Gaussian models", unit="update", disable=None):
            index = train[torch.randint(len(train), (5, batch))]
            loss = self.loss(inputs[index], outputs[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if update % 250 == 0 or update == updates:
                with torch.no_grad():
                    held_out = self.loss(inputs[measured].expand(5, -1, -1), outputs[measured]).item()
                if held_out < best - 1e-3:
                    best, best_at = held_out, update
                    weights = {name: value.clone() for name, value in self.state_dict().items()}
                elif update - best_at > updates / 10:
                    break
        self.load_state_dict(weights)
        return update


def crps(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Continuous ranked probability score of samples [P, m, ...] for truth [P, ...], fair for finite m -> [P, ...]."""
    m = samples.shape[1]
    weight = (2 * torch.arange(m) - m + 1).to(samples).view(1, m, *[1] * (samples.dim() - 2))
    pairs = (weight * samples.sort(dim=1).values).sum(1) / (m * (m - 1))
    return (samples - truth[:, None]).abs().mean(1) - pairs


def scores(samples: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
    """Of samples [P, m, S, D] for truth [P, S, D], in sd, for each step of S. In a calibrated model spread equals error
    and the truth lies outside of all m with probability 2 / (m + 1)."""
    m = samples.shape[1]
    outside = (truth > samples.amax(1)) | (truth < samples.amin(1))
    found = {
        "crps": crps(samples, truth).mean((0, 2)),
        "error": (samples.mean(1) - truth).square().mean((0, 2)).sqrt(),
        "spread": (samples.var(1).mean((0, 2)) * (m + 1) / m).sqrt(),
        "outside": outside.float().mean((0, 2)),
    }
    return {name: values.tolist() for name, values in found.items()}


@torch.no_grad()
def calibration(parts, options: Args, scale: torch.Tensor) -> dict:
    """See the module's docstring, 4; scale [obs_dim + 1] is the data's sd. UserError if no held-out window is whole."""
    args, script, windows, dataset = parts.args, parts.script, parts.windows, parts.dataset
    steps = getattr(args, "model_horizon", args.horizon) + 1
    index = windows.split(windows.usable, args.world_model_holdout, args.world_model_seed)[1]
    index = index[(windows.start + steps <= windows.final)[index]]
    if not len(index):
        raise UserError("no episode held out from the world model's training is as long as its windows")
    index = index[torch.linspace(0, len(index) - 1, min(options.pairs, len(index))).long()]
    first = windows.start[index]
    rows = first[:, None] + torch.arange(steps + 1)
    truth = torch.cat([windows.obs[rows][:, 1:], windows.reward[rows][:, :-1, None]], dim=2) / scale
    torch.manual_seed(0)
    made = []
    for pairs in tqdm(
        index.repeat_interleave(options.rollouts).split(1024), desc="rollouts of held-out pairs", disable=None
    ):
        known = [windows.obs[windows.start[pairs]], windows.action[pairs]]
        if hasattr(windows, "return_to_go"):
            known.append(windows.return_to_go[pairs, None])
        obs, *_, reward = script.sample_rollouts(args, parts.world_model, *known)
        made.append(torch.cat([obs[:, 1:], reward[..., None]], dim=2))
    made = torch.cat(made).view(len(index), options.rollouts, steps, -1) / scale
    single = (made[:, 0] - truth).square()
    result = {"world model": scores(made, truth)}
    result["world model"]["one rollout, states"] = single[..., :-1].mean((0, 2)).sqrt().tolist()
    result["world model"]["one rollout, rewards"] = single[..., -1].mean(0).sqrt().tolist()

    # The ensemble: (state, action) to change of state and reward, and state to action, since a rollout needs both.
    updates = args.world_model_steps if options.ensemble_updates is None else options.ensemble_updates
    train, measured = windows.split(torch.ones_like(windows.usable), args.world_model_holdout, args.world_model_seed)
    held_out = torch.zeros(len(dataset.obs), dtype=torch.bool).index_fill(0, measured, True)
    measured = windows.split(~held_out, 0.05, args.world_model_seed + 1)[1]  # what stops the ensemble
    if not updates or not len(measured):
        return result
    obs, action = torch.as_tensor(dataset.obs), torch.as_tensor(dataset.action)
    measured = torch.isin(train, measured)
    outcome = torch.as_tensor(np.column_stack([dataset.next_obs - dataset.obs, dataset.reward]))[train]
    both, state_in, action_out = torch.cat([obs, action], dim=1)[train], obs[train], action[train]
    parameters = sum(p.numel() for p in parts.world_model.parameters())
    ends = both.shape[1] + 2 * outcome.shape[1]  # a width w has 5 (w^2 + (ends + 2) w) weights, about
    width = max(16, int((math.sqrt((ends + 2) ** 2 + 4 * parameters / 5) - ends - 2) / 2))
    model, policy = GaussianEnsemble(both, outcome, width), GaussianEnsemble(state_in, action_out, width)
    for ensemble, data in ((model, (both, outcome)), (policy, (state_in, action_out))):
        ensemble.fit(*data, measured, updates, args.world_model_batch_size)
    members = math.ceil(options.rollouts / 5)
    state, doing = (x.repeat_interleave(members, 0).expand(5, -1, -1) for x in (windows.obs[first], action[index]))
    low, high = windows.obs.amin(0), windows.obs.amax(0)
    particles = []
    for _ in range(steps):
        change = model.sample(torch.cat([state, doing], dim=2))
        # Inside the data's range, as the world model's own states are: else a few particles leave for infinity.
        state = (state + change[..., :-1]).clamp(low, high)
        particles.append(torch.cat([state, change[..., -1:]], dim=2))
        doing = policy.sample(state).clamp(-1, 1)
    particles = torch.stack(particles, dim=2).view(5, len(index), members, steps, -1).transpose(0, 1)
    result["five Gaussian networks"] = scores(particles.reshape(len(index), 5 * members, steps, -1) / scale, truth)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The whole audit
# ---------------------------------------------------------------------------------------------------------------------


def audit(parts, members: list, options: Args) -> dict:
    dataset = parts.dataset
    obs_sd, reward_sd = dataset.obs.std(0, dtype=float) + 1e-6, float(dataset.reward.std(dtype=float)) + 1e-6
    sizes = parts.script.row_sizes(dataset.obs.shape[1], dataset.action.shape[1])
    real = parts.script.real_transitions(dataset, torch.device("cpu"))[:, None]
    rows = draw_rows(parts.rollouts["rows"], parts.rollouts["valid"], sizes, options.rows)
    real = draw_rows(real, torch.ones(real.shape[:2], dtype=torch.bool), sizes, options.rows)
    steps = [rows[rows.step == h] for h in range(parts.rollouts["valid"].shape[1])]
    names = NAMES.get(dataset.robot) or [str(i) for i in range(len(obs_sd))]
    run = f"{parts.args.exp_name} on {parts.args.env_id}"
    result = {"run": run, "rows": int(parts.rollouts["valid"].sum()), "names": names}
    half = np.arange(len(real.obs)) % 2 == 0
    result["likeness"] = [likeness(part, real) for part in steps] + [likeness(real[half], real[~half])]
    spreads = [float((part.action.std(0) / real.action.std(0)).mean()) for part in steps]
    result["action spread"] = [*spreads, 1.0]
    physics = dataset.physics if options.physics == "auto" else options.physics
    try:
        stepper = Stepper(dataset, physics)
    except UserError as error:
        result["no simulator"] = str(error)
    else:
        judged = {f"step {h}": (stepper, part) for h, part in enumerate(steps)} | {"real": (stepper, real)}
        if dataset.spec.version == 4:
            other = {"d4rl": "stock", "stock": "d4rl"}[physics]
            judged[f"real, physics {other}"] = Stepper(dataset, other), real
        units = obs_sd, reward_sd, names
        result["simulator"] = {
            name: check(*pair, *units)
            for name, pair in tqdm(judged.items(), desc="the simulator", unit="part", disable=None)
        }
        if members or "uncertainty" in parts.rollouts:
            result["uncertainty"] = ranking(stepper, parts, members, sizes, options.rows)
        result["action"] = []
        for part in tqdm(steps, desc="explaining actions", unit="step", disable=None):
            few = part[stepper.checkable(part.obs)][: max(1, options.actions // len(steps))]
            few = few[np.isfinite(stepper(few.obs, few.action)[0]).all(1)]
            _, left, its_part = explaining_action(stepper, few, obs_sd)
            result["action"].append({"left": quantiles(left), "its part": quantiles(its_part)})
    if options.pairs:
        scale = torch.as_tensor(np.append(obs_sd, reward_sd), dtype=torch.float32)
        try:
            if not hasattr(parts, "windows"):
                raise UserError("it has no rollouts from held-out real pairs")
            result["calibration"] = calibration(parts, options, scale)
        except UserError as error:
            result["no calibration"] = str(error)
    return result


def table(result: dict) -> str:
    """The audit as text."""
    lines = [f"{result['run']}: {result['rows']:,} transitions", ""]
    lines.append(f"{'':<20}{'marginals':>13}{'correlations':>13}{'action spread / data':>22}")
    for h, (part, spread) in enumerate(zip(result["likeness"], result["action spread"], strict=True)):
        name = f"step {h}" if h < len(result["likeness"]) - 1 else "real, two halves"
        lines.append(f"{name:<20}{part['marginals']:>13.4f}{part['correlations']:>13.4f}{spread:>22.3f}")
    if "simulator" in result:
        lines += ["", f"{'':<20}{'rows':>9}{'not seen':>9}{'state error, sd':>27}{'reward error, sd':>27}"
                  f"{'falls: sim, told, both':>25}{'action: left':>14}{'its part':>10}"]  # fmt: skip
        lines.append(f"{'':<38}" + 2 * "".join(f"{q:>9}" for q in ("median", "90%", "99%")))
        for h, (name, part) in enumerate(result["simulator"].items()):
            figures = "".join(
                f"{part[what][q]:>9.2g}" for what in ("state", "reward") for q in ("median", "90%", "99%")
            )
            line = f"{name:<20}{part['rows']:>9,}{part['uncheckable']:>9.1%}{figures}    "
            line += "".join(f"{count:>7,}" for count in part["falls"].values())
            if name.startswith("step"):
                action = result["action"][h]
                line += f"{action['left']['median']:>14.2g}{action['its part']['median']:>10.2g}"
            lines.append(line)
    if "uncertainty" in result:
        lines += ["", f"{'':<27}{'rank':>8}   mean state error [sd of changes] by tenth"]
    for name, part in result.get("uncertainty", {}).items():
        lines.append(f"{name:<27}{part['rank']:>8.2f}  " + "".join(f"{x:>7.3f}" for x in part["tenths"]))
    for name in ("no simulator", "no calibration"):
        lines += ["", f"{name}: {result[name]}"] if name in result else []
    for name, found in result.get("calibration", {}).items():
        lines += ["", f"{f'{name}, step':<38}" + "".join(f"{h:>8}" for h in range(1, 1 + len(found["crps"])))]
        lines += [f"  {what:<36}" + "".join(f"{value:>8.3f}" for value in values) for what, values in found.items()]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """One page, a panel for each question that could be asked. 0 is exact, but for the likeness, where 1 is."""
    names = ["state", "reward", "dimensions", "action"] if "simulator" in result else []
    names += ["likeness"] + ["crps", "spread"] * ("calibration" in result)
    columns = min(4, len(names))
    figure = Figure(figsize=(4 * columns, 4.5 * -(-len(names) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False)
    panels = dict(zip(names, grid.flat, strict=False))
    for axis in grid.flat[len(names) :]:
        axis.axis("off")
    if "simulator" in result:
        parts = [part for name, part in result["simulator"].items() if name.startswith("step")]
        for what in ("state", "reward"):
            for q in ("99%", "90%", "median"):
                panels[what].plot([part[what][q] for part in parts], "o-", label=f"generated, {q}")
            for name, style in zip((x for x in result["simulator"] if x.startswith("real")), ("--", ":"), strict=False):
                median = result["simulator"][name][what]["median"]
                label = f"{name.replace('physics ', '')}, median: {median:.1g}"
                panels[what].axhline(median, color="black", linestyle=style, label=label)
            panels[what].set_ylabel(f"{'next state' if what == 'state' else what} against the simulator's [sd]")
        errors = np.array([list(part["dimensions"].values()) for part in parts]).T
        shown = panels["dimensions"].imshow(errors, aspect="auto", vmin=0)
        panels["dimensions"].set_yticks(range(len(errors)), result["names"], fontsize=7)
        figure.colorbar(shown, ax=panels["dimensions"], label="median error of the next state by dimension [sd]")
        for what, label in (("left", "that no action explains"), ("its part", "that the row's action adds")):
            panels["action"].plot([part[what]["median"] for part in result["action"]], "o-", label=label)
        panels["action"].set_ylabel("parts of the state's error, median [sd]")
    *steps, halves = result["likeness"]
    for what, color in (("marginals", "tab:blue"), ("correlations", "tab:orange")):
        panels["likeness"].plot([part[what] for part in steps], "o-", color=color, label=what)
        panels["likeness"].axhline(halves[what], color=color, linestyle=":", label=f"{what}, data's halves")
    panels["likeness"].plot(result["action spread"][:-1], "o-", color="tab:green", label="std of actions")
    panels["likeness"].set_ylabel("likeness to the data [1: equal]")
    for (name, found), color in zip(result.get("calibration", {}).items(), ("tab:blue", "tab:orange"), strict=False):
        place = range(1, len(found["crps"]) + 1)
        panels["crps"].plot(place, found["crps"], "o-", color=color, label=name)
        panels["spread"].plot(place, found["error"], "o-", color=color, label=f"{name}: error of its mean")
        panels["spread"].plot(place, found["spread"], "o:", color=color, label=f"{name}: its spread")
        panels["crps"].set_ylabel("CRPS of states and rewards [sd]")
        panels["spread"].set_ylabel("error and spread, equal if calibrated [sd]")
    for name, axis in panels.items():
        axis.set_xlabel("step after the real pair" if name in ("crps", "spread") else "step of the rollout")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name != "dimensions":
            axis.legend(loc="lower left", bbox_to_anchor=(-0.1, 1), fontsize=8, frameon=False)  # above all curves
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
    figure.suptitle(f"{result['run']}: {result['rows']:,} generated transitions; sd: of the data", fontsize=10)
    figure.savefig(path, dpi=80)


def main(options: Args) -> None:
    torch.set_num_threads(options.threads)
    parts = load_rollouts(options.run)
    result = audit(parts, [load_rollouts(run) for run in options.members], options)
    print(table(result))
    write_text(options.run / "audit.json", json.dumps(result, indent=1) + "\n")
    draw(result, options.run / "audit.png")
    print(f"\n{options.run / 'audit.json'}, {options.run / 'audit.png'}")


if __name__ == "__main__":
    run_script(main, Args)
