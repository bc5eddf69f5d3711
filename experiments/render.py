"""What a world model imagined beside what the simulator does, as a GIF: python experiments/render.py RUN

Left: MuJoCo, from the rollout's first state, which is real, with the rollout's actions. The first action is real, the
others are inferred or, in variants/joint_td3bc.py, generated. It never sees an imagined state, so that errors of states
and actions add up over the steps. Right: the imagined states, set into the same simulator. Below: the root mean square
over the state's dimensions of imagined minus simulated, in standard deviations of the real data; the bar's scale is the
same for all GIFs. Behind both robots stands the simulator's, in blue.

No state shows the place along the track; for display it is integrated from the states' x-velocity (trapezoid rule), on
both sides alike. Nothing is drawn between two states.

    python experiments/render.py runs/RUN_FOLDER
    python experiments/render.py runs/RUN_FOLDER --pick worst --out worst.gif
"""

import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import run_script
from common.files import write_whole

import mujoco
import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from run_folders import load_rollouts
from stepper import Stepper
from tqdm import tqdm

RANKED = 1000  # rollouts that --pick chooses from, drawn at random with a fixed seed
BAR_END = 0.5  # standard deviations at the error bar's end
WIDEST = 4.0  # metres in a picture, however far away a state may be imagined
RED, BLUE, DPI = "firebrick", "dodgerblue", 100
SIZE = 256  # pixels of a picture's side


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: Path = tyro.MISSING  # folder of a finished run that made rollouts with a world model
    pick: Literal["best", "median", "worst"] = "median"  # by mean error
    count: Annotated[int, (1, 100)] = 3  # so many rollouts, one after another
    out: Path | None = None  # default: imagined.gif in the run's folder
    fps: Annotated[float, (0.1, 50)] = 2.5  # states per second; the simulator has 125 (Hopper)


# ---- What to show


@dataclass
class Rollout:
    """One rollout of n transitions; index 0 of the first axis is the simulator, 1 the imagination.

    obs [2, n + 1, obs_dim]; reward [2, n]; fallen [2, n + 1], true from the fall on; error [n + 1].
    """

    number: int
    obs: np.ndarray
    reward: np.ndarray
    fallen: np.ndarray
    error: np.ndarray
    title: str = ""

    @property
    def mean_error(self) -> float:
        return self.error[1:].mean()  # the first state is shared


def simulate(env, columns: list[np.ndarray], number: int, std: np.ndarray, rule: tuple) -> Rollout:
    """A rollout's columns obs, action, reward, next_obs, terminated beside what env does.

    `rule` is the range of healthy states. The error is infinite from where the simulator gives up.
    """
    first, action, reward, next_obs, terminated = columns
    imagined = np.concatenate([first[:1], next_obs]).astype(np.float64)
    obs, rewards = np.stack([imagined, imagined]), np.stack([np.zeros(len(action)), reward[:, 0]])
    mujoco.mj_resetData(env.model, env.data)  # nothing of the state before, which the solver would start from
    env.set_state(np.append(0, imagined[0, : env.model.nq - 1]), imagined[0, env.model.nq - 1 :])
    for i, doing in enumerate(action):
        obs[0, i + 1], rewards[0, i], *_ = env.step(doing.astype(np.float64))
        if not np.isclose(env.data.time, (i + 1) * env.dt):  # MuJoCo starts anew where it cannot go on
            obs[0, i + 1 :] = np.inf
            break
    fallen = ~((obs > rule[0]) & (obs < rule[1])).all(2)
    fallen[1, 1:] |= terminated[:, 0] > 0  # the model's own sign
    error = np.sqrt(np.square((obs[1] - obs[0]) / std).mean(1))
    return Rollout(number, obs, rewards, np.logical_or.accumulate(fallen, axis=1), error)


