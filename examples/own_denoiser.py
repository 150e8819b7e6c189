"""A network of your own as a denoiser: any module `body(x, t)`.

Here it is untrained, so it is cloned from data before SFT-PG fine-tunes it. One that is trained
already goes to SFT-PG as it is, with the noise process that it was trained on.
"""

import torch

from fewstep.agents import SFTPG, BehaviorCloning, Denoiser
from fewstep.envs import make_mdp


class MyNetwork(torch.nn.Module):
    """Predict the noise in x (N, 2) at t (N,), the index 0 .. 9 of the noising."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise (N, 2)."""
        return self.layers(torch.cat([x, t[:, None].to(x) / 10], dim=1))


mdp = make_mdp("SwissRoll", steps=10)
denoiser = Denoiser(MyNetwork(), mdp.process, prediction="epsilon")
cloning = BehaviorCloning.for_environment(mdp, denoiser)
cloning.learn()
cloning.save("mine.safetensors")  # weights come from the file, code from you
denoiser = Denoiser.load("mine.safetensors", body=MyNetwork())
agent = SFTPG(mdp, denoiser, batch_size=64)
agent.learn(100 * agent.timesteps_per_round)
print(agent.sample(1000).shape, "in", agent.nfe, "network calls")
