# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DAWM, one step at a time
#
# This notebook shows what each part of `dawm_td3bc.py` makes. It calls the functions of that file, nothing else.
# Have the paper ([arXiv 2509.19538](https://arxiv.org/abs/2509.19538)) in the other window. The equations stand in
# [method.md](method.md), next to the functions that compute them.
#
# The method in four lines:
#
# 1. A **world model** (a diffusion model) imagines the states and rewards that follow a real state and action.
# 2. An **inverse dynamics** model tells which actions lead from each imagined state to the next.
# 3. Together they give complete transitions: the **synthetic set**.
# 4. An **agent** (TD3+BC) learns from this set. Then it runs in the simulator.
#
# `make walkthrough` makes the notebook anew from `walkthrough.py`, the same cells as a plain script: two minutes on two
# cores. The data are made on your machine, 200,000 steps in the usual size. Section 1 prints the size that was used
# here: your numbers may differ.

# %%
import io
import sys
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import mujoco
import numpy as np
import torch

sys.path.extend([".", ".."])  # the notebook runs in docs/ or above it
import dawm_td3bc as dawm

plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3})
torch.set_printoptions(precision=3, sci_mode=False, linewidth=110)

# %% [markdown]
# ## 1. Train everything, small
#
# `main` is the whole of Algorithm 2. We start from the laptop's defaults and train much less. The horizon is the
# paper's: H = 7, so a rollout has 8 transitions.
#
# Some of the laptop's defaults are not in the paper. The loss is on the clean window x0 and not on the noise: with few
# updates that is more exact. Sampling takes all five steps, at their full noise and without guidance. And a rollout is
# asked for the return of its own real pair, not for one constant.

# %%
ROOT = Path(dawm.__file__).resolve().parent
small = dict(horizon=7, world_model_steps=3_000, idm_steps=2_000, conditioning_subsample=4)
small |= dict(agent_updates=4_000, eval_every=4_000, exp_name="walkthrough")
small |= dict(run_dir=ROOT / "runs", stage_dir=ROOT / "runs/stages")
args = dawm.Args(**dawm.LAPTOP | dict(env_id="local/hopper/medium-v0", device="cpu") | small)
begin = time.time()
with redirect_stdout(io.StringIO()):
    parts = dawm.main(args)
dataset, windows, world_model = parts.dataset, parts.windows, parts.world_model

print(f"{time.time() - begin:.0f} s")
print(f"data: {len(dataset.reward):,} steps in {len(dataset.lengths)} episodes, mean return {dataset.mean_return:.0f}")
for name in ("obs", "action", "reward", "next_obs", "terminated"):
    print(f"{name:<12}{list(getattr(dataset, name).shape)}")

# %% [markdown]
# The robot is Hopper: one leg, three motors. Its state has 11 numbers. A step takes 8 milliseconds.

# %%
STATE = ["height [m]", "torso angle [rad]", "thigh angle [rad]", "leg angle [rad]", "foot angle [rad]"]
STATE += ["forward velocity [m/s]", "upward velocity [m/s]"]
STATE += [f"{joint} velocity [rad/s]" for joint in ("torso", "thigh", "leg", "foot")]
ACTION = [f"{joint} torque [-1 to 1]" for joint in ("thigh", "leg", "foot")]
robot = parts.evaluator.envs[0].unwrapped


def draw_robot(axis, obs, x=0.0, color="tab:blue"):
    """The robot in state obs, its torso at x metres along the track; black: the floor."""
    axis.axhline(0, color="black", linewidth=1)
    data = mujoco.MjData(robot.model)
    data.qpos[:] = np.append(x, obs[:5])
    mujoco.mj_forward(robot.model, data)
    for geom in np.flatnonzero(robot.model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE):
        half = data.geom_xmat[geom].reshape(3, 3)[:, 2] * robot.model.geom_size[geom, 1]
        ends = np.stack([data.geom_xpos[geom] - half, data.geom_xpos[geom] + half])
        axis.plot(ends[:, 0], ends[:, 2], color=color, linewidth=5, solid_capstyle="round")


# %% [markdown]
# ## 2. Return-to-go
#
# The return-to-go of a step is the sum of all rewards from there to the episode's end, each later one discounted by
# 0.99. It is computed backwards: R = reward + 0.99 · next R.

