"""The handler as TorchServe calls it, with TorchServe's own Context and RequestProcessor."""

from __future__ import annotations

import io
import json
import math
import os
import runpy
from types import SimpleNamespace

import numpy as np
import pytest

from batch_handler import content, exchange, oip, service
from batch_handler.archive import pack
from batch_handler.counts import Counts
from batch_handler.exchange import Exchange
from batch_handler.model import Model, ModelLoadError
from batch_handler.oip import InferRequest, ModelMetadata, RequestedOutput, Tensor
from batch_handler.scoring import Failure
from batch_handler.service import METRICS, Service
from batch_handler.signature import InputSpec
from support.npy import npy

BINARY = {"exact": True, "first_row": 0, "binary_data_output": True}


def infer(data, parameters=None, *, binary=True, outputs=(), name="image", **header):
    """A row and its headers."""
    request = InferRequest("id-1", (Tensor(name, data),), tuple(outputs), parameters or {})
    message = oip.encode_request(request, binary=binary)
    headers = {"Content-Type": "application/octet-stream" if binary else "application/json"}
    if message.header_length is not None:
        headers["inference-HEADER-content-length"] = str(message.header_length)
    return {"body": bytearray(message.join())}, {**headers, **header}


def service_of(model, **options):
    """A service that tells its counts at once."""
    return Service(model, Exchange(model, **options), Counts(METRICS, seconds=0))


@pytest.fixture
def ask(tiny, tiny_dir, make_context):
    """Send rows as one server batch; each answer is its status, response headers and body."""

    def send(*asked, server=None):
        context = make_context(tiny_dir, *(headers for _, headers in asked))
        bodies = (server or service_of(tiny)).handle([row for row, _ in asked], context)
        assert all(isinstance(body, bytes) for body in bodies)
        answers = [
            (context.get_response_status(i)[0], context.get_response_headers(i), body) for i, body in enumerate(bodies)
        ]
        for status, headers, _ in answers:
            assert str(context.get_response_status(0)[1]).isascii()
            assert headers["content-type"].isascii()
            assert isinstance(status, int)
        send.counters = context.metrics.values
        return answers

    return send


def reply_of(answer):
    status, headers, body = answer
    assert status == 200, body
    length = headers.get(oip.HEADER_LENGTH)
    return oip.decode_reply(body, None if length is None else int(length), max_tensor_bytes=1 << 20)


@pytest.mark.parametrize(("seconds", "first_row", "most"), [
    (25.0, None, 16), (25.0, 3, 13), (25.0, 11, 13), (60.0, None, 8), (61.0, None, 8), (200.0, 3, 5),
    (1e-3, None, 480_000),
])
def test_a_request_that_takes_the_model_too_long_is_told_what_fits(ask, tiny_dir, seconds, first_row, most):
    class Slow(Model):
        micro_batch_ms = property(lambda _: seconds * 1e3)

    server = service_of(Slow.open(tiny_dir), max_records=1_000_000)
    parameters = {} if first_row is None else {**BINARY, "first_row": first_row}
    refused, taken = ask(infer(np.zeros((most + 1, 6, 6), "u1"), parameters), infer(
        np.zeros((min(most, 100), 6, 6), "u1"), parameters), server=server)
    assert refused[0] == 413
    assert json.loads(refused[2])["error"] == (
        f"the request's {most + 1} records would take over 60 s of this model: send at most {most} at a time")
    assert taken[0] == 200


def test_a_server_batch_that_takes_the_model_too_long_together_is_cut(ask, tiny_dir):
    """TorchServe's clock is of the whole batch; the first request is always taken."""
    class Slow(Model):
        micro_batch_ms = 25_000.0

    server = service_of(Slow.open(tiny_dir))
    bodies = [infer(np.zeros((records, 6, 6), "u1"), {}) for records in (16, 8, 2, 16)]
    answers = ask(*bodies, server=server)
    assert [status for status, _, _ in answers] == [200, 503, 200, 503]
    assert "ask again" in json.loads(answers[1][2])["error"]


