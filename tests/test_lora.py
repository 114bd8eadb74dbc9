"""LoRA against peft and diffusers, in both directions; step 0, taking it out, merging, refusing. Effects are
asserted to be large first, so that no comparison is of nothing with nothing."""

import copy
import hashlib
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import difference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hanokdiff.formats import lora_file
from hanokdiff.methods import lora
from hanokdiff.methods.inject import base_layer
from hanokdiff.models import memory
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig

TARGETS = ("attention", "attention+ff", "attention+ff+conv")
# kohya's own rule: every Linear and Conv2d below a module of one of these classes
CLASSES = {
    "attention": ("Attention",),
    "attention+ff": ("Transformer2DModel",),
    "attention+ff+conv": ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
}
TEXT_CLASSES = ("CLIPAttention", "CLIPMLP")


@pytest.fixture
def sd(reference, load):
    """The model, and after the test again without LoRAs."""
    model = load(reference)
    yield model
    for network in (model.unet, model.text.encoder):
        for path, module in list(network.named_modules()):
            if isinstance(module, lora.LoRA) and ".base" not in path:
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, base_layer(module))


def inputs():
    g = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 48, generator=g)
    return (x, torch.tensor([7, 801]), context), torch.randint(0, 525, (2, 77), generator=g)


@torch.no_grad()
def outputs(sd) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, ids = inputs()
    return sd.unet(*pixels), sd.text.encoder(ids)


@torch.no_grad()
def theirs(unet, encoder) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, ids = inputs()
    return unet(*pixels).sample, encoder(ids).last_hidden_state


@torch.no_grad()
def trained(loras: dict[str, lora.LoRA], seed: int = 0, scale: float = 0.3) -> None:
    """As after training: `up` is no longer zero."""
    g = torch.Generator().manual_seed(seed)
    for m in loras.values():
        m.up.copy_(scale * torch.randn(m.up.shape, generator=g) / m.rank**0.5)


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def names_of(module, classes: tuple[str, ...], prefix: str) -> set[str]:
    out = set()
    for path, block in module.named_modules():
        if type(block).__name__ in classes:
            layers = [p for p, m in block.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
            out |= {prefix + f"{path}.{p}".replace(".", "_") for p in layers}
    return out


@pytest.mark.parametrize("targets", TARGETS)
def test_names_are_kohyas_and_step_0_is_the_base(sd, reference, targets):
    before = outputs(sd)
    text_rank = 3 if targets == "attention+ff" else 0
    loras = lora.insert(sd, 4, 2.0, targets, text_rank)
    p = reference.pipeline
    expected = names_of(p.unet, CLASSES[targets], "lora_unet_")
    assert len(expected) == {"attention": 128, "attention+ff": 192, "attention+ff+conv": 277}[targets]
    if text_rank:
        expected |= names_of(p.text_encoder, TEXT_CLASSES, "lora_te_text_model_")
        assert len(expected) == 192 + 3 * 6
        m = loras["lora_te_text_model_encoder_layers_2_mlp_fc1"]
        assert (m.rank, m.alpha / m.rank) == (3, 2.0 / 4)  # one --alpha: the same scale everywhere
    assert loras.keys() == expected
    assert equal(outputs(sd), before)
    assert all(m.down.abs().max() > 0 for m in loras.values())  # else nothing would ever be learnt
    trained(loras)
    assert difference(outputs(sd)[0], before[0]) > 1e-2


def test_names_at_full_size():
    """SD 1.5's counts in kohya, and some names that other tools look for."""
    with torch.device("meta"):
        sd = SimpleNamespace(unet=UNet(UNetConfig()), text=SimpleNamespace(encoder=TextEncoder(TextConfig())))
        attention, loras = lora.insert(sd, 1, 1).keys(), lora.insert(sd, 1, 1, "attention+ff+conv", 1)
    assert len(attention) == 128 and attention < loras.keys()
    assert len(loras) == 278 + 12 * 6
    assert loras.keys() >= {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_1_attentions_0_proj_in", "lora_unet_down_blocks_1_resnets_0_conv_shortcut",
        "lora_unet_down_blocks_3_resnets_1_time_emb_proj", "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_up_blocks_0_upsamplers_0_conv", "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
    }  # fmt: skip


def test_the_seed_decides_the_start(sd):
    starts = []
    for seed in (0, 0, 1):
        loras = lora.insert(sd, 2, 2, seed=seed)
        starts.append([m.down.detach().clone() for m in loras.values()])
        lora.remove(sd, loras)
    assert equal(starts[0], starts[1])
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))


