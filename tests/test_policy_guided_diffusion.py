"""baselines/policy_guided_diffusion.py: windows, guidance and rows by hand.

EDM is tested where it is at home, in test_synther.py.
"""

import math

from baselines import policy_guided_diffusion as script
from baselines.policy_guided_diffusion import Args

import numpy as np
import pytest
import torch
from torch import nn
from toy import Function, Training, linear_dataset, metrics

SMALL = dict(env_id="linear", device="cpu", window_length=4, window_stride=1, unet_width=16, unet_levels=2)


def make_model(**changes):
    """In float64, so that what must be equal is equal to its rounding on any machine."""
    args = Args(**SMALL | changes)
    windows = script.Windows(args, linear_dataset(), torch.device("cpu"))
    return args, windows, script.WorldModel(args, windows.tokens.double(), 2).double()


@pytest.mark.parametrize("terminated", [True, False])
def test_windows_against_a_plain_loop(terminated):
    """Every third start that fits, each episode's first, and of a fallen one the last, which shows where it lies."""
    dataset = linear_dataset(episodes=3, length=10, terminated=terminated)
    args = Args(**SMALL | dict(window_stride=3, world_model_holdout=0.5))
    windows = script.Windows(args, dataset, torch.device("cpu"))
    fits = [episode * 11 + step for episode in range(3) for step in range(11) if step + 4 <= (11 if terminated else 9)]
    starts = {*fits[::3], 0, 11, 22} | ({7, 18, 29} if terminated else set())
    train, held_out = (set(index.tolist()) for index in (windows.train, windows.held_out))
    assert train | held_out == starts and not {row // 11 for row in train} & {row // 11 for row in held_out}
    assert torch.equal(windows.rows(torch.tensor([7, 12])), torch.tensor([[7, 8, 9, 10], [12, 13, 14, 15]]))
    for row, token in enumerate(windows.tokens.numpy()):
        pair = row // 11 * 10 + row % 11
        real = row % 11 < 10
        assert np.array_equal(token[:2], dataset.obs[pair] if real else dataset.next_obs[pair - 1])
        action = np.arctanh(dataset.action[pair]) if real else np.zeros(2)
        np.testing.assert_allclose(token[2:4], action, rtol=1e-6)
        assert token[4] == (dataset.reward[pair] if real else 0) and token[5] == (terminated and row % 11 >= 9)


def test_parameter_count_of_the_published_network():
    """178 million, with the width and levels of PGD's code, for Hopper; a count is a square polynomial of the width."""
    widths = 16, 32, 48
    counts = [sum(p.numel() for p in script.PoolingUNet(16, width, 3).parameters()) for width in widths]
    count = round(np.polyval(np.polyfit(widths, counts, 2), 1024))
    assert count == 177_619_984 and f"{count:,}" in script.PoolingUNet.__doc__


def test_a_window_of_any_length_keeps_it():
    network = script.PoolingUNet(6, 16, 3)
    for length in (4, 7, 8, 13):
        assert network(torch.randn(2, length, 6), torch.zeros(2)).shape == (2, length, 6)


def test_learning_rate_by_hand():
    args = Args(world_model_steps=100, world_model_lr=2.0)
    rates = [script.learning_rate(args, step) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.2, 1.1, 2.0, 1.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("denoised", [False, True])
def test_the_slope_is_the_gradient_of_the_log_density(normalized, denoised):
    args, _, model = make_model(guidance_normalized=normalized, guidance_denoised=denoised)
    policy, x = Function(lambda obs: torch.sin(3 * obs)), torch.randn(5, 4, 6).double()
    seen = script.denoise(model.network, x, torch.full((5,), 0.7)) if denoised else x
    action = seen[..., 2:4].detach().requires_grad_()
    mean, std = model.units.mean, model.units.std
    wanted = policy(mean[:2] + std[:2] * seen[..., :2]).detach()
    density = torch.distributions.Normal(wanted, 1.0).log_prob(torch.tanh(mean[2:4] + std[2:4] * action))
    (slope,) = torch.autograd.grad(density.sum(), action)
    if normalized:
        slope = slope / slope.square().sum((1, 2), keepdim=True).sqrt()
    torch.testing.assert_close(script.policy_slope(args, model, policy, x, 0.7), slope, rtol=0, atol=1e-12)


def test_guidance_has_its_schedule_and_none_at_the_last_step(monkeypatch):
    args, _, model = make_model(sampling_steps=4, policy_guidance=2.0, sigma_max=1.0)
    model.float()
    monkeypatch.setattr(script, "sample_edm", lambda network, x, sigmas, churn: x)
    monkeypatch.setattr(script, "policy_slope", lambda args, model, policy, x, sigma: torch.ones_like(x[..., :2]))
    made = []
    for policy in (None, nn.Identity()):
        torch.manual_seed(0)
        made.append(script.sample_windows(args, model, policy, 3))
    moved = ((made[1] - made[0]) / model.units.std)[0, 0]
    total = 2 * sum(1 - i / 4 + 0.3 * math.sin(math.pi * (i + 1) / 4) for i in range(3))
    torch.testing.assert_close(moved, torch.tensor([0, 0, total, total, 0, 0]), rtol=0, atol=1e-4)


def test_without_a_policy_it_is_edms_sampler():
    args, _, model = make_model(sampling_steps=5)
    model.float()
    torch.manual_seed(0)
    made = script.sample_windows(args, model, None, 3)
    torch.manual_seed(0)
    noise = 80 * torch.randn(3, 4, 6)
    whole = script.sample_edm(model.network, noise, script.karras_sigmas(5, 0.002, 80.0), churn=80.0)
    torch.testing.assert_close(made, model.units.denormalize(whole), rtol=1e-4, atol=1e-4)


def test_rows_by_hand():
    """Four steps give three transitions; the second ends the episode, the third counts no more."""
    _, _, model = make_model()
    window = torch.arange(24).view(1, 4, 6) / 10
    window[..., 5] = torch.tensor([0.4, 0.6, 0.1, 1.0])
    rows, valid = script.complete_windows(model, window)
    for step in range(3):
        obs, action, reward = window[0, step, :2], window[0, step, 2:4], window[0, step, 4:5]
        ends = torch.tensor([float(step == 1)])
        expected = torch.cat([obs, action.tanh(), reward, window[0, step + 1, :2], ends])
        assert torch.equal(rows[0, step], expected)
    assert valid.tolist() == [[True, True, False]]


def test_it_learns_windows_that_the_system_obeys_and_the_policy_pulls_their_actions():
    """Linear system: reward is the first state, the next state follows; the policy always wants 0.5."""
    args = Args(**SMALL | dict(unet_width=64, world_model_steps=400, world_model_batch_size=64, world_model_lr=5e-3))
    args.ema_decay, args.sampling_steps, args.policy_guidance = 0.8, 8, 1.0
    windows = script.Windows(args, linear_dataset(), torch.device("cpu"))
    model = script.train_world_model(args, windows, 2, Training())
    distances = []
    for policy in (None, Function(lambda obs: torch.full_like(obs, 0.5))):
        torch.manual_seed(0)
        rows, valid = script.complete_rollouts(args, model, policy, 400)
        obs, action, reward, next_obs, _ = rows[valid].split([2, 2, 1, 2, 1], dim=1)
        error = (next_obs - 0.9 * obs - 0.3 * action).square().mean().sqrt()
        assert error < 0.2  # 0.23 if actions had nothing to do with states
        assert (reward[:, 0] - obs[:, 0]).square().mean().sqrt() < 0.25  # 0.65 likewise
        distances.append((action - 0.5).abs().mean())
    assert distances[1] < 0.85 * distances[0]


def test_every_15_updates_it_learns_from_a_new_set(made):
    lines = metrics(made("baselines.policy_guided_diffusion")[0])
    sets = [(line["step"], line["synthesis/mean_reward"]) for line in lines if "synthesis/mean_reward" in line]
    assert [step for step, _ in sets] == [1, 16, 31, 40] and len({reward for _, reward in sets}) == 4