def test_a_server_batch_whose_bodies_take_too_long_to_read_is_cut(ask, tiny):
    """The first is always read, and one that is begun in time is read to its end."""
    seconds = iter([0.0, 0.0, 9.0, 31.0, 31.0])
    server = Service(tiny, Exchange(tiny), Counts(METRICS, seconds=0), now=lambda: next(seconds))
    row = infer(np.zeros((1, 6, 6), "u1"), {})
    answers = ask(row, row, row, ({"body": b"{"}, {}), server=server)
    assert [status for status, _, _ in answers] == [200, 200, 503, 503]
    assert "ask again" in json.loads(answers[2][2])["error"]


def test_what_takes_the_model_no_time_is_answered_behind_whatever_is_slow(ask, tiny_dir):
    class Slow(Model):
        micro_batch_ms = 61_000.0

    row, metadata, nonsense = infer(np.zeros((8, 6, 6), "u1"), {}), ({}, {}), ({"body": b"{"}, {})
    answers = ask(row, metadata, nonsense, row, server=service_of(Slow.open(tiny_dir)))
    assert [status for status, _, _ in answers] == [200, 200, 400, 503]


@pytest.mark.parametrize(("first_row", "records", "statuses"), [
    (0, 2, [200, 200, 503, 503]), (6, 2, [200, 200, 503, 503]), (7, 2, [200, 503, 503, 503])])
def test_a_bulk_request_takes_the_time_of_its_whole_micro_batches(ask, tiny_dir, first_row, records, statuses):
    class Slow(Model):
        micro_batch_ms = 25_000.0

    row = infer(np.zeros((records, 6, 6), "u1"), {**BINARY, "first_row": first_row})
    assert [status for status, _, _ in ask(*[row] * 4, server=service_of(Slow.open(tiny_dir)))] == statuses


def test_a_server_batch_whose_replies_would_be_too_large_together_is_cut(ask, monkeypatch):
    """Java parses them as one message, again and again; the first request is always taken."""
    monkeypatch.setattr(service, "MAX_BATCH_BYTES", 100)
    binary = {"binary_data_output": True}  # 12 bytes of scores a record, or 60 of JSON
    bodies = [infer(np.zeros((records, 6, 6), "u1"), parameters) for records, parameters in (
        (9, BINARY), (1, {}), (5, binary), (4, binary), (3, binary), (1, {}))]
    assert [status for status, _, _ in ask(*bodies[:2])] == [200, 503]
    answers = ask(*bodies[2:])
    assert [status for status, _, _ in answers] == [200, 503, 200, 503]
    assert "ask again" in json.loads(answers[1][2])["error"]


@pytest.mark.parametrize("seconds", [math.inf, 0.0])
def test_without_a_measured_micro_batch_no_request_takes_too_long(seconds):
    assert exchange.most_in_time(8, seconds) == math.inf


def test_a_bulk_request(ask, tiny, images):
    row, headers = infer(images, BINARY)
    (answer,) = ask((row, headers))
    reply = reply_of(answer)
    assert [t.name for t in reply.outputs] == ["scores", "record_status"]
    np.testing.assert_array_equal(reply.outputs[0].data, tiny.score_bulk([images])[0])
    assert reply.outputs[1].data.tolist() == [0] * 50
    said = reply.parameters
    assert said["request_crc32c"] == oip.crc32c(row["body"])
    assert said["model_digest"] == tiny.digest
    assert said["fingerprint"] == tiny.fingerprint
    assert said["batch_requests"] == 1
    assert said["compute_ms"] > 0
    assert said["queue_ms"] >= 0
    assert (reply.id, reply.model_name, reply.model_version) == ("id-1", "tiny", "1.2")
    assert answer[1]["content-type"] == "application/octet-stream"
    assert ask.counters == {
        "Batches": 1, "BatchRequests": 1, "BatchRecords": 50, "MicroBatches": 7, "RejectedRequests": 0}


