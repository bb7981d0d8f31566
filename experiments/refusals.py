"""What pydantic refuses of a configuration or a record, in lines that name the key."""

from __future__ import annotations

import re

from pydantic import ValidationError

from .names import one_line


def of_key(key: str, message: str) -> str:
    """The message of an error under a key; a class of settings is named as the table that it is."""
    last = key.rpartition(".")[2]
    message = re.sub(r"^[A-Z]\w*\.(?=\w+ )", f"{last}.", message)
    if key and message.startswith(f"{last}."):
        return key.removesuffix(last) + message
    return f"{key}: {message}" if key else message


def described(error: ValidationError, prefix: str = "") -> list[str]:
    """What is wrong, a line for each key; ``prefix`` is the table that was checked."""
    lines = []
    for e in error.errors(include_url=False):
        key = ".".join(str(part) for part in ([prefix] if prefix else []) + list(e["loc"]))
        if e["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key"
        else:
            message = e["msg"].removeprefix("Value error, ")
        lines.append(one_line(of_key(key, message)))
    return lines
