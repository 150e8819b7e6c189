"""What every agent promises: reproducible, resumable, watchable by SB3's callbacks, and it acts."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from torch import nn

from fewstep.agents import (
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    TrainingDivergedError,
)
from fewstep.agents.denoisers.networks import MLP, make_body
from fewstep.agents.solvers import ancestral, ddim
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint
from fewstep.critics import RewardCritic
from fewstep.envs import (
    DiffusionEnv,
    DiffusionVectorEnv,
    DiscreteVP,
    SB3VecEnv,
    Schedule,
    make_mdp,
)

SHORTCUT = {"batch_size": 16, "n_critic": 2, "n_generator": 2, "learning_rate": 1e-3}
KINDS = {
    "cloning": (BehaviorCloning, {"batch_size": 32, "ema": 0.9}),
    "cloning, no average": (
        BehaviorCloning,
        {"batch_size": 32, "ema": 0.0, "lr_schedule": "linear"},
    ),
    "sft": (SFT, {**SHORTCUT, "critic_lr_schedule": "cosine"}),
    "sft, spectral": (SFT, {**SHORTCUT, "regularizer": "spectral-norm", "learn_std": True}),
    "sft-v": (SFTV, {**SHORTCUT, "learn_std": True, "even": True, "scaled_baseline": True}),
    "sft-pg": (SFTPG, {**SHORTCUT, "learn_std": True, "clip_range": 0.2}),
    "sft-pg, penalty": (
        SFTPG,
        {**SHORTCUT, "regularizer": "gradient-penalty", "ema": 0.0, "critic_lr_schedule": "linear"},
    ),
}
PLAIN = ["cloning", "sft", "sft-v", "sft-pg"]


@pytest.fixture
def make_agent(make_mdp, make_denoiser):
    def make(kind, mdp=None, **changes):
        agent, settings = KINDS[kind]
        return agent(mdp or make_mdp(), make_denoiser(), **{**settings, **changes})

    return make


def rounds(agent, n):
    return n * agent.timesteps_per_round


def assert_same(a, b, path=""):
    """Two checkpoints' trees are equal bit for bit."""
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture
def tree_of(tmp_path):
    """Everything an agent would save."""

    def tree(agent):
        agent.save(tmp_path / "tree")
        return load_checkpoint(tmp_path / "tree")

    return tree


# -- reproducible, resumable ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_run(kind, make_agent, tree_of):
    trees = []
    for noise in range(2):
        torch.manual_seed(noise)  # the global generator is nobody's source of randomness
        agent = make_agent(kind, seed=3)
        trees.append(tree_of(agent.learn(rounds(agent, 3))))
    assert_same(*trees)
    other = make_agent(kind, seed=4)
    other = tree_of(other.learn(rounds(other, 3)))
    body = trees[0]["denoiser"]["weights"]
    assert not any(torch.equal(body[key], other["denoiser"]["weights"][key]) for key in body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, make_agent, make_mdp, tree_of, tmp_path):
    """Also the learning-rate schedules, the optimizers, the averages and the random numbers."""
    agent = make_agent(kind)
    saving = CheckpointCallback(save_freq=2, save_path=str(tmp_path), name_prefix="agent")
    agent.learn(rounds(agent, 5), saving)
    path = tmp_path / f"agent_{rounds(agent, 2)}_steps.zip"
    torch.manual_seed(99)
    resumed = type(agent).load(path, make_mdp())
    assert resumed.num_timesteps == rounds(agent, 2)
    resumed.learn(rounds(agent, 3), reset_num_timesteps=False)
    assert_same(tree_of(agent), tree_of(resumed))
    assert resumed.num_timesteps == rounds(agent, 5)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_loaded_agent_samples_what_the_saved_one_does(
    kind, make_agent, make_mdp, generator, tmp_path
):
    agent = make_agent(kind)
    agent.learn(rounds(agent, 2)).save(tmp_path / "agent")
    loaded = type(agent).load(tmp_path / "agent", make_mdp(), device="cpu")
    assert torch.equal(
        agent.sample(5, generator=generator()), loaded.sample(5, generator=generator())
    )
    # The agent's checkpoint is a denoiser's file as well: that of the denoiser that samples.
    denoiser = Denoiser.load(tmp_path / "agent")
    noise = torch.randn(5, 2, generator=generator())
    assert torch.equal(denoiser(noise, 2), agent.sampling_denoiser(noise, 2))
    changed = type(agent).load(tmp_path / "agent", make_mdp(), learning_rate=0.5)
    assert changed.settings.optimizer.learning_rate == 0.5
    assert changed.settings.batch_size == agent.settings.batch_size


