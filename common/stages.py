"""Results that outlive a run: what a stage made is found again by every script that has the same stage.

A result lies in {stage_dir}/{stage}-{key}. The key hashes exactly what the result depends on: the data, the stages it
builds on, the device's kind, the stage's own source (everything it calls in its script, without comments and
docstrings) and each argument which that source reads. So a copied stage finds its twin's result, another wording keeps
it, and another line of code makes a new one.
"""

import ast
import copy
import datetime
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import UserError

FORMAT = 2  # of the folder; another number is told, never half-read


def stage_source(function) -> tuple[str, list[str]]:
    """Source of `function` and of all it uses in its module, in order of their names, and the `args.` fields it reads.

    Names are followed through annotations too; the class Args itself is left out, since its defaults are no input.
    """
    definitions = {}  # name -> all that defines or changes it
    for node in ast.parse(inspect.getsource(sys.modules[function.__module__])).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in {name.id for x in targets for name in ast.walk(x) if isinstance(name, ast.Name)}:
                definitions.setdefault(name, []).append(node)
    definitions.pop("Args", None)
    found, waiting, fields = {}, [function.__name__], set()
    while waiting:
        name = waiting.pop()
        found[name] = copy.deepcopy(ast.Module(definitions[name], []))
        nodes = list(ast.walk(found[name]))
        holders = {
            x.arg for x in nodes if isinstance(x, ast.arg) and x.annotation and ast.unparse(x.annotation) == "Args"
        }
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in definitions and node.id not in [*found, *waiting]:
                waiting.append(node.id)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in {"args", *holders}:
                fields.add(node.attr)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return "\n".join(ast.unparse(found[name]) for name in sorted(found)), sorted(fields)


def depends(run, name: str, function, inputs) -> tuple[dict, str]:
    """All that the result of a stage depends on, and a folder's name for it: the stage's name and a hash of that."""
    source, fields = stage_source(function)
    device = f"cpu with {torch.get_num_threads()} threads" if run.device.type == "cpu" else run.device.type
    content = {
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "args": {field: getattr(run.args, field) for field in fields},
        "inputs": {stage: run.fingerprints[stage] for stage in inputs},
        "device": device + (" with tf32" if run.args.tf32 and run.device.type == "cuda" else ""),
    }
    content = json.loads(json.dumps(content, default=str))  # as it will be read back
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return content, f"{name.replace(' ', '_')}-{key}"


def resumable(run, name: str, function) -> None:
    """Give a stage whose result no other run wants a place for its checkpoints, in the run's own folder.

    They are found again while its source, arguments and all that the run has loaded and made so far stay as they are.
    """
    folder = depends(run, name, function, sorted(run.fingerprints))[1]
    run.checkpoint_folders[name] = run.folder / "checkpoints" / folder


