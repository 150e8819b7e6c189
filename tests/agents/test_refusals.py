"""Bad input gets one sentence, where it is given: objects of another class, names, numbers."""

import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from fewstep.agents import (
    DODE,
    SFD,
    SFT,
    SFTPG,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    SolverLearning,
    SolverPolicy,
    Tableau,
)
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.presets import preset
from fewstep.agents.pretrained import from_edm, from_pretrained, pipeline_tableau, plain_grid
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.solvers import make_solver
from fewstep.critics import MMDCritic, evaluate
from fewstep.envs import (
    VE,
    DiffusionMDP,
    DiffusionVectorEnv,
    NumpyVectorEnv,
    SB3VecEnv,
    Schedule,
    make_mdp,
)
from fewstep.envs.mdp import no_reward

SMALL = {"batch_size": 8}


@pytest.fixture
def world(make_mdp, make_denoiser):
    return make_mdp(), make_denoiser()


# -- objects of another class ----------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", ["denoiser.safetensors", nn.Linear(2, 2), None, Denoiser])
@pytest.mark.parametrize("kind", [BehaviorCloning, SFTPG, DODE])
def test_what_is_no_denoiser_is_refused(kind, denoiser, world):
    with pytest.raises(TypeError, match="denoiser must be a Denoiser, got"):
        kind(world[0], denoiser)


@pytest.mark.parametrize("env", [None, 3, nn.Linear(2, 2)])
def test_what_is_no_environment_is_refused(env, world):
    with pytest.raises(TypeError, match="env must be a DiffusionVectorEnv, its DiffusionMDP or"):
        BehaviorCloning(env, world[1])


@pytest.mark.parametrize(
    ("critic", "said"),
    [
        ("mmd", "critic must be callable.* got str"),
        (3, "critic must be callable.* got int"),
        ({"widht": 3}, "critic must be callable.* got dict"),
        (MMDCritic, "critic must be an instance; got the class MMDCritic"),
    ],
)
@pytest.mark.parametrize("kind", [SFTPG, SFT])
def test_what_is_no_critic_is_refused_at_once(kind, critic, said, world):
    with pytest.raises(TypeError, match=said):
        kind(*world, critic=critic, **SMALL)


def test_other_objects_are_refused_where_they_are_given(world, process):
    mdp, denoiser = world
    table = make_solver("ddim", mdp.schedule, denoiser)
    cases = [
        (lambda: Denoiser("mlp", process), "body must be a Module, got 'mlp'"),
        (lambda: Denoiser(denoiser.body, "ve"), "process must be a NoiseProcess, got 've'"),
        (lambda: SolverPolicy("ddim", denoiser), "tableau must be a Tableau, got 'ddim'"),
        (lambda: SolverPolicy(table, denoiser.body), "denoiser must be a Denoiser, got"),
        (lambda: make_solver("ddim", mdp), "schedule must be a Schedule, got"),
        (lambda: make_solver("ddim", mdp.schedule, "net"), "denoiser must be a Denoiser or None"),
        (lambda: Schedule("ve", [1.0, 0.0]), "process must be a NoiseProcess, got 've'"),
        (lambda: Schedule.karras(VE, 3), "process must be a NoiseProcess, got the class VE"),
        (lambda: VE(sigma_max="80"), "sigma_max must be a number, got '80'"),
        (lambda: DiffusionMDP(3, process, mdp.schedule), "target must be a Target, got 3"),
        (lambda: DiffusionMDP(mdp.target, process, None), "schedule must be a Schedule, got None"),
        (lambda: mdp.with_reward(MMDCritic), "reward must be an instance; got the class MMD"),
        (
            lambda: SB3VecEnv(None),
            "env must be a DiffusionVectorEnv or the id of one; got NoneType",
        ),
        (lambda: NumpyVectorEnv(None), "env must be a DiffusionVectorEnv, got None"),
        (lambda: table.replace(process="ve"), "process must be a NoiseProcess, got 've'"),
        (lambda: new_denoiser(mdp.target), "mdp must be a DiffusionMDP, got"),
        (lambda: SFD(mdp, denoiser, tableau="table"), "tableau must be a Tableau or None"),
        (lambda: SolverLearning(mdp, denoiser, features="inception"), "features must be callable"),
    ]
    for build, said in cases:
        with pytest.raises(TypeError, match=said):
            build()


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: from_pretrained(3), "name_or_folder must be a string or a path, got 3"),
        (lambda: from_pretrained("a/b", download="no"), "download must be True or False, got 'no'"),
        (lambda: from_pretrained("a/b", device=0), "device must be a string or a device, got 0"),
        (lambda: from_pretrained("a/b", classes="10"), "classes must be a whole number or None"),
        (lambda: from_pretrained("a/b", drops=1), "drops must be True or False or None, got 1"),
        (
            lambda: from_pretrained("a/b", class_embeddings=[[0.0]]),
            "class_embeddings must be a Tensor or None, got",
        ),
        (lambda: from_edm("net"), "module must be a Module, got 'net'"),
        (lambda: pipeline_tableau(None), "folder must be a string or a path, got None"),
        (lambda: plain_grid("ddim"), "table must be a Tableau, got 'ddim'"),
        (
            lambda: TableauScheduler.from_scheduler(DDPMScheduler(), "ddim", "5"),
            "steps must be a whole number or None, got '5'",
        ),
    ],
)
def test_what_is_no_pretrained_network_or_table_is_refused(ask, said):
    with pytest.raises(TypeError, match=said):
        ask()


