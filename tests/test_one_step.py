"""baselines/one_step.py: ensemble, rollouts and targets by hand, what it learns.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

from dataclasses import replace

import dawm_td3bc
from baselines import one_step as script
from baselines.one_step import Args, Windows

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy import Training, linear_dataset

CPU = torch.device("cpu")

# ---- Section 3: the ensemble


def test_each_member_is_a_perceptron_of_its_own():
    networks, x = script.Networks(3, [4, 8, 8, 2]), torch.randn(3, 5, 4)
    for member in range(3):
        h = x[member]
        for layer in range(3):
            h = h @ networks.weights[layer][member] + networks.biases[layer][member]
            h = F.silu(h) if layer < 2 else h
        torch.testing.assert_close(networks(x)[member], h)


def test_the_loss_is_the_gaussians_likelihood():
    ensemble = script.GaussianEnsemble(Args(ensemble_size=2, ensemble_width=8), 3, 2)
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 2)
    mean, variance = ensemble(x)
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(ensemble.loss(x, y), expected)
    drawn = ensemble.sample(x.repeat(1, 4000, 1)).unflatten(1, (4000, 6)).transpose(0, 1)
    assert ((drawn.mean(0) - mean).abs() < 0.1 * variance.sqrt()).all()  # six standard errors
    assert (drawn.var(0) / variance - 1).abs().max() < 0.2


@pytest.mark.parametrize("size", [1, 2, 7, 9])
def test_each_row_is_dealt_to_one_member_and_comes_back_to_its_place(size):
    world_model = script.WorldModel(Args(ensemble_size=3, ensemble_width=8), Windows(linear_dataset(), CPU))
    x = torch.arange(2.0 * size).view(size, 2)
    dealt, places = world_model.deal(x)
    assert dealt.shape == (3, -(-size // 3), 2) and torch.equal(dealt.flatten(0, 1)[places], x)
    owners = torch.stack([world_model.deal(x)[1] // dealt.shape[1] for _ in range(200)])
    assert (owners.float().std(0) > 0).all() or size < 3  # not always the same member


def test_each_part_keeps_the_weights_that_were_best_for_it(monkeypatch):
    """Held-out losses that are best at the first, the second and the third of three looks."""
    told, seen, losses = iter(([1, 2, 3], [2, 1, 2], [3, 3, 1])), [], script.WorldModel.losses

    def looked(world_model, *given):
        if torch.is_grad_enabled():
            return losses(world_model, *given)
        seen.append({name: value.clone() for name, value in world_model.state_dict().items()})
        return dict(zip(script.PARTS, map(torch.tensor, next(told)), strict=True))

    monkeypatch.setattr(script.WorldModel, "losses", looked)
    args = Args(world_model_steps=6, log_every=2, world_model_lr=1e-2, ensemble_width=8, world_model_batch_size=8)
    best = script.train_world_model(args, Windows(linear_dataset(), CPU), Training()).state_dict()
    for part, at in zip(script.PARTS.values(), seen, strict=True):
        names = [name for name in best if name.startswith(f"{part}.")]
        assert all(torch.equal(best[name], at[name]) for name in names)
        assert all(not torch.equal(best[name], x[name]) for name in names for x in seen if x is not at)


def test_rollouts_obey_the_linear_system():
    """Whoever acts, where an episode ends with the next s_0 above 0.5. Errors of single steps, where an action moves
    the state by 0.15 on average.
    """
    args = Args(world_model_steps=200, world_model_lr=5e-3, world_model_batch_size=128, log_every=50, horizon=3)
    args.ensemble_size, args.ensemble_width, args.ensemble_layers = 2, 32, 3
    dataset = linear_dataset(episodes=100)
    windows = Windows(replace(dataset, terminated=dataset.next_obs[:, 0] > 0.5), CPU)
    world_model = script.train_world_model(args, windows, Training())
    torch.manual_seed(0)
    index = torch.arange(len(windows.action))
    pair = windows.obs[windows.start], windows.action
    for act in (None, lambda obs: -obs.clamp(-0.9, 0.9)):
        obs, action, ended, reward = script.sample_rollouts(args, world_model, *pair, act)
        assert obs.shape == (3000, 5, 2) and torch.equal(obs[:, 0], pair[0]) and torch.equal(action[:, 0], pair[1])
        inside = (obs.abs() < 0.8).all(-1)[:, :-1]  # where the data are dense
        error = (obs[:, 1:] - 0.9 * obs[:, :-1] - 0.3 * action)[inside]
        assert error.abs().mean() < 0.01 and (reward - obs[:, :-1, 0])[inside].abs().mean() < 0.02
        sure = inside & ((obs[:, 1:, 0] - 0.5).abs() > 0.1)
        assert (ended == (obs[:, 1:, 0] > 0.5))[sure].float().mean() > 0.97
        if act is None:  # uniform in [-0.95, 0.95]: a Gaussian of the same mean and spread, cut there
            assert action[:, 1:].mean().abs() < 0.05 and 0.4 < action[:, 1:].std() < 0.6
        else:
            torch.testing.assert_close(action[:, 1:], act(obs[:, 1:-1]))
    rows, valid = script.complete_rollouts(args, windows, world_model, index)
    terminated = rows[..., -1].bool()
    assert terminated.any() and torch.equal(valid, torch.cumsum(terminated, 1) - terminated.int() == 0)


# ---- Sections 5 and 6: ends, and the critics' targets


def test_ends_are_the_models_own_or_those_of_the_rule():
    windows = Windows(linear_dataset(), CPU)
    windows.healthy = -torch.ones(2), torch.ones(2)
    obs = torch.tensor([[0.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])[..., None].repeat(1, 1, 2)
    ended = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
    terminated, valid = script.mark_ends(Args(), windows, obs, ended)
    assert terminated.int().tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert valid.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    terminated, valid = script.mark_ends(Args(termination="none"), windows, obs, ended)
    assert not terminated.any() and valid.all()


def test_targets_of_one_step_are_dawms_and_of_more_steps_by_hand():
    args, rows = Args(policy_noise=0), torch.randn(6, 3, 8)
    rows[..., -1] = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0]]).repeat(2, 1)
    agent = script.TD3BC(args, torch.randn(50, 2), 2)
    next_obs, reward, ended = rows[..., 5:7], rows[..., 4], rows[..., 7]
    expected = dawm_td3bc.TD3BC.td_target(agent, reward[:, 0], next_obs[:, 0], ended[:, 0])
    value = agent.target_value(next_obs[:, 2])
    assert agent.update(rows[:, :1], False)["agent/qf_target"].item() == pytest.approx(expected.mean().item(), abs=1e-6)
    sums = []
    for b in range(6):
        total, discount, alive = 0.0, 1.0, 1.0
        for step in range(3):
            total += discount * alive * float(reward[b, step])
            discount, alive = discount * args.gamma, alive * (1 - float(ended[b, step]))
        sums.append(total + discount * alive * float(value[b]))
    assert agent.update(rows, False)["agent/qf_target"].item() == pytest.approx(np.mean(sums), abs=1e-5)
