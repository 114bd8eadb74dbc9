"""sample.py through main([...]) on the embedded tiny model: pictures to begin with, embeddings beside the
other artefacts, emphasis, long prompts; and what it refuses, in one sentence, with nothing written."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from hanokdiff.formats import embedding_file, hypernet_file, lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import hypernetwork, lora
from hanokdiff.tiny import world

PROMPT = "a house on a hill"  # in the tiny model's own vocabulary


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An artefact of every kind for the tiny model, each with an effect, and pictures to begin with."""
    folder, sd = tmp_path_factory.mktemp("artefacts"), load_model("tiny", device="cpu", log=None)
    noise = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=noise)

    embedding_file.save_file(folder / "star.safetensors", "*", 2 * normal(3, 72))
    embedding_file.save_file(folder / "gate.pt", "Gate", 2 * normal(1, 72))
    loras = lora.insert(sd, 2, 2)
    for one in loras.values():
        one.up.data = 0.2 * normal(*one.up.shape)
    lora_file.save_file(folder / "lora.safetensors", loras, {"hanokdiff_token": "sks"})
    spec = hypernetwork.HypernetConfig((1, 2, 1), "relu")
    shapes = {k: t.shape for k, t in hypernetwork.ResidualMLP(72, spec).state_dict().items()}
    pair = tuple({k: 0.2 * normal(*shape) for k, shape in shapes.items()} for _ in ("keys", "values"))
    hypernet_file.save_file(folder / "hypernet.pt", spec, {72: pair}, {"info": "hanokdiff_token=*"})
    embedding_file.save_file(folder / "sd1.pt", "*", normal(1, 768))
    house, other = (picture for picture, _ in world.photos(2))
    house.save(folder / "house.png")
    other.save(folder / "other.png")
    house.resize((100, 75)).save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    return SimpleNamespace(**{f.stem if f.suffix != ".png" else f"{f.stem}_png": f for f in folder.iterdir()})


counter = iter(range(10**6))


