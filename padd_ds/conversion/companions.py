"""The files beside a student's weights: tokenizer, generation config, model card."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from padd_ds.conversion.card import CARD_NAME, card_text, code, hub_id, known_as, licence_of
from padd_ds.conversion.options import ConversionOptions, Slicing
from padd_ds.errors import UserError
from padd_ds.hf import load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATE_FOLDER = "additional_chat_templates"
PROBE_TEXT = "Ada's 12+34 = 46?\n\n  naïve \t<x> 東京 ▁"
STUDENT_KEYS = {
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["padd", "moe", "distillation"],
}
"""Front matter of every student's card."""
CARD = """\
A mixture-of-experts student cut out of the dense model {base} by `padd-convert`. It is **not trained yet**:
with all experts active it equals its teacher, with {top_k} of {routed} routed experts it is weaker.

Every FFN of {width} neurons is cut into {experts} slices of {slice_width}: {shared} always on, {routed} routed,
{top_k} of them per token ({active:.0%} of the FFN active). Groups: `{cluster}`; router: `{router}`; seed {seed}.

`padd_conversion.json` holds the figures of the conversion, `padd_targets.safetensors` what the training needs.

## Licence

{licence}"""


def check_tokenizer(teacher: Path, student_config: Any, trust_remote_code: bool) -> None:
    """UserError where `copy_tokenizer` would fail; tried in a folder of its own."""
    with TemporaryDirectory() as folder:
        student_config.save_pretrained(folder)
        copy_tokenizer(teacher, Path(folder), trust_remote_code)


def copy_tokenizer(teacher: Path, student: Path, trust_remote_code: bool) -> None:
    """Copy the tokenizer with its chat template beside the student's config; UserError unless it encodes as before.

    transformers chooses a tokenizer's class by the model type too, which is another one in the student. Where the
    copied files therefore load differently, the tokenizer is saved as it loads with the teacher.
    """
    original = load_tokenizer(str(teacher), trust_remote_code=trust_remote_code)
    for name in TOKENIZER_FILES:
        if (teacher / name).is_file():
            shutil.copyfile(teacher / name, student / name)
    if (teacher / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(teacher / TEMPLATE_FOLDER, student / TEMPLATE_FOLDER, dirs_exist_ok=True)
    _name_tokenizer_class(student, type(original).__name__)
    if _same(original, load_tokenizer(str(student), trust_remote_code=trust_remote_code)):
        return
    original.save_pretrained(student)
    if not _same(original, load_tokenizer(str(student), trust_remote_code=trust_remote_code)):
        raise UserError(f"{teacher}: its tokenizer does not load the same beside a student; give it a tokenizer.json")


def _same(one: Any, other: Any) -> bool:
    encoded = one(PROBE_TEXT)["input_ids"] == other(PROBE_TEXT)["input_ids"]
    return encoded and len(one) == len(other) and one.chat_template == other.chat_template


def _name_tokenizer_class(folder: Path, class_name: str) -> None:
    # Without a name transformers chooses by model type alone.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "tokenizer_class" not in settings:
        settings["tokenizer_class"] = class_name
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_config(source: Path, folder: Path, loaded: GenerationConfig) -> None:
    """The generation config of the folder `source`, as it is there; `loaded` where there is none.

    Never by `save_pretrained`, which refuses some that transformers loads, such as a temperature without do_sample.
    """
    there, path = source / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME
    if there.is_file():
        shutil.copyfile(there, path)
    else:
        path.write_text(loaded.to_json_string(), encoding="utf-8")


def write_card(folder: Path, teacher: Path, options: ConversionOptions, slicing: Slicing) -> None:
    """A short README.md for the student, with the licence of the `teacher` folder, whose text goes along."""
    licence = licence_of([teacher])
    for path in licence.files:
        shutil.copyfile(path, folder / path.name)
    body = CARD.format(
        base=code(known_as(options.teacher)),
        top_k=slicing.top_k,
        routed=slicing.routed,
        width=slicing.width,
        experts=slicing.experts,
        slice_width=slicing.slice_width,
        shared=slicing.shared,
        active=slicing.active_share,
        cluster=options.cluster,
        router=options.router,
        seed=options.seed,
        licence=licence.told(),
    )
    keys = {"base_model": hub_id(str(teacher)) or hub_id(options.teacher), **licence.keys, **STUDENT_KEYS}
    (folder / CARD_NAME).write_text(card_text(keys, options.output.name, [body]), encoding="utf-8")
