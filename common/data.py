"""Offline data by name: D4RL files, Minari data sets, and local data sets made on this machine.

Whatever the source, a script gets one OfflineDataset of flat float32 arrays, and what the source says of itself has
been held against its rows. Nothing here imports a D4RL package, and no pickle is ever read.
"""

import difflib
import hashlib
import http.client
import os
import re
import subprocess
import sys
import threading
import urllib.request
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from common import UserError
from common.evaluation import described, fall_rule, from_box, is_unchanged, make_env, plain, robot_of
from common.files import one_line, sha256_of, take_lock

import gymnasium as gym
import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec

ROBOTS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
D4RL_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
LOCAL_QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
D4RL_NAMES = [f"{robot}-{quality}-v2" for robot in ROBOTS for quality in D4RL_QUALITIES]
LOCAL_NAMES = [f"local/{robot}/{quality}-v0" for robot in ROBOTS for quality in LOCAL_QUALITIES]
LOCAL_RECIPE = 2  # of local_datasets/collect.py; by 1 actions were not rounded, and CPUs made different sets
D4RL_ON_HUB = dict(repo_id="imone/D4RL", repo_type="dataset", revision="9ed58d8a76c12f4c1cb5db51fa71389e703d2ec5")
D4RL_ELSEWHERE = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
D4RL_KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
MINARI_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
CONNECT_SECONDS = 2  # offline must be told within two seconds
UNBOUNDED = 1e10  # of an action; some write the largest float for infinity
LEARNING = ("NormalizeObservation", "NormalizeReward")  # wrappers that change what a policy sees and is paid

# Episodes and steps up to the last flag, mean return, and sha256 of the published files. D4RL publishes no checksums:
# these are what independent users have pinned.
KNOWN = {
    "hopper-medium-v2": (2186, 999_906, 1422.06, "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"),
    "hopper-medium-replay-v2":
        (2041, 402_000, 467.30, "e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b"),
    "hopper-medium-expert-v2":
        (3213, 1_999_400, 2089.88, "9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26"),
    "hopper-expert-v2": (1027, 999_494, 3511.36, None),
    "walker2d-medium-v2": (1190, 999_995, 2852.09, None),
    "walker2d-medium-replay-v2":
        (1093, 302_000, 682.70, "e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db"),
    "walker2d-medium-expert-v2": (2190, 1_999_209, 3796.57, None),
    "walker2d-expert-v2": (1000, 999_214, 4920.51, None),
    "halfcheetah-medium-v2": (1000, 1_000_000, 4770.33, None),
    "halfcheetah-medium-replay-v2": (202, 202_000, 3093.29, None),
    "halfcheetah-medium-expert-v2": (2000, 2_000_000, 7713.38, None),
    "halfcheetah-expert-v2": (1000, 1_000_000, 10656.43, None),
}  # fmt: skip


@dataclass
class OfflineDataset:
    """One row per transition, episodes end to end, float32.

    obs, next_obs [N, obs_dim], reward [N] in dataset units; action [N, action_dim] in [-1, 1], mapped from the
    environment's Box [action_low, action_high]; terminated [N] bool, true only where the episode ended for good (never
    at a time limit); lengths [E] rows per episode; complete [E] bool, false for an episode whose end the source does
    not mark (a file's cut tail). Inside an episode, next_obs of a row is obs of the following row.

    healthy_low, healthy_high [obs_dim]: the simulator's fall rule, fallen unless low < obs < high; None where no rule
    is known or the rows contradict it.
    """

    env_id: str
    source: str
    path: str
    sha256: str
    note: str
    spec: EnvSpec
    physics: str
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    lengths: np.ndarray
    complete: np.ndarray
    action_low: np.ndarray
    action_high: np.ndarray
    healthy_low: np.ndarray | None = None
    healthy_high: np.ndarray | None = None

    @property
    def robot(self) -> str:
        """The D4RL robot ("hopper") if the environment is the unchanged one that D4RL's scores are for, else ""."""
        return robot_of(self.spec) if is_unchanged(self.spec) else ""

    @property
    def last(self) -> np.ndarray:
        """[E] the last row of each episode."""
        return np.cumsum(self.lengths) - 1

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each complete episode, or of every episode if none is complete."""
        returns = np.add.reduceat(self.reward.astype(np.float64), self.last + 1 - self.lengths)
        return returns[self.complete] if self.complete.any() else returns

    @property
    def mean_return(self) -> float:
        return float(self.returns.mean())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what was loaded, whatever file it came from and however that was read."""
        digest = hashlib.sha256(repr(self.spec).encode())
        for field in fields(self):
            if field.type in (np.ndarray, np.ndarray | None) and (array := getattr(self, field.name)) is not None:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def facts(self) -> dict:
        """What was really loaded, for the console and args.json."""
        told = ("env_id", "source", "path", "sha256", "fingerprint", "note", "mean_return", "robot", "physics")
        return {name: getattr(self, name) for name in told} | {
            "episodes": len(self.lengths),
            "complete_episodes": int(self.complete.sum()),
            "steps": len(self.reward),
            "std_return": float(self.returns.std()),
            "simulator": described(self.spec),
        }


