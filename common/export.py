"""Synthetic transitions as data sets that other programs read: a file in D4RL's HDF5 layout, a Minari data set.

Each rollout becomes an episode, ended by a fall or cut as at a time limit. Both forms say where they come from (real
data, arguments, versions, sha256 of each stage) and how far the simulator agrees with a sample of the rows. Both are
there whole or not at all, and nothing that exists is ever overwritten.
"""

import datetime
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch

from common import UserError

PART = 16_384  # rows at a time: a set may be larger than memory
AUDITED = 20_000  # rows at most that the simulator is asked about
NOT_OURS = ("local", "mujoco", "D4RL", "minigrid", "atari")  # namespaces of data sets that others take for recorded
EPISODE_BYTES = 3_000  # at most, of an episode in Minari's HDF5 form, beside its numbers


def check_export(args) -> None:
    """UserError for an export that could not be written, or that nothing would be synthesised for."""
    for flag, target in (("--export-hdf5", args.export_hdf5), ("--export-minari", args.export_minari)):
        if target is None:
            continue
        if getattr(args, "synthetic_fraction", 1) == 0:
            raise UserError(f"{flag} {target}: --synthetic-fraction 0 synthesises nothing; leave one of the two out")
        if getattr(args, "synthesis", "dataset") == "online":
            raise UserError(f"{flag} {target}: --synthesis online keeps no set to export; use --synthesis dataset")
        if flag == "--export-hdf5":
            place, written = target.parent, target
            if not place.is_dir():
                raise UserError(f"{flag} {target}: {place} is no folder; make it, or give another path")
        else:
            place, written = _minari_root(), _minari_root() / target
            if not re.fullmatch(r"[\w-]{2,}(/[\w-]+)+-v\d+", target):
                raise UserError(f"{flag} {target!r} is no Minari id; give NAMESPACE/NAME-vN, such as dawm/hopper-v0")
            if target.split("/")[0] in NOT_OURS:
                raise UserError(f"{flag} {target}: {target.split('/')[0]}/ is for recorded data; give another one")
            if inside := [x for x in written.parents if (x / "data").exists() and place in x.parents]:
                raise UserError(f"{flag} {target} lies inside the data set {inside[0]}; give another id")
        if os.path.lexists(written) and not _of_an_interrupted_run(args, written):
            raise UserError(f"{flag} {target}: {written} exists and is never overwritten; delete it, or give another")
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise UserError(f"{flag} {target}: cannot write in {place} ({error.strerror}); give another")


def export_transitions(run, rows: torch.Tensor, longest: int, dataset, evaluator, stepper, method: str) -> None:
    """Write rows [N, 2 * obs_dim + action_dim + 2], rollouts of at most `longest` end to end, as --export-* ask for.

    `dataset` is the real data, `stepper` makes the simulator for the audit. A disk that does not take it is told, and
    the run goes on.
    """
    args = run.args
    if args.export_hdf5 is None and args.export_minari is None:
        return
    with run.timed("audit"):
        lengths = rollout_lengths(rows, dataset.obs.shape[1], longest)
        provenance = _provenance(run, rows, lengths, dataset, method)
        try:
            simulate = stepper(dataset.simulator, args.physics, dataset.simulator_kwargs, args.threads or None)
            provenance["audit"] = audit(rows, lengths, dataset, simulate)
        except UserError as error:
            provenance["audit"] = f"not available: {error}"
    if args.export_hdf5 is not None:
        path = args.export_hdf5
        _export(run, "export hdf5", path.parent, path.name, write_hdf5, rows, lengths, dataset, provenance)
    if args.export_minari is not None:
        write = partial(write_minari, env=evaluator.envs[0])
        _export(run, "export minari", _minari_root(), args.export_minari, write, rows, lengths, dataset, provenance)


