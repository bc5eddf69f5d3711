"""The study: every learner on every task, many seeds. Grids in plain Python, run on this machine or on a cluster.

    python experiments/study.py first --seeds 5                     # here, one run on each core; again: what is left
    python experiments/study.py first --seeds 5 --status            # done, running, failed and why, time left
    python experiments/study.py table2 --tasks hopper-medium --list # every run's command
    python experiments/study.py paper --cluster slurm --gpus 1 --slurm "partition=gpu"    # as Slurm job arrays

GRID is `first` (what comes first: cloning, TD3+BC on the real data, DAWM, DWM), one of the paper's tables, `asked`
(what it does to ask for high returns), `one_step`, `ours`, or `paper`: all of it at paper scale on D4RL. A finished run
is not made again, whatever grid it was made for; one that was cut goes on from its checkpoint; a world model is trained
once. The order is such that it is of use wherever it stops: one seed on all tasks, then the next. Paths are relative to
the repository. Then: experiments/report.py
"""

import difflib
import hashlib
import importlib
import json
import os
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import STOPPED, Count, Seed, Signals, Stopped, parse_args, run_script
from common.files import disk_trouble, one_line, take_lock
from common.stages import stage_source

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent

# ---- The grids

TASKS = [f"{robot}-{data}" for robot in ("hopper", "walker2d", "halfcheetah")
         for data in ("medium", "medium-replay", "medium-expert")]  # fmt: skip
MEDIUM = [task for task in TASKS if task.endswith("medium")]  # of the paper's tables 5 and 6
REPLAY = ["walker2d-medium-replay", "halfcheetah-medium-replay"]  # where a learner can do more than clone

# The paper's way of synthesis, on the laptop's models: the returns that windows of eight steps are asked for.
ASKED = "--horizon 7 --target-return 0.7 --guidance-scale 1.2 --sampling-steps 3 --sampling-temperature 0.5"

# Name, script and the flags by which it differs from the others: a table names them, and nothing else may differ.
LEARNERS = {
    "cloning": ("dawm_td3bc", "--synthetic-fraction 0 --bc-alpha 0"),
    "td3bc": ("dawm_td3bc", "--synthetic-fraction 0"),
    "iql": ("dawm_iql", "--synthetic-fraction 0"),
    "dawm_td3bc": ("dawm_td3bc", ""),
    "dawm_iql": ("dawm_iql", ""),
    "dwm_td3bc": ("dwm_baseline", "--agent td3bc --rollouts stored"),
    "dwm_iql": ("dwm_baseline", "--agent iql --rollouts stored"),
    "dawm_asked": ("dawm_td3bc", ASKED),
    "dwm_asked": ("dwm_baseline", f"--agent td3bc --rollouts stored {ASKED}"),
    "undertrained_td3bc": ("dawm_td3bc", "--world-model-steps 300"),
    "undertrained_iql": ("dawm_iql", "--world-model-steps 300"),
    "ssorl_td3bc": ("baselines.ssorl", "--agent td3bc"),
    "ssorl_iql": ("baselines.ssorl", "--agent iql"),
    "dd": ("baselines.decision_diffuser", ""),
    "diffuser": ("baselines.diffuser", ""),
    "diffusion_mpc": ("baselines.diffusion_mpc", ""),
    "synther": ("baselines.synther", ""),
    "pgd": ("baselines.policy_guided_diffusion", ""),
    "polygrad": ("baselines.polygrad", ""),
    "diamond": ("baselines.diamond", ""),
    "one_step": ("baselines.one_step", ""),
    "dwm_one_step": ("baselines.one_step", "--ensemble-size 1 --actions policy --critic-target expansion"),
    "joint_td3bc": ("variants.joint_td3bc", ""),
    "dawm_t": ("dawm_td3bc", "--conditioning-subsample 8"),
    **{f"dawm_h{h}": ("dawm_td3bc", f"--horizon {h}") for h in (1, 3, 7)},
    **{f"dwm_h{h}": ("dwm_baseline", f"--agent td3bc --rollouts stored --horizon {h}") for h in (1, 3, 7)},
}
GRIDS = {  # each table with its controls: cloning, real data, a world model that has hardly been trained
    name: dict.fromkeys(["cloning", "td3bc", *learners.split(), "undertrained_td3bc"], tasks)
    for name, tasks, learners in (
        ("first", TASKS, "dawm_td3bc dwm_td3bc"),
        ("table2", TASKS, "dawm_td3bc dwm_td3bc iql dawm_iql dwm_iql dd undertrained_iql"),
        ("table4", TASKS, "dawm_td3bc ssorl_td3bc iql dawm_iql ssorl_iql undertrained_iql"),
        ("table5", MEDIUM, "dawm_td3bc dawm_t"),
        ("table6", MEDIUM, "dawm_h1 dwm_h1 dawm_h3 dwm_h3 dawm_h7 dwm_h7"),
        ("table1", REPLAY, "dawm_td3bc dwm_td3bc dd diffuser diffusion_mpc pgd polygrad diamond synther one_step"),
        ("asked", REPLAY, "dawm_td3bc dwm_td3bc dawm_asked dwm_asked"),
        ("one_step", MEDIUM, "dawm_td3bc one_step dwm_one_step"),
        ("ours", TASKS, "dawm_td3bc joint_td3bc"),
    )
}
GRIDS["paper"] = {learner: tasks for name in reversed(GRIDS) for learner, tasks in GRIDS[name].items()}
del GRIDS["paper"]["dawm_asked"], GRIDS["paper"]["dwm_asked"]  # there the defaults ask

