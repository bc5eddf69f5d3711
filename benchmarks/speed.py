"""How fast the hot loops are, beside other implementations and beside the hardware's limit.

    python benchmarks/speed.py                                    # loops A to E, one thread, every contender there is
    python benchmarks/speed.py --threads 2 --out docs/speed_2_threads
    python benchmarks/speed.py --device cuda --out docs/speed_cuda
    python benchmarks/speed.py --whole                            # F: one whole laptop run and its stages' shares
    make peers && PEERS_DIR=~/peers python benchmarks/speed.py    # with d3rlpy and clones of other repositories

Every contender of a loop is a process of its own. All are started and warmed up, then take turns, a few seconds each,
for several rounds; told are medians over the rounds and their quartiles. Ours are the scripts' own functions, run as a
run runs them: only the progress bar is replaced by a clock. "plain" is the same mathematics in the usual form
(plain.py). d3rlpy comes from `make peers`; other repositories are used where PEERS_DIR holds a clone (peers_code.py),
and left out with a word where not.

    A    world model: one update, width 32 x (1, 4, 8), 8 tokens (the length that the others can take), batch 64
    A9   the same with the scripts' own 9 tokens, for which the others take 12, since their lengths must divide
    A128 as A with width 128, the paper's
    B    synthesis: transitions, N = 3 of K = 5, two guidance branches, actions filled in (width 256), network of A
    B128 the same with the network of A128
    I    inverse dynamics: one update, width 1024, batch 1024
    C, D TD3+BC and IQL: one critic update, batch 256, with the actor's share
    E    evaluation: environment steps of ten Hopper episodes of the shipped medium policy

FLOOR. What the hardware needs for the products and for the memory that cannot stay in cache, at the rates that this
machine reaches in the same rounds (a product of 512 x 512 matrices, on a GPU 8192 x 8192; a copy of 256 MiB):

* Linear layer or one tap of a convolution, forward: 2 in out B floating-point operations, for each token that the tap
  meets: of 8 tokens 34 of 40 pairs (token, tap), of 4 14 of 20, of 2 4 of 10. Backward costs twice that.
* Adam: 28 bytes for each parameter (reads parameter, gradient and two moments, writes three); target and averaged
  weights 12 bytes.
* A: one forward and one backward pass, Adam, a tenth of an averaging. B: 2 N forward passes for 7 transitions, and the
  inverse dynamics' mean for 6. I: forward and backward of two networks, Adam.
* C: forward of three target networks and two critics, backward of the critics, and half of (actor and critic forward,
  actor backward, critic backward to its input); Adam and targets. D: forward of two targets and, twice, of the value,
  forward and backward of two critics, value and actor; Adam and targets.
* E: the simulator alone, mj_step with the same number of substeps.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

LOOPS = {
    "A": "world model, width 32, 8 tokens: updates/s",
    "A9": "world model, width 32, 9 tokens: updates/s",
    "A128": "world model, width 128, 8 tokens: updates/s",
    "B": "synthesis, width 32, 8 tokens: transitions/s",
    "B128": "synthesis, width 128, 8 tokens: transitions/s",
    "I": "inverse dynamics: updates/s",
    "C": "TD3+BC: updates/s",
    "D": "IQL: updates/s",
    "E": "evaluation: environment steps/s",
}
PEERS = {  # what peers_code.py knows to run, by loop
    "A": ("decision-diffuser", "diffuser"),
    "A9": ("decision-diffuser", "diffuser"),
    "A128": ("decision-diffuser", "diffuser"),
    "B": ("decision-diffuser",),
    "B128": ("decision-diffuser",),
    "C": ("d3rlpy", "CORL", "TD3_BC", "JAX-CORL"),
    "D": ("d3rlpy", "CORL", "IQL-PyTorch", "JAX-CORL"),
    "E": ("CORL",),
}
OTHER_PACKAGES = ("d3rlpy", "decision-diffuser", "diffuser", "JAX-CORL")  # need what is not in our environment
UNET = dict(unet_multipliers=(1, 4, 8), model_horizon=6, horizon=6)  # 8 tokens
FOREVER = 10**9


def metered(items, units=lambda item: 1, warm: int = 2):
    """Yield items; between two of them, obey standard input: work for so many seconds, print the rate.

    Never returns: the process ends when standard input does. `units(item)` is asked after the item's work.
    What a contender prints itself goes elsewhere: sys.stdout is not sys.__stdout__ in a worker.
    """
    import torch

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    source = itertools.cycle(items)
    for _ in range(warm):
        yield next(source)
    now()
    print("ready", flush=True, file=sys.__stdout__)
    for line in sys.stdin:
        count, start = 0, now()
        while time.perf_counter() - start < float(line):
            item = next(source)
            yield item
            count += units(item)
        print(count / (now() - start), flush=True, file=sys.__stdout__)
    raise SystemExit


def transitions(options):
    from common.data import load_dataset

    name = "hopper-medium-v2" if options.data_path else "local/hopper/medium-v0"
    return load_dataset(name, options.data_path)


# ---------------------------------------------------------------------------------------------------------------------
# Ours: the scripts' own functions
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands for common.run.Stage: the same loop, with `metered` in place of progress bar and checkpoints."""

    units = staticmethod(lambda item: 1)

    def __init__(self, run, name, total, unit, saves=()):
        self.total = total

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self.over(range(1, self.total + 1))

    def over(self, items):
        return metered(items, self.units)


