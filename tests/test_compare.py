"""The comparison: statistics against closed forms, the plan, and a miniature of the whole: run, stopped,
split."""

import ast
import contextlib
import csv
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import kills
import numpy as np
import pytest
import torch
from PIL import Image

from hanokdiff.compare import __main__ as compare
from hanokdiff.compare import appendix, korean, plan, recipes, run, sections, workers
from hanokdiff.compare.report import compose
from hanokdiff.compare.results import collect
from hanokdiff.compare.summary import find, pooled, summarise
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.scoring.stats import holm, mean_over_sets, share_interval, share_over_sets, sign_flip
from hanokdiff.tiny import world
from hanokdiff.training.dataset import load_photos

SMALL = shlex.split("--sizes 5 --steps 2 --n 2 --sampling-steps 3 --device cpu --jobs 1")
ONE = ["--prompts", "{token}, fire", "--n", "1", "--steps", "1"]
METHODS = ("ti", "dreambooth", "lora", "hypernet")


def recipe(*methods: str) -> list[str]:
    """Each method as a recipe of its name, small."""
    small = {m: f"{m} --batch-size 2{' --class-images 2' if m != 'ti' else ''}" for m in methods}
    return [w for m in methods for w in ("--recipe", f"{m}={small[m]}")]


pytestmark = pytest.mark.usefixtures("elsewhere")


def train_here(argv, home):
    """Train in this process, which spares a start of seconds; the miniature's LoRA is a real one."""
    place = contextlib.chdir(home.parent.parent)
    with open(home / "log.txt", "a") as log, contextlib.redirect_stdout(log), place:
        code = plan.script(Path(argv[1]).stem.removeprefix("train_")).main([str(a) for a in argv[2:]])
    return code, 100.0, None, False


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(run, "process", train_here)


def results(out) -> dict:
    """results.json, times aside."""
    found = json.loads((Path(out) / "results.json").read_text("utf-8"))
    for c in found["cells"]:
        del c["times"]
    return found


# ---------------------------------------------------------------------------------------------- statistics


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)


def test_sign_flips():
    """All alike: only they and their mirror image are as far; of two sides in balance, every flip is."""
    assert sign_flip([1, 2, 3, 4, 5, 6, 7, 8]) == (2 / 256, 2 / 256)
    assert sign_flip([1, 1, 1, 1, -1]) == (12 / 32, 2 / 32)  # all alike or one other: 1 + 5 flips, twice
    assert sign_flip([0.3, -0.3])[0] == 1.0 and sign_flip([0, 0, 0])[0] == 1.0
    p, floor = sign_flip(np.linspace(0.1, 1, 20))
    assert p == floor == 1 / 20_001  # no flip of 20,000 is as far as all 20 alike


def test_intervals_over_sets():
    mean, low, high = share_over_sets([(16, 32), (24, 32)])
    assert mean == 0.625 and 0.3 < low < 0.5 and 0.7 < high < 0.9
    assert share_over_sets([(32, 32)] * 5)[1] < 0.99  # 160 of 160 pictures are no certainty
    assert share_over_sets([(0, 96)])[:2] == (0.0, 0.0)
    one = share_over_sets([(30, 100)])  # of one set, pictures only: close to Wilson's
    assert one == pytest.approx(share_interval(30, 100), abs=0.01)
    mean, low, high = mean_over_sets([(0.2, 0.1, 100)])
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 0.0196, 0.2 + 0.0196), abs=2e-3)


def simulated(r, sets: int, gap: float = 0.0, n: int = 96) -> list[float]:
    """Differences of two recipes' shares, two-humped as real ones are; `gap` is what the first adds."""
    works = r.random((2, sets)) < 0.75
    shares = np.where(works, r.normal(0.8, 0.08, (2, sets)), r.normal(0.08, 0.05, (2, sets)))
    shares = np.clip(shares + np.array([[gap], [0]]), 0, 1)
    k = r.binomial(n, shares) / n
    return list(k[0] - k[1])


def test_families_err_in_one_of_twenty():
    """1,000 comparisons of four equal recipes in 8 sets: any is called different in 5 % at most. A real gap
    of half the pictures is found in most, and equal ones beside it are not."""
    r, wrong = np.random.default_rng(0), 0
    for _ in range(1000):
        works = r.random((4, 8)) < 0.75
        share = np.where(works, r.normal(0.8, 0.08, (4, 8)), r.normal(0.08, 0.05, (4, 8)))
        k = r.binomial(96, np.clip(share, 0, 1)) / 96
        pairs = [(i, j) for i in range(4) for j in range(i)]
        wrong += min(holm([sign_flip(k[i] - k[j])[0] for i, j in pairs])) < 0.05
    assert wrong <= 50 + 2 * math.sqrt(1000 * 0.05 * 0.95)
    found = [holm([sign_flip(simulated(r, 8, 0.9))[0], sign_flip(simulated(r, 8))[0]]) for _ in range(100)]
    assert sum(p[0] < 0.05 for p in found) > 50 > 12 > sum(p[1] < 0.05 for p in found)


