"""experiments/audit.py: the instrument against known errors, known actions, known distributions; and its command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_benchmarks import load
from toy import ROOT, TOY_AGENT, TOY_IDM, TOY_WORLD_MODEL, hopper_command, linear_dataset
from tqdm import tqdm

import dawm_td3bc
from common import UserError
from common.evaluation import Stepper, make_env

audit = load("experiments/audit.py")
BAR = tqdm(disable=True)


def played(robot: str, physics: str, count: int = 300):
    """Random play as Rows, observations rounded to float32 as a data set holds them."""
    env, rng, rows = make_env(robot, physics), np.random.default_rng(0), []
    obs, _ = env.reset(seed=0)
    while len(rows) < count:
        action = rng.uniform(-1, 1, env.action_space.shape)
        next_obs, reward, terminated, _, _ = env.step(action.astype(np.float32))
        rows.append((obs, action, reward, next_obs, terminated, 0))
        obs = env.reset()[0] if terminated else next_obs
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return audit.Rows(*(c.astype(np.float32).astype(float) if c.dtype == float else c for c in columns))


def units_of(rows):
    return audit.Units(rows.obs.std(0) + 1e-6, rows.reward.std() + 1e-6)


# ---- The simulator


@pytest.mark.parametrize("robot, limit", [("Hopper-v4", 1e-5), ("Walker2d-v4", 1e-5), ("HalfCheetah-v4", 1e-4)])
def test_real_rows_have_no_error_under_their_physics_and_a_visible_one_under_the_other(robot, limit):
    rows = played(robot, "d4rl")
    found = audit.check(Stepper(robot, "d4rl"), rows, units_of(rows), BAR)
    seen = found["checkable"]
    assert seen.sum() > 50 and np.abs(found["error"][seen]).max() < limit
    assert np.abs(found["reward_error"][seen]).max() < limit and (found["fell"] == rows.terminated)[seen].all()
    wrong = audit.check(Stepper(robot, "stock"), rows, units_of(rows), BAR)
    assert np.median(np.abs(wrong["error"][seen]).max(1)) > 100 * limit


def test_known_errors_are_told_in_standard_deviations():
    rows = played("Hopper-v4", "d4rl", 100)
    units = units_of(rows)
    rows.next_obs = rows.next_obs + 0.5 * units.obs  # half a standard deviation in every dimension
    rows.reward = rows.reward - 2 * units.reward
    rows.terminated = ~rows.terminated
    found = audit.check(Stepper("Hopper-v4", "d4rl"), rows, units, BAR)
    told = audit.summary(rows, found, np.ones(100, bool), audit.NAMES["hopper"])
    assert told["state"]["median"] == pytest.approx(0.5, abs=1e-5)
    assert told["state_dimensions"]["w_foot"]["99"] == pytest.approx(0.5, abs=1e-5)
    assert told["reward"]["max"] == pytest.approx(2, abs=1e-5) and told["termination_agrees"] == 0
    assert told["falls"]["both"] == 0 and told["rows"] == 100
    assert told["uncheckable"] == pytest.approx((np.abs(rows.obs[:, 5:]) >= 10).any(1).mean())


def test_the_explaining_action_is_found_from_a_wrong_start():
    rows = played("Hopper-v4", "d4rl", 200)
    stepper = Stepper("Hopper-v4", "d4rl")
    rows = rows[stepper.checkable(rows.obs)]
    truth, units = rows.action, units_of(rows)
    rows.action = (truth + np.random.default_rng(1).normal(0, 0.1, truth.shape)).clip(-1, 1)
    action, left, caused = audit.explaining_action(stepper, rows, units, BAR)
    own = np.sqrt(np.square(audit.check(stepper, rows, units, BAR)["error"]).mean(1))
    assert np.median(caused / own) == pytest.approx(1, abs=1e-3)  # all of the error is the action's
    assert np.median(np.abs(action - truth)) < 1e-4 < 0.05 < np.median(np.abs(rows.action - truth))
    assert np.median(left) < 1e-4 and (np.abs(action) <= 1).all()
    rows.next_obs = rows.next_obs + units.obs  # no action does that
    assert np.median(audit.explaining_action(stepper, rows, units, BAR)[1]) > 0.3


def test_rounding_of_the_stored_state_is_told_from_an_error():
    """A simulator that jumps at 1: a row stored as 1, really a little above, is exact within float32; an error not."""

    def jump(obs, action):
        return np.where(obs >= 1, obs + 0.5, obs), None, None

    above = 1 + 1e-9
    stored = np.float32([[above], [0.2], [0.3]]).astype(float)
    rows = SimpleNamespace(obs=stored, action=np.zeros((3, 1)), next_obs=np.array([[1.0], [0.2], [0.4]]))
    checked = {"error": rows.next_obs - jump(stored, None)[0], "checkable": np.ones(3, bool)}
    found = audit.exactness(jump, rows, checked, audit.Units(np.ones(1), 1.0))
    assert found == {"limit": 1e-5, "above": 2, "tried": 2, "rounding": 1}


def test_contacts_are_those_of_the_environment():
    env, stepper = make_env("Hopper-v4", "d4rl").unwrapped, Stepper("Hopper-v4", "d4rl")
    obs, counts = [env.reset(seed=0)[0]], []
    for _ in range(40):
        obs.append(env.step(np.array([0.5, 0.2, 0.0]))[0])
        mujoco.mj_forward(env.model, env.data)
        counts.append(env.data.ncon)
    assert audit.contacts(stepper, np.array(obs[1:])).tolist() == counts and len(set(counts)) > 1
    rows = SimpleNamespace(obs=np.array(obs[:-1]))
    checked = {"next_obs": np.array(obs[1:]), "error": np.ones((40, 11))}
    found = audit.by_contact(stepper, rows, checked, np.arange(40))
    first = audit.contacts(stepper, np.array(obs[:1])).tolist()
    assert found["share"] == pytest.approx(np.mean(np.diff([*first, *counts]) != 0))
    assert found["begins or ends"]["median"] == 1


def test_steps_of_rollouts_of_unequal_length():
    """Rollouts of 3 steps, one cut by a fall, and one that begins where another happened to end."""
    rows = torch.tensor(
        [
            [0.0, 9, 1, 1, 0], [1, 9, 1, 2, 0], [2, 9, 1, 3, 0],  # 0 1 2
            [3, 9, 1, 4, 0], [4, 9, 1, 5, 1],  # begins where the last one ended: its length is full; then a fall
            [5, 9, 1, 6, 0], [6, 9, 1, 7, 0], [7, 9, 1, 8, 0],
            [0, 9, 1, 1, 0],
        ]
    )  # fmt: skip
    assert audit.rollout_step(rows.numpy(), 1, horizon=2).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]


# ---- The data


def test_distance_of_distributions_by_hand():
    a, b = np.arange(100.0)[:, None], np.arange(25.0, 125)[:, None]
    assert audit.kolmogorov_smirnov(a, b) == pytest.approx(0.25) and audit.kolmogorov_smirnov(a, a) == 0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 2))
    rows = SimpleNamespace(obs=x[:, :1], action=x[:, 1:], reward=x[:, 0], next_obs=x[:, 1:])
    other = SimpleNamespace(obs=x[:, :1], action=-x[:, :1], reward=x[:, 0], next_obs=x[:, 1:])
    same = audit.likeness(rows, rows, 1)
    assert (same["marginals"], same["correlations"]) == pytest.approx((1, 1)) and same["distance_obs"] == [0]
    # Columns s, a, r, s' with r = s and s' = a: of six correlations, those of (s, a), (a, r) go from 0 to -1, (a, s')
    # from 1 to 0, so they lose 1 / 2 each.
    assert audit.likeness(rows, other, 1)["correlations"] == pytest.approx(1 - 3 * 0.5 / 6, abs=0.01)


def test_changes_of_state_beside_those_of_real_neighbours():
    data = linear_dataset(episodes=200)
    noise = np.random.default_rng(0).normal(0, 0.05, data.next_obs.shape)
    real = audit.real_rows(data, 6000)
    real.next_obs = real.next_obs + noise
    units = audit.Units(real.obs.std(0), 1.0)
    assert 0.6 < np.median(audit.neighbour_distance(real[:300], real, units)) < 1.3
    real_distance = audit.neighbour_distance(real[:300], real, units)
    far = real[:300]
    far.next_obs = far.next_obs + 1.0
    assert np.median(audit.neighbour_distance(far, real, units)) > 5 * np.median(real_distance)


# ---- Calibration


def test_crps_against_its_definition():
    samples, truth = torch.randn(5, 7, 2, 3), torch.randn(5, 2, 3)
    pairs = (samples[:, :, None] - samples[:, None]).abs().sum((1, 2)) / (7 * 6)
    expected = (samples - truth[:, None]).abs().mean(1) - pairs / 2
    torch.testing.assert_close(audit.crps(samples, truth), expected)


def test_calibrated_samples_have_flat_ranks_and_spread_equal_to_error():
    mean = torch.randn(4000, 1, 2, 3)
    samples, truth = mean + torch.randn(4000, 9, 2, 3), (mean + torch.randn(4000, 1, 2, 3))[:, 0]
    found = audit.scores(samples, truth)
    assert found["spread"] == pytest.approx(found["error"], rel=0.03)
    ranks = np.array(found["ranks"])
    assert ranks.shape == (2, 10) and np.abs(ranks / 1200 - 1).max() < 0.12
    assert found["outside"] == pytest.approx([0.2, 0.2], abs=0.02)
    narrow = audit.scores(mean + 0.3 * torch.randn(4000, 9, 2, 3), truth)
    assert narrow["outside"][0] > 0.5 and narrow["crps"][0] > 1.1 * found["crps"][0]


def test_the_ensemble_learns_mean_and_variance():
    x = torch.randn(4000, 2)
    noise = torch.tensor([0.4, 0.8])
    y = torch.stack([x[:, 0] + x[:, 1], 2 * x[:, 0]], dim=1) + noise * torch.randn(4000, 2)
    measured = torch.arange(4000) < 400
    ensemble, updates = audit.GaussianEnsemble.fit(x, y, measured, 32, 800, 64, BAR)
    with torch.no_grad():
        drawn = ensemble.sample(torch.tensor([[0.5, -0.5]]).expand(5, 4000, -1))
    assert updates <= 800
    assert drawn.mean((0, 1)).tolist() == pytest.approx([0, 1], abs=0.1)
    assert drawn.std((0, 1)).tolist() == pytest.approx(noise.tolist(), rel=0.25)


# ---- The command line


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    hopper_command("dawm_td3bc.py", folder, *TOY_AGENT, *TOY_WORLD_MODEL, *TOY_IDM, "--horizon", "3")
    return folder


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "experiments/audit.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "", "HOME": str(folder), "OMP_NUM_THREADS": "1", "DAWM_CACHE_DIR": str(folder / "cache")},
    )  # fmt: skip


SMALL = "--inverse 40 --neighbours 20 --pairs 5 --rollouts 10 --ensemble-updates 20 --threads 1".split()


def test_a_run_and_its_set_give_the_same_audit(toy_run):
    run, made = next((toy_run / "runs").glob("*")), next((toy_run / "stages").glob("synthesis-*[!k]"))
    result = command(toy_run, run, *SMALL)
    assert result.returncode == 0, result.stderr[-2000:]
    for words in ("synthetic, step 3", "real, physics stock", "at most", "marginals", "world model: crps", "ensemble,"):
        assert words in result.stdout, result.stdout
    assert (run / "audit.png").stat().st_size > 20_000
    found = json.loads((run / "audit.json").read_text())
    assert len(found["synthetic"]["steps"]) == 4 and found["real"]["all"]["state"]["max"] < 1e-5
    assert found["real, physics stock"]["all"]["state"]["median"] > 1e-4
    assert len(found["calibration"]["world model"]["ranks"][0]) == 11
    assert found["subject"]["sha256"] and found["subject"]["args"]["horizon"] == 3
    again = command(toy_run, made, *SMALL, "--data-path", toy_run / "data.hdf5", "--out", toy_run / "out")
    assert again.returncode == 0, again.stderr[-2000:]
    second = json.loads((toy_run / "out/audit.json").read_text())
    assert second["synthetic"] == found["synthetic"] and second["calibration"].keys() == found["calibration"].keys()


def test_a_world_model_of_other_code_is_not_sampled_with_this(toy_run, tmp_path):
    """Its calibration is refused with a word, unless the same weights stand there under today's code too."""
    folder = tmp_path / "stages"
    shutil.copytree(toy_run / "stages", folder)
    made, today = next(folder.glob("synthesis-*[!k]")), next(folder.glob("world_model-*[!k]"))
    shutil.copytree(today, folder / "world_model-0")
    shutil.copytree(today, folder / "world_model-z")
    for name in ("world_model-0", "world_model-z"):
        content = json.loads((folder / name / "manifest.json").read_text())
        content["depends"]["source"] = "of another day"
        (folder / name / "manifest.json").write_text(json.dumps(content))
    subject = audit.find(made, toy_run / "data.hdf5")
    assert (subject.world_model, subject.why) == (today, "") and subject.module is dawm_td3bc
    shutil.rmtree(today)
    subject = audit.find(made, toy_run / "data.hdf5")
    assert subject.world_model is None and "was made by other code than is here now" in subject.why