def prepared(script, folder: str, options, **changes):
    """A run of a script in `folder`, with its data; its stages never end."""
    from common.run import Run

    args = script.Args(env_id="hopper-medium-v2", run_dir=Path(folder), stage_dir=Path(folder) / "stages")
    values = dict(
        device=options.device,
        threads=options.threads,
        world_model_steps=FOREVER,
        idm_steps=FOREVER,
        agent_updates=FOREVER,
    )
    for name, value in {**values, "eval_every": FOREVER, "target_return": "own", **changes}.items():
        setattr(args, name, value)
    run, dataset = Run(args), transitions(options)
    run.describe(dataset.facts())
    Run.stage = lambda run, *what: Clock(run, *what)
    return args, run, dataset


def ours(loop: str, name: str, options) -> None:
    import dawm_iql
    import dawm_td3bc as script
    from common.evaluation import Evaluator

    if loop == "D":
        script = dawm_iql
    unet = dict(UNET, unet_width=128 if "128" in loop else 32)
    unet |= {"model_horizon": 7, "horizon": 7} if loop == "A9" else {}
    unet |= {"compile": True} if name == "ours, --compile" else {}
    unet |= {"synthetic_fraction": 0.0} if loop in "CD" else {}
    with tempfile.TemporaryDirectory() as folder:
        args, run, dataset = prepared(script, folder, options, **unet)
        if loop == "E":
            from local_datasets.collect import BEHAVIOR_DIR, load_policies
            from local_datasets.train_behavior import as_policy

            (policy,) = load_policies("hopper", "medium", BEHAVIOR_DIR)
            act, evaluator, taken = as_policy(policy.actor, 0, True), Evaluator("Hopper-v4", "d4rl", 10), []

            def counted(obs):
                taken.append(len(obs))
                return act(obs)

            for _ in metered([0], lambda _: sum(taken), warm=1):
                taken.clear()
                evaluator(counted, seed=100)
        if loop in "CD":
            script.train_agent(args, dataset, None, None, None, run)
        windows = script.Windows(args, dataset, run.device)
        if loop == "I":
            script.train_inverse_dynamics(args, windows, run)
        if loop.startswith("A"):
            script.train_world_model(args, windows, run)
        args.synthesis_batch_size = 256
        Clock.units = staticmethod(lambda index: len(index) * (args.horizon + 1))
        args.idm_width = 256  # as decision-diffuser's
        world_model = script.WorldModel(args, windows).to(run.device)
        inverse_dynamics = script.InverseDynamics(args, windows.obs, 3).to(run.device).eval()
        run.fingerprints |= {"world model": "", "inverse dynamics": ""}
        script.synthesize(args, script.Synthesizer(args, "hopper", windows, world_model, inverse_dynamics), run)


