"""An archive, as far as its tuning file is concerned, and what was measured for it."""

from __future__ import annotations

import json
import zipfile

from batch_client.tuning import Tuning

DIGEST = "sha256:" + "1" * 64
MEASURED = Tuning(device="cpu-avx2-2cores", model_digest=DIGEST, runtime="torchscript", micro_batch=256, workers=3,
                  threads=2, precision="float32", allocator="glibc-default", records_per_s=21_400.5,
                  measured_at="2026-01-01T00:00:00+00:00", versions={"torch": "2.13.0"}, table=({"workers": 3},))


def archive_in(folder):
    path = folder / "digits.mar"
    with zipfile.ZipFile(path, "w") as mar:
        mar.writestr("model.json", json.dumps({"digest": DIGEST}))
    return path
