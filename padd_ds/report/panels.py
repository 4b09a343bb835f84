"""The curves that are drawn of a run, with a caption that says what good looks like."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from padd_ds.report.html import Panel
from padd_ds.report.numbers import MINUS, NO_BREAK_SPACE, TIMES, readable
from padd_ds.report.plots import curves, stacked_bars
from padd_ds.report.source import RunData, Series

RATIO = f"|ratio{NO_BREAK_SPACE}{MINUS}{NO_BREAK_SPACE}1|"
EXCESS = f"max share {TIMES} E {MINUS} 1"
PHASES = {"seconds_rollout": "rollout", "seconds_scoring": "scoring", "seconds_update": "update"}


@dataclass(frozen=True, kw_only=True)
class Curve:
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
    Curve(
        title="Language-model loss",
        unit="nats per token",
        metrics={"loss_lm": "loss_lm"},
        caption="Good: falls, then levels off.",
    ),
    Curve(
        title="Distillation loss",
        unit="nats per token",
        metrics={"loss_kd": "loss_kd"},
        caption="Divergence of the student from its teacher. Good: falls towards 0; "
        "with temperatures other than 1 it need not reach it.",
        from_zero=True,
    ),
    Curve(
        title="Initialisation loss",
        unit="nats",
        metrics={"loss_init": "loss_init"},
        caption="Divergence of the experts' activity from that of the clusters they came from. "
        "Good: small beside the other losses, and not rising.",
        from_zero=True,
    ),
    Curve(
        title="Policy loss",
        unit="per token",
        metrics={"loss_policy": "loss_policy"},
        caption="Good: hovers near 0 without spikes; its level says nothing about the reward.",
    ),
    Curve(
        title="Auxiliary loss",
        unit="of the routers",
        metrics={"loss_aux": "loss_aux"},
        caption="Good: falls towards the dashed line, which is an even load.",
        reference=lambda run: 1.0,
    ),
    Curve(
        title="Reward",
        unit="mean per response",
        metrics={"reward": "reward", "reward_correct": "correct"},
        caption="Good: both rise; reward without more correct answers means that only the form improves.",
        from_zero=True,
    ),
    Curve(
        title="Response length",
        unit="tokens",
        metrics={"response_tokens": "mean length"},
        caption="Good: steady, or rising together with the reward.",
        from_zero=True,
    ),
    Curve(
        title="Failed responses",
        unit="share of all",
        metrics={
            "response_truncated": "cut off",
            "answer_missing": "no answer",
            "answer_check_failed": "check failed",
            "gold_unparsable": "gold answer unusable",
        },
        caption="Good: all fall towards 0. A failed check ran out of time or killed its process; "
        "an unusable gold answer is a fault of the data.",
        from_zero=True,
    ),
    Curve(
        title="Groups without spread",
        unit="share of groups",
        metrics={"groups_without_spread": "equal rewards"},
        caption="Groups whose responses all have the same reward, so that none has an advantage. Good: well below 1; "
        "near 1 the questions are too easy or too hard, or rollout.group_size is too small.",
        from_zero=True,
    ),
    Curve(
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
    Curve(
        title="Penalised ratio",
        unit="mean per token",
        metrics={"ratio_penalised": "ratio after the penalty"},
        caption="What the advantage is multiplied by, before it is clipped. Good: close to the dashed line.",
        reference=lambda run: 1.0,
    ),
    Curve(
        title="Clipped tokens",
        unit="share of response tokens",
        metrics={"clip_fraction": "clipped"},
        caption="Tokens without gradient from the policy loss, because their ratio had left the clip range. "
        "Good: few; with many, lower optimizer.learning_rate or policy.updates_per_rollout. "
        "With gspo whole responses are clipped.",
        from_zero=True,
    ),
    Curve(
        title="KL to the reference",
        unit="nats",
        metrics={"kl_reference_nats": "KL(student, reference)"},
        caption="How far the student is from the model that policy.kl_weight holds it to. "
        "Good: levels off; if it keeps growing, raise the weight.",
        from_zero=True,
    ),
    Curve(
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
    Curve(
        title="Gradient of each term",
        unit="norm, weights included",
        metrics={
            "grad_norm_policy": "policy",
            "grad_norm_kd": "distillation",
            "grad_norm_reference": "KL to the reference",
            "grad_norm_aux": "auxiliary loss",
            "grad_norm_lm": "language model",
            "grad_norm_init": "initialisation",
        },
        caption="Which term drives. Good: none is forgotten; change its weight if it is.",
        log=True,
    ),
    Curve(
        title="Gradient norm",
        unit="before clipping",
        metrics={"grad_norm": "whole loss"},
        caption="Of the step's last update. Good: steady; a jump is a bad batch or too high a learning rate.",
        from_zero=True,
    ),
    Curve(
        title="Load violation",
        unit=EXCESS,
        metrics={"load_max_violation": "mean over layers"},
        caption="How far the busiest expert is above an even load. Good: falls towards 0, or stays low.",
        from_zero=True,
    ),
    Curve(
        title="Router entropy",
        unit="nats",
        metrics={"router_entropy_nats": "mean over layers"},
        caption="Good: below the dashed line (uniform, ln E) and steady; a fall to 0 is a collapse.",
        reference=uniform_entropy,
    ),
    Curve(
        title="Throughput",
        unit="tokens per second",
        metrics={f"tokens_per_second_{phase}": phase for phase in PHASES.values()},
        caption="Of all ranks together: drawn tokens in the rollout, prompts included afterwards. Good: steady.",
        log=True,
    ),
)


def training_panels(run: RunData) -> list[Panel]:
    """Every curve that the run has, and its time per phase."""
    return [*filter(None, (_curve_panel(run, curve) for curve in CURVES)), *_phase_panel(run)]


def curve_panel(curve: Curve, title: str, series: Mapping[str, Series], run: RunData, remark: str = "") -> Panel:
    """Named series in the way of `curve`, whose level to compare with is that of `run`."""
    drawable = any((one.values > 0).any() if curve.log else len(one.values) for one in series.values())
    reference = curve.reference(run)
    plot = curves(series, log=curve.log, from_zero=curve.from_zero, reference=reference) if drawable else None
    entries = [(name, _from_to(one, 2 if curve.log else 3)) for name, one in series.items()]
    return Panel(title=title, unit=curve.unit, plot=plot, caption=f"{curve.caption} {remark}", entries=entries)


def _curve_panel(run: RunData, curve: Curve) -> Panel | None:
    found = {name: run.series(metric) for metric, name in curve.metrics.items()}
    series = {name: one for name, one in found.items() if one is not None}
    return curve_panel(curve, curve.title, series, run, curve.remark(run)) if series else None


def _phase_panel(run: RunData) -> list[Panel]:
    found = {name: run.series(metric) for metric, name in PHASES.items()}
    series = {name: one for name, one in found.items() if one is not None}
    total_s = sum(one.values.sum() for one in series.values())
    if total_s <= 0 or len({len(one.values) for one in series.values()}) > 1:
        return []
    entries = [(name, f"{100 * one.values.sum() / total_s:.0f} %") for name, one in series.items()]
    caption = f"{readable(total_s)} s in the logged steps. Good: even bars, most of each spent on rollout and update."
    plot = stacked_bars(series)
    return [Panel(title="Time per phase", unit="seconds per step", plot=plot, caption=caption, entries=entries)]


def logged_seconds(run: RunData) -> float:
    """Of all phases of all logged steps."""
    return sum(line[phase] for line in run.metrics for phase in PHASES if phase in line)


def _from_to(series: Series, digits: int) -> str:
    """The mean of the first tenth of the values, and of the last."""
    if not len(series.values):
        return f"{series.not_finite} values, none finite"
    first, last = readable(series.values[: series.tenth].mean(), digits), readable(series.last, digits)
    text = first if len(series.values) == 1 else f"{first} → {last}"
    return f"{text} ({series.not_finite} not finite)" if series.not_finite else text
