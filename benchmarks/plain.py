"""The hot loops as implementations of this family mostly write them: a yardstick for speed.py, and a check.

The mathematics is that of the scripts. The form is the usual one: nn.Conv1d over (batch, channels, time), one network
call for each critic and each guidance branch, an optimizer for each network that loops over its tensors, one tensor
at a time in target updates, NumPy index draws, five arrays per batch, one environment at a time, a loss read at every
update. `unet_like` and the agents take over the parameters of a script's networks, so that a test can compare the two.
"""

import copy
import math

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


class Block(nn.Module):
    """A residual block, x [B, channels, L]."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, out_channels, 5, padding=2)
        self.norm1 = nn.GroupNorm(8, out_channels)
        self.condition = nn.Sequential(nn.Mish(), nn.Linear(embed_dim, out_channels))
        self.conv2 = nn.Conv1d(out_channels, out_channels, 5, padding=2)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.skip = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x, embedding):
        h = F.mish(self.norm1(self.conv1(x))) + self.condition(embedding)[:, :, None]
        return F.mish(self.norm2(self.conv2(h))) + self.skip(x)


class UNet(nn.Module):
    """The scripts' TemporalUNet, x [B, L, channels]; odd lengths are cropped after each lengthening, as there."""

    def __init__(self, channels: int, action_dim: int, width: int, multipliers: tuple[int, ...]):
        super().__init__()

        def mlp3(in_dim):
            return nn.Sequential(
                nn.Linear(in_dim, width), nn.Mish(), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
            )

        self.width = width
        self.embed_k = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.embed_action, self.embed_return = mlp3(action_dim), mlp3(1)
        sizes = [channels, *(width * m for m in multipliers)]
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            shorten = nn.Conv1d(b, b, 3, stride=2, padding=1) if i < len(sizes) - 2 else nn.Identity()
            self.down.append(nn.ModuleList([Block(a, b, 3 * width), Block(b, b, 3 * width), shorten]))
        self.middle = nn.ModuleList([Block(sizes[-1], sizes[-1], 3 * width) for _ in range(2)])
        self.up = nn.ModuleList()
        for a, b in reversed(list(zip(sizes[1:-1], sizes[2:], strict=True))):
            lengthen = nn.ConvTranspose1d(a, a, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([Block(2 * b, a, 3 * width), Block(a, a, 3 * width), lengthen]))
        self.head_conv = nn.Conv1d(sizes[1], width, 5, padding=2)
        self.head_norm = nn.GroupNorm(8, width)
        self.head = nn.Conv1d(width, channels, 1)

    def forward(self, x, k, action, return_to_go, keep):
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=x.device) * -math.log(10_000) / (half - 1)).to(x.dtype)
        angle = k[:, None] * frequencies
        embedding = torch.cat(
            [
                self.embed_k(torch.cat([angle.sin(), angle.cos()], 1)),
                self.embed_return(return_to_go) * keep,
                self.embed_action(action),
            ],
            dim=1,
        )
        x, skips = x.transpose(1, 2), []
        for block1, block2, shorten in self.down:
            x = block2(block1(x, embedding), embedding)
            skips.append(x)
            x = shorten(x)
        for block in self.middle:
            x = block(x, embedding)
        for block1, block2, lengthen in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = lengthen(block2(block1(x, embedding), embedding))[:, :, : skips[-1].shape[2]]
        return self.head(F.mish(self.head_norm(self.head_conv(x)))).transpose(1, 2)


def unet_like(denoiser: nn.Module, channels: int, action_dim: int, width: int, multipliers: tuple[int, ...]) -> UNet:
    """A UNet with the parameters of a script's TemporalUNet, which come in the same order."""
    plain = UNet(channels, action_dim, width, multipliers).to(next(denoiser.parameters()).dtype)
    for mine, other in zip(plain.parameters(), denoiser.parameters(), strict=True):
        if other.dim() == 3 and len(other) == 5:  # [taps, in, out]
            other = other.permute(2, 1, 0)
        mine.data.copy_(other.reshape(mine.shape))
    return plain