# What learners share has one value, that of the first of these scripts that has it. But for:
HOMES = ("dawm_td3bc", "dawm_iql")
APART = {
    (module, name): why
    for module, names, why in (
        ("dawm_iql", "policy_delay", "IQL's policy moves at every update, TD3+BC's at every second"),
        ("dwm_baseline", "policy_delay", "the agent's own"),
        ("baselines.ssorl", "policy_delay", "the agent's own"),
        ("baselines.one_step", "preset", "the names of its own defaults"),
        *((f"baselines.{name}", "world_model_lr", "its own, which does not fall")
          for name in ("one_step", "decision_diffuser", "diffuser")),
        ("baselines.diffusion_mpc", "world_model_lr", "its own, which warms up and falls to another end"),
        ("baselines.decision_diffuser", "target_return", "a planner asks at states whose own return nobody knows"),
        ("baselines.diffuser", "plan_horizon gamma termination_penalty unet_width unet_multipliers diffusion_steps",
         "its own network and value, which its guidance scales go with"),
        ("baselines.diffusion_mpc", "plan_horizon ema_decay termination_penalty", "its own networks and objective"),
        ("baselines.polygrad", "agent_updates agent_batch_size eval_every entropy_weight",
         "an update imagines whole windows anew"),
        ("baselines.polygrad", "diffusion_steps ema_decay world_model_steps world_model_batch_size world_model_lr",
         "its chain refines the actions too"),
        ("baselines.synther", "mlp_width world_model_steps world_model_batch_size world_model_lr synthesis_batch_size "
         "sampling_steps", "EDM's network, and its budget"),
        ("baselines.diamond", "mlp_width world_model_steps world_model_batch_size world_model_lr sampling_steps "
         "sigma_log_mean sigma_max gamma agent_updates agent_lr log_every eval_every",
         "an actor-critic that pays for imagination"),
        ("baselines.policy_guided_diffusion", "unet_width world_model_steps world_model_batch_size world_model_lr "
         "sampling_steps synthesis_batch_size synthetic_fraction", "EDM's network and its budget, and a few real rows"),
    )
    for name in names.split()
}  # fmt: skip
GIVEN = {"env_id", "seed", "exp_name", "run_dir"}  # by the grid, to each run
# Arguments that a script fills in where they are None.
BY_AGENT = {"policy_delay", "lambda_return", "plan_horizon", "unet_multipliers", "guide_scale", "guide_stop"}
GENERATOR = ("world_model_", "unet_", "outcome_", "ema_", "idm_", "synthesis_", "sampling_")  # no control reads these
PLACES = {"run_dir", "stage_dir", "exp_name", "checkpoint_every", "track", "wandb_project"}  # move no score


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Study:
    grid: Literal[tuple(GRIDS)] = tyro.MISSING  # which runs: see above
    tasks: tuple[str, ...] = ()  # only these of the grid's, such as hopper-medium
    learners: tuple[str, ...] = ()  # only these of the grid's, such as dawm_td3bc
    seeds: Count = 3  # so many agent seeds of each
    first_seed: Seed = 0  # the lowest of them: another machine may have made those below
    extra: str = ""  # flags for each run whose script knows them, as in --extra="--agent-updates 1000"
    list: bool = False  # only print every run's command
    dry_run: bool = False  # only print what would be started, in order
    status: bool = False  # only print what is done, running, failed and why, and the time left
    run_dir: Path = Path("runs/study")  # run folders, and logs/ with what each run printed
    workers: Annotated[int, (0, 4096)] = 0  # runs at a time, each on cores of its own; 0: as cores and memory allow
    memory: Annotated[float, (0, 4096)] = 4.0  # GiB that one run may take, 0: no bound
    cluster: Literal["slurm", "local"] | None = None  # submitit's name of it; local: all at once, to try things out
    gpus: Annotated[int, (0, 64)] = 0  # of one run, on a cluster
    minutes: Count = 240  # until the cluster stops a run, which then goes on from its checkpoint in a new job
    slurm: str = ""  # more of sbatch's options, such as "partition=gpu account=me"


