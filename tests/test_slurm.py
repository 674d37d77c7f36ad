"""clusters/slurm.sbatch: clean shell, options that Ray knows, a job with stand-ins for Slurm, Ray and the search."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_files import SLURM, code, options
from ray.scripts import scripts


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
