"""The benchmark: both sides have the same weights, the table and the JSON the same figures."""

import json
import os
import signal
import subprocess
import sys
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import hanokdiff.bench
from hanokdiff.bench import __main__ as bench
from hanokdiff.bench import baseline, budget, card, measure, setup

ROOT = Path(__file__).parent.parent


def test_both_sides_have_the_same_weights():
    sd = setup.build("overhead", "cpu", torch.float32)
    pipe, x, t = baseline.pipeline(sd), torch.randn(1, 4, 16, 16), torch.tensor([7])
    with torch.no_grad():
        words = sd.text(["a house"])
        assert (sd.unet(x, t, words) - pipe.unet(x, t, words).sample).abs().max() < 1e-5
        ids = pipe.tokenizer("a house", padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert (pipe.text_encoder(ids)[0] - words).abs().max() < 1e-5
        ours = sd.vae.decode(x * sd.vae.config.scaling_factor)
        assert (pipe.vae.decode(x).sample - ours).abs().max() < 1e-4


@pytest.mark.parametrize("method", (*setup.TRAINED, *setup.RECIPES))
def test_ours_trains(method, tmp_path):
    """Every step of the benchmark is a step of training: only what the method trains changes."""
    sd = setup.build("overhead", "cpu", torch.float32)
    before = {k: p.clone() for k, p in sd.unet.state_dict().items()}
    steps = measure.train(sd, method, 128, 2, tmp_path)
    for _ in range(2):
        next(steps)
    changed = [k for k, p in sd.unet.state_dict().items() if k in before and not torch.equal(p, before[k])]
    assert bool(changed) == (method in ("dreambooth", "custom-diffusion"))
    trainable = [p for n in (sd.unet, sd.text.encoder) for p in n.parameters() if p.requires_grad]
    assert trainable and method != "lora" or sum(p.numel() for p in trainable) < 60_000


@pytest.mark.parametrize("kind", baseline.kinds("cpu"))
@pytest.mark.parametrize("method", ["ti", "dreambooth", "lora"])
def test_the_baseline_trains(method, kind):
    pipe = baseline.pipeline(setup.build("overhead", "cpu", torch.float32))
    before = {k: p.detach().clone() for k, p in pipe.unet.named_parameters()}
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    steps = baseline.train(pipe, method, kind != "diffusers default", torch.float32, 2, *setup.photos(128))
    for _ in range(2):
        next(steps)
    changed = [k for k, p in pipe.unet.named_parameters() if k in before and not torch.equal(p, before[k])]
    assert bool(changed) == (method in ("dreambooth", "custom-diffusion"))
    trained = pipe.text_encoder.get_input_embeddings().weight
    if method == "ti":  # the first row beyond the tokenizer's vocabulary
        assert (trained != table).any(1).nonzero().flatten().tolist() == [len(pipe.tokenizer) - 1]
    lora = [p for k, p in pipe.unet.named_parameters() if "lora_B" in k]
    assert len(lora) == (128 if method == "lora" else 0) and all(p.abs().max() > 0 for p in lora)


def test_the_command(tmp_path, capsys, monkeypatch):
    """A row for each side; the JSON has the table's figures; a ratio is the baseline's time over ours."""
    monkeypatch.setattr(setup, "STEPS", 2)
    options = "--size overhead --batch-size 1 --rounds 1 --turn 1 --vs diffusers --share"
    assert bench.main(["lora", "sample", *options.split(), "--json", str(tmp_path / "a.json")]) == 0
    out, content = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    sides = [(r["work"], r["side"]) for r in content["rows"]]
    each = ("ours", "diffusers default", "diffusers best")
    assert sides == [(work, side) for work in ("lora", "sample") for side in each]
    for row in content["rows"]:
        ours = next(r for r in content["rows"] if r["work"] == row["work"] and r["side"] == "ours")
        assert row["ratio_min"] == pytest.approx(row["seconds_min"] / ours["seconds_min"])
        assert bench.line(row) in out and row["steps"] == 1
    assert all(0 < r["mfu"] < 1 for r in content["rows"])
    repeats = [(r["work"], r["share_of_limit"] > r["mfu"]) for r in content["rows"] if r["side"] == "ours"]
    assert repeats == [("lora", True), ("sample", False)]
    assert content["torch"] == torch.__version__ and "threads on the CPU" in content["device"]
    assert content["rows"][3]["images_per_second"] == pytest.approx(1 / content["rows"][3]["seconds_min"])
    assert out.count("limit") == 1 and "peak" not in out and not list(tmp_path.glob("hanokdiff-*"))


def test_the_default_size(capsys):
    assert bench.main(["lora", "--rounds", "1", "--turn", "1", "--share"]) == 0
    assert "tiny, 64 px, 8 pictures a step" in capsys.readouterr().out


def test_stopped(monkeypatch, tmp_path, capsys):
    """Ctrl-C stops it without a saved state or a folder; the JSON has what was measured before."""
    real, temporary, file = measure.interleaved, tmp_path / "temporary", tmp_path / "new" / "a.json"
    temporary.mkdir()
    monkeypatch.setattr(measure.tempfile, "tempdir", str(temporary))

    def interrupted(sides, *how):
        if file.exists():  # the second work has begun
            next(sides["ours"])
            os.kill(os.getpid(), signal.SIGINT)
        return real(sides, *how)

    monkeypatch.setattr(measure, "interleaved", interrupted)
    argv = ["lora", "hypernet", "--size", "overhead", "--rounds", "1", "--turn", "1", "--json", str(file)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        assert bench.main(argv) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in capsys.readouterr().err and not list(temporary.iterdir())
    assert [r["work"] for r in json.loads(file.read_text())["rows"]] == ["lora"]


def test_turns_are_taken(monkeypatch):
    """a a b b, a a b b, ...; the first turn does not count, and the device is waited for once a turn."""
    seen, waits = [], []

    def side(name):
        while True:
            seen.append(name)
            yield

    times = measure.interleaved({"a": side("a"), "b": side("b")}, 3, 2, lambda: waits.append(len(seen)))
    assert "".join(seen) == "aabb" * 4 and [len(t) for t in times.values()] == [3, 3]
    assert waits == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.fixture
def pretended(monkeypatch):
    """The calls to torch.cuda that the bench makes, in order; the models are built on the CPU."""
    calls, real = [], setup.build
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name: calls.append((name, *a)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    monkeypatch.setattr(measure, "nvidia_smi", lambda field: "1980")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(setup, "build", lambda size, device, dtype: real(size, "cpu", dtype))
    return calls


def test_on_a_gpu_each_side_is_freed_before_the_next(pretended, monkeypatch):
    """No model, of ours or of diffusers, outlives its turns; what does not fit is skipped. The peak is that
    of the steps that count."""
    alive, build, load = [], setup.build, baseline.pipeline

    def counted(*args):
        assert not [network for ref in alive if (network := ref())], "the side before is still there"
        sd = build(*args)
        alive.append(weakref.ref(sd.unet))
        return sd

    def loaded(sd):
        pipe = load(sd)
        alive.append(weakref.ref(pipe.unet))
        if len(alive) == 3:
            raise torch.OutOfMemoryError("of the default")
        return pipe

    monkeypatch.setattr(setup, "build", counted)
    monkeypatch.setattr(baseline, "pipeline", loaded)
    args = Namespace(size="tiny", side=64, batch=1, device="cuda:1", dtype=torch.float32, vs="diffusers",
                     channels_last=False, compile=False, checkpointing=False, rounds=2, turn=1)  # fmt: skip
    measured = dict(measure.time_sides(args, "lora"))
    assert list(measured) == ["ours", "diffusers default", "diffusers best", "diffusers best, NHWC"]
    assert measured.pop("diffusers default") == {} and len(alive) == 7
    for row in measured.values():
        assert len(row["seconds"]) == 2 and row["peak_bytes"] == 3 << 30 and row["clock_mhz"] == "1980"
    names = [name for name, *_ in pretended]
    assert names[:6] == ["empty_cache", "synchronize", "reset_peak_memory_stats", *["synchronize"] * 3]


def test_the_gpu_that_is_named(pretended, monkeypatch, capsys):
    """All that asks for the present GPU asks for the one of --device; a side that does not fit has a line."""
    chosen = (torch.device("cuda:1"), torch.bfloat16, "named")
    monkeypatch.setattr(bench, "choose_device", lambda *_, **__: chosen)
    rows = [("ours", {"seconds": [2.0, 1.0], "peak_bytes": 1 << 30}), ("diffusers best", {})]
    monkeypatch.setattr(measure, "time_sides", lambda args, work: pretended.append(work) or iter(rows))
    monkeypatch.setattr(measure, "limit_memory", lambda gib: pretended.append(("cap", gib)))
    assert bench.main(["lora", "--device", "cuda:1", "--cap", "44"]) == 0
    assert pretended == [("set_device", 1), ("cap", 44.0), "lora"]
    out = capsys.readouterr().out
    assert "does not fit" in out and " 1000.0    1500.0 " in out and "a card" in out


def test_shares_of_the_limit():
    """The model's own operations; and those executed, with what backward and checkpointing repeat."""
    (model, executed), (same, more) = (budget.share_of("lora", "tiny", 2, c) for c in (False, True))
    assert model == same and model < executed < 1.1 * model and more > 1.2 * model
    picture = budget.share_of("sample", "tiny", 1, False)[0]  # the timestep's embedding serves all pictures
    assert budget.share_of("sample", "tiny", 3, True) == pytest.approx((3 * picture, 3 * picture), rel=1e-3)


def test_a_device_against_the_cpu(tmp_path, capsys):
    """fp32 on the CPU agrees with itself, bf16 nearly; all stand in the table."""
    assert card.main(["agree", "cpu", "tiny", str(tmp_path / "1.json")]) == 0
    reference, fp32, bf16 = json.loads((tmp_path / "1.json").read_text())["agreement"]
    assert fp32["loss"] == pytest.approx(reference["loss"], rel=1e-5) and fp32["latents_distance"] < 1e-5
    assert fp32["gradient_cosine"] == pytest.approx(1) and 0.99 < bf16["gradient_cosine"] < 0.9999
    assert bf16["loss"] == pytest.approx(fp32["loss"], rel=0.02) and 0 < bf16["latents_distance"] < 0.3
    assert bench.main(["ti", "--rounds", "1", "--turn", "1", "--json", str(tmp_path / "2.json")]) == 0
    capsys.readouterr()
    assert card.main(["table", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"| tiny | cpu bf16 | {bf16['loss']:.5f} |" in out
    assert "| ti | ours | tiny, 8 pictures, float32 |" in out
    assert card.main(["table"]) == 2 and "what to do is not clear" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_of_a_process_of_its_own(capsys):
    argv = ["lora", "--size", "overhead", "--batch-size", "1", "--rounds", "1", "--memory"]
    assert bench.main(argv) == 0
    peak = float(capsys.readouterr().out.splitlines()[-1].split()[6])
    assert 0.2 < peak < 1  # GiB: Python, torch and a network of 3 million numbers


@pytest.mark.parametrize(("argv", "message"), [
    (["walk"], "walk is nothing to measure; choose of ti, dreambooth, lora"),
    (["lora", "--rounds", "0"], "--rounds is 0, but must be from 1 to 4096"),
    (["lora", "--batch-size", "1000000"], "--batch-size is 1000000, but must be from 1 to 4096"),
    (["lora", "--cap", "-3"], "--cap is -3, but must be a number of GiB greater than 0"),
    (["lora", "--cap", "4", "--device", "cpu"], "--cap is for a GPU, but the device is cpu; leave it out"),
    (["start", "--size", "small"], "leave out --size and --batch-size"),
])  # fmt: skip
def test_mistakes(argv, message, capsys):
    assert bench.main(argv) == 2 and message in capsys.readouterr().err


def test_without_diffusers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hanokdiff.bench.baseline", None)
    monkeypatch.delattr(hanokdiff.bench, "baseline", raising=False)
    assert bench.main(["lora", "--size", "overhead", "--vs", "diffusers", "--rounds", "1"]) == 2
    assert "--vs diffusers needs both sides: pip install -r requirements-dev.txt" in capsys.readouterr().err


@pytest.mark.parametrize("work", setup.SAMPLED)
def test_ways_of_sampling(work, monkeypatch, capsys):
    """A step is a whole picture by its own prompt; attention is moved only where it is asked for."""
    monkeypatch.setattr(setup, "STEPS", 2)
    assert bench.main([work, "--rounds", "1", "--turn", "1", "--batch-size", "1"]) == 0
    assert work in capsys.readouterr().out


def test_process_start():
    """What both processes that `start` times run. Ours imports no torch._dynamo, which takes most of a
    second; and nothing but the baseline imports diffusers."""
    code = measure.FIRST_STEP["ours"] + (
        "; import sys; assert 'torch._dynamo' not in sys.modules\n"
        "import hanokdiff.bench, hanokdiff.bench.budget, hanokdiff.compare, sample, train_lora\n"
        "assert not {'diffusers', 'peft', 'hanokdiff.bench.baseline'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    exec(measure.FIRST_STEP["diffusers"], {})
