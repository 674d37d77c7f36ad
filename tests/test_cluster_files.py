"""The cluster files, checked by the tools that read them, without a network, a cloud or a cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private import commands
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from hpcl.search.cli import _parser

ROOT = Path(__file__).parent.parent
KUBERAY, SLURM, DOCS = ROOT / "clusters/kuberay.yaml", ROOT / "clusters/slurm.sbatch", ROOT / "docs/cluster.md"
LAUNCHED = [ROOT / "cluster.yaml", *sorted(set((ROOT / "clusters").glob("*.yaml")) - {KUBERAY})]
"""What `ray up` takes."""
IN_CLOUDS = [ROOT / "cluster.yaml", ROOT / "clusters/gcp.yaml"]
TOKEN = "~/.ray/auth_token"
WORLD = re.compile(r"\b0\.0\.0\.0|::/0")


def name(path: Path) -> str:
    return path.name


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def code(path: Path) -> str:
    """The file without its comments."""
    return "\n".join(re.sub(r"(^|\s)#.*", "", line) for line in path.read_text().splitlines())


def started(path: Path) -> dict[str, str]:
    """The command that starts Ray on the head and on a worker."""
    config = load(path)
    found = {}
    for kind in ("head", "worker"):
        (found[kind],) = (line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line)
    return found


def options(command: str) -> dict[str, Any]:
    """The options of a `ray start`, read by Ray's own command line.

    Raises:
        click.UsageError: an option that Ray does not know.
    """
    words = shlex.split(command.partition("ray start ")[2].replace("$RAY_HEAD_IP", "10.0.0.1"))
    return dict(scripts.start.make_context("start", words).params)


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


# ---------------------------------------------------------------- Kubernetes


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


# ---------------------------------------------------------------- Slurm


def test_the_slurm_script_is_clean_shell() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, "--severity=warning", SLURM], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_slurm_script_asks_slurm_for_what_it_relies_on() -> None:
    asked = re.findall(r"^#SBATCH (--\S+)", SLURM.read_text(), re.MULTILINE)
    given = dict(option.partition("=")[::2] for option in asked)
    assert {"--requeue", "--nodes", "--cpus-per-task", "--gpus-per-node", "--time"} <= set(given)
    assert given["--open-mode"] == "append"  # the log of the run before stays
    assert re.fullmatch(r"B:USR1@\d+", given["--signal"])
    assert "ray stop" not in code(SLURM)
    known = {option for parameter in scripts.start.params for option in parameter.opts}
    node = code(SLURM).partition("node() {")[2].partition("\n}")[0]
    flags = set(re.findall(r"--[a-z][a-z-]+", node)) - {"--address"}
    assert flags <= known and {"--temp-dir", "--port", "--dashboard-port", "--min-worker-port"} <= flags


STUBS = {
    # One node, as a task of srun: its process is the node's shell.
    "srun": 'export SLURM_NODEID=0; echo $$ > "$STAGE/step"; exec bash -c "${@: -1}"',
    "squeue": 'cat "$STAGE/state"',
    "scontrol": 'echo "scontrol $*" >> "$STAGE/said"',
    "ray": """
        if [[ $1 == health-check ]]; then exec test -e "$STAGE/up"; fi
        echo "ray $*" >> "$STAGE/said"; env | grep ^RAY_AUTH >> "$STAGE/said"
        [[ -z ${BROKEN-} ]] || exit 1
        echo $$ > "$STAGE/ray"; touch "$STAGE/up"; while true; do sleep 0.1; done""",
    "python": f"""
        case "$*" in
            *get_node_ip_address*) echo 127.0.0.1 ;;
            run_search.py*)
                echo "search $*" >> "$STAGE/said"
                [[ -z ${{LONG-}} ]] || {{
                    trap 'kill -0 $(cat "$STAGE/ray") && echo "search told, Ray there" >> "$STAGE/said"; told=yes' INT
                    echo $$ > "$STAGE/searching"
                    until [[ -n ${{told-}} ]]; do sleep 0.1; done
                    sleep 0.5; exit 130; }} ;;
            *) exec {sys.executable} "$@" ;;
        esac""",
}


class Job:
    """The script in a directory of stand-ins for Slurm, Ray and the search."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.said = folder, folder / "said"
        (folder / "bin").mkdir()
        for command, text in STUBS.items():
            file = folder / "bin" / command
            file.write_text(f"#!/usr/bin/env bash\n{text}\n")
            file.chmod(0o755)
        self.state("RUNNING")
        given = {"STAGE": str(folder), "HPCL_VENV": str(folder), "SLURM_JOB_ID": f"t{os.getpid()}"}
        given |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "3", "SLURM_RESTART_COUNT": "2"}
        self.process = subprocess.Popen(
            ["bash", SLURM, "--space", "a space.yaml"],
            env=os.environ | given | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def state(self, word: str) -> None:
        """What squeue says of the job."""
        (self.folder / "state").write_text(word + "\n")

    def wait_for(self, file: str) -> None:
        for _ in range(600):
            if (self.folder / file).exists():
                return
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.1)
        raise AssertionError(f"no {file}")

    def end(self) -> tuple[int, list[str]]:
        """The script's exit code, and what the stand-ins said."""
        print(self.process.communicate(timeout=60)[0])
        assert not list(Path("/tmp").glob(f"hpcl-t{os.getpid()}-*"))
        for process in ("step", "ray", "searching"):
            if (self.folder / process).exists():
                assert not Path("/proc", (self.folder / process).read_text().strip()).exists()
        return self.process.returncode, self.said.read_text().splitlines()


