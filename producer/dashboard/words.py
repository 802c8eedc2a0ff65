"""Numbers and times as people read them."""

from datetime import UTC, datetime

UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))


def span(seconds: float) -> str:
    """A length of time in its largest unit, or its two largest while the first is small: 8 s, 5 min, 2 h 10 min."""
    whole = max(0, round(seconds))
    for (unit_s, unit), (smaller_s, smaller) in zip(UNITS, [*UNITS[1:], (1, "s")], strict=True):
        if whole >= unit_s:
            first, rest = divmod(whole, unit_s)
            second = rest // smaller_s
            return f"{first} {unit} {second} {smaller}" if first < 10 and second else f"{first} {unit}"
    return f"{whole} s"


def ago(moment: datetime, now: datetime) -> str:
    """How long before ``now``, both on the database's clock."""
    return f"{span((now - moment).total_seconds())} ago"


def clock(moment: datetime) -> str:
    """The moment itself, for whoever wants it exactly."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def number(count: int) -> str:
    """With its thousands set apart."""
    return f"{count:,}".replace(",", "\u202f")
