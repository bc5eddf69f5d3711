"""Random files and arguments: a result or one of the documented errors, no traceback."""

import dataclasses
import importlib
import sys
import typing
from pathlib import Path

from common import UserError
from common.cli import parse_args
from common.data import OfflineDataset, load_dataset

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import SCRIPTS, hopper_file

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
CHECKS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def loads_or_tells(path: Path) -> bool:
    """Whether it was loaded. No other end than a data set that holds together, or UserError of one line."""
    try:
        found = load_dataset("hopper-medium-v2", path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 10
        return False
    assert isinstance(found, OfflineDataset) and found.lengths.sum() == len(found.obs) > 0
    assert all(np.isfinite(getattr(found, name)).all() for name in ("obs", "action", "reward", "next_obs"))
    return True


def test_damaged_bytes(folder, trials, told):
    """A whole file with up to forty bytes changed, or cut."""
    whole = hopper_file(folder / "whole.hdf5", episodes=3, length=12).read_bytes()
    changes = st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=40)
    count, loaded = trials(30, 700), []

    @settings(max_examples=count, **CHECKS)
    @given(changes, st.integers(0, len(whole)), st.booleans())
    def fuzz(changes, length, is_cut):
        content = bytearray(whole)
        for place, byte in changes:
            content[place] = byte
        path = folder / "damaged.hdf5"
        path.write_bytes(content[:length] if is_cut else content)
        loaded.append(loads_or_tells(path))

    fuzz()
    told("fuzzed bytes of D4RL files", f"{len(loaded)} cases: {sum(loaded)} loaded whole, the others told in one line")


def test_wrong_contents(folder, trials, told):
    """Readable files with missing, misshapen, foreign or non-finite arrays."""
    with h5py.File(hopper_file(folder / "whole.hdf5", episodes=3, length=12)) as file:
        whole = {key: file[key][:] for key in KEYS}
    values = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1.0, 2.0, 0.0])
    change = st.one_of(
        st.tuples(st.just("drop"), st.none()),
        st.tuples(st.just("value"), values),
        st.tuples(st.just("cut"), st.integers(0, 30)),
        st.tuples(st.just("dtype"), st.sampled_from(["S4", "int8", "uint64", "float16", "complex64", "bool"])),
        st.tuples(st.just("shape"), st.sampled_from([(), (0,), (1, 1, 1), (-1, 1)])),
        st.tuples(st.just("group"), st.none()),
    )
    count, loaded = trials(30, 700), []

    @settings(max_examples=count, **CHECKS)
    @given(st.dictionaries(st.sampled_from(KEYS), change, min_size=1, max_size=3))
    def fuzz(changes):
        path = folder / "wrong.hdf5"
        with h5py.File(path, "w") as file:
            for key, array in whole.items():
                kind, value = changes.get(key, ("", None))
                if kind == "drop":
                    continue
                if kind == "group":
                    file.create_group(key)
                    continue
                with np.errstate(all="ignore"):
                    if kind == "value":
                        array = array.astype(np.float64)
                        array.reshape(-1)[len(array) // 2] = value
                    elif kind == "cut":
                        array = array[:value]
                    elif kind == "dtype":
                        array = array.astype(value)
                    elif kind == "shape":
                        array = array.reshape(value) if value == (-1, 1) else np.zeros(value)
                file[key] = array
        loaded.append(loads_or_tells(path))

    fuzz()
    told(
        "fuzzed contents of D4RL files", f"{len(loaded)} cases: {sum(loaded)} loaded whole, the others told in one line"
    )


def test_arguments(monkeypatch, trials, told):
    """Any value for any arguments of any script: parsed and within its limits, or UserError of one line."""
    numbers = st.one_of(st.integers(-(10**6), 10**6), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63]))
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    value = st.one_of(numbers.map(str), texts, st.sampled_from(["", "None", "own", "nan", "-inf", "True", "td3bc"]))
    count, passed = trials(15, 600), []

    @settings(max_examples=count, **CHECKS)
    @given(st.sampled_from(list(SCRIPTS)), st.data())
    def fuzz(name, data):
        script = importlib.import_module(name)
        fields = [field.name for field in dataclasses.fields(script.Args)]
        chosen = data.draw(st.lists(st.tuples(st.sampled_from([*fields, "nonsense"]), value), max_size=4))
        words = [word for field, text in chosen for word in (f"--{field.replace('_', '-')}", text)]
        if "--help" in words or "-h" in words:
            return
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        try:
            args = parse_args(script.Args, script.LAPTOP, getattr(script, "PRESETS", None))
            getattr(script, "check_args", lambda args: None)(args)  # SSORL has nothing to check across fields
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) > 10
            passed.append(False)
            return
        passed.append(True)
        for field, hint in typing.get_type_hints(script.Args).items():
            if hint in (int, float):
                assert isinstance(getattr(args, field), int | float)

    fuzz()
    told("fuzzed arguments of all scripts", f"{len(passed)} cases: {sum(passed)} accepted, the others told in one line")
