"""common/export.py: what is exported reads back to the bit, is whole or not there, and says where it comes from."""

import hashlib
import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import h5py
import minari
import numpy as np
import pytest
import torch
from toy import TOY, folders_below, hopper_file, linear_dataset, refusal

import common.export
import dawm_iql
import dawm_td3bc as script
import ssorl_baseline
from common import UserError
from common.data import load_dataset
from common.evaluation import Evaluator, Stepper
from common.export import audit, check_export, export_transitions, rollout_lengths
from common.run import Run, Signals, Stopped

ID = "dawm/hopper-toy-v0"


def rollouts(dataset, count, horizon, falls=0.2, seed=0) -> torch.Tensor:
    """Rows as `synthesize` makes them: from real states, random ones after that, nothing behind a fall."""
    rng = np.random.default_rng(seed)
    obs = rng.normal(size=(count, horizon + 2, dataset.obs.shape[1]))
    obs[:, 0] = dataset.obs[rng.integers(len(dataset.obs), size=count)]
    action = rng.uniform(-1, 1, (count, horizon + 1, dataset.action.shape[1]))
    reward = rng.normal(size=(count, horizon + 1, 1))
    terminated = rng.random((count, horizon + 1, 1)) < falls / (horizon + 1)
    rows = np.concatenate([obs[:, :-1], action, reward, obs[:, 1:], terminated], -1).astype(np.float32)
    return torch.as_tensor(rows[(np.cumsum(terminated[..., 0], 1) - terminated[..., 0]) == 0])


@pytest.fixture
def toy(folders):
    """A described run that asks for both forms, its real data, and an evaluator."""
    args = script.Args(env_id="hopper-medium-v2", data_path=folders / "data.hdf5", device="cpu", physics="d4rl")
    args.run_dir, args.stage_dir = folders / "runs", folders / "stages"
    args.export_hdf5, args.export_minari = folders / "out.hdf5", ID
    dataset = load_dataset(args.env_id, hopper_file(args.data_path))

    def new(**changed):
        vars(args).update(changed)
        run = Run(args)
        run.describe(dataset.facts())
        run.fingerprints["synthesis"] = "0" * 64
        return run

    evaluator = Evaluator("Hopper-v4", "d4rl", 1)
    return SimpleNamespace(args=args, dataset=dataset, evaluator=evaluator, new=new, folder=folders)


def export(toy, rows, horizon, **changed):
    run = toy.new(**changed)
    export_transitions(run, rows, horizon + 1, toy.dataset, toy.evaluator, Stepper, "DAWM")
    return run


def files(folder):
    """What an export has left below the folder, hidden things included."""
    made = [folder / "out.hdf5", folder / "minari" / ID]
    return [x for x in made if x.exists()] + [*folder.glob(".export*"), *(folder / "minari").glob(".export*")]


def columns(rows: torch.Tensor) -> dict[str, np.ndarray]:
    obs, action, reward, next_obs, terminated = np.split(rows.numpy(), [11, 14, 15, 26], axis=1)
    return {"obs": obs, "action": action, "reward": reward[:, 0], "next_obs": next_obs, "terminated": terminated[:, 0]}


# ---- Rollouts


@pytest.mark.parametrize("horizon", [1, 7])
@pytest.mark.parametrize("part", [5, 1000])
def test_rollouts_are_those_that_were_made(monkeypatch, horizon, part):
    """Lengths by a plain loop over falls and H+1 rows, with rollouts that happen to begin where another ends."""
    monkeypatch.setattr(common.export, "PART", part)
    rows = rollouts(linear_dataset(), 60, horizon)
    expected, length = [], 0
    for row in rows:
        length += 1
        if row[-1] or length == horizon + 1:
            expected.append(length)
            length = 0
    assert rollout_lengths(rows, 2, horizon + 1).tolist() == expected and len(expected) == 60 and min(expected) > 0
    ends = np.cumsum(expected)
    for end in ends[:-1][::3]:
        rows[end, :2] = rows[end - 1, -3:-1]  # chained by chance
    assert rollout_lengths(rows, 2, horizon + 1).tolist() == expected


