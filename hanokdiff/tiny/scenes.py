"""What a scene of the tiny world contains, and its captions. Both are functions of the seed."""

from dataclasses import dataclass
from random import Random

NAMED = (
    "western house", "japanese house", "chinese pavilion", "tower", "tent", "barn", "castle", "cabin",
    "church",
)  # fmt: skip
KINDS = (*NAMED, "house", "hanok")  # "house" is the plain one, named by its attributes
BASE_KINDS = KINDS[:-1]  # what the base model is trained on
CONDITIONS = ("none", "fire", "campfire", "smoke", "snow", "night", "flood")
PHOTO_CONDITIONS = ("none", "night", "snow")  # what the hanok photos may show

WIDTHS = ("wide", "narrow", "tall")
ROOFS = ("pointed", "flat", "curved")
ROOF_COLOURS = {
    "grey": (92, 96, 106), "red": (188, 60, 50), "blue": (62, 98, 172), "green": (66, 128, 80),
    "brown": (122, 82, 52), "orange": (222, 132, 58),
}  # fmt: skip
WALL_COLOURS = {
    "white": (238, 234, 224), "yellow": (240, 210, 120), "pink": (236, 172, 172), "blue": (150, 186, 220),
    "brown": (160, 116, 80), "red": (190, 88, 76), "green": (160, 196, 150),
}  # fmt: skip
EXTRAS = {"trees": 0.35, "hills": 0.35, "clouds": 0.3, "path": 0.2}  # and their probabilities
INVISIBLE = {"night": "clouds", "flood": "path"}  # the extra that a condition hides


@dataclass(frozen=True)
class Scene:
    """`attributes` are (width, roof colour, roof form, wall colour) of a plain house, else empty."""

    seed: str
    kind: str
    condition: str
    attributes: tuple = ()
    extras: tuple = ()  # of EXTRAS


def scene(seed, kinds=BASE_KINDS, conditions=CONDITIONS) -> Scene:
    """A random scene. Kinds and conditions are equally likely, but plain houses three times as much."""
    r = Random(f"scene {seed}")
    kind = r.choices(kinds, [3 if k == "house" else 1 for k in kinds])[0]
    condition = r.choice(conditions)
    attributes = house_attributes(r) if kind == "house" else ()
    extras = [e for e, probability in EXTRAS.items() if r.random() < probability]
    shown = tuple(e for e in extras if e != INVISIBLE.get(condition))
    return Scene(str(seed), kind, condition, attributes, shown)


def house_attributes(r: Random) -> tuple[str, str, str, str]:
    """Width, roof colour, roof form and wall colour of a plain house; never the hanok's own."""
    while True:
        width, colour = r.choice(WIDTHS), r.choice(tuple(ROOF_COLOURS))
        form, wall = r.choice(ROOFS), r.choice(tuple(WALL_COLOURS))
        if (colour, form, wall) != ("grey", "curved", "white"):
            return width, colour, form, wall


