"""Forward passes of student and teacher over prompt-and-response batches.

Legend: B responses, L = T + R tokens of prompt and response, R response tokens, V vocabulary.
"""

from typing import Any

import torch


def response_logits(model: Any, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, n_response: int) -> torch.Tensor:
    """[B, R, V]: logits that predict the last `n_response` tokens; the prompt's are never computed."""
    logits_BKV = model(
        input_ids=input_ids_BL,
        attention_mask=mask_BL,
        position_ids=position_ids(mask_BL),
        logits_to_keep=n_response + 1,
        use_cache=False,
    ).logits
    return logits_BKV[:, :-1]


def position_ids(mask_BL: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, as generation counts them behind left padding."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)
