"""Muon for processors: torch.optim.Muon with its matrix products in float32, of many matrices at once.

torch's own multiplies in bfloat16, one matrix after another. Most processors have no such arithmetic and
emulate it: the step took twice as long as all the rest of an update of a small network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """The same updates and the same state as torch.optim.Muon, up to bfloat16's rounding.

    With Nesterov's momentum and updates scaled by sqrt(max(1, rows / columns)), torch's "original".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "losses are computed once"
        for group in self.param_groups:
            for params in self._of_one_shape(group["params"]):
                directions = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                updates = orthogonalised(directions, group["ns_coefficients"], group["ns_steps"])
                rows, columns = params[0].shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)

    @staticmethod
    def _of_one_shape(params: list[Tensor]) -> Iterator[list[Tensor]]:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for param in params:
            if param.grad is not None:
                shapes.setdefault(param.shape, []).append(param)
        yield from shapes.values()

    def _momentum(self, param: Tensor, rate: float) -> Tensor:
        """The direction to go in, before it is made orthogonal; the average is kept in the state."""
        state: dict[str, Any] = self.state[param]
        assert param.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        average = state["momentum_buffer"].lerp_(param.grad, 1 - rate)
        return param.grad.lerp(average, rate)


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], num_steps: int
) -> Tensor:
    """Matrices [N, rows, columns] with the same singular vectors and singular values near 1.

    Source: the quintic Newton-Schulz iteration of Jordan et al. 2024, "Muon: An optimizer for hidden
    layers in neural networks": X <- a X + (b A + c A^2) X with A = X X^T.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
