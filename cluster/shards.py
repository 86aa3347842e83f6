"""``lipflow shards ls SHARDS`` and ``lipflow shards show SHARDS SEG/FRAME``: look into a shard set, unpack nothing.

Only the manifest and single members are read, by range requests; nothing is judged (``lipflow verify`` does that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from cluster import command
from cluster.command import JsonOption
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.checks.shard_listing import FrameFacts, FrameListing, SetListing, list_shards, read_view, show_frame

_PIPE_WIDTH = 200
_DIGEST_SHOWN = 12


def shards_command(
    action: Annotated[str, typer.Argument(metavar="ls|show", help="ls: the shards. show: one frame.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    frame: Annotated[str | None, typer.Argument(metavar="[SEG/FRAME]", help="The frame to show.")] = None,
    frames: Annotated[bool, typer.Option("--frames", help="ls: list the frames as well.")] = False,
    camera: Annotated[
        str | None, typer.Option(metavar="ID", help="show: decode this camera's view (or headset view) alone.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="show: write the view, as it is stored or, with .png, decoded."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the shards of a set, or show what is stored of a frame; --camera and --out take one view out."""
    _check_use(action, frame, frames=frames, camera=camera, out=out)
    if frame is None:
        listing = list_shards(shards)
        if as_json:
            command.emit(_listing_document(listing, frames=frames), as_json, "")
        else:
            _print_listing(listing, frames=frames)
    elif camera is None:
        shown = show_frame(shards, frame)
        if as_json:
            command.emit(asdict(shown), as_json, "")
        else:
            _print_frame(shown)
    else:
        _take_out(shards, frame, camera, out, as_json)


def _check_use(action: str, frame: str | None, *, frames: bool, camera: str | None, out: str | None) -> None:
    if action not in ("ls", "show"):
        raise ConfigError(f"shards {action}: expected `shards ls SHARDS` or `shards show SHARDS SEG/FRAME`")
    if action == "ls":
        for given, name in ((frame, "frame"), (camera, "--camera"), (out, "--out")):
            if given is not None:
                raise ConfigError(f"shards ls takes no {name} ({given}); use shards show")
        return
    if frame is None:
        raise ConfigError("shards show needs a frame: shards show SHARDS SEG/FRAME; `shards ls --frames` lists them")
    if frames:
        raise ConfigError("--frames goes with shards ls")
    if out is not None and camera is None:
        raise ConfigError(f"--out {out}: needs --camera ID, the view to write")


def _take_out(shards: str, frame: str, camera: str, out: str | None, as_json: bool) -> None:
    view = read_view(shards, frame, camera)
    written = None
    if out is not None:
        written = storage.normalize_uri(out)
        storage.write_bytes(written, view.encoded_for(written))
    height, width = view.image_size_hw
    document = {"member": asdict(view.member), "image_size_hw": [height, width], "out": written}
    summary = f"{view.member.name}: {width}x{height} pixels, {view.member.size_bytes:,} bytes"
    command.emit(document, as_json, summary + (f"; written to {written}" if written else ""))


def _listing_document(listing: SetListing, *, frames: bool) -> dict[str, Any]:
    document = asdict(listing)
    if not frames:
        del document["frames"]
    totals = {
        "shards": len(listing.shards),
        "frames": len(listing.frames),
        "views": listing.views,
        "missing_views": listing.missing_views,
        "size_bytes": listing.size_bytes,
    }
    return document | {"totals": totals}


def _print_listing(listing: SetListing, *, frames: bool) -> None:
    several = any(shard.capture is not None for shard in listing.shards)
    left = ["shard", "split", "capture"] if several else ["shard", "split"]
    table = _table(left, ["frames", "views", "missing", "size", "sha-256"])
    for shard in listing.shards:
        counts = (f"{count:,}" for count in (shard.frames, shard.views, shard.missing_views))
        place = [escape(shard.name), shard.split] + [escape(shard.capture or "")] * several
        table.add_row(*place, *counts, decimal(shard.size_bytes), shard.sha256[:_DIGEST_SHOWN])
    table.add_section()
    counts = (f"{count:,}" for count in (len(listing.frames), listing.views, listing.missing_views))
    table.add_row(f"{len(listing.shards)} shards", *[""] * (len(left) - 1), *counts, decimal(listing.size_bytes), "")
    console = _console()
    console.print(table)
    if frames:
        console.print(_frames_table(listing.frames))
    console.print(f"{listing.uri}: digest {listing.digest}", highlight=False, markup=False, soft_wrap=True)


def _frames_table(frames: Sequence[FrameFacts]) -> Table:
    table = _table(["frame", "split", "shard"], ["views", "members", "size"], ["missing views"])
    for frame in frames:
        missing = ", ".join(frame.missing_views) or "-"
        counts = (f"{frame.views:,}", f"{frame.members:,}", decimal(frame.members_bytes))
        table.add_row(escape(frame.frame_id), frame.split, escape(frame.shard), *counts, escape(missing))
    return table


def _print_frame(shown: FrameListing) -> None:
    table = _table(["member"], ["offset", "bytes"])
    for member in shown.members:
        table.add_row(escape(member.name), f"{member.offset:,}", f"{member.size_bytes:,}")
    table.add_section()
    table.add_row(f"{len(shown.members)} members", "", f"{shown.frame.members_bytes:,}")
    console = _console()
    console.print(table)
    overview = Table.grid(padding=(0, 2))
    overview.add_column(style="bold", no_wrap=True)
    overview.add_column()
    frame = shown.frame
    overview.add_row("shard", escape(f"{frame.shard} ({frame.split})"))
    overview.add_row("missing views", escape(", ".join(frame.missing_views) or "none"))
    for name, value in shown.facts.items():
        overview.add_row(escape(name), escape(_shown_fact(value)))
    console.print(overview)


def _shown_fact(value: Any) -> str:
    """A matrix row by row, a list with commas, anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return "\n".join(
            " ".join(f"{cell:12.5g}" if isinstance(cell, int | float) else str(cell) for cell in row) for row in value
        )
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _table(left: Sequence[str], right: Sequence[str], last: Sequence[str] = ()) -> Table:
    table = Table()
    for names, justify in ((left, "left"), (right, "right"), (last, "left")):
        for name in names:
            table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _console() -> Console:
    """Standard output; in a file every row is one line, so that it can be searched."""
    console = Console()
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


if __name__ == "__main__":
    command.run_job("cluster.shards", "shards_command")
