"""The studies that `fewstep benchmark` runs: one engine, and declarations by kind of question."""

from . import agents, chains, flows, guidance, rl_tools, schedules, solvers
from .engine import Study

STUDIES: dict[str, Study] = {
    **agents.STUDIES,
    **solvers.STUDIES,
    **schedules.STUDIES,
    **guidance.STUDIES,
    **flows.STUDIES,
    **rl_tools.STUDIES,
    **chains.STUDIES,
}
