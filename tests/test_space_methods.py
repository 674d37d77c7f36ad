"""What a searched method does to the other fields of a space."""

from __future__ import annotations

import pytest
from test_space import problems_of, read

from hpcl.search import space as spaces
from hpcl.yamlio import dump, read_tree


@pytest.mark.parametrize(
    ("field", "methods", "said"),
    [
        ("clusters.first: {int: [2, 9]", "moco", "clusters.first does nothing with method moco;"),
        ("moco.queue: {choice: [128, 256]", "simclr", "moco.queue does nothing with method simclr;"),
        ("growth.window: {int: [1, 2]", "pcl, hcsc", "growth.window does nothing with each of the methods pcl, hcsc;"),
    ],
)
def test_a_field_that_no_method_reads_is_told(field: str, methods: str, said: str) -> None:
    choice = "method: {choice: [hpcl, moco, pcl, hcsc, simclr]}\n"
    (problem,) = problems_of(f"{choice}{field}, when: {{method: [{methods}]}}}}")
    assert problem.startswith("s.yaml:4:3: ") and said in problem
    assert read(f"{choice}{field}, when: {{method: [hpcl, {methods}]}}}}").params
    (problem,) = problems_of(f"{field}}}", base=f"{{preset: embedded, method: {methods.split(', ')[0]}}}")
    assert "does nothing with method" in problem


def test_a_condition_is_met_by_the_methods_that_have_it_as_a_default() -> None:
    space = read(
        "head.hidden: {int: [16, 64], when: {head.kind: simclr2}}\n"
        "topk.k: {int: [1, 5], when: {topk.mode: [replace, add]}}\n"
        "method: {choice: [hpcl, pcl, simclr]}\n"
    )
    assert next(iter(space.params)) == "method"
    sampled = {
        method: [path for path in space.params if space.is_active(path, {"method": method})]
        for method in ("hpcl", "pcl", "simclr")
    }
    assert sampled == {"hpcl": ["method", "topk.k"], "pcl": ["method"], "simclr": ["method", "head.hidden"]}
    assert "would never be sampled" in problems_of("head.hidden: {int: [16, 64], when: {head.kind: simclr2}}")[0]
    assert space.params["topk.k"].when == {"method": ("hpcl", "pcl"), "topk.mode": ("replace", "add")}
    assert spaces.from_tree(read_tree(dump(space.to_tree()), "again.yaml")) == space


def test_a_curve_of_prototypes_stops_no_trial_without_them() -> None:
    rest = "search: {metric: acc_proto}\n"
    (problem,) = problems_of("method: {choice: [hpcl, moco]}", rest=rest)
    assert problem.endswith("search.metric is acc_proto, which a trial of method moco never has; use acc_proto_ref")
    base, objective = "{method: simclr, preset: embedded}", "search: {objective: acc_proto}\n"
    (problem,) = problems_of("head.hidden: {int: [8, 9]}", base, objective)
    assert problem.endswith("search.objective is acc_proto, which a trial of method simclr never has; use auto")
    assert read("method: {choice: [hpcl, pcl]}", rest=rest).search.metric == "acc_proto"
