"""Ways to damage a shard set: each a pure function of a generator and the files of a sound set.

*Unsealed*: files are changed and the digests are left as they were, as a disk or a network does. *Sealed*: the
manifest is made to agree with the changed bytes, as a defective or hostile writer does, so that the parsers behind
the digests are reached.
"""

from __future__ import annotations

import json
import pickle
from typing import Any

from pipeline.sealing import seal, unseal
from tests.pipeline.sealed_manifests import parsed, sealed_json
from tests.pipeline.shard_forging import (
    BLOCK,
    FIRST_SHARD,
    OTHER_SHARD,
    Case,
    Files,
    Random,
    TarEntries,
    choice,
    entry,
    mutation,
    of_size,
    pax_record,
    sealed,
    with_checksum,
)

_HUGE = (2**31, 2**33, 2**40, 2**63 - 1, 2**64, 10**30)


def _damaged_bytes(random: Random, body: bytes) -> tuple[str, bytes]:
    """Flipped, cut, added, zeroed, repeated or exchanged bytes, up to three at a time."""
    done, changed = [], bytearray(body)
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(max(1, len(changed))))
        length = int(choice(random, (1, 4, 16, 100, BLOCK)))
        kind = choice(random, ("flip", "flip", "flip", "byte", "cut", "delete", "insert", "zero", "repeat", "exchange"))
        if not changed:
            break
        done.append(f"{kind} {place} {length}")
        if kind == "flip":
            changed[place] ^= 1 << int(random.integers(8))
        elif kind == "byte":
            changed[place] = int(random.integers(256))
        elif kind == "cut":
            del changed[place:]
        elif kind == "delete":
            del changed[place : place + length]
        elif kind == "insert":
            changed[place:place] = random.bytes(length)
        elif kind == "zero":
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + length]
        else:
            other = int(random.integers(len(changed)))
            changed[place], changed[other] = changed[other], changed[place]
    return ", ".join(done), bytes(changed)


# What happens to files: the digests stay.


@mutation
def damaged_shard(random: Random, files: Files) -> Case:
    name = choice(random, (FIRST_SHARD, OTHER_SHARD))
    what, body = _damaged_bytes(random, files[name])
    return Case(f"{name} {what}", {name: body})


@mutation
def damaged_set_file(random: Random, files: Files) -> Case:
    name = choice(random, ("topology.npz", "normalization.npz"))
    what, body = _damaged_bytes(random, files[name])
    return Case(f"{name} {what}", {name: body})


@mutation
def damaged_manifest(random: Random, files: Files) -> Case:
    what, body = _damaged_bytes(random, files["manifest.json"])
    return Case(what, {"manifest.json": body}, refused=body != files["manifest.json"])


@mutation
def manifest_with_a_digit_changed(random: Random, files: Files) -> Case:
    """One bit of a letter or a digit between quotes or of a number: the manifest stays JSON, and often plausible."""
    body = bytearray(files["manifest.json"])
    places = [place for place, byte in enumerate(body) if chr(byte).isalnum()]
    place = int(choice(random, places))
    flips = [bit for bit in range(7) if chr(body[place] ^ 1 << bit).isalnum()]
    body[place] ^= 1 << int(choice(random, flips))
    return Case(f"{place}", {"manifest.json": bytes(body)}, refused=True)


@mutation
def manifest_edited_under_its_old_checksum(random: Random, files: Files) -> Case:
    """Every value of it may be one that a sound manifest could have."""
    document = json.loads(files["manifest.json"])
    other = parsed(manifest_of_other_values(random, files).files["manifest.json"] or b"")
    text = json.dumps(other | {"checksum": document["checksum"]}, separators=(",", ":")).encode()
    return Case("values", {"manifest.json": text}, refused=text != files["manifest.json"])


@mutation
def exchanged_or_absent_files(random: Random, files: Files) -> Case:
    first, second = choice(random, files), choice(random, files)
    if first == second or random.random() < 0.3:
        return Case(f"no {first}", {first: None})
    return Case(f"{first} <> {second}", {first: files[second], second: files[first]})