def test_pooled_spread():
    """Mean and standard deviation of all pictures from those of each prompt."""
    r = np.random.default_rng(1)
    values = [r.normal(size=n) for n in (3, 5, 8)]
    of = [{"pictures": len(v), "x": [v.mean(), v.std(ddof=1)]} for v in values]
    together = np.concatenate(values)
    assert pooled(of, "x") == pytest.approx((together.mean(), together.std(ddof=1)))


# -------------------------------------------------------------------------------------------------- recipes


def test_recipes():
    assert recipes.parse(["LoRA u", "mine = lora --rank 4"], plan.METHODS) == {
        "LoRA u": recipes.RECIPES["LoRA u"], "mine": "lora --rank 4",
    }  # fmt: skip
    found, at = recipes.chosen(["best", "factorial"], {"mine": "ti"}, [5, 50, 100])
    assert at["LoRA"] == at["mine"] == [5, 50, 100] and at["LoRA u"] == [50] and "LoRA 2023" not in found
    for words in recipes.RECIPES.values():  # every option is one of its script
        plan.parsed_options(words.split()[0], words.split()[1:], words)


def test_pairs_of_a_switch_differ_in_it_alone():
    """What the untaught options of two recipes come to differs in the options of one switch only."""
    own = {
        "text encoder": {"text_rank"},
        "class pictures, the word cannot learn": {"class_images"},
        "class pictures, the word learns": {"class_images"},
        "the word's own vectors": {"vectors"},
    }
    assert own.keys() == recipes.SWITCHES.keys()
    for question, pairs in recipes.SWITCHES.items():
        for pair in pairs:
            method = recipes.RECIPES[pair[0]].split()[0]
            parser = plan.script(method).options()
            a, b = (vars(parser.parse(recipes.RECIPES[name].split()[1:])) for name in pair)
            assert {k for k in a if a[k] != b[k]} == own[question], pair


def test_families():
    _, at = recipes.chosen(["best", "factorial"], {}, [5, 50, 100])
    found = recipes.families(at, [5, 50, 100])
    assert [len(v) for v in found.values()] == [6, 2, 4]
    assert found["number of photos"][0].a == tuple((n, 50) for n in recipes.BEST)
    assert {c.question for c in found["switches"]} == recipes.SWITCHES.keys()
    two = recipes.families({"a": [5], "b": [5]}, [5])
    assert list(two) == ["recipes at 5 photos"] and two["recipes at 5 photos"][0].a == (("a", 5),)


# ------------------------------------------------------------------------------------------------ the plan


def arguments(*more):
    argv = [*SMALL, *map(str, more)]
    args = compare.options().parse_args(argv + recipe(*METHODS) * ("--recipe" not in argv))
    compare.check(args)
    return args


@pytest.fixture(scope="module")
def context():
    return plan.prepare(arguments("--sizes", 5, 50, 100))


def names(manifest, part="scores") -> dict[str, str]:
    upto = {"folder": 1, "pictures": 2, "scores": 3}[part]
    return {c["name"]: "/".join([c["folder"], c["pictures"], c["scores"]][:upto]) for c in manifest["cells"]}


def cell_name(method: str, photos: int = 5, seed: int = 1) -> str:
    return f"{method}, {photos} photos, set {seed}"


def test_the_whole_matrix(context):
    args = compare.options().parse_args([])
    compare.check(args)
    manifest = plan.plan(args, context)
    cells = manifest["cells"]
    assert len(cells) == 3 + 12 and len(set(names(manifest).values())) == 15
    assert [c["ask"] for c in cells[:3]] == ["*", "hanok", "a Korean traditional house"]
    matrix = {(m, n) for m in recipes.BEST for n in (5, 50, 100)}
    assert {(c["recipe"], c["photos"]) for c in cells[3:]} == matrix
    assert all(c["photo_set"] == c["seed"] == 1 for c in cells[3:])
    assert all(c["steps"] == plan.script(c["method"]).DEFAULTS["tiny"]["steps"] for c in cells[3:])
    asked = {q["key"]: q for q in manifest["settings"]["questions"]}
    assert list(asked) == ["A", "A literal", "B", "C", "word"]
    assert [q["n"] for q in asked.values()] == [16, 8, 16, 16, 8]
    assert asked["A"]["tokens"] == ["*", ",", "fire"] and asked["A literal"]["tokens"] == ["*,", "fire"]
    assert [*asked["C"]["texts"].values()] == ["A fire broke out in *", "A fire broke out in a hanok", "fire"]
    assert asked["A"]["noise"] == asked["A literal"]["noise"] != asked["B"]["noise"]
    known = manifest["references"]
    assert known["held_out"] == 30 and known["recognised"] >= 27
    assert known["copy_levels"]["5"] <= known["copy_levels"]["50"] <= known["copy_levels"]["100"]


