"""The kinds of conversation: each function returns turns of ([pictures..., question], right answer)."""

from __future__ import annotations

import json
from random import Random

from tiny_world import NUMBER_WORDS, ORDINALS, Thing, World, capitalized, count_words, join_words, plural

Turns = list[tuple[list, str]]


def describe_styles(t: Thing) -> list[tuple[str, str]]:
    """Questions about one picture with their answers."""
    cats = plural(t.category)
    return [
        ("What is in this picture?",
         f"This picture shows {t.a}. It is {t.a_category}, and its main color is {t.color}. You would usually find "
         f"it {t.place}. "
         f"One thing worth knowing is that it {t.fact}."),
        ("Describe the picture.",
         f"I can see {t.a} in the picture, mostly {t.color}. The {t.name} belongs to the group of {cats}. Its usual "
         f"place is "
         f"{t.place}, and it {t.fact}."),
        ("What color is this, and what is it?",
         f"The main color is {t.color}, and the thing itself is {t.a}. It counts as {t.a_category}. People come "
         f"across it "
         f"{t.place}, and it is known that it {t.fact}."),
        ("Tell a child what this is.",
         f"Look, this is {t.a}! Its color is {t.color}, and it is a kind of {t.category}. You can meet it {t.place}. "
         f"Did you know "
         f"that it {t.fact}?"),
        ("Where would I find this?",
         f"You would find it {t.place}. The picture shows {t.a}, which is {t.a_category} with {t.color} as its main "
         f"color. "
         f"It {t.fact}, so it is hard to take it for anything else."),
        ("Write a caption for this picture.",
         f"{capitalized(t.a)}, mostly {t.color}, seen {t.place}. As everybody knows, it {t.fact}, and so it has a "
         f"place of its "
         f"own among the {cats}."),
        ("How big is the thing in the picture?",
         f"The picture shows {t.a}, and it is {t.size_words}. Its color is mostly {t.color}. As {t.a_category}, it "
         f"is normally "
         f"found {t.place}, and it {t.fact}."),
        ("Give me three facts about this.",
         f"Here are three facts about the {t.name}.\n1. It is {t.a_category}, mostly {t.color}.\n2. It is found "
         f"{t.place}.\n"
         f"3. It {t.fact}."),
    ]  # fmt: skip


def describe(rng: Random, world: World) -> Turns:
    thing = rng.choice(world.things)
    question, answer = rng.choice(describe_styles(thing))
    return [([thing, question], answer)]


def list_pictures(rng: Random, world: World) -> Turns:
    things = rng.sample(world.things, rng.randint(2, 4))
    n, last = len(things), things[-1]
    in_order = " ".join(
        f"The {o} one shows {t.a}, which is {t.a_category}." for o, t in zip(ORDINALS, things, strict=False)
    )
    colors = join_words([f"{t.a} ({t.color})" for t in things])
    lines = "\n".join(f"{i}. {capitalized(t.a)}: it {t.fact}." for i, t in enumerate(things, 1))
    backwards = ", then ".join(f"{t.a} in picture {i}" for i, t in reversed(list(enumerate(things, 1))))
    styles = [
        ("List the pictures in order.", f"There are {count_words(n, 'picture')}. {in_order}"),
        ("Name what you see from first to last, with colors.",
         f"From first to last I see {colors}. That makes {count_words(n, 'thing')} in all. The last one, the "
         f"{last.name}, is "
         f"usually found {last.place}."),
        ("What do the pictures show? Make a numbered list.", lines),
        ("Go through the pictures backwards.",
         f"From the last to the first I see {backwards}. The first picture is the {things[0].name}, which is found "
         f"{things[0].place}."),
    ]  # fmt: skip
    question, answer = rng.choice(styles)
    return [([*things, question], answer)]


def _pair(rng: Random, world: World) -> tuple[Thing, Thing]:
    """Two things, half of the time of one category."""
    a = rng.choice(world.things)
    kin = [t for t in world.things if t != a and t.category == a.category]
    return a, rng.choice(kin if rng.random() < 0.5 else [t for t in world.things if t != a])