class Kept:
    """The place of one stage's result. `tensors` is what was found there (see `placed`), or None: then make the result
    and `keep` it.

    Until it is kept, other processes that want the same result wait. The metrics logged in between are kept with it and
    logged again by whoever finds it. `name` is that of the stage's progress bar; `after` names the stages built on.
    """

    def __init__(self, run, name: str, function, after: tuple[str, ...] = ()):
        self.run, self.name = run, name
        self.depends, folder = depends(run, name, function, ("data", *after))
        self.folder = Path(run.args.stage_dir) / folder
        fresh = run.args.fresh and name not in run.made  # an interrupted run does not make its own stages once more
        # In the store, where every run that wants this stage finds them; a fresh one begins with none.
        checkpoints = run.folder / "checkpoints" if run.args.fresh else self.folder.parent
        run.checkpoint_folders[name] = checkpoints / f".checkpoints-{folder}"
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(f"{self.folder}.lock")
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                run.say(name, f"another process has {self.folder} in hand; waiting for it")
                self.lock.acquire()
        except OSError as error:
            where = self.folder.parent
            raise UserError(f"cannot write the stage store {where} ({error.strerror}); give another --stage-dir")
        run.kept[name] = self.folder.name
        self.tensors = None
        if self.folder.exists() and not fresh:
            try:
                self.tensors = self._read()
                shutil.rmtree(run.checkpoint_folders[name], ignore_errors=True)  # of a process killed after it had kept
            finally:
                self.lock.release()
        self.first_record = len(run.records)

    def _read(self) -> dict[str, torch.Tensor]:
        """The stored tensors; UserError if the folder is damaged, foreign or of another version."""
        way_out = "delete that folder, or --fresh makes it anew"
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
            version, depends, sha256 = manifest["format"], dict(manifest["depends"]), manifest["sha256"]
            metrics, made, seconds = manifest["metrics"], float(manifest["time"]), float(manifest["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.folder} holds no readable manifest.json; {way_out}")
        if version != FORMAT:
            raise UserError(f"{self.folder} is of format {version}, this code reads {FORMAT}; {way_out}")
        if depends != self.depends:
            other = [k for k in self.depends if depends.get(k) != self.depends[k]]
            raise UserError(f"{self.folder} was made from other {', '.join(other)} than its name says; {way_out}")
        beside = self.folder / "manifest.sha256"
        if not beside.exists() or _sha256(self.folder / "manifest.json") != beside.read_text(errors="replace"):
            raise UserError(f"{self.folder} holds a damaged manifest.json (not of the sha256 beside it); {way_out}")
        path = self.folder / "tensors.safetensors"
        if not path.exists() or _sha256(path) != sha256:
            raise UserError(f"{path} is damaged (its sha256 is not the manifest's); {way_out}")
        self.run.fingerprints[self.name] = sha256
        for step, values in metrics:
            self.run.log(step, values)
        age = datetime.timedelta(seconds=round(time.time() - made))
        self.run.reused(self.name, f"reused {self.folder}, {age} old, {seconds:.1f} s to make")
        return {name: placed(tensor, self.run.device) for name, tensor in load_file(path).items()}

    def keep(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write the result, whole or not at all, and let others have it -> the tensors as others find them.

        A full disk is told, and the run goes on with what was given. UserError for NaN or infinity: nothing is kept.
        """
        for what, tensor in tensors.items():
            if not _finite(tensor):
                raise UserError(self.run.not_finite(f"{what} of stage {self.name}", "NaN or infinite", len(tensor)))
        try:
            self._write(tensors)
            self.run.has_made(self.name)
        except (OSError, SafetensorError) as error:
            digest = hashlib.sha256(b"not kept")  # what builds on it is not to be found by other runs either
            for what, tensor in tensors.items():
                digest.update(what.encode() + tensor.cpu().contiguous().numpy().tobytes())
            self.run.fingerprints[self.name] = digest.hexdigest()
            self.run.say(self.name, f"could not be kept in {self.folder} ({error}); the run goes on without")
        else:
            shutil.rmtree(self.run.checkpoint_folders[self.name], ignore_errors=True)
            found = load_file(self.folder / "tensors.safetensors")  # so that a set's rows do not stay on disk twice
            tensors = {name: placed(tensor, self.run.device) for name, tensor in found.items()}
        self.lock.release()
        return tensors

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        folder = self.folder.with_name(f".unfinished-{self.folder.name}")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")
        sha256 = self.run.fingerprints[self.name] = _sha256(folder / "tensors.safetensors")
        manifest = {
            "format": FORMAT,
            "stage": self.name,
            "depends": self.depends,
            "sha256": sha256,
            "time": time.time(),
            "seconds": self.run.stages.get(self.name, (0.0, ""))[0],
            "metrics": self.run.records[self.first_record :],
            "run": str(self.run.folder),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        (folder / "manifest.sha256").write_text(_sha256(folder / "manifest.json"))
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if self.folder.exists():  # --fresh
            shutil.rmtree(self.folder)
        folder.rename(self.folder)
        parent = os.open(self.folder.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


class RowFile:
    """Rows [N, width], float32, that grow on disk while a stage makes them: never all in memory, nor in a checkpoint.

    As one of the things that a stage saves it tells how many bytes there are and their sha256; a resumed stage goes on
    behind them.
    """

    def __init__(self, run, stage: str, width: int):
        self.run, self.stage, self.width, self.size = run, stage, width, 0
        self.path, self.digest = run.checkpoint_folders[stage] / "rows.f32", hashlib.sha256()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.file = open(self.path, "r+b")

    def append(self, rows: torch.Tensor) -> None:
        """UserError for NaN or infinity."""
        if not _finite(rows):
            done = self.size // (4 * self.width)
            raise UserError(self.run.not_finite(f"a row of stage {self.stage}", "NaN or infinite", done))
        content = rows.cpu().contiguous().numpy().tobytes()
        try:
            self.file.seek(self.size)
            self.file.write(content)
            self.file.flush()  # a full disk is told here
        except OSError as error:
            error.filename = str(self.path)
            raise
        self.digest.update(content)
        self.size += len(content)

    def state_dict(self) -> dict:
        os.fsync(self.file.fileno())
        return {"size": self.size, "sha256": self.digest.hexdigest()}

    def load_state_dict(self, state: dict) -> None:
        """UserError if the rows that were there are not any more."""
        self.file.seek(0)
        self.size, self.digest, left = state["size"], hashlib.sha256(), state["size"]
        while left and (part := self.file.read(min(left, 2**24))):
            self.digest.update(part)
            left -= len(part)
        if self.digest.hexdigest() != state["sha256"]:
            raise UserError(f"{self.path} is damaged; delete {self.path.parent} to begin the stage again")

    def tensor(self, device: torch.device) -> torch.Tensor:
        """All rows (see `placed`)."""
        self.file.truncate(self.size)  # an interrupted run may have got further
        self.file.close()
        flat = torch.from_file(str(self.path), size=self.size // 4)
        return placed(flat.view(-1, self.width), device)


def _finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() and tensor.numel()) or all(bool(end.isfinite()) for end in tensor.aminmax())


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that a file holds, on a GPU if half of its free memory takes it; else it stays mapped from the file, so
    that it may be larger than any memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch holds of the world model's training counts as free
    fits = device.type == "cuda" and tensor.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return tensor.to(device) if fits else tensor


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