def draw(*argv, prompts=(PROMPT,)) -> list[np.ndarray]:
    """The pictures, in the order of their names; each call into a folder of its own."""
    out = f"out{next(counter)}"
    assert sample.main([*prompts, "--steps", "3", "--device", "cpu", "--out", out, *map(str, argv)]) == 0
    files = sorted(Path(out).glob("0*.png"))
    assert files[0].stem.startswith("00000-")
    return [np.asarray(Image.open(f)).astype(int) for f in files]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference in grey levels."""
    assert a.shape == b.shape and b.std() > 5, "a vacuous comparison"
    return np.abs(a - b).max()


def test_strength_is_how_far_from_the_picture(made):
    image = np.asarray(Image.open(made.house_png)).astype(int)
    first, init = {}, ("--steps", 10, "--init-image", made.house_png)
    for strength in ("0.1", "0.5", "1"):
        [first[strength]] = draw(*init, "--strength", strength)
    away = [np.abs(x - image).mean() for x in first.values()]
    assert away[0] < 10 and away[0] < away[1] / 1.5 and away[1] < away[2] / 1.2, away
    [default] = draw(*init)
    assert apart(default, draw(*init, "--strength", "0.75")[0]) == 0 and apart(default, first["0.5"]) > 5
    assert apart(default, draw("--steps", 10, "--init-image", made.other_png)[0]) > 5
    one, two = draw(*init, "--n", 2)
    assert apart(one, default) <= 1 and apart(two, one) > 5
    [plain] = draw("--steps", 10)
    assert apart(plain, first["1"]) > 5  # a little of the picture shines through, as in diffusers


@pytest.mark.parametrize("more, size", [
    ([], (88, 64)), (["--size", "48x80"], (48, 80)), (["--sampler", "ddim", "--batch-size", "1"], (88, 64)),
])  # fmt: skip
def test_size_of_a_picture_from_a_picture(made, more, size):
    """The shorter side as the model knows it, the shape kept; cropped to a size that is asked for."""
    [drawn] = draw("--steps", 10, "--init-image", made.wide_png, "--strength", "0.1", *more)
    assert drawn.shape == (size[1], size[0], 3)
    with Image.open(made.wide_png) as wide:
        fit = Image.Resampling.LANCZOS
        kept = (0, 0, 100, 75) if size == (88, 64) else (27.5, 0, 72.5, 75)
        expected = np.asarray(wide.convert("RGB").resize(size, fit, kept)).astype(int)
    assert np.abs(drawn - expected).mean() < 12 < np.abs(drawn - expected[:, ::-1]).mean()


def test_embeddings_by_their_word_and_by_another(made, capsys):
    [plain] = draw("--token", "*", prompts=["* on a hill"])
    capsys.readouterr()
    [star] = draw("--embedding", made.star, prompts=["* on a hill"])
    assert f'embedding {made.star}: "*", 3 vectors' in capsys.readouterr().out
    assert apart(star, plain) > 5
    [other] = draw("--embedding", f"{made.star}:[a b]", prompts=["[a  B] on a hill"])
    assert apart(other, star) == 0
    [gate] = draw("--embedding", made.gate, prompts=["gate on a hill"])
    two = ("--embedding", made.gate), ("--embedding", f"{made.star}:sks")
    [both], [turned] = (draw(*a, *b, prompts=["gate, sks on a hill"]) for a, b in (two, two[::-1]))
    assert apart(gate, star) > 5 and apart(both, gate) > 5 and apart(both, turned) <= 1
    [fused] = draw("--embedding", made.star, "--literal-tokens", prompts=["*, fire"])
    [found] = draw("--embedding", made.star, prompts=["*, fire"])
    [never] = draw("--token", "gate", "--literal-tokens", prompts=["*, fire"])
    assert apart(fused, never) == 0 and apart(found, fused) > 5
    capsys.readouterr()
    draw("--embedding", made.gate, prompts=["a house"])
    assert 'does not contain "Gate"' in capsys.readouterr().err


def test_all_artefacts_together(made, capsys):
    kinds = {"embedding": made.star, "lora": made.lora, "hypernet": made.hypernet}
    argv = {kind: (f"--{kind}", file) for kind, file in kinds.items()}
    prompt = ["* on a hill"]
    [together] = draw(*sum(argv.values(), ()), prompts=prompt)
    said = capsys.readouterr().out
    assert all(str(file) in said for file in kinds.values())
    [backwards] = draw(*sum(list(argv.values())[::-1], ()), prompts=prompt)
    assert apart(together, backwards) == 0
    for kind in kinds:
        [without] = draw("--token", "*", *sum((v for k, v in argv.items() if k != kind), ()), prompts=prompt)
        assert apart(together, without) > 5, kind
    zero = ("--lora", f"{made.lora}:0", "--hypernet", f"{made.hypernet}:0")
    [off] = draw(*zero, *argv["embedding"], prompts=prompt)
    assert apart(off, draw(*argv["embedding"], prompts=prompt)[0]) == 0
    [half] = draw("--hypernet", f"{made.hypernet}:0.5", prompts=prompt)
    assert apart(half, draw("--hypernet", made.hypernet, prompts=prompt)[0]) > 5


def test_how_a_picture_was_made_is_in_it(made):
    how = "--n 2 --seed 7 --strength 0.55 --clip-skip 2 --negative (snow:1.2) --cfg 3".split()
    files = ["--init-image", made.house_png, "--embedding", made.star, "--embedding", f"{made.gate}:sks"]
    files += ["--lora", f"{made.lora}:0.7", "--hypernet", made.hypernet]
    draw(*how, *files, prompts=["*, (fire:1.3)", "a sks BREAK *"])
    [out] = Path().glob("out*")
    files = sorted(out.iterdir())
    assert [f.name for f in files] == ["00000-7.png", "00001-8.png", "00002-7.png", "00003-8.png"]
    text = [Image.open(f).text["parameters"] for f in files]
    assert text[1] == (
        "*, (fire:1.3)\nNegative prompt: (snow:1.2)\nSteps: 3, Sampler: dpmpp_2m_karras, CFG scale: 3, "
        "Seed: 8, "
        "Size: 64x64, Model: tiny, Clip skip: 2, Denoising strength: 0.55, Init image: house.png, Embedding: "
        "star.safetensors, Embedding: gate.pt:sks, LoRA: lora.safetensors:0.7, Hypernet: hypernet.pt:1"
    )
    assert text[2].startswith("a sks BREAK *\nNegative")


LONG = "a castle in the snow " * 30  # 150 tokens: two chunks


def test_prompts_of_every_length_in_one_call(made):
    """Each is drawn as if it were alone, whatever the others' length; nothing of a long one is lost."""
    prompts = [PROMPT, LONG, "(a castle:1.3)", LONG + "fire", "fire BREAK a house"]
    text = load_model("tiny").text
    assert [sum(len(ids) for ids, _ in text.chunks(p)) for p in prompts[1:4]] == [150, 2, 151]
    assert [len(text.chunks(p)) for p in prompts] == [1, 2, 1, 3, 2]
    together = draw(prompts=prompts)
    for prompt, picture in zip(prompts, together, strict=True):
        assert apart(draw(prompts=[prompt])[0], picture) <= 1, prompt
    assert all(apart(a, b) > 5 for i, a in enumerate(together) for b in together[:i])
    [long_negative] = draw("--negative", LONG)
    assert apart(long_negative, draw("--negative", "a castle")[0]) > 5
    assert apart(draw("--negative", LONG, prompts=prompts[:2])[0], long_negative) <= 1