# ---- Read back


@pytest.mark.parametrize("horizon", [1, 7])
def test_both_forms_read_back_to_the_bit(toy, horizon):
    rows = rollouts(toy.dataset, 80, horizon)
    rows[0, 0], rows[1, 0] = -0.0, 1e-40  # the sign of zero and subnormal numbers too
    rows[horizon + 1 :: 5, 14] = -0.0
    lengths = rollout_lengths(rows, 11, horizon + 1)
    run = export(toy, rows, horizon)
    expected = columns(rows)
    assert 0 < expected["terminated"].sum() < 80
    for dataset in (load_dataset("hopper-medium-v2", toy.args.export_hdf5), load_dataset(ID)):
        assert dataset.lengths.tolist() == lengths.tolist() and dataset.complete.all()
        assert dataset.simulator == "Hopper-v4" and dataset.physics == "d4rl"
        for name, array in expected.items():
            found = getattr(dataset, name).astype(np.float32)
            assert found.tobytes() == array.tobytes(), name
    with h5py.File(toy.args.export_hdf5) as file:
        ends = np.isin(np.arange(len(rows)), np.cumsum(lengths) - 1)
        assert ((file["terminals"][:] | file["timeouts"][:]) == ends).all() and file["timeouts"].dtype == bool
        assert not (file["terminals"][:] & file["timeouts"][:]).any() and file["observations"].dtype == np.float32
    # The closing table names both.
    assert toy.args.export_hdf5.name in run.stages["export hdf5"][1] and ID in run.stages["export minari"][1]
    sha256 = hashlib.sha256(toy.args.export_hdf5.read_bytes()).hexdigest()
    assert sha256 in run.stages["export hdf5"][1]
    assert len(files(toy.folder)) == 2  # and nothing hidden


def test_any_program_can_read_and_learn_from_the_minari_form(toy):
    """Minari alone: listed, recovered simulator, and a linear policy cloned from sampled episodes."""
    rows = rollouts(toy.dataset, 100, 1)
    rows[:, 11:14] = (rows[:, :3] * 0.3).clamp(-1, 1)
    export(toy, rows, 1, export_hdf5=None)
    assert ID in minari.list_local_datasets()
    stored = minari.load_dataset(ID)
    assert stored.total_episodes == 100 and stored.total_steps == len(rows)
    told = list(stored.storage.get_episode_metadata(range(100)))
    assert [x["id"] for x in told] == [*range(100)] and sum(x["total_steps"] for x in told) == len(rows)
    assert told[0]["id"].shape == ()
    assert stored.recover_environment().spec.id == "Hopper-v4"
    assert "not recorded" in stored.storage.metadata["description"]
    policy = torch.nn.Linear(11, 3)
    optimizer, losses = torch.optim.Adam(policy.parameters(), 0.02), []
    for _ in range(60):
        episodes = stored.sample_episodes(8)
        obs = torch.as_tensor(np.concatenate([e.observations[:-1] for e in episodes]))
        action = torch.as_tensor(np.concatenate([e.actions for e in episodes]))
        loss = (policy(obs) - action).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    assert sum(len(e.rewards) for e in stored.iterate_episodes()) == len(rows)


def test_it_says_where_it_comes_from(toy):
    rows = rollouts(toy.dataset, 50, 1)
    run = export(toy, rows, 1)
    with h5py.File(toy.args.export_hdf5) as file:
        found = json.loads(file["metadata/provenance"][()])
        assert file["metadata/description"][()].decode() == found["description"]
    metadata = minari.load_dataset(ID).storage.metadata
    assert metadata["provenance"] == found and metadata["physics"] == "d4rl"
    assert found["description"] == "Synthetic transitions made by DAWM from hopper-medium-v2, not recorded ones."
    told = json.loads((run.folder / "args.json").read_text())
    assert all(found[key] == told[key] for key in ("args", "data", "versions", "git", "code"))
    assert found["data"]["fingerprint"] == toy.dataset.fingerprint and found["data"]["source"] == "D4RL file"
    assert found["stages"]["synthesis"]["sha256"] == "0" * 64
    falls = int(rows[:, -1].sum())
    counts = {"transitions": len(rows), "rollouts": 50, "longest_rollout": 2, "terminated": falls, "cut": 50 - falls}
    assert found["counts"] == counts
    assert found["audit"]["rows"] == len(rows) and found["date"][:2] == "20"
    assert str(toy.folder) not in json.dumps({k: v for k, v in found.items() if k not in ("args", "data")})