def load_dataset(env_id: str, data_path: Path | None = None) -> OfflineDataset:
    """The data that env_id names: a D4RL name, local/ROBOT/QUALITY-v0, or any other Minari id.

    data_path reads that file in D4RL's HDF5 layout instead of the published one. UserError says what is wrong with a
    name, a file or the network, a printed warning what is odd; nothing is ever substituted silently.
    """
    if env_id in D4RL_NAMES:
        return _load_d4rl(env_id, data_path)
    if data_path is not None:
        raise UserError(f"--data-path goes with a D4RL name such as hopper-medium-v2, not with --env-id {env_id}")
    is_id = re.fullmatch(r"[\w-]+(/[\w-]+)*-v\d+", env_id)  # no dots: no way out of the root
    if not is_id or not os.path.exists(minari_root() / env_id / "data"):
        if env_id in LOCAL_NAMES:
            _make_local(env_id)
        elif is_id and "/" in env_id and not env_id.startswith("local/"):
            _download(env_id, minari_root() / env_id, _nearest(env_id))
        else:
            raise UserError(f"unknown --env-id {env_id!r}; {_nearest(env_id)}")
    return _load_minari(env_id)


def _nearest(env_id: str) -> str:
    found = difflib.get_close_matches(env_id, D4RL_NAMES + LOCAL_NAMES)
    found = ", ".join(found or ["hopper-medium-v2", "local/hopper/medium-v0"])
    return f"nearest known: {found}; or any Minari id, as D4RL/pen/human-v2 for D4RL's other tasks"


# ---- D4RL files


def _load_d4rl(env_id: str, data_path: Path | None) -> OfflineDataset:
    robot, quality = env_id.removesuffix("-v2").split("-", 1)
    name = f"{robot}_{quality.replace('-', '_')}-v2.hdf5"
    path = data_path or Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / name
    if not os.path.isfile(path):
        if data_path is not None:
            raise UserError(f"--data-path {path} is no file that this user can see; give one in D4RL's HDF5 layout")
        way_out = f"put {D4RL_ELSEWHERE}/{name} there, name a file with --data-path, or use local/{robot}/medium-v0"
        _download(env_id, path, way_out)
    with _reading(path, "write or copy it again" if data_path else "delete it to download again"):
        with h5py.File(path) as file:
            columns = {key: _array(file, key, f"D4RL's layout needs {', '.join(D4RL_KEYS)}") for key in D4RL_KEYS}
        facts = {"env_id": env_id, "source": "D4RL file", "path": str(path), "sha256": sha256_of(path)}
    spec = plain(gym.registry[ROBOTS[robot]])
    dataset = _checked(facts | {"spec": spec, "physics": "d4rl"}, columns, make_env(spec))
    dataset.note = _compare_with_published(dataset)
    if dataset.note.startswith("not the published") and data_path is None:
        raise UserError(f"{path}: {dataset.note}; delete it to download again, or use it knowingly with --data-path")
    return dataset


def _compare_with_published(dataset: OfflineDataset) -> str:
    """One sentence; "not the published ..." if episodes, steps or mean return up to the last flag differ."""
    if dataset.env_id not in KNOWN:
        return f"no counts are known for the published {dataset.env_id} file"
    episodes, steps, mean, pinned = KNOWN[dataset.env_id]
    if dataset.sha256 == pinned:
        return f"the published {dataset.env_id} file (sha256 as pinned)"
    flagged = dataset.last[dataset.complete]
    rows = int(flagged[-1]) + 1 if len(flagged) else 0
    found = dataset.reward[:rows].sum(dtype=np.float64) / max(len(flagged), 1)
    if (len(flagged), rows) == (episodes, steps) and abs(found - mean) <= 0.011:
        differs = f", but not the sha256 that users have pinned ({pinned})" if pinned else ""
        return f"counts and mean return are those of the published {dataset.env_id} file{differs}"
    return (
        f"not the published {dataset.env_id} file: {len(flagged):,} episodes, {rows:,} steps, mean return {found:.2f} "
        f"here, {episodes:,}, {steps:,} and {mean:.2f} there"
    )


