"""The whole demo on a stack, by ``ray job submit``: it works, listens on loopback alone, and tells nobody its keys."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
import yaml

from cluster.services.servers import listening
from tests.integration.running_stack import RunningStack
from tests.integration.test_stack import is_loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DEMO_S = 1800
CREDENTIAL_FILES = {"stack.env", "ray-token"}

_AVATAR = {
    "texture_size": 32,
    "latent_size": 8,
    "hidden_size": 16,
    "encoder_channels": [8, 8, 8, 4],
    "decoder_channels": [8, 8, 8, 4],
    "driver_image_size": 16,
    "driver_channels": [8, 8],
    "driver_hidden_size": 16,
    "flow_hidden_size": 8,
}
_TRAINING = {
    "avatar": _AVATAR,
    "loader": {"frames_per_batch": 2, "views_per_frame": 2, "decode_threads": 1},
    "steps": 4,
    "warmup_steps": 2,
    "checkpoint_every_steps": 4,
    "validation_frames": 2,
    "validation_cameras": 2,
    "workers": 1,
    "cpus_per_worker": 0.5,
}
_EVALUATION = {"fit": {"iterations": 1}, "max_frames": 2, "max_cameras": 2, "picture_frames": 1}
TINY_DEMO = {
    "dome": {
        "cameras": 7,
        "image_size_hw": [48, 36],
        "texture_size": 32,
        "segments": 4,
        "frames_per_segment": 3,
        "headset_image_size_hw": [16, 20],
        "supersampling": 1,
    },
    "shard": {"frames_per_shard": 3, "splits": {"test_segments": [], "val_segments": [], "test_camera_count": 2}},
    "dam": _TRAINING,
    # Two workers exchange gradients over sockets.
    "lipflow": _TRAINING | {"workers": 2},
    "evaluate_dam": _EVALUATION,
    "evaluate_lipflow": _EVALUATION,
}


class SocketWatch(threading.Thread):
    """Notes what the stack's processes listen on until it is stopped.

    Attributes:
        seen: (address, port, process name).
    """

    def __init__(self, stack: RunningStack) -> None:
        super().__init__(daemon=True)
        self.seen: set[tuple[str, int, str]] = set()
        self.over = threading.Event()
        self._stack = stack

    def run(self) -> None:
        while not self.over.wait(1.0):
            self.seen.update(listening(self._stack.processes()))


@dataclass
class Demonstrated:
    """What the demo came to.

    Attributes:
        stack: on which it ran.
        outputs: what its commands printed.
        result: of the demo.
        sockets: that were open meanwhile.
    """

    stack: RunningStack
    result: dict
    sockets: set[tuple[str, int, str]]
    outputs: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def demonstrated(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Demonstrated:
    recipe = tmp_path_factory.mktemp("demo") / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY_DEMO))
    watch = SocketWatch(stack)
    watch.start()
    began = time.perf_counter()
    job = [sys.executable, "-m", "cluster.demo", "--out", "s3://lipflow/demo", "--recipe", str(recipe), "--json"]
    done = stack.run_ray("job", "submit", "--submission-id", "demo", "--", *job, timeout_s=DEMO_S)
    print(f"the demo took {time.perf_counter() - began:.0f} s from its submission")
    # A job that fails tells its traceback; --debug, all of Ray's messages.
    failed = stack.run("submit", "train", "s3://lipflow/nothing", "s3://lipflow/out", LIPFLOW_DEBUG="1")
    watch.over.set()
    watch.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert failed.returncode != 0
    log = done.stdout
    result = json.loads(log[log.index("\n{\n") : log.index("\n}\n") + 2])
    outputs = {"demo": done.stdout + done.stderr, "failed": failed.stdout + failed.stderr}
    return Demonstrated(stack, result, watch.seen, outputs)


def test_the_whole_demo_runs_on_s3_an_mlflow_server_and_a_cluster_with_a_token(demonstrated: Demonstrated):
    stack = demonstrated.stack
    objects = stack.folder / "objects" / "lipflow"
    assert (objects / "demo" / "report.html").stat().st_size > 10_000
    assert demonstrated.result["report"] == "s3://lipflow/demo/report.html"
    assert demonstrated.result["promoted"] is True
    assert len(demonstrated.result["headline"]) > 0
    found = requests.get(
        f"{stack.variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/registered-models/get",
        params={"name": "lipflow"},
        timeout=60,
    ).json()["registered_model"]
    assert {"alias": "champion", "version": "1"} in [
        {"alias": alias["alias"], "version": str(alias["version"])} for alias in found["aliases"]
    ]
    # Artifacts went through the server to the bucket.
    assert list((objects / "mlflow").rglob("*.safetensors"))


def test_nothing_listens_beyond_loopback_while_jobs_run(demonstrated: Demonstrated):
    trainers = {port for _, port, name in demonstrated.sockets if "RayTrainWorker" in name}
    # Ranks find each other and exchange gradients over sockets, so there are some of theirs.
    assert len(trainers) >= 2
    assert [entry for entry in demonstrated.sockets if not is_loopback(entry[0])] == []


def _needles(stack: RunningStack) -> list[bytes]:
    """The credentials, as they are, in base64, and as a part of a URI."""
    secrets = [stack.variables["AWS_ACCESS_KEY_ID"], stack.variables["AWS_SECRET_ACCESS_KEY"]]
    secrets += [(stack.folder / "ray-token").read_text()]
    needles = []
    for secret in secrets:
        needles += [secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="), quote(secret, safe="").encode()]
    return needles


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _holders(contents: dict[str, bytes], needles: list[bytes]) -> list[str]:
    return sorted(name for name, body in contents.items() if any(needle in body for needle in needles))


def test_no_file_of_the_run_holds_a_credential_but_the_two_that_are_made_for_it(demonstrated: Demonstrated):
    stack = demonstrated.stack
    folders = [stack.folder]
    if not Path(stack.record.ray_folder).is_relative_to(stack.folder):
        folders.append(Path(stack.record.ray_folder))
    contents = {str(path): path.read_bytes() for folder in folders for path in _files(folder)}
    names = "\n".join(contents)
    # Logs of the servers, of Ray's processes and workers, of jobs; the store; artifacts; objects.
    for part in ("logs/s3.log", "logs/mlflow.log", "logs/raylet.out", "job-driver-demo.log", "worker-", "mlflow.db"):
        assert part in names, part
    for part in ("objects/lipflow/demo/lipflow/run.json", "objects/lipflow/mlflow/", "demo/shards/manifest.json"):
        assert part in names, part
    assert len(contents) > 200
    holders = _holders(contents, _needles(stack))
    # That these two are found shows that the search can find.
    assert {Path(name).name for name in holders} == CREDENTIAL_FILES
    assert {str(Path(name).parent) for name in holders} == {str(stack.folder)}


def test_no_record_that_ray_shows_holds_a_credential(demonstrated: Demonstrated):
    stack = demonstrated.stack
    header = {"Authorization": f"Bearer {(stack.folder / 'ray-token').read_text()}"}
    shown = {}
    paths = ("jobs/", "jobs/demo", "jobs/demo/logs", "v0/jobs", "v0/tasks", "v0/actors", "v0/workers", "v0/nodes")
    for path in (*paths, "v0/runtime_envs", "v0/placement_groups", "cluster_status"):
        address = f"{stack.variables['RAY_API_SERVER_ADDRESS']}/api/{path}"
        answer = requests.get(address, params={"detail": "true", "limit": "10000"}, headers=header, timeout=120)
        assert answer.ok, f"{path}: {answer.text}"
        shown[path] = answer.content
    jobs = json.loads(shown["jobs/"])
    assert {"demo"} < {job["submission_id"] for job in jobs}
    # A variable that was sent is there, so a secret would be as well.
    assert b"LIPFLOW_DEBUG" in shown["jobs/"]
    assert _holders(shown, _needles(stack)) == []


def test_nothing_that_mlflow_tells_holds_a_credential(demonstrated: Demonstrated):
    stack = demonstrated.stack
    api = f"{stack.variables['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    experiments = requests.get(f"{api}/experiments/search", params={"max_results": 100}, timeout=60)
    ids = [entry["experiment_id"] for entry in experiments.json()["experiments"]]
    runs = requests.post(f"{api}/runs/search", json={"experiment_ids": ids, "max_results": 1000}, timeout=60)
    assert len(runs.json()["runs"]) >= 6
    versions = requests.get(f"{api}/model-versions/search", timeout=60)
    shown = {"experiments": experiments.content, "runs": runs.content, "versions": versions.content}
    assert b"checkpoint_every_steps" in shown["runs"]
    assert b"run_id" in shown["versions"]
    assert _holders(shown, _needles(stack)) == []


def test_nothing_that_the_commands_printed_holds_a_credential(demonstrated: Demonstrated):
    printed = {name: text.encode() for name, text in demonstrated.outputs.items()}
    assert all(len(body) > 500 for body in printed.values())
    assert _holders(printed, _needles(demonstrated.stack)) == []
