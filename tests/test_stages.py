"""common/stages.py: what a stage's key hashes, and that a kept result is whole, its own, and made once."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dawm_td3bc as script
from common import UserError
from common.run import Run
from common.stages import Kept, RowFile, depends, stage_source
from dawm_td3bc import Args

ROOT = Path(__file__).resolve().parent.parent

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


def test_the_fields_are_those_read_on_the_way(source_of):
    """By the stage, by what it calls, by that again, and by the methods of a class in an annotation."""
    _, fields = source_of(MODULE)
    assert fields == ["depth", "rate", "shared", "width"]


@pytest.mark.parametrize(
    "changes",
    [
        [("    # a comment\n", "")],
        [("return self.args.width * 2", "return self.args.width*2  # doubled")],
        [('"""Train."""', '"""Train, worded\n\n    anew."""')],
        [('    """Train."""\n', ""), ('    """Called by what the stage calls."""\n', "")],
        [('"""A class that only an annotation names."""', '"""Another."""')],
        [('"""A script."""', '"""Another script."""')],
        [("rate: float = 0.1", "rate: float = 0.2")],  # a default is no input, its value is
        [("return args.elsewhere + stage(args, x, x)", "return args.nowhere")],
        [("class Unread:\n    pass", "class Unread:\n    args = LIMIT")],
        [("import math", "import math\nimport cmath\n\nNEW = 5\n")],
    ],
    ids=lambda changes: changes[0][0].strip().split("\n")[0],
)
def test_words_order_and_what_is_not_used_do_not_matter(source_of, changes):
    assert source_of(edited(*changes)) == source_of(MODULE)


def test_arguments_count_under_any_name_that_is_annotated_so(source_of):
    renamed = edited(
        ("def helper(args, x):", "def helper(config: Args, x):"),
        ("return x + args.rate * deeper(args)", "return x + config.rate * deeper(config)"),
    )
    assert source_of(renamed)[1] == ["depth", "rate", "shared", "width"]


def test_what_changes_a_constant_later_counts(source_of):
    changed = edited(("LIMIT = 3\n", 'LIMIT = 3\nSCALES["hopper"] = 500\n'))
    assert source_of(changed)[0] != source_of(MODULE)[0]
    assert "400" in source_of(changed)[0] and "500" in source_of(changed)[0]


def test_the_order_of_definitions_does_not_matter(source_of):
    head, args, *rest = MODULE.strip().split("\n\n\n")
    classes = [part for part in rest if part.startswith("class")]
    functions = [part for part in rest if part.startswith("def")]
    constants = head.split("\n\n")[-1]
    turned = [head.removesuffix(constants), args, *reversed(classes), *reversed(functions), constants]
    assert sorted("".join(turned)) == sorted("".join([head, args, *rest]))  # nothing is lost
    assert source_of("\n\n\n".join(turned)) == source_of(MODULE)


@pytest.mark.parametrize(
    "change",
    [
        ("return helper(args, LIMIT)", "return -helper(args, LIMIT)"),
        ("return x + args.rate", "return x - args.rate"),  # called
        ("return args.depth -", "return args.depth +"),  # called by the called
        ("self.args.width * 2", "self.args.width * 3"),  # in a class of an annotation
        ("LIMIT = 3", "LIMIT = 4"),  # a constant
        ('{"hopper": 400}', '{"hopper": 550}'),  # a constant that the called reads
        ("def stage(args: Args, model: Model, run)", "def stage(args: Args, model: Unread, run)"),
    ],
)
def test_a_changed_line_in_what_is_used_matters(source_of, change):
    assert source_of(edited(change))[0] != source_of(MODULE)[0]


def test_the_world_model_depends_on_no_argument_of_a_later_stage():
    _, fields = stage_source(script.train_world_model)
    assert {"world_model_steps", "unet_width", "model_horizon", "prediction", "gamma"} <= set(fields)
    later = {"guidance_scale", "sampling_steps", "sampling_temperature", "target_return", "horizon", "idm_steps"}
    assert not {*later, "agent_lr", "seed", "device", "stage_dir", "fresh"} & set(fields)


def test_the_synthesis_depends_on_what_is_asked_of_the_models_and_not_on_the_agent():
    _, fields = stage_source(script.synthesize)
    asked = {"guidance_scale", "sampling_steps", "sampling_temperature", "target_return", "horizon", "termination"}
    assert {*asked, "conditioning_subsample", "synthesis_seed"} <= set(fields)
    assert not {"agent_lr", "seed", "eval_every", "world_model_steps", "idm_steps"} & set(fields)


def test_every_field_that_a_stage_reads_is_an_argument():
    for stage in (script.train_world_model, script.train_inverse_dynamics, script.synthesize):
        assert set(stage_source(stage)[1]) <= vars(Args()).keys()


def test_tf32_makes_another_result_on_a_gpu_alone():
    def key(device, tf32):
        run = SimpleNamespace(device=torch.device(device), args=Args(tf32=tf32), fingerprints={})
        return depends(run, "idm", script.mlp, ())[1]

    assert key("cpu", True) == key("cpu", False) and key("cuda", True) != key("cuda", False)


@pytest.mark.parametrize("tf32", [True, False])  # in this order: the next tests are as they were
def test_tf32_is_set_for_products_and_convolutions(tmp_path, monkeypatch, tf32):
    monkeypatch.setattr("common.run.select_device", lambda name: torch.device("cuda"))
    Run(Args(run_dir=tmp_path, tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


# ---- Keep and find

STAGES = {
    "world model": (script.train_world_model, ()),
    "inverse dynamics": (script.train_inverse_dynamics, ()),
    "synthesis": (script.synthesize, ("world model", "inverse dynamics")),
}
TENSORS = {
    "weight": torch.tensor([[1.0, -0.0, 3.0], [1e-40, 3e38, -3e38]]).T,  # not contiguous
    "count": torch.arange(5),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(0.1, dtype=torch.float64),
}
METRICS = [(10, {"world_model/loss": 0.75}), (5, {"b": 1 / 3, "a": 1e-30}), (10, {"world_model/loss": -2.0})]


@pytest.fixture
def new_run(tmp_path):
    def new_run(fingerprint="data", **changes):
        folders = dict(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages")
        run = Run(Args(**{"env_id": "test", "device": "cpu", **folders, **changes}))
        run.open()
        run.fingerprints["data"] = fingerprint
        return run

    return new_run


def find_or_make(run, stage="world model", tensors=TENSORS) -> Kept:
    function, after = STAGES[stage]
    kept = Kept(run, stage, function, after)
    if kept.tensors is None:
        for step, values in METRICS:
            run.log(step, values)
        kept.keep(tensors)
    return kept


def same_bits(a: dict, b: dict) -> bool:
    def bits(tensors):
        return {name: (x.dtype, x.shape, x.numpy().tobytes()) for name, x in tensors.items()}

    return bits(a) == bits(b)


def test_a_kept_result_is_found_bit_for_bit_with_its_metrics(new_run, capsys):
    first, second = new_run(agent_lr=1e-3), new_run()
    first.log(1, {"before/the_stage": 1.0})
    made = find_or_make(first)
    first.log(2, {"after/the_stage": 1.0})
    capsys.readouterr()
    found = find_or_make(second)
    assert made.tensors is None and same_bits(found.tensors, TENSORS)
    assert first.records[1:-1] == second.records == METRICS
    lines = [(run.folder / "metrics.jsonl").read_text().splitlines() for run in (first, second)]
    assert lines[0][1:-1] == lines[1] and len(lines[1]) == 3
    assert found.folder.parent == Path(second.args.stage_dir) and f"reused {found.folder}" in capsys.readouterr().out
    assert "reused" in second.stages["world model"][1] and second.kept == first.kept == {
        "world model": found.folder.name
    }  # fmt: skip


def test_fresh_reads_nothing_and_replaces_what_is_there(new_run):
    folder = find_or_make(new_run()).folder
    (folder / "manifest.json").write_text("{")
    (folder / "more").touch()
    other = {"weight": torch.ones(2)}
    made = find_or_make(new_run(fresh=True), tensors=other)
    assert made.tensors is None and made.folder == folder and not (folder / "more").exists()
    assert same_bits(find_or_make(new_run()).tensors, other)


@pytest.mark.parametrize("same", [{}, {"agent_lr": 1e-2}, {"target_return": 0.3}, {"seed": 5}, {"threads": 1}])
def test_what_the_stage_does_not_read_finds_the_same_folder(new_run, same):
    assert find_or_make(new_run()).folder == find_or_make(new_run(**same)).folder


@pytest.mark.parametrize(
    "other",
    [{"fingerprint": "other"}, {"world_model_steps": 7}, {"unet_multipliers": (1, 4)}, {"env_id": "b"}],
    ids=lambda other: next(iter(other)),
)
def test_other_data_or_another_argument_makes_a_new_folder(new_run, other):
    one, two = find_or_make(new_run()), find_or_make(new_run(**other))
    assert two.tensors is None and two.folder != one.folder and one.folder.exists()


def test_another_kind_of_device_makes_a_new_folder(new_run):
    one, elsewhere = find_or_make(new_run()), new_run()
    elsewhere.device = torch.device("mps")
    assert find_or_make(elsewhere).folder != one.folder


def test_another_source_makes_a_new_folder(new_run, monkeypatch):
    one = find_or_make(new_run())
    monkeypatch.setattr("common.stages.stage_source", lambda f: (stage_source(f)[0] + "\n0", stage_source(f)[1]))
    two = find_or_make(new_run())
    assert two.tensors is None and two.folder != one.folder
    assert two.depends["args"] == one.depends["args"]


def test_a_stage_builds_on_the_results_before_it(new_run):
    """Another world model: the same inverse dynamics, and another synthesis, though it reads the same arguments."""
    kept = []
    for steps in (5, 6):
        run, made = new_run(world_model_steps=steps), {"world model": {"weight": torch.full((2,), float(steps))}}
        kept.append({stage: find_or_make(run, stage, made.get(stage, TENSORS)) for stage in STAGES})
    one, two = kept
    assert two["inverse dynamics"].folder == one["inverse dynamics"].folder
    assert two["synthesis"].folder != one["synthesis"].folder and two["synthesis"].tensors is None
    assert two["synthesis"].depends["args"] == one["synthesis"].depends["args"]


def test_what_was_made_anew_with_another_result_is_not_built_on_as_before(new_run):
    """--fresh on another machine may give other weights under the same name: its synthesis is another one."""
    first = new_run()
    for stage in STAGES:
        find_or_make(first, stage)
    again, later = new_run(fresh=True), new_run()
    find_or_make(again, tensors={"weight": torch.zeros(3)})
    found = {stage: find_or_make(later, stage) for stage in STAGES}
    assert found["world model"].tensors is not None and found["synthesis"].tensors is None


# ---- Faults


def without_manifest(folder):
    (folder / "manifest.json").unlink()


def cut_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def manifest_of_something_else(folder):
    (folder / "manifest.json").write_text("[1, 2]")


def other_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


def cut_tensors(folder):
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flipped_bit(folder):
    path = folder / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_tensors(folder):
    (folder / "tensors.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_manifest, "holds no readable manifest.json"),
        (cut_manifest, "holds no readable manifest.json"),
        (manifest_of_something_else, "holds no readable manifest.json"),
        (other_format, "is of format 0, this code reads 2"),
        (cut_tensors, "tensors.safetensors is damaged"),
        (flipped_bit, "tensors.safetensors is damaged"),
        (without_tensors, "tensors.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line_and_never_read(new_run, damage, message):
    folder, run = find_or_make(new_run()).folder, new_run()
    damage(folder)
    with pytest.raises(UserError) as stop:
        find_or_make(run)
    text = str(stop.value)
    assert text.startswith(str(folder)) and message in text and "--fresh" in text and "\n" not in text
    assert run.records == []  # not even the metrics


def test_a_folder_under_another_ones_name_is_told(new_run):
    one, two = find_or_make(new_run()).folder, find_or_make(new_run("other data", world_model_steps=7)).folder
    shutil.rmtree(one)
    shutil.copytree(two, one)
    with pytest.raises(UserError, match=f"{one.name} was made from other args, inputs than its name says; delete"):
        find_or_make(new_run())


@pytest.mark.parametrize("place", ["/dev/null/x", "file"])
def test_a_store_that_cannot_be_written_is_told_before_anything_is_made(new_run, tmp_path, place):
    (tmp_path / "file").touch()
    where = tmp_path / place  # an absolute place stays itself
    with pytest.raises(UserError, match=f"cannot write the stage store {where} .*; give another --stage-dir"):
        Kept(new_run(stage_dir=where), "world model", script.train_world_model)


# ---- Other processes

DRIVER = '''
"""A script of one stage, which writes a line to `made` whenever it is made. How it ends is the first argument."""
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path

import torch

import common.stages
from common.run import Run, run_script

HERE = Path(__file__).parent


@dataclass
class Args:
    # ---- Run
    env_id: str = "test"
    """."""
    exp_name: str = "driver"
    """."""
    seed: int = 0
    """."""
    device: str = "cpu"
    """."""
    threads: int = 1
    """."""
    tf32: bool = False
    """."""
    track: bool = False
    """."""
    fresh: bool = False
    """."""
    run_dir: Path = HERE / "runs"
    """."""
    stage_dir: Path = HERE / "stages"
    """."""
    end: str = ""
    """."""


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(tensors, path):
    save_file(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def stage(run):
    kept = common.stages.Kept(run, "toy", stage)
    if kept.tensors is None:
        with open(HERE / "made", "a") as file:
            file.write("once\\n")
        while not (HERE / "go").exists():
            time.sleep(0.01)
        kept.keep({"x": torch.arange(100_000)})
    return kept.tensors


def main(args):
    global save_file
    save_file = common.stages.save_file
    if args.end == "while saving":
        common.stages.save_file = save_half
    if args.end == "before the manifest":
        common.stages._sha256 = die
    if args.end == "before the rename":
        Path.rename = die
    run = Run(args)
    run.open()
    run.fingerprints["data"] = "data"
    found = stage(run)
    print("found" if found is not None and found["x"].equal(torch.arange(100_000)) else "made")


if __name__ == "__main__":
    run_script(main, Args, {})
'''


@pytest.fixture
def start(tmp_path):
    """Start the driver; its output goes to the returned process's `.log`. None outlives the test."""
    (tmp_path / "driver.py").write_text(DRIVER)
    processes = []

    def start(*arguments):
        log = tmp_path / f"log{len(processes)}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(log, "w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, tmp_path / "driver.py", *arguments], env=environment, stdout=file, stderr=file
                )
            )
        processes[-1].log = log
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ended(process) -> tuple[int, str]:
    code = process.wait(timeout=120)
    return code, process.log.read_text()


