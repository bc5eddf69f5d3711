"""joint_td3bc.py: actions sampled with the states, the script by its command line, and docs/forking.md by its figures.

What it has from dawm_td3bc.py to the letter (test_source.py) is tested there.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ROOT, TINY, TOY, TOY_AGENT, TOY_WORLD_MODEL, hopper_command, linear_dataset, refusal

import dawm_td3bc as home
import joint_td3bc as script
from common.run import Run
from common.stages import stage_source
from joint_td3bc import Args

KNOWN_FIRST, KNOWN_LAST = slice(0, 4), slice(2, 5)  # channels of the linear system: two obs, two action, one reward


def make_model(dataset=None, **changes):
    args = Args(**TINY, **changes)
    windows = script.Windows(args, linear_dataset() if dataset is None else dataset, torch.device("cpu"))
    return args, windows, script.WorldModel(args, windows)


def clean(world_model, windows, rows):
    x0 = world_model.normalize(windows.obs[rows], windows.token_action[rows], windows.reward[rows])
    x0[:, -1, KNOWN_LAST] = 0
    return x0


# ---- Windows and units


@pytest.mark.parametrize("terminated", [True, False])
def test_a_token_holds_the_action_taken_in_its_state_and_0_after_the_end(terminated):
    dataset = linear_dataset(episodes=3, length=6, terminated=terminated)
    _, windows, _ = make_model(dataset, model_horizon=3)
    rows = windows.rows(torch.arange(18))
    for start in windows.usable.nonzero()[:, 0].tolist():
        end = start - start % 6 + 5  # last transition of the episode
        expected = [dataset.action[row] if row <= end else np.zeros(2) for row in range(start, start + 5)]
        np.testing.assert_array_equal(windows.token_action[rows[start]].numpy(), np.array(expected))


@pytest.mark.parametrize("kind", ["limits", "gaussian", "cdf"])
def test_generated_actions_lie_within_the_datas(kind):
    """Whatever an untrained network says; with targets far away too."""
    args, windows, world_model = make_model(normalizer=kind)
    obs, action = windows.obs[windows.start[:200]], windows.action[:200]
    _, made, _ = script.sample_rollouts(args, world_model, obs, action, torch.full((200, 1), 50.0))
    assert made.shape == (200, 8, 2) and made[:, 1:].std() > 0.1
    assert (made >= windows.action.amin(0)).all() and (made <= windows.action.amax(0)).all()


def test_parameter_count():
    """Three channels more than DAWM's 60,717,580: 5 x 128 and 128 weights into the first block, 128 + 1 in the head."""
    with torch.device("meta"):
        network = script.TemporalUNet(15, 3, 128, (1, 4, 8))
    count = sum(p.numel() for p in network.parameters())
    assert count == 60_717_580 + 3 * (5 * 128 + 128 + 129) and f"{count:,}" in script.TemporalUNet.__doc__


# ---- What is known


def test_the_given_pair_survives_to_the_bit_and_is_pinned_in_every_network_call():
    args, windows, world_model = make_model()
    seen = []
    world_model.denoiser.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    obs, action = windows.obs[:50] + 0.0123, windows.action[:50] * 0.98765
    made_obs, made_action, _ = script.sample_rollouts(args, world_model, obs, action, torch.ones(50, 1))
    assert torch.equal(made_obs[:, 0], obs) and torch.equal(made_action[:, 0], action)
    known = torch.cat([world_model.obs_units.normalize(obs), world_model.action_units.normalize(action)], dim=1)
    assert len(seen) == 3
    for x in seen:
        assert torch.equal(x[:, 0, KNOWN_FIRST], torch.cat([known, known])) and x[:, -1, KNOWN_LAST].eq(0).all()


def test_the_loss_is_the_mean_over_all_but_the_known_places():
    _, windows, world_model = make_model(prediction="x0")
    x0 = clean(world_model, windows, windows.rows(torch.arange(6)))
    output = torch.randn_like(x0, requires_grad=True)
    world_model.denoiser.forward = lambda *_: output
    loss = world_model.loss(x0, None, None, None)
    loss.backward()
    known = torch.zeros_like(x0, dtype=torch.bool)
    known[:, 0, KNOWN_FIRST] = known[:, -1, KNOWN_LAST] = True
    assert output.grad[known].eq(0).all() and output.grad[~known].ne(0).all()
    torch.testing.assert_close(loss, (output - x0)[~known].square().mean())


