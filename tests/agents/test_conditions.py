"""Conditions and guidance: a view of a denoiser, and every learner and sampler on it."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from norms import assert_close_by_norm
from torch import nn

from fewstep.agents import (
    DODE,
    RDPO,
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    DenoiserPolicy,
    ScheduleLearning,
    SolverLearning,
    SolverPolicy,
    VarianceLearning,
)
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.networks import MLP, ResidualMLP, SmallUNet
from fewstep.agents.samplers.sampling import sample
from fewstep.agents.solvers import make_solver
from fewstep.common.conditions import Captions, Classes
from fewstep.critics import IPMCritic, make_baseline, make_critic
from fewstep.envs import (
    DiffusionEnv,
    DiffusionMDP,
    DiffusionVectorEnv,
    DiscreteVP,
    Inpainting,
    NumpyVectorEnv,
    RectifiedFlow,
    SB3VecEnv,
    Schedule,
    Target,
    make_target,
)
from fewstep.envs import make_mdp as make_named
from fewstep.envs.mdp import no_reward

# A fit on few noises may be of no use, and says so.
pytestmark = [pytest.mark.filterwarnings("ignore:Distillation made"), pytest.mark.numeric]

PROCESS = DiscreteVP.linear(100)
CLASSES, CAPTION = Classes(3), "red dot"
CENTRES = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])


def labelled(n=300):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    return CENTRES[labels] + 0.1 * torch.randn(n, 2, generator=generator), labels


def make_mdp(conditional=True, steps=4, reward=no_reward):
    samples, labels = labelled()
    target = Target("Three", samples, labels=labels, held_out=samples, held_out_labels=labels)
    schedule = Schedule.uniform(PROCESS, steps)
    return DiffusionMDP(target, PROCESS, schedule, reward, conditional)


def make_denoiser(prediction="epsilon", drops=True, process=PROCESS, conditions=CLASSES):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = ResidualMLP((2,), hidden=16, blocks=1, conditions=conditions)
        for parameter in body.parameters():
            nn.init.normal_(parameter, std=0.3)
    return Denoiser(body, process, prediction, drops=drops)


class ByHand(nn.Module):
    """Classifier-free guidance to one condition, in two calls of a copy of a conditional body."""

    def __init__(self, body, condition, none, weight):
        super().__init__()
        self.body, self.condition, self.none = copy.deepcopy(body), condition, none
        self.weight = weight

    def forward(self, x, time):
        def ask(condition):
            return self.body(x, time, torch.stack([condition] * len(x)))

        return ask(self.none) + self.weight * (ask(self.condition) - ask(self.none))

    @property
    def out(self):
        return self.body.out


def pair(condition=1, weight=2.5, prediction="epsilon"):
    """The guided view, and the same network made by hand."""
    if condition == CAPTION:
        conditions, given, none = Captions(8), [*CAPTION.encode(), 0], [0] * 8
    else:
        conditions, given, none = CLASSES, condition, 3
    denoiser = make_denoiser(prediction, conditions=conditions)
    body = ByHand(denoiser.body, torch.tensor(given), torch.tensor(none), weight)
    return denoiser.given(condition, weight), Denoiser(body, PROCESS, prediction)


def assert_same_weights(ours, theirs):
    theirs = dict(theirs.body.body.named_parameters())
    for name, weight in ours.body.named_parameters():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


# ------------------------------------------------------------------------------------- the view


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "flow"])
@pytest.mark.parametrize("t", [50, 30.5, torch.tensor([10, 20, 30, 40, 50])])
@pytest.mark.parametrize("condition", [1, CAPTION])
def test_a_guided_view_answers_as_the_network_made_by_hand(prediction, t, condition):
    view, by_hand = pair(condition, prediction=prediction)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for question in ("epsilon", "denoised"):
        ours, theirs = (getattr(each, question)(x, t) for each in (view, by_hand))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_is_the_same_whatever_is_guided():
    # The formula on the predicted noise and on the predicted clean sample.
    denoiser, x = make_denoiser("v"), torch.randn(5, 2)
    view, with_class, without = denoiser.given(2, 3.0), denoiser.given(2), denoiser.given(None)
    for question in ("epsilon", "denoised"):
        ours, c, u = (getattr(each, question)(x, 40) for each in (view, with_class, without))
        torch.testing.assert_close(ours, u + 3 * (c - u), rtol=1e-4, atol=1e-4)


def test_a_view_shares_its_weights_and_changes_nothing():
    denoiser = make_denoiser()
    view = denoiser.given(1, 2.0)
    assert view.body is denoiser.body
    assert [id(p) for p in view.parameters()] == [id(p) for p in denoiser.parameters()]
    assert denoiser.is_open and not view.is_open
    assert denoiser.given(guidance=2.0).given(1).conditioning == view.conditioning


def test_each_sample_has_its_own_class():
    denoiser, x = make_denoiser(), torch.randn(6, 2)
    classes = torch.tensor([0, 1, 2, 2, 1, 0])
    together = denoiser.given(classes, 2.0).epsilon(x, 40)
    for row, label in enumerate(classes.tolist()):
        alone = denoiser.given(label, 2.0).epsilon(x[row : row + 1], 40)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    for same in (classes.tolist(), classes.numpy()):
        assert torch.equal(denoiser.given(same, 2.0).epsilon(x, 40), together)
    parts = [denoiser.given(classes, 2.0).at(slice(i, i + 2)) for i in (0, 2, 4)]
    split = torch.cat([part.epsilon(x[2 * i : 2 * i + 2], 40) for i, part in enumerate(parts)])
    torch.testing.assert_close(together, split, rtol=1e-4, atol=1e-5)


def test_guidance_holds_in_its_interval_and_costs_there():
    denoiser, x = make_denoiser(), torch.randn(2, 2)
    levels = {t: float((-PROCESS.log_snr(float(t))).exp()) for t in (20, 50, 80)}
    view = denoiser.given(1, 4.0, interval=(levels[20], levels[50]))
    guided, plain = denoiser.given(1, 4.0), denoiser.given(1)
    for t, inside in ((20, False), (50, True), (80, False)):
        expected = (guided if inside else plain).epsilon(x, t)
        torch.testing.assert_close(view.epsilon(x, t), expected, rtol=1e-5, atol=1e-6)
        assert view.evaluations(float(t)) == (2 if inside else 1)
    mixed = view.epsilon(x, torch.tensor([20, 50]))
    torch.testing.assert_close(mixed[:1], plain.epsilon(x[:1], 20), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:], guided.epsilon(x[1:], 50), rtol=1e-4, atol=1e-5)


def test_rescaling_keeps_the_spread_of_the_answer_with_the_class():
    denoiser, x = make_denoiser(), torch.randn(4, 2)
    with_class = denoiser.given(1)(x, 40)
    whole = denoiser.given(1, 6.0, rescale=1.0)(x, 40)
    torch.testing.assert_close(whole.std(1), with_class.std(1), rtol=1e-4, atol=1e-5)
    guided = denoiser.given(1, 6.0)(x, 40)
    half = denoiser.given(1, 6.0, rescale=0.5)(x, 40)
    torch.testing.assert_close(half, (whole + guided) / 2, rtol=1e-4, atol=1e-5)


def test_rescaling_is_left_out_with_guidance():
    denoiser, x = make_denoiser(), torch.randn(4, 2)
    view = denoiser.given(1, 6.0, rescale=0.5)
    assert torch.equal(view.given(guidance=1.0)(x, 40), denoiser.given(1)(x, 40))
    assert torch.equal(denoiser.given(1, rescale=0.0)(x, 40), denoiser.given(1)(x, 40))


def test_rescaling_is_finite_where_there_is_no_spread():
    denoiser = Denoiser(ResidualMLP((2,), classes=3), PROCESS, drops=True)
    assert denoiser.given(1, 2.0, rescale=0.5)(torch.randn(3, 2), 40).isfinite().all()


def test_the_ends_of_an_interval_are_the_same_for_numbers_and_tensors():
    process = RectifiedFlow()
    denoiser = make_denoiser("sample", process=process)
    x = torch.randn(4, 2)
    for t in (0.9, 0.6, 0.375, 0.2, 0.85):
        level = t / (1 - t)
        for interval in ((0.0, level), (level, math.inf)):
            view = denoiser.given(1, 4.0, interval=interval)
            one, each = view(x, t), view(x, torch.full((4,), t))
            torch.testing.assert_close(one, each, rtol=1e-4, atol=1e-4)


def test_a_file_keeps_classes_and_guidance(tmp_path):
    denoiser = make_denoiser().given(guidance=2.0, interval=(0.1, math.inf), rescale=0.3)
    denoiser.save(tmp_path / "open")
    again = Denoiser.load(tmp_path / "open")
    assert again.conditioning == denoiser.conditioning
    denoiser.given(2).save(tmp_path / "closed")
    assert Denoiser.load(tmp_path / "closed").conditioning.condition == 2
    x = torch.randn(3, 2)
    assert torch.equal(again.given(1).epsilon(x, 40), denoiser.given(1).epsilon(x, 40))


def test_an_unconditional_denoiser_s_file_says_nothing_of_conditions():
    assert "given" not in Denoiser(ResidualMLP((2,)), PROCESS).to_tree()


@pytest.mark.parametrize(
    ("ask", "error", "complaint"),
    [
        (lambda d: d.given(3.0), TypeError, "A condition is a class 0 to 2"),
        (lambda d: d.given("3"), TypeError, "A condition is a class 0 to 2"),
        (lambda d: d.given(7), ValueError, "There are 3 classes, 0 to 2; got 7"),
        (lambda d: d.given(3), ValueError, "There are 3 classes, 0 to 2; got 3"),
        (lambda d: d.given([0, 3]), ValueError, "There are 3 classes, 0 to 2; got 3"),
        (lambda d: d.given(["red"]), TypeError, "A condition is a class 0 to 2"),
        (lambda d: d.given(1, "2"), TypeError, "guidance must be a number"),
        (lambda d: d.given(1, interval=1.0), TypeError, "interval must be two noise levels"),
        (lambda d: d.given(torch.tensor([0, -1])), ValueError, "0 to 2; got -1"),
        (lambda d: d.given(torch.zeros(2)), TypeError, "Classes are whole numbers"),
        (lambda d: d.given(torch.zeros(2, 2).long()), ValueError, r"one for each sample"),
        (lambda d: d.given(1, -1.0), ValueError, "guidance must be a finite number >= 0"),
        (lambda d: d.given(1, interval=(2.0, 1.0)), ValueError, "0 <= low < high"),
        (lambda d: d.given(1, interval=(0.1, 2.0)), ValueError, "needs a guidance other than 1"),
        (lambda d: d.given(1, 1.0, interval=(0.1, 2.0)), ValueError, "guidance other than 1"),
        (lambda d: d.given(1, rescale=2.0), ValueError, r"rescale must lie in \[0, 1\]"),
        (
            lambda d: d.given(1, rescale=0.5),
            ValueError,
            "rescale is .* needs a guidance other than",
        ),
        (lambda d: d.given(1, 1.0, rescale=0.5), ValueError, "needs a guidance other than 1"),
        (lambda d: d.epsilon(torch.zeros(2, 2), 3), ValueError, "This denoiser is conditional"),
        (
            lambda d: d.given(torch.tensor([1])).epsilon(torch.zeros(2, 2), 3),
            ValueError,
            "1 classes were given for 2 samples",
        ),
        (
            lambda d: make_denoiser(drops=False).given(1, 2.0),
            ValueError,
            "was trained without dropped labels",
        ),
        (
            lambda d: make_denoiser(drops=False).given(None),
            ValueError,
            "was trained without dropped labels",
        ),
        (
            lambda d: Denoiser(ResidualMLP((2,)), PROCESS).given(1),
            ValueError,
            "This denoiser is unconditional",
        ),
    ],
)
def test_bad_terms_are_refused(ask, error, complaint):
    with pytest.raises(error, match=complaint):
        ask(make_denoiser())


# ----------------------------------------------------------------------------------- environment


def test_a_conditional_environment_shows_the_classes_of_its_data():
    mdp = make_mdp()
    episodes = mdp.episodes(2000, torch.Generator().manual_seed(0))
    share = torch.bincount(episodes.condition, minlength=3) / 2000
    real = torch.bincount(mdp.target.labels, minlength=3) / len(mdp.target)
    torch.testing.assert_close(share, real, rtol=0, atol=4 * 0.5 / math.sqrt(2000))
    assert torch.equal(episodes.observe(torch.zeros(2000, 2), 0)["condition"], episodes.condition)
    rows = torch.tensor([3, 5])
    assert torch.equal(episodes.at(rows).condition, episodes.condition[rows])


@pytest.fixture(scope="module")
def digits():
    """The environment of the digits without conditions: of labelled samples, and of plain ones."""
    known = make_target("Digits")
    plain = Target("Digits", known.samples, held_out=known._held_out)
    labelled = make_named("Digits", steps=3, conditional=False)
    assert labelled.target.labels is not None and plain.labels is None
    return labelled, make_named("Digits", steps=3, target=plain)


SHELLS = {
    "gymnasium": DiffusionEnv,
    "vector": lambda mdp: DiffusionVectorEnv(mdp, 4),
    "numpy": lambda mdp: NumpyVectorEnv(DiffusionVectorEnv(mdp, 4)),
    "stable-baselines3": lambda mdp: SB3VecEnv(DiffusionVectorEnv(mdp, 4)),
}


def played(env, steps):
    """What two episodes of random actions show and pay."""
    source, seen = np.random.default_rng(0), []
    vec = isinstance(env, SB3VecEnv)
    if vec:
        env.seed(5)
    else:
        env.reset(seed=5)
    for _ in range(2):
        observation = env.reset() if vec else env.reset()[0]
        for _ in range(steps):
            seen.append(observation)
            action = source.normal(size=observation["sample"].shape).astype(np.float32)
            observation, reward, *_ = env.step(action)
            seen.append({**observation, "reward": reward})
    return seen


@pytest.mark.parametrize("shell", SHELLS)
def test_labels_change_nothing_that_an_environment_without_conditions_shows(shell, digits):
    """Nor what it pays, by its default reward."""
    ours, theirs = (played(SHELLS[shell](mdp), mdp.steps) for mdp in digits)
    assert any(np.any(np.asarray(shown.get("reward", 0.0))) for shown in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() and "condition" not in one
        for name, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def test_labels_change_nothing_that_a_target_draws_without_conditions(digits):
    drawn = []
    for mdp in digits:
        generator = torch.Generator().manual_seed(0)
        real = mdp.target.sample(50, generator), mdp.target.draw(50, generator, mdp.kind)[0]
        passes, given = mdp.target.draw_in_passes(50, 1290, 3, generator, mdp.kind)
        assert given is None
        start = mdp.episodes(9, generator).initial(9, generator)
        drawn.append([*real, passes, mdp.target.sample_fresh(50, 3), start, generator.get_state()])
    assert all(torch.equal(*parts) for parts in zip(*drawn, strict=True))


def test_a_reward_sees_the_classes():
    def reward(sample, condition):
        return -(sample - CENTRES[condition]).square().sum(1)

    mdp = make_mdp(reward=reward)
    episodes = mdp.episodes(3, condition=torch.tensor([2, 0, 1]))
    finished = CENTRES[[2, 0, 0]]
    torch.testing.assert_close(episodes.terminal_reward(finished), torch.tensor([0.0, 0.0, -4.25]))


def test_the_shells_show_and_take_a_condition():
    env = gym.make_vec("fewstep/Digits-v0", num_envs=5, steps=2, conditional=True)
    observation, _ = env.reset(seed=0)
    assert observation["condition"].dtype == torch.int64
    assert observation["condition"].shape == (5,)
    assert env.observation_space["condition"].nvec.tolist() == [10] * 5
    observation, _ = env.reset(options={"condition": torch.arange(5)})
    assert observation["condition"].tolist() == [0, 1, 2, 3, 4]
    assert env.reset(options={"condition": 7})[0]["condition"].tolist() == [7] * 5
    for condition, error, complaint in (
        (11, ValueError, "There are 10 classes, 0 to 9; got 11"),
        (torch.zeros(5), TypeError, "whole numbers"),
        (torch.arange(4), ValueError, "4 classes were given for 5 samples"),
    ):
        with pytest.raises(error, match=complaint):
            env.reset(options={"condition": condition})
    single = gym.make("fewstep/Digits-v0", steps=2, conditional=True)
    check_env(single.unwrapped, skip_render_check=True)
    assert single.reset(options={"condition": 3})[0]["condition"] == 3


def test_conditions_and_environments_have_to_agree():
    with pytest.raises(ValueError, match="this environment is unconditional"):
        make_mdp(conditional=False).episodes(3, condition=1)
    with pytest.raises(ValueError, match="the samples of SwissRoll have no labels"):
        gym.make_vec("fewstep/SwissRoll-v0", num_envs=2, conditional=True)
    plain = Denoiser(ResidualMLP((2,)), PROCESS)
    for mdp, denoiser, complaint in (
        (make_mdp(), plain, "3 classes and the denoiser is unconditional"),
        (make_mdp(False), make_denoiser(), "conditional and the environment is not"),
        (make_mdp(), make_denoiser().given(1), "under a condition of its own"),
        (make_mdp(), Denoiser(ResidualMLP((2,), classes=4), PROCESS), "knows 4 classes"),
    ):
        with pytest.raises(ValueError, match=complaint):
            SFT(mdp, denoiser)


def test_known_pixels_are_those_of_the_class():
    samples, labels = labelled()
    target = Target("Three", samples, labels=labels)
    schedule = Schedule.uniform(PROCESS, 4)
    mask = torch.tensor([True, False])
    mdp = Inpainting(target, PROCESS, schedule, no_reward, True, mask=mask)
    classes = torch.tensor([0, 1, 2] * 20)
    drawn = mdp.episodes(60, torch.Generator().manual_seed(0), condition=classes)
    nearest = torch.cdist(drawn.known, CENTRES).argmin(1)
    assert torch.equal(nearest, classes)
    assert len(drawn.known.unique(dim=0)) > 40
    both = mdp.episodes(60, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cdist(both.known, CENTRES).argmin(1), both.condition)
    rows = torch.tensor([5, 1])
    assert torch.equal(drawn.at(rows).known, drawn.known[rows])
    assert torch.equal(drawn.at(rows).condition, classes[rows])
    with pytest.raises(ValueError, match="give the condition of the known samples, too"):
        mdp.episodes(2, known=samples[:2])


def test_a_caller_may_change_the_condition_that_it_was_shown():
    env = DiffusionVectorEnv(make_mdp(), 4)
    shown = env.reset(seed=0)[0]["condition"]
    before = shown.clone()
    shown.fill_(7)
    assert torch.equal(env.step(torch.zeros(4, 2))[0]["condition"], before)


def test_labels_and_rewards_that_do_not_go_with_conditions_are_refused():
    samples, labels = labelled()
    target = Target("Three", samples, labels=labels - 1)
    with pytest.raises(ValueError, match="classes are 0 and above"):
        DiffusionMDP(target, PROCESS, Schedule.uniform(PROCESS, 2), no_reward, True)
    with pytest.raises(TypeError, match="this reward needs the condition"):
        make_mdp(False, reward=lambda sample, condition: sample.sum(1))
    with pytest.raises(TypeError, match="A condition is a class 0 to 2"):
        make_mdp().episodes(2, condition="ab")


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", ["ancestral", "dpm-solver++-2m", "heun", "unipc-2"])
def test_solvers_sample_a_guided_view_as_the_network_made_by_hand(name):
    view, by_hand = pair()
    table = make_solver(name, Schedule.uniform(PROCESS, 5, end=0 if name == "ancestral" else 1))
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        sample(table, each, noise, shape=(2,), generator=torch.Generator().manual_seed(1))
        for each in (view, by_hand)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert SolverPolicy(table, view).nfe == 2 * table.nfe


def shown_to(view, condition, n=6):
    """An environment's observation, under the condition that a view waits for, if it does."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).numpy()
    observation = {"sample": noise, "timestep": np.full((n, 1), 100, np.float32)}
    return {**observation, "condition": np.full(n, condition)} if view.is_open else observation


