"""Configuration: precedence, and one clear line for each mistake."""

from pathlib import Path

import pytest
import yaml

from padd_ds.config.describe import describe_options
from padd_ds.config.load import as_yaml, load_run_config
from padd_ds.errors import UserError

MINIMAL = {
    "stage": "warmup",
    "run_dir": "runs/x",
    "deepspeed": "ds_configs/x.json",
    "steps": 10,
    "model": {"student": "s", "teacher": "t"},
    "data": {"source": "d.jsonl"},
    "optimizer": {"learning_rate": "2e-5"},
}


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_then_file_then_overrides(run_yaml: Path) -> None:
    config = load_run_config(run_yaml, ["steps=20", "warmup.kd_weight=0.25", "data.fields.answer=target"])
    assert config.steps == 20
    assert config.optimizer.learning_rate == 2e-5
    assert config.warmup.kd_weight == 0.25 and config.warmup.init_weight == 0.1
    assert config.data.fields.answer == "target"
    assert config.data_part == "B"


def test_a_long_value_stays_on_its_line(run_yaml: Path) -> None:
    folder = "/a folder" * 30
    assert f"\nrun_dir: {folder}\n" in as_yaml(load_run_config(run_yaml, [f"run_dir={folder}"]))


def test_joint_trains_on_part_c_unless_told_otherwise(run_yaml: Path) -> None:
    assert load_run_config(run_yaml, ["stage=joint"]).data_part == "C"
    assert load_run_config(run_yaml, ["stage=joint", "data.part=all"]).data_part == "all"


def test_the_teacher_needs_no_teacher_and_nothing_to_balance(run_yaml: Path) -> None:
    config = load_run_config(run_yaml, ["stage=teacher_grpo", "model.teacher=null", "balance.kind=aux_loss"])
    assert config.data_part == "C"
    assert config.kd_weight == 0 and not config.balances_by_bias


