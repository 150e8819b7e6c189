"""What RDPO promises: exact scores of what it draws, black boxes, and a plain table in the end."""

import copy
import math

import numpy as np
import pytest
import torch
from rounds import learn_rounds
from schedule_worlds import EDM, known, worth

from fewstep.agents import (
    DODE,
    RDPO,
    Denoiser,
    SolverLearning,
    Tableau,
    TrainingDivergedError,
)
from fewstep.agents.solver_learning.black_box.acting import ManyTables
from fewstep.agents.solver_learning.black_box.distribution import (
    CrossEntropy,
    PolicyGradient,
    TableDistribution,
    left_out,
)
from fewstep.agents.solver_learning.black_box.settings import (
    CrossEntropySettings,
    PolicyGradientSettings,
)
from fewstep.agents.solvers import make_solver
from fewstep.common.checkpoint import CheckpointError
from fewstep.envs import DiffusionMDP, RectifiedFlow, Schedule
from fewstep.envs.mdp import no_reward

numeric = pytest.mark.numeric
QUICK = {"batch_size": 16, "held_out": 24, "rounds": 4, "check_interval": 2}
METHODS = ["policy-gradient", "cross-entropy"]


def short(reward=None, steps=4):
    denoiser, target = known()
    return DiffusionMDP(target, EDM, Schedule.karras(EDM, steps), reward), denoiser


def nearest(sample):
    """A reward without a gradient: minus the distance from the nearest mode, by NumPy."""
    means = known()[0].body.means.numpy()
    return -abs(sample.numpy()[:, None] - means).sum(2).min(1)


# ------------------------------------------------------------------------- the distribution


@numeric
def test_densities_divergence_and_scores_are_those_of_a_normal_distribution():
    source = torch.Generator().manual_seed(0)
    ours = TableDistribution(5)
    with torch.no_grad():
        ours.mean.normal_(generator=source)
        ours.log_std.normal_(0, 0.3, generator=source)
    vectors = ours.draw(4, 3, generator=source, mirrored=True)
    torch.testing.assert_close(vectors[2:] + vectors[:2], (2 * ours.mean).expand(2, 3, 5))
    normal = torch.distributions.Normal(ours.mean, ours.log_std.exp())
    unit = torch.distributions.Normal(torch.zeros(5).double(), torch.ones(5).double())
    torch.testing.assert_close(ours.log_density(vectors), normal.log_prob(vectors).sum(-1))
    wanted = torch.distributions.kl_divergence(normal, unit).sum()
    torch.testing.assert_close(ours.divergence(), wanted)

    rewards = torch.randn(4, 3, generator=source, dtype=torch.float64)
    others = [(1, 3), (0, 2), (1, 3), (0, 2)]
    advantages = torch.stack([rewards[i] - rewards[list(others[i])].mean(0) for i in range(4)])
    torch.testing.assert_close(left_out(rewards), advantages)
    # Before any step the clipped surrogate's gradient is the policy gradient, by its closed form.
    learner = PolicyGradient(ours, PolicyGradientSettings(kl=0.1))
    old = ours.log_density(vectors).detach()
    loss = learner.loss(vectors, advantages, old)
    found = torch.autograd.grad(loss, [ours.mean, ours.log_std])
    mean, std = ours.mean.detach(), ours.log_std.detach().exp()
    z = (vectors - mean) / std
    weighted = advantages.unsqueeze(-1)
    by_mean = -(weighted * z / std).mean((0, 1)) + 0.1 * mean
    by_std = -(weighted * (z.square() - 1)).mean((0, 1)) + 0.1 * (std.square() - 1)
    torch.testing.assert_close(found, (by_mean, by_std), rtol=1e-9, atol=1e-12)
    # Beyond the clip of what it gains, a ratio has no gradient.
    far = learner.loss(vectors, advantages.abs(), old - 1)
    torch.testing.assert_close(
        torch.autograd.grad(far, ours.mean)[0], 0.1 * mean, rtol=1e-9, atol=1e-12
    )


