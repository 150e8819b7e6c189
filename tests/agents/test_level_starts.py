"""Starts of learned times without a gradient: GITS's chords, DMN's bound, and Align Your Steps'."""

import itertools
import math

import numpy as np
import pytest
import torch
from schedule_worlds import EDM, VP, known, world
from torch import nn

from fewstep.agents import Denoiser, ScheduleLearning, SolverLearning
from fewstep.agents.solver_learning.scheduling.aligned import bound_of_steps, denoised_changes
from fewstep.agents.solver_learning.scheduling.levels import noise_levels
from fewstep.agents.solver_learning.scheduling.programmes import cheapest_path, chord_deviations
from fewstep.agents.solver_learning.scheduling.rollout import Path
from fewstep.envs import RectifiedFlow, Schedule
from fewstep.envs.schedules.dmn import error_bound, multistep_weights, optimal_log_snrs

numeric = pytest.mark.numeric
QUICK = {"batch_size": 10, "batches": 1, "scale": 2, "check_teacher": False}


# ------------------------------------------------------------------------------------ GITS


@pytest.mark.parametrize("growth", [1.0, 1.15, 3.0])
def test_later_steps_count_more(growth):
    cost = np.random.default_rng(0).uniform(-0.1, 1, (7, 7))
    path = cheapest_path(cost, 4, growth)

    def total(nodes):
        return sum(growth**n * cost[i, j] for n, (i, j) in enumerate(itertools.pairwise(nodes)))

    every = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), 2)]
    assert tuple(path) == min(every, key=total)


@numeric
def test_deviations_from_the_chord_are_distances_from_a_line():
    """Of every jump, with the angle at the trajectory's end in the place of a projection."""
    source = torch.Generator().manual_seed(0)
    states = torch.randn(5, 4, 3, generator=source, dtype=torch.float64)
    outputs = torch.randn(4, 4, 3, generator=source, dtype=torch.float64)
    levels = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    found = chord_deviations(Path(levels, list(states), list(outputs)))

    def away(point, sample):
        end = states[-1, sample]
        leg, chord = point - end, states[0, sample] - end
        cosine = (leg @ chord) / (leg.norm() * chord.norm())
        return float(leg.norm() * (1 - cosine**2).sqrt())

    for i, j in itertools.combinations(range(5), 2):
        jumps = states[i] + (levels[j] - levels[i]) * (states[i] - outputs[i]) / levels[i]
        wanted = sum(away(jumps[n], n) for n in range(4))
        wanted -= sum(away(states[j, n], n) for n in range(4)) if j < 4 else 0.0
        assert float(found[i, j]) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


# ------------------------------------------------------------------------------------- DMN


def by_quadrature(log_snrs):
    """Integrals of e^l times Lagrange's polynomials, by Gauss and Legendre."""
    n = len(log_snrs) - 1
    points, shares = np.polynomial.legendre.leggauss(20)
    found = np.zeros((n, n))
    for s in range(n):
        order = 1 if s in (0, n - 1) else 2 if s in (1, n - 2) else 3
        nodes = log_snrs[s - order + 1 : s + 1]
        low, high = log_snrs[s], log_snrs[s + 1]
        at = low + (high - low) * (points + 1) / 2
        for k, node in enumerate(nodes):
            others = np.delete(nodes, k)
            basis = np.prod([(at - other) / (node - other) for other in others], axis=0)
            found[s, s - order + 1 + k] = (shares * np.exp(at) * basis).sum() * (high - low) / 2
    return found


def bound_again(log_snrs):
    """The published code's bound: the first three steps and the last by themselves."""
    square = np.exp(-2 * log_snrs[:-1])
    parts = by_quadrature(log_snrs) * square / np.sqrt(1 + square) / np.exp(log_snrs[-1])
    alone = [s for s in range(len(parts)) if s < 3 or s == len(parts) - 1]
    rest = [s for s in range(len(parts)) if s not in alone]
    return np.sqrt((parts[alone] ** 2).sum(1)).sum() + np.abs(parts[rest].sum(0)).sum()


@numeric
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_bound_of_dmn_is_that_of_lagrange_polynomials(count):
    gaps = np.random.default_rng(count).uniform(0.5, 2, count)
    log_snrs = np.concatenate([[-4.0], -4 + gaps.cumsum()])
    given = torch.from_numpy(log_snrs)
    torch.testing.assert_close(
        multistep_weights(given), torch.from_numpy(by_quadrature(log_snrs)), rtol=1e-10, atol=1e-12
    )
    assert float(error_bound(given)) == pytest.approx(bound_again(log_snrs), rel=1e-10)
    torch.autograd.gradcheck(error_bound, given.requires_grad_(), eps=1e-6, rtol=1e-5)


@numeric
def test_dmn_is_a_minimum_that_a_trust_region_finds_too():
    optimize = pytest.importorskip("scipy.optimize")
    start = np.linspace(-5, 4.6, 5)

    def value(inner):
        return bound_again(np.concatenate([start[:1], inner, start[-1:]]))

    ascending = np.eye(4, 3) - np.eye(4, 3, -1)
    low = np.array([start[0], 0, 0, -start[-1]])
    bounds = optimize.LinearConstraint(ascending, low, np.inf)
    found = optimize.minimize(value, start[1:-1], method="trust-constr", constraints=[bounds])
    ours = optimal_log_snrs(torch.from_numpy(start))
    # The trust region stops where steps are below 1e-8; the bound is flat there.
    np.testing.assert_allclose(ours[1:-1], found.x, atol=1e-3)
    assert float(error_bound(ours)) <= found.fun * (1 + 1e-6)


