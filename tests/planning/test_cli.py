"""padd-plan from files: the shipped plans, --validate, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from padd_ds.plan import cli

RUN, CLUSTER = "ds_configs/plans/paper.yaml", "ds_configs/clusters/h100.yaml"


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, repository: Path) -> Callable[..., None]:
    """padd-plan, in this process, from the repository's root."""
    monkeypatch.chdir(repository)

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["padd-plan", *map(str, arguments)])
        cli()

    return run


def test_the_papers_experiment(plan: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan("--config", RUN, "--cluster", CLUSTER, "rollout.prompts=32", "--nodes", 2, "--json", tmp_path / "plan.json")
    told = capsys.readouterr().out
    assert "30.53B parameters, 3.35B active" in told and "a rank   16 sequences" in told and "Recommended: " in told
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["recommended"]["fits"] and facts["recommended"]["changes"] == []
    assert sum(facts["asked"]["memory_bytes"]["loss"].values()) > 30 * 2**30


def test_validate_refuses_what_does_not_fit(plan: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        plan("--config", RUN, "--cluster", CLUSTER, "--validate")
    told = capsys.readouterr().err
    assert refused.value.code == 2 and "does not fit" in told and told.count("\n") == 1
    plan("--config", RUN, "--cluster", CLUSTER, "--nodes", 2, "--validate")


def test_batches_that_cannot_be_dealt_out_are_refused(
    plan: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        plan("--config", RUN, "--cluster", CLUSTER, "--nodes", 3)
    told = capsys.readouterr().err
    assert refused.value.code == 2
    assert "rollout.prompts 16 is not divisible by 24 ranks; set rollout.prompts=24, or take a number of ranks" in told


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


def test_a_share_of_nothing_and_a_length_of_nothing_are_refused(
    plan: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(Path(CLUSTER).read_text() + "tflops_share: 0\n")
    for arguments, message in (
        (["--cluster", path], "tflops_share"),
        (["--cluster", CLUSTER, "--mean-response", 0], "--mean-response 0 must be at least 1"),
    ):
        with pytest.raises(SystemExit) as refused:
            plan("--config", RUN, *arguments)
        assert refused.value.code == 2 and message in capsys.readouterr().err
