"""How long the analysis of a large search takes: 10,000 trials of 150 epochs, in tables as a search writes them.

    python benchmarks/analysis.py [--trials 10000] [--epochs 150] [--folder FOLDER]

Makes the results folder of a search that never was (curves that saturate, growth, ASHA's stops at four rungs, failures;
its numbers mean nothing), then loads it and writes its report in a process of its own, and prints seconds and the most
memory that process held, beside what is aimed at.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpcl.results import EPOCH_COLUMNS, TRIAL_COLUMNS, epoch_schema, trial_schema
from hpcl.search.space import Space, load
from hpcl.yamlio import dump

HERE = Path(__file__).resolve().parent
LIMITS = {"load_search": (3.0, "s"), "report": (60.0, "s"), "memory": (2.0, "GB")}
FACTOR, GRACE = 3, 8


def make(folder: Path, trials: int, epochs: int, seed: int = 0) -> None:
    """Write the folder of a search of so many trials, of which ASHA stopped most."""
    draw = np.random.default_rng(seed)
    space = load(HERE.parent / "search_spaces" / "full.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(dump(space.to_tree()))
    columns, good = _fields(space, trials, draw)
    final = 0.9 - 0.2 * good - 0.02 * draw.standard_normal(trials)
    time_of = np.arange(1, epochs + 1)
    curve = np.clip(final, 0.02, 0.999)[:, None] * (1 - np.exp(-time_of / (0.12 * epochs)))[None, :]
    curve += 0.01 * draw.standard_normal(curve.shape)
    length = np.full(trials, epochs)
    state = np.full(trials, "finished", dtype=object)
    rung, alive, rungs = GRACE, np.ones(trials, dtype=bool), []
    while rung < epochs:
        rungs.append(float(rung))
        bound = np.quantile(curve[alive, rung - 1], 1 - 1 / FACTOR)
        stopped = alive & (curve[:, rung - 1] < bound)
        length[stopped], state[stopped] = rung, "stopped"
        alive &= ~stopped
        rung *= FACTOR
    failed = draw.random(trials) < 0.01
    length[failed], state[failed] = draw.integers(1, 20, failed.sum()), "failed"
    rows_of = np.full(trials, epochs)  # full curves of all, which is the most there can be
    _epochs(folder / "epochs.parquet", curve, rows_of, state, draw)
    ids = [f"{number:05d}" for number in range(trials)]
    values = {
        "trial_id": ids, "number": range(trials), "state": state.tolist(),
        "stop_reason": [f"epoch {n}: as {s}" for n, s in zip(length, state, strict=True)],
        "epochs": length, "objective": np.where(state == "finished", final, np.nan), "metric": curve[:, -1],
        "seconds": length * 3.0, "gpu_hours": length * 3.0 / 3600, "cpu_hours": length * 3.0 / 3600,
        "retries": np.zeros(trials, dtype=int),
    }  # fmt: skip
    kinds = {path: {"float": "float64", "int": "int64"}.get(p.kind, "string") for path, p in space.params.items()}
    schema = trial_schema(kinds)
    arrays = [pa.array(values[c.name], from_pandas=True).cast(schema.field(c.name).type) for c in TRIAL_COLUMNS]
    arrays += [pa.array(columns[path]).cast(schema.field(f"config.{path}").type) for path in kinds]
    pq.write_table(pa.table(arrays, schema=schema), folder / "trials.parquet", compression="zstd")
    facts = {"name": folder.name, "state": "finished", "metric": "acc_proto_ref", "objective": "auto", "rungs": rungs,
             "factor": FACTOR, "trials_at_a_time": 64, "seconds": 3.6e5, "notes": [], "data": "none"}  # fmt: skip
    (folder / "search.json").write_text(json.dumps(facts))


def _fields(space: Space, trials: int, draw: np.random.Generator) -> tuple[dict[str, list[object]], np.ndarray]:
    columns, bad = {}, np.zeros(trials)
    for place, (path, param) in enumerate(space.params.items()):
        at = draw.random(trials)
        if param.kind == "choice":
            codes = (at * len(param.choices)).astype(int)
            columns[path] = [param.choices[code] for code in codes]
            continue
        if param.log:
            numbers = np.exp(np.log(param.low) + at * np.log(param.high / param.low))
        else:
            numbers = param.low + at * (param.high - param.low)
        columns[path] = (np.round(numbers).astype(int) if param.kind == "int" else numbers).tolist()
        bad += (at - 0.4) ** 2 * (1.5 if place % 7 == 0 else 0.02)
    return columns, bad


def _epochs(path: Path, curve: np.ndarray, lengths: np.ndarray, state: np.ndarray, draw: np.random.Generator) -> None:
    """A row per trial and epoch, in an order of arrival that mixes trials."""
    trials, epochs = curve.shape
    there = np.arange(epochs)[None, :] < lengths[:, None]
    order = np.argsort((np.add.outer(np.arange(trials) * 0.4, np.arange(epochs)))[there], kind="stable")
    trial, epoch = (index[order] for index in np.nonzero(there))
    metric = curve[there][order]
    n = len(metric)
    clusters = np.minimum(2 * 1.7 ** (epoch // 12), 400).astype(int)
    last = (epoch + 1 == lengths[trial]) & (state[trial] == "finished")
    noise = draw.standard_normal(n) * 0.02
    given = {
        "trial_id": pa.array([f"{t:05d}" for t in range(trials)]).take(pa.array(trial)),
        "epoch": epoch + 1, "stage": np.searchsorted([20, 25, 75, 80], epoch, side="right") + 1,
        "state": np.where(last, "finished", "running"), "clock": (epoch + 1).astype(float), "shared": np.zeros(n, bool),
        "clusters": clusters, "level_clusters": [f"{k}/{2 * k}/{4 * k}" for k in clusters],
        "growth_reason": [f"window: gain {g:.4f} <= theta 0.0412" for g in noise], "grew": (epoch + 1) % 12 == 0,
        "objective": np.where(last, metric, np.nan), "seconds": np.full(n, 3.0), "arrival": np.arange(n),
        "world_size": np.ones(n, int), "acc_proto_ref": metric, "nce_ref": 3 - 2 * metric + noise,
        "loss": 6 - 3 * metric, "loss_inst": 3 - metric, "loss_proto": 3 - 2 * metric,
    }  # fmt: skip
    arrays = []
    for column in EPOCH_COLUMNS:
        kind = epoch_schema().field(column.name).type
        value = given.get(column.name)
        if value is None:
            value = np.arange(n) % 97 if column.type == "int64" else np.clip(metric + noise, 0, 1)
        arrays.append((value if isinstance(value, pa.Array) else pa.array(value, from_pandas=True)).cast(kind))
    pq.write_table(pa.table(arrays, schema=epoch_schema()), path, compression="zstd")


def measure(folder: Path) -> dict[str, float]:
    """Load and report in this very process: seconds of each, and the most memory that it held (GB)."""
    start = time.perf_counter()
    from hpcl.results import load_search

    search = load_search(folder)
    loaded = time.perf_counter()
    from hpcl.analysis.report.page import write_report

    write_report([search], folder / "report.html")
    done = time.perf_counter()
    return {
        "load_search": loaded - start,
        "report": done - loaded,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "page": (folder / "report.html").stat().st_size / 1e6,
    }


def main() -> int:
    """The command line; 1 where something is beyond what is aimed at."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument(
        "--folder", type=Path, help="where the search is made, and kept; default: a folder that goes again"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "large"
        make(folder, options.trials, options.epochs)
        size = (folder / "epochs.parquet").stat().st_size / 1e6
        print(f"{options.trials:,} trials x {options.epochs} epochs; epochs.parquet {size:.0f} MB")
        ran = subprocess.run(
            [sys.executable, __file__, "--measure", folder], check=True, capture_output=True, text=True
        )
        found = json.loads(ran.stdout.splitlines()[-1])
    beyond = False
    for name, (most, unit) in LIMITS.items():
        beyond |= found[name] > most
        print(f"{name:<12} {found[name]:6.2f} {unit:<3} (aimed at: < {most:g} {unit})")
    print(f"{'page':<12} {found['page']:6.2f} MB  (aimed at: < 2 MB)")
    return int(beyond or found["page"] >= 2)


if __name__ == "__main__":
    sys.exit(main())
