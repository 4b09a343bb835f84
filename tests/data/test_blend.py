from collections import Counter

import numpy as np
import pytest

from padd_ds.data.blend import Blend, PackedCorpus, blended
from padd_ds.data.corpus import Corpus
from tests.corpora import random_documents, write_corpus
from tools.tiny_model import make_tokenizer

WEIGHTS = [[1.0], [0.3, 0.7], [5.0, 2.0, 1.0], [1e-3, 1.0, 1.0, 0.1], [7.3, 2.0, 0.5]]


def stream(start: int, count: int, weights: list[float]) -> list[tuple[int, int]]:
    corpora, ranks = blended(start, count, weights)
    return list(zip(corpora.tolist(), ranks.tolist(), strict=True))


def test_places_by_hand_are_those_of_websters_rule():
    # w / (2 k + 1): 3, 1, 3/5, 3/7; 1. At a tie the first corpus goes first.
    assert stream(0, 8, [3, 1]) == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_any_stretch_is_the_same_as_within_the_whole(weights):
    whole = stream(0, 3000, weights)
    for start in (0, 1, 17, 500, 2990):
        assert stream(start, 10, weights) == whole[start : start + 10]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shares_hold_at_every_moment_and_no_sequence_is_left_out(weights):
    seen: Counter[int] = Counter()
    for place, (corpus, rank) in enumerate(stream(0, 3000, weights), start=1):
        assert rank == seen[corpus]
        seen[corpus] += 1
        for index, weight in enumerate(weights):
            assert abs(seen[index] - place * weight / sum(weights)) <= len(weights) / 2 + 0.5


def test_a_place_far_away_costs_no_more():
    corpora, ranks = blended(10**12, 1000, [0.25, 0.75])
    assert Counter(corpora.tolist()) == {0: 250, 1: 750}
    assert ranks.max() < 0.75 * 10**12 + 751


@pytest.fixture
def two(tmp_path):
    """Two corpora, their documents, and the blend of them by 1 to 3."""
    texts = [random_documents(40, 30, 60, seed) for seed in (0, 1)]
    prefixes = [write_corpus(tmp_path / f"c{index}", documents) for index, documents in enumerate(texts)]
    opened = [Corpus.open(prefix, make_tokenizer(), 63) for prefix in prefixes]
    packed = tuple(PackedCorpus(corpus, 16, (5, index)) for index, corpus in enumerate(opened))
    return texts, Blend(packed, (1.0, 3.0))


def test_every_sequence_comes_once_in_an_epoch_in_another_order_each(two):
    texts, blend = two
    packed, n_sequences = blend.corpora[0], len(blend.corpora[0].packing)
    epochs = []
    for epoch in (0, 1):
        rows = [packed.documents(place) for place in range(epoch * n_sequences, (epoch + 1) * n_sequences)]
        epochs.append([tuple(token for piece in row for token in piece.tolist()) for row in rows])
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    learnt = Counter(token for row in epochs[0] for token in row)
    lone = [document[-1] for document in texts[0] if len(document) % 16 == 1]
    assert learnt == Counter(token for document in texts[0] for token in document) - Counter(lone)


def test_sequences_are_a_function_of_their_place(two):
    _, blend = two
    whole = blend.sequences(range(100))
    again = Blend(blend.corpora, blend.weights).sequences(range(40, 60))
    halves = [blend.sequences(range(100)[rank::2]) for rank in (0, 1)]
    for mine, expected in [(again, whole[40:60]), (halves[0], whole[::2]), (halves[1], whole[1::2])]:
        assert len(mine) == len(expected)
        for row, other in zip(mine, expected, strict=True):
            assert [piece.tolist() for piece in row] == [piece.tolist() for piece in other]


def test_the_summary_tells_shares_and_epochs(two):
    _, blend = two
    first, second = blend.describe(400)
    n_first, n_second = (len(packed.packing) for packed in blend.corpora)
    assert f"40 documents, {blend.corpora[0].packing.n_tokens} tokens in {n_first} sequences" in first
    assert f"25.0% of the sequences, {100 / n_first:.3g} epochs" in first
    assert f"75.0% of the sequences, {300 / n_second:.3g} epochs" in second


def test_another_seed_gives_another_order(two):
    _, blend = two
    corpus = blend.corpora[0].corpus
    orders = [PackedCorpus(corpus, 16, (seed, 0))._draw_order(0) for seed in (5, 6)]
    assert not np.array_equal(*orders)