# ---- Audit


def test_the_audit_of_true_and_of_shifted_transitions(toy):
    """The simulator's own transitions have no error; shifted by two standard deviations, they have two."""
    real = script.real_transitions(toy.dataset, torch.device("cpu"))
    simulate = Stepper("Hopper-v4", "d4rl", threads=1)
    found = audit(real, toy.dataset.lengths, toy.dataset, simulate)
    # Recorded in float32, so that a contact may come a step earlier: rounding, no more.
    assert found["state_error"]["all steps"]["median"] < 1e-3 and found["reward_error"]["all steps"]["90%"] < 1e-2
    assert found["termination"]["agreement"] == 1 and 0 <= found["uncheckable_share"] < 0.5
    real[:, 15:26] += 2 * torch.as_tensor(toy.dataset.obs.std(0))
    real[:, 14] -= 3 * toy.dataset.reward.std()
    real[:, 26] = 1 - real[:, 26]
    found = audit(real, toy.dataset.lengths, toy.dataset, simulate)
    assert found["state_error"]["first step"]["median"] == pytest.approx(2, abs=0.01)
    assert found["state_error"]["all steps"]["90%"] == pytest.approx(2, abs=0.01)
    assert found["reward_error"]["all steps"]["median"] == pytest.approx(3, abs=0.01)
    assert found["termination"]["agreement"] == 0 and found["termination"]["both"] == 0


def test_the_audit_draws_evenly_and_at_most_so_many(toy, monkeypatch):
    monkeypatch.setattr(common.export, "AUDITED", 100)
    rows, seen = rollouts(toy.dataset, 400, 7, falls=0), []
    rows[:, 0] = torch.arange(3200)

    def simulate(obs, action):
        seen.append(obs)
        return np.zeros_like(obs), np.zeros(len(obs)), np.zeros(len(obs), bool)

    simulate.checkable = lambda obs: np.arange(len(obs)) % 4 > 0
    found = audit(rows, np.full(400, 8), toy.dataset, simulate)
    assert found["rows"] == 100 and found["uncheckable_share"] == 0.25
    place = seen[0][:, 0].astype(int)
    assert (place // 32).tolist() == list(range(100)) and len({*(place % 8)}) == 8


def test_without_a_state_to_set_there_is_no_audit(toy):
    def none(*_):
        return Stepper("Ant-v4", "stock")

    run = toy.new(export_minari=None)
    export_transitions(run, rollouts(toy.dataset, 5, 1), 2, toy.dataset, toy.evaluator, none, "DAWM")
    with h5py.File(toy.args.export_hdf5) as file:
        audited = json.loads(file["metadata/provenance"][()])["audit"]
    assert audited.startswith("not available: Ant-v4 has no state that can be set")


# ---- Refused before anything is made


def test_refusals(folders, capsys, monkeypatch):
    monkeypatch.setattr(script, "load_dataset", lambda *_: pytest.fail("it was refused too late"))
    (folders / "there.hdf5").write_text("mine")
    (folders / "minari" / "there" / "it-v0" / "data").mkdir(parents=True)
    for *arguments, words in [
        ("--export-hdf5", folders / "there.hdf5", "there.hdf5 exists and is never overwritten; delete it, or"),
        ("--export-hdf5", folders / "no" / "such.hdf5", "no is no folder; make it, or give another path"),
        ("--export-hdf5", folders, "exists and is never overwritten"),
        ("--export-hdf5", "/proc/some.hdf5", "cannot write in /proc"),
        ("--export-minari", "there/it-v0", "it-v0 exists and is never overwritten; delete it, or give another"),
        ("--export-minari", "there/it-v0/deeper-v0", "lies inside the data set"),
        ("--export-minari", "local/hopper/medium-v0", "local/ is for recorded data; give another one"),
        ("--export-minari", "mujoco/hopper/medium-v0", "mujoco/ is for recorded data"),
        ("--export-minari", "../out-v0", "is no Minari id; give NAMESPACE/NAME-vN"),
        ("--synthetic-fraction=0", "--export-hdf5=x.hdf5", "--synthetic-fraction 0 synthesises nothing"),
        ("--synthetic-fraction=0", "--export-minari=dawm/x-v0", "--synthetic-fraction 0 synthesises nothing"),
        ("--synthesis=online", "--export-hdf5=x.hdf5", "--synthesis online keeps no set"),
    ]:
        assert words in refusal(script, map(str, arguments), folders, capsys)
    for module in (dawm_iql, ssorl_baseline):
        monkeypatch.setattr(module, "load_dataset", lambda *_: pytest.fail("it was refused too late"))
        arguments = "--export-hdf5", str(folders / "there.hdf5")
        assert "never overwritten" in refusal(module, arguments, folders, capsys)
    assert (folders / "there.hdf5").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["hopper-v0", "dawm/hopper", "../x-v0", "dawm/../x-v0", "/dawm/x-v0", "d/x-v0", "dawm/x y-v0", "dawm/x-v"]
)
def test_ids_that_are_none(folders, name):
    with pytest.raises(UserError, match="is no Minari id"):
        check_export(SimpleNamespace(export_hdf5=None, export_minari=name))


