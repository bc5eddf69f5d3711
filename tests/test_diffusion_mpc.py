"""baselines/diffusion_mpc.py: windows, sampler and ranking by hand and against oracles, what it learns of a linear
system.
"""

from types import SimpleNamespace

from baselines import diffusion_mpc as script
from baselines.diffusion_mpc import Args

import numpy as np
import pytest
import torch
from toy import Function, Oracle, Training, linear_dataset

NETWORK = dict(transformer_layers=1, transformer_width=32, transformer_heads=2, attention_width=32, mlp_width=64)
SMALL = dict(env_id="linear", device="cpu", plan_horizon=4, candidates=8, **NETWORK)


def make_windows(dataset=None, **changes):
    return script.Windows(Args(**SMALL | changes), dataset or linear_dataset(), torch.device("cpu"))


@pytest.mark.parametrize("terminated", [True, False])
def test_windows_against_a_plain_loop(terminated):
    """Window i starts at real pair i; after a fall it repeats the last state, brings no change and knows no action."""
    dataset = linear_dataset(episodes=3, length=10, terminated=terminated)
    windows = make_windows(dataset)
    index = torch.arange(30)
    rows, (action, known) = windows.rows(index), windows.actions(index)
    for pair in range(30):
        episode, step = divmod(pair, 10)
        assert windows.usable[pair] == (step + 4 <= 10 or terminated)
        for at in range(step, step + 5) if windows.usable[pair] else ():
            row, here = episode * 10 + min(at, 9), at - step
            state = dataset.obs[row] if at < 10 else dataset.next_obs[row]
            assert np.array_equal(windows.obs[rows[pair, here]], state)
            change = dataset.next_obs[row] - dataset.obs[row] if at < 10 else np.zeros(2)
            assert np.array_equal(windows.change[rows[pair, here]], change)
            if here < 4:
                assert known[pair, here] == (at < 10)
                assert at >= 10 or np.array_equal(action[pair, here], dataset.action[row])


def test_return_labels_by_hand():
    """Two fallen episodes of three rewards 1, the last one less by the penalty; mean 0 and deviation 1."""
    fallen, gamma = linear_dataset(episodes=2, length=3, terminated=True), 0.9
    fallen.reward[:] = 1
    windows = make_windows(fallen, plan_horizon=2, gamma=gamma, termination_penalty=3)
    by_hand = np.array([1 + gamma - gamma**2 * 2, 1 - gamma * 2, -2] * 2)
    labels = windows.return_to_go.double() * windows.return_std + windows.return_mean
    np.testing.assert_allclose(labels, by_hand, rtol=0, atol=4 * np.finfo(np.float32).eps)
    assert abs(float(windows.return_to_go.mean())) < 1e-6


@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("steps", [1, 5, 32])
def test_with_an_oracle_ddim_gives_its_window_and_the_loss_is_0(prediction, steps):
    args, x0 = Args(**SMALL, prediction=prediction), torch.rand(6, 4, 2).double() * 2 - 1
    alpha_bar = script.cosine_alpha_bar(steps)
    oracle = Oracle(args, x0, alpha_bar)
    units = SimpleNamespace(low=-torch.ones(2).double(), high=torch.ones(2).double())
    made = script.ddim(args, steps, units, oracle, (), torch.randn(6, 4, 2).double())
    torch.testing.assert_close(made, x0, rtol=0, atol=1e-12)
    assert script.diffusion_loss(args, alpha_bar, oracle, (), x0).item() < 1e-20


def test_only_tokens_that_count_are_in_the_loss():
    """x0 prediction of 0.25: the squares by hand, over the three tokens that count."""
    args, x0 = Args(**SMALL, prediction="x0"), torch.randn(2, 2, 3).double()
    counts, alpha_bar = torch.tensor([[True, False], [True, True]]), script.cosine_alpha_bar(5)
    loss = script.diffusion_loss(args, alpha_bar, lambda x, k: torch.full_like(x, 0.25), (), x0, counts)
    squares = [(x0[b, i, d].item() - 0.25) ** 2 for b, i in ((0, 0), (1, 0), (1, 1)) for d in range(3)]
    assert loss.item() == pytest.approx(np.mean(squares), rel=1e-12)


def test_the_loss_of_a_gaussian_proposal_by_hand():
    """Mean 0.25 and standard deviation 2 for all: ln 2 + ((a - 0.25) / 2)^2 / 2."""
    windows, index = make_windows(), torch.arange(5)
    proposal = script.Proposal(Args(**SMALL, proposal="gaussian"), windows)
    loss = proposal.loss(lambda _, x: torch.cat([0 * x + 0.25, 0 * x + np.log(2)], dim=-1), windows, index)
    action = proposal.units.normalize(windows.actions(index)[0]).double().numpy()
    assert loss.item() == pytest.approx(np.mean(np.log(2) + ((action - 0.25) / 2) ** 2 / 2), rel=1e-5)


