"""The cells of the experiment, from its settings."""

from dataclasses import asdict, dataclass, replace

from tools.experiment.cell import ROOT, Cell, with_inputs
from tools.experiment.settings import (
    ABLATIONS,
    CHOICES,
    IDEAS,
    METHODS,
    PADD,
    SEARCH,
    SFT,
    SHAPES,
    STUDENTS,
    TUNED,
    Method,
    Scale,
)


def model_of(cell: str) -> str:
    """Where the model of the cell of that name lies."""
    return f"{{work}}/{cell}/model"


def data_of(seed: int, split: str) -> str:
    """The problems of a seed; its first teacher's cell makes them."""
    return f"{{work}}/seed{seed}/teacher-sft/data/{split}.jsonl"


def filled(word: str, numbers: dict[str, object]) -> str:
    """The word with the numbers in place of their names."""
    for name, value in numbers.items():
        word = word.replace(name, str(value))
    return word


def tuned(shape: str, row: str) -> tuple[str, ...]:
    """What the search has given a row of that shape."""
    return TUNED[SHAPES[shape].tuned_as][row]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of one scale, judged on one split."""

    scale: Scale
    split: str = "test"

    def train(self, config: str, seed: int, student: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
        """Train, export."""
        words = ("python", "padd_ds/train.py", "--config", f"ds_configs/runs/{self.scale.task.configs}_{config}.yaml")
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
        return (*words, "--data", data_of(seed, self.split), *self.scale.task.evaluate, *more)

    def teacher_sft(self, seed: int) -> Cell:
        numbers = {"{seed}": seed} | {f"{{{name}}}": value for name, value in asdict(self.scale).items()}
        make = [tuple(filled(word, numbers) for word in command) for command in self.scale.task.make]
        make[-1] = (*make[-1], *self.scale.teacher)
        here_data = tuple(word.replace(f"{{work}}/seed{seed}/teacher-sft", "{here}") for word in self.evaluate(seed))
        return Cell(
            name=f"seed{seed}/teacher-sft",
            commands=(*make, here_data),
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

    def responses(self, seed: int) -> Cell:
        """What the tuned teacher answers to the questions of part C, the right responses kept."""
        words = ("padd-cache", "--teacher", model_of(f"seed{seed}/teacher"), "--data", data_of(seed, "train"))
        what = ("--part", "C", "--responses", str(self.scale.responses), "--top-k", "0", "--seed", str(seed))
        return Cell(
            name=f"seed{seed}/responses",
            commands=((*words, *what, *self.scale.task.record, "--output", "{here}/cache"),),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": "responses", "seed": seed},
        )

    def converted(self, seed: int, shape: str, name: str = "converted", *options: str) -> Cell:
        words = ("padd-convert", "--teacher", model_of(f"seed{seed}/teacher"), "--output", "{here}/model")
        data = ["--calibration", data_of(seed, "train"), "--seed", str(seed)]
        data += ["--calibration-tokens", str(self.scale.calibration_tokens)]
        options = (*SHAPES[shape].convert, *data, *self.scale.task.convert, *options)
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=((*words, *options), self.evaluate(seed, "--routing")),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": name, "seed": seed, "shape": shape},
        )

    def trained_on_text(self, seed: int, shape: str, name: str, start: str, *overrides: str) -> Cell:
        """Stage I b, or SFT."""
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
        return self.trained_on_text(seed, shape, "sft", "converted", *SFT, *tuned(shape, "sft"))

    def warmed_up(self, seed: int, shape: str, name: str = "", start: str = "converted", *overrides: str) -> Cell:
        """PADD's student, or with a `name` of its own another one."""
        overrides = (*tuned(shape, "warmed-up"), *overrides)
        return self.trained_beside_responses(seed, shape, name or "warmed-up", start, *overrides)

    def trained_beside_responses(self, seed: int, shape: str, name: str, start: str, *overrides: str) -> Cell:
        """On the demonstrations and the teacher's right responses, where the scale has them."""
        if not self.scale.responses:
            return self.trained_on_text(seed, shape, name, start, *overrides)
        responses = f"warmup.responses={{work}}/seed{seed}/responses/cache"
        cell = self.trained_on_text(seed, shape, name, start, *overrides, responses)
        return replace(cell, needs=(*cell.needs, f"seed{seed}/responses"))

    def joint(self, seed: int, shape: str, name: str, method: Method, settings: tuple[str, ...] = ()) -> Cell:
        """`settings`: in place of the tuned ones."""
        before, teacher = f"seed{seed}/{shape}/{method.start}", f"seed{seed}/teacher"
        fixed = (f"model.teacher={model_of(teacher)}", f"steps={self.scale.joint_rollouts}")
        changes = tuple(change.replace("{seed}", str(seed)) for change in method.changes)
        overrides = (*method.overrides, *(settings or tuned(shape, method.row)), *changes)
        guided = (f"seed{seed}/responses",) if any("rollout.guidance" in change for change in changes) else ()
        commands = self.train("joint", seed, model_of(before), *fixed, *overrides)
        return Cell(
            name=f"seed{seed}/{shape}/joint/{name}",
            commands=(*commands, self.evaluate(seed, "--routing", "--routing-before", model_of(before))),
            needs=(f"seed{seed}/teacher-sft", teacher, before, *guided),
            facts={"kind": "joint", "method": name, "seed": seed, "shape": shape},
        )

    def narrowed(self, seed: int, shape: str) -> Cell:
        """The dense model of the student's active size, cut from the same teacher."""
        words = ["python", "tools/narrow_dense.py", "--teacher", model_of(f"seed{seed}/teacher")]
        words += ["--output", "{here}/model", "--keep", str(SHAPES[shape].dense_width)]
        words += self.scale.task.narrow
        return Cell(
            name=f"seed{seed}/{shape}/dense/narrowed",
            commands=((*words, "--calibration", data_of(seed, "train")), self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", f"seed{seed}/teacher"),
            facts={"kind": "dense-narrowed", "seed": seed, "shape": shape},
        )

    def dense_sft(self, seed: int, shape: str) -> Cell:
        before = f"seed{seed}/{shape}/dense/narrowed"
        fixed = (f"steps={self.scale.warmup_steps}", *SFT, *tuned(shape, "sft"))
        commands = self.train("warmup", seed, model_of(before), *fixed)
        return Cell(
            name=f"seed{seed}/{shape}/dense/sft",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before),
            facts={"kind": "dense-sft", "seed": seed, "shape": shape},
        )

    def dense_sft_responses(self, seed: int, shape: str) -> Cell:
        """The dense model with all that the teacher's right responses give, and no experts."""
        before = f"seed{seed}/{shape}/dense/narrowed"
        rate = next(word for word in tuned(shape, "warmed-up") if word.startswith("optimizer.learning_rate"))
        responses = f"warmup.responses={{work}}/seed{seed}/responses/cache"
        fixed = (f"steps={self.scale.warmup_steps}", *SFT, rate, responses)
        return Cell(
            name=f"seed{seed}/{shape}/dense/sft-responses",
            commands=(*self.train("warmup", seed, model_of(before), *fixed), self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before, f"seed{seed}/responses"),
            facts={"kind": "dense-sft-responses", "seed": seed, "shape": shape},
        )

    def dense_grpo(self, seed: int, shape: str, name: str, settings: tuple[str, ...]) -> Cell:
        before = f"seed{seed}/{shape}/dense/sft"
        fixed = (f"steps={self.scale.joint_rollouts}", *self.scale.task.dense_joint)
        commands = self.train("teacher_grpo", seed, model_of(before), *fixed, *settings)
        return Cell(
            name=f"seed{seed}/{shape}/{name}",
            commands=(*commands, self.evaluate(seed)),
            needs=(f"seed{seed}/teacher-sft", before),
            facts={"kind": "joint", "method": "dense-grpo", "seed": seed, "shape": shape},
        )

    def search(self, seed: int, shape: str) -> list[Cell]:
        """Every row that is trained, with each of its candidates."""
        cells = []
        for row, candidates in SEARCH.items():
            for candidate in candidates:
                name = f"search/{row}/{','.join(candidate)}"
                if row == "sft":
                    cell = self.trained_on_text(seed, shape, name, "converted", *SFT, *candidate)
                elif row == "warmed-up":
                    cell = self.trained_beside_responses(seed, shape, name, "converted", *candidate)
                elif row == "dense-grpo":
                    cell = self.dense_grpo(seed, shape, name, candidate)
                else:
                    cell = self.joint(seed, shape, name, METHODS[row], candidate)
                facts = {"kind": "search", "row": row, "options": " ".join(candidate), "shape": shape}
                cells.append(replace(cell, facts={**facts, "seed": seed}))
        return cells

    def main_table(self, seed: int, shape: str) -> list[Cell]:
        """Teachers, students before joint training, the dense baseline, and all methods."""
        students = [self.converted(seed, shape), self.sft(seed, shape)]
        students += [self.responses(seed)] if self.scale.responses else []
        students.append(self.warmed_up(seed, shape))
        dense = []
        if self.scale.dense:
            dense_grpo = self.dense_grpo(seed, shape, "dense/grpo", tuned(shape, "dense-grpo"))
            dense = [self.narrowed(seed, shape), self.dense_sft(seed, shape), dense_grpo]
            dense += [self.dense_sft_responses(seed, shape)] if self.scale.responses else []
        joint = [self.joint(seed, shape, name, METHODS[name]) for name in self.scale.methods]
        return [self.teacher_sft(seed), self.teacher(seed), *students, *dense, *joint]

    def parts(self, seed: int, shape: str) -> list[Cell]:
        """Ablations, Choices and other students; ideas for the first seed."""
        cells = [self.converted(seed, shape, "without-i/converted", "--cluster", "random", "--router", "random")]
        cells.append(
            self.trained_on_text(seed, shape, "demonstrations/warmed-up", "converted", *tuned(shape, "warmed-up"))
        )
        rate = next(word for word in tuned(shape, "warmed-up") if word.startswith("optimizer.learning_rate"))
        cells.append(self.trained_beside_responses(seed, shape, "sft-responses", "converted", *SFT, rate))
        ideas = IDEAS if seed == self.scale.part_seeds[0] else {}
        for name, method in (ABLATIONS | CHOICES | ideas).items():
            cells.append(self.joint(seed, shape, name, method))
        for name, (options, overrides) in STUDENTS.items():
            start = "converted"
            if options:
                start = f"{name}/converted"
                cells.append(self.converted(seed, shape, start, *options))
            cells.append(self.warmed_up(seed, shape, f"{name}/warmed-up", start, *overrides))
            cells.append(self.joint(seed, shape, name, replace(PADD, start=f"{name}/warmed-up")))
        return cells


def all_cells(scale: Scale) -> list[Cell]:
    """Every cell of a scale, each once, the main table first."""
    plan = Plan(scale=scale)
    cells = [cell for shape, seeds in scale.seeds.items() for seed in seeds for cell in plan.main_table(seed, shape)]
    for shape in scale.searched:
        cells += Plan(scale=scale, split="validation").search(scale.seeds[shape][0], shape)
    cells += [cell for seed in scale.part_seeds for cell in plan.parts(seed, scale.shapes[0])]
    return with_inputs({cell.name: cell for cell in cells}.values(), ROOT)
