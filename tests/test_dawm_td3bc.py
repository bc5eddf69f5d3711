"""dawm_td3bc.py: its mathematics on a linear system whose dynamics and inverse are known exactly; its command line.

Its agent and its inverse dynamics are held against the usual forms in test_speed.py.
"""

import json
import math
import subprocess
import sys

import dawm_td3bc as script
from common import UserError

import numpy as np
import pytest
import torch
from toy import ROOT, TINY, TOY, Training, hopper_arguments, in_default_dtype, linear_dataset, new_run

CPU = torch.device("cpu")


def windows_of(dataset, **changes):
    args = script.Args(**TINY | dict(model_horizon=7, horizon=3) | changes)
    return args, in_default_dtype(script.Windows(args, dataset, CPU))


# ---- Sections 2 and 3, and what is by hand in 4 to 6


def test_schedule_and_noise():
    alpha_bar = script.cosine_alpha_bar(5)
    assert alpha_bar[0] == 1 and (alpha_bar.diff() < 0).all() and alpha_bar[-1] < 1e-3
    assert script.strided_steps(5, 3) == [1, 3, 5] and script.strided_steps(5, 1) == [5]
    args, windows = windows_of(linear_dataset())
    model, x0 = script.WorldModel(args, windows), torch.ones(20_000, 9, 3)
    x = model.q_sample(x0, torch.full((20_000,), 3), torch.randn_like(x0))
    assert x.mean() == pytest.approx(float(alpha_bar[3].sqrt()), abs=0.01)
    assert x.var() == pytest.approx(float(1 - alpha_bar[3]), abs=0.01)


def test_the_posterior_of_each_strided_step_keeps_the_noise_level():
    """From q(x_k | x0), weight_x0 x0 + weight_x_k x_k + std noise has the mean and variance of q(x_previous | x0)."""
    alpha_bar, steps = script.cosine_alpha_bar(5), [1, 3, 5]
    for previous, k, (w0, wk, std) in zip(
        [0, 1, 3], steps, script.posterior_coefficients(alpha_bar, steps), strict=True
    ):
        assert w0 + wk * math.sqrt(alpha_bar[k]) == pytest.approx(math.sqrt(alpha_bar[previous]), abs=1e-12)
        assert wk**2 * (1 - alpha_bar[k]) + std**2 == pytest.approx(float(1 - alpha_bar[previous]), abs=1e-12)


def test_windows_respect_ends_and_go_on_after_falls():
    for terminated in (False, True):
        dataset = linear_dataset(episodes=4, length=12, terminated=terminated)
        windows = windows_of(dataset)[1]
        rows = windows.rows(torch.arange(48))
        for pair in range(48):
            episode, step = divmod(pair, 12)
            assert rows[pair].tolist() == [13 * episode + min(step + i, 12) for i in range(9)]
            assert windows.usable[pair] == (step + 8 <= 12 or terminated)
        # Where no window showed an end, nothing counts as one, nor does a made-up reward widen the units.
        assert windows.is_over(torch.tensor([windows.end_reward, -1e9])).tolist() == [terminated] * 2
        assert not windows.is_over(torch.as_tensor(dataset.reward)).any()
        assert (windows.reward.min() < float(dataset.reward.min())) == terminated
    # By hand: what a step brings, and behind an end (every 13th row) nothing but the reward that says so.
    tokens, ends = windows.tokens.view(4, 13, 3), torch.tensor([0.0, 0.0, windows.end_reward])
    brings = np.column_stack([dataset.next_obs - dataset.obs, dataset.reward]).reshape(4, 12, 3)
    assert torch.equal(tokens[:, :12], torch.as_tensor(brings)) and torch.equal(tokens[:, 12], ends.expand(4, 3))


