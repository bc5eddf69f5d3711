"""Makes a local data set: rolls out the shipped behaviour policies in D4RL's physics and stores a Minari data set.

    python local_datasets/collect.py --env-id local/hopper/medium-v0

Recipe, after D4RL [D4RL Sec. 5, App. C]: actions are sampled from the policies' squashed Gaussians. random is the
untrained SAC policy, medium and expert are two points of its training, medium-expert is half of each, and
medium-replay stands for the replay buffer up to the medium policy: [deviation] equal shares of steps from snapshots in
training order, since the buffer itself is too large to ship. card.py describes what comes out.

Each policy's last episode is cut where its share of the steps ends, and marked truncated, as at a time limit.

The same command makes the same arrays on every x86 CPU with AVX2 and FMA (from 2013 on): start states and noise follow
from --seed alone, actions are rounded (as_policy), and MuJoCo runs the same instructions on all. SHA256SUMS beside
behavior/ lists the sets of default size; one that comes out otherwise is told, and README.md says where that may be.

[D4RL] Datasets for Deep Data-Driven RL, arXiv 2004.07219
"""

import fnmatch
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import UserError
from common.cli import run_script
from common.data import LOCAL_RECIPE, ROBOTS, minari_root
from common.evaluation import REFERENCE_RETURNS, make_env, quiet
from common.export import minari_writes_to
from common.files import sha256_of, sync, take_lock, write_text, write_whole

BEHAVIOR_DIR = Path(__file__).resolve().parent / "behavior"
POLICY_FORMAT = 1  # of the shipped files: others are refused
ACTION_STEP = 2.0**-16  # actions are multiples of it
# Policies of each quality; each gets an equal share of the steps. replay-* is every replay-0, replay-1, ... shipped.
POLICIES = {
    "random": ["random"],
    "medium": ["medium"],
    "medium-replay": ["replay-*"],
    "medium-expert": ["medium", "expert"],
    "expert": ["expert"],
}
ENV_IDS = {f"local/{robot}/{quality}-v0": (robot, quality) for robot in ROBOTS for quality in POLICIES}


@dataclass
class Args:
    env_id: str = "local/hopper/medium-v0"
    """local/ROBOT/QUALITY-v0; ROBOT is hopper, walker2d or halfcheetah, QUALITY random, medium, expert, medium-replay
    or medium-expert"""
    steps: int = 200_000
    """transitions in the data set"""
    seed: int = 0
    """seeds start states and action noise"""
    behavior_dir: Path = BEHAVIOR_DIR
    """where the policies and their SHA256SUMS are; that of the published sets is one folder up"""


class NotShipped(UserError):
    """A data set whose policies are not there."""


# ---- Policies


@dataclass
class Policy:
    """Weights by layer, float16; facts are robot, training step, measured return and, of a shipped one, its sha256."""

    weights: dict[str, np.ndarray]
    facts: dict


def load_policies(robot: str, quality: str, behavior_dir: Path) -> list[Policy]:
    """The policies of a data set in training order; NotShipped if there is none, UserError if one was changed."""
    sums = read_sums(behavior_dir)
    names = []
    for wanted in POLICIES[quality]:
        found = fnmatch.filter(sums, f"{robot}-{wanted}.safetensors")
        if not found:
            shipped = ", ".join(name.removesuffix(".safetensors") for name in sums) or "none"
            raise NotShipped(
                f"local/{robot}/{quality}-v0 needs the policy {robot}-{wanted}, which is not in {behavior_dir} "
                f"(there: {shipped}); choose another quality, or make it with train_behavior.py --robot {robot}"
            )
        names += sorted(found, key=lambda name: (len(name), name))  # replay-10 after replay-9
    return [_load_policy(behavior_dir / name, sums[name]) for name in names]


def _load_policy(path: Path, sha256: str) -> Policy:
    found = sha256_of(path) if path.exists() else "missing"
    if found != sha256:
        raise UserError(
            f"{path}: sha256 is {found}, but SHA256SUMS beside it lists {sha256}; restore both files, "
            "or export the policies again with train_behavior.py"
        )
    policy = read_policy(path)
    return Policy(policy.weights, {"file": path.name, "sha256": sha256, **policy.facts})