# %%
episode = int((dataset.lengths * dataset.terminated[np.cumsum(dataset.lengths) - 1]).argmax())  # longest with a fall
pairs = (windows.episode == episode).nonzero()[:, 0]
reward = dataset.reward[pairs]
return_to_go = windows.return_to_go[pairs] * windows.return_scale + windows.return_offset

by_hand = sum(args.gamma**step * r for step, r in enumerate(reward))
print(f"first step: {by_hand:.3f} by hand, {return_to_go[0]:.3f} from the script")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3))
left.plot(reward, linewidth=0.8)
left.set(title="Reward of one real episode, which ends with a fall", xlabel="step [8 ms]", ylabel="reward")
right.plot(return_to_go)
right.set(title="Its return-to-go: 0 where it ends", xlabel="step [8 ms]", ylabel="sum of discounted rewards")
scaled = right.secondary_yaxis(
    "right", functions=(lambda y: y / windows.return_scale, lambda y: y * windows.return_scale)
)
scaled.set_ylabel(f"label = sum / {windows.return_scale:.0f}")
plt.show()

# %% [markdown]
# The network sees the label on the right. The scale is chosen so that the largest label of the data is 0.6.

# %% [markdown]
# ## 3. One window of real data
#
# A window begins at a real pair (state, action). It has H + 1 = 8 tokens, one for each step: the change of the state
# and the reward, 11 + 1 = 12 numbers. Inside the diffusion each is in standard deviations of its kind: a change in
# those of changes, which are a tenth of those of states. In units of the states one could hardly see what a step does.
#
# The real pair itself is no part of the window: it goes into the network as a condition. The states of a rollout are
# the real one plus the sum of the changes so far.
#
# We take a window of an episode that the world model was not trained on.

