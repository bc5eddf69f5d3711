"""The repository root on sys.path, and empty data folders for the tests that ask for them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="as many trials as docs/reliability.md states; an hour on two cores"
    )
    parser.addoption("--trials", type=int, help="with --full: at most so many of each")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """tmp_path, with D4RL files looked for in d4rl/, Minari data sets in minari/, and the cache in cache/."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("DAWM_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "minari").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on another's random numbers or threads, or on luck."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
