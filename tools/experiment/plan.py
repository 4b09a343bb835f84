"""The cells of the experiment, from its settings."""

from dataclasses import dataclass, replace

from tools.experiment.cell import Cell
from tools.experiment.settings import (
    ABLATIONS,
    CHOICES,
    CONVERSION,
    DENSE_GRPO,
    METHODS,
    PADD,
    SEARCH,
    SFT,
    SHAPES,
    STUDENTS,
    Method,
    Scale,
)

EVALUATION = ["--pattern", r"#(-?\d+)$", "--answer-format", "pattern", "--template", "plain"]
EVALUATION += ["--subject-field", "subject", "--solution-field", "solution", "--max-new-tokens", "48"]
EVALUATION += ["--batch-size", "350", "--samples", "4"]


def model_of(cell: str) -> str:
    """Where the model of the cell of that name lies."""
    return f"{{work}}/{cell}/model"


def data_of(seed: int, split: str) -> str:
    """The problems of a seed; its first teacher's cell makes them."""
    return f"{{work}}/seed{seed}/teacher-sft/data/{split}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of one scale, judged on one split."""

    scale: Scale
    split: str = "test"

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
        counts = [f"--train-problems={scale.train_problems}", f"--test-problems={scale.test_problems}"]
        counts += [f"--validation-problems={scale.validation_problems}", f"--steps={scale.teacher_steps}"]
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
        data = ["--calibration", data_of(seed, "train"), "--seed", str(seed)]
        data += ["--calibration-tokens", str(self.scale.calibration_tokens)]
        options = (*SHAPES[shape].convert, *data, *CONVERSION, *options)
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=((*words, *options), self.evaluate(seed, "--routing")),
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

    def sft(self, seed: int, shape: str) -> Cell:
        """The baselines' student."""
        return self.warmed_up(seed, shape, "sft", "converted", *SFT)

    def joint(self, seed: int, shape: str, name: str, method: Method) -> Cell:
        before, teacher = f"seed{seed}/{shape}/{method.start}", f"seed{seed}/teacher"
        fixed = (f"model.teacher={model_of(teacher)}", f"steps={self.scale.joint_rollouts}")
        commands = self.train("joint", seed, model_of(before), *fixed, *method.overrides)
        return Cell(
            name=f"seed{seed}/{shape}/joint/{name}",
            commands=(*commands, self.evaluate(seed, "--routing", "--routing-before", model_of(before))),
            needs=(f"seed{seed}/teacher-sft", teacher, before),
            facts={"kind": "joint", "method": name, "seed": seed, "shape": shape},
        )

    def narrowed(self, seed: int, shape: str) -> Cell:
        """The dense model of the student's active size, cut from the same teacher."""
        words = ["python", "tools/narrow_dense.py", "--teacher", model_of(f"seed{seed}/teacher")]
        words += ["--output", "{here}/model", "--keep", str(SHAPES[shape].dense_width)]
        return Cell(
            name=f"seed{seed}/{shape}/dense/narrowed",
            commands=((*words, "--calibration", data_of(seed, "train")), self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": "dense-narrowed", "seed": seed, "shape": shape},
        )

    def dense_sft(self, seed: int, shape: str) -> Cell:
        before = f"seed{seed}/{shape}/dense/narrowed"
        commands = self.train("warmup", seed, model_of(before), f"steps={self.scale.warmup_steps}", *SFT)
        return Cell(
            name=f"seed{seed}/{shape}/dense/sft",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before),
            facts={"kind": "dense-sft", "seed": seed, "shape": shape},
        )

    def dense_grpo(self, seed: int, shape: str, name: str = "dense/grpo", *overrides: str) -> Cell:
        before = f"seed{seed}/{shape}/dense/sft"
        fixed = (f"steps={self.scale.joint_rollouts}", *DENSE_GRPO)
        commands = self.train("teacher_grpo", seed, model_of(before), *fixed, *overrides)
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before),
            facts={"kind": "joint", "method": "dense-grpo", "seed": seed, "shape": shape},
        )

    def search(self, seed: int, shape: str) -> list[Cell]:
        """Every row that is trained with each of its candidates."""
        cells = []
        for row, candidates in SEARCH.items():
            for candidate in candidates:
                name = f"search/{row}/{','.join(candidate)}"
                if row == "sft":
                    cell = self.warmed_up(seed, shape, name, "converted", *SFT, *candidate)
                elif row == "warmed-up":
                    cell = self.warmed_up(seed, shape, name, "converted", *candidate)
                elif row == "dense-grpo":
                    cell = self.dense_grpo(seed, shape, name, *candidate)
                else:
                    cell = self.joint(seed, shape, name, METHODS[row].changed(*candidate))
                facts: dict[str, str | int] = {
                    "kind": "search",
                    "row": row,
                    "options": " ".join(candidate),
                    "seed": seed,
                    "shape": shape,
                }
                cells.append(replace(cell, facts=facts))
        return cells

    def main_table(self, seed: int, shape: str) -> list[Cell]:
        """Teachers, students before joint training, the dense baseline, and all methods."""
        students = [self.converted(seed, shape), self.sft(seed, shape), self.warmed_up(seed, shape)]
        dense = [self.narrowed(seed, shape), self.dense_sft(seed, shape), self.dense_grpo(seed, shape)]
        joint = [self.joint(seed, shape, name, method) for name, method in METHODS.items()]
        return [self.teacher_sft(seed), self.teacher(seed), *students, *dense, *joint]

    def parts(self, seed: int, shape: str) -> list[Cell]:
        """Ablations, Choices and other students."""
        cells = [self.converted(seed, shape, "without-i/converted", "--cluster", "random", "--router", "random")]
        cells += [self.joint(seed, shape, name, method) for name, method in (ABLATIONS | CHOICES).items()]
        for name, (options, overrides) in STUDENTS.items():
            start = "converted"
            if options:
                start = f"{name}/converted"
                cells.append(self.converted(seed, shape, start, *options))
            cells.append(self.warmed_up(seed, shape, f"{name}/warmed-up", start, *overrides))
            method = Method(overrides=PADD.overrides, start=f"{name}/warmed-up")
            cells.append(self.joint(seed, shape, name, method))
        return cells


def all_cells(scale: Scale) -> list[Cell]:
    """Every cell of a scale, each once, the main table first."""
    plan = Plan(scale=scale)
    cells = [cell for seed in scale.seeds for shape in scale.shapes for cell in plan.main_table(seed, shape)]
    if scale.searched:
        cells += Plan(scale=scale, split="validation").search(scale.seeds[0], scale.shapes[0])
    cells += [cell for seed in scale.part_seeds for cell in plan.parts(seed, scale.shapes[0])]
    return list({cell.name: cell for cell in cells}.values())
