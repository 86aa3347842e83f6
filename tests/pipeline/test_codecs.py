"""Codecs: lossless where promised, bounded, and never an unpickled object."""

from __future__ import annotations

import io
import pickle
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images import codecs
from pipeline.images.codecs import (
    CodecError,
    decode_array,
    decode_image,
    decode_image_into,
    encode_array,
    encode_image,
    resize_image,
)

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("codec", ["png", "webp", "planar"])
def test_lossless_codecs_are(codec: codecs.ImageCodec):
    name = f"x.{codecs.EXTENSION_OF_CODEC[codec]}"
    np.testing.assert_array_equal(decode_image(encode_image(IMAGE, codec), name), IMAGE)
    grey = np.ascontiguousarray(IMAGE[..., 0])
    np.testing.assert_array_equal(decode_image(encode_image(grey, codec), name, "L"), grey)
    np.testing.assert_array_equal(decode_image(encode_image(grey, codec), name), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("layout", ["planes", "interleaved"])
@pytest.mark.parametrize("bottom_up", [False, True])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("codec", list(codecs.EXTENSION_OF_CODEC))
def test_decoding_into_memory_equals_decoding(codec: codecs.ImageCodec, channels: int, bottom_up: bool, layout: str):
    codecs.check_codec(codec)
    name = f"x.{codecs.EXTENSION_OF_CODEC[codec]}"
    for image in (IMAGE, IMAGE[..., 1]):
        body = encode_image(image, codec)
        planes, pixels = np.full((channels, 20, 30), 7, np.uint8), np.full((20, 30, channels), 7, np.uint8)
        target = planes if layout == "planes" else pixels.transpose(2, 0, 1)
        decode_image_into(body, name, target, bottom_up=bottom_up)
        expected = np.atleast_3d(decode_image(body, name, "RGB" if channels == 3 else "L")).transpose(2, 0, 1)
        np.testing.assert_array_equal(target, expected[:, ::-1] if bottom_up else expected)


@pytest.mark.parametrize("codec", ["png", "planar", "jpeg"])
def test_an_image_of_another_size_is_not_decoded(codec: codecs.ImageCodec):
    name = f"x.{codecs.EXTENSION_OF_CODEC[codec]}"
    with pytest.raises(CodecError, match=f"{name}: 20 x 30 pixels, expected 30 x 20"):
        decode_image_into(encode_image(IMAGE, codec), name, np.empty((3, 30, 20), np.uint8))


def _saved(picture: Image.Image, file_format: str, **settings: object) -> bytes:
    target = io.BytesIO()
    picture.save(target, file_format, **settings)
    return target.getvalue()


def _png_of_sixteen_bits() -> bytes:
    """RGB, which Pillow decodes and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = np.insert(IMAGE.repeat(2, axis=2).reshape(20, -1), 0, 0, axis=1)
    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


_PICTURE = Image.fromarray(IMAGE)
_WITH_ALPHA = Image.fromarray(np.dstack([IMAGE, IMAGE[..., :1]]))
_KINDS = {
    "filtered.png": _saved(_PICTURE, "PNG", compress_level=1),
    "palette.png": _saved(_PICTURE.quantize(7), "PNG"),
    "palette-of-one-bit.png": _saved(_PICTURE.quantize(2), "PNG"),
    "one-bit.png": _saved(_PICTURE.convert("1"), "PNG"),
    "alpha.png": _saved(_WITH_ALPHA, "PNG"),
    "transparent-colour.png": _saved(_PICTURE, "PNG", transparency=(1, 2, 3)),
    "sixteen-bit.png": _png_of_sixteen_bits(),
    "lossy.webp": _saved(_PICTURE, "WEBP", quality=60),
    "alpha.webp": _saved(_WITH_ALPHA, "WEBP", lossless=True, exact=True),
    "first-of-two.webp": _saved(_PICTURE, "WEBP", save_all=True, append_images=[_PICTURE.rotate(180)], lossless=True),
}


@pytest.mark.parametrize("name", list(_KINDS))
def test_png_and_webp_of_every_kind_decode_to_pillows_pixels(name: str):
    body = _KINDS[name]
    for mode, channels in (("RGB", 3), ("L", 1)):
        expected = np.atleast_3d(np.asarray(Image.open(io.BytesIO(body)).convert(mode))).transpose(2, 0, 1)
        pixels = np.full((20, 30, channels), 7, np.uint8)
        for target in (pixels.transpose(2, 0, 1), np.full((channels, 20, 30), 7, np.uint8)):
            decode_image_into(memoryview(body), name, target)
            np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("codec", ["jpeg", "avif"])
def test_lossy_codecs_are_close_on_smooth_images(codec: codecs.ImageCodec):
    """Worst measured error 4 of 255 (AVIF)."""
    codecs.check_codec(codec)
    rows, columns = np.mgrid[0:32, 0:32]
    smooth = np.stack([rows * 8, columns * 8, (rows + columns) * 4], axis=-1).astype(np.uint8)
    decoded = decode_image(encode_image(smooth, codec), f"x.{codecs.EXTENSION_OF_CODEC[codec]}")
    assert np.abs(decoded.astype(int) - smooth).max() <= 10


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_pixels_are_those_of_pillow(subsampling: str, progressive: bool):
    rows, columns = np.mgrid[0:37, 0:51]
    for image in (IMAGE, np.stack([rows * 6, columns * 5, (rows + columns) * 2], axis=-1).astype(np.uint8)):
        target = io.BytesIO()
        picture = Image.fromarray(image)
        picture.save(target, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(io.BytesIO(target.getvalue())))
        np.testing.assert_array_equal(decode_image(target.getvalue(), "x.jpg"), expected)


@pytest.mark.parametrize(("file_format", "name"), [("JPEG", "x.jpg"), ("PNG", "x.png"), ("WEBP", "x.webp")])
def test_images_are_decoded_without_the_gil(file_format: str, name: str):
    """Another thread runs Python code in the middle of a decode: it finds the first row written and the last one not.

    Measured at four times the pixels, in each decode: jpeg 153 to 267 times, png 26, webp 145; and never with a decoder
    that holds the GIL.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 1500, 3), np.uint8)
    body = _saved(Image.fromarray(pixels), file_format, compress_level=1, lossless=True, exact=True, method=0)
    decode_image_into(body, name, pixels.transpose(2, 0, 1))
    found_in_the_middle = 0
    for _ in range(20):
        target = np.zeros_like(pixels)
        thread = threading.Thread(target=decode_image_into, args=(body, name, target.transpose(2, 0, 1)))
        thread.start()
        while thread.is_alive():
            found_in_the_middle += bool(target[0].any() and not target[-1].any())
            time.sleep(1e-3)
        np.testing.assert_array_equal(target, pixels)
        if found_in_the_middle:
            return
    pytest.fail("no other thread ran while 20 photos were decoded")


