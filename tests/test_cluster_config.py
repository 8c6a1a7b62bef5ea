"""cluster.yaml passes the checks that `ray up` makes before it contacts AWS, and its commands start a cluster."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tracking_helpers import free_port

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_worker"]["min_workers"] == 0


def test_a_misspelt_field_would_be_refused(cluster: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**cluster, "max_wrokers": 3}))


def test_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    starts = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 1
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_images_carry_the_pinned_ray(cluster: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert f":{pins['ray']}-py311-" in image


def test_gpu_recipes_fit_the_gpu_nodes(cluster: dict[str, Any]) -> None:
    from pipeline.config import load_config

    node = cluster["available_node_types"]["gpu_worker"]
    for name in ("esrgan_x4.yaml", "esrgan_x4_8gpu.yaml", "tune_x4.yaml"):
        config, _ = load_config([], description="", default_file=ROOT / "configs" / name, environment={})
        assert config.use_gpu
        gpus = node["resources"]["GPU"]
        assert config.cpus_per_worker * min(gpus, config.worker_range[1]) <= node["resources"]["CPU"]
        assert config.worker_range[1] <= gpus * node["max_workers"]
        assert config.wait_for_nodes_s > 0


def test_gpu_nodes_have_an_image_whose_driver_fits_and_enough_shared_memory(cluster: dict[str, Any]) -> None:
    from pipeline.model.device import _DRIVERS

    torch_cuda = torch.version.cuda
    assert torch_cuda is None or _DRIVERS[torch_cuda.split(".")[0]] == "580"
    for node in cluster["available_node_types"].values():
        if node["resources"].get("GPU"):
            # Without an ImageId, Ray takes an image of 2022. This one's driver is updated with every release.
            image = node["node_config"]["ImageId"]
            assert image.startswith(
                "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-"
            )
            assert image.endswith("/latest/ami-id")
            assert node["resources"]["GPU"] > 1
    assert "--shm-size=16g" in cluster["docker"]["run_options"]


def test_every_node_gets_the_token(cluster: dict[str, Any]) -> None:
    # file_mounts go to the head and to the workers; what a setup command makes stays on its own node.
    assert cluster["file_mounts"]["/home/ray/.ray"] == "~/.ray"
    assert "RAY_AUTH_MODE=token" in " ".join(cluster["docker"]["run_options"])
    commands = [line for key, lines in cluster.items() if key.endswith("_commands") for line in lines]
    assert not [line for line in commands if "auth" in line]


class Nodes:
    """Nodes on this machine, each with its own home folder instead of /home/ray."""

    def __init__(self, cluster: dict[str, Any], folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self.port = 0
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {
            **kept, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        }  # fmt: skip

    def run(self, home: str, command: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        environment = {
            **self._environment, "HOME": str(self.home(home)), "RAY_HEAD_IP": "127.0.0.1",
        }  # fmt: skip
        return subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=timeout_s,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def home(self, name: str) -> Path:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        return path

    def sync(self, source: str, target: str, local: bool) -> None:
        """Copies the file mounts from the user's machine (`local`) or from the head, without the code."""
        for remote, path in self._cluster["file_mounts"].items():
            below = remote.removeprefix("/home/ray/")
            if path != ".":
                path = path.removeprefix("~/") if local else below
                shutil.copytree(self.home(source) / path, self.home(target) / below)

    def start(self, home: str, kind: str) -> subprocess.CompletedProcess[str]:
        """The file's start command, with ports and a folder that no other Ray cluster on this machine uses."""
        (line,) = [line for line in self._cluster[f"{kind}_start_ray_commands"] if "ray start" in line]
        words = shlex.split(line[line.index("ray start") :])
        omitted = (
            "--autoscaling-config",
            "--port",
            "--object-manager-port",
            "--dashboard-port",
            "--address",
        )
        kept = [word for word in words if not word.startswith(omitted)]
        assert len(words) - len(kept) == (4 if kind == "head" else 2)
        options = [
            "--num-cpus=1",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
        ]
        if kind == "head":
            self.port = free_port()
            options += [f"--port={self.port}", f"--ray-client-server-port={free_port()}"]
            options += [f"--temp-dir={self._folder}/ray", "--include-dashboard=false"]
        else:
            options += [f"--address=$RAY_HEAD_IP:{self.port}"]
        return self.run(home, " ".join([*kept, *options]))

    def alive(self, home: str) -> int:
        """Number of alive nodes, queried with the token of a home folder."""
        code = (
            f"import ray; ray.init('127.0.0.1:{self.port}', logging_level='ERROR', log_to_driver=False); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        done = self.run(home, f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}")
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    def stop(self) -> None:
        """Kills the processes with this folder on their command line."""
        processes = []
        for process in psutil.process_iter():
            try:
                if any(str(self._folder) in word for word in process.cmdline()):
                    processes.append(process)
            except psutil.Error:
                continue
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=20)


@pytest.fixture
def nodes(cluster: dict[str, Any]) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="er", dir="/tmp"))  # Ray's sockets need a short path.
    nodes = Nodes(cluster, folder)
    yield nodes
    nodes.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_joins_by_the_commands_of_the_file_with_the_token_and_not_without(nodes: Nodes) -> None:
    done = nodes.run("user", "ray get-auth-token --generate >/dev/null && chmod 600 ~/.ray/auth_token")
    assert done.returncode == 0, done.stderr
    nodes.sync("user", "head", local=True)
    started = nodes.start("head", "head")
    assert started.returncode == 0, started.stdout + started.stderr
    refused = nodes.start("stranger", "worker")
    assert refused.returncode != 0
    assert "authentication token" in refused.stdout + refused.stderr
    nodes.sync("head", "worker", local=False)
    joined = nodes.start("worker", "worker")
    assert joined.returncode == 0, joined.stdout + joined.stderr
    assert nodes.alive("user") == 2


def test_ray_uploads_neither_data_nor_runs_nor_environments(tmp_path: Path) -> None:
    """`.rayignore` has the syntax of .gitignore."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    names = [
        *(
            "data/x/patches-00000.parquet",
            "elsewhere/patches-00000.parquet",
            "runs/a/result.json",
            "mlflow.db-wal",
        ),
        *("mlartifacts/1/a", "demo/x", ".venv311/bin/python", ".git/HEAD"),
        *(
            "pipeline/data/config.py",
            "jobs/train_gan.py",
            "configs/demo.yaml",
            "pyproject.toml",
            "models/x.safetensors",
        ),
    ]
    found = subprocess.run(
        [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            f"core.excludesFile={ROOT / '.rayignore'}",
            "check-ignore",
            "--no-index",
            *names,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == names[:8]
