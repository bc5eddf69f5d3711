"""benchmarks/ and experiments/: what they compute from measurements, against values by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ROOT, linear_dataset

import dd_baseline


def load(name: str):
    """A file of benchmarks/ or experiments/ as a module."""
    sys.path.insert(0, str(Path(ROOT, name).parent))
    spec = importlib.util.spec_from_file_location(Path(name).stem, Path(ROOT, name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def inference():
    return load("benchmarks/inference.py")


def test_the_inference_table_by_hand(inference):
    def row(median, deciding):
        return dict(
            decisions=1200, median_ms=median, p95_ms=2 * median, deciding_s_per_episode=deciding,
            simulator_s_per_episode=0.5, s_per_episode=deciding + 0.5,
        )  # fmt: skip

    text = inference.table({"a machine": {"DAWM-TD3BC": row(0.1, 0.5), "DD": row(30.0, 29.5)}})
    lines = text.splitlines()
    assert lines[2] == "| DAWM-TD3BC | 1,200 | 0.1 | 0.2 | 1 | 0.5 | 1 | 1 | 1.00 |"
    assert lines[3] == "| DD | 1,200 | 30 | 60 | 30 | 0.5 | 300 | 30 | 3.96 |"  # 7.531 / 1.904 in the paper


def test_a_player_counts_decisions_and_begins_anew_after_a_fall(inference):
    class Env:
        resets = steps = 0

        def reset(self, seed=None):
            self.resets += 1
            return np.zeros(3), {}

        def step(self, action):
            assert action.shape == (2,) and np.abs(action).max() <= 1
            self.steps += 1
            return np.ones(3), 0.0, self.steps % 5 == 0, False, {}

    env = Env()
    player = inference.Player(lambda obs: np.full((len(obs), 2), 7.0), env)
    player.play(seconds=60, most=12)
    assert len(player.decisions) == len(player.steps) == env.steps == 12 and env.resets == 1 + 2


def test_every_contender_acts(inference, monkeypatch):
    """One decision each; with DD's own 200 steps cut to 4."""
    from common.evaluation import make_env

    small = dict(dd_baseline.PRESETS["original"], diffusion_steps=4, sampling_steps=4, plan_horizon=8)
    monkeypatch.setitem(dd_baseline.PRESETS, "original", small)
    env = make_env("Hopper-v4", "d4rl")
    policies = inference.contenders("laptop", env, torch.device("cpu"))
    assert {"random", "DAWM-TD3BC", "DAWM-IQL", "DWM-TD3BC", "DWM-IQL", "DD", "DD original"} <= set(policies)
    obs = env.reset(seed=0)[0][None].astype(np.float32)
    for name, policy in policies.items():
        assert policy(obs).shape == (1, 3) and np.isfinite(policy(obs)).all(), name


def test_rewards_along_a_plan_stop_at_its_first_fallen_state(monkeypatch):
    """Plans of four states, each transition worth 1 in the simulator: the second plan falls in its second state."""
    module = load("experiments/dd_guidance.py")
    plans = torch.zeros(2, 4, 11)
    plans[..., 0] = 1.2  # height; below 0.7 is a fall
    plans[1, 1, 0] = 0.5
    monkeypatch.setattr(module, "sample_plans", lambda args, model, first, target, noises: plans)
    monkeypatch.setattr(module, "simulate", lambda obs, action: (None, np.ones(len(obs))))
    args = dd_baseline.Args(plan_horizon=4, seed=0, unet_width=8, unet_multipliers=(1, 2), idm_width=8)
    dataset = linear_dataset()
    model = dd_baseline.DecisionDiffuser(args, dd_baseline.Windows(args, dataset, torch.device("cpu")))
    model.inverse_dynamics = torch.nn.Identity()
    model.inverse_dynamics.forward = lambda obs, after: torch.zeros(*obs.shape[:-1], 3)
    model.obs_units.denormalize = lambda x: x
    assert module.plan_rewards(args, model, torch.zeros(2, 11), 0.5).tolist() == [3.0, 1.0]


def test_forms_prints_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["forms.py", "--rounds", "1"])
    load("benchmarks/forms.py").main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 5 * (5 + 2 + 2 + 2 + 2) + 1 + 4 + 2 + 3 + 2 and all(
        float(row.split("|")[3].replace(",", "")) > 0 for row in rows
    )


def test_forms_are_forms_of_the_same():
    """In float64, output and gradients; else their times would say nothing."""
    forms = load("benchmarks/forms.py")
    made = {
        name: getattr(forms, name)(*sizes).double()
        for name, sizes in {
            "AllTokens": (16, 16), "Slices": (16, 16), "TemporalConv": (16, 16), "Shorten": (16, 16, 3),
            "NormMish": (8, 16), "NormThenMish": (8, 16), "BatchNormView": (8, 16), "TemporalNorm": (8, 16),
        }.items()
    }  # fmt: skip
    made["Strided"] = forms.Strided(16, 16, 3, stride=2, padding=1).double()
    groups = (
        ("TemporalConv", "AllTokens", "Slices"),
        ("Strided", "Shorten"),
        ("NormThenMish", "NormMish"),
        ("TemporalNorm", "BatchNormView"),
    )
    for length in (1, 2, 5, 9):
        x = torch.randn(length, 3, 16, dtype=torch.float64, requires_grad=True)
        for first, *others in groups:
            for other in others:
                for parameter in made[first].parameters():
                    torch.nn.init.normal_(parameter)  # a norm's weight of 1 would hide one that is forgotten
                made[other].load_state_dict(made[first].state_dict())
                ours, theirs = (
                    (y := module(x), *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]))
                    for module in (made[first], made[other])
                )
                for a, b in zip(ours, theirs, strict=True):
                    assert torch.allclose(a, b, rtol=0, atol=1e-10), (other, length)


def test_scaling_finds_the_exponents(tmp_path):
    """Two sizes of data: the slope between two points is that of the line through them."""
    command = [sys.executable, "benchmarks/scaling.py", "--out", str(tmp_path / "scaling"), "--data", "2000", "8000"]
    command += ["--widths", "16", "--batches", "16", "--horizons", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "scaling.json").read_text())
    points = found["points"]["data"]
    assert [row["transitions"] for row in points.values()] == [2000 * 8, 8000 * 8]
    first, last = (row["windows"] for row in points.values())
    assert found["exponents"]["data windows"] == pytest.approx(np.log(last / first) / np.log(4))
    assert (tmp_path / "scaling.png").stat().st_size > 5000 and "| unet_width | 16 |" in result.stdout
