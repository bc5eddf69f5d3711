"""How fast the hot loops are, beside the usual form, d3rlpy and the hardware's limit.

    python benchmarks/speed.py                                    # loops A to E, one thread, every contender there is
    python benchmarks/speed.py --threads 2 --out benchmarks/speed_2_threads
    python benchmarks/speed.py --device cuda --out benchmarks/speed_cuda
    make peers && python benchmarks/speed.py                      # with d3rlpy's TD3+BC and IQL

Every contender of a loop is a process of its own. All are started and warmed up, then take turns, a few seconds each,
for several rounds; told are medians over the rounds and their quartiles. Ours are the scripts' own functions, run as a
run runs them: only the stage is replaced by a clock. "plain" is the same mathematics in the usual form (plain.py).
d3rlpy is left out with a word where `make peers` has not installed it.

    A    world model: one update, width 32 x (1, 4, 8), 8 tokens, batch 64; a network beside the U-Net
    A128 as A with width 128, the paper's
    B    synthesis: transitions, N = 3 of K = 5, two guidance branches, actions filled in (width 256), network of A
    B128 the same with the network of A128
    I    inverse dynamics: one update, width 1024, batch 1024
    C, D TD3+BC and IQL: one critic update, batch 256, with the actor's share
    E    evaluation: environment steps of ten Hopper episodes of the shipped medium policy

The floor is the time of our form's products alone (torch's count of them) at the rate that the machine reaches in the
same rounds (512 x 512 matrices, on a GPU 8192 x 8192); of E the simulator's steps alone.
"""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

LOOPS = {
    "A": "world model, width 32, 8 tokens: updates/s",
    "A128": "world model, width 128, 8 tokens: updates/s",
    "B": "synthesis, width 32, 8 tokens: transitions/s",
    "B128": "synthesis, width 128, 8 tokens: transitions/s",
    "I": "inverse dynamics: updates/s",
    "C": "TD3+BC: updates/s",
    "D": "IQL: updates/s",
    "E": "evaluation: environment steps/s",
}
FOREVER = 10**9


@dataclass
class Args:
    loops: tuple[Literal[*LOOPS], ...] = tuple(LOOPS)
    threads: Annotated[int, (1, 1024)] = 1
    device: Literal["cpu", "cuda"] = "cpu"
    rounds: Annotated[int, (1, 10**6)] = 7
    seconds: Annotated[float, (0.01, 10**6)] = 3.0  # of a turn
    compile: bool = False  # ours with --compile too (minutes to start)
    out: Path = Path("benchmarks/speed")  # writes OUT.json and OUT.png
    peers_python: Path = ROOT / ".venv-peers/bin/python"  # of make peers
    data_path: Path | None = None  # Hopper in D4RL's layout instead of local/hopper/medium-v0
    worker: tuple[str, str] | None = None  # a loop and a contender: only that one, told what to do by its input


def metered(items, units=lambda item: 1, warm: int = 2):
    """Yield items; between two of them, obey standard input: work for so many seconds, print the rate.

    Never returns: the process ends when standard input does. `units(item)` is asked after the item's work. Printed
    first: floating-point operations per unit in the first `warm` items.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    source, count = itertools.cycle(items), 0
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}  # shapes; torch counts it not
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        for item in itertools.islice(source, warm):
            yield item
            count += units(item)
    print(counter.get_total_flops() / count, flush=True, file=sys.__stdout__)  # sys.stdout is not for results
    for line in sys.stdin:
        count, start = 0, now()
        while time.perf_counter() - start < float(line):
            item = next(source)
            yield item
            count += units(item)
        print(count / (now() - start), flush=True, file=sys.__stdout__)
    raise SystemExit


def hopper_data(options):
    from common.data import load_dataset

    name = "hopper-medium-v2" if options.data_path else "local/hopper/medium-v0"
    return load_dataset(name, options.data_path)


# ---------------------------------------------------------------------------------------------------------------------
# Ours: the scripts' own functions
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands for common.stages.Stage: the same loop, with `metered` in place of progress bar and checkpoints."""

    at, units = 0, staticmethod(lambda item: 1)

    def __init__(self, function, total, unit, **how):
        self.total = total

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self.over(range(1, self.total + 1))

    def over(self, items):
        return metered(items, self.units)


