"""The studies in small: every kind of stage, the table, and what a second call finds finished."""

from __future__ import annotations

import dataclasses
import json
import re
from signal import SIGINT, raise_signal

import numpy as np
import pytest
import torch
from image_files import write_folder, write_mnist
from stable_baselines3 import PPO

from fewstep.agents import AGENTS, DODE, SFTPG, ScheduleLearning
from fewstep.agents.base import Agent
from fewstep.envs.targets import images
from fewstep.runs.settings.benchmark import BenchmarkSettings
from fewstep.runs.studies import STUDIES, agents, chains, timeline
from fewstep.runs.studies.contenders import Contender
from fewstep.runs.studies.stages import Clone, Learn, Sample, fine_tune, run_chain
from fewstep.runs.studies.world import MIXTURE, Scoring, World

QUICK = {"samples": 100, "held_out": 50, "reference_steps": 20}
DIFFUSION = Clone(noisings=1000)


@pytest.fixture
def shrink(monkeypatch):
    """`shrink(name, **changes)`: a study's grid with other parts."""

    def change(name, **changes):
        grid = dataclasses.replace(STUDIES[name].cells, **changes)
        monkeypatch.setitem(STUDIES, name, dataclasses.replace(STUDIES[name], cells=grid))

    return change


@pytest.fixture
def learnt(monkeypatch):
    """The agents that learn, by their names."""
    names = []
    learn = Agent.learn

    def watched(self, *arguments, **keywords):
        names.append(self.name)
        return learn(self, *arguments, **keywords)

    monkeypatch.setattr(Agent, "learn", watched)
    return names


def with_settings(contender, **settings):
    """A contender whose agents have other settings, too."""
    stages = tuple(
        dataclasses.replace(stage, settings={**stage.settings, **settings})
        if isinstance(stage, Learn)
        else stage
        for stage in contender.stages
    )
    return dataclasses.replace(contender, stages=stages)


def quick_world(tmp_path, env=MIXTURE, **settings):
    return World(env, 0, Scoring(**QUICK), BenchmarkSettings("some", tmp_path, **settings))


def records_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_a_study_of_solvers_runs_and_resumes(tmp_path, fewstep, shrink, learnt):
    grid = STUDIES["dode-align"].cells
    shrink("dode-align", envs=(MIXTURE,), scoring=Scoring(**QUICK))
    flags = [f"--log-dir={tmp_path}", "--seeds", "0", "1", "--steps", "5"]
    assert fewstep("benchmark", "dode-align", *flags) == 0
    folder = tmp_path / "benchmark" / "dode-align"
    records = records_of(folder)
    assert len(records) == 2 * len(grid.contenders) == 12 == len(learnt)
    assert {record["calls"] for record in records} == {5}
    assert {"error", "error before", "mmd", "mmd before", "mmd floor"} <= records[0].keys()
    table = (folder / "table.md").read_text()
    assert "| Mixture | DDIM (EDM) | index | 5 |" in table
    assert "c2st ↓ | seconds |" in table, "what an eye sees is in every table"
    assert "Factor error not above 1 for every seed" in table
    assert (folder / "plot.png").stat().st_size > 1000
    # Only the cell that is lost is run again; its agent is found trained.
    (lost,) = folder.glob("cells/mixture__edm-heun__time__5__seed1.json")
    lost.unlink()
    assert fewstep("benchmark", "dode-align", *flags) == 0
    assert len(learnt) == 12
    assert records_of(folder) == records
    assert (folder / "table.md").read_text() == table


