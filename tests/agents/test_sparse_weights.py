"""Tables keep the weights that are not zero, and none of the zeros."""

import copy
import json
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from fewstep.agents import Tableau
from fewstep.agents.samplers.sparse import SparseRows
from fewstep.agents.solvers import make_solver
from fewstep.envs import VE, DiscreteVP, Schedule

PROCESS = DiscreteVP.linear(1000)
SOLVERS = ("ddim", "heun", "ipndm", "deis", "dpm-solver-3", "dpm-solver++-3m")


def dense_sample(table, weights, denoiser, noise):
    """The loop over a matrix: every row reads what is not 0 in it, from the first output on."""
    states, outputs = [noise], []
    for j in range(table.steps):
        outputs.append(table.output_at(denoiser, states[j], float(table.times[j])))
        state = float(table.scale[j]) * states[int(table.anchors[j])]
        if table.current[j]:
            state = torch.add(state, states[j], alpha=float(table.current[j]))
        for k in range(j + 1):
            if weights[j, k]:
                state = torch.add(state, outputs[k], alpha=float(weights[j, k]))
        states.append(state)
    return states[-1]


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_matrix_bit_for_bit(solver, make_denoiser, generator):
    denoiser = make_denoiser()
    table = make_solver(solver, Schedule.uniform(denoiser.process, 8, end=0.5))
    weights = np.zeros((table.steps, table.steps))
    for j in range(table.steps):
        for k, weight in table.row(j).weights:
            weights[j, k] = weight
    np.testing.assert_array_equal(table.weights, weights)
    from_matrix = Tableau(
        "dense", table.process, table.times, table.scale, weights, table.noise, table.anchors,
        table.output, table.current,
    )  # fmt: skip
    assert from_matrix.sparse_weights == table.sparse_weights
    noise = torch.randn(20, 2, generator=generator())
    expected = dense_sample(table, weights, denoiser, noise)
    for one in (table, from_matrix, Tableau.from_json(table.to_json())):
        assert torch.equal(one.sample(denoiser, noise), expected)


def test_a_table_of_30_000_steps_takes_megabytes():
    """A kilobyte a step; a matrix of so many steps has 9e8 numbers."""
    schedule = Schedule.uniform(PROCESS, 30_000)
    tracemalloc.start()
    table = make_solver("ddim", schedule)
    unread = table.unread
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert [len(part) for part in unread] == [30_000, 30_000]
    assert table.one_step and table.linear
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        _ = table.weight


def test_the_file_of_1000_steps_holds_no_zeros():
    table = make_solver("ddim", Schedule.uniform(PROCESS, 1000))
    text = table.to_json()
    assert len(text) < 150e3
    tree = json.loads(text)
    assert tree["weights"][7] == [[7, table.weights[7, 7]]]
    assert not {"anchors", "current", "clipped", "covariance", "cap"} & tree.keys()


def test_what_later_steps_do_not_read_is_named_where_it_was_read_last():
    weights = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    anchors = np.array([0, 1, 2, 1])
    parts = {"scale": np.ones(4), "weights": weights, "noise": np.zeros(4)}
    table = Tableau("made up", VE(), [4, 3, 2, 1, 0], anchors=anchors, **parts)
    assert table.unread == ([[0], [], [2], [1, 3]], [[], [1], [0, 2], [3]])


def test_sparse_rows_in_any_order_without_zeros():
    rows = SparseRows.from_pairs([[(0, 2.0)], [(1, 0.0)], [(2, 3.0), (0, -1.0)]])
    expected = [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 3.0]]
    np.testing.assert_array_equal(rows.matrix(), expected)
    assert rows == SparseRows.from_matrix(np.array(expected))
    assert rows.pairs() == [((0, 2.0),), (), ((0, -1.0), (2, 3.0))]
    np.testing.assert_array_equal(rows.diagonal, [2.0, 0.0, 3.0])
    diagonal = SparseRows.from_diagonal(np.array([1.0, 0.0, 5.0]))
    np.testing.assert_array_equal(diagonal.matrix(), np.diag([1.0, 0.0, 5.0]))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_are_read_only_too(copied):
    table = make_solver("heun", Schedule.karras(VE(), 4))
    again = copied(table)
    assert again.to_json() == table.to_json()
    for array in (again.times, again.weights, again.scale, again.sparse_weights.values):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
