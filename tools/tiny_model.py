"""A Qwen3 model of toy size with a tokenizer of digits and question words."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIALS = ["<pad>", "<unk>", "<eos>"]
WORDS = [" plus ", " minus ", " times ", " mod ", " is ", "gcd ", "solve ", "next "]
CHARACTERS = list("0123456789abcdefghijklmnopqrstuvwxyz+-*/=<>#?!.,:;() \n")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character or question word; decoding gives the text back unchanged.

    It adds no tokens of its own, and its chat template only joins the messages, with `<eos>` after an answer.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIALS + CHARACTERS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join([*WORDS, r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(
    *,
    hidden_size: int = 32,
    layers: int = 2,
    ffn_size: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    seed: int = 0,
) -> Qwen3ForCausalLM:
    """An untrained Qwen3 model (qk-norm, tied embeddings, fp32) for the vocabulary of `make_tokenizer`."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        intermediate_size=ffn_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=256,
        initializer_range=hidden_size**-0.5 / 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def save_teacher(folder: Path, model: Qwen3ForCausalLM) -> None:
    """Write weights (safetensors), tokenizer and generation config into an existing folder."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