def waiting_pair(condition):
    """The pair, of which the view is told the condition by each observation."""
    view, by_hand = pair(condition)
    return make_denoiser().given(guidance=view.conditioning.guidance), by_hand


guided_pairs = pytest.mark.parametrize(
    ("make", "condition"), [(pair, 1), (pair, CAPTION), (waiting_pair, 1)]
)


@guided_pairs
@pytest.mark.parametrize("name", ["ancestral", "dpm-solver++-2m"])
def test_a_solver_acts_on_a_guided_view_as_on_the_network_made_by_hand(name, make, condition):
    schedule = Schedule.uniform(PROCESS, 4, end=0 if name == "ancestral" else 1)
    paths = []
    for denoiser in make(condition):
        policy = SolverPolicy(make_solver(name, schedule), denoiser, shape=(2,))
        observation, state = shown_to(denoiser, condition), None
        generator, path = torch.Generator().manual_seed(1), []
        for time in schedule.times[1:]:
            action, state = policy.predict(observation, state, generator=generator)
            path.append(action)
            moved = {"sample": action, "timestep": np.full((6, 1), time, np.float32)}
            observation = {**observation, **moved}
        paths.append(path)
    np.testing.assert_allclose(*paths, rtol=1e-3, atol=1e-3)


@guided_pairs
def test_a_policy_of_stable_baselines_acts_on_a_guided_view_as_on_the_network_made_by_hand(
    make, condition
):
    """Actions, their densities, and how these change with the weights."""
    found, weights = [], []
    for denoiser in make(condition):
        mdp = make_mdp(conditional=denoiser.is_open)
        table = make_solver("ancestral", mdp.schedule, variance="small", last_std=0.1)
        spaces = SB3VecEnv(DiffusionVectorEnv(mdp, 6))
        policy = DenoiserPolicy(
            spaces.observation_space, spaces.action_space, lambda _: 1e-3, denoiser, table
        )
        observation = shown_to(denoiser, condition)
        torch.manual_seed(0)
        mean, drawn = (policy.predict(observation, deterministic=flag)[0] for flag in (True, False))
        asked = {name: torch.as_tensor(value) for name, value in observation.items()}
        _, density, entropy = policy.evaluate_actions(asked, torch.zeros(6, 2))
        density.mean().backward()
        found.append([*map(torch.as_tensor, (mean, drawn)), density.detach(), entropy.detach()])
        body = denoiser.body if denoiser.conditions is not None else denoiser.body.body
        weights.append(torch.cat([part.grad.flatten() for part in body.parameters()]))
    assert not torch.equal(*found[0][:2]) and weights[0].abs().max() > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3 * float(weights[1].abs().max()))