@dataclass(frozen=True)
class Job:
    task: str
    learner: str
    seed: int
    module: str
    words: tuple[str, ...]  # the script's arguments
    wanted: dict  # all that they come to, as args.json has it

    @property
    def name(self) -> str:
        return f"{self.wanted['env_id'].replace('/', '-')}__{self.learner}__{self.seed}"

    def made(self, content: dict) -> bool:
        """Whether args.json's content is that of this run; what only one side knows, as of another revision, is not
        compared.
        """
        args = content["args"]
        filled_in = [k for k in BY_AGENT if self.wanted.get(k) is None]
        shared = self.wanted.keys() & args.keys() - PLACES - {*filled_in}
        if self.wanted.get("synthetic_fraction") == 0:
            shared = {name for name in shared if not name.startswith(GENERATOR)}
        return content.get("module") == self.module and all(args[k] == self.wanted[k] for k in shared)


@cache
def arguments(module: str, words: tuple[str, ...]):
    """The script's Args from words of its command line. UserError as the script itself would tell it."""
    script, before = importlib.import_module(module), sys.argv
    sys.argv = [module, *words]
    try:
        return parse_args(script.Args, script.LAPTOP, getattr(script, "PRESETS", None))
    finally:
        sys.argv = before


def flags(text: str) -> dict[str, list[str]]:
    """ "--horizon 3 --laptop" -> {"horizon": ["--horizon", "3"], "laptop": ["--laptop"]}"""
    found: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            found[name.removeprefix("no_") if word.startswith("--no-") else name] = words = [word]
        elif not found:
            raise UserError(f"--extra {text!r} begins with {word!r}; give flags, such as --agent-updates 1000")
        else:
            words.append(word)
    return found


def command_of(learner: str, scale: tuple[str, ...], extra: str = "") -> tuple[str, tuple[str, ...]]:
    """Module and flags: those that set what it shares to the home's value, then `extra`, then the learner's own."""
    module, own = LEARNERS[learner]
    found, defaults = flags(own), vars(arguments(module, scale))
    home = {name: value for script in reversed(HOMES) for name, value in vars(arguments(script, scale)).items()}
    for name in sorted((home.keys() & defaults.keys()) - found.keys() - GIVEN):
        if home[name] != defaults[name] and (module, name) not in APART:
            found[name] = words_for(name, home[name])
    found |= {name: words for name, words in flags(extra).items() if name in defaults} | flags(own)
    return module, tuple(word for words in found.values() for word in words)


def words_for(name: str, value) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]


def jobs_of(args: Study, paper: bool) -> list[Job]:
    """The runs of a grid in the order in which they are made; two learners that come to the same are one."""
    grid = GRIDS[args.grid]
    tasks, learners = chosen("--tasks", args.tasks, TASKS), chosen("--learners", args.learners, list(grid))
    scale = () if paper else ("--laptop",)
    commands = {learner: command_of(learner, scale, args.extra) for learner in learners}
    known = {name for module, _ in commands.values() for name in vars(arguments(module, scale))}
    if unknown := flags(args.extra).keys() - known:
        raise UserError(f"--extra: no script of this grid knows {', '.join(sorted(unknown))}")
    jobs, seen = [], set()
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for learner in learners:
            module, own = commands[learner]
            base = vars(arguments(module, (*scale, *own)))
            for task in (task for task in tasks if task in grid[learner]):
                robot, data = task.split("-", 1)
                env_id = f"local/{robot}/{data}-v0" if scale else f"{task}-v2"
                wanted = json.loads(json.dumps(base | {"env_id": env_id, "seed": seed}, default=str))
                given = ("--env-id", env_id, "--seed", str(seed), "--exp-name", learner)
                same = json.dumps([module, {k: v for k, v in wanted.items() if k not in PLACES}])
                if same not in seen:
                    words = (*given, *scale, *own, "--run-dir", str(args.run_dir))
                    jobs.append(Job(task, learner, seed, module, words, wanted))
                seen.add(same)
    return jobs