@mutation
def members_exchanged(random: Random, files: Files) -> Case:
    """Two members of equal padded size, headers and all."""
    shard = TarEntries(files[FIRST_SHARD])
    first, second = (int(place) for place in random.choice(len(shard.entries), 2, replace=False))
    entries = shard.entries
    entries[first], entries[second] = entries[second], entries[first]
    return Case(f"{first} <> {second}", {FIRST_SHARD: shard.body()})


# Manifests that say something else.


@mutation
def manifest_of_other_values(random: Random, files: Files) -> Case:
    document = parsed(files["manifest.json"])
    what = []
    for _ in range(int(random.integers(1, 3))):
        holder, key = _a_place(random, document)
        value = choice(random, _ODD_VALUES)
        value = value(holder[key]) if callable(value) else value
        what.append(f"{key}={value!r:.60}")
        holder[key] = value
    return Case(", ".join(what), {"manifest.json": sealed_json(document)}, sealed=True)


@mutation
def manifest_without_or_with_more(random: Random, files: Files) -> Case:
    document = parsed(files["manifest.json"])
    holder, key = _a_place(random, document)
    kind = choice(random, ("without", "twice", "also"))
    if kind == "without" or (kind == "also" and isinstance(holder, list)):
        del holder[key]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[f"{key}.also"] = holder[key]
    return Case(f"{kind} {key}", {"manifest.json": sealed_json(document)}, sealed=True)


@mutation
def manifest_places(random: Random, files: Files) -> Case:
    """Offsets and sizes that lead elsewhere."""
    document = parsed(files["manifest.json"])
    shard = choice(random, document["shards"])
    members = choice(random, shard["samples"])["members"]
    name = choice(random, members)
    kind = choice(random, ("shift", "other", "size", "huge", "negative", "crc32"))
    offset, size, crc32 = members[name]
    if kind == "shift":
        offset += int(choice(random, (-BLOCK, -1, 1, 7, BLOCK)))
    elif kind == "other":
        offset, size, crc32 = members[choice(random, sorted(set(members) - {name}))]
    elif kind == "size":
        size += int(choice(random, (-1, 1, BLOCK)))
    elif kind == "huge":
        shard["size_bytes"] = 2**70
        offset, size = choice(random, ((choice(random, _HUGE), size), (offset, choice(random, _HUGE))))
    elif kind == "crc32":
        crc32 = choice(random, (crc32 ^ 1 << int(random.integers(32)), 0, -1, 2**32, 2**64))
    else:
        offset = -offset
    members[name] = [offset, size, crc32]
    return Case(f"{kind} {name}", {"manifest.json": sealed_json(document)}, sealed=True, refused=True)


@mutation
def manifest_is_no_json(random: Random, files: Files) -> Case:
    text = unseal(files["manifest.json"], "manifest.json")
    depth = int(choice(random, (500, 3000, 100_000)))
    kinds: dict[str, bytes] = {
        "deep list": b"[" * depth,
        "deep closed list": b"[" * depth + b"]" * depth,
        "deep object": b'{"a":' * depth + b"1" + b"}" * depth,
        "deep config": text.replace(b'"config":{', b'"config":{"deep": ' + b"[" * depth + b"]" * depth + b",", 1),
        "latin-1": text.replace(b"EXP_a", b"EXP_\xe4"),
        "utf-16": text.decode().encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + text,
        "nul": text + b"\0",
        "two": text + text,
        "long number": text.replace(b'"format_version":2', b'"format_version":2' + b"0" * depth, 1),
        "long number in config": text.replace(b'"config":{', b'"config":{"n": ' + b"7" * depth + b",", 1),
        "infinity": text.replace(b'"config":{', b'"config":{"n": Infinity,', 1),
        "pickle": pickle.dumps({"format_version": 1}),
        "list": b"[1]",
        "number": b"1",
        "null": b"null",
        "empty": b"",
        "lone surrogate": text.replace(b"EXP_a", b"EXP_\\ud800"),
    }
    kind = choice(random, kinds)
    body = kinds[kind]
    return Case(f"{kind} {depth}", {"manifest.json": seal(body) if body.endswith(b"}") else body}, sealed=True)


