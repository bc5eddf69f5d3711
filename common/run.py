"""One run: its arguments, folder, seeds, progress bars, checkpoints, metrics, and the closing table."""

import ast
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import typing
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import UserError

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari", "h5py")
STOPPED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h, "try again"
GRACE = 4.0  # seconds from a signal to the end, unless a checkpoint is being written
CHECKPOINT_FORMAT = 1
RESUME_HELP = "An interrupted run goes on when the same command is given again, or with --resume RUN_FOLDER."


def parse_args(args_class: type, laptop: dict, presets: dict[str, dict] | None = None):
    """Command line to args_class. --preset NAME starts from the defaults presets[NAME], --laptop from those in
    `laptop`, which win over a preset's; any flag given still wins.

    `--resume RUN_FOLDER` alone takes all arguments from that run. --help shows the fields under the `# ---- Heading`
    comments of the class, each with its docstring.
    """
    if (folder := _resume_folder()) is not None:
        return _args_of(folder, args_class)
    tree = ast.parse(textwrap.dedent(inspect.getsource(args_class))).body[0].body
    docs = {a.target.id: b.value.value for a, b in itertools.pairwise(tree) if isinstance(b, ast.Expr)}
    words = " ".join(sys.argv[1:]).replace("--preset=", "--preset ").split()
    named = [(presets or {}).get(value, {}) for flag, value in itertools.pairwise(words) if flag == "--preset"]
    changed = (named[-1] if named else {}) | (laptop if "--laptop" in words else {})
    defaults = dataclasses.asdict(args_class(**changed))
    hints, groups = typing.get_type_hints(args_class), {}
    for line in inspect.getsource(args_class).splitlines():
        if heading := re.match(r"    # ---- (.+)", line):
            group = groups.setdefault(heading[1], [])
        elif (name := re.match(r"    (\w+):", line)) and name[1] in hints:
            annotation = typing.Annotated[hints[name[1]], tyro.conf.arg(help=docs[name[1]])]
            group.append((name[1], annotation, dataclasses.field(default=defaults[name[1]])))
    parts = [
        (heading.lower().split(":")[0].replace(" ", "_"), dataclasses.make_dataclass(heading, fields))
        for heading, fields in groups.items()
    ]
    parts = [(name, part, dataclasses.field(default_factory=part)) for name, part in parts]
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            nested = tyro.cli(
                dataclasses.make_dataclass("Args", parts),
                description=f"{sys.modules[args_class.__module__].__doc__}\n{RESUME_HELP}",
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(_one_line(told.getvalue()))
    return args_class(**{k: v for part in vars(nested).values() for k, v in vars(part).items()})


def _one_line(box: str) -> str:
    """What tyro says in a box of several lines: the message, and the first option that it suggests."""
    lines = [line.strip("│ ") for line in box.strip().splitlines()]
    groups = [list(group) for rule, group in itertools.groupby(lines, lambda line: not line.strip("─-")) if not rule]
    # A drawn box has the title in its first line; where it cannot be drawn, the title stands above a rule.
    message = groups[0][1:] if groups[0][0].startswith("╭") else groups[1]
    meant = [group[1].split()[0] for group in groups if group[0] == "Perhaps you meant:"]
    return "; ".join([" ".join(message).rstrip("."), *(f"perhaps {x}" for x in meant), "--help lists all arguments"])


def check_range(args, low: float, high: float, names: str) -> None:
    """UserError if a named field is a number outside [low, high] or NaN; None and words pass."""
    for name in names.split():
        value = getattr(args, name)
        if isinstance(value, int | float) and not low <= value <= high:
            limit = f"must be {low} or more" if high == float("inf") else f"lies outside [{low}, {high}]"
            raise UserError(f"--{name.replace('_', '-')} {value} {limit}")


def _resume_folder() -> Path | None:
    """The folder after --resume, which stands alone; UserError if it holds no run of this script that can go on."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    if "--resume" not in words:
        return None
    if len(words) != 2 or words[0] != "--resume":
        raise UserError("--resume RUN_FOLDER takes every argument from that run; give no other")
    folder = Path(words[1])
    try:
        command = json.loads((folder / "args.json").read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--resume {folder} is not the folder of a run: it holds no readable args.json")
    if Path(command[0]).name != Path(sys.argv[0]).name:
        raise UserError(f"--resume {folder} is a run of {Path(command[0]).name}; resume it with that script")
    if (folder / "summary.txt").exists():
        raise UserError(f"--resume {folder} has finished: its results are in summary.txt there")
    return folder


def _args_of(folder: Path, args_class: type):
    """The arguments of an earlier run, from its args.json."""
    content, hints = json.loads((folder / "args.json").read_text()), typing.get_type_hints(args_class)
    stored = content["args"]
    if set(stored) != set(hints):
        other = ", ".join(sorted(set(stored) ^ set(hints)))
        raise UserError(f"--resume {folder} was made by another version of the script ({other}); start a new run")
    for name, value in stored.items():
        if isinstance(value, list):
            stored[name] = tuple(value)
        elif isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])):
            stored[name] = Path(value)
            if not stored[name].is_absolute() and content["cwd"] != os.getcwd():
                raise UserError(f"--resume {folder} has paths relative to {content['cwd']}; give the command there")
    if Path(stored["run_dir"]).resolve() != folder.resolve().parent:  # the folder has been moved
        stored["run_dir"] = folder.resolve().parent
    return args_class(**stored)


class Stopped(Exception):
    """A signal asked for the end, and the run has reached a place where it can be left."""


class Signals:
    """SIGTERM, SIGUSR1 and Ctrl-C only leave a note, which stages read between two units of work.

    If none does within the grace period, the run ends anyhow; what is on disk is whole, and at most the time since the
    last checkpoint is lost. A second Ctrl-C ends at once.
    """

    received: str | None = None
    saving = False  # a checkpoint is being written: it is finished first

    def __enter__(self):
        Signals.received, self.timer = None, None
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.timer:
            self.timer.cancel()

    def _note(self, number, _frame) -> None:
        if Signals.received and number == signal.SIGINT:
            os._exit(130)
        if not Signals.received:
            Signals.received = signal.Signals(number).name
            self._wait()

    def _wait(self) -> None:
        self.timer = threading.Timer(GRACE, self._leave)
        self.timer.daemon = True
        self.timer.start()

    def _leave(self) -> None:
        if Signals.saving:
            self._wait()
            return
        tqdm.write(f"stopped by {Signals.received}, between two checkpoints; {how_to_go_on()}", file=sys.stderr)
        os._exit(STOPPED)


def how_to_go_on() -> str:
    return f"to go on: {' '.join(map(_quoted, [Path(sys.executable).name, *sys.argv]))}"


def _quoted(word: str) -> str:
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else repr(word)


def run_script(main, args_class: type, laptop: dict, presets: dict[str, dict] | None = None) -> None:
    """main(args), with bad input told in one line and exit code 2, and a run that was stopped with exit code 75."""
    try:
        with Signals():
            main(parse_args(args_class, laptop, presets))
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        tqdm.write(f"stopped by {Signals.received} {stop}; {how_to_go_on()}", file=sys.stderr)
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        tqdm.write(f"error: {disk_trouble(error.filename or '.', error)}", file=sys.stderr)
        sys.exit(2)


def disk_trouble(path, error: Exception) -> str:
    """One line: what could not be written, why, how much space is left, and the way on."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**20
    why = getattr(error, "strerror", None) or error
    return f"cannot write {path} ({why}; {free:,.0f} MiB free there); make room and give the same command again"


def write_whole(path: Path, write) -> None:
    """write(file) into a new file that then takes the name `path`: it is there whole or not at all, and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_text_whole(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def select_device(name: str) -> torch.device:
    """auto takes a GPU if there is one; cuda without one is an error, never a silent fallback."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """A folder {env_id}__{exp_name}__{seed}__{time}: args.json, metrics.jsonl, TensorBoard events, curves.png."""

    def __init__(self, args):
        self.args = args
        self.started = time.monotonic()
        self.stages: dict[str, tuple[float, str]] = {}  # seconds and rate
        self.before = 0.0  # seconds of the stages' parts before an interruption
        self.elsewhere = 0.0  # seconds of the current stage that `timed` has taken out
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.records: list[tuple[int, dict[str, float]]] = []  # the lines of metrics.jsonl
        self.fingerprints: dict[str, str] = {}  # sha256 of the data, and of each stage's result
        self.kept: dict[str, str] = {}  # stage -> name of its folder in --stage-dir
        self.made: set[str] = set()  # those that this run has made, before an interruption too
        self.checkpoint_folders: dict[str, Path] = {}  # stage -> where it keeps its checkpoints
        self.last_checkpoint: Path | None = None
        self.bounds: dict[str, float] = {}  # metric -> the absolute value above which a warning is due, once
        self.device = select_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.tf32 and self.device.type == "cpu":
            raise UserError("--tf32 changes what a GPU computes, and this run is on the CPU; leave it out")
        # Both alike: torch itself leaves products exact and takes TF32 for convolutions.
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = args.tf32
        self.wandb = _import_wandb() if args.track else None
        if getattr(args, "compile", False) and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("--compile needs a C++ compiler: install g++, name another in CXX, or run without it")
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder = Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{stamp}"
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder.parent).close()  # told now, not after the data has been made
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder} ({error.strerror}); give another --run-dir")

    def open(self, content: dict | None = None) -> None:
        """Make the folder, or take that of an interrupted run with the same args.json.

        A run that ends at its arguments or its data leaves none behind. What an interrupted run had logged is written
        anew: each stage that is found again brings its metrics along.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if not (content and self.args.checkpoint_every and self._take_over(content)):
            for attempt in range(2, 100):  # two runs may start in the same second
                try:
                    self.folder.mkdir()
                    break
                except FileExistsError:
                    self.folder = self.folder.with_name(f"{self.folder.name.removesuffix(f'-{attempt - 1}')}-{attempt}")
            self.lock = FileLock(self.folder / ".lock")
            self.lock.acquire()
        self.metrics_file = open(self.folder / "metrics.jsonl", "w", buffering=1)
        self.tensorboard = SummaryWriter(str(self.folder))
        if self.wandb:
            self.wandb.init(project=self.args.wandb_project, name=self.folder.name, config=vars(self.args))

    def _take_over(self, content: dict) -> bool:
        """Take the folder of the newest interrupted run with the same arguments, data and code, or of --resume."""
        resume, content = _resume_folder(), json.loads(json.dumps(content))
        stem = re.sub(r"\d{8}-\d{6}$", "", self.folder.name)
        folders = sorted(self.folder.parent.glob(f"{stem}*"), reverse=True) if resume is None else [resume]
        for folder in folders:
            try:
                stored = json.loads((folder / "args.json").read_text())
                moved = {"run_dir": 0} if resume else {}
                same_args = {**stored["args"], **moved} == {**content["args"], **moved}
                same_data = stored["data"]["fingerprint"] == content["data"]["fingerprint"]
                same_code = stored["code"] == content["code"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # killed before it could write them, or not ours: nothing to go on with
            if resume and not same_data:
                raise UserError(f"--resume {folder} was made from other data than {content['data']['path']} holds now")
            if resume and not same_code:
                raise UserError(f"--resume {folder} was made by other code (git {stored['git']}); resume it with that")
            if not (same_args and same_data and same_code):
                continue
            lock = FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except (OSError, Timeout):
                if resume:
                    raise UserError(f"--resume {folder} is still running, or not writable")
                continue
            if (folder / "summary.txt").exists():  # it has finished
                lock.release()
                continue
            self.folder, self.lock = folder, lock
            try:
                self.made = set(json.loads((folder / "made.json").read_text()))
            except (OSError, ValueError):
                self.made = set()
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
            self.say("resumed", f"{folder} was interrupted; it goes on")
            return True
        return False

    def describe(self, data: dict, **constants) -> None:
        """Print what was really loaded and chosen, and write it with arguments, versions and hardware to args.json."""
        content = {
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
            "data": data,
            "constants": constants,
            "command": sys.argv,
            "cwd": os.getcwd(),
            "code": _code_of(self.args),
            "git": _git_revision(),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "hardware": {
                "machine": platform.platform(),
                "processor": processor(),
                "cores": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            },
        }
        self.fingerprints["data"] = data["fingerprint"]
        self.open(content)
        write_text_whole(self.folder / "args.json", json.dumps(content, indent=2) + "\n")
        self.say("data", f"{data['env_id']}: {data['source']} {data['path']}")
        self.say("", f"sha256 {data['sha256']}")
        if data["note"]:
            self.say("", data["note"])
        self.say(
            "",
            f"{data['episodes']:,} episodes ({data['complete_episodes']:,} complete), {data['steps']:,} steps, "
            f"mean return {data['mean_return']:.1f}, std {data['std_return']:.1f}",
        )
        self.say("simulator", f"{data['simulator']}, physics {self.args.physics}")
        if constants:
            words = (f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in constants.items())
            self.say("constants", ", ".join(words))
        self.say("run", f"{self.folder} on {content['hardware']['device']}")

    def seed(self, stage: str, seed: int) -> None:
        """Seed every random stream from the seed and the stage's name: one stage's length cannot move another's."""
        number = int.from_bytes(hashlib.sha256(f"{stage} {seed}".encode()).digest()[:4])
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def stage(self, name: str, total: int, unit: str, saves: tuple = ()) -> "Stage":
        """A timed stage with one progress bar, and with checkpoints of `saves`: see Stage."""
        return Stage(self, name, total, unit, saves)

    def has_made(self, stage: str) -> None:
        """Note on disk that this run has made the stage: after an interruption --fresh does not make it once more."""
        self.made.add(stage)
        if (self.folder / "args.json").exists():
            write_text_whole(self.folder / "made.json", json.dumps(sorted(self.made)))

    @contextmanager
    def timed(self, name: str):
        """Time that gets a row of its own and is not counted to the stage around it."""
        start = time.monotonic()
        yield
        seconds = time.monotonic() - start
        self.elsewhere += seconds
        self.stages[name] = (self.stages.get(name, (0.0, ""))[0] + seconds, "")

    def log(self, step: int, values: dict) -> None:
        """Values by "stage/what" name, at that stage's gradient update `step`. Tensors are read here and nowhere else.

        UserError for NaN or infinity in anything but a time: training on would only waste hours. A warning, once, for a
        value beyond its bound.
        """
        values = {name: value.item() if torch.is_tensor(value) else float(value) for name, value in values.items()}
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(self.not_finite(name, value, step))
            if abs(value) > self.bounds.get(name, np.inf):
                bound = self.bounds.pop(name)
                text = f"{name} is {value:.4g} at update {step}; rewards like the data's add up to {bound:.4g} at most"
                self.say("warning", text)
            self.history.setdefault(name, []).append((step, value))
        self.records.append((step, values))
        try:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.metrics_file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(disk_trouble(self.folder / "metrics.jsonl", error))
        if self.wandb:
            self.wandb.log({**values, "step": step})

    def not_finite(self, name: str, value, step: int) -> str:
        last = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"
        return (
            f"{name} became {value} by update {step}; {last}; likely causes: that stage's learning rate, the guidance "
            "scale, the bounds of the normaliser: lower the first two"
        )

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """NAME.safetensors in the run's folder, whole or not at all."""
        content = safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_whole(self.folder / f"{name}.safetensors", lambda file: file.write(content))

    def reused(self, stage: str, text: str) -> None:
        """Tell, now and in the closing table, that a stage's result was found and not made."""
        self.say(stage, text)
        self.stages[stage] = (0.0, text)

    def say(self, title: str, text: str) -> None:
        tqdm.write(f"{title:<16} {text}")

    def finish(self, results: dict[str, str]) -> None:
        """Print the closing table, with `results` as its last rows, and write it and curves.png to the folder."""
        total = self.before + time.monotonic() - self.started
        rows = [(name, f"{spent:7.1f} s  {spent / total:4.0%}  {rate}") for name, (spent, rate) in self.stages.items()]
        rows += [("total", f"{total:7.1f} s"), ("peak memory", f"{_peak_memory_gib():.2f} GiB")]
        rows += list(results.items())
        rows += [("folder", str(self.folder)), ("plot", str(self.folder / "curves.png"))]
        width = max(len(name) for name, _ in rows)
        table = "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
        print(f"\n{'-' * 72}\n{table}\n{'-' * 72}")
        kept = {stage: str(Path(self.args.stage_dir) / name) for stage, name in self.kept.items()}
        write_text_whole(self.folder / "stages.json", json.dumps(kept, indent=2) + "\n")
        self._plot()
        self.tensorboard.close()
        self.metrics_file.close()
        write_text_whole(self.folder / "summary.txt", table + "\n")  # last: it says that the run has finished
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        for name in ("made.json", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        self.lock.release()
        if self.wandb:
            self.wandb.finish()

    def _plot(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = [n for n in self.history if not n.startswith("time/") and len(self.history[n]) > 1]
        if not names:
            return
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            axis.plot(
                *zip(*self.history[name], strict=True), linewidth=1.2, marker="." if name.startswith("eval") else ""
            )
            axis.set_title(name, fontsize=10)
            axis.tick_params(labelsize=8)
            axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(names) :]:
            axis.axis("off")
        figure.suptitle(self.folder.name, fontsize=10)
        figure.tight_layout()
        write_whole(self.folder / "curves.png", lambda file: figure.savefig(file, dpi=100, format="png"))
        plt.close(figure)


def save_checkpoint(folder: Path, number: int, content: dict) -> Path:
    """Write plain values and tensors, then their sha256 beside them; the newest two stay."""
    Signals.saving = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:012d}.pt"
        Path(f"{path}.sha256").unlink(missing_ok=True)
        write_whole(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **content}, file))
        write_text_whole(Path(f"{path}.sha256"), _sha256(path))
        before = sorted(x for x in folder.glob("*.pt") if x < path and Path(f"{x}.sha256").exists())
        for other in set(folder.glob("*.pt")) - {path, *before[-1:]}:  # older, or cut off or damaged and passed over
            Path(f"{other}.sha256").unlink(missing_ok=True)
            other.unlink()
        return path
    finally:
        Signals.saving = False


