"""What a GPU must do as the CPU does: agents, solvers, environments, metrics; skipped without one.

Where the same numbers go in, the same must come out; training draws noise of the device's own, so
there what was trained must be the same sampler on both.
"""

import copy

import gymnasium as gym
import pytest
import torch
from rounds import learn_rounds

from fewstep.agents import AGENTS, SFT, DenoiserPolicy
from fewstep.agents.denoisers.bodies import new_denoiser
from fewstep.agents.denoisers.exact import mixture
from fewstep.agents.solvers import SOLVERS, default_schedule, make_solver
from fewstep.critics import IPMCritic, evaluate, make_critic
from fewstep.envs import DiffusionVectorEnv, make_mdp, make_process, make_target
from fewstep.envs.mdp import no_reward

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

FINE_TUNED = {"batch_size": 16, "n_critic": 1, "rounds": 3}
DISTILLED = {"batch_size": 8, "size": 8, "scale": 2, "rounds": 3}
SOLVER = {"batch_size": 8, "batches": 1, "scale": 2}
SETTINGS = {
    "behavior-cloning": {"batch_size": 16, "rounds": 3},
    "sft": FINE_TUNED,
    "sft-pg": {**FINE_TUNED, "n_generator": 1},
    "sft-v": FINE_TUNED,
    "dode": {**SOLVER, "refine": "end-to-end", "refine_steps": 2},
    "schedule": {**SOLVER, "schedule_rounds": 2, "tuning_rounds": 2, "tuning_batch_size": 8},
    "solver": {**SOLVER, "rounds": 3},
    "rdpo": {"batch_size": 16, "held_out": 24, "check_interval": 2, "rounds": 4},
    "variance": {"batch_size": 10, "samples_per_time": 1},
    "sfd": DISTILLED,
    "pd": {**DISTILLED, "teacher_steps": 8},
    "cd": DISTILLED,
    "dmd": {**DISTILLED, "n_fake": 1},
}
# Agents whose solver is no choice of theirs, or is made by what they learn.
OWN_SOLVER = ("pd", "cd", "dmd", "variance", "behavior-cloning", "sft", "sft-pg", "sft-v")


def away_from_the_origin(sample):
    return sample.flatten(1).square().sum(1)


def digits(device, reward=no_reward, **more):
    return make_mdp("Digits", steps=4, device=device, reward=reward, **more)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_that_was_trained_on_a_gpu_samples_alike_on_the_cpu(name, tmp_path):
    kind, settings = AGENTS[name], SETTINGS[name]
    if name not in OWN_SOLVER:
        settings = {"solver": "ddim", **settings}
    reward = away_from_the_origin if name == "rdpo" else no_reward
    mdp = digits(GPU, reward)
    agent = kind(mdp, new_denoiser(mdp), **settings)
    assert agent.device.type == "cuda"
    learn_rounds(agent, 2)
    samples = agent.sample(5)
    assert samples.device.type == "cuda" and samples.isfinite().all()
    agent.save(tmp_path / "agent")
    # The file of D-ODE's table holds no network.
    network = {"denoiser": copy.deepcopy(agent.denoiser).cpu()} if name == "dode" else {}
    loaded = kind.load(tmp_path / "agent", digits("cpu", reward), **network)
    assert loaded.device.type == "cpu" and loaded.num_timesteps == agent.num_timesteps
    assert (agent.tableau.times == loaded.tableau.times).all()
    start = float(loaded.tableau.times[0])
    state = mdp.process.prior_sample((5, *mdp.shape), torch.Generator(), t=start)
    with torch.no_grad():
        answers = [each.sampling_denoiser(state.to(each.device), start) for each in (agent, loaded)]
    # float32 through a small network, whose convolutions a GPU may do in TF32 (10 bits).
    torch.testing.assert_close(answers[0].cpu(), answers[1], rtol=5e-3, atol=5e-3)
    # Both go on to the end.
    for each in (agent, loaded):
        each.learn(reset_num_timesteps=False)
        assert each.done and each.sample(3).isfinite().all()