def _export(run, name: str, place: Path, target: str, write, rows, lengths, dataset, provenance: dict) -> None:
    """Write in a hidden folder of `place`, on the disk, then rename; the closing table tells path, size and sha256."""
    path, stem = place / target, f".export-{target.replace('/', '-')}"
    work = place / f"{stem}.{os.getpid()}"
    try:
        for left in place.glob(f"{glob.escape(stem)}.*"):
            if left == work or not _is_alive(left.suffix[1:]):  # of a process that was killed while it wrote
                shutil.rmtree(left)
        if os.path.lexists(path):  # of the interrupted run that goes on here: check_export has seen to that
            if (_stored_provenance(path) or {}).get("stages") != provenance["stages"]:
                raise FileExistsError(errno.EEXIST, "it holds another set and is never overwritten")
            run.reused(name, f"already in {path}, {_size_and_sha256(path)}")
            return
        work.mkdir(parents=True)
        needed = rows.nbytes + (EPISODE_BYTES * len(lengths) if write is not write_hdf5 else 2**20)
        if needed > (free := shutil.disk_usage(work).free):
            raise OSError(errno.ENOSPC, f"needs {needed / 2**20:,.0f} MiB of {free / 2**20:,.0f} MiB free")
        with run.stage(name, len(rows), "row") as stage:
            write(work, target, rows, lengths, dataset, provenance, stage)
            for made in work.rglob("*"):
                _sync(made)
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "it has come into being meanwhile and is never overwritten")
            os.replace(work / target, path)
            _sync(path.parent)
        text = f"{path}, {len(rows):,} rows in {len(lengths):,} rollouts, {_size_and_sha256(path)}"
        run.stages[name] = (run.stages[name][0], text)
        run.say(name, text)
    except (OSError, RuntimeError) as error:  # h5py tells a full disk as either
        why = " ".join((getattr(error, "strerror", None) or str(error)).split())
        run.reused(name, f"NOT written to {path} ({why}); the run goes on, and the same command exports the kept set")
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---- Rollouts