def test_half_chroma_is_smaller_and_as_bright():
    """A grey image comes out the same; of a coloured one, 4:2:0 loses more. Worst measured error of grey: 3 of 255."""
    rows, columns = np.mgrid[0:64, 0:64]
    grey = np.repeat((128 + 60 * np.sin(rows / 5) * np.cos(columns / 7)).astype(np.uint8)[..., None], 3, axis=2)
    coloured = grey.copy()
    coloured[..., 0] = np.where(columns % 4 < 2, 0, 255)
    for codec, name in (("jpeg", "x.jpg"), ("avif", "x.avif")):
        codecs.check_codec(codec)
        errors = {
            (chroma, which): np.abs(decode_image(encode_image(image, codec, 95, chroma), name).astype(int) - image)
            for chroma in ("444", "420")
            for which, image in (("grey", grey), ("coloured", coloured))
        }
        assert errors["420", "grey"].max() <= 6
        assert errors["420", "coloured"].mean() > 2 * errors["444", "coloured"].mean()
        assert len(encode_image(coloured, codec, 95, "420")) < len(encode_image(coloured, codec, 95, "444"))


def test_a_jpeg_with_damage_that_decoders_repair_is_refused():
    body = bytearray(encode_image(np.tile(IMAGE, (4, 4, 1)), "jpeg"))
    body[len(body) // 2 : len(body) // 2 + 2] = b"\xff\xd3"  # a restart marker where there is none
    assert np.asarray(Image.open(io.BytesIO(body))).shape == (80, 120, 3)
    for decode in (decode_image, lambda data, name: decode_image_into(data, name, np.empty((3, 80, 120), np.uint8))):
        with pytest.raises(codecs.UnreadableImageError, match=r"x\.jpg: not a whole JPEG image"):
            decode(bytes(body), "x.jpg")


def test_jpeg_files_in_inks_are_refused():
    target = io.BytesIO()
    Image.fromarray(IMAGE).convert("CMYK").save(target, "JPEG")
    with pytest.raises(CodecError, match="pixel format CMYK"):
        decode_image(target.getvalue(), "x.jpg")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["png", "webp", "jpeg", "planar"]))
