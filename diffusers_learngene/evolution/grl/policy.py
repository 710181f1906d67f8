# SPDX-License-Identifier: Apache-2.0
"""The paper's policy for torch: alone, and as a policy of stable-baselines3.

`ActorCritic` is the network of `network.py`, which lives are lived with. `LearngenePolicy` is it once more, for
`PPO(LearngenePolicy, env)`; any other policy of stable-baselines3 may inherit a gene as far as its shapes allow.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import DEPTH, WIDTH


if TYPE_CHECKING:
    from stable_baselines3.common.policies import ActorCriticPolicy as _Base
else:
    try:
        from stable_baselines3.common.policies import ActorCriticPolicy as _Base
    except ImportError:
        _Base = object

__all__ = ["ActorCritic", "LearngenePolicy"]


def _orthogonal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)


class ActorCritic(nn.Module):
    """Actor (five hidden layers of 48, tanh, heads for mean and standard deviation) and critic; see `network.py`."""

    def __init__(self, observation_size: int, action_size: int) -> None:
        super().__init__()
        widths = [observation_size, *[WIDTH] * DEPTH]
        self.actor = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.mean, self.std = nn.Linear(WIDTH, action_size), nn.Linear(WIDTH, action_size)
        self.critic = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.value = nn.Linear(WIDTH, 1)
        self.apply(_orthogonal)

    def forward(self, observations: Tensor) -> tuple[torch.distributions.Normal, Tensor]:
        """Distribution of the action (..., actions), and value (...), of normalised observations (..., size)."""
        hidden, other = observations, observations
        for actor, critic in zip(self.actor, self.critic, strict=True):
            hidden, other = actor(hidden).tanh(), critic(other).tanh()
        return torch.distributions.Normal(self.mean(hidden), self.std(hidden).sigmoid()), self.value(other)[..., 0]


class LearngenePolicy(_Base):
    """The same for stable-baselines3: `PPO(LearngenePolicy, env)`.

    Args:
        policy_kwargs: as of `ActorCriticPolicy`, except for the architecture, which is the paper's.

    Raises:
        ImportError: stable-baselines3 is not installed.
    """

    def __init__(self, observation_space: Any, action_space: Any, lr_schedule: Any, **policy_kwargs: Any) -> None:
        if _Base is object:
            raise ImportError("LearngenePolicy needs stable-baselines3: pip install 'diffusers-learngene[rl]'.")
        widths = [WIDTH] * DEPTH
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            **{**policy_kwargs, "net_arch": {"pi": widths, "vf": widths}, "activation_fn": nn.Tanh},
        )

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        actions: int = self.action_space.shape[0]  # type: ignore[index]
        self.std_net = nn.Linear(WIDTH, actions)
        del self.log_std  # that one does not depend on the state
        self.apply(_orthogonal)
        optimizer_class: Any = self.optimizer_class
        self.optimizer = optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Any:
        return self.action_dist.proba_distribution(self.action_net(latent_pi), F.logsigmoid(self.std_net(latent_pi)))