def load_checkpoint(folder: Path, device: torch.device, say) -> tuple[Path | None, dict | None]:
    """The newest whole checkpoint, or None where none was ever finished. A damaged one is told and not used.

    One without its sha256 was being written when its process ended. UserError if all are damaged or foreign.
    """
    damaged = []
    for left in folder.glob(".*.pt*"):  # of a process that was killed while it wrote
        left.unlink(missing_ok=True)
    for path in sorted(folder.glob("*.pt"), reverse=True):
        beside = Path(f"{path}.sha256")
        if not beside.exists():
            continue
        if _sha256(path) != beside.read_text(errors="replace"):
            damaged.append(path)
            say(f"{path} is damaged (its sha256 is not that of {beside.name}); not used")
            continue
        try:
            content = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # of many types; weights_only unpickles nothing but tensors and plain values
            why = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged or holds more than tensors and plain values ({why}); delete it")
        if content["format"] != CHECKPOINT_FORMAT:
            raise UserError(f"{path} is of format {content['format']}, this code reads {CHECKPOINT_FORMAT}; delete it")
        for other in damaged:  # told, and not to be taken for the checkpoint before the next one
            other.rename(f"{other}.damaged")
        return path, content
    if damaged:
        raise UserError(f"no checkpoint in {folder} is whole; delete that folder to begin the stage again")
    return None, None