def chosen(flag: str, some, all_of_them: list[str]) -> list[str]:
    for name in some:
        if name not in all_of_them:
            near = difflib.get_close_matches(name, all_of_them, cutoff=0.4) or all_of_them
            raise UserError(f"{flag} {name}: not in this grid; nearest: {', '.join(near)}")
    return [name for name in all_of_them if name in some or not some]


# ---- What has become of them


@dataclass
class State:
    kind: str  # one of KINDS
    told: str = ""  # the last line of its log, or why it failed
    seconds: float = 0.0  # that a finished run took


KINDS = ("done", "running", "queued", "stopped", "failed", "to do")


def folders_in(run_dir: Path) -> dict[tuple, list]:
    """Module, data and seed -> content of args.json and folder of each run."""
    found = defaultdict(list)
    for path in sorted(run_dir.glob("*/args.json")):
        try:
            content = json.loads(path.read_text())
            found[content["module"], content["args"]["env_id"], content["args"]["seed"]].append((content, path.parent))
        except (ValueError, KeyError):  # killed while it was written
            continue
    return found


def done_in(job: Job, folders: dict[tuple, list]) -> Path | None:
    """The folder in which the job has finished."""
    for content, folder in folders[job.module, job.wanted["env_id"], job.seed]:
        if job.made(content) and (folder / "summary.txt").exists():
            return folder


def states_of(jobs: list[Job], run_dir: Path) -> list[State]:
    """What has become of each job, from the run folders, the logs, and Slurm's queue where there is one."""
    folders, queue_now = folders_in(run_dir), in_the_queue(run_dir)

    def state(job: Job) -> State:
        log = log_of(job, run_dir)
        if folder := done_in(job, folders):
            seconds = re.search(r"^total +([\d.]+) s", (folder / "summary.txt").read_text(), flags=re.M)
            return State("done", seconds=float(seconds[1]))
        if locked_now(log):
            return State("running", last_line(log) if log.exists() else "")
        if job.name in queue_now:
            return State("queued")
        return ending(log) if log.exists() else State("to do")

    return [state(job) for job in jobs]


def log_of(job: Job, run_dir: Path) -> Path:
    return run_dir / "logs" / f"{job.name}.log"


def locked_now(log: Path) -> bool:
    """Whether a process has this run in hand, on any machine that shares the file system."""
    if not Path(f"{log}.lock").exists():
        return False
    try:
        take_lock(log, wait=False).lock.release()
    except UserError:
        return True
    return False


def in_the_queue(run_dir: Path) -> set[str]:
    """Names of jobs that Slurm has and has not ended."""
    file = run_dir / "logs" / "submitted.jsonl"
    if not file.exists() or not shutil.which("squeue"):
        return set()
    listed = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"squeue does not say what is queued ({' '.join(listed.stderr.split())}); try again later")
    submitted = map(json.loads, file.read_text().splitlines())
    return {name for number, name in submitted if number in listed.stdout.split()}


def last_line(log: Path, before: str = "\n") -> str:
    """The last line of a log that says something, in front of the last `before`."""
    lines = log.read_text(errors="replace").rpartition(before)[0].strip().splitlines()
    return lines[-1] if lines else ""


def ending(log: Path) -> State:
    """How the last attempt ended."""
    end = re.fullmatch(r"study: code (-?\d+)", last_line(log))
    if end is None:
        return State("stopped", f"cut off behind: {last_line(log)}")
    code, told = int(end[1]), last_line(log, "study: code")
    if code < 0:
        return State("failed", f"killed by {signal.Signals(-code).name}, by hand or for want of memory")
    return State("stopped" if code == STOPPED else "failed", told)


