"""Textual inversion: rows beyond the vocabulary that leave no trace, every layout of file in and out."""

import copy
import pickle
import pickletools
import warnings
from functools import partial

import pytest
import torch
from conftest import difference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_scripts import hashes
from torch import nn

import train_ti
from hanokdiff.formats import embedding_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import textual_inversion
from hanokdiff.models.tokens import Text

PROMPTS = ["a barn on * fire", "*, barn", "a barn", ""]
FIRST = 525  # the vocabulary of the tiny models


@pytest.fixture
def sd(sd1, load):
    """The model with a Text of its own, and after the test again without rows."""
    made, holder = load(sd1), load(sd1).text.encoder.embeddings
    text, table = made.text, holder.token_embedding
    made.text = Text(text.encoder, text.tokenizer)
    yield made
    made.text, holder.token_embedding = text, table


def vectors(n: int, seed: int = 0, width: int = 48) -> torch.Tensor:
    return 0.5 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def refused(action, *words) -> None:
    """It fails in one sentence that holds these words."""
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(str(w) in message for w in words), (words, message)


@torch.inference_mode()
def test_insert_and_remove_leave_no_trace(sd):
    holder = sd.text.encoder.embeddings
    table, before = holder.token_embedding, sd.text(PROMPTS)
    sd.text.cache_prompts(PROMPTS)
    rows = textual_inversion.insert(sd, "*", vectors(3))
    assert sd.text.words == {"*": [FIRST, FIRST + 1, FIRST + 2]}
    assert textual_inversion.token_embedding(sd) is table.weight
    assert torch.equal(holder.token_embedding(torch.arange(FIRST + 3)), torch.cat([table.weight, vectors(3)]))
    with_it = sd.text(PROMPTS)
    assert (with_it - before).abs().amax((1, 2))[:2].min() > 0.1 and torch.equal(with_it[2:], before[2:])
    sd.text.cache_prompts(PROMPTS)
    textual_inversion.remove(sd, "*", rows)
    assert holder.token_embedding is table and sd.text.words == {}
    assert torch.equal(sd.text(PROMPTS), before)


@pytest.mark.parametrize("order", [1, -1])
@torch.inference_mode()
def test_two_words_removed_in_either_order(sd, order):
    prompts = ["a barn", "* on fire", "red, barn", "(*) red"]
    plain = sd.text(prompts)
    words, alone = {"*": vectors(2), "red": vectors(3, seed=1)}, {}
    for word, v in words.items():
        rows = textual_inversion.insert(sd, word, v)
        alone[word] = sd.text(prompts)
        textual_inversion.remove(sd, word, rows)
    rows = {word: textual_inversion.insert(sd, word, v) for word, v in words.items()}
    ids = sd.text.ids(prompts[3])
    assert [i for i in ids if i >= FIRST] == [525, 526, 527, 528, 529]
    embedded = sd.text.encoder.embeddings.token_embedding(torch.tensor([525, 526, 527, 528, 529]))
    assert torch.equal(embedded, torch.cat([*words.values()]))
    both = sd.text(prompts)
    assert torch.equal(both[1], alone["*"][1]) and torch.equal(both[2], alone["red"][2])
    first, second = list(words)[::order]
    textual_inversion.remove(sd, first, rows[first])
    assert torch.equal(sd.text(prompts), alone[second])
    # never on the rows of one that is still there
    third = textual_inversion.insert(sd, "blue", vectors(2, seed=2))
    assert not set(sd.text.words["blue"]) & set(sd.text.words[second])
    assert torch.equal(sd.text(prompts), alone[second])
    textual_inversion.remove(sd, second, rows[second])
    textual_inversion.remove(sd, "blue", third)
    assert sd.text.words == {} and torch.equal(sd.text(prompts), plain)


def test_one_word_twice(sd):
    """The later rows have it, and keep it when the earlier ones go."""
    old, new = (textual_inversion.insert(sd, word, vectors(1, i)) for i, word in enumerate(("Red", "red")))
    assert sd.text.words == {"red": [FIRST + 1]}
    textual_inversion.remove(sd, "Red", old)
    assert sd.text.words == {"red": [FIRST + 1]}
    textual_inversion.remove(sd, "red", new)
    assert untouched(sd)


