"""ONNX graphs, exported programs and compiled packages: what runs them, what they are refused for, what is shown."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batch_client.cli import main
from batch_handler.archive import ArchiveError, pack, read_description
from batch_handler.draft import OutputDraft
from batch_handler.model import Model, ModelLoadError, Tuning
from batch_handler.modelfile import ModelFileError, detect_kind
from batch_handler.runtimes.aot import missing_instructions
from batch_handler.runtimes.protobuf import fields_of
from batch_handler.scoring import Query, Score
from batch_handler.signature import KINDS, InputSpec, digest_of, runtimes_for
from support.onnx_files import INT64, STRING, external, field, message, model, node, tensor, tiny_onnx, value_info


@pytest.fixture(scope="module")
def onnx_file(tiny_module, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    path.write_bytes(tiny_onnx(tiny_module))
    return path


def exported(module, folder, records, dynamic):
    shapes = ({0: torch.export.Dim("n", min=1, max=1024)},) if dynamic else None
    path = folder / "program.pt2"
    torch.export.save(torch.export.export(module, (torch.zeros(records, 1, 6, 6),), dynamic_shapes=shapes), path)
    return path


def repacked(request, path, folder, **change):
    return dataclasses.replace(
        request, model=path, arch=None, output=folder / "x.mar", **{"trust_pickle": path.suffix == ".pt2", **change}
    )


def online(opened, images):
    (score,) = opened.score([Query((images,))])
    assert isinstance(score, Score), score
    return score.outputs[0]


@pytest.mark.parametrize("runtime", ["eager", "torchscript", "onnx"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program_runs_like_the_module(
    dynamic, runtime, pack_request, tiny_module, tmp_path, unpack, images, tiny_scores
):
    path = exported(tiny_module, tmp_path, 5, dynamic)
    packed = pack(repacked(pack_request, path, tmp_path, runtime=runtime, micro_batch=None))
    described = read_description(packed)
    assert described.weights.kind == ("onnx" if runtime == "onnx" else "exported")
    # A program that was exported for five records takes five, and nobody has to say so.
    assert described.micro_batch == (128 if dynamic else 5)
    opened = Model.open(unpack(packed))
    np.testing.assert_allclose(opened.score_bulk([images])[0], tiny_scores, atol=1e-5)
    np.testing.assert_allclose(online(opened, images[:2]), tiny_scores[:2], atol=1e-5)


def test_a_graph_runs_and_says_what_it_takes(pack_request, onnx_file, tiny_scores, tmp_path, unpack, images):
    packed = pack(repacked(pack_request, onnx_file, tmp_path))
    opened = Model.open(unpack(packed))
    np.testing.assert_allclose(opened.score_bulk([images])[0], tiny_scores, atol=1e-5)
    np.testing.assert_allclose(online(opened, images[:3]), tiny_scores[:3], atol=1e-5)
    assert opened.numerics["runtime"] == "onnx"
    assert opened.metadata().platform == "onnxruntime_onnx"
    bare = pack(repacked(pack_request, onnx_file, tmp_path, inputs=(), outputs=()))
    described = read_description(bare)
    assert [(spec.name, spec.shape) for spec in described.inputs] == [("image", (1, 6, 6))]
    assert [(spec.name, spec.shape) for spec in described.outputs] == [("logits", (3,))]


def test_a_graph_for_a_fixed_number_of_records_is_filled_up(
        pack_request, tiny_module, tmp_path, unpack, images, tiny_scores):
    path = tmp_path / "fixed.onnx"
    path.write_bytes(tiny_onnx(tiny_module, records=3))
    packed = pack(repacked(pack_request, path, tmp_path, micro_batch=None))
    directory = unpack(packed)
    opened = Model.open(directory)
    assert opened.micro_batch == 3
    for count in (1, 2, 3, 7):
        np.testing.assert_allclose(online(opened, images[:count]), tiny_scores[:count], atol=1e-5)
    with pytest.raises(ModelLoadError, match=r"takes 3 records at a time .* found micro-batches of 8, wanted 3"):
        Model.open(directory, Tuning(micro_batch=8))


def difference():
    """a - b, beside outputs that are of no record."""
    labels = message((1, 2), (2, STRING), (6, "cat"), (6, "dog"))
    nodes = [
        node("Sub", ["a", "b"], ["less"]), node("Add", ["a", "b"], ["more"]), node("NonZero", ["a"], ["places"]),
        node("ReduceSum", ["a"], ["total"], keepdims=0), node("Identity", ["w"], ["constant"]),
        node("Constant", [], ["labels"]) + field(5, message((1, "value"), (5, labels), (20, 4))),
    ]
    outputs = [value_info("labels", [2], STRING), value_info("less", ["n", 4]), value_info("places", [2, "k"], INT64),
               value_info("total", []), value_info("constant", [3]), value_info("more", ["n", 4])]
    return model(nodes, [value_info("a", ["n", 4]), value_info("b", ["n", 4])], outputs,
                 [tensor("w", np.zeros(3, np.float32))])


@pytest.fixture
def packed_difference(pack_request, tmp_path):
    path = tmp_path / "difference.onnx"
    path.write_bytes(difference())

    def packed(inputs, outputs):
        specs = tuple(InputSpec(name, np.dtype("f4"), (4,), (4,)) for name in inputs)
        drafts = tuple(OutputDraft(name) for name in outputs)
        return pack(repacked(pack_request, path, tmp_path, inputs=specs, outputs=drafts))

    return packed


@pytest.mark.parametrize(("inputs", "sign"), [("ab", 1), ("ba", -1), ("xy", 1)])
def test_inputs_have_the_graphs_names_or_its_order(inputs, sign, packed_difference, unpack):
    opened = Model.open(unpack(packed_difference(inputs, ["less"])))
    first, second = np.random.default_rng(3).random((2, 20, 4), np.float32)
    np.testing.assert_array_equal(opened.score_bulk([first, second])[0], (first - second) * sign)


def test_outputs_that_nobody_wants_are_not_looked_at(packed_difference, unpack):
    packed = packed_difference("ab", ["more", "less"])
    assert [spec.name for spec in read_description(packed).outputs] == ["more", "less"]
    first, second = np.random.default_rng(3).random((2, 20, 4), np.float32)
    more, less = Model.open(unpack(packed)).score_bulk([first, second])
    np.testing.assert_array_equal(more, first + second)
    np.testing.assert_array_equal(less, first - second)


@pytest.mark.parametrize(("kind", "dtype"), [(2, "u1"), (4, "u2"), (12, "u4"), (13, "u8"), (6, "i4"), (7, "i8")])
def test_a_graph_may_give_integers_of_any_kind(kind, dtype, pack_request, tmp_path, unpack):
    path = tmp_path / "integers.onnx"
    path.write_bytes(model([node("Cast", ["x"], ["y"], to=kind)], [value_info("x", ["n", 8], INT64)],
                           [value_info("y", ["n", 8], kind)]))
    packed = pack(repacked(pack_request, path, tmp_path, outputs=(), inputs=(
        InputSpec("x", np.dtype("i8"), (8,), (8,), cast=False),)))
    assert read_description(packed).outputs[0].dtype == np.dtype(dtype)
    records = np.random.default_rng(3).integers(0, min(np.iinfo(dtype).max, 2**62), (50, 8), np.int64)
    (given_,) = Model.open(unpack(packed)).score_bulk([records])
    assert given_.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(given_, records)


@pytest.mark.parametrize(("inputs", "outputs", "words"), [
    ("bx", ["less"], "the graph takes inputs ['a', 'b'], the signature names ['b', 'x'], wanted all"),
    ("abx", ["less"], "the graph takes inputs ['a', 'b'], the signature names ['a', 'b', 'x'], wanted all"),
    ("ab", ["less", "sum"], "'total', 'constant', 'more'], wanted sum: name one"),
    ("ab", ["less", "a", "b", "c", "d", "e"], "'total', 'constant', 'more'], wanted a, b, c, d, e: name one"),
])
def test_names_that_a_graph_has_in_part_are_refused(inputs, outputs, words, packed_difference):
    with pytest.raises(ArchiveError, match=re.escape(words)) as caught:
        packed_difference(inputs, outputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("place", "content"), [
    ("initializer", lambda: model([], [], [], [external("w", (2,), "weights.bin")])),
    ("attribute", lambda: model([node("Constant", [], ["w"]) + field(5, message((5, external("w", (2,), "/etc/x"))))],
                                [], [])),
    ("subgraph", lambda: model([message((4, "If"), (5, message((6, message((5, external("w", (2,), "w")))))))],
                               [], [])),
    ("function", lambda: model([], [], []) + field(25, message((11, message((5, external("w", (2,), "w"))))))),
])
def test_a_graph_that_keeps_weights_in_another_file_is_refused(place, content, pack_request, tmp_path):
    path = tmp_path / "outside.onnx"
    path.write_bytes(content())
    with pytest.raises(ArchiveError, match="keeps weights in another file, wanted one file"):
        pack(repacked(pack_request, path, tmp_path))


@pytest.mark.parametrize(("content", "message_"), [
    (b"", "can't be loaded as ONNX"),
    (b"nonsense", "is not an ONNX file"),
    (model([node("NoSuchOperator", ["image"], ["y"])], [value_info("image", ["n", 1, 6, 6])],
           [value_info("y", ["n", 3])]), "can't be loaded as ONNX"),
    (model([node("Add", ["image", "w"], ["y"])], [value_info("image", ["n", 1, "h", "w"])],
           [value_info("y", ["n", 1, "h", 5])], [tensor("w", np.zeros((5,), np.float32))]),
     r"raised RuntimeError on records of image \[1, 6, 6\]"),
])
def test_what_is_no_graph_for_these_records_is_refused_in_one_line(content, message_, pack_request, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match=message_) as caught:
        pack(repacked(pack_request, path, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sizes", "shape", "wanted"), [
    ([10], (11,), r"a record of image is \[11\] in the model, the graph takes \[10\]: say so with --input"),
    (["h", 5], (6, 6), r"image is \[6, 6\] in the model, the graph takes \[any, 5\]"),
    ([3, 4], (12,), r"image is \[12\] in the model, the graph takes \[3, 4\]"),
    ([10], (10,), None), (["h", 6], (6, 6), None),
])
def test_records_of_other_sizes_than_a_graph_says_are_refused_by_name(sizes, shape, wanted, pack_request, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("Abs", ["image"], ["y"])], [value_info("image", ["n", *sizes])],
                           [value_info("y", ["n", *sizes])]))
    request = repacked(pack_request, path, tmp_path, outputs=(),
                       inputs=(InputSpec("image", np.dtype("float32"), shape, shape),))
    if wanted is None:
        assert pack(request).is_file()
        return
    with pytest.raises(ArchiveError, match=wanted):
        pack(request)


def test_without_onnx_runtime_one_line_says_what_to_install(pack_request, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ArchiveError, match=r'pip install "batch-client\[onnx\]"'):
        pack(repacked(pack_request, onnx_file, tmp_path))


@given(st.binary(max_size=40))
def test_any_bytes_are_fields_or_a_value_error(content):
    try:
        fields = list(fields_of(memoryview(content)))
    except ValueError:
        return
    assert sum(1 if isinstance(value, int) else len(value) for _, value in fields) <= len(content)


@given(st.lists(st.tuples(st.integers(1, 2**20), st.integers(0, 2**60) | st.binary(max_size=9)), max_size=6))
def test_fields_there_and_back(fields):
    found = list(fields_of(memoryview(message(*fields))))
    assert [(number, value if isinstance(value, int) else bytes(value)) for number, value in found] == fields


# --- Compiled packages.


@pytest.fixture(scope="module")
def compiled(pack_request, arch_file, tmp_path_factory):
    """The tiny model as one that gives a dict, compiled once for this module: a compiler takes its time."""
    output = tmp_path_factory.mktemp("aot") / "aot.mar"
    return pack(dataclasses.replace(pack_request, arch=f"{arch_file}:make_named", runtime="aot", output=output))


def test_a_compiled_package_runs_like_the_module(compiled, tiny_scores, unpack, images):
    described = read_description(compiled)
    assert (described.runtime, described.weights.kind, described.weights.arch) == ("aot", "compiled", None)
    # What it was compiled from is inside it: no weights and no code of anybody's beside it.
    assert set(described.files) == {"model.pt2", "golden.npz"}
    directory = unpack(compiled)
    opened = Model.open(directory)
    assert opened.numerics["runtime"] == "aot"
    np.testing.assert_allclose(opened.score_bulk([images])[0], tiny_scores, atol=1e-5)
    for count in (1, 2, 5):
        np.testing.assert_allclose(online(opened, images[:count]), tiny_scores[:count], atol=1e-5)
    with pytest.raises(ModelLoadError, match="takes 8 records at a time"):
        Model.open(directory, Tuning(micro_batch=4))
    with pytest.raises(ModelLoadError, match="precision is bfloat16, which runtime aot does not offer"):
        Model.open(directory, Tuning(precision="bfloat16"))


def test_who_packs_for_a_runtime_that_may_lose_nan_is_told_so(compiled, tiny_module, unpack, tmp_path, capfd):
    record = ["--input", "image:uint8:6x6", "--model-shape", "1x6x6", "--micro-batch", "8",
              "-o", str(tmp_path / "x.mar")]
    assert main(["pack", str(unpack(compiled) / "model.pt2"), "--trust-pickle", *record]) == 0
    assert "note: compiled code may turn NaN into a number, which then has status 0\n" in capfd.readouterr().err
    torch.save(tiny_module, tmp_path / "tiny.pt")
    for runtime, noted in (("torchscript", True), ("eager", False)):
        assert main(["pack", str(tmp_path / "tiny.pt"), "--trust-pickle", *record, "--runtime", runtime]) == 0
        assert ("may turn NaN into 0" in capfd.readouterr().err) == noted


def test_a_foreign_package_is_native_code_and_says_for_what_it_was_compiled(compiled, pack_request, tmp_path, unpack):
    foreign = tmp_path / "foreign.pt2"
    foreign.write_bytes((unpack(compiled) / "model.pt2").read_bytes())
    assert detect_kind(foreign, trust_pickle=True) == "compiled"
    with pytest.raises(ArchiveError, match="is a compiled package, which is native code: pass --trust-pickle"):
        pack(repacked(pack_request, foreign, tmp_path, trust_pickle=False))
    packed = pack(repacked(pack_request, foreign, tmp_path))
    assert read_description(packed).runtime == "aot"
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(foreign) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("_metadata.json"):
                content = json.dumps({**json.loads(content), "AOTI_MACHINE": "riscv64"}).encode()
            target.writestr(name, content)
    with pytest.raises(ArchiveError, match=r"compiled for machine riscv64, this is .*: pack it again here"):
        pack(repacked(pack_request, other, tmp_path))


@pytest.mark.parametrize(("package", "cpu", "missing"), [
    ("AVX2", ["AVX2"], ""),
    ("AVX2", ["AVX512"], ""),
    ("AVX512", ["AVX2"], "AVX512"),
    ("AVX512 AVX512_VNNI", ["AVX512"], "AVX512_VNNI"),
    ("AVX512 AVX512_VNNI", ["AVX512", "AVX512_VNNI"], ""),
    ("AVX2", ["DEFAULT"], "AVX2"),
    ("AVX512 AMX_TILE", ["AVX2"], "AVX512 AMX_TILE"),
    ("AVX512 AVX512_VNNI AMX_TILE", ["AVX512", "AVX512_VNNI"], "AMX_TILE"),
    ("ASIMD", ["DEFAULT"], ""),
    ("", ["DEFAULT"], ""),
])
def test_instructions_that_a_cpu_lacks_are_named(package, cpu, missing):
    assert missing_instructions(package, cpu[0], frozenset(cpu[1:])) == missing


def test_without_a_compiler_one_line_says_so(pack_request, tmp_path):
    from torch._inductor import config

    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ArchiveError, match=r"needs a C\+\+ compiler and none was found"):
        pack(dataclasses.replace(pack_request, runtime="aot", output=tmp_path / "x.mar"))


def test_a_pt2_is_not_loaded_unless_somebody_vouches_for_it(tiny_module, pack_request, tmp_path):
    # torch.export.load falls back to pickle for the examples, for one.
    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

    path = exported(tiny_module, tmp_path, 5, dynamic=False)
    torch.save((Bomb(),), tmp_path / "bomb.pt")
    armed = tmp_path / "armed.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(armed, "w") as target:
        for name in source.namelist():
            bomb = name.endswith("/sample_inputs/model.pt")
            target.writestr(name, (tmp_path / "bomb.pt").read_bytes() if bomb else source.read(name))
    with pytest.raises(ModelFileError, match="pass --trust-pickle if you trust"):
        detect_kind(armed)
    with pytest.raises(ArchiveError, match="pass --trust-pickle if you trust"):
        pack(repacked(pack_request, armed, tmp_path, trust_pickle=False))
    assert not (tmp_path / "ran").exists()
    # The control: whoever vouches for it has it run.
    with pytest.raises(ArchiveError, match="can't be loaded as an exported program"):
        pack(repacked(pack_request, armed, tmp_path))
    assert (tmp_path / "ran").exists()


# --- Which runtime, which precision.


def test_one_table_says_what_runs_what_and_pack_offers_it():
    from batch_client.cli.pack import command

    offered = next(option.type.choices for option in command.params if option.name == "runtime")
    assert set(offered) == {runtime for kind in KINDS if kind != "none" for runtime in runtimes_for(kind)}


@pytest.mark.parametrize("runtime", ["onnx", "aot"])
def test_a_runtime_that_the_weights_cannot_run_under_is_refused(runtime, pack_request, tmp_path, tiny_module):
    path = tmp_path / "m.ts"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(tiny_module, torch.zeros(2, 1, 6, 6)), path)
    with pytest.raises(ArchiveError, match=rf"runtime is '{runtime}', wanted one of torchscript for weights of kind"):
        pack(dataclasses.replace(pack_request, model=path, arch=None, output=tmp_path / "x.mar", runtime=runtime))


def test_the_runtime_can_be_chosen_when_serving(tiny_dir, tiny, images):
    other = Model.open(tiny_dir, Tuning(runtime="torchscript"))
    assert other.numerics["runtime"] == "torchscript"
    assert other.metadata().platform == "pytorch_torchscript"
    assert other.digest == tiny.digest
    assert other.fingerprint != tiny.fingerprint
    np.testing.assert_allclose(other.score_bulk([images])[0], tiny.score_bulk([images])[0], atol=1e-5)
    with pytest.raises(ModelLoadError, match="runtime is 'onnx', wanted one of eager, torchscript"):
        Model.open(tiny_dir, Tuning(runtime="onnx"))


@pytest.mark.parametrize("runtime", ["eager", "torchscript"])
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), ("bfloat16", 5e-2), ("float16", 5e-3)])
def test_lower_precision_shows_how_far_its_scores_are(runtime, precision, most, tiny_dir, tiny, caplog, images):
    with caplog.at_level("INFO", "batch_handler.model"):
        opened = Model.open(tiny_dir, Tuning(runtime=runtime, precision=precision))
    shown = opened.metadata().parameters["golden_difference"]
    assert shown <= most
    # bfloat16 has 8 bits: a difference of nothing would say that it was not computed in it.
    assert (shown > 1e-5) == (precision != "float32")
    assert f"{precision} with {runtime} differ from the golden ones by at most {shown:.3g}" in caplog.text
    assert "golden_difference" not in opened.numerics
    assert (opened.fingerprint == tiny.fingerprint) == (precision == "float32" and runtime == "eager")
    np.testing.assert_allclose(opened.score_bulk([images])[0], tiny.score_bulk([images])[0], atol=most)


def test_precisions_that_an_engine_or_a_device_lacks_are_refused(pack_request, onnx_file, tmp_path, unpack, tiny_dir):
    directory = unpack(pack(repacked(pack_request, onnx_file, tmp_path)))
    with pytest.raises(ModelLoadError, match="precision is float16, which runtime onnx does not offer, wanted float32"):
        Model.open(directory, Tuning(precision="float16"))
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="precision is tf32, which is of CUDA GPUs"):
            Model.open(tiny_dir, Tuning(precision="tf32"))


def test_the_digest_is_that_of_the_description(compiled):
    described = read_description(compiled)
    assert digest_of(described.to_json()) == described.digest
    assert described.outputs[0].name == OutputDraft("scores").name
