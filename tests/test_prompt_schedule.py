"""Prompt editing, alternation, AND and tags, by the WebUI's documented rules."""

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import train_hypernet
import train_lora
from hanokdiff.formats.load import load_model
from hanokdiff.formats.lookup import find_artefact
from hanokdiff.models.prompt import escape_prompt, parse_emphasis
from hanokdiff.models.prompt_schedule import at_steps, not_understood, take_tags

# prompt -> (last step of a text, the text) of 10 steps
EDITED = {
    "a barn": [(10, "a barn")],
    "": [(10, "")],
    "[a barn:a castle:0.5]": [(5, "a barn"), (10, "a castle")],
    "[a barn:a castle:5]": [(5, "a barn"), (10, "a castle")],
    "[a barn:a castle:.25]": [(2, "a barn"), (10, "a castle")],
    "[a barn:a castle:1.0]": [(10, "a barn")],
    "[a barn:a castle:0]": [(10, "a castle")],
    "[a barn:a castle:0.0]": [(10, "a castle")],
    "[a barn:a castle:1]": [(1, "a barn"), (10, "a castle")],
    "[a barn:a castle:99]": [(10, "a barn")],
    "[a barn:a castle:-1]": [(10, "a castle")],
    "[a barn:a castle: 3 ]": [(3, "a barn"), (10, "a castle")],
    "[in the snow:4]": [(4, ""), (10, "in the snow")],
    "a house [in the snow:on fire:0.5], trees": [
        (5, "a house in the snow, trees"), (10, "a house on fire, trees")],
    "a house [in the snow::0.3]": [(3, "a house in the snow"), (10, "a house ")],
    "[:a castle:2]": [(2, ""), (10, "a castle")],
    "[a [b:c:2]:d:6]": [(2, "a b"), (6, "a c"), (10, "d")],
    "[a:b [c:d:8]:6]": [(6, "a"), (8, "b c"), (10, "b d")],
    "[a:b:2] [c:d:4]": [(2, "a c"), (4, "b c"), (10, "b d")],
    "[(a:1.3):b:5]": [(5, "(a:1.3)"), (10, "b")],
    "([a:b:5]:1.2)": [(5, "(a:1.2)"), (10, "(b:1.2)")],
    "[[a]:b:5]": [(5, "[a]"), (10, "b")],
    "[* in the snow:* on fire:0.5]": [(5, "* in the snow"), (10, "* on fire")],
    "[한옥:불난 한옥:0.5]": [(5, "한옥"), (10, "불난 한옥")],
    # emphasis and text as before
    "[a barn]": [(10, "[a barn]")],
    "(a barn)": [(10, "(a barn)")],
    "[[a barn]]": [(10, "[[a barn]]")],
    "a castle at 10:30": [(10, "a castle at 10:30")],
    "[a barn:a castle]": [(10, "[a barn:a castle]")],
    "[a:b:c:0.5]": [(10, "[a:b:c:0.5]")],
    "[a|b:c]": [(10, "[a|b:c]")],
    "[a barn:a castle:0.5": [(10, "[a barn:a castle:0.5")],
    "a barn:a castle:0.5]": [(10, "a barn:a castle:0.5]")],
    r"\[a:b:0.5\]": [(10, r"\[a:b:0.5\]")],
    r"[a\:b:c:5]": [(5, r"a\:b"), (10, "c")],
    "[a:b:1.2.3]": [(10, "[a:b:1.2.3]")],
    "a [b BREAK c:d:5]": [(5, "a b BREAK c"), (10, "a d")],
}  # fmt: skip
ALTERNATING = {  # the texts of the first six steps
    "[a|b]": "a b a b a b",
    "[a|b|c]": "a b c a b c",
    "[a|]": ["a", "", "a", "", "a", ""],
    "x[a|b]": "xa xb xa xb xa xb",
    "[a|[b|c]]": "a c a c a c",
    "[[a|b]:c:3]": "a b a c c c",
    "[a|(b:1.2)]": "a (b:1.2) a (b:1.2) a (b:1.2)",
    r"[a\|b]": [r"[a\|b]"] * 6,
}
PARTS = {
    "a barn AND a castle": [("a barn", 1.0), ("a castle", 1.0)],
    "a barn AND a fire :0.7": [("a barn", 1.0), ("a fire", 0.7)],
    "a barn :1.2 AND a fire:0.7 AND snow :-1": [("a barn", 1.2), ("a fire", 0.7), ("snow", -1.0)],
    "a barn AND": [("a barn", 1.0), ("", 1.0)],
    "a LAND AND a BRAND": [("a LAND", 1.0), ("a BRAND", 1.0)],
    "a barn and a castle": [("a barn and a castle", 1.0)],
    "a barn :0.7": [("a barn :0.7", 1.0)],
    "(a barn AND b:1.2)": [("(a barn", 1.0), ("b:1.2)", 1.0)],
}