def test_the_cross_entropy_method_takes_over_the_elites():
    ours = TableDistribution(2)
    learner = CrossEntropy(ours, CrossEntropySettings(elite=0.5, step=0.5))
    vectors = torch.tensor([[1.0, 2], [5, 5], [3, 4], [9, 9]], dtype=torch.float64)
    learner.update(vectors, torch.tensor([2.0, 0.0, 3.0, 1.0]), 0.0)
    torch.testing.assert_close(ours.mean.detach().tolist(), [1.0, 1.5])
    std = (1 + math.sqrt(2)) / 2
    torch.testing.assert_close(ours.log_std.detach().exp().tolist(), [std, std])


# ----------------------------------------------------------------------------- the tables


@numeric
@pytest.mark.parametrize("solver", ["dpm-solver++-3m", "ddim", "dpm-solver-2"])
def test_each_episode_acts_by_its_own_table(solver):
    """Along the tangent, whose tables are the family's but for the bend in the times."""
    mdp, denoiser = short(no_reward)
    agent = RDPO(mdp, denoiser, critic=nearest, solver=solver, **QUICK)
    space, source = agent.space, torch.Generator().manual_seed(0)
    mean = 0.3 * torch.randn(space.size, generator=source, dtype=torch.float64)
    tangent, shared = space.tangent(mean), space.table(mean)
    away = torch.randn(6, space.size, generator=source, dtype=torch.float64)
    noise = 80 * torch.randn(6, 2, generator=source)
    clock = mdp.with_schedule(Schedule(EDM, shared.times.tolist()))

    def ends(offsets):
        policy, sample = ManyTables(denoiser, shared, tangent.at(offsets), moves=True), noise
        for step in range(clock.steps):
            action = policy.act(clock.observe(sample, step), step, torch.randn_like)
            sample = clock.transition(sample, action, step)
        return sample

    with torch.no_grad():
        exact = shared.sample(denoiser, noise)
        torch.testing.assert_close(ends(0 * away), exact, rtol=1e-4, atol=1e-4)
        misses, moved = [], []
        for size in (0.1, 0.05):
            tables = [space.table(mean + size * row) for row in away]
            rows = [table.sample(denoiser, noise[i : i + 1]) for i, table in enumerate(tables)]
            misses.append(float((ends(size * away) - torch.cat(rows)).norm()))
            moved.append(float((torch.cat(rows) - exact).norm()))
        # What is left beside the tangent is of second order, or it would halve with the step.
        assert misses[1] < 0.35 * misses[0] and misses[1] < 0.2 * moved[1]


@numeric
def test_the_gradient_of_the_mean_reward_is_that_of_finite_differences():
    """E[A score] over many episodes against the slope of their mean reward, entry by entry."""
    mdp, denoiser = short(no_reward)
    settings = {"batch_size": 2000, "spread_coefficients": 0.0005, "learn_times": False}
    agent = RDPO(mdp, denoiser, critic=worth, learn_shifts=False, **settings)
    drawn = torch.Generator().manual_seed(0)
    vectors, rewards = agent._play_episodes()
    scores = left_out(rewards).unsqueeze(-1) * vectors
    # Under one noise the k tables' scores hang together: the noises are what is independent.
    by_noise = scores.mean(0)
    found, error = by_noise.mean(0), by_noise.std(0) / math.sqrt(2000)
    agent.distribution.draw(4, 2000, generator=drawn, mirrored=True)
    noise = mdp.initial(2000, drawn)
    for index in range(0, agent.space.size, 3):
        step = torch.zeros(agent.space.size, dtype=torch.float64)
        step[index] = 1.0
        with torch.no_grad():
            ends = [agent.space.table(sign * step).sample(denoiser, noise) for sign in (1, -1)]
        ahead, behind = (float(worth(end).mean()) for end in ends)
        wanted = (ahead - behind) / 2
        # Over a standard deviation the reward bends a little.
        assert abs(float(found[index]) - wanted) <= 4 * float(error[index]) + 0.02 * abs(wanted)


