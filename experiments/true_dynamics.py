"""Is it the model's error that costs the score? TD3+BC on synthetic transitions whose outcome is the simulator's.

Every transition of a kept synthetic set keeps its state and its filled-in action; next state, reward and termination
are replaced by what MuJoCo does from there. `--source real` leaves the models out altogether: real states, eight times,
each with a cloned action plus noise of the behaviour's size. Hopper, laptop scale; about three minutes per run.

    python experiments/true_dynamics.py runs/stages/synthesis-0123456789abcdef          # and how falls were told
    python experiments/true_dynamics.py runs/stages/synthesis-0123456789abcdef --count   # only that
    python experiments/true_dynamics.py --source real
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from common.data import load_dataset
from common.evaluation import Evaluator, Stepper, score_report
from common.run import Run
from dawm_td3bc import LAPTOP, Args, has_fallen, mlp, real_transitions, train_agent


def simulate(obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hopper's next obs [N, 11] and reward [N] from obs and action, with D4RL's physics."""
    stepper, ends = Stepper("Hopper-v4", "d4rl", threads=1), []
    for part in np.array_split(np.arange(len(obs)), max(1, len(obs) // 20_000)):
        ends.append(stepper(obs[part], action[part])[:2])
    return tuple(map(np.concatenate, zip(*ends, strict=True)))


def cloned_pairs(dataset, copies: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Real states, each `copies` times, with a clone of the behaviour's mean action plus Gaussian noise."""
    obs, action = torch.as_tensor(dataset.obs), torch.as_tensor(dataset.action)
    mean, std, clone = obs.mean(0), obs.std(0), mlp(obs.shape[1], action.shape[1])
    optimizer = torch.optim.Adam(clone.parameters(), lr=1e-3)
    for _ in range(6_000):
        index = torch.randint(len(obs), (256,))
        loss = F.mse_loss(torch.tanh(clone((obs[index] - mean) / std)), action[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    obs = obs.repeat(copies, 1)
    with torch.no_grad():
        action = torch.tanh(clone((obs - mean) / std))
    return obs, (action + noise * torch.randn_like(action)).clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic", nargs="?", type=Path, help="folder of a kept synthetic set")
    parser.add_argument("--source", choices=("synthetic", "real"), default="synthetic")
    parser.add_argument("--count", action="store_true", help="only count the falls, train nothing")
    parser.add_argument("--bc-alpha", type=float, default=LAPTOP["bc_alpha"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.synthetic is None) != (options.source == "real") or (options.count and options.source == "real"):
        parser.error("give the folder of a kept synthetic set, or --source real, which has nothing to --count")
    name = f"true_dynamics_{options.synthetic.name if options.synthetic else 'real'}"
    args = Args(**{**asdict(Args()), **LAPTOP, "env_id": "local/hopper/medium-v0", "physics": "d4rl"})
    args.seed, args.exp_name, args.run_dir = options.seed, name, Path("runs/true_dynamics")
    args.bc_alpha = options.bc_alpha
    dataset = load_dataset(args.env_id)
    if options.source == "real":
        torch.manual_seed(0)
        obs, action = cloned_pairs(dataset, copies=8, noise=0.2)
    else:
        rows = load_file(options.synthetic / "tensors.safetensors")["transitions"]
        obs, action, told = rows[:, :11], rows[:, 11:14], rows[:, -1] > 0
        by_state = has_fallen("hopper", rows[:, 15:26])
    next_obs, reward = simulate(obs.numpy(), action.numpy())
    next_obs = torch.as_tensor(next_obs, dtype=torch.float32)
    fallen = has_fallen("hopper", next_obs)
    if options.source == "synthetic":
        print(
            f"{len(told):,} transitions: {fallen.sum():,} end in a fall in the simulator, {told.sum():,} are marked "
            f"as ends, {(fallen & told).sum():,} are both; the state alone tells {(fallen & by_state).sum():,} of them"
        )
        if options.count:
            return
    run = Run(args)
    run.describe(dataset.facts())
    columns = [obs, action, torch.as_tensor(reward, dtype=torch.float32)[:, None], next_obs]
    rows = torch.cat([*columns, fallen[:, None]], dim=1)
    assert rows.shape[1] == real_transitions(dataset, run.device).shape[1]
    evaluator = Evaluator("Hopper-v4", "d4rl", args.eval_episodes)
    returns = train_agent(args, dataset, rows, None, evaluator, run)
    run.finish(score_report(dataset.robot, dataset.returns, returns, evaluator))


if __name__ == "__main__":
    main()
