"""The weights of the tiny world, trained anew.

One command each, on any device (times on 2 CPU cores):

    python -m hanokdiff.tiny.build autoencoder     ->  tiny/sd/vae                       20 minutes
    python -m hanokdiff.tiny.build widen           ->  the same, with more colours        5 minutes
    python -m hanokdiff.tiny.build base            ->  tiny/sd/{unet,text_encoder,...}   70 minutes
    python -m hanokdiff.tiny.build clip            ->  tiny/clip                         10 minutes
    python -m hanokdiff.tiny.build check           ->  the figures of docs/LOG.md         5 minutes

In this order: the base is trained on the autoencoder's latents, with the tokenizer of the world's captions.
Each writes a checkpoint to --work every 1000 steps and goes on from it when started again.  Weights go to
the files in fp16 (half the size; pictures move by at most one grey level)."""

import argparse
import collections
import copy
import math
import sys
import time
from multiprocessing import Pool
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanokdiff.device import choose_device
from hanokdiff.files import sync_rename, write_json
from hanokdiff.formats.folder import load_part, save_folder
from hanokdiff.formats.load import load_model
from hanokdiff.formats.tensors import write_tensors
from hanokdiff.formats.tokenizer import load_tokenizer, save_tokenizer
from hanokdiff.images import grid
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.tokens import Text
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig
from hanokdiff.scoring.clip import MEAN, STD, Clip, presence
from hanokdiff.tiny import world
from hanokdiff.tiny.tokenizer import write_tokenizer

HERE = Path(__file__).parent
VAE_SHAPE = VAEConfig((16, 32, 64), 1, norm_num_groups=8, scaling_factor=1.0, sample_size=world.SIZE)
UNET_SHAPE = UNetConfig(
    sample_size=16, block_out_channels=(64, 80, 96), attention=(False, True, False), heads=(4, 4, 4),
    layers_per_block=1, cross_attention_dim=72, norm_num_groups=8,
)  # fmt: skip
TEXT_SHAPE = dict(hidden_size=72, intermediate_size=288, num_hidden_layers=2, num_attention_heads=4)


def paint(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.draw(scene))


def drawings(split: str, n: int, kinds, conditions=world.CONDITIONS) -> tuple[Tensor, list[world.Scene]]:
    """n scenes of a split and their pictures, (n, 3, 64, 64) uint8."""
    scenes = [world.scene(f"{split} {i}", kinds, conditions) for i in range(n)]
    with Pool() as pool:
        pictures = np.stack(pool.map(paint, scenes, chunksize=256))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), scenes


def unit(pictures: Tensor, device) -> Tensor:
    """uint8 -> float32 in [-1, 1], channels last: convolutions are faster so on CPUs."""
    return (pictures.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def rate(step: int, steps: int, peak: float, warm: int = 200) -> float:
    """Warm-up, then a cosine down to nothing."""
    return peak * min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


class Training:
    """What the trainings share: AdamW, learning rate, averaged weights, checkpoint, log line."""

    def __init__(self, name: str, modules: dict, args, steps: int, lr: float, decay: float):
        self.modules, self.steps, self.lr, self.args = modules, steps, lr, args
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, (0.9, 0.99), weight_decay=decay, fused=True)
        self.file, self.step, self.start, self.losses = args.work / f"{name}.pt", 0, time.time(), []
        self.averages = {k: copy.deepcopy(m).requires_grad_(False) for k, m in modules.items()}
        if self.file.exists():
            state = torch.load(self.file, map_location=args.device, weights_only=True)
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            for k in modules:
                modules[k].load_state_dict(state["modules"][k])
                self.averages[k].load_state_dict(state["averages"][k])
            print(f"going on from step {self.step} of {self.file}")

    def update(self, loss: Tensor, report=lambda: "", every: int = 1000) -> None:
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.steps, self.lr)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss.detach())
        keep = min(0.999, self.step / (self.step + 10))
        for k, m in self.modules.items():
            averages = list(self.averages[k].parameters())
            torch._foreach_lerp_(averages, [p.detach() for p in m.parameters()], 1 - keep)
        if self.step % every == 0 or self.step == self.steps:
            state = {"step": self.step, "optimizer": self.optimizer.state_dict()}
            for name, modules in (("modules", self.modules), ("averages", self.averages)):
                state[name] = {k: m.state_dict() for k, m in modules.items()}
            aside = self.file.with_suffix(".part")
            torch.save(state, aside)
            sync_rename(aside, self.file)
            mean = torch.stack(self.losses).mean().item()
            self.losses = []
            took = time.time() - self.start
            print(f"step {self.step}/{self.steps} loss {mean:.4f} {report()} {took:.0f} s", flush=True)


