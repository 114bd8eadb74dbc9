"""A run's page and its log as a table; and, where there is a browser, how pages look in it."""

import csv
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import train_hypernet
from hanokdiff import chart
from hanokdiff.training import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 20 steps with two previews and held-out photos."""
    home = tmp_path_factory.mktemp("page")
    argv = (
        "--steps 20 --batch-size 2 --images 5 --held-out 2 --preview-every 10 --class-images 0 --device cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert train_hypernet.main([*argv.split(), "--out", "run <1>"]) == 0
    return home / "run <1>"


def test_the_page_holds_the_run(run):
    html = (run / "index.html").read_text("utf-8")
    whole = ElementTree.fromstring(html)  # raises if a tag is left open
    words = " ".join("".join(whole.itertext()).split())
    assert "Finished: step 20 of 20" in words and 'http-equiv="refresh"' not in html
    assert "http://" not in html and "https://" not in html and "@import" not in html
    images = [e for e in whole.iter("img")]
    assert [e.get("alt") for e in images][:2] == ["step 10", "step 20"] and len(images) == 3
    assert all(e.get("src").startswith("data:image/png;base64,") for e in images)
    assert len(list(whole.iter("svg"))) == 4  # loss, rate, norm, |f(x)| / |x|
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert f"--hypernet {run.name}/hypernet.pt" in words and "--n 8 --grid" in words
    for option in ("learning rate", "class_images", "a picture of *"):
        assert option in words or option.replace("_", " ") in words
    rows = list(csv.DictReader((run / "log.csv").read_text("utf-8").splitlines()))
    assert [int(r["step"]) for r in rows] == sorted({r["step"] for r in log})
    for row in log:
        there = next(r for r in rows if int(r["step"]) == row["step"])
        assert all(there[k] == str(v) for k, v in row.items() if v is not None)


def test_a_page_under_way_reloads_itself(run, tmp_path):
    """Before the artefact is there, and whatever a kill left of the log."""
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "hypernet.pt").unlink()
    with open(copy / "log.jsonl", "a") as f:
        f.write('{"step": 30, "lo')
    page.write(copy, "hypernet.pt", None, ["a", "a"])
    html = (copy / "index.html").read_text("utf-8")
    assert "Under way: step 20 of 20" in html and 'http-equiv="refresh"' in html
    assert "What to do with it" not in html


@pytest.mark.parametrize("wide", [390, 1280])
def test_in_a_browser(run, tmp_path, wide):
    """No overflow of the page itself, no broken picture, no error in the console; a click enlarges."""
    if not BROWSER:
        pytest.skip("no browser here: chromium or google-chrome")
    made = chart.Page("x" * 200)
    made.table([f"column {i}" for i in range(30)], [["a long cell of a table " * 3] * 30])
    made.embed(Image.new("RGB", (1500, 400), "red"), "a picture")
    made.svg(chart.lines(["a"], [[(0, 1), (1, 2)]], "x", "y"), "a chart")
    made.code("python sample.py " * 30)
    probe = """<script>window.onload = function () {
      var d = document.documentElement, image = document.querySelector("img"), before = image.width;
      var broken = [...document.images].filter(function (i) { return !i.naturalWidth; }).length;
      image.click();
      document.title = ["found", d.scrollWidth <= d.clientWidth, broken, image.width > before].join(" ");
    };</script></body>"""
    for k, html in enumerate((made.html(), (run / "index.html").read_text("utf-8"))):
        file = tmp_path / f"{k}.html"
        file.write_text(html.replace("</body>", probe), "utf-8")
        argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={wide},900"]
        argv += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
        argv += [file.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        fits, broken, larger = re.search(r"<title>found (\w+) (\d+) (\w+)</title>", done.stdout).groups()
        assert (fits, broken) == ("true", "0") and (larger == "true" or k), (fits, broken, larger)
        assert "CONSOLE" not in done.stderr, done.stderr


def test_a_name_from_a_file_is_text():
    assert "<b>" not in chart.Page("<b>").html()


def test_a_sheet_of_many_columns_goes_on_below(tmp_path):
    """Of 9 columns and 2 rows the last picture stands under the second one's, two blocks down."""
    paths = []
    for n in range(18):
        Image.new("RGB", (8, 8), (10 * n, 0, 0)).save(tmp_path / f"{n}.png")
        paths.append([tmp_path / f"{n}.png"])
    columns = [str(n) for n in range(9)]
    image = np.asarray(chart.sheet([paths[:9], paths[9:]], ["5", "50"], columns))
    one = np.asarray(chart.sheet([paths[:7], paths[9:16]], ["5", "50"], columns[:7]))
    assert image.shape == (2 * one.shape[0], *one.shape[1:])
    pictures = np.where(image[..., 3] == 255, image[..., 0], 1)
    reds = {n: np.argwhere(pictures == 10 * n).min(axis=0) for n in range(1, 18)}
    assert list(reds[17] - reds[10]) == list(np.array([one.shape[0], 0]))
    assert reds[8][0] == reds[1][0] + one.shape[0] and reds[10][0] > reds[1][0]
    assert (image[: one.shape[0]] == one).all()
