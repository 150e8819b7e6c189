"""What every test shares: the threads that a test process may take, and its random numbers."""

from __future__ import annotations

import os
import random
from typing import Any

import hypothesis
import pytest

# The same examples in each run, as of all else that is random here.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

# Each worker of pytest-xdist has a core of its own: more threads would wait for each other.
# This stands before any test imports torch, which reads the variable once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a person try other random numbers than the suite's own."""
    parser.addoption("--seed", type=int, default=0, help="of the tests' global random numbers")


def _seed(config: pytest.Config) -> None:
    import numpy
    import torch

    seed = config.getoption("--seed")
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(seed)


# A network that a test does not seed itself is the same in each run: what passes once passes again.
# Modules are seeded, too, as they make what their tests are parametrised by.
def pytest_collectstart(collector: pytest.Collector) -> None:
    """Give each module the same random numbers, whatever was collected before it."""
    _seed(collector.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test the same random numbers, its fixtures included, whatever ran before it."""
    _seed(item.config)


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every `learn` end after two rounds or rollouts, ours and Stable-Baselines3's.

    What has learned nothing is scored with few samples.
    """
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

    from fewstep import critics
    from fewstep.agents import Agent

    ours, theirs = Agent.learn, OnPolicyAlgorithm.learn
    score = critics.evaluate

    def learn(agent: Agent, total_timesteps: int | None = None, **options: Any) -> Agent:
        calls = agent.timesteps_per_round
        if calls is not None:  # the others count as they go; their examples are short themselves
            total_timesteps = min(total_timesteps or 2 * calls, 2 * calls)
        return ours(agent, total_timesteps, **options)

    def learn_theirs(model: Any, total_timesteps: int, *rest: Any, **options: Any) -> Any:
        short = 2 * model.n_steps * model.n_envs
        return theirs(model, min(total_timesteps, short), *rest, **options)

    def evaluate(sampler: Any, target: Any, n: int = 500, **options: Any) -> Any:
        return score(sampler, target, min(n, 500), **options)

    monkeypatch.setattr(critics, "evaluate", evaluate)
    monkeypatch.setattr(Agent, "learn", learn)
    monkeypatch.setattr(OnPolicyAlgorithm, "learn", learn_theirs)
