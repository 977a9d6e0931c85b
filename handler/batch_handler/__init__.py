"""The server's side: what runs inside a TorchServe worker, and the wire contract that clients share.

Importing this package imports nothing else. `batch_handler.oip` needs numpy and google-crc32c only.
"""

from __future__ import annotations

__all__: list[str] = []
