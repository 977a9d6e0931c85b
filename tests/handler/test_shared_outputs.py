"""Outputs that a request wants in shared memory: the same bits as in a body, there or, where that can't be, sent."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from batch_handler import oip
from batch_handler.counts import Counts
from batch_handler.exchange import Exchange
from batch_handler.oip import Extent, InferReply, InferRequest, OipError, RequestedOutput, Tensor
from batch_handler.service import METRICS, Service

BULK = {"exact": True, "first_row": 5, "binary_data_output": True}
REGION = "9f1c-17"
COUNT = 50
SCORES, STATUS = COUNT * 3 * 4, COUNT
ROOM = 4096


def wanting(images, *outputs, parameters=BULK):
    return oip.encode_request(InferRequest("id-1", (Tensor("image", images),), outputs, parameters))


def scores_at(offset=64, size=SCORES, region=REGION):
    return RequestedOutput("scores", extent=Extent(region, offset, size))


def status_at(offset, size=STATUS, region=REGION):
    return RequestedOutput("record_status", extent=Extent(region, offset, size))


@pytest.fixture
def region(memory):
    """A region with room, full of a byte that no output has everywhere."""
    path = memory.folder / REGION
    path.write_bytes(b"\xaa" * ROOM)
    return path


@pytest.fixture
def reply_to(tiny, tiny_dir, make_context, memory):
    """The reply's body, its HTTP headers and its JSON header."""

    def send(message):
        service = Service(tiny, Exchange(tiny, shared_memory=memory), Counts(METRICS, seconds=0))
        context = make_context(tiny_dir, {oip.HEADER_LENGTH: str(message.header_length)})
        (body,) = service.handle([{"body": message.join()}], context)
        headers = context.get_response_headers(0)
        return body, headers, json.loads(body[:int(headers[oip.HEADER_LENGTH])])

    return send


def same_bits(found, wanted):
    assert [tensor.name for tensor in found.outputs] == [tensor.name for tensor in wanted.outputs]
    for ours, theirs in zip(found.outputs, wanted.outputs, strict=True):
        assert (ours.data.dtype, ours.data.shape) == (theirs.data.dtype, theirs.data.shape)
        assert ours.data.tobytes() == theirs.data.tobytes()


@pytest.mark.parametrize("outputs", [
    (scores_at(), RequestedOutput("record_status")),
    (status_at(0), scores_at(STATUS)),
    (RequestedOutput("record_status", binary=False), scores_at(ROOM - SCORES)),
    (scores_at(),),
], ids=["one", "both", "beside JSON", "status unasked"])
def test_outputs_are_where_they_are_wanted_bit_for_bit(ask, reply_to, region, images, outputs):
    plain = [RequestedOutput(output.name, True) for output in outputs]
    ((_, wanted),) = ask(wanting(images, *plain))
    ((status, found),) = ask(wanting(images, *outputs))
    assert status == 200
    same_bits(found, wanted)
    # And nowhere else: neither in the body nor beside their extents.
    left = bytearray(region.read_bytes())
    for output in outputs:
        if output.extent is not None:
            data = next(tensor.data.tobytes() for tensor in wanted.outputs if tensor.name == output.name)
            assert left[output.extent.offset:][:output.extent.size] == data
            left[output.extent.offset:output.extent.offset + output.extent.size] = b"\xaa" * output.extent.size
    assert left == b"\xaa" * ROOM
    body, headers, header = reply_to(wanting(images, *outputs))
    scores = next(tensor.data.tobytes() for tensor in wanted.outputs if tensor.name == "scores")
    assert scores not in body
    assert headers[oip.BODY_CHECKSUM] == str(oip.crc32c(body))
    described = {item["name"]: item.get("parameters") for item in header["outputs"]}
    assert described["scores"] == next(output.extent for output in outputs if output.name == "scores").to_json()


