"""A graph through the real thing: packed on the command line, served, asked. And an exported program beside it."""

import json
import os
import zipfile

import numpy as np
import torch

from batch_client.cli import main
from batch_handler.model import Model
from support.cli import run_cli
from support.onnx_files import tiny_onnx


def test_a_graph_is_served_and_an_exported_program_scores_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    ).eval()
    images = np.random.default_rng(3).random((5, 1, 6, 6)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    with torch.inference_mode():
        wanted = module(torch.from_numpy(images)).numpy()
    (tmp_path / "graph.onnx").write_bytes(tiny_onnx(module))
    torch.export.save(torch.export.export(module, (torch.zeros(4, 1, 6, 6),)), tmp_path / "program.pt2")
    for words in (["graph.onnx"], ["program.pt2", "--golden", "images.npy", "--trust-pickle"]):
        assert main(["pack", *words]) == 0
    asked = run_cli(["predict", "images.npy", "--archive", "graph.mar", "--workers", "1"], dict(os.environ), check=True)
    np.testing.assert_allclose(json.loads(asked.stdout)["predictions"], wanted, atol=1e-5)
    # TorchServe knows nothing of kinds of weights: what has been served once need not be for each.
    with zipfile.ZipFile("program.mar") as archive:
        archive.extractall("program")
    np.testing.assert_allclose(Model.open(tmp_path / "program").score_bulk([images])[0], wanted, atol=1e-5)
