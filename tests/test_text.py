"""Our text encoder against transformers' (at most 1e-5 apart), and the pseudo word, cut out of the text."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import difference
from safetensors.torch import load_file, save_file

from hanokdiff.formats.folder import load_part
from hanokdiff.formats.tokenizer import load_tokenizer
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.tokens import Text, contains_word

PROMPTS = ["", "a barn on fire", "a photo of *, fire", "(*)", "Ünïcode 한옥, é!", "a  BARN\n in   the snow ."]


@pytest.fixture
def text(sd1, load):
    """A fresh one: words and memory do not leak between tests."""
    return Text(load(sd1).text.encoder, load(sd1).text.tokenizer)


def padded(tokenizer, prompt):
    return tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids


@torch.inference_mode()
def test_encoder_equals_transformers(reference, load):
    """quick_gelu in the one, gelu in the other."""
    ids = torch.randint(0, 525, (3, 77), generator=torch.Generator().manual_seed(1))
    ours, theirs = load(reference).text.encoder, reference.pipeline.text_encoder
    assert ours.config.hidden_act == {"sd1": "quick_gelu", "sd2": "gelu"}[reference.flavour]
    assert difference(ours(ids), theirs(ids).last_hidden_state) <= 1e-5
    assert difference(ours(ids[:, :9]), theirs(ids[:, :9]).last_hidden_state) <= 1e-5


@torch.inference_mode()
def test_prompt_to_context_equals_transformers(reference, load):
    sd, p = load(reference), reference.pipeline
    ids = torch.tensor([padded(p.tokenizer, w) for w in PROMPTS])
    out = sd.text(PROMPTS)
    assert difference(out, p.text_encoder(ids).last_hidden_state) <= 1e-5
    for i in range(1, len(PROMPTS)):
        assert (out[i] - out[0]).abs().max() > 0.1


@torch.inference_mode()
def test_words_see_only_those_before_them(text):
    ids = torch.tensor([text.ids("a barn on fire")])
    other = ids.clone()
    other[0, 4] = 7
    moved = (text.encoder(ids) - text.encoder(other)).abs().amax(dim=(0, 2))
    assert moved[:4].max() == 0 and moved[4:].min() > 1e-3


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
@torch.inference_mode()
def test_names_of_transformers_4_and_5(sd1, load, tmp_path, prefix, position_ids):
    shutil.copytree(sd1.folder / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {prefix + k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    if position_ids:
        tensors[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file)
    ids = torch.arange(77)[None]
    ours = load_part(tmp_path, "text_encoder", TextEncoder, TextConfig)
    assert torch.equal(ours(ids), load(sd1).text.encoder(ids))


def test_config_round_trip_and_unknown_activation(sd2, load):
    c = load(sd2).text.encoder.config
    assert TextConfig.from_json(json.loads(json.dumps(c.to_json()))) == c
    with pytest.raises(ValueError, match='"swish".*quick_gelu, gelu'):
        TextConfig.from_json({**c.to_json(), "hidden_act": "swish"})


def test_defaults_are_clip_l():
    with torch.device("meta"):
        encoder = TextEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480


def test_ids_equal_the_librarys(reference, load):
    """Begin, words, end, padding: with the end token in SD 1, with "!", id 0, in SD 2."""
    text, tokenizer = load(reference).text, reference.pipeline.tokenizer
    for prompt in PROMPTS:
        assert text.ids(prompt) == padded(tokenizer, prompt), prompt
    assert text.ids("")[0] == 523 and text.ids("")[1] == 524
    assert text.ids("")[-1] == (524 if reference.flavour == "sd1" else 0)


def test_tokenizer_from_vocab_and_merges_or_from_one_file(sd1):
    """transformers 5 writes tokenizer.json alone, everything published has vocab.json and merges.txt."""
    both = load_tokenizer(sd1.folder.parent / "sd1-tokenizer"), load_tokenizer(sd1.folder / "tokenizer")
    assert not (sd1.folder.parent / "sd1-tokenizer" / "tokenizer.json").exists()
    for prompt in PROMPTS:
        assert padded(both[0], prompt) == padded(both[1], prompt)


@pytest.mark.parametrize("prompt, plain", [
    ("*, fire", ["*", ", fire"]), ("(*)", ["(", "*", ")"]), ("*.", ["*", "."]), ("a*b", ["a", "*", "b"]),
    ("*", ["*"]), ("a photo of * and *, snow", ["a photo of", "*", "and", "*", ", snow"]), ("**", ["*", "*"]),
])  # fmt: skip
def test_star_is_cut_out(sd1, text, prompt, plain):
    tokenizer = sd1.pipeline.tokenizer
    star = tokenizer("*", add_special_tokens=False).input_ids
    expected = sum((tokenizer(p, add_special_tokens=False).input_ids for p in plain), [])
    text.add_word("*")
    ids = text.ids(prompt)
    assert len(star) == 1 and ids[1 : ids.index(524)] == expected
    assert ids.count(star[0]) == plain.count("*")


def test_a_word_of_letters_only_at_its_boundaries(sd1, text):
    """The tiny vocabulary ends "asks" in the very token of "sks", as BPE may: it must not be taken for it."""
    tokenizer = sd1.pipeline.tokenizer
    sks = tokenizer("sks", add_special_tokens=False).input_ids
    text.add_word("sks")
    for prompt in ("he asks", "skss", "a_sks"):
        assert not contains_word(prompt, "sks")
        assert text.ids(prompt) == padded(tokenizer, prompt)
    for prompt in ("a photo of sks barn", "SKS, fire", "(sks)", "sks"):
        assert contains_word(prompt, "sks")
        assert sks[0] in text.ids(prompt)
    assert text.ids("sks, fire") == padded(tokenizer, "sks , fire")


@pytest.mark.parametrize("extra", [0, 1, 25])
def test_long_prompt_is_cut_with_a_warning(sd1, text, extra):
    prompt = " ".join(["barn"] * 75 + ["fire"] * extra)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = text.ids(prompt)
        text.ids(prompt)  # said once
    assert ids == padded(sd1.pipeline.tokenizer, prompt) and len(ids) == 77 and ids[-1] == 524
    assert len(caught) == (extra > 0)
    if extra:
        assert f'lost: "{" ".join(["fire"] * extra)}' in str(caught[0].message)
        assert "barn" not in str(caught[0].message)


def test_warns_without_word(text):
    text.add_word("*")
    with pytest.warns(UserWarning, match='"a barn" does not contain "\\*"'):
        text.warn_without_word(["a barn"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.warn_without_word(["(*), fire"])


@torch.inference_mode()
def test_remember_gives_the_same_contexts(text):
    text.add_word("*")
    prompts = ["*, fire", "a barn", "*, fire", ""] + [f"barn {i}" for i in range(40)]
    fresh = text(prompts)
    text.cache_prompts(prompts)
    calls = []
    text.encoder, encoder = lambda ids: calls.append(ids), text.encoder
    remembered = text(prompts)
    assert not calls and difference(remembered, fresh) <= 1e-5
    text.encoder = encoder
    assert difference(text(["a barn", "something else"])[:1], fresh[1:2]) <= 1e-5
