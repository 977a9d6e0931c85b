"""A graph and an exported program through the real thing: packed on the command line, served, asked."""

import json
import os

import numpy as np
import torch

from support.cli import run_cli
from support.onnx_files import tiny_onnx


def test_a_graph_and_an_exported_program_are_served(tmp_path):
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
    for model, flags in (("graph.onnx", ()), ("program.pt2", ("--golden", "images.npy", "--trust-pickle"))):
        run_cli(["pack", model, "-o", "x.mar", *flags], dict(os.environ), cwd=tmp_path, check=True)
        asked = run_cli(["predict", "images.npy", "--archive", "x.mar", "--workers", "1"], dict(os.environ),
                        cwd=tmp_path, check=True)
        np.testing.assert_allclose(json.loads(asked.stdout)["predictions"], wanted, atol=1e-5)
