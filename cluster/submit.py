"""``lipflow submit JOB ARGS...``: run a job on a Ray cluster as if it ran here.

The working tree is sent along, the log is followed, and the exit code is the job's. Plain
``ray job submit -- python -m cluster.JOB ...`` works as well, where the cluster's nodes have this package.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster import command
from cluster.command import JsonOption, console
from cluster.records.code_version import tree_version
from cluster.submitting.environment import WHERE_SECRETS_BELONG, check_arguments, environment_to_send
from cluster.submitting.following import Follower
from cluster.submitting.jobs import Job, Jobs
from cluster.submitting.package import SENT_FOLDER, pack, working_tree
from lipflow.errors import ConfigError
from pipeline import storage

NOT_FOR_CLUSTERS = ("submit", "stack")
CONTEXT_SETTINGS = {"ignore_unknown_options": True}
"""What is no option of ours is the job's."""


def submit_job(
    job: str,
    arguments: Sequence[str],
    *,
    address: str | None = None,
    submission_id: str | None = None,
    working_dir: Path | None = None,
    env: Sequence[str] = (),
) -> tuple[Jobs, str]:
    """Send a job; returns the cluster's jobs and this one's name.

    Args:
        job: a command of ``lipflow``.
        arguments: its command line. A ``--recipe`` that is a local file goes along.
        address: of the cluster; None: ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS``.
        submission_id: the job's name; one that runs is followed, not submitted twice.
        working_dir: the folder to send; None: the git work tree here, else the working folder.
        env: further variables to send, ``NAME`` or ``NAME=VALUE``.

    Raises:
        ConfigError: no such job, a secret in the arguments, a tree that is too large.
        ClusterError: no cluster answers, or it refuses.
    """
    from cluster.cli import COMMANDS

    if job not in COMMANDS or job in NOT_FOR_CLUSTERS:
        jobs = ", ".join(name for name in COMMANDS if name not in NOT_FOR_CLUSTERS)
        raise ConfigError(f"submit {job}: expected one of {jobs}")
    check_arguments(arguments)
    sent = environment_to_send(os.environ, env)
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: no such folder")
    tree = working_dir.resolve() if working_dir is not None else working_tree(Path.cwd())
    arguments, extra = _with_recipes(arguments, tree)
    jobs_there = Jobs.at(address)
    version = os.environ.get("LIPFLOW_CODE_VERSION") or tree_version(tree)
    described = {} if version is None else {"LIPFLOW_CODE_VERSION": version}
    with tempfile.TemporaryDirectory(prefix="lipflow-submit-") as folder:
        package = pack(tree, Path(folder, "tree.zip"), extra)
        _say(f"{tree}: {package.files} files, {package.size_bytes / 2**20:.1f} MiB, to {jobs_there.address}")
        if package.keys_left_out:
            _say(f"not sent, as they hold keys by their names: {', '.join(package.keys_left_out)}")
        if sent.held_back:
            _say(f"not sent: {', '.join(sent.held_back)}; {WHERE_SECRETS_BELONG}")
        name, is_new = jobs_there.submit(
            Job(
                # By the cluster's own Python.
                shlex.join(["python", "-m", "cluster.cli", job, *arguments]),
                submission_id,
                {"working_dir": str(package.archive), "env_vars": {**described, **sent.variables}},
                {"lipflow.job": job, **({} if version is None else {"lipflow.code_version": version})},
            )
        )
    _say(f"{name}: {'submitted' if is_new else 'runs already'}")
    return jobs_there, name


def submit_command(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A command of lipflow, such as train.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARGS", help="Its command line; after -- where it has an option that is one of submit as well."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The cluster, http://HOST:8265 (RAY_API_SERVER_ADDRESS, RAY_ADDRESS)."),
    ] = None,
    submission_id: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the job; while it runs, it is followed and not submitted twice."),
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to send (the git work tree here).")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="A variable to send along; never a secret.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and exit as the job does.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a job on a Ray cluster: sends the working tree, follows the log, and exits with the job's exit code."""
    jobs, name = submit_job(
        job,
        arguments or (),
        address=address,
        submission_id=submission_id,
        working_dir=working_dir,
        env=env or (),
    )
    document = {"submission_id": name, "address": jobs.address}
    if not wait:
        command.emit(document, as_json, f"{name}: {jobs.how_to_follow(name)}")
        return
    stream = sys.stderr if as_json else sys.stdout
    end = Follower(jobs, name, lambda text: print(text, end="", file=stream, flush=True)).follow()
    if end is None:
        raise typer.Exit(command.EXIT_INTERRUPTED)
    if as_json:
        command.emit({**document, **asdict(end)}, as_json, "")
    else:
        _say(f"{name}: {end.status.lower()}" + (f", exit code {end.exit_code}" if end.exit_code else ""))
    if end.exit_code:
        raise typer.Exit(end.exit_code)


def _with_recipes(arguments: Sequence[str], tree: Path) -> tuple[list[str], dict[str, Path]]:
    """The arguments as the job needs them, and the local recipe files by their names in the package.

    Raises:
        ConfigError: a recipe is not there.
    """
    changed: list[str] = []
    files: dict[str, Path] = {}
    is_recipe = False
    for argument in arguments:
        option, assigned, path = argument.partition("=")
        if is_recipe or (option == "--recipe" and assigned):
            path = argument if is_recipe else path
            if storage.is_local(path):
                source = storage.local_path(path).resolve()
                if not source.is_file():
                    raise ConfigError(f"--recipe {path}: no such file")
                inside = source.is_relative_to(tree)
                name = source.relative_to(tree).as_posix() if inside else f"{SENT_FOLDER}/{len(files)}-{source.name}"
                files[name], path = source, name
            argument = path if is_recipe else f"--recipe={path}"
        is_recipe = argument == "--recipe" and not is_recipe
        changed.append(argument)
    return changed, files


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    command.run_job("cluster.submit", "submit_command")
