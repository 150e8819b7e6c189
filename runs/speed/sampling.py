"""Sampling speed: our loop against a bare loop of network calls and against diffusers' schedulers.

One process, the loops by turns, so that a busy machine slows all alike. For a tiny network the
loop's own work dominates; for one of a few million weights nothing but the network should show.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ...agents import Denoiser
from ...agents.denoisers.networks import MLP, ResidualMLP
from ...agents.samplers.tableau import Tableau
from ...agents.solvers import make_solver
from ...envs import DiscreteVP, Schedule
from ..settings.train import resolve_device
from ..studies.tables import markdown
from .clock import Loop, by_turns

STEPS = 10


def sampling(device: str) -> tuple[dict[str, Any], str]:
    """Time ten steps of DDIM, DPM-Solver++ 2M and DEIS, each with two networks.

    Raises:
        ValueError: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("This measurement compares with diffusers: pip install diffusers.")
    where = resolve_device(device)
    process = DiscreteVP.linear(1000)
    networks: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
        "tiny MLP": (MLP((2,), 1000), (16, 2, 1, 1), 300),
        "ResidualMLP, 6.6 million weights": (
            ResidualMLP((1, 8, 8), hidden=1024),
            (256, 1, 8, 8),
            20,
        ),
    }
    figures: dict[str, Any] = {}
    for name, (body, shape, repeats) in networks.items():
        denoiser = Denoiser(body.to(where), process)
        for solver in SCHEDULERS:
            loops = _loops(solver, process, denoiser, torch.randn(shape, device=where))
            seconds = by_turns(list(loops.values()), repeats)
            medians = dict(
                zip(loops, map(statistics.median, zip(*seconds, strict=True)), strict=True)
            )
            ratios = [(ours / bare, ours / theirs) for bare, ours, theirs in seconds]
            to_bare, to_theirs = (statistics.median(column) for column in zip(*ratios, strict=True))
            figures[f"{name}, {solver}"] = {
                "weights": sum(weight.numel() for weight in body.parameters()),
                "seconds": medians,
                "to_bare": to_bare,
                "to_diffusers": to_theirs,
            }
    frame = pd.DataFrame(figures).T
    seconds = pd.DataFrame(list(frame["seconds"]), index=frame.index) * 1e3
    shown = seconds.map("{:.2f}".format).add_suffix(" (ms)")
    for name, title in (("to_bare", "fewstep / bare"), ("to_diffusers", "fewstep / diffusers")):
        shown[title] = frame[name].map("{:.3f}".format)
    return figures, markdown(shown, f"network, solver, {STEPS} calls")


def _loops(solver: str, process: DiscreteVP, denoiser: Denoiser, noise: Tensor) -> dict[str, Loop]:
    """Return the bare loop, ours and diffusers', on diffusers' times for the solver."""
    scheduler = SCHEDULERS[solver](process)
    scheduler.set_timesteps(STEPS)
    indices = scheduler.timesteps.tolist()
    end = 0.0 if solver == "ddim" else 1.0
    schedule = Schedule(process, [index + 1.0 for index in indices] + [end])
    tableau = _tableau(solver, schedule)
    body = denoiser.body
    times = [torch.full((1,), index, device=noise.device).expand(len(noise)) for index in indices]
    flat = noise.flatten(1) if isinstance(body, MLP) else noise

    # The network's time depends on its input (softplus is slow where it underflows): the bare loop
    # calls it on the very states that the solver visits.
    with torch.no_grad():
        states = list(tableau.states(denoiser, flat))[:-1]

    @torch.no_grad()
    def bare() -> None:
        for state, step in zip(states, times, strict=True):
            body(state, step)

    @torch.no_grad()
    def ours() -> Tensor:
        return tableau.sample(denoiser, flat)

    @torch.no_grad()
    def theirs() -> Tensor:
        scheduler.set_timesteps(STEPS)  # a pipeline does so for every batch: it resets the history
        sample = noise
        for step in scheduler.timesteps:
            shared = step.to(sample.device).expand(len(sample))
            output = body(sample.view_as(flat), shared).view_as(sample)
            sample = scheduler.step(output, step, sample).prev_sample
        return sample

    return {"bare": bare, "fewstep": ours, "diffusers": theirs}


def _tableau(solver: str, schedule: Schedule) -> Tableau:
    if solver == "dpm-solver-3m":
        # diffusers calls Adams-Bashforth in log-SNR DEIS.
        return make_solver(solver, schedule, solver_type="taylor")
    return make_solver(solver, schedule)


def _ddim(process: DiscreteVP) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(trained_betas=process.betas.tolist(), clip_sample=False)


def _dpm_solver_pp(process: DiscreteVP) -> Any:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(trained_betas=process.betas.tolist(), solver_order=2)


def _deis(process: DiscreteVP) -> Any:
    from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler

    return DEISMultistepScheduler(trained_betas=process.betas.tolist(), solver_order=3)


SCHEDULERS: dict[str, Callable[[DiscreteVP], Any]] = {
    "ddim": _ddim,
    "dpm-solver++-2m": _dpm_solver_pp,
    "dpm-solver-3m": _deis,
}
