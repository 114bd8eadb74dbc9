"""The comparison: statistics against closed forms, the plan, and a miniature of the whole: run, stopped,
split."""

import contextlib
import csv
import errno
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import kills
import numpy as np
import pytest
from PIL import Image

from hanokdiff.compare import __main__ as compare
from hanokdiff.compare import plan, run
from hanokdiff.compare.results import collect
from hanokdiff.compare.sections import compose
from hanokdiff.compare.summary import difference, estimate, find, summarise
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.scoring.stats import holm, mean_interval, share_interval, t_quantile, t_tail
from hanokdiff.tiny import world

SMALL = shlex.split(
    "--sizes 5 --steps 2 --n 2 --sampling-steps 3 --device cpu "
    '--with "dreambooth --class-images 2" --with "lora --class-images 2"'
)
ONE = ["--prompts", "{token}, fire", "--n", "1", "--steps", "1", "--with", "all --batch-size 2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default folders land in the test's own; the notes on stderr are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)


def train_here(argv, home):
    """Train in this process, which spares a start of seconds; the miniature's LoRA is a real one."""
    with open(home / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.chdir(home):
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


def tail_of_4(t: float) -> float:
    """P(|T| > t) with 4 degrees of freedom, in closed form."""
    u = t / math.sqrt(4 + t * t)
    return 1 - u * (3 - u * u) / 2


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 2.5, 12.7, 100.0])
def test_tail_of_t(t):
    """Closed forms for 1, 2 and 4 degrees of freedom, and the quantiles' own inverse."""
    assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-7)
    assert t_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-7)
    assert t_tail(t, 4) == pytest.approx(tail_of_4(t), abs=1e-7)
    for freedom in (1, 4, 30):
        assert t_tail(t_quantile(freedom), freedom) == pytest.approx(0.05, abs=1e-5)


def test_difference_between_two_methods():
    """Differences of 1 to 5 over five trainings: t = 3 / sqrt(2.5 / 5) with 4 degrees of freedom."""
    a = {(s, "A", i): float(s + i) for s in range(5) for i in range(3)}
    b = {k: v - (k[0] + 1) for k, v in a.items()}
    (mean, low, high), p = difference(a, b)
    t, half = 3 / math.sqrt(0.5), 2.776445 * math.sqrt(0.5)
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert p == pytest.approx(tail_of_4(t), abs=1e-6)
    found, p = difference({k: v for k, v in a.items() if k[0] == 0}, b)
    assert p is None and found == [1, 1, 1]
    assert difference(a, a) == ([0, 0, 0], 1.0)


def test_planted_differences_are_found_and_equalities_are_not():
    r = np.random.default_rng(0)
    keys = [(s, "A", i) for s in range(5) for i in range(100)]
    a, b, c = ({k: float(r.random() < p) for k in keys} for p in (0.5, 0.5, 0.8))
    p = holm([difference(a, b)[1], difference(a, c)[1], difference(b, c)[1]])
    assert p[0] > 0.05 > max(p[1:])


def test_estimates():
    assert estimate([[1, 0, 0, 0]], share=True) == pytest.approx(share_interval(1, 4), abs=1e-6)
    assert estimate([[1, 0], [1, 1]], share=True)[0] == 0.75
    assert estimate([[0.2, 0.4]]) == pytest.approx(mean_interval([0.2, 0.4]), abs=1e-6)
    assert estimate([[0.5]]) == [0.5, None, None]


# ------------------------------------------------------------------------------------------------ the plan


def arguments(*more):
    args = compare.options().parse_args([*SMALL, *map(str, more)])
    compare.check(args)
    return args


@pytest.fixture(scope="module")
def context():
    return plan.prepare(arguments("--sizes", 5, 50, 100))


def names(manifest, part="scores") -> dict[str, str]:
    upto = {"folder": 1, "pictures": 2, "scores": 3}[part]
    return {c["name"]: "/".join([c["folder"], c["pictures"], c["scores"]][:upto]) for c in manifest["cells"]}


def test_the_whole_matrix(context):
    args = compare.options().parse_args([])
    compare.check(args)
    manifest = plan.plan(args, context)
    cells = manifest["cells"]
    assert len(cells) == 3 + 12 and len(set(names(manifest).values())) == 15
    assert [c["ask"] for c in cells[:3]] == ["*", "hanok", "a Korean traditional house"]
    matrix = {(m, n) for m in plan.METHODS for n in (5, 50, 100)}
    assert {(c["method"], c["photos"]) for c in cells[3:]} == matrix
    assert all(c["steps"] == plan.script(c["method"]).DEFAULTS["tiny"]["steps"] for c in cells[3:])
    asked = {q["key"]: q for q in manifest["settings"]["questions"]}
    assert list(asked) == ["A", "A literal", "B", "C", "word"]
    assert asked["A"]["tokens"] == ["*", ",", "fire"] and asked["A literal"]["tokens"] == ["*,", "fire"]
    assert [*asked["C"]["texts"].values()] == ["A fire broke out in *", "A fire broke out in a hanok", "fire"]
    assert asked["A"]["noise"] == asked["A literal"]["noise"] != asked["B"]["noise"]
    known = manifest["references"]
    assert known["held_out"] == 30 and known["recognised"] >= 27
    assert known["nearest_95"]["5"] <= known["nearest_95"]["50"] <= known["nearest_95"]["100"]


