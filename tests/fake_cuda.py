"""A GPU that computes nothing: tensors that say they are on "cuda", where there is none.

Shapes, dtypes, devices, autocast and the branches for GPUs are those of a GPU. torch's own engine refuses to
go backward through such tensors without a driver, so `backward` does.
"""

import contextlib
import heapq
import itertools

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction

from improved_diffusion.nn import norm_operators
from improved_diffusion.sampling.trained_model import create_model


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    """Inside, tensors made on "cuda" are fake, and autocast works for them."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    monkeypatch.setattr(norm_operators, "_can_run", lambda device: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def make_network(config, mode):
    """The network with fake parameters on "cuda", in their own memory layout."""
    with unset_fake_temporarily():
        network = create_model(config)
    for module in network.modules():
        for name, param in module._parameters.items():
            if param is not None:
                fake = mode.from_tensor(param.detach()).to("cuda")
                assert fake.stride() == param.stride()
                module._parameters[name] = nn.Parameter(fake)
    return network


def backward(loss):
    """`loss.backward()`, the latest operation first: all that a gradient is summed from has come by then."""
    ticks, gradients = itertools.count(), {}
    queue = []

    def add(node, number, gradient):
        if node not in gradients:
            gradients[node] = [None] * len(node._input_metadata)
            heapq.heappush(queue, (-node._sequence_nr(), next(ticks), node))
        there = gradients[node][number]
        gradients[node][number] = gradient if there is None else there + gradient

    add(loss.grad_fn, 0, torch.ones_like(loss))
    with torch.no_grad():
        while queue:
            node = heapq.heappop(queue)[2]
            inputs = gradients.pop(node)
            if hasattr(node, "variable"):
                accumulate(node.variable, inputs[0])
                continue
            outputs = node.apply(*inputs) if isinstance(node, BackwardCFunction) else node(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for (following, number), gradient in zip(node.next_functions, outputs, strict=False):
                if following is not None and gradient is not None:
                    shape = following._input_metadata[number].shape
                    add(following, number, gradient.sum_to_size(tuple(shape)))


def accumulate(parameter, gradient):
    """As the engine: refused unless it fits; in the parameter's memory layout."""
    assert gradient.shape == parameter.shape and gradient.dtype == parameter.dtype
    assert gradient.device == parameter.device
    laid_out = torch.empty_like(parameter).copy_(gradient)
    parameter.grad = laid_out if parameter.grad is None else parameter.grad + laid_out
