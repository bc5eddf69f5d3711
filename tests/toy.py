"""Small data, and short runs of the scripts in children of one warm process, since starting Python takes longer."""

import importlib
import json
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from common.data import OfflineDataset
from common.evaluation import make_env
from common.run import Run
from dawm_td3bc import Args

import h5py
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(env_id="linear", unet_width=16, unet_multipliers=(1, 2), outcome_width=64, device="cpu")

TOY_AGENT = "--laptop --agent-updates 40 --eval-every 20 --eval-episodes 2 --log-every 10 --device cpu".split()
TOY_PLANNER = "--laptop --eval-episodes 2 --log-every 10 --device cpu --world-model-steps 12".split()
TOY_ROLLOUTS = "--synthesis-batch-size 64".split()  # several batches, so that a kill falls between two
TOY_WORLD_MODEL = [*TOY_ROLLOUTS, *"--world-model-steps 12 --unet-width 8 --outcome-width 16".split()]
TOY_IDM = "--idm-steps 20 --idm-width 16".split()
TOY = TOY_AGENT + TOY_WORLD_MODEL + TOY_IDM
# Every script, with what makes a run of it small.
SCRIPTS = {
    "dawm_td3bc": TOY,
    "dawm_iql": TOY,
    "dwm_baseline": TOY_AGENT + TOY_WORLD_MODEL,
    "baselines.decision_diffuser": TOY_PLANNER + "--unet-width 8 --idm-width 16 --plan-horizon 8".split(),
    "baselines.diamond": TOY_AGENT
    + "--world-model-steps 12 --mlp-width 16 --reward-model-steps 20 --imagination-horizon 3".split()
    + "--imagined-rollouts 8 --kept-rollouts 40".split(),
    # After 12 updates its Hopper stands for a hundred plans.
    "baselines.diffuser": TOY_PLANNER + "--world-model-steps 30 --value-steps 20 --unet-width 16 --plans 2".split(),
    "baselines.diffusion_mpc": TOY_PLANNER
    + "--transformer-layers 1 --transformer-width 8 --attention-width 8 --mlp-width 8 --candidates 2".split(),
    "baselines.one_step": TOY_AGENT + TOY_ROLLOUTS + "--world-model-steps 12 --ensemble-width 16".split(),
    "baselines.polygrad": TOY_AGENT
    + "--world-model-steps 12 --denoiser-width 16 --agent-batch-size 16 --kept-windows 40".split(),
    "baselines.policy_guided_diffusion": TOY_AGENT
    + "--world-model-steps 12 --unet-width 16 --windows-per-set 30 --sampling-steps 4 --refresh-every 15".split()
    + "--synthesis-batch-size 8".split(),
    "baselines.ssorl": [*TOY_AGENT, *TOY_IDM, "--label-fraction", "0.5"],
    "baselines.synther": TOY_AGENT
    + TOY_ROLLOUTS
    + "--world-model-steps 12 --mlp-width 16 --synthetic-transitions 200 --sampling-steps 4".split(),
    "variants.joint_td3bc": TOY_AGENT + TOY_WORLD_MODEL,
    "variants.uncertain_td3bc": TOY,
}

# Children are forked from a process that has imported everything and has one thread: forking the test process itself,
# which has many, is what Python warns about. conftest.py starts it.
SLOW_TO_IMPORT = ["torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg", "pytest"]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*SLOW_TO_IMPORT, *SCRIPTS])


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
        env_id="linear", source="test", path="", sha256="", note="", spec=None, physics="stock",
        obs=flat(obs[:, :-1]), action=flat(action), reward=flat(obs[:, :-1, 0]), next_obs=flat(obs[:, 1:]),
        terminated=ends.reshape(-1), lengths=np.full(episodes, length), complete=np.ones(episodes, bool),
        action_low=-np.ones(2, np.float32), action_high=np.ones(2, np.float32), healthy_low=None, healthy_high=None,
    )  # fmt: skip


def hopper_file(path: Path, episodes=12, length=40) -> Path:
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