def test_only_what_changed_is_done_again(context):
    base = plan.plan(arguments(), context)
    Path("a.png").touch()
    for more, part, changed in (
        (("--sizes", 5, 50), "scores", set()),
        (("--seeds", 0, 1), "scores", set()),
        (("--methods", "lora"), "scores", set()),
        (("--data", "."), "scores", set()),  # where the photos lie does not matter, what they are does
        (("--n", 3), "pictures", set()),
        (("--n", 3), "scores", set(names(base))),
        (("--sampling-steps", 4), "folder", set()),
        (("--sampling-steps", 4), "pictures", set(names(base))),
        (("--with", "lora --rank 4"), "folder", {"lora-5-0"}),
        (("--steps", 3), "folder", set(names(base)) - UNTOUCHED),
        (("--prompts", "{token} in the fire"), "pictures", set(names(base))),
        (("--subject", "a house"), "pictures", set()),
        (("--subject", "a house"), "scores", set(names(base))),
    ):
        other, before = names(plan.plan(arguments(*more), context), part), names(base, part)
        assert {n for n in other if n in before and other[n] != before[n]} == changed, more


UNTOUCHED = {"untouched-literal", "untouched-hanok", "untouched-described"}


def test_other_photos_are_other_cells(context):
    base = names(plan.plan(arguments(), context), "folder")
    photos = [*context.photos[1:6], context.photos[0]]
    moved = SimpleNamespace(**{**vars(context), "photos": photos})
    other = names(plan.plan(arguments(), moved), "folder")
    assert {n for n in base if base[n] != other[n]} == set(base) - UNTOUCHED


def test_the_key_of_earlier_versions():
    """What earlier versions have computed must still be found."""
    assert plan.key({"b": 1, "a": [2]}, "x", None) == "3c1afe8b4b"


def test_budgets(context):
    def steps(*more):
        cells = plan.plan(arguments("--sizes", 5, 50, 100, "--methods", "lora", *more), context)["cells"]
        return [c["steps"] for c in cells if c["method"] == "lora"]

    assert steps("--steps", 100) == [100] * 3
    assert steps("--steps", 100, "--budget", "epochs") == [10, 100, 200]


# ------------------------------------------------------------------------------------- the whole, in small


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """LoRA, in a process of its own, and DreamBooth, in this one: 5 photos, 2 steps, 2 pictures a prompt."""
    out, real = tmp_path_factory.mktemp("compare") / "한옥 out", run.process

    def process(argv, home):
        return (real if "train_lora" in str(argv[1]) else train_here)(argv, home)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        patch.setattr(run, "process", process)
        assert compare.main([*SMALL, "--methods", "lora", "dreambooth", "--out", str(out)]) == 0
    return out


def test_miniature(done):
    found = json.loads((done / "results.json").read_text("utf-8"))
    assert not found["missing"] and [c["name"] for c in found["cells"]][3:] == ["lora-5-0", "dreambooth-5-0"]
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
    row = next(r for r in found["summary"]["rows"] if r["method"] == "lora" and r["question"] == "all")
    own = [int(r["both"]) for r in rows if r["method"] == "lora" and r["question"] in "ABC"]
    assert row["pictures"] == 6 and row["both"] == pytest.approx(share_interval(sum(own), 6), abs=1e-6)
    assert [(p["a"], p["b"], p["p"]) for p in found["summary"]["pairs"]] == [("lora", "dreambooth", None)]


def test_the_pages(done):
    html, words = ((done / f).read_text("utf-8") for f in ("report.html", "report.md"))
    page = ElementTree.fromstring(html)  # raises if a tag is left open
    assert "http" not in html.replace("http-equiv", "") and "@import" not in html and "url(" not in html
    sources = [e.get("src") for e in page.iter("img")]
    assert len(sources) == 6 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert all(e.get("alt") for e in page.iter("img")) and len(list(page.iter("svg"))) == 6
    files = re.findall(r"\]\((.+?)\)", words)
    assert len(files) == 6 + 6 and all((done / f).is_file() for f in files)
    assert all(ElementTree.parse(done / f).getroot().get("color") for f in files if f.endswith("svg"))
    plain = "".join(page.itertext())
    for text in (
        'as asked: "*, fire"', 'subject\'s words: "a hanok, fire"', "one training, pictures only", "Ceiling",
        "our inference", "DreamBooth", "Variety", "How many steps?", "with the captions shuffled",
    ):  # fmt: skip
        assert text in plain and text in words.replace("\\*", "*"), text
    assert "A QUICK LOOK" not in plain and "UNFINISHED" not in plain


