"""Critic networks f(x) and value baselines V(x_t, step), for vectors and for images (MATH.md S.8).

`make_critic` and `make_baseline` choose by the shape of a sample: multilayer perceptrons for
vectors, the convolutional critic of Fan & Lee (2023) and a wider baseline for images (C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.arguments import at_least, checked
from ..common.conditions import Conditions, as_conditions
from ..common.precision import in_full_precision
from ..common.shapes import check_shape, is_image
from .projection import projection

BaselineKind = Literal["mlp", "conv"]
# Of the Fourier features, in radians a unit of x: fit for data of size 1.
BANDWIDTHS = (6.0,)


class FourierFeatures(nn.Module):
    """Append sines and cosines of random projections, so that an MLP can learn fine detail.

    x -> [scale x, sin(x W), cos(x W)] with W ~ N(0, bandwidths^2) fixed (Tancik et al. 2020). A
    plain MLP learns low frequencies first and blurs a thin manifold.

    Args:
        dimension: of x.
        count: number of frequencies of each bandwidth; 0 leaves x as it is.
        bandwidths: standard deviations of the frequencies, in radians a unit of x. The largest says
            how fine a detail can be seen.
        scale: factor on x itself.

    Raises:
        ValueError: no bandwidths, or one that is not positive and finite.
    """

    projections: Tensor

    def __init__(
        self,
        dimension: int,
        count: int,
        bandwidths: Sequence[float] = BANDWIDTHS,
        scale: float = 3.0,
    ) -> None:
        super().__init__()
        if not bandwidths or not all(0 < each < math.inf for each in bandwidths):
            raise ValueError(f"bandwidths must be positive and finite, got {tuple(bandwidths)}.")
        projections = [each * torch.randn(dimension, count) for each in bandwidths]
        self.register_buffer("projections", torch.cat(projections, dim=1))
        self.scale = scale
        self.width = dimension + 2 * self.projections.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dimension) to (..., width)."""
        if not self.projections.shape[1]:
            return x
        phase = x @ self.projections
        return torch.cat([self.scale * x, phase.sin(), phase.cos()], dim=-1)


class MLPCritic(nn.Module):
    """Multilayer perceptron f(x) with SiLU, on flattened samples.

    Args:
        shape: shape of one sample.
        hidden: width of the hidden layers (Fan & Lee (2023) 128, their code 256).
        layers: number of hidden layers.
        frequencies: number of Fourier features of the input; 0, as published, has none.
        bandwidths: of those, see `FourierFeatures`; so many frequencies of each.
        classes: of a conditional critic, see `projection`; None for an unconditional one.
        conditions: other conditions of a conditional critic, `Captions(64)` say.

    Raises:
        ValueError: an empty shape, a width below 1, or a negative number of layers or frequencies.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        hidden: int = 128,
        layers: int = 3,
        frequencies: int = 0,
        bandwidths: Sequence[float] = BANDWIDTHS,
        classes: int | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape)
        at_least(1, hidden=hidden)
        at_least(0, layers=layers, frequencies=frequencies)
        self.conditions = as_conditions(conditions, classes)
        self.features = FourierFeatures(math.prod(shape), frequencies, bandwidths)
        widths = [self.features.width, *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        self.projection = projection(self.conditions, widths[-1])

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return f (N,) for samples (N, *shape), under conditions if it is conditional."""
        h = self.features(sample.flatten(1))
        for linear in self.hidden:
            h = F.silu(linear(h))
        values = in_full_precision(self.out, h).squeeze(-1)
        return values if self.projection is None else values + self.projection(h, condition)


class ConvCritic(nn.Module):
    """Convolutional critic f(x) of Fan & Lee (2023), for images (C, H, W).

    Convolutions k4 s2 p1 halve the image until its shorter side is 4 to 7 pixels (32, 16, 8, 4 or
    28, 14, 7), doubling the channels up to 4 * width; then a convolution k4 s1 p0 to one channel
    and the spatial mean. LeakyReLU 0.2 in between.

    Args:
        shape: (C, H, W) of one sample, H and W at least 8.
        width: channels after the first stage; if None 256, the official value, or 64 for images of
            up to 16 pixels.
        classes: of a conditional critic, see `projection`; None for an unconditional one.
        conditions: other conditions of a conditional critic, `Captions(64)` say.

    Raises:
        ValueError: not the shape of an image, one below 8 pixels, or a width below 1.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        width: int | None = None,
        classes: int | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        self.conditions = as_conditions(conditions, classes)
        check_shape(shape)
        if not is_image(shape) or min(shape[1:]) < 8:
            raise ValueError(f"ConvCritic needs images (C, H, W), H, W >= 8, got {tuple(shape)}.")
        at_least(1, width=width)
        side = min(shape[1:])
        stages = int(math.log2(side // 4))
        if width is None:
            width = 64 if _small(shape) else 256
        channels = [shape[0], *(width * min(2**i, 4) for i in range(stages))]
        layers: list[nn.Module] = []
        for i, o in pairwise(channels):
            layers += [nn.Conv2d(i, o, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4))
        self.projection = projection(self.conditions, channels[-1])

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return f (N,) for samples (N, C, H, W), under conditions if it is conditional."""
        h = self.layers[:-1](sample)
        values = in_full_precision(self.layers[-1], h).mean(dim=(1, 2, 3))
        if self.projection is None:
            return values
        return values + self.projection(h.mean(dim=(2, 3)), condition)


