"""What every cell is asked to draw, and the texts that its pictures are scored with."""

from hanokdiff.models.pipeline import StableDiffusion
from hanokdiff.models.tokens import word_pattern
from hanokdiff.scoring.clip import SCALES, Clip

KINDS = "a hanok, a Korean traditional house|a Japanese house|a Chinese pavilion|a western house"
CONDITIONS = "a building on fire|a building beside a campfire|a building"
EXTRA = 16  # pictures at most of the questions beside the prompts, which are no part of the result,
LEAST_EXTRA = 8  # and of few pictures a prompt half as many, but these
DEVELOPMENT = {
    "{token} in the snow": "snow",
    "smoke rising from {token}": "smoke",
    "{token} at night": "night",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVXY"  # names of the prompts


def choices(given: str | None, usual: str, tiny: dict | None) -> dict[str, str]:
    """Label -> text: those given, else the tiny world's, else the usual ones."""
    if given is None and tiny:
        return tiny
    labels = [c.strip() for c in (usual if given is None else given).split("|")]
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise ValueError(
            f'"{given}" must name 2 different things or more, the wanted one first: "a hanok|a barn"'
        )
    return {label: label for label in labels}


def questions(args, sd: StableDiffusion, clip: Clip, conditions: dict[str, str]) -> list[dict]:
    """The prompts of every cell, and the texts that its pictures are scored with. Besides those given: the
    pseudo word alone; where the tokenizer fuses the word with what follows, the prompt as other tools would
    read it; and where several points of a training are drawn, development prompts to choose among them."""
    found, wanted = [], next(iter(conditions))
    extra = min(args.n, EXTRA, max(LEAST_EXTRA, args.n // 2))
    for place, (name, prompt) in enumerate([*zip(LETTERS, args.prompts), ("word", args.token)]):
        subject = word_pattern(args.token).sub(lambda _: args.subject, prompt)
        check_length(clip, subject)
        question = {
            "key": name,
            "prompt": prompt,
            "literal_tokens": False,
            "development": False,
            "wanted": wanted,
            "noise": 10_000 * place,
            "n": args.n if name != "word" else extra,
            "texts": {"literal": prompt, "words": subject, "context": args.context},
            "tokens": tokens(sd, prompt, literal=False),
        }
        found.append(question)
        fused = tokens(sd, prompt, literal=True)
        if name != "word" and fused != question["tokens"]:
            changed = {"key": f"{name} literal", "literal_tokens": True, "n": extra}
            found.append({**question, **changed, "tokens": fused})
    if len(args.at) * len(args.strengths) > 1 and set(DEVELOPMENT.values()) <= conditions.keys():
        for place, (text, condition) in enumerate(DEVELOPMENT.items()):
            prompt = text.replace("{token}", args.token)
            subject = word_pattern(args.token).sub(lambda _: args.subject, prompt)
            own = {"key": f"development {place + 1}", "prompt": prompt, "noise": 500_000 + 10_000 * place}
            own |= {"n": extra, "texts": {"literal": prompt, "words": subject, "context": condition}}
            own |= {"tokens": tokens(sd, prompt, literal=False), "wanted": condition, "development": True}
            found.append({**question, **own})
    return found


def tokens(sd: StableDiffusion, prompt: str, literal: bool) -> list[str]:
    sd.text.literal_tokens = literal
    ids = sd.text.ids(prompt)
    sd.text.literal_tokens = False
    end = ids.index(sd.text.tokenizer.eos_token_id)
    return [sd.text.tokenizer.decode([i]).strip() for i in ids[1:end]]


def check_length(clip: Clip, text: str) -> None:
    """A CLIP that reads only the beginning of a text would score something else."""
    longest = max((s.prefix + text for s in SCALES.values()), key=len)
    used = len(clip.tokenizer(longest, verbose=False).input_ids)
    if used > clip.length:
        raise ValueError(
            f'"{longest}" is {used} tokens long, but the CLIP {clip.name} reads {clip.length}; shorten '
            "--prompts or --subject, or name another --clip"
        )
