"""experiments/render.py, with sticks: sets written here from the simulator itself, and spoilt ones."""

import json
import os
import sys

import mujoco
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from test_benchmarks import load
from toy import command, linear_dataset

from common import UserError
from common.data import OfflineDataset
from common.evaluation import make_env

HORIZON, ROLLOUTS, SIZE = 2, 3, 40
OBS_DIM = {"Hopper-v4": 11, "Walker2d-v4": 17, "HalfCheetah-v4": 17}


@pytest.fixture
def render(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")  # as the script sets it; put back afterwards
    return load("experiments/render.py")


def true_rows(simulator: str) -> np.ndarray:
    """Rollouts of HORIZON + 1 transitions each, by env.set_state and env.step, from float32 states and actions."""
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
    return np.stack(rows)


def write_run(folder, rows, dataset, monkeypatch, render):
    """The folders of a run and of its set, as the scripts leave them; the run's data are `dataset`."""
    run, kept = folder / "runs" / "a_run", folder / "runs" / "stages" / "synthesis-0"
    run.mkdir(parents=True)
    kept.mkdir(parents=True)
    save_file({"transitions": torch.from_numpy(rows)}, kept / "tensors.safetensors")
    depends = {"args": {"env_id": "x", "horizon": HORIZON}, "inputs": {"data": dataset.fingerprint}}
    manifest = {"stage": "synthesis", "depends": depends, "run": "runs/a_run"}
    (kept / "manifest.json").write_text(json.dumps(manifest))
    args = {"args": {"env_id": "x", "physics": "d4rl"}, "cwd": str(folder)}
    (run / "args.json").write_text(json.dumps(args))
    (run / "stages.json").write_text(json.dumps({"synthesis": "runs/stages/synthesis-0"}))
    monkeypatch.setattr(render, "load_dataset", lambda env_id, data_path: dataset)
    return run, kept


def data_of(simulator: str) -> OfflineDataset:
    """Only its observations count: two of them, whose standard deviation is 0.5 in each dimension."""
    obs = np.stack([np.zeros(OBS_DIM[simulator]), np.ones(OBS_DIM[simulator])]).astype(np.float32)
    two = np.zeros(2, np.float32)
    return OfflineDataset(
        "x", "test", "", "", simulator, {}, "d4rl", "", obs, two[:, None], two, obs, two > 0, np.array([1, 1]), two < 1
    )


def pictures(render, path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The left and the right picture of each frame of a GIF."""
    sheet = render.Sheet(SIZE, "", True)
    sides = [sheet.pad + side * (SIZE + sheet.pad) for side in (0, 1)]
    with Image.open(path) as gif:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    return [tuple(frame[sheet.top : sheet.top + SIZE, x : x + SIZE] for x in sides) for frame in frames]


@pytest.mark.parametrize("simulator", OBS_DIM)
def test_what_the_simulator_did_is_drawn_twice(simulator, render, tmp_path, monkeypatch, capsys):
    run, _ = write_run(tmp_path, true_rows(simulator), data_of(simulator), monkeypatch, render)
    render.main([str(run), "--renderer", "sticks", "--size", str(SIZE)])
    frames = pictures(render, run / "imagined.gif")
    assert len(frames) == ROLLOUTS * (HORIZON + 2)  # every state of each
    assert all((left == right).all() for left, right in frames)
    assert any((frames[0][0] != left).any() for left, _ in frames[1:])  # it moves
    assert capsys.readouterr().out.count("error by step 0.00 0.00 0.00") == ROLLOUTS


def test_a_spoilt_rollout_errs_by_what_was_added(render, tmp_path, monkeypatch, capsys):
    """In the second rollout's last state the robot is imagined 0.9 m lower: 1.8 standard deviations in one of 11."""
    rows = true_rows("Hopper-v4")
    rows[5, -12] -= 0.9  # height in next_obs
    run, kept = write_run(tmp_path, rows, data_of("Hopper-v4"), monkeypatch, render)
    out = tmp_path / "one.gif"
    render.main([str(kept), "--renderer", "sticks", "--size", str(SIZE), "--rollout", "1", "--out", str(out)])
    told = f"rollout 1: error by step 0.00 0.00 {1.8 / 11**0.5:.2f}\n"
    assert told in capsys.readouterr().out
    same = [(left == right).all() for left, right in pictures(render, out)]
    assert same == [True, True, True, False]
    found = render.simulate(make_env("Hopper-v4", "d4rl").unwrapped, rows[3:6], 1, np.full(11, 0.5))
    assert found.fallen.tolist() == [[False] * 4, [False, False, False, True]]  # below 0.7 m
    assert found.error[3] == pytest.approx(1.8 / 11**0.5, rel=1e-5)
    np.testing.assert_allclose(found.reward[0], found.reward[1], rtol=1e-5)
    for choice in ("worst", "median", "best"):
        render.main([str(run), "--renderer", "sticks", "--size", "32", "--count", "1", "--pick", choice])
        assert ("rollout 1:" in capsys.readouterr().out) == (choice == "worst")


def test_where_rollouts_begin(render):
    """Rows of one number each, H = 2, as obs, action, reward, next_obs, terminated."""
    chain = [(0, 1, 0), (1, 2, 0), (2, 3, 0), (3, 4, 0), (4, 5, 1), (5, 6, 0), (9, 7, 0), (7, 8, 0)]
    rows = np.array([(obs, 0, 0, after, end) for obs, after, end in chain], np.float32)
    assert render.first_rows(rows, obs_dim=1, horizon=2).tolist() == [0, 3, 5, 6]  # full, after an end, elsewhere


def test_refusals(render, tmp_path, monkeypatch):
    run, kept = write_run(tmp_path, true_rows("Hopper-v4"), data_of("Hopper-v4"), monkeypatch, render)

    def refusal(*words) -> str:
        with pytest.raises(UserError) as error:
            render.main([*map(str, words), "--renderer", "sticks"])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no run folder" in refusal(tmp_path)
    assert "has 3 rollouts, 0 to 2" in refusal(run, "--rollout", 3)
    assert "must end in .gif" in refusal(run, "--out", "x.mp4")
    assert "--count 0 lies outside [1, 100]" in refusal(run, "--count", 0)
    (run / "stages.json").write_text('{"synthesis": "runs/stages/gone"}')
    assert "is not there any more" in refusal(run)
    (run / "stages.json").write_text("{}")
    assert "kept no synthetic set" in refusal(run)
    monkeypatch.setattr(render, "load_dataset", lambda env_id, data_path: linear_dataset())
    assert "other data" in refusal(kept)
    manifest = json.loads((kept / "manifest.json").read_text())
    manifest["depends"]["inputs"]["data"] = linear_dataset().fingerprint
    (kept / "manifest.json").write_text(json.dumps(manifest))
    assert "Linear-v0 has no state that can be set" in refusal(kept)
    (kept / "tensors.safetensors").write_bytes(b"cut")
    assert "cannot be read" in refusal(kept)


def test_without_opengl(render, tmp_path, monkeypatch, capsys):
    """Asked for, it is missed in one line with exit code 2; left open, sticks are taken and it is told."""
    run, _ = write_run(tmp_path, true_rows("Hopper-v4"), data_of("Hopper-v4"), monkeypatch, render)
    result = command("experiments/render.py", run, "--renderer", "gl", MUJOCO_GL="nonsense")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "tried MUJOCO_GL=nonsense" in result.stderr and "apt install libegl1" in result.stderr
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert render.choose_renderer("auto") == "sticks" and os.environ["MUJOCO_GL"] == "disabled"
    assert "drawing sticks instead" in capsys.readouterr().out
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(render, "TRY_GL", "import os; raise SystemExit(os.environ['MUJOCO_GL'] != 'osmesa')")
    assert render.choose_renderer("auto") == "gl" and os.environ["MUJOCO_GL"] == "osmesa"
    assert "mujoco" in sys.modules  # so that nothing here has chosen anything for the tests that follow