def untouched(sd) -> bool:
    table = sd.text.encoder.embeddings.token_embedding
    return sd.text.words == {} and not isinstance(table, textual_inversion.ExtendedEmbedding)


def test_gradient_on_the_rows_only(sd):
    rows = textual_inversion.insert(sd, "*", vectors(2))
    other = textual_inversion.insert(sd, "red", vectors(1))
    sd.text(["* on fire", "a barn"]).square().sum().backward()
    assert rows.vectors.grad.abs().amax(1).min() > 1e-3 and not other.vectors.grad.any()
    learn = {name for name, p in sd.text.encoder.named_parameters() if p.requires_grad or p.grad is not None}
    assert learn == {"embeddings.token_embedding.vectors", "embeddings.token_embedding.base.vectors"}


@torch.inference_mode()
def test_a_copied_row_is_the_word_it_was_copied_from(sd):
    """At step 0, to the bit; one vector or several."""
    for word in ("barn", "fire barn"):
        ids = sd.text._tokens(word)
        rows = textual_inversion.insert(sd, "*", textual_inversion.initial_vectors(sd, word, len(ids)))
        prompts = ["a {} on fire", "{}", "(fire, {}: 1.3)"]
        star, plain = ([p.format(w) for p in prompts] for w in ("*", word))
        assert torch.equal(sd.text(star), sd.text(plain))
        assert torch.equal(sd.text.prompts(star), sd.text.prompts(plain))
        textual_inversion.remove(sd, "*", rows)


@pytest.mark.parametrize("n, taken", [
    (1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 0, 1, 2]), (7, [0, 0, 0, 1, 1, 2, 2]),
])  # fmt: skip
def test_start_stretches_the_words(sd, n, taken):
    ids = sd.text._tokens("a barn fire")
    expected = textual_inversion.token_embedding(sd)[[ids[i] for i in taken]]
    assert len(ids) == 3
    assert torch.equal(textual_inversion.initial_vectors(sd, "a barn fire", n), expected)
    refused(lambda: textual_inversion.initial_vectors(sd, " ", n), "--init", "no token")


@pytest.mark.parametrize("hold", [True, False])
def test_hold_norm(sd, hold):
    """Lengths stay, directions learn; without it both move."""
    rows = textual_inversion.insert(sd, "*", vectors(3))
    rows.hold_norm = hold
    before, optimizer = rows.current().detach().clone(), torch.optim.SGD([rows.vectors], 0.01)
    assert (before - vectors(3)).abs().max() < 1e-6
    for _ in range(3):
        optimizer.zero_grad()
        sd.text(["* on fire"])[0, 1:4].pow(3).sum().backward()
        optimizer.step()
    after = rows.current().detach()
    assert (torch.cosine_similarity(after, before) < 0.999).all()
    assert (difference(after.norm(dim=1), before.norm(dim=1)) < 1e-6) == hold
    embedded = sd.text.encoder.embeddings.token_embedding(torch.arange(FIRST, FIRST + 3))
    assert torch.equal(embedded, rows.current())


@pytest.mark.parametrize("n", [0, 76])
def test_a_word_of_too_many_vectors(sd, n):
    """No prompt could hold it; and of none at all."""
    refused(lambda: textual_inversion.insert(sd, "*", torch.ones(n, 48)), n, "1 to 75")
    refused(lambda: textual_inversion.insert(sd, " ", torch.ones(1, 48)), "no token")
    assert untouched(sd)