def test_chains_that_begin_alike_share_what_they_learned(tmp_path, fewstep, shrink, learnt):
    few = {"schedule_rounds": 2, "batch_size": 20, "batches": 1, "check_teacher": False}
    one, two = {**few, "tuning_rounds": 0}, {**few, "schedule_rounds": 0, "start": "environment"}
    start = (Clone("ve"), Sample("euler"))
    dode = Learn("dode", {"batches": 1, "batch_size": 50})
    tuned = {**two, "tuning_rounds": 2, "tuning_batch_size": 10, "target": "data"}
    shrink(
        "schedule",
        envs=("SwissRoll",),
        contenders=(
            Contender("stage 1", (*start, Learn("schedule", one))),
            Contender("two-stage", (*start, Learn("schedule", one), Learn("schedule", tuned))),
            Contender("and D-ODE", (*start, Learn("schedule", one), dode)),
        ),
        scoring=Scoring(**QUICK),
    )
    flags = [f"--log-dir={tmp_path}", "--rounds=2", "--seeds", "0", "--steps", "5"]
    assert fewstep("benchmark", "schedule", *flags) == 0
    assert learnt == ["behavior-cloning", "schedule", "schedule", "dode"]
    first, second, third = records_of(tmp_path / "benchmark" / "schedule")
    assert first["error before"] == second["error before"] == third["error before"]
    assert second["tuned"]
    for record in (second, third):
        assert record["training calls"] > first["training calls"]
        assert record["seconds"] > first["seconds"]


def test_a_stage_hands_on_what_it_learned(tmp_path):
    """Learning a schedule, then D-ODE, is what the two agents do by hand."""
    few = {"schedule_rounds": 2, "batch_size": 20, "batches": 1, "tuning_rounds": 0}
    start = [DIFFUSION, Sample("ddim", schedule="uniform", schedule_options={"end": 1.0})]
    world = quick_world(tmp_path)
    chain = [*start, Learn("schedule", few), Learn("dode", {"batches": 1})]
    sampler = run_chain(chain, world, 5)
    given = run_chain(start, world, 5)
    mdp = world.mdp(given.denoiser.process, given.schedule)
    first = ScheduleLearning(mdp, given.denoiser, solver="ddim", **few)
    first.learn()
    second = DODE(mdp.with_schedule(first.schedule), given.denoiser, solver="ddim", batches=1)
    second.learn()
    assert sampler.schedule == first.schedule
    np.testing.assert_array_equal(sampler.tableau.weights, second.tableau.weights)
    np.testing.assert_array_equal(sampler.before[0].weights, given.tableau.weights)
    assert sampler.facts["returned"] == second.returned


def test_a_chain_of_agents_is_scored_on_one_clock(tmp_path, learnt, monkeypatch):
    """Each starts from the last one's table and network; a later chain finds them trained."""
    small = {"batch_size": 8, "rounds": 3, "held_out_size": 8, "fine_check": False}
    policy = {"batch_size": 8, "minibatch_size": 8, "rounds": 2}
    monkeypatch.setitem(chains.STAGES, "dode", Learn("dode", {"batches": 1, "form": "all"}))
    monkeypatch.setitem(chains.STAGES, "sfd", Learn("sfd", small))
    monkeypatch.setitem(chains.STAGES, "sft-pg", fine_tune("sft-pg", 0, **policy))
    monkeypatch.setattr(timeline, "FIRST", 0.0)
    scoring = Scoring(**QUICK, timeline=True)
    world = World("SwissRoll", 0, scoring, BenchmarkSettings("some", tmp_path))
    stages = chains.chain("dode", "sfd", "sft-pg", clone=dataclasses.replace(DIFFUSION, rounds=2))
    first, second, third = (run_chain(stages.stages[:n], world, 4) for n in (3, 4, 6))
    assert learnt == ["behavior-cloning", "dode", "sfd", "sft-pg"]
    assert second.tableau.to_json() == first.tableau.to_json()
    assert first.denoiser.process == second.denoiser.process
    # The policy needs a table of its own kind: the solver is built anew on the same times.
    np.testing.assert_array_equal(third.tableau.times, first.tableau.times)
    lines = [sampler.facts["timeline"] for sampler in (first, second, third)]
    assert lines[1][: len(lines[0])] == lines[0] and lines[2][: len(lines[1])] == lines[1]
    for name in ("seconds", "training calls"):
        values = [point[name] for point in lines[2]]
        assert values == sorted(values) and values[0] == 0
        assert third.facts[name] == pytest.approx(values[-1])
    given = run_chain(stages.stages[:2], world, 4)
    scored = world.score(given.origin, given.pretrained, given.tableau, given.denoiser)
    assert scored.items() <= lines[2][0].items()
    scored = world.score(third.origin, third.pretrained, third.tableau, third.denoiser)
    assert scored.items() <= lines[2][-1].items()


