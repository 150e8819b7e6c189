"""`fewstep train` and `fewstep pretrain`: clone a denoiser, train an agent, show what it gained."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from ...common.files import remove_leftovers
from ..reports.console import console
from ..run.building import check
from ..run.folder import RunFolder
from ..run.joining import agreed_path, is_lost_peer, joined_processes
from ..run.run import InterruptedRun, Run
from ..settings.train import (
    parse,
    resumed_folder,
    resumed_settings,
)


def main(argv: Sequence[str], agent: str | None = None) -> None:
    """Run `fewstep train` (or `fewstep pretrain`, which fixes the agent) with these flags."""
    with joined_processes() as processes:
        mdp, resume = None, resumed_folder(argv)
        if resume is not None:
            folder = RunFolder.reopen(resume[0])
            settings = resumed_settings(*resume)
            if processes.first:
                remove_leftovers(folder.path)
        else:
            settings = parse(argv, agent)
            mdp = check(settings)
            made = RunFolder.create(settings).path if processes.first else None
            folder = RunFolder(agreed_path(made, processes))
        try:
            Run(settings, folder, mdp).carry_through()
        except InterruptedRun:
            path = shlex.quote(str(folder.path))
            console.out(f"\nSaved. Go on with:  fewstep train --resume {path}")
            raise SystemExit(130) from None
        except KeyboardInterrupt:
            if processes.first:
                path, config = (
                    shlex.quote(str(place)) for place in (folder.path, folder.path / "config.json")
                )
                console.out(
                    f"\nGo on from the last checkpoint:  fewstep train --resume {path}"
                    if folder.can_resume
                    else f"\nNo checkpoint yet; start anew:  fewstep train --config {config}"
                )
            raise
        except Exception as error:
            # Bad settings all processes refuse alike; what happens now may be this one's alone.
            if not processes.first and not (
                isinstance(error, RuntimeError) and is_lost_peer(error)
            ):
                print(f"fewstep: process {processes.rank}: {error}", file=sys.stderr)
            raise
