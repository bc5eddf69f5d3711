"""dwm_baseline.py: imagined targets by plain loops, equal arms, futures.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

import dawm_iql
import dawm_td3bc
import dwm_baseline as script
from common.cli import Signals, Stopped
from dwm_baseline import Args

import pytest
import torch
from toy import TINY, linear_dataset, new_run

STEPS = 8  # imagined by a world model of horizon 7


# ---- Targets


def n_step(reward, ended, value, gamma, n, extra=False):
    """Rewards 0..n-1, then the value of state n; nothing after an end. `extra`: reward n too, and the value later."""
    total = 0.0
    for h in range(n):
        total += gamma**h * float(reward[h])
        if ended[h]:
            return total
    rest = float(reward[n]) + gamma * float(value[n - 1]) if extra else float(value[n - 1])
    return total + gamma**n * rest


def mixture(reward, ended, value, gamma, n, weight, extra):
    """The lambda-return looking forward: 1..n steps with weights (1 - lambda) lambda^(i-1), the rest to the longest."""
    parts = [(1 - weight) * weight ** (i - 1) * n_step(reward, ended, value, gamma, i) for i in range(1, n + 1)]
    return sum(parts) + weight**n * n_step(reward, ended, value, gamma, n, extra)


@pytest.mark.parametrize("horizon", [1, 3, 7])
@pytest.mark.parametrize("termination", ["rule", "none"])
@pytest.mark.parametrize("kind", ["mve", "corrected", "printed"])
def test_imagined_target_against_a_plain_loop(horizon, termination, kind, double):
    """States are worth their first number. Beyond the horizon all is NaN, but for the printed recursion's reward."""
    ended = torch.rand(50, STEPS) < 0.25
    ended[0], ended[1] = False, torch.eye(STEPS)[3]
    reward, states = torch.randn(50, STEPS), torch.randn(50, STEPS, 2)
    reward[:, horizon + (kind == "printed") :] = states[:, horizon:] = torch.nan
    args = Args(
        horizon=horizon, termination=termination, lambda_return=kind != "mve", gamma=0.9, lambda_weight=0.7,
        lambda_base=kind.replace("mve", "corrected"),
    )  # fmt: skip
    expected = []
    for r, e, s in zip(3 * reward, ended & (termination == "rule"), states):
        loop = (r, e, s[:, 0], 0.9, horizon)
        expected.append(n_step(*loop) if kind == "mve" else mixture(*loop, 0.7, kind == "printed"))
    future = {"reward": reward, "ended": ended, "obs": states}
    target = script.imagined_target(args, future, lambda obs: obs[:, 0], reward_factor=3)
    assert target.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lambda_return", [False, True])
@pytest.mark.parametrize("kind, home", [("TD3BC", dawm_td3bc), ("IQL", dawm_iql)])
def test_at_horizon_1_the_updates_are_dawms_on_the_same_transitions(kind, home, lambda_return, double):
    """Five of them: networks, noise, losses, rates, target networks. Their tests by hand hold here too."""
    settings = dict(agent_lr=0.01, tau=0.1, policy_delay=2, agent_updates=4)
    args = Args(horizon=1, termination="rule", lambda_return=lambda_return, **settings)
    obs, action = torch.randn(100, 11) * 3 + 1, torch.rand(100, 3) * 2 - 1
    ended = torch.rand(100, STEPS) < 0.3
    future = {"reward": torch.randn(100, STEPS), "ended": ended, "obs": torch.randn(100, STEPS, 11)}
    rows = torch.cat([obs, action, future["reward"][:, :1], future["obs"][:, 0], ended[:, :1]], dim=1)
    told = []
    for module, batch in ((script, (obs, action, future)), (home, (rows,))):
        torch.manual_seed(1)
        factor = (3.0,) if kind == "IQL" else ()
        agent = getattr(module, kind)(args if module is script else home.Args(**settings), obs, 3, *factor)
        told.append([])
        for update in range(1, 6):
            losses = agent.update(*batch, update_actor=update % 2 == 0)
            told[-1] += [float(losses[name]) for name in sorted(losses)]
        told[-1] += agent.actor(obs).flatten().tolist()
    assert len(told[0]) > 300 and told[0] == pytest.approx(told[1], rel=1e-6, abs=1e-9)


