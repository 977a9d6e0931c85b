"""`pack` as it is typed: what it refuses before the work, and what it notes."""

import dataclasses
import re
import resource

import numpy as np
import pytest
import torch

from batch_client.cli import main
from batch_client.cli.pack import _notes
from batch_client.tuning import Tuning, tuning_path, write_tuning
from batch_handler.archive import read_description
from batch_handler.signature import OutputSpec


@pytest.mark.parametrize(("flags", "words"), [
    (["--input", "image:float33:6x6"], "--input can't be of a record: .*float33"),
    (["--input", "image:uint8:6x6", "--scale", "1/0"], "--input with --scale can't be of a record: .*1/0"),
    (["--input", "image:uint8:" + "9" * 5000], "--input .*: wanted a shape such as"),
    (["--input", "left:uint8:6x6", "--input", "right:uint8:6x6"],
     "--input is given 2 times, wanted once: a model of several inputs needs --signature FILE"),
    (["--golden", "RECORDS", "--model-shape", "1x5x5"],
     r"--golden .*records.npy with --model-shape can't be of a record: .*5, 5"),
    (["--input", "image:uint8:6x6", "--name", "a b"], "--name is 'a b', wanted "),
    (["--input", "image:uint8:6x6", "--version", "1/0"], "--version is '1/0', wanted "),
    (["--input", "image:uint8:6x6", "--output-name", "a b"], "--output-name: .*'a b', wanted "),
    (["--input", "image:uint8:6x6", "--output-name", "record_status"], "--output-name: .*record_status"),
    (["--input", "image:uint8:6x6"], r"w w\.pt gives the model no name: .*; give one with --name"),
])
def test_flags_that_can_be_no_record_or_name_end_with_64(tmp_path, capfd, flags, words):
    np.save(tmp_path / "records.npy", np.zeros((2, 6, 6), np.uint8))
    (tmp_path / "w w.pt").touch()
    flags = [str(tmp_path / "records.npy") if flag == "RECORDS" else flag for flag in flags]
    assert main(["pack", str(tmp_path / "w w.pt"), *flags]) == 64
    said = capfd.readouterr().err
    assert re.search(words, said)
    assert said.count("\n") == 1


def test_where_no_archive_can_be_written_it_is_said_before_the_work_and_a_full_disk_after_it(tmp_path, capfd):
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    flags = ["--arch", f"{tmp_path}/net.py:make", "--input", "x:float32:3"]
    archive = tmp_path / "new" / "w.mar"
    for output in (tmp_path, tmp_path / "net.py" / "w.mar"):
        # What is no model would be said next.
        assert main(["pack", str(tmp_path / "net.py"), *flags, "-o", str(output)]) == 64
        assert f"-o {output}: " in capfd.readouterr().err
    assert main(["pack", str(tmp_path / "w.pt"), *flags, "-o", str(archive)]) == 0
    capfd.readouterr()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (archive.stat().st_size - 1, hard))
    try:
        assert main(["pack", str(tmp_path / "w.pt"), *flags, "-o", str(archive)]) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert re.search(r"no room for the archive, .* \(File too large\): name another place", capfd.readouterr().err)
    assert [path.name for path in archive.parent.iterdir()] == ["w.mar"]


def test_a_tuning_file_that_wins_over_the_micro_batch_that_is_packed_is_noted(tmp_path, capfd):
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    (tmp_path / "net.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(3, 2)\n")
    archive = tmp_path / "w.mar"

    def notes(*flags):
        assert main(["pack", str(tmp_path / "w.pt"), "--arch", f"{tmp_path}/net.py:make", "--input", "x:float32:3",
                     "-o", str(archive), *flags]) == 0
        return [line for line in capfd.readouterr().err.splitlines() if "tuning" in line]

    assert notes() == []
    tuning = Tuning(device="here", model_digest=read_description(archive).digest, runtime="eager", micro_batch=256,
                    workers=1, threads=1, precision="float32", allocator="glibc-held", records_per_s=1.0, versions={})
    write_tuning(archive, tuning)
    write_tuning(archive, dataclasses.replace(tuning, device="other-model", model_digest="sha256:0"))
    write_tuning(archive, dataclasses.replace(tuning, device="there", micro_batch=64))
    (tmp_path / "w.tuning" / "damaged.json").write_text("{}")
    (note,) = notes("--micro-batch", "64")
    assert note == (f"note: tuning files in {tmp_path}/w.tuning win over the micro-batch of 64 that was packed: 256 in "
                    "here.json; delete them, or serve with BATCH_HANDLER_MICRO_BATCH=64")
    assert "packed: 256 in here.json, 64 in there.json; delete" in "".join(notes())
    tuning_path(archive, "there").unlink()
    assert notes("--micro-batch", "256") == []


@pytest.mark.parametrize("flags", [[], ["--input", "x:uint8:3"], ["--input", "x"], ["--signature", "nothere.toml"]])
def test_a_model_that_is_not_there_is_said_before_anything_is_asked(flags, tmp_path, capsys):
    path = tmp_path / "nothere.pt"
    assert main(["pack", str(path), *flags]) == 65
    assert capsys.readouterr().err == f"batch-client: {path} is not a file\n"


def test_a_name_that_no_file_can_have_is_not_there_either(capsys):
    assert main(["pack", "x" * 5000]) == 65
    assert capsys.readouterr().err == f"batch-client: {'x' * 200} is not a file\n"


def test_outputs_that_no_run_can_carry_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Linear(2, 200_000), "wide.pt")
    words = ["pack", "wide.pt", "--trust-pickle", "--input", "x:float32:2", "--micro-batch"]
    assert main([*words, "128"]) == 0
    assert ("a micro-batch have 102,400,000 bytes and a reply at most 62,914,560: runs need a --micro-batch of at most "
            "78\n") in capsys.readouterr().err
    assert main([*words, "78"]) == 0
    assert "runs need" not in capsys.readouterr().err
    described = read_description(tmp_path / "wide.mar")
    larger = dataclasses.replace(described, outputs=(OutputSpec("scores", np.dtype("f4"), (16_000_000,)),))
    (note,) = _notes(tmp_path / "wide.mar", larger)
    assert note.endswith(" bytes and a reply at most 62,914,560: no run can carry those of one record")


def test_another_models_archive_that_nobody_named_is_not_replaced_without_a_word(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def notes(size, *flags):
        torch.manual_seed(size)
        torch.save(torch.nn.Linear(2, size), "w.pt")
        assert main(["pack", "w.pt", "--trust-pickle", "--input", "x:float32:2", *flags]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "note" in line]

    assert notes(3) == notes(3) == []
    first = read_description(tmp_path / "w.mar").digest
    assert notes(4, "-o", "named.mar") == notes(5, "-o", "named.mar") == []
    assert notes(4) == [f"note: w.mar held another model, {first}: it is replaced"]
