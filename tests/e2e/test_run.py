"""The main job on real parts: Zarr on S3 → TorchServe → ordered Zarr on S3."""

import asyncio
import json
import re
import signal
import subprocess
import warnings

import aiohttp
import numpy as np
import obstore
import psutil
import pytest
import xarray
import zarr

from batch_client.machine import free_ports
from batch_client.zarrstore import SourceStore
from support.cli import command, heeded, run_cli, until
from support.faults import open_output, opened, write_source
from support.served import shared_memory_of


def test_the_seeds_model_scores_its_images_in_order(seed_folder, s3_environ, tmp_path):
    import torch

    known = np.load(seed_folder / "fashion_mnist_2k.npz")
    write_source("s3://data/fashion.zarr", s3_environ, known["images"], 100, compressors="auto")
    run_cli(["pack", seed_folder / "fmnist.pyt", "--trust-pickle", "--input", "image:uint8:28x28", "--model-shape",
             "1x28x28", "--scale", "1/255", "--softmax", "-o", tmp_path / "fmnist.mar"], s3_environ, check=True)
    done = run_cli(["run", "s3://data/fashion.zarr", "s3://data/fashion-scores.zarr", "--archive",
                    tmp_path / "fmnist.mar", "--json"], s3_environ, check=True)
    summary = json.loads(done.stdout)
    assert {"records", "failed", "seconds", "records_per_s", "output", "model", "model_digest", "requests", "retries",
            "bytes_read", "bytes_written"} <= set(summary)
    assert (summary["records"], summary["failed"]) == (2000, 0)
    group = open_output("s3://data/fashion-scores.zarr", s3_environ)
    scores = group["scores"][:]
    assert abs(int((scores.argmax(1) == known["labels"]).sum()) - 1845) <= 1
    model = torch.load(seed_folder / "fmnist.pyt", weights_only=False).eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own: dropout2d on two axes
        wanted = torch.softmax(model(torch.from_numpy(known["images"]).float().reshape(-1, 1, 28, 28) / 255), 1)
    np.testing.assert_allclose(scores, wanted.numpy(), atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xarray.open_zarr(SourceStore(opened("s3://data/fashion-scores.zarr", s3_environ)))
    assert dataset["scores"].dims[0] == "record"
    assert (dataset["record_status"].values == 0).all()


@pytest.fixture(scope="module")
def source(s3_environ, toy_images):
    write_source("s3://data/toy.zarr", s3_environ, toy_images, 50, compressors="auto")
    return "s3://data/toy.zarr"


@pytest.fixture(scope="module")
def bulk_scores(source, s3_environ, toy_server):
    """One undisturbed run, to compare others with."""
    done = run_cli(["run", source, "s3://data/toy-bulk.zarr", "--chunk-records", "200", "--request-records", "64",
                    "--json", *toy_server.flags], s3_environ, check=True)
    return json.loads(done.stdout), open_output("s3://data/toy-bulk.zarr", s3_environ)["scores"][:]


@pytest.mark.parametrize("flags", [
    ["--request-records", "16", "--in-flight", "1"], ["--request-records", "192", "--in-flight", "16"],
])
def test_the_bytes_are_the_same_whatever_the_requests(flags, source, s3_environ, toy_server, bulk_scores):
    done = run_cli(["run", source, f"s3://data/toy-{flags[1]}.zarr", "--chunk-records", "200", "--json", *flags,
                    *toy_server.flags], s3_environ, check=True)
    assert json.loads(done.stdout)["root"] == bulk_scores[0]["root"]


def test_a_range_has_the_bits_of_the_full_run(source, s3_environ, toy_server, bulk_scores):
    run_cli(["run", source, "s3://data/toy-range.zarr", "--chunk-records", "200", "--records", "130:777",
             *toy_server.flags], s3_environ, check=True)
    group = open_output("s3://data/toy-range.zarr", s3_environ)
    assert group.attrs["origin"] == 130
    found = group["scores"][:]
    np.testing.assert_array_equal(found.view(np.uint32), bulk_scores[1][130:777].view(np.uint32))


def test_queries_are_answered_and_batched_while_a_bulk_run_goes_on(
        source, s3_environ, toy_server, toy_images, bulk_scores):
    before = batches(toy_server)
    bulk = subprocess.Popen(
        command("run", source, "s3://data/toy-beside.zarr", "--chunk-records", "50", "--request-records", "16",
                "--log", "none", *toy_server.flags), env=s3_environ, stderr=subprocess.PIPE)
    try:
        answers = asyncio.run(ask(toy_server, toy_images[:64]))
        _, said = bulk.communicate(timeout=120)
    finally:
        bulk.kill()
        bulk.stderr.close()
    assert bulk.returncode == 0, said
    np.testing.assert_allclose(np.array(answers), bulk_scores[1][:64], atol=1e-5)
    until(lambda: batches(toy_server)[0] >= before[0] + 64 + 20 * 4)  # all are told, a moment behind the replies
    requests, formed = (after - start for after, start in zip(batches(toy_server), before, strict=True))
    assert requests >= 64
    assert 0 < formed < requests, "no server batch had more than one request"


def batches(server):
    """How many requests the handler has had, and in how many server batches."""
    import urllib.request

    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        text = reply.read().decode()

    def total(name):
        return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE))

    return total("BatchRequests"), total("Batches")


