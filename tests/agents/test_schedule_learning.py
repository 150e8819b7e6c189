"""What ScheduleLearning promises: better levels, a denoiser tuned on them, all of it counted."""

import functools
import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from rounds import learn_rounds
from schedule_worlds import (
    EDM,
    OF_DATA,
    PUBLISHED,
    QUICK,
    SMALL,
    TWO_STAGES,
    VP,
    assert_same_agents,
    assert_same_weights,
    assert_sound,
    differ,
    error,
    fresh_noise,
    known,
    learned,
    network,
    short_world,
    truth,
    two_stages,
    weights_of,
    world,
    worth,
)
from torch import nn

from fewstep.agents import DODE, SFTPG, CheckpointError, Denoiser, ScheduleLearning, Tableau
from fewstep.agents.denoisers.networks import MLP
from fewstep.agents.solver_learning.scheduling.levels import EVEN
from fewstep.agents.solver_learning.scheduling.objective import Objective
from fewstep.agents.solvers import make_solver
from fewstep.envs import (
    DiffusionVectorEnv,
    Schedule,
    make_schedule,
)

pytestmark = pytest.mark.numeric

# -- better levels ---------------------------------------------------------------------------------


@functools.cache
def improvement(name, steps, dimension, seed, gradient="exact", **settings):
    """The learned schedule's error on noise of its own, as a share of the Karras schedule's."""
    schedule = Schedule.karras(EDM if name == "ve" else VP, steps)
    denoiser, target = known(name, dimension, seed)
    agent = ScheduleLearning(world(schedule, target), denoiser, gradient=gradient, **settings)
    agent.learn()
    noise = fresh_noise(schedule.process, dimension)
    goal = truth(denoiser, noise, schedule)
    before = error(make_solver(agent.solver, schedule), denoiser, noise, goal)
    after = error(agent.tableau, denoiser, noise, goal)
    assert agent.errors["learned"] < agent.errors["given"]
    assert agent.errors["teacher"] < 0.1 * agent.errors["given"]
    assert not agent.collapsed
    assert_sound(agent.schedule, schedule)
    return after / before


@pytest.mark.parametrize(
    ("name", "seed", "steps"),
    [
        ("ve", 0, 10),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(["ve", "vp"], [0, 1], [6, 10])
            if case != ("ve", 0, 10)
        ),
    ],
)
def test_learned_levels_beat_karras_s_by_the_published_margin(name, seed, steps):
    assert improvement(name, steps, 2, seed, **QUICK) < PUBLISHED[steps]


# In sixteen dimensions the error hangs on which of six components a sample ends in: it has a heavy
# tail. The defaults find what the published figures ask for in most mixtures; in others (VE, seed
# 1, ten steps; VP, seed 0, six) it takes batches=8, batch_size=250, schedule_rounds=300.
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "rounds"), [(6, 150), (10, 60)])
def test_learned_levels_beat_karras_s_in_sixteen_dimensions(steps, rounds):
    ratio = improvement("ve", steps, 16, 0, schedule_rounds=rounds, tuning_rounds=0)
    assert ratio < PUBLISHED[steps]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "vp"])
def test_equation_14_helps_less_than_the_exact_gradient(name):
    """In the median over three seeds, both from Karras's schedule."""
    exact, eq14 = (
        sorted(
            improvement(name, 6, 2, seed, gradient, **QUICK, start="karras") for seed in range(3)
        )
        for gradient in ("exact", "eq14")
    )
    assert exact[1] < eq14[1] and eq14[-1] < 0.95


