"""The plots and numbers of a routing analysis as files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from padd_ds.report.analysis_panels import routing_sections
from padd_ds.report.html import save_panels
from padd_ds.report.routing_page import layer_rows
from padd_ds.report.rows import write_rows


def write_routing_files(folder: Path, routing: Mapping[str, Any]) -> None:
    """Into `folder`: layers.csv, a row per layer; experts.csv, a row per layer and expert, with its share of each
    subject's slots; and a folder `plots`, SVG and PNG."""
    write_rows(folder / "layers.csv", layer_rows(routing))
    write_rows(folder / "experts.csv", _experts(routing))
    save_panels(folder / "plots", [panel for panels in routing_sections(routing).values() for panel in panels])


def _experts(routing: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    shares = {"load_share": routing["headline"]["load_share_by_layer"]}
    if (measured := routing["specialisation"]) is not None:
        shares |= {f"share of {name or 'no subject'}": of for name, of in measured["share_by_subject"].items()}
    for place, layer in enumerate(routing["layers"]):
        for expert in range(routing["experts"]):
            found = {name: share_LE[place][expert] for name, share_LE in shares.items()}
            yield {"layer": layer, "expert": expert, **found}