@pytest.mark.parametrize("prompt", EDITED)
def test_editing(prompt):
    read = [parts[0][0] for parts in at_steps(prompt, 10)]
    expected = [text for i in range(10) for text in [next(t for last, t in EDITED[prompt] if i < last)]]
    assert read == expected


@pytest.mark.parametrize("prompt", ALTERNATING)
def test_alternation(prompt):
    expected = ALTERNATING[prompt]
    read = [parts[0][0] for parts in at_steps(prompt, 6)]
    assert read == (expected.split() if isinstance(expected, str) else expected)


@pytest.mark.parametrize("prompt", PARTS)
def test_parts(prompt):
    assert at_steps(prompt, 3) == [PARTS[prompt]] * 3


def test_parts_are_edited_each():
    assert at_steps("[a:b:1] AND c :0.5", 2) == [[("a", 1.0), ("c", 0.5)], [("b", 1.0), ("c", 0.5)]]


@pytest.mark.parametrize("text", ["a [b:c:0.5] AND (d)", "BREAK [x|y] AND", "\\[a"])
def test_an_escaped_prompt_is_text(text):
    ((read, weight),) = at_steps(escape_prompt(text), 4)[2]
    assert parse_emphasis(read) == [(text, 1.0)] and weight == 1


@pytest.mark.parametrize(("prompt", "text", "tags"), [
    ("a barn <lora:hanok:0.8>", "a barn", [("lora", "hanok", 0.8)]),
    ("<hypernet:h> a <lora:x:-1> barn", "a barn", [("hypernet", "h", 1.0), ("lora", "x", -1.0)]),
    (r"a \<lora:x:1> barn", r"a \<lora:x:1> barn", []), ("a < b", "a < b", []),
])  # fmt: skip
def test_tags(prompt, text, tags):
    assert take_tags(prompt) == (text, tags)


@pytest.mark.parametrize(("prompt", "named"), [
    ("{a|b} barn", "Dynamic Prompts"), ("__season__ barn", "a wildcard"), ("embedding:hanok", "ComfyUI"),
    ("<lyco:x:1> barn", "a tag"), ("[a barn", "nothing closes"), ("[a:b:c:0.5]", "neither"),
    ("[a|b:c]", "neither"), ("a [b] (c) [d:e:0.5] [f|g] <lora:x:1> AND h \\[ \\{", ""),
])  # fmt: skip
def test_what_is_not_understood_is_named(prompt, named):
    found = not_understood(prompt)
    assert len(found) == 1 and named in found[0] if named else found == []


@pytest.fixture(scope="module")
def sd(sd1):
    return load_model(str(sd1.folder), "cpu", log=None)


def last(sd, prompts: list[str], **options) -> torch.Tensor:
    for x in sd.sample(prompts, list(range(len(prompts))), steps=6, **options):
        pass
    return x


@pytest.mark.parametrize(("one", "two", "equal"), [
    ("[a barn:a castle:1.0]", "a barn", True), ("[a barn:a castle:0]", "a castle", True),
    ("[a barn|a barn]", "a barn", True), ("[a barn:a castle:0.5]", "a barn", False),
    ("[a barn|a castle]", "a castle", False), ("a barn AND a castle :0", "a barn", True),
    ("a barn AND a castle", "a barn", False),
])  # fmt: skip
def test_closed_cases(sd, one, two, equal):
    a, b = last(sd, [one]), last(sd, [two])
    assert torch.allclose(a, b, atol=1e-4) == equal


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_equal_parts_whose_weights_sum_to_one_are_one(sd, cfg):
    one = last(sd, ["a barn"], cfg=cfg)
    assert torch.allclose(last(sd, ["a barn :0.3 AND a barn :0.7"], cfg=cfg), one, atol=1e-4)


def test_the_equation_of_several_parts(sd):
    """uncond + cfg sum_k w_k (eps_k - uncond), by three passes of the network."""
    contexts, weights = sd.contexts(["a barn AND a fire :0.7", "snow :2 AND night"], "a castle", 1, 3.0)
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        together = sd.guided(x, 2.0, 500.0, contexts[0], 3.0, weights)
        for i, parts in enumerate(([("a barn", 1.0), ("a fire", 0.7)], [("snow", 2.0), ("night", 1.0)])):
            t, x_t = torch.tensor([500.0]), x[i : i + 1] / 5**0.5
            uncond = sd.unet(x_t, t, sd.text.prompts(["a castle"]))
            away = [w * (sd.unet(x_t, t, sd.text.prompts([text])) - uncond) for text, w in parts]
            assert (uncond + 3.0 * sum(away) - together[i]).abs().max() < 1e-4


def test_a_batch_of_different_prompts_is_each_alone(sd):
    prompts = ["[a barn:a castle:0.5]", "a tower", "a fire AND snow :0.5", "[a|b]", "a barn " * 40]
    together = sd.draw(prompts, list(range(5)), steps=4, cfg=3.0)
    for i, (prompt, picture) in enumerate(zip(prompts, together, strict=True)):
        (alone,) = sd.draw([prompt], [i], steps=4, cfg=3.0)
        pixels = [torch.tensor(list(p.convert("L").tobytes())) for p in (alone, picture)]
        assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_each_prompt_is_read_once(sd, monkeypatch):
    seen, encode = [], type(sd.text)._encode
    spy = lambda text, ids: (seen.append(len(ids)), encode(text, ids))[1]  # noqa: E731
    monkeypatch.setattr(type(sd.text), "_encode", spy)
    last(sd, ["[a|b]", "[a|b]"])
    assert seen == [2, 2]  # the negative prompt and a; the negative prompt and b: none again at steps 3 to 6


