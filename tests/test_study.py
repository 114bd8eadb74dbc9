"""What the documents say that the study found is what its results.json holds; and the labels made by eye."""

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hanokdiff.compare import recipes
from hanokdiff.compare.sections import each, percent, points
from hanokdiff.compare.summary import find, set_shares, summarise
from hanokdiff.scoring.stats import holm, sign_flip

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "docs" / "study"
DOCUMENTS = [ROOT / "README.md", ROOT / "README.ko.md", STUDY / "README.md", STUDY / "README.ko.md"]


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((STUDY / "results.json").read_text("utf-8"))


def parts(summary: dict, recipe: str, photos: int) -> list[str]:
    """Percent of a hanok, of fire, and of a hanok by the word alone."""
    row, word = (find(summary, recipe, photos, question) for question in ("all", "word"))
    return [f"{100 * v[0]:.0f}" for v in (row["subject"], row["wanted"], word["subject"])]


def test_every_number_is_made_of_the_counts(results):
    """The summary again, from what each training has found."""
    summary = results.pop("summary")
    assert summarise(results) == summary
    results["summary"] = summary
    assert len({c["seed"] for c in results["cells"]}) == 8


@pytest.mark.parametrize("doc", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_tables_of_joint_shares(doc, results):
    """A row `| recipe | 12 % [3, 20] | ...`: 5, 50 and 100 photos, both at once, all prompts."""
    row = r"^\| (LoRA|DreamBooth|Hypernetwork|Textual Inversion) \|((?:[^|]*% \[[^|]*\|){3})$"
    rows = re.findall(row, doc.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 4, rows
    for recipe, cells in rows:
        for photos, cell in zip((5, 50, 100), cells.split("|")[:3], strict=True):
            mean, low, high = find(results["summary"], recipe, photos)["both"]
            said = cell.strip().replace("*", "")
            found = f"{100 * mean:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
            assert said == found, (doc.name, recipe, photos)


@pytest.mark.parametrize("doc", DOCUMENTS[:2], ids=lambda d: d.name)
def test_sentences_of_the_front_page(doc, results):
    """What stands below the table: shares, differences, failed trainings, the paper's recipes."""
    summary, text = results["summary"], re.sub(r"\s+", " ", doc.read_text("utf-8"))
    shares = {(name, n): find(summary, name, n) for name in recipes.BEST for n in (5, 50, 100)}
    lora = shares["LoRA", 50]["both"][0]
    assert re.search(rf"{100 * lora:.0f} % of its pictures|이미지의 {100 * lora:.0f} %", text)
    pair = summary["tests"]["recipes at 50 photos"]
    mean, low, high = (100 * v for v in pair[0]["difference"])
    assert re.search(rf"{mean:.0f} (points|%p) \[{low:.0f}, {high:.0f}\]", text)
    assert {f"{test['p_holm']:.3f}" for test in pair} == {"0.047"} and "p 0.047" in text
    assert all(test["p_holm"] > 0.05 for test in summary["tests"]["number of photos"])
    five = [round(100 * v) for v in shares["LoRA", 5]["both_each"]]
    assert re.search(rf"{min(five)}( to |~){max(five)} %", text)
    failed = {name: sum(shares[name, n]["failures"][0] for n in (5, 50, 100)) for name in recipes.BEST[:2]}
    assert failed == {"LoRA": 0, "DreamBooth": 2}
    worst = sorted(round(100 * v) for n in (5, 50, 100) for v in shares["DreamBooth", n]["both_each"])[:2]
    assert re.search(rf"{worst[0]}( and | %와 ){worst[1]} %", text)
    paper = json.loads((STUDY / "paper.json").read_text("utf-8"))["summary"]
    names = ("Hypernetwork 2023", "Textual Inversion 2023")
    low, high = (round(100 * find(paper, name, 50)["both"][0]) for name in names)
    assert re.search(rf"{low}( and | %와 ){high} %", text)


@pytest.mark.parametrize("doc", DOCUMENTS[2:], ids=lambda d: d.name)
def test_one_switch_at_a_time(doc):
    """Every row of the two tables of that section, from the counts of factorial.json; what README says."""
    results = json.loads((STUDY / "factorial.json").read_text("utf-8"))
    summary = results.pop("summary")
    assert summarise(results) == summary
    text, readme = doc.read_text("utf-8"), DOCUMENTS[DOCUMENTS.index(doc) - 2].read_text("utf-8")
    for name in {*recipes.PRESETS["factorial"][0]} - {"Textual Inversion"}:
        row = find(summary, name, 50)
        cells = [name, percent(row["both"]), each(row["both_each"]), *parts(summary, name, 50)]
        assert f"| {' | '.join(cells)} |" in text, cells
    asked = {test["question"]: test for test in summary["tests"]["switches"]}
    for question, test in asked.items():
        p = [f"{test['p']:.4f}", f"{test['p_holm']:.3f}"]
        cells = [question, points(test["difference"]), each(test["each"]), *p]
        assert f"| {' | '.join(cells)} |" in text, cells
        mean, low, high = (f"{100 * v:.0f}" for v in test["difference"])
        assert re.search(rf"{mean}( points| %p)?\s*\[{low}, {high}\]", readme), question
    assert [q for q, test in asked.items() if test["p_holm"] > 0.05] == ["text encoder"]
    assert {f"{t['p_holm']:.3f}" for t in asked.values()} == {"0.031", "0.875"} and "p 0.031" in readme


@pytest.mark.parametrize("doc", DOCUMENTS[2:], ids=lambda d: d.name)
def test_switches_asked_three_times(doc):
    """Holm over all nine tests that the study made of these questions: those of one pair of recipes, of LoRA
    with 350 steps (LOG 26) and 175 (31), of DreamBooth once, and those over several pairs."""
    results = json.loads((STUDY / "factorial.json").read_text("utf-8"))
    now = [test["p"] for test in results["summary"]["tests"]["switches"]]

    def pair(*names: str) -> float:
        a, b = (set_shares(results, name, 50) for name in names)
        return sign_flip([round(a[seed] - b[seed], 6) for seed in a])[0]

    one = [
        pair("LoRA u+text", "LoRA u"),
        pair("LoRA u+class", "LoRA u"),
        pair("DreamBooth", "DreamBooth, no class"),
    ]
    assert [f"{p:.4f}" for p in one] == ["1.0000", "0.0156", "0.1797"]
    text, _, harm, helps, word = doc.read_text("utf-8"), *holm([*now, *one, 0.0469, 0.6094])[:4]
    assert f"{harm:.3f}" == f"{word:.3f}" == "0.070" and f"{helps:.3f}" == "0.109"
    assert "0.070" in text and "0.109" in text


@pytest.mark.parametrize("doc", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_pairs_without_a_test(doc):
    """Differences that the documents read off the tables, from the same counts."""
    counts = [json.loads((STUDY / f"{name}.json").read_text("utf-8")) for name in ("factorial", "paper")]
    shares = {
        name: np.array(list(found.values()))
        for results in counts
        for name in results["settings"]["recipes"]
        if (found := set_shares(results, name, 50))
    }
    text = re.sub(r"\s+", " ", doc.read_text("utf-8"))
    for name in ("LoRA u", "LoRA u+word+class", "LoRA 2023"):
        assert f"{100 * shares[name].mean():.0f} %" in text
    layers = shares["LoRA u"] - shares["LoRA 2023"]
    assert layers.min() > 0
    if doc in DOCUMENTS[2:]:
        pairs = [("u+class", "u+text+class"), ("u+neutral", "u+text+neutral"), ("u+word+class", "")]
        gains = [shares[f"LoRA {b}".strip()] - shares[f"LoRA {a}"] for a, b in pairs]
        assert gains[1].min() > 0
        said = [f"{100 * gain.mean():+.0f}" for gain in gains]
        assert re.search(rf"\{said[0]}, \{said[1]}.*?\{said[2]}", text), said


def test_what_fails(results):
    """Hanok without fire, fire without hanok: of all that is not right, and of DreamBooth's."""
    text = re.sub(r"\s+", " ", (STUDY / "README.md").read_text("utf-8"))

    def failed(of, sizes) -> tuple[int, int, int]:
        cells = [c for c in results["cells"] if c["recipe"] in of and c["photos"] in sizes]
        found = [c["found"][key] for c in cells for key in "ABC"]
        both, n = (sum(f[name] for f in found) for name in ("both", "pictures"))
        return n - both, sum(f["subject"] for f in found) - both, sum(f["wanted"] for f in found) - both

    all_, hanok, fire = failed(recipes.BEST, (5, 50, 100))
    assert f"{all_:,} pictures that are not right" in text
    assert f"in {100 * fire / all_:.0f} % something else burns, and in {100 * hanok / all_:.0f} %" in text
    five, fifty, hundred = (failed(["DreamBooth"], [n])[1:] for n in (5, 50, 100))
    assert f"({five[0]} and {hundred[0]} pictures, against {five[1]} and {hundred[1]} without" in text
    assert f"as often the hanok ({fifty[0]} and {fifty[1]})" in text


@pytest.mark.parametrize("doc", DOCUMENTS[2:], ids=lambda d: d.name)
def test_as_the_paper_describes_them(doc):
    """The table of the paper's recipes; DreamBooth ahead of each of the others, these not of each other."""
    results = json.loads((STUDY / "paper.json").read_text("utf-8"))
    summary = results.pop("summary")
    assert summarise(results) == summary
    text, readme = doc.read_text("utf-8"), DOCUMENTS[DOCUMENTS.index(doc) - 2].read_text("utf-8")
    readme = re.sub(r"\s+", " ", readme)
    for name in recipes.PRESETS["paper"][0]:
        rows = {n: find(summary, name, n) for n in (5, 50, 100)}
        assert f"| {' | '.join([name, *(percent(row['both']) for row in rows.values())])} |" in text, name
        for n, row in rows.items():
            cells = [f"{name}, {n}", each(row["both_each"]), *parts(summary, name, n)]
            assert f"| {' | '.join(cells)} |" in text, cells
        if name in ("LoRA 2023", "DreamBooth 2023"):
            assert percent(rows[50]["both"]) in readme
    ahead = []
    for n in (5, 100):
        shares = {name: find(summary, name, n)["both"][0] for name in recipes.PRESETS["paper"][0]}
        first = shares.pop("DreamBooth 2023")
        ahead += [round(100 * (first - share)) for share in shares.values()]
    assert re.search(rf"{min(ahead)}( to |~){max(ahead)} (points|%p)", text)
    for test in summary["tests"]["number of photos"]:
        assert test["p_holm"] > 0.05 and points(test["difference"]) in text and f"{test['p']:.2f}" in text
    for test in summary["tests"]["recipes at 50 photos"]:
        assert (test["p_holm"] < 0.05) == ("DreamBooth" in test["question"]), test


@pytest.mark.parametrize("doc", DOCUMENTS[2:], ids=lambda d: d.name)
def test_strengths(doc):
    """Every row of the table from the counts of frontier.json; each recipe is best at full strength."""
    results = json.loads((STUDY / "frontier.json").read_text("utf-8"))
    summary, text = results.pop("summary"), doc.read_text("utf-8")
    assert summarise(results) == summary
    at = {(r["recipe"], r["strength"], r["question"]): r for r in summary["rows"] if r["photos"]}
    for recipe in recipes.PRESETS["frontier"][0]:
        for strength in (0.4, 0.7, 1):
            asked, row = (at[recipe, strength, question] for question in ("development", "all"))
            shares = [f"{100 * row[name][0]:.0f}" for name in ("subject", "wanted")]
            cells = [recipe, f"{strength:g}", percent(asked["both"]), percent(row["both"])]
            cells += [each(row["both_each"]), *shares]
            assert f"| {' | '.join(cells)} |" in text, cells
            if recipe != "Hypernetwork plain" and strength < 1:
                assert row["wanted"][0] >= 0.975
    assert {best["strength"] for best in summary["best_points"]} == {1}


@pytest.mark.parametrize("doc", DOCUMENTS[2:], ids=lambda d: d.name)
def test_at_equal_passes(doc):
    """The table of seconds and shares, of one set."""
    results = json.loads((STUDY / "epochs.json").read_text("utf-8"))
    times = {(c["recipe"], c["photos"]): c["times"]["training"] for c in results["cells"]}
    for name in recipes.BEST:
        shares = {n: find(results["summary"], name, n)["both"][0] for n in (5, 50, 100)}
        cells = [f"{times[name, n]:.0f} s, {100 * share:.0f} %" for n, share in shares.items()]
        assert f"| {name} | {' | '.join(cells)} |" in doc.read_text("utf-8"), cells
        assert times[name, 5] < times[name, 50] < times[name, 100]


def test_labels_by_eye():
    """200 pictures, and how far the judge agrees, as the study says."""
    rows = json.loads((STUDY / "labels" / "labels.json").read_text("utf-8"))
    assert [r["n"] for r in rows] == list(range(1, 201))

    def agree(same) -> float:
        return 100 * sum(map(same, rows)) / len(rows)

    def of(what):
        return agree(lambda r: what(*r["eye"]) == what(*r["judge"]))

    hanok, fire = of(lambda kind, _: kind == "hanok"), of(lambda _, condition: condition == "fire")
    shares = hanok, fire, of(lambda kind, condition: (kind, condition) == ("hanok", "fire"))
    text = (STUDY / "README.md").read_text("utf-8")
    assert "; ".join(f"{s:.1f} %" for s in shares) in text, shares


def test_a_second_judge():
    """What the study and the LOG say of another judge, from the counts of both."""
    rows = json.loads((STUDY / "judges.json").read_text("utf-8"))

    def shares(of: list[dict]) -> list[float]:
        n = sum(r["pictures"] for r in of)
        return [100 * sum(r["both"][k] for r in of) / n for k in range(3)]

    means = {name: shares([r for r in rows if r["recipe"] == name]) for name in recipes.BEST}
    assert sorted(means, key=lambda name: -means[name][1]) == list(recipes.BEST)
    log = (ROOT / "docs" / "LOG.md").read_text("utf-8")
    for name, (first, second, same) in means.items():
        assert f"| {name} | 768 | {first:.0f}, {second:.0f} % | {same:.0f} % |" in log
    of = lambda *cell: [r for r in rows if (r["recipe"], r["set"]) == cell]  # noqa: E731
    each = {name: [shares(of(name, n))[1] for n in range(1, 9)] for name in recipes.BEST}
    p = [sign_flip([a - b for a, b in zip(each[x], each[y])])[0] for x, y in combinations(each, 2)]
    assert max(holm(p)) < 0.05
    text = (STUDY / "README.md").read_text("utf-8")
    first, second, same = shares(rows)
    assert f"{same:.0f} % of {sum(r['pictures'] for r in rows):,} pictures" in text
    for name, (_, second, _) in means.items():
        assert f"{name} {second:.0f}" in text