# %%
_, held_out = windows.split(windows.usable, args.world_model_holdout, args.world_model_seed)
pair = held_out[len(held_out) // 3][None]
rows = windows.rows(pair)
real_obs, real_reward = windows.obs[rows], windows.reward[rows][:, :-1]  # [1, 9, 11] and [1, 8], dataset units
window = windows.tokens[rows[:, :-1]]  # [1, 8, 12]
print("is token h the change from state h to h + 1?", torch.equal(window[..., :-1], real_obs.diff(dim=1)))
x0 = world_model.units.normalize(window)


def show_window(axis, x, title, names=False):
    """x [8, 12] as colours."""
    picture = axis.imshow(x.T, cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto")
    axis.set(title=title, xlabel="token = step", xticks=range(len(x)), yticks=range(x.shape[1]))
    axis.set_yticklabels([*(name.split(" [")[0] for name in STATE), "reward"] if names else [])
    axis.grid(False)
    return picture


figure, axis = plt.subplots(figsize=(7, 3.6))
picture = show_window(axis, x0[0], "One real window x0: changes and rewards", names=True)
figure.colorbar(picture, label="standard deviations\nfrom the data's mean")
plt.show()

# %% [markdown]
# ## 4. Noise in, noise out
#
# Diffusion step k mixes the window with noise: x_k = √ᾱ_k · x0 + √(1 − ᾱ_k) · noise (Eq. 2). There are K = 5 steps. At
# k = 5 almost nothing of the window is left. The paper's sampling visits only k = 5, 3, 1.

# %%
alpha_bar = world_model.alpha_bar
print("ᾱ_0 to ᾱ_5:", alpha_bar)
print("visited:", dawm.strided_steps(args.diffusion_steps, 3), "or", dawm.strided_steps(5, args.sampling_steps))

# %% [markdown]
# Top: the window noised at k = 5, 3, 1. Below: what the network takes the clean window to be, from one look at the
# picture above it. It also gets k, the pair and the return-to-go. "Off by" is the root mean square error in standard
# deviations of changes and rewards.

# %%
torch.manual_seed(0)
noise = torch.randn_like(x0)
known = world_model.pair(real_obs[:, 0], windows.action[pair])
label = windows.return_to_go[pair, None]
figure, axes = plt.subplots(2, 4, figsize=(12, 6.4))
for column, k in enumerate((5, 3, 1)):
    k_batch = torch.tensor([k])
    x_k = world_model.q_sample(x0, k_batch, noise)
    with torch.no_grad():
        guess = world_model.denoiser(x_k, k_batch, known, label, torch.ones(1, 1))
    error = (guess - x0).square().mean().sqrt()
    signal = alpha_bar[k].sqrt()
    title = f"x_{k} = {signal:.2f} x0 + {(1 - signal**2).sqrt():.2f} noise"
    show_window(axes[0, column], x_k[0], title, names=column == 0)
    show_window(axes[1, column], guess[0], f"guess from x_{k}: off by {error:.2f}", names=column == 0)
picture = show_window(axes[1, 3], x0[0], "the real window x0")
axes[0, 3].axis("off")
scale = axes[0, 3].inset_axes([0.2, 0, 0.08, 1])
figure.colorbar(picture, cax=scale, label="standard deviations\nfrom the data's mean")
plt.show()

# %% [markdown]
# The guess from k = 5 is already a plausible window: state, action and return-to-go say most of what
# happens next. The guess from k = 1 has more to go by, so it is closer to the real window.

# %% [markdown]
# ## 5. A rollout beside the real future
#
# `sample_rollouts` starts from pure noise and walks down from k = 5. `imagine` calls it for real pairs. Here are 20
# rollouts from one pair, and what really happened. They share the first state; all else is imagined. Mind the axes:
# the whole picture shows a small part of what the data vary by.

# %%
torch.manual_seed(0)
obs, imagined_reward = dawm.imagine(args, windows, world_model, pair.repeat(20))
print("states", list(obs.shape), "rewards", list(imagined_reward.shape))

figure, axes = plt.subplots(1, 4, figsize=(13, 3.3))
for axis, name in zip(axes, ["height [m]", "torso angle [rad]", "forward velocity [m/s]", "reward"], strict=True):
    rollouts, real = imagined_reward, real_reward[0]
    if name != "reward":
        channel = STATE.index(name)
        rollouts, real = obs[..., channel], real_obs[0, :, channel]
    axis.plot(rollouts.T, color="tab:blue", linewidth=0.7, label=["20 rollouts", *["_"] * 19])
    axis.plot(real, color="black", marker="o", markersize=4, label="real future")
    spread = dataset.reward.std() if name == "reward" else dataset.obs[:, channel].std()
    axis.set(title=f"{name.split(' [')[0]}\n(std of the data: {spread:.2g})", ylabel=name)
    axis.set(xlabel="step [8 ms]", xlim=(-0.4, 8.4))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# ## 6. Guidance
#
# The network is asked twice: with the return-to-go, and without. Guidance goes from the second answer towards the
# first, and beyond it: without + ω · (with − without). ω = 1 is the plain conditional answer, and the laptop's; at
# paper scale it is 1.2.
#
# In the middle of an episode the state says nearly everything. Shortly before a fall there may be more to ask for. We
# take all pairs of the data whose fourth transition is a real fall, and draw ten rollouts from each.

# %%
before_fall = windows.last[torch.as_tensor(dataset.terminated)[windows.last]] - 3
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
asked_for = {"own": "Asked for: the pair's own, small return", 0.6: "Asked for: the largest return of the data"}
for axis, (target, title) in zip(axes, asked_for.items(), strict=True):
    for omega, color in ((1.0, "tab:green"), (1.2, "tab:blue"), (3.0, "tab:red")):
        torch.manual_seed(0)
        asked = replace(args, guidance_scale=omega, target_return=target)
        obs, reward = dawm.imagine(asked, windows, world_model, before_fall.repeat(10))
        terminated, _, _ = dawm.mark_ends(args, windows, obs, reward)
        standing = 1 - terminated.cumsum(1).clamp(max=1).float().mean(0)
        axis.plot(range(1, len(standing) + 1), 100 * standing, color=color, marker="o", label=f"ω = {omega:g}")
    axis.plot(range(1, 9), 3 * [100] + 5 * [0], color="black", marker="o", linestyle="--", label="real episodes")
    axis.set(title=title, xlabel="step [8 ms]", ylim=(-5, 105))
axes[0].set_ylabel("robots still standing [%]")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# Compare the colours, then left and right: hardly a difference. State and action settle what the next steps bring, and
# the return asked for moves little of it, whatever ω is. The imagined robots fall when the real ones do, or a step off.

# %% [markdown]
# ## 7. Inferred actions
#
# The world model makes no actions. Inverse dynamics (Eq. 3) takes three states, the one before, this one and the
# next, and tells the action between the last two. Here it reads real states of an episode that it was not trained on.

# %%
_, idm_held_out = windows.split(windows.has_past, args.idm_holdout, args.idm_seed)
first = idm_held_out[len(idm_held_out) // 3]
count = min(60, int(windows.last[windows.episode[first]] - first))
states = windows.obs[windows.start[first] - 1 + torch.arange(count + 2)]
inferred, real = dawm.infer_actions(parts.inverse_dynamics, states[None])[0], windows.action[first : first + count]

figure, axes = plt.subplots(1, 3, figsize=(13, 3.3), sharey=True)
for joint, axis in enumerate(axes):
    axis.plot(real[:, joint], color="black", linewidth=2.5, label="real action")
    axis.plot(inferred[:, joint], color="tab:orange", linestyle="--", label="inferred from the states")
    error = (inferred - real)[:, joint].square().mean().sqrt()
    axis.set(title=f"{ACTION[joint].split()[0]}: off by {error:.2f}", xlabel="step [8 ms]")
axes[0].set_ylabel("torque [-1 to 1]")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# ## 8. A fall passes through
#
# The paper does not say what happens at a fall. Here is what this code does.
#
# * In a real window the last state of a fallen episode is repeated. The rewards behind it are an **end reward**, lower
#   than any real one. So the model can learn what an end looks like.
# * `is_over`: an imagined reward is so low that it can only be such an end reward.
# * `terminated`: this transition leads into the fall. Either the next state breaks the simulator's rule, or the next
#   reward says that all is over.
# * `valid`: false after the first `terminated`. These transitions are thrown away.

# %%
low, high = dataset.healthy_low, dataset.healthy_high
print(f"standing: height above {low[0]:.1f} m, torso angle between {low[1]:.1f} and {high[1]:.1f} rad")
print(f"rewards: real {dataset.reward.min():.2f} to {dataset.reward.max():.2f}, end reward {windows.end_reward:.2f}")
print(f"is_over below {windows.end_margin:.2f}")

# %% [markdown]
# Top: a real window that meets a fall. Below: a rollout from the same state and action. Red: fallen.

# %%
torch.manual_seed(0)
obs, reward = dawm.imagine(args, windows, world_model, before_fall)
terminated, _, _ = dawm.mark_ends(args, windows, obs, reward)
same_step = terminated[:, 3] & ~terminated[:, 2] & windows.is_over(reward).any(1)
chosen = same_step.int().argmax()  # a rollout that falls at the step of the real fall
real_rows = windows.rows(before_fall[chosen][None])[0]
cases = {"real": (windows.obs[real_rows], windows.reward[real_rows][:-1]), "imagined": (obs[chosen], reward[chosen])}

figure, axes = plt.subplots(2, 9, figsize=(13, 5.8), sharex=True, sharey=True)
for line, (name, (obs_here, reward_here)) in zip(axes, cases.items(), strict=True):
    over = windows.is_over(reward_here)
    terminated, _, valid = (x[0] for x in dawm.mark_ends(args, windows, obs_here[None], reward_here[None]))
    for step, axis in enumerate(line):
        fallen = terminated[:step].any()
        draw_robot(axis, obs_here[step], color="tab:red" if fallen else "tab:blue")
        told = [f"{obs_here[step, 0]:.3f}", f"{obs_here[step, 1]:.2f}"]
        if step < len(over):
            told += [f"{reward_here[step]:.2f}", *(str(bool(x[step])) for x in (over, terminated, valid))]
        axis.set(title=f"step {step}", xlim=(-1.5, 0.3), ylim=(-0.05, 1.25), aspect="equal")
        axis.text(0.5, -0.62, "\n".join(told), transform=axis.transAxes, ha="center", va="top", fontsize=10)
    names = "height [m]\nangle [rad]\nreward\nis_over\nterminated\nvalid"
    line[0].text(-0.3, -0.62, names, transform=line[0].transAxes, ha="right", va="top", fontsize=10)
    line[0].set_ylabel(f"{name}\nheight [m]")
    line[4].set_xlabel("place along the track [m]")
    for axis in line:
        axis.tick_params(labelbottom=True)
plt.show()

# %% [markdown]
# ## 9. Five rows of the synthetic set
#
# `complete_rollouts` puts all together. One row is one transition: obs, action, reward, next_obs, terminated.
# `row_sizes` has their widths. Here are five rows of one rollout, printed side by side.

# %%
sizes = dawm.row_sizes(len(STATE), len(ACTION))
synthetic, valid = parts.rollouts["rows"], parts.rollouts["valid"]
print(f"rollouts {list(synthetic.shape)}: {int(valid.sum()):,} valid rows of width {sum(sizes)} = {sizes}\n")

number = int((synthetic[:, 4, -1] * valid[:, 4]).argmax())  # a rollout whose fifth transition ends in a fall
five = synthetic[number, :5]
columns = [*(f"obs: {n}" for n in STATE), *(f"action: {n}" for n in ACTION), "reward"]
columns += [*(f"next_obs: {n}" for n in STATE), "terminated"]
print(f"{'':<34}" + "".join(f"{f'h = {h}':>9}" for h in range(5)))
for name, values in zip(columns, five.T, strict=True):
    print(f"{name:<34}" + "".join(f"{value:9.3f}" for value in values))

# %% [markdown]
# Only obs and action of h = 0 are real. The next_obs of a row is the obs of the row after it.

# %%
obs, action, reward, next_obs, terminated = five.split(sizes, dim=1)
print("next_obs[h] == obs[h + 1]:", torch.equal(next_obs[:-1], obs[1:]))

# %% [markdown]
# ## 10. The agent's target, by hand
#
# TD3+BC teaches its critics this number: reward + 0.99 · (1 − terminated) · min(Q1', Q2') at the next state. The next
# action is the target actor's, with a little clipped noise.

# %%
agent = parts.agent
torch.manual_seed(0)
with torch.no_grad():
    noise = (args.policy_noise * torch.randn(5, len(ACTION))).clamp(-args.noise_clip, args.noise_clip)
    next_action = (agent.actor_target(next_obs) + noise).clamp(-1, 1)
    q1, q2 = agent.qf1_target(next_obs, next_action), agent.qf2_target(next_obs, next_action)
by_hand = [float(reward[h] + args.gamma * (1 - terminated[h]) * min(q1[h], q2[h])) for h in range(5)]

torch.manual_seed(0)
from_script = agent.td_target(reward[:, 0], next_obs, terminated[:, 0])
print(f"{'h':>2}{'reward':>9}{'terminated':>12}{'Q1 next':>10}{'Q2 next':>10}{'by hand':>10}{'td_target':>11}")
for h in range(5):
    numbers = f"{reward[h, 0]:9.3f}{terminated[h, 0]:12.0f}{q1[h]:10.3f}{q2[h]:10.3f}"
    print(f"{h:>2}{numbers}{by_hand[h]:10.3f}{from_script[h]:11.3f}")

# %% [markdown]
# At the fall the target is the reward alone: nothing follows.

# %% [markdown]
# ## 11. The policy
#
# The actor runs in the simulator. It needs neither the world model nor the inverse dynamics any more.

# %%
env = parts.evaluator.envs[0]
state, states, places, total, over = env.reset(seed=args.seed + 100)[0], [], [], 0.0, False
while not over:
    states.append(state)
    places.append(robot.data.qpos[0])
    with torch.no_grad():
        action = parts.actor(torch.as_tensor(state, dtype=torch.float32)[None])[0].numpy()
    state, reward, terminated, truncated, _ = env.step(action)
    total, over = total + reward, terminated or truncated

steps = np.linspace(0, min(len(states), 260) - 1, 14).astype(int)
figure, axis = plt.subplots(figsize=(9, 5))
for i, step in enumerate(steps):
    draw_robot(axis, states[step], places[step], color=plt.cm.viridis(0.9 * i / len(steps)))
apart = 0.008 * (steps[1] - steps[0])
title = f"The first {0.008 * steps[-1]:.1f} s of an episode, from dark to light, {apart:.2f} s apart"
axis.set(title=title, xlabel="place along the track [m]", ylabel="height [m]", ylim=(-0.1, 2.1), aspect="equal")
plt.show()

end = "fell" if terminated else "still standing"
print(f"this episode: {len(states)} steps ({0.008 * len(states):.1f} s), {end}, return {total:.0f}")
mean, std = (parts.run.history[f"eval/{name}"][-1][1] for name in ("episodic_return", "episodic_return_std"))
print(f"{args.eval_episodes} episodes: mean return {mean:.0f}, std {std:.0f}; the data: mean {dataset.mean_return:.0f}")

# %% [markdown]
# This is one short training with one seed. It says nothing about how good the method is: see [results.md](results.md).
#
# Next: change a number in section 1 and run all again. What has not changed is found in `runs/stages`. Or fork the
# script: [forking.md](forking.md).
