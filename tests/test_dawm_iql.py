"""dawm_iql.py: IQL's mathematics by import, and the script by its command line.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import TOY, hopper_command, linear_dataset, refusal

import dawm_iql as script
from common import UserError
from common.run import Run
from dawm_iql import Args


def make_agent(reward_factor=1.0, **changes):
    """On Hopper's dimensions, with target critics of their own."""
    torch.manual_seed(0)
    agent = script.IQL(Args(**changes), torch.randn(100, 11) * 3 + 1, 3, reward_factor)
    for parameter in agent.qf_target_parameters:
        parameter.data += 0.05 * torch.randn_like(parameter)
    return agent


def random_rows(count=64):
    rows = torch.randn(count, 11 + 3 + 1 + 11 + 1)
    rows[:, 11:14] = rows[:, 11:14].clamp(-1, 1)
    rows[:, -1] = (rows[:, -1] > 0.5).float()
    return rows


def parameters_of(*networks):
    return [parameter for network in networks for parameter in network.parameters()]


def snapshot(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def same(before, now):
    return all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


# ---- Losses


@pytest.mark.parametrize("difference, expected", [([1.0], 0.7), ([-1.0], 0.3), ([2.0, -2.0], 2.0), ([0.0], 0.0)])
def test_expectile_loss_by_hand(difference, expected):
    assert float(script.expectile_loss(torch.tensor(difference), 0.7)) == pytest.approx(expected)


def test_expectile_a_half_is_half_the_square_as_printed():
    difference = torch.randn(100)
    expected = float(difference.square().mean()) / 2
    assert float(script.expectile_loss(difference, 0.5)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cap, expected", [(100.0, [100, 1, 0.049787]), (1e6, [403.43, 1, 0.049787])])
def test_weights_grow_exponentially_up_to_the_cap(cap, expected):
    """Advantages 2, 0 and -1, beta 3: exp(6) = 403.43, 1 and exp(-3) = 0.049787."""
    agent, rows = make_agent(max_weight=cap), random_rows(3)
    loss, weight = agent.actor_loss(rows[:, :11], rows[:, 11:14], torch.tensor([2.0, 0.0, -1.0]))
    assert weight.tolist() == pytest.approx(expected, rel=1e-4)
    log_prob = agent.actor.log_prob(rows[:, :11], rows[:, 11:14]).tolist()
    assert float(loss.detach()) == pytest.approx(-sum(w * p for w, p in zip(expected, log_prob)) / 3, rel=1e-4)


def test_td_target_by_hand():
    """Rewards 1 and 2, twice as large to the agent; the second transition is the last of its episode."""
    agent, next_obs = make_agent(reward_factor=2.0), torch.randn(2, 11)
    target = agent.td_target(torch.tensor([1.0, 2.0]), next_obs, torch.tensor([0.0, 1.0]))
    assert target.tolist() == pytest.approx([2 + 0.99 * float(agent.vf(next_obs).detach()[0]), 4.0])


# ---- One update


@pytest.mark.parametrize("policy", ["gaussian", "deterministic"])
def test_updates_are_those_of_a_plain_loop(policy):
    """IQL's code in its order: q, V(s') and the advantage with old parameters, then V, Q, target critics, policy."""
    agent = make_agent(policy=policy, reward_factor=3.0, agent_lr=0.01, agent_updates=8, tau=0.1)
    plain = deepcopy((agent.actor, agent.vf, agent.qf1, agent.qf2, agent.qf1_target, agent.qf2_target))
    actor, vf, qf1, qf2, qf1_target, qf2_target = plain
    optimizers = [torch.optim.Adam(parameters_of(*nets), lr=0.01) for nets in ((vf,), (qf1, qf2), (actor,))]

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for update in range(4):
        rows = random_rows()
        obs, action, reward, next_obs, terminated = rows.split([11, 3, 1, 11, 1], dim=1)
        with torch.no_grad():
            q = torch.stack([qf1_target(obs, action), qf2_target(obs, action)]).amin(0)
            target = 3 * reward[:, 0] + 0.99 * (1 - terminated[:, 0]) * vf(next_obs)
        advantage = q - vf(obs)
        weight = (3 * advantage.detach()).exp().clamp(max=100)
        optimizers[2].param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * update / 8)) / 2
        vf_loss = (torch.where(advantage > 0, 0.7, 0.3) * advantage**2).mean()
        step(optimizers[0], vf_loss)
        qf_loss = sum(((qf(obs, action) - target) ** 2).mean() for qf in (qf1, qf2)) / 2
        step(optimizers[1], qf_loss)
        for net, slow in ((qf1, qf1_target), (qf2, qf2_target)):
            for p, p_target in zip(net.parameters(), slow.parameters()):
                p_target.data = 0.9 * p_target.data + 0.1 * p.data
        distance = (action - actor(obs)) ** 2
        if policy == "gaussian":
            distance = distance / (2 * actor.log_std.exp() ** 2) + actor.log_std + math.log(2 * math.pi) / 2
        actor_loss = (weight * distance.sum(1)).mean()
        step(optimizers[2], actor_loss)
        losses = agent.update(rows, update_actor=True)
        expected = dict(vf_loss=vf_loss, qf_loss=qf_loss, qf_target=target.mean(), actor_loss=actor_loss,
                        actor_weight=weight.mean())  # fmt: skip
        assert {name.removeprefix("agent/"): float(value) for name, value in losses.items()} == pytest.approx(
            {name: float(value.detach()) for name, value in expected.items()}, rel=1e-4
        )
    obs, action = random_rows().split([11, 16], dim=1)
    for ours, theirs in ((agent.actor, actor), (agent.vf, vf)):
        torch.testing.assert_close(ours(obs), theirs(obs), rtol=1e-3, atol=1e-4)
    for ours, theirs in ((agent.qf1, qf1), (agent.qf1_target, qf1_target), (agent.qf2_target, qf2_target)):
        torch.testing.assert_close(ours(obs, action[:, :3]), theirs(obs, action[:, :3]), rtol=1e-3, atol=1e-4)


