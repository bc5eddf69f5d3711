"""Other implementations' own code, for speed.py, each unchanged.

d3rlpy, JAX and the einops that two of the others import come from the environment of `make peers`. Repositories are
looked for under PEERS_DIR, by their names (git clone, any recent commit):

    jannerm/diffuser, anuragajay/decision-diffuser, corl-team/CORL, sfujim/TD3_BC, gwthomas/IQL-PyTorch,
    nissymori/JAX-CORL

What they import and no hot loop needs (d4rl, gym, wandb, pyrallis, a logger) is replaced by empty modules. Their
published hyperparameters; the networks of decision-diffuser and diffuser get the width, levels and batch of the loop.
decision-diffuser conditions on the return and trains its small inverse dynamics in the same update, diffuser conditions
on nothing and generates actions among its channels. One gradient per update, no accumulation. JAX-CORL compiles eight
updates into one call; TD3+BC's critics and IQL's value have layer norm there.
"""

import argparse
import importlib
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from speed import FOREVER, metered


class Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None, "__class_getitem__": lambda cls, x: cls})


def repository(name: str) -> Path:
    folder = Path(os.environ.get("PEERS_DIR", "peers")) / name
    if not folder.exists():
        sys.exit(f"{folder} is not there: clone {name} into PEERS_DIR")
    return folder


def without(*names: str) -> None:
    for name in names:
        sys.modules[name] = Anything(name)
        sys.modules[name].__path__ = []


def transitions(count: int = 200_000) -> dict[str, np.ndarray]:
    """Random rows of Hopper's shape: time does not depend on what they hold."""
    rng = np.random.default_rng(0)
    obs = rng.standard_normal((count, 11)).astype(np.float32)
    return {
        "observations": obs, "next_observations": np.roll(obs, -1, 0), "rewards": obs[:, 0].copy(),
        "actions": rng.uniform(-1, 1, (count, 3)).astype(np.float32), "terminals": np.zeros(count, np.float32),
    }  # fmt: skip


def diffusers(loop: str, name: str, device: str) -> None:
    source = repository(name) / ("code/diffuser" if name == "decision-diffuser" else "diffuser")
    for package in ("diffuser", "diffuser.models"):  # without running their __init__, which imports simulators
        module = types.ModuleType(package)
        module.__path__ = [str(source / package.removeprefix("diffuser").replace(".", "/").lstrip("/"))]
        sys.modules[package] = module
    without("diffuser.utils")

    class Silent:
        def __init__(self, *args, **kwargs):
            pass

        def update(self, *args, **kwargs):
            pass

        close = stamp = update

    sys.modules["diffuser.utils"].Progress = sys.modules["diffuser.utils"].Silent = Silent
    sys.modules["diffuser"].utils = sys.modules["diffuser.utils"]
    temporal = importlib.import_module("diffuser.models.temporal")
    diffusion = importlib.import_module("diffuser.models.diffusion")
    width, levels, tokens = 128 if "128" in loop else 32, (1, 4, 8), 8
    if name == "decision-diffuser":
        unet = temporal.TemporalUnet(
            tokens, 11, 0, dim=width, dim_mults=levels, returns_condition=True, condition_dropout=0.25
        )
        steps = 5 if loop[0] == "A" else 3
        model = diffusion.GaussianInvDynDiffusion(
            unet, tokens, 11, 3, n_timesteps=steps, loss_type="l2", clip_denoised=True, returns_condition=True,
            condition_guidance_w=1.2,
        )  # fmt: skip
    else:
        unet = temporal.TemporalUnet(tokens, 14, 0, dim=width, dim_mults=levels)
        model = diffusion.GaussianDiffusion(
            unet, tokens, 11, 3, n_timesteps=5, loss_type="l2", clip_denoised=True, predict_epsilon=True
        )
    model.to(device)
    if loop[0] == "B":
        obs, returns = torch.randn(256, 11, device=device), torch.rand(256, 1, device=device)
        for _ in metered(range(FOREVER), lambda _: 256 * (tokens - 1)):
            x = model.conditional_sample({0: obs}, returns, verbose=False)
            with torch.no_grad():
                model.inv_model(torch.cat([x[:, :-1], x[:, 1:]], dim=-1).reshape(-1, 22))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    data = transitions(50_000)
    joined = np.concatenate([data["actions"], data["observations"]], axis=1)

    class Sequences(torch.utils.data.Dataset):
        """Windows as both repositories' data loaders give them."""

        def __len__(self):
            return len(joined) - tokens

        def __getitem__(self, i):
            x = joined[i : i + tokens]
            return (x, {0: x[0, 3:]}, x[0, :1]) if name == "decision-diffuser" else (x, {0: x[0, 3:]})

    def endless():
        while True:
            yield from torch.utils.data.DataLoader(Sequences(), batch_size=64, num_workers=0, shuffle=True)

    source, average, updates = endless(), [p.detach().clone() for p in model.parameters()], 0
    for _ in metered(range(FOREVER)):
        x, cond, *returns = next(source)
        cond = {k: v.to(device) for k, v in cond.items()}
        loss, _ = model.loss(x.to(device), cond, *(r.to(device) for r in returns))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        if updates % 10 == 0:  # their EMA
            average = [0.995 * a + 0.005 * p.detach() for a, p in zip(average, model.parameters(), strict=True)]