def test_a_slurm_job_runs_ray_and_the_search_and_cleans_up(tmp_path: Path) -> None:
    code, said = Job(tmp_path).end()
    assert code == 0
    start = options(next(line for line in said if line.startswith("ray start")))
    assert start["head"] and start["block"] and start["num_cpus"] == 3 and start["num_gpus"] == 0
    assert start["dashboard_host"] == "127.0.0.1" and start["min_worker_port"] == 0
    ports = {start[name] for name in ("port", "dashboard_port", "dashboard_agent_listen_port")}
    assert len(ports) == 3 and not ports & {6379, 8265, 52365}
    assert start["temp_dir"] == f"/tmp/hpcl-t{os.getpid()}-2-0"
    assert "RAY_AUTH_MODE=token" in said and any(re.fullmatch(r"RAY_AUTH_TOKEN=[0-9a-f]{64}", line) for line in said)
    (search,) = (line for line in said if line.startswith("search"))
    assert search == f"search run_search.py --space a space.yaml --address 127.0.0.1:{start['port']}"
    assert not any("scontrol" in line for line in said)


@pytest.mark.parametrize("how", ["the time is nearly over", "another job wants the nodes"])
def test_a_slurm_job_that_is_asked_to_end_ends_gently_and_queues_again(tmp_path: Path, how: str) -> None:
    job = Job(tmp_path, LONG="yes")
    job.wait_for("searching")
    for _ in range(3):  # Slurm may say it more than once; a second word would end the search at once
        if how == "the time is nearly over":
            job.process.send_signal(signal.SIGUSR1)
        else:  # every process of the step, and of the script, gets it
            for process in ("step", "ray", "searching"):
                os.kill(int((tmp_path / process).read_text()), signal.SIGTERM)
        time.sleep(0.1)
    code, said = job.end()
    assert code == 130
    told = [line for line in said if line.startswith(("search told", "scontrol"))]
    assert told == ["search told, Ray there", f"scontrol requeue t{os.getpid()}"]


def test_a_slurm_job_that_is_cancelled_does_not_queue_again(tmp_path: Path) -> None:
    job = Job(tmp_path, LONG="yes")
    job.wait_for("searching")
    job.state("COMPLETING")
    job.process.terminate()
    code, said = job.end()
    assert code == 130 and "search told, Ray there" in said and not any("scontrol" in line for line in said)


def test_a_slurm_job_without_ray_ends_with_an_error(tmp_path: Path) -> None:
    code, said = Job(tmp_path, BROKEN="yes").end()
    assert code == 1 and not any(line.startswith(("search", "scontrol")) for line in said)


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