@pytest.mark.parametrize("shift", [0, -5])
@pytest.mark.parametrize("kind", ["episode", "window"])
def test_return_to_go_equals_a_plain_loop(kind, shift):
    dataset = linear_dataset(episodes=3, length=12)
    dataset.reward = dataset.reward + np.float32(shift)
    args, windows = windows_of(dataset, return_to_go=kind)
    expected = np.zeros(36)
    for pair in range(36):
        episode, step = divmod(pair, 12)
        last = 12 if kind == "episode" else min(12, step + args.model_horizon + 1)
        expected[pair] = sum(0.99 ** (i - step) * dataset.reward[12 * episode + i] for i in range(step, last))
    offset = min(0.0, expected.min())
    assert windows.return_offset == pytest.approx(offset) and windows.return_to_go.max() == pytest.approx(0.6)
    found = windows.return_to_go.double().numpy() * windows.return_scale + windows.return_offset
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_return_units():
    args = script.Args(env_id="test")
    assert script.return_units(args, np.array([1.0, 6.0])) == (0.0, 10.0)
    assert script.return_units(args, np.array([-600.0, 0.01]))[0] == -600
    assert script.return_units(args, np.zeros(3)) == (0.0, 1.0)
    assert script.return_units(script.Args(env_id="hopper-medium-v2"), np.array([-1.0, 9.0])) == (0.0, 400.0)


def test_normalizer():
    values = torch.randn(100, 3, dtype=torch.float64)
    values[:, 1] = 7
    units = script.Normalizer(values)
    y = units.normalize(values)
    assert (units.denormalize(y) - values).abs().max() < 1e-12 and (y[:, 1] == 0).all()
    assert (y >= units.low).all() and (y <= units.high).all()
    assert y[:, 0].mean() == pytest.approx(0) and y[:, 0].std() == pytest.approx(1, abs=1e-5)


def test_rollouts_start_at_the_given_state_and_stay_in_the_data_range():
    args, windows = windows_of(linear_dataset())
    model = script.WorldModel(args, windows)
    obs = windows.obs[windows.start[:5]]
    rollout, reward = script.sample_rollouts(args, model, obs, windows.action[:5], torch.ones(5, 1))
    assert torch.equal(rollout[:, 0], obs) and rollout.shape == (5, 9, 2) and reward.shape == (5, 8)
    low, high = windows.obs.amin(0), windows.obs.amax(0)
    assert (rollout >= low).all() and (rollout <= high).all()
    model.denoiser.outcome[-1].bias.data.fill_(99)  # every change the largest there is
    rollout, _ = script.sample_rollouts(args, model, obs, windows.action[:5], torch.ones(5, 1))
    assert (rollout[:, -1] == high).all() and (rollout <= high).all()


def test_mark_ends_by_hand():
    args, windows = windows_of(linear_dataset(terminated=True))
    windows.healthy = torch.tensor([-0.5, -9.0]), torch.tensor([9.0, 9.0])
    obs, reward = torch.zeros(4, 9, 2), torch.zeros(4, 8)
    obs[0, 2, 0] = -1  # falls in its second transition
    reward[1, 1:] = windows.end_reward  # over from step 1 on: the first transition ended it
    reward[2, 4] = windows.end_reward  # over behind the last of the four steps that are taken: that one ended it
    terminated, kept, valid = script.mark_ends(args, windows, obs, reward)
    assert terminated.tolist() == [[False, True, False, False], [True] * 4, [False] * 3 + [True], [False] * 4]
    assert valid.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4, [True] * 4]
    assert (kept[1, 1:] == 0).all()
    args.termination = "none"
    assert not script.mark_ends(args, windows, obs, reward)[0].any()


@pytest.mark.parametrize(
    "episodes, horizon, told", [(3, 40, "one of 41 steps, not 3 of up to 30"), (1, 7, "not 1 of up")]
)
def test_too_long_a_horizon_or_one_episode_is_refused(episodes, horizon, told):
    with pytest.raises(UserError, match=f"--model-horizon {horizon} needs two episodes, .*{told}"):
        windows_of(linear_dataset(episodes), model_horizon=horizon)


def test_an_episode_without_marked_pairs_is_neither_learned_from_nor_held_out():
    _, windows = windows_of(linear_dataset(4))
    pairs = windows.episode % 2 == 1  # of two episodes in four
    for share, count in ((0.0, 0), (0.1, 1), (0.9, 1)):
        train, held_out = windows.split(pairs, share, seed=0)
        assert len(windows.episode[held_out].unique()) == count
        assert sorted([*train.tolist(), *held_out.tolist()]) == pairs.nonzero()[:, 0].tolist()


