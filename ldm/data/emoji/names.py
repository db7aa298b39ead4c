"""The short names of Unicode's CLDR become noun phrases with articles: `person: red hair` → `a person with red hair`.

Rules, and short lists of words for what no rule can know: which nouns have no plural, and what names a sign.
"""

import re
from collections.abc import Callable

TONES = {"1f3fb": "light", "1f3fc": "medium-light", "1f3fd": "medium", "1f3fe": "medium-dark", "1f3ff": "dark"}
"""Skin tones by code point."""

PEOPLE = ("person", "people", "man", "men", "woman", "women", "jockey", "hand", "ear")
GENDERS = {"man": "male", "woman": "female"}
MANY = {"men": "two men", "women": "two women", "people": "two people"}
COLOUR_WORDS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "pink", "grey", "light blue")

# Nouns for stuff, and others that have no article.
UNCOUNTED = frozenset({
    "bread", "butter", "salt", "rice", "sushi", "sake", "beans", "luggage", "fire", "fog", "coral", "wood", "ice",
    "soap", "candy", "lungs", "eyes", "goggles", "headphone", "blood", "confetti", "bacon", "garlic", "ginger",
    "falafel", "spaghetti", "tea", "cream", "honey", "cheese", "meat", "food", "tofu", "corn", "popcorn", "rain",
    "snow", "fireworks", "biceps", "sweat", "water", "smoke", "dust", "money", "polish", "root", "greens", "curry",
    "tempura", "broccoli", "custard", "hair", "fingers", "fear", "sand", "lightning",
})  # fmt: skip
# Ends like a plural and is none, or the other way round.
ONE = ("us", "ss", "ros", "tennis", "canvas", "gas", "lens", "tanabata")
MANY_WORDS = frozenset({"dice", "teeth", "feet", "geese", "mice", "skis"})
PROPER = ("Mount Fuji", "Mrs. Claus", "Mx Claus", "Santa Claus", "Tokyo Tower")
ZODIAC = frozenset({
    "Aries", "Taurus", "Gemini", "Cancer", "Leo", "Virgo", "Libra", "Scorpio", "Sagittarius", "Capricorn",
    "Aquarius", "Pisces", "Ophiuchus",
})  # fmt: skip
# In the group of symbols: what the picture shows is a sign that says this.
SIGNS = re.compile(
    r"^(no |non-|children crossing|baggage|customs|currency|passport|potable|place of worship|water closet|"
    r"(men|women)’s room|left luggage|biohazard|radioactive|litter|minus|plus|multiply)"
)
SYMBOLS = frozenset({"infinity", "om", "khanda", "wireless", "cinema", "vibration mode", "hot springs"})
CAPITALS = {
    "american": "American", "hindu": "Hindu", "latin": "Latin", "orthodox": "Orthodox", "dna": "DNA", "dvd": "DVD",
    "vulcan": "Vulcan", "star of David": "Star of David", "christian": "Christian", "mount fuji": "Mount Fuji",
    "Tokyo tower": "Tokyo Tower",
}  # fmt: skip
# Other words for the same thing: what is drawn, rather than what it is called.
SAID = {
    "automobile": "car", "oncoming automobile": "oncoming car", "collision": "explosion", "thread": "spool of thread",
    "high voltage": "lightning bolt", "dashing away": "puff of air", "locked": "locked padlock",
    "unlocked": "unlocked padlock", "sake": "sake bottle and cup", "salt": "salt shaker",
    "cooking": "egg in a frying pan", "performing arts": "comedy and tragedy masks", "pick": "pickaxe",
    "articulated lorry": "semi truck", "beverage box": "juice box", "construction": "construction barrier",
    "e-mail": "e-mail envelope", "bowling": "bowling ball and pins", "ice hockey": "ice hockey stick and puck",
    "kiss": "couple kissing", "lacrosse": "lacrosse stick and ball", "cricket game": "cricket bat and ball",
    "star-struck": "star-struck face", "badminton": "badminton racket and shuttlecock", "hourglass done": "hourglass",
    "kaaba": "the Kaaba", "milky way": "the Milky Way", "raised back of hand": "the raised back of a hand",
    "palm down hand": "hand with the palm down", "palm up hand": "hand with the palm up",
    "leftwards hand": "hand reaching to the left", "rightwards hand": "hand reaching to the right",
    "leftwards pushing hand": "hand pushing to the left", "rightwards pushing hand": "hand pushing to the right",
    "breast-feeding": "woman breast-feeding a baby", "horse racing": "jockey racing on a horse", "yarn": "ball of yarn",
    "OK hand": "OK hand sign", "victory hand": "victory hand sign", "call me hand": "call me hand sign",
    "wedding": "wedding chapel", "station": "train station", "mate": "mate drink", "joker": "joker card",
    "hot beverage": "cup of hot coffee", "lady beetle": "ladybug", "gem stone": "gemstone", "headphone": "headphones",
    "roll of paper": "roll of toilet paper", "video game": "video game controller", "link": "chain link",
    "pouring liquid": "cup pouring liquid", "dizzy": "dizzy star", "foggy": "foggy city scene",
    "field hockey": "field hockey stick and ball",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "globe showing Americas": "globe showing the Americas", "leafy green": "leafy greens", "flag in hole": "golf flag",
    "airplane arrival": "airplane landing", "airplane departure": "airplane taking off",
    "hourglass not done": "hourglass with flowing sand", "chart increasing": "increasing chart",
    "chart decreasing": "decreasing chart", "camping": "camping tent in the woods", "baguette bread": "baguette",
    "black nib": "black pen nib", "building construction": "building under construction",
    "check box with check": "check box with a check mark", "fondue": "fondue pot",
    "heart exclamation": "heart exclamation mark", "locked with pen": "padlock with a pen",
    "locked with key": "padlock with a key", "tennis": "tennis ball", "sport utility vehicle": "SUV",
    "metro": "metro train", "light rail": "light rail train", "ping pong": "ping pong paddle and ball",
    "vulcan salute": "Vulcan salute hand", "love-you gesture": "love-you hand gesture",
    "sign of the horns": "sign of the horns hand gesture", "Statue of Liberty": "the Statue of Liberty",
    "palms up together": "the palms of two hands", "hundred points": "100 points symbol",
    "flower playing cards": "flower playing card", "globe showing Europe-Africa": "globe showing Europe and Africa",
    "globe showing Asia-Australia": "globe showing Asia and Australia",
    "woman and man holding hands": "woman and a man holding hands", "skull and crossbones": "the skull and crossbones",
    "face with hand over mouth": "face with a hand over its mouth",
    "face with symbols on mouth": "face with symbols on its mouth",
    "face with open eyes and hand over mouth": "face with its eyes open and a hand over its mouth",
    "fish cake with swirl": "fish cake with a swirl", "divide": "division sign", "warning": "warning sign",
    "prohibited": "prohibited sign", "restroom": "restroom sign",
}  # fmt: skip


