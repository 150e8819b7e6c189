"""Variance learning: Gamma and heads against closed forms, its files, and SFT-PG on top of it."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from fewstep.agents import SFT, SFTPG, CheckpointError, Denoiser, VarianceLearning
from fewstep.agents.denoisers.exact import MixtureBody
from fewstep.agents.denoisers.networks import ResidualMLP, SmallUNet
from fewstep.agents.policies import DenoiserPolicy
from fewstep.agents.samplers.gaussian import GaussianChain
from fewstep.agents.samplers.solver_policy import SolverPolicy
from fewstep.agents.solvers import ancestral, make_solver
from fewstep.envs import VE, DiffusionMDP, DiscreteVP, RectifiedFlow, Schedule, Target

pytestmark = pytest.mark.numeric

PROCESS = DiscreteVP([0.02, 0.1, 0.2, 0.3, 0.5, 0.99])
KINDS = ["gamma", "sn", "npr"]


class Shown(nn.Module):
    """The exact noise of a mixture, wrong by a constant, that shows what its last layer reads."""

    def __init__(self, process, means, std, bias=0.0):
        super().__init__()
        self.exact, self.bias = MixtureBody(process, means, std), bias
        self.out = nn.Linear(2 * means.shape[1], means.shape[1], bias=False)
        self.out.weight.data = torch.eye(2 * means.shape[1])[means.shape[1] :]

    def forward(self, sample, time):
        return self.out(torch.cat([sample, self.exact(sample, time) + self.bias], dim=1))


def mixture_world(means, std, bias=0.0, schedule=None):
    """A decision process on a mixture of equal weights, and its denoiser."""
    means = torch.tensor(means)

    def draw(n, seed):
        rng = torch.Generator().manual_seed(seed)
        which = torch.randint(len(means), (n,), generator=rng)
        return means[which] + std * torch.randn(n, means.shape[1], generator=rng)

    schedule = schedule or Schedule.uniform(PROCESS, 6)
    target = Target.from_sampler(draw, "mixture", 20_000)
    mdp = DiffusionMDP(target, PROCESS, schedule, lambda sample: sample.sum(1))
    denoiser = Denoiser(Shown(PROCESS, means, std, bias), PROCESS, sigma_data=target.std)
    return mdp, denoiser


def second_moment(sample, t, means, std):
    """E[eps^2 | x_t], elementwise (MATH.md A.5)."""
    means = torch.tensor(means)
    alpha, sigma = (level(t).float()[:, None] for level in (PROCESS.alpha, PROCESS.sigma))
    variance = (alpha * std) ** 2 + sigma**2
    offset = sample[:, None] - alpha[:, None] * means
    shares = torch.softmax(-offset.square().sum(2) / (2 * variance), dim=1)
    centres = means + (alpha * std**2 / variance)[:, None] * offset
    noise = (sample[:, None] - alpha[:, None] * centres) / sigma[:, None]
    spread = (alpha * std) ** 2 / variance
    return (shares[..., None] * (noise.square() + spread[:, None])).sum(1)


def gamma_by_quadrature(means, std):
    """E epsilon(x_n)^2 of a mixture on a line, for n = 1 .. T."""
    body = MixtureBody(PROCESS, torch.tensor(means, dtype=torch.float64), std)
    values = []
    for n in range(1, 7):
        alpha, sigma = PROCESS.levels(float(n))
        width = np.hypot(alpha * std, sigma)
        centres = alpha * np.ravel(means)

        def integrand(x, n=n, width=width, centres=centres):
            density = np.exp(-(((x - centres) / width) ** 2) / 2).mean() / width
            point, time = torch.full((1, 1), x, dtype=torch.float64), torch.full((1,), n - 1.0)
            return density * float(body(point, time)) ** 2 / np.sqrt(2 * np.pi)

        values.append(quad(integrand, -8, 8, points=centres.tolist(), limit=200)[0])
    return np.array(values)


@torch.no_grad()
def test_gamma_of_a_mixture():
    means, std = [[0.7], [-0.2]], 0.15
    mdp, denoiser = mixture_world(means, std)
    agent = VarianceLearning(mdp, denoiser, batch_size=3000, samples_per_time=20_000)
    assert agent.budget == 40
    agent.learn(10**9)
    assert agent.done
    assert agent.rounds == 40
    exact = gamma_by_quadrature(means, std)
    assert denoiser.gamma.shape == (6,)
    # Five standard errors of a mean of squares of a few standard normals, at most.
    np.testing.assert_allclose(denoiser.gamma, exact, atol=5 * np.sqrt(2 / 20_000))
    # At the noisy end the known size of the noise takes nearly all of the error away.
    assert 1 - exact[-1] < 1e-3
    assert abs(denoiser.gamma[-1] - exact[-1]) < 1e-3
    assert agent.tableau.name == "analytic-dpm (unclipped)"
    expected = make_solver("analytic-dpm", mdp.schedule, denoiser, **agent.solver_options)
    assert agent.tableau.to_json() == expected.to_json()


@torch.no_grad()
def test_the_control_variate_changes_the_error_and_not_the_mean():
    means, std = [[0.7], [-0.2]], 0.15
    exact = gamma_by_quadrature(means, std)
    estimates = []
    for seed in range(60):
        mdp, denoiser = mixture_world(means, std)
        VarianceLearning(mdp, denoiser, batch_size=600, samples_per_time=100, seed=seed).learn(
            10**9
        )
        estimates.append(denoiser.gamma.numpy())
    error = np.std(estimates, axis=0)
    assert (abs(np.mean(estimates, axis=0) - exact) < 4 * error / np.sqrt(60) + 1e-6).all()
    # A plain mean of 100 squares of standard normals has an error of sqrt(2 / 100).
    assert error[-1] < 0.05 * np.sqrt(2 / 100)


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_heads_learn_the_closed_forms(kind, generator):
    """The network is wrong by 0.5: SN learns E[eps^2 | x_t] all the same, NPR adds the square."""
    means, std, bias = [[0.6, 0.3], [-0.5, -0.2]], 0.3, 0.5
    mdp, denoiser = mixture_world(means, std, bias)
    body = {name: weight.clone() for name, weight in denoiser.body.state_dict().items()}
    agent = VarianceLearning(
        mdp, denoiser, kind=kind, batch_size=1024, learning_rate=1e-2, hidden=64
    )
    rng = generator(5)
    t = torch.randint(1, 7, (4000,), generator=rng)
    noisy = PROCESS.add_noise(
        mdp.target.sample_fresh(4000, 3), t, torch.randn(4000, 2, generator=rng)
    )
    with torch.no_grad():
        _, read = denoiser.head_inputs(noisy, t)
    expected = second_moment(noisy, t, means, std)
    if kind == "npr":
        expected = expected - (read.epsilon - bias) ** 2 + bias**2

    def error():
        with torch.no_grad():
            return float((agent.denoiser.head(*read) - expected).square().mean())

    before = error()
    agent.learn(400 * agent.timesteps_per_round)
    # What is left is the noise of 400 batches: eps^2 has a standard deviation of 1.4.
    assert error() < (0.15 if kind == "sn" else 0.45) * before
    assert error() < 0.3 * float(expected.var())
    for name, weight in denoiser.body.state_dict().items():
        assert torch.equal(weight, body[name])
    assert agent.tableau.name == f"{kind}-ddpm (unclipped)"
    assert agent.sample(3, generator=generator()).isfinite().all()


def test_a_convolutional_head_learns_on_any_process(generator):
    process = VE(0.01, 10.0)
    images = torch.rand(50, 1, 8, 8, generator=generator()) * 2 - 1
    target = Target.from_samples(images, "images")
    mdp = DiffusionMDP(target, process, Schedule.karras(process, 3), lambda x: x.flatten(1).sum(1))
    body = SmallUNet((1, 8, 8), width=8, time_range=(-1.2, 0.6))
    denoiser = Denoiser(body, process, "edm")
    agent = VarianceLearning(mdp, denoiser, kind="npr", batch_size=8, hidden=8, ema=0.0)
    first = copy.deepcopy(agent._learner._head.state_dict())
    agent.learn(3 * agent.timesteps_per_round)
    learned = agent._learner._head.state_dict()
    assert all(not torch.equal(learned[key], first[key]) for key in first)
    assert agent.tableau.name == "npr-ddpm"
    assert agent.sample(2, generator=generator()).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"DiscreteVP, and this is VE.*'sn' and 'npr'"):
        VarianceLearning(mdp, denoiser, kind="gamma")


SETTINGS = {"batch_size": 50, "samples_per_time": 64, "hidden": 8, "ema": 0.9}


def same_samples(one, other):
    ours, theirs = (
        agent.sample(64, generator=torch.Generator().manual_seed(2)) for agent in (one, other)
    )
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, mdp, make_denoiser, tmp_path):
    rounds = 6
    settings = {"kind": kind, "rounds": rounds, **SETTINGS}
    whole = VarianceLearning(mdp, make_denoiser(), **settings)
    assert whole.budget == rounds
    whole.learn()
    half = VarianceLearning(mdp, make_denoiser(), **settings)

    def killed(local, _global):
        return local["self"].rounds < 2

    half.learn(callback=killed)
    assert half.rounds == 2
    assert not half.done
    half.save(tmp_path / "half")
    resumed = VarianceLearning(mdp, make_denoiser(), **settings)
    resumed.resume(tmp_path / "half")
    assert same_samples(half, resumed)
    resumed.learn(reset_num_timesteps=False)
    assert resumed.rounds == rounds and resumed.done
    assert resumed.finished == (kind == "gamma")
    assert resumed.num_timesteps == whole.num_timesteps
    for ours, theirs in zip(
        resumed.denoiser.parameters(), whole.denoiser.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
    if kind == "gamma":
        assert torch.equal(resumed.denoiser.gamma, whole.denoiser.gamma)
    assert same_samples(resumed, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, mdp, make_denoiser, tmp_path):
    agent = VarianceLearning(mdp, make_denoiser(), kind=kind, per_pixel=False, **SETTINGS)
    agent.learn(3 * agent.timesteps_per_round)
    agent.save(tmp_path / "agent")
    again = VarianceLearning.load(tmp_path / "agent", mdp)
    assert again.settings == agent.settings
    assert again.solver_options == agent.solver_options
    assert same_samples(again, agent)
    # The denoiser in the file samples without the agent.
    denoiser = Denoiser.load(tmp_path / "agent")
    table = make_solver(agent.solver, mdp.schedule, denoiser, **agent.solver_options)
    assert table.to_json() == agent.tableau.to_json()
    with pytest.raises(CheckpointError, match="written by 'variance'"):
        SFTPG.load(tmp_path / "agent", mdp)


def test_a_better_head_of_another_size_stays(make_denoiser, mdp, tmp_path):
    """It is used as the settings say, and files keep its size."""
    denoiser = make_denoiser()
    good = VarianceLearning(
        mdp, denoiser, kind="sn", rounds=100, batch_size=256, hidden=16, learning_rate=1e-2
    )
    good.learn()
    assert good.returned == "learned"
    had = {name: weight.clone() for name, weight in denoiser.head.state_dict().items()}
    settings = {"kind": "sn", "rounds": 2, "batch_size": 256, "hidden": 8, "per_pixel": False}
    agent = VarianceLearning(mdp, denoiser, **settings)
    agent.learn()
    assert agent.returned == "given"
    assert agent.errors["given"] == agent.errors["returned"] < agent.errors["learned"]
    for head in (denoiser.head, agent.denoiser.head):
        assert (head.config["hidden"], head.per_pixel) == (16, False)
        assert all(torch.equal(head.state_dict()[name], weight) for name, weight in had.items())
    agent.save(tmp_path / "agent")
    again = VarianceLearning.load(tmp_path / "agent", mdp)
    other = VarianceLearning(mdp, make_denoiser(), **settings)
    other.resume(tmp_path / "agent")
    for each in (again, other):
        assert each.denoiser.head.config == agent.denoiser.head.config
        assert same_samples(each, agent)


def test_a_worse_head_of_another_size_is_replaced(make_denoiser, mdp, tmp_path):
    denoiser = make_denoiser()
    VarianceLearning(mdp, denoiser, kind="sn", rounds=1, batch_size=8, hidden=16).learn()
    nn.init.constant_(denoiser.head.layers[-1].bias, 20.0)
    agent = VarianceLearning(mdp, denoiser, kind="sn", rounds=1, batch_size=256, hidden=8)
    assert agent.denoiser.head.config["hidden"] == 16
    agent.learn()
    assert agent.returned == "learned"
    for head in (denoiser.head, agent.denoiser.head):
        assert head.config["hidden"] == 8
        assert all(parameter.requires_grad for parameter in head.parameters())
    # The head that was given is of the other size in the file.
    agent.save(tmp_path / "agent")
    again = VarianceLearning.load(tmp_path / "agent", mdp)
    assert same_samples(again, agent)
    assert again._losses(1)["given"].equal(agent._losses(1)["given"])


def test_files_without_the_sizes_of_heads_are_read(make_denoiser, mdp):
    agent = VarianceLearning(mdp, make_denoiser(), kind="npr", rounds=1, **SETTINGS)
    agent.learn()
    tree = agent.tree()
    del tree["state"]["configs"]
    again = VarianceLearning(mdp, make_denoiser(), kind="npr", rounds=1, **SETTINGS)
    numbers = torch.get_rng_state()
    again.restore(tree)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert same_samples(again, agent)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**63 - 1])
def test_large_seeds_learn(seed, make_denoiser, mdp):
    agent = VarianceLearning(mdp, make_denoiser(), kind="sn", rounds=1, seed=seed, **SETTINGS)
    agent.learn()
    assert math.isfinite(agent.errors["returned"])


@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("name", ["zero-snr", "flow"])
def test_a_process_without_signal_at_its_end_has_no_head(name, kind, generator):
    flow = name == "flow"
    process = RectifiedFlow() if flow else DiscreteVP.linear(50).zero_terminal_snr()
    samples = torch.randn(100, 2, generator=generator())
    mdp = DiffusionMDP(Target("Cloud", samples), process, Schedule.uniform(process, 4))
    body = ResidualMLP((2,), hidden=8, blocks=1, time_range=(0, 1) if flow else None)
    denoiser = Denoiser(body, process, "flow" if flow else "v")
    with pytest.raises(ValueError, match=f"kind '{kind}' learns on .* signal"):
        VarianceLearning(mdp, denoiser, kind=kind)
    assert denoiser.head is None


def test_before_anything_is_known_it_is_ddpm(mdp, make_denoiser):
    agent = VarianceLearning(mdp, make_denoiser(), solver_options={"late_clip": 1e9})
    small = ancestral(mdp.schedule, "small", clip=True)
    np.testing.assert_allclose(agent.tableau.noise, small.noise, rtol=1e-12)
    assert agent.starting_tableau(make_denoiser()).to_json() == small.to_json()
    free = VarianceLearning(mdp, make_denoiser(), kind="sn")
    assert free.starting_tableau(make_denoiser()).name == "ancestral (small)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gama"}, "did you mean 'gamma'"),
        ({"kind": "sn", "solver": "analytic-dpm"}, "'sn' is learned for solver 'sn-ddpm'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"samples_per_time": 0}, "samples_per_time must be at least 1"),
        ({"kind": "npr", "ema": 1.0}, "ema must be at least 0 and below 1"),
        ({"kind": "npr", "lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"solver_options": {"late_clip": -1.0}}, "late_clip"),
        ({"solver_options": {"gamma": 1.0}}, "unknown option of solver 'analytic-dpm'"),
    ],
)
def test_bad_settings_are_refused(settings, message, mdp, make_denoiser):
    with pytest.raises(ValueError, match=message):
        VarianceLearning(mdp, make_denoiser(), **settings)


def test_a_network_without_features_is_refused(mdp, process):
    class Plain(nn.Module):
        def forward(self, sample, time):
            return sample

    with pytest.raises(ValueError, match="Plain has none"):
        VarianceLearning(mdp, Denoiser(Plain(), process), kind="sn")


# -- SFT-PG from these samplers --------------------------------------------------------------------

SAMPLERS = ["fast-dpm", "analytic-dpm", "sn-ddpm", "npr-ddpm"]
OPTIONS = {"fast-dpm": {"last_std": 0.05}}
NEEDS = {"analytic-dpm": "gamma", "sn-ddpm": "sn", "npr-ddpm": "npr"}
TINY = {"batch_size": 16, "n_critic": 1, "n_generator": 2, "minibatch_size": 32, "ema": 0.5}


@pytest.fixture
def prepared(mdp, make_denoiser):
    """`prepared(solver)`: a denoiser that has what the solver needs, learned a little."""

    def prepare(solver):
        denoiser = make_denoiser()
        if solver in NEEDS:
            agent = VarianceLearning(mdp, denoiser, kind=NEEDS[solver], **SETTINGS)
            agent.learn(4 * agent.timesteps_per_round)
        return denoiser

    return prepare


def options_of(solver):
    return OPTIONS.get(solver, {"last_std": 0.05, "clip": True, "late_clip": 5.0})


@pytest.mark.parametrize("learn_std", [False, True])
@pytest.mark.parametrize("solver", SAMPLERS)
def test_sft_pg_starts_from_any_of_them(solver, learn_std, mdp, prepared, tmp_path):
    denoiser = prepared(solver)
    options = {"solver": solver, "solver_options": options_of(solver), "learn_std": learn_std}
    agent = SFTPG(mdp, denoiser, clip_range=0.2, learning_rate=1e-2, **options, **TINY)
    heads = [] if denoiser.head is None else [p.clone() for p in denoiser.head.parameters()]
    start = agent.policy.log_std.detach().clone()
    agent.will_log = True
    metrics = agent.train_round()
    assert float(metrics["train/ratio_first_batch"]) == pytest.approx(1, abs=1e-6)
    agent.learn(4 * agent.timesteps_per_round)
    assert torch.equal(agent.policy.log_std, start) != learn_std
    for before, now in zip(heads, denoiser.head.parameters() if heads else [], strict=True):
        assert torch.equal(before, now) != learn_std
    assert np.array_equal(agent.tableau.noise, agent._tableau.noise) != learn_std
    agent.save(tmp_path / "agent")
    again = SFTPG.load(tmp_path / "agent", mdp)
    assert same_samples(again, agent)
    for ours, theirs in zip(again.policy.parameters(), agent.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    resumed = SFTPG(mdp, prepared(solver), clip_range=0.2, learning_rate=1e-2, **options, **TINY)
    resumed.resume(tmp_path / "agent")
    for each in (agent, resumed):
        each.learn(2 * each.timesteps_per_round, reset_num_timesteps=False)
    assert same_samples(resumed, agent)


def test_sft_differentiates_through_the_noise_of_each_pixel(mdp, prepared):
    denoiser = prepared("sn-ddpm")
    options = {"solver": "sn-ddpm", "solver_options": options_of("sn-ddpm"), "learn_std": True}
    before = denoiser.head.layers[-1].weight.clone()
    agent = SFT(mdp, denoiser, batch_size=16, n_critic=1, **options)
    agent.learn(2 * agent.timesteps_per_round)
    assert not torch.equal(denoiser.head.layers[-1].weight, before)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_the_chain_is_the_table(solver, mdp, prepared, play, generator):
    """Same states from the same draws; and so for the table with what was learned."""
    denoiser = prepared(solver)
    table = make_solver(solver, mdp.schedule, denoiser, **options_of(solver))
    chain = GaussianChain(denoiser, table, learn_std=True)
    noise = torch.randn(200, 2, generator=generator())
    for factors in (torch.zeros(4), torch.tensor([0.3, -0.5, 0.1, 0.7])):
        with torch.no_grad():
            chain.log_std += factors
            states = play(chain, noise, generator(1))
            expected = chain.export().sample(
                denoiser, noise, generator=generator(1), return_trajectory=True
            )
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
        order = torch.arange(200) % 4
        together = chain.log_density(states[1], noise, order)
        for j in range(4):
            alone = chain.log_density(states[1][order == j], noise[order == j], j)
            torch.testing.assert_close(together[order == j], alone, rtol=1e-4, atol=1e-4)


def test_a_learned_factor_multiplies_the_deviation_of_each_pixel(mdp, prepared, generator):
    denoiser = prepared("sn-ddpm")
    table = make_solver("sn-ddpm", mdp.schedule, denoiser, **options_of("sn-ddpm"))
    chain = GaussianChain(denoiser, table, learn_std=True)
    assert not chain.log_std.any()
    x, after = torch.randn(2, 6, 2, generator=generator())
    mean, std = chain.distribution(x, 1)
    assert std.shape == (6, 2)
    assert len(std.unique()) == std.numel()
    with torch.no_grad():
        chain.log_std[1] = 0.3
        torch.testing.assert_close(chain.distribution(x, 1)[1], math.exp(0.3) * std)
        chain.log_std[1] = 0.0
    chain.log_density(after, x, 1).sum().backward()
    z = ((after - mean) / std).detach()
    expected = torch.tensor([0, float((z.square() - 1).sum()), 0, 0])
    torch.testing.assert_close(chain.log_std.grad, expected)
    # A head that the chain reads but may not train; it changes no flag of the caller's denoiser.
    assert all(p.grad is not None for p in denoiser.head.parameters())
    assert set(denoiser.head.parameters()) <= set(chain.trained())
    denoiser.zero_grad()
    fixed = GaussianChain(denoiser, table)
    fixed.log_density(after, x, 1).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in denoiser.head.parameters())
    assert all(p.grad is not None for p in denoiser.body.parameters())
    assert set(fixed.trained()) == set(denoiser.body.parameters())


def test_steps_without_noise_of_their_own_have_no_density(mdp, prepared):
    denoiser = prepared("sn-ddpm")
    bare = make_solver("sn-ddpm", mdp.schedule, denoiser)
    with pytest.raises(ValueError, match="adds no noise in step 3 of 4"):
        GaussianChain(denoiser, bare)
    # Cov0 may be 0 somewhere: it is no noise to rely on.
    deterministic = make_solver("sn-ddpm", mdp.schedule, denoiser, eta=0.0, last_std=0.1)
    with pytest.raises(ValueError, match="adds no noise in step 0 of 4"):
        GaussianChain(denoiser, deterministic)


def test_policies_run_them(mdp, prepared, generator):
    denoiser = prepared("npr-ddpm")
    table = make_solver("npr-ddpm", mdp.schedule, denoiser, **options_of("npr-ddpm"))
    policy = SolverPolicy(table, denoiser)
    noise = torch.randn(5, 2, generator=generator())
    sample, state, rng = noise.numpy(), None, generator(1)
    for t in table.times[:-1]:
        observation = {"sample": sample, "timestep": np.full(5, t)}
        sample, state = policy.predict(observation, state, generator=rng)
    with torch.no_grad():
        expected = table.sample(denoiser, noise, generator=generator(1))
    np.testing.assert_allclose(sample, expected, rtol=1e-5, atol=1e-6)


def test_agents_predict_with_them(mdp, make_denoiser, generator):
    agent = VarianceLearning(mdp, make_denoiser(), kind="sn", **SETTINGS)
    agent.learn(2 * agent.timesteps_per_round)
    x = torch.randn(4000, 2, generator=generator())
    observation = {"sample": x.numpy(), "timestep": np.full(4000, 4.0)}
    mean, _ = agent.predict(observation, deterministic=True)
    drawn, _ = agent.predict(observation)
    _, std = agent.tableau.evaluate_with_std(agent.denoiser, x, 0)
    z = (drawn - mean) / std.detach().numpy()
    assert abs(z.mean()) < 0.05
    assert z.std() == pytest.approx(1, abs=0.03)


def test_stable_baselines_policy_scores_what_it_draws(mdp, prepared, generator):
    import gymnasium as gym

    denoiser = prepared("sn-ddpm")
    table = make_solver("sn-ddpm", mdp.schedule, denoiser, **options_of("sn-ddpm"))
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    space = gym.spaces.Dict({"sample": box, "timestep": gym.spaces.Box(0, 4, ())})
    policy = DenoiserPolicy(space, box, lambda _: 1e-3, denoiser, table)
    x = torch.randn(6, 2, generator=generator())
    observation = {"sample": x, "timestep": torch.tensor([4.0, 3.0, 2.0, 1.0, 4.0, 2.0])}
    action, _, log_density = policy(observation)
    _, again, entropy = policy.evaluate_actions(observation, action)
    torch.testing.assert_close(again, log_density)
    distribution = policy.get_distribution(observation)
    torch.testing.assert_close(distribution.log_prob(action), log_density, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(distribution.entropy(), entropy, rtol=1e-5, atol=1e-5)
