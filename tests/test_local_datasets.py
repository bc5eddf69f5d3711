"""local_datasets/: collecting, exporting and describing data, mostly with tiny made-up policies."""

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from common import UserError, data
from common.cli import tell
from common.evaluation import make_env
from common.files import sha256_of
from local_datasets import card, collect, train_behavior
from local_datasets.collect import ACTION_STEP, Args, Policy, as_policy, read_policy, write_policy
from local_datasets.train_behavior import NETWORKS, choose_medium, weights_of

import minari
import numpy as np
import pytest
import torch
from torch import nn
from toy import ROOT, child

HOPPER = "local/hopper/medium-v0"
FIRST_SEED = 100_000_000  # roll_out: (100 * (seed + 1) + index of the policy) * 1,000,000 + number of the episode
SIZES = {"hopper": (11, 3), "halfcheetah": (17, 6)}  # obs_dim, action_dim


class Actor(nn.Module):
    """What a shipped file is made of, under the names of stable-baselines3's actor."""

    def __init__(self, obs_dim: int, action_dim: int, width: int = 8):
        super().__init__()
        self.latent_pi = nn.Sequential(nn.Linear(obs_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.mu, self.log_std = nn.Linear(width, action_dim), nn.Linear(width, action_dim)


def untrained(robot: str, step: int, mean: float = 20.0, std: float = 5.0, without_noise: float = 20.0) -> Policy:
    """A policy of width 8 that is said to have these returns."""
    torch.manual_seed(step)
    facts = {"format": 1, "robot": robot, "training_step": step, "training_seed": 0, "episodes": 1}
    facts |= {"mean_return": mean, "std_return": std, "deterministic_mean_return": without_noise}
    return Policy(weights_of(Actor(*SIZES[robot])), facts)


@pytest.fixture
def made_up(folders, monkeypatch):
    """A folder for data sets, with untrained policies beside it; MuJoCo's log goes there too."""
    monkeypatch.chdir(folders)
    behavior = folders / "behavior"
    behavior.mkdir()
    names = [f"hopper-{name}" for name in ("random", "medium", "expert", "replay-0", "replay-1", "replay-2")]
    for step, name in enumerate([*names, "halfcheetah-medium"]):
        write_policy(behavior / f"{name}.safetensors", untrained(name.split("-")[0], 1000 * step))
    collect.write_sums(behavior, {path.name: sha256_of(path) for path in behavior.iterdir()})
    return folders


def args_for(root: Path, env_id: str = HOPPER, steps: int = 300, **more) -> Args:
    return Args(env_id, steps, behavior_dir=root / "behavior", **more)


def make(root: Path) -> None:
    os.chdir(root)
    tell(lambda: collect.main(args_for(root)))


def read(env_id: str = HOPPER) -> list:
    return list(minari.load_dataset(env_id).iterate_episodes())


def sha256(env_id: str = HOPPER) -> str:
    return collect.digest(read(env_id))


# ---- What is collected


def test_names_are_those_that_the_loader_knows():
    assert sorted(collect.ENV_IDS) == sorted(data.LOCAL_NAMES)


def test_steps_marks_and_metadata(made_up):
    collect.main(args_for(made_up))
    episodes = read()
    assert sum(len(episode) for episode in episodes) == 300
    for episode in episodes:  # an untrained Hopper falls long before step 1000; the last one is cut at the budget
        assert episode.terminations[-1] == (episode is not episodes[-1]) and not episode.terminations[:-1].any()
        assert episode.truncations[-1] == (episode is episodes[-1]) and not episode.truncations[:-1].any()
        assert len(episode.observations) == len(episode.actions) + 1
        assert episode.observations.dtype == episode.actions.dtype == episode.rewards.dtype == np.float32
    metadata = collect.stored(made_up / "minari" / HOPPER)
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)  # D4RL infos.py
    assert (metadata["physics"], metadata["steps"], metadata["seed"]) == ("d4rl", 300, 0)
    digest = hashlib.sha256((made_up / "behavior" / "hopper-medium.safetensors").read_bytes()).hexdigest()
    assert [policy["sha256"] for policy in metadata["policies"]] == [digest]
    assert metadata["sha256"] == sha256() and "Hopper-v4" in metadata["eval_env_spec"]


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


def test_the_recorded_policy_is_the_squashed_gaussian_of_its_actor():
    """By hand, in float64, with the numbers of the noise's own stream."""
    obs, noise = np.random.default_rng(0).normal(size=(100, 11)), np.random.default_rng((1, 5)).normal(size=(100, 3))
    actor = Actor(11, 3).half().double()  # as a file holds it
    weights = weights_of(actor)
    with torch.no_grad():
        hidden = actor.latent_pi(torch.from_numpy(obs))
        mean, std = actor.mu(hidden).numpy(), actor.log_std(hidden).clamp(-20, 2).exp().numpy()
    near = {"rtol": 0, "atol": ACTION_STEP}
    found = as_policy(weights, 5, deterministic=True)(obs)
    np.testing.assert_allclose(found, np.tanh(mean), **near)
    assert (found / ACTION_STEP % 1 == 0).all()
    np.testing.assert_allclose(as_policy(weights, 5)(obs), np.tanh(mean + std * noise), **near)


def test_replay_takes_equal_shares_in_training_order(made_up):
    collect.main(args_for(made_up, "local/hopper/medium-replay-v0", 200))
    episodes = read("local/hopper/medium-replay-v0")
    cuts = np.flatnonzero([episode.truncations[-1] for episode in episodes])
    ends = np.cumsum([len(episode) for episode in episodes])
    assert list(ends[cuts]) == [66, 133, 200]  # 200 i // 3
    policies = minari.load_dataset("local/hopper/medium-replay-v0").storage.metadata["policies"]
    assert [policy["training_step"] for policy in policies] == [3000, 4000, 5000]


# Begin of the sha256 of sets of 1,500 steps by shipped policies, on every x86 CPU with AVX2 and FMA, with glibc.
PUBLISHED = {
    "local/hopper/medium-v0": "3def7f1912c26fd4",
    "local/walker2d/medium-replay-v0": "20337c70c1407044",
    "local/halfcheetah/medium-v0": "239b4c4805b8c6e2",
}
# NumPy's code for CPUs without vector units of more than 128 bits.
PLAIN_CPU = {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}


def make_published() -> None:
    for env_id in PUBLISHED:
        collect.main(Args(env_id, 1500))


CPU = Path("/proc/cpuinfo").read_text().split() if platform.libc_ver()[0] == "glibc" else []


@pytest.mark.skipif(not {"avx2", "fma"} <= set(CPU), reason="MuJoCo's sin and cos, the C library's, round otherwise")
@pytest.mark.parametrize("cpu", [PLAIN_CPU, {"OMP_NUM_THREADS": "2"}], ids=["plain", "native, two threads"])
def test_every_cpu_makes_the_published_arrays(folders, cpu):
    code = "import test_local_datasets; test_local_datasets.make_published()"
    env = os.environ | {"PYTHONPATH": str(ROOT)} | cpu
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", env=env, check=True)
    assert {env_id: sha256(env_id)[:16] for env_id in PUBLISHED} == PUBLISHED


def test_a_set_that_is_not_the_published_one_is_told(made_up, monkeypatch, capsys):
    monkeypatch.setattr(Args, "steps", 300)  # the size of the published sets
    collect.main(args_for(made_up))
    found, path = sha256(), made_up / "SHA256SUMS"
    for listed, told in ((found, False), (64 * "0", True)):
        path.write_text(f"{listed}  {HOPPER}\n")
        capsys.readouterr()
        collect.main(args_for(made_up))
        note = f"{HOPPER} is not the published set (sha256 {found[:12]}, {path} has 000000000000)"
        assert (note in capsys.readouterr().out) == told
    shutil.rmtree(made_up / "minari" / HOPPER)
    collect.main(args_for(made_up, steps=299))
    assert "published" not in capsys.readouterr().out  # another size has no published sum


# ---- Whole or not at all, once


def test_what_a_killed_process_left_is_neither_listed_nor_used(made_up):
    work = made_up / "minari" / ".collect" / "local-hopper-medium-v0"
    (work / HOPPER / "data").mkdir(parents=True)
    (work / HOPPER / "data" / "main_data.hdf5").write_bytes(b"half")
    assert minari.list_local_datasets() == {}
    collect.main(args_for(made_up))
    assert sum(len(episode) for episode in read()) == 300 and not work.exists()


def test_a_failure_leaves_nothing(made_up, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*MINARI_DATASETS_PATH"):
        collect.main(args_for(made_up))
    assert [path.name for path in (made_up / "minari").rglob("*")] == [".collect", "local-hopper-medium-v0.lock"]


def test_two_processes_at_once(made_up):
    logs = [made_up / "one", made_up / "other"]
    processes = [child(make, made_up, log=log) for log in logs]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted("already in" in log.read_text() for log in logs) == [False, True]  # one made it, the other saw it
    assert sum(len(episode) for episode in read()) == 300


def test_another_recipe_is_refused(made_up, capsys):
    collect.main(args_for(made_up))
    first = sha256()
    collect.main(args_for(made_up))
    assert "already in" in capsys.readouterr().out
    with pytest.raises(UserError, match="has steps=300, not 200 and has seed=0, not 7; delete it"):
        collect.main(args_for(made_up, steps=200, seed=7))
    assert sha256() == first
    shutil.rmtree(made_up / "minari" / HOPPER)
    collect.main(args_for(made_up, seed=7))
    assert sha256() != first
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


# ---- Training and export


def test_the_library_s_actor_acts_as_the_recorded_policy():
    from stable_baselines3 import SAC

    model = SAC("MlpPolicy", make_env("Hopper-v4", "d4rl"), policy_kwargs={"net_arch": NETWORKS}, buffer_size=1)
    model.actor.half().float()
    obs = np.random.default_rng(0).normal(size=(100, 11)).astype(np.float32)
    theirs = model.predict(obs, deterministic=True)[0]
    np.testing.assert_allclose(as_policy(weights_of(model.actor), 0, True)(obs), theirs, rtol=0, atol=2 * ACTION_STEP)


def test_a_training_that_was_stopped_goes_on(folders, monkeypatch, capsys):
    """With networks and buffer as they were, in a new episode."""
    from stable_baselines3 import SAC

    monkeypatch.chdir(folders)
    measured, signals = train_behavior.measured, [signal.SIGTERM]

    def stopped(policy, evaluator, seed):
        if policy.facts["training_step"] == 200 and signals:
            os.kill(os.getpid(), signals.pop())
        return measured(policy, evaluator, seed)

    monkeypatch.setattr(train_behavior, "measured", stopped)
    args = train_behavior.Args(total_steps=300, snapshot_every=100, eval_episodes=1, folder=folders, seed=3)
    with pytest.raises(SystemExit) as stop:
        tell(lambda: train_behavior.main(args))
    assert stop.value.code == 75 and "stopped by SIGTERM at step 200" in capsys.readouterr().err
    tell(lambda: train_behavior.main(args))
    assert "goes on at step 200" in capsys.readouterr().out
    model = SAC.load(folders / "hopper-3" / "checkpoint.zip")
    model.load_replay_buffer(folders / "hopper-3" / "replay.pkl")
    assert (model.num_timesteps, model.replay_buffer.size()) == (300, 299)  # the signal's own step is not in it
    policies = [read_policy(path) for path in sorted((folders / "hopper-3").glob("*.safetensors"))]
    assert [policy.facts["training_step"] for policy in policies] == [0, 100, 200, 300]
    assert all((policy.facts["robot"], policy.facts["training_seed"]) == ("hopper", 3) for policy in policies)
    first, *_, last = (policy.weights["head.weight"] for policy in policies)
    assert first.shape == (6, 128) and (first != last).any()


def test_export(folders, monkeypatch):
    """From a run whose snapshots claim these returns at steps 0, 5,000, 10,000, ..."""
    args = train_behavior.Args(export=True, folder=folders / "run", behavior_dir=folders / "behavior")
    args.replay_snapshots, args.export_episodes = 3, 1
    with pytest.raises(UserError, match="holds no snapshot; train first"):
        train_behavior.main(args)
    run = args.folder / "hopper-0"
    run.mkdir(parents=True)

    for number, mean in enumerate((20.0, 10.0, 300.0, 800.0, 1300.0, 1500.0, 2000.0, 3300.0)):
        step = 5000 * number
        write_policy(run / f"{step:07d}.safetensors", untrained("hopper", step, mean, 0.0, mean))
    monkeypatch.setattr(train_behavior, "measured", lambda policy, evaluator, seed: policy)  # is what it claims
    train_behavior.main(args)
    sums = collect.read_sums(args.behavior_dir)
    assert set(sums) == {path.name for path in args.behavior_dir.glob("*.safetensors")}
    policies = [collect._load_policy(args.behavior_dir / name, sha) for name, sha in sums.items()]
    # Medium is 1500 at step 25,000: of all, it is closest to D4RL's 1422. Replay is the first, the middle and the last
    # of the snapshots from 5,000 to 25,000.
    replays = {"replay-0": 5000, "replay-1": 15_000, "replay-2": 25_000}
    found = {policy.facts["file"][7:-12]: policy.facts["training_step"] for policy in policies}
    assert found == replays | {"random": 0, "medium": 25_000, "expert": 35_000}


def test_measured_returns_are_those_of_the_shipped_weights(folders, monkeypatch):
    """One episode in which the untrained policy falls: its return is that of collect.py's own loop."""
    monkeypatch.chdir(folders)
    policy = untrained("hopper", 7)
    facts = train_behavior.measured(policy, train_behavior.evaluator_of("hopper", 1), seed=30).facts
    env = make_env("Hopper-v4", "d4rl")
    for name, noise in (("mean_return", True), ("deterministic_mean_return", False)):
        episode = collect.run_episode(as_policy(policy.weights, 7, not noise), env, 30, 1000)
        assert facts[name] == pytest.approx(episode.rewards.sum(dtype=float), abs=0.06)  # told to one digit
    assert facts["episodes"] == 1 and facts["std_return"] == 0


def test_medium_prefers_the_spread_of_d4rl():
    returns = ((1422, 1400, 1700), (1450, 300, 1700), (1600, 379, 1900), (1422, 379, 1000))  # mean, std, without noise
    falls_or_walks, hops, far, saved_by_noise = (untrained("hopper", 0, *found) for found in returns)
    assert choose_medium([falls_or_walks, hops, far, saved_by_noise], 1422.06, 378.95) is hops
    assert choose_medium([far], 1422.06, 378.95) is far
    assert choose_medium([saved_by_noise], 1422.06, 378.95) is saved_by_noise


# ---- The card


def test_card_states_what_the_data_say(made_up):
    shutil.copy(ROOT / "local_datasets" / "README.md", made_up)
    card.main(made_up, made_up / "behavior", 200)
    text = (made_up / "README.md").read_text()
    returns = np.array([episode.rewards.sum(dtype=np.float64) for episode in read()])
    score = 100 * (returns.mean() + 20.272305) / (3234.3 + 20.272305)  # D4RL infos.py
    row = next(line for line in text.splitlines() if line.startswith(f"| `{HOPPER}`"))
    assert f"| {returns.mean():,.0f} ± {returns.std():,.0f} | {score:.1f} | 1,422 ± 379 |" in row and "| 1k |" in row
    assert "walker2d/medium-v0`" not in text  # whose policies are not in this folder
    assert (made_up / "returns.png").read_bytes().startswith(b"\x89PNG")
    assert collect.read_sums(made_up)[HOPPER] == sha256()