def ours(loop: str, name: str, options) -> None:
    import dawm_iql
    import dawm_td3bc
    from common.evaluation import Evaluator
    from common.run import Run

    script = dawm_iql if loop == "D" else dawm_td3bc
    with tempfile.TemporaryDirectory() as folder:
        args = script.Args(
            run_dir=Path(folder), stage_dir=Path(folder), device=options.device, threads=options.threads,
            world_model_steps=FOREVER, idm_steps=FOREVER, agent_updates=FOREVER, eval_every=FOREVER,
            target_return="own", unet_width=128 if "128" in loop else 32, horizon=7,
            compile=name == "ours, --compile", synthetic_fraction=float(loop not in "CD"), synthesis_batch_size=256,
            idm_width=256 if loop[0] == "B" else 1024,
        )  # fmt: skip
        run, dataset, Run.stage = Run(args), hopper_data(options), Clock
        run.reading = True  # logs to no file
        evaluator = Evaluator(dataset, "auto", 10)
        if loop == "E":
            act, taken = shipped_policy(), []

            def counted(obs):
                taken.append(len(obs))
                return act(obs)

            for _ in metered([0], lambda _: sum(taken), warm=1):
                taken.clear()
                evaluator(counted, seed=100)
        if loop in "CD":
            script.train_agent(args, dataset, None, None, evaluator, run)
        windows = script.Windows(args, dataset, run.device)
        if loop == "I":
            script.train_inverse_dynamics(args, windows, run)
        if loop.startswith("A"):
            script.train_world_model(args, windows, run)
        Clock.units = staticmethod(lambda index: len(index) * (args.horizon + 1))
        world_model = script.WorldModel(args, windows).to(run.device)
        inverse_dynamics = script.InverseDynamics(args, windows.obs, windows.change, 3).to(run.device).eval()
        script.synthesize(args, windows, world_model, inverse_dynamics, run)


def shipped_policy():
    from local_datasets.collect import BEHAVIOR_DIR, as_policy, load_policies

    (policy,) = load_policies("hopper", "medium", BEHAVIOR_DIR)
    return as_policy(policy.weights, 0, deterministic=True)


# ---------------------------------------------------------------------------------------------------------------------
# The same in the usual form, and the machine's rates
# ---------------------------------------------------------------------------------------------------------------------


def plain(loop: str, options) -> None:
    import dawm_iql
    import dawm_td3bc as script
    from common.evaluation import make_env

    import numpy as np
    import torch
    from plain import IQL, TD3BC, InverseDynamicsTrainer, WorldModelTrainer, draw, evaluate, sample

    device = options.device
    if loop == "E":
        env, act, taken = make_env("Hopper-v4", "d4rl"), shipped_policy(), []
        for _ in metered([0], lambda _: taken[-1], warm=1):
            taken.append(evaluate(env, act, 10, 100)[1])
    data = hopper_data(options)
    columns = data.obs, data.action, data.reward[:, None], data.next_obs, data.terminated[:, None].astype(np.float32)
    if loop in "CD":
        obs = torch.as_tensor(data.obs, device=device)
        nets = script.TD3BC(script.Args(), obs, 3) if loop == "C" else dawm_iql.IQL(dawm_iql.Args(), obs, 3, 1.0)
        agent = TD3BC(nets.actor, nets.qf1, nets.qf2) if loop == "C" else IQL(nets.actor, nets.qf1, nets.qf2, nets.vf)
        for update in metered(range(FOREVER)):
            agent.update(*draw(columns, 256, device), *([update % 2 == 1] if loop == "C" else []))
    if loop == "I":
        networks = script.InverseDynamics(script.Args(), *2 * [torch.as_tensor(data.obs)], 3).to(device)
        triples = np.concatenate([data.obs[:-2], data.obs[1:-1], data.obs[2:]], axis=1)
        trainer = InverseDynamicsTrainer(networks.mean, networks.log_std, triples, data.action[1:-1])
        for _ in metered(range(FOREVER)):
            trainer.update()
    args = script.Args(unet_width=128 if "128" in loop else 32, idm_width=256)
    denoiser = script.Denoiser(args, 8, 12, 14).to(device)  # without fast.on_cpu
    alpha_bar = script.cosine_alpha_bar(5)
    if loop.startswith("A"):
        index = np.arange(len(data.obs) - 8)[:, None] + np.arange(8)
        windows = np.concatenate([data.next_obs - data.obs, data.reward[:, None]], axis=1)[index]
        pairs = np.concatenate([data.obs, data.action], axis=1)[:-8]
        trainer = WorldModelTrainer(denoiser, windows, pairs, data.reward[:-8], alpha_bar)
        for _ in metered(range(FOREVER)):
            trainer.update()
    steps = script.strided_steps(5, 3)
    coefficients = script.posterior_coefficients(alpha_bar, steps)
    chain = [*zip(steps, coefficients, strict=True)][::-1]
    idm = script.InverseDynamics(args, *2 * [torch.as_tensor(data.obs)], 3).to(device).eval()
    obs, action = (torch.as_tensor(array[:256], device=device) for array in (data.obs, data.action))
    for _ in metered(range(FOREVER), lambda _: 256 * 8):
        change = sample(denoiser, torch.cat([obs, action], dim=1), action[:, :1], 8, 12, chain, 1.2)[..., :11]
        x = torch.cat([obs[:, None], obs[:, None] + change.cumsum(1)], dim=1)
        with torch.no_grad():
            for step in range(1, 8):
                idm(torch.cat([x[:, step - 1], x[:, step], x[:, step + 1]], dim=1))


