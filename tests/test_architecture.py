"""Imports point down, deepspeed has one importer, and the configuration stays light."""

import ast
from pathlib import Path

import pytest

# From bottom to top: a package may import those of its own line and of the lines before it.
LAYERS = [
    {"errors", "files", "launcher", "seeds"},
    {"config"},
    {"losses", "moe"},
    {"data", "hf"},
    {"offline", "planning"},
    {"conversion"},
    {"checkpoint"},
    {"rollout"},
    {"engine"},
    {"stages"},
    {"run", "evaluation", "report"},
    {"train", "convert", "evaluate", "export", "cache", "plan", "serve"},
]
LIGHT = {"errors", "files", "launcher", "config"}
HEAVY_MODULES = {"torch", "transformers", "deepspeed", "datasets"}


def sources(repository: Path) -> list[Path]:
    return sorted((repository / "padd_ds").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every absolute module name that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def package_of(path: Path, repository: Path) -> str:
    return path.relative_to(repository / "padd_ds").parts[0].removesuffix(".py")


def level(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def test_imports_point_down(repository: Path) -> None:
    wrong = []
    for path in sources(repository):
        package = package_of(path, repository)
        if package == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "padd_ds" and len(parts) > 1 and level(parts[1]) > level(package):
                wrong.append(f"{path.relative_to(repository)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_engine_imports_deepspeed(repository: Path) -> None:
    importers = {
        package_of(path, repository)
        for path in sources(repository)
        if any(name.split(".")[0] == "deepspeed" for name in imported(path))
    }
    assert importers == {"engine"}


def test_config_and_errors_import_nothing_heavy(repository: Path) -> None:
    for path in sources(repository):
        if package_of(path, repository) in LIGHT:
            assert not {name.split(".")[0] for name in imported(path)} & HEAVY_MODULES, path


@pytest.mark.parametrize("word", ["from utils", "import utils"])
def test_there_is_no_utils(repository: Path, word: str) -> None:
    assert not [
        path for path in sources(repository) if path.stem == "utils" or word in path.read_text(encoding="utf-8")
    ]