# ---- Section 3: the network and the sampler


def test_parameter_counts():
    """[DD code]'s network with an embedded pair, counted layer by layer."""
    with torch.device("meta"):
        networks = [script.TemporalUNet(c, a, 128, (1, 4, 8)) for c, a in ((12, 14), (18, 23))]
        networks += [script.InverseDynamics(script.Args(), torch.empty(10, 11), torch.empty(10, 11), 3)]
        networks += [net(torch.empty(11), torch.empty(11), 3) for net in (script.Actor, script.Critic)]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert counts == [60_718_988, 60_725_522, 2_174_982, 69_635, 69_889]


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 4)])
def test_the_network_keeps_any_length_and_sees_the_action_but_no_dropped_return(multipliers):
    network = script.TemporalUNet(5, 2, 8, multipliers)
    k, action, ones = torch.tensor([1, 2, 3]), torch.randn(3, 2), torch.ones(3, 1)
    for length in (3, 5, 9):
        x = torch.randn(3, length, 5)
        y = network(x, k, action, ones, 0 * ones)
        assert y.shape == x.shape and torch.equal(y, network(x, k, action, -ones, 0 * ones))
        assert not torch.equal(network(x, k, action, ones, ones), network(x, k, action, -ones, ones))
        assert not torch.equal(y, network(x, k, -action, ones, 0 * ones))


@pytest.mark.parametrize("loss", ["noise", "x0"])
def test_the_loss_by_hand(double, loss):
    """[DAWM Eq. 2] for the noise that an x0 of 0.3 implies, solved for in each x_k; or the error of 0.3 itself."""
    args, windows = windows_of(linear_dataset(), loss=loss)
    model, x0 = script.WorldModel(args, windows).double(), torch.randn(64, 8, 3)
    torch.manual_seed(0)
    found = model.loss(lambda x_k, *_: torch.full_like(x_k, 0.3), x0, None, None, None)
    torch.manual_seed(0)
    k, noise = torch.randint(1, 6, (64,)), torch.randn_like(x0)
    alpha_bar = model.alpha_bar[k][:, None, None]
    implied = noise + (alpha_bar / (1 - alpha_bar)).sqrt() * (x0 - 0.3)
    expected = (implied - noise if loss == "noise" else x0 - 0.3).square().mean()
    assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("sampling_steps", [1, 2, 3, 5])
def test_a_sampler_with_an_oracle_returns_its_window(double, sampling_steps):
    """The last denoising step outputs x0 itself, so any N must end at the oracle's window."""
    args, windows = windows_of(linear_dataset(), sampling_steps=sampling_steps)
    model, rows = script.WorldModel(args, windows).double(), windows.rows(torch.tensor([4]))
    x0 = model.units.normalize(windows.tokens[rows[:, :-1]])
    model.denoiser.forward = lambda x, *_: x0.expand_as(x)
    obs, reward = script.sample_rollouts(args, model, windows.obs[rows][:, 0], windows.action[4:5], torch.zeros(1, 1))
    # Eight changes of order one, each rounded to float32 when the windows were made.
    assert (obs - windows.obs[rows]).abs().max() < 8 * 2**-23
    assert (reward - windows.reward[rows][:, :-1]).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.7])
def test_guidance(double, scale):
    """Scale 1 is the conditional prediction, 0 the unconditional one; one batch of both equals two calls.

    With one denoising step the sample is a function of one prediction.
    """
    args, windows = windows_of(linear_dataset(), diffusion_steps=1, sampling_steps=1, guidance_scale=scale)
    model, obs, action, ones = (
        script.WorldModel(args, windows).double(),
        windows.obs[:5],
        windows.action[:5],
        torch.ones,
    )
    torch.manual_seed(3)
    sampled, _ = script.sample_rollouts(args, model, obs, action, ones(5, 1))
    torch.manual_seed(3)
    x, pair = torch.randn(5, 8, 3), model.pair(obs, action)
    with torch.no_grad():
        uncond, cond = (model.denoiser(x, ones(5).long(), pair, ones(5, 1), keep * ones(5, 1)) for keep in (0, 1))
    x0 = (1 - scale) * uncond + scale * cond
    expected = (obs[:, None] + model.units.denormalize(x0)[..., :2].cumsum(1)).clamp(*model.obs_range)
    assert (sampled[:, 1:] - expected).abs().max() < 1e-9


