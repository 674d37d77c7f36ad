"""What `ray up` takes, checked by the tools that read it without a network or a cloud; the docs know every file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_files import DOCS, KUBERAY, LAUNCHED, ROOT, SLURM, code, load, options
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config

from hpcl.search.cli import _parser

IN_CLOUDS = [ROOT / "cluster.yaml", ROOT / "clusters/gcp.yaml"]
TOKEN = "~/.ray/auth_token"
WORLD = re.compile(r"\b0\.0\.0\.0|::/0")


def name(path: Path) -> str:
    return path.name


def started(path: Path) -> dict[str, str]:
    """The command that starts Ray on the head and on a worker."""
    config = load(path)
    found = {}
    for kind in ("head", "worker"):
        (found[kind],) = (line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line)
    return found


# ---------------------------------------------------------------- what `ray up` takes


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_ray_takes_the_file(path: Path) -> None:
    validate_config(prepare_config(load(path)))
    wrong = load(path) | {"idle_timeout_minuts": 5}
    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_every_machine_gets_the_token_and_every_ray_asks_for_it(path: Path) -> None:
    config = load(path)
    assert config["file_mounts"][TOKEN] == TOKEN
    assert f"chmod 600 {TOKEN}" in config["setup_commands"]
    shell = [line for line in config["setup_commands"] if line.endswith("RAY_AUTH_MODE=token' >> ~/.bashrc")]
    assert len(shell) == 1  # every command of the launcher reads it, and so does a shell of the user's
    for command in started(path).values():
        assert re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", command, re.DOTALL), command


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_ray_knows_every_option_and_listens_to_no_one_outside(path: Path) -> None:
    head, worker = (options(command) for command in started(path).values())
    assert head["head"] and head["port"] == 6379 and head["dashboard_host"] == "127.0.0.1"
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert not worker["head"] and worker["address"] == "10.0.0.1:6379"
    assert not WORLD.search(code(path))


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_what_is_sent_is_there_and_can_be_installed(path: Path) -> None:
    config = load(path)
    sent = {Path(far).relative_to("~/hpcl"): near for far, near in config["file_mounts"].items() if far != TOKEN}
    assert all((ROOT / near).exists() and Path(near) == far for far, near in sent.items())
    project = (ROOT / "pyproject.toml").read_text()
    needed = {
        "pyproject.toml",
        "run_search.py",
        "hpcl",
        "search_spaces",
        *re.findall(r"\b(README\.md|LICENSE)\b", project),
    }
    assert {str(far) for far in sent} == needed
    assert any(line.endswith("-e ~/hpcl") and "pip install" in line for line in config["setup_commands"])


@pytest.mark.parametrize("path", IN_CLOUDS, ids=name)
def test_the_head_stays_and_the_workers_are_spot_machines_that_come_and_go(path: Path) -> None:
    config = prepare_config(load(path))
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"]
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    assert 0 < config["idle_timeout_minutes"] <= 60
    for worker in types.values():
        assert worker["resources"]["GPU"] >= 1 and worker["resources"]["CPU"] >= 1
        assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
        spot = worker["node_config"].get("InstanceMarketOptions") or worker["node_config"]["scheduling"]
        assert spot.get("MarketType") == "spot" or spot.get("provisioningModel") == "SPOT"


# ---------------------------------------------------------------- AWS, as `ray up` would ask it


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account with the two roles of docs/cluster.md, played by moto."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import node_provider, utils

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key pair in ~/.ssh
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "none")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        ec2 = boto3.client("ec2", "us-west-2")
        kinds = ec2.describe_instance_types(InstanceTypes=["m6i.xlarge", "g5.xlarge"])["InstanceTypes"]
        monkeypatch.setattr(node_provider, "list_ec2_instances", lambda *_: kinds)  # not all 900
        iam = boto3.client("iam")
        for role in ("hpcl-head", "hpcl-worker"):
            iam.create_instance_profile(InstanceProfileName=role)
        utils.resource_cache.cache_clear()
        utils.client_cache.cache_clear()
        yield ec2
    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()


def test_on_aws_only_ssh_is_open_and_workers_are_spot_with_a_role_of_their_own(aws: Any) -> None:
    config = commands._bootstrap_config(prepare_config(load(ROOT / "cluster.yaml")), no_config_cache=True)
    types = config["available_node_types"]
    assert types["gpu"]["resources"]["accelerator_type:A10G"] == 1  # what AWS says of the machine agrees with the file
    assert {"CPU": 4, "GPU": 1}.items() <= types["gpu"]["resources"].items()
    assert types["head"]["resources"]["CPU"] == 0

    groups = {tuple(one["node_config"]["SecurityGroupIds"]) for one in types.values()}
    ((group,),) = groups
    (rules,) = (g["IpPermissions"] for g in aws.describe_security_groups(GroupIds=[group])["SecurityGroups"])
    outside = [rule for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    inside = [pair["GroupId"] for rule in rules if rule not in outside for pair in rule["UserIdGroupPairs"]]
    assert inside == [group]

    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for kind in types:
        provider.create_node(types[kind]["node_config"], {"ray-user-node-type": kind}, 1)
    machines = {
        tag["Value"]: machine
        for reservation in aws.describe_instances()["Reservations"]
        for machine in reservation["Instances"]
        for tag in machine["Tags"]
        if tag["Key"] == "ray-user-node-type"
    }
    assert machines["gpu"]["InstanceLifecycle"] == "spot" and not machines["head"].get("InstanceLifecycle")
    for kind, role in (("head", "hpcl-head"), ("gpu", "hpcl-worker")):
        assert machines[kind]["IamInstanceProfile"]["Arn"].endswith(f"/{role}")
        assert machines[kind]["MetadataOptions"]["HttpTokens"] == "required"


# ---------------------------------------------------------------- Google Cloud, as it describes its machines


def google(schema: str, given: Any, known: dict[str, Any], where: str) -> list[str]:
    """What is not as Google's description of `schema` has it: unknown names, other types, values that are none."""
    wrong = []
    for name, value in given.items():
        at, kind = f"{where}.{name}", known[schema]["properties"].get(name)
        if kind is None:
            wrong.append(f"{at}: not in {schema}")
            continue
        types = {"string": str | int, "boolean": bool, "array": list, "object": dict, "integer": int}
        if "$ref" in kind:
            wrong += google(kind["$ref"], value, known, at)
        elif not isinstance(value, types[kind["type"]]):
            wrong.append(f"{at}: no {kind['type']}")
        elif "enum" in kind and value not in kind["enum"]:
            wrong.append(f"{at}: {value} is none of {kind['enum']}")
        elif kind["type"] == "array" and "$ref" in kind["items"]:
            wrong += [text for one in value for text in google(kind["items"]["$ref"], one, known, at)]
    return wrong


