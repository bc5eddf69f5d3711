"""common/data.py: D4RL files with their quirks, downloads, the cache, Minari data sets, and every kind of bad input.

No test leaves this machine: downloads come from a server on 127.0.0.1, and proxies stand for an absent internet.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from common import UserError, data
from common.data import OfflineDataset, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # advice on authors and permalinks

NAME, FILE = "hopper-medium-v2", "hopper_medium-v2.hdf5"
OBS_DIM, ACTION_DIM = 11, 3  # Hopper's

# The file that most tests read: 20 steps, rewards 0, 1, ..., 19. By hand:
EPISODES = [(5, "terminals"), (4, "timeouts"), (3, None), (6, "terminals"), (2, None)]  # (steps, which flag ends it)
LENGTHS = [5, 4, 3, 6, 2]  # the third is a time-out that no flag marks, the last is cut by the file's end
COMPLETE = [True, True, False, True, False]
FALLS = [4, 17]  # last rows of the episodes that end in "terminals"
MEAN_RETURN = 41.0  # complete episodes only: (0+1+2+3+4 = 10, 5+6+7+8 = 26, 12+...+17 = 87), 123 / 3
PUBLISHED = (3, 18, 51.0)  # to the last flag, as the published counts are: 3 flags, 18 steps, (0+...+17 = 153) / 3


def hopper_arrays(episodes=EPISODES) -> dict[str, np.ndarray]:
    """D4RL's six arrays; each episode is a walk of its own, so next_observations joins rows inside it only."""
    rng = np.random.default_rng(0)
    walks = [rng.standard_normal((steps + 1, OBS_DIM)).astype(np.float32) for steps, _ in episodes]
    total = sum(steps for steps, _ in episodes)
    arrays = {
        "observations": np.concatenate([walk[:-1] for walk in walks]),
        "actions": rng.uniform(-1, 1, (total, ACTION_DIM)).astype(np.float32),
        "rewards": np.arange(total, dtype=np.float32),
        "next_observations": np.concatenate([walk[1:] for walk in walks]),
        "terminals": np.zeros(total, bool),
        "timeouts": np.zeros(total, bool),
    }
    for (_, flag), last in zip(episodes, np.cumsum([steps for steps, _ in episodes]) - 1, strict=True):
        if flag:
            arrays[flag][last] = True
    return arrays


def write(path: Path, arrays: dict) -> Path:
    """An HDF5 file of arrays; a name with slashes makes groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def refused(call, *args) -> str:
    """What call(*args) tells the user: one UserError of one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def same(a: OfflineDataset, b: OfflineDataset) -> bool:
    return all(np.array_equal(getattr(a, key), getattr(b, key)) for key in OfflineDataset.ARRAYS)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def here(folders, monkeypatch):
    """Empty folders, no knowledge of published files, and no way out of this machine."""
    monkeypatch.setattr(data, "KNOWN", {})
    monkeypatch.setattr(data, "D4RL_LOCATIONS", (f"http://127.0.0.1:{closed_port()}",))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps the proxies of its first call


# ---- D4RL's layout and its quirks


def columns(arrays):
    return {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()}  # (N, 1) rewards and flags


def float64(arrays):
    return {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in arrays.items()}


def replay(arrays):
    qpos = np.zeros((len(arrays["rewards"]), 6))
    return arrays | {"metadata/algorithm": b"SAC", "infos/qpos": qpos, "infos/action_log_probs": qpos[:, 0]}


def medium(arrays):
    return arrays | {"metadata/policy/fc0/weight": np.zeros((256, OBS_DIM)), "metadata/iteration": 100}


def numbers(arrays):
    return arrays | {key: arrays[key].astype(np.float32) for key in ("terminals", "timeouts")}  # flags 0.0 and 1.0


