"""Requests whose records are in shared memory: the same answer as with a body, or a refusal that says why."""

from __future__ import annotations

import json
import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest

from batch_handler import oip
from batch_handler.exchange import Exchange, Request
from batch_handler.model import Model
from batch_handler.oip import InferRequest, RequestedOutput, Tensor
from batch_handler.shared import SHARED_MEMORY, SharedMemory, shared_memory_of

BULK = {"exact": True, "first_row": 5, "binary_data_output": True}
REGION = "9f1c-17"


def request(data, parameters=BULK, region=None, outputs=()):
    return oip.encode_request(InferRequest("id-1", (Tensor("image", data),), tuple(outputs), parameters),
                              region=region)


def leave(memory, message, name=REGION, before=b"", after=b""):
    (memory.folder / name).write_bytes(before + b"".join(message.shared) + after)


def with_parameters(images, **parameters):
    """A request whose tensor has these parameters, as any client may write them."""
    header = {"id": "id-1", "parameters": BULK,
              "inputs": [{"name": "image", "datatype": "UINT8", "shape": list(images.shape), "parameters": parameters}]}
    text = json.dumps(header).encode()
    return oip.Message((text,), len(text), oip.crc32c(text))


def in_memory(images, region=REGION, offset=0, size=None):
    return with_parameters(images, shared_memory_region=region, shared_memory_offset=offset,
                           shared_memory_byte_size=images.nbytes if size is None else size)


@pytest.mark.parametrize("parameters", [BULK, {"binary_data_output": True}], ids=["bulk", "online"])
@pytest.mark.parametrize("count", [1, 8, 50])
def test_the_answer_is_that_of_a_body_bit_for_bit(ask, memory, images, parameters, count):
    records = images[:count]
    outputs = [RequestedOutput("scores", None), RequestedOutput("record_status", None)]
    body, shared = request(records, parameters, outputs=outputs), request(records, parameters, REGION, outputs)
    assert len(shared.join()) < len(body.join()) or count == 1
    assert records.tobytes() not in shared.join()
    leave(memory, shared, after=b"what a longer request left")
    ((_, wanted),) = ask(body)
    ((status, found),) = ask(shared)
    assert status == 200
    for ours, theirs in zip(found.outputs, wanted.outputs, strict=True):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.data.view(np.uint8), theirs.data.view(np.uint8))
    assert found.parameters["request_crc32c"] == shared.crc32c == oip.crc32c(shared.join(), records.tobytes())
    assert wanted.parameters["request_crc32c"] == body.crc32c


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_of_a_region_is_left_open_or_changed(ask, memory, images):
    message = request(images, region=REGION)
    leave(memory, message)
    before, opened = (memory.folder / REGION).stat(), descriptors()
    for _ in range(20):
        assert ask(message)[0][0] == 200
    assert descriptors() == opened
    after = (memory.folder / REGION).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_several_tensors_are_one_after_the_other(memory):
    tensors = [Tensor("a", np.arange(6, dtype="u1").reshape(3, 2)), Tensor("b", np.arange(3, dtype="f8"))]
    message = oip.encode_request(InferRequest("i", tuple(tensors), (), {}), region=REGION)
    leave(memory, message)
    asked = oip.decode_request(message.join(), message.header_length, max_tensor_bytes=99, shared=memory.read)
    for ours, theirs in zip(asked.inputs, tensors, strict=True):
        np.testing.assert_array_equal(ours.data, theirs.data)
    assert message.nbytes == len(message.join()) + 6 + 24


def test_the_records_are_a_copy_that_no_later_write_changes(memory, images):
    message = request(images, region=REGION)
    leave(memory, message)
    asked = oip.decode_request(message.join(), message.header_length, max_tensor_bytes=1 << 20, shared=memory.read)
    (memory.folder / REGION).write_bytes(bytes(images.nbytes))
    os.truncate(memory.folder / REGION, 0)
    np.testing.assert_array_equal(asked.inputs[0].data, images)


def test_an_offset_leads_into_a_region(ask, memory, images):
    leave(memory, request(images[:8], region=REGION), before=b"123")
    ((status, found),) = ask(in_memory(images[:8], offset=3))
    ((_, wanted),) = ask(request(images[:8]))
    assert status == 200
    np.testing.assert_array_equal(found.outputs[0].data, wanted.outputs[0].data)
    # The control: another place has other records.
    ((_, other),) = ask(in_memory(images[:8], offset=2))
    assert (other.outputs[0].data != wanted.outputs[0].data).any()


@pytest.mark.parametrize("name", [
    "", ".", "..", "../secret", "/etc/passwd", "a/b", "./r-1", "r-1/", ".r-1", "-r-1", "r_1", "r 1", "r-1\n", "r\0",
    "é", "a" * 101, "a" * 100_000])
