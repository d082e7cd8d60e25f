"""Words of captions and of box labels: what one thing of a label is called, and which words of a text may mean it.

Two kinds of synonyms are told apart. A word that means **the same** ("sofa" for ``couch``) links a text to a box. A
word that is only **near** ("desk" for ``dining table``) links nothing, but a picture whose text has it is never said
to be without the label.

Labels of COCO have entries of their own, since their names are terms of an annotation manual more than words ("dining
table" is any table, "sports ball" any ball). Any other label is taken at its word: ``large red circle`` is a circle,
large and red.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from filters.instruct.vocabulary import plural as regular_plural
from filters.instruct.vocabulary import vocabulary
from filters.instruct.words import words_of

NUMBERS: Mapping[str, int] = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12,
}  # fmt: skip
NUMBER_WORDS: Mapping[int, str] = {number: word for word, number in NUMBERS.items()}

COLOURS: frozenset[str] = words_of(
    """red orange yellow green blue purple violet pink brown black white gray grey beige tan golden silver teal
    turquoise maroon"""
)
SIZES: frozenset[str] = words_of("small large big little tiny huge")
MATERIALS: Mapping[str, str] = {
    "wooden": "wood", "wood": "wood", "stone": "stone", "metal": "metal", "brick": "brick", "leather": "leather",
    "plastic": "plastic", "concrete": "concrete", "marble": "marble", "steel": "steel",
}  # fmt: skip
"""Adjectives of a material, and its name."""

# What may follow a noun that is the head of its phrase; any other word makes it a part of a compound.
CLOSED: frozenset[str] = words_of(
    """a an the this that these those some any each every another other others all both no its his her their and or but
    while as with without of in on at by to from into onto over under above below beneath beside besides behind
    between among near next inside outside around along across through against during after before off up down out
    atop towards toward past upon for about is are was were be being been has have had does do can could will would
    may which who whose where when there here it he she they them him together alone not also just very being while
    plus front amidst amid beyond underneath alongside"""
)
VERBS: frozenset[str] = words_of(
    """sits stands lies lays walks rides runs holds eats drinks plays jumps flies drives looks watches hangs rests
    wears works carries pulls passes grazes graze swims sleeps smiles poses leans travels moves catches throws
    swings hits performs does sit stand lie lay walk ride run hold eat drink play jump fly look watch hang rest wear
    pose show shows seen parked covered filled topped surrounded decorated stacked lined mounted placed located made
    dressed perched gathered attached displayed arranged posed left set open closed"""
)
"""Verbs that captions put after a noun; with ``-ing`` forms, the others that do not make a compound of it."""
PARTICIPLES: frozenset[str] = words_of(
    """sitting standing lying laying walking riding running holding eating drinking playing jumping flying driving
    looking watching hanging resting wearing working carrying pulling grazing swimming sleeping smiling posing
    leaning travelling traveling moving catching throwing swinging hitting performing skiing surfing skateboarding
    snowboarding cooking preparing talking using reading waiting staring floating climbing crossing chewing kneeling
    crouching sticking traversing skating drying brushing cutting serving pitching batting feeding petting picking
    pushing reaching receiving showing taking giving trying getting making turning perching sniffing licking biting
    roaming wandering relaxing peering facing gathering enjoying"""
)
POSTURES: Mapping[str, str] = {
    "sitting": "sit", "sits": "sit", "seated": "sit", "sit": "sit", "standing": "stand", "stands": "stand",
    "stand": "stand", "laying": "lie", "lying": "lie", "lays": "lie", "lies": "lie", "walking": "walk",
    "walks": "walk", "leaning": "lean", "leans": "lean", "running": "run", "runs": "run", "jumping": "jump",
    "jumps": "jump", "riding": "ride", "rides": "ride", "flying": "fly", "flies": "fly", "sleeping": "sleep",
    "sleeps": "sleep",
}  # fmt: skip
"""Words that say how a body is held: texts that differ in them contradict each other."""
PLACES: frozenset[str] = words_of(
    """on in at next near beside under above by behind inside between against along outside around atop over underneath
    beneath alongside among"""
)
"""Prepositions that say where something is."""

VAGUE: frozenset[str] = words_of(
    """some several many few various multiple numerous different lots most more dozens hundreds"""
)
"""Quantifiers that say more than one."""
GROUPS: frozenset[str] = words_of(
    """group couple number bunch herd flock pair row crowd lot pile stack fleet line collection set assortment variety
    family team handful series"""
)
"""Nouns before "of" that say more than one of what follows."""


@dataclass(frozen=True, slots=True)
class Noun:
    """What things of a label are called."""

    one: str
    """With neither article nor adjective: ``dog``, ``TV``."""
    many: str
    verb: str = "is"
    """``are`` for what has no singular: ``skis``."""
    counts: bool = True
    """Whether one box is one of it: a box of skis may be one or two."""
    live: bool = False
    """Whether it does things: a person or an animal."""

    def a(self) -> str:
        """With its indefinite article; a pair of what has no singular."""
        if self.verb == "are":
            return f"a pair of {self.one}"
        if self.one in MASS:
            return f"some {self.one}"
        return f"{article(self.one)} {self.one}"


PAIRS = frozenset({"skis", "scissors", "glasses", "sunglasses", "jeans", "pants", "shorts", "goggles", "headphones"})
MASS = words_of(
    """broccoli luggage furniture food water snow sand grass hair clothing ice bread cheese meat rice coffee tea wine
    beer juice milk soup baggage wildlife traffic foliage equipment paper lettuce bacon butter paperwork"""
)

_AN = ("a", "e", "i", "o", "u")
_A_DESPITE = ("one", "uni", "use", "eu", "ufo")
_AN_DESPITE = ("hour", "honest", "heir", "x-ray", "lcd", "mri", "led")


def article(words: str) -> str:
    """``a`` or ``an``, as the first of the words sounds."""
    low = words.lower()
    if low.startswith(_AN_DESPITE):
        return "an"
    return "an" if low.startswith(_AN) and not low.startswith(_A_DESPITE) else "a"


_IRREGULAR: Mapping[str, str] = {
    "tv": "TVs", "knife": "knives", "mouse": "mice", "sheep": "sheep", "fish": "fish", "deer": "deer",
    "moose": "moose", "bison": "bison", "ox": "oxen", "leaf": "leaves", "loaf": "loaves", "shelf": "shelves",
    "calf": "calves", "wolf": "wolves", "scarf": "scarves", "half": "halves", "aircraft": "aircraft", "bus": "buses",
    "cactus": "cacti", "lens": "lenses", "woods": "woods", "people": "people", "cattle": "cattle", "photo": "photos",
    "piano": "pianos", "kangaroo": "kangaroos", "die": "dice",
}  # fmt: skip


@lru_cache(maxsize=4096)
def plural(words: str) -> str:
    """Of a noun or of a phrase that ends in one."""
    if words in PAIRS or words in MASS:
        return words
    head = words.rsplit(" ", 1)[-1]
    irregular = _IRREGULAR.get(head.lower())
    return words[: len(words) - len(head)] + irregular if irregular else regular_plural(words)


ANIMALS = words_of("bird cat dog horse sheep cow elephant bear zebra giraffe")
VEHICLES = words_of("bicycle car motorcycle airplane bus train truck boat")
FURNITURE = frozenset({"chair", "couch", "bed", "dining table", "bench"})
FRUIT = frozenset({"banana", "apple", "orange"})
CUTLERY = frozenset({"fork", "knife", "spoon"})
CLASSES: tuple[frozenset[str], ...] = (ANIMALS, VEHICLES, FURNITURE, FRUIT, CUTLERY)
"""Labels that one would compare with each other."""
MISTAKEN: tuple[frozenset[str], ...] = (ANIMALS, VEHICLES, FRUIT)
"""Labels that one takes for each other: who says giraffes where all others see zebras is wrong."""

NAMES: Mapping[str, str] = {
    "tv": "TV", "dining table": "table", "sports ball": "ball", "hair drier": "hair dryer", "remote": "remote control",
    "mouse": "computer mouse",
}  # fmt: skip
"""What a COCO label is called where its name is no good word for what it is put on."""

_SAME: Mapping[str, str] = {
    "person": "man woman boy girl child kid lady guy people/ baby toddler player skier surfer snowboarder skateboarder"
    " rider pitcher batter skate/boarder adult male female gentleman passenger worker pedestrian catcher friend",
    "bicycle": "bike",
    "motorcycle": "motorbike motor/bike",
    "airplane": "plane jet aeroplane airliner aircraft/",
    "bus": "", "train": "", "truck": "", "boat": "ship sailboat canoe kayak",
    "car": "automobile van taxi suv sedan",
    "traffic light": "traffic/signal stoplight stop/light",
    "fire hydrant": "hydrant", "stop sign": "", "parking meter": "", "bench": "",
    "bird": "duck goose pigeon seagull parrot owl eagle gull swan parakeet canary",
    "cat": "kitten kitty", "dog": "puppy", "horse": "pony", "sheep": "lamb", "cow": "cattle/ bull calf",
    "elephant": "", "bear": "polar/bear panda panda/bear grizzly/bear", "zebra": "", "giraffe": "",
    "backpack": "", "umbrella": "parasol", "handbag": "purse", "tie": "necktie bow/tie", "suitcase": "",
    "frisbee": "", "skis": "", "snowboard": "",
    "sports ball": "ball tennis/ball soccer/ball basketball football baseball",
    "kite": "", "baseball bat": "bat", "baseball glove": "mitt", "skateboard": "skate/board",
    "surfboard": "surf/board", "tennis racket": "tennis/racquet racket racquet",
    "bottle": "wine/bottle", "wine glass": "wineglass", "cup": "mug coffee/cup tea/cup teacup", "fork": "",
    "knife": "", "spoon": "", "bowl": "", "banana": "", "apple": "", "sandwich": "burger hamburger", "orange": "",
    "broccoli": "", "carrot": "", "hot dog": "hotdog", "pizza": "", "donut": "doughnut", "cake": "birthday/cake",
    "chair": "armchair", "couch": "sofa", "potted plant": "houseplant", "bed": "",
    "dining table": "table", "toilet": "commode", "tv": "television", "laptop": "laptop/computer",
    "mouse": "computer/mouse", "remote": "remote/control",
    "keyboard": "computer/keyboard", "cell phone": "cellphone phone smartphone mobile/phone",
    "microwave": "microwave/oven", "oven": "stove stove/top/oven", "toaster": "", "sink": "bathroom/sink kitchen/sink",
    "refrigerator": "fridge", "book": "", "clock": "", "vase": "", "scissors": "", "teddy bear": "stuffed/bear",
    "hair drier": "hair/dryer hairdryer", "toothbrush": "tooth/brush",
}  # fmt: skip

_NEAR: Mapping[str, str] = {
    "person": "someone somebody hand face crowd couple group family team audience spectator customer he she"
    " they boarder driver student police officer officer model tourist teenager teen human men women"
    " bride groom skater",
    "bicycle": "cycle cyclist vehicle tricycle",
    "motorcycle": "bike biker bicycle scooter moped vehicle cycle",
    "airplane": "wing airport",
    "bus": "vehicle trolley coach",
    "train": "metro subway tram trolley locomotive railway engine rail",
    "truck": "vehicle pickup lorry van trailer suv",
    "car": "vehicle traffic bug truck volkswagen vw bus",
    "boat": "vessel carrier ferry yacht raft vehicle sail",
    "traffic light": "light signal street/light",
    "fire hydrant": "",
    "stop sign": "sign street/sign",
    "parking meter": "meter machine",
    "bench": "seat chair",
    "bird": "animal chicken rooster hen",
    "cat": "animal",
    "dog": "animal lab husky poodle terrier pug",
    "horse": "animal",
    "sheep": "animal goat ram",
    "cow": "animal ox buffalo oxen wildebeest moose",
    "elephant": "animal",
    "bear": "animal cub",
    "zebra": "animal",
    "giraffe": "animal",
    "backpack": "bag luggage",
    "umbrella": "canopy tent",
    "handbag": "bag luggage",
    "tie": "suit tuxedo uniform",
    "suitcase": "luggage bag trunk baggage briefcase",
    "frisbee": "disc disk",
    "skis": "ski skier skiing pole snowboard",
    "snowboard": "board snowboarder ski",
    "sports ball": "",
    "kite": "",
    "baseball bat": "batter baseball",
    "baseball glove": "glove catcher baseball",
    "skateboard": "board skateboarder skateboarding",
    "surfboard": "board surfer surfing surf",
    "tennis racket": "tennis",
    "bottle": "wine beer liquor booze container vodka",
    "wine glass": "glass wine drink",
    "cup": "glass coffee tea drink beverage container soda",
    "fork": "utensil silverware cutlery",
    "knife": "utensil silverware cutlery blade",
    "spoon": "utensil silverware cutlery",
    "bowl": "dish container plate",
    "banana": "fruit",
    "apple": "fruit",
    "orange": "fruit tangerine grapefruit citrus",
    "sandwich": "food bread hoagie sub burrito wrap",
    "broccoli": "vegetable food veggie salad green",
    "carrot": "vegetable food veggie salad",
    "hot dog": "food sausage",
    "pizza": "food slice",
    "donut": "food pastry dessert bagel cruller",
    "cake": "food dessert cupcake pastry pie",
    "chair": "seat stool recliner furniture chaise rocker",
    "couch": "seat furniture loveseat futon chaise",
    "potted plant": "plant flower pot tree planter grass bush shrub brush leaf vegetation garden field",
    "bed": "mattress bedroom furniture",
    "dining table": "desk counter furniture",
    "toilet": "bathroom bidet urinal restroom",
    "tv": "screen monitor display",
    "laptop": "computer notebook",
    "mouse": "computer",
    "remote": "controller wii control",
    "keyboard": "computer piano laptop",
    "cell phone": "device telephone",
    "microwave": "oven appliance",
    "oven": "appliance range microwave",
    "toaster": "appliance",
    "sink": "basin faucet",
    "refrigerator": "appliance freezer",
    "book": "magazine novel notebook reading",
    "clock": "watch time",
    "vase": "pot jar bouquet flower",
    "scissors": "shears",
    "teddy bear": "toy bear doll stuffed",
    "hair drier": "dryer drier blow",
    "toothbrush": "brush teeth",
}  # fmt: skip

COCO: frozenset[str] = frozenset(_SAME)
"""Its 80 labels."""
CLOTHES: frozenset[str] = words_of(
    """shirt jacket hat helmet dress coat uniform suit cap sweater scarf t-shirt hoodie vest skirt apron"""
)
OBJECTS: frozenset[str] = words_of(
    """plate bag box basket tray counter desk lamp mirror window door wall floor carpet rug curtain pillow blanket
    towel shelf cabinet fence building house church tower bridge statue sign pole tree bush flower rock fireplace
    computer canister container tent pot candle painting poster gate roof van pond pool circle square triangle
    star cross ring"""
)
ROOMS: frozenset[str] = frozenset({"kitchen", "bathroom", "bedroom", "living room", "office", "classroom"})
OUTDOORS: frozenset[str] = words_of(
    """street beach field park road sidewalk forest woods mountain hill slope ocean lake river sky garden yard pasture
    meadow savannah farm hillside shore skatepark"""
) | {"parking lot"}
UNREAL: frozenset[str] = words_of(
    """toy toys miniature diorama lego cartoon animated cgi drawing painting illustration poster statue sculpture doll
    digital reflection mirror mirrors reflected screen rendering vector render clipart sketch logo"""
)
"""Words of texts about a picture within the picture, or no photograph."""
MALE = words_of("man boy guy gentleman male men boys guys")
FEMALE = words_of("woman girl lady female women girls ladies")


def _words(listed: str) -> list[str]:
    return [word.replace("/", " ").strip() for word in listed.split()]


@dataclass(frozen=True)
class Form:
    """A run of words in a text and what it may mean."""

    words: tuple[str, ...]
    word: str
    """The singular."""
    key: str
    """The label or noun that it means."""
    many: bool
    same: bool
    """Whether it means the same, or is only near."""


@dataclass(frozen=True)
class Lexicon:
    """All forms by their first word, the longest first."""

    forms: Mapping[str, tuple[Form, ...]]
    keys: Mapping[str, str]
    """The key of each singular or plural that means the same."""
    near: Mapping[str, frozenset[str]]
    """Of each word, or two words, singular or plural: the labels that may not be denied where a text has it."""


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """Of COCO's labels, of some nouns that captions often have, and of those that the checks know."""
    forms: dict[str, list[Form]] = {}
    keys: dict[str, str] = {}

    def add(word: str, key: str) -> None:
        many = plural(word)
        for form in dict.fromkeys((word.lower(), many.lower())):
            if form in keys:
                continue
            keys[form] = key
            words = tuple(form.split(" "))
            forms.setdefault(words[0], []).append(
                Form(words, word, key, form == many.lower() and (form != word or word in PAIRS), True)
            )

    for label, listed in _SAME.items():
        add(label, label)
        for word in _words(listed):
            add(word, label)
    for word in sorted(OBJECTS | CLOTHES | ROOMS | OUTDOORS):
        if word not in keys:
            add(word, word)
    book = vocabulary()
    for word, name in book.names.items():
        if name.plural or name.homograph or name.free or word in keys:
            continue
        kinds = frozenset().union(*(book.kinds.get(concept, frozenset()) for concept in name.concepts))
        if "person" in kinds and "person" not in name.concepts and word != "snowman":
            add(word, "person")
        elif "person" not in kinds:
            # an office chair is a chair; a desk may be a dining table, or none
            head = keys.get(word.rsplit(" ", 1)[-1], "")
            known = head in _SAME and word not in _words(_NEAR[head])
            add(word, head if known and not book.of_label(head)[0].isdisjoint(kinds) else word)
    near: dict[str, set[str]] = {}
    for label, listed in _NEAR.items():
        for word in (*_words(_SAME[label]), *_words(listed), label):
            for form in (word.lower(), plural(word).lower()):
                near.setdefault(form, set()).add(label)
    ordered = {first: tuple(sorted(found, key=lambda form: -len(form.words))) for first, found in forms.items()}
    return Lexicon(ordered, keys, {form: frozenset(found) for form, found in near.items()})


