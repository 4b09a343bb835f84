"""A run's configuration from defaults, a YAML file, then section.key=value overrides."""

import difflib
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from padd_ds.config.schema import RunConfig
from padd_ds.errors import UserError


def load_run_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read `path`, apply `overrides` ("section.key=value", values in YAML), check everything.

    Raises UserError with file, key, value and remedy on the first thing that is wrong.
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    unknown = unknown_keys(tree, RunConfig)
    if unknown:
        raise UserError(f"{path}: {unknown[0]}")
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error)}") from error


def read_words(schema: type, words: list[str], option: str, keys: Collection[str], base: dict[str, Any]) -> Any:
    """A section from the words KEY=VALUE of a command line's `option`, on top of `base`; only `keys` can be given.

    UserError for another key, and as `load_run_config`.
    """
    tree: dict[str, Any] = {}
    for word in words:
        if "=" not in word:
            raise UserError(f"{option} {word!r} is not of the form KEY=VALUE")
        _apply_override(tree, word)
    for key in tree:
        if key not in keys:
            raise UserError(f"{option}: unknown key {key}{nearest(key, set(keys))}")
    try:
        return TypeAdapter(schema).validate_python(base | tree)
    except ValidationError as error:
        raise UserError(f"{option}: {_describe(error)}") from error


def as_yaml(config: RunConfig) -> str:
    """Every option of a run with its value, in the order of the schema."""
    tree = TypeAdapter(RunConfig).dump_python(config, mode="json")
    # One line for a value: scripts read them.
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10**9)


def read_yaml(path: Path, wanted: str = "a run configuration, for example one of ds_configs/runs/") -> dict[str, Any]:
    """The mapping in a YAML file; UserError if it is missing, unreadable or no mapping."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give {wanted}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of options, found {type(tree).__name__}")
    return tree


def unknown_keys(tree: dict[str, Any], schema: type, prefix: str = "") -> list[str]:
    """A sentence for each key of `tree` that `schema` does not have, with the nearest that it has."""
    hints = get_type_hints(schema)
    known = {field.name for field in fields(schema)}
    problems = []
    for key, value in tree.items():
        if key not in known:
            problems.append(f"unknown key {prefix}{key}{nearest(str(key), known)}")
        elif is_dataclass(hints[key]) and isinstance(value, dict):
            problems += unknown_keys(value, hints[key], f"{prefix}{key}.")
    return problems


def nearest(key: str, known: set[str]) -> str:
    """ "; did you mean X?" or the list of known keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    node: Any = tree
    *parents, leaf = path.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not readable as YAML") from error


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "configuration"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key} is missing; set it in the file or as {key}=VALUE"
    if isinstance(first["input"], dict) or is_dataclass(first["input"]):
        return message if not first["loc"] else f"{key}: {message}"
    return f"{key} = {first['input']!r}: {message[0].lower()}{message[1:]}"