def test_every_kind_of_request_in_one_server_batch_and_none_spoils_another(ask, tiny, images):
    wanted = tiny.score_bulk([images])[0]
    answers = ask(
        infer(images[:3]),
        ({"body": bytearray(b"{")}, {"content-type": "application/json"}),
        ({"body": bytearray(npy(images[:2]))}, {"content-type": "application/x-npy"}),
        infer(images.astype("f4"), BINARY),
        ({"data": bytearray(json.dumps(images[:2].tolist()).encode())}, {}),
        infer(images, BINARY),
        ({"body": bytearray(npy(images[4]))}, {"Content-Type": "application/x-npy"}),
        ({"body": bytearray(npy(images[4]))}, {"content-type": "application/x-npy", "Accept": "application/json"}),
        ({"body": bytearray(b"x")}, {"content-type": "text/csv"}),
        infer(images[:1], **{"Content-Encoding": "gzip"}),
        ({}, {}),
    )
    assert [status for status, *_ in answers] == [200, 400, 200, 400, 200, 200, 200, 200, 415, 415, 200]
    np.testing.assert_array_equal(reply_of(answers[5]).outputs[0].data, wanted)
    np.testing.assert_allclose(reply_of(answers[0]).outputs[0].data, wanted[:3], atol=1e-6)
    np.testing.assert_allclose(np.load(io.BytesIO(answers[2][2])), wanted[:2], atol=1e-6)
    assert answers[2][1]["X-Model-Digest"] == tiny.digest
    np.testing.assert_allclose(json.loads(answers[4][2])["predictions"], wanted[:2], atol=1e-6)
    np.testing.assert_allclose(np.load(io.BytesIO(answers[6][2])), wanted[4], atol=1e-6)
    np.testing.assert_allclose(json.loads(answers[7][2])["predictions"], wanted[4:5], atol=1e-6)
    for index in (1, 3, 8, 9):
        assert set(json.loads(answers[index][2])) == {"error"}
        assert answers[index][1]["content-type"] == "application/json"
    assert ask.counters["RejectedRequests"] == 4
    assert ask.counters["BatchRequests"] == 11


@pytest.mark.parametrize("count", [1, 2])
def test_json_records(ask, images, count):
    body = bytearray(json.dumps({"instances": images[:count].tolist()}).encode())
    ((status, _, reply),) = ask(({"body": body}, {"content-type": "application/json; charset=utf-8"}))
    assert status == 200
    assert len(json.loads(reply)["predictions"]) == count


def test_oip_json_with_and_without_content_type(ask, tiny, images):
    row, _ = infer(images[:2], binary=False)
    wanted = tiny.score_bulk([images[:2]])[0]
    for headers in ({}, {"content-type": "application/json"}):
        (answer,) = ask((row, headers))
        reply = reply_of(answer)
        np.testing.assert_allclose(reply.outputs[0].data, wanted, atol=1e-6)
        assert reply.parameters["request_crc32c"] == oip.crc32c(row["body"])
        assert answer[1]["content-type"] == "application/json"


