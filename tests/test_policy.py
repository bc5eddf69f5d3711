"""experiments/policy.py on every learner's toy run, beside what the run itself has logged; a run's closing words."""

import json
import re
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common.evaluation import Evaluator, normalized_score
from common.run import Run

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from toy import ROOT, SCRIPTS, child, metrics


def policy(folder: Path, *words, **environment) -> SimpleNamespace:
    """`python experiments/policy.py words` -> exit code, all that it printed, and the rows of its table."""
    log = folder / f"policy-{time.monotonic_ns()}.txt"
    process = child(_command, ["experiments/policy.py", *map(str, words)], log=log, **environment)
    process.join()
    text = log.read_text()
    rows = re.findall(r"^(episodes|means|the data).*?((?: +[-\d.]+){4}) +(\S+)$", text, flags=re.M)
    rows = {name: [*numbers.split(), score] for name, numbers, score in rows}
    return SimpleNamespace(code=process.exitcode, text=text, rows=rows)


def _command(words: list[str]) -> None:
    """As `python words`: only the script's own folder is searched, and nothing of ours has been imported."""
    script = ROOT / words[0]
    ours = {Path(), ROOT, *(ROOT / name for name in ("tests", "experiments", "benchmarks"))}
    sys.path[:] = [str(script.parent), *(p for p in sys.path if Path(p) not in ours)]
    for name, module in list(sys.modules.items()):
        if ROOT in Path(getattr(module, "__file__", None) or "/").parents and "site-packages" not in module.__file__:
            del sys.modules[name]
    sys.argv = words
    runpy.run_path(str(script), run_name="__main__")


def finals(folder: Path) -> tuple[float, float]:
    """Mean return and standard deviation of the last evaluation in a run's log."""
    last = [line for line in metrics(folder) if "eval/episodic_return" in line][-1]
    return last["eval/episodic_return"], last["eval/episodic_return_std"]


@pytest.mark.parametrize("script", [p.name for p in ROOT.glob("experiments/*.py") if "main" in p.read_text()])
def test_every_command_finds_the_projects_modules(script, tmp_path):
    """Asked for what it does not know, each tells how it is used, or what else it needs."""
    process = child(_command, [f"experiments/{script}", *3 * ["--no-such-word"]], log=tmp_path / "log")
    process.join()
    text = (tmp_path / "log").read_text()
    assert process.exitcode and text and "No module named" not in text.replace("named 'd3rlpy'", "")


@pytest.mark.parametrize("module", SCRIPTS)
def test_the_first_start_seed_is_the_runs_own_evaluation(module, made, tmp_path):
    folder = made(module)[0]
    result = policy(tmp_path, folder, "--episodes", 2, "--starts", 1)
    assert result.code == 0, result.text
    mean, std = finals(folder)
    lowest, highest, score = mean - std, mean + std, normalized_score("hopper", mean)  # of two episodes
    numbers = [mean, np.sqrt(2) * std, lowest, highest, score]  # with n - 1 in the place of n
    assert result.rows["episodes"] == [f"{number:.1f}" for number in numbers]
    assert result.rows["means"] == [f"{mean:.1f}", "-", f"{mean:.1f}", f"{mean:.1f}", f"{score:.1f}"]
    data = json.loads((folder / "args.json").read_text())["data"]
    assert result.rows["the data"][0] == f"{data['mean_return']:.1f}"


def test_table1_tells_what_a_run_took_and_got(made, tmp_path):
    """A row for an actor whose synthetic set is kept, with one more seed; one for a planner, which makes none."""
    folder, other, second = made("dawm_td3bc")[0], made("baselines.decision_diffuser")[0], tmp_path / "second"
    shutil.copytree(folder, second)
    content = json.loads((folder / "args.json").read_text())
    content["args"]["seed"] = 1
    (second / "args.json").write_text(json.dumps(content))
    audit = {f"step {h}": {"state": {"median": 0.1 + h}} for h in range(3)} | {"real": None}
    (second / "audit.json").write_text(json.dumps({"simulator": audit}))
    process = child(_command, ["experiments/table1.py", *map(str, (folder, other, second))], log=tmp_path / "log")
    process.join()
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 0, text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    scores = [normalized_score("hopper", finals(x)[0]) for x in (folder, other)]
    assert [row[3] for row in rows] == [
        f"{scores[0]:.1f} ± 0.0 (2)",
        f"{scores[1]:.1f} ({scores[1]:.1f} to {scores[1]:.1f})",
    ]
    with safe_open(json.loads((folder / "stages.json").read_text())["synthesize"], "pt") as file:
        seconds, valid = json.loads(file.metadata()["manifest"])["seconds"], file.get_tensor("valid").sum()
    assert [row[2] for row in rows] == [f"{1e6 * seconds / int(valid):.3g}", "-"]
    assert [row[4] for row in rows] == ["0.1, 2.1", "-"] and all(float(row[1]) > 0 for row in rows)
    steps = [json.loads((x / "args.json").read_text())["args"]["world_model_steps"] for x in (folder, other)]
    assert [row[5].split(";")[0] for row in rows] == [f"{steps[0]}, 40", f"{steps[1]}, -"]


