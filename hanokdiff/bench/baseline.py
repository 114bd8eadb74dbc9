"""The baseline of hanokdiff.bench: training and sampling with diffusers and peft, as their own scripts do it.

Not used by anything else, and the only file here that needs diffusers and peft (pip install -r
requirements-dev.txt). Each loop follows the script named in it (diffusers 0.42), without accelerate:

    default     as the script is when no flag is given: photos encoded in every step, the text encoder run in
                every step, torch's default AdamW; on a GPU fp32 weights under bf16 autocast
                (--mixed_precision bf16)
    best        with every option of the script or its documentation that leaves the mathematics as it is:
                latents (and the prompts of a frozen text encoder) encoded once, fused AdamW, gradients set to
                None; in sampling q, k and v projected as one
    best, NHWC  on a GPU: the same with convolutions in channels_last
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

from hanokdiff.bench import setup
from hanokdiff.formats.folder import save_folder
from hanokdiff.models.pipeline import to_tensor

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


def kinds(device: str) -> tuple[str, ...]:
    """The baseline's sides. Which memory layout is faster depends on the card: the faster counts."""
    more = ("diffusers best, NHWC",) if device.startswith("cuda") else ()
    return "diffusers default", "diffusers best", *more


def pipeline(sd) -> StableDiffusionPipeline:
    """diffusers' pipeline with our weights, by way of a model folder on disk."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        save_folder(Path(folder), sd.unet, sd.vae, sd.text.encoder, sd.text.tokenizer, sd.schedule)
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(sd.device)


def run(sd, work: str, kind: str, side: int, batch: int, images, captions, compile=False) -> Iterator[None]:
    """One step of `work` at every next(); kind: one of kinds()."""
    pipe, best = pipeline(sd), kind != "diffusers default"
    if kind.endswith("NHWC"):
        pipe.unet.to(memory_format=torch.channels_last)
    if best and work == "sample":
        pipe.fuse_qkv_projections(vae=False)
    if best and compile:
        pipe.unet.compile()
    if work == "sample":
        return sample(pipe, sd.dtype, side, batch)
    return train(pipe, work, best, sd.dtype, batch, images, captions)


def sample(pipe, dtype: torch.dtype, side: int, batch: int) -> Iterator[None]:
    """StableDiffusionPipeline.__call__, to the latents."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.to(dtype)
    prompts, size = ["a house in the snow"] * batch, {"height": side, "width": side}
    while True:
        pipe(prompts, num_inference_steps=setup.STEPS, guidance_scale=7.5, output_type="latent", **size)
        yield


def add_lora(pipe, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """train_dreambooth_lora.py's adapter of rank 4, in fp32 (its cast_training_params)."""
    from peft import LoraConfig

    pipe.unet.to(dtype), pipe.text_encoder.to(dtype)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers))
    trainable = [p for p in pipe.unet.parameters() if p.requires_grad]
    for p in trainable:
        p.data = p.data.float()
    return trainable


def train(pipe, method: str, best: bool, dtype: torch.dtype, batch: int, images, captions) -> Iterator[None]:
    """train_dreambooth.py with --train_text_encoder, train_dreambooth_lora.py, textual_inversion.py."""
    unet, text, vae, tokenizer = pipe.unet, pipe.text_encoder, pipe.vae, pipe.tokenizer
    device, noise_scheduler = unet.device, DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (unet, text, vae):
        part.requires_grad_(False)
    vae.to(dtype)
    if method == "dreambooth":  # fp32 weights
        trainable = [*unet.requires_grad_(True).parameters(), *text.requires_grad_(True).parameters()]
    elif method == "lora":
        trainable = add_lora(pipe, dtype)
    else:
        tokenizer.add_tokens(["<hanok>"])
        captions = [caption.replace("*", "<hanok>") for caption in captions]
        text.resize_token_embeddings(max(len(tokenizer), text.config.vocab_size))
        unet.to(dtype)
        trainable = list(text.get_input_embeddings().requires_grad_(True).parameters())
        initial = trainable[0].data.clone()
        others = torch.arange(len(initial)) != tokenizer.convert_tokens_to_ids("<hanok>")
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, **({"fused": True} if best else {}))
    pixels = torch.stack([to_tensor(image) for image in images]).to(device, dtype)
    padding = {"padding": "max_length", "max_length": 77, "truncation": True}
    ids = tokenizer(captions, return_tensors="pt", **padding).input_ids.to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    @torch.no_grad()
    def encode(x):
        return vae.encode(x).latent_dist.sample() * vae.config.scaling_factor

    latents = torch.cat([encode(x[None]) for x in pixels]) if best else None
    with torch.no_grad(), autocast:
        contexts = text(ids)[0] if best and method == "lora" else None
    for step in range(10**9):
        pick = torch.arange(step * batch, (step + 1) * batch, device=device) % len(images)
        with autocast:
            x = latents[pick] if best else encode(pixels[pick])
            noise = torch.randn_like(x)
            t = torch.randint(0, 1000, (batch,), device=device)
            context = contexts[pick] if contexts is not None else text(ids[pick])[0]
            out = unet(noise_scheduler.add_noise(x, noise, t), t, context, return_dict=False)[0]
            loss = F.mse_loss(out.float(), noise.float(), reduction="mean")
        loss.backward()
        if method != "ti":
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=best)
        if method == "ti":
            with torch.no_grad():
                trainable[0][others] = initial[others]
        loss.detach().item()
        yield


def first_step(folder: str) -> None:
    """Load a model and do one step of sampling."""
    options = {"safety_checker": None, "local_files_only": True, "dtype": torch.float32}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipe("a house", num_inference_steps=1, output_type="latent")