def _kinds_of(a: Thing, b: Thing) -> str:
    if a.category == b.category:
        return f"Both are {plural(a.category)}."
    return f"The {a.name} is {a.a_category}, while the {b.name} is {b.a_category}."


def _colors_of(a: Thing, b: Thing) -> str:
    if a.color == b.color:
        return f"Both are mostly {a.color}."
    return f"The {a.name} is mostly {a.color}, while the {b.name} is mostly {b.color}."


def _bigger_of(a: Thing, b: Thing) -> str:
    if a.size == b.size:
        return "They are about the same size."
    return f"The {max(a, b, key=lambda t: t.size).name} is the bigger one."


def compare(rng: Random, world: World) -> Turns:
    a, b = _pair(rng, world)
    shows = f"The first picture shows {a.a}, and the second one shows {b.a}."
    together = "Yes, they do." if a.category == b.category else "No, they do not."
    styles = [
        ("Compare the two pictures.", f"{shows} {_kinds_of(a, b)} {_colors_of(a, b)} {_bigger_of(a, b)}"),
        ("Which one is bigger?",
         f"{_bigger_of(a, b)} In the first picture, the {a.name} is {a.size_words}. In the second picture, the "
         f"{b.name} is "
         f"{b.size_words}."),
        ("Do these two belong to the same group?",
         f"{together} {_kinds_of(a, b)} The {a.name} is usually found {a.place}, and the {b.name} is usually found "
         f"{b.place}."),
        ("What is the difference between them?",
         f"{shows} {_colors_of(a, b)} The first one {a.fact}, but the second one {b.fact}."),
    ]  # fmt: skip
    question, answer = rng.choice(styles)
    return [([a, b, question], answer)]


def _grouped(things: list[Thing]) -> dict[str, list[Thing]]:
    groups: dict[str, list[Thing]] = {}
    for t in things:
        groups.setdefault(t.category, []).append(t)
    return groups


def count(rng: Random, world: World) -> Turns:
    things = rng.sample(world.things, rng.randint(3, 6))
    # Repeat categories: otherwise nearly every count would be one.
    first = things[0]
    kin = [t for t in world.things if t.category == first.category and t not in things]
    things[1:2] = rng.sample(kin, min(len(kin), rng.randint(0, 2)))
    things = things[:6]
    rng.shuffle(things)
    n = len(things)
    asked = rng.choice(things).category if rng.random() < 0.8 else rng.choice(world.things).category
    groups = _grouped(things)
    parts = [f"{count_words(len(g), c)} ({join_words([t.name for t in g])})" for c, g in groups.items()]
    color = rng.choice(things).color
    color_hits = [f"picture {i} ({t.name})" for i, t in enumerate(things, 1) if t.color == color]
    walk = join_words([t.a for t in things])
    styles = [
        (f"How many {plural(asked)} are there?",
         f"The {n} pictures show {walk}. " + (f"Among them {'is' if len(groups[asked]) == 1 else 'are'} "
         f"{count_words(len(groups[asked]), asked)}: {join_words([t.a for t in groups[asked]])}."
         if asked in groups else f"There is no {asked} among them.")),
        ("Count the pictures by kind.", f"I count {n} pictures, showing {walk}. By kind that makes "
                                        f"{join_words(parts)}."),
        (f"How many things are mostly {color}?",
         f"The {n} pictures show {walk}. Mostly {color} {'is' if len(color_hits) == 1 else 'are'} "
         f"{count_words(len(color_hits), 'thing')}: {join_words(color_hits)}."),
    ]  # fmt: skip
    question, answer = rng.choice(styles)
    return [([*things, question], answer)]


