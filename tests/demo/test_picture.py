import io

import numpy as np
import pytest

from batch_client.errors import UsageError
from batch_client.picture import Panel, draw, percent

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

RIGHT, WRONG = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def digits(rng, n):
    scores = rng.dirichlet(np.ones(10), n)
    return rng.integers(0, 256, (n, 28, 28), np.uint8), scores, scores.argmax(axis=1)


def picture_of(records, scores, labels=None):
    return draw(f"{len(records)} records", [Panel("", records, scores, labels, range(len(records)))])


def pixels(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB"))


def count(image, colour):
    return int((image == np.array(colour, np.uint8)).all(axis=-1).sum())


def is_clear_of_its_edges(image):
    edge = np.concatenate([image[:3].ravel(), image[-3:].ravel(), image[:, :3].ravel(), image[:, -3:].ravel()])
    return bool((edge == 255).all())


def test_all_right_has_one_colour_and_a_wrong_one_brings_the_other(rng):
    records, scores, labels = digits(rng, 12)
    right = pixels(picture_of(records, scores, labels))
    assert count(right, RIGHT) > 0
    assert count(right, WRONG) == 0
    labels[5] = (labels[5] + 1) % 10
    one_wrong = pixels(picture_of(records, scores, labels))
    assert count(one_wrong, WRONG) > 0
    assert 0 < count(one_wrong, RIGHT) < count(right, RIGHT)


@pytest.mark.parametrize(("share", "said"), [(1.0, "100 %"), (0.9998, "99.9 %"), (0.997, "99.7 %"), (0.0, "0.0 %")])
def test_only_a_whole_is_a_hundred_percent(share, said):
    assert percent(share) == percent(np.float32(share)) == said


@pytest.mark.parametrize("where", ["heading", "title"])
def test_a_dollar_in_a_text_is_a_dollar(rng, where):
    records, scores, _ = digits(rng, 2)

    def picture(text):
        title, heading = text if where == "title" else "", text if where == "heading" else ""
        return pixels(draw(heading, [Panel(title, records, scores, None, range(2))]))

    assert picture(r"a$\frac$").size
    assert (picture("$b$") != picture("b")).any()
    assert picture("$b$").shape == picture("b").shape


def test_a_wrong_one_differs_in_grey_too(rng):
    records, scores, labels = digits(rng, 1)
    right = pixels(picture_of(records, scores, labels)).min(axis=-1) < 230
    wrong = pixels(picture_of(records, scores, labels + 1)).min(axis=-1) < 230
    # A wider frame, a bold line and the true class: more ink, whatever its colour.
    assert wrong.sum() > right.sum() * 1.02


def test_without_labels_nothing_is_marked(rng):
    records, scores, _ = digits(rng, 9)
    image = pixels(picture_of(records, scores))
    assert count(image, RIGHT) == count(image, WRONG) == 0


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (3, 20, 40), (64, 16, 3), (5,), ()])
def test_every_size_and_shape_keeps_clear_of_the_edges(rng, n, shape):
    records = rng.random((n, *shape), dtype=np.float32)
    scores = rng.dirichlet(np.ones(3), n)
    image = pixels(picture_of(records, scores, rng.integers(0, 3, n)))
    assert is_clear_of_its_edges(image)
    assert image.shape[1] <= 1400


def test_the_picture_is_the_same_each_time(rng):
    arguments = digits(rng, 5)
    assert picture_of(*arguments) == picture_of(*arguments)


def test_floats_are_drawn_over_their_own_range(rng):
    records, scores, _ = digits(rng, 4)
    records[:, 0, 0], records[:, 0, 1] = 0, 255
    as_bytes = pixels(picture_of(records, scores))
    as_floats = pixels(picture_of(records.astype(np.float32) / 255 * 7 - 3, scores))
    assert np.abs(as_bytes.astype(int) - as_floats).max() <= 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_record_without_a_score_is_wrong_and_drawn(rng, bad):
    records, scores, labels = digits(rng, 3)
    scores[1, 4] = bad
    assert count(pixels(picture_of(records, scores, labels)), WRONG) > 0
    assert count(pixels(picture_of(records[:, 0, :3], scores, labels)), WRONG) > 0


def test_scores_that_are_no_probabilities_and_single_values_are_drawn(rng):
    assert is_clear_of_its_edges(pixels(picture_of(rng.random((6, 4)), rng.normal(size=(6, 1)) * 1e6)))
    assert is_clear_of_its_edges(pixels(picture_of(rng.random((6, 4)), rng.normal(size=(6, 8)) * 1e-6)))
    assert is_clear_of_its_edges(pixels(picture_of(rng.random((2, 4)), np.zeros((2, 1)))))


def test_panels_stand_below_each_other(rng):
    first, second = (Panel(title, *digits(rng, 4), range(4)) for title in ("first", "second"))
    one, two = pixels(draw("one", [first])), pixels(draw("two", [first, second]))
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] == one.shape[1]


def test_without_matplotlib_the_extra_is_named(rng, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"batch-client\[demo\]"):
        picture_of(*digits(rng, 2))