RESUMED = {
    # Earlier samples, the best network so far, and times that a gradient reaches are kept on files.
    "sft": {**FINE_TUNED, "critic_passes": 2, "critic_replay": 2, "objective": "logistic"},
    "sfd": {**DISTILLED, "rounds": 8, "looks": 8, "solver": "ddim"},
    "schedule": {
        "solver": "ddim",
        "gradient": "eq14",
        "batch_size": 8,
        "batches": 1,
        "scale": 2,
        "schedule_rounds": 2,
        "tuning_rounds": 3,
        "tuning_batch_size": 8,
    },
    "solver": {**SOLVER, "rounds": 4, "solver": "ddim", "ball": 0.1, "optimizer": "adam"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("there", ["cpu", GPU])
@pytest.mark.parametrize("name", RESUMED)
def test_a_file_goes_on_on_a_gpu(name, there, tmp_path):
    """From a CPU's file and from its own, halfway through."""
    kind, mdp = AGENTS[name], digits(there)
    agent = kind(mdp, new_denoiser(mdp), **RESUMED[name])
    learn_rounds(agent, 2)
    agent.save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", digits(GPU))
    assert loaded.device.type == "cuda" and loaded.rounds == agent.rounds
    loaded.learn(reset_num_timesteps=False)
    assert loaded.done and loaded.sample(3).isfinite().all()


@pytest.mark.parametrize("name", [name for name, each in SOLVERS.items() if each.needs is None])
def test_a_solver_gives_the_same_samples(name):
    """In float64; one that adds noise draws it from the device's own source."""
    process = make_process("flow" if name.startswith("flow") else "linear-1000")
    predicts = "sample" if name.startswith("flow") else "epsilon"
    denoiser = mixture(process, prediction=predicts)[0]
    table = make_solver(name, default_schedule(name, process, 6), denoiser)
    source, start = torch.Generator().manual_seed(0), float(table.times[0])
    noise = process.prior_sample((16, 16), source, t=start).double()
    twin, of_gpu = copy.deepcopy(denoiser).to(GPU), torch.Generator(GPU).manual_seed(0)
    samples = table.sample(twin, noise.to(GPU), generator=of_gpu).cpu()
    expected = table.sample(denoiser, noise, generator=source)
    if (table.noise == 0).all():
        torch.testing.assert_close(samples, expected, rtol=1e-9, atol=1e-9)
    assert samples.isfinite().all() and samples.dtype == torch.float64


@pytest.mark.parametrize("conditional", [False, True])
def test_the_vector_environment_lives_there(conditional):
    env = DiffusionVectorEnv(
        "Digits",
        num_envs=6,
        steps=3,
        device=GPU,
        conditional=conditional,
        reward=away_from_the_origin,
        autoreset_mode="disabled",
    )
    observation, _ = env.reset(seed=1)
    again, _ = env.reset(seed=1)
    assert all(torch.equal(observation[key], again[key]) for key in observation)
    for step in range(3):
        assert observation["sample"].device.type == "cuda"
        action = 0.5 * observation["sample"]
        observation, reward, terminated, truncated, _ = env.step(action)
        assert reward.device.type == terminated.device.type == "cuda"
        assert bool(terminated.all()) == (step == 2) and not truncated.any()
    torch.testing.assert_close(reward, away_from_the_origin(action))


def test_gymnasium_finds_it_by_name():
    env = gym.make_vec("fewstep/SwissRoll-v0", num_envs=4, steps=2, device=GPU)
    observation, _ = env.reset(seed=0)
    assert observation["sample"].device.type == "cuda"


def test_stable_baselines_trains_there():
    from stable_baselines3 import PPO

    from fewstep.envs import SB3VecEnv

    env = SB3VecEnv(DiffusionVectorEnv("SwissRoll", num_envs=8, steps=3, device=GPU))
    mdp = env.env.mdp
    policy = {
        "denoiser": new_denoiser(mdp),
        "tableau": make_solver("ancestral", mdp.schedule, last_std=0.01),
    }
    model = PPO(
        DenoiserPolicy,
        env,
        policy_kwargs=policy,
        n_steps=3,
        batch_size=8,
        n_epochs=1,
        device=GPU,
    )
    model.learn(24)
    assert all(weight.isfinite().all() for weight in model.policy.parameters())


def test_a_critic_learns_there_and_judges_alike():
    source = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 64, 2, generator=source)
    torch.manual_seed(0)
    critic = IPMCritic(make_critic((2,)), "gradient-penalty")
    twin = copy.deepcopy(critic).to(GPU)
    torch.testing.assert_close(twin(real.to(GPU)).cpu(), critic(real), rtol=1e-4, atol=1e-4)
    for value in twin.update(real.to(GPU), fake.to(GPU), None, None).values():
        assert value.isfinite() and value.device.type == "cuda"


def test_a_copy_of_the_denoiser_as_critic_learns_there_in_mixed_precision():
    mdp = digits(GPU, conditional=True)
    denoiser = new_denoiser(mdp)
    agent = SFT(
        mdp,
        denoiser,
        critic_network="denoiser",
        objective="logistic",
        regularizer="none",
        gradient_steps=2,
        critic_passes=2,
        critic_replay=2,
        batch_size=16,
        n_critic=1,
        precision="bf16",
        solver_options={"last_std": 0.05},
    )
    learn_rounds(agent, 3)
    assert agent.sample(4).isfinite().all()


def test_metrics_say_the_same():
    """Of the same samples; what is drawn is drawn on the CPU."""
    scores = []
    samples = make_target("Digits").take(400).roll(1, 3)
    for device in (GPU, "cpu"):
        target = make_target("Digits", device=device)
        given = iter([samples.to(device)])

        def draw(n, generator=None, given=given):
            return next(given)[:n]

        scores.append(evaluate(draw, target, 400))
    assert scores[0].keys() == scores[1].keys()
    for name, score in scores[0].items():
        assert score.value == pytest.approx(scores[1][name].value, rel=1e-3, abs=1e-3), name


def test_an_agent_there_is_scored_against_samples_that_are_not():
    """Real ones as an array, from which the sampler's own device does not follow."""
    mdp = digits(GPU)
    agent = AGENTS["dode"](mdp, new_denoiser(mdp), solver="ddim", **SOLVER)
    report = evaluate(agent, mdp.target.take(60).cpu().numpy(), 30)
    assert all(score.value == score.value for score in report.values())


def test_conditions_that_were_given_before_go_along():
    mdp = digits("cpu", conditional=True)
    denoiser = new_denoiser(mdp).given([0, 1, 2])
    table = make_solver("ddim", mdp.schedule)
    noise = torch.randn(3, *mdp.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = table.sample(denoiser, noise)
    moved = copy.deepcopy(denoiser).to(GPU)
    assert moved.conditioning.condition.device.type == "cuda"
    with torch.no_grad():
        samples = table.sample(moved, noise.to(GPU))
    torch.testing.assert_close(samples.cpu(), expected, rtol=5e-3, atol=5e-3)
