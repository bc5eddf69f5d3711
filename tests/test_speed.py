"""The scripts' agents and inverse dynamics give the usual forms' numbers, and the benchmark that compares them runs."""

import io
import json
import subprocess
import sys

import dawm_iql
import dawm_td3bc
from common.run import Run

import plain
import pytest
import speed
import torch
from test_fast import close
from toy import ROOT, TINY


def rows() -> torch.Tensor:
    made = torch.randn(64, 2 * 5 + 2 + 2, dtype=torch.float64)
    made[:, -1] = torch.rand(64) < 0.2
    made[:, 5:7] = made[:, 5:7].tanh()
    return made


def test_td3bc_is_the_usual_one():
    """Eight updates on the same batches with the same noise: all parameters and targets agree.

    The actors' actions lie near 1, so that with the noise they meet their clip.
    """
    data = rows()
    agent = dawm_td3bc.TD3BC(dawm_td3bc.Args(), data[:, :5].float(), 2).double()
    for net in (agent.actor, agent.actor_target):
        net.net[-1].bias.data += 1.5
    usual = plain.TD3BC(agent.actor, agent.qf1, agent.qf2)
    for update in range(8):
        torch.manual_seed(update)
        agent.update(data, update % 2 == 1)
        torch.manual_seed(update)
        usual.update(*data.split([5, 2, 1, 5, 1], dim=1), update % 2 == 1)
    for name in ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"):
        close(getattr(agent, name).parameters(), getattr(usual, name).parameters(), 1e6)


def test_iql_is_the_usual_one():
    data = rows()
    agent = dawm_iql.IQL(dawm_iql.Args(agent_updates=1_000_000), data[:, :5].float(), 2, 3.0).double()
    usual = plain.IQL(agent.actor, agent.qf1, agent.qf2, agent.vf, factor=3.0)
    for _ in range(8):
        agent.update(data, True)
        usual.update(*data.split([5, 2, 1, 5, 1], dim=1))
    for name in ("actor", "qf1", "qf2", "vf", "qf1_target", "qf2_target"):
        close(getattr(agent, name).parameters(), getattr(usual, name).parameters(), 1e6)


def test_inverse_dynamics_is_the_usual_one():
    states = torch.randn(50, 2), torch.randn(50, 2)
    model = dawm_td3bc.InverseDynamics(dawm_td3bc.Args(**TINY), *states, 2).double().eval()
    triples, action = torch.randn(8, 6).double(), torch.rand(8, 2).double() * 2 - 1
    normalised = model.normalize(triples).numpy()
    trainer = plain.InverseDynamicsTrainer(model.mean, model.log_std, normalised, action.numpy())
    close([model.log_prob(triples, action)], [trainer.log_prob(torch.from_numpy(normalised), action)], 1e6)


def td3bc_operations(batch=256) -> float:
    """Of a critic update with half of an actor's, by hand: forward, and twice that for backward but to the inputs."""
    actor, critic = (2 * batch * (i * 256 + 256 * 256 + 256 * o) for i, o in ((11, 3), (14, 1)))
    to_obs, to_both = 2 * batch * 11 * 256, 2 * batch * 14 * 256
    critic_update = actor + 2 * critic + 2 * critic + 2 * (2 * critic - to_both)
    return critic_update + (actor + critic + critic + 2 * actor - to_obs) / 2  # of qf1 backward to the action alone


def test_a_contender_of_the_benchmark_tells_its_operations_and_its_rate(toy, monkeypatch):
    """Loop C's two own ones, in this process, and for one short turn."""
    for name in ("ours", "plain"):
        told = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("0.05\n"))
            patch.setattr(sys, "__stdout__", told)
            patch.setattr(sys, "stdout", sys.stderr)  # as a contender sets it
            patch.setattr(Run, "stage", Run.stage)  # in whose place it puts a clock
            with pytest.raises(SystemExit):
                speed.main(speed.Args(worker=("C", name), data_path=toy / "data.hdf5"))
        operations, rate = map(float, told.getvalue().split())
        assert rate > 0 and (name == "plain" or operations == pytest.approx(td3bc_operations()))


@pytest.mark.full
def test_the_benchmark_runs(toy, tmp_path):
    """Two short rounds: a table, a file of figures, a picture; what is not there is left out with a word."""
    command = [sys.executable, "benchmarks/speed.py", "--rounds", "2", "--seconds", "0.2", "--loops", *"ABICDE"]
    command += ["--data-path", toy / "data.hdf5", "--out", tmp_path / "speed", "--peers-python", tmp_path / "none"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for found in json.loads((tmp_path / "speed.json").read_text())["loops"].values():
        contenders = found["contenders"]
        assert set(contenders) == {"ours", "plain"} and all(len(row["rounds"]) == 2 for row in contenders.values())
        assert found["floor seconds"] * found["machine"] > 0
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert "C: d3rlpy left out" in result.stderr
