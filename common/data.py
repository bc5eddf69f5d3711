"""Offline data by name: D4RL files, Minari data sets, and local data sets made on this machine.

Whatever the source, a script gets one OfflineDataset of flat float32 arrays. Nothing here imports a D4RL package, and
no pickle is ever read.
"""

import difflib
import hashlib
import http.client
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import UserError

ROBOTS = {  # name: (simulator, obs_dim, action_dim)
    "hopper": ("Hopper-v4", 11, 3),
    "walker2d": ("Walker2d-v4", 17, 6),
    "halfcheetah": ("HalfCheetah-v4", 17, 6),
}
D4RL_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
LOCAL_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
D4RL_NAMES = [f"{robot}-{quality}-v2" for robot in ROBOTS for quality in D4RL_QUALITIES]
LOCAL_NAMES = [f"local/{robot}/{quality}-v0" for robot in ROBOTS for quality in LOCAL_QUALITIES]
D4RL_LOCATIONS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2",
    "https://huggingface.co/datasets/imone/D4RL/resolve/9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5",
)
D4RL_KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
CONNECT_SECONDS = 2  # offline must be told within two seconds
MAX_FILE_BYTES = 4 * 2**30  # the largest D4RL locomotion file has under 1 GiB

# Episodes and steps up to the last flag, and mean return, of the published files; their bytes and sha256 where
# independent users have pinned them (D4RL itself publishes no checksums).
KNOWN = {
    "hopper-medium-v2": (
        (2186, 999_906, 1422.06),
        152_756_557,
        "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0",
    ),
    "hopper-medium-replay-v2": (
        (2041, 402_000, 467.30),
        75_854_457,
        "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b",
    ),
    "hopper-medium-expert-v2": (
        (3213, 1_999_400, 2089.88),
        None,
        "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26",
    ),
    "hopper-expert-v2": ((1027, 999_494, 3511.36), None, None),
    "walker2d-medium-v2": ((1190, 999_995, 2852.09), None, None),
    "walker2d-medium-replay-v2": (
        (1093, 302_000, 682.70),
        86_323_963,
        "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db",
    ),
    "walker2d-medium-expert-v2": ((2190, 1_999_209, 3796.57), None, None),
    "walker2d-expert-v2": ((1000, 999_214, 4920.51), None, None),
    "halfcheetah-medium-v2": ((1000, 1_000_000, 4770.33), None, None),
    "halfcheetah-medium-replay-v2": ((202, 202_000, 3093.29), None, None),
    "halfcheetah-medium-expert-v2": ((2000, 2_000_000, 7713.38), None, None),
    "halfcheetah-expert-v2": ((1000, 1_000_000, 10656.43), None, None),
}


