"""Tokenise documents for the warm-up: PREFIX.bin and PREFIX.idx, a megatron-core indexed dataset, and PREFIX.json.

Example: make_corpus.py web.jsonl books/ --tokenizer students/converted --output corpora/text
Then in the run: warmup.corpora: [{prefix: corpora/text, weight: 1}]
Sources are read row by row: JSONL, JSON or parquet files, folders of them, hub names (a configuration after a colon).
Each document ends in the tokenizer's end token. Fast tokenizers use all cores (RAYON_NUM_THREADS sets another number).
"""

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from padd_ds.data.corpus import bin_path, facts_path, idx_path, import_indexed_dataset, tokenizer_fingerprint
from padd_ds.data.prompts import begin_of_text
from padd_ds.data.sources import iterate_rows, source_files
from padd_ds.errors import UserError, run_cli
from padd_ds.files import check_output_free, disk_full_is_user_error, give_usual_modes
from padd_ds.hf import load_tokenizer

DOCUMENTS_AT_ONCE = 1000


@dataclass
class Facts:
    """What PREFIX.json tells."""

    tokenizer: str
    """Fingerprint; a run refuses a corpus of another tokenizer than its student's."""
    sources: list[str]
    field: str
    end_token: int
    documents: int = 0
    tokens: int = 0
    largest_id: int = 0
    empty: int = 0
    """Rows without text, left out."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, folder or hub name")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the student's folder, or a hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="path without .bin and .idx")
    parser.add_argument("--field", default="text", help="column that holds a document (default %(default)s)")
    parser.add_argument("--split", help="split of a hub set, or how the file names of a folder begin")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing corpus")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in outputs(args.output):
        check_output_free(path, args.overwrite)
    module = import_indexed_dataset()
    tokenizer = load_tokenizer(args.tokenizer, trust_remote_code=args.trust_remote_code)
    files = [source_files(source, args.split) for source in args.sources]
    n_bytes = sum(path.stat().st_size for found in files for path in found or ())
    args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = tempfile.TemporaryDirectory(prefix=f".{args.output.name}.partial-", dir=args.output.absolute().parent)
    progress = tqdm(total=n_bytes or None, unit="B", unit_scale=True)
    with staging as folder, disk_full_is_user_error(args.output), progress:
        staged = Path(folder) / args.output.name
        facts = write_corpus(staged, tokenizer, args, module, progress)
        give_usual_modes(Path(folder))
        move_whole(staged, args.output)
    print(
        f"wrote {facts.documents} documents, {facts.tokens} tokens ({facts.empty} rows without text) to {args.output}"
    )


def write_corpus(prefix: Path, tokenizer: Any, args: argparse.Namespace, module: Any, progress: tqdm) -> Facts:
    """Tokenise all sources into the three files; UserError where a row has no such field or no row has text."""
    end = tokenizer.eos_token_id
    facts = Facts(tokenizer_fingerprint(tokenizer), args.sources, args.field, end)
    dtype = module.DType.optimal_dtype(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))
    builder = module.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    begin = begin_of_text(tokenizer)
    rows = (row for source in args.sources for row in documents(source, args, progress.update))
    while texts := list(itertools.islice(rows, DOCUMENTS_AT_ONCE)):
        filled = [begin + text for text in texts if text]
        facts.empty += len(texts) - len(filled)
        found = tokenizer(filled, add_special_tokens=False, verbose=False).input_ids if filled else []
        for ids in found:
            document = np.array([*ids, end])
            builder.add_document(document, [len(document)])
            facts.documents += 1
            facts.tokens += len(document)
            facts.largest_id = max(facts.largest_id, int(document.max()))
        progress.set_postfix(documents=facts.documents, tokens=facts.tokens)
    if not facts.documents:
        raise UserError(f"{', '.join(args.sources)}: no row has text in {args.field!r}; set --field")
    builder.finalize(str(idx_path(prefix)))
    facts_path(prefix).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    return facts


def documents(source: str, args: argparse.Namespace, on_bytes: Callable[[int], Any]) -> Iterator[str]:
    for number, row in enumerate(iterate_rows(source, args.split, on_bytes), start=1):
        text = row.get(args.field)
        if not isinstance(text, str):
            there = ", ".join(row) or "none"
            raise UserError(f"{source}: row {number} has no text in {args.field!r} (fields: {there}); set --field")
        yield text


def outputs(prefix: Path) -> tuple[Path, ...]:
    """In the order in which they appear: without its index, a corpus is none."""
    return bin_path(prefix), facts_path(prefix), idx_path(prefix)


def move_whole(staged: Path, prefix: Path) -> None:
    """Give the staged files their names, after an earlier corpus's index is gone."""
    idx_path(prefix).unlink(missing_ok=True)
    for path, final in zip(outputs(staged), outputs(prefix), strict=True):
        os.replace(path, final)


if __name__ == "__main__":
    run_cli(main)
