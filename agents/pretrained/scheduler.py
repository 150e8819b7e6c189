"""A diffusers scheduler that runs a `Tableau`, in any pipeline of diffusers.

diffusers asks the network and hands the answer to `step`; the table does the rest, by the same code
that `Tableau.sample` runs. A learned table is a folder that is put into a pipeline:

    from fewstep.agents.pretrained.scheduler import TableauScheduler
    pipeline.scheduler = TableauScheduler.from_pretrained(folder)

diffusers imports no module because a folder names it, so a script that opens a whole pipeline of
`export_pipeline` imports this one first.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers looks the last name up in the module of a scheduler to learn how to load it.
from diffusers.schedulers.scheduling_utils import (
    KarrasDiffusionSchedulers,
    SchedulerMixin,
    SchedulerOutput,
)
from torch import Tensor

from ...common.arguments import checked
from ...envs.processes.base import shaped
from ...envs.schedules import Schedule
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks.unet import network_time_of_unet, unet_time
from ..samplers.begun import begun_at
from ..samplers.tableau import Tableau
from ..solvers import make_solver
from .chains import EDMS, FLOWS, settings_of
from .fits import Answer, check_asked, check_same_levels, check_setting, network_of
from .grids import sigmas_of, visited_by

# Whose settings may stand in a config beside ours.
COMPATIBLE = [*(each.name for each in KarrasDiffusionSchedulers), *FLOWS, *EDMS]


class TableauScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # as all of theirs
    """Runs a tableau in diffusers' loop over `timesteps`.

    The `sample` that goes in and out of `step` is what the network reads next, so that pipelines
    that start from N(0, 1) and scale nothing, as DDPMPipeline, are right: the state z_j itself, or
    c_in(t_j) z_j for an "edm" network. The last step returns the finished sample.

    On EDM's process the pipeline's unit noise is thus the scaled start, and the state starts with
    standard deviation sqrt(sigma_max^2 + sigma_data^2), 2e-5 more than `prior_sample`'s sigma_max
    (relative, with the usual 80 and 0.5). Other networks on a variance-exploding process start from
    `init_noise_sigma` times that noise, which all pipelines but DDPMPipeline multiply by.

    Image-to-image and inpainting begin in the middle (`set_begin_index`): rows that read what was
    before become first-order steps, see `samplers.begun`.

    Args:
        tableau: the table as `Tableau.to_json` writes it, parsed.
        prediction: what the network returns, see `Denoiser`.
        sigma_data: see `Denoiser`; "edm" only.
        time_range: see `UNet2D`.
        clip: see `Denoiser`; kept for `from_pretrained`, the table says what is clipped.
        variance: see `Denoiser`; kept likewise, the table says what noise is added.
        num_train_timesteps: the number of betas, or what a flow's network is asked at for the level
            1. This and the next three say the same in the words of diffusers' own schedulers, so
            that `DDIMScheduler.from_config(scheduler.config)` and the like have this network's
            noise levels; `shift`, `flow_shift`, `use_flow_sigmas`, `sigma_min`, `sigma_max` and
            `rescale_betas_zero_snr` are beside them where the process has them. They follow from
            the rest.
        trained_betas: the betas.
        prediction_type: diffusers' name of the prediction.
        clip_sample: `clip`.
        mu: the dynamic shift that the table was made for, of a flow that has one.

    Pipelines ask the network before every step. A step of the table that is not asked (afs) does
    without the answer: it is the same sampler, with a call more than `tableau.nfe`.

    Attributes:
        timesteps: (K,) the network's times, one for each of the table's steps; int64 if all are
            whole, else float32.
        sigmas: (K + 1,) the noise levels, see `pretrained.grids`.

    Raises:
        ValueError: a malformed table, or one whose network a pipeline cannot run: variances from a
            second head; or another `prediction_type` or other betas than the table's.
    """

    order = 1
    _compatibles = COMPATIBLE

    _begin: int | None
    _step: int | None

    @register_to_config
    def __init__(
        self,
        tableau: dict[str, Any],
        prediction: str = "epsilon",
        sigma_data: float = 0.5,
        time_range: list[float] | None = None,
        clip: bool = False,
        variance: str | None = None,
        num_train_timesteps: int | None = None,
        trained_betas: list[float] | None = None,
        prediction_type: str | None = None,
        clip_sample: bool | None = None,
        mu: float | None = None,
    ) -> None:
        self.tableau = Tableau.from_json(json.dumps(tableau))
        if any(self.tableau.row(j).covariance for j in range(self.tableau.steps)):
            raise ValueError(
                f"'{self.tableau.name}' takes variances from a second head of the network, which a "
                "diffusers pipeline has not; export a table without."
            )
        process = self.tableau.process
        self._answer = Answer()
        self._denoiser = Denoiser(self._answer, process, prediction, sigma_data)
        parameterisation = self._denoiser.parameterisation
        starts = self.tableau.evaluation_times.tolist()
        times = torch.tensor([self._denoiser.network_time(t) for t in starts])
        times = unet_time(times, time_range)
        self._times = times.long() if bool((times == times.long()).all()) else times
        self._scales = [parameterisation.input_scale(t) for t in starts]
        self.sigmas = torch.from_numpy(sigmas_of(process, self.tableau.times)).float()
        scaled = parameterisation.scales_input
        self.init_noise_sigma = 1.0 if scaled else process.prior_std(starts[0])
        settings = settings_of(parameterisation, clip)
        for name, given in (("prediction_type", prediction_type), ("trained_betas", trained_betas)):
            check_setting(self.tableau, name, given, settings)
        config: Any = self.config
        # diffusers leaves out what it takes for a default when it copies a config.
        defaults = set(config.get("_use_default_values", ())) - settings.keys()
        self.register_to_config(**settings, _use_default_values=sorted(defaults))
        self.set_timesteps()

    @classmethod
    @checked
    def from_scheduler(
        cls,
        scheduler: Any,
        table: str | Tableau,
        steps: int | None = None,
        *,
        schedule: Schedule | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **options: Any,
    ) -> TableauScheduler:
        """Make one in place of a pipeline's own scheduler, for the same network.

        Args:
            scheduler: that of the pipeline. Its settings say what the network predicts at which
                noise, and stay in the config of the new one.
            table: a tableau of this network's noise levels, or the name of a solver.
            steps: of the solver; it visits the times that `scheduler` does in so many.
            schedule: other times for the solver.
            sigmas: what the pipeline hands to its scheduler instead of steps, as Flux's hand 1,
                ..., 1 / K.
            mu: the dynamic shift of a flow that has one (Flux's grows with the picture).
            options: of the solver.

        Raises:
            ValueError: a scheduler that fewstep does not know; a table of other noise levels; a
                solver without steps; or what `make_solver` raises.
        """
        theirs = network_of(scheduler, mu)
        if isinstance(table, Tableau):
            check_same_levels(table, theirs, theirs)
        else:
            if schedule is None and steps is None and sigmas is None:
                raise ValueError(f"Say how many steps '{table}' is to make, or its schedule.")
            times = schedule or visited_by(scheduler, theirs, steps, sigmas, mu)
            table = make_solver(table, times, theirs, **options)
        config = dict(scheduler.config)
        own = {
            "tableau": json.loads(table.to_json()),
            "prediction": theirs.prediction,
            "sigma_data": theirs.sigma_data,
            "clip": theirs.clip,
            "variance": theirs.variance,
            "mu": mu,
        }
        # Betas follow from the table; theirs may be those before a rescaling.
        made: Any = cls.from_config({**config, **own, "trained_betas": None})
        return made

    def replacing(self, scheduler: Any) -> TableauScheduler:
        """Return itself, after a look at whether it fits in the place of a pipeline's scheduler.

        Args:
            scheduler: that of the pipeline.

        Raises:
            ValueError: that one's network predicts something else, or sees other noise at the same
                times.
        """
        config: Any = self.config
        theirs = network_of(scheduler, config.mu)
        if theirs.prediction != self._denoiser.prediction:
            raise ValueError(
                f"'{self.tableau.name}' was made for a network that predicts "
                f"{self._denoiser.prediction!r}, the pipeline's scheduler says that its network "
                f"predicts {theirs.prediction!r}."
            )
        check_same_levels(self.tableau, self._denoiser, theirs)
        return self

    @property
    def num_inference_steps(self) -> int:
        """K, the only number of steps that the table has coefficients for."""
        return self.tableau.steps

    @property
    def begin_index(self) -> int | None:
        """The step that a pipeline begins with, None for the first."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The step whose turn it is; None before the first."""
        return self._step

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin with a later step than the first, as image-to-image does.

        Args:
            begin_index: 0 to K - 1; called between `set_timesteps` and the first `step`.

        Raises:
            ValueError: no such step.
        """
        self._running = begun_at(self.tableau, begin_index) if begin_index else self.tableau
        self._begin = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a new batch.

        The table has coefficients for its own noise levels only, so that pipelines may name those
        or nothing.

        Args:
            num_inference_steps: the table's number of steps, or None for that.
            device: where `timesteps` goes.
            timesteps: the table's own.
            sigmas: the table's own K noise levels, perhaps with the last one behind, or those of a
                flow before its shift. The even ramp 1, ..., 1 / K that Flux's pipelines pass stands
                for the number of steps.
            mu: the dynamic shift of a flow, which the table has already been made for; a warning
                says if that was another.

        Raises:
            ValueError: another number of steps, or other times or levels.
        """
        own = self._times, self.sigmas
        check_asked(self.tableau, own, num_inference_steps, timesteps, sigmas)
        self._warn_of_shift(mu)
        self.timesteps = self._times.to(device)
        self._running = self.tableau
        self._begin = self._step = None
        self._states: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

    def _warn_of_shift(self, mu: float | None) -> None:
        config: Any = self.config
        made_for = config.get("mu")
        if mu is not None and made_for is not None and abs(mu - made_for) > 1e-3:
            warnings.warn(
                f"'{self.tableau.name}' was made for mu={made_for:g}, and this size of picture has "
                f"mu={mu:.4g}: it keeps its own noise levels.",
                stacklevel=3,
            )

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return `sample` as it is: it is what the network reads already."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network reads at these times of clean samples with this noise.

        Args:
            original_samples: (N, *shape) clean samples.
            noise: (N, *shape) standard normal.
            timesteps: (N,), (1,) or () the network's times, such as those of `timesteps`.

        Returns:
            alpha x_0 + sigma noise (N, *shape), times c_in for an "edm" network.

        Raises:
            ValueError: times outside the process, or shapes that do not fit.
        """
        process, parameterisation = self.tableau.process, self._denoiser.parameterisation
        config: Any = self.config
        asked = torch.as_tensor(timesteps, dtype=torch.float64).cpu().flatten()
        times = parameterisation.time_of_network(network_time_of_unet(asked, config.time_range))
        # In float32 the last time may come out a rounding beyond t_max.
        last = (times - process.t_max).abs() < 1e-5 * process.t_max
        times = times.masked_fill(last, process.t_max)
        everyone, device = len(original_samples), original_samples.device
        scale = parameterisation.input_scale(times.to(device).expand(everyone))
        if self.tableau.asked_times is not None:
            # The network is told another time than the one that the state is at.
            found = asked[:, None] == self._times.double()
            own = torch.from_numpy(self.tableau.times[:-1].copy())[found.int().argmax(1)]
            times = torch.where(found.any(1), own, times)
        times = times.to(device).expand(everyone)
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        noisy = process.add_noise(original_samples.to(wide), times, noise.to(wide))
        if isinstance(scale, Tensor):
            noisy = noisy * shaped(scale, noisy)
        return noisy.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return `add_noise` of these, as the pipelines of flows call it."""
        noise = torch.randn_like(sample) if noise is None else noise
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Make one step of the table.

        Args:
            model_output: (N, *shape) the network's answer to `sample`.
            timestep: the entry of `timesteps` whose turn it is.
            sample: (N, *shape) what the network was asked.
            generator: source of the fresh noise of stochastic steps, or one for each sample.
            return_dict: return a `SchedulerOutput` rather than a tuple.
            eta: DDIM's share of noise, which some pipelines pass: 0 or None, for the table says how
                noisy its steps are.
            use_clipped_model_output: likewise: False or None.

        Returns:
            What the network reads next, (N, *shape), or the finished samples: the output's
            `prev_sample`.

        Raises:
            ValueError: a step out of turn, or other noise than the table's.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"The table '{self.tableau.name}' says itself how noisy its steps are and what is "
                "clipped: leave out eta and use_clipped_model_output."
            )
        j = (self._begin or 0) if self._step is None else self._step
        if j == len(self._times) or float(timestep) != float(self._times[j]):
            turn = f"timestep {self._times[j]:g}" if j < len(self._times) else "set_timesteps()"
            raise ValueError(
                f"The steps of a table run in order: it is the turn of {turn}, not of timestep "
                f"{float(timestep):g}."
            )
        # Half-precision networks get their rounding, the sums of states do not.
        wide = torch.promote_types(sample.dtype, torch.float32)
        self._states[j] = sample.to(wide) / self._scales[j]
        self._answer.value = model_output.to(wide)
        self._outputs[j] = self._running.evaluate(self._denoiser, self._states[j], j)
        state = self._advance(j, generator)
        unread_states, unread_outputs = self._running.unread
        for i in unread_states[j]:
            del self._states[i]
        for k in unread_outputs[j]:
            del self._outputs[k]
        self._step = j + 1
        if j + 1 < len(self._scales):
            state = state * self._scales[j + 1]
        state = state.to(sample.dtype)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _advance(self, j: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Return z_{j+1}, with diffusers' freedom in generators: on a CPU, or one a sample."""
        if generator is None or not self._running.row(j).noise:
            return self._running.advance(j, self._states, self._outputs)
        if isinstance(generator, torch.Generator):
            return self._advance_drawing(j, generator, slice(None))
        if len(generator) == 1:
            return self._advance_drawing(j, generator[0], slice(None))
        parts = [
            self._advance_drawing(j, source, slice(n, n + 1)) for n, source in enumerate(generator)
        ]
        return torch.cat(parts)

    def _advance_drawing(self, j: int, generator: torch.Generator, which: slice) -> Tensor:
        def moved(history: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: tensor[which].to(generator.device) for i, tensor in history.items()}

        state = self._running.advance(j, moved(self._states), moved(self._outputs), generator)
        return state.to(self._states[j].device)

    def __len__(self) -> int:
        """Return the number of noisings that the network was trained on."""
        config: Any = self.config
        return config.num_train_timesteps or self.tableau.steps
