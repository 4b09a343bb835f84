"""Small indexed datasets on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from padd_ds.data.corpus import import_indexed_dataset


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.uint16) -> Path:
    """PREFIX.bin and PREFIX.idx without a .json, as another tool may leave them."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(count: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Documents of 1 to `longest` tokens of random ids, none of them below 3."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
