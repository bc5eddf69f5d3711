"""The fast forms give the usual forms' numbers, and the benchmark that compares them runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from toy import TINY, hopper_file, linear_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import plain
import speed

import dawm_iql
import dawm_td3bc
from common.evaluation import Evaluator, make_env
from common.run import Run
from dawm_td3bc import Args, InverseDynamics, TemporalConv, TemporalNorm, TemporalUNet, Windows, WorldModel, mish

ROOT = Path(__file__).resolve().parents[1]


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and its gradients for a fixed direction."""
    direction = torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, direction)]


def close(ours: list, theirs: list, tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_product_for_each_tap_is_the_convolution(length, batch, contiguous):
    conv = TemporalConv(6, 16).double()
    x = torch.randn(length, batch, 6, dtype=torch.float64, requires_grad=True)
    seen = x if contiguous else x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    expected = F.conv1d(x.permute(1, 2, 0), conv.weight.permute(2, 1, 0), conv.bias, padding=2).permute(2, 0, 1)
    inputs = [x, conv.weight, conv.bias]
    before = [value.clone() for value in inputs]
    close(gradients(conv(seen), inputs), gradients(expected, inputs))
    assert all(map(torch.equal, inputs, before))  # nothing is written into what came in


def test_a_convolution_starts_as_nn_conv1d_does():
    torch.manual_seed(3)
    conv = TemporalConv(6, 16)
    torch.manual_seed(3)
    like = torch.nn.Conv1d(6, 16, 5)
    assert torch.equal(conv.weight, like.weight.permute(2, 1, 0)) and torch.equal(conv.bias, like.bias)


@pytest.mark.parametrize("channels", [8, 32, 64, 128])
def test_the_norm_is_group_norm(channels):
    norm = TemporalNorm(8, channels).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(5, 3, channels, dtype=torch.float64, requires_grad=True)
    expected = F.group_norm(x.permute(1, 2, 0), 8, norm.weight, norm.bias).permute(2, 0, 1)
    inputs = [x, norm.weight, norm.bias]
    close(gradients(norm(x), inputs), gradients(expected, inputs))


def test_mish_is_mish():
    x = torch.linspace(-60, 60, 4001, dtype=torch.float64, requires_grad=True)
    close(gradients(mish(x), [x]), gradients(F.mish(x), [x]))
    x = torch.linspace(-60, 60, 4001, requires_grad=True)
    close(gradients(mish(x), [x]), gradients(F.mish(x), [x]), 1e-6)
    with pytest.raises(RuntimeError, match="does not require grad"):  # rather than a wrong second derivative
        slope = torch.autograd.grad(mish(x).sum(), x, create_graph=True)[0]
        torch.autograd.grad(slope.sum(), x)
    assert torch.autograd.gradcheck(mish, torch.linspace(-5, 5, 7, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 4, 8)])
def test_the_unet_is_the_usual_one(multipliers, length):
    """Output and every gradient, with the usual form's parameters taken over."""
    fast = TemporalUNet(5, 2, 16, multipliers).double()
    usual = plain.unet_like(fast, 5, 2, 16, multipliers)
    x = torch.randn(4, length, 5, dtype=torch.float64)
    inputs = torch.tensor([1.0, 2.0, 3.0, 5.0]).double(), torch.randn(4, 2).double(), torch.rand(4, 1).double()
    keep = torch.tensor([[1.0], [0.0], [1.0], [1.0]]).double()
    close([fast(x, *inputs, keep)], [usual(x, *inputs, keep)])
    for net in (fast, usual):
        net(x, *inputs, keep).square().sum().backward()
    for a, b in zip(fast.parameters(), usual.parameters(), strict=True):
        grad = a.grad.permute(2, 1, 0) if a.dim() == 3 and len(a) == 5 else a.grad
        close([grad.reshape(b.shape)], [b.grad])


def test_any_length_comes_back():
    for length in range(1, 12):
        denoiser = TemporalUNet(5, 2, 8, (1, 2, 2))
        k, keep = torch.ones(3), torch.ones(3, 1)
        assert denoiser(torch.randn(3, length, 5), k, torch.randn(3, 2), keep, keep).shape == (3, length, 5)