def phrase(name: str, group: str, tone: str | None = None, coloured: bool = True) -> str:
    """The noun phrase for a CLDR name of this group of emoji, with its skin tone, without colours if not `coloured`.

    Colours stay where they are the point: of cats, flags and canes that are black or white.
    """
    name = name.replace("’", "'") if "o’clock" in name else name
    for rule in RULES:
        name = rule(name, group)
    name = name.replace("’", "'")
    if not coloured:
        name = re.sub(rf"\b({'|'.join(COLOUR_WORDS)}) (?!hair)", "", name)
    made = name if name.startswith(("the ", "two ", *PROPER)) else with_article(name)
    return made if tone is None else toned(made, tone)


def with_article(noun: str) -> str:
    """A noun phrase with `a` or `an`, or without either where it names several things or stuff."""
    if is_plural(noun):
        return noun
    vowel = re.match(r"(?i)(?!uni|eu|ewe|one\b|ut|us[ae])[aeiou]|hour|herb|SUV", noun)
    return f"{'an' if vowel else 'a'} {noun}"


def is_plural(noun: str) -> bool:
    """Whether a noun phrase takes no article: its head, before what it is with or in, is a plural or stuff."""
    head = re.split(r" (?:with|in|on|of|behind|without|over|at|for|[\w-]{3,}ing) ", noun)[0].split()[-1].lower()
    plural = head.endswith("s") and not head.endswith(ONE)
    return plural or head in UNCOUNTED or head in MANY_WORDS