@pytest.fixture(scope="module")
def artefacts(sd1, tmp_path_factory):
    """A LoRA in a run's folder, and a hypernetwork under a name of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "photos").mkdir()
    Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 99).convert("RGB").save(home / "photos/0.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("warnings.showwarning", warnings.showwarning)
        common = "--data photos --resolution 32 --steps 3 --batch-size 1 --lr 0.05 --preview-every 0"
        argv = ["--model", str(sd1.folder), *common.split(), "--token", "sks", "--device", "cpu", "--out"]
        assert train_lora.main([*argv, "runs/house"]) == 0
        assert train_hypernet.main([*argv, "runs/net"]) == 0
        Path("runs/net/hypernet.pt").rename("runs/net/roof.pt")
        yield home


def draw(sd1, out, *argv) -> list[bytes]:
    common = ["--model", str(sd1.folder), "--device", "cpu", "--steps", "3", "--out", out]
    assert sample.main([*argv, *common]) == 0
    return [Image.open(f).convert("RGB").tobytes() for f in sorted(Path(out).glob("0*.png"))]


def test_tags_apply_to_their_prompt_alone(sd1, artefacts, monkeypatch, capsys):
    """As --lora and --hypernet do; the prompt before and after is that of the untouched model."""
    monkeypatch.chdir(artefacts)
    lora, net = "sks <lora:house:0.7>", "a barn <hypernet:roof:0.5>"
    pictures = draw(sd1, "tagged", "sks", lora, net, "a barn")
    plain = draw(sd1, "plain", "sks", "a barn")
    assert [pictures[0], pictures[3]] == plain
    (one,) = draw(sd1, "one", "sks", "--lora", "runs/house/lora.safetensors:0.7")
    (two,) = draw(sd1, "two", "a barn", "--hypernet", "runs/net/roof.pt:0.5")
    assert pictures[1:3] == [one, two] and one != plain[0] and two != plain[1]
    written = [Image.open(f).info["parameters"] for f in sorted(Path("tagged").glob("0*.png"))]
    assert written[1].startswith(lora) and written[2].startswith(net)


def test_a_words_vectors_go_with_their_lora(sd1, artefacts, monkeypatch):
    """Bundled ones as well: the next prompt's "*," is again what the untouched model reads."""
    monkeypatch.chdir(artefacts)
    common = (
        "--data photos --resolution 32 --steps 2 --batch-size 1 --word-lr 0.5 --preview-every 0 --vectors 2"
    )
    argv = ["--model", str(sd1.folder), *common.split(), "--save-every", "0", "--device", "cpu"]
    assert train_lora.main([*argv, "--out", "runs/word"]) == 0
    tagged, after = draw(sd1, "w1", "* <lora:word>", "*, fire")
    (before,), (plain,) = draw(sd1, "w2", "*"), draw(sd1, "w3", "*, fire")
    assert tagged != before and after == plain


@pytest.mark.parametrize(("prompt", "words"), [
    ("<lora:hause:1>", "<lora:hause>: no such file in runs; the nearest is house"),
    ("<lora:zzzz:1>", "<lora:zzzz>: no such file in runs; there is "),
    ("<hypernet:house>", "<hypernet:house>: no such file"),
    ("<lora:house:much>", "the scale is 'much', but must be a number such as 0.8"),
])  # fmt: skip
def test_unknown_tags(sd1, artefacts, monkeypatch, capsys, prompt, words):
    monkeypatch.chdir(artefacts)
    assert sample.main([prompt, "--model", str(sd1.folder), "--out", "never"]) == 2
    assert words in capsys.readouterr().err and not Path("never").exists()


def test_names(tmp_path):
    for file in "a/lora b/lora lora/lora c d/c".split():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.safetensors").touch()
    assert find_artefact("lora", "a", tmp_path, []) == tmp_path / "a/lora.safetensors"
    assert find_artefact("lora", "given", tmp_path, [Path("given.safetensors")]) == Path("given.safetensors")
    assert find_artefact("lora", "lora", tmp_path, []) == tmp_path / "lora/lora.safetensors"
    with pytest.raises(ValueError, match="there are 2 of that name"):
        find_artefact("lora", "c", tmp_path, [])


def test_a_note_names_what_is_drawn_as_text(sd1, artefacts, monkeypatch, capsys):
    monkeypatch.chdir(artefacts)
    draw(sd1, "noted", "a {red|blue} barn")
    assert "note: drawn as plain text: {red|blue} (Dynamic Prompts)" in capsys.readouterr().err
