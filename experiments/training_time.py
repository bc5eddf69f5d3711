"""How exact is the world model after how many updates? Its errors against the simulator while it is trained.

    python experiments/training_time.py runs/RUN_FOLDER --updates 30000    # of dawm_td3bc.py; 45 ms an update on a core
    python experiments/training_time.py --plot runs/training_time/*        # the runs in one picture, PNG in --out

The run's world model is trained anew with its own arguments, for longer. The learning rate does not change on the way,
so that the averaged weights after n updates are those of a training of n. At each look, rollouts from `pairs` real
pairs, their actions by the run's inverse dynamics, are held against the simulator, as experiments/audit.py does.
"""

import inspect
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import Count, parse_args, tell
from common.evaluation import Stepper
from common.files import write_whole
from common.run import Run

import numpy as np
import torch
import tyro
from audit import draw_rows, norm
from matplotlib.figure import Figure
from run_folders import finished_run, load_rollouts


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    runs: tuple[Path, ...] = tyro.MISSING  # a finished run that keeps rollouts; with --plot, runs of this command
    updates: Count = 30_000  # of the world model
    every: Count = 2_500  # updates between two looks, after those at 500 and 1,000
    pairs: Annotated[int, (100, math.inf)] = 2_000  # real pairs of a look
    plot: bool = False  # only draw
    out: Path = Path("runs/training_time")


class Watched(Run):
    """A run that looks at the world model while it is trained. A look is a metric, which a checkpoint keeps."""

    def look_with(self, options: Args, parts) -> None:
        self.options, self.parts = options, parts
        self.stepper = Stepper(parts.dataset, parts.args.physics)
        self.index = torch.randperm(len(parts.dataset.obs), generator=torch.Generator().manual_seed(0))[: options.pairs]

    def stage(self, function, total, unit, keeps, **how):
        self.world_model = keeps
        return super().stage(function, total, unit, keeps, **how)

    def log(self, step: int, values: dict) -> None:
        super().log(step, values)
        if "world_model/loss" in values and (step in (500, 1_000) or step % self.options.every == 0):
            with self.timed("looks"), torch.random.fork_rng():
                torch.manual_seed(0)
                super().log(step, self.errors())

    def errors(self) -> dict[str, float]:
        """Median and 99 % of the state errors of the first step, and of all later ones, in sd of the data."""
        parts, dataset = self.parts, self.parts.dataset
        rows, valid = parts.script.complete_rollouts(
            parts.args, parts.windows, self.world_model, parts.inverse_dynamics, self.index
        )
        sizes = parts.script.row_sizes(dataset.obs.shape[1], dataset.action.shape[1])
        rows = draw_rows(rows, valid, sizes, valid.numel())
        next_obs = self.stepper(rows.obs, rows.action)[0]
        seen = self.stepper.checkable(rows.obs) & np.isfinite(next_obs).all(1)
        error, found = norm((rows.next_obs - next_obs) / dataset.obs.std(0)), {}
        for name, here in (("first", seen & (rows.step == 0)), ("later", seen & (rows.step > 0))):
            found |= {f"audit/{name}_{told}": float(np.quantile(error[here], q)) for told, q in QUANTILES.items()}
        return found


QUANTILES = {"median": 0.5, "99%": 0.99}


def train(options: Args) -> None:
    parts = load_rollouts(options.runs[0])
    takes = inspect.signature(getattr(parts.script, "complete_rollouts", train)).parameters
    if list(takes) != ["args", "windows", "world_model", "inverse_dynamics", "index"]:
        raise UserError(f"{options.runs[0]} is of {parts.script.__name__}, whose rollouts are made in another way; "
                        "give a run of dawm_td3bc.py or dawm_iql.py")  # fmt: skip
    args = replace(
        parts.args,
        world_model_steps=options.updates,
        run_dir=options.out,
        stage_dir=options.out / "stages",
        log_every=math.gcd(500, options.every),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    run = Watched(args)
    run.look_with(options, parts)
    run.open(parts.dataset, parts.evaluator)
    parts.script.train_world_model(args, parts.windows, run)
    last = {name: values[-1][1] for name, values in run.history.items() if name.startswith("audit/")}
    run.finish({name: f"{value:.3f} sd after {options.updates:,} updates" for name, value in last.items()})


def draw(options: Args) -> None:
    figure = Figure(figsize=(4.2 * len(options.runs), 4), layout="constrained")
    for axis, folder in zip(np.ravel(figure.subplots(1, len(options.runs), sharey=True)), options.runs, strict=True):
        run, lines = finished_run(folder), (folder / "metrics.jsonl").read_text().splitlines()
        looks = [look for look in map(json.loads, lines) if "audit/first_median" in look]
        if not looks:
            raise UserError(f"{folder} was never looked at; give runs of this command")
        for name, told, color in (("first", "step 0", "tab:blue"), ("later", "later steps", "tab:orange")):
            for quantile, style in zip(QUANTILES, ("o-", "o:"), strict=True):
                errors = [look[f"audit/{name}_{quantile}"] for look in looks]
                label = f"{told}, {quantile}"
                axis.loglog([look["step"] for look in looks], errors, style, color=color, markersize=3, label=label)
        axis.set_title(run.content["data"]["env_id"], fontsize=10)
        axis.set_xlabel("updates of the world model")
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("error of the generated next state [sd of the data]")
    figure.axes[0].legend(fontsize=8)
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "training_time.png", lambda file: figure.savefig(file, dpi=100, format="png"))
    print(f"wrote {options.out / 'training_time.png'}")


def main(options: Args) -> None:
    if not options.runs or (len(options.runs) > 1 and not options.plot):
        raise UserError(f"{len(options.runs)} runs given; one to train, or with --plot those to draw")
    draw(options) if options.plot else train(options)


if __name__ == "__main__":
    tell(lambda: main(parse_args(Args, {})))
