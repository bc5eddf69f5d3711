"""baselines/decision_diffuser.py: windows, losses, sampler and planner against oracles and plain loops.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

import sys
from dataclasses import replace

from baselines import decision_diffuser as script
from baselines.decision_diffuser import LAPTOP, PRESETS, Args
from common.cli import check_ranges, parse_args

import numpy as np
import pytest
import torch
from toy import Function, Oracle, Training, linear_dataset

SMALL = dict(env_id="linear", unet_width=16, unet_multipliers=(1, 2), device="cpu")
SMALL |= dict(plan_horizon=8, idm_width=16, target_return=0.5)


def make_windows(dataset=None, **changes):
    return script.Windows(Args(**SMALL | changes), dataset or linear_dataset(), torch.device("cpu"))


def make_model(dataset=None, **changes):
    """In float64, so that what must be equal is equal to its rounding on any machine."""
    args, windows = Args(**SMALL | changes), make_windows(dataset, **changes)
    windows.obs = windows.obs.double()
    return args, windows, script.DecisionDiffuser(args, windows).double().eval()


def normal(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


# ---- Section 2: windows


@pytest.mark.parametrize("terminated", [True, False])
def test_windows_against_a_plain_loop(terminated):
    """Window i starts at real pair i; after a fall it repeats the last state and knows no action."""
    dataset = linear_dataset(episodes=3, length=10, terminated=terminated)
    windows = make_windows(dataset, world_model_holdout=0.5)
    rows = windows.rows(torch.arange(30))
    for pair in range(30):
        episode, step = divmod(pair, 10)
        fits = step + 7 <= 10  # 11 states hold 4 windows of 8
        assert windows.usable[pair] == (fits or terminated)
        for at in range(step, step + 8) if windows.usable[pair] else ():
            row = episode * 10 + min(at, 9)
            state = dataset.obs[row] if at < 10 else dataset.next_obs[row]
            assert np.array_equal(windows.obs[rows[pair, at - step]], state)
            action = windows.action[rows[pair, at - step]].numpy()
            assert np.array_equal(action, dataset.action[row]) if at < 10 else np.isnan(action).all()
    train, held_out = (set(index.tolist()) for index in (windows.train, windows.held_out))
    assert train | held_out == set(windows.usable.nonzero()[:, 0].tolist())
    assert len({pair // 10 for pair in train}) == 1 and not {pair // 10 for pair in train & held_out}


def test_the_penalty_is_taken_from_the_last_reward_of_a_fallen_episode():
    fallen, gamma = linear_dataset(episodes=2, length=3, terminated=True), 0.9
    fallen.reward[:] = 1
    windows = make_windows(fallen, plan_horizon=4, gamma=gamma, termination_penalty=3)
    by_hand = np.array([1 + gamma - gamma**2 * 2, 1 - gamma * 2, -2] * 2)
    labels = windows.return_to_go.double() * windows.return_scale + windows.return_offset
    np.testing.assert_allclose(labels, by_hand, rtol=0, atol=4 * np.finfo(np.float32).eps)


# ---- Section 3: network, losses, sampler


def test_parameter_count_of_the_published_network():
    """59,732,491: the count of DD's own code for Hopper."""
    count = sum(p.numel() for p in script.TemporalUNet(11, 128, (1, 4, 8)).parameters())
    assert count == 59_732_491 and f"{count:,}" in script.TemporalUNet.__doc__


def test_a_dropped_return_does_not_reach_the_output():
    *_, model = make_model()
    x, k, low, high = torch.randn(4, 8, 2).double(), torch.arange(1, 5), torch.zeros(4, 1).double(), torch.ones(4, 1)
    assert torch.equal(model.denoiser(x, k, low, 0 * high), model.denoiser(x, k, high.double(), 0 * high))
    assert not torch.allclose(model.denoiser(x, k, low, high), model.denoiser(x, k, high.double(), high))


