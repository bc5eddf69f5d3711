"""Kills, signals and cut writes: what an interrupted run has on disk, and that the same command ends as if nothing had
happened.
"""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trials import INT, KILL, RUNS, TERM, USR1, child, command, finish, outcome, run_script, stages_of

from common.run import STOPPED, Stage, disk_trouble, load_checkpoint, save_checkpoint, write_whole

QUICK = ("dawm_td3bc",)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """reference(name): the folder and outcome of an uninterrupted run, made once."""
    made = {}

    def reference(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            script, arguments = command(name, folder)
            assert finish(script, arguments, folder / "log") == 0, (folder / "log").read_text()[-2000:]
            made[name] = folder, outcome(folder)
        return made[name]

    return reference


def wait_for(word: str, log: Path) -> None:
    while not log.exists() or word not in log.read_text():
        time.sleep(0.002)


def same(a: dict, b: dict) -> bool:
    return a["metrics"] == b["metrics"] and a["files"] == b["files"] and a["tensorboard"] == b["tensorboard"]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in RUNS])
def test_kill_and_the_same_command(name, reference, trials, told):
    """Stages in turn, each at a random moment: the end is that of the uninterrupted run, in one folder."""
    folder, whole = reference(name)
    stages, count, resumed = stages_of(folder), trials(2, 20), 0
    for trial in range(count):
        random.seed(trial)
        here = folder.parent / f"{name}-{trial}"
        script, arguments = command(name, here)
        stage, share = stages[trial % len(stages)], random.random()
        assert finish(script, arguments, here / "log", stop_in=stage, share=share, number=KILL) == -KILL
        assert finish(script, arguments, here / "again") == 0, (here / "again").read_text()[-2000:]
        assert same(outcome(here), whole), (stage, share)
        resumed += "goes on at" in (here / "again").read_text()
    told(
        f"kill -9 in {name} ({', '.join(stages)}), then the same command",
        f"{count} of {count} end bit-identical, {resumed} from a checkpoint",
    )


@pytest.mark.full
def test_three_kills_in_one_run(reference):
    folder, whole = reference("dawm_td3bc")
    here = folder.parent / "three"
    script, arguments = command("dawm_td3bc", here)
    for stage, share in (("world model", 0.5), ("world model", 0.8), ("agent", 0.6)):
        assert finish(script, arguments, here / "log", stop_in=stage, share=share, number=KILL) == -KILL
    assert finish(script, arguments, here / "log") == 0 and same(outcome(here), whole)


def test_resume_by_folder(reference):
    folder, whole = reference("dawm_td3bc")
    here = folder.parent / "resume"
    script, arguments = command("dawm_td3bc", here)
    assert finish(script, arguments, here / "log", stop_in="agent", share=0.5, number=KILL) == -KILL
    (run,) = (here / "runs").iterdir()
    assert finish(script, ["--resume", str(run)], here / "again") == 0, (here / "again").read_text()
    assert same(outcome(here), whole)
    assert finish(script, ["--resume", str(run)], here / "third") == 2
    assert "has finished" in (here / "third").read_text()


@pytest.mark.full
def test_fresh_stays_fresh_and_still_resumes(reference):
    """A run with --fresh uses nothing that is kept, but after a kill it goes on with what it made itself."""
    folder, whole = reference("dawm_td3bc")
    script, arguments = command("dawm_td3bc", folder.parent / "fresh")
    arguments += ["--stage-dir", str(folder / "stages"), "--fresh"]
    log, again = folder.parent / "fresh" / "log", folder.parent / "fresh" / "again"
    assert finish(script, arguments, log, stop_in="inverse dynamics", share=0.5, number=KILL) == -KILL
    assert "reused" not in log.read_text()
    assert finish(script, arguments, again) == 0
    text = again.read_text()
    assert re.search(r"world model +reused", text) and re.search(r"inverse dynamics +goes on at", text)
    assert not re.search(r"synthesis +reused", text)
    (metrics,) = (folder.parent / "fresh" / "runs").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines] == whole["metrics"]


