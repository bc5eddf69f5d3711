"""experiments/render.py: rollouts written here from the simulator itself, and spoilt ones."""

import os
import subprocess
import sys
from types import SimpleNamespace

import dawm_td3bc
from common.evaluation import fall_rule, make_env

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import render
import torch
from PIL import Image, ImageSequence
from toy import ROOT

HORIZON, ROLLOUTS = 2, 3


def true_run(simulator: str) -> SimpleNamespace:
    """The parts of a run whose rollouts are what the simulator did; sd of the data: 0.5 in each dimension."""
    env, rng, rows = make_env(simulator, "d4rl").unwrapped, np.random.default_rng(0), []
    for rollout in range(ROLLOUTS):
        obs = env.reset(seed=rollout)[0].astype(np.float32)
        mujoco.mj_resetData(env.model, env.data)
        env.set_state(np.append(0, obs[: env.model.nq - 1]), obs[env.model.nq - 1 :])
        for _ in range(HORIZON + 1):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            next_obs, reward, terminated, _, _ = env.step(action.astype(np.float64))
            assert not terminated
            rows.append(np.concatenate([obs, action, [reward], next_obs, [0]]).astype(np.float32))
            obs = next_obs
    rows = torch.from_numpy(np.stack(rows)).view(ROLLOUTS, HORIZON + 1, -1)
    low, high = fall_rule(make_env(simulator, "d4rl"))
    dataset = SimpleNamespace(
        spec=gym.spec(simulator), physics="d4rl", obs=np.stack([0 * obs, 0 * obs + 1]), healthy_low=low,
        healthy_high=high, action=np.zeros((2, len(action))), action_low=-1 + 0 * action, action_high=1 + 0 * action,
    )  # fmt: skip
    return SimpleNamespace(
        dataset=dataset, rollouts={"rows": rows, "valid": torch.ones(rows.shape[:2], dtype=torch.bool)},
        args=SimpleNamespace(env_id="x", physics="d4rl"), evaluator=SimpleNamespace(physics="d4rl"), script=dawm_td3bc,
    )  # fmt: skip


@pytest.fixture
def show(monkeypatch, tmp_path, capsys):
    """show(parts, ...): the two pictures of each frame of the GIF, and what was printed."""

    def run(parts, **options) -> tuple[list, str]:
        monkeypatch.setattr(render, "load_rollouts", lambda folder: parts)
        given = dict(run=tmp_path) | options
        render.main(render.Args(**given))
        boxes = render.Sheet("").boxes
        with Image.open(tmp_path / "imagined.gif") as gif:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
        pictures = [[frame[len(frame) - y - high : len(frame) - y, x : x + wide] for x, y, wide, high in boxes]
                    for frame in frames]  # fmt: skip
        return pictures, capsys.readouterr().out

    return run


@pytest.mark.parametrize("simulator", ["Hopper-v4", "Walker2d-v4", "HalfCheetah-v4"])
def test_what_the_simulator_did_is_drawn_twice(simulator, show):
    pictures, text = show(true_run(simulator))
    assert len(pictures) == ROLLOUTS * (HORIZON + 2)  # every state of each
    assert all((left == right).all() for left, right in pictures)
    assert any((pictures[0][0] != left).any() for left, _ in pictures[1:])  # it moves
    assert text.count("error by step 0.00 0.00 0.00") == ROLLOUTS


def test_a_spoilt_rollout_errs_by_what_was_added(show):
    """In the second rollout's last state the robot is imagined 0.9 m lower: 1.8 standard deviations in one of 11."""
    parts = true_run("Hopper-v4")
    parts.rollouts["rows"][1, 2, -12] -= 0.9  # height in next_obs
    pictures, text = show(parts, pick="worst", count=1)
    assert f"rollout 1: error by step 0.00 0.00 {1.8 / 11**0.5:.2f}\n" in text
    assert [(left == right).all() for left, right in pictures] == [True, True, True, False]
    for choice in ("worst", "median", "best"):
        assert ("rollout 1:" in show(parts, pick=choice, count=1)[1]) == (choice == "worst")
    columns = [x.numpy() for x in parts.rollouts["rows"][1].split(dawm_td3bc.row_sizes(11, 3), dim=1)]
    env, rule = make_env("Hopper-v4", "d4rl").unwrapped, (parts.dataset.healthy_low, parts.dataset.healthy_high)
    found = render.simulate(env, columns, 1, np.full(11, 0.5), rule)
    assert found.fallen.tolist() == [[False] * 4, [False, False, False, True]]  # below 0.7 m
    np.testing.assert_allclose(found.reward[0], found.reward[1], rtol=1e-5)


def test_an_opengl_that_is_not_here_stops_nothing():
    """mujoco itself cannot be imported then. MUJOCO_GL stays as it was."""
    words = "import os, common.evaluation; print(os.environ['MUJOCO_GL'])"
    environment = {**os.environ, "MUJOCO_GL": "no such OpenGL"}
    done = subprocess.run([sys.executable, "-c", words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "no such OpenGL\n", done.stderr
