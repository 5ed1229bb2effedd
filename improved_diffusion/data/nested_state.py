"""The tensors of a nested state: what checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def snapshot(value: Any) -> Any:
    """A copy of a nested state, which stays as it is now: every tensor contiguous on the CPU."""
    import torch

    def copy(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())

    return _with_tensors(value, copy)


def portable(value: Any) -> Any:
    """The same without gradients on the CPU, copied only where it is not: as files hold it."""
    return _with_tensors(value, lambda tensor: tensor.detach().cpu().contiguous())


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_tensors(item, change) for item in value]
    return value
