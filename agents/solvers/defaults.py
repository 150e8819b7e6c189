"""What a sampler gets where nothing is said: its options and its times.

The library and the command line both ask here, so that they draw the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...common.arguments import checked
from ...common.names import unknown_name
from ...envs.processes import NoiseProcess
from ...envs.schedules import SCHEDULES, Schedule, make_schedule, schedule_options
from ...envs.schedules.ends import default_first_time, is_clean
from ..denoisers.denoiser import Denoiser
from .table import SOLVERS, Options


@checked
def default_solver_options(
    solver: str,
    denoiser: Denoiser | None = None,
    shape: Sequence[int] | None = None,
    given: Mapping[str, Any] | None = None,
    process: NoiseProcess | None = None,
) -> Options:
    """Return a solver's default options: those of the denoiser, else those of SFT-PG's paper.

    A denoiser from diffusers says whether predicted clean samples are clamped (`Denoiser.clip`) and
    which variance ancestral sampling adds (`Denoiser.variance`). Where it says nothing of the
    variance, ancestral sampling has noise in every step, and so is a policy with densities, which
    SFT-PG can start from: "beta" for vectors, "small" with a last standard deviation of 0.001 for
    images. On a process that is neither a chain of noisings nor `VE` the last step of "beta" would
    be as noisy as the others, 0.1 for ten steps of a `RectifiedFlow`: there vectors take "large"
    with a last standard deviation of 0.01. Nothing is returned for what neither decides: the
    solver's own defaults hold.

    Args:
        solver: its name.
        denoiser: the network that will be asked.
        shape: of one sample; that of the denoiser's body if None, as far as it says so.
        given: options that the user chose; they get no default, and a chosen `variance` or
            `last_std` leaves the other to the solver.
        process: the noise process; that of the denoiser if None, as far as there is one.

    Raises:
        TypeError: a value of another type.
    """
    if solver not in SOLVERS:
        return {}
    if shape is None and denoiser is not None:
        shape = denoiser.shape
    if process is None and denoiser is not None:
        process = denoiser.process
    known = SOLVERS[solver].options
    options: Options = {}
    if denoiser is not None and denoiser.clip and "clip" in known:
        options["clip"] = True
    if not {"variance", "last_std"} & set(given or ()):
        if denoiser is not None and denoiser.variance is not None:
            options["variance"] = denoiser.variance
        elif shape is not None:
            options |= _noise_of_a_policy(solver, len(shape) == 3, process)
    if SOLVERS[solver].needs is not None and shape is not None and len(shape) != 3:
        # These clamp to an image's [-1, 1] and count in grey levels.
        options |= {"clip": False, "late_clip": math.inf}
    return {
        name: value
        for name, value in options.items()
        if name in known and name not in (given or ())
    }


@checked
def default_schedule(
    solver: str, process: NoiseProcess, steps: int, grid: str | None = None, **options: Any
) -> Schedule:
    """Return the times that a solver visits where none are named.

    They are evenly spaced on a chain of noisings, and Karras's on `VE`. They start at `t_max` and
    end at 0, with two exceptions for the solvers that work in log-SNR or sigma / alpha:

    - Where next to no signal is left at `t_max`, as on cosine betas, they start at the log-SNR -5.1
      (`envs.schedules.ends.default_first_time`; `lambda_min_clipped` in diffusers).
    - Where the noise at `t_min` is negligible, solvers in log-SNR end there; elsewhere, on short
      chains for instance, the last step goes from there to 0.

    Args:
        solver: a key of `SOLVERS`, or the name of a finished table, which gets no exceptions.
        process: the noise process.
        steps: number of transitions, at least 1.
        grid: a key of `SCHEDULES`; `process.grid` if None.
        options: of the grid; those given here win.

    Raises:
        ValueError: an unknown grid or option, or one that the process refuses.
    """
    grid = grid or process.grid
    if grid not in SCHEDULES:
        raise unknown_name("schedule", grid, SCHEDULES)
    ends: dict[str, Any] = {}
    if solver in SOLVERS and SOLVERS[solver].by_signal:
        first = default_first_time(process)
        if first != process.t_max:
            ends["start"] = first
    if solver in SOLVERS and SOLVERS[solver].to_t_min:
        ends["append_zero"] = not is_clean(process, process.t_min)
        if grid == "uniform":
            ends["end"] = process.t_min
    known = schedule_options(grid)
    ends = {name: value for name, value in ends.items() if name in known}
    return make_schedule(grid, process, steps, **(ends | options))


def _noise_of_a_policy(solver: str, image: bool, process: NoiseProcess | None) -> Options:
    """Return the options that add noise in every step."""
    variance, last_std = "beta", None
    if image:
        variance, last_std = "small", 0.001
    elif process is not None and not (process.discrete or process.time_is_level):
        variance, last_std = "large", 0.01
    options: Options = {} if last_std is None else {"last_std": last_std}
    return {"variance": variance, **options} if solver == "ancestral" else options