@pytest.mark.parametrize("quirk", [dict, columns, float64, replay, medium, numbers])
def test_every_layout_gives_the_same_data(folders, quirk):
    arrays = hopper_arrays()
    loaded = load_dataset(NAME, write(folders / "mine.hdf5", quirk(arrays)))
    for key, written in (("obs", "observations"), ("action", "actions"), ("next_obs", "next_observations")):
        np.testing.assert_array_equal(getattr(loaded, key), arrays[written])
        assert getattr(loaded, key).dtype == np.float32
    np.testing.assert_array_equal(loaded.reward, np.arange(20, dtype=np.float32))
    assert loaded.reward.dtype == np.float32 and loaded.reward.shape == (20,)
    assert loaded.terminated.dtype == bool and np.flatnonzero(loaded.terminated).tolist() == FALLS
    assert loaded.lengths.tolist() == LENGTHS and loaded.complete.tolist() == COMPLETE
    assert loaded.returns.tolist() == [10, 26, 87]
    facts = loaded.facts()
    assert (facts["episodes"], facts["complete_episodes"], facts["steps"]) == (5, 3, 20)
    assert facts["mean_return"] == pytest.approx(MEAN_RETURN)
    assert facts["std_return"] == pytest.approx(np.sqrt((31**2 + 15**2 + 46**2) / 3))  # 10, 26, 87 about 41
    assert facts["sha256"] == sha256((folders / "mine.hdf5").read_bytes())
    assert (loaded.simulator, loaded.physics, loaded.robot) == ("Hopper-v4", "d4rl", "hopper")


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
        start = 0
        for length in lengths:
            np.testing.assert_array_equal(
                loaded.next_obs[start : start + length - 1], loaded.obs[start + 1 : start + length]
            )
            assert not loaded.terminated[start : start + length - 1].any()
            start += length


def test_cut_tail_alone(folders):
    """With no flag at all, nothing is complete, and the return is that of the cut episode: 0 + 1 + 2 + 3."""
    loaded = load_dataset(NAME, write(folders / "mine.hdf5", hopper_arrays([(4, None)])))
    assert loaded.complete.tolist() == [False] and loaded.returns.tolist() == [6]


# ---- Published counts


def publish(monkeypatch, counts=PUBLISHED, size=None, pinned=None):
    monkeypatch.setattr(data, "KNOWN", {NAME: (counts, size, pinned)})


def test_counts_that_agree(folders, monkeypatch):
    path = write(folders / "d4rl" / FILE, hopper_arrays())
    publish(monkeypatch)
    loaded = load_dataset(NAME)
    assert loaded.path == str(path)
    assert loaded.note == f"counts and mean return are those of the published {NAME} file"
    publish(monkeypatch, pinned=loaded.sha256)
    assert load_dataset(NAME).note == f"the published {NAME} file (sha256 as pinned)"
    publish(monkeypatch, pinned="0" * 64)  # same content, packed anew: both hashes are told
    note = load_dataset(NAME).note
    assert note.startswith("counts and mean return are") and loaded.sha256 in note and "0" * 64 in note


@pytest.mark.parametrize("counts", [(4, 18, 51.0), (3, 17, 51.0), (3, 18, 51.02)])
def test_counts_that_differ(folders, monkeypatch, counts):
    path = write(folders / "d4rl" / FILE, hopper_arrays())
    publish(monkeypatch, counts)
    message = refused(load_dataset, NAME)
    assert str(path) in message and "--data-path" in message
    assert "3 episodes, 18 steps, mean return 51.00 here" in message
    assert f"{counts[0]}, {counts[1]} and {counts[2]:.2f} there" in message
    assert load_dataset(NAME, path).note.startswith("not the published hopper-medium-v2 file: 3 episodes, 18 steps")


def test_no_counts_known(folders):
    write(folders / "d4rl" / FILE, hopper_arrays())
    assert load_dataset(NAME).note == f"no counts are known for the published {NAME} file"


# ---- Bad input: one line that names the thing and the way out


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),  # one letter short
        ("walker2d-medium-replay-v1", "walker2d-medium-replay-v2"),  # another version
        ("local/hopper/medum-v0", "local/hopper/medium-v0"),
        ("hopper/medium", "local/hopper/medium-v0"),  # a slash, but no version: not a Minari id
        ("zzz", "local/hopper/medium-v0"),  # like nothing known: the two first choices are offered
        ("", "hopper-medium-v2"),
    ],
)
def test_unknown_name(env_id, nearest):
    message = refused(load_dataset, env_id)
    assert repr(env_id) in message and nearest in message


def test_data_path_goes_with_a_d4rl_name(folders):
    path = write(folders / "mine.hdf5", hopper_arrays())
    message = refused(load_dataset, "local/hopper/medium-v0", path)
    assert "--data-path" in message and "local/hopper/medium-v0" in message and NAME in message


def test_missing_file(folders):
    for path in (folders / "none.hdf5", folders / "d4rl"):  # a folder is no file either
        message = refused(load_dataset, NAME, path)
        assert f"{path} does not exist" in message and "D4RL's HDF5 layout" in message


