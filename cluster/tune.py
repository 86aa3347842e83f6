"""The sweep: ``lipflow tune SHARDS OUT`` searches a training's settings with Ray Tune, Optuna's TPE and ASHA.

Trial 0 trains the base recipe itself, so that what the search gains is measured within it, at equal budget. A sweep
that was killed goes on when the same command is given again: finished trials are not run again, unfinished ones go on
from their last checkpoints. ``OUT`` holds::

    recipe.yaml         the settings; a second run with other settings is refused
    run.json            the sweep's MLflow run, and the digest of the shard set
    trials/0007/        a trial: trial.json, its record, beside what `lipflow train` writes
    best/               the best trial's recipe, trained on its full budget
    evaluation/         of that avatar, where the recipe asks for one
    best_recipe.yaml    for `lipflow train --recipe`
    trials.csv          a line for each trial
    report.html         tables and plots on one page
    tune.json           the summary, written last: a sweep without it is not finished
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import ray
import typer
import yaml
from ray import tune as ray_tune

from cluster import command
from cluster.command import JsonOption, RecipeOption, SetOption
from cluster.evaluate import evaluate
from cluster.recipe import load_recipe
from cluster.records.redaction import flatten, redact
from cluster.records.run import Run, TrackingError
from cluster.records.tracking import initialise, tracked_run
from cluster.reports.tune_report import write_tune_report
from cluster.runtime import progress_bar, ray_cluster
from cluster.train import RECIPE_FILE, RUN_FILE, train
from cluster.tuning.ledger import FINAL, Ledger, TrialRecord
from cluster.tuning.recipe import TuneRecipe
from cluster.tuning.runs import TrialRuns
from cluster.tuning.search import LedgerHalving, LedgerSearch
from cluster.tuning.trial import run_trial
from lipflow.errors import ConfigError
from pipeline import storage
from pipeline.loading.loader import ShardSet

SUMMARY_FILE = "tune.json"
BEST_RECIPE_FILE = "best_recipe.yaml"
BEST_FOLDER = "best"
EVALUATION_FOLDER = "evaluation"

FREE_TO_CHANGE = {
    "trials",
    "max_concurrent_trials",
    *(f"train.{name}" for name in ("cpus_per_worker", "use_gpu", "max_failures", "log_every_steps")),
    *(f"{group}.{name}" for group in ("train", "evaluate") for name in ("tracking.uri", "tracking.experiment")),
    *(f"{group}.tracking.artifact_uri" for group in ("train", "evaluate")),
}
"""Settings that may differ when a sweep is continued: how many trials there are, and where they run."""

_TRIAL_MEMORY_BYTES = 2**28
"""What Ray reserves for the process that submits a trial's training; its workers reserve their CPUs themselves."""


@dataclass(frozen=True)
class TuneSummary:
    """What a finished sweep came to.

    Attributes:
        trials: how many were run.
        completed: on their whole budget.
        stopped: by ASHA.
        failed: by an error that would come again.
        resumed_trials: that were final already when the last submission began.
        trial_steps: the budget of a trial.
        base_loss: validation loss of trial 0, the base recipe; None if it failed.
        best_trial: number of the completed trial of the lowest validation loss.
        best_loss: that loss, at the same budget and by the same yardstick as ``base_loss``.
        best_values: its searched settings.
        best_recipe: URI of its recipe.
        avatar: URI of the avatar that was trained by it at the end; None if none was.
        avatar_loss: validation loss of that avatar, on the full budget.
        model: ``models:/`` URI of the registered version; None if it was not registered.
        report: URI of the page.
        run_id: the MLflow run.
        shards_digest: digest of the shard set.
        seconds: wall-clock time of the last submission.
    """

    trials: int
    completed: int
    stopped: int
    failed: int
    resumed_trials: int
    trial_steps: int
    base_loss: float | None
    best_trial: int
    best_loss: float
    best_values: dict[str, Any]
    best_recipe: str
    avatar: str | None
    avatar_loss: float | None
    model: str | None
    report: str
    run_id: str
    shards_digest: str
    seconds: float


