import numpy as np
import pytest

from padd_ds.data.packing import Packing, pack_counts


def best_fit_rooms(lengths: list[int], capacity: int) -> list[int]:
    """What is left in each bin after best-fit decreasing, one piece at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=capacity)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_packed_as_best_fit_decreasing_packs_single_pieces(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(4, 40))
    lengths = rng.integers(1, capacity, rng.integers(1, 80))
    groups = pack_counts(np.bincount(lengths, minlength=capacity), capacity)
    used = [(group.n_sequences, sum(part.length * part.copies for part in group.parts)) for group in groups]
    rooms = sorted(capacity - tokens for count, tokens in used for _ in range(count))
    assert rooms == best_fit_rooms(lengths.tolist(), capacity)


@pytest.mark.parametrize("seed", range(30))
def test_every_token_is_in_one_sequence_and_short_documents_stay_whole(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(4, 40))
    lengths_N = rng.integers(0, 3 * length, rng.integers(1, 80)).astype(np.int32)
    packing = Packing(lengths_N, length)
    sequences = [packing.pieces(index) for index in range(len(packing))]
    assert all(2 <= sum(piece.length for piece in sequence) <= length for sequence in sequences)
    found = [(p.document, token) for s in sequences for p in s for token in range(p.start, p.start + p.length)]
    lone_last = {(n, tokens - 1) for n, tokens in enumerate(lengths_N) if tokens % length == 1}
    assert len(found) == len(set(found)) == packing.n_tokens
    assert set(found) == {(n, token) for n, tokens in enumerate(lengths_N) for token in range(tokens)} - lone_last
    cuts = [p.document for s in sequences for p in s if p.length < lengths_N[p.document] <= length]
    assert all(lengths_N[document] % length == 1 for document in cuts)


def test_a_packing_by_hand():
    packing = Packing(np.array([3, 12, 0, 5, 1, 5]), 5)
    # Document 1 fills two sequences, documents 3 and 5 one each; its tail of 2 goes with document 0.
    assert [packing.pieces(index) for index in range(len(packing))] == [
        [(1, 0, 5)],
        [(1, 5, 5)],
        [(3, 0, 5)],
        [(5, 0, 5)],
        [(0, 0, 3), (1, 10, 2)],
    ]
    assert packing.n_tokens == 25


def test_nothing_to_learn_from_gives_no_sequence():
    assert len(Packing(np.array([0, 1, 1]), 8)) == 0


def test_many_documents_fill_their_sequences():
    lengths_N = np.exp(np.random.default_rng(0).normal(5, 1, 20000)).astype(np.int32)
    packing = Packing(lengths_N, 512)
    assert packing.n_tokens / (len(packing) * 512) > 0.999
