"""Kills, signals and cut writes: what an interrupted run has on disk, and that the same command ends as if nothing had
happened.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.cli import STOPPED
from common.stages import load_checkpoint, save_checkpoint

import pytest
import torch
from toy import ROOT, child, run_script, wait_for
from trials import (
    COMMANDS,
    INT,
    KILL,
    TERM,
    USR1,
    checkpoints,
    command,
    count_for_ever,
    counting,
    endless,
    finish,
    make,
    outcome,
    outcome_below,
    run_and_stop,
    run_as_other_code,
    stages_of,
    text_of,
)

CPU = torch.device("cpu")


def tail(log: Path) -> str:
    return text_of(log)[-2000:]


# What these train is in the others too.
TWINS = [(module, "") for module in ("dawm_iql", "dwm_baseline", "baselines.ssorl", "variants.uncertain_td3bc")]
TWINS += [("dawm_td3bc", "--synthesis online"), ("dwm_baseline", "--agent iql --rollouts online")]
TWINS += [("baselines.one_step", "--preset dwm")]


@pytest.mark.parametrize(
    "module, options", [pytest.param(*x, marks=pytest.mark.full) if x in TWINS else x for x in COMMANDS]
)
def test_kills_and_the_same_command(module, options, made, tmp_path, trials, told):
    """Killed in each stage at a random moment, a run ends as the one that nobody killed, in one folder."""
    whole, _ = made(module, *options.split())
    stages, count, resumed = stages_of(whole), trials(1, 10), 0
    for trial in range(count):
        here, chance = tmp_path / str(trial), random.Random(trial)
        line = command(here, *options.split(), module=module)
        for stage in stages:
            share, delay = chance.random(), chance.uniform(0, 0.02)
            assert finish(run_and_stop, *line, stage, share, KILL, delay, log=here / "log") == -KILL, tail(here / "log")
        assert finish(run_script, *line, log=here / "log") == 0, tail(here / "log")
        assert outcome_below(here) == outcome(whole), trial
        resumed += text_of(here / "log").count("goes on at")
    told(
        f"kill -9 in {module} {options} ({', '.join(stages)}), then the same command",
        f"{count * len(stages)} kills, {resumed} resumed from a checkpoint: {count} of {count} end bit-identical",
    )


@pytest.mark.parametrize(
    "number, many",
    [(TERM, 20), pytest.param(USR1, 5, marks=pytest.mark.full), pytest.param(INT, 5, marks=pytest.mark.full)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_signals(number, many, made, tmp_path, trials, told):
    """A checkpoint, exit code 75 and the way on; the same command ends as if nothing had happened."""
    whole, _ = made("dawm_td3bc")
    stages, name, count = list(stages_of(whole)), signal.Signals(number).name, trials(1, many)
    for trial in range(count):
        here, again = tmp_path / str(trial), tmp_path / str(trial) / "again"
        stage, kept = stages[-(trial + 1) % len(stages)], ["--stage-dir", whole.parent.parent / "stages"]
        line = command(here, *(kept if stage == stages[-1] else []))  # what stands before the last one is found
        share = random.Random(trial).uniform(0.2, 0.8)
        assert finish(run_and_stop, *line, stage, share, number, log=here / "log") == STOPPED, tail(here / "log")
        stop = re.search(
            rf"stopped by {name} in stage {stage} at (\d+ of \d+ .*), with a checkpoint; (.*)", text_of(here / "log")
        )
        assert stop and stop[2].startswith("to go on: python dawm_td3bc.py --env-id hopper-medium-v2 "), tail(
            here / "log"
        )
        assert finish(run_script, *line, log=again) == 0 and f"goes on at {stop[1]}, from " in again.read_text()
        assert outcome_below(here) == outcome(whole), (stage, trial)
    told(f"{name} in each stage, then the same command", f"{count} of {count} end bit-identical")


def test_sigterm_within_five_seconds(tmp_path, trials, told):
    """Measured from outside, from the signal to the end of the process, at random moments of the first stage."""
    line = command(tmp_path, "--world-model-steps", "100000", "--checkpoint-every", "5")
    slowest, count = 0.0, trials(1, 20)
    for trial in range(count):
        log = tmp_path / f"log{trial}"
        process = child(run_script, *line, log=log)
        wait_for(lambda: "\nrun " in text_of(log))
        time.sleep(random.Random(trial).uniform(0.3, 1.5))
        start = time.monotonic()
        os.kill(process.pid, TERM)
        process.join()
        slowest = max(slowest, time.monotonic() - start)
        assert process.exitcode == STOPPED and "with a checkpoint" in log.read_text(), tail(log)
    assert slowest < 5
    told("SIGTERM: checkpoint and exit code 75 within 5 s", f"{count} of {count}, the slowest {slowest:.1f} s")


def test_signals_where_nothing_listens(tmp_path):
    """Where no step ends, SIGTERM ends the run within 5 seconds, with code 75; a second Ctrl-C at once."""
    first, second = (child(endless, log=tmp_path / name) for name in ("TERM", "INT"))
    wait_for(lambda: "begun" in text_of(tmp_path / "TERM") and "begun" in text_of(tmp_path / "INT"))
    start = time.monotonic()
    os.kill(first.pid, TERM), os.kill(second.pid, INT)
    time.sleep(0.2)
    os.kill(second.pid, INT)
    second.join()
    assert second.exitcode == 130 and time.monotonic() - start < 2
    first.join()
    assert first.exitcode == STOPPED and time.monotonic() - start < 5
    assert "stopped by SIGTERM, between two checkpoints" in (tmp_path / "TERM").read_text()


# ---- Whose folder it is


def test_other_code_begins_a_new_run_and_a_finished_one_stays_as_it_is(tmp_path):
    """Of an interrupted run nothing is touched by another version of the script, nor of a finished one by its own."""
    module, arguments = command(tmp_path, "--synthetic-fraction", "0")
    assert finish(run_and_stop, module, arguments, "agent", 0.5, KILL, log=tmp_path / "log") == -KILL
    (cut,) = (tmp_path / "runs").iterdir()
    before = (cut / "metrics.jsonl").read_bytes()
    assert finish(run_as_other_code, module, arguments, log=tmp_path / "other") == 0
    assert (cut / "metrics.jsonl").read_bytes() == before and "resumed" not in (tmp_path / "other").read_text()
    assert finish(run_script, module, arguments, log=tmp_path / "again") == 0
    assert f"resumed          {cut} was interrupted" in (tmp_path / "again").read_text()
    assert finish(run_script, module, arguments, log=tmp_path / "third") == 0 and "resumed" not in tail(
        tmp_path / "third"
    )
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_two_runs_of_one_command_do_not_share_a_folder(tmp_path):
    """The second starts while the first runs: it makes a folder of its own."""
    line = command(tmp_path, "--synthetic-fraction", "0", "--checkpoint-every", "1")
    both = [child(run_script, *line, log=tmp_path / f"log{i}") for i in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    metrics = list((tmp_path / "runs").glob("*/metrics.jsonl"))
    assert len(metrics) == 2 and metrics[0].read_text().count("agent/qf_loss") == 4
    assert "goes on" not in (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_same_numbers(threads, tmp_path, told):
    """Three processes of each command, the first begun by Python itself: metrics and weights are equal to the bit."""
    for module, options in COMMANDS:
        found = []
        for i in range(3):
            here = tmp_path / f"{module}{options}-{i}"
            _, arguments = command(here, *options.split(), "--threads", str(threads), module=module)
            if i == 0:
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, check=True)
            else:
                assert finish(run_script, module, arguments, log=here / "log") == 0, tail(here / "log")
            found.append(outcome_below(here))
        assert found[1] == found[0] and found[2] == found[0], (module, options)
    told(
        f"same seed, {threads} thread{'s' * (threads > 1)}",
        f"three runs of each of {len(COMMANDS)} commands: identical",
    )


# ---- What is written in parts


def test_kill_while_a_checkpoint_is_written(tmp_path, trials, told):
    """The process does nothing but write checkpoints. What is found is whole, and never older than one before."""
    count, newest = trials(10, 200), 0
    for trial in range(count):
        process = child(count_for_ever, tmp_path, log=tmp_path / f"log{trial}")
        wait_for(lambda: "begun" in text_of(tmp_path / f"log{trial}"))
        time.sleep(random.Random(trial).uniform(0, 0.15))
        process.kill()
        process.join()
        left = checkpoints(tmp_path)
        assert len(left) <= 4  # two, one that a kill left before the oldest went, and one that never got its sha256
        if left:
            _, content = load_checkpoint(left[0].parent, CPU, print)
            assert (content["state"][0]["number"] == content["done"]).all() and content["done"] >= newest - 1
            newest = content["done"]
    assert newest > count / 4  # it came on, from kill to kill
    told("kill during a checkpoint write", f"{count} trials, none unreadable")


@pytest.mark.parametrize("die", ["before it is on the disk", "before the checksum", "before the rename"])
def test_a_kill_while_a_result_is_kept_leaves_nothing_that_is_read_and_no_lock(tmp_path, die):
    (tmp_path / "go").touch()
    assert finish(make, tmp_path, die, log=tmp_path / "killed") == -KILL
    assert finish(make, tmp_path, log=tmp_path / "again") == 0, tail(tmp_path / "again")
    assert tail(tmp_path / "again").endswith("made\n") and "waiting" not in tail(tmp_path / "again")
    assert finish(make, tmp_path, log=tmp_path / "third") == 0 and tail(tmp_path / "third").endswith("found\n")
    assert (tmp_path / "makers").read_text().count("\n") == 2
    left = [path.suffix for path in (tmp_path / "stages").iterdir() if path.suffix != ".lock"]
    assert sorted(left) == [".safetensors", ".sha256"]  # and no temporary file


def test_a_checkpoint_is_not_written_twice(tmp_path):
    """A signal right after a resume leaves the checkpoint that it came from alone."""
    with pytest.raises(KeyboardInterrupt), counting(tmp_path) as stage:
        for step in stage:
            if step == 4:
                raise KeyboardInterrupt
    newest = checkpoints(tmp_path)[-1]
    before = newest.stat().st_mtime_ns, newest.stat().st_ino
    with counting(tmp_path) as stage:
        assert stage.done == 3
        stage.checkpoint()
        assert (newest.stat().st_mtime_ns, newest.stat().st_ino) == before


def test_what_was_cut_or_damaged_never_counts_as_the_one_before(tmp_path):
    """Checkpoint 2 is whole, 3 is damaged, 5 and 6 never got their sha256: after 4 is written, 2 and 4 are left."""
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, number, {"number": number})
    for number in (5, 6):
        (tmp_path / f"{number:012d}.pt").write_bytes(b"cut")
    (tmp_path / f"{3:012d}.pt").write_bytes(b"damaged")
    told = []
    _, content = load_checkpoint(tmp_path, CPU, told.append)
    assert content["number"] == 2 and any("000000000003.pt is damaged" in text for text in told)
    save_checkpoint(tmp_path, 4, {"number": 4})
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["000000000002.pt", "000000000004.pt"]


# ---- Many processes, one result


def test_eight_processes_make_one_result(tmp_path, trials, told):
    """One makes it; seven wait, with a message, and have what it made."""
    count = trials(1, 10)
    for trial in range(count):
        here = tmp_path / str(trial)
        here.mkdir()
        logs = [here / f"log{i}" for i in range(8)]
        processes = [child(make, here, log=log) for log in logs]
        wait_for(lambda: sum("waiting for it" in text_of(log) for log in logs) == 7)
        (here / "go").touch()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 8
        assert len((here / "makers").read_text().split()) == 1
        assert sorted(text_of(log).split()[-1] for log in logs) == ["found"] * 7 + ["made"]
    told("8 processes, one result that is not there", f"{count} of {count}: one made it, eight correct readers")


def test_a_maker_that_dies_frees_the_others(tmp_path):
    both = [child(make, tmp_path, log=tmp_path / name) for name in "ab"]
    wait_for(
        lambda: text_of(tmp_path / "makers") and "waiting for it" in text_of(tmp_path / "a") + text_of(tmp_path / "b")
    )
    dies, other = sorted(both, key=lambda process: str(process.pid) not in text_of(tmp_path / "makers").split())
    dies.kill()
    (tmp_path / "go").touch()
    other.join()
    assert other.exitcode == 0 and len((tmp_path / "makers").read_text().split()) == 2
