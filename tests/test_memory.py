"""Layers that keep less: torch's own numbers, to the bit, forward and backward, and less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hanokdiff.formats.load import load_model
from hanokdiff.methods import hypernetwork, lora
from hanokdiff.methods.losses import mse
from hanokdiff.models import memory
from hanokdiff.models.unet import ResBlock, SpatialTransformer
from hanokdiff.training.noise import Batch


@pytest.fixture(autouse=True)
def on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(memory, "ON_CPU", True)


def normal(*shape, seed: int = 0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def both(ours, plain, *tensors):
    """(value, gradients) of each on the same leaves, with the same gradient coming back."""
    out = []
    for f in (ours, plain):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        y = f(*leaves)
        y.backward(normal(*y.shape, seed=9, dtype=y.dtype))
        out.append((y.detach(), [t.grad for t in leaves]))
    return out


def equal(a, b) -> bool:
    """Lists of tensors, or of None."""
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same(a, b) -> bool:
    return equal([a[0], *a[1]], [b[0], *b[1]])


def kept(f, *tensors) -> int:
    """Bytes that autograd keeps for the backward, beside the leaves."""
    own, storages = {t.untyped_storage()._cdata for t in tensors}, {}

    def keep(t):
        s = t.untyped_storage()
        if s._cdata not in own:
            storages[s._cdata] = s
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = f(*tensors)
    del y
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 32, 1, 3), (3, 96, 5)])
def test_norm_silu(shape, trainable, dtype):
    norm = nn.GroupNorm(32, shape[1], 1e-5).to(dtype)
    x, (w, b) = normal(*shape, dtype=dtype), (normal(shape[1], seed=i, dtype=dtype) for i in (1, 2))
    x.requires_grad_(True), w.requires_grad_(trainable), b.requires_grad_(trainable)

    def ours(x, w, b):
        norm.weight, norm.bias = (nn.Parameter(t, t.requires_grad) for t in (w, b))
        return memory.NormSiLU.apply(x, w, b, norm.num_groups, norm.eps)

    def plain(x, w, b):
        return F.silu(F.group_norm(x, 32, w, b, 1e-5))

    assert same(*both(ours, plain, x, w, b))
    statistics = 2 * shape[0] * 32 * x.element_size()
    assert kept(ours, x, w, b) == statistics and kept(plain, x, w, b) == statistics + x.nbytes
    with torch.no_grad():
        assert torch.equal(memory.norm_silu(norm, x), F.silu(norm(x)))
    assert torch.equal(memory.norm_silu(norm, x), F.silu(norm(x)))


def test_norm_silu_of_what_is_not_contiguous():
    norm, x = nn.GroupNorm(4, 8), normal(2, 6, 8).transpose(1, 2)
    assert torch.equal(memory.norm_silu(norm, x), F.silu(norm(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geglu(dtype):
    x = normal(2, 9, 64, dtype=dtype).requires_grad_(True)

    def plain(both):
        a, gate = both.chunk(2, dim=-1)
        return a * F.gelu(gate)

    assert same(*both(memory.geglu, plain, x))
    made = normal(2, 9, 64, dtype=dtype).requires_grad_(True)  # in a network the projection is no leaf
    assert kept(lambda t: memory.geglu(t * 1), made) == x.nbytes
    assert kept(lambda t: plain(t * 1), made) == 1.5 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [
    dict(kernel_size=3, padding=1), dict(kernel_size=3, padding=1, stride=2), dict(kernel_size=1),
    dict(kernel_size=3, padding=1, bias=False),
])  # fmt: skip
def test_frozen_convolution(how, dtype):
    ours, torchs = memory.Conv2d(8, 12, **how).to(dtype), nn.Conv2d(8, 12, **how).to(dtype)
    torchs.load_state_dict(ours.state_dict())
    x = normal(2, 8, 7, 6, dtype=dtype).requires_grad_(True)
    for network in (ours, torchs):
        network.requires_grad_(False)
    assert same(*both(ours, torchs, x))
    weights = list(ours.parameters())
    assert kept(lambda t, *_: ours(t * 1), x, *weights) == 0
    assert kept(lambda t, *_: torchs(t * 1), x, *torchs.parameters()) == x.nbytes
    for network in (ours, torchs):
        network.requires_grad_(True)
        network.zero_grad()
    assert same(*both(ours, torchs, x))
    assert equal(*([p.grad for p in network.parameters()] for network in (ours, torchs)))


def test_a_convolution_that_is_half_frozen():
    """The weight stands still, the bias learns: torch's own way is taken, and the bias has its gradient."""
    conv = memory.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    conv(normal(1, 4, 5, 5).requires_grad_(True)).sum().backward()
    assert conv.bias.grad is not None and conv.bias.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [77, 5, 80])