@lru_cache(maxsize=4096)
def noun(label: str) -> Noun:
    """What things of a label are called."""
    name = NAMES.get(label, label)
    if name in PAIRS:
        return Noun(name, name, verb="are", counts=False)
    if name in MASS:
        return Noun(name, name, counts=False)
    return Noun(name, plural(name), live=label == "person" or label in ANIMALS)


@lru_cache(maxsize=65536)
def canonical(label: str) -> str:
    """The label or noun of the lexicon that a label means the same as; itself where there is none."""
    return lexicon().keys.get(label.lower(), label)


@lru_cache(maxsize=65536)
def alike(label: str, other: str) -> bool:
    """Whether one would compare things of the two labels: both are animals, vehicles ..., or both are described by size
    or colour."""
    if any(label in kinds and other in kinds for kinds in CLASSES):
        return True
    return not described(label).plain and not described(other).plain


@lru_cache(maxsize=65536)
def includes(label: str, other: str) -> bool:
    """Whether a thing of the other label may be called by the first: a wine glass is a cup."""
    book = vocabulary()
    wide, narrow = book.of_label(label)[0], book.of_label(other)[0]
    return label != other and any(not wide.isdisjoint(book.kinds.get(concept, ())) for concept in narrow)


@lru_cache(maxsize=4096)
def askable(word: str) -> bool:
    """Whether one would ask for a thing that texts name: no part of a body, no shape, no light."""
    book = vocabulary()
    kinds = {kind for concept in book.of_label(word)[0] for kind in book.kinds.get(concept, ())}
    return word in OBJECTS or (bool(kinds) and word not in _TOO_WIDE and kinds.isdisjoint(_NOT_ASKED))


_NOT_ASKED = frozenset({"body part"}) | words_of(
    """person shape logo label deck back line spot base cover sun smoke lightning wave picture sky cloud road street
    water ground room shadow"""
)
_TOO_WIDE = words_of("food meal animal vehicle traffic furniture container tableware clothing equipment building thing")


@dataclass(frozen=True, slots=True)
class Described:
    """A label taken apart: ``large red circle``."""

    size: str | None
    colour: str | None
    head: str

    @property
    def plain(self) -> bool:
        """Whether it has no such adjectives."""
        return self.size is None and self.colour is None


@lru_cache(maxsize=4096)
def described(label: str) -> Described:
    """The adjectives of size and colour before a label's noun."""
    words = label.lower().split()
    size = colour = None
    while len(words) > 1:
        if size is None and words[0] in SIZES:
            size = words.pop(0)
        elif colour is None and words[0] in COLOURS:
            colour = words.pop(0)
        else:
            break
    return Described(size, colour, " ".join(words))
