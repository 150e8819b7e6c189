"""A pipeline with our scheduler draws what the tableau draws, in diffusers' own loop."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.denoisers.networks import MLP
from fewstep.agents.denoisers.parameterisations import time_range_of
from fewstep.agents.pretrained import export_pipeline, from_pretrained
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.solvers import afs, ancestral, ddim, dpm_solver_pp, heun, make_solver
from fewstep.envs import VE, DiscreteVP, Schedule

VP = DiscreteVP.linear(1000, 1e-4, 5e-3)  # keeps an untrained network's samples of unit size
EDM = VE()


@pytest.fixture
def make(make_unet):
    """`make(process, prediction)`: a denoiser with a small U-Net."""

    def denoiser(process=VP, prediction="epsilon", clip=False):
        time_range = time_range_of("edm", process) if prediction == "edm" else None
        body = make_unet(time_range=time_range)
        return Denoiser(body, process, prediction, sigma_data=0.6, clip=clip)

    return denoiser


def open_pipeline(folder):
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps, generator, batch_size=3):
    """Run the pipeline; return the last step's samples, which its images clamp and round."""
    step, seen = pipeline.scheduler.step, []

    def noted(*args, **options):
        seen.append(step(*args, **options))
        return seen[-1]

    pipeline.scheduler.step = noted
    images = pipeline(
        batch_size=batch_size,
        num_inference_steps=steps,
        generator=generator,
        output_type="pt",
    ).images
    del pipeline.scheduler.step
    samples = seen[-1].prev_sample
    assert torch.equal(images, (samples / 2 + 0.5).clamp(0, 1))
    return samples


def sample(tableau, denoiser, generator, batch_size=3, scale=1.0):
    """Sample with the tableau itself from the noise that the pipeline starts from."""
    dtype = next(denoiser.parameters()).dtype
    start = scale * torch.randn(batch_size, 2, 8, 8, generator=generator, dtype=dtype)
    with torch.no_grad():
        return tableau.sample(denoiser, start, generator=generator)


TABLES = {
    "one-step": lambda process: ddim(Schedule.uniform(process, 4)),
    "one-call": lambda process: ddim(Schedule.uniform(process, 1)),
    "fractional-times": lambda process: ddim(Schedule.karras(process, 4)),
    "multistep": lambda process: dpm_solver_pp(Schedule.log_snr(process, 5), order=2),
    "anchored": lambda process: heun(Schedule.karras(process, 3)),
    "singlestep": lambda process: make_solver("dpm-solver-3", Schedule.log_snr(process, 4)),
    "stochastic": lambda process: ancestral(Schedule.karras(process, 5)),
    "churned": lambda process: heun(Schedule.karras(process, 3), s_churn=1.0),
    "clipped": lambda process: ancestral(Schedule.karras(process, 4), clip=True),
    "not-asked": lambda process: afs(dpm_solver_pp(Schedule.log_snr(process, 5), order=2)),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v"])
def test_the_pipeline_draws_what_the_tableau_draws(name, prediction, make, generator, tmp_path):
    denoiser, tableau = make(VP, prediction), TABLES[name](VP)
    export_pipeline(denoiser, tmp_path, tableau)
    ours = sample(tableau, denoiser, generator(3))
    assert torch.equal(draw(open_pipeline(tmp_path), tableau.steps, generator(3)), ours)


@pytest.mark.parametrize("name", TABLES)
def test_the_pipeline_runs_edm_from_unit_noise(name, make, generator, tmp_path):
    denoiser, tableau = make(EDM, "edm"), TABLES[name](EDM)
    export_pipeline(denoiser, tmp_path, tableau)
    # In float64, as samples of unit size are differences of states of 80.
    pipeline, denoiser = open_pipeline(tmp_path).to(torch.float64), denoiser.double()
    theirs = draw(pipeline, tableau.steps, generator(3))
    # The pipeline computes the U-Net's times in float32, and so has ours to.
    denoiser.body.register_forward_pre_hook(lambda _, asked: (asked[0], asked[1].float()))
    # The pipeline's noise is the network's scaled input: the state begins 3e-5 wider.
    ours = sample(tableau, denoiser, generator(3), scale=math.hypot(80, 0.6))
    # The rounding of states of 80, which dpm-solver-3 magnifies a thousandfold, with a margin.
    tolerance = 50 * torch.finfo(torch.float64).eps * 80 * 1000
    torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance)
    plain = sample(tableau, denoiser, generator(3), scale=80)
    torch.testing.assert_close(theirs, plain, rtol=1e-3, atol=1e-3)


def test_the_pipeline_asks_the_network_as_the_tableau_does(make, generator, tmp_path, count_calls):
    denoiser, tableau = make(EDM, "edm"), heun(Schedule.karras(EDM, 3))
    export_pipeline(denoiser, tmp_path, tableau)
    pipeline = open_pipeline(tmp_path)
    theirs, ours = count_calls(pipeline.unet), count_calls(denoiser.body.unet)
    draw(pipeline, tableau.steps, generator())
    sample(tableau, denoiser, generator())
    assert theirs.times == ours.times
    assert len(theirs) == tableau.steps


