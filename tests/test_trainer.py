"""The chores on a toy that takes microseconds a step; then the trainers themselves: spoilt, run for long."""

import importlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train_lora
from hanokdiff.formats import hypernet_file
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tensors import write_tensors
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.models.schedule import Schedule
from hanokdiff.tiny import world
from hanokdiff.training import dataset
from hanokdiff.training.dataset import LatentDataset
from hanokdiff.training.noise import Batch
from hanokdiff.training.optimizer import AdamW
from hanokdiff.training.trainer import Trainer
from hanokdiff.training.validation import validation_loss

# -------------------------------------------------------------------------------------- randomness of a batch


def draws(b: Batch) -> list[torch.Tensor]:
    noise = b.normal((len(b.indices) * len(b.subsets), 2, 3))
    return [torch.tensor(b.photos(11)), b.uniform("flip"), b.integers(1000, "timestep"), noise]


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 3, 6, 8), tuple(range(9))])
def test_any_split_sees_the_same_numbers(cuts):
    whole = draws(Batch(5, 3, range(8), 8))
    parts = [draws(Batch(5, 3, range(a, b), 8)) for a, b in zip(cuts, cuts[1:])]
    for i, one in enumerate(whole):
        assert one.shape[0] == 8 and torch.equal(one, torch.cat([p[i] for p in parts]))


def test_seed_step_slot_and_name_all_matter():
    """Every combination its own number: no sum of seed and step, no shared stream."""
    places = [(seed, step, what) for seed in range(4) for step in range(4) for what in ("flip", "noise")]
    seen = [Batch(seed, step, range(4), 4).uniform(what) for seed, step, what in places]
    assert len(torch.cat(seen).unique()) == 4 * 4 * 4 * 2
    one, other = Batch(1, 2, range(4), 4), Batch(2, 1, range(4), 4)
    for again in (one, other):
        assert torch.equal(one.normal((4, 4)), again.normal((4, 4))) == (again is one)
        numbers = [b.integers(10**9, "timestep") for b in (one, again)]
        assert torch.equal(*numbers) == (again is one)


def test_the_numbers_are_of_the_promised_kind():
    b = Batch(0, 0, range(400), 400)
    uniform, integers, normal = b.uniform("a"), b.integers(5, "b"), b.normal((400, 3, 4), "c")
    assert 0 <= uniform.min() < 0.05 and 0.95 < uniform.max() < 1
    assert integers.unique().tolist() == [0, 1, 2, 3, 4] and integers.dtype == torch.int64
    assert normal.shape == (400, 3, 4) and abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05


def test_every_epoch_is_a_permutation():
    """Also where an epoch ends within a batch."""
    n, size = 7, 4
    order = torch.tensor([Batch(3, step, range(size), size).photos(n) for step in range(n)])  # 4 epochs
    epochs = order.view(4, n)
    assert all(sorted(e) == list(range(n)) for e in epochs.tolist())
    assert len({tuple(e) for e in epochs.tolist()}) > 1
    other = [Batch(4, step, range(size), size).photos(n) for step in range(n)]
    assert not torch.equal(order, torch.tensor(other))


def test_drawing_uses_up_nothing():
    state = torch.get_rng_state()
    draws(Batch(5, 3, range(8), 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_halves_have_draws_of_their_own():
    """DreamBooth's own half sees what other methods see; the class's is another stream, in any split."""
    plain, other = draws(Batch(5, 3, range(4), 4)), draws(Batch(5, 3, range(4), 4).subset("class"))
    both = draws(Batch(5, 3, range(4), 4).subset("", "class"))
    parts = [draws(Batch(5, 3, range(a, a + 2), 4).subset("", "class")) for a in (0, 2)]
    for one, two, whole, (first, second) in zip(plain, other, both, zip(*parts)):
        assert torch.equal(whole[:4], one) and torch.equal(whole[4:], two) and not torch.equal(one, two)
        assert torch.equal(whole, torch.cat([first[:2], second[:2], first[2:], second[2:]]))
    own, cls = ([Batch(3, s, range(4), 4).subset(h).photos(7) for s in range(7)] for h in ("", "class"))
    own, cls = torch.tensor(own), torch.tensor(cls)
    assert all(sorted(e) == list(range(7)) for e in cls.view(4, 7).tolist()) and not torch.equal(own, cls)


# ---------------------------------------------------------------------------------------------------- the toy

TRUE = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]])


def squares(batch: Batch, trainable: dict) -> torch.Tensor:
    """(B,) losses of a linear fit."""
    x = batch.normal((len(batch.indices), 3), "x")
    return (x @ trainable["w"] + trainable["b"] - x @ TRUE).square().sum(1)


def weights(dtype=torch.float32) -> dict:
    """Where the fit begins."""
    w, b = torch.full((3, 2), 0.1, dtype=dtype), torch.zeros(2, dtype=dtype)
    return {"w": nn.Parameter(w), "b": nn.Parameter(b)}


def toy(out: Path, steps=24, losses=squares, each=None, scale=1.0, dtype=torch.float32, **options):
    """A run of it; `each(run, learns)` is called at the start of every step. Returns what was learnt."""
    trainable = weights(dtype)
    usual = dict(batch_size=8, lr=0.05, artefact="toy.safetensors", config={"steps": steps})
    usual["save"] = lambda path: write_tensors(trainable, path)
    run = Trainer(out, trainable, steps=steps, **{**usual, **options})
    for batch in run:
        if each and batch.indices.start == 0:
            each(run, trainable)
        run.backward(scale * losses(batch, trainable))
    return {k: p.detach().clone() for k, p in trainable.items()}