def test_damaged_file(folders):
    """Random bytes, cuts at every tenth, and an array's header overwritten: h5py raises different types for each."""
    path = write(folders / "mine.hdf5", hopper_arrays())
    whole = path.read_bytes()
    with h5py.File(path) as file:
        header = h5py.h5o.get_info(file["actions"].id).addr
    bad = [np.random.default_rng(0).bytes(len(whole)), b"", whole[:header] + b"\xff" * 16 + whole[header + 16 :]]
    for content in bad + [whole[: len(whole) * i // 10] for i in range(1, 10)]:
        path.write_bytes(content)
        message = refused(load_dataset, NAME, path)
        assert str(path) in message and "get it again" in message


def test_not_numbers(folders):
    """A group, a scalar or text in an array's place."""
    for key, value in (("rewards/a", np.ones(20)), ("rewards", 1.0), ("rewards", np.array([b"one"] * 20))):
        arrays = hopper_arrays()
        del arrays["rewards"]
        path = write(folders / "mine.hdf5", arrays | {key: value})
        assert str(path) in refused(load_dataset, NAME, path)


@pytest.mark.parametrize("keys", [["next_observations"], ["terminals", "timeouts"], list(hopper_arrays())])
def test_missing_keys(folders, keys):
    path = write(folders / "mine.hdf5", {k: v for k, v in hopper_arrays().items() if k not in keys})
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and "layout needs" in message
    assert set(message.split(" has no ")[1].split(";")[0].split(", ")) == set(keys)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("key", "name"),
    [("observations", "obs"), ("next_observations", "next_obs"), ("actions", "action"), ("rewards", "reward")],
)
def test_nan_and_infinity(folders, key, name, value):
    arrays = hopper_arrays()
    arrays[key][7] = value
    arrays[key][12] = value  # the first row is named, not the last
    path = write(folders / "mine.hdf5", arrays)
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and f": {name} holds NaN or infinity, first in row 7;" in message and "drop" in message


WRONG_SHAPES = {
    "two rewards per row": ("rewards", lambda a: np.stack([a, a], 1)),
    "two flags per row": ("timeouts", lambda a: np.stack([a, a], 1)),
    "flat observations": ("observations", lambda a: a[:, 0]),
    "narrow observations": ("observations", lambda a: a[:, :10]),
    "wide next observations": ("next_observations", lambda a: np.hstack([a, a])),
    "images": ("actions", lambda a: np.zeros((20, 3, 3), np.float32)),
    "flat actions": ("actions", lambda a: a[:, 0]),
    "wide actions": ("actions", lambda a: np.hstack([a, a])),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shapes(folders, case):
    key, change = WRONG_SHAPES[case]
    arrays = hopper_arrays()
    arrays[key] = change(arrays[key])
    path = write(folders / "mine.hdf5", arrays)
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and str(arrays[key].shape) in message


def test_another_robot(folders):
    """Hopper's arrays under Walker2d's name: 11 dimensions where the simulator has 17."""
    path = write(folders / "mine.hdf5", hopper_arrays())
    message = refused(load_dataset, "walker2d-medium-v2", path)
    assert str(path) in message and "(20, 11)" in message and "17" in message


@pytest.mark.parametrize("sign", [1, -1])
def test_actions_out_of_range(folders, sign):
    arrays = hopper_arrays()
    arrays["actions"][3, 1] = sign * 1.00001  # float32 rounding of a tanh policy: clipped
    loaded = load_dataset(NAME, write(folders / "near.hdf5", arrays))
    assert loaded.action[3, 1] == sign and np.abs(loaded.action).max() <= 1
    arrays["actions"][3, 1] = sign * 1.1
    path = write(folders / "far.hdf5", arrays)
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and "1.1" in message and "[-1, 1]" in message and "rescale" in message


@pytest.mark.parametrize("key", list(hopper_arrays()))
def test_unequal_lengths(folders, key):
    arrays = hopper_arrays()
    arrays[key] = arrays[key][:-1]
    path = write(folders / "mine.hdf5", arrays)
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and "unequal" in message and "(19" in message and "(20" in message


def test_empty_arrays(folders):
    path = write(folders / "mine.hdf5", {k: v[:0] for k, v in hopper_arrays().items()})
    message = refused(load_dataset, NAME, path)
    assert str(path) in message and "zero length" in message


# ---- Download


def closed_port() -> int:
    """A port of 127.0.0.1 where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        host, asked = self.server.host, self.headers["Range"]
        host.seen.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and host.ranges else 0
        if host.status != 200 or self.path != f"/data/{FILE}":
            self.send_error(host.status if host.status != 200 else 404)
        elif start >= len(host.body):
            self.send_error(416)
        else:
            rest = host.body[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: host.cuts.pop(0) if host.cuts else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(body, ...) starts a server of FILE at host.url; host.seen lists the Range header of each request.

    cuts: so many bytes of each answer, one answer after the other, before the connection is dropped; then whole ones.
    """
    servers = []

    def start(body=b"", cuts=(), ranges=True, status=200):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        server.host = SimpleNamespace(body=body, cuts=list(cuts), ranges=ranges, status=status, seen=[])
        server.host.url = f"http://127.0.0.1:{server.server_port}/data"
        monkeypatch.setattr(data, "D4RL_LOCATIONS", (server.host.url,))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server.host

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent():
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def body(folders):
    return write(folders / "published.hdf5", hopper_arrays()).read_bytes()


def left(folders) -> set[str]:
    """What lies in D4RL's folder, but for the lock, which stays."""
    return {path.name for path in (folders / "d4rl").iterdir()} - {f"{FILE}.lock"}


def test_download_whole(folders, monkeypatch, serve, body):
    host = serve(body)
    publish(monkeypatch, size=len(body), pinned=sha256(body))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folders / "deep" / "d4rl"))  # made on the way
    loaded = load_dataset(NAME)
    assert (folders / "deep" / "d4rl" / FILE).read_bytes() == body
    assert loaded.sha256 == sha256(body) and loaded.lengths.tolist() == LENGTHS
    load_dataset(NAME)
    assert host.seen == [None]  # one request, without Range; the second load made none


