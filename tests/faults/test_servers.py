"""Servers that die, stop, restart, run out of room or turn into another model: the same root, or the right refusal."""

import random
import re
import signal
from datetime import datetime, timedelta
from time import monotonic

import psutil
import pytest

from batch_client.machine import free_ports
from support.cli import LONG
from support.faults import FULL, PACE, QUICK, Client, each_scale, only_full, open_output, run
from support.proxy import Fault, FaultProxy
from support.served import OPEN, Served


def fresh_workers(server, hit):
    return sorted(set(server.workers()) - {one.pid for one in hit})


@each_scale
def test_workers_that_are_killed_or_stopped(scale, sources, undisturbed, moody_server, s3_environ, output):
    rng = random.Random(1)
    wanted = undisturbed(scale).root
    hit = []
    with Client(sources(scale), output, scale, moody_server.flags, s3_environ) as client:
        for time in range(scale.times + 1):
            client.until_chunks(len(hit) * scale.chunks // (scale.times + 2) + 1)
            # TorchServe takes a moment to see that a worker is gone.
            client.until(lambda: fresh_workers(moody_server, hit))
            hit.append(psutil.Process(rng.choice(fresh_workers(moody_server, hit))))
            # One of four is stopped instead: TorchServe finds out at the model's responseTimeout.
            hit[-1].send_signal(signal.SIGSTOP if time % 4 == 1 else signal.SIGKILL)
        summary = client.finish()
    assert summary["root"] == wanted
    assert summary["retries"] > 0
    _, alive = psutil.wait_procs(hit, LONG)
    assert alive == [], "a worker that was stopped has not been ended"
    assert len({worker.pid for worker in hit}) == len(hit) == scale.times + 1


@each_scale
def test_java_killed_and_restarted_at_the_same_port_with_tokens_that_live_three_seconds(
        scale, sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    wanted = undisturbed(scale).root
    tokens = set()
    # So slow that a token's half life, 1.5 s, passes between a start and the end.
    with Served(moody_archive, tmp_path, 3 * PACE, port=free_ports(1)[0], token_minutes=0.05) as server, Client(
            sources(scale), output, scale, server.flags, s3_environ) as client:
        for time in range(3 if scale is FULL else 1):
            client.until_chunks(4 * (time + 1))
            tokens.add(server.token_file.read_text())
            java = server.java()
            java.kill()
            psutil.wait_procs([java], LONG)
            server.stop()
            server.start()
            client.until(lambda: server.token_file.read_text() not in tokens)
        summary = client.finish()
        assert server.renewals > 0
        reasons = " ".join(event["reason"] for event in client.events("request retried"))
    assert summary["root"] == wanted
    assert "the connection broke" in reasons
    assert "the token is wrong or expired" in reasons


@each_scale
def test_two_endpoints_with_different_models(scale, sources, undisturbed, make_moody, moody_server, s3_environ, output,
                                             tmp_path):
    wanted = undisturbed(scale).root
    with Served(make_moody(8), tmp_path, workers=1, extra_properties=OPEN) as other, FaultProxy(other.url) as proxy:
        # The first endpoint's model is the run's; the other is asked what it has, and never to score.
        both = other.flags_for(moody_server.url, proxy.url)
        assert run(sources(scale), output, scale, both, s3_environ)["root"] == wanted
        assert {seen.method for seen in proxy.seen} == {"GET"}
        # Where an output is there already, its model is the run's.
        said = run(sources(scale), output, scale, other.flags, s3_environ, code=78)
        assert "its model is sha256:" in said
        there = other.flags_for(proxy.url, moody_server.url)
        assert run(sources(scale), output, scale, there, s3_environ)["already_published"]


@each_scale
def test_two_servers_with_a_token_each(scale, sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    """Each gets its own and no other's: neither turns any request away, and both score."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (Served(moody_archive, tmp_path / "one", workers=1) as first,
          Served(moody_archive, tmp_path / "two", workers=1) as second,
          FaultProxy(first.url) as one, FaultProxy(second.url) as two):
        flags = [*first.flags_for(one.url), "--endpoint", two.url, "--token-file", str(second.token_file)]
        summary = run(sources(scale), output, scale, flags, s3_environ)
        assert summary["root"] == undisturbed(scale).root
        for proxy in (one, two):
            assert {seen.status for seen in proxy.seen if seen.method == "POST"} == {200}
        # Where they change places, no server is left.
        flags = [*second.flags_for(one.url), "--endpoint", two.url, "--token-file", str(first.token_file)]
        assert "the server refuses the token" in run(sources(scale), output, scale, flags, s3_environ, code=77)


@only_full
def test_a_model_that_is_replaced_mid_run(scale, sources, undisturbed, make_moody, moody_server, s3_environ, output,
                                          tmp_path):
    wanted = undisturbed(scale).root
    with Served(make_moody(7), tmp_path, PACE, port=free_ports(1)[0]) as server, Client(
            sources(scale), output, scale, server.flags, s3_environ) as client:
        client.until_chunks(3)
        server.replace(make_moody(8))
        assert "its model is sha256:" in client.finish(78)
        # The same command is refused as well, as long as the other model is there.
        assert "its model is sha256:" in run(sources(scale), output, scale, server.flags, s3_environ, code=78)
    with pytest.raises(FileNotFoundError):
        open_output(output, s3_environ)
    assert run(sources(scale), output, scale, moody_server.flags, s3_environ)["root"] == wanted


@only_full
def test_a_second_endpoint_goes_on_when_the_first_gets_another_model(
        scale, sources, undisturbed, make_moody, moody_server, s3_environ, output, tmp_path):
    wanted = undisturbed(scale).root
    with Served(make_moody(7), tmp_path, PACE, port=free_ports(1)[0], extra_properties=OPEN) as first, FaultProxy(
            moody_server.url, Fault("late", 1.0, "POST", seconds=0.2)) as second, Client(
            sources(scale), output, scale, first.flags_for(first.url, second.url), s3_environ) as client:
        client.until_chunks(3)
        first.replace(make_moody(8))
        summary = client.finish()
        asked = [event for event in client.events("request retried") if "its model is" in event["reason"]]
    assert summary["root"] == wanted
    assert asked, "the run was over before the other model came"


@each_scale
def test_a_queue_of_two(scale, sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    wanted = undisturbed(scale).root
    narrow = {"workers": 1, "batch_size": 1, "extra_properties": {"job_queue_size": "2"}}
    with Served(moody_archive, tmp_path, PACE, **narrow) as server, Client(
            sources(scale), output, scale, server.flags, s3_environ, "--in-flight", "16") as client:
        summary = client.finish()
        assert any("no room" in event["reason"] for event in client.events("request retried"))
    assert summary["root"] == wanted


@each_scale
def test_an_outage_sees_no_more_requests_than_usual(scale, sources, undisturbed, moody_server, s3_environ, output):
    wanted = undisturbed(scale).root
    seconds = 60 if scale is FULL else 10
    with FaultProxy(moody_server.url) as proxy, Client(
            sources(scale), output, scale, moody_server.flags_for(proxy.url), s3_environ) as client:
        client.until_chunks(scale.chunks // 2)
        before = [seen for seen in proxy.seen if seen.method == "POST"]
        rate = len(before) / (before[-1].at - before[0].at)
        proxy.down = True
        began = len(proxy.seen)
        outage = before[-1].at + seconds
        client.until(lambda: monotonic() >= outage)
        during = len(proxy.seen) - began
        proxy.down = False
        summary = client.finish()
        (away,), (back,) = client.events("server away"), client.events("server back")
    assert summary["root"] == wanted
    assert away["endpoint"] == back["endpoint"] == proxy.url
    assert away["reason"].startswith("the connection broke")
    assert seconds - 1 < back["seconds"] < seconds + 60
    assert 3 <= during <= 1.1 * rate * seconds


def test_a_server_whose_clock_is_an_hour_ahead(
        an_hour_ahead, sources, undisturbed, moody_archive, s3_environ, output, tmp_path):
    """It shows in the server's log and in nothing else; tokens are renewed on the way."""
    with Served(moody_archive, tmp_path, PACE, environ=an_hour_ahead, token_minutes=0.05) as server:
        summary = run(sources(QUICK), output, QUICK, server.flags, s3_environ)
        stamps = re.findall(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", server.log_path.read_text(), re.MULTILINE)
        assert server.renewals > 0
    assert summary["root"] == undisturbed(QUICK).root
    assert abs(datetime.fromisoformat(stamps[-1]) - datetime.now()) > timedelta(minutes=55)  # noqa: DTZ005 - as Java
