"""Damaged, cut and foreign files: noticed before they are used, and named. Full disks. Nothing foreign is executed."""

import errno
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

from common import UserError
from common.files import sha256_of, write_whole
from local_datasets.collect import load_policies

import pytest
import torch
from safetensors.torch import save_file
from toy import ROOT, TOY_IDM, folders_below, hopper_arguments, new_run
from trials import Counter, checkpoints, counting


def whole_result(folder: Path, private: bool = False):
    """Files, and what reads them: it returns the notice, or None if the file was taken as whole."""

    def find_or_make() -> str | None:
        weights, run = {"weight": torch.arange(64.0), "bias": torch.ones(3)}, new_run(folder)
        if private:
            run.folder = folder  # as Run.finished finds it
        kept = {} if (folder / "made").exists() else dict(weights)
        try:
            with run.stage(whole_result, 1, "step", keeps=kept, private=private) as stage:
                for step in stage:
                    run.log(step, {"idm/loss": 1.0})
        except UserError as error:
            return str(error)
        assert all(torch.equal(kept[name], weights[name]) for name in weights)
        assert run.history["idm/loss"] == [(1, 1.0)]

    find_or_make()
    (folder / "made").touch()
    return [*folder.rglob("whole_result*.safetensors"), *folder.rglob("whole_result*.sha256")], lambda _: find_or_make()


def whole_private_result(folder: Path):
    return whole_result(folder, private=True)


def whole_checkpoint(folder: Path):
    with pytest.raises(KeyboardInterrupt), counting(folder, counter := Counter()) as stage:
        for step in stage:
            counter.number.fill_(step)
            if step == 4:
                raise KeyboardInterrupt
    newest = checkpoints(folder)[-1]

    def read(told):
        with pytest.raises(KeyboardInterrupt), counting(folder, counter := Counter()) as stage:
            assert (counter.number == stage.done).all()
            raise KeyboardInterrupt
        for damaged in newest.parent.glob("*.damaged"):
            damaged.unlink()
        return told() if stage.done == 2 else None  # of the one before, which is whole

    return [newest, Path(f"{newest}.sha256")], read


def whole_policy(folder: Path):
    for name in ("hopper-medium.safetensors", "SHA256SUMS"):
        (folder / name).write_bytes((ROOT / "local_datasets" / "behavior" / name).read_bytes())

    def read(_):
        try:
            load_policies("hopper", "medium", folder)
        except UserError as error:
            return str(error)

    return [folder / "hopper-medium.safetensors"], read


KINDS = {
    "kept result": whole_result,
    "agent of a run": whole_private_result,
    "checkpoint": whole_checkpoint,
    "policy": whole_policy,
}


def damage_and_read(kind: str, folder: Path, damage, count: int, capsys) -> None:
    """`count` times: damage one of the files, read; the notice names it, what is used is whole."""
    files, read = KINDS[kind](folder)
    originals = {file: file.read_bytes() for file in files}
    assert files and read(lambda: None) is None
    for trial in range(count):
        random.seed(trial)
        file = files[trial % len(files)]
        file.write_bytes(damage(originals[file]))
        capsys.readouterr()
        notice = read(lambda: capsys.readouterr().out)
        assert notice and file.name.split(".")[0] in notice, (kind, trial, file, notice)
        for path, content in originals.items():
            path.write_bytes(content)


def flip(content: bytes) -> bytes:
    place, bit = random.randrange(len(content)), random.randrange(8)
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def cut(content: bytes) -> bytes:
    return content[: random.randrange(len(content))]


@pytest.mark.parametrize("kind", KINDS)
def test_single_bit_flips_and_truncation(kind, tmp_path, trials, capsys, told):
    for name, damage, count in (("single-bit flips", flip, trials(6, 250)), ("truncation", cut, trials(4, 50))):
        folder = tmp_path / name
        folder.mkdir()
        damage_and_read(kind, folder, damage, count, capsys)
        told(f"{name}: {kind}", f"{count} of {count} noticed, file named")


