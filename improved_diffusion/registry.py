"""Every kind of thing that one can add to, and its entries by name. No torch here.

An entry is the thing itself, or "module:attribute", which is imported when somebody first asks for
it: so that names and help of command-line flags cost nothing. To add a thing, write it where its
neighbours are and give it one line here; or, from outside, `REGISTRY["name"] = thing` before the
command's `main` is called. CONTRIBUTING.md shows one of each kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any


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
            raise ValueError(f"--{self.flag} {name!r} is unknown: choose from {', '.join(self)}")
        thing, help_text = self._entries[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = getattr(importlib.import_module(module), attribute)
            self._entries[name] = thing, help_text
        return thing

    def __setitem__(self, name: str, thing: Any) -> None:
        """Add a thing, or put another in its place; its docstring's first line is its help."""
        help_text = (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]
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
        """The names, each with its line of help, for a flag's help text."""
        return "; ".join(
            f"{name}: {text}" if text else name for name, (_, text) in self._entries.items()
        )


_HERE = "improved_diffusion"

NETWORKS = Registry(
    "network", {"unet": (f"{_HERE}.unet:UNetVideoModel", "the UNet of the published code")}
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
    },
)

FEATURES = Registry(
    "features", {"i3d": (f"{_HERE}.evaluation.features:I3DFeatures", "logits of I3D")}
)
