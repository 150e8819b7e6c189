"""The one protocol of all agents: a budget of their own, counted calls, a report of plain data."""

import json

import pytest
import torch
from rounds import learn_rounds

from fewstep.agents import AGENTS
from fewstep.agents.report import Panel, Report
from fewstep.envs import DiffusionVectorEnv, Schedule

FALLING = {"batch_size": 8, "lr_schedule": "cosine", "rounds": 5, "ema": 0.5}
FEW = {"batch_size": 10, "batches": 1, "scale": 2}
DISTILLED = {"batch_size": 8, "size": 8, "scale": 2}
BUDGETS = {
    "behavior-cloning": (FALLING, 5),
    "sft": ({**FALLING, "n_critic": 1}, 5),
    "sft-pg": ({**FALLING, "n_critic": 1, "n_generator": 1}, 5),
    "sft-v": ({**FALLING, "n_critic": 1}, 5),
    "dode": ({**FEW, "refine": "end-to-end", "refine_steps": 2}, 3),
    "schedule": ({**FEW, "schedule_rounds": 2, "tuning_rounds": 3, "tuning_batch_size": 8}, 5),
    "solver": ({**FEW, "batch_size": 4, "rounds": 3, "optimizer": "adam", "start": "given"}, 3),
    "variance": ({"batch_size": 10, "samples_per_time": 5}, 2),
    "sfd": ({**DISTILLED, "rounds": 4}, 4),
    "pd": ({**DISTILLED, "rounds": 2, "teacher_steps": 16}, 4),
    "cd": ({**DISTILLED, "rounds": 3}, 3),
    "dmd": ({**DISTILLED, "rounds": 3, "n_fake": 1}, 3),
}


@pytest.fixture
def agent_of(make_mdp, smooth_denoiser):
    """`agent_of(name)`: an agent with a small budget; the schedule's network is smooth in time."""

    def make(name, **changes):
        denoiser, schedule = smooth_denoiser()
        mdp = make_mdp(schedule=schedule)
        return AGENTS[name](mdp, denoiser, **{**BUDGETS[name][0], **changes})

    return make


@pytest.fixture
def smooth_denoiser(make_denoiser, process):
    from fewstep.agents import Denoiser
    from fewstep.agents.denoisers.networks.residual_mlp import ResidualMLP

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            body = ResidualMLP((2,), hidden=8, blocks=1)
            for weight in body.parameters():
                torch.nn.init.normal_(weight, std=0.2)
        return Denoiser(body, process), Schedule.uniform(process, 4)

    return make


def same_weights(one, other):
    pairs = zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


OPTIMIZER, CRITIC = "optimizer.learning_rate", "critic.learning_rate"
LOWERED = {
    ("behavior-cloning",): [OPTIMIZER],
    ("sfd",): [OPTIMIZER],
    ("dode",): [],
    ("dmd",): [OPTIMIZER],
    ("dmd", "fake_learning_rate", 1e-3): [OPTIMIZER, "fake_learning_rate"],
    ("dmd", "adversarial", 0.1): [OPTIMIZER, CRITIC],
    ("schedule",): ["schedule_learning_rate", "tuning.learning_rate"],
    ("schedule", "tuning_rounds", 0): ["schedule_learning_rate"],
    ("schedule", "gradient", "none"): ["tuning.learning_rate"],
    ("variance",): [],
    ("variance", "kind", "npr"): [OPTIMIZER],
}


@pytest.mark.parametrize("case", LOWERED)
def test_what_to_lower_after_divergence_is_what_the_agent_reads(case, agent_of):
    name, *change = case
    changes = dict([change]) if change else {}
    assert agent_of(name, **changes).step_sizes() == LOWERED[case]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BUDGETS)
def test_learn_trains_until_the_agent_s_own_budget_is_done(name, agent_of):
    agent = agent_of(name)
    assert agent.progress == 0 and not agent.done
    seen = []
    agent.learn(callback=lambda _locals, _globals: seen.append(agent.progress) or True)
    assert agent.rounds == agent.budget == BUDGETS[name][1]
    assert agent.done and agent.progress == 1
    assert seen == [n / agent.budget for n in range(1, agent.budget + 1)]
    agent.learn(reset_num_timesteps=False)
    assert agent.rounds == agent.budget


@pytest.mark.parametrize("name", ["behavior-cloning", "sft", "sft-pg", "sft-v"])
def test_a_budget_is_as_many_timesteps_bit_for_bit(name, agent_of):
    """The learning rate falls with the progress, of which both say the same."""
    ours, theirs, interrupted = (agent_of(name) for _ in range(3))
    ours.learn()
    theirs.learn(5 * theirs.timesteps_per_round)
    learn_rounds(interrupted, 3)
    interrupted.learn(reset_num_timesteps=False)
    assert ours.num_timesteps == theirs.num_timesteps
    assert same_weights(ours, theirs) and same_weights(ours, interrupted)
    # A number is obeyed, beyond the agent's own budget too.
    ours.learn(2 * ours.timesteps_per_round, reset_num_timesteps=False)
    assert ours.rounds == 7


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BUDGETS)
def test_a_report_is_plain_data(name, agent_of):
    agent = agent_of(name)
    agent.report()  # at any time
    agent.learn()
    report = agent.report()
    json.dumps([report.sentence, dict(report.results), report.tables])
    for columns in report.tables.values():
        assert len({len(cells) for cells in columns.values()}) == 1
    for panels in report.figures.values():
        for panel in panels:
            assert isinstance(panel, Panel)
            json.dumps(panel.curves)
            assert all(len(x) == len(y) for x, y in panel.curves.values())
    if name in ("behavior-cloning", "sft", "sft-pg", "sft-v"):
        assert report == Report()
    else:
        assert report.sentence == agent.verdict
        assert report.results["errors"] == agent.errors
        assert report.results["returned"] == agent.returned


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", BUDGETS)
def test_files_are_the_sampler(name, agent_of, tmp_path):
    """Beside the checkpoint, which for D-ODE is the table, and of cloning for any sampler."""
    agent = agent_of(name)
    agent.learn()
    names = {"dode": set(), "behavior-cloning": set()}
    names["schedule"] = names["solver"] = {"tableau.json", "schedule.json"}
    assert set(agent.files()) == names.get(name, {"tableau.json"})
    for file, value in agent.files().items():
        value.save(tmp_path / file)
        assert (tmp_path / file).read_text().startswith("{")
    tableau, denoiser = agent.sampler
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    drawn = tableau.sample(denoiser, noise, generator=torch.Generator().manual_seed(1))
    ours = agent.sample(3, noise=noise, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn, ours)
    assert agent.learns_tableau == (name in ("schedule", "solver", "variance"))


def test_counting_ends_with_the_round(agent_of, count_calls):
    agent = agent_of("dode")

    def fail(sample, t):
        raise ValueError("broken")

    forward, agent.denoiser.forward = agent.denoiser.forward, fail
    with pytest.raises(ValueError, match="broken"):
        agent.learn()
    agent.denoiser.forward = forward
    before = agent.num_timesteps
    agent.denoiser(torch.zeros(5, 2), 1.0)
    assert agent.num_timesteps == before


@pytest.mark.parametrize("vector", [False, True])
def test_a_progress_bar_shows_percent(vector, agent_of, make_mdp, capsys):
    agent = agent_of("behavior-cloning")
    if vector:
        agent.env = DiffusionVectorEnv(agent.mdp, 3)
    agent.learn(progress_bar=True)
    assert "100%" in capsys.readouterr().err