def test_an_online_query_may_have_its_outputs_there_too(ask, region, images):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), parameters={}))
    ((status, found),) = ask(wanting(images, scores_at(), parameters={}))
    assert status == 200
    same_bits(found, wanted)
    assert region.read_bytes()[64:64 + SCORES] == wanted.outputs[0].data.tobytes()
    # Where they can't be, they are as binary as there, whatever the request's other outputs are.
    region.unlink()
    ((_, found),) = ask(wanting(images, scores_at(), parameters={}))
    same_bits(found, wanted)
    assert "crc32c" in found.parameters


def gone(path):
    path.unlink()


def too_short(path):
    os.truncate(path, 64 + SCORES - 1)


def a_link(path):
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def a_fifo(path):
    path.unlink()
    os.mkfifo(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [gone, too_short, a_link, a_fifo, a_folder])
def test_outputs_that_can_not_be_put_there_are_sent(ask, reply_to, region, memory, images, spoil):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), RequestedOutput("record_status", True)))
    spoil(region)
    files = {path.name: path.read_bytes() for path in memory.folder.iterdir() if path.is_file()}
    asked = wanting(images, scores_at(), RequestedOutput("record_status"))
    ((status, found),) = ask(asked)
    assert status == 200
    same_bits(found, wanted)
    body, headers, header = reply_to(asked)
    assert wanted.outputs[0].data.tobytes() in body
    assert "shared_memory" not in json.dumps(header)
    assert headers[oip.BODY_CHECKSUM] == str(oip.crc32c(body))
    # Nothing was made, made longer or written through.
    assert {path.name: path.read_bytes() for path in memory.folder.iterdir() if path.is_file()} == files


def test_if_one_of_several_can_not_be_put_there_all_are_sent(ask, reply_to, region, images):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), RequestedOutput("record_status", True)))
    asked = wanting(images, scores_at(), status_at(0, region="gone"))
    ((status, found),) = ask(asked)
    assert status == 200
    same_bits(found, wanted)
    assert "shared_memory" not in json.dumps(reply_to(asked)[2])


@pytest.mark.parametrize("limit", [64, 64 + SCORES - 1], ids=["refused", "cut short"])
def test_outputs_for_which_the_memory_is_full_are_sent(ask, region, images, limit):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), RequestedOutput("record_status", True)))
    asked = wanting(images, scores_at(), RequestedOutput("record_status"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        ((status, found),) = ask(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 200
    same_bits(found, wanted)
    assert region.read_bytes()[limit:] == b"\xaa" * (ROOM - limit)  # it was full
    assert ask(asked)[0][0] == 200
    assert region.read_bytes()[64:64 + SCORES] == wanted.outputs[0].data.tobytes()


def test_one_whose_outputs_can_not_be_put_there_spoils_no_other_of_its_server_batch(ask, region, images):
    here, gone = wanting(images, scores_at()), wanting(images, scores_at(region="gone"))
    wrong, there = wanting(images, scores_at(size=1)), wanting(images, scores_at(offset=64 + SCORES))
    answers = ask(here, gone, wrong, wanting(images), there)
    assert [status for status, _ in answers] == [200, 200, 400, 200, 200]
    for index in (0, 1, 4):
        assert answers[index][1].outputs[0].data.tobytes() == answers[3][1].outputs[0].data.tobytes()


def test_no_region_is_left_open(ask, region, images):
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for name in (REGION, "gone"):
        for _ in range(10):
            assert ask(wanting(images, scores_at(region=name)))[0][0] == 200
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


def a_link_to_the_folder(folder):
    folder.rename(folder.with_name("real"))
    folder.symlink_to(folder.with_name("real"))


def another_users_folder(folder):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(folder, 12345, -1)


@pytest.mark.parametrize("replace", [a_link_to_the_folder, another_users_folder])
def test_nothing_is_written_or_read_where_the_folder_was(ask, memory, region, images, replace):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), RequestedOutput("record_status", True)))
    replace(memory.folder)
    ((status, found),) = ask(wanting(images, scores_at(), RequestedOutput("record_status")))
    assert status == 200
    same_bits(found, wanted)
    assert (memory.folder / REGION).read_bytes() == b"\xaa" * ROOM
    with pytest.raises(OipError, match=r"can't be opened: (Not a directory|Too many levels|the folder is another)"):
        memory.read(REGION, 0, 1)


