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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal

import numpy as np
import zstandard
from PIL import Image, UnidentifiedImageError, features

from lipflow.errors import ConfigError, LipflowError
from pipeline.images.in_place import DamagedImageError, decode_in_place
from pipeline.images.jpeg import JpegFormatError, decode_jpeg, jpeg_size_hw
from pipeline.images.planar import PlanarFormatError, PlanarTooLargeError, decode_planar, encode_planar, planar_size_chw

ImageCodec = Literal["png", "webp", "jpeg", "avif", "planar"]
LosslessCodec = Literal["png", "webp", "planar"]
Chroma = Literal["444", "420"]
ImageMode = Literal["RGB", "RGBA", "L"]
ResizeFilter = Literal["box", "lanczos"]

MAX_IMAGE_PIXELS = 8192 * 8192
MAX_ARRAY_BYTES = 2**30

EXTENSION_OF_CODEC: dict[str, str] = {"png": "png", "webp": "webp", "jpeg": "jpg", "avif": "avif", "planar": "plz"}
_FORMAT_OF_EXTENSION = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG", "avif": "AVIF"}
_ZSTD_LEVEL = 3
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xae\x42\x60\x82"
_PNG_MAX_TRAILER_BYTES = 4096
_DECODABLE_MODES = frozenset({"1", "L", "P", "RGB", "RGBA"})
_FILTERS = {"box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_NUMBER_KINDS = frozenset("biuf")
_NPY_ERRORS = (ValueError, EOFError, SyntaxError, RecursionError, MemoryError, struct.error, tokenize.TokenError)
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
        raise ConfigError(f"codec={codec}: the installed Pillow cannot write it; choose planar, png or jpeg")


def decode_image(body: bytes, name: str, mode: ImageMode = "RGB") -> np.ndarray:
    """Decode an image whose format is told by the extension of ``name``.

    Returns:
        uint8, ``(H, W, 3)`` for ``"RGB"``, ``(H, W, 4)`` for ``"RGBA"`` (alpha 255 where the file has none),
        ``(H, W)`` for ``"L"``; row 0 is the top of the file.

    Raises:
        CodecError: another extension or format, too many pixels, a truncated or broken file.
    """
    if _has_extension(name, "planar"):
        planes = np.empty(_planar_size_chw(body, name), np.uint8)
        _decode_planar(body, name, planes)
        pixels = planes[0] if len(planes) == 1 else np.ascontiguousarray(planes.transpose(1, 2, 0))
        own_mode = "L" if len(planes) == 1 else "RGB"
        return pixels if mode == own_mode else np.asarray(Image.fromarray(pixels).convert(mode))
    if _has_extension(name, "jpeg") and mode == "RGB":
        pixels = np.empty((*_jpeg_size_hw(body, name), 3), np.uint8)
        with _jpeg_errors_named(name):
            decode_jpeg(body, pixels)
        return pixels
    with _opened(body, name, mode, (_format_of(name),)) as image:
        return np.asarray(image)


def decode_image_into(body: bytes | memoryview, name: str, target: np.ndarray, *, bottom_up: bool = False) -> None:
    """Decode an image of a shard straight into its memory; the GIL is given back while pixels are decoded.

    Memory of the codec's own layout is filled fastest, see :func:`is_interleaved`.

    Args:
        body: the file.
        name: whose extension tells the format.
        target: ``(3, H, W)`` or, for grey, ``(1, H, W)`` uint8, either C-contiguous planes or a view of C-contiguous
            ``(H, W, C)`` memory; undefined after an error.
        bottom_up: whether row 0 of ``target`` is the bottom of the file.

    Raises:
        CodecError: as for :func:`decode_image`, or the image is not of the target's size.
    """
    interleaved = target.transpose(1, 2, 0)
    channels = len(target)
    if _has_extension(name, "planar"):
        stored_channels, height, width = _planar_size_chw(body, name)
        _check_size((height, width), target.shape[1:], name)
        if stored_channels == channels and target.flags.c_contiguous:
            _decode_planar(body, name, target, bottom_up=bottom_up)
            return
    if interleaved.flags.c_contiguous and not bottom_up:
        _decode_pixels(body, name, interleaved)
        return
    pixels = np.empty(interleaved.shape, np.uint8)
    _decode_pixels(body, name, pixels)
    for channel in range(channels):
        target[channel] = pixels[:: -1 if bottom_up else 1, :, channel]


def _decode_pixels(body: bytes | memoryview, name: str, pixels: np.ndarray) -> None:
    """Decode an image of the size of ``pixels (H, W, 3)`` or, for grey, ``(H, W, 1)``, C-contiguous."""
    mode: ImageMode = "L" if pixels.shape[2] == 1 else "RGB"
    if _has_extension(name, "planar"):
        pixels[...] = np.atleast_3d(decode_image(bytes(body), name, mode))
        return
    if _has_extension(name, "jpeg") and mode == "RGB":
        _check_size(_jpeg_size_hw(body, name), pixels.shape[:2], name)
        with _jpeg_errors_named(name):
            decode_jpeg(body, pixels)
        return
    file_format = _format_of(name)
    _check_png(body, name)
    try:
        if decode_in_place(body, file_format, pixels):
            return
    except DamagedImageError as error:
        raise UnreadableImageError(f"{name}: not a whole {file_format} image ({error})") from error
    with _opened(bytes(body), name, mode, (file_format,), pixels.shape[:2]) as image:
        pixels[...] = np.atleast_3d(np.asarray(image))


def is_interleaved(codec: str) -> bool:
    """Whether a codec decodes to ``(H, W, 3)`` memory, and not to planes."""
    return codec != "planar"


def decode_any_image(body: bytes, name: str, mode: ImageMode = "RGB") -> np.ndarray:
    """Like :func:`decode_image` for captures: the format is told by the bytes, over the same allow-list."""
    with _opened(body, name, mode, tuple(_FORMAT_OF_EXTENSION.values())) as image:
        return np.asarray(image)


@contextmanager
def _opened(
    body: bytes, name: str, mode: ImageMode, formats: tuple[str, ...], expected_hw: tuple[int, ...] | None = None
) -> Iterator[Image.Image]:
    """The image, decoded and in ``mode``; errors are translated. One of another size than expected is not decoded."""
    _check_png(body, name)
    try:
        with Image.open(io.BytesIO(body), formats=formats) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ImageBombError(f"{name}: {width}x{height} pixels, at most {MAX_IMAGE_PIXELS} are decoded")
            if image.mode not in _DECODABLE_MODES:
                raise UnreadableImageError(f"{name}: pixel format {image.mode}, expected 8-bit RGB or grey")
            if expected_hw is not None:
                _check_size((height, width), expected_hw, name)
            image.load()
            # convert() copies even where there is nothing to convert
            yield image if image.mode == mode else image.convert(mode)
    except Image.DecompressionBombError as error:
        raise ImageBombError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name}: the bytes are no {' or '.join(formats)} image; fetch it again") from error
    except _IMAGE_ERRORS as error:
        kind = TruncatedImageError if "truncated" in str(error) else UnreadableImageError
        raise kind(f"{name}: not a whole {' or '.join(formats)} image ({error})") from error


