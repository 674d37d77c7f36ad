"""Images: decoded once into a mapped file, with labels and parts, and batches of them on a device.

:func:`load` gives what a configuration names; files of this folder in the order of use: `blocks` decodes,
`scratch` keeps what is decoded, `convert` makes of it the file that `store` writes and maps, `parts` divides it.
Torch is imported with :class:`DeviceImages` only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpcl.data.image_set import ImageSet, load
from hpcl.data.labels import Ids
from hpcl.files import cache_folder
from hpcl.sources import DataError

if TYPE_CHECKING:
    from hpcl.data.device import DeviceImages as DeviceImages

__all__ = ["DataError", "DeviceImages", "Ids", "ImageSet", "cache_folder", "load"]


def __getattr__(name: str) -> Any:
    if name == "DeviceImages":
        return import_module("hpcl.data.device").DeviceImages
    raise AttributeError(f"module 'hpcl.data' has no attribute {name!r}")