def test_an_agent_samples_each_class_that_it_is_asked_for():
    agent = SFT(make_mdp(), make_denoiser().given(guidance=2.0))
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 0, 1, 2])

    def draw(condition):
        generator = torch.Generator().manual_seed(1)
        return agent.sample(6, noise=noise, generator=generator, condition=condition)

    together = draw(classes)
    for label in range(3):
        torch.testing.assert_close(together[classes == label], draw(label)[classes == label])
    assert agent.nfe == 8
    observation = {"sample": noise.numpy(), "timestep": np.full(6, 100, np.float32)}
    moved, _ = agent.predict({**observation, "condition": classes.numpy()}, deterministic=True)
    one, _ = agent.predict({**observation, "condition": np.full(6, 2)}, deterministic=True)
    np.testing.assert_allclose(moved[classes == 2], one[classes == 2], rtol=1e-5)


# -------------------------------------------------------------------------------------- learners

SMALL = {"batch_size": 16, "n_critic": 2, "learning_rate": 1e-3}
# Small noise in the last step, and rounds of theta from the first on.
CHAIN = {"solver_options": {"variance": "small", "last_std": 0.1}, "critic_rounds": 0}


@pytest.mark.parametrize("kind", [BehaviorCloning, SFTPG, SFT, SFTV, VarianceLearning])
def test_labels_change_nothing_that_an_agent_learns_without_conditions(kind, digits):
    settings = {
        BehaviorCloning: {"rounds": 2, "batch_size": 16},
        VarianceLearning: {"kind": "sn", "rounds": 2, "batch_size": 8, "hidden": 8},
    }.get(kind, {**SMALL, "rounds": 2, "critic_rounds": 0})
    learned = []
    for mdp in digits:
        torch.manual_seed(0)
        mdp = mdp.with_reward(no_reward)
        denoiser = Denoiser(ResidualMLP((1, 8, 8), hidden=16, blocks=1), mdp.process)
        before = copy.deepcopy(denoiser.state_dict())
        agent = kind(mdp, denoiser, **settings).learn()
        after = denoiser.state_dict()  # with the second head that variance learning gives it
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert len(same) < len(after)
        learned.append([agent.sample(5), *after.values(), agent.generator.get_state()])
    assert all(torch.equal(*parts) for parts in zip(*learned, strict=True))


