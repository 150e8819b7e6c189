import math

import pytest
import torch

from fewstep.critics import MMDCritic

pytestmark = pytest.mark.numeric

KERNELS = [("energy", None), ("gaussian", 0.7)]


def kernel_by_hand(x, y, bandwidth):
    distance = math.dist(x.flatten().tolist(), y.flatten().tolist())
    return -distance if bandwidth is None else math.exp(-(distance**2) / (2 * bandwidth**2))


def mean_kernel_by_hand(xs, ys, bandwidth):
    return sum(kernel_by_hand(x, y, bandwidth) for x in xs for y in ys) / (len(xs) * len(ys))


@pytest.mark.parametrize(("kernel", "bandwidth"), KERNELS)
@pytest.mark.parametrize("shape", [(2,), (1, 8, 8)])
def test_witness_equals_a_double_loop(kernel, bandwidth, shape):
    # 64 dimensions take the matrix-product path of the distances.
    scale = 1 / math.sqrt(math.prod(shape))
    real, fake, sample = (torch.randn(n, *shape).double() * scale for n in (11, 7, 5))
    critic = MMDCritic(real, kernel, bandwidth)
    to_real = [mean_kernel_by_hand([x], real, bandwidth) for x in sample]
    assert critic(sample).tolist() == pytest.approx(to_real, abs=1e-10)
    critic.update(real, fake)
    witness = [
        r - mean_kernel_by_hand([x], fake, bandwidth) for r, x in zip(to_real, sample, strict=True)
    ]
    assert critic(sample).tolist() == pytest.approx(witness, abs=1e-10)


@pytest.mark.parametrize(("kernel", "bandwidth"), KERNELS)
def test_gap_is_the_biased_squared_mmd(kernel, bandwidth):
    real, fake = torch.randn(13, 2).double(), torch.rand(9, 2).double()
    metrics = MMDCritic(real, kernel, bandwidth).update(real, fake)
    squared_mmd = (
        mean_kernel_by_hand(real, real, bandwidth)
        + mean_kernel_by_hand(fake, fake, bandwidth)
        - 2 * mean_kernel_by_hand(real, fake, bandwidth)
    )
    assert float(metrics["ipm_gap"]) == pytest.approx(squared_mmd, abs=1e-10)
    assert metrics["ipm_gap"] == metrics["critic_real"] - metrics["critic_fake"]


def test_pointwise_and_chunked(monkeypatch):
    real, sample = torch.randn(50, 2), torch.randn(40, 2)
    critic = MMDCritic(real)
    critic.update(real, sample + 1)
    whole = critic(sample)
    assert torch.equal(critic(sample[7:8]), whole[7:8])
    monkeypatch.setattr("fewstep.critics.mmd._CHUNK", 120)
    assert torch.equal(critic(sample), whole)


def test_gradient_points_towards_the_data_even_from_a_data_point():
    real = torch.zeros(3, 2)
    sample = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    MMDCritic(real)(sample).sum().backward()
    assert torch.allclose(sample.grad, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))


def test_median_heuristic_and_max_real():
    real = torch.arange(3.0).unsqueeze(1)  # distances 1, 1, 2
    assert MMDCritic(real, "gaussian").bandwidth == 1.0
    many = torch.randn(500, 2)
    kept = MMDCritic(many, max_real=100).real
    assert kept.shape == (100, 2)
    assert torch.equal(kept, MMDCritic(many, max_real=100).real)
    assert (kept.unsqueeze(1) == many).all(-1).any(1).all()


def test_state_dict_round_trip():
    critic = MMDCritic(torch.randn(20, 2), "gaussian")
    critic.update(torch.randn(4, 2), torch.randn(6, 2))
    other = MMDCritic(torch.randn(30, 2))
    other.load_state_dict(critic.state_dict())
    sample = torch.randn(5, 2)
    assert torch.equal(other(sample), critic(sample))


@pytest.mark.parametrize(
    ("real", "settings", "message"),
    [
        (torch.full((3, 2), math.nan), {}, "real holds NaN"),
        (torch.zeros(0, 2), {}, "real must hold samples"),
        (torch.zeros(3), {}, "real must hold samples"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, "floating point"),
        (torch.zeros(3, 2), {"kernel": "laplace"}, "'laplace'. Known: energy, gaussian"),
        (torch.zeros(3, 2), {"kernel": "gaussian"}, "median distance .* is 0"),
        (torch.zeros(3, 2), {"kernel": "gaussian", "bandwidth": -1.0}, "positive"),
        (torch.zeros(3, 2), {"kernel": "gaussian", "bandwidth": math.nan}, "positive"),
        (torch.zeros(3, 2), {"bandwidth": 1.0}, "energy kernel has no bandwidth"),
        (torch.zeros(3, 2), {"max_real": 0}, "max_real"),
    ],
)
def test_bad_constructions(real, settings, message):
    with pytest.raises(ValueError, match=message):
        MMDCritic(real, **settings)


def test_bad_samples_leave_the_reference_alone():
    critic = MMDCritic(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"sample must have shape \(N, 2\), got \(4, 3\)"):
        critic(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="fake holds NaN"):
        critic.update(torch.zeros(4, 2), torch.full((4, 2), math.inf))
    assert critic.reference is None
