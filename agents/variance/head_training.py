"""HeadTraining: gradient steps on a second head, with the network frozen (MATH.md 1.12)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ...common.optimisation import Averaged, adam, learning_rate, seeded, set_learning_rate
from ...envs import DiffusionMDP
from ..denoisers.denoiser import Denoiser
from ..denoisers.variance_head import HeadInputs, VarianceHead
from ..selection import is_better
from .held_out import Noised
from .learner import GIVEN, LEARNED, VarianceLearner
from .settings import VarianceSettings

# Rounds between two looks at held-out samples.
CHECK_INTERVAL = 50


class HeadTraining(VarianceLearner):
    """A head in training, its average, the best average so far, and the head that was given.

    That is the one that the denoiser had, if it is of this kind, or what says that the data are
    Gaussian. It may be of another size: it is used as `per_pixel` says, and is not trained.

    Raises:
        ValueError: a process that leaves no signal at its last time, or a network whose last
            features a head cannot read.
    """

    learned = "second head"

    def __init__(
        self, mdp: DiffusionMDP, denoiser: Denoiser, settings: VarianceSettings, seed: int
    ) -> None:
        super().__init__(mdp, denoiser, settings)
        # The variance is (sigma / alpha)^2 times what a head says.
        if mdp.process.levels(mdp.process.t_max)[0] == 0:
            raise ValueError(
                f"kind '{settings.kind}' learns on processes that keep some signal, and at the "
                f"last time of {mdp.process!r} none is left; 'gamma' learns on any DiscreteVP."
            )
        shape = tuple(mdp.shape)
        with torch.no_grad():
            probe = torch.zeros(1, *shape, device=mdp.device)
            asked = denoiser.under_some()
            features = asked.head_inputs(probe, mdp.process.t_max)[1].features
        with seeded(seed):
            head = VarianceHead.on_features(
                settings.kind,
                features,
                shape,
                hidden=settings.head.hidden,
                data_std=denoiser.sigma_data,
                per_pixel=settings.head.per_pixel,
            )
        self._head = head.to(mdp.device)
        self._averaged = Averaged(self._head, settings.optimizer.ema)
        self._optimizer = adam(self._head.parameters())
        had = denoiser.head
        given = had if had is not None and _alike(had, self._head) else self._head
        self._given = copy.deepcopy(given).requires_grad_(False)
        self._given.per_pixel = self._given.config["per_pixel"] = settings.head.per_pixel
        # The result: whoever goes on to train it finds it trainable.
        self._keep(copy.deepcopy(self._given))

    @property
    def rounds(self) -> int:
        """As the settings say."""
        return self.settings.rounds

    def judges_after(self, rounds: int) -> bool:
        """Now and then."""
        return rounds % CHECK_INTERVAL == 0

    def learn(
        self,
        clean: Tensor,
        noise: Tensor,
        generator: torch.Generator,
        progress: float,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Take a gradient step of the head."""
        settings = self.settings.optimizer
        t = self.draw_times(len(clean), generator)
        noisy = self.mdp.process.add_noise(clean, t, noise)
        read, target = self._asked(noisy, t, noise, condition)
        loss = (target - self._head(*read)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self._head.parameters(), settings.max_grad_norm or math.inf
        )
        rate = learning_rate(settings.learning_rate, settings.lr_schedule, progress)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._averaged.update()
        return {"train/loss": loss.detach(), "train/grad_norm": grad_norm}

    @property
    def held_out(self) -> int:
        """Two batches, and no fewer than 64."""
        return max(2 * self.settings.batch_size, 64)

    def draw_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the process's times."""
        return self.mdp.process.draw_times(n, generator, self.mdp.device)

    @torch.no_grad()
    def losses(self, samples: Noised) -> dict[str, Tensor]:
        """See `VarianceLearner.losses`."""
        read, target = self._asked(*samples)
        heads = {GIVEN: self._given, LEARNED: self._averaged.module, "returned": self._best}
        return {
            name: (target - head(*read)).double().square().flatten(1).mean(1).cpu()
            for name, head in heads.items()
        }

    def choose(self, losses: dict[str, Tensor]) -> None:
        """Keep the average if it is better than the best one so far."""
        if is_better(losses[LEARNED], losses["returned"]):
            self._keep(copy.deepcopy(self._averaged.module))
            self.returned = LEARNED

    def _keep(self, head: VarianceHead) -> None:
        """Make a head the best one, in place of the last, which may be of another size."""
        self._best = head.requires_grad_(True)
        self.denoiser.head = self._best

    @torch.no_grad()
    def _asked(
        self, noisy: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None = None
    ) -> tuple[HeadInputs, Tensor]:
        """Return what a head reads of noised samples, and the squares that it should say."""
        _, read = self.denoiser.under(condition).head_inputs(noisy, t)
        missed = noise if self.settings.kind == "sn" else noise - read.epsilon
        return read, missed.square()

    def state(self) -> dict[str, Any]:
        """Return the heads, and the optimizer's state."""
        return {
            "given": self._given.state_dict(),
            "best": self._best.state_dict(),
            "configs": {"given": self._given.config, "best": self._best.config},
            "head": self._head.state_dict(),
            "averaged": self._averaged.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any], returned: str) -> None:
        """Restore what `state` returned."""
        # Older files have heads of the size in the settings only.
        configs = state.get("configs") or dict.fromkeys(("given", "best"), self._head.config)
        given, best = (self._read(configs[name], state[name]) for name in ("given", "best"))
        self._given = given.requires_grad_(False)
        self._keep(best)
        self._head.load_state_dict(state["head"])
        self._averaged.module.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.returned = returned

    def _read(self, config: dict[str, Any], weights: dict[str, Tensor]) -> VarianceHead:
        """Return the head that a file's config and weights describe."""
        # Its first weights are drawn and overwritten: the caller's random numbers stay as they are.
        with seeded(0):
            head = VarianceHead(**config).to(self.mdp.device)
        head.load_state_dict(weights)
        return head


def _alike(had: VarianceHead, other: VarianceHead) -> bool:
    """Whether two heads read and say the same things, whatever their size."""
    names = ("kind", "shape", "features", "convolutional")
    return all(had.config[name] == other.config[name] for name in names)