def test_the_second_start_does_nothing(done, monkeypatch, capsys):
    before = {f: f.stat().st_mtime_ns for f in done.glob("cells/**/*") if f.is_file()}
    held = results(done)
    monkeypatch.setattr(run, "process", None)
    monkeypatch.setattr(StableDiffusion, "draw", None)
    assert compare.main([*SMALL, "--methods", "lora", "dreambooth", "--out", str(done)]) == 0
    assert "5 cells, 5 of them done" in capsys.readouterr().out
    assert {f: f.stat().st_mtime_ns for f in before} == before and results(done) == held


def test_shards_merged_are_the_whole(here, tmp_path, capsys):
    argv = [*SMALL, *ONE, "--methods", "ti", "hypernet", "lora"]
    for more in (["--out", "whole"], ["--shard", "1/2", "--out", "one"], ["--shard", "2/2", "--out", "two"]):
        assert compare.main([*argv, *more]) == 0
    part = json.loads(Path("one/results.json").read_text("utf-8"))
    assert len(part["cells"]) == 3 == len(part["missing"])
    assert "UNFINISHED" in Path("one/report.html").read_text("utf-8")
    assert compare.main(["--merge", "one", "two", "--out", "both"]) == 0
    assert results("both") == results("whole")
    assert Path("both/images.csv").read_bytes() == Path("whole/images.csv").read_bytes()
    capsys.readouterr()
    manifest = json.loads(Path("two/manifest.json").read_text("utf-8"))
    manifest["cells"][3]["folder"] += "0"
    Path("two/manifest.json").write_text(json.dumps(manifest), "utf-8")
    assert compare.main(["--merge", "one", "two", "--out", "wrong"]) == 2
    assert "1 cells differ" in capsys.readouterr().err and not Path("wrong").exists()


def test_stopped_and_continued(here, tmp_path, monkeypatch, capsys):
    """Ctrl-C while drawing, while training and while scoring; then the same as undisturbed."""
    argv = [*SMALL, *ONE, "--methods", "ti", "--out"]
    assert compare.main([*argv, "whole"]) == 0
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
    assert results("a") == results("whole")