def test_download_cut_then_resumed(folders, serve, body):
    host = serve(body, cuts=[1000, 2000])
    load_dataset(NAME)
    assert host.seen == [None, "bytes=1000-", "bytes=3000-"]  # 1000 bytes, then 2000 more
    assert (folders / "d4rl" / FILE).read_bytes() == body and left(folders) == {FILE}


def test_server_ignores_range(folders, serve, body):
    host = serve(body, cuts=[1000], ranges=False)
    load_dataset(NAME)
    assert host.seen == [None, "bytes=1000-"]
    assert (folders / "d4rl" / FILE).read_bytes() == body  # begun again, not appended


def test_always_cut_goes_on_next_time(folders, serve, body):
    tenth = len(body) // 10
    host = serve(body, cuts=[tenth] * 8)
    message = refused(load_dataset, NAME)
    part = folders / "d4rl" / f"{FILE}.part"
    assert str(part) in message and "same command" in message
    assert part.read_bytes() == body[: 5 * tenth] and left(folders) == {part.name}  # five attempts, a tenth each
    load_dataset(NAME)  # three more tenths, then the rest
    assert host.seen == [None] + [f"bytes={i * tenth}-" for i in range(1, 9)]
    assert (folders / "d4rl" / FILE).read_bytes() == body and left(folders) == {FILE}


@pytest.mark.parametrize("wrong", ["hash", "size"])
def test_not_the_pinned_file(folders, monkeypatch, serve, body, wrong):
    serve(body)
    pinned = "0" * 64 if wrong == "hash" else sha256(body)
    publish(monkeypatch, size=len(body) + (wrong == "size"), pinned=pinned)
    message = refused(load_dataset, NAME)
    rejected = folders / "d4rl" / f"{FILE}.rejected"
    assert str(rejected) in message and sha256(body) in message and pinned in message and "--data-path" in message
    assert str(len(body)) in message and str(data.KNOWN[NAME][1]) in message
    assert rejected.read_bytes() == body and left(folders) == {rejected.name}
    assert load_dataset(NAME, rejected).lengths.tolist() == LENGTHS  # the way on that the message names


def test_second_location(folders, monkeypatch, serve, silent, body):
    """The first location has no such file, or never answers: the second one is used, without waiting for the first."""
    missing, good = serve(status=404), serve(body)
    for first in (missing.url, f"http://127.0.0.1:{silent}"):
        monkeypatch.setattr(data, "D4RL_LOCATIONS", (first, good.url))
        start = time.monotonic()
        load_dataset(NAME)
        assert time.monotonic() - start < 1.5  # a silent one alone takes CONNECT_SECONDS = 2
        assert (folders / "d4rl" / FILE).read_bytes() == body
        (folders / "d4rl" / FILE).unlink()
    assert missing.seen == [None] and good.seen == [None, None]