class Stage:
    """A stage of a run: its progress bar, its time, its checkpoints.

    `for item in stage.over(items)` goes through what is still to do; `for update in stage` counts from 1. `saves` is
    all that changes on the way: modules, optimizers, objects that hold such things, and dicts of plain values and
    tensors, which are filled in place. With a checkpoint they are restored, with every random stream and all metrics,
    and the items that were done are passed over. A signal ends the stage between two items, after a checkpoint.
    """

    def __init__(self, run: Run, name: str, total: int, unit: str, saves: tuple):
        self.run, self.name, self.total, self.unit, self.saves = run, name, total, unit, saves
        self.folder = run.checkpoint_folders.get(name) if saves else None
        self.every = 60 * getattr(run.args, "checkpoint_every", 0)
        self.done, self.before = 0, 0.0  # items, and seconds of the parts before an interruption
        self.saved: int | None = None  # items that were done at the last checkpoint

    def __enter__(self):
        self.run.elsewhere, self.first_record = 0.0, len(self.run.records)
        self.bar = tqdm(
            total=self.total, desc=self.name, unit=self.unit, unit_scale=True, mininterval=0.5, dynamic_ncols=True
        )
        self.start = self.last = time.monotonic()
        if self.folder:
            self._restore()
            self._check_space()
        return self

    def __exit__(self, kind, *_):
        self.bar.close()
        if kind is None:
            seconds = self._seconds()
            self.run.stages[self.name] = (seconds, f"{self.bar.n / seconds:,.0f} {self.unit}s/s")
            rate = f"time/{self.name.replace(' ', '_')}_{self.unit}s_per_second"
            self.run.log(self.bar.n, {rate: self.bar.n / seconds})

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.start - self.run.elsewhere

    def __iter__(self):
        return self.over(range(1, self.total + 1))

    def over(self, items):
        for item in items[self.done :]:
            if Signals.received:
                self._stop()
            if self.every and time.monotonic() - self.last > self.every:
                self.checkpoint()
            yield item
            self.done += 1
            self.bar.update(1 if isinstance(item, int) else len(item))

    def update(self, count: int = 1) -> None:
        """Progress of a stage without checkpoints."""
        if Signals.received:
            self._stop()
        self.bar.update(count)

    def _stop(self) -> None:
        saved = self.folder and self.every and self.checkpoint()
        where = f"in stage {self.name} at {self.bar.n:,} of {self.total:,} {self.unit}s"
        raise Stopped(f"{where}, {'with a checkpoint' if saved else 'whose progress is not kept'}")

    def checkpoint(self) -> bool:
        """Write one, keep two. False if the disk does not take it: the run goes on, the last one stands."""
        if self.folder is None:
            return False
        if self.done == self.saved:
            return True
        self.last, Signals.saving = time.monotonic(), True
        try:
            state = [_state(thing) for thing in self.saves]
            if not all_finite(state):
                raise UserError(self.run.not_finite(f"a value of stage {self.name}", "NaN or infinite", self.done))
            content = {
                "done": self.done, "units": self.bar.n,
                "seconds": self._seconds(), "records": self.run.records[self.first_record :], "state": state,
                "random": _random_streams(),
            }  # fmt: skip
            path = save_checkpoint(self.folder, self.done, content)
        except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
            where = self.folder / f"{self.done:012d}.pt"
            self.run.say("warning", f"{disk_trouble(where, error)}; the run goes on without this checkpoint")
            return False
        finally:
            Signals.saving = False
        self.run.last_checkpoint, self.saved = path, self.done
        return True

    def _restore(self) -> None:
        path, content = load_checkpoint(self.folder, self.run.device, lambda text: self.run.say("warning", text))
        if content is None:
            return
        for thing, state in zip(self.saves, content["state"], strict=True):
            _restore_state(thing, state)
        _restore_random_streams(content["random"])
        for step, values in content["records"]:
            self.run.log(step, values)
        self.done = self.saved = content["done"]
        self.before, self.run.last_checkpoint = content["seconds"], path
        self.run.before += self.before
        self.bar.n = self.bar.initial = content["units"]
        self.run.say(self.name, f"goes on at {self.bar.n:,} of {self.total:,} {self.unit}s, from {path}")

    def _check_space(self) -> None:
        """UserError if three checkpoints, two kept and one in the making, will not fit beside those that are there."""
        size = sum(tensor.nbytes for tensor in _tensors([_state(thing) for thing in self.saves]))
        optimizers = [x for thing in self.saves for x in _holders(thing) if isinstance(x, torch.optim.Optimizer)]
        if not self.done:  # Adam's two moments are made by its first update
            size += 2 * sum(
                p.nbytes for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
            )
        place = self.folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in self.folder.glob("*.pt"))
        if self.every and 3 * size > free:
            raise UserError(
                f"the checkpoints of stage {self.name} need {3 * size / 2**20:,.0f} MiB in {self.folder}, which has "
                f"{free / 2**20:,.0f} MiB free; make room, or --checkpoint-every 0 makes none"
            )


