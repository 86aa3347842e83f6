"""What the science study runs, stage by stage: data, trainings, choices on validation frames, evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from science_runner import Runner, Task
from science_sizes import FLOWS, METHODS, PORTRAYED, VARIANTS, Study, ambiguous_settings

from cluster.training_loop import TrainRecipe
from lipflow.config import AvatarConfig, LossConfig
from lipflow.types import DRIVING_SIGNALS
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.splits import spread

Row = dict[str, Any]

_DATA = "dome"
_FRAMES_AT_ONCE = 10
_CALIBRATION_FRAMES = 4
_AMBIGUOUS_METHODS = ("conditional+prior-rec", "lipflow")
_AMBIGUOUS_SIGNALS = ("hmc", "keypoints")
DRIVEN = ("conditional", "conditional+prior-rec", "lipflow")
"""Methods whose prior depends on the signal."""


@dataclass(frozen=True)
class Choice:
    """What validation frames chose for a method and signal.

    Attributes:
        fit: the settings.
        tried: (settings, score) of all that was tried, the best first.
    """

    fit: dict[str, float]
    tried: tuple[tuple[dict[str, Any], float], ...]


@dataclass
class Findings:
    """All rows; each has the frame, the method or variant, and the seed.

    Attributes:
        latent_weight: lambda_3 that validation frames chose for the DAM.
        choices: (method, signal) -> settings of its fits.
        fits: driven held-out frames, by signal and iterations.
        ambiguous_fits: the same of avatars that see the ambiguous signals alone.
        reconstructions: the encoder's, in all four quadrants.
        uncertainty: of p(z | h).
        densities: of frozen codes.
        samples: of the priors, one row for each method and seed.
        cpu_s: (kind, name) of every task -> CPU seconds.
        portrayed: method -> its avatar of the first seed, for pictures of random faces.
        data: what the shard set holds.
    """

    data: dict[str, Any]
    latent_weight: float = math.nan
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    fits: list[Row] = field(default_factory=list)
    ambiguous_fits: list[Row] = field(default_factory=list)
    reconstructions: list[Row] = field(default_factory=list)
    uncertainty: list[Row] = field(default_factory=list)
    densities: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    cpu_s: dict[tuple[str, str], float] = field(default_factory=dict)
    portrayed: dict[str, str] = field(default_factory=dict)


class Stages:
    """The study's tasks: later stages follow from what earlier ones chose."""

    def __init__(self, study: Study, runner: Runner, workers: int):
        self._study, self._runner = study, runner
        dome = study.dome.model_dump(mode="json")
        parts = tuple(
            Task(f"dome-{part}", "dome", {"data": _DATA, "dome": dome, "part": part, "parts": workers})
            for part in range(workers)
        )
        settings = {"data": _DATA, "dome": dome, "shard": study.shard.model_dump(mode="json")}
        self._shards = Task("data", "shards", settings, parts)
        data = runner.run([*parts, self._shards])[self._shards.name]
        candidates = [camera for camera in data["train_cameras"] if camera != data["frontal_camera"]]
        self._cameras = spread(candidates, study.cameras)
        self._frames = {
            "val": spread(data["frames"]["val"], study.tuning_frames),
            "test": spread(data["frames"]["test"], study.test_frames),
        }
        self.findings = Findings(data)
        self._first = study.seeds[0]

    def portraits(self) -> dict[str, str]:
        """Trains the methods that draw random faces, on the first seed alone; method -> name of its avatar."""
        tasks = {method: self._train(method, self._first, method, self._study.latent_weight) for method in PORTRAYED}
        self._runner.run(list(tasks.values()))
        return {method: task.name for method, task in tasks.items()}

    def run(self) -> Findings:
        """Everything; what was done before is not done again."""
        study = self._study
        dams = {
            weight: self._train(f"dam {weight:g}", self._first, "dam", weight) for weight in study.dam_latent_weights
        }
        avatars = {
            (method, seed): self._train(method, seed, method, study.latent_weight)
            for seed in study.seeds
            for method in METHODS
            if method != "dam"
        }
        variants = {
            (variant, seed): self._train(f"variant {variant}", seed, "dam", study.latent_weight, switches)
            for seed in study.seeds
            for variant, switches in VARIANTS.items()
        }
        ambiguous = {
            (method, seed): self._train(f"ambiguous {method}", seed, method, study.latent_weight, ambiguous_settings())
            for seed in study.seeds
            for method in _AMBIGUOUS_METHODS
            if ambiguous_settings()
        }
        # The longest first, so that the last ones end together.
        self._runner.run([*ambiguous.values(), *avatars.values(), *variants.values(), *dams.values()])
        self._choose_dam(dams)
        avatars |= {
            ("dam", seed): self._train(f"dam {self.findings.latent_weight:g}", seed, "dam", self.findings.latent_weight)
            for seed in study.seeds
        }
        self._runner.run([avatars["dam", seed] for seed in study.seeds])
        avatars = {(method, seed): avatars[method, seed] for method in METHODS for seed in study.seeds}
        self.findings.portrayed = {method: avatars[method, self._first].name for method in PORTRAYED}
        for method in METHODS:
            if method != "dam":
                self._choose_fits(method, avatars[method, self._first])
        self._evaluate(avatars, variants, ambiguous)
        self.findings.cpu_s = dict(self._runner.cpu_s)
        return self.findings

    def _train(
        self, name: str, seed: int, method: str, latent_weight: float, switches: dict[str, Any] | None = None
    ) -> Task:
        """All methods see the same batches of a seed, and take the same steps."""
        study = self._study
        avatar, loss = METHODS[method]
        config = AvatarConfig.small(
            **(
                {"texture_size": study.dome.texture_size, "init_seed": seed}
                | {"mean_scale": study.mean_scale, "log_std_scale": study.log_std_scale}
                | avatar
                | (switches or {})
            )
        )
        recipe = TrainRecipe(
            avatar=config,
            loss=LossConfig(**({"image_weight": study.image_weight, "latent_weight": latent_weight} | loss)),
            loader=LoaderConfig(
                frames_per_batch=study.frames_per_batch,
                views_per_frame=study.views_per_frame,
                seed=seed,
                decode_threads=1,
                signals=() if config.method == "dam" else (config.signals or DRIVING_SIGNALS),
            ),
            steps=study.steps,
            learning_rate=study.learning_rate,
            seed=seed,
        )
        settings = {"data": _DATA, "recipe": recipe.model_dump(mode="json")}
        return Task(f"{name} seed {seed}", "train", settings, (self._shards,))

    def _fits(self, avatar: Task, signal: str, fit: dict[str, float], iterations: tuple[int, ...], split: str) -> Task:
        settings = {
            "data": _DATA,
            "avatar": avatar.name,
            "signal": signal,
            "fit": fit,
            "iterations": list(iterations),
            "frames": self._frames[split],
            "cameras": self._cameras,
            "frames_at_once": _FRAMES_AT_ONCE,
        }
        label = f"{fit['prior_weight']:g} {fit['learning_rate']:g}"
        return Task(f"{split} {signal} {label} {avatar.name}", "fits", settings, (avatar,))

    def _grid(self) -> list[dict[str, float]]:
        study = self._study
        return [
            {"prior_weight": weight, "learning_rate": rate} for weight in study.fit_weights for rate in study.fit_rates
        ]

    def _tried(self, avatar: Task, signal: str, iterations: int) -> list[tuple[dict[str, float], float]]:
        """The grid's settings and their scores on validation frames, the best first."""
        tasks = [self._fits(avatar, signal, fit, (iterations,), "val") for fit in self._grid()]
        results = self._runner.run(tasks)
        scored = [(fit, _score(results[task.name])) for fit, task in zip(self._grid(), tasks, strict=True)]
        return sorted(scored, key=lambda pair: pair[1])

    def _choose_dam(self, dams: dict[float, Task]) -> None:
        """lambda_3, judged over all signals by the best fits of each; then the DAM's fits."""
        iterations = self._study.dam_iterations
        # All at once, so that no process waits; the calls below find them done.
        self._runner.run(
            [
                self._fits(avatar, signal, fit, (iterations,), "val")
                for avatar in dams.values()
                for signal in DRIVING_SIGNALS
                for fit in self._grid()
            ]
        )
        tried = {
            weight: {signal: self._tried(avatar, signal, iterations) for signal in DRIVING_SIGNALS}
            for weight, avatar in dams.items()
        }
        best = min(tried, key=lambda weight: sum(scores[0][1] for scores in tried[weight].values()))
        self.findings.latent_weight = best
        for signal, scores in tried[best].items():
            every = [
                ({"latent_weight": weight} | fit, score) for weight in tried for fit, score in tried[weight][signal]
            ]
            ordered = tuple(sorted(every, key=lambda pair: pair[1]))
            self.findings.choices["dam", signal] = Choice(scores[0][0], ordered)

    def _choose_fits(self, method: str, avatar: Task) -> None:
        iterations = self._study.prior_iterations
        self._runner.run(
            [
                self._fits(avatar, signal, fit, (iterations,), "val")
                for signal in DRIVING_SIGNALS
                for fit in self._grid()
            ]
        )
        for signal in DRIVING_SIGNALS:
            tried = self._tried(avatar, signal, iterations)
            self.findings.choices[method, signal] = Choice(tried[0][0], tuple(tried))

    def _evaluate(
        self,
        avatars: dict[tuple[str, int], Task],
        variants: dict[tuple[str, int], Task],
        ambiguous: dict[tuple[str, int], Task],
    ) -> None:
        """All on held-out segments, as one list of tasks."""
        study, found = self._study, self.findings
        labelled: list[tuple[list[Row], Row, Task]] = []
        for (method, seed), avatar in avatars.items():
            label = {"method": method, "seed": seed}
            for signal in DRIVING_SIGNALS:
                fit = found.choices[method, signal].fit
                task = self._fits(avatar, signal, fit, study.iterations_of(method), "test")
                labelled.append((found.fits, label, task))
        for (method, seed), avatar in ambiguous.items():
            label = {"method": method, "seed": seed}
            for signal in _AMBIGUOUS_SIGNALS:
                fit, iterations = found.choices[method, signal].fit, (0, study.prior_iterations)
                task = self._fits(avatar, signal, fit, iterations, "test")
                labelled.append((found.ambiguous_fits, label, task))
        for (variant, seed), avatar in variants.items():
            label = {"variant": variant, "seed": seed}
            labelled.append((found.reconstructions, label, self._reconstructions(avatar)))
        for shown, group in (("all", avatars), ("ambiguous", ambiguous)):
            for (method, seed), avatar in group.items():
                if method in DRIVEN:
                    label = {"method": method, "seed": seed, "shown": shown}
                    labelled.append((found.uncertainty, label, self._uncertainty(avatar, seed)))
        for shown, limits in (("all", {}), ("ambiguous", ambiguous_settings())):
            for seed in study.seeds:
                for flow, changes in FLOWS.items():
                    for signal in _AMBIGUOUS_SIGNALS:
                        label = {"flow": flow, "seed": seed, "shown": shown}
                        task = self._density(avatars["dam", seed], f"{shown} {flow}", signal, changes | limits, seed)
                        if limits or shown == "all":
                            labelled.append((found.densities, label, task))
        for (method, seed), avatar in avatars.items():
            labelled.append((found.samples, {"method": method, "seed": seed}, self._samples(avatar, seed)))
        results = self._runner.run([task for _, _, task in labelled])
        for rows, label, task in labelled:
            result = results[task.name]
            rows += [label | row for row in (result["rows"] if isinstance(result, dict) else result)]

    def _reconstructions(self, avatar: Task) -> Task:
        frames = self.findings.data["frames"]
        calibration = spread(frames["train"], _CALIBRATION_FRAMES)
        settings = {
            "data": _DATA,
            "avatar": avatar.name,
            "frames": [*spread(frames["train"], len(self._frames["test"])), *self._frames["test"]],
            "cameras": self._cameras,
            "held_out_cameras": self.findings.data["test_cameras"],
            "calibration_frames": calibration,
        }
        return Task(f"reconstructions {avatar.name}", "reconstructions", settings, (avatar,))

    def _uncertainty(self, avatar: Task, seed: int) -> Task:
        settings = {"data": _DATA, "avatar": avatar.name, "frames": self._frames["test"], "samples": 64, "seed": seed}
        return Task(f"uncertainty {avatar.name}", "uncertainty", settings, (avatar,))

    def _density(self, coder: Task, name: str, signal: str, changes: dict[str, Any], seed: int) -> Task:
        settings = {
            "data": _DATA,
            "avatar": coder.name,
            "avatar_changes": changes | {"signals": [signal]},
            "steps": self._study.density_steps,
            "learning_rate": 1e-3,
            "seed": seed,
        }
        return Task(f"density {name} {signal} {coder.name}", "density", settings, (coder,))

    def _samples(self, avatar: Task, seed: int) -> Task:
        settings = {"data": _DATA, "avatar": avatar.name, "count": self._study.samples, "seed": seed}
        return Task(f"samples {avatar.name}", "prior_samples", settings, (avatar,))


def _score(rows: list[Row]) -> float:
    """What choices are made by: the mean logarithm of image and geometry error, so that neither's unit counts."""
    image = sum(row["image_mse"] for row in rows) / len(rows)
    geometry = sum(row["geometry_rmse_mm"] for row in rows) / len(rows)
    return math.log(image) / 4 + math.log(geometry) / 2
