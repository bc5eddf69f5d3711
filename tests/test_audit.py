"""experiments/audit.py: the instrument against known errors, actions and distributions; its command on a toy run."""

import json
from types import SimpleNamespace

from common import UserError
from common.data import load_dataset

import audit
import numpy as np
import pytest
import torch
from stepper import Stepper


@pytest.fixture(scope="module")
def hopper(toy):
    """Random play in Hopper as Rows, rounded to float32 as a data set holds them; a stepper; their sd."""
    dataset = load_dataset("hopper-medium-v2", toy / "data.hdf5")
    floats = (x.astype(float) for x in (dataset.obs, dataset.action, dataset.reward, dataset.next_obs))
    rows = audit.Rows(*floats, dataset.terminated, np.zeros(len(dataset.obs), int))
    sd = rows.obs.std(0) + 1e-6
    return SimpleNamespace(rows=rows, sd=sd, stepper=lambda physics: Stepper(dataset, physics))


def judged(hopper, rows, physics="d4rl") -> dict:
    return audit.check(hopper.stepper(physics), rows, hopper.sd, 1.0, audit.NAMES["hopper"])


def test_real_rows_have_no_error_under_their_physics_and_a_visible_one_under_the_other(hopper):
    found = judged(hopper, hopper.rows)
    assert found["state"]["max"] < 1e-5 and found["reward"]["max"] < 1e-5  # float32's rounding of the stored state
    falls = found["falls"]
    assert falls["simulator"] == falls["told"] == falls["both"] > 0
    assert found["uncheckable"] == pytest.approx((np.abs(hopper.rows.obs[:, 5:]) >= 10).any(1).mean())
    assert judged(hopper, hopper.rows, "stock")["state"]["median"] > 1e-4


def test_known_errors_are_told_in_standard_deviations(hopper):
    rows = hopper.rows[np.arange(100)]
    rows.next_obs, rows.reward, rows.terminated = rows.next_obs + 0.5 * hopper.sd, rows.reward - 2, ~rows.terminated
    found = judged(hopper, rows)
    assert found["state"]["median"] == pytest.approx(0.5, abs=1e-5) and found["falls"]["both"] == 0
    assert found["dimensions"]["w_foot"] == pytest.approx(0.5, abs=1e-5)
    assert found["reward"]["max"] == pytest.approx(2, abs=1e-5) and found["rows"] == 100


def test_the_explaining_action_is_found_from_a_wrong_start(hopper):
    stepper = hopper.stepper("d4rl")
    rows = hopper.rows[stepper.checkable(hopper.rows.obs)]
    truth, rng = rows.action.astype(float), np.random.default_rng(1)
    rows.action = (truth + rng.normal(0, 0.1, truth.shape)).clip(-1, 1)
    action, left, its_part = audit.explaining_action(stepper, rows, hopper.sd)
    own = audit.norm((rows.next_obs - stepper(rows.obs, rows.action)[0]) / hopper.sd)
    assert np.median(its_part / own) == pytest.approx(1, abs=1e-3)  # all of the error is the action's
    assert np.median(np.abs(action - truth)) < 1e-4 < 0.05 < np.median(np.abs(rows.action - truth))
    assert np.median(left) < 1e-4 and (np.abs(action) <= 1).all()
    rows.next_obs = rows.next_obs + hopper.sd  # no action does that
    assert np.median(audit.explaining_action(stepper, rows, hopper.sd)[1]) > 0.3


def test_likeness_by_hand():
    x = np.random.default_rng(0).normal(size=(20_000, 2))
    rows = SimpleNamespace(obs=x[:, :1], action=x[:, 1:], reward=x[:, 0], next_obs=x[:, 1:])
    other = SimpleNamespace(obs=x[:, :1], action=-x[:, :1], reward=x[:, 0], next_obs=x[:, 1:])
    assert audit.likeness(rows, rows) == {"marginals": 1, "correlations": 1}
    # Columns s, a, r, s' with r = s and s' = a: of six correlations, those of (s, a), (a, r) go from 0 to -1, (a, s')
    # from 1 to 0, so they lose 1 / 2 each.
    assert audit.likeness(rows, other)["correlations"] == pytest.approx(1 - 3 * 0.5 / 6, abs=0.01)
    a, b = np.arange(100.0)[:, None], np.arange(25.0, 125)[:, None]  # a quarter of each lies beside the other
    same, moved = (SimpleNamespace(obs=a, action=v, reward=a[:, 0], next_obs=a) for v in (a, b))
    assert audit.likeness(same, moved)["marginals"] == pytest.approx(1 - 0.25 / 4)


