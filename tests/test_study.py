"""experiments/study.py: equal arms, grids, what has become of runs; workers, signals, a cluster on made-up scripts."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from common import UserError
from common.cli import tell
from common.files import take_lock

import pytest
import study
from study import APART, GIVEN, GRIDS, LEARNERS, Attempt, Job, Study, jobs_of
from toy import ROOT, child, hopper_file, wait_for

# ---- Equal arms


def faults(table: str, paper: bool, extra: str = "") -> list[str]:
    """Arguments, as the scripts parse them, in which two arms of a table differ, though neither names them."""
    scale, found, home = (() if paper else ("--laptop",)), [], {}
    for learner in GRIDS[table]:
        module, own = study.command_of(learner, scale, extra)
        named = study.flags(LEARNERS[learner][1]).keys() | GIVEN
        for name, value in vars(study.arguments(module, (*scale, *own))).items():
            if name in named or (module, name) in APART:
                continue
            if home.setdefault(name, (learner, value))[1] != value:
                found.append(f"{name}: {home[name]} and {(learner, value)}")
    return found


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("table", GRIDS)
def test_arms_of_a_table_are_equal_but_for_what_it_names(table, paper):
    assert faults(table, paper) == []


def test_unequal_arms_are_seen(monkeypatch):
    """An arm whose batch the grid may not set; a script that shares nothing with the home."""
    monkeypatch.setitem(APART, ("dwm_baseline", "agent_batch_size"), "")
    commands = {learner: study.command_of(learner, ()) for learner in ("dawm_td3bc", "dwm_td3bc")}
    monkeypatch.delitem(APART, ("dwm_baseline", "agent_batch_size"))
    monkeypatch.setattr(study, "command_of", lambda learner, *_: commands.get(learner, commands["dawm_td3bc"]))
    assert faults("first", paper=True) == ["agent_batch_size: ('cloning', 256) and ('dwm_td3bc', 128)"]


def test_what_is_shared_is_set_to_the_value_of_the_home():
    """At paper scale DWM has other defaults of its own; flags of all runs win over both."""
    command = " ".join(study.command_of("dwm_iql", ())[1])
    assert "--agent-batch-size 256" in command and "--termination rule" in command and "policy" not in command
    assert " ".join(study.command_of("dwm_iql", (), "--agent-batch-size 8 --idm-steps 2")[1]).count("batch-size") == 1
    assert "idm" not in " ".join(study.command_of("dwm_iql", (), "--agent-batch-size 8 --idm-steps 2")[1])
    assert study.words_for("unet_multipliers", (1, 2)) == ["--unet-multipliers", "1", "2"]
    assert study.words_for("normalize_obs", False) == ["--no-normalize-obs"]


def test_every_table_has_its_controls_and_only_known_learners():
    for learners in GRIDS.values():
        assert {"cloning", "td3bc", "undertrained_td3bc"} <= learners.keys() <= LEARNERS.keys()
    assert GRIDS["paper"].keys() == LEARNERS.keys() - {"dawm_asked", "dwm_asked"}
    assert len(GRIDS["paper"]["dawm_td3bc"]) == 9


# ---- Grids


def test_the_order_is_one_seed_on_all_tasks_then_the_next():
    jobs = jobs_of(Study("first", seeds=2), paper=False)
    assert len(jobs) == 2 * 5 * 9 and [job.seed for job in jobs] == [0] * 45 + [1] * 45
    assert [job.task for job in jobs[:9]] == study.TASKS and {job.learner for job in jobs[:9]} == {"cloning"}
    assert jobs[0].wanted["env_id"] == "local/hopper/medium-v0"
    assert jobs_of(Study("first", seeds=1, first_seed=1), paper=False) == jobs[45:]


def test_a_job_s_words_come_to_what_it_wants():
    for job in jobs_of(Study("paper", tasks=("walker2d-medium",), seeds=1, extra="--agent-updates 7"), paper=True):
        args = json.loads(json.dumps(vars(study.arguments(job.module, job.words)), default=str))
        assert {k: v for k, v in args.items() if k not in study.PLACES} == {
            k: v for k, v in job.wanted.items() if k not in study.PLACES
        }
        assert args["env_id"] == "walker2d-medium-v2" and args.get("agent_updates", 7) == 7


def test_extra_flags_leave_what_makes_a_learner_itself():
    jobs = jobs_of(Study("first", tasks=("hopper-medium",), seeds=1, extra="--bc-alpha 2 --horizon 3"), paper=False)
    assert {job.learner: job.wanted["bc_alpha"] for job in jobs}["cloning"] == 0
    assert {job.wanted["bc_alpha"] for job in jobs if job.learner != "cloning"} == {2}
    assert len(jobs) == 5 and {job.wanted["horizon"] for job in jobs} == {3}


def test_two_learners_that_come_to_the_same_are_one():
    """At paper scale DAWM's horizon is 7."""
    jobs = jobs_of(Study("paper", learners=("dawm_td3bc", "dawm_h7", "dawm_h3"), seeds=1), paper=True)
    assert [job.learner for job in jobs if job.task == "hopper-medium"] == ["dawm_td3bc", "dawm_h3"]


