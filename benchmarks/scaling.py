"""Time and memory of each stage against the size of the data, of the network, of the batch and of the window.

    python benchmarks/scaling.py                                  # draws docs/scaling.png, ten minutes on two cores
    python benchmarks/scaling.py --data 50000 200000 --widths 16 32 --out /tmp/scaling

Each point is a process of its own, one thread, random transitions of Hopper's shape in episodes of 500 steps, the
laptop's settings but for what is varied. Told are: seconds to build the windows; of one world-model update, of one
inverse dynamics update and of one TD3+BC update on a synthetic set of horizon + 1 transitions for each pair (medians);
of generating 1,000 pairs' rollouts; and the most memory that the process held for itself (without pages of files, which
the system may drop) beyond what it had before the data. `exponent` is the slope of a straight line through the
logarithms: 0 does not grow, 1 grows in proportion, 2 is quadratic. A million pairs make 8 million transitions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

LENGTH = 500  # steps of an episode
QUANTITIES = {
    "windows": "build windows, s",
    "world model": "world-model update, s",
    "inverse dynamics": "inverse dynamics update, s",
    "synthesis": "rollouts of 1,000 pairs, s",
    "agent": "TD3+BC update, s",
    "memory": "own memory, MiB",
}


def dataset(count: int):
    from common.data import OfflineDataset

    rng, episodes = np.random.default_rng(0), count // LENGTH
    obs = rng.standard_normal((episodes, LENGTH + 1, 11), dtype=np.float32)
    rows = episodes * LENGTH
    return OfflineDataset(
        "random", "scaling", "", "", "Hopper-v4", {}, "d4rl", "", obs[:, :-1].reshape(rows, 11),
        rng.uniform(-1, 1, (rows, 3)).astype(np.float32), rng.uniform(0, 3, rows).astype(np.float32),
        obs[:, 1:].reshape(rows, 11), np.zeros(rows, bool), np.full(episodes, LENGTH), np.ones(episodes, bool),
    )  # fmt: skip


class Memory(threading.Thread):
    """The most memory that this process holds for itself, looked at every few milliseconds."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.before = 0.0, self.now()
        self.start()

    @staticmethod
    def now() -> float:
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def run(self):
        while True:
            self.most = max(self.most, self.now() - self.before)
            time.sleep(0.005)


