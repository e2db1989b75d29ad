"""Letters and secrets that no model has seen, generated from a seed. Pure."""

from __future__ import annotations

import random

_NAMES = (
    *("Ada", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karin", "Luca", "Maria"),
    *("Nadia", "Oskar", "Petra", "Quentin", "Rosa", "Simon", "Tanja", "Ulrich", "Vera", "Wanda", "Yusuf", "Zoe"),
)
_FAMILIES = (
    *("Keller", "Moreau", "Novak", "Okafor", "Petrov", "Quist", "Rossi", "Silva", "Tanaka", "Ulman", "Vogel"),
    *("Weber", "Young", "Zeller", "Adler", "Bauer", "Costa", "Dubois", "Egger", "Fischer", "Gruber", "Haas"),
)
_PLACES = (
    *("Basel", "Lyon", "Porto", "Graz", "Turin", "Oslo", "Ghent", "Leeds", "Bremen", "Malmo", "Cork", "Lugano"),
    *("the harbour", "the old mill", "the station", "the clinic", "the library", "our office in the north"),
)
_THINGS = (
    *("the invoice", "the contract", "the blood test", "the repair of the roof", "the lease", "the second delivery"),
    *("the insurance", "the school report", "the tax return", "the boat", "the piano", "the garden wall"),
)
_FORMS = (
    "Dear {name}, thank you for your letter about {thing}. ",
    "{name} {family} will be in {place} on the {day}th of {month}, and asks for {thing}. ",
    "We have not yet paid the {amount} for {thing}; please wait until {month}. ",
    "Yesterday {name} called from {place} and said that {thing} had arrived too late. ",
    "I am sorry to hear that {name} is ill again, and hope to see you both in {place}. ",
    "The price of {thing} is now {amount}, which {name} {family} finds too much. ",
    "Could you ask {name} whether {thing} can be sent to {place} before the {day}th? ",
    "My sister {name} has moved to {place} and would like to sell {thing} for {amount}. ",
    "With kind regards, {name} {family}. ",
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_SECRETS = (
    "The code of {name} {family} is {digits}.",
    "{name} {family} in {place} owes us {amount} and {digits}.",
    "The card of {name} ends with {digits}.",
)


def letters(seed: int, count: int) -> str:
    """Return a text of sentences as in letters."""
    source = random.Random(seed)  # noqa: S311  # not for cryptography: the same seed gives the same text
    return "".join(_filled(source.choice(_FORMS), source) for _ in range(count))


def secrets(seed: int, count: int) -> list[str]:
    """Return sentences that each contain a number, whose recovery is counted: canaries."""
    source = random.Random(seed)  # noqa: S311  # see letters
    return [_filled(source.choice(_SECRETS), source) for _ in range(count)]


def _filled(form: str, source: random.Random) -> str:
    return form.format(
        name=source.choice(_NAMES),
        family=source.choice(_FAMILIES),
        place=source.choice(_PLACES),
        thing=source.choice(_THINGS),
        month=source.choice(_MONTHS),
        day=source.randint(4, 28),
        amount=f"{source.randint(11, 980)} francs",
        digits=f"{source.randint(1000, 9999)} {source.randint(1000, 9999)}",
    )
