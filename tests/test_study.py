"""What the documents say that the study found is what its results.json holds; and the labels made by eye."""

import json
import re
from pathlib import Path

import pytest

from hanokdiff.compare.summary import find, summarise

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "docs" / "study"
DOCUMENTS = [ROOT / "README.md", ROOT / "README.ko.md", STUDY / "README.md", STUDY / "README.ko.md"]


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((STUDY / "results.json").read_text("utf-8"))


def test_every_number_is_made_of_the_counts(results):
    """The summary again, from what each training has found."""
    summary = results.pop("summary")
    assert summarise(results) == summary
    results["summary"] = summary
    assert len({c["seed"] for c in results["cells"]}) == 8


@pytest.mark.parametrize("doc", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_tables_of_joint_shares(doc, results):
    """A row `| recipe | 12 % [3, 20] | ...`: 5, 50 and 100 photos, both at once, all prompts."""
    row = r"^\| (LoRA|DreamBooth|Hypernetwork|Textual Inversion) \|(.*%.*)\|$"
    rows = re.findall(row, doc.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 4, rows
    for recipe, cells in rows:
        for photos, cell in zip((5, 50, 100), cells.split("|"), strict=True):
            mean, low, high = find(results["summary"], recipe, photos)["both"]
            said = cell.strip().replace("*", "")
            assert said == f"{100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]", (
                doc.name,
                recipe,
                photos,
            )


def test_labels_by_eye():
    """200 pictures, and how far the judge agrees, as the study says."""
    rows = json.loads((STUDY / "labels" / "labels.json").read_text("utf-8"))
    assert [r["n"] for r in rows] == list(range(1, 201))

    def agree(same) -> float:
        return 100 * sum(map(same, rows)) / len(rows)

    def hanok(r, who):
        return r[who][0] == "hanok"

    def fire(r, who):
        return r[who][1] == "fire"

    shares = (
        agree(lambda r: hanok(r, "eye") == hanok(r, "judge")),
        agree(lambda r: fire(r, "eye") == fire(r, "judge")),
        agree(lambda r: (hanok(r, "eye") and fire(r, "eye")) == (hanok(r, "judge") and fire(r, "judge"))),
    )
    text = (STUDY / "README.md").read_text("utf-8")
    assert "; ".join(f"{s:.1f} %" for s in shares) in text, shares