def test_a_file_s_solver_options_go_with_its_solver(mdp, make_denoiser, tmp_path):
    options = {"variance": "small", "last_std": 0.1}
    BehaviorCloning(mdp, make_denoiser(), solver_options=options).save(tmp_path / "agent")

    def kept(**changes):
        return BehaviorCloning.load(tmp_path / "agent", mdp, **changes).settings.solver_options

    assert kept() == kept(solver="ancestral") == options
    assert kept(solver="euler-ancestral") is None
    assert kept(solver="euler-ancestral", solver_options={"eta": 0.5}) == {"eta": 0.5}


def test_an_agent_with_a_foreign_body_is_loaded_with_it(
    mdp, make_mdp, process, tmp_path, generator
):
    def foreign():
        return nn.Bilinear(2, 1, 2)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = foreign()

        def forward(self, sample, time):
            return self.layer(sample, time.to(sample.dtype).unsqueeze(1))

    agent = BehaviorCloning(mdp, Denoiser(Body(), process), batch_size=8, ema=0.5)
    agent.learn(16).save(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="foreign body"):
        BehaviorCloning.load(tmp_path / "agent", make_mdp())
    loaded = BehaviorCloning.load(tmp_path / "agent", make_mdp(), body=Body())
    assert torch.equal(
        agent.sample(5, generator=generator()), loaded.sample(5, generator=generator())
    )


def test_checkpoints_of_something_else_are_refused(make_agent, make_mdp, process, tmp_path):
    path = tmp_path / "agent"
    make_agent("sft").save(path)
    with pytest.raises(CheckpointError, match="written by 'sft', not by 'sft-pg'"):
        SFTPG.load(path, make_mdp())
    with pytest.raises(CheckpointError, match=r"another environment: .*Cluster.*Other"):
        SFT.load(path, make_mdp(name="Other"))
    short = r"schedule is of \w+\(.*\) at 4, 3, 2, 1, 0, here it is .* 0\.5, 0\.$"
    with pytest.raises(CheckpointError, match=short):
        SFT.load(path, make_mdp(schedule=Schedule(process, [4, 3, 2, 0.5, 0])))
    with pytest.raises(CheckpointError, match="build it on meta"):
        SFT.load(path, make_mdp(), device="meta")
    make_agent("sft").denoiser.save(path)
    with pytest.raises(CheckpointError, match="written by 'denoiser'"):
        SFT.load(path, make_mdp())
    save_checkpoint(path, {"w": 1})
    with pytest.raises(CheckpointError, match="not by 'sft'"):
        SFT.load(path, make_mdp())


def test_a_denoiser_of_other_samples_is_refused(mdp, process):
    with pytest.raises(ValueError, match=r"samples have shape \(3,\), here they have \(2,\)"):
        SFT(mdp, Denoiser(MLP((3,), 4), process))


# -- watched by Stable-Baselines3 ------------------------------------------------------------------


def test_sb3_callbacks_work(make_agent, make_mdp, reward, tmp_path):
    agent = make_agent("sft-pg")
    vec_env = SB3VecEnv(DiffusionVectorEnv(make_mdp(reward=reward), 8))
    seen = []

    class Watch(BaseCallback):
        def _on_training_start(self):
            seen.append("start")

        def _on_step(self):
            assert self.model is agent
            seen.append(self.num_timesteps)
            return True

        def _on_training_end(self):
            seen.append("end")

    evaluation = EvalCallback(
        vec_env,
        n_eval_episodes=8,
        eval_freq=2,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path),
        deterministic=False,
        verbose=0,
        warn=False,
    )
    checkpoint = CheckpointCallback(save_freq=3, save_path=str(tmp_path))
    agent.learn(rounds(agent, 4), [evaluation, checkpoint, Watch()])
    assert seen == ["start", *(rounds(agent, n) for n in (1, 2, 3, 4)), "end"]
    log = np.load(tmp_path / "evaluations.npz")
    assert log["timesteps"].tolist() == [rounds(agent, 2), rounds(agent, 4)]
    assert log["results"].shape == (2, 8)
    assert (log["ep_lengths"] == 4).all()
    assert SFTPG.load(tmp_path / "best" / "best_model", make_mdp()).num_timesteps
    assert SFTPG.load(tmp_path / f"rl_model_{rounds(agent, 3)}_steps.zip", make_mdp()).rounds == 3