def test_what_cannot_be_evaluated_is_refused(world):
    mdp = world[0]
    samples = torch.randn(10, 2)
    for target in ("SwissRoll", mdp, type(mdp.target)):
        with pytest.raises(TypeError, match="target must be a Target, as mdp"):
            evaluate(samples, target)
    with pytest.raises(TypeError, match=r"must return a tensor .*, got a ndarray"):
        evaluate(lambda n, generator: np.zeros((n, 2), np.float32), mdp.target, 10)
    with pytest.raises(TypeError, match=r"n must be a whole number, got 2\.5"):
        evaluate(samples, mdp.target, 2.5)
    with pytest.raises(TypeError, match="features must be a FeatureExtractor or None"):
        evaluate(samples, mdp.target, features="inception")


# -- sampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "error", "said"),
    [
        (0, ValueError, "n must be at least 1, got 0"),
        (-1, ValueError, "n must be at least 1, got -1"),
        (2.5, TypeError, "n must be a whole number, got 2.5"),
        ("3", TypeError, "n must be a whole number, got '3'"),
    ],
)
def test_a_number_of_samples_that_cannot_be_is_refused(n, error, said, world):
    with pytest.raises(error, match=said):
        BehaviorCloning(*world, **SMALL).sample(n)


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 1)])
def test_noise_of_another_shape_is_refused(shape, world):
    agent = BehaviorCloning(*world, **SMALL)
    for sample in (agent.sample, SolverPolicy(agent.tableau, agent.denoiser, (2,)).sample):
        with pytest.raises(ValueError, match=r"noise must have shape \(N, 2\)"):
            sample(4, noise=torch.zeros(shape))


