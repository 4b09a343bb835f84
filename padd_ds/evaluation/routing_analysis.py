"""The whole analysis of a model's routing as plain values, ready for JSON.

Shapes: L layers, E experts, C subjects.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from padd_ds.errors import UserError
from padd_ds.evaluation.clusters import TeacherClusters
from padd_ds.evaluation.routers import find_routers, output_similarity
from padd_ds.evaluation.routing import RoutingCounts, Text, count_routing, headline
from padd_ds.evaluation.specialisation import RESAMPLES, SHUFFLES, specialisation
from padd_ds.hf import load_skeleton
from padd_ds.moe.load import dead_experts, load_share

Values = dict[str, Any]
_DIGITS = 5


@torch.inference_mode()
def analyse_routing(
    model: Any,
    tokenizer: Any,
    text: Text,
    other: Any = None,
    clusters: TeacherClusters | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Values:
    """All there is to say of the routing of `text`; parts that were not asked for are None. UserError as
    `count_routing`."""
    counts = count_routing(model, tokenizer, text, other, clusters, batch_size)
    labelled = len(text.names) > 1
    routers = find_routers(model)
    inputs = [torch.cat(parts) for parts in counts.inputs_LND]
    similarity = [output_similarity(*layer) for layer in zip(routers, inputs, strict=True)]
    return {
        "headline": asdict(headline(counts, text, other is not None)),
        "rows": len(text.prompts),
        "tokens": counts.tokens,
        "layers": [router.layer for router in routers],
        "experts": routers[0].n_experts,
        "experts_per_token": int(counts.counts_LE[0].sum()) // counts.tokens,
        "score_function": counts.score,
        "subjects": dict(Counter(subject or "" for subject in text.subjects)) if labelled else {},
        "specialisation": _specialisation(counts, text, seed) if labelled else None,
        "load": _load(counts),
        "sampled_tokens": len(inputs[0]),
        "output_similarity": _rounded(torch.stack(similarity)),
        "coactivation": _rounded(coactivation(counts.pairs_LEE)),
        "shift": None if other is None else _shift(counts),
        "clusters": None if clusters is None else _clusters(counts),
    }


def check_alike(source: str, others: Sequence[str]) -> None:
    """UserError where a checkpoint (folder or hub id) has no routers, or another one not the same layers and experts.

    Reads configurations alone, so that it can come before any work.
    """

    def shape(one: str) -> list[tuple[int, int]]:
        return [(router.layer, router.n_experts) for router in find_routers(load_skeleton(one, torch.bfloat16))]

    expected = shape(source)
    for other in others:
        if shape(other) != expected:
            raise UserError(f"{other} differs from {source} in layers or experts, so their routing cannot be compared")


@torch.inference_mode()
def changes_since(model: Any, tokenizer: Any, text: Text, other: Any, batch_size: int = 64) -> Values:
    """How the routing of `text` differs from that of the checkpoint `other`. UserError as `count_routing`.

    `consistency`: share of the chosen experts that `other` chooses too; beside a final model, the router saturation of
    Muennighoff et al. 2024 (arXiv 2409.02060), section 5.
    """
    counts = count_routing(model, tokenizer, text, other, batch_size=batch_size)
    told, by_layer = headline(counts, text, compared=True), _shift(counts)
    return {
        "consistency": 1 - (told.flips or 0.0),
        "consistency_by_layer": [1 - flips for flips in by_layer["flips_by_layer"]],
        "shift": told.shift,
        "shift_by_layer": by_layer["shift_by_layer"],
        "shift_edges": told.shift_edges,
        "shift_counts": told.shift_counts,
    }


def coactivation(pairs_LEE: Tensor) -> Tensor:
    """P(column's expert is chosen | row's is), [L, E, E], diagonal 1; 0 in the rows of dead experts.

    `pairs_LEE`: tokens that went to both. Source: Muennighoff et al. 2024 (arXiv 2409.02060), section 5.
    """
    own_LE1 = pairs_LEE.diagonal(dim1=1, dim2=2)[..., None]
    return pairs_LEE.double() / own_LE1.clamp(min=1)


def _specialisation(counts: RoutingCounts, text: Text, seed: int) -> Values:
    found = specialisation(counts.chosen_NLE, text.labels_N, seed)
    share_LCE = load_share(counts.counts_LCE(text.labels_N, len(text.names)))
    return {
        **{name: asdict(one) for name, one in found.items()},
        "resamples": RESAMPLES,
        "shuffles": SHUFFLES,
        "seed": seed,
        "share_by_subject": {
            name: _rounded(share_LE) for name, share_LE in zip(text.names, share_LCE.transpose(0, 1), strict=True)
        },
    }


def _load(counts: RoutingCounts) -> Values:
    counts_LE = counts.counts_LE
    share_LE = load_share(counts_LE).double()
    entropy_L = -torch.xlogy(share_LE, share_LE).sum(-1)
    return {
        "dead_experts_by_layer": dead_experts(counts_LE).tolist(),
        "load_entropy_nats_by_layer": entropy_L.tolist(),
        "router_entropy_nats_by_layer": None if counts.score is None else (counts.entropy_L / counts.tokens).tolist(),
    }


def _shift(counts: RoutingCounts) -> Values:
    slots_L = counts.counts_LE.sum(-1)
    return {
        "shift_by_layer": None if counts.score is None else (counts.shift_L / counts.tokens).tolist(),
        "flips_by_layer": (counts.flips_L / slots_L).tolist(),
    }


def _clusters(counts: RoutingCounts) -> Values:
    """Agreement with the teacher; by chance: if choice and activity had nothing to do with each other."""
    slots_L = counts.counts_LE.sum(-1)
    agreement_L = (counts.agreed_L / slots_L).double()
    chance_L = (load_share(counts.counts_LE).double() * counts.teachers_LE / counts.tokens).sum(-1)
    return {
        "agreement": float(agreement_L.mean()),
        "chance": float(chance_L.mean()),
        "agreement_by_layer": agreement_L.tolist(),
        "chance_by_layer": chance_L.tolist(),
        "teacher_share_by_layer": _rounded(load_share(counts.teachers_LE)),
    }


def _rounded(values: Tensor) -> Any:
    return values.double().round(decimals=_DIGITS).tolist()