def test_only_what_changed_is_done_again(context):
    base = plan.plan(arguments(), context)
    Path("a.png").touch()
    for more, part, changed in (
        (("--sizes", 5, 50), "scores", set()),
        (("--seeds", 1, 2), "scores", set()),
        (recipe("lora"), "scores", set()),
        (("--data", "."), "scores", set()),  # where the photos lie does not matter, what they are does
        (("--n", 3), "pictures", set()),
        (("--n", 3), "scores", set(names(base))),
        (("--sampling-steps", 4), "folder", set()),
        (("--sampling-steps", 4), "pictures", set(names(base))),
        (("--recipe", "lora=lora --rank 4"), "folder", {cell_name("lora")}),
        (("--same-photos",), "folder", set(names(base)) - UNTOUCHED),
        (("--steps", 3), "folder", set(names(base)) - UNTOUCHED),
        (("--prompts", "{token} in the fire"), "pictures", set(names(base))),
        (("--subject", "a house"), "pictures", set()),
        (("--subject", "a house"), "scores", set(names(base))),
    ):
        other, before = names(plan.plan(arguments(*more), context), part), names(base, part)
        assert {n for n in other if n in before and other[n] != before[n]} == changed, more


UNTOUCHED = {"untouched, literal", "untouched, hanok", "untouched, described"}


def test_other_photos_are_other_cells(context, monkeypatch):
    base = names(plan.plan(arguments(), context), "folder")
    photos, embeddings = context.photos(1)
    monkeypatch.setitem(context.sets, 1, ([*photos[1:6], photos[0]], embeddings))
    other = names(plan.plan(arguments(), context), "folder")
    assert {n for n in base if base[n] != other[n]} == set(base) - UNTOUCHED


def test_a_set_has_its_own_photos(context):
    sets = [context.photos(k)[0] for k in (1, 2)]
    assert len({p.image.tobytes() for photos in sets for p in photos}) == 200
    cells = plan.plan(arguments("--seeds", 1, 2), context)["cells"]
    options = [c["options"] for c in cells if c["method"] == "ti"]
    assert [o[o.index("--photo-set") + 1] for o in options] == ["1", "2"]


def test_sets_of_a_folder(tmp_path):
    """Other orders of the same photos, nested, and the held-out ones never among them."""
    for i, (image, _) in enumerate(world.photos(12)):
        image.save(tmp_path / f"{i:02d}.png")
    sets = [load_photos(tmp_path, 64, 8, 4, lambda _: None, photo_set=k) for k in range(4)]
    orders = [[p.name for p in photos] for photos, _ in sets]
    assert len(set(map(tuple, orders))) == 4 and all(set(order) == set(orders[0]) for order in orders)
    assert len({tuple(p.name for p in held) for _, held in sets}) == 1
    fewer, _ = load_photos(tmp_path, 64, 3, 4, lambda _: None, photo_set=2)
    assert [p.name for p in fewer] == orders[2][:3]


def test_points_of_one_training(context):
    """Strengths and steps are drawn from one training; textual inversion has no strength."""
    assert [plan.step_at(at, 350) for at in (0.25, 0.5, 0.01)] == [85, 170, 17]  # not 88 and 175
    argv = [*recipe("lora", "ti"), "--strengths", 0.5, 1, "--at", 0.5, 1, "--steps", 4]
    manifest = plan.plan(arguments(*argv), context)
    cells = manifest["cells"][3:]
    assert [(c["method"], c["at"], c["strength"]) for c in cells] == [
        ("lora", 0.5, 0.5), ("lora", 0.5, 1), ("lora", 1, 0.5), ("lora", 1, 1), ("ti", 0.5, 1), ("ti", 1, 1),
    ]  # fmt: skip
    assert len({c["folder"] for c in cells}) == 2 and len({c["pictures"] for c in cells}) == 6
    assert all(c["options"][c["options"].index("--save-every") + 1] == "2" for c in cells)
    asked = {q["key"]: q for q in manifest["settings"]["questions"]}
    assert asked["development 1"]["wanted"] == "snow" and asked["A"]["wanted"] == "fire"
    assert [len(g) for g in workers.trainings(cells)] == [4, 2]