@pytest.mark.parametrize("name", ["quality-time", "quality-time-digits"])
def test_every_agent_takes_up_the_table_before_it_or_its_times(name):
    """A policy has a solver of its own kind; what is learned of a table goes on with that."""
    labels = {contender.label: contender.stages for contender in STUDIES[name].cells.contenders}
    kinds = {
        "solver > rdpo": ["dpm-solver++-3m", "solver", "rdpo"],
        "pd > sft": ["ddim", "pd", "sft"],
        "solver > sfd > sft-pg": ["dpm-solver++-3m", "solver", "sfd", "ancestral", "sft-pg"],
    }
    for label, stages in kinds.items():
        found = [getattr(s, "agent", getattr(s, "solver", None)) for s in labels[label][1:]]
        assert found == stages


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_chains_go_on_from_the_table_that_was_learned(tmp_path, fewstep, shrink, monkeypatch):
    """RDPO draws around it, SFT trains the network for it, SFT-PG acts at its times."""
    distilled = {"batch_size": 8, "held_out_size": 8, "fine_check": False}
    solver = {"batch_size": 20, "batches": 1, "scale": 2, "start": "distilled", "optimizer": "adam"}
    policy = {"batch_size": 8, "n_critic": 1}
    smaller = {
        "solver": Learn("solver", {**solver, "check_teacher": False}),
        "rdpo": Learn("rdpo", {"batch_size": 8, "held_out": 20, "check_interval": 1}),
        "pd": Learn("pd", {**distilled, "teacher_steps": 8}),
        "sfd": Learn("sfd", distilled),
        "sft": fine_tune("sft", 0, **policy),
        "sft-pg": fine_tune("sft-pg", 0, **policy, n_generator=1, minibatch_size=8),
    }
    for name, stage in smaller.items():
        monkeypatch.setitem(chains.STAGES, name, stage)
    given, build = {}, Learn._build

    def watched(self, sampler, world):
        agent = build(self, sampler, world)
        given[self.agent] = sampler, agent.starting_tableau(agent.denoiser)
        return agent

    monkeypatch.setattr(Learn, "_build", watched)
    names = [("solver", "rdpo"), ("pd", "sft"), ("solver", "sfd", "sft-pg")]
    assert set(names) < set(chains.CHAINS)
    contenders = tuple(chains.chain(*each) for each in names)
    shrink("quality-time", contenders=contenders, scoring=Scoring(**QUICK, timeline=True))
    flags = [f"--log-dir={tmp_path}", "--rounds=2", "--seeds", "0", "--steps", "4"]
    assert fewstep("benchmark", "quality-time", *flags) == 0
    records = records_of(tmp_path / "benchmark" / "quality-time")
    assert [record["contender"] for record in records] == [" > ".join(each) for each in names]
    assert {record["calls"] for record in records} == {4}
    for name in ("rdpo", "sfd", "sft"):
        before, table = given[name]
        assert table.to_json() == before.tableau.to_json()
        assert table.name.startswith("learned") == (name != "sft")
    assert given["sft"][1].name == "ddim"
    before, table = given["sft-pg"]
    assert table.name.startswith("ancestral")
    np.testing.assert_array_equal(table.times, before.schedule.times)


