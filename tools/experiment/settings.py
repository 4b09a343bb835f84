"""What the experiment compares, and how long everything is trained: shapes, scales, methods, ablations, controls.

What all runs of a stage share stands in ds_configs/runs/repro_*.yaml and smollm2_*.yaml.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A student's shape: how the teacher is cut, and the width of a dense model of the same active size."""

    title: str
    convert: tuple[str, ...]
    dense_width: int
    tuned_as: str = "three-quarters"
    """The shape whose search this one takes its settings from."""


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
    "smollm2": Shape(
        title="SmolLM2-135M-Instruct (dequantised), three quarters of its FFN active",
        convert=("--experts", "16", "--shared-experts", "4", "--top-k", "8"),
        dense_width=1152,
        tuned_as="smollm2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems and their first teacher, and how models are trained on them and judged."""

    configs: str
    """Trainings take ds_configs/runs/<configs>_<stage>.yaml."""
    make: tuple[tuple[str, ...], ...]
    """Commands that leave the teacher in {here}/model and its problems in {here}/data; numbers of the scale are filled
    in by name."""
    convert: tuple[str, ...]
    """Options of every conversion."""
    narrow: tuple[str, ...] = ()
    """Options of every cut of a dense model."""
    evaluate: tuple[str, ...]
    """Options of every evaluation."""
    dense_joint: tuple[str, ...] = ()
    """What the GRPO of a dense baseline has in common with the students' joint training."""
    record: tuple[str, ...] = ()
    """Options under which the teacher writes its own responses."""


SFT = ("warmup.kd_weight=0", "warmup.init_weight=0")
"""The warm-up of the baselines: as many steps on the same demonstrations, without the teacher and the clusters."""

_MAKE_SUMS = (
    *("python", "tools/make_problems.py", "--question", "What is {expression}?"),
    *("--solution", "{expression} = {answer}"),
    "chain_sum:subject=sum2,min_terms=2,max_terms=2,min_digits=1,max_digits=2",
    "chain_sum:subject=sum3,min_terms=3,max_terms=3,min_digits=1,max_digits=1",
    "chain_sum:subject=sum3of2,min_terms=3,max_terms=3,min_digits=2,max_digits=2",
    "products:subject=product,min_terms=2,max_terms=2,min_digits=1,max_digits=2",
    *("--seed", "{seed}"),
)
_SUMS = (
    *("--answer-format", "last_number", "--template", "chat", "--subject-field", "subject"),
    *("--max-new-tokens", "24", "--batch-size"),
)


def _make_tuned_smollm2(configs: str) -> tuple[tuple[str, ...], ...]:
    """Problems, and SmolLM2 after SFT on demonstrations of its own, none of a question that students see."""
    test, train, lessons = (f"{{here}}/data/{name}.jsonl" for name in ("test", "train", "lessons"))
    return (
        ("python", "tools/smollm2.py", "--output", "{here}/base"),
        (*_MAKE_SUMS, "--count", "{test_problems}", "--output", test),
        (*_MAKE_SUMS, "--count", "{train_problems}", "--output", train, "--exclude", test),
        (*_MAKE_SUMS, "--count", "{train_problems}", "--output", lessons, "--exclude", test, "--exclude", train),
        (
            *("python", "padd_ds/train.py", "--config", f"ds_configs/runs/{configs}_warmup.yaml", "run_dir={here}/run"),
            *("model.student={here}/base", f"data.source={lessons}", "data.part=all"),
            *("seed={seed}", "steps={teacher_steps}", *SFT),
        ),
        ("padd-export", "--run", "{here}/run", "--output", "{here}/model"),
    )


TASKS = {
    "arithmetic": Task(
        configs="repro",
        make=(
            (
                *("python", "tools/tiny_teacher.py", "--output", "{here}/model", "--data-output", "{here}/data"),
                *("--seed", "{seed}", "--train-problems={train_problems}", "--test-problems={test_problems}"),
                *("--validation-problems={validation_problems}", "--steps={teacher_steps}"),
            ),
        ),
        convert=("--calibration-part", "A", "--calibration-field", "question,solution", "--even-load"),
        evaluate=(
            *("--pattern", r"#(-?\d+)$", "--answer-format", "pattern", "--template", "plain"),
            *("--subject-field", "subject", "--solution-field", "solution", "--max-new-tokens", "48"),
            *("--batch-size", "350", "--samples", "4"),
        ),
        dense_joint=("rollout.prompts=32", "policy.drop_flat_groups=true"),
        record=(
            *("--pattern", r"#(-?\d+)$", "--answer-format", "pattern", "--template", "plain"),
            *("--subject-field", "subject", "--max-new-tokens", "48", "--batch-size", "350"),
        ),
    ),
    "smollm2": Task(
        configs="smollm2",
        make=_make_tuned_smollm2("smollm2"),
        convert=(
            *("--calibration-part", "A", "--calibration-field", "question,solution", "--calibration-template", "chat"),
            "--even-load",
        ),
        evaluate=(*_SUMS, "125", "--dtype", "bfloat16", "--solution-field", "solution", "--samples", "2"),
        record=(*_SUMS, "125", "--dtype", "bfloat16"),
    ),
}
"""Generated arithmetic for a teacher trained from scratch, and sums and products in words for a real one."""
TASKS["smollm2-gpu"] = replace(
    TASKS["smollm2"],
    configs="smollm2_gpu",
    make=_make_tuned_smollm2("smollm2_gpu"),
    convert=(*TASKS["smollm2"].convert, "--device", "cuda"),
    narrow=("--template", "chat", "--device", "cuda"),
    evaluate=(*_SUMS, "250", "--solution-field", "solution", "--samples", "2"),
    record=(*_SUMS, "250"),
)
"""The latter on a GPU, with larger batches."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long everything is trained."""

    task: Task = TASKS["arithmetic"]
    device: str = "cpu"
    """That trains and evaluates: `cpu`, with a thread for each process, or `cuda`."""
    teacher: tuple[str, ...] = (
        *("--hidden-size", "128", "--layers", "4", "--ffn-size", "512", "--heads", "4", "--kv-heads", "4"),
        *("--batch-size", "32", "--bare-share", "0.3", "--levels", "1", "2", "3", "--peak-lr", "4e-3"),
    )
    teacher_steps: int = 4000
    teacher_rollouts: int = 150
    warmup_steps: int = 1200
    joint_rollouts: int = 30
    responses: int = 4
    """That the tuned teacher writes to every question of part C; its right ones are learnt in Stage I b. 0: none."""
    calibration_tokens: int = 16384
    seeds: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"three-quarters": (0, 1, 2, 3, 4), "half": (5, 6, 7), "twice": (8, 9, 10)}
    )
    """Of every shape's main rows; teacher, conversion, warm-up and joint training all follow from one. Shapes share no
    seed, so that each can be measured on a machine of its own: another one makes other teachers of the same seed."""
    part_seeds: tuple[int, ...] = (2, 3, 4)
    """Of ablations, Choices and other students, in the first shape; IDEAS have the first of them."""
    methods: tuple[str, ...] = ("vanilla-grpo", "gspo", "rspo", "online-kd", "padd")
    dense: bool = True
    """Whether there is a dense model of the student's active size."""
    train_problems: int = 3000
    validation_problems: int = 150
    test_problems: int = 200
    searched: tuple[str, ...] = ("three-quarters",)
    """Shapes with a search for learning rates and weights, on validation questions."""

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(self.seeds)


