"""Pages of runs in a browser without a window: no error, no missing picture, none too wide."""

import json
import re
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest

from dhp_jax.report import __main__ as report_main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]
# Looks at the page from within, once all of it is there, and tells the frame that it stands in.
LOOK = """<script>addEventListener("load", () => {
  const svgs = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    images: images.length,
    broken: images.filter(i => !i.complete || !i.naturalWidth || !i.clientWidth).length,
    drawings: svgs.length,
    empty: svgs.filter(box => box.width < 100 || box.height < 20).length,
    fetched: performance.getEntriesByType("resource").map(r => r.name)
             .filter(name => !name.startsWith("data:")),
    screen: innerWidth,
    page: document.documentElement.scrollWidth,
  }), "*");
});</script>"""
# A window cannot be as narrow as a phone; a frame can.
FRAME = """<body><iframe src="shown.html" style="width:{}px;height:1000px;border:0"></iframe>
<script>addEventListener("message", told => document.body.dataset.seen = told.data)</script>"""


@pytest.fixture
def browse(tmp_path):
    """Opens a page in a window of some width; returns what was seen there, and complaints."""

    def open_page(path, width, look=True):
        shown = path
        if look:
            content = path.read_text().replace("default-src 'none'", "script-src 'unsafe-inline'")
            content = content.replace("</head>", LOOK + "</head>")
            (tmp_path / "shown.html").write_text(content)
            shown = tmp_path / "frame.html"
            shown.write_text(FRAME.format(width))
        done = subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
                *("--enable-logging=stderr", f"--window-size={width + 100},1100"),
                "--virtual-time-budget=5000",
                *(f"--user-data-dir={tmp_path / 'profile'}", shown.as_uri()),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        seen = re.search(r'<body data-seen="([^"]*)"', done.stdout)
        return json.loads(seen[1].replace("&quot;", '"')) if seen else None, complaints

    return open_page


@pytest.fixture
def pictured(finished, tmp_path):
    """A run that has left pictures, as of restoration."""
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("cat", "dog"):
        (run / "pictures" / name).mkdir(parents=True)
        for what in ("input", "output", "target"):
            image = np.random.default_rng(0).integers(0, 256, (120, 130), np.uint8)
            Image.fromarray(image).save(run / "pictures" / name / f"{what}.png")
    report_main.main([str(run)])
    return run / "report.html"


@pytest.fixture
def unfinished(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("model", "best", "pruned", "search"):
        shutil.rmtree(run / name)
    report_main.main([str(run)])
    return run / "report.html"


@pytest.fixture
def compared(finished, tmp_path):
    report_main.main([str(finished), str(finished), f"--out={tmp_path / 'compare.html'}"])
    return tmp_path / "compare.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    ("page", "images", "drawings"),
    [("pictured", 6, 7), ("unfinished", 0, 5), ("compared", 0, 5)],
)
def test_a_page_opens_without_errors_and_with_all_its_pictures(
    request, browse, page, images, drawings, width
):
    path = request.getfixturevalue(page)
    seen, complaints = browse(path, width)
    assert not complaints
    assert (seen["images"], seen["broken"]) == (images, 0)
    assert (seen["drawings"], seen["empty"]) == (drawings, 0)
    assert seen["fetched"] == []
    assert seen["screen"] == width
    assert seen["page"] <= width
    assert browse(path, width, look=False)[1] == []


def test_a_page_with_an_error_and_a_missing_picture_would_be_noticed(browse, tmp_path):
    path = tmp_path / "broken.html"
    path.write_text(
        "<html><head></head><body><img src='gone.png'><script>nobody()</script></body></html>"
    )
    seen, complaints = browse(path, 390)
    assert (seen["images"], seen["broken"]) == (1, 1)
    assert any("nobody is not defined" in line for line in complaints)
