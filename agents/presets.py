"""Budgets and hyper-parameters by environment, agent and preset: the tuned numbers we ship.

Each entry overrides the agent's own defaults. An environment without an entry gets plain ones. The
command line takes its defaults from here, and so does `Agent.for_environment`:

    mdp = make_mdp("SwissRoll", steps=10)
    denoiser = new_denoiser(mdp)  # of fewstep.agents.denoisers.bodies
    for agent in (BehaviorCloning, SFTPG):
        agent = agent.for_environment(mdp, denoiser)
        agent.learn()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..common.arguments import checked
from ..common.names import unknown_name
from ..common.settings import Settings
from ..envs.registration import known_environment
from .solver_learning.joint.presets import SOLVER_PRESETS

Values = dict[str, Any]
Chosen = TypeVar("Chosen", bound=Settings)


@dataclass(frozen=True)
class Preset:
    """A budget, and what goes with it.

    Attributes:
        agent: settings that differ from the agent's defaults.
        cloning: those of the behaviour cloning before it.
        process: name for `make_process`, where it is not the environment's own.
        schedule: name for `make_schedule`, likewise.
        body: network to clone, a name for `named_body`, where it is not the one for the shape.
        prediction: what that predicts, where it is not the default of `new_denoiser`.
    """

    agent: Values = field(default_factory=dict)
    cloning: Values = field(default_factory=dict)
    process: str | None = None
    schedule: str | None = None
    body: str | None = None
    prediction: str | None = None


LEARNERS: set[str] = set()
"""The names of all agents' classes, yours as well."""


def preset_settings(kind: type[Chosen], values: Values, changes: Values) -> Chosen:
    """Return an agent's settings: a preset's values, and single settings that win over them.

    The preset's `solver_options` are for its own solver: with another they are left out.

    Args:
        kind: the agent's `Settings`.
        values: of the preset.
        changes: what wins.
    """
    own = values.get("solver", getattr(kind(), "solver", None))
    if changes.get("solver", own) != own:
        values = {key: value for key, value in values.items() if key != "solver_options"}
    return kind().replace(**{**values, **changes})


# Behaviour cloning of each environment, with its rounds.
_TOY: Values = {"rounds": 2000, "batch_size": 1024, "learning_rate": 5e-3}
_SMALL_IMAGES: Values = {"rounds": 4000, "batch_size": 128, "learning_rate": 1e-3, "ema": 0.999}
_DDPM: Values = {"learning_rate": 2e-4, "lr_schedule": "constant", "ema": 0.9999}
CLONING: dict[str, Values] = {
    "SwissRoll": _TOY,
    "Moons": _TOY,
    "GaussianCluster": {**_TOY, "rounds": 1000},
    "Digits": {"rounds": 1800, "batch_size": 256, "learning_rate": 2e-3, "ema": 0.995},
    "MNIST": _SMALL_IMAGES,
    "FashionMNIST": _SMALL_IMAGES,
    # Ho et al. 2020, appendix B.
    "CIFAR10": {**_DDPM, "rounds": 800_000, "batch_size": 128},
    "CelebA64": {**_DDPM, "rounds": 500_000, "batch_size": 128},
    "ImageFolder": {**_DDPM, "rounds": 500_000, "batch_size": 64},
}

