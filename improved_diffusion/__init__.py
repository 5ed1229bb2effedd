"""Flexible diffusion modeling of long videos; docs/architecture.md says where everything is."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# Import paths of earlier versions, which stay valid.
MOVED = {
    f"{__name__}.{old}": f"{__name__}.{new}"
    for old, new in {
        "video_io": "data.video_io",
        "video_datasets": "data.video_datasets",
        "checkpoints": "data.checkpoints",
        "paths": "data.paths",
        "results": "sampling.results",
        "samplers": "sampling.samplers",
        "video_sampling": "sampling.video_sampling",
        "metrics": "evaluation.metrics",
        "nll": "evaluation.nll",
    }.items()
}


class _MovedModules(MetaPathFinder, Loader):
    """Lets a module be imported by the name that it had before it moved."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has been imported by its new name, by which it goes on being known."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_MovedModules())
