"""A device whose operations land late, in an order that a script chooses.

Rule: nothing lands before it must unless the script says so; an operation reads its source at the moment it
lands; and a buffer that an issued copy will write holds poison until then. So reading, or reusing, a buffer
before its event shows as wrong numbers, which a CPU never shows and a GPU shows seldom.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from batch_handler.runtimes.device import Event

__all__ = ["ScriptedDevice", "ScriptedEvent"]

Tensor = torch.Tensor

# A byte that makes a NaN of every float and a conspicuous number of every integer.
_POISON = 0xFF


class ScriptedEvent:
    """An operation of the script; waiting makes it, and what it depends on, land."""

    def __init__(self, work: Callable[[], None], stream: deque[ScriptedEvent], after: Event | None) -> None:
        self._work = work
        self._stream = stream
        self._after = after
        self.error: Exception | None = None
        self.landed = False

    def wait(self) -> None:
        """Land everything issued before it on its stream, then itself."""
        while not self.landed:
            self._stream[0].land()
        if self.error is not None:
            raise self.error

    def done(self) -> bool:
        return self.landed

    def land(self) -> None:
        """Do the work now; only for the first of its stream."""
        if isinstance(self._after, ScriptedEvent):
            while not self._after.landed:
                self._after.head.land()
        self._stream.popleft()
        self.landed = True
        if isinstance(self._after, ScriptedEvent) and self._after.error is not None:
            self.error = self._after.error
            return
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - an asynchronous error shows where it is waited for
            self.error = error

    @property
    def head(self) -> ScriptedEvent:
        """The first operation of its stream that has not landed."""
        return self._stream[0]


class ScriptedDevice:
    """Two streams on the host; `script` says how many pending operations land after each that is issued.

    An odd number starts with the compute stream, an even one with the upload stream. A script that ends lands
    nothing more by itself.
    """

    def __init__(self, script: Iterable[int] = (), *, stack_bytes: int = 0) -> None:
        self.stack_bytes = stack_bytes
        self.torch_device = torch.device("cpu")
        self.numerics: Mapping[str, Any] = {"device": "scripted"}
        self._script = iter(script)
        self._uploads: deque[ScriptedEvent] = deque()
        self._work: deque[ScriptedEvent] = deque()

    def host_buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _poison(torch.empty(tuple(shape), dtype=dtype))

    def mirror(self, host: Tensor) -> Tensor:
        return _poison(torch.empty_like(host))

    def restore(self) -> None:
        """There are no settings."""

    def settle(self) -> None:
        """Loading is not part of the script."""

    def upload(self, hosts: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        _poison(*targets)
        return self._issue(self._uploads, lambda: _copy(hosts, targets), None)

    def compute(self, work: Callable[[], tuple[Tensor, ...]], after: Event) -> tuple[list[Tensor], Event]:
        results: list[Tensor] = []
        return results, self._issue(self._work, lambda: results.extend(work()), after)

    def download(self, sources: list[Tensor], hosts: Sequence[Tensor], after: Event) -> tuple[Sequence[Tensor], Event]:
        _poison(*hosts)
        return hosts, self._issue(self._work, lambda: _copy(sources, hosts), after)

    def _issue(self, stream: deque[ScriptedEvent], work: Callable[[], None], after: Event | None) -> ScriptedEvent:
        event = ScriptedEvent(work, stream, after)
        stream.append(event)
        steps = next(self._script, 0)
        for step in range(steps):
            pending = [one for one in (self._uploads, self._work) if one]
            if pending:
                pending[(step + steps) % len(pending)][0].land()
        return event


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _poison(*tensors: Tensor) -> Tensor:
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(_POISON) if tensor.numel() else None
    return tensors[0]
