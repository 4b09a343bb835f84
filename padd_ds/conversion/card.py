"""What model cards are made of: front matter of the Hub, safe Markdown, the licence in a model's folder."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

CARD_NAME = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
LICENCE_KEYS = ("license", "license_name", "license_link")
KNOWN_TEXTS = {"Apache License Version 2.0": "apache-2.0", "MIT License": "mit"}
"""How a licence's text begins, and its name on the Hub."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Licence:
    """The licence that a model's folder states."""

    keys: Mapping[str, Any]
    """Those of LICENCE_KEYS that are known."""
    files: tuple[Path, ...]
    """Its text, and notices that have to go along."""

    def told(self) -> str:
        """A sentence for the card."""
        if not self.keys:
            return "Unknown: neither the card nor a licence file of the model that it was made from names one."
        name = self.keys.get("license_name", self.keys["license"])
        texts = ", ".join(code(path.name) for path in self.files)
        return f"That of the model it was made from: {code(name)}{f' ({texts})' if texts else ''}."


def licence_of(folders: Iterable[Path]) -> Licence:
    """The licence of the first folder that names one, in its card's front matter or by a licence file; else no keys.

    A text that is not in KNOWN_TEXTS is called `other`, with the file's name as its link.
    """
    for folder in folders:
        files = tuple(sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()}))
        card = front_matter(folder / CARD_NAME)
        keys = {name: card[name] for name in LICENCE_KEYS if name in card}
        texts = [path for path in files if not path.name.startswith("NOTICE")]
        if "license" in keys:
            return Licence(keys=keys, files=files)
        if texts:
            return Licence(keys=_keys_of_text(texts[0]), files=files)
    return Licence(keys={}, files=())


def _keys_of_text(path: Path) -> dict[str, str]:
    beginning = " ".join(path.read_text(encoding="utf-8", errors="replace")[:400].split())
    known = [name for title, name in KNOWN_TEXTS.items() if beginning.startswith(title)]
    return {"license": known[0]} if known else {"license": "other", "license_link": path.name}


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML that a card begins with; empty where there is no card, or none that can be read in it."""
    found = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    try:
        tree = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # somebody else's card, which nothing depends on
        return {}
    return tree if isinstance(tree, dict) else {}


def hub_id(source: str, kind: str = "model") -> str | None:
    """`owner/name` if `source` is one that the local cache of the Hub holds, or a snapshot there; None otherwise.

    A relative path looks the same as a hub id, so that its form alone does not tell.
    """
    snapshot = _SNAPSHOT.search(source) if "snapshots" in Path(source).parts else None
    if snapshot is not None:
        return f"{snapshot[1]}/{snapshot[2]}"
    name = source.partition(":")[0]
    if not _HUB_ID.fullmatch(name) or Path(source).exists():
        return None
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    return name if cached.is_dir() else None


def known_as(source: str, kind: str = "model") -> str:
    """What `source` is called where its folders mean nothing: its hub id, else the last part of its path."""
    return hub_id(source, kind) or Path(source).name


def card_text(keys: Mapping[str, Any], title: str, body: Iterable[str]) -> str:
    """A card: front matter of those keys that have a value, title, paragraphs."""
    told = {name: value for name, value in keys.items() if value}
    head = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000)
    return "\n\n".join([f"---\n{head}---\n# {escaped(title)}", *body]) + "\n"


def table(rows: Mapping[str, str]) -> str:
    """Two columns without a heading; values are Markdown."""
    cells = [(name, value.replace("|", "\\|")) for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def escaped(text: str) -> str:
    """One line that Markdown shows as it stands."""
    return re.sub(r"([\\`*_\[\]<>&#|~$])", r"\\\1", " ".join(text.split()))


def code(value: object) -> str:
    """One line in a code span, whatever is in it."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"
