"""What checkpoints cost: the loop around them, interleaved with a plain one, and one checkpoint of each stage.

    python benchmarks/checkpoints.py                # laptop scale
    python benchmarks/checkpoints.py --scale paper  # the paper's networks

Rounds of TD3+BC updates on random transitions, in turn in a plain loop and in a stage with the default interval, in
which no checkpoint falls due; an empty stage; then the time to write one checkpoint of three stages, synced to the
disk. The share of a run is the empty stage's time per update plus seconds per checkpoint over the interval.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import dawm_td3bc as script
from common.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("laptop", "paper"), default="laptop")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--updates", type=int, default=200, help="per round and loop")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        args = script.Args(**{**asdict(script.Args()), **(script.LAPTOP if options.scale == "laptop" else {})})
        args = replace(args, env_id="benchmark", run_dir=Path(folder), stage_dir=Path(folder) / "stages", threads=1)
        run = Run(args)
        run.open()
        torch.manual_seed(0)
        rows = torch.randn(10_000, 2 * 11 + 3 + 2, device=run.device)
        agent = script.TD3BC(args, rows[:, :11], 3)
        progress = {"losses": {}, "returns": [], "at": {"count": 0, "h": 0}}
        run.checkpoint_folders = {"agent": Path(folder) / "agent"}
        source = script.batches(args, rows, rows, None, progress["at"])
        times = {"plain loop": [], "stage": []}
        for round_ in range(options.rounds):
            for name in list(times)[:: 1 if round_ % 2 else -1]:  # either may be the first
                with run.stage("agent", options.updates, "update", (agent, progress)) as stage:
                    start = time.perf_counter()
                    for _ in stage if name == "stage" else range(options.updates):
                        progress["losses"] |= agent.update(*next(source))
                    times[name].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        low, median, high = statistics.quantiles(ratios)
        print(
            f"{options.rounds} interleaved rounds of {options.updates} updates, one thread: stage / plain loop "
            f"median {median:.4f}, quartiles {low:.4f} and {high:.4f}"
        )
        start = time.perf_counter()
        with run.stage("agent", 100_000, "update", (agent, progress)) as stage:
            for _ in stage:
                pass
        print(
            f"an empty stage: {10 * (time.perf_counter() - start):.1f} microseconds per update, progress bar included"
        )
        obs, action = torch.randn(2_000, 11, device=run.device), torch.zeros(2_000, 3, device=run.device)
        windows = type("Windows", (), dict(obs=obs, action=action, reward=obs[:, 0]))
        world_model = script.WorldModel(args, windows).to(run.device)
        inverse_dynamics = script.InverseDynamics(args, obs, 3).to(run.device)
        stages = {
            "agent": (agent, progress),
            "inverse dynamics": (inverse_dynamics, adam(inverse_dynamics), {"weights": inverse_dynamics.state_dict()}),
            "world model": (world_model, script.copy.deepcopy(world_model.denoiser), adam(world_model)),
        }
        for name, saves in stages.items():
            run.checkpoint_folders[name] = Path(folder) / name
            seconds = []
            with run.stage(name, 1, "update", saves) as stage:
                for stage.done in range(6):
                    start = time.perf_counter()
                    stage.checkpoint()
                    seconds.append(time.perf_counter() - start)
                size = next(stage.folder.glob("*.pt")).stat().st_size / 2**20
            median = statistics.median(seconds)
            share, every = 100 * median / (60 * args.checkpoint_every), f"{args.checkpoint_every:g}"
            print(
                f"{name}: {median:.3f} s per checkpoint of {size:,.1f} MiB, {share:.3f} % at one every {every} minutes"
            )


def adam(module: torch.nn.Module) -> torch.optim.Optimizer:
    """Adam after one update, so that it holds its moments."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


if __name__ == "__main__":
    main()
