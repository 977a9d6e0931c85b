"""One slow, moody model and one server that most fault tests share; sources and undisturbed runs, made when needed."""

import functools
from types import SimpleNamespace

import pytest

from support.cli import until
from support.faults import CONFIG, NETWORK, PACE, images_of, open_output, run, write_source
from support.served import OPEN, Served


@pytest.fixture(scope="session")
def make_moody(tmp_path_factory):
    """A function: seed of the weights → archive. Other weights are another model under the same name."""
    import safetensors.torch
    import torch

    from batch_handler.archive import PackRequest, pack
    from batch_handler.draft import OutputDraft
    from batch_handler.signature import InputSpec

    @functools.cache
    def make(seed):
        folder = tmp_path_factory.mktemp("moody")
        (folder / "network.py").write_text(NETWORK)
        scope = {}
        exec(NETWORK, scope)  # noqa: S102 - the text of support/faults.py
        torch.manual_seed(seed)
        safetensors.torch.save_file(scope["make_model"]().state_dict(), folder / "toy.safetensors")
        image = InputSpec.from_json({"name": "image", "dtype": "uint8", "shape": [12, 12], "model_shape": [1, 12, 12],
                                     "scale": "1/255"})
        return pack(PackRequest(
            model=folder / "toy.safetensors", output=folder / "toy.mar", name="toy", inputs=(image,),
            outputs=(OutputDraft("scores", softmax=True),), model_config=CONFIG, micro_batch=16,
            arch=f"{folder / 'network.py'}:make_model"))

    return make


@pytest.fixture(scope="session")
def moody_archive(make_moody):
    return make_moody(7)


@pytest.fixture(scope="session")
def shared_server(moody_archive, tmp_path_factory):
    with Served(moody_archive, tmp_path_factory.mktemp("served"), PACE, extra_properties=OPEN) as server:
        yield server


@pytest.fixture(scope="session")
def bodies_server(moody_archive, tmp_path_factory):
    """As the shared server, but its requests have their records in their bodies, as on another machine."""
    with Served(moody_archive, tmp_path_factory.mktemp("bodies"), PACE, shared_memory=False,
                extra_properties=OPEN) as server:
        yield server


@pytest.fixture
def moody_server(shared_server):
    """The shared server, recovered from what the test before did to its workers."""
    until(lambda: len(shared_server.workers()) == 2)
    return shared_server


@pytest.fixture(scope="session")
def sources(s3_environ):
    """A function: scale → URL of its source, all images fine."""

    @functools.cache
    def url_of(scale):
        url = f"s3://data/faults/{scale.name}.zarr"
        write_source(url, s3_environ, images_of(scale.records), scale.source_chunk)
        return url

    return url_of


@pytest.fixture(scope="session")
def undisturbed(sources, shared_server, s3_environ):
    """A function: scale → root and scores of a run that nobody disturbed."""

    @functools.cache
    def of(scale):
        output = f"s3://data/faults/{scale.name}-undisturbed"
        summary = run(sources(scale), output, scale, shared_server.flags, s3_environ)
        assert (summary["records"], summary["scored"], summary["failed"]) == (scale.records, scale.records, 0)
        return SimpleNamespace(root=summary["root"], output=output,
                               scores=open_output(output, s3_environ)["scores"][:])

    return of


@pytest.fixture
def output(request):
    """A place of this test's own."""
    return f"s3://data/faults/{request.node.name.replace('[', '-').rstrip(']')}"
