"""What a world model imagined beside what the simulator does, as a GIF: python experiments/render.py RUN

Left: MuJoCo, from the rollout's first state, which is real, with the rollout's actions. The first action is real, the
others are inferred or, in variants/joint_td3bc.py, generated. It never sees an imagined state, so that errors of states
and actions add up over the steps. Right: the imagined states, set into the same simulator. Below: the root mean square
over the state's dimensions of imagined minus simulated, in standard deviations of the real data; the bar's scale is the
same for all GIFs. The outline in both pictures is the simulator's robot.

No state shows the place along the track; for display it is integrated from the states' x-velocity (trapezoid rule), on
both sides alike. Nothing is drawn between two states.

    python experiments/render.py runs/RUN_FOLDER
    python experiments/render.py runs/RUN_FOLDER --pick worst --out worst.gif
    python experiments/render.py runs/RUN_FOLDER --rollout 17 4711
"""

import math
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import parse_args, tell
from common.files import write_whole

import matplotlib
import mujoco
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from run_folders import load_rollouts
from stepper import Stepper
from tqdm import tqdm

RANKED = 1000  # rollouts that --pick chooses from, drawn at random with a fixed seed
BAR_END = 0.5  # standard deviations at the error bar's end
FINE = 3  # drawn so many times larger, then reduced: smooth edges
WIDEST = 4.0  # metres in a picture, however far away a state may be imagined
INK, GREY, RED, BLUE, PAPER = (30, 30, 30), (120, 120, 120), (200, 30, 30), (20, 130, 255), (255, 255, 255)


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: Path = tyro.MISSING  # folder of a finished run that made rollouts with a world model
    pick: Literal["best", "median", "worst"] = "median"  # by mean error
    count: Annotated[int, (1, 100)] = 3  # so many rollouts, one after another
    rollout: tuple[int, ...] = ()  # these, by number from 0, instead of --pick and --count
    out: Path | None = None  # default: imagined.gif in the run's folder
    fps: Annotated[float, (0.1, 50)] = 2.5  # states per second; the simulator has 125 (Hopper)
    size: Annotated[int, (32, 1024)] = 256  # pixels of each picture's side


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
    if options.rollout:
        for number in options.rollout:
            if not 0 <= number < len(rows):
                raise UserError(f"--rollout {number}: the run has {len(rows):,} rollouts, 0 to {len(rows) - 1}")
            if not known[number] or not np.isfinite(show(number).error).all():
                raise UserError(f"--rollout {number}: the simulator cannot go on from its first state; take another")
        return [show(number) for number in options.rollout]
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
        found.append((ends, radius, tuple(int(255 * c) for c in model.geom_rgba[geom, :3])))
    return found


class View:
    """A picture of `size` pixels that shows `span` metres around x = `middle`, the floor at a tenth of its height."""

    def __init__(self, size: int, span: float, middle: float):
        self.size, self.span, self.middle, self.scale = size, span, middle, size / span

    def pixel(self, x: float, z: float) -> tuple[float, float]:
        return (x - self.middle) * self.scale + self.size / 2, 0.9 * self.size - z * self.scale

    def capsule(self, draw, ends: np.ndarray, radius: float, fill) -> None:
        a, b = (np.array(self.pixel(*end)) for end in ends)
        radius = max(radius * self.scale, 0.5)
        across = np.array([a[1] - b[1], b[0] - a[0]])
        across *= radius / max(np.hypot(*across), 1e-9)
        draw.polygon([tuple(p) for p in (a + across, b + across, b - across, a - across)], fill=fill)
        for x, z in (a, b):
            draw.ellipse((x - radius, z - radius, x + radius, z + radius), fill=fill)