@pytest.mark.parametrize("hold", [[], ["--hold-norm"]])
def test_training_moves_the_rows_alone(tmp_path, monkeypatch, hold, capsys):
    seen, load, out = {}, load_model, tmp_path / "run"

    def spy(*args, **options):
        seen["sd"] = load(*args, **options)
        seen["before"] = hashes(seen["sd"])
        return seen["sd"]

    monkeypatch.setattr(train_ti, "load_model", spy)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    how = "--steps 3 --images 2 --batch-size 2 --vectors 3 --device cpu --preview-every 0 --save-every 0"
    argv = [*how.split(), "--init", "a house", "--out", str(out), *hold]
    assert train_ti.main(argv) == 0
    sd = seen["sd"]
    assert hashes(sd) == seen["before"] and len(seen["before"]) > 100
    word, learnt, metadata = embedding_file.read_file(out / "embedding.safetensors")
    begun = textual_inversion.initial_vectors(sd, "a house", 3)
    assert (word, learnt.shape, metadata["step"], metadata["model"]) == ("*", (3, 72), "3", "tiny")
    assert (learnt - begun).abs().amax(1).min() > 1e-3
    assert (difference(learnt.norm(dim=1), begun.norm(dim=1)) < 1e-5) == bool(hold)
    assert 'trains 3 vectors of "a house", 216 parameters' in capsys.readouterr().out


V = vectors(2)


def webui(v=V, **more) -> dict:
    words = {"string_to_token": {"*": 265}, "string_to_param": {"*": v}, "name": "own", "step": 7}
    return {**words, "sd_checkpoint": None, "sd_checkpoint_name": None, **more}


