"""experiments/report.py: statistics beside brute force, the page from made-up runs of which every score is known."""

import json
import sys

import numpy as np
import pytest
import report
import study
from scipy import stats

LEVELS = {"cloning": 40, "td3bc": 50, "dawm_td3bc": 60, "dwm_td3bc": 45, "undertrained_td3bc": 60}


def rows_of(tasks, seeds=3, data="d" * 12, noise=1.0, paper=False) -> list[report.Row]:
    """Runs whose settled score is the learner's level + 10 for a medium-expert task + noise of the seed."""
    rows = []
    for job in study.jobs_of(study.Study("first", tasks=tuple(tasks), seeds=seeds), paper):
        level = LEVELS[job.learner] + 10 * job.task.endswith("expert") + noise * (job.seed - 1)
        content = {"module": job.module, "args": {k: v for k, v in job.wanted.items() if k not in study.PLACES}}
        curve = [0.0, 10.0, level - 2, level + 2]
        rows.append(report.Row(content, "abc1234", data, 30.0, 60.0, [10, 20, 30, 40], curve))
    return rows


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The summary, the page and the controls, in a folder of their own."""
    (tmp_path / "results.md").write_text(f"# Results\n\n{report.BEGIN}old\n{report.END}\n## After\n")
    monkeypatch.setattr(report, "SUMMARY", tmp_path / "study.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(report, "CONTROLS", tmp_path / "controls.csv")
    return tmp_path


def test_a_score_is_the_mean_of_the_second_half():
    row = report.Row({}, "", "", None, 0, [10, 20, 30, 40], [1, 2, 3, 5])
    assert row.score == 4
    assert report.Row({}, "", "", None, 0, [10], [7.0]).score == 7  # a planner, evaluated once


def test_interquartile_mean_and_its_interval_beside_brute_force():
    random = np.random.default_rng(1)
    samples = [random.normal(10 * task, 3, 5) for task in range(4)]
    value, low, high = report.iqm(samples)
    runs = np.sort(np.concatenate(samples))
    assert value == pytest.approx(runs[5:15].mean())  # the middle half of 20
    drawn = []
    for _ in range(4000):  # seeds anew within each task
        some = np.sort(np.concatenate([random.choice(x, 5) for x in samples]))
        drawn.append(some[5:15].mean())
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.25)
    assert np.isnan(report.iqm([np.array([1.0, 2.0]), np.array([2.0, 3.0, 4.0])])[1])  # two seeds tell no interval


def test_a_task_with_more_seeds_counts_no_more():
    """Two runs of 0 stand for as much as one of 1, 2 and 3 each: the middle half of 0, 0, 1, 1, 2, 2, 3, 3."""
    assert report.iqm([np.zeros(2), np.ones(1), np.full(1, 2.0), np.full(1, 3.0)])[0] == 1.5


def test_probability_of_improvement_by_hand():
    """Task 1: of the nine pairs 3 > 2 six times, 2 = 2 three times: (6 + 3/2) / 9. Task 2: always."""
    value, low, high = report.improvement([np.array([3, 3, 2]), np.full(3, 9)], [np.full(3, 2), np.ones(3)])
    assert value == pytest.approx((7.5 / 9 + 1) / 2) and low <= value <= high == 1
    one = [np.array([1.0, 2, 3])]
    assert report.improvement(one, one)[0] == 0.5


def test_difference_over_the_tasks_by_hand():
    """3, 1 and 2 on three tasks: sd 1, so 2 ± 4.303 / sqrt(3), the t of two degrees of freedom (any table)."""
    mine, others = (
        [np.array([4.0, 6]), np.array([2.0]), np.array([2.0])],
        [np.array([2.0]), np.array([1.0]), np.zeros(2)],
    )
    assert report.above(mine, others) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert np.isnan(report.above(mine[:1], others[:1])[1])


def test_the_detectable_difference_has_the_power_that_it_says():
    """20,000 studies of two learners that differ by it: a pooled t-test over the tasks finds four in five."""
    deviations, seeds, studies = np.array([1.0, 2.0, 3.0]), 6, 20_000
    random = np.random.default_rng(0)
    # The spread is given on every task, but the test takes one spread for all, so that its level is exact here.
    variances = [float(np.mean(deviations**2))] * 3
    difference = report.detectable(variances, seeds)
    scale = variances[0] ** 0.5
    a = random.normal(difference, scale, (studies, 3, seeds))
    b = random.normal(0, scale, (studies, 3, seeds))
    pooled = (a.var(2, ddof=1).mean(1) + b.var(2, ddof=1).mean(1)) / 2
    t = (a.mean((1, 2)) - b.mean((1, 2))) / np.sqrt(pooled * 2 / (3 * seeds))
    found = np.mean(np.abs(t) > stats.t.isf(0.025, 2 * 3 * (seeds - 1)))
    assert found == pytest.approx(0.8, abs=0.015)
    assert report.detectable(variances, 24) < difference / 1.9


def test_the_resolution_of_known_controls(places, capsys):
    """Seeds at -1, 0 and 1 around their level: sd 1, headroom 10; eight tasks, means 50 and, of the experts, 60."""
    report.write(rows_of(study.TASKS[:8]))
    report.main(report.Args(resolution=True))
    text = capsys.readouterr().out
    assert "| hopper m | 30.0 | 40.0 ± 1.0 | 50.0 ± 1.0 | 10.0 | 10.0 |" in text
    found = report.detectable([1.0] * 8, 3)
    for learner, mean in (("td3bc on real data", 420 / 8), ("dwm_td3bc", 380 / 8), ("dawm_td3bc", 500 / 8)):
        told = f"{learner}, 3 seeds on 8 tasks detect a difference of {found:.1f} ({100 * found / mean:.1f} % of its"
        assert told in " ".join(text.split())
    assert "the paper's 9 % takes 2 seeds" in text
    assert report.gain_of_the_paper() == pytest.approx(0.742 / 0.679 - 1, abs=1e-3)  # its Table 2's averages


def test_a_spread_takes_two_seeds_on_two_tasks(places, capsys):
    """DAWM has its second seed on one of them, so its resolution is told missing, not left out."""
    rows = rows_of(study.TASKS[:2], seeds=2)
    dawm = [row for row in rows if row.content["args"]["seed"] == 1 and row.score == 60]
    assert len(dawm) == 4  # both tasks, and the undertrained
    report.write([row for row in rows if row is not dawm[1]])
    report.main(report.Args(resolution=True))
    text = " ".join(capsys.readouterr().out.split())
    assert "By the spread of td3bc on real data, 2 seeds on 2 tasks" in text
    assert "The spread of dawm_td3bc takes two seeds on two tasks; 1 so far." in text


@pytest.mark.parametrize(
    "tasks, real, dwm, cloning",
    [
        (study.TASKS, "9.0 [7.8, 10.2] | 4.9", "14.0 [12.8, 15.2] | 6.3", "19.0 [17.8, 20.2] | -"),
        (study.TASKS[:3], "9.0 [4.7, 13.3] (3) | 18.3", "14.0 [9.7, 18.3] (3) | 11.7", "19.0 [14.7, 23.3] (3) | -"),
    ],
)
def test_the_answer_of_known_runs(places, tasks, real, dwm, cloning):
    """DAWM is 10, 15 and 20 above, and 3 less on expert data: of nine tasks sd 1.5, so ± 2.306 / 2, of three sd
    sqrt(3), so ± 4.303; the paper's over the same tasks, by hand. Nothing has run with IQL.
    """
    rows = rows_of(tasks)
    for row in rows:
        if row.score < 65 and row.content["args"]["env_id"].endswith("expert-v0"):  # of learners below 60
            row.scores = [score + 3 for score in row.scores]
    text = report.answer(rows, paper=False)
    assert f"| real data | {real} | - | -4.2 |" in text
    assert f"| DWM: no actions | {dwm} | - | 6.0 |" in text
    assert f"| cloning | {cloning} | - | - |" in text
    assert (places / "study.png").exists()
    assert report.answer([], paper=False) == ""


def test_one_seed_decides_nothing(places, monkeypatch):
    report.write(rows_of(["hopper-medium"], seeds=1)[:-1])
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.run_script(report.main, report.Args)  # as from the command line
    text = report.PAGE.read_text()
    assert "| hopper m | 30.0 | 39.0 | 49.0 | 10.0 | - |" in text
    assert "dawm_td3bc takes two seeds on two tasks; 0 so far" in " ".join(text.split())
    assert "No run with today's arguments yet of `undertrained_td3bc`." in text and "nan" not in text
    assert "| `undertrained_td3bc` | `dawm_td3bc --world-model-steps 300` | - |" in text
    assert "| `dwm_td3bc` | `dwm_baseline --agent td3bc --rollouts stored` | `policy_delay`: the agent's own |" in text
    assert text.count("None of its own runs is in yet") == len(report.TITLES) - 1


def test_runs_at_paper_scale_have_tables_of_their_own(places):
    report.write(rows_of(["hopper-medium"], seeds=1, paper=True))
    report.main(report.Args())
    text = report.PAGE.read_text()
    assert "(paper scale)" in text and "study_first_paper.png" in text
    assert text.startswith("# Results\n\n") and text.endswith("\n## After\n") and "old" not in text


def test_controls_are_those_of_the_study(places):
    """Seeds 49, 50 and 51: D4RL's score of 50 is half way between its reference returns."""
    report.write(rows_of(["hopper-medium"]))
    report.main(report.Args())
    lines = report.CONTROLS.read_text().splitlines()
    assert lines[1] == "local/hopper/medium-v0,d4rl,dddddddddddd,TD3+BC on the data,3,50000,1607.0,50.0,1.0"
    assert len(lines) == 3 and ",cloning the data,3," in lines[2]


