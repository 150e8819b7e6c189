"""Speed of the rollouts that SFT-PG trains in, on a U-Net, against a bare loop of the same calls.

One process, the loops by turns, so that a busy machine slows all alike. On a GPU the CIFAR-10 U-Net
is timed in each precision, plain and compiled; on a CPU a small U-Net on MNIST's shape.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

from ...agents import Denoiser
from ...agents.denoisers.networks import SmallUNet
from ...agents.policy_gradient.buffer import Trajectories
from ...agents.policy_gradient.settings import Buffer
from ...agents.samplers.gaussian import GaussianChain
from ...agents.solvers import ancestral
from ...common.precision import Precision
from ...envs import DiffusionMDP, DiscreteVP, Schedule, Target
from ...envs.mdp import no_reward
from ..settings.train import resolve_device
from ..studies.tables import markdown
from .clock import by_turns

STEPS = 10


def rollout_speed(device: str) -> tuple[dict[str, Any], str]:
    """Time rollouts of ten steps, with each kind of buffer and precision."""
    where = resolve_device(device)
    name, shape, batch, body = _subject(where)
    process = DiscreteVP.linear(1000)
    schedule = Schedule.uniform(process, STEPS)
    tableau = ancestral(schedule, last_std=0.001)
    denoiser = Denoiser(body.to(where), process)
    chain = GaussianChain(denoiser, tableau).to(where)
    # An environment of this shape: what its samples are does not matter here.
    target = Target.from_samples(torch.zeros(1, *shape)).to(where)
    mdp = DiffusionMDP(target, process, schedule, no_reward)
    noise = torch.randn(batch, *shape, device=where)
    times = tableau.times[:-1].tolist()

    @torch.no_grad()
    def bare() -> None:
        sample = noise
        for t in times:
            sample = denoiser.epsilon(sample, t)

    def rollout(buffer: Buffer) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            mdp.rollout(chain, batch, recorder=Trajectories(STEPS, batch, where, buffer))

        return run

    buffers: dict[str, Buffer] = {"float32 buffer": "float32", "float16 buffer": "float16"}
    if where.type == "cuda":
        buffers["buffer on the CPU"] = "cpu"
    figures: dict[str, Any] = {}
    for label, precision, compiled in _ways(where):
        denoiser.run_with(precision, channels_last=where.type == "cuda", compile=compiled)
        loops = [bare, *(rollout(buffer) for buffer in buffers.values())]
        for loop in loops:  # compile and choose kernels
            loop()
        seconds = by_turns(loops, 20)
        plain = statistics.median(turn[0] for turn in seconds)
        for index, buffer in enumerate(buffers, 1):
            share = statistics.median(turn[0] / turn[index] for turn in seconds)
            figures[f"{label}, {buffer}"] = {"throughput": share, "bare_seconds": plain}
    frame = pd.DataFrame(figures).T
    shown = pd.DataFrame(
        {
            "calls a second, bare": (batch * STEPS / frame["bare_seconds"]).map("{:,.0f}".format),
            "rollout / bare loop": (100 * frame["throughput"]).map("{:.1f} %".format),
        }
    )
    return figures, markdown(shown, f"{name}, batch {batch}")


def _subject(device: torch.device) -> tuple[str, tuple[int, ...], int, torch.nn.Module]:
    """Choose the network by what the device can carry."""
    if device.type == "cuda":
        from ...agents.denoisers.networks import UNet2D

        return "CIFAR-10 U-Net", (3, 32, 32), 256, UNet2D((3, 32, 32), preset="cifar10")
    return "small U-Net, 28 x 28", (1, 28, 28), 64, SmallUNet((1, 28, 28))


def _ways(device: torch.device) -> list[tuple[str, Precision, bool]]:
    plain: list[tuple[str, Precision, bool]] = [("float32", "float32", False)]
    if device.type != "cuda":
        return plain
    return [
        *plain,
        ("bf16", "bf16", False),
        ("float32, compiled", "float32", True),
        ("bf16, compiled", "bf16", True),
    ]
