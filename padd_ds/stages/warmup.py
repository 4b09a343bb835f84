"""Stage I b: the experts learn from text, from the teacher and from the clusters; the router stays frozen.

A dense model, as a baseline, learns with its whole FFNs, from text and the teacher.

Legend: B sequences, T tokens, R tokens of the longest target, S tokens of a layer, E experts, F expert width,
D model width, V vocabulary.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.conversion.targets import ConversionTargets
from padd_ds.data.batches import SupervisedBatch
from padd_ds.engine.ranks import sum_over_ranks
from padd_ds.engine.student import Student
from padd_ds.errors import OneRankError, UserError
from padd_ds.hf import response_logits
from padd_ds.losses.distillation import distillation_sum, recorded_distillation_sum
from padd_ds.losses.prior import expert_prior
from padd_ds.losses.tokens import cross_entropy_sum, global_mean
from padd_ds.losses.warmup import init_kl
from padd_ds.moe.router import RoutingRecord
from padd_ds.offline.cache import TeacherCache
from padd_ds.seeds import derive_seed
from padd_ds.stages.gradients import add_gradient_norms, measured_micro_batch
from padd_ds.stages.routing_report import RoutingStatistics
from padd_ds.stages.stage import MetricSums, Stage, StepReport
from padd_ds.stages.supervision import Supervision


def is_trained(name: str, train_shared_experts: bool, dense: bool = False) -> bool:
    """Whether the warm-up trains the parameter of that name: the experts', or a dense model's FFNs, nothing else."""
    if dense:
        return ".mlp." in name
    return ".mlp.experts." in name or (train_shared_experts and ".mlp.shared_experts." in name)


@dataclass(frozen=True, kw_only=True)
class WarmupStage:
    """The parts that a warm-up step is made of."""

    student: Student
    teacher: Any
    """Dense model, or None where kd_weight is 0 or its likelihoods are in `cache`."""
    supervision: Supervision
    targets: ConversionTargets | None
    """The clusters' p_T; None where init_weight is 0."""
    cache: TeacherCache | None = None
    config: RunConfig

    def as_stage(self) -> Stage:
        return Stage(student=self.student, step=self.step)

    def step(self, step: int) -> StepReport:
        """One optimiser step: L_LM + alpha L_KD + beta L_init (PADD, warm-up)."""
        config, student, started_s = self.config, self.student, time.perf_counter()
        student.engine.train()
        micro_batches = self._micro_batches(step)
        n_tokens = sum_over_ranks(torch.stack([batch["target_mask_BR"].sum() for batch in micro_batches]).sum())
        sums, statistics = MetricSums(), RoutingStatistics.start(student)
        chosen = (
            measured_micro_batch(config.seed, step, len(micro_batches))
            if student.separates_terms and config.measures_gradients(step)
            else None
        )
        for index, batch in enumerate(micro_batches):
            student.control.seed = derive_seed(config.seed, step, student.ranks.rank, index)
            sample_S = self._init_sample(batch["attention_mask_BT"])
            with student.routing(config.warmup.routing, noise=config.routing.noise, sample_S=sample_S):
                counts = (n_tokens, len(micro_batches))
                if index == chosen:
                    unused = MetricSums(), RoutingStatistics.start(student)
                    add_gradient_norms(self._loss_terms(student.model, batch, *counts, *unused), student, sums)
                terms = self._loss_terms(student.engine, batch, *counts, sums, statistics)
                loss = torch.stack(list(terms.values())).sum()
                student.backward(loss)
            student.step()
        metrics = sums.means(student.ranks) | {"tokens": float(n_tokens)} | student.optimiser_metrics()
        n_real = sum_over_ranks(torch.stack([batch["attention_mask_BT"].sum() for batch in micro_batches]).sum())
        metrics["seconds_update"] = time.perf_counter() - started_s
        metrics["tokens_per_second_update"] = float(n_real) / metrics["seconds_update"]
        routing = statistics.report()
        return StepReport(metrics=metrics | routing.scalars, routing=routing.layers)

    def _micro_batches(self, step: int) -> list[SupervisedBatch]:
        ranks = self.student.ranks
        return [
            {name: part.to(ranks.device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}  # type: ignore[misc]
            for batch in self.supervision.micro_batches(step, ranks.rank, ranks.world)
        ]

    def _loss_terms(
        self,
        model: Any,
        batch: SupervisedBatch,
        n_tokens: torch.Tensor,
        n_micro: int,
        sums: MetricSums,
        statistics: RoutingStatistics,
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of the loss: L_LM, alpha L_KD, beta L_init. `model`: the engine or the model in it."""
        options, student, world = self.config.warmup, self.student, self.student.ranks.world
        mask_BT, target_mask_BR = batch["attention_mask_BT"], batch["target_mask_BR"]
        with student.recording() as record:
            logits_BRV = _target_logits(model, batch)
        lm_sum = cross_entropy_sum(logits_BRV, batch["target_ids_BR"], target_mask_BR)
        kd_sum = init = torch.zeros((), device=student.ranks.device)
        if options.kd_weight > 0:
            kd_sum = self._kd_sum(batch, logits_BRV)
        if options.init_weight > 0:
            init = self._init_loss(record)
        statistics.add(record, mask_BT)
        n_learnt = target_mask_BR.sum()
        sums.add("loss_lm", lm_sum, n_learnt)
        sums.add("loss_kd", kd_sum, n_learnt)
        sums.add("loss_init", init)
        sums.add("targets_truncated", batch["truncated"], len(mask_BT))
        return {
            "lm": global_mean(lm_sum, n_tokens, world),
            "kd": options.kd_weight * global_mean(kd_sum, n_tokens, world),
            # Each rank holds the gradient of its own experts only, and gradients are averaged over all ranks.
            "init": options.init_weight * init * student.expert_parallel_size / n_micro,
        }

    def _kd_sum(self, batch: SupervisedBatch, logits_BRV: torch.Tensor) -> torch.Tensor:
        """Choice: L_KD compares next-token distributions on the target's tokens, the teacher first unless told."""
        direction = self.config.warmup.kd_direction
        if self.cache is not None:
            mask_BR = batch["target_mask_BR"]
            rows = (batch["input_ids_BT"].cpu(), batch["attention_mask_BT"].cpu(), mask_BR.cpu())
            try:
                recorded = self.cache.batch(*rows)
            except UserError as error:
                # Other ranks may have found theirs, and wait.
                raise OneRankError(str(error)) from error
            top_ids_BRK, logprobs_BRQ = (part.to(logits_BRV.device) for part in recorded)
            return recorded_distillation_sum(logits_BRV, top_ids_BRK, logprobs_BRQ, mask_BR, direction=direction)
        with torch.no_grad():
            teacher_BRV = _target_logits(self.teacher, batch)
        plain_B = torch.ones(len(logits_BRV), device=logits_BRV.device)
        top_k = self.config.warmup.teacher_top_k
        mask_BR = batch["target_mask_BR"]
        return distillation_sum(logits_BRV, teacher_BRV, mask_BR, plain_B, direction=direction, teacher_top_k=top_k)

    def _init_sample(self, mask_BT: torch.Tensor) -> torch.Tensor | None:
        """Tokens on which L_init compares the experts' activity with the clusters'."""
        if self.config.warmup.init_weight == 0:
            return None
        return _sample_tokens(mask_BT.flatten(), self.config.warmup.init_tokens, self.student.control.seed)

    def _init_loss(self, record: RoutingRecord) -> torch.Tensor:
        """L_init averaged over layers (Choice, so that beta means the same at any depth)."""
        assert self.targets is not None and self.targets.expert_prior_LE is not None
        temperature = self.targets.prior_temperature
        losses = [
            init_kl(expert_prior(record.activity_E[index], temperature), prior_E.to(record.activity_E[index].device))
            for index, prior_E in enumerate(self.targets.expert_prior_LE)
        ]
        return torch.stack(losses).mean()


def _sample_tokens(mask_S: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` positions of real tokens, drawn with replacement so that every rank has as many."""
    real_S = mask_S.nonzero().flatten()
    drawn_S = torch.randint(len(real_S), (count,), generator=torch.Generator().manual_seed(seed))
    return real_S[drawn_S.to(real_S.device)]


def _target_logits(model: Any, batch: SupervisedBatch) -> torch.Tensor:
    """[B, R, V]: logits that predict the targets."""
    n_targets = batch["target_ids_BR"].shape[1]
    return response_logits(
        model, batch["input_ids_BT"], batch["attention_mask_BT"], n_targets, batch["position_ids_BT"]
    )