def new_run(folder: Path, fingerprint="data", args_class=Args, **changes) -> Run:
    """An open run on a data set of which nothing but the fingerprint is known."""
    args = args_class(
        **dict(env_id="test", device="cpu", run_dir=folder / "runs", stage_dir=folder / "stages") | changes
    )
    facts = dict.fromkeys(("source", "path", "sha256", "note", "simulator"), "")
    facts |= dict.fromkeys(("episodes", "complete_episodes", "steps", "mean_return", "std_return"), 1)
    facts |= dict(env_id="test", fingerprint=fingerprint)
    run = Run(args)
    run.open(SimpleNamespace(facts=lambda: facts), SimpleNamespace(physics="stock"))
    return run


def child(function, *arguments, log: Path, **environment) -> multiprocessing.Process:
    """function(*arguments) in a child with this process's environment, whose output goes to `log`."""
    environment = {**os.environ, **environment}
    process = context.Process(target=_in_child, args=(function, arguments, log, environment), daemon=True)
    process.start()
    return process


def _in_child(function, arguments: tuple, log: Path, environment: dict) -> None:
    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    function(*arguments)


def run_script(module: str, arguments: list[str]) -> None:
    """`python -m module arguments`, in this process. Without its picture, which takes as long as all else."""
    Run._plot = lambda run: None
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    script = importlib.import_module(module)
    script.run_script(script.main, script.Args, script.LAPTOP, getattr(script, "PRESETS", None))


def run(module: str, arguments, folder: Path, **environment) -> SimpleNamespace:
    """A whole run -> exit code, and all that it printed."""
    log = folder / f"log-{time.monotonic_ns()}.txt"
    process = child(run_script, module, [str(a) for a in arguments], log=log, **environment)
    process.join()
    return SimpleNamespace(code=process.exitcode, text=log.read_text())


def folders_below(path: Path) -> list:
    return ["--run-dir", path / "runs", "--stage-dir", path / "stages"]


def hopper_arguments(folder: Path, *options) -> list:
    """Arguments for a run on toy Hopper data, everything it writes below `folder`."""
    data = folder / "data.hdf5"
    if not data.exists():
        hopper_file(data)
    return ["--env-id", "hopper-medium-v2", "--data-path", data, *folders_below(folder), *options]


def hopper_run(module: str, folder: Path, *options) -> str:
    """A script on toy Hopper data -> what it printed."""
    result = run(module, hopper_arguments(folder, *options), folder)
    assert result.code == 0, result.text[-2000:]
    return result.text


def wait_for(condition, minutes: float = 10):
    """What condition() gives, as soon as that is true."""
    stop = time.monotonic() + 60 * minutes
    while not (found := condition()):
        assert time.monotonic() < stop, "what was waited for never came"
        time.sleep(0.002)
    return found


def metrics(folder: Path) -> list[dict]:
    """All that a run logged but its times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not any(name.startswith("time/") for name in line)]


def in_default_dtype(windows):
    """The same windows, with all that is floating in the default dtype of the moment: see the fixture `double`."""
    for name, value in vars(windows).items():
        if torch.is_tensor(value) and value.is_floating_point():
            setattr(windows, name, value.to(torch.get_default_dtype()))
    return windows


class Function(torch.nn.Module):
    """Any function in the place of a network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def without_times(records: list) -> list:
    """(step, values) of a run's log but for those that are times."""
    return [record for record in records if not any(name.startswith("time/") for name in record[1])]


class Oracle(torch.nn.Module):
    """A denoiser that knows the clean windows x0 [B, L, dim]."""

    def __init__(self, args, x0, alpha_bar):
        super().__init__()
        self.args, self.x0, self.alpha_bar = args, x0, alpha_bar

    def forward(self, x, k, *_):
        signal = self.alpha_bar[k][:, None, None]
        return self.x0 if self.args.prediction == "x0" else (x - signal.sqrt() * self.x0) / (1 - signal).sqrt()


class Training:
    """As much of a Run as a training needs, for a test that calls it alone: no folder, nothing kept."""

    device = torch.device("cpu")

    def __init__(self):
        self.logged, self.at = {}, 0

    def seed(self, *_):
        torch.manual_seed(0)

    def log(self, _step, values):
        for name, value in values.items():
            self.logged.setdefault(name, []).append(torch.as_tensor(value).item())

    @contextmanager
    def stage(self, _function, total, *_, **__):
        self.total = total
        yield self

    def __iter__(self):
        return iter(range(1, self.total + 1))

    def over(self, items):
        self.at = 0
        for item in items:
            yield item
            self.at += len(item)
