"""`TableauScheduler` as diffusers' pipelines call schedulers, beside those of diffusers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import nn

from fewstep.agents import Denoiser, Tableau
from fewstep.agents.pretrained import plain_grid
from fewstep.agents.pretrained.scheduler import TableauScheduler
from fewstep.agents.samplers.begun import begun_at
from fewstep.agents.solvers import ancestral, ddim, dpm_solver_pp, heun, make_solver
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, Schedule

pytestmark = pytest.mark.numeric

BETAS = {"beta_end": 5e-3}  # keeps samples of unit size
V = {"prediction_type": "v_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
TRAILING = {"timestep_spacing": "trailing", **BETAS}
# A scheduler of theirs, the solver that it is, and how near float32 comes.
ORACLES = [
    (DDIMScheduler(clip_sample=False, **BETAS), "ddim", {}, 1e-5),
    (DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, **V), "ddim", {}, 1e-5),
    (
        DDIMScheduler(set_alpha_to_one=False, steps_offset=1, prediction_type="sample"),
        "ddim",
        {},
        1e-5,
    ),
    (DDIMScheduler(clip_sample=False, **ZERO_SNR), "ddim", {}, 1e-5),
    (EulerDiscreteScheduler(**TRAILING), "euler", {}, 1e-5),
    # diffusers stands 2^-24 for an alpha of 0.
    (EulerDiscreteScheduler(**ZERO_SNR), "euler", {}, 1e-3),
    (HeunDiscreteScheduler(**TRAILING), "heun", {}, 1e-5),
    (DPMSolverMultistepScheduler(**TRAILING), "dpm-solver++-2m", {}, 1e-5),
    (
        DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", solver_type="heun", **TRAILING),
        "dpm-solver++-2m",
        {"solver_type": "taylor"},
        1e-5,
    ),
    (DPMSolverMultistepScheduler(use_karras_sigmas=True, **TRAILING), "dpm-solver++-2m", {}, 1e-5),
    (UniPCMultistepScheduler(**TRAILING), "unipc-2", {}, 1e-5),
    (FlowMatchEulerDiscreteScheduler(shift=3.0), "euler", {}, 1e-5),
    (FlowMatchHeunDiscreteScheduler(shift=3.0), "flow-heun", {}, 1e-5),
    (DPMSolverMultistepScheduler(**FLOW), "dpm-solver++-2m", {}, 1e-5),
    (UniPCMultistepScheduler(**FLOW), "unipc-2", {}, 1e-5),
    (EDMEulerScheduler(), "euler", {}, 1e-5),
    (EDMDPMSolverMultistepScheduler(), "dpm-solver++-2m", {}, 1e-5),
]


class Network(nn.Module):
    """A smooth network."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample, time):
        return torch.tanh(self.mix(sample) + torch.as_tensor(float(time) / 300).sin())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network()


def scaled(scheduler, sample, t):
    # Those of flows have no such method, and their pipelines do not ask.
    known = hasattr(scheduler, "scale_model_input")
    return scheduler.scale_model_input(sample, t) if known else sample


