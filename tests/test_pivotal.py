"""Pivotal tuning (a LoRA and its word's vectors in one run), and going on from a file: --from."""

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_scripts import refused

import sample
import train_hypernet
import train_lora
import train_ti
from hanokdiff import convert
from hanokdiff.formats import embedding_file, hypernet_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora, textual_inversion
from hanokdiff.training.trainer import Trainer

START = "a wide building"  # the vectors'


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "photos").mkdir()
    for i in range(2):
        picture = Image.effect_mandelbrot((40, 40), (-2 + i, -1, 1, 1), 99).convert("RGB")
        picture.save(folder / f"photos/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("warnings.showwarning", warnings.showwarning)
        yield folder


def arguments(made, out, *more) -> list[str]:
    common = "--data photos --resolution 32 --steps 4 --batch-size 2 --preview-every 0 --save-every 2"
    return list(map(str, ["--model", made.folder, *common.split(), "--device", "cpu", "--out", out, *more]))


@pytest.fixture(scope="module")
def tuned(sd1) -> Path:
    """The LoRA file of a run with two vectors."""
    more = ["--rank", 2, "--vectors", 2, "--init", START, "--token", "sks", "--lr", 1e-3, "--word-lr", 1e-2]
    assert train_lora.main(arguments(sd1, "tuned", *more)) == 0
    return Path("tuned/lora.safetensors")


def test_word_and_lora_are_trained_together(sd1, tuned):
    """The vectors begin as the words of --init and go at most --word-lr a step; both files hold them."""
    (vectors,) = lora_file.read_words(tuned).values()
    start = textual_inversion.initial_vectors(load_model(str(sd1.folder), "cpu", log=None), START, 2)
    assert 0 < (vectors - start).abs().max() <= 4 * 1e-2
    word, alone, about = embedding_file.read_file(tuned.with_name("embedding.safetensors"))
    assert word == "sks" and torch.equal(alone, vectors) and about["step"] == "4"
    assert tuned.with_name("lora-000002.safetensors").exists()
    assert tuned.with_name("embedding-000002.safetensors").exists()
    loras, _ = lora_file.read_file(tuned)
    assert any("lora_te" in name for name in loras)
    assert all(t["up"].abs().max() > 0 for name, t in loras.items() if "to_v" in name or "q_proj" in name)


def test_the_file_is_what_the_webui_reads(tuned):
    """bundle_emb.NAME.KEY, and under KEY what an embedding's own file holds (its pull request 13568)."""
    with safe_open(tuned, "pt") as f:
        bundled = [k for k in f.keys() if k.startswith("bundle_emb.")]  # noqa: SIM118
        rest = [k for k in f.keys() if k not in bundled]  # noqa: SIM118
        assert bundled == ["bundle_emb.sks.string_to_param.*"] and f.get_tensor(bundled[0]).shape[0] == 2
    assert all(k.startswith("lora_") for k in rest)


def test_diffusers_reads_both(sd1, tuned):
    """Converted; it refuses a file with any name that has no "lora" in it."""
    assert convert.main([str(tuned), "for-diffusers.safetensors"]) == 0
    pipeline = sd1.pipeline
    pipeline.load_lora_weights(".", weight_name="for-diffusers.safetensors")
    try:
        modules = {k for k in pipeline.unet.state_dict() if "lora_A" in k}
        assert len(modules) == sum("unet" in name for name in lora_file.read_file(tuned)[0])
    finally:
        pipeline.unload_lora_weights()
    pipeline.load_textual_inversion("for-diffusers-embedding.safetensors")
    try:
        (vectors,) = lora_file.read_words(tuned).values()
        ids = pipeline.tokenizer.convert_tokens_to_ids(["sks", "sks_1"])
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids], vectors)
    finally:
        pipeline.unload_textual_inversion()


def test_sampling_with_it(sd1, tuned):
    """The word gets its vectors, in any spelling of the bundle; the context is that of word and LoRA."""
    sd = load_model(str(sd1.folder), "cpu", log=None)
    sample.apply_files(sd, sample.options().parse_args(["sks", "--lora", str(tuned)]))
    (vectors,) = lora_file.read_words(tuned).values()
    with torch.no_grad():
        embedding = textual_inversion.find(sd, "sks")
        assert torch.equal(embedding.vectors, vectors)
        assert torch.equal(embedding(torch.tensor([sd.text.words["sks"]]))[0], vectors)
    for key in ("emb_params", "sks", "string_to_param.*"):
        file = Path(f"spelling-{key[:3]}.safetensors")
        tensors = {k: t for k, t in load_file(tuned).items() if "bundle" not in k}
        save_file({**tensors, f"bundle_emb.sks.{key}": vectors}, file)
        (again,) = lora_file.read_words(file).values()
        assert torch.equal(again, vectors)