def test_the_longest_first(context):
    """The last training runs alone on two cores: it must not be the longest. Sets stay together."""
    manifest = plan.plan(arguments("--seeds", 1, 2, *recipe("ti", "hypernet", "lora")), context)
    groups = workers.trainings(manifest["cells"])
    names = [groups[i][0]["name"] for i in workers.longest_first(groups, range(1, len(groups)))]
    assert names == [cell_name(m, seed=s) for s in (1, 2) for m in ("hypernet", "lora", "ti")]
    assert workers.longest_first(groups, [4, 0]) == [0, 4]  # a page begins with the untouched model


def test_the_key_of_earlier_versions():
    """What earlier versions have computed must still be found."""
    assert plan.key({"b": 1, "a": [2]}, "x", None) == "3c1afe8b4b"


def test_budgets(context):
    def steps(*more):
        cells = plan.plan(arguments("--sizes", 5, 50, 100, *recipe("lora"), *more), context)["cells"]
        return [c["steps"] for c in cells if c["method"] == "lora"]

    assert steps("--steps", 100) == [100] * 3
    assert steps("--steps", 100, "--budget", "epochs") == [10, 100, 200]
    usual = plan.script("lora").DEFAULTS["tiny"]["steps"]
    quick = arguments("--quick")
    assert plan.training(quick, "lora", 50, 2, 1)[1]["steps"] == quick.steps
    quick.steps = None
    assert plan.training(quick, "lora", 50, 2, 1)[1]["steps"] == round(0.75 * usual)


# ------------------------------------------------------------------------------------- the whole, in small


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """5 photos, 2 steps, 2 pictures a prompt: LoRA and the base by two workers, then DreamBooth."""
    out = tmp_path_factory.mktemp("compare") / "한옥 out"
    with contextlib.chdir(out.parent), open("said", "w") as said, contextlib.redirect_stdout(said):
        assert compare.main([*SMALL, "--jobs", "2", *recipe("lora"), "--out", str(out)]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "process", train_here)
            assert compare.main([*SMALL, *recipe("lora", "dreambooth"), "--out", str(out)]) == 0
    return out


def test_miniature(done):
    found = json.loads((done / "results.json").read_text("utf-8"))
    assert not found["missing"] and [c["recipe"] for c in found["cells"]][3:] == ["lora", "dreambooth"]
    for c in found["cells"][3:]:
        t = c["times"]
        assert t["wall"] > t["training"] > 0 and min(t["other"], t["sampling"]) > 0 and t["file_bytes"] > 1e5
        assert t["pictures"] == 10 and (t["class"] > 0) == (c["method"] in ("dreambooth", "lora"))
        assert c["method"] != "lora" or sys.platform != "linux" or 1e8 < t["peak_bytes"] < 4e9
    rows = list(csv.DictReader((done / "images.csv").read_text("utf-8").splitlines()))
    files = [done / r["file"] for r in rows]
    assert len(rows) == 3 * 4 * 2 + 2 * 5 * 2 and all(f.is_file() for f in files)
    assert sorted(files) == sorted(done.glob("cells/*/pictures-*/*.png"))
    noise = {(r["question"].split()[0], r["index"]): set() for r in rows}
    for r in rows:
        noise[r["question"].split()[0], r["index"]].add(r["noise"])
    assert all(len(v) == 1 for v in noise.values()) and len(set.union(*noise.values())) == len(noise)
    row = find(found["summary"], "lora", 5)
    own = [int(r["both"]) for r in rows if r["method"] == "lora" and r["question"] in "ABC"]
    assert row["pictures"] == 6 and row["both"] == pytest.approx(share_over_sets([(sum(own), 6)]), abs=1e-6)
    ((test,),) = found["summary"]["tests"].values()
    assert test["question"] == "lora against dreambooth" and test["p"] is None


def test_every_number_comes_from_results_json(done):
    """The report's numbers again, from the counts in results.json alone; and the counts from the pictures."""
    found = json.loads((done / "results.json").read_text("utf-8"))
    summary = found.pop("summary")
    assert summarise(found) == summary
    rows = list(csv.DictReader((done / "images.csv").read_text("utf-8").splitlines()))
    for c in found["cells"]:
        for key, counted in c["found"].items():
            place = f"{c['folder']}/{c['pictures']}/"
            own = [r for r in rows if r["file"].startswith(place) and r["question"] == key]
            assert counted["pictures"] == len(own) == sum(counted["conditions"].values())
            for name in ("subject", "wanted", "both", "copy"):
                assert counted[name] == sum(int(r[name]) for r in own)
            mean = np.mean([float(r["likeness"]) for r in own])
            assert counted["likeness"][0] == pytest.approx(mean, abs=1e-6)


