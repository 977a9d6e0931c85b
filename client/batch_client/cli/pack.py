"""`batch-client pack`: a trained model's file → an archive that TorchServe serves."""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batch_client.cli.options import keep_nearest
from batch_client.cli.verb import Verb
from batch_client.errors import BatchClientError, DataError, ServingError, StorageError, UsageError
from batch_client.files import require_writable
from batch_client.tuning import RUNTIMES, tunings_beside

if TYPE_CHECKING:
    from batch_handler.draft import SignatureDraft
    from batch_handler.signature import ModelDescription

FILE = click.Path(path_type=Path)
# What runtimes do that fuse a convolution with its ReLU.
LOSES_NAN = {
    "torchscript": "optimised TorchScript may turn NaN into 0, which then has status 0",
    "aot": "compiled code may turn NaN into a number, which then has status 0",
}
_NOTES = {
    "torchscript": [LOSES_NAN["torchscript"]],
    "aot": ["compiled for CPUs like this one, and for this version of torch", LOSES_NAN["aot"]],
}


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_SIGNATURE_FLAGS = ("input_text", "model_shape", "scale", "softmax", "output_name")  # what --signature is instead of


@click.command("pack", cls=Verb)
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The archive to write.  [default: NAME.mar]")
@click.option("--name", help="The model's name for servers and clients.  [default: the file's]")
@click.option("--version", help="The model's version.  [default: 1.0]")
@click.option("--arch", metavar="FILE.py:CALLABLE", help="What builds the module for weights, and for those only: "
              "FILE.py:callable is packed with them, module:callable must be installed where the model is served.")
@click.option("--trust-pickle", is_flag=True, help="Load MODEL though it is a pickle or .pt2, which can run any code.")
@click.option("--signature", type=FILE, help="TOML with [model], [[inputs]], [[outputs]], instead of the flags below.")
@click.option("--input", "input_text", multiple=True, metavar="NAME:DTYPE:SHAPE", help="A record as it travels, such "
              "as image:uint8:28x28.  [default: that of the golden records, or of an ONNX graph]")
@click.option("--model-shape", metavar="SHAPE", help="A record as the model takes it, such as 1x28x28.  "
              "[default: as it travels]")
@click.option("--scale", help="Multiply the input, such as 1/255, or 1: the model gets floats.")
@click.option("--output-name", help="The output's name, or the one to take where MODEL names several.  "
              "[default: scores]")
@click.option("--softmax", is_flag=True, help="Softmax over the output's last axis.")
@click.option("--golden", type=FILE, help="Sample records (.npy or .npz) that every worker must reproduce before it "
              "serves.  [default: a few random ones]")
@click.option("--runtime", type=click.Choice(RUNTIMES), help="How workers run it; "
              "torchscript traces, freezes and optimises the module at load, aot compiles it now and needs a C++ "
              "compiler, onnx exports it now.  [default: eager, or what the file is made for]")
@click.option("--micro-batch", type=click.IntRange(1), help="Records in one run of the model.  [default: 128, or what "
              "the file is made for]")