def _has_extension(name: str, codec: ImageCodec) -> bool:
    return name.lower().endswith("." + EXTENSION_OF_CODEC[codec])


def _jpeg_size_hw(body: bytes | memoryview, name: str) -> tuple[int, int]:
    with _jpeg_errors_named(name):
        height, width = jpeg_size_hw(body)
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageBombError(f"{name}: {width}x{height} pixels, at most {MAX_IMAGE_PIXELS} are decoded")
    return height, width


@contextmanager
def _jpeg_errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except JpegFormatError as error:
        kind = TruncatedImageError if "remature end" in str(error) else UnreadableImageError
        raise kind(f"{name}: not a whole JPEG image ({error})") from error


def _planar_size_chw(body: bytes | memoryview, name: str) -> tuple[int, int, int]:
    try:
        return planar_size_chw(body, MAX_IMAGE_PIXELS)
    except PlanarTooLargeError as error:
        raise ImageBombError(f"{name}: {error}") from error
    except PlanarFormatError as error:
        raise UnreadableImageError(f"{name}: not a whole planar image ({error}); fetch it again") from error


def _decode_planar(body: bytes | memoryview, name: str, target: np.ndarray, *, bottom_up: bool = False) -> None:
    try:
        decode_planar(body, target, bottom_up=bottom_up)
    except PlanarFormatError as error:
        raise UnreadableImageError(f"{name}: not a whole planar image ({error}); fetch it again") from error