def rows(count: int = 64) -> torch.Tensor:
    made = torch.randn(count, 2 * 5 + 2 + 2, dtype=torch.float64)
    made[:, -1] = torch.rand(count) < 0.2
    made[:, 5:7] = made[:, 5:7].tanh()
    return made


def columns(batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return batch.split([5, 2, 1, 5, 1], dim=1)


def test_td3bc_is_the_usual_one():
    """Eight updates on the same batches with the same noise: all parameters and targets agree."""
    data = rows()
    agent = dawm_td3bc.TD3BC(dawm_td3bc.Args(), data[:, :5].float(), 2)
    nets = [net.double() for net in (agent.actor, agent.qf1, agent.qf2)]
    for target in (agent.actor_target, agent.qf1_target, agent.qf2_target):
        target.double()
    usual = plain.TD3BC(*nets)
    for update in range(8):
        torch.manual_seed(update)
        agent.update(data, update % 2 == 1)
        torch.manual_seed(update)
        usual.update(*columns(data), update % 2 == 1)
    for name in ("actor", "qf1", "qf2", "actor_target", "qf1_target", "qf2_target"):
        close(list(getattr(agent, name).parameters()), list(getattr(usual, name).parameters()))


def test_iql_is_the_usual_one():
    data = rows()
    agent = dawm_iql.IQL(dawm_iql.Args(agent_updates=1_000_000), data[:, :5].float(), 2, 3.0)
    for net in (agent.actor, agent.qf1, agent.qf2, agent.vf, agent.qf1_target, agent.qf2_target):
        net.double()
    usual = plain.IQL(agent.actor, agent.qf1, agent.qf2, agent.vf, factor=3.0)
    for _ in range(8):
        agent.update(data, True)
        usual.update(*columns(data))
    for name in ("actor", "qf1", "qf2", "vf", "qf1_target", "qf2_target"):
        close(list(getattr(agent, name).parameters()), list(getattr(usual, name).parameters()))


def test_the_inverse_dynamics_density_is_that_of_torch_distributions():
    model = InverseDynamics(Args(idm_width=16), torch.randn(50, 5), 2).double().eval()
    triples, action = torch.randn(20, 15).double(), torch.rand(20, 2).double() * 2 - 1
    normalised = ((triples - model.obs_mean) / model.obs_std).numpy()
    trainer = plain.InverseDynamicsTrainer(model.mean, model.log_std, normalised, action.numpy())
    close([model.log_prob(triples, action)], [trainer.log_prob(torch.from_numpy(normalised), action)])


def test_episodes_side_by_side_are_episodes_one_by_one():
    torch.manual_seed(0)
    actor = dawm_td3bc.Actor(torch.zeros(11), torch.ones(11), 3)

    @torch.no_grad()
    def policy(obs):
        return actor(torch.as_tensor(obs)).numpy()

    together = Evaluator("Hopper-v4", "d4rl", 4)(policy, seed=7)
    alone, _ = plain.evaluate(make_env("Hopper-v4", "d4rl"), actor, 4, 7)
    assert together == pytest.approx(
        alone, rel=1e-3
    )  # a batch of 4 rounds otherwise than one row, and falls amplify it


def test_compile_changes_nothing_but_rounding():
    """Loss and gradients of the compiled U-Net, and rollouts under inference_mode; its weights keep their names."""
    small = {**TINY, "unet_width": 8, "unet_multipliers": (1,), "model_horizon": 1, "horizon": 1}  # compiles faster
    windows = Windows(Args(**small), linear_dataset(), torch.device("cpu"))
    losses, found, rollouts = [], [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        world_model = WorldModel(Args(**small, compile=compiled), windows)
        torch.manual_seed(1)
        x0 = world_model.normalize(windows.obs[:3], windows.reward[:3]).repeat(4, 1, 1)
        loss = world_model.loss(x0, windows.action[:4], windows.return_to_go[:4, None], torch.ones(4, 1))
        loss.backward()
        losses.append(loss.detach())
        found.append({name: p.grad for name, p in world_model.named_parameters() if p.grad is not None})
        torch.manual_seed(2)
        with torch.inference_mode():
            pairs = windows.obs[:6], windows.action[:6], windows.return_to_go[:6, None]
            rollouts.append(dawm_td3bc.sample_rollouts(world_model.args, world_model, *pairs))
    assert (losses[0] - losses[1]).abs() < 1e-5 and found[0].keys() == found[1].keys()
    close(list(found[0].values()), list(found[1].values()), 1e-4)
    close(*rollouts, 1e-4)


def linear_score(folder: Path, seed: int, compiled: bool) -> float:
    """DAWM-TD3BC on the linear system: the mean return of its actor over 30 steps from 64 states."""
    args = Args(
        **{**TINY, "unet_width": 8, "unet_multipliers": (1,)}, horizon=1, model_horizon=1, compile=compiled,
        run_dir=folder / "runs", stage_dir=folder / "stages", seed=seed, world_model_seed=seed, idm_seed=seed,
        prediction="x0", world_model_steps=400, world_model_lr=5e-3, ema_decay=0.9, ema_start=0, idm_steps=400,
        idm_width=32, idm_lr=3e-3, target_return="own", log_every=100, agent_updates=120, agent_lr=1e-3, tau=0.05,
        bc_alpha=10.0, gamma=0.9,
    )  # fmt: skip
    run, dataset = Run(args), linear_dataset()
    run.open()
    run.fingerprints["data"] = "test"
    windows = Windows(args, dataset, run.device)
    world_model = dawm_td3bc.train_world_model(args, windows, run)
    inverse_dynamics = dawm_td3bc.train_inverse_dynamics(args, windows, run)
    synthesizer = dawm_td3bc.Synthesizer(args, "linear", windows, world_model, inverse_dynamics)
    rows = dawm_td3bc.synthesize(args, synthesizer, run)
    run.seed("agent", seed)
    agent = dawm_td3bc.TD3BC(args, windows.obs, 2)
    for update in range(args.agent_updates):
        agent.update(rows[torch.randint(len(rows), (256,))], update % 2 == 1)
    obs, total = torch.rand(64, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1, 0.0
    for _ in range(30):
        total += obs[:, 0].mean().item()
        with torch.no_grad():
            obs = 0.9 * obs + 0.3 * agent.actor(obs)
    return total


def test_compile_does_not_change_the_score_beyond_what_seeds_do(tmp_path):
    scores = [linear_score(tmp_path / str(seed), seed, False) for seed in range(3)]
    compiled = linear_score(tmp_path / "compiled", 0, True)
    noise = max(max(scores) - min(scores), 0.5)  # seeds differ by less than a hundredth of what they reach, 61.9
    assert min(scores) > 60, scores  # random actions return 0, actions of 1 throughout 61.2 and the mean first state
    assert abs(compiled - scores[0]) < noise, (compiled, scores)


def test_the_benchmark_runs(tmp_path):
    """One loop, two short rounds: a table, a file of figures, a picture; what is not there is left out with a word."""
    data = hopper_file(tmp_path / "data.hdf5")
    command = [sys.executable, "benchmarks/speed.py", "--loops", "C", "--rounds", "2", "--seconds", "0.2"]
    command += ["--data-path", data, "--out", tmp_path / "speed", "--peers-python", tmp_path / "none"]
    environment = {**os.environ, "PEERS_DIR": str(tmp_path), "DAWM_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "speed.json").read_text())
    contenders, floor = found["loops"]["C"]["contenders"], found["loops"]["C"]["floor seconds"]
    assert set(contenders) == {"ours", "plain"} and all(len(row["rounds"]) == 2 for row in contenders.values())
    assert all(1 / row["rate"] > floor for row in contenders.values())  # none beats the machine's own rates
    assert "C: d3rlpy left out" in result.stderr and "clone CORL into PEERS_DIR" in result.stderr
    assert (tmp_path / "speed.png").stat().st_size > 5000 and "TD3+BC: updates/s" in result.stdout


def test_the_floor_counts_the_network():
    for width in (32, 128):
        count = sum(p.numel() for p in TemporalUNet(12, 3, width, (1, 4, 8)).parameters())
        assert speed.unet_work(width, 64)[1] == count
