"""What an agent's file may hold: finite numbers that nobody changed, and counts that can be."""

import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.agents import (
    SFT,
    SFTPG,
    SFTV,
    BehaviorCloning,
    CheckpointError,
    Denoiser,
    TrainingDivergedError,
    VarianceLearning,
)
from fewstep.common.checkpoint import load_checkpoint, not_finite, save_checkpoint
from fewstep.common.optimisation import LEARNING_RATE_SCHEDULES, learning_rate
from fewstep.common.tensor_files import read_tensors, write_tensors


def trained(kind, mdp, denoiser):
    settings = {"batch_size": 8} if kind is not VarianceLearning else {"kind": "npr"}
    agent = kind(mdp, denoiser, **settings)
    return agent.learn(agent.timesteps_per_round, log_interval=1)


def floating(tree, name=""):
    """Yield the floating-point tensors of a tree with their paths."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point() and tree.numel():
            yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from floating(value, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from floating(value, f"{name}/{i}")


@pytest.mark.parametrize("kind", [BehaviorCloning, SFTPG, SFTV, SFT, VarianceLearning])
def test_nothing_non_finite_is_written_wherever_it_is(kind, make_mdp, make_denoiser, tmp_path):
    """Each tensor in turn: weights, averages, critic, baseline, head, both moments of every Adam.

    Also in the trees that fewstep would not write: then the file is refused when it is read.
    """
    agent = trained(kind, make_mdp(), make_denoiser())
    path = tmp_path / "agent"
    agent.save(path)
    good = path.read_bytes()
    tensors = dict(floating(agent.tree()))
    found = " ".join(tensors)
    assert "exp_avg_sq" in found
    assert ("live" in found) == (kind is not VarianceLearning)
    written, metadata = read_tensors(path)
    for i, tensor in enumerate(tensors.values()):
        value = (math.nan, math.inf, -math.inf)[i % 3]
        before = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        assert not_finite(agent.tree()) is not None
        with pytest.raises(TrainingDivergedError, match="is NaN or infinite after"):
            agent.save(path)
        with pytest.raises(TrainingDivergedError):
            agent.learn(0)
        with torch.no_grad():
            tensor.copy_(before)
        assert path.read_bytes() == good
    for name, tensor in list(written.items())[:: max(len(written) // 5, 1)]:
        if not tensor.is_floating_point():
            continue
        bad = tensor.clone()
        bad.view(-1)[0] = math.nan
        write_tensors(tmp_path / "bad", {**written, name: bad}, metadata)
        told = rf"bad is damaged: {re.escape(name.lstrip('/'))} holds NaN or infinity"
        with pytest.raises(CheckpointError, match=told):
            agent.resume(tmp_path / "bad")
    assert not_finite(agent.tree()) is None


def test_lists_of_numbers_count_single_ones_do_not():
    assert not_finite({"gamma": [1.0, 2, math.nan]}) == "gamma"
    assert not_finite({"a": [{"b": torch.tensor([1e38, 1e38, 1e38])}]}) is None  # the sum overflows
    assert not_finite({"errors": {"start": math.inf}, "none": None, "word": "nan"}) is None


def test_a_sum_that_overflows_does_not_hide_the_name():
    tree = {"a": torch.full((3,), 3e38), "b": torch.tensor([0.0, math.inf])}
    assert not_finite(tree) == "b"


def test_a_bit_that_flips_is_found_wherever_it_is(make_denoiser, tmp_path):
    path = tmp_path / "denoiser"
    make_denoiser().save(path)
    good = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(good[:8], "little")
    generator = torch.Generator().manual_seed(0)
    # Every fourth byte of the weights' beginning, and some of all the rest: any bit of it.
    places = torch.randint(header, len(good), (40,), generator=generator).tolist()
    for place in [*range(header, header + 40, 4), *places]:
        bad = good.copy()
        bad[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="do not fit its checksum"):
            Denoiser.load(path)
    path.write_bytes(bytes(good).replace(b'sigma_data\\", 0.5', b'sigma_data\\", 0.7'))
    assert path.read_bytes() != good
    with pytest.raises(CheckpointError, match="do not fit its checksum"):
        Denoiser.load(path)


def test_the_checksum_covers_types_shapes_and_names(tmp_path):
    path = tmp_path / "file"
    write_tensors(path, {"a": torch.arange(4.0)}, {"about": "x"})
    with safe_open(path, framework="pt") as file:
        written = file.metadata()["checksum"]
    for tensors, about in (
        ({"b": torch.arange(4.0)}, "x"),
        ({"a": torch.arange(4.0).view(2, 2)}, "x"),
        ({"a": torch.arange(4.0).view(torch.int32)}, "x"),
        ({"a": torch.arange(4.0), "b": torch.zeros(0)}, "x"),
        ({"a": torch.arange(4.0)}, "y"),
    ):
        save_file(tensors, path, metadata={"about": about, "checksum": written})
        with pytest.raises(ValueError, match="checksum"):
            read_tensors(path)


def test_a_file_from_before_there_were_checksums_is_accepted(make_denoiser, tmp_path):
    path = tmp_path / "denoiser"
    make_denoiser().save(path)
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, metadata=metadata)
    assert Denoiser.load(path).body.config == make_denoiser().body.config


@pytest.mark.parametrize("name", ["rounds", "num_timesteps"])
@pytest.mark.parametrize("value", [-5, 2.5, 1e9, True, None, "3"])
def test_counts_that_cannot_be_are_refused_and_change_nothing(
    name, value, make_mdp, make_denoiser, tmp_path
):
    agent = trained(SFTPG, make_mdp(), make_denoiser())
    path = tmp_path / "agent"
    agent.save(path)
    tree = load_checkpoint(path)
    save_checkpoint(path, {**tree, name: value})
    other = SFTPG(make_mdp(), make_denoiser(seed=1), batch_size=8)
    before = {key: tensor.clone() for key, tensor in floating(other.tree())}
    with pytest.raises(CheckpointError, match=rf"agent is damaged: {name} must be a whole number"):
        other.resume(path)
    assert all(torch.equal(before[key], tensor) for key, tensor in floating(other.tree()))
    assert (other.rounds, other.num_timesteps) == (0, 0)


def test_a_checkpoint_without_the_weights_in_training_is_refused(make_mdp, make_denoiser, tmp_path):
    agent = trained(SFTPG, make_mdp(), make_denoiser())
    path = tmp_path / "agent"
    agent.save(path)
    save_checkpoint(path, {**load_checkpoint(path), "live": None})
    with pytest.raises(CheckpointError, match="lacks the weights in training"):
        SFTPG.load(path, make_mdp())


def test_averaging_may_begin_with_a_file_that_has_no_average(make_mdp, make_denoiser, tmp_path):
    agent = SFTPG(make_mdp(), make_denoiser(), batch_size=8, ema=0.0)
    agent.learn(agent.timesteps_per_round)
    agent.save(tmp_path / "agent")
    again = SFTPG.load(tmp_path / "agent", make_mdp(), ema=0.9)
    fresh = SFTPG(make_mdp(), make_denoiser(seed=1), batch_size=8, ema=0.9)
    fresh.resume(tmp_path / "agent")
    for other in (again, fresh):
        for denoiser in (other.denoiser, other.sampling_denoiser):
            weights = denoiser.body.state_dict()
            assert all(
                torch.equal(weights[k], v) for k, v in agent.denoiser.body.state_dict().items()
            )


@pytest.mark.parametrize("schedule", LEARNING_RATE_SCHEDULES)
@pytest.mark.parametrize("warm_up", [0, 1, 20])
def test_a_learning_rate_is_never_negative_and_never_above_its_peak(schedule, warm_up):
    for total in (1, 7, 40):
        rates = [
            learning_rate(2.0, schedule, update / total, update, warm_up)
            for update in range(-30, 2 * total)
        ]
        assert all(0.0 <= rate <= 2.0 for rate in rates)
        if warm_up:
            assert rates[:30] == [0.0] * 30
        # By hand: the schedule's factor times the share of the warm-up that is done.
        factor = {"constant": 1.0, "linear": 0.75, "cosine": (1 + math.cos(math.pi / 4)) / 2}
        share = 1.0 if warm_up < 2 else 3 / 20
        assert learning_rate(2.0, schedule, 0.25, 2, warm_up) == pytest.approx(
            2.0 * factor[schedule] * share, rel=1e-14
        )


def test_while_the_critic_learns_alone_the_policy_s_rate_is_zero(make_mdp, make_denoiser):
    agent = SFTPG(
        make_mdp(), make_denoiser(), batch_size=8, critic_rounds=25, lr_schedule="constant"
    )
    rates = []
    for agent.rounds in range(50):
        agent.anneal()
        rates.append(agent.optimizer.param_groups[0]["lr"])
    assert rates[:25] == [0.0] * 25
    assert rates[25:45] == pytest.approx([3e-4 * (i + 1) / 20 for i in range(20)])
    assert rates[45:] == [3e-4] * 5


def test_training_mode_ends_with_the_round_that_fails(make_mdp, process, monkeypatch):
    body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    body.forward = lambda sample, time: torch.nn.Sequential.forward(body, sample)
    agent = BehaviorCloning(make_mdp(), Denoiser(body, process), batch_size=8)

    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(agent, "_loss", fails)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="Out of memory"):
        agent.learn(8)
    assert not any(module.training for module in agent.denoiser.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_critic_stops_training_when_its_update_fails(make_mdp, make_denoiser, monkeypatch):
    agent = SFTPG(make_mdp(), make_denoiser(), batch_size=8)

    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(agent.critic, "value", fails)
    with pytest.raises(RuntimeError, match="Out of memory"):
        agent.learn(8)
    assert not any(module.training for module in agent.critic.modules())


def test_a_file_of_another_kind_of_device_goes_on_with_numbers_of_its_own(
    make_mdp, make_denoiser, tmp_path
):
    """The state of a GPU's source, 16 bytes here, means nothing to a CPU's."""
    agent = trained(SFT, make_mdp(), make_denoiser())
    tree = agent.tree()
    foreign = torch.zeros(16, dtype=torch.uint8)
    moved = {"device": "cuda", "generator": foreign, "acting_generator": foreign}
    save_checkpoint(tmp_path / "agent", tree | moved)
    loaded, again = (SFT.load(tmp_path / "agent", make_mdp()) for _ in range(2))
    assert not torch.equal(loaded.generator.get_state(), agent.generator.get_state())
    for each in (loaded, again):
        each.learn(each.timesteps_per_round, reset_num_timesteps=False)
    assert torch.equal(loaded.sample(4), again.sample(4))
    # Of files that say nothing of a device, as older ones do, it is taken as it is.
    save_checkpoint(tmp_path / "old", {name: tree[name] for name in tree if name != "device"})
    older = SFT.load(tmp_path / "old", make_mdp())
    assert torch.equal(older.generator.get_state(), agent.generator.get_state())
