"""Members that are not what their name says, in tars and under a manifest that agree."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from tests.pipeline.shard_forging import (
    Case,
    Files,
    Random,
    choice,
    mutation,
    npy,
    png_chunk,
    sealed,
    with_member,
    zstd,
    zstd_of_size,
)


@mutation
def sealed_array(random: Random, files: Files) -> Case:
    suffix = choice(random, ("verts.npy.zst", "keypoints.npy.zst"))
    shape, dtype = ((12, 3) if suffix.startswith("verts") else (2, 3)), "'<f4'"
    data = random.bytes(int(np.prod(shape)) * 4)
    kind = choice(random, ("header", "header", "magic", "frame", "bomb", "pickle", "nan", "frames", "data"))
    refused = True
    if kind == "header":
        fields = choice(
            random,
            (
                f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (99999999999, 3), }}",
                f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (-12, -3), }}",
                f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (0, 3), }}",
                f"{{'descr': {dtype}, 'fortran_order': True, 'shape': {shape}, }}",
                f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape[::-1]}, }}",
                f"{{'descr': {dtype}, 'fortran_order': False, 'shape': (True, 36), }}",
                f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': [('a', '|O'), ('b', '<f4')], 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': '|V0', 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': '<U1', 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': '<M8[ns]', 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': '<c8', 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': ('<f4', (1, 1)), 'fortran_order': False, 'shape': {shape}, }}",
                f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({'1, ' * 70}), }}",
                "{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (1,), }",
                "-" * 9000 + "1",
                "(" * 5000,
                "[" * 90 + "]" * 90,
                "{" * 150,
                "1" * 9000,
                "{}",
                "\xff" * 50,
                "{'descr': " + "[" * 60 + "'<f4'" + "]" * 60 + ", 'fortran_order': False, 'shape': (12, 3), }",
                "not " * 2000 + "1",
                "1" + "+1" * 4000,
                "a" + ".a" * 4000,
                "{" + "'a':1," * 1500 + "}",
                "\0" * 20,
            ),
        )
        body, what = zstd(npy(fields.encode("latin-1"), data)), fields[:60]
        refused = "(True, 36)" not in fields
    elif kind == "magic":
        whole = bytearray(npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode(), data))
        whole[int(random.integers(10))] ^= 1 << int(random.integers(8))
        body, what = zstd(bytes(whole)), ""
    elif kind == "frame":
        frame = bytearray(zstd(npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode(), data)))
        frame[int(random.integers(min(18, len(frame))))] ^= 1 << int(random.integers(8))
        body, what, refused = bytes(frame), "", False
    elif kind == "bomb":
        declared = int(choice(random, (10**6, 5 * 10**7, 2**30 + 1, 2**40)))
        fields = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({declared},), }}".encode()
        held = declared if declared < 10**9 and random.random() < 0.2 else 100
        body, what = zstd_of_size(npy(fields, bytes(held)), declared), f"{held} of {declared}"
    elif kind == "pickle":
        body, what = choice(random, (pickle.dumps([1]), zstd(pickle.dumps(np.zeros(3))))), ""
    elif kind == "nan":
        values = np.full(shape, choice(random, (np.nan, np.inf, -np.inf)), np.float32)
        body, what = (
            zstd(npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode(), values.tobytes())),
            "",
        )
    elif kind == "frames":
        whole = zstd(npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode(), data))
        body, what = (
            choice(random, (whole + whole, whole + b"tail", whole[:-1], b"\x50\x2a\x4d\x18\4\0\0\0abcd" + whole)),
            "",
        )
    else:
        body, what, refused = (
            zstd(npy(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode(), data)),
            "",
            False,
        )
    return with_member(files, random, suffix, body, f"{suffix} {kind} {what}", refused=refused)


@mutation
def sealed_png(random: Random, files: Files) -> Case:
    stored = [suffix for suffix in ("avgtex.png", "400001.image.png") if suffix.encode() in files["manifest.json"]]
    suffix = choice(random, ("hmc-cyclops.png", *stored))
    height, width = (8, 8) if suffix == "avgtex.png" else (12, 16)
    channels = 1 if suffix.startswith("hmc") else 3
    kind = choice(random, ("size", "size", "header", "bomb", "chunk", "text", "order", "rows", "stream", "other"))
    rows = b"".join(b"\0" + random.bytes(width * channels) for _ in range(height))
    declared, depth, colour, interlace = (width, height), 8, 0 if channels == 1 else 2, 0
    chunks: list[tuple[bytes, bytes]] = []
    what = ""
    if kind == "size":
        declared = choice(
            random,
            (
                (2**31 - 1, 2**31 - 1),
                (2**32 - 1, 1),
                (65_500, 65_500),
                (8192, 8192),
                (0, 0),
                (0, 5),
                (16384, 4096),
                (1, 2**26),
                (2**26, 1),
                (height + 1, width),
                (20_000, 8_000),
            ),
        )
        what = str(declared)
    elif kind == "header":
        depth, colour, interlace = (int(random.integers(0, 20)) for _ in range(3))
        what = f"{depth} {colour} {interlace}"
    elif kind == "bomb":
        declared = choice(random, ((3000, 3000), (4000, 4000), (1, 1_000_000)))
        rows, what = bytes((declared[0] * channels + 1) * declared[1]), str(declared)
    elif kind == "chunk":
        name = choice(
            random, (b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"iCCP", b"sRGB", b"acTL", b"fcTL", b"fdAT", b"eXIf")
        )
        chunks = [(name, random.bytes(int(choice(random, (0, 1, 4, 8, 26, 300)))))]
        what = name.decode()
    elif kind == "text":
        name = choice(random, (b"zTXt", b"iTXt", b"iCCP"))
        bomb = zlib.compress(bytes(int(choice(random, (10**4, 10**6, 10**7)))))
        head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[name]
        chunks, what = [(name, head + bomb)] * int(choice(random, (1, 1, 200))), name.decode()
        if len(chunks) > 1:
            chunks = [(name, head + zlib.compress(bytes(10**5)))] * 200
    elif kind == "rows":
        rows = choice(random, (rows[:-5], rows + bytes(10**6), b"", b"\x09" + rows[1:]))
    compressed = zlib.compress(rows)
    if kind == "stream":
        compressed = choice(random, (compressed[:-6], compressed[3:], random.bytes(50), b""))
    head = (b"IHDR", struct.pack(">IIBBBBB", *declared, depth, colour, 0, 0, interlace))
    order = [head, *chunks, (b"IDAT", compressed), (b"IEND", b"")]
    if kind == "order":
        order = [order[int(place)] for place in random.permutation(len(order))]
    body = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in order)
    if kind == "other":
        body = choice(
            random, (pickle.dumps([1]), b"GIF89a" + bytes(20), b"", b"<svg/>", b"%PDF-1.4", b"%!PS-Adobe\n", bytes(9))
        )
    refused = kind in ("size", "bomb", "other")
    return with_member(files, random, suffix, body, f"{suffix} {kind} {what}", refused=refused)


@mutation
def sealed_frame(random: Random, files: Files) -> Case:
    pose = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    facts: dict[str, Any] = {
        "segment": "EXP_a",
        "frame": "000000",
        "world_from_head": pose,
        "cameras": ["400001", "400002"],
        "headset": ["cyclops"],
        "keypoints": True,
    }
    key = choice(random, facts)
    depth = int(choice(random, (200, 2000, 100_000)))
    raw = choice(
        random,
        (
            b"[" * depth,
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth,
            b"\xff\xfe",
            b"",
            b"null",
            b"1",
            b'{"world_from_head": ' + b"9" * 5000 + b"}",
            pickle.dumps(facts),
            b"\xef\xbb\xbf{}",
        ),
    )
    value = choice(
        random,
        (
            None,
            "../../evil",
            10**400,
            -1,
            [],
            {},
            [[1e200] * 4] * 3,
            [[float("nan")] * 4] * 3,
            [[float("inf")] * 4] * 3,
            [["1"] * 4] * 3,
            [[1, 2], [3]],
            [[None] * 4] * 3,
            [[[1] * 4] * 3] * 9,
            [[10**400] * 4] * 3,
            [[True] * 4] * 3,
            [[{}] * 4] * 3,
            [["x"] * 4] * 3,
            "\ud800",
        ),
    )
    if random.random() < 0.4:
        body, what = raw, f"raw {raw[:12]!r} {len(raw)}"
    else:
        body, what = json.dumps(facts | {key: value}).encode(), f"{key}={value!r:.40}"
    harmless = key in ("headset", "keypoints") or raw == body
    return with_member(files, random, "frame.json", body, what, refused=not harmless, frame="EXP_a/000000")


@mutation
def sealed_npz(random: Random, files: Files) -> Case:
    name = choice(random, ("topology.npz", "normalization.npz"))
    with zipfile.ZipFile(io.BytesIO(files[name])) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    key = choice(random, members)
    kind = choice(
        random, ("without", "other", "pickle", "deep", "bomb", "encrypted", "twice", "method", "shape", "more")
    )
    method = zipfile.ZIP_STORED
    if kind == "without":
        del members[key]
    elif kind == "other":
        members[key] = choice(random, (b"", b"garbage", members[choice(random, members)], b"\x93NUMPY\1\0\xff\xff"))
    elif kind == "pickle":
        members[key] = choice(
            random,
            (pickle.dumps([1]), npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1]))),
        )
    elif kind == "deep":
        members[key] = npy(choice(random, (b"-" * 9000 + b"1", b"(" * 150, b"1" + b"+1" * 4000)), b"")
    elif kind == "bomb":
        method = zipfile.ZIP_DEFLATED
        count = int(choice(random, (10**6, 3 * 10**7)))
        members[key] = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},), }}".encode(), bytes(count))
    elif kind == "shape":
        shape = choice(random, ("(99999999999, 3)", "(0,)", "(-1,)", "()", "(2, 2)", "(1000000000,)"))
        descr = choice(random, ("<f4", "<i8", "<f8", "<U4", "<c16", "|b1"))
        fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        members[key] = npy(fields, random.bytes(64))
    elif kind == "more":
        members[choice(random, ("../evil.npy", "faces", "a" * 300, "x.pkl"))] = pickle.dumps([1])
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, method)
    body = bytearray(target.getvalue())
    central = body.find(b"PK\1\2")
    if kind == "encrypted":
        body[6] |= 1
        body[central + 8] |= 1
    elif kind == "method":
        code = int(random.integers(1, 100))
        body[8] = body[central + 10] = code
    elif kind == "twice":
        body = body + body
    return Case(
        f"{name} {kind} {key}", sealed(files, {name: bytes(body)}), sealed=True, refused=kind in ("without", "deep")
    )
