"""What the experiment compares, and how long everything is trained: shapes, scales, methods, ablations, controls.

What all runs of a stage share stands in ds_configs/runs/repro_*.yaml.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student's shape: how the teacher is cut, and the width of a dense model of the same active size."""

    title: str
    convert: tuple[str, ...]
    dense_width: int


SHAPES = {
    "half": Shape(
        title="half of the teacher's FFN active",
        convert=("--experts", "16", "--shared-experts", "2", "--top-k", "6"),
        dense_width=256,
    ),
    "three-quarters": Shape(
        title="three quarters of the teacher's FFN active",
        convert=("--experts", "16", "--shared-experts", "2", "--top-k", "10"),
        dense_width=384,
    ),
    "twice": Shape(
        title="as much active as the teacher has, routed experts doubled",
        convert=("--experts", "16", "--shared-experts", "2", "--top-k", "14", "--replicate", "2"),
        dense_width=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long everything is trained."""

    teacher: tuple[str, ...] = (
        *("--hidden-size", "128", "--layers", "4", "--ffn-size", "512", "--heads", "4", "--kv-heads", "4"),
        *("--batch-size", "32", "--bare-share", "0.3", "--levels", "1", "2", "3", "--peak-lr", "4e-3"),
    )
    teacher_steps: int = 4000
    teacher_rollouts: int = 150
    warmup_steps: int = 400
    joint_rollouts: int = 60
    calibration_tokens: int = 16384
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the main table; teacher, conversion, warm-up and joint training all follow from one."""
    part_seeds: tuple[int, ...] = (0, 1, 2)
    """Of ablations, Choices and other students, in the first shape."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    train_problems: int = 3000
    validation_problems: int = 150
    test_problems: int = 200
    searched: bool = True
    """Whether it has the search for learning rates and weights, on validation questions."""


SCALES = {
    "full": Scale(),
    "quick": Scale(
        teacher_steps=1500,
        teacher_rollouts=40,
        warmup_steps=60,
        joint_rollouts=24,
        calibration_tokens=4096,
        seeds=(0,),
        part_seeds=(),
        searched=False,
        shapes=("half",),
        test_problems=60,
    ),
    "smallest": Scale(
        teacher=(
            *("--hidden-size", "32", "--layers", "2", "--ffn-size", "256", "--heads", "2", "--kv-heads", "1"),
            *("--batch-size", "8", "--bare-share", "0.3", "--levels", "1"),
        ),
        teacher_steps=3,
        teacher_rollouts=1,
        warmup_steps=1,
        joint_rollouts=1,
        calibration_tokens=512,
        seeds=(0,),
        part_seeds=(),
        searched=False,
        shapes=("half",),
        train_problems=40,
        validation_problems=2,
        test_problems=2,
    ),
}

CONVERSION = ("--calibration-part", "A", "--calibration-field", "question,solution", "--even-load")
"""Of every student: calibrated on rows as training shows them, and with an even load from the start."""
SFT = ("warmup.kd_weight=0", "warmup.init_weight=0")
"""The warm-up of the baselines: as many steps on the same demonstrations, without the teacher and the clusters."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of joint training: the student that it starts from, and what it sets beyond repro_joint.yaml."""

    overrides: tuple[str, ...]
    start: str = "sft"

    def changed(self, *overrides: str) -> "Method":
        """The same with these set otherwise."""
        return Method(overrides=(*self.overrides, *overrides), start=self.start)


GRPO = ("policy.objective=grpo", "distillation.weight=0", "balance.kind=loss_free")
DENSE_GRPO: tuple[str, ...] = ()
"""GRPO of the dense baseline, beyond repro_teacher_grpo.yaml."""
METHODS: dict[str, Method] = {
    "vanilla-grpo": Method(overrides=GRPO),
    "gspo": Method(overrides=(*GRPO, "policy.objective=gspo")),
    "rspo": Method(overrides=(*GRPO, "policy.objective=rspo")),
    "online-kd": Method(overrides=(*GRPO, "distillation.temperature_rule=fixed", "distillation.weight=0.5")),
    "padd": Method(overrides=(), start="warmed-up"),
}
"""The main table. The baselines have no Stage I b: their student has learnt from the same demonstrations alone."""

PADD = METHODS["padd"]
ABLATIONS: dict[str, Method] = {
    "without-i": Method(overrides=PADD.overrides, start="without-i/converted"),
    "without-i-b": Method(overrides=PADD.overrides, start="converted"),
    "without-i-teacher": Method(overrides=PADD.overrides, start="sft"),
    "without-ii": PADD.changed("distillation.temperature_rule=fixed"),
    "without-kd": PADD.changed("distillation.weight=0"),
    "without-iii": PADD.changed("policy.objective=grpo"),
    "without-iv": PADD.changed("balance.kind=aux_loss"),
    "without-ii-iii-iv": Method(overrides=METHODS["vanilla-grpo"].overrides, start="warmed-up"),
}
"""PADD without one stage each, and without all but the first."""

CHOICES: dict[str, Method] = {
    "temperature-literal": PADD.changed("distillation.temperature_rule=literal"),
    "sign-literal": PADD.changed("balance.sign=literal"),
    "bias-integrated": PADD.changed("balance.reward_bias=integrated"),
    "shift-relative": PADD.changed("policy.shift_measure=relative"),
    "shift-selected": PADD.changed("policy.shift_measure=selected"),
    "all-literal": PADD.changed(
        *("distillation.temperature_rule=literal", "balance.sign=literal", "balance.reward_bias=integrated"),
        *("balance.centred=false", "balance.clamp=null", "balance.scale_by_spread=false"),
    ),
}
"""Each Choice in the other form, the paper's literal one where there is one."""

STUDENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "random-clusters": (("--cluster", "random"), ()),
    "contiguous-clusters": (("--cluster", "contiguous"), ()),
    "weight-clusters": (("--cluster", "weights"), ()),
    "centroid-router": (("--cluster", "weights", "--router", "centroid"), ()),
    "warmup-sample": ((), ("warmup.routing=sample",)),
}
"""Other students for the same joint training: options of the conversion, and of the warm-up."""

RATES = ("1e-4", "3e-4", "1e-3")
WEIGHTS = ("0.5", "2", "5")


def _each(key: str, values: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple((f"{key}={value}",) for value in values)


_RATE = "optimizer.learning_rate"
SEARCH: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": _each(_RATE, ("3e-4", "1e-3", "3e-3")),
    "warmed-up": _each(_RATE, ("3e-4", "1e-3", "3e-3")) + _each("warmup.kd_weight", WEIGHTS),
    "dense-grpo": _each(_RATE, RATES),
    **{name: _each(_RATE, RATES) for name in ("vanilla-grpo", "gspo", "rspo")},
    "online-kd": _each(_RATE, RATES) + _each("distillation.weight", WEIGHTS),
    "padd": _each(_RATE, RATES) + _each("distillation.weight", WEIGHTS) + _each("balance.reward_rate", ("0.2", "0")),
}
"""What was tried on validation questions (first seed and shape): each row of the table with one setting changed."""