def toned(made: str, tone: str) -> str:
    """The phrase with the skin tone behind the person, or at its end."""
    skin = f"with {tone} skin"
    found = re.match(rf"((?:an?|two) (?:\w+ )?(?:{'|'.join(PEOPLE)})) ((?:with|in|mountain|[\w-]+ing)\b.*)$", made)
    if found is None:
        return f"{made} {skin}"
    who, rest = found.groups()
    return f"{who} {skin} {rest.replace('with ', 'and ', 1) if rest.startswith('with ') else rest}"


# Rules, each from a name to a name ------------------------------------------------------------------------------


def _said(name: str, group: str) -> str:
    said = SAID.get(name, name)
    return re.sub(
        r"^speaker (\w+) volume$", r"speaker at \1 volume", said.replace("index pointing", "index finger pointing", 1)
    )


def _clock(name: str, group: str) -> str:
    return f"clock showing {name}" if re.fullmatch(r"[a-z]+(-thirty| o'clock)", name) else name


def _sign(name: str, group: str) -> str:
    if name in ZODIAC:
        return f"{name} zodiac sign"
    if group == "symbols" and SIGNS.match(name) and not name.endswith(("sign", "symbol")):
        return f"{name.replace('multiply', 'multiplication')} sign"
    return f"{name} symbol" if name in SYMBOLS or name.endswith(" suit") else name


def _of_a_person(name: str, group: str) -> str:
    """`person: beard`, `man artist`, `men wrestling`, `couple with heart: man, man`."""
    name = re.sub(r"(walking|running): facing right", r"\1 to the right", name).replace(": facing", " facing")
    if found := re.fullmatch(r"(couple with heart|kiss): (\w+), (\w+)", name):
        what, one, other = found.groups()
        who = MANY[f"{one[:-2]}en"] if one == other and one != "person" else f"{one} and a {other}"
        return f"{who} {'kissing' if what == 'kiss' else 'with a heart'}"
    if found := re.fullmatch(r"(person|man|woman): (.+)", name):
        who, what = found.groups()
        return f"bald {who}" if what == "bald" else f"{who} with {'a ' if what == 'beard' else ''}{what}"
    if found := re.fullmatch(r"(men|women|people) (.+)", name):
        return f"{MANY[found[1]]} {found[2]}"
    if found := re.fullmatch(r"(man|woman) (\w+( \w+)*)", name):
        who, what = found[1], found[2]
        acts = re.match(r"([\w-]+ing|mountain biking|in|with|and)\b", what)
        return name if acts else f"{GENDERS[who]} {what}"
    return name


def _inner_article(name: str, group: str) -> str:
    """An article for what something is with, in or on: `beach with umbrella` → `beach with an umbrella`."""
    said = re.compile(
        r"\b(with|in|on|behind|without|holding|wearing|raising|rowing|bouncing|tipping|feeding|getting|taking) "
        r"(?!an? |the |one |two |its |off$)(.+)$"
    )
    found = said.search(name)
    if found is None or name.startswith("two "):
        return name
    thing = found[2]
    if group == "smileys & emotion" and thing == "tongue":
        thing = "its tongue out"
    elif thing in ("lotus position", "ground", "wind"):
        thing = f"the {thing}"
    elif thing not in ("silhouette", "space", "bed") and "fingers splayed" not in thing:
        thing = with_article(thing)
    return f"{name[: found.start(2)]}{thing}"


def _shape(name: str, group: str) -> str:
    name = re.sub(r"^(large )?(\w+) large square$", r"\2 square", name)
    name = re.sub(r"^large (\w+ (circle|diamond|square))$", r"\1", name)
    return re.sub(r" pointed (up|down)$", r" pointing \1", name.replace("backhand index finger", "hand"))


def _capital(name: str, group: str) -> str:
    for plain, written in CAPITALS.items():
        name = re.sub(rf"\b{plain}\b", written, name)
    return name


RULES: tuple[Callable[[str, str], str], ...] = (_said, _clock, _sign, _of_a_person, _shape, _inner_article, _capital)
