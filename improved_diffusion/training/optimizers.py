"""What turns gradients into updates. torch is imported by the functions that need it.

An optimiser (`--optimizer`) is a function (network, config) -> a torch.optim.Optimizer, or a class
made from its `Options` whose instances are such functions. The rate of each of its groups, at the
start, is the highest: warm-up and annealing scale it. Hyperparameters are always those of the
command; a resumed run takes nothing but the optimiser's state from its checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from improved_diffusion.config import option
from improved_diffusion.training.options import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# Parts of a parameter's name that mark what is no hidden layer: embeddings of timesteps and
# distances, and the networks of relative positions.
NOT_HIDDEN = ("embed", "rpe")


@dataclass(frozen=True)
class AdamWOptions:
    """Options of AdamW, alone or beside Muon."""

    adam_betas: str = option("0.9,0.999", "AdamW: decay rates of its two averages", nargs="+")

    def __post_init__(self) -> None:
        try:
            first, second = self.betas
            legal = 0 <= first < 1 and 0 <= second < 1
        except ValueError:
            legal = False
        if not legal:
            raise ValueError(f"--adam_betas {self.adam_betas}: must be two numbers in [0, 1)")

    @property
    def betas(self) -> tuple[float, float]:
        """The rates as numbers."""
        first, second = map(float, self.adam_betas.split(","))
        return first, second


class AdamW:
    """AdamW for all parameters. Source: Loshchilov & Hutter 2019 (arXiv 1711.05101)."""

    Options = AdamWOptions

    def __init__(self, options: AdamWOptions) -> None:
        self.options = options

    def __call__(self, network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        """The optimiser of all parameters of `network`."""
        return _adamw(list(network.parameters()), config, self.options)


def _adamw(
    params: Sequence[Tensor], config: TrainConfig, options: AdamWOptions
) -> torch.optim.Optimizer:
    import torch

    # One kernel where there is one; foreach on the CPU keeps the numbers of runs that began with it.
    kind = "fused" if params[0].is_cuda else "foreach"
    return torch.optim.AdamW(
        params,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=options.betas,
        **{kind: True},
    )


def can_skip(optimizer: torch.optim.Optimizer | OptimizerPair) -> bool:
    """Whether a step changes nothing where the optimiser's `found_inf`, on the device, is 1.

    It divides gradients by its `grad_scale` then, too. torch's fused optimisers do, for GradScaler.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class Muon:
    """Muon for the matrices and convolutions of hidden layers, AdamW for everything else.

    Momentum 0.95 with Nesterov, five Newton-Schulz steps, updates scaled by sqrt(max(1, rows /
    columns)). Convolutions count as matrices [out, in * height * width]. AdamW has the first and
    the last convolution, embeddings, relative-position networks (see NOT_HIDDEN), norms and biases.
    torch.optim.Muon on GPUs, in bfloat16; see muon_float32 for processors.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    @dataclass(frozen=True)
    class Options(AdamWOptions):
        """The rate of Muon's part, beside the options of AdamW's."""

        muon_lr: float = option(0.02, "muon: its own learning rate; --lr is that of AdamW's part")

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.muon_lr >= 0:
                raise ValueError(f"--muon_lr {self.muon_lr}: must not be negative")

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, network: nn.Module, config: TrainConfig) -> OptimizerPair:
        """The optimisers of all parameters of `network`. Raises ValueError below torch 2.9."""
        import torch

        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}: "
                "update torch or use --optimizer adamw"
            )
        hidden = hidden_matrices(network)
        kept = {id(param) for param in hidden}
        rest = [param for param in network.parameters() if id(param) not in kept]
        matrices = [as_matrix(param) for param in hidden]
        muon = _muon_class(matrices[0].device)(
            matrices,
            lr=self.options.muon_lr,
            weight_decay=config.weight_decay,
            momentum=0.95,
            nesterov=True,
            ns_steps=5,
        )
        return OptimizerPair(muon, _adamw(rest, config, self.options), hidden, matrices)


def _muon_class(device: torch.device) -> type[torch.optim.Muon]:
    """torch's own on GPUs; on processors the one that does without bfloat16."""
    import torch

    if device.type != "cpu":
        return torch.optim.Muon
    from improved_diffusion.training.muon_float32 import Float32Muon

    return Float32Muon


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon updates, in the network's order; see `Muon`.

    Raises ValueError where there is none.
    """
    from torch import nn

    convolutions = [m for m in network.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    ends = {id(module.weight) for module in (convolutions[:1] + convolutions[-1:])}
    hidden = [
        param
        for name, param in network.named_parameters()
        if param.ndim > 1 and id(param) not in ends and not any(word in name for word in NOT_HIDDEN)
    ]
    if not hidden:
        raise ValueError("--optimizer muon: the network has no hidden matrix: use adamw")
    return hidden


def as_matrix(param: Tensor) -> Tensor:
    """A parameter [out, ...] as a matrix [out, columns] in the same memory, without gradient.

    Its columns come in the order of that memory: channels last, say. A permutation of columns
    passes through Muon's update unchanged.
    """
    return param.detach().permute(0, *_memory_order(param)).view(len(param), -1)


def _memory_order(param: Tensor) -> list[int]:
    """The axes of a parameter but the first, outermost in memory first."""
    return sorted(range(1, param.ndim), key=param.stride, reverse=True)


def _gradient_matrix(param: Tensor) -> Tensor | None:
    """The gradient in the shape of `as_matrix`, copied where its memory has another order."""
    if param.grad is None:
        return None
    return param.grad.permute(0, *_memory_order(param)).reshape(len(param), -1)


class OptimizerPair:
    """Muon for some parameters and AdamW for the others, used as one torch.optim.Optimizer.

    Args:
        muon: of `matrices`.
        adamw: of the other parameters.
        params: what Muon updates.
        matrices: the same memory as matrices.
    """

    def __init__(
        self,
        muon: torch.optim.Optimizer,
        adamw: torch.optim.Optimizer,
        params: Sequence[nn.Parameter],
        matrices: Sequence[Tensor],
    ) -> None:
        self._parts = {"muon": muon, "adamw": adamw}
        self._params, self._matrices = params, matrices

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both: AdamW's first, whose rate is --lr."""
        return self._parts["adamw"].param_groups + self._parts["muon"].param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """What both remember of each parameter, or of its matrix."""
        return dict(itertools.chain(*(part.state.items() for part in self._parts.values())))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        self._parts["adamw"].zero_grad(set_to_none)
        for param in self._params:
            param.grad = None

    def step(self) -> None:
        """One step of both."""
        for param, matrix in self._pairs():
            matrix.grad = _gradient_matrix(param)
        for part in self._parts.values():
            part.step()
        for _, matrix in self._pairs():
            matrix.grad = None

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return zip(self._params, self._matrices, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Both states by name."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s result."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
