"""What is compared: recipes, a method each with all its options, and the questions that are put to them.

A recipe is not a method: LoRA with class pictures and a word that learns is another thing than LoRA without.
"""

import shlex
from dataclasses import dataclass
from itertools import combinations

RECIPES = {  # name -> method and options of its train_METHOD.py; what is not said is the script's default
    # each method's best, as docs/LOG.md sections 16, 18 and 29 chose it: the scripts' own defaults
    "LoRA": "lora",
    "DreamBooth": "dreambooth",
    "Hypernetwork": "hypernet",
    "Textual Inversion": "ti",
    # as the paper of 2023 describes them; where it says nothing, as that year's tools had it
    "LoRA 2023": "lora --targets cross-attention --text-rank 0 --vectors 0 --class-images 0",
    "DreamBooth 2023": "dreambooth --freeze-text --class-prompts none",
    "Hypernetwork 2023": "hypernet --widths context --dropout 0.3 --vectors 0 --class-images 0",
    "Textual Inversion 2023": "ti --vectors 1 --init building",
    # one switch at a time: text encoder, class pictures (of neutral prompts, or of tailored ones), the word
    "LoRA u": "lora --text-rank 0 --vectors 0 --class-images 0",
    "LoRA u+neutral": "lora --text-rank 0 --vectors 0 --class-prompts none",
    "LoRA u+class": "lora --text-rank 0 --vectors 0",
    "LoRA u+word": "lora --text-rank 0 --class-images 0",
    "LoRA u+word+class": "lora --text-rank 0",
    "LoRA u+text": "lora --vectors 0 --class-images 0",
    "LoRA u+text+neutral": "lora --vectors 0 --class-prompts none",
    "LoRA u+text+class": "lora --vectors 0",
    "LoRA u+text+word": "lora --class-images 0",
    "Hypernetwork plain": "hypernet --vectors 0 --class-images 0",
    "Hypernetwork +class": "hypernet --vectors 0",
    "Hypernetwork +word": "hypernet --class-images 0",
    "DreamBooth, no class": "dreambooth --class-images 0",
    "DreamBooth, neutral": "dreambooth --class-prompts none",
    "DreamBooth, frozen text": "dreambooth --freeze-text",
    "Custom Diffusion": "dreambooth --train cross-attention",
    "SVDiff": "dreambooth --train singular-values",
}
BEST = ("LoRA", "DreamBooth", "Hypernetwork", "Textual Inversion")
PRESETS = {  # name -> its recipes, and whether they are trained at every number of photos or the middle one
    "best": (BEST, True),
    "paper": (tuple(f"{name} 2023" for name in BEST), True),
    "switches": (("LoRA u", "LoRA u+text", "LoRA u+class", "DreamBooth, no class"), False),
    "factorial": (tuple(n for n in RECIPES if not n.endswith("2023")), False),
    "frontier": (("LoRA", "LoRA u", "Hypernetwork", "Hypernetwork plain"), False),
}
SWITCHES = {  # question -> pairs (without, with) of recipes that differ in nothing else; not all there are
    "text encoder": [("LoRA u", "LoRA u+text"), ("LoRA u+word", "LoRA u+text+word")],
    "class pictures, the word cannot learn": [
        ("LoRA u", "LoRA u+class"), ("LoRA u+text", "LoRA u+text+class"),
        ("Hypernetwork plain", "Hypernetwork +class"),
    ],
    "class pictures, the word learns": [
        ("LoRA u+word", "LoRA u+word+class"), ("LoRA u+text+word", "LoRA"),
        ("Hypernetwork +word", "Hypernetwork"), ("DreamBooth, no class", "DreamBooth"),
    ],
    "the word's own vectors": [
        ("LoRA u", "LoRA u+word"), ("LoRA u+class", "LoRA u+word+class"), ("LoRA u+text", "LoRA u+text+word"),
        ("Hypernetwork plain", "Hypernetwork +word"), ("Hypernetwork +class", "Hypernetwork"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Contrast:
    """One test: the mean over `a` against the mean over `b`, each of (recipe, photos), set by set."""

    question: str
    a: tuple[tuple[str, int], ...]
    b: tuple[tuple[str, int], ...]


def parse(texts: list[str], methods) -> dict[str, str]:
    """--recipe NAME="METHOD OPTIONS", or the NAME of one of RECIPES -> {name: "METHOD OPTIONS"}."""
    out = {}
    for given in texts:
        name, equals, words = (part.strip() for part in given.partition("="))
        if not equals and name not in RECIPES:
            raise ValueError(
                f'--recipe "{given}" is none of those that are known ({", ".join(RECIPES)}); describe your '
                'own: --recipe "NAME=METHOD OPTIONS", as in "small=lora --rank 4"'
            )
        words = words if equals else RECIPES[name]
        try:
            split = shlex.split(words)
        except ValueError as e:
            raise ValueError(f'--recipe "{given}": {e}') from None
        if not name or not split or split[0] not in methods:
            raise ValueError(
                f'--recipe "{given}" must be NAME=METHOD OPTIONS with the method one of '
                f'{", ".join(methods)}, as in "small=lora --rank 4"'
            )
        if name in out:
            raise ValueError(f'--recipe: "{name}" names two; give each a name of its own')
        out[name] = words
    return out


def chosen(presets: list[str], own: dict[str, str], sizes: list[int]) -> tuple[dict, dict]:
    """The recipes of these presets and one's own: {name: "METHOD OPTIONS"}, {name: numbers of photos}."""
    found, at = {}, {}
    for names, everywhere in (PRESETS[preset] for preset in presets):
        for name in names:
            found[name] = RECIPES[name]
            at[name] = sizes if everywhere or at.get(name) == sizes else [middle(sizes)]
    return found | own, at | dict.fromkeys(own, sizes)


def middle(sizes: list[int]) -> int:
    """The number of photos at which recipes are compared."""
    return 50 if 50 in sizes else sorted(sizes)[len(sizes) // 2]


def families(recipes: dict[str, list[int]], sizes: list[int]) -> dict[str, list[Contrast]]:
    """The tests of a comparison, named before anything is trained; Holm's correction is made within each
    family. recipes: name -> the numbers of photos it is trained on."""
    sizes, at = sorted(sizes), middle(sizes)
    everywhere = [name for name, trained in recipes.items() if set(trained) >= set(sizes)]
    compared = [n for n in BEST if n in recipes] if set(SWITCHES_USE) & set(recipes) else list(recipes)
    pairs = [Contrast(f"{a} against {b}", ((a, at),), ((b, at),)) for a, b in combinations(compared, 2)]
    steps = [
        Contrast(
            f"{more} photos instead of {less}",
            tuple((n, more) for n in everywhere),
            tuple((n, less) for n in everywhere),
        )
        for less, more in zip(sizes, sizes[1:])
    ]
    switches = []
    for question, both in SWITCHES.items():
        there = [pair for pair in both if recipes.keys() >= set(pair)]
        if there:
            sides = (tuple((pair[k], at) for pair in there) for k in (1, 0))
            switches.append(Contrast(question, *sides))
    found = {
        f"recipes at {at} photos": pairs,
        "number of photos": steps * bool(everywhere),
        "switches": switches,
    }
    return {name: tests for name, tests in found.items() if tests}


SWITCHES_USE = {n for pairs in SWITCHES.values() for pair in pairs for n in pair} - set(BEST)