def test_even_words_are_the_same_words(words, dtype):
    """Values and gradients of attention to lengthened words are those of the words."""
    lengths = enumerate((9, words, words))
    q, k, v = (normal(2, 4, n, 8, seed=i, dtype=dtype).requires_grad_(True) for i, n in lengths)
    longer, kernel = memory.pad_keys(k, v), F.scaled_dot_product_attention
    assert (longer[2] is None) == (words == 80) and longer[0].shape[2] == -(-words // 16) * 16
    a, b = both(lambda q, k, v: kernel(q, *memory.pad_keys(k, v)), kernel, q, k, v)
    for x, y in zip((a[0], *a[1]), (b[0], *b[1]), strict=True):
        assert x.shape == y.shape and (x - y).abs().max() < (1e-6 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("trained", ["q", "k", ""])
def test_attention_in_bf16_is_trained_in_fp32_on_a_cpu(trained, monkeypatch):
    """What torch's kernel is given, words lengthened to 16; drawing stays in bf16."""
    kernel, seen = F.scaled_dot_product_attention, []

    def spy(*tensors):
        seen.append({t.dtype for t in tensors})
        return kernel(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = (normal(1, 2, n, 8, seed=n, dtype=torch.bfloat16) for n in (16, 5, 5))
    q.requires_grad_(trained == "q"), k.requires_grad_(trained == "k")
    out = memory.attention(q, k, v)
    assert seen == [{torch.float32 if trained else torch.bfloat16}] and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, kernel(q.float(), k.float(), v.float()).bfloat16(), rtol=0.02, atol=0.02)
    if trained:
        out.sum().backward()
        assert {"q": q, "k": k}[trained].grad.dtype == torch.bfloat16


def test_no_other_device_has_words_added():
    k = torch.empty(1, 2, 77, 8, device="meta")
    assert memory.pad_keys(k, k) == (k, k, None)


def fresh(reference):
    """A model that nobody else uses."""
    return load_model(str(reference.folder), log=None)


def method(sd, name: str) -> list:
    """What learns, moved away from where it starts at zero."""
    if name == "hypernet":
        config = hypernetwork.HypernetConfig(dropout=(0, 0.3, 0))
        net = hypernetwork.Hypernetwork(config, hypernetwork.dims(sd)["all"])
        trainable = list(hypernetwork.insert(sd, net).parameters())
    elif name == "lora":
        trainable = [p for m in lora.insert(sd, 2, 2, "attention+ff+conv").values() for p in (m.down, m.up)]
    else:
        trainable = list(sd.unet.requires_grad_(True).parameters())
    with torch.no_grad():
        for i, p in enumerate(trainable):
            if name != "unet":
                p.copy_(0.05 * normal(*p.shape, seed=i))
    return trainable


def gradients(sd, trainable) -> list:
    torch.manual_seed(1)  # for dropout
    for p in trainable:
        p.grad = None
    context = sd.text(["a barn", "a castle"]).detach()
    x0, batch = normal(2, 4, 8, 8), Batch(0, 0, range(2), 2)
    noise, t = batch.normal(x0.shape), batch.timesteps(1000)
    prediction = sd.unet(sd.schedule.add_noise(x0, noise, t), t, context)
    mse(prediction, sd.schedule.target(x0, noise, t)).mean().backward()
    return [p.grad for p in trainable]


@pytest.mark.parametrize("name", ["unet", "lora", "hypernet"])
def test_checkpointing_changes_no_number(sd1, name):
    """And keeps less; dropout draws the same twice."""
    plain, again = fresh(sd1), fresh(sd1)
    a = method(plain, name)
    b = method(again, name)
    memory.checkpoint(again.unet)
    blocks = [m for m in again.unet.modules() if isinstance(m, ResBlock | SpatialTransformer)]
    assert len(list(memory.blocks(again.unet))) == len(blocks)
    assert equal(gradients(plain, a), gradients(again, b))
    context = plain.text(["a barn"]).detach()
    x, t = normal(1, 4, 16, 16), torch.tensor([5])
    sizes = [kept(lambda *_, sd=sd: sd.unet(x, t, context), *sd.unet.parameters()) for sd in (plain, again)]
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("name", ["unet", "lora", "hypernet"])
def test_a_whole_network_keeps_less_and_changes_no_number(sd1, name, monkeypatch):
    """As on a GPU, against torch's own operations: to the bit, but for the last digit behind a frozen
    convolution whose input lies in channels-last order (proj_out's), where torch may take another kernel."""
    plain, ours = fresh(sd1), fresh(sd1)
    a, b = method(plain, name), method(ours, name)
    x, t, context = normal(1, 4, 16, 16), torch.tensor([5]), plain.text(["a barn"]).detach()
    sizes = [kept(lambda *_: ours.unet(x, t, context), *ours.unet.parameters())]
    less = gradients(ours, b)
    monkeypatch.setattr(memory, "ON_CPU", False)
    more = gradients(plain, a)
    assert [g is None for g in more] == [g is None for g in less]
    more, less = (torch.cat([g.flatten() for g in gs if g is not None]) for gs in (more, less))
    assert (more - less).abs().max() <= (0 if name == "unet" else 1e-6 * more.abs().max())
    sizes.append(kept(lambda *_: plain.unet(x, t, context), *plain.unet.parameters()))
    assert sizes[0] < 0.9 * sizes[1]


def test_keys_and_values_may_be_computed_once(sd1):
    """What a sampler does once, the network does in every call; and pictures share one timestep."""
    sd = fresh(sd1)
    x, t, context = normal(2, 4, 8, 8), torch.tensor([500, 500]), normal(2, 77, 48, seed=3)
    with torch.no_grad():
        whole = sd.unet(x, t, context)
        kv = memory.project_kv(sd.unet, context)
        assert len(kv) == 16 and kv[0][1][0].shape[2] == 80  # 77 tokens padded: see pad_keys
        with memory.given_kv(kv):
            assert torch.equal(sd.unet(x, t, torch.zeros_like(context)), whole)
            assert (sd.unet(x, t[:1], context) - whole).abs().max() < 1e-5
        assert torch.equal(sd.unet(x, t, context), whole)
        assert not torch.equal(sd.unet(x, t, torch.zeros_like(context)), whole)


@pytest.mark.parametrize("model", ["sd1", "tiny"])  # words come in at the first level, and at the second
def test_guidance_shares_what_comes_before_the_words(sd1, model):
    """Rows that differ in their words alone: the same numbers, from each module's fewer rows."""
    sd = fresh(sd1) if model == "sd1" else load_model("tiny", "cpu", log=None)
    width, seen = sd.unet.config.cross_attention_dim, {}
    x, t, context = normal(2, 4, 16, 16), torch.tensor([500.0]), normal(6, 77, width, seed=3)
    memory.checkpoint(sd.unet)  # its forwards are put back
    before = {m: m.forward for m in memory.blocks(sd.unet)}
    for name, module in sd.unet.named_modules():
        module.register_forward_hook(lambda m, args, y, name=name: seen.setdefault(name, []).append(len(y)))
    with torch.no_grad():
        whole = sd.unet(x.repeat(3, 1, 1, 1), t, context)
        with memory.shared_prefix(sd.unet, 3):
            shared = sd.unet(x.repeat(3, 1, 1, 1), t, context)
        with memory.shared_prefix(sd.unet, 1):
            alone = sd.unet(x, t, context[:2])
    assert (shared - whole).abs().max() < 1e-5 < (whole[:2] - whole[2:4]).abs().max()
    assert (alone - whole[:2]).abs().max() < 1e-5
    assert {m: m.forward for m in memory.blocks(sd.unet)} == before
    inside = {name for name, rows in seen.items() if rows[1] == 2 != rows[0]}
    assert "down_blocks.0.resnets.0.conv1" in inside
    attends = "down_blocks.0" if model == "sd1" else "down_blocks.1"
    assert f"{attends}.attentions.0.transformer_blocks.0.attn1.to_q" in inside
    assert not any(name.startswith(("mid_block", "up_blocks")) or "attn2" in name for name in inside)


def test_blocks_are_compiled_each_alone(sd1, monkeypatch):
    """Through torch.compile's front, without its code generator: no block (of every third) breaks in two,
    each shape has its own graph, and the numbers stay."""
    sd, graphs = fresh(sd1), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    trainable = method(sd, "lora")
    before = gradients(sd, trainable)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 128)
    for block in list(memory.blocks(sd.unet))[::3]:
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend, fullgraph=True)
    after = gradients(sd, trainable)
    torch._dynamo.reset()
    assert len(graphs) >= 9
    assert all(x is y or (x - y).abs().max() <= 1e-5 for x, y in zip(before, after, strict=True))
