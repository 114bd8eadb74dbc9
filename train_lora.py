"""LoRA: teach Stable Diffusion a subject by a low-rank change of its attention layers.

    W' = W + (alpha / rank) up down                          Hu et al. 2021, arXiv:2106.09685, equation 3
    L  = || eps - eps_theta(x_t, t, prompt) ||^2             over the photos; only `down` and `up` are trained

    python train_lora.py                                          the embedded hanok, half a minute
    python train_lora.py --model MODEL --data PHOTOS --token sks  your photos on a real checkpoint

Writes runs/lora/lora.safetensors (kohya's format: the WebUI, ComfyUI and diffusers read it), log.jsonl and
previews/.
Then:  python sample.py "*, fire" "* in the fire" --lora runs/lora/lora.safetensors
Read next: hanokdiff/methods/lora.py (the layer), hanokdiff/training/trainer.py (everything around the loop).
"""

import sys

from hanokdiff.errors import report_errors
from hanokdiff.formats import lora_file
from hanokdiff.formats.load import load_model
from hanokdiff.methods import lora
from hanokdiff.methods.losses import min_snr_weight, mse
from hanokdiff.tiny import world
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

DEFAULTS = {  # the tiny UNet attends at one level only, so there the convolutions learn too
    "tiny": dict(steps=350, batch_size=8, lr=2e-3, rank=16, alpha=None, targets="attention+ff+conv",
                 min_snr=5.0, save_every=100, preview_every=175),
    "sd": dict(steps=1500, batch_size=4, lr=1e-4, rank=8, alpha=None, targets="attention", min_snr=0.0,
               save_every=500, preview_every=500),
}  # fmt: skip


def options():
    parser, method = training_parser(__doc__, DEFAULTS)
    method("--rank", "rank of the change", type=int)
    method("--alpha", "strength: the change is scaled by alpha / rank (default: the rank)", type=float)
    method(
        "--targets", "what is changed in the UNet", choices=("attention", "attention+ff", "attention+ff+conv")
    )
    method("--text-rank", "rank of the change of the text encoder, 0 for none", type=int, default=0)
    return parser


@report_errors
def main(argv=None):
    args = options().parse(argv)
    args.alpha = args.rank if args.alpha is None else args.alpha
    check_training(args)
    out = run_folder(args, "lora", "lora.safetensors")

    # 1. The base model, frozen
    sd = load_model(args.model, args.device, args.dtype, tokenizer=args.tokenizer, prediction=args.prediction)
    sd.text.literal_tokens = args.literal_tokens
    sd.text.add_word(args.token)
    args.resolution = check_resolution(args.resolution, sd)

    # 2. What is trained: a low-rank change beside each layer
    loras = lora.insert(sd, args.rank, args.alpha, args.targets, args.text_rank, args.seed)
    trainable = lora.trainable(loras)
    print(f"trains {len(loras)} LoRAs of rank {args.rank}, {count(trainable)}")

    # 3. The photos, encoded once
    _, dataset, held_out = load_data(args, sd, world.photos)
    if not args.text_rank:
        sd.text.cache_prompts(dataset.prompts)  # a frozen encoder's output never changes

    # 4. The run
    def save(path):
        lora_file.save_file(path, loras, lora_file.metadata(sd, name=path.stem, **vars(args)))

    how = trainer_options(args, sd, dataset, held_out)
    trainer = Trainer(out, trainable, artefact="lora.safetensors", save=save, **how)

    # 5. The method
    for batch in trainer:  # one micro-batch; goes on where a resumed run stopped
        x0, prompts = dataset[batch]  # (B, 4, h, w), [B]
        noise = batch.normal(x0.shape)  # (B, 4, h, w)
        t = batch.timesteps(sd.schedule.num_train_timesteps)  # (B,)
        x_t = sd.schedule.add_noise(x0, noise, t)
        pred = sd.unet(x_t, t, sd.text(prompts))  # (B, 4, h, w)
        loss = mse(pred, sd.schedule.target(x0, noise, t))  # (B,)
        trainer.backward(loss * min_snr_weight(sd.schedule, t, args.min_snr))


if __name__ == "__main__":
    sys.exit(main())