# ---- Equal arms

OWN = {"agent", "rollouts", "lambda_return", "lambda_weight", "lambda_base"}
DAWMS = {"synthesis", "conditioning_subsample", "synthetic_fraction", "policy_noise", "noise_clip", "bc_alpha"}
DAWMS |= {name for name in vars(dawm_td3bc.Args()) if name.startswith("idm_")}
IQLS = {"expectile", "awr_beta", "max_weight", "policy", "reward_scaling", "normalize_obs"}


@pytest.mark.parametrize(
    "scale, named",
    [("laptop", set()), ("paper", {"agent_updates", "agent_batch_size", "termination"})],  # DWM's own [DWM App.]
)
@pytest.mark.parametrize("kind, home", [("td3bc", dawm_td3bc), ("iql", dawm_iql)])
def test_arguments_differ_from_dawms_in_what_is_named_here_alone(kind, home, scale, named):
    ours, theirs = (vars(m.Args(**m.LAPTOP if scale == "laptop" else {})) for m in (script, home))
    ours |= {name: value for name, value in script.AGENTS[kind].items() if ours[name] is None}
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == named
    unshared = ours.keys() ^ theirs.keys()
    assert OWN <= unshared <= OWN | DAWMS | IQLS, "a field that the arms share has two names, or none here"


@pytest.mark.parametrize("agent, policy_delay, lambda_return", [("td3bc", 2, False), ("iql", 1, True)])
def test_each_agent_has_its_own_defaults_and_flags_win(agent, policy_delay, lambda_return, monkeypatch):
    def stop(args):
        raise Stopped

    monkeypatch.setattr(script, "check_args", stop)
    for flags in (dict(policy_delay=3), dict(lambda_return=not lambda_return)):
        args = Args(agent=agent, **flags)
        with pytest.raises(Stopped):
            script.main(args)
        expected = dict(policy_delay=policy_delay, lambda_return=lambda_return) | flags
        assert expected.items() <= vars(args).items()


# ---- Futures


def make_windows(**changes):
    return script.Windows(Args(**TINY, **changes), linear_dataset(episodes=10, terminated=True), torch.device("cpu"))


def test_a_future_is_what_was_imagined_after_a_real_pair(monkeypatch):
    """Pair 35 goes on; in pair 4 the model's own sign at steps 2 and 3 says that states 2 and 3 are ends."""
    windows, asked = make_windows(), []
    imagined, reward = torch.randn(2, STEPS + 1, 2), torch.rand(2, STEPS) * 0.1
    reward[1, 2:4] = windows.end_reward
    monkeypatch.setattr(script, "sample_rollouts", lambda *a: (asked.extend(a[1:]), (imagined, reward))[1])
    future = script.imagine_futures(Args(**TINY), windows, "model", torch.tensor([35, 4]))
    world_model, obs, action, target = asked
    assert world_model == "model" and target.tolist() == [[pytest.approx(0.7)]] * 2
    assert torch.equal(obs, windows.obs[[36, 4]])  # episode 1 begins one row later: 31 states to 30 actions
    assert torch.equal(action, windows.action[[35, 4]])
    assert future["reward"].tolist() == [reward[0].tolist(), [*reward[1, :2].tolist(), 0, 0, *reward[1, 4:].tolist()]]
    assert future["ended"].tolist() == [[False] * STEPS, [False, True, True, *[False] * 5]]
    assert torch.equal(future["obs"], imagined[:, 1:])