def test_a_name_that_is_no_regions_is_refused(ask, memory, images, name):
    secret = memory.folder.parent / "secret"
    secret.write_bytes(images[:2].tobytes())
    ((status, said),) = ask(in_memory(images[:2], region=name))
    assert status == 400
    assert "shared_memory_region is" in said
    assert len(said) < 300


def test_a_path_that_is_there_is_refused_as_one_that_is_not(ask, memory, images):
    (memory.folder / "r-1").write_bytes(images[:2].tobytes())
    assert ask(in_memory(images[:2], region="r-1"))[0][0] == 200
    for name in (str(memory.folder / "r-1"), "./r-1", "../memory/r-1"):
        assert ask(in_memory(images[:2], region=name))[0][0] == 400


def test_a_link_is_not_followed(ask, memory, images):
    target = memory.folder.parent / "secret"
    target.write_bytes(images[:2].tobytes())
    (memory.folder / REGION).symlink_to(target)
    ((status, said),) = ask(in_memory(images[:2]))
    assert (status, "can't be opened" in said) == (410, True)
    # The control: it is the link, not what is there.
    (memory.folder / REGION).unlink()
    target.rename(memory.folder / REGION)
    assert ask(in_memory(images[:2]))[0][0] == 200


def a_fifo(path):
    os.mkfifo(path)


def a_folder(path):
    path.mkdir()
    for number in range(300):  # so that its own size is more than what is asked for
        (path / f"file-with-a-long-name-{number}").touch()


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [a_fifo, a_folder, a_socket])
def test_what_is_no_file_neither_blocks_the_worker_nor_is_read(ask, memory, images, make, monkeypatch):
    monkeypatch.chdir(memory.folder)
    make(memory.folder / "r")  # a short path: a socket's is bounded
    for records in (images[:2], images[:0]):
        ((status, _),) = ask(in_memory(records, region="r"))
        assert status == 410
    assert ask(request(images[:2]))[0][0] == 200


def test_a_region_that_is_not_there_or_short_is_said_to_be_gone(ask, memory, images):
    message = request(images[:2], region=REGION)
    ((status, said),) = ask(message)
    assert (status, said) == (410, f"shared_memory_region {REGION} can't be opened: No such file or directory")
    leave(memory, message)
    os.truncate(memory.folder / REGION, images[:2].nbytes - 1)
    ((status, said),) = ask(message)
    assert (status, said) == (410, f"shared_memory_region {REGION} has 71 bytes, wanted 72")
    leave(memory, message)
    assert ask(message)[0][0] == 200


@pytest.mark.parametrize("offset", [1, 71, 72, 1 << 40, (1 << 62) - 1])
def test_an_offset_behind_the_end_is_said_to_be_gone(ask, memory, images, offset):
    leave(memory, request(images[:2], region=REGION))
    assert ask(in_memory(images[:2], offset=offset))[0][0] == 410


@pytest.mark.parametrize("offset", [-1, -72, -(1 << 70), 1 << 62, 1 << 63, 1 << 64, 10**400, 1.5, "0", True, [0]])
def test_an_offset_that_is_none_is_refused(ask, memory, images, offset):
    leave(memory, request(images[:2], region=REGION), after=bytes(100))
    assert ask(in_memory(images[:2], offset=offset))[0][0] == 400


@pytest.mark.parametrize("size", [0, -1, 71, 73, 144, 1 << 40, 10**400, "72", 72.0])
def test_a_size_that_is_not_the_shapes_is_refused(ask, memory, images, size):
    leave(memory, request(images[:2], region=REGION), after=bytes(100))
    assert ask(in_memory(images[:2], size=size))[0][0] == 400


@pytest.mark.parametrize("parameters", [
    {"shared_memory_region": REGION}, {"shared_memory_region": 7, "shared_memory_byte_size": 72},
    {"shared_memory_region": None, "shared_memory_byte_size": 72},
    {"shared_memory_region": [REGION], "shared_memory_byte_size": 72},
    {"shared_memory_byte_size": 72}, {"shared_memory_offset": 0},
])
def test_parameters_that_are_half_or_of_another_kind_are_refused(ask, memory, images, parameters):
    leave(memory, request(images[:2], region=REGION))
    assert ask(with_parameters(images[:2], **parameters))[0][0] == 400


def test_a_shape_of_more_than_the_server_takes_is_refused_before_it_is_read(ask, memory, images):
    many = np.broadcast_to(images[:1], (1 << 27, 6, 6))
    header = json.dumps({"id": "x", "inputs": [{
        "name": "image", "datatype": "UINT8", "shape": list(many.shape),
        "parameters": {"shared_memory_region": REGION, "shared_memory_byte_size": many.size}}]}).encode()
    with (memory.folder / REGION).open("wb") as file:
        file.truncate(many.size)  # a file with a hole: nothing is stored
    assert ask(oip.Message((header,), len(header), 0))[0][0] in (400, 413)


