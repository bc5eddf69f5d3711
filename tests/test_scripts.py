"""Every script through its command line at toy size: its stages, what it logs, its score; and bad input told.

What each does on the way is in the test of that script; test_policy.py loads these runs in another process.
"""

import importlib
import json
import re

import pytest
from toy import SCRIPTS, folders_below, metrics

RUNS = [  # script, options; its stages; what it logs besides the score
    (
        "dawm_td3bc", "", "world model, inverse dynamics, synthesize, agent",
        "world_model/loss world_model/val_loss idm/val_mse synthesis/transitions agent/qf_loss agent/actor_loss",
    ),
    ("dawm_td3bc", "--synthetic-fraction 0", "agent", "agent/bc_loss"),
    ("dawm_td3bc", "--synthesis online --termination none", "world model, inverse dynamics, agent", "agent/bc_loss"),
    ("dawm_iql", "", "world model, inverse dynamics, synthesize, agent", "idm/val_mse agent/vf_loss"),
    ("dwm_baseline", "", "world model, synthesize, agent", "world_model/loss agent/qf_target agent/bc_loss"),
    (
        "dwm_baseline", "--agent iql --horizon 7 --rollouts online --lambda-return True --lambda-base printed "
        "--termination none",
        "world model, agent", "agent/qf_target agent/vf_loss",
    ),
    (
        "baselines.decision_diffuser", "", "decision diffuser, evaluate planner",
        "world_model/loss world_model/val_loss idm/loss idm/val_mse",
    ),
    (
        "baselines.diamond", "", "world model, reward model, agent, synthesize",
        "world_model/loss reward_model/end_loss agent/entropy",
    ),
    (
        "baselines.diffuser", "", "world model, value, evaluate planner",
        "world_model/loss world_model/val_loss value/loss value/val_loss",
    ),
    (
        "baselines.diffusion_mpc", "", "dynamics model, proposal, objective, evaluate planner",
        "world_model/loss world_model/val_loss proposal/loss proposal/val_loss objective/loss objective/val_loss",
    ),
    ("baselines.one_step", "", "world model, synthesize, agent", "world_model/val_cloning_loss agent/bc_loss"),
    ("baselines.one_step", "--preset dwm", "world model, agent", "agent/bc_loss"),
    ("baselines.polygrad", "", "world model, agent, synthesize", "world_model/loss agent/guidance_scale"),
    (
        "baselines.policy_guided_diffusion", "", "world model, agent, synthesize",
        "world_model/loss world_model/val_loss agent/bc_loss",
    ),
    ("baselines.ssorl", "--agent iql", "inverse dynamics, synthesize, agent", "idm/val_mse agent/vf_loss"),
    ("baselines.ssorl", "", "inverse dynamics, synthesize, agent", "idm/val_mse agent/bc_loss"),
    ("baselines.synther", "", "world model, synthesize, agent", "world_model/loss agent/bc_loss"),
    ("variants.joint_td3bc", "", "world model, synthesize, agent", "world_model/loss"),
    (
        "variants.uncertain_td3bc", "", "world model, inverse dynamics, synthesize, agent",
        "idm/val_mse synthesis/uncertainty",
    ),
    ("variants.uncertain_td3bc", "--synthesis online", "world model, inverse dynamics, agent", "agent/bc_loss"),
]  # fmt: skip
assert {module for module, *_ in RUNS} == SCRIPTS.keys()


@pytest.mark.parametrize("module, options, stages, names", RUNS, ids=[" ".join(run[:2]) for run in RUNS])
def test_a_run_makes_its_stages_logs_its_figures_and_reaches_a_score(module, options, stages, names, made):
    folder, text = made(module, *options.split())
    assert "\nfinal  " in text and ", ".join(json.loads((folder / "stages.json").read_text())) == stages
    logged = {name for line in metrics(folder) for name in line}
    assert {"eval/normalized_score", *names.split()} <= logged
    assert any(name.startswith("idm/") for name in logged) == ("idm" in names or "inverse dynamics" in stages)


@pytest.mark.parametrize(
    "module, options, shared",
    [
        ("dawm_iql", "", ["world model", "inverse dynamics", "synthesize"]),
        ("dwm_baseline", "", ["world model"]),
        ("variants.uncertain_td3bc", "", ["world model", "inverse dynamics"]),
    ],
)
def test_twins_of_dawm_td3bc_find_what_it_made(module, options, shared, made):
    one, other = (json.loads((made(name)[0] / "stages.json").read_text()) for name in ("dawm_td3bc", module))
    assert [stage for stage in one if one[stage] == other.get(stage)] == shared


@pytest.mark.parametrize(
    "module, options, found",
    [
        ("baselines.decision_diffuser", "--target-return 0.3 --warm-start-steps 3", ["decision diffuser"]),
        ("baselines.diffuser", "--guide-scale 0", ["world model", "value"]),
        ("baselines.diffusion_mpc", "--candidates 3", ["dynamics model", "proposal", "objective"]),
        ("baselines.diffusion_mpc", "--proposal gaussian", ["dynamics model", "objective"]),
        ("baselines.diffusion_mpc", "--dynamics one_step", ["proposal", "objective"]),
        ("variants.uncertain_td3bc", "--uncertainty-use penalty", ["world model", "inverse dynamics", "synthesize"]),
        ("variants.uncertain_td3bc", "--uncertainty-use none", ["world model", "inverse dynamics", "synthesize"]),
    ],
)
def test_another_arm_trains_only_what_it_changes(module, options, found, made):
    folder, _ = made(module)
    other, text = made(module, *options.split())
    assert re.findall(r"^(\D+?) +reused", text, re.M) == found
    assert metrics(other)[-1] != metrics(folder)[-1]


