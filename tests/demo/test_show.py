"""`show` over a published output as the layout describes it, in a folder and in S3."""

import functools
import json
import resource
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import obstore
import pytest
import zarr
from obstore.store import S3Store

from batch_client.cli import main
from batch_client.cli.show import _sentence
from batch_client.gallery import _choose, _Said
from batch_client.layout import MANIFEST_KEY, SUCCESS_KEY
from batch_client.manifest import ManifestBuilder
from support.identities import identity_of
from support.web import in_a_thread

pytest.importorskip("matplotlib")

COUNT, ORIGIN = 300, 40


@pytest.fixture
def published(tmp_path):
    """An output of records 40 to 339 of 400; the model is wrong at 50 and 60 and has no score at 70."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (400, 12, 12), np.uint8)
    labels = rng.integers(0, 4, 400)
    scores = np.full((COUNT, 4), 0.1, np.float32)
    scores[np.arange(COUNT), labels[ORIGIN : ORIGIN + COUNT]] = 0.7
    for number in (50, 60):
        scores[number - ORIGIN] = np.roll(scores[number - ORIGIN], 1)
    status = np.zeros(COUNT, np.uint8)
    status[70 - ORIGIN] = 1
    zarr.create_array(tmp_path / "in.zarr", data=images, chunks=(30, 12, 12))
    group = zarr.create_group(tmp_path / "out.zarr")
    every = {"write_empty_chunks": True}
    group.create_array("scores", data=scores, chunks=(50, 4), config=every)
    group.create_array("record_status", data=status, chunks=(50,), config=every)
    publish(tmp_path, {"scores": (4,)})
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path


def publish(folder, outputs, start=ORIGIN, stop=ORIGIN + COUNT):
    """What a run writes last: that the output is published, and what it is, a model's outputs in its order."""
    run = identity_of(source=(folder / "in.zarr").as_uri(), source_array="", source_shape=(400, 12, 12),
                      source_dtype="uint8", start=start, stop=stop, numerics={"threads": 2, "versions": {"torch": "2"}},
                      outputs=tuple((name, "float32", shape) for name, shape in outputs.items()))
    output = folder / "out.zarr"
    (output / MANIFEST_KEY).parent.mkdir(exist_ok=True)
    (output / MANIFEST_KEY).write_bytes(ManifestBuilder().head(run, ()))
    (output / SUCCESS_KEY).touch()


def figures(capsys):
    return json.loads(capsys.readouterr().out)


def show(folder, *flags):
    return main(["show", str(folder / "out.zarr"), "-o", str(folder / "picture.png"), *flags])