def print_status(jobs: list[Job], states: list[State], args: Study) -> None:
    print(f"{'':<20}" + "".join(f"{kind:>9}" for kind in KINDS))
    pairs, total = list(zip(jobs, states, strict=True)), Counter(state.kind for state in states)
    for learner in dict.fromkeys(job.learner for job in jobs):
        counts = Counter(state.kind for job, state in pairs if job.learner == learner)
        print(f"{learner:<20}" + "".join(f"{counts[kind] or '':>9}" for kind in KINDS))
    print(f"{'all':<20}" + "".join(f"{total[kind]:>9}" for kind in KINDS))
    for job, state in pairs:
        if state.told:
            print(f"{state.kind}: {job.name}: {state.told[:200]}")
    seconds = {job.learner: [s.seconds for j, s in pairs if j.learner == job.learner and s.seconds] for job in jobs}
    known = {learner: sum(some) / len(some) for learner, some in seconds.items() if some}
    left = [job for job, state in pairs if state.kind != "done"]
    if left and known:
        usual = sum(known.values()) / len(known)
        hours = sum(known.get(job.learner, usual) for job in left) / 3600
        told = f"{hours:.1f} hours of one worker, {hours / len(places(args)):.1f} of the {len(places(args))} here"
        print(f"time left: {told}; from the runs that are done")
    elif left:
        print("time left: not known before a run is done")


# ---- Running them


class Attempt:
    """One run, as a child of this process: begun, or gone on with where it was cut, until it ends or is stopped.

    Called by a worker here or by submitit, which calls `checkpoint` when the cluster takes the machine away.
    """

    def __init__(self, job: Job, run_dir: Path, memory: float):
        self.job, self.run_dir, self.memory = job, run_dir, memory
        self.child, self.stopped = None, False

    def __call__(self) -> None:
        """UserError says why the run is not done."""
        log = log_of(self.job, self.run_dir)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with take_lock(log):  # another study may have it in hand
                code = 0 if done_in(self.job, folders_in(self.run_dir)) or Signals.received else self.once(log)
                if code and not (code == STOPPED and Signals.received):
                    raise UserError(f"{ending(log).told}; {log}")
        except OSError as error:
            raise UserError(disk_trouble(error.filename or log, error))

    def once(self, log: Path) -> int:
        threads = self.job.wanted["threads"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        command = [sys.executable, "-m", self.job.module, *self.job.words]
        with open(log, "ab", buffering=0) as file:
            file.write(f"study: {shlex.join(command)}\n".encode())
            self.child = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
            if self.memory and hasattr(resource, "prlimit"):
                bound = int(self.memory * 2**30)
                resource.prlimit(self.child.pid, resource.RLIMIT_DATA, (bound, bound))
            code = self.child.wait()
            file.write(f"study: code {code}\n".encode())
        return code

    def stop(self, number: int) -> None:
        """Once: a second signal would kill a script that has heeded the first and is about to end."""
        if self.child and self.child.returncode is None and not self.stopped:
            self.stopped = True
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.child.pid, number)

    def checkpoint(self):
        """For submitit: the child writes its checkpoint and ends; the job is put into the queue again."""
        from submitit.helpers import DelayedSubmission

        self.stop(signal.SIGUSR1)
        with suppress(ChildProcessError, AttributeError):  # it has ended, or has not begun
            os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)  # child.wait is not to be called in its midst
        return DelayedSubmission(Attempt(self.job, self.run_dir, self.memory))


