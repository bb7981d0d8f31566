"""Files that are not what was written: drawn bits flipped, stretches cut, put in or exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st


def each_bit_flipped(path: Path, content: bytes) -> Iterator[int]:
    """Flip one bit of a file after another; at the end the file is whole.

    In place, as writing a file anew each time would be slow.
    """
    with path.open("r+b") as file:
        file.write(content)
        for bit in range(8 * len(content)):
            place, old = bit // 8, content[bit // 8]
            for value in (old ^ 1 << bit % 8, old):
                file.seek(place)
                file.write(bytes([value]))
                file.flush()
                if value != old:
                    yield bit


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Some content with damage: always other bytes than the content's."""
    kind = data.draw(st.sampled_from(["flip", "cut", "put in", "taken out", "zeros", "empty"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        changed = bytearray(content)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "cut":
        return content[:at]
    if kind == "put in":
        return content[:at] + data.draw(st.binary(min_size=1, max_size=20)) + content[at:]
    if kind == "taken out":
        return content[:at] + content[at + data.draw(st.integers(1, 100)) :]
    if kind == "zeros":  # as after a crash of the machine
        changed = content[:at] + bytes(len(content) - at)
        return changed if changed != content else b""
    return b""
