"""Task `distill`: students that learn from a fine-tuned network's opinion of images without labels.

SimCLR v2 (Chen et al. 2020, section 2, equation 2): the teacher, fine-tuned with 10 % of the labels, is fixed, and a
student minimises ``- sum over y of p_T(y | x; tau) log p_S(y | x; tau)`` on all training images; no label is used.
Both see the same random crop. The teacher's own accuracy stands in the rows of task `finetune`.

How students start. `self`, the student of the teacher's own architecture, starts where the teacher did: from the
network that learnt without labels (encoder `trained`) or from its random weights (encoder `supervised`). A smaller
student has nothing to start from but random weights. The paper gives students the steps of a whole pretraining (400
epochs), after which the start matters little; here there are a few epochs.
Legend: b batch; Y classes; p_T, p_S teacher's and student's probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpcl.downstream.bench import Bench
from hpcl.downstream.finetune import asked, refusal, teacher
from hpcl.downstream.labels import percent
from hpcl.downstream.recipes import DISTILL, FINE_TUNE, FROM_SCRATCH, Recipe
from hpcl.downstream.scores import Encoder, Score
from hpcl.downstream.supervised import Classifier, accuracy, descend, new_classifier
from hpcl.model import Network, build_network
from hpcl.rng import seed_of
from hpcl.sections import Model

__all__ = ["FRACTION", "TASK", "distil", "distillation_loss", "refusal", "run", "smaller"]

TASK = "distill"

FRACTION = 0.1
"""Of the labels that the teacher saw."""


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of ``- sum over y of p_T log p_S``, both softened: p = softmax(logits / tau).

    Its gradient by the student's logits is ``(p_S - p_T) / (tau b)``. It is least, the teacher's entropy, where both
    agree. (Hinton et al. 2015 multiply by tau^2; SimCLR v2 does not.)

    Args:
        student: (b, Y) logits.
        teacher: (b, Y) logits; no gradient goes there.
        temperature: tau > 0.

    Returns:
        Scalar, float32 at least.
    """
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    targets = (teacher.detach() / temperature).softmax(1)
    return -(targets * (student / temperature).log_softmax(1)).sum(1).mean()


def smaller(model: Model) -> tuple[str, Model]:
    """The next smaller architecture, in words and as a configuration.

    A convnet of half the width (4 at least); for a ResNet of 50 layers or more (torchvision's or timm's) resnet18, for
    every other network a convnet of width 32.
    """
    if model.backbone == "convnet":
        width = max(4, model.width // 2)
        return f"convnet, width {width}", model.model_copy(update={"width": width})
    layers = re.search(r"resnex?t(\d+)", model.backbone)
    deep = layers is not None and int(layers.group(1)) >= 50
    if deep:
        return "resnet18", model.model_copy(update={"backbone": "resnet18"})
    return "convnet, width 32", model.model_copy(update={"backbone": "convnet", "width": 32})


def run(
    bench: Bench,
    encoders: Sequence[Encoder],
    seed: int,
    recipe: Recipe = DISTILL,
    fine_tune: Recipe = FINE_TUNE,
    from_scratch: Recipe = FROM_SCRATCH,
) -> list[Score]:
    """Two scores per encoder; `trained`, distilled into itself, is the task's value.

    Args:
        bench: images, networks, and the part that is scored.
        encoders: whose fine-tuned network teaches, of `trained`, `untrained` or `supervised` (both: a teacher from
            scratch, given as `supervised`); others give nothing.
        seed: of the teacher's labels and training, and of the students.
        recipe: of the students.
        fine_tune, from_scratch: of the teachers, as in task `finetune`.
    """
    scores = []
    name, model = smaller(bench.config.model)
    channels, height, width = bench.images.images.shape[1:]
    for encoder in asked(encoders, ("trained", "supervised")):
        taught_by = teacher(bench, encoder, FRACTION, seed, fine_tune, from_scratch)
        alike = bench.network("trained", seed) if encoder == "trained" else bench.untrained(seed)
        small = build_network(
            model, bench.config.head, channels, seed_of(seed, "small-student"), None, (height, width)
        ).to(bench.world.device)
        for kind, start in (("self", alike), (f"smaller ({name})", small)):
            student = distil(bench, taught_by, start, recipe, seed)
            setting = f"{kind}, {percent(FRACTION)}"
            value, count = accuracy(bench, student), len(bench.ids(bench.split))
            scores.append(Score(TASK, setting, "accuracy", encoder, seed, value, count))
    return scores


def distil(bench: Bench, taught_by: Classifier, start: Network, recipe: Recipe, seed: int) -> Classifier:
    """A student after training on all training images by its teacher's probabilities; in eval mode.

    Args:
        bench: images and their augmentation, device; no label is looked at.
        taught_by: the teacher, in eval mode.
        start: the student's network; left as it is.
        recipe: how long and how fast, and tau.
        seed: of order, views and layers that draw.
    """
    student = new_classifier(bench, start, recipe)

    def loss(views: Tensor, places: Tensor) -> Tensor:
        with torch.no_grad():
            targets = taught_by(views)
        return distillation_loss(student(views), targets, recipe.temperature)

    descend(bench, student, np.asarray(bench.ids("train")), recipe, seed_of(seed, "student"), loss)
    return student
