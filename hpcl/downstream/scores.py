"""What a downstream task gives: one row per measured value. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Encoder = Literal["trained", "untrained", "pixels", "supervised", "sgan"]
"""What is measured, or what it is compared with.

- `trained`: the checkpoint's query network.
- `untrained`: the same network with the random weights it would start from.
- `pixels`: no network; the normalised image itself is the feature vector.
- `supervised`: the same network trained from scratch on the same labels that the task uses.
- `sgan`: a semi-supervised GAN trained from scratch on the same labels.
"""

BASELINES: tuple[Encoder, ...] = ("untrained", "pixels", "supervised")


@dataclass(frozen=True)
class Score:
    """One value of one task, measured once."""

    task: str
    """Name of the task, such as `linear`."""
    setting: str
    """What of it, such as `1 %` (of the labels) or `5-way 1-shot, nearest centroid`."""
    measure: str
    """`accuracy`, `AMI`, `mAP (11-point)`, ..."""
    encoder: Encoder
    seed: int
    """Of the task: label lists, episodes, random starts."""
    value: float
    """0..1 (AMI and ARI can be below 0)."""
    count: int
    """Images, episodes or objects that were scored."""
    ci95: float | None = None
    """Half-width of the 95 % interval of this one value where the task knows it (episodes)."""

    @property
    def variance(self) -> float:
        """Of this one value, from the things it was scored on; 0 where nothing is known of it."""
        if self.ci95 is not None:
            return (self.ci95 / 1.96) ** 2
        if self.measure == "accuracy" and self.count:
            return self.value * (1 - self.value) / self.count
        return 0.0

    @property
    def is_finite(self) -> bool:
        """Whether there is a value at all."""
        return math.isfinite(self.value)


LABELS_USED: dict[str, str] = {
    "knn": "the labels of all training images vote",
    "linear": "a linear classifier is fitted to the labels of all training images",
    "fewshot": "1 or 5 labels of each class at a time, of classes that never occur in training",
    "finetune": "1 % and 10 % of the training images' labels",
    "distill": "10 % of the training images' labels, for the teacher",
    "sgan": "1 % and 10 % of the training images' labels",
    "clusters": "the labels of all training images, only to compare clusters with; none is fitted to",
    "voc": "which objects the trainval images show",
    "detection": "the boxes of the trainval images",
}
"""Tasks, in the order of their tables, and which labels they use besides those of the scored images."""

TASK_NAMES = tuple(LABELS_USED)

VOC_TASKS = ("voc", "detection")
"""Tasks on a folder in VOC form, not on the images of the run."""

WITHOUT_SEED = ("knn", "linear")
"""Tasks that draw nothing: a trained network's value, and that of pixels, is the same for every seed."""

OBJECTIVES = tuple(f"{task}@val" for task in ("knn", "linear", "fewshot", "finetune", "distill", "clusters"))
"""Tasks that can choose the best trial of a search (`search.objective`): their first score, on validation images."""
