"""The simulator and the score: the environment that a data set names, D4RL's physics, many episodes side by side."""

import copy
import os
import reprlib
import warnings
from contextlib import contextmanager

from common import UserError
from common.files import one_line

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

_gl = os.environ.pop("MUJOCO_GL", None)  # the OpenGL that it names may not be here, and no score needs one
import mujoco  # noqa: E402

if _gl is not None:
    os.environ["MUJOCO_GL"] = _gl

SETTLED = 0.5  # share of a training behind which evaluations count

# Returns that count as 0 and 100 [D4RL infos.py]; the same for every data set of a robot.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
}
SIMULATORS = [f"{name}-v{version}" for name in ("Hopper", "Walker2d", "HalfCheetah") for version in (4, 5)]
# Wrappers that watch and change nothing; all others are part of a data set's task.
RECORDERS = (
    "RecordEpisodeStatistics", "RecordVideo", "HumanRendering", "RenderCollection", "DataCollector",
    "StepDataCollector", "Monitor",
)  # fmt: skip


def plain(spec: EnvSpec) -> EnvSpec:
    """A copy without what only shows or records: no window is opened and no film written during an evaluation."""
    spec = copy.deepcopy(spec)
    spec.kwargs.pop("render_mode", None)
    theirs = ("gymnasium.", "minari.", "stable_baselines3.")  # a user's own class may have any name
    spec.additional_wrappers = tuple(
        x for x in spec.additional_wrappers if not (x.name in RECORDERS and x.entry_point.startswith(theirs))
    )
    return spec


def make_env(simulator: str | EnvSpec, physics: str = "stock", **kwargs) -> gym.Env:
    """A gymnasium environment, wrapped as its spec says, by id ("Hopper-v4") or by the spec that a data set carries.

    physics "stock" is the environment as installed. "d4rl" gives MuJoCo capsules the mass and inertia they had until
    MuJoCo 2.1.0, which recorded D4RL: those of a cylinder longer by one radius. Contacts are untouched.
    """
    spec = gym.registry.get(simulator) if isinstance(simulator, str) else simulator
    if physics == "d4rl" and not (spec and robot_of(spec) and spec.version == 4):
        name = spec.id if spec else simulator
        raise UserError(f"--physics d4rl restores Hopper, Walker2d and HalfCheetah -v4, not {name}; use stock")
    with quiet():
        try:
            env = gym.make(simulator, disable_env_checker=True, **kwargs)
        except Exception as error:  # an environment's own code may raise anything
            name = described(spec) if spec else simulator
            raise UserError(f"cannot make the environment {name} ({type(error).__name__}: {one_line(error)})")
        if physics == "d4rl":
            _restore_capsules(env.unwrapped)
    return env


@contextmanager
def quiet():
    """No notes that -v5 exists (-v4 is what matches D4RL), nor MuJoCo notes on HalfCheetah, nor a file of them."""
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        mujoco.set_mju_user_warning(handler)


def _restore_capsules(env) -> None:
    """Copy into env.model the body masses and inertias of a twin in which cylinders carry the capsules' mass."""
    spec = mujoco.MjSpec.from_file(env.fullpath)
    model = env.model
    for index, geom in enumerate(list(spec.geoms)):
        if geom.type != mujoco.mjtGeom.mjGEOM_CAPSULE:
            continue
        radius, half_length = model.geom_size[index, :2]
        geom.parent.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[radius, half_length + radius / 2, 0],
            pos=model.geom_pos[index],
            quat=model.geom_quat[index],
            contype=0,
            conaffinity=0,
        )
        geom.mass = 0
    twin = spec.compile()
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(twin, field)
    mujoco.mj_setConst(model, env.data)


# ---- What a spec says


def described(spec: EnvSpec) -> str:
    """Id, arguments and wrappers in one line."""
    arguments = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in spec.kwargs.items())
    return " in ".join([spec.id + (f"({arguments})" if arguments else ""), *(x.name for x in spec.additional_wrappers)])


def robot_of(spec: EnvSpec) -> str:
    """A robot of D4RL's for gymnasium's own -v4 and -v5, whatever its arguments and wrappers; else ""."""
    known = spec.id in SIMULATORS and spec.entry_point == gym.registry[spec.id].entry_point
    return spec.name.lower() if known else ""


def is_unchanged(spec: EnvSpec) -> bool:
    """Whether the environment is the registered one: its own arguments and step limit, no wrapper."""
    usual = gym.registry.get(spec.id)
    known = usual is not None and not spec.additional_wrappers
    return known and (spec.kwargs, spec.max_episode_steps) == (usual.kwargs, usual.max_episode_steps)


