"""RewardCritic: a reward of one's own, fixed or closed-form, with a value baseline that learns.

It gives any function (N, *shape) -> (N,) the face of a critic, so the policy-gradient agent can
maximise it: an aesthetic score, a classifier's log-probability, or `MMDCritic`'s witness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common.arguments import checked
from ..common.distributed import Processes
from .checks import check_rewards, rewards_of
from .projection import is_conditional


class RewardCritic(nn.Module):
    """A given reward f, and a baseline V regressed on it.

    Args:
        reward: f, `(N, *shape) -> (N,)`, to be maximised: a tensor or NumPy array of finite
            numbers. One with an argument named `condition` gets the conditions (N, ...), too.
            If it has an `update(real, fake)`, as `MMDCritic` does, it is told of every batch.
        baseline: V, as in `IPMCritic`; None for agents that need none.
        learning_rate: of V.
        processes: those that train together; the ones of `torch.distributed` if None.
    """

    @checked
    def __init__(
        self,
        reward: Callable[[Tensor], Tensor],
        baseline: nn.Module | None = None,
        learning_rate: float = 1e-3,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.baseline = baseline
        self.processes = Processes.current() if processes is None else processes
        self.optimizer = (
            None
            if baseline is None
            else torch.optim.Adam(baseline.parameters(), lr=learning_rate, fused=True)
        )

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the reward (N,) of samples (N, *shape), under their conditions if there are any.

        Raises:
            TypeError: the reward returned no numbers.
            ValueError: it returned another shape, or NaN or infinity for finite samples.
        """
        answer = rewards_of(self.reward, sample, condition)
        check_rewards(self.reward, answer, sample)
        return answer

    def value(
        self, states: Tensor, steps: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return V (k, N) for states (k, N, *shape) before steps (k,); see `IPMCritic.value`."""
        if self.baseline is None:
            raise ValueError("This critic has no baseline; build it with baseline=...")
        under = (condition,) if is_conditional(self.baseline) else ()
        return self.baseline(states, steps, *under)

    def update(
        self,
        real: Tensor,
        fake: Tensor,
        states: Tensor | None = None,
        steps: Tensor | None = None,
        conditions: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Regress V on the reward of the fakes; same face and metrics as `IPMCritic.update`."""
        if hasattr(self.reward, "update"):
            self.reward.update(self.processes.gather(real), self.processes.gather(fake))
        of_real, of_fake = conditions or (None, None)
        with torch.no_grad():
            f_real, f_fake = self(real, of_real), self(fake, of_fake)
        metrics = {
            "critic_real": f_real.mean(),
            "critic_fake": f_fake.mean(),
            "ipm_gap": f_real.mean() - f_fake.mean(),
        }
        if states is not None and self.optimizer is not None:
            baseline_loss = (self.value(states, steps, of_fake) - f_fake).square().mean()
            self.optimizer.zero_grad()
            baseline_loss.backward()
            assert self.baseline is not None  # the optimizer is its
            self.processes.average_gradients(self.baseline.parameters())
            self.optimizer.step()
            metrics["baseline_loss"] = baseline_loss.detach()
        return metrics

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the optimizer and, if it has one, of the reward."""
        inner = self.reward.state_dict() if hasattr(self.reward, "state_dict") else None
        return {
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            # A module's state is in ours already.
            "reward": None if isinstance(self.reward, nn.Module) else inner,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if state["reward"] is not None:
            self.reward.load_state_dict(state["reward"])  # type: ignore[attr-defined]
