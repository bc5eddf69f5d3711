"""Small data and short commands for the tests of the scripts."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from common.data import OfflineDataset
from common.evaluation import make_env

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = dict(env_id="linear", unet_width=16, unet_multipliers=(1, 2), device="cpu")

TOY_AGENT = "--laptop --agent-updates 40 --eval-every 20 --eval-episodes 2 --log-every 10 --device cpu".split()
TOY_WORLD_MODEL = "--world-model-steps 30 --unet-width 8".split()
TOY_IDM = "--idm-steps 20 --idm-width 16".split()
TOY = [*TOY_AGENT, *TOY_WORLD_MODEL, *TOY_IDM]


def linear_dataset(episodes=40, length=30, terminated=False, seed=0) -> OfflineDataset:
    """s' = 0.9 s + 0.3 a in two dimensions, reward = s_0, actions uniform: the inverse is a = (s' - 0.9 s) / 0.3."""
    rng = np.random.default_rng(seed)
    obs = np.zeros((episodes, length + 1, 2))
    obs[:, 0] = rng.uniform(-1, 1, (episodes, 2))
    action = rng.uniform(-0.95, 0.95, (episodes, length, 2))
    for step in range(length):
        obs[:, step + 1] = 0.9 * obs[:, step] + 0.3 * action[:, step]
    ends = np.zeros((episodes, length), bool)
    ends[:, -1] = terminated

    def flat(array):
        return array.reshape(episodes * length, *array.shape[2:]).astype(np.float32)

    return OfflineDataset(
        "linear", "test", "", "", "Linear-v0", {}, "stock", "", flat(obs[:, :-1]), flat(action), flat(obs[:, :-1, 0]),
        flat(obs[:, 1:]), ends.reshape(-1), np.full(episodes, length), np.ones(episodes, bool),
    )  # fmt: skip


def hopper_file(path, episodes=12, length=40):
    """Random play in Hopper, in D4RL's layout."""
    env, rng, rows = make_env("Hopper-v4", "d4rl"), np.random.default_rng(0), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=episode)
        for step in range(length):
            action = rng.uniform(-1, 1, 3)
            next_obs, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, next_obs, terminated, step == length - 1 and not terminated))
            obs = next_obs
            if terminated:
                break
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    with h5py.File(path, "w") as file:
        for key, column in zip(keys, zip(*rows, strict=True), strict=True):
            kind = bool if key in ("terminals", "timeouts") else np.float32
            file[key] = np.array(column).astype(kind)
    return path


def folders_below(path):
    return "--run-dir", path / "runs", "--stage-dir", path / "stages"


def command(script, *arguments, **environment):
    """Run a script of the repository, as a user would."""
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def hopper_command(script, folder, *options) -> str:
    """A script on toy Hopper data, everything it writes below `folder` -> its standard output."""
    data = folder / "data.hdf5"
    if not data.exists():
        hopper_file(data)
    arguments = "--env-id", "hopper-medium-v2", "--data-path", data, *folders_below(folder), *options
    result = command(script, *arguments, DAWM_CACHE_DIR=str(folder / "cache"))
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def refusal(script, arguments, folder, capsys) -> str:
    """What a script's command line says to bad arguments: one line, exit code 2, and no run folder left."""
    arguments = [*arguments, *map(str, folders_below(folder))]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        script.run_script(script.main, script.Args, script.LAPTOP, getattr(script, "PRESETS", None))
    assert stop.value.code == 2 and not list(folder.rglob("*__*"))
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error
