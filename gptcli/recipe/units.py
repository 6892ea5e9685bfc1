"""Quantities as people write them in a recipe: 20M, 64Ki, 2%, 11h30m.

Every function takes what YAML gave (a number or a text) and returns a plain number; anything else is a `ValueError`
whose text says what is expected. K M B T are powers of ten; Ki Mi Gi are powers of two.
"""

from __future__ import annotations

import re

MULTIPLES = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "B": 10**9,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
}
SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
LARGEST = 2**63 - 1

COUNT_PATTERN = r"^[0-9][0-9_]*(\.[0-9]+)?\s*([KkMBGT]|[KMG]i)?$"
SHARE_PATTERN = r"^[0-9]+(\.[0-9]+)?\s*%$"
DURATION_PATTERN = r"^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$"


def count(value: object) -> int:
    """A whole number: 64, 1_000, 20M, 1.5K, 64Ki."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number such as 64, 20M or 64Ki")
    if isinstance(value, int):
        return _in_range(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("expected a whole number such as 64, 20M or 64Ki")
        return _in_range(int(value))
    if not isinstance(value, str) or not re.match(COUNT_PATTERN, value.strip(), re.ASCII):
        raise ValueError("expected a whole number such as 64, 20M or 64Ki")
    number, unit = re.fullmatch(r"([0-9_.]+)\s*([A-Za-z]*)", value.strip(), re.ASCII).groups()  # type: ignore[union-attr]
    multiple = MULTIPLES["K" if unit == "k" else unit]
    whole, _, fraction = number.replace("_", "").partition(".")
    if len(whole) + len(fraction) > 30:
        raise ValueError(f"a number larger than {LARGEST} is not possible")
    scaled = int(whole + fraction) * multiple
    result, rest = divmod(scaled, 10 ** len(fraction))
    if rest:
        raise ValueError("expected a whole number such as 64, 20M or 64Ki")
    return _in_range(result)


def share(value: object) -> float:
    """A part of the whole, from 0 to 1: 0.02 or 2%."""
    wanted = "expected a share such as 2% or 0.02"
    if isinstance(value, str) and re.match(SHARE_PATTERN, value.strip(), re.ASCII):
        result = float(value.strip().rstrip("%")) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool):
        result = float(value)
    else:
        raise ValueError(wanted)
    if not 0 <= result <= 1:
        raise ValueError(f"{wanted}, between 0% and 100%")
    return result


def is_share(text: str) -> bool:
    """Whether a text is a number or a percentage rather than a path."""
    return re.fullmatch(r"\s*[-+]?[0-9]+(\.[0-9]+)?\s*%?\s*", text, re.ASCII) is not None


def part(value: object) -> float:
    """A share below the whole: 0 <= part < 1."""
    result = share_or_more(value)
    if result >= 1:
        raise ValueError("expected a share below 100%, such as 2% or 0.02")
    return result


def share_or_more(value: object) -> float:
    """As `share`, without the upper bound (the caller has a better message for it)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
        return float(value)
    return share(value)


def steps_or_share(value: object) -> int | float:
    """Steps (an int: 1 or more) or a share of the steps (a float: 2%, 0.02, 0)."""
    wanted = "expected a number of steps such as 100, or a share of the steps such as 2%"
    if isinstance(value, str) and value.strip().endswith("%"):
        return part(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(wanted)
    if not isinstance(value, str) and 0 <= value < 1:
        return float(value)
    try:
        steps = count(value)
    except ValueError:
        raise ValueError(wanted) from None
    if steps < 0:
        raise ValueError(wanted)
    return steps or 0.0


def duration(value: object) -> int:
    """Seconds: 11h30m, 90s, 2d, or a whole number of seconds."""
    wanted = "expected a time such as 11h30m, 45m or 90s"
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return _in_range(value)
    text = value.replace(" ", "") if isinstance(value, str) else ""
    if not text or len(text) > 40 or not re.match(DURATION_PATTERN, text, re.ASCII):
        raise ValueError(wanted)
    seconds = sum(int(number) * SECONDS[unit] for number, unit in re.findall(r"([0-9]+)([dhms])", text, re.ASCII))
    if not seconds:
        raise ValueError(wanted)
    return _in_range(seconds)


def _in_range(value: int) -> int:
    if abs(value) > LARGEST:
        raise ValueError(f"a number larger than {LARGEST} is not possible")
    return value
