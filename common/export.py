"""Synthetic transitions of a finished run, or of a kept set, as data that other programs read.

    python -m common.export runs/RUN_FOLDER --hdf5 dawm.hdf5                # D4RL's layout
    python -m common.export runs/stages/synthesize-KEY.safetensors --minari dawm/hopper-medium-v0
    python dawm_td3bc.py --env-id dawm/hopper-medium-v0 --laptop --synthetic-fraction 0    # an agent on it alone

Each rollout becomes an episode, ended by a fall or cut as at a time limit. Both forms say where they come from (data,
arguments, versions, fingerprints of the stages); how true their rows are experiments/audit.py tells of the run. Both
are there whole or not at all, and nothing that exists is ever overwritten.
"""

import json
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from common.cli import run_script
from common.data import D4RL_KEYS, MINARI_KEYS, OfflineDataset, load_dataset, minari_root
from common.evaluation import make_env, to_box
from common.files import check_whole, disk_trouble, one_line, sha256_of, sync, take_lock

import gymnasium as gym
import h5py
import numpy as np
import tyro
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    source: Path = tyro.MISSING  # a finished run's folder, or a kept set (.safetensors)
    hdf5: Path | None = None  # new file in D4RL's HDF5 layout
    minari: str | None = None  # new Minari data set NAMESPACE/NAME-vN: minutes, for it keeps eight objects per episode


def main(args: Args) -> None:
    if (args.hdf5 is None) == (args.minari is None):
        raise UserError("give one of --hdf5 FILE and --minari NAMESPACE/NAME-vN")
    place, name = minari_target(args.minari) if args.minari else (args.hdf5.absolute().parent, args.hdf5.name)
    refuse_existing(place, name)
    rows, valid, manifest = read_set(args.source)
    run = manifest["run"]
    path = run["args"]["data_path"] and Path(run["cwd"], run["args"]["data_path"])
    dataset = load_dataset(run["data"]["env_id"], path)
    if dataset.fingerprint != run["data"]["fingerprint"]:
        raise UserError(f"{args.source} was made from other data than {dataset.path} holds now")
    width = 2 * dataset.obs.shape[1] + dataset.action.shape[1] + 2
    if rows.shape[2] != width:
        raise UserError(
            f"{args.source} has rows of {rows.shape[2]} columns, an export writes {width}: obs, action, reward, "
            "next_obs, terminated; a variant with further columns exports with its own code"
        )
    told = f"Synthetic transitions made by {run['module']} from {run['data']['env_id']}, not recorded."
    provenance = {"description": told, "source": str(args.source), **manifest}
    lengths = valid.sum(1)[valid.any(1)]
    columns = columns_of(rows[valid], lengths, dataset)
    write = write_minari if args.minari else write_hdf5
    work = place / f".export-{name.replace('/', '-')}"
    with take_lock(work):
        refuse_existing(place, name)
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed while it wrote
        work.mkdir(parents=True)
        try:
            write(work, name, columns, lengths, dataset, provenance)
            for made in work.rglob("*"):
                sync(made)
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).rename(place / name)
        except OSError as error:
            raise UserError(disk_trouble(place / name, error))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    work.with_name(f"{work.name}.lock").unlink(missing_ok=True)
    file = place / name / "data" / "main_data.hdf5" if args.minari else place / name
    print(f"{place / name}: {len(columns['rewards']):,} rows in {len(lengths):,} rollouts, sha256 {sha256_of(file)}")


def minari_target(minari_id: str) -> tuple[Path, str]:
    if not re.fullmatch(r"[\w-]{2,}(/[\w-]+)+-v\d+", minari_id):
        raise UserError(f"--minari {minari_id!r} is no Minari id; give NAMESPACE/NAME-vN, such as dawm/hopper-v0")
    minari_root().mkdir(parents=True, exist_ok=True)
    return minari_root(), minari_id


def refuse_existing(place: Path, name: str) -> None:
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"{place} is no folder that can be written; make it, or give another path")
    if os.path.lexists(place / name):
        raise UserError(f"{place / name} exists and is never overwritten; delete it, or give another name")


