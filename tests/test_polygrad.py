"""baselines/polygrad.py: windows, schedule, refinement, advantages and actor by hand; what it learns.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

import math
from dataclasses import replace

from baselines import polygrad as script
from baselines.polygrad import ActorCritic, Args, Windows
from common import UserError

import numpy as np
import pytest
import torch
from toy import Training, linear_dataset

CPU = torch.device("cpu")
SMALL = dict(env_id="linear", denoiser_width=128, denoiser_layers=1, diffusion_steps=16, window=4)

# ---- Sections 2 and 3


def test_windows_go_on_behind_a_fall_and_never_over_a_time_limit():
    dataset = replace(linear_dataset(episodes=2, length=6), complete=np.ones(2, bool))
    dataset.terminated[5] = True  # the first episode ends in a fall, the second at a time limit
    windows = Windows(Args(window=4), dataset, CPU)
    rows = windows.index(torch.arange(len(windows.start)))
    assert rows[:6].tolist() == [[min(start + h, 6) for h in range(4)] for start in range(6)]
    assert rows[6:].tolist() == [[7 + start + h for h in range(4)] for start in range(3)]
    assert np.array_equal(windows.obs[6], dataset.next_obs[5]) and not windows.action[6].any()
    assert windows.rows[:, 3].tolist() == [0, 0, 0, 0, 0, 1, 1] + 7 * [0]
    with pytest.raises(UserError, match="--window 7 needs 7 transitions in a row, but the longest episode has 6"):
        Windows(Args(window=7), linear_dataset(length=6), CPU)


def test_the_schedule_is_a_power_of_a_cosine():
    for tau, middle in ((1.0, 0.5), (0.1, 0.5**0.1)):  # cos(pi/4)^(2 tau)
        alpha_bar = script.cosine_alpha_bar(128, tau)
        assert alpha_bar[64].item() == pytest.approx(middle) and alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all()
        assert alpha_bar[128] / alpha_bar[127] == pytest.approx(0.001)  # noise_beta is clipped there
    assert script.schedule_tau(Args(env_id="hopper-medium-v2")) == 0.1
    assert script.schedule_tau(Args(env_id="halfcheetah-medium-v2")) == 1
    assert script.schedule_tau(Args(env_id="hopper-medium-v2", schedule_tau=0.5)) == 0.5


# ---- Section 5


def test_actions_are_clipped_and_climb_the_policys_log_density():
    mean, std = torch.zeros(2000, 3), torch.tensor([0.1, 0.5, 1.0]).expand(2000, 3)
    action = (1.5 * torch.randn(2000, 3)).requires_grad_()
    clipped = action.clamp(min=-3 * std, max=3 * std)
    torch.distributions.Normal(mean, std).log_prob(clipped).sum().backward()
    inside = (action.abs() < 3 * std).all(1)
    expected = action + 0.004 * action.grad
    moved = script.refine_actions(Args(), action.detach(), mean, std, 0.004)
    torch.testing.assert_close(moved[inside], expected[inside].detach())
    assert 0 < inside.float().mean() < 1 and (moved.abs() <= 3 * std).all()


def policy(args, windows, log_guidance):
    """An agent whose policy is a ~ N(-0.5 s, 0.4)."""
    agent = ActorCritic(args, windows.obs, 2)
    agent.log_guidance.fill_(log_guidance)
    agent.actor.distribution = lambda obs: (-0.5 * obs, torch.full_like(obs, 0.4))
    return agent


def test_windows_obey_the_linear_system_and_their_actions_the_policy():
    """Guidance moves what it should: without it the actions are the clipped noise that they began as."""
    args = Args(**SMALL, world_model_steps=800, world_model_lr=2e-3, ema_start=0, log_every=500)
    windows = Windows(args, linear_dataset(episodes=100), CPU)
    world_model = script.train_world_model(args, windows, Training())
    first, spreads = windows.obs[windows.start], {}
    for name, log_guidance in (("without", -20.0), ("with", math.log(0.01))):
        torch.manual_seed(0)
        made = script.imagine(args, world_model, policy(args, windows, log_guidance), first)
        obs, action = made["obs"], made["action"]
        assert torch.equal(obs[:, 0], first) and obs.shape == (len(first), 4, 2)
        spreads[name] = ((action + 0.5 * obs) / 0.4)[:, :-1].std().item()
        moved, action = obs[:, 1:] - 0.9 * obs[:, :-1], action[:, :-1]
        slope = (moved * action).mean() / action.square().mean()  # of least squares; 0 where actions are not heeded
        assert 0.25 < slope < 0.35 and (moved - 0.3 * action).abs().mean() < 0.1
        assert (made["reward"] - obs[..., 0]).abs().mean() < 0.1 and not made["terminated"].any()
    assert spreads["without"] > 1.6 and 0.9 < spreads["with"] < 1.4


# ---- Section 6


def test_advantages_against_a_plain_sum():
    reward, value = torch.randn(4, 6), torch.randn(4, 6)
    terminated = torch.zeros(4, 6)
    terminated[1, 2] = terminated[2, 0] = terminated[3, 4] = 1
    found = script.advantages(reward, terminated, value, 0.9, 0.8)
    for b in range(4):
        for start in range(5):
            total, weight = 0.0, 1.0
            for h in range(start, 5):
                going_on = 0.9 * (1 - float(terminated[b, h]))
                total += weight * float(reward[b, h] + going_on * value[b, h + 1] - value[b, h])
                weight *= 0.8 * going_on
            assert found[b, start].item() == pytest.approx(total, abs=1e-5)


def test_the_actor_moves_no_further_than_it_may_and_the_scale_follows_the_spread():
    args = Args(env_id="linear", actor_lr=3e-3, actor_step=0.01, grad_clip=100)
    agent, window = agent_and_window(args)
    pairs = window["obs"][:, :-1], window["action"][:, :-1]
    before, guidance = agent.actor.log_prob(*pairs), agent.log_guidance.item()
    losses = agent.update(window, torch.randn(8, 2), torch.randn(8, 2))
    assert 0.008 < (agent.actor.log_prob(*pairs) - before).abs().mean() < 0.012
    assert losses["agent/action_spread"] < 0.95  # the scale is wanted smaller
    expected = 3e-3 * (losses["agent/action_spread"].item() - 1)
    assert agent.log_guidance.item() - guidance == pytest.approx(expected, abs=3e-6)  # float32 at -5


def test_the_critic_learns_nothing_from_what_lies_behind_an_end():
    losses = []
    for changed in (False, True):
        agent, window = agent_and_window(Args(env_id="linear"))
        window["terminated"][:, 2] = 1
        if changed:
            window = {name: torch.cat([x[:, :3], 7 + x[:, 3:]], dim=1) for name, x in window.items()}
            window["terminated"][:, 3:] = 0
        losses.append(float(agent.update(window, torch.zeros(8, 2), torch.zeros(8, 2))["agent/critic_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] > 0


def agent_and_window(args):
    torch.manual_seed(0)
    agent = ActorCritic(args, torch.randn(50, 2), 2)
    window = {name: torch.randn(8, 5, 2) for name in ("obs", "action")}
    return agent, {**window, "reward": torch.randn(8, 5), "terminated": torch.zeros(8, 5)}
