"""Colour jitter against torchvision's own functions; the other changes against closed forms."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F

from pscl import augmentation
from pscl.augmentation import STEPS, Blur, ColorJitter, ContrastJitter, Illumination, Noise


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(augmentation, "PROBABILITY", 1.0)


def torchvision_twin(image: torch.Tensor, jitter: ColorJitter) -> torch.Tensor:
    """The four torchvision steps in the jitter's order."""
    for step in jitter.order:
        image = getattr(F, f"adjust_{step}")(image, getattr(jitter, step))
    return image


def random_image(channels: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (channels, 37, 53), dtype=np.uint8))


def levels_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("seed", range(12))
def test_colour_images_are_jittered_as_torchvision_does(seed, always):
    jitter = ColorJitter.draw(np.random.default_rng(seed), 0.5)
    image = random_image(3, seed)
    # Only the mean of 'contrast' may round otherwise, by one level; hue steps can double it.
    assert levels_apart(jitter.apply(image), torchvision_twin(image, jitter)) <= 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_step_alone_equals_torchvision(step, channels):
    jitter = ColorJitter((step,), brightness=1.3, contrast=0.7, saturation=0.6, hue=0.1)
    image = random_image(channels)
    expected = image if (channels, step) == (1, "saturation") else torchvision_twin(image, jitter)
    allowed = 1 if step == "contrast" else 0
    assert levels_apart(jitter.apply(image), expected) <= allowed
    assert step in ("saturation", "hue") or levels_apart(jitter.apply(image), image) > 10


@pytest.mark.parametrize("seed", range(12))
def test_gray_equals_the_replicated_colour_image(seed, always):
    jitter = ColorJitter.draw(np.random.default_rng(seed), 0.2)
    gray = random_image(1, seed)
    replicated = torchvision_twin(gray.expand(3, -1, -1).contiguous(), jitter)
    result = jitter.apply(gray)
    assert result.shape == gray.shape and result.dtype == torch.uint8
    # torchvision's luminance weights add up to 0.9999 and its hue rounds, so equal channels lose a
    # level at each of the three steps where an image without colour loses none.
    assert levels_apart(result.expand(3, -1, -1), replicated) <= 3
    assert (result.float() - replicated.float()).abs().mean() <= 1.5


def test_draws_fill_the_published_ranges():
    rng = np.random.default_rng(0)
    draws = [ColorJitter.draw(rng, 0.2) for _ in range(4000)]
    applied = [draw for draw in draws if draw.order]
    assert abs(len(applied) / len(draws) - 0.8) < 0.02  # three standard deviations
    for name, low, high in (
        ("brightness", 0.84, 1.16),
        ("contrast", 0.84, 1.16),
        ("saturation", 0.84, 1.16),
        ("hue", -0.04, 0.04),
    ):
        values = np.array([getattr(draw, name) for draw in applied])
        span = high - low
        assert low <= values.min() < low + 0.01 * span and high - 0.01 * span < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * span
    assert len({draw.order for draw in applied}) == 24


def test_factors_never_fall_below_zero(always):
    draws = [ColorJitter.draw(np.random.default_rng(i), 5.0) for i in range(200)]
    assert min(min(d.brightness, d.contrast, d.saturation) for d in draws) >= 0


def test_identity_returns_the_image_itself():
    image = random_image(3)
    assert ColorJitter().apply(image) is image


