"""Which average of a shortcut fine-tuning is returned: the last, unless it left the data."""

import copy
import math

import pytest
import torch
from rounds import learn_rounds
from stable_baselines3.common.logger import Logger
from torch import nn

from fewstep.agents import SFT, SFTPG, SFTV, Denoiser
from fewstep.agents.denoisers.networks import ResidualMLP
from fewstep.agents.policy_gradient import looks as choice
from fewstep.agents.policy_gradient.held_out import HeldOut
from fewstep.agents.policy_gradient.looks import CHOOSING, CONFIRMING, Looks
from fewstep.common.optimisation import Averaged, TrainingDivergedError, adam
from fewstep.envs import make_mdp as make_mdp_of

numeric = pytest.mark.numeric
SHARES = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FEW = {"batch_size": 16, "n_critic": 2, "n_generator": 1, "size": 60, "looks": 3, "ema": 0.5}


def trained(distances, agree=bool):
    """Look at a number that trains from 0, with these mean distances at 0, 1, ... on the two sets.

    Their shares differ by a tenth, so that a standard error of the difference is .01.
    """
    live = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(live.weight)
    averaged, optimizer = Averaged(live, 0.5), adam(live.parameters())

    def measure(part):
        at = round(averaged.module.weight.item())
        wobble = 0.1 * SHARES.roll(at)
        return distances[part][at] + wobble - wobble.mean()

    looks = Looks(averaged, measure, agree)
    looks.begin()
    for number in range(1, len(distances[0])):
        live(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        for module in (live, averaged.module):
            nn.init.constant_(module.weight, number)
        shares = looks.look(number)
    looks.finish(shares, optimizer)
    return looks, live, averaged.module, optimizer


NEARER_TWICE = {CHOOSING: [0.9, 0.2, 0.5], CONFIRMING: [0.9, 0.25, 0.55]}


@pytest.mark.parametrize(
    ("chosen", "confirmed", "returned", "number"),
    [
        ([0.9, 0.5, 0.2], [0.9, 0.5, 0.2], "last", 2),
        ([0.9, 0.2, 0.5], [0.9, 0.25, 0.55], "earlier", 1),
        ([0.1, 0.2, 0.5], [0.1, 0.2, 0.5], "given", 0),
        # Nearer, but by less than chance does.
        ([0.9, 0.495, 0.5], [0.9, 0.2, 0.5], "last", 2),
        # What chose it was chance: on the other set it is no nearer for sure.
        ([0.9, 0.2, 0.5], [0.9, 0.493, 0.5], "last", 2),
        # The last is as near as an earlier one, and worse than none.
        ([0.9, 0.2, 0.2], [0.9, 0.2, 0.2], "last", 2),
    ],
)
def test_an_earlier_one_is_returned_where_the_last_is_farther_for_sure(
    chosen, confirmed, returned, number
):
    looks, live, average, optimizer = trained({CHOOSING: chosen, CONFIRMING: confirmed})
    assert looks.returned == returned
    assert average.weight.item() == live.weight.item() == number
    # What Adam remembers belongs to the weights that it moved last.
    assert bool(optimizer.state) == (returned == "last")
    assert looks.errors["given"] == pytest.approx(confirmed[0])
    assert looks.errors["last"] == pytest.approx(confirmed[-1])
    assert looks.errors["returned"] == pytest.approx(confirmed[number])
    assert not looks.begun


ON_THE_WAY = [0.9, 0.6, 0.1, 0.3, 0.5]  # at 0, a quarter, a half, ..., of the way


@pytest.mark.parametrize(
    ("chosen", "confirmed", "way"),
    [
        (ON_THE_WAY, ON_THE_WAY, 0.5),
        ([0.9, 0.7, 0.6, 0.3, 0.5], [0.9, 0.7, 0.6, 0.35, 0.5], 0.75),
        ([0.9, 0.7, 0.6, 0.495, 0.5], [0.9, 0.7, 0.6, 0.2, 0.5], 1.0),  # by less than chance
        (ON_THE_WAY, [0.9, 0.6, 0.493, 0.1, 0.5], 1.0),  # chance chose it
        ([0.9, 0.7, 0.6, 0.5, 0.2], [0.9, 0.7, 0.6, 0.5, 0.2], 1.0),
    ],
)
def test_a_part_of_the_way_is_returned_where_it_is_nearer_for_sure(chosen, confirmed, way):
    distances = {CHOOSING: chosen, CONFIRMING: confirmed}
    live = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(live.weight)
    averaged, optimizer = Averaged(live, 0.5), adam(live.parameters())

    def measure(part):
        at = averaged.module.weight.item() * 4
        assert at == int(at)
        wobble = 0.1 * SHARES.roll(int(at))
        return distances[part][int(at)] + wobble - wobble.mean()

    looks = Looks(averaged, measure, bool)
    looks.begin()
    live(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    for module in (live, averaged.module):
        nn.init.ones_(module.weight)
    looks.finish(looks.look(1), optimizer)
    assert looks.returned == "last" and looks.way == way
    assert averaged.module.weight.item() == live.weight.item() == way
    assert bool(optimizer.state) == (way == 1)
    assert looks.errors["last"] == pytest.approx(confirmed[-1])
    assert looks.errors["returned"] == pytest.approx(confirmed[int(4 * way)])
    told = f"{100 * way:g} % of the way from the given weights to the last average"
    assert (told in looks.verdict) == (way < 1)


def test_processes_that_train_together_return_the_same():
    """One that sees no difference follows the others, which do."""
    same = {part: [0.5] * 3 for part in (CHOOSING, CONFIRMING)}
    looks, *_ = trained(same, agree=lambda mine: True)
    assert looks.returned == "earlier"
    looks, *_ = trained(NEARER_TWICE, agree=lambda mine: False)
    assert looks.returned == "last"


def test_a_look_that_fails_leaves_the_average_as_it_was():
    live = nn.Linear(1, 1, bias=False)
    averaged = Averaged(live, 0.5)

    def fail(part):
        raise KeyboardInterrupt

    looks = Looks(averaged, fail, bool)
    looks.begin()
    nn.init.constant_(averaged.module.weight, 7.0)
    with pytest.raises(KeyboardInterrupt):
        looks.look(1)
    assert averaged.module.weight.item() == 7.0


@pytest.mark.parametrize("kind", [SFT, SFTPG, SFTV])
def test_looking_changes_no_training(kind, make_mdp, make_denoiser, monkeypatch):
    monkeypatch.setattr(choice, "is_better", lambda *_, **__: False)
    ends, denoiser = [], make_denoiser()
    for looks in (0, 3):
        agent = kind(make_mdp(), copy.deepcopy(denoiser), **{**FEW, "looks": looks, "rounds": 5})
        agent.learn()
        assert agent.returned == "last"
        assert set(agent.errors) == ({"given", "last", "returned"} if looks else set())
        assert bool(agent.report().sentence) == bool(looks)
        ends.append([*agent.denoiser.parameters(), *agent.sampling_denoiser.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.fixture
def leaving(monkeypatch):
    """Theta goes away from where it is, farther each round; return how many rounds it stays."""

    def from_round(kind, first):
        def improve(self, trajectories):
            if self.rounds >= first:
                with torch.no_grad():
                    for weight in self.denoiser.parameters():
                        weight.add_(0.5)
            zero = torch.zeros(())
            return {"train/policy_loss": zero, "train/grad_norm": zero}

        monkeypatch.setattr(kind, "improve", improve)

    return from_round


@pytest.mark.parametrize("kind", [SFT, SFTPG, SFTV])
def test_what_leaves_the_data_is_not_returned(kind, leaving, make_mdp, make_denoiser):
    leaving(kind, 0)
    agent = kind(make_mdp(), make_denoiser(), **{**FEW, "rounds": 4, "looks": 4})
    before = [weight.clone() for weight in agent.denoiser.parameters()]
    agent.learn()
    assert agent.returned == "given" and agent.errors["last"] > agent.errors["given"]
    assert agent.errors["returned"] == agent.errors["given"]
    for network in (agent.denoiser, agent.sampling_denoiser):
        assert all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert "as it was given" in agent.verdict


def test_no_distance_is_asked_for_where_a_reward_is_maximised(mdp, make_denoiser, reward, leaving):
    leaving(SFT, 0)
    agent = SFT(mdp, make_denoiser(), critic=reward, **{**FEW, "rounds": 4})
    agent.learn()
    assert agent.returned == "last" and agent.errors == {} and agent.verdict == ""


@pytest.mark.parametrize(
    ("rounds", "critic_rounds", "looked"),
    [(12, 0, [4, 8, 12]), (13, 0, [4, 8, 12, 13]), (12, 6, [8, 10, 12]), (5, 3, [])],
)
def test_looks_are_spread_over_the_rounds_in_which_theta_moves(
    rounds, critic_rounds, looked, make_mdp, make_denoiser, monkeypatch
):
    found, look = [], Looks.look
    monkeypatch.setattr(Looks, "look", lambda self, n: found.append(n) or look(self, n))
    settings = {**FEW, "rounds": rounds, "critic_rounds": critic_rounds}
    agent, logger = SFT(make_mdp(), make_denoiser(), **settings), Logger(None, [])
    logged, dump = [], logger.dump
    agent.set_logger(logger)
    monkeypatch.setattr(logger, "dump", lambda step: logged.append(agent.rounds) or dump(step))
    agent.learn()
    assert found == looked
    assert set(looked) <= set(logged)  # the picture shows them all
    # The same, if the training is told in calls.
    found.clear()
    agent = SFT(make_mdp(), make_denoiser(), **{**settings, "rounds": 1000})
    agent.learn(rounds * agent.timesteps_per_round)
    assert found == looked


def test_a_killed_training_chooses_as_a_whole_one(leaving, make_mdp, make_denoiser, tmp_path):
    """It goes away after the fourth round, is killed in the sixth, and remembers the fourth."""
    leaving(SFT, 4)
    settings = {**FEW, "rounds": 8, "looks": 8}
    denoiser = make_denoiser()
    whole, killed = (SFT(make_mdp(), copy.deepcopy(denoiser), **settings) for _ in range(2))
    whole.learn()
    learn_rounds(killed, 6)
    killed.save(tmp_path / "agent.safetensors")
    resumed = SFT.load(tmp_path / "agent.safetensors", make_mdp())
    assert "not over" in resumed.verdict
    resumed.learn(reset_num_timesteps=False)
    assert resumed.returned == whole.returned and resumed.errors == whole.errors
    assert resumed.verdict == whole.verdict
    pairs = zip(whole.denoiser.parameters(), resumed.denoiser.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    again = SFT.load(tmp_path / "agent.safetensors", make_mdp())
    tree = again.tree()
    del tree["state"]["looks"]  # as in a file from before there were looks
    again.restore(tree, "the file")
    again.learn(reset_num_timesteps=False)
    assert again.errors["returned"] <= again.errors["last"]


def test_a_killed_training_goes_as_far_as_a_whole_one(
    leaving, make_mdp, make_denoiser, monkeypatch, tmp_path
):
    """Between the weights that were given and the last ones lie the nearest to the data."""
    leaving(SFT, 0)
    settings, denoiser = {**FEW, "rounds": 2, "looks": 1}, make_denoiser()
    name, first = next(iter(denoiser.named_parameters()))
    begun = first.detach().clone()

    def away(self, part):
        moved = (self.averaged.module.denoiser.get_parameter(name) - begun).mean()
        return (moved.double() - 0.6).square() + 0.01 * SHARES

    monkeypatch.setattr(SFT, "_distances", away)
    whole, killed = (SFT(make_mdp(), copy.deepcopy(denoiser), **settings) for _ in range(2))
    whole.learn()
    learn_rounds(killed, 1)
    killed.save(tmp_path / "agent.safetensors")
    resumed = SFT.load(tmp_path / "agent.safetensors", make_mdp())
    resumed.learn(reset_num_timesteps=False)
    assert resumed.way == whole.way < 1
    resumed.save(tmp_path / "agent.safetensors")
    found = [whole, resumed, SFT.load(tmp_path / "agent.safetensors", make_mdp())]
    for agent in found[1:]:
        assert agent.report().results == whole.report().results
        pairs = zip(whole.denoiser.parameters(), agent.denoiser.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    # A file from before there were ways goes all of it.
    again = SFT(make_mdp(), copy.deepcopy(denoiser), **settings)
    tree = killed.tree()
    for key in ("given", "way"):
        del tree["state"]["looks"][key]
    again.restore(tree, "the file")
    again.learn(reset_num_timesteps=False)
    assert again.way == 1


class Brightness:
    """Two numbers of an image."""

    name, description = "brightness", "mean and spread of the pixels"

    def __call__(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)


def test_images_are_compared_in_features_or_not_at_all(leaving, tmp_path):
    leaving(SFT, 0)
    mdp = make_mdp_of("Digits", steps=2)
    settings = {**FEW, "rounds": 3, "width": 4}

    def made(features):
        body = ResidualMLP(mdp.shape, hidden=8, blocks=1)
        return SFT(mdp, Denoiser(body, mdp.process, "sample"), features=features, **settings)

    blind = made(None).learn()
    assert blind.returned == "last" and not blind.errors
    agent = learn_rounds(made(Brightness()), 2)
    agent.save(tmp_path / "agent.safetensors")
    at_once = settings["n_critic"] * settings["batch_size"]
    held_out = HeldOut(mdp, settings["size"], at_once, 2 * agent.seed + CONFIRMING, Brightness())
    begun = SFT.load(tmp_path / "agent.safetensors", mdp, features=Brightness())
    assert begun.errors == agent.errors
    begun.learn(reset_num_timesteps=False)
    assert begun.returned == "given"
    assert begun.errors["returned"] == float(held_out.shares(begun.averaged.module).mean())
    # What was measured in other features says nothing in these.
    another = Brightness()
    another.name = "another"
    other = SFT.load(tmp_path / "agent.safetensors", mdp, features=another)
    assert not other._looks.begun and other.errors == agent.errors
    other.learn(reset_num_timesteps=False)
    assert other.errors["given"] != begun.errors["given"]


def test_features_that_do_not_fit_are_refused(make_mdp, make_denoiser):
    with pytest.raises(ValueError, match="features are for images"):
        SFT(make_mdp(), make_denoiser(), features=Brightness())
    with pytest.raises(TypeError, match="features must be a feature extractor"):
        SFTPG(make_mdp(), make_denoiser(), features=3)
    mdp, large = make_mdp_of("Digits", steps=2), Brightness()
    large.shape = (1, 28, 28)
    body = ResidualMLP(mdp.shape, hidden=8, blocks=1)
    with pytest.raises(ValueError, match="'brightness' are of samples of shape"):
        SFT(mdp, Denoiser(body, mdp.process, "sample"), features=large)


def test_a_sampler_that_ran_away_is_called_diverged(monkeypatch):
    """Not images that an extractor does not take."""
    monkeypatch.setattr(SFT, "improve", run_away)
    mdp = make_mdp_of("Digits", steps=2)
    body = ResidualMLP(mdp.shape, hidden=8, blocks=1)
    denoiser = Denoiser(body, mdp.process, "sample")
    agent = SFT(mdp, denoiser, features=Brightness(), **{**FEW, "rounds": 3, "width": 4})
    with pytest.raises(TrainingDivergedError, match="held_out_error"):
        agent.learn()


def run_away(agent, _trajectories):
    with torch.no_grad():
        for weight in agent.averaged.module.denoiser.parameters():
            weight.mul_(torch.inf)
    return {"train/policy_loss": torch.zeros(()), "train/grad_norm": torch.zeros(())}


class Ends:
    """A policy that jumps to data of the conditions, or of others."""

    def __init__(self, target, shift=0.0, others=0):
        self.target, self.shift, self.others = target, shift, others
        self.generator = torch.Generator().manual_seed(5)

    def act(self, observation, step, draw):
        condition = observation.get("condition")
        if condition is None:
            found = self.target.sample(len(observation["sample"]), self.generator)
        else:
            asked = (condition + self.others) % 10
            found = self.target.sample_of(asked, self.generator)
        return found + self.shift


@numeric
@pytest.mark.parametrize("conditional", [False, True])
def test_only_the_distribution_of_the_data_is_near(conditional):
    mdp = make_mdp_of("Digits", steps=2, conditional=conditional)
    wrong = [Ends(mdp.target, shift=0.2)] + ([Ends(mdp.target, others=1)] if conditional else [])
    # In pieces as in one.
    for at_once in (100, 400):
        held_out = HeldOut(mdp, 400, at_once, seed=0)
        right = held_out.shares(Ends(mdp.target))
        chance = float(right.std()) / math.sqrt(len(right))
        assert abs(float(right.mean())) < 4 * chance
        for policy in wrong:
            assert float(held_out.shares(policy).mean()) > 10 * chance
