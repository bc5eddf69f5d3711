"""dd_baseline.py: windows, losses, sampler and planner against oracles and plain loops, and the script by its command
line.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy import TINY, hopper_command, hopper_file, linear_dataset, refusal

import dd_baseline as script
from common.evaluation import Evaluator
from common.run import Run, parse_args
from dd_baseline import LAPTOP, PRESETS, Args

SMALL = dict(TINY, plan_horizon=8, idm_width=16, target_return=0.5)
TOY = "--laptop --eval-episodes 2 --log-every 10 --device cpu --world-model-steps 20 --unet-width 8".split()
TOY += "--idm-width 16 --plan-horizon 8".split()


@pytest.fixture
def double():
    """float64 everywhere, so that another order of sums stays far below the tolerance."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Function(nn.Module):
    """Any function in the place of a network."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def small_model(args, dataset=None):
    windows = script.Windows(args, dataset or linear_dataset(), torch.device("cpu"))
    return script.DecisionDiffuser(args, windows).eval().to(torch.get_default_dtype()), windows


# ---- Section 2: windows


def test_windows_against_a_plain_loop():
    """Window i starts at real pair i; after a fall it repeats the last state and knows no action."""
    dataset = linear_dataset(episodes=3, length=10, terminated=True)
    args = Args(**SMALL)
    windows = script.Windows(args, dataset, torch.device("cpu"))
    rows = windows.rows(torch.arange(30))
    for pair in range(30):
        episode, step = divmod(pair, 10)
        for token in range(8):
            at = step + token
            row = episode * 10 + min(at, 9)
            state = dataset.obs[row] if at < 10 else dataset.next_obs[row]
            assert np.array_equal(windows.obs[rows[pair, token]], state)
            action = windows.action[rows[pair, token]].numpy()
            assert np.array_equal(action, dataset.action[row]) if at < 10 else np.isnan(action).all()
    assert windows.usable.all() and windows.fits.sum() == 3 * 4  # 11 states hold 4 windows of 8


def test_a_time_limit_ends_the_windows():
    windows = script.Windows(Args(**SMALL), linear_dataset(episodes=3, length=10), torch.device("cpu"))
    assert torch.equal(windows.usable, windows.fits) and windows.usable.sum() == 12


def test_the_penalty_is_taken_from_the_last_reward_of_a_fallen_episode():
    fallen, gamma = linear_dataset(episodes=2, length=3, terminated=True), 0.9
    fallen.reward[:] = 1
    args = Args(**{**SMALL, "plan_horizon": 4, "gamma": gamma, "termination_penalty": 0.5})
    windows = script.Windows(args, fallen, torch.device("cpu"))
    by_hand = np.array([1 + gamma + gamma**2 * 0.5, 1 + gamma * 0.5, 0.5] * 2)
    assert np.allclose(windows.return_to_go * windows.return_scale, by_hand, atol=1e-6)


# ---- Section 3: network, losses, sampler


def test_parameter_count_of_the_published_network():
    """59,732,491: the count of DD's own code for Hopper."""
    net = script.TemporalUNet(11, 128, (1, 4, 8))
    assert sum(p.numel() for p in net.parameters()) == 59_732_491


def test_losses_by_hand():
    """The first state has no part in the first loss, a pair without action none in the second."""
    args = Args(**SMALL, prediction="x0")
    model, _ = small_model(args)
    x0 = torch.randn(3, 8, 2)
    action = torch.rand(3, 8, 2)
    action[1, 4:], action[:, 7] = torch.nan, torch.nan
    model.denoiser = Function(lambda x, k, return_to_go, keep: torch.full_like(x, 0.25))
    model.inverse_dynamics = Function(lambda obs, next_obs: 2 * obs + next_obs)
    state_loss, action_loss = model.losses(x0, action, torch.zeros(3, 1), torch.ones(3, 1))
    squares = [(0.25 - x0[b, i, d]) ** 2 for b in range(3) for i in range(1, 8) for d in range(2)]
    assert state_loss.item() == pytest.approx(np.mean(squares), rel=1e-5)
    squares = [
        (2 * x0[b, i, d] + x0[b, i + 1, d] - action[b, i, d]) ** 2
        for b in range(3) for i in range(7) for d in range(2) if not (b == 1 and i >= 4)
    ]  # fmt: skip
    assert action_loss.item() == pytest.approx(np.mean(squares), rel=1e-5)


