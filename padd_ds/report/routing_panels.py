"""The maps that are drawn of a run's routing, by layer and expert or by layer and step.

Legend: L layers, E experts, R records over time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from padd_ds.report.html import NO_DATA, figure, legend, scale
from padd_ds.report.numbers import TIMES, readable
from padd_ds.report.panels import EXCESS
from padd_ds.report.plots import distribution, expert_map, layers_over_steps
from padd_ds.report.source import RunData

MAX_COLUMNS = 300


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One value per layer over all records; left out of a run in which it is never above 0."""

    name: str
    title: str
    unit: str
    caption: str


LAYER_MAPS = (
    LayerMap(
        name="max_violation",
        title="Load violation per layer",
        unit=EXCESS,
        caption="Good: fades to the right; a layer that stays strong is not being balanced.",
    ),
    LayerMap(
        name="router_shift",
        title="Router shift per layer",
        unit="Γ, mean over response tokens",
        caption="Good: no layer stands out; the policy loss sees the mean over layers alone.",
    ),
    LayerMap(
        name="router_flips",
        title="Flips per layer",
        unit="share of routed slots, since the old policy",
        caption="Good: faint; with many, lower balance.load_rate or optimizer.learning_rate, or set routing.replay.",
    ),
    LayerMap(
        name="router_flips_rollout",
        title="Flips against the rollout per layer",
        unit="share of routed slots",
        caption="Good: faint; the two passes have the same weights.",
    ),
)


def routing_panels(run: RunData, key: str) -> str:
    """Maps of the last record by layer and expert, and of all records by layer and step."""
    if not run.routing:
        return NO_DATA
    last = run.routing[-1]
    parts = [_load_map(last, key), _bias_map(last, key, "selection_bias", "Selection bias")]
    if np.any(last.get("logit_bias", 0)):
        parts.append(_bias_map(last, key, "logit_bias", "Logit bias"))
    parts += [_advantage_map(last, key), _reward_map(last, key)]
    parts += [_layer_map(run, key, panel) for panel in LAYER_MAPS]
    if any("router_shift_counts" in record for record in run.routing):
        parts.append(_shift_distribution(run, key))
    return "\n".join(part for part in parts if part)


def _load_map(record: Mapping, key: str) -> str:
    share_LE = np.array(record["load_share"], dtype=float)
    n_experts = share_LE.shape[1]
    svg = expert_map("Load", f"{key}/load", share_LE * n_experts - 1, 1.0)
    dead = int((share_LE == 0).sum())
    caption = (
        f"{_at(record)} Good: faint everywhere, an even load; "
        f"{dead} of {share_LE.size} experts had no token (full blue)."
    )
    return figure("Load", f"share {TIMES} E", scale("0", "1", "≥ 2"), svg, caption)


def _bias_map(record: Mapping, key: str, name: str, title: str) -> str:
    if name not in record:
        return figure(title, "in router scores", "", NO_DATA, "")
    bias_LE = np.array(record[name], dtype=float)
    limit = float(np.abs(bias_LE).max())
    if limit == 0:
        return figure(title, "in router scores", "", '<p class="no-data">0 for every expert</p>', _at(record))
    svg = expert_map(title, f"{key}/{name}", bias_LE, limit)
    caption = (
        f"{_at(record)} Good: orange where the load was too low and blue where it was too high, "
        f"{_in_spreads(record, bias_LE)}."
    )
    return figure(title, "in router scores", scale(readable(-limit), "0", readable(limit)), svg, caption)


def _in_spreads(record: Mapping, bias_LE: np.ndarray) -> str:
    """The largest bias in units of its layer's spread of scores, in which the clamp is given."""
    spread_L = np.array(record.get("score_spread", []), dtype=float)
    if len(spread_L) != len(bias_LE) or not (spread_L > 0).all():
        return "and within its clamp"
    largest = (np.abs(bias_LE).max(axis=1) / spread_L).max()
    return f"and within its clamp; the largest is {readable(largest)} spreads of its layer's scores"


def _advantage_map(record: Mapping, key: str) -> str:
    """Empty where no expert has an averaged advantage, as in a run whose biases stay."""
    ema_LE = np.array(record.get("advantage_ema", 0.0), dtype=float)
    limit = float(np.abs(ema_LE).max())
    if limit == 0:
        return ""
    title = "Averaged advantage"
    svg = expert_map(title, f"{key}/advantage", ema_LE, limit)
    caption = (
        f"{_at(record)} Moving average over updates of the mean advantage of an expert's response tokens, from a start "
        "at 0. Orange: its tokens stand in responses above their groups' mean. The reward term of the bias follows it."
    )
    return figure(title, "per expert", scale(readable(-limit), "0", readable(limit)), svg, caption)


def _reward_map(record: Mapping, key: str) -> str:
    """Empty where no token, or every one, is in a response above its group's mean."""
    above_LE = np.array(record.get("load_share_rewarded", 0.0), dtype=float)
    below_LE = np.array(record.get("load_share_unrewarded", 0.0), dtype=float)
    if not (above_LE.any() and below_LE.any()):
        return ""
    difference_LE = (above_LE - below_LE) * above_LE.shape[1]
    limit = max(float(np.abs(difference_LE).max()), 1e-12)
    title = "Experts of rewarded tokens"
    svg = expert_map(title, f"{key}/reward", difference_LE, limit)
    distance = 0.5 * np.abs(above_LE - below_LE).sum(axis=1).mean()
    caption = (
        f"{_at(record)} Orange: a larger share of the tokens in responses above their group's mean reward than of "
        f"those below it; blue: a smaller one. The distance between the two loads is {readable(distance)} of 1, mean "
        "over layers."
    )
    unit = f"difference of shares {TIMES} E"
    return figure(title, unit, scale(readable(-limit), "0", readable(limit)), svg, caption)


def _layer_map(run: RunData, key: str, panel: LayerMap) -> str:
    having = [record for record in run.routing if panel.name in record]
    rows = np.unique(np.linspace(0, len(having) - 1, min(len(having), MAX_COLUMNS)).round().astype(int))
    records = [having[row] for row in rows]
    values_RL = np.array([record[panel.name] for record in records], dtype=float)
    if not (values_RL > 0).any():
        return ""
    limit = float(np.nanmax(values_RL))
    svg = layers_over_steps(panel.title, f"{key}/{panel.name}", [r["step"] for r in records], values_RL, limit)
    return figure(panel.title, panel.unit, scale("0", "", readable(limit)), svg, panel.caption)


def _shift_distribution(run: RunData, key: str) -> str:
    records = [record for record in run.routing if "router_shift_counts" in record]
    chosen = records if len(records) == 1 else [records[0], records[-1]]
    names = legend([(f"step {record['step']}", "") for record in chosen])
    counts = [np.sum(record["router_shift_counts"], axis=0).tolist() for record in chosen]
    title = "Distribution of the router shift"
    svg = distribution(title, f"{key}/shift", chosen[0]["router_shift_edges"], counts, "Γ")
    caption = (
        "Share of response tokens and layers whose shift is below Γ. Good: the right end does not move to the right."
    )
    return figure(title, "share of tokens, all layers", names, svg, caption)


def _at(record: Mapping) -> str:
    return f"At step {record['step']}."