def test_target_critics_move_by_the_polyak_rate_only_with_the_policy():
    agent = make_agent()
    start = snapshot(agent.qf_target_parameters)
    agent.update(random_rows(), update_actor=False)
    assert same(start, agent.qf_target_parameters)
    agent.update(random_rows(), update_actor=True)
    for before, now, online in zip(start, agent.qf_target_parameters, agent.qf_parameters, strict=True):
        torch.testing.assert_close(now, 0.995 * before + 0.005 * online, atol=1e-6, rtol=1e-5)


def test_without_update_actor_the_policy_and_its_rate_stand_still():
    agent = make_agent()
    start, rate = snapshot(agent.actor.parameters()), agent.actor_schedule.get_last_lr()
    losses = agent.update(random_rows(), update_actor=False)
    assert same(start, agent.actor.parameters()) and agent.actor_schedule.get_last_lr() == rate
    assert losses.keys() == {"agent/vf_loss", "agent/qf_loss", "agent/qf_target"}


def test_the_policy_loss_reaches_neither_critics_nor_value():
    agent, other, rows = make_agent(), make_agent(), random_rows()
    agent.update(rows, update_actor=True)
    other.update(rows, update_actor=False)
    others = parameters_of(other.qf1, other.qf2, other.vf)
    assert same(others, parameters_of(agent.qf1, agent.qf2, agent.vf))
    for a, b in zip(others, parameters_of(agent.qf1, agent.qf2, agent.vf), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_value_loss_reaches_no_critic_and_the_critic_loss_not_the_value():
    """After an update the gradients are those of each network's own loss at the old parameters, and no other."""
    agent, rows = make_agent(), random_rows()
    obs, action, reward, next_obs, terminated = rows.split([11, 3, 1, 11, 1], dim=1)
    target = (reward + 0.99 * (1 - terminated) * agent.vf(next_obs)[:, None]).detach()[:, 0]
    difference = torch.minimum(agent.qf1_target(obs, action), agent.qf2_target(obs, action)).detach() - agent.vf(obs)
    vf_loss = torch.where(difference > 0, 0.7 * difference**2, 0.3 * difference**2).mean()
    qf_loss = sum((qf(obs, action) - target).square().mean() for qf in (agent.qf1, agent.qf2)) / 2
    expected = *torch.autograd.grad(vf_loss, agent.vf.parameters()), *torch.autograd.grad(qf_loss, agent.qf_parameters)
    agent.update(rows, update_actor=False)
    for gradient, parameter in zip(expected, parameters_of(agent.vf, agent.qf1, agent.qf2), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in [*agent.qf_target_parameters, *agent.actor.parameters()])


@pytest.mark.parametrize("delay", [1, 2])
def test_the_policys_rate_falls_to_0_by_a_cosine_and_no_other(delay):
    agent = make_agent(agent_updates=10, policy_delay=delay)
    rates, updates = [], 10 // delay
    for update in range(1, 11):
        agent.update(random_rows(4), update_actor=update % delay == 0)
        rates.append(agent.actor_optimizer.param_groups[0]["lr"])
        assert [group["lr"] for group in agent.critic_optimizer.param_groups] == [3e-4]
    cosine = [1.5e-4 * (1 + math.cos(math.pi * (update // delay) / updates)) for update in range(1, 11)]
    assert rates == pytest.approx(cosine, abs=1e-12) and rates[-1] == pytest.approx(0, abs=1e-12)


def test_every_update_moves_the_policy_by_default():
    source = script.batches(Args(agent_batch_size=8), torch.zeros(10, 5), torch.ones(20, 5), None, {"count": 0, "h": 0})
    assert [next(source)[1] for _ in range(3)] == [True] * 3


# ---- Policy


@pytest.mark.parametrize("log_std, clamped", [([-1.0, 0.5, 1.9], [-1.0, 0.5, 1.9]), ([-9.0, 0.0, 7.0], [-5, 0, 2])])
def test_gaussian_log_prob_is_torchs_with_log_std_between_minus_5_and_2(log_std, clamped):
    actor, rows = make_agent().actor, random_rows()
    obs, action = rows[:, :11], rows[:, 11:14]
    actor.log_std.data = torch.tensor(log_std)
    expected = torch.distributions.Normal(actor(obs), torch.tensor(clamped).float().exp()).log_prob(action).sum(1)
    torch.testing.assert_close(actor.log_prob(obs, action), expected)


def test_gaussian_mean_is_free_and_the_deterministic_policy_is_bounded():
    obs = torch.randn(64, 11) * 1000
    assert make_agent().actor(obs).abs().max() > 1
    actor = make_agent(policy="deterministic").actor
    assert actor(obs).abs().max() <= 1 and actor.log_std is None
    action = torch.rand(64, 3) * 2 - 1
    distance = [sum((float(m) - float(a)) ** 2 for m, a in zip(*pair)) for pair in zip(actor(obs).detach(), action)]
    assert actor.log_prob(obs, action).tolist() == pytest.approx([-d for d in distance], rel=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_observations_are_standardised_only_if_asked(normalize):
    obs = torch.randn(500, 11) * 3 + 1
    agent = script.IQL(Args(normalize_obs=normalize), obs, 3, 1.0)
    mean, std = (obs.mean(0), obs.std(0) + 1e-3) if normalize else (torch.zeros(11), torch.ones(11))
    for network in (agent.actor, agent.vf, agent.qf1, agent.qf2, agent.qf1_target, agent.qf2_target):
        torch.testing.assert_close(network.obs_mean, mean)
        torch.testing.assert_close(network.obs_std, std)


@pytest.mark.parametrize("obs_dim, action_dim, value, critics", [(11, 3, 69_121, 139_778), (17, 6, 70_657, 144_386)])
def test_parameter_counts(obs_dim, action_dim, value, critics):
    agent = script.IQL(Args(), torch.randn(10, obs_dim), action_dim, 1.0)
    assert sum(p.numel() for p in agent.vf.parameters()) == value
    assert sum(p.numel() for p in agent.qf_parameters) == critics


# ---- Rewards


def dataset_of_returns():
    """Three episodes of two steps, with returns 3, 10 and -3."""
    dataset = linear_dataset(episodes=3, length=2)
    return replace(dataset, reward=np.array([1, 2, 5, 5, -4, 1], np.float32))


def test_rewards_are_scaled_by_the_span_of_returns():
    dataset = dataset_of_returns()
    assert script.reward_factor(Args(), dataset) == pytest.approx(1000 / 13)
    assert script.reward_factor(Args(reward_scaling=False), dataset) == 1
    cut = replace(dataset, complete=np.array([True, False, True]))
    assert script.reward_factor(Args(), cut) == pytest.approx(1000 / 6)


def test_equal_returns_have_no_scale():
    dataset = replace(dataset_of_returns(), reward=np.ones(6, np.float32))
    with pytest.raises(UserError, match="every episode of toy has the same return; use --no-reward-scaling"):
        script.reward_factor(Args(env_id="toy"), dataset)
    assert script.reward_factor(Args(reward_scaling=False), dataset) == 1


@pytest.fixture
def run(tmp_path):
    run = Run(Args(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages", device="cpu"))
    run.open()
    return run


def test_generated_rewards_are_scaled_by_the_real_returns(run, monkeypatch):
    """Generated transitions of reward 0.5 that all end their episode: the target is 0.5 * 1000 / 13, no more."""
    monkeypatch.setattr(script, "evaluate", lambda *_: 0.0)
    synthetic = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0]]).repeat(20, 1)
    script.train_agent(Args(agent_updates=1), dataset_of_returns(), synthetic, None, None, run)
    (target,) = (values["agent/qf_target"] for _, values in run.records if "agent/qf_target" in values)
    assert target == pytest.approx(500 / 13)


def test_two_actions_in_one_state():
    """Action 0.5 earns 1, -0.5 earns -1, equally often.

    V is the 0.7-expectile m: 0.7 (1 - m) = 0.3 (m + 1), m = 0.4. The policy weighs the two by exp(3 * 0.6) and
    exp(3 * -1.4), so its mean is 0.5 (6.0496 - 0.0150) / (6.0496 + 0.0150) = 0.4975.
    """
    torch.manual_seed(0)
    args = Args(agent_lr=3e-3, agent_updates=600, tau=0.05)
    agent, obs = script.IQL(args, torch.zeros(10, 1), 1, 1.0), torch.zeros(1, 1)
    #                       obs  action reward next_obs terminated
    rows = torch.tensor([[0.0, 0.5, 1.0, 0.0, 1.0], [0.0, -0.5, -1.0, 0.0, 1.0]])
    for _ in range(600):
        agent.update(rows, update_actor=True)
    assert float(agent.vf(obs).detach()) == pytest.approx(0.4, abs=0.02)
    assert float(agent.actor(obs).detach()) == pytest.approx(0.4975, abs=0.02)


# ---- The command line


def test_the_models_of_dawm_td3bc_are_found_and_lead_to_a_score(tmp_path):
    made = hopper_command("dawm_td3bc.py", tmp_path, *TOY)
    found = hopper_command("dawm_iql.py", tmp_path, *TOY, "--policy", "deterministic")
    (folder,) = (tmp_path / "runs").glob("*dawm_iql*")
    stages = json.loads((folder / "stages.json").read_text())
    assert list(stages) == ["world model", "inverse dynamics", "synthesis"]
    for stage, where in stages.items():
        assert f"{stage:<16} reused {where}" in found
    assert "reused" not in made
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"world_model/loss", "idm/val_mse", "agent/vf_loss", "agent/qf_loss", "agent/actor_loss",
            "eval/normalized_score"} <= {name for line in lines for name in line}  # fmt: skip
    assert (folder / "actor.safetensors").exists() and "final" in (folder / "summary.txt").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--expectile", "1"], "--expectile 1.0 lies outside [0.001, 0.999]"),
        (["--awr-beta", "-1"], "--awr-beta -1.0 lies outside [0, 100]"),
        (["--policy-delay", "0"], "--policy-delay 0 must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, capsys):
    error = refusal(script, arguments, tmp_path, capsys)
    assert message in error and error.count("\n") == 1