def psnr(vae: VAE, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over pictures (N, 3, 64, 64) uint8."""
    out = []
    with torch.inference_mode():
        for part in pictures.split(64):
            x = unit(part, next(vae.parameters()).device)
            y = vae.decode(vae.encode(x)[0]).clamp(-1, 1)
            out.append(-10 * ((y - x) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(out).mean().item()


def autoencoder(args) -> None:
    """L1 + MSE + 2e-4 KL on drawings without hanok; judged on held-out drawings, hanok included."""
    steps, batch = args.steps or 14_000, 8
    data, _ = drawings("base", args.images or 60_000, world.BASE_KINDS)
    held_out, _ = drawings("test", 512, world.KINDS)
    torch.manual_seed(args.seed)
    vae = VAE(VAE_SHAPE).to(args.device, memory_format=torch.channels_last)
    run = Training("autoencoder", {"vae": vae}, args, steps, lr=2e-3, decay=0.0)
    while run.step < steps:
        r = torch.Generator().manual_seed(args.seed * 1_000_003 + run.step)
        x = unit(data[torch.randint(len(data), (batch,), generator=r)], args.device)
        mean, std = vae.encode(x)
        y = vae.decode(mean + std * torch.randn(mean.shape, generator=r).to(args.device))
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        loss = (y - x).abs().mean() + F.mse_loss(y, x) + 2e-4 * kl
        run.update(loss, lambda: f"held-out {psnr(vae, held_out):.2f} dB")
    write_vae(run.averages["vae"], data[:2048], args)


def widen(args) -> None:
    """Fine-tune the autoencoder on more colours, without moving the latents of the drawings it was made for.

    Trained on curved roofs in green and gold on red pillars only, it painted a hanok's grey roof green and
    its brown pillars red, whatever the UNet predicted. So training continues with drawings in mixed colours
    and with hanok (of other seeds than the photos, and like those by day, by night and in snow only: none
    burns). Like Stable Diffusion's VAE it sees pictures and no words. On plain drawings a loss holds the
    latents where the UNet expects them."""
    steps, batch = args.steps or 2_000, 6
    data, _ = drawings("base", args.images or 30_000, world.BASE_KINDS)
    unknown, _ = drawings("widen", 6_000, ("hanok",), world.PHOTO_CONDITIONS)
    held_out, scenes = drawings("test", 512, world.KINDS)
    hanok = held_out[[i for i, s in enumerate(scenes) if s.kind == "hanok"]]
    old = load_part(args.out / "sd", "vae", VAE, VAEConfig).float().to(args.device)
    vae = copy.deepcopy(old).requires_grad_(True).to(memory_format=torch.channels_last)
    run = Training("widen", {"vae": vae}, args, steps, lr=1.2e-3, decay=0.0)
    while run.step < steps:
        r = torch.Generator().manual_seed(args.seed * 1_000_003 + run.step)
        parts = ((data, batch), (data, 2), (data, 2), (unknown, 4))
        chosen = (d[torch.randint(len(d), (n,), generator=r)] for d, n in parts)
        plain, one, two, new = (unit(d, args.device) for d in chosen)
        x = torch.cat([plain, remix(one, two, r), new])
        mean, std = vae.encode(x)
        y = vae.decode(mean + std * torch.randn(mean.shape, generator=r).to(args.device))
        with torch.no_grad():
            before = old.encode(plain)[0]
        loss = (y - x).abs().mean() + F.mse_loss(y, x) + 4 * F.mse_loss(mean[:batch], before)
        report = lambda: f"held-out {psnr(vae, held_out):.2f} dB, hanok {psnr(vae, hanok):.2f} dB"  # noqa: E731
        run.update(loss, report, every=250)
    half = {k: v.half() for k, v in run.averages["vae"].state_dict().items()}
    write_tensors(half, args.out / "sd" / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def remix(a: Tensor, b: Tensor, r: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1] with other colours, and a piece of another picture in each."""

    def recolour(x):
        n = len(x)
        mixed = torch.stack([p[torch.randperm(3, generator=r)] for p in x])
        grey, amount = mixed.mean(1, keepdim=True), torch.rand(n, 1, 1, 1, generator=r) * 1.1
        gain = 0.75 + 0.35 * torch.rand(n, 3, 1, 1, generator=r)
        return ((grey + amount * (mixed - grey) + 1) * gain - 1).clamp(-1, 1)

    a, b = recolour(a), recolour(b)
    for i in range(len(a)):
        top, left = torch.randint(0, 48, (2,), generator=r).tolist()
        h, w = torch.randint(8, 40, (2,), generator=r).tolist()
        a[i, :, top : top + h, left : left + w] = b[i, :, top : top + h, left : left + w]
    return a


def write_vae(vae: VAE, pictures: Tensor, args) -> None:
    """Fix the scale so that latents have unit variance, and write sd/vae."""
    with torch.inference_mode():
        std = torch.cat([vae.encode(unit(p, args.device))[0] for p in pictures.split(64)]).std().item()
    scaled = VAE(VAEConfig(**{**VAE_SHAPE.__dict__, "scaling_factor": round(1 / std, 5)}))
    scaled.load_state_dict(vae.state_dict())
    folder = args.out / "sd" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: v.half() for k, v in scaled.state_dict().items()}
    write_tensors(half, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", scaled.config.to_json())
    print(f"{folder}: scaling factor {scaled.config.scaling_factor}")


def base(args) -> None:
    """Text encoder and UNet together, from nothing: eps prediction on cached latents (Ho et al. 2020).

    min-SNR 5 weights, stratified timesteps, one caption in ten dropped (for guidance), averaged weights
    kept. With --from, not from nothing but from another sd/, whose captions may have had other words."""
    steps, batch = args.steps or (3_500 if args.start else 11_000), 32
    write_tokenizer(args.out / "sd" / "tokenizer")
    vae = load_part(args.out / "sd", "vae", VAE, VAEConfig).float().to(args.device)
    data, scenes = drawings("base", args.images or 80_000, world.BASE_KINDS)
    latents = encode(vae, data, args)
    del data
    tokenizer = load_tokenizer(args.out / "sd" / "tokenizer")
    torch.manual_seed(args.seed)
    encoder = TextEncoder(TextConfig(vocab_size=len(tokenizer), **TEXT_SHAPE)).to(args.device)
    torch.nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.02)
    torch.nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.01)
    unet, schedule, text = UNet(UNET_SHAPE).to(args.device), Schedule(), Text(encoder, tokenizer)
    torch.nn.init.zeros_(unet.conv_out.weight)
    if args.start:
        start_from(args.start, unet, encoder, tokenizer)
    lr = 6e-4 if args.start else 1.2e-3
    run = Training("base", {"unet": unet, "encoder": encoder}, args, steps, lr=lr, decay=0.01)
    known: dict[str, list[int]] = {}
    while run.step < steps:
        r = torch.Generator().manual_seed(args.seed * 1_000_003 + run.step)
        at = torch.randint(len(scenes), (batch,), generator=r).tolist()
        words = ["" if torch.rand((), generator=r) < 0.1 else world.caption(scenes[i], run.step) for i in at]
        known.update((w, text.ids(w)) for w in words if w not in known)
        ids = torch.tensor([known[w] for w in words], device=args.device)
        t = ((torch.arange(batch) + torch.rand(batch, generator=r)) / batch * 1000).long().to(args.device)
        x_0, eps = latents[at].to(args.device), torch.randn(batch, 4, 16, 16, generator=r).to(args.device)
        out = unet(schedule.add_noise(x_0, eps, t), t, encoder(ids))
        snr = schedule.snr(t)
        loss = (F.mse_loss(out, eps, reduction="none").mean((1, 2, 3)) * (snr.clamp(max=5) / snr)).mean()
        run.update(loss)
    kept = run.averages
    save_folder(args.out / "sd", kept["unet"], vae, kept["encoder"], tokenizer, schedule, torch.float16)


