"""Captions of a folder of pictures: where the file lies, how it is read, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from fewstep.envs import make_mdp, make_target

NAMES = ["a/0.png", "a/1.png", "b/2.png"]
TEXTS = ["red dot", "née bleue", "a green, large dot"]


@pytest.fixture
def folder(tmp_path):
    """A folder of three pictures in two sub-folders."""
    for number, name in enumerate(NAMES):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 50 * number, np.uint8)).save(file)
    return tmp_path / "pictures"


def lines(names=NAMES, texts=TEXTS):
    return "".join(f"{name}\t{text}\n" for name, text in zip(names, texts, strict=True))


def texts_of(folder, **settings):
    target = make_target("ImageFolder", data_dir=folder, image_size=8, captions=True, **settings)
    known = target.known("captions")
    # The pictures are shuffled: the grey of each says which it is.
    order = ((target.samples[:, 0, 0, 0] + 1) * 127.5 / 50).round().long().argsort()
    return [known.conditions.decoded(known.training)[row] for row in order.tolist()]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("pictures/captions.tsv", lines()),
        ("captions.tsv", lines()),
        ("captions.tsv", lines([f"pictures/{name}" for name in NAMES])),
        ("captions.tsv", "\ufefffile\tcaption\r\n" + lines().replace("\n", "\r\n") + "\r\n"),
        ("captions.tsv", "".join(reversed(lines().splitlines(keepends=True))).rstrip("\n")),
    ],
    ids=["within", "beside", "from-its-own-folder", "header-and-crlf", "any-order"],
)
def test_captions_are_read(place, text, folder):
    (folder.parent / place).write_bytes(text.encode())
    assert texts_of(folder) == TEXTS


def test_an_environment_of_captions_reads_them_and_mirrors_no_picture(folder):
    (folder / "captions.tsv").write_text(lines())
    mdp = make_mdp("ImageFolder", data_dir=folder, image_size=8, conditional="captions")
    assert mdp.conditions.length == 32
    assert not mdp.target.flip
    # Without them nobody looks at the file, whatever it holds.
    (folder / "captions.tsv").write_bytes(b"\xff")
    plain = make_mdp("ImageFolder", data_dir=folder, image_size=8, conditional=True)
    assert plain.classes == 2 and plain.target.flip


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"a/0.png\tred \xff\n", "captions.tsv is damaged or foreign"),
        (b"a/0.png red dot\n", "line 1 of .*captions.tsv has no tab"),
        (b"a/0.png\tx\n\na/1.png\n", "line 3 of .*captions.tsv has no tab"),
        (b"a/9.png\tred dot\n", "line 1 of .* names a/9.png, which is no picture in"),
        (b"a/0.png\tx\na/0.png\ty\n", "line 2 of .* names a/0.png a second time"),
        (b"a/0.png\t \n", "line 1 of .* has no text for a/0.png"),
        (b"a/0.png\tx\n", "says nothing of 2 of 3 pictures, a/1.png for one"),
        (b"", "says nothing of 3 of 3 pictures"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(data, complaint, folder):
    (folder / "captions.tsv").write_bytes(data)
    with pytest.raises(ValueError, match=complaint):
        texts_of(folder)


def test_captions_that_are_not_there_are_missed(folder):
    with pytest.raises(FileNotFoundError, match=r"there is no captions.tsv in .*, nor beside it"):
        texts_of(folder)
    with pytest.raises(ValueError, match="Digits has no captions"):
        make_mdp("Digits", conditional="captions")
    with pytest.raises(ValueError, match="the samples of Digits have no embeddings"):
        make_mdp("Digits", conditional="embeddings")
    with pytest.raises(ValueError, match="did you mean 'captions'"):
        make_mdp("Digits", conditional="caption")
