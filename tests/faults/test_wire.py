"""The way to the server: connections that break or fall silent, replies cut, altered or exchanged."""

import pytest

from support.faults import RECORD_BYTES, Client, each_scale
from support.proxy import Fault, FaultProxy

FAULTS = [Fault("reset", 0.015, "POST"), Fault("cut", 0.015, "POST"), Fault("flip", 0.02, "POST"),
          Fault("swap", 0.01, "POST"), Fault("lost", 0.01, "POST"), Fault("silent", 0.02, "POST", most=1)]
# A request to which nobody answers is given up after this long, too.
PATIENCE = ["--patience", "8"]


@pytest.mark.parametrize("where", ["memory", "bodies"])
@each_scale
def test_a_network_that_breaks_cuts_alters_and_exchanges(
        scale, where, sources, undisturbed, moody_server, s3_environ, output, request):
    wanted = undisturbed(scale).root
    real = moody_server if where == "memory" else request.getfixturevalue("bodies_server")
    with FaultProxy(real.url, *FAULTS, seed=3) as proxy:
        server = real.flags_for(proxy.url)
        with Client(sources(scale), output, scale, server, s3_environ, *PATIENCE) as client:
            summary = client.finish()
            reasons = " ".join(event["reason"] for event in client.events("request retried"))
    assert summary["root"] == wanted
    assert set(proxy.injected) == {fault.kind for fault in FAULTS}
    sizes = {seen.size for seen in proxy.seen if seen.method == "POST"}
    assert (max(sizes) > scale.request * RECORD_BYTES) == (where == "bodies")
    # None was taken for an answer: each cost a repetition.
    assert summary["retries"] >= proxy.injected.total()
    assert summary["requests"] >= scale.records // scale.request
    assert "no answer within 8 s" in reasons
    assert "the reply does not belong to the request or was altered" in reasons