# ---- Downloads


def _download(env_id: str, path: Path, way_out: str) -> None:
    """Have Hugging Face's client, or Minari's, which asks the same hub, put what env_id names at `path`."""
    try:
        hub = _answering_hub()
        if env_id in D4RL_NAMES:
            from huggingface_hub import hf_hub_download  # slow to import, and being offline is to be told at once

            path.parent.mkdir(parents=True, exist_ok=True)
            with take_lock(path):
                if not path.is_file():
                    hf_hub_download(filename=path.name, **D4RL_ON_HUB, local_dir=path.parent, endpoint=hub)
        else:
            import minari

            minari.download_dataset(env_id)
    except Exception as error:  # the clients have types of their own, and not only OSError
        raise UserError(f"{env_id} is not in {path} and cannot be downloaded ({one_line(error)}); {way_out}")


def _answering_hub() -> str:
    """The address of Hugging Face's hub; ConnectionError if it gives no answer within CONNECT_SECONDS."""
    hub, trouble = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), [f"no answer within {CONNECT_SECONDS} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(hub, timeout=2 * CONNECT_SECONDS).close()  # longer than is waited below
            trouble.clear()
        except (OSError, ValueError, http.client.HTTPException) as error:
            trouble[:] = [] if isinstance(error, urllib.error.HTTPError) else [one_line(error)]

    thread = threading.Thread(target=ask, daemon=True)  # to look up a name may hang
    thread.start()
    thread.join(CONNECT_SECONDS)
    if trouble:
        raise ConnectionError(f"{hub}: {trouble[0]}")
    return hub


# ---- Minari data sets, remote ones and those made here


def minari_root() -> Path:
    """Where Minari keeps its sets: this asks for the same variable and folder as Minari does."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def _make_local(env_id: str) -> None:
    """Roll out the shipped policies once; collect.py makes a second process wait and then read."""
    script = Path(__file__).resolve().parent.parent / "local_datasets" / "collect.py"
    print(f"{'data':<16} making {env_id} from the shipped policies: a minute or two", flush=True)
    if (code := subprocess.run([sys.executable, script, "--env-id", env_id]).returncode) != 0:
        sys.exit(code if code > 0 else 130)  # collect.py has said why, in one line, or got a signal as we did


def _load_minari(env_id: str) -> OfflineDataset:
    import minari  # slow to import, and D4RL files do not need it

    path, is_local = minari_root() / env_id, env_id in LOCAL_NAMES
    main = path / "data" / "main_data.hdf5"
    again = "delete the folder, and the same command makes it again" if is_local else "write or download it again"
    with _reading(path, again), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 simulators announce their successor
        stored = minari.load_dataset(env_id)
        metadata = stored.storage.metadata
        if is_local and metadata.get("recipe", 1) != LOCAL_RECIPE:
            raise UserError(f"{path} was made by recipe {metadata.get('recipe', 1)}, not {LOCAL_RECIPE}; {again}")
        if stored.storage.FORMAT != "hdf5":
            raise UserError(f"{path} is in Minari's {stored.storage.FORMAT} format; store it with data_format='hdf5'")
        env = _recover(path, stored)
        with h5py.File(main) as file:
            columns, parted = _read_episodes(path, file, stored.episode_indices, again)
        facts = {"env_id": env_id, "path": str(path), "sha256": sha256_of(main), "spec": plain(stored.env_spec)}
    is_d4rl = metadata.get("physics") == "d4rl" and facts["spec"].version == 4 and robot_of(facts["spec"])
    facts["source"] = "local data set (shipped policies, not D4RL)" if is_local else "Minari data set"
    facts["physics"] = "d4rl" if is_d4rl or is_local else "stock"
    return _checked(facts, columns, env, parted)


def _recover(path: Path, stored) -> gym.Env:
    """The environment that a Minari set names. UserError if there is none, or one of other spaces than the set's."""
    if stored.env_spec is None:
        raise UserError(
            f"{path} names no environment to score in: store it with env=gym.make(...), as docs/data.md does; every "
            "wrapper must inherit gymnasium.utils.RecordConstructorArgs and take plain values"
        )
    spec = plain(stored.env_spec)
    env = make_env(spec)
    for space, what in ((env.observation_space, "observations"), (env.action_space, "actions")):
        if not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
            raise UserError(
                f"{path} has {what} of {type(space).__name__}{space.shape or ''}, and flat Boxes are needed: "
                "docs/data.md flattens observations; discrete actions are not for these methods"
            )
    ours, theirs = ((x.action_space.low, x.action_space.high) for x in (stored, env))
    if np.abs(theirs).max() >= UNBOUNDED:
        raise UserError(f"{path}: {described(spec)} sets its actions no bounds; give it a Box that has some")
    if ours[0].shape == theirs[0].shape and not np.allclose(ours, theirs):
        raise UserError(
            f"{path} has actions in {_told(*ours)}, but its environment {described(spec)} takes {_told(*theirs)}: "
            "record through gymnasium.wrappers.RescaleAction, or mend the metadata"
        )
    if learning := [x.name for x in spec.additional_wrappers if x.name in LEARNING]:
        raise UserError(f"{path}: {learning[0]} learns statistics that no set holds; record the set without it")
    return env


def _read_episodes(path: Path, file: h5py.File, indices, again: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A Minari file's rows as D4RL's columns, and the last row of each stored episode."""
    episodes = []
    for i in indices:
        obs, action, *rest = (_array(file, f"episode_{i}/{key}", again) for key in MINARI_KEYS)
        if len(obs) != len(action) + 1 or any(column.size != len(action) for column in rest):  # Minari checks no shapes
            raise UserError(
                f"{path}: episode {i} has {len(obs)} observations, {len(action)} actions and rewards and flags "
                f"{[column.shape for column in rest]}; T actions need T + 1 observations, T rewards and T flags"
            )
        if len(action):
            reward, *flags = (column.reshape(-1) for column in rest)
            episodes.append((obs[:-1], action, reward, obs[1:], *flags))
    if not episodes:
        raise UserError(f"{path} holds no episode (its writing was cut); make it again")
    if len(episodes) < len(indices):
        warn(f"{len(indices) - len(episodes):,} of {len(indices):,} episodes have no step: left out")
    columns = {key: np.concatenate(parts) for key, parts in zip(D4RL_KEYS, zip(*episodes, strict=True), strict=True)}
    return columns, np.cumsum([len(episode[1]) for episode in episodes]) - 1


# ---- Files that cannot be read


def _array(file: h5py.File, key: str, way_out: str) -> np.ndarray:
    if key not in file or not isinstance(file[key], h5py.Dataset):
        raise UserError(f"{file.filename}: {key} is missing, or no array; {way_out}")
    return np.atleast_1d(file[key][()])


@contextmanager
def _reading(path: Path, again: str):
    """UserError if `path` cannot be read; `again` is the way out of damage."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # h5py, Minari and gymnasium raise many types
        raise UserError(f"{path} cannot be read ({one_line(error)}); if it is damaged or cut short, {again}")


# ---- For every source: what the data say of themselves, against their rows


def warn(text: str) -> None:
    print(f"{'warning':<16} {text}")


def _checked(facts: dict, columns: dict, env: gym.Env, parted: np.ndarray | None = None) -> OfflineDataset:
    """An OfflineDataset of D4RL's columns, or UserError for values that no learner should see; warns of odd ones.

    `parted`: the last rows of the source's own episodes; None if its flags and its rows must tell.
    """
    path, rows = facts["path"], len(columns["rewards"])
    single = [columns[key].size for key in ("rewards", "terminals", "timeouts")]
    if not rows or {*single, *map(len, columns.values())} != {rows}:
        shapes = {key: array.shape for key, array in columns.items()}
        raise UserError(f"{path}: arrays of unequal or zero length {shapes}; one row, reward and flag per step")
    for key, space in zip(D4RL_KEYS, (env.observation_space, env.action_space, None, env.observation_space)):
        if space and columns[key].shape[1:] != space.shape:
            raise UserError(
                f"{path} has {key} of shape {columns[key].shape}, but those of its environment {described(env.spec)} "
                f"are Box {space.shape}: record in the environment that the set names, wrappers included"
            )
    obs, action, reward, next_obs, terminated, timeouts = (_column(path, key, columns[key]) for key in D4RL_KEYS)
    low, high = (x.astype(np.float32) for x in (env.action_space.low, env.action_space.high))
    action = from_box(action, low, high)
    if (largest := float(np.abs(action).max())) > 1 + 1e-4:  # float32 rounding of a tanh policy is let pass
        row, i = np.argwhere(np.abs(action) == largest)[0]
        raise UserError(
            f"{path}: an action of {columns['actions'][row, i]:.4g} lies outside {_told(low, high)}; rescale actions "
            "to that range, or clip them if the simulator did"
        )
    # An episode ends at a flag, where the source parts it, at an unmarked time-out (the next row starts elsewhere), or
    # with the file.
    flagged = terminated | timeouts
    if parted is None:
        parted = np.append(np.flatnonzero((next_obs[:-1] != obs[1:]).any(axis=1)), rows - 1)
    ends = np.union1d(np.flatnonzero(flagged), parted)
    dataset = OfflineDataset(
        **facts, note="", obs=obs, action=action.clip(-1, 1), reward=reward.reshape(-1), next_obs=next_obs,
        terminated=terminated, lengths=np.diff(ends, prepend=-1), complete=flagged[ends], action_low=low,
        action_high=high,
    )  # fmt: skip
    _judge(dataset, env)
    env.close()
    return dataset


def _column(path: str, name: str, array: np.ndarray) -> np.ndarray:
    """As float32, a flag as bool [N]. UserError for what is no finite number, or a flag but 0 and 1."""
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: {name} holds {array.dtype}, not numbers")
    with np.errstate(over="ignore"):
        narrow = np.asarray(array, np.float32)
    is_flag = name in ("terminals", "timeouts")
    good = (narrow == 0) | (narrow == 1) if is_flag else np.isfinite(narrow)
    if not good.all():
        place = np.argwhere(~good)[0]
        limit = "a flag is 0 or 1" if is_flag else "drop or mend what float32 does not take"
        raise UserError(f"{path}: {name} holds {array[tuple(place)]}, first in row {place[0]}; {limit}")
    return narrow.reshape(-1) > 0 if is_flag else narrow


def _told(low: np.ndarray, high: np.ndarray) -> str:
    ends = (f"{x[0]:.4g}" if (x == x[0]).all() else f"({', '.join(f'{v:.4g}' for v in x)})" for x in (low, high))
    return f"[{', '.join(ends)}]"


def _judge(data: OfflineDataset, env: gym.Env) -> None:
    """Find the fall rule, and warn once of each thing in which the rows contradict the simulator or themselves."""
    name, last, limit, longest = described(data.spec), data.last, env.spec.max_episode_steps, int(data.lengths.max())
    marked = last[data.complete]
    first = {state.tobytes() for state in data.obs[last + 1 - data.lengths]}
    after = data.next_obs[marked]
    foreign = marked[[state.tobytes() in first or not state.any() for state in after]]
    if len(foreign):
        warn(
            f"at {len(foreign):,} of {len(marked):,} marked ends the next state is an episode's first one, or all 0: "
            "perhaps a vector environment's auto reset (store the final observation instead), or the episode goes on "
            "behind its flag; models learn these steps as they stand"
        )
    pieces = ~data.complete | (data.lengths < 0.9 * (limit or 0)) & ~data.terminated[last]
    if 3 * pieces.sum() > 2 * len(last):
        warn(
            f"{pieces.sum():,} of {len(last):,} episodes end without a flag, or by a time limit long before {name}'s: "
            "their mean return is that of pieces, evaluations go on, and no window or return-to-go goes beyond a piece"
        )
    if limit is None:
        warn(f"{name} has no step limit: evaluation ends an episode after {longest:,} steps, the longest in the data")
    ends = data.terminated[last][data.lengths == longest]
    if (rule := fall_rule(env)) is not None:
        _judge_falls(data, rule, foreign)
    elif ends.all() and (len(ends) > max(1, 0.1 * len(last)) or longest == limit):
        warn(
            f"all {len(ends):,} episodes of the greatest length, {longest:,} steps, end with a terminal flag: learners "
            "take the return behind one as 0; if it is a time limit, mark it as a timeout"
        )


def _judge_falls(data: OfflineDataset, rule: tuple, foreign: np.ndarray) -> None:
    """Keep the simulator's fall rule unless the rows contradict it; `foreign` rows do not show their own next state."""
    (low, high), fallen = rule, np.zeros(len(data.reward), bool)
    for i in np.flatnonzero((data.next_obs.min() <= low) | (data.next_obs.max() >= high)):
        fallen |= (data.next_obs[:, i] <= low[i]) | (data.next_obs[:, i] >= high[i])
    differ = fallen != data.terminated
    differ[foreign] = False
    if differ.sum() <= max(0.01 * (fallen | data.terminated).sum(), 1e-5 * len(differ)):  # as published files have
        data.healthy_low, data.healthy_high = rule
        return
    told = f"{described(data.spec)}'s fall rule and the terminal flags differ on {differ.sum():,} rows"
    if differ.mean() > 0.9 and data.source == "D4RL file":
        raise UserError(f"{data.path}: {told}; is it a file of that robot? name the right one with --env-id")
    warn(
        f"{told} ({differ.mean():.2%}): the rule is not used, and only the model's own sign ends a rollout; learners "
        "take the return behind a terminal flag as 0: if it is a time limit, mark it as a timeout"
    )
