"""A recorded teacher: its likelihoods come back as they were, only whole and only for what was recorded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from padd_ds import cache
from padd_ds.config.schema import RunConfig
from padd_ds.config.sections import DataConfig, FieldsConfig
from padd_ds.data.batches import supervised_batch
from padd_ds.data.problems import Problem
from padd_ds.data.prompts import resolve_template
from padd_ds.engine.ranks import Ranks, together
from padd_ds.errors import UserError
from padd_ds.evaluation import record as recording
from padd_ds.evaluation.generate import Response
from padd_ds.files import sha256_of
from padd_ds.hf import response_logits
from padd_ds.losses.distillation import distillation_sum, recorded_distillation_sum, top_outcomes
from padd_ds.offline import cache as offline
from padd_ds.offline.cache import TeacherCache
from padd_ds.stages.build import read_inputs
from padd_ds.stages.materials import read_training_data
from tests.commands import run_command
from tests.largest import LargestFloat32
from tests.ranks import run_ranks
from tests.tiny import tiny_student
from tests.world import joint_config
from tools.tiny_model import make_tiny_model, make_tokenizer, save_teacher

ROWS = [
    {"question": f"{a} plus {b}?", "solution": f"#{a + b}", "answer": str(a + b)} for a in range(4) for b in range(3)
]
OPTIONS = ["--solution-field", "solution", "--template", "plain", "--top-k", "5", "--shard-rows", "5"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    save_teacher(tmp_path / "teacher", make_tiny_model())
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    words = ["--teacher", folder / "teacher", "--data", folder / "data.jsonl", "--output", folder / "cache"]
    return [*map(str, words), "--batch-size", "3", "--device", "cpu", *OPTIONS, *more]


def batch_of(rows):
    prompts, solutions = [row["question"] for row in rows], [row["solution"] for row in rows]
    return supervised_batch(prompts, solutions, make_tokenizer(), 64)


def logits_of(model, batch):
    n_response = batch["target_ids_BR"].shape[1]
    return response_logits(model, batch["input_ids_BT"], batch["attention_mask_BT"], n_response)


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_the_recorded_loss_is_the_live_one_with_its_gradient(direction):
    generator = torch.Generator().manual_seed(0)
    teacher_BTV = 3 * torch.randn(2, 4, 11, generator=generator)
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    results = []
    for recorded in (False, True):
        student_BTV = torch.randn(2, 4, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if recorded:
            top_ids, logprobs = top_outcomes(teacher_BTV.flatten(0, 1), 3)
            outcomes = (top_ids.view(2, 4, 3), logprobs.view(2, 4, 4))
            loss = recorded_distillation_sum(student_BTV, *outcomes, mask_BT, direction=direction, chunk_tokens=3)
        else:
            plain = torch.ones(2)
            loss = distillation_sum(student_BTV, teacher_BTV, mask_BT, plain, direction=direction, teacher_top_k=3)
        loss.backward()
        results.append((loss.item(), student_BTV.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_likelihoods_come_back_as_the_teacher_gives_them(folder):
    cache.main(arguments(folder))
    batch = batch_of([ROWS[7], ROWS[1], ROWS[11]])
    recorded = TeacherCache.open(folder / "cache")
    mask_BR = batch["target_mask_BR"]
    top_ids_BRK, logprobs_BRQ = recorded.batch(batch["input_ids_BT"], batch["attention_mask_BT"], mask_BR)
    with torch.no_grad():
        top_ids, logprobs = top_outcomes(logits_of(make_tiny_model(), batch)[mask_BR], 5)
    torch.testing.assert_close(logprobs_BRQ[mask_BR], logprobs, atol=1e-5, rtol=1e-5)
    assert (top_ids_BRK[mask_BR] == top_ids).float().mean() > 0.9
    assert logprobs_BRQ[mask_BR].exp().sum(-1).tolist() == pytest.approx([1.0] * int(mask_BR.sum()), abs=1e-5)


def test_recording_holds_few_logits_and_fewer_in_fp32(folder, monkeypatch):
    """32 rows of 7 to 20 target tokens, with room for the logits of 40 tokens and 4 of them in fp32."""
    vocabulary, passes = 5000, []

    def logits(model, ids_BL, mask_BL, n_response):
        passes.append((len(ids_BL), n_response))
        generator = torch.Generator().manual_seed(len(passes))
        return torch.randn(len(ids_BL), n_response, vocabulary, generator=generator, dtype=torch.bfloat16)

    problems = [Problem(question="a", answer="", solution="#" * (6 + row % 14)) for row in range(32)]
    monkeypatch.setattr(recording, "response_logits", logits)
    monkeypatch.setattr(recording, "SCORED_TOKENS", 40)
    monkeypatch.setattr(recording, "CHUNK_TOKENS", 4)
    model = SimpleNamespace(device=torch.device("cpu"))
    options = recording.RecordOptions(template=resolve_template("plain"), top_k=5)
    with LargestFloat32() as largest:
        recording.record(model, make_tokenizer(), problems, options, folder / "few", {"vocabulary": vocabulary})
    assert passes == [(2, 20)] * 16
    assert vocabulary < largest.elements <= 4 * vocabulary


@pytest.mark.parametrize(("scored_tokens", "chunk_tokens"), [(1, 1), (9, 2)])
def test_the_pieces_of_a_recording_do_not_change_it(folder, monkeypatch, scored_tokens, chunk_tokens):
    cache.main(arguments(folder))
    (folder / "cache").rename(folder / "whole")
    monkeypatch.setattr(recording, "SCORED_TOKENS", scored_tokens)
    monkeypatch.setattr(recording, "CHUNK_TOKENS", chunk_tokens)
    cache.main(arguments(folder))
    batch = batch_of(ROWS)
    asked = batch["input_ids_BT"], batch["attention_mask_BT"], batch["target_mask_BR"]
    whole, pieces = (TeacherCache.open(folder / name).batch(*asked) for name in ("whole", "cache"))
    assert torch.equal(whole[0], pieces[0])
    torch.testing.assert_close(whole[1], pieces[1])


def test_right_responses_are_kept_once_and_can_be_trained_on(folder, monkeypatch):
    def answers(model, tokenizer, prompts, options):
        # To every question: 1, 1 in other words, 2, and 2 without an end.
        texts = [("#1", True), ("0+1#1", True), ("#1", True), ("#2", True), ("1+1#2", False)]
        return [Response(text=texts[row % 5][0], tokens=2, ended=texts[row % 5][1]) for row in range(len(prompts))]

    monkeypatch.setattr(recording, "generate_responses", answers)
    cache.main(arguments(folder, "--responses", "5", "--answer-format", "pattern", "--pattern", r"#(\d+)$"))
    rows = [json.loads(line) for line in (folder / "cache" / "responses.jsonl").read_text().splitlines()]
    expected = {"1": ["#1", "0+1#1"], "2": ["#2"]}
    wanted = [(row["question"], text) for row in ROWS for text in expected.get(row["answer"], [])]
    assert [(row["question"], row["solution"]) for row in rows] == wanted
    batch = batch_of(rows[:3])
    recorded = TeacherCache.open(folder / "cache")
    recorded.batch(batch["input_ids_BT"], batch["attention_mask_BT"], batch["target_mask_BR"])
    # All of them, beside the data's own targets of the part; a question as often as it has other words.
    fields = FieldsConfig(solution="solution")
    data = DataConfig(source=str(folder / "data.jsonl"), fields=fields, part="A")
    alone = joint_config(stage="warmup", data=data)
    beside = joint_config(stage="warmup", data=data, warmup={"responses": str(folder / "cache")})
    own = read_training_data(alone, make_tokenizer()).problems
    found = read_training_data(beside, make_tokenizer())
    assert found.facts["recorded"] == len(wanted)
    assert [(p.question, p.solution) for p in found.problems] == [(p.question, p.solution) for p in own] + wanted


def test_an_interrupted_recording_goes_on_to_the_same_bytes(folder, monkeypatch):
    cache.main(arguments(folder))
    whole = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    (folder / "cache").rename(folder / "first")
    write, written = recording.write_shard, []

    def stopping(path, *rest):
        if len(written) == 2:
            path.with_name(".tmpa1B2c3").write_text("what safetensors leaves when it is killed")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(recording, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        cache.main(arguments(folder))
    assert not (folder / "cache").exists()
    monkeypatch.setattr(recording, "write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    cache.main(arguments(folder))
    assert written == ["shard_00000.safetensors", "shard_00001.safetensors", "shard_00002.safetensors"]
    assert {path.name: path.read_bytes() for path in (folder / "cache").iterdir()} == whole


def test_what_another_recording_left_is_neither_taken_up_nor_lost(folder, monkeypatch):
    write = recording.write_shard

    def stopping(path, *rest):
        if path.name == "shard_00001.safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(recording, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        cache.main(arguments(folder))
    monkeypatch.setattr(recording, "write_shard", write)
    with pytest.raises(UserError, match=r"\.cache\.partial: an interrupted recording with another stop, top_k is kept"):
        cache.main(arguments(folder, "--top-k", "2", "--stop", "x"))
    shard = folder / ".cache.partial" / "shard_00000.safetensors"
    kept = shard.stat().st_mtime_ns
    cache.main(arguments(folder, "--batch-size", "2"))
    assert (folder / "cache" / shard.name).stat().st_mtime_ns == kept
    assert TeacherCache.open(folder / "cache").top_k == 5


def test_targets_that_were_not_recorded_are_counted_before_any_work(folder):
    cache.main(arguments(folder, "--limit", str(len(ROWS) - 2)))
    tiny_student(vocabulary=len(make_tokenizer())).save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    tree = {"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 1}}
    (folder / "one.json").write_text(json.dumps(tree))
    config = RunConfig(
        stage="warmup",
        run_dir=str(folder / "run"),
        deepspeed=str(folder / "one.json"),
        steps=2,
        model={"student": str(folder / "student")},
        data={"source": str(folder / "data.jsonl"), "part": "all", "fields": {"solution": "solution"}},
        optimizer={"learning_rate": 1e-3},
        warmup={"batch_size": 4, "init_weight": 0.0, "teacher_cache": str(folder / "cache")},
    )
    with pytest.raises(UserError, match=f"2 of {len(ROWS)} targets of the training data are not in it"):
        read_inputs(config, 1)


def changed(path):
    """The last byte but one, which no format notices."""
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1
    path.write_bytes(contents)


def cut(path):
    """Its second half is gone."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [changed, cut, Path.unlink])
