"""What SolverLearning promises: exact gradients, the papers' families, and nothing worse."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from rounds import learn_rounds
from schedule_worlds import EDM, fresh_noise, known, network, short_world, truth, world
from torch import nn

from fewstep.agents import (
    DODE,
    RDPO,
    Denoiser,
    ScheduleLearning,
    SolverLearning,
    SolverPolicy,
    Tableau,
    TrainingDivergedError,
)
from fewstep.agents.presets import preset, preset_settings
from fewstep.agents.solver_learning.distillation.teacher import Teacher
from fewstep.agents.solver_learning.joint.family import TableFamily
from fewstep.agents.solver_learning.joint.features import SampleFeatures
from fewstep.agents.solver_learning.joint.losses import EndLoss
from fewstep.agents.solver_learning.joint.noise_form import in_noise_form
from fewstep.agents.solver_learning.joint.presets import SOLVER_PRESETS
from fewstep.agents.solver_learning.joint.settings import (
    LossSettings,
    SolverLearningSettings,
)
from fewstep.agents.solver_learning.joint.slopes import EndObjective
from fewstep.agents.solver_learning.joint.starts import Starts
from fewstep.agents.solver_learning.scheduling.pool import Batch, joined
from fewstep.agents.solvers import make_solver
from fewstep.common.checkpoint import CheckpointError
from fewstep.critics import ClassifierFeatures
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, RectifiedFlow, Schedule, Target
from fewstep.envs.mdp import no_reward

numeric = pytest.mark.numeric
SMALL = {"batch_size": 20, "batches": 2, "scale": 3, "check_teacher": False}
LBFGS = {**SMALL, "rounds": 2}
ADAM = {**SMALL, "optimizer": "adam", "rounds": 4, "check_interval": 2, "start": "given"}


class Smooth(nn.Module):
    """A small network in float64, smooth in its sample and in its time."""

    def __init__(self):
        super().__init__()
        source = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64))

        self.first, self.phase, self.last = drawn(2, 8), drawn(8), drawn(8, 2)

    def forward(self, sample, time):
        unit = sample / (1 + sample.square().sum(1, keepdim=True) / 4).sqrt()
        phase = (time.double() + 2).log().unsqueeze(1) * self.phase / 3
        return torch.tanh(unit @ self.first / 2 + phase) @ self.last / 3


# ----------------------------------------- the papers' solvers, written again, as autograd has them


def alpha_sigma(process, log):
    """At the logarithm of sigma / alpha."""
    if isinstance(process, VE):
        return torch.ones_like(log), log.exp()
    if isinstance(process, RectifiedFlow):
        return torch.sigmoid(-log), torch.sigmoid(log)
    return torch.sigmoid(-2 * log).sqrt(), torch.sigmoid(2 * log).sqrt()


def predicted(denoiser, x, log):
    """The predicted clean sample and noise, by the body's noise, or velocity on a flow."""
    process, (alpha, sigma) = denoiser.process, alpha_sigma(denoiser.process, log)
    time = {VE: sigma, RectifiedFlow: sigma}.get(type(process))
    if time is None:  # log abar = -t^2 (b1 - b0) / 2 - t b0
        b0, b1 = process.slowest, process.fastest
        time = (-b0 + (b0**2 - 4 * (b1 - b0) * alpha.log()).sqrt()) / (b1 - b0)
    answer = denoiser.body(x, time.expand(len(x)))
    if isinstance(process, RectifiedFlow):
        return x - sigma * answer, x + (1 - sigma) * answer
    return (x - sigma * answer) / alpha, answer


def clean(denoiser, x, log):
    """The predicted clean sample."""
    return predicted(denoiser, x, log)[0]


def softmax_levels(v, low, high):
    """Log levels by running sums of a softmax on the scale level^(1/7) (LD3's, on EDM's scale)."""
    shares = torch.cat([v, v.new_ones(1)]).softmax(0).cumsum(0)[:-1]
    low, high = (torch.tensor(end, dtype=v.dtype) for end in (low, high))
    inner = (low ** (1 / 7) + (high ** (1 / 7) - low ** (1 / 7)) * shares) ** 7
    return torch.cat([high[None], inner.flip(0), low[None]]).log()


def exponential_weights(logs, process, i, order):
    """DPM-Solver++ multistep: weights on D_i, D_{i-1}, ... of step i, by moments of e^lambda."""
    lambdas = -logs
    alpha, sigma = alpha_sigma(process, logs[i + 1])
    h = lambdas[i + 1] - lambdas[i]
    whole = alpha * -torch.expm1(-h)
    if order == 1:
        return whole[None]
    if order == 2:  # the published 2M: half the first difference
        r = (lambdas[i] - lambdas[i - 1]) / h
        return whole * torch.stack([1 + 1 / (2 * r), -1 / (2 * r)])
    # sigma int e^lambda (lambda - lambda_i)^n: exact for polynomials through three outputs.
    end = sigma * lambdas[i + 1].exp()
    moments = [whole]
    for n in range(1, 3):
        moments.append(end * h**n - n * moments[-1])
    places = torch.stack([lambdas[i - k] - lambdas[i] for k in range(3)])
    powers = torch.stack([places**n for n in range(3)])
    return torch.linalg.solve(powers, torch.stack(moments))


def gs(denoiser, parameters, units, x, ends, steps=5):
    """GS: base coefficients of DPM-Solver++ 3M at the learned times, plus what is learned."""
    process, zero = denoiser.process, torch.zeros(steps, steps)
    logs = softmax_levels(parameters["times"], *ends)
    change = units["weights"] * parameters.get("weights", zero)
    factor = units["factors"] * parameters.get("factors", zero[0])
    outputs = []
    for i in range(steps):
        shift = parameters["shifts"][i] if i else 0.0
        outputs.append(clean(denoiser, x, logs[i] + shift))
        weights = exponential_weights(logs, process, i, min(i + 1, 3, steps - i))
        ratio = alpha_sigma(process, logs[i + 1])[1] / alpha_sigma(process, logs[i])[1]
        x = (ratio + factor[i]) * x
        x = x + sum(w * outputs[i - k] for k, w in enumerate(weights))
        x = x + sum(change[i, k] * outputs[k] for k in range(i + 1))
    return x


