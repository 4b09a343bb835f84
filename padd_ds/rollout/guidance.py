"""A teacher's right responses to questions that the student fails, put into its groups.

Legend: B responses of this rank, R response tokens.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from padd_ds.data.split import normalise_question
from padd_ds.errors import UserError
from padd_ds.offline.cache import REMEDY, read_responses
from padd_ds.rollout.generation import Responses, widened


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """The teacher's right responses by question."""

    texts: Mapping[str, Sequence[str]]
    """By normalised question."""

    @classmethod
    def open(cls, folder: Path) -> "Guidance":
        """What padd-cache recorded with --responses; UserError unless it is whole and has some."""
        texts = defaultdict[str, list[str]](list)
        for problem in read_responses(folder):
            if problem.solution:
                texts[normalise_question(problem.question)].append(problem.solution)
        if not texts:
            raise UserError(f"{folder}: holds no responses of the teacher; {REMEDY} --responses N")
        return cls(texts=dict(texts))

    def response(self, question: str, draw: int) -> str | None:
        """One of the question's responses, chosen by the number `draw`; None where there is none."""
        texts = self.texts.get(normalise_question(question), ())
        return texts[draw % len(texts)] if texts else None


def with_responses(responses: Responses, rows: Mapping[int, Sequence[int]], pad_token_id: int) -> Responses:
    """`responses` with those token ids, the end token included, in place of what stands in `rows`.

    No engine has computed their routes (-1) or log-probabilities (not a number).
    """
    if not rows:
        return responses
    width = max(responses.ids_BR.shape[1], *map(len, rows.values()))
    grown = widened(responses, width, pad_token_id)
    ids_BR, mask_BR, ended_B = (tensor.clone() for tensor in (grown.ids_BR, grown.mask_BR, grown.ended_B))
    routes_BLNK = None if grown.routes_BLNK is None else grown.routes_BLNK.clone()
    logprobs_BR = None if grown.logprobs_BR is None else grown.logprobs_BR.clone()
    for row, ids in rows.items():
        ids_BR[row] = pad_token_id
        ids_BR[row, : len(ids)] = torch.tensor(list(ids), device=ids_BR.device)
        mask_BR[row] = torch.arange(mask_BR.shape[1], device=mask_BR.device) < len(ids)
        ended_B[row] = True
        if routes_BLNK is not None:
            routes_BLNK[row] = -1
        if logprobs_BR is not None:
            logprobs_BR[row] = float("nan")
    return Responses(ids_BR=ids_BR, mask_BR=mask_BR, ended_B=ended_B, logprobs_BR=logprobs_BR, routes_BLNK=routes_BLNK)
