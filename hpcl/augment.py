"""Random views of images, drawn on the CPU and applied in one batch on the device.

Every parameter is drawn per sample (:func:`draw_views`), for the whole global batch
from one generator; each rank then applies its own part (:func:`apply_views`). All
arithmetic on pixels is elementwise or a sum inside one image, never a matrix product
or convolution over the batch, so a view does not depend on what else is in the batch:
views applied in parts, in any order, equal the whole bit for bit.

The order is that of SimCLR (Chen et al. 2020) and MoCo v2: random resized crop, flip,
colour jitter, gray, blur. Two readings differ from torchvision's, both documented at
:func:`colour_matrix`: hue turns in YIQ instead of HSV, and values are clipped to
[0, 1] once after all colour operations instead of after each.

Legend: n images, C channels (1 or 3), H W height and width, R blur radius in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcl.sections import Augment

_ATTEMPTS = 10
"""Tries for a crop that fits, as in torchvision's RandomResizedCrop."""

_CHUNK = 1 << 18
"""Pixel values augmented at a time on a CPU, so that they stay in its cache."""

_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance (ITU-R BT.601, Pillow's "L")."""

_YIQ = np.array([_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
"""From RGB to luminance Y and the colour plane (I, Q) (NTSC)."""

_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ
"""K of :func:`colour_matrix`: a quarter turn of the colour plane, on RGB, with gray sent to 0."""


@dataclass(frozen=True)
class Views:
    """The random parameters of n views; see :func:`draw_views`."""

    crop: Tensor
    """(n, 4) float32: scale x, shift x, scale y, shift y. Output place u in [-1, 1]
    reads input place scale u + shift; a negative scale x is a flip."""
    colour: Tensor | None
    """(n, C, C) float32 colour matrix A, or None where no colour changes."""
    offset: Tensor | None
    """(n,) float32 factor on the view's mean luminance m: x -> A x + offset m; None with `colour`."""
    kernel: Tensor | None
    """(n, R + 1) float32 half of each view's blur kernel, from its centre outwards; the
    full kernel sums to 1, (1, 0, 0, ...) is no blur. None where nothing is blurred."""

    def __len__(self) -> int:
        return len(self.crop)

    def take(self, rows: Tensor) -> Views:
        """The views at these places (long), in this order."""
        return self._map(lambda values: values[rows])

    def slice(self, start: int, stop: int) -> Views:
        """The views from place `start` up to, without, `stop`."""
        return self._map(lambda values: values[start:stop])

    def to(self, device: torch.device | str) -> Views:
        """The same views on another device."""
        return self._map(lambda values: values.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Views:
        colour, offset, kernel = (
            None if values is None else change(values) for values in (self.colour, self.offset, self.kernel)
        )
        return Views(change(self.crop), colour, offset, kernel)


def draw_views(
    augment: Augment, count: int, height: int, width: int, channels: int, generator: torch.Generator
) -> Views:
    """Draws the parameters of `count` views, each view's apart from the others'.

    Each view takes the same number of random numbers whatever the probabilities and
    ranges are, so two configurations that differ in one strength share all other draws.

    Args:
        augment: ranges and probabilities.
        count: n, views to draw (the global batch).
        height: H of the images, pixels.
        width: W of the images, pixels.
        channels: C, 1 or 3.
        generator: CPU generator; the only source of randomness.

    Returns:
        Views on the CPU.

    Raises:
        ValueError: `channels` is neither 1 nor 3.

    >>> views = draw_views(Augment(), 8, 32, 32, 3, torch.Generator().manual_seed(0))
    >>> tuple(views.crop.shape), tuple(views.colour.shape), views.kernel
    ((8, 4), (8, 3, 3), None)
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, but must be 1 or 3")
    draws = torch.rand(count, 2 * _ATTEMPTS + 11, generator=generator, dtype=torch.float64)
    sizes, rest = draws[:, : 2 * _ATTEMPTS].view(count, _ATTEMPTS, 2), draws[:, 2 * _ATTEMPTS :]
    place_x, place_y, flip, jitter, *strengths, gray, blur, sigma = rest.unbind(1)

    w, h = _crop_size(augment, sizes[..., 0], sizes[..., 1], height, width)
    scale_x, scale_y = w / width, h / height
    # The box starts at place * (1 - scale) of the image; its centre, in [-1, 1]:
    shift_x = (2 * place_x - 1) * (1 - scale_x)
    shift_y = (2 * place_y - 1) * (1 - scale_y)
    scale_x = torch.where(flip < augment.flip, -scale_x, scale_x)
    crop = torch.stack([scale_x, shift_x, scale_y, shift_y], 1).float()

    colour = offset = kernel = None
    if augment.jitter > 0 or augment.gray > 0:
        jittered = jitter < augment.jitter
        spreads = (augment.brightness, augment.contrast, augment.saturation)
        brightness, contrast, saturation = (
            torch.where(jittered, 1 + spread * (2 * value - 1), 1.0)
            for spread, value in zip(spreads, strengths[:3], strict=True)
        )
        turn = torch.where(jittered, augment.hue * (2 * strengths[3] - 1), 0.0)
        saturation = torch.where(gray < augment.gray, 0.0, saturation)
        colour = colour_matrix(brightness * contrast, saturation, turn, channels).float()
        offset = (brightness * (1 - contrast)).float()
    if augment.blur > 0:
        low, high = augment.blur_sigma
        chosen = torch.where(blur < augment.blur, low + (high - low) * sigma, 0.0)
        kernel = _blur_kernel(chosen, radius=math.ceil(4 * high)).float()
    return Views(crop, colour, offset, kernel)


def apply_views(images: Tensor, views: Views, mean: Tensor, std: Tensor) -> Tensor:
    """Augmented, normalised images of the size of the given ones.

    Args:
        images: uint8 (n, C, H, W).
        views: n views on the device of `images`.
        mean: float32 (C,) of the training images, in 0..1 units, on the device.
        std: float32 (C,), the same way.

    Returns:
        float32 (n, C, H, W): (view - mean) / std.

    Raises:
        ValueError: the numbers of images and views differ.
    """
    count, channels, height, width = images.shape
    if count != len(views):
        raise ValueError(f"{count} images but {len(views)} views")
    step = count if images.device.type != "cpu" else max(1, _CHUNK // (channels * height * width))
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for start in range(0, count, max(step, 1)):
        part = views.slice(start, start + step)
        values = _crop(images[start : start + step].float().div_(255), part.crop)
        if part.colour is not None and part.offset is not None:
            values = _recolour(values, part.colour, part.offset)
        if part.kernel is not None and not values.is_cuda:
            blurred = torch.nonzero(part.kernel[:, 0] < 1)[:, 0]
            values[blurred] = _blur(values[blurred], part.kernel[blurred])
        elif part.kernel is not None:
            values = _blur(values, part.kernel)  # all of them: choosing would wait for the device
        _normalise(values, mean, std, out[start : start + step])
    return out


def centre_view(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The images themselves, normalised: uint8 (n, C, H, W) to float32 (x/255 - mean)/std."""
    values = images.float().div_(255)
    return _normalise(values, mean, std, values)


def colour_matrix(gain: Tensor, saturation: Tensor, turn: Tensor, channels: int) -> Tensor:
    """(n, C, C) matrix of brightness, contrast, saturation, gray and hue together.

    With luminance weights w and 1 = (1, 1, 1): brightness b multiplies, contrast c blends
    with the view's mean luminance, saturation s blends with each pixel's luminance
    (s = 0 is gray), hue turns the (I, Q) plane of YIQ, which keeps luminance and grays:

        A = b c (1 w^T + s (cos a (E - 1 w^T) + sin a K)),   a = 2 pi turn
        view = clip(A x + (1 - c) b m, 0, 1),                m = mean of w^T x

    The four operations commute except for clipping, so a random order of them
    (torchvision's ColorJitter) would change clipped pixels only. torchvision turns hue in
    HSV, which is not linear and changes the luminance.

    Args:
        gain: float64 (n,), brightness times contrast.
        saturation: float64 (n,).
        turn: float64 (n,), in turns; positive goes from red to green to blue.
        channels: C; for 1 channel only the gain acts.
    """
    if channels == 1:
        return gain[:, None, None]
    to_gray = torch.tensor(_LUMA, dtype=gain.dtype).expand(3, 3)
    across = torch.from_numpy(_QUARTER_TURN).to(gain.dtype)
    angle = 2 * math.pi * turn[:, None, None]
    chroma = torch.cos(angle) * (torch.eye(3, dtype=gain.dtype) - to_gray) + torch.sin(angle) * across
    return gain[:, None, None] * (to_gray + saturation[:, None, None] * chroma)


def _crop_size(augment: Augment, areas: Tensor, ratios: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(n,) width and height in pixels: the first of the tries (n, tries) that fits, else the largest allowed."""
    low, high = augment.crop_scale
    area = (low + (high - low) * areas) * height * width
    log_low, log_high = math.log(augment.crop_ratio[0]), math.log(augment.crop_ratio[1])
    ratio = torch.exp(log_low + (log_high - log_low) * ratios)
    w, h = torch.sqrt(area * ratio), torch.sqrt(area / ratio)
    # Rounding must not refuse the whole image (area 1, ratio 1).
    fits = (w <= width * (1 + 1e-9)) & (h <= height * (1 + 1e-9))
    first = torch.argmax(fits.to(torch.uint8), 1, keepdim=True)
    whole = min(max(width / height, augment.crop_ratio[0]), augment.crop_ratio[1])
    any_fits = fits.any(1)
    chosen_w = torch.where(any_fits, w.gather(1, first)[:, 0], min(width, height * whole))
    chosen_h = torch.where(any_fits, h.gather(1, first)[:, 0], min(height, width / whole))
    return chosen_w.clamp(max=width), chosen_h.clamp(max=height)


def _crop(values: Tensor, crop: Tensor) -> Tensor:
    """Bilinear resampling (n, C, H, W) at the places of `crop` (n, 4).

    The grid is written out elementwise: torch's affine_grid is a batched matrix product,
    whose last bits depend on the batch.
    """
    count, _, height, width = values.shape
    scale_x, shift_x, scale_y, shift_y = crop.unsqueeze(2).unbind(1)
    grid = torch.empty(count, height, width, 2, dtype=values.dtype, device=values.device)
    grid[..., 0] = (_centres(width, values) * scale_x + shift_x)[:, None, :]
    grid[..., 1] = (_centres(height, values) * scale_y + shift_y)[:, :, None]
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _centres(size: int, like: Tensor) -> Tensor:
    """(size,) places of the pixel centres in [-1, 1]."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


def _recolour(values: Tensor, colour: Tensor, offset: Tensor) -> Tensor:
    """clip(A x + offset m, 0, 1) on values (n, C, H, W); A (n, C, C), offset (n,)."""
    channels = values.shape[1]
    # Row sums in float32, then float64: the order of summation cannot show in float32.
    means = values.sum(3).sum(2, dtype=torch.float64) / (values.shape[2] * values.shape[3])
    luminance = means[:, 0]
    if channels == 3:
        luminance = _LUMA[0] * means[:, 0] + _LUMA[1] * means[:, 1] + _LUMA[2] * means[:, 2]
    matrix = colour[..., None, None]
    out = values[:, 0:1] * matrix[:, :, 0]
    for c in range(1, channels):
        out += values[:, c : c + 1] * matrix[:, :, c]
    out += (offset * luminance.float())[:, None, None, None]
    return out.clamp_(0, 1)


def _blur_kernel(sigma: Tensor, radius: int) -> Tensor:
    """(n, radius + 1) half kernels of a Gaussian, exp(-k^2 / 2 sigma^2) cut at 4 of the largest sigma."""
    distance = torch.arange(radius + 1, dtype=sigma.dtype)
    tiny = 1e-3  # in place of 0, where the kernel is the identity
    half = torch.exp(-0.5 * (distance / sigma.clamp(min=tiny)[:, None]) ** 2)
    return half / (2 * half.sum(1, keepdim=True) - 1)


def _blur(values: Tensor, kernel: Tensor) -> Tensor:
    """Separable blur of values (n, C, H, W) with half kernels (n, R + 1); the border pixel goes on outside.

    Sums of shifted images instead of a grouped convolution: same speed in cache, and the
    same bits for every batch.
    """
    radius = kernel.shape[1] - 1
    weights = kernel[:, :, None, None, None].unbind(1)
    for axis, padding in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        size = values.shape[axis]
        padded = F.pad(values, padding, mode="replicate")
        values = padded.narrow(axis, radius, size) * weights[0]
        for k in range(1, radius + 1):
            pair = padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)
            values += pair.mul_(weights[k])
    return values


def _normalise(values: Tensor, mean: Tensor, std: Tensor, out: Tensor) -> Tensor:
    """(values - mean) / std per channel, written into `out`; changes `values`."""
    return torch.div(values.sub_(mean[:, None, None]), std[:, None, None], out=out)
