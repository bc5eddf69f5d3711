"""dawm_td3bc.py: its mathematics by import, learning on known dynamics, and the script by its command line."""

import json
import math
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import ROOT, TINY, TOY, folders_below, hopper_file, linear_dataset
from toy import command as run_command

import dawm_td3bc as script
from common import UserError
from common.evaluation import make_env
from common.run import Run
from dawm_td3bc import Args


def make_windows(dataset, **changes):
    return script.Windows(Args(**TINY, **changes), dataset, torch.device("cpu"))


def make_world_model(windows, **changes):
    return script.WorldModel(Args(**TINY, **changes), windows)


# ---- Section 2: windows and return-to-go


def test_return_to_go_by_hand():
    """Rewards 1, 1, 1 then the end, gamma 0.99: 2.9701, 1.99, 1; the second episode starts afresh."""
    rtg = script.discounted_return_to_go(np.array([1.0, 1, 1, 5, 7]), np.array([3, 2]), 0.99)
    assert rtg == pytest.approx([2.9701, 1.99, 1.0, 5 + 0.99 * 7, 7])


@pytest.mark.parametrize("return_to_go", ["episode", "window"])
@pytest.mark.parametrize("padding", ["absorbing", "none"])
@pytest.mark.parametrize("terminated", [True, False])
def test_windows_against_a_plain_loop(return_to_go, padding, terminated):
    horizon, gamma = 3, 0.9
    dataset = linear_dataset(episodes=3, length=6, terminated=terminated)
    windows = make_windows(
        dataset, model_horizon=horizon, gamma=gamma, return_to_go=return_to_go, window_padding=padding
    )
    rows = windows.rows(torch.arange(18))
    for start in range(18):
        end = start - start % 6 + 5  # last transition of the episode
        states, rewards, label = [], [], 0.0
        for step in range(horizon + 2):
            row = start + step
            states.append(dataset.obs[row] if row <= end else dataset.next_obs[end])
            rewards.append(dataset.reward[row] if row <= end else windows.end_reward)
        for row in range(start, end + 1):
            if return_to_go == "episode" or row <= start + horizon:
                label += gamma ** (row - start) * dataset.reward[row]
        fits = start + horizon <= end
        assert windows.fits[start] == fits
        assert windows.usable[start] == (fits or (padding == "absorbing" and terminated))
        np.testing.assert_array_equal(windows.obs[rows[start]].numpy(), np.array(states))
        np.testing.assert_allclose(windows.reward[rows[start]].numpy(), rewards, rtol=1e-6)
        told = terminated and padding == "absorbing"
        over = windows.is_over(windows.reward[rows[start]]).tolist()
        assert over == [told and start + s > end for s in range(horizon + 2)]
        assert float(windows.return_to_go[start] * windows.return_scale) == pytest.approx(label, rel=1e-4, abs=1e-5)


def test_no_episode_as_long_as_the_horizon():
    expected = (
        "--model-horizon 7 needs 8 transitions in a row, but the longest episode has 5; lower it and the rollouts'"
    )
    with pytest.raises(UserError, match=expected):
        make_windows(linear_dataset(length=5))


def test_unknown_task_gets_the_stated_rule():
    """The largest return-to-go becomes 0.6, the target 0.7; known tasks have the paper's divisor; a flag wins."""
    windows = make_windows(linear_dataset())
    assert float(windows.return_to_go.max()) == pytest.approx(0.6) and script.target_return(Args(**TINY)) == 0.7
    expert = "walker2d-medium-expert-v2"
    assert script.return_scale(Args(env_id=expert), 1.0) == 550 and script.target_return(Args(env_id=expert)) == 0.9
    for flag in (0.3, 0.0, "own"):
        assert script.target_return(Args(env_id=expert, target_return=flag)) == flag


@pytest.mark.parametrize("kind", ["limits", "gaussian", "cdf"])
def test_normalizer_round_trip(kind):
    values = torch.randn(5000, 3) * torch.tensor([1.0, 10, 0.1])
    values[:, 2] = values[:, 2].clamp(-0.05, 0.05)  # a clipped velocity: many equal values
    normalizer = script.Normalizer(values, kind)
    y = normalizer.normalize(values)
    torch.testing.assert_close(y.amax(0), normalizer.high)
    assert (y >= normalizer.low - 1e-5).all()
    torch.testing.assert_close(normalizer.denormalize(y), values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normalizer.denormalize(y + 100), values.amax(0).expand(5000, 3))  # clipped to the data


def test_gaussian_normalizer_has_mean_0_and_standard_deviation_1():
    values = torch.randn(5000, 3) * 7 + 3
    y = script.Normalizer(values, "gaussian").normalize(values)
    assert y.mean(0).abs().max() < 1e-4 and (y.std(0) - 1).abs().max() < 1e-4


def test_cdf_normalizer_is_the_empirical_cdf():
    """For distinct values, the share of data at or below x, mapped to [-1, 1]: within two quantile steps."""
    values = torch.randn(2001, 1)
    y = script.Normalizer(values, "cdf").normalize(values)[:, 0]
    share = (values[:, 0] <= values).float().mean(1)
    assert (y - (2 * share - 1)).abs().max() < 2 * 2 / 2001


