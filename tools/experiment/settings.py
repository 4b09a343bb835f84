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
    warmup_steps: int = 150
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
        shapes=("half",),
        train_problems=40,
        validation_problems=2,
        test_problems=2,
    ),
}

GRPO = ("policy.objective=grpo", "distillation.weight=0", "balance.kind=loss_free")
METHODS: dict[str, tuple[str, ...]] = {
    "vanilla-grpo": GRPO,
    "gspo": (*GRPO, "policy.objective=gspo"),
    "rspo": (*GRPO, "policy.objective=rspo"),
    "online-kd": ("policy.objective=grpo", "distillation.temperature_rule=fixed", "balance.kind=loss_free"),
    "padd": (),
}
"""Joint training of the same warmed-up student; each what PADD is without some of its parts."""

ABLATIONS: dict[str, tuple[str, ...]] = {
    "without-ii": ("distillation.temperature_rule=fixed",),
    "without-iii": ("policy.objective=grpo",),
    "without-iv": ("balance.kind=aux_loss",),
}
"""PADD without one stage each; without Stage I it starts from another student."""

CHOICES: dict[str, tuple[str, ...]] = {
    "temperature-literal": ("distillation.temperature_rule=literal",),
    "sign-literal": ("balance.sign=literal",),
    "bias-integrated": ("balance.reward_bias=integrated",),
    "shift-relative": ("policy.shift_measure=relative",),
    "shift-selected": ("policy.shift_measure=selected",),
    "all-literal": (
        "distillation.temperature_rule=literal",
        *("balance.sign=literal", "balance.reward_bias=integrated", "balance.centred=false"),
        *("balance.clamp=null", "balance.scale_by_spread=false"),
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
