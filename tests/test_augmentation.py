"""Colour jitter against torchvision's own functions on the same draws."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F

from pscl.augmentation import STEPS, ColorJitter, ContrastJitter


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
def test_colour_images_are_jittered_as_torchvision_does(seed):
    jitter = ColorJitter.draw(np.random.default_rng(seed), 0.5, probability=1.0)
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
def test_gray_equals_the_replicated_colour_image(seed):
    jitter = ColorJitter.draw(np.random.default_rng(seed), 0.2, probability=1.0)
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


def test_factors_never_fall_below_zero():
    draws = [ColorJitter.draw(np.random.default_rng(i), 5.0, 1.0) for i in range(200)]
    assert min(min(d.brightness, d.contrast, d.saturation) for d in draws) >= 0


def test_identity_returns_the_image_itself():
    image = random_image(3)
    assert ColorJitter().apply(image) is image


def test_result_does_not_depend_on_threads():
    image = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, 400, 400), np.uint8))
    jitter = ColorJitter.draw(np.random.default_rng(1), 0.2, probability=1.0)
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