def rollout_lengths(rows: torch.Tensor, obs_dim: int, longest: int) -> np.ndarray:
    """Rows of each rollout [R], in order.

    A rollout ends with a fall, before a row that starts elsewhere, and after `longest` rows, even if the next one
    happens to start where it ends.
    """
    starts, before = [], None
    for first in range(0, len(rows), PART):
        part = rows[first : first + PART].cpu().numpy()
        bits = np.ascontiguousarray(part).view(np.int32)  # one rollout shares its states to the bit
        obs, next_obs = bits[:, :obs_dim], bits[:, -1 - obs_dim : -1]
        follows = np.zeros(len(part), bool)
        follows[1:] = (obs[1:] == next_obs[:-1]).all(1) & (part[:-1, -1] == 0)
        follows[0] = before is not None and (obs[0] == before[0]).all() and before[1] == 0
        starts.append(first + np.flatnonzero(~follows))
        before = next_obs[-1], part[-1, -1]
    runs = np.diff(np.concatenate(starts), append=len(rows))
    pieces = -(-runs // longest)
    lengths = np.full(pieces.sum(), longest)
    lengths[np.cumsum(pieces) - 1] = runs - (pieces - 1) * longest
    return lengths


def _parts(rows: torch.Tensor, lengths: np.ndarray, dataset):
    """Whole rollouts, about PART rows at a time: (obs, action, reward, next_obs, terminated), lengths."""
    obs_dim, action_dim = dataset.obs.shape[1], dataset.action.shape[1]
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        start = ends[first] - lengths[first]
        last = max(first + 1, np.searchsorted(ends, start + PART, side="right"))
        part = rows[start : ends[last - 1]].cpu().numpy()
        obs, action, reward, next_obs, terminated = np.split(part, np.cumsum([obs_dim, action_dim, 1, obs_dim]), axis=1)
        yield (obs, action, reward[:, 0], next_obs, terminated[:, 0] > 0), lengths[first:last]
        first = last


# ---- The two forms


# HDF5 that runs into a full disk cannot close its file any more, and brings the process down later. So it only lays out
# a file whose rows are written without it, or is asked to write what the disk has been seen to have room for.


def write_hdf5(work: Path, target: str, rows, lengths, dataset, provenance: dict, stage) -> None:
    """A file in D4RL's layout, not compressed: gzip takes a sixth off generated rows, and could not be written so."""
    count, obs_dim, action_dim = len(rows), dataset.obs.shape[1], dataset.action.shape[1]
    shapes = {
        "observations": (count, obs_dim), "actions": (count, action_dim), "rewards": (count,),
        "next_observations": (count, obs_dim), "terminals": (count,), "timeouts": (count,),
    }  # fmt: skip
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    places = []
    _try_room(work, rows.nbytes + 2**20)
    with h5py.File(work / target, "w") as file:
        for key, shape in shapes.items():
            kind = bool if key in ("terminals", "timeouts") else np.float32
            places.append(file.create_dataset(key, shape, kind, dcpl=room).id.get_offset())
        file["metadata/description"] = provenance["description"]
        file["metadata/provenance"] = json.dumps(provenance)
    with open(work / target, "r+b") as file:
        for (*columns, terminated), part_lengths in _parts(rows, lengths, dataset):
            ends = np.zeros(len(terminated), bool)
            ends[np.cumsum(part_lengths) - 1] = True
            for which, column in enumerate((*columns, terminated, ends & ~terminated)):
                file.seek(places[which])
                places[which] += file.write(np.ascontiguousarray(column).data)
            stage.update(len(terminated))


def write_minari(work: Path, target: str, rows, lengths, dataset, provenance: dict, stage, env) -> None:
    """A Minari data set under the root `work`: made by the library, which reads it, but for the episodes themselves.

    Its own writer makes each array growable, which takes seven times the room for two steps, and slows down as the file
    grows: with fixed arrays too it had not done 140,000 episodes after ten minutes. The layout is its HDF5Storage's.
    """
    import minari  # slow to import

    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(work)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Minari asks for an author's address
            storage = minari.create_dataset_from_buffers(
                target,
                [],
                env=env,
                eval_env=env,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (dataset.obs.shape[1],), np.float32),
                algorithm_name=provenance["method"],
                description=provenance["description"],
                data_format="hdf5",
            ).storage
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
    kinds = {np.dtype(kind): h5py.h5t.py_create(np.dtype(kind), logical=True) for kind in (np.float32, bool, np.int64)}
    room = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    room.set_fill_time(h5py.h5d.FILL_TIME_NEVER)

    def put(make, group, key: bytes, array: np.ndarray, *how):
        array = np.asarray(array, order="C")
        space = h5py.h5s.create_simple(array.shape) if array.ndim else h5py.h5s.create(h5py.h5s.SCALAR)
        return make(group, key, kinds[array.dtype], space, *how), array

    path, number = storage.data_path / "main_data.hdf5", 0
    with h5py.File(path, "w", libver=("v110", "v110"), track_order=True) as file:
        for (obs, action, reward, next_obs, terminated), part_lengths in _parts(rows, lengths, dataset):
            _try_room(work, 2 * EPISODE_BYTES * len(part_lengths) + 2**26)
            stop = 0
            for length in part_lengths:
                start, stop = stop, stop + length
                group = h5py.h5g.create(file.id, b"episode_%d" % number)
                for key, value in ((b"id", number), (b"total_steps", length)):
                    attribute, value = put(h5py.h5a.create, group, key, np.array(value, np.int64))
                    attribute.write(value)
                for key, array in {
                    b"observations": np.concatenate([obs[start:stop], next_obs[stop - 1 : stop]]),
                    b"actions": action[start:stop],
                    b"rewards": reward[start:stop],
                    b"terminations": terminated[start:stop],
                    b"truncations": (np.arange(start, stop) == stop - 1) & ~terminated[stop - 1],
                }.items():
                    made, array = put(h5py.h5d.create, group, key, array, room)
                    made.write(h5py.h5s.ALL, h5py.h5s.ALL, array)
                number += 1
                stage.update(int(length))
    storage.update_metadata(
        {
            "total_episodes": len(lengths),
            "total_steps": len(rows),
            "dataset_size": round(path.stat().st_size / 1e6, 1),
            "physics": provenance["args"]["physics"],
            "provenance": provenance,
        }
    )


# ---- Where it comes from