@dataclass
class OfflineDataset:
    """One row per transition, episodes end to end, dataset units, float32.

    obs, next_obs [N, obs_dim]; action [N, action_dim] in [-1, 1]; reward [N]; terminated [N] bool, true only where the
    robot fell (never at a time limit); lengths [E] rows per episode; complete [E] bool, false for an episode whose end
    the source does not mark (a file's cut tail). Inside an episode, next_obs of a row is obs of the following row.
    """

    ARRAYS = ("obs", "action", "reward", "next_obs", "terminated", "lengths", "complete")

    env_id: str
    source: str
    path: str
    sha256: str
    simulator: str
    simulator_kwargs: dict
    physics: str
    note: str
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    lengths: np.ndarray
    complete: np.ndarray

    @property
    def robot(self) -> str:
        """The D4RL robot ("hopper") or "" for any other simulator."""
        name = self.simulator.rsplit("-v", 1)[0].lower()
        return name if name in ROBOTS else ""

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each complete episode, or of every episode if none is complete."""
        starts = np.cumsum(self.lengths) - self.lengths
        returns = np.add.reduceat(self.reward.astype(np.float64), starts)
        return returns[self.complete] if self.complete.any() else returns

    @property
    def fingerprint(self) -> str:
        """sha256 of what was loaded, whatever file it came from and however that was read."""
        digest = hashlib.sha256(self.simulator.encode())
        for name in self.ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()

    def facts(self) -> dict:
        """What was really loaded, for the console and args.json."""
        return {
            "env_id": self.env_id,
            "source": self.source,
            "path": self.path,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
            "note": self.note,
            "episodes": len(self.lengths),
            "complete_episodes": int(self.complete.sum()),
            "steps": len(self.reward),
            "mean_return": float(self.returns.mean()),
            "std_return": float(self.returns.std()),
            "robot": self.robot,
            "simulator": self.simulator,
            "physics": self.physics,
        }


def load_dataset(env_id: str, data_path: Path | None = None) -> OfflineDataset:
    """The data that env_id names: a D4RL name, local/ROBOT/QUALITY-v0, or any other Minari id.

    data_path reads that file in D4RL's HDF5 layout instead of the published one. UserError says what is wrong with a
    name, a file or the network; nothing is ever substituted silently.
    """
    if data_path is not None and env_id not in D4RL_NAMES:
        raise UserError(f"--data-path goes with a D4RL name such as hopper-medium-v2, not with --env-id {env_id}")
    if env_id in D4RL_NAMES:
        dataset = _load_d4rl(env_id, data_path)
    elif env_id in LOCAL_NAMES:
        if not (_minari_root() / env_id / "data").exists():
            _make_local(env_id)
        dataset = _load_minari(env_id)
        dataset.source, dataset.physics = "local data set (shipped policies, not D4RL)", "d4rl"
    elif re.fullmatch(r"[\w-]+(/[\w-]+)+-v\d+", env_id) and not env_id.startswith("local/"):  # no dots: no way out
        dataset = _load_minari(env_id)
    else:
        raise UserError(f"unknown --env-id {env_id!r}; {_nearest(env_id)}")
    return dataset


def _nearest(env_id: str) -> str:
    found = difflib.get_close_matches(env_id, D4RL_NAMES + LOCAL_NAMES, n=3, cutoff=0.5)
    return f"nearest known: {', '.join(found or ['hopper-medium-v2', 'local/hopper/medium-v0'])}; or any Minari id"


# ---- D4RL files


def _load_d4rl(env_id: str, data_path: Path | None) -> OfflineDataset:
    robot, quality = env_id.removesuffix("-v2").split("-", 1)
    name = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    path = data_path or folder / name
    if data_path is not None and not path.is_file():
        raise UserError(f"--data-path {path} does not exist; give a file in D4RL's HDF5 layout")
    if not path.is_file():
        _download(env_id, name, path)
    simulator, obs_dim, action_dim = ROBOTS[robot]
    arrays, sha256 = _cached(path, _read_d4rl)
    dataset = OfflineDataset(
        env_id, "D4RL file", str(path), sha256, simulator, {}, "d4rl", "", **_checked(path, arrays, obs_dim, action_dim)
    )
    found = (int(dataset.complete.sum()), int(arrays["flagged_steps"]), float(arrays["flagged_return"]))
    dataset.note = _compare_with_published(env_id, found, sha256)
    if dataset.note.startswith("not the published") and data_path is None:
        raise UserError(f"{path}: {dataset.note}; delete it to download again, or use it knowingly with --data-path")
    return dataset


def _compare_with_published(env_id: str, found: tuple, sha256: str) -> str:
    """found: episodes, steps, mean return up to the last flag. One sentence; "not the published ..." if they differ."""
    if env_id not in KNOWN:
        return f"no counts are known for the published {env_id} file"
    (episodes, steps, mean), _, pinned = KNOWN[env_id]
    if pinned and sha256 == pinned:
        return f"the published {env_id} file (sha256 as pinned)"
    if found[:2] == (episodes, steps) and abs(found[2] - mean) <= 0.011:
        hint = f", though its sha256 is {sha256} and users have pinned {pinned}" if pinned else ""
        return f"counts and mean return are those of the published {env_id} file{hint}"
    return (
        f"not the published {env_id} file: {found[0]:,} episodes, {found[1]:,} steps, mean return {found[2]:.2f} here, "
        f"{episodes:,}, {steps:,} and {mean:.2f} there"
    )


def _read_d4rl(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a file in D4RL's HDF5 layout; UserError if it is damaged or a key is missing."""
    try:
        with h5py.File(path) as file:
            missing = [key for key in D4RL_KEYS if key not in file]
            if missing:
                raise UserError(f"{path} has no {', '.join(missing)}; D4RL's layout needs {', '.join(D4RL_KEYS)}")
            arrays = {key: file[key][:] for key in D4RL_KEYS}
        shapes = {key: array.shape for key, array in arrays.items()}
        obs, action, reward, next_obs = (np.asarray(arrays[key], np.float32) for key in D4RL_KEYS[:4])
        terminated, timeouts = (arrays[key].astype(bool) for key in D4RL_KEYS[4:])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:  # h5py raises all of these
        why = _why(error)
        raise UserError(f"{path} cannot be read as HDF5 ({why}): damaged or cut short; delete it and get it again")
    if len({len(array) for array in arrays.values()}) != 1 or len(obs) == 0:
        raise UserError(f"{path}: arrays of unequal or zero length {shapes}; every key needs one row per step")
    columns = (reward, terminated, timeouts)
    if obs.ndim != 2 or next_obs.shape != obs.shape or any(column.size != len(obs) for column in columns):
        raise UserError(f"{path}: wrong shapes {shapes}; one row per step, and one number for a reward or a flag")
    reward, terminated, timeouts = (column.reshape(-1) for column in columns)  # from (N,) or (N, 1)
    flagged = terminated | timeouts
    # An episode ends at a fall, a marked time-out, an unmarked one (the next row starts elsewhere), or the file's end.
    ends = flagged.copy()
    ends[:-1] |= (next_obs[:-1] != obs[1:]).any(axis=1)
    ends[-1] = True
    rows = np.flatnonzero(ends)
    last_flag = int(np.flatnonzero(flagged)[-1]) + 1 if flagged.any() else 0
    return {
        "obs": obs,
        "action": action,
        "reward": reward,
        "next_obs": next_obs,
        "terminated": terminated,
        "lengths": np.diff(rows, prepend=-1),
        "complete": flagged[rows],
        "flagged_steps": np.array(last_flag),
        "flagged_return": np.array(reward[:last_flag].sum(dtype=np.float64) / max(flagged.sum(), 1)),
    }


