"""Banners as people ask for them: many phrasings, quotes of any kind.

A phrase says everything that its banner holds, but for what goes without saying (sans letters; white text, or black
where white cannot be read) and what it leaves to the seed: in which direction colours follow each other, and on which
side a shape stands.
"""

from random import Random

from pipeline.tiny.banner import Banner, Direction, Ground, GroundKind, Shape, ShapeKind, Typeface, default_colour

QUOTES = ('""', '""', '""', "''", "“”", "“”", "‘’", "«»", "„“", "``", "‹›", "「」")
TYPEFACES = {
    Typeface.SANS: ("sans", "sans-serif", "plain"),
    Typeface.SLAB: ("slab", "serif", "slab serif"),
    Typeface.NARROW: ("narrow", "condensed"),
}
SHAPES = {
    ShapeKind.CIRCLE: ("circle", "dot", "disc"),
    ShapeKind.SQUARE: ("square", "box"),
    ShapeKind.STAR: ("star", "five-pointed star"),
    ShapeKind.BADGE: ("badge", "seal"),
}


def phrase(random: Random, banner: Banner, *, wide: bool) -> str:
    """A prompt that means ``banner``; ``wide`` as ``banner.is_wide`` says of its size."""
    thing = random.choice(("banner", "banner", "advertising banner", "web banner") if wide else THINGS)
    ground = _ground(random, banner.ground, thing)
    text = _text(random, banner)
    shape = (
        f"{random.choice((' and', ', with', ', next to', ' with'))} {_shape(random, banner.shape, wide)}"
        if (banner.shape)
        else ""
    )
    start = random.choice(("", "", "", "Draw ", "Make ", "Please draw ", "Create "))
    whole = f"{start}{ground}{random.choice(SAYING)} {text}{shape}"
    return _sentence(random, whole)


THINGS = ("banner", "banner", "tile", "card", "poster", "sign", "square ad")
SAYING = (
    *(" with the text", " with the text", " with the text", " that says", " saying", " with the words", " reading"),
    *(", text", ", with the text", " and on it", ", it says", " with", " with the writing"),
)


def _sentence(random: Random, text: str) -> str:
    text = text[0].upper() + text[1:] if random.random() < 0.8 else text
    return text + random.choice(("", "", "", "."))


def _ground(random: Random, ground: Ground, thing: str) -> str:
    if ground.kind is GroundKind.PLAIN:
        return _plain(random, ground.colours[0], thing)
    first, second = (_colour(random, name) for name in ground.colours)
    if ground.kind is GroundKind.GRADIENT:
        whither = f" {ground.direction}" if random.random() < 0.5 else ""
        return random.choice(
            (
                f"{_a(thing)} with a gradient from {first} to {second}{whither}",
                f"{_a(first)} to {second} gradient {thing}{whither}",
                f"{_a(thing)} on a {first}-to-{second} gradient{whither}",
                f"{_a(thing)} fading from {first} to {second}{whither}",
            )
        )
    if ground.kind is GroundKind.STRIPED:
        upright = ground.direction is Direction.ACROSS
        which = ("vertical " if upright else "horizontal ") if random.random() < 0.5 else ""
        return random.choice(
            (
                f"{_a(thing)} with {which}{first} and {second} stripes",
                f"{_a(thing)} on {which}stripes in {first} and {second}",
                f"{_a(thing)} with {which}stripes of {first} and {second}",
                f"a {which}striped {thing} in {first} and {second}",
            )
        )
    return _halves(random, ground.direction, first, second, thing)


def _plain(random: Random, name: str, thing: str) -> str:
    colour = _colour(random, name)
    return random.choice(
        (
            f"{_a(colour)} {thing}",
            f"{_a(colour)} {thing}",
            f"a plain {colour} {thing}",
            f"a solid {colour} {thing}",
            f"{_a(thing)} on {_a(colour)} background",
            f"{_a(thing)} on a plain {colour} ground",
            f"{_a(thing)} with {_a(colour)} background",
            f"{_a(thing)} in {colour}",
        )
    )


def _halves(random: Random, direction: Direction, first: str, second: str, thing: str) -> str:
    one, other = ("left", "right") if direction is Direction.ACROSS else ("top", "bottom")
    return random.choice(
        (
            f"{_a(thing)}, {first} on the {one} and {second} on the {other}",
            f"{_a(thing)} with the {one} half {first} and the {other} half {second}",
            f"a half {first}, half {second} {thing}",
            f"a two-colour {thing} in {first} and {second}",
            f"{_a(thing)} split into {first} and {second}",
        )
    )


def _text(random: Random, banner: Banner) -> str:
    quote = _quotes(random, banner.lines)
    quoted = [f"{quote[0]}{line}{quote[1]}" for line in banner.lines]
    written = quoted[0] if len(quoted) == 1 else _two_lines(random, *quoted)
    return written + _manner(random, banner)


def _quotes(random: Random, lines: tuple[str, ...]) -> str:
    """A pair that does not stand in the text itself."""
    return random.choice(
        [pair for pair in QUOTES if not any(mark in line for line in lines for mark in pair + "’'")] or ['""']
    )


def _two_lines(random: Random, first: str, second: str) -> str:
    return random.choice(
        (
            f"{first} and below it {second}",
            f"{first} over {second}",
            f"{first} above {second}",
            f"{first} and {second}",
            f"{first}, {second}",
            f"{first} and under it {second}",
            f"{first} on the first line and {second} on the second",
            f"in two lines: {first}, {second}",
        )
    )


def _manner(random: Random, banner: Banner) -> str:
    """The text's colour and typeface, either unsaid where it goes without saying."""
    silent = banner.colour == default_colour(banner.ground) and random.random() < 0.6
    colour = "" if silent else _colour(random, banner.colour)
    plain = banner.typeface is Typeface.SANS and random.random() < 0.7
    typeface = "" if plain else random.choice(TYPEFACES[banner.typeface])
    if not colour and not typeface:
        return ""
    if not typeface:
        return random.choice((" in {}", " in {}", " in {} letters", " in {} text", ", {} letters")).format(colour)
    letters = f"{typeface} {random.choice(('letters', 'type', 'font'))}"
    if not colour:
        return f" in {letters}"
    return random.choice(
        (f" in {colour} {letters}", f" in {colour}, {letters}", f" in {colour} in {_a(typeface)} font")
    )


def _shape(random: Random, shape: Shape, wide: bool) -> str:
    places = (
        (("on the left", "on the right") if wide else ("at the top", "at the bottom"))
        if (random.random() < 0.5)
        else ("", "")
    )
    colour = _colour(random, shape.colour)
    named = f"{_a(colour)} {random.choice(SHAPES[shape.kind])}"
    return f"{named} {places[0] if shape.first else places[1]}".rstrip()


def _colour(random: Random, name: str) -> str:
    return "gray" if name == "grey" and random.random() < 0.5 else name


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
