"""The ``lipflow`` command: every job as a sub-command. Each is also ``python -m cluster.<job>``.

Jobs are imported when they are called: Ray, MLflow and torch take seconds to load, ``--help`` should not.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from cluster import command

COMMANDS = {
    "synth": ("cluster.synth", "synth_command"),
    "inspect": ("cluster.inspect", "inspect_command"),
    "verify": ("cluster.verify", "verify_command"),
    "unwrap": ("cluster.unwrap", "unwrap_command"),
    "shard": ("cluster.shard", "shard_command"),
    "shards": ("cluster.shards", "shards_command"),
    "train": ("cluster.train", "train_command"),
    "tune": ("cluster.tune", "tune_command"),
    "import-multiface": ("cluster.import_multiface", "import_multiface_command"),
    "evaluate": ("cluster.evaluate", "evaluate_command"),
    "sample": ("cluster.sample", "sample_command"),
    "fit": ("cluster.fit", "fit_command"),
    "compare": ("cluster.compare", "compare_command"),
    "promote": ("cluster.promote", "promote_command"),
    "rollback": ("cluster.promote", "rollback_command"),
    "demo": ("cluster.demo", "demo_command"),
    "submit": ("cluster.submit", "submit_command"),
    "stack": ("cluster.stack", "stack_command"),
    "doctor": ("cluster.doctor", "doctor_command"),
}
"""Sub-command -> (module, function)."""

SUMMARIES = {
    "synth": "Write a synthetic dome capture (Multiface layout); run again to continue.",
    "inspect": "Say what is in a capture and what it lacks; draw its mesh over its photos.",
    "verify": "Decode every byte of a capture or a shard set and list what is bad.",
    "unwrap": "Make the textures that a capture lacks from its images.",
    "shard": "Write captures as WebDataset shards; run again to keep what is there and write the rest.",
    "shards": "List the shards of a set, or show what is stored of a frame.",
    "train": "Train an avatar on a shard set; run again to continue.",
    "tune": "Search a training's settings with Optuna and ASHA; run again to continue.",
    "import-multiface": "Make an avatar of weights that the public Multiface code trained.",
    "sample": "Draw random faces and judge them; show what each driving signal leaves open.",
    "fit": "Drive an avatar: latent codes, meshes and their uncertainty from a driving signal.",
    "evaluate": "Score avatars: novel views and expressions, and latents fitted to each driving signal.",
    "compare": "Put finished evaluations, and several seeds, side by side.",
    "promote": "Make an evaluated model the champion, if it is better.",
    "rollback": "Give the champion's place back to the version before it.",
    "demo": "All of the above on a small synthetic dome, in minutes, on two cores.",
    "submit": "Run a job on a Ray cluster as if it ran here; the working tree is sent along.",
    "stack": "Run S3, MLflow and Ray servers on this machine: up, status, down.",
    "doctor": "Say what is there, what is missing and what to do.",
}
EPILOG = "Every command takes --debug, which shows tracebacks and Ray's logs."


def main() -> None:
    """Entry point of the ``lipflow`` command."""
    app = typer.Typer(
        name="lipflow",
        help="Photoreal face avatars: trained on domes, driven by little.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    called = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    for name, (module, function) in COMMANDS.items():
        if name == called:
            command.add_command(app, getattr(import_module(module), function), name, SUMMARIES[name])
        else:
            command.add_command(app, _not_called, name, SUMMARIES[name])
    command.run(app)


def _not_called() -> None:
    """Stands for a command whose module was not loaded, in the list of commands."""


if __name__ == "__main__":
    main()
