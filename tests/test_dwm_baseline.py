"""dwm_baseline.py: imagined targets by hand and by plain loops, and the script by its command line.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from toy import TINY, TOY, TOY_AGENT, TOY_WORLD_MODEL, hopper_command, linear_dataset, refusal

import dwm_baseline as script
from common.run import Run
from dwm_baseline import Args

STEPS = 8  # imagined by a world model of horizon 7
DEFAULTS = {"td3bc": dict(policy_delay=2, lambda_return=False), "iql": dict(policy_delay=1, lambda_return=True)}


def n_step(reward, ended, value, gamma, n, extra=False):
    """Rewards 0..n-1, then the value of state n; nothing after an end. `extra`: reward n too, and the value later."""
    total = 0.0
    for h in range(n):
        total += gamma**h * float(reward[h])
        if ended[h]:
            return total
    rest = float(reward[n]) + gamma * float(value[n - 1]) if extra else float(value[n - 1])
    return total + gamma**n * rest


def mixture(reward, ended, value, gamma, n, weight, base="corrected"):
    """The lambda-return looking forward: 1..n steps with weights (1 - lambda) lambda^(i-1), the rest to the longest."""
    parts = [(1 - weight) * weight ** (i - 1) * n_step(reward, ended, value, gamma, i) for i in range(1, n + 1)]
    return sum(parts) + weight**n * n_step(reward, ended, value, gamma, n, extra=base == "printed")


def random_futures(count=50):
    """Rewards, ends of a quarter of the steps, and two-dimensional states whose value is their first number."""
    ended = (torch.rand(count, STEPS) < 0.25).float()
    ended[0], ended[1] = 0, torch.eye(STEPS)[3]
    return torch.randn(count, STEPS), ended, torch.randn(count, STEPS, 2)


def first_number(states):
    return states[:, 0]


# ---- Targets

REWARD, VALUE, ALIVE = torch.tensor([[1.0, 2, 3]]), torch.tensor([[10.0, 20, 30]]), torch.zeros(1, 3)


def test_mve_by_hand():
    """1 + 0.9 * 2 + 0.81 * 3 + 0.729 * 30."""
    assert script.mve_target(REWARD, ALIVE, VALUE[:, -1], 0.9).tolist() == pytest.approx([27.1])


@pytest.mark.parametrize(
    "end, expected",
    [(0, 1.0), (1, 1 + 0.9 * 2), (2, 1 + 0.9 * 2 + 0.81 * 3)],
)
def test_nothing_is_added_after_an_end(end, expected):
    ended = torch.eye(3)[end : end + 1]
    assert script.mve_target(REWARD, ended, VALUE[:, -1], 0.9).tolist() == pytest.approx([expected])
    assert script.lambda_return(REWARD, ended, VALUE, 0.9, 1.0).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("weight, expected", [(0.5, 16.525), (1.0, 27.1), (0.0, 10.0)])
def test_lambda_return_by_hand(weight, expected):
    """G_3 = 30; G_2 = 3 + 0.9 * 30 = 30; G_1 = 2 + 0.9 * 25 = 24.5; G_0 = 1 + 0.9 * (5 + 12.25) = 16.525."""
    assert script.lambda_return(REWARD, ALIVE, VALUE, 0.9, weight).tolist() == pytest.approx([expected])


def test_printed_lambda_return_by_hand():
    """Weight 1 and a fourth reward of 4: 1 + 1.8 + 2.43 + 0.729 * (4 + 0.9 * 30) = 27.829, not Diffusion-MVE's 27.1."""
    target = script.lambda_return(REWARD, ALIVE, VALUE, 0.9, 1.0, extra_reward=torch.tensor([4.0]))
    assert target.tolist() == pytest.approx([27.829])


@pytest.mark.parametrize("horizon", [1, 3, 7])
def test_weight_1_is_mve_and_weight_0_is_one_step(horizon):
    reward, ended, states = (x[:, :horizon] for x in random_futures())
    value = states[..., 0]
    torch.testing.assert_close(
        script.lambda_return(reward, ended, value, 0.99, 1.0), script.mve_target(reward, ended, value[:, -1], 0.99)
    )
    one_step = reward[:, 0] + 0.99 * (1 - ended[:, 0]) * value[:, 0]
    torch.testing.assert_close(script.lambda_return(reward, ended, value, 0.99, 0.0), one_step)


