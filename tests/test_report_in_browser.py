"""The report in a real browser: the system's Chromium, headless, from a file."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import toy_runs
from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation import evaluate
from improved_diffusion.evaluation.options import EvalConfig, ReportConfig
from improved_diffusion.evaluation.report.page import write_report
from improved_diffusion.sampling.results import EvalDir
from test_plots import add_bounds

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
MODES = ("autoreg", "hierarchy-2")
# The pixels of every canvas of videos, beside the frame index that it says it shows; read at one time.
READ = """() => [...document.querySelectorAll("canvas.video")].map((canvas) => ({
    frame: Number(canvas.dataset.frame), width: canvas.width, observed: canvas.classList.contains("observed"),
    pixels: [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]}))"""
# Again and again while the page plays: the frame that each canvas says it shows, and the sum of its pixels.
WATCH = """(milliseconds) => new Promise((done) => {
    const seen = [], canvases = [...document.querySelectorAll("canvas.video")];
    const until = performance.now() + milliseconds;
    const look = () => {
        seen.push(canvases.map((canvas) => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const sum = pixels.reduce((total, value, i) => total + (i % 4 < 3 ? value : 0), 0);
            return [Number(canvas.dataset.frame), sum];
        }));
        performance.now() < until ? setTimeout(look, 7) : done(seen);
    };
    look();
})"""
WIDTH = "document.querySelector('canvas.video').clientWidth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two strategies on two videos, two samples each, with scores and bounds."""
    checkpoint = toy_runs.make_toy(tmp_path_factory.mktemp("browser"))
    found = []
    for mode in MODES:
        options = {"inference_mode": mode, "subset_size": 2, "num_samples": 2}
        found.append(toy_runs.sample(checkpoint, **options).path)
        add_bounds(found[-1], videos=2)
    evaluate.evaluate(EvalConfig(eval_dir=tuple(map(str, found)), modes=("psnr", "ssim")))
    return found


