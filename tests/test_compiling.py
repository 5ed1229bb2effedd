"""Which parts are compiled, and recorded calls that are replayed; without compiling and without a GPU."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import call_main
from improved_diffusion.config import ModelConfig
from improved_diffusion.nn import compile_network, cuda_graphs
from improved_diffusion.sampling.trained_model import TrainedModel
from improved_diffusion.unet import FactorizedAttentionBlock, ResBlock, UNetVideoModel
from toy_runs import make_toy

SIZE = 32


def make_network():
    network = UNetVideoModel(ModelConfig(image_size=SIZE, num_channels=32, num_res_blocks=1))
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.02 * torch.randn_like(param))
    return network.eval()


def make_inputs(batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(batch_size, 2, 3, SIZE, SIZE, generator=generator)
    observed = torch.tensor([1.0, 0.0]).expand(batch_size, 2)[..., None, None, None]
    return {
        "x": frames,
        "timesteps": torch.tensor([float(100 * seed)]),
        "x0": frames.flip(0),
        "obs_mask": observed,
        "latent_mask": 1 - observed,
        "frame_indices": torch.tensor([[0, 3 + seed]]),
    }


def test_blocks_are_compiled_one_by_one_and_a_cpu_is_warned_of(monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module)))
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append("whole"))
    network = make_network()
    with caplog.at_level(logging.WARNING):
        assert compile_network(network) is network
    assert set(compiled) == {ResBlock, FactorizedAttentionBlock}
    assert len(compiled) == len(network.blocks) > 8
    assert "measured useless" in caplog.text
    compile_network(torch.nn.Linear(1, 1))
    assert compiled[-1] == "whole"  # a network that names no blocks


class Recorder(TorchDispatchMode):
    """Notes every operation, and does it again with the same memory: a CUDA graph on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.data_ptr() != again.data_ptr():
                out.copy_(again)  # else a view, or written in place


def record(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
    with Recorder() as recorder:
        out = call()
    return out, recorder.replay


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_replayed_calls_are_the_networks_own(monkeypatch):
    recorded = []

    def note(call):
        recorded.append(call)
        return record(call)

    monkeypatch.setattr(cuda_graphs, "record", note)
    network = make_network()
    replayed = cuda_graphs.ReplayedNetwork(network)
    kept = []
    with torch.no_grad():
        for batch_size, seed in ((1, 1), (1, 2), (2, 3), (1, 4)):
            inputs = make_inputs(batch_size, seed)
            kept.append((replayed(**inputs), network(**inputs)))
    assert len(recorded) == 2  # one for each shape
    for out, expected in kept:  # no call writes over an earlier one's result
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(kept[0][0], kept[1][0])


def test_calls_with_gradients_are_not_recorded(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "record", None)
    replayed = cuda_graphs.ReplayedNetwork(make_network())
    assert replayed(**make_inputs(1, 1)).requires_grad


def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = make_toy(tmp_path)
    words = "--inference_mode autoreg --cuda_graphs True --device cpu".split()
    with pytest.raises(ValueError, match="--cuda_graphs True needs a CUDA GPU, not --device cpu"):
        call_main("video_sample.py", checkpoint, *words)
    assert not (tmp_path / "results").exists()


def test_a_loaded_network_is_replayed_where_asked(tmp_path):
    model = TrainedModel.load(str(make_toy(tmp_path)), "cpu")
    model._cuda_graphs = True  # as on a GPU
    assert isinstance(model.network, cuda_graphs.ReplayedNetwork)
    assert model.device == "cpu" and len(model.identity) == 64