def test_no_location_has_it(folders, monkeypatch, serve):
    urls = [serve(status=404).url, serve(status=503).url]
    monkeypatch.setattr(data, "D4RL_LOCATIONS", urls)
    message = refused(load_dataset, NAME)
    assert f"{urls[0]}/{FILE}: HTTP 404; {urls[1]}/{FILE}: HTTP 503" in message
    assert str(folders / "d4rl" / FILE) in message and left(folders) == set()


def check_offline(folders):
    start = time.monotonic()
    message = refused(load_dataset, NAME)
    seconds = time.monotonic() - start
    assert f"{FILE} is not at {folders / 'd4rl' / FILE}" in message
    assert "put the file there" in message and "--data-path" in message
    assert "--env-id local/hopper/medium-v0" in message
    return message, seconds


def test_nothing_listens(folders):
    message, seconds = check_offline(folders)
    assert "no connection" in message and seconds < 2.5


def test_never_answers(folders, monkeypatch, silent):
    monkeypatch.setattr(data, "D4RL_LOCATIONS", (f"http://127.0.0.1:{silent}", f"http://127.0.0.1:{closed_port()}"))
    message, seconds = check_offline(folders)
    assert "no answer within 2 s" in message and "no connection" in message and seconds < 2.5


def test_answers_nonsense(folders, monkeypatch):
    """Something that is no web server: told at once, and no thread dies with a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(b"220 mail here\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setattr(data, "D4RL_LOCATIONS", (f"http://127.0.0.1:{server.getsockname()[1]}",))
        message, seconds = check_offline(folders)
        thread.join()
    assert "220 mail here" in message and seconds < 1.5


def test_offline_keeps_the_part(folders, body):
    part = folders / "d4rl" / f"{FILE}.part"
    part.write_bytes(body[:1000])
    check_offline(folders)
    assert part.read_bytes() == body[:1000]


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_part_is_already_whole(folders, serve, body, extra):
    """Killed before the renaming, or part of a longer file: the server answers 416, and the download starts anew."""
    (folders / "d4rl" / f"{FILE}.part").write_bytes(body + extra)
    host = serve(body)
    load_dataset(NAME)
    assert host.seen == [f"bytes={len(body + extra)}-", None]
    assert (folders / "d4rl" / FILE).read_bytes() == body and left(folders) == {FILE}


def test_too_large(folders, monkeypatch, serve, body):
    host = serve(body)
    monkeypatch.setattr(data, "MAX_FILE_BYTES", len(body) - 1)
    message = refused(load_dataset, NAME)
    assert f"{host.url}/{FILE}" in message and str(len(body)) in message and left(folders) == set()


def test_cannot_write(folders, monkeypatch, serve, body):
    serve(body)
    if os.path.exists("/dev/full"):  # a disk with no space: not taken for a cut connection
        (folders / "d4rl" / f"{FILE}.part").symlink_to("/dev/full")
        message = refused(load_dataset, NAME)
        assert "cannot write" in message and str(folders / "d4rl" / FILE) in message and "D4RL_DATASET_DIR" in message
    (folders / "file").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folders / "file"))
    message = refused(load_dataset, NAME)
    assert "cannot write" in message and str(folders / "file" / FILE) in message and "D4RL_DATASET_DIR" in message


def test_two_at_once(folders, serve, body):
    """The second waits for the first one's file: one request in all, and both have the data."""
    host, loaded = serve(body), []
    threads = [threading.Thread(target=lambda: loaded.append(load_dataset(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 2 and same(*loaded) and host.seen == [None]


# ---- Cache


@pytest.fixture
def reads(monkeypatch):
    """The paths that were really read as HDF5, in order."""
    paths, read = [], data._read_d4rl
    monkeypatch.setattr(data, "_read_d4rl", lambda path: paths.append(path) or read(path))
    return paths


def test_second_load_reads_the_cache(folders, monkeypatch):
    path = write(folders / "mine.hdf5", hopper_arrays())
    first = load_dataset(NAME, path)

    def fail(path):
        raise AssertionError("the HDF5 was read again")

    monkeypatch.setattr(data, "_read_d4rl", fail)
    second = load_dataset(NAME, path)
    assert same(first, second) and first.facts() == second.facts()
    assert len(list((folders / "cache").glob("*.npz"))) == 1
    assert len(list((folders / "cache").iterdir())) == 3  # the npz, its sha256 and the lock; no temporary file


def test_flipped_byte_in_the_cache(folders, reads, capsys):
    path = write(folders / "mine.hdf5", hopper_arrays())
    first = load_dataset(NAME, path)
    (flat,) = (folders / "cache").glob("*.npz")
    whole = flat.read_bytes()
    with np.load(flat) as arrays:
        place = whole.index(arrays["reward"].tobytes()) + 2  # a byte of a value: only the sha256 can tell
    flat.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert same(load_dataset(NAME, path), first) and reads == [path, path]
    assert flat.read_bytes() == whole and f"{flat} is damaged" in capsys.readouterr().out  # mended, and told
    load_dataset(NAME, path)
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"npz": "0", "source": "0"}'])
def test_damaged_sums(folders, reads, content):
    path = write(folders / "mine.hdf5", hopper_arrays())
    first = load_dataset(NAME, path)
    (sums,) = (folders / "cache").glob("*.sha256")
    sums.write_bytes(content)
    assert same(load_dataset(NAME, path), first) and len(reads) == 2


def test_missing_half_of_the_cache(folders, reads):
    path = write(folders / "mine.hdf5", hopper_arrays())
    first = load_dataset(NAME, path)
    for i, half in enumerate(("*.npz", "*.sha256"), 2):
        next((folders / "cache").glob(half)).unlink()
        assert same(load_dataset(NAME, path), first) and len(reads) == i


def test_changed_source(folders, reads):
    """Same path and size, other content: what is loaded is the new file."""
    arrays = hopper_arrays()
    path = write(folders / "mine.hdf5", arrays)
    os.utime(path, ns=(0, 10**18))
    first, size = load_dataset(NAME, path), path.stat().st_size
    write(path, arrays | {"rewards": arrays["rewards"] + 1})
    os.utime(path, ns=(0, 10**18 + 1))
    second = load_dataset(NAME, path)
    assert path.stat().st_size == size and len(reads) == 2
    assert (second.reward - first.reward).tolist() == [1.0] * 20 and second.sha256 != first.sha256
    assert len(list((folders / "cache").glob("*.npz"))) == 2


def test_unwritable_cache(folders, monkeypatch, reads, capsys):
    path = write(folders / "mine.hdf5", hopper_arrays())
    (folders / "file").touch()  # a file in the folder's place stops root too
    monkeypatch.setenv("DAWM_CACHE_DIR", str(folders / "file"))
    assert load_dataset(NAME, path).lengths.tolist() == LENGTHS
    printed = capsys.readouterr().out
    assert printed.startswith(f"note: no data cache at {folders / 'file'}") and printed.count("\n") == 1
    assert same(load_dataset(NAME, path), load_dataset(NAME, path)) and len(reads) == 3


def test_cache_does_not_skip_the_checks(folders):
    arrays = hopper_arrays()
    arrays["rewards"][7] = np.nan
    path = write(folders / "mine.hdf5", arrays)
    assert refused(load_dataset, NAME, path) == refused(load_dataset, NAME, path)


# ---- Minari

MINARI_ID = "tiny/hopper/walk-v0"
ENDS = [(4, True, False), (3, False, True), (2, False, False)]  # (steps, terminated, truncated); the last is cut


def buffers(obs_dim=OBS_DIM, action_dim=ACTION_DIM) -> list[EpisodeBuffer]:
    rng = np.random.default_rng(2)
    return [
        EpisodeBuffer(
            observations=rng.standard_normal((steps + 1, obs_dim)),
            actions=rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
            rewards=rng.standard_normal(steps),
            terminations=np.arange(steps) == (steps - 1 if terminated else -1),
            truncations=np.arange(steps) == (steps - 1 if truncated else -1),
        )
        for steps, terminated, truncated in ENDS
    ]


def create(env_id, episodes, **spaces):
    """A set in the Minari root of the moment; spaces instead of Hopper-v5 make one that names no simulator."""
    minari.create_dataset_from_buffers(env_id, episodes, **(spaces or {"env": "Hopper-v5"}), data_format="hdf5")


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


def check_values(loaded):
    """Against the buffers that went in."""
    obs = [b.observations for b in buffers()]
    np.testing.assert_array_equal(loaded.obs, np.concatenate([o[:-1] for o in obs]).astype(np.float32))
    np.testing.assert_array_equal(loaded.next_obs, np.concatenate([o[1:] for o in obs]).astype(np.float32))
    np.testing.assert_array_equal(loaded.action, np.concatenate([b.actions for b in buffers()]))
    np.testing.assert_array_equal(loaded.reward, np.concatenate([b.rewards for b in buffers()]).astype(np.float32))
    assert loaded.lengths.tolist() == [4, 3, 2] and loaded.complete.tolist() == [True, True, False]
    assert np.flatnonzero(loaded.terminated).tolist() == [3]  # the last of the first episode's four rows
    assert {a.dtype for a in (loaded.obs, loaded.next_obs, loaded.action, loaded.reward)} == {np.dtype(np.float32)}


def test_minari(folders, stored, monkeypatch):
    loaded = load_dataset(MINARI_ID)
    check_values(loaded)
    assert (loaded.source, loaded.simulator, loaded.physics) == ("Minari data set", "Hopper-v5", "stock")
    assert loaded.robot == "hopper" and loaded.path == str(stored)
    assert loaded.sha256 == sha256((stored / "data" / "main_data.hdf5").read_bytes())
    monkeypatch.setattr(data, "_read_minari", None)  # the second load comes from the cache
    assert same(load_dataset(MINARI_ID), loaded)


def test_local(folders, made, monkeypatch):
    """A local name makes its set once, then reads it; it is never called D4RL's."""
    env_id, calls = "local/hopper/medium-v0", []

    def make(command):
        calls.append(command[1:])
        shutil.copytree(made, folders / "minari" / env_id)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(data.subprocess, "run", make)
    for _ in range(2):
        loaded = load_dataset(env_id)
        check_values(loaded)
    script = Path(data.__file__).resolve().parent.parent / "local_datasets" / "collect.py"
    assert calls == [[script, "--env-id", env_id]]
    assert "not D4RL" in loaded.source and loaded.physics == "d4rl" and loaded.env_id == env_id


def test_local_cannot_be_made(monkeypatch):
    """collect.py has told the reason in its one line; nothing is added to it."""
    monkeypatch.setattr(data.subprocess, "run", lambda command: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit) as stop:
        load_dataset("local/hopper/medium-v0")
    assert stop.value.code == 2


def edit_metadata(folder, **changes):
    path = folder / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(change, name="main_data.hdf5"):
    """A damage: the bytes of one of a set's two files become change(bytes)."""
    return lambda folder: (folder / "data" / name).write_bytes(change((folder / "data" / name).read_bytes()))


MINARI_DAMAGE = {
    "truncated": rewrite(lambda whole: whole[: len(whole) // 2]),
    "nothing written yet": rewrite(lambda whole: b""),
    "episodes not counted": lambda folder: edit_metadata(folder, total_episodes=0),
    "fewer than counted": lambda folder: edit_metadata(folder, total_episodes=5),
    "no metadata": lambda folder: (folder / "data" / "metadata.json").unlink(),
    "empty metadata": rewrite(lambda whole: b"", "metadata.json"),
    "metadata cut": rewrite(lambda whole: whole[: len(whole) // 2], "metadata.json"),
    "metadata without spaces": rewrite(lambda whole: b'{"total_episodes": 3}', "metadata.json"),
    "metadata of another type": lambda folder: edit_metadata(folder, env_spec=7),
    "another format": lambda folder: edit_metadata(folder, data_format="stone"),
    "no data": lambda folder: (folder / "data" / "main_data.hdf5").unlink(),
    "empty folder": lambda folder: (shutil.rmtree(folder / "data"), (folder / "data").mkdir()),
}


@pytest.mark.parametrize("case", MINARI_DAMAGE)
def test_damaged_minari(stored, case):
    """As a killed writer or copy leaves it."""
    MINARI_DAMAGE[case](stored)
    message = refused(load_dataset, MINARI_ID)
    assert MINARI_ID in message and "delete" in message
    assert ("holds no episode" in message) == (case == "episodes not counted")


def with_change(**changes):
    """The buffers, with changed fields in the second episode."""
    first, second, third = buffers()
    fields = {key: change(getattr(second, key)) for key, change in changes.items()}
    return [first, dataclasses.replace(second, **fields), third]


def put(value):
    def change(array):
        array[1] = value
        return array

    return change


MINARI_VALUES = {  # what is wrong: (episodes, words of the message); Minari stores all of these without a word
    "NaN": (with_change(rewards=put(np.nan)), "reward holds NaN or infinity, first in row 5;"),  # 4 rows before, then 1
    "infinity": (with_change(observations=put(np.inf)), "obs holds NaN or infinity, first in row 5;"),
    "range": (with_change(actions=put(2)), "2 lies outside [-1, 1]"),
    "no last state": (with_change(observations=lambda o: o[:-1]), "episode 1 has 3 observations, 3 actions"),
    "reward missing": (with_change(rewards=lambda r: r[:-1]), "[(2,), (3,), (3,)]"),
    "reward column": (with_change(rewards=lambda r: r[:, None]), "[(3, 1), (3,), (3,)]"),
    "flat actions": (with_change(actions=lambda a: a[:, 0]), ""),
    "narrow": (buffers(obs_dim=10), "obs has shape (9, 10)"),
    "few actions": (buffers(action_dim=2), "action has shape (9, 2)"),
}


@pytest.mark.parametrize("case", MINARI_VALUES)
def test_bad_values_in_minari(case):
    episodes, words = MINARI_VALUES[case]
    create("tiny/bad-v0", episodes)
    message = refused(load_dataset, "tiny/bad-v0")
    assert "tiny/bad-v0" in message and words in message


def test_minari_without_simulator_or_boxes():
    box = gym.spaces.Box(np.arange(-OBS_DIM, 0.0), np.ones(OBS_DIM), dtype=np.float64)  # its repr has two lines
    action = gym.spaces.Box(-1, 1, (ACTION_DIM,))
    create("tiny/none-v0", buffers(), observation_space=box, action_space=action)
    assert "named simulator" in refused(load_dataset, "tiny/none-v0")
    episodes = [dataclasses.replace(b, actions=np.zeros(len(b.rewards), int)) for b in buffers()]
    create("tiny/discrete-v0", episodes, observation_space=box, action_space=gym.spaces.Discrete(2))
    message = refused(load_dataset, "tiny/discrete-v0")
    assert "tiny/discrete-v0" in message and "Discrete" in message


@pytest.mark.parametrize("answers", [False, True])
def test_unknown_minari_id_offline(folders, monkeypatch, silent, answers):
    """Nothing listens, or the network swallows the question: told within 2.5 s, with the folder and a known name."""
    if answers:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{silent}")
    start = time.monotonic()
    message = refused(load_dataset, "mujoco/hopper/medium-v0")
    assert time.monotonic() - start < 2.5
    assert str(folders / "minari" / "mujoco/hopper/medium-v0") in message
    assert "local/hopper/medium-v0" in message and ("no answer within 2 s" if answers else "no connection") in message
    assert list((folders / "minari").iterdir()) == []  # no half-made set that would block the id


@pytest.mark.parametrize("error", [ValueError("no such\nset"), RuntimeError(), ImportError("no hub")])
def test_minari_download_fails(monkeypatch, error):
    """A network, but no such set: whatever the hub client raises becomes one line."""

    def download(env_id):
        raise error

    monkeypatch.setattr(data, "_first_answer", lambda urls, start: (SimpleNamespace(), {}))
    monkeypatch.setattr(minari, "download_dataset", download)
    message = refused(load_dataset, "mujoco/hopper/nothing-v0")
    assert "mujoco/hopper/nothing-v0" in message and (str(error).split() or ["RuntimeError"])[-1] in message


@pytest.mark.parametrize(
    "env_id",
    [
        "../../etc/x-v0",
        "../x-v0",
        "foo/../../x-v0",
        "foo/../../../x-v0",
        "local/../../x-v0",
        "./x-v0",
        "foo//x-v0",
        "foo/x-v0/",
        "foo/x-v0\n",
        "foo\\..\\x-v0",
        "{outside}/x-v0",  # an absolute path
    ],
)
def test_ids_cannot_leave_the_root(folders, made, env_id):
    """A readable set lies where the first ids lead: it must not be found, and nothing may be made there."""
    (folders / "minari" / "foo").mkdir()
    shutil.copytree(made, folders / "x-v0")
    env_id = env_id.replace("{outside}", str(folders))
    before = sorted(folders.rglob("*"))
    assert refused(load_dataset, env_id).startswith(f"unknown --env-id {env_id!r}")
    assert sorted(folders.rglob("*")) == before