@pytest.mark.parametrize("kind", ["limits", "gaussian", "cdf"])
def test_constant_dimension_survives(kind):
    normalizer = script.Normalizer(torch.tensor([[3.0], [3.0], [3.0]]), kind)
    y = normalizer.normalize(torch.tensor([[3.0]]))
    assert torch.isfinite(y).all() and normalizer.denormalize(y).item() == 3.0


# ---- Section 3: diffusion (figures: cosine schedule with s = 0.008 and clip 0.999, computed in float64 by hand)


def test_schedule():
    expected = [1, 0.89870592, 0.64747821, 0.34080964, 0.09404561, 0.00009405]
    torch.testing.assert_close(
        script.cosine_alpha_bar(5), torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0
    )


def test_strided_steps():
    assert script.strided_steps(5, 3) == [1, 3, 5]
    assert script.strided_steps(5, 2) == [1, 5]
    assert script.strided_steps(5, 5) == [1, 2, 3, 4, 5]
    assert script.strided_steps(5, 1) == [5]


@pytest.mark.parametrize(
    "steps, expected",
    [  # weight of x0, weight of x_k, std; ascending steps
        ([1, 3, 5], [(1, 0, 0), (0.89275814, 0.09462815, 0.30885493), (0.58368283, 0.01095128, 0.81183153)]),
        ([1, 5], [(1, 0, 0), (0.94799096, 0.00103630, 0.31826562)]),
        (
            [1, 2, 3, 4, 5],
            [
                (1, 0, 0),
                (0.75174885, 0.24389443, 0.28341577),
                (0.57815707, 0.38798816, 0.50327993),
                (0.46657298, 0.38222391, 0.72583390),
                (0.30639072, 0.02865149, 0.95138507),
            ],
        ),
    ],
)
def test_posterior(steps, expected):
    alpha_bar = script.cosine_alpha_bar(5)
    coefficients = script.posterior_coefficients(alpha_bar, steps)
    np.testing.assert_allclose(coefficients, expected, atol=1e-7)
    for (weight_x0, weight_x_k, _), current, previous in zip(coefficients, steps, [0, *steps], strict=False):
        assert weight_x0 + weight_x_k * alpha_bar[current].sqrt() == pytest.approx(float(alpha_bar[previous].sqrt()))


def test_q_sample_mean_and_variance():
    world_model = make_world_model(make_windows(linear_dataset()))
    x0 = torch.full((40_000, 1, 1), 0.5)
    x_k = world_model.q_sample(x0, torch.full((40_000,), 3), torch.randn(40_000, 1, 1))
    assert x_k.mean().item() == pytest.approx(0.58378904 * 0.5, abs=0.02)  # sqrt(alpha_bar_3) * x0
    assert x_k.var().item() == pytest.approx(1 - 0.34080964, rel=0.03)


def test_parameter_counts():
    """[DD code]'s network with an action embedding, counted layer by layer: 60,717,580 Hopper, 60,723,346 Walker2d."""
    for channels, action_dim, expected in ((12, 3, 60_717_580), (18, 6, 60_723_346)):
        with torch.device("meta"):
            network = script.TemporalUNet(channels, action_dim, 128, (1, 4, 8))
        assert sum(p.numel() for p in network.parameters()) == expected
    with torch.device("meta"):
        obs = torch.empty(10, 11)
        networks = (
            script.InverseDynamics(Args(), obs, 3),
            script.Actor(obs[0], obs[0], 3),
            script.Critic(obs[0], obs[0], 3),
        )
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [2_174_982, 69_635, 139_778 // 2]


@pytest.mark.parametrize("horizon", [1, 3, 7])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 4)])
def test_unet_keeps_any_length(horizon, multipliers):
    network = script.TemporalUNet(5, 2, 8, multipliers)
    x = torch.randn(3, horizon + 2, 5)
    y = network(x, torch.tensor([1, 2, 3]), torch.randn(3, 2), torch.randn(3, 1), torch.ones(3, 1))
    assert y.shape == x.shape