def test_quality_against_time_is_when_a_level_was_reached():
    """Of three contenders on a clock that was made up, in units of a training's first round."""

    def record(who, calls, *scores, seed=0):
        points = [
            {"seconds": 2.0 * n, "training calls": 10 * n, "error": score}
            for n, score in enumerate(scores)
        ]
        places = {"env": "SwissRoll", "solver": "", "contender": who, "calls": calls, "seed": seed}
        last = {"error": scores[-1]}
        return {**places, **last} | ({"timeline": points} if len(points) > 1 else {})

    records = [record("DDIM", 5, 1.0), record("DDIM", 20, 0.25)]
    records += [record("a", 5, 1.0, 0.5, 0.2), record("b", 5, 2.0, 0.9, 0.3)]
    text, picture = timeline.present("Title", records, ("error",), "DDIM")
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("|")}
    assert rows["a"] == "| SwissRoll | a | 5 | 2.00e-01 | 0 | 4 s, 2.0e+01 | 4 s, 2.0e+01 |"
    assert rows["b"] == "| SwissRoll | b | 5 | 3.00e-01 | 2 s, 1.0e+01 | - | 4 s, 2.0e+01 |"
    assert len(picture.axes) == 1


@pytest.mark.parametrize("name", sorted({*AGENTS} - {"behavior-cloning", "variance"}))
def test_a_quick_look_shortens_every_training(tmp_path, name):
    """But for a stage that is left out; D-ODE's rounds are its refinement's, Gamma's noisings."""
    world = quick_world(tmp_path, "SwissRoll", rounds=3)
    start = run_chain([Clone("linear-1000"), Sample("ddim")], world, 4)
    others = {"cd": "consistency", "dmd": "consistency"}
    others |= dict.fromkeys(("sft", "sft-pg", "sft-v"), "ancestral")
    sampler = dataclasses.replace(start, solver=(others.get(name, "ddim"), {}))
    agent = Learn(name)._build(sampler, world)
    if name == "dode":
        assert agent.settings.refine_steps == 3
    else:
        # Two stages, and four halvings.
        assert agent.budget == 3 * {"schedule": 2, "pd": 4}.get(name, 1)
    if name == "schedule":
        assert Learn(name, {"tuning_rounds": 0})._build(sampler, world).budget == 3