def test_the_pages(done):
    html, words = ((done / f).read_text("utf-8") for f in ("report.html", "report.md"))
    page = ElementTree.fromstring(html)  # raises if a tag is left open
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html and "url(" not in html
    sources = [e.get("src") for e in page.iter("img")]
    assert len(sources) == 7 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert all(e.get("alt") for e in page.iter("img")) and len(list(page.iter("svg"))) == 6
    files = [f.strip("<>") for f in re.findall(r"\]\((.+?)\)", words)]
    assert len(files) == 7 + 6 + 2 and all((done / f).is_file() for f in files)
    assert all(ElementTree.parse(done / f).getroot().get("color") for f in files if f.endswith("svg"))
    plain = "".join(page.itertext())
    for text in (
        'as asked: "*, fire"', 'subject\'s words: "a hanok, fire"', "over its pictures only", "Ceiling",
        "our inference", "train_dreambooth.py --batch-size 2", "no test", "Variety",
        "How many steps?", "with the captions shuffled",
    ):  # fmt: skip
        assert text in plain and text in words.replace("\\*", "*"), text
    assert "A QUICK LOOK" not in plain and "UNFINISHED" not in plain


def test_every_sentence_has_its_korean():
    """Whatever is written in the two modules in four words or more stands in korean.txt."""
    known = korean.FILE.read_text("utf-8")
    for module in (sections, appendix):
        tree = ast.parse(Path(module.__file__).read_text("utf-8"))
        plain = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        docs = [ast.get_docstring(n, clean=False) for n in ast.walk(tree) if hasattr(n, "body") and n.body
                and isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)]  # fmt: skip
        long = [s for s in plain if s not in docs and len(re.findall(r"[a-z]+ ", s)) > 3]
        sentences = {" ".join(s.split()) for s in long}
        heads = {s for s in sentences if s.startswith(("recipe photos", "picture,such"))}  # of a table each
        assert len(heads) == 1 and len(sentences) > 30
        assert [s for s in sentences - heads if s not in known] == []


def test_a_korean_page(done, monkeypatch):
    """No text of any branch is left as it is, but for data: names, labels, numbers."""
    found, images = collect(done, json.loads((done / "manifest.json").read_text("utf-8")))
    s = found["settings"]
    s |= {"language": "ko", "quick": True, "budget": "epochs", "seeds": list(range(8))}
    own = [c for c in found["cells"] if c["photos"]]
    found["cells"] += [{**c, "seed": seed} for c in own for seed in range(2, 8)]
    summary = summarise(found)
    best = {"recipe": "lora", "photos": 5, "at": 0.5, "strength": 0.5, "development": [0.5, 0.4, 0.6]}
    summary["best_points"] = [best | {"both": best["development"]}]
    found["missing"] = ["lora, 5 photos, set 9"]
    said, say = {}, korean.say
    monkeypatch.setattr(korean, "say", lambda text: said.setdefault(text, say(text)))
    page = compose(done, found, summary, images)
    data = [s[k] for k in ("recipes", "kinds", "conditions", "questions", "drawing", "scorer", "model")]
    data += [[c["ask"] for c in found["cells"]], [c["times"]["machine"] for c in own], "CLIP-T MiB train_ py"]
    names = set(re.findall("[A-Za-z]{2,}", json.dumps(data)))
    left = [text for text, korean in said.items() if text == korean]
    assert len(said) > 150
    assert [text for text in left if set(re.findall("[A-Za-z]{2,}", text)) - names] == []
    html = page.html()
    assert '<html lang="ko">' in html and '<h2 id="part1">요약</h2>' in html and "{" not in page.markdown()
    assert "빠른 확인" in html and "진행 중: 조합" in html and "이미지 비율, %</text>" in html


