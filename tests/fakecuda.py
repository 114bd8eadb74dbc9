"""hanokdiff on a CUDA device that is not there: which operations a card would be given, and where the host
would wait for it. No numbers are computed, and nothing is said of a card's speed.

torch's FakeTensorMode gives tensors a device and a shape but no memory; fakecuda.cpp, built as guard.so
and loaded before torch, makes torch's CPU build accept "cuda". Which attention kernel a card would choose is
decided here by torch's rule of dtype, width and mask. Every number that is read back is 0.5, 0 or True.
test_card.py runs `main` in a process of its own.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

HERE = Path(__file__).parent


def build_guard(guard: Path) -> None:
    """Compile fakecuda.cpp: three seconds of a core, so test_card.py keeps it for the next run."""
    home = Path(torch.__file__).parent
    include = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    link = [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *include, HERE / "fakecuda.cpp", *link]
    subprocess.run([*command, "-o", guard], check=True, capture_output=True, text=True)


aten = torch.ops.aten
PRODUCTS = {  # the first three are whole in inference mode only
    aten.linear, aten.matmul, aten.conv2d,
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
}  # fmt: skip


class Spy(TorchDispatchMode):
    """Notes what each operation on the pretended device means for the host."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        self.take()

    def take(self) -> dict:
        """What was seen since the last call, and the operations on the device, views included."""
        seen = getattr(self, "seen", {}) | {"operations": getattr(self, "operations", 0)}
        self.operations = 0
        self.seen = {kind: Counter() for kind in ("waits", "blocking", "products", "not bf16")}
        return seen

    def note(self, kind: str, what: str) -> None:
        self.seen[kind][f"{what} at {line()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, kwargs = func._overloadpacket, dict(kwargs or {})
        if "generator" in kwargs:  # the CPU's; there are no numbers to draw
            kwargs["generator"] = None
        if func.namespace != "aten":  # prim.device: where is it?
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if op in (aten._local_scalar_dense, aten.item, aten.is_nonzero):
            return self.read_back(args[0])
        if not all(isinstance(t, FakeTensor) for t in tensors):  # true ones would truly be copied
            args, kwargs = tree_map_only(torch.Tensor, self.pretended, (args, kwargs))
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for t in tensors:  # else FakeTensor would compute with the numbers that it still knows
            t.constant = None
        cuda = [t for t in tensors if on_card(t)]
        self.operations += bool(cuda)
        if op in PRODUCTS and cuda:
            dtypes = "+".join(sorted({str(t.dtype).removeprefix("torch.") for t in cuda}))
            self.seen["products"][dtypes] += 1
            if dtypes != "bfloat16":
                self.note("not bf16", f"{func} in {dtypes}")
        if op in (aten.nonzero, aten.masked_select) and cuda:
            self.note("waits", str(func))
        out = func(*args, **kwargs)
        self.look_at_devices(func, op, args, kwargs, tensors, out)
        return out

    def pretended(self, t):
        return t if isinstance(t, FakeTensor) else self.fake.from_tensor(t)

    def look_at_devices(self, func, op, args, kwargs, tensors, out) -> None:
        """Copies between host and device. What else has tensors of both, FakeTensor refuses, as CUDA does."""
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        masked = op is aten.index and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masked and on_card(args[0]):
            self.note("waits", "an index of booleans")
        copies = op in (aten._to_copy, aten.to, aten.copy_)
        if copies and any(map(on_card, tensors)) and not all(map(on_card, results)):
            self.note("waits", "a copy to the host")
        crosses = any(map(on_card, results)) and any(not on_card(t) and t.dim() for t in tensors)
        if crosses and not (kwargs.get("non_blocking") or (op is aten.copy_ and len(args) > 2 and args[2])):
            self.note("blocking", str(func))

    def read_back(self, t):
        """A number for the host."""
        if isinstance(t, FakeTensor) and on_card(t):
            self.note("waits", "a number read back")
        elif isinstance(t, FakeTensor) and t.constant is not None:
            with _disable_current_modes():
                return t.constant.item()
        return True if t.dtype == torch.bool else 0.5 if t.is_floating_point() else 0


def on_card(t: FakeTensor) -> bool:
    """Its is_cuda, which would be an operation of its own."""
    return t.fake_device.type == "cuda"


def line() -> str:
    """The innermost line of hanokdiff in the calls that led here."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        # a virtual environment may lie in the repository
        ours = file.is_relative_to(HERE.parent) and "site-packages" not in file.parts
        if ours and file != Path(__file__):
            return f"{file.relative_to(HERE.parent)}:{frame.lineno}"
    return "?"


REAL = {name: getattr(torch.Tensor, name) for name in ("numpy", "pin_memory")}
REAL_ATTENTION = F.scaled_dot_product_attention


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """On a card: the flash kernel takes 16 bits, a width of at most 256 and no mask, the other the rest."""
    if not q.is_cuda:
        return REAL_ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    if q.dtype.itemsize == 2 and q.shape[-1] <= 256 and attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, mask, True, dropout_p, is_causal, scale=scale)[0]


def really(function):
    """The function on true tensors: what opens files reads them."""

    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


def apply(module, function, recurse=True):
    """nn.Module._apply, which changes the tensor in a parameter: a true one cannot become a pretended one."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = torch.nn.Parameter(function(p.detach()), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = function(b)
    return module


@contextlib.contextmanager
def card(capability: tuple[int, int] = (8, 0)):
    """Inside, "cuda" is a device; yields the Spy."""
    from hanokdiff import pretrained
    from hanokdiff.formats import load
    from hanokdiff.models import samplers

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    spy = Spy(fake)

    def zeros(t):
        if t.is_cuda:
            spy.note("waits", "values read back")
        kind = bool if t.dtype == torch.bool else float if t.is_floating_point() else int
        return np.zeros(tuple(t.shape), {torch.uint8: np.uint8, torch.float32: np.float32}.get(t.dtype, kind))

    on_files = [(load, "open_folder"), (load, "digest_of"), (pretrained, "open_pretrained")]
    on_files += [(samplers, "sigmas_and_timesteps")]
    patches = [
        mock.patch.multiple(
            torch.Tensor,
            numpy=lambda t, **k: zeros(t) if isinstance(t, FakeTensor) else REAL["numpy"](t, **k),
            pin_memory=lambda t, *_: t if not t.is_cuda else REAL["pin_memory"](t),
        ),
        mock.patch.object(FakeTensor, "tolist", lambda t: zeros(t).tolist()),
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            get_device_capability=lambda *_: capability,
            is_bf16_supported=lambda including_emulation=True: including_emulation or capability >= (8, 0),
            max_memory_allocated=lambda *_: 0,
            synchronize=lambda *_: spy.note("waits", "synchronize"),
            is_current_stream_capturing=lambda: False,
        ),
        mock.patch.object(torch.nn.Module, "_apply", apply),
        mock.patch.object(_foreach_utils, "_foreach_supported_types", [FakeTensor, torch.nn.Parameter]),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        *(mock.patch.object(module, name, really(getattr(module, name))) for module, name in on_files),
    ]
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda"): made on the CPU, copied
    with contextlib.ExitStack() as stack:
        for context in [*patches, fake, spy]:
            stack.enter_context(context)
        yield spy


