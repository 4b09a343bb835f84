"""Indexed datasets: what is read from them, and what is refused."""

import builtins
import json

import numpy as np
import pytest

from padd_ds.data.corpus import Corpus, bin_path, facts_path, idx_path, import_indexed_dataset, tokenizer_fingerprint
from padd_ds.errors import OneRankError, UserError
from tests.corpora import write_corpus
from tests.data.characters import character_tokenizer
from tools.tiny_model import make_tokenizer

DOCUMENTS = [[5, 6, 7, 2], [], [8, 2], [9, 10, 11, 12, 2]]


@pytest.fixture
def prefix(tmp_path):
    return write_corpus(tmp_path / "v1.2", DOCUMENTS)


def open_corpus(prefix, vocabulary=20):
    return Corpus.open(prefix, make_tokenizer(), vocabulary)


def write_facts(prefix, **changes):
    facts = {"tokenizer": tokenizer_fingerprint(make_tokenizer()), "documents": 4, "tokens": 11, "largest_id": 12}
    facts_path(prefix).write_text(json.dumps(facts | changes))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_documents_come_back_as_they_were_written(tmp_path, dtype):
    corpus = open_corpus(write_corpus(tmp_path / "c", DOCUMENTS, dtype))
    assert corpus.lengths_N.tolist() == [4, 0, 2, 5]
    assert [corpus.read(n, 0, len(ids)).tolist() for n, ids in enumerate(DOCUMENTS) if ids] == [
        d for d in DOCUMENTS if d
    ]
    assert corpus.read(3, 1, 3).tolist() == [10, 11, 12]


def test_a_document_of_several_items_is_one(tmp_path):
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    builder.add_document(np.array([3, 4, 5, 6, 7]), [2, 3])
    builder.add_document(np.array([8, 9]), [2])
    builder.add_document(np.array([10, 11, 12]), [1, 0, 2])
    builder.finalize(str(tmp_path / "c.idx"))
    corpus = open_corpus(tmp_path / "c")
    assert corpus.lengths_N.tolist() == [5, 2, 3]
    assert corpus.read(0, 1, 4).tolist() == [4, 5, 6, 7] and corpus.read(2, 0, 3).tolist() == [10, 11, 12]


@pytest.mark.parametrize("path", [bin_path, idx_path])
def test_a_missing_or_empty_file_is_named(prefix, path):
    path(prefix).write_bytes(b"")
    with pytest.raises(UserError, match=f"{path(prefix).name}: is empty"):
        open_corpus(prefix)
    path(prefix).unlink()
    with pytest.raises(UserError, match=f"{path(prefix).name}: no such file; .* without .bin and .idx"):
        open_corpus(prefix)


@pytest.mark.parametrize("change", [-2, 2])
def test_a_bin_of_another_length_than_the_index_tells_is_refused(prefix, change):
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(UserError, match=f"holds {22 + change} bytes, but v1.2.idx tells of 11 tokens of 2 bytes"):
        open_corpus(prefix)


@pytest.mark.parametrize(
    "content", [b"no index at all, but some other file", b"MMIDIDX\0\0", b"MMIDIDX\0\0" + b"\xff" * 40]
)
def test_an_index_that_is_none_is_refused(prefix, content):
    idx_path(prefix).write_bytes(content)
    with pytest.raises(UserError, match=r"v1\.2\.idx: not a whole index"):
        open_corpus(prefix)


def test_an_index_cut_anywhere_is_refused(prefix):
    whole = idx_path(prefix).read_bytes()
    for length in range(1, len(whole)):
        idx_path(prefix).write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"v1\.2\.idx"):
            open_corpus(prefix)


def test_an_index_that_contradicts_itself_is_refused(prefix):
    whole = bytearray(idx_path(prefix).read_bytes())
    whole[-8:] = (3).to_bytes(8, "little")
    idx_path(prefix).write_bytes(whole)
    with pytest.raises(UserError, match=r"v1\.2\.idx: contradicts itself"):
        open_corpus(prefix)


def test_numbers_with_fractions_are_no_tokens(tmp_path):
    with pytest.raises(UserError, match="float32, which are no token ids"):
        open_corpus(write_corpus(tmp_path / "c", [[1.0, 2.0]], np.float32))


@pytest.mark.parametrize(("ids", "dtype"), [([5, 20, 2], np.uint16), ([5, -1, 2], np.int32)])
def test_ids_beyond_the_vocabulary_are_refused_at_the_start(tmp_path, ids, dtype):
    with pytest.raises(UserError, match=rf"c\.bin: holds token {ids[1]}, but .* vocabulary of 20"):
        open_corpus(write_corpus(tmp_path / "c", [[3, 4], ids], dtype))


def test_ids_beyond_the_vocabulary_behind_what_is_looked_at_are_refused_when_they_are_read(prefix, monkeypatch):
    monkeypatch.setattr("padd_ds.data.corpus.LOOKED_AT_TOKENS", 6)
    corpus = open_corpus(prefix, vocabulary=12)
    assert corpus.read(0, 0, 4).tolist() == DOCUMENTS[0]
    with pytest.raises(OneRankError, match=r"holds token 12, but .* vocabulary of 12"):
        corpus.read(3, 0, 5)


def test_what_the_tool_wrote_down_is_held_against_corpus_and_tokenizer(prefix):
    write_facts(prefix)
    assert open_corpus(prefix).read(2, 0, 2).tolist() == [8, 2]
    write_facts(prefix, tokens=12)
    with pytest.raises(UserError, match=r"tells of 4 documents and 12 tokens, but the corpus has 4 and 11"):
        open_corpus(prefix)
    write_facts(prefix, tokenizer="another")
    with pytest.raises(UserError, match=r"another tokenizer than model\.student .* tools/make_corpus\.py --tokenizer"):
        open_corpus(prefix)
    write_facts(prefix, largest_id=20)
    with pytest.raises(UserError, match="holds token 20"):
        open_corpus(prefix)


@pytest.mark.parametrize("text", ["{", "[]", '{"tokens": 1}'])
def test_facts_that_are_none_are_refused(prefix, text):
    facts_path(prefix).write_text(text)
    with pytest.raises(UserError, match=r"v1\.2\.json: not as tools/make_corpus\.py writes it"):
        open_corpus(prefix)


def test_a_fingerprint_survives_saving_and_differs_between_tokenizers(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(character_tokenizer()) != tokenizer_fingerprint(tokenizer)
    tokenizer.add_tokens(["~"])
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(make_tokenizer())


def test_without_megatron_core_the_command_that_installs_it_is_told(prefix, monkeypatch):
    imported = builtins.__import__

    def none(name, *given, **more):
        if name.startswith("megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(UserError, match=r"pip install megatron-core"):
        open_corpus(prefix)