def ld3(denoiser, parameters, x, ends, steps=5):
    """LD3 on DPM-Solver++ 2M: the times, and those that the network is told."""
    process, logs, before = denoiser.process, softmax_levels(parameters["times"], *ends), None
    for i in range(steps):
        now = clean(denoiser, x, logs[i] + (parameters["shifts"][i] if i else 0.0))
        weights = exponential_weights(logs, process, i, 2 if 0 < i < steps - 1 else 1)
        ratio = alpha_sigma(process, logs[i + 1])[1] / alpha_sigma(process, logs[i])[1]
        x = ratio * x + weights[0] * now + (weights[1] * before if len(weights) > 1 else 0)
        before = now
    return x


def bns(denoiser, parameters, units, start, x0, ends, steps=5):
    """BNS: x_{n+1} = a_n x_0 + sum_j b_nj u_j, all of a, b and the times free."""
    logs = softmax_levels(parameters["times"], *ends)
    a = start.scale + units["factors"] * parameters["factors"]
    b = start.weights + units["weights"] * parameters["weights"]
    x, outputs = x0, []
    for n in range(steps):
        outputs.append(clean(denoiser, x, logs[n]))
        x = a[n] * x0 + sum(b[n, j] * outputs[j] for j in range(n + 1))
    return x


def s4s(denoiser, parameters, given, x, ends, steps=5):
    """S4S(-Alt): x_{n+1} = a_n(t) x_n + b_n(t) sum_j c_nj D(x_j, t_j + xi_j), all c free."""
    process = denoiser.process
    logs = softmax_levels(parameters["times"], *ends) if "times" in parameters else given
    shifts, outputs = parameters.get("shifts", torch.zeros(steps)), []
    for n in range(steps):
        outputs.append(clean(denoiser, x, logs[n] + (shifts[n] if n else 0.0)))
        # c starts at the base solver's shares on the given times.
        start = exponential_weights(given, process, n, min(n + 1, 3, steps - n))
        start = (start / start.sum()).flip(0)
        c = torch.cat([start.new_zeros(n + 1 - len(start)), start])
        c = c + parameters["weights"][n, : n + 1]
        (_, sigma), (alpha_next, sigma_next) = (
            alpha_sigma(process, one) for one in logs[n : n + 2]
        )
        b = -alpha_next * torch.expm1(logs[n + 1] - logs[n])
        x = sigma_next / sigma * x + b * sum(c[j] * outputs[j] for j in range(n + 1))
    return x


# Of iPNDM's first steps: Adams and Bashforth's, on the newest output first.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def dyweight(denoiser, parameters, logs, x, steps=5):
    """DyWeight: y_{n+1} = y_n + (l_{n+1} - l_n) sum_j w_nj d_j in y = x / alpha, the sums free."""
    process, slopes, y = denoiser.process, [], x / alpha_sigma(denoiser.process, logs[0])[0]
    for n in range(steps):
        state = alpha_sigma(process, logs[n])[0] * y
        shift = parameters["shifts"][n] if n else 0.0
        slopes.append(predicted(denoiser, state, logs[n] + shift)[1])
        w = dict(enumerate(parameters["weights"][n, : n + 1]))
        for back, start in enumerate(ADAMS_BASHFORTH[min(n, 3)]):
            w[n - back] = w[n - back] + start
        step = logs[n + 1].exp() - logs[n].exp()
        y = y + step * sum(w[j] * slopes[j] for j in range(n + 1))
    return alpha_sigma(process, logs[-1])[0] * y


def ddss(denoiser, parameters, units, given, x, ends, steps=5):
    """DDSS without noise: x_{n+1} = a_n x_n + sum_j b_nj eps_j, a and b free from DDIM's on."""
    process, logs = denoiser.process, softmax_levels(parameters["times"], *ends)
    a = units["factors"] * parameters["factors"]
    b = units["weights"] * parameters["weights"]
    outputs = []
    for n in range(steps):
        outputs.append(predicted(denoiser, x, logs[n])[1])
        (alpha, _), (after, _) = (alpha_sigma(process, one) for one in given[n : n + 2])
        x = (after / alpha + a[n]) * x
        x = x + after * (given[n + 1].exp() - given[n].exp()) * outputs[n]
        x = x + sum(b[n, j] * outputs[j] for j in range(n + 1))
    return x


def stage_one(denoiser, parameters, x, ends, steps=5):
    """Huang's stage one: Euler's steps of dy/dl = (y - D) / l in y = x / alpha; the levels free."""
    process, logs = denoiser.process, softmax_levels(parameters["times"], *ends)
    y = x / alpha_sigma(process, logs[0])[0]
    for n in range(steps):
        state = alpha_sigma(process, logs[n])[0] * y
        slope = (y - clean(denoiser, state, logs[n])) / logs[n].exp()
        y = y + (logs[n + 1].exp() - logs[n].exp()) * slope
    return alpha_sigma(process, logs[-1])[0] * y


def unbiased(kernel, x, y):
    """MMD^2 by its definition, over all pairs of different samples."""
    n, m = len(x), len(y)
    own = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    real = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + real - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


KERNELS = {
    "kid": lambda a, b: ((a * b).sum() / len(a) + 1) ** 3,
    "mmd": lambda a, b: -(a - b).square().sum().sqrt(),
}
REAL = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, -1.1], [-1.2, -0.4]], dtype=torch.float64)


def opinion(samples, condition=None):
    """What a critic might say of samples."""
    return torch.tanh(samples @ torch.tensor([0.7, -1.3], dtype=samples.dtype))


PROCESSES = ["ve", "smooth", "flow"]