def test_in_one_operation_it_is_the_same(sd, monkeypatch):
    """As on a card, here on the CPU: outputs and gradients of the plain equation."""
    loras = lora.insert(sd, 4, 2.0, "attention+ff+conv", 3)
    trained(loras)
    pixels, ids = inputs()
    results = []
    for fused in (False, True):
        monkeypatch.setattr(memory, "ON_CPU", fused)
        params = lora.trainable(loras)
        y, z = sd.unet(*pixels), sd.text.encoder(ids)
        grads = torch.autograd.grad(y.square().mean() + z.square().mean(), list(params.values()))
        results.append([y.detach(), z.detach(), *grads])
    names = ("y", "z", *params)
    for name, plain, once in zip(names, *results, strict=True):
        assert torch.allclose(plain, once, rtol=1e-4, atol=1e-6), name
    assert any(not torch.equal(a, b) for a, b in zip(*results, strict=True))  # it was another way


LAYERS = torch.nn.Linear(64, 96), torch.nn.Conv2d(16, 24, 3, stride=2, padding=1), torch.nn.Conv2d(8, 8, 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_narrow_layer_is_the_same_equation(layer):
    """(W + delta) x, output and gradients, against W x + up(down(x)); in fp32 only, not in wide layers."""
    shape = (5, 64) if isinstance(layer, torch.nn.Linear) else (layer.in_channels, 9, 9)
    x = torch.randn(2, *shape)
    narrow = lora.LoRA(layer.requires_grad_(False), 16, 8.0)
    parameters = [torch.nn.init.normal_(p, std=0.1) for p in (narrow.down, narrow.up)]
    assert narrow.is_narrow() and not lora.LoRA(torch.nn.Linear(320, 320), 8, 8.0).is_narrow()
    assert not lora.LoRA(copy.deepcopy(layer).bfloat16(), 16, 8.0).is_narrow()
    ours, equation = narrow(x), layer(x) + 0.5 * narrow.up_down(x)
    assert difference(ours, layer(x)) > 0.1 and difference(ours, equation) < 1e-5
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (ours, equation))):
        assert difference(a, b) < 1e-5 * b.abs().max()


def test_half_precision_trains_copies_of_fp32(sd, tmp_path):
    """What is used is in the network's precision; what is saved and merged has all digits."""
    sd = replace(sd, unet=copy.deepcopy(sd.unet).bfloat16())
    loras = lora.insert(sd, 2, 2)
    exact = {name: m.down.detach().clone() for name, m in loras.items()}
    params = lora.trainable(loras)
    assert {(p.dtype, p.requires_grad) for p in params.values()} == {(torch.bfloat16, True)}
    lora_file.save_file(tmp_path / "l.safetensors", loras, {}, torch.float32)
    saved = load_file(tmp_path / "l.safetensors")
    for name, m in loras.items():
        assert torch.equal(saved[f"{name}.lora_down.weight"], exact[name])
        assert m.delta().dtype == torch.float32 and not torch.equal(m.down.float(), exact[name])


def their_outputs(reference, path, strength: float):
    """diffusers' pipeline with a file applied by peft."""
    p = reference.pipeline
    parts = {k: copy.deepcopy(v) if isinstance(v, torch.nn.Module) else v for k, v in p.components.items()}
    copied = type(p)(**parts, requires_safety_checker=False)
    copied.load_lora_weights(path, adapter_name="ours")
    copied.set_adapters("ours", strength)
    return theirs(copied.unet.float(), copied.text_encoder.float())