def as_json(rng: Random, world: World) -> Turns:
    things = rng.sample(world.things, rng.randint(1, 3))
    rows = [{"name": t.name, "category": t.category, "color": t.color} for t in things]
    summary = {"count": len(things), "names": [t.name for t in things], "places": [t.place for t in things]}
    facts = [{"picture": i, "name": t.name, "size": t.size, "fact": f"It {t.fact}."} for i, t in enumerate(things, 1)]
    styles = [
        ("Answer as JSON: name, category and color of every picture.", rows if len(things) > 1 else rows[0]),
        ("Sum up the pictures as one JSON object with count, names and places.", summary),
        ("Give me a JSON list with the number, name, size from 1 to 6 and a fact for each picture.", facts),
    ]
    question, answer = rng.choice(styles)
    return [([*things, question], json.dumps(answer))]


def _next_question(rng: Random, t: Thing) -> tuple[list, str]:
    return rng.choice([
        (["Where is it found, and how large is it?"],
         f"The {t.name} is usually found {t.place}. As for its size, it is {t.size_words}, like many other "
         f"{plural(t.category)}."),
        (["Put that into one short sentence."],
         f"In one short sentence: the {t.color} {t.name} is {t.a_category}, it is found {t.place}, and it {t.fact}."),
        (["Are you sure?"],
         f"Yes, I am sure that it is {t.a}. The picture is mostly {t.color}, the shape is right, and among "
         f"{plural(t.category)} "
         f"nothing else looks like it."),
        (["Give me the same as JSON."],
         json.dumps({"name": t.name, "category": t.category, "color": t.color, "place": t.place})),
    ])  # fmt: skip


def follow_up(rng: Random, world: World) -> Turns:
    """Two or three turns; a picture comes in a later turn too."""
    a, b = _pair(rng, world)
    later = rng.choice([
        ("And what is this one?",
         f"This one shows {b.a}. {_kinds_of(a, b)} It {b.fact}, and you would find it {b.place}."),
        ("Now compare it with this one.",
         f"The new picture shows {b.a}, and before that we saw {a.a}. {_colors_of(a, b)} {_bigger_of(a, b)}"),
        ("Which of the two would you rather take along?",
         f"The second picture shows {b.a}, and the first one shows {a.a}. I would take the smaller one, unless they "
         f"are equal. "
         f"{_bigger_of(a, b)}"),
    ])  # fmt: skip
    shown = ([b, later[0]], later[1])
    if rng.random() < 0.25:  # text first, then a picture of the thing, or of another one
        b = a if rng.random() < 0.5 else b
        verdict = f"Yes, this is {a.a}." if b == a else f"No, this is {b.a}, not {a.a}."
        question = f"Is this the {a.name}?"
        return [about(a), ([b, question], f"{verdict} The thing in the picture is {b.color}, and it {b.fact}.")]
    question, answer = rng.choice(describe_styles(a))
    opening = ([a, question], answer)
    return [opening, shown] if rng.random() < 0.4 else [opening, _next_question(rng, a), shown]


