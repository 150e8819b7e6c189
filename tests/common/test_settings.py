"""Settings: one declaration, read by names, by trees and by itself."""

import json
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Literal

import numpy as np
import pytest

from fewstep.common.settings import Settings, bounded


@dataclass(frozen=True)
class Rate(Settings):
    """How fast."""

    rate: float = bounded(0.1, least=0)
    decay: float = bounded(0.0, least=0, below=1)
    betas: tuple[float, float] = bounded((0.9, 0.99), least=0, below=1)


@dataclass(frozen=True)
class Critic(Settings):
    """Who judges."""

    rate: float = bounded(0.2, above=0, most=1)
    width: int | None = bounded(None, least=1)
    kind: Literal["mlp", "resnet"] = "mlp"


@dataclass(frozen=True)
class All(Settings):
    """Everything."""

    width: int = bounded(8, least=1)
    shift: float = bounded(0.0)
    optimizer: Rate = field(default_factory=Rate)
    critic: Critic = field(default_factory=Critic)


def test_a_name_is_the_own_field_s_first_then_the_first_group_s():
    """`width` is the own field's and the critic's, `rate` both groups', `kind` one group's only."""
    told = All().replace(width=3, rate=0.5, kind="resnet")
    assert told == All(3, 0.0, Rate(rate=0.5), Critic(kind="resnet"))
    told = All().replace(critic_width=3, critic_rate=0.5, optimizer_rate=0.25)
    assert told == All(8, 0.0, Rate(rate=0.25), Critic(rate=0.5, width=3))


def test_replacing_keeps_the_rest_and_the_old_settings():
    before = All(critic=Critic(width=5, kind="resnet"))
    after = before.replace(critic_width=6)
    assert after.critic == Critic(width=6, kind="resnet")
    assert before.critic.width == 5
    with pytest.raises(FrozenInstanceError):
        before.width = 9


def test_a_group_is_an_instance_or_a_mapping_that_a_short_name_still_changes():
    """A mapping says the whole group: what it lacks has its default."""
    before = All(optimizer=Rate(decay=0.5))
    assert before.replace(optimizer={"rate": 0.3}).optimizer == Rate(rate=0.3)
    assert before.replace(optimizer=Rate(rate=0.3), decay=0.25).optimizer == Rate(0.3, 0.25)
    assert before.replace(decay=0.25, optimizer={"rate": 0.3}).optimizer == Rate(0.3, 0.25)


@dataclass(frozen=True)
class Fast(Settings):
    """Settings whose group has values of its own."""

    optimizer: Rate = field(default_factory=lambda: Rate(decay=0.5, betas=(0.5, 0.9)))


def test_what_a_mapping_lacks_is_as_these_settings_have_it_by_default():
    """And not as the group's class has it, with which a whole agent would learn otherwise."""
    mapping = {"optimizer": {"rate": 0.3}}
    assert Fast().replace(**mapping) == Fast.from_tree(mapping) == Fast().replace(rate=0.3)
    assert Fast(optimizer=Rate(decay=0.1)).replace(**mapping) == Fast().replace(rate=0.3)


@pytest.mark.parametrize(
    ("changes", "suggestion"),
    [({"widht": 1}, "width"), ({"deccay": 0.1}, "decay"), ({"optimizer": {"rat": 0.1}}, "rate")],
)
def test_an_unknown_name_is_refused_with_what_was_meant(changes, suggestion):
    with pytest.raises(ValueError, match=f"unknown setting .*did you mean '{suggestion}'"):
        All().replace(**changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"rate": -0.1}, "rate must be at least 0, got -0.1"),
        ({"rate": float("nan")}, "rate must be at least 0, got nan"),
        ({"rate": float("inf")}, "rate must be at least 0, got inf"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1, got 1"),
        ({"critic_rate": 0.0}, "rate must be above 0 and at most 1, got 0"),
        ({"critic_rate": 1.5}, "rate must be above 0 and at most 1, got 1.5"),
        ({"shift": float("nan")}, "shift must be finite, got nan"),
        ({"betas": (1.5, 0.5)}, r"betas must be at least 0 and below 1 each, got \(1.5, 0.5\)"),
        ({"betas": (0.5, float("nan"))}, "betas must be at least 0 and below 1 each"),
        ({"kind": "mpl"}, "unknown kind 'mpl'; did you mean 'mlp'"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        All().replace(**changes)


def test_a_bound_itself_passes_where_it_is_included_and_none_where_it_is_allowed():
    told = All().replace(width=1, rate=0, critic_rate=1, critic_width=None, shift=-1e9)
    assert (told.width, told.optimizer.rate, told.critic.rate) == (1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"width": 1.5}, "width must be a whole number, got 1.5"),
        ({"width": True}, "width must be a whole number, got True"),
        ({"width": None}, "width must be a whole number, got None"),
        ({"betas": (0.9,)}, "betas must be "),
        ({"optimizer": 3}, "optimizer must be Rate or a mapping, got 3"),
        ({"optimizer": None}, "optimizer must be Rate or a mapping, got None"),
        ({"optimizer": Critic()}, "optimizer must be Rate or a mapping, got "),
    ],
)
def test_a_value_of_another_type_is_refused(changes, complaint):
    with pytest.raises(TypeError, match=complaint):
        All().replace(**changes)


def test_numpy_s_numbers_become_python_s():
    told = All().replace(width=np.int64(3), shift=np.float32(0.5))
    assert (type(told.width), type(told.shift)) == (int, float)


def test_a_tree_goes_through_json_and_back():
    told = All().replace(width=3, betas=(0.5, 0.6), critic_width=4, kind="resnet")
    tree = told.to_tree()
    assert tree["optimizer"]["betas"] == [0.5, 0.6]
    assert All.from_tree(json.loads(json.dumps(tree))) == told
    assert All.from_tree({"critic": {"width": 4}}) == All(critic=Critic(width=4))
    assert All.from_tree({}) == All()


@pytest.mark.parametrize(
    ("tree", "error", "complaint"),
    [
        ({"widht": 3}, ValueError, "unknown setting 'widht'; did you mean 'width'"),
        ({"rate": 0.5}, ValueError, "unknown setting 'rate'"),  # a tree has no short names
        ({"critic": {"knd": "mlp"}}, ValueError, "unknown setting 'knd'; did you mean 'kind'"),
        ({"critic": {"width": 0}}, ValueError, "width must be at least 1, got 0"),
        ({"width": "3"}, TypeError, "width must be a whole number, got '3'"),
        ({"critic": [1]}, TypeError, "critic must be Critic or a mapping"),
        ({"critic": None}, TypeError, "critic must be Critic or a mapping"),
    ],
)
def test_a_damaged_tree_is_refused(tree, error, complaint):
    with pytest.raises(error, match=complaint):
        All.from_tree(tree)


def test_the_groups_are_the_fields_that_are_settings():
    assert All.groups() == {"optimizer": Rate, "critic": Critic}
    assert Rate.groups() == {}
