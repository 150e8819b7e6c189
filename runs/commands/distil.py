"""`fewstep distil PIPELINE`: learn a scheduler of few steps for a pipeline of diffusers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ...agents.pipelines.learning import starting_schedule, usual_guidance
from ...agents.pipelines.open import DTYPES, OpenedPipeline, open_pipeline
from ...agents.pipelines.plan import Plan, timed
from ...agents.pipelines.prompts import Prompts, read_prompts, split_prompts
from ..reports.console import console
from ..run.distilling import DistilRun
from ..run.folder import check_output_folder
from ..run.run import InterruptedRun
from ..settings.distil import DistilFlags
from ..settings.flags import parse_flags
from ..settings.train import resolve_device


def main(argv: Sequence[str]) -> None:
    """Run `fewstep distil` with these flags."""
    flags = parse_flags(DistilFlags, argv, prog="fewstep distil")
    run = prepared(flags)
    plan = run.plan()
    if flags.dry_run:
        _print_plan(run, plan)
        return
    console.print(f"{plan.total:,} evaluations of the network; results go to {flags.output}")
    try:
        run.carry_through(plan)
    except InterruptedRun:
        console.out("\nSaved. The same command goes on.")
        raise SystemExit(130) from None
    folder = flags.output / "scheduler"
    console.out(f"Scheduler, pictures and results.json: {flags.output}")
    console.out("from fewstep.agents.pretrained.scheduler import TableauScheduler")
    console.out(f"pipe.scheduler = TableauScheduler.from_pretrained({shlex.quote(str(folder))!r})")


def prepared(flags: DistilFlags) -> DistilRun:
    """Open the pipeline, encode the prompts, and build what learns: nothing is written yet."""
    check_output_folder(flags.output)
    files = {name: getattr(flags, name) for name in ("prompts", "held_out")}
    texts = {name: read_prompts(path) for name, path in files.items() if path is not None}
    device = resolve_device(flags.device)
    settings = flags.learning
    opened = open_pipeline(
        flags.pipeline,
        device=device,
        dtype=None if flags.dtype is None else DTYPES[flags.dtype],
        size=flags.size,
        variant=flags.variant,
        revision=flags.revision,
        download=flags.download,
    )
    prompts = _prompts(opened, texts, settings.seed)
    guidance = usual_guidance(opened.family) if settings.guidance is None else settings.guidance
    family = opened.family
    if settings.guidance is not None and not (family.splits or family.embeds_guidance):
        raise ValueError(f"A {type(opened.pipeline).__name__} knows no guidance: leave it out.")
    if flags.negative and not family.splits:
        raise ValueError(
            f"A {type(opened.pipeline).__name__} is asked once, under its prompt alone, and has no "
            "negative prompt: leave it out."
        )
    family.guidance = guidance
    denoiser = opened.denoiser(
        None if prompts is None else prompts.all,
        negative=flags.negative,
        micro_batch=settings.micro_batch,
    )
    opened.park_encoders()
    if family.splits:
        denoiser = denoiser.given(guidance=guidance)
    return DistilRun(opened, denoiser, starting_schedule(opened, settings), prompts, flags)


def _prompts(opened: OpenedPipeline, texts: dict[str, list[str]], seed: int) -> Prompts | None:
    """Return the prompts to learn from, and held-out ones.

    Raises:
        ValueError: prompts for an unconditional network.
    """
    kind = opened.family.prompts
    if kind is None:
        if texts:
            raise ValueError(
                f"A {type(opened.pipeline).__name__} takes no prompts: leave them out."
            )
        return None
    empty = [""] if kind == "texts" else ["0"]
    return split_prompts(texts.get("prompts", empty), texts.get("held_out"), seed)


def _print_plan(run: DistilRun, plan: Plan) -> None:
    """Say how many evaluations there will be and, from a timed call, how long they take."""
    console.print(
        f"{plan.total:,} evaluations of the network for single samples, {plan.graph:,} of them "
        "with a gradient; a guided answer counts as two."
    )
    denoiser = run.denoiser.given(0) if run.denoiser.is_open else run.denoiser
    plain, graph = timed(denoiser, with_graph=plan.graph > 0)
    also = f", {graph:.3g} s with a gradient" if graph else ""
    console.print(
        f"One takes {plain:.3g} s{also}, in calls of {run.flags.learning.micro_batch}: "
        f"{_duration(plan.seconds(plain, graph))} in all."
    )


def _duration(seconds: float) -> str:
    """Write a time as a person says it."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
