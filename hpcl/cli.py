"""The command line: ``hpcl train | knn | evaluate | prototypes | export``, ``search | status | retrain | doctor``,
``report | compare | best | suggest`` and ``data convert | check``.

Torch is imported inside the commands that need it, so that ``--help`` answers at once.
A mistake of the user is printed without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpcl.cli_data import data_app
from hpcl.errors import UserError, harmless

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")


@app.callback()
def _hpcl() -> None:
    """Hierarchical Prototypical Contrastive Learning: train, search, and use what was learnt."""


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="Configuration (YAML), for example a search's best.yaml.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where the run goes, and resumes; default runs/<file's name>, for best.yaml its folder's name."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images to train on, in place of data.source.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Total epochs; the stages are scaled in proportion.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="path=value; may be given several times.")] = None,
) -> None:
    """Train one configuration, without ray; the same command resumes an interrupted run."""
    from hpcl.yamlio import load_config_with

    file = _here(config)
    chosen = load_config_with(file, sets or [], data=data, epochs=epochs)
    named_by = file.resolve().parent.name if file.name == "best.yaml" else file.stem
    out = folder or Path("runs") / named_by

    from hpcl.checkpoint import CHECKPOINT_NAME
    from hpcl.data import load
    from hpcl.dist import leave_world
    from hpcl.runlog import describe_epoch
    from hpcl.trainer import fit

    leads = os.environ.get("RANK", "0") == "0"  # under torchrun one process speaks for all

    def say(text: str) -> None:
        if leads:
            print(harmless(text), flush=True)

    say(load(chosen.data).describe())
    say(f"{'going on in' if (out / CHECKPOINT_NAME).exists() else 'run folder'}: {out}")
    run = fit(chosen, out, report=lambda row: say(describe_epoch(row)))
    leave_world()
    last = run.rows[-1]
    if last["state"] == "diverged":
        say(f"diverged in epoch {last['epoch']}: the loss is not finite; lower the learning rates (stages.*.lr)")
        raise typer.Exit(1)
    checkpoint = out / "checkpoint.pt"
    if last.get("objective") is None:
        say(f"finished {last['epoch']} epochs; next: hpcl export {checkpoint} backbone.pt")
    else:
        say(f"linear probe on the validation split: {last['objective']:.4f}")
        say(f"finished {last['epoch']} epochs; next: hpcl evaluate {checkpoint}")


@app.command()
def knn(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint.pt of a run or trial folder.")],
    split: Annotated[str, typer.Option(help="Images to classify: val or test.")] = "test",
    k: Annotated[int, typer.Option(min=1, help="Neighbours.")] = 200,
    temperature: Annotated[float, typer.Option(help="Temperature of the vote, above 0.")] = 0.1,
    data: Annotated[str | None, typer.Option(help="Other images than those it was trained on.")] = None,
) -> None:
    """Weighted kNN accuracy of a checkpoint's backbone."""
    if split not in ("val", "test"):
        raise UserError(f"--split is {split}, but must be val or test")
    if not temperature > 0:
        raise UserError(f"--temperature is {temperature}, but must be above 0")
    from hpcl.pretrained import knn_of_checkpoint

    part: Literal["val", "test"] = "val" if split == "val" else "test"
    accuracy, images = knn_of_checkpoint(_here(checkpoint), part, k=k, temperature=temperature, data=data)
    count = len(images.val if part == "val" else images.test)
    print(harmless(images.describe()))
    print(
        f"kNN accuracy {accuracy:.4f} on {count} {part} images (k = {min(k, len(images.train))}, T = {temperature:g})"
    )