def test_ids_that_are_taken_are_those_that_minari_takes(folders):
    for name in ("dawm/x-v0", "dawm/hopper/medium-v12", "da/a_b-c-v1"):
        check_export(SimpleNamespace(export_hdf5=None, export_minari=name))
        assert minari.dataset.minari_dataset.parse_dataset_id(name)[2] is not None


# ---- Whole or not there


def test_a_killed_export_leaves_no_target_and_is_made_again(toy, monkeypatch):
    rows = rollouts(toy.dataset, 50, 1)
    for form, half in (("write_hdf5", {"export_minari": None}), ("write_minari", {"export_hdf5": None})):
        pid = os.fork()
        if not pid:
            monkeypatch.setattr(common.export, "_sync", lambda path: os.kill(os.getpid(), signal.SIGKILL))
            export(toy, rows, 1, **half)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        (left,) = files(toy.folder)
        assert left.name.startswith(".export") and left.is_dir(), form
        export(toy, rows, 1, **{"export_hdf5": toy.folder / "out.hdf5", "export_minari": ID} | half)
        (made,) = files(toy.folder)
        assert not made.name.startswith("."), form
        toy.args.export_hdf5, toy.args.export_minari = toy.folder / "out.hdf5", ID
        if form == "write_hdf5":
            made.unlink()


def test_a_signal_leaves_nothing(toy, monkeypatch):
    monkeypatch.setattr(Signals, "received", "SIGTERM")
    rows = rollouts(toy.dataset, 50, 1)
    for half in ({"export_minari": None}, {"export_minari": ID, "export_hdf5": None}):
        with pytest.raises(Stopped, match="in stage export"):
            export(toy, rows, 1, **half)
    assert files(toy.folder) == []


