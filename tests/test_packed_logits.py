"""Packed documents are computed as if each stood alone, by every class that trains or teaches."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from padd_ds.data.batches import packed_batch
from padd_ds.engine.ranks import Ranks
from padd_ds.errors import UserError
from padd_ds.hf import keeps_documents_apart, response_logits
from padd_ds.stages.materials import check_borders
from tests.conversion.tiny_teachers import CONFIGS, FAMILY_SETTINGS, SIZES
from tests.tiny import tiny_student

DOCUMENTS = [np.arange(5, 16), np.array([40, 3, 17]), np.array([9, 8]), np.arange(30, 50)]
ROWS = [DOCUMENTS[:3], DOCUMENTS[3:]]
MODELS = ["student", *CONFIGS, "mistral-sliding"]


def make_model(name: str, attention: str):
    if name == "student":
        model = tiny_student()
        model.set_attn_implementation(attention)
        return model
    family, _, sliding = name.partition("-")
    torch.manual_seed(0)
    settings = {**SIZES, **FAMILY_SETTINGS[family]} | ({"sliding_window": 4} if sliding else {})
    return AutoModelForCausalLM.from_config(CONFIGS[family](**settings), attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_packed_document_are_those_of_the_lone_one(name, attention):
    model, batch = make_model(name, attention), packed_batch(ROWS, pad_token_id=0)
    ids_BT, positions_BT = batch["input_ids_BT"], batch["position_ids_BT"]
    with torch.no_grad():
        packed_BRV = response_logits(model, ids_BT, batch["attention_mask_BT"], ids_BT.shape[1] - 1, positions_BT)
        for row, documents in enumerate(ROWS):
            start = 0
            for document in documents:
                lone_TV = model(torch.from_numpy(document)[None]).logits[0]
                found_TV = packed_BRV[row, start : start + len(document)]
                torch.testing.assert_close(found_TV, lone_TV[: len(found_TV)], rtol=1e-5, atol=1e-5)
                start += len(document)
        leaking = model(ids_BT, attention_mask=batch["attention_mask_BT"]).logits
    assert (leaking[0, 12:14] - packed_BRV[0, 12:14]).abs().max() > 1e-2


def test_a_change_in_the_document_before_leaves_the_losses_of_the_next_alone():
    model = tiny_student()

    def losses(first: np.ndarray) -> list[float]:
        batch = packed_batch([[first, DOCUMENTS[3]]], pad_token_id=0)
        ids_BT = batch["input_ids_BT"]
        with torch.no_grad():
            logits_BRV = response_logits(
                model, ids_BT, batch["attention_mask_BT"], ids_BT.shape[1] - 1, batch["position_ids_BT"]
            )
        logprobs_BR = logits_BRV.log_softmax(-1).gather(-1, batch["target_ids_BR"][..., None])[..., 0]
        return logprobs_BR[batch["target_mask_BR"]].tolist()

    before, after = losses(np.array([3, 4, 5, 6])), losses(np.array([50, 60, 5, 7]))
    assert len(before) == 3 + 19
    assert before[3:] == pytest.approx(after[3:], rel=1e-6)
    assert before[:3] != pytest.approx(after[:3], rel=1e-2)


def test_a_class_that_does_not_heed_positions_is_refused():
    model = make_model("llama", "sdpa")
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    check_borders("model.teacher t", model, 260, ranks)

    def heedless(position_ids, **given):
        return model(**given)

    assert not keeps_documents_apart(heedless, 260, ranks.device)
    with pytest.raises(UserError, match=r"model\.teacher t: its class does not keep the packed documents"):
        check_borders("model.teacher t", heedless, 260, ranks)
