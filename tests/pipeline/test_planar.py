"""The planar codec: lossless, decodable by the four lines of its description, and any damage is an error."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images.planar import (
    PlanarFormatError,
    PlanarTooLargeError,
    decode_planar,
    encode_planar,
    planar_size_chw,
)

HEADER_BYTES = 24


def _random(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


IMAGE = _random(21, 30, 3)
BODY = encode_planar(IMAGE)


def _decoded(body: bytes) -> np.ndarray:
    target = np.full(planar_size_chw(body, 10**6), 7, np.uint8)
    decode_planar(body, target)
    return target


def _planes(image: np.ndarray) -> np.ndarray:
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def _with_header(body: bytes, version=1, channels=3, reserved=0, height=21, width=30) -> bytes:
    """The same pixels behind another header whose checksum is right."""
    packed = body[HEADER_BYTES:]
    header = struct.pack("<4sBBHIII", b"LFPZ", version, channels, reserved, height, width, len(packed))
    return header + struct.pack("<I", zlib.crc32(header)) + packed


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([1, 3]), st.integers(0, 99))
def test_every_size_comes_back_bitwise(height: int, width: int, channels: int, seed: int):
    image = _random(height, width, channels, seed)
    body = encode_planar(image)
    assert planar_size_chw(body, height * width) == (channels, height, width)
    np.testing.assert_array_equal(_decoded(body), _planes(image))


@pytest.mark.parametrize("level", [0, 1, 127, 128, 255])
def test_sums_do_not_spill_from_pixel_to_pixel(level: int):
    """Constant and alternating images drive the running sums through every carry."""
    image = np.full((9, 257, 3), level, np.uint8)
    image[:, ::2] = 255 - level
    np.testing.assert_array_equal(_decoded(encode_planar(image)), _planes(image))


def test_the_description_of_the_format_decodes_it():
    """By NumPy and zstandard alone, as the module's docstring says."""
    magic, version, channels, _, height, width, rest, crc = struct.unpack_from("<4sBBHIIII", BODY)
    assert (magic, version, channels, height, width) == (b"LFPZ", 1, 3, 21, 30)
    assert rest == len(BODY) - HEADER_BYTES
    assert crc == zlib.crc32(BODY[: HEADER_BYTES - 4])
    residuals = np.frombuffer(zstandard.decompress(BODY[HEADER_BYTES:]), np.uint8).reshape(3, height, 32)
    assert not residuals[..., width:].any()
    green, red, blue = np.cumsum(np.cumsum(residuals[..., :width], 1, "uint8"), 2, "uint8")
    np.testing.assert_array_equal(np.stack([red + green, green, blue + green], axis=-1), IMAGE)


def test_equal_images_give_equal_bytes_whatever_their_layout():
    assert encode_planar(np.asfortranarray(IMAGE)) == BODY


def test_smooth_images_become_small():
    """A plane is predicted exactly: 196,608 bytes of pixels in 137 bytes when this was written."""
    rows, columns = np.mgrid[0:256, 0:256]
    image = np.stack([rows // 2, columns // 2, (rows + columns) // 4], axis=-1).astype(np.uint8)
    assert len(encode_planar(image)) < 20_000


@pytest.mark.parametrize("image", [IMAGE[:4, :6], IMAGE // 16, IMAGE * 0], ids=["raw", "entropy coded", "one value"])
def test_no_flipped_bit_gives_other_pixels(image: np.ndarray):
    """Of every bit of header, zstandard frame and checksum. zstandard leaves four at most without a meaning."""
    body = encode_planar(image)
    accepted = 0
    for place in range(len(body) * 8):
        damaged = bytearray(body)
        damaged[place // 8] ^= 1 << place % 8
        target = np.empty((3, *image.shape[:2]), np.uint8)
        try:
            decode_planar(bytes(damaged), target)
        except PlanarFormatError:
            continue
        accepted += 1
        np.testing.assert_array_equal(target, _planes(image))
    assert accepted <= 8


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(BODY) - 1))
def test_no_truncated_file_is_accepted(length: int):
    with pytest.raises(PlanarFormatError):
        decode_planar(BODY[:length], np.empty((3, 21, 30), np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_noise_is_refused(noise: bytes, with_header: bool):
    body = _with_header(b"\0" * HEADER_BYTES + noise) if with_header else b"LFPZ" + noise
    with pytest.raises(PlanarFormatError):
        decode_planar(body, np.empty((3, 21, 30), np.uint8))


@pytest.mark.parametrize(
    "body",
    [
        _with_header(BODY, version=2),
        _with_header(BODY, reserved=1),
        _with_header(BODY, channels=4),
        _with_header(BODY, height=0),
        BODY + b"x",
        BODY + zstandard.compress(b"more"),
        _with_header(BODY[:HEADER_BYTES] + zstandard.compress(bytes(3 * 21 * 32))),
        _with_header(BODY[:HEADER_BYTES] + zstandard.ZstdCompressor(write_checksum=True).compress(bytes(100))),
        _with_header(BODY + zstandard.ZstdCompressor(write_checksum=True).compress(b"more")),
        _with_header(BODY[:HEADER_BYTES] + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2016))),
    ],
    ids=["version", "reserved", "channels", "height", "longer", "longer by a frame", "no checksum", "too few pixels",
         "second frame", "no size"],
)  # fmt: skip
def test_what_the_format_does_not_allow_is_refused(body: bytes):
    with pytest.raises(PlanarFormatError):
        decode_planar(body, np.empty((3, 21, 30), np.uint8))


def test_sizes_are_bounded_before_anything_is_allocated():
    huge = _with_header(BODY, height=2**32 - 1, width=2**32 - 1)
    with pytest.raises(PlanarTooLargeError, match="at most 1000"):
        planar_size_chw(huge, 1000)
    with pytest.raises(PlanarFormatError):
        decode_planar(huge, np.empty((3, 21, 30), np.uint8))


@pytest.mark.parametrize("shape", [(3, 30, 21), (1, 21, 30), (3, 21, 31)])
def test_a_target_of_another_shape_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(ValueError, match=r"expected uint8 \(3, 21, 30\)|at most"):
        decode_planar(BODY, np.empty(shape, np.uint8))


@pytest.mark.parametrize(
    "image", [np.zeros((2, 2), np.float32), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_what_is_no_8_bit_image_is_not_encoded(image: np.ndarray):
    with pytest.raises(ValueError, match="expected"):
        encode_planar(image)
