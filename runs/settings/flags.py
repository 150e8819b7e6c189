"""Flags: parsed by tyro, with errors of one sentence, and named behind the library's messages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TypeVar

Flags = TypeVar("Flags")

# What a message says, and the flag that sets it.
FLAGS = {
    "batch_size": "--batch-size",
    "body_options": "--body NAME --body-options",
    "buffer='cpu'": "--execution.buffer cpu",
    "critic_network='own'": "--critic.network own, or --preset small-critic",
    "data_dir": "--data-dir",
    "download=True": "--download",
    "gradient_checkpointing": "--policy.gradient-checkpointing",
    "image_size": "--image-size",
    "kind='gamma'": "--agent variance --kind gamma",
    "kind='npr'": "--agent variance --kind npr",
    "kind='sn'": "--agent variance --kind sn",
    "kind='step'": "--schedule-options kind step",
    "last_std=0.001": "--solver ancestral --solver-options last_std 0.001",
    "use an earlier one": "in a run folder delete it: --resume then goes on from the stage before",
    "pass classes": "--classes",
    "micro_batch_size": "--execution.micro-batch-size, in the first stage "
    "--pretrain.execution.micro-batch-size",
}


def with_flags(message: str) -> str:
    """Return a message with the flags of what it names, if it does not name them itself."""
    named = [
        flag
        for words, flag in FLAGS.items()
        if re.search(rf"(?<![\w.]){re.escape(words)}(?!\w)", message) and flag not in message
    ]
    return f"{message} ({'; '.join(named)})" if named else message


def parse_flags(
    kind: Callable[..., Flags], argv: Sequence[str], prog: str, **options: Any
) -> Flags:
    """Read flags as `tyro.cli` does, whose boxes become one sentence.

    Args:
        kind: what the flags build, a dataclass or a function.
        argv: the flags.
        prog: the command's name, for its help.
        options: of `tyro.cli`, such as `default`.

    Raises:
        ValueError: a flag that does not exist, or a value that it does not take.
    """
    import tyro

    with redirect_stderr(io.StringIO()) as said:
        try:
            return tyro.cli(kind, args=list(argv), prog=prog, **options)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
        except ValueError as error:  # of settings that stand in no group
            raise ValueError(_with_flag("", str(error))) from None
    sentence = one_sentence(said.getvalue())
    if unknown := re.fullmatch(r"Unknown flag --([\w-]+)\.", sentence):
        meant = [flag for flag in _flags(kind, options) if flag.endswith(f".{unknown[1]}")]
        if meant:
            sentence = f"{sentence[:-1]}; did you mean {' or '.join(meant)}?"
    raise ValueError(sentence)


def _flags(kind: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return the flags there are, as their help lists them."""
    import tyro

    with redirect_stdout(io.StringIO()) as help_text, suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    return re.findall(r"^[\W]*(--[a-z][\w.-]*)", help_text.getvalue(), flags=re.M)


def one_sentence(box: str) -> str:
    """Return what a box of tyro says, in one sentence.

    Under its title the box has a message, and after rules of dashes what may be meant, and help.
    """
    lines = [line.strip("│|╭╮╰╯─+ ") for line in box.strip().splitlines()[1:]]
    blocks = [" ".join(block.split()) for block in re.split(r"^-*$", "\n".join(lines), flags=re.M)]
    text, *hints = [block for block in blocks if block] or ["The flags cannot be read."]
    if wrong := re.match(r"Error parsing ([\w.]+): (.*)", text):
        return _with_flag(re.sub(r"^(?:run|agent)\b\.?", "", wrong[1]), wrong[2])
    if not text.startswith("Unrecognized options"):
        return text.removeprefix("Error parsing ")
    unknown = [word for word in re.findall(r"[^\s,=]+", text) if word.startswith("-")]
    text = f"Unknown flag {', '.join(unknown)}" if unknown else text
    meant = re.findall(r"(?:^| )(--[a-z][\w.-]*)", " ".join(hints[:1]).replace("--help", ""))
    meant = [flag for flag in meant if flag not in unknown]  # of several, a title names each
    return f"{text}; did you mean {' or '.join(meant)}?" if meant else f"{text}."


def _with_flag(group: str, message: str) -> str:
    """Write the name of a setting, with which a message begins, as its flag."""
    prefix = f"{group}." if group else ""
    return re.sub(
        r"^(\w+)(?= must be)", lambda name: f"--{prefix}{name[1].replace('_', '-')}", message
    )