def states():
    """What is learnt at the start of every step, and the `each` that notes it."""
    seen = []
    return seen, lambda run, w: seen.append({k: p.detach().clone() for k, p in w.items()})


def stop_at(step: int):
    """An `each` that is Ctrl-C in this step."""
    return lambda run, _: setattr(run, "interrupted", run.step == step)


def crash_at(step: int):
    def each(run, _):
        if run.step == step:
            raise RuntimeError("the power went")

    return each


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8))


def apart(a: dict, b: dict) -> float:
    return max((a[k] - b[k]).abs().max().item() for k in a)


def rows(out: Path, without=("seconds",)) -> list[dict]:
    """The log, as strict JSON: no NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(r, parse_constant=refuse) for r in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in without} for r in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("toy") / "whole"
    return SimpleNamespace(result=toy(out), rows=rows(out), out=out)


def test_it_learns_and_leaves_a_file(undisturbed, tmp_path):
    losses = [r["loss"] for r in undisturbed.rows]
    assert [r["step"] for r in undisturbed.rows] == [10, 20, 24] and losses == sorted(losses, reverse=True)
    assert undisturbed.rows[0].keys() == {"step", "loss", "grad_norm", "lr", "skipped"}
    assert apart(load_file(undisturbed.out / "toy.safetensors"), undisturbed.result) == 0
    names = sorted(p.name for p in undisturbed.out.iterdir())
    assert names == ["config.json", "log.jsonl", "toy.safetensors"]
    assert apart(toy(tmp_path, seed=1), undisturbed.result) > 1e-3


def test_a_look_at_the_held_out_disturbs_nothing(undisturbed, tmp_path):
    """At the start and ten times along the way, whatever it draws; a number that is not finite is null."""
    seen = []

    def look():
        seen.append(torch.rand(3))
        return 0.25 if len(seen) < 3 else float("nan")

    assert apart(toy(tmp_path, validate=look), undisturbed.result) == 0
    looks = [r for r in rows(tmp_path) if "held_out" in r]
    assert [r["step"] for r in looks] == [0, 3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    assert [r["held_out"] for r in looks] == [0.25, 0.25] + [None] * 9
    assert [r for r in rows(tmp_path) if r not in looks] == undisturbed.rows


@pytest.mark.parametrize("method", ["dreambooth", "hypernet"])
def test_the_held_out_loss_is_that_of_the_file(tmp_path, monkeypatch, method):
    """The last one in the log, computed again from the artefact and the photos that were not learnt from."""
    monkeypatch.chdir(tmp_path)
    how = "--steps 2 --images 3 --held-out 9 --batch-size 2 --class-images 0 --preview-every 0 --device cpu"
    how += " --dropout 0.5" if method == "hypernet" else ""
    assert importlib.import_module(f"train_{method}").main([*how.split(), "--out", "run"]) == 0
    logged = [r["held_out"] for r in rows(Path("run")) if "held_out" in r]
    sd = load_model("run/model" if method == "dreambooth" else "tiny", "cpu", log=None)
    sd.text.add_word("*")
    if method == "hypernet":
        hypernet_file.apply_file(sd, Path("run/hypernet.pt"), log=None)
    pictures, captions = zip(*world.photos(9, held_out=True))
    captions = [c.replace("a building with a roof", "*") for c in captions]
    dataset = LatentDataset(sd.vae, list(pictures), captions)
    assert validation_loss(sd, dataset) == validation_loss(sd, dataset) == pytest.approx(logged[-1], abs=2e-6)
    assert len(logged) == 3 and logged[0] != logged[-1]


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_nothing(undisturbed, tmp_path, micro):
    assert apart(toy(tmp_path, micro_batch=micro), undisturbed.result) <= 1e-6
    assert rows(tmp_path)[-1]["loss"] == pytest.approx(undisturbed.rows[-1]["loss"], abs=2e-6)


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_updates_are_adamws_with_clipping(tmp_path, scale):
    """torch's own, unfused, with clip_grad_norm_ by hand: where the clip bites, and where it does not."""
    (seen, each), hand, norms = states(), weights(), []
    toy(tmp_path, steps=6, scale=scale, weight_decay=0.1, each=each)
    adam = torch.optim.AdamW(hand.values(), weight_decay=0.1, foreach=False, fused=False)
    for step in range(6):
        assert apart(seen[step], hand) <= 1e-6
        adam.zero_grad()
        (scale * squares(Batch(0, step, range(8), 8), hand)).mean().backward()
        norms.append(nn.utils.clip_grad_norm_(hand.values(), 1.0).item())
        adam.param_groups[0]["lr"] = 0.05 * min(1, (6 - step) / 3)  # one step up, three down
        adam.step()
    assert min(norms) > 1 if scale == 1 else max(norms) < 1
    assert apart(seen[0], hand) > 0.1