async def ask(server, images):
    async with aiohttp.ClientSession(headers=server.headers) as session:
        async def one(image):
            async with session.post(f"{server.url}/predictions/toy", json=[image.tolist()]) as reply:
                assert reply.status == 200, await reply.text()
                return (await reply.json())["predictions"][0]

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one(image)) for image in images]
    return [task.result() for task in asked]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_keeps_what_is_done_and_the_same_command_goes_on(number, source, s3_environ, toy_server, bulk_scores):
    arguments = ["run", source, f"s3://data/toy-stopped-{number:d}.zarr", "--chunk-records", "200",
                 "--request-records", "16", "--in-flight", "1", *toy_server.flags]
    words = command(*arguments, "--log", "json")
    with heeded(number):
        first = subprocess.Popen(words, env=s3_environ, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "chunk written" in line:
            first.send_signal(number)
            break
    if number == signal.SIGHUP and any("stopping" in line for line in first.stderr):
        first.send_signal(number)  # some terminals say twice that they are closed
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 75, said
    assert said.strip().splitlines()[-1].startswith("batch-client: stopped before the end")
    done = run_cli([*arguments, "--json"], s3_environ, check=True)
    summary = json.loads(done.stdout)
    assert 0 < summary["scored"] < 1000
    assert summary["root"] == bulk_scores[0]["root"]


def test_a_server_that_is_not_there_is_named_and_the_run_goes_on(source, s3_environ, toy_server, bulk_scores):
    absent = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = run_cli(["run", source, "s3://data/toy-absent.zarr", "--chunk-records", "200", *toy_server.flags,
                    "--endpoint", absent, "--json"],
                   s3_environ, check=True)
    assert json.loads(done.stdout)["root"] == bulk_scores[0]["root"]
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("going on without a server: ")]
    assert absent in said


def test_a_stop_while_the_server_starts_does_not_wait_for_it(source, s3_environ, toy_archive):
    arguments = ["run", source, "s3://data/toy-at-once.zarr", "--archive", toy_archive, "--log", "none"]
    client = subprocess.Popen(command(*arguments), env=s3_environ, stderr=subprocess.PIPE, text=True)
    until(lambda: psutil.Process(client.pid).children(recursive=True))  # Java's first word, long before the model's
    client.send_signal(signal.SIGINT)
    said = client.communicate(timeout=60)[1]
    assert client.returncode == 75, said
    assert said.startswith("batch-client: stopped before it scored anything; ")