def _download(env_id: str, name: str, path: Path) -> None:
    """Fetch a published file to path: whichever location answers, resumed when cut, renamed when whole."""
    part = path.with_name(name + ".part")
    size, pinned = KNOWN.get(env_id, (None, None, None))[1:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(name + ".lock")):
            if path.is_file():  # another process fetched it meanwhile
                return
            for _ in range(5):  # each attempt goes on where the one before was cut
                if _fetch(name, part, path):
                    break
            else:
                raise UserError(f"{part}: cut short five times; the same command goes on from here")
            sha256 = _sha256(part)
            if (size and part.stat().st_size != size) or (pinned and sha256 != pinned):
                rejected = path.with_name(name + ".rejected")
                os.replace(part, rejected)
                raise UserError(
                    f"{rejected}: sha256 {sha256} ({rejected.stat().st_size} bytes), but users have pinned {pinned} "
                    f"({size or 'unknown'} bytes); delete it to download again, or use it with --data-path {rejected}"
                )
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); set D4RL_DATASET_DIR to a folder with space")


def _fetch(name: str, part: Path, path: Path) -> bool:
    """One attempt to complete `part`; true when it holds every byte that the server announced."""
    have = part.stat().st_size if part.exists() else 0
    response, reasons = _first_answer([f"{location}/{name}" for location in D4RL_LOCATIONS], have)
    if response is None and have and "HTTP 416" in reasons.values():
        part.unlink()  # already whole, or a part of something else: only a new start can tell
        return False
    if response is None:
        raise UserError(
            f"{name} is not at {path} and cannot be downloaded ("
            + "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
            + f"); put the file there, name one with --data-path, or use --env-id local/{name.split('_')[0]}/medium-v0"
        )
    resumed = response.status == 206
    total = int(response.headers.get("Content-Length", 0)) + have * resumed
    if total > MAX_FILE_BYTES:
        raise UserError(f"{response.url} announces {total} bytes, more than the {MAX_FILE_BYTES} of any known file")
    progress = tqdm(total=total or None, initial=have * resumed, unit="B", unit_scale=True, desc=name)
    with response, progress, open(part, "ab" if resumed else "wb") as file:
        while file.tell() <= MAX_FILE_BYTES:
            try:
                chunk = response.read(2**18)
            except (OSError, http.client.HTTPException):
                return False  # cut: what has come is kept
            if not chunk:
                break
            file.write(chunk)
            progress.update(len(chunk))
        return file.tell() >= total