def objective_of(family, loss):
    """A preset's whole objective: with real samples, or a critic, where it has them."""
    real = REAL if loss.distance in KERNELS else None
    objective = EndObjective(family, EndLoss(loss, None, real), loss.adversarial)
    return objective, [opinion] if loss.adversarial else []


@pytest.fixture
def case(smooth_vp):
    """`case(process, preset)`: all that a gradient needs, at a random point of the parameters."""

    def make(name, which, **changes):
        process = {"ve": VE(0.002, 80.0), "smooth": smooth_vp, "flow": RectifiedFlow()}[name]
        times = {
            "ve": [80.0, 20.0, 5.0, 1.3, 0.2, 0.002],
            "smooth": [1.0, 0.71, 0.5, 0.3, 0.11, 1e-3],
            "flow": [0.99, 0.83, 0.6, 0.37, 0.2, 0.01],
        }[name]
        settings = preset_settings(
            SolverLearningSettings, preset("", "solver", which).agent, changes
        )
        predicts = "flow" if name == "flow" else "epsilon"
        denoiser, schedule = Denoiser(Smooth(), process, predicts), Schedule(process, times)
        family = TableFamily(
            lambda times: make_solver(settings.solver, times), schedule, settings.learn
        )
        source = torch.Generator().manual_seed(1)
        parameters = {
            key: value + 0.05 * torch.randn(value.shape, generator=source, dtype=value.dtype)
            for key, value in family.zeros().items()
        }
        noise, goal = torch.randn(2, 6, 2, generator=source, dtype=torch.float64)
        noise = noise * process.prior_std(times[0])
        objective, rest = objective_of(family, settings.loss)
        slope = objective.slope(denoiser, parameters, [Batch(noise, goal, goal)], *rest)
        levels = (-process.log_snr(schedule.times)).exp()[[-1, 0]].tolist()
        return denoiser, family, parameters, noise, goal, slope, levels

    return make


def assert_same_slope(slope, reference, leaves, noise, goal, loss=None, lifted=0.0):
    """Compare loss and all derivatives with autograd's through the unrolled chain, to 1e-9.

    `loss` is the mean square if not given; `lifted` is what the critic's part takes off it.
    """
    loss = (reference - goal).square().mean() if loss is None else loss
    gradients = torch.autograd.grad(loss - lifted, [*leaves.values(), noise])
    assert slope.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    for name, expected in zip(leaves, gradients, strict=False):
        assert expected.abs().max() > 0
        worst = (slope.gradient[name] - expected).abs().max() / expected.abs().max()
        assert float(worst) <= 1e-9, name
    by_noise = len(noise) * gradients[-1]
    torch.testing.assert_close(slope.rollouts[0].by_noise, by_noise, rtol=1e-9, atol=1e-12)


def given_logs(family):
    return -family.given.process.log_snr(family.given.times)


def leaves_of(parameters, noise):
    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    return leaves, noise.clone().requires_grad_()


@numeric
@pytest.mark.parametrize("name", PROCESSES)
def test_gs_is_the_paper_s_family_with_its_gradient(name, case):
    denoiser, family, parameters, noise, goal, slope, ends = case(name, "gs")
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times", "factors", "weights", "shifts"}
    reference = gs(denoiser, leaves, family.units, start, ends)
    assert_same_slope(slope, reference, leaves, start, goal)


@numeric
@pytest.mark.parametrize("name", PROCESSES)
def test_ld3_is_the_paper_s_family_with_its_gradient(name, case):
    denoiser, _, parameters, noise, goal, slope, ends = case(name, "ld3", solver="dpm-solver++-2m")
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times", "shifts"}
    assert_same_slope(slope, ld3(denoiser, leaves, start, ends), leaves, start, goal)


@numeric
@pytest.mark.parametrize("name", PROCESSES)
def test_bns_is_the_paper_s_family_with_its_gradient(name, case):
    denoiser, family, parameters, noise, goal, slope, ends = case(name, "bns")
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times", "factors", "weights"}
    base = in_noise_form(make_solver("euler", family.given))
    table = base.replace(name="as tensors")
    numbers = type("Numbers", (), {})()
    numbers.scale, numbers.weights = (torch.tensor(x) for x in (table.scale, table.weights))
    reference = bns(denoiser, leaves, family.units, numbers, start, ends)
    assert_same_slope(slope, reference, leaves, start, goal)


@numeric
@pytest.mark.parametrize("name", PROCESSES)
def test_gas_is_the_paper_s_family_with_its_gradient(name, case):
    """GS's solver; pseudo-Huber distance, less a tenth of what the critic thinks of the samples."""
    denoiser, family, parameters, noise, goal, slope, ends = case(name, "gas")
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times", "factors", "weights", "shifts"}
    reference = gs(denoiser, leaves, family.units, start, ends)
    loss = (((reference - goal).square().mean(1) + 0.03**2).sqrt() - 0.03).mean()
    lifted = 0.1 * opinion(reference).mean()
    assert_same_slope(slope, reference, leaves, start, goal, loss, lifted)


@numeric
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(
    ("which", "learned"),
    [
        ("s4s", {"weights", "shifts"}),
        ("s4s-alt", {"times", "weights", "shifts"}),
        ("dyweight", {"weights", "shifts"}),
    ],
)
def test_shares_are_the_papers_families_with_their_gradient(which, learned, name, case):
    """S4S and S4S-Alt of an exponential solver, DyWeight of iPNDM."""
    denoiser, family, parameters, noise, goal, slope, ends = case(name, which)
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == learned
    given = given_logs(family)
    if which == "dyweight":
        reference = dyweight(denoiser, leaves, given, start)
    else:
        reference = s4s(denoiser, leaves, given, start, ends)
    assert_same_slope(slope, reference, leaves, start, goal)