def fall_rule(env: gym.Env) -> tuple[np.ndarray, np.ndarray] | None:
    """low, high [obs_dim] float32: the robot has fallen unless low < obs < high, and there its episode ends.

    All infinite where it never falls. None for other robots than D4RL's, and behind a wrapper, which may show something
    else than the robot's own observation or end episodes of its own.
    """
    if not robot_of(env.spec) or env.spec.additional_wrappers:
        return None
    robot, low = env.unwrapped, np.full(env.observation_space.shape, -np.inf, np.float32)
    high = -low
    if getattr(robot, "_terminate_when_unhealthy", False):
        height = int(not robot._exclude_current_positions_from_observation)  # else x stands before it
        if hasattr(robot, "_healthy_state_range"):
            low[height + 1 :], high[height + 1 :] = robot._healthy_state_range
        for place, limits in ((height, robot._healthy_z_range), (height + 1, robot._healthy_angle_range)):
            low[place], high[place] = max(low[place], limits[0]), min(high[place], limits[1])
    return low, high


# ---- Actions: the scripts' are in [-1, 1]


def to_box(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions in [-1, 1] in the units of the environment's Box, clipped to it; the same numbers where it is [-1, 1]."""
    middle, half = _middle_half(low, high)
    return np.clip(middle + half * action, low, high)


def from_box(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The inverse of `to_box`, unclipped; 0 where the Box has no width."""
    middle, half = _middle_half(low, high)
    return (action - middle) / np.where(half > 0, half, 1)


def _middle_half(low, high) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    return ((low + high) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)


# ---- Episodes


class Evaluator:
    """Runs whole episodes of a policy, all of them side by side so that the policy sees one batch per step.

    `running` [n] are the numbers of the episodes in the current batch, for a policy with a memory.
    """

    def __init__(self, dataset, physics: str = "auto", episodes: int = 10):
        self.dataset = dataset
        self.physics = dataset.physics if physics == "auto" else physics
        self.envs = [make_env(dataset.spec, self.physics) for _ in range(episodes)]
        # Where the environment sets no limit, load_dataset has told that this one does.
        self.max_steps = self.envs[0].spec.max_episode_steps or int(dataset.lengths.max())

    def __call__(self, policy, seed: int) -> np.ndarray:
        """Undiscounted returns [episodes]. policy maps obs [n, obs_dim] float32 to actions [n, action_dim] in [-1, 1].

        Episode i starts from reset(seed + i). Actions are clipped to the action space, as D4RL's wrapper did; the
        MuJoCo environments of gymnasium do not clip by themselves.
        """
        spec, count = self.dataset.spec, len(self.envs)
        if spec.additional_wrappers:  # one may have a memory: every evaluation starts alike
            self.envs = [make_env(spec, self.physics) for _ in range(count)]
        returns, obs = np.zeros(count), [env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)]
        self.running = np.arange(count)
        for _ in range(self.max_steps):
            actions = policy(np.stack([obs[i] for i in self.running]).astype(np.float32))
            actions = to_box(actions, self.dataset.action_low, self.dataset.action_high)
            over = []
            for i, action in zip(self.running, actions, strict=True):
                obs[i], reward, terminated, truncated, _ = self.envs[i].step(action)
                returns[i] += reward
                over.append(terminated or truncated)
            self.running = self.running[~np.array(over)]
            if len(self.running) == 0:
                break
        return returns

    def score(self, mean_return: float) -> float | None:
        """D4RL's, 0 = random, 100 = expert; None if D4RL has no reference for the environment."""
        return normalized_score(self.dataset.robot, mean_return)


def evaluate(actor: torch.nn.Module, evaluator: Evaluator, run, step: int) -> float:
    """Mean return of whole episodes of the deterministic actor [TD3BC]; logs it, and the score where one is defined."""

    @torch.no_grad()
    def policy(obs: np.ndarray) -> np.ndarray:
        return actor(torch.as_tensor(obs, device=run.device)).cpu().numpy()

    with run.timed("evaluation"):
        returns = evaluator(policy, seed=run.args.seed + 100)  # [unspecified]; agents of near seeds share start states
    mean = float(returns.mean())
    told, score = {"eval/episodic_return": mean, "eval/episodic_return_std": returns.std()}, evaluator.score(mean)
    run.log(step, told if score is None else told | {"eval/normalized_score": score})
    return mean


# ---- Scores


def normalized_score(robot: str, mean_return: float) -> float | None:
    """D4RL's score, 0 = random, 100 = expert (DAWM's tables print it divided by 100); None if D4RL has no reference."""
    if robot not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[robot]
    return 100 * (mean_return - low) / (high - low)


def score_report(dataset, history: list[tuple[int, float]], evaluator: Evaluator) -> dict[str, str]:
    """Closing lines, from the (step, mean return) of each evaluation: the last one; the mean of those in the second
    half of the training, as the study counts; the data's own.
    """

    def line(mean: float) -> str:
        score = evaluator.score(mean)
        return f"return {mean:8.1f}   " + ("no D4RL reference" if score is None else f"normalized score {score:6.1f}")

    where = f"{len(evaluator.envs)} episodes in {described(dataset.spec)}, physics {evaluator.physics}"
    lines = {"evaluation": where, "final": line(history[-1][1])}
    if len(history) > 1:
        settled = [value for step, value in history if step > SETTLED * history[-1][0]]
        lines["second half"] = line(float(np.mean(settled)))
    return lines | {"data's own mean": line(dataset.mean_return)}