def test_makers_of_shared_results_come_first():
    """One run makes world model, inverse dynamics and rollouts of a task; DWM finds its world model alone."""
    learners = ("cloning", "dawm_td3bc", "dawm_iql", "dwm_td3bc", "undertrained_td3bc")
    jobs = jobs_of(Study("table2", tasks=("hopper-medium", "walker2d-medium"), learners=learners, seeds=2), paper=False)
    makers, others = study.makers_first(jobs)
    assert len(makers) + len(others) == len(jobs) == 20
    assert {(job.learner, job.seed) for job in makers} == {
        (x, 0) for x in ("dawm_td3bc", "dwm_td3bc", "undertrained_td3bc")
    }
    shared = study.results_of(makers[0]) & study.results_of(next(job for job in jobs if job.learner == "dwm_td3bc"))
    assert len(shared) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("first --tasks hopper-medum", "--tasks hopper-medum: not in this grid; nearest: hopper-medium"),
        ("first --learners dawm", "--learners dawm: not in this grid; nearest: dawm_td3bc"),
        ("first --extra=--agent-update=5", "--extra: no script of this grid knows agent_update"),
        ("first --extra=5", "--extra '5' begins with '5'"),
        ("first --extra=--agent-updates=many", "agent-updates"),
        ("first --cluster slurm", "there is no sbatch here"),
    ],
)
def test_bad_input_is_one_line(words, told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study.py", *words.split(), f"--run-dir={tmp_path}"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stop:
        study.run_script(study.main, Study)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1, error


# ---- Running made-up scripts: how seed 0, 1, ... ends is told by the first word of its arguments

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

seed, ways, run_dir = int(sys.argv[2]), sys.argv[1].split(","), Path(sys.argv[3])
way, tried = ways[seed], run_dir / f"tried-{seed}"
before = tried.exists()
tried.write_text(json.dumps(sorted(os.sched_getaffinity(0))))
print("agent            5 of 10 updates", flush=True)
if way == "crash":
    raise ValueError("a bug in the middle")
if way == "full":
    sys.exit(print("error: cannot write x (No space left on device; 0 MiB free there); make room") or 2)
if way == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if way == "hungry":
    b"x" * 2**30
if way == "cut" and not before:
    sys.exit(print("stopped by SIGTERM in stage agent") or 75)  # by a user, or by a cluster that cancels the job
def leave(number, _):  # a script heeds one signal, says so, and takes a while to end
    print("stopped by SIGTERM in stage agent")
    signal.signal(number, signal.SIG_DFL)
    time.sleep(0.5)
    sys.exit(75)
if way == "waits" and not before:
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(print("stopped by SIGUSR1 in stage agent") or 75))
    time.sleep(60)
