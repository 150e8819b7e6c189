"""A diffusers scheduler that runs a `Tableau`: what `export_pipeline` puts into a pipeline.

diffusers asks the network and hands the answer to `step`; the table does the rest, by the same code
that `Tableau.sample` runs. diffusers imports no module because a folder names it, so a script that
opens an exported folder first imports this one:

    import fewstep.agents.pretrained.scheduler
    pipeline = DDPMPipeline.from_pretrained(folder)
    images = pipeline(batch_size=16, num_inference_steps=10).images
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers looks this name up in the module of a scheduler to learn how to load it.
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor, nn

from ...envs.processes.base import shaped
from ..denoisers.denoiser import Denoiser
from ..denoisers.networks.unet import network_time_of_unet, unet_time
from ..samplers.tableau import Tableau


class TableauScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # as all of theirs
    """Runs a tableau in diffusers' loop over `timesteps`.

    The `sample` that goes in and out of `step` is what the network reads next, so that pipelines
    that start from N(0, 1) and scale nothing, as DDPMPipeline, are right: the state z_j itself, or
    c_in(t_j) z_j for an "edm" network. The last step returns the finished sample.

    On EDM's process the pipeline's unit noise is thus the scaled start, and the state starts with
    standard deviation sqrt(sigma_max^2 + sigma_data^2), 2e-5 more than `prior_sample`'s sigma_max
    (relative, with the usual 80 and 0.5).

    Args:
        tableau: the table as `Tableau.to_json` writes it, parsed.
        prediction: what the network returns, see `Denoiser`.
        sigma_data: see `Denoiser`; "edm" only.
        time_range: see `UNet2D`.
        clip: see `Denoiser`; kept for `from_pretrained`, the table says what is clipped.
        variance: see `Denoiser`; kept likewise, the table says what noise is added.
        num_train_timesteps: the number of betas. This and the next three say the same in the words
            of diffusers' own schedulers, so that `DDIMScheduler.from_config(scheduler.config)` has
            this network's chain. They follow from the rest, whatever is given; on EDM's process,
            which those schedulers do not know, they stay as they are given, None.
        trained_betas: the betas.
        prediction_type: diffusers' name of the prediction.
        clip_sample: `clip`.

    Pipelines ask the network before every step. A step of the table that is not asked (afs) does
    without the answer: it is the same sampler, with a call more than `tableau.nfe`.

    Attributes:
        timesteps: (K,) the network's times, one for each of the table's steps; int64 if all are
            whole, else float32.

    Raises:
        ValueError: a malformed table, or one whose network a pipeline cannot run: variances from a
            second head, or a variance-exploding process without EDM's preconditioning.
    """

    order = 1
    init_noise_sigma = 1.0

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
    ) -> None:
        self.tableau = Tableau.from_json(json.dumps(tableau))
        if any(self.tableau.row(j).covariance for j in range(self.tableau.steps)):
            raise ValueError(
                f"'{self.tableau.name}' takes variances from a second head of the network, which a "
                "diffusers pipeline has not; export a table without."
            )
        process = self.tableau.process
        self._answer = _Answer()
        self._denoiser = Denoiser(self._answer, process, prediction, sigma_data)
        parameterisation = self._denoiser.parameterisation
        if process.prior_std(process.t_max) != 1 and not parameterisation.scales_input:
            raise ValueError(
                f"A pipeline starts from unit noise and scales nothing: it runs prediction='edm' "
                f"on {process!r}, not {prediction!r}."
            )
        starts = self.tableau.evaluation_times.tolist()
        times = torch.tensor([self._denoiser.network_time(t) for t in starts])
        times = unet_time(times, time_range)
        self._times = times.long() if bool((times == times.long()).all()) else times
        self._scales = [parameterisation.input_scale(t) for t in starts]
        if process.betas is not None and parameterisation.pipeline_name is not None:
            self.register_to_config(
                num_train_timesteps=len(process.betas),
                trained_betas=process.betas.tolist(),
                prediction_type=parameterisation.pipeline_name,
                clip_sample=clip,
            )
        self.set_timesteps()

    @property
    def num_inference_steps(self) -> int:
        """K, the only number of steps that the table has coefficients for."""
        return self.tableau.steps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Begin a new batch.

        Args:
            num_inference_steps: the table's number of steps, or None for that.
            device: where `timesteps` goes.

        Raises:
            ValueError: another number of steps.
        """
        if num_inference_steps not in (None, self.num_inference_steps):
            raise ValueError(
                f"This pipeline runs the table '{self.tableau.name}', which makes exactly "
                f"{self.num_inference_steps} network calls: pass num_inference_steps="
                f"{self.num_inference_steps}, not {num_inference_steps}."
            )
        self.timesteps = self._times.to(device)
        self._step = 0
        self._states: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}

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
        times = torch.as_tensor(timesteps, dtype=torch.float64).cpu().flatten()
        times = parameterisation.time_of_network(network_time_of_unet(times, config.time_range))
        # In float32 the last time may come out a rounding beyond t_max.
        last = (times - process.t_max).abs() < 1e-5 * process.t_max
        times = times.masked_fill(last, process.t_max)
        times = times.to(original_samples.device).expand(len(original_samples))
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        noisy = process.add_noise(original_samples.to(wide), times, noise.to(wide))
        scale = parameterisation.input_scale(times)
        if isinstance(scale, Tensor):
            noisy = noisy * shaped(scale, noisy)
        return noisy.to(original_samples.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Make one step of the table.

        Args:
            model_output: (N, *shape) the network's answer to `sample`.
            timestep: the entry of `timesteps` whose turn it is.
            sample: (N, *shape) what the network was asked.
            generator: source of the fresh noise of stochastic steps, or one for each sample.
            return_dict: return a `SchedulerOutput` rather than a tuple.

        Returns:
            What the network reads next, (N, *shape), or the finished samples: the output's
            `prev_sample`.

        Raises:
            ValueError: a step out of turn.
        """
        j = self._step
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
        self._outputs[j] = self.tableau.evaluate(self._denoiser, self._states[j], j)
        state = self._advance(j, generator)
        unread_states, unread_outputs = self.tableau.unread
        for i in unread_states[j]:
            del self._states[i]
        for k in unread_outputs[j]:
            del self._outputs[k]
        self._step = j + 1
        if self._step < len(self._scales):
            state = state * self._scales[self._step]
        state = state.to(sample.dtype)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)

    def _advance(self, j: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Return z_{j+1}, with diffusers' freedom in generators: on a CPU, or one a sample."""
        if generator is None or not self.tableau.row(j).noise:
            return self.tableau.advance(j, self._states, self._outputs)
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

        state = self.tableau.advance(j, moved(self._states), moved(self._outputs), generator)
        return state.to(self._states[j].device)


class _Answer(nn.Module):
    """A body that says what the pipeline's network has said already."""

    value: Tensor

    def forward(self, sample: Tensor, time: Tensor) -> Tensor:
        """Return the network's answer (N, *shape)."""
        return self.value
