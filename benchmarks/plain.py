"""The hot loops as implementations of this family mostly write them: a yardstick for speed.py, and a check.

The mathematics is that of the scripts but for a sample's clamp, and so are the networks (without fast.on_cpu). The form
is the usual one: one network call for each critic and each guidance branch, an optimizer for each network that loops
over its tensors, one tensor at a time in target updates, NumPy index draws, five arrays per batch, one environment at a
time, a loss read at every update.
"""

import copy

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution


def adam(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, foreach=False)


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    for a, b in zip(target.parameters(), source.parameters(), strict=True):
        a.data.copy_(tau * b.data + (1 - tau) * a.data)


class WorldModelTrainer:
    """DDPM training on windows [N, L, channels] held as NumPy arrays; loss on the noise, averaged weights."""

    def __init__(self, denoiser: nn.Module, windows: np.ndarray, pair: np.ndarray, return_to_go: np.ndarray, alpha_bar):
        self.denoiser, self.average = denoiser, copy.deepcopy(denoiser)
        self.device = next(denoiser.parameters()).device
        self.data, self.alpha_bar, self.steps = (windows, pair, return_to_go), alpha_bar.float().to(self.device), 0
        self.optimizer = adam(denoiser.parameters(), 1e-4)

    def update(self, batch_size: int = 64) -> float:
        index = np.random.randint(len(self.data[0]), size=batch_size)
        x0, pair, return_to_go = (torch.from_numpy(array[index]).to(self.device) for array in self.data)
        k = torch.randint(1, len(self.alpha_bar), (batch_size,), device=self.device)
        noise = torch.randn_like(x0)
        scale = self.alpha_bar[k][:, None, None]
        x_k = scale.sqrt() * x0 + (1 - scale).sqrt() * noise
        keep = (torch.rand(batch_size, 1, device=self.device) >= 0.25).float()
        x0_pred = self.denoiser(x_k, k, pair, return_to_go[:, None], keep)
        loss = F.mse_loss((x_k - scale.sqrt() * x0_pred) / (1 - scale).sqrt(), noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.steps % 10 == 0:
            polyak(self.average, self.denoiser, 0.005)
        return loss.item()


@torch.no_grad()
def sample(denoiser: nn.Module, pair: torch.Tensor, return_to_go, length: int, channels: int, chain, scale: float):
    """Windows [B, length, channels] that follow pairs, each guidance branch a call; chain: k and its weights."""
    x = torch.randn(len(pair), length, channels, device=pair.device)
    for k, (weight_x0, weight_x_k, std) in chain:
        step, ones = torch.full((len(pair),), k, device=pair.device), torch.ones_like(return_to_go)
        cond = denoiser(x, step, pair, return_to_go, ones)
        uncond = denoiser(x, step, pair, return_to_go, 0 * ones)
        x0 = (uncond + scale * (cond - uncond)).clamp(-1, 1)
        x = weight_x0 * x0 + weight_x_k * x + 0.5 * std * torch.randn_like(x)
    return x


class InverseDynamicsTrainer:
    """Maximum likelihood of a tanh-Gaussian written with torch.distributions."""

    def __init__(self, mean: nn.Module, log_std: nn.Module, triples: np.ndarray, action: np.ndarray):
        self.mean, self.log_std, self.triples, self.action = mean, log_std, triples, action
        self.device = next(mean.parameters()).device
        self.optimizer = adam([*mean.parameters(), *log_std.parameters()], 1e-4)

    def log_prob(self, triples: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        std = (-1.5 + 3.5 * torch.tanh(self.log_std(triples))).exp()
        squashed = TransformedDistribution(Normal(self.mean(triples), std), [TanhTransform(cache_size=1)])
        return Independent(squashed, 1).log_prob(action.clamp(-1 + 1e-6, 1 - 1e-6))

    def update(self, batch_size: int = 1024) -> float:
        index = np.random.randint(len(self.triples), size=batch_size)
        triples, action = (torch.from_numpy(array[index]) for array in (self.triples, self.action))
        loss = -self.log_prob(triples.to(self.device), action.to(self.device)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def draw(data: tuple[np.ndarray, ...], batch_size: int, device) -> list[torch.Tensor]:
    """obs, action, reward [B, 1], next_obs, terminated [B, 1]."""
    index = np.random.randint(len(data[0]), size=batch_size)
    return [torch.from_numpy(array[index]).to(device) for array in data]


class TD3BC:
    """actor(obs) and qf(obs, action) -> [B]; the networks of a script's agent, or any like them."""

    bc_alpha, tau, gamma = 2.5, 0.005, 0.99

    def __init__(self, actor: nn.Module, qf1: nn.Module, qf2: nn.Module):
        self.actor, self.qf1, self.qf2 = copy.deepcopy((actor, qf1, qf2))
        self.actor_target, self.qf1_target, self.qf2_target = copy.deepcopy((actor, qf1, qf2))
        self.actor_optimizer, self.qf1_optimizer, self.qf2_optimizer = (
            adam(net.parameters(), 3e-4) for net in (self.actor, self.qf1, self.qf2)
        )

    def update(self, obs, action, reward, next_obs, terminated, update_actor: bool) -> dict[str, float]:
        with torch.no_grad():
            noise = (torch.randn_like(action) * 0.2).clamp(-0.5, 0.5)
            next_action = (self.actor_target(next_obs) + noise).clamp(-1, 1)
            next_value = torch.min(self.qf1_target(next_obs, next_action), self.qf2_target(next_obs, next_action))
            target = reward[:, 0] + self.gamma * (1 - terminated[:, 0]) * next_value
        qf_loss = F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)
        losses = {"qf_loss": qf_loss.item()}
        self.qf1_optimizer.zero_grad()
        self.qf2_optimizer.zero_grad()
        qf_loss.backward()
        self.qf1_optimizer.step()
        self.qf2_optimizer.step()
        if update_actor:
            policy_action = self.actor(obs)
            q = self.qf1(obs, policy_action)
            actor_loss = -self.bc_alpha / q.abs().mean().detach() * q.mean() + F.mse_loss(policy_action, action)
            losses["actor_loss"] = actor_loss.item()
            self.actor_optimizer.zero_grad()
            actor_loss.backward()
            self.actor_optimizer.step()
            polyak(self.qf1_target, self.qf1, self.tau)
            polyak(self.qf2_target, self.qf2, self.tau)
            polyak(self.actor_target, self.actor, self.tau)
        return losses


class IQL:
    """actor(obs) -> mean with a free log_std, qf(obs, action) and vf(obs) -> [B]; as a script's agent has them."""

    expectile, awr_beta, tau, gamma = 0.7, 3.0, 0.005, 0.99

    def __init__(self, actor: nn.Module, qf1: nn.Module, qf2: nn.Module, vf: nn.Module, factor: float = 1.0):
        self.actor, self.qf1, self.qf2, self.vf = copy.deepcopy((actor, qf1, qf2, vf))
        self.qf1_target, self.qf2_target = copy.deepcopy((qf1, qf2))
        self.actor_optimizer, self.vf_optimizer = (adam(net.parameters(), 3e-4) for net in (self.actor, self.vf))
        self.qf_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], 3e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, 1_000_000)
        self.factor = factor

    def update(self, obs, action, reward, next_obs, terminated) -> dict[str, float]:
        with torch.no_grad():
            next_value = self.vf(next_obs)
            q = torch.min(self.qf1_target(obs, action), self.qf2_target(obs, action))
        advantage = q - self.vf(obs)
        vf_loss = (torch.abs(self.expectile - (advantage < 0).float()) * advantage**2).mean()
        self.vf_optimizer.zero_grad()
        vf_loss.backward()
        self.vf_optimizer.step()
        target = self.factor * reward[:, 0] + (1 - terminated[:, 0]) * self.gamma * next_value
        qf_loss = (F.mse_loss(self.qf1(obs, action), target) + F.mse_loss(self.qf2(obs, action), target)) / 2
        self.qf_optimizer.zero_grad()
        qf_loss.backward()
        self.qf_optimizer.step()
        polyak(self.qf1_target, self.qf1, self.tau)
        polyak(self.qf2_target, self.qf2, self.tau)
        weight = torch.exp(self.awr_beta * advantage.detach()).clamp(max=100)
        policy = Normal(self.actor(obs), self.actor.log_std.clamp(-5, 2).exp())
        actor_loss = (weight * -policy.log_prob(action).sum(1)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.schedule.step()
        return {"vf_loss": vf_loss.item(), "qf_loss": qf_loss.item(), "actor_loss": actor_loss.item()}


def evaluate(env: gym.Env, policy, episodes: int, seed: int) -> tuple[list[float], int]:
    """Returns of whole episodes, one after another, and the steps they took."""
    returns, steps = [], 0
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        total, done = 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy(obs.reshape(1, -1).astype(np.float32))[0])
            total, steps, done = total + reward, steps + 1, terminated or truncated
        returns.append(total)
    return returns, steps
