"""What a call and an update would cost on a GPU, counted without one.

The project's own code runs on fake tensors, which have shapes and no values, with the operators that it
uses on GPUs. Every operation of torch that passes counts as the kernels that CUDA launches for it, and a
kernel takes the longest of: its operations at the card's rate, its bytes at the card's bandwidth, a launch.
So it is a lower bound that assumes full caches of code, kernels without flaws and no waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.nn import norm_operators, update_ema
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.study.speed import aligned
from improved_diffusion.study.workload import Workload

HALF = (torch.bfloat16, torch.float16)
FREE = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "lift_fresh",
    "detach",
    "set_",
    "resize_",
    "_reshape_alias",
)
MANY_ELEMENTS = 320 * 65536  # of lists of tensors, in one launch


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet, and what large kernels reach of that."""

    name: str
    peak: dict[str, float]  # products and sums a second, of "half" precision, "tf32" and "fp32"
    rate: dict[str, float]  # likewise, as reached
    bandwidth: float  # bytes a second, as reached
    launch: float  # seconds

    def mfu(self, gflops: float, arithmetic: str) -> float:
        """Which share of the data sheet's products and sums so many GFLOP/s are."""
        return gflops * 1e9 / self.peak[arithmetic]


CARDS = (
    Card(
        "A100",
        peak={"half": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        rate={"half": 150e12, "tf32": 75e12, "fp32": 17e12},
        bandwidth=1.6e12,
        launch=6e-6,
    ),
    Card(
        "H100",
        peak={"half": 989e12, "tf32": 494e12, "fp32": 67e12},
        rate={"half": 450e12, "tf32": 200e12, "fp32": 40e12},
        bandwidth=3.0e12,
        launch=5e-6,
    ),
)


def card_of(device_name: str) -> Card | None:
    """The card that a GPU's name names, if it is known here."""
    return next((card for card in CARDS if card.name in device_name), None)


@dataclass(frozen=True)
class Kernel:
    """`launches` of one kind together. arithmetic: that of its flops, as in `Card.rate`."""

    op: str
    bytes: float
    flops: float = 0.0
    arithmetic: str = "fp32"
    launches: int = 1

    def seconds(self, card: Card) -> float:
        """The time of all launches."""
        work = self.flops / card.rate[self.arithmetic]
        return max(work, self.bytes / card.bandwidth, self.launches * card.launch)


def estimate(workload: Workload, what: str) -> list[Kernel]:
    """The kernels of a "forward" call, or of an update ("train") without reading items and logging."""
    single = arithmetic("fp32", what)
    model, diffusion = workload.build()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, norm_operators.assumed():
        _make_fake(model, fake)
        batch = FrameBatch.from_items(workload.items(), workload.device)
        t = torch.full((len(batch),), 500)
        if what == "forward":
            model.eval()
            with torch.no_grad(), _Kernels(single) as kernels, workload.autocast():
                model(batch.frames, t.float(), **batch.conditioning)
            return kernels.found
        denoiser = Denoiser(model, diffusion, autocast=workload.autocast)
        params = list(model.parameters())
        optimizer = _optimizer(params)
        average = {str(i): param.detach().clone() for i, param in enumerate(params)}
        with _Kernels(single) as kernels:
            noise = torch.randn_like(batch.frames)
            losses = denoiser.losses(batch, t, noise, mask=batch.latent_mask)
            losses["loss"].mean().backward()
            torch._foreach_norm([param.grad for param in params if param.grad is not None])
            optimizer.step()
            update_ema(average, params, 0.9999)
    return kernels.found


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(fake.from_tensor(param.detach()))


def _optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as on GPUs, with its averages there already."""
    optimizer = torch.optim.AdamW(params, fused=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class _Kernels(TorchDispatchMode):
    """Notes the kernels of every operation inside. single: the arithmetic of products in float32."""

    def __init__(self, single: str) -> None:
        super().__init__()
        self.single, self.found = single, list[Kernel]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace != "prim" and not func.is_view and not name.startswith(FREE):
            inputs = _tensors((args, kwargs))
            if inputs or name.startswith(("randn", "rand")):
                self.found += self._kernels(func, name, args, inputs, _tensors(out))
        return out

    def _kernels(
        self, func: Any, name: str, args: tuple[Any, ...], read: list[Tensor], made: list[Tensor]
    ) -> Iterator[Kernel]:
        if name == "convolution_backward":
            yield from self._convolution_backward(args, made)
            return
        flops = _flops(func, args, made)
        rate = "half" if read and read[0].dtype in HALF else self.single
        moved = _bytes(read) + _bytes(made)
        if name == "convolution":
            moved -= _bytes(_tensors(args[2]))
        elif func.namespace == "improved_diffusion":
            again = name != "normalise_again" and _reads_twice(name, args)
            moved += _bytes(args[: 1 + (name == "normalise_backward")]) if again else 0
        lists = name.startswith(("_foreach", "_fused"))
        launches = -(-sum(t.numel() for t in args[0]) // MANY_ELEMENTS) if lists else 1
        yield Kernel(name, moved, flops, rate, launches)
        if name == "convolution" and args[2] is not None:
            yield Kernel("bias of a convolution", 2 * _bytes(made))  # cuDNN's kernels add none

    def _convolution_backward(self, args: Sequence[Any], made: list[Tensor]) -> Iterator[Kernel]:
        grad, x, weight, (*_, wanted) = args[0], args[1], args[2], args
        transposed = args[7]
        flops = 2.0 * (x if transposed else grad).numel() * weight[0].numel()
        rate = "half" if grad.dtype in HALF else self.single
        for what, one in zip(("input", "weight"), wanted, strict=False):
            if one:
                moved = _bytes([grad, x, weight])
                yield Kernel(f"{what} of convolution_backward", moved, flops, rate)
        if wanted[2]:
            yield Kernel("bias of convolution_backward", _bytes([grad]))


def _flops(func: Any, args: tuple[Any, ...], made: list[Tensor]) -> float:
    """Products and sums; attention's backward pass makes its weights again, 5 products for 2."""
    name = func._schema.name
    if (
        "_scaled_dot_product_flash_attention_for_cpu" in name
    ):  # of fake tensors; not in torch's list
        q, k, v = args[1:4] if name.endswith("backward") else args[:3]
        products = (
            2.0 * q.numel() * k.shape[2]
            + 2.0 * q[..., 0].numel() * v.numel() / v[..., 0, 0].numel()
        )
        return products * (2.5 if name.endswith("backward") else 1)
    count = flop_registry.get(func.overloadpacket)
    return float(count(*args, out_val=made[0])) if count else 0.0


def _reads_twice(name: str, args: tuple[Any, ...]) -> bool:
    backward = name == "normalise_backward"
    x, group_size = (args[1], args[4]) if backward else (args[0], args[2])
    return norm_operators.reads(x, group_size, backward=backward) == 2


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> float:
    """Bytes that are stored: expanded axes count once."""
    total = 0.0
    for t in tensors:
        sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
        elements = t.element_size() if t.numel() else 0
        for n in sizes:
            elements *= n
        total += elements
    return total


# ---------------------------------------------------------------- the table


def format_estimates(workloads: Sequence[Workload]) -> str:
    """The table of all workloads: kernels, bytes and FLOPs; time and MFU on each card."""
    lines = [["size", "what", "precision", "kernels", "GB", "GFLOP"]]
    lines[0] += [f"{card.name} {column}" for card in CARDS for column in ("ms", "MFU")]
    for workload in workloads:
        size = f"{workload.name}, batch {workload.size.batch_size}"
        for what, words in (("forward", "forward"), ("train", "training step")):
            figures = _figures(estimate(workload, what), arithmetic(workload.precision, what))
            lines.append([size, words, workload.precision, *figures])
    return "\n".join([TITLE, *aligned(lines)])


TITLE = (
    "Counted, not measured: of each kernel the longest of FLOPs, bytes and launch, summed. MFU: FLOP/s as a "
    "share of the data sheet's"
)


def arithmetic(precision: str, what: str) -> str:
    """The `Card.rate` of products: TF32 is used in training, as by default, and float32 elsewhere."""
    return "half" if precision == "bf16" else "tf32" if what == "train" else "fp32"


def _figures(kernels: Sequence[Kernel], arithmetic: str) -> Iterator[str]:
    gflop = sum(kernel.flops for kernel in kernels) / 1e9
    yield str(sum(kernel.launches for kernel in kernels))
    yield f"{sum(kernel.bytes for kernel in kernels) / 1e9:.4g}"
    yield f"{gflop:.5g}"
    for card in CARDS:
        seconds = sum(kernel.seconds(card) for kernel in kernels)
        yield f"{1e3 * seconds:.4g}"
        yield f"{card.mfu(gflop / seconds, arithmetic):.2f}"