def test_the_world_model_learns_known_dynamics(tmp_path):
    """After one real action s' = 0.9 s + 0.3 a is certain. Three seeds err by 0.017 to 0.028 deviations of the states;
    windows of states erred by 0.10 to 0.19 after as many updates (commit 912e1d5).
    """
    changes = dict(world_model_steps=300, world_model_lr=3e-3, ema_decay=0.9, ema_start=0, model_horizon=2, horizon=2)
    args, windows = windows_of(linear_dataset(episodes=100), **changes)
    model = script.train_world_model(args, windows, new_run(tmp_path))
    index = torch.arange(0, 2000, 7)
    obs, action = windows.obs[windows.start[index]], windows.action[index]
    found, reward = script.sample_rollouts(args, model, obs, action, windows.return_to_go[index, None])
    assert ((found[:, 1] - (0.9 * obs + 0.3 * action)) / windows.obs.std(0)).abs().mean() < 0.06
    assert ((reward[:, 0] - obs[:, 0]) / windows.reward.std()).abs().mean() < 0.1


# ---- Section 4: inverse dynamics


def test_inverse_dynamics_learns_the_known_inverse(tmp_path):
    args, windows = windows_of(
        linear_dataset(episodes=100), idm_steps=330, idm_batch_size=256, idm_width=64, idm_lr=3e-3
    )
    inverse_dynamics = script.train_inverse_dynamics(args, windows, new_run(tmp_path))
    row = windows.start[1:20]
    triples = torch.cat([windows.obs[row - 1], windows.obs[row], windows.obs[row + 1]], dim=1)
    assert (inverse_dynamics(triples) - windows.action[1:20]).abs().mean() < 0.1


def test_inverse_dynamics_returns_an_earlier_best():
    """Where held-out losses only rise, thirty updates end at the weights of the first check, behind ten."""

    class Rising(Training):
        def log(self, step, values):
            values["idm/val_loss"].fill_(step)  # in place: what the script compares next

    found = []
    for steps in (10, 30):
        small = dict(idm_steps=steps, idm_batch_size=64, idm_width=32, log_every=10)
        args, windows = windows_of(linear_dataset(episodes=30), **small)
        found.append(script.train_inverse_dynamics(args, windows, Rising()).state_dict())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_the_spreads_dropout_is_drawn_first():
    """The order of the random numbers, on which every published figure depends."""
    model = script.InverseDynamics(
        script.Args(idm_width=64, idm_dropout=0.5), torch.randn(50, 2), torch.randn(50, 2), 2
    )
    triples = torch.randn(20, 6)
    torch.manual_seed(1)
    mean, log_std = model.gaussian(triples)
    torch.manual_seed(1)
    x = model.normalize(triples)
    first, second = model.log_std(x), model.mean(x)
    assert torch.equal(log_std, -1.5 + 3.5 * torch.tanh(first)) and torch.equal(mean, second)


# ---- Section 5: synthesis


def known_inverse(triples):
    """a = (s' - 0.9 s) / 0.3 of the triple (past, s, s')."""
    return (triples[..., 4:6] - 0.9 * triples[..., 2:4]) / 0.3


def test_rollouts_are_complete_transitions(double):
    args, windows = windows_of(linear_dataset(), termination="none")
    model = script.WorldModel(args, windows).double()
    rows, valid = script.complete_rollouts(args, windows, model, known_inverse, torch.arange(20))
    obs, action, reward, next_obs, terminated = rows.split(script.row_sizes(2, 2), dim=-1)
    assert rows.shape == (20, 4, 8) and valid.all() and not terminated.any() and reward.std() > 0
    assert torch.equal(obs[:, 0], windows.obs[windows.start[:20]]) and torch.equal(action[:, 0], windows.action[:20])
    assert torch.equal(obs[:, 1:], next_obs[:, :-1])
    assert (next_obs[:, 1:] - (0.9 * obs[:, 1:] + 0.3 * action[:, 1:])).abs().max() < 1e-12