def rate(name: str, device: str) -> None:
    """What the machine reaches: floating-point operations, or simulator steps, per second."""
    if name == "products":
        import torch

        size = 512 if device == "cpu" else 8192  # a small product does not fill a GPU
        a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
        for _ in metered(range(FOREVER), lambda _: 20 * 2 * size**3):
            for _ in range(20):
                torch.mm(a, b, out=out)
    from common.evaluation import make_env

    import mujoco
    import numpy as np

    env = make_env("Hopper-v4", "d4rl").unwrapped
    controls = np.random.default_rng(0).uniform(-1, 1, (1000, 3))
    for _ in metered(range(FOREVER), lambda _: 1000):
        env.reset(seed=0)
        for control in controls:
            env.data.ctrl[:] = control
            mujoco.mj_step(env.model, env.data, env.frame_skip)


# ---------------------------------------------------------------------------------------------------------------------
# Turns, table, picture
# ---------------------------------------------------------------------------------------------------------------------


class Worker:
    """A contender in a process of its own."""

    def __init__(self, loop: str, name: str, options: Args):
        self.loop, self.name, self.rates = loop, name, []
        command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--worker", loop, name]
        command += ["--threads", str(options.threads), "--device", options.device]
        command += ["--data-path", options.data_path] if options.data_path else []
        if name == "d3rlpy":
            command = [options.peers_python, ROOT / "benchmarks" / "peers_code.py", loop, str(options.threads)]
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip

    def answer(self) -> float:
        """The next number that it prints; the first, when it is warm, is of its operations."""
        if line := self.process.stdout.readline():
            return float(line)
        self.process.wait()
        self.said.seek(0)
        sys.exit(f"error: {self.name}, loop {self.loop}, ended: {self.said.read().strip()}")

    def turn(self, seconds: float) -> None:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self.rates.append(self.answer())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(options: Args) -> dict:
    """Rates of all contenders, loop by loop; within a loop they take turns."""
    from tqdm import tqdm

    result = {}
    for loop in options.loops:
        names = ["ours", *(["ours, --compile"] if options.compile and loop[0] in "AB" else []), "plain"]
        if loop in "CD" and options.device == "cpu":
            if options.peers_python.exists():
                names.append("d3rlpy")
            else:
                print(f"{loop}: d3rlpy left out: {options.peers_python} is not there: make peers", file=sys.stderr)
        names.append("simulator" if loop == "E" else "products")
        workers = [Worker(loop, name, options) for name in names]
        operations = [worker.answer() for worker in workers]
        for number in tqdm(range(options.rounds), desc=LOOPS[loop], unit="round", disable=None):
            for worker in workers[:: 1 if number % 2 else -1]:
                worker.turn(options.seconds)
        rows = {}
        for worker in workers:
            worker.end()
            spread = statistics.quantiles(worker.rates) if len(worker.rates) > 1 else worker.rates * 3
            told = {"rate": statistics.median(worker.rates), "quartiles": [spread[0], spread[2]]}
            rows[worker.name] = told | {"rounds": worker.rates}
        machine = rows.pop(names[-1])["rate"]
        floor = (1 if loop == "E" else operations[0]) / machine
        result[loop] = {"contenders": rows, "machine": machine, "floor seconds": floor}
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


def picture(result: dict, path: Path, title: str) -> None:
    """A panel for each loop, a bar for each contender: its rate in units of the usual form's."""
    from matplotlib.figure import Figure

    rows = -(-len(result) // 3)
    figure = Figure(figsize=(11, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, squeeze=False)
    for axis, (loop, found) in zip(panels.flat, result.items(), strict=False):
        contenders = dict(reversed(found["contenders"].items()))
        base = contenders["plain"]["rate"]
        values = [row["rate"] / base for row in contenders.values()]
        quartiles = [row["quartiles"] for row in contenders.values()]
        errors = [[abs(q[end] / base - v) for q, v in zip(quartiles, values, strict=True)] for end in (0, 1)]
        names = ["usual form" if name == "plain" else name for name in contenders]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axis.barh(names, values, color=colours, xerr=errors, error_kw={"linewidth": 1})
        limit = axis.axvline(1 / found["floor seconds"] / base, color="tab:red", linestyle="--", linewidth=1)
        axis.set_title(LOOPS[loop].split(":")[0], fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    for axis in panels.flat[len(result) :]:
        axis.axis("off")
    limit.set_label("upper limit: nothing but the products, or the simulator's steps, at the machine's own rate")
    figure.legend(handles=[limit], loc="outside upper right", fontsize=9, frameon=False)
    figure.supxlabel("rate, in units of the usual form's; lines on the bars: quartiles over rounds", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    figure.savefig(path, dpi=100)


def main(options: Args) -> None:
    from common import UserError
    from common.run import processor

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; leave it out")
    if options.worker:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        loop, name = options.worker
        sys.stdout = sys.stderr
        if name in ("products", "simulator"):
            rate(name, options.device)
        elif name == "plain":
            plain(loop, options)
        else:
            ours(loop, name, options)
    result = measure(options)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{processor()}, {options.threads} thread(s)"
    content = {
        "device": device, "threads": options.threads, "rounds": options.rounds, "seconds of a turn": options.seconds,
        "cores": os.cpu_count(), "machine": platform.platform(), "python": platform.python_version(),
        "torch": torch.__version__, "loops": result,
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    picture(result, options.out.with_suffix(".png"), device)
    print(table(result))


if __name__ == "__main__":
    from common.cli import run_script

    run_script(main, Args)
