"""What a server's metadata becomes, and what of it is refused."""

import json
from pathlib import Path

import pytest

from batch_client import contract
from batch_client.contract import contract_of, fetch_contract
from batch_client.errors import CredentialsError, ServingError
from batch_client.serving import Servers
from batch_client.transport import HttpReply
from support.simulated import URL, SimulatedServer
from support.virtual import run_virtually


def metadata(*outputs, **parameters):
    tensor = {"datatype": "FP32", "shape": [-1, 3]}
    return json.dumps({"name": "foreign", "versions": ["1"], "platform": "", "parameters": parameters,
                       "inputs": [{"name": "dense_input:0", **tensor}],
                       "outputs": [{"name": name, **tensor} for name in outputs]}).encode()


@pytest.mark.parametrize("name", ["scores", "dense_1.bias-add", "0", "record_statuses", "c", "zarr.json5"])
def test_outputs_whose_names_can_name_arrays_are_taken(name):
    assert contract_of("http://s", metadata(name)).output_names == (name,)


def test_outputs_of_one_name_are_refused():
    with pytest.raises(ServingError, match=r"several outputs of one name \(scores, scores\)"):
        contract_of("http://s", metadata("scores", "scores"))


@pytest.mark.parametrize("name", ["dense/BiasAdd", "scores:0", "../up", ".hidden", "_run", "", "a\nb", "scores\n", "é",
                                  "record_status", "zarr.json"])
def test_outputs_whose_names_cannot_name_arrays_are_refused(name):
    with pytest.raises(ServingError) as caught:
        contract_of("http://s", metadata("fine", name))
    assert str(caught.value).startswith(f"http://s: model foreign names an output {name!r}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("told", "seconds"), [
    (12.5, 0.0125), (3, 0.003), (0, None), (-1, None), ("fast", None), (None, None), (1e999, None),
    (10**400, None), (1e-310, None), (True, None),
])
def test_what_a_micro_batch_takes_is_a_time_or_unknown_and_makes_no_other_model(told, seconds):
    contract = contract_of("http://s", metadata("scores", micro_batch_ms=told))
    assert contract.micro_batch_seconds == seconds
    assert contract == contract_of("http://s", metadata("scores"))


class Full(SimulatedServer):
    """A server that has no room for the first questions."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    async def send(self, method, url, headers, parts, deadline):
        if url.endswith("/predictions/toy") and self.times:
            self.times -= 1
            return HttpReply(503, {}, b'{"type": "ServiceUnavailableException", "message": "no worker"}')
        return await super().send(method, url, headers, parts, deadline)


def test_a_server_without_room_at_the_first_question_is_asked_again():
    assert run_virtually(fetch_contract(Full(8).servers(), URL)).name == "toy"
    with pytest.raises(ServingError, match="can't describe model 'toy': the server has no room"):
        run_virtually(fetch_contract(Full(10_000).servers(), URL))


class Guarded(SimulatedServer):
    """A server that has had enough of the old token."""

    async def send(self, method, url, headers, parts, deadline):
        if headers.get("Authorization") != "Bearer new":
            return HttpReply(401, {}, b"")
        return await super().send(method, url, headers, parts, deadline)


class Tokens:
    """Gives what it has until that is refused."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)

    async def token(self, refused=None):
        if refused == self.tokens[0] and len(self.tokens) > 1:
            del self.tokens[0]
        return self.tokens[0]


async def test_a_token_that_is_refused_at_the_first_question_is_asked_for_anew():
    assert (await fetch_contract(Servers(Guarded(), {URL: Tokens("old", "new")}, "toy"), URL)).name == "toy"
    with pytest.raises(CredentialsError, match="the server refuses the token"):
        await fetch_contract(Servers(Guarded(), {URL: Tokens("old")}, "toy"), URL)
    with pytest.raises(CredentialsError, match=r"the first --token-file is for the first --endpoint, and so on$"):
        await fetch_contract(Servers(Guarded(), {URL: Tokens("b"), "http://other": Tokens("a")}, "toy"), URL)


def test_memory_is_shared_with_our_own_handler_only(tmp_path, monkeypatch):
    # Its replies have checksums; what lies in memory is not to be believed without them.
    folder = tmp_path / "memory"
    monkeypatch.setattr(contract, "usable_folder", Path)
    ours = metadata("scores", shared_memory=str(folder), fingerprint="numerics")
    assert contract_of("http://s", ours).shared_memory == folder
    assert contract_of("http://s", metadata("scores", shared_memory=str(folder))).shared_memory is None
