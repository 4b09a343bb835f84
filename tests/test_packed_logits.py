"""Packed documents are computed as if each stood alone, by every class that trains or teaches."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from padd_ds.data.batches import packed_batch
from padd_ds.hf import response_logits
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
