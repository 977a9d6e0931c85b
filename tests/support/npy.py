"""An array as the bytes of a .npy file."""

from __future__ import annotations

import io

import numpy as np


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()