class MLPBaseline(nn.Module):
    """Multilayer perceptron V(x_t, step) with SiLU, on flattened samples.

    Each hidden layer's output is multiplied, before the SiLU, by a learned embedding of the step.

    Args:
        shape: shape of one sample.
        steps: number of steps K.
        hidden: width of the hidden layers, or the widths of all of them.
        layers: number of hidden layers, when `hidden` is one width.
        frequencies: number of Fourier features of the input.
        bandwidths: of those, see `FourierFeatures`; so many frequencies of each.
        classes: of a conditional baseline, see `projection`; None for an unconditional one.
        conditions: other conditions of a conditional baseline.

    Raises:
        ValueError: no steps, an empty shape, a width below 1, or a negative number of layers or
            frequencies.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        steps: int,
        hidden: int | Sequence[int] = 128,
        layers: int = 3,
        frequencies: int = 0,
        bandwidths: Sequence[float] = BANDWIDTHS,
        classes: int | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        _check_steps(steps)
        check_shape(shape)
        widths = [hidden] * layers if isinstance(hidden, int) else list(hidden)
        if not all(each >= 1 for each in widths):
            raise ValueError(f"hidden must be at least 1, got {hidden}.")
        at_least(0, layers=layers, frequencies=frequencies)
        self.steps, self.conditions = steps, as_conditions(conditions, classes)
        self.dimensions = len(shape)
        self.features = FourierFeatures(math.prod(shape), frequencies, bandwidths)
        widths = [self.features.width, *widths]
        self.hidden = nn.ModuleList(_StepLinear(i, o, steps) for i, o in pairwise(widths))
        self.out = nn.Linear(widths[-1], 1)
        self.projection = projection(self.conditions, widths[-1])

    def forward(
        self, sample: Tensor, step: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return V for samples and their steps.

        Args:
            sample: samples (N, *shape), or rows of samples (k, N, *shape), a row at one step.
            step: int64, 0 <= step < K: one a sample, (N,), or one a row, (k,), the fast form for
                trajectories. None: row j is at step j.
            condition: those (N, ...) of a conditional baseline, the same in every row.

        Returns:
            V, (N,) or (k, N).

        Raises:
            ValueError: no `step`, and a number of rows that is not K.
        """
        step = _steps_of(sample, step, self.steps)
        h = self.features(sample.flatten(-self.dimensions))
        for layer in self.hidden:
            h = F.silu(layer(h, step))
        values = in_full_precision(self.out, h).squeeze(-1)
        return values if self.projection is None else values + self.projection(h, condition)