@pytest.mark.parametrize("horizon", [1, 3, 7])
@pytest.mark.parametrize("termination", ["rule", "none"])
@pytest.mark.parametrize("kind", ["mve", "corrected", "printed"])
def test_imagined_target_against_a_plain_loop(horizon, termination, kind):
    """Whatever lies beyond the horizon is NaN; the printed recursion takes one more reward."""
    reward, ended, states = random_futures()
    reward[:, horizon + (kind == "printed") :] = ended[:, horizon:] = states[:, horizon:] = torch.nan
    args = Args(simulation_horizon=horizon, termination=termination, lambda_return=kind != "mve", gamma=0.9,
                lambda_weight=0.7, lambda_base=kind.replace("mve", "corrected"))  # fmt: skip
    expected = []
    for r, e, s in zip(reward, ended if termination == "rule" else torch.zeros_like(ended), states):
        loop = (r, e, s[:, 0], 0.9, horizon)
        expected.append(n_step(*loop) if kind == "mve" else mixture(*loop, 0.7, kind))
    target = script.imagined_target(args, reward, ended, states, first_number)
    assert target.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- Futures


def make_synthesizer(robot="", world_model=None, **changes):
    args, dataset = Args(**TINY, **changes), linear_dataset(episodes=10, terminated=True)
    windows = script.Windows(args, dataset, torch.device("cpu"))
    return script.Synthesizer(args, robot, windows, world_model or script.WorldModel(args, windows))


def parts_of(rows, dim=2):
    return rows.split([2, 2, STEPS, STEPS, STEPS * dim], dim=1)


def test_a_future_is_the_real_pair_and_what_was_imagined(monkeypatch):
    """Pair 0 goes on; in pair 1 the model's own sign at steps 2 and 3 says that states 2 and 3 are ends."""
    synthesizer = make_synthesizer(world_model="none")
    windows, over = synthesizer.windows, synthesizer.windows.end_reward
    imagined, reward = torch.randn(2, 9, 2), torch.rand(2, 8) * 0.1
    reward[1, 2:4] = over
    calls = []

    def sample_rollouts(args, world_model, *condition):
        calls.append((world_model, condition))
        return imagined, reward

    monkeypatch.setattr(script, "sample_rollouts", sample_rollouts)
    rows = synthesizer(torch.tensor([35, 4]))
    obs, action, rewards, ended, future = parts_of(rows)
    real = windows.obs[[36, 4]], windows.action[[35, 4]]  # episode 1 begins one row later: 31 states to 30 actions
    assert torch.equal(obs, real[0]) and torch.equal(action, real[1])
    ((world_model, (first, first_action, target)),) = calls
    assert world_model == "none" and torch.equal(first, real[0]) and torch.equal(first_action, real[1])
    assert target.tolist() == [[pytest.approx(0.7)]] * 2
    assert rewards[0].tolist() == reward[0].tolist()
    assert rewards[1].tolist() == [*reward[1, :2].tolist(), 0, 0, *reward[1, 4:].tolist()]
    assert ended.tolist() == [[0] * 8, [0, 1, 1, 0, 0, 0, 0, 0]]
    assert torch.equal(future.view(2, STEPS, 2), imagined[:, 1:])


def test_a_fall_by_the_simulators_rule_is_an_end_too(monkeypatch):
    heights = torch.ones(1, 9, 11) * 0.01
    heights[0, :, 0] = torch.tensor([1.2, 1.1, 1.0, 0.6, 1.2, 1.2, 1.2, 1.2, 0.6])  # down at states 3 and 8
    monkeypatch.setattr(script, "sample_rollouts", lambda *_: (heights, torch.zeros(1, 8)))
    for robot, expected in (("hopper", [0, 0, 1, 0, 0, 0, 0, 1]), ("halfcheetah", [0] * 8)):
        _, _, _, ended, _ = parts_of(make_synthesizer(robot, "none")(torch.tensor([0])), 11)
        assert ended.tolist() == [expected]


