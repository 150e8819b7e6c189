"""What the command line knows of an environment, from Python."""

import numpy as np
import pytest
import torch

from fewstep.agents import AGENTS, RDPO, SFTPG, BehaviorCloning, SolverLearning
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.presets import CLONING, FINE_TUNING, PROCESSES, SCHEDULES, preset
from fewstep.agents.solver_learning.joint.presets import SOLVER_PRESETS
from fewstep.agents.solvers import make_solver
from fewstep.envs.mdp import no_reward
from fewstep.envs.processes import make_process
from fewstep.envs.registration import ENVIRONMENTS, make_mdp
from fewstep.runs.run.building import check
from fewstep.runs.settings.train import parse


def test_presets_name_what_there_is():
    agents = {key[1] for table in (FINE_TUNING, PROCESSES, SCHEDULES) for key in table}
    environments = {key[0] for table in (FINE_TUNING, PROCESSES, SCHEDULES) for key in table}
    assert agents <= AGENTS.keys()
    assert environments | CLONING.keys() == ENVIRONMENTS.keys()


@pytest.mark.parametrize(
    ("env", "agent", "flags", "settings"),
    [
        ("SwissRoll", "sft-pg", [], {}),
        ("SwissRoll", "sft-pg", ["--preset=long"], {"preset": "long"}),
        ("Moons", "sft", ["--optimizer.learning-rate=1e-3"], {"learning_rate": 1e-3}),
        ("Digits", "sft-pg", ["--solver-options", "variance", "beta", "last_std", "0.1"],
         {"solver_options": {"variance": "beta", "last_std": 0.1}}),
        ("GaussianCluster", "dode", [], {}),
        ("Digits", "behavior-cloning", [], {}),
    ],
)  # fmt: skip
def test_the_agent_is_the_command_s(env, agent, flags, settings):
    """Every constructor argument, the budget, and the denoiser that would be cloned first."""
    parsed = parse([f"--env={env}", f"--agent={agent}", "--device=cpu", *flags])
    mdp = check(parsed)
    theirs = AGENTS[agent](mdp, new_denoiser(mdp), parsed.agent)
    budget = preset(env, agent, settings.get("preset", "default"))
    process = None if budget.process is None else make_process(budget.process)
    here = make_mdp(env, process=process, schedule=mdp.schedule, reward=no_reward)
    ours = AGENTS[agent].for_environment(here, new_denoiser(here), **settings)
    assert ours.settings == theirs.settings
    assert (ours.solver, ours.solver_options) == (theirs.solver, theirs.solver_options)
    assert ours.budget == theirs.budget
    for one, other in zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_solver_leaves_the_preset_s_options():
    mdp = make_mdp("Digits", reward=no_reward)
    agent = SFTPG.for_environment(mdp, new_denoiser(mdp), solver="fast-dpm")
    assert "variance" not in agent.solver_options
    assert agent.settings.policy.log_density == "mean"  # the rest of the preset holds
    same = SFTPG.for_environment(mdp, new_denoiser(mdp), solver="ancestral")
    assert same.solver_options == {"variance": "small", "last_std": 0.05}


@pytest.mark.parametrize("name", SOLVER_PRESETS)
def test_a_published_preset_is_the_same_on_images_but_for_batches_and_features(name):
    theirs, here = preset("SwissRoll", "solver", name).agent, preset("MNIST", "solver", name).agent
    told = SolverLearning.Settings().replace(**here)
    # Adam takes one batch a step, so that more of them cost it little.
    many = {"batches": 8} if told.descent.optimizer == "adam" else {"rounds": 6}
    # The kernel distance is one of features wherever there are some for certain.
    seen = {"compared": "features"} if told.loss.distance == "kid" else {}
    assert here == {**theirs, "batch_size": 50, **many, **seen}
    assert told.batch_size == 50
    assert preset("Digits", "solver", name).agent == {**theirs, **seen}
    assert preset("ImageFolder", "solver", name).agent == {**theirs, "batch_size": 50, **many}


def test_an_environment_of_one_s_own_has_no_presets(make_mdp, make_denoiser):
    agent = BehaviorCloning.for_environment(make_mdp(), make_denoiser(), batch_size=8)
    assert (agent.settings.batch_size, agent.settings.optimizer.learning_rate) == (8, 5e-3)
    assert agent.budget == 2000
    with pytest.raises(ValueError, match="unknown preset of behavior-cloning on Cluster 'long'"):
        BehaviorCloning.for_environment(make_mdp(), make_denoiser(), preset="long")


@pytest.mark.parametrize("agent", [BehaviorCloning, SFTPG])
def test_another_agent_s_average_has_nothing_to_train(agent, make_mdp, make_denoiser):
    first = BehaviorCloning(make_mdp(), make_denoiser(), ema=0.9)
    with pytest.raises(ValueError, match="load the denoiser from its file"):
        agent(make_mdp(), first.sampling_denoiser)


def test_an_id_names_an_environment_too():
    mdp = make_mdp("SwissRoll")
    agent = SFTPG.for_environment("fewstep/SwissRoll-v0", new_denoiser(mdp))
    assert agent.averaged.decay == 0.97


def test_an_id_is_made_for_the_preset_s_solver():
    """Of DDIM, on whose default times the last one is 0, and not of the agent's own default."""
    denoiser = new_denoiser(make_mdp("Digits"))
    agent = SolverLearning.for_environment("fewstep/Digits-v0", denoiser, preset="ddss")
    plain = SolverLearning("fewstep/Digits-v0", denoiser, solver="ddim")
    assert agent.solver == "ddim"
    assert np.array_equal(agent.base.times, plain.base.times)


def test_a_table_to_start_from_goes_with_the_preset(tmp_path):
    mdp = make_mdp("Digits", steps=4, reward=lambda x: -x.square().flatten(1).sum(1))
    denoiser = new_denoiser(mdp)
    table = make_solver("ddim", mdp.schedule, denoiser)
    table = table.replace(weights=1.01 * table.weights)
    table.save(tmp_path / "table.json")
    for given in ({"tableau": table}, {"table": str(tmp_path / "table.json")}):
        agent = RDPO.for_environment(mdp, denoiser, solver="ddim", **given)
        assert np.array_equal(agent.given.weights, table.weights)


@pytest.mark.parametrize(
    ("flags", "agent"),
    [
        ([], "sft-v"),
        (["--env=fewstep/Moons-v0"], "sft-v"),
        (["--steps=10"], "sft-v"),
        (["--process=flow"], "sft-pg"),
        (["--steps", "3"], "sft-pg"),
        (["--env=Digits"], "sft-pg"),
        (["--agent=sft-pg"], "sft-pg"),
    ],
)
def test_the_command_takes_the_agent_that_serves_the_environment(flags, agent):
    assert parse(flags).run.agent == agent


@pytest.mark.parametrize(("flags", "agent"), [([], "sft-v"), (["--process=flow"], "sft-pg")])
def test_the_process_of_a_cloned_denoiser_counts_too(flags, agent, tmp_path):
    (tmp_path / "config.json").write_text(parse(flags, agent="behavior-cloning").to_json())
    for place in (tmp_path, tmp_path / "denoiser.safetensors"):
        assert parse([f"--denoiser={place}"]).run.agent == agent
