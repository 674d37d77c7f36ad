"""torch.compile for the networks of a run (`runtime.compile`)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch
from torch import nn

from hpcl.errors import UserError


def compile_calls(*networks: nn.Module, device: torch.device) -> None:
    """Compile what calling these networks does, in place; names in their state dicts stay as they are.

    torch compiles at the first call, and again when a stage freezes or thaws a part. What other runs of this
    process compiled is dropped: torch keeps no more than eight versions of a network's call, and a run needs six.

    Raises:
        UserError: the compiler that torch needs is not there.
    """
    if device.type == "cuda":
        needed, there = "the package triton", importlib.util.find_spec("triton") is not None
    else:
        needed = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        there = shutil.which(needed) is not None
    if not there:
        raise UserError(f"runtime.compile is true, which needs {needed}; install it, or set it to false")
    torch.compiler.reset()
    for network in networks:
        network.compile()