# Fine-tuning: rounds and hyper-parameters by environment, agent and preset name.
_TOY_SFT_PG: Values = {"coefficient": 1.0, "learning_rate": 2e-4, "ema": 0.97}
# V alone, as published: with f(x_t) in it f hardly varies within the noise of the last steps, where
# the thin curve is. The moons gain nothing by it, and the long preset's fine critic is too fast for
# it: with three steps the sampler collapsed.
_ROLL_SFT_PG: Values = {**_TOY_SFT_PG, "rounds": 400, "residual_baseline": False}
# The curve is thin: f needs fine frequencies to see that, and the last step no more noise than the
# data have. With few steps it also takes time: after 400 rounds of three steps it is worse than the
# default, after 1200 far better.
_LONG_ROLL_SFT_PG: Values = {
    **_TOY_SFT_PG,
    "rounds": 2000,
    "ema": 0.99,
    "bandwidths": (6.0, 25.0),
    "solver_options": {"last_std": 0.0025},
}
_TOY_SFT_V: Values = {"learning_rate": 4e-4, "critic_rounds": 20}
# The last standard deviation is that of the data's own noise: the process's would blur the curve.
# V scaled and even batches keep it steady (Moons is a little better without); batches of 512 take
# longer for three quarters of the rounds, and end farther away.
_ROLL_SFT_V: Values = {
    **_TOY_SFT_V,
    "batch_size": 256,
    "scaled_baseline": True,
    "even": True,
    "solver_options": {"last_std": 0.0025},
}
_TOY_SFT: Values = {"coefficient": 0.1, "learning_rate": 2e-4, "ema": 0.97}
_DIGITS_SFT_PG: Values = {
    "coefficient": 1.0,
    # 1e-4 was tried: with steps of little noise the policy takes leaps while the critic is raw.
    "learning_rate": 3e-5,
    "log_density": "mean",
    "noise_power": 1.0,
    "ema": 0.97,
    # Fan & Lee's last standard deviation, 0.001, would drown the other steps in the gradient; 0.05
    # is less than half a grey level of these digits.
    "solver_options": {"variance": "small", "last_std": 0.05},
}
# With the gradient through the chain, a logistic critic earns what SFT-PG does in half the time. At
# twice this learning rate, held constant, the sampler ran away from it.
_DIGITS_SFT: Values = {
    "batch_size": 128,
    "n_critic": 2,
    "critic_rounds": 20,
    "learning_rate": 5e-5,
    "ema": 0.97,
    "objective": "logistic",
    "regularizer": "r1",
    "coefficient": 0.5,
    "critic_betas": (0.5, 0.99),
    "solver_options": {"variance": "small", "last_std": 0.05},
}
# Tuned on MNIST at ten calls, for a CPU; Fashion-MNIST borrows them.
# A small critic, and a last standard deviation of six grey levels of 255.
_SMALL_IMAGES_SFT_PG: Values = {
    **_DIGITS_SFT_PG,
    "rounds": 160,
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
}
# The critic is the denoiser's own encoder, which sees shapes; a quarter of an hour on one core. The
# last step's noise is less than a grey level of 255: theta cannot take away what comes after it.
# Twice this learning rate gains faster at first, and ends farther away.
_SMALL_IMAGES_SFT: Values = {
    "rounds": 400,
    "batch_size": 64,
    "n_critic": 1,
    "n_generator": 1,
    "gradient_steps": 3,
    "non_saturating": True,
    # Judging costs less than rolling out, and a critic that is behind teaches nothing: it begins
    # alone, and theta follows slowly at first, or f soon has no opinion any more.
    "critic_passes": 3,
    "critic_replay": 8,
    "critic_rounds": 100,
    "warmup": 100,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "lr_schedule": "constant",
    "betas": (0.5, 0.99),
    "ema": 0.995,
    "critic_network": "denoiser",
    "objective": "logistic",
    "regularizer": "none",
    "critic_learning_rate": 5e-4,
    "critic_betas": (0.5, 0.99),
    "solver_options": {"variance": "small", "last_std": 0.005},
}
# For a GPU, where its batches cost hardly more: four minutes on a part of one, hours on a core.
_LONG_IMAGES_SFT: Values = {
    **_SMALL_IMAGES_SFT,
    "rounds": 900,
    "batch_size": 256,
    "learning_rate": 1e-4,
}
# Minutes on a CPU; longer, pixels stay right and the shapes of digits get worse.
_SMALL_CRITIC_SFT: Values = {
    **_DIGITS_SFT,
    "rounds": 90,
    "batch_size": 64,
    "ema": 0.98,
    "coefficient": 1.0,
    "critic_learning_rate": 5e-4,
    "critic_width": 64,
    "channels_last": True,
}
_SMALL_IMAGES_SFT_V: Values = {
    "rounds": 70,
    "batch_size": 64,
    "n_critic": 2,
    "n_generator": 1,
    "critic_rounds": 20,
    "learning_rate": 1e-4,
    "coefficient": 1.0,
    "critic_learning_rate": 5e-4,
    "baseline_learning_rate": 5e-4,
    "critic_width": 64,
    "channels_last": True,
    "solver_options": {"variance": "small", "last_std": 0.05},
}
# Fan & Lee (2023) on images (MATH.md S.8): FastDPM's noise levels, small steps, hard clipping.
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
# The network distilled into its own fine solver's few steps: minutes on a CPU.
_TOY_SFD: Values = {"rounds": 400, "batch_size": 256, "learning_rate": 1e-3}
_DIGITS_SFD: Values = {"rounds": 300, "batch_size": 128, "learning_rate": 3e-4, "scale": 20}
_SMALL_IMAGES_SFD: Values = {"rounds": 300, "batch_size": 64, "learning_rate": 1e-4}
# A network that predicts the noise errs much in the clean sample where little signal is left.
_TOY_PD: Values = {"rounds": 100, "batch_size": 128, "learning_rate": 1e-3, "weights": "snr"}
_DIGITS_PD: Values = {"rounds": 100, "batch_size": 128, "learning_rate": 3e-4, "scale": 20}
_SMALL_IMAGES_PD: Values = {"rounds": 40, "batch_size": 64, "learning_rate": 2e-4}
_TOY_CD: Values = {"rounds": 150, "batch_size": 128, "learning_rate": 1e-3}
_DIGITS_CD: Values = {"rounds": 60, "batch_size": 128, "learning_rate": 3e-4, "scale": 16}
_SMALL_IMAGES_CD: Values = {"rounds": 70, "batch_size": 64, "learning_rate": 2e-4}
# The network of the student's score follows twice as fast as the student moves: the best of eight
# settings on the roll, where a student at 2e-3 got worse. The other environments borrow them.
_TOY_DMD: Values = {
    "rounds": 900,
    "batch_size": 256,
    "learning_rate": 5e-4,
    "ema": 0.97,
    "fake_learning_rate": 1e-3,
    "n_fake": 4,
    "adversarial": 0.05,
    "critic_learning_rate": 1e-3,
}
_DIGITS_DMD: Values = {
    **_TOY_DMD,
    "rounds": 100,
    "batch_size": 128,
    "learning_rate": 1e-4,
    "fake_learning_rate": 2e-4,
    "critic_learning_rate": 5e-4,
    "scale": 16,
}
# What fits 28 x 28 images and a small U-Net, in minutes on a CPU: 200 noises, or 400 for Adam,
# which takes one batch a step, so that more of them cost the teacher and the starts alone.
_SMALL_IMAGES_SCHEDULE: Values = {"batch_size": 100, "schedule_rounds": 40, "tuning_batch_size": 64}
_OF_SMALL_IMAGES: dict[str, Values] = {
    # A round of L-BFGS is a dozen gradients on all batches.
    name: {**values, "batch_size": 50}
    | ({"batches": 8} if values.get("optimizer") == "adam" else {"rounds": 6})
    for name, values in {"default": {}, **SOLVER_PRESETS}.items()
}
_COLOURED = ("CIFAR10", "CelebA64", "ImageFolder")
# The preset with a small critic of its own, where the default one judges with a denoiser.
SMALL_CRITIC = "small-critic"

