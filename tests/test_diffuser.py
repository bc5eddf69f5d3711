"""baselines/diffuser.py: windows, losses, guidance and planner by hand and against oracles.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

from dataclasses import replace

from baselines import diffuser as script
from baselines.diffuser import Args

import numpy as np
import pytest
import torch
from toy import Function, Training, linear_dataset

SMALL = dict(env_id="linear", unet_width=16, unet_multipliers=(1, 2), device="cpu", plan_horizon=4, diffusion_steps=5)


def make_model(dataset=None, **changes):
    """In float64, so that what must be equal is equal to its rounding on any machine."""
    args = Args(**SMALL | changes)
    script.fill_in(args)
    windows = script.Windows(args, dataset or linear_dataset(), torch.device("cpu"))
    windows.tokens = windows.tokens.double()
    return args, windows, script.Diffuser(args, windows).double().eval()


def test_other_data_get_the_values_of_the_task_that_they_are_most_like():
    for env_id, kind in (("local/halfcheetah/medium-v0", script.HALFCHEETAH), ("own/pendulum-v0", script.HOPPER)):
        args = Args(env_id=env_id)
        script.fill_in(args)
        assert (args.plan_horizon, args.unet_multipliers, args.guide_stop) == (*kind[:2], kind[3])
        assert args.guide_scale is None
    assert script.GUIDE_SCALES[script.usual(Args(env_id="mujoco/HalfCheetah/medium-v0"))] == 0.4


@pytest.mark.parametrize("terminated", [True, False])
def test_windows_against_a_plain_loop(terminated):
    """Window i starts at real pair i; after a fall it repeats the last state with action 0, and the fall costs 3."""
    dataset, gamma = linear_dataset(episodes=3, length=6, terminated=terminated), 0.9
    _, windows, _ = make_model(dataset, gamma=gamma, termination_penalty=3.0, world_model_holdout=0.5)
    rows = windows.rows(torch.arange(18))
    for pair in range(18):
        episode, step = divmod(pair, 6)
        assert windows.usable[pair] == (step + 4 <= 6 or terminated)
        for at in range(step, step + 4) if windows.usable[pair] else ():
            row, token = episode * 6 + min(at, 5), windows.tokens[rows[pair, at - step]].float().numpy()
            assert np.array_equal(token[:2], dataset.action[row] if at < 6 else np.zeros(2))
            assert np.array_equal(token[2:], dataset.obs[row] if at < 6 else dataset.next_obs[row])
        by_hand = sum(gamma**i * r for i, r in enumerate(dataset.reward[pair : episode * 6 + 6].astype(float)))
        by_hand -= terminated * 3 * gamma ** (5 - step)
        assert windows.return_to_go[pair].item() == pytest.approx(by_hand, rel=1e-6, abs=1e-6)
    train, held_out = (set(index.tolist()) for index in (windows.train, windows.held_out))
    assert train | held_out == set(windows.usable.nonzero()[:, 0].tolist())
    assert len({pair // 6 for pair in train}) == 1 and not {pair // 6 for pair in train & held_out}


def test_parameter_counts_of_the_published_networks():
    """Those of Diffuser's own code for Hopper: TemporalUnet(32, 14, 11), ValueFunction(32, 14, 11)."""
    sizes = 32, (1, 2, 4, 8)
    for network, count in (
        (script.TemporalUNet(14, *sizes), 3_956_302),
        (script.ReturnNetwork(14, 32, *sizes), 2_294_817),
    ):
        assert sum(p.numel() for p in network.parameters()) == count and f"{count:,}" in type(network).__doc__


def test_losses_by_hand():
    """The first action weighs 10, the known first state errs by 0; the return errs in standard deviations."""
    _, _, model = make_model()
    x0 = torch.randn(3, 4, 4).double()
    loss = model.loss(Function(lambda x, k: torch.full_like(x, 0.25)), x0, None)
    squares = (0.25 - x0.numpy()) ** 2
    squares[:, 0, :2] *= 10
    squares[:, 0, 2:] = 0
    assert loss.item() == pytest.approx(squares.mean(), rel=1e-14)
    label = model.return_mean + model.return_std * torch.tensor([0.0, 1.0, 2.0]).double()
    loss = model.value_loss(Function(lambda x, k: torch.full((len(x),), 0.5).double()), x0, label)
    assert loss.item() == pytest.approx((0.25 + 0.25 + 2.25) / 3, rel=1e-14)