def test_a_server_without_shared_memory_sends_them(ask, region, images):
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), RequestedOutput("record_status", True)))
    ((status, found),) = ask(wanting(images, scores_at(), RequestedOutput("record_status")), shared=None)
    assert status == 200
    same_bits(found, wanted)
    assert region.read_bytes() == b"\xaa" * ROOM


@pytest.mark.parametrize(("output", "said"), [
    (scores_at(size=SCORES - 1), f"output scores is given {SCORES - 1} bytes of shared memory, wanted {SCORES}"),
    (scores_at(size=SCORES + 1), f"output scores is given {SCORES + 1} bytes of shared memory, wanted {SCORES}"),
    (scores_at(size=0), f"output scores is given 0 bytes of shared memory, wanted {SCORES}"),
    (scores_at(size=-SCORES), "wanted numbers from 0"), (scores_at(offset=-1), "wanted numbers from 0"),
    (scores_at(offset=1 << 62), "wanted numbers from 0"), (scores_at(offset=10**400), "wanted numbers from 0"),
    (scores_at(region="../secret"), "shared_memory_region is '../secret', wanted the name of a file in"),
    (scores_at(region=""), "shared_memory_region is ''"),
    (RequestedOutput("other", extent=Extent(REGION, 0, 4)), "output 'other' is not one of the model's"),
])
def test_an_extent_that_can_be_none_is_refused_before_anything_is_scored(ask, region, images, output, said):
    ((status, error),) = ask(wanting(images, output))
    assert status == 400
    assert said in error
    assert len(error) < 300
    assert region.read_bytes() == b"\xaa" * ROOM


@pytest.mark.parametrize("parameters", [
    {"shared_memory_region": REGION}, {"shared_memory_region": 7, "shared_memory_byte_size": SCORES},
    {"shared_memory_region": REGION, "shared_memory_byte_size": "600"},
    {"shared_memory_region": REGION, "shared_memory_byte_size": SCORES, "shared_memory_offset": 1.5},
])
def test_parameters_that_are_half_or_of_another_kind_are_refused(ask, region, images, parameters):
    header = {"id": "x", "parameters": BULK, "outputs": [{"name": "scores", "parameters": parameters}],
              "inputs": [{"name": "image", "datatype": "UINT8", "shape": list(images.shape),
                          "parameters": {"binary_data_size": images.nbytes}}]}
    text = json.dumps(header).encode()
    ((status, _),) = ask(oip.Message((text, images.tobytes()), len(text), 0))
    assert status == 400
    assert region.read_bytes() == b"\xaa" * ROOM


def test_tritonclients_own_parameters_are_understood(ask, region, images):
    import tritonclient.http as triton

    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=True)
    output = triton.InferRequestedOutput("scores")
    output.set_shared_memory(REGION, SCORES, 128)
    body, length = triton.InferenceServerClient.generate_request_body([tensor], outputs=[output])
    ((_, wanted),) = ask(wanting(images, RequestedOutput("scores", True), parameters={}))
    ((status, found),) = ask(oip.Message((bytes(body),), length, 0))
    assert status == 200, found
    same_bits(found, wanted)
    assert region.read_bytes()[128:128 + SCORES] == wanted.outputs[0].data.tobytes()


def a_reply():
    outputs = (Tensor("a", np.arange(6, dtype="f4").reshape(3, 2)), Tensor("b", np.arange(3, dtype="u1")),
               Tensor("c", np.arange(3, dtype="i8")))
    return InferReply("i", "m", "1", outputs, {})


