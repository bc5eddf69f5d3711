"""The simulator and the score: D4RL's physics on today's MuJoCo, many episodes at a time."""

import warnings
from contextlib import contextmanager

import gymnasium as gym
import mujoco
import numpy as np

from common import UserError

# Returns that count as 0 and 100 [D4RL infos.py]; the same for every data set of a robot.
REFERENCE_RETURNS = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
}


def make_env(simulator: str, physics: str, **kwargs) -> gym.Env:
    """A gymnasium environment by id ("Hopper-v4").

    physics "stock" is the environment as installed. "d4rl" gives MuJoCo capsules the mass and inertia they had until
    MuJoCo 2.1.0, which recorded D4RL: those of a cylinder longer by one radius. Contacts are untouched.
    """
    if physics == "d4rl" and (simulator[-3:] != "-v4" or simulator[:-3].lower() not in REFERENCE_RETURNS):
        raise UserError(f"--physics d4rl restores Hopper, Walker2d and HalfCheetah -v4, not {simulator}; use stock")
    with _quiet():
        try:
            env = gym.make(simulator, disable_env_checker=True, **kwargs)
        except (gym.error.Error, ImportError, TypeError) as error:
            raise UserError(f"cannot make the simulator {simulator!r}: {error}; install it or use another --env-id")
        if physics == "d4rl":
            _restore_capsules(env.unwrapped)
    return env


@contextmanager
def _quiet():
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


class Evaluator:
    """Runs whole episodes of a policy, all of them side by side so that the policy sees one batch per step.

    `running` [n] are the numbers of the episodes in the current batch, for a policy with a memory.
    """

    def __init__(self, simulator: str, physics: str, episodes: int, kwargs: dict | None = None, obs_dim: int = 0):
        self.simulator, self.physics = simulator, physics
        self.envs = [make_env(simulator, physics, **(kwargs or {})) for _ in range(episodes)]
        self.max_steps = self.envs[0].spec.max_episode_steps
        shape = self.envs[0].observation_space.shape
        if self.max_steps is None or (obs_dim and shape != (obs_dim,)):
            raise UserError(
                f"{simulator} has observations {shape} and a limit of {self.max_steps} steps, the data have {obs_dim} "
                "dimensions; such data can be trained on, but not scored: use another --env-id"
            )

    def __call__(self, policy, seed: int) -> np.ndarray:
        """Undiscounted returns [episodes]. policy maps obs [n, obs_dim] float32 to actions [n, action_dim].

        Episode i starts from reset(seed + i). Actions are clipped to the action space, as D4RL's wrapper did; the
        MuJoCo environments of gymnasium do not clip by themselves.
        """
        low, high = self.envs[0].action_space.low, self.envs[0].action_space.high
        obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.envs)])
        returns, self.running = np.zeros(len(self.envs)), np.arange(len(self.envs))
        for _ in range(self.max_steps):
            actions = np.clip(policy(obs[self.running].astype(np.float32)), low, high)
            alive = []
            for i, action in zip(self.running, actions, strict=True):
                # unwrapped: the wrappers only check and count, and cost as much as the physics
                obs[i], reward, terminated, _, _ = self.envs[i].unwrapped.step(action)
                returns[i] += reward
                if not terminated:
                    alive.append(i)
            self.running = np.array(alive, dtype=int)
            if len(self.running) == 0:
                break
        return returns


def normalized_score(robot: str, mean_return: float) -> float | None:
    """D4RL's score, 0 = random, 100 = expert (DAWM's tables print it divided by 100); None if D4RL has no reference."""
    if robot not in REFERENCE_RETURNS:
        return None
    low, high = REFERENCE_RETURNS[robot]
    return 100 * (mean_return - low) / (high - low)


def score_report(robot: str, data_returns: np.ndarray, eval_returns: list[float], evaluator: Evaluator) -> dict:
    """Closing lines: the data's own mean, then the final, mean-of-last-10 and best evaluation, each so labelled."""

    def line(mean: float) -> str:
        score = normalized_score(robot, mean)
        return f"return {mean:8.1f}   " + (
            f"normalized score {score:6.1f}" if score is not None else "no D4RL reference"
        )

    count = min(10, len(eval_returns))
    last = {
        f"mean of last {count}": line(float(np.mean(eval_returns[-10:]))),
        "best (hindsight)": line(max(eval_returns)),
    }
    return {
        "data's own mean": line(float(data_returns.mean())),
        "final": line(eval_returns[-1]),
        **(last if count > 1 else {}),
        "evaluation": f"{len(evaluator.envs)} episodes in {evaluator.simulator}, physics {evaluator.physics}",
    }