def test_without_a_whole_checkpoint_the_stage_begins_anew(tmp_path, capsys):
    whole_checkpoint(tmp_path)
    for path in checkpoints(tmp_path):
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(KeyboardInterrupt), counting(tmp_path) as stage:
        assert stage.done == 0 and capsys.readouterr().out.count("is damaged") == 2
        raise KeyboardInterrupt


def test_a_write_that_fails_names_its_path(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    told = rf"cannot write {tmp_path / 'file'} \(No space left on device; .* MiB free there\)"
    with pytest.raises(UserError, match=told):
        write_whole(tmp_path / "file", lambda file: file.write(b"after"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


# ---- Full disks

SMALL = "--laptop --device cpu --log-every 20 --eval-episodes 2 --checkpoint-every 1e-3 --unet-width 8 "
SMALL += "--world-model-steps 1000 --agent-updates 400 --eval-every 200"


@pytest.mark.full
@pytest.mark.parametrize("stage", ["world_model", "agent"])
def test_a_full_disk_stops_nothing_that_was_made(stage, tmp_path, told):
    """The disk fills while a stage trains: told, with path and free space; with room again the run ends."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = hopper_arguments(tmp_path, *TOY_IDM, *folders_below(disk), *SMALL.split())
    text = f"""
mount -t tmpfs -o size=24m tmpfs {disk} || exit 99
(until find {disk} -path '*.{stage}-*' -name '*.pt' | grep -q .; do sleep 0.02; done
 dd if=/dev/zero of={disk}/filler bs=64k 2>/dev/null) &
for i in 1 2; do
  {sys.executable} dawm_td3bc.py {" ".join(map(str, words))}; echo code $?; rm -f {disk}/filler
done
cp -r {disk}/runs {tmp_path}/out
"""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", text]
    result = subprocess.run(unshare, capture_output=True, text=True, cwd=ROOT)
    if result.returncode == 99 or "unshare" in result.stderr[:40]:
        pytest.skip(f"this system gives no private tmpfs: {result.stderr.strip()[:100]}")
    codes, text = [x for x in result.stdout.splitlines() if x.startswith("code")], result.stdout + result.stderr
    assert "cannot write" in text and "MiB free there" in text, text[-2000:]
    assert codes == ["code 2", "code 0"], (codes, text[-2000:])
    assert len(list((tmp_path / "out").glob("*/summary.txt"))) == 1
    told(f"disk full (tmpfs of 24 MiB, filled in stage {stage})", "told with path and space; ends after room is made")


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
    whole_checkpoint(nothing_runs)
    for path in checkpoints(nothing_runs):
        torch.save({"state": Malicious()}, path)
        Path(f"{path}.sha256").write_text(sha256_of(path))
    with pytest.raises(UserError, match=r"000000000003\.pt holds more than tensors and plain values"):
        with counting(nothing_runs):
            pass


def test_a_malicious_result_or_policy_is_not_executed(nothing_runs):
    """Pickles where safetensors should be, and a safetensors file without a manifest, their sha256 beside them."""
    (result, beside), read = whole_result(nothing_runs)
    result.write_bytes(pickle.dumps(Malicious()))
    assert "is damaged" in read(None)
    beside.write_text(sha256_of(result))
    assert f"{result} is no kept result" in read(None)
    save_file({"weight": torch.ones(3)}, result)
    beside.write_text(sha256_of(result))
    assert f"{result} is no kept result" in read(None)
    policy = nothing_runs / "hopper-medium.safetensors"
    policy.write_bytes(pickle.dumps(Malicious()))
    (nothing_runs / "SHA256SUMS").write_text(f"{sha256_of(policy)}  {policy.name}\n")
    with pytest.raises(UserError, match="hopper-medium"):
        load_policies("hopper", "medium", nothing_runs)
