"""The wire format: one table in both directions, then everything that is wrong with a body."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_handler import oip
from batch_handler.oip import InferReply, InferRequest, ModelMetadata, OipError, RequestedOutput, Tensor, TensorSpec
from batch_handler.tensors import Fields, refuse_duplicates

LIMIT = 1 << 20


def array_of(dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "b":
        return np.array([[True, False], [False, True]])
    if dtype.kind == "f":
        return np.array([[1.5, -2.25], [0.0, np.finfo(dtype).max]], dtype)
    bounds = np.iinfo(dtype)
    return np.array([[bounds.min, bounds.max], [0, 1]], dtype)


REQUESTS = [
    InferRequest("r", (Tensor("x", array_of(dtype)),), parameters={"exact": True, "first_row": 9})
    for dtype in oip.DATATYPES.values()
] + [
    InferRequest("", (Tensor("empty", np.zeros((0, 3), "f4")),)),
    InferRequest("scalars", (Tensor("x", np.arange(3, dtype="i8")), Tensor("y", np.ones((3, 1), "f2")))),
    InferRequest(
        "o",
        (Tensor("x", np.zeros((1, 2), "u1")),),
        (RequestedOutput("a"), RequestedOutput("b", True), RequestedOutput("c", False)),
        {"binary_data_output": True},
    ),
]  # fmt: skip


@given(st.sampled_from([*oip.DATATYPES.values(), np.dtype(">f4")]), st.lists(st.integers(0, 4), max_size=4).map(sorted),
       st.sampled_from([{}, {"binary": False}, {"region": "r"}]))
def test_a_tensor_in_several_arrays_is_the_same_message(dtype, cuts, way):
    data = np.repeat(array_of(dtype), 2, axis=0).astype(dtype)
    first, *more = np.split(data, cuts)
    whole, parts = (oip.encode_request(InferRequest("r", (tensor, Tensor("y", data))), **way)
                    for tensor in (Tensor("x", data), Tensor("x", first, tuple(more))))
    assert b"".join(parts.parts) == b"".join(whole.parts)
    assert b"".join(parts.shared) == b"".join(whole.shared)
    assert (parts.header_length, parts.crc32c) == (whole.header_length, whole.crc32c)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    assert [t.name for t in one] == [t.name for t in other]
    for a, b in zip(one, other, strict=True):
        assert a.data.dtype == b.data.dtype
        assert a.data.shape == b.data.shape
        assert a.data.tobytes() == b.data.tobytes()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.id + "-" + str(r.inputs[0].data.dtype))
def test_request_there_and_back(request_, binary):
    message = oip.encode_request(request_, binary=binary)
    body = message.join()
    assert message.nbytes == len(body)
    assert message.crc32c == oip.crc32c(body) == oip.crc32c(bytearray(body)) == oip.crc32c(*message.parts)
    assert (message.header_length is None) == (not binary)
    back = oip.decode_request(body, message.header_length, max_tensor_bytes=LIMIT)
    same(request_.inputs, back.inputs)
    assert (back.id, back.outputs, dict(back.parameters)) == (
        request_.id,
        request_.outputs,
        dict(request_.parameters),
    )
    assert (back.exact, back.first_row) == (request_.exact, request_.first_row)


@pytest.mark.parametrize("binary", [{"s": True, "t": True}, {"s": True}, {"t": True}, {}])
def test_reply_there_and_back(binary):
    outputs = (Tensor("s", np.array([[1.5, 2.5]], "f4")), Tensor("t", np.array([3], "u1")))
    reply = InferReply("i", "m", "1.0", outputs, {"model_digest": "d"})
    message = oip.encode_reply(reply, binary=binary)
    back = oip.decode_reply(message.join(), message.header_length, max_tensor_bytes=LIMIT)
    same(outputs, back.outputs)
    assert (back.id, back.model_name, back.model_version) == ("i", "m", "1.0")
    assert ("crc32c" in back.parameters) == bool(binary)


def test_binary_tensors_are_views_both_ways():
    data = np.arange(12, dtype="<f4").reshape(3, 4)
    message = oip.encode_request(InferRequest("", (Tensor("x", data),)))
    assert np.shares_memory(np.frombuffer(message.parts[1], "f4"), data)
    body = bytearray(message.join())
    back = oip.decode_request(body, message.header_length, max_tensor_bytes=LIMIT)
    assert np.shares_memory(back.inputs[0].data, np.frombuffer(body, np.uint8))
    assert back.inputs[0].data.flags.aligned


def test_big_endian_and_strided_arrays_are_sent_little_endian_in_c_order():
    data = np.arange(12, dtype=">i4").reshape(3, 4).T
    message = oip.encode_request(InferRequest("", (Tensor("x", data),)))
    back = oip.decode_request(message.join(), message.header_length, max_tensor_bytes=LIMIT)
    np.testing.assert_array_equal(back.inputs[0].data, data)


def test_what_is_not_finite_is_null_in_json_and_nan_when_read():
    reply = InferReply("", "m", "1", (Tensor("s", np.array([np.nan, np.inf, 1.0], "f4")),))
    body = oip.encode_reply(reply, binary={}).join()
    assert json.loads(body)["outputs"][0]["data"] == [None, None, 1.0]
    back = oip.decode_reply(body, None, max_tensor_bytes=LIMIT).outputs[0].data
    assert np.isnan(back[:2]).all()
    assert back[2] == 1.0


def test_nan_travels_in_binary_with_its_bits():
    bits = np.array([0x7FC00001, 0xFF800000], np.uint32).view("f4")
    message = oip.encode_request(InferRequest("", (Tensor("x", bits),)))
    back = oip.decode_request(message.join(), message.header_length, max_tensor_bytes=LIMIT)
    np.testing.assert_array_equal(back.inputs[0].data.view(np.uint32), bits.view(np.uint32))


@pytest.mark.parametrize("binary", [True, False])
def test_a_body_cut_anywhere_is_refused(binary):
    message = oip.encode_request(REQUESTS[5], binary=binary)
    body = message.join()
    for cut in range(len(body)):
        with pytest.raises(OipError):
            oip.decode_request(body[:cut], message.header_length, max_tensor_bytes=LIMIT)


def test_a_reply_cut_anywhere_is_refused():
    message = oip.encode_reply(InferReply("i", "m", "1", (Tensor("s", np.ones(4, "f4")),)), binary={"s": True})
    body = message.join()
    for cut in range(len(body)):
        with pytest.raises(OipError):
            oip.decode_reply(body[:cut], message.header_length, max_tensor_bytes=LIMIT)


def test_a_flipped_bit_in_a_reply_is_noticed():
    message = oip.encode_reply(InferReply("i", "m", "1", (Tensor("s", np.ones(4, "f4")),)), binary={"s": True})
    body = bytearray(message.join())
    body[-1] ^= 1
    with pytest.raises(OipError, match="CRC-32C"):
        oip.decode_reply(body, message.header_length, max_tensor_bytes=LIMIT)


@pytest.mark.parametrize("binary", [True, False])
def test_trailing_bytes_are_refused(binary):
    message = oip.encode_request(REQUESTS[0], binary=binary)
    with pytest.raises(OipError):
        oip.decode_request(message.join() + b"\0", message.header_length, max_tensor_bytes=LIMIT)


def tensor(**changes: object) -> dict[str, object]:
    return {"name": "x", "datatype": "UINT8", "shape": [1, 2], "data": [1, 2]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "request is [], wanted an object"),
        ({}, "request has no inputs"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": {}}, "wanted an array"),
        ({"inputs": [1]}, "an input is 1, wanted an object"),
        ({"inputs": [tensor()], "extra": 1}, "unknown field"),
        ({"inputs": [tensor(extra=1)]}, "unknown field"),
        ({"inputs": [{"name": "x"}]}, "has no datatype"),
        ({"inputs": [tensor(), tensor()]}, "named twice"),
        ({"inputs": [tensor(name=3)]}, "name of an input is 3, wanted a string"),
        ({"inputs": [tensor(datatype="BYTES")]}, "wanted one of BOOL"),
        ({"inputs": [tensor(datatype="object")]}, "wanted one of BOOL"),
        ({"inputs": [tensor(shape=[])]}, 'shape of "x"'),
        ({"inputs": [tensor(shape=[1, -2])]}, 'shape of "x"'),
        ({"inputs": [tensor(shape=[1, True])]}, 'shape of "x"'),
        ({"inputs": [tensor(shape=[1, 2.0])]}, 'shape of "x"'),
        ({"inputs": [tensor(shape=[1] * 65)]}, 'shape of "x"'),
        ({"inputs": [tensor(shape=[LIMIT, LIMIT])]}, "wanted at most"),
        ({"inputs": [tensor(shape=[10**30, 0])]}, "wanted sizes and bytes of at most"),
        ({"inputs": [tensor(shape=[10**4000, 10**4000])]}, "wanted sizes and bytes of at most"),
        ({"inputs": [tensor(shape=[1, 3])]}, "has 2 values, wanted 3"),
        ({"inputs": [tensor(data=[1, 256])]}, "256, outside uint8"),
        ({"inputs": [tensor(data=[1, -1])]}, "-1, outside uint8"),
        ({"inputs": [tensor(data=[1, 1.5])]}, "1.5, wanted values of uint8"),
        ({"inputs": [tensor(data=[1, None])]}, "null, wanted values of uint8"),
        ({"inputs": [tensor(data=[1, True])]}, "true, wanted values of uint8"),
        ({"inputs": [tensor(data=["a", "b"])]}, "wanted values of uint8"),
        ({"inputs": [tensor(data=[[1], [2]])]}, "not nested by the shape of a record, [2]"),
        ({"inputs": [tensor(datatype="FP32", data=[1, 1e39])]}, "outside float32"),
        ({"inputs": [tensor(datatype="FP64", data=[1, 10**400])]}, "outside float64"),
        ({"inputs": [tensor(datatype="BOOL", data=[1, 0])]}, "wanted values of bool"),
        ({"inputs": [tensor(parameters={"binary_data_size": 2})]}, "0 bytes left in the body, wanted 2"),
        ({"inputs": [tensor(parameters={"binary_data_size": "2"})]}, "binary_data_size"),
        ({"inputs": [tensor()], "outputs": [{}]}, "requested output has no name"),
        ({"inputs": [tensor()], "outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"inputs": [tensor()], "outputs": [{"name": "a"}, {"name": "a"}]}, "named twice"),
        ({"inputs": [tensor()], "parameters": {"exact": 1}}, "parameter exact is 1"),
        ({"inputs": [tensor()], "parameters": {"exact": True}}, "no parameter first_row"),
        ({"inputs": [tensor()], "parameters": {"exact": True, "first_row": -1}}, "first_row is -1"),
        ({"inputs": [tensor()], "parameters": {"exact": True, "first_row": True}}, "first_row is true"),
        ({"inputs": [tensor()], "id": 7}, "id of request is 7, wanted a string"),
    ],
)
def test_a_wrong_json_request_is_told_what_is_wrong(header, message):
    with pytest.raises(OipError) as caught:
        oip.decode_request(json.dumps(header).encode(), None, max_tensor_bytes=LIMIT)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("header", [
    {"inputs": [tensor(name="é" * 1000, **changes)]} for changes in (
        {"datatype": "BYTES"}, {"shape": []}, {"shape": [LIMIT, LIMIT]}, {"shape": [10**30]}, {"shape": [1, 3]},
        {"data": [1, 256]}, {"data": [1, 1.5]}, {"data": [[1], [2]]}, {"datatype": "FP32", "data": [1, 1e39]},
        {"datatype": "FP64", "data": [1, 10**400]}, {"parameters": {"binary_data_size": 2}},
        {"parameters": {"binary_data_size": 3}}, {"parameters": {"shared_memory_region": "r"}},
        {"parameters": {"shared_memory_region": 1, "shared_memory_byte_size": 2}},
        {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": -1}},
        {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 3}},
        {"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 2}})
] + [
    {"inputs": [tensor()], "outputs": [{"name": "é" * 1000, "parameters": parameters}]} for parameters in (
        {"binary_data": 1}, {"shared_memory_region": "r"},
        {"shared_memory_region": "r", "shared_memory_byte_size": -1})
])
def test_a_long_name_makes_no_long_message(header):
    with pytest.raises(OipError) as caught:
        oip.decode_request(json.dumps(header).encode(), None, max_tensor_bytes=LIMIT,
                           shared=lambda region, offset, size: b"ab")
    assert len(str(caught.value)) < 300


def test_a_value_that_is_nested_too_deeply_to_be_shown_is_refused_all_the_same():
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(OipError, match="request is nested too deeply, wanted an object"):
        Fields(value, "request")


def test_an_input_that_is_there_twice_is_refused():
    """Nothing says which of them is meant."""
    twice = {"name": "x", "datatype": "UINT8", "shape": [1, 2], "data": [1, 2], "parameters": {"binary_data_size": 2}}
    header = json.dumps({"inputs": [twice]}).encode()
    with pytest.raises(OipError, match='input "x" has data in the JSON and bytes elsewhere, wanted one of them'):
        oip.decode_request(header + b"\7\7", len(header), max_tensor_bytes=LIMIT)
    del twice["data"]
    header = json.dumps({"inputs": [twice]}).encode()
    (found,) = oip.decode_request(header + b"\7\7", len(header), max_tensor_bytes=LIMIT).inputs
    assert found.data.tolist() == [[7, 7]]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"inputs": NaN}', b"1" * 5000],
    ids=["empty", "half", "no-utf8", "deep", "nan", "long-int"],
)
def test_what_is_not_json_is_refused(body):
    with pytest.raises(OipError):
        oip.decode_request(body, None, max_tensor_bytes=LIMIT)


@pytest.mark.parametrize("length", [-1, 0, 10**9])
def test_a_wrong_header_length_is_refused(length):
    with pytest.raises(OipError, match="said to be"):
        oip.decode_request(b"{}", length, max_tensor_bytes=LIMIT)


def test_a_hundred_thousand_names_are_compared_in_no_time():
    """A quadratic comparison would take minutes, longer than a worker has for an answer."""
    names = [f"x{number}" for number in range(100_000)]
    refuse_duplicates("output", names)
    with pytest.raises(OipError, match='"x7" is named twice'):
        refuse_duplicates("output", [*names, "x7"])


def test_too_many_bytes_are_413_and_bools_are_0_or_1():
    message = oip.encode_request(InferRequest("", (Tensor("x", np.zeros(100, "u1")),)))
    with pytest.raises(OipError) as caught:
        oip.decode_request(message.join(), message.header_length, max_tensor_bytes=99)
    assert caught.value.status == 413
    for shape in ([0, 50_000_000, 50_000_000, 50_000_000], [0] + [99] * 40):  # of no bytes, and too large for numpy
        head = {"name": "x", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": 0}}
        body = json.dumps({"inputs": [head]}).encode()
        with pytest.raises(OipError, match="wanted sizes and bytes of at most") as caught:
            oip.decode_request(body, len(body), max_tensor_bytes=1 << 26)
        assert caught.value.status == 413
    message = oip.encode_request(InferRequest("", (Tensor("x", np.array([True])),)))
    with pytest.raises(OipError, match="neither 0 nor 1"):
        oip.decode_request(message.join()[:-1] + b"\x02", message.header_length, max_tensor_bytes=99)


def in_shared_memory(name, size):
    return {"name": name, "datatype": "UINT8", "shape": [size],
            "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": size}}


def test_a_reply_with_outputs_in_shared_memory_has_to_have_their_checksum():
    body = json.dumps({"id": "1", "outputs": [in_shared_memory("y", 4)]}).encode()
    with pytest.raises(OipError, match="CRC-32C"):
        oip.decode_reply(body, None, max_tensor_bytes=LIMIT, shared=lambda region, offset, size: bytes(size))


def test_all_that_a_message_has_in_shared_memory_is_bounded_together():
    body = json.dumps({"id": "1", "inputs": [in_shared_memory(name, 60) for name in "ab"]}).encode()
    asked = []

    def read(region, offset, size):
        asked.append(size)
        return bytes(size)

    assert len(oip.decode_request(body, None, max_tensor_bytes=120, shared=read).inputs) == 2
    asked.clear()
    with pytest.raises(OipError, match="120 bytes are said to be in shared memory, wanted at most 119"):
        oip.decode_request(body, None, max_tensor_bytes=119, shared=read)
    assert asked == [60]


@given(st.binary(max_size=200), st.none() | st.integers(0, 200))
def test_no_bytes_raise_anything_else(body, length):
    for decode in (oip.decode_request, oip.decode_reply):
        with pytest.raises(OipError):
            decode(body, length, max_tensor_bytes=LIMIT)


def test_metadata_there_and_back():
    metadata = ModelMetadata(
        "m", ("1",), "pytorch_eager", (TensorSpec("x", np.dtype("u1"), (28, 28)),), (), {"micro_batch": 4}
    )
    assert ModelMetadata.from_json(json.loads(json.dumps(metadata.to_json()))) == metadata


def test_metadata_of_other_servers():
    read = ModelMetadata.from_json(
        {
            "name": "m",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, -1]}],
            "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
        }
    )
    assert read.inputs[0].shape == (3, -1)
    assert read.outputs[0].shape == ()
    with pytest.raises(OipError, match="wanted one of"):
        ModelMetadata.from_json({"name": "m", "inputs": [{"name": "x", "datatype": "BYTES", "shape": [-1]}]})


def test_tritonclient_writes_what_we_read_and_reads_what_we_write():
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is a development extra")
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    given_ = http.InferInput("x", [2, 3], "FP32")
    for binary in (True, False):
        given_.set_data_from_numpy(data, binary_data=binary)
        body, length = http.InferenceServerClient.generate_request_body([given_], request_id="t")
        asked = oip.decode_request(body, length, max_tensor_bytes=LIMIT)
        np.testing.assert_array_equal(asked.inputs[0].data, data)
        message = oip.encode_reply(InferReply("t", "m", "1", (Tensor("y", data),)), binary={"y": binary})
        result = http.InferenceServerClient.parse_response_body(message.join(), header_length=message.header_length)
        np.testing.assert_array_equal(result.as_numpy("y"), data)


def test_importing_the_wire_format_does_not_import_torch():
    code = "import sys, batch_handler.oip; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
