"""The teacher on prompts that it read once."""

import torch

from padd_ds.hf import response_logits
from padd_ds.rollout.batch import RolloutBatch
from padd_ds.stages.teacher import TeacherOnPrompts
from tools.tiny_model import make_tiny_model, make_tokenizer

PROMPTS = ("7", "1+2=", "1+2+3+4=", "9-")


def rollout(group_size: int) -> RolloutBatch:
    """Prompts and responses of several lengths, one prompt of a single token and one response without any."""
    tokenizer = make_tokenizer()
    encoded = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    generator = torch.Generator().manual_seed(0)
    n_responses = len(PROMPTS) * group_size
    ids_BR = torch.randint(4, 10, (n_responses, 6), generator=generator)
    length_B = torch.arange(n_responses) % 7
    return RolloutBatch(
        prompt_ids_BT=encoded["input_ids"].repeat_interleave(group_size, dim=0),
        prompt_mask_BT=encoded["attention_mask"].repeat_interleave(group_size, dim=0),
        response_ids_BR=ids_BR,
        response_mask_BR=torch.arange(6) < length_B[:, None],
        advantage_B=torch.zeros(n_responses),
        failure_B=torch.zeros(n_responses),
    )


def test_logits_are_those_of_prompt_and_response_in_one_pass() -> None:
    teacher, batch = make_tiny_model().eval(), rollout(group_size=3)
    read = TeacherOnPrompts.read(teacher, batch, 3)
    for rows in torch.tensor([11, 4, 0, 1, 8, 6, 2, 10, 3, 5, 7, 9]).split(5):
        chosen = batch.rows(rows)
        n_response = chosen.response_ids_BR.shape[1]
        with torch.no_grad():
            expected_BRV = response_logits(teacher, chosen.input_ids_BL, chosen.attention_mask_BL, n_response)
        found_BRV = read.logits(chosen, rows // 3)
        mask_BR = chosen.response_mask_BR
        assert mask_BR.any() and found_BRV.shape == expected_BRV.shape
        torch.testing.assert_close(found_BRV[mask_BR], expected_BRV[mask_BR], rtol=1e-5, atol=1e-5)
        assert found_BRV.isfinite().all() and not found_BRV.requires_grad


def test_what_was_read_stays_as_it_was() -> None:
    teacher, batch = make_tiny_model().eval(), rollout(group_size=2)
    read, rows = TeacherOnPrompts.read(teacher, batch, 2), torch.arange(8)
    first = read.logits(batch.rows(rows), rows // 2)
    assert torch.equal(read.logits(batch.rows(rows), rows // 2), first)
