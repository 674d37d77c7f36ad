"""Batches of an image set on a device: out of the device's memory, or streamed from the mapped file.

Legend: N images of the set, n images of a batch, C channels (1 or 3), H W height and width.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from hpcl.data.image_set import ImageSet
from hpcl.data.labels import Ids
from hpcl.files import bytes_in_words

MOST_AHEAD = 4
"""Batches that are fetched ahead at most: a step's keys and queries, each of which may be in another order."""


class DeviceImages:
    """Batches of an image set on a device.

    On a GPU all images are copied there once if they fit; else, and on a CPU, every batch is gathered from the
    mapped file. What is asked for with :meth:`prefetch` is gathered in a thread meanwhile (and pinned, for a GPU):
    on a GPU, and where the file is too large to stay in memory. Gathering from memory takes a millisecond, which
    a CPU that trains can do as well itself.

    Args:
        data: the images.
        device: where batches are wanted.
        share: largest part of a GPU's free memory the images may take.
        ahead: whether to prefetch; None: where it helps.
    """

    def __init__(
        self, data: ImageSet, device: torch.device | str, *, share: float = 0.5, ahead: bool | None = None
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # a thread may have another current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.mean, self.std = (torch.from_numpy(values).to(self.device) for values in (data.mean, data.std))
        """(C,) of the training images, as :attr:`ImageSet.mean` and `std`, on the device."""
        self._map = data.images
        self._why = ""
        self._held = self._copy(share) if self.device.type == "cuda" else None
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        large = self._map.nbytes > memory / 2
        if large and self.device.type == "cpu":
            self._why = f" > half of this machine's {bytes_in_words(memory)}"
        self.prefetches = self._held is None and (self.device.type == "cuda" or large if ahead is None else ahead)
        """Whether :meth:`prefetch` does anything."""
        self._thread: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._ahead: deque[tuple[Ids, Future[Tensor]]] = deque()

    @property
    def resident(self) -> bool:
        """Whether all images lie in the device's own memory."""
        return self._held is not None

    def describe(self) -> str:
        """Where batches come from, such as ``images on the GPU: 380 MB``."""
        size = bytes_in_words(self._map.nbytes)
        if self.resident:
            return f"images on the GPU: {size}"
        if self.prefetches:
            return f"images streamed from the mapped file with prefetch: {size}{self._why}"
        return f"images read from the mapped file: {size}{self._why}"

    def batch(self, ids: Ids | Tensor) -> Tensor:
        """uint8 (n, C, H, W) on the device: the images at these places (long), in their order."""
        wanted = torch.as_tensor(ids)
        if self._held is not None:
            return self._held.index_select(0, wanted.to(self.device, non_blocking=True))
        rows = self._fetched(wanted.cpu().numpy())
        return rows if self.device.type == "cpu" else rows.to(self.device, non_blocking=True)

    def prefetch(self, ids: Ids | Tensor) -> None:
        """Begin to gather a batch in the background; :meth:`batch` with the same places takes it."""
        if not self.prefetches:
            return
        wanted = torch.as_tensor(ids).cpu().numpy()
        if self._thread is None or self._process != os.getpid():  # a fork has none of its parent's threads
            self._thread, self._process = ThreadPoolExecutor(1, thread_name_prefix="hpcl-prefetch"), os.getpid()
            self._ahead.clear()
        if any(np.array_equal(asked, wanted) for asked, _ in self._ahead):
            return
        while len(self._ahead) >= MOST_AHEAD:
            self._ahead.popleft()[1].cancel()
        self._ahead.append((wanted, self._thread.submit(self._gather, wanted)))

    def close(self) -> None:
        """End the thread that fetches ahead, if there is one; a later :meth:`prefetch` starts another."""
        self._ahead.clear()
        if self._thread is not None and self._process == os.getpid():
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None

    def _fetched(self, ids: Ids) -> Tensor:
        """The rows, on the CPU: those fetched ahead, or gathered now."""
        if self._process == os.getpid():
            for place, (asked, rows) in enumerate(self._ahead):
                if np.array_equal(asked, ids):
                    del self._ahead[place]
                    return rows.result()
        return self._gather(ids)

    def _gather(self, ids: Ids) -> Tensor:
        rows = torch.from_numpy(self._map[ids])
        if self.device.type != "cuda":
            return rows
        with torch.cuda.device(self.device):  # a thread of its own begins on the first GPU
            return rows.pin_memory()

    def _copy(self, share: float) -> Tensor | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        if self._map.nbytes > share * free:
            part = "half" if share == 0.5 else f"{share:g}"
            self._why = f" > {part} of {bytes_in_words(free)} free"
            return None
        try:
            held = torch.empty(self._map.shape, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:  # another trial took the memory meanwhile
            self._why = ", which the GPU has not free any more"
            return None
        step = max(1, (64 << 20) // max(1, self._map[:1].nbytes))
        for start in range(0, len(self._map), step):
            held[start : start + step] = torch.from_numpy(self._map[start : start + step].copy())
        return held
