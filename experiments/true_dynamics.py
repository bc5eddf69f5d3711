"""Is it the model's error that costs the score? TD3+BC on a run's rollouts whose outcome is in part the simulator's.

    python experiments/true_dynamics.py runs/RUN_FOLDER

Every row keeps its state and action. Of next state, reward and end, those that a line of the table names are replaced
by what the simulator does from there. `first_rows` leaves out all that start at an imagined state; `asked_again` has
the world model say anew where their inferred actions lead; the last line is the run's real data. Ten minutes a line and
seed. The same command goes on where it was stopped. Then it prints a table of what is in --out by the same settings, of
any data: means over the second half of each training, ± standard deviation (n - 1) over seeds, of score, critic loss
and the critics' mean target.
"""

import inspect
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import Count, Seed, run_script
from common.evaluation import score_report
from common.run import Run

import numpy as np
import torch
import tyro
from run_folders import finished_runs, load_rollouts, read_args
from stepper import Stepper
from table import spread

REPLACED = {  # the run's name: columns of a row that the simulator gives
    "as_generated": (),
    "first_rows": (),
    "asked_again": (),
    "true_ends": ("terminated",),
    "true_rewards_ends": ("reward", "terminated"),
    "true_next_states": ("next_obs",),
    "all_true": ("next_obs", "reward", "terminated"),
    "real_data": (),
}

PLACES = {"run_dir": "", "stage_dir": ""}  # make no other run
APART = {"env_id", "data_path", "seed", "exp_name", "synthetic_fraction"}  # in which runs of one table may differ


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: Path = tyro.MISSING  # folder of a finished run of dawm_td3bc.py, say, that keeps its rollouts
    lines: tuple[Literal[*REPLACED], ...] = tuple(REPLACED)  # of the table
    updates: Count = 50_000  # of the agent
    seeds: tuple[Seed, ...] = (0, 1, 2)  # of the agent
    bc_alpha: Annotated[float, (0, 100)] = 2.5  # TD3+BC's published weight
    out: Path = Path("runs/true_dynamics")


def true_rows(parts) -> torch.Tensor:
    """The run's rollouts [M, H+1, row_dim] with the simulator's next state, reward and end in every valid row.

    A row that the simulator cannot tell stays as it was generated.
    """
    rows, valid = parts.rollouts["rows"].clone(), parts.rollouts["valid"]
    sizes = parts.script.row_sizes(parts.dataset.obs.shape[1], parts.dataset.action.shape[1])
    stepper = Stepper(parts.dataset, parts.args.physics)
    obs, action, *_ = (part.numpy() for part in rows[valid].split(sizes, dim=1))
    next_obs, reward, terminated = stepper(obs, action)
    known = torch.as_tensor(stepper.checkable(obs) & np.isfinite(next_obs).all(1))
    told = np.concatenate([obs, action, reward[:, None], next_obs, terminated[:, None]], axis=1, dtype=np.float32)
    rows[valid] = torch.where(known[:, None], torch.as_tensor(told), rows[valid])
    return rows


@torch.no_grad()
def asked_again(parts) -> torch.Tensor:
    """The run's rollouts [M, H+1, row_dim] with the next state of all but the first rows drawn anew, without return.

    The window told it before anybody knew the action, which was then inferred from it.
    """
    rows, args = parts.rollouts["rows"].clone(), replace(parts.args, guidance_scale=0.0)
    sizes = parts.script.row_sizes(parts.dataset.obs.shape[1], parts.dataset.action.shape[1])
    later = rows[:, 1:].flatten(0, 1)
    torch.manual_seed(0)
    for batch in later.split(args.synthesis_batch_size):
        obs, action, *_ = batch.to(parts.run.device).split(sizes, dim=1)
        told, _ = parts.script.sample_rollouts(args, parts.world_model, obs, action, torch.zeros_like(obs[:, :1]))
        batch[:, sum(sizes[:3]) : -1] = told[:, 1]
    rows[:, 1:] = later.view(rows[:, 1:].shape)
    return rows


def main(options: Args) -> None:
    if not options.lines or not options.seeds:
        raise UserError("--lines and --seeds need one value or more")
    parts = load_rollouts(options.run)
    train_agent = parts.script.train_agent
    if not hasattr(parts.args, "synthetic_fraction") or "rollouts" not in inspect.signature(train_agent).parameters:
        raise UserError(f"{options.run} is of {parts.script.__name__}, whose agent does not learn from a kept set and "
                        "from real data alike; give a run of dawm_td3bc.py, say")  # fmt: skip
    if "asked_again" in options.lines and not hasattr(parts.script, "infer_actions"):
        raise UserError(f"{parts.script.__name__} infers no actions: name other --lines than asked_again")
    sizes = parts.script.row_sizes(parts.dataset.obs.shape[1], parts.dataset.action.shape[1])
    columns = dict(zip(("obs", "action", "reward", "next_obs", "terminated"), np.cumsum([0, *sizes]), strict=False))
    true = true_rows(parts)
    made = [read_args(summary.parent)["args"] | PLACES for summary in options.out.glob("*/summary.txt")]
    for seed in options.seeds:
        for line in options.lines:
            rows, valid = parts.rollouts["rows"].clone(), parts.rollouts["valid"].clone()
            if line == "first_rows":
                valid[:, 1:] = False
            if line == "asked_again":
                rows = asked_again(parts)
            for name in REPLACED[line]:
                part = slice(columns[name], columns[name] + sizes[list(columns).index(name)])
                rows[..., part] = true[..., part]
            args = replace(
                parts.args, seed=seed, exp_name=line, run_dir=options.out, agent_updates=options.updates,
                eval_every=5_000, bc_alpha=options.bc_alpha, synthetic_fraction=float(line != "real_data"),
            )  # fmt: skip
            settings = json.loads(json.dumps(vars(args), default=str)) | PLACES
            if settings in made:
                continue
            run = Run(args)
            run.open(parts.dataset, parts.evaluator)
            rollouts = {"rows": rows, "valid": valid}
            run.fingerprints["synthesize"] = f"{parts.run.fingerprints['synthesize']} {line}"
            given = dict(args=args, dataset=parts.dataset, rollouts=rollouts, complete=None)
            given |= dict(evaluator=parts.evaluator, run=run)
            train_agent(**{name: given[name] for name in inspect.signature(train_agent).parameters})
            run.finish(score_report(parts.dataset, run.history["eval/episodic_return"], parts.evaluator))
    print_table(options.out, settings)


def print_table(out: Path, settings: dict) -> None:
    groups = defaultdict(list)
    for run in finished_runs(out):
        args = run.content["args"]
        if all(args[name] == settings[name] for name in settings.keys() - APART - PLACES.keys()):
            groups[args["env_id"], args["exp_name"]].append(run)
    print("| data | rows | seeds | score | critic loss | mean target |\n|---|---|---|---|---|---|")
    for (env_id, line), runs in sorted(groups.items(), key=lambda group: (group[0][0], [*REPLACED].index(group[0][1]))):
        told = [env_id, line.replace("_", " "), str(len(runs))]
        for name in ("eval/normalized_score", "agent/qf_loss", "agent/qf_target"):
            values = [run.metrics[name] for run in runs]
            told.append(spread([statistics.mean(x[len(x) // 2 :]) for x in values]) if all(values) else "-")
        print(f"| {' | '.join(told)} |")


if __name__ == "__main__":
    run_script(main, Args)