class Oracle(torch.nn.Module):
    """Returns the exact noise (or x0) for one known clean window, whatever the condition."""

    def __init__(self, world_model, x0):
        super().__init__()
        self.world_model, self.x0 = world_model, x0

    def forward(self, x_k, k, *_):
        if self.world_model.args.prediction == "x0":
            return self.x0.expand_as(x_k)
        alpha_bar = self.world_model.alpha_bar[k][:, None, None]
        return (x_k - alpha_bar.sqrt() * self.x0) / (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("sampling_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_sampler_with_an_oracle_returns_its_window(prediction, sampling_steps, temperature):
    """The last denoising step outputs x0 itself, so any N and any temperature must end at the oracle's window."""
    windows = make_windows(linear_dataset())
    world_model = make_world_model(
        windows, prediction=prediction, sampling_steps=sampling_steps, sampling_temperature=temperature
    )
    rows = windows.rows(torch.tensor([4]))
    x0 = world_model.normalize(windows.obs[rows], windows.reward[rows])
    x0[:, -1, -1] = 0
    world_model.denoiser = Oracle(world_model, x0)
    first, action, target = windows.obs[rows][:, 0], torch.zeros(1, 2), torch.zeros(1, 1)
    obs, reward = script.sample_rollouts(world_model.args, world_model, first, action, target)
    torch.testing.assert_close(obs, windows.obs[rows], atol=2e-3, rtol=0)
    torch.testing.assert_close(reward, windows.reward[rows][:, :-1], atol=2e-3, rtol=0)


def test_first_state_is_the_given_one_to_the_bit_and_pinned_in_every_network_call():
    windows = make_windows(linear_dataset())
    world_model, seen = make_world_model(windows), []
    inner = world_model.denoiser
    inner.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    obs = windows.obs[:50] + 0.0123
    generated, _ = script.sample_rollouts(Args(**TINY), world_model, obs, windows.action[:50], torch.ones(50, 1))
    assert torch.equal(generated[:, 0], obs)
    known = world_model.obs_units.normalize(obs)
    assert len(seen) == 3
    for x in seen:
        assert torch.equal(x[:, 0, :2], torch.cat([known, known])) and x[:, -1, -1].eq(0).all()


def test_known_places_have_no_gradient():
    windows = make_windows(linear_dataset())
    world_model = make_world_model(windows)
    rows = windows.rows(torch.arange(6))
    x0 = world_model.normalize(windows.obs[rows], windows.reward[rows])
    output = torch.randn_like(x0, requires_grad=True)
    world_model.denoiser.forward = lambda *_: output
    world_model.loss(x0, None, None, None).backward()
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, 0, :2] = known[:, -1, -1] = True
    assert output.grad[known].eq(0).all() and output.grad[~known].ne(0).all()


def test_guidance():
    """Scale 1 is the conditional prediction, 0 the unconditional one; one batch of both equals two calls."""
    windows = make_windows(linear_dataset())
    # one denoising step without noise: the sample is a function of one prediction
    world_model = make_world_model(windows, diffusion_steps=1, sampling_steps=1, sampling_temperature=0.0)
    denoiser, obs, action = world_model.denoiser, windows.obs[:5], windows.action[:5]
    for scale in (0.0, 1.0, 1.7):
        args = replace(world_model.args, guidance_scale=scale)
        torch.manual_seed(3)
        sampled, _ = script.sample_rollouts(args, world_model, obs, action, torch.ones(5, 1))
        torch.manual_seed(3)
        x = world_model.pin(torch.randn(5, 9, 3), world_model.normalize(obs[:, None], torch.zeros(5, 1)))
        call = x, torch.ones(5, dtype=torch.long), action, torch.ones(5, 1)
        with torch.no_grad():
            uncond, cond = denoiser(*call, torch.zeros(5, 1)), denoiser(*call, torch.ones(5, 1))
        noise = (1 - scale) * uncond + scale * cond
        alpha_bar = float(world_model.alpha_bar[1])
        x0 = ((x - math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha_bar)).clamp(-1, 1)
        expected = world_model.obs_units.denormalize(x0[:, 1:, :2])
        torch.testing.assert_close(sampled[:, 1:], expected, atol=1e-4, rtol=1e-4)


def test_dropped_return_is_invisible_and_the_action_is_not():
    network = script.TemporalUNet(3, 2, 16, (1, 2))
    x, k, action = torch.randn(4, 9, 3), torch.full((4,), 2), torch.randn(4, 2)
    low, high, keep, drop = torch.zeros(4, 1), torch.ones(4, 1), torch.ones(4, 1), torch.zeros(4, 1)
    assert torch.equal(network(x, k, action, low, drop), network(x, k, action, high, drop))
    assert not torch.equal(network(x, k, action, low, keep), network(x, k, action, high, keep))
    assert not torch.equal(network(x, k, action, low, drop), network(x, k, -action, low, drop))


# ---- Sections 4 and 5: inverse dynamics, synthesis


def test_tanh_normal_density():
    """a = 0.2, mean 0.3 before tanh, std 0.5: -0.203891, by hand; and it integrates to 1."""
    log_std = torch.tensor([math.log(0.5)])
    log_prob = script.tanh_normal_log_prob(torch.tensor([0.2]), torch.tensor([0.3]), log_std)
    assert log_prob.item() == pytest.approx(-0.203891, abs=1e-5)
    grid = torch.linspace(-1, 1, 200_001)[1:-1, None]
    density = script.tanh_normal_log_prob(grid, torch.tensor([0.3]), log_std).exp()
    assert (density.sum() * 1e-5).item() == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(script.tanh_normal_log_prob(torch.tensor([1.0]), torch.tensor([0.0]), log_std))


@pytest.mark.parametrize("robot, simulator", [("hopper", "Hopper-v4"), ("walker2d", "Walker2d-v4")])
def test_fall_rule_is_the_simulators(robot, simulator):
    """Random play: the rule on next_obs must equal `terminated` at every step."""
    env, disagreements, falls = make_env(simulator, "d4rl"), 0, 0
    rng = np.random.default_rng(0)
    for episode in range(30):
        env.reset(seed=episode)
        for _ in range(200):
            obs, _, terminated, _, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            disagreements += terminated != bool(script.has_fallen(robot, torch.as_tensor(obs, dtype=torch.float32)))
            falls += terminated
            if terminated:
                break
    assert falls >= 20 and disagreements == 0


def test_fall_rule_boundaries():
    upright = torch.zeros(11)
    upright[0] = 1.2
    assert not script.has_fallen("hopper", upright)
    for place, value in ((0, 0.7), (1, 0.2), (1, -0.2), (5, 100.0), (5, -100.0), (5, math.nan)):
        fallen = upright.clone()
        fallen[place] = value
        assert script.has_fallen("hopper", fallen), (place, value)
    assert not script.has_fallen("halfcheetah", torch.full((17,), 50.0))


@pytest.mark.parametrize("target", [0.4, "own"])
def test_target_return_is_one_for_all_or_each_pairs_own(monkeypatch, target):
    windows, asked = make_windows(linear_dataset()), []

    def sample_rollouts(args, world_model, obs, action, return_to_go):
        asked.append(return_to_go)
        return torch.zeros(5, 9, 2), torch.zeros(5, 8)

    monkeypatch.setattr(script, "sample_rollouts", sample_rollouts)
    args = Args(**TINY, target_return=target)
    script.Synthesizer(args, "", windows, None, lambda x: x[..., :2])(torch.arange(5))
    expected = windows.return_to_go[:5, None] if target == "own" else torch.full((5, 1), 0.4)
    assert torch.equal(asked[0], expected)


def test_synthesis_assembles_complete_transitions():
    windows = make_windows(linear_dataset())
    world_model = make_world_model(windows)
    calls = []

    def inverse_dynamics(triples):  # a = (s' - 0.9 s) / 0.3 of the triple (past, s, s')
        calls.append(triples.shape)
        return (triples[..., 4:6] - 0.9 * triples[..., 2:4]) / 0.3

    rows, valid = script.Synthesizer(Args(**TINY, termination="none"), "", windows, world_model, inverse_dynamics)(
        torch.arange(20)
    )
    obs, action, reward, next_obs, terminated = rows.split([2, 2, 1, 2, 1], dim=-1)
    assert rows.shape == (20, 8, 8) and calls == [(20, 7, 6)] and valid.all() and not terminated.any()
    assert torch.equal(obs[:, 0], windows.obs[windows.start[:20]]) and torch.equal(action[:, 0], windows.action[:20])
    assert torch.equal(obs[:, 1:], next_obs[:, :-1])
    torch.testing.assert_close(next_obs[:, 1:], 0.9 * obs[:, 1:] + 0.3 * action[:, 1:], atol=1e-5, rtol=1e-5)
    assert reward.abs().max() <= windows.reward.abs().max() + 1e-5


def test_a_smaller_horizon_takes_the_first_steps_of_the_same_rollouts():
    """One world model of horizon 7: under the same noise, horizon 3 keeps the first 4 of its 8 transitions."""
    windows = make_windows(linear_dataset())
    world_model = make_world_model(windows)
    rows, valid = {}, {}
    for horizon in (7, 3):
        args = Args(**TINY, horizon=horizon, model_horizon=7, termination="none")
        synthesizer = script.Synthesizer(args, "", windows, world_model, lambda x: x[..., 2:4] - x[..., 4:6])
        torch.manual_seed(3)
        rows[horizon], valid[horizon] = synthesizer(torch.arange(20))
    assert rows[7].shape == (20, 8, 8) and rows[3].shape == (20, 4, 8) and valid[3].shape == (20, 4)
    assert torch.equal(rows[3], rows[7][:, :4]) and rows[3].std(1)[:, :5].min() > 0  # no two steps are the same


@pytest.mark.parametrize("termination", ["rule", "none"])
def test_transitions_after_a_fall_are_dropped(monkeypatch, termination):
    windows = make_windows(linear_dataset())
    heights = torch.ones(1, 9, 11) * 0.01
    heights[0, :, 0] = torch.tensor([1.2, 1.1, 1.0, 0.6, 1.2, 1.2, 1.2, 1.2, 1.2])  # down at state 3
    monkeypatch.setattr(script, "sample_rollouts", lambda *_: (heights, torch.zeros(1, 8)))
    args = Args(**TINY, termination=termination)
    synthesizer = script.Synthesizer(args, "hopper", windows, None, lambda x: torch.zeros(1, 7, 2))
    rows, valid = synthesizer(torch.tensor([0]))
    fall = termination == "rule"
    assert rows[0, :, -1].tolist() == [0, 0, float(fall), 0, 0, 0, 0, 0]
    assert valid[0].tolist() == [True] * 3 + [not fall] * 5


def test_a_short_rollout_still_hears_the_sign_of_the_step_after_it(monkeypatch):
    """Horizon 1 of a model of 7: the reward of step 2 is not part of the rollout and tells that step 1 was the last."""
    windows = make_windows(linear_dataset(terminated=True))
    reward = torch.tensor([[0.1, 0.2, windows.end_reward, *[0.1] * 5]])
    monkeypatch.setattr(script, "sample_rollouts", lambda *_: (torch.zeros(1, 9, 2), reward))
    args = Args(**TINY, horizon=1)
    rows, valid = script.Synthesizer(args, "", windows, None, lambda x: torch.zeros(1, 1, 2))(torch.tensor([0]))
    assert rows[0, :, -1].tolist() == [0, 1] and valid.tolist() == [[True, True]]


@pytest.mark.parametrize("padding, terminated", [("absorbing", False), ("none", True)])
def test_nothing_counts_as_an_end_where_no_window_showed_one(padding, terminated):
    windows = make_windows(linear_dataset(terminated=terminated), window_padding=padding)
    assert not windows.is_over(torch.tensor([-1e9, 0.0])).any()
    assert windows.reward.min() == windows.reward[windows.start].min()  # nor does a made-up reward widen the units


@pytest.mark.parametrize("termination", ["rule", "none"])
def test_the_models_own_sign_ends_a_rollout_too(monkeypatch, termination):
    """A reward below all real ones at step 2 says that transition 1 was the last; it is told as 0 where kept."""
    windows = make_windows(linear_dataset(terminated=True))
    reward = torch.tensor([[0.1, 0.2, windows.end_reward, windows.end_reward, 0.1, 0.1, 0.1, 0.1]])
    monkeypatch.setattr(script, "sample_rollouts", lambda *_: (torch.zeros(1, 9, 2), reward))
    args = Args(**TINY, termination=termination)
    rows, valid = script.Synthesizer(args, "", windows, None, lambda x: torch.zeros(1, 7, 2))(torch.tensor([0]))
    fall = termination == "rule"
    assert rows[0, :, -1].tolist()[:2] == [0, float(fall)] and valid[0].tolist() == [True] * 2 + [not fall] * 6
    assert rows[0, :, 4].tolist() == pytest.approx([0.1, 0.2, 0, 0, 0.1, 0.1, 0.1, 0.1])


# ---- Section 6: the agent


def make_agent(**changes):
    torch.manual_seed(0)
    return script.TD3BC(Args(**changes), torch.randn(100, 11) * 3 + 1, 3)


def random_rows(count=64):
    rows = torch.randn(count, 11 + 3 + 1 + 11 + 1)
    rows[:, 11:14] = rows[:, 11:14].clamp(-1, 1)
    rows[:, -1] = (rows[:, -1] > 0.5).float()
    return rows


def test_td_target_by_hand():
    agent = make_agent(policy_noise=0.0)
    reward, next_obs, terminated = torch.tensor([1.0, 2.0]), torch.randn(2, 11), torch.tensor([0.0, 1.0])
    with torch.no_grad():
        action = agent.actor_target(next_obs)
        value = [min(q1, q2) for q1, q2 in zip(agent.qf1_target(next_obs, action), agent.qf2_target(next_obs, action))]
    target = agent.td_target(reward, next_obs, terminated)
    assert target.tolist() == pytest.approx([1 + 0.99 * float(value[0]), 2.0])


def test_target_noise_is_clipped_and_so_is_the_action():
    agent = make_agent(policy_noise=100.0)
    seen = []
    agent.qf1_target = agent.qf2_target = lambda obs, action: (seen.append(action), torch.zeros(len(obs)))[1]
    agent.actor_target = lambda obs: torch.zeros(len(obs), 3)
    agent.td_target(torch.zeros(50), torch.zeros(50, 11), torch.zeros(50))
    assert seen[0].abs().max() == 0.5  # noise_clip
    agent.actor_target = lambda obs: torch.ones(len(obs), 3)
    agent.td_target(torch.zeros(50), torch.zeros(50, 11), torch.zeros(50))
    assert seen[-1].max() == 1


def test_actor_loss_weight_and_gradients():
    """lambda * mean|Q| is bc_alpha, so the Q term is -2.5 times the sign-weighted mean; critics get no gradient."""
    agent, rows = make_agent(), random_rows()
    obs, action = rows[:, :11], rows[:, 11:14]
    q = agent.qf1(obs, agent.actor(obs)).detach()
    loss, bc_loss = (x.detach() for x in agent.actor_loss(obs, action))
    assert float(loss - bc_loss) == pytest.approx(float(-2.5 * q.mean() / q.abs().mean()), rel=1e-5)
    assert float(bc_loss) == pytest.approx(float((agent.actor(obs) - action).square().mean().detach()), rel=1e-5)
    before = [p.clone() for p in agent.qf_parameters]
    agent.update(rows, update_actor=True)
    agent.qf_optimizer.zero_grad()
    frozen = [p.clone() for p in agent.qf_parameters]
    actor_loss, _ = agent.actor_loss(obs, action)
    actor_loss.backward(inputs=agent.actor_parameters)
    assert all(p.grad is None for p in agent.qf_parameters)
    assert all(torch.equal(a, b) for a, b in zip(frozen, agent.qf_parameters))
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.qf_parameters))


