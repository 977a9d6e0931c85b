"""`batch-client show`: a picture of some records with what the model said; with labels, how many are right."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import click

from batch_client.cli.verb import Verb
from batch_client.errors import StorageError, UsageError
from batch_client.files import require_writable
from batch_client.urls import split_url

__all__ = ["command"]


@click.command("show", cls=Verb)
@click.argument("output_url", metavar="OUTPUT")
@click.option("--labels", metavar="FILE.npy", help="The true classes (a .npy file or a Zarr array, path or URL): one "
              "for each record of the source, of the output, or of the range.")
@click.option("--records", metavar="A:B", help="Only records A to B-1, counted as in the source.")
@click.option("--source", metavar="URL", help="Where the scored array is now.  [default: where the run read it]")
@click.option("--anonymous", is_flag=True, help="Use storage without credentials: public buckets.")
@click.option("-o", "--output", "picture", metavar="FILE.png", type=click.Path(dir_okay=False, path_type=Path),
              help="The picture.  [default: the output's name with .png]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(output_url: str, *, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Draw records of a published OUTPUT with their predictions: some evenly spaced, and the most doubtful ones.

    With --labels the wrong ones are marked and the accuracy is printed. Of several outputs the first with classes is
    shown.
    """
    from batch_client.eventloop import run_verb

    labels = options["labels"] or ""
    if os.path.isfile(labels) and not labels.endswith(".npy"):  # noqa: PTH113 - which raises nothing for what is no path
        raise UsageError(f"--labels {labels}: this is a file of another kind; wanted a .npy file or a Zarr array")
    path = picture or Path((_place(output_url).stem or "output") + ".png")  # a bucket's root has no name
    if path.suffix.lower() != ".png":
        raise UsageError(f"-o {path}: the picture is a PNG: wanted a name that ends with .png")
    require_writable(path, "-o")
    png, figures, sentence = run_verb(_show(output_url, **options))
    try:
        path.write_bytes(png)
    except OSError as error:
        raise StorageError(f"{path}: the picture can't be written: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps({**figures, "picture": str(path)}))
        return
    click.echo(sentence)
    click.echo(f"picture: {path}")


def _place(url: str) -> PurePosixPath:
    """The path of a URL, or the path that it is: there a '#' or a '?' is a part of a name."""
    return PurePosixPath(split_url(url).path if "://" in url else url)


async def _show(output_url: str, **options: Any) -> tuple[bytes, dict[str, Any], str]:
    """The picture, its figures, and the same in words."""
    from batch_client.gallery import open_gallery
    from batch_client.picture import draw

    gallery = await open_gallery(output_url, **options)
    sentence = _sentence(gallery.figures)
    if not gallery.alone:
        sentence = f"{gallery.figures['array']}: {sentence}"
    return draw(f"{_place(output_url).name}: {sentence}", gallery.panels), gallery.figures, sentence


def _sentence(figures: dict[str, Any]) -> str:
    from batch_client.figures import counted, percent

    text = counted(figures["records"], "record")
    if figures["right"] is not None:
        text = f"{figures['right']:,} of {text} right, {percent(figures['accuracy'])}"
    if figures["without_score"]:
        text += f", {figures['without_score']:,} without a score"
    if figures["labels_of_no_class"]:
        text += (f"; {counted(figures['labels_of_no_class'], 'label')} of no class: wanted 0 to "
                 f"{figures['classes'] - 1:,}")
    return text
