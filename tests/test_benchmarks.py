"""Small commands of benchmarks/ and experiments/: what they compute, by hand."""

import json
import sys

from baselines import decision_diffuser
from common import UserError
from common.evaluation import make_env

import numpy as np
import pytest
import torch
from toy import ROOT, TOY, hopper_run

sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "benchmarks"))
import inference
import table
import training_time
import true_dynamics
from run_folders import finished_run


def test_the_inference_table_by_hand():
    def row(median, episode):
        numbers = dict(median_ms=median, p95_ms=2 * median, simulator_s_per_episode=0.5, s_per_episode=episode)
        return dict(decisions=1200) | numbers

    lines = inference.table({"a machine": {"DAWM-TD3BC": row(0.1, 1), "DD": row(30.0, 30)}}).splitlines()
    assert lines[2] == "| DAWM-TD3BC | 1,200 | 0.1 | 0.2 | 1 | 0.5 | 1 | 1.00 |"
    assert lines[3] == "| DD | 1,200 | 30 | 60 | 30 | 0.5 | 30 | 3.96 |"  # 7.531 / 1.904 in the paper


def test_a_player_counts_decisions_and_begins_anew_after_a_fall():
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


def test_every_contender_acts(monkeypatch):
    """One decision each; with DD's own 200 steps cut to 4."""
    small = dict(decision_diffuser.PRESETS["original"], diffusion_steps=4, sampling_steps=4, plan_horizon=8)
    monkeypatch.setitem(decision_diffuser.PRESETS, "original", small)
    env = make_env("Hopper-v4", "d4rl")
    policies = inference.contenders("laptop", env, torch.device("cpu"))
    assert {"random", "DAWM-TD3BC", "DAWM-IQL", "DD", "DD, warm start 3", "DD original"} <= set(policies)
    obs = env.reset(seed=0)[0][None].astype(np.float32)
    for name, policy in policies.items():
        assert policy(obs).shape == (1, 3) and np.isfinite(policy(obs)).all(), name


def test_the_table_of_scores_by_hand(tmp_path, capsys):
    """Two seeds with finals 40 and 60 and curves of mean 30 and 50; d3rlpy's lines."""
    args = dict(exp_name="a", run_dir="x", eval_every=10)
    data = dict(env_id="e", robot="hopper", mean_return=1607.01385, fingerprint="f")  # half of D4RL's range
    for seed, scores in ((0, [20.0, 40.0]), (1, [40.0, 60.0])):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"args": {**args, "seed": seed}, "data": data}))
        (folder / "summary.txt").write_text("agent  1.0 s  1%\ntotal   60.0 s\n")
        lines = [json.dumps({"step": i, "eval/normalized_score": score}) for i, score in enumerate(scores)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    peer = dict(library="d3rlpy 1", algorithm="iql", seed=3, scores=[1, 2], seconds=120)
    (tmp_path / "peers.jsonl").write_text(json.dumps(peer) + "\n")
    table.main(tmp_path)
    text = capsys.readouterr().out
    assert "| a | 0, 1 | 50.0 ± 14.1 | 40.0 ± 14.1 | 1.0 |\n| d3rlpy 1 iql | 3 | 2.0 | 1.5 | 2.0 |" in text
    assert "The mean return of e itself: 50.0" in text
    with pytest.raises(UserError, match="no finished run in"):
        table.main(tmp_path / "0")


def test_columns_are_replaced_by_what_the_simulator_does(toy, tmp_path, capsys):
    """True rows of rollouts that are real rows are those rows, but for their rounding; each line trains."""
    hopper_run("dawm_td3bc", toy, *TOY, "--horizon", "3", "--exp-name", "replaced")
    folder = next((toy / "runs").glob("*__replaced__*"))
    parts = true_dynamics.load_rollouts(folder)
    real = parts.script.real_transitions(parts.dataset, torch.device("cpu"))[:, None]
    parts.rollouts = {"rows": real, "valid": torch.ones(real.shape[:2], dtype=torch.bool)}
    torch.testing.assert_close(true_dynamics.true_rows(parts), real, rtol=0, atol=1e-4)
    lines = ("all_true", "real_data")
    for updates in (10, 20, 20):  # what has been made is not made again, and other settings are another table
        true_dynamics.main(true_dynamics.Args(run=folder, lines=lines, updates=updates, seeds=(0,), out=tmp_path))
    assert sorted(x.name.split("__")[1] for x in tmp_path.iterdir()) == sorted(2 * lines)
    told = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[1:3] for line in told] == [["all true", "1"], ["real data", "1"]]


def test_a_training_of_the_run_s_own_length_errs_as_the_run_s_model(toy, tmp_path):
    hopper_run("dawm_td3bc", toy, *TOY, "--horizon", "3", "--exp-name", "looked-at")
    folder = next((toy / "runs").glob("*__looked-at__*"))
    training_time.main(training_time.Args(runs=(folder,), updates=(10, 12), pairs=100, out=tmp_path))
    made = {finished_run(path).content["args"]["world_model_steps"]: path for path in tmp_path.glob("*__looked-at__*")}
    errors = {n: {k: v[-1] for k, v in finished_run(path).metrics.items() if "audit" in k} for n, path in made.items()}
    parts = true_dynamics.load_rollouts(folder)  # whose world model had 12 updates
    assert errors[12] == training_time.errors(parts, parts.world_model, 100) != errors[10]
    training_time.main(training_time.Args(runs=tuple(made.values()), plot=True, out=tmp_path))
    assert (tmp_path / "training_time.png").stat().st_size > 5000
    assert "to watch it" not in (made[12] / "summary.txt").read_text()  # it has no agent
    with pytest.raises(UserError, match="2 runs given"):
        training_time.main(training_time.Args(runs=tuple(made.values())))
    with pytest.raises(UserError, match="was not made by this command"):
        training_time.main(training_time.Args(runs=(folder,), plot=True))
