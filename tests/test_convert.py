"""LoRA files in every tool's spelling, written and read by peft and diffusers; and `hanokdiff.convert`."""

import copy
import json
import types
import zipfile

import peft
import pytest
import torch
from conftest import difference
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_lora import outputs, sd, their_outputs, theirs, trained, wild  # noqa: F401

from hanokdiff import convert
from hanokdiff.formats import embedding_file, hypernet_file, lora_file, lora_names, single_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.unet import UNet, UNetConfig

# Ranks and alphas differ between the networks and within them: nothing can be right by chance.
UNET_LORA = dict(
    r=4, lora_alpha=6,
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj",
                    "downsamplers.0.conv"],
    rank_pattern={"conv1": 2, "to_v": 8}, alpha_pattern={"conv1": 3, "mid_block.attentions.0.proj_in": 1},
)  # fmt: skip
TEXT_LORA = dict(
    r=3, lora_alpha=6, target_modules="q_proj k_proj v_proj out_proj fc1".split(), alpha_pattern={"fc1": 5}
)


@torch.no_grad()
def randomise_loras(network: torch.nn.Module, seed: int, scale: float = 0.3) -> None:
    g = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if "lora_" in name:
            spread = scale if "lora_B" in name else p[0].numel() ** -0.5
            p.copy_(spread * torch.randn(p.shape, generator=g))


def with_loras(reference, unet_lora=UNET_LORA, text_lora=TEXT_LORA) -> types.SimpleNamespace:
    """The reference's networks with peft's LoRAs in them, and what they give."""
    unet, encoder = (copy.deepcopy(getattr(reference.pipeline, part)) for part in ("unet", "text_encoder"))
    unet.add_adapter(LoraConfig(**unet_lora))
    encoder.add_adapter(LoraConfig(**text_lora))
    randomise_loras(unet, 1), randomise_loras(encoder, 2)
    return types.SimpleNamespace(unet=unet, encoder=encoder, outputs=theirs(unet, encoder))


made = {}


@pytest.fixture
def adapted(reference):
    if reference.flavour not in made:
        made[reference.flavour] = with_loras(reference)
    return made[reference.flavour]


def folded(network) -> dict[str, torch.Tensor]:
    """peft's tensors with alpha / rank inside, for spellings that have no alpha."""
    out = {k: t.clone() for k, t in get_peft_model_state_dict(network).items()}
    for name, module in network.named_modules():
        if f"{name}.lora_B.weight" in out:
            out[f"{name}.lora_B.weight"] *= module.scaling["default"]
    return out


def prefixed(adapted, tensors=folded) -> dict[str, torch.Tensor]:
    unet, text = tensors(adapted.unet), tensors(adapted.encoder)
    return {**{f"unet.{k}": t for k, t in unet.items()}, **{f"text_encoder.{k}": t for k, t in text.items()}}


def replaced(tensors: dict, *pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    """Tensors with parts of their names replaced, in a row; each replacement must find something."""
    for old, new in pairs:
        assert any(old in k for k in tensors), old
        tensors = {k.replace(old, new): t for k, t in tensors.items()}
    return tensors


def save_peft(adapted, folder, names=dict):
    """As diffusers' training scripts do; alpha is in the header's metadata."""
    more = _collate_lora_metadata({"unet": adapted.unet, "text_encoder": adapted.encoder})
    unet, text = (names(get_peft_model_state_dict(m)) for m in (adapted.unet, adapted.encoder))
    layers = dict(unet_lora_layers=unet, text_encoder_lora_layers=text)
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **more)
    return folder / "pytorch_lora_weights.safetensors"


def old(adapted) -> dict[str, torch.Tensor]:
    """2023, before peft: LoRAs were attention processors, and the text encoder's had the UNet's names."""
    tensors = prefixed(adapted)
    parts = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
    for part, theirs_ in parts.items():
        name = part.removesuffix(".0")
        for ab, way in (("A", "down"), ("B", "up")):
            pairs = [(f"attn{n}.{part}.lora_{ab}", f"attn{n}.processor.{name}_lora.{way}") for n in (1, 2)]
            pairs += [(f"self_attn.{theirs_}.lora_{ab}", f"self_attn.{name}_lora.{way}")]
            tensors = replaced(tensors, *pairs)
    text = ("text_encoder.encoder", "text_encoder.text_model.encoder")
    return replaced(tensors, text, ("lora_A", "lora_linear_layer.down"), ("lora_B", "lora_linear_layer.up"))


def saved(tensors: dict, path, metadata=None):
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path


def binary(tensors: dict, path):
    torch.save(tensors, path)
    return path


def stripped(tensors: dict) -> dict:
    return {k.removeprefix("unet.").removeprefix("text_encoder."): t for k, t in tensors.items()}


SPELLINGS = {
    "peft's names, saved by diffusers": lambda a, d: save_peft(a, d),
    "diffusers' names, saved by diffusers": lambda a, d: save_peft(a, d, convert_state_dict_to_diffusers),
    "kohya's names by diffusers": lambda a, d: saved(
        convert_state_dict_to_kohya(prefixed(a)), d / "a.safetensors"),
    "text_model and lora_linear_layer": lambda a, d: saved(
        replaced(prefixed(a), ("text_encoder.encoder", "text_encoder.text_model.encoder"),
                 ("lora_A", "lora.down"), ("lora_B", "lora.up"), ("fc1.lora.", "fc1.lora_linear_layer.")),
        d / "a.safetensors"),
    "of 2023": lambda a, d: saved(old(a), d / "a.safetensors"),
    "of 2023, without prefixes, as .bin": lambda a, d: binary(stripped(old(a)), d / "a.bin"),
    "peft's modules, with the adapter's name": lambda a, d: saved(
        replaced(stripped(prefixed(a)), (".weight", ".default.weight")), d / "a.safetensors"),
    "alpha beside, as in ComfyUI": lambda a, d: saved(
        {**prefixed(a), **{k.replace("lora_B.weight", "alpha"): torch.tensor(t.shape[1] / 2)
                           for k, t in prefixed(a).items() if "lora_B" in k},
         **{k: 2 * t for k, t in prefixed(a).items() if "lora_B" in k}}, d / "a.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_their_spellings_here(sd, reference, adapted, tmp_path, spelling):  # noqa: F811
    """Written by the library (or as it once wrote), read by us: the library's own output."""
    before, path = outputs(sd), SPELLINGS[spelling](adapted, tmp_path)
    loras, _ = lora_file.apply_file(sd, path, log=None)
    assert len(loras) == 207 + 15 and sum("te_text_model" in n for n in loras) == 15
    for ours, other, base in zip(outputs(sd), adapted.outputs, before, strict=True):
        assert difference(ours, base) > 1e-2
        assert difference(ours, other) <= 1e-5


@pytest.mark.parametrize("reference", ["sd1"], indirect=True)
def test_peft_alone(sd, reference, tmp_path):  # noqa: F811
    """A folder per network, alpha in adapter_config.json; rank-stabilised: scale alpha / sqrt(rank)."""
    files = []
    for part, settings in (("unet", UNET_LORA), ("text_encoder", TEXT_LORA)):
        network = copy.deepcopy(getattr(reference.pipeline, part))
        network = peft.get_peft_model(network, LoraConfig(**settings, use_rslora=True))
        randomise_loras(network, 4, 0.1)  # the scale is larger here, and the tiny UNet soon chaotic
        network.save_pretrained(tmp_path / part)
        files.append((network.base_model.model, tmp_path / part / "adapter_model.safetensors"))
    (unet, unet_file), (encoder, text_file) = files
    assert next(iter(load_file(text_file))).startswith("base_model.model.")
    before, expected = outputs(sd), theirs(unet, encoder)
    loras = {}
    for file in (unet_file, text_file):
        loras |= lora_file.apply_file(sd, file, log=None)[0]
    ends = ("to_q", "to_v", "self_attn_q_proj")
    scales = {m.rank: m.alpha / m.rank for n, m in loras.items() if n.endswith(ends)}
    assert scales == pytest.approx({4: 6 / 4**0.5, 8: 6 / 8**0.5, 3: 6 / 3**0.5}, rel=1e-6)
    for ours, other, base in zip(outputs(sd), expected, before, strict=True):
        assert difference(ours, base) > 1e-2 and difference(ours, other) <= 1e-5
    (tmp_path / "unet" / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"adapter_config\.json.* is missing: .* alpha = rank"):
        assert not any("alpha" in t for t in lora_file.read_file(unet_file)[0].values())


@pytest.mark.parametrize("reference", ["sd1"], indirect=True)
def test_one_network_saved_by_diffusers(sd, reference, adapted, tmp_path):  # noqa: F811
    """Neither tensors nor settings have the prefix `unet.` then."""
    adapted.unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    assert next(iter(load_file(file))).startswith("down_blocks.")
    assert "lora_alpha" in json.loads(lora_file.read_file(file)[1]["lora_adapter_metadata"])
    lora_file.apply_file(sd, file, log=None)
    assert difference(outputs(sd)[0], adapted.outputs[0]) <= 1e-5


# ----------------------------------------------------------------------------------------- our file in theirs


def test_our_native_file_there(sd, reference, tmp_path):  # noqa: F811
    """Every kind of layer, other ranks, alpha not the rank, strength not 1; in diffusers as in peft."""
    before, path = outputs(sd), tmp_path / "a.safetensors"
    loras = lora.insert(sd, 4, 6.0, "attention+ff+conv", 3)
    trained(loras)
    about = {"ss_v2": "False", "ss_network_alpha": "6.0", "hanokdiff_token": "*"}
    lora_file.save_diffusers_file(path, loras, about)
    assert lora_file.read_file(path)[1] == {"format": "pt", "ss_v2": "False", "hanokdiff_token": "*"}
    ours = outputs(sd)
    lora.remove(sd, loras)
    again, _ = lora_file.apply_file(sd, path, 1.0, log=None)
    assert all(difference(x, y) <= 1e-5 for x, y in zip(outputs(sd), ours, strict=True))
    for m in again.values():
        m.strength = 0.5
    for mine, other, base in zip(outputs(sd), their_outputs(reference, path, 0.5), before, strict=True):
        assert difference(mine, base) > 1e-2 and difference(mine, other) <= 1e-5
    if reference.flavour != "sd1":
        return
    unet = copy.deepcopy(reference.pipeline.unet)
    tensors = {k.removeprefix("unet."): t for k, t in load_file(path).items() if k.startswith("unet.")}
    names = [k.removesuffix(".lora_A.weight") for k in tensors if "lora_A" in k]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names))
    assert not peft.set_peft_model_state_dict(unet, tensors).unexpected_keys
    assert difference(theirs(unet, reference.pipeline.text_encoder)[0], ours[0]) <= 1e-5


def deltas(loras: dict) -> dict[str, torch.Tensor]:
    out = {}
    for name, t in loras.items():
        rank = len(t["down"])
        up_down = t["up"].flatten(1).double() @ t["down"].flatten(1).double()
        out[name] = up_down * float(t.get("alpha", rank)) / rank
    return out


def test_there_and_back(sd, tmp_path):  # noqa: F811
    """kohya, diffusers and kohya again: the same deltas under the same names, whatever alpha."""
    first, second, third = (tmp_path / f"{n}.safetensors" for n in "abc")
    save_file(wild(sd, lambda i: (None, 2.0, 10.0, 0.0)[i % 4]), first)
    a, _ = lora_file.read_file(first)
    lora_file.save_diffusers_file(second, a, {})
    b, _ = lora_file.read_file(second)
    lora_file.save_file(third, b, {})
    c, _ = lora_file.read_file(third)
    assert a.keys() == b.keys() == c.keys() and not any("alpha" in t for t in b.values())
    assert {float(t["alpha"]) for t in c.values()} == {5.0}
    then, now = deltas(a), deltas(c)
    assert max(d.abs().max() for d in then.values()) > 1e-2
    assert all((now[n] - d).abs().max() <= 1e-6 * d.abs().max() for n, d in then.items())


@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_half_precision_keeps_its_digits(tmp_path, alpha):
    """A scale of 1/128 on weights as small as trained ones: in `up` alone it would leave fp16's range."""
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(128, 320, generator=g) / 20, torch.randn(320, 128, generator=g) * 1e-3
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    loras = {name: {"down": down.half(), "up": up.half(), "alpha": torch.tensor(alpha).half()}}
    lora_file.save_diffusers_file(tmp_path / "a.safetensors", loras, {}, torch.float16)
    then, now = deltas(loras)[name], deltas(lora_file.read_file(tmp_path / "a.safetensors")[0])[name]
    assert ((now - then).norm() / then.norm()) < 5e-4


# ------------------------------------------------------------------------------------------------------ names


def full_size() -> types.SimpleNamespace:
    with torch.device("meta"):
        unet, encoder = UNet(UNetConfig()), TextEncoder(TextConfig())
    return types.SimpleNamespace(unet=unet, text=types.SimpleNamespace(encoder=encoder))


def test_every_name_of_stable_diffusion(sd):  # noqa: F811
    """kohya's underscores back to dots, for every layer that has weights: the module's own path."""
    model = full_size()
    places = lora.layers(model)
    loras = lora.insert(model, 1, 1, "attention+ff", 1)
    assert len(loras) == 192 + 72 and loras.keys() <= places.keys()
    assert len(lora.insert(model, 1, 1, "attention+ff+conv")) == 278
    for name, (network, path) in {**places, **lora.layers(sd)}.items():
        prefix = "unet." if isinstance(network, UNet) else "text_encoder.text_model."
        assert lora_names.diffusers_name(name) == prefix + path
        for end, kind in ((".lora_A.weight", "down"), (".lora.up.weight", "up"), (".alpha", "alpha")):
            assert lora_names.parse(prefix + path + end) == (name, kind, path)
            assert lora_names.parse(path + end) == (name, kind, path)
        assert lora_names.parse(f"{name}.lora_up.weight") == (name, "up", "")


@pytest.mark.parametrize("name", [
    "lora_unet_mud_block_attentions_0_proj_in", "lora_te2_text_model_encoder_layers_0", "lora_unet_",
    "lora_unet_conv12", "lora_unet_input_blocks_1_1_proj_in",
])  # fmt: skip
def test_names_without_a_native_spelling(tmp_path, name):
    loras = {name: {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}}
    with pytest.raises(ValueError, match=f"{name} is no layer of .* leave the file in kohya's layout"):
        lora_file.save_diffusers_file(tmp_path / "a.safetensors", loras, {})
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------- refusing


