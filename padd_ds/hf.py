"""Loading of Hugging Face folders and hub ids, with errors a user can act on, and one way to call a model.

Legend: P prompts, B rows, L = T + R tokens of prompt and response, T prompt tokens, R response tokens, V vocabulary.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from padd_ds.errors import UserError
from padd_ds.files import sha256_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

APART = 1e-3
"""Change of logits over their mean size that rounding may leave between packed documents."""


def read_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """The model config of a folder or hub id; UserError unless it is a causal language model.

    `source` that looks like a path (starts with `.`, `/` or `~`, or exists) must be a folder
    with a `config.json`; anything else is taken as a hub id.
    """
    folder = Path(source).expanduser()
    looks_local = folder.exists() or source.startswith((".", "/", "~"))
    if looks_local and not folder.is_dir():
        raise UserError(f"{source}: no such folder; give a Hugging Face checkpoint folder or a hub id")
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(f"{source}: no config.json in it; give a Hugging Face checkpoint folder")
    location = str(folder) if looks_local else source
    try:
        if looks_local and not isinstance(json.loads((folder / "config.json").read_text(encoding="utf-8")), dict):
            raise ValueError("config.json holds no JSON object")
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"{source}: no readable model config ({_first_line(error)}){offline_remedy(source, error)}"
        ) from error
    architectures = getattr(config, "architectures", None) or []
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal or (architectures and not any("CausalLM" in name or "LMHead" in name for name in architectures)):
        raise UserError(f"{source}: {config.model_type} ({', '.join(architectures)}) is not a causal language model")
    return config


def load_causal_lm(source: str, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model in eval mode on the CPU, from safetensors only."""
    read_config(source, trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(Path(source).expanduser()) if Path(source).expanduser().exists() else source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{source}: its weights cannot be read ({_first_line(error)}){offline_remedy(source, error)}"
        ) from error
    return model.eval()


def load_skeleton(source: str, dtype: torch.dtype) -> Any:
    """The model without its weights, on the meta device: its class, shapes and settings."""
    config = read_config(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Without such a file the model has made its own from the config, as a loaded one does.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(str(Path(source).expanduser()))
    return model.eval()


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id, padded on the left; its pad token falls back to the end token."""
    folder = Path(source).expanduser()
    try:
        location = str(folder) if folder.is_dir() else source
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{source}: no readable tokenizer ({_first_line(error)}){offline_remedy(source, error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{source}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def offline_remedy(source: str, error: Exception) -> str:
    """What to add to a message on `source` that was not found because downloads are off; else nothing."""
    found = not isinstance(error, OSError) or Path(source).expanduser().exists()
    if found or not constants.HF_HUB_OFFLINE:
        return ""
    return f"; HF_HUB_OFFLINE=1 allows no download: run `hf download {source}` before, set it to 0, or give a folder"


def files_hash(source: str, config: Any) -> str:
    """What tells a checkpoint's weights from others': SHA-256 of a folder's files, the commit of a hub id.

    UserError for a folder without safetensors.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return str(config._commit_hash)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UserError(f"{source}: its weights cannot be read (no safetensors)")
    return hashlib.sha256("".join(sha256_of(path) for path in paths).encode()).hexdigest()


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the checkpoint's own and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


def response_logits(
    model: Any,
    input_ids_BL: torch.Tensor,
    mask_BL: torch.Tensor,
    n_response: int,
    positions_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, R, V]: logits that predict the last `n_response` tokens; the prompt's are never computed.

    With `positions_BL` rows are packed: a document begins, and sees nothing of those before it, wherever these start
    again at 0.
    """
    length = input_ids_BL.shape[1]
    return model(
        input_ids=input_ids_BL,
        # transformers finds packed documents by their positions, where there is no mask.
        attention_mask=mask_BL if positions_BL is None else None,
        position_ids=position_ids(mask_BL) if positions_BL is None else positions_BL,
        # Positions, not a number of them: the last one's logits would have to be cut off, and all others copied.
        logits_to_keep=torch.arange(length - n_response - 1, length - 1, device=input_ids_BL.device),
        use_cache=False,
    ).logits


@torch.no_grad()
def keeps_documents_apart(model: Any, vocabulary: int, device: torch.device) -> bool:
    """Whether the logits of a packed document stay as they are when the one before it becomes another.

    Of a dense model in eval mode, which computes both rows alike. Collective where the model's forward pass is.
    """
    first = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    ids_BL = torch.cat([first, torch.arange(10, 16).expand(2, -1)], dim=1).to(device) % vocabulary
    positions_BL = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1).to(device)
    logits_BRV = response_logits(model, ids_BL, torch.ones_like(ids_BL), 5, positions_BL).float()
    one_RV, other_RV = logits_BRV.unbind()
    return bool((one_RV - other_RV).abs().mean() <= APART * one_RV.abs().mean())


def prompt_cache(model: Any, ids_PT: torch.Tensor, mask_PT: torch.Tensor) -> DynamicCache:
    """The model's cache of all tokens of left-padded prompts but the last; of whatever padding there is, too."""
    cache = DynamicCache(config=model.config)
    model.base_model(
        input_ids=ids_PT[:, :-1],
        attention_mask=mask_PT[:, :-1],
        position_ids=position_ids(mask_PT)[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def position_ids(mask_BL: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, as generation counts them behind left padding."""
    return (mask_BL.long().cumsum(-1) - 1).clamp(min=0)


def _first_line(error: Exception) -> str:
    """The first line of its message, with the next where it ends in a colon."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
