"""Kinds of conditions: how they are written as numbers, and the network that reads texts."""

import numpy as np
import pytest
import torch

from fewstep.common.conditions import (
    Captions,
    Classes,
    Embeddings,
    as_conditions,
    condition_config,
    kind_of,
)

KINDS = [(Classes(3), 2), (Captions(8), "née"), (Embeddings(2), [0.5, -1.0])]


@pytest.mark.parametrize(("kind", "one"), KINDS)
def test_a_kind_is_kept_by_its_config_and_a_condition_by_plain_values(kind, one):
    again = as_conditions(**condition_config(kind))
    assert again == kind
    condition = kind.checked(one)
    same = kind.from_plain(kind.plain(condition))
    assert torch.equal(kind.rows(same, 2), kind.rows(condition, 2))


@pytest.mark.parametrize(("kind", "one"), KINDS)
def test_one_condition_is_repeated_and_many_are_counted(kind, one):
    rows = kind.rows(kind.checked(one), 3)
    assert rows.shape == (3, *kind.shape) and rows.dtype == kind.dtype and rows.stride(0) == 0
    many = kind.checked([one, one])
    assert torch.equal(kind.rows(many, 2), rows[:2])
    assert torch.equal(kind.checked(many.numpy()), many)
    with pytest.raises(ValueError, match=f"2 {kind.kind} were given for 3 samples"):
        kind.rows(many, 3)
    assert torch.equal(kind.shown(rows.numpy()), rows)
    assert torch.equal(kind.shown(rows[0].numpy()), rows[:1])
    assert torch.equal(kind.none(3), kind.none(1).expand_as(rows))
    low, high = kind.bounds
    assert bool((many >= low).all() and (many <= high).all())


def test_a_text_is_its_bytes_and_none_the_empty_one():
    kind = Captions(8)
    assert kind.checked("née").tolist() == [*"née".encode(), 0, 0, 0, 0]
    assert kind.checked(np.array(["a", "bc"])).tolist() == [[97] + [0] * 7, [98, 99] + [0] * 6]
    assert torch.equal(kind.none(1)[0], kind.checked(""))
    assert kind.decoded(kind.checked(["née", ""])) == ["née", ""]


def test_a_long_text_is_cut_at_the_border_of_a_character_with_one_warning():
    with pytest.warns(UserWarning, match="Of 3 captions 2 are longer than 4 bytes") as warned:
        rows = Captions(4).checked(["abcü", "fine", "abcde"])
    assert Captions(4).decoded(rows) == ["abc", "fine", "abcd"]
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("kind", "condition", "error", "complaint"),
    [
        (Classes(3), "red", TypeError, "A condition is a class 0 to 2"),
        (Classes(3), True, TypeError, "A condition is a class 0 to 2"),
        (Classes(3), [0.5], TypeError, "whole numbers"),
        (Classes(3), np.array([3]), ValueError, "There are 3 classes, 0 to 2; got 3"),
        (Captions(4), 3, TypeError, "A condition is a text"),
        (Captions(4), ["a", 3], TypeError, "A condition is a text"),
        (Captions(4), torch.zeros(4), TypeError, "A condition is a text"),
        (Captions(4), torch.zeros(3).long(), ValueError, r"\(N, 4\)"),
        (Captions(4), torch.full((4,), 256), ValueError, "0 to 255"),
        (Captions(4), "a\0", ValueError, "zero byte"),
        (Captions(4), "\ud800", ValueError, "not Unicode"),
        (Embeddings(2), "red", TypeError, r"an embedding \(2,\)"),
        (Embeddings(2), 3, ValueError, r"an embedding \(2,\)"),
        (Embeddings(2), torch.zeros(3), ValueError, r"an embedding \(2,\)"),
        (Embeddings(2), [0.0, float("nan")], ValueError, "NaN or infinity"),
    ],
)
def test_conditions_of_another_kind_are_refused(kind, condition, error, complaint):
    with pytest.raises(error, match=complaint):
        kind.checked(condition)


def test_a_condition_is_read_from_what_a_user_types(tmp_path):
    vector = tmp_path / "vector.npy"
    np.save(vector, np.array([0.5, -1.0]))
    (tmp_path / "text.npy").write_text("no array")
    assert Classes(3).parsed("2") == 2
    assert Captions(8).parsed("2") == "2"
    kind = Embeddings(2)
    assert torch.equal(kind.checked(kind.parsed(str(vector))), torch.tensor([0.5, -1.0]))
    for bad in ("red", tmp_path / "text.npy"):
        with pytest.raises(ValueError, match=r"an \.npy file of 2 numbers"):
            kind.parsed(str(bad))


def test_kinds_that_make_no_sense_are_refused():
    for kind in (Classes, Captions, Embeddings):
        with pytest.raises(ValueError, match="at least 1"):
            kind(0)
    with pytest.raises(ValueError, match="either classes or conditions"):
        as_conditions(Captions(3), 3)
    with pytest.raises(TypeError, match="must be Classes, Captions or Embeddings"):
        as_conditions("captions")
    with pytest.raises(ValueError, match="did you mean 'captions'"):
        kind_of("caption")
    assert (kind_of(True), kind_of(False), kind_of("captions")) == ("classes", None, "captions")


@pytest.mark.numeric
def test_what_a_text_encoder_says_of_a_text_depends_on_nothing_else():
    torch.manual_seed(0)
    kind = Captions(24)
    encoder = kind.embedder(10)
    texts = ["red dot", "", "dot red", "a much longer one of 24"]
    together = encoder(kind.checked(texts))
    for row, text in enumerate(texts):
        torch.testing.assert_close(together[row], encoder(kind.checked([text]))[0])
    # Order counts, and so does each letter.
    assert (torch.pdist(together) > 1e-2).all()
    # All of the padding, as a GPU reads it: a longer text beside them leaves nothing out.
    padded = encoder(kind.checked([*texts, "x" * 24]))[:4]
    torch.testing.assert_close(padded, together)
    together.square().sum().backward()
    assert all(bool(weight.grad.abs().sum() > 0) for weight in encoder.parameters())
