"""One thread, a warm process for the children, and the folders that tests share or have for themselves."""

import os
import re
import sys
from multiprocessing import forkserver
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported, here and in every child
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = map(str, (ROOT, ROOT / "experiments", ROOT / "benchmarks"))

from common.files import take_lock  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from toy import SCRIPTS, hopper_arguments, hopper_run  # noqa: E402

os.chdir(ROOT)  # where the scripts lie that the children's warm process imports


def pytest_sessionstart(session):
    if not session.config.getoption("numprocesses", None):  # pytest -n: in each worker, not in what hands out the tests
        forkserver.ensure_running()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="as many trials as docs/reliability.md states; half an hour")
    parser.addoption("--trials", type=int, help="with --full: at most so many of each")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: only with --full")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="with --full"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """tmp_path, with D4RL files looked for in d4rl/ and Minari data sets in minari/."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "minari").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with toy Hopper data and kept stages, shared by all tests that run a script on them unchanged, and by
    all workers of pytest -n.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "toy"
    folder.mkdir(exist_ok=True)
    with take_lock(folder / "data"):
        hopper_arguments(folder)
    return folder


@pytest.fixture(scope="session")
def made(toy):
    """made(module, *options): the folder of a script's toy run, and what it printed; made once, for all tests."""

    def made(module: str, *options: str) -> tuple[Path, str]:
        printed = toy / " ".join([module, *options])
        with take_lock(printed):
            if not printed.exists():
                printed.write_text(hopper_run(module, toy, *SCRIPTS[module], *options))
        text = printed.read_text()
        return Path(re.search(r"^folder +(.+)$", text, re.M)[1]), text

    return made


@pytest.fixture
def double():
    """What must be equal is so to the rounding of float64, on any machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def seeded():
    """No test depends on another's random numbers or threads, or on luck."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