def test_result_does_not_depend_on_threads(always):
    image = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, 400, 400), np.uint8))
    jitter = ColorJitter.draw(np.random.default_rng(1), 0.2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append([jitter.apply(image), jitter.apply(image[:1])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_contrast_is_a_gain_and_an_offset():
    image = torch.tensor([[-1.5, 0.0, 2.0]])
    assert ContrastJitter(2.0, -0.25).apply(image).tolist() == [[-3.25, -0.25, 3.75]]
    assert torch.equal(ContrastJitter().apply(image), image)


def test_contrast_fills_its_range_evenly_on_both_sides():
    rng = np.random.default_rng(0)
    draws = [ContrastJitter.draw(rng, 0.3) for _ in range(3000)]
    for values in ([math.log(d.gain) for d in draws], [d.offset for d in draws]):
        assert -0.3 <= min(values) < -0.299 and 0.299 < max(values) <= 0.3
        assert abs(np.mean(values)) < 0.01 and abs(np.std(values) - 0.3 / math.sqrt(3)) < 0.005
    assert (
        abs(np.corrcoef([(math.log(d.gain), d.offset) for d in draws], rowvar=False)[0, 1]) < 0.06
    )


def test_illumination_goes_through_its_levels_at_corners_edges_and_centre():
    levels = ((0.1, -0.2, 0.3), (0.0, 0.5, -0.1), (0.2, 0.4, -0.3))
    light = Illumination(levels).apply(torch.zeros(3, 65, 33))
    assert torch.equal(light[0], light[1]) and torch.equal(light[0], light[2])
    found = light[0][[0, 32, 64]][:, [0, 16, 32]]
    torch.testing.assert_close(found, torch.tensor(levels), rtol=0, atol=1e-6)


def test_illumination_is_smooth():
    rng = np.random.default_rng(0)
    for _ in range(20):
        light = Illumination.draw(rng, 1.0)
        surface = light.apply(torch.zeros(1, 129, 129))[0]
        reach = max(map(max, light.levels)) - min(map(min, light.levels))
        # From level to level are 64 pixels: a cubic is at most a few times steeper than a line.
        assert max(surface.diff(dim=d).abs().max() for d in (0, 1)) < 3 * reach / 64
        assert max(surface.diff(n=2, dim=d).abs().max() for d in (0, 1)) < 12 * reach / 64**2


def test_illumination_has_the_standard_deviation_asked_for():
    rng = np.random.default_rng(0)
    levels = np.array([Illumination.draw(rng, 0.05).levels for _ in range(1000)])
    assert levels.std() == pytest.approx(0.05, rel=0.03) and abs(levels.mean()) < 0.002
    assert not Illumination.draw(rng, 0.0).apply(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("deviation", [0.8, 2.0])
def test_blur_of_a_point_is_a_normal_density_and_conserves_its_sum(deviation):
    image = torch.zeros(1, 41, 41)
    image[0, 20, 20] = 1
    found = Blur(deviation).apply(image)[0]
    offsets = torch.arange(41) - 20
    line = torch.exp(-(offsets**2) / (2 * deviation**2))
    line[offsets.abs() > math.ceil(3 * deviation)] = 0
    torch.testing.assert_close(found, torch.outer(line, line) / line.sum() ** 2)
    assert float(found.sum()) == pytest.approx(1)


def test_blur_leaves_a_plane_and_its_mean_and_small_images_can_be_blurred():
    plane = torch.full((3, 20, 30), 0.7)
    torch.testing.assert_close(Blur(5.0).apply(plane), plane)
    periodic = torch.tensor([[0.0, 1.0] * 16] * 8)[None]
    assert float(Blur(2.0).apply(periodic).mean()) == pytest.approx(0.5, abs=1e-4)
    assert Blur(16.0).apply(torch.rand(1, 16, 16)).shape == (1, 16, 16)
    assert torch.equal(Blur(0.0).apply(plane), plane)


def test_blur_is_drawn_evenly_for_every_second_image():
    rng = np.random.default_rng(0)
    drawn = np.array([Blur.draw(rng, 2.0).deviation for _ in range(2000)])
    blurred = drawn[drawn > 0]
    assert abs(len(blurred) / 2000 - 0.5) < 0.04
    assert blurred.max() <= 2 and abs(blurred.mean() - 1) < 0.06


def test_noise_has_its_standard_deviation_and_no_mean():
    noisy = Noise(0.1, 7).apply(torch.full((3, 200, 200), 0.5)) - 0.5
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.01) and abs(float(noisy.mean())) < 0.001
    values = noisy.flatten(1).numpy()
    assert abs(np.corrcoef(values)[0, 1]) < 0.02  # channels differ
    assert abs(np.corrcoef(values[0, 1:], values[0, :-1])[0, 1]) < 0.02  # and neighbours do


def test_noise_is_drawn_evenly_and_repeats_by_its_seed():
    rng = np.random.default_rng(0)
    drawn = [Noise.draw(rng, 0.2) for _ in range(2000)]
    deviations = [n.deviation for n in drawn]
    assert max(deviations) <= 0.2 and abs(np.mean(deviations) - 0.1) < 0.005
    assert len({n.seed for n in drawn}) == 2000
    image = torch.rand(1, 5, 5)
    assert torch.equal(drawn[0].apply(image), drawn[0].apply(image))
    assert not torch.equal(drawn[0].apply(image), drawn[1].apply(image))