def test_outputs_are_chosen_by_name_and_form(ask, images):
    (answer,) = ask(
        infer(images[:2], outputs=[RequestedOutput("record_status", True), RequestedOutput("scores", False)])
    )
    reply = reply_of(answer)
    assert [t.name for t in reply.outputs] == ["record_status", "scores"]
    assert len(answer[2]) - int(answer[1][oip.HEADER_LENGTH]) == 2
    (answer,) = ask(infer(images[:2]))
    assert [t.name for t in reply_of(answer).outputs] == ["scores"]
    (answer,) = ask(infer(images[:2], BINARY, outputs=[RequestedOutput("scores")]))
    assert [t.name for t in reply_of(answer).outputs] == ["scores", "record_status"]
    ((status, _, body),) = ask(infer(images[:2], outputs=[RequestedOutput("logits")]))
    assert status == 400
    assert b"logits" in body


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        (infer(np.zeros((2, 6, 6), "u1"), name="picture"), 400, "wanted image"),
        (infer(np.zeros((2, 6, 6), "f4")), 400, "is FP32, wanted UINT8"),
        (infer(np.zeros((2, 6, 5), "u1")), 400, "input image has shape [2, 6, 5], wanted [n, 6, 6]"),
        (infer(np.zeros((101, 6, 6), "u1")), 413, "wanted at most"),
        (infer(np.zeros((1, 6, 6), "u1"), **{"Inference-Header-Content-Length": "x"}), 400, "number of bytes"),
        (({"body": bytearray(b"\x00\x01")}, {}), 415, "content type"),
        (({"body": bytearray(b"GIF")}, {"content-type": "image/gif"}), 400, "the picture"),
        (({"body": bytearray(b'{"a": 1}')}, {}), 400, "wanted a list"),
        (({"file": bytearray(b"[1]"), "more": b""}, {"file": {"content-type": "text/x"}}), 415, "text/x"),
    ],
)
def test_a_refusal_says_what_was_found_and_wanted(ask, tiny, asked, status, message):
    row, headers = asked
    headers = {k: v for k, v in headers.items() if not (k.startswith("inference-") and "Inference-Header-Content-Length" in headers)}  # fmt: skip # noqa: E501 - the table overrides one header
    ((found, _, body),) = ask((row, headers), server=service_of(tiny, max_records=100))
    assert found == status, body
    error = json.loads(body)["error"]
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_refused(ask, number):
    body = f"[[1, {number}]]".encode()
    simple, header = ask(({"body": body}, {}), ({"body": body}, {oip.HEADER_LENGTH: str(len(body))}))
    assert (simple[0], header[0]) == (400, 400)
    assert json.loads(simple[2])["error"] == (
        f"the JSON body can't be parsed: {number} is not JSON: numbers that are not finite can be sent as npy")
    assert json.loads(header[2])["error"] == (
        f"the JSON header can't be parsed: {number} is not JSON, wanted null for a number that is not finite")


@pytest.mark.parametrize("binary", [True, False])
def test_no_name_makes_a_refusal_long(ask, images, binary):
    """Of names in it Java would get six bytes a letter, and close the worker's connection over 64 MiB."""
    name = "é" * 100_000
    answers = ask(
        infer(images[:1], name=name, binary=binary),
        infer(images[:1].astype("f4"), name=name, binary=binary),
        infer(images[:1], outputs=[RequestedOutput(name)], binary=binary),
    )
    for status, _, body in answers:
        assert status == 400
        assert len(body) < 1000
        assert "wanted" in json.loads(body)["error"]
    assert len(exchange.failed(Failure(name)).body) < 20_000


def test_full_memory_is_no_fault_of_the_records(ask, images, monkeypatch):
    """The client takes 500 for what the model says of them."""
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(exchange, "parse_json", full)
    monkeypatch.setattr(content, "encode_npy", full)
    read, written, other = ask(
        ({"body": bytearray(b"[]")}, {"content-type": "application/json"}),
        ({"body": bytearray(npy(images[:2]))}, {"content-type": "application/x-npy"}),
        infer(images[:2]),
    )
    assert (read[0], json.loads(read[2])["error"]) == (507, "the server has no memory to read the request")
    assert (written[0], json.loads(written[2])["error"]) == (507, "the server has no memory to write the reply")
    assert other[0] == 200