folder = run_dir / f"data__fake__{seed}__x"
folder.mkdir()
content = {"module": "made_up", "args": {"env_id": "data", "seed": seed}}
(folder / "args.json").write_text(json.dumps(content))
(folder / "summary.txt").write_text("total  36.0 s\\n")
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Jobs of a made-up script, from how each of them ends."""
    (tmp_path / "made_up.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}:{ROOT / 'experiments'}")

    def jobs(*ways: str) -> list[Job]:
        (tmp_path / "runs").mkdir(exist_ok=True)
        words = [(",".join(ways), str(seed), str(tmp_path / "runs")) for seed in range(len(ways))]
        wanted = [dict(env_id="data", seed=seed, threads=1) for seed in range(len(ways))]
        return [Job("data", "fake", seed, "made_up", words[seed], wanted[seed]) for seed in range(len(ways))]

    jobs.run_dir = tmp_path / "runs"
    return jobs


def kinds(jobs: list[Job], run_dir: Path) -> list[str]:
    return [state.kind for state in study.states_of(jobs, run_dir)]


def test_a_run_that_fails_is_told_and_the_rest_goes_on(made_up, capsys):
    """A crash, a full disk, a kill, too much memory, one that a user stopped. The next call tries again."""
    jobs, run_dir = made_up("good", "crash", "full", "dies", "hungry", "cut", "good"), made_up.run_dir
    args = Study("first", run_dir=run_dir, workers=2, memory=0.5)
    assert kinds(jobs, run_dir) == ["to do"] * 7
    with pytest.raises(UserError, match="5 of 7 runs are not done, see above; the same command goes on"):
        study.run_here(jobs, args)
    lines = capsys.readouterr().out.splitlines()
    told = {line.split("__")[2].split()[0]: line for line in lines}
    assert len(lines) == 7 and "7 of 7" in lines[-1]
    assert told["1"].endswith(f"ValueError: a bug in the middle; {study.log_of(jobs[1], run_dir)}")
    assert "error: cannot write x (No space left on device; 0 MiB free there); make room" in told["2"]
    assert "killed by SIGKILL, by hand or for want of memory" in told["3"] and "MemoryError" in told["4"]
    assert all(told[seed].endswith("done") for seed in "06") and "stopped by SIGTERM in stage agent" in told["5"]
    assert kinds(jobs, run_dir) == ["done", *["failed"] * 4, "stopped", "done"]
    study.print_status(jobs, study.states_of(jobs, run_dir), args)
    text = capsys.readouterr().out
    assert re.search(r"^all +2 +0 +0 +1 +4 +0$", text, flags=re.M)
    assert "failed: data__fake__1: ValueError: a bug in the middle" in text
    assert "time left: 0.1 hours of one worker, 0.0 of the 2 here" in text  # 5 x 36 s
    cores = sorted(os.sched_getaffinity(0))
    used = [json.loads((run_dir / f"tried-{seed}").read_text()) for seed in range(7)]
    assert all(some in study.places(args) for some in used) and set(itertools.chain(*used)) <= set(cores)


def test_places_by_hand(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    monkeypatch.setattr(os, "sysconf", lambda name: 2**12 if name == "SC_PAGE_SIZE" else 2**20 * 3)  # 12 GiB
    assert study.places(Study("first", memory=4)) == [[0, 3], [1, 4], [2]]
    assert len(study.places(Study("first", memory=0))) == 5 and study.places(Study("first", memory=64)) == [
        [0, 1, 2, 3, 4]
    ]
    assert study.places(Study("first", workers=6))[5] == [0]


def test_a_full_disk_of_the_study_itself_is_one_line(made_up, capsys, monkeypatch):
    """Its log lies on a device that takes nothing."""
    jobs = made_up("good")
    real = open
    monkeypatch.setitem(study.__dict__, "open", lambda path, *how, **more: real("/dev/full", *how, **more))
    with pytest.raises(UserError, match="1 of 1 runs are not done"):
        study.run_here(jobs, Study("first", run_dir=made_up.run_dir))
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot write" in line and "No space left on device" in line and "make room" in line


def run_until_stopped(jobs: list[Job], run_dir: Path) -> None:
    tell(lambda: study.run_here(jobs, Study("first", run_dir=run_dir, workers=1)))


def test_a_signal_stops_the_runs_with_checkpoints(made_up, tmp_path):
    jobs = made_up("waits", "good")
    process = child(run_until_stopped, jobs, made_up.run_dir, log=tmp_path / "log", PYTHONPATH=os.environ["PYTHONPATH"])
    log = study.log_of(jobs[0], made_up.run_dir)
    wait_for(lambda: log.exists() and "updates" in log.read_text())
    assert [(state.kind, state.told) for state in study.states_of(jobs, made_up.run_dir)] == [
        ("running", "agent            5 of 10 updates"),
        ("to do", ""),
    ]
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75 and "stopped by SIGTERM with checkpoints" in (tmp_path / "log").read_text()
    (first, second) = study.states_of(jobs, made_up.run_dir)
    assert (first.kind, first.told) == ("stopped", "stopped by SIGTERM in stage agent") and second.kind == "to do"
    study.run_here(jobs, Study("first", run_dir=made_up.run_dir))
    assert kinds(jobs, made_up.run_dir) == ["done", "done"]


def test_a_run_that_another_process_has_in_hand_is_waited_for(made_up):
    (job,) = made_up("good")
    log = study.log_of(job, made_up.run_dir)
    log.parent.mkdir()
    with take_lock(log):
        assert kinds([job], made_up.run_dir) == ["running"]
    Attempt(job, made_up.run_dir, 0)()
    Attempt(job, made_up.run_dir, 0)()  # finds it done
    assert log.read_text().count("study: code 0") == 1


def test_what_was_cut_without_a_word_and_what_is_queued(made_up, tmp_path, monkeypatch):
    jobs = made_up("good", "good", "good")
    logs = made_up.run_dir / "logs"
    logs.mkdir()
    study.log_of(jobs[0], made_up.run_dir).write_text("study: python\nagent 7 of 10\n")
    (logs / "submitted.jsonl").write_text(f'["12_0", "{jobs[1].name}"]\n["12_1", "{jobs[2].name}"]\n')
    fake(tmp_path, monkeypatch, "squeue", "echo 12_1; echo 13_0")
    told = [(state.kind, state.told) for state in study.states_of(jobs, made_up.run_dir)]
    assert told == [("stopped", "cut off behind: agent 7 of 10"), ("to do", ""), ("queued", "")]
    fake(tmp_path, monkeypatch, "squeue", "echo no controller >&2; exit 1")
    with pytest.raises(UserError, match="squeue does not say what is queued"):
        study.states_of(jobs, made_up.run_dir)


def fake(folder: Path, monkeypatch, program: str, text: str) -> None:
    """A program of this name in front of PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / program
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    if str(folder / "bin") not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


