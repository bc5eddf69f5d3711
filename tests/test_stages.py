"""common/stages.py and run.py: what a stage's key hashes, and that a kept result is whole, its own, and made once.

Which code it hashes is in test_forking.py; kills, damage and many processes are in tests/faults.
"""

import json
from types import SimpleNamespace

import dawm_td3bc as script
from common import UserError
from common.run import Run
from common.stages import depends
from dawm_td3bc import Args

import pytest
import torch
from toy import new_run, without_times

# ---- Keep and find

TENSORS = {
    "weight": torch.tensor([[1.0, -0.0, 3.0], [1e-40, 3e38, -3e38]]).T,  # not contiguous
    "count": torch.arange(5),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
}
METRICS = [(10, {"world_model/loss": 0.75}), (5, {"b": 1 / 3, "a": 1e-30}), (10, {"world_model/loss": -2.0})]


def find_or_make(run, function=script.train_world_model, tensors=TENSORS, after=()):
    """The stage, and what it made or found."""
    kept = {}
    with run.stage(function, 1, "update", keeps=kept, after=after) as stage:
        for _ in stage:
            for step, values in METRICS:
                run.log(step, values)
            kept.update(tensors)
    return stage, kept


def bits(tensors: dict) -> dict:
    return {name: (x.dtype, x.shape, x.contiguous().numpy().tobytes()) for name, x in tensors.items()}


def test_a_kept_result_is_found_bit_for_bit_with_its_metrics(tmp_path, capsys):
    first = new_run(tmp_path, agent_lr=1e-3)
    first.log(1, {"before/the_stage": 1.0})
    made, _ = find_or_make(first)
    first.log(2, {"after/the_stage": 1.0})
    second = new_run(tmp_path)
    capsys.readouterr()
    found, kept = find_or_make(second)
    assert not made.found and found.found and found.path == made.path and bits(kept) == bits(TENSORS)
    assert without_times(first.records)[1:-1] == without_times(second.records) == METRICS
    lines = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in (first, second)]
    assert lines[0][1:-1] == lines[1] and len(lines[1]) == 4
    assert f"reused {found.path}" in capsys.readouterr().out and "reused" in second.stages["world model"][1]
    assert second.kept == first.kept == {"world model": str(found.path)}
    assert {path.suffix for path in found.path.parent.iterdir()} <= {".safetensors", ".sha256", ".lock"}


def test_what_the_stage_does_not_read_finds_the_same_and_all_else_another(tmp_path):
    one, _ = find_or_make(new_run(tmp_path))
    for same in ({"agent_lr": 1e-2}, {"target_return": 0.3}, {"seed": 5}, {"run_dir": tmp_path / "else"}):
        assert find_or_make(new_run(tmp_path, **same))[0].found, same
    for other in ({"fingerprint": "other"}, {"world_model_steps": 7}, {"unet_multipliers": (1, 4)}, {"env_id": "b"}):
        assert not find_or_make(new_run(tmp_path, **other))[0].found, other
    elsewhere = new_run(tmp_path)
    elsewhere.made_on = "cuda"
    assert not find_or_make(elsewhere)[0].found and find_or_make(new_run(tmp_path))[0].path == one.path


def test_a_stage_builds_on_the_results_before_it(tmp_path):
    """Another world model: another synthesis, though it reads the same arguments."""
    made = []
    for weight in (5.0, 6.0):
        run = new_run(tmp_path, world_model_steps=int(weight))
        find_or_make(run, tensors={"weight": torch.full((2,), weight)})
        made.append(find_or_make(run, script.synthesize, after=("world model",))[0])
    assert made[0].path != made[1].path and made[0].depends["args"] == made[1].depends["args"]


def test_tf32_makes_another_result_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    keys = []
    for tf32 in (True, False):  # in this order: the next tests are as they were
        run = Run(Args(run_dir=tmp_path, stage_dir=tmp_path, tf32=tf32))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        keys.append(depends(run, script.mlp, ())[1])
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    "changes, other", [({"world_model_steps": 7}, "args"), ({"fingerprint": "b"}, "inputs"), ({}, "format")]
)
def test_a_file_under_another_ones_name_is_told(tmp_path, monkeypatch, changes, other):
    """Or without its sha256. Not even its metrics are taken."""
    one = find_or_make(new_run(tmp_path))[0].path
    with monkeypatch.context() as patch:
        patch.setattr("common.stages.FORMAT", 3 if other == "format" else 4)
        stage, _ = find_or_make(new_run(tmp_path, **changes))
    assert not stage.found  # a result of an older format is made anew
    for end in ("", ".sha256"):
        one.with_name(one.name + end).write_bytes(stage.path.with_name(stage.path.name + end).read_bytes())
    run = new_run(tmp_path)
    with pytest.raises(UserError, match=f"{one} was made from other {other}; delete {one.name} to make it anew"):
        find_or_make(run)
    one.with_name(f"{one.name}.sha256").unlink()
    with pytest.raises(UserError, match=f"{one} is damaged .*; delete {one.name} to make it anew"):
        find_or_make(run)
    assert run.records == []


# ---- Finished runs


def test_what_is_not_a_finished_run_is_told(tmp_path):
    """The folder of nothing, an unfinished run, and a run of a script with other arguments."""
    with pytest.raises(UserError, match=f"{tmp_path} is not the folder of a run"):
        Run.finished(tmp_path, Args)
    run = new_run(tmp_path)
    with pytest.raises(UserError, match=f"{run.folder} has not finished: give its command again"):
        Run.finished(run.folder, Args)
    (run.folder / "summary.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert Run.finished(run.folder, Args).args == run.args
    assert sorted(tmp_path.rglob("*")) == before
    content = json.loads((run.folder / "args.json").read_text())
    del content["args"]["gamma"]
    (run.folder / "args.json").write_text(json.dumps(content | {"args": content["args"] | {"expectile": 0.7}}))
    with pytest.raises(UserError, match=r"made by another version of the script \(expectile, gamma differ\)"):
        Run.finished(run.folder, Args)


def test_a_finished_run_is_not_loaded_from_other_data_or_without_its_results(tmp_path):
    run = new_run(tmp_path)
    (run.folder / "summary.txt").write_text("")
    again = Run.finished(run.folder, Args)
    facts = {"fingerprint": "other", "path": "data.hdf5"}
    with pytest.raises(UserError, match=f"{run.folder} was made from other data than data.hdf5 holds now"):
        again.open(SimpleNamespace(facts=lambda: facts), None)
    again.fingerprints["data"] = "data"
    with pytest.raises(UserError, match=f"{run.folder} has no .*world_model-.*: made by other code, or deleted"):
        find_or_make(again)