@pytest.mark.parametrize("binary", [True, False])
def test_a_reply_that_could_not_be_sent_is_refused_before_anything_is_computed(ask, tiny, monkeypatch, binary):
    specs = [spec.tensor() for spec in tiny.description.outputs]
    raw = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
    monkeypatch.setattr(exchange, "MAX_REPLY_BYTES", 1000 * raw)
    most = 1000 if binary else 1000 * raw // (20 * sum(math.prod(spec.shape) for spec in specs))
    ((found, _, body),) = ask(infer(np.zeros((most, 6, 6), "u1"), {"binary_data_output": binary}))
    assert found == 200, body[:200]
    before = tiny.micro_batches
    ((found, _, body),) = ask(infer(np.zeros((most + 1, 6, 6), "u1"), {"binary_data_output": binary}))
    assert found == 413, body[:200]
    assert tiny.micro_batches == before
    assert b"send fewer at a time" in body
    assert (b"ask for binary data" in body) is not binary


def test_online_requests_of_the_protocol_share_a_micro_batch_and_bulk_requests_do_not(ask, tiny, images):
    for parameters, micro_batches in (({"binary_data_output": True}, 1), (BINARY, 2)):
        before = tiny.micro_batches
        for answer in ask(infer(images[:1], parameters), infer(images[1:2], parameters)):
            assert len(reply_of(answer).outputs[0].data) == 1
        assert tiny.micro_batches - before == micro_batches


def test_inputs_with_different_numbers_of_records_are_refused():
    def model_of(*names):
        """All that reading a request takes of a model: its signature."""
        inputs = tuple(InputSpec(name, np.dtype("f4"), (2,), (2,)) for name in names)
        return SimpleNamespace(description=SimpleNamespace(inputs=inputs, outputs=()))

    message = oip.encode_request(InferRequest("id-1", tuple(
        Tensor(name, np.zeros((count, 2), "f4")) for name, count in (("a", 3), ("b", 2)))))
    headers = {oip.HEADER_LENGTH.lower(): str(message.header_length)}
    reply = Exchange(model_of("a", "b")).read(exchange.Request(message.join(), headers))
    assert reply.status == 400
    assert json.loads(reply.body)["error"] == "inputs a, b have [3, 2] records, wanted equally many"


def test_a_reply_that_came_out_too_large_is_refused(ask, tiny, images, monkeypatch):
    monkeypatch.setattr(exchange, "_MAX_BODY_BYTES", 500)
    small, large = ask(infer(images[:1]), infer(images[:100]))
    assert small[0] == 200
    assert large[0] == 413
    assert b"the reply has" in large[2]


def test_a_picture_in_a_form_field(ask, images):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "PNG")
    ((status, _, body),) = ask(({"upload": bytearray(buffer.getvalue())}, {"upload": {"content-type": "image/png"}}))
    assert status == 200
    assert len(json.loads(body)["predictions"]) == 1


def test_metadata_of_an_empty_body(ask, tiny):
    # Some clients name a type in every request, also in one without a body.
    for row, headers in (({}, {}), ({"body": bytearray()}, {}), ({}, {"Content-Type": "application/json"})):
        ((status, _, body),) = ask((row, headers))
        assert status == 200
        metadata = ModelMetadata.from_json(json.loads(body))
        assert metadata.to_json() == tiny.metadata().to_json()
        assert metadata.parameters["micro_batch"] == 8
        assert 0 < metadata.parameters["micro_batch_ms"] < 60_000
        assert metadata.parameters["numerics"]["threads"] == 1
        assert metadata.platform == "pytorch_eager"


def test_a_request_without_records_is_answered(ask):
    (answer,) = ask(infer(np.zeros((0, 6, 6), "u1"), BINARY))
    assert reply_of(answer).outputs[0].data.shape == (0, 3)