def test_real_samples_under_conditions_of_others_count_as_fakes():
    """A quarter of each batch; the other fakes and all real samples stay as they are."""
    settings = {**SMALL, **CHAIN, "critic_passes": 2, "critic_replay": 2}
    agent = SFT(make_mdp(), make_denoiser(), **settings, mismatched=0.25)
    target = agent.mdp.target
    known = target.take(len(target)).tolist()
    class_of = dict(zip(map(tuple, known), target.labels.tolist(), strict=True))
    seen, update = [], agent.critic.update

    def note(real, fake, *rest, conditions):
        seen.append((real, fake, *conditions))
        return update(real, fake, *rest, conditions=conditions)

    agent.critic.update = note
    trajectories = agent.collect()
    agent.train_critic(trajectories)
    assert len(seen) == 4
    own = trajectories.states[-1].split(16)
    for number, (real, fake, given, asked) in enumerate(seen):
        assert [class_of[tuple(row)] for row in real.tolist()] == given.tolist()
        shown = [class_of.get(tuple(row)) for row in fake.tolist()]
        assert None not in shown[:4] and shown[4:] == [None] * 12
        assert all(its != label for its, label in zip(shown[:4], asked.tolist()[:4], strict=True))
        if number < 2:
            assert torch.equal(fake[4:], own[number][4:])
    assert not any(tuple(row) in class_of for row in agent.replay.samples.tolist())
    with pytest.raises(ValueError, match="mismatched is for a conditional environment"):
        SFT(make_mdp(conditional=False), make_denoiser().given(1), **CHAIN, mismatched=0.25)
    with pytest.raises(ValueError, match="mismatched must be at least 0 and below 1"):
        SFT(make_mdp(), make_denoiser(), mismatched=1.0)


