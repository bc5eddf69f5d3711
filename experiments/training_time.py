"""How exact is the world model after how long a training? Its errors against the simulator, one training a length.

    python experiments/training_time.py runs/RUN_FOLDER --updates 2500 5000 10000    # of dawm_td3bc.py, say
    python experiments/training_time.py --plot runs/training_time/*__*                  # all of them in one picture

The run's world model is trained anew with its own arguments, but for the length. Rollouts from `pairs` real pairs, with
actions by the run's inverse dynamics, are then held against the simulator, as experiments/audit.py does.
"""

import inspect
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import Count, run_script
from common.files import write_whole
from common.run import Run

import numpy as np
import torch
import tyro
from audit import draw_rows, norm
from matplotlib.figure import Figure
from run_folders import finished_run, load_rollouts
from stepper import Stepper


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    runs: tuple[Path, ...] = tyro.MISSING  # a finished run that keeps rollouts; with --plot, runs of this command
    updates: tuple[Count, ...] = (2_500, 5_000, 10_000, 15_000)  # of the world model, a training each
    pairs: Annotated[int, (100, math.inf)] = 2_000  # real pairs whose rollouts are checked
    plot: bool = False  # only draw: training_time.png in --out
    out: Path = Path("runs/training_time")


QUANTILES = {"median": 0.5, "99%": 0.99}


def errors(parts, world_model, pairs: int) -> dict[str, float]:
    """Median and 99 % of the state errors of the first step, and of all later ones, in sd of the data."""
    dataset, stepper = parts.dataset, Stepper(parts.dataset, parts.args.physics)
    torch.manual_seed(0)  # of every training, the same pairs and the same noise
    index = torch.randperm(len(dataset.obs))[:pairs]
    rows, valid, *_ = parts.script.complete_rollouts(
        parts.args, parts.windows, world_model, parts.inverse_dynamics, index.to(parts.run.device)
    )
    rows = draw_rows(rows, valid, parts.script.row_sizes(dataset.obs.shape[1], dataset.action.shape[1]), valid.numel())
    next_obs = stepper(rows.obs, rows.action)[0]
    seen = stepper.checkable(rows.obs) & np.isfinite(next_obs).all(1)
    error, found = norm((rows.next_obs - next_obs) / dataset.obs.std(0)), {}
    for name, here in (("first", seen & (rows.step == 0)), ("later", seen & (rows.step > 0))):
        found |= {f"audit/{name}_{told}": float(np.quantile(error[here], q)) for told, q in QUANTILES.items()}
    return found


def train(options: Args) -> None:
    parts = load_rollouts(options.runs[0])
    takes = inspect.signature(getattr(parts.script, "complete_rollouts", train)).parameters
    if list(takes) != ["args", "windows", "world_model", "inverse_dynamics", "index"]:
        raise UserError(f"{options.runs[0]} is of {parts.script.__name__}, whose rollouts are made in another way; "
                        "give a run of dawm_td3bc.py or dawm_iql.py")  # fmt: skip
    for updates in options.updates:
        stages = options.out / "stages"
        args = replace(parts.args, world_model_steps=updates, run_dir=options.out, stage_dir=stages)
        run = Run(args)
        run.open(parts.dataset, parts.evaluator)
        found = errors(parts, parts.script.train_world_model(args, parts.windows, run), options.pairs)
        run.log(updates, found)
        run.finish({name: f"{value:.3f} sd after {updates:,} updates" for name, value in found.items()})


def draw(options: Args) -> None:
    runs = defaultdict(list)
    for folder in options.runs:
        run = finished_run(folder)
        if "audit/first_median" not in run.metrics:
            raise UserError(f"{folder} was not made by this command")
        runs[run.content["data"]["env_id"]].append(run)
    figure = Figure(figsize=(4.2 * len(runs), 4), layout="constrained")
    for axis, env_id in zip(np.ravel(figure.subplots(1, len(runs), sharey=True)), runs, strict=True):
        of = sorted(runs[env_id], key=lambda run: run.content["args"]["world_model_steps"])
        for name, told, color in (("first", "step 0", "tab:blue"), ("later", "later steps", "tab:orange")):
            for quantile, style in zip(QUANTILES, ("o-", "o:"), strict=True):
                y = [run.metrics[f"audit/{name}_{quantile}"][-1] for run in of]
                x = [run.content["args"]["world_model_steps"] for run in of]
                axis.loglog(x, y, style, color=color, markersize=3, label=f"{told}, {quantile}")
        axis.set_title(env_id, fontsize=10)
        axis.set_xlabel("updates of the world model")
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("error of the generated next state [sd of the data]")
    figure.axes[0].legend(fontsize=8)
    write_whole(options.out / "training_time.png", lambda file: figure.savefig(file, dpi=100, format="png"))
    print(f"wrote {options.out / 'training_time.png'}")


def main(options: Args) -> None:
    if not options.runs or (len(options.runs) > 1 and not options.plot):
        raise UserError(f"{len(options.runs)} runs given; one to train, or with --plot those to draw")
    draw(options) if options.plot else train(options)


if __name__ == "__main__":
    run_script(main, Args)
