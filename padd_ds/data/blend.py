"""Several corpora as one endless stream of sequences, each corpus with its share of every stretch of it.

Legend: S sequences asked for, C corpora.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from padd_ds.data.corpus import Corpus
from padd_ds.data.packing import Packing


def blended(start: int, count: int, weights_C: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Places `start` to `start + count` of the stream: the corpus of each [S], and how many of it came before [S].

    The k-th sequence of a corpus of share w, counted from 0, is due at (k + 1/2) / w, and the stream is in the order of
    these times: Webster's rule, which gives the next place to the largest w / (2 k + 1). So a place is found without
    those before it.
    """
    shares_C = np.asarray(weights_C, dtype=np.float64) / np.sum(weights_C)
    # Before any time t, the corpora together have had t sequences, give or take C / 2.
    earliest, latest = start - len(shares_C), start + count + len(shares_C)
    firsts_C = np.maximum(np.ceil(shares_C * earliest - 0.5), 0).astype(np.int64)
    lasts_C = np.floor(shares_C * latest - 0.5).astype(np.int64)
    ranks = [np.arange(first, last + 1) for first, last in zip(firsts_C, lasts_C, strict=True)]
    corpora = np.repeat(np.arange(len(shares_C)), [len(of_corpus) for of_corpus in ranks])
    rank = np.concatenate(ranks)
    order = np.lexsort((corpora, (rank + 0.5) / shares_C[corpora]))
    chosen_S = order[start - firsts_C.sum() :][:count]
    return corpora[chosen_S], rank[chosen_S]


class PackedCorpus:
    """A corpus as an endless stream of packed sequences: all of them in an order of its own in every epoch."""

    def __init__(self, corpus: Corpus, length: int, seeds: tuple[int, ...]) -> None:
        self.corpus = corpus
        self.packing = Packing(corpus.lengths_N, length)
        self._seeds = seeds
        # Two, since a batch may run across the border of epochs.
        self._order: Callable[[int], np.ndarray] = lru_cache(maxsize=2)(self._draw_order)

    def documents(self, place: int) -> list[np.ndarray]:
        """Token ids of the documents, or pieces of one, in the sequence at a place of the stream."""
        epoch, index = divmod(place, len(self.packing))
        return [self.corpus.read(*piece) for piece in self.packing.pieces(int(self._order(epoch)[index]))]

    def _draw_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self._seeds, epoch]).permutation(len(self.packing))


@dataclass(frozen=True)
class Blend:
    """Packed corpora and their weights: sequence n is a function of n, the seed, and what is in the files."""

    corpora: tuple[PackedCorpus, ...]
    weights: tuple[float, ...]

    def sequences(self, places: range) -> list[list[np.ndarray]]:
        """The documents, or pieces of one, of each sequence at these places of the stream."""
        corpus_S, place_S = blended(places.start, places.stop - places.start, self.weights)
        mine = slice(None, None, places.step)
        return [
            self.corpora[corpus].documents(int(place))
            for corpus, place in zip(corpus_S[mine], place_S[mine], strict=True)
        ]

    def describe(self, n_sequences: int) -> list[str]:
        """A line per corpus: its size, and how much of it a run of so many sequences sees."""
        lines = []
        for packed, weight in zip(self.corpora, self.weights, strict=True):
            packing, share = packed.packing, weight / sum(self.weights)
            lines.append(
                f"corpus {packed.corpus.prefix}: {len(packed.corpus.lengths_N)} documents, {packing.n_tokens} tokens "
                f"in {len(packing)} sequences, {packing.n_tokens / (len(packing) * packing.length):.1%} full; "
                f"{share:.1%} of the sequences, {n_sequences * share / len(packing):.3g} epochs"
            )
        return lines