FINE_TUNING: dict[tuple[str, str, str], Values] = {
    ("SwissRoll", "sft-pg", "default"): _ROLL_SFT_PG,
    ("SwissRoll", "sft-pg", "long"): _LONG_ROLL_SFT_PG,
    ("SwissRoll", "sft-v", "default"): {**_ROLL_SFT_V, "rounds": 320},
    ("Moons", "sft-v", "default"): {**_TOY_SFT_V, "rounds": 300},
    ("GaussianCluster", "sft-v", "default"): {**_TOY_SFT_V, "rounds": 100},
    ("SwissRoll", "sft", "default"): {**_TOY_SFT, "rounds": 400},
    ("Moons", "sft-pg", "default"): {**_TOY_SFT_PG, "rounds": 400},
    ("Moons", "sft", "default"): {**_TOY_SFT, "rounds": 400},
    ("GaussianCluster", "sft-pg", "default"): {**_TOY_SFT_PG, "rounds": 100},
    ("GaussianCluster", "sft", "default"): {**_TOY_SFT, "rounds": 100},
    ("Digits", "sft-pg", "default"): {**_DIGITS_SFT_PG, "rounds": 250},
    ("Digits", "sft", "default"): {**_DIGITS_SFT, "rounds": 160},
    # Rounds of a second head; Gamma has its own number.
    ("Digits", "variance", "default"): {"rounds": 2000},
    ("MNIST", "sft-pg", "default"): _SMALL_IMAGES_SFT_PG,
    ("FashionMNIST", "sft-pg", "default"): _SMALL_IMAGES_SFT_PG,
    ("MNIST", "sft", "default"): _SMALL_IMAGES_SFT,
    ("FashionMNIST", "sft", "default"): _SMALL_IMAGES_SFT,
    ("MNIST", "sft", "long"): _LONG_IMAGES_SFT,
    ("FashionMNIST", "sft", "long"): _LONG_IMAGES_SFT,
    ("MNIST", "sft", SMALL_CRITIC): _SMALL_CRITIC_SFT,
    ("FashionMNIST", "sft", SMALL_CRITIC): _SMALL_CRITIC_SFT,
    ("MNIST", "sft-v", "default"): _SMALL_IMAGES_SFT_V,
    ("FashionMNIST", "sft-v", "default"): _SMALL_IMAGES_SFT_V,
    ("SwissRoll", "sfd", "default"): _TOY_SFD,
    ("Moons", "sfd", "default"): _TOY_SFD,
    ("GaussianCluster", "sfd", "default"): {**_TOY_SFD, "rounds": 200},
    ("Digits", "sfd", "default"): _DIGITS_SFD,
    ("MNIST", "schedule", "default"): _SMALL_IMAGES_SCHEDULE,
    ("FashionMNIST", "schedule", "default"): _SMALL_IMAGES_SCHEDULE,
    ("MNIST", "sfd", "default"): _SMALL_IMAGES_SFD,
    ("FashionMNIST", "sfd", "default"): _SMALL_IMAGES_SFD,
    ("SwissRoll", "pd", "default"): _TOY_PD,
    ("Moons", "pd", "default"): _TOY_PD,
    ("GaussianCluster", "pd", "default"): _TOY_PD,
    ("Digits", "pd", "default"): _DIGITS_PD,
    ("MNIST", "pd", "default"): _SMALL_IMAGES_PD,
    ("FashionMNIST", "pd", "default"): _SMALL_IMAGES_PD,
    ("SwissRoll", "cd", "default"): _TOY_CD,
    ("Moons", "cd", "default"): _TOY_CD,
    ("GaussianCluster", "cd", "default"): _TOY_CD,
    ("Digits", "cd", "default"): _DIGITS_CD,
    ("MNIST", "cd", "default"): _SMALL_IMAGES_CD,
    ("FashionMNIST", "cd", "default"): _SMALL_IMAGES_CD,
    ("SwissRoll", "dmd", "default"): _TOY_DMD,
    ("Moons", "dmd", "default"): _TOY_DMD,
    ("GaussianCluster", "dmd", "default"): {**_TOY_DMD, "rounds": 200},
    ("Digits", "dmd", "default"): _DIGITS_DMD,
    **{(env, "sft-pg", "default"): {**_IMAGES_SFT_PG, "rounds": 1000} for env in _COLOURED},
    # Found on MNIST, tried on a folder of small colour pictures, and on neither CIFAR-10 nor faces.
    **{(env, "sft", "default"): _SMALL_IMAGES_SFT for env in _COLOURED},
    **{(env, "schedule", "default"): _SMALL_IMAGES_SCHEDULE for env in _COLOURED},
    **{
        (env, "solver", name): values
        for env in ("MNIST", "FashionMNIST", *_COLOURED)
        for name, values in _OF_SMALL_IMAGES.items()
    },
    # The paper's distance is one of features; that of pixels does not see what a picture shows.
    # Where all images have labels, a classifier's are at hand.
    ("Digits", "solver", "ddss"): {**SOLVER_PRESETS["ddss"], "compared": "features"},
    **{
        (env, "solver", "ddss"): {**_OF_SMALL_IMAGES["ddss"], "compared": "features"}
        for env in ("MNIST", "FashionMNIST", "CIFAR10")
    },
}