def test_start_seeds_are_blocks_of_episodes_in_the_physics_asked_for(made, tmp_path):
    import dawm_td3bc

    parts = dawm_td3bc.load_run(made("dawm_td3bc")[0])
    parts.actor.requires_grad_(False)
    evaluator = Evaluator(parts.dataset, "stock", 3)
    returns = [evaluator(lambda obs: parts.actor(dawm_td3bc.torch.as_tensor(obs)).numpy(), seed) for seed in (5, 8)]
    words = "--seed 5 --episodes 3 --starts 2 --physics stock".split()
    result = policy(tmp_path, made("dawm_td3bc")[0], *words)
    assert "start seeds 5, 8; episodes of each: 3, in Hopper-v4, physics stock" in result.text
    for name, of in (("episodes", np.concatenate(returns)), ("means", np.mean(returns, axis=1))):
        numbers = [of.mean(), of.std(ddof=1), of.min(), of.max()]
        assert result.rows[name][:4] == [f"{number:.1f}" for number in numbers]


def test_an_episode_as_sticks_ends_with_its_fall(made, tmp_path):
    gif, words = tmp_path / "policy.gif", "--episodes 2 --starts 1".split()
    result = policy(tmp_path, made("dawm_td3bc")[0], *words, "--gif", gif, MUJOCO_GL="disabled")
    assert result.code == 0, result.text
    frames, steps = map(int, re.search(r"policy.gif: (\d+) frames.*; (\d+) steps, return", result.text).groups())
    assert frames == -(-steps // 5) + 1  # 125 states a second, 25 frames, and the fall
    with Image.open(gif) as image:
        assert (image.n_frames, image.size, image.info["duration"]) == (frames, (256, 256), 40)
        image.seek(frames - 1)
        assert len(image.convert("RGB").getcolors(2**16)) > 5  # sky, floor, marks, robot, words


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "was made by no_such_script, which is not here; put that script back"),
        ("--gif policy.png", "--gif policy.png must end in .gif and lie in a folder that exists"),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message, tmp_path):
    (tmp_path / "args.json").write_text('{"module": "no_such_script"}')
    result = policy(tmp_path, tmp_path, *words.split())
    assert result.code == 2 and message in result.text and result.text.count("\n") == 1, result.text


def test_the_closing_words_compare_with_the_controls(tmp_path, monkeypatch):
    """Controls of other data, or in other physics, are none."""
    closing = Run.__new__(Run)
    closing.content = {"data": {"fingerprint": "0123456789abcdef"}, "physics": "d4rl"}
    monkeypatch.setattr("common.run.CONTROLS", tmp_path / "controls.csv")
    assert closing._told_controls() == {}  # without the file
    (tmp_path / "controls.csv").write_text(
        "control,seeds,updates,return,score,score_std,physics,fingerprint\n"
        "cloning,2,50000,1234.5,38.2,0.2,d4rl,0123456789ab\nTD3,1,1000,99.0,3.7,,d4rl,0123456789ab\n"
        "an old one,2,1,1,1,1,d4rl,changed\nanother one,2,1,1,1,1,stock,0123456789ab\n"
    )
    assert closing._told_controls() == {
        "cloning": "return   1234.5   normalized score   38.2   (± 0.2, 2 seeds, second half of 50,000 updates)",
        "TD3": "return     99.0   normalized score    3.7   (one seed, second half of 1,000 updates)",
    }