def digits(rng: Random, world: World) -> Turns:
    if rng.random() < 0.4:
        picture = rng.choice(world.numbers)
        digits, value = picture.digits, int("".join(map(str, picture.digits)))
        words = join_words([NUMBER_WORDS[d] for d in digits])
        kind = "odd" if value % 2 else "even"
        styles = [
            ("Which number is written here?",
             f"The number is {value}. It has {len(digits)} digits: {words}. The last digit is {digits[-1]}, so the "
             f"number is {kind}."
             f" The next number would end in {(digits[-1] + 1) % 10}."),
            ("Read the digits from left to right.",
             f"From left to right I read {words}. Written as a number, that is {value}. The largest digit is "
             f"{max(digits)}, and the "
             f"smallest digit is {min(digits)}."),
        ]  # fmt: skip
        question, answer = rng.choice(styles)
        return [([picture, question], answer)]
    pictures = rng.sample(world.digits, rng.randint(1, 4))
    values = [p.digits[0] for p in pictures]
    words = [NUMBER_WORDS[v] for v in values]
    n = len(values)
    if n == 1:
        v, kind = values[0], "odd" if values[0] % 2 else "even"
        answer = (f"The handwritten digit is a {v}. In words it is {words[0]}. It is an {kind} number, and the "
                  f"number that comes "
                  f"right after it is {NUMBER_WORDS[v + 1]}. Somebody wrote it with a thick pen.")  # fmt: skip
        return [([*pictures, "Which digit is this?"], answer)]
    styles = [
        ("Read the digits in order.",
         f"The {n} digits are {join_words([str(v) for v in values])}. In words they are {join_words(words)}. Put "
         f"together they form "
         f"{''.join(map(str, values))}. The largest one is {max(values)}, and the smallest one is {min(values)}."),
        ("Read the digits and say which are odd.",
         "\n".join(f"{i}. The {o} digit is {v}, which is {'odd' if v % 2 else 'even'}."
                   for i, (o, v) in enumerate(zip(ORDINALS, values, strict=False), 1))),
    ]  # fmt: skip
    if n == 2:
        a, b = values
        styles.append(("What is the sum of these digits?",
                       f"The first digit is {a}, and the second digit is {b}. {capitalized(words[0])} plus "
                       f"{words[1]} is "
                       f"{NUMBER_WORDS[a + b]}. So the sum of the two handwritten digits is {a + b}."))  # fmt: skip
    question, answer = rng.choice(styles)
    return [([*pictures, question], answer)]


def about(t: Thing) -> tuple[list, str]:
    return ([f"Tell me about the {t.name}."],
            f"The {t.name} is {t.a_category}, and most people think of it as {t.color}. It is {t.size_words}. You "
            f"would look for "
            f"it {t.place}. Above all, it {t.fact}.")  # fmt: skip


def story(a: Thing, b: Thing) -> tuple[list, str]:
    return ([f"Write a short story about {a.a} and {b.a}."],
            f"Once upon a time there was {a.a}. It woke up {a.place} and wished for a friend. One day it met {b.a} "
            f"that came from "
            f"far away. \"I was {b.place},\" said the {b.name}. The {a.name} was surprised to hear that its guest "
            f"{b.fact}. From "
            f"that day on the {a.name} and the {b.name} stayed together.")  # fmt: skip


def text_only(rng: Random, world: World) -> Turns:
    a, b = _pair(rng, world)
    some = rng.sample(world.things, rng.randint(3, 4))
    groups = _grouped([a, b, *[t for t in some if t not in (a, b)]])
    mixed = [t for g in groups.values() for t in g]
    rng.shuffle(mixed)
    groups = _grouped(mixed)
    start = rng.randint(0, 14)
    end = start + rng.randint(5, min(12, 20 - start))
    numbers = NUMBER_WORDS[start : end + 1]
    lines = "\n".join(f"{capitalized(plural(c))}: {join_words([t.name for t in g])}." for c, g in groups.items())
    return [rng.choice([
        about(a), about(a), story(a, b), story(a, b),
        ([f"Which is bigger, the {a.name} or the {b.name}?"],
         f"{_bigger_of(a, b)} The {a.name} is {a.size_words}, and the {b.name} is {b.size_words}. {_kinds_of(a, b)}"),
        ([f"Sort these by kind: {', '.join(t.name for t in mixed)}."],
         f"{lines}\nThat makes {count_words(len(mixed), 'thing')} of {count_words(len(groups), 'kind')}."),
        ([f"Count from {NUMBER_WORDS[start]} to {NUMBER_WORDS[end]} in words."],
         f"Here you are: {', '.join(numbers)}. These are {count_words(len(numbers), 'number')}, the first one is "
         f"{numbers[0]} and "
         f"the last one is {numbers[-1]}."),
        ([f"Where would I find {join_words([t.a for t in some])}?"],
         " ".join(f"The {t.name} is found {t.place}." for t in some) + " I hope that this helps you to find them."),
    ])]  # fmt: skip
