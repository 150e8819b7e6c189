"""The flags behind what a message of the library speaks of: the library does not know them."""

from __future__ import annotations

import re

# What a message says, and the flag that sets it.
FLAGS = {
    "batch_size": "--batch-size",
    "body_options": "--body NAME --body-options",
    "buffer='cpu'": "--buffer cpu",
    "data_dir": "--data-dir",
    "download=True": "--download",
    "gradient_checkpointing": "--gradient-checkpointing",
    "image_size": "--image-size",
    "kind='gamma'": "--agent variance --kind gamma",
    "kind='npr'": "--agent variance --kind npr",
    "kind='sn'": "--agent variance --kind sn",
    "kind='step'": "--schedule-options kind step",
    "last_std=0.001": "--solver ancestral --solver-options last_std 0.001",
    "use an earlier one": "in a run folder delete it: --resume then goes on from the stage before",
    "micro_batch_size": "--micro-batch-size, in the first stage --pretrain.micro-batch-size",
}


def with_flags(message: str) -> str:
    """Return a message with the flags of what it names, if it does not name them itself."""
    named = [
        flag
        for words, flag in FLAGS.items()
        if re.search(rf"(?<![\w.]){re.escape(words)}(?!\w)", message) and flag not in message
    ]
    return f"{message} ({'; '.join(named)})" if named else message