def test_one_picture_of_each_failure(done):
    """By the rule: the most frequent labels, of each the clearest picture; at the end the nearest copy."""
    found, images = collect(done, json.loads((done / "manifest.json").read_text("utf-8")))
    own = [i for i in images if i["photos"] and i["question"] in "ABC"]
    for i in images:
        i["copy"] = 0
    planted = ["campfire"] * 5 + ["snow"] * 4 + ["none"] * 2 + ["night"]
    assert len(own) == len(planted)
    for n, (i, condition) in enumerate(zip(own, planted, strict=True)):
        i |= dict(kind="hanok", subject=1, condition=condition, wanted=0, copy=0, likeness=n / 100)
    own[3]["likeness"], own[5]["likeness"] = 0.9, 0.8
    own[11] |= {"kind": "barn", "subject": 0, "wanted": 1, "condition": "fire", "copy": 1, "nearest": 0.99}
    other = {**own[0], "question": "word", "likeness": 2}
    copy = {**other, "copy": 1, "nearest": 0.995}
    text = compose(done, found, summarise(found), [*images, other, copy]).markdown()
    table = text.partition("One picture of each failure")[2].partition("\n\n##")[0].splitlines()
    rows = [line.strip("| ").split(" | ") for line in table if re.match(r"\| \d", line)]
    shown = [[*r[1:5], r[5], r[8], r[9]] for r in rows]
    expected = [(own[3], 5, ""), (own[5], 4, ""), (own[10], 2, ""), (own[11], 1, "0.990"), (copy, 2, "0.995")]
    assert shown == [
        [str(count), i["kind"], i["condition"], near, i["recipe"], i["question"], str(i["index"])]
        for i, count, near in expected
    ]  # fmt: skip
    assert "There is none of them" in compose(done, found, summarise(found), []).markdown()


def test_the_second_start_does_nothing(done, monkeypatch, capsys):
    before = {f: f.stat().st_mtime_ns for f in done.glob("cells/**/*") if f.is_file()}
    held = results(done)
    monkeypatch.setattr(run, "process", None)
    monkeypatch.setattr(StableDiffusion, "draw", None)
    assert compare.main([*SMALL, *recipe("lora", "dreambooth"), "--out", str(done)]) == 0
    assert "5 cells, 5 of them done" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in before} == before and results(done) == held


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One small textual inversion that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(run, "process", train_here)
        assert compare.main([*SMALL, *ONE, *recipe("ti"), "--out", "whole"]) == 0
        return Path("whole").resolve()


def test_shards_merged_are_the_whole(here, whole, capsys):
    for n, out in enumerate(("one", "two"), 1):
        assert compare.main([*SMALL, *ONE, *recipe("ti"), "--shard", f"{n}/2", "--out", out]) == 0
    part = json.loads(Path("one/results.json").read_text("utf-8"))
    assert len(part["cells"]) == 3 and len(part["missing"]) == 1  # the untouched model is one training
    assert "UNFINISHED" in Path("one/report.html").read_text("utf-8")
    assert compare.main(["--merge", "one", "two", "--out", "both"]) == 0
    assert results("both") == results(whole)
    assert Path("both/images.csv").read_bytes() == (whole / "images.csv").read_bytes()
    assert compare.main(["--merge", "one", "two", "--out", "both", "--lang", "ko"]) == 0
    assert '<html lang="ko">' in Path("both/report.html").read_text("utf-8")
    capsys.readouterr()
    manifest = json.loads(Path("two/manifest.json").read_text("utf-8"))
    manifest["cells"][3]["folder"] += "0"
    Path("two/manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert compare.main(["--merge", "one", "two", "--out", "wrong"]) == 2
    assert "1 cells differ" in capsys.readouterr().err and not Path("wrong").exists()


def test_stopped_and_continued(here, whole, monkeypatch, capsys):
    """Ctrl-C while drawing, while training and while scoring; then the same as undisturbed."""
    argv = [*SMALL, *ONE, *recipe("ti"), "--out"]
    draw, count = StableDiffusion.draw, iter(range(100))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def third(*args, **kwargs):
        return (stop if next(count) == 2 else draw)(*args, **kwargs)

    stops = ((StableDiffusion, "draw", third), (run, "process", stop), (run, "score_images", stop))
    for place, name, stopping in stops:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopping)
            assert compare.main([*argv, "a"]) == 130
        assert "the same command goes on" in capsys.readouterr().out
    assert compare.main([*argv, "a"]) == 0
    assert results("a") == results(whole)