# The agent that serves an environment best, where it is not SFT-PG.
RECOMMENDED: dict[str, str] = {
    "SwissRoll": "sft-v",
    "Moons": "sft-v",
    # A batch's gradient through the chain says 300 times as much as the score function's does, by
    # its signal-to-noise ratio (docs/results.md).
    "MNIST": "sft",
    "FashionMNIST": "sft",
}
# With 3, 5 and 8 steps SFT-PG comes closer to the roll than SFT-V.
RECOMMENDED_FROM = 10


# Presets that an agent has in every environment, by agent and name.
NAMED: dict[str, dict[str, Values]] = {"solver": SOLVER_PRESETS}

# An ODE solver needs a chain that ends in noise and has times between its steps; the toys' own
# process, one noising a step, is neither.
PROCESSES: dict[tuple[str, str], str] = {
    (env, agent): "sigmoid-1000"
    for env in ("SwissRoll", "Moons", "GaussianCluster")
    for agent in ("dode", "solver", "rdpo", "sfd", "pd", "cd", "dmd")
} | {
    # Noise levels are EDM's idea, and its network is smooth in them.
    (env, "schedule"): "ve"
    for env in ("SwissRoll", "Moons", "GaussianCluster", "Digits")
}


# The times that Fan & Lee (2023) start from on images.
SCHEDULES: dict[tuple[str, str], str] = {(env, "sft-pg"): "fast_dpm" for env in _COLOURED}


