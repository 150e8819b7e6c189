"""The files that hold a denoiser: which of a run's it is, and the parts that it is rebuilt from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...common.checkpoint import CheckpointError, ForeignBodyError, load_checkpoint
from ...common.reading import reason
from ...envs.processes import NoiseProcess
from .conditioning import Conditioning
from .networks.configs import body_from_config, built_for
from .parameterisations import Parameterisation, make_parameterisation
from .parameterisations.rescaled import Rescaled
from .variance_head import VarianceHead

# The files of a run folder that hold a denoiser, the newest stage first.
STAGES = ("checkpoint.safetensors", "denoiser.safetensors")


class Parts(NamedTuple):
    """What a `Denoiser` is made of; see there."""

    body: nn.Module
    parameterisation: Parameterisation
    clip: bool
    variance: Any
    conditioning: Conditioning | None
    gamma: Tensor | None
    head: VarianceHead | None


def find_tree(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the tree of a file, or of a run folder's newest file.

    Returns:
        The file, and its contents.

    Raises:
        CheckpointError: a missing, corrupt or foreign file.
    """
    path = _file_of(Path(path))
    return path, load_checkpoint(path)


def parts_of(tree: dict[str, Any], path: Path, body: nn.Module | None = None) -> Parts:
    """Rebuild the parts of a denoiser from its tree, or from the tree of the agent it is in.

    Args:
        tree: see `Denoiser.to_tree`.
        path: what the messages name.
        body: needed only for a network that is not one of `fewstep.agents.denoisers.networks`.

    Raises:
        CheckpointError: no denoiser, or weights that do not fit the body; `ForeignBodyError` where
            `body` is needed.
    """
    tree = tree.get("denoiser", tree)
    if "body" not in tree or "prediction" not in tree:
        raise CheckpointError(f"{path} holds no denoiser.")
    if body is None:
        if tree["body"] is None:
            raise ForeignBodyError(f"{path} holds a foreign body: pass it as body=...")
        body = body_from_config(tree["body"], tree["weights"])
    head = None
    saved: Any = tree.get("head")
    if saved is not None:
        head = built_for(saved["weights"], VarianceHead, saved["config"])
    try:
        body.load_state_dict(tree["weights"])
        if head is not None:
            head.load_state_dict(saved["weights"])
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path} do not fit the body: {reason(error)}"
        ) from None
    # Older files say nothing of the entries that are looked up with `get`.
    gamma = tree.get("gamma")
    return Parts(
        body,
        _parameterisation_of(tree),
        tree.get("clip", False),
        tree.get("variance"),
        None if tree.get("given") is None else Conditioning.from_config(tree["given"]),
        None if gamma is None else torch.tensor(gamma, dtype=torch.float64),
        head,
    )


def _parameterisation_of(tree: dict[str, Any]) -> Parameterisation:
    process = NoiseProcess.from_config(tree["process"])
    network = make_parameterisation(tree["prediction"], process, tree.get("sigma_data", 0.5))
    rescaled = tree.get("rescaled")
    return network if rescaled is None else Rescaled.from_config(network, rescaled)


def _file_of(path: Path) -> Path:
    """Return the file of a run folder that holds its newest denoiser; any other path as it is."""
    if not path.is_dir():
        return path
    for name in STAGES:
        if (path / name).is_file():
            return path / name
    if (path / "model_index.json").is_file() or (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a folder without {' or '.join(STAGES)}; "
            "fewstep.agents.pretrained.from_pretrained reads those that diffusers writes."
        )
    raise CheckpointError(f"{path} is a folder without {' or '.join(STAGES)}.")
