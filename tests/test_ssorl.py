"""baselines/ssorl.py: which actions are hidden and how they are filled in.

What it has from the other scripts to the letter (test_source.py) is tested with them.
"""

from dataclasses import replace

from baselines import ssorl as script
from baselines.ssorl import Args, Trajectories
from common import UserError

import numpy as np
import pytest
import torch
from toy import Training, hopper_file, linear_dataset

CPU = torch.device("cpu")
LENGTHS = np.array([20, 10, 30, 5, 15, 25, 12, 18, 7, 8])
ENDS = np.cumsum(LENGTHS)
ROWS = [range(end - length, end) for end, length in zip(ENDS, LENGTHS, strict=True)]


def uneven_dataset():
    """Ten trajectories of different lengths, the return of each a sum of 5 to 30 rewards."""
    return replace(linear_dataset(episodes=1, length=150), lengths=LENGTHS, complete=np.ones(10, bool))


def by_return(dataset):
    """Numbers of the trajectories, the worst first: from a plain sum."""
    returns = [sum(float(dataset.reward[row]) for row in rows) for rows in ROWS]
    return sorted(range(10), key=returns.__getitem__)


# ---- Section 2: which trajectories stay, and which keep their actions


@pytest.mark.parametrize(
    "changes, left_out",
    [
        ({}, "worst"),  # SSORL's code drops just one
        ({"traj_filter": "none"}, []),
        ({"traj_filter": "length_topk", "topk": 3}, [1, 3, 4, 6, 7, 8, 9]),
        ({"traj_filter": "length_topk", "topk": 5}, [1, 3, 6, 8, 9]),
        ({"traj_filter": "length_topk"}, []),
    ],
)
def test_the_filters(changes, left_out):
    dataset = uneven_dataset()
    ranked = by_return(dataset)
    left_out = ranked[:1] if left_out == "worst" else left_out
    assert script.keep_trajectories(Args(**changes), dataset).tolist() == [e for e in ranked if e not in left_out]


@pytest.mark.parametrize(
    "fraction, share, count, pool",
    [
        (0.3, 0.5, 3, 5), (0.39, 0.59, 3, 5), (0.2, 0.25, 2, 2), (0.5, 0.5, 5, 5), (0.7, 0.5, 7, 7), (0.2, 1, 2, 10),
        (1, 0.5, 10, 10),
    ],
)  # fmt: skip
def test_labelled_are_so_many_of_the_lowest_returns(fraction, share, count, pool):
    """Both shares are rounded down, as in SSORL's code; in 100 draws each of the pool has its turn, nobody else."""
    kept, seen = np.array([7, 3, 9, 0, 1, 8, 2, 4, 6, 5]), set()  # from the lowest return to the highest
    for seed in range(100):
        labelled = script.draw_labelled(Args(label_fraction=fraction, label_pool=share, label_seed=seed), kept)
        assert len(set(labelled)) == len(labelled) == count
        seen |= set(labelled)
    assert seen == set(kept[:pool])


def test_the_draw_depends_on_its_seed_alone():
    def draw(seed):
        np.random.seed(seed + 1)
        return script.draw_labelled(Args(label_fraction=0.2, label_seed=seed), np.arange(10)).tolist()

    draws = [draw(seed) for seed in range(6)]
    np.random.seed(0)
    assert draws == [draw(seed) for seed in range(6)] and len(set(map(tuple, draws))) > 1


def test_too_few_trajectories_are_told():
    with pytest.raises(UserError, match="--traj-filter length_topk leaves 2 of 10 trajectories; 3 are needed"):
        script.keep_trajectories(Args(traj_filter="length_topk", topk=2), uneven_dataset())
    with pytest.raises(UserError, match=r"--label-fraction 0\.19 labels 1 of 10 trajectories; two are needed"):
        script.draw_labelled(Args(label_fraction=0.19), np.arange(10))


def test_hidden_actions_are_nan_and_nothing_else_changes():
    dataset = uneven_dataset()
    trajectories = Trajectories(Args(label_fraction=0.4), dataset, CPU)
    assert len(trajectories.labelled) == 3 and by_return(dataset)[0] not in trajectories.kept  # 0.4 of 9
    for number, rows in enumerate(ROWS):
        known = torch.as_tensor(dataset.action[rows])
        expected = known if number in trajectories.labelled else torch.full_like(known, torch.nan)
        assert torch.allclose(trajectories.action[list(rows)], expected, rtol=0, atol=0, equal_nan=True)
    assert np.array_equal(trajectories.obs, dataset.obs) and np.array_equal(trajectories.next_obs, dataset.next_obs)
    assert np.array_equal(trajectories.rows[:, 4], dataset.reward) and not np.isnan(dataset.action).any()


# ---- Section 4: inverse dynamics


def test_triples_against_a_plain_loop():
    """The first state of a trajectory is its own past, the last is followed by next_obs: no triple leaves its
    trajectory, whether the neighbours' actions are known or hidden."""
    dataset = uneven_dataset()
    dataset = replace(dataset, next_obs=dataset.next_obs + 100)  # what comes next must be read there
    triples = Trajectories(Args(label_fraction=0.4), dataset, CPU).triples(torch.arange(150))
    past = [row if row == rows[0] else row - 1 for rows in ROWS for row in rows]
    assert np.array_equal(triples, np.concatenate([dataset.obs[past], dataset.obs, dataset.next_obs], axis=1))


