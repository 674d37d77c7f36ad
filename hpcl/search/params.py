"""What a space file says apart from its base: searched fields, the search itself, resources.

All are frozen models without torch, ray or optuna. `hpcl.search.space` reads them from YAML.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from hpcl.downstream.scores import OBJECTIVES
from hpcl.results import CURVES, LOWER_IS_BETTER
from hpcl.sections import Count, Positive, Section
from hpcl.yamlio import did_you_mean

PROTOTYPE_CURVES = frozenset({"acc_proto", "loss_proto", "proto_bits_own", "size_entropy", "churn_ami"})
"""Curves without a value before stage 2."""

MOST_CHOICES = 100
"""Values of a choice at most."""


def better_end(curve: str) -> Literal["max", "min"]:
    """Whether a larger or a smaller value of a curve is better."""
    return "min" if curve in LOWER_IS_BETTER else "max"


class _Searched(Section):
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Config path -> values: the field is sampled only where each of these paths has one of its
    values, and keeps the value of the base elsewhere."""


class Float(_Searched):
    """A real number between two ends, both included."""

    kind: Literal["float"] = "float"
    low: float
    """Low end."""
    high: float
    """High end; above `low`."""
    log: bool = False
    """Sample the logarithm uniformly; `low` must be above 0."""
    step: Annotated[float, Field(gt=0.0)] | None = None
    """Sample only `low`, `low + step`, ..., `high`; null: every number between."""

    @model_validator(mode="after")
    def _range(self) -> Float:
        _check_range(self.low, self.high, self.log, self.step, positive=0.0)
        return self

    def grid(self, most: int = 200) -> list[float]:
        """The two ends, with a step and at most `most` values all of them."""
        steps = round((self.high - self.low) / self.step) if self.step else most
        return [self.low + i * (self.step or 0) for i in range(steps)] + [self.high] if steps < most else self.ends()

    def ends(self) -> list[float]:
        """The two ends."""
        return [self.low, self.high]

    def nearest(self, value: Any) -> float:
        """The value in the range nearest to `value`; null and text count as the high end."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.high
        near = min(max(float(value), self.low), self.high)
        if self.step and near not in (self.low, self.high):
            steps = round((near - self.low) / self.step)
            near = self.low + steps * self.step if steps < round((self.high - self.low) / self.step) else self.high
        return near


class Int(_Searched):
    """A whole number between two ends, both included."""

    kind: Literal["int"] = "int"
    low: Annotated[int, Field(ge=-(2**53), le=2**53)]
    """Low end."""
    high: Annotated[int, Field(ge=-(2**53), le=2**53)]
    """High end; above `low`."""
    log: bool = False
    """Sample the logarithm uniformly; `low` must be at least 1."""
    step: Count = 1
    """Sample only `low`, `low + step`, ..., `high`."""

    @model_validator(mode="after")
    def _range(self) -> Int:
        _check_range(self.low, self.high, self.log, self.step if self.step > 1 else None, positive=1)
        return self

    def grid(self, most: int = 200) -> list[int]:
        """All values where there are at most `most`, else the two ends."""
        values = range(self.low, self.high + 1, self.step)
        return list(values) if len(values) <= most else self.ends()

    def ends(self) -> list[int]:
        """The two ends."""
        return [self.low, self.high]

    def nearest(self, value: Any) -> int:
        """The value in the range nearest to `value`; null and text count as the high end."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return self.high
        near = min(max(value, self.low), self.high)
        return self.low + round((near - self.low) / self.step) * self.step


