"""A task that is no robot of D4RL: negative returns, one action in [-2, 2] or behind a wrapper; every script on it."""

import importlib
import os

from common import export
from common.data import load_dataset
from common.evaluation import described
from common.export import minari_writes_to
from dawm_td3bc import load_run

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from test_policy import policy
from toy import SCRIPTS, child, folders_below, metrics, run

ACTORS = ("dawm_td3bc", "dawm_iql", "baselines.polygrad", "baselines.diamond")  # one script for each kind of actor


def record(env: gym.Env, name: str, steps: int) -> None:
    """20 episodes of random actions, in the set MINARI_DATASETS_PATH/name."""
    buffers, rng = [], np.random.default_rng(0)
    for episode in range(20):
        obs, action, reward = [env.reset(seed=episode)[0]], [], []
        for _ in range(steps):
            action.append(rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32))
            found = env.step(action[-1])
            obs.append(found[0])
            reward.append(float(found[1]))
        columns = {"observations": obs, "actions": action, "rewards": reward, "terminations": [False] * steps}
        columns = {key: np.array(column) for key, column in columns.items()}
        buffers.append(EpisodeBuffer(**columns, truncations=np.arange(steps) == steps - 1))
    with minari_writes_to(os.environ["MINARI_DATASETS_PATH"]):
        minari.create_dataset_from_buffers(name, buffers, env=env, data_format="hdf5")


def returns_in_its_own_environment(module: str, folder, name: str) -> None:
    """Prints what the run's actor gets in the environment that Minari recovers, two episodes side by side."""
    script = importlib.import_module(module)
    actor, envs = script.load_run(folder).actor, [minari.load_dataset(name).recover_environment() for _ in range(2)]
    low, high = envs[0].action_space.low, envs[0].action_space.high
    obs, returns = [env.reset(seed=100 + i)[0] for i, env in enumerate(envs)], np.zeros(2)
    for _ in range(envs[0].spec.max_episode_steps):
        with torch.no_grad():
            actions = actor(torch.as_tensor(np.array(obs, np.float32))).numpy()
        actions = np.clip((low + high) / 2 + (high - low) / 2 * actions, low, high)
        obs, rewards, *_ = zip(*(env.step(action) for env, action in zip(envs, actions, strict=True)), strict=True)
        returns += rewards
    print(f"mean {float(returns.mean())!r}")


def short(arguments: list[str]) -> list[str]:
    """The same with fewer updates and shorter plans: what is tried here is whether the task's units come through."""
    few = {"--world-model-steps": "2", "--agent-updates": "20", "--idm-steps": "2", "--value-steps": "2"}
    fewer = [few.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]
    return fewer if "--agent-updates" in arguments else [*fewer, "--plan-horizon", "8"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["Pendulum", "RescaleAction"])
def test_every_script_is_scored_in_the_sets_own_environment(folders, wrapped):
    """Through a wrapper one script with an agent and one planner: undoing it is common/'s.

    experiments/policy.py tells returns and no score; where gymnasium has no picture (without pygame), it says so.
    """
    env, name = gym.make("Pendulum-v1", max_episode_steps=20), "own/pendulum-v0"
    record(gym.wrappers.RescaleAction(env, -1.0, 1.0) if wrapped else env, name, steps=20)
    for module in ("dawm_td3bc", "baselines.decision_diffuser") if wrapped else SCRIPTS:
        result = run(module, ["--env-id", name, *folders_below(folders), *short(SCRIPTS[module])], folders)
        assert result.code == 0 and "no D4RL reference" in result.text, (module, result.text[-2000:])
        if module in ACTORS:
            (folder,) = folders.glob(f"runs/*__{module.split('.')[-1]}__*")
            final = [line["eval/episodic_return"] for line in metrics(folder) if "eval/episodic_return" in line][-1]
            log = folders / f"{module}.log"
            process = child(returns_in_its_own_environment, module, folder, name, log=log)
            process.join()
            assert log.read_text().splitlines()[-1] == f"mean {final!r}", module
            assert f"return {final:8.1f}" in result.text
    (folder,) = folders.glob("runs/*__dawm_td3bc__*")
    gif = folders / "policy.gif"
    told = policy(folders, folder, "--starts", 1, "--gif", gif)
    assert {row[-1] for row in told.rows.values()} == {"none"}
    assert gif.exists() or "gives no picture (DependencyNotInstalled: " in told.text
    export.main(export.Args(folder, minari="own/made-v0"))
    rows, exported = load_run(folder).rollouts, load_dataset("own/made-v0")
    assert np.array_equal(exported.action, rows["rows"][rows["valid"]][:, 3:4].numpy())
    assert described(exported.spec) == described(load_dataset(name).spec)  # the wrapper too
    stored = np.concatenate([episode.actions for episode in minari.load_dataset("own/made-v0").iterate_episodes()])
    assert np.array_equal(stored, exported.action if wrapped else 2 * exported.action)  # as the environment takes them
