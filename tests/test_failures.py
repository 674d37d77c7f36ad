"""Which errors are the same, which retries are in vain, and what to lower without memory."""

from __future__ import annotations

import pytest

from hpcl.config import Config
from hpcl.search.failures import masked, out_of_memory_advice, repeated, same_error

CONFIG = Config().with_values({"optimizer.batch": 256, "model.width": 48, "clusters.maximum": 300})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("OSError: [pid 71] no data", "OSError: [pid 8344] no data"),
        ("ValueError: loss is 1.5e-03 at epoch 7", "ValueError: loss is 20 at epoch 12"),
        ("KeyError: <object at 0x7f3a11>", "KeyError: <object at 0x55e0bb7d>"),
        ("OSError: results/a/trials/0003/checkpoint.pt: gone", "OSError: results/a/trials/0017/checkpoint.pt: gone"),
        ("OSError: /tmp/tmpab12_x3z/view: full", "OSError: /tmp/tmpq8w7zzke/view: full"),
        (
            "RayActorError: actor 3fa90c21d07e0100 of node 9c0ffee1 died",
            "RayActorError: actor 11aa22bb of node c0de77e1 died",
        ),
        (
            "lost 0a1b2c3d-1234-5678-9abc-def012345678, 10.0.0.7:6379",
            "lost fedcba98-0000-aaaa-bbbb-0123456789ab, 10.0.31.9:40001",
        ),
        ("ValueError:  two   blanks", "ValueError: two blanks"),
    ],
)
def test_numbers_addresses_and_ids_make_no_other_error(one: str, other: str) -> None:
    assert one != other
    assert masked(one) == masked(other)
    assert same_error([one, other], 2) == one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("OSError: no data", "KeyError: no data"),
        ("OSError: results/a: gone", "OSError: results/b: gone"),
        ("ValueError: the decade", "ValueError: the facade"),  # words of a to f are no ids
        ("topk.k is 5, but must be <= 4", "clusters.first is 5, but must be <= 4"),
    ],
)
def test_different_words_make_different_errors(one: str, other: str) -> None:
    assert masked(one) != masked(other)
    assert same_error([one, other], 2) is None


@pytest.mark.parametrize(
    ("lines", "n", "expected"),
    [
        ([], 1, None),
        ([], 0, None),
        (["a 1"], 2, None),  # too few have ended
        (["a 1", None, "a 1"], 3, None),  # one did not fail
        ([None, "a 1", "a 1", "a 1"], 3, None),  # the search worked at first
        (["a 1", "a 2", "a 3"], 3, "a 1"),
        (["a 1", "a 2", "b", None], 2, "a 1"),  # what came later does not matter
        (["a 1", "b 1"], 1, "a 1"),
    ],
)
def test_the_first_trials_must_all_fail_alike(lines: list[str | None], n: int, expected: str | None) -> None:
    assert same_error(lines, n) == expected


@pytest.mark.parametrize(
    ("line", "previous", "epochs", "before", "expected"),
    [
        ("OSError: pid 1", "OSError: pid 2", 4, 4, True),
        ("OSError: pid 1", "OSError: pid 2", 5, 4, False),  # it came further
        ("OSError: pid 1", "KeyError: pid 1", 4, 4, False),
        ("OSError: pid 1", None, 0, None, False),
        ("OSError: pid 1", "OSError: pid 1", 0, 0, True),  # both before the first epoch
    ],
)
def test_a_retry_that_fails_alike_is_not_repeated(
    line: str, previous: str | None, epochs: int, before: int | None, expected: bool
) -> None:
    assert repeated(line, previous, epochs, before) is expected


def gpu_error() -> BaseException:
    import torch

    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB."
    )


def test_a_full_gpu_names_the_fields_with_their_values() -> None:
    assert out_of_memory_advice(gpu_error(), CONFIG, 0.25) == (
        "CUDA out of memory (tried to allocate 2.50 GiB): lower optimizer.batch (256), model.width (48), "
        "moco.queue (4096), meters.images (10000) or clusters.maximum (300), or give a trial more of a GPU "
        "(resources.gpus_per_worker 0.25)"
    )
    resnet = Config().with_values({"model.backbone": "resnet50", "data.size": 64})
    whole = out_of_memory_advice(gpu_error(), resnet, 1.0)
    assert whole is not None and whole.endswith("or share the batch among more GPUs (resources.workers)")
    assert "model.backbone (resnet50), data.size (64)," in whole and "model.width" not in whole
    assert "clusters.maximum (null, a tenth of the training images)" in whole


def test_ray_wraps_the_error_and_it_is_found() -> None:
    from ray.exceptions import OutOfMemoryError, RayTaskError
    from ray.train import WorkerGroupError

    wrapped = RayTaskError("train", "trace", gpu_error()).as_instanceof_cause()
    group = WorkerGroupError("one worker failed", {1: wrapped})
    for error in (wrapped, group):
        assert str(out_of_memory_advice(error, CONFIG, 1.0)).startswith("CUDA out of memory (tried to allocate 2.50")
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert out_of_memory_advice(killed, CONFIG, 1.0) == (
        "the machine is out of memory: run fewer trials at a time (search.max_concurrent)"
    )


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"]
)
def test_errors_of_cuda_libraries_count_too(text: str) -> None:
    assert str(out_of_memory_advice(RuntimeError(text), CONFIG, 1.0)).startswith("CUDA out of memory: lower")


def test_full_main_memory_as_numpy_and_torch_report_it() -> None:
    import numpy as np
    import torch

    for allocate in (lambda: np.empty(10**15), lambda: torch.empty(10**15)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        text = str(out_of_memory_advice(caught.value, CONFIG, 0.0))
        assert text.startswith("the machine is out of memory (tried to allocate ")
        assert "optimizer.batch (256)" in text and "(search.max_concurrent)" in text


def test_other_errors_get_no_advice() -> None:
    class OutOfMemoryError(Exception):  # of some other library
        pass

    caused = ValueError("no data")
    caused.__cause__ = caused  # a ring of causes ends
    for error in (caused, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OutOfMemoryError("disk")):
        assert out_of_memory_advice(error, CONFIG, 1.0) is None
