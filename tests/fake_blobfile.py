"""A blob store in memory under blobfile's names; it counts what is up- and downloaded."""

from __future__ import annotations

import contextlib
import io
import sys
import types
from collections import Counter
from types import SimpleNamespace


class Store:
    """Blobs by address; `clock` is the store's own, `reads` and `writes` count by address."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.times: dict[str, float] = {}
        self.clock = 1000.0
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()

    def write(self, path: str, content: bytes) -> None:
        self.blobs[path], self.times[path] = content, self.clock
        self.writes[path] += 1

    def read(self, path: str) -> bytes:
        if path not in self.blobs:
            raise FileNotFoundError(path)
        self.reads[path] += 1
        return self.blobs[path]

    @contextlib.contextmanager
    def open(self, path: str, mode: str = "r", streaming: bool = True):
        if "w" in mode:
            file = io.BytesIO()
            yield file
            self.write(path, file.getvalue())
        else:
            content = self.read(path)
            yield io.BytesIO(content) if "b" in mode else io.StringIO(content.decode())

    def exists(self, path: str) -> bool:
        return any(name == path or name.startswith(f"{path}/") for name in self.blobs)

    def listdir(self, folder: str) -> list[str]:
        below = [name[len(folder) + 1 :] for name in self.blobs if name.startswith(f"{folder}/")]
        return sorted({name.partition("/")[0] for name in below})

    def remove(self, path: str) -> None:
        if path not in self.blobs:
            raise FileNotFoundError(path)
        del self.blobs[path]

    def copy(self, source: str, target: str, overwrite: bool = False) -> None:
        self.blobs[target], self.times[target] = self.blobs[source], self.clock

    def stat(self, path: str) -> SimpleNamespace:
        if path not in self.blobs:
            raise FileNotFoundError(path)
        return SimpleNamespace(mtime=self.times[path])


def install(monkeypatch) -> Store:
    """Let `import blobfile` give an empty store."""
    store, module = Store(), types.ModuleType("blobfile")
    for name in ("exists", "listdir", "remove", "copy", "stat"):
        setattr(module, name, getattr(store, name))
    module.BlobFile = store.open
    monkeypatch.setitem(sys.modules, "blobfile", module)
    return store
