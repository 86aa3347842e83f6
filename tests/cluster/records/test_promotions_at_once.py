"""Two that promote at the same time: one wins, the other is judged against the winner, none is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.records import turns
from cluster.records.evaluations import EVALUATION_TAG, RecordedEvaluation, log_scores
from cluster.records.promotion import CHAMPIONS_TAG, PromotionConfig, promote
from cluster.records.tracking import KIND_TAG, TrackingConfig, open_client, tracked_run
from cluster.records.turns import TICKET_PREFIX
from tests.cluster.records.mlflow_server import mlflow_server
from tests.cluster.records.versions import add_version, champion, driven
from tests.cluster.score_sheets import DIGEST

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

PATIENCE_S = 280.0
"""Below the time that a test has; a busy machine takes minutes to import MLflow."""

PROMOTER = """
import json, sys, time
from pathlib import Path
from cluster.records.promotion import PromotionConfig, promote
from cluster.records.tracking import TrackingConfig, open_client

config = TrackingConfig(uri=sys.argv[1])
open_client(config)
candidates = json.loads(sys.argv[4])
for round, (name, version) in enumerate(candidates):
    # Both start each round together: whoever comes first waits for the other.
    mine, other = (Path(sys.argv[2], f"{who}-{round}") for who in (sys.argv[3], {"a": "b", "b": "a"}[sys.argv[3]]))
    mine.touch()
    while not other.exists():
        time.sleep(0.001)
    decision = promote(config, PromotionConfig(), candidate=version, name=name)
    print(json.dumps([decision.promoted, decision.champion_version, decision.run_id]), flush=True)
"""


Decided = list[tuple[bool, str | None, str]]
"""Round by round: whether it was promoted, the champion that it was judged against, and the run."""


def in_processes(config: TrackingConfig, folder: Path, candidates: list[list[tuple[str, str]]]) -> list[Decided]:
    """What each of two processes decided about its (model, version) of each round."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTER, config.uri or "", str(folder), who, json.dumps(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for who, rounds in zip("ab", candidates, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [[tuple(json.loads(line)) for line in output.splitlines()] for output, _ in outputs]


def in_threads(config: TrackingConfig, folder: Path, candidates: list[list[tuple[str, str]]]) -> list[Decided]:
    """As :func:`in_processes`, without their start, which takes most of the time."""
    together = threading.Barrier(2)

    def decide(rounds: list[tuple[str, str]]) -> Decided:
        decided = []
        for name, version in rounds:
            together.wait(PATIENCE_S)
            decision = promote(config, PromotionConfig(), candidate=version, name=name)
            decided.append((decision.promoted, decision.champion_version, decision.run_id))
        return decided

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(decide, candidates))


def contested_model(config: TrackingConfig, name: str, evaluations: list[RecordedEvaluation]) -> None:
    """A model with a version for each evaluation; the first one is champion."""
    client = open_client(config)
    client.create_registered_model(name)
    for evaluation in evaluations:
        source = f"{client.get_run(evaluation.run_id).info.artifact_uri}/avatar"
        created = client.create_model_version(name, source, evaluation.run_id)
        client.set_model_version_tag(name, created.version, EVALUATION_TAG, json.dumps(asdict(evaluation)))
    client.set_registered_model_alias(name, "champion", "1")
    client.set_registered_model_tag(name, CHAMPIONS_TAG, '["1"]')


def check_rounds(config: TrackingConfig, race: Callable[..., list[Decided]], folder: Path, rounds: int) -> None:
    """Version 1 is champion; 2 and 3 both beat it, and 3 beats 2: whoever is second is judged against the first."""
    evaluations = []
    for mse in (100.0, 80.0, 60.0):
        with tracked_run("evaluate", "evaluate", config=config) as run:
            log_scores(run, driven(mse))
        evaluations.append(RecordedEvaluation(run.run_id, DIGEST, {}))
    names = [f"{race.__name__}-{number}" for number in range(rounds)]
    for name in names:
        contested_model(config, name, evaluations)
    decided = race(config, folder, [[(name, version) for name in names] for version in ("2", "3")])
    client = open_client(config)
    for name, of_second, of_third in zip(names, *decided, strict=True):
        tags = client.get_registered_model(name).tags
        # The best one is champion, whoever was first; a version is in the history exactly if it was promoted.
        assert champion(config, name) == "3"
        assert of_third[0]
        assert json.loads(tags[CHAMPIONS_TAG]) == (["1", "2", "3"] if of_second[0] else ["1", "3"])
        assert of_second[1] == ("1" if of_second[0] else "3")
        assert of_third[1] == ("2" if of_second[0] else "1")
        assert not [tag for tag in tags if tag.startswith(TICKET_PREFIX)]
        for decision, version in ((of_second, "2"), (of_third, "3")):
            run = client.get_run(decision[2])
            assert run.info.status == "FINISHED"
            assert run.data.tags["lipflow.model"] == f"{name}/{version}"
            assert run.data.tags["lipflow.decision"] == ("promoted" if decision[0] else "refused")
    experiment = client.get_experiment_by_name(config.experiment)
    runs = client.search_runs([experiment.experiment_id], f"tags.`{KIND_TAG}` = 'promote'")
    assert len([run for run in runs if run.data.tags["lipflow.model"].startswith(race.__name__)]) == 2 * rounds


def test_two_threads_on_one_sqlite_store(tracking_config, tmp_path: Path):
    check_rounds(tracking_config, in_threads, tmp_path, rounds=3)


@pytest.mark.slow
def test_two_processes_on_one_sqlite_store(tracking_config, tmp_path: Path):
    check_rounds(tracking_config, in_processes, tmp_path, rounds=6)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingConfig]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield TrackingConfig(uri=running.uri)


@pytest.mark.slow
def test_two_processes_on_a_server(server: TrackingConfig, tmp_path: Path):
    check_rounds(server, in_processes, tmp_path, rounds=6)


@pytest.mark.slow
def test_the_ticket_of_a_process_that_was_killed_is_torn_up(server: TrackingConfig, monkeypatch):
    add_version(server, "dead", driven(100.0))
    client = open_client(server)
    script = (
        "import sys, time\n"
        "from cluster.records.tracking import TrackingConfig, open_client\n"
        "from cluster.records.turns import turn_at\n"
        "with turn_at(open_client(TrackingConfig(uri=sys.argv[1])), 'dead'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", script, server.uri or ""], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    monkeypatch.setattr(turns, "LEASE_S", 1.0)
    assert promote(server, PromotionConfig(), name="dead").promoted
    assert not [tag for tag in client.get_registered_model("dead").tags if tag.startswith(TICKET_PREFIX)]