def places(args: Study) -> list[list[int]]:
    """The cores of each worker: so many workers as there are cores, and as memory allows; one where there is a GPU."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    fit = min(len(cores), int(memory / args.memory) if args.memory else len(cores))
    workers = args.workers or (1 if torch.cuda.is_available() else max(1, fit))
    return [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]


def run_here(jobs: list[Job], args: Study) -> None:
    memory = 0 if torch.cuda.is_available() else args.memory  # a GPU's driver maps more than it uses
    attempts = [Attempt(job, args.run_dir, memory) for job in jobs]
    pins = queue.SimpleQueue()
    for cores in places(args):
        pins.put(cores)

    def pin() -> None:  # this thread, and so the children that it starts
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, pins.get())

    failed = []
    with ThreadPoolExecutor(len(places(args)), initializer=pin) as pool:
        waiting = {pool.submit(attempt): attempt for attempt in attempts}
        while waiting:
            for future in wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future).job
                if Signals.received and not future.exception():
                    continue
                if error := future.exception():
                    if not isinstance(error, UserError):
                        raise error
                    failed.append(job.name)
                print(f"{len(jobs) - len(waiting):>5} of {len(jobs)}  {job.name}  {error or 'done'}", flush=True)
            if Signals.received:
                Signals.saving = True  # this process ends behind its children
                pool.shutdown(wait=False, cancel_futures=True)
                waiting = {future: attempt for future, attempt in waiting.items() if not future.cancelled()}
                for attempt in waiting.values():
                    attempt.stop(signal.SIGTERM)
    if Signals.received:
        raise Stopped("with checkpoints of the runs under way")
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs are not done, see above; the same command goes on")


source_of = cache(stage_source)


def results_of(job: Job) -> set[str]:
    """Keys of what runs share of this one: all that its script trains or makes but the agent."""
    found = set()
    if job.wanted.get("synthetic_fraction") != 0:
        for name, stage in vars(importlib.import_module(job.module)).items():
            if name == "synthesize" or (name.startswith("train_") and name != "train_agent"):
                source, fields = source_of(stage)
                values = [job.wanted["env_id"], name, source, *(job.wanted[field] for field in fields)]
                found.add(hashlib.sha256(json.dumps(values).encode()).hexdigest())
    return found


def makers_first(jobs: list[Job]) -> tuple[list[Job], list[Job]]:
    """Those that make a result which no job before them makes, and the others, which would wait for them."""
    seen: set[str] = set()
    makers, others = [], []
    for job in jobs:
        (makers if results_of(job) - seen else others).append(job)
        seen |= results_of(job)
    return makers, others


def submit(jobs: list[Job], args: Study) -> None:
    """Two job arrays, the second behind the first."""
    if args.cluster == "slurm" and not shutil.which("sbatch"):
        raise UserError("--cluster slurm, but there is no sbatch here; start this on a login node, or leave it out")
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # the one that the scripts know
    try:
        import submitit
    except ImportError:
        raise UserError("--cluster needs submitit: pip install submitit")
    setup = ["export SUBMITIT_PREEMPT_SIGNAL=USR1", f"export PYTHONPATH={shlex.quote(str(ROOT))}"]
    more = dict(word.partition("=")[::2] for word in shlex.split(args.slurm))
    behind: dict[str, str] = {}
    for group in makers_first(jobs):
        if not group:
            continue
        executor = submitit.AutoExecutor(args.run_dir / "submitit", args.cluster, slurm_max_num_timeout=10_000)
        executor.update_parameters(
            name="dawm", timeout_min=args.minutes, gpus_per_node=args.gpus, slurm_setup=setup, slurm_signal_delay_s=60,
            slurm_array_parallelism=args.workers or 256, slurm_additional_parameters=more | behind,
        )  # fmt: skip
        if args.memory and "mem" not in more:
            executor.update_parameters(mem_gb=args.memory)
        try:
            with executor.batch():
                submitted = [executor.submit(Attempt(job, args.run_dir, 0)) for job in group]
        except RuntimeError as error:  # what sbatch says
            raise UserError(f"the cluster did not take the jobs: {one_line(error)}; see --memory, --gpus, --slurm")
        (args.run_dir / "logs").mkdir(exist_ok=True)
        if args.cluster == "slurm":
            with open(args.run_dir / "logs" / "submitted.jsonl", "a") as file:
                numbers = zip(submitted, group, strict=True)
                file.writelines(json.dumps([x.job_id, job.name]) + "\n" for x, job in numbers)
        behind = {"dependency": f"afterany:{submitted[0].job_id.split('_')[0]}"}
        print(f"{len(group)} runs in job {submitted[0].job_id.split('_')[0]}, logs in {args.run_dir / 'logs'}")


def main(args: Study) -> None:
    os.chdir(ROOT)
    jobs = jobs_of(args, paper=args.grid == "paper")
    states = states_of(jobs, args.run_dir)
    if args.status:
        return print_status(jobs, states, args)
    if not args.list:  # failed and stopped ones are tried again
        wanted = [
            job for job, state in zip(jobs, states, strict=True) if state.kind not in ("done", "running", "queued")
        ]
        print(f"{len(jobs)} runs, {len(jobs) - len(wanted)} of them done or under way", flush=True)
        jobs = wanted
    if args.list or args.dry_run:
        for job in jobs:
            print(shlex.join(["python", "-m", job.module, *job.words]))
    elif jobs:
        (submit if args.cluster else run_here)(jobs, args)


if __name__ == "__main__":
    run_script(main, Study)