# ----------------------------------------------------------------------------------------------- what is run


def train(spy: Spy, script: str) -> dict:
    """Two steps of a script's main on the embedded model, the first of which is logged."""
    from hanokdiff.training import trainer
    from hanokdiff.training.trainer import Trainer

    name, *options = script.split()
    module, update, steps = importlib.import_module(f"train_{name}"), Trainer._after_step, []
    begin = Trainer.__iter__

    def iterate(self):
        spy.take()
        return begin(self)

    def after_step(self):
        update(self)
        steps.append(spy.take())
        trainer.LOG_EVERY = 1000
        self.steps = self.step if len(steps) == 2 else self.steps

    argv = "--steps 100 --images 4 --batch-size 2 --preview-every 0 --save-every 0".split()
    replaced = {"__iter__": iterate, "_after_step": after_step, "_finish": lambda self: None}
    with mock.patch.multiple(Trainer, **replaced), mock.patch.object(trainer, "LOG_EVERY", 1):
        assert module.main([*argv, "--out", f"runs/{script}", *options]) == 0
    return steps


def sample(spy: Spy, options: str) -> list[dict]:
    """Two pictures: what is done before the first step, in it, in the others and after them."""
    import sample as script
    from hanokdiff.models.unet import UNet

    forward, parts = UNet.forward, []

    def step(*args):
        parts.append(spy.take())
        return forward(*args)

    with mock.patch.object(UNet, "forward", step):
        assert script.main(["(a house:1.2) in the snow", "--n", "2", *options.split()]) == 0
    return [*parts, spy.take()]


def vae(spy: Spy, _) -> list[dict]:
    from hanokdiff.formats.load import load_model
    from hanokdiff.training.dataset import LatentDataset

    sd = load_model("tiny", log=None)
    spy.take()
    LatentDataset(sd.vae, [Image.new("RGB", (64, 64))] * 2, ["a", "b"], device=sd.device)
    return [spy.take()]


def clip(spy: Spy, _) -> list[dict]:
    from hanokdiff.scoring.clip import Clip

    model = Clip(device="cuda")
    spy.take()
    model.images([Image.new("RGB", (64, 64))] * 2)
    model.texts(["a house", "a barn in the snow"])
    return [spy.take()]


def blip(spy: Spy, folder: str) -> list[dict]:
    from hanokdiff.caption import Blip

    model = really(Blip)(folder, "cpu", "bf16", 5, 8, 1)
    model.model.to("cuda")
    model.device = torch.device("cuda")
    spy.take()
    model.generate([model.pixels(Image.new("RGB", (64, 64)))] * 2, min_length=5)
    return [spy.take()]


def mistakes(spy: Spy, _) -> list[dict]:
    """What the spy is for: copies that wait, an index on the CPU, a number read back, a product in fp32."""
    x = torch.ones(3, 3).to("cuda")
    y = x[torch.tensor([0, 1])] @ x
    y.sum().item()
    y.to("cpu")
    x.bfloat16() @ torch.ones(3, 3).pin_memory().to("cuda", torch.bfloat16, non_blocking=True)
    return [spy.take()]


def main() -> None:
    """python -c ... GUARD FOLDER CASE ...: prints JSON, case -> what was seen in each of its parts."""
    _, _, folder, *cases = sys.argv
    os.chdir(folder)
    os.mkdir("class")
    for i in range(2):
        Image.new("RGB", (64, 64)).save(f"class/{i}.png")
    out = {}
    for case in cases:
        kind, _, rest = case.partition(" ")
        try:
            with card() as spy, contextlib.redirect_stdout(sys.stderr):
                out[case] = globals()[kind](spy, rest)
        except Exception:
            out[case] = traceback.format_exc()
    print(json.dumps(out))
