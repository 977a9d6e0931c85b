"""Whose a place is: what run an output there belongs to, which of the outputs that follow one another it is, and
whether it is being removed.

An output's *generation* is a random name that whoever begins it gives it. Proofs are kept under that name, so those of
an output that was removed are no proofs of the one that follows. A removal begins with a mark (`_run/removing`) and
ends by deleting it; while it is there no generation counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from batch_client.errors import MismatchError, StorageError
from batch_client.layout import GENERATION_KEY, REMOVING_KEY, SPEC_KEY
from batch_client.spec import RunIdentity
from batch_client.storage import Store, child_url

__all__ = ["Begun", "begin", "check_place", "generation_of", "require_generation"]

_NAME = re.compile(rb"[0-9a-f]{16}")


@dataclass(frozen=True)
class Begun:
    """An output that is being written: its generation, and whether this client is the one that began it."""

    generation: str
    first: bool


async def begin(store: Store, identity: RunIdentity, name: str) -> Begun:
    """Make the output at a place that of `identity`, or find that it is; `name` is its generation if it has none yet.

    Raises MismatchError when it belongs to another run, is being removed, or holds something that is no output of ours.
    """
    await check_place(store, identity)
    first = await store.create(SPEC_KEY, identity.to_json())
    await store.create(GENERATION_KEY, name.encode())
    generation = await generation_of(store)
    # Once more, after the generation is known: between the two it may have been removed, and another one begun.
    await check_place(store, identity)
    if generation is None or await store.head(SPEC_KEY) is None:
        lost = child_url(store.url, SPEC_KEY if generation else GENERATION_KEY)
        raise StorageError(f"{lost}: the store says that it exists and has none")
    return Begun(generation, first)


async def check_place(store: Store, identity: RunIdentity) -> None:
    """Raises MismatchError unless the output is empty or belongs to `identity`. Writes nothing."""
    if await store.head(REMOVING_KEY) is not None:
        raise MismatchError(f"{store.url} is being removed, or its removal was cut off: finish it with --overwrite, or "
                            f"with batch-client status {store.url} --clean --yes")
    spec = await store.get(SPEC_KEY)
    if spec is None:
        found = await anext(store.list(""), None)
        if found is None:
            return
        # Another client may have begun this very run in between.
        spec = await store.get(SPEC_KEY)
        if spec is None:
            raise MismatchError(f"{store.url} is not empty ({found.key}) and is no output of batch-client: "
                                "choose another OUTPUT, or delete what is there with the store's own tools")
    identity.require_same(bytes(spec.data), store.url)


async def generation_of(store: Store) -> str | None:
    """The name of an output's generation; None where there is none, or its removal has begun.

    Raises MismatchError for what is no such name.
    """
    blob = await store.get(GENERATION_KEY)
    # In this order: a generation that was begun before the mark was made is deleted by who made it.
    if blob is None or await store.head(REMOVING_KEY) is not None:
        return None
    name = bytes(blob.data)
    if not _NAME.fullmatch(name):
        raise MismatchError(f"{child_url(store.url, GENERATION_KEY)} can't be read: wanted 16 hexadecimal digits; "
                            "score again at another place, or with --overwrite")
    return name.decode()


async def require_generation(store: Store, generation: str) -> None:
    """Raises MismatchError when the output is another one by now, or is being removed."""
    if await generation_of(store) != generation:
        raise MismatchError(f"{store.url} was removed, or is being removed: end every client of an output before that, "
                            "then run again")
