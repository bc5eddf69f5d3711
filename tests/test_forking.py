"""docs/forking.md as printed: its commands, its two forks, their markers, and what an edit makes anew."""

import importlib
import re
import shutil
import subprocess
import sys
from functools import cache

import dawm_td3bc as home
from common import UserError, export
from common.stages import stage_source

import pytest
import torch
from mark_copies import definitions, homes, marked
from toy import ROOT, TINY, TOY, hopper_arguments, linear_dataset, run

GUIDE = (ROOT / "docs" / "forking.md").read_text()
HOME = (ROOT / "dawm_td3bc.py").read_text()

# The shell's `python` runs what lies in tests/; of all else it notes what it is asked to run.
PYTHON = f'python() {{ case "$1" in tests/*) {sys.executable} "$@";; *) echo "$@" >> calls;; esac; }}\n'


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """A folder where all that the guide tells to type was typed; the runs that it asked for, module -> arguments."""
    if not shutil.which("git"):
        pytest.skip("git applies the edits")
    folder = tmp_path_factory.mktemp("fork")
    shutil.copy(ROOT / "dawm_td3bc.py", folder)
    for name in ("docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    typed = "".join(re.findall(r"^```bash\n(.*?)^```$", GUIDE, flags=re.S | re.M))
    subprocess.run(["bash", "-e", "-o", "pipefail", "-c", PYTHON + typed], cwd=folder, check=True)
    calls = [line.removeprefix("-m ").split() for line in (folder / "calls").read_text().splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder, {script.removesuffix(".py"): arguments for script, *arguments in calls}


@pytest.fixture(scope="module")
def rebrac(guide):
    return importlib.import_module("rebrac")


def test_each_run_of_the_guide_ends_in_a_score_and_finds_what_it_may(guide):
    folder, calls = guide
    reused = {}
    for module, arguments in calls.items():
        result = run(module, [*arguments, *hopper_arguments(folder, *TOY)], folder)  # the last of two equal flags wins
        assert result.code == 0 and "\nfinal  " in result.text, result.text[-2000:]
        reused[module] = re.findall(r"^(\w[\w ]*?) +0\.0 s .* reused ", result.text, flags=re.M)
    models = ["world model", "inverse dynamics"]
    found = {"my": [], "mine.dawm_td3bc": [*models, "synthesize"]}  # an equal copy
    found |= {"dawm_td3bc": models, "rebrac": models, "transformer": models[1:]}  # from fewer pairs
    assert reused == found
    (made,) = (folder / "runs").glob("*__rebrac__*")
    with pytest.raises(UserError, match="rows of 30 columns, an export writes 27"):
        export.main(export.Args(made, hdf5=folder / "rebrac.hdf5"))


def test_a_row_of_the_rebrac_fork_holds_the_action_that_follows(rebrac):
    args, dataset, cpu = rebrac.Args(**TINY, horizon=3), linear_dataset(episodes=3, length=12), torch.device("cpu")
    real, action = rebrac.real_transitions(dataset, cpu), torch.as_tensor(dataset.action)
    for row in range(36):
        assert torch.equal(real[row, -2:], action[row if row % 12 == 11 else row + 1])
    windows = rebrac.Windows(args, dataset, cpu)
    models = rebrac.WorldModel(args, windows), rebrac.InverseDynamics(args, windows.obs, windows.change, 2)
    rows, _ = rebrac.complete_rollouts(args, windows, *models, torch.arange(5))
    obs, action, _, next_obs, _, next_action = rows.split(rebrac.row_sizes(2, 2), dim=-1)
    assert torch.equal(obs[:, 1:], next_obs[:, :-1]) and torch.equal(action[:, 1:], next_action[:, :-1])
    assert rows.shape[:2] == (5, 4) and not torch.equal(next_action[:, -1], action[:, -1])


def test_the_penalty_of_the_rebrac_fork_by_hand(rebrac):
    """Without noise: gamma (1 - terminated) critic_penalty |a' - data's a'|^2 is what the target loses."""
    agents = []
    for penalty in (0, 0.5):
        torch.manual_seed(0)
        args = rebrac.Args(policy_noise=0, critic_penalty=penalty)
        agents.append(rebrac.TD3BC(args, torch.randn(50, 2), 2).double())
    reward, next_obs, data_action = torch.randn(4), torch.randn(4, 2), torch.rand(4, 2)
    terminated = torch.tensor([0, 0, 1, 0])
    free, penalised = (agent.td_target(reward, next_obs.double(), terminated, data_action.double()) for agent in agents)
    distance = (agents[0].actor_target(next_obs.double()) - data_action).square().sum(1)
    torch.testing.assert_close(free - penalised, 0.99 * (1 - terminated) * 0.5 * distance, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fork", ["rebrac.py", "transformer.py"])
def test_markers_are_written_as_the_rule_wants_them(fork, guide):
    folder, _ = guide
    text, there = (folder / fork).read_text(), homes([ROOT / "dawm_td3bc.py"])
    assert marked(text, there) == text and there.keys() <= definitions(text).keys()


@cache
def stage_sources(script) -> list:
    names = "train_world_model", "train_inverse_dynamics", "synthesize"
    return [stage_source(getattr(script, name)) for name in names]


@pytest.mark.parametrize(
    "old, new, changed",
    [  # the rows of the guide's table, and constants; what is built on a changed stage follows by its fingerprint
        ("a denoiser and the units it works in.", "a denoiser and its units.", []),
        ("# [DWM App.]; DD's code: half", "# another comment", []),
        ("* q.mean() + bc_loss", "* q.mean() + 2 * bc_loss", []),
        ("complete = partial(", "complete = partial(partial)(", []),
        ("terminated = F.pad(over[:, 1:], (0, 1))", "terminated = F.pad(over[:, 1:], (0, 1), value=True)", [2]),
        ("std = args.sampling_temperature * std", "std = 2 * args.sampling_temperature * std", [2]),
        ("nn.init.zeros_(layer.bias)", "nn.init.ones_(layer.bias)", [1, 2]),
        ("self.obs_units.normalize(obs), action]", "self.obs_units.normalize(obs), 2 * action]", [0, 2]),
        ("values.std(0) + 1e-6", "values.std(0) + 1e-5", [0, 2]),
        ("low - (high - low) / 4", "low - (high - low) / 5", [0, 1, 2]),
        ("idm_width: Count = 1024", "idm_width: Count = 512", []),  # no code: the argument's value tells
        ('"walker2d-medium-v2": (550', '"walker2d-medium-v2": (551', [0, 1, 2]),  # read by what Windows calls
        ("def check_args(", 'TASKS["a"] = 1, 0.5\n\n\ndef check_args(', [0, 1, 2]),  # changed behind its definition
    ],
)
def test_the_guide_tells_which_stages_an_edit_makes_anew(old, new, changed, tmp_path, monkeypatch):
    assert HOME.count(old) == 1
    (tmp_path / "edited_fork.py").write_text(HOME.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited_fork", raising=False)
    fork = importlib.import_module("edited_fork")
    pairs = zip(stage_sources(home), stage_sources(fork), strict=True)
    assert [i for i, (before, after) in enumerate(pairs) if before != after] == changed
    assert "idm_width" in stage_sources(home)[1][1]