def test_a_fall_by_the_simulators_rule_is_an_end_too():
    windows, reward = make_windows(), torch.zeros(1, STEPS)
    height = torch.tensor([0.6, 1.1, 1.0, 0.6, 1.2, 1.2, 1.2, 1.2, 0.7])[None, :, None]  # not above 0.7: 0, 3 and 8
    assert not script.mark_ends(windows, height, reward)[0].any()
    windows.healthy = torch.tensor([0.7]), torch.tensor([torch.inf])
    assert script.mark_ends(windows, height, reward)[0].nonzero()[:, 1].tolist() == [2, 7]


def run_of(folder, **changes):
    """A run on the linear system, behind a world model."""
    run = new_run(folder, args_class=Args, **TINY | changes)
    run.fingerprints["world model"] = "model"
    return run


def test_stored_futures_are_all_pairs_whatever_stops_them_for_every_target_and_agent(tmp_path, monkeypatch):
    windows, imagine, stops = make_windows(), script.imagine_futures, 0
    world_model = script.WorldModel(Args(**TINY), windows)

    def stop_once(*arguments):  # a signal in the third batch of five
        nonlocal stops
        stops += 1
        Signals.received = "SIGTERM" if stops == 3 else None
        return imagine(*arguments)

    monkeypatch.setattr(script, "imagine_futures", stop_once)
    run = run_of(tmp_path, synthesis_batch_size=64)
    with pytest.raises(Stopped, match=r"at 192 of 300 pairs, with a checkpoint"):
        script.synthesize(run.args, windows, world_model, run)
    Signals.received = None
    stored = script.synthesize(run.args, windows, world_model, run)
    assert stops == 5
    run.seed("synthesis", run.args.synthesis_seed)
    for index in torch.arange(300).split(64):
        for name, values in imagine(run.args, windows, world_model, index).items():
            assert torch.equal(stored[name][index], values), name

    for same in (dict(horizon=3), dict(termination="rule"), dict(agent="iql"), dict(lambda_return=True)):
        other = run_of(tmp_path, synthesis_batch_size=64, **same)
        found = script.synthesize(other.args, windows, world_model, other)
        assert other.kept == run.kept and all(torch.equal(found[name], stored[name]) for name in stored)
    other = run_of(tmp_path, synthesis_batch_size=64, guidance_scale=1.0)
    script.synthesize(other.args, windows, world_model, other)
    assert stops == 10 and other.kept != run.kept


@pytest.mark.parametrize("kind", ["td3bc", "iql"])
@pytest.mark.parametrize("stored", [True, False])
def test_agents_learn_at_real_pairs_from_their_own_futures(kind, stored, tmp_path, monkeypatch):
    windows, batches = make_windows(), []
    number = torch.arange(300.0)
    futures = {"reward": number[:, None].repeat(1, STEPS), "ended": torch.zeros(300, STEPS, dtype=torch.bool)}
    futures["obs"] = torch.zeros(300, STEPS, 2)
    monkeypatch.setattr(script, "imagine_futures", lambda *a: {name: x[a[3]] for name, x in futures.items()})
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    agent_class = script.TD3BC if kind == "td3bc" else script.IQL
    monkeypatch.setattr(agent_class, "update", lambda *a, update_actor: (batches.append((*a[1:], update_actor)), {})[1])
    run = run_of(tmp_path, agent=kind, agent_updates=9, agent_batch_size=64, policy_delay=3)
    script.train_agent(run.args, linear_dataset(10), windows, None, futures if stored else None, None, run)
    for obs, action, future, _ in batches:
        index = future["reward"][:, 0].long()
        assert len(index) == 64
        assert torch.equal(obs, windows.obs[windows.start[index]]) and torch.equal(action, windows.action[index])
    assert torch.cat([batch[2]["reward"][:, 0] for batch in batches]).unique().numel() > 200  # of 300, drawn 576 times
    assert [update_actor for *_, update_actor in batches] == [False, False, True] * 3