# ----------------------------------------------------------------------------- the agent


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", [None, nearest])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_resumes_bit_for_bit_and_is_never_worse_than_its_start(method, reward, tmp_path):
    def make():
        mdp, denoiser = short(reward)
        return RDPO(mdp, denoiser, method=method, **QUICK)

    whole = make().learn()
    part = learn_rounds(make(), 3)
    part.save(tmp_path / "agent")
    again = RDPO.load(tmp_path / "agent", short(reward)[0], body=copy.deepcopy(known()[0].body))
    again.learn(reset_num_timesteps=False)
    assert whole.finished and again.finished
    assert again.tableau.to_json() == whole.tableau.to_json()
    assert (again.rewards, again.returned) == (whole.rewards, whole.returned)
    torch.testing.assert_close(
        again.distribution.state(), whole.distribution.state(), rtol=0, atol=0
    )
    assert whole.num_timesteps == again.num_timesteps
    held_out = whole.judge(whole.tableau, 1_000_003).mean()
    assert held_out >= whole.judge(whole.given, 1_000_003).mean()
    # The caller's own reward has judged nothing.
    assert Tableau.from_json(whole.tableau.to_json()).to_json() == whole.tableau.to_json()


@pytest.mark.parametrize("method", METHODS)
def test_a_round_costs_the_same_calls_whatever_the_method(method):
    mdp, denoiser = short(nearest)
    calls = []
    denoiser = Denoiser(denoiser.body, EDM, "sample")
    hook = denoiser.body.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    agent = RDPO(mdp, denoiser, method=method, batch_size=16, check_interval=100, held_out=8)
    agent._most = 0.0
    agent._updates = 1
    agent.train_round()
    hook.remove()
    assert sum(calls) == 4 * 16 * 4
    # No call sees more than a round's noises: memory is that of one table.
    assert max(calls) == agent.settings.noises


