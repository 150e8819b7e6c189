"""The studies that `fewstep benchmark` runs: one engine, and declarations by kind of question."""

from . import agents, rl_tools, schedules, solvers
from .engine import Study

STUDIES: dict[str, Study] = {
    **agents.STUDIES,
    **solvers.STUDIES,
    **schedules.STUDIES,
    **rl_tools.STUDIES,
}