@pytest.fixture(scope="module")
def file(folders) -> Path:
    out = folders[0].parent / "report.html"
    return write_report(ReportConfig(eval_dir=tuple(map(str, folders)), out=str(out), fps=20))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root in a container has no sandbox.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, file):
    """The page, opened; whatever it complains about fails the test."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    opened.on("request", lambda asked: _only_local(asked.url, complaints))
    opened.goto(file.as_uri())
    opened.wait_for_selector("body[data-started]")
    yield opened
    opened.close()
    assert complaints == []


def _only_local(url: str, complaints: list[str]) -> None:
    if not url.startswith(("file:", "data:", "blob:")):
        complaints.append(f"asks for {url}")


@pytest.fixture
def long_names(folders, tmp_path) -> Path:
    """A report of strategies with long names; in one word, since lines break at spaces anyway."""
    found = []
    for letter in "ab":  # of one strategy, so they have the folders' names
        found.append(tmp_path / (99 * "x" + letter))
        shutil.copytree(folders[0], found[-1])
    out = str(tmp_path / "report.html")
    eval_dir = tuple(map(str, found))
    return write_report(ReportConfig(eval_dir=eval_dir, out=out, title=100 * "y"))


def frames_shown(page) -> set[int]:
    return {canvas["frame"] for canvas in page.evaluate(READ)}


def expected(folders, video: int, sample: int) -> list[np.ndarray]:
    """The truth and the samples, uint8 [T, 3, H, W]."""
    truth = get_test_dataset(EvalDir(folders[0]).sample_config()["dataset"], T=toy_runs.T)
    return [truth.read(video), *(np.load(paths.sample_path(f, video, sample)) for f in folders)]


def check_pixels(page, videos: list[np.ndarray], frame: int) -> None:
    """See that the canvases show this frame of these videos, bit for bit."""
    canvases = page.evaluate(READ)
    assert len(canvases) == len(videos)
    for canvas, video in zip(canvases, videos, strict=True):
        pixels = np.array(canvas["pixels"], np.uint8).reshape(-1, canvas["width"], 4)
        np.testing.assert_array_equal(pixels[..., :3].transpose(2, 0, 1), video[frame])
        assert canvas["observed"] == (frame < toy_runs.OBSERVED)


def test_the_pixels_of_every_frame_are_those_of_the_files(page, folders):
    for video, sample in [(v, s) for v in EvalDir(folders[0]).samples() for s in (0, 1)]:
        page.select_option("#video", str(video))
        page.select_option("#sample", str(sample))
        page.wait_for_selector(f'body[data-ready="{video}-{sample}"]')
        for frame in range(toy_runs.T):
            page.evaluate(
                "(frame) => { const slider = document.getElementById('frame'); slider.value = frame;"
                " slider.dispatchEvent(new Event('input')); }",
                frame,
            )
            check_pixels(page, expected(folders, video, sample), frame)


def test_all_videos_show_the_same_frame_while_they_play(page, folders):
    page.click("#play")
    began = time.monotonic()
    seen = page.evaluate(WATCH, 5000)
    assert time.monotonic() - began >= 5
    sums = [video.sum(axis=(1, 2, 3), dtype=int) for video in expected(folders, *_first(folders))]
    for canvases in seen:
        frame = canvases[0][0]
        assert canvases == [[frame, of_video[frame]] for of_video in sums]
    assert {canvases[0][0] for canvases in seen} == set(range(toy_runs.T)), "every frame came up"
    page.click("#play")
    stopped = frames_shown(page)
    page.wait_for_timeout(300)
    assert frames_shown(page) == stopped


def test_the_clock_keeps_the_speed_that_is_asked_for(page):
    page.select_option("#speed", "0.25")  # of 20 frames per second
    page.click("#play")
    seen = [canvases[0][0] for canvases in page.evaluate(WATCH, 2000)]
    passed = sum((b - a) % toy_runs.T for a, b in zip(seen, seen[1:], strict=False))
    assert 7 <= passed <= 11


def test_keys_and_slider_move_all_videos_and_cursors(page):
    for key, frame in (
        ("End", toy_runs.T - 1), ("ArrowLeft", toy_runs.T - 2), ("Home", 0), ("ArrowRight", 1),
        ("Shift+ArrowRight", 11), ("ArrowRight", toy_runs.T - 1), ("Shift+ArrowLeft", 1),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert frames_shown(page) == {frame}, key
        cursors = "[...document.querySelectorAll('.plot svg')].map((svg) => svg.dataset.cursor)"
        assert set(page.evaluate(cursors)) == {str(frame)}
    page.keyboard.press(" ")
    assert page.inner_text("#play") == "Pause"
    page.keyboard.press(" ")
    page.focus("#frame")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert frames_shown(page) == {1}
    before = page.evaluate(WIDTH)
    page.focus("#larger")
    page.keyboard.press("Enter")
    assert page.evaluate(WIDTH) > before
    style = "getComputedStyle(document.querySelector('canvas.video')).imageRendering"
    assert page.evaluate(style) == "pixelated"


def test_keys_work_after_a_click_on_a_control(page):
    for control in ("#play", "#larger", ".legend input"):
        page.locator(control).first.click()
        if control == "#play":
            page.click(control)  # and pause again
        page.keyboard.press("End")
        assert frames_shown(page) == {toy_runs.T - 1}, control
        page.keyboard.press("ArrowLeft")
        assert frames_shown(page) == {toy_runs.T - 2}, control
        before = page.evaluate(WIDTH)
        page.keyboard.press("+")
        larger = page.evaluate(WIDTH)
        page.keyboard.press("-")
        assert larger > before == page.evaluate(WIDTH), control
        page.keyboard.press(">")
        page.keyboard.press("<")
        page.keyboard.press("<")
        assert page.input_value("#speed") == "0.5", control
        page.keyboard.press(">")
    page.focus("#play")
    for says in ("Pause", "Play"):  # the button's own key, once
        page.keyboard.press(" ")
        assert page.inner_text("#play") == says


def test_the_slider_keeps_no_keys_but_those_that_move_it(page):
    page.focus("#frame")
    before = page.evaluate(WIDTH)
    page.keyboard.press("-")
    assert page.evaluate(WIDTH) < before
    page.keyboard.press("+")
    assert page.evaluate(WIDTH) == before
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert frames_shown(page) == {toy_runs.T - 2}


def test_a_click_on_a_plot_moves_the_videos_but_a_finger_that_scrolls_does_not(page):
    plot = page.locator(".plot svg").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    place = {"x": box["width"] / 2, "y": box["height"] / 2}
    touch = {"pointerType": "touch", "clientX": box["x"] + place["x"], "clientY": box["y"] + 9}
    plot.dispatch_event("pointerdown", touch)
    assert frames_shown(page) == {0}
    plot.click(position=place)
    (frame,) = frames_shown(page)
    assert 0 < frame < toy_runs.T - 1


def test_controls_and_what_they_control_agree_after_back(page):
    controls = (
        "[document.getElementById('speed').value, document.getElementById('baseline').value,"
        " ...[...document.querySelectorAll('.legend input')].map((box) => box.checked)]"
    )
    shown = (
        "[document.querySelectorAll('.plot polyline').length,"
        " ...[...document.querySelectorAll('.difference')].map((table) => !table.hidden)]"
    )
    before = page.evaluate(controls), page.evaluate(shown)
    page.select_option("#speed", "4")
    page.select_option("#baseline", "1")
    page.locator(".legend input").first.uncheck()
    page.goto("about:blank")
    page.go_back()
    page.wait_for_selector("body[data-started]")
    assert (page.evaluate(controls), page.evaluate(shown)) == before


def test_pointing_at_the_schedule_tells_which_step_made_a_frame_from_which(page, folders):
    observed, latent = EvalDir(folders[1]).record(*_first(folders))["schedule"][0]
    row = page.locator("canvas.schedule").nth(1)
    row.scroll_into_view_if_needed()
    box = row.bounding_box()
    page.mouse.move(box["x"] + (latent[0] + 0.5) / toy_runs.T * box["width"], box["y"] + 10)
    said = page.locator(".step").nth(1).inner_text()
    assert said.startswith(f"Frame {latent[0]}: step 0 of 0–") and str(observed[-1]) in said
    page.mouse.click(box["x"] + (latent[0] + 0.5) / toy_runs.T * box["width"], box["y"] + 10)
    assert frames_shown(page) == {latent[0]}


def _first(folders) -> tuple[int, int]:
    return next(iter(EvalDir(folders[0]).samples())), 0


def test_a_baseline_and_the_strategies_of_the_plots_can_be_chosen(page):
    page.select_option("#baseline", "1")
    shown = "[...document.querySelectorAll('.difference')].map((table) => !table.hidden)"
    assert page.evaluate(shown) == [False, True]
    lines = "document.querySelectorAll('.plot polyline').length"
    before = page.evaluate(lines)
    page.locator(".legend input").first.uncheck()
    assert page.evaluate(lines) == before / 2


@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_sticks_out_on_a_desk_or_a_phone(page, width, request, tmp_path):
    page.set_viewport_size({"width": width, "height": 800})
    page.keyboard.press("End")
    size = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    full, visible = page.evaluate(size)
    assert full <= visible
    small = (
        "[...document.querySelectorAll('button, select')].filter((e) => e.clientHeight < 30).length"
    )
    assert page.evaluate(small) == 0
    folder = Path(os.environ.get("TEST_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"report_{width}.png", full_page=True)
    assert (folder / f"report_{width}.png").stat().st_size > 10_000


def test_long_names_do_not_stick_out_on_a_phone(page, long_names, tmp_path):
    page.set_viewport_size({"width": 390, "height": 800})
    page.goto(long_names.as_uri())
    page.wait_for_selector("body[data-started]")
    assert page.locator(".legend").inner_text().count("xxx") and page.locator("#baseline").count()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    names = "[...document.querySelectorAll('tbody th')].map((head) => head.offsetWidth)"
    assert max(page.evaluate(names)) < 200, "they stay in place, beside what is scrolled"
    folder = Path(os.environ.get("TEST_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "report_long_names.png", full_page=True)