def test_our_file_in_diffusers(sd, reference, tmp_path):
    """Attention, feed-forward, convolutions and text encoder; alpha is not the rank, strength is not 1."""
    before, path = outputs(sd), tmp_path / "a.safetensors"
    loras = lora.insert(sd, 4, 6.0, "attention+ff+conv", 3)
    trained(loras)
    lora_file.save_file(path, loras, {"ss_v2": "False"})
    lora.remove(sd, loras)
    applied, _ = lora_file.apply_file(sd, path, 0.5, log=None)
    assert len(applied) == 277 + 18
    for ours, other, base in zip(outputs(sd), their_outputs(reference, path, 0.5), before, strict=True):
        assert difference(ours, base) > 1e-2
        assert difference(ours, other) <= 1e-5
    for m in applied.values():
        m.strength = 1.0
    # the strength is no decoration
    assert difference(outputs(sd)[0], their_outputs(reference, path, 0.5)[0]) > 1e-2


def wild(sd, alphas=lambda i: None) -> dict[str, torch.Tensor]:
    """A file as seen in the wild: a few modules of each kind, half precision, 1x1 convolutions as 4-D."""
    g, tensors, places = torch.Generator().manual_seed(3), {}, lora.layers(sd)
    ends = ("attn2_to_k", "attn1_to_out_0", "proj_in", "resnets_1_conv2", "conv_shortcut", "fc2")
    ends += tuple(f"attn_{x}_proj" for x in ("q", "k", "v", "out"))  # v_proj alone diffusers would lose
    for i, name in enumerate(n for n in sorted(places) if n.endswith(ends)):
        network, p = places[name]
        w = network.get_submodule(p).weight
        down, up = torch.randn(5, *w.shape[1:], generator=g), torch.randn(w.shape[0], 5, generator=g)
        tensors[f"{name}.lora_down.weight"] = (down / down[0].numel() ** 0.5).half()
        tensors[f"{name}.lora_up.weight"] = (0.1 * up.view(*up.shape, *[1] * (w.dim() - 2))).half()
        if alphas(i) is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alphas(i)).half()
    return tensors


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_their_file_here(sd, reference, tmp_path, alpha):
    """Without alpha the scale is 1."""
    tensors, path = wild(sd, lambda i: alpha), tmp_path / "wild.safetensors"
    dims = {t.dim() for k, t in tensors.items() if k.endswith("proj_in.lora_down.weight")}
    assert dims == {4 if reference.flavour == "sd1" else 2}
    save_file(tensors, path)
    before, said = outputs(sd), []
    loras, metadata = lora_file.apply_file(sd, path, log=said.append)
    assert metadata == {} and f"all {len(loras)} modules matched" in said[0]
    assert {m.alpha for m in loras.values()} == {alpha or 5.0}
    for ours, other, base in zip(outputs(sd), their_outputs(reference, path, 1.0), before, strict=True):
        assert difference(ours, base) > 1e-2
        assert difference(ours, other) <= 1e-5


def test_alpha_missing_for_some(sd, tmp_path):
    """Each for itself, as kohya and the WebUI do."""
    save_file(wild(sd, lambda i: (None, 2.0, 10.0)[i % 3]), tmp_path / "wild.safetensors")
    loras, _ = lora_file.apply_file(sd, tmp_path / "wild.safetensors", log=None)
    assert [m.alpha / m.rank for m in loras.values()][:6] == [1, 0.4, 2] * 2


def test_either_shape_of_a_1x1_convolution(sd, tmp_path):
    """Some writers flatten them, some give Linears two dimensions more: the same picture."""
    loras = lora.insert(sd, 2, 2, "attention+ff")
    trained(loras)
    lora_file.save_file(tmp_path / "a.safetensors", loras, {})
    expected = outputs(sd)
    lora.remove(sd, loras)
    tensors = load_file(tmp_path / "a.safetensors")

    def turned(t):
        return t.flatten(1) if t.dim() == 4 else t[..., None, None]

    other = {k: t if k.endswith("alpha") else turned(t) for k, t in tensors.items()}
    save_file(other, tmp_path / "b.safetensors")
    lora_file.apply_file(sd, tmp_path / "b.safetensors", log=None)
    assert difference(outputs(sd)[0], expected[0]) <= 1e-5


