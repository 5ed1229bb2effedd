"""Every kind of thing that one can add to, and its entries by name. No torch here.

An entry is the thing itself, or "module:attribute", which is imported when somebody first asks for
it: so that names and help of command-line flags cost nothing. To add a thing, write it where its
neighbours are and give it one line here; or, from outside, `REGISTRY["name"] = thing` before the
command's `main` is called. CONTRIBUTING.md shows one of each kind.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


class UnknownName(ValueError, KeyError):
    """A name that is in no registry: a user's mistake, and for mappings a missing key."""

    __str__ = ValueError.__str__


class Registry(MutableMapping[str, Any]):
    """Things of one kind by name, in the order in which they were added.

    Args:
        flag: the command-line option whose choices these are; named in errors.
        entries: {name: (thing or "module:attribute", one line of help)}.
    """

    def __init__(self, flag: str, entries: Mapping[str, tuple[Any, str]]) -> None:
        self.flag = flag
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        """The thing of that name. Raises ValueError, naming the flag and its choices, for another."""
        if name not in self._entries:
            raise UnknownName(f"--{self.flag} {name!r} is unknown: choose from {', '.join(self)}")
        thing, help_text = self._entries[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = getattr(importlib.import_module(module), attribute)
            self._entries[name] = thing, help_text
        return thing

    def made(self, name: str, options: Any) -> Any:
        """The function `name`: the thing itself, or the instance of a class made from its `options`."""
        thing = self[name]
        return thing(options) if isinstance(thing, type) else thing

    def __setitem__(self, name: str, thing: Any) -> None:
        """Add a thing, or put another in its place.

        Its help is its attribute `summary`, or else the first line of its docstring.
        """
        text = getattr(thing, "summary", None) or getattr(thing, "__doc__", None) or ""
        help_text = text.strip().partition("\n")[0]
        self._entries[name] = thing, help_text

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def help(self) -> str:
        """The names, a line each with what they are, for a flag's help text."""
        return "\n".join(
            f"{name}: {text}" if text else name for name, (_, text) in self._entries.items()
        )


class JoinedRegistry(Registry):
    """Several registries of one flag, read as one; what is added later to any of them counts."""

    def __init__(self, flag: str, *parts: Registry) -> None:
        super().__init__(flag, {})
        self._parts = parts

    def __getitem__(self, name: str) -> Any:
        for part in self._parts:
            if name in part:
                return part[name]
        return super().__getitem__(name)  # which says that it is unknown

    def __setitem__(self, name: str, thing: Any) -> None:
        raise TypeError(f"{name!r} must be added to one of the registries that are joined here")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name!r} must be deleted from the registry that holds it")

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(*self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def help(self) -> str:
        """As `Registry.help`, of all parts."""
        return "\n".join(part.help() for part in self._parts)


_HERE = "improved_diffusion"

# A torch module made from ModelConfig and called as unet.UNetVideoModel is.
NETWORKS = Registry(
    "network", {"unet": (f"{_HERE}.unet:UNetVideoModel", "the UNet of the published code")}
)

# What the network's output means: a class with `target`, `xstart` and `error_scale`.
PREDICTIONS = Registry(
    "prediction",
    {
        "eps": (f"{_HERE}.losses:PredictEps", "the noise"),
        "xstart": (f"{_HERE}.losses:PredictXstart", "the clean frames"),
        "v": (f"{_HERE}.losses:PredictV", "their mix of equal size at all noise levels"),
    },
)

# (snr [B], error_scale [B]) -> factors [B] on the squared error of the output; see `made`.
LOSS_WEIGHTINGS = Registry(
    "loss_weighting",
    {
        "none": (f"{_HERE}.losses:unweighted", "every timestep alike"),
        "min-snr": (f"{_HERE}.losses:MinSnr", "the clean frames' error as min(SNR, gamma)"),
        "sigmoid": (f"{_HERE}.losses:Sigmoid", "the noise's error as sigmoid(bias - log SNR)"),
    },
)

# A subclass of resample.ScheduleSampler.
TIMESTEP_DISTRIBUTIONS = Registry(
    "schedule_sampler",
    {
        "uniform": (f"{_HERE}.resample:ScheduleSampler", "all alike"),
        "loss-second-moment": (
            f"{_HERE}.resample:LossSecondMomentSampler",
            "those with large losses more often",
        ),
        "lognormal": (
            f"{_HERE}.resample:LogNormalSampler",
            "log sigma normally distributed; changes the objective",
        ),
        "logsnr-uniform": (
            f"{_HERE}.resample:LogSnrUniformSampler",
            "all values of log SNR alike; changes the objective",
        ),
    },
)

# (T, max_frames, numpy Generator) -> (observed frames, latent frames) of a training item; see `made`.
MASK_DISTRIBUTIONS = Registry(
    "mask_distribution",
    {
        "published": (f"{_HERE}.data.frame_masks:draw_frames", "as the published code draws them"),
        "filled": (f"{_HERE}.data.frame_masks:Filled", "the same groups, but every item is full"),
        "queries": (
            f"{_HERE}.data.query_masks:Queries",
            "inference steps of all strategies, at random sizes",
        ),
        "mixed": (f"{_HERE}.data.query_masks:Mixed", "some of each of these three"),
    },
)

# (denoiser, batch, *, generator, noise, eta) -> frames, see sampling/samplers.py.
SAMPLERS = Registry(
    "sampler",
    {
        "ddpm": (f"{_HERE}.sampling.samplers:ddpm", "ancestral, one call a timestep"),
        "ddim": (f"{_HERE}.sampling.samplers:ddim", "deterministic, or with --eta"),
        "dpmpp2m": (f"{_HERE}.sampling.samplers:dpmpp2m", "DPM-Solver++ 2M, good in 20 steps"),
        "heun": (f"{_HERE}.sampling.samplers:heun", "EDM's second order, two calls a step"),
        "dpmpp3m": (f"{_HERE}.sampling.samplers:dpmpp3m", "DPM-Solver++ 3M, of order 3"),
        "unipc": (f"{_HERE}.sampling.samplers:unipc", "UniPC-3: the same, each step corrected"),
        "ipndm4": (f"{_HERE}.sampling.samplers:ipndm4", "Adams-Bashforth, of order 4"),
    },
)

# (noise levels sigma [trained timesteps], --timestep_respacing) -> timesteps to keep, see respace.py.
SPACINGS = Registry(
    "spacing",
    {
        "time": (f"{_HERE}.respace:space_by_time", "even in the timestep, as published"),
        "logsnr": (f"{_HERE}.respace:space_by_log_snr", "even in the logarithm of the noise level"),
        "rho7": (f"{_HERE}.respace:space_by_rho7", "EDM's: even in the noise level's 7th root"),
    },
)

_GUIDANCE = f"{_HERE}.sampling.guidance"

# (observed frames, latent frames, generators) -> which to observe still, see sampling/guidance.py.
GUIDANCE_REFERENCES = Registry(
    "guidance_against",
    {
        "nothing": (f"{_GUIDANCE}:observe_nothing", "no frame"),
        "recent": (f"{_GUIDANCE}:observe_recent", "the half that is nearest to the latent frames"),
        "subset": (f"{_GUIDANCE}:observe_subset", "a random half"),
    },
)

_STRATEGIES = f"{_HERE}.inference_utils"
_OTHER_ORDERS = f"{_HERE}.data.parallel_strategies"

STRATEGIES = Registry(
    "inference_mode",
    {
        "autoreg": (f"{_STRATEGIES}:Autoregressive", "observe the most recent frames"),
        "long-range": (
            f"{_STRATEGIES}:LongRange",
            "observe the most recent frames, and those observed first",
        ),
        "mixed-autoreg-independent": (f"{_STRATEGIES}:LongRange", "another name of long-range"),
        "independent": (f"{_STRATEGIES}:Independent", "observe the frames observed first"),
        "really-independent": (f"{_STRATEGIES}:ReallyIndependent", "observe nothing"),
        "exp-past": (
            f"{_STRATEGIES}:ExponentialPast",
            "observe the frames 1, 2, 4, ... before the first new one",
        ),
        "hierarchy-2": (
            f"{_STRATEGIES}:Hierarchy",
            "sample frames spread over the whole video, then those in between",
        ),
        "hierarchy-3": (f"{_STRATEGIES}:Hierarchy3", "the same in three levels"),
        "hierarchy-4": (f"{_STRATEGIES}:Hierarchy4", "the same in four levels"),
        "hierarchy-5": (f"{_STRATEGIES}:Hierarchy5", "the same in five levels"),
        "parallel-hierarchy-2": (
            f"{_OTHER_ORDERS}:ParallelHierarchy",
            "two levels, in each every second block at once, then all those between",
        ),
        "parallel-hierarchy-3": (f"{_OTHER_ORDERS}:ParallelHierarchy3", "the same in three levels"),
        "parallel-hierarchy-4": (f"{_OTHER_ORDERS}:ParallelHierarchy4", "the same in four levels"),
        "end-to-start": (
            f"{_OTHER_ORDERS}:EndToStart",
            "from the last frames to the first, observing the start and the frames just after",
        ),
        "adaptive-autoreg": (
            f"{_STRATEGIES}:AdaptiveAutoregressive",
            "observe the most recent frame, and frames that look different",
        ),
        "adaptive-hierarchy-2": (
            f"{_STRATEGIES}:AdaptiveHierarchy",
            "hierarchy-2 that observes the nearest frames, and frames that look different",
        ),
        "adaptive-hierarchy-3": (
            f"{_STRATEGIES}:AdaptiveHierarchy3",
            "the same in three levels",
        ),
        "recall-autoreg": (
            f"{_HERE}.data.recall_strategy:RecallAutoregressive",
            "observe the most recent frames, and what followed the moments most like now",
        ),
        "goal-directed-autoreg": (
            f"{_STRATEGIES}:GoalDirectedAutoregressive",
            "autoreg that observes the last five frames too",
        ),
        "goal-directed-hierarchy-2": (
            f"{_STRATEGIES}:GoalDirectedHierarchy",
            "hierarchy-2 that observes the last five frames too",
        ),
        "gibbs": (f"{_STRATEGIES}:Gibbs", "autoreg, then sweeps over the video again"),
    },
)

_SPECS = f"{_HERE}.data.dataset_specs"

DATASETS = Registry(
    "dataset",
    {
        "bouncy_balls": (f"{_SPECS}:BOUNCY_BALLS", "balls that collide, 32x32, made on first use"),
        "colour_mazes": (f"{_SPECS}:COLOUR_MAZES", "walks through mazes, made on first use"),
        "maze_laps": (f"{_SPECS}:MAZE_LAPS", "laps round rings of corridors, made on first use"),
        "mazes_cwvae": (f"{_SPECS}:MAZES_CWVAE", "GQN-Mazes, 64x64, made by datasets/mazes.py"),
        "minerl": (f"{_SPECS}:MINERL", "MineRL-Navigate, 64x64, made by datasets/minerl.py"),
        "memory_mazes": (
            f"{_SPECS}:MEMORY_MAZES",
            "walks through mazes, 64x64, made by datasets/memory_mazes.py",
        ),
        "carla_no_traffic": (f"{_SPECS}:CARLA_NO_TRAFFIC", "drives in CARLA, 128x128"),
        "carla_with_traffic": (f"{_SPECS}:CARLA_WITH_TRAFFIC", "the same among other cars"),
        "carla_town02_no_traffic": (f"{_SPECS}:CARLA_TOWN02_NO_TRAFFIC", "the same in Town 2"),
    },
)

FRAME_METRICS = Registry(
    "modes",
    {
        "psnr": (f"{_HERE}.evaluation.metrics:Psnr", "peak signal-to-noise ratio"),
        "ssim": (f"{_HERE}.evaluation.metrics:Ssim", "structural similarity"),
        "lpips": (f"{_HERE}.evaluation.metrics:Lpips", "distance of AlexNet features"),
    },
)

VIDEO_METRICS = Registry(
    "modes",
    {
        "fvd": (f"{_HERE}.evaluation.metrics:Fvd", "Fréchet distance of sets of videos"),
        "kvd": (f"{_HERE}.evaluation.metrics:Kvd", "kernel distance of sets of videos"),
        "fvd_infinity": (
            f"{_HERE}.evaluation.distances:FvdInfinity",
            "fvd extrapolated to infinitely many videos",
        ),
        "jedi": (
            f"{_HERE}.evaluation.distances:Jedi",
            "JEDi's kernel distance (JEDi itself on features of V-JEPA)",
        ),
        "motion": (
            f"{_HERE}.evaluation.distances:Motion",
            "Fréchet distance of statistics of frame differences",
        ),
        "fvmd": (
            f"{_HERE}.evaluation.distances:Fvmd",
            "Fréchet distance of histograms of tracked points' motion: needs --tracker FILE",
        ),
    },
)

_LAPS, _PLACES = f"{_HERE}.evaluation.laps", f"{_HERE}.evaluation.places"

SAMPLE_METRICS = Registry(
    "modes",
    {
        "lap_psnr": (f"{_LAPS}:LapPsnr", "psnr lap by lap, of videos that repeat themselves"),
        "lap_ssim": (f"{_LAPS}:LapSsim", "the same with ssim"),
        "lap_lpips": (f"{_LAPS}:LapLpips", "the same with lpips"),
        "place_jumps": (f"{_PLACES}:PlaceJumps", "share of steps that no walker could make"),
        "place_returns": (f"{_PLACES}:PlaceReturns", "share of frames that show a place again"),
        "place_lpips": (f"{_PLACES}:PlaceLpips", "lpips of these and what was there before"),
    },
)

METRICS = JoinedRegistry("modes", FRAME_METRICS, VIDEO_METRICS, SAMPLE_METRICS)

FEATURES = Registry(
    "features",
    {
        "i3d": (f"{_HERE}.evaluation.features:I3DFeatures", "logits of I3D"),
        "alexnet": (
            f"{_HERE}.evaluation.features:AlexNetFeatures",
            "AlexNet's last convolution, mean over pixels and frames",
        ),
        "motion": (
            f"{_HERE}.evaluation.features:MotionFeatures",
            "statistics of frame differences, without a network",
        ),
        "tracks": (
            f"{_HERE}.evaluation.tracks:TrackFeatures",
            "FVMD's histograms of tracked points' velocity and acceleration: needs --tracker FILE",
        ),
        "file": (
            f"{_HERE}.evaluation.feature_file:FileFeatures",
            "a network of one's own: give its TorchScript or torch.export file instead of a name",
        ),
    },
)

# (network, TrainConfig) -> torch.optim.Optimizer, see training/optimizers.py and `made`.
OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": (f"{_HERE}.training.optimizers:AdamW", "AdamW for all parameters"),
        "muon": (
            f"{_HERE}.training.optimizers:Muon",
            "Muon for the matrices of hidden layers, AdamW for the rest (needs torch 2.9)",
        ),
    },
)
