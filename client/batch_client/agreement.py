"""Which servers a run has: those whose model is the run's, by their own word. The others are left out; those that gave
no usable answer are asked again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

from batch_client.contract import ModelContract, fetch_contract
from batch_client.endpoint import Endpoint, Pool
from batch_client.errors import BatchClientError, MismatchError
from batch_client.serving import Servers

__all__ = ["ANY_NUMERICS", "Wanted", "agree", "ask_again"]

# The fingerprint in the identity of a run that is not exact: its records may be scored by numerics of any kind.
ANY_NUMERICS = "any"
# Between questions to a server that is left out: one that starts needs some seconds, a machine some minutes.
AGAIN_SECONDS = 30.0
# What brings numerics back that a server of ours can have on any machine. All win over a tuning file.
_SETTINGS = {
    "runtime": "BATCH_HANDLER_RUNTIME={}", "precision": "BATCH_HANDLER_PRECISION={}",
    "micro_batch": "BATCH_HANDLER_MICRO_BATCH={}", "threads": "--workers Wx{}",
}
# Where one of these differs, what only one side has is its own: a graph's optimiser, a GPU's driver.
_KINDS = ("device", "runtime")


@dataclass(frozen=True)
class Wanted:
    """The model that a server has to have: its digest, its fingerprint (ANY_NUMERICS in a run that is not exact) and
    numerics; whose it is, and what can be done instead of serving it.
    """

    digest: str
    fingerprint: str
    numerics: Mapping[str, object]
    whose: str = "the first server's"
    instead: str = "or leave it out"


async def agree(servers: Servers, pool: Pool, stored: Wanted | None, *, exact: bool) -> ModelContract:
    """The model of the run: `stored`, that of the output which is there already, else the first server's. Servers that
    can't be reached or have another one are left out.

    Raises the first one's reason when all are.
    """
    agreed: list[ModelContract] = []
    wanted = stored
    for endpoint, found in await _asked(servers, pool.endpoints):
        if isinstance(found, BatchClientError):
            pool.leave_out(endpoint, found)
            continue
        wanted = wanted or Wanted(found.digest, found.fingerprint if exact else ANY_NUMERICS, found.numerics)
        refusal = _refusal(found, wanted, agreed[0] if agreed else None, exact=exact)
        if refusal:
            pool.leave_out(endpoint, MismatchError(f"{endpoint.url}: {refusal}"))
            continue
        _admit(endpoint, found)
        agreed.append(found)
    if not agreed:
        raise next(endpoint.left_out for endpoint in pool.endpoints if endpoint.left_out is not None)
    return replace(agreed[0], ceiling=_sum_of([found.ceiling for found in agreed]),
                   shared_memory=_of_all([found.shared_memory for found in agreed]),
                   bulk_lane=_of_all([found.bulk_lane for found in agreed]))


async def ask_again(servers: Servers, pool: Pool, contract: ModelContract, *, exact: bool) -> NoReturn:
    """Now and then ask the servers that were left out because they gave no usable answer, and let those come back that
    have the model of the run, `contract`, by now. Never returns.
    """
    wanted = Wanted(contract.digest, contract.fingerprint if exact else ANY_NUMERICS, contract.numerics, "this run's")
    while True:
        await pool.absent()
        await asyncio.sleep(AGAIN_SECONDS)
        for endpoint, found in await _asked(servers, await pool.absent()):
            # What was under way meanwhile may have shown another model.
            if isinstance(found, BatchClientError) or not endpoint.is_absent:
                continue
            refusal = _refusal(found, wanted, contract, exact=exact)
            if refusal:
                pool.leave_out(endpoint, MismatchError(f"{endpoint.url}: {refusal}"))
                continue
            _admit(endpoint, found)
            pool.take_back(endpoint)


async def _asked(servers: Servers,
                 endpoints: Sequence[Endpoint]) -> list[tuple[Endpoint, ModelContract | BatchClientError]]:
    """What each server says of its model, all asked at once."""
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(_contract_or_error(servers, endpoint.url)) for endpoint in endpoints]
    return [(endpoint, task.result()) for endpoint, task in zip(endpoints, asked, strict=True)]


def _refusal(found: ModelContract, wanted: Wanted, agreed: ModelContract | None, *, exact: bool) -> str:
    """Why a server with the model `found` can't take part; "" if it can."""
    if found.digest != wanted.digest:
        return (f"its model is {found.digest}, {wanted.whose} is {wanted.digest}; serve that model, "
                f"{wanted.instead}")
    if exact and found.fingerprint != wanted.fingerprint:
        names = _differing(wanted.numerics, found.numerics)
        return (f"its model has {_named(found.numerics, names, found.fingerprint)}; {wanted.whose} has "
                f"{_named(wanted.numerics, names, wanted.fingerprint)}; serve it in that way"
                f"{_settings(wanted.numerics, names)}, {wanted.instead}")
    if agreed is not None and not _alike(found, agreed, exact=exact):
        return ("its model has another name, version, micro-batch, input or output than that of another endpoint with "
                "the same digest; serve the same there, or leave it out")
    return ""


def _admit(endpoint: Endpoint, found: ModelContract) -> None:
    endpoint.lane = found.bulk_lane
    endpoint.shared_memory = found.shared_memory


_T = TypeVar("_T")


def _of_all(offers: Sequence[_T | None]) -> _T | None:
    """What may be reckoned with because every server offers it: the first's, if none has none."""
    return None if None in offers else offers[0]


def _sum_of(ceilings: Sequence[float | None]) -> float | None:
    """What all servers could do together; unknown where it is unknown of one."""
    known = [ceiling for ceiling in ceilings if ceiling is not None]
    return sum(known) if len(known) == len(ceilings) else None


def _alike(one: ModelContract, other: ModelContract, *, exact: bool) -> bool:
    return one == other if exact else replace(one, fingerprint=other.fingerprint, numerics=other.numerics) == other


async def _contract_or_error(servers: Servers, url: str) -> ModelContract | BatchClientError:
    try:
        return await fetch_contract(servers, url)
    except BatchClientError as error:
        return error


def _differing(wanted: Mapping[str, object], found: Mapping[str, object]) -> list[str]:
    """The names of the numerics that differ, those first that a setting brings back."""
    names = [name for name in (*_SETTINGS, *sorted({*wanted, *found} - {*_SETTINGS}))
             if wanted.get(name) != found.get(name)]
    if any(kind in names for kind in _KINDS):
        return [name for name in names if wanted.get(name) is not None and found.get(name) is not None]
    return names


def _named(numerics: Mapping[str, object], names: Sequence[str], fingerprint: str) -> str:
    """What one side has of these, such as `runtime 'eager', threads 2`; its fingerprint where nothing else is known."""
    values = [f"{name} {'absent' if numerics.get(name) is None else repr(numerics[name])}" for name in names]
    return ", ".join(values) or f"numerics {fingerprint}"


def _settings(wanted: Mapping[str, object], names: Sequence[str]) -> str:
    """How to have those numerics back, where settings do that."""
    if set(names) - {*_SETTINGS}:
        return ""
    found = [_SETTINGS[name].format(wanted[name]) for name in names
             if re.fullmatch(r"\w{1,40}", str(wanted.get(name) or ""))]
    if not found:
        return ""
    return f", with {' '.join(found)} (settings win over a tuning file beside the archive, which may be what changed)"
