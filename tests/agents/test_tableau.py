"""The table of numbers, its JSON, and the one sampling loop."""

import json
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.variance_head import VarianceHead
from fewstep.envs import DiscreteVP

pytestmark = pytest.mark.numeric

TIMES = [1000.0, 700.0, 820.5, 300.0, 12.0, 0.0]


@pytest.fixture
def make_table(wave):
    """A made-up sampler with everything: history, anchors, a rising time, noise in two steps."""
    rng = np.random.default_rng(0)
    parts = {
        "name": "made up",
        "process": wave.process,
        "times": TIMES,
        "scale": rng.uniform(0.5, 1.5, 5),
        "weights": np.tril(rng.normal(size=(5, 5))) * (rng.random((5, 5)) < 0.7),
        "noise": np.array([0.3, 0, 0, 0.2, 0]),
        "anchors": np.array([0, 0, 0, 3, 1]),
        "current": np.array([0, 0.4, -0.7, 0, 0]),
    }
    return lambda **changes: Tableau(**{**parts, **changes})


def naive(table, denoiser, start, fresh):
    """The defining formula, one scalar at a time."""
    states, outputs = [start], []
    for j in range(table.steps):
        x = torch.from_numpy(states[j])
        t = torch.full((len(x),), table.times[j], dtype=torch.float64)
        output = denoiser.epsilon(x, t) if table.output == "epsilon" else denoiser.denoised(x, t)
        outputs.append(output.detach().numpy())
        new = table.scale[j] * states[int(table.anchors[j])] + table.current[j] * states[j]
        for k in range(j + 1):
            new = new + table.weights[j, k] * outputs[k]
        states.append(new + (table.noise[j] * fresh.pop(0) if table.noise[j] else 0))
    return np.stack(states)


@pytest.mark.parametrize("output", ["epsilon", "sample"])
def test_the_loop_is_the_formula(output, make_table, wave, generator):
    table = make_table(output=output)
    start = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    rng = generator(1)
    fresh = [torch.randn(3, 2, generator=rng, dtype=torch.float64).numpy() for _ in range(2)]
    with torch.no_grad():
        trajectory = table.sample(wave, start, generator=generator(1), return_trajectory=True)
        last = table.sample(wave, start, generator=generator(1))
    expected = naive(table, wave, start.numpy(), fresh)
    np.testing.assert_allclose(trajectory.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, trajectory[-1])


@pytest.fixture
def headed(make_denoiser):
    """A denoiser with a second head that says something."""
    denoiser = make_denoiser().double()
    denoiser.head = VarianceHead("sn", (2,), 32, convolutional=False, hidden=8).double()
    rng = torch.Generator().manual_seed(0)
    for parameter in denoiser.head.parameters():
        parameter.data.normal_(generator=rng)
    return denoiser


@pytest.fixture
def make_noisy(headed):
    """A one-step table with everything that fast DDPM samplers have, and a bare last step."""
    parts = {
        "name": "noisy",
        "process": headed.process,
        "times": [4.0, 2.5, 1.0, 0.5, 0.0],
        "scale": [0.5, 0.7, 0.9, 1.0],
        "weights": np.diag([0.3, 0.0, -0.2, 0.1]),
        "noise": [0.2, 0.0, 0.3, 0.0],
        "output": "sample",
        "clipped": [0.0, 0.8, 0.5, 0.0],
        "covariance": [0.6, 0.4, 0.0, 0.0],
        "cap": [np.inf, 0.3, 0.25, np.inf],
    }
    return lambda **changes: Tableau(**{**parts, **changes})


@torch.no_grad()
def test_clamped_predictions_and_the_noise_of_each_pixel(make_noisy, headed, generator):
    """The formula of the module, one row at a time, with what the denoiser says of each state."""
    table = make_noisy()
    start = 2 * torch.randn(300, 2, generator=generator(), dtype=torch.float64)
    states = table.sample(headed, start, generator=generator(1), return_trajectory=True)
    rng, bites = generator(1), 0
    for j, (z, after) in enumerate(pairwise(states)):
        prediction = headed.denoised(z, table.times[j])
        mean = table.scale[j] * z + table.weights[j, j] * prediction
        mean = mean + table.clipped[j] * prediction.clamp(-1, 1)
        cov0 = headed.outputs_with_covariance(z, table.times[j])[1]
        std = (table.noise[j] ** 2 + table.covariance[j] * cov0).sqrt()
        bites += int((std > table.cap[j]).sum()) + int((prediction.abs() > 1).sum())
        std = std.clamp(max=table.cap[j])
        fresh = torch.randn(z.shape, generator=rng, dtype=z.dtype) if j < 3 else torch.zeros(())
        torch.testing.assert_close(after, mean + std * fresh, rtol=1e-12, atol=1e-12)
    assert bites > 100
    assert cov0.std() > 0.01


def test_each_step_is_one_call_of_the_network(make_noisy, headed, count_calls, generator):
    calls = count_calls(headed.body)
    make_noisy().sample(headed, torch.ones(3, 2, dtype=torch.float64), generator=generator())
    assert len(calls) == 4