def choose(options: Args, parts, stepper: Stepper) -> list[Rollout]:
    """The rollouts asked for, each with what it stands for in its title."""
    dataset, rows, valid = parts.dataset, parts.rollouts["rows"], parts.rollouts["valid"]
    sizes = parts.script.row_sizes(dataset.obs.shape[1], dataset.action.shape[1])
    std, rule = dataset.obs.std(0, dtype=float), (dataset.healthy_low, dataset.healthy_high)
    rule = (-np.inf, np.inf) if rule[0] is None else rule

    def show(number: int) -> Rollout:
        columns = [column.numpy() for column in rows[number][valid[number]].split(sizes, dim=1)]
        return simulate(stepper.env, columns, number, std, rule)

    known = stepper.checkable(rows[:, 0, : len(std)].numpy())
    numbers = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(known))[:RANKED])
    ranked = [show(number) for number in tqdm(numbers, desc="simulate", unit=" rollout", disable=None)]
    ranked = sorted((found for found in ranked if np.isfinite(found.error).all()), key=lambda found: found.mean_error)
    if not ranked:
        raise UserError(f"{options.run} holds no rollout that the simulator can follow")
    errors = [ranked[i].mean_error for i in (0, len(ranked) // 2, -1)]
    print(f"mean error of {len(ranked):,} rollouts: {errors[0]:.3f} to {errors[2]:.3f}, median {errors[1]:.3f}")
    count = min(options.count, len(ranked))
    first = {"best": 0, "median": (len(ranked) - count) // 2, "worst": len(ranked) - count}[options.pick]
    for rank, found in enumerate(ranked[first : first + count], first + 1):
        found.title = f": rank {rank:,} of {len(ranked):,}{' drawn' if len(numbers) < len(rows) else ''}, by mean error"
    return ranked[first : first + count][:: -1 if options.pick == "worst" else 1]


# ---- Drawing


def positions(obs: np.ndarray, nq: int, dt: float) -> np.ndarray:
    """MuJoCo's positions [n + 1, nq] of obs [n + 1, obs_dim], with x from their x-velocities, 0 at first."""
    velocity = obs[:, nq - 1]
    x = np.append(0, np.cumsum(dt * (velocity[1:] + velocity[:-1]) / 2))
    return np.concatenate([x[:, None], obs[:, : nq - 1]], axis=1)


def capsules(model, data, position: np.ndarray) -> list[tuple]:
    """The robot's capsules in the plane of its motion: (ends [2, 2] in metres, radius, colour), MuJoCo's kinematics."""
    data.qpos[:] = position
    mujoco.mj_forward(model, data)
    found = []
    for geom in np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE):
        radius, half_length = model.geom_size[geom, :2]
        along = data.geom_xmat[geom].reshape(3, 3)[:, 2] * half_length
        ends = np.stack([data.geom_xpos[geom] - along, data.geom_xpos[geom] + along])[:, [0, 2]]
        found.append((ends, radius, model.geom_rgba[geom, :3]))
    return found


def blank(width: int, height: int) -> Figure:
    """An empty picture of so many pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def draw_scene(axis, middle: float, span: float, robot: list[tuple], ghost: list[tuple] = ()) -> None:
    """A floor with a mark every tenth of a metre, `span` metres around x = `middle`; a robot, and behind it a ghost,
    all blue and a little thicker."""
    axis.clear()
    axis.set(xlim=(middle - span / 2, middle + span / 2), ylim=(-span / 10, 0.9 * span), xticks=[], yticks=[])
    axis.set_facecolor("aliceblue")
    axis.axhspan(-span, 0, color="lightgrey")
    axis.vlines(np.arange(np.floor(middle - span), middle + span, 0.1), -span / 40, 0, "grey", linewidth=0.5)
    metre = axis.get_window_extent().width / span * 72 / DPI  # in points, as the width of a line
    for shown, grown, colour in ((ghost, 6, BLUE), (robot, 2, "0.25"), (robot, 0, None)):
        for ends, radius, own in shown:
            width = 2 * radius * metre + grown / 2
            axis.plot(*ends.T, color=own if colour is None else colour, linewidth=width, solid_capstyle="round")


def snapshot(figure: Figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


class Sheet:
    """Frames of two scenes, the simulator's and the model's, and the error as a bar."""

    def __init__(self, caption: str):
        self.caption, pad, top, below = caption, SIZE // 16, SIZE // 5, SIZE // 2
        width, height = 2 * SIZE + 3 * pad, top + SIZE + below
        self.figure = blank(width, height)
        self.boxes = [(pad + side * (SIZE + pad), below, SIZE, SIZE) for side in (0, 1)]  # pixels from the lower left
        bar = (width // 3, below // 2, width // 2, below // 6)
        shares = [np.divide(box, (width, height, width, height)) for box in (*self.boxes, bar)]
        *self.scenes, self.bar = (self.figure.add_axes(share) for share in shares)

    def __call__(self, robots, middle: float, span: float, rollout: Rollout, step: int, dt: float) -> Image.Image:
        meanings = "Simulator\nwhat the actions really do", "World model\nwhat it imagined"
        for side, (axis, meaning) in enumerate(zip(self.scenes, meanings, strict=True)):
            draw_scene(axis, middle, span, robots[side], robots[0])
            axis.set_title(meaning, fontsize=9)
            told = f"reward {rollout.reward[side, step - 1]:.2f}" if step else "the real start"
            fallen = rollout.fallen[side, step]
            told += f", fallen at step {np.argmax(rollout.fallen[side])}" if fallen else ""
            axis.set_xlabel(told, fontsize=8, color=RED if fallen else "black")
        error = rollout.error[step]
        self.bar.clear()
        self.bar.barh(0, min(error, BAR_END), color=RED if error > BAR_END else BLUE)
        self.bar.set(xlim=(0, BAR_END), yticks=[])
        self.bar.tick_params(labelsize=7)
        self.bar.set_ylabel(f"step {step}, {1000 * step * dt:.0f} ms\nerror {error:.2f} sd",
                            fontsize=8, rotation=0, ha="right", va="center")  # fmt: skip
        self.bar.set_xlabel(f"{self.caption}, rollout {rollout.number:,}{rollout.title}\n"
                            "blue: the simulator's robot; sd: of the real data", fontsize=7)  # fmt: skip
        return snapshot(self.figure)


def draw_frames(env, sheet: Sheet, rollouts: list[Rollout]) -> list[Image.Image]:
    """A frame for every state of every rollout. All have one scale; each rollout has one place of the camera."""
    model, data, frames = env.model, mujoco.MjData(env.model), []
    shapes = [
        [[capsules(model, data, position) for position in positions(obs, model.nq, env.dt)] for obs in rollout.obs]
        for rollout in rollouts
    ]
    boxes = []  # of each rollout: leftmost and rightmost x, highest z
    for sides in shapes:
        ends = np.concatenate([ends for side in sides for robot in side for ends, _, _ in robot])
        boxes.append((ends[:, 0].min(), ends[:, 0].max(), ends[:, 1].max()))
    span = min(max(max(right - left, high / 0.88) for left, right, high in boxes) + 0.2, WIDEST)
    for rollout, sides, (left, right, _) in zip(rollouts, shapes, boxes, strict=True):
        for step, robots in enumerate(zip(*sides, strict=True)):
            frames.append(sheet(robots, (left + right) / 2, span, rollout, step, env.dt))
    return frames


def write_gif(path: Path, frames: list[Image.Image], durations: list[int]) -> int:
    """Bytes written. No dither, which would flicker."""
    first, *others = (frame.quantize(dither=Image.Dither.NONE) for frame in frames)
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    write_whole(path, lambda file: file.write(buffer.getvalue()))
    return len(buffer.getvalue())


def main(options: Args) -> None:
    if options.out is not None and options.out.suffix != ".gif":
        raise UserError(f"--out {options.out} must end in .gif")
    parts = load_rollouts(options.run)
    stepper = Stepper(parts.dataset, parts.args.physics)
    rollouts, env = choose(options, parts, stepper), stepper.env
    frames = draw_frames(env, Sheet(parts.args.env_id), rollouts)
    hold = round(1000 / options.fps)
    durations = [duration for found in rollouts for duration in (*[hold] * (len(found.error) - 1), 3 * hold)]
    out = options.out or options.run / "imagined.gif"
    size = write_gif(out, frames, durations)
    for found in rollouts:
        print(f"rollout {found.number}: error by step " + " ".join(f"{error:.2f}" for error in found.error[1:]))
    print(f"{out}: {len(frames)} frames, {size / 2**20:.2f} MiB, physics {parts.evaluator.physics}")


if __name__ == "__main__":
    run_script(main, Args)