def test_the_summary_keeps_what_it_had_and_takes_new_runs(places, capsys):
    """A run that is given again replaces itself; one on data made anew leaves the older ones out of the tables."""
    rows = rows_of(["hopper-medium"])
    report.write(rows)
    assert report.read() == rows
    report.write(report.read() + rows_of(["hopper-medium"], noise=2.0))
    assert len(report.read()) == len(rows) and report.read()[0].scores[-1] == rows[0].scores[-1] - 1
    lines = report.SUMMARY.read_text().splitlines()
    assert len(lines) == 1 + len(LEVELS) + 1 + len(rows) + 1  # a line for each set of arguments and each run
    report.write(report.read() + rows_of(["hopper-medium"], seeds=1, data="e" * 12))
    cells = report.cells_of("first", report.read(), paper=False)
    assert [row.data for row in cells["cloning"]["hopper-medium"]] == ["e" * 12]


def test_run_folders_are_read(places):
    """A run of three evaluations, the last one behind fewer updates than the others."""
    job = study.jobs_of(study.Study("first", tasks=("hopper-medium",), seeds=1), paper=False)[0]
    folder = places / "runs" / "a"
    folder.mkdir(parents=True)
    args = job.wanted | {"eval_every": 400, "agent_updates": 1000, "exp_name": "x"}
    data = {"mean_return": 1607.01385, "robot": "hopper", "fingerprint": "f" * 64}  # half of D4RL's range
    content = {"args": args, "module": job.module, "data": data, "git": "0123456789" * 4 + "-dirty"}
    (folder / "args.json").write_text(json.dumps(content))
    (folder / "summary.txt").write_text("total   60.0 s\n")
    lines = [json.dumps({"step": 1, "eval/normalized_score": score}) for score in (1.0, 2.0, 4.0)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (row,) = report.collect(places / "runs")
    assert (row.updates, row.scores, row.score) == ([400, 800, 1000], [1.0, 2.0, 4.0], 3.0)
    assert (row.own, row.seconds, row.revision, row.data) == (pytest.approx(50), 60.0, "0123456-dirty", "f" * 12)


def test_the_page_here_is_that_of_the_summary(tmp_path, monkeypatch):
    """docs/results.md and common/controls.csv are what experiments/report.py writes from the committed summary, and
    the README's table is the page's.
    """
    text = report.PAGE.read_text()
    written = text.partition(report.BEGIN)[2].partition(report.END)[0]
    monkeypatch.setattr(report, "PAGE", tmp_path / "results.md")  # pictures go there
    assert written.strip() == report.page(report.read()).strip()
    assert report.CONTROLS.read_text() == report.controls(report.read())
    table = written.partition("| DAWM minus")[2].partition("\n\n")[0]
    assert table and table in (report.ROOT / "README.md").read_text()
