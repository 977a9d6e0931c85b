"""The endpoint as others see it: clients that we did not write, and requests that are wrong."""

import asyncio
import json

import aiohttp
import numpy as np
import pytest
import tritonclient.http as triton

from batch_handler.oip import HEADER_LENGTH, InferRequest, Tensor, crc32c, decode_reply, encode_request
from support.npy import npy


@pytest.fixture(scope="module")
def client(toy_server):
    with triton.InferenceServerClient(toy_server.url.removeprefix("http://")) as client:
        yield client


def test_a_standard_client_sees_a_live_and_ready_server(client, toy_server):
    assert client.is_server_live(headers=dict(toy_server.headers))
    assert client.is_server_ready(headers=dict(toy_server.headers))


@pytest.mark.parametrize("binary", [True, False])
def test_a_standard_client_infers_with_binary_and_json_tensors(binary, client, toy_server, toy_images):
    tensor = triton.InferInput("image", [3, 12, 12], "UINT8")
    tensor.set_data_from_numpy(toy_images[:3], binary_data=binary)
    wanted = [triton.InferRequestedOutput("scores", binary_data=binary)]
    reply = client.infer("toy", [tensor], outputs=wanted, headers=dict(toy_server.headers), request_id="q1")
    found = reply.as_numpy("scores")
    assert found.shape == (3, 10)
    assert found.dtype == np.float32
    assert reply.get_response()["id"] == "q1"
    np.testing.assert_allclose(found, bulk(toy_server, toy_images[:3]), atol=1e-5)


def bulk(server, images):
    message = encode_request(InferRequest(
        "b", (Tensor("image", images),), parameters={"exact": True, "first_row": 0, "binary_data_output": True}))

    async def post():
        async with aiohttp.ClientSession(headers=server.headers) as session, session.post(
                f"{server.url}/v2/models/toy/infer", data=message.join(),
                headers={HEADER_LENGTH: str(message.header_length), "Content-Type": "application/octet-stream"}) as got:
            assert got.status == 200, await got.text()
            return decode_reply(await got.read(), int(got.headers[HEADER_LENGTH]), max_tensor_bytes=1 << 20)

    reply = asyncio.run(post())
    assert reply.parameters["request_crc32c"] == crc32c(message.join())
    return {tensor.name: tensor.data for tensor in reply.outputs}["scores"]


def test_the_model_describes_itself(toy_server):
    async def get():
        async with aiohttp.ClientSession(headers=toy_server.headers) as session, session.get(
                f"{toy_server.url}/predictions/toy") as got:
            return await got.json(content_type=None)

    found = asyncio.run(get())
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 12, 12]}]
    assert found["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, 10]}]
    assert found["parameters"]["micro_batch"] == 16
    assert found["parameters"]["model_digest"].startswith("sha256:")


def oip(shape, name="image", datatype="UINT8", data=0):
    """An inference request in JSON."""
    return json.dumps({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]}).encode()


NPY, JSON, BINARY = "application/x-npy", "application/json", "application/octet-stream"
FORM = "application/x-www-form-urlencoded"
PREDICT, INFER = "/predictions/toy", "/v2/models/toy/infer"
TENSOR = [0] * 144
WRONG = {
    # what is wrong: path, headers, body, status, what the sentence names
    "dtype": (PREDICT, {"Content-Type": NPY}, npy(np.zeros((1, 12, 12), np.float32)), 400, "uint8"),
    "shape": (PREDICT, {"Content-Type": NPY}, npy(np.zeros((1, 13, 12), np.uint8)), 400, "12, 12"),
    "npy length": (PREDICT, {"Content-Type": NPY}, npy(np.zeros((1, 12, 12), np.uint8))[:-5], 400, "wanted"),
    "npy pickle": (PREDICT, {"Content-Type": NPY}, npy(np.array([None])), 400, "dtype"),
    "json": (PREDICT, {"Content-Type": JSON}, b"[[1, 2", 400, "JSON"),
    "json value": (PREDICT, {"Content-Type": JSON}, json.dumps([[[256] * 12] * 12]).encode(), 400, "256"),
    "json shape": (PREDICT, {"Content-Type": JSON}, json.dumps([[[1] * 11] * 12]).encode(), 400, "12"),
    "content type": (PREDICT, {"Content-Type": "application/pdf"}, b"%PDF", 415, "application/x-npy"),
    # As curl sends what it is not told the type of: the server decodes it, here into no field and into one.
    "form": (PREDICT, {"Content-Type": FORM}, b"[[1, 2]]", 415, FORM),
    "form field": (PREDICT, {"Content-Type": FORM}, b"data=[[1, 2]]", 415, FORM),
    "image": (PREDICT, {"Content-Type": "image/png"}, b"\x89PNG no picture", 400, "picture"),
    "encoding": (PREDICT, {"Content-Type": NPY, "Content-Encoding": "br"}, npy(np.zeros((1, 12, 12), np.uint8)), 415,
                 "br"),
    "oip name": (INFER, {"Content-Type": JSON}, oip([1, 12, 12], name="picture", data=TENSOR), 400, "image"),
    "oip dtype": (INFER, {"Content-Type": JSON}, oip([1, 12, 12], datatype="FP32", data=TENSOR), 400, "UINT8"),
    "oip shape": (INFER, {"Content-Type": JSON}, oip([1, 6, 24], data=TENSOR), 400, "12, 12"),
    "oip count": (INFER, {"Content-Type": JSON}, oip([2, 12, 12], data=TENSOR), 400, "288"),
    "oip binary length": (INFER, {"Content-Type": BINARY, HEADER_LENGTH: "9999"}, b"{}", 400, "9999"),
    "oip header": (INFER, {"Content-Type": BINARY, HEADER_LENGTH: "x"}, b"{}", 400, HEADER_LENGTH),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_is_told_what_was_wanted_and_harms_no_other(what, toy_server, toy_images):
    path, headers, body, status, named = WRONG[what]

    async def send():
        async with aiohttp.ClientSession(headers=toy_server.headers, skip_auto_headers=["Accept-Encoding"]) as session:
            async def good(index):
                async with session.post(f"{toy_server.url}{PREDICT}", data=npy(toy_images[index]),
                                        headers={"Content-Type": NPY, "Accept": JSON}) as got:
                    return got.status, await got.json(content_type=None)

            async def bad():
                async with session.post(f"{toy_server.url}{path}", data=body, headers=headers) as got:
                    return got.status, await got.read()

            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(good(index)) for index in range(7)]
                wrong = tasks.create_task(bad())
                answers += [tasks.create_task(good(index)) for index in range(7, 15)]
            return wrong.result(), [task.result() for task in answers]

    (found, said), answers = asyncio.run(send())
    assert found == status, said
    sentence = json.loads(said)["error"]
    assert named in sentence
    assert "\n" not in sentence
    assert [code for code, _ in answers] == [200] * 15
    wanted = bulk(toy_server, toy_images[:15])
    np.testing.assert_allclose([answer["predictions"][0] for _, answer in answers], wanted, atol=1e-5)


async def test_one_wrong_request_and_fifteen_good_ones_in_one_server_batch(toy_archive, toy_images, toy_server):
    from batch_client.server import EmbeddedServer, ServerSettings

    async with (EmbeddedServer(ServerSettings(archive=toy_archive, workers=1, threads=1, batch_size=16)) as server,
                aiohttp.ClientSession(headers={"Authorization": f"Bearer {await server.token()}"}) as session):
        async def infer(shape, images):
            body = oip(shape, data=images.ravel().tolist())
            async with session.post(f"{server.url}{INFER}", data=body, headers={"Content-Type": JSON}) as got:
                return got.status, await got.json(content_type=None)

        async def burst():
            async with asyncio.TaskGroup() as tasks:
                # The only worker is busy with this one while the others queue up behind it. They have to be sent
                # meanwhile, and the machine may be busy with something else: so it is large, and tried again.
                tasks.create_task(infer([1500, 12, 12], np.tile(toy_images, (2, 1, 1))[:1500]))
                await asyncio.sleep(0.05)
                answers = [tasks.create_task(infer([1, 12, 12], toy_images[index])) for index in range(15)]
                wrong = tasks.create_task(infer([1, 12, 11], toy_images[0][:, :11]))
            return wrong.result(), [task.result() for task in answers]

        for _ in range(10):
            (status, said), answers = await burst()
            assert status == 400
            assert "wanted" in said["error"]
            assert [code for code, _ in answers] == [200] * 15
            together = [answer["parameters"]["batch_requests"] for _, answer in answers]
            if together == [16] * 15:
                break
        assert together == [16] * 15
    scores = [answer["outputs"][0]["data"] for _, answer in answers]
    np.testing.assert_allclose(scores, await asyncio.to_thread(bulk, toy_server, toy_images[:15]), atol=1e-5)