def test_a_second_signal_ends_at_once_with_the_same_exit_code(source, s3_environ, toy_server):
    arguments = ["run", source, "s3://data/toy-twice.zarr", "--chunk-records", "500", "--request-records", "16",
                 "--in-flight", "1", "--log", "json", *toy_server.flags]
    client = subprocess.Popen(command(*arguments), env=s3_environ, stderr=subprocess.PIPE, text=True)
    for line in client.stderr:
        if "run started" in line:
            client.send_signal(signal.SIGINT)
        if "stopping" in line:
            client.send_signal(signal.SIGINT)
            break
    said = client.communicate(timeout=60)[1]
    assert client.returncode == 75, said
    assert "Traceback" not in said


def test_a_client_that_is_killed_leaves_no_java_and_the_same_command_goes_on(
        source, s3_environ, toy_archive, bulk_scores):
    arguments = ["run", source, "s3://data/toy-killed.zarr", "--chunk-records", "200", "--request-records", "16",
                 "--in-flight", "1", "--archive", toy_archive, "--workers", "1x1"]
    client = subprocess.Popen(command(*arguments, "--log", "json"), env=s3_environ, stderr=subprocess.PIPE, text=True)
    for line in client.stderr:
        if "chunk written" in line:
            break
    family = psutil.Process(client.pid).children(recursive=True)
    assert any("java" in process.name() for process in family)
    assert any("model_service_worker" in " ".join(process.cmdline()) for process in family)
    shared = shared_memory_of(family)
    assert list(shared.iterdir()), "no records in shared memory"
    client.kill()
    client.wait()
    client.stderr.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert not list(shared.parent.glob(f"{shared.name}*"))
    done = run_cli([*arguments, "--json"], s3_environ, check=True)
    assert json.loads(done.stdout)["root"] == bulk_scores[0]["root"]


def test_plan_says_what_run_then_does_and_writes_nothing(source, s3_environ, toy_server):
    words = [source, "s3://data/toy-planned.zarr", "--request-records", "48", "--json", *toy_server.flags]
    plan = json.loads(run_cli(["plan", *words], s3_environ, check=True).stdout)
    assert plan["records"] == 1000
    summary = json.loads(run_cli(["run", *words], s3_environ, check=True).stdout)
    assert summary["requests"] == plan["requests"]
    assert not summary["already_published"]
    again = json.loads(run_cli(["run", *words], s3_environ, check=True).stdout)
    assert again["already_published"]


def test_numbers_that_stand_for_others_are_scored_as_they_are_and_somebody_is_told(
    toy_images, clean_environ, toy_server, tmp_path, bulk_scores,
):
    """What xarray writes with an encoding; the stored numbers may well be what the model was trained on."""
    zarr.create_array(tmp_path / "in.zarr", data=toy_images, chunks=(50, 12, 12), attributes={"scale_factor": 0.01})
    said = "in.zarr is scored as it is stored: its scale_factor 0.01 and add_offset 0, which xarray applies, are not"
    words = ["in.zarr", "out.zarr", "--chunk-records", "200", *toy_server.flags]
    done = run_cli(["plan", *words], clean_environ, cwd=tmp_path, check=True)
    assert said in done.stdout
    done = run_cli(["run", *words], clean_environ, cwd=tmp_path, check=True)
    assert said in done.stderr
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["scores"][:], bulk_scores[1])


