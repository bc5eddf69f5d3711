"""common/stages.py and run.py: what a stage's key hashes, and that a kept result is whole, its own, and made once.

Kills, damage and many processes are in tests/faults.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import dawm_td3bc as script
from common import UserError
from common.run import Run
from common.stages import depends, stage_source
from dawm_td3bc import Args

import pytest
import torch
from toy import child, new_run, without_times

# ---- The source of a stage

MODULE = '''
"""A script."""
import math

SCALES = {"hopper": 400}
LIMIT = 3


class Args:
    rate: float = 0.1


class Model:
    """A class that only an annotation names."""

    def __init__(self, args: Args):
        self.args = args

    def size(self):
        return self.args.width * 2


class Unread:
    pass


def deeper(args):
    """Called by what the stage calls."""
    return args.depth - SCALES["hopper"]


def helper(args, x):
    # a comment
    return x + args.rate * deeper(args)


def stage(args: Args, model: Model, run):
    """Train."""
    return helper(args, LIMIT) + model.size() + run.args.shared + run.other


def unrelated(args, x):
    return args.elsewhere + stage(args, x, x)
'''
FIELDS = ["depth", "rate", "shared", "width"]  # read by the stage, what it calls, that again, an annotation's class


@pytest.fixture
def source_of(tmp_path, monkeypatch):
    """Write a module, import it, and ask for its function `stage`."""

    def source_of(text):
        name = f"module_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return stage_source(module.stage)

    return source_of


def edited(*changes):
    text = MODULE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_words_order_and_what_is_not_used_do_not_matter(source_of):
    source, fields = source_of(MODULE)
    assert fields == FIELDS
    for changes in (
        [("    # a comment\n", "")],
        [("return self.args.width * 2", "return self.args.width*2  # doubled")],
        [('"""Train."""', '"""Train, worded\n\n    anew."""')],
        [('    """Train."""\n', ""), ('    """Called by what the stage calls."""\n', "")],
        [('"""A class that only an annotation names."""', '"""Another."""')],
        [("rate: float = 0.1", "rate: float = 0.2")],  # a default is no input, its value is
        [("return args.elsewhere + stage(args, x, x)", "return args.nowhere")],
        [("class Unread:\n    pass", "class Unread:\n    args = LIMIT")],
        [("import math", "import math\nimport cmath\n\nNEW = 5\n")],
    ):
        assert source_of(edited(*changes)) == (source, fields), changes
    head, *rest = MODULE.strip().split("\n\n\n")
    assert source_of("\n\n\n".join([head, *sorted(rest)])) == (source, fields)  # Args and Model still stand first


def test_a_changed_line_in_what_is_used_matters(source_of):
    source, _ = source_of(MODULE)
    for change in (
        ("return helper(args, LIMIT)", "return -helper(args, LIMIT)"),
        ("return x + args.rate", "return x - args.rate"),  # called
        ("return args.depth -", "return args.depth +"),  # called by the called
        ("self.args.width * 2", "self.args.width * 3"),  # in a class of an annotation
        ("LIMIT = 3", "LIMIT = 4"),  # a constant
        ("LIMIT = 3\n", 'LIMIT = 3\nSCALES["hopper"] = 500\n'),  # what changes a constant later
        ('{"hopper": 400}', '{"hopper": 550}'),  # a constant that the called reads
        ("def stage(args: Args, model: Model, run)", "def stage(args: Args, model: Unread, run)"),
    ):
        assert source_of(edited(change))[0] != source, change


def test_arguments_count_under_any_name_that_is_annotated_so(source_of):
    renamed = edited(
        ("def helper(args, x):", "def helper(config: Args, x):"),
        ("return x + args.rate * deeper(args)", "return x + config.rate * deeper(config)"),
    )
    assert source_of(renamed)[1] == FIELDS


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


def test_a_full_disk_costs_a_shared_result_alone_and_never_the_agent(tmp_path, monkeypatch, capsys):
    """The run goes on without the file of a world model; without the agent's it would have made nothing."""
    run = new_run(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.stages.write_whole", full)
    find_or_make(run)
    assert "world model      could not be kept (cannot write" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot write .*agent\.safetensors \(No space left on device; .* MiB free"):
        with run.stage(script.train_agent, 1, "update", keeps={"x": torch.ones(1)}, private=True) as stage:
            list(stage)


def fit(folder, stop_at: int):
    """Six updates of a small network, each logged; a kill stands for update `stop_at`."""
    torch.manual_seed(0)
    layer, state = torch.nn.Linear(3, 3), {}
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    run = new_run(folder, checkpoint_every=1e-9)
    with run.stage(fit, 6, "update", keeps=layer, saves=(optimizer, state)) as stage:
        for step in stage:
            if step == stop_at:
                raise KeyboardInterrupt
            loss = layer(torch.randn(5, 3)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state |= {"value": loss.item(), "tensors": [loss.detach()]}
            run.log(step, {"loss": loss})
    weights = [parameter.tolist() for parameter in layer.parameters()]
    return stage.at, weights, state["value"], run.history["loss"], torch.rand(3).tolist()


def test_a_checkpoint_restores_networks_optimizers_dicts_random_streams_and_metrics(tmp_path):
    whole = fit(tmp_path / "whole", 0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", 4)
    assert len(list((tmp_path / "cut").rglob("*.pt"))) == 2
    assert fit(tmp_path / "cut", 0) == whole and whole[0] == 6
    assert not list(tmp_path.rglob("*.pt"))


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


# ---- The children of all tests


def say_where_you_come_from() -> None:
    print("variants.joint_td3bc" in sys.modules, len(list(Path(f"/proc/{os.getppid()}/task").iterdir())))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by Linux's /proc")
def test_children_come_from_a_warm_process_of_one_thread(tmp_path):
    """Forked from one with several, a child may hang: newer Pythons warn of it."""
    child(say_where_you_come_from, log=tmp_path / "log").join()
    assert (tmp_path / "log").read_text() == "True 1\n"
