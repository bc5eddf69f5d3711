"""What a stage costs: python benchmarks/checkpoints.py [--scale paper]

An empty stage, with progress bar and without a checkpoint that falls due, per update; then the time to write one
checkpoint of each stage of dawm_td3bc.py, synced to the disk, and its share of a run at the default interval.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dawm_td3bc as script
from common.cli import parse_args, tell
from common.data import load_dataset
from common.evaluation import Evaluator
from common.run import Run

import torch


@dataclass
class Args:
    scale: Literal["laptop", "paper"] = "laptop"  # of the networks


def nothing():
    """Stands for the function of a stage, which gives it name and key."""


def main(options: Args) -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        scale = script.LAPTOP if options.scale == "laptop" else {}
        args = script.Args(**scale | dict(env_id="local/hopper/medium-v0", threads=1))
        args.run_dir, args.stage_dir = Path(folder), Path(folder) / "stages"
        run, dataset = Run(args), load_dataset(args.env_id)
        run.open(dataset, Evaluator(dataset, "auto", 1))
        windows = script.Windows(args, dataset, run.device)
        td3bc = script.TD3BC(args, windows.obs, 3)
        start = time.perf_counter()
        with run.stage(nothing, 100_000, "update", keeps=td3bc, private=True) as stage:
            for _ in stage:
                pass
            stage.found = True  # and nothing is kept
        print(f"an empty stage: {10 * (time.perf_counter() - start):.1f} microseconds per update")
        world_model, inverse_dynamics = (
            script.WorldModel(args, windows),
            script.InverseDynamics(args, windows.obs, windows.change, 3),
        )
        states = {"agent": [td3bc], "inverse dynamics": [inverse_dynamics] * 2, "world model": [world_model] * 2}
        for name, modules in states.items():  # what changes, and its averaged or best copy
            saves = (*modules[1:], stepped_adam(modules[0]))
            with run.stage(nothing, 1, "update", keeps=modules[0], saves=saves, private=True) as stage:
                stage.checkpoints, seconds = Path(folder) / name, []
                for stage.done in range(1, 7):
                    start = time.perf_counter()
                    stage.checkpoint()
                    seconds.append(time.perf_counter() - start)
                stage.found = True
                size = next(stage.checkpoints.glob("*.pt")).stat().st_size / 2**20
            median = statistics.median(seconds)
            share, every = 100 * median / (60 * args.checkpoint_every), f"{args.checkpoint_every:g}"
            print(f"{name}: {median:.3f} s for {size:,.1f} MiB, {share:.3f} % at one every {every} minutes")


def stepped_adam(module: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam after one update, so that it holds its moments."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


if __name__ == "__main__":
    tell(lambda: main(parse_args(Args, {})))
