"""Views against Pillow, scipy and loops; their draws; and that a view does not depend on its batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy import ndimage
from torch import Tensor

from hpcl.augment import Views, apply_views, centre_view, colour_matrix, draw_views
from hpcl.sections import Augment

# Nothing happens: the whole image, unflipped, no colour, no blur.
PLAIN = Augment(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, gray=0.0, blur=0.0)
ALL = Augment(flip=0.5, jitter=0.8, gray=0.2, blur=0.5, hue=0.3)
LEVEL = 1 / 255


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(n: int, c: int, h: int, w: int, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (n, c, h, w), generator=_generator(7), dtype=torch.uint8)


def _smooth(h: int, w: int) -> Tensor:
    """(1, 3, h, w) uint8 of slow waves: resampling by two definitions differs by rounding only."""
    y, x = np.mgrid[0:h, 0:w]
    waves = [np.sin(x / 7 + phase) * np.cos(y / 6 - phase) for phase in (0.0, 1.0, 2.0)]
    return torch.from_numpy(np.stack([(127.5 + 120 * wave).round() for wave in waves]).astype(np.uint8))[None]


def _pixels(images: Tensor, views: Views) -> np.ndarray:
    """Views in 0..1 units, without normalisation."""
    channels = images.shape[1]
    return apply_views(images, views, torch.zeros(channels), torch.ones(channels)).numpy()


def _pil(image: Tensor) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _array(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, dtype=np.float64) / 255
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def _colour_views(gain: float, saturation: float, turn: float, offset: float) -> Views:
    one = torch.ones(1, dtype=torch.float64)
    matrix = colour_matrix(gain * one, saturation * one, turn * one, 3).float()
    return Views(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), matrix, torch.tensor([offset]), None)


# --- crop and flip -----------------------------------------------------------------


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_and_flip_are_pillows_crop_resize_mirror(flip: float) -> None:
    height, width = 40, 48
    image = _smooth(height, width)
    count = 20
    augment = PLAIN.model_copy(update={"crop_scale": (0.2, 0.9), "crop_ratio": (0.7, 1.4), "flip": flip})
    views = draw_views(augment, count, height, width, 3, _generator())
    got = _pixels(image.expand(count, -1, -1, -1), views)
    for view, (scale_x, shift_x, scale_y, shift_y) in zip(got, views.crop.tolist(), strict=True):
        assert (scale_x < 0) == (flip == 1.0)
        left = (1 + shift_x - abs(scale_x)) / 2 * width
        top = (1 + shift_y - scale_y) / 2 * height
        box = (max(left, 0), max(top, 0), left + abs(scale_x) * width, top + scale_y * height)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        wanted = _pil(image[0]).resize((width, height), Image.Resampling.BILINEAR, box=box)
        if flip:
            wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Pillow takes the crop's own border for what lies outside it, grid_sample the image's.
        inner = (slice(None), slice(3, -3), slice(3, -3))
        assert np.abs(view - _array(wanted))[inner].max() < 1.5 * LEVEL
        assert np.abs(view - _array(wanted)).max() < 12 * LEVEL


def test_whole_image_is_kept_and_mirrored_exactly_enough() -> None:
    images = _noise(3, 3, 9, 13)
    same = _pixels(images, draw_views(PLAIN, 3, 9, 13, 3, _generator()))
    # The widest crop of ratio 1 of a 13 x 9 image is 9 x 9; of a square image it is the image.
    assert same.shape == (3, 3, 9, 13)
    square = _noise(3, 3, 11, 11)
    kept = _pixels(square, draw_views(PLAIN, 3, 11, 11, 3, _generator()))
    np.testing.assert_allclose(kept, square.numpy() / 255, atol=1e-5)
    flipped = draw_views(PLAIN.model_copy(update={"flip": 1.0}), 3, 11, 11, 3, _generator())
    np.testing.assert_allclose(_pixels(square, flipped), square.flip(3).numpy() / 255, atol=1e-5)


@settings(deadline=None, max_examples=25)
@example(low=0.2, wide=0.0, ratio=1.0, height=32, width=32)
@given(
    low=st.floats(0.05, 1.0),
    wide=st.floats(0.0, 1.0),
    ratio=st.floats(0.3, 3.0),
    height=st.integers(8, 60),
    width=st.integers(8, 60),
)
def test_crops_lie_in_the_image_and_in_their_ranges(
    low: float, wide: float, ratio: float, height: int, width: int
) -> None:
    augment = Augment(crop_scale=(low, low + (1 - low) * wide), crop_ratio=(ratio, ratio * (1 + wide)))
    views = draw_views(augment, 64, height, width, 3, _generator())
    scale_x, shift_x, scale_y, shift_y = views.crop.double().unbind(1)
    scale_x = scale_x.abs()
    assert bool((scale_x + shift_x.abs() <= 1 + 1e-6).all() and (scale_y + shift_y.abs() <= 1 + 1e-6).all())
    ratios = scale_x * width / (scale_y * height)
    assert ratios.min() >= ratio * (1 - 1e-5) and ratios.max() <= ratio * (1 + wide) * (1 + 1e-5)
    if height == width and augment.crop_ratio == (1.0, 1.0):  # every try fits
        area = scale_x * scale_y
        assert low * (1 - 1e-5) <= area.min() and area.max() <= augment.crop_scale[1] * (1 + 1e-5)


def test_crop_areas_and_ratios_follow_torchvisions_sampler() -> None:
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(4000):  # RandomResizedCrop.get_params without rounding to pixels
        for _ in range(10):
            area, ratio = rng.uniform(0.2, 1.0), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            if math.sqrt(area * ratio) <= 1 and math.sqrt(area / ratio) <= 1:
                break
        else:
            area, ratio = 1.0, 1.0
        areas.append(area)
        ratios.append(ratio)
    crop = draw_views(Augment(), 4000, 32, 32, 3, _generator()).crop.double()
    got_area, got_ratio = crop[:, 0].abs() * crop[:, 2], crop[:, 0].abs() / crop[:, 2]
    for quantile in (0.1, 0.5, 0.9):
        assert abs(np.quantile(got_area, quantile) - np.quantile(areas, quantile)) < 0.03
        assert abs(np.quantile(got_ratio, quantile) - np.quantile(ratios, quantile)) < 0.03


# --- colour ------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
def test_brightness_contrast_saturation_are_pillows(kind: str, factor: float) -> None:
    images = _noise(1, 3, 24, 24, 60, 180)  # not clipped at any of the factors
    views = {
        "Brightness": _colour_views(factor, 1.0, 0.0, 0.0),
        "Contrast": _colour_views(factor, 1.0, 0.0, 1 - factor),
        "Color": _colour_views(1.0, factor, 0.0, 0.0),
    }[kind]
    wanted = _array(getattr(ImageEnhance, kind)(_pil(images[0])).enhance(factor))
    assert np.abs(_pixels(images, views)[0] - wanted).max() < 1.6 * LEVEL


def test_gray_is_pillows_luminance() -> None:
    images = _noise(1, 3, 24, 24)
    augment = PLAIN.model_copy(update={"gray": 1.0})
    got = _pixels(images, draw_views(augment, 1, 24, 24, 3, _generator()))[0]
    wanted = _array(_pil(images[0]).convert("L"))
    assert np.abs(got - wanted).max() < 1.1 * LEVEL
    assert np.abs(got - got[:1]).max() < 1e-6


def _hue_loop(pixel: np.ndarray, turn: float) -> list[float]:
    """One RGB pixel turned in YIQ, step by step."""
    r, g, b = pixel
    y = 0.299 * r + 0.587 * g + 0.114 * b
    i = 0.595716 * r - 0.274453 * g - 0.321263 * b
    q = 0.211456 * r - 0.522591 * g + 0.311135 * b
    length, angle = math.hypot(i, q), math.atan2(q, i) - 2 * math.pi * turn
    i, q = length * math.cos(angle), length * math.sin(angle)
    return [y + 0.9563 * i + 0.6210 * q, y - 0.2721 * i - 0.6474 * q, y - 1.1070 * i + 1.7046 * q]


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.07, 0.25])
def test_hue_turns_in_yiq(turn: float) -> None:
    images = _noise(1, 3, 6, 6, 100, 150)
    got = _pixels(images, _colour_views(1.0, 1.0, turn, 0.0))[0]
    for y in range(6):
        for x in range(6):
            wanted = _hue_loop(images[0, :, y, x].numpy() / 255, turn)
            np.testing.assert_allclose(got[:, y, x], wanted, atol=2e-4)


def test_hue_keeps_gray_and_luminance_and_goes_from_red_to_green() -> None:
    turns = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)
    matrix = colour_matrix(torch.ones_like(turns), torch.ones_like(turns), turns, 3)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(2), torch.ones(11, 3, dtype=torch.float64))
    torch.testing.assert_close(luma @ matrix, luma.expand(11, 3))
    third = torch.full((1,), 1 / 3, dtype=torch.float64)
    red = colour_matrix(third / third, third / third, third, 3)[0, :, 0]
    assert int(red.argmax()) == 1


def test_the_colour_operations_commute() -> None:
    def matrix(gain: float, saturation: float, turn: float) -> Tensor:
        one = torch.ones(1, dtype=torch.float64)
        return colour_matrix(gain * one, saturation * one, turn * one, 3)[0]

    together = matrix(1.3, 0.6, 0.2)
    torch.testing.assert_close(matrix(1.3, 1, 0) @ matrix(1, 0.6, 0) @ matrix(1, 1, 0.2), together)
    torch.testing.assert_close(matrix(1, 1, 0.2) @ matrix(1, 0.6, 0) @ matrix(1.3, 1, 0), together)


def test_colours_are_clipped_once_at_the_end() -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    assert _pixels(images, _colour_views(1.4, 1.0, 0.0, 0.0)).max() == 1.0
    darker_then_brighter = _colour_views(1.4 * 0.5, 1.0, 0.0, 0.0)
    np.testing.assert_allclose(_pixels(images, darker_then_brighter), 0.7 * 200 / 255, rtol=1e-5)


# --- blur --------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_a_gaussian_filter(sigma: float, channels: int) -> None:
    images = _noise(2, channels, 19, 23)
    augment = PLAIN.model_copy(update={"crop_ratio": (23 / 19, 23 / 19), "blur": 1.0, "blur_sigma": (sigma, sigma)})
    got = _pixels(images, draw_views(augment, 2, 19, 23, channels, _generator()))
    wanted = ndimage.gaussian_filter(images.numpy() / 255, (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    np.testing.assert_allclose(got, wanted, atol=2e-3)


def test_blur_keeps_a_flat_image_and_may_be_wider_than_the_image() -> None:
    flat = torch.full((2, 3, 8, 8), 90, dtype=torch.uint8)
    augment = PLAIN.model_copy(update={"blur": 1.0, "blur_sigma": (5.0, 9.0)})
    got = _pixels(flat, draw_views(augment, 2, 8, 8, 3, _generator()))
    np.testing.assert_allclose(got, 90 / 255, rtol=1e-5)


# --- draws -------------------------------------------------------------------------


def test_parameters_differ_between_samples() -> None:
    views = draw_views(Augment(jitter=1.0, gray=0.0, blur=1.0, blur_sigma=(0.5, 2.0)), 64, 32, 32, 3, _generator())
    assert views.colour is not None and views.offset is not None and views.kernel is not None
    for values in (*views.crop.unbind(1), views.colour[:, 0, 1], views.offset, views.kernel[:, 0]):
        assert len(set(values.tolist())) == 64
    images = _noise(1, 3, 32, 32).expand(64, -1, -1, -1)
    assert len({view.tobytes() for view in _pixels(images, views)}) == 64


@pytest.mark.parametrize("name", ["flip", "jitter", "gray", "blur"])
def test_probability_zero_one_and_between(name: str) -> None:
    def happened(probability: float) -> Tensor:
        augment = PLAIN.model_copy(update={name: probability, "blur_sigma": (0.5, 2.0)})
        views = draw_views(augment, 400, 16, 16, 3, _generator())
        if name == "flip":
            return views.crop[:, 0] < 0
        if name == "blur":
            return torch.zeros(400, dtype=torch.bool) if views.kernel is None else views.kernel[:, 0] < 1
        if views.colour is None:
            return torch.zeros(400, dtype=torch.bool)
        return (views.colour - torch.eye(3)).abs().amax((1, 2)) > 1e-6

    assert int(happened(0.0).sum()) == 0
    assert int(happened(1.0).sum()) == 400
    assert 0.22 < float(happened(0.3).float().mean()) < 0.38


def test_without_colour_and_blur_nothing_is_drawn_for_them() -> None:
    views = draw_views(PLAIN, 4, 16, 16, 3, _generator())
    assert views.colour is None and views.offset is None and views.kernel is None


def test_same_generator_same_views_and_no_global_generator() -> None:
    images = _noise(16, 3, 16, 16)
    torch.manual_seed(1)
    first = _pixels(images, draw_views(ALL, 16, 16, 16, 3, _generator(3)))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = _pixels(images, draw_views(ALL, 16, 16, 16, 3, _generator(3)))
    other = _pixels(images, draw_views(ALL, 16, 16, 16, 3, _generator(4)))
    assert (first == second).all() and not (first == other).all()
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_one_strength_leaves_the_other_draws_alone() -> None:
    few = draw_views(Augment(gray=0.0, blur=0.0), 32, 16, 16, 3, _generator())
    many = draw_views(Augment(gray=0.0, blur=0.9, hue=0.4), 32, 16, 16, 3, _generator())
    assert few.offset is not None and many.offset is not None
    assert torch.equal(few.crop, many.crop) and torch.equal(few.offset, many.offset)


# --- batches -----------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    size=st.sampled_from([(9, 9), (28, 28), (32, 32), (17, 40)]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_views_applied_in_parts_and_in_any_order_equal_the_whole(
    size: tuple[int, int], channels: int, seed: int
) -> None:
    count = 12
    images = _noise(count, channels, *size)
    mean, std = torch.full((channels,), 0.4), torch.full((channels,), 0.23)
    views = draw_views(ALL, count, *size, channels, _generator(seed))
    whole = apply_views(images, views, mean, std)
    for ranks in (2, 3, 12):
        b = count // ranks
        parts = [apply_views(images[i : i + b], views.slice(i, i + b).to("cpu"), mean, std) for i in range(0, count, b)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(count, generator=_generator(seed))
    assert torch.equal(apply_views(images[order], views.take(order), mean, std), whole[order])


def test_a_batch_larger_than_a_chunk_equals_its_parts() -> None:
    images = _noise(150, 3, 32, 32)  # two chunks on a CPU
    views = draw_views(ALL, 150, 32, 32, 3, _generator())
    one_by_one = [_pixels(images[i : i + 1], views.slice(i, i + 1)) for i in range(150)]
    assert (np.concatenate(one_by_one) == _pixels(images, views)).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_views_in_parts_and_nearly_the_cpus() -> None:
    images, views = _noise(96, 3, 32, 32), draw_views(ALL, 96, 32, 32, 3, _generator())
    mean, std = torch.zeros(3), torch.ones(3)
    on_gpu = [tensor.cuda() for tensor in (images, mean, std)]
    whole = apply_views(on_gpu[0], views.to("cuda"), *on_gpu[1:])
    parts = [
        apply_views(on_gpu[0][i : i + 24], views.slice(i, i + 24).to("cuda"), *on_gpu[1:]) for i in range(0, 96, 24)
    ]
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole.cpu(), apply_views(images, views, mean, std), atol=1e-4, rtol=0)


def test_normalisation_and_the_centre_view() -> None:
    images = _noise(4, 3, 10, 10)
    before = images.clone()
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    wanted = (images.numpy() / 255 - mean[:, None, None].numpy()) / std[:, None, None].numpy()
    np.testing.assert_allclose(centre_view(images, mean, std).numpy(), wanted, rtol=1e-4, atol=1e-5)
    plain = apply_views(images, draw_views(PLAIN, 4, 10, 10, 3, _generator()), mean, std)
    np.testing.assert_allclose(plain.numpy(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(images, before) and plain.dtype == torch.float32


def test_one_channel_images_stay_one_channel() -> None:
    images = _noise(8, 1, 28, 28)
    got = _pixels(images, draw_views(ALL, 8, 28, 28, 1, _generator()))
    assert got.shape == (8, 1, 28, 28) and got.min() >= 0 and got.max() <= 1
    gray_only = PLAIN.model_copy(update={"gray": 1.0})
    kept = _pixels(images, draw_views(gray_only, 8, 28, 28, 1, _generator()))
    np.testing.assert_allclose(kept, images.numpy() / 255, atol=1e-5)


def test_an_empty_batch_and_wrong_numbers() -> None:
    views = draw_views(ALL, 4, 8, 8, 3, _generator())
    mean, std = torch.zeros(3), torch.ones(3)
    assert apply_views(_noise(4, 3, 8, 8)[:0], views.slice(0, 0), mean, std).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="3 images but 4 views"):
        apply_views(_noise(3, 3, 8, 8), views, mean, std)
    with pytest.raises(ValueError, match="channels is 4, but must be 1 or 3"):
        draw_views(ALL, 4, 8, 8, 4, _generator())
