"""What model cards are made of, and the card of a conversion."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load

from padd_ds.conversion.card import card_text, code, escaped, front_matter, hub_id, known_as, licence_of, table
from padd_ds.conversion.options import ConversionOptions
from padd_ds.conversion.pipeline import convert

APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_md", ".md")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "keys"),
    [
        ({"README_md": "---\nlicense: mit\ntags: [x]\n---\n# Hi"}, {"license": "mit"}),
        (
            {
                "README_md": "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n",
                "LICENSE": "Llama",
            },
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ({"LICENSE": APACHE, "README_md": "# No front matter"}, {"license": "apache-2.0"}),
        ({"LICENSE": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "Terms of ours"}, {"license": "other", "license_link": "LICENSE"}),
        ({"NOTICE": "made by somebody"}, {}),
        ({"README_md": "---\nlicense: [unclosed\n---\n"}, {}),
        ({"README_md": "---\njust words\n---\n"}, {}),
        ({}, {}),
    ],
)
def test_a_licence_is_what_the_folder_says(tmp_path: Path, files: dict[str, str], keys: dict[str, Any]) -> None:
    found = licence_of([tmp_path / "absent", write(tmp_path / "model", **files)])
    assert found.keys == keys
    assert found.told().startswith("Unknown" if not keys else "That of the model")


def test_the_first_folder_that_names_a_licence_counts_with_its_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a", README_md="# nothing")
    second = write(tmp_path / "b", README_md="---\nlicense: mit\n---\n", LICENSE="MIT License", NOTICE="n")
    third = write(tmp_path / "c", LICENSE=APACHE)
    found = licence_of([first, second, third])
    assert found.keys == {"license": "mit"} and [path.name for path in found.files] == ["LICENSE", "NOTICE"]


def test_a_hub_id_is_one_that_the_cache_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--Owner--Model-1.5").mkdir()
    (tmp_path / "datasets--openai--gsm8k").mkdir()
    assert hub_id("Owner/Model-1.5") == "Owner/Model-1.5"
    assert hub_id(f"{tmp_path}/models--Owner--Model-1.5/snapshots/abc") == "Owner/Model-1.5"
    assert hub_id("openai/gsm8k:main", "dataset") == "openai/gsm8k"
    assert hub_id("students/joint") is None and known_as("/home/me/students/joint") == "joint"


def test_whatever_a_name_holds_stays_text(tmp_path: Path) -> None:
    assert code("a`b\n|c") == "`` a`b |c ``" and code("<script>") == "`<script>`"
    assert escaped("# <b>_x_|") == r"\# \<b\>\_x\_\|"
    assert table({"name": code("a|b")}).endswith("| name | `a\\|b` |")
    keys = {"base_model": "a: [b]\n---\nc", "tags": ["x: y", "#z"], "datasets": [], "license": None}
    path = tmp_path / "README.md"
    path.write_text(card_text(keys, "<i>", ["text"]), encoding="utf-8")
    assert metadata_load(path) == front_matter(path) == {"base_model": "a: [b]\n---\nc", "tags": ["x: y", "#z"]}
    assert path.read_text(encoding="utf-8").endswith("---\n# \\<i\\>\n\ntext\n")


def test_a_converted_student_has_a_card_with_its_teachers_licence(tmp_path: Path, llama_teacher: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in llama_teacher.iterdir():
        (teacher / path.name).symlink_to(path)
    write(teacher, README_md="---\nlicense: gemma\n---\n", LICENSE="Terms")
    options = {"experts": 8, "top_k": 4, "cluster": "random", "router": "random"}
    convert(ConversionOptions(teacher=str(teacher), output=tmp_path / "student", **options))
    card = front_matter(tmp_path / "student" / "README.md")
    assert card == {
        "license": "gemma",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["padd", "moe", "distillation"],
    }
    assert (tmp_path / "student" / "LICENSE").read_text() == "Terms"
    assert "cut out of the dense model `teacher`" in (tmp_path / "student" / "README.md").read_text()
