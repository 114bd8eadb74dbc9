"""Hypernetworks: the WebUI's formula and file, by hand and hung into diffusers' UNet; the trainer.

x + m f(x) stands before every to_k and to_v; f's tensors are named by their place in a Sequential."""

import contextlib
import copy
import json
import os
import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import difference
from test_lora import equal, inputs, trained
from test_scripts import hashes, listing, refused

import train_hypernet
from hanokdiff.formats import hypernet_file, lora_file
from hanokdiff.formats.load import TINY_MODEL, load_model
from hanokdiff.methods import hypernetwork, lora
from hanokdiff.methods.inject import base_layer
from hanokdiff.models.unet import Attention
from hanokdiff.tiny import world

pytestmark = pytest.mark.usefixtures("elsewhere")
FUNCTIONS = {
    "linear": lambda x: x, "relu": lambda x: x.clamp(min=0), "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x), "gelu": F.gelu, "silu": F.silu,
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1), "swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "mish": lambda x: x * torch.tanh(torch.log1p(x.exp())), "softsign": lambda x: x / (1 + x.abs()),
}  # fmt: skip
STRINGS = {
    "step", "name", "layer_structure", "activation_func", "is_layer_norm", "weight_initialization",
    "sd_checkpoint", "sd_checkpoint_name", "activate_output", "use_dropout", "dropout_structure",
    "last_layer_dropout", "optional_info",
}  # fmt: skip


# --------------------------------------------------------------------------- the format, from its description


def settings(layers=(1, 2, 1), activation="linear", norm=False, dropout=None, output=False) -> dict:
    """A file's string entries."""
    dropout = list(dropout or [0] * len(layers))
    return dict(
        step=7, name="a", layer_structure=list(layers), activation_func=activation, is_layer_norm=norm,
        weight_initialization="Normal", sd_checkpoint=None, sd_checkpoint_name=None, activate_output=output,
        use_dropout=any(dropout), dropout_structure=dropout, last_layer_dropout=dropout[-2] != 0,
        optional_info=None,
    )  # fmt: skip


def indices(s: dict):
    """(kind, number in the Sequential, widths in and out as multiples) of a network with these settings."""
    layers, k = s["layer_structure"], 0
    for i in range(len(layers) - 1):
        yield "linear", k, layers[i], layers[i + 1]
        k += 1
        if s["activation_func"] != "linear" and (i < len(layers) - 2 or s["activate_output"]):
            yield "activation", k, None, None
            k += 1
        if s["is_layer_norm"]:
            yield "norm", k, None, layers[i + 1]
            k += 1
        k += s["dropout_structure"][i + 1] > 0


def random_file(path, widths, s: dict, seed: int = 0) -> dict:
    """Written as any tool would; returns the content."""
    g, content = torch.Generator().manual_seed(seed), {}
    for d in widths:
        pair = ({}, {})
        for tensors in pair:
            for kind, k, a, b in indices(s):
                if kind == "linear":
                    n, m = int(d * a), int(d * b)
                    tensors[f"linear.{k}.weight"] = torch.randn(m, n, generator=g) * 0.7 * n**-0.5
                    tensors[f"linear.{k}.bias"] = 0.1 * torch.randn(m, generator=g)
                elif kind == "norm":
                    tensors[f"linear.{k}.weight"] = 0.5 * torch.randn(int(d * b), generator=g)
                    tensors[f"linear.{k}.bias"] = 0.1 * torch.randn(int(d * b), generator=g)
        content[d] = pair
    content |= s
    torch.save(content, path)
    return content


def by_hand(tensors: dict, s: dict, x: torch.Tensor, strength: float) -> torch.Tensor:
    y, used = x, 0
    for kind, k, _, _ in indices(s):
        if kind == "activation":
            y = FUNCTIONS[s["activation_func"]](y)
            continue
        weight, bias = tensors[f"linear.{k}.weight"], tensors[f"linear.{k}.bias"]
        y = F.linear(y, weight, bias) if kind == "linear" else F.layer_norm(y, y.shape[-1:], weight, bias)
        used += 2
    assert used == len(tensors)
    return x + strength * y