@numeric
@pytest.mark.parametrize("distance", KERNELS)
@pytest.mark.parametrize("name", PROCESSES)
def test_ddss_is_the_paper_s_family_with_its_gradient(name, distance, case):
    """With the paper's kernel, and with the other distance of distributions."""
    denoiser, family, parameters, noise, goal, slope, ends = case(name, "ddss", distance=distance)
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times", "factors", "weights"}
    reference = ddss(denoiser, leaves, family.units, given_logs(family), start, ends)
    loss = unbiased(KERNELS[distance], reference, REAL)
    assert_same_slope(slope, reference, leaves, start, goal, loss)


@numeric
@pytest.mark.parametrize("name", PROCESSES)
def test_stage_one_is_the_paper_s_family_with_its_gradient(name, case):
    denoiser, _, parameters, noise, goal, slope, ends = case(name, "stage-one")
    leaves, start = leaves_of(parameters, noise)
    assert set(leaves) == {"times"}
    assert_same_slope(slope, stage_one(denoiser, leaves, start, ends), leaves, start, goal)


@numeric
def test_stage_one_descends_what_schedule_learning_descends():
    """The same loss per coordinate, and the same gradient by the levels, down to the last one."""
    mdp, (denoiser, _) = world(Schedule.karras(EDM, 6, append_zero=False)), known()
    settings = {"batch_size": 20, "batches": 1, "scale": 5, "check_teacher": False}
    ours = SolverLearning.for_environment(mdp, denoiser, preset="stage-one", **settings)
    settings |= {"start": "environment", "tuning_rounds": 0}
    theirs = ScheduleLearning(mdp, denoiser, **settings)
    assert ours.base.to_json() == theirs.tableau.to_json()
    (batch, *_), (other, *_) = ours.make_batches(), theirs.make_batches()
    assert torch.equal(batch.noise, other.noise)
    torch.testing.assert_close(batch.finished, other.target)
    slope, wanted = ours.slope([batch]), theirs.slope(other)
    assert slope.loss == pytest.approx(wanted.loss / 2, rel=1e-6)
    times = ours.family.zeros()["times"].requires_grad_()
    levels = ours.family._map.levels(times)
    (by_times,) = torch.autograd.grad(levels, times, wanted.gradient / 2)
    torch.testing.assert_close(slope.gradient["times"], by_times, rtol=1e-5, atol=1e-9)


@numeric
@pytest.mark.parametrize(
    ("which", "changes"),
    [
        *((which, {}) for which in ("gas", "ddss", "s4s-alt", "dyweight")),
        *(
            pytest.param(which, changes, marks=pytest.mark.slow)
            for which, changes in (
                ("ddss", {"distance": "mmd"}),
                ("gas", {"learn_times": True, "solver": "unipc-2"}),
                ("s4s", {"learn_times": True, "solver": "ipndm"}),
                ("dyweight", {"learn_times": True, "solver": "heun"}),
            )
        ),
    ],
)
def test_gradients_are_differences_of_the_loss(which, changes, case):
    """With every distance and the critic, in all forms, and for any base solver."""
    denoiser, family, parameters, noise, goal, slope, _ = case("smooth", which, **changes)
    told = preset_settings(SolverLearningSettings, preset("", "solver", which).agent, changes)
    (objective, rest), batch = objective_of(family, told.loss), Batch(noise, goal, goal)

    def moved(name, index, distance):
        changed = parameters[name].clone()
        changed.view(-1)[index] += distance
        found = objective.slope(denoiser, {**parameters, name: changed}, [batch], *rest)
        lifted = told.loss.adversarial * float(opinion(found.rollouts[0].ends).mean())
        return found.loss - lifted

    for name, value in slope.gradient.items():
        index = {"weights": family.reference.steps}.get(name, 1)  # below the diagonal
        h = 1e-3
        ours = float(value.view(-1)[index])
        inner = 8 * (moved(name, index, h) - moved(name, index, -h))
        outer = moved(name, index, 2 * h) - moved(name, index, -2 * h)
        size = float(value.abs().max())
        assert ours == pytest.approx((inner - outer) / (12 * h), abs=2e-8 * size), name


def test_presets_switch_on_what_their_papers_learn():
    learned = {
        "gs": ("times", "factors", "weights", "shifts"),
        "gas": ("times", "factors", "weights", "shifts"),
        "ld3": ("times", "shifts"),
        "bns": ("times", "factors", "weights"),
        "s4s": ("weights", "shifts"),
        "s4s-alt": ("times", "weights", "shifts"),
        "ddss": ("times", "factors", "weights"),
        "dyweight": ("weights", "shifts"),
        "stage-one": ("times",),
        "times": ("times",),
    }
    forms = {"bns": ("noise", "free"), "ddss": ("steps", "free")}
    forms |= dict.fromkeys(("s4s", "s4s-alt", "dyweight"), ("steps", "shares"))
    assert set(learned) == set(SOLVER_PRESETS)
    for name, switches in learned.items():
        told = preset_settings(SolverLearningSettings, preset("MNIST", "solver", name).agent, {})
        learn = told.learn
        on = [each for each in ("times", "factors", "weights", "shifts") if getattr(learn, each)]
        assert tuple(on) == switches
        assert (learn.form, learn.coefficients) == forms.get(name, ("steps", "added"))
        assert (told.loss.ball > 0) == (name in ("ld3", "s4s", "s4s-alt"))
        assert (told.loss.adversarial > 0) == (name == "gas")
        assert (told.loss.distance == "kid") == (name == "ddss")
        assert (told.descent.alternate > 0) == (name == "s4s-alt")
        assert (told.descent.ema == 0.999) == (name in ("gs", "gas"))
    with pytest.raises(ValueError, match="did you mean 'ld3'"):
        preset("MNIST", "solver", "ld2")