class ConvBaseline(nn.Module):
    """Convolutional baseline V(x_t, step) for images (C, H, W): a `ConvCritic` that knows the step.

    What each convolution but the last gives is multiplied by a learned embedding of the step.
    Where a policy follows the gradient of V (SFT-V), V must know that neighbouring pixels belong
    together; a perceptron's gradient is as rough as noise.

    Args:
        shape: (C, H, W) of one sample, H and W at least 8.
        steps: number of steps K.
        width: channels after the first stage; if None 64.
        classes: of a conditional baseline, see `projection`; None for an unconditional one.
        conditions: other conditions of a conditional baseline.

    Raises:
        ValueError: no steps, not the shape of an image, one below 8 pixels, or a width below 1.
    """

    @checked
    def __init__(
        self,
        shape: Sequence[int],
        steps: int,
        width: int | None = None,
        classes: int | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        super().__init__()
        _check_steps(steps)
        self.steps, self.conditions = steps, as_conditions(conditions, classes)
        width = 64 if width is None else width
        critic = ConvCritic(shape, width, conditions=self.conditions)
        self.layers, self.projection = critic.layers, critic.projection
        stages = [layer for layer in self.layers[:-1] if isinstance(layer, nn.Conv2d)]
        self.embeddings = nn.ParameterList(
            torch.ones(steps, stage.out_channels) for stage in stages
        )

    def forward(
        self, sample: Tensor, step: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Return V; the arguments are those of `MLPBaseline`."""
        step = _steps_of(sample, step, self.steps)
        rows = sample.ndim == 5
        h = sample.flatten(0, 1) if rows else sample
        if rows:
            step = step.repeat_interleave(sample.shape[1])
        embeddings = iter(self.embeddings)
        for layer in self.layers[:-1]:
            h = layer(h)
            if isinstance(layer, nn.Conv2d):
                h = h * next(embeddings)[step, :, None, None]
        values = in_full_precision(self.layers[-1], h).mean(dim=(1, 2, 3))
        if self.projection is not None:
            if rows and condition is not None:
                condition = condition.repeat(len(sample), *[1] * (condition.ndim - 1))
            values = values + self.projection(h.mean(dim=(2, 3)), condition)
        return values.view(sample.shape[:2]) if rows else values


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"A baseline needs at least one step, got {steps}.")


def _steps_of(sample: Tensor, step: Tensor | None, steps: int) -> Tensor:
    """Return the steps of samples or of rows; of all K rows where none are given."""
    if step is not None:
        return step
    if len(sample) != steps:
        raise ValueError(f"The baseline has {steps} steps, got states of {len(sample)}.")
    return torch.arange(steps, device=sample.device)


class _StepLinear(nn.Module):
    """Linear layer whose output is multiplied by an embedding of the step."""

    def __init__(self, inputs: int, outputs: int, steps: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.embedding = nn.Parameter(torch.rand(steps, outputs))  # as Fan & Lee's code draws it

    def forward(self, h: Tensor, step: Tensor) -> Tensor:
        """Return embedding[step] * linear(h), for h (N, inputs) or rows (k, N, inputs)."""
        factor = F.embedding(step, self.embedding)
        if h.ndim == 2:
            return self.linear(h) * factor
        factor = factor.unsqueeze(1)
        few_samples = h.shape[1] < h.shape[2]
        if few_samples:
            return self.linear(h) * factor
        # Each step scales the weights once instead of its many samples: a fifth faster.
        return torch.baddbmm(self.linear.bias * factor, h, self.linear.weight.t() * factor)


# Fourier features of the default networks for vectors.
FREQUENCIES = 32


@checked
def make_critic(
    shape: Sequence[int],
    width: int | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    classes: int | None = None,
    conditions: Conditions | None = None,
) -> nn.Module:
    """Build the default critic f(x) for samples of this shape: `MLPCritic` or `ConvCritic`.

    Images, H and W at least 8, get the `ConvCritic`. The `MLPCritic` reads all numbers of any other
    sample as one vector.

    Args:
        shape: shape of one sample.
        width: hidden width of the one, channels after the first stage of the other; the classes'
            defaults if None.
        bandwidths: of the Fourier features of the `MLPCritic`; the other has none.
        classes: of a conditional critic; None for an unconditional one.
        conditions: other conditions of a conditional critic.

    Raises:
        TypeError: a value of another type.
        ValueError: an empty shape, an image below 8 pixels, or a width below 1.
    """
    at_least(1, width=width)
    if is_image(shape):
        return ConvCritic(shape, width, classes, conditions)
    return MLPCritic(
        shape,
        hidden=128 if width is None else width,
        frequencies=FREQUENCIES,
        bandwidths=bandwidths,
        classes=classes,
        conditions=conditions,
    )


@checked
def make_baseline(
    shape: Sequence[int],
    steps: int,
    kind: BaselineKind = "mlp",
    width: int | None = None,
    bandwidths: Sequence[float] = BANDWIDTHS,
    classes: int | None = None,
    conditions: Conditions | None = None,
) -> MLPBaseline | ConvBaseline:
    """Build the default baseline V(x_t, step) for samples of this shape and K = `steps` steps.

    Args:
        shape: shape of one sample.
        steps: K.
        kind: "mlp", or "conv" for images; all else gets a perceptron.
        width: channels after the first stage of a `ConvBaseline`; its default if None.
        bandwidths: of the Fourier features for vectors.
        classes: of a conditional baseline; None for an unconditional one.
        conditions: other conditions of a conditional baseline.

    Raises:
        TypeError: a value of another type.
        ValueError: no steps, an empty shape, another kind, or of a `ConvBaseline` an image below 8
            pixels or a width below 1.
    """
    if not is_image(shape):
        return MLPBaseline(
            shape,
            steps,
            frequencies=FREQUENCIES,
            bandwidths=bandwidths,
            classes=classes,
            conditions=conditions,
        )
    if kind == "conv":
        return ConvBaseline(shape, steps, width, classes, conditions)
    widths = (256, 256, 128) if _small(shape) else (1024, 1024, 256)
    return MLPBaseline(shape, steps, hidden=widths, classes=classes, conditions=conditions)


def _small(shape: Sequence[int]) -> bool:
    """Tell images of up to 16 pixels, which deserve smaller networks than Fan & Lee's."""
    return max(shape[1:]) <= 16
