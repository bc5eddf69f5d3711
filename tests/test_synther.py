"""baselines/synther.py: EDM by hand and on distributions whose denoiser is known, transitions of the linear system.

What it has from dawm_td3bc.py to the letter is tested there.
"""

import math

from baselines import synther as script
from baselines.synther import Args, WorldModel

import pytest
import torch
from toy import Training, linear_dataset, metrics

SIZES = [2, 2, 1, 2, 1]

# ---- Section 3: EDM


def around(x, noise_level, mean):
    """EDM's network F for data N(mean, 1), by hand: D = (x + sigma^2 mean) / (sigma^2 + 1) = c_skip x + c_out F."""
    sigma = (4 * noise_level).exp().view(-1, *[1] * (x.dim() - 1))
    return sigma / (sigma.square() + 1).sqrt() * mean


def test_the_network_sees_scaled_input_and_says_the_clean_one():
    """At sigma 3: c_in = 1 / sqrt(10), c_noise = ln(3) / 4, c_skip = 1 / 10, c_out = 3 / sqrt(10)."""
    x, sigma = torch.randn(4, 5, 2, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64)

    def network(scaled, noise_level, condition):
        assert torch.allclose(scaled, x / math.sqrt(10)) and noise_level.tolist() == [math.log(3) / 4] * 4
        return condition

    denoised = script.denoise(network, x, sigma, torch.full_like(x, 7))
    assert torch.allclose(denoised, x / 10 + 7 * 3 / math.sqrt(10))


@pytest.mark.parametrize("shape", [(64, 3), (64, 5, 2)])
def test_the_loss_is_the_mean_squared_error_of_what_the_network_says(shape):
    """[EDM App. B.6]: the target of F is (x0 - c_skip x) / c_out."""
    x0, sigma, seen = torch.randn(shape, dtype=torch.float64), torch.rand(64, dtype=torch.float64) * 10 + 0.01, {}

    def network(scaled, _):
        seen["x"] = scaled * (sigma.view(-1, *[1] * (len(shape) - 1)).square() + 1).sqrt()
        return 0.3 * scaled

    loss = script.edm_loss(network, x0, sigma)
    wide = sigma.view(-1, *[1] * (len(shape) - 1))
    root = (wide.square() + 1).sqrt()
    target = (x0 - seen["x"] / root.square()) / (wide / root)
    assert torch.allclose(loss, (0.3 * seen["x"] / root - target).square().mean())
    noise = (seen["x"] - x0) / wide
    assert 0.7 < noise.std() < 1.3


def test_noise_levels_of_training_and_sampling():
    log_sigma = script.draw_sigma(Args(), 100_000, torch.device("cpu")).log()
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03) and float(log_sigma.std()) == pytest.approx(
        1.2, 0.02
    )
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert script.karras_sigmas(3, 0.002, 80) == pytest.approx([80, middle, 0.002, 0])
    assert script.karras_sigmas(1, 0.002, 80) == pytest.approx([80, 0])


@pytest.mark.parametrize("heun, order", [(True, 2), (False, 1)])
def test_without_churn_sampling_follows_the_flow(heun, order):
    """For data N(mean, 1) noise x ends, in the limit of small steps, at mean + (x - mean) / sqrt(sigma_max^2 + 1); with
    twice the steps Euler's are twice as near, Heun's four times."""
    calls, errors = [], []

    def network(*inputs):
        calls.append(1)
        return around(*inputs)

    x, mean = 80 * torch.randn(500, 2, 3, dtype=torch.float64), torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    for steps in (60, 120):
        ends = script.sample_edm(network, x, script.karras_sigmas(steps, 0.002, 80), mean, heun=heun)
        errors.append((ends - mean - (x - mean) / math.sqrt(80**2 + 1)).abs().mean())
    assert errors[0] < 0.1 and float(errors[0] / errors[1]) == pytest.approx(2**order, rel=0.15)
    assert len(calls) == (119 + 239 if heun else 180)


def test_churn_adds_noise_and_leaves_the_distribution():
    """Another seed gives other samples from one starting noise, with the data's mean and standard deviation."""
    start, sigmas = 80 * torch.randn(1, 2, dtype=torch.float64).expand(20_000, 2), script.karras_sigmas(40, 0.002, 80)
    mean = torch.tensor([0.5, -2.0], dtype=torch.float64)
    ends = script.sample_edm(around, start, sigmas, mean, churn=80)
    assert torch.allclose(ends.mean(0), mean, atol=0.05) and torch.allclose(ends.std(0), ends.new_ones(2), atol=0.05)
    assert script.sample_edm(around, start, sigmas, mean).std(0).max() < 1e-9


# ---- Sections 3 and 5: transitions


def test_samples_obey_the_linear_system():
    """s' = 0.9 s + 0.3 a and reward s_0: all columns are drawn together from noise, and fit each other."""
    args = Args(
        world_model_steps=450, world_model_batch_size=64, world_model_lr=3e-3, mlp_width=64, mlp_depth=3,
        ema_start=300, sampling_steps=16,
    )  # fmt: skip
    dataset, run = linear_dataset(episodes=200), Training()
    world_model = script.train_world_model(args, dataset, run)
    obs, action, reward, next_obs, terminated = script.sample_transitions(args, world_model, 2000).split(SIZES, dim=1)
    assert (next_obs - 0.9 * obs - 0.3 * action).std() < 0.1  # columns drawn apart from each other: 0.5
    assert (reward - obs[:, :1]).std() < 0.1 and not terminated.any()
    assert action.std() == pytest.approx(0.95 / math.sqrt(3), rel=0.1) and action.mean().abs() < 0.1
    assert obs.std() == pytest.approx(dataset.obs.std(), rel=0.15)


def test_samples_in_the_datas_units_with_whole_ends_and_actions_within_bounds(monkeypatch):
    """Three columns are checked against what the sampler gave: an action beyond 1, an end at 0.4 and one at 0.6."""
    rows = script.real_transitions(linear_dataset(terminated=True), torch.device("cpu"))
    world_model = WorldModel(Args(mlp_width=8), rows, SIZES)
    drawn = torch.zeros(2, 8)
    drawn[:, 0], drawn[:, 2], drawn[:, 7] = 5, torch.tensor([9.0, -9.0]), torch.tensor([0.4, 0.6])
    monkeypatch.setattr(script, "sample_edm", lambda *_, **__: drawn)
    made = script.sample_transitions(Args(), world_model, 2)
    assert made[:, 2].tolist() == [1, -1] and made[:, 7].tolist() == [0, 1]
    assert torch.allclose(made[:, 0], rows[:, 0].mean() + 5 * rows[:, 0].std(), rtol=1e-3)  # beyond all data, as drawn


# ---- The whole method


def test_a_run_makes_as_many_transitions_as_asked_for(made):
    logged = [line for line in metrics(made("baselines.synther")[0]) if "synthesis/transitions" in line]
    assert [line["synthesis/transitions"] for line in logged] == [200]
