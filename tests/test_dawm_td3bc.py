"""The mathematics of the home script, on a linear system whose dynamics and inverse are known exactly."""

import math

import numpy as np
import pytest
import torch
from toy import TINY, linear_dataset

import dawm_td3bc as script
from common import UserError

CPU = torch.device("cpu")


def windows_of(dataset, **changes):
    args = script.Args(**TINY | dict(model_horizon=7, horizon=3) | changes)
    return args, script.Windows(args, dataset, CPU)


def test_schedule_and_noise():
    alpha_bar = script.cosine_alpha_bar(5)
    assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and alpha_bar[-1] < 1e-3
    assert script.strided_steps(5, 3) == [1, 3, 5] and script.strided_steps(5, 1) == [5]
    args, windows = windows_of(linear_dataset())
    model, x0 = script.WorldModel(args, windows), torch.ones(20_000, 9, 3)
    x = model.q_sample(x0, torch.full((20_000,), 3), torch.randn_like(x0))
    assert x.mean() == pytest.approx(float(alpha_bar[3].sqrt()), abs=0.01)
    assert x.var() == pytest.approx(float(1 - alpha_bar[3]), abs=0.01)


def test_the_posterior_of_each_strided_step_keeps_the_noise_level():
    """From q(x_k | x0), weight_x0 x0 + weight_x_k x_k + std noise has the mean and variance of q(x_previous | x0)."""
    alpha_bar, steps = script.cosine_alpha_bar(5), [1, 3, 5]
    for previous, k, (w0, wk, std) in zip(
        [0, 1, 3], steps, script.posterior_coefficients(alpha_bar, steps), strict=True
    ):
        assert w0 + wk * math.sqrt(alpha_bar[k]) == pytest.approx(math.sqrt(alpha_bar[previous]), abs=1e-12)
        assert wk**2 * (1 - alpha_bar[k]) + std**2 == pytest.approx(float(1 - alpha_bar[previous]), abs=1e-12)


def test_windows_respect_ends_and_go_on_after_falls():
    for terminated in (False, True):
        dataset = linear_dataset(episodes=4, length=12, terminated=terminated)
        windows = windows_of(dataset)[1]
        rows = windows.rows(torch.arange(48))
        for pair in range(48):
            episode, step = divmod(pair, 12)
            assert rows[pair].tolist() == [13 * episode + min(step + i, 12) for i in range(9)]
            assert windows.usable[pair] == (step + 8 <= 12 or terminated)
        assert windows.is_over(torch.tensor([windows.end_reward])).item() == terminated
        assert not windows.is_over(torch.as_tensor(dataset.reward)).any()


@pytest.mark.parametrize("shift", [0, -5])
@pytest.mark.parametrize("kind", ["episode", "window"])
def test_return_to_go_equals_a_plain_loop(kind, shift):
    dataset = linear_dataset(episodes=3, length=12)
    dataset.reward = dataset.reward + np.float32(shift)
    args, windows = windows_of(dataset, return_to_go=kind)
    expected = np.zeros(36)
    for pair in range(36):
        episode, step = divmod(pair, 12)
        last = 12 if kind == "episode" else min(12, step + args.model_horizon + 1)
        expected[pair] = sum(0.99 ** (i - step) * dataset.reward[12 * episode + i] for i in range(step, last))
    offset = min(0.0, expected.min())
    assert windows.return_offset == pytest.approx(offset) and windows.return_to_go.max() == pytest.approx(0.6)
    found = windows.return_to_go.double().numpy() * windows.return_scale + windows.return_offset
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_return_units():
    args = script.Args(env_id="test")
    assert script.return_units(args, np.array([1.0, 6.0])) == (0.0, 10.0)
    assert script.return_units(args, np.array([-600.0, 0.01]))[0] == -600
    assert script.return_units(args, np.zeros(3)) == (0.0, 1.0)
    assert script.return_units(script.Args(env_id="hopper-medium-v2"), np.array([-1.0, 9.0])) == (0.0, 400.0)


