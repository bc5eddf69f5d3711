"""experiments/stepper.py: single transitions are those of the environment, to the bit, from whichever state."""

from common import UserError
from common.evaluation import make_env

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium import wrappers
from stepper import Stepper
from test_evaluation import WITH_X, dataset_of


@pytest.mark.parametrize("version, physics", [("v4", "d4rl"), ("v5", "stock")])
@pytest.mark.parametrize(
    "robot, arguments", [("Hopper", {}), ("Walker2d", {}), ("HalfCheetah", {}), ("Hopper", WITH_X)]
)
def test_single_steps_equal_the_environment(robot, arguments, version, physics):
    """Next obs, reward and fall to the bit, over random play with falls, and whichever state came before."""
    whole, rows, rng = gym.make(f"{robot}-{version}", **arguments), [], np.random.default_rng(0)
    env = make_env(whole.spec, physics).unwrapped
    obs, _ = env.reset(seed=0)
    hidden = 0 if arguments else 1
    for _ in range(100):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(np.r_[[0] * hidden, obs[: env.model.nq - hidden]], obs[env.model.nq - hidden :])
        next_obs, reward, terminated, _, _ = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated))
        obs = env.reset()[0] if terminated else next_obs
    obs, action, *outcome = map(np.array, zip(*rows, strict=True))
    stepper = Stepper(dataset_of(whole, physics), "auto")
    for expected, made in zip(outcome, stepper(obs, action), strict=True):
        np.testing.assert_array_equal(made, expected)
    assert outcome[2].any() == (robot != "HalfCheetah")
    clipped = (np.abs(obs[:, env.model.nq - hidden :]) == 10).any(1)
    np.testing.assert_array_equal(stepper.checkable(obs), ~clipped if robot != "HalfCheetah" else True)


def test_single_steps_only_where_a_state_can_be_set():
    for env in (gym.make("InvertedPendulum-v5"), wrappers.NormalizeObservation(gym.make("Hopper-v5"))):
        with pytest.raises(UserError, match="has no state that can be set from an observation"):
            Stepper(dataset_of(env))
    stepper = Stepper(dataset_of(gym.make("Hopper-v5")))
    next_obs, reward, _ = stepper(np.full((1, 11), 1e9), np.zeros((1, 3), np.float32))
    assert np.isnan(next_obs).all() and np.isnan(reward).all()