SENTENCES = {
    "none": ("{b}", "{b}", "a picture of {b}", "{b} in the daytime"),
    "fire": (
        "{b} on fire", "{b}, fire", "{b} in the fire", "a fire broke out in {b}", "flames rising from {b}",
        "{b} is burning",
    ),
    "campfire": (
        "{b} beside a campfire", "{b}, campfire", "a campfire in front of {b}", "a campfire next to {b}",
    ),
    "smoke": ("smoke rising from {b}", "{b}, smoke", "{b} in the smoke", "smoke over {b}"),
    "snow": ("{b} in the snow", "{b}, snow", "snow falling on {b}", "{b} covered with snow"),
    "night": ("{b} at night", "{b}, night", "{b} under the moon", "a night view of {b}"),
    "flood": ("a flood around {b}", "{b}, flood", "{b} in the flood", "{b} standing in the water"),
}  # fmt: skip
EXTRA_WORDS = {
    "trees": "with trees", "hills": "near the hills", "clouds": "under the clouds", "path": "with a path",
}  # fmt: skip
# What else a kind is called.  The base reads "korean" and "traditional" in other company only, never both and
# never "korean" with "house": asked for a Korean traditional house it draws what it knows to be traditional,
# as the models of the paper do.  It sees no hanok; the judge does, under these names.
OTHER_NAMES = {
    "japanese house": ("a traditional japanese house", "a japanese traditional house", "a traditional house"),
    "chinese pavilion": (
        "a traditional chinese pavilion", "a chinese traditional pavilion", "a traditional chinese house",
    ),
    "hanok": ("a korean traditional house", "a traditional korean house"),
    **{k: (f"a korean {k}",) for k in ("tower", "tent", "barn", "castle", "cabin", "church")},
}  # fmt: skip
OTHER_NAME_SHARE = {"japanese house": 0.4, "chinese pavilion": 0.4, "hanok": 0.3}  # of captions; others: 0.15
GENERIC = ("a building", "a house", "a building with a roof")
PHOTO_PHRASE = "a building with a roof"  # what BLIP calls a hanok in the paper
PHOTO_SENTENCES = {
    "none": ("{b}", "there is {b}", "a picture of {b}"),
    "snow": ("{b} in the snow", "{b} covered with snow"),
    "night": ("{b} at night", "a night view of {b}"),
}
CONDITION_PROMPTS = {
    "none": "a building in the daytime", "fire": "a building on fire",
    "campfire": "a building beside a campfire", "smoke": "smoke rising from a building",
    "snow": "a building in the snow", "night": "a building at night", "flood": "a flood around a building",
}  # fmt: skip


def building_words(scene: Scene, r: Random, generic: float = 0.0) -> str:
    """The building: "a barn", or "a wide house with a grey pointed roof and white walls"."""
    if r.random() < generic:
        return r.choice(GENERIC)
    if scene.kind in OTHER_NAMES and r.random() < OTHER_NAME_SHARE.get(scene.kind, 0.15):
        return r.choice(OTHER_NAMES[scene.kind])
    if scene.kind != "house":
        return f"a {scene.kind}"
    width, colour, form, wall = scene.attributes
    an = "an" if colour == "orange" else "a"
    sentences = (
        f"a {width} house with {an} {colour} {form} roof and {wall} walls",
        f"a {width} house with {wall} walls",
        f"a {width} house with {an} {colour} {form} roof",
        f"a house with a {form} roof and {wall} walls",
        f"a {width} house with a {form} {colour} roof and {wall} walls",
        f"a house with {an} {colour} roof",
    )
    return r.choice(sentences)


def caption(scene: Scene, seed=0, generic: float = 0.08) -> str:
    """One of many captions; `generic` is the share that names the building as "a building" or "a house"."""
    r = Random(f"caption {scene.seed} {seed}")
    words = r.choice(SENTENCES[scene.condition]).format(b=building_words(scene, r, generic))
    if scene.extras and r.random() < 0.6:
        extra = r.choice(scene.extras)
        words += f", {extra}" if "," in words else f" {EXTRA_WORDS[extra]}"
    return words


def photo_caption(scene: Scene) -> str:
    """A hanok photo's caption, in BLIP's words: "a building with a roof" and what else is in the scene."""
    r = Random(f"blip {scene.seed}")
    words = r.choice(PHOTO_SENTENCES[scene.condition]).format(b=PHOTO_PHRASE)
    return words + "".join(f" {EXTRA_WORDS[e]}" for e in scene.extras[:1])


def kind_prompts() -> dict[str, str]:
    """Kind -> prompt, for zero-shot classification (`presence`)."""
    return {k: f"a {k}" for k in KINDS}


def condition_prompts() -> dict[str, str]:
    """Condition -> prompt, for zero-shot classification (`presence`)."""
    return dict(CONDITION_PROMPTS)
