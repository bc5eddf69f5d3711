"""variants/uncertain_td3bc.py: each row's uncertainty, what the agent gets of it.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

from types import SimpleNamespace

import dawm_td3bc
from variants import uncertain_td3bc as script

import numpy as np
import pytest
import torch
from toy import TINY, Training, linear_dataset

TRAINING = dict(world_model_lr=0.01, ema_decay=0.9, ema_start=0, model_horizon=2, horizon=2)
VALID = torch.tensor([[True, True, True], [True, True, False]])
UNCERTAINTY = torch.tensor([[0.1, 0.4, 0.2], [0.3, 0.2, 9.0]])


@pytest.fixture(scope="module")
def hole():
    """Of short episodes of the linear system, those that never take an action above 0.2 in the first dimension, and a
    world model trained on them -> its arguments, windows of all episodes, itself, and which pairs lie in the hole."""
    dataset = linear_dataset(episodes=600, length=3)
    missing = dataset.action[:, 0] > 0.2
    seen = ~missing.reshape(-1, 3).any(1)
    rest = linear_dataset(episodes=int(seen.sum()), length=3)
    for name in ("obs", "action", "reward", "next_obs"):
        setattr(rest, name, getattr(dataset, name)[seen.repeat(3)])
    args = script.Args(**TINY, **TRAINING, world_model_steps=300)
    world_model = script.train_world_model(args, script.Windows(args, rest, torch.device("cpu")), Training())
    return args, script.Windows(args, dataset, torch.device("cpu")), world_model, torch.as_tensor(missing)


# ---- The uncertainty


def test_distance_from_the_second_answer_by_hand():
    args = script.Args(**TINY)
    windows = script.Windows(args, linear_dataset(), torch.device("cpu"))
    world_model, asked = script.WorldModel(args, windows), []
    answer = torch.tensor([0.05, -0.1])
    world_model.denoiser.forward = lambda *given: (
        asked.append(given) or world_model.units.normalize(torch.cat([answer, torch.zeros(1)])).expand(given[0].shape)
    )
    obs, action = windows.obs[:4], windows.action[:4]
    off = torch.tensor([[0.0, 0.0], [0.3, 0.0], [0.0, -0.4], [0.3, -0.4]])
    answered = script.second_answer(args, world_model, obs, action)
    torch.testing.assert_close(answered, obs + answer)
    uncertainty = script.uncertainty_of(world_model, obs + answer + off, answered)
    a, b = windows.tokens[:, :2].std(0).tolist()  # changes of state, their ends' zeros too
    by_hand = [0, 0.3 / a / 2**0.5, 0.4 / b / 2**0.5, (((0.3 / a) ** 2 + (0.4 / b) ** 2) / 2) ** 0.5]
    assert uncertainty.tolist() == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    ((x, k, pair, _, keep),) = asked  # once, of nothing but the pair
    assert not x.any() and not keep.any() and (k == args.diffusion_steps).all() and len(x) == 4
    assert torch.equal(pair, world_model.pair(obs, action))


def test_larger_where_data_are_missing(hole):
    args, windows, world_model, missing = hole
    index = torch.arange(0, 1800, 3)
    obs, _ = script.imagine(args, windows, world_model, index)
    answer = script.second_answer(args, world_model, obs[:, 0], windows.action[index])
    uncertainty = script.uncertainty_of(world_model, obs[:, 1], answer)
    inside = missing[index]
    assert uncertainty[inside].mean() > 1.1 * uncertainty[~inside].mean()


def test_larger_for_an_action_that_does_not_explain_the_change(hole):
    args, windows, world_model, missing = hole
    index = (~missing).nonzero()[:, 0]
    row, action = windows.start[index], windows.action[index]
    answers = (script.second_answer(args, world_model, windows.obs[row], x) for x in (action, action.roll(1, 0)))
    own, others = (script.uncertainty_of(world_model, windows.obs[row + 1], answer) for answer in answers)
    assert others.mean() > 2 * own.mean()


def test_the_set_is_that_of_the_plain_method():
    args = script.Args(**TINY)
    windows = script.Windows(args, linear_dataset(), torch.device("cpu"))
    torch.manual_seed(1)
    parts = script.WorldModel(args, windows), script.InverseDynamics(args, windows.obs, windows.change, 2).eval()
    index = torch.arange(50)
    torch.manual_seed(2)
    rows, valid, uncertainty = script.complete_rollouts(args, windows, *parts, index)
    after = torch.rand(1)
    torch.manual_seed(2)
    plain = dawm_td3bc.complete_rollouts(args, windows, *parts, index)
    assert torch.equal(rows, plain[0]) and torch.equal(valid, plain[1]) and torch.equal(after, torch.rand(1))
    obs, action, _, next_obs, _ = rows[:, 5].split([2, 2, 1, 2, 1], dim=1)  # each row's own state and action
    expected = script.uncertainty_of(parts[0], next_obs, script.second_answer(args, parts[0], obs, action))
    torch.testing.assert_close(uncertainty[:, 5], expected, rtol=1e-4, atol=1e-5)


def test_a_fall_is_told_by_the_state_or_where_asked_by_the_second_answer():
    windows = SimpleNamespace(healthy=(torch.tensor([0.0]), torch.tensor([1.0])), is_over=lambda reward: reward < -9)
    obs, reward = torch.tensor([[0.5, 0.5, 0.5, 0.5, 1.2]])[..., None], torch.ones(1, 4)
    answer = torch.tensor([[0.5, -0.1, 0.5]])[..., None]  # of the first three steps, the second of which falls
    for termination, ends, kept in (
        ("rule", [0, 0, 0], [1, 1, 1]), ("asked", [0, 1, 0], [1, 1, 0]), ("none", [0, 0, 0], [1, 1, 1])
    ):  # fmt: skip
        args = script.Args(horizon=2, model_horizon=3, termination=termination)
        terminated, _, valid = script.mark_ends(args, windows, obs, reward, answer)
        assert terminated.int().tolist() == [ends] and valid.int().tolist() == [kept]
    fallen = script.mark_ends(script.Args(horizon=2, termination="asked"), windows, obs - 0.5, reward, answer)
    assert fallen[0].all()  # the generated state alone is told too


# ---- What the agent gets


ALL = [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    "use, kept, penalty",
    [  # the valid ones are 0.1, 0.2, 0.2, 0.3, 0.4
        (dict(uncertainty_use="none"), ALL, 0),
        (dict(uncertainty_use="drop", uncertainty_quantile=1.0), ALL, 0),
        (dict(uncertainty_use="drop", uncertainty_quantile=0.75), [[1, 0, 0], [1, 1, 0]], 0),  # 0.3: what follows too
        (dict(uncertainty_use="drop", uncertainty_quantile=0.5), [[1, 0, 0], [0, 0, 0]], 0),  # 0.2
        (dict(uncertainty_use="penalty", uncertainty_penalty=2.0), ALL, 2),  # in standard deviations of real rewards
    ],
)
def test_rows_beyond_the_quantile_go_or_rewards_are_lowered_and_nothing_else(use, kept, penalty):
    before = torch.rand(2, 3, 8)  # obs, action, reward, next_obs, terminated of two dimensions each
    args, dataset = script.Args(**TINY, **use), linear_dataset()
    rows, valid = script.heed_uncertainty(args, dataset, before.clone(), VALID, UNCERTAINTY)
    lowered = before[..., 4] - penalty * np.std(dataset.reward) * UNCERTAINTY
    torch.testing.assert_close(rows[..., 4], lowered, rtol=1e-5, atol=1e-6)
    rows[..., 4] = before[..., 4]
    assert torch.equal(rows, before) and valid.int().tolist() == kept