def test_targets_move_by_the_polyak_rate_only_with_the_actor():
    agent = make_agent()
    start = [p.clone() for p in agent.target_parameters]
    agent.update(random_rows(), update_actor=False)
    assert all(torch.equal(a, b) for a, b in zip(start, agent.target_parameters))
    agent.update(random_rows(), update_actor=True)
    for before, now, online in zip(start, agent.target_parameters, agent.parameters):
        torch.testing.assert_close(now, 0.995 * before + 0.005 * online, atol=1e-6, rtol=1e-5)


def test_actor_carries_the_observation_statistics():
    obs = torch.randn(500, 11) * 3 + 1
    agent = script.TD3BC(Args(), obs, 3)
    torch.testing.assert_close(agent.actor.obs_mean, obs.mean(0))
    torch.testing.assert_close(agent.actor.obs_std, obs.std(0) + 1e-3)  # TD3+BC's epsilon


@pytest.mark.parametrize("fraction, expected", [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_batches_mix_by_the_fraction(fraction, expected):
    args = Args(synthetic_fraction=fraction, agent_batch_size=64)
    source = script.batches(args, torch.zeros(10, 5), torch.ones(20, 5), None, {"count": 0, "h": 0})
    flags = []
    for _ in range(4):
        rows, update_actor = next(source)
        flags.append(update_actor)
        assert rows.shape == (64, 5) and rows[:, 0].sum() == expected
    assert flags == [False, True, False, True]


def test_online_batches_follow_algorithm_2():
    """One batch for each h of fresh rollouts; the actor follows all H+1 of every second iteration, as printed."""
    rows = torch.arange(3).float().repeat(4, 1)[..., None].expand(4, 3, 5)
    valid = torch.tensor([[True, True, False]] * 4)
    args = Args(synthesis="online", horizon=2)
    source = script.batches(args, torch.zeros(10, 5), None, lambda index: (rows, valid), {"count": 0, "h": 0})
    assert [(float(r[0, 0]), len(r), flag) for r, flag in (next(source) for _ in range(4))] == [
        (0.0, 4, False), (1.0, 4, False), (0.0, 4, True), (1.0, 4, True),
    ]  # fmt: skip


# ---- Learning on the linear system


@pytest.fixture
def run(tmp_path):
    run = Run(Args(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages", device="cpu"))
    run.open()
    run.fingerprints["data"] = "test"
    return run


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_world_model_learns_known_dynamics(run, prediction):
    """After one real action, s' = 0.9 s + 0.3 a is certain; an untrained model misses by about one data std."""
    args = Args(**TINY, prediction=prediction, world_model_steps=600, world_model_lr=3e-3, ema_decay=0.9, ema_start=0,
                model_horizon=2, normalizer="limits", log_every=300)  # fmt: skip
    windows = script.Windows(args, linear_dataset(episodes=100), run.device)
    world_model = script.train_world_model(args, windows, run)
    index = torch.arange(0, 2000, 7)
    state, action = windows.obs[windows.start[index]], windows.action[index]
    obs, reward = script.sample_rollouts(args, world_model, state, action, windows.return_to_go[index, None])
    scale = windows.obs.std(0)
    assert ((obs[:, 1] - (0.9 * state + 0.3 * action)) / scale).abs().mean() < 0.2
    assert ((reward[:, 0] - state[:, 0]) / windows.reward.std()).abs().mean() < 0.2


def test_world_model_errors_are_in_standard_deviations_of_held_out_windows(run, monkeypatch):
    """Rollouts that miss the true states by half a deviation, and the true rewards by a quarter."""
    args = Args(**TINY, world_model_holdout=0.2)
    windows = script.Windows(args, linear_dataset(), run.device)
    held_out = windows.held_out(0.2, args.world_model_seed)
    pair_of = {tuple(windows.obs[windows.start[i]].tolist()): i for i in range(len(windows.start))}

    def sample_rollouts(args, world_model, obs, action, return_to_go):
        pairs = torch.tensor([pair_of[tuple(row.tolist())] for row in obs])
        assert held_out[pairs].all() and windows.fits[pairs].all()
        assert torch.equal(action, windows.action[pairs])
        assert torch.equal(return_to_go, windows.return_to_go[pairs, None])
        obs, reward = windows.obs[windows.rows(pairs)], windows.reward[windows.rows(pairs)]
        return obs + windows.obs.std(0) / 2, reward[:, :-1] - windows.reward[windows.start].std() / 4

    monkeypatch.setattr(script, "sample_rollouts", sample_rollouts)
    script.measure_world_model(args, None, windows, run)
    ((_, values),) = run.records
    assert values == pytest.approx(
        {f"world_model/val_obs_error_step{i}": 0.5 for i in range(1, 9)}
        | {f"world_model/val_reward_error_step{i}": 0.25 for i in range(1, 9)},
        abs=1e-4,
    )


def test_inverse_dynamics_learns_the_known_inverse_and_keeps_its_best_weights(run):
    args = Args(**TINY, idm_steps=800, idm_batch_size=256, idm_width=64, idm_lr=3e-3, log_every=100)
    windows = script.Windows(args, linear_dataset(episodes=100), run.device)
    inverse_dynamics = script.train_inverse_dynamics(args, windows, run)
    row = windows.start[1:20]
    triples = torch.cat([windows.obs[row - 1], windows.obs[row], windows.obs[row + 1]], dim=1)
    assert (inverse_dynamics(triples) - windows.action[1:20]).abs().mean() < 0.06
    losses = [value for _, value in run.history["idm/val_loss"]]
    assert run.history["idm/best_val_loss"][-1][1] == min(losses)


def test_inverse_dynamics_without_context_sees_the_transition_alone():
    obs = torch.randn(50, 2)
    triples, other_past = torch.randn(4, 6), torch.randn(4, 2)
    for context in (0, 1):
        model = script.InverseDynamics(Args(**TINY, idm_width=8, idm_context=context), obs, 2).eval()
        changed = model(torch.cat([other_past, triples[:, 2:]], dim=1))
        assert torch.equal(changed, model(triples)) == (context == 0)


def test_the_spreads_dropout_is_drawn_first():
    """The order of the random numbers, on which every published figure depends."""
    model = script.InverseDynamics(Args(idm_width=64, idm_dropout=0.5), torch.randn(50, 2), 2)
    triples = torch.randn(20, 6)
    torch.manual_seed(1)
    mean, log_std = model.gaussian(triples)
    torch.manual_seed(1)
    states = model.normalize(triples)
    first, second = model.log_std(states), model.mean(states)
    assert torch.equal(log_std, -1.5 + 3.5 * torch.tanh(first)) and torch.equal(mean, second)


def test_sampled_actions_have_the_gaussians_mean_and_spread():
    model = script.InverseDynamics(Args(**TINY, idm_width=8), torch.randn(50, 2), 2).eval()
    triples = torch.randn(1, 6)
    with torch.no_grad():
        mean, log_std = model.gaussian(triples)
        drawn = torch.atanh(model.sample(triples.expand(20_000, -1)).double().clamp(-1 + 1e-12, 1 - 1e-12))
        assert torch.equal(model(triples), torch.tanh(mean))
    torch.testing.assert_close(drawn.mean(0).float(), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std(0).float(), log_std[0].exp(), atol=0.01, rtol=0.03)


@pytest.mark.parametrize("completion", ["mean", "sample"])
def test_completion_takes_the_mean_or_a_draw(completion):
    windows = make_windows(linear_dataset())
    args = Args(**TINY, idm_width=8, completion=completion)
    model = script.InverseDynamics(args, windows.obs, 2).eval()
    rows, _ = script.Synthesizer(args, "", windows, make_world_model(windows), model)(torch.arange(5))
    obs = torch.cat([rows[:, :, :2], rows[:, -1:, 5:7]], dim=1)
    expected = model(torch.cat([obs[:, :-2], obs[:, 1:-1], obs[:, 2:]], dim=-1))
    assert torch.allclose(rows[:, 1:, 2:4], expected, atol=1e-6) == (completion == "mean")


def test_inverse_dynamics_returns_an_earlier_best(run, monkeypatch):
    """With a learning rate that destroys the network after a good start, the good weights must come back."""
    args = Args(**TINY, idm_steps=40, idm_batch_size=64, idm_width=32, idm_lr=1e-2, log_every=10)
    windows = script.Windows(args, linear_dataset(episodes=30), run.device)
    losses, kept = iter([0.1, 5.0, 6.0, 7.0]), []

    def log(step, values):
        if "idm/val_loss" in values:
            values["idm/val_loss"].fill_(next(losses))  # in place: what the script compares next

    monkeypatch.setattr(run, "log", log)
    monkeypatch.setattr(script, "copy", SimpleNamespace(deepcopy=lambda x: kept.append(deepcopy(x)) or kept[-1]))
    model = script.train_inverse_dynamics(args, windows, run)
    assert len(kept) == 1  # only the first check was the best
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept[0].values(), strict=True))


# ---- The command line


def command(*arguments, **environment):
    return run_command("dawm_td3bc.py", *arguments, **environment)


def test_d4rl_layout_file_to_score_and_same_seed_same_metrics(tmp_path):
    """Runs a and b train everything, each with a store of its own; c finds what a made, and ends where a ended."""
    data, runs, texts = hopper_file(tmp_path / "data.hdf5"), {}, {}
    for name, store in (("a", "a"), ("b", "b"), ("c", "a")):
        result = command(
            "--env-id", "hopper-medium-v2", "--data-path", data, "--run-dir", tmp_path / name,
            "--stage-dir", tmp_path / "stages" / store, *TOY, DAWM_CACHE_DIR=str(tmp_path / "cache"),
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        texts[name] = result.stdout
        (runs[name],) = (tmp_path / name).iterdir()
    assert "not the published hopper-medium-v2 file" in texts["a"] and "final" in texts["a"]
    assert {"args.json", "metrics.jsonl", "summary.txt", "curves.png", "actor.safetensors", "stages.json"} <= {
        p.name for p in runs["a"].iterdir()
    }
    facts = json.loads((runs["a"] / "args.json").read_text())
    assert facts["data"]["sha256"] and facts["versions"]["torch"] and facts["args"]["unet_width"] == 8
    stages = {name: json.loads((where / "stages.json").read_text()) for name, where in runs.items()}
    assert list(stages["a"]) == ["world model", "inverse dynamics", "synthesis"] and stages["c"] == stages["a"]
    for stage, folder in stages["a"].items():
        assert os.path.exists(os.path.join(folder, "tensors.safetensors"))
        assert os.path.basename(folder) == os.path.basename(stages["b"][stage])  # the name tells what, not where
        assert f"reused {folder}" in texts["c"]
    assert "reused" not in texts["a"] + texts["b"]

    def metrics(where):
        lines = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    assert metrics(runs["a"]) == metrics(runs["b"]) == metrics(runs["c"])
    names = {name for line in metrics(runs["a"]) for name in line}
    assert {"world_model/loss", "idm/val_mse", "synthesis/transitions", "agent/qf_loss", "agent/actor_loss",
            "eval/episodic_return", "eval/normalized_score"} <= names  # fmt: skip
    table = subprocess.run(
        [sys.executable, "experiments/table.py", str(tmp_path / "a")], cwd=ROOT, capture_output=True, text=True
    )
    scores = [line["eval/normalized_score"] for line in metrics(runs["a"]) if "eval/normalized_score" in line]
    assert f"| {scores[-1]:.1f} | {np.mean(scores):.1f} | {max(scores):.1f} |" in table.stdout, table.stderr


def test_minari_id_to_score(tmp_path):
    """A Minari set of today's Hopper: its own simulator, stock physics, D4RL's reference returns."""
    import minari
    from minari.data_collector import EpisodeBuffer

    env, rng, buffers = make_env("Hopper-v5", "stock"), np.random.default_rng(0), []
    for episode in range(8):
        observations, actions, rewards, terminated = [env.reset(seed=episode)[0]], [], [], False
        while not terminated:
            actions.append(rng.uniform(-1, 1, 3).astype(np.float32))
            obs, reward, terminated, _, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(reward)
        ends = np.arange(1, len(rewards) + 1) == len(rewards)
        buffers.append(
            EpisodeBuffer(
                observations=np.array(observations), actions=np.array(actions), rewards=rewards,
                terminations=ends, truncations=ends & False,
            )
        )  # fmt: skip
    root = {"MINARI_DATASETS_PATH": str(tmp_path / "minari"), "DAWM_CACHE_DIR": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", root["MINARI_DATASETS_PATH"])
        (tmp_path / "minari").mkdir()
        minari.create_dataset_from_buffers("test/hopper/random-v0", buffers, env=env, data_format="hdf5")
    result = command("--env-id", "test/hopper/random-v0", *folders_below(tmp_path), *TOY, **root)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Minari data set" in result.stdout and "Hopper-v5, physics stock" in result.stdout


def test_local_data_to_score(tmp_path):
    """A local set is made from the shipped policies, then named like any other data."""
    root = {"MINARI_DATASETS_PATH": str(tmp_path / "minari"), "DAWM_CACHE_DIR": str(tmp_path / "cache")}
    collect = [sys.executable, "local_datasets/collect.py", "--env-id", "local/hopper/medium-v0", "--steps", "3000"]
    subprocess.run(collect, cwd=ROOT, env={**os.environ, **root}, check=True, capture_output=True)
    result = command("--env-id", "local/hopper/medium-v0", *folders_below(tmp_path), *TOY, **root)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "shipped policies, not D4RL" in result.stdout and "Hopper-v4, physics d4rl" in result.stdout


@pytest.mark.parametrize("options", [["--synthetic-fraction", "0"], ["--synthesis", "online", "--prediction", "x0"]])
def test_control_and_online_mode(tmp_path, options):
    data = hopper_file(tmp_path / "data.hdf5")
    arguments = "--env-id", "hopper-medium-v2", "--data-path", data, *folders_below(tmp_path), *TOY, *options
    result = command(*arguments, DAWM_CACHE_DIR=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert ("no world model" in result.stdout) == (options[1] == "0")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env-id", "hoper-medium-v2"], "unknown --env-id 'hoper-medium-v2'; nearest known: hopper-medium-v2"),
        (["--sampling-steps", "6"], "--sampling-steps 6 is above --diffusion-steps 5"),
        (["--synthetic-fraction", "1.5"], "--synthetic-fraction 1.5 lies outside [0, 1]"),
        (["--synthesis", "online", "--synthetic-fraction", "0.5"], "--synthesis online draws from all pairs"),
        (["--idm-holdout", "0"], "--idm-holdout 0.0 lies outside [0.001, 0.9]"),
        (["--horizon", "0"], "--horizon 0 must be 1 or more"),
        (["--horizon", "9"], "--horizon 9 is above --model-horizon 7"),
        (["--gamma", "nan"], "--gamma nan lies outside [0, 1]"),
        (["--gama", "0.9"], "Unrecognized options: --gama, 0.9; perhaps --gamma; --help lists all arguments"),
        (["--gamma", "high"], "Error parsing --gamma: could not convert string to float: 'high'"),
        (["--prediction", "x1"], "invalid choice 'x1' for argument '--prediction'. Expected one of ('noise', 'x0')"),
        (["--target-return", "inf"], "--target-return inf lies outside [-100, 100]"),
        (["--unet-width", "12"], "--unet-width 12 must be 8, 16"),
        (["--run-dir", "/dev/null/runs"], "cannot write the run folder"),
        (["--tf32", "--device", "cpu"], "--tf32 changes what a GPU computes, and this run is on the CPU; leave it out"),
        *(
            []
            if torch.cuda.is_available()
            else [(["--device", "cuda"], "--device cuda, but torch sees no CUDA device")]
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    if "--run-dir" not in arguments:
        arguments = [*arguments, "--run-dir", str(tmp_path)]
    arguments = [*arguments, "--stage-dir", str(tmp_path / "stages")]
    monkeypatch.setattr(sys, "argv", ["dawm_td3bc.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.main, Args, script.LAPTOP)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # a run that did not start leaves no folder


def test_help_groups_arguments_and_laptop_defaults_yield_to_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dawm_td3bc.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.main, Args, script.LAPTOP)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for heading in ("World model", "Inverse dynamics", "Synthesis", "Agent", "Evaluation"):
        assert heading.lower() in text.lower()
    monkeypatch.setattr(sys, "argv", ["dawm_td3bc.py", "--laptop", "--idm-steps", "7"])
    seen = []
    script.run_script(seen.append, Args, script.LAPTOP)
    assert seen[0] == Args(**{**script.LAPTOP, "laptop": True, "idm_steps": 7})
