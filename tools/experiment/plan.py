"""Which cells the experiment has: teachers, students, methods, ablations, controls.

Every number that a cell is trained with stands here or in ds_configs/runs/repro_*.yaml.
"""

from dataclasses import dataclass

from tools.experiment.cell import Cell

EVALUATION = ["--pattern", r"#(-?\d+)$", "--answer-format", "pattern", "--template", "plain"]
EVALUATION += ["--subject-field", "subject", "--solution-field", "solution", "--max-new-tokens", "48"]
EVALUATION += ["--batch-size", "350", "--samples", "4"]


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
        *("--hidden-size", "128", "--layers", "4", "--ffn-size", "512", "--heads", "4", "--kv-heads", "2"),
        *("--batch-size", "32", "--bare-share", "0.3", "--levels", "1", "2", "3", "--peak-lr", "4e-3"),
    )
    teacher_steps: int = 4000
    teacher_rollouts: int = 100
    warmup_steps: int = 150
    joint_rollouts: int = 60
    calibration_tokens: int = 16384
    train_problems: int = 1200
    validation_problems: int = 150
    test_problems: int = 200


GRPO = ("policy.objective=grpo", "distillation.weight=0", "balance.kind=loss_free")
METHODS: dict[str, tuple[str, ...]] = {
    "vanilla-grpo": GRPO,
    "gspo": (*GRPO, "policy.objective=gspo"),
    "rspo": (*GRPO, "policy.objective=rspo"),
    "online-kd": ("policy.objective=grpo", "distillation.temperature_rule=fixed", "balance.kind=loss_free"),
    "padd": (),
}


def model_of(cell: str) -> str:
    """Where the model of the cell of that name lies."""
    return f"{{work}}/{cell}/model"


def data_of(seed: int, split: str) -> str:
    """The problems of a seed; its first teacher's cell makes them."""
    return f"{{work}}/seed{seed}/teacher-sft/data/{split}.jsonl"


LEARNING_RATES: dict[str, tuple[str, ...]] = {"dense-grpo": ()}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of one scale, judged on one split."""

    scale: Scale = Scale()
    split: str = "test"
    samples: str = "4"

    def train(self, config: str, seed: int, student: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
        """Train, export."""
        words = ("python", "padd_ds/train.py", "--config", f"ds_configs/runs/repro_{config}.yaml")
        fixed = (
            "run_dir={here}/run",
            f"model.student={student}",
            f"data.source={data_of(seed, 'train')}",
            f"seed={seed}",
        )
        return (
            (*words, *fixed, *overrides),
            ("padd-export", "--run", "{here}/run", "--output", "{here}/model"),
        )

    def evaluate(self, seed: int, *more: str) -> tuple[str, ...]:
        words = ("padd-eval", "--model", "{here}/model", "--output", "{here}/eval.json")
        return (*words, "--data", data_of(seed, self.split), *EVALUATION, *more)

    def teacher_sft(self, seed: int) -> Cell:
        scale = self.scale
        make = ("python", "tools/tiny_teacher.py", "--output", "{here}/model", "--data-output", "{here}/data")
        counts = ("--train-problems", str(scale.train_problems), "--test-problems", str(scale.test_problems))
        counts += ("--validation-problems", str(scale.validation_problems), "--steps", str(scale.teacher_steps))
        here_data = tuple(word.replace(f"{{work}}/seed{seed}/teacher-sft", "{here}") for word in self.evaluate(seed))
        return Cell(
            name=f"seed{seed}/teacher-sft",
            commands=((*make, "--seed", str(seed), *counts, *scale.teacher), here_data),
            facts={"kind": "teacher-sft", "seed": seed},
        )

    def teacher(self, seed: int) -> Cell:
        rollouts = f"steps={self.scale.teacher_rollouts}"
        commands = self.train("teacher_grpo", seed, model_of(f"seed{seed}/teacher-sft"), rollouts)
        return Cell(
            name=f"seed{seed}/teacher",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft",),
            facts={"kind": "teacher", "seed": seed},
        )

    def converted(self, seed: int, shape: str, name: str = "converted", *options: str) -> Cell:
        words = ("padd-convert", "--teacher", model_of(f"seed{seed}/teacher"), "--output", "{here}/model")
        data = ("--calibration", data_of(seed, "train"), "--calibration-part", "A")
        data += ("--calibration-field", "question,solution")
        data += ("--calibration-tokens", str(self.scale.calibration_tokens), "--seed", str(seed))
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=((*words, *SHAPES[shape].convert, *data, *options), self.evaluate(seed, "--routing")),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": name, "seed": seed, "shape": shape},
        )

    def warmed_up(
        self, seed: int, shape: str, name: str = "warmed-up", start: str = "converted", *overrides: str
    ) -> Cell:
        before, teacher = f"seed{seed}/{shape}/{start}", f"seed{seed}/teacher"
        fixed = (f"model.teacher={model_of(teacher)}", f"steps={self.scale.warmup_steps}")
        commands = self.train("warmup", seed, model_of(before), *fixed, *overrides)
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=(*commands, self.evaluate(seed, "--routing", "--routing-before", model_of(before))),
            needs=(f"seed{seed}/teacher-sft", teacher, before),
            facts={"kind": name, "seed": seed, "shape": shape},
        )

    def joint(self, seed: int, shape: str, name: str, overrides: tuple[str, ...], start: str = "warmed-up") -> Cell:
        before, teacher = f"seed{seed}/{shape}/{start}", f"seed{seed}/teacher"
        fixed = (f"model.teacher={model_of(teacher)}", f"steps={self.scale.joint_rollouts}")
        commands = self.train("joint", seed, model_of(before), *fixed, *overrides)
        return Cell(
            name=f"seed{seed}/{shape}/joint/{name}",
            commands=(*commands, self.evaluate(seed, "--routing", "--routing-before", model_of(before))),
            needs=(f"seed{seed}/teacher-sft", teacher, before),
            facts={"kind": "joint", "method": name, "seed": seed, "shape": shape},
        )

    def narrowed(self, seed: int, shape: str) -> Cell:
        """The dense model of the student's active size, cut from the same teacher."""
        words = ("python", "tools/narrow_dense.py", "--teacher", model_of(f"seed{seed}/teacher"))
        words += ("--output", "{here}/model", "--keep", str(SHAPES[shape].dense_width))
        return Cell(
            name=f"seed{seed}/{shape}/dense/narrowed",
            commands=((*words, "--calibration", data_of(seed, "train")), self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": "dense-narrowed", "seed": seed, "shape": shape},
        )

    def dense_warmed_up(self, seed: int, shape: str) -> Cell:
        before, teacher = f"seed{seed}/{shape}/dense/narrowed", f"seed{seed}/teacher"
        fixed = (f"model.teacher={model_of(teacher)}", f"steps={self.scale.warmup_steps}", "warmup.init_weight=0")
        return Cell(
            name=f"seed{seed}/{shape}/dense/warmed-up",
            commands=(*self.train("warmup", seed, model_of(before), *fixed), self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", teacher, before),
            facts={"kind": "dense-warmed-up", "seed": seed, "shape": shape},
        )

    def dense_grpo(self, seed: int, shape: str) -> Cell:
        before = f"seed{seed}/{shape}/dense/warmed-up"
        fixed = (f"steps={self.scale.joint_rollouts}", *LEARNING_RATES["dense-grpo"])
        commands = self.train("teacher_grpo", seed, model_of(before), *fixed)
        return Cell(
            name=f"seed{seed}/{shape}/dense/grpo",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before),
            facts={"kind": "joint", "method": "dense-grpo", "seed": seed, "shape": shape},
        )