def test_google_knows_every_name_of_its_machines() -> None:
    import googleapiclient.discovery_cache as cache

    known = json.loads((Path(cache.__file__).parent / "documents" / "compute.v1.json").read_text())["schemas"]
    types = load(ROOT / "clusters/gcp.yaml")["available_node_types"]
    for kind in types:
        assert google("Instance", types[kind]["node_config"], known, kind) == []
    gpu = types["gpu"]["node_config"]
    gpu["machineTyp"] = gpu.pop("machineType")
    gpu["disks"][0]["initializeParams"]["sourceImagee"] = "x"
    gpu["scheduling"]["provisioningModel"] = "SPOTT"
    assert [text.split(":")[0] for text in google("Instance", gpu, known, "gpu")] == [
        "gpu.disks.initializeParams.sourceImagee",
        "gpu.scheduling.provisioningModel",
        "gpu.machineTyp",
    ]


# ---------------------------------------------------------------- what the files and docs say


def search_commands() -> list[Any]:
    """Every search that a cluster file or docs/cluster.md tells the reader to give."""
    found = []
    for path in (*LAUNCHED, KUBERAY, SLURM, DOCS):
        text = re.sub(r"\\?\n *#? *(?=--)", " ", path.read_text())
        for command in re.findall(r"(?:run_search\.py|slurm\.sbatch) +(--[^'`\n]*)", text):
            found.append(pytest.param(path, command.partition("  #")[0].strip(), id=f"{path.name}-{len(found)}"))
    return found


@pytest.mark.parametrize(("path", "command"), search_commands())
def test_every_search_command_is_one(path: Path, command: str) -> None:
    given = _parser().parse_args(shlex.split(command))
    assert given.address or "sbatch" in path.read_text()
    assert (ROOT / "search_spaces" / given.space.name).exists()


@pytest.mark.parametrize("path", [*LAUNCHED, KUBERAY, SLURM], ids=name)
def test_the_docs_say_how_to_use_every_file(path: Path) -> None:
    assert str(path.relative_to(ROOT)) in DOCS.read_text()


def test_every_file_of_a_cloud_names_its_own_bucket() -> None:
    for path, scheme in zip(IN_CLOUDS, ("s3", "gs"), strict=True):
        assert set(re.findall(r"\b(?:s3|gs)://[\w-]+", path.read_text())) == {f"{scheme}://YOUR-BUCKET"}
        assert f"{scheme}://YOUR-BUCKET/results" in DOCS.read_text()