@numeric
@pytest.mark.parametrize("solver", ["dpm-solver++-3m", "unipc-3", "heun", "ddim"])
def test_the_noise_form_is_the_same_sampler(solver, mixture, prior):
    process = VE(0.002, 80.0)
    table = make_solver(solver, Schedule.karras(process, 5))
    ours = in_noise_form(table)
    assert not ours.anchors.any()
    denoiser, noise = mixture(process), prior(process)
    samples, expected = ours.sample(denoiser, noise), table.sample(denoiser, noise)
    torch.testing.assert_close(samples, expected, rtol=1e-9, atol=1e-9)


@numeric
@pytest.mark.parametrize("distance", ["kid", "mmd"])
def test_distances_of_distributions_go_through_parts(distance, case, monkeypatch, generator):
    """Their gradient does not depend on how many samples are stored at once."""
    denoiser, family, parameters, noise, goal, _, _ = case("smooth", "gs")
    real = torch.randn(9, 2, generator=generator(3), dtype=torch.float64)
    objective = EndObjective(family, EndLoss(LossSettings(distance=distance), None, real))
    slopes = []
    for stored in (2**22, 48):
        where = "fewstep.agents.solver_learning.scheduling.rollout.STORED_NUMBERS"
        monkeypatch.setattr(where, stored)
        slopes.append(objective.slope(denoiser, parameters, [Batch(noise, goal, goal)]))
    for name, value in slopes[0].gradient.items():
        torch.testing.assert_close(slopes[1].gradient[name], value, rtol=1e-9, atol=1e-12)


@numeric
def test_a_gradient_is_the_same_for_batches_that_are_joined(case, generator, monkeypatch):
    """In their order, with their conditions, and in fewer batches of one size only."""
    denoiser, family, parameters, *_ = case("smooth", "gs")
    objective = EndObjective(family, EndLoss(LossSettings(), None, None))
    shape, source = (4, 5, 2), generator(3)
    noise, goal = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(2))
    apart = [Batch(x, y, y) for x, y in zip(noise, goal, strict=True)]
    slopes = [objective.slope(denoiser, parameters, each) for each in (apart, joined(apart))]
    assert [len(slope.rollouts) for slope in slopes] == [4, 1]
    assert slopes[1].loss == pytest.approx(slopes[0].loss, rel=1e-12)
    for name, value in slopes[0].gradient.items():
        torch.testing.assert_close(slopes[1].gradient[name], value, rtol=1e-10, atol=1e-13)
    asked = [batch._replace(condition=torch.full((5,), i)) for i, batch in enumerate(apart)]
    where = "fewstep.agents.solver_learning.scheduling.pool.JOINED_NUMBERS"
    for most, sizes in ((10**6, [20]), (39, [10, 10]), (9, [5] * 4)):
        monkeypatch.setattr(where, most)
        found = joined(asked)
        assert [len(batch.noise) for batch in found] == sizes
        assert torch.equal(torch.cat([batch.noise for batch in found]), noise.flatten(0, 1))
        conditions = torch.cat([batch.condition for batch in found])
        assert torch.equal(conditions, torch.arange(4).repeat_interleave(5))


def test_lbfgs_asks_small_samples_of_all_batches_together(monkeypatch):
    """A distance of distributions is one of each batch, and adam takes one batch a round."""
    asked, evaluate = [], Tableau.evaluate

    def counted(self, denoiser, x, *rest):
        asked.append(len(x))
        return evaluate(self, denoiser, x, *rest)

    mmd = {"distance": "mmd", "real_samples": 10}
    for settings, rows in ((LBFGS, 40), ({**LBFGS, **mmd}, 20), (ADAM, 20)):
        agent = SolverLearning(world(), known()[0], **{**settings, "start": "given"})
        batches = agent.make_batches()
        monkeypatch.setattr(Tableau, "evaluate", counted)
        asked.clear()
        agent._descent.update(agent._objective, agent.denoiser, batches[:2])
        monkeypatch.setattr(Tableau, "evaluate", evaluate)
        assert set(asked) == {rows}


# ------------------------------------------------------------------------------------- the agent


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("start", "rounds"), [("distilled", 1), pytest.param(None, 4, marks=pytest.mark.slow)]
)
def test_what_is_returned_is_far_better_than_what_was_given(start, rounds):
    denoiser, _ = known()
    mdp = world(Schedule.karras(EDM, 5))
    few = {"batch_size": 100, "batches": 2, "rounds": rounds, "check_teacher": False}
    agent = SolverLearning(mdp, denoiser, start=start, **few).learn()
    assert agent.returned == "learned"
    assert agent.errors["returned"] == agent.errors["learned"] < agent.errors["start"]
    noise = fresh_noise(EDM, n=500)
    goal = truth(denoiser, noise, agent.schedule)
    found, given = (
        float((table.sample(denoiser, noise) - goal).square().mean())
        for table in (agent.tableau, agent.base)
    )
    assert found < given / 10
    assert found == pytest.approx(agent.errors["returned"], rel=0.5)


