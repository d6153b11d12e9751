"""A tar read header by header, so that nothing in it goes unseen.

``tarfile`` and webdataset end without a word at a damaged header, at zero blocks in the middle and at a cut; here each
of them is an error with its place. No content is read, nothing is decompressed, links and devices are no members.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
"""A tar member is one block of header, or a few with long names, and its content, padded to blocks."""

MAX_HEADER_BYTES = 1 << 16
_EXTENSIONS = frozenset((b"x", b"g", b"L", b"K"))  # pax and GNU: they say more about the member behind them
_CHUNK_BYTES = 1 << 20


class TarDamageError(ValueError):
    """Not a whole tar.

    Attributes:
        offset: the byte at which it stops being one.
    """

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Member:
    """One member.

    Attributes:
        name: as stored.
        start: offset of its first header block.
        content: offset of its content.
        size: bytes of its content.
        regular: whether it is a file, and not a folder or a link.
    """

    name: str
    start: int
    content: int
    size: int
    regular: bool

    @property
    def end(self) -> int:
        """Offset behind its content and padding."""
        return self.content + -(-self.size // BLOCK_BYTES) * BLOCK_BYTES


def walk(file: BinaryIO, size: int) -> Iterator[Member]:
    """Every member of an open tar of ``size`` bytes, in order.

    Raises:
        TarDamageError: a header that is none, a member or an end that is missing, or anything behind the end.
    """
    at = 0
    while at < size:
        file.seek(at)
        block = file.read(BLOCK_BYTES)
        if not any(block):
            _check_end(file, at, size)
            return
        member = _member(file, at, block)
        if member.end > size:
            raise TarDamageError(at, f"member {member.name!r} ends at byte {member.end}, the tar at {size}")
        yield member
        at = member.end
    raise TarDamageError(at, f"the tar ends at byte {size} without the blocks that end an archive: cut off")


def parse_header(blocks: bytes) -> tarfile.TarInfo:
    """The member that these header blocks, a multiple of 512 bytes, announce.

    Raises:
        ValueError: they are not the header of one member.
    """
    try:
        if len(blocks) == BLOCK_BYTES:
            return tarfile.TarInfo.frombuf(blocks, "utf-8", "strict")
        with tarfile.open(fileobj=io.BytesIO(blocks), mode="r:", encoding="utf-8", errors="strict") as tar:
            found = tar.next()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"no tar header ({error})") from None
    if found is None or found.offset_data != len(blocks):
        raise ValueError("no tar header")
    return found


def parse_name(blocks: bytes) -> tuple[str, int]:
    """Name and content size of the regular file that these header blocks announce; no name for another member.

    A single plain block, as nearly all are, is read without :mod:`tarfile`, which takes several times as long.

    Raises:
        ValueError: they are not the header of one member.
    """
    if len(blocks) == BLOCK_BYTES and blocks[156:157] == b"0" and blocks[345:346] == b"\0":
        checksum = sum(blocks) - sum(blocks[148:156]) + 8 * ord(" ")
        if checksum == int(blocks[148:156].rstrip(b" \0"), 8):
            return blocks[:100].rstrip(b"\0").decode(), int(blocks[124:136].rstrip(b" \0"), 8)
    found = parse_header(blocks)
    return (found.name if found.isreg() else ""), found.size


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension, in lower case, of a member's name as webdataset sees them; None for one it skips.

    >>> split_name("a.b/clip.1.FLAC")
    ('a.b/clip', '1.flac')
    """
    folder, slash, base = name.rpartition("/")
    key, dot, extension = base.partition(".")
    return (folder + slash + key, extension.lower()) if key and dot else None


def _member(file: BinaryIO, start: int, block: bytes) -> Member:
    """The member whose first header block is ``block``, at ``start``; the file stands behind that block."""
    blocks = block
    try:
        while len(block) == BLOCK_BYTES and block[156:157] in _EXTENSIONS:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "strict").size
            if size < 0 or size + len(blocks) > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            blocks += file.read(-(-size // BLOCK_BYTES) * BLOCK_BYTES)
            block = file.read(BLOCK_BYTES)
            blocks += block
        found = parse_header(blocks)
    except (tarfile.TarError, ValueError) as error:
        raise TarDamageError(start, f"no tar header at byte {start} ({error})") from None
    if found.size < 0:
        raise TarDamageError(start, f"no tar header at byte {start} (negative size)")
    regular = found.isreg() and not found.issparse()
    content = start + len(blocks)
    return Member(found.name, start, content, found.size if regular or found.isreg() else 0, regular)


def _check_end(file: BinaryIO, at: int, size: int) -> None:
    if size - at < 2 * BLOCK_BYTES:
        raise TarDamageError(
            at, f"the tar ends at byte {size} within the blocks that end an archive: cut off"
        )
    file.seek(at)
    while chunk := file.read(_CHUNK_BYTES):
        if any(chunk):
            behind = file.tell() - len(chunk.lstrip(b"\0"))
            raise TarDamageError(at, f"empty blocks at byte {at}, but data behind them at byte {behind}")