def test_a_full_disk_is_told_and_the_run_goes_on(toy, capsys):
    """Files may have 100 kB: both writers fail half-way, in HDF5 itself."""
    rows = rollouts(toy.dataset, 2000, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = toy.new()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        export_transitions(run, rows, 2, toy.dataset, toy.evaluator, Stepper, "DAWM")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    out = capsys.readouterr().out
    assert out.count("NOT written") == 2 and "Traceback" not in out
    assert "NOT written" in run.stages["export hdf5"][1] and files(toy.folder) == []


def test_too_little_space_is_known_before(toy, monkeypatch):
    monkeypatch.setattr(common.export.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    run = export(toy, rollouts(toy.dataset, 50, 1), 1, checkpoint_every=0)
    for name in ("export hdf5", "export minari"):
        assert "NOT written" in run.stages[name][1] and "MiB free" in run.stages[name][1]
    assert files(toy.folder) == []


def test_what_comes_into_being_meanwhile_is_not_overwritten(toy, monkeypatch):
    write, rows = common.export.write_hdf5, rollouts(toy.dataset, 5, 1)

    def slow(*arguments):
        write(*arguments)
        toy.args.export_hdf5.write_text("mine")

    monkeypatch.setattr(common.export, "write_hdf5", slow)
    run = export(toy, rows, 1, export_minari=None)
    assert "never overwritten" in run.stages["export hdf5"][1] and toy.args.export_hdf5.read_text() == "mine"
    assert len(files(toy.folder)) == 1


# ---- Whole runs


def run_here(module, arguments, monkeypatch):
    """A script's command line in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.run_script(module.main, module.Args, module.LAPTOP)


def test_export_and_train_on_it(folders, monkeypatch, capsys):
    """The command line with both flags, killed in the agent; once more; then the controls on what was exported."""
    data = hopper_file(folders / "data.hdf5")
    source = ("--env-id", "hopper-medium-v2", "--data-path", data)
    shared = (*folders_below(folders), *TOY)
    arguments = (*source, *shared, "--export-hdf5", folders / "out.hdf5", "--export-minari", ID)
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(script, "train_agent", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run_here(script, arguments, monkeypatch)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and len(files(folders)) == 2
    content = (folders / "out.hdf5").read_bytes()
    run_here(script, arguments, monkeypatch)  # goes on, and finds its export
    assert capsys.readouterr().out.count("already in") == 4 and (folders / "out.hdf5").read_bytes() == content
    (summary,) = folders.glob("runs/*/summary.txt")
    assert hashlib.sha256(content).hexdigest() in summary.read_text()
    with pytest.raises(SystemExit):  # now it has finished
        run_here(script, arguments, monkeypatch)
    assert "exists and is never overwritten" in capsys.readouterr().err
    for source in (("--env-id", "hopper-medium-v2", "--data-path", folders / "out.hdf5"), ("--env-id", ID)):
        run_here(script, (*source, *shared, "--synthetic-fraction", 0), monkeypatch)
        told = capsys.readouterr().out
        assert "simulator        Hopper-v4, physics d4rl" in told and "normalized score" in told
    assert load_dataset(ID).fingerprint == load_dataset("hopper-medium-v2", folders / "out.hdf5").fingerprint


def test_trajectories_completed_by_ssorl(folders, monkeypatch):
    """Exported are the recorded states and rewards, in their episodes, with the actions that the agent learns from."""
    data = hopper_file(folders / "data.hdf5")
    arguments = ("--env-id", "hopper-medium-v2", "--data-path", data, *folders_below(folders), "--laptop")
    arguments += (*"--idm-steps 5 --idm-width 16 --agent-updates 2 --eval-every 2 --eval-episodes 1".split(),)
    arguments += ("--traj-filter", "none", "--label-fraction", 0.3, "--export-hdf5", folders / "out.hdf5")
    run_here(ssorl_baseline, arguments, monkeypatch)
    real, made = (load_dataset("hopper-medium-v2", folders / name) for name in ("data.hdf5", "out.hdf5"))
    assert real.lengths.tolist() == made.lengths.tolist() and np.array_equal(real.next_obs, made.next_obs)
    assert np.array_equal(real.reward, made.reward) and np.array_equal(real.terminated, made.terminated)
    changed = (real.action != made.action).any(1)
    assert 0.5 < changed.mean() < 0.9  # seven tenths of the trajectories
