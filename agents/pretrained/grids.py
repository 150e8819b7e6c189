"""The noise levels of a table in the words of diffusers, ComfyUI and A1111, and the way back.

diffusers calls sigma / alpha of a variance-preserving chain, the noise level of EDM and the level u
of a flow a sigma, and so do ComfyUI and A1111. Its timesteps are the network's own times.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import checked
from ...envs.processes import NoiseProcess
from ...envs.schedules import Schedule
from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau


def sigmas_of(process: NoiseProcess, times: np.ndarray) -> np.ndarray:
    """Return the sigmas (n,) of times (n,) of a process; infinite where no signal is left."""
    at = torch.from_numpy(np.array(times, dtype=np.float64))
    sigma = process.sigma(at)
    # A flow's level is sigma itself.
    levels = sigma if process.prediction == "flow" else sigma / process.alpha(at)
    return levels.numpy()


class PlainGrid(NamedTuple):
    """What a table with one network call a step visits.

    Attributes:
        sigmas: K + 1 noise levels, the last one that of the finished sample.
        timesteps: K times of the network; None for EDM's levels, which programs turn into
            log(sigma) / 4 themselves.
        before_shift: K levels of a flow that `FlowMatchEulerDiscreteScheduler` shifts to the first
            K sigmas; None for other processes.
    """

    sigmas: list[float]
    timesteps: list[float] | None
    before_shift: list[float] | None


@checked
def plain_grid(table: Tableau) -> PlainGrid:
    """Return the noise levels that a table visits, for the solvers of other programs.

    They are the levels alone: the weights of a learned table stay in its file, and so do the times
    that the network is told, where they are others.

    Raises:
        ValueError: a table that asks the network more than once, or not at all, between two levels.
    """
    rises = np.flatnonzero(np.diff(table.times) >= 0)
    if len(rises) or table.nfe != table.steps:
        raise ValueError(
            f"'{table.name}' does not ask the network once at each of its noise levels, and a "
            "plain list of them cannot say that: take a table of one network call a step."
        )
    process, times = table.process, table.times
    flow = process.prediction == "flow"
    starts = times[:-1].tolist()
    return PlainGrid(
        sigmas_of(process, times).tolist(),
        None if process.time_is_level else [process.network_time(t) for t in starts],
        starts if flow else None,
    )


def visited_by(
    scheduler: Any,
    denoiser: Denoiser,
    steps: int | None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Schedule:
    """Return the times that a scheduler of diffusers visits.

    Args:
        scheduler: left as it is.
        denoiser: what the scheduler's settings say of the network.
        steps: its `num_inference_steps`.
        sigmas: what its `set_timesteps` takes instead.
        mu: its dynamic shift, if it has one.

    Raises:
        ValueError: levels for a scheduler that takes none, or times that are none of the network's.
    """
    theirs = copy.deepcopy(scheduler)
    takes = inspect.signature(theirs.set_timesteps).parameters
    if sigmas is not None and "sigmas" not in takes:
        raise ValueError(f"A {type(theirs).__name__} takes steps, no sigmas.")
    asked: dict[str, Any] = {"num_inference_steps": steps} if sigmas is None else {"sigmas": sigmas}
    if mu is not None and "mu" in takes:
        asked["mu"] = mu
    theirs.set_timesteps(**asked)
    process, config = denoiser.process, theirs.config
    timesteps = torch.as_tensor(theirs.timesteps).double().cpu()
    times = denoiser.parameterisation.time_of_network(timesteps)
    # In float32 the first time may come out a rounding beyond t_max.
    times = torch.where((times / process.t_max - 1).abs() < _ROUNDING, process.t_max, times)
    levels = getattr(theirs, "sigmas", None)
    if levels is not None and len(levels) == len(times) + 1:
        times = _corrected(process, times, torch.as_tensor(levels)[:-1].double().cpu())
    to_zero = config.get("final_sigmas_type", "zero") == "zero" and config.get(
        "set_alpha_to_one", True
    )
    # Heun's lists name most times twice, PNDM's one of them.
    visited = times.unique().flip(0).tolist()
    # From their last time some of theirs step to the same one.
    end = 0.0 if to_zero or visited[-1] <= process.t_min else process.t_min
    return Schedule(process, [*visited, end])


_ROUNDING = 1e-5
# Noise levels above this one are pure noise.
MOST = 1e3


def _corrected(process: NoiseProcess, times: Tensor, levels: Tensor) -> Tensor:
    """Return the times (n,) of noise levels (n,) where those of rounded timesteps are others."""
    at_times = torch.from_numpy(sigmas_of(process, times.numpy()))
    same = ((at_times / levels - 1).abs() < 1e-4) | ((at_times > MOST) & (levels > MOST))
    log_snr = -levels.log()
    if process.prediction == "flow":
        log_snr = log_snr + torch.log1p(-levels)
    least = float(process.log_snr(process.t_max))
    return torch.where(same, times, process.time_of_log_snr(log_snr.clamp(min=least)))