def test_sampler_with_an_oracle_returns_its_window():
    args, windows, world_model = make_model(prediction="x0")
    rows = windows.rows(torch.tensor([4]))
    x0 = clean(world_model, windows, rows)
    world_model.denoiser.forward = lambda x, *_: x0.expand_as(x)
    first, action = windows.obs[rows][:, 0], windows.action[[4]]
    obs, actions, reward = script.sample_rollouts(args, world_model, first, action, torch.zeros(1, 1))
    torch.testing.assert_close(obs, windows.obs[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(actions, windows.token_action[rows][:, :-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward, windows.reward[rows][:, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("horizon", [7, 3])
def test_synthesis_takes_states_actions_and_rewards_from_one_rollout(horizon):
    args, windows, world_model = make_model(horizon=horizon, termination="none")
    torch.manual_seed(3)
    rows, valid = script.Synthesizer(args, "", windows, world_model)(torch.arange(20))
    torch.manual_seed(3)
    target, first = torch.full((20, 1), 0.7), windows.obs[windows.start[:20]]
    obs, action, reward = script.sample_rollouts(args, world_model, first, windows.action[:20], target)
    steps = horizon + 1
    assert rows.shape == (20, steps, 8) and valid.all()
    expected = (
        obs[:, :steps],
        action[:, :steps],
        reward[:, :steps, None],
        obs[:, 1 : steps + 1],
        torch.zeros(20, steps, 1),
    )
    assert all(torch.equal(a, b) for a, b in zip(rows.split([2, 2, 1, 2, 1], dim=-1), expected, strict=True))


# ---- Learning on the linear system


@pytest.fixture
def run(tmp_path):
    run = Run(Args(run_dir=tmp_path / "runs", stage_dir=tmp_path / "stages", device="cpu"))
    run.open()
    run.fingerprints["data"] = "test"
    return run


def test_generated_actions_explain_the_generated_states(run):
    """a = (s' - 0.9 s) / 0.3 from generated states: far nearer to the rollout's own action than to another rollout's.

    Their ratio is near 0.4 (three seeds), and 1 where the tokens hold the action of the step before.
    """
    args = Args(**TINY, world_model_steps=400, world_model_lr=6e-3, ema_decay=0.9, ema_start=0, model_horizon=2,
                normalizer="limits", log_every=300)  # fmt: skip
    windows = script.Windows(args, linear_dataset(episodes=100), run.device)
    world_model = script.train_world_model(args, windows, run)
    index = torch.arange(0, 2000, 3)
    state, action = windows.obs[windows.start[index]], windows.action[index]
    obs, made, _ = script.sample_rollouts(args, world_model, state, action, windows.return_to_go[index, None])
    inverse = (obs[:, 1:] - 0.9 * obs[:, :-1]) / 0.3
    others = made.roll(1, dims=0)
    for step in (1, 2):  # generated; the first is given
        own, chance = ((x[:, step] - inverse[:, step]).square().mean().sqrt() for x in (made, others))
        assert own < 0.6 * chance and made[:, step].std() > 0.2  # nor is one action the answer to all


def test_the_measured_error_of_actions_leaves_out_the_given_one(run, monkeypatch):
    args, windows, _ = make_model(world_model_holdout=0.2)

    def sample_rollouts(args, world_model, obs, action, return_to_go):
        pairs = [int((windows.action == a).all(1).nonzero()) for a in action]
        rows = windows.rows(torch.tensor(pairs))
        actions = windows.token_action[rows][:, :-1] + torch.tensor([9.0, *[0.5] * 7])[:, None]
        return windows.obs[rows], actions, windows.reward[rows][:, :-1]

    monkeypatch.setattr(script, "sample_rollouts", sample_rollouts)
    script.measure_world_model(args, None, windows, run)
    ((_, values),) = run.records
    assert values["world_model/val_action_mse"] == pytest.approx(0.25)
    assert all(values[f"world_model/val_{what}_error_step8"] == 0 for what in ("obs", "reward"))


# ---- The command line


def test_to_a_score_with_stages_of_its_own_beside_those_of_dawm_td3bc(tmp_path):
    texts = [
        hopper_command("dawm_td3bc.py", tmp_path, *TOY),
        hopper_command("joint_td3bc.py", tmp_path, *TOY_AGENT, *TOY_WORLD_MODEL),
    ]
    stages, names = [], []
    for name in ("dawm_td3bc", "joint_td3bc"):
        (folder,) = (tmp_path / "runs").glob(f"*__{name}__*")
        stages.append(json.loads((folder / "stages.json").read_text()))
        names.append({key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)})
        assert (folder / "actor.safetensors").exists()
    assert "final" in texts[1] and "reused" not in texts[1]
    assert list(stages[1]) == ["world model", "synthesis"]
    assert not set(stages[0].values()) & set(stages[1].values())
    assert names[1] - names[0] == {"world_model/val_action_mse"}
    assert all(name.startswith(("idm/", "time/inverse")) for name in names[0] - names[1])


def test_there_are_no_arguments_for_an_inverse_dynamics_model(tmp_path, capsys):
    assert "--idm-steps" in refusal(script, ["--idm-steps", "5"], tmp_path, capsys)


# ---- docs/forking.md

GUIDE = (Path(ROOT) / "docs" / "forking.md").read_text()
SOURCES = {name: (Path(ROOT) / name).read_text().splitlines() for name in ("dawm_td3bc.py", "joint_td3bc.py")}


def sections(lines):
    """Number of the section of each line: that of the last banner's title above it or on it."""
    numbers, number = [], 0
    for line in lines:
        number = int(line[2]) if re.match(r"# \d\. ", line) else number
        numbers.append(number)
    return numbers


@pytest.mark.skipif(not shutil.which("git"), reason="git counts the lines")
def test_the_guide_counts_the_changed_lines_as_git_does():
    command = ["git", "diff", "--no-index", "--no-ext-diff", "--no-color", "--diff-algorithm=myers", "-U0", *SOURCES]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\n@@ ")
    removed, added, markers = Counter(), Counter(), 0
    old_sections, new_sections = map(sections, SOURCES.values())
    for hunk in diff[1:]:
        head, *lines = hunk.splitlines()
        old, new = (int(first) - 1 for first in re.match(r"-(\d+)\S* \+(\d+)", head).groups())
        for line in lines:
            if line.startswith("-"):
                removed[old_sections[old]] += 1
                old += 1
            else:
                markers += bool(re.match(r"\+# (Copied|Adapted) from", line))
                added[new_sections[new]] += not re.match(r"\+# (Copied|Adapted) from", line)
                new += 1
    told = re.search(r"counts (\d+) lines added and (\d+) removed\. (\d+) of those\s+added.*other (\d+) are", GUIDE)
    real = sum(added.values())
    assert tuple(map(int, told.groups())) == (real + markers, sum(removed.values()), markers, real)
    rows = re.findall(r"^\| (\d)\. .*? \| (\d+) \| (\d+) \|", GUIDE, flags=re.M)
    assert [tuple(map(int, row)) for row in rows] == [(i, removed[i], added[i]) for i in range(8)]
    new_lines = SOURCES["joint_td3bc.py"]
    kinds = re.search(r"Here (\d+) definitions are copied and (\d+) adapted", GUIDE).groups()
    starts = [sum(line.startswith(f"# {k} from") for line in new_lines) for k in ("Copied", "Adapted")]
    assert list(map(int, kinds)) == starts and sum(starts) == markers


def test_the_guide_shows_lines_that_exist():
    shown = [line for block in re.findall(r"```diff\n(.*?)```", GUIDE, flags=re.S) for line in block.splitlines()]
    old, new = SOURCES.values()
    assert len(shown) > 20
    for line in shown:
        assert line[1:] in (old if line[0] == "-" else new) and line[1:] not in (new if line[0] == "-" else old), line


@pytest.mark.parametrize(
    "old, new, changed",
    [  # a row of the guide's table each; what is built on a changed stage follows by its fingerprint
        ("a denoiser and the units it works in.", "a denoiser and its units.", []),
        ("# [DWM App.]; DD's code starts from half of it", "# another comment", []),
        ("* q.mean() + bc_loss", "* q.mean() + 2 * bc_loss", []),
        ("[:, 0], windows.action[index], target)", "[:, 0], windows.action[index], target * 1)", []),
        ("(angle.abs() < 0.2)", "(angle.abs() < 0.3)", ["synthesize"]),
        ("std = args.sampling_temperature * std", "std = 2 * args.sampling_temperature * std", ["synthesize"]),
        ("nn.init.zeros_(layer.bias)", "nn.init.ones_(layer.bias)", ["train_inverse_dynamics"]),
        ("x[:, -1, -1] = 0", "x[:, -1, -1] = 1", ["train_world_model", "synthesize"]),
        ("values.std(0) + 1e-6", "values.std(0) + 1e-5", ["train_world_model", "synthesize"]),
        (
            "low - (high - low) / 4",
            "low - (high - low) / 5",
            ["train_world_model", "train_inverse_dynamics", "synthesize"],
        ),
        ("idm_width: int = 1024", "idm_width: int = 512", []),  # no code: the argument's value tells
    ],
)
def test_the_guide_tells_which_stages_an_edit_makes_anew(old, new, changed, tmp_path, monkeypatch):
    text = "\n".join(SOURCES["dawm_td3bc.py"])
    assert text.count(old) == 1
    path = tmp_path / "edited_fork.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited_fork", path)
    fork = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited_fork", fork)
    spec.loader.exec_module(fork)
    names = "train_world_model", "train_inverse_dynamics", "synthesize"
    pairs = {name: (stage_source(getattr(home, name)), stage_source(getattr(fork, name))) for name in names}
    assert [name for name, (before, after) in pairs.items() if before != after] == changed
    assert "idm_width" in pairs["train_inverse_dynamics"][0][1]
