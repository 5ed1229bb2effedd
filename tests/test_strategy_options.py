"""A strategy's own options: from its class to flags, folder, stored config and embedding."""

import json
import re
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT, call_main
from improved_diffusion.config import option
from improved_diffusion.data import metric_weights
from improved_diffusion.inference_utils import (
    Autoregressive,
    InferenceStrategyBase,
    inference_strategies,
)
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling import lpips_util
from improved_diffusion.sampling.options import SampleConfig
from test_video_sampling import checkpoint, load, sample  # noqa: F401

TOY_SCRIPTS = ("video_sample.py", "video_nll.py", "video_optimal_schedule.py")


class Sparse(InferenceStrategyBase):
    """Observe the last frame and the one so many before it."""

    @dataclass(frozen=True)
    class Options:
        gap: int = option(2, "sparse: frames between the observed ones", folder_word="gap")
        order: str = option("up", "sparse: order of observed frames", choices=("up", "down"))

    def next_indices(self):
        start = max(self._done_frames) + 1
        observed = [start - 1, max(0, start - 1 - self.options.gap)]
        latent = list(range(start, min(start + self._step_size, self._video_length)))
        return sorted(observed, reverse=self.options.order == "down"), latent


@pytest.fixture
def sparse(monkeypatch):
    """The toy, registered as a user registers one."""
    assert inference_strategies is STRATEGIES
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES._entries))
    inference_strategies["sparse"] = Sparse


def sample_words(checkpoint):  # noqa: F811
    sizes = "--step_size 2 --obs_length 4 --T 8 --device cpu"
    return (checkpoint, "--inference_mode", "sparse", *sizes.split())


@pytest.mark.parametrize("script", TOY_SCRIPTS)
def test_a_registered_strategy_and_its_options_are_offered_by_help(sparse, script, capsys):
    with pytest.raises(SystemExit) as end:
        call_main(script, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "sparse: Observe the last frame and the one so many before it." in shown
    assert "--gap GAP sparse: frames between the observed ones [2]" in shown


def test_its_options_reach_it_and_name_the_folder_and_are_stored(sparse, checkpoint):  # noqa: F811
    words = sample_words(checkpoint)
    call_main("video_sample.py", *words, "--indices", 0, "--gap", 3, "--eval_dir", "out")
    folder = Path("out/sparse_gap3_4_2_8_4")
    stored = json.loads((folder / "sample_config.json").read_text())
    assert (stored["gap"], stored["order"]) == (3, "up")
    assert "gibbs_sweeps" not in stored and "distance" not in stored
    call_main("video_nll.py", *words, "--indices", 0, "--gap", 3, "--eval_dir", "out")
    assert json.loads((folder / "elbo_config.json").read_text())["gap"] == 3
    assert len(np.load(folder / "elbos/elbo_0000.npy")) == 2
    with pytest.raises(ValueError, match="made with order up, not down"):
        call_main("video_sample.py", *words, "--gap", 3, "--order", "down", "--eval_dir", "out")
    with pytest.raises(ValueError, match="made with order up, not down"):
        call_main("video_nll.py", *words, "--gap", 3, "--order", "down", "--eval_dir", "out")


def test_an_optimal_schedule_lies_where_the_options_say(sparse, checkpoint):  # noqa: F811
    words = sample_words(checkpoint)
    search = "--num_videos 1 --num_timesteps 1 --gap 1 --eval_dir out"
    call_main("video_optimal_schedule.py", *words, *search.split())
    assert Path("out/sparse_gap1_optimal_4_2_8_4/optimal_schedule.pt").is_file()


def test_the_example_of_readme_runs_as_pasted(sparse, checkpoint):  # noqa: F811
    readme = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(from dataclasses.*?class Thinned.*?)```", readme, flags=re.S)[
        1
    ]
    scope = {"Autoregressive": Autoregressive}
    exec(example, scope)
    inference_strategies["sparse"] = scope["Thinned"]
    gaps = "--gap 2 --indices 0 --eval_dir out"
    call_main("video_sample.py", *sample_words(checkpoint), *gaps.split())
    assert Path("out/sparse_gap2_4_2_8_4/samples/sample_0000-0.npy").is_file()
    pasted = scope["Thinned"](12, 6, 6, 2, options=scope["Thinned"].Options(gap=2))
    assert next(pasted) == ([3, 5], [6, 7])


def test_a_mistake_names_the_option(sparse):
    for options, words in (
        ({"inference_mode": "sparce"}, "--inference_mode 'sparce' is unknown: .*sparse"),
        ({"strategy_options": {"gaps": 1}}, "no --inference_mode has an option gaps: .*'gap'"),
    ):
        with pytest.raises(ValueError, match=words):
            SampleConfig("x.pt", **{"inference_mode": "sparse"} | options)


@pytest.mark.parametrize(
    "name, words", [("gap", "two of --inference_mode have an option gap"), ("seed", "--seed is an")]
)
def test_one_flag_has_one_meaning(sparse, name, words):
    field = option(9, "another meaning")
    options = make_dataclass("Options", [(name, int, field)], frozen=True)
    inference_strategies["other"] = type("Other", (Sparse,), {"Options": options})
    with pytest.raises(ValueError, match=words):
        call_main("video_sample.py", "--help")


def test_options_of_other_strategies_are_not_kept(sparse):
    given = {"gap": 5, "gibbs_sweeps": 3}
    config = SampleConfig("x.pt", inference_mode="sparse", strategy_options=given)
    assert config.strategy_options == Sparse.Options(gap=5)
    gibbs = SampleConfig("x.pt", inference_mode="gibbs", strategy_options=given)
    assert gibbs.strategy_options == inference_strategies["gibbs"].Options(gibbs_sweeps=3)


def test_an_old_folder_with_the_options_of_every_mode_is_continued(checkpoint):  # noqa: F811
    folder = sample(checkpoint, indices=(0,)).path
    path = folder / "sample_config.json"
    old = json.loads(path.read_text()) | {"gibbs_sweeps": 7, "distance": "lpips"}
    path.write_text(json.dumps(old))
    assert sample(checkpoint, indices=(1,)).samples() == {0: [0], 1: [0]}
    assert json.loads(path.read_text()) == old


def test_the_sampler_gives_the_embedding_that_is_named(checkpoint, monkeypatch, tmp_path):  # noqa: F811
    seen = []
    # Samples say which LPIPS weights chose their frames; the faked embedding needs no real ones.
    (tmp_path / metric_weights.ALEXNET_FILE).write_bytes(b"weights")
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(tmp_path))

    def embed(frames, *, device):
        seen.append((len(frames), device))
        return frames.reshape(len(frames), -1)

    monkeypatch.setitem(lpips_util.EMBEDDINGS, "lpips", embed)
    options = {"inference_mode": "adaptive-autoreg", "device": "cpu", "indices": (0,)}
    by_name = sample(checkpoint, eval_dir="a", **options)
    assert seen == [(1, "cpu"), (4, "cpu"), (2, "cpu")]  # the first one is tried on black
    l2 = sample(checkpoint, eval_dir="b", strategy_options={"distance": "l2"}, **options)
    assert len(seen) == 3
    np.testing.assert_array_equal(load(by_name, 0), load(l2, 0))
