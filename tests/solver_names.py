"""The solvers by what they do, for tests that go through all of them."""

from __future__ import annotations

from fewstep.agents.solvers import SOLVERS, make_solver
from fewstep.envs import RectifiedFlow, Schedule

# A straight path, which `flow-sde` needs, with some signal and some noise at both ends.
_SCHEDULE = Schedule(RectifiedFlow(), [0.9, 0.7, 0.5, 0.3, 0.1])

# Those that want nothing of the denoiser but its outputs.
ALONE = [name for name, solver in SOLVERS.items() if solver.needs is None]
# Those of them that add no noise by default, and those that do.
ODE_SOLVERS = [name for name in ALONE if make_solver(name, _SCHEDULE).linear]
STOCHASTIC = [name for name in ALONE if name not in ODE_SOLVERS]
