"""The trials behind single figures of docs/LOG.md: two sides or more in turns, as in hanokdiff.bench.

python docs/trials.py lean      a frozen network's training step with memory.py's functions, over torch's own
python docs/trials.py packed    a sampler's step with convolution weights packed once for oneDNN, over ours
python docs/trials.py inside    a sampler's step, over the network alone in it
python docs/trials.py kv        a guided step that projects keys and values, over one that is given them
python docs/trials.py pad_keys  a guided step that attends to 77 tokens, over one to 80, three of them masked
python docs/trials.py prefix    a guided step, over one that computes what precedes the words once
python docs/trials.py bf16      a guided pass of the UNet in fp32 and diffusers' in bf16, over ours in bf16
python docs/trials.py bf16-step a LoRA step in fp32, over one in bf16
python docs/trials.py narrow    the tiny world's LoRA step beside every W, over W + delta in narrow layers
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from hanokdiff.bench import measure, setup
from hanokdiff.device import keep_freed_memory
from hanokdiff.methods import lora
from hanokdiff.models import memory


def with_flag(steps, on: bool):
    """Training steps with memory.py's functions switched on (on a CPU they are off by default), or off."""
    while True:
        memory.ON_CPU = on
        next(steps)
        yield


def narrow(sd, merged: bool):
    """The tiny world's LoRA step, 16 pictures: with W + delta in narrow layers, or beside W everywhere."""
    parameters = list(lora.trainable(lora.insert(sd, 16, 16, "attention+ff+conv", 16)).values())
    x, t, is_narrow = torch.randn(16, 4, 16, 16), torch.randint(1000, (16,)), lora.LoRA.is_narrow
    while True:
        lora.LoRA.is_narrow = is_narrow if merged else lambda layer: False
        loss = sd.unet(x, t, sd.text(["* in the snow"] * 16)).square().mean()
        torch.autograd.grad(loss, parameters)
        lora.LoRA.is_narrow = is_narrow
        yield


def network(sd, side: int, batch: int, steps=1, given=True, padded=True, shared=False):
    """The UNet alone, guided: `batch` pictures with two prompts each; with keys and values `given` or
    projected in every step, `padded` to 80 tokens or as they are; what precedes the words `shared`."""
    h = side // sd.vae.config.factor
    x = torch.randn(2 * batch, 4, h, h)
    context = torch.randn(2 * batch, 77, sd.unet.config.cross_attention_dim, dtype=sd.dtype)
    with torch.inference_mode():
        kv = memory.project_kv(sd.unet, context) if given else []
        if not padded:
            none = torch.zeros(1, 1, 1, 77)  # a mask that masks nothing: no padding instead
            kv = [(attn, (k[:, :, :77], v[:, :, :77], none)) for attn, (k, v, _) in kv]
    while True:
        with torch.inference_mode(), memory.given_kv(kv), memory.shared_prefix(sd.unet, 1 + shared):
            for _ in range(steps):
                sd.unet(x, torch.tensor([500.0]), context)
        yield


def diffusers_network(sd, side: int):
    """diffusers' UNet with our weights, guided, one picture: as `network`, which projects in every step."""
    from hanokdiff.bench import baseline

    pipe, h = baseline.pipeline(sd), side // sd.vae.config.factor
    unet = pipe.unet.to(sd.dtype)
    x = torch.randn(2, 4, h, h, dtype=sd.dtype)
    context = torch.randn(2, 77, sd.unet.config.cross_attention_dim, dtype=sd.dtype)
    while True:
        with torch.inference_mode():
            unet(x, 500, context, return_dict=False)
        yield


def pack(unet) -> None:
    """As torch's compiler does: convolution weights re-ordered for oneDNN, once for each input shape."""
    for m in (m for m in unet.modules() if isinstance(m, torch.nn.Conv2d)):
        geometry, packed, mkldnn = (m.padding, m.stride, m.dilation, m.groups), {}, torch.ops.mkldnn

        def forward(x, m=m, geometry=geometry, packed=packed, mkldnn=mkldnn):
            if x.shape not in packed:
                packed[x.shape] = mkldnn._reorder_convolution_weight(m.weight, *geometry, list(x.shape))
            return mkldnn._convolution_pointwise(x, packed[x.shape], m.bias, *geometry, "none", [], "")

        m.forward = forward


def sides(trial: str, size: str, folder: Path) -> dict:
    """Name -> iterator that does one step at every next(): the two sides of a trial."""

    def build(dtype=torch.float32):
        return setup.build(size, "cpu", dtype)

    side, batch = setup.side(size), setup.batch(size)
    if trial == "lean":
        pair = ("torch", "lean")
        steps = {name: measure.train(build(), "lora", side, batch, folder / name) for name in pair}
        return {name: with_flag(own, name == "lean") for name, own in steps.items()}
    if trial == "bf16":
        half, full = (network(build(t), side, 1, given=False) for t in (torch.bfloat16, torch.float32))
        theirs = diffusers_network(build(torch.bfloat16), side)
        return {"bf16": half, "fp32": full, "diffusers bf16": theirs}
    if trial == "bf16-step":
        types = {"bf16": torch.bfloat16, "fp32": torch.float32}
        return {n: measure.train(build(t), "lora", side, batch, folder / n) for n, t in types.items()}
    if trial == "narrow":
        return {name: narrow(build(), name == "merged") for name in ("merged", "beside")}
    if trial == "packed":
        packed = build()
        pack(packed.unet)
        return {"ours": network(build(), side, 1), "packed": network(packed, side, 1)}
    if trial == "inside":
        alone = network(build(), side, 1, steps=setup.STEPS)
        return {"the network": alone, "the sampler": measure.sample(build(), side, 1)}
    if trial == "prefix":
        return {"shared": network(build(), side, 4, shared=True), "all rows": network(build(), side, 4)}
    if trial == "pad_keys":
        return {"80": network(build(), side, 1), "77": network(build(), side, 1, padded=False)}
    return {"given": network(build(), side, 1), "projected": network(build(), side, 1, given=False)}


if __name__ == "__main__":
    trials = ("lean", "packed", "inside", "kv", "pad_keys", "prefix", "bf16", "bf16-step", "narrow")
    if sys.argv[1:] not in ([name] for name in trials):
        sys.exit(__doc__)
    keep_freed_memory()
    sizes = {"bf16": ("small", "half"), "bf16-step": ("small", "half"), "narrow": ("tiny",)}
    for size in sizes.get(sys.argv[1], ("overhead", "small", "tiny")):
        with tempfile.TemporaryDirectory() as folder:
            rounds, turn = (3, 1) if size == "half" else (10, 1)
            times = measure.interleaved(sides(sys.argv[1], size, Path(folder)), rounds, turn)
        (first, a), *others = ((name, min(seconds)) for name, seconds in times.items())
        shares = (f", {name} {1e3 * b:.1f} ms: {b / a:.3f}" for name, b in others)
        print(f"{size:9} {first} {1e3 * a:.1f} ms{''.join(shares)}", flush=True)
