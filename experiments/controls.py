"""Adds what learners reach without a world model to common/controls.csv, which every run's closing lines compare with.

    data="--run-dir runs/controls --env-id local/hopper/medium-v0 --laptop --synthetic-fraction 0"
    for seed in 0 1; do                                      # or dawm_iql.py
      python dawm_td3bc.py $data --bc-alpha 0 --agent-updates 5000 --eval-every 500 --seed $seed
      python dawm_td3bc.py $data --bc-alpha 1 --agent-updates 25000 --eval-every 2500 --seed $seed    # as make demo
    done
    python experiments/controls.py runs/controls

These make the rows that are there; flags behind --synthetic-fraction 0 are told with each.

A row is for the data whose fingerprint it has, so one of data that have changed since is shown nowhere; it goes when
the same control is measured on the new ones. Mean over seeds of the mean of the curve; standard deviation n - 1.
"""

import csv
import statistics
import sys
from collections import defaultdict
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import tell
from common.evaluation import normalized_score
from common.files import write_text
from common.run import CONTROLS

from run_folders import finished_runs

FIELDS = "data physics control seeds return return_std score score_std command revision fingerprint".split()


def control(args: dict) -> str:
    """What a run with no world model is called where others are compared with it."""
    if "expectile" in args:
        return "IQL on the data"
    return "TD3+BC on the data" if args["bc_alpha"] else "cloning the data"


def command(content: dict) -> str:
    """As it was given, without the places and the seed."""
    words, kept = iter(content["command"]), ["python"]
    for word in words:
        if word in ("--run-dir", "--stage-dir", "--seed"):
            next(words)
        else:
            kept.append(word)
    return " ".join(kept)


def row(runs: list) -> dict:
    content, curves = runs[0].content, [statistics.mean(run.metrics["eval/episodic_return"]) for run in runs]
    if len({command(run.content) for run in runs}) > 1 or len(runs) < 2:
        names = ", ".join(sorted({command(run.content) for run in runs}))
        raise UserError(f"a control is two runs or more that differ in the seed alone, not {names}")
    scores = [normalized_score(content["data"]["robot"], mean) for mean in curves]
    values = [curves] if None in scores else [curves, scores]
    told = [f"{of(x):.1f}" for x in values for of in (statistics.mean, statistics.stdev)] + ["", ""]
    seeds = " ".join(str(run.content["args"]["seed"]) for run in runs)
    found = [content["data"]["env_id"], content["physics"], control(content["args"]), seeds, *told[:4]]
    found += [command(content), content["git"], content["data"]["fingerprint"]]
    return dict(zip(FIELDS, found, strict=True))


def main(root: Path) -> None:
    groups = defaultdict(list)
    for run in finished_runs(root):
        content = run.content
        if content["args"].get("synthetic_fraction") == 0:
            groups[content["data"]["env_id"], content["physics"], control(content["args"])].append(run)
    rows = {}
    if CONTROLS.exists():
        rows = {tuple(old.values())[:3]: old for old in csv.DictReader(CONTROLS.read_text().splitlines())}
    rows |= {key: row(sorted(runs, key=lambda run: run.content["args"]["seed"])) for key, runs in groups.items()}
    text = StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[key] for key in sorted(rows))
    write_text(CONTROLS, text.getvalue())
    print(text.getvalue(), end="")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tell(lambda: main(Path(sys.argv[1])))
