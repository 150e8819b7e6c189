"""Budgets and hyper-parameters by environment, agent and preset: the tuned numbers we ship.

Each entry overrides the agent's own defaults. An environment without an entry gets plain ones. The
command line takes its defaults from here, and so does `Agent.for_environment`:

    mdp = make_mdp("SwissRoll", steps=10)
    denoiser = new_denoiser(mdp)  # of fewstep.agents.denoisers.bodies
    for agent in (BehaviorCloning, SFTPG):
        agent = agent.for_environment(mdp, denoiser)
        agent.learn(agent.total_timesteps)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.names import unknown_name

Values = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A budget, and what goes with it.

    Attributes:
        rounds: of the agent; those that have a number of their own (`Agent.planned_rounds`) ignore
            it.
        agent: hyper-parameters that differ from the defaults in the agent's constructor.
        cloning: those of the behaviour cloning before it, with its "rounds".
        process: name for `make_process`, where it is not the environment's own.
        schedule: name for `make_schedule`, likewise.
        body: network to clone, a name for `named_body`, where it is not the one for the shape.
        prediction: what that predicts, where it is not the default of `new_denoiser`.
    """

    rounds: int
    agent: Values = field(default_factory=dict)
    cloning: Values = field(default_factory=dict)
    process: str | None = None
    schedule: str | None = None
    body: str | None = None
    prediction: str | None = None

    def settings(self, default_solver: str, overrides: Values) -> Values:
        """Return the agent's hyper-parameters with some replaced.

        The preset's `solver_options` are for its own solver: with another they are left out.

        Args:
            default_solver: that of the agent's constructor.
            overrides: hyper-parameters that win over the preset's.
        """
        values = {**self.agent, **overrides}
        own = self.agent.get("solver", default_solver)
        if values.get("solver", own) != own and "solver_options" not in overrides:
            values.pop("solver_options", None)
        return values


# Behaviour cloning of each environment, with its rounds.
_TOY: Values = {"rounds": 2000, "batch_size": 1024, "learning_rate": 5e-3}
_DDPM: Values = {"learning_rate": 2e-4, "lr_schedule": "constant", "ema": 0.9999}
CLONING: dict[str, Values] = {
    "SwissRoll": _TOY,
    "Moons": _TOY,
    "GaussianCluster": {**_TOY, "rounds": 1000},
    "Digits": {"rounds": 1800, "batch_size": 256, "learning_rate": 2e-3, "ema": 0.995},
    "MNIST": {"rounds": 4000, "batch_size": 128, "learning_rate": 1e-3, "ema": 0.999},
    # Ho et al. 2020, appendix B.
    "CIFAR10": {**_DDPM, "rounds": 800_000, "batch_size": 128},
    "CelebA64": {**_DDPM, "rounds": 500_000, "batch_size": 128},
    "ImageFolder": {**_DDPM, "rounds": 500_000, "batch_size": 64},
}