@pytest.mark.parametrize("end", ["while saving", "before the manifest", "before the rename"])
def test_a_killed_process_leaves_nothing_that_is_read_and_no_lock(start, tmp_path, end):
    (tmp_path / "go").touch()
    code, text = ended(start("--end", end))
    assert code == -signal.SIGKILL, text
    assert (tmp_path / "made").read_text() == "once\n"
    code, text = ended(start())
    assert code == 0 and text.endswith("made\n") and "waiting" not in text, text
    code, text = ended(start())
    assert code == 0 and text.endswith("found\n") and "reused" in text, text
    assert (tmp_path / "made").read_text() == "once\n" * 2


def test_of_two_processes_one_makes_the_result_and_the_other_waits_for_it(start, tmp_path):
    both = [start(), start()]
    stop = time.monotonic() + 60
    while not any("waiting" in process.log.read_text() for process in both) and time.monotonic() < stop:
        assert all(process.poll() is None for process in both), [process.log.read_text() for process in both]
        time.sleep(0.05)
    (tmp_path / "go").touch()  # only now may the result be finished
    (_, made), (_, found) = sorted(map(ended, both), key=lambda result: "waiting" in result[1])
    assert (tmp_path / "made").read_text() == "once\n"
    assert made.endswith("made\n") and "waiting" not in made
    assert found.endswith("found\n") and found.index("waiting for it") < found.index("reused")


