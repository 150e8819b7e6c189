"""A checkpoint belongs to the data it was trained on, whatever the target is called."""

import numpy as np
import pytest

from fewstep.agents import BehaviorCloning, CheckpointError
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.envs import DiffusionMDP, Schedule, Target


def test_a_checkpoint_of_other_data_of_the_same_name_is_refused(process, make_denoiser, tmp_path):
    points = np.random.default_rng(0).normal(size=(100, 2))

    def mdp(samples):
        target = Target.from_samples(samples)  # both are called "custom"
        return DiffusionMDP(target, process, Schedule.uniform(process, 4))

    path = tmp_path / "agent"
    agent = BehaviorCloning(mdp(points), make_denoiser(), batch_size=8)
    agent.learn(16).save(path)
    assert BehaviorCloning.load(path, mdp(points)).num_timesteps == 16
    complaint = "agent was trained on another environment: the training samples of its target"
    with pytest.raises(CheckpointError, match=complaint):
        BehaviorCloning.load(path, mdp(points + 1))
    tree = load_checkpoint(path)
    for damage in ([1.0, "x"], 3, None, {}):
        tree["environment"]["data"] = damage
        with pytest.raises(CheckpointError, match="another environment"):
            agent.restore(tree)
    # Files from before there were fingerprints say nothing of the data.
    del tree["environment"]["data"]
    save_checkpoint(path, tree)
    assert BehaviorCloning.load(path, mdp(points + 1)).num_timesteps == 16
