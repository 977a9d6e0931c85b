"""Real parts that several test folders share; each is started once, ended by its own process id."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from batch_client.demo.objectstore import SeaweedServer
from support.cli import ServeProcess, run_cli

# A deadline for each example is a timed assertion: a busy machine breaks it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SEED = Path(__file__).parents[2] / "shared" / "seed"
# One worker is enough for what is right; how fast it is, benchmarks/ say.
NETWORK = '''
"""A small image model for tests: quick to load, with a convolution, so that its bits depend on how it is run."""

import torch


def make_model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 10))
'''
# clock_gettime of a process whose wall clock is an hour ahead.
SHIFTED = """
#define _GNU_SOURCE
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int r = syscall(SYS_clock_gettime, id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += 3600;
    return r;
}
"""


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory):
    """The place of all temporary folders, of every process: those of clients that are killed go with it at the end.

    In /tmp, since sockets below it want a short path.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folders, of the last three runs, are beside it as ever
    place = tempfile.TemporaryDirectory(prefix="bc-", dir="/tmp", ignore_cleanup_errors=True)
    with place as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(scope="session")
def seed_folder():
    if not (SEED / "fmnist.pyt").is_file():
        pytest.skip("the seed's model and images are not beside this checkout (../shared/seed)")
    return SEED


@pytest.fixture(scope="session")
def s3():
    with SeaweedServer() as server:
        server.create_bucket("data")
        yield server


@pytest.fixture(scope="session")
def clean_environ(temporary_folder):
    """The environment of a user who has set nothing: what tests add is all there is."""
    # PYTHONPATH says which checkout is tested.
    names = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in names if name in os.environ}


@pytest.fixture(scope="session")
def s3_environ(s3, clean_environ):
    return {**clean_environ, **s3.environ()}


@pytest.fixture(scope="session")
def toy_archive(tmp_path_factory, clean_environ):
    """The small image model, packed by the command that users type."""
    import safetensors.torch

    folder = tmp_path_factory.mktemp("toy")
    (folder / "network.py").write_text(NETWORK)
    scope = {}
    exec(NETWORK, scope)  # noqa: S102 - the text above
    safetensors.torch.save_file(scope["make_model"]().state_dict(), folder / "toy.safetensors")
    run_cli(["pack", "toy.safetensors", "--arch", "network.py:make_model", "--input", "image:uint8:12x12",
             "--model-shape", "1x12x12", "--scale", "1/255", "--softmax", "--micro-batch", "16", "-o", "toy.mar"],
            clean_environ, cwd=folder, check=True)
    return folder / "toy.mar"


@pytest.fixture(scope="session")
def toy_server(toy_archive, clean_environ, tmp_path_factory):
    """`batch-client serve` with the small model, as an operator starts it."""
    folder = tmp_path_factory.mktemp("served")
    with ServeProcess(toy_archive, folder, clean_environ, "--workers", "1x1") as server:
        yield server


@pytest.fixture(scope="session")
def toy_images():
    return np.random.default_rng(3).integers(0, 256, (1000, 12, 12), dtype=np.uint8)


@pytest.fixture(scope="session")
def an_hour_ahead(tmp_path_factory):
    """Variables for a process whose clock, and that of all it starts, is to be an hour ahead."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here to build a library that shifts a process's clock")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "shift.c").write_text(SHIFTED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "shift.so", folder / "shift.c"], check=True)
    return {"LD_PRELOAD": str(folder / "shift.so")}


@pytest.fixture(scope="session")
def undisturbed_run():
    """The root hash of a run of a `World` to which nothing happens, the I/O steps it takes, and its source."""
    from support.world import undisturbed

    return undisturbed()


@pytest.fixture(scope="session")
def root(undisturbed_run):
    return undisturbed_run[0]
