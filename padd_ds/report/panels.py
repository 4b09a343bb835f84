"""What is drawn of a run, with a caption that says what good looks like.

Legend: L layers, E experts, R records over time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from padd_ds.report.html import figure, legend, scale
from padd_ds.report.numbers import MINUS, NO_BREAK_SPACE, TIMES, readable
from padd_ds.report.plots import curves, distribution, expert_map, layers_over_steps, stacked_bars
from padd_ds.report.source import RunData, Series

RATIO = f"|ratio{NO_BREAK_SPACE}{MINUS}{NO_BREAK_SPACE}1|"
EXCESS = f"max share {TIMES} E {MINUS} 1"
NO_DATA = '<p class="no-data">no data</p>'
PHASES = {"seconds_rollout": "rollout", "seconds_scoring": "scoring", "seconds_update": "update"}
MAX_COLUMNS = 300


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """One plot of metrics over steps; it is left out of a run that has none of them."""

    title: str
    unit: str
    metrics: Mapping[str, str]
    """Metric to the name that it is shown under."""
    caption: str
    log: bool = False
    from_zero: bool = False
    reference: Callable[[RunData], float | None] = lambda run: None
    """A level to compare with."""
    remark: Callable[[RunData], str] = lambda run: ""
    """A sentence that follows the caption."""


def uniform_entropy(run: RunData) -> float | None:
    """ln E, the largest entropy that a router over E experts can have."""
    return math.log(len(run.routing[-1]["load_share"][0])) if run.routing else None


def penalty_share(run: RunData) -> str:
    """How large lambda * Gamma was beside |ratio - 1|, as a sentence."""
    penalty, deviation = run.series("shift_penalty"), run.series("ratio_deviation")
    if penalty is None or deviation is None or deviation.values.sum() <= 0:
        return ""
    share = 100 * penalty.values.mean() / deviation.values.mean()
    return f"On average λΓ was {readable(share)} % of {RATIO}."


CURVES = (
    CurvePanel(
        title="Language-model loss",
        unit="nats per token",
        metrics={"loss_lm": "loss_lm"},
        caption="Good: falls, then levels off.",
    ),
    CurvePanel(
        title="Distillation loss",
        unit="nats per token",
        metrics={"loss_kd": "loss_kd"},
        caption="Divergence of the student from its teacher. Good: falls towards 0; "
        "with temperatures other than 1 it need not reach it.",
        from_zero=True,
    ),
    CurvePanel(
        title="Initialisation loss",
        unit="nats",
        metrics={"loss_init": "loss_init"},
        caption="Divergence of the experts' activity from that of the clusters they came from. "
        "Good: small beside the other losses, and not rising.",
        from_zero=True,
    ),
    CurvePanel(
        title="Policy loss",
        unit="per token",
        metrics={"loss_policy": "loss_policy"},
        caption="Good: hovers near 0 without spikes; its level says nothing about the reward.",
    ),
    CurvePanel(
        title="Reward",
        unit="mean per response",
        metrics={"reward": "reward", "reward_correct": "correct"},
        caption="Good: both rise; reward without more correct answers means that only the form improves.",
        from_zero=True,
    ),
    CurvePanel(
        title="Response length",
        unit="tokens",
        metrics={"response_tokens": "mean length"},
        caption="Good: steady, or rising together with the reward.",
        from_zero=True,
    ),
    CurvePanel(
        title="Failed responses",
        unit="share of all",
        metrics={"response_truncated": "cut off", "answer_missing": "no answer"},
        caption="Good: both fall towards 0.",
        from_zero=True,
    ),
    CurvePanel(
        title="Router shift and policy ratio",
        unit="mean per token",
        metrics={
            "router_shift": "shift Γ",
            "shift_penalty": "λΓ",
            "ratio_deviation": RATIO,
            "kl_old_nats": "KL(old)",
        },
        caption=f"Good: λΓ within about a factor of ten of {RATIO}; far below it the penalty does nothing.",
        log=True,
        remark=penalty_share,
    ),
    CurvePanel(
        title="Flips of expert choice",
        unit="share of routed slots",
        metrics={
            "router_flips": "since the old policy",
            "router_flips_rollout": "scoring against rollout",
            "load_reward_distance": "rewarded against unrewarded",
        },
        caption="Slots whose expert the policy before these updates had not chosen, or where the same weights chose "
        "otherwise in the rollout (arithmetic of the two passes differs); and how far apart the experts of "
        "rewarded and unrewarded tokens are. Good: few flips; with many, replay the routing (routing.replay).",
        from_zero=True,
    ),
    CurvePanel(
        title="Gradient of each term",
        unit="norm, weights included",
        metrics={
            "grad_norm_policy": "policy",
            "grad_norm_kd": "distillation",
            "grad_norm_lm": "language model",
            "grad_norm_init": "initialisation",
        },
        caption="Which term drives. Good: none is forgotten; change its weight if it is.",
        log=True,
    ),
    CurvePanel(
        title="Load violation",
        unit=EXCESS,
        metrics={"load_max_violation": "mean over layers"},
        caption="How far the busiest expert is above an even load. Good: falls towards 0, or stays low.",
        from_zero=True,
    ),
    CurvePanel(
        title="Router entropy",
        unit="nats",
        metrics={"router_entropy_nats": "mean over layers"},
        caption="Good: below the dashed line (uniform, ln E) and steady; a fall to 0 is a collapse.",
        reference=uniform_entropy,
    ),
)


def training_panels(run: RunData, key: str) -> str:
    """Every curve that the run has, and its time per phase."""
    panels = [_curve_figure(run, panel, key) for panel in CURVES]
    return "\n".join([panel for panel in panels if panel] + _phase_figure(run, key)) or NO_DATA


def routing_panels(run: RunData, key: str) -> str:
    """Heat maps of the last record, and the load violation of each layer over all records."""
    if not run.routing:
        return NO_DATA
    last = run.routing[-1]
    parts = [_load_map(last, key), _bias_map(last, key, "selection_bias", "Selection bias")]
    if np.any(last.get("logit_bias", 0)):
        parts.append(_bias_map(last, key, "logit_bias", "Logit bias"))
    parts.append(_violation_map(run, key))
    if any("router_shift_counts" in record for record in run.routing):
        parts.append(_shift_distribution(run, key))
    return "\n".join(parts)


def _curve_figure(run: RunData, panel: CurvePanel, key: str) -> str:
    found = {name: run.series(metric) for metric, name in panel.metrics.items()}
    series = {name: one for name, one in found.items() if one is not None}
    if not series:
        return ""
    names = legend([(name, _from_to(one, 2 if panel.log else 3)) for name, one in series.items()])
    caption = f"{panel.caption} {panel.remark(run)}"
    if not any((one.values > 0).any() if panel.log else len(one.values) for one in series.values()):
        return figure(panel.title, panel.unit, names, NO_DATA, caption)
    svg = curves(
        panel.title,
        f"{key}/{panel.title}",
        list(series.values()),
        log=panel.log,
        from_zero=panel.from_zero,
        reference=panel.reference(run),
    )
    return figure(panel.title, panel.unit, names, svg, caption)


def _phase_figure(run: RunData, key: str) -> list[str]:
    found = {name: run.series(metric) for metric, name in PHASES.items()}
    series = {name: one for name, one in found.items() if one is not None}
    total_s = sum(one.values.sum() for one in series.values())
    if total_s <= 0 or len({len(one.values) for one in series.values()}) > 1:
        return []
    names = legend([(name, f"{100 * one.values.sum() / total_s:.0f} %") for name, one in series.items()])
    title = "Time per phase"
    svg = stacked_bars(title, f"{key}/{title}", list(series.values()))
    caption = f"{readable(total_s)} s in the logged steps. Good: even bars, most of each spent on rollout and update."
    return [figure(title, "seconds per step", names, svg, caption)]


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


def _violation_map(run: RunData, key: str) -> str:
    rows = np.unique(np.linspace(0, len(run.routing) - 1, min(len(run.routing), MAX_COLUMNS)).round().astype(int))
    records = [run.routing[row] for row in rows]
    values_RL = np.array([record["max_violation"] for record in records], dtype=float)
    limit = max(float(np.nanmax(values_RL)), 1e-12)
    svg = layers_over_steps(
        "Load violation per layer", f"{key}/violation", [r["step"] for r in records], values_RL, limit
    )
    caption = "Good: fades to the right; a layer that stays strong is not being balanced."
    return figure("Load violation per layer", EXCESS, scale("0", "", readable(limit)), svg, caption)


def _shift_distribution(run: RunData, key: str) -> str:
    records = [record for record in run.routing if "router_shift_counts" in record]
    chosen = records if len(records) == 1 else [records[0], records[-1]]
    names = legend([(f"step {record['step']}", "") for record in chosen])
    counts = [record["router_shift_counts"] for record in chosen]
    title = "Distribution of the router shift"
    svg = distribution(title, f"{key}/shift", chosen[0]["router_shift_edges"], counts, "Γ")
    caption = "Share of response tokens whose shift is below Γ. Good: the right end does not move to the right."
    return figure(title, "share of tokens", names, svg, caption)


def _from_to(series: Series, digits: int) -> str:
    """The mean of the first tenth of the values, and of the last."""
    if not len(series.values):
        return f"{series.not_finite} values, none finite"
    tenth = max(len(series.values) // 10, 1)
    first, last = (readable(part.mean(), digits) for part in (series.values[:tenth], series.values[-tenth:]))
    text = first if len(series.values) == 1 else f"{first} → {last}"
    return f"{text} ({series.not_finite} not finite)" if series.not_finite else text


def _at(record: Mapping) -> str:
    return f"At step {record['step']}."
