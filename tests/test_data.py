"""common/data.py: D4RL files with their quirks, downloads, Minari data sets, and every kind of bad or odd input.

No test leaves this machine: downloads come from a server on 127.0.0.1, and proxies stand for an absent internet.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

from common import UserError, data
from common.data import load_dataset

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import wrappers
from minari.data_collector import EpisodeBuffer

pytestmark = pytest.mark.filterwarnings("ignore")  # Minari's advice on authors, gymnasium's on -v4

NAME, FILE = "hopper-medium-v2", "hopper_medium-v2.hdf5"
OBS_DIM, ACTION_DIM = 11, 3  # Hopper's
FLAGS = "terminals", "timeouts"

# What most tests read: 20 steps, rewards 0, 1, ..., 19. By hand:
EPISODES = [(5, "terminals"), (4, "timeouts"), (3, None), (6, "terminals"), (2, None)]  # (steps, which flag ends it)
LENGTHS = [5, 4, 3, 6, 2]  # the third is a time-out that no flag marks, the last is cut by the file's end
COMPLETE = [True, True, False, True, False]
FALLS = [4, 17]  # last rows of the episodes that end in "terminals"
MEAN_RETURN = 41.0  # complete episodes only: (0+1+2+3+4 = 10, 5+6+7+8 = 26, 12+...+17 = 87), 123 / 3
PUBLISHED = (3, 18, 51.0)  # to the last flag, as the published counts are: 3 flags, 18 steps, (0+...+17 = 153) / 3
HELD = [(5, "timeouts")] * 4


def buffers(episodes=EPISODES, obs_dim=OBS_DIM, action_dim=ACTION_DIM) -> list[EpisodeBuffer]:
    """Episodes in Minari's form, each a walk of its own that leaves Hopper's healthy range (heights above 0.7, angles
    below 0.2) only where it ends in "terminals".
    """
    rng, reward, made = np.random.default_rng(0), iter(range(10**6)), []
    for steps, flag in episodes:
        obs, last = rng.uniform(0, 0.1, (steps + 1, obs_dim)).astype(np.float32), np.arange(steps) == steps - 1
        obs[:, 0] += 1.2
        obs[-1, 1] += flag == "terminals"
        made.append(EpisodeBuffer(
            observations=obs, actions=rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
            rewards=np.array([next(reward) for _ in range(steps)], np.float32),
            terminations=last & (flag == "terminals"), truncations=last & (flag == "timeouts"),
        ))  # fmt: skip
    return made


def hopper_arrays(episodes=EPISODES) -> dict[str, np.ndarray]:
    """The same as D4RL's six arrays: next_observations joins rows inside an episode only."""
    rows = [
        (b.observations[:-1], b.actions, b.rewards, b.observations[1:], b.terminations, b.truncations)
        for b in buffers(episodes)
    ]
    return {key: np.concatenate(column) for key, column in zip(data.D4RL_KEYS, zip(*rows, strict=True), strict=True)}


def check_values(loaded) -> None:
    """Against the arrays, and by hand."""
    arrays = hopper_arrays()
    for key, name in (("obs", "observations"), ("action", "actions"), ("next_obs", "next_observations")):
        np.testing.assert_array_equal(getattr(loaded, key), arrays[name])
        assert getattr(loaded, key).dtype == np.float32
    np.testing.assert_array_equal(loaded.reward, np.arange(20, dtype=np.float32))
    assert loaded.reward.dtype == np.float32 and loaded.reward.shape == (20,)
    assert loaded.terminated.dtype == bool and np.flatnonzero(loaded.terminated).tolist() == FALLS
    assert loaded.lengths.tolist() == LENGTHS and loaded.complete.tolist() == COMPLETE
    assert loaded.returns.tolist() == [10, 26, 87]
    facts = loaded.facts()
    json.dumps(facts)
    assert (facts["episodes"], facts["complete_episodes"], facts["steps"]) == (5, 3, 20)
    assert facts["mean_return"] == pytest.approx(MEAN_RETURN)
    assert facts["std_return"] == pytest.approx(np.sqrt((31**2 + 15**2 + 46**2) / 3))  # 10, 26, 87 about 41
    assert loaded.action_low.tolist() == [-1] * 3 and loaded.action_high.tolist() == [1] * 3
    assert loaded.healthy_low[:3].tolist() == np.float32([0.7, -0.2, -100]).tolist()  # Hopper's, strict
    assert facts["robot"] == "hopper"


