"""`CustomProcess`, a process from two functions of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...common.arguments import checked
from .base import NoiseProcess

Coefficient = Callable[[Tensor], Tensor]

# Halvings of a bracket: below the spacing of float64 after 60; Newton's step is for the gradient.
_HALVINGS = 64
# Share of the noise below which the last time's signal is rounding.
_NOTHING = 1e-7


class CustomProcess(NoiseProcess):
    """The process with these `alpha(t)` and `sigma(t)`, for networks that come with their own.

    `time_of_log_snr` is found by bisection, and is differentiable. Functions cannot be written to a
    file: files hold the name, and the program that reads them must first build the process with the
    same name again.

    Args:
        name: What files call it. Building another one with the same name replaces it there.
        alpha: Signal coefficient of float64 times, finite, >= 0.
        sigma: Noise coefficient, likewise; `alpha / sigma` must strictly decrease.
        t_max: The noisiest time, > `t_min`.
        t_min: Smallest time of practical use, > 0.
        time_scale: A network is asked at `time_scale * t`, > 0.
        prior_std: Standard deviation of the noise that sampling starts from; `sigma(t)` if None.

    Raises:
        ValueError: A number is out of range, or the functions' log-SNR does not strictly decrease.
        TypeError: They are no functions of tensors, or a value is of another type.
    """

    _named: ClassVar[dict[str, tuple[Coefficient, Coefficient]]] = {}

    @checked
    def __init__(
        self,
        name: str,
        alpha: Coefficient | None = None,
        sigma: Coefficient | None = None,
        t_max: float = 1.0,
        t_min: float = 1e-3,
        time_scale: float = 1.0,
        prior_std: float | None = None,
    ) -> None:
        if not 0 < t_min < t_max < math.inf or not 0 < time_scale < math.inf:
            raise ValueError(
                f"need 0 < t_min < t_max and time_scale > 0; got {t_min}, {t_max} and {time_scale}"
            )
        if prior_std is not None and not 0 < prior_std < math.inf:
            raise ValueError(f"prior_std must be a positive number; got {prior_std}")
        if alpha is None or sigma is None:
            if name not in CustomProcess._named:
                raise ValueError(
                    f"the process {name!r} is made of functions, which no file holds: build "
                    f"CustomProcess({name!r}, alpha, sigma, ...) before reading it"
                )
            alpha, sigma = CustomProcess._named[name]
        self._check_functions(alpha, sigma)
        self.name, self._functions = name, (alpha, sigma)
        self.t_max, self.t_min, self.time_scale = float(t_max), float(t_min), float(time_scale)
        self._prior_std = prior_std
        last = torch.tensor(self.t_max, dtype=torch.float64)
        # An alpha that is 0 but for rounding, as cos(pi / 2), is meant to be 0.
        self._ends_empty = float(alpha(last)) <= _NOTHING * float(sigma(last))
        log_snr = self.log_snr(torch.linspace(t_min, t_max, 1001, dtype=torch.float64))
        if not bool((log_snr.diff() < 0).all()) or not bool(log_snr[:-1].isfinite().all()):
            raise ValueError(
                "alpha(t) / sigma(t) must be positive, finite and strictly decreasing from t_min "
                "to t_max; it may be 0 at t_max only"
            )
        CustomProcess._named[name] = alpha, sigma

    def alpha(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.alpha`."""
        time = self._check_time(t)
        alpha = self._functions[0](time)
        return torch.where(time == self.t_max, 0.0, alpha) if self._ends_empty else alpha

    def sigma(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.sigma`."""
        return self._functions[1](self._check_time(t))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """See `NoiseProcess.log_snr`."""
        return self.alpha(t).log() - self.sigma(t).log()

    def time_of_log_snr(self, log_snr: float | Tensor) -> Tensor:
        """See `NoiseProcess.time_of_log_snr`."""
        value = self._check_log_snr(log_snr)
        goal = value.detach()
        low, high = torch.zeros_like(goal), torch.full_like(goal, self.t_max)
        with torch.no_grad():
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                noisier = self.log_snr(middle) <= goal
                low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        # log_snr(t_max) itself is met at t_max: a bracket only comes near to it.
        time = torch.where(goal <= self.log_snr(self.t_max), self.t_max, high)
        time = torch.where(goal == math.inf, 0.0, time)
        if not value.requires_grad:
            return time
        with torch.enable_grad():
            at = time.requires_grad_()
            slope = torch.autograd.grad(self.log_snr(at).sum(), at)[0]
        moved = time.detach() + (value - goal) / slope
        return torch.where(goal.isfinite(), moved, time.detach())

    @staticmethod
    def _check_functions(alpha: object, sigma: object) -> None:
        """Raise TypeError unless both are functions of a tensor that return one of its shape."""
        times = torch.tensor([0.25, 0.5], dtype=torch.float64)
        for name, function in (("alpha", alpha), ("sigma", sigma)):
            answer = function(times) if callable(function) else None
            if not isinstance(answer, Tensor) or answer.shape != times.shape:
                raise TypeError(
                    f"{name} must be a function of a float64 tensor of times that returns a tensor "
                    f"of its shape; got {function!r}"
                )

    def prior_std(self, t: float) -> float:
        """See `NoiseProcess.prior_std`."""
        return self.levels(t)[1] if self._prior_std is None else self._prior_std

    def to_config(self) -> dict[str, Any]:
        """See `NoiseProcess.to_config`: the name stands for the functions."""
        return {
            "kind": "CustomProcess",
            "name": self.name,
            "t_max": self.t_max,
            "t_min": self.t_min,
            "time_scale": self.time_scale,
            "prior_std": self._prior_std,
        }

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, CustomProcess) and self._functions == other._functions
        return same and super().__eq__(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"CustomProcess({self.name!r}, t_max={self.t_max:g})"
