"""d3rlpy's TD3+BC or IQL on local data, evaluated by our evaluator: one line of JSON per run.

Runs in an environment of its own (make peers), since d3rlpy pins gymnasium 1.0.0; experiments/peers.sh does it all.

    .venv-peers/bin/python experiments/peers.py runs/peers/data.npz td3bc 0 25000
    .venv-peers/bin/python experiments/peers.py hopper-medium-v2 td3bc 0 25000 --data-path FILE

The second reads a file in D4RL's layout, such as dawm_td3bc.py --export-hdf5 writes. d3rlpy takes a transition's next
state from the row behind it, and leaves out the last transition of an episode that was cut: of rollouts with two steps
the one whose action the inverse dynamics filled in. So each cut episode gets its last state as one more row.
"""

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import d3rlpy
import numpy as np
import torch

from common.data import load_dataset
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


def mdp_dataset(data: dict, last_states: bool):
    """The data as d3rlpy wants them; last_states: no transition of a cut episode is left out."""
    ends = np.cumsum(data["lengths"]) - 1
    cut = ends[~data["terminated"][ends].astype(bool)]
    obs, action, reward, terminated = (data[key] for key in ("obs", "action", "reward", "terminated"))
    timeouts = np.zeros(len(reward), bool)
    timeouts[cut] = True
    if last_states:
        timeouts = np.insert(timeouts & False, cut + 1, True)
        obs = np.insert(obs, cut + 1, data["next_obs"][cut], axis=0)
        action, reward, terminated = (np.insert(x, cut + 1, 0, axis=0) for x in (action, reward, terminated))
    return d3rlpy.dataset.MDPDataset(
        observations=obs,
        actions=action,
        rewards=reward,
        terminals=terminated.astype(np.float32),
        timeouts=timeouts.astype(np.float32),
    )


def main(path: str, name: str, seed: int, updates: int, data_path: Path | None = None) -> dict:
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    if data_path is None:
        data = dict(np.load(path))
    else:
        loaded = load_dataset(path, data_path)
        data = {key: getattr(loaded, key) for key in (*loaded.ARRAYS, "returns", "simulator", "physics")}
    dataset = mdp_dataset(data, last_states=data_path is not None)
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
    robot = str(data["simulator"]).rsplit("-v", 1)[0].lower()
    scores = [normalized_score(robot, value) for value in returns]
    return {
        "library": f"d3rlpy {d3rlpy.__version__}", "algorithm": name, "seed": seed, "updates": updates,
        "final": scores[-1], "mean_of_last_10": float(np.mean(scores[-10:])), "best": max(scores), "returns": returns,
        "seconds": time.monotonic() - start,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="what peers.sh wrote, or a D4RL name with --data-path")
    parser.add_argument("algorithm", choices=("td3bc", "iql"))
    parser.add_argument("seed", type=int)
    parser.add_argument("updates", type=int)
    parser.add_argument("--data-path", type=Path, help="a file in D4RL's HDF5 layout")
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # d3rlpy logs to standard output, where only the result belongs
        result = main(options.data, options.algorithm, options.seed, options.updates, options.data_path)
    print(json.dumps(result))