def test_truncated_images_are_refused(cut: int, codec: codecs.ImageCodec):
    whole, name = encode_image(IMAGE, codec), f"x.{codecs.EXTENSION_OF_CODEC[codec]}"
    body = whole[: cut % (len(whole) - 12)]
    with pytest.raises(CodecError, match=name):
        decode_image(body, name)
    with pytest.raises(CodecError, match=name):
        decode_image_into(memoryview(body), name, np.empty((3, 20, 30), np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_of_a_png_is_refused(place: int, bit: int):
    body = bytearray(encode_image(IMAGE, "png"))
    body[place % len(body)] ^= 1 << bit
    with pytest.raises(CodecError, match=r"x\.png"):
        decode_image_into(body, "x.png", np.empty((3, 20, 30), np.uint8))


def test_pixel_data_of_a_png_that_end_early_are_refused():
    """With checksums that are right: what libpng itself finds."""
    whole = encode_image(IMAGE, "png")
    start, end = whole.index(b"IDAT"), whole.index(b"IEND") - 8
    cut = zlib.compress(zlib.decompress(whole[start + 4 : end])[:-40])
    chunk = b"IDAT" + cut
    body = whole[: start - 4] + struct.pack(">I", len(cut)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(codecs.UnreadableImageError, match=r"x\.png: not a whole PNG image"):
        decode_image_into(body + whole[end + 4 :], "x.png", np.empty((3, 20, 30), np.uint8))


def test_the_format_must_be_that_of_the_name():
    with pytest.raises(CodecError, match=r"x\.jpg"):
        decode_image(encode_image(IMAGE, "png"), "x.jpg")
    with pytest.raises(CodecError, match="expected an image"):
        decode_image(encode_image(IMAGE, "png"), "x.pkl")


def test_huge_images_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codecs, "MAX_IMAGE_PIXELS", 599)
    for name, codec in (("x.png", "png"), ("x.plz", "planar"), ("x.jpg", "jpeg")):
        with pytest.raises(CodecError, match=f"{name}: 30x20 pixels, at most 599"):
            decode_image(encode_image(IMAGE, codec), name)


def test_sixteen_bit_images_are_refused():
    target = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(target, "PNG")
    with pytest.raises(CodecError, match="8-bit"):
        decode_image(target.getvalue(), "x.png")


def test_plain_png_is_told_from_others():
    assert codecs.is_plain_png(encode_image(IMAGE, "png"), "RGB")
    assert not codecs.is_plain_png(encode_image(IMAGE, "png"), "L")
    assert codecs.is_plain_png(encode_image(IMAGE[..., 0], "png"), "L")
    assert not codecs.is_plain_png(encode_image(IMAGE, "jpeg"), "RGB")


def test_reducing_by_two_averages_blocks():
    reduced = resize_image(IMAGE, (10, 15)).astype(float)
    blocks = IMAGE.reshape(10, 2, 15, 2, 3).mean((1, 3))
    assert np.abs(reduced - blocks).max() <= 1.0  # rounding of each axis, measured 1.0 at most
    mask = np.random.default_rng(1).random((8, 8), np.float32)
    np.testing.assert_allclose(resize_image(mask, (4, 4)), mask.reshape(4, 2, 4, 2).mean((1, 3)), rtol=1e-6)


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3)), np.array(3)])
def test_arrays_come_back_bitwise(array: np.ndarray):
    back = decode_array(encode_array(array), "x.npy.zst")
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)


def _npy(header: bytes, values: bytes) -> bytes:
    return zstandard.compress(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not zstandard",
        zstandard.compress(b"not npy"),
        zstandard.compress(pickle.dumps({"a": 1})),
        _npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", pickle.dumps([1])),
        _npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,)}\n", b"1234"),
        encode_array(np.arange(1000))[:-20],
    ],
    ids=["empty", "no zstandard", "no npy", "pickle", "objects", "header too large", "truncated"],
)
def test_what_is_no_plain_array_is_refused(body: bytes):
    with pytest.raises(CodecError, match=r"x\.npy\.zst"):
        decode_array(body, "x.npy.zst")


def test_arrays_above_the_bound_are_not_decompressed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codecs, "MAX_ARRAY_BYTES", 1000)
    with pytest.raises(CodecError, match="above 1000 bytes"):
        decode_array(encode_array(np.zeros(10000)), "x.npy.zst")


def test_npz_files_have_the_same_bytes_each_time_and_refuse_objects():
    arrays = {"a": np.arange(3), "names": np.array(["x", "yy"])}
    assert codecs.encode_npz(arrays) == codecs.encode_npz(arrays)
    back = codecs.decode_npz(codecs.encode_npz(arrays), "x.npz")
    np.testing.assert_array_equal(back["names"], arrays["names"])
    target = io.BytesIO()
    np.savez(target, a=np.array([{}], dtype=object))
    with pytest.raises(CodecError, match=r"x\.npz"):
        codecs.decode_npz(target.getvalue(), "x.npz")