def read_policy(path: Path) -> Policy:
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get("policy", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}); export it again with train_behavior.py")
    if facts.get("format") != POLICY_FORMAT:
        raise UserError(f"{path} has format {facts.get('format')}, this script reads {POLICY_FORMAT}; export it again")
    return Policy(weights, facts)


def write_policy(path: Path, policy: Policy) -> None:
    """All facts stand under one metadata key, since safetensors keeps no order of keys."""
    content = save(policy.weights, {"policy": json.dumps(policy.facts)})
    write_whole(path, lambda file: file.write(content))


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 of every shipped policy, or published data set, by name; empty if there is none."""
    path = folder / "SHA256SUMS"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return {name: sha256 for sha256, name in (line.split() for line in lines)}
    except ValueError:
        raise UserError(f"{path} is damaged: each line needs a sha256 and a file name; restore it")


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    write_text(folder / "SHA256SUMS", "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def as_policy(weights: dict[str, np.ndarray], noise_seed: int, deterministic: bool = False):
    """SAC's squashed Gaussian: obs [..., obs_dim] -> action [..., action_dim] float32, the same on every x86 CPU.

    CPUs differ in the last digits of products, exp and tanh, in float64 by 1e-16 on average: rounded to ACTION_STEP,
    about one number in 1e11 still differs. Normal noise comes from integers and a table.
    """
    layers = [f"{layer}.{kind}" for layer in ("trunk.0", "trunk.2", "head") for kind in ("weight", "bias")]
    w1, b1, w2, b2, w3, b3 = (weights[name].T.astype(np.float64) for name in layers)
    noise = np.random.default_rng((1, noise_seed))  # not the numbers of a simulator with this seed

    def policy(obs: np.ndarray) -> np.ndarray:
        x = np.maximum(obs.astype(np.float64) @ w1 + b1, 0)
        head = np.maximum(x @ w2 + b2, 0) @ w3 + b3
        mean, log_std = head[..., : len(b3) // 2], head[..., len(b3) // 2 :]
        if not deterministic:
            mean = mean + np.exp(log_std.clip(-20, 2)) * noise.standard_normal(mean.shape)
        return (np.rint(np.tanh(mean) / ACTION_STEP) * ACTION_STEP).astype(np.float32)

    return policy


# ---- Episodes


def roll_out(policies: list[Policy], env: gym.Env, steps: int, seed: int, progress: tqdm) -> list[EpisodeBuffer]:
    """Exactly `steps` steps: each policy's share, one policy after another."""
    buffers = []
    for index, policy in enumerate(policies):
        left = (index + 1) * steps // len(policies) - index * steps // len(policies)
        episode_seed = (100 * (seed + 1) + index) * 1_000_000  # no two episodes of a data set share one
        act = as_policy(policy.weights, noise_seed=episode_seed)
        while left > 0:
            buffers.append(run_episode(act, env, episode_seed, min(left, env.spec.max_episode_steps)))
            episode_seed += 1
            left -= len(buffers[-1])
            progress.update(len(buffers[-1]))
    return buffers


