"""What `step.py` measures beside this package: lightly's training step, kornia's and torchvision's augmentation.

Only this file imports lightly, kornia and psutil, inside functions: where one is absent, its rows are left out.

Legend: n images, C channels, H W height and width, F backbone features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from hpcl.config import Config
from hpcl.sections import Augment

View = Callable[[Image.Image], Tensor]


class Pictures(Dataset):
    """Images in memory as torchvision's CIFAR10 holds them: Pillow from an array, then the transform.

    Args:
        images: uint8 (n, C, H, W); C is 3.
        count: length of the data set; images repeat.
        transform: what becomes of each image.
    """

    def __init__(self, images: npt.NDArray[np.uint8], count: int, transform: Callable[[Image.Image], object]) -> None:
        self.images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        self.count, self.transform = count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[object, int]:
        if not 0 <= place < self.count:
            raise IndexError(place)
        return self.transform(Image.fromarray(self.images[place % len(self.images)])), 0


class LightlyStep:
    """MoCo out of lightly's parts, put together as in its examples: EMA, queries, keys, loss, update.

    Args:
        backbone: (n, C, H, W) -> (n, F); copied, so that two steps do not share weights.
        feature_dim: F.
        config: head, MoCo and optimizer, of which the same values are taken.
        images: uint8 (n, C, H, W) training images.
        normalize: mean and standard deviation per channel, as torchvision's Normalize takes them.
        device: where it trains.
        precision: `bf16` for autocast, else `fp32`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        config: Config,
        images: npt.NDArray[np.uint8],
        normalize: dict[str, list[float]],
        device: torch.device,
        precision: str,
    ) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.images, self.device, self.bf16 = images, device, precision == "bf16"
        self.config = config
        self.backbone = copy.deepcopy(backbone).requires_grad_(True).to(device)
        self.head = MoCoProjectionHead(feature_dim, config.head.hidden, config.model.dim).to(device)
        self.backbone.to(memory_format=torch.channels_last)  # as this package does
        self.key_backbone, self.key_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
        deactivate_requires_grad(self.key_backbone)
        deactivate_requires_grad(self.key_head)
        self.criterion = NTXentLoss(config.moco.temperature, memory_bank_size=(config.moco.queue, config.model.dim))
        self.criterion.to(device)
        self.parameters = [*self.backbone.parameters(), *self.head.parameters()]
        options = config.optimizer
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=0.06, momentum=options.momentum, weight_decay=options.weight_decay
        )
        self.transform = lightly_views(config.augment, images.shape[2], normalize)
        self.total_loss = torch.zeros((), device=device)

    def batches(self, count: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches of two views, from a loader of its own; its workers end with the iterator."""
        batch = self.config.optimizer.batch
        loader: DataLoader = DataLoader(
            Pictures(self.images, batch * count, self.transform),
            batch_size=batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        for views, _ in loader:
            yield views

    def take(self, views: tuple[Tensor, Tensor]) -> None:
        """One step on the views (n, C, H, W) of queries and keys."""
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.key_backbone, m=self.config.moco.momentum)
        update_momentum(self.head, self.key_head, m=self.config.moco.momentum)
        x_query, x_key = (self._moved(view) for view in views)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            query = self.head(self.backbone(x_query).flatten(start_dim=1))
            with torch.no_grad():
                key = self.key_head(self.key_backbone(x_key).flatten(start_dim=1))
        loss = self.criterion(query.float(), key.float())
        self.total_loss += loss.detach()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _moved(self, view: Tensor) -> Tensor:
        return view.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)


def lightly_views(augment: Augment, size: int, normalize: dict[str, list[float]]) -> Callable[[Image.Image], object]:
    """lightly's MoCoV2Transform with these ranges and probabilities: two views of an image.

    The crop's ratio is torchvision's default there, which is :attr:`Augment.crop_ratio`'s too; gray, flip,
    jitter and blur have the same probabilities, and its colours the same ranges.
    """
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(
        input_size=size,
        cj_prob=augment.jitter,
        cj_strength=1.0,
        cj_bright=augment.brightness,
        cj_contrast=augment.contrast,
        cj_sat=augment.saturation,
        cj_hue=augment.hue,
        min_scale=augment.crop_scale[0],
        random_gray_scale=augment.gray,
        gaussian_blur=augment.blur,
        sigmas=augment.blur_sigma,
        hf_prob=augment.flip,
        normalize=normalize,
    )


class PillowBlur:
    """Pillow's Gaussian blur with a random radius, which lightly uses too."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(np.random.uniform(*self.sigma)))


def torchvision_view(augment: Augment, size: int, normalize: dict[str, list[float]]) -> View:
    """One view by torchvision's first transforms on Pillow images, which are faster there than its v2."""
    jitter = transforms.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps = [
        transforms.RandomResizedCrop(size, scale=augment.crop_scale, ratio=augment.crop_ratio),
        transforms.RandomHorizontalFlip(augment.flip),
        transforms.RandomApply([jitter], augment.jitter),
        transforms.RandomGrayscale(augment.gray),
    ]
    if augment.blur > 0:
        steps.append(transforms.RandomApply([PillowBlur(augment.blur_sigma)], augment.blur))
    view: View = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(**normalize)])
    return view


def kornia_views(augment: Augment, size: int, mean: Tensor, std: Tensor) -> Callable[[Tensor], Tensor]:
    """kornia's batched augmentation, parameters per sample: uint8 (n, C, H, W) -> float32 (n, C, H, W).

    The faster of its kinds: crops by resampling, ColorJitter (torchvision's formulas), a plain Sequential.
    The blur's kernel is as wide as this package's, or as the image where that is smaller.
    """
    from kornia import augmentation as kornia

    colours = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    steps: list[nn.Module] = [
        kornia.RandomResizedCrop(
            (size, size), augment.crop_scale, augment.crop_ratio, align_corners=False, cropping_mode="resample"
        ),
        kornia.RandomHorizontalFlip(p=augment.flip),
        kornia.ColorJitter(*colours, p=augment.jitter),
        kornia.RandomGrayscale(p=augment.gray),
    ]
    if augment.blur > 0:
        width = min(2 * int(np.ceil(4 * augment.blur_sigma[1])) + 1, size - 1 + size % 2)
        steps.append(kornia.RandomGaussianBlur((width, width), augment.blur_sigma, p=augment.blur))
    chain = nn.Sequential(*steps, kornia.Normalize(mean, std)).to(mean.device)

    @torch.no_grad()
    def views(images: Tensor) -> Tensor:
        out: Tensor = chain(images.float().div_(255))
        return out

    return views
