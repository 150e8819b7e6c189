"""RDPO: the policy gradient on the table itself, for any reward of finished samples (MATH.md 5.6).

Residual Dirichlet policy optimisation (Zhu et al. 2025) draws the numbers of a solver's steps once
for each sample, and moves their distribution by what the finished sample earned. No gradient flows
through the network or the reward, so both are black boxes, and memory does not grow with the number
of calls. Ours is a Gaussian around any table: its times (as shares of a scale, by their
logarithms), factors, weights, and the times that the network is told.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import check_value
from ...common.checkpoint import counter
from ...common.optimisation import TrainingDivergedError
from ...envs import Schedule
from ...envs.mdp import Reward
from ..denoisers.denoiser import Denoiser
from ..environments import Environment
from ..finished_table import TakesTable, on_clock_of
from ..report import Panel, Report
from ..samplers.table_chain import TableChain
from ..samplers.tableau import Tableau
from ..selection import best_of
from ..solvers import build_solver
from .agent import TableAgent
from .black_box.acting import ManyTables
from .black_box.distribution import CrossEntropy, PolicyGradient, TableDistribution
from .black_box.rewards import earned, judged_by
from .black_box.settings import RDPOSettings
from .black_box.space import TableSpace, Tangent
from .black_box.start import starting_parameters
from .joint.family import FACTORS, SHIFTS, TIMES, WEIGHTS, TableFamily
from .scheduling.levels import level_of_time, noise_levels, with_signal

GIVEN, LEARNED = "given", "learned"
# Added to the seed: noise to choose by, and noise to report on.
_CHOOSING, _REPORTING = 1_000_003, 2_000_003


class RDPO(TakesTable, TableAgent):
    """Learn a few-step solver's numbers from the rewards of its finished samples alone.

    A round draws noises and plays each several times, under the same noise and with as many tables;
    what a table earned beyond the others is its advantage. With method "cross-entropy" tables are
    drawn, too, but each plays all noises, and the best ones say where the next are drawn: the
    baseline. Both act in the environment, by `DiffusionMDP.rollout`.

    What is returned is the mean, a plain table: the best that was met on noise that was not learned
    on, or the given one unless that is better, and not by chance
    (`fewstep.agents.selection`).

    Args:
        env: the environment; its schedule gives the number of steps and the ends unless a table is
            given, its reward is maximised. Where no signal is left at its first time and times are
            learned, the log-SNR -5.1 is taken.
        denoiser: the network, which stays as it is.
        *args: the settings, see `RDPOSettings`.
        critic: a reward (N, *shape) -> (N,) instead of the environment's.
        **arguments: single settings by name, `tableau`, a finished table to start from (see
            `TakesTable`; its times replace the environment's), and `Agent`'s remaining arguments.

    Attributes:
        returned: which table `tableau` is: "given" or "learned".
        rewards: mean rewards on noise that was neither learned on nor chosen by, of the table that
            was given, of the best one met ("learned") and of what is returned ("returned").

    Raises:
        ValueError: no reward; settings that do not go together; a solver that clamps predictions or
            asks twice at one time; too few calls, or noise levels to learn times; two different
            tables; or one that is not among those that are drawn from.
    """

    name = "rdpo"
    grid = "karras"

    settings: RDPOSettings
    Settings = RDPOSettings

    def __init__(
        self,
        env: Environment,
        denoiser: Denoiser,
        *args: Any,
        critic: Reward | None = None,
        **arguments: Any,
    ) -> None:
        check_value("critic", critic, Reward | None)
        super().__init__(env, denoiser, *args, **arguments)
        settings, learn = self.settings, self.settings.learn
        self.mdp = judged_by(self.mdp, critic)
        table = self._given_table
        if table is not None:
            table.check_process(self.denoiser)
            _check_plain(table)
            self.mdp = on_clock_of(self.mdp, table)
        if learn.times or learn.shifts:
            self.mdp = self.mdp.with_schedule(self._with_signal(table))
        self.base = self._build(self.mdp.schedule)
        _check_plain(self.base)
        if learn.times and len(noise_levels(self.mdp.schedule)) < 3:
            raise ValueError(
                "Of the noise levels the first and the last stay fixed, and there are no others: "
                "no times are left to learn; take more steps, or learn.times=False."
            )
        on_clock_of(self.mdp, self.base)
        self.family = TableFamily(self._build, self.mdp.schedule, learn)
        self.given = self.base if table is None else table
        start = starting_parameters(self.family, self.mdp.schedule, table)
        self.space = TableSpace(self.family, start, settings.spread)
        self.distribution = TableDistribution(self.space.size)
        self._learner = (
            PolicyGradient(self.distribution, settings.gradient)
            if settings.method == "policy-gradient"
            else CrossEntropy(self.distribution, settings.elites)
        )
        self.returned = GIVEN
        self.rewards: dict[str, float] = {}
        self.errors = {}
        self._updates, self._most = 0, -math.inf
        self._best = self._kept = torch.zeros(self.space.size, dtype=torch.float64)
        self._table = self.given

    def _with_signal(self, table: Tableau | None) -> Schedule:
        """Return the schedule from where signal is left, which a given table has to be already."""
        schedule = with_signal(self.mdp.schedule)
        if table is not None and schedule != self.mdp.schedule:
            raise ValueError(
                f"'{table.name}' begins where no signal is left, at an infinite noise level that "
                "no other can be measured by: give learn.times=False and learn.shifts=False."
            )
        return schedule

    def _build(self, schedule: Schedule) -> Tableau:
        return build_solver(self.solver, schedule, self.denoiser, **self.solver_options)

    # -- what there is -------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The times of its states."""
        if self.returned == GIVEN:
            return self.mdp.schedule
        return self.family.schedule(self.space.parameters(self._kept))

    @property
    def verdict(self) -> str:
        """One sentence on what is returned, and why."""
        what = f"the {self.returned} table"
        if not self.finished or "returned" not in self.rewards:
            return f"Training is not over; so far there is {what}."
        returned, given = (_shown(self.rewards[name]) for name in ("returned", GIVEN))
        return (
            f"Returned, as the best on held-out noise: {what}. Mean reward: {returned}, of what "
            f"was given {given}."
        )

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._updates >= self.settings.rounds

    @property
    def done(self) -> bool:
        """Whether it is `finished`: learning anew does not begin anew."""
        return self.finished

    # -- learning ------------------------------------------------------------------------------

    def step_sizes(self) -> list[str]:
        """Return the spreads of what is learned, and of the policy gradient also its rates."""
        names = ("learning_rate", "std_rate")
        moved = names if self.settings.method == "policy-gradient" else ()
        return [*self._spreads, *(f"gradient.{name}" for name in moved)]

    @property
    def _spreads(self) -> list[str]:
        of = {TIMES: "times", FACTORS: "coefficients", WEIGHTS: "coefficients", SHIFTS: "shifts"}
        return list(dict.fromkeys(f"spread.{of[name]}" for name in self.space.start))

    def train_round(self) -> dict[str, Tensor]:
        """Draw tables, act with them under the same noise, and follow what they earned."""
        if self._updates == 0:
            self._most = float(self.judge(self.given, _CHOOSING).mean())
        by_tables = self.settings.method == "cross-entropy"
        vectors, rewards = self._play_tables() if by_tables else self._play_episodes()
        rewards = self._with_worst(rewards)
        done = self._updates / self.settings.rounds
        metrics = self._learner.update(vectors, rewards, done)
        metrics["reward"] = float(rewards.mean())
        metrics["std"] = float(self.distribution.log_std.detach().exp().mean())
        self._updates += 1
        if self._updates % self.settings.check_interval == 0 or self.finished:
            metrics["held_out_reward"] = self._compare()
        if self.finished:
            self._end()
            metrics |= {f"{name}_reward": reward for name, reward in self.rewards.items()}
        return {f"train/{key}": torch.tensor(value) for key, value in metrics.items()}

    def _play_episodes(self) -> tuple[Tensor, Tensor]:
        """Give each episode a table of its own; return vectors (k, n, D) and rewards (k, n).

        Rewards are NaN where no sample under a noise is finite.
        """
        k, n = self.settings.compared, self.settings.noises
        mean = self.distribution.mean.detach().clone()
        vectors = self.distribution.draw(k, n, generator=self.generator, mirrored=True)
        tangent, shared = self._around(mean)
        mdp, moves = on_clock_of(self.mdp, shared), self.family.moves_levels
        before, rewards = self.generator.get_state(), []
        for drawn in vectors:
            # The same noise and conditions again.
            self.generator.set_state(before)
            policy = ManyTables(self.denoiser, shared, tangent.at(drawn - mean), moves)
            rewards.append(earned(mdp, policy, n, self.generator))
        return vectors, torch.stack(rewards)

    def _play_tables(self) -> tuple[Tensor, Tensor]:
        """Let each table play all episodes; return vectors (k, D) and mean rewards (k,).

        Rewards are NaN where no sample of a table is finite, or a vector has no table.
        """
        k, n = self.settings.compared, self.settings.noises
        vectors = self.distribution.draw(k, generator=self.generator)
        before, rewards = self.generator.get_state(), []
        for drawn in vectors:
            try:
                table = self.space.table(drawn)
            except ValueError:
                rewards.append(torch.tensor(math.nan, dtype=torch.float64))
                continue
            self.generator.set_state(before)
            policy = TableChain(self.denoiser, table)
            rewards.append(earned(on_clock_of(self.mdp, table), policy, n, self.generator).mean())
        return vectors, torch.stack(rewards)

    def _around(self, mean: Tensor) -> tuple[Tangent, Tableau]:
        """Return the tangent at the mean, and its table.

        Raises:
            TrainingDivergedError: it has none.
        """
        try:
            return self.space.tangent(mean), self.space.table(mean)
        except ValueError:
            raise self._mean_diverged("levels coincide, or its numbers are not finite") from None

    def _with_worst(self, rewards: Tensor) -> Tensor:
        """Return rewards with the least of them in place of NaN.

        Raises:
            TrainingDivergedError: all are NaN.
        """
        earning = ~rewards.isnan()
        if not bool(earning.any()):
            raise TrainingDivergedError(
                "every reward",
                self.num_timesteps,
                f"None of the tables drawn in round {self._updates + 1} can be compared: their "
                f"levels coincide, or their samples run away. {self._advice}",
            )
        return torch.where(earning, rewards, rewards[earning].min())

    def _mean_diverged(self, what: str) -> TrainingDivergedError:
        lower = " or ".join(self.step_sizes())
        return TrainingDivergedError(
            "the mean",
            self.num_timesteps,
            f"RDPO diverged: after round {self._updates} the mean table's {what}. Lower {lower}.",
        )

    @property
    def _advice(self) -> str:
        return f"Draw closer tables, by a smaller {' or '.join(self._spreads)}."

    def judge(self, table: Tableau, noise: int = _REPORTING) -> Tensor:
        """Return what a table earns on fixed noise, (settings.held_out,) float64.

        Args:
            table: any.
            noise: added to the seed of the noise; that to report on if not given.

        Raises:
            ValueError: none of the given table's samples is finite.
            TrainingDivergedError: likewise of another.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed + noise)
        mdp, policy = on_clock_of(self.mdp, table), TableChain(self.denoiser, table)
        found, left = [], self.settings.held_out
        while left:
            # Of two samples at least, as a distance of distributions needs.
            size = left if left <= self.settings.batch_size + 1 else self.settings.batch_size
            found.append(earned(mdp, policy, size, generator))
            left -= size
        rewards = torch.cat(found)
        if not bool(rewards.isnan().all()):
            return self._with_worst(rewards)
        if table is self.given:
            raise ValueError(
                f"The samples of the table to start from, '{table.name}', are all NaN or infinite, "
                "or too far away to be compared: take another solver, schedule or network."
            )
        raise self._mean_diverged("samples run away")

    def _compare(self) -> float:
        """Return the mean's reward on held-out noise; remember the best."""
        mean = self.distribution.mean.detach().clone()
        table = self._around(mean)[1]
        reward = float(self.judge(table, _CHOOSING).mean())
        if reward > self._most:
            self._best, self._most = mean, reward
            self._keep(LEARNED, mean)
        return reward

    def _end(self) -> None:
        """Return the table that earns most on held-out noise; measure those that were compared."""
        learned = self.space.table(self._best)
        tables = {GIVEN: self.given, LEARNED: learned}
        losses = {name: -self.judge(table, _CHOOSING) for name, table in tables.items()}
        # Of one that judges samples by the others, a single reward says nothing.
        by_lead = not hasattr(self.mdp.reward, "judge")
        self._keep(best_of(losses, by_lead), self._best)
        self.rewards = {name: float(self.judge(table).mean()) for name, table in tables.items()}
        self.rewards["returned"] = self.rewards[self.returned]
        if self.returned == GIVEN:
            warnings.warn(
                f"RDPO made {self.given.name} earn no more beyond chance: it is kept. On held-out "
                f"noise its reward was {_shown(-float(losses[GIVEN].mean()))}, that of the learned "
                f"table {_shown(-float(losses[LEARNED].mean()))}. More rounds or noises may help.",
                stacklevel=2,
            )

    def _keep(self, returned: str, vector: Tensor) -> None:
        self.returned, self._kept = returned, vector
        self._table = self.given if returned == GIVEN else self.space.table(vector)

    # -- what a run shows and writes -----------------------------------------------------------

    def report(self) -> Report:
        """Return the learned times and weights beside those that were given."""
        process, index = self.mdp.process, list(range(self._table.steps))
        tables = {self.given.name: self.given, "learned": self._table}
        told = {
            name: (index, level_of_time(process, torch.tensor(table.evaluation_times)).tolist())
            for name, table in tables.items()
        }
        sums = {name: (index, np.sum(table.weights, 1).tolist()) for name, table in tables.items()}
        history = {
            "reward of what is drawn": "train/reward",
            "of the mean, on held-out noise": "train/held_out_reward",
        }
        panels = [
            Panel("noise level told in each call", "network call", told, scale="log"),
            Panel("sum of weights", "network call", sums, scale="symlog"),
            Panel("reward", "round", logged=history),
        ]
        results = {"rewards": self.rewards, "returned": self.returned}
        return Report(self.verdict, results, figures={"rdpo.png": panels})

    def files(self) -> dict[str, Any]:
        """Return what a run writes beside each checkpoint: the table, and its schedule."""
        return {"schedule.json": self.schedule, **super().files()}

    # -- checkpoints ---------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what training changed."""
        return {
            **self.distribution.state(),
            **self._learner.state(),
            "updates": self._updates,
            "best": self._best,
            "kept": self._kept,
            "most": self._most if math.isfinite(self._most) else None,
            "returned": self.returned,
            "rewards": self.rewards,
            "given": self.given.to_json(),
            "start": self.space.start,
            "tableau": self.table_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.distribution.load_state(state)
        self._learner.load_state(state)
        self._updates = counter(state, "updates", "the checkpoint")
        self._best, self._kept = state["best"].cpu(), state["kept"].cpu()
        self._most = -math.inf if state["most"] is None else state["most"]
        self.rewards = dict(state["rewards"])
        if state["given"] != self.given.to_json():
            self.given = Tableau.from_json(state["given"])
        start = {name: value.cpu() for name, value in state["start"].items()}
        self.space = TableSpace(self.family, start, self.settings.spread)
        self._keep(state["returned"], self._kept)


def _shown(reward: float) -> str:
    """Return a reward as it is read; 0 has no sign."""
    return f"{reward + 0.0:.4g}"


def _check_plain(table: Tableau) -> None:
    """Raise ValueError for a table with numbers that are not drawn, and that no episode obeys."""
    if table.covariance is not None and table.covariance.any():
        raise ValueError(f"The solver '{table.name}' reads a second head of the network.")
    if table.clipped is not None and table.clipped.any():
        raise ValueError(
            f"The solver '{table.name}' clamps its predictions, and only weights on predictions as "
            "they are can be learned: take one that does not, or leave out its option 'clip'."
        )
