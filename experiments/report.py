"""The study's runs as tables, statistics and learning curves in docs/results.md; its controls for every closing table.

    python experiments/report.py runs/study      # take finished runs into experiments/study.json, then write the page
    python experiments/report.py                 # write the page from that file alone
    python experiments/report.py --resolution    # only print headroom, and the difference that the seeds can detect

The file has each run's arguments, revision, data and evaluations, no weights; later runs add lines to it. A run's score
is the mean of its evaluations in the second half of the training, where controls have settled; those of cloning and of
the agents on real data go into common/controls.csv, which every run's closing lines compare with. Over tasks: the
interquartile mean, with 95 % intervals from seeds drawn anew within each task, as Agarwal et al., 2021, "Deep RL at the
Edge of the Statistical Precipice" recommend; and the mean difference, with the 95 % interval of the tasks, which asks
for no second seed. What the page says of the paper is the paper's: D4RL's data, its scale.
"""

import csv
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import run_script
from common.evaluation import REFERENCE_RETURNS, SETTLED, normalized_score
from common.files import write_text, write_whole
from common.run import CONTROLS

import numpy as np
import tyro
from run_folders import finished_runs
from scipy import optimize, stats
from study import APART, GRIDS, LEARNERS, PLACES, TASKS, Study, jobs_of

ROOT = Path(__file__).resolve().parent.parent
SUMMARY, PAGE = ROOT / "experiments" / "study.json", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- written by experiments/report.py -->\n", "<!-- as far as here -->\n"
MOST_SEEDS = 100  # that are looked for
FEWEST_SEEDS = 3  # for an interval from seeds drawn anew: two are drawn alike half of the time
RIVALS = {  # what DAWM is held against, with TD3+BC or IQL
    "real data": "{}",
    "DWM: no actions": "dwm_{}",
    "world model of 300 updates": "undertrained_{}",
    "cloning": "cloning",
}
CONTROL_NAMES = {"td3bc": "TD3+BC on the data", "iql": "IQL on the data", "cloning": "cloning the data"}
TITLES = {
    "first": "First: does it help to infer the actions?",
    "table2": "Table 2: DAWM beside DWM and Decision Diffuser",
    "table4": "Table 4: DAWM beside SSORL and real data",
    "table5": "Table 5: an eighth of the rollouts (DAWM-T)",
    "table6": "Table 6: horizons",
    "table1": "Table 1: every system",
    "asked": "The paper's mechanism: eight steps, asked for high returns",
    "one_step": "Ours: a one-step model in the place of diffusion",
    "ours": "Ours: actions generated instead of inferred",
}


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of finished runs, the --run-dir of study.py
    resolution: bool = False  # only print headroom and resolution


@dataclass
class Row:
    """A finished run."""

    content: dict  # module and args, as args.json has them
    revision: str
    data: str  # the data's fingerprint
    own: float | None  # score of the data's own mean return
    seconds: float
    updates: list[int]
    scores: list[float]  # of the evaluations after so many updates

    @property
    def score(self) -> float:
        """Mean of the evaluations that count."""
        return float(np.mean([s for u, s in zip(self.updates, self.scores) if u > SETTLED * self.updates[-1]]))


# ---- The summary file


def collect(root: Path) -> list[Row]:
    rows = []
    for run in finished_runs(root):
        scores, args, data = run.metrics.get("eval/normalized_score"), run.content["args"], run.content["data"]
        if scores:
            every, last = args["eval_every"], args.get("agent_updates", args.get("world_model_steps"))
            updates = [*(every * (i + 1) for i in range(len(scores) - 1)), last]
            own = normalized_score(data["robot"], data["mean_return"])
            content = {"module": run.content["module"], "args": {k: v for k, v in args.items() if k not in PLACES}}
            rows.append(Row(content, run.content["git"][:7] + run.content["git"][40:], data["fingerprint"][:12],
                            own, run.seconds, updates, [round(s, 2) for s in scores]))  # fmt: skip
    return rows


def read() -> list[Row]:
    if not SUMMARY.exists():
        return []
    stored = json.loads(SUMMARY.read_text())
    rows = []
    for at, env_id, seed, *rest in stored["runs"]:
        module, args = stored["settings"][at]
        rows.append(Row({"module": module, "args": args | {"env_id": env_id, "seed": seed}}, *rest))
    return rows