# Tars that say something else, under a manifest that agrees.


@mutation
def sealed_damage(random: Random, files: Files) -> Case:
    name = choice(random, (FIRST_SHARD, OTHER_SHARD, "topology.npz", "normalization.npz"))
    what, body = _damaged_bytes(random, files[name])
    return Case(f"{name} {what}", sealed(files, {name: body}), sealed=True)


@mutation
def sealed_header(random: Random, files: Files) -> Case:
    """A tar header of another name, type or size, with a right checksum."""
    shard = TarEntries(files[FIRST_SHARD])
    place = int(random.integers(len(shard.entries)))
    header, body = shard.entries[place]
    kind = choice(random, ("name", "size", "type", "mode", "link"))
    changed = bytearray(header)
    if kind == "name":
        name = choice(random, _ODD_NAMES)
        changed[0:100] = name[:100].ljust(100, b"\0")
        changed[345:500] = choice(random, (b"", b"..", b"EXP_a", b"\xff" * 155)).ljust(155, b"\0")
        what = repr(name[:20])
    elif kind == "size":
        size = choice(
            random,
            (
                b"777777777777",
                b"-1",
                b"0",
                b"99999999999\0",
                b"\x80" + b"\xff" * 11,
                b"\xff" * 12,
                b"\x80\0\0\0\x7f" + b"\xff" * 7,
                b"00000001000\0",
                b"garbage",
            ),
        )
        changed[124:136] = size.ljust(12, b"\0")
        what = repr(size)
    elif kind == "type":
        flag = choice(random, b"\x0012345678xgLKSNVMD")
        changed[156] = flag
        what = repr(chr(flag))
    elif kind == "mode":
        field = choice(random, (slice(100, 108), slice(108, 116), slice(136, 148), slice(257, 265), slice(329, 337)))
        changed[field] = random.bytes(field.stop - field.start)
        what = str(field.start)
    else:
        changed[156] = ord(choice(random, "12"))
        changed[157:257] = choice(random, (b"../../etc/passwd", b"/etc/passwd", header[:100])).ljust(100, b"\0")[:100]
        what = "link"
    shard.entries[place] = (with_checksum(changed), body)
    refused = kind in ("name", "link") or (kind == "type" and what not in (repr("\0"), repr("0"), repr("7")))
    return Case(f"{kind} {what}", sealed(files, {FIRST_SHARD: shard.body()}), sealed=True, refused=refused)


@mutation
def sealed_extensions(random: Random, files: Files) -> Case:
    """Pax and GNU headers before a member: other names, sizes, sparse maps, endless chains."""
    shard = TarEntries(files[FIRST_SHARD])
    place = int(random.integers(len(shard.entries)))
    fields = {
        "path": b"../../evil",
        "size": choice(random, (b"0", b"99999999999999", b"-5", b"x")),
        "GNU.sparse.map": b"0,99999999999,5",
        "GNU.sparse.size": b"9" * 18,
        "GNU.sparse.major": b"1",
        "linkpath": b"/etc/passwd",
        "mtime": b"1e999",
        "hdrcharset": b"BINARY",
        "uname": b"\xff\xfe",
    }
    kind = choice(random, ("pax", "pax", "global", "long name", "chain", "bad pax", "huge pax"))
    if kind in ("pax", "global"):
        names = random.choice(list(fields), int(random.integers(1, 4)), replace=False)
        body = b"".join(pax_record(name.encode(), fields[name]) for name in names)
        extra = [entry(b"PaxHeader", body, b"x" if kind == "pax" else b"g")]
        what = f"{kind} {' '.join(names)}"
    elif kind == "long name":
        name = choice(random, (b"../evil\0", b"a" * 5000 + b"\0", b"\xff\0"))
        extra, what = [entry(b"././@LongLink", name, b"L")], f"{kind} {name[:10]!r}"
    elif kind == "chain":
        count = int(choice(random, (2, 50, 3000)))
        extra, what = [entry(b"PaxHeader", pax_record(b"comment", b"a"), b"x")] * count, f"{kind} {count}"
    elif kind == "bad pax":
        body = choice(random, (b"999999999999 a=b\n", b"0 a=b\n", b"5 abc\n", b"-3 a=b\n", b"\xff" * 30, b"7" * 5000))
        extra, what = [entry(b"PaxHeader", body, b"x")], f"{kind} {body[:16]!r}"
    else:
        header = bytearray(entry(b"PaxHeader", b"", b"x")[0])
        header[124:136] = b"77777777777\0"
        extra, what = [(with_checksum(header), b"")], kind
    shard.entries[place:place] = extra
    return Case(what, sealed(files, {FIRST_SHARD: shard.body()}, shard.places()), sealed=True)


