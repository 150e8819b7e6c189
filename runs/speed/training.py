"""What training costs: stepping an environment, where a round's time goes, a D-ODE fit.

Ratios come from one process with the compared loops interleaved, since the machine may be busy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function

from ...agents import DODE, SFTPG
from ...agents.solvers import default_schedule
from ...envs.mdp import no_reward
from ...envs.processes import make_process
from ...envs.registration import make_mdp
from ..settings.train import resolve_device
from ..studies.tables import markdown
from .clock import by_turns, now
from .subjects import swiss_roll, untrained

# Of each kind, by turns.
EPISODES = 60


def overhead(device: str) -> tuple[dict[str, Any], str]:
    """Compare an episode of `DiffusionVectorEnv` with a bare loop of the same network calls.

    4096 environments, the swiss-roll MLP, K = 10; once with a reward that costs nothing, so that
    the stepping alone is measured, once with the default reward, paid by the environment only.
    """
    where = resolve_device(device)
    figures: dict[str, Any] = {}
    for label, reward in (("free reward", no_reward), ("default reward (MMDCritic)", None)):
        ratio, (bare, stepped) = episode_times(where, reward)
        figures[label] = {"bare_seconds": bare, "env_seconds": stepped, "ratio": ratio}
    titles = {"bare_seconds": "bare loop (s)", "env_seconds": "environment (s)"}
    frame = pd.DataFrame(figures).T.rename(columns=titles)
    return figures, markdown(frame.map("{:.4f}".format), "4096 environments, K = 10")


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
    """Measure the share of SFT-PG's round that networks and optimisers take, by torch.profiler.

    Raises:
        ValueError: a GPU, where an operation's time on the CPU is that of its launch.
    """
    if resolve_device(device).type != "cpu":
        raise ValueError("This profile is of a CPU: give --device cpu.")
    agent = SFTPG(swiss_roll(10, device), untrained(swiss_roll(10, device)))
    agent.learn(3 * agent.timesteps_per_round)
    critic: Any = agent.critic
    handles = [
        handle
        for module in (agent.denoiser.body, critic.network, critic.baseline)
        for handle in _recorded(module)
    ]
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = now()
        agent.learn(ROUNDS * agent.timesteps_per_round, reset_num_timesteps=False)
        total = now() - began
    for handle in handles:
        handle.remove()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        for part, prefix in PARTS.items():
            if event.key.startswith(prefix):
                seconds[part] += event.cpu_time_total / 1e6
    shares = {part: value / total for part, value in seconds.items()}
    shares["everything else"] = 1 - sum(shares.values())
    frame = pd.DataFrame({"share": shares}).map(lambda share: f"{100 * share:.1f} %")
    return {"shares": shares, "seconds_per_round": total / ROUNDS}, markdown(frame, "part")


# Part of a round -> how the profiler's events of it begin.
FORWARD = "network forward"
PARTS = {
    FORWARD: FORWARD,
    "backward": "autograd::engine::evaluate_function",
    "optimizer": "Optimizer.step#",
}
ROUNDS = 10


def _recorded(module: torch.nn.Module) -> list[Any]:
    """Let the profiler record a module's forward passes; return the hooks' handles."""
    spans: list[record_function] = []

    def enter(*_: Any) -> None:
        spans.append(record_function(FORWARD))
        spans[-1].__enter__()

    def leave(*_: Any) -> None:
        spans.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def fitting(device: str) -> tuple[dict[str, Any], str]:
    """Time D-ODE fits of ten steps on the swiss roll, the teacher's network calls apart."""
    process = make_process("sigmoid-1000")
    mdp = make_mdp("SwissRoll", process=process, device=resolve_device(device), reward=no_reward)
    figures: dict[str, Any] = {}
    for solver in ("ddim", "ipndm", "dpm-solver-3", "heun"):
        where = mdp.with_schedule(default_schedule(solver, process, 10))
        agent = DODE(where, untrained(mdp), solver=solver, check_teacher=False)
        began = now()
        _ = agent.pool.batches
        teacher = now() - began
        agent.learn()
        total = now() - began
        calls = agent.teacher.tableau.nfe
        figures[solver] = {
            "calls": agent.nfe,
            "teacher_calls": calls,
            "teacher": teacher,
            "fit": total - teacher,
        }
    frame = pd.DataFrame(figures).T.map("{:.3g}".format)
    frame.columns = pd.Index(["calls", "teacher's calls", "teacher (s)", "all the rest (s)"])
    return figures, markdown(frame, "solver, 10 steps")
