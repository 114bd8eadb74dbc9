"""Emphasis and chunks by worked examples and closed formulas, contexts against transformers' encoder, pseudo
words in all of it."""

import warnings

import pytest
import torch
from conftest import difference
from hypothesis import example, given
from hypothesis import strategies as st

from hanokdiff.models.prompt import escape_prompt, parse_emphasis, split_chunks
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.tokens import Text

DOWN = 1 / 1.1
PARSED = [  # the WebUI's answers, worked out by hand; None is a BREAK
    ("", [("", 1)]),
    ("normal text", [("normal text", 1)]),
    ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
    ("((x))", [("x", 1.21)]),
    ("[x]", [("x", DOWN)]),
    ("[[x]]", [("x", DOWN * DOWN)]),
    ("a([x])b", [("axb", 1)]),
    ("(x:1.3)", [("x", 1.3)]),
    ("(x: 1.3 ) y", [("x", 1.3), (" y", 1)]),
    ("(x:-.5)(y:+2)(z:0)", [("x", -0.5), ("y", 2), ("z", 0)]),
    ("((a:1.2) b:0.5)", [("a", 0.6), (" b", 0.5)]),
    ("(a [b] (c:2))", [("a ", 1.1), ("b", 1), (" ", 1.1), ("c", 2.2)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
     [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
      ("sky", 1.4641), (".", 1.1)]),
    ("[x:1.3]", [("x:1.3", DOWN)]),  # not a weight in square brackets
    ("a:b 12:30", [("a:b 12:30", 1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("x:1.3)", [("x:1.3)", 1)]),
    ("(x:.)", [("x:.)", 1.1)]),  # no number: text
    (r"\(x\) \[y\] \\", [(r"(x) [y] " + "\\", 1)]),
    (r"\(literal\]", [("(literal]", 1)]),
    (r"(\(x\):1.3)", [("(x)", 1.3)]),
    (r"(x\:1.3)", [("x", 1.3)]),  # a backslash before anything else goes, as there
    (r"a\b" + "\\", [("ab", 1)]),
    ("(x", [("x", 1.1)]),
    ("((x", [("x", 1.21)]),
    ("(a [b", [("a ", 1.1), ("b", 1)]),
    ("a) b]", [("a) b]", 1)]),
    ("(a))", [("a", 1.1), (")", 1)]),
    ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", DOWN)]),  # each kind closes its own
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a BREAK b", [("a", 1), None, ("b", 1)]),
    ("a\n BREAK\n\nBREAK b", [("a", 1), None, ("", 1), None, ("b", 1)]),
    ("BREAK", [("", 1), None, ("", 1)]),
    ("BREAKS break OUTBREAK", [("BREAKS break OUTBREAK", 1)]),
    ("(a BREAK b:1.3) c", [("a", 1.3), None, ("b", 1.3), (" c", 1)]),
]  # fmt: skip


@pytest.mark.parametrize("prompt, expected", PARSED, ids=[p for p, _ in PARSED])
def test_parse(prompt, expected):
    pieces = parse_emphasis(prompt)
    assert [p and p[0] for p in pieces] == [p and p[0] for p in expected]
    weights = [[p[1] for p in some if p] for some in (pieces, expected)]
    assert weights[0] == pytest.approx(weights[1])


MARKED = st.lists(st.sampled_from(["BREAK", *"()[]\\:.1a \n"])).map("".join)


@given(st.text() | MARKED)
@example("a BREAK (b:1.3) \\BREAK\\")
def test_escape_is_undone_by_parse(text):
    assert parse_emphasis(escape_prompt(text)) == [(text, 1.0)]


@given(MARKED)
def test_parse_takes_anything(text):
    """No text is an error, and none of its letters gets lost."""
    pieces = [p for p in parse_emphasis(text) if p]
    assert "".join(p[0] for p in pieces).count("a") == text.count("a")


COMMA = 0
CHUNKS = {  # runs of tokens, "," a comma, "|" a BREAK, (n,) a word of n vectors -> sizes of the chunks
    "nothing": ([], [0]),
    "75": ([75], [75]),
    "76": ([76], [75, 1]),
    "150": ([150], [75, 75]),
    "151": ([151], [75, 75, 1]),
    "comma near": ([60, ",", 20], [61, 20]),
    "comma 20 back": ([55, ",", 20], [56, 20]),
    "comma 21 back": ([54, ",", 21], [75, 1]),
    "comma near, but all fits": ([60, ",", 14], [75]),
    "the nearest of two": ([58, ",", 3, ",", 20], [63, 20]),
    "comma is the 75th": ([74, ",", 5], [75, 5]),
    "comma is the 76th": ([75, ",", 5], [75, 6]),
    "comma in the second": ([75, 60, ",", 20], [75, 61, 20]),
    "a comma counts once": ([60, ",", 90], [61, 75, 15]),
    "break": ([3, "|", 5], [3, 5]),
    "breaks": (["|", 3, "|", "|", 5, "|"], [0, 3, 0, 5]),
    "break forgets the comma": ([60, ",", "|", 76], [61, 75, 1]),
    "vectors fit": ([72, (3,)], [75]),
    "vectors do not fit": ([73, (3,), 2], [73, 5]),
    "vectors after a comma": ([70, ",", 4, (72,), 3], [71, 4, 75]),
    "vectors alone": ([(75,), 1], [75, 1]),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_chunks(kind):
    runs, sizes = CHUNKS[kind]
    lists: list = []
    for run in runs:
        plain = [[1] * run[0]] if isinstance(run, tuple) else [[1]] * (run if isinstance(run, int) else 0)
        lists += {",": [[COMMA]], "|": [None]}.get(run, plain)
    units = [own and ([i * n for n in own], float(i)) for i, own in enumerate(lists, 1)]
    done = split_chunks(units, 75, COMMA)
    assert [len(ids) for ids, _ in done] == sizes
    assert sum((ids for ids, _ in done), []) == sum((u[0] for u in units if u), [])
    assert sum((w for _, w in done), []) == sum(([u[1]] * len(u[0]) for u in units if u), [])


@pytest.fixture
def text(sd1, load):
    """A fresh one: words and memory do not leak between tests."""
    return Text(load(sd1).text.encoder, load(sd1).text.tokenizer)


def tokens(tokenizer, *parts: str) -> list[int]:
    return sum((tokenizer(p, add_special_tokens=False).input_ids for p in parts), [])


def wrapped(tokenizer, ids: list[int]) -> list[int]:
    return [523, *ids, 524] + [tokenizer.pad_token_id] * (75 - len(ids))


PLAIN = ["", "a barn on fire", "Ünïcode 한옥, é!", "a:b  at 12:30", "barn " * 75]


@torch.inference_mode()
def test_plain_prompts_are_captions_to_the_bit(reference, load):
    text = load(reference).text
    for prompts in (PLAIN, *([p] for p in PLAIN)):
        out = text.prompts(prompts)
        assert out.shape == (len(prompts), 77, 48) and torch.equal(out, text(prompts))


WEIGHED = {  # a prompt, its parts as they are tokenised, their weights
    "a (barn:1.4), [fire] snow": (["a", "barn", ",", "fire", "snow"], [1, 1.4, 1, DOWN, 1]),
    "((a barn)) on (fire:0)": (["a barn", "on", "fire"], [1.21, 1, 0]),
    "(a barn on fire:-0.7)": (["a barn on fire"], [-0.7]),
    "as(ks)": (["as", "ks"], [1, 1.1]),  # parts are tokenised each alone
}


@pytest.mark.parametrize("prompt", WEIGHED)
@torch.inference_mode()
def test_emphasis_multiplies_and_gives_the_mean_back(reference, load, prompt):
    """Recomputed from transformers' output; in a batch too, where the others do not notice."""
    parts, weights = WEIGHED[prompt]
    text, p = load(reference).text, reference.pipeline
    each = [tokens(p.tokenizer, part) for part in parts]
    z = p.text_encoder(torch.tensor([wrapped(p.tokenizer, sum(each, []))])).last_hidden_state
    w = [1.0, *(w for ids, w in zip(each, weights, strict=True) for _ in ids)]
    weighed = z * torch.tensor(w + [1.0] * (77 - len(w)))[:, None]
    expected = weighed * (z.mean() / weighed.mean())
    together = text.prompts(["a barn", prompt, "(fire)"])
    assert difference(text.prompts([prompt]), expected) <= 1e-5 * max(1, expected.abs().max())
    assert difference(together[1:2], expected) <= 1e-5 * max(1, expected.abs().max())
    assert difference(together[:1], text(["a barn"])) <= 1e-5
    assert (expected - z).abs().max() > 1e-2


@torch.inference_mode()
def test_long_prompts_are_chunks_end_to_end(reference, load):
    """Each encoded alone; shorter ones are filled with the empty prompt; emphasis is of each chunk."""
    text, barn, fire = load(reference).text, "barn " * 75, "fire " * 5
    barns, fires, empty = text([barn, fire, ""])
    prompts = [barn + fire, fire, f"{fire}BREAK {barn}", f"{barn}(fire fire:2)"]
    long, short, broken, loud = text.prompts(prompts)
    for ours, expected in ((long, (barns, fires)), (short, (fires, empty)), (broken, (fires, barns))):
        assert difference(ours, torch.cat(expected)) <= 1e-5
    assert difference(loud[:77], barns) <= 1e-5
    assert difference(loud[77:], text.prompts(["(fire fire:2)"])[0]) <= 1e-5
    assert (loud[77:] - text(["fire fire"])[0]).abs().max() > 0.1 and (fires - empty).abs().max() > 0.1
    assert text.prompts(["barn " * 151]).shape == (1, 3 * 77, 48)


@torch.inference_mode()
def test_comma_moves_the_torn_phrase_to_the_next_chunk(text):
    out = text.prompts(["barn " * 70 + ", " + "fire " * 5])
    assert difference(out[0], torch.cat([*text(["barn " * 70 + ",", "fire " * 5])])) <= 1e-5


@pytest.mark.parametrize("n", [1, 2, 3])
@torch.inference_mode()
def test_clip_skip_equals_hidden_states(sd1, load, text, n):
    p, prompts = sd1.pipeline, ["a barn on fire", ""]
    ids = torch.tensor([wrapped(p.tokenizer, tokens(p.tokenizer, *([w] if w else []))) for w in prompts])
    hidden = p.text_encoder(ids, output_hidden_states=True).hidden_states
    expected = p.text_encoder.final_layer_norm(hidden[-n])
    plain = text(prompts)
    text.cache_prompts(prompts)
    text.skip(n)  # and forgets what it knew
    again = Text(text.encoder, text.tokenizer, clip_skip=n)
    for out in (text(prompts), text.prompts(prompts), again(prompts)):
        assert difference(out, expected) <= 1e-5
    assert (expected - plain).abs().max() > 0.1 or n == 1


@pytest.mark.parametrize("n", [0, -1, 4, 99])
def test_clip_skip_out_of_range(text, n):
    with pytest.raises(ValueError, match=f"clip skip is {n}, but the text encoder has 3 layers: 1 to 3"):
        text.skip(n)
    assert text.clip_skip == 1


@torch.inference_mode()
def test_sd2_has_no_clip_skip(sd1, load):
    """Its last layer is always left out: told, and ignored. Known by its width of 1024 alone."""
    tokenizer, ids = load(sd1).text.tokenizer, [523, 7, 524]
    for width, heads in ((1024, 16), (48, 4)):
        c = TextConfig(525, width, 8, 2, heads, max_position_embeddings=len(ids))
        text = Text(TextEncoder(c), tokenizer)
        before = text._encode([ids])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            text.skip(1), text.skip(2)
        told = ["clip skip has no effect on SD 2" in str(w.message) for w in caught]
        assert told == [True] * (width == 1024)
        assert torch.equal(text._encode([ids]), before) == (width == 1024)


NEW = [900, 901]  # ids of the word in what follows
WORDS = [  # word, prompt, its parts as they are tokenised (True is the word) with their weights
    ("*", "(*, fire:1.3)", [(True, 1.3), (", fire", 1.3)]),
    ("*", "a (*:0.5), (fire)", [("a", 1), (True, 0.5), (",", 1), ("fire", 1.1)]),
    ("*", "(*)", [(True, 1.1)]),
    ("*", r"\(*\) \*", [("(", 1), (True, 1), (")", 1), (True, 1)]),
    ("sks", "(asks:1.2) sks", [("asks", 1.2), (True, 1)]),
    ("sks", "as(ks) [SKS]", [("as", 1), ("ks", 1.1), (True, DOWN)]),
    ("[V]", "a [V] barn", [("a", 1), (True, 1), ("barn", 1)]),
    ("[V]", "([v]:1.5), [fire]", [(True, 1.5), (",", 1), ("fire", DOWN)]),
    ("[V]", r"\[V\] fire", [(True, 1), ("fire", 1)]),
    ("(x:2)", "fire (x:2) (y:2)", [("fire", 1), (True, 1), ("y", 2)]),
    ("<hanok>", "<hanok>, (<hanok>:2)", [(True, 1), (",", 1), (True, 2)]),
    ("old barn", "an (old  BARN:2) old", [("an", 1), (True, 2), ("old", 1)]),
]  # fmt: skip


@pytest.mark.parametrize("word, prompt, expected", WORDS)
def test_pseudo_words_in_prompts(sd1, text, word, prompt, expected):
    text.add_word(word, NEW)
    parts = [(NEW if part is True else tokens(sd1.pipeline.tokenizer, part), w) for part, w in expected]
    [(ids, weights)] = text.chunks(prompt)
    assert ids == sum((own for own, _ in parts), [])
    assert weights == pytest.approx([w for own, w in parts for _ in own])


@pytest.mark.parametrize("word", ["*", "[V]", "BREAK", "sks"])
@torch.inference_mode()
def test_captions_have_no_emphasis_and_escaped_they_are_prompts(text, word):
    text.add_word(word)
    captions = [f"({word})", f"{word}, fire:1.3)", f"a [{word}] BREAK \\ barn", f"[{word}:2"]
    assert torch.equal(text.prompts([escape_prompt(c) for c in captions]), text(captions))
    for caption in captions:
        ids = text.ids(caption)
        assert any(ids[i : i + len(text.words[word])] == text.words[word] for i in range(77))


@pytest.mark.parametrize("order", [1, -1])
def test_several_words_the_longest_first(sd1, text, order):
    ids = {"hanok": [900], "hanok-gate": [901, 902], "hanok gate": [903], "*": [904]}
    for word in list(ids)[::order]:
        text.add_word(word, ids[word])
    comma = tokens(sd1.pipeline.tokenizer, ",")
    expected = [901, 902, *comma, 900, *comma, 903, *comma, 904, 900, 904]
    prompt = "hanok-gate, Hanok, hanok\n gate, *hanok*"
    assert text.chunks(prompt)[0][0] == expected and text.ids(prompt)[1 : 1 + len(expected)] == expected
    assert not {900, 901, 902, 903} & set(text.ids("hanoks, ahanok-gates"))


def test_words_of_several_vectors_are_not_torn(text):
    text.add_word("*", [900, 901, 902])
    first, second = text.chunks("barn " * 73 + "(*:2) fire")
    assert len(first[0]) == 73 and second[0][:3] == [900, 901, 902] and second[1] == [2, 2, 2, 1]


def test_a_word_must_be_one(text):
    for word in ("", "  "):
        for ids in (None, [900]):
            with pytest.raises(ValueError, match="no token"):
                text.add_word(word, ids)
    assert not text.words


@pytest.mark.parametrize("prompt, found", [
    ("*, fire", 0), ("* in the fire", 1), ("(*)", 0), ("* * *.", 2), ("a*b", 1),
])  # fmt: skip
def test_literal_tokens_find_words_by_their_ids(sd1, text, prompt, found):
    """As other tools do: "*," is another symbol, and the word is lost. With words cut out, it never is."""
    text.add_word("*", NEW)
    assert text.ids(prompt).count(900) == prompt.count("*")
    text.literal_tokens = True
    ids = text.ids(prompt)
    assert ids.count(900) == ids.count(901) == found
    star = tokens(sd1.pipeline.tokenizer, "*")
    plain = [i for i in Text(text.encoder, text.tokenizer).ids(prompt) if i not in (524, *star)]
    assert [i for i in ids if i not in (524, *NEW)] == plain  # nothing else changes


def test_literal_tokens_of_words_within_words(sd1, text):
    """A word whose ids begin with another's stays whole."""
    for word in ("barn fire", "barn"):
        text.add_word(word)
    text.literal_tokens = True
    assert text.ids("a barn fire, barn")[1:6] == tokens(sd1.pipeline.tokenizer, "a barn fire, barn")
