"""Pages in a real browser, where Debian's Chromium is installed: nothing loaded, no complaint, nothing cut off."""

import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from padd_ds.evaluation.comparison import compare
from padd_ds.report.comparison_page import comparison_page
from padd_ds.report.conversion_page import conversion_page
from padd_ds.report.routing_page import routing_page
from padd_ds.report.runs_page import runs_page
from padd_ds.report.source import read_runs
from tests.evaluation.made_up_results import make_result
from tests.report.made_up_run import make_run, write_lines
from tests.report.test_conversion_page import figures
from tests.report.test_page import report
from tests.report.test_routing_page import analysis

PROGRAMS = [path for name in ("chromium-headless-shell", "chromium") if (path := shutil.which(name))]
WIDTHS = (380, 1280)
"""Pixels, of a phone and of a screen."""
PROBE = (
    "<script>const root = document.documentElement, told = parent.document.documentElement.dataset;"
    "told.beyond = root.scrollWidth - root.clientWidth; told.width = innerWidth</script>"
)
"""Writes down, in the page around it, how far a page is wider than its frame."""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="needs Debian's chromium or chromium-headless-shell")


def problems(html: str, folder: Path, width: int) -> list[str]:
    """What a window of that width shows to be wrong with a page."""
    network = folder / "network.json"
    _, said = browse(html, folder, width, f"--log-net-log={network}")
    asked = re.findall(r'"url":"([^"]*)"', network.read_text(encoding="utf-8"))
    wrong = said + [f"asked for {url}" for url in asked if not url.startswith(("file:", "data:"))]
    # The page itself allows no script, and Chromium's windows are no narrower than 500.
    probed = escape(POLICY.sub("", html) + PROBE)
    frame = f'<!doctype html><iframe width="{width}" height="900" style="border: 0" srcdoc="{probed}"></iframe>'
    root = re.search(r"<html[^>]*>", browse(frame, folder, width + 20)[0])
    assert root is not None and f'data-width="{width}"' in root[0]
    return wrong if 'data-beyond="0"' in root[0] else [*wrong, f"wider than its frame of {width}: {root[0]}"]


def browse(html: str, folder: Path, width: int, *options: str) -> tuple[str, list[str]]:
    """The page as the browser has it in the end, and what stands in the console."""
    page = folder / "page.html"
    page.write_text(html, encoding="utf-8")
    command = [PROGRAMS[0], "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr"]
    command += [*options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every kind of page, of made-up figures."""
    folder = tmp_path_factory.mktemp("pages")
    results = [
        make_result(folder / "teacher.json", "110011", "110011110011", max_new_tokens=100),
        make_result(folder / "student.json", "100111", "110011000000", costs=(50, 120), max_new_tokens=200),
    ]
    return {
        "report": report(folder, make_run(folder / "run")),
        "conversion": conversion_page(figures()),
        "comparison": comparison_page(compare(results)),
        "routing": routing_page(analysis()),
        "runs": runs_page(read_runs([folder / "run", short_run(folder / "short_run")]), compare(results)),
    }


def short_run(folder: Path) -> Path:
    make_run(folder, steps=2)
    write_lines(folder / "metrics.jsonl", [{"step": step, "reward": 0.1 * step} for step in range(2)])
    (folder / "config.yaml").write_text("stage: joint\nmodel: {student: " + "x" * 200 + "}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.slow
def test_pages_need_nothing_and_fit(pages: dict[str, str], tmp_path: Path, width: int) -> None:
    found = {name: problems(html, tmp_path, width) for name, html in pages.items()}
    assert not any(found.values()), found


def test_a_bad_page_is_seen(tmp_path: Path) -> None:
    html = '<!doctype html><p style="width: 700px">x</p><img src="http://127.0.0.1:9/a.png"><script>missing()</script>'
    told = "\n".join(problems(html, tmp_path, WIDTHS[0]))
    assert "missing is not defined" in told and "asked for http://127.0.0.1:9/a.png" in told
    assert "wider than its frame of 380" in told