@pytest.mark.parametrize(
    "name",
    [
        *("default", "gas", "ddss"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gs", "ld3", "bns", "s4s", "s4s-alt", "dyweight", "stage-one", "times")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_preset_learns_and_resumes_bit_for_bit(name, tmp_path, monkeypatch):
    changes = {**SMALL, "rounds": 4, "real_samples": 20, "batch_size": 6}
    changes |= {"start": "given"} | ({} if name == "default" else {"check_interval": 2})
    monkeypatch.setattr("fewstep.agents.solver_learning.joint.descent.ITERATIONS", 2)

    def make():
        return SolverLearning.for_environment(short_world(), known()[0], preset=name, **changes)

    whole = make().learn()
    part = learn_rounds(make(), 3)
    part.save(tmp_path / "agent.safetensors")
    body = copy.deepcopy(known()[0].body)
    again = SolverLearning.load(tmp_path / "agent.safetensors", short_world(), body=body)
    again.learn(reset_num_timesteps=False)
    assert whole.finished and again.finished
    assert again.tableau.to_json() == whole.tableau.to_json()
    assert (again.errors, again.losses, again.returned) == (
        whole.errors,
        whole.losses,
        whole.returned,
    )
    assert whole.losses["returned"] <= whole.losses["given"]


def test_a_start_that_errs_more_than_what_was_given_is_not_taken(monkeypatch):
    """Nor does a descent that finds nothing return it."""
    module = "fewstep.agents.solver_learning.joint.starts.distilled_tables"
    monkeypatch.setattr(
        module, lambda bases, *_: [base.replace(scale=2 * base.scale) for base in bases]
    )
    agent = SolverLearning(world(), known()[0], **SMALL, rounds=1)
    slope = agent.family.zeros()
    monkeypatch.setattr(
        agent._descent, "update", lambda *_: ({"loss": 1.0}, None) if _done(agent) else None
    )
    with pytest.warns(
        UserWarning, match=r"made dpm-solver..-3m no better beyond chance: it is kept"
    ):
        agent.learn()
    assert agent.returned == "given" and agent.tableau is agent.base
    assert agent.schedule is agent.mdp.schedule
    assert all(torch.equal(agent._kept[name], value) for name, value in slope.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_search_asks_one_teacher_for_the_states_of_all_grids(monkeypatch):
    """All schedules are tried on one trajectory of it, and the best three on one a batch."""
    asked = []
    passed = Teacher.passed

    def counted(self, denoiser, noise, device=None):
        asked.append(len(self.targets))
        return passed(self, denoiser, noise, device)

    agent = SolverLearning(world(), known()[0], **SMALL, rounds=1)
    agent.make_batches()
    monkeypatch.setattr(Teacher, "passed", counted)
    starts = Starts(agent.family, agent._build, agent._teacher_of, agent._pool, agent.denoiser)
    best = starts.best("search", agent._objective)
    steps, fitted = agent.base.steps, len(agent._pool.fitted)
    assert len(best) == 3 and len(asked) == 1 + fitted
    tried, *finalists = asked
    assert tried >= 13 * steps and finalists == [3 * steps] * fitted
    # The coefficients of a multistep solver are for steps that are alike.
    asked.clear()
    agent = SolverLearning(world(), known()[0], **SMALL, rounds=1, teacher="dpm-solver++-3m")
    starts = Starts(agent.family, agent._build, agent._teacher_of, agent._pool, agent.denoiser)
    agent.make_batches()
    asked.clear()
    starts.best("search", agent._objective)
    assert len(asked) >= 13 + 3 * fitted and set(asked) == {steps}


def _done(agent):
    agent._descent.updates += 1
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_table_with_other_times_for_the_network_is_exported(monkeypatch):
    monkeypatch.setattr("fewstep.agents.solver_learning.joint.descent.ITERATIONS", 2)
    agent = SolverLearning(short_world(), network(), **LBFGS).learn()
    table = agent.tableau
    assert table.asked_times is not None and table.asked_times[0] == table.times[0]
    text = table.to_json()
    assert json.loads(text)["version"] == 6
    again = Tableau.from_json(text)
    assert again.to_json() == text
    noise = 80 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = table.sample(agent.denoiser, noise)
        assert torch.equal(again.sample(agent.denoiser, noise), samples)
    # In an environment whose clock is that of the states.
    mdp = agent.mdp.with_schedule(agent.schedule)
    policy, state, sample = SolverPolicy(table, agent.denoiser, shape=(2,)), None, noise
    for time in mdp.schedule.times[:-1].tolist():
        observation = {"sample": sample.numpy(), "timestep": np.full((5, 1), time)}
        action, state = policy.predict(observation, state)
        sample = torch.from_numpy(action)
    torch.testing.assert_close(sample, samples)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pipeline_s_scheduler_asks_at_the_learned_times():
    from fewstep.agents.pretrained.scheduler import TableauScheduler

    process = DiscreteVP.linear(1000)
    table = make_solver("ddim", Schedule.trailing(process, 4))
    table = table.replace(asked_times=table.times[:-1] * np.array([1.0, 0.9123, 0.951, 1.1]))
    scheduler = TableauScheduler(json.loads(table.to_json()))
    expected = torch.tensor(table.asked_times - 1).float()
    torch.testing.assert_close(scheduler.timesteps, expected)
    # Image-to-image begins at the state's level, whatever the network is told.
    clean, level = torch.randn(3, 2).double(), process.levels(float(table.times[1]))
    noisy = scheduler.add_noise(clean, torch.ones(3, 2).double(), scheduler.timesteps[1:2])
    torch.testing.assert_close(noisy, level[0] * clean + level[1], rtol=0, atol=1e-9)
    denoiser = Denoiser(Smooth(), process)
    sample = noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for time in scheduler.timesteps:
            answer = denoiser.body(sample, time.double().expand(3))
            sample = scheduler.step(answer, time, sample).prev_sample
        torch.testing.assert_close(sample, table.sample(denoiser, noise), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ([1000.0, 700.0], r"shape \(2,\), expected \(4,\)"),
        ([1000.0, 700.0, 400.0, 0.0], r"lie in \(0, 1000"),
        ([1001.0, 700.0, 400.0, 10.0], r"lie in \(0, 1000"),
        ([1000.0, math.nan, 400.0, 10.0], r"lie in \(0, 1000"),
    ],
)
def test_times_that_no_denoiser_can_be_told(told, complaint):
    table = make_solver("ddim", Schedule.trailing(DiscreteVP.linear(1000), 4))
    with pytest.raises(ValueError, match=complaint):
        table.replace(asked_times=np.array(told))
    same = table.replace(asked_times=table.times[:-1])
    assert same.asked_times is None and json.loads(same.to_json())["version"] == 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_times_and_weights_are_learned_by_turns(optimizer):
    """Some rounds move the times and nothing else, as many others what those left alone."""
    preset, clock, rest = "default", {"times", "shifts"}, {"factors", "weights"}
    settings = {**ADAM, "optimizer": optimizer, "alternate": 1, "rounds": 3}
    if optimizer == "adam":
        settings |= {"alternate": 2, "rounds": 6}
        preset, rest = "s4s-alt", {"weights"}
    world, denoiser = short_world(), known()[0]
    agent = SolverLearning.for_environment(world, denoiser, preset=preset, **settings)
    seen = []

    def note(*_):
        seen.append({name: value.detach().clone() for name, value in agent._descent.live.items()})
        return True

    note()
    agent.learn(callback=note)
    moved = [
        {name for name in after if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(seen)
    ]
    turns = [clock] * settings["alternate"], [rest] * settings["alternate"]
    assert moved == [*turns[0], *turns[1], *turns[0]]


def test_a_ball_holds_its_noises():
    """They stay within the radius, and only better ones are kept."""
    settings = {**ADAM, "ball": 0.1, "ball_rate": 30.0, "rounds": 4}
    agent = SolverLearning(short_world(), known()[0], **settings)
    fitted = [batch.noise.clone() for batch in agent.make_batches()[:2]]
    agent.learn()
    radius = 0.1 * 80 * math.sqrt(2)
    moved = 0
    for noise, found in zip(fitted, agent._ball.noises, strict=True):
        away = (found - noise).norm(dim=1)
        assert float(away.max()) <= radius * (1 + 1e-5)
        moved += int((away > 0).sum())
    assert moved > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_critic_s_learning_rate_follows_its_schedule():
    critic = {"critic_lr_schedule": "linear", "critic_learning_rate": 0.4}
    agent = SolverLearning(short_world(), network(), adversarial=0.1, **critic, **ADAM)
    rates = []

    def note(_locals, _globals):
        rates.extend(group["lr"] for group in agent._critic.optimizer.param_groups)
        return True

    agent.learn(callback=note)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {f"learn_{name}": False for name in ("times", "factors", "weights", "shifts")}
            | {"start": "given"},
            "Nothing is left to learn",
        ),
        ({"solver": "ancestral"}, "learned from a deterministic one"),
        (
            {"learn_weights": False, "start": "distilled"},
            "start='distilled' is a change of the weights",
        ),
        ({"learn_times": False, "start": "search"}, "moves the times"),
        ({"learn_weights": False, "start": "given", "coefficients": "free"}, "needs learn.weights"),
        ({"ball": 0.1}, "loss.ball needs 'adam'"),
        ({"adversarial": 0.1}, "loss.adversarial needs 'adam'"),
        (
            {"adversarial": 0.1, "optimizer": "adam", "batches": 1},
            "batches must be at least 2, got 1",
        ),
        ({"ema": 0.9}, "descent.ema averages"),
        ({"ball": 0.1, "distance": "kid", "optimizer": "adam"}, "has no use for it"),
        (
            {"alternate": 3, "learn_weights": False, "learn_factors": False, "start": "given"},
            "takes turns",
        ),
        ({"solver": "consistency"}, "learned from a deterministic one"),
        ({"compared": "features"}, r"none of our own for samples of shape \(2,\)"),
        ({"distance": "l1"}, "distance"),
    ],
)
def test_settings_that_cannot_be(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        SolverLearning(world(), known()[0], **{**SMALL, **settings})


def test_too_few_calls_are_refused():
    two = world(Schedule(EDM, [80.0, 0.002]))
    with pytest.raises(ValueError, match="needs at least 3 network calls"):
        SolverLearning(two, known()[0], **SMALL)
    with pytest.raises(ValueError, match=r"are 2 noise levels.*no times are left to learn; take"):
        SolverLearning(two, known()[0], solver="ddim", **SMALL)
    one = world(Schedule(EDM, [80.0, 0.0]))
    with pytest.raises(ValueError, match=r"There is 1 noise level, and the first"):
        SolverLearning(one, known()[0], solver="ddim", **SMALL)
    SolverLearning(two, known()[0], solver="ddim", learn_times=False, **SMALL)
    shifts = {f"learn_{name}": False for name in ("times", "factors", "weights")}
    for kind in (SolverLearning, RDPO):
        with pytest.raises(ValueError, match="the first network call is told its own level"):
            kind(two, known()[0], solver="ddim", **shifts)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_single_jump_of_a_consistency_model_is_learned():
    """It adds no noise: one call has a factor and a weight to learn, and a teacher."""
    two = world(Schedule(EDM, [80.0, 0.002]))
    settings = {**SMALL, "batch_size": 200, "learn_times": False, "rounds": 2}
    agent = SolverLearning(two, known()[0], solver="consistency", **settings).learn()
    assert agent.returned != "given"
    assert agent.losses["returned"] < 0.6 * agent.losses["given"]  # .42 to .47 with six seeds


@pytest.mark.filterwarnings("ignore:Solver learning made:UserWarning")
def test_a_teacher_no_better_than_the_student_is_said():
    """Euler's steps, as many as the student's, have nothing to teach to a linear multistep."""
    settings = {**ADAM, "teacher": "euler", "scale": 1, "check_teacher": True}
    settings |= {"rounds": 1, "batch_size": 200}  # 1.2 times as much and more, with six seeds
    agent = SolverLearning(world(), known()[0], solver="ipndm", **settings)
    with pytest.warns(UserWarning, match=r"The teacher euler of 6 calls is no better than ipndm-4"):
        agent.learn()
    assert agent.errors["teacher"] > agent.errors["given"]


def test_data_are_needed_for_a_distance_to_them():
    denoiser = network()
    with pytest.raises(ValueError, match=r"distance=.kid. needs real samples"):
        SolverLearning.without_data(denoiser, Schedule.karras(EDM, 5), (2,), distance="kid")
    SolverLearning.without_data(denoiser, Schedule.karras(EDM, 5), (2,))


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"denoiser": None}, TypeError, "denoiser must be a Denoiser, got None"),
        ({"schedule": [80.0, 0.0]}, TypeError, r"schedule must be a Schedule, got \[80.0, 0.0\]"),
        ({"shape": 2}, TypeError, "shape must be a sequence of which each is a whole number"),
        (
            {"shape": (2, 0.5)},
            TypeError,
            "shape must be a sequence of which each is a whole number",
        ),
        ({"shape": (0,)}, ValueError, r"shape must have numbers of at least 1, got \(0,\)"),
    ],
)
@pytest.mark.parametrize("agent", [DODE, RDPO, ScheduleLearning, SolverLearning])
def test_bad_arguments_of_learning_without_data_are_refused(agent, changes, kind, complaint):
    usual = {"denoiser": network(), "schedule": Schedule.karras(EDM, 5), "shape": (2,)}
    with pytest.raises(kind, match=complaint):
        agent.without_data(**{**usual, **changes})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"optimizer": "adam"},
            ["descent.times_rate", "descent.coefficients_rate", "descent.shifts_rate"],
        ),
        (
            {"optimizer": "adam", "learn_times": False, "learn_shifts": False, "ball": 0.1},
            ["descent.coefficients_rate", "loss.ball_rate"],
        ),
        (
            {
                "optimizer": "adam",
                "adversarial": 0.1,
                "learn_factors": False,
                "learn_weights": False,
                "learn_shifts": False,
                "start": "given",
            },
            ["descent.times_rate", "critic.learning_rate"],
        ),
        ({}, []),
    ],
)
def test_what_to_lower_after_divergence_is_what_the_training_reads(settings, named):
    agent = SolverLearning(world(), known()[0], **{**SMALL, **settings})
    assert agent.step_sizes() == named


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_divergence_names_the_rates_that_act():
    settings = {"rounds": 5, "times_rate": 1e6, "learn_shifts": False}
    agent = SolverLearning(world(), known()[0], **{**ADAM, **settings})
    lower = r"Lower descent\.times_rate or descent\.coefficients_rate\. Checkpoints"
    with pytest.raises(TrainingDivergedError, match=lower):
        agent.learn()


