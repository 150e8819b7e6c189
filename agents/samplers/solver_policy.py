"""A solver as a policy: any tableau step by step in a Gymnasium loop, its history as the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import checked
from ...common.reading import quoted
from ..denoisers.denoiser import Denoiser
from .gaussian import TIME_ROUNDING
from .sampling import evaluations_of, sample
from .tableau import Tableau

State = tuple[np.ndarray, ...]


def sample_in(observation: Mapping[str, np.ndarray], device: torch.device) -> Tensor:
    """Return the samples that an observation shows, (N, *shape) or (*shape).

    Raises:
        TypeError: it is no observation.
    """
    if not isinstance(observation, Mapping) or not {"sample", "timestep"} <= observation.keys():
        raise TypeError(
            "An observation is a dictionary with a 'sample' and its 'timestep', got "
            f"{quoted(observation)}."
        )
    return torch.as_tensor(observation["sample"], dtype=torch.float32, device=device)


def is_single(sample: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell one sample from a batch by the shape of what is shown.

    Raises:
        ValueError: it is neither.
    """
    if sample != shape and sample[1:] != shape:
        raise ValueError(
            f"The samples have shape {shape}, the observation's {sample}: that is neither one "
            "sample nor a batch."
        )
    return sample == shape


class SolverPolicy:
    """Any tableau as a policy; its past states and outputs are the recurrent state.

    `predict` speaks NumPy, as `DiffusionEnv` and `SB3VecEnv` do; for `DiffusionVectorEnv` turn its
    actions into tensors, and take autoreset_mode="SAME_STEP", since the default one spends a step
    between two episodes.

    Args:
        tableau: the sampler; the environment must have its steps: the same times, or as many where
            the tableau's repeat, as Heun's do, and no environment could show them.
        denoiser: the network.
        shape: of one sample, `env.single_observation_space["sample"].shape`, to tell a sample from
            a batch; None where the network says it (`Denoiser.shape`).

    Raises:
        ValueError: a denoiser of another noise process than the tableau's, or of another shape.
    """

    @checked
    def __init__(
        self, tableau: Tableau, denoiser: Denoiser, shape: Sequence[int] | None = None
    ) -> None:
        tableau.check_process(denoiser)
        if shape is not None:
            denoiser.check_shape(shape)
        self.shape = denoiser.shape if shape is None else tuple(shape)
        self.tableau = tableau
        self.denoiser = denoiser

    @property
    def nfe(self) -> int:
        """Network evaluations a sample costs; guided, each answer costs two."""
        return evaluations_of(self.tableau, self.denoiser)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.parameters()).device

    @torch.no_grad()
    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: State | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[np.ndarray, State]:
        """Return the next samples and the state to pass back on the next call.

        Args:
            observation: {"sample": (N, *shape) or (*shape), "timestep"} as NumPy arrays, and
                "condition" in a conditional environment.
            state: what the last call returned; None at the start of an episode.
            episode_start: (N,) flags; True drops the state, which must be that of an episode that
                is over. All samples start together.
            deterministic: accepted for Stable-Baselines3; the table decides whether noise is added.
            generator: source of that noise.

        Raises:
            ValueError: more or fewer calls in an episode than the tableau has steps, a timestep
                that is not that of the tableau's step, samples at different times, samples of
                another shape, or nothing tells whether they are one sample or a batch.
        """
        now = sample_in(observation, self.device)
        single = self._is_single(tuple(now.shape), np.shape(observation["timestep"]))
        now = now.unsqueeze(0) if single else now
        fresh = state is None or (episode_start is not None and bool(np.any(episode_start)))
        if fresh and state and len(state[0]) < self.tableau.steps:
            raise ValueError(
                f"The episode ended after {len(state[0])} of the {self.tableau.steps} steps of "
                f"'{self.tableau.name}', with unfinished samples: give the environment as many "
                "steps, or pass state=None to drop them."
            )
        states: list[Tensor] = []
        outputs: list[Tensor] = []
        if state and not fresh:
            states, outputs = (list(torch.as_tensor(part, device=self.device)) for part in state)
        j = len(states)
        if j >= self.tableau.steps:
            raise ValueError(
                f"'{self.tableau.name}' has {self.tableau.steps} steps and the episode goes on: "
                "reset the state, or give the environment as many steps."
            )
        self._check_time(j, np.asarray(observation["timestep"]))
        states.append(now)
        denoiser = self.denoiser
        if "condition" in observation:
            denoiser = denoiser.under_shown(observation["condition"], self.device)
        output, std = self.tableau.evaluate_with_std(denoiser, now, j)
        outputs.append(output)
        action = self.tableau.advance(j, states, outputs, generator, std)
        memory = tuple(torch.stack(part).cpu().numpy() for part in (states, outputs))
        return (action[0] if single else action).cpu().numpy(), memory

    def _check_time(self, j: int, timesteps: np.ndarray) -> None:
        """Refuse an environment whose clock is not the tableau's."""
        shown, time = np.unique(timesteps), float(self.tableau.times[j])
        if len(shown) > 1:
            raise ValueError(
                f"The samples are at different times, {shown[0]:g} to {shown[-1]:g}; a sampler "
                "with memory takes a batch whose episodes start together."
            )
        # No schedule has the times of a table that asks twice at one time, as Heun's does: there
        # only the start and the number of steps can be compared.
        comparable = j == 0 or bool((np.diff(self.tableau.times) < 0).all())
        if comparable and not np.allclose(shown, time, rtol=TIME_ROUNDING, atol=0):
            raise ValueError(
                f"Step {j} of the {self.tableau.steps} of '{self.tableau.name}' is at time "
                f"{time:g}, the environment's sample at {shown[0]:g}: build the tableau on the "
                "environment's schedule."
            )

    def _is_single(self, sample: tuple[int, ...], timestep: tuple[int, ...]) -> bool:
        """Tell one sample from a batch: by the shape of a sample, or by the shape of the times.

        A batch of one has a time of shape (1,), as a sample of `DiffusionEnv` has.
        """
        if self.shape is not None:
            return is_single(sample, self.shape)
        if len(sample) == 1 or len(timestep) != 1:
            return len(sample) == 1 or timestep == ()
        if timestep == sample[:1] == (1,):
            raise ValueError(
                f"An observation of shape {sample} may be one sample or a batch of one: give "
                "SolverPolicy the shape of a sample, shape=..."
            )
        return timestep != sample[:1]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Tensor:
        """Draw finished samples (n, *shape), or all states (K + 1, n, *shape), on the device.

        Give `noise` (n, *shape) to start from, or the `shape` of one sample.

        Raises:
            ValueError: neither noise nor shape.
        """
        shape = self.shape if shape is None else shape
        if noise is None and shape is None:
            raise ValueError("Give noise=(n, *shape) to start from, or the shape of one sample.")
        return sample(
            self.tableau,
            self.denoiser,
            n if noise is None else noise,
            shape=shape or (),
            generator=generator,
            return_trajectory=return_trajectory,
        )