# Fine-tuning: rounds and hyper-parameters by environment, agent and preset name.
_TOY_SFT_PG: Values = {"coefficient": 1.0, "learning_rate": 2e-4, "ema": 0.97}
_TOY_SFT: Values = {"coefficient": 0.1, "learning_rate": 2e-4, "ema": 0.97}
_DIGITS_SFT_PG: Values = {
    "coefficient": 1.0,
    # 1e-4 was tried: with steps of little noise the policy takes leaps while the critic is raw.
    "learning_rate": 3e-5,
    "log_density": "mean",
    "noise_power": 1.0,
    "ema": 0.97,
    # Paper A's last standard deviation, 0.001, would drown the other steps in the gradient; 0.05 is
    # less than half a grey level of these digits.
    "solver_options": {"variance": "small", "last_std": 0.05},
}
# Paper A on images (MATH.md S.8): FastDPM's noise levels, small steps, gradients clipped hard.
_IMAGES_SFT_PG: Values = {
    "batch_size": 128,
    "n_critic": 5,
    "n_generator": 10,
    "learning_rate": 1e-6,
    "critic_learning_rate": 1e-4,
    "baseline_learning_rate": 1e-4,
    "max_grad_norm": 0.1,
    "log_density": "mean",
    "ema": 0.99,
    "solver": "fast-dpm",
    "solver_options": {"last_std": 0.001},
}
FINE_TUNING: dict[tuple[str, str, str], tuple[int, Values]] = {
    ("SwissRoll", "sft-pg", "default"): (400, _TOY_SFT_PG),
    ("SwissRoll", "sft-pg", "long"): (2000, {**_TOY_SFT_PG, "ema": 0.99}),
    ("SwissRoll", "sft", "default"): (400, _TOY_SFT),
    ("Moons", "sft-pg", "default"): (400, _TOY_SFT_PG),
    ("Moons", "sft", "default"): (400, _TOY_SFT),
    ("GaussianCluster", "sft-pg", "default"): (100, _TOY_SFT_PG),
    ("GaussianCluster", "sft", "default"): (100, _TOY_SFT),
    ("Digits", "sft-pg", "default"): (250, _DIGITS_SFT_PG),
    # Rounds of a second head; Gamma has its own number.
    ("Digits", "variance", "default"): (2000, {}),
    # For a CPU: a small critic, and a last standard deviation of six grey levels of 255.
    ("MNIST", "sft-pg", "default"): (
        160,
        {
            **_DIGITS_SFT_PG,
            # Without rounds of its own the critic is raw, and the policy drifts away at first.
            "critic_rounds": 25,
            "coefficient": 0.1,
            "learning_rate": 2e-5,
            "batch_size": 128,
            "n_critic": 3,
            # More gain on this critic in pixels, and lose in a classifier's features.
            "n_generator": 1,
            "minibatch_size": 256,
            "critic_width": 64,
            "channels_last": True,
        },
    ),
} | {
    (env, "sft-pg", "default"): (1000, _IMAGES_SFT_PG)
    for env in ("CIFAR10", "CelebA64", "ImageFolder")
}


# An ODE solver needs a chain that ends in noise and has times between its steps; the toys' own
# process, one noising a step, is neither.
PROCESSES: dict[tuple[str, str], str] = {
    (env, "dode"): "sigmoid-1000" for env in ("SwissRoll", "Moons", "GaussianCluster")
} | {
    # Noise levels are EDM's idea, and its network is smooth in them.
    (env, "schedule"): "ve"
    for env in ("SwissRoll", "Moons", "GaussianCluster", "Digits")
}


# The times that paper A starts from on images.
SCHEDULES: dict[tuple[str, str], str] = {
    (env, "sft-pg"): "fast_dpm" for env in ("CIFAR10", "CelebA64", "ImageFolder")
}


# The networks that Ho et al.'s and Song et al.'s budgets are for.
BODIES: dict[str, str] = {"CIFAR10": "unet-cifar10", "CelebA64": "unet-celeba64"}


def preset(env: str, agent: str, name: str = "default") -> Preset:
    """Look up a preset; the default of an untuned pair is a plain one.

    Args:
        env: name of the environment, such as "SwissRoll"; it may be one of yours, without presets.
        agent: name of the agent, `SFTPG.name` for instance.
        name: "default", or another that the pair has, such as "long".

    Raises:
        ValueError: a preset name that this environment and agent do not have.
    """
    cloning = CLONING.get(env, {"rounds": 2000})
    known = {"default"} | {key[2] for key in FINE_TUNING if key[:2] == (env, agent)}
    if name not in known:
        raise unknown_name(f"preset of {agent} on {env}", name, known)
    body = BODIES.get(env)
    prediction = "epsilon" if body else None
    if agent == "behavior-cloning":
        hyperparameters = {key: value for key, value in cloning.items() if key != "rounds"}
        rounds = cloning["rounds"]
        return Preset(rounds, hyperparameters, cloning, body=body, prediction=prediction)
    rounds, hyperparameters = FINE_TUNING.get((env, agent, name), (400, {}))
    process, schedule = (table.get((env, agent)) for table in (PROCESSES, SCHEDULES))
    return Preset(rounds, hyperparameters, cloning, process, schedule, body, prediction)