@pytest.mark.slow
def test_it_learns_more_than_the_cross_entropy_method_from_as_many_calls():
    """On an exact mixture, for its default reward, by noise that neither has seen."""
    gained = {}
    for method, tables in (("policy-gradient", 4), ("cross-entropy", 16)):
        mdp, denoiser = short(None, 5)
        few = {"batch_size": 256 // tables, "tables": tables, "rounds": 30, "held_out": 512}
        agent = RDPO(mdp, denoiser, method=method, check_interval=30, **few).learn()
        gained[method] = agent.rewards["returned"] - agent.rewards["given"]
    assert gained["policy-gradient"] > max(gained["cross-entropy"], 0.0)


def test_it_acts_in_the_environment(monkeypatch):
    """Its own first states, transitions and rewards are the environment's."""
    seen = []

    class Spy(DiffusionMDP):
        def initial(self, n, generator=None, even_groups=0):
            seen.append("initial")
            return super().initial(n, generator, even_groups)

        def transition(self, sample, action, step, draw=torch.randn_like):
            seen.append("transition")
            return super().transition(sample, action, step, draw).clamp(-5, 5)

        def terminal_reward(self, sample):
            assert sample.abs().max() <= 5
            seen.append("reward")
            return super().terminal_reward(sample)

    denoiser, target = known()
    mdp = Spy(target, EDM, Schedule.karras(EDM, 4), nearest)
    agent = RDPO(mdp, denoiser, **QUICK)
    agent._play_episodes()
    assert seen == (["initial"] + ["transition"] * 4 + ["reward"]) * 4


def learned_table(mdp, denoiser, **settings):
    """A table with times, factors, weights and shifts of its own, after one step of a descent."""
    few = {"batch_size": 10, "batches": 1, "check_teacher": False, "rounds": 1, "scale": 2}
    learned = SolverLearning(mdp, denoiser, start="given", optimizer="adam", **{**few, **settings})
    learned.train_round()
    learned._keep("learned", learned._descent.copy())
    return learned.tableau


def test_it_starts_from_any_fitted_table(tmp_path):
    """Its times replace the environment's; what is drawn at the mean is the table."""
    mdp, denoiser = short(nearest)
    table = learned_table(mdp, denoiser)
    assert table.asked_times is not None and mdp.schedule.times.tolist() != table.times.tolist()
    agent = RDPO(mdp, denoiser, tableau=table, **QUICK)
    assert agent.schedule.times.tolist() == agent.mdp.schedule.times.tolist()
    assert agent.schedule.times.tolist() == table.times.tolist()
    drawn = agent.space.table(torch.zeros(agent.space.size, dtype=torch.float64))
    for name in ("scale", "weights", "evaluation_times"):
        np.testing.assert_allclose(getattr(drawn, name), getattr(table, name), 1e-9, 1e-9)
    assert agent.tableau is agent.given is table
    assert agent.starting_tableau(denoiser) is table
    with pytest.raises(ValueError, match="is a finished table, which carries over to no other"):
        agent.tableau_on(mdp.schedule)
    table.save(tmp_path / "table.json")
    named = RDPO(mdp, denoiser, table=str(tmp_path / "table.json"), **QUICK)
    assert named.given.to_json() == table.to_json()
    fitted = DODE(mdp, denoiser, solver="dpm-solver++-3m", batch_size=20, batches=1).learn().tableau
    assert RDPO(mdp, denoiser, tableau=fitted).given is fitted


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_goes_on_from_a_given_table_bit_for_bit(from_file, tmp_path):
    """Loaded or resumed; the file that the table came from may be gone."""
    table, file = learned_table(*short(nearest)), tmp_path / "table.json"

    def make(**changes):
        if from_file:
            table.save(file)
        given = {"table": str(file)} if from_file else {"tableau": table}
        return RDPO(*short(nearest), **{**QUICK, **given, **changes})

    whole = make().learn()
    half = learn_rounds(make(), 2)
    half.save(tmp_path / "half")
    resumed = make()
    file.unlink(missing_ok=True)
    resumed.resume(tmp_path / "half")
    loaded = RDPO.load(tmp_path / "half", short(nearest)[0], body=copy.deepcopy(known()[0].body))
    assert RDPO.given_tableau(tmp_path / "half").to_json() == table.to_json()
    for again in (resumed, loaded):
        again.learn(reset_num_timesteps=False)
        assert again.given.to_json() == table.to_json()
        assert again.tableau.to_json() == whole.tableau.to_json()
        assert (again.rewards, again.returned) == (whole.rewards, whole.returned)
        torch.testing.assert_close(
            again.distribution.state(), whole.distribution.state(), rtol=0, atol=0
        )
    other = RDPO(*short(nearest), tableau=table.replace(scale=1.01 * table.scale), **QUICK)
    with pytest.raises(CheckpointError, match=r"/half was trained with another table than the"):
        other.resume(tmp_path / "half")
    if not from_file:
        with pytest.raises(CheckpointError, match=r"/half was trained with another table than the"):
            RDPO(*short(nearest), **QUICK).resume(tmp_path / "half")


def test_the_solver_s_own_table_is_no_other_start():
    mdp, denoiser = short(nearest)
    plain = RDPO(mdp, denoiser, **QUICK)
    given = RDPO(mdp, denoiser, tableau=plain.base, **QUICK)
    torch.testing.assert_close(given.space.start, plain.space.start, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("missed", "learned", "settings"),
    [
        ("scale", {}, {"learn_factors": False, "learn_weights": False}),
        ("evaluation_times", {}, {"learn_shifts": False}),
        ("output", {"solver": "ddim"}, {}),
        ("anchors", {"form": "noise"}, {}),
    ],
)
def test_a_table_that_is_never_drawn_is_refused(missed, learned, settings):
    mdp, denoiser = short(nearest)
    table = learned_table(mdp, denoiser, **learned)
    with pytest.raises(ValueError, match=f"drawn around .*: they differ in {missed}; take the"):
        RDPO(mdp, denoiser, tableau=table, **settings)
    form = {"form": learned["form"]} if "form" in learned else {}
    solver = {"solver": learned["solver"]} if "solver" in learned else {}
    assert RDPO(mdp, denoiser, tableau=table, **form, **solver).given is table


def test_a_table_for_others_is_refused_in_a_sentence(tmp_path):
    mdp, denoiser = short(nearest)
    clamped = make_solver("ancestral", mdp.schedule, clip=True)
    with pytest.raises(ValueError, match="clamps its predictions"):
        RDPO(mdp, denoiser, solver="ancestral", tableau=clamped)
    with pytest.raises(ValueError, match=r"asks the network twice at one time"):
        RDPO(mdp, denoiser, tableau=make_solver("heun", mdp.schedule))
    flow = RectifiedFlow()
    without = make_solver("euler", Schedule.uniform(flow, 4))
    with pytest.raises(ValueError, match="is made for RectifiedFlow"):
        RDPO(mdp, denoiser, tableau=without)
    flowing, there = Denoiser(denoiser.body, flow, "sample"), Schedule.uniform(flow, 4)
    there = DiffusionMDP(mdp.target, flow, there, nearest)
    with pytest.raises(
        ValueError, match=r"'euler' begins where no signal is left, .*learn\.times="
    ):
        RDPO(there, flowing, solver="euler", tableau=without)
    still = {"solver": "euler", "learn_times": False, "learn_shifts": False}
    assert RDPO(there, flowing, tableau=without, **still).given is without
    with pytest.raises(FileNotFoundError, match=r"No tableau at there\.json"):
        RDPO(mdp, denoiser, table="there.json")
    table = make_solver("dpm-solver++-3m", mdp.schedule)
    table.save(tmp_path / "table.json")
    with pytest.raises(ValueError, match="two different tables: give one of them"):
        RDPO(mdp, denoiser, tableau=clamped, table=str(tmp_path / "table.json"))
    with pytest.raises(TypeError, match="tableau must be"):
        RDPO(mdp, denoiser, tableau="learned.json")


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("tables must be even and at least 4 for method='policy-gradient'", {"tables": 3}),
        ("asks the network twice at one time", {"solver": "heun"}),
        ("switch on one of learn.times", {f"learn_{name}": False for name in (
            "times", "factors", "weights", "shifts")}),
        ("unknown solver 'dpm'", {"solver": "dpm"}),
        ("critic must be callable", {"critic": 3}),
        ("clamps its predictions", {"solver": "ancestral", "solver_options": {"clip": True}}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(message, settings):
    mdp, denoiser = short(nearest)
    with pytest.raises((ValueError, TypeError), match=message):
        RDPO(mdp, denoiser, **settings)
    with pytest.raises(ValueError, match="there is none here: give the environment a reward"):
        RDPO.without_data(denoiser, mdp.schedule, (2,))
    assert RDPO.without_data(denoiser, mdp.schedule, (2,), critic=nearest).mdp.reward is nearest


def test_a_reward_that_is_not_finite_is_named():
    def broken(sample):
        return sample.sum(1) / 0

    mdp, denoiser = short(broken)
    with pytest.raises(ValueError, match=r"the reward 'broken' returned NaN or infinity for"):
        RDPO(mdp, denoiser, **QUICK).learn()


def test_a_sample_that_is_not_finite_earns_the_least(monkeypatch):
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, **QUICK)
    rollout = DiffusionMDP.rollout

    def torn(self, *arguments, **options):
        samples = rollout(self, *arguments, **options)
        samples[3] = math.inf
        return samples

    monkeypatch.setattr(DiffusionMDP, "rollout", torn)
    rewards = agent.judge(agent.given)
    assert rewards.isfinite().all() and rewards[3] == rewards[:17].min()


def test_a_drawn_table_without_samples_earns_the_least():
    """Its levels coincide: it plays nothing, and the others play the same noise."""
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, method="cross-entropy", **QUICK)
    table, seen = agent.space.table, []

    def torn(vector):
        seen.append(vector)
        if len(seen) in (1, 16):
            raise ValueError("the times of a schedule must strictly decrease")
        return table(vector)

    agent.space.table = torn
    vectors, rewards = agent._play_tables()
    assert len(vectors) == len(rewards) == 16
    assert rewards.isnan().nonzero().flatten().tolist() == [0, 15]
    filled = agent._with_worst(rewards)
    assert filled[0] == filled[15] == filled.min() == rewards[1:15].min()