# ---------------------------------------------------------------------------------------------------------------------
# The same in the usual form, and the machine's rates
# ---------------------------------------------------------------------------------------------------------------------


def plain(loop: str, options) -> None:
    import numpy as np
    import torch
    from plain import IQL, TD3BC, InverseDynamicsTrainer, UNet, WorldModelTrainer, draw, evaluate, sample

    import dawm_iql
    import dawm_td3bc as script
    from common.evaluation import make_env

    device = options.device
    if loop == "E":
        from local_datasets.collect import BEHAVIOR_DIR, load_policies

        class Mean(torch.nn.Module):
            def __init__(self, actor):
                super().__init__()
                self.actor = actor

            def forward(self, obs):
                return self.actor(obs, deterministic=True)[0]

        (policy,) = load_policies("hopper", "medium", BEHAVIOR_DIR)
        env, actor, taken = make_env("Hopper-v4", "d4rl"), Mean(policy.actor), []
        for _ in metered([0], lambda _: taken[-1], warm=1):
            taken.append(evaluate(env, actor, 10, 100)[1])
    data = transitions(options)
    columns = data.obs, data.action, data.reward[:, None], data.next_obs, data.terminated[:, None].astype(np.float32)
    if loop in "CD":
        obs = torch.as_tensor(data.obs, device=device)
        args = (script if loop == "C" else dawm_iql).Args()
        nets = script.TD3BC(args, obs, 3) if loop == "C" else dawm_iql.IQL(args, obs, 3, 1.0)
        agent = TD3BC(nets.actor, nets.qf1, nets.qf2) if loop == "C" else IQL(nets.actor, nets.qf1, nets.qf2, nets.vf)
        for update in metered(range(FOREVER)):
            agent.update(*draw(columns, 256, device), *([update % 2 == 1] if loop == "C" else []))
    if loop == "I":
        args = script.Args()
        networks = script.InverseDynamics(args, torch.as_tensor(data.obs), 3).to(device)
        triples = np.concatenate([data.obs[:-2], data.obs[1:-1], data.obs[2:]], axis=1)
        trainer = InverseDynamicsTrainer(networks.mean, networks.log_std, triples, data.action[1:-1])
        for _ in metered(range(FOREVER)):
            trainer.update()
    denoiser = UNet(12, 3, 128 if "128" in loop else 32, (1, 4, 8)).to(device)
    alpha_bar = script.cosine_alpha_bar(5)
    if loop.startswith("A"):
        tokens = 12 if loop == "A9" else 8
        index = np.arange(len(data.obs) - tokens)[:, None] + np.arange(tokens)
        windows = np.concatenate([data.obs, data.reward[:, None]], axis=1)[index]
        trainer = WorldModelTrainer(denoiser, windows, data.action[:-tokens], data.reward[:-tokens], alpha_bar)
        for _ in metered(range(FOREVER)):
            trainer.update()
    steps = script.strided_steps(5, 3)
    coefficients = script.posterior_coefficients(alpha_bar, steps)
    chain = [(k, (alpha_bar[k].item(), *c)) for k, c in zip(steps, coefficients, strict=True)][::-1]
    idm = script.InverseDynamics(script.Args(idm_width=256), torch.as_tensor(data.obs), 3).to(device).eval()
    obs, action = (torch.as_tensor(array[:256], device=device) for array in (data.obs, data.action))
    for _ in metered(range(FOREVER), lambda _: 256 * 7):
        x = sample(denoiser, obs, action, action[:, :1], 8, 12, chain, 1.2)[..., :11]
        with torch.no_grad():
            for step in range(1, 7):
                idm(torch.cat([x[:, step - 1], x[:, step], x[:, step + 1]], dim=1))


