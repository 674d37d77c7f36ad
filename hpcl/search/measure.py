"""How long an epoch takes here: the two that tell, trained and thrown away."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hpcl.config import Config
from hpcl.search.expected import Measured
from hpcl.search.machine import local_node
from hpcl.search.plan import concurrency
from hpcl.search.space import Space
from hpcl.sections import STAGES


def measure(space: Space) -> Measured:
    """Train one epoch of stage 1 and one of stage 3 with the base's values, on its images and this machine.

    Stage 3 trains everything with prototypes, from a cold clustering: somewhat more than
    stages 2 and 4 take, which train the MLP alone. One worker is measured, with the CPUs or
    the GPU it would get and nothing beside it; what it writes is removed.

    Raises:
        UserError: the images cannot be read or do not fit the configuration, or there is no
            room here for one trial.
    """
    import torch

    from hpcl.trainer import Trainer

    room = concurrency(space.resources, [local_node()])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, int(room.cpus_per_worker + 0.1)))
        with tempfile.TemporaryDirectory(prefix="hpcl-measure-") as folder:
            trainer = Trainer(two_epochs(space.base, gpus=room.gpus_per_worker), Path(folder))
            trainer.run(lambda row: None)
    finally:
        torch.set_num_threads(threads)
    first, later = (trainer.rows[i]["seconds"] for i in (0, -1))
    return Measured((first, later, later, later, later), trainer.world.device.type)


def two_epochs(base: Config, *, gpus: float) -> Config:
    """The base with one epoch of stage 1 and one of stage 3, on the CPU where a worker gets no GPU."""
    values = {f"stages.stage{stage}.epochs": int(stage in (1, 3)) for stage in STAGES}
    device = {"runtime.device": "cpu"} if not gpus and base.runtime.device == "auto" else {}
    return base.with_values({"stages.total": None, **values, **device})