def test_gradients_are_finite_where_nothing_is_left_to_vary(make_noisy, headed, generator):
    """Cov0 = 0 and no other noise: a square root of zero, which must not spoil the gradient."""
    for parameter in headed.head.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(headed.head.layers[-1].bias, -800.0)  # factors of 0: h = 0 < epsilon^2
    start = torch.randn(5, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert not headed.outputs_with_covariance(start, 2.5)[1].any()
    make_noisy().sample(headed, start, generator=generator()).sum().backward()
    assert start.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in headed.parameters() if p.grad is not None)


def test_a_step_with_the_noise_of_each_pixel_has_to_be_told_it(make_noisy, headed, wave):
    state = torch.ones(1, 2, dtype=torch.float64)
    table = make_noisy()
    with pytest.raises(ValueError, match="get it from evaluate_with_std"):
        table.advance(0, [state], [state])
    headed.head = None
    with pytest.raises(ValueError, match=r"this denoiser has not.*VarianceLearning"):
        table.sample(headed, state)


@pytest.mark.parametrize(
    ("changes", "linear"),
    [
        ({}, False),
        ({"clipped": None}, False),
        ({"clipped": None, "covariance": None}, False),
        ({"clipped": None, "covariance": None, "noise": np.zeros(4)}, True),
        ({"clipped": None, "covariance": None, "cap": np.zeros(4)}, True),
        ({"noise": np.zeros(4), "covariance": None}, False),
    ],
)
def test_linear_tables_neither_draw_nor_clamp(changes, linear, make_noisy):
    assert make_noisy(**changes).linear == linear


def test_gradients_flow_to_the_network_and_the_start(make_table, wave, generator):
    start = torch.randn(3, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    make_table().sample(wave, start, generator=generator()).sum().backward()
    assert start.grad.abs().min() > 0
    assert wave.body.matrix.grad.abs().min() > 0


@pytest.mark.parametrize("anchored", [False, True])
def test_memory_does_not_grow_with_the_steps(anchored):
    """A two-step method keeps a few states alive at any time, however many steps it takes."""
    steps, alive, peak = 40, weakref.WeakSet(), []

    class Body(nn.Module):
        def forward(self, sample, time):
            alive.add(sample)
            peak.append(len(alive))
            return 0.1 * sample

    process = DiscreteVP.linear(1000)
    index = np.arange(steps)
    table = Tableau(
        "two-step",
        process,
        np.linspace(1000, 0, steps + 1),
        np.ones(steps),
        np.eye(steps) + np.eye(steps, k=-1),
        np.zeros(steps),
        anchors=index - index % 2 if anchored else None,  # pairs of steps from one state, as Heun
    )
    with torch.no_grad():
        table.sample(Denoiser(Body(), process), torch.ones(2, 2))
    assert len(peak) == steps
    assert max(peak) <= 4


def test_nfe_is_the_calls(make_table, wave, count_calls, generator):
    calls = count_calls(wave.body)
    table = make_table()
    table.sample(wave, torch.ones(2, 2, dtype=torch.float64), generator=generator())
    assert table.nfe == table.steps == len(calls) == 5
    assert calls.times == [t - 1 for t in TIMES[:-1]]  # the network's own time


def test_json_round_trip_is_exact(make_table, tmp_path):
    table = make_table(output="sample")
    table.save(tmp_path / "table.json")
    for again in (Tableau.from_json(table.to_json()), Tableau.load(tmp_path / "table.json")):
        for part in ("times", "scale", "weights", "noise", "anchors", "current"):
            np.testing.assert_array_equal(getattr(again, part), getattr(table, part))
        assert (again.name, again.output, again.process) == ("made up", "sample", table.process)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_json_has_no_infinity(make_noisy):
    text = make_noisy().to_json()
    assert json.loads(text)["cap"] == [None, 0.3, 0.25, None]
    again = Tableau.from_json(text)
    for part in ("clipped", "covariance", "cap"):
        np.testing.assert_array_equal(getattr(again, part), getattr(make_noisy(), part))


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"times": TIMES[:-1]}, "times has shape"),
        ({"scale": np.ones(4)}, "shape"),
        ({"scale": []}, "at least one step"),
        ({"weights": np.ones((5, 4))}, "weights has shape"),
        ({"noise": np.zeros((5, 1))}, "noise has shape"),
        ({"anchors": [0, 1, 2]}, "anchors has shape"),
        ({"scale": [1, 1, NAN, 1, 1]}, "scale holds NaN"),
        ({"times": [*TIMES[:-1], NAN]}, "times holds NaN"),
        ({"weights": np.diag([1, 1, INFINITY, 1, 1])}, "weights holds NaN or infinite"),
        ({"noise": [0, NAN, 0, 0, 0]}, "noise holds NaN"),
        ({"weights": np.ones((5, 5))}, "lower-triangular"),
        ({"weights": np.eye(5, k=2) * 1e-300}, "lower-triangular"),
        ({"noise": [0, 0, -1e-9, 0, 0]}, "negative"),
        ({"anchors": [0, 2, 2, 3, 4]}, "anchors"),
        ({"anchors": [0, -1, 2, 3, 4]}, "anchors"),
        ({"times": [1000.1, *TIMES[1:]]}, r"times must lie in \[0, 1000"),
        ({"times": [*TIMES[:-1], -0.1]}, "times must lie"),
        ({"output": "v"}, "unknown tableau output 'v'"),
        ({"current": np.zeros(4)}, "current has shape"),
        ({"current": [0, INFINITY, 0, 0, 0]}, "current holds NaN or infinite"),
        ({"current": np.ones(5)}, "current must be 0 where the anchor is the current state"),
        ({"clipped": np.ones(5)}, "clipped weighs predicted clean samples.*not 'epsilon'"),
        ({"clipped": np.ones(4), "output": "sample"}, "clipped has shape"),
        ({"covariance": [0, NAN, 0, 0, 0]}, "covariance holds NaN"),
        ({"covariance": [0, INFINITY, 0, 0, 0]}, "covariance holds NaN or infinite"),
        ({"covariance": [0, -0.1, 0, 0, 0]}, "covariance holds negative"),
        ({"cap": [1, -0.1, 1, 1, 1]}, "cap holds negative"),
        ({"cap": [1, NAN, 1, 1, 1]}, "cap holds NaN"),
        ({"cap": [1, -INFINITY, 1, 1, 1]}, "cap holds NaN or infinite"),
        ({"cap": np.ones(4)}, "cap has shape"),
    ],
)
def test_bad_tables_are_refused(changes, complaint, make_table):
    with pytest.raises(ValueError, match=complaint):
        make_table(**changes)