def test_the_learning_rate_rises_and_falls_by_hand():
    args = Args(**SMALL, world_model_steps=1500, warmup_steps=500, world_model_lr=1e-4, final_lr=1e-5)
    rates = [script.scheduled_rate(args, step) for step in (1, 250, 500, 1000, 1500)]
    np.testing.assert_allclose(rates, [2e-7, 5e-5, 1e-4, 5.5e-5, 1e-5], rtol=1e-12)


def test_one_step_dynamics_also_learn_what_follows_a_fall(monkeypatch):
    """A fallen state stays: such steps, whose change is 0, are among those that it learns."""
    windows, seen = make_windows(linear_dataset(terminated=True)), []
    model = script.Dynamics(Args(**SMALL, dynamics="one_step"), windows)
    monkeypatch.setattr(script, "diffusion_loss", lambda *given: seen.append(model.units.denormalize(given[-1])))
    model.loss(model.net, windows, torch.arange(len(windows.start)))
    stays = (seen[0].abs() < 1e-6).all(2)
    assert seen[0].shape[1] == 1 and stays.any() and not stays.all()


def test_one_step_dynamics_go_on_from_the_state_before():
    """A network that says "the change is the action": states are sums of actions, with a call for each of the four."""
    args = Args(**SMALL, dynamics="one_step", dynamics_diffusion_steps=1, prediction="x0")
    dynamics, wide, given = script.Dynamics(args, make_windows()), torch.full((2,), 9.0), []
    dynamics.net = Function(lambda obs, action, x, k: given.append(obs[:, 0]) or action)
    dynamics.obs_range = torch.stack([-wide, wide])
    for units in (dynamics.obs_units, dynamics.action_units, dynamics.units):
        units.shift, units.scale, units.low, units.high = torch.zeros(2), torch.ones(2), -wide, wide
    action = torch.rand(3, 4, 2)
    states = dynamics.sample(torch.zeros(3, 2), action, lambda length, dim: torch.randn(3, length, dim))
    torch.testing.assert_close(states[:, 1:], action.cumsum(1))
    assert torch.equal(torch.stack(given, 1), states[:, :-1])


def test_the_planner_takes_the_first_action_of_the_best_and_episodes_do_not_mix():
    """Candidates are the noise itself; the score, action 0 of the second step, picks one of eight."""
    seen = []
    model = SimpleNamespace(
        proposal=SimpleNamespace(sample=lambda obs, noise: seen.append(noise(4, 2)) or seen[-1]),
        dynamics=SimpleNamespace(sample=lambda obs, action, noise: obs),
        objective=lambda states, action: action[:, 1, 0],
    )
    args, obs = Args(**SMALL), np.zeros((3, 2), np.float32)
    together = script.Planner(args, model, 3, torch.device("cpu"))(obs, np.arange(3))
    candidates = seen[0].view(3, 8, 4, 2)
    by_hand = [max(candidates[i], key=lambda plan: plan[1, 0])[0] for i in range(3)]
    assert np.array_equal(together, torch.stack(by_hand))
    alone = script.Planner(args, model, 3, torch.device("cpu"))(obs[:1], np.array([2]))
    assert np.array_equal(alone[0], together[2])


def test_it_learns_dynamics_proposal_and_the_right_first_action():
    """s' = 0.9 s + 0.3 a, reward s_0, actions uniform in [-0.95, 0.95], standard deviation 0.55: imagined states are
    those of the proposed actions, which spread as the data's; of 16 plans the best one drives s_0 up, and s_1 nowhere.
    """
    changes = dict(gamma=0.7, prediction="x0", dynamics_diffusion_steps=5, proposal_diffusion_steps=5, candidates=16)
    changes |= dict(world_model_steps=300, world_model_batch_size=32, world_model_lr=5e-3, warmup_steps=20)
    args, dataset = Args(**SMALL | changes), linear_dataset(episodes=200)
    windows = script.Windows(args, dataset, torch.device("cpu"))
    trainings = script.train_dynamics_model, script.train_proposal, script.train_objective
    dynamics, proposal, objective = (train(args, windows, Training()) for train in trainings)
    model = SimpleNamespace(dynamics=dynamics, proposal=proposal, objective=objective)
    obs = windows.obs[windows.start[windows.held_out[::5]]]
    action, states, _ = script.plan(model, obs, lambda length, dim: torch.randn(len(obs), length, dim))
    error = states[:, 1:] - (0.9 * states[:, :-1] + 0.3 * action)
    assert error.square().mean().sqrt() < 0.04  # what actions move a state by: 0.16
    assert 0.35 < action.std() < 0.65 and abs(float(action.mean())) < 0.1
    best = script.Planner(args, model, len(obs), torch.device("cpu"))(obs.numpy(), np.arange(len(obs)))
    assert best[:, 0].mean() > 0.25 and abs(best[:, 1].mean()) < 0.25
