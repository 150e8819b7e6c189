"""The checkpoint file: what goes in comes out, and nothing else gets in."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fewstep.agents import CheckpointError
from fewstep.common import checkpoint as module
from fewstep.common import tensor_files
from fewstep.common.checkpoint import load_checkpoint, save_checkpoint

tensors = st.builds(
    lambda shape, dtype, seed: (
        8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    st.integers(0, 99),
)
keys = st.one_of(st.text("ab/$'1", max_size=3), st.integers(-2, 2))
leaves = st.one_of(
    tensors,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["$tensor", "$dict"]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=50, deadline=None)
@given(tree=st.dictionaries(keys, trees, max_size=3))
def test_any_tree_comes_back(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree"
    save_checkpoint(path, tree)
    assert same(tree, load_checkpoint(path))


def test_names_that_look_alike_do_not_collide(tmp_path):
    values = torch.arange(4.0)
    tree = {"a/b": values[0], "a": {"b": values[1]}, "1": values[2], 1: values[3]}
    save_checkpoint(tmp_path / "tree", tree)
    assert same(tree, load_checkpoint(tmp_path / "tree"))


def test_aliases_views_and_parameters_are_saved(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    save_checkpoint(
        tmp_path / "tree", {"w": weight, "again": weight, "t": weight.T, "pair": (1, 2)}
    )
    tree = load_checkpoint(tmp_path / "tree")
    assert torch.equal(tree["w"], weight)
    assert torch.equal(tree["again"], weight)
    assert torch.equal(tree["t"], weight.T)
    assert not tree["w"].requires_grad
    assert tree["pair"] == [1, 2]


def test_every_header_length_is_readable(tmp_path):
    """The file begins with the length of its header: any bytes, a pickle's first ones too."""
    first = set()
    for n in range(0, 256, 8):
        save_checkpoint(tmp_path / "tree", {"w": torch.zeros(1), "text": "x" * n})
        assert load_checkpoint(tmp_path / "tree")["text"] == "x" * n
        first.add((tmp_path / "tree").read_bytes()[0])
    assert 0x80 in first  # the opcode with which a pickle begins


def test_values_that_are_no_json_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"/a/1 is a complex"):
        save_checkpoint(tmp_path / "tree", {"a": [0, 1j]})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["before", "half-way", "renaming"])
def test_a_failing_write_leaves_the_old_file(moment, tmp_path, monkeypatch):
    path = tmp_path / "agent"
    save_checkpoint(path, {"w": torch.ones(2)})
    before = path.read_bytes()

    def fail(*_arguments, **_settings):
        raise OSError("disk full")

    def fail_half_way(_tensors, file, **_settings):
        file.write_bytes(before[:50])
        fail()

    if moment == "renaming":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(
            tensor_files, "save_file", fail if moment == "before" else fail_half_way
        )
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"w": torch.zeros(2)})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["agent"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    save_checkpoint(tmp_path / "agent", {"w": torch.ones(2)})
    before = (tmp_path / "agent").read_bytes()
    with (tmp_path / "agent").open("rb") as reader:
        save_checkpoint(tmp_path / "agent", {"w": torch.zeros(2)})
        assert reader.read() == before
    assert not load_checkpoint(tmp_path / "agent")["w"].any()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'boom')!r}, 'w')",)

    path = tmp_path / "pickle"
    torch.save({"w": torch.ones(2), "bomb": Bomb()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="pickle"):
        load_checkpoint(path)
    assert not (tmp_path / "boom").exists()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "agent"
    save_checkpoint(path, {"w": torch.arange(50.0), "steps": 10, "v": {"u": torch.ones(3)}})
    whole = path.read_bytes()
    for cut in (0, 1, 7, 8, 9, 60, 150, len(whole) // 2, len(whole) - 12, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, "not a fewstep checkpoint"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"format": "fewstep-checkpoint-9"}, "fewstep-checkpoint-9"),
        ({"format": module.FORMAT}, "damaged"),
        ({"format": module.FORMAT, "tree": "{"}, "damaged"),
        ({"format": module.FORMAT, "tree": json.dumps({"w": 1})}, "damaged"),
        ({"format": module.FORMAT, "tree": json.dumps({"$tensor": "/gone"})}, "damaged"),
    ],
)
def test_foreign_and_corrupt_files_are_refused(metadata, complaint, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "foreign", metadata=metadata)
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(tmp_path / "foreign")


def test_what_is_not_there_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="No checkpoint at"):
            load_checkpoint(path)
