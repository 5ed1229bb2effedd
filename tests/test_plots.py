"""Pictures of metrics: which numbers are drawn, from which files, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import run_script
from improved_diffusion.data.paths import elbo_path, metrics_path
from improved_diffusion.evaluation import metric_tables, plots
from improved_diffusion.evaluation.captions import FONT_SIZE, SMALLEST_SIZE, fitting_font, wrapped
from improved_diffusion.evaluation.line_styles import line_style
from improved_diffusion.evaluation.options import PlotConfig
from improved_diffusion.sampling.provenance import latent_counts, strategy_names
from improved_diffusion.sampling.results import EvalDir, write_json

FRAMES = [4, 5, 7]


# The sizes of the bounded videos: 5 inference steps, of 2, 2, 2, 2 and 1 frames of 8x8.
SIZES = {"inference_mode": "autoreg", "T": 11, "obs_length": 2, "max_frames": 4, "step_size": 2}
LATENT = np.array([2, 2, 2, 2, 1])


def add_bounds(path: Path, videos: int, mean: float = 1000.0) -> None:
    """Bounds of a sampled folder's inference steps."""
    counts = latent_counts(EvalDir(path))
    assert counts is not None
    rng = np.random.default_rng(list(path.name.encode()))
    for video in range(videos):
        file = elbo_path(path, video)
        file.parent.mkdir(exist_ok=True)
        np.save(file, rng.normal(mean, 10, len(counts)))


def make_folder(path: Path, *, modes=("psnr", "lpips"), elbos: int = 0, **info) -> Path:
    """A table of 3 videos and 2 samples, and bounds of `elbos` videos of 5 steps."""
    rng = np.random.default_rng(list(path.name.encode()))
    path.mkdir(parents=True)
    if modes:
        table = {mode: rng.normal(20, 2, (3, 2, len(FRAMES))) for mode in modes}
        rows = {mode: metric_tables.summarise(values) for mode, values in table.items()}
        described = {"videos": [0, 1, 2], "samples": [0, 1], "frames": FRAMES, "metrics": rows}
        metric_tables.write_table(metrics_path(path, 3, 2, 8), table, described | info)
    if elbos:
        write_json(path / "elbo_config.json", SIZES)
        write_json(path / "model_config.json", {"image_size": 8})
        add_bounds(path, elbos)
    return path


def draw(*folders: Path, **options) -> Path:
    return plots.draw_metrics(PlotConfig(eval_dir=tuple(map(str, folders)), **options))


def drawn(monkeypatch, *folders: Path, **options) -> dict[str, dict[str, plots.Curve]]:
    """The curves that would be drawn."""
    kept = {}
    monkeypatch.setattr(plots, "_draw_panels", lambda panels, names, path: kept.update(panels))
    draw(*folders, **options)
    return kept


def test_curves_are_means_over_videos_with_their_standard_error(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "a", elbos=4)
    curves = drawn(monkeypatch, folder)
    assert list(curves) == ["psnr", "lpips", "bits"]
    x, mean, error, n = curves["psnr"]["autoreg"]
    assert n == 3
    np.testing.assert_array_equal(x, FRAMES)
    values = metric_tables.read_table(folder / "metrics_3-2-8.pkl")["psnr"].mean(axis=1)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(error, values.std(axis=0, ddof=1) / np.sqrt(3))
    x, mean, error, n = curves["bits"]["autoreg"]
    assert n == 4
    bits = np.stack([np.load(elbo_path(folder, video)) for video in range(4)])
    bits = bits / (LATENT * 3 * 8 * 8)  # per dimension of each step's frames
    np.testing.assert_array_equal(x, range(5))
    np.testing.assert_allclose(mean, bits.mean(axis=0))
    np.testing.assert_allclose(error, bits.std(axis=0, ddof=1) / 2)


def test_every_directory_has_a_curve_where_it_has_numbers(tmp_path, monkeypatch):
    a, b = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", modes=("psnr",), elbos=1)
    curves = drawn(monkeypatch, a, b)
    assert {panel: list(rows) for panel, rows in curves.items()} == {
        "psnr": ["a", "autoreg"],
        "lpips": ["a"],
        "bits": ["autoreg"],
    }
    same_name = make_folder(tmp_path / "other" / "a")
    assert list(drawn(monkeypatch, a, same_name)["psnr"]) == [str(a), str(same_name)]


