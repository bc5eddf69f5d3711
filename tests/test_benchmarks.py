"""Small commands of benchmarks/ and experiments/: what they compute, by hand."""

import json

from baselines import decision_diffuser
from common import UserError

import inference
import pytest
import table
import torch
import training_time
import true_dynamics
from run_folders import finished_run


def test_every_contender_is_measured(monkeypatch):
    """Three decisions each, or more, and a row in the table; with DD's own 200 steps cut to 4."""
    small = dict(decision_diffuser.PRESETS["original"], diffusion_steps=4, sampling_steps=4, plan_horizon=8)
    monkeypatch.setitem(decision_diffuser.PRESETS, "original", small)
    found = inference.measure(inference.Args(scale="laptop", rounds=1, seconds=1e-3), torch.device("cpu"))
    assert len(found) == 7
    for row in found.values():
        assert row["decisions"] >= 3 and 0 < row["median_ms"] <= row["p95_ms"]
        assert row["s_per_episode"] > row["simulator_s_per_episode"] > 0
    _, _, *lines = inference.table({"a machine": found}).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in found]
    (line,) = (line for line in lines if line.startswith("| DD | "))
    assert line.endswith(" | 3.96 |")  # 7.531 / 1.904 in the paper


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
    with pytest.raises(UserError, match="no finished run in"):
        table.main(tmp_path / "0")


def test_columns_are_replaced_by_what_the_simulator_does(made, tmp_path, capsys):
    """True rows of rollouts that are real rows are those rows, but for their rounding; each line trains."""
    folder = made("dawm_td3bc", "--horizon", "3")[0]
    parts = true_dynamics.load_rollouts(folder)
    rows, again = parts.rollouts["rows"], true_dynamics.asked_again(parts)
    changed = [[column.any().item() for column in (again != rows)[:, h].T] for h in (0, 1)]
    assert changed == [[False] * 27, [False] * 15 + [True] * 11 + [False]]  # next states behind an imagined one
    real = parts.script.real_transitions(parts.dataset, torch.device("cpu"))[:, None]
    parts.rollouts = {"rows": real, "valid": torch.ones(real.shape[:2], dtype=torch.bool)}
    torch.testing.assert_close(true_dynamics.true_rows(parts), real, rtol=0, atol=1e-4)
    lines = ("all_true", "real_data")
    for updates in (10, 20, 20):  # what has been made is not made again, and other settings are another table
        true_dynamics.main(true_dynamics.Args(run=folder, lines=lines, updates=updates, seeds=(0,), out=tmp_path))
    assert sorted(x.name.split("__")[1] for x in tmp_path.iterdir()) == sorted(2 * lines)
    told = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split(" | ")[1:3] for line in told] == [["all true", "1"], ["real data", "1"]]


def test_a_training_of_the_run_s_own_length_errs_as_the_run_s_model(made, tmp_path):
    folder = made("dawm_td3bc", "--horizon", "3")[0]
    training_time.main(training_time.Args(runs=(folder,), updates=(10, 12), pairs=100, out=tmp_path))
    runs = {finished_run(path).content["args"]["world_model_steps"]: path for path in tmp_path.glob("*__dawm_td3bc__*")}
    errors = {n: {k: v[-1] for k, v in finished_run(path).metrics.items() if "audit" in k} for n, path in runs.items()}
    parts = true_dynamics.load_rollouts(folder)  # whose world model had 12 updates
    assert errors[12] == training_time.errors(parts, parts.world_model, 100) != errors[10]
    training_time.main(training_time.Args(runs=tuple(runs.values()), plot=True, out=tmp_path))
    assert (tmp_path / "training_time.png").stat().st_size > 5000
    assert "to watch it" not in (runs[12] / "summary.txt").read_text()  # it has no agent
    with pytest.raises(UserError, match="2 runs given"):
        training_time.main(training_time.Args(runs=tuple(runs.values())))
    with pytest.raises(UserError, match="was not made by this command"):
        training_time.main(training_time.Args(runs=(folder,), plot=True))
