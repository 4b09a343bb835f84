"""The maps that are drawn of a run's routing, by layer and expert or by layer and step.

Legend: L layers, E experts, R records over time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from padd_ds.report.html import Panel
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


def routing_panels(run: RunData) -> list[Panel]:
    """Maps of the last record by layer and expert, and of all records by layer and step."""
    if not run.routing:
        return []
    last = run.routing[-1]
    parts: list[Panel | None] = [_load_map(last), _bias_map(last, "selection_bias", "Selection bias")]
    if np.any(last.get("logit_bias", 0)):
        parts.append(_bias_map(last, "logit_bias", "Logit bias"))
    parts += [_advantage_map(last), _reward_map(last)]
    parts += [_layer_map(run, panel) for panel in LAYER_MAPS]
    parts.append(_shift_distribution(run))
    return [part for part in parts if part is not None]


def _load_map(record: Mapping) -> Panel:
    share_LE = np.array(record["load_share"], dtype=float)
    plot = expert_map(share_LE * share_LE.shape[1] - 1, 1.0)
    dead = int((share_LE == 0).sum())
    caption = (
        f"{_at(record)} Good: faint everywhere, an even load; "
        f"{dead} of {share_LE.size} experts had no token (full blue)."
    )
    return Panel(title="Load", unit=f"share {TIMES} E", plot=plot, caption=caption, limits=("0", "1", "≥ 2"))


def _bias_map(record: Mapping, name: str, title: str) -> Panel:
    unit = "in router scores"
    if name not in record:
        return Panel(title=title, unit=unit, plot=None)
    bias_LE = np.array(record[name], dtype=float)
    limit = float(np.abs(bias_LE).max())
    if limit == 0:
        zero = '<p class="no-data">0 for every expert</p>'
        return Panel(title=title, unit=unit, plot=None, caption=_at(record), nothing=zero)
    caption = (
        f"{_at(record)} Good: orange where the load was too low and blue where it was too high, "
        f"{_in_spreads(record, bias_LE)}."
    )
    return Panel(title=title, unit=unit, plot=expert_map(bias_LE, limit), caption=caption, limits=around_zero(limit))


def _in_spreads(record: Mapping, bias_LE: np.ndarray) -> str:
    """The largest bias in units of its layer's spread of scores, in which the clamp is given."""
    spread_L = np.array(record.get("score_spread", []), dtype=float)
    if len(spread_L) != len(bias_LE) or not (spread_L > 0).all():
        return "and within its clamp"
    largest = (np.abs(bias_LE).max(axis=1) / spread_L).max()
    return f"and within its clamp; the largest is {readable(largest)} spreads of its layer's scores"


def _advantage_map(record: Mapping) -> Panel | None:
    """None where no expert has an averaged advantage, as in a run whose biases stay."""
    ema_LE = np.array(record.get("advantage_ema", 0.0), dtype=float)
    limit = float(np.abs(ema_LE).max())
    if limit == 0:
        return None
    title, plot = "Averaged advantage", expert_map(ema_LE, limit)
    caption = (
        f"{_at(record)} Moving average over updates of the mean advantage of an expert's response tokens, from a start "
        "at 0. Orange: its tokens stand in responses above their groups' mean. The reward term of the bias follows it."
    )
    return Panel(title=title, unit="per expert", plot=plot, caption=caption, limits=around_zero(limit))


def _reward_map(record: Mapping) -> Panel | None:
    """None where no token, or every one, is in a response above its group's mean."""
    above_LE = np.array(record.get("load_share_rewarded", 0.0), dtype=float)
    below_LE = np.array(record.get("load_share_unrewarded", 0.0), dtype=float)
    if not (above_LE.any() and below_LE.any()):
        return None
    difference_LE = (above_LE - below_LE) * above_LE.shape[1]
    limit = max(float(np.abs(difference_LE).max()), 1e-12)
    distance = 0.5 * np.abs(above_LE - below_LE).sum(axis=1).mean()
    caption = (
        f"{_at(record)} Orange: a larger share of the tokens in responses above their group's mean reward than of "
        f"those below it; blue: a smaller one. The distance between the two loads is {readable(distance)} of 1, mean "
        "over layers."
    )
    return Panel(
        title="Experts of rewarded tokens",
        unit=f"difference of shares {TIMES} E",
        plot=expert_map(difference_LE, limit),
        caption=caption,
        limits=around_zero(limit),
    )


def _layer_map(run: RunData, told: LayerMap) -> Panel | None:
    having = [record for record in run.routing if told.name in record]
    rows = np.unique(np.linspace(0, len(having) - 1, min(len(having), MAX_COLUMNS)).round().astype(int))
    records = [having[row] for row in rows]
    values_RL = np.array([record[told.name] for record in records], dtype=float)
    if not (values_RL > 0).any():
        return None
    limit = float(np.nanmax(values_RL))
    plot = layers_over_steps([record["step"] for record in records], values_RL, limit)
    limits = ("0", "", readable(limit))
    return Panel(title=told.title, unit=told.unit, plot=plot, caption=told.caption, limits=limits)


def _shift_distribution(run: RunData) -> Panel | None:
    records = [record for record in run.routing if "router_shift_counts" in record]
    if not records:
        return None
    chosen = records if len(records) == 1 else [records[0], records[-1]]
    counts = {f"step {one['step']}": np.sum(one["router_shift_counts"], axis=0).tolist() for one in chosen}
    caption = (
        "Share of response tokens and layers whose shift is below Γ. Good: the right end does not move to the right."
    )
    return Panel(
        title="Distribution of the router shift",
        unit="share of tokens, all layers",
        plot=distribution(chosen[0]["router_shift_edges"], counts, "Γ"),
        caption=caption,
        entries=[(name, "") for name in counts],
    )


def around_zero(limit: float) -> tuple[str, str, str]:
    """What the colours of a map from -limit to limit mean."""
    return readable(-limit), "0", readable(limit)


def _at(record: Mapping) -> str:
    return f"At step {record['step']}."