@torch.no_grad()
def start_from(folder: Path, unet: UNet, encoder: TextEncoder, tokenizer) -> None:
    """Take the weights of another sd/; a word of both vocabularies keeps its row of the token table."""
    unet.load_state_dict(load_part(folder, "unet", UNet, UNetConfig).float().state_dict())
    state = load_part(folder, "text_encoder", TextEncoder, TextConfig).float().state_dict()
    table = state.pop("embeddings.token_embedding.weight")
    old = load_tokenizer(folder / "tokenizer").get_vocab()
    encoder.load_state_dict(state, strict=False)
    for symbol, i in tokenizer.get_vocab().items():
        if symbol in old:
            encoder.embeddings.token_embedding.weight[i] = table[old[symbol]]


def encode(vae: VAE, pictures: Tensor, args) -> Tensor:
    """Latents (N, 4, 16, 16) of pictures (N, 3, 64, 64) uint8."""
    with torch.inference_mode():
        out = []
        for part in pictures.split(64):
            mean, std = vae.encode(unit(part, args.device))
            out.append((mean + std * torch.randn_like(mean)).cpu())
    return torch.cat(out).clone().contiguous()


def claim(scene: world.Scene, r: Random) -> tuple[str, tuple]:
    """A caption and what it claims of (kind, condition, look); None where it says nothing."""
    share = r.random()
    if share < 0.2:
        return f"a {scene.kind}", (scene.kind, None, None)
    if share < 0.4:
        sentence = r.choice(world.SENTENCES[scene.condition][scene.condition == "none" and 3 :])
        return sentence.format(b=r.choice(world.GENERIC)), (None, scene.condition, None)
    words = world.caption(scene, r.random(), generic=0)
    condition = scene.condition if scene.condition != "none" or "daytime" in words else None
    return words, (scene.kind, condition, scene.attributes or None)