# ---- A cluster


def test_submitit_runs_them_each_once(made_up, capsys, monkeypatch):
    """submitit's own executor, in processes of its own. One that fails is told there too."""
    monkeypatch.setattr(study, "makers_first", lambda jobs: ([jobs[0]], jobs[1:]))
    jobs = made_up("good", "crash", "cut")
    study.submit(jobs, Study("first", run_dir=made_up.run_dir, cluster="local"))
    assert capsys.readouterr().out.count("runs in job") == 2
    wait_for(lambda: kinds(jobs, made_up.run_dir) == ["done", "failed", "stopped"])
    errors = made_up.run_dir / "submitit"
    wait_for(lambda: any("a bug in the middle" in x.read_text() for x in errors.glob("*.err")))


def test_what_sbatch_refuses_is_told(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "makers_first", lambda jobs: (jobs, []))
    fake(tmp_path, monkeypatch, "srun", "exit 0")
    fake(tmp_path, monkeypatch, "sbatch", "echo 'sbatch: error: invalid partition specified: gpx' >&2; exit 1")
    with pytest.raises(UserError, match=r"did not take the jobs: .*invalid partition specified: gpx"):
        study.submit(
            made_up("good", "good"), Study("first", run_dir=made_up.run_dir, cluster="slurm", slurm="partition=gpx")
        )


