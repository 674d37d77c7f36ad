"""clusters/kuberay.yaml, checked by Kubernetes' schemas, KubeRay's names and Ray's autoscaler, without a cluster."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cluster_files import KUBERAY, ROOT, code
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr


def manifests() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(KUBERAY.read_text())}


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_kubernetes_takes_every_manifest_and_every_pod() -> None:
    found = manifests()
    cluster = found.pop("RayCluster")
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": group["template"]["spec"]}
        for group in groups(cluster)
    ]
    for manifest in (*found.values(), *pods):
        kubernetes_validate.validate(manifest, "1.31", strict=True)
    pods[0]["spec"]["containers"][0]["image_"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="image_"):
        kubernetes_validate.validate(pods[0], "1.31", strict=True)


RAY_CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"version": str, "idleTimeoutSeconds": int, "securityContext": dict, "resources": dict},
    "headGroupSpec": {"serviceType": str, "rayStartParams": dict, "template": {"spec": dict}},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": {"spec": dict},
        }
    ],
}
"""What the file may say of a RayCluster, in the names and types of KubeRay's reference (ray.io/v1); pods and what is
in them are Kubernetes' own."""


def misfits(given: Any, known: Any, where: str = "spec") -> list[str]:
    """Names that KubeRay would not take, or would pass over, and values of another type."""
    if isinstance(known, type):
        fits = isinstance(given, known) and not (known is int and isinstance(given, bool))
        return [] if fits else [f"{where}: no {known.__name__}"]
    if isinstance(known, list):
        return [text for i, one in enumerate(given) for text in misfits(one, known[0], f"{where}[{i}]")]
    wrong = [f"{where}.{name}: unknown" for name in given.keys() - known.keys()]
    return wrong + [
        t for name in given.keys() & known.keys() for t in misfits(given[name], known[name], f"{where}.{name}")
    ]


def test_kuberay_knows_every_name() -> None:
    spec = manifests()["RayCluster"]["spec"]
    assert misfits(spec, RAY_CLUSTER) == []
    assert spec["enableInTreeAutoscaling"] is True  # else no GPU pod ever comes
    assert spec["autoscalerOptions"]["version"] == "v2" and spec["autoscalerOptions"]["idleTimeoutSeconds"] == 900
    ours = re.search(r'"ray\[.*\]>=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())
    assert ours and spec["rayVersion"].startswith(f"{ours[1]}.")
    spec["autoscalerOptions"]["idleTimeoutSecs"] = spec["autoscalerOptions"].pop("idleTimeoutSeconds")
    spec["headGroupSpec"]["rayStartParams"] = "num-cpus"
    assert sorted(misfits(spec, RAY_CLUSTER)) == [
        "spec.autoscalerOptions.idleTimeoutSecs: unknown",
        "spec.headGroupSpec.rayStartParams: no dict",
    ]


def test_rays_autoscaler_reads_the_cluster_as_it_is_meant() -> None:
    cluster = manifests()["RayCluster"]
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)  # validates it, too
    head, worker = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert worker["resources"]["CPU"] == 4 and worker["resources"]["GPU"] == 1
    assert worker["min_workers"] == 0 < worker["max_workers"] == config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 60


def test_pods_are_locked_and_the_cluster_asks_for_the_token() -> None:
    found = manifests()
    spec = found["RayCluster"]["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP" and "LoadBalancer" not in code(KUBERAY)
    for group in groups(found["RayCluster"]):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # what version 2 of the autoscaler wants
        (container,) = pod["containers"]
        lock = container["securityContext"]
        assert lock["runAsNonRoot"] and lock["runAsUser"] > 0 and not lock["allowPrivilegeEscalation"]
        assert lock["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for group in groups(found["RayCluster"])
        for volume in group["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert set(claims) == {found["PersistentVolumeClaim"]["metadata"]["name"]}
    policy = found["NetworkPolicy"]["spec"]
    own = {"matchLabels": {"ray.io/cluster": found["RayCluster"]["metadata"]["name"]}}
    assert policy["podSelector"] == own and policy["ingress"] == [{"from": [{"podSelector": own}]}]
