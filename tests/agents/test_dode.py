"""What DODE promises: a table for a few seconds' work, counted, saved, resumed, and played."""

import copy
import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from fewstep.agents import DODE, CheckpointError, Denoiser, SolverPolicy, Tableau
from fewstep.agents.denoisers.exact import mixture as exact_mixture
from fewstep.agents.selection import is_better
from fewstep.agents.solver_learning.distillation.fit import GRID, final_error, noise_errors
from fewstep.agents.solver_learning.distillation.forms import directions, distilled
from fewstep.agents.solvers import make_solver
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    SB3VecEnv,
    Schedule,
)

# A fit on few noises, or one whose teacher is misaligned, may be of no use, and says so.
pytestmark = [pytest.mark.filterwarnings("ignore:Distillation made"), pytest.mark.numeric]

VP = DiscreteVP.linear(1000)
DENOISER, TARGET = exact_mixture(VP, dimension=2, components=3)
SMALL = {"batch_size": 20, "scale": 3}
REFINED = {**SMALL, "refine": "end-to-end", "batches": 4, "refine_steps": 6}
# As much as counts and bits need.
BRIEF = {**REFINED, "batches": 2, "refine_steps": 3}
# Enough noise for the refinement to find something.
LONGER = {**REFINED, "batch_size": 100, "refine_steps": 3}
SOLVERS = ["ddim", "ipndm", "dpm-solver-3", "heun"]


def worth(sample):
    return -sample.square().flatten(1).sum(1)


def world(steps=6, schedule=None, target=TARGET, reward=worth):
    return DiffusionMDP(target, VP, schedule or Schedule.uniform(VP, steps), reward)


def playable(solver, steps=6):
    """An environment with as many steps as the solver makes calls on `world()`."""
    return world(make_solver(solver, world(steps).schedule).nfe)


def trained(mdp=None, **settings):
    agent = DODE(mdp or world(), DENOISER, **{**SMALL, **settings})
    return agent.learn()


def greedy_table(agent):
    return distilled(agent.base, directions(agent.base, agent.settings.form), agent.lambdas)


def assert_same_tables(one, other):
    assert json.loads(one.to_json()) == json.loads(other.to_json())


@functools.cache
def fine_samples():
    """Noise that no agent learned on, and where the ODE takes it."""
    noise = VP.prior_sample((500, 2), torch.Generator().manual_seed(9), t=VP.t_max)
    fine = make_solver("dpm-solver-3m", Schedule.uniform(VP, 600))
    return noise, fine.sample(DENOISER, noise)


