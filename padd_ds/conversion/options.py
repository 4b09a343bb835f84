"""What a conversion is asked to do."""

from dataclasses import dataclass
from pathlib import Path

from padd_ds.data.prompts import resolve_template
from padd_ds.errors import UserError

CLUSTERINGS = ("activations", "weights", "mixed", "random", "contiguous")
WEIGHT_FEATURES = ("gate", "gate+up", "gate+up+down")
NEEDS_DATA = ("activations", "mixed")
ROUTERS = ("calibrated", "centroid", "random")
DTYPE_NAMES = ("float32", "bfloat16", "float16")
MAX_LISTED_COUNT = 512
ROW_BYTES = 16


PARTS = ("A", "B", "C", "D")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """A conversion; UserError when the options contradict each other.

    teacher: Hugging Face folder or hub id of the dense model.
    output: folder to create.
    experts: slices that every FFN is cut into (N), shared ones included.
    shared_experts: slices that are always on (S, >= 1).
    top_k: routed slices per token (K, of the N - S).
    student: Hugging Face folder or hub id of an existing MoE model to give a router to, instead of a new student;
        `experts`, `shared_experts`, `top_k` and `dtype` are then its own.
    cluster: how the routed neurons are grouped, one of CLUSTERINGS.
    router: where the router's rows come from, one of ROUTERS.
    calibration: text file, or JSONL file, of the calibration data; needed for `activations` and `calibrated`.
    calibration_field: field of the JSONL records that holds a text; or two, separated by a comma, that hold a question
        and its solution. Those are taken as training shows them: one row each, the question in a template.
    calibration_template: name of that template, or a text with {question} in it.
    calibration_part: use only the JSONL records of this part (A, B, C or D) of the training set, by the hash of
        the first field; None uses all.
    part_fractions: shares of the parts, where the runs' data.part_fractions are other than their default.
    calibration_tokens: how many tokens of it are used.
    weight_features: the weights that `weights` and `mixed` compare neurons by, one of WEIGHT_FEATURES.
    restarts: k-means searches per layer, of which the best counts.
    overcluster: clusters per group that k-means makes first, merged by average linkage; 1 makes the groups at once.
    regroup_rounds: how often the groups of `activations` and `mixed` are refined towards what a router can foresee;
        0 leaves the k-means groups.
    even_load: choose the router's selection bias so that the calibration tokens spread evenly over the experts.
    refit: fit down_proj by least squares to what the routing leaves active, on the calibration data.
    replicate: copies of every routed expert; more total parameters, the same number per token.
    dense_layers: first layers that stay dense, all of their FFN active.
    reinit_share: share of the neurons of all copies but the first that are drawn anew.
    evaluation: text or JSONL file to report the perplexity of teacher and student on.
    evaluation_tokens: how many tokens of it are used.
    controls: report the perplexity of `random` and `contiguous` groups beside it.
    prior_temperature: xi of PADD eq. 2 (the paper uses 0.1-0.5).
    dtype: of the written weights, one of DTYPE_NAMES; None keeps the teacher's.
    device: where the teacher and the student are run and the clustering is computed.
    """

    teacher: str
    output: Path
    experts: int | None = None
    top_k: int | None = None
    student: str | None = None
    shared_experts: int = 1
    cluster: str = "activations"
    router: str = "calibrated"
    calibration: Path | None = None
    calibration_field: str = "text"
    calibration_template: str = "plain"
    calibration_part: str | None = None
    part_fractions: dict[str, float] | None = None
    calibration_tokens: int = 16384
    weight_features: str = "gate"
    restarts: int = 1
    overcluster: int = 1
    regroup_rounds: int = 4
    even_load: bool = False
    refit: bool = False
    replicate: int = 1
    dense_layers: int = 0
    reinit_share: float = 0.0
    evaluation: Path | None = None
    evaluation_tokens: int = 16384
    controls: bool = False
    prior_temperature: float = 0.3
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_choice("--cluster", self.cluster, CLUSTERINGS)
        _check_choice("--router", self.router, ROUTERS)
        _check_choice("--weight-features", self.weight_features, WEIGHT_FEATURES)
        if self.dtype is not None:
            _check_choice("--dtype", self.dtype, DTYPE_NAMES)
        if self.prior_temperature <= 0:
            raise UserError(f"--prior-temperature is {self.prior_temperature}; it must be above 0")
        for option, value, least in (
            ("--calibration-tokens", self.calibration_tokens, 1),
            ("--evaluation-tokens", self.evaluation_tokens, 2),
            ("--regroup-rounds", self.regroup_rounds, 0),
            ("--replicate", self.replicate, 1),
            ("--restarts", self.restarts, 1),
            ("--dense-layers", self.dense_layers, 0),
            ("--overcluster", self.overcluster, 1),
        ):
            if value < least:
                raise UserError(f"{option} is {value}; it must be at least {least}")
        if not 0 <= self.reinit_share <= 1:
            raise UserError(f"--reinit-share is {self.reinit_share}; it must lie in 0..1")
        if self.reinit_share and self.replicate == 1:
            raise UserError("--reinit-share draws neurons of copies anew; pass --replicate 2 or more")
        self._check_counts()
        self._check_calibration()

    def _check_counts(self) -> None:
        if self.student is not None:
            self._check_existing()
            return
        if self.experts is None or self.top_k is None:
            raise UserError(
                "--experts and --top-k say how to cut the teacher; pass both, or --student with an MoE model"
            )
        routed = self.experts - self.shared_experts
        if self.shared_experts < 1:
            raise UserError(f"--shared-experts is {self.shared_experts}; a student has at least 1")
        if self.shared_experts >= self.experts:
            raise UserError(
                f"--shared-experts is {self.shared_experts} of --experts {self.experts}; it must be smaller, "
                "since the rest is routed"
            )
        if routed < 2:
            raise UserError(
                f"--experts {self.experts} with --shared-experts {self.shared_experts} leaves {routed} routed "
                "expert; at least 2 are needed"
            )
        if not 1 <= self.top_k <= routed:
            raise UserError(
                f"--top-k is {self.top_k}; it must lie between 1 and the {routed} routed experts "
                f"(--experts {self.experts} minus --shared-experts {self.shared_experts})"
            )

    def _check_existing(self) -> None:
        given = {
            "--experts": self.experts is not None,
            "--top-k": self.top_k is not None,
            "--shared-experts": self.shared_experts != 1,
            "--dtype": self.dtype is not None,
            "--refit": self.refit,
            "--even-load": self.even_load,
            "--controls": self.controls,
            "--replicate": self.replicate > 1,
            "--dense-layers": self.dense_layers > 0,
        }
        for option in (name for name, is_given in given.items() if is_given):
            raise UserError(f"{option} does not go with --student, whose experts stay as they are; leave it out")

    def _check_calibration(self) -> None:
        needs_data = self.cluster in NEEDS_DATA or self.router == "calibrated"
        if needs_data and self.calibration is None:
            raise UserError(
                f"--calibration is missing: --cluster {self.cluster} with --router {self.router} needs data; pass a "
                "text or JSONL file, or choose --cluster weights and --router centroid"
            )
        if self.calibration is not None and not self.calibration.is_file():
            raise UserError(f"--calibration {self.calibration}: no such file")
        for option, wanted in (
            ("--refit", self.refit),
            ("--replicate", self.replicate > 1),
            ("--even-load", self.even_load),
        ):
            if wanted and self.calibration is None:
                raise UserError(f"{option} needs data to fit to; pass a text or JSONL file as --calibration")
        if self.evaluation is not None and not self.evaluation.is_file():
            raise UserError(f"--evaluation {self.evaluation}: no such file")
        if self.controls and self.evaluation is None:
            raise UserError("--controls compares perplexities; pass a text or JSONL file as --evaluation")
        if self.calibration_field.count(",") > 1:
            raise UserError(f"--calibration-field {self.calibration_field}: name one field, or question,solution")
        resolve_template(self.calibration_template)
        if self.calibration_part is not None:
            _check_choice("--calibration-part", self.calibration_part, PARTS)
            if self.calibration is None or self.calibration.suffix != ".jsonl":
                raise UserError("--calibration-part takes records of a JSONL file; pass one as --calibration")
        elif self.part_fractions is not None:
            raise UserError("--part-fractions are those of --calibration-part; pass that too")


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """How an FFN of `width` neurons (F) is cut: N = `experts` slices, S of them shared, K chosen per token.

    Every other slice becomes `copies` routed experts.
    """

    width: int
    experts: int
    shared: int
    top_k: int
    copies: int = 1

    def __post_init__(self) -> None:
        if self.width % self.experts:
            raise UserError(
                f"--experts is {self.experts}, which does not divide the teacher's FFN width {self.width}; "
                f"{self._counts_that_work()}"
            )

    def check_overcluster(self, ratio: int) -> None:
        """UserError unless every group of neurons can be made of `ratio` equal clusters."""
        if self.slice_width % ratio:
            raise UserError(
                f"--overcluster is {ratio}, which does not divide the {self.slice_width} neurons of a slice; "
                "choose a divisor"
            )

    def check_alignment(self, element_bytes: int) -> None:
        """UserError unless the rows of an expert's matrices are whole multiples of 16 bytes.

        Grouped matrix products, which transformers uses by default, refuse anything else.
        """
        if self.slice_width * element_bytes % ROW_BYTES:
            raise UserError(
                f"--experts {self.experts} makes slices of {self.slice_width} neurons, "
                f"{self.slice_width * element_bytes} bytes a row, "
                f"no multiple of {ROW_BYTES} bytes; {self._counts_that_work()}"
            )

    def _counts_that_work(self) -> str:
        counts = [
            count
            for count in range(self.shared + 2, MAX_LISTED_COUNT + 1)
            if self.width % count == 0 and self.width // count * 2 % ROW_BYTES == 0
        ]
        return f"counts that work in every dtype: {', '.join(map(str, counts)) or 'none'}"

    @property
    def groups(self) -> int:
        """Slices that are not shared."""
        return self.experts - self.shared

    @property
    def routed(self) -> int:
        """E, the number of routed experts."""
        return self.groups * self.copies

    @property
    def slice_width(self) -> int:
        """G = F / N, neurons of one expert."""
        return self.width // self.experts

    @property
    def active_share(self) -> float:
        """Share of the FFN that a token passes through."""
        return (self.shared + self.top_k) / self.experts


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} is {value}; choose one of {', '.join(choices)}")