def test_inverse_dynamics_learns_the_known_inverse_from_few_labels():
    """Ten of a hundred trajectories are labelled; the actions of the other ninety are inferred."""
    args = Args(idm_steps=330, idm_batch_size=256, idm_width=64, idm_lr=3e-3, log_every=100, traj_filter="none")
    dataset, run = linear_dataset(episodes=100), Training()
    trajectories = Trajectories(args, dataset, CPU)
    inverse_dynamics = script.train_inverse_dynamics(args, trajectories, run)
    hidden = trajectories.action[:, 0].isnan()
    with torch.no_grad():
        inferred = inverse_dynamics(trajectories.triples(hidden.nonzero()[:, 0])).numpy()
        _, held_out = script.idm_split(args, trajectories)
        log_prob = inverse_dynamics.log_prob(trajectories.triples(held_out), trajectories.action[held_out])
    assert hidden.sum() == 90 * 30 and np.abs(inferred - dataset.action[hidden]).mean() < 0.08
    assert min(run.logged["idm/val_loss"]) == pytest.approx(-float(log_prob.mean()), rel=1e-5)  # its best weights
    assert not inverse_dynamics.training


@pytest.mark.parametrize("holdout, held_out", [(0.1, 1), (0.4, 2), (0.75, 4), (0.9, 4)])
def test_labelled_trajectories_alone_are_learned_from_and_some_are_held_out(monkeypatch, holdout, held_out):
    """Of five labelled trajectories, the share rounded up only measures; no hidden one is ever looked at. The units
    are those of all states."""
    args = Args(idm_steps=60, idm_batch_size=64, idm_width=8, log_every=60, label_fraction=0.6, idm_holdout=holdout)
    dataset = uneven_dataset()
    trajectories = Trajectories(args, dataset, CPU)
    row_of = {tuple(triple): row for row, triple in enumerate(trajectories.triples(torch.arange(150)).tolist())}
    seen = {True: set(), False: set()}  # while training, while measuring

    class Recorder(script.InverseDynamics):
        def log_prob(self, triples, action):
            rows = [row_of[tuple(triple)] for triple in triples.tolist()]
            assert np.array_equal(action, dataset.action[rows])
            seen[self.training] |= {np.searchsorted(ENDS, row, side="right") for row in rows}
            return super().log_prob(triples, action)

    monkeypatch.setattr(script, "InverseDynamics", Recorder)
    model = script.train_inverse_dynamics(args, trajectories, Training())
    assert len(seen[False]) == held_out and len(seen[True]) == 5 - held_out
    assert seen[True] | seen[False] == set(trajectories.labelled)
    np.testing.assert_allclose(model.obs_mean, np.tile(dataset.obs.mean(0, dtype=np.float64), 3), rtol=1e-5)


# ---- Section 5: proxy labels


@pytest.mark.parametrize("relabel_all", [False, True])
def test_proxy_labels_stand_where_actions_were_hidden_or_everywhere(relabel_all):
    """Whole trajectories, one after another, each padded to the longest."""
    args = Args(label_fraction=0.4, relabel_all=relabel_all)
    dataset, run = uneven_dataset(), Training()
    trajectories, labels = Trajectories(args, dataset, CPU), 0
    made = script.synthesize(args, trajectories, lambda triples: triples[:, :2] + 8 * triples[:, 4:], run)
    lengths = LENGTHS[trajectories.kept]
    assert made["rows"].shape == (9, max(lengths), 8) and made["valid"].sum(1).tolist() == lengths.tolist()
    for number, rows, valid in zip(trajectories.kept, made["rows"], made["valid"], strict=True):
        assert not rows[~valid].any() and valid[: LENGTHS[number]].all()
        for row, made_row in zip(ROWS[number], rows[valid].numpy(), strict=True):
            proxy = dataset.obs[max(ROWS[number][0], row - 1)] + 8 * dataset.next_obs[row]
            known = number in trajectories.labelled and not relabel_all
            labels += known
            expected = [dataset.obs[row], dataset.action[row] if known else proxy, dataset.reward[[row]]]
            expected += [dataset.next_obs[row], dataset.terminated[[row]]]
            np.testing.assert_array_equal(made_row, np.concatenate(expected, dtype=np.float32))
    assert run.logged == {"synthesis/transitions": [sum(lengths)], "synthesis/proxy_labels": [sum(lengths) - labels]}


# ---- The whole method


def test_another_split_makes_another_inverse_dynamics_model(folders, monkeypatch):
    """Its key hashes what chooses the labels; neither the agent nor what becomes of known actions is among that."""
    found, data = [], hopper_file(folders / "data.hdf5")

    def synthesize(args, trajectories, inverse_dynamics, run):
        found.append((run.kept["inverse dynamics"], args.policy_delay))
        known = ~trajectories.action[trajectories.rows_of(trajectories.kept)].isnan().any(1)
        assert run.content["constants"]["labelled_share_of_steps"] == pytest.approx(float(known.float().mean()))
        run.lock.release()
        raise UserError("enough")

    monkeypatch.setattr(script, "synthesize", synthesize)
    same = dict(data_path=data, label_fraction=0.3, idm_steps=2, idm_width=8, eval_episodes=1, device="cpu")
    same |= dict(run_dir=folders / "runs", stage_dir=folders / "stages")
    for changes in (
        dict(agent="td3bc"), dict(agent="iql"), dict(relabel_all=True, policy_delay=3), dict(label_seed=1),
        dict(label_fraction=0.5), dict(traj_filter="none"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="enough"):
            script.main(Args(**{**same, **changes}))
    paths, delays = zip(*found, strict=True)
    assert paths[0] == paths[1] == paths[2] and len(set(paths[2:])) == 4
    assert delays[:3] == (2, 1, 3)  # each agent has its own, and a flag wins