FAR = [
    ("policy-gradient", {"spread_times": 1e6}),
    ("cross-entropy", {"spread_times": 1e6}),
    ("policy-gradient", {"spread_coefficients": 1e25}),
    ("cross-entropy", {"spread_coefficients": 1e25}),
]


@pytest.mark.parametrize(("method", "spread"), FAR)
@pytest.mark.parametrize("reward", [None, nearest])
def test_tables_that_are_all_too_far_away_name_the_spread(method, spread, reward):
    mdp, denoiser = short(reward)
    agent = RDPO(mdp, denoiser, method=method, learn_shifts=False, **spread, **QUICK)
    # The policy gradient has its linearised tables, and may still take a step from them.
    said = r"(None of the tables drawn|the mean table's).* spread.times or spread.coefficients\b"
    with pytest.raises(TrainingDivergedError, match=said) as caught:
        for _ in range(3):
            agent.train_round()
    assert "shifts" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tables_some_of_which_have_coinciding_levels_are_learned_from():
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, method="cross-entropy", spread_times=10.0, **QUICK).learn()
    assert agent.sample(3).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_what_to_lower_after_divergence_is_what_the_method_reads(method):
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, method=method, learn_times=False, learn_shifts=False, **QUICK)
    rates = ["gradient.learning_rate", "gradient.std_rate"]
    assert agent.step_sizes() == [
        "spread.coefficients",
        *(rates if method == "policy-gradient" else []),
    ]