def corl(loop: str, device: str) -> None:
    without("d4rl", "gym", "pyrallis", "wandb")
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    sys.path.insert(0, str(repository("CORL") / "algorithms/offline"))
    module = importlib.import_module("iql" if loop == "D" else "td3_bc")

    def adam(net):
        return torch.optim.Adam(net.parameters(), lr=3e-4)

    if loop == "E":
        evaluation(module)
    buffer = module.ReplayBuffer(11, 3, 200_000, device)
    buffer.load_d4rl_dataset(transitions())
    if loop == "D":
        actor, q, v = module.GaussianPolicy(11, 3, 1.0), module.TwinQ(11, 3), module.ValueFunction(11)
        for net in (actor, q, v):
            net.to(device)
        agent = module.ImplicitQLearning(1.0, actor, adam(actor), q, adam(q), v, adam(v), device=device)
    else:
        actor, critics = module.Actor(11, 3, 1.0).to(device), [module.Critic(11, 3).to(device) for _ in range(2)]
        pairs = [x for critic in critics for x in (critic, adam(critic))]
        agent = module.TD3_BC(1.0, actor, adam(actor), *pairs, device=device)
    for _ in metered(range(FOREVER)):
        agent.train([tensor.to(device) for tensor in buffer.sample(256)])


def evaluation(module) -> None:
    """CORL's eval_actor on the shipped medium policy, through the interface that gym had."""
    from common.evaluation import make_env

    from speed import shipped_policy

    act = shipped_policy()

    class Actor(module.Actor):
        def forward(self, state):
            return torch.from_numpy(act(state.numpy()))

    class OldGym:
        def __init__(self):
            self.env, self.steps = make_env("Hopper-v4", "d4rl"), 0

        def seed(self, seed):
            self.next_seed = seed

        def reset(self):
            self.next_seed += 1
            return self.env.reset(seed=self.next_seed - 1)[0]

        def step(self, action):
            self.steps += 1
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated or truncated, info

    env, actor, before = OldGym(), Actor(11, 3, 1.0), [0]
    for _ in metered([0], lambda _: env.steps - before[0], warm=1):
        before[0] = env.steps
        module.eval_actor(env, actor, "cpu", 10, 100)


def td3_bc() -> None:
    sys.path.insert(0, str(repository("TD3_BC")))
    module, utils = importlib.import_module("TD3_BC"), importlib.import_module("utils")
    buffer = utils.ReplayBuffer(11, 3, max_size=1)
    buffer.convert_D4RL(transitions())
    agent = module.TD3_BC(11, 3, 1.0)
    for _ in metered(range(FOREVER)):
        agent.train(buffer, 256)


def iql_pytorch() -> None:
    without("d4rl", "gym")
    sys.path.insert(0, str(repository("IQL-PyTorch")))
    iql, policy, values, util = (
        importlib.import_module(f"src.{name}") for name in ("iql", "policy", "value_functions", "util")
    )
    agent = iql.ImplicitQLearning(
        qf=values.TwinQ(11, 3, hidden_dim=256, n_hidden=2), vf=values.ValueFunction(11, hidden_dim=256, n_hidden=2),
        policy=policy.GaussianPolicy(11, 3, hidden_dim=256, n_hidden=2),
        optimizer_factory=lambda parameters: torch.optim.Adam(parameters, lr=3e-4),
        max_steps=10**6, tau=0.7, beta=3.0, alpha=0.005, discount=0.99,
    )  # fmt: skip
    data = {name: util.torchify(array) for name, array in transitions().items()}
    for _ in metered(range(FOREVER)):
        agent.update(**util.sample_batch(data, 256))


def jax_corl(loop: str, threads: int, device: str) -> None:
    # XLA takes as many threads as the process may use cores, whatever OMP_NUM_THREADS says.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = device
    import jax
    import jax.numpy as jnp

    without("d4rl", "gym", "wandb", "omegaconf")
    sys.modules["omegaconf"].OmegaConf = types.SimpleNamespace(from_cli=dict)
    sys.argv = sys.argv[:1]
    sys.path.insert(0, str(repository("JAX-CORL") / "algos"))
    module = importlib.import_module("iql" if loop == "D" else "td3bc")
    columns = {name: jnp.asarray(column) for name, column in transitions().items()}
    columns["dones"] = columns.pop("terminals")
    if "dones_float" in module.Transition._fields:
        columns["dones_float"] = columns["dones"]
    data = module.Transition(**columns)
    create = module.create_iql_train_state if loop == "D" else module.create_td3bc_train_state
    state = create(jax.random.PRNGKey(0), data.observations[0], data.actions[0], module.config)
    agent = module.IQL() if loop == "D" else module.TD3BC()
    update, rng = jax.jit(agent.update_n_times, static_argnums=(3,)), jax.random.PRNGKey(1)
    for _ in metered(range(FOREVER), lambda _: module.config.n_jitted_updates):
        rng, key = jax.random.split(rng)
        state, _ = jax.block_until_ready(update(state, data, key, module.config))


def d3rlpy_agent(loop: str) -> None:
    import d3rlpy
    from peers import build

    data = transitions()
    ends = np.arange(1, len(data["rewards"]) + 1) % 1000 == 0
    dataset = d3rlpy.dataset.MDPDataset(
        data["observations"], data["actions"], data["rewards"], data["terminals"], timeouts=ends.astype(np.float32)
    )
    agent = build("td3bc" if loop == "C" else "iql", data["observations"], np.array([0.0, 1000.0]), 10**6)
    agent.build_with_dataset(dataset)
    for _ in metered(range(FOREVER)):
        agent.update(dataset.sample_transition_batch(256))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    loop, name = options.worker
    sys.stdout = sys.stderr
    if name in ("decision-diffuser", "diffuser"):
        diffusers(loop, name, options.device)
    elif name == "CORL":
        corl(loop, options.device)
    elif name == "TD3_BC":
        td3_bc()
    elif name == "IQL-PyTorch":
        iql_pytorch()
    elif name == "JAX-CORL":
        jax_corl(loop, options.threads, options.device)
    elif name == "d3rlpy":
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
        d3rlpy_agent(loop)


if __name__ == "__main__":
    main()
