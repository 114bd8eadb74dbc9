"""LoRA: teach Stable Diffusion a subject by a low-rank change of its attention layers.

    W' = W + (alpha / rank) up down                          Hu et al. 2021, arXiv:2106.09685, equation 3
    L  = || eps - eps_theta(x_t, t, prompt) ||^2             over the photos; only `down` and `up` are trained
        + w || eps' - eps_theta(x'_t', t', class prompt) ||^2
                                                             with --class-images: prior preservation

    python train_lora.py                                          the embedded hanok, half a minute
    python train_lora.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/lora/lora.safetensors (kohya's format: the WebUI, ComfyUI and diffusers read it), log.jsonl and
previews/.
Then:  python sample.py "*, fire" "* in the fire" --lora runs/lora/lora.safetensors
Read next: hanokdiff/methods/lora.py (the layer), hanokdiff/training/trainer.py (everything around the loop).
"""

import sys

import torch

from hanokdiff.errors import report_errors
from hanokdiff.formats import lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
from hanokdiff.training import prior
from hanokdiff.training.args import (
    check_resolution,
    check_training,
    count,
    load_data,
    run_folder,
    trainer_options,
    training_parser,
)
from hanokdiff.training.trainer import Trainer

# The tiny UNet has cross-attention at one level only, so there the convolutions are trained too.
# SD: rates, text encoder and no class pictures as in kohya's docs/train_network.md; rank as in diffusers'
DEFAULTS = {
    "tiny": dict(steps=350, batch_size=8, lr=2e-3, rank=16, alpha=None, targets="attention+ff+conv",
                 text_rank=16, text_lr=2e-3, text_steps=None, class_images=0, min_snr=5.0,
                 save_every=100, preview_every=175),
    "sd": dict(steps=1500, batch_size=4, lr=1e-4, rank=8, alpha=None, targets="attention",
               text_rank=8, text_lr=1e-5, text_steps=None, class_images=0, min_snr=0.0,
               save_every=500, preview_every=500),
}  # fmt: skip


def options():
    parser, method = training_parser(__doc__, DEFAULTS)
    method("--rank", "rank of the change", type=int)
    method("--alpha", "strength: the change is scaled by alpha / rank (default: the rank)", type=float)
    method(
        "--targets", "what is changed in the UNet", choices=("attention", "attention+ff", "attention+ff+conv")
    )
    method("--text-rank", "rank of the change of the text encoder, 0 for none", type=int)
    method("--text-lr", "learning rate of the text encoder", type=float)
    method("--text-steps", "steps after which the text encoder stands still (default: never)", type=int)
    prior.add_options(method)
    return parser


@report_errors
def main(argv=None):
    args = options().parse(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    check_training(args)
    prior.check(args)
    out = run_folder(args, "lora", "lora.safetensors")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, tokenizer=args.tokenizer, prediction=args.prediction)
    sd.text.literal_tokens = args.literal_tokens
    sd.text.add_word(args.token)
    args.resolution = check_resolution(args.resolution, sd)

    # 2. The photos, encoded once, and class pictures drawn by the model as it still is
    photos, dataset, held_out = load_data(args, sd, world.photos)
    class_dataset, seconds = prior.load(args, sd, photos, dataset.prompts)

    # 3. What is trained: a low-rank change beside each layer
    loras = lora.insert(sd, args.rank, args.alpha, args.targets, args.text_rank, args.seed)
    trainable, rates = lora.trainable(loras), {"lora_unet": args.lr}
    if args.text_rank:
        rates |= {"lora_te": args.text_lr}
    else:  # a frozen encoder's output never changes
        sd.text.cache_prompts([*dataset.prompts, *(class_dataset.prompts if class_dataset else [])])
    print(f"trains {len(loras)} LoRAs of rank {args.rank}, {count(trainable)}")

    # 4. The run
    def save(path):
        lora_file.save_file(path, loras, lora_file.metadata(sd, name=path.stem, **vars(args)))

    how = trainer_options(args, sd, dataset, held_out, class_dataset) | {"lr": rates}
    trainer = Trainer(out, trainable, artefact="lora.safetensors", save=save, **how)
    prior.note(out, class_dataset, seconds)

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, prompts = dataset[batch]  # (B, 4, h, w), [B]: photos of the subject
        if class_dataset:  # and as many pictures of the class behind them, in one forward pass
            class_x0, class_prompts = class_dataset[batch.subset("class")]
            x0, prompts, batch = torch.cat([x0, class_x0]), prompts + class_prompts, batch.subset("", "class")
        noise = batch.normal(x0.shape)  # (B or 2B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B or 2B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        with torch.set_grad_enabled(args.text_steps is None or batch.step < args.text_steps):
            context = sd.text(prompts)  # (B or 2B, 77, D)
        pred = sd.unet(x_t, t, context)  # (B or 2B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t)) * min_snr_weight(sd.schedule, t, args.min_snr)
        own, class_loss = loss.chunk(2) if class_dataset else (loss, loss.new_zeros(1))
        trainer.backward(own.mean() + args.prior_weight * class_loss.mean())


if __name__ == "__main__":
    sys.exit(main())
