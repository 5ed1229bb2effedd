"""Random numbers that depend on names (seed, video, sample, stage) alone, never on batching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def make_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by non-negative integers, an independent stream for each key.

    But for zeros at the end: (0, 1) and (0, 1, 0) are one stream.
    """
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """For noise of training: `generator` on the CPU, elsewhere one of the device, seeded alike.

    Its numbers differ from one kind of device to another, and need no way there.
    """
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())


def randn(
    shape: Sequence[int], generator: Generators = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normals of `shape`, float32, on `device`.

    One generator makes the whole tensor; a sequence of them makes one row each (so that a row does
    not depend on its neighbours). Generators live on the CPU: the noise is the same on any device.
    """
    if generator is None:
        return torch.randn(*shape, device=device)
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    return torch.stack([torch.randn(*shape[1:], generator=row) for row in generator]).to(device)
