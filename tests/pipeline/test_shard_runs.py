"""Shard sets written in several runs: what is there is kept, what is damaged is mended, plans never mix."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from lipflow.errors import ConfigError, ShardSetError
from pipeline import storage
from pipeline.capture import Capture
from pipeline.captures.opening import open_capture
from pipeline.corrupt_files import CorruptFilesError
from pipeline.manifest import Manifest
from pipeline.sharding.samples import SampleEncoder
from pipeline.sharding.shards import ShardConfig, find_committed, plan_shards, write_shard, write_shards
from pipeline.sharding.target import claimed, read_sidecar

CONFIG = ShardConfig(frames_per_shard=4)


def _bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_second_run_writes_nothing(dome: Capture, own_shards_folder: Path):
    before = {path: os.stat(path).st_mtime_ns for path in own_shards_folder.iterdir()}
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert {path: os.stat(path).st_mtime_ns for path in own_shards_folder.iterdir()} == before


def test_a_killed_run_is_resumed_where_it_stopped(
    dome: Capture, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first run dies in the middle of the third shard; the second writes that one and the rest, no more."""
    plan = plan_shards(dome, CONFIG)
    encoded: list[str] = []
    real_sample = SampleEncoder.sample
    stop_at = f"{plan.shards[2].frames[0][0]}/{plan.shards[2].frames[0][1]}"

    def dying(self: SampleEncoder, segment: str, frame: str):
        if f"{segment}/{frame}" == stop_at:
            raise KeyboardInterrupt
        return real_sample(self, segment, frame)

    monkeypatch.setattr(SampleEncoder, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        write_shards(dome, CONFIG, str(tmp_path))
    assert sorted(storage.listdir(tmp_path)) == sorted(
        name for task in plan.shards[:2] for name in (task.name, task.name.replace(".tar", ".json"))
    )
    with pytest.raises(ShardSetError, match="no manifest"):
        Manifest.load(str(tmp_path))

    def counting(self: SampleEncoder, segment: str, frame: str):
        encoded.append(f"{segment}/{frame}")
        return real_sample(self, segment, frame)

    monkeypatch.setattr(SampleEncoder, "sample", counting)
    write_shards(dome, CONFIG, str(tmp_path))
    assert encoded == ["/".join(frame) for task in plan.shards[2:] for frame in task.frames]
    assert _bytes_of(tmp_path) == _bytes_of(shards_folder)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_written_again(dome: Capture, own_shards_folder: Path, shards_folder: Path, damage: str):
    path = own_shards_folder / "train-000001.tar"
    body = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(body[:-512])
    elif damage == "flip":
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
        (own_shards_folder / "manifest.json").unlink()
    else:
        path.unlink()
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder)


def test_a_sidecar_with_another_digit_in_it_is_not_trusted(dome: Capture, own_shards_folder: Path, shards_folder: Path):
    """The shard's digest would pass; the place of a member would be wrong in the manifest that is made of it."""
    path = own_shards_folder / "train-000000.json"
    text = path.read_text()
    offset = re.search(r'"avgtex\.plz":\[(\d+),', text)
    assert offset is not None
    path.write_text(text[: offset.start(1)] + str(int(offset[1]) - 512) + text[offset.end(1) :])
    (own_shards_folder / "manifest.json").unlink()
    assert read_sidecar(str(own_shards_folder), "train-000000.tar") is None
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder)


def test_a_committed_set_is_recognised_by_plan_and_on_request_by_digest(dome: Capture, own_shards_folder: Path):
    uri = str(own_shards_folder)
    plan = plan_shards(dome, CONFIG)
    assert find_committed(uri, plan) is not None
    assert find_committed(uri, plan_shards(dome, ShardConfig(frames_per_shard=5))) is None
    path = own_shards_folder / "val-000000.tar"
    body = bytearray(path.read_bytes())
    body[700] ^= 1
    path.write_bytes(body)
    assert find_committed(uri, plan) is not None
    assert find_committed(uri, plan, check_digests=True) is None


def test_a_capture_made_anew_under_the_same_names_has_another_fingerprint(dome: Capture, own_dome_folder: Path):
    same = plan_shards(open_capture(own_dome_folder), CONFIG).fingerprint
    assert same == plan_shards(dome, CONFIG).fingerprint
    path = own_dome_folder / "unwrapped_uv_1024" / "EXP_eyes" / "average" / "000000.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(path)
    assert plan_shards(open_capture(own_dome_folder), CONFIG).fingerprint != same


OTHER = ShardConfig(frames_per_shard=4, seed=1)


BEGUN = {
    "committed": lambda folder: None,
    "uncommitted": lambda folder: (folder / "manifest.json").unlink(),
    "copied without sidecars": lambda folder: [path.unlink() for path in folder.glob("*-0*.json")],
}


@pytest.mark.parametrize("state", BEGUN)
def test_shards_of_another_plan_are_refused_and_stay_as_they_are(dome: Capture, own_shards_folder: Path, state: str):
    BEGUN[state](own_shards_folder)
    before = _bytes_of(own_shards_folder)
    with pytest.raises(ConfigError, match=r"of another recipe or capture; give another OUT, remove what lies there"):
        write_shards(dome, OTHER, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == before


def test_a_task_does_not_write_over_a_shard_of_another_plan(dome: Capture, own_shards_folder: Path):
    before = _bytes_of(own_shards_folder)
    with pytest.raises(ConfigError, match=r"train-000000\.tar there is of another"):
        write_shard(dome, OTHER, plan_shards(dome, OTHER).shards[0], str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == before


def test_a_tar_that_no_shard_of_the_plan_is_named_like_is_refused(dome: Capture, tmp_path: Path):
    """A loader that takes all tars of a folder would take it, too."""
    (tmp_path / "train-000007.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"train-000007\.tar there is of another"):
        write_shards(dome, CONFIG, str(tmp_path))
    assert _bytes_of(tmp_path) == {"train-000007.tar": b""}


def test_the_claim_of_a_dead_job_stops_other_plans_alone_and_ends_with_the_set(
    dome: Capture, shards_folder: Path, tmp_path: Path
):
    claim = tmp_path / f".job-{plan_shards(dome, CONFIG).fingerprint}-{'0' * 32}.json"
    claim.write_text(json.dumps({"host": "dome-7", "pid": 12, "started": "2026-01-02T03:04:05+00:00"}))
    with pytest.raises(ConfigError, match=r"host dome-7, process 12, since 2026.*If that job is dead, remove file://"):
        write_shards(dome, OTHER, str(tmp_path))
    assert list(tmp_path.iterdir()) == [claim]
    write_shards(dome, CONFIG, str(tmp_path))
    assert _bytes_of(tmp_path) == _bytes_of(shards_folder)


def test_a_run_on_a_complete_set_removes_what_jobs_that_were_killed_after_the_commit_have_left(
    dome: Capture, own_shards_folder: Path, shards_folder: Path
):
    claim = own_shards_folder / f".job-{plan_shards(dome, CONFIG).fingerprint}-{'0' * 32}.json"
    fresh = own_shards_folder / f".train-000000.tar.{1:032x}.partial"
    begun = ("train-000000.tar", "val-000000.json", "topology.npz", "normalization.npz", "manifest.json", claim.name)
    stale = [own_shards_folder / f".{name}.{0:032x}.partial" for name in begun]
    for path in (claim, fresh, *stale):
        path.write_bytes(b"{}")
    for path in stale:
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    write_shards(dome, CONFIG, str(own_shards_folder))
    assert _bytes_of(own_shards_folder) == _bytes_of(shards_folder) | {fresh.name: b"{}"}


def test_a_failed_job_leaves_no_claim(own_dome_folder: Path, tmp_path: Path):
    for path in (own_dome_folder / "tracked_mesh").rglob("*.bin"):
        path.write_bytes(b"short")
    with pytest.raises(CorruptFilesError):
        write_shards(open_capture(own_dome_folder), CONFIG, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_of_two_plans_that_claim_at_the_same_time_at_most_one_goes_on(tmp_path: Path):
    """Whichever way their steps interleave: each writes its claim before it looks."""
    first, second = "a" * 64, "b" * 64
    with claimed(str(tmp_path), first, ["train-000000.tar"]):
        with pytest.raises(ConfigError, match="another recipe"), claimed(str(tmp_path), second, ["train-000000.tar"]):
            pytest.fail("both went on")
        with claimed(str(tmp_path), first, ["train-000000.tar"]):
            assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
