"""Damaging files on purpose: seeded mutations of JSON, of bytes, and of a checkpoint's tree."""

import copy
import json

import torch

# Values that a field is overwritten with. RAW ones are no JSON values: they are pasted as they are.
VALUES = [
    None, True, False, 0, -1, 1, 2.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 10**12, -(2**70),
    "", "x", "1e9", "\ud800", "../../etc/passwd", [], {}, [[]], [None], ["x"], [1, [2, 3]],
    {"kind": "VE"}, "y" * 3000, [0.0] * 3000,
]  # fmt: skip
DEEP = ["[" * 5000 + "]" * 5000, '{"a":' * 200 + "1" + "}" * 200]
RAW = ["1" + "0" * 400, "-1e999", "NaN", "Infinity", *DEEP]
_MARK = "@@raw@@"


def places(tree, path=()):
    """Yield the path of every value in a tree of dicts and lists, a few of a long list."""
    items = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
        items = items[:3] + items[-2:] if len(items) > 5 else items
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_tree(tree, rng, values=VALUES):
    """Return a copy of a tree with one place deleted, replaced, repeated, nested or negated."""
    tree = copy.deepcopy(tree)
    *path, last = rng.choice(list(places(tree)))
    node = tree
    for key in path:
        node = node[key]
    action = rng.choice(["delete", "replace", "replace", "replace", "repeat", "nest", "change"])
    old = node[last]
    if action == "delete":
        del node[last]
    elif action == "replace":
        node[last] = copy.deepcopy(rng.choice(values))
    elif action == "repeat" and isinstance(node, list):
        node.insert(last, copy.deepcopy(old))
    elif action == "nest":
        node[last] = rng.choice([[old], {"value": old}, [[[old]]]])
    elif isinstance(old, bool):
        node[last] = str(old)
    elif isinstance(old, int | float):
        node[last] = rng.choice([-old, old * 1e6, str(old), [old], old + 0.5])
    elif isinstance(old, str):
        node[last] = rng.choice([old + "x", old[:-1], old.upper(), 7, [old]])
    elif isinstance(old, torch.Tensor):
        node[last] = mutated_tensor(old, rng)
    else:
        node[last] = None
    return tree


def mutated_tensor(old, rng):
    """Return a tensor of another size, type or content."""
    return rng.choice(
        [
            lambda: old[:-1] if old.ndim and len(old) else old[None],
            lambda: old.flatten()[:0],
            lambda: old.unsqueeze(0),
            lambda: old.flatten(),
            lambda: old.bool(),
            lambda: torch.full_like(old, torch.nan) if old.is_floating_point() else old + 77,
            lambda: old.double() * 1e300,
            lambda: old.to(torch.int8),
        ]
    )()


def mutated_text(text, rng):
    """Return the text of a JSON file with its tree mutated, or a raw value pasted."""
    tree = json.loads(text)
    if rng.random() < 0.2:
        *path, last = rng.choice(list(places(tree)))
        node = tree
        for key in path:
            node = node[key]
        node[last] = _MARK
        return json.dumps(tree).replace(json.dumps(_MARK), rng.choice(RAW))
    return json.dumps(mutated_tree(tree, rng))


def mutated_bytes(data, rng):
    """Return bytes with some flipped, cut off, cut out, repeated or appended."""
    data = bytearray(data)
    action = rng.choice(["flip", "flip", "flips", "cut", "drop", "append", "repeat", "zeros"])
    # Half of the damage at the front, where headers are.
    at = rng.randrange(min(len(data), rng.choice([16, 200, len(data)]))) if data else 0
    if action == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif action == "flips":
        for _ in range(8):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif action == "cut":
        del data[at:]
    elif action == "drop":
        del data[at : at + rng.choice([1, 4, 100])]
    elif action == "append":
        data += rng.choice([b"\0", b"}", b"garbage" * 50, bytes(data[:100])])
    elif action == "repeat":
        data[at:at] = data[at : at + 64]
    else:
        data[at : at + 8] = bytes(8)
    return bytes(data)
