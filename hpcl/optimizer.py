"""The optimizer of a stage: SGD, or LARS for large batches.

torch has no LARS; this one is SimCLR's form of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpcl.sections import Optimizer

TRUST = 1e-3
"""eta: step of a layer relative to the norm of its weights (You et al., 2017; SimCLR)."""


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled layer by layer (You, Gitman, Ginsburg, 2017).

    In the form of SimCLR's code: ``g <- grad + wd w;  v <- m v + lr eta |w| / |g| g;  w <- w - v``.
    The paper's algorithm 1 divides by ``|grad| + wd |w|`` instead. Tensors of one dimension (biases,
    BatchNorm) are neither scaled nor decayed. Where a norm is 0 the scale is 1.

    Args:
        parameters: the weights.
        lr: learning rate.
        momentum: m, in 0..1.
        weight_decay: wd, at least 0.
        trust: eta, above 0.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = TRUST,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient; a closure is not supported."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                step = group["lr"] * _direction(weight, weight.grad, group)
                if "momentum_buffer" in state:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(step)
                else:
                    state["momentum_buffer"] = step
                weight.sub_(state["momentum_buffer"])


def _direction(weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient with weight decay, scaled; no wait for the device."""
    if weight.dim() <= 1:
        return gradient
    gradient = gradient.add(weight, alpha=group["weight_decay"])
    size, length = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
    scale = torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
    return gradient * scale


def make_optimizer(parameters: list[nn.Parameter], lr: float, options: Optimizer) -> torch.optim.Optimizer:
    """A fresh optimizer over the weights that a stage trains."""
    kind = LARS if options.kind == "lars" else torch.optim.SGD
    return kind(parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay)
