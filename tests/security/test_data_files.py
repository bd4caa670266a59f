"""Malicious data files: they start no program, open no FIFO, and do not exhaust the memory."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from models.file_limits import MAX_BYTES, MAX_PIXELS, check_regular, open_picture, unpacked
from models.parquet_data import Parquet
from models.prices_table import read_table
from models.speech_files import check_audio, read_audio
from models.vision_data import Idx, read_idx
from models.vision_folder import PictureFolder, decode

# Ghostscript would execute the commands after the header.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(mark) run\nshowpage\n"


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file with a header and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in (chunk, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_an_eps_file_under_another_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(EPS)
    with pytest.raises(ValueError, match=r"a\.png .*: cannot identify image file"):
        decode(str(tmp_path / "a.png"), 8, 3)
    assert not mark.exists()


def test_a_picture_of_too_many_pixels_is_rejected_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ValueError, match="max_pixels"):
        decode(str(tmp_path / "a.png"), 8, 3)
    (tmp_path / "b.png").write_bytes(png_header(MAX_PIXELS, 1))
    assert open_picture(tmp_path / "b.png").size == (MAX_PIXELS, 1), "the limit itself is allowed"


def test_the_limit_on_pixels_is_a_key_of_the_data(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(6):
            Image.new("RGB", (20, 20)).save(tmp_path / label / f"{number}.png")
    assert len(PictureFolder(str(tmp_path), size=8, max_pixels=400, val_fraction=0.5).train) == 6
    with pytest.raises(ValueError, match=r"data\.max_pixels"):
        PictureFolder(str(tmp_path), size=8, max_pixels=399, val_fraction=0.5)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    header = struct.pack(">BBBBIII", 0, 0, 8, 3, 1, 2**15, 2**15)
    names = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    (tmp_path / names[0]).write_bytes(gzip.compress(header + bytes(2**20)))
    (tmp_path / names[1]).write_bytes(gzip.compress(struct.pack(">BBBBI", 0, 0, 8, 1, 1) + b"\0"))
    with pytest.raises(ValueError, match=r"data\.max_bytes"):
        Idx(str(tmp_path), max_bytes=2**16)
    with pytest.raises(
        ValueError, match=r"train-images.* 1073741840 .* 1048592\b"
    ):  # within the limit: the header states more than there is
        Idx(str(tmp_path), max_bytes=2**21)


def test_a_header_with_dimensions_that_overflow_allocates_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(8))
    with pytest.raises(ValueError, match=r"/a .* 79228162458924105385300197391 .* 24\b"):
        read_idx(tmp_path / "a", 3)


def test_decompressed_data_are_limited(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(1000)))
    assert unpacked(tmp_path / "a.gz", 1000) == (bytes(1000), True)
    with pytest.raises(ValueError, match=r"a\.gz .* 999 "):
        unpacked(tmp_path / "a.gz", 999)


def test_a_row_group_that_repeats_one_number_is_measured_decoded(tmp_path: Path) -> None:
    rows = 200_000
    table = pa.table({name: np.ones(rows) for name in ("x", "y")})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows // 2)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"a\.parquet.* 0,.*data\.max_group_bytes"):
        Parquet(str(tmp_path), target="y", max_group_bytes=1_000_000)
    assert len(Parquet(str(tmp_path), target="y").train) == rows // 2


def test_a_sound_file_of_days_is_rejected_by_its_header(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(16000, np.float32), 16000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] = content[21] & 0xF0 | 0x0F  # the stated number of samples has 36 bits, from the middle of this byte on
    content[22:26] = b"\xff\xff\xff\xff"
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(ValueError, match=r"seconds.*data\.max_file_seconds"):
        check_audio(tmp_path / "a.flac", 16000)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_neither_a_fifo_nor_a_device_is_opened(kind: str, tmp_path: Path) -> None:
    for name in ("a.png", "a.gz", "a.flac", "a.csv", "a.parquet"):
        if kind == "fifo":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"FIFO|device"):
        decode(str(tmp_path / "a.png"), 8, 3)
    for read in (check_audio, read_audio):
        with pytest.raises(ValueError, match=r"FIFO|device"):
            read(tmp_path / "a.flac", 16000)
    with pytest.raises(ValueError, match=r"FIFO|device"):
        unpacked(tmp_path / "a.gz")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises((ValueError, OSError)):
            read_table(str(tmp_path / name), "date", ["close"])
        with pytest.raises((ValueError, OSError)):
            Parquet(str(tmp_path / name), target="y")


def test_ordinary_files_are_within_the_limits(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert check_regular(tmp_path / "b") == tmp_path / "b", "a link of the user's own leads to a regular file"
    assert unpacked(tmp_path / "a", MAX_BYTES) == (b"text", True)
