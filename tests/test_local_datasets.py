"""local_datasets/: collecting, exporting and describing data with tiny made-up policies, never the shipped ones."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common import UserError, data
from common.cli import tell
from common.evaluation import make_env
from local_datasets import card, collect, train_behavior
from local_datasets.collect import Args
from local_datasets.train_behavior import Actor, Candidate, choose_medium

import minari
import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from toy import child
from tqdm import tqdm

SCRIPTS = Path(collect.__file__).parent
HOPPER = "local/hopper/medium-v0"
FIRST_SEED = 100_000_000  # roll_out: (100 * (seed + 1) + index of the policy) * 1,000,000 + number of the episode
SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6)}  # obs_dim, action_dim


@pytest.fixture
def made_up(folders, monkeypatch):
    """A folder for data sets, with untrained policies of width 8 beside it; MuJoCo's log goes there too."""
    monkeypatch.chdir(folders)
    behavior = folders / "behavior"
    behavior.mkdir()
    sums = ""
    names = [f"hopper-{name}" for name in ("random", "medium", "expert", "replay-0", "replay-1", "replay-2")]
    for step, name in enumerate([*names, "halfcheetah-medium"]):
        torch.manual_seed(step)
        robot = name.split("-")[0]
        weights = {key: tensor.half() for key, tensor in Actor(*SIZES[robot], 8).state_dict().items()}
        content = Candidate(1000 * step, weights, 20.0, 5.0, 20.0).packed(robot, seed=0, episodes=1)
        (behavior / f"{name}.safetensors").write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {name}.safetensors\n"
    (behavior / "SHA256SUMS").write_text(sums)
    return folders


def args_for(root: Path, env_id: str = HOPPER, steps: int = 300, **more) -> Args:
    return Args(env_id, steps, behavior_dir=root / "behavior", **more)


def read(env_id: str = HOPPER) -> list:
    return list(minari.load_dataset(env_id).iterate_episodes())


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def start(script: str, *flags, cwd: Path, threads: int = 1) -> subprocess.Popen:
    command = [sys.executable, SCRIPTS / script, *map(str, flags)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)


# ---- What is collected


def test_names_are_those_that_the_loader_knows():
    assert sorted(collect.ENV_IDS) == sorted(data.LOCAL_NAMES)


def test_steps_marks_and_metadata(made_up):
    collect.main(args_for(made_up))
    episodes = read()
    assert sum(len(episode) for episode in episodes) == 300
    for episode in episodes[:-1]:  # an untrained Hopper falls long before step 1000
        assert episode.terminations[-1] and not episode.truncations[-1]
    assert episodes[-1].truncations[-1] and not episodes[-1].terminations[-1]
    for episode in episodes:
        assert not (episode.terminations[:-1] | episode.truncations[:-1]).any()
        assert len(episode.observations) == len(episode.actions) + 1
        assert episode.observations.dtype == episode.actions.dtype == episode.rewards.dtype == np.float32
    metadata = minari.load_dataset(HOPPER).storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)  # D4RL infos.py
    assert (metadata["physics"], metadata["steps"], metadata["seed"]) == ("d4rl", 300, 0)
    digest = hashlib.sha256((made_up / "behavior" / "hopper-medium.safetensors").read_bytes()).hexdigest()
    assert [policy["sha256"] for policy in metadata["policies"]] == [digest]
    assert metadata["algorithm_name"] == "SAC" and "Hopper-v4" in metadata["eval_env_spec"]


def test_time_limit_is_truncation(made_up):
    collect.main(args_for(made_up, "local/halfcheetah/medium-v0", 2300))
    episodes = read("local/halfcheetah/medium-v0")
    assert [len(episode) for episode in episodes] == [1000, 1000, 300]  # HalfCheetah cannot fall
    assert all(episode.truncations[-1] and not episode.terminations.any() for episode in episodes)


def test_rows_are_what_the_simulator_does(made_up):
    collect.main(args_for(made_up))
    env = make_env("Hopper-v4", "d4rl")
    for index, episode in enumerate(read()[:3]):
        first, _ = env.reset(seed=FIRST_SEED + index)
        np.testing.assert_array_equal(episode.observations[0], first.astype(np.float32))
        for row, action in enumerate(episode.actions):
            obs, reward, terminated, _, _ = env.step(action)
            np.testing.assert_array_equal(episode.observations[row + 1], obs.astype(np.float32))
            assert episode.rewards[row] == np.float32(reward) and episode.terminations[row] == terminated


