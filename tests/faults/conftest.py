"""A few trials of each promise; `pytest tests/faults --full` makes as many as docs/reliability.md states."""

import pytest


@pytest.fixture
def trials(request):
    """trials(few, many): how many to make."""
    option = request.config.getoption
    return lambda few, many: min(many, option("--trials") or many) if option("--full") else few


@pytest.fixture
def told(request):
    """told(promise, figure): a row of the table that `make test-faults` prints at its end."""

    def told(promise: str, figure: str) -> None:
        request.config.stash.setdefault(ROWS, []).append((promise, figure))

    return told


ROWS = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(ROWS, [])
    if rows and config.getoption("--full"):
        terminalreporter.write_line("\n| promise | measured |\n|---|---|")
        for promise, figure in rows:
            terminalreporter.write_line(f"| {promise} | {figure} |")