def test_times_are_whole_where_they_can_be(make, tmp_path):
    for name, whole in (("one-step", True), ("fractional-times", False)):
        tableau = TABLES[name](VP)
        export_pipeline(make(), tmp_path, tableau)
        timesteps = open_pipeline(tmp_path).scheduler.timesteps
        assert timesteps.dtype == (torch.int64 if whole else torch.float32)
        np.testing.assert_allclose(timesteps, tableau.times[:-1] - 1, rtol=1e-6)


def test_a_pipeline_samples_again_and_again(make, generator, tmp_path):
    tableau = TABLES["multistep"](VP)
    export_pipeline(make(), tmp_path, tableau)
    pipeline = open_pipeline(tmp_path)
    first = draw(pipeline, tableau.steps, generator(1))
    draw(pipeline, tableau.steps, generator(2), batch_size=5)
    state = torch.randn(1, 2, 8, 8)
    pipeline.scheduler.set_timesteps(tableau.steps)  # a batch that was left halfway
    pipeline.scheduler.step(state, pipeline.scheduler.timesteps[0], state)
    assert torch.equal(draw(pipeline, tableau.steps, generator(1)), first)


def test_each_sample_may_have_its_own_generator(make, generator, tmp_path):
    denoiser, tableau = make(), TABLES["stochastic"](VP)
    export_pipeline(denoiser, tmp_path, tableau)
    pipeline = open_pipeline(tmp_path)
    theirs = draw(pipeline, tableau.steps, [generator(seed) for seed in range(3)])
    ours = [sample(tableau, denoiser, generator(seed), batch_size=1) for seed in range(3)]
    torch.testing.assert_close(theirs, torch.cat(ours), rtol=1e-4, atol=1e-5)
    alone = draw(pipeline, tableau.steps, [generator(0)], batch_size=1)
    assert torch.equal(alone, ours[0])


def test_the_state_between_steps_may_be_edited(make, generator, tmp_path):
    """Inpainting and the like overwrite the sample that `step` returned."""
    tableau = TABLES["one-step"](VP)
    denoiser = make()
    export_pipeline(denoiser, tmp_path, tableau)
    scheduler = open_pipeline(tmp_path).scheduler
    state = torch.randn(3, 2, 8, 8, generator=generator())
    states = [state]
    with torch.no_grad():
        for j, t in enumerate(scheduler.timesteps):
            raw = denoiser.body.unet(scheduler.scale_model_input(state, t), t).sample
            (state,) = scheduler.step(raw, t, state, return_dict=False)
            output = tableau.evaluate(denoiser, states[-1], j)
            states.append(tableau.advance(j, {j: states[-1]}, {j: output}))
            state, states[-1] = state * 0.9, states[-1] * 0.9
    assert torch.equal(state, states[-1])


def test_a_half_precision_pipeline_sums_in_float32(generator):
    table = json.loads(TABLES["multistep"](VP).to_json())
    wide, half = TableauScheduler(table), TableauScheduler(table)
    state = torch.randn(3, 2, 8, 8, generator=generator()).half()
    for t in wide.timesteps:
        answer = torch.randn(3, 2, 8, 8, generator=generator(1)).half()
        expected = wide.step(answer.float(), t, state.float()).prev_sample
        state = half.step(answer, t, state).prev_sample
        assert state.dtype == torch.float16
        assert torch.equal(state, expected.half())


def test_memory_does_not_grow_with_the_steps():
    tableau = dpm_solver_pp(Schedule.log_snr(VP, 30), order=3)
    scheduler = TableauScheduler(json.loads(tableau.to_json()))
    state, most = torch.zeros(1, 1), 0
    for t in scheduler.timesteps:
        state = scheduler.step(state, t, state).prev_sample
        most = max(most, len(scheduler._states) + len(scheduler._outputs))
    assert most <= 3
    assert not scheduler._states