class Ripple(nn.Module):
    """A network with a trainable weight, which holds a gradient, and one that is not trainable."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.6, -0.3], [0.2, 0.8]]))
        self.shift = nn.Parameter(torch.tensor([0.1, -0.1]), requires_grad=False)
        self.matrix.grad = torch.full((2, 2), 7.0)

    def forward(self, sample, time):
        phase = (0.003 * time.to(sample.dtype)).unsqueeze(1)
        return torch.tanh(sample @ self.matrix + self.shift + phase.sin())


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_learn_does_what_is_planned(solver, refine):
    # Of Heun's refinement no more is asked than that it is done.
    refined = BRIEF if solver == "heun" else REFINED
    agent = DODE(world(), DENOISER, solver=solver, **(refined if refine else SMALL))
    assert agent.fits == [] and agent.rounds == 0
    assert_same_tables(agent.tableau, agent.base)
    agent.learn()
    assert agent.rounds == agent.budget == 1 + refine * refined["refine_steps"]
    assert agent.done and agent.finished == (not refine)
    assert agent.nfe == agent.tableau.nfe == agent.base.nfe == {"heun": 11}.get(solver, 6)
    assert len(agent.lambdas) == len(agent.fits) == agent.nfe
    # What is refined may have started from the base solver, where the fit was of no use.
    assert agent.tableau.name.removeprefix("d-") == agent.base.name
    if not refine:
        assert agent.tableau.name.startswith("d-") == (agent.returned == "distilled")
    for fit in agent.fits:
        assert fit.after <= fit.before * (1 + 1e-6)
        assert 0 <= fit.removed <= 1 or not len(fit.lambdas)
    if not refine:
        table = agent.base if agent.returned == "given" else greedy_table(agent)
        assert_same_tables(agent.tableau, table)
    if solver == "heun":
        return  # six steps on this grid: the base is as good as what twenty noises can teach it
    # It does no harm, on other noise too, against the ODE itself: to five standard errors.
    noise, exact = fine_samples()

    def errors(table):
        return (table.sample(DENOISER, noise) - exact).square().mean(1).double()

    change = errors(agent.tableau) - errors(agent.base)
    assert float(change.mean()) <= 5 * float(change.std()) / math.sqrt(len(change))
    assert bool(change.any()) == (agent.returned != "given")


@pytest.mark.parametrize(
    "settings",
    [SMALL, {**SMALL, "batches": 3, "solver": "heun"}, {**SMALL, "form": "fixed"}, BRIEF],
)
def test_timesteps_are_the_calls_that_are_made(settings, count_calls):
    denoiser, _ = exact_mixture(VP, dimension=2, components=3)
    calls = count_calls(denoiser.body)
    agent = DODE(world(), denoiser, **settings)
    agent.learn()
    assert agent.num_timesteps == calls.samples > 0
    # Looking at samples is no training.
    agent.sample(5)
    assert agent.num_timesteps == calls.samples - 5 * agent.nfe


def test_calls_of_the_fit(count_calls):
    """Those of the teacher on all noises, of the student on the fitted ones; and what measures."""
    agent = DODE(world(), DENOISER, check_teacher=False, **{**SMALL, "batches": 3})
    fitted, held_out, reported = (
        sum(len(batch.noise) for batch in batches)
        for batches in (agent.pool.fitted, agent.pool.held_out, agent.pool.reported)
    )
    assert (fitted, held_out, reported) == (60, 25, 25)
    agent = DODE(world(), DENOISER, check_teacher=False, **{**SMALL, "batches": 3})
    agent.learn()
    made = 110 * agent.teacher.tableau.nfe + 60 * 6
    measured = 2 * (25 + 25) * 6  # both tables, to choose and to report
    assert agent.num_timesteps == made + measured


def test_a_number_of_timesteps_stops_a_refinement():
    agent = DODE(world(), DENOISER, **BRIEF)
    agent.learn(1)
    assert agent.rounds == 1 and not agent.done
    agent.learn(1, reset_num_timesteps=False)
    assert agent.rounds == 2
    agent.learn(reset_num_timesteps=False)
    assert agent.rounds == 4 and agent.done
    agent.learn(1, reset_num_timesteps=False)  # more than planned, as asked
    assert agent.rounds == 5


@pytest.mark.parametrize(
    "settings", [SMALL, {**SMALL, "form": "sep", "solver": "heun"}, {**BRIEF, "solver": "ipndm"}]
)
def test_same_seed_same_table(settings):
    agents = []
    for noise in range(2):
        torch.manual_seed(noise)  # the global generator is nobody's source of randomness
        agents.append(trained(seed=3, **settings))
    assert_same_tables(*(agent.tableau for agent in agents))
    assert agents[0].errors == agents[1].errors
    # What is returned may be the given table with either seed.
    other = trained(seed=4, **settings)
    assert not np.array_equal(np.concatenate(other.lambdas), np.concatenate(agents[0].lambdas))


@pytest.mark.parametrize("settings", [SMALL, {**LONGER, "batches": 2}])
def test_learning_anew_is_learning_again(settings):
    agent = DODE(world(), DENOISER, **settings)
    tables, errors = [], []
    for _ in range(2):
        agent.learn()
        tables.append(agent.tableau)
        errors.append(dict(agent.errors))
    assert errors[0] == errors[1]
    assert_same_tables(*tables)


def test_more_time_does_not_refine_what_is_not_to_be_refined():
    agent = trained(refine="none")
    table = agent.tableau
    agent.learn(10**9, reset_num_timesteps=False)
    assert agent.rounds == 1
    assert_same_tables(agent.tableau, table)
    assert "refined" not in agent.errors


# -- the refinement --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_refinement_never_does_harm_on_held_out_noise(solver):
    agent = trained(solver=solver, **LONGER)
    held_out, reported = agent.pool.held_out, agent.pool.reported
    greedy, refined, given = (
        final_error(table, DENOISER, held_out)
        for table in (greedy_table(agent), agent.tableau, agent.base)
    )
    assert refined <= given
    # A fit that is no better than what was given, but by chance, is no start of the refinement.
    base, fit = (
        noise_errors(table, DENOISER, held_out) for table in (agent.base, greedy_table(agent))
    )
    assert refined <= greedy or not is_better(fit, base)
    assert agent.errors["returned"] == agent.errors[agent.returned]
    assert agent.errors["returned"] == final_error(agent.tableau, DENOISER, reported)
    # What judges takes no part in the fit: as many batches more, and a quarter as many noises.
    assert [len(batch.noise) for batch in agent.pool.batches] == [100] * 9
    alone = trained(solver=solver, batches=4, batch_size=100)
    np.testing.assert_array_equal(np.concatenate(alone.lambdas), np.concatenate(agent.lambdas))


def test_the_network_is_left_as_it_is():
    denoiser = Denoiser(Ripple(), VP)
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    agent = DODE(world(), denoiser, check_teacher=False, **BRIEF)
    agent.learn()
    for key, value in denoiser.state_dict().items():
        assert torch.equal(value, before[key])
    assert denoiser.body.matrix.requires_grad and not denoiser.body.shift.requires_grad
    assert torch.equal(denoiser.body.matrix.grad, torch.full((2, 2), 7.0))
    assert denoiser.body.shift.grad is None


@pytest.mark.parametrize("form", ["fixed", "lookahead"])
def test_a_constant_is_the_best_of_the_grid(form):
    agent = trained(solver="euler", form=form, batches=4)
    values = np.unique(np.concatenate(agent.lambdas))
    assert len(values) == 1
    rows = directions(agent.base, form)

    def error(value):
        table = distilled(agent.base, rows, [np.full(len(row), value) for row in rows])
        return final_error(table, DENOISER, agent.pool.fitted)

    assert error(values[0]) == min(map(error, GRID))


# -- the teacher -----------------------------------------------------------------------------------


def test_a_teacher_worse_than_the_student_is_noticed(generator):
    # A mean of few squares hangs on the samples that end in another component. Of 4000 noises the
    # errors, 0.024 and 0.005, differ by more than five standard errors, whatever the seed.
    settings = {"solver": "dpm-solver-2m", "teacher": "ddim", "scale": 1}
    agent = DODE(world(20), DENOISER, batch_size=4000, **settings)
    with pytest.warns(UserWarning, match=r"teacher ddim of 20 calls is no better.*dpm-solver-2m"):
        agent.learn()
    noise = VP.prior_sample((8000, 2), generator(9), t=VP.t_max)
    exact, ddim = (
        make_solver(solver, Schedule.uniform(VP, steps)).sample(DENOISER, noise)
        for solver, steps in (("dpm-solver-3m", 600), ("ddim", 20))
    )
    errors = (ddim - exact).square().mean(1)
    margin = 5 * float(errors.std()) * math.sqrt(1 / 4000 + 1 / 8000)
    assert agent.errors["teacher"] == pytest.approx(float(errors.mean()), abs=margin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = trained(world(20), check_teacher=False, batch_size=25, **settings)
        assert "teacher" not in silent.errors
        for solver in ("ddim", "ipndm", "dpm-solver-3"):
            agent = DODE(world(), DENOISER, solver=solver)
            agent.learn()
            assert agent.errors["teacher"] < agent.errors["given"]


@pytest.mark.parametrize("steps", [10, 50])
def test_index_alignment_of_the_official_settings_runs(steps):
    """D-DDIM, C = 10: a thousand noisings are enough for the teacher, and so for its check."""
    schedule = Schedule.uniform_torch(VP, steps)
    agent = trained(world(schedule=schedule), teacher="ddim", align="index", scale=10, batches=4)
    assert agent.teacher.tableau.nfe == 10 * steps
    assert agent.rounds == 1


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        {**SMALL, "solver": "heun", "form": "two", "ridge": 0.01},
        {**SMALL, "solver": "euler", "form": "lookahead", "batches": 4},
        {**SMALL, "solver": "deis", "solver_options": {"order": 2}, "teacher": "heun"},
        {**BRIEF, "solver": "dpm-solver-3"},
    ],
)
def test_a_file_gives_the_agent_back(settings, generator, tmp_path):
    agent, path = trained(seed=5, **settings), tmp_path / DODE.checkpoint_name
    agent.save(path)
    training = json.loads(path.read_text())["training"]
    assert training["agent"] == "dode"
    assert training["num_timesteps"] == agent.num_timesteps
    assert training["settings"]["solver"] == agent.solver
    assert_same_tables(Tableau.load(path), agent.tableau)

    loaded = DODE.load(path, world(), device="cpu", denoiser=DENOISER)
    assert loaded.settings == agent.settings
    assert (loaded.seed, loaded.rounds, loaded.num_timesteps) == (
        5,
        agent.rounds,
        agent.num_timesteps,
    )
    assert loaded.errors == agent.errors
    for ours, theirs in zip(loaded.fits, agent.fits, strict=True):
        np.testing.assert_array_equal(ours.lambdas, theirs.lambdas)
        assert (ours.before, ours.after) == (theirs.before, theirs.after)
    samples = [a.sample(9, generator=generator(1)) for a in (agent, loaded)]
    assert torch.equal(*samples)
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_text() == path.read_text()
    changed = DODE.load(path, world(), denoiser=DENOISER, batch_size=7)
    assert changed.settings.batch_size == 7 and changed.settings.scale == agent.settings.scale


def test_a_changed_digit_is_refused_by_who_goes_on_from_it(tmp_path):
    agent, path = trained(**SMALL), tmp_path / DODE.checkpoint_name
    agent.save(path)
    tree = json.loads(path.read_text())
    for change in ("training", "scale"):
        changed = copy.deepcopy(tree)
        if change == "training":
            changed["training"]["num_timesteps"] += 1
        else:
            changed["scale"][0] *= 1 + 1e-9
        path.write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=f"{path} is damaged: its checksum"):
            DODE.load(path, world(), denoiser=DENOISER)
        # Anyone may run the table.
        assert Tableau.load(path).nfe == agent.nfe
    del tree["training"]["checksum"]  # a file from before there were checksums
    path.write_text(json.dumps(tree))
    assert_same_tables(DODE.load(path, world(), denoiser=DENOISER).tableau, agent.tableau)


@pytest.mark.parametrize(
    ("solver", "stops"),
    [("ddim", (1, 3, 7)), pytest.param("heun", (0, 3), marks=pytest.mark.slow)],
)
def test_a_resumed_refinement_is_the_uninterrupted_one(solver, stops, tmp_path):
    settings = {**REFINED, "batches": 2}
    whole = DODE(world(), DENOISER, solver=solver, **settings)
    paths = {stop: tmp_path / f"{stop}.json" for stop in stops}

    def keep(_locals=None, _globals=None):
        if whole.rounds in paths:
            whole.save(paths[whole.rounds])
        return True

    keep()
    whole.learn(callback=keep)
    assert whole.rounds == 7
    agents = [whole]
    for stop, path in paths.items():
        agents.append(DODE.load(path, world(), denoiser=DENOISER))
        assert agents[-1].rounds == stop
        agents[-1].learn(reset_num_timesteps=False)
    ends = []
    for agent in agents:
        agent.save(tmp_path / "end.json")
        ends.append(json.loads((tmp_path / "end.json").read_text()))
        # A resumed run asks the teacher again.
        for count in ("num_timesteps", "checksum"):
            del ends[-1]["training"][count]
    assert all(end == ends[0] for end in ends)
    assert all(agent.rounds == 7 for agent in agents)


def test_files_of_something_else_are_refused(tmp_path):
    agent, path = trained(), tmp_path / "table.json"
    agent.save(path)
    text = path.read_text()

    def load(mdp=None, **overrides):
        return DODE.load(path, mdp or world(), **{"denoiser": DENOISER, **overrides})

    load()
    with pytest.raises(TypeError, match=r"pass denoiser="):
        DODE.load(path, world())
    with pytest.raises(CheckpointError, match="build it on meta"):
        load(device="meta")
    with pytest.raises(
        CheckpointError, match=r"another environment.* target is Mixture, here it is Other"
    ):
        other = type(TARGET).from_sampler(lambda n, seed: torch.zeros(n, 2), "Other", 10)
        load(world(target=other))
    with pytest.raises(CheckpointError, match=r"another environment.* shape is"):
        load(world(target=exact_mixture(VP, dimension=3)[1]))
    for schedule in (Schedule.karras(VP, 6), Schedule.uniform(VP, 7)):
        with pytest.raises(CheckpointError, match="another schedule"):
            load(world(schedule=schedule))
    bent = DiscreteVP.cosine(1000)
    with pytest.raises(CheckpointError, match="another schedule"):
        load(
            DiffusionMDP(TARGET, bent, Schedule.uniform(bent, 6), worth),
            denoiser=exact_mixture(bent, dimension=2)[0],
        )

    path.write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load()
    path.write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(CheckpointError):
        load()
    agent.tableau.save(path)
    with pytest.raises(CheckpointError, match="not one that dode"):
        load()
    path.unlink()
    with pytest.raises(CheckpointError, match="No tableau at"):
        load()


@pytest.mark.parametrize("broken", [None, {}, {"agent": "dode"}, []])
def test_a_damaged_training_block_is_refused(broken, tmp_path):
    agent, path = trained(), tmp_path / "table.json"
    path.write_text(agent.tableau.to_json(training=broken, **agent.state()))
    with pytest.raises(CheckpointError):
        DODE.load(path, world(), denoiser=DENOISER)


@pytest.mark.parametrize("change", [{"solver": "ipndm"}, {"form": "two"}])
def test_resuming_another_solver_s_file_is_refused(change, tmp_path):
    """The times are the same, the rows that the lambdas belong to are not."""
    path = tmp_path / "table.json"
    trained().save(path)
    agent = DODE(world(), DENOISER, **{**SMALL, **change})
    with pytest.raises(CheckpointError):
        agent.resume(path)


# -- other schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "dpm-solver-3", "dpm-solver++-2m"])
def test_lambdas_carry_over_to_schedules_of_as_many_calls(solver, generator):
    agent = trained(solver=solver, batch_size=200)
    assert agent.returned == "distilled"
    assert_same_tables(agent.tableau_on(agent.mdp.schedule), agent.tableau)
    other = Schedule.log_snr(VP, 6)
    table = agent.tableau_on(other)
    base = make_solver(solver, other)
    assert_same_tables(table, distilled(base, directions(base), agent.lambdas))
    noise = VP.prior_sample((5, 2), generator(), t=VP.t_max)
    samples = agent.sample(5, schedule=other, noise=noise)
    assert torch.equal(samples, table.sample(DENOISER, noise))
    for steps in (5, 7):
        with pytest.raises(ValueError, match="6 network calls"):
            agent.tableau_on(Schedule.log_snr(VP, steps))
        # What was not distilled yet goes anywhere.
        assert (
            DODE(world(), DENOISER, solver=solver).tableau_on(Schedule.log_snr(VP, steps)).nfe
            == steps
        )


def test_refined_weights_carry_over_to_no_other_schedule():
    with pytest.raises(ValueError, match=r"refined weights to none"):
        trained(**LONGER).tableau_on(Schedule.log_snr(VP, 6))


# -- acting ----------------------------------------------------------------------------------------


@functools.cache
def actors(solver):
    """A distilled agent and a plain policy of the solver, and the environment both can play in."""
    agent = trained(solver=solver)
    return playable(solver), {
        "agent": agent,
        "untrained agent": DODE(world(), DENOISER, solver=solver, **SMALL),
        "policy": SolverPolicy(agent.base, DENOISER),
        "distilled policy": SolverPolicy(agent.tableau, DENOISER),
    }


@pytest.mark.parametrize("solver", SOLVERS)
def test_predict_in_a_loop_is_sample_bit_for_bit(solver):
    mdp, players = actors(solver)
    vector = DiffusionVectorEnv(mdp, 7, autoreset_mode=AutoresetMode.DISABLED)
    single = DiffusionEnv(mdp)
    for player in players.values():
        for episode in range(2):
            observation, _ = vector.reset(seed=episode)
            noise, state, done = observation["sample"].clone(), None, False
            while not done:
                action, state = player.predict(observation, state, deterministic=bool(episode))
                observation, _, terminated, _, _ = vector.step(torch.from_numpy(action))
                done = bool(terminated.all())
            assert torch.equal(observation["sample"], player.sample(7, noise=noise))

        observation, _ = single.reset(seed=0)
        noise, state, done = torch.from_numpy(observation["sample"].copy())[None], None, False
        while not done:
            action, state = player.predict(observation, state)
            assert action.shape == (2,) and action.dtype == np.float32
            observation, _, done, _, _ = single.step(action)
        expected = player.sample(1, noise=noise)[0].numpy()
        np.testing.assert_array_equal(observation["sample"], expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluate_policy_pays_for_exactly_those_samples(solver):
    mdp, players = actors(solver)
    for player in players.values():
        vec_env = SB3VecEnv(DiffusionVectorEnv(mdp, 5))
        starts, ends, begins = [], [], [True]

        def watch(inside, _outside, starts=starts, ends=ends, begins=begins):
            if inside["i"] == 0:
                if begins[-1]:
                    starts.append(torch.from_numpy(inside["observations"]["sample"].copy()))
                begins.append(bool(inside["dones"].all()))
                if begins[-1]:
                    infos = inside["infos"]
                    finished = [info["terminal_observation"]["sample"] for info in infos]
                    ends.append(torch.from_numpy(np.stack(finished)))

        vec_env.seed(3)
        rewards, lengths = evaluate_policy(
            player, vec_env, 10, callback=watch, return_episode_rewards=True, warn=False
        )
        assert len(starts) == len(ends) == 2
        assert lengths == [player.nfe] * 10
        for start, end in zip(starts, ends, strict=True):
            assert torch.equal(player.sample(5, noise=start), end)
        assert rewards == torch.cat([worth(end) for end in ends]).tolist()


@pytest.mark.parametrize("solver", ["ipndm", "heun"])
def test_an_episode_longer_than_the_table_is_refused(solver):
    agent = trained(solver=solver)
    vector = DiffusionVectorEnv(world(agent.nfe + 1), 2)
    observation, _ = vector.reset(seed=0)
    state = None
    # A table whose times a schedule can have is refused as soon as the clocks differ.
    says = f"{agent.nfe} steps and the episode goes on|build the tableau on the environment's"
    with pytest.raises(ValueError, match=says):
        for _ in range(agent.nfe + 1):
            action, state = agent.predict(observation, state)
            observation, *_ = vector.step(torch.from_numpy(action))


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_options": {"eta": 1.0}}, "adds noise"),
        ({"solver": "ancestral"}, "adds noise"),
        ({"solver": "nonsense"}, "nonsense"),
        ({"teacher": "ancestral"}, r"teacher .*adds noise"),
        ({"teacher": "ddim", "teacher_options": {"eta": 0.5}}, r"teacher .*adds noise"),
        ({"teacher": "nonsense"}, "nonsense"),
        ({"teacher_options": {"nonsense": 1}}, "nonsense"),
        ({"form": "nonsense"}, "nonsense"),
        ({"align": "nonsense"}, "nonsense"),
        ({"refine": "nonsense"}, "nonsense"),
        ({"scale": 0}, "scale"),
        ({"form": "lookahead"}, "lookahead"),
        ({"align": "index", "teacher": "heun"}, "one network call"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DODE(world(), DENOISER, **settings)


def test_index_alignment_needs_a_recipe():
    times = Schedule(VP, [1000, 700, 400, 100, 0])
    with pytest.raises(ValueError, match="list of times"):
        DODE(world(schedule=times), DENOISER, align="index")
    assert trained(world(schedule=times)).nfe == 4
