"""Small pieces that every learning agent uses: Adam, learning-rate schedules, averaged weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..common.names import unknown_name
from .arguments import fraction

Module = TypeVar("Module", bound=nn.Module)

# Each maps the fraction of training done, 0 to 1, to a factor on the learning rate.
LEARNING_RATE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


class TrainingDivergedError(RuntimeError):
    """Training left what can be computed with; `.quantity` names what did.

    Args:
        quantity: what became NaN or infinite.
        timesteps: after how many.
        message: says it in other words, where something else happened.
        lower: the settings to lower, by name; none if it is not known which were read.
    """

    def __init__(
        self,
        quantity: str,
        timesteps: int,
        message: str | None = None,
        *,
        lower: Sequence[str] = (),
    ) -> None:
        advice = f" Lower {' or '.join(lower)}." if lower else ""
        super().__init__(
            message
            or f"Training went non-finite: {quantity} is NaN or infinite after {timesteps} "
            f"timesteps.{advice} Checkpoints written before are good."
        )
        self.quantity = quantity


class OutOfMemoryError(RuntimeError):
    """Something does not fit into memory."""

    def __init__(self, advice: str, where: str = "in a round of training") -> None:
        super().__init__(f"Out of memory {where}. {advice}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error means that memory ran out, on a GPU or on the CPU."""
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def adam(parameters: Iterable[Any], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    """Build the fused Adam over parameters or groups; rates come from `set_learning_rate`.

    Raises:
        ValueError: none of the parameters is trainable.
    """
    given = list(parameters)
    groups = (group["params"] if isinstance(group, dict) else [group] for group in given)
    if not any(parameter.requires_grad for group in groups for parameter in group):
        raise ValueError(
            "There is nothing to train: no weight requires a gradient. The averaged denoiser of "
            "another agent is such a one; save that agent, and load the denoiser from its file."
        )
    return torch.optim.Adam(given, lr=1e-3, betas=betas, fused=True)


def learning_rate_schedule(name: str) -> Callable[[float], float]:
    """Look up a schedule. Raises ValueError for a name that does not exist."""
    if name not in LEARNING_RATE_SCHEDULES:
        raise unknown_name("learning-rate schedule", name, LEARNING_RATE_SCHEDULES)
    return LEARNING_RATE_SCHEDULES[name]


def learning_rate(
    peak: float, schedule: str, done: float, update: int = 0, warm_up: int = 0
) -> float:
    """Return the learning rate of an update, which is never negative.

    Args:
        peak: the rate that the schedule's factor and the warm-up, both 0 to 1, multiply.
        schedule: "constant", "linear" or "cosine".
        done: fraction of the training done; taken for 0 below and for 1 above.
        update: which update, from 0; below 0 it is one before the warm-up, whose rate is 0.
        warm_up: over so many updates the rate rises evenly; 0 has none.

    Raises:
        ValueError: a schedule that does not exist.
    """
    factor = learning_rate_schedule(schedule)(min(max(done, 0.0), 1.0))
    if warm_up > 0:
        factor *= min(max((update + 1) / warm_up, 0.0), 1.0)
    return peak * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """Set the rate of each parameter group; one rate alone serves every group."""
    groups = optimizer.param_groups
    for group, rate in zip(groups, rates if len(rates) > 1 else rates * len(groups), strict=True):
        group["lr"] = rate


class Averaged(Generic[Module]):
    """An exponential moving average of a module's parameters; decay 0 follows it exactly."""

    def __init__(self, module: Module, decay: float) -> None:
        fraction(with_one=False, ema=decay)
        self.live = module
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False) if decay else module

    @torch.no_grad()
    def update(self, before: int | None = None) -> None:
        """Move the average by (1 - decay) towards the live parameters.

        Args:
            before: how many updates there were. With it the first ones move it farther, as decays
                of (1 + n) / (10 + n) do: a long memory does not keep what it began with.
        """
        if self.decay:
            ramp = 1.0 if before is None else (1 + before) / (10 + before)
            decay = min(self.decay, ramp)
            averages: list[torch.Tensor] = list(self.module.parameters())
            live: list[torch.Tensor] = list(self.live.parameters())
            torch._foreach_lerp_(averages, live, 1 - decay)


class Snapshot:
    """The weights that an averaged module had at a time, to be given back.

    Args:
        average: whose weights are kept.
        live: the module in training, whose average it is; it gets them, too.

    Attributes:
        weights: what was kept; None before the first time.
    """

    def __init__(self, average: nn.Module, live: nn.Module) -> None:
        self._average, self._live = average, live
        self.weights: dict[str, torch.Tensor] | None = None

    def take(self) -> None:
        """Keep the average's weights as they are now."""
        self.weights = {name: w.clone() for name, w in self._average.state_dict().items()}

    def show(self) -> None:
        """Give the average what was kept, and leave the module in training as it is."""
        assert self.weights is not None
        self._average.load_state_dict(self.weights)

    def give_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Give both what was kept; an optimizer whose weights change forgets what it remembers."""
        assert self.weights is not None
        now = self._average.state_dict()
        if any(not torch.equal(now[name], kept) for name, kept in self.weights.items()):
            self.show()
            self._live.load_state_dict(self.weights)
            # What it remembers belongs to other weights, and may not be finite.
            optimizer.state.clear()

    def between(self, end: Snapshot, way: float) -> Snapshot:
        """Return what lies on the way from here (0) to another snapshot (1) of the same module."""
        assert self.weights is not None and end.weights is not None
        made = Snapshot(self._average, self._live)
        made.weights = {
            name: self.weights[name].lerp(there, way) if there.is_floating_point() else there
            for name, there in end.weights.items()
        }
        return made

    def load(self, weights: dict[str, torch.Tensor] | None) -> None:
        """Keep weights from a file, whose tensors are on the CPU."""
        now = self._average.state_dict()
        self.weights = weights and {name: weights[name].to(w.device) for name, w in now.items()}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise modules reproducibly: seed torch's global generator inside, restore it outside."""
    # All GPUs would be asked for their state otherwise, with a warning.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Keep a module's parameters out of the gradient for a while."""
    parameters = () if module is None else module.parameters()
    training = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in training:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)