def test_merging_equals_applying_and_two_add_up(sd):
    before, tensors = outputs(sd), {k: t.clone() for k, t in sd.unet.state_dict().items()}
    first = lora.insert(sd, 4, 2.0, "attention+ff+conv", 4)
    second = lora.insert(sd, 3, 3.0, "attention+ff", seed=1)
    trained(first), trained(second, seed=1)
    for m in second.values():
        m.strength = -0.5
    applied = outputs(sd)
    once = lora.merge(sd, first)
    assert difference(outputs(sd)[0], applied[0]) <= 1e-5  # one merged, one applied
    twice = lora.merge(sd, second)
    both = outputs(sd)
    assert not any(isinstance(m, lora.LoRA) for m in sd.unet.modules())
    assert difference(applied[0], both[0]) <= 1e-5 and difference(applied[1], both[1]) <= 1e-5
    lora.unmerge(sd, twice)
    one = outputs(sd)
    assert difference(both[0], one[0]) > 1e-2 and difference(one[0], before[0]) > 1e-2
    lora.unmerge(sd, once)
    assert equal(outputs(sd), before)
    assert all(torch.equal(t, tensors[k]) for k, t in sd.unet.state_dict().items())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_removing_in_any_order(sd, order):
    before, tensors = outputs(sd), {k: t.clone() for k, t in sd.unet.state_dict().items()}
    stack = [lora.insert(sd, 2, 2, "attention+ff"), lora.insert(sd, 3, 3, "attention", seed=1)]
    for i, loras in enumerate(stack):
        trained(loras, seed=i)
    both = outputs(sd)
    lora.remove(sd, stack[order[0]])
    one = outputs(sd)
    assert difference(both[0], one[0]) > 1e-3 and difference(one[0], before[0]) > 1e-3
    lora.remove(sd, stack[order[1]])
    assert equal(outputs(sd), before)
    after = sd.unet.state_dict()
    assert after.keys() == tensors.keys() and all(torch.equal(after[k], t) for k, t in tensors.items())
    assert not any(isinstance(m, lora.LoRA) for m in sd.unet.modules())


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"


@pytest.fixture
def good(sd) -> dict[str, torch.Tensor]:
    """A file's tensors for two modules, right for the model."""
    out = {}
    for name in (NAME, NAME.replace("to_k", "to_v")):
        network, path = lora.layers(sd)[name]
        up = torch.ones(len(network.get_submodule(path).weight), 4)
        out |= {f"{name}.lora_down.weight": torch.ones(4, 48), f"{name}.lora_up.weight": up}
        out[f"{name}.alpha"] = torch.tensor(4.0)
    return out


BAD = {
    "LoHa": (lambda t: {f"{NAME}.hada_w1_a": torch.ones(4, 4)}, ("LoHa", "hada_w1_a")),
    "LoKr": (lambda t: {f"{NAME}.lokr_w1": torch.ones(4, 4)}, ("LoKr", "lokr_w1")),
    "DoRA": (lambda t: {**t, f"{NAME}.dora_scale": torch.ones(64)}, ("DoRA", "dora_scale")),
    "no up": (lambda t: {k: v for k, v in t.items() if k != UP}, (NAME, "no lora_down or")),
    "alpha alone": (lambda t: {f"{NAME}.alpha": torch.tensor(1.0)}, (NAME, "not a complete LoRA")),
    "empty": (lambda t: {}, ("no tensors",)),
    "a checkpoint": (lambda t: {"conv_in.weight": torch.ones(4, 4)}, ("conv_in.weight", "kohya")),
    "none match": (lambda t: {k.replace("mid_block", "mud"): v for k, v in t.items()}, ("0 of 2", "another")),
    "one left over": (lambda t: {**t, "lora_unet_x.lora_down.weight": torch.ones(1, 1),
                                 "lora_unet_x.lora_up.weight": torch.ones(1, 1)}, ("2 of 3", "lora_unet_x")),
    "width in": (lambda t: {**t, DOWN: torch.ones(4, 768)}, (NAME, "768 -> ", "goes 48 -> ")),
    "width out": (lambda t: {**t, UP: torch.ones(320, 4)}, (NAME, "48 -> 320")),
    "two ranks": (lambda t: {**t, DOWN: torch.ones(3, 48)}, (NAME, "rank", "(3, 48)", ", 4)")),
    "rank 0": (lambda t: {**t, UP: t[UP][:, :0], DOWN: torch.ones(0, 48)}, (NAME, "rank", "0")),
    "no dimensions": (lambda t: {**t, DOWN: torch.tensor(1.0)}, (NAME,)),
    "not finite": (lambda t: {**t, UP: t[UP] / 0}, (NAME, "not finite")),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(sd, good, tmp_path, kind):
    """Named, and nothing applied: neither the wrong module nor the good ones before it."""
    change, words = BAD[kind]
    path, before = tmp_path / "bad.safetensors", outputs(sd)
    save_file({k: t.contiguous() for k, t in change(good).items()}, path)
    with pytest.raises(ValueError) as e:
        lora_file.apply_file(sd, path, log=None)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in (str(path), *words)), e.value
    assert equal(outputs(sd), before) and not any(isinstance(m, lora.LoRA) for m in sd.unet.modules())


