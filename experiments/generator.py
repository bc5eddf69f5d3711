"""Which settings make truer transitions? One change at a time from the laptop scale, judged by experiments/audit.py.

    python experiments/generator.py --robots hopper walker2d          # makes what is missing; prints and draws
    python experiments/generator.py --table docs/generator            # only prints and draws

For each setting: a set of eight-step rollouts from an eighth of the pairs, then its audit without the ensemble. Changes
of the world model train one (six minutes on one core), the others take two minutes. One thread; two of these side by
side, for a robot each, keep two cores busy for an hour.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # name: flags beside --laptop
    "laptop": "",
    "N 1": "--sampling-steps 1",
    "N 2": "--sampling-steps 2",
    "N 5": "--sampling-steps 5",
    "temperature 0": "--sampling-temperature 0",
    "temperature 1": "--sampling-temperature 1",
    "guidance 1": "--guidance-scale 1",
    "guidance 2": "--guidance-scale 2",
    "IDM context 0": "--idm-context 0",
    "IDM sample": "--completion sample",
    "limits": "--normalizer limits",
    "cdf": "--normalizer cdf",
    "noise, limits": "--prediction noise --normalizer limits",
    "N 5, T 1, guidance 1": "--sampling-steps 5 --sampling-temperature 1 --guidance-scale 1",
}
ROLLOUTS = "--horizon 7 --conditioning-subsample 8 --agent-updates 1 --eval-episodes 1"


def slug(name: str) -> str:
    """A setting's name in the names of its runs."""
    return name.lower().replace(", ", "_").replace(" ", "")


def make(robot: str, name: str, out: Path) -> None:
    """The set and its audit, unless they are there."""
    run_name = slug(name)
    if list(out.glob(f"local-{robot}-medium-v0__{run_name}__0__*/audit.json")):
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "dawm_td3bc.py",
        "--env-id",
        f"local/{robot}/medium-v0",
        "--laptop",
        "--run-dir",
        str(out),
    ]
    command += ["--exp-name", run_name, *ROLLOUTS.split(), *SETTINGS[name].split()]
    print(f"{robot}, {name}", flush=True)
    with open(out / f"{robot}-{run_name}.log", "w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
        run = max(out.glob(f"local-{robot}-medium-v0__{run_name}__0__*/summary.txt")).parent
        command = [sys.executable, "experiments/audit.py", str(run), "--threads", "1", "--ensemble-updates", "0"]
        command += ["--rows", "50000", "--neighbours", "500", "--inverse", "2048"]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)


def figures(audit: dict) -> dict[str, float]:
    """What the table shows: the first step, and the mean over the seven imagined ones after it."""
    steps, calibrated = audit["synthetic"]["steps"], audit["calibration"]["world model"]
    action = audit["action"]

    def later(values):
        return float(np.mean(list(values)[1:]))

    return {
        "state error, step 0": steps[0]["state"]["median"],
        "steps 1-7": later(step["state"]["median"] for step in steps),
        "99 %, steps 1-7": later(step["state"]["99"] for step in steps),
        "no action explains, 1-7": later(step["median"] for step in action["unexplained"]),
        "reward error, 0": steps[0]["reward"]["median"],
        "marginals, 1-7": later(step["marginals"] for step in audit["likeness"]["synthetic"]),
        "correlations, 1-7": later(step["correlations"] for step in audit["likeness"]["synthetic"]),
        "CRPS, step 1": calibrated["crps"][0],
        "CRPS, step 8": calibrated["crps"][-1],
        "spread / error, 1": calibrated["spread"][0] / calibrated["error"][0],
        "spread / error, 8": calibrated["spread"][-1] / calibrated["error"][-1],
    }


def tell(robots: list[str], out: Path, picture: Path) -> None:
    """Print a table for each robot, and draw the errors of all settings beside the laptop's."""
    found = {}
    for robot in robots:
        for name in SETTINGS:
            if audits := sorted(out.glob(f"local-{robot}-medium-v0__{slug(name)}__0__*/audit.json")):
                content = json.loads(audits[-1].read_text())
                if content["calibration"] is None:
                    sys.exit(f"{audits[-1]} has no calibration: {content['no_calibration']}")
                found.setdefault(robot, {})[name] = figures(content)
    if not found:
        sys.exit(f"no audited run in {out}; run without --table first")
    picture.parent.mkdir(parents=True, exist_ok=True)
    for robot, rows in found.items():
        heads = list(next(iter(rows.values())))
        print(f"\n| {robot} | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    picture.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    shown = ["state error, step 0", "steps 1-7", "no action explains, 1-7", "CRPS, step 1", "CRPS, step 8"]
    shown += ["spread / error, 8"]
    figure, axes = plt.subplots(1, len(shown), figsize=(16, 5), sharey=True)
    for axis, head in zip(axes, shown, strict=True):
        for robot, marker, color in zip(found, "os^", ("#1f77b4", "#ff7f0e", "#2ca02c"), strict=False):
            names = [name for name in SETTINGS if name in found[robot]]
            place = [list(SETTINGS).index(name) for name in names]
            axis.plot([found[robot][name][head] for name in names], place, marker, color=color, label=robot)
            if "laptop" in found[robot]:
                axis.axvline(found[robot]["laptop"][head], color=color, linewidth=0.8, linestyle="--")
        axis.set_xlim(left=0)
        axis.set_title(head, fontsize=10)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8, which="both")
    axes[-1].axvline(1, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(SETTINGS)), list(SETTINGS), fontsize=9)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture.with_suffix(".png"), dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--robots", nargs="+", default=["hopper", "walker2d"], choices=("hopper", "walker2d", "halfcheetah")
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/generator", help="run folder")
    parser.add_argument("--table", type=Path, help="only tell what is there; PATH.json and PATH.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.table is None:
        for name in options.settings:
            for robot in options.robots:
                make(robot, name, options.out)
    tell(options.robots, options.out, options.table or options.out / "generator")


if __name__ == "__main__":
    main()
