"""Sizes of memory, lengths of time, counts and losses as people say them: one spelling for all."""

GIB = 2**30
_STORED = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def gib(size: int) -> str:
    """A size in bytes as people say it: 19.8 GiB, and MiB below a quarter of one."""
    return f"{size / GIB:,.1f} GiB" if abs(size) >= GIB // 4 else f"{size / 2**20:,.1f} MiB"


def spoken(seconds: float) -> str:
    """A length of time that is only roughly known: 40 seconds, 12 minutes, 3.5 hours, 2 days."""
    for unit, size in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            shown = f"{count:.0f}" if count >= 10 or unit == "minute" else f"{count:.1f}"
            return f"{shown} {unit}s"
    return counted(max(1, round(seconds)), "second")


def counted(number: int, noun: str) -> str:
    """1 row, 1,200 rows: for nouns whose plural is an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nats(loss: float) -> str:
    """A loss, to the digit that training moves: 0.412."""
    return f"{loss:.3f}"


def stored(size: int, of: int | None = None) -> str:
    """A size in bytes as disks and downloads count it: 16.1 GB, or 1.2 of 16.1 GB."""
    whole = of or size
    unit, name = next(each for each in _STORED if whole >= each[0] or each is _STORED[-1])
    part = "" if of is None else f"{size / unit:,.1f} of "
    return f"{part}{whole / unit:,.1f} {name}"