BAD = {  # script: what is typed, and a part of what it says; DATA is a file of toy Hopper data
    "dawm_td3bc": [
        ("--env-id hoper-medium-v2", "unknown --env-id 'hoper-medium-v2'; nearest known: hopper-medium-v2"),
        ("--sampling-steps 6", "--sampling-steps 6 is above --diffusion-steps 5"),
        ("--synthesis online --synthetic-fraction 0.5", "--synthesis online draws from all pairs"),
        ("--idm-holdout 0", "--idm-holdout 0.0 lies outside [0.001, 0.9]"),
        ("--horizon 0", "--horizon 0 must be 1 or more"),
        ("--horizon 9", "--horizon 9 is above --model-horizon 7"),
        ("--gamma nan", "--gamma nan lies outside [0, 1]"),
        ("--gama 0.9", "Unrecognized options: --gama, 0.9 Perhaps you meant: --gamma FLOAT"),
        ("--loss x1", "invalid choice 'x1' for argument '--loss'. Expected one of ('noise', 'x0')"),
        ("--unet-width 12", "--unet-width 12 must be 8, 16"),
        ("--exp-name a/b", "--exp-name 'a/b': use up to 100 characters"),
        ("--tf32 --device cpu", "--tf32 changes what a GPU computes, and this run is on the CPU; leave it out"),
        ("--device cuda", "--device cuda, but torch sees no CUDA device"),
        ("--run-dir /dev/null/runs", "--run-dir /dev/null/runs cannot be written ("),
    ],
    "dwm_baseline": [
        ("--horizon 8", "--horizon 8 is above --model-horizon 7; raise that too"),
    ],
    "baselines.decision_diffuser": [
        ("--plan-horizon 30", "must be a multiple of 4, since a U-Net of 3 levels halves it 2 times; take 32"),
        ("--plan-horizon 400 --data-path DATA", "400 needs 399 transitions in a row, but the longest episode has"),
        ("--warm-start-steps 6", "--warm-start-steps 6 lies outside [1, 5]"),
        ("--warm-start-steps 4 --sampling-steps 1", "--warm-start-steps 4 lies outside [5, 5]"),
        ("--preset original --warm-start-steps 201", "--warm-start-steps 201 lies outside [1, 200]"),
    ],
    "baselines.diamond": [
        ("--sigma-min 6", "--sigma-min 6.0 must lie below --sigma-max 5.0"),
    ],
    "baselines.diffuser": [
        ("--plan-horizon 30", "must be a multiple of 8, since a U-Net of 4 levels halves it 3 times; take 32"),
        ("--env-id halfcheetah-medium-v2 --plan-horizon 6", "must be a multiple of 4"),
        ("--guide-stop 21", "--guide-stop 21 is above --diffusion-steps 20"),
        ("--laptop --unet-width 8", "times the last of --unet-multipliers, 16, must be a multiple of 32"),
        ("--laptop --unet-multipliers 1 --plans 1", "a batch of one needs 64 channels or more at the last level"),
    ],
    "baselines.diffusion_mpc": [
        ("--attention-width 30", "--attention-width 30 must be a multiple of --transformer-heads 8; take 32"),
        ("--final-lr 0.1", "--final-lr 0.1 is above --world-model-lr 0.0001; lower it"),
        ("--plan-horizon 400 --data-path DATA", "400 needs as many transitions in a row, but the longest episode has"),
    ],
    "baselines.policy_guided_diffusion": [
        ("--window-length 3", "--window-length 3 is below 4, which a U-Net of --unet-levels 3 halves to 1"),
        ("--unet-width 20", "--unet-width 20 must be 16, 24, ...: its norms have 8 groups"),
        ("--sigma-min 90", "--sigma-min 90.0 must lie below --sigma-max 80.0"),
        ("--agent-updates 5000", "no set would be guided: the first one is drawn behind --refresh-every 10000"),
        ("--sampling-steps 1", "the last of --sampling-steps 1 is never guided"),
    ],
    "baselines.synther": [
        ("--sigma-min 90", "--sigma-min 90.0 must lie below --sigma-max 80.0"),
    ],
}


@pytest.mark.parametrize("module, typed, message", [(module, *case) for module in BAD for case in BAD[module]])
def test_bad_input_is_one_line_and_code_2(module, typed, message, toy, folders, capsys, monkeypatch):
    """And no run's folder is left."""
    words = [*map(str, folders_below(folders)), *typed.replace("DATA", str(toy / "data.hdf5")).split()]
    script = importlib.import_module(module)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [f"{module}.py", *words])
    with pytest.raises(SystemExit) as stop:
        script.run_script(script.main, script.Args, script.LAPTOP, getattr(script, "PRESETS", None))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    assert not list(folders.rglob("*__*"))