@pytest.mark.parametrize("name", ["shard_00001.safetensors", "responses.jsonl"])
def test_a_harmed_file_is_named_with_the_remedy(folder, name, harm):
    cache.main(arguments(folder))
    harm(folder / "cache" / name)
    with pytest.raises(UserError, match=rf"{name}: missing or changed since it was written; record it again") as raised:
        TeacherCache.open(folder / "cache")
    assert "\n" not in str(raised.value)


def test_changed_responses_are_no_training_data(folder):
    cache.main(arguments(folder))
    responses = folder / "cache" / "responses.jsonl"
    offline.check_responses(str(responses))
    changed(responses)
    with pytest.raises(UserError, match=r"responses\.jsonl: missing or changed"):
        read_training_data(joint_config(data=DataConfig(source=str(responses))), make_tokenizer())
    offline.check_responses(str(folder / "data.jsonl"))


def test_so_is_a_harmed_index(folder):
    cache.main(arguments(folder))
    cut(folder / "cache" / "cache.json")
    with pytest.raises(UserError, match=r"cache\.json: not readable as JSON .*; record it again"):
        TeacherCache.open(folder / "cache")
    (folder / "cache" / "cache.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(UserError, match=r"cache\.json: format 1 is not 2; record it again"):
        TeacherCache.open(folder / "cache")
    (folder / "cache" / "cache.json").unlink()
    with pytest.raises(UserError, match=r"no cache\.json in it"):
        TeacherCache.open(folder / "cache")


def files_hashed(monkeypatch, folder):
    hashed = []
    monkeypatch.setattr(offline, "sha256_of", lambda path: (hashed.append(path.name), sha256_of(path))[1])
    TeacherCache.open(folder)
    return hashed


def test_the_first_rank_hashes_every_file_once_and_no_other_does(folder, monkeypatch):
    cache.main(arguments(folder))
    shards = [f"shard_{number:05d}.safetensors" for number in range(3)]
    assert files_hashed(monkeypatch, folder / "cache") == ["responses.jsonl", *shards]
    monkeypatch.setenv("RANK", "1")
    assert files_hashed(monkeypatch, folder / "cache") == []
    cut(folder / "cache" / shards[2])
    with pytest.raises(UserError, match=rf"{shards[2]}: cannot be read .*; record it again"):
        TeacherCache.open(folder / "cache")


def verdict(ranks: Ranks, folder: str) -> str:
    try:
        together(lambda: TeacherCache.open(Path(folder)), ranks)
    except UserError as error:
        return str(error)
    return "whole"


@pytest.mark.ranks
def test_every_rank_stops_at_what_the_first_finds(folder):
    cache.main(arguments(folder))
    assert run_ranks(verdict, 2, str(folder / "cache")) == ["whole", "whole"]
    changed(folder / "cache" / "responses.jsonl")
    first, second = run_ranks(verdict, 2, str(folder / "cache"))
    assert first == second and "responses.jsonl: missing or changed" in first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-k", "0"], "--top-k 0 without --responses"),
        (["--responses", "2", "--target", "{answer}"], "leave it out with --responses"),
        (["--shard-rows", "0"], "--shard-rows 0 must be at least 1"),
        (["--limit", "1", "--part", "D"], "--part D .* has no problem"),
        (["--part", "D", "--part-fractions", "0.5,0.3,0.2,0"], "--part D .* has no problem"),
        (["--part", "D", "--part-fractions", "0.5,0.3,0.2"], "--part-fractions 0.5,0.3,0.2: give four shares"),
        (["--part", "D", "--part-fractions", "0.5,0.3,0.2,1"], "must be >= 0 and add up to 1, not 2"),
        (["--part-fractions", "0.5,0.3,0.2,0"], "--part-fractions are those of --part"),
        (["--limit", "-1"], "--limit -1 must be at least 1"),
        (["--data-dir", "{folder}"], "--data-dir goes with --benchmark"),
        (["--responses", "4", "--temperature", "0"], "--responses 4 at --temperature 0 are all the same"),
        (["--responses", "4", "--temperature", "nan"], "--temperature nan must be a finite number"),
        (["--target", "{soluton}"], r"did you mean \{solution\}"),
        (["--output", "{folder}/data.jsonl/cache"], r"data\.jsonl is a file, not a folder"),
        (["--solution-field", "working"], "set --solution-field"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(folder, more, message):
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        cache.main(arguments(folder, *(word.replace("{folder}", str(folder)) for word in more)))
    assert sorted(folder.iterdir()) == before


def test_chat_without_a_template_is_refused_as_by_padd_eval(folder):
    words = arguments(folder)
    place = words.index("--template")
    with pytest.raises(UserError, match="--chat goes with --template"):
        cache.main([*words[:place], *words[place + 2 :], "--chat"])


def test_worked_answers_are_solutions_too(folder):
    rows = [{"question": row["question"], "answer": f"so\n#### {row['answer']}"} for row in ROWS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in arguments(folder, "--gold-format", "gsm8k") if word not in OPTIONS[:2]]
    cache.main(words)
    assert {one.solution for one in offline.read_responses(folder / "cache")} == {"so"}


def test_help_is_of_this_command(capsys):
    with pytest.raises(SystemExit):
        cache.parse_args(["--help"])
    told = capsys.readouterr().out
    assert "(default: plain)" in told and "of --responses (default 1.0)" in " ".join(told.split())
    assert not [word for word in ("Pass@", "--samples", "--level-field", "perplexity") if word in told]


def test_a_warm_up_without_teacher_has_the_losses_of_one_with(folder):
    cache.main(arguments(folder))
    student = tiny_student(vocabulary=len(make_tokenizer()))
    student.save_pretrained(folder / "student")
    make_tokenizer().save_pretrained(folder / "student")
    tree = {"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 1}}
    (folder / "one.json").write_text(json.dumps(tree))
    losses = []
    for name, warmup in (("live", {"teacher_top_k": 5}), ("recorded", {"teacher_cache": str(folder / "cache")})):
        run = {
            "stage": "warmup",
            "run_dir": str(folder / name),
            "deepspeed": str(folder / "one.json"),
            "steps": 2,
            "model": {"student": str(folder / "student")},
            "data": {"source": str(folder / "data.jsonl"), "part": "all", "fields": {"solution": "solution"}},
            "optimizer": {"learning_rate": 1e-3},
            "warmup": {"batch_size": 4, "init_weight": 0.0, **warmup},
        }
        if name == "live":
            run["model"]["teacher"] = str(folder / "teacher")
        (folder / "run.yaml").write_text(yaml.safe_dump(run))
        done = run_command("padd_ds/train.py", "--config", folder / "run.yaml")
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss_kd"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] > 0
