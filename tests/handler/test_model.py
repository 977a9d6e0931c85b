"""What keeps a worker from becoming ready, and the description it reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from batch_handler.draft import parse_signature
from batch_handler.fields import number
from batch_handler.model import Model, ModelLoadError, Tuning, check_files, read_description
from batch_handler.signature import (
    InputSpec,
    ModelDescription,
    OutputSpec,
    SignatureError,
    digest_of,
)


@pytest.fixture
def copied(tiny_dir, tmp_path):
    return shutil.copytree(tiny_dir, tmp_path / "copy")


def rewrite(directory, change):
    path = directory / "model.json"
    value = json.loads(path.read_text())
    change(value)
    value["digest"] = digest_of(value)
    path.write_text(json.dumps(value))


@contextmanager
def golden_scores(directory):
    """The golden records' scores, to be altered: the description agrees with them afterwards."""
    path = directory / "golden.npz"
    with np.load(path) as golden:
        arrays = dict(golden)
    yield arrays["output.scores"]
    np.savez(path, **arrays)
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(directory, lambda value: value["files"].update({"golden.npz": entry}))


def test_a_flipped_bit_in_the_weights_is_found_before_they_are_loaded(copied):
    path = copied / "weights.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"weights\.pt has SHA-256 .* wanted"):
        Model.open(copied)


def test_a_cut_or_missing_file_is_named_with_both_sizes(copied):
    description = read_description(copied)
    path = copied / "golden.npz"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=f"{size - 1} bytes, wanted {size}"):
        check_files(copied, description.files)
    path.unlink()
    with pytest.raises(ModelLoadError, match="can't be read"):
        Model.open(copied)


def test_golden_outputs_that_differ_keep_the_worker_from_serving(copied):
    with golden_scores(copied) as scores:
        scores[:] += np.float32(0.25)
    with pytest.raises(ModelLoadError, match=r"scores differs by 0\.25, wanted at most 1e-05"):
        Model.open(copied)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_golden_outputs_that_are_finite_on_one_side_only_differ(copied, value):
    with golden_scores(copied) as scores:
        scores[0, 0] = value
    with pytest.raises(ModelLoadError, match="output scores differs by inf"):
        Model.open(copied)


def test_a_description_changed_without_its_digest_is_refused(copied):
    path = copied / "model.json"
    path.write_text(path.read_text().replace('"softmax": true', '"softmax": false'))
    with pytest.raises(ModelLoadError, match="says digest"):
        Model.open(copied)


def test_micro_batch_is_tuning_and_not_part_of_the_digest(copied):
    before = read_description(copied).digest
    path = copied / "model.json"
    path.write_text(path.read_text().replace('"micro_batch": 8', '"micro_batch": 4'))
    assert read_description(copied).digest == before
    assert read_description(copied).micro_batch == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "format of model.json is 2, wanted 1"),
        (lambda v: v.pop("weights"), "has no weights"),
        (lambda v: v.update(more=1), "unknown field 'more'"),
        (lambda v: v.update(name="../x"), "name is '../x'"),
        (lambda v: v.update(runtime="onnx"), "runtime is 'onnx', wanted one of eager, torchscript"),
        (lambda v: v.update(micro_batch=0), "micro_batch is 0, wanted 1 to"),
        (lambda v: v.update(inputs=[]), "inputs are named []"),
        (lambda v: v["weights"].update(kind="exe"), "kind of weights is 'exe'"),
        (lambda v: v["weights"].update(file="../../etc/passwd"), "file of weights"),
        (lambda v: v["weights"].update(arch=None), "have no arch"),
        (lambda v: v["weights"].update(arch=3), "arch is 3"),
        (lambda v: v["files"].pop("golden.npz"), "files does not list golden.npz"),
        (lambda v: v["files"].update({"../x": {"bytes": 1, "sha256": "a"}}), "files lists '../x'"),
        (lambda v: v["inputs"][0].update(dtype="object"), "dtype of input image is 'object'"),
        (lambda v: v["inputs"][0].update(shape=[6, 0]), "shape of input image"),
        (lambda v: v["inputs"][0].update(model_shape=[1, 6, 7]), "as many elements"),
        (lambda v: v["inputs"][0].update(scale="x"), "scale of input image is 'x'"),
        (lambda v: v["inputs"][0].update(std=[0.0]), "std of input image holds 0"),
        (lambda v: v["inputs"][0].update(mean=[1, 2]), "mean of input image has 2 values"),
        (lambda v: v["inputs"][0].update(cast=False), "wanted no scale"),
        (lambda v: v["outputs"][0].update(name="record_status"), "a name that replies or stored outputs need"),
        (lambda v: v["outputs"][0].update(name="zarr.json"), "a name that replies or stored outputs need"),
        (lambda v: v["outputs"][0].update(dtype="int64"), "softmax, wanted a float"),
    ],
)
def test_a_description_that_cannot_be_right_says_why(copied, change, message):
    rewrite(copied, change)
    with pytest.raises((SignatureError, ModelLoadError)) as caught:
        read_description(copied)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_setting_of_the_micro_batch_is_held_to_the_bound_of_a_description(tiny_dir):
    with pytest.raises(ModelLoadError, match=r"micro_batch is 65537, wanted 1 to 65536$"):
        Model.open(tiny_dir, Tuning(micro_batch=65_537))


