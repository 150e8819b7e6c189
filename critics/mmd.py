"""MMDCritic: the critic that needs no training, the witness of the kernel two-sample distance.

For the unit ball of an RKHS with kernel k, the best critic of the integral probability metric
(MATH.md S.1) is known in closed form, up to a factor (Gretton et al. 2012, section 2.3):

    f(x) = E_{y ~ real} k(x, y) - E_{x' ~ reference} k(x, x')

and its gap E_real f - E_reference f is the squared maximum mean discrepancy. The energy kernel
k(x, y) = -||x - y|| has no bandwidth to choose and makes that gap the energy distance.

As an environment's reward it compares each finished sample with the data and with the samples that
finished before it (`judge`), so that the mean reward of a sampler is -MMD^2 between its samples and
the data, which only the distribution of the data maximises. The mean kernel value to the data alone
would be maximised by a single point.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import checked
from ..common.names import unknown_name
from .checks import check_finite, check_samples

KERNELS = ("energy", "gaussian")

# Samples that `judge` compares with: at least, for those who bring one at a time, and at most.
MEMORY, _LARGEST_REFERENCE = 64, 512
# Kernel values held at once: 16 MB in float32.
_CHUNK = 2**22
# By matrix product torch.cdist loses half the digits; up to this dimension we can afford better.
_EXACT_DIMENSION = 32


class MMDCritic:
    """Witness function of the maximum mean discrepancy between real and reference samples.

    Called, it is the witness f, a pointwise and differentiable function of the sample, and nothing
    changes. It is ready at once: before the first `update` or `judge` the reference term is 0 and
    f(x) is the mean kernel value to the real samples. `judge` is the reward of an episode.

    Args:
        real: real samples (M, *shape); detached and kept.
        kernel: "energy", -||x - y||, or "gaussian", exp(-||x - y||^2 / (2 bandwidth^2)).
        bandwidth: the Gaussian's standard deviation, > 0; the median distance between real samples
            if None. The energy kernel has none.
        max_real: keep a random subset (always the same) of at most this many real samples; the cost
            of one call grows in proportion.
        memory: how many of the last samples at least `judge` compares with, 2 to 512.

    Attributes:
        reference: the samples (R, *shape) that f is low on; None where there are none yet.

    Raises:
        ValueError: bad samples, an unknown kernel, or a bandwidth that makes no sense.
    """

    @checked
    def __init__(
        self,
        real: Tensor,
        kernel: str = "energy",
        bandwidth: float | None = None,
        max_real: int = 2048,
        memory: int = MEMORY,
    ) -> None:
        check_samples("real", real)
        check_finite("real", real)
        if max_real < 1:
            raise ValueError(f"max_real must be at least 1, got {max_real}.")
        if not 2 <= memory <= _LARGEST_REFERENCE:
            raise ValueError(f"memory must be 2 to {_LARGEST_REFERENCE}, got {memory}.")
        self.memory = memory
        if len(real) > max_real:
            subset = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
            real = real[subset[:max_real].to(real.device)]
        self.real = real.detach().clone()
        self.reference: Tensor | None = None
        self.kernel = kernel
        self.bandwidth = resolve_bandwidth(kernel, bandwidth, self.real)

    def __call__(self, sample: Tensor) -> Tensor:
        """Return f (N,) for samples (N, *shape): high on data, low on the reference.

        Memory is bounded whatever N, unless gradients are being recorded.

        Raises:
            ValueError: samples of another shape than the real ones.
        """
        check_samples("sample", sample, self.real.shape[1:])
        witness = kernel_mean(sample, self.real, self.bandwidth)
        if self.reference is not None:
            witness = witness - kernel_mean(sample, self.reference, self.bandwidth)
        return witness

    def judge(self, sample: Tensor) -> Tensor:
        """Return the reward (N,) of finished samples (N, *shape), and remember them.

        The reference x' are these samples and, of the ones before, as many as make up `memory`; of
        a large batch the last 512. With y the real samples,

            r(x) = 2 E k(x, y) - 2 E k(x, x') - E k(y, y') + E k(x', x'')

        where no sample meets itself. Its expectation over a sampler's samples is -MMD^2 between
        them and the real ones (with the energy kernel minus the energy distance), at most 0, and
        its derivative is that of -MMD^2: 2 f(x) is what one more sample at x changes. A first
        sample alone has nothing but itself to be compared with. A reference of old samples would
        reward the policy for leaving where it was, and it would circle around the data instead of
        staying there: hence the short memory. Gradients flow to `sample`, not to the reference.

        Raises:
            ValueError: samples of another shape than the real ones; the reference is unchanged.
        """
        check_samples("sample", sample, self.real.shape[1:])
        n = len(sample)
        before = self.real[:0] if self.reference is None else self.reference
        kept = max(self.memory, min(n, _LARGEST_REFERENCE))
        self.reference = torch.cat([before, sample.detach().to(before.dtype)])[-kept:]
        size = len(self.reference)
        # The last samples of the batch are in the reference, where they must not meet themselves.
        own = torch.arange(n, device=sample.device) >= n - size
        to_reference = kernel_mean(sample, self.reference, self.bandwidth)
        if size > 1:
            to_itself = self._to_itself
            without = (size * to_reference - to_itself) / (size - 1)
            to_reference = torch.where(own, without, to_reference)
        to_real = kernel_mean(sample, self.real, self.bandwidth)
        return 2 * (to_real - to_reference) + self._pairs(self.reference) - self._real_pairs

    def forget(self) -> None:
        """Drop the reference; the next sample judged is the first."""
        self.reference = None

    @property
    def _to_itself(self) -> float:
        """Return k(x, x)."""
        return 0.0 if self.bandwidth is None else 1.0

    def _pairs(self, samples: Tensor) -> Tensor:
        """Return the mean of k over pairs of different samples, 0-d; k(x, x) of one alone."""
        n = len(samples)
        if n == 1:
            return samples.new_tensor(self._to_itself)
        mean = kernel_mean(samples, samples, self.bandwidth).mean()
        return (n * mean - self._to_itself) / (n - 1)

    @cached_property
    def _real_pairs(self) -> Tensor:
        return self._pairs(self.real)

    def update(
        self,
        real: Tensor,
        fake: Tensor,
        states: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Take the fakes as the new reference. Same face as `IPMCritic.update`.

        Args:
            real: real samples (M, *shape), on which the gap is reported; the witness keeps its own.
            fake: samples (N, *shape) of the current sampler.
            states: ignored.
            steps: ignored.

        Returns:
            0-d tensors: "critic_real" and "critic_fake", the means of f, and "ipm_gap", their
            difference. It is MMD^2 (biased) when `real` is this critic's own set.

        Raises:
            ValueError: bad samples; the reference is then unchanged.
        """
        for name, samples in (("real", real), ("fake", fake)):
            check_samples(name, samples, self.real.shape[1:])
            check_finite(name, samples)
        self.reference = fake.detach().clone()
        with torch.no_grad():
            critic_real, critic_fake = self(real).mean(), self(fake).mean()
        return {
            "critic_real": critic_real,
            "critic_fake": critic_fake,
            "ipm_gap": critic_real - critic_fake,
        }

    def to(self, device: str | torch.device) -> MMDCritic:
        """Move the real and reference samples; return self."""
        self.real = self.real.to(device)
        self.__dict__.pop("_real_pairs", None)
        if self.reference is not None:
            self.reference = self.reference.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return everything the witness depends on: samples, kernel, bandwidth."""
        return {
            "real": self.real,
            "reference": self.reference,
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        device = self.real.device
        self.real, self.reference = state["real"], state["reference"]
        self.__dict__.pop("_real_pairs", None)
        self.kernel, self.bandwidth = state["kernel"], state["bandwidth"]
        self.to(device)


def resolve_bandwidth(kernel: str, bandwidth: float | None, real: Tensor) -> float | None:
    """Check a kernel and its bandwidth; fill in the median heuristic from real samples (M, *shape).

    Raises:
        ValueError: an unknown kernel, a bandwidth for the energy kernel or not > 0, or real samples
            (fewer than two, or mostly equal) whose median distance is 0.
    """
    if kernel not in KERNELS:
        raise unknown_name("kernel", kernel, KERNELS)
    if kernel == "energy":
        if bandwidth is not None:
            raise ValueError("The energy kernel has no bandwidth; use kernel='gaussian'.")
        return None
    if bandwidth is None:
        # 1,000 points give the median to a few per cent, and the heuristic claims no more.
        points = real[:1000].detach().flatten(1)
        bandwidth = float(torch.pdist(points).median()) if len(points) > 1 else 0.0
        if bandwidth == 0:
            raise ValueError("The median distance between real samples is 0; pass a bandwidth.")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}.")
    return bandwidth


def kernel_mean(x: Tensor, y: Tensor, bandwidth: float | None) -> Tensor:
    """Return the mean over y (M, *shape) of k(x, y), (N,), for x (N, *shape), in y's precision.

    The kernel is the Gaussian of this bandwidth, or the energy kernel if it is None.
    """
    x, y = x.flatten(1).to(y.dtype), y.flatten(1)
    rows = max(1, _CHUNK // len(y))
    return torch.cat([_kernel(part, y, bandwidth).mean(1) for part in x.split(rows)])


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances (N, M) of points x (N, d) and y (M, d)."""
    exact = x.shape[1] <= _EXACT_DIMENSION
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    return torch.cdist(x, y, compute_mode=mode)


def _kernel(x: Tensor, y: Tensor, bandwidth: float | None) -> Tensor:
    distance = distances(x, y)
    if bandwidth is None:
        return -distance
    return torch.exp(distance.square() / (-2 * bandwidth**2))