class Countdown:
    """An environment whose episode number n falls after 37 n mod 100 + 1 steps: 1, 38, 75, 12, ...; limit 80."""

    spec = SimpleNamespace(max_episode_steps=80)

    def reset(self, seed):
        self.number, self.steps = seed - FIRST_SEED, 0
        return np.array([self.number, 0.0]), {}

    @property
    def unwrapped(self):
        return self

    def step(self, action):
        self.steps += 1
        return np.array([self.number, self.steps]), 1.0, self.steps == 37 * self.number % 100 + 1, False, {}


@pytest.mark.parametrize("parallel", [1, 7, 20])
def test_episodes_are_those_of_one_environment_alone(parallel):
    """Whatever runs side by side, no preference for short episodes: each number comes, in order, as long as it is."""
    policy = collect.Policy(Actor(2, 1, 8), {})
    buffers = collect.roll_out([policy], [Countdown() for _ in range(parallel)], 1000, 0, tqdm(disable=True))
    expected, left = [], 1000
    while left > 0:  # (number, steps, fell)
        steps = 37 * len(expected) % 100 + 1
        expected.append((len(expected), min(steps, 80, left), steps <= min(80, left)))
        left -= expected[-1][1]
    assert [(buffer.observations[0, 0], len(buffer), buffer.terminations[-1]) for buffer in buffers] == expected
    assert all(buffer.terminations[-1] != buffer.truncations[-1] for buffer in buffers)


def test_replay_takes_equal_shares_in_training_order(made_up):
    collect.main(args_for(made_up, "local/hopper/medium-replay-v0", 200))
    episodes = read("local/hopper/medium-replay-v0")
    cuts = np.flatnonzero([episode.truncations[-1] for episode in episodes])
    ends = np.cumsum([len(episode) for episode in episodes])
    assert list(ends[cuts]) == [66, 133, 200]  # 200 i // 3
    policies = minari.load_dataset("local/hopper/medium-replay-v0").storage.metadata["policies"]
    assert [policy["training_step"] for policy in policies] == [3000, 4000, 5000]


def test_same_seed_same_arrays_on_any_number_of_threads(made_up, monkeypatch):
    collect.main(args_for(made_up))
    first = read()
    flags = ("--env-id", HOPPER, "--steps", 300, "--behavior-dir", made_up / "behavior")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(made_up / "other"))
    process = start("collect.py", *flags, cwd=made_up, threads=2)
    output = process.communicate()
    assert process.returncode == 0, output
    assert_same(first, read())
    collect.main(args_for(made_up, seed=1, force=True))
    assert not np.array_equal(first[0].observations[0], read()[0].observations[0])


# ---- Whole or not at all, once


def test_killed_in_the_middle_of_writing(made_up):
    flags = ("--env-id", HOPPER, "--steps", 6000, "--behavior-dir", made_up / "behavior")
    work = made_up / "minari" / ".collect" / "local-hopper-medium-v0"
    process = start("collect.py", *flags, cwd=made_up)
    wait_for((work / HOPPER / "data" / "main_data.hdf5").exists, process)
    process.kill()  # SIGKILL
    process.communicate()
    assert work.exists() and not (made_up / "minari" / HOPPER).exists()
    assert minari.list_local_datasets() == {}
    collect.main(args_for(made_up))
    assert sum(len(episode) for episode in read()) == 300
    assert not work.exists()