def tune(shards_uri: str, out_uri: str, recipe: TuneRecipe) -> TuneSummary:
    """Search a training's settings, or go on with a sweep, or return the summary of a finished one.

    Raises:
        ShardSetError: no usable shard set at ``shards_uri``.
        StorageError: ``out_uri`` cannot be written.
        ConfigError: ``out_uri`` holds a sweep with other settings or another shard set.
        SweepError: every trial failed, or some were lost and would have to be run again.
        LipflowError: what the final training or the evaluation raised.
    """
    shards_uri, out_uri = storage.normalize_uri(shards_uri), storage.normalize_uri(out_uri)
    shards = ShardSet.open(shards_uri)
    if not shards.frame_ids("val"):
        raise ConfigError(f"{shards_uri} has no validation frames, on which trials are compared: shard with some")
    storage.check_writable(out_uri)
    previous_run = _check_same_sweep(out_uri, recipe, shards.digest)
    summary_uri = storage.join(out_uri, SUMMARY_FILE)
    if storage.exists(summary_uri):
        return TuneSummary(**json.loads(storage.read_text(summary_uri)))
    began = time.perf_counter()
    tracking = recipe.train.tracking
    initialise(tracking)
    ledger = Ledger.load(out_uri)
    resumed = len(ledger.records) - len(ledger.in_state("running", "lost"))
    with (
        tracked_run(
            "tune",
            f"tune-{recipe.train.avatar.method}",
            config=tracking,
            recipe=recipe,
            shards_digest=shards.digest,
            run_id=previous_run,
        ) as run,
        ray_cluster(dashboard=True),
    ):
        text = yaml.safe_dump(redact(recipe.model_dump(mode="json")), sort_keys=False)
        storage.write_bytes(storage.join(out_uri, RECIPE_FILE), text.encode())
        facts = {"run_id": run.run_id, "shards_digest": shards.digest}
        storage.write_bytes(storage.join(out_uri, RUN_FILE), json.dumps(facts).encode())
        if run.uri.startswith("sqlite:"):
            # Trials have working folders of their own.
            tracking = tracking.model_copy(update={"uri": run.uri})
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tracking": tracking})})
        runs = TrialRuns(run, ledger)
        try:
            _search(shards_uri, ledger, recipe, run, runs)
        except BaseException:
            with suppress(TrackingError):
                runs.close("interrupted")
            raise
        runs.close("lost")
        best = ledger.winner()
        best_uri = storage.join(out_uri, BEST_RECIPE_FILE)
        final = recipe.best(best.values)
        portable = final.model_dump(mode="json", exclude={"tracking"})
        storage.write_bytes(best_uri, yaml.safe_dump(redact(portable), sort_keys=False).encode())
        trained = None
        if recipe.train_best:
            trained = train(shards_uri, storage.join(out_uri, BEST_FOLDER), final, parent_run=run.run_id)
        if recipe.evaluate is not None and trained is not None:
            settings = recipe.evaluate.model_copy(update={"tracking": tracking})
            folder = storage.join(out_uri, EVALUATION_FOLDER)
            evaluate(trained.model or trained.avatar, shards_uri, folder, settings, parent_run=trained.run_id)
        base = ledger.records[0].loss
        if base is not None and not math.isfinite(base):
            base = None
        run.log_metrics({"best/val_loss": best.loss or 0.0, "best/trial": best.number})
        summary = TuneSummary(
            trials=len(ledger.records),
            completed=len(ledger.in_state("completed")),
            stopped=len(ledger.in_state("stopped")),
            failed=len(ledger.in_state("failed")),
            resumed_trials=resumed,
            trial_steps=recipe.trial_steps,
            base_loss=base,
            best_trial=best.number,
            best_loss=best.loss or 0.0,
            best_values=best.values,
            best_recipe=best_uri,
            avatar=None if trained is None else trained.avatar,
            avatar_loss=None if trained is None else trained.validation_loss,
            model=None if trained is None else trained.model,
            report=storage.join(out_uri, "report.html"),
            run_id=run.run_id,
            shards_digest=shards.digest,
            seconds=time.perf_counter() - began,
        )
        write_tune_report(out_uri, ledger.all(), recipe, asdict(summary))
    storage.write_bytes(summary_uri, json.dumps(asdict(summary), indent=2).encode())
    return summary