def _first_answer(urls: list[str], start: int):
    """The first successful response among urls within CONNECT_SECONDS, else None; and why each other one failed."""
    answers: queue.Queue = queue.Queue()

    def ask(url: str) -> None:
        try:
            headers = {"Range": f"bytes={start}-"} if start else {}
            answers.put((url, urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30), ""))
        except urllib.error.HTTPError as error:
            answers.put((url, None, f"HTTP {error.code}"))
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put((url, None, f"no connection, {_why(error)}"))

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    reasons = dict.fromkeys(urls, f"no answer within {CONNECT_SECONDS} s")
    deadline = time.monotonic() + CONNECT_SECONDS
    for _ in urls:
        try:
            url, response, reason = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if response is not None:
            return response, {}
        reasons[url] = reason
    return None, reasons


# ---- Minari data sets, remote ones and those made here


def _minari_root() -> Path:
    return Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari/datasets"))  # as Minari reads it


def _make_local(env_id: str) -> None:
    """Roll out the shipped policies once; collect.py makes a second process wait and then read."""
    script = Path(__file__).resolve().parent.parent / "local_datasets" / "collect.py"
    if (code := subprocess.run([sys.executable, script, "--env-id", env_id]).returncode) != 0:
        sys.exit(code if code > 0 else 130)  # collect.py has said why, in one line, or got a signal as we did


def _load_minari(env_id: str) -> OfflineDataset:
    import minari  # slow to import, and D4RL files do not need it

    folder = _minari_root() / env_id
    try:
        if not (folder / "data").exists():
            _download_minari(env_id, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # v4 simulators announce their successor
            stored = minari.load_dataset(env_id)
        spec, spaces = stored.env_spec, (stored.observation_space, stored.action_space)
        if spec is None or not all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces):
            raise UserError(
                f"{env_id} needs flat Box observations and actions and a named simulator; "
                f"it has {[f'{type(space).__name__} {space.shape}' for space in spaces]}, {spec and spec.id}"
            )
        arrays, sha256 = _cached(folder / "data" / "main_data.hdf5", lambda _: _read_minari(stored))
    except (ValueError, OSError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"cannot read Minari data set {env_id} in {folder} ({_why(error)}); "
            "it must be whole and in Minari's hdf5 format: delete a cut one and try again"
        )
    checked = _checked(folder, arrays, *(space.shape[0] for space in spaces))
    kwargs = dict(spec.kwargs) | ({"max_episode_steps": spec.max_episode_steps} if spec.max_episode_steps else {})
    made_with = stored.storage.metadata.get("physics")  # told by data sets that were made here
    physics = "d4rl" if made_with == "d4rl" and spec.id in [simulator for simulator, *_ in ROBOTS.values()] else "stock"
    return OfflineDataset(env_id, "Minari data set", str(folder), sha256, spec.id, kwargs, physics, "", **checked)


def _download_minari(env_id: str, folder: Path) -> None:
    import minari

    response, reasons = _first_answer(["https://huggingface.co"], 0)
    if response is None:
        raise UserError(
            f"{env_id} is not in {folder} and cannot be downloaded ({reasons['https://huggingface.co']}); "
            + _nearest(env_id)
        )
    try:
        minari.download_dataset(env_id)
    except Exception as error:  # the hub client raises types of its own, and not only OSError
        raise UserError(f"cannot download Minari data set {env_id} ({_why(error)}); {_nearest(env_id)}")


