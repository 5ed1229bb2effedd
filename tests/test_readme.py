"""What README shows works: its commands parse, its example class runs, its set-up is what CI does."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from improved_diffusion.registry import SAMPLERS, STRATEGIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "datasets/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
COMMAND = re.compile(r"python (scripts/\w+\.py)((?: +[^;&\n\"]+)?)")
INLINE = re.findall(r"`(python scripts/[^`]*)`", README)  # in tables and sentences
COMMANDS = [
    match for block in [*BLOCKS, *INLINE] for match in COMMAND.findall(block.replace("\\\n", " "))
]
# Those of the other pages, which are not part of longer lines.
DOCS = [
    line.partition("  #")[0]
    for page in sorted((ROOT / "docs").glob("*.md"))
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    for line in block.splitlines()
    if line.startswith("python scripts/")
]
# Of the published README, whose placeholder of a path has one of this README's in its place.
PUBLISHED = (
    "video_train.py --num_workers 10 --T=300 --batch_size=8 --max_frames 20 --dataset=mazes_cwvae "
    "--num_res_blocks=1",
    "video_train.py --num_workers 10 --T=500 --batch_size=8 --max_frames 20 --dataset=minerl "
    "--num_res_blocks=1",
    "video_train.py --num_workers 10 --batch_size=2 --max_frames 20 --dataset=carla_no_traffic "
    "--num_res_blocks=1",
    "video_sample.py checkpoints/11n992cv/ema_0.9999_latest.pt --inference_mode independent "
    "--step_size 7",
    "video_sample.py checkpoints/${RUN_ID}/ema_0.9999_latest.pt --batch_size 8 --inference_mode "
    "autoreg --step_size $STEP --T 300 --sample_idx $S_IDX",
    "video_eval.py --eval_dir results/second-batch-400k-iters/3kdr4q5k/ema_0.9999_400000/"
    "hierarchy-2_optimal_20_10_300_36/ --num_samples 3",
)


def load_script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script, arguments", COMMANDS)
def test_commands_parse(script, arguments):
    words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", arguments))
    load_script(script).create_argparser().parse_args(words)


@pytest.mark.parametrize("command", DOCS)
def test_commands_of_the_docs_parse(command):
    script, *words = shlex.split(command)[1:]
    load_script(script).create_argparser().parse_args(words)


@pytest.mark.parametrize("command", PUBLISHED, ids=lambda command: command.split()[0])
def test_published_commands_are_shown_word_for_word(command):
    assert any(f"python scripts/{command}" in block for block in BLOCKS)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem
)
def test_help_ends_with_two_commands_that_parse(path):
    parser = load_script(f"scripts/{path.name}").create_argparser()
    _, _, examples = parser.format_help().partition("examples:\n")
    commands = re.findall(rf"python scripts/{path.name}(.*)", examples.replace("\\\n", " "))
    assert len(commands) == 2
    for words in commands:
        parser.parse_args(shlex.split(words, comments=True))


def test_help_says_what_strategies_and_samplers_are():
    text = load_script("scripts/video_sample.py").create_argparser().format_help()
    for registry in (STRATEGIES, SAMPLERS):
        for line in registry.help().splitlines():
            assert line in " ".join(text.split())


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(((?!https?:)[^)\s]+)\)", page.read_text())
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_script_is_shown_and_short():
    shown = {script for script, _ in COMMANDS}
    for path in (ROOT / "scripts").glob("*.py"):
        assert f"scripts/{path.name}" in shown, f"README shows no command of {path.name}"
        assert len(path.read_text().splitlines()) < 80


def test_ci_does_what_the_set_up_says():
    ci = (ROOT / ".ci/run").read_text()
    install, test = BLOCKS[1].strip().split(" && ")
    assert install in ci.splitlines() and test in ci.splitlines()


def test_the_example_inference_mode_runs_as_pasted():
    from improved_diffusion import inference_utils

    example = re.search(r"```python\n(class Autoregressive.*?)```", README, flags=re.S)[1]
    scope = {"InferenceStrategyBase": inference_utils.InferenceStrategyBase}
    exec(example, scope)
    ours = inference_utils.create_strategy(
        "autoreg", video_length=50, num_obs=6, max_frames=10, step_size=4
    )
    pasted = scope["Autoregressive"](50, 6, 10, 4)
    assert [tuple(map(list, step)) for step in pasted] == [tuple(map(list, step)) for step in ours]
