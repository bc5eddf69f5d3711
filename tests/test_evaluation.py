"""common/evaluation.py: the environment that a set names, D4RL's masses, side by side, the fall rule, scores."""

import copy

from common import UserError
from common.data import OfflineDataset
from common.evaluation import (
    Evaluator,
    fall_rule,
    from_box,
    is_unchanged,
    make_env,
    normalized_score,
    plain,
    score_report,
    to_box,
)  # fmt: skip

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces, wrappers

# Body masses in kg: today's MuJoCo computes capsules exactly; until 2.1.0 a capsule of radius r and half-length h
# weighed as a cylinder of length 2 h + r, 1000 pi r^2 (2 h + r). HalfCheetah's are scaled to 14 in total.
HOPPER = {"stock": [3.665191, 4.057891, 2.781357, 5.315575], "d4rl": [3.534292, 3.926991, 2.714336, 5.089380]}
WITH_X = {"exclude_current_positions_from_observation": False}


class Bowl(gym.Env):
    """A ball pushed over a line; known by its entry point only, and with observations in a dictionary on demand."""

    action_space = spaces.Box(np.float32([-3, 0]), np.float32([1, 0.5]))

    def __init__(self, nested=False):
        place = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.nested, self.observation_space = nested, spaces.Dict(place=place) if nested else place

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.seen(), {}

    def step(self, action):
        self.place = self.place + np.float32(0.1) * action
        return self.seen(), -float(np.square(self.place).sum()), bool(self.place[0] < -4), False, {}

    def seen(self):
        return {"place": self.place} if self.nested else self.place


class Tired(gym.ActionWrapper, gym.utils.RecordConstructorArgs):
    """A user's own wrapper: actions lose strength."""

    def __init__(self, env, strength):
        gym.utils.RecordConstructorArgs.__init__(self, strength=strength)
        gym.ActionWrapper.__init__(self, env)

        self.strength = np.float32(strength)

    def action(self, action):
        return self.strength * action


gym.register("Bowl-v0", entry_point=f"{__name__}:Bowl", max_episode_steps=50)
gym.register("EndlessBowl-v0", entry_point=f"{__name__}:Bowl")
gym.register("theirs/Hopper-v4", entry_point="gymnasium.envs.mujoco.hopper_v4:HopperEnv", max_episode_steps=1000)


def dataset_of(env, physics="stock", **changes) -> OfflineDataset:
    """What the evaluator needs of a set recorded in env: its spec and its spaces."""
    obs, action = (np.zeros((7, *space.shape), np.float32) for space in (env.observation_space, env.action_space))
    facts = dict(
        env_id="x", source="x", path="x", sha256="x", note="", spec=plain(env.spec), physics=physics, obs=obs,
        action=action, reward=np.ones(7, np.float32), next_obs=obs, terminated=np.zeros(7, bool),
        lengths=np.array([4, 3]), complete=np.ones(2, bool),
        action_low=env.action_space.low, action_high=env.action_space.high,
    )  # fmt: skip
    return OfflineDataset(**facts | changes)


@pytest.mark.parametrize("physics", ["stock", "d4rl"])
def test_body_masses(physics):
    hopper = make_env("Hopper-v4", physics).unwrapped.model
    np.testing.assert_allclose(hopper.body_mass[1:], HOPPER[physics], atol=1e-6)
    walker2d = make_env("Walker2d-v4", physics).unwrapped.model
    assert walker2d.body_mass.sum() == pytest.approx({"stock": 23.677137, "d4rl": 22.698007}[physics], abs=1e-6)
    cheetah = make_env("HalfCheetah-v4", physics).unwrapped.model
    assert cheetah.body_mass[1] == pytest.approx({"stock": 6.250209, "d4rl": 6.360313}[physics], abs=1e-6)
    assert cheetah.body_mass.sum() == pytest.approx(14)


def test_old_capsules_by_formula():
    """Mass and inertia of each Hopper capsule under d4rl, from its radius and half-length."""
    model = make_env("Hopper-v4", "d4rl").unwrapped.model
    for geom in range(1, model.ngeom):
        radius, half = model.geom_size[geom, :2]
        length = 2 * half + radius
        mass = 1000 * np.pi * radius**2 * length
        body = model.geom_bodyid[geom]
        inertia = [mass * (3 * radius**2 + length**2) / 12] * 2 + [mass * radius**2 / 2]
        assert model.body_mass[body] == pytest.approx(mass)
        np.testing.assert_allclose(sorted(model.body_inertia[body]), sorted(inertia), rtol=1e-9)


