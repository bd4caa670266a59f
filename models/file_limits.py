"""Limits on untrusted data files: kind of file, format, and decoded size.

A small file can decode to terabytes, and a FIFO blocks its reader forever. Every limit has a default far above
ordinary data, and its error names the key of the data section that raises it, if there is one.
"""

from __future__ import annotations

import stat
import threading
import zlib
from pathlib import Path
from typing import Any

MAX_PIXELS = 100_000_000  # of one picture
MAX_BYTES = 8 * 2**30  # of one file, decompressed
MAX_GROUP_BYTES = 4 * 2**30  # of one row group of Parquet, decoded
MAX_SECONDS = 3600.0  # of one sound file
# Pillow reads more formats, some of them with other programs: an EPS file starts Ghostscript, for any file name.
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_OPENING = threading.Lock()
_GZIP = b"\x1f\x8b"


def check_regular(path: str | Path) -> Path:
    """Return the path. Raises ValueError for a FIFO, a device or a socket; OSError if it does not exist."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
        raise ValueError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}. Give a regular file.")
    return Path(path)


def open_picture(path: str | Path, max_pixels: int = MAX_PIXELS, key: str | None = None) -> Any:
    """Open a picture of one of PICTURE_FORMATS without decoding it. Raises ValueError if it is too large.

    Args:
        max_pixels: width times height, at most.
        key: key of the data section that raises the limit.
    """
    from PIL import Image

    with _OPENING:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own limit, which no key can raise
        try:
            opened = Image.open(check_regular(path), formats=PICTURE_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = usual
    width, height = opened.size
    check_size(f"{path}", width * height, max_pixels, "pixels", key)
    return opened


def check_size(what: str, found: float, most: float, unit: str, key: str | None) -> None:
    """Raise ValueError if a size is larger than its limit."""
    if found > most:
        remedy = f"set data.{key} to at least {found:.15g}" if key else "make it smaller"
        raise ValueError(f"{what} has {found:,.15g} {unit}, and at most {most:,.15g} are read. Remove it, or {remedy}.")


def unpacked(path: Path, max_bytes: int = MAX_BYTES, key: str | None = None) -> tuple[bytes, bool]:
    """Return the content of a plain or gzipped file, as far as it can be read, and whether it is complete.

    Raises:
        ValueError: the gzip stream is damaged, or the content has more than `max_bytes`.
    """
    check_size(f"{path}", check_regular(path).stat().st_size, max_bytes, "bytes", key)
    data = path.read_bytes()
    if not data.startswith(_GZIP):
        return data, True
    stream = zlib.decompressobj(wbits=31)
    try:
        content = stream.decompress(data, max_bytes + 1)
        whole = stream.eof
    except zlib.error as error:
        raise ValueError(f"{path} is damaged: {error}. Copy or download it again.") from error
    if len(content) > max_bytes:
        remedy = f"raise data.{key}" if key else "decompress and reduce it"
        raise ValueError(f"{path} decompresses to more than {max_bytes:,} bytes. Remove it, or {remedy}.")
    return content, whole