def measure(point: dict) -> dict:
    """One point, in this process."""
    import torch

    import dawm_td3bc as script
    from common.run import Run

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    changes = {name: value for name, value in point.items() if name in ("unet_width", "world_model_batch_size")}
    horizon = point.get("horizon", 7)
    values = {**asdict(script.Args()), **script.LAPTOP, "horizon": horizon, "model_horizon": horizon, **changes}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        args = script.Args(**{**values, "env_id": "random", "run_dir": Path(folder), "stage_dir": Path(folder) / "s"})
        run = Run(args)
        memory = Memory()
        data = dataset(point.get("data", 50_000))
        start = time.perf_counter()
        windows = script.Windows(args, data, run.device)
        found["windows"] = time.perf_counter() - start
        world_model = script.WorldModel(args, windows)
        inverse_dynamics = script.InverseDynamics(args, windows.obs, 3)
        networks = {"world model": world_model, "inverse dynamics": inverse_dynamics}
        optimizers = {k: torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) for k, net in networks.items()}
        normalized = world_model.normalize(windows.obs, windows.reward)
        usable = windows.usable.nonzero()[:, 0]
        obs = windows.obs

        def loss(name: str):
            if name == "world model":
                index = usable[torch.randint(len(usable), (args.world_model_batch_size,))]
                x0 = normalized[windows.rows(index)]
                keep = torch.ones(len(index), 1)
                return world_model.loss(x0, windows.action[index], windows.return_to_go[index, None], keep)
            index = torch.randint(1, len(windows.action) - 1, (args.idm_batch_size,))
            row = windows.start[index]
            triples = torch.cat([obs[row - 1], obs[row], obs[(row + 1).clamp(max=len(obs) - 1)]], dim=1)
            return -inverse_dynamics.log_prob(triples, windows.action[index]).mean()

        for name, optimizer in optimizers.items():
            seconds = []
            for _ in range(15):
                start = time.perf_counter()
                optimizer.zero_grad()
                loss(name).backward()
                optimizer.step()
                seconds.append(time.perf_counter() - start)
            found[name] = statistics.median(seconds)
        inverse_dynamics.eval()
        synthesizer = script.Synthesizer(args, "hopper", windows, world_model, inverse_dynamics)
        index = usable[torch.randint(len(usable), (1000,))]
        start = time.perf_counter()
        synthesizer(index)
        found["synthesis"] = time.perf_counter() - start
        run.open()
        run.fingerprints = {"data": "", "world model": "", "inverse dynamics": ""}
        run.say = lambda *words: None

        class Instant:
            """Rollouts of the right shape, so that a large set is made in seconds."""

            def __init__(self):
                self.windows, self.world_model = windows, world_model

            def __call__(self, index):
                rows = torch.randn(len(index), horizon + 1, 2 * 11 + 3 + 2).clamp(-0.9, 0.9)
                rows[..., -1] = 0
                return rows, torch.ones(len(index), horizon + 1, dtype=torch.bool)

        synthetic = script.synthesize(args, Instant(), run)
        found["transitions"] = len(synthetic)
        agent = script.TD3BC(args, obs, 3)
        source, seconds = script.batches(args, windows.obs, synthetic, None, {"count": 0, "h": 0}), []
        for _ in range(200):
            start = time.perf_counter()
            agent.update(*next(source))
            seconds.append(time.perf_counter() - start)
        found["agent"] = statistics.median(seconds)
        found["memory"] = memory.most
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=int, nargs="+", default=[50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000]
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--horizons", type=int, nargs="+", default=[1, 3, 7, 15, 31])
    parser.add_argument("--out", type=Path, default=Path("docs/scaling"), help="writes OUT.json and OUT.png")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(json.loads(options.point))))
        return
    axes = {
        "data": options.data, "unet_width": options.widths, "world_model_batch_size": options.batches,
        "horizon": options.horizons,
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    points = [(axis, value) for axis, values in axes.items() for value in values]
    result = {axis: {} for axis in axes}
    for axis, value in tqdm(points, unit="point"):
        command = [sys.executable, __file__, "--point", json.dumps({axis: value})]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: {axis} {value}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
        result[axis][value] = json.loads(done.stdout.strip().splitlines()[-1])
    exponents = {}
    for axis, found in result.items():
        values = np.log(list(found))
        for name in QUANTITIES:
            rows = np.log([max(row[name], 1e-9) for row in found.values()])
            exponents[f"{axis} {name}"] = float(np.polyfit(values, rows, 1)[0]) if len(values) > 1 else None
    options.out.with_suffix(".json").write_text(json.dumps({"points": result, "exponents": exponents}, indent=1) + "\n")
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 8), layout="constrained", squeeze=False)
    for column, (axis, found) in enumerate(result.items()):
        for name, label in QUANTITIES.items():
            panel = panels[int(name == "memory")][column]
            exponent = exponents[f"{axis} {name}"]
            legend = f"{label}: {exponent:.2f}" if exponent is not None else label
            panel.loglog(list(found), [row[name] for row in found.values()], marker="o", label=legend)
        for panel in panels[:, column]:
            panel.set_xlabel(axis)
            panel.grid(alpha=0.3, which="both")
            panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle("time (above) and memory (below) against one size at a time; numbers: fitted exponent", fontsize=10)
    figure.savefig(options.out.with_suffix(".png"), dpi=100)
    print(f"| {' | '.join(['varied', 'value', 'transitions', *QUANTITIES.values()])} |")
    print("|---" * (3 + len(QUANTITIES)) + "|")
    for axis, found in result.items():
        for value, row in found.items():
            told = [f"{row[name]:.4g}" for name in QUANTITIES]
            print(f"| {axis} | {value:,} | {row['transitions']:,} | {' | '.join(told)} |")
        told = [
            f"{exponents[f'{axis} {name}']:.2f}" if exponents[f"{axis} {name}"] is not None else ""
            for name in QUANTITIES
        ]
        print(f"| | exponent | | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
