"""How good is the policy of a finished run, and what does it look like?

    python experiments/policy.py RUN                       # 5 start seeds of 10 episodes each
    python experiments/policy.py RUN --gif policy.gif      # and one episode to watch
    python experiments/policy.py RUN --physics stock       # the same policy in the simulator as it is installed

RUN is the folder of a run of any script here. Its actor acts, or a planner's, which takes minutes. The
episodes of a start seed begin at seed, seed + 1, ...; the first start seed is that of the run's own evaluations.

The picture is a stick figure of D4RL's three robots, else gymnasium's own. It shows at most 10 seconds.
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError
from common.cli import Count, Seed, run_script
from common.evaluation import Evaluator, described, robot_of
from common.files import one_line

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw
from render import SIZE, blank, capsules, draw_scene, snapshot, write_gif
from run_folders import load_run
from tqdm import tqdm

FRAMES, MILLISECONDS = 250, 40  # of the GIF: at most; of each


@tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
@dataclass
class Args:
    run: Path = tyro.MISSING  # folder of a finished run
    episodes: Count = 10  # per start seed
    starts: Count = 5  # start seeds
    seed: Seed | None = None  # the first start seed; default: that of the run's own evaluations
    physics: Literal["auto", "d4rl", "stock"] = "auto"  # auto: the run's
    gif: Path | None = None  # file to show the first episode in


def main(args: Args) -> None:
    if args.gif and (args.gif.suffix != ".gif" or not args.gif.absolute().parent.is_dir()):
        raise UserError(f"--gif {args.gif} must end in .gif and lie in a folder that exists")
    parts = load_run(args.run)
    physics = parts.evaluator.physics if args.physics == "auto" else args.physics
    seed = parts.args.seed + 100 if args.seed is None else args.seed
    evaluator = Evaluator(parts.dataset, physics, args.episodes)
    seeds = range(seed, seed + args.starts * args.episodes, args.episodes)
    bar = tqdm(seeds, "evaluate", unit=" start seeds", disable=None)  # none where there is no terminal
    returns = np.array([evaluator(policy_of(parts, evaluator), start) for start in bar])
    print(f"{parts.args.exp_name} on {parts.args.env_id}, seed {parts.args.seed}")
    where = f"{described(parts.dataset.spec)}, physics {physics}"
    print(f"start seeds {', '.join(map(str, seeds))}; episodes of each: {args.episodes}, in {where}")
    print(f"\n{'return':<22}{'mean':>10}{'std':>10}{'lowest':>10}{'highest':>10}{'D4RL score of the mean':>26}")
    print(row("episodes", returns.reshape(-1), evaluator))
    print(row("means of start seeds", returns.mean(1), evaluator))
    print(row("the data's episodes", parts.dataset.returns, evaluator))
    if args.gif:
        show(parts, physics, seed, args.gif)


def policy_of(parts: SimpleNamespace, evaluator: Evaluator):
    """obs [n, obs_dim] -> actions [n, action_dim] in [-1, 1]: the actor, or a planner that has no plan yet."""
    device = parts.run.device
    if hasattr(parts, "planner"):
        planner = type(parts.planner)(parts.args, parts.model, len(evaluator.envs), device)
        return lambda obs: planner(obs, evaluator.running)
    return torch.no_grad()(lambda obs: parts.actor(torch.as_tensor(obs, device=device)).cpu().numpy())


def row(name: str, returns: np.ndarray, evaluator: Evaluator) -> str:
    """The standard deviation is that of a sample (n - 1)."""
    std = f"{returns.std(ddof=1):.1f}" if len(returns) > 1 else "-"
    numbers = f"{returns.mean():10.1f}{std:>10}{returns.min():10.1f}{returns.max():10.1f}"
    score = evaluator.score(returns.mean())
    return f"{name:<22}{numbers}{'none' if score is None else f'{score:.1f}':>26}"


# ---- The picture


def show(parts: SimpleNamespace, physics: str, seed: int, path: Path) -> None:
    """One episode as a GIF, in real time; the last frame is its end where that lies within the GIF's length."""
    spec, sticks = copy.deepcopy(parts.dataset.spec), bool(robot_of(parts.dataset.spec))
    spec.kwargs["render_mode"] = None if sticks else "rgb_array"
    evaluator = Evaluator(replace(parts.dataset, spec=spec), physics, 1)
    policy, frames, steps = policy_of(parts, evaluator), [], 0
    rate = evaluator.envs[0].metadata.get("render_fps", 1000 / MILLISECONDS)
    every = max(1, round(MILLISECONDS * rate / 1000))

    def picture() -> None:
        image = stick_figure(evaluator.envs[0].unwrapped) if sticks else rendered(evaluator.envs[0])
        text = f"{parts.args.exp_name} on {parts.args.env_id}\n{steps / rate:.1f} s"
        ImageDraw.Draw(image).text((6, 4), text, "black", font_size=12, stroke_width=1, stroke_fill="white")
        frames.append(image)

    def watched(obs: np.ndarray) -> np.ndarray:
        nonlocal steps
        if steps % every == 0 and len(frames) < FRAMES:
            picture()
        steps += 1
        return policy(obs)

    returned = evaluator(watched, seed)[0]
    if len(frames) < FRAMES:
        picture()
    size = write_gif(path, frames, [max(MILLISECONDS, round(1000 * every / rate))] * len(frames))
    print(f"\n{path}: {len(frames)} frames, {size / 2**20:.1f} MiB; {steps} steps, return {returned:.1f}")


def rendered(env: gym.Env) -> Image.Image:
    try:
        image = Image.fromarray(env.render())
    except Exception as error:  # of gymnasium's, pygame's, OpenGL's or of the environment's own code
        raise UserError(f"--gif: {env.spec.id} gives no picture ({type(error).__name__}: {one_line(error)})")
    return image.resize((SIZE, round(SIZE * image.height / image.width)))


def stick_figure(robot: gym.Env) -> Image.Image:
    figure = blank(SIZE, SIZE)
    shown = capsules(robot.model, mujoco.MjData(robot.model), robot.data.qpos)
    draw_scene(figure.add_axes((0, 0, 1, 1)), robot.data.qpos[0], 3.0, shown)
    return snapshot(figure)


if __name__ == "__main__":
    run_script(main, Args)
