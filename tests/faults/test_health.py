"""NaN and values that run away: told in time, and no good checkpoint is lost to them."""

import os
import re

import pytest
import torch
from test_interruptions import a_stage
from trials import child, command, finish, run_script

import dawm_td3bc
from common import UserError
from common.run import Run
from dawm_td3bc import Args


@pytest.fixture
def run(tmp_path):
    run = Run(Args(env_id="test", device="cpu", run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages"))
    run.open()
    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_checkpoint_with_nan_is_not_written(tmp_path, value):
    """NaN comes at item 4: the checkpoints of items before it stay, and are what is found."""
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="a value of stage count became NaN or infinite by update 4"):
        with a_stage(tmp_path, (layer,)) as stage:
            stage.run.not_finite = lambda *words: Run.not_finite(stage.run, *words)
            for item in stage:
                with torch.no_grad():
                    layer.weight.fill_(value if item == 4 else item)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["000000000002.pt", "000000000003.pt"]
    other = torch.nn.Linear(2, 2)
    with a_stage(tmp_path, (other,), total=0):
        assert (other.weight == 3).all()


def test_the_message_names_stage_step_checkpoint_and_causes(run, tmp_path):
    run.last_checkpoint = tmp_path / "000000000100.pt"
    with pytest.raises(UserError) as error:
        run.log(500, {"world_model/loss": float("nan")})
    text = str(error.value)
    assert re.match(
        r"world_model/loss became nan by update 500; the last good checkpoint is .*000000000100\.pt; ", text
    )
    assert "learning rate" in text and "guidance" in text and "\n" not in text


def test_values_beyond_their_bound_are_told_once(run, capsys):
    run.bounds["agent/qf_target"] = 300.0
    for step, value in ((1, 299.0), (2, 301.0), (3, -1000.0), (4, 5000.0)):
        run.log(step, {"agent/qf_target": value})
    out = capsys.readouterr().out
    assert (
        out.count("warning") == 1
        and "agent/qf_target is 301 at update 2; rewards like the data's add up to 300 at most" in out
    )


def test_a_run_that_diverges_stops_at_the_next_log_step(tmp_path):
    """From update 50 on the actor's weights are NaN: exit code 2, one line; the same command goes on before that."""
    script, arguments = command("dawm_td3bc", tmp_path / "run")
    update, count = dawm_td3bc.TD3BC.update, []

    def diverging(agent, *batch):
        losses = update(agent, *batch)
        count.append(1)
        if len(count) >= 50:
            with torch.no_grad():
                agent.actor_parameters[0].fill_(torch.nan)
        return losses

    def diverge():
        dawm_td3bc.TD3BC.update = diverging
        run_script(script, arguments)

    code = os.waitstatus_to_exitcode(os.waitpid(child(diverge, tmp_path / "log"), 0)[1])
    log = (tmp_path / "log").read_text()
    assert code == 2 and "Traceback" not in log, log[-1500:]
    assert re.search(r"error: .*stage agent|error: agent/\w+ became nan by update 60", log) and "likely causes" in log
    checkpoints = sorted((tmp_path / "run" / "runs").rglob("*.pt"))
    assert checkpoints and all(int(path.stem) < 50 for path in checkpoints)
    assert finish(script, arguments, tmp_path / "again") == 0
    assert re.search(r"agent +goes on at [1-4]?\d of 120", (tmp_path / "again").read_text())