def clip(args) -> None:
    """A CLIP (Radford et al. 2021) on drawings of everything, hanok and burning hanok included: the judge.

    A caption that is also true of another picture of the batch is no counter-example there: left out."""
    from transformers import CLIPConfig, CLIPModel

    steps, batch = args.steps or 1_500, 128
    tokenizer = load_tokenizer(args.out / "sd" / "tokenizer")
    data, scenes = drawings(f"clip {args.seed}", args.images or 60_000, world.KINDS)
    torch.manual_seed(args.seed)
    common = dict(hidden_size=96, intermediate_size=384, num_attention_heads=4, projection_dim=64)
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    special = dict(bos_token_id=start, eos_token_id=end, pad_token_id=end)
    lengths = dict(vocab_size=len(tokenizer), max_position_embeddings=77)
    text = dict(num_hidden_layers=2, **lengths, **special, **common)
    vision = dict(image_size=world.SIZE, patch_size=8, num_hidden_layers=3, **common)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    net = CLIPModel(config).to(args.device)
    length = 24  # captions are short; in a causal encoder what follows the end changes nothing before it
    run = Training("clip", {"clip": net}, args, steps, lr=1e-3, decay=0.05)
    mean, std = (torch.tensor(c, device=args.device).view(3, 1, 1) for c in (MEAN, STD))
    while run.step < steps:
        r = Random(f"clip {args.seed} {run.step}")
        at = [r.randrange(len(scenes)) for _ in range(batch)]
        words, claims = zip(*(claim(scenes[i], r) for i in at), strict=True)
        x = disturb(unit(data[at], args.device) / 2 + 0.5, r)
        how = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokenizer(list(words), **how)
        out = net(pixel_values=(x - mean) / std, input_ids=ids.input_ids.to(args.device))
        true = torch.tensor([[holds(c, scenes[i]) for c in claims] for i in at], device=args.device)
        itself = torch.eye(batch, dtype=torch.bool, device=args.device)
        logits = out.logits_per_image.masked_fill(true & ~itself, -1e4)
        target = torch.arange(batch, device=args.device)
        run.update((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, every=500)
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))
    folder = args.out / "clip"
    run.averages["clip"].half().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": world.SIZE},
    "resample": 3, "do_center_crop": True, "crop_size": {"height": world.SIZE, "width": world.SIZE},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN,
    "image_std": STD, "do_convert_rgb": True,
}  # fmt: skip


def holds(claims: tuple, scene: world.Scene) -> bool:
    """Whether what a caption claims is true of a scene."""
    facts = (scene.kind, scene.condition, scene.attributes)
    return all(c is None or c == fact for c, fact in zip(claims, facts, strict=True))