def test_a_replys_checksum_is_of_its_body_and_then_of_what_is_shared():
    extents = {"a": Extent(REGION, 0, 24), "c": Extent(REGION, 64, 24)}
    message = oip.encode_reply(a_reply(), binary={"a": True, "b": True, "c": True}, extents=extents)
    memory = bytearray(128)
    for extent, data in zip(extents.values(), message.shared, strict=True):
        memory[extent.offset:extent.offset + extent.size] = data
    assert message.crc32c == oip.crc32c(message.join())

    def read(region, offset, size):
        assert region == REGION
        return memory[offset:offset + size]

    back = oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=100, shared=read)
    same_bits(back, a_reply())
    assert back.parameters["crc32c"] == oip.crc32c(bytes([0, 1, 2]), memory[:24], memory[64:88])
    for bit in (0, 24 * 8 - 1, 64 * 8, 88 * 8 - 1):
        memory[bit // 8] ^= 1 << bit % 8
        with pytest.raises(OipError, match="CRC-32C"):
            oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=100, shared=read)
        memory[bit // 8] ^= 1 << bit % 8
    memory[30] ^= 1  # the control: a byte between the extents is nobody's
    same_bits(oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=100, shared=read), a_reply())


def test_outputs_in_memory_are_not_taken_without_a_checksum():
    extents = {"a": Extent(REGION, 0, 24)}
    message = oip.encode_reply(a_reply(), binary={"b": True, "c": True}, extents=extents)
    header = message.parts[0].replace(b'"crc32c"', b'"crc32x"')
    body = b"".join([header, *message.parts[1:]])
    with pytest.raises(OipError, match="the reply says None"):
        oip.decode_reply(body, message.header_length, max_tensor_bytes=100, shared=lambda *at: bytes(at[2]))
    # The control: one whose outputs are all in its body needs none.
    message = oip.encode_reply(a_reply(), binary={"a": True})
    body = b"".join([message.parts[0].replace(b'"crc32c"', b'"crc32x"'), *message.parts[1:]])
    same_bits(oip.decode_reply(body, message.header_length, max_tensor_bytes=100), a_reply())


def test_a_reply_whose_outputs_are_all_shared_has_a_length_of_its_header_all_the_same():
    extents = {name: Extent(REGION, at, size) for name, at, size in (("a", 0, 24), ("b", 64, 3), ("c", 128, 24))}
    message = oip.encode_reply(a_reply(), binary={}, extents=extents)
    assert message.header_length == len(message.join())
    with pytest.raises(OipError, match="there is none here"):
        oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=100)
    with pytest.raises(OipError, match="wanted at most 50"):  # 24, 3 and 24: more than that in all
        oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=50, shared=lambda *at: bytes(at[2]))


def test_what_is_in_shared_memory_is_not_counted_as_sent(ask, region, images, monkeypatch):
    """The replies of a server batch are bounded together."""
    monkeypatch.setattr("batch_handler.service.MAX_BATCH_BYTES", SCORES + STATUS)
    sent, kept = wanting(images), wanting(images, scores_at(), RequestedOutput("record_status"))
    assert [status for status, _ in ask(sent, kept)] == [200, 503]
    assert [status for status, _ in ask(kept, kept)] == [200, 200]


def test_outputs_that_can_not_be_put_there_are_sent_while_the_message_has_room(ask, region, images, monkeypatch):
    """The first that fits is answered, so that its client learns that there is no memory for outputs."""
    gone = wanting(images, scores_at(region="gone"), RequestedOutput("record_status"))
    kept = wanting(images, scores_at(), RequestedOutput("record_status"))
    monkeypatch.setattr("batch_handler.service.MAX_BATCH_BYTES", SCORES + 3 * STATUS)
    answers = ask(gone, gone, kept)
    assert [status for status, _ in answers] == [200, 503, 200]
    assert "ask again" in answers[1][1]
    monkeypatch.setattr("batch_handler.service.MAX_BATCH_BYTES", 2 * SCORES + 2 * STATUS - 1)
    # What was to be sent anyway has its room, whichever came first.
    assert [status for status, _ in ask(gone, wanting(images))] == [503, 200]
    assert [status for status, _ in ask(gone)] == [200]