class Choice(_Searched):
    """One of several values."""

    kind: Literal["choice"] = "choice"
    choices: tuple[Any, ...]
    """The values: null, true, false, numbers, text, or tuples of these (lists in YAML)."""

    @model_validator(mode="after")
    def _different(self) -> Choice:
        if len(self.choices) < 2:
            raise ValueError(f"choices has {len(self.choices)} value(s), but must have at least 2 (set one in base)")
        if len(self.choices) > MOST_CHOICES:  # each is checked against the others
            raise ValueError(f"choices has {len(self.choices)} values, but must have at most {MOST_CHOICES}")
        seen: list[Any] = []
        for value in self.choices:
            if any(same(value, other) for other in seen):
                raise ValueError(f"choices has {value} twice")
            seen.append(value)
        return self

    def grid(self, most: int = 200) -> list[Any]:
        """All values."""
        return list(self.choices)

    def ends(self) -> list[Any]:
        """All values."""
        return list(self.choices)

    def nearest(self, value: Any) -> Any:
        """`value` if it is a choice, else the nearest number among the choices, else the first choice."""
        if any(same(value, choice) for choice in self.choices):
            return value
        numbers = [c for c in self.choices if isinstance(c, (int, float)) and not isinstance(c, bool)]
        if numbers and isinstance(value, (int, float)) and not isinstance(value, bool):
            return min(numbers, key=lambda number: abs(number - value))
        return self.choices[0]


Param = Annotated[Float | Int | Choice, Field(discriminator="kind")]
"""How one field is searched."""