def test_accuracy_over_the_whole_output(published, capsys):
    assert show(published, "--labels", str(published / "labels.npy"), "--json") == 0
    found = figures(capsys)
    assert found["range"] == "40:340"
    assert (found["records"], found["right"], found["without_score"]) == (300, 297, 1)
    assert found["accuracy"] == pytest.approx(0.99)
    assert (published / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_on_a_web_server_is_drawn(published, capsys, monkeypatch):
    """Nothing of it has to be listed."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # who names one so has a network of their own
    handler = functools.partial(SimpleHTTPRequestHandler, directory=published)
    with in_a_thread(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        assert main(["show", f"{url}/out.zarr", "-o", str(published / "picture.png"), "--json"]) == 0
    assert figures(capsys)["records"] == COUNT


@pytest.mark.parametrize(("records", "right"), [("40:50", 10), ("50:61", 9), ("70:71", 0), ("71:", 269), (":52", 11)])
def test_ranges_are_counted_as_in_the_source(published, capsys, records, right):
    assert show(published, "--labels", str(published / "labels.npy"), "--records", records, "--json") == 0
    assert figures(capsys)["right"] == right


def test_labels_may_cover_the_range_alone_and_be_a_zarr_array(published, capsys):
    labels = np.load(published / "labels.npy")
    np.save(published / "part.npy", labels[50:61])
    zarr.create_array(published / "labels.zarr", data=labels)
    for where in ("part.npy", "labels.zarr"):
        assert show(published, "--labels", str(published / where), "--records", "50:61", "--json") == 0
        assert figures(capsys)["right"] == 9


def test_it_says_what_it_found_to_a_person(published, capsys):
    assert show(published, "--labels", str(published / "labels.npy")) == 0
    out = capsys.readouterr().out
    assert "297 of 300 records right, 99.0 %, 1 without a score" in out
    assert "picture.png" in out
    assert show(published) == 0
    assert capsys.readouterr().out.startswith("300 records, 1 without a score\n")


def test_a_source_that_has_moved_is_named_with_a_flag(published, capsys):
    (published / "in.zarr").rename(published / "elsewhere.zarr")
    assert show(published) == 65
    said = capsys.readouterr().err
    assert "in.zarr: no Zarr array there" in said
    assert said.endswith("; the run read it there: name where it is now with --source\n")
    assert show(published, "--source", str(published / "nor-here.zarr")) == 65
    assert "--source" not in capsys.readouterr().err
    assert show(published, "--source", str(published / "elsewhere.zarr")) == 0


def test_labels_that_are_no_class_are_counted(published, capsys):
    """Classes that are counted from 1 look like a bad model."""
    labels = np.load(published / "labels.npy") + 1
    np.save(published / "labels.npy", labels)
    wrong = int((labels[40:340] == 4).sum())
    assert show(published, "--labels", str(published / "labels.npy")) == 0
    assert f"; {wrong} labels of no class: wanted 0 to 3" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # zarr's, of what is no array beside those that it looks for
@pytest.mark.parametrize("key", ["scores/c/0/0", "record_status/zarr.json"])
def test_an_output_that_is_damaged_is_not_called_an_input(published, capsys, key):
    (published / "out.zarr" / key).unlink()
    assert show(published) == 65
    said = capsys.readouterr().err
    assert f"out.zarr: its predictions can't be read ({published.as_uri()}" in said
    assert said.endswith("--deep names\n")
    assert not any(word in said for word in ("--allow-missing", "--array", "INPUT"))


def test_the_picture_of_an_output_at_a_place_without_a_name_is_no_hidden_file(published, monkeypatch, capsys):
    monkeypatch.chdir(published / "out.zarr")
    assert main(["show", "."]) == 0
    assert capsys.readouterr().out.endswith("picture: output.png\n")


@pytest.mark.parametrize(("right", "said"), [
    (12_345, "12,345 of 12,345 records right, 100 %"), (12_342, "12,342 of 12,345 records right, 99.9 %"),
    (997, "997 of 12,345 records right, 8.0 %"), (0, "0 of 12,345 records right, 0.0 %"),
])
def test_only_all_that_are_right_are_a_hundred_percent(right, said):
    assert _sentence({"records": 12_345, "right": right, "accuracy": right / 12_345, "without_score": 0,
                      "labels_of_no_class": 0}) == said


def test_a_picture_that_there_is_no_room_for_ends_with_74(published, capsys):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        assert show(published) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert capsys.readouterr().err.endswith("picture.png: the picture can't be written: File too large\n")


def test_a_source_that_moved_is_named(published, capsys):
    (published / "in.zarr").rename(published / "moved.zarr")
    assert show(published) == 65
    assert "in.zarr" in capsys.readouterr().err
    assert show(published, "--source", str(published / "moved.zarr")) == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--records", "0:10"], 64, "within 40:340"),
        (["-o", "picture.bmp"], 64, "-o picture.bmp: the picture is a PNG: wanted a name that ends with .png"),
        (["--records", "60:60"], 64, "A < B"),
        (["--labels", "short.npy"], 64, "found 7 labels, wanted 300"),
        (["--labels", "absent.npy"], 64, "no such file"),
        (["--labels", "words.npy"], 64, "one whole number a record"),
        (["--labels", "long.npy"], 64, "found 500 labels, wanted 300 (one for each record of 40:340) or 400 (one "),
        (["--labels", "broken.npy"], 64, "not a .npy file"),
        (["--labels", "cut.npy"], 64, "not a .npy file"),
        (["--labels", "huge.npy"], 64, "not a .npy file"),
        (["--labels", "zip.npy"], 64, "not a .npy file"),
        (["--labels", "five.png"], 64, "five.png: this is a file of another kind; wanted a .npy file or a Zarr array"),
        (["--records", f"0:{'9' * 5000}"], 64, "wanted A:B"),
        (["--source", "s3://[abc/x"], 64, "s3://[abc/x: not a URL"),
        (["--source", "short.zarr"], 64, "found uint8 of shape (339, 12, 12), wanted uint8 of shape (400, 12, 12): is"),
        (["-o", "no/such/folder.png", "--records", "60:60"], 64, "-o no/such/folder.png: can't write there: No such"),
    ],
)
def test_what_can_not_be_shown_is_refused_in_one_line(published, capsys, monkeypatch, flags, code, said):
    monkeypatch.chdir(published)
    np.save("short.npy", np.zeros(7, np.int64))
    np.save("words.npy", np.array(["a"] * 400))
    np.save("long.npy", np.zeros(500, np.int64))
    (published / "broken.npy").write_bytes(b"\x93NUMPY")
    whole = (published / "long.npy").read_bytes()
    (published / "cut.npy").write_bytes(whole.replace(b"}", b"(")[:200])
    (published / "huge.npy").write_bytes(whole.replace(b"(500,)", b"(9" + b"9" * 17 + b",)"))
    (published / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    (published / "five.png").touch()
    zarr.create_array(published / "short.zarr", data=np.zeros((339, 12, 12), np.uint8))
    assert show(published, *flags) == code
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("where", "said"), [
    ("in.zarr", "no published output there, nor one that was begun"),
    ("empty", "no published output there, nor one that was begun"),
    ("absent", "no published output there, nor one that was begun"),
    ("begun", "not published yet (no _SUCCESS): finish it with the same batch-client run"),
])
def test_a_place_without_a_published_output_is_refused(published, capsys, where, said):
    (published / "empty").mkdir()
    (published / "begun" / "_run").mkdir(parents=True)
    (published / "begun" / "_run" / "spec.json").write_text("{}")
    assert main(["show", str(published / where)]) == 78
    assert said in capsys.readouterr().err


def test_a_single_number_a_record_is_drawn_and_not_judged(published, capsys):
    group = zarr.create_group(published / "out.zarr", overwrite=True)
    group.create_array("value", data=np.linspace(-1, 1, 400, dtype=np.float32), chunks=(50,))
    group.create_array("record_status", data=np.zeros(400, np.uint8), chunks=(50,), config={"write_empty_chunks": True})
    publish(published, {"value": ()}, 0, 400)
    assert show(published, "--json") == 0
    assert figures(capsys)["accuracy"] is None
    assert show(published, "--labels", str(published / "labels.npy")) == 64
    assert "output value has one number a record and no score for each class" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "records", "right"), [
    (slice(40, 340), "45:55", 9),  # of the output
    (slice(45, 55), "45:55", 9),  # of the range
    (slice(0, 400), "45:55", 9),  # of the source
    (slice(40, 340), None, 297),
])
def test_labels_are_of_the_source_of_the_output_or_of_the_range(published, capsys, given, records, right):
    np.save(published / "given.npy", np.load(published / "labels.npy")[given])
    zarr.create_array(published / "given.zarr", data=np.load(published / "given.npy"), chunks=(7,))
    for name in ("given.npy", "given.zarr"):
        flags = [] if records is None else ["--records", records]
        assert show(published, "--labels", str(published / name), "--json", *flags) == 0
        assert figures(capsys)["right"] == right


def test_labels_that_memory_may_have_no_room_for_are_refused(published, capsys, monkeypatch):
    labels = published / "labels.npy"
    size = labels.stat().st_size
    monkeypatch.setattr("batch_client.labels.MOST_LABEL_BYTES", size)
    assert show(published, "--labels", str(labels)) == 0
    monkeypatch.setattr("batch_client.labels.MOST_LABEL_BYTES", size - 1)
    assert show(published, "--labels", str(labels)) == 64
    assert f"{size:,} bytes, over {size - 1:,}: wanted a Zarr array" in capsys.readouterr().err


def test_a_record_without_a_score_is_not_right_whatever_its_label(published, capsys):
    labels = np.load(published / "labels.npy")
    labels[70] = -1  # as data sets mark what nobody has labelled
    np.save(published / "labels.npy", labels)
    assert show(published, "--labels", str(published / "labels.npy"), "--json") == 0
    assert figures(capsys)["right"] == 297


def test_records_without_a_score_do_not_hide_those_that_the_model_was_least_sure_of():
    scores = np.linspace(0.9, 0.2, 100).astype(np.float32)
    classes = np.zeros(100, np.int64)
    classes[:20], scores[:20] = -1, np.nan
    titles = dict(_choose(_Said(0, 100, classes, scores, None), classes=True)[1:])
    assert titles["the 16 with the lowest best score"] == list(range(99, 83, -1))
    assert titles["16 of 20 without a score"] == list(range(16))


@pytest.mark.parametrize(("scored", "lowest", "highest"), [
    (range(20, 100), [*range(99, 91, -1)], [*range(20, 28)]), (range(3), [2, 1, 0], None), (range(0), None, None),
])
def test_of_one_number_a_record_the_lowest_and_the_highest_are_shown(scored, lowest, highest):
    scores = np.full(100, np.nan, np.float32)
    scores[scored] = np.linspace(40, -7, len(scored))
    classes = np.where(np.isnan(scores), -1, 0)
    titles = dict(_choose(_Said(0, 100, classes, scores, None), classes=False)[1:])
    assert titles.get(f"the {min(8, len(scored))} lowest") == lowest
    assert titles.get("the 8 highest") == highest
    assert len(titles) == (lowest is not None) + (highest is not None) + (len(scored) < 100)


@pytest.mark.parametrize("key", ["scores/zarr.json", "record_status/zarr.json"])
def test_metadata_that_can_not_be_read_is_said(published, capsys, key):
    (published / "out.zarr" / key).write_text("{")
    assert show(published) == 65
    err = capsys.readouterr().err
    assert "Zarr metadata can't be read" in err
    assert err.count("\n") == 1


SHAPES = {"scores": (4,), "logits": (4,), "age": (), "map": (2, 2)}


@pytest.mark.parametrize(("names", "shown"), [
    (("scores", "logits", "age", "map"), "scores"), (("logits", "scores", "age", "map"), "logits"),
    (("map", "age", "scores", "logits"), "scores"), (("map", "age"), "age"),
])
def test_of_several_outputs_the_models_first_with_classes_is_shown_and_named(
    published, capsys, monkeypatch, names, shown
):
    headings = []
    monkeypatch.setattr("batch_client.picture.draw", lambda heading, _: headings.append(heading) or b"")
    group = zarr.open_group(published / "out.zarr")
    for name in ("logits", "age", "map"):
        group.create_array(name, data=np.ones((COUNT, *SHAPES[name]), np.float32), chunks=(50, *SHAPES[name]))
    publish(published, {name: SHAPES[name] for name in names})
    assert show(published, "--json") == 0
    assert figures(capsys)["array"] == shown
    assert show(published) == 0
    assert capsys.readouterr().out.startswith(f"{shown}: 300 records")
    assert headings[-1].startswith(f"out.zarr: {shown}: 300 records")


def test_predictions_of_other_shapes_are_not_drawn(published, capsys):
    publish(published, {"map": (2, 2)})
    assert show(published) == 65
    assert "its predictions have shapes {'map': (2, 2)}, wanted a row of scores" in capsys.readouterr().err


@pytest.mark.parametrize(("written", "altered", "said"), [
    ('"format":3', '"format":99', "has format 99, wanted 3: use the version of batch-client that published it"),
    ('"source_dtype":"uint8"', '"source_dtype":8', "_run/manifest.json can't be read (Expected `str`, got `int`"),
    ('"outputs"', '"names"', "_run/manifest.json can't be read (Object missing required field `outputs`)"),
    ('"stop"', '"end"', "_run/manifest.json can't be read (KeyError: 'stop')"),
])
def test_a_manifest_that_can_not_be_read_is_said(published, capsys, written, altered, said):
    head = published / "out.zarr" / MANIFEST_KEY
    assert written in head.read_text()
    head.write_text(head.read_text().replace(written, altered))
    assert show(published) == 78
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("shape", "dtype"), [
    ((400, 12, 13), "uint8"), ((400, 12, 12), "int8"), ((400, 144), "uint8"), ((399, 12, 12), "uint8")])
def test_a_source_that_is_another_array_than_was_scored_is_refused(published, capsys, shape, dtype):
    zarr.create_array(published / "other.zarr", data=np.zeros(shape, dtype))
    assert show(published, "--source", str(published / "other.zarr")) == 64
    err = capsys.readouterr().err
    assert f"found {dtype} of shape {shape}, wanted uint8 of shape (400, 12, 12): is it the array that" in err
    assert err.count("\n") == 1


def test_a_source_that_has_grown_since_is_still_what_was_scored(published):
    zarr.open_array(published / "in.zarr").resize((410, 12, 12))
    assert show(published) == 0
    (published / "in.zarr").rename(published / "moved.zarr")
    assert show(published, "--source", str(published / "moved.zarr")) == 0


@pytest.mark.parametrize("name", ["a#b", "a?b", "#"])
def test_a_picture_has_its_outputs_name_whatever_is_in_it(published, monkeypatch, name):
    headings = []
    monkeypatch.setattr("batch_client.picture.draw", lambda heading, _: headings.append(heading) or b"")
    monkeypatch.chdir(published)
    (published / "out.zarr").rename(published / f"{name}.zarr")
    assert main(["show", f"{name}.zarr"]) == 0
    assert (published / f"{name}.png").exists()
    assert headings == [f"{name}.zarr: 300 records, 1 without a score"]


def test_everything_may_be_in_s3(published, capsys, monkeypatch, s3):
    for name, value in s3.environ().items():
        monkeypatch.setenv(name, value)
    bucket = S3Store("data")
    for path in sorted(path for path in published.rglob("*") if path.is_file()):
        obstore.put(bucket, f"show/{path.relative_to(published)}", path.read_bytes())
    monkeypatch.chdir(published)
    assert main(["show", "s3://data/show/out.zarr", "--source", "s3://data/show/in.zarr", "--labels",
                 "s3://data/show/labels.npy", "--json"]) == 0
    assert figures(capsys)["right"] == 297
    assert (published / "out.png").is_file()
