"""NaN and values that run away: told in time, and no good checkpoint is lost to them."""

import re

import dawm_td3bc
from common import UserError

import pytest
import torch
from toy import new_run, run_script
from trials import checkpoints, command, counting, finish


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_checkpoint_with_nan_is_not_written(tmp_path, value):
    """NaN comes at step 4: the checkpoints of steps before it stay, and are what is found."""
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="a value of stage counting became NaN or infinite by update 4"):
        with counting(tmp_path, layer) as stage:
            for step in stage:
                with torch.no_grad():
                    layer.weight.fill_(value if step == 4 else step)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000000002.pt", "000000000003.pt"]
    other = torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), counting(tmp_path, other):
        assert (other.weight == 3).all()
        raise KeyboardInterrupt


def test_a_result_with_nan_is_not_kept(tmp_path):
    layer = torch.nn.Linear(2, 2)
    with (
        pytest.raises(UserError, match="a value of stage counting became NaN"),
        counting(tmp_path, layer, total=1) as s,
    ):
        for _ in s:
            layer.weight.data.fill_(torch.nan)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_values_beyond_their_bound_are_told_once(tmp_path, capsys):
    run = new_run(tmp_path)
    run.bounds["agent/qf_target"] = 300.0
    for step, value in ((1, 299.0), (2, 301.0), (3, -1000.0), (4, 5000.0)):
        run.log(step, {"agent/qf_target": value})
    out = capsys.readouterr().out
    assert "agent/qf_target is 301 at update 2; rewards like the data's add up to 300 at most" in out
    assert out.count("warning") == 1


def diverge(module: str, arguments: list[str]) -> None:
    """The script's command line, in this process; from update 25 on the actor's weights are NaN."""
    update, count = dawm_td3bc.TD3BC.update, []

    def diverging(agent, *batch, **how):
        losses = update(agent, *batch, **how)
        count.append(1)
        if len(count) >= 25:
            agent.actor_parameters[0].data.fill_(torch.nan)
        return losses

    dawm_td3bc.TD3BC.update = diverging
    run_script(module, arguments)


def test_a_run_that_diverges_stops_at_the_next_log_step(tmp_path):
    """Exit code 2 and one line that names the last good checkpoint; the same command goes on from there."""
    line = command(tmp_path, "--synthetic-fraction", "0", "--checkpoint-every", "2e-4")
    code, log = finish(diverge, *line, log=tmp_path / "log"), (tmp_path / "log").read_text()
    assert code == 2 and "Traceback" not in log and "likely causes" in log, log[-1500:]
    assert re.search(r"error: .*stage agent|error: agent/\w+ became nan by update 30", log)
    kept = list((tmp_path / "runs").rglob("*.pt"))
    assert kept and all(int(path.stem) < 25 for path in kept)
    assert f"; the last good checkpoint is {max(kept)}; " in log
    assert finish(run_script, *line, log=tmp_path / "again") == 0
    assert re.search(r"agent +goes on at [12]?\d of 40", (tmp_path / "again").read_text())