@mutation
def sealed_members_twice_or_exchanged(random: Random, files: Files) -> Case:
    shard = TarEntries(files[FIRST_SHARD])
    first, second = (int(place) for place in random.choice(len(shard.entries), 2, replace=False))
    kind = choice(random, ("twice", "bodies", "stranger", "absent"))
    places = None
    if kind == "twice":
        places = shard.places()
        shard.entries.append(shard.entries[first])
    elif kind == "bodies":
        (name, body), (other_name, other) = shard.entries[first], shard.entries[second]
        shard.entries[first] = (of_size(name, other_name), other)
        shard.entries[second] = (of_size(other_name, name), body)
    elif kind == "stranger":
        name = choice(random, (b"EXP_a/000000.evil.pickle", b"EXP_a/000009.frame.json", b"evil.sh", b"../evil"))
        shard.entries.insert(first, entry(name, pickle.dumps([1]), b"0"))
    else:
        places = shard.places()
        del shard.entries[first]
    same = kind == "bodies" and shard.suffix(first) == shard.suffix(second)
    changed = sealed(files, {FIRST_SHARD: shard.body()}, places or shard.places())
    return Case(f"{kind} {first} {second}", changed, sealed=True, refused=not same and kind != "bodies")


_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    0.5,
    1e308,
    *_HUGE,
    "",
    "..",
    "../evil",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [1],
    {"a": 1},
    [[]],
    "EXP_a/000000",
    "400001",
    "hmc",
    "png",
    "jpeg",
    "avif",
    "bmp",
    lambda old: [old],
    lambda old: str(old),
    lambda old: {"a": old},
    lambda old: -old if isinstance(old, int | float) else old * 2 if isinstance(old, list | str) else old,
    lambda old: old[::-1] if isinstance(old, list | str) else old,
    lambda old: old[:-1] if isinstance(old, list | str) else old,
)

_ODD_NAMES = (
    b"../../etc/passwd",
    b"/etc/passwd",
    b"..",
    b".",
    b"",
    b"/",
    b"a\\b",
    b"\xff\xfe.frame.json",
    b"000000.frame.json",
    b"EXP_a/../EXP_a/000000.frame.json",
    b"EXP_a//000000.frame.json",
    b"./EXP_a/000000.frame.json",
    b"EXP_a/000000.pickle",
    b"EXP_b/000000.frame.json",
    b"EXP_a/000000.frame.json/",
    b"a\nb",
    b"\x1b[2J",
    b"C:\\x",
    b"a" * 100,
)


def _a_place(random: Random, document: Any) -> tuple[Any, Any]:
    """A random key of a random object or list, all depths equally."""
    holder, places = document, []
    while isinstance(holder, dict | list) and holder:
        key = choice(random, holder if isinstance(holder, dict) else range(len(holder)))
        places.append((holder, key))
        holder = holder[key]
    return choice(random, places)