def test_an_exact_set_has_no_error(toy_run, tmp_path):
    """A set whose rows are what the simulator did gets the floor's errors, and its own actions explain it."""
    made = next((toy_run / "stages").glob("synthesis-*[!k]"))
    subject = audit.find(made, toy_run / "data.hdf5")
    rows = dawm_td3bc.real_transitions(subject.dataset, torch.device("cpu"))
    (tmp_path / "synthesis-exact").mkdir()
    save_file({"transitions": rows}, tmp_path / "synthesis-exact/tensors.safetensors")
    (tmp_path / "synthesis-exact/manifest.json").write_text((made / "manifest.json").read_text())
    result = command(
        toy_run, tmp_path / "synthesis-exact", *SMALL, "--data-path", toy_run / "data.hdf5", "--out", tmp_path
    )
    assert result.returncode == 0 and "the world model is no longer in" in result.stdout, result.stderr[-2000:]
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["synthetic"]["all"]["state"]["max"] < 1e-5 and found["synthetic"]["all"]["termination_agrees"] == 1
    assert found["action"]["error"][0]["median"] < 1e-4 and found["calibration"] is None
    assert found["likeness"]["synthetic"][0]["marginals"] > 0.9


def test_bad_subjects_are_told_in_one_line(toy_run, tmp_path):
    world_model = next((toy_run / "stages").glob("world_model-*[!k]"))
    made = next((toy_run / "stages").glob("synthesis-*[!k]"))
    other = tmp_path / "other.hdf5"
    from toy import hopper_file

    hopper_file(other, episodes=9)
    for arguments, words in (
        ([tmp_path], "is no run folder (args.json) and no kept synthetic set"),
        ([world_model], "no synthetic set"),
        ([made, "--data-path", other], "was made from other data than"),
        ([made, "--rows", "1"], "--rows 1 must be 100 or more"),
        ([made, "--pairs", "-1"], "--pairs -1 must be 0 or more"),
        ([made, "--out", "README.md"], "--out README.md cannot be made a folder"),
    ):
        result = command(toy_run, *arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


def test_without_a_settable_state_the_data_only_part_is_told(capsys):
    dataset = linear_dataset()
    rows = dawm_td3bc.real_transitions(dataset, torch.device("cpu"))
    rows[:, 5:7] += 0.1
    args = dawm_td3bc.Args(env_id="linear", horizon=0)
    facts = {"set": "linear", "transitions": len(rows)}
    subject = audit.Subject(args, dawm_td3bc, dataset, rows.numpy(), None, "it is gone", Path(), facts)
    options = SimpleNamespace(
        rows=1000, physics="auto", pairs=4, rollouts=4, neighbours=50, threads=1, ensemble_updates=1
    )
    result = audit.audit(subject, options)
    printed = capsys.readouterr().out
    assert "no check by the simulator: Linear-v0 has no state that can be set" in printed and "synthetic" not in result
    text = audit.table(result)
    assert "marginals" in text and "actions at the bounds" in text and "no calibration: it is gone" in text
    with pytest.raises(UserError):
        Stepper("Linear-v0", "stock")


def test_the_kept_set_is_read_as_it_was_written(toy_run):
    made = next((toy_run / "stages").glob("synthesis-*[!k]"))
    subject = audit.find(made, toy_run / "data.hdf5")
    rows = load_file(made / "tensors.safetensors")["transitions"]
    found = audit.synthetic_rows(subject, 10**9)
    assert len(found.obs) == len(rows) and found.step.max() == 3
    np.testing.assert_array_equal(found.next_obs, rows[:, 15:26].double().numpy())
    np.testing.assert_array_equal(found.reward, rows[:, 14].double().numpy())


# ---- The two studies that the audit judges


def test_the_generators_table_by_hand():
    def step(value):
        return {"state": {"median": value, "99": 10 * value}, "reward": {"median": value / 2}}

    def medians(*values):
        return [{"median": value} for value in values]

    content = {
        "synthetic": {"steps": [step(1.0), step(2.0), step(4.0)]},
        "action": {"unexplained": medians(9, 1, 2)},
        "likeness": {"synthetic": [{"marginals": m, "correlations": m / 2} for m in (9, 0.8, 0.9)]},
        "calibration": {"world model": {"crps": [0.1, 0.2, 0.3], "spread": [1, 1, 3], "error": [2, 2, 4]}},
    }
    found = load("experiments/generator.py").figures(content)
    assert list(found.values()) == pytest.approx([1, 3, 30, 1.5, 0.5, 0.85, 0.425, 0.1, 0.3, 0.5, 0.75])


def test_the_table_of_actions(toy_run, tmp_path, capsys):
    """Two seeds of two methods, 40 and 60, and one audited set."""
    run = next((toy_run / "runs").glob("*"))
    if not (run / "audit.json").exists():
        assert command(toy_run, run, *SMALL).returncode == 0
    content = json.loads((run / "args.json").read_text())
    for name in ("dawm_td3bc", "joint_td3bc", "dawm_rollouts"):
        for seed, score in ((0, 40.0), (1, 60.0)):
            folder = tmp_path / f"local-hopper-medium-v0__{name}__{seed}__1"
            folder.mkdir()
            content["args"] |= {"exp_name": name, "seed": seed}
            (folder / "args.json").write_text(json.dumps(content))
            (folder / "summary.txt").write_text("total   60.0 s\n")
            lines = [{"step": i, "eval/normalized_score": value} for i, value in enumerate((10.0, 90.0, score))]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
            if name == "dawm_rollouts":
                (folder / "audit.json").write_text((run / "audit.json").read_text())
    load("experiments/actions_table.py").main(tmp_path, tmp_path / "actions")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["inverse dynamics (DAWM)", "joint"]
    assert rows[0][2:6] == ["2", "50.0 ± 14.1", "50.0 ± 4.7", "90.0 ± 0.0"] and rows[1][6] == "-"
    steps = json.loads((run / "audit.json").read_text())["synthetic"]["steps"]
    assert rows[0][6] == f"{steps[0]['state']['median']:.3f}"
    assert (tmp_path / "actions.png").stat().st_size > 10_000
