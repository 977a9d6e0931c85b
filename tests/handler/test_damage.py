"""Damaged files and modules with a mind of their own end in one line, and never as a bug of ours."""

from __future__ import annotations

import dataclasses
import gc
import sys
import zipfile

import numpy as np
import pytest
import torch

from batch_client.cli import main
from batch_client.errors import ServingError
from batch_client.server_config import MANIFEST, model_of
from batch_client.tuning import Tuning, read_tuning, write_tuning
from batch_handler import measure
from batch_handler.archive import ArchiveError, pack, read_description
from batch_handler.golden import golden_records
from batch_handler.model import ModelLoadError
from batch_handler.modelfile import ModelFileError, detect_kind
from batch_handler.runtimes.device import CpuDevice
from batch_handler.runtimes.slots import SlotRuntime
from batch_handler.scoring import Failure, Query, Score, Scorer
from batch_handler.signature import InputSpec, OutputSpec, SignatureError

METHODS = {"deflated": zipfile.ZIP_DEFLATED, "lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}


@pytest.fixture(params=METHODS)
def damaged(request, pack_request, tmp_path):
    """A function that gives the archive, compressed, with a member that can't be inflated."""
    packed = pack(dataclasses.replace(pack_request, output=tmp_path / "whole.mar"))

    def damage(member, start):
        path = tmp_path / "x.mar"
        with zipfile.ZipFile(packed) as whole, zipfile.ZipFile(path, "w", METHODS[request.param]) as other:
            for name in whole.namelist():
                other.writestr(name, whole.read(name))
            place = next(info for info in other.infolist() if info.filename == member)
        content = bytearray(path.read_bytes())
        first = place.header_offset + 30 + len(member) + start
        content[first : first + 40] = b"\xff" * 40
        path.write_bytes(content)
        return path

    return damage


@pytest.mark.parametrize("start", [0, 9, 40])
def test_a_member_that_cannot_be_inflated_is_said_in_one_line(damaged, start, tmp_path):
    path = damaged(MANIFEST, start)
    with pytest.raises(ServingError, match=r"is not a model archive \(MAR-INF/MANIFEST\.json: .+\): `batch-client"):
        model_of(path)
    path = damaged("model.json", start)
    with pytest.raises(ArchiveError, match=r"x\.mar.*: .+"):
        read_description(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises((ModelLoadError, OSError), match=r"x\.mar is damaged|Invalid data stream"):
        measure.prepare(path, tmp_path / "folder")


def test_so_is_the_one_that_a_tuning_file_is_compared_with(damaged):
    path = damaged("model.json", 0)
    write_tuning(path, Tuning(
        device="here", model_digest="sha256:0", runtime="eager", micro_batch=8, workers=1, threads=1,
        precision="float32", allocator="glibc-held", records_per_s=1.0, measured_at="2026-11-27T00:00:00Z", versions={},
        table=[]))
    with pytest.raises(ServingError, match=r"has no model\.json with a digest \(.+\)"):
        read_tuning(path, lambda: "here")


def test_a_zip_whose_list_of_members_is_damaged_is_no_model_file(pack_request, tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x09\x09"))
    with pytest.raises(ModelFileError, match=r"w\.pt is a damaged zip, wanted it as torch wrote it: BadZipFile"):
        detect_kind(tmp_path / "w.pt")


@pytest.mark.parametrize("shape", [(), (6, 6)])
def test_a_golden_array_without_an_axis_of_records_is_refused(shape, pack_request, tmp_path):
    np.save(tmp_path / "golden.npy", np.uint8(3))
    spec = InputSpec("x", np.dtype("u1"), shape, shape)
    request = dataclasses.replace(pack_request, golden=tmp_path / "golden.npy", inputs=(spec,))
    with pytest.raises(ArchiveError, match=r"golden records of x are uint8 \[\], wanted uint8 \[n") as caught:
        pack(request)
    assert ("a single record too: array[None]" in str(caught.value)) is (shape == ())


# numpy leaves the file open that it fails on.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_golden_records_in_a_damaged_zip_end_in_one_line(tmp_path, capfd):
    path = tmp_path / "golden.npz"
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    np.savez(path, x=np.zeros(3))
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))
    assert main(["pack", str(tmp_path / "w.pt"), "--arch", "torch.nn:Identity", "--golden", str(path)]) == 64
    said = capfd.readouterr().err
    assert said.startswith(f"batch-client: --golden {path}: can't be read as .npy: ")
    assert said.count("\n") == 1
    with pytest.raises(SignatureError, match=r"golden\.npz is neither \.npy nor \.npz: Bad magic number"):
        golden_records(path, [InputSpec("x", np.dtype("f8"), (), ())])
    gc.collect()


STUBBORN = """
import sys
import torch


class Stubborn(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(1, 3, 6)

    def {method}(self, *args, **kwargs):
        {deed}
"""


@pytest.mark.parametrize("deed", ["raise ValueError('not with me')", "sys.exit('not with me')"])
@pytest.mark.parametrize(("method", "what"), [
    ("eval", "set to eval mode"), ("train", "set to eval mode"), ("to", "put on cpu"), ("requires_grad_", "put on cpu"),
])
def test_what_a_module_raises_from_methods_of_its_own_is_one_line(method, what, deed, pack_request, tmp_path):
    source = tmp_path / "stubborn.py"
    source.write_text(STUBBORN.format(method=method, deed=deed))
    torch.save(torch.nn.Conv2d(1, 3, 6).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ArchiveError, match=rf"w\.pt: the module can't be {what}: \w+: not with me$"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "w.pt", arch=f"{source}:Stubborn", outputs=()))


def leaving(values: torch.Tensor) -> torch.Tensor:
    if bool((values == 13).any()):
        sys.exit("enough")
    return values * 2


def test_a_model_that_ends_the_process_costs_its_own_request(pack_request, tmp_path):
    spec = InputSpec("x", np.dtype("i2"), (16,), (16,))
    output = OutputSpec("y", np.dtype("f4"), (16,))
    scorer = Scorer(SlotRuntime(leaving, CpuDevice(), [spec], [output], numerics={}), [output], 4)
    good, bad = np.ones((3, 16), np.int16), np.full((1, 16), 13, np.int16)
    answers = scorer.score([Query((good,)), Query((bad,)), Query((good,), 0)])
    assert [type(answer) for answer in answers] == [Score, Failure, Score]
    assert answers[1] == Failure("the model raised SystemExit: enough", 500)
    (tmp_path / "ends.py").write_text("import sys, torch\n\n\nclass Ends(torch.nn.Linear):\n    def __init__(self):\n"
                                      "        super().__init__(2, 2)\n\n    def forward(self, x):\n"
                                      "        sys.exit('enough')\n")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ArchiveError, match=r"the model raised SystemExit on records of image .*: enough"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "w.pt", arch=f"{tmp_path}/ends.py:Ends", outputs=()))