def test_the_good_one_of_these_is_not_refused(sd, good, tmp_path):
    before = outputs(sd)
    save_file(good, tmp_path / "good.safetensors")
    loras, _ = lora_file.apply_file(sd, tmp_path / "good.safetensors", log=None)
    assert len(loras) == 2 and difference(outputs(sd)[0], before[0]) > 1e-2


def test_no_files_and_what_is_not_written(sd, tmp_path):
    """Damaged files: robustness/test_fuzz.py."""
    for path in (tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(ValueError, match="no LoRA file at"):
            lora_file.apply_file(sd, path)
    loras = lora.insert(sd, 2, 2)
    with torch.no_grad():
        next(iter(loras.values())).up[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lora_file.save_file(tmp_path / "a.safetensors", loras, {})
    assert not list(tmp_path.iterdir())


OPTIONS = dict(
    name="hanok", images=7, reg_images=3, token="<hanok>", rank=64, alpha=32, text_rank=0, text_lr=5e-5,
    lr=1e-4, steps=30, batch_size=2, resolution=64, seed=5, an_option_of_another_kind=1,
)  # fmt: skip


def test_metadata_and_hashes(sd, reference, tmp_path):
    """sha256 of what follows the header, and of 64 KiB at 1 MiB, both on a copy with ss_ metadata only."""
    path, loras = tmp_path / "a.safetensors", lora.insert(sd, 64, 32)
    trained(loras)
    lora_file.save_file(path, loras, lora_file.metadata(sd, **OPTIONS))
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    assert lora_file.read_file(path)[1] == metadata
    assert metadata["hanokdiff_token"] == "<hanok>"
    expected = dict(
        network_module="networks.lora", network_dim="64", network_alpha="32.0", network_args="{}", v2="False",
        base_model_version="sd_v1" if reference.flavour == "sd1" else "sd_v1_v", output_name="hanok",
        learning_rate="0.0001", steps="30", seed="5", num_train_images="7", batch_size_per_device="2",
        resolution="(64, 64)",
    )  # fmt: skip
    assert metadata.items() >= {f"ss_{k}": v for k, v in expected.items()}.items()
    own = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    assert len(own) == len(metadata) - 3  # without our word and the two hashes
    save_file(load_file(path), tmp_path / "copy.safetensors", own)
    raw = (tmp_path / "copy.safetensors").read_bytes()
    assert len(raw) > 0x110000
    body = io.BytesIO(raw)
    body.seek(8 + int.from_bytes(body.read(8), "little"))
    assert metadata["sshs_model_hash"] == hashlib.sha256(body.read()).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(raw[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header[f"{NAME}.alpha"]["shape"] == []


def test_other_numbers_have_another_hash(sd, tmp_path):
    hashes, loras = set(), lora.insert(sd, 2, 2)
    for seed in (0, 0, 1):
        trained(loras, seed)
        lora_file.save_file(tmp_path / "a.safetensors", loras, {})
        hashes.add(lora_file.read_file(tmp_path / "a.safetensors")[1]["sshs_model_hash"])
    assert len(hashes) == 2


def test_half_precision_files(sd, tmp_path):
    loras = lora.insert(sd, 2, 1.0)
    trained(loras)
    full = outputs(sd)
    lora_file.save_file(tmp_path / "a.safetensors", loras, {}, torch.float16)
    lora.remove(sd, loras)
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    again, _ = lora_file.apply_file(sd, tmp_path / "a.safetensors", log=None)
    assert all(m.up.dtype == torch.float32 and not m.up.requires_grad for m in again.values())
    assert 0 < difference(outputs(sd)[0], full[0]) < 2e-2