def test_features_that_do_not_fit_are_refused():
    classifier = ClassifierFeatures("digits", (1, 8, 8), 10)
    classifier.freeze()
    with pytest.raises(ValueError, match=r"'digits' are of samples of shape \(1, 8, 8\)"):
        SampleFeatures(classifier, (1, 28, 28), "cpu")
    with pytest.raises(ValueError, match="do not take samples of shape"):
        SampleFeatures(nn.Linear(3, 4), (2,), "cpu")
    with pytest.raises(ValueError, match=r"must be \(N, d\)"):
        SampleFeatures(lambda x: x, (1, 8, 8), "cpu")
    with pytest.raises(ValueError, match="no gradient"):
        SampleFeatures(lambda x: x.detach().flatten(1), (2,), "cpu")
    with pytest.raises(TypeError, match=r"features 'function' must be a tensor .*got None"):
        SampleFeatures(lambda x: None, (2,), "cpu")
    with pytest.raises(ValueError, match=r"features 'function' do not take .*KeyError: 'layer'"):
        SampleFeatures(lambda x: {}["layer"], (2,), "cpu")
    with pytest.raises(ValueError, match=r"features 'function' hold NaN or infinity"):
        SampleFeatures(lambda x: x.flatten(1) * math.nan, (2,), "cpu")
    later = SampleFeatures(lambda x: x.flatten(1).log() if len(x) > 2 else x, (2,), "cpu")
    with pytest.raises(ValueError, match=r"features 'function' hold NaN or infinity"):
        later(torch.full((3, 2), -1.0))
    # What ran away is not the features' fault.
    assert later(torch.full((3, 2), -math.inf)).isnan().all()
    features = SampleFeatures(classifier, (1, 8, 8), "cpu")
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(features(images), classifier(images))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_samples_are_compared_in_features(monkeypatch):
    """The loss is the features' distance, and what is returned is chosen by it."""
    weights = torch.tensor([[3.0, 0.0]]).double()
    monkeypatch.setattr("fewstep.agents.solver_learning.joint.descent.ITERATIONS", 2)
    agent = SolverLearning(
        short_world(),
        known()[0],
        compared="features",
        features=lambda x: x.double() @ weights.T,
        **{**LBFGS, "start": "given"},
    ).learn()
    batches = agent.make_batches()[2:4]
    with torch.no_grad():
        missed = [agent.tableau.sample(agent.denoiser, b.noise) - b.finished for b in batches]
    expected = float((3 * torch.cat(missed)[:, 0].double()).square().mean())
    assert agent.losses["returned"] == pytest.approx(expected, rel=1e-5)


