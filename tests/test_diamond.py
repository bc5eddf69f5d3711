"""baselines/diamond.py: histories, lambda-returns and REINFORCE by hand, the linear system learned and used.

What it has from other scripts to the letter is tested with them.
"""

import math
from types import SimpleNamespace

from baselines import diamond as script
from baselines.diamond import Args, Histories

import numpy as np
import pytest
import torch
from toy import Function, Training, linear_dataset

CPU = torch.device("cpu")


# ---- Sections 2 and 3


def test_histories_against_a_plain_loop():
    """None reaches into the episode before: there its first row stands."""
    dataset = linear_dataset(episodes=3, length=5)
    obs, action = Histories(Args(history=3), dataset, CPU).of(torch.arange(15))
    for row in range(15):
        past = [max(row - back, row - row % 5) for back in (2, 1, 0)]
        assert np.array_equal(obs[row], dataset.obs[past]) and np.array_equal(action[row], dataset.action[past])


def test_noise_levels_of_training_are_clipped():
    sigma = script.draw_sigma(Args(sigma_log_std=4.0), 20_000, CPU)
    assert sigma.min() == pytest.approx(0.002) and sigma.max() == 20
    assert float(sigma.median().log()) == pytest.approx(-0.4, abs=0.15)


def test_one_euler_step_is_what_the_network_denoises():
    """At sigma_max 5 and N = 1, with a network that says 0.2: x / 26 + 0.2 * 5 / sqrt(26), in units of the next state,
    and clipped to the data's range; a change is added to the state."""
    dataset = linear_dataset()
    for predict in ("state", "change"):
        args = Args(sampling_steps=1, predict=predict, mlp_width=8)
        histories = Histories(args, dataset, CPU)
        world_model = script.WorldModel(args, histories)
        world_model.network = Function(lambda x, *_: torch.full_like(x, 0.2))
        obs, action = histories.of(torch.arange(1000))
        torch.manual_seed(3)
        made = script.sample_next(args, world_model, obs, action)
        torch.manual_seed(3)
        x = 5 * torch.randn(1000, 2) / 26 + 0.2 * 5 / math.sqrt(26)
        target = dataset.next_obs - dataset.obs if predict == "change" else dataset.next_obs
        expected = x.numpy() * target.std(0, ddof=1) + target.mean(0)
        expected += obs[:, -1].numpy() if predict == "change" else 0
        expected = expected.clip(dataset.next_obs.min(0), dataset.next_obs.max(0))
        np.testing.assert_allclose(made, expected, atol=1e-3)


# ---- Sections 5 and 6


def test_lambda_returns_by_hand():
    """gamma 0.5, weight 0.5; the second rollout ends at its second step. Behind the last step stands its value."""
    reward, value = torch.tensor([[1.0, 2, 3], [1, 2, 3]]), torch.tensor([[4.0, 8, 16], [4, 8, 16]])
    ends = torch.tensor([[0.0, 0, 0], [0, 1, 0]])
    third = 3 + 0.5 * 16
    second = 2 + 0.5 * (0.5 * 8 + 0.5 * third)
    expected = [[1 + 0.5 * (0.5 * 4 + 0.5 * second), second, third], [1 + 0.5 * (0.5 * 4 + 0.5 * 2), 2, third]]
    assert script.lambda_returns(reward, ends, value, 0.5, 0.5).tolist() == expected


