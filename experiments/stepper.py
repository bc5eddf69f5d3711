"""What the simulator does from any state, for the commands that ask whether generated transitions are true."""

from common import UserError
from common.evaluation import described, make_env, quiet, robot_of, to_box

import mujoco
import numpy as np


class Stepper:
    """What the simulator does from any state: next obs, reward and fall of single transitions, each by itself.

    UserError if obs does not tell the simulator's state: known for Hopper, Walker2d and HalfCheetah, -v4 and -v5.
    """

    def __init__(self, dataset, physics: str = "auto"):
        self.dataset, self.robot = dataset, robot_of(dataset.spec)
        if not self.robot or dataset.spec.additional_wrappers:
            raise UserError(
                f"{described(dataset.spec)} has no state that can be set from an observation; "
                "known: Hopper, Walker2d and HalfCheetah, -v4 and -v5, without wrappers"
            )
        self.env = make_env(dataset.spec, dataset.physics if physics == "auto" else physics).unwrapped
        self.hidden = self.env.model.nq + self.env.model.nv - dataset.obs.shape[1]

    def checkable(self, obs: np.ndarray) -> np.ndarray:
        """Whether obs [N, obs_dim] tells the state: false where a velocity is at the clip -> bool [N]."""
        velocity = np.abs(obs[:, self.env.model.nq - self.hidden :]).max(1)
        return velocity < 10 if self.robot != "halfcheetah" else np.ones(len(obs), bool)

    def __call__(self, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """obs [N, obs_dim], action [N, action_dim] in [-1, 1] -> next_obs [N, obs_dim], reward [N], terminated [N].

        Float64 and bool; NaN where the simulator gives up on a state.
        """
        env, next_obs = self.env, np.empty(obs.shape)
        reward, terminated = np.empty(len(obs)), np.empty(len(obs), bool)
        action = to_box(action, self.dataset.action_low, self.dataset.action_high)
        with quiet():
            for i in range(len(obs)):
                mujoco.mj_resetData(env.model, env.data)
                state = np.concatenate([np.zeros(self.hidden), obs[i]])  # the place along the track is free
                env.set_state(state[: env.model.nq], state[env.model.nq :])
                next_obs[i], reward[i], terminated[i], _, _ = env.step(action[i])
                if env.data.warning.number[int(mujoco.mjtWarning.mjWARN_BADQPOS) :].any():  # it began anew elsewhere
                    next_obs[i], reward[i] = np.nan, np.nan
        return next_obs, reward, terminated
