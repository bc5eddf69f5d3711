"""One mechanism for every long stage: progress, checkpoints, and a result that outlives the run.

A stage is a `with` line around its loop. Entering takes the stage's lock and finds its result, or a checkpoint of it;
leaving keeps the result. A result is one file, {stage_dir}/{stage}-{key}.safetensors. The key hashes exactly what it
depends on: the data, the stages it builds on, the device's kind, the stage's own source (all it calls in its script,
without comments and docstrings) and each argument which that source reads. So a copied stage finds its twin's result,
another wording keeps it, and another line of code makes a new one.
"""

import ast
import hashlib
import inspect
import json
import shutil
import sys
import time
from pathlib import Path

from common import UserError
from common.cli import Signals, Stopped
from common.files import check_whole, one_line, remove, take_lock, write_whole

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

FORMAT = 4  # of results and checkpoints: those of another number have other names, and are never half-read
LINE_EVERY = 30  # seconds between two lines of progress where there is no terminal


class Stage:
    """`with run.stage(function, total, unit, keeps=..., saves=...) as stage: for step in stage: ...`

    The loop counts from 1 to `total`; `stage.over(tensors)` goes through these instead, `stage.at` units being done.
    `keeps`, a module or a dict of tensors, is the result: filled in place when it is found, and the loop then has
    nothing to do. `saves` is all else that changes on the way: modules, optimizers, dicts of plain values and tensors.
    A checkpoint restores both, with torch's random streams and all metrics. A signal ends the stage between two steps,
    after a checkpoint. `after` names the stages that it builds on; `private` keeps the result in the run's own folder.
    """

    def __init__(self, run, function, total: int, unit: str, keeps, saves=(), after=(), private: bool = False):
        self.run, self.total, self.unit, self.keeps, self.private = run, total, unit, keeps, private
        self.saves = (keeps, *saves)
        self.name = function.__name__.removeprefix("train_").replace("_", " ")
        self.depends, key = depends(run, function, run.fingerprints if private else ("data", *after))
        stem = self.name.replace(" ", "_")
        self.path = run.folder / f"{stem}.safetensors" if private else run.args.stage_dir / f"{stem}-{key}.safetensors"
        self.checkpoints = self.path.parent / f".{stem}-{key}"
        self.every = 60 * run.args.checkpoint_every
        self.at, self.done, self.before = 0, 0, 0.0  # units and steps done; seconds before an interruption
        self.saved: int | None = None  # steps that were done at the last checkpoint

    # ---- The block

    def __enter__(self):
        self.lock = None
        if not self.run.reading:
            self.lock = take_lock(self.path).lock
        self.run.kept[self.name] = str(self.path.absolute())
        self.run.elsewhere, self.first_record = 0.0, len(self.run.records)
        self.start = self.last_saved = self.last_line = time.monotonic()
        self.bar = tqdm(
            desc=self.name, total=self.total, unit=self.unit, unit_scale=True, mininterval=0.5, dynamic_ncols=True,
            disable=self.path.exists() or None,  # None: shown on a terminal alone
        )  # fmt: skip
        try:
            self.found = self.path.exists()
            if self.found:
                self._find()
            elif self.run.reading:
                raise UserError(f"{self.run.folder} has no {self.path}: made by other code, or deleted; run it again")
            else:
                self._restore()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind, *_):
        self.bar.close()
        if kind is None and not self.found:
            seconds = self._seconds()
            rate = self.at / seconds
            self.run.stages[self.name] = (seconds, f"{rate:{',.0f' if rate >= 10 else '.2g'}} {self.unit}s/s")
            self.run.log(self.at, {f"time/{self.name.replace(' ', '_')}_{self.unit}s_per_second": rate})
            self._keep()
        if self.lock:
            self.lock.release()

    def __iter__(self):
        return self.over(range(1, self.total + 1))

    def over(self, items):
        for item in () if self.found else items[self.done :]:
            if Signals.received:
                if self.every:
                    self.checkpoint()
                where = f"in stage {self.name} at {self.at:,} of {self.total:,} {self.unit}s"
                raise Stopped(f"{where}, {'with a checkpoint' if self.every else 'whose progress is not kept'}")
            if self.every and time.monotonic() - self.last_saved > self.every:
                self.checkpoint()
            yield item
            count = 1 if isinstance(item, int) else len(item)
            self.done, self.at = self.done + 1, self.at + count
            self.bar.update(count)
            if self.bar.disable and time.monotonic() - self.last_line > LINE_EVERY:
                self.last_line = time.monotonic()
                self.run.say(self.name, f"{self.at:,} of {self.total:,} {self.unit}s, {self._seconds():,.0f} s")

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.start - self.run.elsewhere

    # ---- The result

    def _find(self) -> None:
        """Fill `keeps` from the file; UserError if that is damaged, foreign or made from something else."""
        way_out = f"delete {self.path.name} to make it anew"
        check_whole(self.path, way_out)
        try:
            with safe_open(self.path, "pt") as file:
                manifest = json.loads((file.metadata() or {})["manifest"])
                other = [k for k, needed in self.depends.items() if manifest["depends"].get(k) != needed]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{self.path} is no kept result ({one_line(error)}); {way_out}")
        if other:
            raise UserError(f"{self.path} was made from other {', '.join(other)}; {way_out}")
        fill(self.keeps, tensors)
        for step, values in manifest["metrics"]:
            self.run.log(step, values)
        self.run.fingerprints[self.name] = manifest["fingerprint"]
        text = f"reused {self.path}, {manifest['seconds']:.1f} s to make"
        self.run.stages[self.name] = (0.0, text)
        self.run.say(self.name, text)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # of a process killed after it had kept

    def _keep(self) -> None:
        """Write the result whole or not at all."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in state_of(self.keeps).items()}
        if not isinstance(self.keeps, dict):  # networks may share a buffer, which a file's entries may not
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._refuse_nan(tensors)
        self.run.fingerprints[self.name] = hashlib.sha256(save(tensors)).hexdigest()
        manifest = {
            "stage": self.name, "depends": self.depends, "fingerprint": self.run.fingerprints[self.name],
            "seconds": self._seconds(), "metrics": self.run.records[self.first_record :], "run": self.run.content,
        }  # fmt: skip
        whole = save(tensors, {"manifest": json.dumps(manifest)})
        write_whole(self.path, lambda file: file.write(whole), checksum=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _refuse_nan(self, state) -> None:
        if not all_finite(state):
            raise UserError(self.run.not_finite(f"a value of stage {self.name}", "NaN or infinite", self.at))

    # ---- Checkpoints

    def checkpoint(self) -> None:
        """Write one, keep two."""
        if self.done == self.saved:
            return
        self.last_saved = time.monotonic()
        state = [state_of(thing) for thing in self.saves]
        self._refuse_nan(state)
        content = {
            "done": self.done, "at": self.at, "seconds": self._seconds(), "state": state, "random": random_streams(),
            "records": self.run.records[self.first_record :],
        }  # fmt: skip
        self.run.last_checkpoint = save_checkpoint(self.checkpoints, self.done, content)
        self.saved = self.done

    def _restore(self) -> None:
        path, content = load_checkpoint(self.checkpoints, self.run.device, lambda text: self.run.say("warning", text))
        if content is None:
            return
        for thing, state in zip(self.saves, content["state"], strict=True):
            fill(thing, state)
        set_random_streams(content["random"])
        for step, values in content["records"]:
            self.run.log(step, values)
        self.done = self.saved = content["done"]
        self.at = self.bar.n = self.bar.initial = content["at"]
        self.before, self.run.last_checkpoint = content["seconds"], path
        self.run.before += self.before
        self.run.say(self.name, f"goes on at {self.at:,} of {self.total:,} {self.unit}s, from {path}")


# ---- What a result depends on


def depends(run, function, inputs) -> tuple[dict, str]:
    """All that the result of a stage depends on, and a hash of that."""
    source, fields = stage_source(function)
    content = {
        "format": FORMAT,
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "args": {field: getattr(run.args, field) for field in fields},
        "inputs": {stage: run.fingerprints[stage] for stage in sorted(inputs)},
        "device": run.made_on,
    }
    content = json.loads(json.dumps(content, default=str))  # as it will be read back
    return content, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def stage_source(function) -> tuple[str, list[str]]:
    """Source of `function` and of all it uses in its module, in order of their names, and the `args.` fields it reads.

    Names are followed through annotations too; the class Args itself is left out, since its defaults are no input.
    """
    definitions = {}  # name -> all that defines or changes it
    for node in ast.parse(inspect.getsource(sys.modules[function.__module__])).body:
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        names = {x.id for target in targets if target for x in ast.walk(target) if isinstance(x, ast.Name)}
        for name in [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else names:
            definitions.setdefault(name, []).append(node)
    definitions.pop("Args", None)
    found, waiting, fields = {}, [function.__name__], set()
    while waiting:
        name = waiting.pop()
        found[name] = ast.Module(definitions[name], [])
        nodes = list(ast.walk(found[name]))
        holders = {x.arg for x in nodes if isinstance(x, ast.arg) and ast.unparse(x.annotation or x) == "Args"}
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in [*found, *waiting]:
                waiting.append(node.id)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in {"args", *holders}:
                fields.add(node.attr)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return "\n".join(ast.unparse(found[name]) for name in sorted(found)), sorted(fields)


# ---- Checkpoint files


def save_checkpoint(folder: Path, number: int, content: dict) -> Path:
    """Write plain values and tensors, their sha256 beside them; the newest two stay."""
    Signals.saving = True
    try:
        path = folder / f"{number:012d}.pt"
        write_whole(path, lambda file: torch.save(content, file), checksum=True)
        for old in sorted(x for x in folder.glob("*.pt") if x < path)[:-1]:
            remove(old)
        return path
    finally:
        Signals.saving = False


def load_checkpoint(folder: Path, device: torch.device, say) -> tuple[Path | None, dict | None]:
    """The newest whole checkpoint, or None. A damaged one is told and set aside; UserError for a foreign one."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        try:
            check_whole(path, "not used")
        except UserError as error:
            say(str(error))
            path.rename(f"{path}.damaged")  # not to be taken for the checkpoint before the next one
            continue
        try:
            return path, torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # of many types; weights_only unpickles nothing but tensors and plain values
            raise UserError(f"{path} holds more than tensors and plain values ({one_line(error)[:200]}); delete it")
    return None, None


def state_of(thing):
    return thing if isinstance(thing, dict) else thing.state_dict()


def fill(thing, state) -> None:
    """Put a state back into a module, an optimizer or a dict, in place."""
    if isinstance(thing, dict):
        thing.clear()
        thing.update(state)
    else:
        thing.load_state_dict(state)


def all_finite(state) -> bool:
    """Whether no tensor in nested dicts, lists and tuples holds NaN or infinity."""
    if torch.is_tensor(state):
        ends = state.aminmax() if state.is_floating_point() and state.numel() else ()
        return all(bool(end.isfinite()) for end in ends)  # NaN passes through; 30 times as fast
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return all(map(all_finite, parts))


def random_streams() -> dict:
    """The state of torch's random streams, the only ones that a script draws from."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}


def set_random_streams(streams: dict) -> None:
    torch.set_rng_state(streams["torch"].cpu())
    if streams["cuda"] is not None:
        torch.cuda.set_rng_state(streams["cuda"].cpu())