def test_a_stopped_training_is_resumed(tmp_path, monkeypatch):
    lora = {"name": "lora-5-0", "method": "lora", "options": ["--model", "tiny", "--device", "cpu"]}
    asked = []

    def process(argv, home):
        asked.append([str(a) for a in argv[2:]])
        (home / "run").mkdir(exist_ok=True)
        (home / "run" / ("config.json" if len(asked) == 1 else "lora.safetensors")).touch()
        return 130 if len(asked) == 1 else 0, 1.5, 10**8, len(asked) == 1

    monkeypatch.setattr(run, "process", process)
    with pytest.raises(KeyboardInterrupt):
        run.train(lora, tmp_path)
    run.train(lora, tmp_path)
    run.train(lora, tmp_path)
    assert asked == [[*lora["options"], "--out", "run"], ["--resume", "run", "--device", "cpu"]]
    assert [a["seconds"] for a in run.read_lines(tmp_path / "attempts.jsonl")] == [1.5, 1.5]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, HANOKDIFF_KILLS times, wherever it is; then the same results as undisturbed, times aside."""
    tally = kills.killed("comparison", int(os.environ.get("HANOKDIFF_KILLS", "10")), tmp_path)
    assert tally.kills and not tally.lost + tally.different, tally


def test_a_disk_that_fills(here, tmp_path, monkeypatch, capsys):
    """While drawing, and while writing the page: one sentence, no half file taken for a whole one, and on it
    goes."""
    argv = [*SMALL, *ONE, "--methods", "ti", "--out"]
    assert compare.main([*argv, "whole"]) == 0
    save, count = Image.Image.save, iter(range(100))

    def full(image, fp, *args, **options):
        save(image, fp, *args, **options)
        if "pictures" in str(fp) and next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(fp))

    def fails(argv, home):
        (home / "log.txt").write_text("error: [Errno 28] No space left on device\n")
        return 2, 0.1, None, False

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        refused([*argv, "a"], ["No space left on device"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(run, "process", fails)
        refused([*argv, "a"], ["ti-5-0 could not be", "No space left", "finished cells are kept"], capsys)
    assert len(results("a")["cells"]) == 3
    assert compare.main([*argv, "a"]) == 0
    assert results("a") == results("whole")


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
    argv = shlex.split("""--data photos --clip tiny --methods lora --sizes 3 --steps 1 --n 1
        --sampling-steps 2 --token sks --kinds 'a barn|a castle' --with 'all --batch-size 1 --rank 2'
        --device cpu --resolution 32 --out a --model""")
    assert compare.main([*argv, str(sd1.folder)]) == 0
    found = results("a")
    with Image.open(next(Path("a").glob("cells/lora*/pictures*/*.png"))) as image:
        assert image.size == (32, 32) and "Size: 32x32" in image.info["parameters"]
    assert json.loads(next(Path("a").glob("cells/lora*/run/config.json")).read_text())["resolution"] == 32
    assert found["settings"]["questions"][0]["prompt"] == "sks, fire" and found["references"]["held_out"] == 3
    assert list(found["settings"]["kinds"]) == ["a barn", "a castle"]
    assert not any(q["literal_tokens"] for q in found["settings"]["questions"])  # sks is nowhere fused


def test_several_trainings_are_compared(done):
    """Five copies of a cell with planted differences: t over trainings, and Holm's p in the page."""
    found = collect(done, json.loads((done / "manifest.json").read_text("utf-8")))
    found["settings"]["seeds"] = [0, 1, 2, 3, 4]
    cells = [c for c in found["cells"] if c["method"] == "untouched"]
    for trained in found["cells"][3:]:
        for seed in range(5):
            images = []
            for r in trained["images"]:
                both = int(trained["method"] == "lora" and (r["index"] + seed) % 5 < 4)
                images.append({**r, "seed": seed, "both": both})
            cells.append({**trained, "seed": seed, "images": images})
    summary = summarise({**found, "cells": cells})
    row = find(summary, "lora", 5)
    assert row["trainings"] == 5 and row["both"][0] == pytest.approx(0.8) and row["both"][1] < 0.8
    (pair,) = summary["pairs"]
    assert pair["difference"][0] == pytest.approx(0.8) and pair["p"] == pair["p_holm"] < 0.05
    text = compose(done, {**found, "cells": cells}, summary).markdown()
    assert "p, Holm" in text and "Student's t over 5 trainings" in text and "no test is made" not in text


# ----------------------------------------------------------------------------------------------- bad input


def refused(argv, words, capsys) -> None:
    capsys.readouterr()
    assert compare.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), (words, err)


@pytest.mark.parametrize(("argv", "words"), [
    (["--sizes", "0"], ["--sizes is 0", "at least 1"]),
    (["--n", "0"], ["--n is 0", "at least 1"]),
    (["--steps", "-1"], ["--steps is -1", "at least 1"]),
    (["--sizes", "5", "5"], ["--sizes 5 5", "twice"]),
    (["--seeds", "-1"], ["--seeds", "0 or more"]),
    (["--shard", "3/2"], ["--shard is 3/2", "1/4"]),
    (["--shard", "one"], ["--shard is one", "I/N"]),
    (["--prompts", "a fire"], ['"a fire"', 'pseudo word "*"', "{token}"]),
    (["--model", "some/model"], ["needs --data FOLDER", "--clip"]),
    (["--with", "loha --rank 4"], ['"loha --rank 4"', "lora"]),
    (["--merge", "nowhere"], ["--merge nowhere", "manifest.json"]),
    (["--out", "file"], ["--out file is a file"]),
    (["--kinds", "a hanok"], ['"a hanok"', "2 different"]),
    (["--sizes", "101"], ["101", "1 to 100"]),
    (["--data", "few", "--sizes", "2"], ["--sizes asks for 2 photos", "few has 3; lower --sizes"]),
    (["--with", "lora --rank 0"], ["--rank is 0"]),
    (["--with", "lora --seed 3"], ["--with may not set --seed"]),
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


def test_a_training_that_fails_says_why(monkeypatch, capsys, tmp_path):
    """And what was finished before is kept, with a page."""

    def process(argv, home):
        (home / "log.txt").write_text("model tiny\nerror: the disk is full\n")
        return 2, 0.1, None, False

    monkeypatch.setattr(run, "process", process)
    words = ["ti-5-0", "the disk is full", "log.txt", "are kept"]
    refused([*SMALL, "--methods", "ti", "--out", "a"], words, capsys)
    assert len(results("a")["cells"]) == 3 and results("a")["missing"] == ["ti-5-0"]


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        compare.main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "python -m hanokdiff.compare" in out and out.count("\n  --") > 20
    assert all(len(line) < 130 for line in out.splitlines())