def command(model: Path, **options: Any) -> None:
    """Pack MODEL: .safetensors or other weights with --arch, .onnx, .pt2, TorchScript, or a pickled module."""
    # Said before what its records look like is asked; a name that is too long or out of reach is none either.
    if not os.path.isfile(model):  # noqa: PTH113 - which raises nothing
        raise DataError(f"{str(model)[:200]} is not a file")
    try:
        # Packing needs torch, which is slow to import and not part of the bare client.
        from batch_handler import archive
    except ImportError as error:
        raise ServingError(f'packing needs {error.name}: pip install "batch-client[serve]"') from error
    from batch_client.folders import temporary_folder
    from batch_client.resources import serve_config_dir
    from batch_handler.fields import SignatureError

    golden = options["golden"]
    if golden is not None and not os.path.isfile(golden):  # noqa: PTH113 - as above
        raise UsageError(f"--golden {str(golden)[:200]} is not a file")
    config = (serve_config_dir() / "model-config.yaml").read_bytes()
    try:
        draft = _draft(model, options)
        name = _name(model, options, draft)
        output = options["output"] or Path(f"{name}.mar")
        # Missing folders are made with it.
        require_writable(output, "-o", next(one for one in output.absolute().parents if os.access(one, os.F_OK)))
        request = archive.PackRequest(
            model=model,
            output=output,
            name=name,
            version=options["version"] or draft.version or "1.0",
            inputs=draft.inputs,
            outputs=draft.outputs,
            model_config=config,
            arch=options["arch"],
            runtime=options["runtime"],
            trust_pickle=options["trust_pickle"],
            micro_batch=options["micro_batch"] or draft.micro_batch,
            golden=options["golden"],
            tolerance=draft.tolerance,
        )
        held = None if options["output"] else _digest_in(output)
        with temporary_folder("pack") as scratch:
            path = archive.pack(replace(request, scratch=scratch))
        description = archive.read_description(path)
    except (SignatureError, archive.ArchiveError) as error:
        raise _as_ours(error, model) from error
    for note in _notes(path, description):
        click.echo(f"note: {note}", err=True)
    if held not in (None, description.digest):
        click.echo(f"note: {path} held another model, {held}: it is replaced", err=True)
    for spec in description.inputs:
        becomes = "" if spec.model_dtype == spec.dtype else f" (as {spec.model_dtype} in the model)"
        click.echo(f"takes {spec.name}: {spec.dtype} {spec.shape}{becomes}", err=True)
    for output in description.outputs:
        click.echo(f"gives {output.name}: {output.dtype} {output.shape}", err=True)
    click.echo(f"{path}  {description.name} {description.version}  {description.digest}")