PARAM = "bundle_emb.sks.string_to_param.*"


@pytest.mark.parametrize(("tensors", "words"), [
    ({"bundle_emb.sks.clip_l": torch.ones(1, 8), "bundle_emb.sks.clip_g": torch.ones(1, 8)}, "SDXL"),
    ({PARAM: torch.ones(1, 1, 8)}, "1 to 75 vectors"), ({PARAM: torch.ones(1, 8)}, "vectors of width 8"),
    ({PARAM: torch.full((1, 8), torch.nan)}, "not finite"),
])  # fmt: skip
def test_a_bundle_that_cannot_be(sd1, tuned, tensors, words):
    """Refused before anything is applied."""
    loras = {k: t for k, t in load_file(tuned).items() if "bundle" not in k}
    save_file({**loras, **tensors}, "broken.safetensors")
    sd = load_model(str(sd1.folder), "cpu", log=None)
    with pytest.raises(ValueError, match=words):
        lora_file.apply_file(sd, Path("broken.safetensors"))
    assert not any(isinstance(m, lora.LoRA) for m in sd.unet.modules())


def test_converted(tuned, capsys):
    """To diffusers the word gets a file beside; within kohya's layout it stays where it is."""
    assert convert.main([str(tuned), "out.safetensors", "--to", "diffusers"]) == 0
    assert not [k for k in load_file("out.safetensors") if "bundle" in k]
    (vectors,) = lora_file.read_words(tuned).values()
    assert torch.equal(embedding_file.read_file(Path("out-embedding.safetensors"))[1], vectors)
    assert "out-embedding.safetensors" in capsys.readouterr().err
    assert convert.main([str(tuned), "half.safetensors", "--to", "kohya", "--dtype", "fp16"]) == 0
    assert torch.equal(lora_file.read_words(Path("half.safetensors"))["sks"], vectors.half().float())


def test_a_lora_goes_on(sd1, tuned):
    """At a rate that moves nothing the file comes out again, word, ranks and alphas included."""
    still = "--lr 1e-30 --text-lr 1e-30 --word-lr 1e-30".split()
    assert train_lora.main(arguments(sd1, "again", "--from", tuned, *still)) == 0
    one, two = load_file(tuned), load_file("again/lora.safetensors")
    assert one.keys() == two.keys() and all(torch.allclose(one[k], t, atol=1e-20) for k, t in two.items())
    assert lora_file.read_file(Path("again/lora.safetensors"))[1]["ss_network_dim"] == "2"
    assert train_lora.main(arguments(sd1, "moved", "--from", tuned, "--lr", "1e-3")) == 0
    three = load_file("moved/lora.safetensors")
    moved = [not torch.equal(one[k], t) for k, t in three.items() if "lora_up" in k and "to_v" in k]
    assert one.keys() == three.keys() and all(moved)


def test_an_embedding_goes_on(sd1, tuned):
    """Ours or the WebUI's: as many vectors as it has, under its word unless another one is named."""
    file = Path("webui.pt")
    vectors = torch.randn(3, textual_inversion.token_embedding(load_model(str(sd1.folder), "cpu")).shape[1])
    embedding_file.save_file(file, "sks", vectors)
    for out, more, word in (("e1", [], "sks"), ("e2", ["--token", "zwx"], "zwx")):
        assert train_ti.main(arguments(sd1, out, "--from", file, "--lr", "1e-30", *more)) == 0
        found, again, _ = embedding_file.read_file(Path(out, "embedding.safetensors"))
        assert found == word and torch.allclose(again, vectors, atol=1e-20)


def test_a_hypernetwork_goes_on(sd1):
    """Its layers, activation and dropout are the file's."""
    shape = "--layers 1 1.5 2 1 --activation mish --dropout 0.2 --layer-norm --token sks".split()
    assert train_hypernet.main(arguments(sd1, "h1", "--lr", "1e-3", *shape)) == 0
    assert train_hypernet.main(arguments(sd1, "h2", "--from", "h1/hypernet.pt", "--lr", "1e-30")) == 0
    one, two = (hypernet_file.read_file(Path(out, "hypernet.pt")) for out in ("h1", "h2"))
    assert one[0] == two[0] and hypernet_file.pseudo_word(two[2]) == "sks"
    for d, pair in one[1].items():
        for f, again in zip(pair, two[1][d], strict=True):
            assert all(torch.allclose(f[k], again[k], atol=1e-20) for k in f)


