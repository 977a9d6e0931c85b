"""A network of ResNet-50's size, untrained, for `end_to_end.py --heavy`: 25.6 million weights, 1 GMAC at 112 x 112.

Packed into the archive with `--arch resnet.py:make_model`, so it imports nothing but torch. Layout of He et al. 2015
(https://arxiv.org/abs/1512.03385), table 1, stride in the 3 x 3 convolution.
"""

import torch
from torch import nn

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # width, blocks, stride of the first
EXPANSION = 4


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, and the shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION
        self.residual = nn.Sequential(
            *_convolution(channels, width, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, out, 1))
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(channels, out, 1, stride))

    def forward(self, records: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.residual(records) + self.shortcut(records))


def make_model() -> nn.Module:
    """Untrained network: float32 (n, 3, 112, 112), 0 to 1 → scores before softmax, float32 (n, 1000)."""
    parts: list[nn.Module] = [*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, blocks, stride in STAGES:
        for block in range(blocks):
            parts.append(Bottleneck(channels, width, 1 if block else stride))
            channels = width * EXPANSION
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)
