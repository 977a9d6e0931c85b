"""The same bits whatever the configuration, on a model whose bits depend on place and batch; and a control that fails.

Quick: a few configurations. All twenty: `make chaos`.
"""

import asyncio
import io
import random
import zipfile

import aiohttp
import numpy as np
import pytest
import zarr

from batch_client.buckets import open_store
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.serving import Servers
from batch_client.spec import Records, RunSpec
from batch_client.transport import HttpTransport
from support.cli import run_cli

COUNT, CHUNK, B = 1500, 300, 32
# request size in micro-batches, in flight, workers, server batch, online queries beside, how the records are cut,
# whether they are in shared memory or in bodies
AXES = ((1, 2, 5, 9), (1, 4, 32), (1, 2), (1, 4, 16), (False, True), ("whole", "range", "parts"), (True, False))
QUICK = 4
# One request at a time, so that even a handler that puts requests together computes each alone. The chunks of the range
# begin at place 25 of a micro-batch with requests of 71 records, and its last request has one: whoever takes a request
# for a batch of its own has these at other places or in micro-batches of another size, whatever the timing.
PLAIN, SHIFTED = ((9, 1, 1, 1, False, cut, False) for cut in ("whole", "range"))
SHIFTS = 4 * 71 + 1
NETWORK = '''
"""Scores that lean on a record's place and on its micro-batch's size, in the last bits, as kernels' may."""

import torch


class Leaning(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(2704, 10))

    def forward(self, images):
        # Sizes are powers of two, so that no two places of two sizes have the same sum; each is a bit apart.
        size = images.shape[0]
        return self.layers(images) * (1 + (torch.arange(size)[:, None] + size) * 2**-23)
'''


def pairs_of(one):
    return {(a, one[a], b, one[b]) for a in range(len(one)) for b in range(a + 1, len(one))}


def pairwise(axes, seed=1):
    """Configurations that cover every pair of values of two axes: greedy, the best of many random candidates."""
    rng = random.Random(seed)
    wanted = {(a, x, b, y) for a in range(len(axes)) for b in range(a + 1, len(axes)) for x in axes[a] for y in axes[b]}
    chosen = []
    while wanted:
        candidates = [tuple(rng.choice(axis) for axis in axes) for _ in range(200)]

        best = max(candidates, key=lambda one, left=frozenset(wanted): len(pairs_of(one) & left))
        wanted -= pairs_of(best)
        chosen.append(best)
    while len(chosen) < 20:
        chosen.append(tuple(rng.choice(axis) for axis in axes))
    return chosen


CONFIGURATIONS = pairwise(AXES)


@pytest.fixture(scope="module")
def archive(tmp_path_factory, clean_environ):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("bits")
    (folder / "network.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)  # noqa: S102 - the text above
    torch.manual_seed(3)
    save_file(scope["Leaning"]().state_dict(), folder / "w.safetensors")
    run_cli(["pack", "w.safetensors", "--arch", "network.py:Leaning", "--input", "image:uint8:28x28",
             "--model-shape", "1x28x28", "--scale", "1/255", "--runtime", "torchscript", "--micro-batch", str(B),
             "--name", "bits", "-o", "bits.mar"], clean_environ, cwd=folder, check=True)
    return folder / "bits.mar"


NAIVE = b'''
"""The handler as most people write it: the records of all requests in one batch of whatever size."""

import batch_handler.scoring as scoring
from batch_handler.batching import Load, plan
from batch_handler.service import handle

scoring.plan = lambda loads, size, most=1: plan([Load(load.records, None) for load in loads], size)
__all__ = ["handle"]
'''


@pytest.fixture(scope="module")
def naive(archive, tmp_path_factory):
    path = tmp_path_factory.mktemp("naive") / "bits.mar"
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, NAIVE if name == "entry.py" else good.read(name))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    images = np.random.default_rng(8).integers(0, 256, (COUNT, 28, 28), np.uint8)
    zarr.create_array(folder / "in.zarr", data=images, chunks=(100, 28, 28))
    return folder / "in.zarr", images


async def score(archive, source, out, configuration):
    """One configuration after a restart of the server; the scores of its records and where they begin."""
    size, flight, workers, batch, online, cut, memory = configuration
    path, images = source
    spec = {"input": str(path), "output": str(out), "archive": str(archive), "chunk_records": CHUNK,
            "request_records": size * B, "in_flight": flight}
    settings = ServerSettings(archive=archive, workers=workers, threads=1, batch_size=batch, shared_memory=memory)
    async with EmbeddedServer(settings) as server, HttpTransport() as transport:
        def services():
            return Services(Servers(transport, {server.url: server}, "bits"), open_store(str(path)),
                            open_store(str(out)))

        asking = asyncio.create_task(ask(server, images)) if online else None
        start = 0
        if cut == "range":
            start = 217
            await execute(RunSpec(**spec, records=Records(217, 1201)), services())
        elif cut == "parts":
            for part in (2, 1):
                await execute(RunSpec(**spec, part=(part, 2)), services())
        else:
            await execute(RunSpec(**spec), services())
        if asking is not None:
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled(), asking.exception()
    return start, zarr.open_group(out, mode="r")["scores"][:]


async def ask(server, images):
    """Single queries without end, hostile ones among them."""
    rng = random.Random(5)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {await server.token()}"}) as session:
        while True:
            body = io.BytesIO()
            np.save(body, images[rng.randrange(COUNT)] if rng.random() < 0.8 else np.full((28, 28), 255, np.uint8))
            async with session.post(f"{server.url}/predictions/bits", data=body.getvalue(),
                                    headers={"Content-Type": "application/x-npy"}) as reply:
                assert reply.status == 200
                await reply.read()
            await asyncio.sleep(0.01)


async def run_all(archive, source, folder, configurations):
    reference = None
    different = []
    for number, configuration in enumerate([PLAIN, *configurations]):
        start, scores = await score(archive, source, folder / f"out-{number}", configuration)
        if reference is None:
            reference = scores
        assert len(scores) == (984 if configuration[5] == "range" else COUNT)
        wanted = reference[start:start + len(scores)]
        rows = int((scores.view(np.uint32) != wanted.view(np.uint32)).any(axis=1).sum())
        if rows:
            different.append((configuration, rows))
    return different


async def test_a_few_configurations_have_the_same_bits(archive, source, tmp_path):
    assert await run_all(archive, source, tmp_path, [SHIFTED, *CONFIGURATIONS[:QUICK]]) == []


@pytest.mark.chaos
async def test_twenty_pairwise_configurations_have_the_same_bits(archive, source, tmp_path):
    assert len(CONFIGURATIONS) >= 20
    assert await run_all(archive, source, tmp_path, CONFIGURATIONS) == []


async def test_the_naive_handler_fails_the_same_test(naive, source, tmp_path):
    """It serves, and just those rows differ: an error, such as of a server that does not start, is one of the test."""
    assert await run_all(naive, source, tmp_path, [SHIFTED]) == [(SHIFTED, SHIFTS)]


def test_the_configurations_cover_all_pairs():
    for a in range(len(AXES)):
        for b in range(a + 1, len(AXES)):
            found = {(one[a], one[b]) for one in CONFIGURATIONS}
            assert found == {(x, y) for x in AXES[a] for y in AXES[b]}