def first_of_all(v=V) -> dict:
    """What the paper's own code writes."""
    params = nn.ParameterDict({"*": nn.Parameter(v)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}


LAYOUTS = {  # file name, its content, the word found in it
    "webui": ("file.pt", webui(), "own"),
    "webui, half": ("file.pt", webui(V.half()), "own"),
    "webui, a parameter": ("file.pt", webui(nn.Parameter(V)), "own"),
    "webui, nameless": ("file.pt", webui(name=None), "file"),
    "webui, another key": ("file.pt", webui(string_to_param={"x": V}), "own"),
    "paper": ("file.pt", first_of_all(), "file"),
    "kohya": ("file.safetensors", {"emb_params": V}, "file"),
    "kohya .pt": ("file.pt", {"emb_params": V}, "file"),
    "diffusers": ("learned_embeds.safetensors", {"<hanok>": V}, "<hanok>"),
    "diffusers, bf16": ("learned_embeds.safetensors", {"<hanok>": V.bfloat16()}, "<hanok>"),
    "diffusers .bin": ("learned_embeds.bin", {"<hanok>": V}, "<hanok>"),
}


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_read(tmp_path, sd, kind, old, dims):
    """In torch's older container and in the newer one; one vector may have one dimension."""
    name, content, word = LAYOUTS[kind]
    if dims == 1:
        content = {k: v[0] if isinstance(v, torch.Tensor) else v for k, v in content.items()}
        if params := content.get("string_to_param"):
            one = {k: type(v)(v.detach()[0]) for k, v in params.items()}
            content["string_to_param"] = type(params)(one)
    file, expected = tmp_path / name, V if dims == 2 else V[:1]
    if file.suffix == ".safetensors":
        save_file(content, file, {"ss_steps": "7"})
    else:
        torch.save(content, file, _use_new_zipfile_serialization=not old)
    # newer than that container; there torch asks for a class where it allows none
    if kind == "paper" and old:
        return refused(lambda: embedding_file.read_file(file), file, "could be any code", ".safetensors")
    found, out, metadata = embedding_file.read_file(file)
    assert found == word and out.dtype == torch.float32
    assert not out.requires_grad and type(out) is torch.Tensor
    assert out.shape == expected.shape and (out - expected).abs().max() <= (1e-2 if "f" in kind[-5:] else 0)
    assert metadata == ({"ss_steps": "7"} if file.suffix == ".safetensors" else {})
    lines = []
    assert embedding_file.apply_file(sd, file, log=lines.append)[0] == word
    assert len(sd.text.words[word]) == len(expected) and f'"{word}"' in lines[0]


REFUSED = {  # what is wrong -> file name, content, what the sentence says
    "sdxl": ("a.safetensors", {"clip_l": V, "clip_g": torch.ones(2, 64)}, ["SDXL"]),
    "sdxl .pt": ("a.pt", {"clip_g": V}, ["SDXL"]),
    "two tensors": ("a.safetensors", {"a": V, "b": V + 1}, ["one tensor is expected, 2 found"]),
    "two params": ("a.pt", webui(string_to_param={"*": V, "+": V}), ["one tensor is expected, 2 found"]),
    "no params": ("a.pt", webui(string_to_param={}), ["one tensor is expected, 0 found"]),
    "no tensor": ("a.pt", webui(string_to_param={"*": [1.0]}), ["not a textual inversion embedding"]),
    "nothing": ("a.pt", {}, ["0 found"]),
    "a list": ("a.pt", [V], ["0 found"]),
    "three dimensions": ("a.pt", {"a": V[None]}, ["(1, 2, 48)"]),
    "a number": ("a.pt", {"a": V[0, 0].clone()}, ["shape ()"]),
    "no vectors": ("a.pt", {"a": V[:0]}, ["(0, 48)"]),
    "too many": ("a.safetensors", {"a": torch.ones(76, 48)}, ["(76, 48)", "1 to 75"]),
    "whole numbers": ("a.pt", {"a": torch.ones(2, 48, dtype=torch.int64)}, ["int64"]),
    "nan": ("a.pt", webui(torch.full((2, 48), torch.nan)), ["not finite"]),
    "infinite": ("a.safetensors", {"a": torch.full((2, 48), torch.inf)}, ["not finite"]),
    "a model": ("a.safetensors", {f"layer.{i}": V + i for i in range(9)}, ["9 found"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_embedding_is_refused(tmp_path, sd, kind):
    name, content, words = REFUSED[kind]
    (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    refused(lambda: embedding_file.apply_file(sd, tmp_path / name, log=None), tmp_path / name, *words)
    assert sd.text.words == {}


@pytest.mark.parametrize("width, made", [(768, "SD 1.x"), (1024, "SD 2.x"), (1280, "another architecture")])
def test_of_another_width(tmp_path, sd, width, made):
    embedding_file.save_file(tmp_path / "a.pt", "*", torch.ones(1, width))
    refused(lambda: embedding_file.apply_file(sd, tmp_path / "a.pt", log=None), width, made, 48, "a.pt")
    assert untouched(sd)


class Trap:
    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("where", ["top", "name", "parameters", "vector"])
def test_code_is_not_run(tmp_path, where, old):
    param = nn.ParameterDict({"*": nn.Parameter(V)})
    param.more = Trap()
    whole = {"top": Trap(), "name": webui(name=Trap()), "vector": webui(Trap())}
    content = {**whole, "parameters": {"string_to_param": param}}[where]
    file = tmp_path / "a.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    Trap.sprung = False
    refused(lambda: embedding_file.read_file(file), file, "could be any code", ".safetensors")
    assert not Trap.sprung
    torch.load(file, weights_only=False)
    assert Trap.sprung, "the trap does not work, the test proves nothing"


def test_files_that_are_no_files(tmp_path):
    """Damaged ones: robustness/test_fuzz.py."""
    (tmp_path / "folder.pt").mkdir()
    for name in ("a.safetensors", "a.pt", "a.bin", "folder.pt"):
        refused(lambda name=name: embedding_file.read_file(tmp_path / name), "no embedding file at", name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_written_and_read_again(tmp_path, name):
    learnt = nn.Parameter(V.clone())
    embedding_file.save_file(tmp_path / name, "<hanok>", learnt * 1, {"step": 300, "model": "tiny"})
    word, out, metadata = embedding_file.read_file(tmp_path / name)
    assert word == "<hanok>" and torch.equal(out, V) and [p.name for p in tmp_path.iterdir()] == [name]
    if name == "a.safetensors":
        assert metadata == {"step": "300", "model": "tiny"}
        assert list(load_file(tmp_path / name)) == ["<hanok>"]
        with safe_open(tmp_path / name, "pt") as f:
            assert f.get_tensor("<hanok>").dtype == torch.float32


def test_what_cannot_be_written(tmp_path):
    for file in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        for bad in (torch.full((1, 4), torch.nan), torch.full((1, 4), torch.inf)):
            refused(partial(embedding_file.save_file, file, "*", bad), file, "not finite")
    refused(lambda: embedding_file.save_file(tmp_path / "a.bin", "*", V), ".safetensors or .pt", "'.bin'")
    assert not list(tmp_path.iterdir())


ADMITTED = {  # FORMATS.md 0.1: what the WebUI's checker lets through
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", f"{t}Storage") for t in ("Float", "Half", "BFloat16", "Int", "Long", "Double", "Byte")),
}  # fmt: skip


class Checker(pickle.Unpickler):
    def find_class(self, module, name):
        assert (module, name) in ADMITTED, (module, name)
        return super().find_class(module, name) if module == "collections" else lambda *_: None

    def persistent_load(self, saved):
        assert saved[0] == "storage"


@pytest.mark.parametrize("metadata", [{}, {"step": 300, "model": "tiny", "more": 1}])
def test_the_webuis_file_passes_its_checker(tmp_path, metadata):
    """The older container, five pickles of plain things; weights_only is as content."""
    file = tmp_path / "hanok.pt"
    embedding_file.save_file(file, "hanok", nn.Parameter(V).double(), metadata)
    assert file.read_bytes()[:2] == b"\x80\x02"  # no zip: torch's members of today are refused there
    with open(file, "rb") as f:
        contents = [Checker(f).load() for _ in range(5)]
        f.seek(0)
        asked = [arg for _ in range(5) for op, arg, _ in pickletools.genops(f) if "GLOBAL" in op.name]
    assert contents[:2] == [0x1950A86A20F9469CFC6C, 1001]
    assert contents[3].keys() == webui().keys()
    assert {tuple(a.split(" ")) for a in asked} <= ADMITTED and len(asked) >= 2
    held = torch.load(file, weights_only=True)
    assert torch.equal(held.pop("string_to_param")["*"], V)
    own = dict(name="hanok", step=metadata.get("step", 0), sd_checkpoint_name=metadata.get("model"))
    assert held == {"string_to_token": {"*": 265}, "sd_checkpoint": None, **own} and type(held["step"]) is int


@pytest.mark.parametrize("n, ending", [(1, ".safetensors"), (3, ".safetensors"), (3, ".pt")])
def test_diffusers_reads_it_and_draws_the_same(sd1, sd, tmp_path, n, ending):
    from diffusers import StableDiffusionPipeline

    file, prompts = tmp_path / f"hanok{ending}", ["a <hanok> on fire", "a barn, <hanok>"]
    embedding_file.save_file(file, "<hanok>", vectors(n), {"step": 1})
    parts = sd1.pipeline.components
    own = {name: copy.deepcopy(parts[name]) for name in ("text_encoder", "tokenizer")}
    pipeline = StableDiffusionPipeline(**{**parts, **own}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def theirs():
        how = dict(num_inference_steps=2, guidance_scale=3.0, output_type="latent")
        return pipeline(prompts[0], **how, generator=torch.Generator().manual_seed(5)).images

    def ours():
        *_, x = sd.sample(prompts[:1], [5], sampler="ddim", steps=2, cfg=3.0)
        return x

    plain, contexts = ours(), sd.text.prompts(prompts)
    assert difference(plain, theirs()) <= 1e-4
    pipeline.load_textual_inversion(str(file))
    embedding_file.apply_file(sd, file, log=None)
    assert difference(ours(), theirs()) <= 1e-4
    assert (ours() - plain).abs().max() > 1e-2
    words = pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer)
    ids = pipeline.tokenizer(words, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert difference(sd.text.prompts(prompts), pipeline.text_encoder(ids).last_hidden_state) <= 1e-5
        assert (sd.text.prompts(prompts) - contexts).abs().amax((1, 2)).min() > 0.1


def test_no_gradient_adds_up_in_the_order_of_threads(sd1):
    """That of an index does (two runs of 30 steps on two threads: 6e-7 apart): there is none in the graph."""
    sd = load_model(str(sd1.folder), "cpu", log=None)
    textual_inversion.insert(sd, "*", torch.randn(3, sd.text.encoder.config.hidden_size))
    seen, todo = set(), [sd.text(["* beside *", "* at night", "* beside *"]).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    names = {type(node).__name__ for node in seen}
    assert "AccumulateGrad" in names and not [n for n in names if "Index" in n], names
