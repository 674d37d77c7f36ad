"""BatchNorm that treats parts of a batch apart, as the ranks of a distributed run do.

Legend: b batch of one rank; C channels or features; H W image; S BatchNorm splits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hpcl.errors import UserError


class SplitBatchNorm(_BatchNorm):
    """BatchNorm that normalises S contiguous chunks of a batch apart, as if each lay on its own GPU.

    The running statistics move towards the mean of the chunks' statistics, which is
    what averaging the buffers of S ranks gives. In eval mode, and in the keys of its
    state dict, it is plain BatchNorm. (MoCo's CIFAR demo interleaves its chunks;
    here chunk s holds images s b/S .. (s+1) b/S, the part that rank s would hold.)
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, C, ...).

        Raises:
            ValueError: in train mode, b is not a multiple of the number of splits.
        """
        if not self.training or self.splits == 1:
            return super().forward(x)
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        b, c, *places = x.shape
        s = self.splits
        if b % s:
            raise ValueError(f"a batch of {b} images cannot be normalised in {s} equal parts (model.bn_splits)")
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        # chunk s becomes channels s*C .. (s+1)*C: one kernel normalises all chunks
        apart = x.reshape(s, b // s, c, *places).transpose(0, 1).reshape(b // s, s * c, *places)
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        weight = None if self.weight is None else self.weight.repeat(s)
        bias = None if self.bias is None else self.bias.repeat(s)
        out = F.batch_norm(apart, mean, var, weight, bias, True, self.momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(s, c).mean(0))
            self.running_var.copy_(var.view(s, c).mean(0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return out.reshape(b // s, s, c, *places).transpose(0, 1).reshape(b, c, *places)


class SplitBatchNorm1d(SplitBatchNorm, nn.BatchNorm1d):
    """:class:`SplitBatchNorm` of vectors (b, C)."""


class SplitBatchNorm2d(SplitBatchNorm, nn.BatchNorm2d):
    """:class:`SplitBatchNorm` of maps (b, C, H, W)."""


class SplitBatchNormAct2d(SplitBatchNorm2d):
    """timm's BatchNormAct2d, which is BatchNorm with dropout and an activation behind it, split."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(b, C, H, W) -> (b, C, H, W)."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Put a SplitBatchNorm2d in the place of every BatchNorm2d below `module`; weights and keys stay.

    Raises:
        UserError: another kind of BatchNorm (timm's BatchNormAct2d will do), or one without running statistics or
            with a changing momentum.
    """
    for name, child in module.named_children():
        if isinstance(child, SplitBatchNorm2d) or not isinstance(child, _BatchNorm):
            split_batch_norm(child, splits)
            continue
        of_timm = type(child).__module__.startswith("timm.") and type(child).__name__ == "BatchNormAct2d"
        known = of_timm or type(child) is nn.BatchNorm2d
        if not known or child.momentum is None or child.running_mean is None:
            raise UserError(
                f"model.bn_splits is {splits}, but the backbone's layer {name} ({type(child).__name__}) cannot be "
                "split; use BatchNorm2d with running statistics and a fixed momentum, or set model.bn_splits to 1"
            )
        kind = SplitBatchNormAct2d if of_timm else SplitBatchNorm2d
        split = kind(child.num_features, splits, child.eps, child.momentum, child.affine)
        for part, layer in child.named_children():  # an activation may have weights of its own
            split.add_module(part, layer)
        split.load_state_dict(child.state_dict())
        split.train(child.training)
        setattr(module, name, split.to(child.running_mean.device, child.running_mean.dtype))
