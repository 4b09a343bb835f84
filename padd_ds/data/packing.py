"""Documents of a corpus packed into sequences of one length, best fit first.

A document fills as many whole sequences as it can; its tail goes where it leaves the least room. Tails of equal length
are alike, so the packing is found on the counts of lengths, which takes time by the sequence length and not by the
number of documents. What is kept is one number per document.

Legend: N documents, L tokens of a sequence.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHORTEST = 2
"""Tokens of the shortest piece: one alone has nothing to predict."""


class Piece(NamedTuple):
    """Tokens of one document."""

    document: int
    start: int
    length: int


class Part(NamedTuple):
    """What tails of one length contribute to each sequence of a group."""

    length: int
    copies: int
    """Tails per sequence."""
    first: int
    """Rank, among all tails of that length, of the first one in the group's first sequence."""


@dataclass(frozen=True)
class Group:
    """Sequences that are filled alike, each with the next tails of the same lengths."""

    n_sequences: int
    parts: tuple[Part, ...] = ()

    def split(self, count: int) -> tuple["Group", "Group"]:
        """The first `count` sequences, and the others."""
        moved = tuple(part._replace(first=part.first + count * part.copies) for part in self.parts)
        return Group(count, self.parts), Group(self.n_sequences - count, moved)


class Packing:
    """The sequences of a corpus, a function of the documents' lengths and of L alone.

    First stand the sequences that one document fills, then those of several tails. Every token is in one sequence, but
    for tails shorter than `SHORTEST`.
    """

    def __init__(self, lengths_N: np.ndarray, length: int) -> None:
        self.length = length
        self._lengths_N = lengths_N
        self._long = np.flatnonzero(lengths_N >= length)
        self._whole_ends = np.cumsum(lengths_N[self._long] // length)
        tails_N = (lengths_N % length).astype(np.uint16 if length <= 1 << 16 else np.uint32)
        counts = np.bincount(tails_N, minlength=length)
        # Stable, so that the order is the same on every machine, and a radix sort for 16 bits.
        by_length_N = np.argsort(tails_N, kind="stable")
        self._by_length_N = by_length_N.astype(np.uint32 if len(tails_N) < 1 << 32 else np.int64)
        self._tail_starts = np.cumsum(counts) - counts
        counts[:SHORTEST] = 0
        self._groups = pack_counts(counts, length)
        self._group_ends = self.n_whole + np.cumsum([group.n_sequences for group in self._groups], dtype=np.int64)
        self.n_tokens = int(self.n_whole * length + counts @ np.arange(length))
        """In all sequences."""

    @property
    def n_whole(self) -> int:
        """Sequences that one document fills."""
        return int(self._whole_ends[-1]) if len(self._whole_ends) else 0

    def __len__(self) -> int:
        return int(self._group_ends[-1]) if self._groups else self.n_whole

    def pieces(self, sequence: int) -> list[Piece]:
        """What stands in a sequence, in order."""
        if sequence < self.n_whole:
            return [self._whole(sequence)]
        index = int(np.searchsorted(self._group_ends, sequence, side="right"))
        group = self._groups[index]
        place = sequence - int(self._group_ends[index]) + group.n_sequences
        return [
            self._tail(part.length, part.first + place * part.copies + copy)
            for part in group.parts
            for copy in range(part.copies)
        ]

    def _whole(self, sequence: int) -> Piece:
        index = int(np.searchsorted(self._whole_ends, sequence, side="right"))
        before = int(self._whole_ends[index - 1]) if index else 0
        return Piece(int(self._long[index]), (sequence - before) * self.length, self.length)

    def _tail(self, length: int, rank: int) -> Piece:
        document = int(self._by_length_N[int(self._tail_starts[length]) + rank])
        return Piece(document, int(self._lengths_N[document]) - length, length)


def pack_counts(counts: np.ndarray, capacity: int) -> list[Group]:
    """Pack counts[n] pieces of each length n < `capacity` by best fit, the longest first.

    That is best-fit decreasing over single pieces, done for all pieces of a length at once.
    """
    open_groups: dict[int, list[Group]] = {}
    """By the room that is left."""
    rooms: list[int] = []

    def put(group: Group, room: int) -> None:
        if room not in open_groups:
            insort(rooms, room)
        open_groups.setdefault(room, []).append(group)

    def take(length: int) -> tuple[Group, int] | None:
        index = bisect_left(rooms, length)
        if index == len(rooms):
            return None
        room = rooms[index]
        group = open_groups[room].pop()
        if not open_groups[room]:
            del open_groups[room], rooms[index]
        return group, room

    for length in np.flatnonzero(counts)[::-1].tolist():
        left, first = int(counts[length]), 0
        while left:
            found = take(length)
            copies = min((found[1] if found else capacity) // length, left)
            group, room = found or (Group(left // copies), capacity)
            n_filled = min(group.n_sequences, left // copies)
            filled, rest = group.split(n_filled)
            if rest.n_sequences:
                put(rest, room)
            put(Group(n_filled, (*filled.parts, Part(length, copies, first))), room - copies * length)
            left, first = left - n_filled * copies, first + n_filled * copies
    return [group for room in rooms for group in open_groups[room]]
