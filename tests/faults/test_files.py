"""Damaged, cut and foreign files: noticed before they are used, and named."""

import io
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_interruptions import a_stage
from toy import ROOT, hopper_file
from trials import child, finish

import common.data
from common import UserError
from common.data import load_dataset
from common.run import Run
from common.stages import Kept
from dawm_td3bc import Args, train_inverse_dynamics
from local_datasets.collect import load_policies


def whole_cache(folder: Path):
    """Files, and what reads them: it returns the notice, or None if the file was taken as whole."""
    os.environ["DAWM_CACHE_DIR"] = str(folder / "cache")
    data = hopper_file(folder / "data.hdf5", episodes=3, length=10)
    good = load_dataset("hopper-medium-v2", data)
    flat = next((folder / "cache").glob("*.npz"))

    def read(told):
        found = load_dataset("hopper-medium-v2", data)  # damaged: told, read from the source, and mended
        assert np.array_equal(found.obs, good.obs) and np.array_equal(found.reward, good.reward)
        assert found.sha256 == good.sha256
        return told()

    return [flat, flat.with_suffix(".sha256")], read


def whole_stage(folder: Path):
    def new():
        run = Run(Args(env_id="test", device="cpu", run_dir=folder / "runs", stage_dir=folder / "stages"))
        run.open()
        run.fingerprints["data"] = "data"
        return run

    kept = Kept(new(), "inverse dynamics", train_inverse_dynamics)
    kept.run.log(1, {"idm/loss": 1.0})
    kept.keep({"weight": torch.arange(64.0), "bias": torch.ones(3)})

    def read(told):
        try:
            again = Kept(new(), "inverse dynamics", train_inverse_dynamics)
        except UserError as error:
            return str(error)
        assert torch.equal(again.tensors["weight"], torch.arange(64.0)) and again.run.records == [
            (1, {"idm/loss": 1.0})
        ]
        return None

    return [kept.folder / name for name in ("tensors.safetensors", "manifest.json", "manifest.sha256")], read


def whole_checkpoint(folder: Path):
    counter = torch.nn.Linear(8, 8)
    with a_stage(folder, (counter,), total=3) as stage:
        for _ in stage:
            pass
    newest = sorted(folder.glob("*.pt"))[-1]
    good = counter.weight.detach().clone()

    def read(told):
        other = torch.nn.Linear(8, 8)
        with a_stage(folder, (other,), total=0):
            assert torch.equal(other.weight, good)  # of the one before, which is whole
        return told()

    return [newest, Path(f"{newest}.sha256")], read


def whole_policy(folder: Path):
    behavior = Path(ROOT) / "local_datasets" / "behavior"
    for name in ("hopper-medium.safetensors", "SHA256SUMS"):
        (folder / name).write_bytes((behavior / name).read_bytes())

    def read(told):
        try:
            load_policies("hopper", "medium", folder)
        except UserError as error:
            return str(error)
        return None

    return [folder / "hopper-medium.safetensors"], read


KINDS = {"data cache": whole_cache, "stage file": whole_stage, "checkpoint": whole_checkpoint, "policy": whole_policy}


def damage_and_read(kind: str, folder: Path, damage, count: int, capsys) -> None:
    """`count` times: damage one of the files, read; the notice names it, what is used is whole."""
    files, read = KINDS[kind](folder)
    originals = {file: file.read_bytes() for file in files}
    for trial in range(count):
        random.seed(trial)
        file = files[trial % len(files)]
        file.write_bytes(damage(originals[file]))
        capsys.readouterr()
        notice = read(lambda: capsys.readouterr().out)
        named = file.parent.name if kind == "stage file" else file.name.split(".")[0]
        assert notice is not None and named in notice, (kind, trial, file, notice)
        for path, content in originals.items():
            path.write_bytes(content)


