"""The videos of a report: those that all evaluation directories have, as many as there is room for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from improved_diffusion.data import paths
from improved_diffusion.evaluation.options import EvalConfig, ReportConfig
from improved_diffusion.evaluation.report.sprites import Sprites, sprites
from improved_diffusion.evaluation.scored_set import Clip, ScoredSet
from improved_diffusion.sampling import provenance
from improved_diffusion.sampling.results import EvalDir, load_video, shared_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample of a test video by each strategy.

    Attributes:
        samples: one per strategy.
        schedules: the inference steps of each; None where they are not known.
    """

    video: int
    sample: int
    samples: list[Sprites]
    schedules: list[list[provenance.ScheduleStep] | None]

    @property
    def num_bytes(self) -> int:
        """What it takes in a page, about: pictures, and six characters for each frame of a schedule."""
        steps = [step for schedule in self.schedules for step in schedule or ()]
        schedules = sum(6 * (len(observed) + len(latent)) + 6 for observed, latent in steps)
        return sum(video.num_bytes for video in self.samples) + schedules


@dataclass
class Videos:
    """All videos of a report.

    Attributes:
        truth: {video: its frames}; those that the data set here does not have are missing.
        left_out: what is missing, a sentence each.
    """

    samples: list[Sample] = field(default_factory=list)
    truth: dict[int, Sprites] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def gather_videos(config: ReportConfig, names: Sequence[str], room: float) -> Videos:
    """The samples that all directories have, as many as take `room` bytes in a page.

    First one sample of each video, then the others. names: of the directories. Raises ValueError
    where they share none, and for samples that continue other videos than the data set has.
    """
    eval_dirs = [EvalDir(folder) for folder in dict.fromkeys(config.eval_dir)]
    wanted = _wanted(eval_dirs, config)
    planned = [provenance.planned_schedule(eval_dir) for eval_dir in eval_dirs]
    found = Videos()
    truth = _true_clips(eval_dirs, found.left_out)
    for video, sample in tqdm(wanted, unit="video", desc="pictures"):
        if video in truth and video not in found.truth:
            found.truth[video] = _true_frames(truth[video])
            room -= found.truth[video].num_bytes
        shown = Sample(
            video,
            sample,
            [sprites(load_video(paths.sample_path(d.path, video, sample))) for d in eval_dirs],
            [
                provenance.recorded_schedule(eval_dir, video, sample) or steps
                for eval_dir, steps in zip(eval_dirs, planned, strict=True)
            ],
        )
        room -= shown.num_bytes
        if room < 0:
            break
        found.samples.append(shown)
    found.truth = {v: t for v, t in found.truth.items() if any(s.video == v for s in found.samples)}
    _tell_missing(found, wanted, names, config.max_mb)
    return found


def _wanted(eval_dirs: list[EvalDir], config: ReportConfig) -> list[tuple[int, int]]:
    """(video, sample) of all that is to be shown, in order of worth."""
    shared = shared_samples([eval_dir.samples() for eval_dir in eval_dirs])
    if not shared:
        raise ValueError(f"{' and '.join(config.eval_dir)}: no sample is in all of them")
    chosen = list(shared.items())[: config.num_videos]
    turns = max(len(samples) for _, samples in chosen)
    return [
        (video, samples[turn])
        for turn in range(min(turns, config.num_samples or turns))
        for video, samples in chosen
        if turn < len(samples)
    ]


def _true_clips(eval_dirs: list[EvalDir], left_out: list[str]) -> dict[int, list[Clip]]:
    """{video: its true frames, as each directory knows them}; empty, and told, without them."""
    stored = eval_dirs[0].sample_config()
    if stored.get("obs_video"):
        left_out.append("The truth: these samples continue a clip of one's own.")
    elif not {"dataset", "dataset_partition", "T", "observed_frames"} <= stored.keys():
        left_out.append(f"The truth: {eval_dirs[0].sample_config_path} does not say of what data.")
    else:
        try:
            scored = [
                ScoredSet.resolve(EvalConfig(eval_dir=(str(d.path),)), d.path) for d in eval_dirs
            ]
        except OSError as error:
            left_out.append(f"The truth: {error}.")
        else:
            clips = [dict(zip(s.videos, s.truth_clips, strict=True)) for s in scored]
            return {video: [of[video] for of in clips if video in of] for video in clips[0]}
    return {}


def _true_frames(clips: list[Clip]) -> Sprites:
    """The frames of one true video, once every directory's samples are known to continue it."""
    frames = [clip.frames() for clip in clips]
    return sprites(frames[0])


def _tell_missing(
    found: Videos, wanted: list[tuple[int, int]], names: Sequence[str], max_mb: float
) -> None:
    left = wanted[len(found.samples) :]
    if left:
        which = ", ".join(f"{video} (sample {sample})" for video, sample in left)
        said = f"{len(left)} of {len(wanted)} videos, for which {max_mb:g} MB (--max_mb) do not do: {which}."
        found.left_out.append(said)
        logger.warning("left out: %s", said)
    for position, name in enumerate(names):
        if any(sample.schedules[position] is None for sample in found.samples):
            found.left_out.append(
                f"{name}: the schedule of samples that were made before schedules were recorded."
            )