def test_a_stopped_training_is_resumed(tmp_path, monkeypatch):
    lora = {"name": "lora-5-0", "method": "lora", "options": ["--model", "tiny", "--device", "cpu"]}
    asked, freed = [], []

    def process(argv, home):
        asked.append([str(a) for a in argv[2:]])
        assert freed.pop() and not freed  # the GPU's memory that drawing left in reserve
        (home / "run").mkdir(exist_ok=True)
        (home / "run" / ("config.json" if len(asked) == 1 else "lora.safetensors")).touch()
        return 130 if len(asked) == 1 else 0, 1.5, 10**8, len(asked) == 1

    monkeypatch.setattr(run, "process", process)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    with pytest.raises(KeyboardInterrupt):
        run.train(lora, tmp_path)
    run.train(lora, tmp_path)
    run.train(lora, tmp_path)
    inside = f"{tmp_path.parent.name}/{tmp_path.name}/run"
    assert asked == [[*lora["options"], "--out", inside], ["--resume", inside, "--device", "cpu"]]
    assert [a["seconds"] for a in run.read_lines(tmp_path / "attempts.jsonl")] == [1.5, 1.5]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, HANOKDIFF_KILLS times, wherever it is; then the same results as undisturbed, times aside."""
    tally = kills.killed("comparison", int(os.environ.get("HANOKDIFF_KILLS", "10")), tmp_path)
    assert tally.kills and not tally.lost + tally.different, tally


def test_a_disk_that_fills(here, whole, monkeypatch, capsys):
    """While drawing and while training: one sentence, no half file taken for a whole one, and on it goes."""
    argv = [*SMALL, *ONE, *recipe("ti"), "--out"]
    save, count = Image.Image.save, iter(range(100))

    def full(image, fp, *args, **options):
        save(image, fp, *args, **options)
        if "pictures" in str(fp) and next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(fp))

    def fails(argv, home):
        (home / "log.txt").write_text("model tiny\nerror: [Errno 28] No space left on device\n")
        return 2, 0.1, None, False

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        refused([*argv, "a"], ["No space left on device"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(run, "process", fails)
        words = ["ti, 5 photos, set 1 could not be", "No space left", "log.txt", "finished cells are kept"]
        refused([*argv, "a"], words, capsys)
    assert len(results("a")["cells"]) == 3 and results("a")["missing"] == [cell_name("ti")]
    assert compare.main([*argv, "a"]) == 0
    assert results("a") == results(whole)


def test_ctrl_c_reaches_the_child_once(tmp_path):
    """It may finish its step, and says so; the parent waits."""
    child = """if 1:
        import signal, sys, time
        def stop(*_):
            time.sleep(0.2)
            print("stopped at step 7", flush=True)
            sys.exit(130)
        signal.signal(signal.SIGINT, stop)
        print("ready", flush=True)
        time.sleep(30)"""

    def press():
        while "ready" not in (tmp_path / "log.txt").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    (tmp_path / "log.txt").touch()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored
    try:
        threading.Thread(target=press, daemon=True).start()
        code, seconds, peak, stopped = run.process([sys.executable, "-c", child], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and stopped and 0.2 < seconds < 25
    assert (tmp_path / "log.txt").read_text().count("stopped") == 1
    assert sys.platform != "linux" or 1e6 < peak < 1e8  # the child's own, not this process's


def test_any_model_and_photos(sd1, here, tmp_path):
    """Nothing is tied to the tiny world: a random model of the real topology, photographs, chosen kinds."""
    (tmp_path / "photos").mkdir()
    for i, (image, text) in enumerate(world.photos(6)):  # captions that name the pseudo word already
        image.resize((80, 64)).save(tmp_path / "photos" / f"{i}.jpg")
        (tmp_path / "photos" / f"{i}.txt").write_text(text.replace("a building with a roof", "sks"))
    argv = shlex.split("""--data photos --clip tiny --recipe 'lora=lora --batch-size 1 --rank 2' --sizes 3
        --steps 1 --n 1 --sampling-steps 2 --token sks --kinds 'a barn|a castle' --jobs 1 --device cpu
        --resolution 32 --out a --model""")
    assert compare.main([*argv, str(sd1.folder)]) == 0
    found = results("a")
    with Image.open(next(Path("a").glob("cells/lora*/pictures*/*.png"))) as image:
        assert image.size == (32, 32) and "Size: 32x32" in image.info["parameters"]
    assert json.loads(next(Path("a").glob("cells/lora*/run/config.json")).read_text())["resolution"] == 32
    assert found["settings"]["questions"][0]["prompt"] == "sks, fire" and found["references"]["held_out"] == 3
    assert list(found["settings"]["kinds"]) == ["a barn", "a castle"]
    assert not any(q["literal_tokens"] for q in found["settings"]["questions"])  # sks is nowhere fused


def test_several_trainings_are_compared(done):
    """Eight copies of a cell with planted shares: dots, failures, sign flips and Holm's p in the page."""
    found, _ = collect(done, json.loads((done / "manifest.json").read_text("utf-8")))
    found["settings"]["seeds"] = list(range(8))
    cells = [c for c in found["cells"] if not c["photos"]]
    for trained in found["cells"][3:]:
        for seed in range(8):
            both = {"lora": 32 if seed else 2, "dreambooth": 4}[trained["recipe"]]
            counted = {k: {**v, "pictures": 32, "both": both} for k, v in trained["found"].items()}
            cells.append({**trained, "seed": seed, "found": counted})
    summary = summarise({**found, "cells": cells})
    row = find(summary, "lora", 5)
    assert row["both"][0] == pytest.approx((7 + 1 / 16) / 8, abs=1e-6)
    assert row["both_each"] == [0.0625] + [1.0] * 7
    assert row["failures"][:2] == [1, 8] and find(summary, "dreambooth", 5)["failures"][0] == 0
    ((test,),) = summary["tests"].values()
    assert test["p"] == test["p_holm"] == pytest.approx(sign_flip(test["each"])[0])
    assert test["floor"] == 2 / 256 and test["each"] == [-0.0625] + [0.875] * 7 and test["p"] == 4 / 256
    text = compose(done, {**found, "cells": cells}, summary, []).markdown()
    assert "1 of 8 [2, 47] %" in text and "8 trainings per cell at most" in text and "0.0156" in text


