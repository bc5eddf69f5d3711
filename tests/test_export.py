"""common/export.py: what is exported reads back to the bit, is whole or not there, and says where it comes from."""

import json
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import common.export
from common import UserError
from common.cli import tell
from common.data import load_dataset
from common.export import Args, main
from common.files import write_whole

import h5py
import minari
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from toy import child, hopper_run

ID = "dawm/hopper-toy-v0"


@pytest.fixture
def made(made, toy, folders):
    """A finished run's folder, its kept set, and a folder to write to."""
    folder, _ = made("dawm_td3bc")
    kept = Path(json.loads((folder / "stages.json").read_text())["synthesize"])
    with safe_open(kept, "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    return SimpleNamespace(run=folder, kept=kept, tensors=tensors, header=header, out=folders, data=toy / "data.hdf5")


def kept_set(made, name="changed.safetensors", **tensors) -> Path:
    """Another kept set of the same run, with other tensors."""
    path, tensors = made.out / name, made.tensors | tensors
    write_whole(path, lambda file: file.write(save(tensors, made.header)), checksum=True)
    return path


def left(made) -> list[str]:
    """What an export has left, hidden things included, but for locks."""
    found = [*made.out.glob("out.hdf5"), *made.out.rglob(".export*"), *made.out.glob("minari/dawm/*")]
    return sorted(path.name for path in found if path.suffix != ".lock")


def test_both_forms_read_back_to_the_bit_and_say_where_they_come_from(made):
    """Falls among them, the sign of zero and subnormal numbers too."""
    rows, valid = made.tensors["rows"].clone(), made.tensors["valid"].clone()
    rows[::7, 0, -1], valid[::7, 1:] = 1, False
    rows[0, 0, 0], rows[1, 0, 0] = -0.0, 1e-40
    source = kept_set(made, rows=rows, valid=valid)
    main(Args(source, hdf5=made.out / "out.hdf5"))
    main(Args(source, minari=ID))
    flat = rows[valid].numpy()
    columns = zip(("obs", "action", "reward", "next_obs"), np.split(flat[:, :-1], [11, 14, 15], axis=1), strict=True)
    for dataset in (load_dataset("hopper-medium-v2", made.out / "out.hdf5"), load_dataset(ID)):
        assert dataset.lengths.tolist() == valid.sum(1).tolist() and dataset.complete.all()
        assert dataset.robot == "hopper" and dataset.physics == "d4rl"
        assert np.array_equal(dataset.terminated, flat[:, -1] > 0)
        for name, column in columns:
            assert getattr(dataset, name).reshape(column.shape).tobytes() == column.tobytes(), name
    with h5py.File(made.out / "out.hdf5") as file:
        ends = np.isin(np.arange(len(flat)), np.cumsum(valid.sum(1)) - 1)
        assert np.array_equal(file["terminals"][:] ^ file["timeouts"][:], ends) and file["timeouts"].dtype == bool
        found, told = json.loads(file["metadata/provenance"][()]), json.loads((made.run / "args.json").read_text())
    assert all(found["run"][key] == told[key] for key in ("data", "versions", "physics"))
    manifest = json.loads(made.header["manifest"])
    maker = manifest["run"]["module"]  # of the scripts that share the set, the one that ran first
    assert found["description"].startswith(f"Synthetic transitions made by {maker} from hopper-medium-v2")
    assert found["fingerprint"] == manifest["fingerprint"]
    assert left(made) == ["hopper-toy-v0", "out.hdf5"]
    stored = minari.load_dataset(ID)  # as any program reads it
    assert ID in minari.list_local_datasets() and "not recorded" in stored.storage.metadata["description"]
    assert (stored.total_episodes, stored.total_steps) == (len(valid), int(valid.sum()))
    assert stored.recover_environment().spec.id == "Hopper-v4"
    assert sum(len(episode.rewards) for episode in stored.sample_episodes(len(valid))) == valid.sum()


def test_refusals(made):
    (made.out / "there.hdf5").write_text("mine")
    (made.out / "minari" / "there" / "it-v0" / "data").mkdir(parents=True)
    wide = kept_set(made, "wide.safetensors", rows=torch.zeros(*made.tensors["valid"].shape, 30))
    other = made.out / "other"
    shutil.copytree(made.run, other)
    (other / "stages.json").write_text('{"agent": "x"}')
    damaged = kept_set(made, "damaged.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    out = made.out / "out.hdf5"
    for source, target, words in [
        (made.run, {}, "give one of --hdf5 FILE and --minari"),
        (made.run, {"hdf5": out, "minari": ID}, "give one of --hdf5 FILE and --minari"),
        (made.run, {"hdf5": made.out / "there.hdf5"}, "there.hdf5 exists and is never overwritten"),
        (made.run, {"hdf5": made.out / "no" / "such.hdf5"}, "no is no folder that can be written"),
        (made.run, {"minari": "there/it-v0"}, "it-v0 exists and is never overwritten"),
        (wide, {"hdf5": out}, "has rows of 30 columns, an export writes 27: obs, action, reward, next_obs, terminated"),
        (damaged, {"hdf5": out}, "is damaged"),
        (made.out, {"hdf5": out}, "is not the folder of a finished run"),
        (other, {"hdf5": out}, "keeps no synthetic set"),
        (made.out / "none.safetensors", {"hdf5": out}, "does not exist"),
        *(
            (made.run, {"minari": name}, "is no Minari id")
            for name in ("hopper-v0", "../x-v0", "dawm/../x-v0", "d/x y-v0")
        ),
    ]:
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            main(Args(source, **target))
    assert (made.out / "there.hdf5").read_text() == "mine"


def kill_at_the_end(source, out):
    common.export.sync = lambda path: signal.raise_signal(signal.SIGKILL)
    main(Args(source, hdf5=out))


def test_a_killed_export_leaves_no_target_and_is_made_again(made):
    process = child(kill_at_the_end, made.run, made.out / "out.hdf5", log=made.out / "log")
    process.join()
    assert process.exitcode == -signal.SIGKILL and left(made) == [".export-out.hdf5"]
    main(Args(made.run, hdf5=made.out / "out.hdf5"))
    assert left(made) == ["out.hdf5"]


def fill_the_disk(source, form, target):
    """Files may have 30 kB: both writers fail half-way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    tell(lambda: main(Args(source, **{form: target})))


@pytest.mark.parametrize("form", ["hdf5", "minari"])
def test_a_full_disk_is_told_and_leaves_nothing(made, form):
    log = made.out / "log"
    root = {"MINARI_DATASETS_PATH": str(made.out / "minari")}
    target = ID if form == "minari" else made.out / "out.hdf5"
    process = child(fill_the_disk, made.run, form, target, log=log, **root)
    process.join()
    assert process.exitcode == 2 and "cannot write" in log.read_text() and "Traceback" not in log.read_text()
    assert left(made) == []


def test_trajectories_completed_by_ssorl(made):
    """Exported are the recorded states and rewards, in their episodes, with the actions that the agent learns from."""
    options = "--laptop --device cpu --idm-steps 5 --idm-width 16 --agent-updates 2 --eval-every 2 --eval-episodes 1"
    hopper_run("baselines.ssorl", made.out, *options.split(), "--traj-filter", "none", "--label-fraction", 0.3)
    (summary,) = made.out.glob("runs/*/summary.txt")
    main(Args(summary.parent, hdf5=made.out / "out.hdf5"))
    real, out = (load_dataset("hopper-medium-v2", made.out / name) for name in ("data.hdf5", "out.hdf5"))
    assert sorted(real.lengths) == sorted(out.lengths) and real.reward.sum() == pytest.approx(out.reward.sum())
    known = {row.tobytes() for row in np.concatenate([real.obs, real.action], 1)}
    share = np.mean([row.tobytes() in known for row in np.concatenate([out.obs, out.action], 1)])
    assert 0.1 < share < 0.5  # three tenths of the trajectories keep their actions
