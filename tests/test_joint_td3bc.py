"""variants/joint_td3bc.py: actions sampled with the states.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

from variants import joint_td3bc as script

import numpy as np
import pytest
import torch
from toy import TINY, Training, in_default_dtype, linear_dataset


def make_model(dataset=None, **changes):
    args = script.Args(**TINY | changes)
    windows = script.Windows(args, dataset or linear_dataset(), torch.device("cpu"))
    in_default_dtype(windows)
    return args, windows, script.WorldModel(args, windows).to(torch.get_default_dtype())


# ---- Tokens


@pytest.mark.parametrize("terminated", [True, False])
def test_a_token_holds_the_action_taken_in_its_state_and_0_after_the_end(terminated):
    dataset = linear_dataset(episodes=3, length=6, terminated=terminated)
    _, windows, _ = make_model(dataset, model_horizon=3)
    token = script.tokens(windows)[windows.rows(torch.arange(18))].numpy()
    for pair in windows.usable.nonzero()[:, 0].tolist():
        end = pair - pair % 6 + 5  # last transition of the episode
        for step in range(5):
            row = pair + step
            brings = [*(dataset.next_obs - dataset.obs)[row], *dataset.action[row]] if row <= end else [0] * 4
            np.testing.assert_array_equal(token[pair, step, :4], brings)
    np.testing.assert_array_equal(token[..., 4], windows.reward[windows.rows(torch.arange(18))].numpy())


# ---- What is known


def test_the_given_pair_survives_to_the_bit_and_all_else_stays_in_the_data_range(double):
    """Whatever an untrained network says, with targets far away too."""
    args, windows, world_model = make_model()
    obs, action = windows.obs[:50], windows.action[:50] * 0.98765
    target = torch.full((50, 1), 50.0)
    made_obs, made_action, made_reward = script.sample_rollouts(args, world_model, obs, action, target)
    assert made_obs.shape == (50, 9, 2) and made_action.shape == (50, 8, 2) and made_reward.shape == (50, 8)
    assert torch.equal(made_obs[:, 0], obs) and torch.equal(made_action[:, 0], action)
    assert ((made_obs >= windows.obs.amin(0)) & (made_obs <= windows.obs.amax(0))).all()
    low, high = windows.action.amin(0) - 1e-6, windows.action.amax(0) + 1e-6  # the units are stored in float32
    assert made_action[:, 1:].std() > 0.1 and ((made_action > low) & (made_action < high)).all()


def test_sampler_with_an_oracle_returns_its_window(double):
    args, windows, world_model = make_model()
    rows = windows.rows(torch.tensor([4]))
    token = script.tokens(windows)[rows[:, :-1]]
    world_model.denoiser.forward = lambda x, *_: world_model.units.normalize(token).expand_as(x)
    first, action = windows.obs[rows][:, 0], windows.action[[4]]
    made = script.sample_rollouts(args, world_model, first, action, torch.zeros(1, 1))
    # Eight changes of order one, each rounded to float32 when the windows were made.
    for x, real in zip(made, (windows.obs[rows], token[..., 2:4], token[..., 4]), strict=True):
        torch.testing.assert_close(x, real, rtol=0, atol=8 * 2**-23)


@pytest.mark.parametrize("horizon", [7, 3])
def test_a_row_has_states_actions_and_rewards_of_one_rollout(horizon, double):
    args, windows, world_model = make_model(horizon=horizon, termination="none")
    index, steps = torch.arange(20), horizon + 1
    torch.manual_seed(3)
    rows, valid = script.complete_rollouts(args, windows, world_model, index)
    torch.manual_seed(3)
    obs, action, reward = script.imagine(args, windows, world_model, index)
    assert rows.shape == (20, steps, 8) and valid.all() and torch.equal(action[:, 0], windows.action[:20])
    expected = (obs[:, :steps], action[:, :steps], reward[:, :steps, None], obs[:, 1 : steps + 1], 0 * rows[..., -1:])
    assert all(torch.equal(a, b) for a, b in zip(rows.split([2, 2, 1, 2, 1], dim=-1), expected, strict=True))


# ---- Learning on the linear system


def test_generated_actions_explain_the_generated_states():
    """a = (s' - 0.9 s) / 0.3 from generated states: far nearer to the rollout's own action than to another rollout's.

    Their ratio is 0.3 to 0.55 (six seeds), and 1 where the tokens hold the action of the step before.
    """
    args = script.Args(**TINY, world_model_steps=260, world_model_lr=0.01, ema_decay=0.9, ema_start=0, model_horizon=2)
    windows = script.Windows(args, linear_dataset(episodes=100), torch.device("cpu"))
    world_model = script.train_world_model(args, windows, Training())
    index = torch.arange(0, 2000, 3)
    state, action = windows.obs[windows.start[index]], windows.action[index]
    obs, made, _ = script.sample_rollouts(args, world_model, state, action, windows.return_to_go[index, None])
    inverse = (obs[:, 1:] - 0.9 * obs[:, :-1]) / 0.3
    others = made.roll(1, dims=0)
    for step in (1, 2):  # generated; the first is given
        own, chance = ((x[:, step] - inverse[:, step]).square().mean().sqrt() for x in (made, others))
        assert own < 0.75 * chance and made[:, step].std() > 0.2  # nor is one action the answer to all