def test_workers(done, monkeypatch):
    """Two at once, each with its share of the threads; a training that is left alone has no more than before:
    it would sum in another order."""
    out = (done.parent / "said").read_text()
    assert "2 trainings at once" in out and "min left" in out
    cells = json.loads((done / "results.json").read_text("utf-8"))["cells"]
    (lora,) = [c for c in cells if c["method"] == "lora"]
    assert lora["times"]["threads"] == max(1, workers.cores() // 2)
    shutil.copytree(done, "left")
    shutil.rmtree(Path("left") / lora["folder"])
    asked = []
    monkeypatch.setattr(workers, "start", lambda *how: asked.append(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare.main([*SMALL, "--jobs", "2", *recipe("lora", "dreambooth"), "--out", "left"])
    assert asked == [(0, 2)]


@pytest.mark.parametrize("press", [False, True])
def test_workers_that_stop(press, tmp_path, monkeypatch):
    """A worker's error becomes the command's; Ctrl-C stops them all; no process is left behind."""
    code = """if 1:
        import json, sys, time
        sys.stdin.readline()
        for line in sys.stdin:
            if int(line) == 1:
                print(json.dumps({"error": "the disk is full"}), flush=True)
                break
            print(json.dumps({"done": int(line)}), flush=True)"""
    started = []

    def start(k, jobs):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        started.append(subprocess.Popen([sys.executable, "-c", code], **pipes))
        return started[-1]

    monkeypatch.setattr(workers, "start", start)
    if press:
        finished = workers.side_by_side([], [0, 2, 3, 4], 2)
        next(finished)
        with pytest.raises(KeyboardInterrupt):
            finished.throw(KeyboardInterrupt)
    else:
        with pytest.raises(ValueError, match="the disk is full"):
            list(workers.side_by_side([], [0, 2, 1, 3], 2))
        assert sorted(workers.side_by_side([], [0, 2, 3], 2)) == [0, 2, 3]
    assert all(worker.poll() is not None for worker in started)


# ----------------------------------------------------------------------------------------------- bad input


def refused(argv, words, capsys) -> None:
    capsys.readouterr()
    assert compare.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), (words, err)


@pytest.mark.parametrize(("argv", "words"), [
    (["--shard", "one"], ["--shard is one", "I/N"]),
    (["--recipe", "a=ti", "--recipe", "a=lora"], ['"a" names two']),
    (["--out", "file"], ["--out file is a file"]),
    (["--strengths", "0.5"], ["--strengths 0.5", "1 among"]),
    (["--preset", "best", "best"], ["--preset best best", "twice"]),
    (["--kinds", "a hanok"], ['"a hanok"', "2 different"]),
    (["--data", "few", "--sizes", "2"], ["--sizes asks for 2 photos", "few has 3; lower --sizes"]),
    (["--subject", "a hanok " * 40], ["tokens long", "reads 77", "--subject"]),
    (["--resolution", "63"], ["63", "divisible by 4"]),
])  # fmt: skip
def test_bad_options(argv, words, capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "few").mkdir()
    for i, (image, _) in enumerate(world.photos(3)):
        image.save(tmp_path / "few" / f"{i}.png")
    refused(argv, words, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few", "file"]


@pytest.mark.parametrize(("recipe", "words"), [
    ("a=lora --rank -1", ["--rank is -1"]),
    ("a=lora --seed 3", ["may not set --seed"]),
    ("a=ti --rank 4", ['--recipe "ti --rank 4"', "--rank is not known here"]),
])  # fmt: skip
def test_a_wrong_recipe_is_refused_before_anything_is_opened(recipe, words, capsys, monkeypatch):
    monkeypatch.setattr(plan, "prepare", None)
    refused(["--recipe", recipe], words, capsys)
