"""cluster.yaml passes the checks that `ray up` makes before it talks to AWS."""

from pathlib import Path
from typing import Any

import pytest
import yaml

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
    for name in ("esrgan_x4.yaml", "tune_x4.yaml"):
        config, _ = load_config([], description="", default_file=ROOT / "configs" / name, environment={})
        assert config.use_gpu
        assert config.cpus_per_worker <= node["resources"]["CPU"]
        assert config.worker_range[1] <= node["max_workers"]
        assert config.wait_for_nodes_s > 0