def test_a_hypernetwork_and_its_word(sd1):
    """The word's vectors are trained beside the networks, lie in the same file, and come back with it."""
    more = ["--vectors", 2, "--init", START, "--token", "sks", "--lr", 1e-3, "--word-lr", 1e-2]
    assert train_hypernet.main(arguments(sd1, "h3", *more)) == 0
    file = Path("h3/hypernet.pt")
    _, nets, metadata = hypernet_file.read_file(file)
    (vectors,) = hypernet_file.read_words(file, metadata).values()
    start = textual_inversion.initial_vectors(load_model(str(sd1.folder), "cpu", log=None), START, 2)
    assert 0 < (vectors - start).abs().max() <= 4 * 1e-2
    assert any(t.abs().max() > 0 for k, t in nets[max(nets)][0].items() if "linear" in k)
    word, alone, _ = embedding_file.read_file(file.with_name("embedding.safetensors"))
    assert word == "sks" and torch.equal(alone, vectors)
    assert file.with_name("embedding-000002.safetensors").exists()
    sd = load_model(str(sd1.folder), "cpu", log=None)
    sample.apply_files(sd, sample.options().parse_args(["sks", "--hypernet", str(file)]))
    assert torch.equal(textual_inversion.find(sd, "sks").vectors, vectors)
    still = "--lr 1e-30 --word-lr 1e-30".split()
    assert train_hypernet.main(arguments(sd1, "h4", "--from", file, *still)) == 0
    _, _, metadata = hypernet_file.read_file(Path("h4/hypernet.pt"))
    (again,) = hypernet_file.read_words(file, metadata).values()
    assert torch.allclose(again, vectors, atol=1e-20)


@pytest.mark.parametrize("script, name", [(train_lora, "lora.safetensors"), (train_hypernet, "hypernet.pt")])
def test_the_artefact_is_written_last(sd1, script, name, tmp_path, monkeypatch):
    """It tells that a run is whole: killed between its two files, the run goes on and writes both."""
    run, save = tmp_path / "run", embedding_file.save_file

    def killed(file, *rest):
        if file.name == "embedding.safetensors":
            raise KeyboardInterrupt
        save(file, *rest)

    more = ["--rank", 2] if script is train_lora else []
    more = arguments(sd1, run, *more, "--vectors", 2, "--init", START, "--token", "sks")
    with monkeypatch.context() as patch:
        patch.setattr(embedding_file, "save_file", killed)
        assert script.main(more) == 130
    assert not (run / name).exists()
    assert script.main(["--resume", str(run), "--device", "cpu"]) == 0
    assert (run / name).exists() and (run / "embedding.safetensors").exists()


def test_resumed(sd1, tuned, monkeypatch):
    """A run that began from a file, under another word, and was killed goes on to the same end."""
    tuned = [tuned, "--token", "zwx", "--vectors", 1]
    assert train_lora.main(arguments(sd1, "whole", "--from", *tuned)) == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "_log", lambda run: 1 / 0)  # after the last step
        train_lora.main(arguments(sd1, "half", "--from", *tuned))
    assert train_lora.main(["--resume", "half"]) == 0
    whole, half = load_file("whole/lora.safetensors"), load_file("half/lora.safetensors")
    assert any("bundle_emb.zwx" in k for k in whole)
    assert whole.keys() == half.keys() and all(torch.equal(half[k], t) for k, t in whole.items())


@pytest.mark.parametrize(("script", "more", "words"), [
    (train_lora, "--from tuned/lora.safetensors --rank 4 --alpha 1", "leave out --rank, --alpha"),
    (train_lora, "--from tuned/lora.safetensors --vectors 3", "leave out --vectors"),
    (train_hypernet, "--from h3/hypernet.pt --vectors 3", "leave out --vectors"),
    (train_lora, "--from nowhere.safetensors", "--from nowhere.safetensors: no such file"),
    (train_lora, "--from photos", "--from photos: a folder"),
    (train_ti, "--from tuned/embedding.safetensors --init house", "leave out --init"),
    (train_ti, "--from tuned/lora.safetensors", "not a textual inversion embedding"),
    (train_ti, "--init tuned/embedding.safetensors", "is a file, but must be words; to go on from"),
    (train_hypernet, "--from tuned/lora.safetensors", "tuned/lora.safetensors"),
])  # fmt: skip
def test_mistakes(sd1, tuned, script, more, words, capsys):
    refused(script, arguments(sd1, "never", *more.split()), (words,), capsys)
    assert not Path("never").exists()
