"""What of TorchServe's own worker process is made leaner, from inside it; TorchServe is archived and stays as it is.

Rule: what a worker receives and sends is the same with or without this.
"""

from __future__ import annotations

import logging
import socket
import sys
from types import ModuleType

__all__ = ["make_lean", "receive"]

_RECEIVED = "Backend received inference at"


def make_lean(protocol: ModuleType | None) -> None:
    """`protocol` is `ts.protocol.otf_message_handler`, or None outside a worker, where nothing is done."""
    if protocol is None:
        return
    if hasattr(protocol, "_retrieve_buffer"):
        vars(protocol)["_retrieve_buffer"] = receive
    # A line a server batch, for Java to parse and drop. A filter on the root logger sees only what is logged there.
    logging.getLogger().addFilter(lambda record: not str(record.msg).startswith(_RECEIVED))


def receive(connection: socket.socket, length: int) -> bytearray:
    """`length` bytes, received into their place. TorchServe's own takes them in pieces and puts these together, which
    copies every body twice more. Ends the process where the connection does, as TorchServe's does.
    """
    data = bytearray(length)
    left = memoryview(data)
    while left:
        count = connection.recv_into(left, 0, socket.MSG_WAITALL)
        if not count:
            logging.getLogger(__name__).info("the server is gone")
            sys.exit(0)
        left = left[count:]
    return data