class WorldModelTrainer:
    """DDPM training on windows [N, L, channels] held as NumPy arrays; noise prediction, averaged weights."""

    def __init__(self, denoiser: UNet, windows: np.ndarray, action: np.ndarray, return_to_go: np.ndarray, alpha_bar):
        self.denoiser, self.average = denoiser, copy.deepcopy(denoiser)
        self.device = next(denoiser.parameters()).device
        self.data, self.alpha_bar, self.steps = (windows, action, return_to_go), alpha_bar.float().to(self.device), 0
        self.optimizer = adam(denoiser.parameters(), 1e-4)

    def update(self, batch_size: int = 64) -> float:
        index = np.random.randint(len(self.data[0]), size=batch_size)
        x0, action, return_to_go = (torch.from_numpy(array[index]).to(self.device) for array in self.data)
        k = torch.randint(1, len(self.alpha_bar), (batch_size,), device=self.device)
        noise = torch.randn_like(x0)
        scale = self.alpha_bar[k][:, None, None]
        x_k = scale.sqrt() * x0 + (1 - scale).sqrt() * noise
        x_k[:, 0] = x0[:, 0]
        keep = (torch.rand(batch_size, 1, device=self.device) >= 0.25).float()
        loss = F.mse_loss(self.denoiser(x_k, k, action, return_to_go[:, None], keep), noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.steps % 10 == 0:
            polyak(self.average, self.denoiser, 0.005)
        return loss.item()


@torch.no_grad()
def sample(denoiser: UNet, first: torch.Tensor, action, return_to_go, length: int, channels: int, chain, scale: float):
    """Windows [B, length, channels] from first states, each guidance branch a call; chain: k and its weights."""
    x = torch.randn(len(first), length, channels, device=first.device)
    for k, (alpha_bar, weight_x0, weight_x_k, std) in chain:
        x[:, 0, : first.shape[1]] = first
        step, ones = torch.full((len(first),), k, device=first.device), torch.ones_like(return_to_go)
        cond = denoiser(x, step, action, return_to_go, ones)
        uncond = denoiser(x, step, action, return_to_go, 0 * ones)
        noise = uncond + scale * (cond - uncond)
        x0 = ((x - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5).clamp(-1, 1)
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

    def __init__(self, actor: nn.Module, qf1: nn.Module, qf2: nn.Module, lr=3e-4, bc_alpha=2.5, tau=0.005, gamma=0.99):
        self.actor, self.qf1, self.qf2 = copy.deepcopy((actor, qf1, qf2))
        self.actor_target, self.qf1_target, self.qf2_target = copy.deepcopy((actor, qf1, qf2))
        self.actor_optimizer, self.qf1_optimizer, self.qf2_optimizer = (
            adam(net.parameters(), lr) for net in (self.actor, self.qf1, self.qf2)
        )
        self.bc_alpha, self.tau, self.gamma = bc_alpha, tau, gamma

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

    def __init__(self, actor, qf1, qf2, vf, lr=3e-4, expectile=0.7, awr_beta=3.0, tau=0.005, gamma=0.99, factor=1.0):
        self.actor, self.qf1, self.qf2, self.vf = copy.deepcopy((actor, qf1, qf2, vf))
        self.qf1_target, self.qf2_target = copy.deepcopy((qf1, qf2))
        self.actor_optimizer, self.vf_optimizer = adam(self.actor.parameters(), lr), adam(self.vf.parameters(), lr)
        self.qf_optimizer = adam([*self.qf1.parameters(), *self.qf2.parameters()], lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, 1_000_000)
        self.expectile, self.awr_beta, self.tau, self.gamma, self.factor = expectile, awr_beta, tau, gamma, factor

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


@torch.no_grad()
def evaluate(env: gym.Env, actor: nn.Module, episodes: int, seed: int) -> tuple[list[float], int]:
    """Returns of whole episodes, one after another, and the steps they took."""
    returns, steps, device = [], 0, next(actor.parameters()).device
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed + episode)
        total, done = 0.0, False
        while not done:
            action = actor(torch.tensor(obs.reshape(1, -1), dtype=torch.float32, device=device)).cpu().numpy()[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, steps, done = total + reward, steps + 1, terminated or truncated
        returns.append(total)
    return returns, steps
