"""d3rlpy's TD3+BC or IQL on local data, evaluated by our evaluator: one line of JSON per run.

Runs in an environment of its own (make peers), since d3rlpy pins gymnasium 1.0.0; experiments/peers.sh does it all.

    .venv-peers/bin/python experiments/peers.py runs/peers/data.npz td3bc 0 25000
"""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import d3rlpy
import numpy as np
import torch

from common.evaluation import Evaluator, normalized_score


def build(name: str, data: dict, updates: int):
    """The published hyperparameters: what dawm_td3bc.py and dawm_iql.py take without --laptop."""
    if name == "td3bc":
        scaler = d3rlpy.preprocessing.StandardObservationScaler(
            mean=data["obs"].mean(0), std=data["obs"].std(0), eps=1e-3
        )
        return d3rlpy.algos.TD3PlusBCConfig(
            actor_learning_rate=3e-4, critic_learning_rate=3e-4, batch_size=256, gamma=0.99, tau=0.005,
            target_smoothing_sigma=0.2, target_smoothing_clip=0.5, alpha=2.5, update_actor_interval=2,
            observation_scaler=scaler,
        ).create(device="cpu:0")  # fmt: skip
    returns = data["returns"]
    scaler = d3rlpy.preprocessing.MultiplyRewardScaler(1000 / float(returns.max() - returns.min()))
    cosine = d3rlpy.optimizers.AdamFactory(
        lr_scheduler_factory=d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=updates)
    )
    return d3rlpy.algos.IQLConfig(
        actor_learning_rate=3e-4, critic_learning_rate=3e-4, batch_size=256, gamma=0.99, tau=0.005,
        actor_optim_factory=cosine, expectile=0.7, weight_temp=3.0, max_weight=100.0, reward_scaler=scaler,
    ).create(device="cpu:0")  # fmt: skip


def main(path: str, name: str, seed: int, updates: int) -> dict:
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    data = dict(np.load(path))
    ends = np.cumsum(data["lengths"]) - 1
    timeouts = np.zeros(len(data["reward"]), bool)
    timeouts[ends] = ~data["terminated"][ends].astype(bool)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=data["obs"],
        actions=data["action"],
        rewards=data["reward"],
        terminals=data["terminated"].astype(np.float32),
        timeouts=timeouts.astype(np.float32),
    )
    agent = build(name, data, updates)
    evaluator = Evaluator(str(data["simulator"]), str(data["physics"]), 10)
    returns, start = [], time.monotonic()
    every = updates // 10
    for _ in agent.fitter(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=every,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        show_progress=False,
    ):
        returns.append(float(evaluator(lambda obs: agent.predict(obs.astype(np.float32)), seed=seed + 100).mean()))
    scores = [normalized_score("hopper", value) for value in returns]
    return {
        "library": f"d3rlpy {d3rlpy.__version__}", "algorithm": name, "seed": seed, "updates": updates,
        "final": scores[-1], "mean_of_last_10": float(np.mean(scores[-10:])), "best": max(scores), "returns": returns,
        "seconds": time.monotonic() - start,
    }  # fmt: skip


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # d3rlpy logs to standard output, where only the result belongs
        result = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(result))