def test_a_truncated_file_is_refused_wherever_it_ends(make_table):
    text = make_table().to_json()
    for cut in (0, 1, 20, len(text) // 2, len(text.rstrip()) - 1):
        with pytest.raises(ValueError, match="not valid JSON"):
            Tableau.from_json(text[:cut])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": 7}, "version 7; this fewstep reads 1 to 6"),
        ({"version": None}, "version"),
        ({"format": "butcher"}, "format"),
        ({"weights": ...}, "lacks weights"),
        ({"scale": [1, NAN, 1, 1, 1]}, "has NaN, which is no number"),
        ({"scale": None}, "malformed"),
        ({"scale": 1.0}, "malformed"),
        ({"noise": {"0": 1}}, "malformed"),
        ({"noise": "none"}, "could not convert"),
        ({"cap": "none"}, "could not convert"),
        ({"cap": {"0": 1}}, "malformed"),
        ({"weights": 3}, "malformed"),
        ({"weights": [[[0, 1.0]]]}, r"weights has shape \(1, 1\), expected \(5, 5\)"),
        ({"weights": [[1.0] * 5] * 5}, "Row 0 of Tableau.weights must hold pairs"),
        ({"weights": [[[0.0, 1.0]]] * 5}, "Row 0 of Tableau.weights must hold pairs"),
        ({"weights": [[[0, True]]] * 5}, "Row 0 of Tableau.weights must hold pairs"),
        ({"weights": [[[0, 1.0], [0, 2.0]]] * 5}, "names output 0 twice in row 0"),
        ({"weights": [[[1, 1.0]]] * 5}, "lower-triangular"),
        ({"weights": [[[-1, 1.0]]] * 5}, "lower-triangular"),
        ({"weights": [[[0, 10**400]]] * 5}, "number of 401 digits"),
        ({"weights": [[[10**400, 1.0]]] * 5}, "number of 401 digits"),
        ({"weights": [[[0, NAN]]] * 5}, "NaN"),
        ({"process": {"kind": "Brownian"}}, "noise process"),
        ({"process": 3}, "malformed"),
    ],
)
def test_bad_json_is_refused(changes, complaint, make_table):
    table = {**json.loads(make_table().to_json()), **changes}
    table = {key: value for key, value in table.items() if value is not ...}
    with pytest.raises(ValueError, match=complaint):
        Tableau.from_json(json.dumps(table))


def test_older_versions_are_read_which_had_fewer_fields(make_table):
    table = json.loads(make_table().to_json())
    table["weights"] = make_table().weights.tolist()
    assert not {"clipped", "covariance", "cap"} & table.keys()
    again = Tableau.from_json(json.dumps({**table, "version": 2}))
    assert again.to_json() == make_table().to_json()
    del table["current"]
    again = Tableau.from_json(json.dumps({**table, "version": 1}))
    assert not again.current.any()


def test_further_entries_are_ignored(make_table):
    text = make_table().to_json(training={"lambdas": [[0.5], []]}, note="made by hand")
    assert json.loads(text)["training"] == {"lambdas": [[0.5], []]}
    assert Tableau.from_json(text).to_json() == make_table().to_json()


def test_json_that_is_no_table_is_refused():
    for text in ("[]", "3", "null", "{}"):
        with pytest.raises(ValueError, match="Not a tableau"):
            Tableau.from_json(text)