def _as_ours(error: ValueError, model: Path) -> BatchClientError:
    """What packing says; a full disk is not the model's fault."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        return StorageError(f"packing {model}: no room for the archive, or for what it is made of in the temporary "
                            f"folder ({cause.strerror}): name another place with -o or TMPDIR")
    return DataError(str(error))


def _digest_in(path: Path) -> str | None:
    """Of the model in an archive; None where there is none."""
    from batch_handler.archive import ArchiveError, read_description

    try:
        return read_description(path).digest
    except ArchiveError:
        return None


def _notes(path: Path, description: ModelDescription) -> Iterator[str]:
    """What whoever packed this may not expect of it."""
    import numpy as np

    from batch_client.plan import MAX_REPLY_BYTES

    yield from _NOTES.get(description.runtime, ())
    record = sum(output.dtype.itemsize * math.prod(output.shape) for output in description.outputs)
    fitting = MAX_REPLY_BYTES // record
    if description.micro_batch > fitting:
        todo = f"runs need a --micro-batch of at most {fitting}" if fitting else "no run can carry those of one record"
        yield (f"the outputs of a micro-batch have {description.micro_batch * record:,} bytes and a reply at most "
               f"{MAX_REPLY_BYTES:,}: {todo}")
    if overruled := _overruled(path, description.micro_batch):
        yield overruled
    for spec in description.inputs:
        if spec.cast and spec.dtype == np.uint8 and not spec.scaled:
            yield (f"{spec.name}'s values 0 to 255 reach the model as they are: where it was trained on 0 to 1, pack "
                   "with --scale 1/255 (scale in a --signature file)")


def _overruled(archive: Path, micro_batch: int) -> str | None:
    """What the tuning files beside an archive make of its micro-batch, where that is another one."""
    others = [(path, tuning) for path, tuning in tunings_beside(archive) if tuning.micro_batch != micro_batch]
    if not others:
        return None
    said = ", ".join(f"{tuning.micro_batch} in {path.name}" for path, tuning in others)
    return (f"tuning files in {others[0][0].parent} win over the micro-batch of {micro_batch} that was packed: {said}; "
            f"delete them, or serve with BATCH_HANDLER_MICRO_BATCH={micro_batch}")


def _draft(model: Path, options: dict[str, Any]) -> SignatureDraft:
    from batch_handler.draft import OutputDraft, SignatureDraft, input_from_json, parse_signature
    from batch_handler.signature import SignatureError

    keep_nearest(options, ("signature",), _SIGNATURE_FLAGS)
    signature: Path | None = options["signature"]
    flags = [flag for flag in _SIGNATURE_FLAGS if options[flag]]
    if signature is not None:
        if flags:
            flag = flags[0].replace("_text", "").replace("_", "-")
            raise UsageError(f"--signature and --{flag}: wanted one or the other")
        try:
            draft = parse_signature(signature.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--signature {signature}: can't be read: {error}") from error
        if draft.inputs:
            return draft
        raise DataError(f"{signature}: has no [[inputs]]")
    options["input_text"] = _only_input(options["input_text"])
    output = OutputDraft(_output_name(options), softmax=options["softmax"])
    if model.suffix == ".onnx" and not any(options[flag] for flag in ("input_text", "golden", "model_shape", "scale")):
        return SignatureDraft(None, None, None, (), (output,))
    name, dtype, shape = _input_of(options)
    value = {"name": name, "dtype": dtype, "shape": shape, "scale": options["scale"],
             "model_shape": _shape_of("--model-shape", options["model_shape"]) if options["model_shape"] else None}
    try:
        spec = input_from_json(value)
    except SignatureError as error:
        record = f"--golden {options['golden']}" if options["input_text"] is None else "--input"
        given = [record, *(flag for flag in ("--model-shape", "--scale") if options[flag[2:].replace("-", "_")])]
        raise UsageError(f"{' with '.join(given)} can't be of a record: {error}") from error
    return SignatureDraft(None, None, None, (spec,), (output,))


def _only_input(texts: tuple[str, ...]) -> str | None:
    """The flag may be repeated so that one of several is not dropped, which click would do without a word."""
    if len(texts) > 1:
        raise UsageError(f"--input is given {len(texts)} times, wanted once: a model of several inputs needs "
                         "--signature FILE")
    return texts[0] if texts else None


def _output_name(options: dict[str, Any]) -> str:
    import numpy as np

    from batch_handler.signature import OutputSpec, SignatureError

    name: str = options["output_name"] or "scores"
    try:
        OutputSpec(name, np.dtype("float32"), ())
    except SignatureError as error:
        raise UsageError(f"--output-name: {error}") from error
    return name


def _name(model: Path, options: dict[str, Any], draft: SignatureDraft) -> str:
    """The model's name; raises UsageError for flags that can be no name or version."""
    from batch_handler.signature import SignatureError, check_name

    name: str = options["name"] or draft.name or model.stem
    try:
        check_name(options["name"] or "model", options["version"] or "1.0")
    except SignatureError as error:
        raise UsageError(f"--{error}") from error
    if not draft.name:
        try:
            check_name(name, "1.0")
        except SignatureError as error:
            raise UsageError(f"{model.name} gives the model no name: {error}; give one with --name") from error
    return name


def _input_of(options: dict[str, Any]) -> tuple[str, str, list[int]]:
    """Name, dtype and record shape of the input, from the flag or the golden records."""
    text: str | None = options["input_text"]
    if text is not None:
        if text.count(":") != 2:
            raise UsageError(f"--input {text!r}: wanted NAME:DTYPE:SHAPE, such as image:uint8:28x28, or x:float32: for "
                             "one number a record")
        name, dtype, shape = text.split(":")
        return name, dtype, _shape_of("--input", shape)
    golden: Path | None = options["golden"]
    if golden is None:
        raise UsageError("say what a record looks like: --input NAME:DTYPE:SHAPE, --signature FILE, or --golden FILE")
    import numpy as np

    try:
        array = np.load(golden, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # any damage: numpy's reader has no error of its own
        raise UsageError(f"--golden {golden}: can't be read as .npy: {str(error) or type(error).__name__}") from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"--golden {golden}: an .npz does not say which array is the input, add --input")
    return "input", array.dtype.name, list(array.shape[1:])


def _shape_of(flag: str, text: str) -> list[int]:
    sizes = text.lower().replace(",", "x").split("x") if text else []
    if not all(re.fullmatch(r"\s*\d{1,18}\s*", size) for size in sizes):
        raise UsageError(f"{flag} {text!r}: wanted a shape such as 1x28x28")
    return [int(size) for size in sizes]