def test_sbatch_is_asked_for_two_arrays_the_second_behind_the_first(made_up, tmp_path, monkeypatch):
    jobs = made_up(*["good"] * 5)
    monkeypatch.setattr(study, "makers_first", lambda jobs: (jobs[:2], jobs[2:]))
    fake(tmp_path, monkeypatch, "srun", "exit 0")
    count = tmp_path / "count"
    fake(
        tmp_path,
        monkeypatch,
        "sbatch",
        f"echo x >>{count}; cp $1 {tmp_path}/sent-$(wc -l <{count}); echo job 4$(wc -l <{count})",
    )
    args = Study("first", run_dir=made_up.run_dir, cluster="slurm", gpus=1, slurm="partition=gpu", minutes=90, memory=8)
    study.submit(jobs, args)
    first, second = ((tmp_path / f"sent-{n}").read_text() for n in (1, 2))
    for option in (
        "--array=0-1%2",
        "--partition=gpu",
        "--signal=USR1@60",
        "--gpus-per-node=1",
        "--time=90",
        "--mem=8GB",
    ):
        assert f"#SBATCH {option}\n" in first, first
    assert "#SBATCH --array=0-2%3" in second and "#SBATCH --dependency=afterany:41\n" in second
    fake(tmp_path, monkeypatch, "squeue", "echo 42_1")
    assert kinds(jobs, made_up.run_dir) == ["to do", "to do", "to do", "queued", "to do"]


def wait_in_an_attempt(job: Job, run_dir: Path) -> None:
    """As submitit does: checkpoint is called in the midst of the attempt, in the same thread."""
    attempt = Attempt(job, run_dir, 0)

    def preempted(*_):
        again = attempt.checkpoint()
        print(type(again).__name__, again.function.job == job, again.function.child)
        sys.exit(3)

    signal.signal(signal.SIGUSR1, preempted)
    attempt()


def test_a_preempted_job_leaves_a_checkpoint_and_asks_to_be_called_again(made_up, tmp_path):
    (job,) = made_up("waits")
    process = child(wait_in_an_attempt, job, made_up.run_dir, log=tmp_path / "log", PYTHONPATH=os.environ["PYTHONPATH"])
    log = study.log_of(job, made_up.run_dir)
    wait_for(lambda: log.exists() and "updates" in log.read_text())
    os.kill(process.pid, signal.SIGUSR1)
    process.join()
    assert process.exitcode == 3 and (tmp_path / "log").read_text() == "DelayedSubmission True None\n"
    assert study.last_line(log) == "stopped by SIGUSR1 in stage agent"
    Attempt(job, made_up.run_dir, 0)()
    assert kinds([job], made_up.run_dir) == ["done"]


# ---- The scripts themselves


def test_a_run_of_the_grid_is_made_once_and_found(tmp_path, monkeypatch, capsys):
    """cloning on toy data, through the command line; its kept folder is found by the arguments in it."""
    hopper_file(tmp_path / "data.hdf5")
    extra = f"--laptop --data-path {tmp_path / 'data.hdf5'} --agent-updates 20 --eval-every 10 --eval-episodes 1"
    extra += " --idm-steps 20 --idm-width 16 --label-fraction 0.5"
    words = ["experiments/study.py", "paper", "--tasks", "hopper-medium", "--learners", "cloning", "ssorl_iql"]
    words += ["--seeds", "1", f"--extra={extra}", f"--run-dir={tmp_path / 'runs'}"]

    def call(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        study.run_script(study.main, Study)
        return capsys.readouterr().out

    assert shlex.split(call("--dry-run").splitlines()[1])[:3] == ["python", "-m", "dawm_td3bc"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert re.search("2 of 2  hopper-medium-v2__.*done", done.stdout), done.stderr + done.stdout
    assert re.search(r"^all +2 +0 +0 +0 +0 +0$", call("--status"), flags=re.M)
    assert call() == "2 runs, 2 of them done or under way\n"
    assert len(call("--list").splitlines()) == 2
    shutil.rmtree(next((tmp_path / "runs").glob("*cloning*")))
    assert call("--dry-run").startswith("2 runs, 1 of them done")


def test_a_control_is_the_same_run_whatever_the_generator():
    def made(learner: str, **other) -> bool:
        (job,) = study.jobs_of(study.Study("first", tasks=("hopper-medium",), learners=(learner,), seeds=1), False)
        return job.made({"module": job.module, "args": job.wanted | other})

    assert made("td3bc", world_model_steps=7, idm_lr=0.5) and not made("td3bc", agent_lr=0.5)
    assert made("dawm_td3bc") and not made("dawm_td3bc", world_model_steps=7)