def draw_sticks(view: View, robot: list[tuple]) -> Image.Image:
    """The robot from its capsules, over a floor with a mark every tenth of a metre."""
    image = Image.new("RGB", (view.size, view.size), (235, 240, 246))
    draw = ImageDraw.Draw(image)
    floor = view.pixel(0, 0)[1]
    draw.rectangle((0, floor, view.size, view.size), fill=(205, 210, 205))
    for tenth in range(math.floor(10 * (view.middle - view.span)), math.ceil(10 * (view.middle + view.span))):
        x, length = view.pixel(tenth / 10, 0)[0], view.size * (0.05 if tenth % 5 == 0 else 0.025)
        draw.line((x, floor, x, floor + length), fill=(120, 125, 120), width=FINE)
    edge = view.size / 220 / view.scale
    for ends, radius, colour in robot:
        view.capsule(draw, ends, radius, tuple(c // 2 for c in colour))
        view.capsule(draw, ends, radius - edge, colour)
    return image


def draw_outline(image: Image.Image, view: View, robot: list[tuple]) -> None:
    """The contour of the simulator's robot, just outside of it, on a picture of either side."""
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for grown, fill in ((view.size / 128 / view.scale, 255), (0, 0)):
        for ends, radius, _ in robot:
            view.capsule(draw, ends, radius + grown, fill)
    image.paste(BLUE, mask=mask)


class Sheet:
    """A frame: titles, two pictures, and what belongs to this step in words and as a bar."""

    def __init__(self, size: int, caption: str, has_rule: bool):
        self.size, self.caption, self.has_rule = size, caption, has_rule
        self.unit = size / 256
        self.pad = round(8 * self.unit)
        self.top, self.width = round(40 * self.unit), 2 * size + 3 * self.pad
        self.height = self.top + size + round(106 * self.unit)
        fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # figures of equal width, and there on every machine
        self.fonts = {
            name: ImageFont.truetype(str(fonts / file), max(6, round(points * self.unit)))
            for name, file, points in (
                ("title", "DejaVuSans-Bold.ttf", 15),
                ("text", "DejaVuSans.ttf", 12),
                ("bold", "DejaVuSans-Bold.ttf", 12),
                ("small", "DejaVuSans.ttf", 10),
            )
        }

    def __call__(self, pictures: list[Image.Image], rollout: Rollout, step: int, dt: float) -> Image.Image:
        sheet = Image.new("RGB", (self.width, self.height), PAPER)
        draw, unit, below = ImageDraw.Draw(sheet), self.unit, self.top + self.size

        def text(x, y, words, font="text", fill=INK, anchor="lm"):
            draw.text((x, y), words, fill=fill, font=self.fonts[font], anchor=anchor)

        titles = (
            ("Simulator", "what the rollout's actions really do"),
            ("World model", "what it imagined from the same start"),
        )
        for side, (title, meaning) in enumerate(titles):
            left = self.pad + side * (self.size + self.pad)
            text(left, 12 * unit, title, "title")
            text(left, 30 * unit, meaning, "small", GREY)
            reward = f"reward {rollout.reward[side, step - 1]:.2f}" if step else "the real start"
            text(left, below + 14 * unit, reward)
            if self.has_rule:
                words, how = "not fallen", ("text", INK)
                if rollout.fallen[side, step]:
                    words, how = f"fallen at step {np.argmax(rollout.fallen[side])}", ("bold", RED)
                text(left + self.size, below + 14 * unit, words, *how, "rm")
        line = below + 42 * unit
        text(self.pad, line, f"step {step} of {len(rollout.error) - 1}", "bold")
        text(self.pad + 92 * unit, line, "error of the state")
        start, end, error = self.pad + 214 * unit, self.width - self.pad - 66 * unit, rollout.error[step]
        full = start + (end - start) * min(error / BAR_END, 1)
        draw.rectangle((start, line - 7 * unit, end, line + 7 * unit), fill=(230, 230, 230))
        if full - start >= 1:
            draw.rectangle((start, line - 7 * unit, full, line + 7 * unit), fill=RED if error > BAR_END else BLUE)
        for part in (0, 0.5, 1):
            x = start + part * (end - start)
            draw.line((x, line - 7 * unit, x, line + 10 * unit), fill=GREY)
            text(x, line + 16 * unit, f"{part * BAR_END:g}", "small", GREY, "mm")
        text(self.width - self.pad, line, f"{error:.2f} std", "bold", RED if error > BAR_END else INK, "rm")
        text(self.pad, line + 18 * unit, f"{1000 * step * dt:.0f} ms", "small", GREY)
        title = f"{self.caption}, rollout {rollout.number:,}{rollout.title}"
        text(self.pad, below + 80 * unit, title, "small", GREY)
        legend = "blue outline, in both pictures: the simulator's robot; std: standard deviations of the real data"
        text(self.pad, below + 95 * unit, legend, "small", GREY)
        for side, picture in enumerate(pictures):  # last: no word of a small sheet may reach into them
            sheet.paste(picture, (self.pad + side * (self.size + self.pad), self.top))
        return sheet


def draw_frames(env, size: int, rollouts: list[Rollout], sheet: Sheet) -> list[Image.Image]:
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
        view = View(size * FINE, span, (left + right) / 2)
        for step, robots in enumerate(zip(*sides, strict=True)):
            pictures = [draw_sticks(view, robot) for robot in robots]
            for picture in pictures:
                draw_outline(picture, view, robots[0])
            frames.append(sheet([picture.reduce(FINE) for picture in pictures], rollout, step, env.dt))
    return frames


def write_gif(path: Path, frames: list[Image.Image], durations: list[int]) -> int:
    """All frames with one palette, else the background would flicker -> bytes written."""
    some = frames[:: max(1, len(frames) // 8)]
    strip = Image.new("RGB", (some[0].width, some[0].height * len(some)))
    for i, frame in enumerate(some):
        strip.paste(frame, (0, i * frame.height))
    palette = strip.quantize(120, dither=Image.Dither.NONE)
    signals = [value for colour in (INK, GREY, RED, BLUE, PAPER) for value in colour]  # too few pixels to be found
    palette.putpalette(palette.getpalette()[: 3 * 120] + signals)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(buffer.getvalue()))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); give another --out")
    return len(buffer.getvalue())


def main(options: Args) -> None:
    if options.out is not None and options.out.suffix != ".gif":
        raise UserError(f"--out {options.out} must end in .gif")
    parts = load_rollouts(options.run)
    stepper = Stepper(parts.dataset, parts.args.physics)
    rollouts, env = choose(options, parts, stepper), stepper.env
    sheet = Sheet(options.size, parts.args.env_id, parts.dataset.healthy_low is not None)
    frames = draw_frames(env, options.size, rollouts, sheet)
    hold = round(1000 / options.fps)
    durations = [duration for found in rollouts for duration in (*[hold] * (len(found.error) - 1), 3 * hold)]
    out = options.out or options.run / "imagined.gif"
    size = write_gif(out, frames, durations)
    for found in rollouts:
        print(f"rollout {found.number}: error by step " + " ".join(f"{error:.2f}" for error in found.error[1:]))
    print(f"{out}: {len(frames)} frames, {size / 2**20:.2f} MiB, physics {parts.evaluator.physics}")


if __name__ == "__main__":
    tell(lambda: main(parse_args(Args, {})))
