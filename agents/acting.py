"""Actor: a network and a solver that act in an environment, by the step or by whole samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..common.arguments import check_value, checked
from ..envs import DiffusionMDP, Schedule
from .denoisers.denoiser import Denoiser
from .environments import Environment, made_environment, mdp_of
from .samplers.sampling import evaluations_of, sample
from .samplers.solver_policy import SolverPolicy, is_single, sample_in
from .samplers.tableau import Tableau
from .solvers import Options, build_solver, default_solver_options


class Actor:
    """What acts: a denoiser with the table of the solver that asks it.

    Args:
        env: a `DiffusionVectorEnv`, its `DiffusionMDP`, or an environment id, which stands for the
            environment on the solver's `default_schedule`.
        denoiser: the network, moved to the environment's device. Building an actor changes nothing
            else of it, and nothing of the environment.
        solver: name of the solver that samples.
        options: of the solver; None takes those for the kind of data.
        seed: seed of the samples' randomness.

    Attributes:
        mdp: the decision process.
        obeys_transitions: whether it can train where the next state is not the action.
        acting_generator: the source of the samples' randomness: looking at samples does not change
            a training.

    Raises:
        ValueError: the environment has another noise process than the denoiser, samples of another
            shape, or other conditions; or a conditional denoiser gets no condition there.
    """

    obeys_transitions: ClassVar[bool] = True

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        solver: str,
        options: Options | None = None,
        seed: int = 0,
    ) -> None:
        self.solver = solver
        self.env = env = made_environment(env, solver)
        self.mdp: DiffusionMDP = mdp_of(env)
        check_value("denoiser", denoiser, Denoiser)
        if denoiser.process != self.mdp.process:
            raise ValueError(
                f"The denoiser was made for {denoiser.process!r}, the environment has "
                f"{self.mdp.process!r}: build the environment with process=denoiser.process."
            )
        if not (self.mdp.is_plain or self.obeys_transitions):
            raise ValueError(
                f"{type(self).__name__} learns a solver for samples that move freely, and "
                f"{type(self.mdp).__name__} has transitions of its own: train in the plain "
                "environment, and sample in this one."
            )
        denoiser.check_shape(self.mdp.shape)
        check_condition(denoiser, self.mdp)
        self.device = torch.device(self.mdp.device)
        self.denoiser = denoiser.to(self.device)
        if options is None:
            options = default_solver_options(solver, shape=self.mdp.shape, process=self.mdp.process)
        self.solver_options: Options = dict(options)
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._tableau = self.starting_tableau(self.denoiser)

    @property
    def sampling_denoiser(self) -> Denoiser:
        """The denoiser that samples: the averaged one where an agent averages."""
        return self.denoiser

    @property
    def schedule(self) -> Schedule:
        """The times that the sampler visits: the environment's, unless an agent learns them."""
        return self.mdp.schedule

    @property
    def tableau(self) -> Tableau:
        """The sampler: the solver on `schedule`."""
        return self._tableau

    @property
    def sampler(self) -> tuple[Tableau, Denoiser]:
        """What samples: the table, and the denoiser that it asks."""
        return self.tableau, self.sampling_denoiser

    @property
    def nfe(self) -> int:
        """Network evaluations a sample costs; guided, each answer costs two."""
        tableau, denoiser = self.sampler
        return evaluations_of(tableau, denoiser)

    def tableau_on(self, schedule: Schedule) -> Tableau:
        """Return the sampler on another schedule."""
        return build_solver(self.solver, schedule, self.sampling_denoiser, **self.solver_options)

    def starting_tableau(self, denoiser: Denoiser) -> Tableau:
        """Return the sampler before any training, for the denoiser as it was then."""
        return build_solver(self.solver, self.mdp.schedule, denoiser, **self.solver_options)

    @torch.no_grad()
    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the next samples for NumPy observations, single or batched.

        The samples of a batch may be at different steps, unless the sampler has memory; their
        timesteps are (N,) or (N, 1). Finished ones stay as they are. A sampler with memory keeps it
        in `state`: hand it back with the next call.

        `deterministic` takes the mean of each transition. For an ancestral sampler that is a
        different, noise-free sampler, so False is the default here; Stable-Baselines3's
        `evaluate_policy` passes True unless told otherwise.

        Raises:
            TypeError: no observation, a dictionary with "sample" and "timestep".
            ValueError: samples of another shape, as many times as there are no samples, or a time
                that is not the schedule's.
        """
        sample = sample_in(observation, self.device)
        single = is_single(tuple(sample.shape), tuple(self.mdp.shape))
        tableau, denoiser = self.sampler
        if "condition" in observation:
            denoiser = denoiser.under_shown(observation["condition"], self.device)
        if not tableau.one_step:
            policy = SolverPolicy(tableau, denoiser, shape=self.mdp.shape)
            return policy.predict(observation, state, episode_start, True, self.acting_generator)
        sample = sample.unsqueeze(0) if single else sample
        times = np.ravel(observation["timestep"])
        if len(times) not in (1, len(sample)):
            raise ValueError(f"There are {len(sample)} samples and {len(times)} timesteps.")
        times = np.broadcast_to(times, len(sample))
        if deterministic:
            tableau = tableau.replace(noise=np.zeros(tableau.steps), covariance=None)
        action = sample.clone()  # that of a finished sample, whose action is ignored
        for timestep in np.unique(times[times != np.float32(self.schedule.times[-1])]):
            here = torch.from_numpy(times == timestep).to(self.device)
            step, part = self.schedule.step_of(float(timestep)), sample[here]
            output, std = tableau.evaluate_with_std(denoiser.at(here), part, step)
            moved = tableau.advance(step, {step: part}, {step: output}, self.acting_generator, std)
            action[here] = moved
        action = action[0] if single else action
        return action.cpu().numpy(), state

    @checked
    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
        **options: Any,
    ) -> Tensor:
        """Draw finished samples (n, *shape) on the device, in the actor's environment.

        Args:
            n: how many, at least 1.
            schedule: another grid than the environment's.
            generator: source of randomness; the agent's own for acting by default.
            noise: initial states (n, *shape) instead of fresh prior samples.
            return_trajectory: return all states (K + 1, n, *shape) instead, the noisiest first.
            options: what the environment's `episodes` takes, such as `known` of `Inpainting` or the
                `condition` of a conditional environment, one for all or one each; where it is not
                given conditions are drawn.
        """
        tableau = self.tableau if schedule is None else self.tableau_on(schedule)
        generator = self.acting_generator if generator is None else generator
        if noise is not None and len(noise) != n:
            raise ValueError(f"n is {n}, but noise holds {len(noise)} initial states.")
        return sample(
            tableau,
            self.sampling_denoiser,
            n if noise is None else noise,
            shape=self.mdp.shape,
            generator=generator,
            return_trajectory=return_trajectory,
            mdp=self.mdp,
            **options,
        )


def check_condition(denoiser: Denoiser, mdp: DiffusionMDP) -> None:
    """Raise ValueError if a denoiser and an environment do not agree about conditions."""
    if mdp.conditions is None:
        if denoiser.is_open:
            wanted = True if denoiser.classes is not None else denoiser.waits_for
            raise ValueError(
                "The denoiser is conditional and the environment is not: make that with "
                f"conditional={wanted!r}, or say under which condition the denoiser is asked, "
                "denoiser.given(condition)."
            )
        return
    if denoiser.conditions is None:
        raise ValueError(
            f"The environment has {mdp.conditions} and the denoiser is unconditional: make the "
            "environment with conditional=False, or clone a conditional denoiser."
        )
    if denoiser.conditions != mdp.conditions:
        raise ValueError(
            f"The denoiser knows {denoiser.conditions}, the environment has {mdp.conditions}."
        )
    if not denoiser.is_open:
        raise ValueError(
            "The denoiser is asked under a condition of its own, and the environment shows one: "
            "give the agent the denoiser without, denoiser.given(guidance=...), or make the "
            "environment with conditional=False."
        )
