"""ssorl_baseline.py: which actions are hidden and how they are filled in, and the script by its command line.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import TOY_AGENT, TOY_IDM, hopper_command, hopper_file, linear_dataset, refusal

import ssorl_baseline as script
from common import UserError
from common.run import Run
from ssorl_baseline import Args

LENGTHS = np.array([20, 10, 30, 5, 15, 25, 12, 18, 7, 8])


def uneven_dataset():
    """Ten episodes of different lengths, the return of each a sum of 5 to 30 rewards."""
    dataset = linear_dataset(episodes=1, length=150)
    return replace(dataset, lengths=LENGTHS, complete=np.ones(10, bool))


def episodes_of(dataset):
    """First row and row after the last, of each episode."""
    ends = np.cumsum(dataset.lengths)
    return list(zip(ends - dataset.lengths, ends))


def returns_of(dataset):
    return [sum(float(r) for r in dataset.reward[a:b]) for a, b in episodes_of(dataset)]


def from_worst_to_best(dataset):
    returns = returns_of(dataset)
    return sorted(range(len(returns)), key=returns.__getitem__)


def labelled_of(dataset):
    return [e for e, (a, b) in enumerate(episodes_of(dataset)) if not np.isnan(dataset.action[a:b]).any()]


# ---- Section 2: which trajectories stay, and which keep their actions


def same_episodes(filtered, dataset, kept):
    """Whether `filtered` consists of the episodes `kept` of the data set, in their order, row by row."""
    rows = [row for episode in kept for row in range(*episodes_of(dataset)[episode])]
    by_row = ("obs", "action", "reward", "next_obs", "terminated")
    return filtered.lengths.tolist() == [LENGTHS[e] for e in kept] and all(
        np.array_equal(getattr(filtered, name), getattr(dataset, name)[rows]) for name in by_row
    )


def test_return_topk_drops_exactly_the_worst():
    dataset = uneven_dataset()
    dataset.complete[3] = False
    worst = from_worst_to_best(dataset)[0]
    kept = [e for e in range(10) if e != worst]
    filtered = script.filter_trajectories(Args(), dataset)
    assert same_episodes(filtered, dataset, kept) and filtered.complete.tolist() == [e != 3 for e in kept]


@pytest.mark.parametrize("topk, kept", [(3, [0, 2, 5]), (5, [0, 2, 4, 5, 7]), (100, range(10))])
def test_length_topk_keeps_the_longest(topk, kept):
    dataset = uneven_dataset()
    filtered = script.filter_trajectories(Args(traj_filter="length_topk", topk=topk), dataset)
    assert same_episodes(filtered, dataset, list(kept))


def test_no_filter_keeps_all():
    dataset = uneven_dataset()
    assert same_episodes(script.filter_trajectories(Args(traj_filter="none"), dataset), dataset, list(range(10)))


def test_too_few_trajectories_are_told():
    with pytest.raises(UserError, match="--traj-filter length_topk leaves 2 of 10 trajectories; 3 are needed"):
        script.filter_trajectories(Args(traj_filter="length_topk", topk=2), uneven_dataset())
    with pytest.raises(UserError, match=r"--label-fraction 0\.1 labels 1 of 10 trajectories; two are needed"):
        script.hide_actions(Args(label_fraction=0.1), uneven_dataset())


@pytest.mark.parametrize(
    "fraction, share, count, pool",
    [(0.3, 0.5, 3, 5), (0.2, 0.25, 2, 2), (0.5, 0.5, 5, 5), (0.7, 0.5, 7, 7), (0.2, 1.0, 2, 10), (1.0, 0.5, 10, 10)],
)
def test_labelled_are_so_many_of_the_lowest_returns(fraction, share, count, pool):
    """The pool is the stated share of the trajectories, or the label fraction if that is more, rounded down."""
    dataset, seen = uneven_dataset(), set()
    for seed in range(100):
        hidden = script.hide_actions(Args(label_fraction=fraction, label_pool=share, label_seed=seed), dataset)
        labelled = labelled_of(hidden)
        seen |= set(labelled)
        assert len(labelled) == count and script.is_labelled(hidden).nonzero()[0].tolist() == labelled
    assert seen == set(from_worst_to_best(dataset)[:pool])  # in 100 draws each of the pool had its turn, nobody else


def test_hidden_actions_are_nan_and_nothing_else_changes():
    dataset = uneven_dataset()
    hidden = script.hide_actions(Args(label_fraction=0.3), dataset)
    labelled = labelled_of(hidden)
    for episode, (a, b) in enumerate(episodes_of(dataset)):
        if episode in labelled:
            assert np.array_equal(hidden.action[a:b], dataset.action[a:b])
        else:
            assert np.isnan(hidden.action[a:b]).all()
    assert hidden.action.dtype == np.float32 and not np.isnan(dataset.action).any()
    assert same_episodes(replace(hidden, action=dataset.action), dataset, list(range(10)))


def test_the_draw_depends_on_its_seed_alone():
    dataset = uneven_dataset()

    def draw(seed):
        np.random.seed(seed + 1)
        return labelled_of(script.hide_actions(Args(label_fraction=0.2, label_seed=seed), dataset))

    draws = [draw(seed) for seed in range(6)]
    np.random.seed(0)
    assert draws == [draw(seed) for seed in range(6)] and len(set(map(tuple, draws))) > 1


# ---- Section 4: inverse dynamics


def test_triples_against_a_plain_loop():
    """The first state of an episode is its own past, the last is followed by next_obs; no triple leaves its episode."""
    dataset = uneven_dataset()
    dataset = replace(dataset, next_obs=dataset.next_obs + 100)  # what comes next must be read there
    triples = script.obs_triples(dataset, torch.device("cpu"))
    expected = []
    for a, b in episodes_of(dataset):
        for row in range(a, b):
            past = dataset.obs[row if row == a else row - 1]
            expected.append(np.concatenate([past, dataset.obs[row], dataset.next_obs[row]]))
    assert np.array_equal(triples.numpy(), np.array(expected))


@pytest.fixture
def run(tmp_path):
    run = Run(Args(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages", device="cpu"))
    run.open()
    run.fingerprints["data"] = "test"
    return run


def test_inverse_dynamics_learns_the_known_inverse_from_few_labels_and_keeps_its_best_weights(run):
    """Ten of a hundred trajectories are labelled; the actions of the other ninety are inferred."""
    args = Args(idm_steps=800, idm_batch_size=256, idm_width=64, idm_lr=3e-3, log_every=100)
    true = linear_dataset(episodes=100)
    dataset = script.hide_actions(args, true)
    inverse_dynamics = script.train_inverse_dynamics(args, dataset, run)
    hidden = np.isnan(dataset.action[:, 0])
    inferred = inverse_dynamics(script.obs_triples(dataset, run.device)[hidden]).detach().numpy()
    assert hidden.sum() == 90 * 30 and np.abs(inferred - true.action[hidden]).mean() < 0.08
    losses = [value for _, value in run.history["idm/val_loss"]]
    assert run.history["idm/best_val_loss"][-1][1] == min(losses) and not inverse_dynamics.training


def test_inverse_dynamics_returns_an_earlier_best(run, monkeypatch):
    """Four checks, of which the second is made the best: the weights of then come back."""
    args = Args(idm_steps=40, idm_batch_size=64, idm_width=32, idm_lr=1e-2, log_every=10, label_fraction=0.2)
    dataset = script.hide_actions(args, linear_dataset(episodes=30))
    losses, kept = iter([5.0, 0.1, 6.0, 7.0]), []

    def log(step, values):
        if "idm/val_loss" in values:
            values["idm/val_loss"].fill_(next(losses))  # in place: what the script compares next

    monkeypatch.setattr(run, "log", log)
    monkeypatch.setattr(script, "copy", SimpleNamespace(deepcopy=lambda x: kept.append(deepcopy(x)) or kept[-1]))
    model = script.train_inverse_dynamics(args, dataset, run)
    assert len(kept) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept[1].values(), strict=True))


@pytest.mark.parametrize("holdout, held_out", [(0.1, 1), (0.4, 2), (0.75, 4)])
def test_labelled_trajectories_alone_are_learned_from_and_some_are_held_out(run, monkeypatch, holdout, held_out):
    """Of five labelled trajectories, the share rounded up only measures; no hidden one is ever looked at."""
    args = Args(idm_steps=60, idm_batch_size=64, idm_width=8, log_every=60, label_fraction=0.5, idm_holdout=holdout)
    dataset = script.hide_actions(args, uneven_dataset())
    triples = script.obs_triples(dataset, run.device)
    row_of = {tuple(triple): row for row, triple in enumerate(triples.tolist())}
    episode = np.repeat(np.arange(10), LENGTHS)
    seen = {True: set(), False: set()}  # while training, while measuring

    class Recorder(script.InverseDynamics):
        def log_prob(self, triples, action):
            rows = [row_of[tuple(triple)] for triple in triples.tolist()]
            assert torch.equal(action, torch.as_tensor(dataset.action[rows]))
            seen[self.training] |= set(episode[rows].tolist())
            return super().log_prob(triples, action)

    monkeypatch.setattr(script, "InverseDynamics", Recorder)
    script.train_inverse_dynamics(args, dataset, run)
    assert len(seen[False]) == held_out and len(seen[True]) == 5 - held_out
    assert seen[True] | seen[False] == set(labelled_of(dataset))


def test_holding_out_every_labelled_trajectory_is_told(run):
    dataset = script.hide_actions(Args(label_fraction=0.2), uneven_dataset())
    with pytest.raises(UserError, match=r"--idm-holdout 0\.9 leaves no labelled trajectory to train on; lower it"):
        script.train_inverse_dynamics(Args(idm_holdout=0.9), dataset, run)


# ---- Section 5: proxy labels


@pytest.mark.parametrize("relabel_all", [False, True])
def test_proxy_labels_stand_where_actions_were_hidden_or_everywhere(run, relabel_all):
    args = Args(label_fraction=0.3, relabel_all=relabel_all)
    true = uneven_dataset()
    dataset = script.hide_actions(args, true)
    filled = script.fill_in_actions(args, dataset, lambda triples: triples[:, :2] + 10 * triples[:, 4:], run)
    labelled, labels = labelled_of(dataset), 0
    for episode, (a, b) in enumerate(episodes_of(dataset)):
        for row in range(a, b):
            proxy = dataset.obs[max(a, row - 1)] + 10 * dataset.next_obs[row]
            known = episode in labelled and not relabel_all
            labels += known
            np.testing.assert_allclose(filled.action[row], true.action[row] if known else proxy, rtol=1e-6)
    assert run.records[-1][1] == {"synthesis/proxy_labels": 150 - labels, "synthesis/labels": labels}
    assert same_episodes(replace(filled, action=true.action), true, list(range(10)))


# ---- The whole method


def test_each_agent_has_its_own_delay_and_a_flag_wins(monkeypatch):
    delays = []

    def check_args(args):
        delays.append(args.policy_delay)
        raise UserError("enough")

    monkeypatch.setattr(script, "check_args", check_args)
    for flags in (dict(agent="td3bc"), dict(agent="iql"), dict(agent="iql", policy_delay=3)):
        with pytest.raises(UserError, match="enough"):
            script.main(Args(**flags))
    assert delays == [2, 1, 3]


def test_another_split_makes_another_inverse_dynamics_model(folders, monkeypatch):
    """Its key hashes the data with their hidden actions, so a run never finds a model of other labels."""
    data = hopper_file(folders / "data.hdf5")

    def fill_in_actions(args, dataset, inverse_dynamics, run):
        found.append(run.kept["inverse dynamics"])
        raise UserError("enough")

    monkeypatch.setattr(script, "fill_in_actions", fill_in_actions)
    found, same = [], dict(data_path=data, label_fraction=0.3, idm_steps=2, idm_width=8, eval_episodes=1, device="cpu")
    same |= dict(run_dir=folders / "runs", stage_dir=folders / "stages")
    for changes in (
        {}, dict(agent="iql"), dict(relabel_all=True), dict(label_seed=1), dict(label_fraction=0.5),
        dict(traj_filter="none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="enough"):
            script.main(Args(**{**same, **changes}))
    assert found[0] == found[1] == found[2] and len(set(found[2:])) == 4


def test_both_agents_reach_a_score(tmp_path):
    toy = [*TOY_AGENT, *TOY_IDM]
    texts = [
        hopper_command("ssorl_baseline.py", tmp_path, *toy, "--label-fraction", "0.3"),
        hopper_command(
            "ssorl_baseline.py", tmp_path, *toy, "--agent", "iql", "--label-fraction", "1", "--relabel-all",
            "--traj-filter", "none", "--exp-name", "relabelled",
        ),
    ]  # fmt: skip
    assert "actions of 3 trajectories known, of 8 hidden" in texts[0]  # 12, the worst dropped; 0.3 * 11 = 3.3
    assert "actions of 12 trajectories known, of 0 hidden" in texts[1]
    for name, loss in (("ssorl_baseline", "agent/bc_loss"), ("relabelled", "agent/vf_loss")):
        (folder,) = (tmp_path / "runs").glob(f"*{name}*")
        assert (folder / "actor.safetensors").exists() and "final" in (folder / "summary.txt").read_text()
        assert list(json.loads((folder / "stages.json").read_text())) == ["inverse dynamics"]
        metrics = {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            metrics |= json.loads(line)
        assert {"idm/best_val_mse", "eval/normalized_score", loss} <= metrics.keys()
        steps = metrics["synthesis/labels"] + metrics["synthesis/proxy_labels"]
        assert (metrics["synthesis/labels"] == 0) == (name == "relabelled") and steps > 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--agent", "sac"], "invalid choice 'sac' for argument '--agent'. Expected one of ('td3bc', 'iql')"),
        (["--label-fraction", "0"], "--label-fraction 0.0 lies outside [0.001, 1]"),
        (["--label-pool", "1.5"], "--label-pool 1.5 lies outside [0, 1]"),
        (["--agent", "iql", "--expectile", "1"], "--expectile 1.0 lies outside [0.001, 0.999]"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, capsys):
    assert message in refusal(script, arguments, tmp_path, capsys)