@torch.no_grad()
def loop(scheduler, network, latents, timesteps=None, asked=None):
    """The denoising loop of diffusers' pipelines; `asked` are times for the network alone."""
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    for t, time in zip(timesteps, timesteps if asked is None else asked, strict=True):
        answer = network(scaled(scheduler, latents, t), time)
        latents = scheduler.step(answer, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(("scheduler", "solver", "options", "tolerance"), ORACLES)
def test_a_solver_samples_what_the_scheduler_of_diffusers_does(
    scheduler, solver, options, tolerance, network, generator
):
    noise = torch.randn(2, 2, 4, 4, generator=generator())
    ours = TableauScheduler.from_scheduler(scheduler, solver, 5, **options)
    scheduler.set_timesteps(5)
    start = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    # Some of theirs start from a little more or less than unit noise.
    first = scaled(scheduler, start, scheduler.timesteps[0])
    scheduler.set_timesteps(5)
    theirs = loop(scheduler, network, start)
    # Some of theirs round the times, but not the levels.
    torch.testing.assert_close(ours.timesteps.float(), scheduler.timesteps.float(), rtol=0, atol=1)
    ours.set_timesteps(ours.num_inference_steps)
    found = loop(ours, network, first, asked=scheduler.timesteps)
    scale = max(1.0, float(theirs.abs().max()))
    torch.testing.assert_close(found, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("scheduler", [ORACLES[i][0] for i in (0, 1, 3, 11, 13, 15)])
def test_each_config_says_the_same_to_the_other(scheduler, network, generator, tmp_path):
    """Ours from theirs, and theirs from ours, in memory and from a file."""
    solver = "ddim" if hasattr(scheduler, "betas") or "Flow" in str(scheduler) else "euler"
    ours = TableauScheduler.from_scheduler(scheduler, solver, 4)
    ours.save_pretrained(tmp_path)
    again = TableauScheduler.from_pretrained(tmp_path)
    assert again.tableau.to_json() == ours.tableau.to_json()
    for config in (ours.config, again.config):
        back = type(scheduler).from_config(config)
        scheduler.set_timesteps(4)
        back.set_timesteps(4)
        torch.testing.assert_close(back.timesteps, scheduler.timesteps)
        start = torch.randn(2, 2, 4, 4, generator=generator())
        start = start * getattr(scheduler, "init_noise_sigma", 1.0)
        theirs = loop(scheduler, network, start)
        torch.testing.assert_close(loop(back, network, start), theirs, rtol=1e-4, atol=1e-4)
    assert again.replacing(scheduler) is again


def test_steps_timesteps_and_sigmas_of_its_own_are_taken():
    vp = DDIMScheduler(**BETAS)
    ours = TableauScheduler.from_scheduler(vp, "ddim", 4)
    flow = TableauScheduler.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), "euler", 4)
    for scheduler in (ours, flow):
        times, sigmas = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
        for options in ({"timesteps": times}, {"sigmas": sigmas}, {"sigmas": sigmas[:-1]}):
            scheduler.set_timesteps(**options, device="cpu")
            assert scheduler.timesteps.tolist() == times
        with pytest.raises(ValueError, match=r"which makes exactly 4 network calls: .* not 3"):
            scheduler.set_timesteps(timesteps=times[:3])
        with pytest.raises(ValueError, match=r"for its own timesteps only, .* learn a table"):
            scheduler.set_timesteps(timesteps=[time + 20 for time in times])
        with pytest.raises(ValueError, match="for its own sigmas only"):
            scheduler.set_timesteps(sigmas=[sigma / 2 for sigma in sigmas])
    # What Flux's pipelines pass, and the levels before the shift.
    flow.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=0.7)
    flow.set_timesteps(sigmas=flow.tableau.times[:-1])
    assert (ours.order, len(ours), len(flow)) == (1, 1000, 1000)


def multistep_told_other_times():
    table = dpm_solver_pp(Schedule.uniform(DiscreteVP.linear(1000), 5), order=2)
    return table.replace(asked_times=0.9 * table.times[:-1])


BEGUN = {
    "one-step": lambda: ddim(Schedule.uniform(DiscreteVP.linear(1000), 5)),
    "clipped": lambda: ddim(Schedule.uniform(DiscreteVP.linear(1000), 5), clip=True),
    "stochastic": lambda: ancestral(Schedule.uniform(DiscreteVP.linear(1000), 5)),
    "multistep": lambda: dpm_solver_pp(Schedule.uniform(DiscreteVP.linear(1000), 5), order=2),
    "told other times": multistep_told_other_times,
    "anchored": lambda: heun(Schedule.uniform(DiscreteVP.linear(1000), 3)),
    "flow": lambda: make_solver("unipc-2", Schedule.uniform(RectifiedFlow(), 5)),
}


@pytest.mark.parametrize("name", BEGUN)
def test_a_table_begins_in_the_middle(name, wave, generator):
    """It reads nothing from before, and on a straight path ends where the whole table does."""
    table = BEGUN[name]()
    begun = begun_at(table, 2)
    assert begun.times.tolist() == table.times.tolist()
    for j in range(2, table.steps):
        row = begun.row(j)
        assert row.anchor >= 2
        assert all(k >= 2 for k, _ in row.weights)
        same = table.row(j)
        if same.anchor >= 2 and all(k >= 2 for k, _ in same.weights):
            assert row == same
    if name == "stochastic":
        return
    # Of data that are one point both outputs are constant on the way: every step is exact.
    point, noise = torch.full((1, 2), 0.3).double(), torch.randn(1, 2).double()
    outputs = dict.fromkeys(range(table.steps), noise if table.output == "epsilon" else point)
    levels = [table.process.levels(t) for t in table.times.tolist()]
    states = {2: levels[2][0] * point + levels[2][1] * noise}
    for j in range(2, table.steps):
        states[j + 1] = begun.advance(j, states, outputs)
        expected = levels[j + 1][0] * point + levels[j + 1][1] * noise
        torch.testing.assert_close(states[j + 1], expected, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match=r"from 0 to .* is the first; got 17"):
        begun_at(table, 17)