def test_imagination_hands_on_states_and_actions_and_stops_at_an_end(monkeypatch):
    """A world of sums: the next state is the sum of the history's states and actions; an end comes at a sum above 3."""
    args, dataset = Args(history=2, imagination_horizon=4), linear_dataset()
    histories, index = Histories(args, dataset, CPU), torch.arange(5, 25)
    monkeypatch.setattr(script, "sample_next", lambda _args, _model, obs, action: obs.sum(1) + action.sum(1))

    def outcome(obs, action, next_obs):
        return action[:, :1], (next_obs.sum(1, keepdim=True).abs() > 3).float()

    rewards, actor = SimpleNamespace(sample=outcome), SimpleNamespace(sample=lambda obs: 0.1 * obs + 0.2)
    rows, valid, drawn = script.imagine(args, histories, None, rewards, actor, index)
    for start, made, real in zip(index.tolist(), rows, valid.tolist(), strict=True):
        states, actions = list(dataset.obs[start - 1 : start + 1]), [dataset.action[start - 1]]
        over = False
        for row, told in zip(made, real, strict=True):
            actions.append(np.tanh(0.1 * states[-1] + 0.2))
            states.append(states[-1] + states[-2] + actions[-1] + actions[-2])
            end = abs(states[-1].sum()) > 3
            expected = [*states[-2], *actions[-1], actions[-1][0], *states[-1], end]
            assert np.allclose(row, expected, rtol=1e-4, atol=1e-5) and told is not over
            over = over or end
    assert 0 < valid.sum() < valid.numel() and torch.allclose(torch.tanh(drawn), rows[:, :, 2:4])


@pytest.mark.parametrize("mean", [0.0, 30.0])  # of which the tanh is 1 to the last bit
def test_the_loss_is_reinforce_with_a_baseline(mean):
    """At zero weights V is 0 and the Gaussian has standard deviation 1: the gradient by hand at the heads' biases. A
    row behind an end counts nothing."""
    args = Args(gamma=0.9, return_lambda=1.0, entropy_weight=0.1)
    histories = Histories(args, linear_dataset(), CPU)
    agent = script.ActorCritic(args, histories)
    agent.actor.net[-1].bias.data[:2] = mean
    noise, reward = torch.randn(6, 2, 2), torch.randn(6, 2, 1)
    ends, valid = torch.zeros(6, 2, 1), torch.ones(6, 2, dtype=torch.bool)
    ends[0, 0], valid[0, 1] = 1, False
    obs = torch.randn(6, 2, 2)
    loss, told = agent.loss(torch.cat([obs, torch.tanh(mean + noise), reward, obs, ends], dim=2), valid, mean + noise)
    loss.backward()
    scaled = reward[..., 0] / histories.reward.abs().max()
    returns = torch.stack([scaled[:, 0] + 0.9 * scaled[:, 1] * (1 - ends[:, 0, 0]), scaled[:, 1]], dim=1)
    returns = (returns * valid)[..., None] / 11  # eleven rows count
    bias = agent.actor.net[-1].bias.grad
    assert torch.allclose(bias[:2], -(returns * noise).sum((0, 1)), atol=1e-4)
    assert torch.allclose(bias[2:], -(returns * (noise.square() - 1)).sum((0, 1)) - 0.1, atol=1e-4)
    assert torch.allclose(agent.vf.net[-1].bias.grad, -2 * returns.sum(), atol=1e-4)
    assert float(told["agent/entropy"]) == pytest.approx(math.log(2 * math.pi * math.e))


def test_the_linear_system_is_learned_and_the_actor_pushes_where_the_reward_is(monkeypatch):
    """s' = 0.9 s + 0.3 a and reward s_0, with which the first action alone pays."""
    args = Args(
        history=2, world_model_steps=280, world_model_batch_size=64, world_model_lr=3e-3, mlp_width=64, mlp_depth=2,
        reward_model_steps=140, reward_model_lr=3e-3, imagined_rollouts=32, imagination_horizon=5, agent_updates=50,
        agent_lr=3e-3, gamma=0.9,
    )  # fmt: skip
    run, histories = Training(), Histories(args, linear_dataset(), CPU)
    run.bounds = {}
    world_model = script.train_world_model(args, histories, run)
    reward_model = script.train_reward_model(args, histories, run)
    obs, action = histories.of(torch.arange(1000))
    made = script.sample_next(args, world_model, obs, action)
    assert (made - histories.next_obs[:1000]).std() < 0.08  # the states themselves: 0.4
    reward, ends = reward_model.sample(obs[:, -1], action[:, -1], made)
    assert (reward - histories.reward[:1000]).std() < 0.08 and not ends.any()
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    agent = script.train_agent(args, histories, world_model, reward_model, None, run)
    with torch.no_grad():
        assert agent.actor(histories.obs)[:, 0].mean() > 0.4
