"""docs/walkthrough.py runs; docs/walkthrough.ipynb is made from it, executed, and names no machine."""

import os
import re

import dawm_td3bc

import jupytext
import matplotlib.pyplot as plt
import nbformat
from toy import ROOT, child, folders_below

SCRIPT, NOTEBOOK = ROOT / "docs" / "walkthrough.py", ROOT / "docs" / "walkthrough.ipynb"
SMALL = dict(
    world_model_steps=30, unet_width=8, outcome_width=16, idm_steps=20, idm_width=16, agent_updates=40, eval_every=40
)
SMALL |= dict(eval_episodes=2, log_every=10, env_id="hopper-medium-v2")


def walk(small: dict) -> None:
    """The script, with what is in `small` in the place of what it asks for."""
    whole = dawm_td3bc.Args
    dawm_td3bc.Args = lambda **given: whole(**given | small)
    plt.switch_backend("agg")
    plt.show = lambda: print("a picture")
    os.chdir(SCRIPT.parent)
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), {"__name__": "__main__"})


def test_every_cell_runs_at_small_size(toy, tmp_path):
    run_dir, stage_dir = folders_below(toy)[1::2]
    small = SMALL | dict(data_path=toy / "data.hdf5", run_dir=run_dir, stage_dir=stage_dir)
    process = child(walk, small, log=tmp_path / "log")
    process.join()
    told = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and told.count("a picture") == 8, told[-2000:]


def test_the_stored_notebook_is_the_script_executed():
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    assert NOTEBOOK.stat().st_size < 1e6
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(?<![\w.])[/~]\w+/\w", text), text  # a path of the machine that made it