def read_set(source: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Rows [M, H+1, row_dim], valid [M, H+1] and the manifest of a kept synthetic set."""
    if source.is_dir():
        try:
            kept = json.loads((source / "stages.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"{source} is not the folder of a finished run: it holds no readable stages.json")
        if "synthesize" not in kept:
            raise UserError(f"{source} keeps no synthetic set (stages: {', '.join(kept) or 'none'})")
        source = Path(kept["synthesize"])
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a finished run's folder, or run its command again")
    check_whole(source, "run its command again after deleting it")
    try:
        with safe_open(source, "np") as file:
            manifest = json.loads(file.metadata()["manifest"])
            return file.get_tensor("rows"), file.get_tensor("valid"), manifest
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source} is no kept set of complete transitions ({one_line(error)})")


def columns_of(rows: np.ndarray, lengths: np.ndarray, dataset: OfflineDataset) -> dict[str, np.ndarray]:
    """Rows [N, row_dim] of rollouts, end to end, as D4RL's arrays, actions in the environment's units; a rollout that
    no fall ends is timed out.
    """
    obs_dim, action_dim = dataset.obs.shape[1], dataset.action.shape[1]
    obs, action, reward, next_obs, terminated = np.split(rows, np.cumsum([obs_dim, action_dim, 1, obs_dim]), axis=1)
    action = to_box(action, dataset.action_low, dataset.action_high).astype(np.float32)
    terminals = terminated[:, 0] > 0
    timeouts = np.isin(np.arange(len(rows)), np.cumsum(lengths) - 1) & ~terminals
    return dict(zip(D4RL_KEYS, (obs, action, reward[:, 0], next_obs, terminals, timeouts), strict=True))


# ---- The two forms


def write_image(path: Path, fill, **how) -> None:
    """An HDF5 file that fill(file) makes, built in memory: on a full disk HDF5 itself brings the process down."""
    with h5py.File(path.name, "w", driver="core", backing_store=False, **how) as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    path.write_bytes(image)


def write_hdf5(work: Path, name: str, columns: dict, lengths: np.ndarray, dataset, provenance: dict) -> None:
    """A file in D4RL's layout."""

    def fill(file):
        for key, column in columns.items():
            file[key] = column
        file["metadata/description"] = provenance["description"]
        file["metadata/provenance"] = json.dumps(provenance)

    write_image(work / name, fill)


@contextmanager
def minari_writes_to(root: Path):
    """Minari's library writes its sets under `root`, and does not ask for an author's address."""
    before = minari_root()
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ["MINARI_DATASETS_PATH"] = str(before)


def write_minari(work: Path, name: str, columns: dict, lengths: np.ndarray, dataset, provenance: dict) -> None:
    """A Minari data set under the root `work`: made by the library, which reads it, but for the episodes themselves.

    Its own writer makes each array growable: 20,000 rollouts of two steps take 286 MB, here 40. The layout is its
    HDF5Storage's.
    """
    import minari  # slow to import

    with minari_writes_to(work):
        storage = minari.create_dataset_from_buffers(
            name,
            [],
            env=make_env(dataset.spec),
            observation_space=gym.spaces.Box(-np.inf, np.inf, (dataset.obs.shape[1],), np.float32),
            algorithm_name=provenance["run"]["module"],
            description=provenance["description"],
            data_format="hdf5",
        ).storage

    def fill(file):
        stop = 0
        for number, length in enumerate(tqdm(lengths, desc=name, unit="rollout", disable=None)):
            start, stop = stop, stop + int(length)
            obs, action, reward, next_obs, *flags = (columns[key][start:stop] for key in D4RL_KEYS)
            group = file.create_group(f"episode_{number}")
            group.attrs["id"], group.attrs["total_steps"] = number, int(length)
            for key, column in zip(MINARI_KEYS, ([*obs, next_obs[-1]], action, reward, *flags), strict=True):
                group[key] = column

    write_image(storage.data_path / "main_data.hdf5", fill, libver=("v110", "v110"), track_order=True)
    storage.update_metadata(
        {
            "total_episodes": len(lengths),
            "total_steps": len(columns["rewards"]),
            "dataset_size": storage.get_size(),
            "physics": provenance["run"]["physics"],
            "provenance": provenance,
        }
    )


if __name__ == "__main__":
    run_script(main, Args)