def write(rows: list[Row]) -> None:
    """A line for each set of arguments and each run; of two runs of the same on the same data the later one stays."""
    settings, runs = [], {}
    for row in rows:
        args = {k: v for k, v in row.content["args"].items() if k not in ("env_id", "seed")}
        if (entry := [row.content["module"], args]) not in settings:
            settings.append(entry)
        key = settings.index(entry), row.content["args"]["env_id"], row.content["args"]["seed"]
        own = None if row.own is None else round(row.own, 2)
        runs[*key, row.data] = [*key, row.revision, row.data, own, round(row.seconds), row.updates, row.scores]
    blocks = (",\n".join(map(json.dumps, some)) for some in (settings, runs.values()))
    write_text(SUMMARY, '{{"settings": [\n{}\n], "runs": [\n{}\n]}}\n'.format(*blocks))


def cells_of(table: str, rows: list[Row], paper: bool) -> dict[str, dict[str, list[Row]]]:
    """Learner -> task -> its runs by seed, but for runs on data that have been made anew since."""
    newest = {row.content["args"]["env_id"]: row.data for row in rows}
    at = defaultdict(list)
    for row in rows:
        args = row.content["args"]
        if newest[args["env_id"]] == row.data:
            at[row.content["module"], args["env_id"], args["seed"]].append(row)
    seeds = max((seed for _, _, seed in at), default=-1) + 1
    cells = {learner: {} for learner in GRIDS[table]}
    for job in jobs_of(Study(table, seeds=min(seeds, MOST_SEEDS)), paper) if seeds else ():
        made = [row for row in at[job.module, job.wanted["env_id"], job.seed] if job.made(row.content)]
        if made:
            cells[job.learner].setdefault(job.task, []).append(made[-1])
    return cells


# ---- Statistics; samples is one array of scores for each task


