"""d3rlpy's TD3+BC and IQL, unchanged, for speed.py, in the environment of `make peers`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import d3rlpy
import numpy as np
import torch
from peers import build
from speed import FOREVER, metered


def main(loop: str, threads: int) -> None:
    """Rows of Hopper's shape, random: time does not depend on what they hold."""
    torch.set_num_threads(threads)
    sys.stdout, rng, count = sys.stderr, np.random.default_rng(0), 200_000
    obs, action = rng.standard_normal((count, 11)).astype(np.float32), rng.uniform(-1, 1, (count, 3)).astype(np.float32)
    timeouts = (np.arange(1, count + 1) % 1000 == 0).astype(np.float32)
    dataset = d3rlpy.dataset.MDPDataset(obs, action, obs[:, 0], np.zeros(count, np.float32), timeouts=timeouts)
    agent = build("td3bc" if loop == "C" else "iql", obs, np.array([0.0, 1000.0]), 10**6)
    agent.build_with_dataset(dataset)
    for _ in metered(range(FOREVER)):
        agent.update(dataset.sample_transition_batch(256))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