@pytest.mark.parametrize("kind", ["limits", "gaussian"])
def test_normalizer(kind):
    values = torch.randn(100, 3, dtype=torch.float64)
    values[:, 1] = 7
    units = script.Normalizer(values, kind)
    y = units.normalize(values)
    assert (units.denormalize(y) - values).abs().max() < 1e-12 and (y[:, 1] == 0).all()
    assert (y >= units.low).all() and (y <= units.high).all()
    if kind == "limits":
        assert y[:, 0].min() == pytest.approx(-1) and y[:, 0].max() == pytest.approx(1)


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_known_places_survive_sampling_and_get_no_loss(prediction):
    args, windows = windows_of(linear_dataset(), prediction=prediction)
    model = script.WorldModel(args, windows)
    obs = windows.obs[windows.start[:5]]
    rollout, reward = script.sample_rollouts(args, model, obs, windows.action[:5], torch.ones(5, 1))
    assert torch.equal(rollout[:, 0], obs) and rollout.shape == (5, 9, 2) and reward.shape == (5, 8)
    low, high = windows.obs.amin(0), windows.obs.amax(0)
    assert (rollout >= low - 1e-5).all() and (rollout <= high + 1e-5).all()
    x0 = torch.randn(5, 9, 3)
    pinned = model.pin(torch.zeros_like(x0), x0)
    assert torch.equal(pinned[:, 0, :2], x0[:, 0, :2]) and torch.equal(pinned[:, -1, -1], x0[:, -1, -1])
    assert pinned.count_nonzero() == 5 * 3 and model.generated.sum() == 27 - 3


def test_log_density_of_actions_against_torch():
    mean, log_std = torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    action = torch.tanh(mean + log_std.exp() * torch.randn_like(mean)).clamp(-0.999, 0.999)
    normal = torch.distributions.Normal(mean, log_std.exp())
    tanh = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    expected = tanh.log_prob(action).sum(-1)
    assert (script.tanh_normal_log_prob(action, mean, log_std) - expected).abs().max() < 1e-9 * (
        1 + expected.abs().max()
    )


def test_mark_ends_by_hand():
    args, windows = windows_of(linear_dataset(terminated=True))
    windows.healthy = torch.tensor([-0.5, -9.0]), torch.tensor([9.0, 9.0])
    obs, reward = torch.zeros(3, 9, 2), torch.zeros(3, 8)
    obs[0, 2, 0] = -1  # falls in its second transition
    reward[1, 1:] = windows.end_reward  # over from step 1 on: the first transition ended it
    terminated, kept, valid = script.mark_ends(args, windows, obs, reward)
    assert terminated.tolist()[0] == [False, True, False, False] and terminated[1, 0] and not terminated[2].any()
    assert valid.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert (kept[1, 1:] == 0).all()
    args.termination = "none"
    assert not script.mark_ends(args, windows, obs, reward)[0].any()


def test_targets_and_losses_by_hand():
    args = script.Args(**TINY, policy_noise=0.0)
    agent = script.TD3BC(args, torch.randn(100, 2), 2).double()
    obs, action, next_obs = (torch.randn(8, 2, dtype=torch.float64) for _ in range(3))
    reward, terminated = torch.randn(8, dtype=torch.float64), torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)
    target = agent.td_target(reward, next_obs, terminated)
    for i in range(8):
        next_action = agent.actor_target(next_obs[i : i + 1])
        value = min(
            agent.qf1_target(next_obs[i : i + 1], next_action), agent.qf2_target(next_obs[i : i + 1], next_action)
        )
        assert float(target[i]) == pytest.approx(float(reward[i] + 0.99 * (1 - terminated[i]) * value), abs=1e-10)
    loss, bc_loss = agent.actor_loss(obs, action)
    q = agent.qf1(obs, agent.actor(obs))
    assert float(bc_loss) == pytest.approx(float((agent.actor(obs) - action).square().mean()))
    assert float(loss) == pytest.approx(float(-2.5 * q.mean() / q.abs().mean() + bc_loss))


def test_too_long_a_horizon_is_refused():
    with pytest.raises(
        UserError, match="--model-horizon 40 needs 41 transitions in a row, but the longest episode has 30"
    ):
        windows_of(linear_dataset(), model_horizon=40)