@pytest.mark.parametrize("kind", PLAIN)
def test_a_function_that_returns_false_stops_training(kind, make_agent):
    agent = make_agent(kind)
    calls = []

    def stop(local_variables, _global_variables):
        calls.append(local_variables["metrics"])
        return len(calls) < 2

    agent.learn(10**9, stop)
    assert len(calls) == 2
    assert agent.num_timesteps == rounds(agent, 2)


class Memory(KVWriter):
    def __init__(self):
        self.entries = []

    def write(self, key_values, key_excluded, step=0):
        self.entries.append((step, dict(key_values)))

    def close(self):
        pass


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("cloning", {"train/loss", "train/grad_norm"}),
        ("sft", {"train/policy_loss", "train/critic_loss", "train/grad_norm"}),
        (
            "sft-pg",
            {
                "rollout/ep_rew_mean",
                "train/policy_loss",
                "train/critic_loss",
                "train/baseline_loss",
                "train/grad_norm",
                "train/approx_kl",
            },
        ),
    ],
)
def test_logs_have_sb3_names_at_the_interval(kind, names, make_agent):
    agent, memory = make_agent(kind), Memory()
    agent.set_logger(Logger(folder=None, output_formats=[memory]))
    agent.learn(rounds(agent, 5), log_interval=2)
    # Every second round, and the last one.
    assert [step for step, _ in memory.entries] == [rounds(agent, n) for n in (2, 4, 5)]
    for _, entry in memory.entries:
        assert names | {"time/fps", "time/total_timesteps"} <= set(entry)
        assert all(np.isfinite(value) for value in entry.values())
    agent.learn(rounds(agent, 2), log_interval=1, reset_num_timesteps=False)
    assert memory.entries[-1][0] == rounds(agent, 7)


@pytest.mark.parametrize("kind", ["sft", "sft-pg"])
def test_a_critic_gone_wrong_is_named(kind, make_agent):
    agent = make_agent(kind)
    with torch.no_grad():
        next(agent.critic.network.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match=r"critic_loss.* NaN or infinite") as caught:
        agent.learn(rounds(agent, 5))
    assert "critic_loss" in caught.value.quantity


OWN_CRITIC = RewardCritic(lambda sample: -sample.square().sum(1))
OF_CRITIC, OF_BASELINE = "critic.learning_rate", "critic.baseline_learning_rate"


@pytest.mark.parametrize(
    ("kind", "critic", "others"),
    [
        ("cloning", {}, []),
        ("sft", {}, [OF_CRITIC]),
        ("sft-pg", {}, [OF_CRITIC, OF_BASELINE]),
        ("sft", {"critic": OWN_CRITIC.reward}, []),
        ("sft-pg", {"critic": OWN_CRITIC.reward}, [OF_BASELINE]),
        ("sft", {"critic": OWN_CRITIC}, []),
    ],
)
def test_what_to_lower_after_divergence_is_what_the_agent_trains_by(
    kind, critic, others, make_agent
):
    agent = make_agent(kind, **critic)
    names = ["optimizer.learning_rate", *others]
    assert agent.step_sizes() == names
    assert f"Lower {' or '.join(names)}." in str(agent.diverged("train/loss"))


