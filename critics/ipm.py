"""IPMCritic: a learned critic f of the integral probability metric, and its value baseline V.

    max over f:   E_real f - E_fake f - regularisation                         (MATH.md S.1, S.5)

f is high on data and low on fakes. One of six regularisers imposes the function class. Fan & Lee
(2023) found "baseline" the best: it keeps f(x_0) near what V expected of the states on the way to
x_0.
One call of `update` is one Adam step on both networks; the critic itself is the sampler's reward.

With the logistic objective it leaves that family: f is then the log-density ratio log q/p of data
to fakes, and a sampler that maximises it descends the reverse Kullback-Leibler divergence
KL(p || q). An integral probability metric hardly minds a few samples a little off the data; this
one does (MATH.md S.9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm

from ..common.arguments import checked, fraction
from ..common.distributed import Processes
from ..common.names import unknown_name
from ..common.precision import Precision, lower_precision
from .checks import check_finite, check_samples
from .projection import is_conditional

# Each regulariser and the default of its coefficient; None where there is none to set.
REGULARIZERS: dict[str, float | None] = {
    "baseline": 0.1,
    "gradient-penalty": 10.0,
    "weight-clip": 0.01,
    "r1": 0.05,
    "spectral-norm": None,
    "none": None,
}
Objective = Literal["ipm", "logistic"]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
# Weight of a step's own variance of f in the average that scales V.
_RENEWAL = 0.1


class IPMCritic(nn.Module):
    """Critic f, baseline V, and the Adam that trains them.

    Args:
        network: f, `(N, *shape) -> (N,)`; see `make_critic`. "spectral-norm" changes its layers.
            One whose attribute `conditions` (or `classes`) is not None takes conditions (N, ...) as
            well, and so does its V: real ones and fakes are then told apart given the condition
            (Miyato & Koyama 2018).
        regularizer: what keeps f in its class:
            "baseline" subtracts coefficient * R_B, R_B = E sum_steps (V(x_t, step) - f(x_0))^2,
            which both f and V descend;
            "gradient-penalty" subtracts coefficient * E (||grad f(xhat)|| - 1)^2, xhat uniform on
            the segment between a real and a fake sample (WGAN-GP);
            "weight-clip" clamps f's parameters to +- coefficient after the step (WGAN);
            "r1" subtracts coefficient / 2 * E_real ||grad f||^2 (Mescheder et al. 2018, Eq. 9);
            "spectral-norm" divides linear and convolution weights by their largest singular value;
            "none".
        baseline: V, called with states (k, N, *shape) and steps (k,), or None for all K, returning
            (k, N), and with K in its attribute `steps`; see `make_baseline`. Required by
            "baseline"; with another regulariser it is regressed on f(x_0) and leaves f alone.
        residual_baseline: V(x_t, t) = f(x_t) + baseline(x_t, t). V then follows every change of f
            at once, and R_B also keeps f from varying along the last, small steps (our extension).
        scaled_baseline: what the baseline network says counts in standard deviations of f over the
            fakes (averaged over some ten steps). Adam moves the network's output by about as much
            in every step, however small f has become: where samples are nearly right, V without
            this is noise, or leaps. PopArt's idea (van Hasselt et al. 2016), without its
            correction of the last layer: V is to shrink with f.
        objective: "ipm" maximises E_real f - E_fake f; "logistic" E_real log s(f) +
            E_fake log s(-f), s the logistic function (Goodfellow et al. 2014), best with "r1".
        coefficient: weight of the regulariser. Defaults: "baseline" 0.1 (the official toys' 1 / K),
            "gradient-penalty" 10, "weight-clip" 0.01, "r1" 0.05; the others have none.
        learning_rate: of f; Fan & Lee (2023) have 1e-3 for the toys, 1e-4 for images.
        baseline_learning_rate: of V.
        betas: of Adam, each in [0, 1).
        precision: "float32", or "bf16": the networks compute in bfloat16 where that is safe
            (autocast); weights and, in the networks of `make_critic` and `make_baseline`, the last
            layer stay float32.
        processes: those that train together; gradients are averaged over them. The ones of
            `torch.distributed` if None.

    Attributes:
        optimizer: one parameter group for f, a second for V if there is a V. Its state is part of
            `state_dict`, which is all that resuming needs.

    Raises:
        ValueError: an unknown regulariser, a coefficient that makes no sense, "baseline" without a
            baseline, betas outside [0, 1), "spectral-norm" of a network without linear or
            convolution layers, or of a conditional one.
    """

    offset: Tensor
    variance: Tensor

    @checked
    def __init__(
        self,
        network: nn.Module,
        regularizer: str = "baseline",
        *,
        baseline: nn.Module | None = None,
        residual_baseline: bool = False,
        scaled_baseline: bool = False,
        objective: Objective = "ipm",
        coefficient: float | None = None,
        learning_rate: float = 1e-3,
        baseline_learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        precision: Precision = "float32",
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        for beta in betas:
            fraction(with_one=False, betas=beta)
        self.precision = precision
        self.processes = Processes.current() if processes is None else processes
        self.coefficient = _resolve_coefficient(regularizer, coefficient)
        if regularizer == "baseline" and baseline is None:
            raise ValueError("The baseline regularizer needs a baseline network; pass baseline=...")
        if regularizer == "spectral-norm":
            if is_conditional(network):
                raise ValueError(
                    "spectral-norm does not bound what a conditional critic adds for a condition: "
                    "take 'r1' or 'gradient-penalty'."
                )
            _normalize_layers(network)
        self.regularizer, self.objective = regularizer, objective
        self.network = network
        self.conditional = is_conditional(network)
        self.baseline = baseline
        self.residual_baseline = residual_baseline
        if scaled_baseline:  # 0 before the first step; critics without this have no such state
            self.register_buffer("variance", torch.zeros(()))
        self.scaled_baseline = scaled_baseline
        # Where on its segment the next xhat lies, in [0, 1).
        self.register_buffer("offset", torch.zeros(()))
        groups: list[dict[str, Any]] = [{"params": network.parameters(), "lr": learning_rate}]
        if baseline is not None:
            groups.append({"params": baseline.parameters(), "lr": baseline_learning_rate})
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True)
        # A reward does not change by being asked: only `update` runs the networks in training mode.
        self.eval()

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return f (N,) for samples (N, *shape): high on data, low on fakes.

        Args:
            sample: (N, *shape).
            condition: theirs (N, ...), which only a conditional network reads.

        Raises:
            ValueError: the network's output is not (N,), or it is conditional and gets none.
        """
        with lower_precision(self.precision, sample.device):
            values = self.network(sample, *self._under(condition)).to(sample.dtype)
        if values.shape != sample.shape[:1]:
            raise ValueError(
                f"The critic network must return shape ({len(sample)},), got {tuple(values.shape)}."
            )
        return values

    def _under(self, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return what the networks take beside their other arguments."""
        if not self.conditional:
            return ()
        if condition is None:
            raise ValueError(
                "This critic is conditional: give the conditions (N, ...) of the samples."
            )
        return (condition,)

    def value(
        self, states: Tensor, steps: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return V (k, N) for states (k, N, *shape), row i being before step steps[i].

        Args:
            states: rows of states.
            steps: (k,) int64; None: there are all K rows, row j before step j.
            condition: those (N, ...) of their episodes, for conditional networks.

        Raises:
            ValueError: there is no baseline, or its output is not (k, N).
        """
        return self._value(states, steps, condition, self)

    def _value(
        self,
        states: Tensor,
        steps: Tensor | None,
        condition: Tensor | None,
        f: Callable[..., Tensor],
    ) -> Tensor:
        """Return V as `value` does, with this f in the place of the critic's own."""
        if self.baseline is None:
            raise ValueError("This critic has no baseline; build it with baseline=...")
        with lower_precision(self.precision, states.device):
            values = self.baseline(states, steps, *self._under(condition)).to(states.dtype)
        if values.shape != states.shape[:2]:
            raise ValueError(
                f"The baseline must return shape {tuple(states.shape[:2])}, "
                f"got {tuple(values.shape)}."
            )
        if self.scaled_baseline:
            values = values * self.variance.sqrt()
        if self.residual_baseline:
            under = (
                each.repeat(len(states), *[1] * (each.ndim - 1)) for each in self._under(condition)
            )
            values = values + f(states.flatten(0, 1), *under).view_as(values)
        return values

    def update(
        self,
        real: Tensor,
        fake: Tensor,
        states: Tensor | None = None,
        steps: Tensor | None = None,
        conditions: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Take one Adam step on f and V (S.5).

        Args:
            real: real samples (M, *shape).
            fake: finished samples x_0 (N, *shape) of the current sampler.
            states: states (k, N, *shape) on the way to `fake`, on which V is trained; "baseline"
                needs them.
            steps: (k,) int64, the step that each row of states is before. With k < K of them, drawn
                at random, R_B is estimated without bias, and time and memory do not grow with K.
                None: all K rows, row j before step j.
            conditions: those of the real samples (M, ...) and of the fakes (N, ...), for
                conditional networks.

        Returns:
            Detached 0-d tensors, all of before the step: "critic_loss" (what f descends),
            "critic_real" and "critic_fake" (means of f), "ipm_gap" (their difference),
            "regularization" (before its coefficient), "baseline_loss" (R_B), "critic_grad_norm".
            Those that do not apply are 0.

        Raises:
            ValueError: shapes that do not fit, missing states, or NaN or infinity in a sample. On a
                GPU values are not checked, as that would wait for the device: look at the metrics.
        """
        self._check(real, fake, states)
        self.train()
        try:
            return self._step(real, fake, states, steps, *(conditions or (None, None)))
        finally:
            self.eval()

    def _step(
        self,
        real: Tensor,
        fake: Tensor,
        states: Tensor | None,
        steps: Tensor | None,
        of_real: Tensor | None,
        of_fake: Tensor | None,
    ) -> dict[str, Tensor]:
        if self.regularizer == "r1":
            real = real.detach().requires_grad_()
        both = None if of_real is None or of_fake is None else torch.cat([of_real, of_fake])
        f_real, f_fake = self(torch.cat([real, fake]), both).split([len(real), len(fake)])
        gap = f_real.mean() - f_fake.mean()
        regularization = baseline_loss = torch.zeros_like(gap)

        if states is not None and self.baseline is not None:
            if self.scaled_baseline:
                self._rescale(f_fake.detach())
            # Only the baseline regulariser lets V's error reach f.
            joint = self.regularizer == "baseline"
            f = self if joint else torch.no_grad()(self)
            value = self._value(states, steps, of_fake, f)
            error = (value - (f_fake if joint else f_fake.detach())).square().mean()
            # The mean over the rows given stands for that over all K; R_B is the sum.
            baseline_loss = (len(states) if steps is None else self.baseline.steps) * error
        if self.regularizer == "baseline":
            regularization = baseline_loss
        elif self.regularizer == "gradient-penalty":
            regularization = self._gradient_penalty(real, fake, of_fake)
        elif self.regularizer == "r1":
            (gradient,) = torch.autograd.grad(f_real.sum(), real, create_graph=True)
            regularization = 0.5 * gradient.flatten(1).square().sum(1).mean()

        loss = -gap if self.objective == "ipm" else _logistic_loss(f_real, f_fake)
        critic_loss = loss + self.coefficient * regularization
        loss = critic_loss if self.regularizer == "baseline" else critic_loss + baseline_loss

        self.optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients(self.parameters())
        grad_norm = clip_grad_norm_(self.network.parameters(), math.inf)  # measures, clips nothing
        self.optimizer.step()
        if self.regularizer == "weight-clip":
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.clamp_(-self.coefficient, self.coefficient)
        metrics = {
            "critic_loss": critic_loss,
            "critic_real": f_real.mean(),
            "critic_fake": f_fake.mean(),
            "ipm_gap": gap,
            "regularization": regularization,
            "baseline_loss": baseline_loss,
            "critic_grad_norm": grad_norm,
        }
        return {name: metric.detach() for name, metric in metrics.items()}

    def _rescale(self, f_fake: Tensor) -> None:
        """Let the variance that scales V follow that of f over the fakes."""
        if len(f_fake) * self.processes.count < 2:
            return
        variance = self.processes.std(f_fake).square()
        # A critic that says the same of everything would silence V for good.
        variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
        renewal = torch.where(self.variance == 0, 1.0, _RENEWAL)
        self.variance.lerp_(variance, renewal)

    def _gradient_penalty(self, real: Tensor, fake: Tensor, of_fake: Tensor | None) -> Tensor:
        """Return E (||grad f(xhat)|| - 1)^2 over as many pairs as the smaller batch allows.

        A pair is seen under the condition of its fake.
        """
        pairs = min(len(real), len(fake))
        real, fake = real[:pairs], fake[:pairs]
        # Positions on the segments: multiples of the golden ratio modulo 1, which are uniform,
        # spread evenly over every batch, and need no random generator to move, save and restore.
        everyone = torch.arange(1, self.processes.count * pairs + 1, device=real.device)
        position = (self.offset + _GOLDEN_RATIO * everyone).frac()
        self.offset.copy_(position[-1])
        position = self.processes.share(position)
        position = position.view(-1, *[1] * (real.ndim - 1)).to(real.dtype)
        between = torch.lerp(fake, real, position).detach().requires_grad_()
        under = None if of_fake is None else of_fake[:pairs]
        (gradient,) = torch.autograd.grad(self(between, under).sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    def _check(self, real: Tensor, fake: Tensor, states: Tensor | None) -> None:
        check_samples("real", real)
        check_samples("fake", fake, real.shape[1:])
        if states is not None:
            check_samples("states", states)
            if states.shape[1:] != fake.shape:
                raise ValueError(
                    f"states must have shape (K, *{tuple(fake.shape)}), got {tuple(states.shape)}."
                )
        elif self.regularizer == "baseline":
            raise ValueError("The baseline regularizer needs states (K, N, *shape) of the fakes.")
        if real.device.type == "cpu":
            for name, values in (("real", real), ("fake", fake), ("states", states)):
                if values is not None:
                    check_finite(name, values)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the optimizer's state: `state_dict` then holds all that training changes."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the optimizer."""
        self.optimizer.load_state_dict(state)


def _logistic_loss(f_real: Tensor, f_fake: Tensor) -> Tensor:
    """Return the cross entropy of telling real samples from fakes by the logits f."""
    return F.softplus(-f_real).mean() + F.softplus(f_fake).mean()


def _resolve_coefficient(regularizer: str, coefficient: float | None) -> float:
    """Check a regulariser's coefficient, or fill in the default; 0 where there is none."""
    if regularizer not in REGULARIZERS:
        raise unknown_name("regularizer", regularizer, REGULARIZERS)
    default = REGULARIZERS[regularizer]
    if coefficient is None:
        return default or 0.0
    if default is None:
        raise ValueError(f"The regularizer {regularizer!r} has no coefficient; leave it out.")
    if not 0 <= coefficient < math.inf or (regularizer == "weight-clip" and coefficient == 0):
        raise ValueError(
            f"The coefficient of {regularizer!r} must be positive and finite, got {coefficient}."
        )
    return coefficient


def _normalize_layers(network: nn.Module) -> None:
    """Put `network`'s linear and convolution layers under spectral normalisation, in place."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [module for module in network.modules() if isinstance(module, kinds)]
    if not layers:
        raise ValueError("spectral-norm needs linear or convolution layers; the network has none.")
    for layer in layers:
        spectral_norm(layer)
