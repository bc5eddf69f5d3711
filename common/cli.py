"""A script's command line: the arguments that all share, ranges, errors in one line, signals."""

import dataclasses
import errno
import io
import itertools
import math
import os
import re
import shlex
import signal
import sys
import typing
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common import UserError
from common.files import disk_trouble

import tyro

# Types of arguments; the tuple holds the smallest and the largest value that makes sense.
Share = Annotated[float, (0, 1)]
Count = Annotated[int, (1, math.inf)]
Seed = Annotated[int, (0, 2**31)]
Rate = Annotated[float, (1e-8, 1)]
Amount = Annotated[float, (0, 100)]

STOPPED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h, "try again"
GRACE = 4  # seconds from a signal to the end, unless a checkpoint is being written


@dataclass
class RunArgs:
    env_id: str = "hopper-medium-v2"  # D4RL name, local/ROBOT/QUALITY-v0 (made here), or any Minari id
    data_path: Path | None = None  # a file in D4RL's HDF5 layout to read instead of the published one
    laptop: bool = False  # defaults for a CPU and half an hour, not the paper's; any flag given still wins
    seed: Seed = 0  # seed of the agent; the generative stages have their own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU if there is one
    threads: Annotated[int, (0, 1024)] = 0  # CPU threads of torch, 0: its own choice; last digits depend on it
    tf32: bool = False  # on a GPU, products and convolutions of 10 mantissa bits instead of 23: faster, less exact
    compile: bool = False  # torch.compile for the networks that generate: minutes to start, then faster (docs/speed.md)
    run_dir: Path = Path("runs")  # each run makes a folder of its own in here
    exp_name: str = ""  # part of the folder's name; the script's name if empty
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "dawm"  # project for --track
    log_every: Count = 500  # gradient updates between two logged metrics
    stage_dir: Path = Path("runs/stages")  # world models and synthetic sets are kept here, for all runs that want them
    checkpoint_every: Annotated[float, (0, math.inf)] = 5.0  # minutes between two checkpoints of a stage; 0: none
    eval_every: Count = 5_000  # agent updates between two evaluations [TD3BC]
    eval_episodes: Count = 10  # episodes per evaluation [DWM]
    physics: Literal["auto", "d4rl", "stock"] = "auto"  # capsule masses of the simulator; auto: the data's


def run_script(main, args_class: type, laptop: dict | None = None, presets: dict[str, dict] | None = None) -> None:
    """main(args) from the command line. --preset NAME starts from the defaults presets[NAME], --laptop from `laptop`,
    which wins over a preset; any flag given still wins. Bad input ends with code 2, a signal with 75.
    """
    tell(lambda: main(parse_args(args_class, laptop, presets)))


def parse_args(args_class: type, laptop: dict | None = None, presets: dict[str, dict] | None = None):
    words = " ".join(sys.argv[1:]).replace("--preset=", "--preset ").split()
    named = [(presets or {}).get(value, {}) for flag, value in itertools.pairwise(words) if flag == "--preset"]
    defaults = args_class(**((named[-1] if named else {}) | (laptop if laptop and "--laptop" in words else {})))
    if {"-h", "--help"} & {*sys.argv}:
        print(sys.modules[args_class.__module__].__doc__)  # by itself: tyro would join its lines
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            args = tyro.cli(args_class, prog=shlex.join(["python", *program()]), default=defaults, description="")
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        _, _, box = told.getvalue().strip().partition("\n")  # without its title
        raise UserError(" ".join(re.sub("[│╰╯]|[─-]{3,}", " ", box).split()))
    check_ranges(args)
    return args


def check_ranges(args) -> None:
    """UserError for a number outside the range in its field's annotation, or NaN; None and words pass."""
    for name, hint in typing.get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        numbers = [x for x in (value if isinstance(value, tuple) else [value]) if type(x) in (int, float)]
        for part in (hint, *typing.get_args(hint)):
            for low, high in (x for x in getattr(part, "__metadata__", ()) if isinstance(x, tuple)):  # not tyro's marks
                for number in numbers:
                    if not low <= number <= high:
                        limit = f"must be {low} or more" if high == math.inf else f"lies outside [{low}, {high}]"
                        raise UserError(f"--{name.replace('_', '-')} {number} {limit}")


def args_of(stored: dict, args_class: type):
    """args_class from what args.json holds of it; UserError if another version of the script wrote that."""
    fields = {field.name: field.type for field in dataclasses.fields(args_class)}
    if set(stored) != set(fields):
        raise UserError(
            f"made by another version of the script ({', '.join(sorted(set(stored) ^ set(fields)))} differ)"
        )
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    paths = [name for name, kind in fields.items() if kind in (Path, Path | None) and plain[name] is not None]
    return args_class(**plain | {name: Path(plain[name]) for name in paths})


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
        Signals.received = None
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), self._note)
        self.before = {n: signal.signal(n, h) for n, h in {**handlers, signal.SIGALRM: self._leave}.items()}

    def __exit__(self, *_):
        signal.alarm(0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame) -> None:
        if Signals.received and number == signal.SIGINT:
            os._exit(130)
        if not Signals.received:
            Signals.received = signal.Signals(number).name
            signal.alarm(GRACE)

    def _leave(self, _number, _frame) -> None:
        if Signals.saving:
            signal.alarm(1)
            return
        text = f"\nstopped by {Signals.received}, between two checkpoints; {how_to_go_on()}\n"
        os.write(2, text.encode())  # a print may be under way
        os._exit(STOPPED)


def program() -> list[str]:
    """The words behind `python` that name what this process runs."""
    spec = sys.modules["__main__"].__spec__  # of python -m MODULE
    return ["-m", spec.name] if spec else sys.argv[:1]


def how_to_go_on() -> str:
    return f"to go on: {shlex.join([Path(sys.executable).name, *program(), *sys.argv[1:]])}"


def tell(main) -> None:
    """main(), with signals heeded, and bad input or a full disk told in one line."""
    try:
        with Signals():
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(f"stopped by {Signals.received} {stop}; {how_to_go_on()}", file=sys.stderr)
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOLCK):
            raise
        print(f"error: {disk_trouble(error.filename or '.', error)}", file=sys.stderr)
        sys.exit(2)
