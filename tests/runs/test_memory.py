"""What is said of memory: it grows with the number of steps where the chain is unrolled, only."""

from __future__ import annotations

import pytest

from fewstep.agents import SFT, SFTPG
from fewstep.runs.speed.memory import peaks_of_gradient, peaks_of_learner, peaks_of_round

pytestmark = pytest.mark.slow  # each figure wants a fresh process


def test_memory_of_sft_grows_with_the_steps_and_that_of_sft_pg_by_its_trajectories():
    few, many = peaks_of_round(SFT, {}, "cpu")
    assert many > 4 * few
    few, many = peaks_of_round(SFTPG, {"minibatch_size": 20_480}, "cpu")
    trajectories = 4 * 2 * (101 - 11) * 2048 * 2 / 2**20
    # Beside the stored states: their times, and a margin for what an allocator keeps.
    assert many - few < 2 * trajectories + 10


def test_memory_of_the_exact_gradient_does_not_grow_with_the_steps():
    few, many = peaks_of_gradient("autograd through the unrolled chain", "cpu")
    assert many > 5 * few
    few, many = peaks_of_gradient("exact (adjoint)", "cpu")
    states = 4 * 64 * 1024 * (100 - 10) / 2**20
    assert many - few < 2 * states + 10


@pytest.mark.parametrize("kind", ["solver learning", "SFD"])
def test_memory_of_learning_a_few_step_sampler_grows_by_its_states_only(kind):
    few, many = peaks_of_learner(kind, "cpu")
    states = 4 * 64 * 256 * (100 - 10) / 2**20
    assert many - few < 2 * states + 10