@app.command()
def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="checkpoint.pt of a run or trial; several are seeds of one configuration.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="all, or some of knn, linear, fewshot, finetune, distill, sgan, clusters, voc, detection; with commas."
        ),
    ] = "all",
    data: Annotated[str | None, typer.Option(help="Other images than those it was trained on.")] = None,
    voc: Annotated[Path | None, typer.Option(help="Folder in VOC2007 form, for the tasks voc and detection.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each task: label lists, episodes, random starts.")] = 3,
    split: Annotated[str, typer.Option(help="Images that are scored: test or val.")] = "test",
    baselines: Annotated[bool, typer.Option(help="Also measure what it is compared with.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Table the rows are added to; default: downstream.parquet beside the first.")
    ] = None,
) -> None:
    """Downstream tasks on a checkpoint, beside the untrained encoder, raw pixels and supervised training."""
    from hpcl.downstream.scores import TASK_NAMES

    names = list(TASK_NAMES) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    problems = [
        f"--tasks names {name}, but must name some of {', '.join(TASK_NAMES)}"
        for name in names
        if name not in TASK_NAMES
    ]
    if split not in ("val", "test"):
        problems.append(f"--split is {split}, but must be val or test")
    if out is None and "://" in checkpoints[0]:
        problems.append(f"{checkpoints[0]}: say with --out where downstream.parquet goes")
    if problems:
        raise UserError(*problems)
    from hpcl.analysis.downstream import main as evaluate_main

    files = [_here(checkpoint) for checkpoint in checkpoints]
    files = [file / "checkpoint.pt" if file.is_dir() else file for file in files]
    part: Literal["val", "test"] = "val" if split == "val" else "test"
    evaluate_main(
        files, names, out or files[0].parent / "downstream.parquet", data=data, voc=voc, seeds=seeds, split=part,
        baselines=baselines,
    )  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint.pt of a run or trial folder.")],
    out: Annotated[Path, typer.Argument(help="File for the backbone's state dict.")],
    side: Annotated[str, typer.Option(help="query (trained) or key (its moving average).")] = "query",
) -> None:
    """Write the backbone's state dict; it loads into torchvision's or timm's network, whose classifier is not in it."""
    if side not in ("query", "key"):
        raise UserError(f"--side is {side}, but must be query or key")
    from hpcl.pretrained import export_backbone

    backbone, names = export_backbone(_here(checkpoint), out, "query" if side == "query" else "key")
    shown = harmless(f"the {backbone} without a classifier, {len(names)} tensors, {names[0]} to {names[-1]}")
    print(f"{out}: state dict of {shown}")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def search(context: typer.Context) -> None:
    """Search over a space file; the same as run_search.py (see hpcl search --help)."""
    from hpcl.search.cli import main as search_main

    raise typer.Exit(search_main(context.args))


@app.command()
def status(
    folder: Annotated[str, typer.Argument(help="Folder of a search, results/<name>, or its URI; it may be running.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds, until Ctrl-C.")] = False,
) -> None:
    """How a search stands: its trials, the best so far, what is used and left."""
    from hpcl.search.status import main as status_main

    status_main(folder, watch=watch)


@app.command()
def retrain(
    folder: Annotated[str, typer.Argument(help="Folder of a search, results/<name>, or its URI.")],
    top: Annotated[int, typer.Option(min=1, help="Finished trials, the best ones; the base is retrained besides.")] = 3,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds of their own.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of a run; default: the stages' lengths without stages.total.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images to train on, in place of the search's.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that train one run together.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster, such as auto; default: Ray on this machine.")
    ] = None,
) -> None:
    """Train a search's best at full length with several seeds, and rewrite its best.yaml; goes on where it was."""
    from hpcl.search.retrain import main as retrain_main

    raise typer.Exit(
        retrain_main(folder, top=top, seeds=seeds, epochs=epochs, data=data, workers=workers, address=address)
    )


@app.command()
def doctor(
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster, such as auto; default: Ray on this machine.")
    ] = None,
    results: Annotated[str, typer.Option(help="Folder of all results, or a URI; is it the same on every node?")] = (
        "results"
    ),
    data: Annotated[str | None, typer.Option(help="Images that every node must be able to read.")] = None,
    space: Annotated[Path | None, typer.Option(help="Space file to plan for what is found; also its images.")] = None,
) -> None:
    """Check GPUs, torch, faiss, Ray, storage and all nodes, and say what to do about each fault (then exit code 1)."""
    from hpcl.search.doctor import main as doctor_main

    raise typer.Exit(doctor_main(address=address, results=results, data=data, space=space))