# The networks that Ho et al.'s and Song et al.'s budgets are for.
BODIES: dict[str, str] = {"CIFAR10": "unet-cifar10", "CelebA64": "unet-celeba64"}


@checked
def recommended_agent(env: str, steps: int | None = None, process: str | None = None) -> str:
    """Return the name of the agent that `fewstep train` takes in an environment.

    Args:
        env: name of the environment.
        steps: number of steps; None: as many as the environment has by default, which is ten.
        process: name of the noise process; None: the environment's own.

    Raises:
        TypeError: a value of another type.
    """
    agent = RECOMMENDED.get(env, "sft-pg")
    # SFT-V collapses onto a part of the roll where the first samples are far from it, as they are
    # after a few even times of a long chain or a flow (docs/results.md).
    untuned = process is not None or (steps is not None and steps < RECOMMENDED_FROM)
    return "sft-pg" if untuned and agent == "sft-v" else agent


@checked
def preset(env: str, agent: str, name: str = "default") -> Preset:
    """Look up a preset; the default of an untuned pair is a plain one.

    Args:
        env: name of the environment, such as "SwissRoll"; it may be one of yours, without presets.
        agent: name of the agent, `SFTPG.name` for instance.
        name: "default", or another that the pair has, such as "long".

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown agent, or a preset name that this environment and agent do not have.
    """
    env = known_environment(env) or env
    if agent not in LEARNERS:
        raise unknown_name("agent", agent, LEARNERS)
    cloning = CLONING.get(env, {"rounds": 2000})
    known = preset_names(env, agent)
    if name not in known:
        raise unknown_name(f"preset of {agent} on {env}", name, known)
    body = BODIES.get(env)
    prediction = "epsilon" if body else None
    if agent == "behavior-cloning":
        return Preset(cloning, cloning, body=body, prediction=prediction)
    values = FINE_TUNING.get((env, agent, name), NAMED.get(agent, {}).get(name, {}))
    process, schedule = (table.get((env, agent)) for table in (PROCESSES, SCHEDULES))
    return Preset(values, cloning, process, schedule, body, prediction)


def preset_names(env: str, agent: str) -> set[str]:
    """Return the names of the presets that an agent has in an environment of ours or another."""
    env = known_environment(env) or env
    own = {name for place, learner, name in FINE_TUNING if (place, learner) == (env, agent)}
    return {"default", *NAMED.get(agent, {}), *own}
