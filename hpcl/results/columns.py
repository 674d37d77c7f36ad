"""The columns of the tables that a search leaves behind: names, types, units and meanings.

``epochs.parquet`` has one row per trial and epoch, ``trials.parquet`` one per
trial, ``retrain.parquet`` one per run of ``hpcl retrain``, ``downstream.parquet``
one per value that ``hpcl evaluate`` measured. A value that was not
measured is null, never 0 and never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

State = Literal["running", "finished", "stopped", "failed", "diverged"]
"""A trial's state: running, finished its schedule, stopped by ASHA, failed with an
error, or diverged (a loss that is not finite)."""


@dataclass(frozen=True)
class Column:
    """One column: name, Arrow type name, unit or range, and what it holds."""

    name: str
    type: Literal["int64", "float64", "string", "bool"]
    unit: str
    doc: str


EPOCH_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", "string", "", "trial the row belongs to"),
    Column("epoch", "int64", "epochs", "epoch over the whole run, from 1"),
    Column("stage", "int64", "1..5", "stage the epoch belongs to"),
    Column("state", "string", "", "running, finished (last epoch of the schedule) or diverged"),
    Column("clock", "float64", "base epochs", "canonical time of the epoch's end; filled by the search"),
    Column("shared", "bool", "", "trained once in a prefix that trials share"),
    Column("clusters", "int64", "count", "clusters of the finest level in use; null before prototypes"),
    Column("level_clusters", "string", "count/count/...", "clusters of every level, coarse to fine"),
    Column("growth_reason", "string", "", "why the count grows after this epoch, or does not"),
    Column("grew", "bool", "", "whether the count grows after this epoch"),
    Column("theta", "float64", "relative gain", "threshold on the gain of acc_inst in force"),
    Column("acc_proto", "float64", "0..1", "top-1 of ProtoNCE, mean over levels and batches; depends on the count"),
    Column("acc_proto_ref", "float64", "0..1", "acc_proto on fixed views at the reference count; comparable"),
    Column("proto_bits", "float64", "bits", "information of the fixed views about the reference clusters; comparable"),
    Column("inst_ref", "float64", "0..1", "top-1 of each fixed query among all fixed keys; comparable"),
    Column("nce_ref", "float64", "nats", "InfoNCE of the fixed views at T = 0.1; lower is better; comparable"),
    Column("proto_bits_own", "float64", "bits", "proto_bits on the trial's finest level; not comparable"),
    Column("acc_inst", "float64", "0..1", "top-1 of InfoNCE (NT-Xent with method simclr), mean over batches"),
    Column("loss", "float64", "nats", "total loss, mean over batches"),
    Column("loss_inst", "float64", "nats", "InfoNCE"),
    Column("loss_proto", "float64", "nats", "prototype loss, mean over levels"),
    Column("knn", "float64", "0..1", "kNN accuracy on the validation split, backbone features"),
    Column("objective", "float64", "", "value that chooses among finished trials; last epoch only"),
    Column("size_min", "int64", "images", "smallest cluster of the finest level"),
    Column("size_max", "int64", "images", "largest cluster of the finest level"),
    Column("size_entropy", "float64", "0..1", "entropy of the finest level's sizes over its maximum"),
    Column("churn_ami", "float64", "0..1", "agreement (AMI) of the finest level with the previous epoch's"),
    Column("feature_std", "float64", "", "mean per-dimension std of unit embeddings times sqrt(D); 0 is collapse"),
    Column("effective_rank", "float64", "1..D", "exp of the entropy of the embedding's singular values"),
    Column("lr", "float64", "", "learning rate at the epoch's end"),
    Column("seconds", "float64", "s", "wall time of the epoch, all phases"),
    Column("seconds_cluster", "float64", "s", "feature pass and clustering"),
    Column("seconds_train", "float64", "s", "training steps"),
    Column("seconds_meters", "float64", "s", "fixed views, kNN and objective"),
    Column("images_per_second", "float64", "images/s", "training images over seconds_train, all ranks"),
    Column("world_size", "int64", "ranks", "processes that trained the epoch"),
    Column("arrival", "int64", "", "position in the order in which the scheduler saw the rows"),
)
"""Columns of ``epochs.parquet``."""

TRIAL_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", "string", "", "name of the trial and of its folder under trials/"),
    Column("number", "int64", "", "order in which trials were created, from 0 (the notes' configuration)"),
    Column("state", "string", "", "finished, stopped, failed or diverged; running if the search was cut short"),
    Column("stop_reason", "string", "", "why the trial ended, in words"),
    Column("epochs", "int64", "epochs", "epochs it came to, those of a shared prefix included"),
    Column("objective", "float64", "", "value that chooses among finished trials; null for the others"),
    Column("metric", "float64", "", "last value of the curve that ASHA watched"),
    Column("seconds", "float64", "s", "wall time of its own epochs (without a shared prefix and without start-up)"),
    Column("gpu_hours", "float64", "GPU h", "the same times the GPUs it held; 0 without GPUs"),
    Column("cpu_hours", "float64", "CPU h", "the same times the CPUs it held"),
    Column("retries", "int64", "count", "times it was tried again after its process broke off"),
)
"""Columns of ``trials.parquet``; a column ``config.<path>`` per searched field follows."""

RETRAIN_COLUMNS: tuple[Column, ...] = (
    Column("trial_id", "string", "", "trial of the search whose configuration was trained again"),
    Column("seed", "int64", "", "seed of the run"),
    Column("state", "string", "", "finished, failed or diverged; running if it has not ended"),
    Column("stop_reason", "string", "", "why the run ended, in words"),
    Column("objective", "float64", "", "value at the end of the run; null where it did not finish"),
    Column("metric", "float64", "", "last value of the search's curve"),
    Column("epochs", "int64", "epochs", "epochs it came to"),
    Column("seconds", "float64", "s", "wall time of its epochs"),
    Column("gpu_hours", "float64", "GPU h", "the same times the GPUs it held; 0 without GPUs"),
    Column("cpu_hours", "float64", "CPU h", "the same times the CPUs it held"),
    Column("search_objective", "float64", "", "the trial's objective in the search; null where it was stopped"),
)
"""Columns of ``retrain.parquet``: one row per run of ``hpcl retrain`` (in ``retrain/trials/<id>-seed<seed>``)."""

DOWNSTREAM_COLUMNS: tuple[Column, ...] = (
    Column("task", "string", "", "knn, linear, fewshot, finetune, distill, sgan, clusters, voc or detection"),
    Column("setting", "string", "", "what of the task, such as `1 %` of the labels"),
    Column("measure", "string", "", "accuracy, AMI, ARI, purity, mAP (11-point), mAP (all-point) or AP50"),
    Column("encoder", "string", "", "trained, or what it is compared with: untrained, pixels, supervised, sgan"),
    Column("seed", "int64", "", "of the task: label lists, episodes, random starts"),
    Column("value", "float64", "0..1", "the value; AMI and ARI can be below 0"),
    Column("ci95", "float64", "0..1", "half-width of its 95 % interval over episodes; null for other tasks"),
    Column("count", "int64", "count", "images, episodes or objects that were scored"),
    Column("split", "string", "", "the part that was scored, test or val"),
    Column("checkpoint", "string", "", "the checkpoint's path as given"),
    Column("checkpoint_hash", "string", "", "SHA-256 of the checkpoint file"),
    Column("source", "string", "", "the images (or the folder in VOC form) that were used"),
    Column("data_hash", "string", "", "content hash of the images; null for a folder in VOC form"),
    Column("seconds", "float64", "s", "wall time of the task for this seed, all encoders together"),
    Column("time", "string", "UTC", "when it was measured, ISO 8601"),
    Column("version", "string", "", "version of hpcl"),
)
"""Columns of ``downstream.parquet``: one row per value that ``hpcl evaluate`` measured; later runs add theirs."""

TIME_COLUMNS = ("seconds", "seconds_cluster", "seconds_train", "seconds_meters", "images_per_second", "arrival")
"""Epoch columns that differ between two runs of the same seed."""

NO_CURVES = frozenset(
    {"epoch", "stage", "clock", "clusters", "theta", "objective", "size_min", "size_max", "lr", "world_size", "arrival"}
    | {column.name for column in EPOCH_COLUMNS if column.name.startswith(("seconds", "images"))}
)
"""Numeric columns of ``epochs.parquet`` that say nothing of how well a trial learns."""

CURVES: tuple[str, ...] = tuple(
    column.name for column in EPOCH_COLUMNS if column.type in ("float64", "int64") and column.name not in NO_CURVES
)
"""Columns of ``epochs.parquet`` that can stop trials (`search.metric`) or choose among them (`search.objective`)."""

LOWER_IS_BETTER = frozenset({"nce_ref", "loss", "loss_inst", "loss_proto"})
"""Curves where a smaller value is the better one."""


def clean(value: Any) -> Any:
    """The value as a table keeps it: NaN and infinities become None, numpy scalars plain numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def epoch_schema() -> pa.Schema:
    """The Arrow schema of ``epochs.parquet``."""
    return _schema(EPOCH_COLUMNS)


def trial_schema(searched: Mapping[str, Literal["int64", "float64", "string", "bool"]]) -> pa.Schema:
    """The Arrow schema of ``trials.parquet`` for these searched fields (path -> type)."""
    return _schema((*TRIAL_COLUMNS, *(Column(f"config.{path}", kind, "", path) for path, kind in searched.items())))


def retrain_schema() -> pa.Schema:
    """The Arrow schema of ``retrain.parquet``."""
    return _schema(RETRAIN_COLUMNS)


def downstream_schema() -> pa.Schema:
    """The Arrow schema of ``downstream.parquet``."""
    return _schema(DOWNSTREAM_COLUMNS)


def _schema(columns: Sequence[Column]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema(
        [pa.field(c.name, arrow_type(c.type), metadata={"unit": c.unit, "description": c.doc}) for c in columns]
    )


def arrow_type(name: str) -> pa.DataType:
    """The Arrow type of a column's type name."""
    import pyarrow as pa

    return {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_()}[name]