def write(path: Path, arrays: dict, **options) -> Path:
    """An HDF5 file of arrays; a name with slashes makes groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_dataset(key, data=array, **options)
    return path


def refused(call, *args) -> str:
    """What call(*args) tells the user: one UserError of one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def warned(capsys):
    """load_dataset(...) -> the data, and the warnings printed, without their tag; `cut`: that of short episodes too."""

    def load(*args, cut=False):
        capsys.readouterr()
        loaded = load_dataset(*args)
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith("warning          ") for line in lines)
        told = [line.removeprefix("warning          ") for line in lines]
        assert not cut or "or by a time limit long before" in told.pop(0)
        return loaded, told

    return load


@pytest.fixture
def nobody():
    """An address of this machine where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(autouse=True)
def here(folders, monkeypatch, nobody):
    """Empty folders, no knowledge of published files, and no way out of this machine."""
    monkeypatch.setattr(data, "KNOWN", {})
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", nobody)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps the proxies of its first call


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


# ---- D4RL's layout and its quirks


QUIRKS = {
    "as it should be": lambda arrays: arrays,
    "(N, 1) rewards and flags": lambda arrays: {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()},
    "float64": lambda arrays: {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()},
    "flags 0.0 and 1.0": lambda arrays: arrays | {k: arrays[k].astype(np.float32) for k in FLAGS},
    "D4RL's other keys": lambda arrays: arrays | {"metadata/algorithm": b"SAC", "infos/qpos": np.zeros((20, 6))},
}


@pytest.mark.parametrize("quirk", QUIRKS)
def test_every_layout_gives_the_same_data(folders, warned, quirk):
    path = write(folders / "mine.hdf5", QUIRKS[quirk](hopper_arrays()))
    loaded, warnings = warned(NAME, path)
    check_values(loaded)
    assert (loaded.source, loaded.path, loaded.sha256) == ("D4RL file", str(path), sha256(path.read_bytes()))
    assert (loaded.facts()["simulator"], loaded.physics, warnings) == ("Hopper-v4", "d4rl", [])


def test_episodes_against_a_plain_loop(folders):
    """The four-way rule, step by step, on random episodes; and next_obs is obs of the next row inside each."""
    rng = np.random.default_rng(1)
    for i in range(10):
        kinds = rng.choice(["terminals", "timeouts", ""], 30)
        arrays = hopper_arrays([(int(rng.integers(1, 6)), kind or None) for kind in kinds])
        loaded = load_dataset(NAME, write(folders / f"{i}.hdf5", arrays))
        lengths, complete, steps = [], [], 0
        for row in range(len(arrays["rewards"])):
            steps += 1
            flag = bool(arrays["terminals"][row] or arrays["timeouts"][row])
            last = row + 1 == len(arrays["rewards"])
            if flag or last or (arrays["next_observations"][row] != arrays["observations"][row + 1]).any():
                lengths.append(steps)
                complete.append(flag)
                steps = 0
        assert loaded.lengths.tolist() == lengths and loaded.complete.tolist() == complete
        inside = np.setdiff1d(np.arange(len(loaded.obs)), loaded.last)
        np.testing.assert_array_equal(loaded.next_obs[inside], loaded.obs[inside + 1])
        assert not loaded.terminated[inside].any()


def test_the_fingerprint_is_that_of_the_rows(folders):
    """Not of the file; any number of any array changes it."""
    arrays = hopper_arrays()
    first = load_dataset(NAME, write(folders / "a.hdf5", arrays))
    assert load_dataset(NAME, write(folders / "b.hdf5", arrays, compression="gzip")).fingerprint == first.fingerprint
    found = {first.fingerprint}
    for key in ("observations", "actions", "rewards", "next_observations"):
        other = arrays | {key: arrays[key].copy()}
        other[key][-1] *= 0.5  # of the last row, which nothing follows
        found.add(load_dataset(NAME, write(folders / "c.hdf5", other)).fingerprint)
    assert len(found) == 5


# ---- Published counts


def publish(monkeypatch, counts=PUBLISHED, pinned=None):
    monkeypatch.setattr(data, "KNOWN", {NAME: (*counts, pinned)})


def test_counts_that_agree(folders, monkeypatch):
    path = write(folders / "d4rl" / FILE, hopper_arrays())
    assert load_dataset(NAME).note == f"no counts are known for the published {NAME} file"
    publish(monkeypatch)
    loaded = load_dataset(NAME)
    assert loaded.path == str(path)
    assert loaded.note == f"counts and mean return are those of the published {NAME} file"
    publish(monkeypatch, pinned=loaded.sha256)
    assert load_dataset(NAME).note == f"the published {NAME} file (sha256 as pinned)"
    publish(monkeypatch, pinned="0" * 64)  # same content, packed anew
    assert load_dataset(NAME).note.endswith(f"file, but not the sha256 that users have pinned ({'0' * 64})")


@pytest.mark.parametrize("counts", [(4, 18, 51.0), (3, 17, 51.0), (3, 18, 51.02)])
def test_counts_that_differ(folders, monkeypatch, counts):
    path = write(folders / "d4rl" / FILE, hopper_arrays())
    publish(monkeypatch, counts)
    message = refused(load_dataset, NAME)
    assert str(path) in message and "--data-path" in message
    assert "3 episodes, 18 steps, mean return 51.00 here" in message
    assert f"{counts[0]}, {counts[1]} and {counts[2]:.2f} there" in message
    assert load_dataset(NAME, path).note.startswith("not the published hopper-medium-v2 file: 3 episodes, 18 steps")


# ---- Bad input: one line that names the thing and the way out

UNKNOWN = {  # name: a part of what is offered instead
    "hoper-medium-v2": "hopper-medium-v2",  # one letter short
    "walker2d-medium-replay-v1": "walker2d-medium-replay-v2",  # another version
    "local/hopper/medum-v0": "local/hopper/medium-v0",
    "hopper/medium": "local/hopper/medium-v0",  # a slash, but no version: not a Minari id
    "zzz": "local/hopper/medium-v0",  # like nothing known: the two first choices are offered
    "mine-v0": "local/hopper/medium-v0",  # a Minari id without a namespace, and not on this machine
    "": "hopper-medium-v2",
    **dict.fromkeys(("antmaze-umaze-v2", "pen-human-v1"), "D4RL/pen/human-v2 for D4RL's other tasks"),
    # Ids that lead out of the root, where a readable set lies.
    **dict.fromkeys(("../x-v0", "foo/../../x-v0", "local/../../x-v0", "foo\\..\\x-v0", "{outside}/x-v0"), ""),
    **dict.fromkeys(("foo//x-v0", "[foo]/x-v0", "foo/x-v0\n", "foo/x\0-v0"), ""),
}  # fmt: skip


@pytest.mark.parametrize("env_id", UNKNOWN)
def test_unknown_names(folders, made, env_id):
    (folders / "minari" / "foo").mkdir()
    shutil.copytree(made, folders / "x-v0")
    offered, env_id = UNKNOWN[env_id], env_id.replace("{outside}", str(folders))
    before = sorted(folders.rglob("*"))
    message = refused(load_dataset, env_id)
    assert message.startswith(f"unknown --env-id {env_id!r}; nearest known: ") and offered in message.split("; ", 1)[1]
    assert sorted(folders.rglob("*")) == before


def test_data_path(folders):
    """No file, a folder, no name at all; another name than D4RL's."""
    for path in (folders / "none.hdf5", folders / "d4rl", folders / ("x" * 300)):
        message = refused(load_dataset, NAME, path)
        assert f"{path} is no file" in message and "D4RL's HDF5 layout" in message
    path = write(folders / "mine.hdf5", hopper_arrays())
    message = refused(load_dataset, "local/hopper/medium-v0", path)
    assert "--data-path" in message and "local/hopper/medium-v0" in message and NAME in message
    assert load_dataset(NAME, path).path == str(path)
    path.write_bytes(b"")
    assert "damaged or cut short" in refused(load_dataset, NAME, path)


