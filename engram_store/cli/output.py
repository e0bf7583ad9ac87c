"""How numbers look on a terminal."""


def size_text(count: int) -> str:
    """Bytes for people: '2.1 GB'."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def plural(count: int, noun: str) -> str:
    """'1 segment', '2 segments'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