SCALES = {
    "full": Scale(),
    "quick": Scale(
        teacher_steps=1500,
        teacher_rollouts=40,
        warmup_steps=60,
        joint_rollouts=24,
        responses=1,
        calibration_tokens=4096,
        seeds={"three-quarters": (0,)},
        part_seeds=(),
        searched=(),
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
        seeds={"half": (0,)},
        part_seeds=(),
        searched=(),
        # Its teacher answers nothing right.
        responses=0,
        train_problems=40,
        validation_problems=2,
        test_problems=2,
    ),
    "smollm2": Scale(
        task=TASKS["smollm2"],
        teacher=(),
        teacher_steps=250,
        teacher_rollouts=16,
        warmup_steps=150,
        joint_rollouts=30,
        responses=2,
        calibration_tokens=8192,
        seeds={"smollm2": (0,)},
        part_seeds=(),
        searched=(),
        methods=("vanilla-grpo", "padd"),
        dense=False,
        train_problems=4000,
        test_problems=500,
    ),
}

SCALES["smollm2-gpu"] = replace(
    SCALES["smollm2"],
    task=TASKS["smollm2-gpu"],
    device="cuda",
    teacher_steps=200,
    teacher_rollouts=40,
    warmup_steps=150,
    joint_rollouts=40,
    responses=4,
    calibration_tokens=16384,
    dense=True,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of joint training: the student that it starts from, and what it sets beyond repro_joint.yaml."""

    row: str
    """The row of TUNED whose settings it has."""
    overrides: tuple[str, ...]
    start: str = "sft"
    changes: tuple[str, ...] = ()
    """Stand behind the tuned settings."""


GRPO = ("policy.objective=grpo", "balance.kind=loss_free")
METHODS: dict[str, Method] = {
    "vanilla-grpo": Method(row="vanilla-grpo", overrides=(*GRPO, "distillation.weight=0")),
    "gspo": Method(row="gspo", overrides=(*GRPO, "distillation.weight=0", "policy.objective=gspo")),
    "rspo": Method(row="rspo", overrides=(*GRPO, "distillation.weight=0", "policy.objective=rspo")),
    "online-kd": Method(row="online-kd", overrides=(*GRPO, "distillation.temperature_rule=fixed")),
    "padd": Method(row="padd", overrides=("balance.load_rate=0.1",), start="warmed-up"),
}
"""The main table. The baselines have no Stage I b and no teacher in it: their student has learnt from the same
demonstrations alone."""

PADD = METHODS["padd"]
ABLATIONS: dict[str, Method] = {
    "without-i": replace(PADD, start="without-i/converted"),
    "without-i-b": replace(PADD, start="converted"),
    "without-i-teacher": replace(PADD, start="sft"),
    "without-responses": replace(PADD, start="demonstrations/warmed-up"),
    "without-ii": replace(PADD, changes=("distillation.temperature_rule=fixed",)),
    "without-kd": replace(PADD, changes=("distillation.weight=0",)),
    "without-iii": replace(PADD, changes=("policy.objective=grpo",)),
    "without-iv": replace(PADD, changes=("balance.kind=aux_loss",)),
    "without-ii-iii-iv": replace(METHODS["vanilla-grpo"], start="warmed-up"),
    "responses-alone": replace(METHODS["vanilla-grpo"], start="sft-responses"),
}
"""PADD without one stage each, without all but the first, and without all but the teacher's right responses."""

CHOICES: dict[str, Method] = {
    "temperature-literal": replace(
        PADD, changes=("distillation.temperature_rule=literal", "distillation.temperature_ceiling=2")
    ),
    "sign-literal": replace(PADD, changes=("balance.sign=literal",)),
    "bias-integrated": replace(PADD, changes=("balance.reward_bias=integrated",)),
    "shift-relative": replace(PADD, changes=("policy.shift_measure=relative",)),
    "all-literal": replace(
        PADD,
        changes=(
            *("distillation.temperature_rule=literal", "distillation.temperature_ceiling=2"),
            *("balance.sign=literal", "balance.reward_bias=integrated", "balance.centred=false"),
            *("balance.clamp=null", "balance.scale_by_spread=false"),
            *("balance.load_rate=0.01", "balance.reward_rate=0.05"),
        ),
    ),
}
"""Each Choice in the other form, the paper's literal one where there is one."""

IDEAS: dict[str, Method] = {
    "no-ceiling": replace(PADD, changes=("distillation.temperature_ceiling=2",)),
    "guided": replace(PADD, changes=("rollout.guidance={work}/seed{seed}/responses/cache",)),
    "kd-linear": replace(PADD, changes=("distillation.schedule=linear",)),
    "kd-failure": replace(PADD, changes=("distillation.weighting=failure",)),
    "shift-selected": replace(PADD, changes=("policy.shift_measure=selected",)),
}
"""What else was tried to put PADD ahead; with the first seed alone."""

STUDENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "random-clusters": (("--cluster", "random"), ()),
    "contiguous-clusters": (("--cluster", "contiguous"), ()),
    "weight-clusters": (("--cluster", "weights"), ()),
    "centroid-router": (("--cluster", "weights", "--router", "centroid"), ()),
    "warmup-sample": ((), ("warmup.routing=sample",)),
}
"""Other students for the same joint training: options of the conversion, and of the warm-up."""


