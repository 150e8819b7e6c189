"""Flags: parsed by tyro, with errors of one sentence, and named behind the library's messages."""

from __future__ import annotations

import argparse
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
    "critic_network='own'": "--critic.network own",
    "data_dir": "--data-dir",
    "download=True": "--download",
    "gradient_checkpointing": "--policy.gradient-checkpointing",
    "image_size": "--image-size",
    "kind='gamma'": "--agent variance --kind gamma",
    "kind='npr'": "--agent variance --kind npr",
    "kind='sn'": "--agent variance --kind sn",
    "kind='step'": "--schedule-options kind step",
    "last_std=0.001": "--solver ancestral --solver-options last_std 0.001",
    "learn.shifts=False": "--learn.no-shifts",
    "learn.times=False": "--learn.no-times",
    "use an earlier one": "in a run folder delete it: --resume then goes on from the stage before",
    "pass classes": "--classes",
    "micro_batch_size": "--execution.micro-batch-size, in the first stage "
    "--pretrain.execution.micro-batch-size",
}


# Flags that take an empty text: an empty prompt.
MAY_BE_EMPTY = ("--negative", "--condition")
# What tyro calls a kind of value, after "None" or not, and what it is.
KINDS = (
    (r"\{?INT INT", "two whole numbers"),
    (r"\{?FLOAT FLOAT", "two numbers"),
    (r"\{?\[INT", "whole numbers"),
    (r"\{?\[FLOAT", "numbers"),
    (r"\{?\[STR", "KEY VALUE pairs"),
    (r"INT", "a whole number"),
    (r"FLOAT", "a number"),
)


def with_flags(message: str) -> str:
    """Return a library's message with the flags of what it names, if it does not name them."""
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

    check_empty(argv)
    with redirect_stderr(io.StringIO()) as said:
        try:
            return tyro.cli(kind, args=list(argv), prog=prog, **options)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
        except ValueError as error:  # of settings that stand in no group
            raise ValueError(_with_flag("", str(error))) from None
    sentence = one_sentence(said.getvalue(), argv)
    if unknown := re.fullmatch(r"Unknown flag --([\w-]+)\.", sentence):
        meant = [flag for flag in _flags(kind, options) if flag.endswith(f".{unknown[1]}")]
        if meant:
            sentence = f"{sentence[:-1]}; did you mean {' or '.join(meant)}?"
    raise ValueError(sentence)


def read_early(argv: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags on which those of the others depend; return them, and all other words.

    What lacks its value is None here, and refused where all flags are read.

    Raises:
        ValueError: an empty value.
    """
    check_empty(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        first.add_argument(f"--{name}", nargs="?")
    words = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    return first.parse_known_args(words)


def check_empty(argv: Sequence[str]) -> None:
    """Raise ValueError for a flag whose value is empty, which would count as left out."""
    for before, word in zip(("", *argv), argv, strict=False):
        flag, equals, value = word.partition("=") if word else (before, "=", "")
        empty = equals and not value and re.fullmatch(r"--[\w.-]+", flag)
        if empty and flag not in MAY_BE_EMPTY:
            raise ValueError(f"{flag} is empty: give it a value, or leave it out.")


def _flags(kind: Callable[..., Any], options: Mapping[str, Any]) -> list[str]:
    """Return the flags there are, as their help lists them."""
    import tyro

    with redirect_stdout(io.StringIO()) as help_text, suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **options)
    return re.findall(r"^[\W]*(--[a-z][\w.-]*)", help_text.getvalue(), flags=re.M)


def one_sentence(box: str, argv: Sequence[str] = ()) -> str:
    """Return what a box of tyro says, in one sentence.

    Under its title the box has a message, and after rules of dashes what may be meant, and help.

    Args:
        box: what tyro printed.
        argv: the flags, whose values tyro may not quote as they were written.
    """
    lines = [line.strip("│|╭╮╰╯─+ ") for line in box.strip().splitlines()[1:]]
    blocks = [" ".join(block.split()) for block in re.split(r"^-*$", "\n".join(lines), flags=re.M)]
    text, *hints = [block for block in blocks if block] or ["The flags cannot be read."]
    if wrong := re.match(r"Error parsing ([\w.]+): (.*)", text):
        return _with_flag(re.sub(r"^(?:run|agent)\b\.?", "", wrong[1]), wrong[2])
    if lacks := re.match(r"Missing from ([\w ]+): \w+ (.*) \(required\)", text):
        return f"{lacks[1]} needs an argument: {lacks[2]}"
    if wanted := _wanted(text, hints):
        return _must_be(*wanted, argv)
    if not text.startswith("Unrecognized options"):
        return text.removeprefix("Error parsing ")
    unknown = [word for word in re.findall(r"[^\s,=]+", text) if word.startswith("-")]
    if not unknown:
        return _unwanted(text.removeprefix("Unrecognized options: "), argv)
    text = f"Unknown flag {', '.join(unknown)}"
    meant = re.findall(r"(?:^| )(--[a-z][\w.-]*)", " ".join(hints[:1]).replace("--help", ""))
    meant = [flag for flag in meant if flag not in unknown]  # of several, a title names each
    return f"{text}; did you mean {' or '.join(meant)}?" if meant else f"{text}."


def _wanted(text: str, hints: Sequence[str]) -> tuple[str, str] | None:
    """Return the flag whose value is not what it takes, and what that is; None of other errors."""
    if choice := re.match(r"invalid choice .* argument '(\S+)'. Expected one of \((.*)\)", text):
        *choices, last = sorted(word for word in re.findall("'(.*?)'", choice[2]) if word != "None")
        return choice[1], f"{', '.join(choices)} or {last}" if choices else last
    if missing := re.match(r"Missing value for argument '(\S+)'. Expected (\S+)", text):
        count = missing[2]
        return missing[1], "a value" if count in ("1", "at") else f"{count} values"
    if wrong := re.match(r"Error parsing (--\S+): ", text):
        described = " ".join(block for block in hints if block.startswith("Argument helptext"))
        for kind, words in KINDS:
            if re.match(rf"Argument helptext: --\S+ (?:\{{None\}}\|)?{kind}\b", described):
                return wrong[1], words
    return None


def _must_be(flags: str, what: str, argv: Sequence[str]) -> str:
    """Say what a flag takes, and what it got."""
    flag, values = flags, []
    for place, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name.replace("_", "-") in flags.split("/"):
            rest = argv[place + 1 :]
            end = next((i for i, w in enumerate(rest) if re.match("-[^0-9.]", w)), len(rest))
            flag, values = name, [*([value] if value else []), *rest[:end]]
    got = f", got '{' '.join(values)}'" if values else ""
    return f"{flag} must be {what}{got}." if values else f"{flag} needs {what}."


def _unwanted(word: str, argv: Sequence[str]) -> str:
    """Say of a word that is no flag why it cannot be there."""
    for before, given in zip(("", *argv), argv, strict=False):
        flag = before if given == word else given.removesuffix(f"={word}")
        if flag.startswith("--") and (given == word or flag != given):
            return f"{flag} takes no value, got '{word}'."
    return f"'{word}' belongs to no flag: leave it out."


def _with_flag(group: str, message: str) -> str:
    """Write the name of a setting, with which a message begins, as its flag."""
    prefix = f"{group}." if group else ""
    return re.sub(
        r"^(\w+)(?= must be)", lambda name: f"--{prefix}{name[1].replace('_', '-')}", message
    )
