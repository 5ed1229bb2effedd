"""The I3D network (Inception v1 inflated to 3-D) as TensorFlow computes it, in PyTorch.

Source: Carreira and Zisserman 2017 (arXiv 1705.07750). Batch normalisation is folded into the
convolutions. Module names are those of the released weights with "/" read as ".".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 400

# Name, input channels and the channels of the convolutions 0, 1a, 1b, 2a, 2b, 3 (paper, Fig. 3).
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """(before, after) of TensorFlow's SAME padding: the odd one comes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def in_time_slices(
    layer: Callable[[Tensor], Tensor], x: Tensor, kernel: int, stride: int, frames: int
) -> Tensor:
    """`layer` over [B, C, T, H, W] with SAME padding in time, `frames` output frames at once.

    `layer` must not pad time itself, and only its first operation may mix frames (with `kernel`
    and `stride`): then every slice is what the whole would give there, for less memory.
    """
    size = x.shape[2]
    before, _ = same_padding(size, kernel, stride)
    size_out = -(-size // stride)
    outputs = []
    for first in range(0, size_out, frames):
        last = min(first + frames, size_out) - 1
        start, stop = first * stride - before, last * stride - before + kernel
        piece = x[:, :, max(start, 0) : min(stop, size)]
        outputs.append(layer(F.pad(piece, (0, 0, 0, 0, max(-start, 0), max(stop - size, 0)))))
    return torch.cat(outputs, dim=2)


class Conv(nn.Conv3d):
    """A convolution of stride 1 and SAME padding, then ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class Mixed(nn.Module):
    """An Inception block: four branches, concatenated."""

    def __init__(self, channels_in: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        out_0, mid_1, out_1, mid_2, out_2, out_3 = channels
        self.Branch_0 = nn.ModuleDict({"Conv3d_0a_1x1": Conv(channels_in, out_0, 1)})
        self.Branch_1 = nn.ModuleDict(
            {"Conv3d_0a_1x1": Conv(channels_in, mid_1, 1), "Conv3d_0b_3x3": Conv(mid_1, out_1, 3)}
        )
        self.Branch_2 = nn.ModuleDict(
            {"Conv3d_0a_1x1": Conv(channels_in, mid_2, 1), "Conv3d_0b_3x3": Conv(mid_2, out_2, 3)}
        )
        self.Branch_3 = nn.ModuleDict({"Conv3d_0b_1x1": Conv(channels_in, out_3, 1)})

    def forward(self, x: Tensor) -> Tensor:
        outputs = [_chain(b, x) for b in (self.Branch_0, self.Branch_1, self.Branch_2)]
        outputs.append(_chain(self.Branch_3, F.max_pool3d(x, 3, stride=1, padding=1)))
        return torch.cat(outputs, dim=1)


def _chain(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    for layer in layers.values():
        x = layer(x)
    return x


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Max pooling with SAME padding of x >= 0, where zeros stand for "nothing"."""
    padding: list[int] = []
    for dim in (2, 1, 0):
        padding += same_padding(x.shape[2 + dim], kernel[dim], stride[dim])
    return F.max_pool3d(F.pad(x, padding), kernel, stride)


class I3D(nn.Module):
    """RGB I3D with the 400 classes of Kinetics."""

    def __init__(self, slice_frames: int = 16) -> None:
        """`slice_frames`: frames of the two big first stages that are held at once."""
        super().__init__()
        self.slice_frames = slice_frames
        self.Conv3d_1a_7x7 = nn.Conv3d(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Conv(64, 64, 1)
        self.Conv3d_2c_3x3 = nn.Conv3d(64, 192, 3, padding=(0, 1, 1))
        for name, (channels_in, channels) in MIXED.items():
            self.add_module(name, Mixed(channels_in, channels))
        self.Logits = nn.ModuleDict({"Conv3d_0c_1x1": nn.Conv3d(1024, NUM_CLASSES, 1)})

    def _stage_1(self, x: Tensor) -> Tensor:
        """Time unpadded; 224x224 -> 56x56."""
        before, after = same_padding(x.shape[-1], 7, 2)
        x = F.relu_(self.Conv3d_1a_7x7(F.pad(x, (before, after, before, after))))
        return self.Conv3d_2b_1x1(_max_pool(x, (1, 3, 3), (1, 2, 2)))

    def _stage_2(self, x: Tensor) -> Tensor:
        """Time unpadded; 56x56 -> 28x28."""
        return _max_pool(F.relu_(self.Conv3d_2c_3x3(x)), (1, 3, 3), (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, T, 224, 224] float in [-1, 1], T >= 9 -> [B, 400] logits, averaged over time."""
        x = in_time_slices(self._stage_1, x, 7, 2, self.slice_frames)
        x = in_time_slices(self._stage_2, x, 3, 1, self.slice_frames)
        for name in MIXED:
            if name == "Mixed_4b":
                x = _max_pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = _max_pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        x = self.Logits["Conv3d_0c_1x1"](F.avg_pool3d(x, (2, 7, 7), stride=1))
        return x.mean(dim=(2, 3, 4))
