"""The verification job: ``lipflow verify URI`` decodes every byte of a capture or a shard set and lists what is bad.

Runs of frames, or shards, are Ray tasks; little work is done in this process, before Ray would have started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import command
from cluster.command import JsonOption
from cluster.runtime import map_tasks, progress_bar, ray_cluster
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.checks.shard_verification import is_shard_set, run_shards_in_process, verify_shard, verify_shards
from pipeline.checks.verification import VerifyTask, run_in_process, verify_capture, verify_part
from pipeline.checks.verification_report import VerifyPart, VerifyReport
from pipeline.manifest import Manifest

IN_PROCESS_VIEWS = 400
"""Captures of at most so many views (frames times cameras) are done without Ray: half a minute of full-size images."""
IN_PROCESS_BYTES = 256 * 2**20
"""Shard sets of at most so many bytes are done without Ray."""

_ROWS_SHOWN = 100
_FILE_WIDTH = 4096


def verify(uri: str) -> VerifyReport:
    """Decode every byte of the capture or shard set at a path or URI.

    Raises:
        CaptureError: there is neither at ``uri``.
        StorageError: storage fails as a whole.
        ClusterError: the Ray cluster does not answer.
    """
    return verify_shards(uri, _run_shards) if is_shard_set(uri) else verify_capture(uri, _run_tasks)


def _run_tasks(capture: Capture, tasks: Sequence[VerifyTask]) -> Iterator[VerifyPart]:
    frames = sum(len(task.frames) for task in tasks)
    if frames == 0 or frames * len(capture.cameras) <= IN_PROCESS_VIEWS:
        return _with_progress(run_in_process(capture, tasks), len(tasks))
    return _on_ray(_verify_part, [(capture.uri, task) for task in tasks])


def _run_shards(uri: str, manifest: Manifest) -> Iterator[VerifyPart]:
    if sum(record.size_bytes for record in manifest.shards) <= IN_PROCESS_BYTES:
        return _with_progress(run_shards_in_process(uri, manifest), len(manifest.shards))
    return _on_ray(_verify_shard, [(uri, place) for place in range(len(manifest.shards))])


def _with_progress(parts: Iterable[VerifyPart], count: int) -> Iterator[VerifyPart]:
    with progress_bar() as progress:
        bar = progress.add_task("verify", total=count, note="")
        for part in parts:
            progress.advance(bar)
            yield part


def _on_ray(function: Callable[..., VerifyPart], arguments: Sequence[tuple]) -> Iterator[VerifyPart]:
    with ray_cluster():
        yield from map_tasks(function, arguments, description="verify")


def _verify_part(uri: str, task: VerifyTask) -> VerifyPart:
    return verify_part(_opened(uri), task)


def _verify_shard(uri: str, place: int) -> VerifyPart:
    manifest = _manifest(uri)
    return verify_shard(uri, manifest, manifest.shards[place])


@lru_cache(maxsize=1)
def _opened(uri: str) -> Capture:
    """The capture, opened once a worker: its calibration and topology are the same for all tasks."""
    return open_capture(uri)


@lru_cache(maxsize=1)
def _manifest(uri: str) -> Manifest:
    """The manifest, read once a worker."""
    return Manifest.load(uri)


def verify_command(
    uri: Annotated[str, typer.Argument(metavar="URI", help="Capture or shard set: path, file:// or s3:// URI.")],
    as_json: JsonOption = False,
) -> None:
    """Decode every byte of a capture or a shard set and list the bad files. Exit code 1 if there is any."""
    report = verify(uri)
    if not as_json:
        _print_tables(report)
    command.emit({"good": report.good, **asdict(report)}, as_json, _summary(report))
    if not report.good:
        raise typer.Exit(command.EXIT_BAD)


def _summary(report: VerifyReport) -> str:
    missing = sum(report.missing_views.values())
    summary = f"{report.uri}: {report.layout}, {report.files_checked} files checked, {len(report.bad)} bad"
    summary += f"; {missing} views missing (no fault)" if missing else ""
    return summary if report.complete else f"{summary}; the rest cannot be checked before that is repaired"


def _print_tables(report: VerifyReport) -> None:
    if report.bad:
        table = Table("bad file", "fault", "reason")
        for bad in report.bad[:_ROWS_SHOWN]:
            table.add_row(escape(bad.path.removeprefix(f"{report.uri}/")), bad.fault, escape(bad.reason))
        if len(report.bad) > _ROWS_SHOWN:
            table.add_row("…", "", f"{len(report.bad) - _ROWS_SHOWN} more; --json lists them all")
        _print(table)
    table = Table("missing views by", "", "views")
    table.columns[2].justify = "right"
    for of, counts in (
        ("camera", report.missing_views),
        ("segment", report.missing_views_by_segment),
        ("headset camera", report.missing_headset_views),
    ):
        _add_counts(table, of, counts)
    if table.row_count:
        _print(table)


def _add_counts(table: Table, of: str, counts: Mapping[str, int]) -> None:
    """A section of the table, most first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(escape(name), str(count)) for name, count in ordered[:_ROWS_SHOWN]]
    if len(ordered) > _ROWS_SHOWN:
        rows.append((f"{len(ordered) - _ROWS_SHOWN} more", str(sum(count for _, count in ordered[_ROWS_SHOWN:]))))
    for place, row in enumerate(rows):
        table.add_row(of if place == 0 else "", *row)
    table.add_section()


def _print(table: Table) -> None:
    """On a terminal folded to its width; in a file every row is one line, so that paths can be searched for."""
    for column in table.columns:
        column.overflow = "fold"
    console = command.console
    if not console.is_terminal:
        console = Console(file=console.file, width=_FILE_WIDTH)
    console.print(table)


if __name__ == "__main__":
    command.run_job("cluster.verify", "verify_command")
