"""Network calls that a GPU replays from a recording, without being told of every kernel again.

A call of one video is hundreds of kernels of a few microseconds each: the time in which one is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Recording(NamedTuple):
    inputs: dict[str, Tensor]  # where the recorded kernels read
    output: Tensor  # where they write
    replay: Callable[[], None]


class ReplayedNetwork(nn.Module):
    """`network`, called as it is; without gradients its calls are recorded once for each shape.

    The network must be on a CUDA GPU, and its weights must stay where they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._recordings: dict[Hashable, _Recording] = {}

    def forward(self, x: Tensor, timesteps: Tensor, **conditioning: Tensor) -> Tensor:
        """As the network's."""
        if torch.is_grad_enabled():
            return self.network(x, timesteps, **conditioning)
        inputs = {"x": x, "timesteps": timesteps, **conditioning}
        arithmetic = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        shapes = tuple((name, t.shape, t.dtype) for name, t in inputs.items())
        key = (arithmetic, shapes)
        with torch.inference_mode():
            if key not in self._recordings:
                self._recordings[key] = self._record(inputs, *arithmetic)
            recording = self._recordings[key]
            for name, held in recording.inputs.items():
                held.copy_(inputs[name])
            recording.replay()
            return recording.output.clone()

    def _record(self, inputs: Mapping[str, Tensor], half: bool, dtype: torch.dtype) -> _Recording:
        held = {name: t.contiguous().clone() for name, t in inputs.items()}

        def call() -> Tensor:
            # Autocast's own copies of the weights end with its context, which a recording outlives.
            with torch.autocast("cuda", dtype, enabled=half, cache_enabled=False):
                out: Tensor = self.network(**held)
            return out

        return _Recording(held, *record(call))


def record(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """The place of the result of `call`, and a function that computes it there anew."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):  # kernels are compiled and chosen before the recording
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return out, graph.replay