def _provenance(run, rows, lengths: np.ndarray, dataset, method: str) -> dict:
    """All but the audit, as plain values."""
    told = json.loads((run.folder / "args.json").read_text())
    falls = int(rows[:, -1].sum(dtype=torch.float64))
    return {
        "description": f"Synthetic transitions made by {method} from {dataset.env_id}, not recorded ones.",
        "method": method,
        "script": Path(told["command"][0]).name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "run": run.folder.name,
        "stages": {
            stage: {"sha256": sha256, "kept": run.kept.get(stage)} for stage, sha256 in run.fingerprints.items()
        },
        "counts": {
            "transitions": len(rows),
            "rollouts": len(lengths),
            "longest_rollout": int(lengths.max()),
            "terminated": falls,
            "cut": len(lengths) - falls,
        },
        **{key: told[key] for key in ("data", "args", "constants", "versions", "git", "code", "hardware")},
    }


def audit(rows: torch.Tensor, lengths: np.ndarray, dataset, simulate) -> dict:
    """How far the simulator agrees with rows drawn evenly: one from each of AUDITED equal parts of the set.

    Errors are in standard deviations of the real data: of a state the root mean square over its dimensions.
    """
    count = min(len(rows), AUDITED)
    index = ((np.arange(count) + np.random.default_rng(0).random(count)) * (len(rows) / count)).astype(np.int64)
    index = index.clip(0, len(rows) - 1)
    starts = np.cumsum(lengths) - lengths
    first = starts[np.searchsorted(starts, index, side="right") - 1] == index
    drawn = rows[torch.as_tensor(index, device=rows.device)]
    ((obs, action, reward, next_obs, terminated), _) = next(_parts(drawn, np.array([count]), dataset))
    true_next, true_reward, true_terminated = simulate(obs, action)
    known = simulate.checkable(obs) & np.isfinite(true_next).all(1)
    if not known.any():
        raise UserError(f"the simulator's state is unknown for all of {count} rows")
    state = np.sqrt(np.square((next_obs - true_next) / (dataset.obs.std(0, dtype=float) + 1e-6)).mean(1))
    errors = {"state": state, "reward": np.abs(reward - true_reward) / (dataset.reward.std(dtype=float) + 1e-6)}

    def spread(error, which):
        found = error[which & known]
        return {"median": float(np.median(found)), "90%": float(np.quantile(found, 0.9))} if len(found) else None

    return {
        "rows": count,
        "uncheckable_share": float(1 - known.mean()),
        "state_error": {"first step": spread(state, first), "all steps": spread(state, known)},
        "reward_error": {"first step": spread(errors["reward"], first), "all steps": spread(errors["reward"], known)},
        "termination": {
            "agreement": float((terminated == true_terminated)[known].mean()),
            "told": int(terminated[known].sum()),
            "in_the_simulator": int(true_terminated[known].sum()),
            "both": int((terminated & true_terminated)[known].sum()),
        },
        "units": "standard deviations of the real data; a state's is the root mean square over its dimensions",
    }


def _stored_provenance(path: Path) -> dict | None:
    """What an export says of itself; None if `path` is none."""
    try:
        if path.is_dir():
            return json.loads((path / "data" / "metadata.json").read_text())["provenance"]
        with h5py.File(path) as file:
            return json.loads(file["metadata/provenance"][()])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _of_an_interrupted_run(args, path: Path) -> bool:
    """Whether the same command has written `path` and was stopped after that: it goes on, and finds its export."""
    found = _stored_provenance(path) or {}
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    asked = json.loads(json.dumps(asked)) | {"physics": found.get("args", {}).get("physics")}  # by then it was known
    folder = Path(args.run_dir) / found.get("run", ".")
    return found.get("args") == asked and (folder / "args.json").exists() and not (folder / "summary.txt").exists()


# ---- Files


def _minari_root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari/datasets"))  # as Minari reads it


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def _try_room(folder: Path, size: int) -> None:
    """OSError, and nothing spoilt, if `size` bytes cannot be written there now, for want of space or by a quota."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _size_and_sha256(path: Path) -> str:
    path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{path.stat().st_size / 2**20:,.1f} MiB, sha256 {sha256}"