# ---- Rows that grow on disk


def row_file(folder: Path, width: int) -> RowFile:
    return RowFile(
        SimpleNamespace(checkpoint_folders={"rows": folder}, not_finite=lambda *what: "not finite"), "rows", width
    )


def test_rows_that_are_not_finite_are_not_stored(tmp_path):
    rows = row_file(tmp_path, 2)
    with pytest.raises(UserError, match="not finite"):
        rows.append(torch.tensor([[1.0, float("nan")]]))
    assert rows.size == 0


def test_rows_on_disk_are_the_rows(tmp_path):
    made = [torch.randn(n, 3) for n in (4, 1, 7)]
    rows = row_file(tmp_path / "stage", 3)
    for part in made:
        rows.append(part)
    assert torch.equal(rows.tensor(torch.device("cpu")), torch.cat(made))


def test_rows_go_on_behind_the_checkpoint(tmp_path):
    """What was written after the checkpoint is written again; what is there is checked against its sha256."""
    rows = row_file(tmp_path, 2)
    rows.append(torch.ones(3, 2))
    state = rows.state_dict()
    rows.append(torch.full((5, 2), 7.0))
    again = row_file(tmp_path, 2)
    again.load_state_dict(state)
    again.append(torch.zeros(1, 2))
    assert torch.equal(again.tensor(torch.device("cpu")), torch.cat([torch.ones(3, 2), torch.zeros(1, 2)]))
    content = bytearray((tmp_path / "rows.f32").read_bytes())
    for damaged in (content[:-12], bytes([content[0] ^ 1]) + content[1:]):
        (tmp_path / "rows.f32").write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows.f32 is damaged; delete .* to begin the stage again"):
            row_file(tmp_path, 2).load_state_dict(state)


