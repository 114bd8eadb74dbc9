"""Open a model: the embedded one, a diffusers folder, a hub id or a single file."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hanokdiff.device import choose_device
from hanokdiff.files import read_json
from hanokdiff.formats import single_file
from hanokdiff.formats.folder import find_model, load_part, read_config
from hanokdiff.formats.tokenizer import check_tokenizer, find_tokenizer, load_tokenizer
from hanokdiff.formats.validate import all_finite, check_fit, check_kind
from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.schedule import Schedule
from hanokdiff.models.text_encoder import TextConfig, TextEncoder
from hanokdiff.models.tokens import Text
from hanokdiff.models.unet import UNet, UNetConfig
from hanokdiff.models.vae import VAE, VAEConfig

TINY_MODEL = Path(__file__).parents[1] / "tiny" / "sd"


def load_model(
    model: str = "tiny",
    device: str | None = None,
    dtype: str = "auto",
    log=print,
    tokenizer: str | None = None,  # folder or hub id of another one than the model's own
    prediction: str | None = None,  # what the UNet predicts, if the model is silent or wrong
    masters: bool = False,  # keep what the file says as `master` of each parameter: to train and to save it
    vae: str | None = None,  # folder or single file of another autoencoder
    zero_terminal_snr: bool = False,  # a schedule that ends in noise alone, for models that predict v
    training: bool = False,  # gradients are to be computed: "auto" is not fp16 then
) -> StableDiffusion:
    """Open a model: "tiny", a diffusers folder, a hub id, or a single file (.safetensors, .ckpt). Everything
    is frozen; what is trained is up to the method."""
    start, (dev, precision, reason) = time.perf_counter(), choose_device(device, dtype, training)
    path = TINY_MODEL if model == "tiny" else find_model(model)
    open_ = open_file if path.is_file() else open_folder
    unet, own_vae, encoder, words, schedule = open_(path, tokenizer, prediction, log)
    parameters = sum(p.numel() for p in unet.parameters())
    if dtype == "auto":  # which on a CPU depends on the model's size
        dev, precision, reason = choose_device(device, dtype, training, parameters)
    decoder = open_vae(Path(vae), own_vae.config) if vae else own_vae
    if zero_terminal_snr:
        schedule = replace(schedule, rescale_betas_zero_snr=True)
    digest = digest_of({"unet": unet, "vae": decoder, "text_encoder": encoder}, words, schedule, path)
    for part in (unet, decoder, encoder):
        exact = [p.detach() for p in part.parameters()]
        part.to(dev, precision)
        if masters and precision != torch.float32:
            for p, full in zip(part.parameters(), exact, strict=True):
                p.master = full
    if log:
        took = f"opened in {time.perf_counter() - start:.1f} s"
        log(f"model {model}: UNet of {parameters / 1e6:.1f} M parameters, {schedule.prediction_type}, {took}")
        log(f"device {reason}")
    sd = StableDiffusion(unet, decoder, Text(encoder, words), schedule, dev, precision, model, digest)
    file = path / "hanokdiff.json"
    if file.is_file():  # our DreamBooth's: the word it was trained with
        word = read_json(file).get("token")
        if not isinstance(word, str):
            raise ValueError(f'{file} names no pseudo word; write {{"token": "..."}} into it')
        try:
            sd.text.add_word(word)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
    return sd


SAMPLE = 64  # values of each tensor that tell models apart


def digest_of(parts: dict[str, nn.Module], words, schedule: Schedule, path: Path) -> str:
    """Twelve letters of a SHA-256 over a sample of every tensor, the vocabulary and the schedule: the same
    model under another name has the same, another one under the same name has not. Refuses a value that is
    not finite, of which every picture would be black."""
    seen = hashlib.sha256(repr(schedule).encode())
    seen.update(json.dumps(sorted(words.get_vocab().items(), key=lambda x: x[1])).encode())
    for part, network in parts.items():
        for name, tensor in network.state_dict().items():
            if tensor.is_meta:  # bench/budget.py counts without numbers
                continue
            if tensor.is_floating_point() and not all_finite(tensor):
                bad = f"{path}: {part}.{name} has a value that is not finite"
                raise ValueError(f"{bad}; fetch the model again")
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].float().contiguous()
            seen.update(f"{part}.{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return seen.hexdigest()[:12]


def open_folder(folder: Path, tokenizer: str | None, prediction: str | None, log) -> tuple:
    """UNet, VAE, text encoder, tokenizer and schedule of a diffusers folder."""
    check_kind(folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule = read_config(schedule, Schedule, "a noise schedule that is known here")
    schedule = replace(schedule, prediction_type=prediction or schedule.prediction_type)
    unet = load_part(folder, "unet", UNet, UNetConfig)
    vae = load_part(folder, "vae", VAE, VAEConfig)
    encoder = load_part(folder, "text_encoder", TextEncoder, TextConfig)
    check_fit(unet.config, encoder.config, folder)
    own, c = folder / "tokenizer", encoder.config
    if tokenizer:
        words = find_tokenizer(tokenizer, folder, c.vocab_size, single_file.is_sd2(c))
    else:
        words = check_tokenizer(load_tokenizer(own), own, c.vocab_size)
    return unet, vae, encoder, words, schedule


def open_vae(path: Path, own: VAEConfig) -> VAE:
    """An autoencoder by itself: a folder of diffusers (its own, or a model's with vae/) or a single file."""
    if path.is_dir():
        model = path if (path / "vae").is_dir() else path.parent
        vae = load_part(model, "vae" if model == path else path.name, VAE, VAEConfig)
    else:
        vae = single_file.read_vae(path)
    made, wanted = ((c.latent_channels, c.factor) for c in (vae.config, own))
    if made != wanted:
        latents = f"--vae {path} makes latents of {made[0]} channels, 1/{made[1]} of the pictures"
        raise ValueError(f"{latents}; the model's are of {wanted[0]}, 1/{wanted[1]}")
    return vae


def open_file(path: Path, tokenizer: str | None, prediction: str | None, log) -> tuple:
    """The same five of a single file; the tokenizer is found elsewhere."""
    unet, vae, encoder, schedule = single_file.read_file(path, prediction, log)
    c = encoder.config
    words = find_tokenizer(tokenizer, path.parent, c.vocab_size, single_file.is_sd2(c))
    return unet, vae, encoder, words, schedule
