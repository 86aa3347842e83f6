"""The synthesis job: its flags, what it refuses, and how it goes on after an interruption."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import cli, command, synth
from cluster.synth import SynthSummary, synthesise
from lipflow.errors import ConfigError
from pipeline.captures.opening import open_capture
from pipeline.dome.writer import DomeConfig, plan_dome, write_dome, write_dome_run, write_dome_static

CONFIG = DomeConfig(
    cameras=3,
    image_size_hw=(21, 15),
    texture_size=16,
    segments=4,
    frames_per_segment=2,
    headset_image_size_hw=(8, 8),
    supersampling=1,
)

CommandLine = Callable[..., int]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """``command_line("synth", OUT)``: the exit code. Ray must not be started."""

    def call(*arguments: str) -> int:
        def started(*_args: Any, **_kwargs: Any) -> None:
            raise AssertionError("Ray was started")

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", started)
        monkeypatch.setattr(sys, "argv", ["lipflow", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code

    return call


def planted(folder: Path, config: DomeConfig, runs: int) -> None:
    """What an interrupted job leaves behind: its config, the static files, and some runs."""
    (folder / "driving").mkdir(parents=True)
    (folder / synth.CONFIG_FILE).write_text(config.model_dump_json())
    write_dome_static(config, str(folder))
    for run in plan_dome(config).runs[:runs]:
        write_dome_run(config, run, str(folder))


def test_flags_are_the_settings_of_the_dome(command_line: CommandLine, monkeypatch, capsys, tmp_path: Path):
    asked: list[DomeConfig] = []

    def note(out_uri: str, config: DomeConfig) -> SynthSummary:
        asked.append(config)
        return SynthSummary(out_uri, 5, 35, views=1, written=True)

    monkeypatch.setattr(synth, "synthesise", note)
    flags = "--cameras 12 --image-size 2048x1334 --texture-size 1024 --segments 5 --frames-per-segment 7"
    rest = f"--missing 0.01 --seed 3 --face {tmp_path}/1e3 --set supersampling=1 --set seed=4 --json"
    assert command_line("synth", "out", *flags.split(), *rest.split()) == 0
    assert asked == [
        DomeConfig(
            cameras=12,
            image_size_hw=(2048, 1334),
            texture_size=1024,
            segments=5,
            frames_per_segment=7,
            missing_fraction=0.01,
            face=f"{tmp_path}/1e3",
            supersampling=1,
            seed=4,
        )
    ]
    assert json.loads(capsys.readouterr().out)["frames"] == 35
    assert command_line("synth", "out", "--krt", "1234") == 0
    assert asked[-1] == DomeConfig(krt="1234")


@pytest.mark.parametrize("size", ["2048", "2048x", "2048X1334", "2048x1334x3", "-8x6", "0x6", "8 x 6", "8.5x6", "axb"])
def test_an_image_size_that_is_none_is_refused(command_line: CommandLine, capsys, tmp_path: Path, size: str):
    assert command_line("synth", str(tmp_path / "out"), f"--image-size={size}") == command.EXIT_USAGE
    message = capsys.readouterr().err
    assert message == f"lipflow: error: --image-size {size}: expected HEIGHTxWIDTH in pixels, such as 2048x1334\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--missing 1.5", "missing_fraction: Input should be less than 1, found 1.5"),
        ("--cameras 0", "cameras: Input should be greater than or equal to 1, found 0"),
        ("--cameras 3 --krt KRT", "--cameras 3 does not go with the rig of KRT"),
        ("--face /no/such/face", "/no/such/face: not a face asset"),
        ("--krt /no/such/KRT", "/no/such/KRT: no such KRT file"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_and_leave_nothing(
    command_line: CommandLine, capsys, tmp_path: Path, flags: str, expected: str
):
    assert command_line("synth", str(tmp_path / "out"), *flags.split()) == command.EXIT_USAGE
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_interrupted_job_goes_on_and_a_finished_one_does_nothing(ray_session, tmp_path: Path):
    interrupted, straight = tmp_path / "interrupted", tmp_path / "straight"
    write_dome(CONFIG, str(straight))
    planted(interrupted, CONFIG, runs=3)
    summary = synthesise(str(interrupted), CONFIG)
    # One run of two frames was left, of three dome and five headset views each.
    assert summary == SynthSummary(f"file://{interrupted}", segments=4, frames=8, views=2 * 8, written=True)
    made = digests(interrupted)
    del made[synth.CONFIG_FILE]
    assert made == digests(straight)
    assert sum(len(stems) for stems in open_capture(interrupted).segments.values()) == 8
    before = digests(interrupted)
    again = synthesise(str(interrupted), CONFIG)
    assert (again.views, again.written) == (0, False)
    assert digests(interrupted) == before


@pytest.mark.parametrize("finished", [False, True])
def test_another_dome_is_not_mixed_into_one_that_is_there(tmp_path: Path, finished: bool):
    planted(tmp_path, CONFIG, runs=1)
    if finished:
        (tmp_path / "frame_list.txt").write_text("EXP_smile 000000\n")
    before = digests(tmp_path)
    other = CONFIG.model_copy(update={"missing_fraction": 0.5})
    with pytest.raises(ConfigError, match="holds another capture, or a part of one made with other settings"):
        synthesise(str(tmp_path), other)
    assert digests(tmp_path) == before


@pytest.mark.parametrize("name", ["KRT", "images/SEG/1/000000.png", "frame_list.txt"])
def test_a_capture_of_someone_else_is_not_written_over(tmp_path: Path, name: str):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("real")
    with pytest.raises(ConfigError, match="holds another capture"):
        synthesise(str(tmp_path), CONFIG)
    assert digests(tmp_path).keys() == {name}