def test_guidance_by_hand():
    """K = 2, no noise, a denoiser that changes nothing, J linear in the plan: two steps of Sigma_2 times its slope, at
    k = 2 alone, and none in the known first state."""
    args, _, model = make_model(diffusion_steps=2, guide_steps=2, guide_stop=1, guide_scale=0.3)
    slope, first = torch.randn(4, 4).double(), torch.randn(5, 2).double()
    model.denoiser, model.value = Function(lambda x, k: x), Function(lambda x, k: (x * slope).sum((1, 2)))
    plans, value = script.sample_plans(args, model, first, lambda: torch.zeros(5, 4, 4).double())
    weight_x0, weight_x_k, std = script.posterior_coefficients(script.cosine_alpha_bar(2), [1, 2])[1]
    moved = 2 * 0.3 * std**2 * model.return_std * slope * (weight_x0 + weight_x_k)
    expected = torch.cat([moved[:1, :2].expand(5, 2), first], 1)[:, None]
    expected = torch.cat([expected, moved[1:].expand(5, 3, 4)], dim=1)
    torch.testing.assert_close(plans, expected, rtol=0, atol=1e-12)
    returns = model.return_mean + model.return_std * (expected * slope).sum((1, 2))
    torch.testing.assert_close(value, returns, rtol=0, atol=1e-12)
    assert (moved.abs() > 1e-3).any()


def test_with_an_oracle_the_plan_is_its_own_and_every_call_sees_the_first_state():
    args, windows, model = make_model(guide_scale=0.1, guide_stop=0)
    plan, seen = model.units.normalize(windows.tokens[windows.rows(torch.arange(6))]), []
    model.denoiser = Function(lambda x, k: seen.append(x[:, 0, 2:]) or plan)
    model.value.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, 0, 2:].detach().clone()))
    made, _ = script.sample_plans(args, model, plan[:, 0, 2:], lambda: torch.randn(6, 4, 4).double())
    torch.testing.assert_close(made, plan, rtol=0, atol=1e-12)
    assert len(seen) == 5 + 2 * 5 + 1 and all(torch.equal(x, plan[:, 0, 2:]) for x in seen)


def test_the_planner_takes_the_best_plan_and_no_episode_depends_on_another():
    """Values by hand: the plan whose first action is the largest, in the place of the noise it was drawn as."""
    args, windows, model = make_model(plans=7, guide_steps=0)
    model.value = Function(lambda x, k: x[:, 0, 0])
    model.denoiser = Function(lambda x, k: x.clamp(-1, 1) * 0.1)
    obs = windows.obs[[0, 40, 80]].numpy().astype(float)
    planner = script.Planner(args, model, 3, torch.device("cpu"))
    generator = torch.Generator().manual_seed(args.seed)
    noise = [torch.randn(3, 7, 4, 4, generator=generator) for _ in range(1 + args.diffusion_steps)]
    first = model.first(torch.as_tensor(obs)).repeat_interleave(7, 0)
    draws = iter(noise)
    plans, _ = script.sample_plans(args, model, first, lambda: next(draws).flatten(0, 1).double())
    together = planner(obs, np.arange(3))
    for episode in range(3):
        firsts = plans.view(3, 7, 4, 4)[episode, :, 0]
        best = model.units.denormalize(firsts[firsts[:, 0].argmax()])[:2]
        np.testing.assert_allclose(together[episode], best.numpy(), rtol=0, atol=1e-6)  # noise is float32
        alone = script.Planner(args, model, 3, torch.device("cpu"))(obs[[episode]], np.array([episode]))
        np.testing.assert_allclose(alone[0], together[episode], rtol=0, atol=1e-6)


def test_it_learns_plans_that_the_system_obeys_and_guidance_makes_better():
    """Linear system whose reward is its first state: the best first action pushes that up, and leaves the second."""
    args = Args(**SMALL, world_model_steps=200, value_steps=150, world_model_lr=5e-3, ema_decay=0.9, ema_start=0)
    args = replace(args, gamma=0.8, plans=16, guide_steps=1, guide_stop=1)
    script.fill_in(args)
    dataset = linear_dataset()
    windows = script.Windows(args, dataset, torch.device("cpu"))
    model, run, made = script.Diffuser(args, windows).eval(), Training(), []
    script.train_world_model(args, windows, model, run)
    script.train_value(args, windows, model, run)
    assert run.logged["value/val_loss"][-1] < 0.6  # 1 knows nothing
    first = model.first(windows.obs[windows.start[::9]])
    for scale in (0.0, 100 / model.return_std.item()):
        args.guide_scale = scale
        torch.manual_seed(0)
        plans = model.units.denormalize(
            script.sample_plans(args, model, first, lambda: torch.randn(len(first), 4, 4))[0]
        )
        made.append((plans[..., :2], plans[..., 2:]))
    for (action, obs), bound in zip(made, (0.17, 0.2), strict=True):  # 0.23 if actions had nothing to do with states
        error = obs[:, 1:] - 0.9 * obs[:, :-1] - 0.3 * action[:, :-1]
        assert error.square().mean().sqrt() < bound
    assert made[1][1][:, 1:, 0].mean() - made[0][1][:, 1:, 0].mean() > 0.2 * dataset.obs[:, 0].std()
    action = script.Planner(args, model, 40, torch.device("cpu"))(dataset.obs[::30], np.arange(40)).mean(0)
    assert action[0] > 0.3 and abs(action[1]) < 0.2