def _search(shards_uri: str, ledger: Ledger, recipe: TuneRecipe, run: Run, runs: TrialRuns) -> None:
    """Run all trials that are not final yet."""
    search = LedgerSearch(ledger, recipe)
    if search.remaining == 0:
        return
    # Ctrl-C is ours: Tune's own handling would return as if the sweep had ended. Lines for people are ours too.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    with _progress(ledger, recipe) as progress, tempfile.TemporaryDirectory() as tune_folder:

        def reported(record: TrialRecord) -> None:
            runs.reported(record)
            progress(record)

        tuner = ray_tune.Tuner(
            ray_tune.with_resources(run_trial, {"cpu": 0, "memory": _TRIAL_MEMORY_BYTES}),
            param_space={"shards": shards_uri, "parent_run": run.run_id},
            tune_config=ray_tune.TuneConfig(
                num_samples=search.remaining,
                search_alg=search,
                scheduler=LedgerHalving(ledger, recipe, reported),
                max_concurrent_trials=recipe.max_concurrent_trials or _concurrent_trials(recipe),
                trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
            ),
            # The ledger is the state: Tune's own is of this submission alone.
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=tune_folder,
                verbose=0,
                failure_config=ray_tune.FailureConfig(max_failures=recipe.train.max_failures),
            ),
        )
        tuner.fit()


@contextmanager
def _progress(ledger: Ledger, recipe: TuneRecipe) -> Iterator[Callable[[TrialRecord], None]]:
    """Shows how many trials are final and the best of them; yields what is to be called with each changed record."""
    with progress_bar() as progress:
        bar = progress.add_task("tune", total=recipe.trials, note="starting")

        def show(record: TrialRecord | None = None) -> None:
            best = ledger.best()
            said = "" if best is None else f"best {best.loss:.4f} (trial {best.number})"
            if record is not None and record.state == "running":
                said = f"trial {record.number}: {record.reports[-1][1]:.4f} at step {record.last_step}; {said}"
            progress.update(bar, completed=len(ledger.in_state(*FINAL)), note=said.removesuffix("; "))

        show()
        yield show


def _concurrent_trials(recipe: TuneRecipe) -> int:
    """As many trials as the cluster's CPUs and GPUs take at a time."""
    resources = ray.cluster_resources()
    training = recipe.trial({})
    takes = {"CPU": training.workers * training.cpus_per_worker}
    if training.use_gpu:
        takes["GPU"] = training.workers
    return max(1, min(int(resources.get(name, 0) // amount) for name, amount in takes.items()))


def _check_same_sweep(out_uri: str, recipe: TuneRecipe, shards_digest: str) -> str | None:
    """The MLflow run of the sweep that ``out_uri`` holds, if any; ConfigError if it is another one."""
    recipe_uri, run_uri = storage.join(out_uri, RECIPE_FILE), storage.join(out_uri, RUN_FILE)
    if not (storage.exists(recipe_uri) and storage.exists(run_uri)):
        return None
    found = flatten(yaml.safe_load(storage.read_text(recipe_uri)))
    wanted = flatten(redact(recipe.model_dump(mode="json")))
    keys = [key for key in dict.fromkeys([*wanted, *found]) if key not in FREE_TO_CHANGE]
    differing = [key for key in keys if wanted.get(key) != found.get(key)]
    facts = json.loads(storage.read_text(run_uri))
    if facts["shards_digest"] != shards_digest:
        differing.insert(0, "shard set")
    if storage.exists(storage.join(out_uri, SUMMARY_FILE)) and wanted["trials"] != found["trials"]:
        differing.append(f"number of trials ({found['trials']}, and it is finished)")
    if differing:
        raise ConfigError(
            f"{out_uri} holds a sweep with another {', '.join(differing)}: "
            "give the same settings to continue it, or another OUT"
        )
    return facts["run_id"]


def tune_command(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Shard set: path, file:// or s3:// URI.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where trials, the best recipe and its avatar go.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="OUT must hold a sweep; its own recipe is taken if none is given.")
    ] = False,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search a training's settings with Optuna and ASHA; run again to continue."""
    if resume:
        stored = storage.join(storage.normalize_uri(out), RECIPE_FILE)
        if not storage.exists(stored):
            raise ConfigError(f"{out} holds no sweep to resume: leave out --resume to start one")
        recipe = recipe or stored
    summary = tune(shards, out, load_recipe(TuneRecipe, recipe, set_ or ()))
    base = "the base recipe failed" if summary.base_loss is None else f"the base recipe's {summary.base_loss:.4f}"
    command.emit(
        asdict(summary),
        as_json,
        f"{summary.trials} trials: {summary.completed} completed, {summary.stopped} stopped early, "
        f"{summary.failed} failed\n"
        f"best: trial {summary.best_trial}, validation loss {summary.best_loss:.4f} after {summary.trial_steps} steps "
        f"({base})\nrecipe: {summary.best_recipe}\nreport: {summary.report}",
    )


if __name__ == "__main__":
    command.run_job("cluster.tune", "tune_command")
