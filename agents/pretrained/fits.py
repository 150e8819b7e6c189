"""Whether a table fits in the place of a pipeline's scheduler: its network, its noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..denoisers.denoiser import Denoiser
from ..samplers.tableau import Tableau
from .chains import terms_of
from .grids import MOST, sigmas_of


class Answer(nn.Module):
    """A body that says what the pipeline's network has said already."""

    value: Tensor

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the network's answer (N, *shape)."""
        return self.value


def network_of(scheduler: Any, mu: float | None) -> Denoiser:
    """Return a denoiser without a network, of what a scheduler's settings say of one."""
    terms = terms_of(scheduler, mu)
    answer = Answer()
    return Denoiser(
        answer, terms.process, terms.prediction, terms.sigma_data, terms.clip, terms.variance
    )


def check_same_levels(table: Tableau, denoiser: Denoiser, theirs: Denoiser) -> None:
    """Raise ValueError unless a network of `theirs`, asked as the table does, sees the same noise.

    Args:
        table: the table.
        denoiser: whom it was made for.
        theirs: what another scheduler's settings say of the network.
    """
    for t in table.times[:-1].tolist():
        asked = torch.tensor(denoiser.network_time(t), dtype=torch.float64)
        level = float(sigmas_of(table.process, np.array([t]))[0])
        try:
            there = float(theirs.parameterisation.time_of_network(asked))
            other = float(sigmas_of(theirs.process, np.array([there]))[0])
        except ValueError:
            other = -1.0  # the network knows no such time
        same = table.process.prediction == theirs.process.prediction
        # A last noising that leaves no signal is a large finite level to some of diffusers.
        if not same or not np.isclose(min(level, MOST), min(other, MOST), rtol=1e-3):
            raise ValueError(
                f"'{table.name}' was made for {table.process!r}, the pipeline's scheduler "
                f"describes {theirs.process!r}: they differ in the noise at the network's time "
                f"{float(asked):g}."
            )


def check_setting(table: Tableau, name: str, given: Any, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a config says something else of the network than the table does."""
    own = settings.get(name)
    if given is None or own is None:
        return
    same = given == own
    if not isinstance(own, str) and len(own) == len(given):
        same = np.allclose(own, given, rtol=1e-4)
    if not same:
        said = f"{name}={given!r}" if isinstance(given, str) else f"other {name}"
        raise ValueError(
            f"The config has {said}, and '{table.name}' was made for a network on "
            f"{table.process!r}" + (f" with {name}={own!r}." if isinstance(own, str) else ".")
        )


def check_asked(
    table: Tableau,
    own: tuple[Tensor, Tensor],
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> None:
    """Raise ValueError if a pipeline asks for another grid than a table's own.

    Args:
        table: of K steps.
        own: its timesteps (K,) and sigmas (K + 1,).
        steps: that the pipeline asks for.
        timesteps: likewise.
        sigmas: likewise; see `TableauScheduler.set_timesteps`.
    """
    given = len(sigmas) if sigmas is not None else 0
    if steps is None:
        with_last = given - 1 if given == table.steps + 1 else given
        steps = len(timesteps) if timesteps is not None else with_last or table.steps
    if steps != table.steps:
        raise ValueError(
            f"This pipeline runs the table '{table.name}', which makes exactly {table.steps} "
            f"network calls: pass num_inference_steps={table.steps}, not {steps}."
        )
    if timesteps is not None:
        # Who copies numbers rounds them: timesteps to whole ones, sigmas to three digits.
        _check_values(table, "timesteps", timesteps, [own[0]], 0.0, 1e-3 * float(own[0].max()))
    if sigmas is not None and not np.allclose(sigmas, np.linspace(1, 1 / given, given)):
        before_shift = torch.from_numpy(table.times.copy())
        flow = table.process.prediction == "flow"
        levels = [own[1], before_shift] if flow else [own[1]]
        _check_values(table, "sigmas", sigmas, levels, 1e-2, 1e-3)


def _check_values(
    table: Tableau,
    name: str,
    given: Sequence[float],
    own: Sequence[Tensor],
    rtol: float,
    atol: float,
) -> None:
    values = torch.as_tensor(np.array(given, dtype=np.float64))
    for each in own:
        if torch.allclose(values, each.double()[: len(values)], rtol=rtol, atol=atol):
            return
    visited = ", ".join(f"{value:.4g}" for value in own[0].tolist())
    raise ValueError(
        f"The table '{table.name}' has coefficients for its own {name} only, {visited}: leave "
        f"{name} out, or learn a table that visits others."
    )
