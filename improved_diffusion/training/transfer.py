"""Ways between the CPU and a GPU on which neither waits for the other; on the CPU plain copies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def _is_there(device: torch.device) -> bool:
    """Whether it is a GPU, and not one of the fake tensors that tests compute on."""
    return device.type == "cuda" and torch.cuda.is_available()


def send(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, behind all that the device is to do already.

    From pageable memory a copy would wait for the device to get there.
    """
    if _is_there(device):
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class SideCopy:
    """Copies batches to a GPU while it still computes on others.

    Batches come in pinned memory. Who asks for one while the update before is under way finds it
    copied by the time that update ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if _is_there(device) else None

    def __call__(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The items on the device."""
        if self._stream is None:
            return {key: value.to(self.device) for key, value in items.items()}
        with torch.cuda.stream(self._stream):
            copies = {k: value.to(self.device, non_blocking=True) for k, value in items.items()}
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        for value in copies.values():
            value.record_stream(computing)  # its memory is not the side stream's to use again
        return copies


class Readback:
    """Numbers on their way from the device: asked for now, read later.

    values: a tensor [n], which must not change after.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            pinned = _is_there(values.device)
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
            self._values.copy_(values, non_blocking=True)
            if pinned:
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def read(self) -> list[float]:
        """The numbers; waits until the device has made them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