def test_sft_pg_goes_on_from_its_checkpoint_to_the_same_end(tmp_path, monkeypatch):
    few = {"batch_size": 16, "minibatch_size": 16}
    chain = [Clone(), Sample("ancestral"), fine_tune("sft-pg", evaluations=2, **few)]
    ends, train_round = [], SFTPG.train_round

    def stopping(self):
        if self.rounds == 1:
            raise_signal(SIGINT)
        return train_round(self)

    for name in ("at once", "interrupted"):
        world = quick_world(tmp_path / name, "SwissRoll", rounds=4)
        run_chain(chain[:2], world, 5)
        if name == "interrupted":
            with monkeypatch.context() as patch:
                patch.setattr(SFTPG, "train_round", stopping)
                with pytest.raises(KeyboardInterrupt):
                    run_chain(chain, world, 5)
        sampler = run_chain(chain, world, 5)
        assert len(sampler.facts["curve"][0]) == 2
        ends.append(sampler.denoiser.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_ctrl_c_in_a_study_says_so_and_ends_with_130(tmp_path, fewstep, shrink, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(World, "score", interrupted)
    shrink("dode-align", envs=(MIXTURE,))
    assert fewstep("benchmark", "dode-align", f"--log-dir={tmp_path}", "--steps", "5") == 130


def test_a_study_of_agents_shows_before_after_and_floor(tmp_path, fewstep, shrink, learnt):
    quick = {"batch_size": 16, "minibatch_size": 16}
    shrink("gradients", contenders=(with_settings(agents.SFT_PG_B, **quick),))
    flags = [f"--log-dir={tmp_path}", "--rounds=2", "--evaluation-samples=100", "--seeds", "0", "1"]
    assert fewstep("benchmark", "gradients", *flags) == 0
    assert learnt == ["behavior-cloning", "sft-pg", "sft-pg"]  # one denoiser for all seeds
    folder = tmp_path / "benchmark" / "gradients"
    table = (folder / "table.md").read_text()
    row = next(line for line in table.splitlines() if "SFT-PG (B)" in line)
    assert len(re.findall(r" → [^|]+ \(\d[^|]+\) \|", row)) == 4
    assert (folder / "plot.png").is_file()


@pytest.mark.slow
def test_ppo_of_another_library_is_a_stage_like_any_other(tmp_path, fewstep, monkeypatch):
    """It trains the same network in the same calls; a second study finds it trained."""
    flags = ["benchmark", "ppo", f"--log-dir={tmp_path}", "--rounds=1", "--evaluation-samples=200"]
    fewstep(*flags)
    folder = tmp_path / "benchmark" / "ppo"
    records = {r["contender"]: r for r in json.loads((folder / "results.json").read_text())}
    ppo = [records[name] for name in ("PPO, default reward", "PPO, learned critic")]
    assert [record["training calls"] for record in ppo] == [5 * 256 * 10] * 2
    assert records["SFT-PG (B)"]["training calls"] == 5 * 256 * 10
    ends = [record["sliced_wasserstein_fresh"] for record in ppo]
    befores = {record["sliced_wasserstein_fresh before"] for record in ppo}
    assert len({*ends, *befores}) == 3  # both have moved the one network, each its own way
    for cell in (folder / "cells").iterdir():
        cell.unlink()
    monkeypatch.setattr(PPO, "learn", lambda *_, **__: pytest.fail("it is trained already"))
    fewstep(*flags)
    again = {r["contender"]: r for r in json.loads((folder / "results.json").read_text())}
    assert [again[record["contender"]]["sliced_wasserstein_fresh"] for record in ppo] == ends


def test_missing_data_are_one_sentence_that_says_how_to_give_them(tmp_path, fewstep, capsys):
    flags = [f"--log-dir={tmp_path}", f"--data-dir={tmp_path}"]
    assert fewstep("benchmark", "mnist", *flags) == 2
    out, said = capsys.readouterr()
    assert said.startswith("fewstep: MNIST is not at hand: ") and said.count("\n") == 1
    assert "--data-dir" in said and "--download" in said
    assert "not at hand" not in out


def test_missing_data_are_fetched_if_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(images, "_provide", lambda *given: asked.append(given[-1]))
    write_mnist(tmp_path)
    for download in (True, False):
        settings = BenchmarkSettings("mnist", tmp_path, data_dir=tmp_path, download=download)
        assert len(World("MNIST", 0, Scoring(), settings).target) == 30
    assert asked == [True, False]


def test_contenders_that_cannot_spend_the_calls_are_left_out(tmp_path, fewstep, capsys):
    settings = BenchmarkSettings("solver-learning", log_dir=tmp_path, steps=(1, 5), seeds=(0,))
    keys = [cell.key for cell in STUDIES["solver-learning"].cells(settings)]
    assert "mixture__ddim__1__seed0" in keys
    assert "mixture__dpm-solver++-2m__5__seed0" in keys
    assert "mixture__dpm-solver++-2m__1__seed0" not in keys
    assert "Left out: dpm-solver++-2m with 1 calls." in " ".join(capsys.readouterr().out.split())
    # Where none can, nothing begins.
    assert fewstep("benchmark", "last-steps", f"--log-dir={tmp_path}", "--steps", "1") == 2
    assert "needs at least 2 network calls" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


# So few steps of FastDPM start late, and say so.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sampling starts from pure noise")
def test_the_study_of_samplers(tmp_path, fewstep, shrink):
    wanted = {"DDPM, sub-sampled", "SN-DDPM", "D-DDIM", "SFT-PG (B)"}
    yardstick, *others = STUDIES["samplers"].cells.contenders
    few = [contender for contender in others if contender.label in wanted]
    shrink("samplers", contenders=(dataclasses.replace(yardstick, calls=(7,)), *few))
    flags = [f"--log-dir={tmp_path}", "--rounds=1", "--seeds", "0", "--steps", "4"]
    assert fewstep("benchmark", "samplers", *flags) == 0
    folder = tmp_path / "benchmark" / "samplers"
    records = records_of(folder)
    assert {(record["contender"], record["calls"]) for record in records} == {
        ("DDPM, every noising", 7),
        *((label, 4) for label in wanted),
    }
    table = (folder / "table.md").read_text()
    assert "frechet_distance[digits-classifier] ↓" in table
    assert "precision[digits-classifier] ↑" in table
    assert "Better than 'DDPM, every noising' in frechet_distance" in table
    assert (folder / "plot.png").stat().st_size > 1000
    cells = {file: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    assert fewstep("benchmark", "samplers", *flags) == 0
    assert cells == {file: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}


def test_the_study_on_mnist(tmp_path, fewstep, shrink):
    write_mnist(tmp_path)
    contender = STUDIES["mnist"].cells.contenders[1]
    few = with_settings(contender, batch_size=4, minibatch_size=4, critic_width=8)
    clone = dataclasses.replace(few.stages[0], body_options={"width": 8, "levels": 3})
    few = dataclasses.replace(few, stages=(clone, *few.stages[1:]))
    shrink("mnist", contenders=(few,))
    flags = [f"--log-dir={tmp_path}", f"--data-dir={tmp_path}", "--rounds=1", "--steps", "3"]
    assert fewstep("benchmark", "mnist", *flags, "--evaluation-samples=8") == 0
    table = (tmp_path / "benchmark" / "mnist" / "table.md").read_text()
    assert "5 generator steps, gamma 1" in table
    assert "frechet_distance[mnist-classifier]" in table


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "captions"])
def test_a_study_on_a_folder_of_pictures(kind, tmp_path, fewstep, shrink, capsys):
    """Guided solvers and a fine-tuned network, by class and by caption; each folder has its own."""
    pictures = tmp_path / "pictures"
    write_folder(pictures)
    names = sorted(str(file.relative_to(pictures)) for file in pictures.glob("*/*.png"))
    (pictures / "captions.tsv").write_text("".join(f"{name}\ta picture\n" for name in names))
    narrow = {"body_options": {"width": 8, "levels": 2}}

    def small(study, *labels):
        chosen = [c for c in STUDIES[study].cells.contenders if c.label in labels]
        chosen = [with_settings(c, batch_size=4) for c in chosen if c.solver in ("", "w = 2")]
        clones = [dataclasses.replace(c.stages[0], **narrow) for c in chosen]
        contenders = tuple(
            dataclasses.replace(c, stages=(clone, *c.stages[1:]))
            for c, clone in zip(chosen, clones, strict=True)
        )
        scoring = dataclasses.replace(STUDIES[study].cells.scoring, held_out=4, reference_steps=2)
        shrink(study, contenders=contenders, scoring=scoring)
        flags = [f"--log-dir={tmp_path}", "--rounds=1", "--seeds=0", "--steps=3"]
        return ["benchmark", study, *flags, f"--data-dir={pictures}", "--evaluation-samples=4"]

    solvers = small(f"guidance-{kind}", "UniPC-2")
    assert fewstep(*solvers, "--image-size=8") == 0
    (record,) = records_of(tmp_path / "benchmark" / f"guidance-{kind}")
    assert "RectifiedFlow" in record["process"] and record["evaluations"] == 6
    assert "class_accuracy[imagefolder-classifier]" in record
    tuned = small(f"guided-sft-{kind}", "sft, half mismatched, w = 1")
    assert fewstep(*tuned, "--image-size=8") == 0
    (record,) = records_of(tmp_path / "benchmark" / f"guided-sft-{kind}")
    assert "frechet_distance[imagefolder-classifier] before" in record
    denoisers = tmp_path / "benchmark" / "denoisers"
    assert len(list(denoisers.iterdir())) == 1, "the two studies share their network"
    # Of another size it is another network, and other cells.
    assert fewstep(*solvers, "--image-size=12") == 0
    assert len(list(denoisers.iterdir())) == 2
    capsys.readouterr()
    assert fewstep("benchmark", "guided-sft", f"--log-dir={tmp_path}", "--image-size=8") == 2
    assert "the size of Digits is fixed" in capsys.readouterr().err