def test_a_failure_leaves_nothing(made_up, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*MINARI_DATASETS_PATH"):
        collect.main(args_for(made_up))
    assert [path.name for path in (made_up / "minari").rglob("*")] == [".collect", "local-hopper-medium-v0.lock"]


def test_two_processes_at_once(made_up):
    flags = ("--env-id", HOPPER, "--steps", 300, "--behavior-dir", made_up / "behavior")
    (made_up / "minari" / ".collect").mkdir()
    with FileLock(made_up / "minari" / ".collect" / "local-hopper-medium-v0.lock"):
        processes = [start("collect.py", *flags, cwd=made_up) for _ in range(2)]
        for process in processes:
            assert "waiting for it" in process.stdout.readline()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted("already in" in out for out, _ in outputs) == [False, True]  # one made it, the other saw it
    assert sum(len(episode) for episode in read()) == 300


def test_another_recipe_is_refused_and_forced(made_up, capsys):
    collect.main(args_for(made_up))
    first = read()
    collect.main(args_for(made_up))
    assert "already in" in capsys.readouterr().out
    with pytest.raises(UserError, match="has steps=300, not 200 and has seed=0, not 7; --force replaces it"):
        collect.main(args_for(made_up, steps=200, seed=7))
    assert_same(first, read())
    collect.main(args_for(made_up, steps=200, seed=7, force=True))
    assert sum(len(episode) for episode in read()) == 200
    (made_up / "minari" / HOPPER / "data" / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        collect.main(args_for(made_up))


# ---- Bad input


def test_changed_policy_is_named(made_up):
    path = made_up / "behavior" / "hopper-medium.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"hopper-medium.safetensors: sha256 is \w{64}, but .* restore both"):
        collect.main(args_for(made_up))
    path.unlink()
    with pytest.raises(UserError, match=r"hopper-medium.safetensors: sha256 is missing"):
        collect.main(args_for(made_up))
    (made_up / "behavior" / "SHA256SUMS").write_text("0123\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        collect.main(args_for(made_up))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"env_id": "local/hopper/medum-v0"}, "choose one of local/hopper/random-v0"),
        ({"env_id": "local/walker2d/medium-v0"}, "needs the policy walker2d-medium, which is not in"),
        ({"env_id": "local/hopper/medium-replay-v0", "steps": 2}, "--steps 2 is less than one per policy; give 3"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_bad_flags(made_up, flags, message):
    with pytest.raises(UserError, match=message):
        collect.main(args_for(made_up, **flags))


def test_exit_code_and_one_line(made_up):
    process = start("collect.py", "--env-id", "local/walker2d/medium-v0", "--behavior-dir", "behavior", cwd=made_up)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("error: local/walker2d/medium-v0 needs") and errors.count("\n") == 1


# ---- Training and export


def train(folder: Path, checkpoint_every: float) -> None:
    args = train_behavior.Args(total_steps=600, snapshot_every=200, learning_starts=100, eval_episodes=2, batch_size=8)
    args.actor_width = args.critic_width = 8
    args.folder, args.checkpoint_every = folder, checkpoint_every
    tell(lambda: train_behavior.main(args))


@pytest.mark.parametrize(
    ("number", "code", "checkpoint_every"), [(signal.SIGKILL, -signal.SIGKILL, 0), (signal.SIGTERM, 75, 1000)]
)
def test_an_interrupted_training_ends_with_the_same_policies(tmp_path, number, code, checkpoint_every):
    """Killed, or stopped in mid-episode with a checkpoint of its own: the same files to the byte."""

    def start(name: str, log: str):
        return child(train, tmp_path / name, checkpoint_every, log=tmp_path / log)

    whole, stopped = start("whole", "whole.log"), start("stopped", "stopped.log")
    while not (tmp_path / "stopped" / "hopper" / "snapshots" / "0000200.safetensors").exists():
        time.sleep(0.001)
    os.kill(stopped.pid, number)
    stopped.join()
    assert stopped.exitcode == code, (tmp_path / "stopped.log").read_text()
    again = start("stopped", "again.log")
    again.join(), whole.join()
    assert again.exitcode == whole.exitcode == 0 and "resumed" in (tmp_path / "again.log").read_text()
    for name in ("snapshots.csv", *(f"snapshots/{step:07d}.safetensors" for step in (200, 400, 600))):
        one, other = (tmp_path / run / "hopper" / name for run in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name


def write_run(folder: Path, returns: list[float]) -> None:
    """A run whose log claims these returns at steps 5000, 10000, ..."""
    (folder / "hopper" / "snapshots").mkdir(parents=True)
    with open(folder / "hopper" / "snapshots.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "mean_return", "std_return"])
        for i, mean in enumerate(returns, start=1):
            writer.writerow([5000 * i, mean, 0.0])
            torch.manual_seed(i)
            actor = Actor(*SIZES["hopper"], 8)
            save_file(actor.state_dict(), folder / "hopper" / "snapshots" / f"{5000 * i:07d}.safetensors")


def test_export(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    returns = [10.0, 300.0, 800.0, 1300.0, 1500.0, 2000.0, 3300.0]
    write_run(folders / "run", returns)
    real = {0: 20.0} | {5000 * i: mean for i, mean in enumerate(returns, start=1)}
    measure = train_behavior._measure

    def measured(args, evaluator, folder, step):  # its weights, but the return that the log claims
        candidate = measure(args, evaluator, folder, step)
        return Candidate(step, candidate.weights, real[step], candidate.std, real[step])

    monkeypatch.setattr(train_behavior, "_measure", measured)
    args = train_behavior.Args(export=True, folder=folders / "run", behavior_dir=folders / "behavior", seed=5)
    args.actor_width, args.export_episodes, args.replay_snapshots = 8, 1, 3
    train_behavior.main(args)
    facts = {
        path.stem: collect._load_policy(path, train_behavior.read_sums(args.behavior_dir)[path.name]).facts
        for path in args.behavior_dir.glob("*.safetensors")
    }
    # Medium is 1500 at step 25,000: of all, it is closest to D4RL's 1422. Replay is the first, the middle and the last
    # of the snapshots from 5,000 to 25,000.
    steps = {name: fact["training_step"] for name, fact in facts.items()}
    assert steps == {
        "hopper-random": 0,
        "hopper-medium": 25_000,
        "hopper-expert": 35_000,
        "hopper-replay-0": 5_000,
        "hopper-replay-1": 15_000,
        "hopper-replay-2": 25_000,
    }
    torch.manual_seed(5)  # the run's seed: its untrained actor, rounded
    actor = train_behavior.Trainer(args, *SIZES["hopper"]).actor.state_dict()
    for name, weight in load_file(args.behavior_dir / "hopper-random.safetensors").items():
        assert weight.dtype == torch.float16 and torch.equal(weight, actor[name].half())

    real[35_000] = 2999.0  # EXPERT_RETURN is 3000
    content = (args.behavior_dir / "hopper-medium.safetensors").read_bytes()
    train_behavior.main(args)
    assert "no expert: the best policy has 2999" in capsys.readouterr().out
    assert {path.stem for path in args.behavior_dir.glob("*.safetensors")} == set(steps) - {"hopper-expert"}
    assert (args.behavior_dir / "hopper-medium.safetensors").read_bytes() == content  # the same bytes again


def test_medium_prefers_the_spread_of_d4rl():
    returns = ((1422, 1400, 1700), (1450, 300, 1700), (1600, 379, 1900), (1422, 379, 1000))  # mean, std, without noise
    falls_or_walks, hops, far, saved_by_noise = (Candidate(0, {}, *found) for found in returns)
    assert choose_medium([falls_or_walks, hops, far, saved_by_noise], 1422.06, 378.95) is hops
    assert choose_medium([far], 1422.06, 378.95) is far
    assert choose_medium([saved_by_noise], 1422.06, 378.95) is saved_by_noise


def test_export_without_a_run(folders):
    with pytest.raises(UserError, match="lists no snapshot; train first"):
        train_behavior.main(train_behavior.Args(export=True, folder=folders))


# ---- The card


def test_card_states_what_the_data_say(made_up):
    output = made_up / "card"
    output.mkdir()
    card.main(card.Args(steps=200, behavior_dir=made_up / "behavior", output_dir=output))
    text = (output / "README.md").read_text()
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in read()])
    score = 100 * (returns.mean() + 20.272305) / (3234.3 + 20.272305)  # D4RL infos.py
    row = next(line for line in text.splitlines() if line.startswith(f"| `{HOPPER}`"))
    assert f"| {returns.mean():,.0f} ± {returns.std():,.0f} | {score:.1f} | 1,422 ± 379 |" in row
    assert "local/walker2d/medium-v0" in text.split("Not shipped")[1]
    assert (output / "returns.png").read_bytes().startswith(b"\x89PNG")
    policies = json.loads((made_up / "minari" / HOPPER / "data" / "metadata.json").read_text())["policies"]
    assert f"| {policies[0]['training_step'] // 1000}k |" in row