@pytest.mark.parametrize("steps", [100, 2000])
def test_the_rate_rises_stays_and_falls(undisturbed, tmp_path, steps):
    how = dict(steps=steps, batch_size=1, lr=0.5, save=None, artefact="a", config={})
    run = Trainer(tmp_path, {"w": nn.Parameter(torch.zeros(1))}, **how)
    warm, cool = min(100, steps // 10), steps // 2
    rates = [run.rate(s) for s in range(steps)]
    assert rates[:warm] == pytest.approx([0.5 * (s + 1) / warm for s in range(warm)])
    assert rates[warm : steps - cool] == [0.5] * (steps - cool - warm)
    assert rates[steps - cool :] == pytest.approx([0.5 * (cool - i) / cool for i in range(cool)])
    # the rate that was used
    assert [r["lr"] for r in undisturbed.rows] == pytest.approx([0.05, 0.05 * 5 / 12, 0.05 / 12])


def test_each_group_has_its_own_rate(undisturbed, tmp_path):
    """By the beginning of the names; against torch's AdamW with two groups."""
    used, hand, (seen, note) = [], weights(), states()

    def each(run, trainable):
        used.append([g["lr"] for g in run.optimizer.param_groups])
        note(run, trainable)

    result = toy(tmp_path, steps=12, lr={"w": 0.02, "b": 0.1}, each=each)
    adam = torch.optim.AdamW([{"params": [hand[k]]} for k in "wb"], foreach=False)
    for step in range(12):
        assert apart(seen[step], hand) <= 1e-6
        adam.zero_grad()
        squares(Batch(0, step, range(8), 8), hand).mean().backward()
        nn.utils.clip_grad_norm_(hand.values(), 1.0)
        for group, rate in zip(adam.param_groups, (0.02, 0.1)):
            group["lr"] = rate * min(1, (12 - step) / 6)
        assert used[step] == pytest.approx([g["lr"] for g in adam.param_groups])
        adam.step()
    assert rows(tmp_path)[-1]["lr"] == pytest.approx(0.02 / 6)  # of several, the first
    assert apart(result, hand) <= 1e-6 and apart(toy(tmp_path, steps=12, lr=0.1), result) > 1e-2
    for lr in ({"w": 0.1}, {"w": 0.1, "bias": 0.1}, {"w": 0.1, "x": 0.1}):
        with pytest.raises(AssertionError, match="do not cover"):
            toy(tmp_path, lr=lr)


def test_what_has_no_gradient_for_a_while_stands_still(tmp_path):
    """A text encoder that is switched off, or joins late: no decay, no momentum, exact over a stop."""

    def losses(batch, w):
        frozen = {**w, "b": w["b"].detach()} if batch.step < 5 or batch.step >= 12 else w
        return squares(batch, frozen)

    (seen, each), options = states(), dict(losses=losses, lr={"w": 0.05, "b": 0.5}, weight_decay=0.5)
    whole = toy(tmp_path / "a", each=each, **options)
    same = [torch.equal(a["b"], b["b"]) for a, b in zip(seen, seen[1:])]
    assert same == [True] * 5 + [False] * 7 + [True] * 11 and torch.equal(seen[-1]["b"], whole["b"])
    for at in (2, 8, 15):
        with pytest.raises(SystemExit):
            toy(tmp_path / str(at), each=stop_at(at), **options)
        assert apart(toy(tmp_path / str(at), resume=True, **options), whole) == 0


def test_more_figures_in_the_log(undisturbed, tmp_path):
    """Of the state after the step; what is not finite is null, not a word that JSON does not know."""
    figures = iter([{"ratio": 0.1234567}, {"ratio": float("inf")}, {"ratio": 2}])
    toy(tmp_path, metrics=lambda: next(figures))
    log = rows(tmp_path)
    assert [r.pop("ratio") for r in log] == [0.12346, None, 2] and log == undisturbed.rows
    trainable = []
    look = dict(each=lambda _, w: trainable.append(w["w"]), metrics=lambda: {"w": trainable[0].sum().item()})
    result = toy(tmp_path, **look)
    assert rows(tmp_path)[-1]["w"] == pytest.approx(result["w"].sum().item(), abs=1e-5)


# --------------------------------------------------------------------------------------------- half precision


def half_loss(batch: Batch, trainable: dict) -> torch.Tensor:
    """The toy's losses, computed as a network in half precision does."""
    x = batch.normal((len(batch.indices), 3), "x").to(trainable["w"])
    return (x @ trainable["w"] + trainable["b"] - (x.float() @ TRUE).to(x)).square().float().sum(1)


def masters(run) -> dict:
    return {k: m.detach().clone() for k, m in zip(run.trainable, run.masters, strict=True)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_through_fp32_masters(tmp_path, dtype):
    """Gradients come from the rounded weights; clip, moments and steps are fp32: by torch's AdamW."""
    seen, norms = [], []
    each = lambda run, _: seen.append(masters(run))  # noqa: E731
    result = toy(tmp_path, steps=10, losses=half_loss, dtype=dtype, each=each)
    hand = {k: nn.Parameter(p.detach().float()) for k, p in weights(dtype).items()}
    adam = torch.optim.AdamW(hand.values(), foreach=False)
    for step in range(10):
        assert apart(seen[step], hand) <= 1e-6
        rounded = {k: m.detach().to(dtype).requires_grad_() for k, m in hand.items()}
        half_loss(Batch(0, step, range(8), 8), rounded).mean().backward()
        for k, m in hand.items():
            m.grad = rounded[k].grad.float()
        norms.append(nn.utils.clip_grad_norm_(hand.values(), 1.0).item())
        adam.param_groups[0]["lr"] = 0.05 * min(1, (10 - step) / 5)
        adam.step()
    assert max(norms) > 1 and all(p.dtype == dtype for p in result.values())
    assert all(torch.equal(p, hand[k].detach().to(dtype)) for k, p in result.items())


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_micro_batches_add_up_in_fp32(tmp_path, monkeypatch, micro_batch):
    """32 + 7/8 is 33 in bf16, and 32 + 1/8 is 32, however often."""
    seen, step = [], Trainer._optimizer_step
    record = lambda run: (seen.append([m.grad.clone() for m in run.masters]), step(run))  # noqa: E731
    monkeypatch.setattr(Trainer, "_optimizer_step", record)
    weight = torch.tensor([256.0, *[1.0] * 7])
    losses = lambda b, w: weight[list(b.indices)] * (w["w"].float().sum() + w["b"].float().sum())  # noqa: E731
    result = toy(tmp_path, steps=2, losses=losses, dtype=torch.bfloat16, micro_batch=micro_batch)
    expected = 32.875 if micro_batch else 33.0  # at once, the gradient of each weight is one number in bf16
    assert all((grad == expected).all() and grad.dtype == torch.float32 for grads in seen for grad in grads)
    assert len(seen) == 2 and all(p.dtype == torch.bfloat16 for p in result.values())


def test_small_steps_add_up_in_half_precision(tmp_path):
    """1.0 - 1e-5 is 1.0 in bf16 and in fp16, however often."""
    down = lambda batch, w: w["w"].float().sum() + w["b"].float().sum()  # noqa: E731
    options = dict(steps=400, losses=down, lr=1e-5, weight_decay=0.0, batch_size=1)
    ones = lambda run, w: [p.data.fill_(1) for p in [*w.values(), *run.masters]] if run.step == 0 else 0  # noqa: E731
    whole = toy(tmp_path, each=ones, **options)
    assert (1 - whole["w"]).mean() == pytest.approx(1e-5 * (20.5 + 160 + 100.5), rel=0.02)  # up, level, down
    for dtype in (torch.bfloat16, torch.float16):
        half = toy(tmp_path, each=ones, dtype=dtype, **options)
        assert all(torch.equal(half[k], whole[k].to(dtype)) for k in whole)
        assert half["w"].max() < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters_survive_a_stop_and_a_bad_step(tmp_path, dtype):
    """Resuming goes on from fp32, not from what was rounded; a bad step leaves the masters alone."""
    losses = lambda b, w: half_loss(b, w) * (torch.nan if b.step == 5 else 1)  # noqa: E731
    options = dict(losses=losses, dtype=dtype, lr=0.003)
    ends, seen = [], []
    whole = toy(tmp_path / "a", each=lambda run, _: (ends.append(run), seen.append(masters(run))), **options)
    assert apart(seen[5], seen[6]) == 0 and apart(seen[4], seen[5]) > 0 and apart(seen[6], seen[7]) > 0
    with pytest.raises(SystemExit):
        toy(tmp_path / "b", each=stop_at(7), **options)
    state = torch.load(tmp_path / "b" / "state" / "000008.pt", weights_only=True)["learns"]
    assert apart(state, seen[8]) == 0 and {t.dtype for t in state.values()} == {torch.float32}
    resumed = toy(tmp_path / "b", resume=True, each=lambda run, _: ends.append(run), **options)
    end = masters(ends[0])
    assert apart(resumed, whole) == 0 and apart(masters(ends[-1]), end) == 0
    assert (apart({k: m.to(dtype) for k, m in end.items()}, end) > 0) == (dtype != torch.float32)


# -------------------------------------------------------------------------------------------- what goes wrong


def broken(when, value=torch.nan):
    """The toy's losses, but in steps for which `when` holds."""
    return lambda batch, trainable: squares(batch, trainable) * (value if when(batch.step) else 1.0)


def bad_loss(batch, trainable):
    """Infinite in step 5, with good gradients."""
    return squares(batch, trainable) + (torch.inf if batch.step == 5 else 0)


FIFTH = [
    broken(lambda s: s == 5, value) for value in (torch.nan, torch.inf, 1e30)
]  # 1e30: the norm overflows


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize("losses", [*FIFTH, bad_loss])
def test_one_bad_step_is_skipped(undisturbed, tmp_path, losses, micro):
    seen, each = states()
    result = toy(tmp_path, losses=losses, micro_batch=micro, save_every=3, each=each)
    assert apart(seen[5], seen[6]) == 0 and apart(seen[4], seen[5]) > 0 and apart(seen[6], seen[7]) > 0
    assert all(torch.isfinite(t).all() for t in result.values())
    log = rows(tmp_path)
    assert [r["skipped"] for r in log] == [1, 0, 0]
    # of the nine good
    assert 0 < log[0]["loss"] < 2 * undisturbed.rows[0]["loss"] and log[0]["grad_norm"] > 0
    saved = sorted(p.name for p in tmp_path.glob("toy-*"))
    # nothing right after a bad step
    assert "toy-000003.safetensors" in saved and "toy-000006.safetensors" not in saved


def test_divergence_goes_back_once_at_half_the_rate(tmp_path, capsys):
    """Not finite from step 13 on, until the rate is lower: saved at 10, noticed at 20, back to 10, done."""
    rates = []
    each = lambda run, _: rates.append(run.optimizer.param_groups[0]["lr"])  # noqa: E731
    losses = broken(lambda step: step >= 13 and rates[-1] > 0.03)
    trainable = toy(tmp_path, steps=40, losses=losses, save_every=5, each=each)
    assert all(torch.isfinite(t).all() for t in trainable.values())
    assert capsys.readouterr().out.count("not finite: back to step 10, at half the learning rate") == 1
    log = rows(tmp_path)
    assert [r["step"] for r in log] == [10, 20, 30, 40] and not any(r["skipped"] for r in log)
    assert [r["lr"] for r in log][:3] == pytest.approx([0.05, 0.025, 0.025 * 11 / 20])
    assert len(rates) == 40 + 10 and (tmp_path / "toy.safetensors").exists()


def test_divergence_for_ever_stops(tmp_path, capsys):
    message = "no longer finite at step 20; the last good state is in .*; go on with --resume .* --force and"
    with pytest.raises(ValueError, match=message):
        toy(tmp_path, steps=60, losses=broken(lambda s: s >= 13), save_every=5)
    assert capsys.readouterr().out.count("back to step 10") == 1
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == ["toy-000005.safetensors", "toy-000010.safetensors"]
    for file in files:
        assert all(torch.isfinite(t).all() for t in load_file(tmp_path / file).values())
    state = torch.load(tmp_path / "state" / "000010.pt", weights_only=True)
    assert state["step"] == 10 and all(torch.isfinite(t).all() for t in state["learns"].values())
    assert rows(tmp_path)[-1]["step"] <= 20


def test_divergence_before_anything_was_saved(tmp_path):
    with pytest.raises(ValueError, match="no longer finite at step 10; nothing was saved before"):
        toy(tmp_path, losses=broken(lambda s: True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "log.jsonl"]
    assert rows(tmp_path)[0] == {"step": 10, "loss": None, "grad_norm": 0, "lr": 0.05, "skipped": 10}


@pytest.mark.parametrize("steps", [(15,), (15, 60)])
def test_a_spike_is_bounded_and_told(tmp_path, steps):
    """Huge but finite: the clip bounds the gradient, AdamW the step; training goes on, the log tells."""
    seen, each = states()
    result = toy(tmp_path / "a", steps=200, losses=broken(lambda s: s in steps, 1e9), each=each)
    bound = 0.05 * 0.1 / math.sqrt(0.001)  # rate times the largest ratio of AdamW's moments after a long calm
    assert max(apart(a, b) for a, b in zip(seen, seen[1:])) <= bound + 1e-3
    log = rows(tmp_path / "a")
    told = {r["step"] for r in log if r["loss"] > 1e6 and r["grad_norm"] > 1e6}
    assert told == {s // 10 * 10 + 10 for s in steps}
    assert not any(r["skipped"] for r in log)
    assert apart(result, toy(tmp_path / "b", steps=200)) < 0.3 and log[-1]["loss"] < 0.1 * log[0]["loss"]


def only_w(batch, trainable):
    """A loss that does not see b: a bad number there spoils no loss and no gradient."""
    return squares(batch, {**trainable, "b": torch.zeros(2)})


def poison(at: int, times: int):
    """b becomes infinite at the beginning of a step, so many times."""
    left = [times]

    def each(run, trainable):
        if run.step == at and left[0]:
            left[0] -= 1
            for p in (trainable["b"], run.masters[1]):
                p.data[0] = torch.inf

    return each


@pytest.mark.parametrize(("times", "save_every", "told"), [
    (1, 4, None),
    (2, 4, "a trained parameter is no longer finite at step 8; the last good state is in .* --force"),
    (1, 0, "a trained parameter is no longer finite at step 12; nothing was saved before; .* lower --lr"),
])  # fmt: skip
def test_nothing_that_is_not_finite_is_saved(tmp_path, capsys, times, save_every, told):
    """A weight that no loss shows: looked at before each save and at the end. Back once, then an end."""
    options = dict(steps=12, save_every=save_every, losses=only_w, each=poison(5, times))
    if told:
        with pytest.raises(ValueError, match=told):
            toy(tmp_path, **options)
    else:
        toy(tmp_path, **options)
    assert capsys.readouterr().out.count("back to step 4, at half the learning rate") == bool(save_every)
    names = [*["toy"] * (not told), "toy-000004", *["toy-000008"] * (not told)] if save_every else []
    assert sorted(p.stem for p in tmp_path.rglob("*.safetensors")) == names
    assert all(torch.isfinite(t).all() for f in tmp_path.glob("*.safetensors") for t in load_file(f).values())
    left = [torch.load(f, weights_only=True) for f in (tmp_path / "state").glob("*")]
    assert [s["step"] for s in left] == ([4] if told and save_every else [])


def test_nothing_that_is_not_finite_is_saved_by_ctrl_c(tmp_path):
    def each(run, trainable):
        poison(5, 1)(run, trainable)
        run.interrupted = run.step == 5

    with pytest.raises(ValueError, match="no longer finite at step 6; nothing was saved before"):
        toy(tmp_path, losses=only_w, each=each)
    assert not list(tmp_path.rglob("*.pt"))


def test_after_a_way_back_nothing_is_logged_twice(tmp_path):
    """The step that it went back to was looked at before."""
    left = [1]

    def losses(batch, w):
        bad = left[0] and batch.step >= 23
        left[0] -= bool(left[0] and batch.step == 29)
        return squares(batch, w) * (torch.nan if bad else 1)

    toy(tmp_path, steps=100, save_every=20, losses=losses, validate=lambda: 0.5)
    assert [r["step"] for r in rows(tmp_path) if "held_out" in r] == list(range(0, 101, 10))
    assert [r["step"] for r in rows(tmp_path) if "loss" in r] == list(range(10, 101, 10))


def numbers(folder: Path) -> list[torch.Tensor]:
    """All tensors in the files that a run has left."""
    return [t for f in folder.rglob("*.safetensors") for t in load_file(f).values()]


@pytest.mark.parametrize(("what", "value"), [
    ("gradient", math.inf), ("weight", math.nan), ("base", math.inf), ("photo", math.nan),
])  # fmt: skip
def test_what_is_not_finite_in_a_real_training(tmp_path, monkeypatch, capsys, what, value):
    """A gradient: the step is skipped. A weight: back to the last state. One of the base ends the
    run, and a photo keeps it from starting. No file has such a number."""
    backward, encode, opened, done = Trainer.backward, dataset.encode, [], []

    def opening(*args, **more):
        opened.append(load_model(*args, **more))
        return opened[0]

    def bad(trainer, losses):
        now = what if trainer.step == (4 if what == "base" else 5) and not done else ""
        if now == "gradient":
            losses.register_hook(lambda g: g * value)
        done.extend([now] * bool(now))
        backward(trainer, losses)
        if now in ("weight", "base"):  # for the steps that follow
            kind = {"weight": ".down", "base": ".base.weight"}[now]
            next(p for n, p in opened[0].unet.named_parameters() if n.endswith(kind)).data.view(-1)[0] = value

    def encode_badly(*args):
        mean, std = encode(*args)
        mean[1, 0, 0, 0] = value
        return mean, std

    monkeypatch.setattr(train_lora, "load_model", opening)
    monkeypatch.setattr(Trainer, "backward", bad)
    monkeypatch.setattr(dataset, "encode", encode_badly if what == "photo" else encode)
    how = "--steps 13 --images 3 --batch-size 2 --class-images 0 --save-every 3 --preview-every 0"
    code = train_lora.main([*how.split(), "--device", "cpu", "--out", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert all(torch.isfinite(t).all() for t in numbers(tmp_path))
    if what == "photo":
        assert code == 2 and "of 1 of 3 pictures" in said.err and "--dtype fp32" in said.err
        return
    assert len(numbers(tmp_path / "run")) and said.out.count("back to step 3") == (what in ("weight", "base"))
    assert code == (2 if what == "base" else 0)
    if what == "base":
        assert "no longer finite" in said.err and "--force and a lower --lr" in said.err
        assert [f.name for f in (tmp_path / "run/state").iterdir()] == ["000003.pt"]
    else:
        assert [r["skipped"] for r in rows(tmp_path / "run")] == [what != "weight", 0]


def test_a_forgotten_update_is_noticed(tmp_path):
    how = dict(steps=3, batch_size=1, lr=1, save=None, artefact="a", config={})
    run = Trainer(tmp_path, {"w": nn.Parameter(torch.zeros(1))}, **how)
    with pytest.raises(AssertionError, match="trainer.backward"):
        for _ in run:
            pass


# --------------------------------------------------------------------------------- saving, stopping, going on


def test_what_is_saved_on_the_way(undisturbed, tmp_path):
    toy(tmp_path, save_every=8)
    names = sorted(p.stem for p in tmp_path.glob("*.safetensors"))
    assert names == ["toy", "toy-000008", "toy-000016"]
    assert not list((tmp_path / "state").iterdir())  # nothing left to go on with
    assert apart(load_file(tmp_path / "toy-000008.safetensors"), undisturbed.result) > 1e-3
    assert apart(load_file(tmp_path / "toy.safetensors"), undisturbed.result) == 0


def test_a_preview_disturbs_nothing(undisturbed, tmp_path):
    seen = []

    def preview():
        seen.append(torch.rand(3))  # someone else's randomness
        return picture()

    assert apart(toy(tmp_path, preview=preview, preview_every=7), undisturbed.result) == 0
    assert sorted(int(p.stem) for p in (tmp_path / "previews").iterdir()) == [7, 14, 21, 24]
    assert len(seen) == 4 and rows(tmp_path) == undisturbed.rows


def test_previews_are_not_training_time(tmp_path):
    def preview():
        time.sleep(0.3)
        return picture()

    def each(run, _):
        time.sleep(0.05 if run.step in (7, 8) else 0)

    toy(tmp_path, steps=10, preview=preview, preview_every=9, each=each)
    assert 0.1 <= rows(tmp_path, without=())[-1]["seconds"] < 0.3


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 7, 16])
def test_stopped_and_resumed_to_the_bit(undisturbed, tmp_path, capfd, stop, at):
    """After the step under way, also between two log points; the handlers are put back."""
    before = signal.getsignal(stop)
    with pytest.raises(SystemExit) as e:
        toy(tmp_path, each=lambda run, _: os.kill(os.getpid(), stop) if run.step == at else None)
    assert e.value.code == 130 and signal.getsignal(stop) is before
    told = capfd.readouterr()
    assert f"stopped at step {at + 1} of 24; go on with --resume {tmp_path}" in told.out
    assert told.err.count("\nstopping when this step is done and saved; once more stops at once\n") == 1
    assert not (tmp_path / "toy.safetensors").exists()
    assert apart(toy(tmp_path, resume=True), undisturbed.result) == 0
    assert rows(tmp_path) == undisturbed.rows
    assert f"going on from step {at + 1} of 24" in capfd.readouterr().out


def test_stopped_twice_stops_at_once(undisturbed, tmp_path):
    """A preview may take minutes: who does not wait for it goes on from the last state."""

    def twice(run, _):
        if run.step == 15:
            os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        toy(tmp_path, save_every=6, each=twice)
    assert max(int(p.stem) for p in (tmp_path / "state").glob("*.pt")) == 12
    assert apart(toy(tmp_path, save_every=6, resume=True), undisturbed.result) == 0
    assert rows(tmp_path) == undisturbed.rows


def test_a_crash_loses_only_what_came_after_the_last_state(undisturbed, tmp_path):
    with pytest.raises(RuntimeError):
        toy(tmp_path, save_every=6, each=crash_at(23))
    assert [r["step"] for r in rows(tmp_path)] == [10, 20]  # the state is of step 18: 20 is written again
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 2')  # torn
    assert apart(toy(tmp_path, save_every=6, resume=True), undisturbed.result) == 0
    assert rows(tmp_path) == undisturbed.rows


def test_resuming_before_the_first_state_starts_anew(undisturbed, tmp_path, capsys):
    with pytest.raises(RuntimeError):
        toy(tmp_path, each=crash_at(12))
    assert apart(toy(tmp_path, resume=True), undisturbed.result) == 0
    assert rows(tmp_path) == undisturbed.rows and "no saved state yet" in capsys.readouterr().out


def test_what_cannot_be_resumed(tmp_path):
    with pytest.raises(SystemExit):
        toy(tmp_path, save_every=6, each=stop_at(7))
    state = tmp_path / "state" / "000008.pt"
    whole, other = state.read_bytes(), {"steps": 25, "device": "cuda", "more": [1]}
    words = r"steps was 24 and is now 25; more was None and is now \[1\]: another run"
    with pytest.raises(ValueError, match=words):
        toy(tmp_path, config=other, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 24}
    (tmp_path / "state" / "000006.pt").unlink()
    flipped = bytearray(whole)
    flipped[whole.index(torch.load(io.BytesIO(whole))["learns"]["w"].numpy().tobytes())] ^= 1
    for part in (b"", b"hello", whole[:1000], whole[:-1], flipped):
        state.write_bytes(part)
        with pytest.raises(ValueError, match=r"000008.pt cannot be read .*; start again without --resume"):
            toy(tmp_path, resume=True)
    good = torch.load(io.BytesIO(whole), weights_only=True)
    first, flat = ({k: f(t) for k, t in good["learns"].items()} for f in (lambda t: t[:1], lambda t: 1))
    wrong = [("learns", {}), ("learns", first), ("learns", flat), ("optimizer", {}), ("pending", [1])]
    for other in ([1], {}, *({**good, k: v} for k, v in wrong)):
        torch.save(other, state)
        with pytest.raises(ValueError, match=r"000008.pt does not fit .*start again without --resume"):
            toy(tmp_path, resume=True)
    state.write_bytes(whole)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"step": 7}\n[1]\n{"a": 1}\n{"step": 8, "lo\x00')  # killed while it was written
    toy(tmp_path, resume=True)
    assert [r["step"] for r in rows(tmp_path)] == [7, 10, 20, 24]


def test_a_damaged_state_is_passed_over(undisturbed, tmp_path, capsys):
    """The one before it is there for that, stays until there is another good one, and no third is kept."""

    with pytest.raises(RuntimeError):
        toy(tmp_path, save_every=4, each=crash_at(20))
    state = tmp_path / "state"
    assert sorted(p.name for p in state.iterdir()) == ["000016.pt", "000020.pt"]
    (state / "000020.pt").write_bytes((state / "000020.pt").read_bytes()[:-1])
    for half in (state / "000024.pt.part", tmp_path / ".tmpAb3dE6"):  # ours, and safetensors' name for such
        half.write_bytes(b"half of one")
    with pytest.raises(RuntimeError):
        toy(tmp_path, save_every=3, each=crash_at(20), resume=True)
    said = capsys.readouterr().out
    assert "000020.pt cannot be read" in said and "going on from step 16" in said
    assert sorted(p.name for p in state.iterdir()) == ["000016.pt", "000018.pt"]
    assert apart(toy(tmp_path, resume=True), undisturbed.result) == 0 and rows(tmp_path) == undisturbed.rows
    assert not list(state.iterdir()) and not list(tmp_path.glob(".tmp*"))


def test_a_picture_that_a_kill_prevented_is_drawn_on_resume(tmp_path):
    """The state is saved before the preview is drawn."""

    def stopped():
        raise RuntimeError("the power went")

    drawn = dict(preview_every=8, save_every=8, preview=picture)
    with pytest.raises(RuntimeError):
        toy(tmp_path, **{**drawn, "preview": stopped})
    assert not (tmp_path / "previews").exists()
    toy(tmp_path, resume=True, **drawn)
    assert sorted(int(p.stem) for p in (tmp_path / "previews").iterdir()) == [8, 16, 24]


def test_force_goes_on_with_other_settings(tmp_path, capsys):
    """They are told, kept in config.json, and used: rates too, which the optimiser's state holds as well."""
    with pytest.raises(SystemExit):
        toy(tmp_path, each=stop_at(7), lr={"w": 0.05, "b": 0.05})
    rates, new = [], {"steps": 30, "lr": 0.01}
    more = dict(config=new, resume=True, force=True, lr={"w": 0.02, "b": 0.1}, weight_decay=0.5)
    with pytest.raises(ValueError, match="000008.pt is of step 8, but --steps is 7; give at least 8"):
        toy(tmp_path, steps=7, **more)
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 24}
    told = lambda run: [(g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups]  # noqa: E731
    toy(tmp_path, steps=30, each=lambda run, _: rates.append(told(run)), **more)
    assert len(rates) == 22 and rates[0] == [(pytest.approx(0.02), 0.5), (pytest.approx(0.1), 0.5)]
    said = capsys.readouterr().out
    assert "--force: steps was 24 and is now 30; lr was None and is now 0.01; what was trained" in said
    assert json.loads((tmp_path / "config.json").read_text()) == new


# --------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_denoising_loss_by_hand(prediction, gamma):
    """sqrt(a) x0 + sqrt(1 - a) eps goes in; eps or v comes out; min(SNR, gamma) / SNR, or / (SNR + 1)."""
    schedule, batch = Schedule(prediction_type=prediction), Batch(0, 3, range(6), 6)
    x_0 = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    noise, t = batch.normal(x_0.shape), batch.timesteps(1000)
    x_t = schedule.add_noise(x_0, noise, t)
    losses = mse(0.3 * x_t + 0.7, schedule.target(x_0, noise, t)) * min_snr_weight(schedule, t, gamma)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - betas, 0)[t].view(6, 1, 1, 1)
    eps = noise.double()
    assert (x_t - (a.sqrt() * x_0 + (1 - a).sqrt() * eps)).abs().max() < 1e-5
    assert t.dtype == torch.int64 and len(t.unique()) > 3
    aim = eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
    by_hand = (0.3 * x_t + 0.7 - aim).square().mean((1, 2, 3))
    if gamma:
        snr = (a / (1 - a)).flatten()
        assert (snr > gamma).any() and (snr < gamma).any()  # both branches
        by_hand = by_hand * snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    assert losses.shape == (6,) and (losses - by_hand).abs().max() < 1e-5 * by_hand.max()


# ----------------------------------------------------------------------------- killed at random, and for long


def usage() -> tuple[int, int]:
    """Resident bytes and open files of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd"))


def long_toy(out: Path, tell) -> None:
    """240 steps with numbers enough (2.4 MB, a state of 7 MB) that a state that stays would show."""
    w, seen = nn.Parameter(torch.ones(800, 800)), []
    hooks = dict(
        save=lambda path: write_tensors({"w": w}, path), metrics=lambda: {"w": w.mean().item()},
        validate=lambda: w.sum().item(), preview=lambda: Image.new("RGB", (128, 128)),
    )  # fmt: skip
    how = dict(steps=240, batch_size=1, lr=0.01, artefact="w.safetensors", config={}, **hooks)
    run = Trainer(out, {"w": w}, save_every=10, preview_every=20, **how)
    for batch in run:
        run.backward((w * batch.normal((len(batch.indices), 1, 800), "x")).square().mean((1, 2)))
        seen.append(usage())
    tell.send(seen)


def long_lora(out: Path, tell) -> None:
    seen, update = [], Trainer.backward
    Trainer.backward = lambda run, losses: (update(run, losses), seen.append(usage()))
    how = "--steps 1000 --images 3 --batch-size 1 --class-images 0 --held-out 2 --save-every 20"
    train_lora.main([*how.split(), "--preview-every", "50", "--device", "cpu", "--out", str(out)])
    tell.send(seen)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("work", [long_toy, pytest.param(long_lora, marks=pytest.mark.slow)])
def test_a_long_run_keeps_its_size(tmp_path, work):
    """Hundreds of steps with saves and previews: resident size flat within 5 %, no file left open."""
    hear, tell = multiprocessing.Pipe(duplex=False)

    def alone():
        torch.set_num_threads(1)  # OpenMP would wait for the parent's threads, which are not in the child
        work(tmp_path / "run", tell)

    child = multiprocessing.get_context("fork").Process(target=alone)
    child.start()
    tell.close()
    seen = hear.recv()
    child.join()
    resident, files = zip(*seen[60:])  # until then allocators grow
    print(f"{resident[0] / 1e6:.0f} to {max(resident) / 1e6:.0f} MB, {files[0]} to {max(files)} files")
    assert len(seen) >= 240 and max(resident) < 1.05 * resident[0] and set(files) == {files[0]}
    assert [r["step"] for r in rows(tmp_path / "run") if "loss" in r] == list(range(10, len(seen) + 1, 10))


def test_the_optimiser_is_torchs():
    """To the bit: with clipped and refused steps, tensors that stand still for a while, and a saved state."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(n)) for n in (3, 5, 7, 9)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    groups = lambda params: [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.01}]  # noqa: E731
    a = AdamW(groups(ours), 0.1, 0.01)
    b = torch.optim.AdamW(groups(theirs), 0.1, weight_decay=0.01, fused=True)
    for step in range(12):
        for k, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            stands_still = (k, step) in {(0, 0), (1, 4), (1, 5), (3, 7), (2, 10), (2, 11)}
            p.grad = None if stands_still else torch.randn_like(p)
            q.grad = None if stands_still else p.grad.clone()  # which a step scales in place
        for optimizer in (a, b):
            optimizer.grad_scale = torch.tensor(1.0 + step)
            optimizer.found_inf = torch.tensor(float(step == 3))
            optimizer.step()
        if step == 8:  # as a run that is stopped and resumed
            saved = b.state_dict()  # in torch's form
            a = AdamW(groups(ours), 0.1, 0.01)
            a.load_state_dict(saved)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
        saved = [optimizer.state_dict()["state"] for optimizer in (a, b)]
        assert saved[0].keys() == saved[1].keys()
        for number, state in saved[0].items():
            assert state.keys() == saved[1][number].keys()
            assert all(torch.equal(state[name], saved[1][number][name]) for name in state)
    assert len({id(s["step"]) for s in a.state.values()}) == 4  # each has stood still at other steps
