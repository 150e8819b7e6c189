"""Parameterisations, times, and files of a denoiser."""

import pytest
import torch
from torch import nn

from fewstep.agents import CheckpointError, Denoiser
from fewstep.agents.checkpoint import save_checkpoint
from fewstep.agents.networks import MLP, ResidualMLP, SmallUNet, make_body
from fewstep.envs import VE

PREDICTIONS = ["epsilon", "sample", "v"]


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
    answers = {"epsilon": noise, "sample": clean, "v": alpha * noise - sigma * clean}
    denoiser = Denoiser(Truth(answers[prediction]), process, prediction)
    sample = alpha * clean + sigma * noise
    torch.testing.assert_close(denoiser.epsilon(sample, t), noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(denoiser.denoised(sample, t), clean, rtol=1e-12, atol=1e-12)
    target = denoiser.training_target(clean, noise, t)
    torch.testing.assert_close(target, answers[prediction], rtol=1e-12, atol=1e-12)


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
    sample = torch.randn(sample, generator=generator())
    shared, each = denoiser(sample, t), denoiser(sample, torch.full((6,), t))
    torch.testing.assert_close(shared, each, rtol=1e-5, atol=1e-6)
    if t == 3:
        integers = denoiser(sample, torch.full((6,), 3))
        torch.testing.assert_close(shared, integers, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(denoiser.parameters()))
        for out in (shared, each)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_save_and_load(prediction, make_denoiser, generator, tmp_path):
    denoiser = make_denoiser(seed=3, prediction=prediction)
    denoiser.save(tmp_path / "denoiser")
    again = Denoiser.load(tmp_path / "denoiser")
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
    with pytest.raises(ValueError, match="times must lie in"):
        make_denoiser(prediction="v").epsilon(torch.ones(2, 2), 4.5)
    with pytest.raises(ValueError, match="even"):
        SmallUNet((1, 7, 8))


def test_the_default_body_fits_the_kind_of_sample():
    assert isinstance(make_body((2,), 4), MLP)
    assert isinstance(make_body((1, 8, 8), 4), ResidualMLP)
    assert isinstance(make_body((3, 16, 16), 4), SmallUNet)