@pytest.mark.parametrize(("kind", "condition"), [(SFTPG, 1), (SFT, 1), (SFTV, 1), (SFTPG, CAPTION)])
def test_fine_tuning_a_guided_view_is_fine_tuning_the_network_made_by_hand(kind, condition):
    agents = []
    for denoiser in pair(condition):
        torch.manual_seed(0)
        agents.append(kind(make_mdp(conditional=False), denoiser, **SMALL, **CHAIN))
        agents[-1].learn(2 * agents[-1].timesteps_per_round)
    assert agents[0].rounds == 2
    assert_same_weights(agents[0].denoiser, agents[1].denoiser)


@pytest.mark.parametrize("condition", [1, pytest.param(CAPTION, marks=pytest.mark.slow)])
def test_distilling_on_a_guided_view_is_distilling_on_the_network_made_by_hand(condition):
    agents = [
        DODE(make_mdp(conditional=False), each, solver="ddim", batch_size=32, batches=4).learn()
        for each in pair(condition)
    ]
    # Of what was fitted: what is returned may be the given table with both.
    fitted = [np.concatenate(agent.lambdas) for agent in agents]
    np.testing.assert_allclose(*fitted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("condition", [1, pytest.param(CAPTION, marks=pytest.mark.slow)])
def test_a_schedule_learned_on_a_guided_view_is_that_of_the_network_made_by_hand(condition):
    settings = {"batch_size": 32, "batches": 1, "schedule_rounds": 4, "start": "environment"}
    agents = [
        ScheduleLearning(make_mdp(conditional=False), each, tuning_rounds=0, **settings)
        for each in pair(condition)
    ]
    batch = [agent.make_batches()[0] for agent in agents]
    slopes = [agent.slope(one).gradient for agent, one in zip(agents, batch, strict=True)]
    torch.testing.assert_close(*slopes, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("condition", [1, pytest.param(CAPTION, marks=pytest.mark.slow)])
def test_a_solver_learned_on_a_guided_view_is_that_of_the_network_made_by_hand(condition):
    """Teacher, starts and gradient by all that is learned."""
    settings = {"batch_size": 32, "batches": 1, "scale": 3, "start": "distilled"}
    agents = [
        SolverLearning(make_mdp(conditional=False), each, check_teacher=False, **settings)
        for each in pair(condition)
    ]
    ours, theirs = (agent.make_batches()[0] for agent in agents)
    torch.testing.assert_close(ours.finished, theirs.finished, rtol=1e-3, atol=1e-3)
    starts = [agent._starts()[0] for agent in agents]
    for agent, start in zip(agents, starts, strict=True):
        agent._descent.begin(start)
    slopes = [agent.slope([ours]).gradient for agent in agents]
    for found in (starts, slopes):
        assert found[0].keys() == {"times", "factors", "weights", "shifts"}
        for name, value in found[0].items():
            size = float(value.abs().max())
            torch.testing.assert_close(value, found[1][name], rtol=1e-2, atol=1e-2 * size)


@pytest.mark.parametrize("condition", [1, pytest.param(CAPTION, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:RDPO made:UserWarning")
def test_rewards_on_a_guided_view_are_those_of_the_network_made_by_hand(condition):
    """Each episode's, under its own table, and so where the policy gradient goes."""
    settings = {"batch_size": 16, "held_out": 24, "rounds": 2, "check_interval": 2}
    mdp = make_mdp(conditional=False, reward=lambda sample: -sample.square().sum(1))
    agents = [RDPO(mdp, each, **settings) for each in pair(condition)]
    (drawn, ours), (_, theirs) = (agent._play_episodes() for agent in agents)
    assert drawn.std(0).min() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    means = [agent.learn().distribution.mean.detach() for agent in agents]
    assert means[0].abs().max() > 0
    torch.testing.assert_close(*means, rtol=1e-2, atol=1e-2)
    assert agents[0].rewards == pytest.approx(agents[1].rewards, rel=1e-3)


@pytest.mark.parametrize(("kind", "condition"), [("gamma", 1), ("sn", 1), ("sn", CAPTION)])
def test_variances_of_a_guided_view_are_those_of_the_network_made_by_hand(kind, condition):
    few = {"samples_per_time": 4} if kind == "gamma" else {"rounds": 3}
    learned = []
    for each in pair(condition):
        VarianceLearning(make_mdp(conditional=False), each, kind=kind, **few).learn()
        head = each.head.state_dict().values() if each.head is not None else [each.gamma]
        learned.append([part.double() for part in head])
    assert_close_by_norm(*learned, rtol=5e-4)


FRESH = {
    "held out without labels": {"held_out": labelled(400)[0]},
    "a generator": {"sampler": lambda n, seed: labelled(n)[0]},
}


@pytest.mark.parametrize("fresh", FRESH)
def test_variances_are_compared_where_fresh_samples_have_no_labels(fresh):
    samples, labels = labelled()
    target = Target("Three", samples, labels=labels, **FRESH[fresh])
    mdp = DiffusionMDP(target, PROCESS, Schedule.uniform(PROCESS, 4), no_reward, True)
    agent = VarianceLearning(mdp, make_denoiser(), kind="sn", rounds=1, batch_size=8, hidden=8)
    agent.learn()
    assert math.isfinite(agent.errors["returned"])
    assert all(len(part.condition) == len(part.noisy) == 64 for part in agent._held_out)


@pytest.mark.parametrize(
    "kind", [SFTPG, SFT, SFTV, DODE, ScheduleLearning, SolverLearning, RDPO, VarianceLearning]
)
def test_every_learner_acts_under_the_classes_that_the_environment_shows(kind):
    settings = {
        DODE: {"solver": "ddim", "batch_size": 16, "batches": 1},
        ScheduleLearning: {
            "batch_size": 16,
            "batches": 1,
            "schedule_rounds": 2,
            "start": "environment",
            "tuning_rounds": 1,
        },
        # The times are whole noisings only.
        SolverLearning: {
            "solver": "ddim",
            "batch_size": 16,
            "batches": 2,
            "rounds": 1,
            "optimizer": "adam",
            "adversarial": 0.1,
            "check_teacher": False,
            "start": "distilled",
        },
        RDPO: {
            "solver": "ddim",
            "batch_size": 16,
            "held_out": 16,
            "rounds": 1,
            "learn_times": False,
            "learn_shifts": False,
        },
        VarianceLearning: {"samples_per_time": 1},
    }.get(kind, {**SMALL, **CHAIN})
    seen = []

    def note(_module, arguments):
        seen.append(arguments[2].detach().unique().tolist())

    denoiser = make_denoiser().given(guidance=2.0)
    agent = kind(make_mdp(), denoiser, **settings)
    hook = agent.denoiser.body.register_forward_pre_hook(note)
    agent.learn(agent.timesteps_per_round)
    hook.remove()
    # Each class, and none of them for the other half.
    assert any(labels == [0, 1, 2, 3] for labels in seen)
    assert all(3 in labels for labels in seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"diffusion_weight": 0.1},
        {"gradient": "eq14", "solver": "euler"},
        {"start": "diffusion-dp"},
        {"tuning_weights": "lambda"},
        {"tuning_weights": "original"},
    ],
)
def test_the_parts_of_schedule_learning_that_read_data_ask_under_its_classes(settings):
    few = {"batch_size": 60, "batches": 1, "schedule_rounds": 1, "tuning_rounds": 1, "scale": 2}
    common = {"start": "environment", "check_teacher": False, "tuning_batch_size": 200, "ema": 0.0}
    denoiser, agreed = make_denoiser(), []
    agent = ScheduleLearning(make_mdp(steps=20), denoiser, **{**few, **common, **settings})

    def note(_module, arguments):
        x, time, labels = arguments
        last = time < 20  # the noise is small
        if last.any():
            nearest = torch.cdist(x[last].detach(), CENTRES).argmin(1)
            agreed.append(float((nearest == labels[last]).float().mean()))

    asked = {
        "diffusion_weight": lambda: agent.slope(agent.make_batches()[0]),
        "gradient": lambda: agent.slope(agent.make_batches()[0]),
        "start": lambda: agent._programme.levels(agent._pool, denoiser, agent._base),
        "tuning_weights": lambda: agent._tuning._loss(agent.tableau, agent.levels, agent.generator),
    }
    hook = denoiser.body.register_forward_pre_hook(note)
    asked[next(iter(settings))]()
    hook.remove()
    # Rollouts of a network of no use end anywhere, and real samples near the centre of their class.
    if "gradient" not in settings:
        assert max(agreed) > 0.8
    agent.learn()
    assert agent.done and agent.sample(3).isfinite().all()


@pytest.mark.slow
def test_cloning_learns_the_classes_and_what_is_common_to_them():
    mdp = make_mdp(steps=10)
    denoiser = new_denoiser(mdp)
    assert denoiser.classes == 3 and not denoiser.conditioning.drops
    agent = BehaviorCloning(mdp, denoiser, rounds=300, batch_size=128, learning_rate=3e-3)
    agent.learn()
    trained = agent.sampling_denoiser
    assert trained.conditioning.drops
    policy = SFT(mdp, copy.deepcopy(trained).requires_grad_(True))
    for label in range(3):
        drawn = policy.sample(400, condition=label)
        torch.testing.assert_close(drawn.mean(0), CENTRES[label], rtol=0, atol=0.15)
    without = trained.given(None)
    table = make_solver("ancestral", mdp.schedule, variance="small")
    drawn = sample(table, without, 600, shape=(2,))
    nearest = torch.cdist(drawn, CENTRES).argmin(1)
    assert (torch.bincount(nearest, minlength=3) > 100).all()


def test_cloning_leaves_the_caller_s_denoiser_and_refuses_guidance():
    mdp, denoiser = make_mdp(), make_denoiser(drops=False)
    agent = BehaviorCloning(mdp, denoiser, rounds=1)
    assert not denoiser.conditioning.drops
    agent.learn()
    assert denoiser.conditioning.drops
    with pytest.raises(ValueError, match="without guidance"):
        BehaviorCloning(mdp, make_denoiser().given(guidance=2.0))


@pytest.mark.parametrize("kind", [SFTV, DODE])
def test_a_checkpoint_knows_its_guidance(kind, tmp_path):
    settings = {"solver": "ddim", "batch_size": 16, "batches": 1} if kind is DODE else SMALL
    agent = kind(make_mdp(), make_denoiser().given(guidance=2.0), **settings)
    agent.learn(agent.timesteps_per_round)
    agent.save(tmp_path / "agent")
    same = kind(make_mdp(), make_denoiser().given(guidance=2.0), **settings)
    same.resume(tmp_path / "agent")
    for mdp, other in (
        (make_mdp(), make_denoiser().given(guidance=3.0)),
        (make_mdp(False), make_denoiser().given(1, 2.0)),
    ):
        with pytest.raises(CheckpointError, match=r"conditional|given"):
            kind(mdp, other, **settings).resume(tmp_path / "agent")


def test_no_label_is_dropped_if_none_is_to_be():
    mdp = make_mdp()
    agent = BehaviorCloning(mdp, new_denoiser(mdp), rounds=1, label_dropout=0.0)
    agent.learn()
    assert not agent.sampling_denoiser.conditioning.drops


def test_a_critic_tells_the_classes_apart():
    torch.manual_seed(0)
    critic = IPMCritic(
        make_critic((2,), classes=3),
        "r1",
        baseline=make_baseline((2,), 4, classes=3),
        objective="logistic",
    )
    real, labels = labelled()
    # The same points under other classes: only a critic that knows the classes can tell.
    wrong = (labels + 1) % 3
    for _ in range(60):
        critic.update(real, real, real.expand(4, -1, -1), None, (labels, wrong))
    assert float((critic(real, labels) > critic(real, wrong)).float().mean()) > 0.95
    value = critic.value(real.expand(4, -1, -1), None, wrong)
    assert value.shape == (4, len(real))
    with pytest.raises(ValueError, match="This critic is conditional"):
        critic(real)
    with pytest.raises(ValueError, match="spectral-norm does not bound"):
        IPMCritic(make_critic((2,), classes=3), "spectral-norm")


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_conditional_networks_of_images_start_unconditional(kind):
    x, classes = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    critic, baseline = (
        make_critic((1, 8, 8), classes=3),
        make_baseline((1, 8, 8), 2, kind, classes=3),
    )
    assert torch.equal(critic(x, classes), critic(x, classes.flip(0)))
    rows = torch.stack([x, x])
    assert baseline(rows, None, classes).shape == (2, 3)
    nn.init.normal_(baseline.projection.weight)
    nn.init.normal_(critic.projection.weight)
    assert not torch.equal(critic(x, classes), critic(x, classes.flip(0)))
    each = torch.stack([baseline(x, torch.tensor([j] * 3), classes) for j in range(2)])
    torch.testing.assert_close(baseline(rows, None, classes), each, rtol=1e-4, atol=1e-5)


def test_bodies_without_classes_say_so():
    mdp = make_mdp()
    with pytest.raises(ValueError, match="Body 'mlp' knows no classes"):
        new_denoiser(mdp, body="mlp")
    assert isinstance(new_denoiser(mdp).body, ResidualMLP)
    assert isinstance(new_denoiser(make_mdp(False)).body, MLP)
    body = SmallUNet((1, 8, 8), width=8, classes=2)
    x, time = torch.randn(2, 1, 8, 8), torch.zeros(1).expand(2)
    apart = body(x[:1].expand(2, -1, -1, -1), time, torch.tensor([0, 1]))
    nn.init.normal_(body.label.weight, std=3.0)
    assert body(x, time, torch.tensor([0, 1])).shape == x.shape
    assert apart.shape == x.shape


def test_stable_baselines_trains_a_conditional_policy():
    from stable_baselines3 import PPO

    mdp = make_mdp(reward=lambda sample: -sample.square().sum(1))
    table = make_solver("ancestral", mdp.schedule, variance="small", last_std=0.1)
    kwargs = {"denoiser": make_denoiser().given(guidance=2.0), "tableau": table}
    env = SB3VecEnv(DiffusionVectorEnv(mdp, 8))
    model = PPO(DenoiserPolicy, env, n_steps=4, batch_size=16, n_epochs=1, policy_kwargs=kwargs)
    model.learn(64)
    observation = env.reset()
    action, _ = model.predict(observation)
    assert action.shape == (8, 2)
    with pytest.raises(ValueError, match="The environment shows 3 classes"):
        PPO(
            DenoiserPolicy,
            env,
            policy_kwargs={"denoiser": Denoiser(ResidualMLP((2,)), PROCESS), "tableau": table},
        )
