"""Attend-and-Excite: the loss by hand, what scale 0 does, and that attention rises."""

import math

import pytest
import torch
from test_scripts import refused

import sample
from hanokdiff.formats.load import load_model
from hanokdiff.models import attend
from hanokdiff.models.attend import Attend


@pytest.fixture(scope="module")
def sd():
    return load_model("tiny", "cpu", log=None)


def options(*more) -> object:
    args = sample.options().parse_args(["a barn on fire", "--steps", "6", *more])
    args.cfg = 4.0
    return args


class Bar:
    def update(self) -> None:
        pass


def draw(sd, prompts, *more) -> list[bytes]:
    seeds = list(range(len(prompts)))
    return [p.tobytes() for p in sample.sample(sd, prompts, seeds, options(*more), (64, 64), None, Bar())]


def test_scale_0_is_none(sd):
    """To the bit."""
    prompts = ["a barn on fire", "a castle in the snow"]
    assert draw(sd, prompts, "--attend", "barn", "fire", "--attend-scale", "0") == draw(sd, prompts)
    assert draw(sd, prompts, "--attend", "barn", "fire")[0] != draw(sd, prompts)[0]


def test_the_library_draws_what_the_script_draws(sd):
    how = dict(steps=6, cfg=4.0, attend=("barn", "fire"))
    (picture,) = sd.draw(["a barn on fire"], [0], **how)
    assert picture.tobytes() == draw(sd, ["a barn on fire"], "--attend", "barn", "fire")[0]


def test_where_words_stand(sd):
    sd.text.add_word("*")
    places = attend.word_places(sd.text, "a barn in the fire, a barn", ["barn", "fire", "castle", "in the"])
    assert places == {"barn": [2], "fire": [5], "in the": [3, 4]}
    long = "a barn, " * 30 + "fire"
    assert attend.word_places(sd.text, long, ["fire"])["fire"][0] > 77


def test_the_maps_are_the_networks_own(sd):
    """Recorded probabilities are softmax(q k' / sqrt(d)), and the prediction is what it was without."""
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([300.0]), sd.text(["a barn on fire", "a tent"])
    maps, seen = [], []
    layer = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    handles = [f.register_forward_hook(lambda _, __, out: seen.append(out)) for f in (layer.to_q, layer.to_k)]
    with torch.no_grad():
        plain = sd.unet(x, t, context)
        seen.clear()
        with attend.recorded(sd.unet, maps):
            assert (sd.unet(x, t, context) - plain).abs().max() < 1e-4
    for handle in handles:
        handle.remove()
    q, k = (layer.split_heads(a) for a in seen)
    expected = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1).mean(1)
    assert any(m.shape == expected.shape and torch.allclose(m, expected, atol=1e-6) for m in maps)
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:2]), atol=1e-5) for m in maps)
    assert "forward" not in vars(layer)


def test_the_loss_by_hand():
    """The smallest of the named words' largest values, after softmax(100 A) without first and last word."""
    a = torch.rand(16, 9)
    a = a / a.sum(-1, keepdim=True)
    words = torch.softmax(100 * a[:, 1:-1], -1)
    g = torch.tensor([math.exp(-2), 1.0, math.exp(-2)])
    g = g / g.sum()

    def peak(column: torch.Tensor) -> float:
        grid = torch.nn.functional.pad(column.view(1, 1, 4, 4), (1, 1, 1, 1), "reflect")[0, 0]
        return max((grid[i : i + 3, j : j + 3] * torch.outer(g, g)).sum() for i in range(4) for j in range(4))

    found = attend.least_attended(a, {"one": [3], "two": [5, 6]})
    assert found == pytest.approx(float(min(peak(words[:, 2]), peak(words[:, [4, 5]].mean(-1)))), rel=1e-5)
    assert attend.least_attended(a, {}) == 1


def test_each_step_raises_the_attention(sd):
    """Down the gradient the least attended word is attended to more, in each picture of the batch."""
    prompts = ["a barn beside a campfire", "a castle on fire"]
    one = Attend(sd, prompts, ["campfire", "fire", "castle"], 10)
    torch.manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16) * 14, sd.text.prompts(prompts)
    _, before = one.move(x, 14.0, 990.0, context, 0, 0.0)
    moved, _ = one.move(x, 14.0, 990.0, context, 0, 20.0)
    _, after = one.move(moved, 14.0, 990.0, context, 0, 0.0)
    assert (after > before).all()
    assert torch.equal(one(x, 1.0, 100.0, context, 5), x)  # the second half of the steps is left alone


@pytest.mark.parametrize(("argv", "words"), [
    (["a barn", "--attend", "castle"], '--attend "castle": no prompt has it'),
    (["a barn AND a fire", "--attend", "fire"], "--attend and AND do not go together"),
    (["a barn", "--attend", "barn", "--attend-scale", "nan"], "--attend-scale is nan"),
])  # fmt: skip
def test_mistakes(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(sample, argv, (words,), capsys)
