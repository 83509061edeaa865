"""OSDS: the splits of the LC-PSS volumes learned by DDPG (DistrEdge, arXiv 2202.01699; MDP form and constants reconstructed)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastee.errors import CheckpointMismatch
from fastee.planning.spatial.baselines import by_weight

EPISODES, EPSILON_STEP, BATCH, GAMMA = 4000, 1 / 250, 64, 0.99
ACTOR_RATE, CRITIC_RATE, ACTOR_HIDDEN, CRITIC_HIDDEN = 1e-4, 1e-3, (400, 200, 100), (400, 200, 100, 100)
SOFT_UPDATE, REPLAY = 0.005, 20_000  # not published; usual values


def _mlp(sizes: tuple[int, ...], out: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1], out)


@dataclass(frozen=True)
class Trained:
    """`plan`: (volumes, splits) of the best episode; `latency` its seconds; `history`: latency of every episode; `agent`: to decide again."""

    plan: tuple
    latency: float
    history: list[float]
    agent: Osds


class Osds:
    """An agent for one planner: `train` goes on for some episodes, `decide` splits by the actor alone, `save` and `load` keep everything.

    State: (T_1..T_N, H, C, F, S of the volume's last layer) scaled to [0, 1]; action in [-1, 1]^(N-1), sorted into cuts; reward 1/T_end at the
    last volume. Deterministic by seed on one machine. Providers that are down or unreachable stay possible actions: they make an episode
    that never ends, reward 0.
    """

    def __init__(self, planner, seed: int = 0, sigma2: float | None = None, epsilon_step: float = EPSILON_STEP):
        self.planner, self.seed, self.epsilon_step = planner, seed, epsilon_step
        n = planner.providers
        self.sigma = math.sqrt((0.1 if n <= 4 else 1.0) if sigma2 is None else sigma2)
        self.volumes = tuple(planner.lcpss())
        last = [planner.net.layers[b - 1] for b in self.volumes[1:]]
        self.heights = [x.out_h for x in last]
        features = np.array([[x.out_h, x.channels, x.kernel, x.stride] for x in last], dtype=np.float64)
        self.features = features / features.max(axis=0)
        self.scale = planner.baseline("offload").latency
        self.episode, self.history, self.best, self.best_latency = 0, [], None, math.inf
        self.random = np.random.default_rng(seed)
        width, actions = n + 4, max(1, n - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.target_actor = (_mlp((width, *ACTOR_HIDDEN, actions), nn.Tanh()) for _ in range(2))
            self.critic, self.target_critic = (_mlp((width + actions, *CRITIC_HIDDEN, 1), nn.Identity()) for _ in range(2))
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.actor_step = torch.optim.Adam(self.actor.parameters(), ACTOR_RATE)
        self.critic_step = torch.optim.Adam(self.critic.parameters(), CRITIC_RATE)
        self.replay = torch.zeros(REPLAY, 2 * width + actions + 2)  # state, action, reward, next state, done
        self.filled, self.at = 0, 0

    def _cuts(self, action: np.ndarray, height: int) -> list[int]:
        inner = np.floor(height * (np.sort(np.clip(action, -1.0, 1.0)) + 1.0) / 2.0 + 0.5).astype(int)
        return [0, *inner.tolist()[: self.planner.providers - 1], height]

    def _state(self, splits: list[list[int]]) -> np.ndarray:
        """What the agent sees before it splits volume len(splits)."""
        n, j = self.planner.providers, len(splits)
        finish = [0.0] * n
        if j:  # the rest on the root does not change what the first volumes cost
            layers = len(self.planner.net.layers)
            bounds = [*self.volumes[: j + 1], layers] if self.volumes[j] < layers else list(self.volumes)
            rest = [] if self.volumes[j] == layers else [by_weight(self.heights[-1], [float(d == self.planner.model.root) for d in range(n)])]
            finish = self.planner.model.finish_times(bounds, [e for cuts in [*splits, *rest] for e in cuts])[1][(j - 1) * n : j * n]
        return np.array([*(min(1.0, t / self.scale) for t in finish), *self.features[min(j, len(self.heights) - 1)]], dtype=np.float32)

    def _act(self, state: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.actor(torch.from_numpy(state)[None])[0].numpy().astype(np.float64)

    def decide(self) -> tuple:
        """(volumes, splits) by the actor alone, at the planner's present rates; LC-PSS is not repeated."""
        splits: list[list[int]] = []
        for height in self.heights:
            splits.append(self._cuts(self._act(self._state(splits)), height))
        return self.volumes, splits

    def train(self, episodes: int = EPISODES) -> Trained:
        """Play and learn for `episodes` more episodes; remembers the best one of all."""
        if isinstance(episodes, bool) or not isinstance(episodes, int) or episodes < 1:
            raise ValueError(f"episodes must be an integer >= 1, got {episodes!r}")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the networks are too small for more
        try:
            for _ in range(episodes):
                self._play()
        finally:
            torch.set_num_threads(threads)
        return Trained((self.volumes, self.best), self.best_latency, list(self.history), self)

    def _play(self) -> None:
        actions = max(1, self.planner.providers - 1)
        epsilon, splits, state = max(0.0, 1.0 - self.episode * self.epsilon_step), [], self._state([])
        for j, height in enumerate(self.heights):
            noise = self.sigma * self.random.standard_normal(actions)
            action = np.clip(noise if self.random.random() < epsilon else self._act(state) + noise, -1.0, 1.0)
            splits.append(self._cuts(action, height))
            done = j + 1 == len(self.heights)
            reward = 0.0
            if done:
                latency = self.planner.latency(self.volumes, splits)
                reward = 1.0 / latency if latency > 0 else 0.0
                self.history.append(latency)
                if latency < self.best_latency or self.best is None:
                    self.best, self.best_latency = splits, latency
            after = state if done else self._state(splits)
            self.replay[self.at] = torch.from_numpy(np.concatenate([state, action, [reward], after, [float(done)]]).astype(np.float32))
            self.at, self.filled = (self.at + 1) % REPLAY, min(REPLAY, self.filled + 1)
            if self.filled >= BATCH:
                self._learn()
            state = after
        self.episode += 1

    def _learn(self) -> None:
        width, actions = self.planner.providers + 4, max(1, self.planner.providers - 1)
        rows = self.replay[torch.from_numpy(self.random.integers(0, self.filled, BATCH))]
        state, action, reward, after, done = rows.split([width, actions, 1, width, 1], dim=1)
        with torch.no_grad():
            goal = reward + GAMMA * (1.0 - done) * self.target_critic(torch.cat([after, self.target_actor(after)], dim=1))
        self.critic_step.zero_grad()
        nn.functional.mse_loss(self.critic(torch.cat([state, action], dim=1)), goal).backward()
        self.critic_step.step()
        self.actor_step.zero_grad()
        (-self.critic(torch.cat([state, self.actor(state)], dim=1)).mean()).backward()
        self.actor_step.step()
        with torch.no_grad():
            for net, target in ((self.actor, self.target_actor), (self.critic, self.target_critic)):
                for p, t in zip(net.parameters(), target.parameters(), strict=True):
                    t.lerp_(p, SOFT_UPDATE)

    _PARTS = ("actor", "target_actor", "critic", "target_critic", "actor_step", "critic_step")

    def save(self, path: str | os.PathLike) -> None:
        """Write networks, optimisers, replay buffer, random state and history: training goes on as if it had not stopped."""
        import json

        torch.save({**{k: getattr(self, k).state_dict() for k in self._PARTS}, "replay": self.replay[: self.filled].clone(), "at": self.at,
                    "random": json.dumps(self.random.bit_generator.state), "episode": self.episode, "history": self.history, "best": self.best,
                    "best_latency": self.best_latency, "volumes": list(self.volumes), "fingerprint": self.planner.net.fingerprint,
                    "providers": self.planner.providers, "seed": self.seed, "sigma": self.sigma, "epsilon_step": self.epsilon_step}, path)  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike, planner) -> Osds:
        """Read what `save` wrote (nothing is executed); `CheckpointMismatch` when it belongs to another net or number of providers."""
        import json

        saved = torch.load(path, weights_only=True)
        if saved.get("fingerprint") != planner.net.fingerprint or saved.get("providers") != planner.providers:
            raise CheckpointMismatch(f"OSDS checkpoint is for net {saved.get('fingerprint')!r} on {saved.get('providers')} providers, expected "
                                     f"{planner.net.fingerprint!r} on {planner.providers}")  # fmt: skip
        agent = cls(planner, saved["seed"], saved["sigma"] ** 2, saved["epsilon_step"])
        if saved["volumes"] != list(agent.volumes):
            raise CheckpointMismatch(f"OSDS checkpoint splits volumes {saved['volumes']}, LC-PSS of this planner gives {list(agent.volumes)}")
        for k in cls._PARTS:
            getattr(agent, k).load_state_dict(saved[k])
        agent.filled, agent.at = len(saved["replay"]), saved["at"]
        agent.replay[: agent.filled] = saved["replay"]
        agent.random.bit_generator.state = json.loads(saved["random"])
        agent.sigma = saved["sigma"]
        agent.episode, agent.history, agent.best, agent.best_latency = saved["episode"], saved["history"], saved["best"], saved["best_latency"]
        return agent


def train(planner, seed: int = 0, episodes: int = EPISODES, **options) -> Trained:
    """Train a fresh agent; 4,000 episodes as reconstructed take minutes on one core, a few hundred already show the trend."""
    return Osds(planner, seed, **options).train(episodes)