def test_rows_on_a_full_disk_name_their_file(tmp_path):
    rows = row_file(tmp_path, 2)
    rows.file = open("/dev/full", "wb")
    with pytest.raises(OSError) as error:
        rows.append(torch.ones(3, 2))
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "rows.f32")


def test_a_set_on_disk_takes_no_memory(tmp_path):
    """400 MB are appended, kept and found again with less than 100 MB of memory that is not the file's own pages."""
    code = f"""
import sys
import torch
from pathlib import Path
from types import SimpleNamespace
from common.stages import RowFile
from safetensors.torch import load_file, save_file

def own():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

run = SimpleNamespace(checkpoint_folders={{"rows": Path({str(tmp_path)!r})}})
rows, before, part = RowFile(run, "rows", 10), own(), torch.ones(100_000, 10)
most = 0
for _ in range(100):
    rows.append(part)
    most = max(most, own() - before)
made = rows.tensor(torch.device("cpu"))
save_file({{"rows": made}}, {str(tmp_path / "kept")!r})
found = load_file({str(tmp_path / "kept")!r})["rows"]
total = sum(found.index_select(0, torch.randint(len(found), (256,))).sum().item() for _ in range(100))
print(len(found), total, max(most, own() - before))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, total, megabytes = map(float, result.stdout.split())
    assert count == 10_000_000 and total == 256_000 and megabytes < 100