def _read_minari(stored) -> dict[str, np.ndarray]:
    episodes = [
        (e.observations, e.actions, e.rewards, e.terminations, e.truncations) for e in stored.iterate_episodes()
    ]
    if not episodes:
        raise UserError(
            f"Minari data set {stored.id} holds no episode (its writing was cut); delete it and make it again"
        )
    for i, (o, a, *columns) in enumerate(episodes):  # Minari itself checks no shapes
        if not len(o) - 1 == len(a) > 0 or any(column.shape != (len(a),) for column in columns):
            raise UserError(
                f"Minari data set {stored.id}: episode {i} has {len(o)} observations, {len(a)} actions and rewards and "
                f"flags {[c.shape for c in columns]}; T actions need T + 1 observations, T rewards and T flags"
            )
    obs, action, reward, terminations, truncations = zip(*episodes, strict=True)
    return {
        "obs": np.concatenate([o[:-1] for o in obs]).astype(np.float32),
        "action": np.concatenate(action).astype(np.float32),
        "reward": np.concatenate(reward).astype(np.float32),
        "next_obs": np.concatenate([o[1:] for o in obs]).astype(np.float32),
        "terminated": np.concatenate(terminations).astype(bool),
        "lengths": np.array([len(r) for r in reward]),
        "complete": np.array([bool(t[-1] or c[-1]) for t, c in zip(terminations, truncations, strict=True)]),
    }


# ---- For every source


def _checked(path: Path, arrays: dict, obs_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    """The arrays of an OfflineDataset, or UserError for values that no learner should see."""
    arrays = {key: arrays[key] for key in OfflineDataset.ARRAYS}
    for key, dim in (("obs", obs_dim), ("next_obs", obs_dim), ("action", action_dim)):
        if arrays[key].ndim != 2 or arrays[key].shape[1] != dim:
            raise UserError(f"{path}: {key} has shape {arrays[key].shape}, but the simulator has {dim} dimensions")
    for key in ("obs", "next_obs", "action", "reward"):
        bad = ~np.isfinite(arrays[key])
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            raise UserError(f"{path}: {key} holds NaN or infinity, first in row {row}; drop such rows from the file")
    largest = float(np.abs(arrays["action"]).max())
    if largest > 1 + 1e-4:
        raise UserError(f"{path}: an action of {largest:.4g} lies outside [-1, 1]; rescale actions to that range")
    arrays["action"] = arrays["action"].clip(-1, 1)
    return arrays


def _cached(path: Path, read) -> tuple[dict[str, np.ndarray], str]:
    """read(path), kept as a flat npz so that the second start is fast; and the sha256 of path.

    The npz is used only for the same path, size and time of change, and only if its own sha256 file agrees. Of several
    processes one reads and writes, the others wait and have the npz.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} 2".encode()).hexdigest()[:24]
    flat = Path(os.environ.get("DAWM_CACHE_DIR", "~/.cache/dawm")).expanduser() / f"{key}.npz"
    try:
        flat.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{flat}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is reading {path}; waiting for it")
            lock.acquire()
    except OSError as error:
        print(f"note: no data cache at {flat.parent} ({error}); the next start reads {path} again")
        return read(path), _sha256(path)
    try:
        try:
            if flat.with_suffix(".sha256").read_bytes() == _sha256(flat).encode():
                with np.load(flat, allow_pickle=False) as stored:
                    arrays = dict(stored)
                    return arrays, str(arrays.pop("source"))
            print(f"note: {flat} is damaged (its sha256 is not that beside it); {path} is read again")
        except FileNotFoundError:
            pass  # no cache yet
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            print(f"note: {flat} is no cache of this code; {path} is read again")
        arrays, sha256 = read(path), _sha256(path)
        try:
            _write_cache(flat, arrays, sha256)
        except OSError as error:
            print(f"note: no data cache at {flat.parent} ({error}); the next start reads {path} again")
        return arrays, sha256
    finally:
        lock.release()


def _write_cache(flat: Path, arrays: dict, source: str) -> None:
    """The npz, with its source's sha256 in it, and then its own beside it: each whole or not at all."""
    for left in flat.parent.glob(f"{flat.stem}.*[0-9]"):  # of a process that was killed while it wrote
        if left.suffix[1:].isdigit():
            left.unlink()
    temporary = flat.with_suffix(f".{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays, source=np.array(source))
            file.flush()
            os.fsync(file.fileno())
        sha256 = _sha256(temporary)
        os.replace(temporary, flat)
        temporary.write_text(sha256)
        os.replace(temporary, flat.with_suffix(".sha256"))
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _why(error: Exception) -> str:
    """The error's own words in one line."""
    return " ".join(str(error).split()) or type(error).__name__