@contextlib.contextmanager
def hooked(unet, *applied):
    """diffusers' UNet with hypernetworks (content, strength) before every to_k and to_v, in this order."""

    def before(side):
        def hook(_, args):
            x = args[0]
            for content, strength in applied:
                if x.shape[-1] in content:
                    x = by_hand(content[x.shape[-1]][side], content, x, strength)
            return (x,)

        return hook

    places = [m for name, m in unet.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert len(places) == 32
    handles = [m.to_k.register_forward_pre_hook(before(0)) for m in places]
    handles += [m.to_v.register_forward_pre_hook(before(1)) for m in places]
    yield unet
    for handle in handles:
        handle.remove()


@torch.no_grad()
def theirs(unet, *applied) -> torch.Tensor:
    with hooked(unet, *applied):
        return unet(*inputs()[0]).sample


@torch.no_grad()
def ours(sd) -> torch.Tensor:
    return sd.unet(*inputs()[0])


@pytest.fixture
def sd(reference, load):
    """The model, and after the test again without anything in front of its layers."""
    yield from bare(load(reference))


@pytest.fixture
def sd_1(sd1, load):
    """The same of SD 1.x alone, where a second model would say nothing new."""
    yield from bare(load(sd1))


def untouched(sd) -> bool:
    return not any(isinstance(m, hypernetwork.HypernetLinear | lora.LoRA) for m in sd.unet.modules())


def bare(sd):
    yield sd
    for attention in [m for m in sd.unet.modules() if isinstance(m, Attention)]:
        for name in ("to_q", "to_k", "to_v"):
            setattr(attention, name, base_layer(getattr(attention, name)))
    for path, module in list(sd.unet.named_modules()):
        if isinstance(module, lora.LoRA):
            parent, _, name = path.rpartition(".")
            setattr(sd.unet.get_submodule(parent), name, base_layer(module))
    sd.unet._forward_pre_hooks.clear()


# ------------------------------------------------------------------------------------------------ applying it


KINDS = {
    "linear": settings(),
    "relu": settings(activation="relu"),
    "relu and norm": settings(activation="relu", norm=True),
    "swish, deeper, dropout": settings((1, 2, 2, 1), "swish", dropout=(0, 0.3, 0.2, 0)),
    "mish on the output too": settings((1, 1.5, 1), "mish", output=True),
    "all": settings((1, 0.5, 2, 1), "softsign", True, (0, 0, 0.3, 0), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_our_unet_and_in_diffusers(sd, reference, tmp_path, kind):
    """All widths at strength 0.7; and taken out again, to the bit."""
    path, before, said = tmp_path / "a.pt", ours(sd), []
    every = hypernetwork.dims(sd)["all"]
    assert every == {"sd1": [32, 48, 64], "sd2": [48, 64, 128]}[reference.flavour]
    content = random_file(path, every, KINDS[kind])
    loaded, metadata = hypernet_file.apply_file(sd, path, 0.7, said.append)
    assert "before 64 keys and values, strength 0.7" in said[0] and metadata["step"] == 7
    expected = theirs(reference.pipeline.unet, (content, 0.7))
    assert difference(expected, before) > 1e-2 and difference(ours(sd), expected) <= 1e-5
    hypernetwork.remove(sd, loaded)
    assert equal([ours(sd)], [before]) and untouched(sd)


def test_any_strength_and_some_of_the_widths(sd, reference, tmp_path):
    path, unet, before, said = tmp_path / "a.pt", reference.pipeline.unet, ours(sd), []
    places = [m.in_features for p, m in unet.named_modules() if p.endswith(("to_k", "to_v"))]
    for widths in ([48], [64]):
        content = random_file(path, widths, settings(activation="relu"))
        loaded, _ = hypernet_file.apply_file(sd, path, log=said.append)
        assert f"before {places.count(widths[0])} keys and values, strength 1" in said[-1]
        one = ours(sd)
        assert difference(one, theirs(unet, (content, 1.0))) <= 1e-5
        loaded.strength = -0.5
        assert difference(ours(sd), theirs(unet, (content, -0.5))) <= 1e-5
        assert difference(ours(sd), one) > 1e-2
        loaded.strength = 0.0
        assert equal([ours(sd)], [before])
        hypernetwork.remove(sd, loaded)
    assert equal([ours(sd)], [before])


def test_several_in_order(sd_1, sd1, tmp_path):
    """The order counts; the first may leave before the second."""
    unet, before, outs = sd1.pipeline.unet, ours(sd_1), []
    a = random_file(tmp_path / "a.pt", [48, 64], settings(activation="relu"), 1)
    b = random_file(tmp_path / "b.pt", [48], settings(activation="tanh", norm=True), 2)
    applied = {"a": (a, 0.7), "b": (b, 1.2)}
    for first, second in ("ab", "ba"):
        files = [(tmp_path / f"{n}.pt", applied[n][1]) for n in (first, second)]
        loaded = [hypernet_file.apply_file(sd_1, file, strength, None)[0] for file, strength in files]
        outs.append(ours(sd_1))
        assert difference(outs[-1], theirs(unet, applied[first], applied[second])) <= 1e-5
        hypernetwork.remove(sd_1, loaded[0])
        assert difference(ours(sd_1), theirs(unet, applied[second])) <= 1e-5
        hypernetwork.remove(sd_1, loaded[1])
        assert equal([ours(sd_1)], [before])
    assert difference(*outs) > 1e-3


@pytest.mark.parametrize("first", ["lora", "hypernet"])
@pytest.mark.parametrize("out", ["lora", "hypernet"])
def test_together_with_a_lora(sd_1, sd1, tmp_path, first, out):
    """Whichever comes first and whichever leaves first: W'(x + f(x)), with W' merged by hand."""
    before, made = ours(sd_1), lora.insert(sd_1, 4, 4.0, "attention+ff")
    trained(made)
    lora_file.save_file(tmp_path / "a.safetensors", made, {})
    deltas = {name: m.delta().detach() for name, m in made.items()}
    only_lora = ours(sd_1)
    lora.remove(sd_1, made)
    content = random_file(tmp_path / "a.pt", hypernetwork.dims(sd_1)["all"], settings(activation="relu"))
    loads = {
        "lora": lambda: lora_file.apply_file(sd_1, tmp_path / "a.safetensors", log=None)[0],
        "hypernet": lambda: hypernet_file.apply_file(sd_1, tmp_path / "a.pt", 0.7, None)[0],
    }
    loaded = {kind: loads[kind]() for kind in sorted(loads, key=lambda kind: kind != first)}
    merged = copy.deepcopy(sd1.pipeline.unet)
    for path, module in merged.named_modules():
        if (name := "lora_unet_" + path.replace(".", "_")) in deltas:
            module.weight.data += deltas[name]
    expected = theirs(merged, (content, 0.7))
    assert difference(ours(sd_1), expected) <= 1e-5
    assert difference(expected, only_lora) > 1e-2 and difference(expected, before) > 1e-2
    removes = {"lora": lora.remove, "hypernet": hypernetwork.remove}
    removes[out](sd_1, loaded.pop(out))
    left = theirs(sd1.pipeline.unet, (content, 0.7)) if out == "lora" else only_lora
    assert difference(ours(sd_1), left) <= 1e-5
    ((kind, last),) = loaded.items()
    removes[kind](sd_1, last)
    assert equal([ours(sd_1)], [before]) and untouched(sd_1)


def test_half_precision(tmp_path):
    """The weights, learnt in fp32, work in the precision of what comes in."""
    content = random_file(tmp_path / "a.pt", [48], settings(activation="relu"))
    spec, nets, _ = hypernet_file.read_file(tmp_path / "a.pt")
    h = hypernetwork.Hypernetwork(spec, nets, 0.7)
    h.pairs["48"][1].load_state_dict(nets[48][1])
    x = torch.randn(3, 77, 48, generator=torch.Generator().manual_seed(0))
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        double = {k: t.double() for k, t in content[48][1].items()}
        exact = by_hand(double, content, x.to(dtype).double(), 0.7)
        y = h.change(x.to(dtype), 1)
        assert y.dtype == dtype and (y.double() - exact).norm() <= 2.0**-digits * exact.norm()
        assert h.pairs["48"][1].linear[0].weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- the module


@pytest.mark.parametrize(("spec", "parts", "names"), [
    (((1, 2, 1), "linear"), "Linear Linear", (0, 1)),
    (((1, 2, 1), "relu"), "Linear ReLU Linear", (0, 2)),
    (((1, 2, 1), "relu", True), "Linear ReLU LayerNorm Linear LayerNorm", (0, 2, 3, 4)),
    (((1, 2, 1), "relu", False, (0, 0.3, 0)), "Linear ReLU Dropout Linear", (0, 3)),
    (((1, 2, 1), "linear", False, (0, 0.3, 0)), "Linear Dropout Linear", (0, 2)),
    (((1, 2, 1), "tanh", True, (), True), "Linear Tanh LayerNorm Linear Tanh LayerNorm", (0, 2, 3, 5)),
    (((1, 2, 4, 2, 1), "swish"), "Linear Hardswish Linear Hardswish Linear Hardswish Linear", (0, 2, 4, 6)),
    (((1, 2, 2, 1), "elu", False, (0, 0, 0.1, 0), True),
     "Linear ELU Linear ELU Dropout Linear ELU", (0, 2, 5)),
    (((1, 1), "sigmoid", False, (0, 0.5)), "Linear Dropout", (0,)),
])  # fmt: skip
def test_places_in_the_sequential(spec, parts, names):
    net = hypernetwork.ResidualMLP(16, hypernetwork.HypernetConfig(*spec))
    assert " ".join(type(m).__name__ for m in net.linear) == parts
    assert set(net.state_dict()) == {f"linear.{k}.{end}" for k in names for end in ("weight", "bias")}
    linears = [m for m in net.linear if isinstance(m, torch.nn.Linear)]
    assert [m.in_features for m in linears] + [linears[-1].out_features] == [16 * n for n in spec[0]]
    dropout = spec[3] if len(spec) > 3 else ()
    assert [m.p for m in net.linear if isinstance(m, torch.nn.Dropout)] == [p for p in dropout if p]


def test_activations():
    """The WebUI's own names, then torch's in lower case: all that can be made without arguments."""
    x, module = torch.linspace(-4, 4, 99), torch.nn.modules.activation
    for name, function in FUNCTIONS.items():
        if name != "linear":
            assert (hypernetwork.ACTIVATIONS[name]()(x) - function(x)).abs().max() < 1e-6, name
    classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    torchs = {c.__name__.lower() for c in classes}
    others = torchs - {"multiheadattention", "threshold", "glu"}  # need arguments, or halve the width
    assert hypernetwork.ACTIVATIONS.keys() == others | {"linear", "swish"} and len(others) > 24


# --------------------------------------------------------------------------------------------------- the file


def test_what_is_written(tmp_path):
    """Old container, only what the WebUI's checker admits, its names, plain types; and read back the same."""
    spec = hypernetwork.HypernetConfig((1, 2.0, 1.5, 1), "mish", True, (0, 0.25, 0.5, 0))
    nets = {d: tuple(hypernetwork.ResidualMLP(d, spec).half().state_dict() for _ in "KV") for d in (64, 48)}
    path = tmp_path / "한옥.pt"
    about = {"step": torch.tensor(30).item(), "model": "m", "info": hypernet_file.TOKEN + "sks"}
    hypernet_file.save_file(path, spec, nets, about)
    assert not zipfile.is_zipfile(path) and listing(tmp_path).keys() == {"한옥.pt"}
    seen = set()
    with open(path, "rb") as f:
        for _ in range(5):  # magic number, protocol, system, content, keys of the storages
            seen |= {arg for op, arg, _ in pickletools.genops(f) if op.name in ("GLOBAL", "STACK_GLOBAL")}
    assert seen == {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
    content = torch.load(path, weights_only=True)
    plain, widths = ({k: v for k, v in content.items() if type(k) is kind} for kind in (str, int))
    own = dict(step=30, name="한옥", sd_checkpoint_name="m", optional_info="hanokdiff_token=sks")
    assert plain == settings((1, 2, 1.5, 1), "mish", True, (0, 0.25, 0.5, 0)) | own
    assert list(widths) == [48, 64] and type(plain["use_dropout"]) is bool
    assert [type(x) for x in plain["layer_structure"]] == [int, int, float, int]
    for d, pair in nets.items():
        assert type(content[d]) is tuple and len(content[d]) == 2
        for held, given in zip(content[d], pair):
            assert type(held) is dict and held.keys() == given.keys()
            assert all(t.dtype == torch.float32 and torch.equal(t, given[k].float()) for k, t in held.items())
    again, read, metadata = hypernet_file.read_file(path)
    assert again == spec and metadata == plain and read.keys() == nets.keys()
    floats = {d: [{k: t.float() for k, t in s.items()} for s in pair] for d, pair in nets.items()}
    assert apart(read, floats) == 0
    spec = hypernetwork.HypernetConfig()
    hypernet_file.save_file(path, spec, {48: (hypernetwork.ResidualMLP(48, spec).state_dict(),) * 2})
    again = torch.load(path, weights_only=True)
    assert {k: again[k] for k in STRINGS} == settings() | {"step": 0, "name": "한옥"}


def test_the_word():
    told = {"hanokdiff_token=*": "*", "hanokdiff_token=a b": "a b", "by me": None, 3: None}
    for info, word in told.items():
        assert hypernet_file.pseudo_word({"optional_info": info}) == word
    assert hypernet_file.pseudo_word({}) is None


def without(content: dict, *keys, **more) -> dict:
    return {**{k: v for k, v in content.items() if k not in keys}, **more}


def ancient(content: dict) -> dict:
    """As NovelAI's: nothing but numbers, and networks of two fields."""
    old = lambda s: {k.replace("linear.0", "linear1").replace("linear.1", "linear2"): t for k, t in s.items()}  # noqa: E731
    return {d: [old(s) for s in pair] for d, pair in content.items() if isinstance(d, int)}


def converted(content: dict, change) -> dict:
    """Every tensor changed."""
    pair = lambda v: tuple({k: change(t) for k, t in s.items()} for s in v)  # noqa: E731
    return {d: pair(v) if isinstance(d, int) else v for d, v in content.items()}


OLD = {  # settings by which the tensors were made, how they are written down
    "only numbers": (settings(output=True), lambda c: {k: v for k, v in c.items() if isinstance(k, int)}),
    "linear1, linear2": (settings(output=True), ancient),
    "no activate_output": (settings(activation="relu", output=True), lambda c: without(c, "activate_output")),
    "no activation": (settings(), lambda c: {**c, "activation_func": None}),
    "dropout of three": (settings(activation="relu"),
                         lambda c: without(c, "dropout_structure", use_dropout=True)),
    "dropout derived": (settings((1, 2, 3, 2, 1), "relu", dropout=(0, 0.3, 0.3, 0, 0)),
                        lambda c: without(c, "dropout_structure", "last_layer_dropout")),
    "the last dropout too": (settings((1, 2, 2, 1), "relu", dropout=(0, 0.3, 0.3, 0)),
                             lambda c: without(c, "dropout_structure")),
    "halves": (settings(activation="relu"), lambda c: converted(c, torch.Tensor.half)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD)
def test_older_files(sd_1, sd1, tmp_path, kind):
    """Defaults where entries are missing; a missing activate_output means True. In diffusers, too."""
    made, write = OLD[kind]
    content = random_file(tmp_path / "new.pt", [48, 32], made)
    torch.save(write(content), tmp_path / "old.pt")
    spec = hypernet_file.read_file(tmp_path / "old.pt")[0]
    assert list(spec.layers) == made["layer_structure"] and not spec.layer_norm
    assert (spec.activation, spec.activate_output) == (made["activation_func"], made["activate_output"])
    assert list(spec.dropout or [0] * len(spec.layers)) == made["dropout_structure"]
    loaded, _ = hypernet_file.apply_file(sd_1, tmp_path / "old.pt", log=None)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    if kind == "halves":
        content = converted(content, lambda t: t.half().float())
    assert difference(ours(sd_1), theirs(sd1.pipeline.unet, (content, 1.0))) <= 1e-5


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run",)


def replace(content: dict, change) -> dict:
    """With one tensor, of the values' network, replaced."""
    keys, values = content[48]
    return {**content, 48: (keys, {**values, "linear.2.bias": change(values["linear.2.bias"])})}


BAD = {  # what is wrong with the file, what the sentence must say
    "cut": (lambda c: replace(c, lambda t: t[:-1]), ("width 48", "1 2 1", "linear.2.bias")),
    "another depth": (lambda c: {**c, "layer_structure": [1, 2, 2, 1], "dropout_structure": [0] * 4},
                      ("width 48", "1 2 2 1", "linear.2")),
    "another activation": (lambda c: {**c, "activation_func": "linear"}, ("width 48", "linear.1")),
    "missing": (lambda c: {**c, 48: ({}, c[48][1])}, ("width 48", "linear.0")),
    "another width": (lambda c: {**c, 32: c[48]}, ("width 32", "linear.0")),
    "not finite": (lambda c: replace(c, lambda t: t / 0), ("width 48", "not finite")),
    "SD 2": (lambda c: {1024: fresh(1024), **without(c, 48)}, ("1024", "SD 2", "32, 48, 64")),
    "SD 1": (lambda c: {**c, 768: fresh(768)}, ("768", "SD 1", "32, 48, 64")),
    "no networks": (lambda c: without(c, 48), ("not a hypernetwork", "768")),
    "no pair": (lambda c: {48: c[48][:1]}, ("not a hypernetwork",)),
    "numbers": (lambda c: {48: (1, 2)}, ("not a hypernetwork",)),
    "no tensors": (lambda c: {48: ({"linear.0.weight": 1}, {})}, ("not a hypernetwork",)),
    "numbered": (lambda c: {48: ({0: torch.ones(1)}, {})}, ("not a hypernetwork",)),
    "negative": (lambda c: {-48: c[48]}, ("not a hypernetwork",)),
    "a list": (lambda c: [1, 2], ("not a hypernetwork",)),
    "a LoRA": (lambda c: {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, ("not a hypernetwork",)),
    "activation": (lambda c: {**c, "activation_func": "magic"}, ("magic", "relu")),
    "layers": (lambda c: {**c, "layer_structure": ["1", "2", "1"]}, ("known here",)),
    "open end": (lambda c: {**c, "layer_structure": [1, 2]}, ("1 2", "begin and end with 1")),
    "nan layers": (lambda c: {**c, "layer_structure": [1, float("nan"), 1]}, ("from 1/64 to 64",)),
    "huge": (lambda c: {**c, "layer_structure": [1, 1e9, 1]}, ("64",)),
    "dropout": (lambda c: {**c, "dropout_structure": [0, 1.5, 0]}, ("dropout", "below 1")),
    "code": (lambda c: {**c, "optional_info": Evil()}, ("not run", "mkdir")),
}  # fmt: skip


def fresh(d: int):
    spec = hypernetwork.HypernetConfig(activation="relu")
    return tuple(hypernetwork.ResidualMLP(d, spec).state_dict() for _ in "KV")


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(sd_1, tmp_path, kind):
    """One sentence that names the file; nothing applied, nothing run."""
    change, words = BAD[kind]
    before, path = ours(sd_1), tmp_path / "bad.pt"
    torch.save(change(random_file(tmp_path / "a.pt", [48], KINDS["relu"])), path)
    with pytest.raises(ValueError) as e:
        hypernet_file.apply_file(sd_1, path, log=None)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in (str(path), *words)), e.value
    assert not Path("run").exists() and equal([ours(sd_1)], [before]) and untouched(sd_1)
    hypernet_file.apply_file(sd_1, tmp_path / "a.pt", log=None)  # what it was made of was good
    assert difference(ours(sd_1), before) > 1e-2


def test_files_that_are_no_files(sd_1, tmp_path):
    path, made = tmp_path / "a.pt", lora.insert(sd_1, 2, 2)
    with pytest.raises(ValueError, match=r"no hypernetwork file at .*a\.pt"):
        hypernet_file.apply_file(sd_1, path)
    lora_file.save_file(tmp_path / "a.safetensors", made, {})
    shutil.copy(tmp_path / "a.safetensors", path)
    for file in (path, tmp_path / "a.safetensors"):
        with pytest.raises(ValueError, match=str(file)):
            hypernet_file.apply_file(sd_1, file)
    spec = hypernetwork.HypernetConfig()
    with pytest.raises(ValueError, match="was not written: linear.1.bias of width 8 is not finite"):
        net = {**hypernetwork.ResidualMLP(8, spec).state_dict(), "linear.1.bias": torch.full((8,), torch.nan)}
        hypernet_file.save_file(tmp_path / "b.pt", spec, {8: (net, net)})
    assert not list(tmp_path.glob("b*"))


# --------------------------------------------------------------------------------------------------- learning


def begin(sd, spec, which="all", seed=0) -> hypernetwork.Hypernetwork:
    """As the trainer does."""
    h = hypernetwork.insert(sd, hypernetwork.Hypernetwork(spec, hypernetwork.dims(sd)[which]))
    for name, pair in h.pairs.items():
        for f, side in zip(pair, "KV"):
            f.init_weights((seed, "hypernet", name, side))
    return h


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["linear", "relu", "sigmoid", "prelu"])
def test_step_0_is_the_base(sd_1, activation, norm):
    """To the bit, in training; and yet every network has somewhere to go."""
    before, options = ours(sd_1), ((1, 2, 1.5, 1), activation, norm, (0, 0.2, 0.2, 0))
    h = begin(sd_1, hypernetwork.HypernetConfig(*options))
    out = sd_1.unet(*inputs()[0])
    assert h.training and out.requires_grad and torch.equal(out, before)
    out.square().mean().backward()
    assert all(max(p.grad.abs().max() for p in f.parameters()) > 0 for pair in h.pairs.values() for f in pair)
    adam = torch.optim.AdamW(h.parameters(), 0.01)
    adam.step()
    assert difference(ours(sd_1), before) > 1e-3


def test_step_0_of_all_activations():
    """That the trainer allows: exactly nothing at first, and a gradient. The seed decides the start."""
    x, allowed = torch.randn(2, 5, 16), [a for a in hypernetwork.ACTIVATIONS if "softm" not in a]
    assert len(allowed) > 20
    for spec in [hypernetwork.HypernetConfig((1, 2, 1), a, norm) for a in allowed for norm in (False, True)]:
        starts = []
        for seed in (0, 0, 1):
            net = hypernetwork.ResidualMLP(16, spec)
            net.init_weights((seed, "hypernet", "16", "K"))
            starts.append(net.linear[0].weight.detach())
            y = net(x)
            assert not y.any(), spec
            (y * x).sum().backward()
            assert max(p.grad.abs().max() for p in net.parameters()) > 1e-3, spec
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
        assert starts[0].std() == pytest.approx((2 / 16) ** 0.5, rel=0.2)


def widths_seen(monkeypatch) -> list[int]:
    """Of every forward of a network that comes."""
    calls, forward = [], hypernetwork.ResidualMLP.forward
    spy = lambda net, x: calls.append(x.shape[-1]) or forward(net, x)  # noqa: E731
    monkeypatch.setattr(hypernetwork.ResidualMLP, "forward", spy)
    return calls


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("which", ["context", "all"])
def test_the_words_are_rewritten_once_a_forward(sd_1, monkeypatch, which, grad):
    """For all 16 layers that listen to them; what the picture says of itself, in each."""
    calls = widths_seen(monkeypatch)
    begin(sd_1, hypernetwork.HypernetConfig(), which)
    with torch.set_grad_enabled(grad):
        for n in (1, 2, 3):
            sd_1.unet(*inputs()[0])
            assert calls.count(48) == 2 * n and len(calls) == (2 + 32 * (which == "all")) * n


def test_a_sampler_rewrites_the_words_once(sd_1, tmp_path, monkeypatch):
    """A finished one; and once more for other words, another strength, or the first words again later."""
    random_file(tmp_path / "a.pt", [48], settings(activation="relu"))
    loaded, _ = hypernet_file.apply_file(sd_1, tmp_path / "a.pt", log=None)
    calls = widths_seen(monkeypatch)
    draw = lambda word: [*sd_1.sample([word], [0], steps=4, size=(32, 32))][-1]  # noqa: E731
    a, b, again = draw("a barn"), draw("fire"), draw("a barn")
    assert len(calls) == 6 and torch.equal(a, again) and difference(a, b) > 1e-2
    with torch.no_grad():
        (x, t, context), _ = inputs()
        whole = sd_1.unet(x, t, context)
        loaded.strength = 0.5
        assert len(calls) == 8 and difference(sd_1.unet(x, t, context), whole) > 1e-3 and len(calls) == 10


def test_nothing_old_is_heard(sd_1):
    """After an optimiser's step, a forward without gradients, in either mode: what a new one computes."""
    (x, t, context), _ = inputs()
    h = begin(sd_1, hypernetwork.HypernetConfig(activation="relu"))
    adam = torch.optim.AdamW(h.parameters(), 0.05, fused=True)
    outs = []
    for mode in (h.train, h.eval, h.train, h.eval):
        mode()
        with torch.no_grad():
            sd_1.unet(x, t, context)
        sd_1.unet(x, t, context).square().mean().backward()
        with torch.no_grad():  # a look between the gradients and the step
            sd_1.unet(x, t, context)
            adam.step()
            outs += [sd_1.unet(x, t, context), sd_1.unet(x, t, context.clone())]
        assert torch.equal(outs[-1], outs[-2])
    assert all(difference(a, b) > 1e-3 for a, b in zip(outs[1::2], outs[3::2]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, (image, caption) in enumerate(world.photos(3)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def train(made, photos, out, *more) -> dict:
    how = "--steps 3 --batch-size 2 --lr 0.01 --resolution 32 --preview-every 0 --save-every 0 --device cpu"
    argv = ["--model", made.folder, "--data", photos, *how.split(), "--out", out, *more]
    assert train_hypernet.main([str(a) for a in argv]) == 0
    return torch.load(Path(out) / "hypernet.pt", weights_only=True)


def apart(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    tensors = [(d, i, k) for d in a if isinstance(d, int) for i in (0, 1) for k in a[d][i]]
    return max((a[d][i][k] - b[d][i][k]).abs().max().item() for d, i, k in tensors)


def test_training_moves_the_file_and_nothing_else(tmp_path, monkeypatch, capsys, quick):
    """On the tiny world, all widths; the base to the bit in memory and on the disk; the ratio as by hand."""
    seen, load, disk = {}, load_model, listing(TINY_MODEL)

    def spy(*args, **kwargs):
        seen["sd"] = load(*args, **kwargs)
        seen["before"] = hashes(seen["sd"])
        return seen["sd"]

    monkeypatch.setattr(train_hypernet, "load_model", spy)
    argv = "--steps 3 --images 2 --widths all --preview-every 3 --save-every 2 --device cpu --batch-size 2"
    more = "--layer-norm --token sks --vectors 0 --class-images 0"
    assert train_hypernet.main([*argv.split(), *more.split()]) == 0
    said, out = capsys.readouterr().out, tmp_path / "runs" / "hypernet"
    for words in ("trains networks for widths 72, 80, 96", "steps/s; wrote runs/hypernet/hypernet.pt"):
        assert words in said
    names = "config.json hypernet-000002.pt hypernet.pt index.html log.csv log.jsonl previews state"
    assert sorted(p.name for p in out.iterdir()) == names.split()
    assert len(seen["before"]) > 400 and seen["before"] == hashes(seen["sd"]) and listing(TINY_MODEL) == disk
    content = torch.load(out / "hypernet.pt", weights_only=True)
    assert (content["step"], content["name"], content["sd_checkpoint_name"]) == (3, "hypernet", "tiny")
    assert hypernet_file.pseudo_word(content) == "sks"
    assert [k for k in content if isinstance(k, int)] == [72, 80, 96]
    assert torch.load(out / "hypernet-000002.pt", weights_only=True)["step"] == 2
    fresh = load("tiny", device="cpu", log=None)
    fresh.text.add_word("sks")
    captions = [c.replace("a building with a roof", "sks") for _, c in world.photos(2)]
    with torch.no_grad():
        x = fresh.text(captions)
        moved = [(by_hand(s, content, x, 1.0) - x).norm() / x.norm() for s in content[72]]
    row = json.loads((out / "log.jsonl").read_text())
    assert row["step"] == 3 and row["ratio"] > 1e-3
    assert row["ratio"] == pytest.approx(max(moved).item(), abs=2e-5)


def test_dropout_is_a_function_of_seed_and_step(sd1, photos, tmp_path, monkeypatch, quick):
    """The same again, with a preview between, and interrupted and resumed: the very tensors."""
    options = ["--dropout", 0.4, "--activation", "swish", "--layers", 1, 2, 1]
    whole = train(sd1, photos, "a", *options)
    assert whole["dropout_structure"] == [0, 0.4, 0] and whole["last_layer_dropout"] and whole["use_dropout"]
    torch.rand(7)
    update = train_hypernet.Trainer.backward

    def crash(run, losses):
        if run.step == 2:
            raise RuntimeError("the power went")
        update(run, losses)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train_hypernet.Trainer, "backward", crash)
        train(sd1, photos, "b", *options, "--save-every", 1, "--preview-every", 1)
    assert not Path("b/hypernet.pt").exists() and Path("b/previews/000002.png").exists()
    assert train_hypernet.main(["--resume", "b", "--device", "cpu"]) == 0
    assert apart(torch.load("b/hypernet.pt", weights_only=True), whole) == 0


def test_every_photo_has_its_own_dropout(sd1, photos, monkeypatch):
    """Also when a batch is split, and in every step."""
    masks, forward = [], torch.nn.Dropout.forward

    def record(layer, x):
        y = forward(layer, x)
        masks.append((y == 0).sum((0, 1)))
        return y

    monkeypatch.setattr(torch.nn.Dropout, "forward", record)
    train(sd1, photos, "a", "--dropout", 0.5, "--activation", "linear", "--micro-batch", 1, "--steps", 2)
    masks = [m for m in masks if m.any()]  # those of the log's figure included
    assert len(masks) >= 8 and len({tuple(m.tolist()) for m in masks}) == len(masks)


def test_the_file_does_what_the_run_did(sd1, sd_1, photos, tmp_path):
    """Loaded into a fresh model, and into diffusers."""
    content = train(sd1, photos, "a", "--widths", "all", "--activation", "relu")
    before = ours(sd_1)
    hypernet_file.apply_file(sd_1, tmp_path / "a" / "hypernet.pt", log=None)
    expected = theirs(sd1.pipeline.unet, (content, 1.0))
    assert difference(ours(sd_1), expected) <= 1e-5 and difference(expected, before) > 1e-2


# --------------------------------------------------------------------------------------------------- mistakes


def test_a_run_is_not_written_over(sd1, photos, tmp_path, capsys):
    train(sd1, photos, "a", "--steps", 1)
    before = listing(tmp_path)
    argv = ["--model", sd1.folder, "--data", photos, "--device", "cpu", "--out", "a"]
    refused(train_hypernet, argv, ("a holds a finished run (hypernet.pt)", "another --out"), capsys)
    resume = ["--resume", "a", "--device", "cpu"]
    refused(train_hypernet, resume, ("finished run", "nothing to resume"), capsys)
    assert listing(tmp_path) == before
