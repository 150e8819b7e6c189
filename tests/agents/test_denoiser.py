"""Parameterisations, times, and files of a denoiser."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewstep.agents import CheckpointError, Denoiser
from fewstep.agents.denoisers.networks import (
    MLP,
    ResidualMLP,
    SmallUNet,
    body_from_config,
    make_body,
)
from fewstep.agents.denoisers.networks.mlp import softplus
from fewstep.agents.denoisers.parameterisations import time_range_of
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.envs import VE, DiscreteVP, RectifiedFlow, make_process

pytestmark = pytest.mark.numeric

PREDICTIONS = ["epsilon", "sample", "v", "flow", "score"]


class Truth(nn.Module):
    """Knows the clean samples and the noise, and says what it is asked for."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, sample, time):
        assert time.shape == sample.shape[:1]
        return self.answer


@pytest.mark.parametrize("t", [3.0, 2.25, torch.tensor([1, 2, 3, 4, 2]), torch.linspace(0.5, 4, 5)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_is_predicted_noise_and_clean_sample_are_the_truth(
    prediction, t, process, generator
):
    """MATH.md 0.2, from x_t = alpha x_0 + sigma eps and v = alpha eps - sigma x_0."""
    clean, noise = torch.randn(2, 5, 2, 3, generator=generator(), dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    if alpha.ndim:
        alpha, sigma = alpha.view(5, 1, 1), sigma.view(5, 1, 1)
    answers = {
        "epsilon": noise,
        "sample": clean,
        "v": alpha * noise - sigma * clean,
        "flow": noise - clean,
        "score": -noise / sigma,
    }
    denoiser = Denoiser(Truth(answers[prediction]), process, prediction)
    sample = alpha * clean + sigma * noise
    torch.testing.assert_close(denoiser.epsilon(sample, t), noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(denoiser.denoised(sample, t), clean, rtol=1e-12, atol=1e-12)
    target = denoiser.training_target(clean, noise, t)
    torch.testing.assert_close(target, answers[prediction], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["sample", "flow", "v"])
def test_where_no_signal_is_left_the_answer_is_the_truth(prediction, generator):
    flow = RectifiedFlow()
    process = make_process("linear-10-zero-snr") if prediction == "v" else flow
    clean, noise = torch.randn(2, 5, 2, generator=generator(), dtype=torch.float64)
    answer = {"sample": clean, "flow": noise - clean, "v": -clean}[prediction]
    denoiser = Denoiser(Truth(answer), process, prediction)
    for t in (process.t_max, torch.full((5,), process.t_max)):
        torch.testing.assert_close(denoiser.denoised(noise, t), clean)
        torch.testing.assert_close(denoiser.epsilon(noise, t), noise)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
@pytest.mark.parametrize("name", ["flow", "linear-1000-zero-snr"])
def test_noise_predictions_are_refused_where_no_signal_is_left(name, prediction):
    with pytest.raises(ValueError, match="says nothing of the clean sample at the last time"):
        Denoiser(nn.Identity(), make_process(name), prediction)


def test_conversions_of_a_process_without_a_unit_circle(generator):
    process = VE(0.01, 50)
    clean, noise = torch.randn(2, 5, 2, generator=generator(), dtype=torch.float64)
    sample = clean + 7.0 * noise
    for prediction, answer in (("epsilon", noise), ("sample", clean)):
        denoiser = Denoiser(Truth(answer), process, prediction)
        torch.testing.assert_close(denoiser.epsilon(sample, 7.0), noise)
        torch.testing.assert_close(denoiser.denoised(sample, 7.0), clean)


def test_the_body_is_asked_at_the_networks_own_time(process, count_calls):
    class Body(nn.Module):
        def forward(self, sample, time):
            return sample * time.view(-1, 1)

    for kind, offset in ((process, 1), (VE(0.002, 80), 0)):
        denoiser = Denoiser(Body(), kind)
        calls = count_calls(denoiser.body)
        denoiser.epsilon(torch.ones(2, 2), 3.0)
        denoiser.denoised(torch.ones(2, 2), torch.tensor([3.0, 3.0]))
        denoiser(torch.ones(2, 2), torch.tensor(2.5))
        assert calls.times == [3 - offset, 3 - offset, 2.5 - offset]


@pytest.mark.parametrize("t", [3.0, 2.5])
@pytest.mark.parametrize("image", [False, True])
def test_one_time_for_all_equals_a_time_for_each(t, image, process, make_denoiser, generator):
    if image:
        denoiser, sample = Denoiser(SmallUNet((1, 8, 8), width=8), process), (6, 1, 8, 8)
    else:
        denoiser, sample = make_denoiser(), (6, 2)
    # In float64, where the rounding of another order of sums is far below any other difference.
    denoiser, tolerance = denoiser.double(), {"rtol": 1e-10, "atol": 1e-10}
    sample = torch.randn(sample, generator=generator(), dtype=torch.float64)
    shared, each = denoiser(sample, t), denoiser(sample, torch.full((6,), t))
    torch.testing.assert_close(shared, each, **tolerance)
    if t == 3:
        integers = denoiser(sample, torch.full((6,), 3))
        torch.testing.assert_close(shared, integers, **tolerance)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(denoiser.parameters()))
        for out in (shared, each)
    ]
    torch.testing.assert_close(*gradients, **tolerance)


def test_times_of_a_batch_do_not_mix(make_denoiser, generator):
    denoiser, sample = make_denoiser(), torch.randn(4, 2, generator=generator())
    together = denoiser(sample, torch.tensor([4, 1, 3, 2]))
    for row, t in enumerate([4, 1, 3, 2]):
        torch.testing.assert_close(together[row : row + 1], denoiser(sample[row : row + 1], t))
    assert (denoiser(sample, 1) - denoiser(sample, 4)).abs().max() > 1e-3


def test_fractional_times_interpolate_the_embeddings(generator):
    body = MLP((2,), levels=4, hidden=16, layers=1)
    sample = torch.randn(5, 2, generator=generator())

    def at(embedding):
        return body.out(nn.functional.softplus(body.hidden[0](sample) * embedding))

    table = body.embeddings[0].weight
    for time, expected in (
        (1.25, 0.75 * table[1] + 0.25 * table[2]),
        (2.0, table[2]),
        (3.0, table[3]),
        (3.5, table[3]),  # beyond the last level: constant
        (-0.5, table[0]),  # and before the first
    ):
        torch.testing.assert_close(body(sample, torch.full((5,), time)), at(expected))


def test_softplus_and_its_gradient_are_those_of_pytorch():
    x = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e4, 0.0, 1e4])]).double()
    exact = nn.functional.softplus(x, threshold=1e3)
    for dtype, rounding in ((torch.float32, 6e-8), (torch.float64, 2e-16)):
        here = x.to(dtype).requires_grad_()
        values = softplus(here)
        # Of the logarithm's argument, between 1 and 2, and of the sum.
        torch.testing.assert_close(values.double(), exact, rtol=4 * rounding, atol=2 * rounding)
        (slope,) = torch.autograd.grad(values.sum(), here)
        torch.testing.assert_close(slope.double(), x.sigmoid(), rtol=1e-5, atol=4 * rounding)
    half = x.bfloat16()
    assert torch.equal(softplus(half), nn.functional.softplus(half))


