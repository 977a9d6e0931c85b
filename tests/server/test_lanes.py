"""Two lanes of one real TorchServe: who runs when, and whose requests go where."""

import asyncio
import json
import os
import re
import subprocess
import urllib.request
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import zarr

from batch_client.errors import UsageError
from batch_client.server import ServerSettings
from batch_client.server_config import model_of
from batch_client.server_lanes import lanes_of
from support.cli import command, run_cli, until
from support.served import Served

QUERIES = 40


@pytest.fixture(scope="module")
def served(toy_archive, tmp_path_factory):
    with Served(toy_archive, tmp_path_factory.mktemp("lanes"), workers=1, online_workers=1) as server:
        yield server


@pytest.fixture(scope="module")
def source(toy_images, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "in.zarr"
    zarr.create_array(path, data=toy_images, chunks=(50, 12, 12))
    return path


def run_flags(*flags):
    return ["--chunk-records", "200", "--request-records", "16", *flags]


def records(server):
    """How many records each lane has scored."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        text = reply.read().decode()
    return {name: float(value) for name, value in
            re.findall(r'^BatchRecords{.*ModelName="([^"]+)".*} (\S+)$', text, re.MULTILINE)}


def priorities(pid):
    """Nice and scheduling policy of a process's threads."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return {(os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)) for thread in threads}


def test_the_bulk_lane_has_the_lowest_priority_in_every_thread_and_the_online_lane_none(served):
    (online,), (bulk,) = served.workers("toy"), served.workers("toy.bulk")
    ours = psutil.Process().nice()
    assert ours < 19, "these tests run at the lowest priority themselves"
    assert priorities(bulk) == {(19, os.SCHED_IDLE)}
    assert priorities(online) == {(ours, os.sched_getscheduler(0))}
    assert psutil.Process(served.java().pid).nice() == ours


def test_a_run_goes_to_the_bulk_lane_and_queries_beside_it_to_the_other(served, source, toy_images, clean_environ):
    before = records(served)
    output = source.with_name("beside.zarr")
    bulk = subprocess.Popen(command("run", source, output, *run_flags("--log", "none", *served.flags)),
                            env=clean_environ, stderr=subprocess.PIPE)
    try:
        answers = asyncio.run(ask(served, toy_images[:QUERIES]))
        _, said = bulk.communicate(timeout=120)
    finally:
        bulk.kill()
        bulk.stderr.close()
    assert bulk.returncode == 0, said
    scores = zarr.open_group(output, mode="r")["scores"][:]
    np.testing.assert_allclose(np.array(answers), scores[:QUERIES], atol=1e-5)

    def grown():
        return {name: count - before.get(name, 0) for name, count in records(served).items()}

    wanted = {"toy": QUERIES, "toy.bulk": len(toy_images)}
    until(lambda: grown() == wanted)  # the counter is a moment behind the replies
    assert grown() == wanted


async def ask(server, images):
    headers = {"Authorization": f"Bearer {server.token_file.read_text()}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        async def one(image):
            async with session.post(f"{server.url}/predictions/toy", json=[image.tolist()]) as reply:
                assert reply.status == 200, await reply.text()
                return (await reply.json())["predictions"][0]

        return [await one(image) for image in images]


def test_an_output_begun_with_lanes_goes_on_at_a_server_without(served, source, toy_archive, clean_environ):
    whole, mixed = source.with_name("whole.zarr"), source.with_name("mixed.zarr")
    done = run_cli(["run", source, whole, *run_flags("--json", *served.flags)], clean_environ, check=True)
    wanted = json.loads(done.stdout)
    run_cli(["run", source, mixed, *run_flags("--part", "1/2", *served.flags)], clean_environ, check=True)
    one_lane = ["--archive", toy_archive, "--workers", "1x1"]
    done = run_cli(["run", source, mixed, *run_flags("--json", *one_lane)], clean_environ, check=True)
    summary = json.loads(done.stdout)
    assert 0 < summary["scored"] < 1000
    assert (summary["root"], summary["model"]) == (wanted["root"], "toy")


@pytest.mark.parametrize("online_workers", [0, 1])
def test_a_model_may_be_registered_under_another_name_than_its_archives(
        online_workers, source, toy_archive, clean_environ, tmp_path, monkeypatch):
    monkeypatch.setattr("batch_client.server.model_of", lambda archive: model_of(archive)._replace(name="prod"))
    with Served(toy_archive, tmp_path, workers=1, online_workers=online_workers) as served:
        served.model = "prod"
        output = tmp_path / "out.zarr"
        run_cli(["run", source, output, *run_flags("--records", "0:200", *served.flags)], clean_environ, check=True)
        assert json.loads((output / "_run/spec.json").read_text())["model"] == "toy"
        assert set(records(served)) <= {"prod", "prod.bulk"}


def test_how_many_lanes_and_workers():
    assert lanes_of("m", 2, 0, gpus=0) == (("m", 2, 8),)
    assert lanes_of("m", 2, None, gpus=0) == (("m", 1, 8), ("m.bulk", 2, 1))
    assert lanes_of("m", 4, None, gpus=4) == (("m", 4, 8),)
    assert lanes_of("m", 4, 2, gpus=4) == (("m", 2, 8), ("m.bulk", 4, 1))
    with pytest.raises(UsageError, match="online_workers is -1"):
        ServerSettings(Path("m.mar"), online_workers=-1)
