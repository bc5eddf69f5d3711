"""One run: its folder, seeds, log, closing table and plot. Its long parts are stages (stages.py)."""

import csv
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common import UserError
from common.cli import args_of, program
from common.files import disk_trouble, take_lock, write_text, write_whole
from common.stages import Stage

import numpy as np
import torch
from tqdm import tqdm

CONTROLS = Path(__file__).with_name("controls.csv")  # the study's; experiments/report.py writes it
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari", "h5py")


class Run:
    """A folder {env_id}__{exp_name}__{seed}__{time}__{key}: args.json, metrics.jsonl, TensorBoard events, curves.png.

    The key hashes arguments, data and code: an unfinished folder with the same key is taken, and the run goes on there.
    """

    def __init__(self, args, reading: bool = False):
        """UserError for what cannot work on this machine; the folder is made by `open`.

        `reading`: a finished run that is loaded; everything is found, nothing is written.
        """
        self.args, self.started = args, time.monotonic()
        self.stages: dict[str, tuple[float, str]] = {}  # for the closing table: seconds and rate
        self.before = self.elsewhere = 0.0  # seconds of parts before an interruption; that `timed` took from a stage
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.records: list[tuple[int, dict[str, float]]] = []  # the lines of metrics.jsonl
        self.fingerprints: dict[str, str] = {}  # sha256 of the data, and of each stage's result
        self.kept: dict[str, str] = {}  # stage -> its result's file
        self.last_checkpoint: Path | None = None
        self.bounds: dict[str, float] = {}  # metric -> the absolute value above which a warning is due, once
        self.reading = reading
        self.device = _select_device(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.made_on = f"cpu with {torch.get_num_threads()} threads" if self.device.type == "cpu" else "cuda"
        self.made_on += " with tf32" if args.tf32 else ""
        if args.compile and not reading and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise UserError("--compile needs a C++ compiler: install g++, name another in CXX, or run without it")
        if args.track and importlib.util.find_spec("wandb") is None:
            raise UserError("--track needs Weights & Biases: pip install wandb")
        args.exp_name = args.exp_name or Path(sys.modules[type(args).__module__].__file__).stem
        if "/" in args.exp_name or len(args.exp_name) > 100:
            raise UserError(f"--exp-name {args.exp_name[:40]!r}: use up to 100 characters and no slash")
        places = {} if reading else {"--run-dir": args.run_dir, "--stage-dir": args.stage_dir}
        for flag, place in places.items():
            try:
                place.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=place).close()
            except OSError as error:
                raise UserError(f"{flag} {place} cannot be written ({error.strerror}); give another")

    @classmethod
    def finished(cls, folder: Path, args_class: type) -> "Run":
        """A finished run, to be loaded by going through `main` once more: each stage is found, and none is made."""
        folder = Path(folder)
        try:
            content = json.loads((folder / "args.json").read_text())
            args = args_of(content["args"], args_class)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder} is not the folder of a run: it holds no readable args.json")
        if not (folder / "summary.txt").exists():
            raise UserError(f"{folder} has not finished: give its command again: python {' '.join(content['command'])}")
        args.track = False
        if not torch.cuda.is_available():  # made on a GPU, perhaps
            args.device, args.tf32 = "cpu", False
        args.run_dir, args.stage_dir = folder.parent, Path(content["cwd"], args.stage_dir)
        args.data_path = args.data_path and Path(content["cwd"], args.data_path)
        run = cls(args, reading=True)
        run.folder, run.content, run.made_on = folder, content, content["hardware"]["made_on"]
        return run

    def open(self, dataset, evaluator, **constants) -> None:
        """Make the folder, or take that of an interrupted run with the same key; print and store what was loaded.

        A run that ends at its arguments or its data leaves none behind. What an interrupted run had logged is written
        anew: each stage that is found again brings its metrics along.
        """
        data = dataset.facts()
        self.fingerprints["data"] = data["fingerprint"]
        if self.reading:
            if data["fingerprint"] != self.content["data"]["fingerprint"]:
                raise UserError(f"{self.folder} was made from other data than {data['path']} holds now")
            return
        self.content = {
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()},
            "data": data, "constants": constants, "physics": evaluator.physics,
            "module": _module_of(self.args), "command": [*program(), *sys.argv[1:]], "cwd": os.getcwd(),
            "code": _code_of(self.args), "git": _git_revision(),
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
            "hardware": {
                "machine": platform.platform(), "processor": processor(), "cores": os.cpu_count(),
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                "made_on": self.made_on,
            },
        }  # fmt: skip
        same = [self.content["args"] | {"run_dir": ""}, data["fingerprint"], self.content["code"], self.made_on]
        self._take_folder(hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8])
        write_text(self.folder / "args.json", json.dumps(self.content, indent=2) + "\n")
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if self.args.track:
            import wandb

            wandb.init(project=self.args.wandb_project, name=self.folder.name, sync_tensorboard=True)
        self.metrics_file = open(self.folder / "metrics.jsonl", "w", buffering=1)
        self.tensorboard = SummaryWriter(str(self.folder))
        self.say("data", f"{data['env_id']}: {data['source']} {data['path']}")
        told = f"{data['episodes']:,} episodes ({data['complete_episodes']:,} complete), {data['steps']:,} steps"
        told += f", mean return {data['mean_return']:.1f}, std {data['std_return']:.1f}"
        for text in (f"sha256 {data['sha256']}", data["note"], told):
            if text:
                self.say("", text)
        self.say("simulator", f"{data['simulator']}, physics {evaluator.physics}")
        if constants:
            words = (f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in constants.items())
            self.say("constants", ", ".join(words))
        self.say("run", f"{self.folder} on {self.content['hardware']['device']}")
        self.stages["start, data"] = (time.monotonic() - self.started, "")

    def _take_folder(self, key: str) -> None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # two of one command may start in the same second
        stem = f"{self.args.env_id.replace('/', '-')}__{self.args.exp_name}__{self.args.seed}__"
        found = [x for x in self.args.run_dir.iterdir() if x.name.startswith(stem) and x.name.endswith(f"__{key}")]
        for folder in sorted(found, reverse=True) if self.args.checkpoint_every else ():
            if (folder / "summary.txt").exists() or not (folder / "args.json").exists():
                continue  # finished, or killed before anything was done
            try:
                self.lock = take_lock(folder / "run", wait=False).lock
            except (UserError, OSError):  # still running, or not ours
                continue
            self.folder = folder
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
            self.say("resumed", f"{folder} was interrupted; it goes on")
            return
        self.folder = self.args.run_dir / f"{stem}{stamp}__{key}"
        self.folder.mkdir()
        self.lock = take_lock(self.folder / "run", wait=False).lock

    def seed(self, stage: str, seed: int) -> None:
        """Seed torch from the seed and the stage's name: one stage's length cannot move another's."""
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{stage} {seed}".encode()).digest()[:4]))

    def stage(self, function, total: int, unit: str, keeps, **how) -> Stage:
        """A stage with progress bar, checkpoints and a kept result: see Stage."""
        return Stage(self, function, total, unit, keeps, **how)

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

        UserError for NaN or infinity: training on would waste hours. A warning, once, for a value beyond its bound.
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
        if self.reading:
            return
        try:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            self.metrics_file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(disk_trouble(self.folder / "metrics.jsonl", error))

    def not_finite(self, name: str, value, step: int) -> str:
        last = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"
        return (
            f"{name} became {value} by update {step}; {last}; likely causes: that stage's learning rate, the guidance "
            "scale, the bounds of the normaliser: lower the first two"
        )

    def say(self, title: str, text: str) -> None:
        if not self.reading:
            tqdm.write(f"{title:<16} {text}")

    def finish(self, results: dict[str, str]) -> None:
        """Print the closing table, with `results` as its last rows, and write it and curves.png to the folder."""
        if self.reading:
            return
        total = self.before + time.monotonic() - self.started
        rows = [(name, f"{spent:7.1f} s  {spent / total:4.0%}  {rate}") for name, (spent, rate) in self.stages.items()]
        rows += [("total", f"{total:7.1f} s"), *results.items(), *self._told_controls().items()]
        rows += [("folder", str(self.folder)), ("plot", str(self.folder / "curves.png"))]
        if self.content["data"]["robot"] and "eval/episodic_return" in self.history:
            python = sys.executable.removeprefix(f"{os.getcwd()}/")  # where no environment has been activated
            rows += [("to watch it", f"{python} experiments/policy.py {self.folder} --gif policy.gif")]
        width = max(len(name) for name, _ in rows)
        table = "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
        print(f"\n{'-' * 72}\n{table}\n{'-' * 72}")
        write_text(self.folder / "stages.json", json.dumps(self.kept, indent=2) + "\n")
        self._plot()
        self.tensorboard.close()
        self.metrics_file.close()
        write_text(self.folder / "summary.txt", table + "\n")  # last: it says that the run has finished
        self.lock.release()
        (self.folder / "run.lock").unlink(missing_ok=True)

    def _told_controls(self) -> dict[str, str]:
        """Is the score good? What others reached with the same data."""
        lines = {}
        for row in self._controls():
            seeds = f"± {row['score_std']}, {row['seeds']} seeds" if row["score_std"] else "one seed"
            score = f"return {float(row['return']):8.1f}   normalized score {float(row['score']):6.1f}"
            lines[row["control"]] = f"{score}   ({seeds}, second half of {int(row['updates']):,} updates)"
        return lines

    def _controls(self) -> list[dict[str, str]]:
        """Known results of learners without a world model on these data in this physics; none for other data."""
        here = self.content["data"]["fingerprint"][:12], self.content["physics"]
        rows = csv.DictReader(CONTROLS.read_text().splitlines()) if CONTROLS.exists() else ()
        return [row for row in rows if (row["fingerprint"], row["physics"]) == here]

    def _plot(self) -> None:
        """A panel for each metric, with its held-out twin; the return beside the data's mean and the known controls."""
        from matplotlib.figure import Figure  # slow to import

        left_out = ("time/", "eval/episodic_return_std", "eval/normalized_score")
        names = [n for n in self.history if len(self.history[n]) > 1 and not n.startswith(left_out)]
        names = [n for n in names if "/val_" not in n or n.replace("/val_", "/", 1) not in names]
        levels = {row["control"]: float(row["return"]) for row in self._controls()}
        levels["the data's mean"] = self.content["data"]["mean_return"]
        columns = max(1, -(-len(names) // 2))
        figure = Figure(figsize=(4 * columns, 7), layout="constrained")
        for place, name in enumerate(names, 1):
            axis = figure.add_subplot(2, columns, place, title=name)
            axis.plot(*zip(*self.history[name], strict=True), label="this run")
            if (held_out := name.replace("/", "/val_", 1)) in self.history:
                axis.plot(*zip(*self.history[held_out], strict=True), label="held out")
            for number, (label, value) in enumerate(levels.items() if name == "eval/episodic_return" else ()):
                axis.axhline(value, color=f"C{number + 1}", linestyle="--", label=f"{label}: {value:.1f}")
            axis.legend()
        figure.suptitle(f"{self.args.exp_name} on {self.args.env_id}, seed {self.args.seed}")
        figure.supxlabel("gradient updates of each stage")
        write_whole(self.folder / "curves.png", lambda file: figure.savefig(file, dpi=80, format="png"))


def _select_device(args) -> torch.device:
    """auto takes a GPU if there is one; cuda without one is an error, never a silent fallback."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device auto or cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.tf32 and device.type == "cpu":
        raise UserError("--tf32 changes what a GPU computes, and this run is on the CPU; leave it out")
    # Both alike: torch itself leaves products exact and takes TF32 for convolutions.
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    return device


def _module_of(args) -> str:
    """The script that args belongs to, as `python -m` and `import` name it."""
    name, spec = type(args).__module__, sys.modules["__main__"].__spec__
    return name if name != "__main__" else spec.name if spec else Path(sys.argv[0]).stem


def _code_of(args) -> str:
    """sha256 of the script and of common/: an interrupted run goes on with the code that it began with."""
    digest = hashlib.sha256()
    for path in [sys.modules[type(args).__module__].__file__, *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


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