@pytest.fixture
def new_run(tmp_path):
    def new_run(**changes):
        folders = dict(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages")
        run = Run(Args(**TINY, **folders, synthesis_batch_size=64, **changes))
        run.open()
        run.fingerprints |= {"data": "data", "world model": "model"}
        return run

    return new_run


def test_stored_futures_are_those_of_all_pairs_in_their_order(new_run):
    synthesizer, run = make_synthesizer(), new_run()
    stored = script.synthesize(run.args, synthesizer, run)
    run.seed("synthesis", run.args.synthesis_seed)
    assert torch.equal(stored, torch.cat([synthesizer(index) for index in torch.arange(300).split(64)]))
    windows = synthesizer.windows
    assert torch.equal(stored[:, :2], windows.obs[windows.start]) and torch.equal(stored[:, 2:4], windows.action)


def test_the_store_serves_every_horizon_termination_and_agent(new_run):
    synthesizer, run = make_synthesizer(), new_run()
    stored = script.synthesize(run.args, synthesizer, run)
    for same in (dict(simulation_horizon=3), dict(termination="rule"), dict(agent="iql"), dict(lambda_return=True)):
        other = new_run(**same)
        assert torch.equal(script.synthesize(other.args, None, other), stored) and other.kept == run.kept
    other = new_run(guidance_scale=1.0)
    script.synthesize(other.args, synthesizer, other)
    assert other.kept["rollouts"] != run.kept["rollouts"]


def test_batches_come_from_the_store_or_from_the_model():
    args, asked = Args(agent_batch_size=64, policy_delay=2), []
    synthesizer = SimpleNamespace(windows=SimpleNamespace(start=torch.arange(10)))
    source = script.batches(args, torch.arange(10.0)[:, None] + 100, synthesizer, {"count": 0})
    rows, flags = zip(*(next(source) for _ in range(4)))
    assert flags == (False, True, False, True)
    assert all(len(batch) == 64 for batch in rows) and set(torch.cat(rows)[:, 0].tolist()) == set(range(100, 110))

    class Imagine(SimpleNamespace):
        def __call__(self, index):
            asked.append(index)
            return index[:, None] * 2.0

    source = script.batches(args, None, Imagine(windows=synthesizer.windows), {"count": 0})
    rows, _ = zip(*(next(source) for _ in range(4)))
    assert len(asked) == 4 and set(torch.cat(asked).tolist()) == set(range(10))
    assert all(torch.equal(batch[:, 0], index * 2.0) for batch, index in zip(rows, asked, strict=True))


# ---- Agents


def make_agent(kind, reward_factor=3.0, **changes):
    """On Hopper's dimensions, with target networks of their own."""
    torch.manual_seed(0)
    args, obs = Args(agent=kind, **{**DEFAULTS[kind], **changes}), torch.randn(100, 11) * 3 + 1
    agent = script.TD3BC(args, obs, 3) if kind == "td3bc" else script.IQL(args, obs, 3, reward_factor)
    for parameter in targets_of(agent):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return agent


def targets_of(agent):
    return agent.target_parameters if isinstance(agent, script.TD3BC) else agent.qf_target_parameters


def online_of(agent):
    return agent.parameters if isinstance(agent, script.TD3BC) else agent.qf_parameters


def random_rows(count=32):
    """Rows, and their parts: obs, action, reward, ended, future."""
    parts = torch.randn(count, 11), torch.rand(count, 3) * 2 - 1, torch.randn(count, STEPS)
    parts += (torch.rand(count, STEPS) < 0.25).float(), torch.randn(count, STEPS, 11)
    return torch.cat([part.flatten(1) for part in parts], dim=1), parts


def value_by_hand(agent, states):
    """min Q'(s, pi'(s)) of TD3+BC without noise, V(s) of IQL."""
    with torch.no_grad():
        if isinstance(agent, script.IQL):
            return agent.vf(states).tolist()
        action = agent.actor_target(states)
        values = (qf(states, action).tolist() for qf in (agent.qf1_target, agent.qf2_target))
        return [min(pair) for pair in zip(*values)]


def targets_by_hand(agent, parts, horizon):
    """For the agents' defaults: Diffusion-MVE for TD3+BC, the lambda-return of weight 0.95 for IQL; falls ignored."""
    _, _, reward, _, future = parts
    factor, loop = (3, mixture) if isinstance(agent, script.IQL) else (1, n_step)
    weight = (0.95,) if loop is mixture else ()
    values = [value_by_hand(agent, states) for states in future]
    return [loop(factor * r, [0] * STEPS, v, 0.99, horizon, *weight) for r, v in zip(reward, values)]


@pytest.mark.parametrize("horizon", [1, 3, 7])
@pytest.mark.parametrize("kind", ["td3bc", "iql"])
def test_each_agents_target_by_hand(kind, horizon):
    """TD3+BC: the smaller target critic at the target policy; IQL: its value network, and rewards times the factor."""
    agent, (_, parts) = make_agent(kind, policy_noise=0.0, simulation_horizon=horizon), random_rows()
    assert agent.target(*parts[2:]).tolist() == pytest.approx(targets_by_hand(agent, parts, horizon), rel=1e-4)


def test_target_noise_is_clipped_and_so_is_the_action():
    agent, seen = make_agent("td3bc", policy_noise=100.0), []
    agent.qf1_target = agent.qf2_target = lambda obs, action: (seen.append(action), torch.zeros(len(obs)))[1]
    agent.actor_target = lambda obs: torch.zeros(len(obs), 3)
    agent.target_value(torch.zeros(50, 11))
    assert seen[0].abs().max() == 0.5  # noise_clip
    agent.actor_target = lambda obs: torch.ones(len(obs), 3)
    agent.target_value(torch.zeros(50, 11))
    assert seen[-1].max() == 1


@pytest.mark.parametrize("kind", ["td3bc", "iql"])
def test_an_update_fits_both_critics_at_the_real_pairs_to_the_targets_of_before(kind):
    """The rate is so large that any parameter used after its step would show."""
    agent, (rows, parts) = make_agent(kind, policy_noise=0.0, agent_lr=1.0), random_rows()
    obs, action = parts[:2]
    target = torch.tensor(targets_by_hand(agent, parts, 7))
    with torch.no_grad():
        errors = [float((qf(obs, action) - target).square().mean()) for qf in (agent.qf1, agent.qf2)]
        expected = {"agent/qf_target": float(target.mean()), "agent/qf_loss": sum(errors)}
        if kind == "iql":  # the mean of the two, IQL's code; V and the weights at the real pair too
            advantage = torch.minimum(agent.qf1_target(obs, action), agent.qf2_target(obs, action)) - agent.vf(obs)
            weight = (3 * advantage).exp().clamp(max=100)
            vf_loss = torch.where(advantage > 0, 0.7, 0.3) * advantage**2
            expected |= {"agent/qf_loss": sum(errors) / 2, "agent/vf_loss": float(vf_loss.mean())}
            actor_loss = -(weight * agent.actor.log_prob(obs, action)).mean()
            expected |= {"agent/actor_loss": float(actor_loss), "agent/actor_weight": float(weight.mean())}
        else:
            expected["agent/bc_loss"] = float((agent.actor(obs) - action).square().mean())
    losses = {name: float(value) for name, value in agent.update(rows, update_actor=True).items()}
    if kind == "td3bc":
        del losses["agent/actor_loss"]  # by the critic after its step
    assert losses == pytest.approx(expected, rel=1e-4)


def test_td3bc_actor_loss_by_hand():
    """Q of the first critic in units of its mean magnitude, times 2.5, against the squared distance to the action."""
    agent, (_, (obs, action, *_)) = make_agent("td3bc"), random_rows()
    with torch.no_grad():
        policy_action = agent.actor(obs)
        q, distance = agent.qf1(obs, policy_action), (policy_action - action).square().mean()
        loss, bc_loss = agent.actor_loss(obs, action)
    assert float(bc_loss) == pytest.approx(float(distance), rel=1e-5)
    assert float(loss) == pytest.approx(float(distance) - 2.5 * sum(q.tolist()) / sum(map(abs, q.tolist())), rel=1e-4)


def test_iqls_policy_rate_falls_to_0_by_a_cosine():
    agent, rates = make_agent("iql", agent_updates=4), []
    for _ in range(4):
        agent.update(random_rows(4)[0], update_actor=True)
        rates.append(agent.actor_schedule.get_last_lr()[0] / 3e-4)
    assert rates == pytest.approx([(1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0], abs=1e-9)


@pytest.mark.parametrize("kind", ["td3bc", "iql"])
def test_targets_move_by_the_polyak_rate_only_with_the_actor(kind):
    agent = make_agent(kind)
    start = [p.clone() for p in targets_of(agent)]
    agent.update(random_rows()[0], update_actor=False)
    assert all(torch.equal(a, b) for a, b in zip(start, targets_of(agent), strict=True))
    agent.update(random_rows()[0], update_actor=True)
    for before, now, online in zip(start, targets_of(agent), online_of(agent), strict=True):
        torch.testing.assert_close(now, 0.995 * before + 0.005 * online, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["td3bc", "iql"])
def test_an_actor_update_moves_no_critic(kind):
    networks = []
    for update_actor in (True, False):
        agent = make_agent(kind)
        torch.manual_seed(1)
        agent.update(random_rows()[0], update_actor)
        networks.append([*agent.qf_parameters, *(agent.vf.parameters() if kind == "iql" else [])])
    assert all(torch.equal(a, b) for a, b in zip(*networks, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_td3bc_standardises_observations_and_iql_only_if_asked(normalize):
    obs = torch.randn(500, 11) * 3 + 1
    td3bc = script.TD3BC(Args(normalize_obs=normalize), obs, 3)
    torch.testing.assert_close(td3bc.actor.obs_mean, obs.mean(0))
    torch.testing.assert_close(td3bc.qf1.obs_std, obs.std(0) + 1e-3)
    iql = script.IQL(Args(normalize_obs=normalize, policy_delay=1), obs, 3, 1.0)
    for network in (iql.actor, iql.qf1, iql.vf):
        torch.testing.assert_close(network.obs_mean, obs.mean(0) if normalize else torch.zeros(11))


# ---- The command line


@pytest.mark.parametrize(
    "flags, policy_delay, lambda_return",
    [
        (dict(agent="td3bc"), 2, False),
        (dict(agent="iql"), 1, True),
        (dict(agent="td3bc", policy_delay=3, lambda_return=True), 3, True),
        (dict(agent="iql", policy_delay=2, lambda_return=False), 2, False),
    ],
)
def test_each_agent_has_its_own_defaults_and_flags_win(monkeypatch, flags, policy_delay, lambda_return):
    class Stop(Exception):
        pass

    def check_args(args):
        assert (args.policy_delay, args.lambda_return) == (policy_delay, lambda_return)
        raise Stop

    monkeypatch.setattr(script, "check_args", check_args)
    with pytest.raises(Stop):
        script.main(Args(**flags))


def test_both_agents_online_and_stored_reach_a_score_with_the_world_model_of_dawm_td3bc(tmp_path):
    toy = [*TOY_AGENT, *TOY_WORLD_MODEL]
    hopper_command("dawm_td3bc.py", tmp_path, *TOY)
    runs = [
        ["--agent", "td3bc", "--rollouts", "online"],
        ["--agent", "td3bc", "--rollouts", "stored"],
        ["--agent", "iql", "--rollouts", "stored", "--simulation-horizon", "3", "--termination", "rule"],
        ["--agent", "iql", "--rollouts", "online", "--lambda-base", "printed"],
    ]
    texts, stages = [], []
    for number, options in enumerate(runs):
        texts.append(hopper_command("dwm_baseline.py", tmp_path, *toy, *options, "--exp-name", f"dwm{number}"))
        (folder,) = (tmp_path / "runs").glob(f"*dwm{number}*")
        stages.append(json.loads((folder / "stages.json").read_text()))
        assert f"world model      reused {stages[-1]['world model']}" in texts[-1]
        assert (folder / "actor.safetensors").exists() and "final" in texts[-1]
        facts = json.loads((folder / "args.json").read_text())["args"]
        assert DEFAULTS[facts["agent"]].items() <= facts.items()
        logged = {name for line in (folder / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
        agents = {"td3bc": "agent/bc_loss", "iql": "agent/vf_loss"}
        assert {"world_model/loss", "agent/qf_target", "eval/normalized_score", agents[facts["agent"]]} <= logged
    assert [list(names) for names in stages] == [
        ["world model"], ["world model", "rollouts"], ["world model", "rollouts"], ["world model"],
    ]  # fmt: skip
    assert stages[1] == stages[2] and f"reused {stages[2]['rollouts']}" not in texts[1]
    assert f"rollouts         reused {stages[2]['rollouts']}" in texts[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--agent", "sac"], "invalid choice 'sac' for argument '--agent'. Expected one of ('td3bc', 'iql')"),
        (["--simulation-horizon", "8"], "--simulation-horizon 8 is above --model-horizon 7; lower it or raise that"),
        (["--lambda-weight", "1.5"], "--lambda-weight 1.5 lies outside [0, 1]"),
        (["--agent", "iql", "--expectile", "1"], "--expectile 1.0 lies outside [0.001, 0.999]"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert message in refusal(script, arguments, tmp_path, capsys)
