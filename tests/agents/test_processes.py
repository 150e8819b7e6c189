"""Two processes do what one does with batches twice as large: real ones, over gloo, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.common.distributed import Processes

SCRIPT = Path(__file__).with_name("two_processes.py")
PG = {"batch_size": 32, "n_critic": 3, "n_generator": 2, "minibatch_size": 64}
CASES = {
    "behaviour cloning, gradients accumulated": {
        "agent": "cloning",
        "settings": {"batch_size": 32, "micro_batch_size": 5, "learning_rate": 1.0},
    },
    "SFT-PG (B), ratio clip, micro-batches": {
        "agent": "sft-pg",
        "settings": {**PG, "clip_range": 0.2, "micro_batch_size": 7, "learning_rate": 1.0},
    },
    "SFT-PG, a reward that learns from the samples": {
        "agent": "sft-pg",
        "settings": {**PG, "learning_rate": 1.0},
        "reward": "mmd",
    },
    "SFT-PG, known pixels that all processes draw alike": {
        "agent": "sft-pg",
        "settings": {**PG, "learning_rate": 1.0},
        "inpaint": "random",
    },
    "SFT-V, a batch for each step, known pixels, even, scaled": {
        "agent": "sft-v",
        "settings": {
            "batch_size": 32,
            "n_critic": 2,
            "n_generator": 3,
            "learning_rate": 1.0,
            "even": True,
            "scaled_baseline": True,
        },
        "inpaint": "random",
    },
    "behaviour cloning of classes": {
        "agent": "cloning",
        "settings": {"batch_size": 32, "micro_batch_size": 5, "learning_rate": 1.0},
        "conditional": True,
    },
    "SFT-PG, classes and guidance": {
        "agent": "sft-pg",
        "settings": {**PG, "micro_batch_size": 7, "learning_rate": 1.0},
        "conditional": True,
        "guidance": 2.0,
    },
    "SFT-V, captions, known pixels": {
        "agent": "sft-v",
        "settings": {"batch_size": 32, "n_critic": 2, "n_generator": 3, "learning_rate": 1.0},
        "conditional": "captions",
        "inpaint": "random",
    },
    "SFD, classes, guidance absorbed, micro-batches": {
        "agent": "sfd",
        "settings": {
            "batch_size": 32,
            "size": 8,
            "learning_rate": 1.0,
            "distance": "l2",
            "absorb_guidance": True,
            "micro_batch_size": 7,
        },
        "conditional": True,
        "guidance": 2.0,
    },
    "PD, on the teacher's trajectories": {
        "agent": "pd",
        "settings": {"batch_size": 32, "size": 8, "learning_rate": 1.0, "teacher_steps": 8},
    },
    "CD, on data": {
        "agent": "cd",
        "settings": {"batch_size": 32, "size": 8, "learning_rate": 0.3, "states": "data"},
        "conditional": True,
    },
    "DMD, critic": {
        "agent": "dmd",
        "settings": {
            "batch_size": 32,
            "size": 8,
            "learning_rate": 1.0,
            "fake_learning_rate": 1.0,
            "n_fake": 2,
            "adversarial": 0.1,
            "micro_batch_size": 7,
        },
        "conditional": True,
        "guidance": 2.0,
    },
    "SFT, a learned table, micro-batches": {
        "agent": "sft",
        "settings": {
            "batch_size": 32,
            "learning_rate": 1.0,
            "gradient_steps": 2,
            "micro_batch_size": 7,
        },
        "learned": True,
    },
    "SFT, gradient penalty": {
        "agent": "sft",
        "settings": {
            "batch_size": 32,
            "regularizer": "gradient-penalty",
            "coefficient": 1.0,
            "learning_rate": 1.0,
        },
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, list[dict[str, torch.Tensor]]]:
    """The weights that every process ends with, by the number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run(
        [sys.executable, SCRIPT, folder, json.dumps(CASES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return {
        count: [load_file(folder / f"{count}-{rank}") for rank in range(count)] for count in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does_with_twice_the_batch(name, trained):
    (one,), (first, second) = trained[1], trained[2]
    keys = [key for key in one if key.startswith(f"{name}/3/")]
    for key in keys:
        assert torch.equal(first[key], second[key]), key
        moved = (one[key] - one[key.replace("/3/", "/0/")]).double().norm()
        difference = (first[key] - one[key]).double().norm()
        assert difference <= 1e-3 * moved + 1e-7, (key, float(difference), float(moved))
    assert one[f"{name}/3/timesteps"] > 0
    assert any(
        (one[key] != one[key.replace("/3/", "/0/")]).any() for key in keys if "denoiser" in key
    )


def test_shares_are_disjoint_and_together_the_whole():
    batch = torch.arange(24).view(12, 2)
    shares = [Processes(rank, 3).share(batch, groups=2) for rank in range(3)]
    assert shares[0].tolist() == batch[[0, 1, 6, 7]].tolist()
    together = torch.cat(shares).flatten().sort().values
    assert together.tolist() == list(range(24))


def test_an_agent_that_cannot_share_its_training_says_so(monkeypatch, make_mdp, make_denoiser):
    from fewstep.agents import DODE

    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 2)))
    with pytest.raises(ValueError, match="without torchrun"):
        DODE(make_mdp(), make_denoiser())
