import json
import threading
from pathlib import Path

import pytest

from padd_ds.data.answers import AnswerFormat
from padd_ds.data.problems import Problem
from padd_ds.errors import UserError
from padd_ds.evaluation import kept, scoring
from padd_ds.evaluation.generate import GenerationOptions
from padd_ds.evaluation.kept import KeptResponses, Share, finish_work, open_work, responses_file, work_folder
from padd_ds.evaluation.scoring import EvaluationOptions, EvaluationResult, evaluate_problems
from padd_ds.files import write_text_whole
from tests.data.characters import VOCABULARY, character_tokenizer
from tests.tiny import tiny_student

PROBLEMS = [Problem(question=f"{'1 + ' * n}{n}", answer=str(n)) for n in range(1, 8)]
PLAN = {"seed": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_student(vocabulary=len(VOCABULARY))


def evaluated(model, kept=None, temperature: float = 1.0, batch_size: int = 2) -> EvaluationResult:
    options = EvaluationOptions(
        answer_format=AnswerFormat(name="last_number"),
        generation=GenerationOptions(max_new_tokens=6, batch_size=batch_size, temperature=temperature, top_p=0.9),
        samples=3 if temperature else 1,
    )
    return evaluate_problems(model, character_tokenizer(), PROBLEMS, options, kept)


@pytest.fixture
def output(tmp_path) -> Path:
    open_work(tmp_path / "out.json", PLAN, overwrite=False)
    return tmp_path / "out.json"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 4, 21])
def test_no_batch_size_changes_a_response(model, temperature, batch_size):
    assert evaluated(model, None, temperature, batch_size) == evaluated(model, None, temperature)


def test_an_interrupted_evaluation_goes_on_to_the_same_result(model, output, monkeypatch):
    whole = evaluated(model)
    batches = scoring.generate_batches

    def interrupted(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            if number == 4:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(scoring, "generate_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, KeptResponses(output))
    rest = work_folder(output) / "rank_0.jsonl"
    assert len(rest.read_text().splitlines()) == 8
    # As if it had been killed while writing.
    with rest.open("a") as file:
        file.write('{"problem": 1, "sam')
    asked = []
    monkeypatch.setattr(
        scoring, "generate_batches", lambda *arguments: asked.extend(arguments[2]) or batches(*arguments)
    )
    open_work(output, PLAN, overwrite=False)
    assert evaluated(model, KeptResponses(output), batch_size=5) == whole
    assert len(asked) == 3 * len(PROBLEMS) - 8


def test_ranks_share_the_work_and_agree_on_the_result(model, output):
    barrier = threading.Barrier(2)
    results: dict[int, EvaluationResult] = {}
    models = [tiny_student(vocabulary=len(VOCABULARY)) for _ in range(2)]

    def rank(number: int) -> None:
        kept = KeptResponses(output, Share(rank=number, world=2, wait=lambda: barrier.wait(60) and None))
        results[number] = evaluated(models[number], kept)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == evaluated(model)
    lines = [len(path.read_text().splitlines()) for path in sorted(work_folder(output).glob("rank_*.jsonl"))]
    assert lines == [11, 10]


def test_responses_that_other_ranks_keep_elsewhere_are_missed(model, output):
    with pytest.raises(UserError, match=r"out\.json: the responses of other ranks do not appear"):
        evaluated(model, KeptResponses(output, Share(rank=1, world=2)))


def test_finished_responses_stand_in_the_order_of_problems(model, output):
    result = evaluated(model, KeptResponses(output))
    finish_work(output, result.responses, "result")
    rows = [json.loads(line) for line in responses_file(output).read_text().splitlines()]
    assert [(row["problem"], row["sample"]) for row in rows] == [(n, s) for n in range(7) for s in (1, 2, 3)]
    assert output.read_text() == "result" and not work_folder(output).exists()


@pytest.mark.parametrize("written", ["out.responses.jsonl", "out.json"])
def test_a_kill_between_the_writes_loses_nothing(model, output, monkeypatch, written):
    result = evaluated(model, KeptResponses(output))

    def killed(path: Path, text: str) -> None:
        if path.name == written:
            raise KeyboardInterrupt
        write_text_whole(path, text)

    monkeypatch.setattr(kept, "write_text_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        finish_work(output, result.responses, "result")
    monkeypatch.undo()
    assert not output.exists()
    open_work(output, PLAN, overwrite=False)
    assert KeptResponses(output).missing([one.key for one in result.responses]) == []
    finish_work(output, result.responses, "result")
    assert output.exists() and responses_file(output).exists() and not work_folder(output).exists()


def test_another_evaluation_is_not_taken_up_and_not_lost(output):
    (work_folder(output) / "rank_0.jsonl").write_text("")
    with pytest.raises(UserError, match=r"with another limit, seed is kept there; .*--overwrite"):
        open_work(output, {"seed": 1, "limit": 2}, overwrite=False)
    assert (work_folder(output) / "rank_0.jsonl").exists()
    open_work(output, {"seed": 1}, overwrite=True)
    assert [path.name for path in work_folder(output).iterdir()] == ["plan.json"]