@pytest.mark.parametrize("name", ["teacher_grpo", "warmup", "warmup_corpora", "joint"])
def test_the_files_with_the_papers_numbers_load(repository: Path, name: str) -> None:
    config = load_run_config(repository / "ds_configs" / "runs" / f"{name}.yaml", [])
    assert config.stage == name.removesuffix("_corpora")
    assert (repository / config.deepspeed).is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("warmup.kd_wieght=1", "unknown key warmup.kd_wieght; did you mean kd_weight?"),
        ("warmpu.kd_weight=1", "unknown key warmpu; did you mean warmup?"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1: input should be greater than 0"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate = 'fast'"),
        ("stage=other", "stage = 'other': input should be 'teacher_grpo', 'warmup' or 'joint'"),
        ("rollout.group_size=1", "rollout.group_size = 1: input should be greater than or equal to 2"),
        ("model.teacher=null", "set warmup.kd_weight=0"),
        ("data={}", "data.source is missing; set it in the file or as data.source=VALUE"),
        ("warmup.corpora=[{prefix: a}]", "takes the place of the whole data section: leave that out"),
        ("warmup.corpora=[{prefix: a, weight: 0}]", "warmup.corpora.0.weight = 0: input should be greater than 0"),
        ("warmup.corpora=[{weight: 1}]", "warmup.corpora.0.prefix is missing"),
        ("warmup.corpora=[{prefix: a, wieght: 1}]", "warmup.corpora.0.wieght"),
        ("warmup.sequence_length=1", "should be greater than or equal to 2"),
        ("data.part_fractions={A: 0.5, B: 0.1, C: 0.1, D: 0.1}", "must add up to 1"),
        ("steps", "not of the form section.key=value"),
        ("steps.more=1", "steps is a value, not a section"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(run_yaml: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_run_config(run_yaml, [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["responses", "teacher_cache"])
def test_corpora_have_no_questions_that_a_teacher_answered(run_yaml: Path, key: str) -> None:
    corpora = ["data={}", "warmup.corpora=[{prefix: a, weight: 2}, {prefix: b}]"]
    config = load_run_config(run_yaml, corpora)
    assert config.reads_corpora and [(c.prefix, c.weight) for c in config.warmup.corpora] == [("a", 2.0), ("b", 1.0)]
    with pytest.raises(UserError, match=rf"set warmup\.{key}=null, or warmup\.corpora=\[\]"):
        load_run_config(run_yaml, [*corpora, f"warmup.{key}=cache"])


def test_corpora_are_the_warm_ups_alone(run_yaml: Path) -> None:
    config = load_run_config(run_yaml, ["stage=joint", "warmup.corpora=[{prefix: a}]"])
    assert not config.reads_corpora
    with pytest.raises(UserError, match=r"data\.source is missing"):
        load_run_config(run_yaml, ["stage=joint", "data={}", "warmup.corpora=[{prefix: a}]"])


def test_a_bare_off_is_no_false(run_yaml: Path) -> None:
    assert load_run_config(run_yaml, ["routing.replay=off"]).routing.replay == "off"
    with pytest.raises(UserError, match=r"routing\.replay"):
        load_run_config(run_yaml, ["routing.replay=true"])


@pytest.mark.parametrize("stage", ["joint", "teacher_grpo"])
def test_importance_weights_and_nucleus_sampling_exclude_each_other(run_yaml: Path, stage: str) -> None:
    both = [f"stage={stage}", "policy.importance_cap=2", "rollout.top_p=0.9"]
    with pytest.raises(UserError) as raised:
        load_run_config(run_yaml, both)
    assert "policy.importance_cap cannot correct for rollout.top_p 0.9" in str(raised.value)
    assert "set rollout.top_p=1, or policy.importance_cap=null" in str(raised.value)
    assert "\n" not in str(raised.value)
    for one in ("rollout.top_p=1", "policy.importance_cap=null", "stage=warmup"):
        load_run_config(run_yaml, [*both, one])


def test_ranks_wait_for_one_that_waits_for_its_server(run_yaml: Path) -> None:
    served = ["stage=joint", "rollout.engine=vllm", "vllm.start_timeout_s=2000", "vllm.answer_timeout_s=700"]
    assert load_run_config(run_yaml, served).longest_wait_for_servers_s == 2700
    assert load_run_config(run_yaml, [*served, "rollout.engine=hf"]).longest_wait_for_servers_s == 0


def test_servers_do_not_know_a_bias_of_the_logits(run_yaml: Path) -> None:
    both = ["stage=joint", "balance.target=logit", "rollout.engine=vllm"]
    with pytest.raises(UserError, match=r"balance\.target=selection, or rollout\.engine=hf"):
        load_run_config(run_yaml, both)
    for one in ("balance.target=selection", "rollout.engine=hf", "balance.kind=none"):
        load_run_config(run_yaml, [*both, one])


def test_what_is_drawn_ahead_needs_awake_servers_and_a_correction(run_yaml: Path) -> None:
    ahead = ["stage=joint", "rollout.max_staleness=1"]
    served = [*ahead, "rollout.engine=vllm"]
    awake = [*served, "vllm.sleep=false"]
    for words, missing in ((ahead, "rollout.engine=vllm"), (served, "vllm.sleep=false"), (awake, "importance_cap")):
        with pytest.raises(UserError, match=rf"max_staleness is 1.*{missing}"):
            load_run_config(run_yaml, words)
    load_run_config(run_yaml, [*awake, "policy.importance_cap=2"])
    elsewhere = ["vllm.servers=[http://a:1]", "vllm.transport=network"]
    load_run_config(run_yaml, [*served, *elsewhere, "policy.importance_cap=2"])
    load_run_config(run_yaml, ["stage=warmup", "rollout.max_staleness=1"])


@pytest.mark.parametrize(("stage", "tells"), [("joint", True), ("teacher_grpo", False)])
def test_a_dense_models_servers_have_no_experts_to_tell(run_yaml: Path, stage: str, tells: bool) -> None:
    config = load_run_config(run_yaml, [f"stage={stage}", "rollout.engine=vllm", "vllm.tell_experts=true"])
    assert config.servers_tell_experts == tells


def test_a_teachers_responses_have_no_likelihood_of_the_rollout(run_yaml: Path) -> None:
    both = ["stage=joint", "policy.importance_cap=2", "rollout.guidance=cache"]
    with pytest.raises(UserError, match=r"responses of rollout\.guidance have none of: set one of them to null"):
        load_run_config(run_yaml, both)
    for one in ("policy.importance_cap=null", "rollout.guidance=null"):
        load_run_config(run_yaml, [*both, one])


def test_the_weight_of_distillation_falls_where_it_is_told_to(run_yaml: Path) -> None:
    joint = ["stage=joint", "steps=4", "distillation.weight=2"]
    config = load_run_config(run_yaml, joint)
    assert [config.kd_weight_at(step) for step in range(4)] == [2.0] * 4
    config = load_run_config(run_yaml, [*joint, "distillation.schedule=linear"])
    assert [config.kd_weight_at(step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_a_floor_above_the_ceiling_is_refused(run_yaml: Path) -> None:
    with pytest.raises(UserError, match=r"temperature_floor 1\.5 is above temperature_ceiling 1\.0"):
        load_run_config(run_yaml, ["distillation.temperature_floor=1.5", "distillation.temperature_ceiling=1"])


def test_a_missing_key_is_named(run_yaml: Path) -> None:
    run_yaml.write_text(yaml.safe_dump({name: value for name, value in MINIMAL.items() if name != "steps"}))
    with pytest.raises(UserError, match="steps is missing"):
        load_run_config(run_yaml, [])


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", ""])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_run_config(path, [])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_run_config(tmp_path / "none.yaml", [])


def test_every_option_is_described() -> None:
    lines = describe_options().splitlines()
    assert len(lines) > 60
    assert all(line.split("] ", 1)[1].strip() for line in lines), [line for line in lines if line.endswith("] ")]
    assert any(line.startswith("policy.shift_penalty [number; default 0.1] lambda") for line in lines)


def test_every_run_file_of_the_repository_loads(repository: Path) -> None:
    paths = sorted((repository / "ds_configs" / "runs").glob("*.yaml"))
    assert paths
    for path in paths:
        config = load_run_config(path, [])
        assert (repository / config.deepspeed).is_file(), path