def test_an_unknown_action_gives_no_gradient_and_no_nan():
    model, _ = small_model(Args(**SMALL))
    action = torch.full((3, 8, 2), torch.nan)
    action[0, 0] = 0.5
    sum(model.losses(torch.randn(3, 8, 2), action, torch.zeros(3, 1), torch.ones(3, 1))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("warm", [False, True])
def test_the_first_state_is_in_its_place_at_every_denoising_step(prediction, warm):
    args = Args(**SMALL, prediction=prediction, diffusion_steps=10, sampling_steps=10, warm_start_steps=6)
    model, windows = small_model(args)
    first, seen, network = model.obs_units.normalize(windows.obs[:4]), [], model.denoiser

    def spy(x, *conditions):
        seen.append(x[:, 0].clone())
        return network(x, *conditions)

    model.denoiser = Function(spy)
    noises = script.standard_normal((4, 8, 2), torch.device("cpu"))
    previous = torch.randn(4, 8, 2) if warm else None
    plans = script.sample_plans(args, model, first, torch.zeros(4, 1), noises, previous)
    assert len(seen) == (6 if warm else 10)
    assert all(torch.equal(x, torch.cat([first, first])) for x in seen) and torch.equal(plans[:, 0], first)


class Oracle(nn.Module):
    """A denoiser that knows the clean plans [2B, L, obs_dim] of both guidance branches."""

    def __init__(self, args, x0):
        super().__init__()
        self.args, self.x0, self.alpha_bar = args, x0, script.cosine_alpha_bar(args.diffusion_steps)

    def forward(self, x, k, return_to_go, keep):
        if self.args.prediction == "x0":
            return self.x0
        alpha_bar = self.alpha_bar[k[0]]
        return (x - alpha_bar.sqrt() * self.x0) / (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("prediction", ["noise", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_with_an_oracle_any_number_of_steps_gives_its_plan(double, prediction, steps, warm):
    args = Args(**SMALL, prediction=prediction, sampling_steps=steps, warm_start_steps=5)
    model, windows = small_model(args)
    plan = model.obs_units.normalize(windows.obs[windows.rows(torch.arange(4))].double())
    model.denoiser = Oracle(args, torch.cat([plan, plan]))
    noises = script.standard_normal(plan.shape, torch.device("cpu"))
    previous = torch.randn_like(plan) if warm else None
    made = script.sample_plans(args, model, plan[:, 0], torch.zeros(4, 1), noises, previous)
    assert torch.allclose(made, plan, atol=1e-12)


@pytest.mark.parametrize("scale, expected", [(0.0, -1.0), (1.0, 1.0), (1.5, 2.0)])
def test_guidance_by_hand(scale, expected):
    """With x0 prediction and one step the plan is the guided prediction: uncond + scale (cond - uncond)."""
    args = Args(**SMALL, prediction="x0", sampling_steps=1, guidance_scale=scale)
    model, _ = small_model(args)
    model.obs_units.low, model.obs_units.high = -torch.full((2,), 9.0), torch.full((2,), 9.0)
    model.denoiser = Function(lambda x, k, return_to_go, keep: (2 * keep - 1)[:, :, None].expand_as(x))
    noises = script.standard_normal((4, 8, 2), torch.device("cpu"))
    plans = script.sample_plans(args, model, torch.zeros(4, 2), torch.zeros(4, 1), noises)
    assert torch.allclose(plans[:, 1:], torch.full((4, 7, 2), expected))


def test_a_dropped_return_does_not_reach_the_output():
    net = script.TemporalUNet(2, 16, (1, 2))
    x, k = torch.randn(4, 8, 2), torch.tensor([1, 2, 3, 4])
    low, high = torch.zeros(4, 1), torch.ones(4, 1)
    assert torch.equal(net(x, k, low, 0 * high), net(x, k, high, 0 * high))
    assert not torch.allclose(net(x, k, low, high), net(x, k, high, high))


# ---- Section 6: planner


@pytest.mark.parametrize("prediction", ["noise", "x0"])
def test_the_planner_reaches_the_second_state_of_an_oracle_plan(double, prediction):
    """s' = 0.9 s + 0.3 a: with the true plan and the true inverse, the system goes where the plan goes."""
    args = Args(**SMALL, prediction=prediction)
    model, _ = small_model(args)
    plan = torch.zeros(5, 8, 2)
    plan[:, 0] = torch.rand(5, 2) - 0.5
    for i in range(7):
        plan[:, i + 1] = 0.9 * plan[:, i] + 0.3 * (2 * torch.rand(5, 2) - 1)
    units = model.obs_units
    normalized = units.normalize(plan)
    assert torch.allclose(units.denormalize(normalized), plan, atol=1e-6)  # nothing was clipped
    model.denoiser = Oracle(args, torch.cat([normalized, normalized]))
    model.inverse_dynamics = Function(
        lambda obs, after: (units.denormalize(after) - 0.9 * units.denormalize(obs)) / 0.3
    )
    planner = script.Planner(args, model, 5, torch.device("cpu"))
    action = planner(plan[:, 0].numpy(), np.arange(5))
    assert np.allclose(0.9 * plan[:, 0].numpy() + 0.3 * action, plan[:, 1].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("warm_start_steps", [0, 3])
def test_a_batch_of_episodes_equals_one_episode_at_a_time(double, warm_start_steps):
    """Three episodes of a linear system that end after 6, 2 and 4 steps."""
    args = Args(**SMALL, warm_start_steps=warm_start_steps)
    model, windows = small_model(args)
    lengths, start = np.array([6, 2, 4]), windows.obs[[0, 40, 80]].double().numpy()

    def episodes(numbers):
        planner = script.Planner(args, model, 3, torch.device("cpu"))
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
        alone = episodes([i])[i]
        assert len(alone) == lengths[i] and np.allclose(alone, together[i], rtol=0, atol=1e-10)
    assert not np.allclose(together[0][0], together[1][0], atol=1e-3)


def test_a_warm_start_denoises_the_last_plan_from_the_stated_step():
    """K = 5, N = 3 visits 5, 3, 1: three calls of the network for the first plan, then two from the shifted plan."""
    args = Args(**SMALL, warm_start_steps=4)
    model, windows = small_model(args)
    network, calls = model.denoiser, []

    def spy(x, k, return_to_go, keep):
        calls.append((int(k[0]), x[:3].clone()))
        return network(x, k, return_to_go, keep)

    model.denoiser = Function(spy)
    planner = script.Planner(args, model, 3, torch.device("cpu"))
    obs = windows.obs[:3].numpy()
    planner(obs, np.arange(3))
    plan = planner.plans.clone()
    generator = torch.Generator().manual_seed(args.seed)
    noise = [torch.randn(3, 8, 2, generator=generator) for _ in range(5)][4]  # four for the first plan
    planner(obs, np.arange(3))
    assert [k for k, _ in calls] == [5, 3, 1, 3, 1]
    shifted = torch.cat([plan[:, 1:], plan[:, -1:]], dim=1)
    alpha_bar = float(script.cosine_alpha_bar(5)[3])
    expected = alpha_bar**0.5 * shifted + (1 - alpha_bar) ** 0.5 * noise
    assert torch.allclose(calls[3][1][:, 1:], expected[:, 1:], atol=1e-6)


def test_the_evaluator_tells_which_episodes_run(tmp_path):
    evaluator, seen = Evaluator("Hopper-v4", "d4rl", 3), []

    def policy(obs):
        assert len(obs) == len(evaluator.running)
        seen.append(evaluator.running.tolist())
        return np.random.default_rng(len(seen)).uniform(-1, 1, (len(obs), 3))

    evaluator(policy, seed=0)
    assert seen[0] == [0, 1, 2] and all(set(b) <= set(a) for a, b in itertools.pairwise(seen)) and len(seen[-1]) < 3


# ---- Learning


def test_it_learns_to_plan_what_the_system_can_do_and_more_for_a_higher_return(tmp_path):
    """Linear system whose reward is its first state: a plan asked for more has a larger one; actions are the true ones.

    Chance explains none of it: targets are the data's 10th and 90th percentile, on the same noise.
    """
    args = Args(**SMALL, prediction="x0", normalizer="gaussian", world_model_steps=500, world_model_lr=3e-3)
    args = replace(args, idm_width=64, idm_dropout=0.0, run_dir=tmp_path, stage_dir=tmp_path / "stages")
    run = Run(args)
    run.open()
    run.fingerprints["data"] = "test"
    dataset = linear_dataset(episodes=300)
    dataset.reward += 2  # returns above 0
    windows = script.Windows(args, dataset, torch.device("cpu"))
    model = script.train_decision_diffuser(args, windows, run)
    first = model.obs_units.normalize(windows.obs[windows.start[::9]])
    made = []
    for share in (0.1, 0.9):
        target = windows.return_to_go.quantile(share).expand(len(first), 1)
        noises = script.standard_normal((len(first), 8, 2), torch.device("cpu"), seed=0)
        made.append(model.obs_units.denormalize(script.sample_plans(args, model, first, target, noises)))
    assert (made[1][:, 1:, 0].mean() - made[0][:, 1:, 0].mean()) > 0.1 * dataset.obs[:, 0].std()
    reach = (
        made[1][:, 1] - 0.9 * made[1][:, 0]
    ) / 0.3  # the action that would lead there, in [-0.95, 0.95] in the data
    assert (reach.abs() < 1.3).float().mean() > 0.95
    obs, after = (torch.as_tensor(x[:2000]) for x in (dataset.obs, dataset.next_obs))
    with torch.no_grad():
        action = model.inverse_dynamics(model.obs_units.normalize(obs), model.obs_units.normalize(after))
    assert (action - torch.as_tensor(dataset.action[:2000])).square().mean() < 0.01  # variance of the actions: 0.3


# ---- Presets and command line


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["dd_baseline.py", *words])
    return parse_args(Args, LAPTOP, PRESETS)


def test_a_flag_wins_over_laptop_and_laptop_over_a_preset(monkeypatch):
    assert parsed(monkeypatch) == Args()
    original = parsed(monkeypatch, "--preset", "original")
    assert original == Args(preset="original", **PRESETS["original"])
    assert (original.diffusion_steps, original.sampling_steps, original.plan_horizon) == (200, 200, 100)
    assert parsed(monkeypatch, "--preset=original") == original
    both = parsed(monkeypatch, "--preset", "original", "--laptop", "--plan-horizon", "20", "--unet-width", "64")
    assert both == replace(
        Args(preset="original", **{**PRESETS["original"], **LAPTOP}), laptop=True, plan_horizon=20, unet_width=64
    )


def test_the_presets_pass_their_own_checks():
    for preset in PRESETS.values():
        script.check_args(Args(**preset))
        script.check_args(Args(**{**preset, **LAPTOP}))


def test_the_script_runs_and_another_target_needs_no_new_training(tmp_path):
    first = hopper_command("dd_baseline.py", tmp_path, *TOY, "--seed", "1")
    assert "normalized score" in first and "reused" not in first
    again = hopper_command(
        "dd_baseline.py", tmp_path, *TOY, "--seed", "1", "--target-return", "0.3", "--warm-start-steps", "3"
    )
    assert "reused" in again
    changed = hopper_command("dd_baseline.py", tmp_path, *TOY, "--seed", "2")
    assert "reused" not in changed
    folder = sorted((tmp_path / "runs").iterdir())[0]
    names = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    assert {
        "world_model/loss",
        "world_model/val_action_error",
        "idm/val_mse",
        "eval/episodic_return",
        "eval/normalized_score",
    } <= names
    assert {f"world_model/val_obs_error_step{i}" for i in (1, 4, 7)} <= names


def test_same_seed_same_numbers(tmp_path):
    def metrics(name):
        hopper_command("dd_baseline.py", tmp_path / name, *TOY)
        (file,) = (tmp_path / name / "runs").glob("*/metrics.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert metrics("a") == metrics("b")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--plan-horizon 30", "--plan-horizon 30 must be a multiple of 4, since a U-Net of 3 levels halves it 2 times"),
        ("--plan-horizon 1", "--plan-horizon 1 lies outside [2, 10000]"),
        ("--plan-horizon 2", "must be a multiple of 4, since a U-Net of 3 levels halves it 2 times; take 4"),
        ("--warm-start-steps 6", "--warm-start-steps 6 lies outside [1, 5]"),
        ("--warm-start-steps -1", "--warm-start-steps -1 lies outside [1, 5]"),
        ("--warm-start-steps 4 --sampling-steps 1", "--warm-start-steps 4 lies outside [5, 5]"),
        ("--preset original --warm-start-steps 201", "--warm-start-steps 201 lies outside [1, 200]"),
        ("--target-return nan", "--target-return nan lies outside [-100, 100]"),
        ("--target-return own", "own"),
        ("--guidance-scale nan", "--guidance-scale nan lies outside [0, 100]"),
        ("--sampling-steps 6", "--sampling-steps 6 is above --diffusion-steps 5"),
        ("--preset orginal", "orginal"),
        ("--idm-dropout 2", "--idm-dropout 2.0 lies outside [0, 1]"),
    ],
)
def test_wrong_arguments_get_one_line(arguments, message, tmp_path, capsys):
    assert message in refusal(script, arguments.split(), tmp_path, capsys)


def test_plans_longer_than_every_episode_are_told(tmp_path, capsys):
    data = hopper_file(tmp_path / "data.hdf5")
    arguments = ["--env-id", "hopper-medium-v2", "--data-path", str(data), "--plan-horizon", "400"]
    assert "--plan-horizon 400 needs 399 transitions in a row, but the longest episode has" in refusal(
        script, arguments, tmp_path, capsys
    )
