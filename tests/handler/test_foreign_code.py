"""What the code that comes with a model does wrong: in an architecture's file, and in a pickle."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import zipfile

import pytest
import torch

from batch_client.cli import main
from batch_handler.archive import ArchiveError, pack
from batch_handler.draft import OutputDraft

BROKEN = """
import torch

class Fixed(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)

class Untraceable(torch.nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("no trace of me")
        return x.flatten(1)

class Changing(torch.nn.Module):
    def forward(self, x):
        return object() if torch.jit.is_tracing() or torch.compiler.is_exporting() else x.flatten(1)

def needs_arguments(classes):
    return Fixed(None)

def raises():
    raise LookupError("no such layer\\nand more")

def ends():
    raise SystemExit(2)

def none():
    return Fixed(lambda x: None)

def number():
    return Fixed(lambda x: 1.5)

def nested():
    return Fixed(lambda x: (None,))

def complex_numbers():
    return Fixed(lambda x: x.flatten(1) + 1j)

def small_floats():
    return Fixed(lambda x: x.flatten(1).to(torch.float8_e4m3fn))

def plain():
    return Fixed(lambda x: x.flatten(1))

def untraceable():
    return Untraceable()

def changing():
    return Changing()
"""
FOREIGN = [
    ("needs_arguments", {}, "TypeError: needs_arguments() missing 1 required positional argument"),
    ("raises", {}, "LookupError: no such layer"),
    ("ends", {}, "SystemExit: 2"),
    ("BROKEN", {}, "broken.py:BROKEN: there is no callable BROKEN, wanted one of Fixed, "),
    ("none", {}, "the model gave NoneType, wanted a tensor"),
    ("number", {}, "the model gave float, wanted a tensor"),
    ("nested", {}, "output scores is NoneType, wanted a tensor"),
    ("complex_numbers", {}, "output scores: dtype complex64 has no datatype"),
    ("small_floats", {}, "output scores is torch.float8_e4m3fn, which numpy can't hold: TypeError"),
    ("untraceable", {"runtime": "torchscript"}, "zeros, wanted one that can or runtime eager: RuntimeError: no tr"),
    ("changing", {"runtime": "torchscript"}, "zeros, wanted one that can or runtime eager: the model gave object"),
    ("changing", {"runtime": "onnx"}, "the module can't be exported, wanted another runtime: "),
]


@pytest.mark.parametrize(("name", "change", "message"), FOREIGN, ids=[name for name, *_ in FOREIGN])
def test_errors_of_foreign_code_are_one_line(pack_request, tmp_path, name, change, message):
    source = tmp_path / "broken.py"
    source.write_text(BROKEN)
    torch.save({}, tmp_path / "w.pt")
    request = dataclasses.replace(
        pack_request, model=tmp_path / "w.pt", arch=f"{source}:{name}",
        outputs=(OutputDraft("scores"),), output=tmp_path / "x.mar", **change)
    with pytest.raises(ArchiveError) as caught:
        pack(request)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "batch-pack-" not in str(caught.value)  # the folder of the time that packing takes
    assert not request.output.exists()


def refusal_of_make(text, pack_request, folder):
    """What `pack` says of `train.py:make` where the file has this text."""
    source = folder / "train.py"
    source.write_text(text)
    with pytest.raises(ArchiveError) as caught:
        pack(dataclasses.replace(pack_request, arch=f"{source}:make", output=folder / "x.mar"))
    return str(caught.value).removeprefix(f"{pack_request.model.name}: arch {source}:make")


@pytest.mark.parametrize(("text", "message"), [
    ("raise ZeroDivisionError('first\\nsecond')", "ZeroDivisionError: first"),
    ("import sys; sys.exit('usage: train.py DATA')", "SystemExit: usage: train.py DATA"),
    ("def make(:", "SyntaxError: invalid syntax"),
    ("class Strange(BufferError): pass\nraise Strange", "Strange"),
])
def test_errors_of_an_arch_file_are_one_line(pack_request, tmp_path, text, message):
    said = refusal_of_make(text, pack_request, tmp_path)
    assert said.startswith(f" can't be imported: {message}")  # not by the name that its copy has in the archive
    assert "\n" not in said


@pytest.mark.parametrize(("text", "instead"), [
    ("from math import cos\nclass Make: pass\ndef _make(): pass\ndef make_it(): pass", ", wanted one of Make, make_it"),
    ("\n".join(f"def {name}(): 0" for name in "abcdefghijkl"), ", wanted one of a, b, c, d, e, f, g, h, i, j, 2 more"),
    ("make = 3", ""),
])
def test_a_callable_that_an_arch_file_lacks(pack_request, tmp_path, text, instead):
    assert refusal_of_make(text, pack_request, tmp_path) == f": there is no callable make{instead}"


def test_pack_ends_with_65_and_one_line(tmp_path, capfd):
    (tmp_path / "broken.py").write_text(BROKEN)
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    code = main(["pack", str(tmp_path / "w.pt"), "--arch", f"{tmp_path}/broken.py:needs_arguments",
                 "--input", "image:uint8:6x6", "-o", str(tmp_path / "x.mar")])
    said = capfd.readouterr().err
    assert code == 65
    assert said.startswith("batch-client: w.pt: arch ")
    assert said.count("\n") == 1


def test_a_pickle_that_raises_is_named(pack_request, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (int, ("no number",))

    path = tmp_path / "m.pt"
    torch.save(Bomb(), path)
    with pytest.raises(ArchiveError, match="can't be unpickled: ValueError: invalid literal"):
        pack(dataclasses.replace(pack_request, model=path, trust_pickle=True, arch=None, output=tmp_path / "x.mar"))


def test_a_file_whose_code_ends_the_process_is_named(pack_request, tmp_path, monkeypatch, capfd):
    script = "import torch\nclass Net(torch.nn.Module): pass\n"
    (tmp_path / "ending_script.py").write_text(script)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(importlib.import_module("ending_script").Net(), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "ending_script")
    (tmp_path / "ending_script.py").write_text(f"{script}raise SystemExit('usage: train.py DATA')\n")
    importlib.invalidate_caches()
    assert main(["pack", str(tmp_path / "m.pt"), "--trust-pickle", "--input", "image:uint8:6x6"]) == 65
    assert "can't be unpickled: SystemExit: usage: train.py DATA\n" in capfd.readouterr().err
    monkeypatch.setattr(torch.export, "load", lambda _: sys.exit(3))
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as program:
        program.writestr("m/models/model.json", b"")
    with pytest.raises(ArchiveError, match="can't be loaded as an exported program: SystemExit: 3"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "m.pt2", trust_pickle=True, arch=None,
                                 output=tmp_path / "x.mar"))


def test_a_pickle_without_its_code_says_what_to_do(pack_request, tmp_path, monkeypatch):
    (tmp_path / "gone_away.py").write_text("import torch\nclass Own(torch.nn.Module): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(importlib.import_module("gone_away").Own(), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "gone_away")
    (tmp_path / "gone_away.py").unlink()
    importlib.invalidate_caches()
    request = dataclasses.replace(pack_request, model=tmp_path / "m.pt", trust_pickle=True, arch=None)
    with pytest.raises(ArchiveError, match=r"state_dict packed with --arch: ModuleNotFoundError: .*gone_away"):
        pack(dataclasses.replace(request, output=tmp_path / "x.mar"))
