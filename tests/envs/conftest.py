import gymnasium as gym
import pytest
import torch


def toward_zero(sample):
    """A critic with a known answer: minus the squared norm."""
    return -sample.flatten(1).square().sum(1)


@pytest.fixture
def reward():
    return toward_zero


@pytest.fixture
def make_vec():
    """Small vector environments with a known reward."""

    def make(name="SwissRoll", num_envs=4, **settings):
        settings = {"reward": toward_zero, "steps": 3, **settings}
        return gym.make_vec(f"fewstep/{name}-v0", num_envs, **settings)

    return make


@pytest.fixture
def random_action():
    """A generator of valid actions for any vector environment."""
    generator = torch.Generator().manual_seed(7)

    def draw(env):
        return torch.randn(env.action_space.shape, generator=generator)

    return draw