def _holders(thing) -> list:
    """What has a state_dict: the thing itself, or else its attributes that do, in order."""
    parts = [thing] if hasattr(thing, "state_dict") or isinstance(thing, dict) else vars(thing).values()
    return [part for part in parts if hasattr(part, "state_dict")]


def _state(thing):
    return thing if isinstance(thing, dict) else [x.state_dict() for x in _holders(thing)]


def all_finite(state) -> bool:
    """Whether no tensor in nested dicts, lists and tuples holds NaN or infinity."""
    numbers = [x for x in _tensors(state) if x.is_floating_point() and x.numel()]
    return all(bool(end.isfinite()) for x in numbers for end in x.aminmax())  # NaN passes through; 30 times as fast


def _restore_state(thing, state) -> None:
    if isinstance(thing, dict):
        thing.clear()
        thing.update(state)
        return
    for holder, part in zip(_holders(thing), state, strict=True):
        holder.load_state_dict(part)


def _tensors(state):
    """All tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, dict | list | tuple):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def _random_streams() -> dict:
    """The state of every random stream, in plain types."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_random_streams(streams: dict) -> None:
    version, keys, gauss = streams["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(streams["numpy"]))
    torch.set_rng_state(streams["torch"].cpu())
    if streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"].cpu())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_of(args) -> str:
    """sha256 of the script and of common/: an interrupted run goes on with the code that it began with."""
    digest = hashlib.sha256()
    for path in [sys.modules[type(args).__module__].__file__, *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--track needs Weights & Biases: pip install wandb")
    return wandb


def _git_revision() -> str:
    def git(*command):
        where = Path(__file__).resolve().parent
        return subprocess.run(["git", *command], cwd=where, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()


def _peak_memory_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
