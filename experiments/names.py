"""Names that become parts of paths, and texts that are shown: one rule for all of them.

Configurations and records come from elsewhere, and files and folders are named after what they say.
This module says which names and texts they may have; no other builds a path from a name.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, Field

LONGEST = 80
"""Letters of a configuration's name: the files named after it add up to 150, of 255 at most."""
LONGEST_TEXT = 200
LAST_SEED = 2**31 - 1
"""Random controls multiply a seed by a million, and PyTorch takes 64 bits."""
LARGEST = 1e9
"""No setting of a configuration is larger: beyond it sums and products overflow."""
DEEPEST = 20
TAKEN = frozenset({"dense", "overhead", "plots", "report.html", "table.json"})
"""What lies in the runs' folder beside the configurations' own folders."""


def check_name(text: str) -> str:
    """The name of a configuration.

    Raises:
        ValueError: it is not fit for a file's name, or the project uses it itself.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) or len(text) > LONGEST:
        raise ValueError(
            f"{shown(text)!r} names files, so it has to match the pattern "
            f"[A-Za-z0-9][A-Za-z0-9._-]* and to have at most {LONGEST} letters"
        )
    if text in TAKEN:
        raise ValueError(f"{text!r} lies in the runs' folder already; choose another name")
    return text


def check_text(text: str) -> str:
    """One line of text that tables, plots and pages show.

    Raises:
        ValueError: it is empty or long, or has characters that cannot be seen.
    """
    if not text.strip() or len(text) > LONGEST_TEXT or not _visible(text):
        raise ValueError(
            f"{shown(text)!r} is shown in tables and plots, so it has to be one line of 1 to "
            f"{LONGEST_TEXT} visible letters"
        )
    return text


Name = Annotated[str, AfterValidator(check_name)]
Text = Annotated[str, AfterValidator(check_text)]
Seed = Annotated[int, Field(ge=0, le=LAST_SEED)]


def _visible(text: str) -> bool:
    return all(c.isprintable() or unicodedata.category(c) == "Zs" for c in text)


def shown(text: str) -> str:
    """Text, cut to a length that fits into a message."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def one_line(text: str) -> str:
    """Text with every character that cannot be seen, line breaks above all, written as a code."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def folder_of(label: str) -> str:
    """A label as the name of a folder: never hidden, never a way out, never too long.

    Long ones are cut, and told apart by a hash.
    """
    plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
    return _cut(re.sub(r"^\.+", lambda dots: "-" * len(dots[0]), plain), label)


def slug(label: str) -> str:
    """A label as part of a file's name or a link's target; long ones as :func:`folder_of` does."""
    return _cut("".join(c if c.isalnum() else "-" for c in label.lower()).strip("-"), label)


def _cut(plain: str, label: str) -> str:
    if len(plain.encode()) <= LONGEST:
        return plain
    start = plain.encode()[: LONGEST - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(label.encode(errors='surrogatepass')).hexdigest()[:8]}"


def faults(value: Any, at: str = "") -> Iterator[str]:
    """What is wrong with a configuration's plain values, whatever key they stand under.

    Args:
        value: tables, lists, texts and numbers, as TOML and JSON have them.
        at: the key, with dots between.

    Returns:
        Lines that name the key.
    """
    if at.count(".") >= DEEPEST:
        yield f"{shown(at)}: nested more than {DEEPEST} deep"
    elif isinstance(value, dict):
        for key, inside in value.items():
            if len(key) > LONGEST_TEXT or not key.isprintable():
                yield f"{shown(key)!r} is no key"
            else:
                yield from faults(inside, f"{at}.{key}" if at else key)
    elif isinstance(value, list | tuple):
        for i, inside in enumerate(value):
            yield from faults(inside, f"{at}.{i}")
    elif isinstance(value, str):
        if len(value) > 4096 or not _encodes(value) or "\0" in value:
            yield f"{at}: {shown(value)!r} is too long, or no text"
    elif isinstance(value, float) and value - value != 0:
        yield f"{at}: {value} is no finite number"
    elif isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
        yield f"{at}: beyond what any setting takes, {LARGEST:g}"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
