"""The TensorFlow back end against torch, on a TF-Hub folder made on the spot."""

import hashlib

import numpy as np
import pytest
import torch

from golden_fill import array
from improved_diffusion import frechet_video_distance as fvd
from improved_diffusion.data import metric_weights
from improved_diffusion.evaluation.i3d import I3D, MIXED

pytestmark = pytest.mark.tf


def tensorflow_i3d(tf, tensors, x):
    """I3D in TensorFlow's own operations: [b, T, 224, 224, 3] -> [b, 400]."""

    def conv(x, name, stride=1, activation=tf.nn.relu):
        kernel = tensors[f"{name}.weight"].permute(2, 3, 4, 1, 0).numpy()
        x = tf.nn.conv3d(x, kernel, [1, stride, stride, stride, 1], "SAME")
        return activation(x + tensors[f"{name}.bias"].numpy())

    def pool(x, kernel, stride):
        return tf.nn.max_pool3d(x, [1, *kernel, 1], [1, *stride, 1], "SAME")

    def mixed(x, name):
        branches = [conv(x, f"{name}.Branch_0.Conv3d_0a_1x1")]
        for branch in (f"{name}.Branch_1", f"{name}.Branch_2"):
            branches.append(conv(conv(x, f"{branch}.Conv3d_0a_1x1"), f"{branch}.Conv3d_0b_3x3"))
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        branches.append(conv(pooled, f"{name}.Branch_3.Conv3d_0b_1x1"))
        return tf.concat(branches, -1)

    x = pool(conv(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = conv(conv(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        if name == "Mixed_4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        x = mixed(x, name)
    x = tf.nn.avg_pool3d(x, [1, 2, 7, 7, 1], [1] * 5, "VALID")
    return tf.reduce_mean(conv(x, "Logits.Conv3d_0c_1x1", activation=tf.identity), [1, 2, 3])


def save_hub_module(tensors, folder):
    import tensorflow as tf

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None, None, 224, 224, 3], tf.float32)])
    def default(inputs):
        return {"default": tensorflow_i3d(tf, tensors, inputs)}

    tf.saved_model.save(module, str(folder), signatures={"default": default})


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """(torch file, TF-Hub folder) of the same random network."""
    folder = tmp_path_factory.mktemp("random")
    tensors = {}
    for name, value in I3D().state_dict().items():
        scale = np.sqrt(2 / np.prod(value.shape[1:])) if value.ndim > 1 else 0.1
        tensors[name] = torch.from_numpy(array(name, value.shape, scale))
    torch.save(tensors, folder / "i3d.pt")
    save_hub_module(tensors, folder / "hub")
    return folder / "i3d.pt", folder / "hub"


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("frames, height, width", [(10, 64, 64), (11, 50, 81), (13, 230, 224)])
@pytest.mark.parametrize("resize", fvd.RESIZES)
def test_both_back_ends_give_the_same_features(random_weights, frames, height, width, resize):
    videos = noise(1, frames, 3, height, width)
    file, hub = random_weights
    ours = fvd.video_features(videos, resize=resize, weights=file)
    theirs = fvd.video_features(videos, resize=resize, weights=hub, backend="tensorflow")
    assert theirs.shape == (1, 400) and theirs.dtype == np.float32
    scale = abs(theirs).max()
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-4)
    other = fvd.video_features(
        videos, resize=fvd.RESIZES[fvd.RESIZES.index(resize) - 1], weights=file
    )
    assert abs(other - theirs).max() > 1e-3 * scale, "the other resize must show"


def test_tensorflow_features_do_not_depend_on_the_batch_size(random_weights):
    videos, hub = noise(3, 10, 3, 32, 32), random_weights[1]
    one = fvd.video_features(videos, weights=hub, backend="tensorflow")
    two = fvd.video_features(videos, weights=hub, backend="tensorflow", batch_size=2)
    np.testing.assert_allclose(two, one, atol=1e-5 * abs(one).max())


def test_tensorflow_gan_gives_the_same_distance():
    x, y = array("x", [60, 20]), array("y", [50, 20], 1.3) + 0.2
    ours = fvd.frechet_distance(x, y)
    theirs = fvd.frechet_distance(x, y, backend="tensorflow")
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours * 59 / 60 != pytest.approx(theirs, rel=1e-3), "ddof 0 must show"


def test_the_module_is_found_in_tfhub_cache_dir(random_weights, tmp_path, monkeypatch):
    name = hashlib.sha1(fvd.HUB_URL.encode()).hexdigest()
    assert name == "092225fb776e28d6d64ac605ab6be03f18dd2027"
    (tmp_path / name).symlink_to(random_weights[1])
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    assert fvd.weights_path("tensorflow") == tmp_path / name


def test_an_unreachable_module_is_one_line_that_says_where_to_put_it(tmp_path, monkeypatch):
    import tensorflow_hub

    def unreachable(handle):
        raise OSError("no route\nto host")

    monkeypatch.setattr(tensorflow_hub, "resolve", unreachable)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*TFHUB_CACHE_DIR/0922") as error:
        fvd.weights_path("tensorflow")
    assert "\n" not in str(error.value)


@pytest.mark.weights
def test_both_back_ends_agree_with_the_real_weights(tmp_path):
    save_hub_module(metric_weights.load_tensors(metric_weights.find_i3d()), tmp_path / "hub")
    real, fake = noise(4, 16, 3, 64, 64), noise(4, 16, 3, 64, 64) // 2
    ours = [fvd.video_features(videos) for videos in (real, fake)]
    theirs = [
        fvd.video_features(videos, weights=tmp_path / "hub", backend="tensorflow")
        for videos in (real, fake)
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    distance = fvd.frechet_distance(*theirs, backend="tensorflow")
    assert fvd.frechet_distance(*ours) == pytest.approx(distance, rel=1e-3)