def test_a_description_there_and_back(tiny_dir):
    description = read_description(tiny_dir)
    assert ModelDescription.from_json(json.loads(json.dumps(description.to_json()))) == description


@pytest.mark.parametrize("text", [b"{", b"[]", b"[" * 100_000, b" " * (1 << 21)])
def test_nonsense_is_no_description(tmp_path, text):
    (tmp_path / "model.json").write_bytes(text)
    with pytest.raises(SignatureError):
        read_description(tmp_path)


def test_a_signature_file():
    draft = parse_signature(
        """
        [model]
        name = "digits"
        micro_batch = 64
        [[inputs]]
        name = "image"
        dtype = "uint8"
        shape = [28, 28]
        model_shape = [1, 28, 28]
        scale = "1/255"
        mean = 0.5
        [[outputs]]
        name = "scores"
        softmax = true
        """
    )
    assert draft.name == "digits"
    assert draft.version is None
    assert draft.micro_batch == 64
    assert draft.inputs == (InputSpec("image", np.dtype("u1"), (28, 28), (1, 28, 28), 1 / 255, (0.5,)),)
    assert (draft.outputs[0].name, draft.outputs[0].shape, draft.outputs[0].softmax) == ("scores", None, True)


@pytest.mark.parametrize(("text", "found"), [
    ("1/255", 1 / 255), (" 2 / 4 ", 0.5), ("0.00392156862745098", 1 / 255),
    ("3.9e-3", 0.0039), ("1E+2", 100.0), ("+1", 1.0), ("-1", -1.0), (2, 2.0)])
def test_a_number_may_be_text(text, found):
    assert number(text, "scale", "image") == pytest.approx(found)


@pytest.mark.parametrize("text", ["", "1/0", "1/", "/2", "one", "1e999", "nan", ".", "1/2/3", None, True,
                                  pytest.param(10**400, id="of 401 digits")])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(SignatureError, match="wanted a number or a fraction"):
        number(text, "scale", "image")


@pytest.mark.parametrize(
    "text",
    ["=", "x = 1", "[model]\nnam = 'a'", "[[inputs]]\nname = 'a'", "[model]\nmicro_batch = 0",
     pytest.param("x = 1" + "0" * 5000, id="a long integer"), pytest.param("x = " + "[" * 100_000, id="deep")],
)
def test_a_wrong_signature_file_is_refused(text):
    with pytest.raises(SignatureError):
        parse_signature(text)


def test_specs_refuse_what_has_no_datatype():
    with pytest.raises(SignatureError, match="no datatype"):
        OutputSpec("y", np.dtype("c8"), ())