def test_verify_status_and_replay_on_a_real_output(bulk_scores, s3_environ, toy_server, s3):
    output = "s3://data/toy-bulk.zarr"
    root = bulk_scores[0]["root"]
    for flags in ([], ["--deep"], ["--replay", "3", *toy_server.flags]):
        said = json.loads(run_cli(["verify", output, *flags, "--json"], s3_environ, check=True).stdout)
        assert (said["root"], said["records"], said["failed"]) == (root, 1000, 0)
    assert len(said["replayed"]["chunks"]) == 3
    status = json.loads(run_cli(["status", output, "--json"], s3_environ, check=True).stdout)
    assert (status["published"], status["done"], status["root"]) == (True, 1000, root)
    assert f"published, {root}" in run_cli(["status", output], s3_environ, check=True).stdout
    # A byte of one chunk altered behind our back, by somebody with the keys.
    obstore.put(s3.store("data"), "toy-bulk.zarr/scores/c/1/0", bytes(200 * 40 + 4), use_multipart=False)
    assert run_cli(["verify", output], s3_environ).returncode == 0
    done = run_cli(["verify", output, "--deep"], s3_environ)
    assert done.returncode == 65
    assert "scores/c/1/0 has SHA-256" in done.stderr


def test_an_abandoned_output_is_listed_and_then_removed(source, s3_environ, toy_server):
    output = "s3://data/toy-abandoned.zarr"
    words = ["run", source, output, "--chunk-records", "200", "--part", "1/2", *toy_server.flags]
    run_cli(words, s3_environ, check=True)
    assert "not published" in run_cli(["status", output], s3_environ, check=True).stdout
    refused(["verify", output], s3_environ, "no published output (no _SUCCESS)")
    assert "nothing removed" in run_cli(["status", output, "--clean"], s3_environ, check=True).stdout
    assert "removed" in run_cli(["status", output, "--clean", "--yes"], s3_environ, check=True).stdout
    refused(["status", output], s3_environ, "no output of batch-client (no _run/spec.json)")


def refused(words, environ, wanted):
    done = run_cli(words, environ)
    assert done.returncode == 78
    assert wanted in done.stderr


def test_local_files(toy_images, clean_environ, toy_server, tmp_path, bulk_scores):
    zarr.create_array(tmp_path / "in.zarr", data=toy_images, chunks=(50, 12, 12))
    run_cli(["run", "in.zarr", "out.zarr", "--chunk-records", "200", *toy_server.flags], clean_environ, cwd=tmp_path,
            check=True)
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "out.zarr", mode="r")["scores"][:], bulk_scores[1])


def test_a_second_s3_server_agrees(toy_images, clean_environ, toy_server, bulk_scores):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        environ = {**clean_environ, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
                   "AWS_SECRET_ACCESS_KEY": "b"}
        import boto3

        boto3.client("s3", endpoint_url=environ["AWS_ENDPOINT_URL"], region_name="us-east-1", aws_access_key_id="a",
                     aws_secret_access_key="b").create_bucket(Bucket="data")
        write_source("s3://data/toy.zarr", environ, toy_images, 50, compressors="auto")
        run_cli(["run", "s3://data/toy.zarr", "s3://data/out.zarr", "--chunk-records", "200", *toy_server.flags],
                environ, check=True)
        found = open_output("s3://data/out.zarr", environ)
        np.testing.assert_array_equal(found["scores"][:], bulk_scores[1])
    finally:
        server.stop()


def test_predict_answers_for_files_standard_input_and_records(
        source, s3_environ, toy_server, toy_images, tmp_path, bulk_scores):
    from PIL import Image

    np.save(tmp_path / "one.npy", toy_images[0])
    (tmp_path / "one.json").write_text(json.dumps([toy_images[0].tolist()]))
    Image.fromarray(toy_images[0]).save(tmp_path / "one.png")
    queries = [[tmp_path / "one.npy"], [tmp_path / "one.json"], [tmp_path / "one.png"], [source, "--records", "0:1"]]
    for query in queries:
        done = run_cli(["predict", *query, *toy_server.flags], s3_environ, check=True)
        np.testing.assert_allclose(json.loads(done.stdout)["predictions"][0], bulk_scores[1][0], atol=1e-5)
    done = run_cli(["predict", "-", *toy_server.flags], s3_environ, stdin=(tmp_path / "one.png").read_bytes())
    np.testing.assert_allclose(json.loads(done.stdout)["predictions"][0], bulk_scores[1][0], atol=1e-5)