@pytest.mark.parametrize("settings", [{"n_generator": 1}, {"n_generator": 2}, {"ema": 0.0}])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_learning_rate_beyond_reason_is_noticed(kind, settings, make_agent):
    if kind == "cloning":
        settings = {key: value for key, value in settings.items() if key == "ema"}
    agent = make_agent(kind, learning_rate=1e38, **settings)
    with pytest.raises(TrainingDivergedError, match=r"(train|rollout)/\w+.* NaN or infinite"):
        agent.learn(rounds(agent, 5))
    assert agent.num_timesteps <= rounds(agent, 3)


# -- acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
def test_predict_takes_the_transition_of_the_sampler(kind, make_agent, mdp, generator):
    agent = make_agent(kind, mdp)
    table = agent.tableau
    sample = torch.randn(20_000, 2, generator=generator())
    for j in range(4):
        with torch.no_grad():
            epsilon = agent.sampling_denoiser.epsilon(sample, float(table.times[j]))
        mean = (table.scale[j] * sample + table.weights[j, j] * epsilon).numpy()
        timestep = np.full((20_000, 1), table.times[j], np.float32)
        observation = {"sample": sample.numpy(), "timestep": timestep}
        action, state = agent.predict(observation, deterministic=True)
        assert state is None
        assert action.dtype == np.float32
        np.testing.assert_allclose(action, mean, rtol=1e-4, atol=1e-5)
        action, _ = agent.predict(observation)
        z = (action - mean) / table.noise[j]
        assert abs(z.mean()) < 0.03
        assert z.std() == pytest.approx(1, abs=0.02)
        single = {key: value[0] for key, value in observation.items()}
        alone, _ = agent.predict(single, deterministic=True)
        assert alone.shape == (2,)
        np.testing.assert_allclose(alone, mean[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no step of"):
        agent.predict({"sample": sample.numpy(), "timestep": np.full((20_000, 1), 2.5)})


@pytest.mark.parametrize(
    ("solver", "options"),
    [("ddim", None), ("ddim", {"eta": 0.5}), ("ancestral", {"variance": "small"})],
)
def test_predict_works_where_a_step_has_no_noise(solver, options, make_agent, mdp):
    agent = make_agent("cloning", mdp, solver=solver, solver_options=options)
    env = DiffusionEnv(mdp)
    observation, _ = env.reset(seed=0)
    start = torch.from_numpy(observation["sample"])[None]
    for _ in range(mdp.steps):
        action, _ = agent.predict(observation, deterministic=True)
        observation, _, terminated, _, _ = env.step(action)
    assert terminated
    if solver == "ddim" and options is None:
        expected = agent.sample(1, noise=start)[0].numpy()
        np.testing.assert_allclose(observation["sample"], expected, rtol=1e-4, atol=1e-5)


def test_evaluate_policy_pays_what_samples_are_worth(make_agent, make_mdp, reward, generator):
    mdp = make_mdp(reward=reward)
    agent = make_agent("cloning", mdp)
    vec_env = SB3VecEnv(DiffusionVectorEnv(mdp, 2000))
    vec_env.seed(5)
    mean, _ = evaluate_policy(agent, vec_env, 2000, deterministic=False, warn=False)
    drawn = reward(agent.sample(2000, generator=generator()))
    # Five standard errors of the difference of two means of 2000.
    margin = 5 * float(drawn.std()) * (2 / 2000) ** 0.5
    assert mean == pytest.approx(float(drawn.mean()), abs=margin)


@pytest.mark.parametrize("kind", PLAIN)
def test_sample(kind, make_agent, process, generator):
    agent = make_agent(kind)
    first = agent.sample(5, generator=generator())
    assert first.shape == (5, 2)
    assert not first.requires_grad
    assert torch.equal(first, agent.sample(5, generator=generator()))
    assert not torch.equal(first, agent.sample(5, generator=generator(1)))
    assert not torch.equal(agent.sample(5), agent.sample(5))
    # From given noise, by the published table.
    noise = torch.randn(7, 2, generator=generator())
    states = agent.sample(7, noise=noise, generator=generator(2), return_trajectory=True)
    assert states.shape == (5, 7, 2)
    assert torch.equal(states[0], noise)
    by_table = agent.tableau.sample(agent.sampling_denoiser, noise, generator=generator(2))
    assert torch.equal(states[-1], by_table)
    # On another grid.
    grid = Schedule(process, [4, 1.5, 0])
    states = agent.sample(3, schedule=grid, generator=generator(), return_trajectory=True)
    assert states.shape == (3, 3, 2)
    expected = ancestral(grid, "beta").sample(
        agent.sampling_denoiser, states[0], generator=after_prior(generator(), 3)
    )
    assert torch.equal(states[-1], expected)


def after_prior(generator, n):
    torch.randn(n, 2, generator=generator)
    return generator


def test_large_requests_are_drawn_in_chunks(make_agent, generator, monkeypatch):
    monkeypatch.setattr("fewstep.agents.samplers.sampling.CHUNK", 8)
    agent = make_agent("cloning", solver="ddim")
    noise = torch.randn(21, 2, generator=generator())
    whole = ddim(agent.mdp.schedule).sample(agent.sampling_denoiser, noise)
    torch.testing.assert_close(agent.sample(21, noise=noise), whole.detach())
    assert agent.sample(21, return_trajectory=True).shape == (5, 21, 2)


@pytest.mark.parametrize("kind", PLAIN)
def test_nfe_is_counted_in_network_calls(kind, make_agent, count_calls):
    agent = make_agent(kind)
    calls = count_calls(agent.sampling_denoiser.body)
    agent.sample(6)
    assert len(calls) == agent.nfe == 4
    assert calls.samples == 24
    assert calls.times == [3, 2, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_timesteps_are_the_calls_that_training_acts_with(kind, make_agent, count_calls):
    agent = make_agent(kind)
    calls = count_calls(agent.denoiser.body)
    agent.train_round()
    assert agent.num_timesteps == agent.timesteps_per_round
    # The policy gradient evaluates its log-densities on top: n_generator minibatches, twice with a
    # clip (the old densities).
    again = 0
    if isinstance(agent, SFTPG):
        again = agent.settings.n_generator * agent.minibatch_size
        again *= 2 if agent.settings.policy.clip_range else 1
    assert calls.samples == agent.num_timesteps + again


@pytest.mark.parametrize("agent", [BehaviorCloning, SFT, SFTV, SFTPG])
def test_images(agent, generator, tmp_path):
    """Digits: 8 x 8 images, a U-Net, Fan & Lee's (2023) last standard deviation of 0.001."""
    mdp = make_mdp("Digits", steps=3)
    with torch.random.fork_rng():
        denoiser = Denoiser(make_body(mdp.shape, 1000), mdp.process)
    settings = {} if agent is BehaviorCloning else {"n_critic": 1, "n_generator": 1}
    if agent is SFTPG:
        settings["log_density"] = "mean"
    learner = agent(mdp, denoiser, batch_size=4, **settings)
    learner.learn(2 * learner.timesteps_per_round)
    assert learner.tableau.noise[-1] == 0.001
    assert learner.sample(2).shape == (2, 1, 8, 8)
    learner.save(tmp_path / "agent")
    loaded = agent.load(tmp_path / "agent", mdp)
    assert torch.equal(
        learner.sample(2, generator=generator()), loaded.sample(2, generator=generator())
    )
    observation, _ = DiffusionEnv(mdp).reset(seed=0)
    assert learner.predict(observation)[0].shape == (1, 8, 8)


def test_environments_come_as_ids_shells_or_processes(make_denoiser, make_mdp):
    mdp = make_mdp()
    shell = DiffusionVectorEnv(mdp, 2, autoreset_mode=AutoresetMode.DISABLED)
    agents = [BehaviorCloning(env, make_denoiser(), batch_size=8) for env in (mdp, shell)]
    cluster = "fewstep/GaussianCluster-v0"
    made = Denoiser(make_body((2,), 10), DiscreteVP.sigmoid(10))
    agents.append(BehaviorCloning(cluster, made, batch_size=8))
    assert [agent.get_env() for agent in agents[:2]] == [mdp, shell]
    assert agents[0].mdp is agents[1].mdp is mdp
    assert [agent.nfe for agent in agents] == [4, 4, 10]
    with pytest.raises(ValueError, match=r"denoiser was made for DiscreteVP\(T=4.*T=10"):
        BehaviorCloning(cluster, make_denoiser())
