"""What training costs, measured: stepping overhead, where an iteration's time goes, fits, memory.

Each measurement returns its figures and a Markdown table; `fewstep benchmark overhead|profile|...`.
Ratios come from one process with the compared loops interleaved, since
the machine may be busy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ..agents import DODE, SFTPG
from ..agents.solvers import default_schedule
from ..envs.mdp import no_reward
from ..envs.processes.process import make_process
from ..envs.registration import make_mdp
from .memory import gradient_memory, memory
from .rollout_speed import rollout_speed
from .sampling_speed import by_turns, sampling
from .settings.train import resolve_device
from .subjects import swiss_roll, untrained
from .tables import table

# Of each kind, by turns.
EPISODES = 60


@dataclass(frozen=True)
class Measurement:
    """A measurement: its title and the function device -> (figures, Markdown table)."""

    title: str
    measure: Callable[[str], tuple[dict[str, Any], str]]


def overhead(device: str) -> tuple[dict[str, Any], str]:
    """Compare an episode of `DiffusionVectorEnv` with a bare loop of the same network calls.

    4096 environments, the swiss-roll MLP, K = 10; once with a reward that costs nothing, so that
    the stepping alone is measured, once with the default reward, paid by the environment only.
    """
    where = resolve_device(device)
    figures: dict[str, Any] = {}
    rows = []
    for label, reward in (("free reward", no_reward), ("default reward (MMDCritic)", None)):
        ratio, (bare, stepped) = episode_times(where, reward)
        figures[label] = {"ratio": ratio, "bare_seconds": bare, "env_seconds": stepped}
        rows.append([label, f"{1e3 * bare:.1f}", f"{1e3 * stepped:.1f}", f"{ratio:.3f}"])
    head = ["4096 environments, K = 10", "bare loop (ms)", "environment (ms)", "ratio"]
    return figures, table(head, rows)


def episode_times(
    device: torch.device, reward: Callable[[Tensor], Tensor] | None
) -> tuple[float, tuple[float, float]]:
    """Time a bare loop and an environment's episode by turns; see `interleaved`."""
    env = gym.make_vec(
        "fewstep/SwissRoll-v0",
        num_envs=4096,
        steps=10,
        device=device,
        reward=reward,
        autoreset_mode="DISABLED",
    )
    mdp = env.unwrapped.mdp  # type: ignore[attr-defined]
    denoiser = untrained(mdp)
    times = mdp.schedule.times.tolist()[:-1]
    generator = torch.Generator(device).manual_seed(0)

    @torch.no_grad()
    def bare() -> None:
        sample = mdp.initial(4096, generator)
        for t in times:
            sample = denoiser.epsilon(sample, t)

    @torch.no_grad()
    def stepped() -> None:
        observation, _ = env.reset()
        for t in times:
            observation, *_ = env.step(denoiser.epsilon(observation["sample"], t))

    return interleaved(bare, stepped, EPISODES)


def interleaved(
    first: Callable[[], None], second: Callable[[], None], repeats: int
) -> tuple[float, tuple[float, float]]:
    """Time two functions by turns; return the median ratio second / first and both medians."""
    samples = by_turns([first, second], repeats)
    medians = statistics.median(a for a, _ in samples), statistics.median(b for _, b in samples)
    return statistics.median(b / a for a, b in samples), medians


def profile(device: str) -> tuple[dict[str, Any], str]:
    """Measure the share of SFT-PG's iteration that networks and optimisers take."""
    agent = SFTPG(swiss_roll(10, device), untrained(swiss_roll(10, device)))
    agent.learn(3 * agent.timesteps_per_round)
    with timed(agent) as seconds:
        began = time.perf_counter()
        agent.learn(20 * agent.timesteps_per_round, reset_num_timesteps=False)
        total = time.perf_counter() - began
    shares = {name: value / total for name, value in seconds.items()}
    shares["everything else"] = 1 - sum(shares.values())
    rows = [[name, f"{100 * share:.1f} %"] for name, share in shares.items()]
    return {"shares": shares, "seconds_per_round": total / 20}, table(["part", "share"], rows)


@contextmanager
def timed(agent: SFTPG) -> Iterator[dict[str, float]]:
    """Time the agent's network forward passes, backward passes and optimiser steps by hooks."""
    seconds = {"network forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    open_: dict[str, float] = {}
    handles: list[Any] = []

    def starts(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_[part] = time.perf_counter()

        return hook

    def ends(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seconds[part] += time.perf_counter() - open_[part]

        return hook

    critic: Any = agent.critic
    for module in (agent.denoiser.body, critic.network, critic.baseline):
        handles.append(module.register_forward_pre_hook(starts("network forward")))
        handles.append(module.register_forward_hook(ends("network forward")))
    for optimizer in (agent.optimizer, critic.optimizer):
        handles.append(optimizer.register_step_pre_hook(starts("optimizer")))
        handles.append(optimizer.register_step_post_hook(ends("optimizer")))
    backward = Tensor.backward

    def timed_backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        starts("backward")()
        backward(self, *args, **kwargs)
        ends("backward")()

    Tensor.backward = timed_backward  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def fitting(device: str) -> tuple[dict[str, Any], str]:
    """Time D-ODE fits of ten steps on the swiss roll, the teacher's network calls apart."""
    process = make_process("sigmoid-1000")
    mdp = make_mdp("SwissRoll", process=process, device=resolve_device(device), reward=no_reward)
    figures: dict[str, Any] = {}
    rows = []
    for solver in ("ddim", "ipndm", "dpm-solver-3", "heun"):
        where = mdp.with_schedule(default_schedule(solver, process, 10))
        agent = DODE(where, untrained(mdp), solver=solver, check_teacher=False)
        began = time.perf_counter()
        _ = agent.pool.batches
        teacher = time.perf_counter() - began
        agent.learn()
        total = time.perf_counter() - began
        calls = agent.teacher.tableau.nfe
        figures[solver] = {"teacher_calls": calls, "teacher": teacher, "fit": total - teacher}
        rows.append(
            [solver, str(agent.nfe), str(calls), f"{teacher:.3f}", f"{total - teacher:.3f}"]
        )
    head = ["solver, 10 steps", "calls", "teacher's calls", "teacher (s)", "all the rest (s)"]
    return figures, table(head, rows)


MEASUREMENTS: dict[str, Measurement] = {
    "overhead": Measurement("What stepping the vector environment adds to network calls", overhead),
    "profile": Measurement("Where an SFT-PG iteration spends its time", profile),
    "fitting": Measurement("What a D-ODE fit costs beside its teacher's calls", fitting),
    "rollout": Measurement("SFT-PG's rollout on a U-Net against a bare loop", rollout_speed),
    "sampling": Measurement("Our sampling loop, a bare loop and diffusers' schedulers", sampling),
    "memory": Measurement("Peak memory of a round at K = 10 and 100", memory),
    "gradient-memory": Measurement(
        "Peak memory of a schedule's gradient at K = 10 and 100", gradient_memory
    ),
}
