"""common/evaluation.py: D4RL's masses, episodes side by side equal to one at a time, the score."""

import mujoco
import numpy as np
import pytest

from common import UserError
from common.evaluation import Evaluator, Stepper, make_env, normalized_score, score_report

# Body masses in kg: today's MuJoCo computes capsules exactly; until 2.1.0 a capsule of radius r and half-length h
# weighed as a cylinder of length 2 h + r, 1000 pi r^2 (2 h + r). HalfCheetah's are scaled to 14 in total.
HOPPER = {"stock": [3.665191, 4.057891, 2.781357, 5.315575], "d4rl": [3.534292, 3.926991, 2.714336, 5.089380]}


@pytest.mark.parametrize("physics", ["stock", "d4rl"])
def test_body_masses(physics):
    hopper = make_env("Hopper-v4", physics).unwrapped.model
    np.testing.assert_allclose(hopper.body_mass[1:], HOPPER[physics], atol=1e-6)
    walker2d = make_env("Walker2d-v4", physics).unwrapped.model
    assert walker2d.body_mass.sum() == pytest.approx({"stock": 23.677137, "d4rl": 22.698007}[physics], abs=1e-6)
    cheetah = make_env("HalfCheetah-v4", physics).unwrapped.model
    assert cheetah.body_mass[1] == pytest.approx({"stock": 6.250209, "d4rl": 6.360313}[physics], abs=1e-6)
    assert cheetah.body_mass.sum() == pytest.approx(14)


def test_old_capsules_by_formula():
    """Mass and inertia of each Hopper capsule under d4rl, from its radius and half-length."""
    model = make_env("Hopper-v4", "d4rl").unwrapped.model
    for geom in range(1, model.ngeom):
        radius, half = model.geom_size[geom, :2]
        length = 2 * half + radius
        mass = 1000 * np.pi * radius**2 * length
        body = model.geom_bodyid[geom]
        inertia = [mass * (3 * radius**2 + length**2) / 12] * 2 + [mass * radius**2 / 2]
        assert model.body_mass[body] == pytest.approx(mass)
        np.testing.assert_allclose(sorted(model.body_inertia[body]), sorted(inertia), rtol=1e-9)


def test_the_physics_differ_where_it_matters():
    """Same start, same actions: the two physics part by more than rounding within a few steps."""
    observations = []
    for physics in ("d4rl", "stock"):
        env = make_env("Hopper-v4", physics)
        env.reset(seed=0)
        observations.append([env.step(np.full(3, 0.5))[0] for _ in range(10)][-1])
    assert np.abs(observations[0] - observations[1]).max() > 1e-3


EVERYTHING = {"exclude_current_positions_from_observation": False}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "simulator, physics, kwargs, known",
    [
        ("Hopper-v4", "d4rl", {}, True), ("Walker2d-v4", "d4rl", {}, True), ("HalfCheetah-v4", "stock", {}, True),
        ("Hopper-v4", "stock", {"terminate_when_unhealthy": False}, True), ("HalfCheetah-v5", "stock", {}, True),
        ("Hopper-v5", "stock", {"terminate_when_unhealthy": False}, True), ("Hopper-v5", "stock", {}, True),
        ("Walker2d-v5", "stock", {"ctrl_cost_weight": 2}, True), ("Hopper-v4", "stock", EVERYTHING, False),
        ("Pusher-v5", "stock", {}, False),
    ],
)  # fmt: skip
def test_side_by_side_equals_one_environment_stepped(simulator, physics, kwargs, known, dtype):
    """Bit-identical returns, actions beyond the bounds clipped, falls and the time limit respected."""
    episodes, seed = 4, 11

    def policy(obs):  # deterministic, leaves the bounds, and falls at different times
        action = 1.5 * np.sin(3 * obs[:, :3].sum(1, keepdims=True) + np.arange(env.action_space.shape[0]))
        return action.astype(dtype)

    env = make_env(simulator, physics, **kwargs)
    plain = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            action = np.clip(policy(obs[None].astype(np.float32))[0], env.action_space.low, env.action_space.high)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        plain.append(total)
    evaluator = Evaluator(simulator, physics, episodes, kwargs)
    np.testing.assert_array_equal(evaluator(policy, seed), plain)
    np.testing.assert_array_equal(evaluator(policy, seed), plain)  # and again: no state is left over
    assert evaluator.known == known