Folders = Annotated[list[str], typer.Argument(help="Folders of searches, results/<name>, or their URIs.")]


@app.command()
def report(
    folders: Folders,
    out: Annotated[Path | None, typer.Option(help="The page; default: report.html in the first folder.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Curve to compare trials by, where an experiment folder of Tune's names none.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Its better end, max or min.")] = None,
    galleries: Annotated[bool, typer.Option(help="Show what the best trial's prototypes hold.")] = True,
) -> None:
    """Write one self-contained page: the best configuration, how sure, why, and what to search next."""
    if mode not in (None, "max", "min"):
        raise UserError(f"--mode is {mode}, but must be max or min")
    from hpcl.analysis.report.page import main as report_main

    report_main(_tables(folders, out, "report.html"), out, metric=metric, mode=mode, galleries=galleries)


@app.command()
def compare(folders: Folders) -> None:
    """Several searches side by side: best so far at equal cost, winning values, and what seeds say of it."""
    from hpcl.analysis.compare import main as compare_main

    compare_main(_tables(folders))


@app.command()
def best(
    folders: Folders,
    out: Annotated[Path | None, typer.Option(help="Configuration to write (YAML); default: only print.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that this command did not write.")] = False,
) -> None:
    """The best configuration by its seeds and neighbours rather than by luck, beside the research notes' values."""
    from hpcl.analysis.robust import main as best_main

    best_main(_tables(folders), out, force)


@app.command()
def suggest(
    folder: Annotated[str, typer.Argument(help="Folder of a search, results/<name>, or its URI.")],
    out: Annotated[
        Path | None, typer.Option(help="Space file to write; default: follow-up.yaml in the folder.")
    ] = None,
) -> None:
    """What to search next: ranges that were hit at an edge, fields that do not matter, and a space file that runs."""
    from hpcl.analysis.suggest import main as suggest_main

    suggest_main(_tables([folder], out, "follow-up.yaml")[0], out)


@app.command()
def prototypes(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint.pt of a run or trial, or its folder.")],
    out: Annotated[Path | None, typer.Option(help="The page; default: prototypes.html beside the checkpoint.")] = None,
    images: Annotated[int, typer.Option(help="Nearest images of each prototype, 1 to 24.")] = 8,
    data: Annotated[str | None, typer.Option(help="Where the images it was trained on lie now.")] = None,
) -> None:
    """Write a page with the images nearest to each prototype, coarse level to fine."""
    if "://" in checkpoint and out is None:
        raise UserError(f"{checkpoint}: say with --out where the page goes")
    from hpcl.analysis.report.gallery import main as prototypes_main

    where = _here(checkpoint)
    prototypes_main(where / "checkpoint.pt" if where.is_dir() else where, out, images, data)


def _tables(folders: list[str], out: Path | None = None, name: str | None = None) -> list[Path]:
    """Folders of searches on this machine; the tables of those that lie at URIs are brought.

    Raises:
        UserError: `name` would be written into a store's folder, which is not here.
    """
    if name and out is None and "://" in folders[0]:
        raise UserError(f"{folders[0]}: say with --out where {name} goes")
    if not any("://" in folder for folder in folders):
        return [Path(folder) for folder in folders]
    from hpcl.search.places import place
    from hpcl.search.storage import fetch

    places = [place(folder) for folder in folders]
    for path in places:
        fetch(path, {"trials.parquet", "epochs.parquet", "retrain.parquet", "space.yaml", "search.json"})
    return places


def _here(where: str) -> Path:
    """A file on this machine; one that lies at a URI is brought."""
    if "://" not in where:
        return Path(where)
    from hpcl.search.places import place
    from hpcl.search.storage import fetch

    path = place(where)
    fetch(path.parent, {path.name})
    return path


def main() -> None:
    """Entry point of the ``hpcl`` command."""
    # Threads that wait for one another sleep instead of spinning: with one of 2 cores busy an epoch took 3.6 s
    # instead of 6.7 s (on idle cores 3.2 s instead of 2.5 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        from hpcl.search.places import told

        print(told(error), file=sys.stderr)
        raise SystemExit(2) from None