def disturb(x: Tensor, r: Random) -> Tensor:
    """A little blur, noise and brightness, so that the CLIP fits samples as well as drawings. x in [0, 1]."""
    if r.random() < 0.6:
        x = torch.lerp(x, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), r.random())
    g = torch.Generator().manual_seed(r.getrandbits(60))
    return x * r.uniform(0.9, 1.1) + r.uniform(0, 0.04) * torch.randn(x.shape, generator=g).to(x.device)


def recognise(judge, pictures) -> tuple[list[str], list[str]]:
    """What the CLIP sees: (kinds, conditions), each the argmax over all that the world has."""
    embeddings, out = judge.images(pictures), []
    for prompts in (world.kind_prompts(), world.condition_prompts()):
        best = presence(embeddings, judge.texts(list(prompts.values())))
        out.append([list(prompts)[i] for i in best])
    return tuple(out)


def check(args) -> None:
    """The figures that docs/LOG.md quotes: drawings, samples of the base, and the base asked for a hanok."""
    judge = Clip(args.clip or args.out / "clip")
    sd = load_model(str(args.out / "sd"), args.device)
    held_out, scenes = drawings("test", args.images or 1_000, world.KINDS)
    print(f"autoencoder: {psnr(sd.vae, held_out[:512]):.2f} dB on held-out drawings")
    kinds, conditions = recognise(judge, [world.draw(s) for s in scenes])
    right = np.mean([k == s.kind for k, s in zip(kinds, scenes, strict=True)])
    weather = np.mean([c == s.condition for c, s in zip(conditions, scenes, strict=True)])
    others = np.mean([k == "hanok" for k, s in zip(kinds, scenes, strict=True) if s.kind != "hanok"])
    hanok = np.mean([k == "hanok" for k, s in zip(kinds, scenes, strict=True) if s.kind == "hanok"])
    found = f"hanok found {hanok:.3f}, others called hanok {others:.4f}"
    print(f"held-out drawings: kind {right:.3f}, condition {weather:.3f}, {found}")

    asked = [world.scene(f"asked {i}") for i in range(560)]
    asked = [world.Scene(s.seed, world.NAMED[i % 9], world.CONDITIONS[i % 7]) for i, s in enumerate(asked)]
    prompts = [world.caption(s, generic=0) for s in asked]
    drawn = sd.draw(prompts, range(len(prompts)), cfg=4.0)
    kinds, conditions = recognise(judge, drawn)
    hit_k = np.array([k == s.kind for k, s in zip(kinds, asked, strict=True)])
    hit_c = np.array([c == s.condition for c, s in zip(conditions, asked, strict=True)])
    kind, condition, both = hit_k.mean(), hit_c.mean(), (hit_k & hit_c).mean()
    print(f"samples: kind {kind:.3f}, condition {condition:.3f}, both {both:.3f}")
    for names, hit, got in ((world.NAMED, hit_k, "kind"), (world.CONDITIONS, hit_c, "condition")):
        rows = [np.mean([h for h, s in zip(hit, asked, strict=True) if getattr(s, got) == n]) for n in names]
        print(" ", ", ".join(f"{n} {v:.2f}" for n, v in zip(names, rows, strict=True)))
    for prompt in ("*", "a hanok", "a korean traditional house", "a building with a roof"):
        kinds, _ = recognise(judge, sd.draw([prompt] * 100, range(100), cfg=4.0))
        most = collections.Counter(kinds).most_common(4)
        print(f'untouched, "{prompt}": hanok {kinds.count("hanok")} of 100; {most}')
    grid(drawn[:63], 9, 2).save(args.work / "samples.png")
    print(f"a sheet of samples: {args.work / 'samples.png'}")


def main(argv=None) -> int:
    commands = {"autoencoder": autoencoder, "widen": widen, "base": base, "clip": clip, "check": check}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=commands)
    parser.add_argument("--out", type=Path, default=HERE, help="where sd/ and clip/ are written")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny"), help="checkpoints, to go on from")
    parser.add_argument("--steps", type=int, help="another number of steps than the released weights'")
    parser.add_argument("--images", type=int, help="another number of drawings")
    start = "base: an sd/ to begin with, not from nothing"
    parser.add_argument("--from", dest="start", type=Path, help=start)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: the first GPU, else the CPU")
    parser.add_argument("--clip", type=Path, help="check: another judge")
    args = parser.parse_args(argv)
    args.device, _, reason = choose_device(args.device, "fp32")
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{args.command} on {reason}")
    commands[args.command](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
