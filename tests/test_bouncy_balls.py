import numpy as np
import pytest

from improved_diffusion import bouncy_balls
from improved_diffusion.bouncy_balls import make_dataset, render, simulate


@pytest.fixture(scope="module")
def trajectories():
    return [simulate(np.random.default_rng(seed), 100) for seed in range(12)]


def momentum(trajectory):
    return (trajectory.masses[:, None] * trajectory.velocities).sum(axis=1)


def test_kinetic_energy_is_conserved(trajectories):
    for trajectory in trajectories:
        energy = (trajectory.masses * (trajectory.velocities**2).sum(axis=2)).sum(axis=1)
        np.testing.assert_allclose(energy, energy[0], rtol=1e-10)


def test_balls_collide_and_exchange_momentum_far_from_the_walls(trajectories):
    collisions = 0
    for trajectory in trajectories:
        p, v, r = trajectory.positions, trajectory.velocities, trajectory.radii[:, None]
        reach = r + 2 * np.sqrt((v**2).sum(axis=2, keepdims=True))
        free = ((p > reach) & (p < trajectory.size - reach)).all(axis=(1, 2))
        total = momentum(trajectory)
        for t in np.flatnonzero(free[:-1] & free[1:]):
            collisions += not np.allclose(v[t], v[t + 1])
            np.testing.assert_allclose(total[t], total[t + 1], atol=1e-9)
    assert collisions > 0


def test_balls_stay_in_the_box_and_out_of_one_another(trajectories):
    for trajectory in trajectories:
        p, r = trajectory.positions, trajectory.radii
        assert np.all(p >= r[:, None]) and np.all(p <= trajectory.size - r[:, None])
        i, j = np.triu_indices(len(r), 1)
        distances = np.linalg.norm(p[:, i] - p[:, j], axis=2)
        assert np.all(distances >= (r[i] + r[j]) * (1 - 1e-9))


def test_balls_fly_straight_between_collisions():
    trajectory = simulate(np.random.default_rng(0), 40, num_balls=1)
    p, v = trajectory.positions[:, 0], trajectory.velocities[:, 0]
    straight = np.all(v[1:] == v[:-1], axis=1)
    assert 0 < straight.sum() < 39  # it also meets a wall
    np.testing.assert_allclose((p[1:] - p[:-1])[straight], v[:-1][straight], atol=1e-12)
    np.testing.assert_allclose(np.abs(v), np.broadcast_to(np.abs(v[0]), v.shape))


def test_two_balls_of_different_colours(trajectories):
    for trajectory in trajectories:
        assert len(trajectory.radii) == len(np.unique(trajectory.colours, axis=0)) == 2


def test_pictures_show_the_balls_where_they_are(trajectories):
    video = render(trajectories[0])
    assert video.shape == (100, 32, 32, 3) and video.dtype == np.uint8
    for frame, positions in zip(video, trajectories[0].positions, strict=True):
        for (x, y), colour in zip(positions, trajectories[0].colours, strict=True):
            np.testing.assert_array_equal(frame[int(y), int(x)], colour)
    assert np.all(video[1:] != video[:-1], axis=-1).any(axis=(1, 2)).all()  # something moves


def test_an_antialiased_disk_covers_its_area():
    trajectory = simulate(np.random.default_rng(1), 30, num_balls=1)
    video = render(trajectory).astype(float)
    background = bouncy_balls.BACKGROUND
    cover = ((video - background) / (trajectory.colours[0] - background)).mean(axis=-1)
    np.testing.assert_allclose(cover.sum(axis=(1, 2)), np.pi * trajectory.radii[0] ** 2, rtol=0.02)


def test_the_data_set_depends_on_its_seed_alone(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_dataset(tmp_path / folder, num_train=2, num_test=1, seed=seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.npy"))
    assert [str(file) for file in files] == ["test/0.npy", "train/0.npy", "train/1.npy"]
    a, b, c = ([np.load(tmp_path / folder / file) for file in files] for folder in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert not np.array_equal(a[0], a[1])  # test and train differ


@pytest.mark.parametrize("num_balls", [0, 7, 4])
def test_balls_that_do_not_fit_are_refused(num_balls):
    with pytest.raises(ValueError, match=f"{num_balls} balls in a box of 32 pixels"):
        simulate(np.random.default_rng(0), num_balls=num_balls)
