"""One way to write a file whole or not at all, one to check that it is still what was written, one lock."""

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from common import UserError

from filelock import AcquireReturnProxy, FileLock, Timeout


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write, checksum: bool = False) -> None:
    """write(binary file) into a new file that then takes the name `path`, on the disk whole, or UserError.

    With `checksum` its sha256 is put beside it first: a file without one was never finished.
    """
    temporary = path.with_name(f".{path.name}.part")  # what a kill leaves of it, the next write replaces
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if checksum:
            write_whole(_beside(path), lambda file: file.write(sha256_of(temporary).encode()))
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as a RuntimeError
        raise UserError(disk_trouble(path, error))
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def check_whole(path: Path, way_out: str) -> None:
    """UserError unless the sha256 of `path` is the one beside it."""
    beside = _beside(path)
    if not beside.exists() or beside.read_bytes() != sha256_of(path).encode():
        raise UserError(f"{path} is damaged (its sha256 is not that of {beside.name} beside it); {way_out}")


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def take_lock(path: Path, wait: bool = True) -> AcquireReturnProxy:
    """The lock on `path`, which no other process has then: for a `with` block, or until `.lock.release()`.

    It is waited for, or UserError. OSError as of any file.
    """
    lock = FileLock(f"{path}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"another process has {path} in hand; wait for it, or stop it")
    print(f"another process has {path} in hand; waiting for it", flush=True)
    return lock.acquire()


def disk_trouble(path, error: Exception) -> str:
    """One line: what could not be written, why, how much space is left, and the way on."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**20
    why = getattr(error, "strerror", None) or error
    return f"cannot write {path} ({why}; {free:,.0f} MiB free there); make room and give the same command again"


def one_line(error: Exception) -> str:
    """The error's own words in one line."""
    return " ".join(str(error).split()) or type(error).__name__
