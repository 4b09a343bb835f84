"""padd-plan from files: the shipped plans, --validate, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN, CLUSTER = "ds_configs/plans/paper.yaml", "ds_configs/clusters/h100.yaml"


def plan(repository: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "padd_ds/plan.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


@pytest.mark.slow
def test_the_papers_experiment(repository: Path, tmp_path: Path) -> None:
    done = plan(repository, "--config", RUN, "--cluster", CLUSTER, "--nodes", 2, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "30.53B parameters, 3.35B active" in done.stdout and "Recommended: " in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["recommended"]["fits"] and facts["recommended"]["changes"] == []
    assert sum(facts["asked"]["memory_bytes"]["loss"].values()) > 30 * 2**30


@pytest.mark.slow
def test_validate_refuses_what_does_not_fit(repository: Path) -> None:
    refused = plan(repository, "--config", RUN, "--cluster", CLUSTER, "--validate")
    assert refused.returncode == 2 and "does not fit" in refused.stderr and refused.stderr.count("\n") == 1
    assert plan(repository, "--config", RUN, "--cluster", CLUSTER, "--nodes", 2, "--validate").returncode == 0


@pytest.mark.parametrize("path", sorted(Path("ds_configs/clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_clusters_load(path: Path) -> None:
    from padd_ds.planning.cluster import load_cluster

    assert load_cluster(path).world >= 1


def test_a_wrong_key_of_a_cluster_is_named(tmp_path: Path) -> None:
    from padd_ds.errors import UserError
    from padd_ds.planning.cluster import load_cluster

    path = tmp_path / "cluster.yaml"
    path.write_text(Path(CLUSTER).read_text().replace("tflops:", "teraflops:"))
    with pytest.raises(UserError, match=r"cluster.yaml: unknown key teraflops.*tflops"):
        load_cluster(path)
    path.write_text("nodes: 0\n")
    with pytest.raises(UserError, match=r"cluster.yaml: nodes"):
        load_cluster(path)
    with pytest.raises(UserError, match=r"no such file; give a cluster file"):
        load_cluster(tmp_path / "absent.yaml")