def test_good_files_that_cannot_be_read(folders, monkeypatch):
    """The cause, as the system has it; no user is told to delete a file of his own."""
    path = write(folders / "mine.hdf5", hopper_arrays())
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process does that writes it
        messages = {"unable to lock file": refused(load_dataset, NAME, path)}
    for error in (PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O"), MemoryError("8 GiB")):
        with monkeypatch.context() as patch:
            patch.setattr(h5py, "File", Mock(side_effect=error))
            messages[f"cannot be read ({error})"] = refused(load_dataset, NAME, path)
    group = hopper_arrays() | {"rewards/a": np.ones(20)}
    del group["rewards"]
    messages["rewards is missing, or no array"] = refused(load_dataset, NAME, write(path, group))
    for cause, message in messages.items():
        assert cause in message and str(path) in message and "delete" not in message


def test_damaged_file(folders):
    """Random bytes, cuts at every tenth, and an array's header overwritten: h5py raises different types for each. A
    user's own file is to be written again; only a download of ours may be deleted."""
    path = write(folders / "d4rl" / FILE, hopper_arrays())
    whole = path.read_bytes()
    with h5py.File(path) as file:
        header = h5py.h5o.get_info(file["actions"].id).addr
    bad = [np.random.default_rng(0).bytes(len(whole)), b"", whole[:header] + b"\xff" * 16 + whole[header + 16 :]]
    for content in bad + [whole[: len(whole) * i // 10] for i in range(1, 10)]:
        path.write_bytes(content)
        message = refused(load_dataset, NAME, path)
        assert f"{path} cannot be read" in message and message.endswith("damaged or cut short, write or copy it again")
        assert refused(load_dataset, NAME).endswith("damaged or cut short, delete it to download again")


def changed(key, change):
    """hopper_arrays without one array, with one put through change, or with rows 7 and 12 of it set to a number."""
    arrays = hopper_arrays()
    if change is None:
        del arrays[key]
    elif callable(change):
        arrays[key] = change(arrays[key])
    else:
        arrays[key] = arrays[key].astype(np.float64)
        arrays[key][7] = arrays[key][12] = change
    return arrays


BAD_VALUES = {  # what is wrong: (key, change, words of the refusal)
    "no next state": ("next_observations", None, "next_observations is missing, or no array; D4RL's layout needs obs"),
    "NaN": ("observations", np.nan, "observations holds nan, first in row 7; drop or mend what float32 does not take"),
    "beyond float32": ("rewards", 1e39, "rewards holds 1e+39, first in row 7; drop or mend what float32"),
    "NaN as a flag": ("terminals", np.nan, "terminals holds nan, first in row 7; a flag is 0 or 1"),
    "counts as flags": ("timeouts", 2, "timeouts holds 2.0, first in row 7; a flag is 0 or 1"),
    "text": ("rewards", lambda a: np.array([b"one"] * 20), "rewards holds |S3, not numbers"),
    "scalar": ("rewards", lambda a: 1.0, "unequal"),
    "one row less": ("actions", lambda a: a[:-1], "unequal or zero length"),
    "no rows": ("rewards", lambda a: a[:0], "unequal or zero length"),
    "two rewards per row": ("rewards", lambda a: np.stack([a, a], 1), "'rewards': (20, 2)"),
    "flat observations": ("observations", lambda a: a[:, 0], "observations of shape (20,), but those of its envir"),
    "wide next observations": ("next_observations", lambda a: np.hstack([a, a]), "next_observations of shape (20, 22)"),
    "wide actions": ("actions", lambda a: np.hstack([a, a]), "(20, 6), but those of its environment Hopper-v4 are Box"),
    "action": ("actions", 1.1, "an action of 1.1 lies outside [-1, 1]; rescale"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values(folders, case):
    key, change, words = BAD_VALUES[case]
    path = write(folders / "mine.hdf5", changed(key, change))
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and words in message


def test_rounding_of_actions_is_let_pass(folders):
    loaded = load_dataset(NAME, write(folders / "near.hdf5", changed("actions", -1.00001)))
    assert loaded.action[7].tolist() == [-1] * 3 and np.abs(loaded.action).max() <= 1


def test_files_of_another_robot(folders):
    """Hopper's arrays under Walker2d's name, and what has Hopper's shape and never its height."""
    path, arrays = folders / "mine.hdf5", hopper_arrays([(50, "timeouts")] * 6)
    message = refused(load_dataset, "walker2d-medium-v2", write(path, arrays))
    assert str(path) in message and "(300, 11)" in message and "(17,)" in message
    arrays["observations"][:, 0] -= 1.2
    arrays["next_observations"][:, 0] -= 1.2
    assert "is it a file of that robot?" in refused(load_dataset, NAME, write(path, arrays))


# ---- Odd data are told of, once

# 30 falls and 30 time-outs of five steps, one after the other. What is odd: (the arrays of which that is so, parts of
# each warning, whether the fall rule stays).
TEN_EACH = [(5, "terminals"), (5, "timeouts")] * 30
DIFFER = "rule is not used, and only the model's own sign"
ODD = {
    "nothing": (lambda a: {}, [], True),
    "auto reset": (lambda a: {"next_observations": np.append(a["observations"][1:], a["next_observations"][-1:], 0)},
                   ["at 59 of 60 marked ends the next state is an episode's first one, or"], True),
    "never filled in": (lambda a: {"next_observations": np.where(a["timeouts"][:, None], 0, a["next_observations"])},
                        ["at 30 of 60 marked ends"], True),
    "one row late": (lambda a: {key: np.roll(a[key], 1) for key in FLAGS},
                     ["at 60 of 60", "90 of 120 episodes end without a flag, or", DIFFER], False),
    "rounded": (lambda a: {"observations": a["observations"].astype(np.float16)},
                ["270 of 300 episodes end without a flag, or by a time limit long before Hop"], True),
    "never marked": (lambda a: {key: np.zeros_like(a[key]) for key in FLAGS},
                     ["60 of 60 episodes end without a flag", DIFFER], False),
    "dones": (lambda a: {"terminals": a["terminals"] | a["timeouts"], "timeouts": np.zeros_like(a["timeouts"])},
              ["differ on 30 rows (10.00%): the rule is not used, and only the model's own sign"], False),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_flags_and_rows(folders, warned, case):
    change, words, has_rule = ODD[case]
    arrays = hopper_arrays(TEN_EACH)
    loaded, warnings = warned(NAME, write(folders / "mine.hdf5", arrays | change(arrays)))
    assert len(warnings) == len(words), warnings
    for part, warning in zip(words, warnings, strict=True):
        assert part in warning
    assert (loaded.healthy_low is not None) == (loaded.healthy_high is not None) == has_rule


def test_time_limits_marked_as_terminals_where_no_rule_is_known(warned):
    create("tiny/dones-v0", buffers([(5, "terminals")] * 4, 3, 1), "Pendulum-v1")
    _, (warning,) = warned("tiny/dones-v0")
    assert "all 4 episodes of the greatest length, 5 steps, end with a terminal flag" in warning


@pytest.mark.parametrize("flag", ["timeouts", "terminals"])
def test_episodes_that_a_time_limit_of_their_own_cut(folders, warned, flag):
    """Their mean is no measure for evaluations of 1,000 steps, and told so; that of falls is one."""
    path = write(folders / "mine.hdf5", hopper_arrays([(5, flag)] * 6))
    assert warned(NAME, path, cut=flag == "timeouts")[1] == []


# ---- Download


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's hub as its client asks for one file."""

    def do_GET(self):
        known = self.path == f"/datasets/imone/D4RL/resolve/{data.D4RL_ON_HUB['revision']}/{FILE}"
        body = self.server.body if known else b""
        self.send_response(200 if body else 404)
        if not body:
            self.send_header("X-Error-Code", "EntryNotFound")
        for key, value in (("X-Repo-Commit", data.D4RL_ON_HUB["revision"]), ("ETag", f'"{sha256(body)}"')):
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET" and known:
            self.server.downloads.append(self.path)
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(body) starts a hub that has FILE if that is not empty; what it returns lists the downloads."""
    servers = []

    def start(body=b""):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        server.body, server.downloads = body, []
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server.downloads

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download(folders, monkeypatch, serve):
    """The folder is made on the way, and the second time the file is there."""
    body, path = write(folders / "published.hdf5", hopper_arrays()).read_bytes(), folders / "deep" / "d4rl" / FILE
    downloads = serve(body)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(path.parent))
    for _ in range(2):
        loaded = load_dataset(NAME)
        assert loaded.sha256 == sha256(body) and loaded.lengths.tolist() == LENGTHS
    assert len(downloads) == 1 and path.read_bytes() == body


@pytest.mark.parametrize(
    ("env_id", "network", "reason"),
    [
        (NAME, "absent", "refused"),
        (NAME, "silent", "no answer within 2 s"),
        (NAME, "without it", "404"),
        ("mujoco/hopper/medium-v0", "absent", "refused"),
        ("mujoco/hopper/medium-v0", "silent", "no answer within 2 s"),
    ],
)
def test_no_way_to_the_data(folders, monkeypatch, serve, silent, env_id, network, reason):
    """Told within two seconds (and a half, for the test's own machine), with the place and the ways on; nothing
    half-made, which would block the name, is left.
    """
    if network == "without it":
        serve()
    elif network == "silent":
        monkeypatch.setenv("HF_ENDPOINT", silent)
    start = time.monotonic()
    message = refused(load_dataset, env_id)
    assert time.monotonic() - start < 2.5 or network == "without it"  # whose first import takes long
    place = f"d4rl/{FILE}" if env_id == NAME else f"minari/{env_id}"
    assert f"{env_id} is not in {folders}/{place} and cannot be downloaded (" in message and reason in message
    assert "local/hopper/medium-v0" in message
    if env_id == NAME:
        assert f"put {data.D4RL_ELSEWHERE}/{FILE} there" in message and "--data-path" in message
    assert not list(folders.rglob("*.hdf5")) and not list((folders / "minari").iterdir())


# ---- Minari

MINARI_ID = "tiny/hopper/walk-v0"


def create(env_id, episodes, env="Hopper-v5", **spaces):
    """A set in the Minari root of the moment; spaces instead of an environment make one that names none."""
    minari.create_dataset_from_buffers(env_id, episodes, **(spaces or {"env": env}), data_format="hdf5")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a set made once; tests copy it."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        create(MINARI_ID, buffers())
    return root / MINARI_ID


@pytest.fixture
def stored(folders, made):
    """The same set in this test's own root."""
    return shutil.copytree(made, folders / "minari" / MINARI_ID)


def test_minari(stored, warned):
    loaded, warnings = warned(MINARI_ID)
    check_values(loaded)
    assert (loaded.source, loaded.spec.id, loaded.physics) == ("Minari data set", "Hopper-v5", "stock")
    assert loaded.path == str(stored) and warnings == []
    assert loaded.sha256 == sha256((stored / "data" / "main_data.hdf5").read_bytes())
    with open(stored / "data" / "main_data.hdf5") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "unable to lock file" in refused(load_dataset, MINARI_ID)
    shutil.move(stored, data.minari_root() / "walk-v0")
    check_values(load_dataset("walk-v0"))  # Minari allows ids without a namespace; on this machine only


def test_local(folders, made, monkeypatch):
    """A local name makes its set once, then reads it; it is never called D4RL's."""
    env_id, calls, code = "local/hopper/medium-v0", [], 2

    def make(command):
        calls.append(command[1:])
        if code == 0:
            edit_metadata(shutil.copytree(made, folders / "minari" / env_id), recipe=2)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(data.subprocess, "run", make)
    with pytest.raises(SystemExit) as stop:
        load_dataset(env_id)
    assert stop.value.code == 2  # collect.py has told the reason in its one line; nothing is added to it
    code = 0
    for _ in range(2):
        loaded = load_dataset(env_id)
        check_values(loaded)
    script = Path(data.__file__).resolve().parent.parent / "local_datasets" / "collect.py"
    assert calls == [[script, "--env-id", env_id]] * 2
    assert "not D4RL" in loaded.source and loaded.physics == "d4rl" and loaded.env_id == env_id
    edit_metadata(folders / "minari" / env_id, recipe=1)
    assert "made by recipe 1, not 2; delete the folder, and the same command" in refused(load_dataset, env_id)
    (folders / "minari" / env_id / "data" / "main_data.hdf5").write_bytes(b"")
    assert "delete the folder, and the same command makes it again" in refused(load_dataset, env_id)


def edit_metadata(folder, **changes):
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_spec(folder, **changes):
    spec = json.loads(json.loads((folder / "data" / "metadata.json").read_text())["env_spec"])
    edit_metadata(folder, env_spec=json.dumps(spec | changes))


def truncate(folder):
    path = folder / "data" / "main_data.hdf5"
    os.truncate(path, path.stat().st_size // 2)


MINARI_DAMAGE = {
    "truncated": truncate,
    "episodes not counted": lambda folder: edit_metadata(folder, total_episodes=0),
    "fewer than counted": lambda folder: edit_metadata(folder, total_episodes=6),
    "no metadata": lambda folder: (folder / "data" / "metadata.json").unlink(),
    "another format": lambda folder: edit_metadata(folder, data_format="stone"),
    "no data": lambda folder: (folder / "data" / "main_data.hdf5").unlink(),
}


@pytest.mark.parametrize("case", MINARI_DAMAGE)
def test_damaged_minari(stored, case):
    """As a killed writer or copy leaves it; nobody is told to delete a set of his own."""
    MINARI_DAMAGE[case](stored)
    message = refused(load_dataset, MINARI_ID)
    assert str(stored) in message and "again" in message and "delete" not in message
    assert ("holds no episode" in message) == (case == "episodes not counted")


def with_change(**changes):
    """The buffers, with changed fields in the second episode."""
    first, second, *others = buffers()
    fields = {key: change(getattr(second, key)) for key, change in changes.items()}
    return [first, dataclasses.replace(second, **fields), *others]


MINARI_VALUES = {  # what is wrong: (episodes, words of the message); Minari stores all of these without a word
    "flag": (with_change(truncations=lambda f: 2 * f), "timeouts holds 2, first in row 8; a flag is 0 or 1"),
    "no last state": (with_change(observations=lambda o: o[:-1]), "episode 1 has 4 observations, 4 actions"),
    "reward missing": (with_change(rewards=lambda r: r[:-1]), "[(3,), (4,), (4,)]"),
    "flat actions": (with_change(actions=lambda a: a[:, 0]), ""),
    "narrow": (buffers(obs_dim=10), "observations of shape (20, 10), but those of its environment Hopper-v5 are Box ("),
}


@pytest.mark.parametrize("case", MINARI_VALUES)
def test_bad_values_in_minari(case):
    episodes, words = MINARI_VALUES[case]
    create("tiny/bad-v0", episodes)
    message = refused(load_dataset, "tiny/bad-v0")
    assert "tiny/bad-v0" in message and words in message


def test_odd_episodes_of_minari(stored, warned):
    """An episode without a step is left out, a column of rewards is a row of them, a flag in the middle ends one; none
    marked."""
    with h5py.File(stored / "data" / "main_data.hdf5", "a") as file:
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            kept = file[f"episode_0/{key}"][: 1 if key == "observations" else 0]
            del file[f"episode_0/{key}"]
            file[f"episode_0/{key}"] = kept
        rewards = file["episode_1/rewards"][:]
        del file["episode_1/rewards"]
        file["episode_1/rewards"] = rewards[:, None]
        file["episode_3/truncations"][0] = True
    loaded, warnings = warned(MINARI_ID)
    assert loaded.lengths.tolist() == [4, 3, 1, 5, 2] and loaded.reward.shape == (15,)
    assert "1 of 5 episodes have no step: left out" in warnings[0] and "at 1 of 3 marked ends" in warnings[1]
    create("tiny/open-v0", buffers([(3, None)] * 3))
    loaded, warnings = warned("tiny/open-v0")
    assert "3 of 3 episodes end without a flag, or" in warnings[0] and loaded.returns.tolist() == [3, 12, 21]


# ---- What a set says of itself

HOPPER = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"
SPECS = {  # what its environment's spec says: (changes, the warning, the least healthy height)
    "another id": ({"id": "Hopper-v3"}, None, None),
    "id of a package": ({"id": "theirs:Jumper-v1", "entry_point": HOPPER}, None, None),  # made from the entry point
    "a range that agrees": ({"kwargs": {"healthy_z_range": [1.0, 2.0]}}, None, 1.0),
    "one that does not": ({"kwargs": {"healthy_z_range": [1.25, 2.0]}}, "rule and the terminal flags differ on", None),
    "no falls": ({"kwargs": {"terminate_when_unhealthy": False}},
                 "Hopper-v5(terminate_when_unhealthy=False)'s fall rule and the terminal flags differ on 2 rows", None),
    "no limit": ({"max_episode_steps": None},
                 "Hopper-v5 has no step limit: evaluation ends an episode after 6 steps, the longest in the data", 0.7),
    "a short limit": ({"max_episode_steps": 5}, None, 0.7),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_changed_environments_are_told_and_have_no_score(stored, warned, case):
    changes, words, height = SPECS[case]
    edit_spec(stored, **changes)
    loaded, warnings = warned(MINARI_ID)
    assert len(warnings) == (words is not None) and (not words or words in warnings[0])
    assert loaded.robot == "" and loaded.spec.id == changes.get("id", "Hopper-v5")
    assert loaded.healthy_low is None if height is None else loaded.healthy_low[0] == np.float32(height)


def test_environments_that_cannot_be_made_again(stored):
    """What is missing is told by its name."""
    for kwargs, entry_point in ((None, "gymnasium.wrappers:ClipAction"), ({}, "no_such_package:Noise")):
        edit_spec(stored, additional_wrappers=[{"name": "Noise", "entry_point": entry_point, "kwargs": kwargs}])
        assert "cannot make the environment Hopper-v5 in Noise" in refused(load_dataset, MINARI_ID)
    edit_spec(stored, id="theirs:Jumper-v1", entry_point="their_package.envs:Jumper", additional_wrappers=[])
    assert "No module named 'their_package'" in refused(load_dataset, MINARI_ID)


class Task(gym.Env):
    """Never stepped: only its spaces count."""

    def __init__(self, kind):
        self.observation_space, self.action_space = SPACES[kind]


BOX = gym.spaces.Box(np.arange(-2.0, 0), np.ones(2), dtype=np.float64)  # its repr has two lines
SPACES = {
    "free": (BOX, gym.spaces.Box(np.float32([-np.inf, 0, -1]), np.float32([np.inf, np.finfo(np.float32).max, 1]))),
    "dict": (gym.spaces.Dict(place=gym.spaces.Box(-9, 9, (2,)), goal=gym.spaces.Box(-9, 9, (1,))), BOX),
    "image": (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), BOX),
    "discrete": (BOX, gym.spaces.Discrete(2)),
}
for kind in SPACES:
    gym.register(f"{kind}-v0", entry_point=f"{__name__}:Task", kwargs={"kind": kind}, max_episode_steps=9)


def test_spaces_that_are_no_flat_boxes():
    """With an environment that has them, and without one."""
    (plain,) = buffers([(4, "timeouts")], 2, 2)
    changes = {
        "dict": {"observations": {"place": plain.observations, "goal": plain.observations[:, :1]}},
        "image": {"observations": np.zeros((5, 4, 4, 3), np.uint8)},
        "discrete": {"actions": np.zeros(4, int)},
    }
    for kind, words in (("dict", "Dict"), ("image", "Box(4, 4, 3)"), ("discrete", "Discrete")):
        episodes, (observed, acted) = [dataclasses.replace(plain, **changes[kind])], SPACES[kind]
        create(f"tiny/{kind}-v0", episodes, f"{kind}-v0")
        create(f"tiny/says-{kind}-v0", episodes, observation_space=observed, action_space=acted)
        assert "names no environment" in refused(load_dataset, f"tiny/says-{kind}-v0")
        message = refused(load_dataset, f"tiny/{kind}-v0")
        assert f"of {words}, and flat Boxes are needed: docs/data.md" in message
        assert "discrete actions are not for these methods" in message


class Monitor(gym.RewardWrapper, gym.utils.RecordConstructorArgs):
    """A user's own, of a recorder's name."""

    def __init__(self, env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.RewardWrapper.__init__(self, env)

    def reward(self, reward):
        return -3 * reward


def test_wrappers_are_part_of_the_task(warned):
    """Actions in the units of the wrapped environment; recorders dropped, but no wrapper of a user's own, whatever its
    name; one that learns is refused."""
    pendulum = buffers(HELD, 3, 1)
    for name, make, simulator, robot in (
        ("scaled", lambda: wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1), "Pendulum-v1 in RescaleAction", ""),
        ("monitored", lambda: Monitor(gym.make("Pendulum-v1")), "Pendulum-v1 in Monitor", ""),
        ("watched", lambda: wrappers.RecordEpisodeStatistics(gym.make("Hopper-v5", render_mode="rgb_array")),
         "Hopper-v5", "hopper"),
    ):  # fmt: skip
        create(f"tiny/{name}-v0", pendulum if "Pendulum" in simulator else buffers(), make())
        loaded, warnings = warned(f"tiny/{name}-v0", cut="Pendulum" in simulator)
        assert loaded.facts()["simulator"] == simulator and loaded.robot == robot and loaded.spec.kwargs == {}
        assert warnings == [] and (loaded.healthy_low is None) == (name != "watched")
        assert loaded.action_high.tolist() == [2 if name == "monitored" else 1] * loaded.action.shape[1]
    create("tiny/normalised-v0", buffers(), wrappers.NormalizeObservation(gym.make("Hopper-v5")))
    assert "NormalizeObservation learns statistics that no set holds" in refused(load_dataset, "tiny/normalised-v0")


def test_another_box_than_one(warned):
    """Pendulum's torques of -2 to 2 become -1 to 1; a set whose own Box is not its environment's is refused."""
    episodes = [dataclasses.replace(b, actions=2 * b.actions) for b in buffers(HELD, 3, 1)]
    create("tiny/pendulum-v0", episodes, "Pendulum-v1")
    loaded, warnings = warned("tiny/pendulum-v0", cut=True)
    np.testing.assert_array_equal(loaded.action, np.concatenate([b.actions for b in episodes]) / 2)
    assert (loaded.action_low.tolist(), loaded.action_high.tolist(), warnings) == ([-2], [2], [])
    folder = data.minari_root() / "tiny/pendulum-v0"
    box = json.loads(json.loads((folder / "data" / "metadata.json").read_text())["action_space"])
    edit_metadata(folder, action_space=json.dumps(box | {"low": [-1.0], "high": [1.0]}))
    message = refused(load_dataset, "tiny/pendulum-v0")
    assert "actions in [-1, 1], but its environment Pendulum-v1 takes [-2, 2]" in message


def test_actions_without_bounds():
    create("tiny/free-v0", buffers(HELD, 2, 3), "free-v0")
    assert "free-v0(kind='free') sets its actions no bounds; give it a Box" in refused(load_dataset, "tiny/free-v0")


def test_ways_to_bring_data(folders, monkeypatch, warned):
    """The three examples of docs/data.md run as printed, and what they write is loaded without a warning."""
    monkeypatch.chdir(folders)
    text = (Path(data.__file__).parent.parent / "docs" / "data.md").read_text()
    arrays, file, flatten = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(arrays, {})
    loaded, warnings = warned("mine/pendulum-v0")
    assert loaded.lengths.tolist() == [200] * 20 and loaded.complete.all() and warnings == []
    exec(file, {})
    loaded, warnings = warned(NAME, Path("mine.hdf5"))
    assert len(loaded.lengths) == 20 and loaded.terminated.sum() == 20 and warnings == []
    place, goal = np.random.default_rng(0).uniform(-1, 1, (2, 5, 2))
    (episode,) = buffers([(4, "timeouts")], 2, 2)
    episode = dataclasses.replace(episode, observations={"place": place, "goal": goal[:, :1]})
    create("tiny/nested-v0", [episode] * 3, "dict-v0")
    exec(flatten.replace("D4RL/antmaze/umaze-v1", "tiny/nested-v0"), {})
    loaded, warnings = warned("mine/antmaze-v0", cut=True)
    np.testing.assert_array_equal(loaded.obs[:4], np.hstack([goal[:4, :1], place[:4]]).astype(np.float32))
    assert loaded.facts()["simulator"] == "dict-v0(kind='dict') in FlattenObservation" and warnings == []


@pytest.mark.parametrize("error", [ValueError("no such\nset"), RuntimeError(), ImportError("no hub")])
def test_minari_download_fails(monkeypatch, error):
    """A network, but no such set: whatever the hub client raises becomes one line."""

    def download(env_id):
        raise error

    monkeypatch.setattr(data, "_answering_hub", lambda: "")
    monkeypatch.setattr(minari, "download_dataset", download)
    message = refused(load_dataset, "mujoco/hopper/nothing-v0")
    assert "mujoco/hopper/nothing-v0" in message and (str(error).split() or ["RuntimeError"])[-1] in message
