"""What a configuration asks of its images and ranks, once their numbers are known."""

from __future__ import annotations

from hpcl.config import Config
from hpcl.methods import METHODS


def data_problems(config: Config, num_images: int, ranks: int = 1) -> list[str]:
    """What is wrong with a config once the number of training images and ranks is known.

    Args:
        config: the run's configuration.
        num_images: N, training images after `subset` and the held-out parts.
        ranks: processes that share the batch.

    Returns:
        One sentence per problem; empty if the run can start.
    """
    problems = []
    batch = config.optimizer.batch
    if batch % ranks:
        problems.append(f"optimizer.batch is {batch}, but must be a multiple of the number of workers ({ranks})")
    elif (batch // ranks) % config.model.bn_splits:
        problems.append(
            f"model.bn_splits is {config.model.bn_splits}, but must divide a worker's batch ({batch // ranks})"
        )
    elif batch // ranks // config.model.bn_splits < 2:
        problems.append(
            f"optimizer.batch is {batch}, but must leave at least 2 images to each of {ranks} workers times "
            f"{config.model.bn_splits} model.bn_splits: BatchNorm cannot normalise one"
        )
    if batch > num_images:
        problems.append(f"optimizer.batch is {batch}, but there are only {num_images} training images")
    method = METHODS[config.method]
    if method.has_queue and config.moco.queue > num_images // 2:
        most = num_images // 2 // batch * batch
        advice = f"; {most} is the largest that fits a batch of {batch}" if most else "; lower optimizer.batch as well"
        problems.append(
            f"moco.queue is {config.moco.queue}, but may be at most half of the {num_images} training images{advice}"
        )
    counts = config.clusters.counts
    if method.prototypes and counts is not None and counts[-1] > num_images:
        problems.append(f"clusters.counts is {list(counts)}, but there are only {num_images} training images")
    elif method.prototypes and counts is None and config.clusters.first > num_images:
        problems.append(f"clusters.first is {config.clusters.first}, but there are only {num_images} training images")
    reference = config.meters.reference_clusters
    usable = min(num_images, config.meters.images)
    if reference is not None and reference > usable:
        problems.append(f"meters.reference_clusters is {reference}, but the meter clusters only {usable} images")
    return problems