def test_losses_by_hand():
    """The first state has no part in the first loss, a pair without action none in the second."""
    *_, model = make_model(prediction="x0")
    x0, action = torch.randn(3, 8, 2).double(), torch.rand(3, 8, 2).double()
    action[1, 4:], action[:, 7] = torch.nan, torch.nan
    model.denoiser = Function(lambda x, *_: torch.full_like(x, 0.25))
    model.inverse_dynamics = Function(lambda obs, next_obs: 2 * obs + next_obs)
    state_loss, action_loss = model.losses(x0, action, None, None)
    squares = [(0.25 - x0[b, i, d]) ** 2 for b in range(3) for i in range(1, 8) for d in range(2)]
    assert state_loss.item() == pytest.approx(np.mean(squares), rel=1e-14)
    squares = [
        (2 * x0[b, i, d] + x0[b, i + 1, d] - action[b, i, d]) ** 2
        for b in range(3) for i in range(7) for d in range(2) if not (b == 1 and i >= 4)
    ]  # fmt: skip
    assert action_loss.item() == pytest.approx(np.mean(squares), rel=1e-14)


@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_with_an_oracle_any_number_of_steps_gives_its_plan_and_sees_its_first_state(prediction, steps, warm):
    args, windows, model = make_model(prediction=prediction, sampling_steps=steps, warm_start_steps=5)
    plan, seen = model.units.normalize(windows.obs[windows.rows(torch.arange(4))]), []
    model.denoiser = Oracle(args, plan.repeat(2, 1, 1), script.cosine_alpha_bar(args.diffusion_steps))
    model.denoiser.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 0].clone()))
    previous = torch.randn_like(plan) if warm else None
    made = script.sample_plans(args, model, plan[:, 0], torch.zeros(4, 1), normal(4, 8, 2), previous)
    torch.testing.assert_close(made, plan, rtol=0, atol=1e-12)
    assert len(seen) == steps and all(torch.equal(x, plan[:, 0].repeat(2, 1)) for x in seen)


@pytest.mark.parametrize("scale, expected", [(0.0, -1.0), (1.0, 1.0), (1.5, 2.0)])
def test_guidance_by_hand(scale, expected):
    """With x0 prediction and one step the plan is the guided prediction: uncond + scale (cond - uncond)."""
    args, _, model = make_model(prediction="x0", sampling_steps=1, guidance_scale=scale)
    model.units.low, model.units.high = -torch.full((2,), 9.0), torch.full((2,), 9.0)
    model.denoiser = Function(lambda x, k, return_to_go, keep: (2 * keep - 1)[:, :, None].expand_as(x))
    plans = script.sample_plans(args, model, torch.zeros(4, 2), torch.zeros(4, 1), normal(4, 8, 2))
    assert torch.equal(plans[:, 1:], torch.full((4, 7, 2), expected).double())


