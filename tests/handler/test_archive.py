"""Pack, load, score: every kind of model file, and what pack refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batch_handler.archive import ArchiveError, pack, read_description
from batch_handler.draft import OutputDraft
from batch_handler.model import Model
from batch_handler.modelfile import ModelFileError, detect_kind
from batch_handler.runtimes.transform import ModelError, joined
from batch_handler.signature import InputSpec, OutputSpec, SignatureError
from support.onnx_files import external, model, node, value_info


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
def test_every_kind_of_file_packs_loads_and_scores(
        kind, runtime, pack_request, tiny_module, tmp_path, unpack, images, tiny_scores):
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
    np.testing.assert_allclose(model.score_bulk([images])[0], tiny_scores, atol=1e-5)


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
    with pytest.raises(ArchiveError, match="do not fit"):
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
        ({"arch": "torch.nn:Identity"}, "the weights do not fit torch.nn:Identity"),
        ({"inputs": ()}, "no inputs"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"version": ""}, "version is ''"),
        ({"outputs": (OutputDraft("a"), OutputDraft("b"))}, "the signature names 2, wanted [[outputs]] in a --sig"),
        ({"outputs": (OutputDraft("a", shape=(4,)),)}, "wanted [4, 4]"),
        ({"golden": {"other": np.zeros((1, 6, 6), "u1")}}, "wanted image"),
        ({"golden": {"image": np.zeros((1, 6, 6), "f4")}}, "wanted uint8"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        *(({"inputs": (InputSpec("x", np.dtype("f4"), shape, shape),)}, "can't be made: ") for shape in HUGE),
        ({"inputs": (InputSpec("x", np.dtype("u1"), (6, 5, 3), (3, 6, 5)),)}, "reshaped, not transposed; transpose in"),
        ({"inputs": (InputSpec("x", np.dtype("u1"), (6, 1, 4), (1, 4, 6)),)}, "[1, 4, 6], that of its records [6, 1,"),
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


@pytest.mark.parametrize(("prefix", "save"), [
    ("module.", "model.module"), ("_orig_mod.", "model._orig_mod"), ("_orig_mod.module.", "model._orig_mod.module"),
])
def test_weights_of_a_wrapped_module_say_how_to_save_them(pack_request, tmp_path, tiny_module, prefix, save):
    path = tmp_path / "wrapped.pt"
    torch.save({prefix + name: weight for name, weight in tiny_module.state_dict().items()}, path)
    with pytest.raises(ArchiveError, match=f"^wrapped.pt: .* begin with '{prefix}': save {save}.state_dict"):
        pack(dataclasses.replace(pack_request, model=path, output=tmp_path / "x.mar"))
    torch.save({0: torch.zeros(1)}, path)
    with pytest.raises(ArchiveError, match="the weights do not fit"):
        pack(dataclasses.replace(pack_request, model=path, output=tmp_path / "x.mar"))
    torch.save({prefix + name: weight for name, weight in tiny_module.state_dict().items()}, path)
    own = "import torch\nclass Own(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    (tmp_path / "own.py").write_text(f"{own}        self.{prefix.partition('.')[0]} = torch.nn.Linear(3, 3)\n")
    with pytest.raises(ArchiveError, match=r"the weights do not fit .*own.py:Own: Error\(s\) in loading state_dict"):
        pack(dataclasses.replace(pack_request, model=path, arch=f"{tmp_path}/own.py:Own", output=tmp_path / "x.mar"))


def test_a_damaged_safetensors_file_is_named(pack_request, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ArchiveError, match=r"the weights do not fit .*make_model"):
        pack(dataclasses.replace(pack_request, model=path, output=tmp_path / "x.mar"))


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
    torch.save({"epoch": 3, "state": {}}, path)
    with pytest.raises(ModelFileError, match=r"wanted a state_dict: names and tensors$"):
        detect_kind(path)
    torch.save({"epoch": torch.arange(3), "optimizer": {"state": {}, "lr": 0.1}, "rng": {"a": torch.zeros(1)},
                "model": {"w": torch.zeros(1), "b": torch.zeros(1)}}, path)
    with pytest.raises(ModelFileError, match=r"wanted a state_dict: .*; save what is under 'model' as a file of its"):
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


@pytest.mark.parametrize(("kind", "dtype"), [(7, "i8"), (6, "i4"), (11, "f8"), (10, "f2")])
@pytest.mark.parametrize("sizes", [["n", 4], ["n", "m"]])
def test_what_a_graph_takes_as_it_travels_is_not_cast(kind, dtype, sizes, pack_request, tmp_path):
    nodes = [node("Abs", ["x"], ["y"])]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, [value_info("x", sizes, kind)], [value_info("y", sizes, kind)]))
    request = dataclasses.replace(pack_request, model=path, output=tmp_path / "m.mar", arch=None, outputs=(),
                                  inputs=(InputSpec("x", np.dtype(dtype), (4,), (4,)),))
    packed = read_description(pack(request))
    assert (packed.inputs[0].cast, packed.outputs[0].dtype) == (False, np.dtype(dtype))
    other = dataclasses.replace(request, inputs=(InputSpec("x", np.dtype("u1"), (4,), (4,)),))
    with pytest.raises(ArchiveError, match=r"m\.onnx: the model raised"):
        pack(other)


@pytest.mark.parametrize(("dtype", "hint"), [("f8", True), ("f2", True), ("i8", True), ("f4", False)])
def test_who_wanted_numbers_as_they_travel_is_told_how(dtype, hint, pack_request, tmp_path):
    layer = torch.nn.Linear(4, 2).to(torch.float64 if dtype == "f4" else getattr(torch, np.dtype(dtype).name)
                                     if dtype != "i8" else torch.float64)
    torch.save(layer, tmp_path / "m.pt")
    request = dataclasses.replace(pack_request, model=tmp_path / "m.pt", output=tmp_path / "m.mar", arch=None,
                                  outputs=(), trust_pickle=True, inputs=(InputSpec("x", np.dtype(dtype), (4,), (4,)),))
    with pytest.raises(ArchiveError, match="the model raised RuntimeError") as caught:
        pack(request)
    assert (f"cast = false in a --signature file keeps {np.dtype(dtype).name}" in str(caught.value)) == hint


def test_a_scale_of_nothing_is_refused(pack_request):
    with pytest.raises(SignatureError, match="scale of input x is 0, which would make all records alike"):
        InputSpec("x", np.dtype("u1"), (4,), (4,), scale=0.0)


def test_a_mean_of_channels_that_are_last_is_told_where_to_go():
    with pytest.raises(SignatureError, match=(
            r"mean of input image has 3 values, wanted 1 or 64, the first size of its model_shape: one a channel needs "
            r"the channels first \(C x H x W\); where they are last, normalise in the module$")):
        InputSpec("image", np.dtype("u1"), (64, 64, 3), (64, 64, 3), mean=(0.5, 0.4, 0.3))


def test_outputs_of_other_shapes_than_each_other_are_named_in_the_archives_words():
    specs = (OutputSpec("scores", np.dtype("f4"), (7,)),)
    with pytest.raises(ModelError, match=r"output scores has shapes \[8, 6\] and \[8, 7\], wanted \[8, 7\]"):
        joined([[torch.zeros(8, 7), torch.zeros(8, 6)]], specs)


def test_code_instead_of_weights_is_told_what_is_wanted(pack_request, tmp_path):
    (tmp_path / "net.py").write_text("import torch\n")
    with pytest.raises(ArchiveError, match=r"^net\.py is Python: wanted a file of weights, and --arch net\.py:"):
        pack(dataclasses.replace(pack_request, model=tmp_path / "net.py"))


def test_a_program_for_fewer_records_names_its_micro_batch(pack_request, tmp_path):
    many = torch.export.Dim("many", min=1, max=64)
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.zeros(8, 4),), dynamic_shapes=({0: many},))
    torch.export.save(program, tmp_path / "m.pt2")
    request = dataclasses.replace(
        pack_request, model=tmp_path / "m.pt2", output=tmp_path / "m.mar", arch=None, outputs=(), trust_pickle=True,
        inputs=(InputSpec("x", np.dtype("f4"), (4,), (4,)),), micro_batch=65)
    with pytest.raises(ArchiveError, match=r"say --micro-batch 64, or less$"):
        pack(request)
    assert pack(dataclasses.replace(request, micro_batch=64)).is_file()


def test_an_error_names_the_file_that_was_given_and_not_its_copy(pack_request, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(model([], [], [], [external("w", (2,), "net.onnx.data")]))
    with pytest.raises(ArchiveError, match=r"net\.onnx keeps weights in another file") as caught:
        pack(dataclasses.replace(pack_request, model=path, arch=None))
    assert "model.onnx" not in str(caught.value)
