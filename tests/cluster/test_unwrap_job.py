"""``lipflow unwrap`` on the session's Ray cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster import cli, command
from cluster.unwrap import unwrap
from lipflow.errors import CaptureError
from pipeline.captures.multiface import TEXTURE_FOLDER
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, write_dome
from pipeline.unwrapping import UnwrapConfig, UnwrapSettings, unwrap_frames

DOME = DomeConfig(
    cameras=4,
    image_size_hw=(48, 36),
    texture_size=32,
    segments=2,
    frames_per_segment=3,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dome without average textures."""
    target = tmp_path / "dome"
    write_dome(DOME, str(target))
    for path in target.glob(f"{TEXTURE_FOLDER}/*/average/*.png"):
        path.unlink()
    return target


def textures(folder: Path) -> dict[str, bytes]:
    root = folder / TEXTURE_FOLDER
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("*/*/*.png"))}


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lipflow", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0


@pytest.mark.usefixtures("ray_session")
def test_the_job_writes_what_the_stage_writes_in_one_process(folder, tmp_path, monkeypatch, capsys):
    run_command(monkeypatch, "unwrap", str(folder), "--views", "--cameras", "*", "--set", "frames_per_task=1", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["averages"], summary["views"], summary["kept"]) == (6, 24, 0)
    assert summary["texture_size"] == 32
    assert len(summary["cameras"]) == 4
    assert 0.5 < summary["seen_fraction"] < 1

    capture = open_capture(folder)
    plain = tmp_path / "plain"
    settings = UnwrapSettings(32, tuple(summary["cameras"]), views=True)
    for segment, frames in capture.segments.items():
        unwrap_frames(capture, settings, segment, frames, str(plain))
    assert textures(folder) == textures(plain)

    run_command(monkeypatch, "unwrap", str(folder), "--views")
    assert "0 average textures and 0 of single cameras written from 4 cameras, 6 averages were there" in (
        capsys.readouterr().out
    )


@pytest.mark.usefixtures("ray_session")
def test_corrupt_images_end_the_job_after_all_others_are_written(folder):
    first, *_, last = sorted(folder.glob("images/*/*/*.png"))
    whole = {path: path.read_bytes() for path in (first, last)}
    for path, body in whole.items():
        path.write_bytes(body[:100])
    config = UnwrapConfig(frames_per_task=1)
    with pytest.raises(CaptureError, match="2 files cannot be used") as raised:
        unwrap(str(folder), config)
    for path in whole:
        assert str(path) in str(raised.value)
    assert len(textures(folder)) == 4
    assert not list(folder.rglob(".*partial"))
    for path, body in whole.items():
        path.write_bytes(body)
    summary = unwrap(str(folder), config)
    assert (summary.averages, summary.kept) == (2, 4)


def test_settings_that_do_not_fit_are_refused_before_ray_starts(folder, monkeypatch, capsys):
    monkeypatch.setattr("cluster.unwrap.ray_cluster", lambda: pytest.fail("Ray was started"))
    monkeypatch.setattr(sys, "argv", ["lipflow", "unwrap", str(folder), "--texture-size", "64"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == command.EXIT_USAGE
    assert "set texture_size=32, or give another OUT" in capsys.readouterr().err