def test_what_would_take_the_model_too_long_is_refused_before_it_is_read(tiny_dir, memory, images):
    class Slow(Model):
        micro_batch_ms = 25_000.0

    class Watched(SharedMemory):
        def read(self, region, offset, size):
            sizes.append(size)
            return super().read(region, offset, size)

    sizes: list[int] = []
    exchange = Exchange(Slow.open(tiny_dir), shared_memory=Watched(memory.folder))
    replies = []
    for count in (16, 17):
        message = request(images[:count], {}, REGION)
        leave(memory, message)
        replies.append(exchange.read(Request(message.join(), {oip.HEADER_LENGTH.lower(): str(message.header_length)})))
    assert replies[0].query.records == 16
    assert replies[1].status == 413
    assert b"612 bytes in shared memory would take over 60 s of this model: send at most 576" in replies[1].body
    assert sizes == [16 * 36]


def test_a_region_of_which_the_system_gives_a_part_at_a_time_is_read_whole(memory, monkeypatch):
    """Linux gives 2 GiB at once at most."""
    (memory.folder / REGION).write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:7]], offset))
    assert memory.read(REGION, 9, 91) == bytes(range(9, 100))


def test_a_server_without_shared_memory_says_so_and_takes_the_body(ask, memory, images):
    message = request(images[:2], region=REGION)
    leave(memory, message)
    ((status, said),) = ask(message, shared=None)
    assert (status, said) == (
        410, '"image" is said to be in shared memory, wanted it in the body: there is none here')
    assert ask(request(images[:2]), shared=None)[0][0] == 200


def test_a_json_request_may_name_a_region_too(ask, memory, images):
    # tritonclient writes such a request as JSON without any binary tail, and without the header's length.
    message = in_memory(images[:2])
    leave(memory, request(images[:2], region=REGION))
    row = oip.Message(message.parts, None, message.crc32c)
    ((_, wanted),) = ask(request(images[:2]))
    ((status, found),) = ask(row, **{"content-type": "application/json", oip.HEADER_LENGTH: str(len(row.join()))})
    assert status == 200
    np.testing.assert_array_equal(found.outputs[0].data, wanted.outputs[0].data)


def test_tritonclients_own_parameters_are_understood(ask, memory, images):
    import tritonclient.http as triton

    tensor = triton.InferInput("image", [2, 6, 6], "UINT8")
    tensor.set_shared_memory(REGION, images[:2].nbytes, 0)
    body, length = triton.InferenceServerClient.generate_request_body([tensor])
    leave(memory, request(images[:2], region=REGION))
    message = oip.Message((bytes(body),), length or len(body), 0)
    ((status, found),) = ask(message)
    ((_, wanted),) = ask(request(images[:2], {}))
    assert status == 200, found
    np.testing.assert_array_equal(found.outputs[0].data, wanted.outputs[0].data)


def test_one_that_is_gone_spoils_no_other_of_its_server_batch(ask, memory, images):
    message = request(images, region=REGION)
    leave(memory, message)
    answers = ask(message, request(images, region="gone"), request(images), in_memory(images, region="../x"), message)
    assert [status for status, _ in answers] == [200, 410, 200, 400, 200]
    for index in (0, 4):
        np.testing.assert_array_equal(answers[index][1].outputs[0].data, answers[2][1].outputs[0].data)


def test_every_flipped_bit_of_a_region_has_another_checksum(ask, memory, images):
    message = request(images[:4], region=REGION)
    good = b"".join(message.shared)
    rng = random.Random(9)
    for bit in rng.sample(range(len(good) * 8), 100):
        altered = bytearray(good)
        altered[bit // 8] ^= 1 << bit % 8
        (memory.folder / REGION).write_bytes(altered)
        ((status, found),) = ask(message)
        assert status == 200
        assert found.parameters["request_crc32c"] != message.crc32c
    leave(memory, message)
    assert ask(message)[0][1].parameters["request_crc32c"] == message.crc32c


def test_the_metadata_names_the_folder_and_the_environment_gives_it(tiny, memory):
    def parameters(shared):
        reply = Exchange(tiny, shared_memory=shared).read(Request(b"", {}))
        return json.loads(reply.body)["parameters"]

    assert parameters(memory)["shared_memory"] == str(memory.folder)
    assert "shared_memory" not in parameters(None)
    assert shared_memory_of({SHARED_MEMORY: str(memory.folder)}).folder == memory.folder
    assert shared_memory_of({}) is None
    assert shared_memory_of({SHARED_MEMORY: ""}) is None
