"""Proxy outliers: what each family keeps and destroys, and what they depend on."""

import numpy as np
import pytest
from numpy.typing import NDArray

from opnp.data.families import DECIDING, REPORTED
from opnp.data.proxies import FAMILIES, make
from opnp.errors import InputError

Images = NDArray[np.float32]  # (N, C, H, W)

SHAPES = [(1, 8, 8), (3, 9, 9), (1, 13, 13), (3, 28, 28)]
ALIKE = {
    "inversion",
    "rotation",
    "mixup",
    "cutmix",
    "blur",
    "zoom",
}  # may turn the same images alike
NOISE = ["uniform", "gaussian", "rademacher", "blobs", "spectrum", "strokes"]


def drawn(shape: tuple[int, int, int], count: int = 5) -> Images:
    return np.random.default_rng(0).random((count, *shape), dtype=np.float32)


def pixels(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The colours of an image (C, H, W), sorted."""
    colours = image.reshape(len(image), -1)
    return colours[:, np.lexsort(colours)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_are_float32_images_in_range(family: str, shape: tuple[int, int, int]) -> None:
    made = make(family, drawn(shape), range(1, 4), seed=0)
    assert made.shape == (3, *shape)
    assert made.dtype == np.float32
    assert made.min() >= 0
    assert made.max() <= 1
    assert made.std() > (0.01 if family == "blur" else 0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_outlier_does_not_depend_on_how_rows_are_divided(family: str) -> None:
    images = drawn((1, 8, 8), 7)
    whole = make(family, images, range(7), seed=3)
    for rows in (range(2), range(2, 6), range(6, 7)):
        assert np.array_equal(make(family, images, rows, seed=3), whole[rows.start : rows.stop])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"inversion", "blur"}))
def test_an_outlier_depends_on_the_seed(family: str) -> None:
    images = drawn((1, 8, 8), 7)
    assert not np.array_equal(make(family, images, range(7), 0), make(family, images, range(7), 1))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - ALIKE))
def test_every_row_is_scrambled_in_its_own_way(family: str) -> None:
    one, other = make(family, drawn((1, 8, 8), 1).repeat(2, axis=0), range(2), seed=0)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_are_not_changed(family: str) -> None:
    images = drawn((3, 9, 9))
    make(family, images, range(5), seed=0)
    assert np.array_equal(images, drawn((3, 9, 9)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", ["permutation", "jigsaw-2", "jigsaw-4", "jigsaw-7", "rotation"])
def test_pixels_are_moved_not_changed(family: str, shape: tuple[int, int, int]) -> None:
    images = drawn(shape)
    for image, outlier in zip(images, make(family, images, range(5), seed=0), strict=True):
        assert np.array_equal(pixels(outlier), pixels(image))
        assert not np.array_equal(outlier, image)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", [2, 4, 7])
def test_a_jigsaw_moves_whole_patches_and_leaves_the_remainder(
    grid: int, shape: tuple[int, int, int]
) -> None:
    images, side = drawn(shape), shape[1] // grid
    span = side * grid

    def patches(image: NDArray[np.float32]) -> list[bytes]:
        return sorted(
            image[:, y : y + side, x : x + side].tobytes()
            for y in range(0, span, side)
            for x in range(0, span, side)
        )

    for image, outlier in zip(images, make(f"jigsaw-{grid}", images, range(5), 0), strict=True):
        assert patches(outlier) == patches(image)
        assert np.array_equal(outlier[:, span:], image[:, span:])
        assert np.array_equal(outlier[:, :, span:], image[:, :, span:])


def test_rotations_are_by_quarter_turns_and_all_three_occur() -> None:
    images = drawn((3, 9, 9), 40)
    turns = [
        [k for k in range(4) if np.array_equal(np.rot90(image, k, axes=(1, 2)), outlier)]
        for image, outlier in zip(images, make("rotation", images, range(40), 0), strict=True)
    ]
    assert {turn for (turn,) in turns} == {1, 2, 3}


def test_inversion_is_an_involution() -> None:
    images = np.round(drawn((3, 9, 9)) * 256) / np.float32(256)  # so that 1 − x is exact
    once = make("inversion", images, range(5), seed=0)
    assert not np.array_equal(once, images)
    assert np.array_equal(make("inversion", once, range(5), seed=0), images)


def test_mixup_is_the_average_with_another_image() -> None:
    images = drawn((1, 8, 8), 6)
    for row, outlier in enumerate(make("mixup", images, range(6), seed=0)):
        others = [i for i in range(6) if np.array_equal((images[row] + images[i]) / 2, outlier)]
        assert len(others) == 1
        assert others != [row]


def test_a_single_image_is_mixed_with_itself() -> None:
    images = drawn((1, 8, 8), 1)
    assert np.array_equal(make("mixup", images, range(1), seed=0), images)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_phase_scrambling_keeps_the_amplitudes(shape: tuple[int, int, int]) -> None:
    images = 0.5 + (drawn(shape) - 0.5) / np.float32(1000)  # too faint to be clipped
    for image, outlier in zip(images, make("phase", images, range(5), seed=0), strict=True):
        spectra = [np.abs(np.fft.fft2(x.astype(np.float64))) for x in (image, outlier)]
        np.testing.assert_allclose(spectra[1], spectra[0], atol=1e-5)
        assert np.abs(outlier - image).max() > 1e-4


@pytest.mark.parametrize("family", NOISE)
def test_noise_depends_on_nothing_in_the_images(family: str) -> None:
    black = np.zeros((5, 3, 9, 9), np.float32)
    assert np.array_equal(
        make(family, black, range(5), seed=0), make(family, drawn((3, 9, 9)), range(5), seed=0)
    )


def test_noise_has_the_moments_it_should() -> None:
    images = drawn((3, 28, 28), 4)
    uniform, gaussian, rademacher = (make(f, images, range(4), 0) for f in NOISE[:3])
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    assert uniform.std() == pytest.approx(12**-0.5, abs=0.01)
    assert gaussian.mean() == pytest.approx(0.5, abs=0.02)
    assert gaussian.std() == pytest.approx(0.24, abs=0.01)  # 0.25 before it is clipped at 2 σ
    assert set(np.unique(rademacher)) == {0, 1}
    assert rademacher.mean() == pytest.approx(0.5, abs=0.02)


def test_blobs_are_smooth_and_fill_the_range() -> None:
    for blob in make("blobs", drawn((1, 28, 28)), range(5), seed=0):
        assert (blob.min(), blob.max()) == (0, 1)
        assert np.abs(np.diff(blob, axis=2)).max() < 0.3


def test_the_natural_families_are_families() -> None:
    assert {*DECIDING, *REPORTED} < set(FAMILIES)
    assert not set(DECIDING) & set(REPORTED)
    assert not set(DECIDING) & {"uniform", "gaussian", "rademacher", "permutation", "mixup"}


def test_the_amplitude_of_spectrum_falls_as_one_over_frequency() -> None:
    made = make("spectrum", drawn((1, 64, 64), 40), range(40), seed=0)[:, 0].astype(np.float64)
    assert made.min() == 0
    assert made.max() == 1
    power = (np.abs(np.fft.fft2(made - made.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64)] * 2)).ravel()
    inner = (frequency > 0.05) & (frequency < 0.5)
    slope, _ = np.polyfit(np.log(frequency[inner]), np.log(power.ravel()[inner]), 1)
    assert slope == pytest.approx(-2, abs=0.15)  # of the power


def test_zoom_shows_a_quarter_of_an_image_enlarged() -> None:
    y, x = np.mgrid[:16, :16].astype(np.float32) / 16
    slope = np.stack([y, x])[None]  # a plane stays a plane, four times as flat
    (made,) = make("zoom", slope, range(1), seed=0)
    inner = made[:, 2:-2, 2:-2]
    np.testing.assert_allclose(np.diff(inner[0], axis=0), 1 / 64, atol=1e-6)
    np.testing.assert_allclose(np.diff(inner[1], axis=1), 1 / 64, atol=1e-6)
    assert slope[0, 0].min() <= made[0].min() <= made[0].max() <= slope[0, 0].max()


def test_blur_keeps_the_mean_and_removes_what_is_fine() -> None:
    board = (np.indices((32, 32)).sum(axis=0) % 2).astype(np.float32)[None, None]
    (made,) = make("blur", board, range(1), seed=0)
    np.testing.assert_allclose(made, 0.5, atol=0.01)  # the border mirrors its pixels
    plain = np.full((1, 3, 9, 9), 0.25, np.float32)
    np.testing.assert_allclose(make("blur", plain, range(1), seed=0), plain, atol=1e-6)


def test_strokes_are_few_colours_on_a_plain_ground() -> None:
    counts = set()
    for made in make("strokes", drawn((3, 64, 64), 60), range(60), seed=0):
        colours, sizes = np.unique(made.reshape(3, -1), axis=1, return_counts=True)
        counts.add(colours.shape[1])
        assert sizes.max() > 64 * 64 / 4
    assert counts <= set(range(2, 7))
    assert len(counts) >= 4


def test_cutmix_takes_a_rectangle_from_another_image() -> None:
    images = drawn((3, 8, 8), 6)
    for row, made in enumerate(make("cutmix", images, range(6), seed=0)):
        changed = (made != images[row]).any(axis=0)
        assert changed.sum() == 4 * 4
        assert changed.any(axis=0).sum() == changed.any(axis=1).sum() == 4
        sources = [i for i in range(6) if np.array_equal(images[i][:, changed], made[:, changed])]
        assert len(sources) == 1
        assert sources != [row]


@pytest.mark.parametrize("grid", [2, 4, 7])
def test_an_image_smaller_than_its_jigsaw_is_refused(grid: int) -> None:
    with pytest.raises(InputError, match=rf"jigsaw-{grid} needs images of at least {grid} pixels"):
        make(f"jigsaw-{grid}", drawn((1, grid - 1, grid - 1)), range(1), seed=0)


def test_an_image_as_small_as_its_jigsaw_is_shuffled() -> None:
    images = drawn((1, 7, 7))
    assert np.array_equal(pixels(make("jigsaw-7", images, range(1), seed=0)[0]), pixels(images[0]))


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'jigsaw-3'; did you mean .*jigsaw-2"):
        make("jigsaw-3", drawn((1, 8, 8)), range(1), seed=0)