def flip(content: bytes) -> bytes:
    place, bit = random.randrange(len(content)), random.randrange(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def cut(content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


@pytest.mark.parametrize("kind", KINDS)
def test_single_bit_flips(kind, tmp_path, trials, capsys, told):
    count = trials(10, 250)
    damage_and_read(kind, tmp_path, flip, count, capsys)
    told(f"single-bit flips in a {kind}", f"{count} of {count} noticed, file named")


@pytest.mark.parametrize("kind", KINDS)
def test_truncation(kind, tmp_path, trials, capsys, told):
    count = trials(5, 50)
    damage_and_read(kind, tmp_path, cut, count, capsys)
    told(f"truncation of a {kind}", f"{count} of {count} noticed, file named")


def test_no_whole_checkpoint_is_an_error_with_a_way_out(tmp_path, capsys):
    whole_checkpoint(tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole; delete that folder to begin the stage again"):
        with a_stage(tmp_path, (torch.nn.Linear(8, 8),)):
            pass


# ---- Many processes, one cache


def test_eight_processes_build_one_cache(tmp_path, trials, told, monkeypatch):
    """One reads the file, seven wait and have what it wrote."""
    read = common.data._read_d4rl

    def slow(path):
        with open(tmp_path / "builds", "a") as file:
            file.write("1\n")
        time.sleep(0.3)
        return read(path)

    monkeypatch.setattr(common.data, "_read_d4rl", slow)
    data = hopper_file(tmp_path / "data.hdf5", episodes=3, length=10)
    with h5py.File(data) as file:
        expected = file["observations"][:]
    count = trials(2, 10)
    for trial in range(count):
        monkeypatch.setenv("DAWM_CACHE_DIR", str(tmp_path / f"cache{trial}"))
        (tmp_path / "builds").write_text("")

        def load():
            assert np.array_equal(load_dataset("hopper-medium-v2", data).obs, expected[: len(expected)])

        pids = [child(load, tmp_path / f"log{trial}") for _ in range(8)]
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 8
        assert (tmp_path / "builds").read_text() == "1\n"
    told("8 processes, one empty cache", f"{count} of {count}: one build, eight correct readers")


def test_a_builder_that_dies_frees_the_others(tmp_path, monkeypatch):
    read, data = common.data._read_d4rl, hopper_file(tmp_path / "data.hdf5", episodes=3, length=10)
    monkeypatch.setenv("DAWM_CACHE_DIR", str(tmp_path / "cache"))

    def for_ever(path):
        (tmp_path / "begun").touch()
        time.sleep(1000)

    monkeypatch.setattr(common.data, "_read_d4rl", for_ever)
    first = child(lambda: load_dataset("hopper-medium-v2", data), tmp_path / "log")
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    monkeypatch.setattr(common.data, "_read_d4rl", read)
    second = child(lambda: load_dataset("hopper-medium-v2", data), tmp_path / "log2")
    while not (tmp_path / "log2").exists() or "waiting for it" not in (tmp_path / "log2").read_text():
        time.sleep(0.01)
    os.kill(first, 9), os.waitpid(first, 0)
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 0


# ---- Full disks

SCRIPT = """
mount -t tmpfs -o size={size} tmpfs {disk} || exit 99
cd {root}
{fill}
{python} dawm_td3bc.py {arguments}
echo code $?
rm -f {disk}/filler
{python} dawm_td3bc.py {arguments}
echo code $?
cp -r {disk}/runs {out}
"""


def on_a_small_disk(tmp_path: Path, size: str, fill: str, arguments: str):
    disk = tmp_path / "disk"
    disk.mkdir()
    data = hopper_file(tmp_path / "data.hdf5")
    shared = f"--env-id hopper-medium-v2 --data-path {data} --run-dir {disk}/runs --stage-dir {disk}/stages --laptop "
    shared += "--device cpu --log-every 20 --checkpoint-every 1e-3 --unet-width 8 --idm-width 16 --idm-steps 60 "
    shared += "--eval-episodes 2 "
    text = SCRIPT.format(
        size=size, disk=disk, root=ROOT, fill=fill.format(disk=disk), python=sys.executable, out=tmp_path / "out",
        arguments=shared + arguments,
    )  # fmt: skip
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", text], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DAWM_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    if result.returncode == 99 or "unshare" in result.stderr[:40]:
        pytest.skip(f"this system gives no private tmpfs: {result.stderr.strip()[:100]}")
    return result


@pytest.mark.full
def test_a_full_disk_stops_nothing_that_was_made(tmp_path, told):
    """The disk fills while the world model trains: told, with path and free space; with room again the run ends."""
    fill = "(sleep 9; dd if=/dev/zero of={disk}/filler bs=64k 2>/dev/null) &"
    arguments = "--world-model-steps 1500 --agent-updates 200 --eval-every 100"
    result = on_a_small_disk(tmp_path, "24m", fill, arguments)
    codes = [line for line in result.stdout.splitlines() if line.startswith("code")]
    assert codes[1:] == ["code 0"], result.stdout[-1500:] + result.stderr[-1500:]
    told_it = "cannot write" in result.stdout + result.stderr and "MiB free there" in result.stdout + result.stderr
    assert told_it and codes[0] in ("code 0", "code 2"), result.stdout[-1500:]
    assert len(list((tmp_path / "out").glob("*/summary.txt"))) == 1
    told("disk full (tmpfs of 24 MiB, filled while training)", "told with path and free space; ends after room is made")


@pytest.mark.full
def test_checkpoints_that_would_not_fit_are_noticed_first(tmp_path):
    arguments = "--world-model-steps 20 --agent-updates 20 --eval-every 10 --unet-width 128 --unet-multipliers 1 4 8"
    result = on_a_small_disk(tmp_path, "24m", "true", arguments)
    assert (
        "the checkpoints of stage world model need" in result.stderr
        and "--checkpoint-every 0 makes none" in result.stderr
    )
    assert "code 2" in result.stdout


def test_a_read_only_folder_is_one_line(tmp_path):
    place = tmp_path / "file"
    place.touch()
    code = finish("dawm_td3bc", ["--env-id", "hopper-medium-v2", "--run-dir", str(place / "runs")], tmp_path / "log")
    assert code == 2 and (tmp_path / "log").read_text().count("\n") == 1
    assert "cannot write the run folder" in (tmp_path / "log").read_text()


# ---- Nothing foreign is executed


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "executed").exists()


def test_a_malicious_checkpoint_is_not_executed(nothing_runs):
    """A torch file that would make a folder when unpickled, with the right sha256 beside it."""
    folder = nothing_runs / "checkpoints"
    folder.mkdir()
    path = folder / "000000000001.pt"
    torch.save({"format": 1, "state": Malicious()}, path)
    Path(f"{path}.sha256").write_text(common.run._sha256(path))
    with pytest.raises(UserError, match=r"000000000001\.pt .*holds more than tensors and plain values"):
        with a_stage(folder, (torch.nn.Linear(8, 8),)):
            pass


def test_a_malicious_stage_or_policy_is_not_executed(nothing_runs):
    files, read = whole_stage(nothing_runs)
    files[0].write_bytes(pickle.dumps(Malicious()))
    assert "is damaged" in read(None)
    policy = nothing_runs / "hopper-medium.safetensors"
    policy.write_bytes(pickle.dumps(Malicious()))
    (nothing_runs / "SHA256SUMS").write_text(f"{common.run._sha256(policy)}  {policy.name}\n")
    with pytest.raises(UserError, match="hopper-medium"):
        load_policies("hopper", "medium", nothing_runs)


def test_a_malicious_cache_is_not_executed(nothing_runs, monkeypatch, capsys):
    """An npz with a pickled object in it, and the right sha256 beside."""
    files, read = whole_cache(nothing_runs)
    content = io.BytesIO()
    np.savez(content, obs=np.array([Malicious()], dtype=object))
    files[0].write_bytes(content.getvalue())
    files[1].write_text(common.data._sha256(files[0]))
    assert files[0].with_suffix("").name in read(lambda: capsys.readouterr().out)


@pytest.mark.parametrize(
    "env_id",
    ["../../etc/passwd-medium-v2", "local/../../hopper/medium-v0", "local/hopper/../../x-v0", "mujoco/../../../x-v0"],
)
def test_a_name_cannot_leave_its_folder(env_id, tmp_path):
    before = set(tmp_path.parent.rglob("*"))
    arguments = ["--env-id", env_id, "--run-dir", str(tmp_path / "runs"), "--stage-dir", str(tmp_path / "stages")]
    code = finish("dawm_td3bc", arguments, tmp_path / "log")
    assert code == 2 and (tmp_path / "log").read_text().startswith("error: "), (tmp_path / "log").read_text()
    assert {path.name for path in set(tmp_path.parent.rglob("*")) - before} <= {"log", "runs", "stages"}