def pooled(samples) -> np.ndarray:
    """The runs of all tasks in one row, each repeated so that tasks count alike, however many seeds they have."""
    length = math.lcm(*(x.shape[-1] for x in samples))
    return np.concatenate([np.repeat(x, length // x.shape[-1], axis=-1) for x in samples], axis=-1)


def iqm(samples: list[np.ndarray]) -> tuple[float, float, float]:
    """Interquartile mean over all runs of all tasks, and its interval."""

    def statistic(*some, axis=-1):
        return stats.trim_mean(pooled(some), 0.25, axis=-1)

    return statistic(*samples), *interval(samples, statistic)


def improvement(mine: list[np.ndarray], others: list[np.ndarray]) -> tuple[float, float, float]:
    """Probability that a run of mine scores above one of others on the same task, a tie being half; its interval."""

    def statistic(*some, axis=-1):
        pairs = zip(some[: len(mine)], some[len(mine) :], strict=True)
        return np.mean([(np.sign(x[..., None] - y[..., None, :]).mean((-2, -1)) + 1) / 2 for x, y in pairs], axis=0)

    return statistic(*mine, *others), *interval([*mine, *others], statistic)


def above(mine: list[np.ndarray], others: list[np.ndarray]) -> tuple[float, float, float]:
    """By how much mine scores above others in the mean over the tasks; its interval, by Student's t over the tasks."""
    by = [x.mean() - y.mean() for x, y in zip(mine, others, strict=True)]
    ends = stats.ttest_1samp(by, 0).confidence_interval() if len(by) > 2 else (math.nan, math.nan)
    return float(np.mean(by)), *map(float, ends)


def interval(samples: list[np.ndarray], statistic) -> tuple[float, float]:
    """95 % interval of the statistic; NaN where a task has fewer than FEWEST_SEEDS."""
    if min(map(len, samples)) < FEWEST_SEEDS:
        return math.nan, math.nan
    how = dict(method="percentile", n_resamples=2000, vectorized=True, rng=np.random.default_rng(0))
    return tuple(stats.bootstrap(samples, statistic, **how).confidence_interval)


def detectable(variances: list[float], seeds: int) -> float:
    """Smallest true difference between two learners, in the mean over the tasks, that a two-sided t-test finds, at the
    5 % level with 80 % power.

    `variances` between the seeds on each task, the same for both learners; each has so many seeds on each task.
    """
    freedom = 2 * len(variances) * (seeds - 1)
    error = math.sqrt(2 * sum(variances) / seeds) / len(variances)
    critical = stats.t.isf(0.05 / 2, freedom)
    return error * optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - 0.8, 0, 50)


# ---- The page


def scores(cells: dict[str, list[Row]], tasks) -> list[np.ndarray]:
    return [np.array([row.score for row in cells[task]]) for task in tasks]


def runs_in(cells: dict[str, dict[str, list[Row]]]) -> list[Row]:
    return [row for tasks in cells.values() for some in tasks.values() for row in some]


def told(values, most: int = 0) -> str:
    """Mean ± standard deviation, and how many where that is not `most`."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}" + (f" ({len(values)})" if most and len(values) != most else "")


def in_brackets(value: float, low: float, high: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" + ("" if math.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def rival(learner: str, present) -> str | None:
    """The DAWM that a learner is compared with: of its horizon, with its agent."""
    horizon = learner.replace("dwm_h", "dawm_h")
    other = horizon if horizon != learner else f"dawm_{'iql' if learner.endswith('iql') else 'td3bc'}"
    return other if other in present and other != learner else None


@cache
def published(table: str) -> dict[str, dict[str, tuple[float, float]]]:
    """Learner -> task -> mean and standard deviation as the paper prints them, times 100."""
    found = defaultdict(dict)
    for line in csv.DictReader((ROOT / "experiments" / "paper.csv").read_text().splitlines()):
        if line["table"] == table:
            found[line["learner"]][line["task"]] = 100 * float(line["mean"]), 100 * float(line["std"])
    return found


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def short(task: str) -> str:
    robot, data = task.split("-", 1)
    return f"{robot} {''.join(word[0] for word in data.split('-'))}"


def resolution(cells: dict[str, dict[str, list[Row]]]) -> str:
    """Headroom of each task, and what the seeds can tell apart, from the spread of the control, DWM and DAWM."""
    controls = [name for name in ("td3bc", "iql") if cells.get(name)]
    tasks = [task for task in TASKS if all(task in cells[name] for name in ("cloning", *controls))]
    if not controls or not tasks:
        return "Headroom and resolution: no task has both cloning and a real-data control yet.\n"
    lines = []
    for task in tasks:
        cloning, *real = (scores(cells[name], [task])[0] for name in ("cloning", *controls))
        best = max(real, key=np.mean)
        room, own, in_sd = best.mean() - cloning.mean(), cells["cloning"][task][0].own, "-"
        if min(len(best), len(cloning)) > 1:
            in_sd = f"{room / math.sqrt((best.var(ddof=1) + cloning.var(ddof=1)) / 2):.1f}"
        row = [short(task), f"{own:.1f}", told(cloning), *map(told, real), f"{room:.1f}", in_sd]
        lines.append(row)
    text = markdown(
        ["task", "the data's mean", "cloning", *(f"{c}, real data" for c in controls), "headroom", "in sd"], lines
    )
    text += "\nHeadroom is the best control above cloning; sd is the standard deviation between seeds.\n"
    found = [detected(f"{controls[0]} on real data", scores(cells[controls[0]], tasks))]
    found += [detected(x, scores(cells[x], cells[x])) for x in ("dwm_td3bc", "dawm_td3bc")]
    luck = "Seeds of DAWM and DWM share one world model, whose own luck is not in this."
    return f"{text}\n" + wrapped(" ".join(["Resolution.", *found, luck])).removesuffix("\n")


def detected(learner: str, samples: list[np.ndarray]) -> str:
    """What the seeds detect by this learner's spread, in a sentence."""
    samples = [x for x in samples if len(x) > 1]
    if len(samples) < 2:
        return f"The spread of {learner} takes two seeds on two tasks; {len(samples)} so far."
    seeds, mean = min(map(len, samples)), float(np.mean([x.mean() for x in samples]))
    variances, gain = [x.var(ddof=1) for x in samples], gain_of_the_paper()
    found = detectable(variances, seeds)
    enough = next((n for n in range(2, 1000) if detectable(variances, n) <= gain * mean), None)
    return (
        f"By the spread of {learner}, {seeds} seeds on {len(samples)} tasks detect a difference of {found:.1f} "
        f"({100 * found / mean:.1f} % of its mean score, {mean:.1f}) with 80 % power at the 5 % level; the paper's "
        f"{100 * gain:.0f} % takes {enough or 'more than 1,000'} seeds."
    )


def gain_of_the_paper() -> float:
    """DAWM-TD3BC over DWM-TD3BC in its Table 2, of the mean over the tasks."""
    dawm, dwm = (np.mean([m for m, _ in published("table2")[x].values()]) for x in ("dawm_td3bc", "dwm_td3bc"))
    return dawm / dwm - 1


def answer(rows: list[Row], paper: bool) -> str:
    """DAWM minus each of its rivals, task by task and over the tasks, beside the paper's own differences."""
    cells, printed, lines, bars = cells_of("table2", rows, paper), published("table2") | published("table4"), [], []
    for name, pattern in RIVALS.items():
        line = [name]
        for agent, agent_name in (("td3bc", "TD3+BC"), ("iql", "IQL")):
            mine, other = f"dawm_{agent}", pattern.format(agent)
            both = [task for task in TASKS if all(task in cells.get(x, {}) for x in (mine, other))]
            theirs = printed.get(other) and np.mean([printed[mine][t][0] - printed[other][t][0] for t in both or TASKS])
            ours = "-"
            if both:
                found = above(*(scores(cells[x], both) for x in (mine, other)))
                ours = in_brackets(*found) + f" ({len(both)})" * (len(both) != len(TASKS))
                by = {task: above(*(scores(cells[x], [task]) for x in (mine, other)))[0] for task in both}
                bars.append((f"{name}, {agent_name}", by, found, theirs))
            line += [ours, "-" if theirs is None else f"{theirs:.1f}"]
        lines.append(line)
    if not bars:
        return ""
    picture = f"study{'_paper' * paper}.png"
    draw_answer(bars, PAGE.parent / picture)
    instrument = " The paper's is of D4RL's data at its scale, another instrument." * (not paper)
    head = ["DAWM minus", "with TD3+BC", "paper, TD3+BC", "with IQL", "paper, IQL"]
    return (
        f"### DAWM minus its rivals{' (paper scale)' * paper}\n\n"
        + wrapped(
            "Of Table 2's runs, below: mean over nine tasks, or over as many as stand in round brackets, and its 95 % "
            f"interval by Student's t over the tasks.{instrument}"
        )
        + markdown(head, lines)
        + f"\n![DAWM minus each of its rivals, on each task and in the mean]({picture})\n"
    )


def draw_answer(bars: list[tuple], path: Path) -> None:
    """A line for each rival: a mark for each task, the mean with its interval, the mean that the paper prints."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 1 + 0.6 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    colors = {"hopper": "tab:blue", "walker2d": "tab:orange", "halfcheetah": "tab:green"}
    marks = {"medium": "o", "medium-replay": "s", "medium-expert": "^"}
    for place, (_, by, (mean, low, high), theirs) in enumerate(bars):
        for task, value in by.items():
            robot, data = task.split("-", 1)
            axis.plot(value, place, marks[data], color=colors[robot], alpha=0.7, label=task)
        if not math.isnan(low):
            axis.plot([low, high], [place + 0.25] * 2, color="black", linewidth=2)
        axis.plot(mean, place + 0.25, "D", color="black", markersize=7, label="mean and 95 % interval")
        if theirs is not None:
            axis.plot(theirs, place + 0.25, "*", color="tab:red", markersize=11, label="the paper's mean, on D4RL")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axis.invert_yaxis()
    axis.set_xlabel("DAWM minus it, points of D4RL's score")
    axis.grid(axis="x", alpha=0.3)
    once = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(once.values(), once, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_whole(path, lambda file: figure.savefig(file, dpi=80, format="png"))


def section(table: str, rows: list[Row], paper: bool) -> str:
    cells = cells_of(table, rows, paper)
    present = {learner: some for learner, some in cells.items() if some}
    title, picture = TITLES[table], f"study_{table}{'_paper' * paper}"
    used, firsts = runs_in(cells), [] if table == "first" else runs_in(cells_of("first", rows, paper))
    if all(row in firsts for row in used):
        return "" if paper else f"### {title}\n\nNone of its own runs is in yet with today's arguments.\n"
    most = max(len(some) for tasks in present.values() for some in tasks.values())
    tasks = [task for task in TASKS if any(task in some for some in present.values())]
    usual = [some for some in present.values() if len(some) > len(tasks) / 2]  # one that has hardly begun has no mean
    shared = [task for task in tasks if all(task in some for some in usual)]
    lines = []
    for learner, some in present.items():
        mean = in_brackets(*iqm(scores(some, shared))) if shared and some.keys() >= {*shared} else "-"
        other, better = rival(learner, present), ["-", "-"]
        if both := [task for task in some if task in present.get(other, {})]:
            pair = scores(present[other], both), scores(some, both)
            on = f" ({len(both)} task{'s' * (len(both) > 1)})" * (len(both) != len(shared))
            better = [in_brackets(*above(*pair)) + on, in_brackets(*improvement(*pair), digits=2) + on]
        numbers = [told([row.score for row in some[task]], most) if task in some else "-" for task in tasks]
        lines.append([f"`{learner}`", *numbers, mean, *better])
    over = f"interquartile mean, {len(shared)} task{'s' * (len(shared) != 1)}"
    head = ["learner", *map(short, tasks), over, "DAWM above it by", "P(DAWM better)"]
    revisions = ", ".join(f"{name} ({count})" for name, count in Counter(r.revision for r in used).items())
    command = f"python experiments/study.py {'paper' if paper else table} --seeds {most}"
    text = f"### {title}{' (paper scale)' * paper}\n\n"
    hours = sum({id(row): row.seconds for row in used}.values()) / 3600
    text += wrapped(
        f"`{command}`: {len(used)} runs, {hours:.0f} hours, of revisions {revisions}; {most} agent "
        f"seed{'s' * (most > 1)} a cell, or as many as stand in brackets."
    )
    text += markdown(head, lines) + "\n"
    if waiting := [f"`{x}`" for x in cells if x not in present]:
        text += wrapped(f"No run with today's arguments yet of {', '.join(waiting)}.")
    text += f"![Learning curves of each task and the performance profile]({picture}.png)\n"
    printed = published("table2" if table == "first" else table)
    if printed := {learner: some for learner, some in printed.items() if learner in GRIDS[table]}:
        there = [task for task in TASKS if any(task in some for some in printed.values())]
        body = [[f"`{x}`", *(f"{y[t][0]:.0f} ± {y[t][1]:.0f}" for t in there)] for x, y in printed.items()]
        text += "\nThe paper's own, on D4RL's data and at its scale"
        text += ":\n\n" if paper else ", which is another instrument:\n\n"
        text += markdown(["learner", *map(short, there)], body)
    draw(present, tasks, shared, PAGE.parent / f"{picture}.png")
    return text


def arms() -> str:
    """What each learner is, and in which arguments it differs from the others."""
    lines = []
    for learner, (module, own) in LEARNERS.items():
        apart = defaultdict(list)
        for (script, field), why in APART.items():
            if script == module:
                apart[why].append(f"`{field}`")
        reasons = "; ".join(f"{', '.join(fields)}: {why}" for why, fields in apart.items())
        lines.append([f"`{learner}`", f"`{f'{module} {own}'.strip()}`", reasons or "-"])
    text = "Arguments that scripts share have the same value for every learner, but for these flags and a script's own."
    return f"### The learners\n\n{text}\n\n" + markdown(["learner", "script and flags", "its own"], lines)


def draw(present: dict, tasks: list[str], shared: list[str], path: Path) -> None:
    """A panel for each task with all learners, mean and standard deviation between seeds; the performance profile."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.6 * columns + 5.6, max(2.7 * rows, 4)), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 1, width_ratios=[*[1] * columns, 1.2])
    palette = colormaps["tab10" if len(present) <= 10 else "tab20"].colors
    colors = dict(zip(present, palette, strict=False))
    for number, task in enumerate(tasks):
        axis = figure.add_subplot(grid[divmod(number, columns)])
        some = {learner: cells[task] for learner, cells in present.items() if task in cells}
        for learner, runs in some.items():
            lengths = Counter(tuple(run.updates) for run in runs)
            updates = lengths.most_common(1)[0][0]
            curves = np.array([run.scores for run in runs if tuple(run.updates) == updates])
            mean, spread = curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else 0
            style = "*" if len(updates) == 1 else "--" if "dawm" not in learner else "-"
            axis.plot(updates, mean, style, color=colors[learner], linewidth=1.4, label=learner)
            axis.fill_between(updates, mean - spread, mean + spread, color=colors[learner], alpha=0.12, linewidth=0)
        last = max(run.updates[-1] for runs in some.values() for run in runs)
        axis.axvspan(SETTLED * last, last, color="black", alpha=0.05, linewidth=0)
        if (own := next(iter(some.values()))[0].own) is not None:
            axis.axhline(own, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(task, fontsize=9)
        axis.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        axis.grid(alpha=0.3)
    axis = figure.add_subplot(grid[:, columns])
    at = np.linspace(0, 120, 400)
    for learner, cells in present.items():  # one that lacks a task stands in the legend alone
        has_all = shared and cells.keys() >= {*shared}
        y = stats.ecdf(pooled(scores(cells, shared))).sf.evaluate(at) if has_all else np.full_like(at, np.nan)
        axis.plot(at, y, "-" if "dawm" in learner else "--", color=colors[learner], label=learner)
    axis.set_xlabel("score x", fontsize=9)
    axis.set_title(f"share of runs that score above x, {len(shared)} task{'s' * (len(shared) > 1)}", fontsize=9)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    figure.supxlabel(
        "updates of the agent (star: a planner); shaded: what counts; dotted: the data's own mean; bands: sd of seeds",
        fontsize=9,
    )
    figure.supylabel("D4RL score", fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, dpi=80, format="png"))


def controls(rows: list[Row]) -> str:
    """What learners without a world model reach on each task, as common/controls.csv has it."""
    lines = ["data,physics,fingerprint,control,seeds,updates,return,score,score_std"]
    for cells in (cells_of("table4", rows, paper) for paper in (False, True)):
        for learner, name in CONTROL_NAMES.items():
            for task, runs in cells[learner].items():
                (low, high), values = REFERENCE_RETURNS[task.split("-")[0]], [row.score for row in runs]
                score, args = np.mean(values), runs[0].content["args"]
                told = [args["env_id"], "d4rl", runs[0].data, name, len(runs), args["agent_updates"]]
                told += [f"{low + score / 100 * (high - low):.1f}", f"{score:.1f}"]
                lines.append(",".join(map(str, [*told, f"{np.std(values, ddof=1):.1f}" if len(runs) > 1 else ""])))
    return "\n".join(lines) + "\n"


def page(rows: list[Row]) -> str:
    if not rows:
        return "No run of the study is in yet.\n"
    text = "### Headroom and resolution\n\n`python experiments/report.py --resolution`\n\n"
    parts = [answer(rows, paper=False), text + resolution(cells_of("table2", rows, paper=False))]
    parts += [section(table, rows, paper=False) for table in TITLES]
    parts += [answer(rows, paper=True), *(section(table, rows, paper=True) for table in TITLES), arms()]
    return "\n".join(part for part in parts if part)


def main(args: Args) -> None:
    rows = read()
    for root in args.runs:
        rows += collect(root)
    if args.runs:
        write(rows)
        rows = read()
    if args.resolution:
        return print(resolution(cells_of("table2", rows, paper=False)), end="")
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE} has no lines {BEGIN.strip()} and {END.strip()} to write between; put them back")
    write_text(PAGE, f"{before}{BEGIN}\n{page(rows)}\n{END}{after}")
    write_text(CONTROLS, controls(rows))
    print(f"{PAGE}: {len(rows)} runs")


if __name__ == "__main__":
    run_script(main, Args)
