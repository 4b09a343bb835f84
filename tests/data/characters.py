"""A tokenizer with one token per character, for tests."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>")
VOCABULARY = (*SPECIAL, *string.printable)
CHAT_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def character_tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 are pad, end and begin; `bos` puts the begin token before plain text."""
    model = models.WordLevel({token: place for place, token in enumerate(VOCABULARY)}, unk_token="?")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    pad, eos, begin = SPECIAL
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        bos_token=begin,
        clean_up_tokenization_spaces=False,
    )
    fast.padding_side = "left"
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast
