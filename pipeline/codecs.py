"""Images and arrays to bytes and back, by explicit calls over an allow-list; nothing is ever unpickled.

Sizes are bounded before anything is decoded, and a truncated file is an error.
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from typing import IO, Literal

import numpy as np
import zstandard
from PIL import Image, UnidentifiedImageError, features

from lipflow.errors import ConfigError, LipflowError

ImageCodec = Literal["png", "webp", "jpeg", "avif"]
ImageMode = Literal["RGB", "RGBA", "L"]
ResizeFilter = Literal["box", "lanczos"]

MAX_IMAGE_PIXELS = 8192 * 8192
MAX_ARRAY_BYTES = 2**30

EXTENSION_OF_CODEC: dict[str, str] = {"png": "png", "webp": "webp", "jpeg": "jpg", "avif": "avif"}
_FORMAT_OF_EXTENSION = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "avif": "AVIF"}
_ZSTD_LEVEL = 3
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
_PNG_MAX_TRAILER_BYTES = 4096
_DECODABLE_MODES = frozenset({"1", "L", "P", "RGB", "RGBA"})
_FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_NPY_ERRORS = (ValueError, EOFError, SyntaxError, struct.error, tokenize.TokenError)
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


class CodecError(LipflowError):
    """Bytes that are not what their name says, or that are too large."""


class UnreadableImageError(CodecError):
    """Bytes that are no image of the allow-list."""


class TruncatedImageError(UnreadableImageError):
    """An image that ends before its last pixel."""


class ImageBombError(CodecError):
    """An image that would decode to more pixels than any camera has."""


def check_codec(codec: ImageCodec) -> None:
    """Refuse a codec that the installed Pillow lacks.

    Raises:
        ConfigError: with the codecs to choose from.
    """
    if codec in ("webp", "avif") and not features.check(codec):
        raise ConfigError(f"codec={codec}: the installed Pillow cannot write it; choose png or jpeg")


def decode_image(body: bytes, name: str, mode: ImageMode = "RGB") -> np.ndarray:
    """Decode an image whose format is told by the extension of ``name``.

    Returns:
        uint8, ``(H, W, 3)`` for ``"RGB"``, ``(H, W, 4)`` for ``"RGBA"`` (alpha 255 where the file has none),
        ``(H, W)`` for ``"L"``; row 0 is the top of the file.

    Raises:
        CodecError: another extension or format, too many pixels, a truncated or broken file.
    """
    extension = name.rpartition(".")[2].lower()
    expected = _FORMAT_OF_EXTENSION.get("jpg" if extension == "jpeg" else extension)
    if expected is None:
        raise CodecError(f"{name}: expected an image ({', '.join(sorted(_FORMAT_OF_EXTENSION))})")
    return _decode(body, name, mode, (expected,))


def decode_any_image(body: bytes, name: str, mode: ImageMode = "RGB") -> np.ndarray:
    """Like :func:`decode_image` for captures: the format is told by the bytes, over the same allow-list."""
    return _decode(body, name, mode, tuple(_FORMAT_OF_EXTENSION.values()))


def _decode(body: bytes, name: str, mode: ImageMode, formats: tuple[str, ...]) -> np.ndarray:
    if body.startswith(_PNG_START) and _PNG_END not in body[-_PNG_MAX_TRAILER_BYTES:]:
        raise TruncatedImageError(f"{name}: a PNG without its end: it is truncated; fetch it again")
    if body.startswith(_PNG_START):
        _check_png_chunks(body, name)
    try:
        with Image.open(io.BytesIO(body), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageBombError(f"{name}: {width}x{height} pixels, at most {MAX_IMAGE_PIXELS} are decoded")
            if image.mode not in _DECODABLE_MODES:
                raise UnreadableImageError(f"{name}: pixel format {image.mode}, expected 8-bit RGB or grey")
            return np.asarray(image.convert(mode))
    except Image.DecompressionBombError as error:
        raise ImageBombError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name}: the bytes are no {' or '.join(formats)} image; fetch it again") from error
    except _IMAGE_ERRORS as error:
        kind = TruncatedImageError if "truncated" in str(error) else UnreadableImageError
        raise kind(f"{name}: not a whole {' or '.join(formats)} image ({error})") from error


def _check_png_chunks(body: bytes, name: str) -> None:
    """Compare the checksums of the pixel data, which Pillow does not: flipped bits would decode to other pixels."""
    view, offset = memoryview(body), len(_PNG_START)
    while offset + 12 <= len(body):
        end = offset + 8 + int.from_bytes(view[offset : offset + 4], "big")
        if int.from_bytes(view[end : end + 4], "big") != zlib.crc32(view[offset + 4 : end]):
            raise UnreadableImageError(f"{name}: a PNG chunk's checksum differs from its bytes; fetch it again")
        if view[offset + 4 : offset + 8] == b"IEND":
            return
        offset = end + 4


def image_size_hw(stream: IO[bytes], name: str) -> tuple[int, int]:
    """(height, width) from an image's header alone.

    Raises:
        CodecError: no image of the allow-list, or one of too many pixels.
    """
    try:
        with Image.open(stream, formats=tuple(_FORMAT_OF_EXTENSION.values())) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ImageBombError(f"{name}: {image.width}x{image.height} pixels, at most {MAX_IMAGE_PIXELS}")
            return image.height, image.width
    except Image.DecompressionBombError as error:
        raise ImageBombError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name}: not a readable image; fetch it again") from error
    except _IMAGE_ERRORS as error:
        raise UnreadableImageError(f"{name}: not a readable image ({error}); fetch it again") from error


def is_plain_png(body: bytes, mode: ImageMode) -> bool:
    """Whether the bytes are an 8-bit, non-interlaced PNG of exactly that mode, which can be stored as it is."""
    colour_type = {"RGB": 2, "RGBA": 6, "L": 0}[mode]
    return body.startswith(_PNG_START) and body[24:26] == bytes([8, colour_type]) and body[28:29] == b"\0"


def encode_image(image: np.ndarray, codec: ImageCodec, quality: int = 95) -> bytes:
    """Encode ``(H, W)``, ``(H, W, 3)`` or, but for JPEG, ``(H, W, 4)`` uint8.

    PNG and WebP are lossless; ``quality`` is for JPEG and AVIF.
    """
    target = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image))
    if codec == "png":
        picture.save(target, "PNG", compress_level=6)
    elif codec == "webp":
        picture.save(target, "WEBP", lossless=True, exact=True, method=4, quality=50)
    elif codec == "jpeg":
        picture.save(target, "JPEG", quality=quality, subsampling=0)
    else:
        picture.save(target, "AVIF", quality=quality, subsampling="4:4:4")
    return target.getvalue()


def resize_image(image: np.ndarray, size_hw: tuple[int, int], resize_filter: ResizeFilter = "box") -> np.ndarray:
    """Resample uint8 ``(H, W[, 3 or 4])`` or float32 ``(H, W)``; each output pixel averages its footprint.

    Colours are averaged with the weight of their alpha.
    """
    if image.shape[:2] == tuple(size_hw):
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((size_hw[1], size_hw[0]), _FILTERS[resize_filter]))


def encode_array(array: np.ndarray) -> bytes:
    """``npy`` without pickle, compressed by zstandard."""
    target = io.BytesIO()
    np.lib.format.write_array(target, np.asarray(array, order="C"), version=(1, 0), allow_pickle=False)
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(target.getvalue())


def decode_array(body: bytes, name: str) -> np.ndarray:
    """The array of a ``.npy.zst`` member.

    Raises:
        CodecError: not such an array, an array of objects, or one whose header and size disagree.
    """
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if not 0 <= size <= MAX_ARRAY_BYTES:
            raise CodecError(f"{name}: an array of unknown size or above {MAX_ARRAY_BYTES} bytes is not decoded")
        stream = io.BytesIO(zstandard.ZstdDecompressor().decompress(body, max_output_size=size))
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise CodecError(f"{name}: npy version {version}, expected (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except (zstandard.ZstdError, *_NPY_ERRORS) as error:
        raise CodecError(f"{name}: not a npy.zst array ({error})") from error
    values = stream.read()
    if dtype.hasobject or fortran_order or len(values) != math.prod(shape) * dtype.itemsize:
        raise CodecError(f"{name}: a npy header {dtype} {shape} that does not fit its {len(values)} bytes")
    return np.frombuffer(values, dtype).reshape(shape).copy()


def encode_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The bytes of an uncompressed ``npz``; the same arrays give the same bytes."""
    target = io.BytesIO()
    np.savez(target, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    return target.getvalue()


def decode_npz(body: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of an ``npz``; objects are refused.

    Raises:
        CodecError: not a readable npz, or one that declares more than it can hold.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        if declared > MAX_ARRAY_BYTES:
            raise CodecError(f"{name}: declares {declared} bytes of arrays, at most {MAX_ARRAY_BYTES} are decoded")
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (*_NPY_ERRORS, OSError, KeyError, zlib.error, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        raise CodecError(f"{name}: not a npz archive of plain arrays ({error})") from error