def run_episode(act, env: gym.Env, seed: int, limit: int) -> EpisodeBuffer:
    """One row per step, float32; obs has one row more. An end that is no fall is the limit's: truncated."""
    obs, action, reward, terminated = [env.reset(seed=seed)[0].astype(np.float32)], [], [], False
    while not terminated and len(reward) < limit:
        action.append(act(obs[-1]))
        # unwrapped: the wrappers only check and count, and cost as much as the physics.
        next_obs, step_reward, terminated, _, _ = env.unwrapped.step(action[-1])
        obs.append(next_obs.astype(np.float32))
        reward.append(step_reward)
    ends = np.arange(1, len(reward) + 1) == len(reward)
    return EpisodeBuffer(
        observations=np.stack(obs),
        actions=np.stack(action),
        rewards=np.array(reward, np.float32),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


def digest(buffers: list[EpisodeBuffer]) -> str:
    """sha256 of all arrays, episode after episode."""
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return hashlib.sha256(b"".join(getattr(buffer, name).tobytes() for buffer in buffers for name in names)).hexdigest()


def stored(folder: Path) -> dict:
    """The metadata of a set."""
    return json.loads((folder / "data" / "metadata.json").read_text())


def differences(folder: Path, recipe: dict) -> str:
    """How the data set in folder differs from the recipe, in words; empty if it does not."""
    try:
        found = stored(folder)
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    different = [key for key in recipe if found.get(key) != recipe[key]]
    return " and ".join(
        "was made by other policies" if key == "policies" else f"has {key}={found.get(key)}, not {recipe[key]}"
        for key in different
    )


def compare(env_id: str, sha256: str, published: Path) -> None:
    """Tell if a set of the default size is not the published one."""
    expected = read_sums(published).get(env_id, sha256)
    if sha256 != expected:
        print(
            f"note: {env_id} is not the published set (sha256 {sha256[:12]}, {published / 'SHA256SUMS'} has "
            f"{expected[:12]}): other policies, or this CPU, C library or MuJoCo rounds otherwise"
        )


def make(args: Args, recipe: dict, policies: list[Policy], folder: Path, work: Path) -> None:
    """Roll out, write under the Minari root `work`, and put the finished folder in place with a rename."""
    robot, quality = ENV_IDS[args.env_id]
    env = make_env(ROBOTS[robot], "d4rl")
    with tqdm(total=args.steps, desc=args.env_id, unit="step", disable=None) as progress:
        buffers = roll_out(policies, env, args.steps, args.seed, progress)
    with minari_writes_to(work), quiet():  # Minari makes the environment anew
        minari.create_dataset_from_buffers(
            args.env_id,
            buffers,
            env=env,
            eval_env=env,
            observation_space=gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32),
            algorithm_name="SAC",
            ref_min_score=REFERENCE_RETURNS[robot][0],
            ref_max_score=REFERENCE_RETURNS[robot][1],
            description=f"{robot} {quality}: SAC policies in {ROBOTS[robot]} with D4RL's capsule masses, made by "
            "local_datasets/collect.py after D4RL's recipe. Not D4RL data.",
            data_format="hdf5",
        ).storage.update_metadata(recipe | {"sha256": digest(buffers)})
    for path in (work / args.env_id / "data").iterdir():
        sync(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work / args.env_id, folder)
    returns = np.array([buffer.rewards.sum(dtype=np.float64) for buffer in buffers])
    print(
        f"{args.env_id}: {len(buffers):,} episodes, {args.steps:,} steps, "
        f"return {returns.mean():.1f} ± {returns.std():.1f}, in {folder}"
    )


def main(args: Args) -> None:
    if args.env_id not in ENV_IDS:
        raise UserError(f"--env-id {args.env_id!r} is not a local data set; choose one of {', '.join(ENV_IDS)}")
    policies = load_policies(*ENV_IDS[args.env_id], args.behavior_dir)
    if args.steps < len(policies):
        raise UserError(f"--steps {args.steps} is less than one per policy; give {len(policies)} or more")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is negative; give 0 or more")
    facts = [policy.facts for policy in policies]
    # Stored with the data, and compared with what is asked for the next time.
    recipe = {"physics": "d4rl", "steps": args.steps, "seed": args.seed, "recipe": LOCAL_RECIPE, "policies": facts}
    try:
        folder = minari_root() / args.env_id
        work = minari_root() / ".collect" / args.env_id.replace("/", "-")  # Minari does not list hidden folders
        work.parent.mkdir(parents=True, exist_ok=True)
        with take_lock(work):
            if folder.exists():
                if different := differences(folder, recipe):
                    raise UserError(f"{folder} {different}; delete it to have this one")
                print(f"{args.env_id} is already in {folder}")
            else:
                shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed, since the lock is ours
                try:
                    make(args, recipe, policies, folder, work)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
            if (args.steps, args.seed) == (Args.steps, Args.seed):
                compare(args.env_id, stored(folder)["sha256"], args.behavior_dir.parent)
    except OSError as error:
        raise UserError(f"cannot write {args.env_id} ({error}); set MINARI_DATASETS_PATH to a folder with space")


if __name__ == "__main__":
    run_script(main, Args)
