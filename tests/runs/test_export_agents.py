"""What any agent trains leaves as a pipeline that a fresh process opens, to the same samples.

That process imports diffusers, and of fewstep the scheduler's file alone.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fewstep.agents import Denoiser, Tableau

SMALL = ["--env=Digits", "--steps=4", "--evaluations=0", "--evaluation-samples=20"]
FINE_TUNED = ["--rounds=2", "--batch-size=4", "--n-critic=1", "--critic.width=8"]
DISTILLED = ["--rounds=2", "--batch-size=4", "--held-out.size=4", "--fine.scale=2"]
SOLVER = ["--batch-size=4", "--batches=1", "--scale=2"]
AGENTS = {
    "sft": FINE_TUNED,
    "sft-v": FINE_TUNED,
    "sft-pg": [*FINE_TUNED, "--n-generator=1", "--minibatch-size=6"],
    "dode": [*SOLVER, "--solver=ipndm"],
    "schedule": [*SOLVER, "--solver=dpm-solver++-2m", "--schedule-rounds=2", "--tuning.rounds=1"],
    "solver": [*SOLVER, "--descent.rounds=2", "--solver=unipc-2"],
    "rdpo": ["--batch-size=8", "--held-out=8", "--rounds=2", "--solver=ddim"],
    "sfd": [*DISTILLED, "--solver=dpm-solver++-2m"],
    "pd": [*DISTILLED, "--teacher-steps=8"],
    "cd": DISTILLED,
    "dmd": [*DISTILLED, "--n-fake=1"],
    # A learned table, and the network that was trained for it.
    "sft_after_solver": FINE_TUNED,
}
FRESH = """
import sys
import numpy as np, torch
from diffusers import DDPMPipeline
import fewstep.agents.pretrained.scheduler

def samples(folder):
    pipeline = DDPMPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    pipeline.scheduler.set_timesteps(4)
    sample = torch.from_numpy(np.load("noise.npy"))
    for t in pipeline.scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(sample, t).sample
        sample = pipeline.scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample.numpy()

np.savez("samples.npz", **{name: samples(name) for name in sys.argv[1:]})
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fresh_process_draws_the_samples_of_every_agent(fewstep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fewstep("pretrain", *SMALL, "--body=unet-tiny", "--rounds=1", "--log-dir=first") == 0
    (first,) = (tmp_path / "first").iterdir()
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save("noise.npy", noise.numpy())
    expected = {}
    for name, flags in AGENTS.items():
        agent, _, before = name.partition("_after_")
        start = f"--denoiser={first}"
        if before:
            (earlier,) = (tmp_path / "runs" / before).iterdir()
            start = f"--start-from={earlier}"
        told = [f"--agent={agent}", start, f"--log-dir=runs/{name}", *flags]
        assert fewstep("train", *SMALL, *told) == 0, name
        (run,) = (tmp_path / "runs" / name).iterdir()
        assert fewstep("export", run, name) == 0
        (file,) = run.glob("checkpoint.safetensors") if name != "dode" else [None]
        denoiser = Denoiser.load(first / "denoiser.safetensors" if file is None else file)
        table = Tableau.load(run / "tableau.json")
        with torch.no_grad():
            expected[name] = table.sample(
                denoiser, noise, generator=torch.Generator().manual_seed(1)
            ).numpy()
    subprocess.run([sys.executable, "-c", FRESH, *AGENTS], check=True, capture_output=True)
    found = np.load("samples.npz")
    for name, samples in expected.items():
        # Rounding of float32 through four steps of a small network.
        np.testing.assert_allclose(found[name], samples, rtol=1e-4, atol=1e-4, err_msg=name)