def _rates(*rates: str, also: str = "") -> tuple[tuple[str, ...], ...]:
    return tuple((f"optimizer.learning_rate={rate}", *also.split()) for rate in rates)


_GRPO_RATES = _rates("1e-4", "3e-4")
_KD = (*_rates("1e-4", "3e-4", also="distillation.weight=0.5"), *_rates("1e-4", also="distillation.weight=2"))
_SHARPER = (*_KD[0], "distillation.temperature=0.5")
_GAMMA = "balance.reward_rate"
SEARCH: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (*_rates("3e-4", "1e-3"), *_rates("3e-4", also="steps=400")),
    "warmed-up": tuple(_rates("1e-3", also=f"warmup.kd_weight={weight}")[0] for weight in ("0.1", "0.5", "2")),
    "dense-grpo": _GRPO_RATES,
    "vanilla-grpo": _GRPO_RATES,
    "gspo": _GRPO_RATES,
    "rspo": _GRPO_RATES,
    "online-kd": (*_KD, _SHARPER),
    "padd": (*((*candidate, f"{_GAMMA}=0.01") for candidate in (*_KD, _SHARPER)), (*_SHARPER, f"{_GAMMA}=0.05")),
}
"""What was tried on validation questions with the first seed: the same for every row that has the setting."""


def _taken(**candidates: int) -> dict[str, tuple[str, ...]]:
    """The candidate of every row, by its place in SEARCH."""
    return {row.replace("_", "-"): SEARCH[row.replace("_", "-")][place] for row, place in candidates.items()}


TUNED: dict[str, dict[str, tuple[str, ...]]] = {
    "three-quarters": _taken(sft=2, warmed_up=0, dense_grpo=1, vanilla_grpo=1, gspo=1, rspo=0, online_kd=3, padd=0),
    "smollm2": {
        "sft": ("optimizer.learning_rate=1e-4",),
        "warmed-up": ("optimizer.learning_rate=1e-4", "warmup.kd_weight=0.1"),
        "vanilla-grpo": ("optimizer.learning_rate=2e-5",),
        "dense-grpo": ("optimizer.learning_rate=2e-5",),
        "padd": ("optimizer.learning_rate=2e-5", "distillation.weight=0.5", f"{_GAMMA}=0.01"),
    },
}
"""What of it every row has, by the shape that it was tried on; for SmolLM2 nothing was searched: the weights of the
distillation are those of three quarters."""
