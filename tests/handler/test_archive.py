"""Pack, load, score: every kind of model file, and what pack refuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batch_client.cli import main
from batch_handler.archive import ArchiveError, pack, read_description
from batch_handler.model import Model
from batch_handler.modelfile import ModelFileError, detect_kind
from batch_handler.signature import InputSpec, OutputDraft


def reference(module, images):
    values = torch.from_numpy(images)[:, None].float() / 255
    with torch.inference_mode():
        return torch.softmax(module((values - 0.3) / 0.5), -1).numpy()


def write(kind, module, folder):
    path = folder / {"safetensors": "m.safetensors"}.get(kind, "m.pt")
    if kind == "state_dict":
        torch.save(module.state_dict(), path)
    elif kind == "safetensors":
        save_file(module.state_dict(), path)
    elif kind == "torchscript":
        with warnings.catch_warnings():
            # torch 2.9 and later: people still have such files.
            warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
            torch.jit.save(torch.jit.trace(module, torch.zeros(2, 1, 6, 6)), path)
    else:
        torch.save(module, path)
    return path


KINDS = ["state_dict", "safetensors", "torchscript", "pickle"]


@pytest.mark.parametrize("runtime", [None, "torchscript"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_packs_loads_and_scores(kind, runtime, pack_request, tiny_module, tmp_path, unpack, images):
    path = write(kind, tiny_module, tmp_path)
    assert detect_kind(path, trust_pickle=True) == kind
    request = dataclasses.replace(
        pack_request,
        model=path,
        output=tmp_path / "out" / "m.mar",
        runtime=runtime,
        arch=pack_request.arch if kind in ("state_dict", "safetensors") else None,
        trust_pickle=kind == "pickle",
    )
    written = pack(request)
    assert written == request.output
    assert [p.name for p in written.parent.iterdir()] == ["m.mar"]
    description = read_description(written)
    assert description.weights.kind == kind
    assert description.runtime == (runtime or ("torchscript" if kind == "torchscript" else "eager"))
    assert description.outputs[0].shape == (3,)
    model = Model.open(unpack(written))
    np.testing.assert_allclose(model.score_bulk([images])[0], reference(tiny_module, images), atol=1e-5)


def test_an_archive_has_the_members_that_the_reference_names(pack_request, tmp_path):
    written = pack(dataclasses.replace(pack_request, output=tmp_path / "a.mar"))
    with zipfile.ZipFile(written) as mar:
        names = mar.namelist()
        manifest = json.loads(mar.read("MAR-INF/MANIFEST.json"))
        assert mar.read("model-config.yaml") == b"minWorkers: 1\n"
        described = json.loads(mar.read("model.json"))
    assert manifest["model"] == {
        "modelName": "tiny",
        "modelVersion": "1.2",
        "handler": "entry.py",
        "configFile": "model-config.yaml",
    }
    (arch,) = [name for name in names if name.startswith("arch_")]
    assert sorted(names) == sorted(
        ["MAR-INF/MANIFEST.json", "entry.py", "model-config.yaml", "model.json", "weights.pt", "golden.npz", arch]
    )
    assert described["weights"] == {"file": "weights.pt", "kind": "state_dict", "arch": f"{arch}:make_model"}
    assert described["digest"] == read_description(written).digest


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_an_archive_is_for_the_umask_to_say(umask, mode, pack_request, tmp_path):
    before = os.umask(umask)
    try:
        written = pack(dataclasses.replace(pack_request, output=tmp_path / "a.mar"))
    finally:
        os.umask(before)
    assert written.stat().st_mode & 0o777 == mode


def test_equal_input_gives_an_equal_archive(pack_request, tmp_path):
    first, second = (pack(dataclasses.replace(pack_request, output=tmp_path / name)).read_bytes() for name in "ab")
    assert first == second


def test_a_pickle_is_not_loaded_unless_somebody_vouches_for_it(pack_request, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(ArchiveError, match="pass --trust-pickle if you trust"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "bomb.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("start", [b"# a model card", b'{"a": 1}', b"s", b"\x1f\x8b\x08tar", b""])
def test_what_is_no_model_file_is_not_called_a_pickle(pack_request, tmp_path, start):
    (tmp_path / "model.pt").write_bytes(start + bytes(200))
    with pytest.raises(ArchiveError, match="is not a model file that torch can read"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "model.pt"))


def test_the_file_of_an_architecture_may_have_dataclasses(pack_request, tmp_path):
    source = tmp_path / "configured.py"
    source.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "@dataclass\nclass Config:\n    width: int = 36\n"
        "def make_model():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(Config().width, 3))\n"
    )
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)).state_dict(), tmp_path / "w.pt")
    request = dataclasses.replace(
        pack_request, model=tmp_path / "w.pt", arch=f"{source}:make_model", outputs=()
    )
    assert pack(request).is_file()


def test_golden_records_and_several_outputs(pack_request, tmp_path, unpack, images):
    source = tmp_path / "two.py"
    source.write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return {'mean': x.mean((1, 2, 3)), 'top': x.flatten(1).argmax(1)}\n"
        "def make_model():\n    return Two()\n"
    )
    torch.save({"unused": torch.zeros(1)}, tmp_path / "w.pt")
    np.save(tmp_path / "golden.npy", images[:3])
    with pytest.raises(ArchiveError, match="does not fit"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "w.pt", arch=f"{source}:make_model"))
    torch.save({}, tmp_path / "w.pt")
    request = dataclasses.replace(
        pack_request,
        model=tmp_path / "w.pt",
        arch=f"{source}:make_model",
        outputs=(),
        golden=tmp_path / "golden.npy",
        output=tmp_path / "two.mar",
    )
    described = read_description(pack(request))
    assert [(o.name, o.dtype.name, o.shape) for o in described.outputs] == [
        ("mean", "float32", ()),
        ("top", "int64", ()),
    ]
    assert described.golden.records == 3
    top = Model.open(unpack(request.output)).score_bulk([images])[1]
    np.testing.assert_array_equal(top, images.reshape(50, -1).argmax(1))


# That a compiled one does, test_engines shows.
@pytest.mark.parametrize("runtime", ["eager", "torchscript", "onnx"])
def test_a_module_that_gives_a_dict_runs_under_each_runtime(runtime, pack_request, tmp_path, images, unpack):
    source = tmp_path / "named.py"
    source.write_text(
        "import torch\n"
        "class Named(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return {'whole': x.sum((1, 2, 3)), 'half': x.mean((1, 2, 3)), 'none': None}\n"
    )
    torch.save({}, tmp_path / "w.pt")
    request = dataclasses.replace(
        pack_request, model=tmp_path / "w.pt", arch=f"{source}:Named", runtime=runtime,
        outputs=(OutputDraft("half"), OutputDraft("whole")), output=tmp_path / "named.mar",
    )
    half, whole = Model.open(unpack(pack(request))).score_bulk([images])
    np.testing.assert_allclose(half * images[0].size, whole, rtol=1e-5)
    with pytest.raises(ArchiveError, match=r"outputs \['half', 'none', 'whole'\], wanted scores: name one of them"):
        pack(dataclasses.replace(request, outputs=(OutputDraft("scores"),), output=tmp_path / "other.mar"))


# Shapes that no array can have: more elements than numpy counts, bytes than it counts, bytes than are addressable.
HUGE = [(10**20,), (10**9, 10**9), (10**8, 10**7)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": None}, "holds weights only, wanted --arch"),
        ({"arch": "nothing"}, "wanted module:callable or FILE.py:callable"),
        ({"arch": "no_such_module:make"}, "can't be imported"),
        ({"arch": "/no/such/file.py:make"}, "No such file"),
        ({"arch": "torch.nn:Identity"}, "does not fit torch.nn:Identity"),
        ({"inputs": ()}, "no inputs"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"version": ""}, "version is ''"),
        ({"outputs": (OutputDraft("a"), OutputDraft("b"))}, "the signature names 2, wanted [[outputs]] in a --sig"),
        ({"outputs": (OutputDraft("a", shape=(4,)),)}, "wanted [4, 4]"),
        ({"golden": {"other": np.zeros((1, 6, 6), "u1")}}, "wanted image"),
        ({"golden": {"image": np.zeros((1, 6, 6), "f4")}}, "wanted uint8"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        *(({"inputs": (InputSpec("x", np.dtype("f4"), shape, shape),)}, "can't be made: ") for shape in HUGE),
        ({"runtime": "magic"}, "runtime is 'magic'"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(pack_request, tmp_path, change, message):
    request = dataclasses.replace(pack_request, output=tmp_path / "x.mar", **change)
    with pytest.raises(ArchiveError) as caught:
        pack(request)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_torchscript_by_its_members_only_is_refused_in_one_line(pack_request, tmp_path):
    with zipfile.ZipFile(tmp_path / "m.ts", "w") as script:
        script.writestr("m/constants.pkl", b"nonsense")
    for arch, message in ((None, "is not TorchScript: RuntimeError: "),
                          (pack_request.arch, "is TorchScript, which --arch says nothing of: leave --arch")):
        with pytest.raises(ArchiveError, match=message) as caught:
            pack(dataclasses.replace(pack_request, model=tmp_path / "m.ts", arch=arch, output=tmp_path / "x.mar"))
        assert "\n" not in str(caught.value)


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
    ("untraceable", {"runtime": "torchscript"}, "be traced, wanted one that can or runtime eager: RuntimeError: no tr"),
    ("changing", {"runtime": "torchscript"}, "be traced, wanted one that can or runtime eager: the model gave object"),
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


@pytest.mark.parametrize(("text", "message"), [
    ("raise ZeroDivisionError('first\\nsecond')", "ZeroDivisionError: first"),
    ("import sys; sys.exit('usage: train.py DATA')", "SystemExit: usage: train.py DATA"),
    ("def make(:", "SyntaxError: invalid syntax"),
    ("class Strange(BufferError): pass\nraise Strange", "can't be imported: Strange"),
])
def test_errors_of_an_arch_file_are_one_line(pack_request, tmp_path, text, message):
    source = tmp_path / "train.py"
    source.write_text(text)
    with pytest.raises(ArchiveError) as caught:
        pack(dataclasses.replace(pack_request, arch=f"{source}:make", output=tmp_path / "x.mar"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # Not by the name that its copy has in the archive.
    assert f"arch {source}:make can't be imported" in str(caught.value)


@pytest.mark.parametrize(("text", "instead"), [
    ("from math import cos\nclass Make: pass\ndef _make(): pass\ndef make_it(): pass", ", wanted one of Make, make_it"),
    ("make = 3", ""),
])
def test_a_callable_that_an_arch_file_lacks(pack_request, tmp_path, text, instead):
    source = tmp_path / "train.py"
    source.write_text(text)
    with pytest.raises(ArchiveError) as caught:
        pack(dataclasses.replace(pack_request, arch=f"{source}:make", output=tmp_path / "x.mar"))
    assert str(caught.value) == f"{pack_request.model.name}: arch {source}:make: there is no callable make{instead}"


def test_a_damaged_safetensors_file_is_named(pack_request, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ArchiveError, match=r"weights\.safetensors does not fit .*make_model"):
        pack(dataclasses.replace(pack_request, model=path, output=tmp_path / "x.mar"))


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


@pytest.mark.parametrize(("flags", "words"), [
    (["--input", "image:float33:6x6"], "--input can't be of a record: .*float33"),
    (["--input", "image:uint8:6x6", "--scale", "1/0"], "--input with --scale can't be of a record: .*1/0"),
    (["--input", "image:uint8:" + "9" * 5000], "--input .*: wanted a shape such as"),
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


def test_pack_ends_with_65_and_one_line(tmp_path, capfd):
    (tmp_path / "broken.py").write_text(BROKEN)
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    code = main(["pack", str(tmp_path / "w.pt"), "--arch", f"{tmp_path}/broken.py:needs_arguments",
                 "--input", "image:uint8:6x6", "-o", str(tmp_path / "x.mar")])
    said = capfd.readouterr().err
    assert code == 65
    assert said.startswith("batch-client: w.pt: arch ")
    assert said.count("\n") == 1


def test_a_wrong_shape_names_what_the_model_was_given(pack_request, tmp_path):
    wrong = dataclasses.replace(pack_request.inputs[0], shape=(5, 5), model_shape=(1, 5, 5))
    with pytest.raises(ArchiveError, match=r"raised RuntimeError on records of image \[1, 5, 5\]: .* cannot be "
                       "multiplied .*; model_shape .* says in which shape it takes a record$"):
        pack(dataclasses.replace(pack_request, inputs=(wrong,), output=tmp_path / "x.mar"))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_what_is_no_model_file_or_archive_is_refused(content, tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        detect_kind(path)
    with pytest.raises(ArchiveError):
        read_description(path)
    with pytest.raises(ModelFileError, match="is not a file"):
        detect_kind(tmp_path / "none.pt")
    torch.save({"epoch": 3}, path)
    with pytest.raises(ModelFileError, match="wanted a state_dict"):
        detect_kind(path)


def test_a_zip_that_is_not_ours_and_a_description_that_is_too_large(tmp_path):
    path = tmp_path / "x.mar"
    with zipfile.ZipFile(path, "w") as mar:
        mar.writestr("other", b"")
    with pytest.raises(ArchiveError, match=r"has no model\.json"):
        read_description(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as mar:
        mar.writestr("model.json", b" " * (1 << 26))
    with pytest.raises(ArchiveError, match="is over"):
        read_description(path)


@pytest.mark.parametrize("flags", [[], ["--input", "x:uint8:3"], ["--input", "x"], ["--signature", "nothere.toml"]])
def test_a_model_that_is_not_there_is_said_before_anything_is_asked(flags, tmp_path, capsys):
    path = tmp_path / "nothere.pt"
    assert main(["pack", str(path), *flags]) == 65
    assert capsys.readouterr().err == f"batch-client: {path} is not a file\n"


def test_a_name_that_no_file_can_have_is_not_there_either(capsys):
    assert main(["pack", "x" * 5000]) == 65
    assert capsys.readouterr().err == f"batch-client: {'x' * 200} is not a file\n"
