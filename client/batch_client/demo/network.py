"""The demo's model: two convolutions and two linear layers, for 28 by 28 grey images and ten classes.

Packed into the archive with `--arch network.py:make_model`, so it imports nothing but torch.
"""

from torch import nn


def make_model() -> nn.Module:
    """Untrained network: float32 (n, 1, 28, 28), 0 to 1 → scores before softmax, float32 (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(4608, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )
