"""DreamBooth's smaller sisters: Custom Diffusion and SVDiff."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file
from test_class_pictures import home  # noqa: F401
from test_dreambooth import tensors
from test_scripts import refused

import sample
import train_dreambooth
from hanokdiff import convert
from hanokdiff.formats import delta_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import spectral

SMALL = {"cross-attention": "1e-3", "singular-values": "1e-2"}  # with a rate that is seen after 3 steps
BOTH = pytest.mark.parametrize("train", SMALL)


def arguments(made, out, train, *more) -> list[str]:
    common = (
        "--data photos --resolution 32 --steps 3 --batch-size 2 --preview-every 0 --token sks --device cpu"
    )
    rates = f"--lr {SMALL[train]} --class-images 0 --save-every 2"
    rates += f" --text-lr {SMALL[train]}" if train == "singular-values" else ""
    argv = ["--model", made.folder, *common.split(), *rates.split(), "--train", train, "--out", out, *more]
    return list(map(str, argv))


@pytest.fixture(scope="module")
def runs(sd1):
    warnings.simplefilter("ignore")
    for train in SMALL:
        assert train_dreambooth.main(arguments(sd1, train, train)) == 0
    return {train: Path(train) for train in SMALL}


def test_cross_attention_moves_no_other_tensor(sd1, runs):
    """Keys and values of every cross-attention, and of the token table the pseudo word's rows."""
    before, after = tensors(sd1.folder), tensors(runs["cross-attention"] / "model")
    moved = {k for k, t in before.items() if not torch.equal(t, after[k])}
    kv = {k for k in before if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    table = "text_encoder.embeddings.token_embedding.weight"
    assert kv and moved == kv | {table}
    rows = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert rows == sorted(set(load_model(str(sd1.folder), "cpu", log=None).text.add_word("sks")))


def test_singular_values_move_nothing_else(sd1, runs):
    """Every Linear and Conv2d changes, its singular vectors do not; norms, biases and embeddings stay."""
    before, after = tensors(sd1.folder), tensors(runs["singular-values"] / "model")
    moved = {k for k, t in before.items() if not torch.equal(t, after[k])}
    table = "text_encoder.embeddings.token_embedding.weight"
    matrices = {k for k, t in before.items() if t.dim() > 1 and "embeddings." not in k and "vae" not in k}
    assert table in moved and not moved - matrices - {table}, moved - matrices
    assert len(moved) > 0.9 * len(matrices), (len(moved), matrices - moved)
    for k in ("unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.attentions.0.proj_in.weight"):
        u, s, vh = torch.linalg.svd(before[k].flatten(1), full_matrices=False)
        turned = u.T @ after[k].flatten(1) @ vh.T
        assert (turned - turned.diag().diag()).abs().max() < 1e-5 * s.max()
        assert (turned.diag() - s).abs().max() > 1e-4


@pytest.mark.parametrize("layer", [torch.nn.Linear(5, 3), torch.nn.Conv2d(2, 7, 3, 2, 1)])
def test_equation(layer):
    """Shift 0 is the base to the bit; else U relu(s + delta) V', in forward and in the folded weight."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(layer)
    x = torch.randn(2, 5) if isinstance(layer, torch.nn.Linear) else torch.randn(2, 2, 8, 8)
    plain, weight = network(x), layer.weight.detach().clone()
    (shift,) = spectral.insert(network).values()
    assert torch.equal(network(x), plain)
    with torch.no_grad():
        shift.delta.copy_(0.1 * torch.rand_like(shift.delta))
        shift.delta[-1] = -9.0  # beyond zero: relu cuts it
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    expected = (u @ torch.relu(s + shift.delta).diag() @ vh).view(weight.shape)
    assert torch.linalg.matrix_rank(expected.flatten(1)) == len(s) - 1
    assert (shift.weight() - expected).abs().max() < 1e-5
    shifted = network(x)
    with spectral.folded(network, {"0": shift}):
        assert network[0] is layer and (network(x) - shifted).abs().max() < 1e-5
    assert network[0] is shift and torch.equal(network(x), shifted)


@BOTH
def test_the_small_file_is_the_model(sd1, runs, train):
    """Base and file, by sample.py's own way, give the weights of the model folder."""
    file = runs[train] / delta_file.FILES[train]
    assert file.stat().st_size < sum(f.stat().st_size for f in (runs[train] / "model/unet").iterdir()) / 4
    assert file.with_stem(file.stem + "-000002").exists() and (runs[train] / "model-000002").is_dir()
    argv = ["sks", "--delta", str(file), "--embedding", str(runs[train] / "embedding.safetensors")]
    sd, whole = (load_model(str(m), "cpu", log=None) for m in (sd1.folder, runs[train] / "model"))
    sample.apply_files(sd, sample.options().parse_args(argv))
    for one, two in ((sd.unet, whole.unet), (sd.text.encoder, whole.text.encoder)):
        one, two = ({k.replace(".base", ""): t for k, t in n.state_dict().items()} for n in (one, two))
        names = {k for k in two if "token_embedding" not in k and k in one}
        assert len(names) > 30 and all(torch.allclose(one[k], two[k], atol=1e-5) for k in names)
    with torch.no_grad():
        contexts = [m.text(["a sks in the snow"]) for m in (sd, whole)]
    assert torch.allclose(*contexts, atol=1e-4)


def test_custom_diffusion_in_diffusers(sd1, runs):
    """load_attn_procs takes the file as it is: the same network as ours."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd1.folder, safety_checker=None)
    file = runs["cross-attention"] / delta_file.FILES["cross-attention"]
    # without its pipeline, diffusers 0.42.1 reads the file and sets nothing
    pipeline.unet.load_attn_procs(file.parent, weight_name=file.name, _pipeline=pipeline)
    sd = load_model(str(sd1.folder), "cpu", log=None)
    delta_file.apply_file(sd, file)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    context = torch.randn(1, 77, sd.unet.config.cross_attention_dim)
    with torch.no_grad():
        theirs = pipeline.unet(x, t, context).sample
        assert (sd.unet(x, t, context) - theirs).abs().max() < 1e-4
        base = load_model(str(sd1.folder), "cpu", log=None).unet(x, t, context)
        assert (base - theirs).abs().max() > 1e-3


def test_diffusers_own_file(sd1, tmp_path):
    """What its save_attn_procs writes changes our network as its own."""
    unet = StableDiffusionPipeline.from_pretrained(sd1.folder, safety_checker=None).unet
    processors = {}
    for name, old in unet.attn_processors.items():
        if "attn1" in name:
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
        else:
            attn = unet.get_submodule(name.removesuffix(".processor"))
            width, context = attn.to_k.weight.shape
            processors[name] = CustomDiffusionAttnProcessor(True, False, width, context)
    unet.set_attn_processor(processors)
    unet.save_attn_procs(tmp_path)
    (file,) = tmp_path.iterdir()
    sd = load_model(str(sd1.folder), "cpu", log=None)
    delta_file.apply_file(sd, file)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    context = torch.randn(1, 77, sd.unet.config.cross_attention_dim)
    with torch.no_grad():
        assert (sd.unet(x, t, context) - unet(x, t, context).sample).abs().max() < 1e-4


@BOTH
def test_converted_to_a_model(sd1, runs, train, capsys):
    file = runs[train] / delta_file.FILES[train]
    assert convert.main([str(file), f"whole-{train}", "--model", str(sd1.folder), "--dtype", "fp32"]) == 0
    one, two = tensors(Path(f"whole-{train}")), tensors(runs[train] / "model")
    assert all(torch.allclose(one[k], t, atol=1e-5) for k, t in two.items() if "token_embedding" not in k)
    assert convert.main([str(file), "never"]) == 2 and "--model BASE" in capsys.readouterr().err


@BOTH
def test_it_goes_on(sd1, runs, train, monkeypatch):
    """A killed run comes to the same end."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("hanokdiff.training.trainer.Trainer._log", lambda run: 1 / 0)
        train_dreambooth.main(arguments(sd1, f"again-{train}", train))
    assert train_dreambooth.main(["--resume", f"again-{train}"]) == 0
    one, two = (load_file(out / delta_file.FILES[train]) for out in (runs[train], Path(f"again-{train}")))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], t, atol=1e-6) for k, t in two.items())


@pytest.mark.parametrize(("content", "words"), [
    ({"lora_unet_x.lora_up.weight": torch.ones(1)}, "a LoRA is --lora"),
    ({"unet.nowhere.weight": torch.ones(1)}, "has no layer nowhere"),
    ({"unet.conv_in.weight": torch.ones(1)}, "has shape (1,)"),
    ({"unet.conv_in.weight": torch.full((4,), torch.nan)}, "finite numbers"),
    ({"mid_block.attn2.processor.to_k_custom_diffusion.weight": torch.ones(2, 2)}, "no layer"),
])  # fmt: skip
def test_files_that_do_not_fit(sd1, content, words, capsys):
    save_file(content, "odd.safetensors")
    argv = ["a barn", "--model", sd1.folder, "--delta", "odd.safetensors", "--device", "cpu"]
    refused(sample, argv, (words,), capsys)
