"""docs/walkthrough.py runs cell by cell; docs/walkthrough.ipynb is made from it, executed, and names no machine."""

import re

import jupytext
import nbformat
from nbclient import NotebookClient
from toy import ROOT, folders_below

SCRIPT, NOTEBOOK = ROOT / "docs" / "walkthrough.py", ROOT / "docs" / "walkthrough.ipynb"
SMALL = dict(
    world_model_steps=30, unet_width=8, outcome_width=16, idm_steps=20, idm_width=16, agent_updates=40, eval_every=40
)
SMALL |= dict(eval_episodes=2, log_every=10, env_id="hopper-medium-v2")
SHRINK = """
import sys
from pathlib import PosixPath

sys.path.append("..")
import dawm_td3bc

Whole = dawm_td3bc.Args
dawm_td3bc.Args = lambda **given: Whole(**given | {small})  # wins over what the walkthrough asks for
"""


def test_every_cell_runs_at_small_size(toy, tmp_path, monkeypatch):
    for folder in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):  # else at home
        monkeypatch.setenv(folder, str(tmp_path))
    run_dir, stage_dir = folders_below(toy)[1::2]
    small = SMALL | dict(data_path=toy / "data.hdf5", run_dir=run_dir, stage_dir=stage_dir)
    notebook = jupytext.read(SCRIPT)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHRINK.format(small=small)))
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT / "docs"}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8


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