@pytest.mark.parametrize("process", [EDM, VP, RectifiedFlow()])
@pytest.mark.parametrize(("steps", "append_zero"), [(1, True), (2, True), (6, True), (6, False)])
def test_dmn_is_a_schedule_between_the_ends(process, steps, append_zero):
    schedule = Schedule.dmn(process, steps, append_zero=append_zero)
    times = schedule.times
    assert schedule.steps == steps and float(times[0]) == process.t_max
    if steps > 1 or not append_zero:
        assert float(times[-2 if append_zero else -1]) == process.t_min
    assert (float(times[-1]) == 0) == append_zero
    assert Schedule.from_config(schedule.to_config()).respaced(steps) == schedule
    if steps == 6:
        inner = times[1:-1] if append_zero else times[1:]
        even = Schedule.log_snr(process, steps, append_zero=append_zero).times
        even = even[1:-1] if append_zero else even[1:]
        ends = [process.log_snr(t).clamp_min(-5.1) for t in (times[:1], times[:1])]
        bounds = [
            float(error_bound(torch.cat([end, process.log_snr(part)])))
            for end, part in zip(ends, (inner, even), strict=True)
        ]
        assert bounds[0] < 0.9 * bounds[1]


# ------------------------------------------------------------------------------- Align Your Steps

STD = 0.7


class Normal(nn.Module):
    """The exact denoiser of normal data of standard deviation STD, on EDM's levels."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, sample, time):
        return sample * STD**2 / (STD**2 + time.view(-1, 1).square())


def own_error(levels):
    """E ||D - x||^2 of a coordinate."""
    return STD**2 * levels.square() / (STD**2 + levels.square())


@numeric
def test_an_exact_denoiser_changes_by_how_much_its_error_grows():
    denoiser = Denoiser(Normal(), EDM, "sample")
    levels = torch.tensor([20.0, 3.0, 1.0, 0.4, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    count, dimension = 4000, 4
    clean = STD * torch.randn(count, dimension, generator=generator)
    found = denoised_changes(denoiser, levels, levels, clean, generator)
    errors = dimension * own_error(levels)
    wanted = (errors[:, None] - errors[None, :]).abs()
    # A sum of count * dimension squares of normal numbers: five standard deviations, and rounding
    # where a level is compared with itself.
    chance = 5 * wanted * math.sqrt(2 / (count * dimension)) + 1e-12 * errors.max()
    assert bool(((found - wanted).abs() <= chance).all())


@numeric
def test_the_bound_is_the_integral_and_its_minimum_that_of_calculus():
    """For normal data many steps are best even in log(l^2 / (STD^2 + l^2))."""
    levels = torch.logspace(2, -2, 400, dtype=torch.float64)
    errors = own_error(levels)
    cost = bound_of_steps((errors[:, None] - errors[None, :]).abs(), levels).numpy()

    def exact(high, low):
        # int (m(high) - m(l)) / l^3 dl, with m / l^3 = s^2 / (l (s^2 + l^2)).
        def whole(level):
            return 0.5 * math.log(level**2 / (STD**2 + level**2))

        square = (1 / low**2 - 1 / high**2) / 2
        return float(own_error(torch.tensor(high))) * square - (whole(high) - whole(low))

    for i, j in ((0, 399), (10, 200), (150, 300)):
        wanted = exact(float(levels[i]), float(levels[j]))
        assert cost[i, j] == pytest.approx(wanted, rel=1e-3)

    def total(nodes):
        return sum(cost[i, j] for i, j in itertools.pairwise(nodes))

    nodes = cheapest_path(cost, 25)
    place = (levels.square() / (STD**2 + levels.square())).log()
    even = torch.linspace(float(place[0]), float(place[-1]), 25, dtype=torch.float64)
    by_calculus = [int((place - value).abs().argmin()) for value in even]
    assert total(nodes) <= total(by_calculus)
    assert total(nodes) > 0.9 * total(by_calculus)


# ------------------------------------------------------------------------------------ as starts


@pytest.mark.parametrize("start", ["gits", "ays", "dmn"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedule_and_solver_learning_start_there(start):
    denoiser, _ = known()
    schedule = Schedule.karras(EDM, 5)
    agent = ScheduleLearning(
        world(schedule), denoiser, start=start, gradient="none", tuning_rounds=0, **QUICK
    ).learn()
    found = agent._descent.stage.found
    levels = agent._descent._map.levels(found)
    torch.testing.assert_close(levels[[0, -1]], noise_levels(schedule)[[0, -1]])
    assert (levels.diff() < 0).all() and not torch.allclose(levels, noise_levels(schedule))
    if start == "dmn":
        torch.testing.assert_close(levels, noise_levels(Schedule.dmn(EDM, 5)), rtol=1e-6, atol=0)
    solver = SolverLearning(world(schedule), denoiser, start=start, rounds=1, **QUICK)
    *_, parameters = solver._starts()
    torch.testing.assert_close(solver.family.levels(parameters), levels, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"moves the times: it needs learn\.times"):
        SolverLearning(world(schedule), denoiser, start=start, learn_times=False)