def rate(name: str, device: str) -> None:
    """What the machine reaches: floating-point operations and bytes per second, simulator steps per second."""
    import torch

    if name == "products":
        size = 512 if device == "cpu" else 8192  # a small product does not fill a GPU
        a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
        for _ in metered(range(FOREVER), lambda _: 20 * 2 * size**3):
            for _ in range(20):
                torch.mm(a, b, out=out)
    if name == "copies":
        a, b = (torch.empty(2**26, device=device) for _ in range(2))
        for _ in metered(range(FOREVER), lambda _: 2 * 2**28):
            b.copy_(a)
    import mujoco
    import numpy as np

    from common.evaluation import make_env

    env = make_env("Hopper-v4", "d4rl").unwrapped
    controls = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    for _ in metered(range(FOREVER), lambda _: 1000):
        env.reset(seed=0)
        for control in controls:
            env.data.ctrl[:] = control
            mujoco.mj_step(env.model, env.data, env.frame_skip)


# ---------------------------------------------------------------------------------------------------------------------
# The floor
# ---------------------------------------------------------------------------------------------------------------------


def unet_work(width: int, batch: int, tokens: int = 8, channels: int = 12, action_dim: int = 3) -> tuple[float, int]:
    """Floating-point operations of a forward pass of the U-Net (1, 4, 8), and its number of parameters."""
    operations, parameters = 0, 0

    def layer(inputs: int, outputs: int, pairs: int, taps: int = 1):
        nonlocal operations, parameters
        operations += 2 * inputs * outputs * pairs * batch
        parameters += taps * inputs * outputs + outputs

    def conv(inputs, outputs, tokens):
        layer(inputs, outputs, sum(max(0, tokens - abs(shift)) for shift in range(-2, 3)), taps=5)

    def norm(width):
        nonlocal parameters
        parameters += 2 * width

    def block(inputs, outputs, tokens):
        conv(inputs, outputs, tokens), conv(outputs, outputs, tokens), norm(outputs), norm(outputs)
        layer(3 * width, outputs, 1)
        if inputs != outputs:
            layer(inputs, outputs, tokens)

    for inputs, layers in ((width, 2), (action_dim, 3), (1, 3)):
        sizes = [inputs, 4 * width, width] if layers == 2 else [inputs, width, 4 * width, width]
        for a, b in itertools.pairwise(sizes):
            layer(a, b, 1)
    sizes = [channels, width, 4 * width, 8 * width]
    lengths = [tokens, -(-tokens // 2), -(-tokens // 4)]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        block(a, b, lengths[i]), block(b, b, lengths[i])
        if i < 2:
            layer(b, b, 3 * lengths[i + 1] - 1, taps=3)
    block(sizes[-1], sizes[-1], lengths[2]), block(sizes[-1], sizes[-1], lengths[2])
    for i in (2, 1):
        a, b = sizes[i], sizes[i + 1]
        block(2 * b, a, lengths[i]), block(a, a, lengths[i])
        layer(a, a, 4 * lengths[i] - 2, taps=4)
    conv(width, width, tokens), norm(width), layer(width, channels, tokens)
    return operations, parameters


def mlp_work(inputs: int, width: int, outputs: int, batch: int) -> tuple[float, int]:
    weights = inputs * width + width * width + width * outputs
    return 2 * weights * batch, weights + 2 * width + outputs


def floor_work(loop: str) -> tuple[float, float]:
    """Floating-point operations and bytes of one unit of a loop, as counted in the docstring."""
    if loop[0] in "AB":
        batch = 64 if loop[0] == "A" else 256
        forward, parameters = unet_work(128 if "128" in loop else 32, batch, 9 if loop == "A9" else 8)
        if loop[0] == "A":
            return 3 * forward, (28 + 1.2) * parameters
        actions, _ = mlp_work(33, 256, 3, 6 * batch)
        return (2 * 3 * forward + actions) / (7 * batch), 0
    if loop == "I":
        forward, parameters = mlp_work(33, 1024, 3, 1024)
        return 2 * 3 * forward, 2 * 28 * parameters
    actor, actor_parameters = mlp_work(11, 256, 3, 256)
    critic, critic_parameters = mlp_work(14, 256, 1, 256)
    value, value_parameters = mlp_work(11, 256, 1, 256)
    if loop == "C":
        operations = actor + 2 * critic + 3 * 2 * critic + (3 * actor + 2 * critic) / 2
        targets = 12 * (2 * critic_parameters + actor_parameters) / 2
        return operations, 28 * (2 * critic_parameters + actor_parameters / 2) + targets
    operations = 2 * critic + 2 * value + 3 * 2 * critic + 2 * value + 3 * actor
    return operations, 28 * (2 * critic_parameters + value_parameters + actor_parameters) + 24 * critic_parameters


# ---------------------------------------------------------------------------------------------------------------------
# Turns, table, picture
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    """A contender in a process of its own, warmed up, or the reason why there is none."""

    def __init__(self, loop: str, name: str, options):
        peer = name in PEERS.get(loop, ())
        python = options.peers_python if name in OTHER_PACKAGES else Path(sys.executable)
        self.loop, self.name, self.why = loop, name, f"{python} is not there: make peers"
        self.process, self.rates = None, []
        if name == "d3rlpy" and options.device == "cuda":
            self.why = "it is built for the CPU here"
        elif python.exists():
            self.begin(python, peer, options)

    def begin(self, python: Path, peer: bool, options) -> None:
        script = "peers_code.py" if peer else "speed.py"
        command = [str(python), str(ROOT / "benchmarks" / script), "--worker", self.loop, self.name]
        command += ["--threads", str(options.threads), "--device", options.device]
        command += ["--data-path", str(options.data_path)] if options.data_path and not peer else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        if options.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # two of the repositories take a GPU where they see one
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )

    def wait(self) -> None:
        """Until it is warm, or has ended."""
        if self.process and self.process.stdout.readline().strip() != "ready":
            self.why, self.process = self.last_words(), None

    def last_words(self) -> str:
        self.process.kill()
        self.process.wait()
        self.said.seek(0)
        return (self.said.read().strip().splitlines() or ["ended without a word"])[-1]

    def turn(self, seconds: float) -> None:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: {self.name}, loop {self.loop}, ended: {self.last_words()}")
        self.rates.append(float(answer))

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(options) -> dict:
    """Rates of all contenders, loop by loop; within a loop they take turns."""
    from tqdm import tqdm

    result = {}
    for loop in options.loops:
        names = ["ours", *(["ours, --compile"] if options.compile and loop[0] in "AB" else []), "plain"]
        workers = [Worker(loop, name, options) for name in [*names, *PEERS.get(loop, ())]]
        workers += [Worker("rate", name, options) for name in ("products", "copies", "simulator")]
        for worker in workers:
            worker.wait()
            if not worker.process and worker.name not in PEERS.get(loop, ()):
                sys.exit(f"error: {worker.name}, loop {loop}, did not start: {worker.why}")
            if not worker.process:
                print(f"{loop}: {worker.name} left out: {worker.why}", file=sys.stderr)
        here = [worker for worker in workers if worker.process]
        for number in tqdm(range(options.rounds), desc=LOOPS[loop], unit="round"):
            for worker in here[:: 1 if number % 2 else -1]:
                worker.turn(options.seconds)
        for worker in here:
            worker.end()
        rates = {w.name: statistics.median(w.rates) for w in here if w.loop == "rate"}
        rows = {}
        for worker in (w for w in here if w.loop != "rate"):
            spread = statistics.quantiles(worker.rates) if len(worker.rates) > 1 else worker.rates * 3
            rows[worker.name] = {
                "rate": statistics.median(worker.rates), "quartiles": [spread[0], spread[2]], "rounds": worker.rates,
            }  # fmt: skip
        if loop == "E":
            floor = 1 / rates["simulator"]
        else:
            operations, traffic = floor_work(loop)
            floor = operations / rates["products"] + traffic / rates["copies"]
        result[loop] = {"contenders": rows, "machine": rates, "floor seconds": floor}
        print(table({loop: result[loop]}), flush=True)
    return result


def table(result: dict) -> str:
    lines = ["| loop | contender | rate | quartiles | ours is | time / floor |", "|---|---|---|---|---|---|"]
    for loop, found in result.items():
        first = found["contenders"]["ours"]["rate"]
        for name, row in found["contenders"].items():
            low, high = row["quartiles"]
            rate, digits = row["rate"], 0 if row["rate"] >= 100 else 1 if row["rate"] >= 10 else 2
            told = f"{rate:,.{digits}f} | {low:,.{digits}f} to {high:,.{digits}f} | {first / rate:.2f}x"
            title = LOOPS[loop] if name == "ours" else ""
            lines.append(f"| {title} | {name} | {told} | {1 / rate / found['floor seconds']:.1f} |")
    return "\n".join(lines)


def draw(result: dict, path: Path, title: str) -> None:
    """A panel for each loop, a bar for each contender: its rate in units of the usual form's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(4, len(result))
    rows = -(-len(result) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis, (loop, found) in zip(axes.flat, result.items(), strict=False):
        names = list(found["contenders"])[::-1]
        base = found["contenders"]["plain"]["rate"]
        values = [found["contenders"][name]["rate"] / base for name in names]
        quartiles = [found["contenders"][name]["quartiles"] for name in names]
        errors = [[abs(q[end] / base - v) for q, v in zip(quartiles, values, strict=True)] for end in (0, 1)]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axis.barh(names, values, color=colours, xerr=errors, error_kw={"linewidth": 1})
        axis.axvline(1 / found["floor seconds"] / base, color="tab:red", linestyle="--", linewidth=1)
        axis.set_title(LOOPS[loop].replace(": ", "\n"), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(result) :]:
        axis.axis("off")
    figure.suptitle(f"{title}: rate in units of the usual form's; red: the floor", fontsize=10)
    figure.savefig(path, dpi=100)


def whole() -> None:
    """F: one laptop run without anything kept, and where its time went."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, str(ROOT / "dawm_td3bc.py"), "--env-id", "local/hopper/medium-v0", "--laptop"]
        command += ["--run-dir", folder, "--stage-dir", f"{folder}/stages"]
        sys.exit(subprocess.run(command).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS), help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--compile", action="store_true", help="ours with --compile too (minutes to start)")
    parser.add_argument("--out", type=Path, default=Path("docs/speed"), help="writes OUT.json and OUT.png")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python", help="of make peers")
    parser.add_argument("--data-path", type=Path, help="Hopper in D4RL's layout instead of local/hopper/medium-v0")
    parser.add_argument("--whole", action="store_true", help="F alone")
    parser.add_argument("--worker", nargs=2, metavar=("LOOP", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0 or options.threads < 1:
        parser.error("--rounds and --threads must be 1 or more, --seconds above 0")
    if options.whole:
        whole()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if options.worker:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        loop, name = options.worker
        sys.stdout = sys.stderr
        if loop == "rate":
            rate(name, options.device)
        elif name == "plain":
            plain(loop, options)
        else:
            ours(loop, name, options)
        return
    from common.run import processor

    result = measure(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor()}, {options.threads} thread(s)"
    content = {
        "device": device, "threads": options.threads, "rounds": options.rounds, "seconds of a turn": options.seconds,
        "cores": os.cpu_count(), "machine": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "loops": result,
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    draw(result, options.out.with_suffix(".png"), device)
    print(table(result))


if __name__ == "__main__":
    main()