def test_the_newest_table_is_drawn_and_named(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = make_folder(tmp_path / "a")
    old = folder / "metrics_9-9-8.pkl"
    old.write_bytes(b"never read")
    os.utime(old, (1, 1))
    assert set(drawn(monkeypatch, folder)) == {"psnr", "lpips"}
    assert "holds 2 tables: taking metrics_3-2-8.pkl" in caplog.text


def test_the_picture_is_written_where_it_is_said(tmp_path):
    a, b = make_folder(tmp_path / "a", elbos=2), make_folder(tmp_path / "b", elbos=2)
    done = run_script("video_plot.py", "--eval_dir", a, b, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(a / "metrics.png")
    pixels = np.asarray(Image.open(a / "metrics.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    for position in (0, 1):
        colour = tuple(bytes.fromhex(line_style(position).colour[1:]))
        assert (pixels == colour).all(axis=-1).sum() > 100
    assert draw(b, out=str(tmp_path / "x" / "y.png")) == tmp_path / "x" / "y.png"
    assert Image.open(tmp_path / "x" / "y.png").size[1] > 300


def test_lines_are_named_in_order_with_bands_of_one_standard_error_and_labelled_axes(
    tmp_path, monkeypatch
):
    from matplotlib.colors import to_hex

    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure)
    )
    folders = [make_folder(tmp_path / name, elbos=4) for name in ("b", "a")]
    draw(*folders)
    (figure,) = figures
    (legend,) = figure.legends
    colours = [line_style(position).colour for position in (0, 1)]
    assert [text.get_text() for text in legend.get_texts()] == ["b", "a"]
    assert [line.get_color() for line in legend.get_lines()] == colours
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [
        ("frame", "PSNR (dB)"),
        ("frame", "LPIPS"),
        ("inference step", "negative ELBO (bits/dim)"),
    ]
    drawn_psnr = zip(figure.axes[0].lines, figure.axes[0].collections, strict=True)
    for folder, colour, (line, band) in zip(folders, colours, drawn_psnr, strict=True):
        values = metric_tables.read_table(folder / "metrics_3-2-8.pkl")["psnr"].mean(axis=1)
        mean, error = values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(3)
        assert line.get_color() == to_hex(band.get_facecolor()[0]) == colour
        np.testing.assert_allclose(line.get_xydata(), np.stack([FRAMES, mean], axis=1))
        (polygon,) = band.get_paths()
        x, y = polygon.vertices.T
        assert set(x) == set(FRAMES)
        np.testing.assert_allclose([y[x == frame].min() for frame in FRAMES], mean - error)
        np.testing.assert_allclose([y[x == frame].max() for frame in FRAMES], mean + error)


def test_tables_of_other_videos_are_not_drawn_together_silently(tmp_path, caplog):
    a, b = make_folder(tmp_path / "a"), make_folder(tmp_path / "b", videos=[3, 4, 5])
    with pytest.raises(ValueError, match="a and b differ in videos.*--allow_differences"):
        draw(a, b)
    assert not (a / "metrics.png").exists()
    draw(a, b, allow_differences=True)
    assert "a and b differ in videos" in caplog.text and (a / "metrics.png").exists()


def test_a_folder_with_nothing_to_draw_is_named(tmp_path):
    done = run_script("video_plot.py", "--eval_dir", tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "video_eval.py" in done.stderr and str(tmp_path) in done.stderr
    with pytest.raises(FileNotFoundError, match="holds no metrics"):
        draw(make_folder(tmp_path / "fvd", modes=("fvd",)))


def test_a_table_and_a_json_that_do_not_belong_together_are_named(tmp_path):
    folder = make_folder(tmp_path / "a")
    path = folder / "metrics_3-2-8.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frames": [1]}))
    with pytest.raises(ValueError, match=r"metrics_3-2-8\.pkl.*do not belong together"):
        draw(folder)


def test_bounds_of_different_strategies_in_one_folder_are_named(tmp_path):
    folder = make_folder(tmp_path / "a", elbos=2)
    np.save(elbo_path(folder, 7), np.zeros(3))
    with pytest.raises(ValueError, match="elbos holds bounds of different numbers of steps"):
        draw(folder)


def test_bounds_of_unknown_sizes_are_left_out_and_told(tmp_path, monkeypatch, caplog):
    folder = make_folder(tmp_path / "a", elbos=2)
    (folder / "elbo_config.json").unlink()
    assert list(drawn(monkeypatch, folder)) == ["psnr", "lpips"]
    assert "does not say how many frames" in caplog.text


def test_adaptive_strategies_have_bits_per_dimension_too(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "a", modes=(), elbos=2)
    options = SIZES | {"inference_mode": "adaptive-autoreg", "distance": "lpips"}
    write_json(folder / "elbo_config.json", options)
    curve = drawn(monkeypatch, folder)["bits"]["adaptive-autoreg"]
    bits = np.stack([np.load(elbo_path(folder, video)) for video in range(2)])
    np.testing.assert_allclose(curve.mean, (bits / (LATENT * 192)).mean(axis=0))


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    def names(*options):
        folders = []
        for number, stored in enumerate(options):
            folders.append(EvalDir(tmp_path / f"{len(options)}_{number}"))
            folders[-1].path.mkdir(exist_ok=True)
            write_json(folders[-1].sample_config_path, SIZES | stored)
        return strategy_names(folders)

    gibbs = {"inference_mode": "gibbs", "gibbs_sweeps": 1}
    assert names({}, gibbs) == ["autoreg", "gibbs"]
    assert names({}, {"optimal": True}) == ["autoreg", "autoreg optimal"]
    more = gibbs | {"gibbs_sweeps": 2}
    assert names(gibbs, more, {}) == ["gibbs, gibbs_sweeps 1", "gibbs, gibbs_sweeps 2", "autoreg"]
    ddpm, quick = {"sampler": "ddpm"}, {"sampler": "heun", "timestep_respacing": "9"}
    assert names(ddpm, quick) == ["autoreg, ddpm", "autoreg, heun 9"]
    assert names({}, {}, {}, {}) == ["4_0", "4_1", "4_2", "4_3"]


def test_titles_are_written_smaller_before_their_words_are_cut():
    titles, width = ["truth", "adaptive-hierarchy-2", "independent"], 64
    font = fitting_font(titles, width)
    assert SMALLEST_SIZE <= font.size < FONT_SIZE
    assert [wrapped(title, font, width) for title in titles] == [
        ["truth"],
        ["adaptive-", "hierarchy-2"],
        ["independent"],
    ]
    assert fitting_font(titles[:1], width).size == FONT_SIZE
    endless = 30 * "x"
    (cut,) = wrapped(endless, fitting_font([endless], width), width)
    assert cut.endswith("...")
