"""d3rlpy's TD3+BC or IQL on a Hopper file in D4RL's layout, evaluated by our evaluator: one line of JSON.

    .venv-peers/bin/python experiments/peers.py FILE td3bc|iql SEED UPDATES

Runs in an environment of its own (make peers), since d3rlpy pins gymnasium 1.0.0; experiments/peers.sh does it all.
d3rlpy takes a transition's next state from the row behind it and leaves out the last transition of an episode that was
cut: of rollouts with two steps the one whose action the inverse dynamics inferred. So each cut episode gets its last
state as one more row.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.data import load_dataset
from common.evaluation import Evaluator

import d3rlpy
import numpy as np
import torch


def build(name: str, obs: np.ndarray, returns: np.ndarray, updates: int):
    """The published hyperparameters: what dawm_td3bc.py and dawm_iql.py take without --laptop."""
    shared = dict(actor_learning_rate=3e-4, critic_learning_rate=3e-4, batch_size=256, gamma=0.99, tau=0.005)
    if name == "td3bc":
        scaler = d3rlpy.preprocessing.StandardObservationScaler(mean=obs.mean(0), std=obs.std(0), eps=1e-3)
        return d3rlpy.algos.TD3PlusBCConfig(
            **shared, target_smoothing_sigma=0.2, target_smoothing_clip=0.5, alpha=2.5, update_actor_interval=2,
            observation_scaler=scaler,
        ).create(device="cpu:0")  # fmt: skip
    cosine = d3rlpy.optimizers.CosineAnnealingLRFactory(T_max=updates)
    return d3rlpy.algos.IQLConfig(
        **shared, expectile=0.7, weight_temp=3.0, max_weight=100.0,
        actor_optim_factory=d3rlpy.optimizers.AdamFactory(lr_scheduler_factory=cosine),
        reward_scaler=d3rlpy.preprocessing.MultiplyRewardScaler(1000 / float(returns.max() - returns.min())),
    ).create(device="cpu:0")  # fmt: skip


def mdp_dataset(data):
    """The data as d3rlpy wants them, no transition left out."""
    cut = data.last[~data.terminated[data.last]]
    obs = np.insert(data.obs, cut + 1, data.next_obs[cut], axis=0)
    timeouts = np.insert(np.zeros(len(data.reward), np.float32), cut + 1, 1)
    action, reward, terminated = (np.insert(x, cut + 1, 0, axis=0) for x in (data.action, data.reward, data.terminated))
    return d3rlpy.dataset.MDPDataset(obs, action, reward, terminated.astype(np.float32), timeouts=timeouts)


def main(path: Path, name: str, seed: int, updates: int) -> dict:
    torch.set_num_threads(1)
    d3rlpy.seed(seed)
    data = load_dataset("hopper-medium-v2", path)
    agent, evaluator = build(name, data.obs, data.returns, updates), Evaluator(data, "d4rl", 10)
    scores, start = [], time.monotonic()
    logger = d3rlpy.logging.NoopAdapterFactory()
    every = dict(n_steps=updates, n_steps_per_epoch=updates // 10, logger_adapter=logger, show_progress=False)
    for _ in agent.fitter(mdp_dataset(data), **every):
        scores.append(evaluator.score(evaluator(agent.predict, seed=seed + 100).mean()))
    library, seconds = f"d3rlpy {d3rlpy.__version__}", time.monotonic() - start
    return dict(library=library, algorithm=name, seed=seed, updates=updates, scores=scores, seconds=seconds)


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[2] not in ("td3bc", "iql"):
        sys.exit(__doc__)
    with redirect_stdout(sys.stderr):  # d3rlpy logs to standard output, where only the result belongs
        result = main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(result))