def test_observations_that_cannot_be_are_refused(world):
    agent = BehaviorCloning(*world, **SMALL)
    time = np.float32(agent.schedule.times[0])
    for policy in (agent, SolverPolicy(agent.tableau, agent.denoiser, (2,))):
        for shown in (np.zeros(2), {"sample": np.zeros(2)}, None):
            with pytest.raises(TypeError, match="An observation is a dictionary with a 'sample'"):
                policy.predict(shown)
        for shape in ((3,), (4, 3), (1, 1, 2)):
            with pytest.raises(ValueError, match="neither one sample nor a batch"):
                policy.predict({"sample": np.zeros(shape), "timestep": time})
    with pytest.raises(ValueError, match="There are 4 samples and 3 timesteps"):
        agent.predict({"sample": np.zeros((4, 2)), "timestep": np.full(3, time)})


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"log_interval": 0}, ValueError, "log_interval must be at least 1, got 0"),
        ({"log_interval": None}, TypeError, "log_interval must be a whole number, got None"),
        ({"total_timesteps": -5}, ValueError, "total_timesteps must be at least 0, got -5"),
        ({"progress_bar": "no"}, TypeError, "progress_bar must be True or False, got 'no'"),
    ],
)
def test_a_training_that_cannot_be_is_refused(arguments, error, said, world):
    with pytest.raises(error, match=said):
        BehaviorCloning(*world, **SMALL).learn(**arguments)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, None, "0"])
def test_a_seed_that_cannot_be_is_refused(seed, world):
    mdp, denoiser = world
    for build in (
        lambda: BehaviorCloning(mdp, denoiser, seed=seed),
        lambda: new_denoiser(mdp, seed=seed),
        lambda: evaluate(torch.randn(10, 2), mdp.target, seed=seed),
    ):
        with pytest.raises((TypeError, ValueError), match="seed must be"):
            build()


# -- files of other trainings ----------------------------------------------------------------------


def test_another_agent_s_file_is_named(make_mdp, make_denoiser, tmp_path):
    path = tmp_path / "agent"
    SFTPG(make_mdp(), make_denoiser(), **SMALL).save(path)
    for kind in (BehaviorCloning, SFT):
        said = f"agent was written by 'sft-pg', not by '{kind.name}'"
        with pytest.raises(CheckpointError, match=said):
            kind(make_mdp(), make_denoiser(), **SMALL).resume(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_critic": 3}, "n_critic=1, here it is 3"),
        ({"critic_width": 8}, "critic.width=.*, here it is 8"),
        ({"learn_std": True}, "policy.learn_std=False, here it is True"),
        ({"solver_options": {"last_std": 0.2}}, "solver_options=None, here it is .*last_std"),
    ],
)
def test_a_training_goes_on_under_its_own_settings(
    changes, said, make_mdp, make_denoiser, tmp_path
):
    path = tmp_path / "agent"
    SFTPG(make_mdp(), make_denoiser(), n_critic=1, **SMALL).save(path)
    with pytest.raises(CheckpointError, match=f"trained with {said}.*SFTPG.load"):
        SFTPG(make_mdp(), make_denoiser(), **{"n_critic": 1, **SMALL, **changes}).resume(path)


def test_how_long_and_how_fast_may_change(make_mdp, make_denoiser, tmp_path):
    path = tmp_path / "agent"
    agent = SFTPG(make_mdp(), make_denoiser(), rounds=1, **SMALL)
    agent.learn().save(path)
    changes = {"rounds": 2, "learning_rate": 1e-5, "micro_batch_size": 4, "batch_size": 12}
    other = SFTPG(make_mdp(), make_denoiser(seed=1), **changes)
    other.resume(path)
    assert other.rounds == 1 and not other.done
    other.learn(reset_num_timesteps=False)
    assert other.rounds == 2


def test_an_older_file_lacks_settings(make_mdp, make_denoiser):
    agent = SFTPG(make_mdp(), make_denoiser(), n_critic=3, **SMALL)
    agent._check_settings({"batch_size": 4, "critic": {}}, "file")
    agent._check_settings(None, "file")


# -- names -----------------------------------------------------------------------------------------


def test_names_that_no_preset_has_are_refused():
    with pytest.raises(ValueError, match="unknown agent 'sft-pq'; did you mean 'sft-pg'"):
        preset("SwissRoll", "sft-pq")
    with pytest.raises(ValueError, match="unknown preset of sft-pg on SwissRoll 'nope'"):
        preset("SwissRoll", "sft-pg", "nope")


