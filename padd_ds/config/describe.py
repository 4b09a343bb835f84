"""The list of all options, made from the schema itself."""

from typing import Any

from pydantic import TypeAdapter

from padd_ds.config.schema import RunConfig


def describe_options() -> str:
    """One line per option: key, default, type or choices, meaning."""
    schema = TypeAdapter(RunConfig).json_schema()
    return "\n".join(_lines(schema, schema.get("$defs", {}), ""))


def _lines(node: dict[str, Any], definitions: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    required = set(node.get("required", []))
    for name, entry in node["properties"].items():
        reference = entry.get("$ref") or next((part["$ref"] for part in entry.get("allOf", []) if "$ref" in part), None)
        if reference is not None:
            lines += _lines(definitions[reference.split("/")[-1]], definitions, f"{prefix}{name}.")
            continue
        default = "required" if name in required else f"default {entry.get('default', '(see text)')}"
        meaning = " ".join(entry.get("description", "").split())
        lines.append(f"{prefix}{name} [{_kind(entry)}; {default}] {meaning}")
    return lines


def _kind(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return " | ".join(map(str, entry["enum"]))
    if "const" in entry:
        return str(entry["const"])
    if "anyOf" in entry:
        return " or ".join(_kind(part) for part in entry["anyOf"])
    return str(entry.get("type", "any"))
