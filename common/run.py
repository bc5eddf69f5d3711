"""One run: its arguments, folder, seeds, progress bars, metrics, and the closing table."""

import ast
import dataclasses
import datetime
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
import subprocess
import sys
import tempfile
import textwrap
import time
import typing
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from common import UserError

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari", "h5py")


def parse_args(args_class: type, laptop: dict, presets: dict[str, dict] | None = None):
    """Command line to args_class. --preset NAME starts from the defaults presets[NAME], --laptop from those in
    `laptop`, which win over a preset's; any flag given still wins.

    --help shows the fields under the `# ---- Heading` comments of the class, each with its docstring.
    """
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
                description=sys.modules[args_class.__module__].__doc__,
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


def run_script(main, args_class: type, laptop: dict, presets: dict[str, dict] | None = None) -> None:
    """main(args), with bad input told in one line and exit code 2."""
    try:
        main(parse_args(args_class, laptop, presets))
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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
        self.elsewhere = 0.0  # seconds of the current stage that `timed` has taken out
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.records: list[tuple[int, dict[str, float]]] = []  # the lines of metrics.jsonl
        self.fingerprints: dict[str, str] = {}  # sha256 of the data, and of each stage's result
        self.kept: dict[str, str] = {}  # stage -> name of its folder in --stage-dir
        self.device = select_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.wandb = _import_wandb() if args.track else None
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder = Path(args.run_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{stamp}"
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder.parent).close()  # told now, not after the data has been made
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder} ({error.strerror}); give another --run-dir")

    def open(self) -> None:
        """Make the folder: a run that ends at its arguments or its data leaves none behind."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        for attempt in range(2, 100):  # two runs may start in the same second
            try:
                self.folder.mkdir()
                break
            except FileExistsError:
                self.folder = self.folder.with_name(f"{self.folder.name.removesuffix(f'-{attempt - 1}')}-{attempt}")
        self.metrics_file = open(self.folder / "metrics.jsonl", "w", buffering=1)
        self.tensorboard = SummaryWriter(str(self.folder))
        if self.wandb:
            self.wandb.init(project=self.args.wandb_project, name=self.folder.name, config=vars(self.args))

    def describe(self, data: dict, **constants) -> None:
        """Print what was really loaded and chosen, and write it with arguments, versions and hardware to args.json."""
        content = {
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
            "data": data,
            "constants": constants,
            "command": sys.argv,
            "git": _git_revision(),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "hardware": {
                "machine": platform.platform(),
                "processor": _processor(),
                "cores": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            },
        }
        self.fingerprints["data"] = data["fingerprint"]
        self.open()
        (self.folder / "args.json").write_text(json.dumps(content, indent=2) + "\n")
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

    @contextmanager
    def stage(self, name: str, total: int, unit: str):
        """A timed stage with one progress bar; `bar.update(n)` counts units."""
        start = time.monotonic()
        with tqdm(total=total, desc=name, unit=unit, unit_scale=True, mininterval=0.5, dynamic_ncols=True) as bar:
            self.elsewhere = 0.0
            yield bar
        seconds = time.monotonic() - start - self.elsewhere
        self.stages[name] = (seconds, f"{bar.n / seconds:,.0f} {unit}s/s")
        self.log(bar.n, {f"time/{name.replace(' ', '_')}_{unit}s_per_second": bar.n / seconds})

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

        UserError for NaN or infinity in anything but a time: training on would only waste hours.
        """
        values = {name: value.item() if torch.is_tensor(value) else float(value) for name, value in values.items()}
        for name, value in values.items():
            if not np.isfinite(value):
                raise UserError(f"{name} became {value} by update {step}; lower that stage's learning rate or guidance")
            self.history.setdefault(name, []).append((step, value))
            self.tensorboard.add_scalar(name, value, step)
        self.records.append((step, values))
        self.metrics_file.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log({**values, "step": step})

    def reused(self, stage: str, text: str) -> None:
        """Tell, now and in the closing table, that a stage's result was found and not made."""
        self.say(stage, text)
        self.stages[stage] = (0.0, text)

    def say(self, title: str, text: str) -> None:
        tqdm.write(f"{title:<16} {text}")

    def finish(self, results: dict[str, str]) -> None:
        """Print the closing table, with `results` as its last rows, and write it and curves.png to the folder."""
        total = time.monotonic() - self.started
        rows = [(name, f"{spent:7.1f} s  {spent / total:4.0%}  {rate}") for name, (spent, rate) in self.stages.items()]
        rows += [("total", f"{total:7.1f} s"), ("peak memory", f"{_peak_memory_gib():.2f} GiB")]
        rows += list(results.items())
        rows += [("folder", str(self.folder)), ("plot", str(self.folder / "curves.png"))]
        width = max(len(name) for name, _ in rows)
        table = "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
        print(f"\n{'-' * 72}\n{table}\n{'-' * 72}")
        kept = {stage: str(Path(self.args.stage_dir) / name) for stage, name in self.kept.items()}
        (self.folder / "stages.json").write_text(json.dumps(kept, indent=2) + "\n")
        (self.folder / "summary.txt").write_text(table + "\n")
        self._plot()
        self.tensorboard.close()
        self.metrics_file.close()
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
        figure.savefig(self.folder / "curves.png", dpi=100)
        plt.close(figure)


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


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()


def _peak_memory_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
