"""Stages II-IV: one step of joint training, from rollout to rebalanced router; for a dense model, plain GRPO.

Legend: P prompts, G responses per prompt, B responses, T prompt tokens, R response tokens, L = T + R tokens,
S = B * L tokens of a layer, N MoE layers, E experts, V vocabulary, C counts of a histogram.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from padd_ds.config.schema import RunConfig
from padd_ds.engine.ranks import sum_over_ranks
from padd_ds.engine.student import Student
from padd_ds.hf import response_logits
from padd_ds.losses.distillation import distillation_sum, distillation_temperature
from padd_ds.losses.policy import (
    POLICY_LOSSES,
    PolicyOptions,
    importance_weights,
    loss_count,
    reference_kl_sum,
)
from padd_ds.losses.tokens import global_mean, token_logprobs
from padd_ds.moe.balance import BalanceOptions, BalanceState, update_balance
from padd_ds.moe.load import load_balance_sum
from padd_ds.moe.router import RoutingRecord
from padd_ds.moe.shift import SHIFT_EDGES, router_distribution, router_shift, shift_counts
from padd_ds.rollout.batch import RolloutBatch, deal_responses, response_positions
from padd_ds.rollout.collect import Collector, Rollout
from padd_ds.seeds import derive_seed
from padd_ds.stages.gradients import add_gradient_norms, measured_micro_batch
from padd_ds.stages.joint_metrics import LAYER_MEANS, add_flips, add_policy_metrics, add_rollout_mismatch
from padd_ds.stages.micro_batch import Counts, MicroBatch, OldPolicy, layer_routes
from padd_ds.stages.routing_report import RoutingStatistics
from padd_ds.stages.stage import MetricSums, Stage, StepReport
from padd_ds.stages.teacher import TeacherOnPrompts


def is_trained(name: str, train_router: bool) -> bool:
    """Whether joint training changes the parameter of that name."""
    return train_router or not name.endswith(".mlp.gate.weight")


@dataclass(kw_only=True)
class JointStage:
    """The parts that a joint step is made of; `balance` is all that it remembers between steps."""

    student: Student
    teacher: Any
    """Dense model, or None where there is no distillation."""
    reference: Any
    """Model that the policy is held to, or None where policy.kl_weight is 0."""
    collector: Collector
    config: RunConfig
    policy_options: PolicyOptions
    balance_options: BalanceOptions | None
    """None where the bias of the routers stays as it is."""
    balance: BalanceState = field(init=False)

    def __post_init__(self) -> None:
        self.balance = BalanceState.start(self._biases())
        shape = (len(self.student.layers), len(SHIFT_EDGES) + 1)
        self._shift_counts_LC = torch.zeros(shape, dtype=torch.int64, device=self.student.ranks.device)

    def as_stage(self) -> Stage:
        return Stage(student=self.student, step=self.step, state=self.state, load_state=self.load_state)

    def step(self, step: int) -> StepReport:
        """Rollout, then `updates_per_rollout` optimiser steps, each followed by Stage IV."""
        started_s = time.perf_counter()
        self.student.engine.eval()
        rollout = self.collector.collect(step)
        collected_s = time.perf_counter()
        self.student.engine.train()
        sums, statistics = MetricSums(), RoutingStatistics.start(self.student)
        self._shift_counts_LC.zero_()
        with self.student.routing("routed", noise=self.config.routing.noise):
            updates = self._score(rollout.batch, step, sums)
            scored_s = time.perf_counter()
            for update, micro_batches in enumerate(updates):
                # The last update: at the first one the ratios are 1, and nothing has moved.
                measured = (
                    self.student.separates_terms and self.config.measures_gradients(step) and update == len(updates) - 1
                )
                chosen = measured_micro_batch(self.config.seed, step, len(micro_batches)) if measured else None
                own_statistics = self._update(micro_batches, step, chosen, sums, statistics)
                if self.config.routing.replay == "off":
                    self._rebalance(own_statistics)
            if self.config.routing.replay != "off":
                # Replayed choices do not answer to the bias before the next rollout: one step for all of them.
                self._rebalance(statistics)
        updated_s = time.perf_counter()
        for name, (total, count) in rollout.metrics.items():
            sums.add(name, total, count)
        routing = statistics.report()
        metrics = (
            sums.means(self.student.ranks)
            | sums.largest(self.student.ranks)
            | routing.scalars
            | self.student.optimiser_metrics()
        )
        seconds = {
            "rollout": collected_s - started_s,
            "scoring": scored_s - collected_s,
            "update": updated_s - scored_s,
        }
        metrics |= {f"seconds_{phase}": phase_s for phase, phase_s in seconds.items()}
        metrics |= self._throughput(rollout, seconds)
        layers = routing.layers | sums.layer_means(self.student.ranks)
        metrics |= {name: fmean(layers[name]) for name in LAYER_MEANS if name in layers}
        if self.student.layers:
            layers["advantage_ema"] = self.balance.ema_LE.tolist()
            layers["router_shift_edges"] = SHIFT_EDGES
            layers["router_shift_counts"] = sum_over_ranks(self._shift_counts_LC).tolist()
        return StepReport(metrics=metrics, routing=layers, samples=rollout.samples)

    def _throughput(self, rollout: Rollout, seconds: Mapping[str, float]) -> dict[str, float]:
        """Tokens of all ranks per second and phase: drawn in the rollout, prompts included afterwards. Collective."""
        own = [rollout.metrics["response_tokens"][0], float(rollout.batch.counted_mask_BL.sum())]
        drawn, seen = sum_over_ranks(torch.tensor(own, device=self.student.ranks.device)).tolist()
        tokens = {"rollout": drawn, "scoring": seen, "update": seen}
        return {f"tokens_per_second_{phase}": count / seconds[phase] for phase, count in tokens.items()}

    def state(self) -> dict[str, torch.Tensor]:
        return self.balance.to_tensors()

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        device = self.student.ranks.device
        self.balance = BalanceState.from_tensors({name: tensor.to(device) for name, tensor in tensors.items()})
        self._install(self.balance.bias_LE)

    def _score(self, batch: RolloutBatch, step: int, sums: MetricSums) -> list[list[MicroBatch]]:
        """The responses dealt out at random to the updates, with the old policy's view of each."""
        config, ranks = self.config, self.student.ranks
        group_size = config.rollout.group_size
        kd_weight = config.kd_weight_at(step)
        teacher = TeacherOnPrompts.read(self.teacher, batch, group_size) if kd_weight > 0 else None

        def scored(rows: torch.Tensor, routing_seed: int) -> MicroBatch:
            chosen = batch.rows(rows)
            return MicroBatch(
                batch=chosen,
                prompt_B=rows // group_size,
                teacher=teacher,
                kd_weight=kd_weight,
                routing_seed=routing_seed,
                old=self._old_policy(chosen, routing_seed, sums),
            )

        generator = torch.Generator().manual_seed(derive_seed(config.seed, step, ranks.rank))
        dealt = deal_responses(
            batch, config.policy.updates_per_rollout, self.student.accumulation_steps, generator=generator
        )
        return [
            [
                scored(rows, derive_seed(config.seed, step, ranks.rank, update, index))
                for index, rows in enumerate(micro_batches)
            ]
            for update, micro_batches in enumerate(dealt)
        ]

    @torch.no_grad()
    def _old_policy(self, batch: RolloutBatch, routing_seed: int, sums: MetricSums) -> OldPolicy:
        routes = layer_routes(batch)
        with self.student.replaying(routes if self.config.routing.replay == "rollout" else None):
            logprobs_BR, _, record = self._forward(self.student.engine, batch, routing_seed)
        layers = range(len(self.student.layers))
        if routes:
            add_flips(sums, "router_flips_rollout", record, routes, batch)
        add_rollout_mismatch(sums, logprobs_BR, batch)
        return OldPolicy(
            logprobs_BR=logprobs_BR,
            reference_logprobs_BR=self._reference_logprobs(batch),
            scores_SE=[record.scores_SE[layer] for layer in layers],
            selected_SK=[record.selected_SK[layer] for layer in layers],
        )

    def _reference_logprobs(self, batch: RolloutBatch) -> torch.Tensor | None:
        if self.reference is None:
            return None
        n_response = batch.response_ids_BR.shape[1]
        logits_BRV = response_logits(self.reference, batch.input_ids_BL, batch.attention_mask_BL, n_response)
        return token_logprobs(logits_BRV, batch.response_ids_BR, self.config.rollout.temperature)

    def _forward(
        self, model: Any, batch: RolloutBatch, routing_seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, RoutingRecord]:
        """Log-probabilities [B, R] and logits [B, R, V] of the responses, and what the routers did.

        The seed makes routing noise the same before and after an update, so that it is no part of the ratio.
        """
        self.student.control.seed = routing_seed
        with self.student.recording(graph=self._uses_aux_loss) as record:
            logits_BRV = response_logits(
                model,
                batch.input_ids_BL,
                batch.attention_mask_BL,
                batch.response_ids_BR.shape[1],
            )
        temperature = self.config.rollout.temperature
        return token_logprobs(logits_BRV, batch.response_ids_BR, temperature), logits_BRV, record

    def _update(
        self,
        micro_batches: list[MicroBatch],
        step: int,
        measured: int | None,
        sums: MetricSums,
        step_statistics: RoutingStatistics,
    ) -> RoutingStatistics:
        """One optimiser step on a share of the responses; how they were routed.

        `measured`: the micro-batch whose terms' gradient norms are told, if any.
        """
        student = self.student
        counts = self._counts([micro_batch.batch for micro_batch in micro_batches])
        statistics = RoutingStatistics.start(student)
        for index, micro_batch in enumerate(micro_batches):
            replayed = None if self.config.routing.replay == "off" else micro_batch.old.selected_SK
            with student.replaying(replayed):
                if index == measured:
                    # Inline: a name would keep this graph beside the next one.
                    add_gradient_norms(
                        self._loss_terms(student.model, micro_batch, counts, MetricSums())[0], student, sums
                    )
                terms, record, shift_NBR = self._loss_terms(student.engine, micro_batch, counts, sums)
                self._count_shifts(shift_NBR, micro_batch.batch.response_mask_BR)
                self._count_routing(micro_batch.batch, record, (statistics, step_statistics))
                loss = torch.stack(list(terms.values())).sum()
                student.backward(loss)
            student.step()
        return statistics

    def _counts(self, batches: list[RolloutBatch]) -> Counts:
        """What the sums of an update are divided by. Collective."""
        per_batch = [
            torch.stack(
                [
                    batch.response_mask_BR.sum(),
                    loss_count(batch.response_mask_BR, self.policy_options),
                    batch.counted_mask_BL.sum(),
                ]
            )
            for batch in batches
        ]
        return Counts(*sum_over_ranks(torch.stack(per_batch).sum(dim=0)))

    def _loss_terms(
        self, model: Any, micro_batch: MicroBatch, counts: Counts, sums: MetricSums
    ) -> tuple[dict[str, torch.Tensor], RoutingRecord, torch.Tensor]:
        """The weighted terms of the loss, what the routers did, and their shift [N, B, R].

        `model`: the engine, or the model in it.
        """
        batch, config, world = micro_batch.batch, self.config, self.student.ranks.world
        logprobs_BR, logits_BRV, record = self._forward(model, batch, micro_batch.routing_seed)
        shift_NBR = self._shift(micro_batch, record, sums)
        terms = POLICY_LOSSES[config.policy.objective](
            logprobs_BR,
            micro_batch.old.logprobs_BR,
            self._advantages(micro_batch),
            batch.response_mask_BR,
            # Choice: one Gamma per token, the mean over layers; 0 in a dense model.
            shift_NBR.sum(dim=0) / max(len(shift_NBR), 1),
            self.policy_options,
        )
        loss_terms = {"policy": config.policy.weight * global_mean(terms.loss_sum, counts.policy, world)}
        if micro_batch.old.reference_logprobs_BR is not None:
            mask_BR, reference_BR = batch.response_mask_BR, micro_batch.old.reference_logprobs_BR
            kl_sum = reference_kl_sum(logprobs_BR, reference_BR, mask_BR, self.policy_options)
            loss_terms["reference"] = config.policy.kl_weight * global_mean(kl_sum, counts.policy, world)
            sums.add("kl_reference_nats", kl_sum.detach(), loss_count(mask_BR, self.policy_options))
        kd_sum = torch.zeros((), device=logits_BRV.device)
        if micro_batch.teacher is not None:
            kd_sum = self._kd_sum(batch, logits_BRV, micro_batch.teacher.logits(batch, micro_batch.prompt_B), sums)
            loss_terms["kd"] = micro_batch.kd_weight * global_mean(kd_sum, counts.response_tokens, world)
        if self._uses_aux_loss:
            aux_sum = self._aux_sum(batch, record)
            loss_terms["aux"] = config.balance.aux_weight * global_mean(aux_sum, counts.tokens, world)
            sums.add("loss_aux", aux_sum.detach(), batch.counted_mask_BL.sum())
        add_policy_metrics(sums, terms, loss_count(batch.response_mask_BR, self.policy_options))
        sums.add("loss_kd", kd_sum, terms.tokens)
        add_flips(sums, "router_flips", record, micro_batch.old.selected_SK, batch)
        return loss_terms, record, shift_NBR

    def _advantages(self, micro_batch: MicroBatch) -> torch.Tensor:
        """[B], or [B, R] where tokens are weighted for the rollout's own distribution."""
        batch, cap = micro_batch.batch, self.config.policy.importance_cap
        if cap is None:
            return batch.advantage_B
        assert batch.rollout_logprobs_BR is not None
        old_BR, mask_BR = micro_batch.old.logprobs_BR, batch.response_mask_BR
        weights_BR = importance_weights(old_BR, batch.rollout_logprobs_BR, mask_BR, cap)
        return batch.advantage_B[:, None] * weights_BR

    def _aux_sum(self, batch: RolloutBatch, record: RoutingRecord) -> torch.Tensor:
        """The auxiliary balancing loss, summed over real tokens, mean over layers; its gradient reaches the routers."""
        mask_S = batch.counted_mask_BL.flatten()
        per_layer = [
            load_balance_sum(
                router_distribution(record.scores_SE[layer], router.score_function), record.selected_SK[layer], mask_S
            )
            for layer, router in enumerate(self.student.routers)
        ]
        return torch.stack(per_layer).mean()

    def _shift(self, micro_batch: MicroBatch, record: RoutingRecord, sums: MetricSums) -> torch.Tensor:
        """Gamma [N, B, R] by layer, at the positions that predict each token."""
        batch, old = micro_batch.batch, micro_batch.old
        n_responses, n_response = batch.response_ids_BR.shape
        policy = self.config.policy
        measure = "selected" if policy.objective == "rspo" else policy.shift_measure

        def layer_shift(layer: int) -> torch.Tensor:
            score_function = self.student.routers[layer].score_function
            new_SE = router_distribution(record.scores_SE[layer], score_function)
            old_SE = router_distribution(old.scores_SE[layer], score_function)
            shift_S = router_shift(new_SE, old_SE, measure, old.selected_SK[layer])
            return response_positions(shift_S.view(n_responses, -1), n_response)

        if not self.student.layers:
            return torch.zeros(0, n_responses, n_response, device=batch.response_mask_BR.device)
        shift_NBR = torch.stack([layer_shift(layer) for layer in range(len(self.student.layers))])
        totals_N = (shift_NBR * batch.response_mask_BR).sum(dim=(1, 2))
        sums.add_layers("router_shift", totals_N, batch.response_mask_BR.sum())
        return shift_NBR

    def _count_shifts(self, shift_NBR: torch.Tensor, mask_BR: torch.Tensor) -> None:
        """Add the response tokens to the distribution of Gamma, by layer."""
        for layer, shift_BR in enumerate(shift_NBR):
            self._shift_counts_LC[layer] += shift_counts(shift_BR.flatten(), mask_BR.flatten())

    def _kd_sum(
        self, batch: RolloutBatch, logits_BRV: torch.Tensor, teacher_BRV: torch.Tensor, sums: MetricSums
    ) -> torch.Tensor:
        """Stage II."""
        options = self.config.distillation
        temperature_B = distillation_temperature(
            batch.advantage_B,
            rule=options.temperature_rule,
            slope=options.temperature_slope,
            base=options.temperature,
            floor=options.temperature_floor,
            ceiling=options.temperature_ceiling,
        )
        learnt_B = batch.response_mask_BR.any(dim=1)
        sums.add("distillation_temperature", (temperature_B * learnt_B).sum(), learnt_B.sum())
        return distillation_sum(
            logits_BRV,
            teacher_BRV,
            batch.response_mask_BR,
            temperature_B,
            direction=options.direction,
            teacher_top_k=options.teacher_top_k,
            weight_B=batch.failure_B if options.weighting == "failure" else None,
        )

    def _count_routing(
        self, batch: RolloutBatch, record: RoutingRecord, statistics: tuple[RoutingStatistics, ...]
    ) -> None:
        """Choice: load counts every real token, the advantage only those that the response consists of."""
        on_response_BL = torch.cat([torch.zeros_like(batch.prompt_mask_BT), batch.response_mask_BR.long()], dim=1)
        advantage_BL = batch.advantage_B[:, None].expand(on_response_BL.shape)
        for one in statistics:
            one.add(record, batch.counted_mask_BL, advantage_BL, on_response_BL)

    def _rebalance(self, statistics: RoutingStatistics) -> None:
        """Stage IV, where the run moves the bias: the same new one on every rank."""
        if self.balance_options is None:
            return
        totals = statistics.totals()
        self.balance = update_balance(
            self.balance,
            totals.counts_LE,
            totals.value_sum_LE,
            totals.value_count_LE,
            totals.spread_L,
            self.balance_options,
        )
        self._install(self.balance.bias_LE)

    def _biases(self) -> torch.Tensor:
        slot = self._bias_slot
        if not self.student.layers:
            return torch.zeros(0, 0, device=self.student.ranks.device)
        return torch.stack([getattr(router, slot) for router in self.student.routers])

    def _install(self, bias_LE: torch.Tensor) -> None:
        for router, bias_E in zip(self.student.routers, bias_LE, strict=True):
            getattr(router, self._bias_slot).copy_(bias_E)

    @property
    def _uses_aux_loss(self) -> bool:
        return self.config.balance.kind == "aux_loss" and bool(self.student.layers)

    @property
    def _bias_slot(self) -> str:
        return {"selection": "e_score_correction_bias", "logit": "logit_bias"}[self.config.balance.target]