@pytest.mark.parametrize(
    ("schedule", "solver", "options"),
    [
        (Schedule.karras(EDM, 6, append_zero=False), "dpm-solver++-2m", {}),
        (Schedule.karras(EDM, 6), "ipndm", {}),
        (Schedule.karras(EDM, 4), "heun", {}),
        (Schedule.karras(EDM, 6), "deis", {"order": 2}),
        (Schedule.karras(VP, 6), "ddim", {}),
        (Schedule.log_snr(VP, 6), "dpm-solver-2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_any_deterministic_solver_s_levels_can_be_learned(schedule, solver, options):
    settings = {"solver": solver, "solver_options": options, "start": schedule.recipe[0]}
    denoiser, _ = known("ve" if schedule.process == EDM else "vp")
    agent = ScheduleLearning(
        world(schedule), denoiser, **{**QUICK, "batch_size": 100, "schedule_rounds": 20}, **settings
    )
    assert agent.schedule.times.tolist() == pytest.approx(schedule.times.tolist(), rel=1e-9)
    base = make_solver(solver, schedule, **options)
    agent.learn()
    assert agent.nfe == base.nfe
    assert_sound(agent.schedule, schedule)
    assert agent.errors["learned"] < 0.95 * agent.errors["given"]
    noise = fresh_noise(schedule.process)
    goal = truth(denoiser, noise, schedule)
    assert error(agent.tableau, denoiser, noise, goal) < error(base, denoiser, noise, goal)
    np.testing.assert_array_equal(
        agent.tableau.weights, make_solver(solver, agent.schedule, **options).weights
    )


@pytest.mark.parametrize("space", ["rho", "log", "sigma"])
def test_every_space_keeps_the_ends_and_descends(space):
    """Also after updates so large that only the map keeps the levels in order."""
    schedule = Schedule.karras(EDM, 6)
    start = learned(schedule, space=space, schedule_rounds=1, gradient="none")
    assert start.schedule.times.tolist() == pytest.approx(schedule.times.tolist(), rel=1e-9)
    agent = learned(schedule, space=space, schedule_learning_rate=2.0, schedule_rounds=6)
    assert_sound(agent.schedule, schedule)
    assert agent.levels.tolist() == pytest.approx(agent.schedule.times[:-1].tolist(), rel=1e-9)
    assert agent.weights.sum() == pytest.approx(1 - 0.002 / 80, rel=1e-9)


def test_the_best_levels_are_kept():
    """Steps too large to descend never make the held-out error worse than the start's."""
    for rounds in (3, 10, 13):
        agent = learned(schedule_learning_rate=3.0, schedule_rounds=rounds)
        assert agent.returned in ("given", "learned")
        assert agent.errors["returned"] <= agent.errors["given"]
    # The error that is reported is that of the schedule that is there, on noise of its own.
    reported = agent.make_batches()[2 * agent.settings.batches :]
    assert len(reported) == 1
    samples = agent.tableau.sample(agent.denoiser, reported[0].noise)
    error = float((samples - reported[0].finished).square().mean())
    assert agent.errors["returned"] == pytest.approx(error, rel=1e-5)


def test_the_teacher_s_states_are_those_of_the_ode():
    agent = learned(schedule_rounds=1, scale=20)
    batch = agent.make_batches()[0]
    until = Schedule.karras(EDM, 7, append_zero=False)
    goal = truth(agent.denoiser, batch.noise.double(), until)
    torch.testing.assert_close(batch.target.double(), goal, rtol=0, atol=2e-2)


def test_same_seed_same_schedule():
    schedules = []
    for noise in range(2):
        torch.manual_seed(noise)  # the global generator is nobody's source of randomness
        schedules.append(learned(seed=3).schedule)
    assert schedules[0] == schedules[1]
    assert learned(seed=4).schedule != schedules[0]


# -- starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize("process", [EDM, VP], ids=["VE", "VP"])
@pytest.mark.parametrize("name", EVEN)
def test_every_schedule_that_fits_is_a_start(process, name, to_zero):
    steps = 5 if to_zero else 6
    ends_at_t_min = {"end": process.t_min} if name == "uniform" else {"append_zero": False}
    times = make_schedule(name, process, steps, **ends_at_t_min).times.tolist()
    expected = Schedule(process, [*times, 0.0] if to_zero else times)
    env_schedule = Schedule.karras(process, 6, append_zero=to_zero)
    agent = ScheduleLearning(
        world(env_schedule), known("ve" if process == EDM else "vp")[0], **{**SMALL, "start": name}
    )
    assert agent.schedule.times.tolist() == pytest.approx(expected.times.tolist(), rel=1e-9)
    learn_rounds(agent, 2)
    assert_sound(agent.schedule, expected)


@pytest.mark.filterwarnings("ignore::fewstep.envs.schedules.ends.UnfinishedWarning")
def test_the_environment_s_schedule_is_a_start():
    for schedule in (
        Schedule(EDM, [60.0, 20.0, 3.0, 0.5, 0.01, 0.0]),
        Schedule(VP, [990.0, 700.5, 300.0, 4.0]),
        Schedule.trailing(VP, 5),
    ):
        agent = learned(schedule, start="environment", gradient="none")
        assert agent.rounds == 1
        assert_sound(agent.schedule, schedule)
        assert agent.schedule.times.tolist() == pytest.approx(schedule.times.tolist(), rel=1e-9)
        agent = learned(schedule, start="environment")
        assert_sound(agent.schedule, schedule)


@pytest.mark.filterwarnings("ignore::fewstep.envs.schedules.ends.UnfinishedWarning")
def test_the_environment_s_schedule_gives_the_ends():
    """As the argument `env` says, whatever the levels between them start from."""
    for schedule in (
        Schedule.uniform(VP, 6, end=5.0),
        Schedule(EDM, [60.0, 20.0, 3.0, 0.5, 0.01, 0.0]),
    ):
        agent = learned(schedule, start="karras")
        assert_sound(agent.schedule, schedule)


@pytest.mark.parametrize("process", [EDM, VP], ids=["VE", "VP"])
def test_a_programme_is_done_in_one_round(process):
    schedule = Schedule.karras(process, 6)
    settings = {"gradient": "none", "batch_size": 200, "scale": 10}
    agent = learned(schedule, start="trajectory-dp", **settings)
    assert agent.rounds == agent.budget == 1 and agent.done
    assert agent.returned == "programme"
    assert agent.errors["programme"] < 0.6 * agent.errors["given"]
    assert_sound(agent.schedule, schedule)
    denoiser = agent.denoiser
    noise = fresh_noise(process)
    goal = truth(denoiser, noise, schedule)
    before = error(make_solver("euler", schedule), denoiser, noise, goal)
    assert error(agent.tableau, denoiser, noise, goal) < 0.7 * before


def test_a_descent_may_start_from_a_programme():
    alone = learned(start="trajectory-dp", gradient="none", batch_size=100)
    agent = learned(start="trajectory-dp", batch_size=100, schedule_rounds=30)
    assert agent.rounds == 30
    assert agent.errors["learned"] < alone.errors["programme"] < alone.errors["given"]
    assert agent.errors["given"] == alone.errors["given"]


@pytest.mark.parametrize("start", ["trajectory-dp", "diffusion-dp"])
def test_whole_times_are_whole(start):
    agent = learned(
        Schedule.uniform(VP, 8), start=start, gradient="none", integer_times=True, batch_size=100
    )
    times = agent.schedule.times
    assert times.tolist() == pytest.approx(times.round().tolist(), abs=1e-6)
    assert torch.equal(times, times.round())


class LookUp(nn.Module):
    """A network that knows whole noisings only, counted from 0."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 1)
        with torch.no_grad():
            t = torch.arange(1.0, 1001.0, dtype=torch.float64)
            spread = 1.0 - VP.alpha(t) ** 2 * (1 - 0.2**2)
            self.table.weight.copy_((VP.sigma(t) / spread).float()[:, None])

    def forward(self, sample, time):
        return self.table(time) * sample


@pytest.mark.parametrize("start", ["trajectory-dp", "diffusion-dp"])
@pytest.mark.parametrize("schedule", ["trailing", "leading"])
def test_a_network_of_whole_noisings_is_scheduled_by_a_programme(start, schedule):
    denoiser = Denoiser(LookUp(), VP)
    agent = learned(
        make_schedule(schedule, VP, 6),
        denoiser,
        solver="ddim",
        start=start,
        gradient="none",
        integer_times=True,
        teacher="ddim",
    )
    assert agent.rounds == 1
    assert agent.sample(5).isfinite().all()
    assert torch.equal(agent.schedule.times, agent.schedule.times.round())


def test_a_network_of_whole_noisings_has_no_gradient():
    class Rounded(LookUp):
        def forward(self, sample, time):
            return super().forward(sample, time.round().long())

    for body in (LookUp(), Rounded()):
        with pytest.raises(ValueError, match=r"differentiable in its noise level.*'none'"):
            learned(Schedule.trailing(VP, 6), Denoiser(body, VP))
    # What rounds by itself can be scheduled by a programme, whole times or not.
    agent = learned(
        Schedule.trailing(VP, 6),
        Denoiser(Rounded(), VP),
        start="trajectory-dp",
        gradient="none",
        teacher="ddim",
    )
    assert agent.rounds == 1


# -- two stages ------------------------------------------------------------------------------------


def test_stage_one_moves_the_levels_alone():
    agent = two_stages()
    before = weights_of(agent.denoiser)
    start = agent.schedule
    learn_rounds(agent, 3)
    assert agent.schedule != start
    assert_same_weights(before, weights_of(agent.denoiser))
    assert_same_weights(before, weights_of(agent.sampling_denoiser))
    assert all(weight.requires_grad for weight in agent.denoiser.parameters())
    assert all(weight.grad is None for weight in agent.denoiser.parameters())


def test_stage_two_changes_the_denoiser_alone(tmp_path):
    agent = two_stages(**OF_DATA)
    learn_rounds(agent, 4)
    schedule, levels, pool = agent.schedule, agent.levels, agent.make_batches()
    given = weights_of(agent.denoiser)
    averages = weights_of(agent.sampling_denoiser)
    for done in range(5, 10):
        learn_rounds(agent, done, reset_num_timesteps=False)
        live = weights_of(agent.denoiser)
        for key, value in averages.items():
            averages[key] = torch.lerp(value, live[key], 0.5)
        assert_same_weights(averages, weights_of(agent.sampling_denoiser))
    assert agent.done and agent.rounds == 9
    assert differ(live, given) and differ(live, averages)
    assert agent.schedule == schedule and torch.equal(agent.levels, levels)
    # The teacher remains the network as it was given: the pool is what it would be anew.
    path = tmp_path / agent.checkpoint_name
    agent.save(path)
    again = ScheduleLearning.load(path, short_world()).make_batches()
    for ours, theirs in zip(pool, again, strict=True):
        assert torch.equal(ours.noise, theirs.noise)
        assert torch.equal(ours.target, theirs.target)


def test_the_averaged_weights_sample():
    agent = two_stages(**OF_DATA)
    agent.learn()
    noise = EDM.prior_sample((9, 2), torch.Generator().manual_seed(5), t=EDM.t_max)
    samples = agent.sample(9, noise=noise)
    with torch.no_grad():
        assert torch.equal(samples, agent.tableau.sample(agent.sampling_denoiser, noise))
        assert not torch.equal(samples, agent.tableau.sample(agent.denoiser, noise))
    unaveraged = two_stages(**OF_DATA, ema=0.0)
    unaveraged.learn()
    assert unaveraged.sampling_denoiser is unaveraged.denoiser
    assert_same_weights(weights_of(unaveraged.denoiser), weights_of(agent.denoiser))


def test_without_stage_two_the_network_is_left_as_it_is():
    denoiser = network()
    fixed = next(denoiser.parameters()).requires_grad_(False)
    before = weights_of(denoiser)
    agent = ScheduleLearning(world(), denoiser, **{**SMALL, "alternations": 2})
    agent.learn()
    assert agent.rounds == 8
    assert agent.denoiser is agent.sampling_denoiser is denoiser
    assert_same_weights(before, weights_of(denoiser))
    assert not fixed.requires_grad
    assert all(w.requires_grad for w in denoiser.parameters() if w is not fixed)
    assert all(w.grad is None for w in denoiser.parameters())


@pytest.mark.parametrize("weights", ["rollout", "lambda", "original"])
def test_stage_two_alone(weights):
    agent = two_stages(schedule_rounds=0, tuning_weights=weights)
    start = agent.schedule
    assert agent.budget == 5
    agent.learn()
    assert agent.rounds == 5 and agent.done
    assert agent.schedule == start


@pytest.mark.parametrize("target", [{}, OF_DATA])
def test_stage_two_alone_tunes_where_a_programme_says(target):
    agent = two_stages(schedule_rounds=0, start="trajectory-dp", **target)
    found = two_stages(gradient="none", start="trajectory-dp", tuning_rounds=0, **target).learn()
    agent.learn()
    assert agent.rounds == agent.budget == 5
    assert agent.returned == found.returned == "programme"
    assert agent.schedule == found.schedule != agent.mdp.schedule


def test_stage_two_brings_finished_samples_to_the_teacher_s():
    """On noise of its own: a network of no use comes nearer to what its own ODE says."""
    agent = two_stages(
        tuning_rounds=60,
        tuning_batch_size=100,
        tuning_weights="rollout",
        tuning_learning_rate=3e-3,
        batch_size=100,
        scale=10,
    )
    assert two_stages(tuning_weights=None).settings.tuning_weights == "rollout"
    noise = fresh_noise(EDM).float()
    goal = truth(network(), noise, agent.mdp.schedule)
    learn_rounds(agent, 4)
    before = error(agent.tableau, agent.sampling_denoiser, noise, goal)
    agent.learn(reset_num_timesteps=False)
    assert error(agent.tableau, agent.sampling_denoiser, noise, goal) < 0.8 * before


def test_alternations_end_when_the_levels_stay():
    agent = two_stages(alternations=3, tolerance=100.0)
    assert agent.budget == 27
    agent.learn()
    # The second stage one saw that they stay; no stage two follows.
    assert agent.converged and agent.done and agent.rounds == 4 + 5 + 4
    # It moved them a little, and what is returned is measured after that.
    assert agent.returned == "learned"
    assert agent.errors["returned"] == agent._reported_error() == agent.errors["learned"]
    agent = two_stages(alternations=3, tolerance=0.0)
    agent.learn()
    assert agent.done and not agent.converged and agent.rounds == 27
    assert not two_stages(tolerance=100.0).converged


def test_each_alternation_goes_on_from_the_last_one_s_levels():
    agent = two_stages(alternations=2, start="trajectory-dp")
    learn_rounds(agent, 9)
    middle = agent.schedule
    learn_rounds(agent, 10, reset_num_timesteps=False)
    change = (agent.schedule.times[:-1] / middle.times[:-1]).log().abs().max()
    assert 0 < change < 1.5
    first = two_stages(start="trajectory-dp")
    learn_rounds(first, 1)
    assert agent.schedule != first.schedule


# -- timesteps -------------------------------------------------------------------------------------


COUNTED = {
    "euler": {},
    "alternating": {"alternations": 3, "tolerance": 0.0},
    "heun": {"solver": "heun", "check_teacher": True},
    "programme": {
        "start": "trajectory-dp",
        "gradient": "none",
        "alternations": 2,
        "tolerance": 0.0,
    },
    "rollouts": {"tuning_weights": "rollout"},
    "l-diff": {"diffusion_weight": 0.5, "tuning_rounds": 0},
    "eq14": {"gradient": "eq14", "weight_term": True, "alternations": 2, "tolerance": 0.0},
    "data": {"gradient": "eq14", "residual": "convex", **OF_DATA},
    "no stage one": {"schedule_rounds": 0},
}


@pytest.mark.parametrize("name", COUNTED)
def test_timesteps_are_the_calls_that_are_made(name, count_calls):
    """Of the network in training, of its average and of the teacher's copy."""
    agent = two_stages(**COUNTED[name])
    bodies = {id(body): body for body in (each.body for each in agent.networks())}
    counters = [count_calls(body) for body in bodies.values()]
    counted = []

    def note(_locals, _globals):
        counted.append((agent.num_timesteps, sum(each.samples for each in counters)))
        return True

    agent.learn(callback=note)
    assert all(ours == theirs for ours, theirs in counted)
    assert agent.rounds == agent.budget and agent.done
    before = agent.schedule
    agent.learn(1000, reset_num_timesteps=False)
    assert agent.rounds == agent.budget and agent.schedule == before


def test_calls_of_a_stage(count_calls):
    """A rollout's calls are made once on the way down, and once more for their derivatives."""
    agent = two_stages(tuning_weights="rollout", tuning_rounds=7)
    learn_rounds(agent, 2)
    live, averaged = (count_calls(each.body) for each in (agent.denoiser, agent.sampling_denoiser))
    learn_rounds(agent, 3, reset_num_timesteps=False)  # of the levels: no look at held-out noise
    assert averaged.samples == 2 * 3 * 20  # two calls at each level but the last
    assert live.samples == 0
    learn_rounds(agent, 5, reset_num_timesteps=False)
    live.samples = 0
    learn_rounds(agent, 6, reset_num_timesteps=False)  # of the denoiser
    assert live.samples == 2 * agent.nfe * 16


@pytest.mark.slow
def test_measuring_costs_little(count_calls, monkeypatch):
    """With the default settings, but for smaller batches in the same proportion."""
    agent = ScheduleLearning(world(), network(), batch_size=20, tuning_batch_size=10, scale=3)
    measured, errors = [], Objective.errors

    def measure(*arguments):
        before = agent.num_timesteps
        result = errors(*arguments)
        measured.append(agent.num_timesteps - before)
        return result

    monkeypatch.setattr(Objective, "errors", measure)
    agent.learn()
    assert 0 < sum(measured) < 0.15 * agent.num_timesteps


def test_learning_stops_in_between_and_goes_on():
    whole, parts = two_stages(), two_stages()
    whole.learn()
    for rounds in (1, 4, 6, 9):
        learn_rounds(parts, rounds, reset_num_timesteps=False)
        assert parts.rounds == rounds
    assert_same_agents(whole, parts)


# -- files -----------------------------------------------------------------------------------------


ALTERNATING = {"alternations": 2, "tolerance": 0.0}
RESUMED = {
    "exact": {},
    "eq14": {"gradient": "eq14", "weight_term": True},
    "data": {"target": "data", "diffusion_weight": 0.3, "collapse": 0.0},
    "noised": {
        "gradient": "eq14",
        "target": "data",
        "network_input": "noised",
        "residual": "convex",
        "collapse": 0.0,
    },
    "programme": {"start": "trajectory-dp", "solver": "ipndm"},
    "none": {"start": "diffusion-dp", "gradient": "none"},
    "unaveraged": {"ema": 0.0, "tuning_weights": "original", "max_grad_norm": None},
    "rollout": {"tuning_weights": None, "start": "environment"},
    "one stage": {"tuning_rounds": 0},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    settings = {**ALTERNATING, **RESUMED[name]}
    whole = two_stages(**settings)
    ones = 1 if name == "none" else 4
    twos = whole.settings.tuning.rounds
    each = ones + twos
    assert whole.budget == 2 * each
    # In the middle of each stage and between alternations; and, once, between stages.
    stops = {ones // 2, ones + twos // 2, each, 2 * each - twos // 2}
    if name == "exact":
        stops |= {ones, each + 1}
    paths = {stop: tmp_path / f"{stop}.safetensors" for stop in sorted(stops)}

    def keep(_locals, _globals):
        if whole.rounds in paths:
            whole.save(paths[whole.rounds])
        return True

    if 0 in paths:
        whole.save(paths[0])
    whole.learn(callback=keep)
    ends = tmp_path / "end.safetensors"
    whole.save(ends)
    for stop, path in paths.items():
        if stop % 2:
            agent = ScheduleLearning(short_world(), network(seed=1), **{**TWO_STAGES, **settings})
            agent.resume(path)
        else:
            agent = ScheduleLearning.load(path, short_world(), device="cpu")
        assert agent.rounds == stop
        agent.learn(reset_num_timesteps=False)
        # Whoever samples moves on: compare each with a copy of the same state.
        assert_same_agents(ScheduleLearning.load(ends, short_world()), agent)


def test_the_best_levels_survive_an_interruption(tmp_path):
    """Rounds 10 and 20 compare with the best; the steps are too large to descend after them."""
    settings = {"schedule_rounds": 23, "schedule_learning_rate": 0.5, "batch_size": 50}
    whole = ScheduleLearning(world(), network(), **{**SMALL, **settings})
    path = tmp_path / "agent"
    learn_rounds(whole, 17)
    whole.save(path)
    whole.learn(reset_num_timesteps=False)
    resumed = ScheduleLearning.load(path, world())
    resumed.learn(reset_num_timesteps=False)
    assert_same_agents(whole, resumed)


def test_stage_two_may_be_added_to_a_saved_stage_one(tmp_path):
    first = two_stages(tuning_rounds=0)
    learn_rounds(first, 3)
    first.save(tmp_path / "agent")
    second = ScheduleLearning.load(tmp_path / "agent", short_world(), tuning_rounds=2)
    assert second.schedule == first.schedule
    second.learn(reset_num_timesteps=False)
    assert second.rounds == 6 and second.done


def test_files_of_something_else_are_refused(tmp_path):
    agent = two_stages()
    learn_rounds(agent, 5)
    path, other = tmp_path / "agent", tmp_path / "other"
    agent.save(path)
    whole = path.read_bytes()

    def refuse(match, path=path, mdp=None, **settings):
        with pytest.raises(CheckpointError, match=match):
            ScheduleLearning.load(path, mdp or short_world(), **settings)

    ScheduleLearning.load(path, short_world())
    refuse(r"No checkpoint at", path=tmp_path / "nothing")
    refuse(r"build it on meta", device="meta")
    shifted = known("ve", 2, 1)[1].from_sampler(lambda n, seed: torch.zeros(n, 2), "Other", 10)
    refuse(
        r"another environment: target is Mixture, here it is Other",
        mdp=world(Schedule.karras(EDM, 4), shifted),
    )
    refuse(r"another environment: schedule", mdp=world(Schedule.karras(EDM, 7)))
    other.write_bytes(whole[: len(whole) // 2])
    refuse(r"truncated", path=other)
    agent.denoiser.save(other)
    refuse(r"written by 'denoiser', not by 'schedule'", path=other)
    agent.schedule.save(other)
    refuse(r"truncated or not a safetensors file", path=other)
    with pytest.raises(CheckpointError, match=r"truncated"):
        two_stages().resume(other)
    elsewhere = ScheduleLearning(world(Schedule.karras(EDM, 7)), network(), **TWO_STAGES)
    with pytest.raises(CheckpointError, match=r"another environment: schedule"):
        elsewhere.resume(path)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "karas"}, r"unknown start 'karas'; did you mean 'karras'"),
        ({"target": "techer"}, r"unknown target 'techer'; did you mean 'teacher'"),
        ({"gradient": "exakt"}, r"unknown gradient 'exakt'; did you mean 'exact'"),
        ({"tuning_weights": "lamda"}, r"unknown weights 'lamda'; did you mean 'lambda'"),
        ({"space": "rh"}, r"unknown space 'rh'; did you mean 'rho'"),
        ({"residual": "roll"}, r"unknown residual 'roll'"),
        ({"network_input": "move"}, r"unknown network_input 'move'"),
        ({"solver": "eular"}, r"unknown solver 'eular'; did you mean 'euler'"),
        ({"solver_options": {"nonsense": 1}}, r"unknown option of solver 'euler' 'nonsense'"),
        ({"teacher": "hein"}, r"unknown solver 'hein'; did you mean 'heun'"),
        ({"teacher_options": {"nonsense": 1}}, r"unknown option of solver 'heun' 'nonsense'"),
        ({"schedule_rounds": -1}, r"schedule_rounds must be at least 0, got -1"),
        ({"batch_size": 1}, r"batch_size must be at least 2, got 1"),
        ({"tolerance": float("nan")}, r"tolerance must be at least 0, got nan"),
        ({"last_weight": float("inf")}, r"last_weight must be at least 0, got inf"),
        ({"diffusion_weight": -1.0}, r"diffusion_weight must be at least 0, got -1"),
        ({"schedule_learning_rate": 0.0}, r"schedule_learning_rate must be above 0, got 0"),
        ({"tuning_rounds": 1, "ema": 1.0}, r"ema must be at least 0 and below 1, got 1"),
        ({"solver": "ancestral"}, r"'ancestral.*' adds noise.*; a schedule is learned for a det"),
        ({"solver": "ddim", "solver_options": {"eta": 0.5}}, r"'ddim.*' adds noise"),
        ({"teacher": "ancestral"}, r"The teacher 'ancestral.*' adds noise"),
        ({"gradient": "eq14", "solver": "ipndm"}, r"eq14' is derived for Euler.*'ipndm'"),
        ({"gradient": "eq14", "residual": "one-shot"}, r"real samples: it needs target='data'"),
        ({"gradient": "eq14", "residual": "convex"}, r"real samples: it needs target='data'"),
        ({"gradient": "eq14", "network_input": "noised"}, r"real samples: it needs target='data'"),
        ({"target": "data", "tuning_weights": "rollout"}, r"rollout' needs target='teacher'"),
        ({"integer_times": True}, r"integer_times leaves nothing to differentiate"),
        ({"integer_times": True, "gradient": "eq14"}, r"integer_times leaves nothing"),
        ({"schedule_rounds": 0}, r"nothing to do: schedule_rounds and tuning.rounds are 0"),
        ({"start": "leading"}, r"unknown start 'leading'"),
        ({"integer_times": True, "gradient": "none"}, r"start from a dynamic programme"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ScheduleLearning(world(), network(), **{**SMALL, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", ["environment", "karras"])
def test_fewer_than_three_levels_are_refused(start):
    for schedule in (
        Schedule.karras(EDM, 2),
        Schedule.karras(EDM, 1, append_zero=False),
        Schedule(EDM, [80, 0.0]),
    ):
        with pytest.raises(ValueError, match=r"at least 3 noise levels.*got [12]\. Take more"):
            ScheduleLearning(world(schedule), network(), **{**SMALL, "start": start})
    assert learned(Schedule.karras(EDM, 3)).schedule.steps == 3
    assert learned(Schedule.karras(EDM, 2, append_zero=False)).schedule.steps == 2


def test_a_denoiser_of_another_process_is_refused():
    with pytest.raises(ValueError, match=r"build the environment with process=denoiser.process"):
        ScheduleLearning(world(Schedule.karras(VP, 6)), network(), **SMALL)


def test_a_network_that_ignores_its_time_is_refused():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, sample, time):
            return self.linear(sample)

    with pytest.raises(ValueError, match=r"does not depend on it differentiably"):
        ScheduleLearning(world(), Denoiser(Deaf(), EDM), **SMALL)


def test_a_teacher_no_better_than_the_sampler_is_noticed():
    settings = {**SMALL, "check_teacher": True, "solver": "dpm-solver++-2m", "teacher": "euler"}
    agent = ScheduleLearning(
        world(Schedule.karras(EDM, 12, append_zero=False)), known()[0], **{**settings, "scale": 1}
    )
    with pytest.warns(UserWarning, match=r"teacher euler of 12 calls is no better than dpm-solv"):
        learn_rounds(agent, 1)
    agent = learned(check_teacher=True, scale=10)
    assert 0 < agent.errors["teacher"] < agent.errors["given"]


# -- no data ---------------------------------------------------------------------------------------


def test_a_bare_denoiser_s_schedule_is_learned_without_data():
    schedule = Schedule.karras(EDM, 6)
    denoiser, _ = known()
    settings = {**SMALL, "batch_size": 100, "schedule_rounds": 20}
    agent = ScheduleLearning.without_data(denoiser, schedule, (2,), **settings)
    agent.learn()
    assert agent.errors["learned"] < agent.errors["given"]
    assert agent.sample(5).shape == (5, 2)
    # Data have no part in it.
    assert agent.schedule == learned(schedule, **settings).schedule


def test_a_bare_network_is_scheduled_by_a_programme_too():
    agent = ScheduleLearning.without_data(
        known()[0],
        Schedule.karras(EDM, 6),
        (2,),
        **{**SMALL, "start": "trajectory-dp", "gradient": "none", "batch_size": 100},
    )
    agent.learn()
    assert agent.errors["programme"] < agent.errors["given"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tuning_rounds": 5, "tuning_weights": "lambda"},
            r"tuning.weights='lambda' needs real samples",
        ),
        ({"target": "data"}, r"target='data' needs real samples"),
        ({"diffusion_weight": 0.1}, r"diffusion_weight needs real samples"),
        ({"start": "diffusion-dp"}, r"start='diffusion-dp' needs real samples"),
    ],
)
def test_what_needs_data_is_refused_without(settings, message):
    with pytest.raises(ValueError, match=message):
        ScheduleLearning.without_data(
            known()[0], Schedule.karras(EDM, 6), (2,), **{**SMALL, **settings}
        )


# -- acting ----------------------------------------------------------------------------------------


def play(agent, vector, seed=0):
    """Walk an episode; return the noise it began with and the samples it ended with."""
    observation, _ = vector.reset(seed=seed)
    noise, state, done = observation["sample"].clone(), None, False
    while not done:
        action, state = agent.predict(observation, state)
        observation, reward, terminated, _, _ = vector.step(torch.from_numpy(action))
        done = bool(terminated.all())
    return noise, observation["sample"], reward


@pytest.mark.parametrize("solver", ["euler", "ipndm", "dpm-solver++-2m"])
def test_predict_in_a_loop_is_sample_bit_for_bit(solver):
    agent = learned(Schedule.karras(EDM, 6, append_zero=solver == "euler"), solver=solver)
    mdp = agent.mdp.with_schedule(agent.schedule)
    vector = DiffusionVectorEnv(mdp, 7, autoreset_mode=AutoresetMode.DISABLED)
    for episode in range(2):
        noise, samples, reward = play(agent, vector, episode)
        assert torch.equal(samples, agent.sample(7, noise=noise))
        assert torch.equal(reward, worth(samples))


def test_an_environment_with_other_times_is_refused():
    """The one that it was learned on, too."""
    agent = learned(Schedule.karras(EDM, 6))
    assert agent.schedule != agent.mdp.schedule
    vector = DiffusionVectorEnv(agent.mdp, 7)
    observation, _ = vector.reset(seed=0)
    action, state = agent.predict(observation)  # the ends are the same
    observation, *_ = vector.step(torch.from_numpy(action))
    with pytest.raises(ValueError, match=r"no step of .* starts at time 24\.4"):
        agent.predict(observation, state)


def test_an_environment_by_its_name_takes_the_learned_schedule(tmp_path):
    agent = learned(Schedule.karras(EDM, 6))
    path = tmp_path / "schedule.json"
    agent.schedule.save(path)
    for schedule in (agent.schedule, str(path)):
        env = gym.make_vec(
            "fewstep/Moons-v0", 5, schedule=schedule, reward=worth, target=known()[1]
        )
        assert env.unwrapped.schedule == agent.schedule
        assert env.unwrapped.process == EDM
        noise, samples, reward = play(agent, env)
        assert torch.equal(samples, agent.sample(5, noise=noise))
        assert torch.equal(reward, worth(samples))


def test_samples_on_other_schedules():
    agent = learned(Schedule.karras(EDM, 6))
    noise = EDM.prior_sample((5, 2), torch.Generator().manual_seed(2), t=EDM.t_max)
    for other in (Schedule.karras(EDM, 6), Schedule.uniform(EDM, 11)):
        expected = make_solver("euler", other).sample(agent.denoiser, noise)
        assert torch.equal(agent.sample(5, schedule=other, noise=noise), expected)
    assert torch.equal(agent.sample(5, noise=noise), agent.tableau.sample(agent.denoiser, noise))
    states = agent.sample(5, noise=noise, return_trajectory=True)
    assert states.shape == (7, 5, 2)


# -- what is made of a learned schedule ------------------------------------------------------------


def test_d_ode_goes_on_from_a_learned_schedule(tmp_path):
    agent = learned(Schedule.karras(EDM, 6), **QUICK)
    path = tmp_path / "schedule.json"
    agent.schedule.save(path)
    schedule = Schedule.load(path)
    assert schedule == agent.schedule
    denoiser = agent.sampling_denoiser
    dode = DODE(world(schedule), denoiser, solver="euler", batch_size=200, batches=2)
    dode.learn()
    noise = fresh_noise(EDM)
    goal = truth(denoiser, noise, schedule)
    karras = make_solver("euler", Schedule.karras(EDM, 6))
    errors = [
        error(table, denoiser, noise, goal) for table in (dode.tableau, agent.tableau, karras)
    ]
    assert errors[0] < errors[1] < errors[2]


@functools.cache
def twenty_rounds():
    return learned(Schedule.karras(EDM, 6, append_zero=False), schedule_rounds=20, batch_size=100)


@pytest.mark.parametrize(
    "solver", ["euler", "ddim", "heun", "ipndm", "deis", "dpm-solver-3", "dpm-solver++-2m"]
)
def test_every_solver_runs_on_a_learned_schedule(solver, tmp_path):
    agent = twenty_rounds()
    table = make_solver(solver, agent.schedule)
    path = tmp_path / "tableau.json"
    table.save(path)
    back = Tableau.load(path)
    assert back.to_json() == table.to_json()
    noise = fresh_noise(EDM, n=50)
    samples = [t.sample(agent.denoiser, noise) for t in (table, back)]
    assert torch.equal(*samples) and samples[0].isfinite().all()


def test_fine_tuning_runs_on_a_learned_schedule():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = MLP((2,), levels=1000, hidden=16, layers=2, input_gain=1.0)
    schedule = Schedule.karras(VP, 5)
    agent = learned(schedule, Denoiser(body, VP))
    assert agent.schedule != schedule
    mdp = agent.mdp.with_schedule(agent.schedule)
    before = weights_of(agent.denoiser)
    tuned = SFTPG(mdp, agent.sampling_denoiser, batch_size=16, n_critic=1, minibatch_size=8)
    tuned.learn(1)
    assert tuned.rounds == 1
    assert differ(weights_of(tuned.denoiser), before)
    assert tuned.schedule == agent.schedule
    assert tuned.sample(3).isfinite().all()
