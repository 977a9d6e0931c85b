"""`python -m batch_client.demo`: the whole product on this machine, from pixels in S3 to predictions in S3.

It prepares what a user has already (an array in a bucket, a trained model) and then runs the commands that a user
types, echoing each. A second run reuses the array and the trained weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np

from batch_client.demo import digits, objectstore
from batch_client.errors import BatchClientError, ServingError, StoppedError

__all__ = ["main"]

BUCKET = "demo"
SOURCE = f"s3://{BUCKET}/digits.zarr"
CHUNK_RECORDS = 100
SIGNATURE = """\
[model]
name = "digits"
version = "1.0"
micro_batch = 128

[[inputs]]
name = "image"
dtype = "uint8"
shape = [28, 28]
model_shape = [1, 28, 28]
scale = 0.00392156862745098  # 1/255

[[outputs]]
name = "scores"
softmax = true
"""


@click.command()
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), default=Path(".demo"),
              show_default=True, help="Where everything goes; remove it to start afresh.")
@click.option("--serve", is_flag=True, help="Only start the S3 server of an earlier run, to look into its bucket.")
def demo(directory: Path, *, serve: bool) -> None:
    """Score 5,000 handwritten digits from S3 to S3, and draw how right the model is."""
    directory = directory.absolute()
    begun = time.monotonic()
    _say("an S3 server of its own, SeaweedFS on loopback")
    with objectstore.SeaweedServer(directory / "s3") as server:
        click.echo(f"  {server.endpoint_url}, bucket {BUCKET}, data in {directory / 's3'}")
        server.create_bucket(BUCKET)
        if serve:
            _look(server)
            return
        data = digits.load()
        _say(f"{len(data.labels):,} digits in {SOURCE}")
        write_source(server, data)
        _say("a small network, trained on 4,000 of them")
        write_model(directory, data)
        output = score(directory, server)
    click.echo(f"\nOutput   {output}, in the bucket under {directory / 's3'}")
    click.echo(f"Picture  {directory / 'digits.png'}")
    click.echo(f"Look     {sys.executable} -m batch_client.demo --dir {directory} --serve")
    click.echo("         starts the S3 server again and prints how to reach it")
    click.echo(f"Time     {time.monotonic() - begun:.0f} s")


def write_source(server: objectstore.SeaweedServer, data: digits.Digits) -> None:
    """Write the images as a Zarr v3 array, unless this very array is there already."""
    import zarr  # noqa: PLC0415 - keeps --help quick
    from zarr.storage import ObjectStore  # noqa: PLC0415 - keeps --help quick

    store = ObjectStore(server.store(BUCKET, prefix="digits.zarr"))
    digest = hashlib.sha256(data.images.tobytes()).hexdigest()
    try:
        if zarr.open_array(store, mode="r").attrs.get("sha256") == digest:
            click.echo("  there already")
            return
    except FileNotFoundError:
        pass
    array = zarr.create_array(store, shape=data.images.shape, chunks=(CHUNK_RECORDS, 28, 28), dtype=data.images.dtype,
                              dimension_names=("record", "y", "x"), overwrite=True)
    array[:] = data.images
    # Last, so that an array cut short by a kill is written again.
    array.attrs["sha256"] = digest
    click.echo(f"  {data.images.shape} {data.images.dtype} in chunks of {CHUNK_RECORDS}")


def write_model(directory: Path, data: digits.Digits) -> None:
    """Write all that `pack` and `show` take: weights, the file that builds the network, signature, samples, labels."""
    here = Path(__file__).parent
    shutil.copyfile(here / "network.py", directory / "network.py")
    (directory / "digits.toml").write_text(SIGNATURE)
    np.save(directory / "labels.npy", data.labels)
    np.save(directory / "golden.npy", data[digits.HELD_BACK].images[:4])
    made_from = hashlib.sha256(data.images.tobytes() + data.labels.tobytes())
    for name in ("network.py", "train.py", "digits.py"):
        made_from.update((here / name).read_bytes())
    made_from.update(version("torch").encode())
    weights, receipt = directory / "weights.safetensors", directory / "weights.made-from"
    if weights.exists() and receipt.exists() and receipt.read_text() == made_from.hexdigest():
        click.echo("  there already")
        return
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "batch_client.demo.train", str(weights)],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, check=True)
    receipt.write_text(made_from.hexdigest())
    click.echo(f"  trained in {time.monotonic() - begun:.0f} s")


def score(directory: Path, server: objectstore.SeaweedServer) -> str:
    """The three commands of the product; returns the output's URL."""
    environ = server.environ()
    output = f"s3://{BUCKET}/{_fresh_name(server)}"
    held_back = f"{digits.HELD_BACK.start}:{digits.HELD_BACK.stop}"
    _say("an archive of the model")
    _run(directory, environ, "pack weights.safetensors --arch network.py:make_model --signature digits.toml "
                             "--golden golden.npy -o digits.mar")
    _say("every record scored")
    _run(directory, environ, f"run {SOURCE} {output} --archive digits.mar")
    _say("how right it is on the digits that training did not see")
    _run(directory, environ, f"show {output} --labels labels.npy --records {held_back} -o digits.png")
    return output


def _run(directory: Path, environ: Mapping[str, str], command: str) -> None:
    click.secho(f"$ batch-client {command}", bold=True)
    done = subprocess.run(
        [sys.executable, "-m", "batch_client", *shlex.split(command)],
        cwd=directory, env=_environment(environ), check=False)
    if done.returncode:
        verb = command.partition(" ")[0]
        error = ServingError(f"batch-client {verb} ended with exit code {done.returncode}; see above")
        error.exit_code = done.returncode
        raise error


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment with this bucket's credentials instead of theirs, and without their settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BATCH_CLIENT_"))}
    if "PYTHONPATH" in kept:  # the commands run in another folder
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in kept["PYTHONPATH"].split(os.pathsep))  # noqa: PTH100 - resolves no links
    return {**kept, **environ}


def _fresh_name(server: objectstore.SeaweedServer) -> str:
    """`scores-<n>.zarr` with the next number: a published output is never changed."""
    listed = server.store(BUCKET).list_with_delimiter()["common_prefixes"]
    taken = [int(found[1]) for prefix in listed if (found := re.fullmatch(r"scores-(\d+)\.zarr/?", prefix))]
    return f"scores-{max(taken, default=0) + 1}.zarr"


def _look(server: objectstore.SeaweedServer) -> None:
    click.echo("\nIn another terminal:\n")
    for name, value in server.environ().items():
        click.echo(f"export {name}={value}")
    click.echo(f"""
aws s3 ls s3://{BUCKET}/
python -c 'from obstore.store import S3Store as S; print(*S("{BUCKET}").list_with_delimiter()["common_prefixes"])'
batch-client show s3://{BUCKET}/scores-1.zarr

Ctrl-C stops the server; its data stays.""")
    threading.Event().wait()


def _say(text: str) -> None:
    click.secho(f"\n— {text}", fg="blue", bold=True)


def main(argv: Sequence[str]) -> int:
    """Run the demo and return its exit code."""
    try:
        demo.main(list(argv), prog_name="python -m batch_client.demo", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        return StoppedError.exit_code
    except BatchClientError as error:
        click.echo(f"demo: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
