"""GaussianChain: a noisy one-step sampler as a stochastic policy over transitions (MATH.md S.1).

    p_theta(x_s | x_t) = N( p_j x_t + W_jj epsilon_theta(x_t, t_j), s_j^2 I )

or with the clamped prediction and the standard deviation of each pixel that a tableau may have.
One method computes mean and standard deviation for the rollout and for the update, and one function
the log-density, so the importance ratio is 1 before any update.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...common.arguments import checked
from ...common.optimisation import frozen
from ...envs.mdp import Draw, Observation
from ..denoisers.denoiser import Denoiser
from .tableau import Tableau, std_of

Reduction = Literal["sum", "mean"]

# How far a time may be from itself in float32, relatively; twice their rounding, with a margin.
TIME_ROUNDING = 1e-6


def gaussian_log_density(
    sample: Tensor, mean: Tensor, std: Tensor | float, reduction: Reduction = "sum"
) -> Tensor:
    """Return log N(sample; mean, std^2 I), shape (N,), for samples and means (N, *shape).

    Args:
        sample: where the density is evaluated.
        mean: the means.
        std: standard deviation, a number or a tensor that broadcasts against `mean`.
        reduction: over dimensions: "sum" is the log-density itself, "mean" divides it by the number
            of dimensions (what Fan & Lee 2023 do for images).
    """
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    z = (sample - mean) / std
    per_dimension = -0.5 * z.square() - (std.log() + 0.5 * math.log(2 * math.pi))
    flat = per_dimension.flatten(1)
    return flat.sum(1) if reduction == "sum" else flat.mean(1)


class GaussianChain(nn.Module):
    """The stochastic policy that a one-step tableau and a denoiser define.

    Args:
        denoiser: the network theta.
        tableau: a sampler whose steps use only their own state and output, with noise on each step.
        learn_std: make the standard deviations trainable: K numbers, and with them the weights of
            the denoiser's second head where the tableau reads it.
        micro_batch_size: most samples that the network sees at once when it acts without gradients;
            None shows it all of them.
        checkpointing: recompute a step's activations in the backward pass through `act`, instead of
            keeping them.

    Attributes:
        log_std: (K,) logarithms of the standard deviations. Where the tableau reads a second head
            they are logarithms of factors on what follows from that, 0 before any training. A
            parameter with `learn_std`, else a buffer of the same name in `state_dict`.

    Raises:
        ValueError: a denoiser of another noise process than the tableau's; a tableau with memory
            (multistep or anchored), or with a noise-free step, which has no density: build it with
            `ancestral(schedule, last_std=...)`, for example; or with a step that is not asked.
    """

    @checked
    def __init__(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        learn_std: bool = False,
        micro_batch_size: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.micro_batch_size, self.checkpointing = micro_batch_size, checkpointing
        tableau.check_process(denoiser)
        if not tableau.one_step:
            raise ValueError(
                f"'{tableau.name}' uses earlier states or outputs; a Gaussian policy needs a "
                "one-step sampler such as ancestral or ddim."
            )
        if tableau.nfe < tableau.steps:
            raise ValueError(
                f"'{tableau.name}' does not ask the network in every step, and a policy is trained "
                "in every step: build the sampler without afs."
            )
        # Not that of the second head: where Cov0 is 0 there would be no density either.
        if (tableau.base_std == 0).any():
            step = int(np.flatnonzero(tableau.base_std == 0)[0])
            raise ValueError(
                f"'{tableau.name}' adds no noise in step {step} of {tableau.steps}, so the policy "
                "has no density there; take the ancestral sampler with last_std=0.001."
            )
        self.denoiser = denoiser
        self.tableau = tableau
        self.steps = tableau.steps
        # What the network is told, which need not be the time of the state, as `steps_at` knows it.
        # As Python numbers too: asking a device for one would wait for it.
        self._times: list[float] = tableau.evaluation_times.tolist()
        times = torch.tensor(tableau.evaluation_times)
        if (times == times.round()).all():
            times = times.long()
        self.register_buffer("times", times, persistent=False)
        self.register_buffer("scale", _float32(tableau.scale), persistent=False)
        self.register_buffer("weight", _float32(tableau.sparse_weights.diagonal), persistent=False)
        self.register_buffer("clipped", _float32_or_none(tableau.clipped), persistent=False)
        self.register_buffer("covariance", _float32_or_none(tableau.covariance), persistent=False)
        log_std = np.log(tableau.base_std)
        if self.covariance is not None:
            log_std = np.zeros(self.steps)
            self.register_buffer("noise", _float32(tableau.noise), persistent=False)
            self.register_buffer("cap", _float32(tableau.cap), persistent=False)
        if learn_std:
            self.log_std = nn.Parameter(_float32(log_std))
        else:  # no parameter, because algorithms such as TRPO differentiate by every one
            self.register_buffer("log_std", _float32(log_std))
        self._trains_head = learn_std and self.covariance is not None

    log_std: Tensor
    times: Tensor
    scale: Tensor
    weight: Tensor
    clipped: Tensor | None
    covariance: Tensor | None
    noise: Tensor
    cap: Tensor

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that training changes: the second head's only with `learn_std`."""
        head = None if self._trains_head else self.denoiser.head
        left_out = set() if head is None else set(head.parameters())
        return [p for p in self.parameters() if p.requires_grad and p not in left_out]

    def steps_at(self, timesteps: Tensor) -> Tensor:
        """Return the steps (N,) int64 that start at given times, (N,) or (N, 1) in float32.

        A finished sample has the time at which the last step ends. It counts as being in the last
        step: an environment ignores what it is told there.

        Raises:
            ValueError: no step starts or ends at such a time, to the rounding of float32.
        """
        timesteps = timesteps.reshape(-1, 1).to(torch.float64)
        times = torch.tensor(self.tableau.times, device=timesteps.device)
        distance = (timesteps - times).abs()
        nearest = distance.argmin(dim=1, keepdim=True)
        far = distance.gather(1, nearest) > TIME_ROUNDING * times[nearest].abs()
        if far.any():
            raise ValueError(
                f"no step of '{self.tableau.name}' is at time {float(timesteps[far][0]):g}, which "
                f"the environment shows: its {self.steps} steps go through the times "
                f"{[round(time, 6) for time in self.tableau.times.tolist()]}; build it on the "
                "environment's schedule"
            )
        return nearest.view(-1).clamp(max=self.steps - 1)

    def distribution(
        self, sample: Tensor, step: int | Tensor, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean (N, *shape) and standard deviation (broadcastable) of p(x_s | x_t).

        Args:
            sample: states x_t (N, *shape).
            step: the step j they are at: one number for all, or (N,) int64.
            condition: the conditions (N, ...) that they are asked under, if there are any.
        """
        denoiser = self.denoiser.under(condition)
        if isinstance(step, int):
            t: float | Tensor = self._times[step]
        else:
            t = self.times[step]
            step = step.view(-1, *[1] * (sample.ndim - 1))
        std = self.log_std[step].exp()
        if self.covariance is None:
            output = self.tableau.output_at(denoiser, sample, t)
        else:
            with nullcontext() if self._trains_head else frozen(self.denoiser.head):
                output, covariance = denoiser.outputs_with_covariance(
                    sample, t, self.tableau.output
                )
            weight = self.covariance[step]
            std = std * std_of(covariance, self.noise[step], weight, self.cap[step])
        mean = torch.addcmul(self.scale[step] * sample, self.weight[step], output)
        if self.clipped is not None:
            mean = torch.addcmul(mean, self.clipped[step], output.clamp(-1, 1))
        return mean, std

    def log_density(
        self,
        next_sample: Tensor,
        sample: Tensor,
        step: int | Tensor,
        reduction: Reduction = "sum",
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return log p_theta(x_s | x_t), shape (N,); see `gaussian_log_density`."""
        mean, std = self.distribution(sample, step, condition)
        return gaussian_log_density(next_sample, mean, std, reduction)

    def act(self, observation: Observation, step: int, draw: Draw) -> Tensor:
        """Sample x_s (N, *shape) given what `DiffusionMDP.observe` shows, reparameterised.

        Args:
            observation: the states x_t (N, *shape), and their time.
            step: the step j they are at.
            draw: source of the noise, which is drawn for all of them at once.
        """
        sample, condition = observation["sample"], observation.get("condition")
        noise = draw(sample)
        if torch.is_grad_enabled():
            if self.checkpointing:
                mean, std = checkpoint(
                    self.distribution, sample, step, condition, use_reentrant=False
                )
            else:
                mean, std = self.distribution(sample, step, condition)
            return torch.addcmul(mean, std, noise)
        size, moved = self.micro_batch_size or len(sample), []
        for first in range(0, len(sample), size):
            rows = slice(first, first + size)
            under = None if condition is None else condition[rows]
            mean, std = self.distribution(sample[rows], step, under)
            moved.append(torch.addcmul(mean, std, noise[rows]))
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def export(self) -> Tableau:
        """Return the tableau with the standard deviations as they are now."""
        learned = self.log_std.detach().exp().double().cpu().numpy()
        if self.covariance is None:
            return self.tableau.replace(noise=learned, cap=None)
        assert self.tableau.covariance is not None and self.tableau.cap is not None
        return self.tableau.replace(
            noise=self.tableau.noise * learned,
            covariance=self.tableau.covariance * learned**2,
            cap=self.tableau.cap * learned,
        )


def _float32(values: np.ndarray | None) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _float32_or_none(values: np.ndarray | None) -> Tensor | None:
    """Return what the formula takes, or None where it is all 0 and costs nothing."""
    return _float32(values) if values is not None and values.any() else None