@pytest.mark.parametrize(
    "number",
    [TERM, pytest.param(USR1, marks=pytest.mark.full), pytest.param(INT, marks=pytest.mark.full)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_signals(number, reference, trials):
    """A checkpoint, exit code 75, at most 5 seconds; the same command ends as if nothing had happened."""
    folder, whole = reference("dawm_td3bc")
    count = trials(1, 20 if number == TERM else 5)
    for trial in range(count):
        random.seed(trial)
        here = folder.parent / f"{signal.Signals(number).name}-{trial}"
        script, arguments = command("dawm_td3bc", here, "--checkpoint-every", "1000")  # none but the signal's
        stage = ["agent", "world model", "inverse dynamics", "synthesis"][trial % 4]
        pid = child(
            lambda: run_script(script, arguments, stop_in=stage, share=random.uniform(0.2, 0.8), number=number),
            here / "log",
        )
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = (here / "log").read_text()
        assert code == STOPPED, text[-2000:]
        assert f"stopped by {signal.Signals(number).name} in stage {stage}" in text and "with a checkpoint" in text
        assert "to go on: " in text and f"{script}.py" in text
        assert finish(script, arguments, here / "again") == 0 and "goes on at" in (here / "again").read_text()
        assert same(outcome(here), whole), (stage, trial)


def test_sigterm_within_five_seconds(tmp_path, trials, told):
    """Measured from outside, from the signal to the end of the process, at random moments of a whole run."""
    script, arguments = command("dawm_td3bc", tmp_path / "run")
    arguments += ["--world-model-steps", "100000"]
    slowest, count, saved = 0.0, trials(2, 20), 0
    for trial in range(count):
        random.seed(trial)
        pid = child(lambda: run_script(script, arguments), tmp_path / f"log{trial}")
        wait_for("world model", tmp_path / f"log{trial}")
        time.sleep(random.uniform(0.5, 2))
        start = time.monotonic()
        os.kill(pid, TERM)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        slowest = max(slowest, time.monotonic() - start)
        saved += "with a checkpoint" in (tmp_path / f"log{trial}").read_text()
        assert code == STOPPED and slowest < 5
    assert saved == count
    told("SIGTERM: checkpoint and exit code 75 within 5 s", f"{count} of {count}, the slowest {slowest:.1f} s")


def test_a_signal_where_nothing_listens(tmp_path):
    """A stage that does not come to its next item: the run ends all the same, within 5 seconds, with code 75."""
    pid = child(lambda: endless(), tmp_path / "log")
    wait_for("begun", tmp_path / "log")
    start = time.monotonic()
    os.kill(pid, TERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == STOPPED and time.monotonic() - start < 5
    assert "stopped by SIGTERM, between two checkpoints" in (tmp_path / "log").read_text()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    pid = child(lambda: endless(), tmp_path / "log")
    wait_for("begun", tmp_path / "log")
    start = time.monotonic()
    os.kill(pid, INT)
    time.sleep(0.2)
    os.kill(pid, INT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130 and time.monotonic() - start < 2


def endless():
    from common.run import Signals

    with Signals():
        print("begun")
        while True:
            time.sleep(0.01)


class Counter(torch.nn.Module):
    """Half a megabyte that all says the same number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("number", torch.zeros(2**17))


def a_stage(folder: Path, saves: tuple, total: int = 10**6) -> Stage:
    run = SimpleNamespace(
        args=SimpleNamespace(checkpoint_every=1e-9), checkpoint_folders={"count": folder}, records=[], elsewhere=0.0,
        device=torch.device("cpu"), say=lambda *words: print(*words), last_checkpoint=None, stages={}, before=0.0,
        log=lambda step, values: None,
    )  # fmt: skip
    return Stage(run, "count", total, "item", saves)


def count_for_ever(folder: Path) -> None:
    counter = Counter()
    with a_stage(folder, (counter,)) as stage:
        print("begun")
        for item in stage:
            counter.number.fill_(item)


def test_kill_while_a_checkpoint_is_written(tmp_path, trials, told):
    """The process does nothing but write checkpoints. What is found is whole, and never older than one before."""
    count, newest = trials(20, 200), 0
    for trial in range(count):
        random.seed(trial)
        pid = child(lambda: count_for_ever(tmp_path / "checkpoints"), tmp_path / f"log{trial}")
        wait_for("begun", tmp_path / f"log{trial}")
        time.sleep(random.uniform(0, 0.15))
        os.kill(pid, KILL)
        os.waitpid(pid, 0)
        counter = Counter()
        with a_stage(tmp_path / "checkpoints", (counter,), total=0) as stage:
            assert (counter.number == stage.done).all() and stage.done >= newest - 1
            newest = stage.done
        # Two, one that a kill left before the oldest went, and one that never got its sha256.
        assert len(list((tmp_path / "checkpoints").glob("*.pt"))) <= 4
    assert newest > count / 4  # it came on, from kill to kill
    told("kill during a checkpoint write", f"{count} trials, none unreadable")


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_same_numbers(threads, tmp_path, told):
    """Three processes of each script: metrics and weights are equal to the bit."""
    for name in RUNS:
        found = []
        for i in range(3):
            here = tmp_path / f"{name}-{i}"
            script, arguments = command(name, here, "--threads", str(threads))
            result = subprocess.run(
                [sys.executable, f"{script}.py", *arguments], cwd=Path(__file__).resolve().parents[2],
                capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
            assert result.returncode == 0, result.stderr[-2000:]
            found.append(outcome(here))
        assert all(same(other, found[0]) for other in found[1:]), name
    told(f"same seed, {threads} thread{'s' * (threads > 1)}", f"three runs of each of {len(RUNS)} commands: identical")


def test_a_run_of_another_script_or_no_run_is_not_resumed(tmp_path, reference):
    folder, _ = reference("dawm_td3bc")
    (run,) = (folder / "runs").iterdir()
    for arguments, message in [
        (["--resume", str(run)], "is a run of dawm_td3bc.py"),
        (["--resume", str(tmp_path)], "is not the folder of a run"),
        (["--resume", str(run), "--seed", "1"], "--resume RUN_FOLDER takes every argument from that run"),
    ]:
        assert finish("dawm_iql", arguments, tmp_path / "log") == 2
        assert message in (tmp_path / "log").read_text()


def test_changed_code_begins_a_new_run(reference):
    """Nothing of the interrupted run is touched; --resume says what is the matter."""
    folder, _ = reference("dawm_td3bc")
    here = folder.parent / "code"
    script, arguments = command("dawm_td3bc", here)
    assert finish(script, arguments, here / "log", stop_in="agent", share=0.5, number=KILL) == -KILL
    (run,) = (here / "runs").iterdir()
    content = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(content | {"code": "other"}))
    before = (run / "metrics.jsonl").read_bytes()
    assert finish(script, ["--resume", str(run)], here / "again") == 2
    assert "was made by other code" in (here / "again").read_text()
    assert finish(script, arguments, here / "new") == 0 and "resumed" not in (here / "new").read_text()
    assert (run / "metrics.jsonl").read_bytes() == before and len(list((here / "runs").iterdir())) == 2


def test_a_checkpoint_is_not_written_twice(tmp_path):
    """A signal right after a resume leaves the checkpoint that it came from alone."""
    counter = Counter()
    with a_stage(tmp_path, (counter,), total=3) as stage:
        for _ in stage:
            pass
    newest = sorted(tmp_path.glob("*.pt"))[-1]
    before = newest.stat().st_mtime_ns, newest.stat().st_ino
    with a_stage(tmp_path, (Counter(),), total=3) as stage:
        assert stage.checkpoint() and (newest.stat().st_mtime_ns, newest.stat().st_ino) == before


def test_what_was_cut_or_damaged_never_counts_as_the_one_before(tmp_path):
    """Checkpoint 2 is whole, 3 is damaged, 5 and 6 never got their sha256: after 4 is written, 2 and 4 are left."""
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, {"number": number})
    for number in (5, 6):
        (tmp_path / f"{number:012d}.pt").write_bytes(b"cut")
    (tmp_path / ".000000000007.pt.123").write_bytes(b"cut")
    (tmp_path / f"{3:012d}.pt").write_bytes(b"damaged")
    told = []
    _, content = load_checkpoint(tmp_path, torch.device("cpu"), told.append)
    assert content["number"] == 2 and len(told) == 1 and "000000000003.pt is damaged" in told[0]
    save_checkpoint(tmp_path, 4, {"number": 4})
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["000000000002.pt", "000000000004.pt"]
    assert not list(tmp_path.glob(".*"))


def test_a_write_that_fails_names_its_path(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_whole(tmp_path / "file", lambda file: file.write(b"after"))
    text = disk_trouble(error.value.filename, error.value)
    assert text.startswith(f"cannot write {tmp_path / 'file'} (No space left on device; ") and "MiB free there" in text
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


def test_two_runs_of_one_command_do_not_share_a_folder(reference, tmp_path):
    """The second starts while the first runs: it makes a folder of its own."""
    script, arguments = command("dawm_td3bc", tmp_path / "both")
    arguments += ["--synthetic-fraction", "0", "--agent-updates", "300"]
    pids = [child(lambda: run_script(script, arguments), tmp_path / f"log{i}") for i in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    metrics = list((tmp_path / "both" / "runs").glob("*/metrics.jsonl"))
    assert len(metrics) == 2 and "goes on" not in (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