class Probe(nn.Module):
    """A nonlinear float64 body that keeps what it was asked."""

    def forward(self, sample, time):
        self.sample, self.time = sample, time
        return torch.sin(sample + time.view(-1, *[1] * (sample.ndim - 1)))


@given(
    sigma=st.floats(0.002, 80.0),
    sigma_data=st.floats(0.05, 5.0),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_edm_is_karras_et_al_s_table_1(sigma, sigma_data, shared, seed):
    """Each coefficient as printed, for one time for all and for a time for each."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    sample = clean + sigma * noise
    denoiser = Denoiser(Probe(), VE(), "edm", sigma_data=sigma_data)
    t = sigma if shared else torch.full((3,), sigma, dtype=torch.float64)
    raw = denoiser(sample, t)
    root = math.sqrt(sigma**2 + sigma_data**2)
    skip, out = sigma_data**2 / root**2, sigma * sigma_data / root
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(denoiser.body.sample, sample / root, **close)
    time = torch.full((3,), math.log(sigma) / 4, dtype=torch.float64)
    torch.testing.assert_close(denoiser.body.time, time, **close)
    assert (denoiser.body.time.stride(0) == 0) == shared
    denoised, epsilon = denoiser.denoised(sample, t), denoiser.epsilon(sample, t)
    torch.testing.assert_close(denoised, skip * sample + out * raw, **close)
    torch.testing.assert_close(denoised + sigma * epsilon, sample, rtol=1e-9, atol=1e-9)
    target = denoiser.training_target(clean, noise, t)
    # The quotient cancels at small sigma: there only so many digits can agree.
    torch.testing.assert_close(target, (clean - skip * sample) / out, rtol=1e-7, atol=1e-9)
    # The plain squared error is EDM's loss with the weight 1 / c_out^2.
    torch.testing.assert_close(
        (raw - target) ** 2, (denoised - clean) ** 2 / out**2, rtol=1e-6, atol=1e-9
    )


def test_an_edm_body_that_answers_the_truth_gives_the_truth(generator):
    process, t = VE(), torch.tensor([0.002, 0.1, 1.0, 20.0, 80.0])
    clean, noise = torch.randn(2, 5, 2, 3, generator=generator(), dtype=torch.float64)
    silent = Denoiser(Truth(None), process, "edm", sigma_data=0.7)
    denoiser = Denoiser(
        Truth(silent.training_target(clean, noise, t)), process, "edm", sigma_data=0.7
    )
    sample = process.add_noise(clean, t, noise)
    torch.testing.assert_close(denoiser.denoised(sample, t), clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoiser.epsilon(sample, t), noise, rtol=1e-9, atol=1e-9)


def test_edm_is_exact_for_gaussian_data_where_the_body_is_silent(generator):
    """The posterior mean of data N(0, s^2) is s^2 / (s^2 + sigma^2) x: that is c_skip x."""
    sample = torch.randn(5, 2, generator=generator(), dtype=torch.float64)
    denoiser = Denoiser(Truth(torch.zeros(5, 2)), VE(), "edm", sigma_data=0.3)
    for sigma in (0.002, 0.3, 80.0):
        mean = 0.3**2 / (0.3**2 + sigma**2) * sample
        torch.testing.assert_close(denoiser.denoised(sample, sigma), mean)
        torch.testing.assert_close(denoiser.epsilon(sample, sigma), (sample - mean) / sigma)


def test_gradients_of_edm_flow_through_sample_and_noise_level(generator):
    sample = torch.randn(3, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64, requires_grad=True)
    denoiser = Denoiser(Probe(), VE(), "edm")
    for output in (denoiser.denoised, denoiser.epsilon):
        assert torch.autograd.gradcheck(output, (sample, t))


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 16, 16)])
def test_bodies_resolve_the_times_of_edm(shape, generator):
    process = VE()
    time_range = time_range_of("edm", process)
    assert time_range == pytest.approx((math.log(0.002) / 4, math.log(80) / 4))
    body = make_body(shape, 16, time_range)
    for parameter in body.parameters():  # residual bodies start as the identity
        nn.init.normal_(parameter, std=0.1, generator=generator())
    denoiser = Denoiser(body, process, "edm")
    sample = torch.randn(4, *shape, generator=generator())
    again = body_from_config(body.config)
    again.load_state_dict(body.state_dict())
    for t in (0.002, 1, 80):
        each = denoiser(sample, torch.full((4,), t))
        torch.testing.assert_close(denoiser(sample, t), each, rtol=1e-4, atol=1e-5)
        time = torch.full((4,), math.log(t) / 4)
        assert torch.equal(again(sample, time), body(sample, time))
    low, middle, high = (body(sample, torch.full((4,), t)) for t in (-1.5, -0.2, 1.0))
    assert min((low - middle).abs().max(), (middle - high).abs().max()) > 1e-3


def test_a_time_range_maps_its_ends_to_the_first_and_last_level(generator):
    body = MLP((2,), levels=5, time_range=(-1.0, 1.0))
    plain = MLP((2,), levels=5)
    plain.load_state_dict(body.state_dict())
    sample = torch.randn(3, 2, generator=generator())
    for time, level in ((-1.0, 0.0), (0.25, 2.5), (1.0, 4.0), (3.0, 4.0), (-3.0, 0.0)):
        expected = plain(sample, torch.full((3,), level))
        torch.testing.assert_close(body(sample, torch.full((3,), time)), expected)
    for bad in ((1.0, 1.0), (0.0, math.inf), (2.0, 1.0)):
        with pytest.raises(ValueError, match="finite and increasing"):
            MLP((2,), levels=5, time_range=bad)


def test_an_edm_denoiser_comes_back_with_its_sigma_data(generator, tmp_path):
    process = VE(0.01, 50)
    body = MLP((2,), levels=8, hidden=16, time_range=time_range_of("edm", process))
    denoiser = Denoiser(body, process, "edm", sigma_data=0.8)
    denoiser.save(tmp_path / "edm")
    again = Denoiser.load(tmp_path / "edm")
    sample = torch.randn(4, 2, generator=generator())
    assert (again.prediction, again.sigma_data) == ("edm", 0.8)
    assert torch.equal(again.denoised(sample, 2.0), denoiser.denoised(sample, 2.0))
    assert load_checkpoint(tmp_path / "edm").keys() == {"kind", *denoiser.to_tree()}


def test_a_file_without_sigma_data_is_read_as_before(make_denoiser, tmp_path):
    tree = make_denoiser().to_tree()
    del tree["sigma_data"]
    del tree["body"]["time_range"]
    save_checkpoint(tmp_path / "old", {"kind": "denoiser", **tree})
    again = Denoiser.load(tmp_path / "old")
    assert again.sigma_data == 0.5
    assert again.body.time_range is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_save_and_load(prediction, make_denoiser, generator, tmp_path):
    denoiser = make_denoiser(seed=3, prediction=prediction)
    denoiser.save(tmp_path / "denoiser")
    random = torch.get_rng_state()
    again = Denoiser.load(tmp_path / "denoiser")
    assert torch.equal(torch.get_rng_state(), random)
    sample = torch.randn(4, 2, generator=generator())
    assert again.prediction == prediction
    assert again.process == denoiser.process
    assert torch.equal(again.epsilon(sample, 2), denoiser.epsilon(sample, 2))


def test_a_small_unet_comes_back(process, tmp_path, generator):
    denoiser = Denoiser(make_body((1, 8, 8), 4), process)
    denoiser.save(tmp_path / "unet")
    sample = torch.randn(2, 1, 8, 8, generator=generator())
    assert torch.equal(Denoiser.load(tmp_path / "unet")(sample, 2), denoiser(sample, 2))


def test_a_foreign_body_is_passed_in(tmp_path, wave):
    wave.save(tmp_path / "wave")
    with pytest.raises(CheckpointError, match="pass it as body="):
        Denoiser.load(tmp_path / "wave")
    fresh = type(wave.body)()
    nn.init.zeros_(fresh.matrix)
    again = Denoiser.load(tmp_path / "wave", body=fresh)
    assert torch.equal(again.body.matrix, wave.body.matrix)
    assert again.process == wave.process


def test_files_that_hold_no_fitting_denoiser_are_refused(make_denoiser, tmp_path):
    make_denoiser().save(tmp_path / "denoiser")
    with pytest.raises(CheckpointError, match="do not fit"):
        Denoiser.load(tmp_path / "denoiser", body=MLP((2,), levels=4, hidden=8))
    save_checkpoint(tmp_path / "other", {"kind": "else", "weights": torch.ones(1)})
    with pytest.raises(CheckpointError, match="holds no denoiser"):
        Denoiser.load(tmp_path / "other")


def test_arguments_that_make_no_sense_are_refused(process, make_denoiser):
    body = make_denoiser().body
    with pytest.raises(ValueError, match="unknown prediction 'epsilom'; did you mean 'epsilon'"):
        Denoiser(body, process, "epsilom")
    with pytest.raises(ValueError, match="variance-preserving"):
        Denoiser(body, VE(), "v")
    with pytest.raises(ValueError, match=r"needs a variance-exploding process \(VE\)"):
        Denoiser(body, process, "edm")
    for sigma_data in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="sigma_data must be positive and finite"):
            Denoiser(body, VE(), "edm", sigma_data=sigma_data)
    with pytest.raises(ValueError, match="times must lie in"):
        make_denoiser(prediction="v").epsilon(torch.ones(2, 2), 4.5)
    with pytest.raises(ValueError, match="divisible"):
        SmallUNet((1, 7, 8))


@pytest.mark.parametrize(
    ("body", "process", "prediction", "sentence"),
    [
        (MLP((2,), 3), DiscreteVP.sigmoid(5), "epsilon", "0 to 2, .* 0 to 4: .* levels=5"),
        (MLP((2,), 64), VE(), "edm", r"-1\.554 to 1\.096: .* time_range=\(-1\.554, 1\.096\)"),
        (SmallUNet((1, 8, 8), 8, (-1.2, 1.0)), VE(), "edm", r"time_range=\(-1\.554, 1\.096\)"),
        (SmallUNet((1, 8, 8), 8, (0, 9)), DiscreteVP.linear(20), "v", r"time_range=\(0, 19\)"),
    ],
)
def test_a_body_made_for_other_times_is_refused(body, process, prediction, sentence):
    with pytest.raises(ValueError, match=sentence):
        Denoiser(body, process, prediction)


def test_bodies_that_declare_fitting_times_or_none_pass():
    Denoiser(MLP((2,), 5), DiscreteVP.sigmoid(5))
    Denoiser(MLP((2,), 8, time_range=(-1.554, 1.096)), VE(), "edm")
    Denoiser(ResidualMLP((2,)), VE(), "edm")
    Denoiser(nn.Identity(), DiscreteVP.sigmoid(5))
    unlike = nn.Identity()
    unlike.config = object()  # a stranger's, as Hugging Face's models have one
    assert Denoiser(unlike, DiscreteVP.sigmoid(5)).shape is None


def test_the_default_body_fits_the_kind_of_sample():
    assert isinstance(make_body((2,), 4), MLP)
    assert isinstance(make_body((1, 8, 8), 4), ResidualMLP)
    assert isinstance(make_body((3, 16, 16), 4), SmallUNet)


class Recorder(nn.Module):
    """Keeps the times it was asked at."""

    def forward(self, sample, time):
        self.time = time
        return sample


@pytest.mark.parametrize(
    ("t", "dtype"),
    [
        (3.0, torch.int64),
        (3, torch.int64),
        (torch.tensor(3.0), torch.int64),
        (2.5, torch.float32),
        (torch.tensor([1, 2, 3]), torch.int64),
        (torch.tensor([1, 2, 3], dtype=torch.int32), torch.int64),
        # as an environment's observations have them
        (torch.tensor([1.0, 2.0, 3.0]), torch.int64),
        (torch.tensor([1.0, 2.5, 3.0], dtype=torch.float64), torch.float32),
        (torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.float32),
        (torch.tensor(3.0, requires_grad=True), torch.float32),
    ],
)
def test_whole_noisings_are_indices_and_noise_levels_are_numbers(t, dtype, process):
    """An embedding table takes the first; a noise level of 80 is no index."""
    sample = torch.zeros(3, 2)
    for kind, expected in ((process, dtype), (VE(0.002, 80), torch.float32)):
        denoiser = Denoiser(Recorder(), kind, "sample")
        denoiser(sample, t)
        assert denoiser.body.time.dtype == expected
        assert denoiser.body.time.shape == (3,)
        shared = not isinstance(t, torch.Tensor) or t.ndim == 0
        assert (denoiser.body.time.stride(0) == 0) == shared


def test_a_foreign_config_is_not_taken_for_one_of_ours(tmp_path, process):
    """Networks of other libraries have a `.config`, too, from which we could not rebuild them."""
    for config in ({"hidden_size": 3}, {"kind": "mlp", "shape": [2]}, {"kind": "theirs"}):
        body = nn.Linear(2, 2)
        body.config = config
        Denoiser(body, process).save(tmp_path / "foreign.safetensors")
        with pytest.raises(CheckpointError, match="foreign body"):
            Denoiser.load(tmp_path / "foreign.safetensors")


class Lookup(nn.Module):
    """A network that knows the noisings as rows of a table."""

    def __init__(self, by_index=False):
        super().__init__()
        self.table, self.by_index = nn.Embedding(4, 2), by_index

    def forward(self, sample, time):
        rows = self.table.weight[time] if self.by_index else self.table(time)
        return sample * rows


@pytest.mark.parametrize("by_index", [False, True])
def test_a_table_of_noisings_is_refused_times_between_them_in_one_sentence(by_index, process):
    denoiser, sample = Denoiser(Lookup(by_index), process), torch.ones(2, 2)
    torch.testing.assert_close(denoiser(sample, 4.0), denoiser.body.table.weight[[3, 3]])
    for t in (2.5, torch.tensor([1.0, 2.5])):
        with pytest.raises(ValueError, match="Lookup takes whole noisings only"):
            denoiser(sample, t)
    with pytest.raises((RuntimeError, IndexError)):  # its own errors stay what they are
        denoiser(torch.ones(2, 3), 2.0)
