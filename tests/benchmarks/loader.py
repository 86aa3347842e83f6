"""How fast the loader is, and others on the same pictures: ``python tests/benchmarks/loader.py``.

Rows, each in a process of its own, pinned to one core or to two:

- ``naive, 3 PNG``: one sample a view in the manner of the public Multiface loader: photo, average texture and view
  texture are decoded for every view, to float32, and normalised. ``naive, 2 PNG`` leaves the view texture out, which
  our loader does not read: what it gives is what ours gives, so it is the one to compare with.
- ``webdataset``, ``streaming``, ``litdata``: one sample a view, photo and average texture; with ``photo alone`` no
  texture is decoded at all, which is less than what ours does. Their average textures are PNG.
- ``ours``: one sample a frame; the average texture, as ``texture_codec`` stores it by default, is decoded once a frame,
  and then its views.
- ``limit``: the same codecs in a bare loop over the very same members in memory, pixels left where it puts them. Two
  workers are two processes.

All passes of a group are taken in turns and ratios are medians over pairs of passes, so that a machine whose speed
drifts does not decide. A pass is a whole epoch, beginning and end included; the files are in the page cache, and the
digests of local shards were checked in a pass before. Bytes are those that system calls return; where a loader maps its
files instead, they are the size of its data set, marked ~.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from loader_measuring import GROUPS, Options, measure, note, prepare
from loader_s3 import s3_table
from loader_tables import decode_table, facts_table, rows_table, show, targets_table

_FACE = Path(__file__).resolve().parents[3] / "shared" / "assets" / "realface"
_S3_EPOCH_TIMES = 4
"""The first shard of an epoch is waited for: with S3, epochs are longer, so that it counts as little as it does."""


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter passes")
    parser.add_argument("--repeats", type=int, help="passes of each row after the first; default 3, quick 2")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is not idle")
    parser.add_argument("--peer-python", help="interpreter with mosaicml-streaming, litdata and webdataset")
    parser.add_argument("--scratch", type=Path, help="keep the pictures here for the next run")
    parser.add_argument("--face", type=Path, default=_FACE if _FACE.is_dir() else None, help="folder of a face asset")
    parser.add_argument("--only", action="append", default=[], help="name of a group; can be repeated")
    parser.add_argument("--s3", action="store_true", help="measure reading from a local S3 server instead")
    parser.add_argument("--markdown", action="store_true", help="print tables for RESULTS.md")
    given = parser.parse_args()
    with ExitStack() as stack:
        scratch = given.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loader-benchmark-")))
        options = Options(
            quick=given.quick,
            repeats=given.repeats or (2 if given.quick else 3),
            clock=given.clock,
            peer_python=given.peer_python,
            scratch=scratch / ("quick" if given.quick else "full"),
            face=given.face,
            markdown=given.markdown,
            only=tuple(given.only),
            epoch_times=_S3_EPOCH_TIMES if given.s3 else 1,
        )
        start = time.perf_counter()
        chosen = [
            group
            for group in GROUPS
            if (group.name in options.only if options.only else group.quick or not options.quick)
        ]
        prepare(options, chosen)
        note(f"pictures are ready after {time.perf_counter() - start:.0f} s")
        show([facts_table(options)], options)
        if given.s3:
            show([s3_table(options, chosen)], options)
        else:
            measured = [measure(group, options) for group in chosen]
            show([decode_table(options, chosen), rows_table(measured, options)], options)
            show([targets_table(measured, options)], options)
        note(f"done after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