@pytest.mark.parametrize("target", [0.4, "own", None])
def test_the_return_asked_for_is_one_for_all_or_each_pairs_own(monkeypatch, target):
    asked = []
    monkeypatch.setattr(script, "sample_rollouts", lambda *inputs: asked.append(inputs[-1]))
    args, windows = windows_of(linear_dataset(), target_return=target)
    script.imagine(args, windows, None, torch.arange(5))
    expected = windows.return_to_go[:5, None] if target == "own" else torch.full((5, 1), target or 0.7)
    assert torch.equal(asked[0], expected)


# ---- Section 6: the agent


def test_networks_carry_the_statistics_of_the_real_observations():
    obs = torch.randn(500, 11) * 3 + 1
    agent = script.TD3BC(script.Args(), obs, 3)
    for net in (agent.actor, agent.qf1, agent.qf2_target):
        assert torch.equal(net.obs_mean, obs.mean(0)) and torch.equal(
            net.obs_std, obs.std(0) + 1e-3
        )  # TD3+BC's epsilon


@pytest.mark.parametrize("fraction, expected", [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_batches_mix_by_the_fraction(fraction, expected):
    args = script.Args(synthetic_fraction=fraction, agent_batch_size=64)
    rows = script.draw_batch(args, torch.zeros(10, 5), torch.ones(20, 5))
    assert rows.shape == (64, 5) and rows[:, 0].sum() == expected


def test_online_updates_follow_algorithm_2(tmp_path, monkeypatch):
    """One batch for each h of fresh rollouts; the actor follows all H+1 of every second iteration, as printed."""
    args, dataset = (
        script.Args(**TINY, synthesis="online", horizon=2, agent_updates=12, eval_every=100),
        linear_dataset(),
    )
    made, seen = [], []

    def complete(pairs):
        made.append(len(made) + 1)
        rows = torch.full((4, 3, 8), 10.0 * made[-1]) + torch.arange(3)[:, None]
        return rows, torch.tensor([[True, True, False]] * 4)

    def update(agent, batch, update_actor):
        seen.append((float(batch[0, 0]), len(batch), update_actor))
        return {}

    monkeypatch.setattr(script.TD3BC, "update", update)
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    script.train_agent(args, dataset, None, complete, None, new_run(tmp_path))
    assert made == [1, 2, 3, 4]
    assert seen == [(10.0 * i + h, 4, i % 2 == 0) for i in (1, 2, 3, 4) for h in (0, 1)]


# ---- The command line


def test_from_the_command_line_to_a_run_of_its_own(toy):
    arguments = map(str, hopper_arguments(toy, *TOY, "--exp-name", "alone"))
    result = subprocess.run([sys.executable, "dawm_td3bc.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "not the published hopper-medium-v2 file" in result.stdout and "\nfinal " in result.stdout
    (folder,) = (toy / "runs").glob("*__alone__*")
    files = {"args.json", "metrics.jsonl", "summary.txt", "curves.png", "agent.safetensors", "stages.json"}
    assert files <= {path.name for path in folder.iterdir()}
    facts = json.loads((folder / "args.json").read_text())
    assert facts["data"]["sha256"] and facts["versions"]["torch"] and facts["args"]["unet_width"] == 8


def test_a_loaded_run_imagines_again_what_it_kept(made):
    parts = script.load_run(made("dawm_td3bc")[0])
    parts.run.seed("synthesis", parts.args.synthesis_seed)
    pairs = torch.randperm(len(parts.windows.action))[: parts.args.synthesis_batch_size]
    for kept, again in zip(parts.rollouts.values(), parts.complete(pairs), strict=True):
        assert torch.equal(again, kept[: len(pairs)])


def test_help_tells_the_method(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dawm_td3bc.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.main, script.Args, script.LAPTOP)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(script.__doc__) and "--idm-steps" in text
