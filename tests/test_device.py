"""Which device, which precision, and torch's settings for a card."""

import os

import pytest
import torch

from hanokdiff import device
from hanokdiff.device import choose_device


@pytest.fixture
def card(monkeypatch):
    """A function that pretends a card of a compute capability; afterwards torch's settings are as before."""
    backends = ((torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32"))
    changed = *backends, (torch.backends.cudnn, "benchmark")
    before = [(owner, name, getattr(owner, name)) for owner, name in changed]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # put back afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # by emulation
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)

    yield pretend
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.mark.parametrize(
    "capability, drawing, training",
    [((6, 1), "fp32", "fp32"), ((7, 0), "fp16", "fp32"), ((7, 5), "fp16", "fp32"), ((8, 0), "bf16", "bf16"),
     ((9, 0), "bf16", "bf16")],
)  # fmt: skip
def test_precision_of_a_card(card, capability, drawing, training):
    card(*capability)
    for name, how in ((drawing, {}), (training, {"training": True})):
        chosen, dtype, reason = choose_device(**how)
        assert (str(chosen), dtype) == ("cuda", device.DTYPES[name]) and name in reason
        assert (name == "bf16") != (f"capability {capability[0]}.{capability[1]} has no bf16" in reason)
    assert "small gradients become 0" in choose_device(training=True)[2] or training == "bf16"
    assert choose_device(dtype="bf16")[1] == torch.bfloat16  # named


def test_settings_of_a_card(card, monkeypatch):
    card(8, 6)
    for dtype, tf32 in (("auto", True), ("fp32", False)):
        choose_device(dtype=dtype)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
    assert torch.backends.cudnn.benchmark and os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choose_device()
    assert not torch.backends.cudnn.benchmark


def test_settings_of_the_user_stay(card, monkeypatch):
    card(8, 6)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # the older name
    choose_device()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_one_card_for_several_processes_is_refused(card, monkeypatch):
    card(8, 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, count in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setattr(device, name, count)
    words = "--device cuda:0 is one card, and there are 2 processes here; say --device cuda"
    with pytest.raises(ValueError, match=words):
        choose_device("cuda:0")
    assert str(choose_device("cuda")[0]) == str(choose_device()[0]) == "cuda:1"