@pytest.mark.parametrize(
    ("scheduler", "solver"),
    [(ORACLES[0][0], "ddim"), (ORACLES[7][0], "dpm-solver++-2m"), (ORACLES[11][0], "euler")],
)
def test_image_to_image_is_that_of_diffusers(scheduler, solver, network, generator):
    clean, noise = torch.randn(2, 2, 2, 4, 4, generator=generator())
    found = []
    for each in (scheduler, TableauScheduler.from_scheduler(scheduler, solver, 5)):
        each.set_timesteps(5)
        times = each.timesteps[2:]
        if hasattr(each, "set_begin_index"):  # as the pipelines ask
            each.set_begin_index(2)
            assert (each.begin_index, each.step_index) == (2, None)
        add = getattr(each, "scale_noise", None)
        if add is None or not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            start = each.add_noise(clean, noise, times[:1].repeat(2))
        else:
            start = add(clean, times[:1].repeat(2), noise)
        found.append(loop(each, network, start, times))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_the_pipeline_of_ddim_runs_it(generator):
    """It makes a DDIMScheduler of what it is built with, and names DDIM's noise in each step."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        8, 3, 3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    table = TableauScheduler.from_scheduler(DDPMScheduler(**BETAS), "ddim", 4)
    pipeline = DDIMPipeline(unet.eval(), table)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "np"}
    theirs = pipeline(**call, generator=generator()).images
    assert type(pipeline.scheduler) is DDIMScheduler
    pipeline.scheduler = table
    np.testing.assert_allclose(pipeline(**call, generator=generator()).images, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="says itself how noisy its steps are"):
        pipeline(**call, eta=0.5)


def test_other_levels_start_from_their_own_noise(network, generator):
    """On a variance-exploding process, with the pipelines that multiply by `init_noise_sigma`."""
    process = VE(0.01, 50.0)
    table = heun(Schedule.karras(process, 4))
    scheduler = TableauScheduler(json.loads(table.to_json()), prediction="sample")
    assert scheduler.init_noise_sigma == 50
    noise = 50 * torch.randn(2, 2, 4, 4, generator=generator())
    denoiser = Denoiser(_Batched(network), process, "sample")
    with torch.no_grad():
        ours = table.sample(denoiser, noise)
    torch.testing.assert_close(loop(scheduler, network, noise), ours, rtol=1e-5, atol=1e-4)


class _Batched(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, sample, time):
        return self.network(sample, time[0])


def test_what_does_not_fit_a_pipeline_is_refused():
    epsilon, v = DDIMScheduler(**BETAS), DDIMScheduler(**BETAS, **V)
    ours = TableauScheduler.from_scheduler(epsilon, "ddim", 4)
    with pytest.raises(ValueError, match=r"that predicts 'epsilon', .* its network predicts 'v'"):
        ours.replacing(v)
    for other in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler()):
        table = ours.tableau
        with pytest.raises(
            ValueError, match=r"made for DiscreteVP\(.*\), the pipeline's scheduler"
        ):
            TableauScheduler.from_scheduler(other, table)
    with pytest.raises(ValueError, match="they differ in the noise at the network's time 750"):
        ours.replacing(DDIMScheduler())
    # The same chain under other words is the same.
    assert ours.replacing(DPMSolverMultistepScheduler(**BETAS)) is ours
    assert ours.replacing(TableauScheduler.from_scheduler(epsilon, "euler", 7)) is ours
    config = {**ours.config, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match=r"config has prediction_type='v_prediction', .* 'ddim"):
        TableauScheduler.from_config(config)
    config = {**ours.config, "trained_betas": [0.1, 0.2]}
    with pytest.raises(
        ValueError, match=r"config has other trained_betas, and 'ddim .clipped.' was made"
    ):
        TableauScheduler.from_config(config)
    with pytest.raises(ValueError, match="noise levels of a LCMScheduler, but those of DDPM"):
        TableauScheduler.from_scheduler(LCMScheduler(), "ddim", 4)
    with pytest.raises(ValueError, match="Say how many steps 'ddim' is to make"):
        TableauScheduler.from_scheduler(epsilon, "ddim")
    with pytest.raises(ValueError, match="A DDIMScheduler takes steps, no sigmas"):
        TableauScheduler.from_scheduler(epsilon, "ddim", sigmas=[3.0, 1.0])
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"size of the picture .*: pass mu"):
        TableauScheduler.from_scheduler(dynamic, "euler", 4)
    shifted = TableauScheduler.from_scheduler(dynamic, "euler", 4, mu=0.8)
    with pytest.warns(UserWarning, match=r"made for mu=0\.8, and this size of picture has mu=1"):
        shifted.set_timesteps(4, mu=1.0)


def test_the_times_that_others_repeat_are_visited_once():
    ours = TableauScheduler.from_scheduler(PNDMScheduler(skip_prk_steps=True), "ddim", 5)
    assert len(set(ours.timesteps.tolist())) == len(ours.timesteps) == 5
    schedule = Schedule.log_snr(DiscreteVP.linear(1000), 3)
    own = TableauScheduler.from_scheduler(DDPMScheduler(), "ddim", schedule=schedule)
    assert own.tableau.times.tolist() == schedule.times.tolist()


def test_a_plain_grid_takes_diffusers_to_the_same_levels():
    table = dpm_solver_pp(Schedule.log_snr(DiscreteVP.linear(1000), 5), order=2)
    grid = plain_grid(table)
    theirs = EulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=grid.sigmas)
    torch.testing.assert_close(theirs.sigmas.double(), torch.tensor(grid.sigmas).double())
    # diffusers draws the logarithm of sigma between two noisings on a line, we that of alpha.
    np.testing.assert_allclose(theirs.timesteps, grid.timesteps, atol=0.5)
    table = ddim(Schedule.uniform(RectifiedFlow(3.0, time_scale=1000), 4))
    grid, theirs = plain_grid(table), FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=grid.before_shift)
    np.testing.assert_allclose(theirs.sigmas, grid.sigmas, rtol=1e-6)
    np.testing.assert_allclose(theirs.timesteps, grid.timesteps, rtol=1e-6)
    edm = plain_grid(ddim(Schedule.karras(VE(), 4)))
    assert edm.timesteps is None
    assert edm.sigmas[0] == 80
    for twice in (
        heun(Schedule.karras(VE(), 3)),
        make_solver("euler", Schedule.karras(VE(), 3), afs=True),
    ):
        with pytest.raises(ValueError, match="does not ask the network once at each"):
            plain_grid(twice)


def test_it_is_pushed_to_the_hub_as_diffusers_does(tmp_path, monkeypatch):
    calls = []
    # Those that ask the net.
    for name in ("create_repo", "upload_folder", "load_or_create_model_card"):
        monkeypatch.setattr(
            f"diffusers.utils.hub_utils.{name}",
            lambda *args, name=name, **kw: calls.append(name) or _Repo(),
        )
    TableauScheduler.from_scheduler(DDIMScheduler(), "ddim", 4).push_to_hub("me/four-steps")
    assert calls == ["create_repo", "load_or_create_model_card", "upload_folder"]


class _Repo:
    """What stands for a repository, and for the card in it."""

    repo_id = "me/four-steps"
    data = type("Data", (), {"library_name": None, "tags": None})()

    def save(self, path):
        """Write nothing."""


HEAVY = {"stable_baselines3", "matplotlib", "tyro", "sklearn"}


@pytest.mark.slow
def test_it_opens_in_a_process_of_its_own(tmp_path):
    TableauScheduler.from_scheduler(DDIMScheduler(), "unipc-2", 4).save_pretrained(tmp_path)
    code = f"""
import sys
from fewstep.agents.pretrained.scheduler import TableauScheduler
scheduler = TableauScheduler.from_pretrained({str(tmp_path)!r})
print(len(scheduler.timesteps), sorted(set(sys.modules) & {HEAVY}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "4 []\n"


def test_the_table_of_a_folder_is_found(tmp_path):
    from fewstep.agents.pretrained import pipeline_tableau

    ours = TableauScheduler.from_scheduler(DDIMScheduler(), "ddim", 4)
    ours.save_pretrained(tmp_path)
    table = pipeline_tableau(tmp_path)
    assert isinstance(table, Tableau)
    assert table.to_json() == ours.tableau.to_json()
