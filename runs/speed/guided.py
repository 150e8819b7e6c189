"""What guidance costs beside its network calls: a guided sampler against a bare loop."""

from __future__ import annotations

import statistics
from typing import Any

import pandas as pd
import torch

from ...agents import Denoiser
from ...agents.denoisers.networks import ResidualMLP, SmallUNet
from ...agents.samplers.sampling import sample
from ...agents.solvers import make_solver
from ...envs import DiscreteVP, Schedule
from ..settings.train import resolve_device
from ..studies.tables import markdown
from .clock import by_turns
from .sampling import STEPS


def guided_sampling(device: str) -> tuple[dict[str, Any], str]:
    """Time ten guided calls of DPM-Solver++ 2M, and its network on the same doubled batches."""
    where, process = resolve_device(device), DiscreteVP.linear(1000)
    networks = {
        "ResidualMLP, 6.6 million weights, batch 128": (
            ResidualMLP((1, 8, 8), hidden=1024, classes=10),
            128,
            20,
        ),
        "SmallUNet, 0.3 million weights, batch 64": (SmallUNet((1, 28, 28), classes=10), 64, 8),
    }
    schedule = Schedule.uniform(process, STEPS, end=1.0)
    tableau = make_solver("dpm-solver++-2m", schedule)
    figures: dict[str, Any] = {}
    for name, (body, n, repeats) in networks.items():
        body = body.to(where)
        denoiser = Denoiser(body, process, "sample", drops=True)
        noise = torch.randn((n, *(denoiser.shape or ())), device=where)
        classes = torch.arange(n, device=where) % 10
        view, doubled = denoiser.given(classes, guidance=2.0), torch.cat([noise, noise])
        both = torch.cat([classes, torch.full_like(classes, 10)])
        times = [process.network_time(time) for time in tableau.times[:-1].tolist()]

        @torch.no_grad()
        def bare(
            body: torch.nn.Module = body,
            x: torch.Tensor = doubled,
            both: torch.Tensor = both,
            times: list[float] = times,
        ) -> None:
            for time in times:
                body(x, torch.full((1,), time, device=x.device).expand(len(x)), both)

        @torch.no_grad()
        def ours(view: Denoiser = view, noise: torch.Tensor = noise) -> None:
            sample(tableau, view, noise, shape=tuple(noise.shape[1:]))

        seconds = by_turns([bare, ours], repeats)
        medians = [statistics.median(column) for column in zip(*seconds, strict=True)]
        ratio = statistics.median(own / alone for alone, own in seconds)
        figures[name] = {"bare": medians[0], "guided": medians[1], "throughput": 1 / ratio}
    frame = pd.DataFrame(figures).T
    shown = (frame[["bare", "guided"]] * 1e3).map("{:.2f}".format).add_suffix(" (ms)")
    shown["throughput of the bare loop"] = frame["throughput"].map("{:.1%}".format)
    return figures, markdown(shown, f"network, {STEPS} guided calls")