def same(a: Any, b: Any) -> bool:
    """Equality of configuration values that keeps true and 1 apart."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _check_range(low: float, high: float, log: bool, step: float | None, positive: float) -> None:
    problems = []
    if not low < high:
        problems.append(f"high is {high:g}, but must be > the low end ({low:g})")
    if log and low < (positive or math.ulp(0.0)):
        problems.append(f"low is {low:g}, but must be {f'>= {positive}' if positive else '> 0'} with log: true")
    if step is not None and log:
        problems.append("step cannot stand beside log: true (remove one of them)")
    elif step is not None and low < high:
        steps = math.floor((high - low) / step + 1e-9)
        if steps < 1 or not math.isclose(low + steps * step, high, rel_tol=1e-9, abs_tol=1e-12):
            last = low + max(steps, 1) * step
            problems.append(f"high is {high:g}, but must be a whole number of steps above low, such as {last:g}")
    if problems:
        raise ValueError("; ".join(problems))


class Search(Section):
    """How many trials, what stops them early, and what chooses the best."""

    trials: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Trials in all; trial 0 is the base configuration."""
    metric: str = "acc_proto_ref"
    """Curve by which ASHA stops trials: a column of `epochs.parquet`."""
    mode: Literal["max", "min"] = "max"
    """Better end of the metric; follows from it (`min` for nce_ref and the losses)."""
    objective: str = "auto"
    """What chooses among finished trials: `linear` (linear probe on a validation split), a downstream
    task at the end of the trial on validation images (`linear@val`, `knn@val`, `fewshot@val`,
    `finetune@val`, `distill@val`, `clusters@val`), a curve at its last epoch, or `auto` (linear
    where labels exist, else the metric). Test images never choose."""
    clock: Literal["stage", "epoch"] = "stage"
    """What the rungs count: `stage`, the place in the base's schedule, so that a rung means the
    same place in trials whose stages differ in length; or `epoch`, the trial's own epochs."""
    grace: Count | None = 8
    """Way from the fork (the end of the shared stages, else the start) to ASHA's first rung, in
    epochs of the base's schedule; null: no trial is stopped early."""
    factor: Annotated[int, Field(ge=2)] = 2
    """ASHA's reduction factor: at a rung about 1 in `factor` trials goes on, and the next rung
    stands `factor` times as far from the fork."""
    min_peers: Count = 1
    """Other trials that must have come to a rung before one is stopped there; 1 as Ray has it."""
    brackets: Count = 1
    """ASHA's brackets: trials are dealt to them, and bracket b leaves out the first b rungs."""
    sampler: Literal["tpe", "random"] = "tpe"
    """What draws the trials: Optuna's TPE, or every trial by chance."""
    told: Literal["pruned", "complete"] = "pruned"
    """As what the sampler hears of stopped trials: `pruned` with their values by epoch, or
    `complete` with the last one."""
    share_prefix: bool = True
    """Train the stages that trials have in common once, and let the trials begin after them."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the sampler and of ASHA's brackets; the trials' own seed is `seed` of the configuration."""
    startup: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Finished trials before TPE replaces random sampling; `auto` follows the trials at a time."""
    max_concurrent: Count | Literal["auto"] = "auto"
    """Most trials at a time; `auto`: as many as the resources allow, more and fewer as machines join and leave."""
    ahead: Annotated[int, Field(ge=0)] = 1
    """On a cluster (`--address`), trials drawn ahead of a free place; an autoscaler adds machines for them."""
    max_hours: Positive | None = None
    """Hours after which no trial begins or goes on; running epochs are finished. null: no limit."""
    max_gpu_hours: Positive | None = None
    """The same for the sum of the trials' hours, each times its GPUs; null: no limit."""
    max_epochs: Count | None = None
    """The same for the epochs of all trials together, shared ones counted once; null: no limit."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times that a trial whose process was lost, or that raised an error, goes on from its checkpoint; a
    machine that was lost with it does not count."""
    hung_after: Annotated[float, Field(ge=2)] | None = 20.0
    """A trial that has not reported for so many times the longest epoch so far, and for five minutes, is taken
    as hung: its process is killed and it goes on from its checkpoint, as after a lost process. null: never."""
    give_up_after: Count = 3
    """The search ends where so many trials, the first ones, all end with the same error."""

    @model_validator(mode="before")
    @classmethod
    def _derived_mode(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mode") is None:
            return {**values, "mode": better_end(str(values.get("metric", "acc_proto_ref")))}
        return values

    @field_validator("metric", "objective")
    @classmethod
    def _known_curve(cls, value: str, info: ValidationInfo) -> str:
        known = CURVES if info.field_name == "metric" else ("auto", "linear", *OBJECTIVES, *CURVES)
        if info.field_name == "objective" and value.endswith("@test"):
            raise ValueError(
                f"{value} is measured on test images, which must not choose: make it {value.removesuffix('test')}val"
            )
        if value not in known:
            raise ValueError(f"{value} is no curve{did_you_mean(value, known)} (there are: {', '.join(known)})")
        return value

    @model_validator(mode="after")
    def _sensible_mode(self) -> Search:
        if self.mode != better_end(self.metric):
            end = better_end(self.metric)
            raise ValueError(f"mode is {self.mode}, but must be {end} for {self.metric}: leave it out")
        return self


class Resources(Section):
    """What one trial uses."""

    workers: Count = 1
    """Processes that train one trial together; each takes its share of the batch."""
    cpus_per_worker: Annotated[float, Field(ge=0.01)] | Literal["auto"] = "auto"
    """CPUs of a worker; `auto`: one without GPUs, else its share of the CPUs (at most 8)."""
    gpus_per_worker: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    """GPUs of a worker: 0, a fraction (several one-worker trials on one GPU) or a whole number;
    `auto`: one where the cluster has GPUs, else 0."""
    accelerator_type: str | None = None
    """Kind of GPU as Ray calls it (`A100`, `H100`, `L4`); machines with others are left out. null: any."""

    @model_validator(mode="after")
    def _gpus_can_be_given(self) -> Resources:
        gpus = self.gpus_per_worker
        if gpus == 0 and self.accelerator_type:
            raise ValueError(
                f"accelerator_type is {self.accelerator_type}, but gpus_per_worker is 0: leave one of them out"
            )
        if isinstance(gpus, str) or gpus == 0:
            return self
        if gpus < 1 and self.workers > 1:
            raise ValueError(
                f"gpus_per_worker is {gpus:g}, but must be a whole number with {self.workers} workers "
                "(NCCL refuses two ranks on one GPU)"
            )
        if gpus < 0.01 or (gpus > 1 and gpus != int(gpus)):
            raise ValueError(f"gpus_per_worker is {gpus:g}, but must be 0, between 0.01 and 1, or a whole number")
        return self