def test_crps_against_its_definition():
    samples, truth = torch.randn(5, 7, 2, 3).double(), torch.randn(5, 2, 3).double()
    pairs = (samples[:, :, None] - samples[:, None]).abs().sum((1, 2)) / (7 * 6)
    torch.testing.assert_close(audit.crps(samples, truth), (samples - truth[:, None]).abs().mean(1) - pairs / 2)


def test_calibrated_samples_have_spread_equal_to_error():
    mean = torch.randn(4000, 1, 2, 3)
    samples, truth = mean + torch.randn(4000, 9, 2, 3), (mean + torch.randn(4000, 1, 2, 3))[:, 0]
    found, narrow = audit.scores(samples, truth), audit.scores(mean + 0.3 * torch.randn(4000, 9, 2, 3), truth)
    assert found["spread"] == pytest.approx(found["error"], rel=0.03)
    assert found["outside"] == pytest.approx([0.2, 0.2], abs=0.02)  # 2 / (9 + 1)
    assert narrow["outside"][0] > 0.5 and narrow["crps"][0] > 1.1 * found["crps"][0]


def test_the_ensemble_learns_mean_and_variance():
    x, noise = torch.randn(4000, 2), torch.tensor([0.4, 0.8])
    y = torch.stack([x[:, 0] + x[:, 1], 2 * x[:, 0]], dim=1) + noise * torch.randn(4000, 2)
    ensemble = audit.GaussianEnsemble(x, y, 32)
    assert ensemble.fit(x, y, torch.arange(4000) < 400, 800, 64) <= 800
    with torch.no_grad():
        drawn = ensemble.sample(torch.tensor([[0.5, -0.5]]).expand(5, 4000, -1))
    assert drawn.mean((0, 1)).tolist() == pytest.approx([0, 1], abs=0.1)
    assert drawn.std((0, 1)).tolist() == pytest.approx(noise.tolist(), rel=0.25)


# ---- The command


@pytest.fixture
def toy_run(made):
    """The folder of a toy run with rollouts of four steps."""
    return made("dawm_td3bc", "--horizon", "3")[0]


def audited(folder, **changes) -> dict:
    small = dict(rows=400, actions=40, pairs=4, rollouts=10, ensemble_updates=20, threads=1)
    audit.main(audit.Args(run=folder, **small | changes))
    return json.loads((folder / "audit.json").read_text())


def test_a_run_is_audited(toy_run, capsys):
    found = audited(toy_run)
    assert list(found["simulator"]) == ["step 0", "step 1", "step 2", "step 3", "real", "real, physics stock"]
    assert found["simulator"]["real"]["state"]["max"] < 1e-5 < found["simulator"]["real, physics stock"]["state"]["max"]
    assert sum(found["simulator"][f"step {h}"]["rows"] for h in range(4)) == min(400, found["rows"])
    assert all(len(part["crps"]) == 8 for part in found["calibration"].values()) and len(found["calibration"]) == 2
    assert len(found["likeness"]) == 5 and found["action spread"][0] == pytest.approx(1, abs=0.2)
    text = capsys.readouterr().out
    for words in ("step 3", "real, physics stock", "marginals", "world model, step", "five Gaussian networks"):
        assert words in text
    assert (toy_run / "audit.png").stat().st_size > 20_000


@pytest.mark.parametrize("module, step", [("baselines.diamond", "step 2"), ("baselines.synther", "step 0")])
def test_a_run_is_audited_but_for_what_has_no_start(module, step, made, capsys):
    audit.main(audit.Args(made(module)[0], rows=100, actions=6, threads=1))
    told = capsys.readouterr().out
    assert step in told and "no calibration: it has no rollouts from held-out real pairs" in told


def test_an_ensemble_of_one_model_ranks_as_its_own_uncertainty(made):
    folder = made("variants.uncertain_td3bc", "--horizon", "3")[0]
    found = audited(folder, pairs=0, members=(folder,))["uncertainty"]
    for place in ("step 0", "step 3", "all"):
        kept, ensemble = (found[f"{x}, {place}"] for x in ("uncertainty", "ensemble, from row"))
        assert ensemble["rank"] == pytest.approx(kept["rank"], abs=1e-3)
        assert ensemble["tenths"] == pytest.approx(kept["tenths"], rel=0.05)
    assert abs(found["ensemble, apart, all"]["rank"]) < 0.2  # all 0: the order of rows drawn at random
    with pytest.raises(UserError, match="--members go with a run of the same data"):
        audited(folder, members=(made("dawm_td3bc", "--loss", "noise")[0],))


def test_without_a_simulator_the_data_alone_tell(toy_run, monkeypatch, capsys):
    def no_stepper(*_):
        raise UserError("it has no state that can be set")

    monkeypatch.setattr(audit, "Stepper", no_stepper)
    found = audited(toy_run, pairs=0)
    assert "simulator" not in found and "no simulator: it has no state" in capsys.readouterr().out
