"""Grammar of the synthetic corpus: nine independent choices that can be parsed back from a line.

Four factors set the words or word forms of the whole line (topic, tense, form, number). Adjective,
noun, verb, object and place are chosen given them.
"""

import re
from collections.abc import Sequence
from itertools import product

ALPHABET = "abcdefghijklmnopqrstuvwxyz '.?"
ADJECTIVES = ("", "old", "shy", "wise", "mad", "bold", "calm", "kind", "tiny")

# Topic: nouns (one, many), verbs (base, third person, past), objects, places; six of each.
TOPICS = {
    "sea": (
        "sailor sailors, pirate pirates, diver divers, mermaid mermaids, crab crabs, gull gulls",
        "hide hides hid, find finds found, steal steals stole, sell sells sold, want wants wanted, "
        "guard guards guarded",
        "gold, maps, pearls, rum, shells, rope",
        "at sea, on deck, by boat, in caves, on reefs, at dusk",
    ),
    "farm": (
        "farmer farmers, cow cows, goat goats, hen hens, horse horses, mule mules",
        "eat eats ate, chew chews chewed, smell smells smelled, drop drops dropped, "
        "grow grows grew, taste tastes tasted",
        "corn, hay, beans, apples, wheat, turnips",
        "at dawn, in mud, in barns, on hills, in rain, by carts",
    ),
    "castle": (
        "king kings, queen queens, knight knights, jester jesters, duke dukes, wizard wizards",
        "greet greets greeted, fear fears feared, fight fights fought, tame tames tamed, "
        "ride rides rode, draw draws drew",
        "dragons, giants, trolls, ghosts, ogres, lions",
        "at court, in halls, at war, on steps, by magic, in iron",
    ),
    "kitchen": (
        "cook cooks, baker bakers, waiter waiters, chef chefs, guest guests, butler butlers",
        "bake bakes baked, serve serves served, burn burns burned, slice slices sliced, "
        "fry fries fried, order orders ordered",
        "soup, cakes, pies, bread, onions, pasta",
        "at noon, at home, in pans, on toast, in bowls, by candle",
    ),
    "space": (
        "robot robots, alien aliens, pilot pilots, rover rovers, probe probes, clone clones",
        "scan scans scanned, orbit orbits orbited, reach reaches reached, film films filmed, "
        "visit visits visited, chart charts charted",
        "moons, comets, stars, suns, planets, rockets",
        "in space, by radar, at warp, on foot, on mars, by laser",
    ),
    "forest": (
        "fox foxes, owl owls, bear bears, wolf wolves, elf elves, badger badgers",
        "hunt hunts hunted, chase chases chased, track tracks tracked, hear hears heard, "
        "spot spots spotted, trick tricks tricked",
        "mice, moths, rabbits, frogs, snails, bees",
        "in trees, in fog, by ponds, in snow, on moss, at night",
    ),
    "music": (
        "singer singers, drummer drummers, band bands, cellist cellists, dancer dancers, "
        "poet poets",
        "play plays played, hum hums hummed, write writes wrote, love loves loved, "
        "learn learns learned, copy copies copied",
        "songs, operas, jazz, hymns, tunes, blues",
        "on stage, in bars, on tour, at balls, in tune, by ear",
    ),
    "school": (
        "pupil pupils, tutor tutors, doctor doctors, clerk clerks, expert experts, coder coders",
        "study studies studied, teach teaches taught, test tests tested, prove proves proved, "
        "solve solves solved, doubt doubts doubted",
        "maths, logic, physics, riddles, ciphers, puzzles",
        "in class, in labs, on paper, by heart, at exams, in chalk",
    ),
}
TENSES = ("past", "present", "future")
FORMS = ("statement", "question", "denial")
NUMBERS = ("one", "many")
NEGATIVES = {"did": "didn't", "does": "doesn't", "do": "don't", "will": "won't"}

# Weights of a slot's choices. Each sum is a power of two, so that 28 random bits draw a line with
# exactly these probabilities.
SIX = (4, 4, 3, 2, 2, 1)
WEIGHTS = {
    "topic": (1,) * 8,
    "tense": (2, 1, 1),
    "form": (2, 1, 1),
    "number": (1, 1),
    "adjective": (8,) + (1,) * 8,
    "noun": SIX,
    "verb": SIX,
    "object": SIX,
    "place": SIX,
}
FACTORS = {"topic": tuple(TOPICS), "tense": TENSES, "form": FORMS, "number": NUMBERS}

_WORDS = [
    ([n.split() for n in nouns], [v.split() for v in verbs], objects, places)
    for nouns, verbs, objects, places in (
        [part.split(", ") for part in topic] for topic in TOPICS.values()
    )
]


def _predicate(verb: Sequence[str], tense: int, form: int, number: int) -> tuple[str, str, str]:
    """Verb and factors -> what opens the line, the verb phrase, and the mark that ends the line."""
    base, third, past = verb
    auxiliary = ("did", ("does", "do")[number], "will")[tense]
    if FORMS[form] == "question":
        return f"{auxiliary} ", base, "?"
    if FORMS[form] == "denial":
        return "", f"{NEGATIVES[auxiliary]} {base}", "."
    return "", (past, (third, base)[number], f"will {base}")[tense], "."


def render(choices: Sequence[int]) -> str:
    """Nine choices, in the order of WEIGHTS -> line."""
    topic, tense, form, number, adjective, noun, verb, thing, place = choices
    nouns, verbs, things, places = _WORDS[topic]
    opening, phrase, mark = _predicate(verbs[verb], tense, form, number)
    subject = f"{ADJECTIVES[adjective]} {nouns[noun][number]}".lstrip()
    return f"{opening}the {subject} {phrase} {things[thing]} {places[place]}{mark}"


_SUBJECTS = {
    form: (topic, number, n)
    for topic, (nouns, *_) in enumerate(_WORDS)
    for n, forms in enumerate(nouns)
    for number, form in enumerate(forms)
}
_PREDICATES = {
    (topic, number, *_predicate(verb, tense, form, number)): (tense, form, v)
    for topic, (_, verbs, *_) in enumerate(_WORDS)
    for (v, verb), tense, form, number in product(enumerate(verbs), *map(range, (3, 3, 2)))
}
_LINE = re.compile(
    r"((?:did |does |do |will )?)"
    rf"the (?:({'|'.join(ADJECTIVES[1:])}) )?"
    rf"(\w+) ((?:(?:will|{'|'.join(NEGATIVES.values())}) )?\w+) (\w+) (\w+ \w+)([.?])"
)


def parse(line: str) -> tuple[int, ...] | None:
    """Line -> its nine choices, in the order of WEIGHTS; None if it is not of the grammar."""
    found = _LINE.fullmatch(line)
    if not found:
        return None
    opening, adjective, noun, phrase, thing, place, mark = found.groups("")
    try:
        topic, number, n = _SUBJECTS[noun]
        tense, form, verb = _PREDICATES[topic, number, opening, phrase, mark]
        _, _, things, places = _WORDS[topic]
        local = (ADJECTIVES.index(adjective), n, verb, things.index(thing), places.index(place))
    except (KeyError, ValueError):
        return None
    return (topic, tense, form, number, *local)
