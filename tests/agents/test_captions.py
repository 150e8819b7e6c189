"""Captions and embeddings as conditions: environments, denoisers, and every learner under them."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from torch import nn

from fewstep.agents import (
    DODE,
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    ScheduleLearning,
    SolverLearning,
    VarianceLearning,
)
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.networks import ResidualMLP, SmallUNet
from fewstep.agents.solvers import make_solver
from fewstep.common.conditions import Captions, Embeddings
from fewstep.critics import IPMCritic, evaluate, make_baseline, make_critic
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    Inpainting,
    NumpyVectorEnv,
    Schedule,
    Target,
)
from fewstep.envs.mdp import no_reward

pytestmark = pytest.mark.numeric

PROCESS = DiscreteVP.linear(100)
TEXTS = ["red dot", "blue dot", "a green dot"]
VECTORS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -2.0]])
CENTRES = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])
KINDS = {"captions": (Captions(32), TEXTS), "embeddings": (Embeddings(3), VECTORS)}


def make_target(n=300):
    generator = torch.Generator().manual_seed(0)
    labels, held_out = torch.randint(3, (2, n), generator=generator)
    noise = 0.1 * torch.randn(2, n, 2, generator=generator)
    return Target(
        "Three",
        CENTRES[labels] + noise[0],
        held_out=CENTRES[held_out] + noise[1],
        labels=labels,
        held_out_labels=held_out,
        captions=[TEXTS[label] for label in labels.tolist()],
        held_out_captions=[TEXTS[label] for label in held_out.tolist()],
        embeddings=VECTORS[labels],
        held_out_embeddings=VECTORS[held_out],
    )


def make_mdp(conditional="captions", steps=4, reward=no_reward):
    schedule = Schedule.uniform(PROCESS, steps)
    return DiffusionMDP(make_target(), PROCESS, schedule, reward, conditional)


def make_denoiser(kind="captions", drops=True):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = ResidualMLP((2,), hidden=16, blocks=1, conditions=KINDS[kind][0])
        for parameter in body.parameters():
            nn.init.normal_(parameter, std=0.3)
    return Denoiser(body, PROCESS, drops=drops)


def place_of(condition):
    """Which of the three a condition is; 3 for none."""
    known = torch.cat([Captions(32).checked(TEXTS), torch.zeros(1, 32).long()])
    if condition.is_floating_point():
        known = torch.cat([VECTORS, torch.zeros(1, 3)])
    same = (condition[:, None] == known).all(-1)
    assert bool(same.any(1).all())
    return same.int().argmax(1)


# ------------------------------------------------------------------------------------- the view


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_own_condition(kind):
    denoiser, x, given = make_denoiser(kind), torch.randn(3, 2), KINDS[kind][1]
    together = denoiser.given(given, 2.0).epsilon(x, 40)
    assert torch.equal(denoiser.given(np.stack(list(given)), 2.0).epsilon(x, 40), together)
    for row, one in enumerate(given):
        alone = denoiser.given(one, 2.0)
        torch.testing.assert_close(alone.epsilon(x, 40)[row], together[row], rtol=1e-4, atol=1e-5)
        assert alone.at(slice(0, 1)).conditioning is alone.conditioning
    part = denoiser.given(given, 2.0).at(slice(1, 3)).epsilon(x[1:], 40)
    torch.testing.assert_close(part, together[1:], rtol=1e-4, atol=1e-5)
    free = denoiser.given(None).epsilon(x, 40)
    torch.testing.assert_close(
        denoiser.given(given, 0.0).epsilon(x, 40), free, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "one"), [("captions", "open"), ("embeddings", VECTORS[0])])
def test_a_file_keeps_the_condition(kind, one, tmp_path):
    denoiser, x = make_denoiser(kind), torch.randn(2, 2)
    denoiser.given(one, 2.0).save(tmp_path / "closed")
    again = Denoiser.load(tmp_path / "closed")
    assert not again.is_open
    assert torch.equal(again.epsilon(x, 40), denoiser.given(one, 2.0).epsilon(x, 40))
    denoiser.given(guidance=2.0).save(tmp_path / "open")
    again = Denoiser.load(tmp_path / "open")
    assert again.is_open and again.conditioning == denoiser.given(guidance=2.0).conditioning
    assert again.conditions == KINDS[kind][0] and again.classes is None


@pytest.mark.parametrize(
    ("ask", "error", "complaint"),
    [
        (lambda d: d.given(3), TypeError, "A condition is a text"),
        (lambda d: d.given(["a", None]), TypeError, "A condition is a text"),
        (lambda d: d.given(["a"]).epsilon(torch.zeros(2, 2), 3), ValueError, "1 captions were"),
        (lambda d: d.epsilon(torch.zeros(2, 2), 3), ValueError, "This denoiser is conditional"),
        (lambda d: make_denoiser(drops=False).given("a", 2.0), ValueError, "dropped labels"),
        (lambda d: make_denoiser("embeddings").given("a"), TypeError, "is an embedding"),
        (lambda d: SFT(make_mdp(True), d), ValueError, "knows captions of 32 bytes, the environm"),
        (lambda d: SFT(make_mdp(False), d), ValueError, "conditional='captions'"),
        (lambda d: make_mdp("labels"), ValueError, "unknown kind of conditions 'labels'"),
        (lambda d: make_mdp().episodes(2, condition=1), TypeError, "A condition is a text"),
        (lambda d: make_mdp(True).episodes(2, condition="a"), TypeError, "is a class 0 to 2"),
        (lambda d: make_mdp(False).episodes(2, condition="a"), ValueError, "is unconditional"),
        (
            lambda d: SFT(make_mdp(), Denoiser(ResidualMLP((2,)), PROCESS)),
            ValueError,
            "has captions of 32 bytes and the denoiser is unconditional",
        ),
        (
            lambda d: DiffusionMDP(
                Target("Bare", CENTRES), PROCESS, Schedule.uniform(PROCESS, 2), None, "captions"
            ),
            ValueError,
            "the samples of Bare have no captions",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ask, error, complaint):
    with pytest.raises(error, match=complaint):
        ask(make_denoiser())


# ----------------------------------------------------------------------------------- environment


def test_a_target_draws_samples_with_their_captions_and_embeddings():
    target = make_target()
    for kind in KINDS:
        drawn, given = target.draw(50, torch.Generator().manual_seed(1), kind)
        assert torch.equal(place_of(given), torch.cdist(drawn, CENTRES).argmin(1))
        fresh = target.fresh_conditions(20, 3, kind)
        nearest = torch.cdist(target.sample_fresh(20, 3), CENTRES).argmin(1)
        assert torch.equal(place_of(fresh), nearest)
        moved = target.to("cpu").sample_conditions(9, torch.Generator().manual_seed(1), kind)
        same = target.sample_conditions(9, torch.Generator().manual_seed(1), kind)
        assert torch.equal(moved[0], same[0]) and torch.equal(place_of(same[0]), same[1])
    other = Target("Three", target.samples, captions=["a dot"] * 300)
    assert other.fingerprint != Target("Three", target.samples).fingerprint
    for bad, error, complaint in (
        ({"captions": ["a"]}, ValueError, "1 captions for 300 samples"),
        ({"captions": "a" * 300}, TypeError, "a list of texts"),
        ({"captions": [3] * 300}, TypeError, "must be texts; got 3"),
        ({"embeddings": VECTORS}, ValueError, r"embeddings \(3, 3\) for 300 samples"),
        ({"embeddings": torch.ones(300)}, ValueError, r"must be \(N, size\)"),
    ):
        with pytest.raises(error, match=complaint):
            Target("Three", target.samples, **bad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shells_show_and_take_a_condition(kind):
    conditions, given = KINDS[kind]
    mdp, one = make_mdp(kind, steps=2), given[1]
    env = DiffusionVectorEnv(mdp, 3, autoreset_mode="SAME_STEP")
    shown = env.reset(seed=0)[0]["condition"]
    assert shown.shape == (3, *conditions.shape) and shown.dtype == conditions.dtype
    before = place_of(shown)
    shown.zero_()  # what a caller was shown is the caller's
    assert torch.equal(place_of(env.step(torch.zeros(3, 2))[0]["condition"]), before)
    observation, _, _, _, info = env.step(torch.zeros(3, 2))
    assert torch.equal(place_of(info["final_obs"]["condition"]), before)
    assert place_of(observation["condition"]).shape == (3,)
    for options in ({"condition": given}, {"condition": conditions.checked(given)}):
        assert place_of(env.reset(options=options)[0]["condition"]).tolist() == [0, 1, 2]
    assert place_of(env.reset(options={"condition": one})[0]["condition"]).tolist() == [1] * 3
    numpy = NumpyVectorEnv(DiffusionVectorEnv(mdp, 3))
    shown = numpy.reset(options={"condition": np.stack(list(given))})[0]
    assert numpy.observation_space.contains(shown)
    single = DiffusionEnv(mdp)
    shown = single.reset(options={"condition": one})[0]["condition"]
    assert place_of(torch.tensor(shown)[None]).tolist() == [1]


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized", "ignore:.*Box observation space")
@pytest.mark.parametrize("kind", [True, *KINDS])
def test_the_checkers_of_gymnasium_and_stable_baselines_take_conditions(kind):
    env = DiffusionEnv(make_mdp(kind, steps=2))
    check_env(env, skip_render_check=True)
    sb3_check_env(env)
    space = env.observation_space["condition"]
    assert isinstance(space, gym.spaces.Discrete if kind is True else gym.spaces.Box)


def test_known_coordinates_are_those_of_the_caption():
    schedule, mask = Schedule.uniform(PROCESS, 2), torch.tensor([True, False])
    mdp = Inpainting(make_target(), PROCESS, schedule, no_reward, "captions", mask=mask)
    drawn = mdp.episodes(6, torch.Generator().manual_seed(0), condition=TEXTS * 2)
    assert torch.cdist(drawn.known, CENTRES).argmin(1).tolist() == [0, 1, 2] * 2
    both = mdp.episodes(20, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cdist(both.known, CENTRES).argmin(1), place_of(both.condition))
    with pytest.raises(ValueError, match="no training sample of one of these captions"):
        mdp.episodes(1, condition="purple")


# -------------------------------------------------------------------------------------- learners

SMALL = {
    "batch_size": 16,
    "n_critic": 2,
    "learning_rate": 1e-3,
    # Small noise in the last step, and rounds of theta from the first on.
    "solver_options": {"variance": "small", "last_std": 0.1},
    "critic_rounds": 0,
    "micro_batch_size": 10,
}


@pytest.mark.parametrize(
    ("kind", "conditional"),
    [
        *((kind, "captions") for kind in (SFTPG, SFT, SFTV, SolverLearning, VarianceLearning)),
        (SFTPG, "embeddings"),
        *(
            pytest.param(kind, conditional, marks=pytest.mark.slow)
            for kind, conditional in (
                (DODE, "captions"),
                (ScheduleLearning, "captions"),
                *((k, "embeddings") for k in (SFT, SFTV, DODE, ScheduleLearning)),
            )
        ),
    ],
)
def test_every_learner_acts_under_the_conditions_that_the_environment_shows(
    kind, conditional, tmp_path
):
    settings = {
        DODE: {"solver": "ddim", "batch_size": 16, "batches": 1},
        ScheduleLearning: {
            "batch_size": 16,
            "batches": 1,
            "schedule_rounds": 2,
            "start": "environment",
            "tuning_rounds": 1,
        },
        SolverLearning: {
            "solver": "ddim",
            "batch_size": 16,
            "batches": 2,
            "rounds": 1,
            "optimizer": "adam",
            "adversarial": 0.1,
            "check_teacher": False,
            "start": "given",
        },
        VarianceLearning: {"kind": "npr", "rounds": 1},
    }.get(kind, SMALL)
    seen = []

    def note(_module, arguments):
        seen.append(place_of(arguments[2].detach()).unique().tolist())

    agent = kind(make_mdp(conditional), make_denoiser(conditional).given(guidance=2.0), **settings)
    hook = agent.denoiser.body.register_forward_pre_hook(note)
    agent.learn(agent.timesteps_per_round)
    hook.remove()
    if kind is SolverLearning:
        assert agent._critic.network.conditions == KINDS[conditional][0]
    # Each of them, and none for the other half.
    assert any(places == [0, 1, 2, 3] for places in seen)
    assert all(3 in places for places in seen)
    agent.save(tmp_path / "agent")
    kind(make_mdp(conditional), make_denoiser(conditional).given(guidance=2.0), **settings).resume(
        tmp_path / "agent"
    )
    with pytest.raises(CheckpointError, match="another environment: conditional is"):
        kind(make_mdp(True), other_classes(), **settings).resume(tmp_path / "agent")


def other_classes():
    return Denoiser(ResidualMLP((2,), hidden=16, blocks=1, classes=3), PROCESS, drops=True).given(
        guidance=2.0
    )


@pytest.mark.parametrize("kind", ["captions", pytest.param("embeddings", marks=pytest.mark.slow)])
def test_cloning_learns_conditions_and_what_is_common_to_them(kind):
    mdp = make_mdp(kind)
    denoiser = new_denoiser(mdp, prediction="sample")
    assert denoiser.conditions == KINDS[kind][0] and not denoiser.conditioning.drops
    agent = BehaviorCloning(mdp, denoiser, rounds=100, batch_size=64, ema=0.9)
    agent.learn()
    trained = agent.sampling_denoiser
    assert trained.conditioning.drops
    # In pure noise there is nothing to see but the condition.
    noise = mdp.initial(200, torch.Generator().manual_seed(0))
    for one, centre in zip(KINDS[kind][1], CENTRES, strict=True):
        seen = trained.given(one).denoised(noise, 100.0).mean(0)
        torch.testing.assert_close(seen, centre, rtol=0, atol=0.2)
    seen = trained.given(None).denoised(noise, 100.0).mean(0)
    torch.testing.assert_close(seen, mdp.target.samples.mean(0), rtol=0, atol=0.3)


def test_an_evaluation_asks_for_the_captions_of_the_data():
    asked = []

    class Sampler:
        mdp = make_mdp()

        def sample(self, n, *, generator, condition):
            asked.append(torch.bincount(place_of(condition), minlength=3) / n)
            return CENTRES[place_of(condition)] + 0.1 * torch.randn(n, 2, generator=generator)

    report = evaluate(Sampler(), Sampler.mdp.target, 60)
    distance = report["sliced_wasserstein"]
    assert distance.value < 3 * distance.floor
    real = torch.bincount(Sampler.mdp.target.labels, minlength=3) / 300
    torch.testing.assert_close(asked[0], real, rtol=0, atol=4 * 0.5 / 60**0.5)
    assert not any("class_accuracy" in name for name in report)


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_tells_conditions_apart(kind):
    torch.manual_seed(0)
    conditions = KINDS[kind][0]
    critic = IPMCritic(
        make_critic((2,), conditions=conditions),
        "r1",
        baseline=make_baseline((2,), 4, conditions=conditions),
        objective="logistic",
        residual_baseline=True,
        learning_rate=3e-3,
    )
    real, given = make_target().draw(48, torch.Generator().manual_seed(0), kind)
    # The same points under other conditions: only a critic that knows them can tell.
    wrong = conditions.checked(KINDS[kind][1])[(place_of(given) + 1) % 3]
    assert torch.equal(critic(real, given), critic(real, wrong))
    for _ in range(12):
        critic.update(real, real, real.expand(4, -1, -1), None, (given, wrong))
    assert float((critic(real, given) > critic(real, wrong)).float().mean()) > 0.95
    assert critic.value(real.expand(4, -1, -1), None, wrong).shape == (4, 48)


def test_networks_of_images_take_captions():
    x, conditions = torch.randn(3, 1, 8, 8), Captions(12)
    given = conditions.checked(["a", "b", ""])
    critic = make_critic((1, 8, 8), conditions=conditions)
    baseline = make_baseline((1, 8, 8), 2, "conv", conditions=conditions)
    nn.init.normal_(critic.projection.embedder.out.weight)
    nn.init.normal_(baseline.projection.embedder.out.weight)
    assert not torch.equal(critic(x, given), critic(x, given.flip(0)))
    rows = baseline(torch.stack([x, x]), None, given)
    each = torch.stack([baseline(x, torch.tensor([j] * 3), given) for j in range(2)])
    torch.testing.assert_close(rows, each, rtol=1e-4, atol=1e-5)
    body = SmallUNet((1, 8, 8), width=8, conditions=conditions)
    time = torch.zeros(1).expand(3)
    one = body(x, time, conditions.rows(conditions.checked("b"), 3))
    torch.testing.assert_close(one[1], body(x, time, given)[1], rtol=1e-4, atol=1e-5)


def test_stable_baselines_trains_a_policy_of_captions():
    from stable_baselines3 import PPO

    from fewstep.agents import DenoiserPolicy
    from fewstep.envs import SB3VecEnv

    mdp = make_mdp(reward=lambda sample: -sample.square().sum(1))
    table = make_solver("ancestral", mdp.schedule, variance="small", last_std=0.1)
    kwargs = {"denoiser": make_denoiser().given(guidance=2.0), "tableau": table}
    env = SB3VecEnv(DiffusionVectorEnv(mdp, 8))
    model = PPO(DenoiserPolicy, env, n_steps=4, batch_size=16, n_epochs=1, policy_kwargs=kwargs)
    model.learn(32)
    assert model.predict(env.reset())[0].shape == (8, 2)
    with pytest.raises(ValueError, match="shows captions of 32 bytes, the denoiser waits for none"):
        PPO(
            DenoiserPolicy,
            env,
            policy_kwargs={"denoiser": Denoiser(ResidualMLP((2,)), PROCESS), "tableau": table},
        )