def test_emphasis_changes_the_picture():
    [plain] = draw(prompts=["a house, fire"])
    drawn = draw(prompts=["a house, (fire)", "a house, (fire:2)", "a house, [fire]", "(a house:2), fire"])
    assert all(apart(x, plain) > 3 for x in drawn)
    assert all(apart(x, y) > 3 for i, x in enumerate(drawn) for y in drawn[:i])
    assert apart(draw(prompts=["a (house:1), fire"])[0], plain) == 0
    assert apart(draw(prompts=[r"a house \(fire\)"])[0], plain) > 0


def test_clip_skip():
    [plain] = draw()
    assert apart(draw("--clip-skip", 1)[0], plain) == 0 and apart(draw("--clip-skip", 2)[0], plain) > 5


BAD = {  # options ({name} is an artefact), what the one sentence says; more: robustness/test_mistakes.py
    "no strength": ("--init-image {house_png} --strength 0", ["strength is 0", "from 0.05 to 1"]),
    "negative": ("--init-image {house_png} --strength -0.5", ["strength is -0.5"]),
    "nan": ("--init-image {house_png} --strength nan", ["strength is nan"]),
    "not a step": ("--init-image {house_png} --steps 3 --strength 0.3", ["of 3 steps", "0.334"]),
    "size": ("--init-image {house_png} --size 63x64", ["width is 63"]),
    "clip skip 0": ("--clip-skip 0", ["--clip-skip is 0", "at least 1"]),
    "clip skip 3": ("--clip-skip 3", ["clip skip is 3", "2 layers"]),
    "no embedding": ("--embedding nowhere.pt", ["--embedding nowhere.pt: no such file"]),
    "no embedding, a word": ("--embedding nowhere.pt:*", ["--embedding nowhere.pt:*: no such file"]),
    "no lora": ("--lora nowhere.safetensors:0.5", ["--lora nowhere.safetensors:0.5: no such file"]),
    "no hypernet": ("--hypernet nowhere.pt:0.5", ["--hypernet nowhere.pt:0.5: no such file"]),
    "scale": ("--hypernet {hypernet}:nan", ["hypernet.pt is nan", "finite"]),
    "one word twice": ("--embedding {star} --embedding {gate}:*", ['embeddings for "*"', "gate.pt:WORD"]),
    "any case": ("--embedding {star}:GATE --embedding {gate}", ["two embeddings", "WORD"]),
    "embedding as lora": ("--lora {star}", ["star.safetensors"]),
    "embedding as hypernet": ("--hypernet {gate}", ["not a hypernetwork"]),
    "hypernet as embedding": ("--embedding {hypernet}", ["not a textual inversion embedding"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_options(made, tmp_path, capsys, kind):
    argv, words = BAD[kind]
    argv = [a.format(**vars(made)) for a in argv.split()]
    assert sample.main([PROMPT, "--device", "cpu", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    assert all(word in err for word in words), (words, err)
    assert not list(tmp_path.iterdir())