@pytest.mark.parametrize("name", ["swissroll", "SwissRoll-v0", "fewstep/SwissRoll-v0"])
def test_an_environment_has_the_same_names_everywhere(name):
    mdp = make_mdp(name, reward=no_reward)
    assert mdp.target.name == "SwissRoll"
    assert preset(name, "sft-pg") == preset("SwissRoll", "sft-pg")
    denoiser = new_denoiser(mdp)
    assert SFTPG(name, denoiser, **SMALL).mdp.target.name == "SwissRoll"
    assert SFTPG.for_environment(name, denoiser).averaged.decay == 0.97
    assert SB3VecEnv(name, 2).env.mdp.target.name == "SwissRoll"


def test_an_unknown_environment_is_refused_everywhere(world):
    for build in (make_mdp, SB3VecEnv, lambda name: SFTPG(name, world[1])):
        with pytest.raises(ValueError, match="unknown environment 'Swisroll'; did you mean"):
            build("Swisroll")


# -- arguments that contradict each other ----------------------------------------------------------


def test_two_teachers_times_are_refused(world):
    with pytest.raises(ValueError, match="align='index' takes its teacher's times from"):
        DODE(*world, align="index", teacher_times=(1.0, 0.5))


def test_two_tables_are_refused(process, make_denoiser, tmp_path):
    mdp = make_mdp("SwissRoll", process="sigmoid-1000", steps=3, reward=no_reward)
    denoiser = new_denoiser(mdp)
    tables = [make_solver(name, mdp.schedule) for name in ("ddim", "heun")]
    path = tmp_path / "table.json"
    tables[0].save(path)
    with pytest.raises(ValueError, match=re.escape("two different tables: give one of them")):
        SFD(mdp, denoiser, tableau=tables[1], table=str(path))
    agent = SFD(mdp, denoiser, table=str(path))
    agent.save(tmp_path / "agent")
    tables[1].save(path)  # what the training began with is in its file
    loaded = SFD.load(tmp_path / "agent", mdp)
    assert loaded.tableau.to_json() == Tableau.from_json(tables[0].to_json()).to_json()


def test_rates_that_nothing_reads_are_told_of(world):
    with pytest.warns(UserWarning, match="descent.times_rate is adam's"):
        SolverLearning.Settings().replace(times_rate=0.5)


class Sizes:
    """Notes how many samples a network sees at once."""

    def __init__(self, network):
        self.seen = []
        network.register_forward_pre_hook(lambda _, given: self.seen.append(len(given[0])))


@pytest.mark.filterwarnings("ignore:The teacher")
@pytest.mark.parametrize("most", [None, 3])
def test_held_out_noise_is_measured_in_micro_batches(most):
    from fewstep.agents import DMD, ConsistencyDistillation

    mdp = make_mdp("SwissRoll", process="sigmoid-1000", steps=3, reward=no_reward)
    for kind in (SFD, ConsistencyDistillation, DMD):
        agent = kind(mdp, new_denoiser(mdp), batch_size=3, micro_batch_size=most, held_out_size=8)
        calls = [Sizes(network) for network in agent.networks()]
        agent._begin()
        assert max(max(each.seen) for each in calls if each.seen) == (most or 8)


# -- rewards ---------------------------------------------------------------------------------------


def test_a_reward_may_change_what_it_is_shown():
    def spoils(sample, condition=None):
        condition.zero_()
        return sample.zero_().flatten(1).sum(1)

    env = DiffusionVectorEnv("Digits", 3, steps=1, reward=spoils, conditional=True)
    env.reset(seed=0, options={"condition": 1})
    action = torch.ones(3, 1, 8, 8)
    seen, *_ = env.step(action)
    assert torch.equal(seen["sample"], action)
    assert seen["condition"].tolist() == [1, 1, 1]
