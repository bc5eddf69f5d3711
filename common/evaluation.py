"""The simulator and the score: D4RL's physics on today's MuJoCo, many episodes or many single steps at a time."""

import os
import warnings
from contextlib import contextmanager

import gymnasium as gym
import mujoco
import numpy as np
from mujoco import rollout

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


def _is_known(simulator: str) -> bool:
    """Whether `_outcome` has its reward and fall: Hopper, Walker2d and HalfCheetah, -v4 and -v5."""
    robot, _, version = simulator.rpartition("-v")
    return robot.lower() in REFERENCE_RETURNS and version in ("4", "5")


def _shows_state(env) -> bool:
    """Whether obs are all positions but the place along the track, and all velocities."""
    return env.observation_space.shape == (env.model.nq - 1 + env.model.nv,)


def _outcome(env, x_before, position, velocity, action) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What env.step tells of a step: obs [n, obs_dim], reward [n], terminated [n], to the bit.

    `x_before` [n]: place along the track before the step; `position` [n, nq] and `velocity` [n, nv] after it.
    """
    x_velocity = (position[:, 0] - x_before) / env.dt
    healthy, reward = np.ones(len(x_before), bool), env._forward_reward_weight * x_velocity
    if hasattr(env, "_healthy_z_range"):
        for value, (low, high) in ((1, env._healthy_z_range), (2, env._healthy_angle_range)):
            healthy &= (low < position[:, value]) & (position[:, value] < high)
        if hasattr(env, "_healthy_state_range"):
            low, high = env._healthy_state_range
            for part in (position[:, 2:], velocity):
                healthy &= ((low < part) & (part < high)).all(1)
        anyway = env.spec.id.endswith("-v4") and env._terminate_when_unhealthy
        reward = reward + env._healthy_reward * (healthy | anyway)
        velocity = velocity.clip(-10, 10)
    reward = reward - env._ctrl_cost_weight * np.square(action).sum(1)
    obs = np.concatenate([position[:, 1:], velocity], axis=1)
    return obs, reward, ~healthy & getattr(env, "_terminate_when_unhealthy", False)


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
        self.bare = [env.unwrapped for env in self.envs]  # the wrappers only check and count, at some cost
        self.known = _is_known(simulator) and _shows_state(self.bare[0])

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
            obs[self.running], rewards, terminated = self._step(actions)
            returns[self.running] += rewards
            self.running = self.running[~terminated]
            if len(self.running) == 0:
                break
        return returns

    def _step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The running episodes' next obs, rewards and whether they ended."""
        envs = [self.bare[i] for i in self.running]
        if not self.known:
            steps = [env.step(action)[:3] for env, action in zip(envs, actions, strict=True)]
            obs, reward, terminated = zip(*steps, strict=True)
            return np.array(obs), np.array(reward), np.array(terminated, dtype=bool)
        # The physics alone. The rest of env.step takes as long again: contact forces for `info`, which no obs or reward
        # of these robots reads and the next step does not need, and dictionaries.
        x_before = np.array([env.data.qpos[0] for env in envs])
        for env, action in zip(envs, actions, strict=True):
            env.data.ctrl = action
            mujoco.mj_step(env.model, env.data, env.frame_skip)
        position = np.array([env.data.qpos for env in envs])
        return _outcome(envs[0], x_before, position, np.array([env.data.qvel for env in envs]), actions)


class Stepper:
    """What the simulator does from any state: next obs, reward and fall of single transitions, independent of each
    other, many at a time. Equal to the bit to `env.set_state` and `env.step`.

    UserError if obs does not tell the simulator's state: known for Hopper, Walker2d and HalfCheetah, -v4 and -v5.
    """

    def __init__(self, simulator: str, physics: str, kwargs: dict | None = None, threads: int | None = None):
        if not _is_known(simulator):
            raise UserError(
                f"{simulator} has no state that can be set from an observation; known: Hopper, Walker2d, HalfCheetah"
            )
        self.env = make_env(simulator, physics, **(kwargs or {})).unwrapped
        self.obs_dim = self.env.model.nq - 1 + self.env.model.nv  # all but the place along the track
        if not _shows_state(self.env):
            raise UserError(
                f"{simulator} with {kwargs} observes {self.env.observation_space.shape}, not the {self.obs_dim} "
                "positions and velocities that a state is set from"
            )
        self.threads = threads or os.cpu_count() or 1
        self.data = [mujoco.MjData(self.env.model) for _ in range(self.threads)]
        self.clips = hasattr(self.env, "_healthy_z_range")  # as `_outcome`: velocities shown are clipped to [-10, 10]

    def checkable(self, obs: np.ndarray) -> np.ndarray:
        """Whether obs [N, obs_dim] tells the state: false where a velocity is at the clip -> bool [N]."""
        velocity = np.abs(obs[:, self.env.model.nq - 1 :]).max(1)
        return velocity < 10 if self.clips else np.ones(len(obs), bool)

    def __call__(self, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """obs [N, obs_dim], action [N, action_dim] -> next_obs [N, obs_dim], reward [N], terminated [N] bool, float64.

        NaN where the simulator gives up on a state.
        """
        env, model = self.env, self.env.model
        state = np.zeros((len(obs), mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
        state[:, 2 : 2 + self.obs_dim] = obs  # behind time and place
        action = np.asarray(action, np.float64)
        control = np.repeat(action[:, None], env.frame_skip, axis=1)
        with _quiet(), rollout.Rollout(nthread=self.threads) as steps:
            ends = steps.rollout(model, self.data, state, control)[0][:, -1]
        # MuJoCo starts anew, at time 0, from a state that it cannot go on from.
        ends = np.where(np.isclose(ends[:, :1], env.dt), ends, np.nan)
        position, velocity = ends[:, 1 : 1 + model.nq], ends[:, 1 + model.nq : 1 + model.nq + model.nv]
        return _outcome(env, np.zeros(len(obs)), position, velocity, action)


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