ENVIRONMENTS = {  # name: how the data were recorded, and the physics
    "d4rl hopper": (lambda: gym.make("Hopper-v4"), "d4rl"),
    "d4rl walker2d": (lambda: gym.make("Walker2d-v4"), "d4rl"),
    "cheetah": (lambda: gym.make("HalfCheetah-v5", max_episode_steps=200), "stock"),
    "arguments": (lambda: gym.make("Hopper-v5", healthy_z_range=(0.2, 9.0), healthy_reward=2.5, **WITH_X), "stock"),
    "no fall": (lambda: gym.make("Hopper-v4", terminate_when_unhealthy=False, max_episode_steps=80), "stock"),
    "actions to 2": (lambda: gym.make("Pendulum-v1"), "stock"),
    "rescaled": (lambda: wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1), "stock"),
    "shorter": (lambda: wrappers.TimeLimit(gym.make("Hopper-v5"), 12), "stock"),
    "own wrapper": (lambda: Tired(gym.make("Bowl-v0"), 0.5), "stock"),
    "dictionary": (lambda: wrappers.FlattenObservation(gym.make("Bowl-v0", nested=True)), "stock"),
    "watched": (lambda: wrappers.RecordEpisodeStatistics(gym.make("Bowl-v0")), "stock"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_side_by_side_equals_one_environment_stepped(case):
    """Bit-identical returns to the environment that the spec makes, one episode after the other; actions mapped to its
    Box and clipped to it; the same again at the next evaluation."""
    make, physics = ENVIRONMENTS[case]
    env, episodes, seed = make(), 3, 11
    low, high = env.action_space.low, env.action_space.high

    def policy(obs):  # deterministic, leaves the bounds, and falls at different times
        assert obs.dtype == np.float32
        place = np.arange(low.size, dtype=np.float32)
        return np.float32(1.5) * np.sin(3 * obs[:, :3].sum(1, keepdims=True) + place)

    expected, recovered = [], make_env(env.spec, physics)
    for episode in range(episodes):
        obs, _ = recovered.reset(seed=seed + episode)
        total, over = 0.0, False
        while not over:
            action = policy(obs[None].astype(np.float32))[0]
            action = np.clip((low + high) / 2 + (high - low) / 2 * action, low, high)
            obs, reward, terminated, truncated, _ = recovered.step(action)
            total, over = total + reward, terminated or truncated
        expected.append(total)
    evaluator = Evaluator(dataset_of(env, physics), "auto", episodes)
    assert evaluator.physics == physics
    for _ in range(2):
        np.testing.assert_array_equal(evaluator(policy, seed), expected)


def test_no_limit():
    """The longest episode of the data ends an evaluation: four steps here."""
    evaluator = Evaluator(dataset_of(gym.make("EndlessBowl-v0")), "auto", 1)
    steps = []
    evaluator(lambda obs: steps.append(evaluator.running.tolist()) or np.zeros((len(obs), 2), np.float32), 0)
    assert steps == [[0]] * 4


@pytest.mark.parametrize("mode", ["human", "rgb_array"])
def test_nothing_opens_a_window_or_writes_a_film(mode, tmp_path):
    """As specs of sets recorded on a desktop have it; HumanRendering and RecordVideo alike."""
    spec = copy.deepcopy(gym.spec("Pendulum-v1"))
    spec.kwargs = {"render_mode": mode, "g": 9.0}
    film = wrappers.RecordVideo.wrapper_spec(video_folder=str(tmp_path / "film"))
    spec.additional_wrappers = (film, wrappers.HumanRendering.wrapper_spec())
    assert plain(spec).kwargs == {"g": 9.0} and plain(spec).additional_wrappers == ()
    assert spec.kwargs["render_mode"] == mode  # the original stays as it is
    assert not (tmp_path / "film").exists()


def test_boxes():
    """By hand; to the bit the same for [-1, 1]; a Box without width gives its one value and 0."""
    low, high = np.float32([-3, 0, 2]), np.float32([1, 0.5, 2])
    np.testing.assert_array_equal(to_box(np.float32([[-1, 1, 0.3], [0, 0, -1], [9, -9, 9]]), low, high),
                                  [[-3, 0.5, 2], [-1, 0.25, 2], [1, 0, 2]])  # fmt: skip
    np.testing.assert_array_equal(from_box(np.float32([[-3, 0.5, 2], [-1, 0.25, 2]]), low, high), [[-1, 1, 0], [0] * 3])
    action = np.random.default_rng(0).uniform(-1, 1, (1000, 3)).astype(np.float32)
    for mapped in (to_box(action, -np.ones(3), np.ones(3)), from_box(action, -np.ones(3), np.ones(3))):
        np.testing.assert_array_equal(mapped, action)
    assert to_box(action, low, high).dtype == np.float32


RULES = [  # environment, arguments, what of next_obs it looks at
    ("Hopper-v4", {}, range(11)), ("Hopper-v5", WITH_X, range(1, 12)), ("Walker2d-v4", {}, [0, 1]),
    ("Hopper-v5", {"healthy_z_range": (0.9, 1.3), "healthy_angle_range": [-0.1, 0.5]}, range(11)),
    ("Hopper-v5", {"healthy_state_range": (-2, 2)}, range(11)), ("Walker2d-v5", WITH_X, [1, 2]),
    ("Hopper-v5", {"terminate_when_unhealthy": False}, []), ("HalfCheetah-v5", {}, []),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, arguments, looks", RULES)
def test_the_fall_rule_is_the_simulators(name, arguments, looks):
    """On random play it says of each next state, rounded to float32, what the simulator said."""
    env = gym.make(name, max_episode_steps=40, **arguments)
    low, high = fall_rule(env)
    assert np.flatnonzero(np.isfinite(low) | np.isfinite(high)).tolist() == list(looks)
    env.action_space.seed(0)
    falls = 0
    for episode in range(4):
        env.reset(seed=episode)
        over = False
        while not over:
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            obs = obs.astype(np.float32)
            assert (not ((low < obs) & (obs < high)).all()) == terminated
            falls, over = falls + terminated, terminated or truncated
    assert (falls > 0) == bool(looks)


@pytest.mark.filterwarnings("ignore")
def test_no_rule_is_known_behind_a_wrapper_or_of_other_peoples_robots():
    hopper = gym.make("Hopper-v5")
    for env in (wrappers.NormalizeObservation(hopper), Tired(hopper, 0.5), gym.make("Bowl-v0"), gym.make("Ant-v5")):
        assert fall_rule(env) is None


@pytest.mark.filterwarnings("ignore")
def test_scores_are_for_the_unchanged_environment():
    """D4RL's reference returns say nothing of other arguments, step limits or wrappers."""
    for same in (
        gym.make("Hopper-v4"),
        gym.make("Hopper-v5", render_mode="rgb_array"),
        wrappers.RecordEpisodeStatistics(gym.make("Walker2d-v5")),
    ):
        assert is_unchanged(plain(same.spec)) and dataset_of(same).robot in ("hopper", "walker2d")
    for other in (
        gym.make("Hopper-v5", healthy_z_range=(0.2, float("inf"))),
        gym.make("Hopper-v5", ctrl_cost_weight=1.0),
        gym.make("Hopper-v5", max_episode_steps=500),
        wrappers.RescaleAction(gym.make("Hopper-v5"), -2, 2),
        wrappers.NormalizeReward(gym.make("Hopper-v5")),
        gym.make("Bowl-v0"),
        gym.make("theirs/Hopper-v4"),
    ):
        assert dataset_of(other).robot == "" and Evaluator(dataset_of(other), "auto", 1).score(3000) is None


@pytest.mark.parametrize(
    "robot, mean_return, score",
    [("hopper", 3000, 92.8009), ("walker2d", 4000, 87.0977), ("halfcheetah", 6000, 50.5847)],
)
def test_normalized_score(robot, mean_return, score):
    """D4RL's formula and reference returns, on the 0-100 scale."""
    assert normalized_score(robot, mean_return) == pytest.approx(score, abs=1e-4)


def test_closing_lines():
    """The data's own mean is (4 + 3) / 2; the mean behind half of the steps where there is more than one."""
    data = dataset_of(gym.make("Pendulum-v1", g=5))
    data.spec.max_episode_steps = 4
    evaluator = Evaluator(data, "auto", 2)
    report = score_report(data, [(5, 1.0), (6, 3.0), (10, 9.0)], evaluator)
    assert list(report) == ["evaluation", "final", "second half", "data's own mean"]
    assert "3.5" in report["data's own mean"] and "9.0" in report["final"] and "no D4RL reference" in report["final"]
    assert report["evaluation"] == "2 episodes in Pendulum-v1(g=5), physics stock"
    assert "return      6.0" in report["second half"]
    assert "second half" not in score_report(data, [(5, 1.0)], evaluator)


def test_d4rl_physics_are_those_of_the_robots_that_d4rl_used():
    with pytest.raises(UserError, match="--physics d4rl restores Hopper, Walker2d and HalfCheetah -v4, not Hopper-v5"):
        make_env("Hopper-v5", "d4rl")