def test_a_saved_pipeline_is_saved_again_by_diffusers(make, generator, tmp_path):
    denoiser, tableau = make(VP, "v", clip=True), TABLES["multistep"](VP)
    export_pipeline(denoiser, tmp_path / "ours", tableau)
    pipeline = open_pipeline(tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    expected = draw(pipeline, tableau.steps, generator())
    assert torch.equal(
        draw(open_pipeline(tmp_path / "theirs"), tableau.steps, generator()), expected
    )
    again = from_pretrained(tmp_path / "theirs")
    assert (again.process, again.prediction, again.clip) == (VP, "v", True)
    assert torch.equal(sample(tableau, again, generator()), expected)


def test_the_folder_names_our_scheduler_and_holds_the_table(make, tmp_path):
    tableau = TABLES["anchored"](VP)
    export_pipeline(make(), tmp_path, tableau)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["fewstep.agents.pretrained.scheduler", "TableauScheduler"]
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    again = Tableau.from_json(json.dumps(config["tableau"]))
    assert again.to_json() == tableau.to_json()


def test_another_number_of_steps_is_refused(make, tmp_path):
    export_pipeline(make(), tmp_path, TABLES["anchored"](VP))
    pipeline = open_pipeline(tmp_path)
    with pytest.raises(ValueError, match=r"'heun', which makes exactly 5 .*=5, not 1000\."):
        pipeline()
    assert pipeline.scheduler.num_inference_steps == 5
    pipeline.scheduler.set_timesteps()
    assert len(pipeline.scheduler.timesteps) == 5


def test_steps_out_of_turn_are_refused():
    scheduler = TableauScheduler(json.loads(TABLES["one-step"](VP).to_json()))
    state = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="turn of timestep 999, not of timestep 249"):
        scheduler.step(state, scheduler.timesteps[-1], state)
    for t in scheduler.timesteps:
        scheduler.step(state, t, state)
    with pytest.raises(ValueError, match=r"turn of set_timesteps\(\), not of timestep 999"):
        scheduler.step(state, scheduler.timesteps[0], state)


def test_what_a_pipeline_cannot_run_is_not_exported(make, tmp_path):
    tableau = TABLES["one-step"](VP)
    with pytest.raises(ValueError, match="this denoiser's body is a MLP"):
        export_pipeline(Denoiser(MLP((2,), levels=1000), VP), tmp_path, tableau)
    with pytest.raises(ValueError, match=r"made for DiscreteVP.*, the denoiser for VE"):
        export_pipeline(make(EDM, "edm"), tmp_path, tableau)
    with pytest.raises(ValueError, match=r"runs prediction='edm' on VE\(.*\), not 'sample'"):
        export_pipeline(make(EDM, "sample"), tmp_path, TABLES["one-step"](EDM))
    second_head = dataclasses.replace(
        ancestral(Schedule.uniform(VP, 4)), covariance=np.array([0.0, 1.0, 0.0, 0.0])
    )
    with pytest.raises(ValueError, match="a second head of the network, which a diffusers pipel"):
        export_pipeline(make(), tmp_path, second_head)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("prediction", "clip"), [("epsilon", True), ("v", False)])
def test_other_schedulers_get_our_chain(prediction, clip, make, tmp_path):
    """diffusers' way to swap schedulers."""
    process = DiscreteVP.sigmoid(200)
    export_pipeline(make(process, prediction, clip), tmp_path, ddim(Schedule.uniform(process, 5)))
    config = open_pipeline(tmp_path).scheduler.config
    for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
        theirs = kind.from_config(config)
        assert theirs.config.num_train_timesteps == 200
        expected = process.abar[1:].float()
        torch.testing.assert_close(theirs.alphas_cumprod, expected, rtol=1e-4, atol=0)
        assert theirs.config.prediction_type == {"v": "v_prediction"}.get(prediction, prediction)
    assert DDIMScheduler.from_config(config).config.clip_sample is clip
    # And back: the config of a scheduler that was swapped in still holds the table.
    again = TableauScheduler.from_config(DDIMScheduler.from_config(config).config)
    assert np.array_equal(again.tableau.times, open_pipeline(tmp_path).scheduler.tableau.times)


def test_noise_is_added_as_diffusers_adds_it(make, generator, tmp_path):
    export_pipeline(make(), tmp_path, ddim(Schedule.uniform(VP, 5)))
    ours = open_pipeline(tmp_path).scheduler
    theirs = DDPMScheduler(trained_betas=VP.betas.tolist())
    clean, noise = torch.randn(2, 4, 2, 8, 8, generator=generator(1))
    for times in (torch.tensor([0, 3, 500, 999]), torch.tensor([999])):
        expected = theirs.add_noise(clean, noise, times)
        actual = ours.add_noise(clean, noise, times)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ours.add_noise(clean.half(), noise.half(), times).dtype == torch.float16
    with pytest.raises(ValueError, match="times must lie in"):
        ours.add_noise(clean, noise, torch.tensor([1000]))


def test_noise_is_added_at_edm_s_levels(make, generator, tmp_path):
    """What the network reads at each of the table's times: c_in(sigma) (x_0 + sigma noise)."""
    table = heun(Schedule.karras(EDM, 4))
    export_pipeline(make(EDM, "edm"), tmp_path, table)
    scheduler = open_pipeline(tmp_path).scheduler
    assert scheduler.config.trained_betas is None
    clean, noise = torch.randn(2, len(scheduler.timesteps), 2, 8, 8, generator=generator(1))
    actual = scheduler.add_noise(clean, noise, scheduler.timesteps)
    for j, sigma in enumerate(table.times[:-1].tolist()):
        expected = (clean[j] + sigma * noise[j]) / math.hypot(sigma, 0.6)
        torch.testing.assert_close(actual[j], expected, rtol=1e-4, atol=1e-5)