def test_a_training_goes_on_in_its_own_features(tmp_path):
    def make(weight):
        told = {**LBFGS, "start": "given", "compared": "features"}
        agent = SolverLearning(
            short_world(), known()[0], features=lambda x: weight * x.double(), **told
        )
        return learn_rounds(agent, 1) if weight == 3 else agent

    make(3).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="/agent was trained with other features than 'func"):
        make(2).resume(tmp_path / "agent")
    make(3.0).resume(tmp_path / "agent")


def test_whole_times_only_are_enough_where_no_time_is_learned():
    """A network that looks its time up in a table cannot be asked in between."""
    process = DiscreteVP.linear(10)
    target = Target.from_samples(torch.randn(50, 2))
    mdp = DiffusionMDP(target, process, Schedule.uniform(process, 5), no_reward)

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(10, 2)

        def forward(self, sample, time):
            return 0.1 * sample + self.rows(time)

    denoiser = Denoiser(Table(), process)
    settings = {**LBFGS, "learn_times": False, "learn_shifts": False, "teacher": "ddim"}
    advice = r"^Solver learning needs .*take learn\.times=False and learn\.shifts=False\.$"
    with pytest.raises(ValueError, match=advice):
        SolverLearning(mdp, denoiser, **SMALL)
    agent = SolverLearning(mdp, denoiser, solver="ddim", **{**settings, "scale": 1})
    assert not agent.family.moves_levels
    agent.slope(agent.make_batches()[:1])
