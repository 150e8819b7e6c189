"""Tableau: a sampler as a table of numbers, and the one loop that runs every table.

With the denoiser's outputs O_0, O_1, ... in the order of its evaluations, each new state is linear
in what came before:

    z_{j+1} = p_j z_{a(j)} + q_j z_j + sum_{k<=j} W_jk O_k + s_j noise_j,      O_j = O(z_j, t_j)

as a Butcher tableau is for Runge-Kutta. Solvers are pure functions Schedule -> Tableau
(`fewstep.agents.solvers`); coefficients are float64 and the loop only multiplies and adds.

The fast DDPM samplers add two terms that are not linear (MATH.md 1.11, 1.12): a predicted clean
sample clamped to [-1, 1], and a standard deviation of each pixel's own,

    z_{j+1} = ... + c_j clamp(O_j, -1, 1) + s_j(z_j) noise_j,
    s_j(z)^2 = min(s_j^2 + v_j Cov0(z, t_j), cap_j^2)

with Cov0 the variance of the clean sample as the denoiser's second head predicts it.

In a step that is not asked, O_j is not the network's but the guess of a state that is nearly noise,
epsilon = z_j / sqrt(alpha^2 + sigma^2), and costs nothing (MATH.md 1.19).

A learned solver may tell the network another time than the state's: O_j = O(z_j, t_j + xi_j), see
`asked_times`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...common.arguments import check_value
from ...common.files import write_atomically
from ...common.reading import damage_named, read_text
from ...envs.processes import NoiseProcess
from ...envs.schedules.ends import warn_of_ends
from .guess import guessed_output
from .sparse import SparseRows, read_only
from .tableau_checks import (
    ARRAYS,
    DEFAULTS,
    Output,
    check_arrays,
    check_asked,
    check_asked_times,
    check_times,
)
from .tableau_json import OPTIONAL, read_table, write_table

if TYPE_CHECKING:
    from ..denoisers.denoiser import Denoiser

# Of an environment: (state, action, step) -> next state.
Transition = Callable[[Tensor, Tensor, int], Tensor]


class Row(NamedTuple):
    """One row of a tableau as plain numbers; `weights` are (k, W_jk) pairs without the zeros.

    `time` is what the denoiser is told.
    """

    time: float
    anchor: int
    scale: float
    current: float
    weights: tuple[tuple[int, float], ...]
    noise: float
    clipped: float = 0.0
    covariance: float = 0.0
    cap: float = math.inf
    asked: bool = True


@dataclass(frozen=True, eq=False)
class Tableau:
    """A sampler of K steps, each of one network evaluation unless it is not asked.

    A tableau never changes. Its arrays are its own, copied from what it was given, and read-only:
    `replace` makes another one. Of the weights only those that are not 0 are kept
    (`sparse_weights`), so a sampler of 100,000 steps takes some tens of megabytes; `weights` lays
    all K x K out when it is first read. `dataclasses.replace` reads it, `replace` does not.

    Attributes:
        name: what the solver is called.
        process: the noise process whose times these are.
        times: (K + 1,) float64; state z_j has times[j], at which the network is asked about it;
            the last entry is the time of the finished sample. Times may repeat or rise (Heun),
            never below 0.
        scale: (K,) float64, p: the factor on the anchor state.
        weights: (K, K) float64, W: lower-triangular weights on the denoiser's outputs. The
            constructor takes `SparseRows` as well.
        noise: (K,) float64, s >= 0: standard deviation of the fresh noise of each step.
        anchors: (K,) int64, a(j) <= j: which state a step starts from; j itself by default.
        output: what O is: the predicted noise ("epsilon") or the predicted clean sample ("sample").
        current: (K,) float64, q: the factor on z_j itself where a step starts from an earlier
            state (Heun in data prediction); 0 elsewhere, and by default.
        clipped: (K,) float64, c: the weight on O_j clamped to [-1, 1], beside W_jj on O_j as it is;
            0 by default. Only for output "sample".
        covariance: (K,) float64, v >= 0: how much of Cov0(z_j, t_j), the variance of each pixel
            that the denoiser's second head predicts, is added to noise_j^2; 0 by default.
        cap: (K,) float64 >= 0: the standard deviation goes no higher; infinite by default.
        asked: (K,) bool: False where O_j is guessed without the network, with epsilon =
            z_j / sqrt(alpha^2 + sigma^2); True by default.
        asked_times: (K,) float64, the times that the denoiser is told, where they are not those of
            the states it is asked about; None, by default, if they are: times[:-1].

    Raises:
        ValueError: wrong shapes, non-finite numbers, weights above the diagonal, negative noise,
            covariance or cap, anchors out of range, `current` on a step that starts from z_j
            anyway, `clipped` with predicted noise, times outside the process; a step that is not
            asked where no signal is left, at another time than its state's, or that wants a
            covariance.
    """

    name: str
    process: NoiseProcess
    times: np.ndarray
    scale: np.ndarray
    weights: np.ndarray = field(repr=False)
    noise: np.ndarray
    anchors: np.ndarray | None = None
    output: Output = "epsilon"
    current: np.ndarray | None = None
    clipped: np.ndarray | None = None
    covariance: np.ndarray | None = None
    cap: np.ndarray | None = None
    asked: np.ndarray | None = None
    asked_times: np.ndarray | None = None

    sparse_weights: SparseRows = field(init=False, repr=False)
    _rows: tuple[Row, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_value("process", self.process, NoiseProcess)
        steps = len(self.scale)
        if steps < 1:
            raise ValueError("A tableau needs at least one step.")
        anchors = np.arange(steps) if self.anchors is None else np.asarray(self.anchors)
        if not np.issubdtype(anchors.dtype, np.integer):
            raise ValueError("Tableau.anchors must be whole numbers, the indices of states.")
        self._keep("anchors", read_only(anchors, np.int64))
        for name, default in DEFAULTS.items():
            if getattr(self, name) is None:
                self._keep(name, np.full(steps, default))
        asked = np.asarray(self.asked)
        if asked.dtype != np.bool_:
            raise ValueError("Tableau.asked must be true or false, one for each step.")
        self._keep("asked", read_only(asked, np.bool_))
        for name in ("times", "scale", "noise", *DEFAULTS):
            if name != "asked":
                self._keep(name, read_only(getattr(self, name), np.float64))
        # `__getattr__` lays the matrix out again for whoever asks for it.
        self._keep("sparse_weights", _sparse(self.__dict__.pop("weights"), steps))
        check_arrays(
            {name: getattr(self, name) for name in ARRAYS}, self.sparse_weights, self.output
        )
        check_times(self.times, self.process)
        if self.asked_times is not None:
            told = read_only(self.asked_times, np.float64)
            check_asked_times(told, self.times, self.process)
            self._keep("asked_times", None if np.array_equal(told, self.times[:-1]) else told)
        check_asked(self._optional("asked"), self.times, self.evaluation_times, self.process)
        self._keep("_rows", tuple(self._make_rows()))

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # for a type checker `weights` is an attribute, and no other is made up

        def __getattr__(self, name: str) -> np.ndarray:
            """Lay `weights` out, which is not stored until then."""
            if name != "weights" or "sparse_weights" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._keep("weights", self.sparse_weights.matrix())
            return self.__dict__["weights"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tableau:
        """Return itself: NumPy's copies of read-only arrays could be written to."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it from its fields when it is unpickled, for the same reason."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return _rebuild, ({**fields, "weights": self.sparse_weights.pairs()},)

    def is_default(self, name: str) -> bool:
        """Tell whether an optional field holds what it does when it is not given."""
        if name == "asked_times":
            return self.asked_times is None
        default = np.arange(self.steps) if name == "anchors" else DEFAULTS[name]
        return bool((self._optional(name) == default).all())

    def replace(self, **changes: Any) -> Tableau:
        """Return the table with other values in some of its fields, as `dataclasses.replace`."""
        return dataclasses.replace(self, **{"weights": self.sparse_weights, **changes})

    def _make_rows(self) -> Iterator[Row]:
        """Yield the rows as plain numbers, which the loop reads faster than arrays."""
        noise = np.where(self._optional("covariance") != 0, self.noise, self.base_std)
        columns = (
            self.evaluation_times,
            self._optional("anchors"),
            self.scale,
            self._optional("current"),
            noise,
            *(self._optional(name) for name in ("clipped", "covariance", "cap", "asked")),
        )
        plain = zip(self.sparse_weights.pairs(), *(c.tolist() for c in columns), strict=True)
        for weights, time, anchor, scale, current, std, *others in plain:
            yield Row(time, anchor, scale, current, weights, std, *others)

    @property
    def steps(self) -> int:
        """Number of steps K; each costs one network evaluation, unless it is not asked."""
        return len(self.scale)

    @property
    def evaluation_times(self) -> np.ndarray:
        """(K,) the times that the denoiser is told about the states z_0 .. z_{K-1}."""
        return self.times[:-1] if self.asked_times is None else self.asked_times

    @property
    def nfe(self) -> int:
        """Network evaluations a sample costs: the steps that are asked."""
        return int(self._optional("asked").sum())

    def prior_sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw the noise (N, *shape) that sampling starts from, as at the table's first time.

        Its standard deviation is 1 on a variance-preserving process, sigma(times[0]) on `VE`. Warns
        of a first or a last time that makes the samples wrong (`envs.schedules.ends`).
        """
        first, last = float(self.times[0]), float(self.times[-1])
        warn_of_ends(self.process, first, last)
        return self.process.prior_sample(shape, generator, t=first, device=device, dtype=dtype)

    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        *,
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
        transition: Transition | None = None,
    ) -> Tensor:
        """Run the sampler from prior samples.

        Args:
            denoiser: the network.
            noise: (N, *shape), the initial states z_0, such as `prior_sample` draws.
            generator: source of the fresh noise of stochastic steps.
            return_trajectory: return every state.
            transition: see `states`.

        Returns:
            The finished samples (N, *shape), or all states (K + 1, N, *shape), z_0 first.

        Gradients flow to the denoiser and the noise unless the caller is under `torch.no_grad()`.
        """
        states = self.states(denoiser, noise, generator, transition)
        return torch.stack(list(states)) if return_trajectory else deque(states, maxlen=1).pop()

    def states(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        generator: torch.Generator | None = None,
        transition: Transition | None = None,
    ) -> Iterator[Tensor]:
        """Yield z_0 = `noise`, z_1, ..., z_K (N, *shape) one by one; see `sample`.

        An environment's transition turns z_j and what the table makes of it into z_{j+1}; without
        one, what the table makes of it is z_{j+1}. What no later step reads is dropped, so memory
        does not grow with K.
        """
        self.check_process(denoiser)
        states: list[Any] = [noise]
        outputs: list[Any] = []
        unread_states, unread_outputs = self.unread
        yield noise
        for j in range(self.steps):
            output, std = self.evaluate_with_std(denoiser, states[j], j)
            outputs.append(output)
            moved = self.advance(j, states, outputs, generator, std)
            states.append(moved if transition is None else transition(states[j], moved, j))
            for i in unread_states[j]:
                states[i] = None
            for k in unread_outputs[j]:
                outputs[k] = None
            yield states[-1]

    def check_process(self, denoiser: Denoiser) -> None:
        """Raise ValueError for a denoiser of another noise process: its times mean other levels."""
        if denoiser.process != self.process:
            raise ValueError(
                f"'{self.name}' is made for {self.process!r}, the denoiser for "
                f"{denoiser.process!r}."
            )

    def evaluate(
        self, denoiser: Denoiser, state: Tensor, j: int, t: Tensor | None = None
    ) -> Tensor:
        """Return O_j, the denoiser's output at state z_j (N, *shape), or the guess of it.

        The time t () of the row may be given as a tensor that requires a gradient; it gets one.
        """
        row = self._rows[j]
        time = row.time if t is None else t
        if row.asked:
            return self.output_at(denoiser, state, time)
        return guessed_output(self.process, self.output, state, time)

    def evaluate_with_std(
        self, denoiser: Denoiser, state: Tensor, j: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return O_j (N, *shape), and s_j(z_j) where it depends on the state, else None.

        Both come from one network call. s_j(z_j) broadcasts against the state.

        Raises:
            ValueError: the step wants a covariance, and the denoiser has no second head.
        """
        row = self._rows[j]
        if not row.covariance:
            return self.evaluate(denoiser, state, j), None
        output, covariance = denoiser.outputs_with_covariance(state, row.time, self.output)
        return output, std_of(covariance, row.noise, row.covariance, row.cap)

    def output_at(self, denoiser: Denoiser, state: Tensor, t: float | Tensor) -> Tensor:
        """Return what the denoiser says of a state (N, *shape) at time t, in this table's output.

        A tensor t () that requires a gradient gets one.
        """
        ask = denoiser.epsilon if self.output == "epsilon" else denoiser.denoised
        return ask(state, t)

    def row(self, j: int) -> Row:
        """Return row j as plain numbers."""
        return self._rows[j]

    def advance(
        self,
        j: int,
        states: Sequence[Tensor] | Mapping[int, Tensor],
        outputs: Sequence[Tensor] | Mapping[int, Tensor],
        generator: torch.Generator | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Return z_{j+1} (N, *shape) from states z_0 .. z_j and outputs O_0 .. O_j.

        A step whose standard deviation depends on the state takes it as `std`, from
        `evaluate_with_std`; without, ValueError.
        """
        row = self._rows[j]
        state = self.carried(j, states)
        for k, weight in row.weights:
            state = torch.add(state, outputs[k], alpha=weight)
        if row.clipped:
            state = torch.add(state, outputs[j].clamp(-1, 1), alpha=row.clipped)
        if row.covariance:
            if std is None:
                raise ValueError(
                    f"Step {j} of '{self.name}' adds noise of a standard deviation that depends on "
                    "the state: get it from evaluate_with_std."
                )
            state = torch.addcmul(state, std, torch.empty_like(state).normal_(generator=generator))
        elif row.noise > 0:
            fresh = torch.empty_like(state).normal_(generator=generator)
            state = torch.add(state, fresh, alpha=row.noise)
        return state

    def carried(self, j: int, states: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """Return what step j takes over of the states, p_j z_{a(j)} + q_j z_j (N, *shape)."""
        row = self._rows[j]
        state = row.scale * states[row.anchor]
        if row.current:
            state = torch.add(state, states[j], alpha=row.current)
        return state

    def anchor(self, j: int) -> int:
        """Return a(j), the state that step j starts from."""
        return int(self._optional("anchors")[j])

    @property
    def one_step(self) -> bool:
        """Whether every step reads its own state and output only: a sampler without memory."""
        anchored = (self._optional("anchors") != np.arange(self.steps)).any()
        weights = self.sparse_weights
        return not anchored and bool((weights.columns == weights.rows).all())

    @property
    def linear(self) -> bool:
        """Whether it adds no noise and clamps nothing: what solver distillation takes."""
        random = self.base_std.any() or self._optional("covariance").any()
        return not random and not self._optional("clipped").any()

    @property
    def base_std(self) -> np.ndarray:
        """(K,) the standard deviation of each step's noise where Cov0 adds nothing."""
        return np.minimum(self.noise, self._optional("cap"))

    def _optional(self, name: str) -> np.ndarray:
        """Return a field that the constructor may be given as None."""
        value = getattr(self, name)
        assert value is not None  # __post_init__ saw to it
        return value

    @cached_property
    def unread(self) -> tuple[list[list[int]], list[list[int]]]:
        """The states z_i, and the outputs O_k, that no step after the j-th reads: two lists by j.

        Each is named once, at the last step that reads it, so that a loop can free it there.
        """
        steps = np.arange(self.steps)
        last_state = steps.copy()
        np.maximum.at(last_state, self._optional("anchors"), steps)
        last_output = steps.copy()
        np.maximum.at(last_output, self.sparse_weights.columns, self.sparse_weights.rows)
        unread: tuple[list[list[int]], list[list[int]]] = ([[] for _ in steps], [[] for _ in steps])
        for lists, last in zip(unread, (last_state, last_output), strict=True):
            for index, j in enumerate(last.tolist()):
                lists[j].append(index)
        return unread

    def to_json(self, **extra: Any) -> str:
        """Return the table as human-readable JSON that any program can run.

        Args:
            extra: further entries, JSON values; readers of the table ignore them.
        """
        arrays: dict[str, Any] = {
            "times": self.times.tolist(),
            "scale": self.scale.tolist(),
            "weights": self.sparse_weights.pairs(),
            "noise": self.noise.tolist(),
        }
        for name in OPTIONAL:
            if not self.is_default(name):
                arrays[name] = getattr(self, name).tolist()
        return write_table(self.name, self.output, self.process, arrays, extra)

    @classmethod
    def from_json(cls, text: str) -> Tableau:
        """Read and validate the JSON of `to_json`.

        Raises:
            ValueError: not JSON, not a tableau, a newer version, or an invalid table.
        """
        return read_table(text, cls)

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path`, atomically."""
        write_atomically(path, lambda temporary: temporary.write_text(self.to_json()))

    @classmethod
    def load(cls, path: str | Path) -> Tableau:
        """Read a table that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a tableau, a newer version, or an invalid table; it names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No tableau at {path}.")
        with damage_named(path):
            return cls.from_json(read_text(path))


# A standard deviation of zero has no gradient; this one is as good as none.
_LEAST_VARIANCE = 1e-30


def _sparse(weights: Any, steps: int) -> SparseRows:
    """Return the weights that the constructor was given as sparse rows."""
    if not isinstance(weights, SparseRows):
        matrix = np.asarray(weights, dtype=np.float64)
        if matrix.shape == (steps, steps):
            return SparseRows.from_matrix(matrix)
        weights = matrix
    if weights.shape != (steps, steps):
        raise ValueError(f"Tableau.weights has shape {weights.shape}, expected {(steps, steps)}.")
    return weights


def _rebuild(fields: dict[str, Any]) -> Tableau:
    """Build the tableau that `__reduce__` took apart."""
    return Tableau(**{**fields, "weights": SparseRows.from_pairs(fields["weights"])})


def std_of(
    covariance: Tensor, noise: float | Tensor, weight: float | Tensor, cap: float | Tensor
) -> Tensor:
    """Return min(sqrt(noise^2 + weight Cov0), cap), shaped like Cov0 (MATH.md 1.11).

    Args:
        covariance: Cov0 >= 0, (N, *shape) or anything that broadcasts against it.
        noise: standard deviation without it, >= 0; a number, or (N, 1, ...).
        weight: >= 0, likewise.
        cap: >= 0, likewise.
    """
    std = (noise**2 + weight * covariance).clamp_min(_LEAST_VARIANCE).sqrt()
    return torch.clamp(std, max=cap)
