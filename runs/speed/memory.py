"""Peak memory at K = 10 and K = 100, each case in a fresh process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ...agents import SFD, SFT, SFTPG, Denoiser, ScheduleLearning, SolverLearning
from ...agents.base import Agent
from ...agents.denoisers.networks import ResidualMLP
from ...agents.denoisers.parameterisations import time_range_of
from ...envs import VE, Schedule
from ..settings.train import resolve_device
from ..studies.tables import markdown
from .subjects import swiss_roll, untrained

MIB = 2**20
# Where Linux lets a process forget the peak of its memory; ru_maxrss is in bytes on a Mac.
RESET, MAXRSS = Path("/proc/self/clear_refs"), MIB if sys.platform == "darwin" else 1024
STEPS = (10, 100)


def memory(device: str) -> tuple[dict[str, Any], str]:
    """Measure the peak memory of one round at K = 10 and K = 100."""
    cases: list[tuple[str, type[Agent], dict[str, Any]]] = [
        ("SFT-PG", SFTPG, {"minibatch_size": 20_480}),
        ("SFT", SFT, {}),
        ("SFT, gradient checkpointing", SFT, {"gradient_checkpointing": True}),
    ]
    trajectory = 4 * 2 * 101 * 2048 * 2 / MIB
    peaks = {label: peaks_of_round(agent, options, device) for label, agent, options in cases}
    figures, text = _growth(peaks, "peak of a round, batch 2048, 2 critic steps (MiB)")
    note = f"The stored trajectories are {trajectory:.1f} MiB at K = 100."
    return figures, f"{text}\n\n{note}"


def gradient_memory(device: str) -> tuple[dict[str, Any], str]:
    """Measure the peak memory of the gradient of a rollout's error at K = 10 and K = 100."""
    kinds = ("exact (adjoint)", "eq14", "autograd through the unrolled chain")
    peaks = {kind: peaks_of_gradient(kind, device) for kind in kinds}
    for kind in ("solver learning", "SFD"):
        peaks[f"{kind}, batches of 256"] = peaks_of_learner(kind, device)
    figures, text = _growth(peaks, "gradient, 1024 images of 64 numbers (MiB)")
    stored = 4 * 64 * 1024 * 101 / MIB
    return figures, f"{text}\n\nThe states are {stored:.1f} MiB at K = 100."


def peaks_of_round(agent: type[Agent], options: dict[str, Any], device: str) -> list[float]:
    """Return `peak_of_round` for each of `STEPS`, each in a fresh process."""
    return [_apart(peak_of_round, agent, steps, options, device) for steps in STEPS]


def peaks_of_gradient(kind: str, device: str) -> list[float]:
    """Return `peak_of_gradient` for each of `STEPS`, each in a fresh process."""
    return [_apart(peak_of_gradient, kind, steps, device) for steps in STEPS]


def peaks_of_learner(kind: str, device: str) -> list[float]:
    """Return `peak_of_learner` for each of `STEPS`, each in a fresh process."""
    return [_apart(peak_of_learner, kind, steps, device) for steps in STEPS]


def _apart(function: Callable[..., float], *arguments: Any) -> float:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _growth(peaks: dict[str, list[float]], title: str) -> tuple[dict[str, Any], str]:
    """Return the peaks as figures, and as a table with their growth."""
    frame = pd.DataFrame(peaks, index=[f"K={steps}" for steps in STEPS]).T
    growth = frame.iloc[:, 1] - frame.iloc[:, 0]
    shown = frame.map("{:.0f}".format).assign(growth=growth.map("{:+.0f}".format))
    return frame.to_dict("index"), markdown(shown, title)


def peak_of_round(
    agent: type[Agent], steps: int, options: dict[str, Any], device: str, batch_size: int = 2048
) -> float:
    """Return by how many MiB one round raises this process's peak memory (or the GPU's)."""
    mdp = swiss_roll(steps, device)
    counts: dict[str, Any] = {"batch_size": batch_size, "n_critic": 2, "n_generator": 1}
    learner = agent(mdp, untrained(mdp), **counts, **options)
    return _rise(lambda: learner.learn(1), mdp.device)


def peak_of_gradient(kind: str, steps: int, device: str, batch_size: int = 1024) -> float:
    """Return by how many MiB one gradient by the levels raises this process's peak memory."""
    denoiser = _of_images(device)
    schedule = Schedule.karras(denoiser.process, steps)
    gradient = "eq14" if kind == "eq14" else "exact"
    agent = ScheduleLearning.without_data(
        denoiser, schedule, (1, 8, 8), gradient=gradient, batch_size=batch_size, batches=1, scale=1
    )
    batch = agent.make_batches()[0]

    def unrolled() -> None:
        start = batch.noise.clone().requires_grad_()
        end = agent.tableau.sample(denoiser, start)
        (end - batch.target).square().sum().backward()

    by_level = agent.slope if kind != "autograd through the unrolled chain" else None
    return _rise(unrolled if by_level is None else lambda: by_level(batch), agent.device)


def peak_of_learner(kind: str, steps: int, device: str, batch_size: int = 256) -> float:
    """Return by how many MiB a round of an agent with a few-step sampler raises the peak memory.

    Of solver learning times, factors and shifts are learned: weights themselves are K^2 numbers.
    """
    denoiser = _of_images(device)
    schedule, shape = Schedule.karras(denoiser.process, steps), (1, 8, 8)
    few: dict[str, Any] = {"batch_size": batch_size, "solver": "euler", "scale": 1}
    if kind == "SFD":
        sfd = SFD.without_data(
            denoiser, schedule, shape, **few, rounds=2, check=False, held_out_size=2
        )
        return _rise(lambda: sfd.learn(1), sfd.device)
    learner = SolverLearning.without_data(
        denoiser, schedule, shape, **few, batches=1, start="given", learn_weights=False
    )
    batches = learner.make_batches()[:1]
    return _rise(lambda: learner.slope(batches), learner.device)


def _of_images(device: str) -> Denoiser:
    """Return an untrained denoiser of images of 8 x 8 pixels, on EDM's process."""
    process = VE()
    body = ResidualMLP((1, 8, 8), time_range=time_range_of("edm", process))
    torch.nn.init.normal_(body.out.weight, std=0.01)
    return Denoiser(body, process, "edm").to(resolve_device(device))


def _rise(action: Callable[[], object], device: torch.device) -> float:
    """Return by how many MiB an action raises the peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if os.access(RESET, os.W_OK):
        # The first time loads code, too. Memory that is free but not given back would hide a part:
        # glibc gives back at once what is larger than this threshold (M_MMAP_THRESHOLD).
        ctypes.CDLL(None).mallopt(-3, 2**16)
        action()
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        before = _status("VmRSS")
        action()
        return (_status("VmHWM") - before) / 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MAXRSS


def _status(name: str) -> int:
    """Return a line of this process's status on Linux, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