def _format_of(name: str) -> str:
    extension = name.rpartition(".")[2].lower()
    expected = _FORMAT_OF_EXTENSION.get("jpg" if extension == "jpeg" else extension)
    if expected is None:
        raise CodecError(f"{name}: expected an image ({', '.join(sorted(EXTENSION_OF_CODEC.values()))})")
    return expected


def _check_size(size_hw: tuple[int, int], expected_hw: tuple[int, ...], name: str) -> None:
    if size_hw != expected_hw:
        raise CodecError(f"{name}: {size_hw[0]} x {size_hw[1]} pixels, expected {expected_hw[0]} x {expected_hw[1]}")


def _check_png(body: bytes | memoryview, name: str) -> None:
    """Look for the end of a PNG and compare the checksums of all chunks; of other formats, nothing.

    Pillow does not compare those of pixels, and flipped bits would decode to others; libpng prints what is wrong.
    """
    view, offset = memoryview(body), len(_PNG_START)
    if view[:offset] != _PNG_START:
        return
    if _PNG_END not in bytes(view[-_PNG_MAX_TRAILER_BYTES:]):
        raise TruncatedImageError(f"{name}: a PNG without its end: it is truncated; fetch it again")
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


def encode_image(image: np.ndarray, codec: ImageCodec, quality: int = 95, chroma: Chroma = "444") -> bytes:
    """Encode ``(H, W)``, ``(H, W, 3)`` or, but for JPEG and planar, ``(H, W, 4)`` uint8.

    PNG, WebP and planar (:mod:`pipeline.images.planar`) are lossless; ``quality`` and ``chroma`` are for JPEG and AVIF.
    """
    subsampling = ":".join(chroma)
    target = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image))
    if codec == "png":
        picture.save(target, "PNG", compress_level=6)
    elif codec == "webp":
        picture.save(target, "WEBP", lossless=True, exact=True, method=4, quality=50)
    elif codec == "jpeg":
        picture.save(target, "JPEG", quality=quality, subsampling=subsampling)
    elif codec == "planar":
        return encode_planar(image)
    else:
        picture.save(target, "AVIF", quality=quality, subsampling=subsampling)
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
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).compress(target.getvalue())


def decode_array(body: bytes | memoryview, name: str, max_bytes: int | None = None) -> np.ndarray:
    """The array of a ``.npy.zst`` member; ``max_bytes`` bounds it with its header.

    Raises:
        CodecError: not such an array, an array of objects, or one whose header and size disagree.
    """
    try:
        size = zstandard.get_frame_parameters(body).content_size
        bound = MAX_ARRAY_BYTES if max_bytes is None else max_bytes
        if not 0 <= size <= bound:
            raise CodecError(f"{name}: an array of unknown size or above {bound} bytes is not decoded")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
        stream = io.BytesIO(plain)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise CodecError(f"{name}: npy version {version}, expected (1, 0)")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except (zstandard.ZstdError, *_NPY_ERRORS) as error:
        raise CodecError(f"{name}: not a npy.zst array ({error})") from error
    values = memoryview(plain)[stream.tell() :]
    shape = tuple(int(side) for side in shape)
    fits = all(side >= 0 for side in shape) and len(values) == math.prod(shape) * dtype.itemsize
    if dtype.kind not in _NUMBER_KINDS or fortran_order or not fits:
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
            loaded = {key: arrays[key] for key in arrays.files}
    except (*_NPY_ERRORS, OSError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise CodecError(f"{name}: not a npz archive of plain arrays ({error})") from error
    for key, array in loaded.items():
        if not isinstance(array, np.ndarray):  # what has no npy header comes back as bytes
            raise CodecError(f"{name}: its member {key} is not an array")
    return loaded