def test_a_record_that_the_model_raises_on_fails_its_request_only(
    pack_request, arch_file, unpack, tmp_path, make_context, images
):
    import dataclasses

    import torch

    namespace = {}
    exec(arch_file.read_text(), namespace)  # noqa: S102 - text of the tests
    torch.save(namespace["make_fragile"]().state_dict(), tmp_path / "fragile.pt")
    directory = unpack(
        pack(
            dataclasses.replace(
                pack_request,
                model=tmp_path / "fragile.pt",
                arch=f"{arch_file}:make_fragile",
                inputs=(dataclasses.replace(pack_request.inputs[0], mean=None, std=None),),
                output=tmp_path / "fragile.mar",
            )
        )
    )
    guilty = images[:2].copy()
    guilty[1, 0, :2] = 13, 7
    asked = [infer(images[:3]), infer(guilty), infer(guilty, BINARY), infer(images, BINARY)]
    context = make_context(directory, *(headers for _, headers in asked))
    bodies = service_of(Model.open(directory)).handle([row for row, _ in asked], context)
    assert [context.get_response_status(i)[0] for i in range(4)] == [200, 500, 500, 200]
    assert json.loads(bodies[1]) == {"error": "the model raised ValueError: a record that this model does not like"}


def test_the_entry_of_an_archive_is_what_torchserve_loads(tiny_dir, make_context, images, monkeypatch):
    monkeypatch.setattr(service, "_WORKER", {})
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    entry = runpy.run_path(str(tiny_dir / "entry.py"))
    context = make_context(tiny_dir)
    assert entry["handle"](None, context) == []
    # Read by TorchServe's worker at each request; the checksum of a JSON body needs its bytes.
    assert os.environ["TS_DECODE_INPUT_REQUEST"] == "false"
    row, headers = infer(images, BINARY)
    (body,) = entry["handle"]([row], make_context(tiny_dir, headers))
    assert body[:1] == b"{"
    classes = [value for value in entry.values() if isinstance(value, type)]
    assert classes == []


def test_a_model_that_is_not_right_never_becomes_ready(tmp_path, make_context, monkeypatch, caplog):
    """And stays until its reason was read: TorchServe closes the output of a worker whose connection is lost."""
    waits = []
    monkeypatch.setattr(service.time, "sleep", lambda seconds: waits.append((seconds, "Traceback" in caplog.text)))
    monkeypatch.setattr(service, "_WORKER", {})
    with pytest.raises(ModelLoadError, match=r"model\.json can't be read"):
        service.handle(None, make_context(tmp_path))
    assert service._WORKER == {}
    assert waits == [(service.HEARD_SECONDS, True)]


def test_the_environment_tunes_a_worker():
    tuning, most = service.tuning_from(
        {"BATCH_HANDLER_THREADS": "3", "BATCH_HANDLER_MICRO_BATCH": "64", "BATCH_HANDLER_MAX_RECORDS": "9"}, 1
    )
    assert (tuning.threads, tuning.micro_batch, tuning.gpu_id, most) == (3, 64, 1, 9)
    tuning, most = service.tuning_from({}, None)
    assert (tuning.threads, tuning.micro_batch, tuning.gpu_id, most) == (1, None, None, 65_536)
    assert tuning.runtime is None
    assert service.tuning_from({"BATCH_HANDLER_RUNTIME": "torchscript"}, None)[0].runtime == "torchscript"
    with pytest.raises(ModelLoadError, match="BATCH_HANDLER_THREADS is '-1'"):
        service.tuning_from({"BATCH_HANDLER_THREADS": "-1"}, None)


def test_a_measured_ceiling_is_told_and_changes_no_bit(tiny, tiny_dir):
    tuning, _ = service.tuning_from({"BATCH_HANDLER_CEILING": "21400.5", "BATCH_HANDLER_RUNTIME": "eager"}, None)
    tuned = Model.open(tiny_dir, tuning)
    assert tuned.metadata().parameters["ceiling_records_per_s"] == 21400.5
    assert "ceiling_records_per_s" not in tiny.metadata().parameters
    assert (tuned.fingerprint, tuned.digest) == (tiny.fingerprint, tiny.digest)


@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "fast"])
def test_a_ceiling_that_is_none_is_refused(value):
    with pytest.raises(ModelLoadError, match=f"BATCH_HANDLER_CEILING is '{value}', wanted a number over 0"):
        service.tuning_from({"BATCH_HANDLER_CEILING": value}, None)