# ---- Section 6: planner


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_the_planner_reaches_the_second_state_of_an_oracle_plan(prediction):
    """s' = 0.9 s + 0.3 a: with the true plan and the true inverse, the system goes where the plan goes."""
    args, windows, model = make_model(prediction=prediction)
    plan = windows.obs[windows.rows(torch.arange(0, 100, 20))]
    units, alpha_bar = model.units, script.cosine_alpha_bar(args.diffusion_steps)
    model.denoiser = Oracle(args, units.normalize(plan).repeat(2, 1, 1), alpha_bar)
    model.inverse_dynamics = Function(lambda s, after: (units.denormalize(after) - 0.9 * units.denormalize(s)) / 0.3)
    planner = script.Planner(args, model, 5, torch.device("cpu"))
    planner.plans = planner.plans.double()
    action = planner(plan[:, 0].numpy(), np.arange(5))
    np.testing.assert_allclose(0.9 * plan[:, 0].numpy() + 0.3 * action, plan[:, 1].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("warm_start_steps", [0, 3])
def test_a_batch_of_episodes_equals_one_episode_at_a_time(warm_start_steps):
    """Three episodes of a linear system that end after 6, 2 and 4 steps."""
    args, windows, model = make_model(warm_start_steps=warm_start_steps)
    lengths, start = np.array([6, 2, 4]), windows.obs[[0, 40, 80]].numpy()

    def episodes(numbers):
        planner = script.Planner(args, model, 3, torch.device("cpu"))
        planner.plans, planner.target = planner.plans.double(), planner.target.double()
        obs, actions = start.copy(), {i: [] for i in numbers}
        for step in range(6):
            running = np.array([i for i in numbers if step < lengths[i]])
            if len(running):
                made = planner(obs[running], running)
                obs[running] = 0.9 * obs[running] + 0.3 * made
                for i, action in zip(running, made, strict=True):
                    actions[i].append(action)
        return actions

    together = episodes([0, 1, 2])
    for i in range(3):
        np.testing.assert_allclose(episodes([i])[i], together[i], rtol=0, atol=1e-10)
        assert len(together[i]) == lengths[i]
    assert not np.allclose(together[0][0], together[1][0], atol=1e-3)


def test_a_warm_start_denoises_the_last_plan_from_the_stated_step():
    """K = 5, N = 3 visits 5, 3, 1: three calls of the network for the first plan, then two from the shifted plan."""
    args, windows, model = make_model(warm_start_steps=4)
    calls, obs = [], windows.obs[:3].numpy()
    model.denoiser.register_forward_pre_hook(lambda _, given: calls.append((int(given[1][0]), given[0][:3].clone())))
    planner = script.Planner(args, model, 3, torch.device("cpu"))
    planner.plans, planner.target = planner.plans.double(), planner.target.double()
    planner(obs, np.arange(3))
    plan, generator = planner.plans.clone(), torch.Generator().manual_seed(args.seed)
    *_, noise = (torch.randn(3, 8, 2, generator=generator).double() for _ in range(5))  # four for the first plan
    planner(obs, np.arange(3))
    assert [k for k, _ in calls] == [5, 3, 1, 3, 1]
    shifted, alpha_bar = torch.cat([plan[:, 1:], plan[:, -1:]], dim=1), model.alpha_bar[3]
    expected = alpha_bar.sqrt() * shifted + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(calls[3][1][:, 1:], expected[:, 1:], rtol=0, atol=1e-14)


# ---- Learning


def test_it_learns_to_plan_what_the_system_can_do_and_more_for_a_higher_return():
    """Linear system whose reward is its first state: a plan asked for more has a larger one; actions are the true ones.

    Chance explains none of it: targets are the data's 10th and 90th percentile, on the same noise.
    """
    args = Args(**SMALL, prediction="x0", normalizer="gaussian", world_model_steps=200, world_model_lr=5e-3)
    args = replace(args, ema_decay=0.9, ema_start=0, idm_width=64, idm_dropout=0.0)
    dataset = linear_dataset(episodes=300)
    windows = script.Windows(args, dataset, torch.device("cpu"))
    model = script.train_decision_diffuser(args, windows, Training())
    assert not model.training
    first, made = model.units.normalize(windows.obs[windows.start[::9]]), []
    for share in (0.1, 0.9):
        target = windows.return_to_go.quantile(share).expand(len(first), 1)
        torch.manual_seed(0)
        plans = script.sample_plans(args, model, first, target, lambda: torch.randn(len(first), 8, 2))
        made.append(model.units.denormalize(plans))
    assert (made[1][:, 1:, 0].mean() - made[0][:, 1:, 0].mean()) > 0.3 * dataset.obs[:, 0].std()
    reach = (made[1][:, 1] - 0.9 * made[1][:, 0]) / 0.3  # the action that would lead there; in the data, below 0.95
    assert (reach.abs() < 1.3).float().mean() > 0.95
    with torch.no_grad():
        obs, after = (model.units.normalize(torch.as_tensor(x[:2000])) for x in (dataset.obs, dataset.next_obs))
        error = model.inverse_dynamics(obs, after) - torch.as_tensor(dataset.action[:2000])
    assert error.square().mean() < 0.03  # variance of the actions: 0.3


# ---- The command line


def parsed(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["decision_diffuser.py", *words.split()])
    return parse_args(Args, LAPTOP, PRESETS)


def test_a_flag_wins_over_laptop_and_laptop_over_a_preset(monkeypatch):
    assert parsed(monkeypatch, "") == Args()
    original = Args(preset="original", **PRESETS["original"])
    assert parsed(monkeypatch, "--preset original") == parsed(monkeypatch, "--preset=original") == original
    assert (original.diffusion_steps, original.sampling_steps, original.plan_horizon) == (200, 200, 100)
    both = replace(original, laptop=True, **LAPTOP)
    assert parsed(monkeypatch, "--preset original --laptop --unet-width 64") == replace(both, unet_width=64)
    for args in (Args(), original, both):
        check_ranges(args), script.check_args(args)
