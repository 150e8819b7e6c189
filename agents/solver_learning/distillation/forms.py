"""Forms: the few directions in which D-ODE may move each row of a solver's tableau.

Every step of a solver is `base + c * O` with O its newest (effective) output and c its factor.
D-ODE replaces O_j by O_j + lambda_j (O_j - O_{j-1}) (Kim, Tang & Yu 2024, Eq. 8; MATH.md 2.1), so
the new state moves by lambda_j along b = c (O_j - O_{j-1}), a row of weights on the raw outputs.
Other forms have other directions, or several. This one mechanism makes every variant of
MATH.md 2.4: D-DDIM, D-iPNDM, D-DEIS, D-DPM-Solver(++), D-EDM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ....common.names import unknown_name
from ...samplers.tableau import Tableau

Form = Literal["difference", "two", "sep", "all", "general", "fixed", "lookahead"]
CONSTANT = ("fixed", "lookahead")


def directions(tableau: Tableau, form: Form = "difference") -> list[np.ndarray]:
    """Return the directions of each of the K rows.

    Args:
        tableau: the base solver, deterministic.
        form: what takes the place of the newest output O_j:

            - "difference": O_j + lambda (O_j - O_{j-1}), the paper's.
            - "two": O_j + lambda_a (O_j - O_{j-1}) + lambda_b (O_j - O_{j-2}) ("D-DDIM-2").
            - "sep": lambda_a O_j + lambda_b O_{j-1}, from lambda_a = 1 ("Sep").
            - "all": free weights on all outputs so far ("All").
            - "general": O_j + sum_k lambda_k (O_j - O_k) (Eq. 9).
            - "fixed": "difference" with one lambda for all steps ("Fixed").
            - "lookahead": one lambda for all steps, and only the prediction of the clean sample is
              extrapolated, the noise stays as it is (LA-DDIM, Zhang et al. 2023).

    Returns:
        K arrays (n_j, K + 1): n_j directions, as weights on the K outputs and, in the last column,
        on the initial noise z_0. In noise prediction the first step has no earlier output and takes
        z_0 / prior_std(t_0), the noise itself, in its place; in data prediction it has none.

    Raises:
        ValueError: no such form, a stochastic tableau, or lookahead on anything but DDIM in data
            prediction.
    """
    if form not in get_args(Form):
        raise unknown_name("form", form, get_args(Form))
    if not tableau.linear:
        raise ValueError(
            f"'{tableau.name}' adds noise or clamps its predictions; D-ODE distils deterministic "
            "solvers, such as ddim, without clip."
        )
    if form == "lookahead":
        return _lookahead(tableau)
    outputs, factors = _outputs(tableau)
    first = np.zeros(tableau.steps + 1)
    if tableau.output == "epsilon":
        first[-1] = 1 / tableau.process.prior_std(float(tableau.times[0]))
    rows = []
    for j, factor in enumerate(factors):
        earlier = [first] if j == 0 else list(_earlier(tableau, outputs, j))
        rows.append(factor * _mixed(form, outputs[j], earlier))
    if tableau.output == "sample" and form not in ("sep", "all"):
        rows[0] = np.zeros((0, tableau.steps + 1))
    return rows


def distilled(
    tableau: Tableau, rows: Sequence[np.ndarray], lambdas: Sequence[np.ndarray]
) -> Tableau:
    """Move the rows of a tableau along `directions` by `lambdas`, one array (n_j,) a row."""
    weights, scale = tableau.weights.copy(), tableau.scale.copy()
    for j, (row, values) in enumerate(zip(rows, lambdas, strict=True)):
        move = np.asarray(values, dtype=np.float64) @ row
        weights[j] += move[:-1]
        # z_0 is the state of step 0, the only row that reads it this way.
        scale[j] += move[-1]
    name = tableau.name if tableau.name.startswith("d-") else f"d-{tableau.name}"
    return tableau.replace(name=name, weights=weights, scale=scale)


def _outputs(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's newest output O_j (K, K + 1) in terms of the raw ones, and its factor c_j.

    A step that starts from its own state is a linear multistep one: O_j is its whole combination
    (MATH.md 2.1). A later stage of a block is one correction: O_j is the raw output of the stage.
    """
    outputs = np.eye(tableau.steps, tableau.steps + 1)
    factors = tableau.sparse_weights.diagonal.copy()
    for j in range(tableau.steps):
        if tableau.anchor(j) == j:
            factors[j] = tableau.weights[j].sum()
            outputs[j, :-1] = tableau.weights[j] / factors[j]
    return outputs, factors


def _earlier(tableau: Tableau, outputs: np.ndarray, j: int) -> np.ndarray:
    """Return O_{j-1}, O_{j-2}, ... as step j sees them (j, K + 1).

    Among multistep steps they are the effective ones, from or to a later stage of a block raw.
    """
    raw = np.eye(tableau.steps, tableau.steps + 1)
    multistep = tableau.anchor(j) == j
    return np.array(
        [
            outputs[k] if multistep and tableau.anchor(k) == k else raw[k]
            for k in range(j - 1, -1, -1)
        ]
    )


def _mixed(form: Form, newest: np.ndarray, earlier: list[np.ndarray]) -> np.ndarray:
    """Return a form's directions for O_j = `newest`, given O_{j-1}, O_{j-2}, ... ."""
    if form == "sep":
        return np.stack([newest, earlier[0]])
    if form == "all":
        return np.stack([newest, *earlier])
    count = {"two": 2, "general": len(earlier)}.get(form, 1)
    return np.stack([newest - other for other in earlier[:count]])


def _lookahead(tableau: Tableau) -> list[np.ndarray]:
    if tableau.output != "sample" or not tableau.one_step:
        raise ValueError(
            "form='lookahead' extrapolates the clean sample of DDIM: it needs solver='euler', or "
            f"'ddim' with output='sample', not '{tableau.name}'."
        )
    rows = [np.zeros((0, tableau.steps + 1))]
    for j in range(1, tableau.steps):
        row = np.zeros((1, tableau.steps + 1))
        row[0, j] = float(tableau.process.alpha(float(tableau.times[j + 1])))
        row[0, j - 1] = -row[0, j]
        rows.append(row)
    return rows