@pytest.mark.parametrize("robot", ["Hopper", "Walker2d", "HalfCheetah"])
@pytest.mark.parametrize("version, physics", [("v4", "d4rl"), ("v5", "stock")])
def test_single_steps_equal_the_environment(robot, version, physics):
    """Next obs, reward and fall to the bit, over random play with falls, and whichever state came before."""
    env, rows, rng = make_env(f"{robot}-{version}", physics).unwrapped, [], np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    for _ in range(150):
        action = rng.uniform(-1, 1, env.action_space.shape)
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(np.concatenate([[0], obs[: env.model.nq - 1]]), obs[env.model.nq - 1 :])
        next_obs, reward, terminated, _, _ = env.step(action)
        rows.append((obs, action, next_obs, reward, terminated))
        obs = env.reset()[0] if terminated else next_obs
    obs, action, *outcome = map(np.array, zip(*rows, strict=True))
    stepper = Stepper(f"{robot}-{version}", physics, threads=2)
    for expected, made in zip(outcome, stepper(obs, action), strict=True):
        np.testing.assert_array_equal(made, expected)
    assert outcome[2].any() == (robot != "HalfCheetah")
    clipped = (np.abs(obs[:, env.model.nq - 1 :]) == 10).any(1)
    np.testing.assert_array_equal(stepper.checkable(obs), ~clipped if robot != "HalfCheetah" else True)


def test_single_steps_only_where_a_state_can_be_set():
    with pytest.raises(UserError, match="InvertedPendulum-v5 has no state that can be set from an observation"):
        Stepper("InvertedPendulum-v5", "stock")
    with pytest.raises(UserError, match=r"observes \(12,\), not the 11 positions"):
        Stepper("Hopper-v4", "d4rl", {"exclude_current_positions_from_observation": False})
    next_obs, reward, _ = Stepper("Hopper-v4", "d4rl")(np.full((1, 11), 1e9), np.zeros((1, 3)))
    assert np.isnan(next_obs).all() and np.isnan(reward).all()


@pytest.mark.parametrize(
    "robot, mean_return, score",
    [("hopper", 3000, 92.8009), ("walker2d", 4000, 87.0977), ("halfcheetah", 6000, 50.5847)],
)
def test_normalized_score(robot, mean_return, score):
    """D4RL's formula and reference returns, on the 0-100 scale."""
    assert normalized_score(robot, mean_return) == pytest.approx(score, abs=1e-4)


def test_a_simulator_without_reference_gets_the_raw_return_and_says_so():
    evaluator = Evaluator("InvertedPendulum-v5", "stock", 2)
    report = score_report("", np.array([5.0, 7.0]), [1.0, 9.0, 4.0], evaluator)
    assert normalized_score("", 5.0) is None
    assert all("no D4RL reference" in report[key] for key in ("data's own mean", "final", "best (hindsight)"))
    assert "4.0" in report["final"] and "9.0" in report["best (hindsight)"] and "4.7" in report["mean of last 3"]


def test_bad_simulators_are_told_in_one_line():
    with pytest.raises(UserError, match="--physics d4rl restores Hopper, Walker2d and HalfCheetah -v4, not Hopper-v5"):
        make_env("Hopper-v5", "d4rl")
    with pytest.raises(UserError, match="cannot make the simulator 'NoSuchRobot-v1'"):
        make_env("NoSuchRobot-v1", "stock")