PATH = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = {f"{PATH}.lora_A.weight": torch.ones(4, 48), f"{PATH}.lora_B.weight": torch.ones(64, 4)}
REFUSED = {
    "DoRA": ({**GOOD, f"{PATH}.lora_magnitude_vector.weight": torch.ones(64)}, "DoRA", "_magnitude_vector"),
    "biases": ({**GOOD, f"{PATH}.lora_B.bias": torch.ones(64)}, "LoRA with biases", "lora_B.bias"),
    "differences": ({f"{KOHYA}.diff_b": torch.ones(64)}, "full weight differences", "diff_b"),
    "cloneofsimo": ({"unet:0:up": torch.ones(4, 4)}, "cloneofsimo", "unet:0:up"),
    "SDXL": ({k.replace("unet.", "text_encoder_2."): t for k, t in GOOD.items()}, "a LoRA for SDXL"),
    "Flux": ({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 4)}, "transformer.b", "kohya's"),
    "a single file": ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "model.diffusion", "no LoRA"),
    "no such part": ({**GOOD, f"{PATH}.lora_C.weight": torch.ones(4, 4)}, "lora_C", "no LoRA"),
    "dots after lora_": ({"lora_unet_mid.block.lora_up.weight": torch.ones(4, 4)}, "mid.block", "no LoRA"),
    "kohya among them": ({**GOOD, f"{KOHYA[:-1]}q.lora_up.weight": torch.ones(64, 4)}, "mixes", KOHYA[:-1]),
    "twice": ({**GOOD, f"{PATH[5:]}.lora_A.weight": torch.ones(4, 48)}, "mixes two", PATH),
    "no up": ({f"{PATH}.lora_A.weight": torch.ones(4, 48)}, KOHYA, "not a complete LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path, kind):
    tensors, *words = REFUSED[kind]
    path = saved(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as e:
        lora_file.read_file(path)
    assert "\n" not in str(e.value) and all(word in str(e.value) for word in (str(path), *words)), e.value


@pytest.mark.parametrize("settings, words", [
    ("{", "is not valid JSON"), ("[]", "not a table"), ('{"unet.lora_alpha": "six"}', "settings beside"),
    ('{"lora_alpha": 4, "alpha_pattern": {"(": 1}}', "settings beside"),
    ('{"alpha_pattern": 3}', "settings beside"),
])  # fmt: skip
def test_broken_settings_of_peft(tmp_path, settings, words):
    path = saved(GOOD, tmp_path / "a.safetensors", {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=words):
        lora_file.read_file(path)


def test_pickles_that_are_no_lora(tmp_path):
    for content in ([torch.ones(2, 2)], {"a": {}}, {"step": 3}):
        with pytest.raises(ValueError, match="holds no tensors by name"):
            lora_file.read_file(binary(content, tmp_path / "a.pt"))
    (tmp_path / "a.bin").write_bytes(b"hello")
    with pytest.raises(ValueError, match="cannot be read"):
        lora_file.read_file(tmp_path / "a.bin")


def test_without_settings_alpha_is_the_rank(tmp_path):
    for metadata in (None, {"lora_adapter_metadata": '{"text_encoder.lora_alpha": 9}'}):
        t = lora_file.read_file(saved(GOOD, tmp_path / "a.safetensors", metadata))[0][KOHYA]
        assert float(t.get("alpha", 4)) == 4


# -------------------------------------------------------------------------------- python -m hanokdiff.convert


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command in an empty folder: (exit code, what it printed)."""
    monkeypatch.chdir(tmp_path)

    def run_(*argv) -> tuple[int, str]:
        code = convert.main([str(a) for a in argv])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run_


def weights(made) -> dict[str, torch.Tensor]:
    parts = {"unet": made.unet, "vae": made.vae, "text": made.text.encoder}
    return {f"{part}.{k}": t for part, m in parts.items() for k, t in m.state_dict().items()}


def test_model_to_file_and_back(run, reference, load):
    """The weights to the bit, the settings, and the tokenizer."""
    code, said = run(reference.folder, "new/a.safetensors")
    assert code == 0 and "model folder" in said and "tensors matched; wrote new/a.safetensors" in said
    assert "model.diffusion_model.out.2.weight" in load_file("new/a.safetensors")
    code, said = run("new/a.safetensors", "sd-v1.5", "--tokenizer", reference.folder)
    assert code == 0 and "model file" in said and "wrote sd-v1.5" in said, said
    then, now = load(reference), load_model("sd-v1.5", "cpu", log=None)
    a, b = weights(then), weights(now)
    assert a.keys() == b.keys() and all(torch.equal(b[k], t) for k, t in a.items())
    assert now.schedule == then.schedule and now.text.tokenizer.get_vocab() == then.text.tokenizer.get_vocab()
    parts = [(sd_.unet, sd_.vae, sd_.text.encoder) for sd_ in (now, then)]
    assert [p.config for p in parts[0]] == [p.config for p in parts[1]]
    assert now.text.tokenizer.pad_token == then.text.tokenizer.pad_token


def test_precision_and_the_pseudo_word(run, sd1, tmp_path):
    """--dtype changes it, else what is there stays; a folder's pseudo word goes along or is told."""
    assert run(sd1.folder, "half", "--dtype", "fp16")[0] == 0
    (tmp_path / "half" / "hanokdiff.json").write_text('{"token": "sks"}')
    code, said = run("half", "a.safetensors")
    assert code == 0 and 'the pseudo word "sks"' in said
    assert {t.dtype for t in load_file("a.safetensors").values()} == {torch.float16}
    assert run("half", "full", "--dtype", "fp32")[0] == 0
    assert (tmp_path / "full" / "hanokdiff.json").read_text() == '{"token": "sks"}'
    assert load_file("full/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float32
    assert run("half", "a.safetensors", "--overwrite", "--prediction", "v_prediction")[0] == 0
    assert single_file.read_file("a.safetensors")[-1].prediction_type == "v_prediction"


def test_ckpt_to_safetensors(run, sd1, load, monkeypatch):
    """Needs no tokenizer. (Sizes as odd as these cannot be read off a .ckpt: the reading is stood in for.)"""
    sd_ = load(sd1)
    torch.save({"state_dict": {}}, "a.ckpt")
    parts = (sd_.unet, sd_.vae, sd_.text.encoder, sd_.schedule)
    with monkeypatch.context() as m:
        m.setattr(single_file, "read_file", lambda path, prediction, log: parts)
        code, said = run("a.ckpt", "b.safetensors")
    assert code == 0 and "a.ckpt: model file, epsilon; all 980 tensors matched; wrote b.safetensors" in said
    written = single_file.read_file("b.safetensors")[:3]
    assert {p.dtype for part in written for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("reference", ["sd1"], indirect=True)
def test_lora_both_ways(run, sd, adapted, tmp_path):  # noqa: F811
    """diffusers' file with alpha in its header -> kohya's -> diffusers' without -> kohya's: one picture."""
    save_peft(adapted, tmp_path)
    code, said = run("pytorch_lora_weights.safetensors", "k.safetensors")
    told = "LoRA in the diffusers layout, 222 modules, 15 of them text; all 444 tensors matched"
    assert code == 0 and told in said
    metadata = lora_file.read_file("k.safetensors")[1]
    assert (metadata["ss_network_module"], metadata["ss_v2"]) == ("networks.lora", "False")
    assert metadata["ss_network_dim"] == "Dynamic"
    assert "lora_adapter_metadata" not in metadata and len(metadata["sshs_model_hash"]) == 64
    code, said = run("k.safetensors", "d.safetensors")
    assert code == 0 and "LoRA in the kohya layout, 222 modules" in said and "all 666 tensors" in said
    assert run("d.safetensors", "k2.safetensors", "--to", "kohya", "--dtype", "fp16")[0] == 0
    assert {t.dtype for t in load_file("k2.safetensors").values()} == {torch.float16}
    # alpha goes inside
    assert run("pytorch_lora_weights.safetensors", "d2.safetensors", "--to", "diffusers")[0] == 0
    for file in ("k.safetensors", "d.safetensors", "d2.safetensors"):
        loras, _ = lora_file.apply_file(sd, file, log=None)
        assert all(difference(x, y) <= 1e-5 for x, y in zip(outputs(sd), adapted.outputs, strict=True)), file
        lora.remove(sd, loras)
    for file, to in (("k.safetensors", "kohya"), ("d.safetensors", "diffusers")):
        code, said = run(file, "x.safetensors", "--to", to)
        assert code == 2 and f"nothing to do: {file} is a LoRA in the {to} layout" in said


def test_kohya_metadata():
    """The WebUI hides a LoRA for SD 2 that does not say so; each module's own alpha is in its tensors."""

    def of(width, alpha):
        module = {"down": torch.ones(4, width), "up": torch.ones(8, 4)}
        return convert.kohya_metadata({KOHYA: {**module, "alpha": torch.tensor(alpha)}})

    expected = dict(network_module="networks.lora", v2="True", network_dim="4", network_alpha="2.0")
    assert of(1024, 2.0) == {f"ss_{k}": v for k, v in expected.items()}
    assert of(768, 2.0)["ss_v2"] == "False"


def test_embedding_both_ways(run, tmp_path):
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    embedding_file.save_file(tmp_path / "hanok.safetensors", "<hanok>", vectors, {"step": 7})
    code, said = run("hanok.safetensors", "a.pt")
    assert code == 0 and 'embedding "<hanok>", 3 x 48' in said and said.endswith("wrote a.pt\n")
    webui = torch.load("a.pt", weights_only=True)
    assert torch.equal(webui["string_to_param"]["*"], vectors) and webui["step"] == 7
    assert run("a.pt", "b.safetensors")[0] == 0
    assert torch.equal(load_file("b.safetensors")["<hanok>"], vectors)
    torch.save({"<old>": vectors}, "learned_embeds.bin")
    save_file({"emb_params": vectors}, "kohya.safetensors")
    for file, out, word in (("learned_embeds.bin", "c", "<old>"), ("kohya.safetensors", "d", "kohya")):
        assert run(file, f"{out}.safetensors")[0] == 0 and list(load_file(f"{out}.safetensors")) == [word]
    nothing = "error: nothing to do: a.pt is an embedding in the WebUI layout already\n"
    assert run("a.pt", "e.pt") == (2, nothing)
    assert run("c.safetensors", "e.safetensors")[0] == 2
    torch.save(webui, "zip.pt")  # the container that the WebUI refuses
    assert run("zip.pt", "legacy.pt")[0] == 0 and not zipfile.is_zipfile("legacy.pt")


def test_old_hypernetwork(run):
    """The first kind: whole numbers alone, layers under the names that they had then."""

    def net(d: int) -> dict:
        one, two = torch.nn.Linear(d, 2 * d), torch.nn.Linear(2 * d, d)
        layers = {"linear1": one, "linear2": two}
        return {f"{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}

    old_ = {d: (net(d), net(d)) for d in (32, 48)}
    torch.save(old_, "old.pt")
    code, said = run("old.pt", "new.pt")
    assert code == 0 and "hypernetwork for widths 32, 48; all 16 tensors matched; wrote new.pt" in said
    new = torch.load("new.pt", weights_only=True)
    assert new["layer_structure"] == [1, 2, 1] and new["activate_output"] is True
    assert not zipfile.is_zipfile("new.pt")
    assert torch.equal(new[48][1]["linear.1.weight"], old_[48][1]["linear2.weight"])
    spec, nets, _ = hypernet_file.read_file("new.pt")
    assert nets.keys() == {32, 48} and spec.activation == "linear"
    more = {"name": "hanok", "step": 30, "optional_info": "*"}
    torch.save({**old_, **more}, "named.pt")
    assert run("named.pt", "new.pt", "--overwrite")[0] == 0
    assert torch.load("new.pt", weights_only=True).items() >= more.items()
    assert run("new.pt", "again.pt")[1].startswith("error: nothing to do: new.pt is a hypernetwork")


def test_what_the_command_refuses(run, sd1, tmp_path):
    """One sentence that names the file and a way out, exit code 2, nothing written."""
    lora_file, folder = saved(GOOD, tmp_path / "lora.safetensors"), sd1.folder
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty").mkdir()
    saved({"clip_g": torch.ones(1, 4), "clip_l": torch.ones(1, 4)}, tmp_path / "word.safetensors")
    binary([torch.ones(1)], tmp_path / "list.pt")
    before = sorted(tmp_path.iterdir())
    cases = {  # more: robustness/test_mistakes.py
        ("nix", "a"): 'no model folder at "nix"',
        ("empty", "a.safetensors"): "model_index.json is missing",
        ("text.safetensors", "a"): "text.safetensors cannot be read",
        ("text.pt", "a"): "text.pt cannot be read",
        ("list.pt", "a.pt"): "no model, LoRA, embedding or hypernetwork that hanokdiff knows: it holds noth",
        (unet, "a"): "it holds conv_in.bias ...; of a model in several files, give the folder",
        (folder, "a"): f"nothing to do: {folder} is a model folder already",
        (folder, "empty"): "empty is there already",
        (folder, folder, "--overwrite"): "is there already; name another OUT\n",
        (folder, "lora.safetensors/a.safetensors"): "lora.safetensors",
        (lora_file, "empty", "--overwrite"): "empty does not end in .safetensors",
        (lora_file, "lora.safetensors", "--overwrite"): "lora.safetensors is there already; name another OUT",
        (lora_file, "a.safetensors", "--tokenizer", "x"): "--tokenizer means nothing for",
        (lora_file, "a.safetensors", "--to", "diffusers"): "is a LoRA in the diffusers layout already",
        ("word.safetensors", "a.pt", "--dtype", "fp16"): "nothing for word.safetensors, a file of kind embed",
        ("word.safetensors", "a.pt"): "SDXL",
        (): "the following arguments are required: IN, OUT",
    }
    for argv, words in cases.items():
        code, said = run(*argv)
        assert code == 2 and words in said, (argv, said)
        assert said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(SystemExit):
        run("--help")