def test_a_start_without_finite_samples_is_refused():
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, **QUICK)
    agent.given = agent.given.replace(scale=agent.given.scale * 1e20)
    with pytest.raises(ValueError, match=r"The samples of the table to start from, .* are all NaN"):
        agent.learn()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_reward_of_zero_has_no_sign():
    mdp, denoiser = short(lambda sample: -0.0 * sample[:, 0].abs())
    agent = RDPO(mdp, denoiser, **QUICK)
    with pytest.warns(UserWarning, match=r"its reward was 0, that of the learned table 0\."):
        agent.learn()
    assert agent.verdict.endswith("Mean reward: 0, of what was given 0.")


@pytest.mark.parametrize("solver", ["ancestral", "unipc-2", "dpm-solver-2"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_solvers_with_noise_and_stages_are_learned_too(solver):
    mdp, denoiser = short(nearest)
    agent = RDPO(mdp, denoiser, solver=solver, **QUICK).learn()
    assert agent.tableau.steps == agent.base.steps
    assert agent.sample(3).isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_alone_are_learned_where_no_signal_is_left_at_first():
    """A flow's first level is infinite, and stays the first one where no times move."""
    flow, (denoiser, target) = RectifiedFlow(), known()
    flowing = Denoiser(denoiser.body, flow, "sample")
    mdp = DiffusionMDP(target, flow, Schedule.uniform(flow, 4), nearest)
    agent = RDPO(mdp, flowing, learn_times=False, learn_shifts=False, **QUICK)
    assert all(slope.isfinite().all() for slope in agent.space.tangent(agent._best).slopes)
    agent.learn()
    assert agent.sample(3).isfinite().all()
