"""Tokenised documents on disk, as a megatron-core indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx where
documents begin, and PREFIX.json, from tools/make_corpus.py, what they were made with.

Nothing is read but what is asked for: both files are mapped into memory. Legend: N documents.
"""

import hashlib
import json
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from padd_ds.errors import OneRankError, UserError

LOOKED_AT_TOKENS = 1 << 24
"""From the beginning of a corpus that does not tell its largest id."""
_HEAD = struct.Struct("<9sQBQQ")
"""Of an index: magic, version, type of the ids, items, ends of documents; then lengths, offsets and ends."""
_PROBE = "It's 12345.67  apples,\n\tx_1 = (a+b)*c; \u00c4\u4e2d\U0001f600"


@dataclass(frozen=True)
class Corpus:
    """An indexed dataset that was checked against a model's vocabulary."""

    prefix: Path
    dataset: Any
    """megatron.core.datasets.indexed_dataset.IndexedDataset."""
    lengths_N: np.ndarray
    """Tokens of each document."""
    vocabulary: int

    @classmethod
    def open(cls, prefix: Path, tokenizer: Any, vocabulary: int) -> "Corpus":
        """UserError where a file is missing, cut or no such file, or holds other tokens than the model's."""
        dataset = _open_dataset(prefix)
        lengths_N = _document_lengths(dataset)
        n_tokens, n_bytes = int(lengths_N.sum(dtype=np.int64)), bin_path(prefix).stat().st_size
        if n_tokens * dataset.index.dtype_size != n_bytes or lengths_N.min(initial=0) < 0:
            raise UserError(
                f"{bin_path(prefix)}: holds {n_bytes} bytes, but {idx_path(prefix).name} tells of {n_tokens} tokens of "
                f"{dataset.index.dtype_size} bytes; they are not of one corpus, or one was cut: copy or make both again"
            )
        corpus = cls(prefix, dataset, lengths_N, vocabulary)
        facts = _read_facts(prefix)
        if facts is None:
            corpus._check_ids(dataset.get(0, 0, min(n_tokens, LOOKED_AT_TOKENS)), UserError)
        else:
            _check_facts(prefix, facts, tokenizer, len(lengths_N), n_tokens)
            corpus._check_ids(np.array([facts["largest_id"]]), UserError)
        return corpus

    def read(self, document: int, start: int, length: int) -> np.ndarray:
        """Token ids of a part of a document; OneRankError for an id that the model does not have."""
        first_item = int(self.dataset.document_indices[document])
        ids = self.dataset.get(first_item, start, length)
        self._check_ids(ids, OneRankError)
        return ids.astype(np.int64)

    def _check_ids(self, ids: np.ndarray, error: type[UserError]) -> None:
        worst = int(ids.min()) if ids.min() < 0 else int(ids.max())
        if not 0 <= worst < self.vocabulary:
            raise error(
                f"{bin_path(self.prefix)}: holds token {worst}, but model.student has a vocabulary of "
                f"{self.vocabulary}; make the corpus with the student's tokenizer"
            )


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.idx")


def facts_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.json")


def import_indexed_dataset() -> Any:
    """The module of megatron-core; UserError with the command that installs it where it is missing."""
    try:
        with warnings.catch_warnings():
            # On what a GPU build would have; files need none of it.
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    except ModuleNotFoundError as error:
        raise UserError(
            f"indexed datasets (.bin, .idx) need megatron-core ({error}): pip install megatron-core"
        ) from error
    return indexed_dataset


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hexadecimal SHA-256 of what every id means and of how a line with numbers, signs and spaces is cut."""
    probe = tokenizer(_PROBE, add_special_tokens=False).input_ids
    text = json.dumps([sorted(tokenizer.get_vocab().items()), probe])
    return hashlib.sha256(text.encode()).hexdigest()


def _open_dataset(prefix: Path) -> Any:
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise UserError(f"{path}: no such file; a corpus is named by its path without .bin and .idx")
        if not path.stat().st_size:
            raise UserError(f"{path}: is empty; make the corpus again")
    if not _is_whole_index(idx_path(prefix)):
        raise UserError(f"{idx_path(prefix)}: not a whole index of an indexed dataset; copy or make it again")
    module = import_indexed_dataset()
    try:
        dataset = module.IndexedDataset(str(prefix))
    except (AssertionError, ValueError) as error:
        raise UserError(f"{idx_path(prefix)}: contradicts itself ({error}); make the corpus again") from error
    if not np.issubdtype(dataset.index.dtype, np.integer):
        raise UserError(f"{idx_path(prefix)}: holds {dataset.index.dtype.__name__}, which are no token ids")
    return dataset


def _is_whole_index(path: Path) -> bool:
    """Whether header and size fit each other. megatron-core would meet a file that is none with more than one line."""
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    magic, version, dtype, n_items, n_indices = _HEAD.unpack(head)
    size = _HEAD.size + n_items * (4 + 8) + n_indices * 8
    return (magic, version) == (b"MMIDIDX\0\0", 1) and 1 <= dtype <= 8 and size == path.stat().st_size


def _document_lengths(dataset: Any) -> np.ndarray:
    """[N]: straight from the index where a document is one item, as it is in text corpora."""
    lengths, indices = dataset.sequence_lengths, dataset.document_indices
    if len(indices) == len(lengths) + 1 and np.array_equal(indices, np.arange(len(indices))):
        return lengths
    item_ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.diff(item_ends[indices])


def _read_facts(prefix: Path) -> dict[str, Any] | None:
    path = facts_path(prefix)
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {name: facts[name] for name in ("tokenizer", "documents", "tokens", "largest_id")}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: not as tools/make_corpus.py writes it ({error}); make it again or remove it"
        ) from error


def _check_facts(prefix: Path, facts: dict[str, Any], tokenizer: Any, n_documents: int, n_tokens: int) -> None:
    if (facts["documents"], facts["tokens"]) != (n_documents, n_tokens):
        raise UserError(
            f"{facts_path(prefix)}: tells of {facts['documents']} documents and {facts['tokens']} tokens, but the "
            f"corpus has {n_documents} and {n_tokens}; it is of another corpus: copy all three files together"
        )
    if facts["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{prefix}: was made with another tokenizer than model.student has; make it again with "
            "tools/make_corpus.py --tokenizer and the student's folder"
        )
