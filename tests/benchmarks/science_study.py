"""What the science study runs, stage by stage: data, trainings, choices on validation frames, evaluations."""

from __future__ import annotations

import math
from typing import Any

from science_findings import Choice, Findings, Row
from science_runner import Runner, StoppedEarly, Task
from science_sizes import ADAM, AMBIGUOUS, FLOWS, METHODS, PORTRAYED, VARIANTS, WHITENED, Study

from cluster.training.recipe import TrainRecipe
from lipflow.config import AvatarConfig, LossConfig
from lipflow.types import DRIVING_SIGNALS
from pipeline.loading.loader import LoaderConfig
from pipeline.sharding.splits import spread

_DATA = "dome"
_FRAMES_AT_ONCE = 10
_CALIBRATION_FRAMES = 4
_AMBIGUOUS_SIGNALS = ("hmc", "keypoints")
DRIVEN = ("conditional", "conditional+prior-rec", "lipflow")
"""Methods whose prior depends on the signal."""


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

    def portraits(self, latent_weights: dict[str, float]) -> dict[str, str]:
        """Trains the methods that draw random faces, on the first seed alone; method -> name of its avatar.

        Args:
            latent_weights: as the study chose them, see :class:`Findings`.
        """
        tasks = {
            method: self._train(method, self._first, method, latent_weights["lipflow" if method in DRIVEN else "dam"])
            for method in PORTRAYED
        }
        self._runner.run(list(tasks.values()))
        return {method: task.name for method, task in tasks.items()}

    def run(self) -> Findings:
        """Everything, what matters most first; what was done before is not done again.

        If the time ends before, the findings hold what was done.
        """
        try:
            self._run()
            self.findings.complete = True
        except StoppedEarly:
            self._runner.note("the time is over: the same command goes on from here")
        self.findings.cpu_s = dict(self._runner.cpu_s)
        return self.findings

    def _run(self) -> None:
        study, found, first = self._study, self.findings, self._first
        dams, lipflows = (
            {weight: self._train(method, first, f"{method} {weight:g}", weight) for weight in weights}
            for method, weights in (("dam", study.dam_latent_weights), ("lipflow", study.driven_latent_weights))
        )
        self._runner.later([*lipflows.values()])
        self._choose_weight("dam", dams, study.dam_iterations)
        gaussian = found.latent_weights["dam"]
        avatars = {("dam", seed): self._train("dam", seed, f"dam {gaussian:g}", gaussian) for seed in study.seeds}
        self._runner.later([*avatars.values()])
        self._choose_weight("lipflow", lipflows, study.prior_iterations)
        driven = found.latent_weights["lipflow"]
        for method in (*DRIVEN, "flow-gaussian"):
            weight = driven if method in DRIVEN else gaussian
            for seed in study.seeds:
                avatars[method, seed] = self._train(method, seed, f"{method} {weight:g}", weight)
        for seed in study.seeds:
            avatars["dam-regressor", seed] = self._regressor(avatars["dam", seed], seed, driven)
        variants = {
            (variant, seed): self._train(
                "dam", seed, f"variant {variant}", gaussian, switches, steps=study.variant_steps
            )
            for seed in study.seeds
            for variant, switches in VARIANTS.items()
        }
        ambiguous = {
            (method, seed): self._train(
                method, seed, f"ambiguous {method}", driven, AMBIGUOUS, steps=study.ambiguous_steps
            )
            for seed in study.seeds
            for method in DRIVEN
        }
        in_turn = [method for method in METHODS if method != "dam-regressor"]
        self._runner.later([avatars[method, seed] for method in in_turn for seed in study.seeds])
        self._runner.later([*variants.values(), *ambiguous.values()])
        for method in ("dam", "lipflow", "conditional+prior-rec", "conditional"):
            self._drive(method, avatars)
        # A regressor's prior and decoder are its DAM's.
        own = {key: avatar for key, avatar in avatars.items() if key[0] != "dam-regressor"}
        samples = [({"method": method, "seed": seed}, avatar) for (method, seed), avatar in own.items()]
        # Of every weight that was tried: the one that is best for fits need not be best for samples.
        others = [weight for weight in dams if weight != gaussian]
        samples += [({"method": f"dam, {weight:g}", "seed": self._first}, dams[weight]) for weight in others]
        self._add(found.samples, [(label, self._samples(avatar, label["seed"])) for label, avatar in samples])
        self._add(
            found.encoders,
            [({"method": method, "seed": seed}, self._encoder(avatar)) for (method, seed), avatar in own.items()],
        )
        found.portrayed = {method: avatars[method, self._first].name for method in PORTRAYED}
        self._add(
            found.reconstructions,
            [
                ({"variant": variant, "seed": seed}, self._reconstructions(avatar))
                for (variant, seed), avatar in variants.items()
            ],
        )
        self._drive_ambiguously(ambiguous)
        self._drive("dam-regressor", avatars)
        self._drive_by_adam(avatars)
        self._add(
            found.uncertainty,
            [
                ({"method": method, "seed": seed, "shown": shown}, self._uncertainty(avatar, seed))
                for shown, group in (("all", avatars), ("ambiguous", ambiguous))
                for (method, seed), avatar in group.items()
                if method in DRIVEN
            ],
        )
        self._add(
            found.densities,
            [
                ({"flow": flow, "seed": seed, "shown": shown}, self._density(avatars["dam", seed], shown, flow, signal))
                for shown, seeds in (("ambiguous", study.seeds), ("all", study.seeds[:1]))
                for seed in seeds
                for signal in _AMBIGUOUS_SIGNALS
                for flow in FLOWS
            ],
        )

    def _add(self, rows: list[Row], labelled: list[tuple[Row, Task]]) -> None:
        """Run tasks and keep their rows with their labels; those that are done even if the time ends before."""
        tasks = [task for _, task in labelled]
        try:
            self._runner.run(tasks)
        finally:
            results = self._runner.found(tasks)
            for label, task in labelled:
                rows += [label | row for row in results.get(task.name, [])]

    def _train(
        self,
        method: str,
        seed: int,
        name: str,
        weight: float,
        switches: dict[str, Any] | None = None,
        *,
        steps: int | None = None,
    ) -> Task:
        """All methods see the same batches of a seed, and take the same steps."""
        study = self._study
        avatar, loss = METHODS[method]
        shared = {
            "texture_size": study.dome.texture_size,
            "init_seed": seed,
            "mean_scale": study.mean_scale,
            "log_std_scale": study.log_std_scale,
        }
        config = AvatarConfig.small(**(shared | avatar | (switches or {})))
        recipe = TrainRecipe(
            avatar=config,
            loss=LossConfig(**({"image_weight": study.image_weight, "latent_weight": weight} | loss)),
            render=study.render,
            loader=self._loader(seed, (config.signals or DRIVING_SIGNALS) if config.has_drivers else ()),
            steps=steps or study.steps,
            learning_rate=study.learning_rate,
            seed=seed,
        )
        return self._training(recipe, f"{name} seed {seed}", (self._shards,))

    def _regressor(self, dam: Task, seed: int, weight: float) -> Task:
        """Drivers for a trained DAM, which stays as it is."""
        study = self._study
        avatar = AvatarConfig.model_validate(dam.settings["recipe"]["avatar"])
        changes = {"method": "dam-regressor", "signals": DRIVING_SIGNALS}
        recipe = TrainRecipe(
            avatar=AvatarConfig.model_validate(avatar.model_dump() | changes),
            add_drivers=DRIVING_SIGNALS,
            model=f"avatars/{dam.name}",
            loss=LossConfig(image_weight=study.image_weight, latent_weight=weight, prior_weight=1.0),
            render=study.render,
            loader=self._loader(seed, DRIVING_SIGNALS),
            steps=study.regressor_steps,
            learning_rate=study.learning_rate,
            seed=seed,
        )
        return self._training(recipe, f"regressor of {dam.name}", (dam,))

    def _loader(self, seed: int, signals: tuple[str, ...]) -> LoaderConfig:
        study = self._study
        return LoaderConfig(
            frames_per_batch=study.frames_per_batch,
            views_per_frame=study.views_per_frame,
            seed=seed,
            decode_threads=1,
            signals=signals,
        )

    def _training(self, recipe: TrainRecipe, name: str, needs: tuple[Task, ...]) -> Task:
        return Task(name, "train", {"data": _DATA, "recipe": recipe.model_dump(mode="json")}, needs)

    def _fits(self, avatar: Task, signal: str, fit: dict[str, Any], iterations: tuple[int, ...], split: str) -> Task:
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
        label = " ".join(f"{value}" for value in fit.values())
        return Task(f"{split} {signal} {label} {avatar.name}", "fits", settings, (avatar,))

    def _tried(self, avatar: Task, iterations: int) -> list[Task]:
        """The grid's fits to validation frames, of all signals."""
        return [
            self._fits(avatar, signal, fit, (iterations,), "val")
            for signal in DRIVING_SIGNALS
            for fit in self._study.fits
        ]

    def _best(self, avatar: Task, signal: str, iterations: int) -> list[tuple[dict[str, float], float]]:
        """The grid's settings and their scores, the best first; they were run before."""
        tasks = [self._fits(avatar, signal, fit, (iterations,), "val") for fit in self._study.fits]
        results = self._runner.run(tasks)
        scored = [(fit, _score(results[task.name])) for fit, task in zip(self._study.fits, tasks, strict=True)]
        return sorted(scored, key=lambda pair: pair[1])

    def _choose_weight(self, method: str, avatars: dict[float, Task], iterations: int) -> None:
        """A method's latent weight, judged over all signals by the best fits of each; then its fits."""
        every = [task for avatar in avatars.values() for task in self._tried(avatar, iterations)]
        self._runner.run([*avatars.values(), *every])
        tried = {
            weight: {signal: self._best(avatar, signal, iterations) for signal in DRIVING_SIGNALS}
            for weight, avatar in avatars.items()
        }
        best = min(tried, key=lambda weight: sum(scores[0][1] for scores in tried[weight].values()))
        self.findings.latent_weights[method] = best
        for signal, scores in tried[best].items():
            scored = [
                ({"latent_weight": weight} | fit, score) for weight in tried for fit, score in tried[weight][signal]
            ]
            ordered = tuple(sorted(scored, key=lambda pair: pair[1]))
            self.findings.choices[method, signal] = Choice(scores[0][0], ordered)

    def _drive(self, method: str, avatars: dict[tuple[str, int], Task]) -> None:
        """Choose a method's fits on its first seed, if they are not chosen, then drive held-out frames with all."""
        study = self._study
        iterations = study.prior_iterations if method in DRIVEN else study.dam_iterations
        if method not in self.findings.latent_weights:
            self._runner.run(self._tried(avatars[method, self._first], iterations))
            for signal in DRIVING_SIGNALS:
                tried = self._best(avatars[method, self._first], signal, iterations)
                self.findings.choices[method, signal] = Choice(tried[0][0], tuple(tried))
        labelled = []
        for seed in study.seeds:
            for signal in DRIVING_SIGNALS:
                fit = self.findings.choices[method, signal].fit
                task = self._fits(avatars[method, seed], signal, fit, study.iterations_of(method), "test")
                labelled.append(({"method": method, "seed": seed}, task))
        self._add(self.findings.fits, labelled)

    def _drive_by_adam(self, avatars: dict[tuple[str, int], Task]) -> None:
        """The first seed fitted as the papers did, with the weights that were chosen for L-BFGS."""
        labelled = []
        for method, iterations in (("dam", self._study.iterations), ("lipflow", (0, self._study.prior_iterations))):
            for signal in DRIVING_SIGNALS:
                fit = self.findings.choices[method, signal].fit | ADAM
                task = self._fits(avatars[method, self._first], signal, fit, iterations, "test")
                labelled.append(({"method": f"{method}, Adam", "seed": self._first}, task))
        self._add(self.findings.fits, labelled)

    def _drive_ambiguously(self, avatars: dict[tuple[str, int], Task]) -> None:
        """The same of avatars that see little, with the settings that the method chose where it sees all."""
        labelled = []
        for (method, seed), avatar in avatars.items():
            for signal in _AMBIGUOUS_SIGNALS:
                fit = self.findings.choices[method, signal].fit
                task = self._fits(avatar, signal, fit, (0, self._study.prior_iterations), "test")
                labelled.append(({"method": method, "seed": seed}, task))
        self._add(self.findings.ambiguous_fits, labelled)

    def _reconstructions(self, avatar: Task) -> Task:
        frames = self.findings.data["frames"]
        calibration = spread(frames["train"], _CALIBRATION_FRAMES)
        settings = {
            "data": _DATA,
            "avatar": avatar.name,
            "frames": [*spread(frames["train"], len(self._frames["test"]) // 2), *self._frames["test"]],
            "cameras": self._cameras,
            "held_out_cameras": self.findings.data["test_cameras"],
            "calibration_frames": calibration,
        }
        return Task(f"reconstructions {avatar.name}", "reconstructions", settings, (avatar,))

    def _encoder(self, avatar: Task) -> Task:
        """Held-out frames as the encoder has them, which sees them whole: what fits can hardly surpass."""
        fewer = {"frames": self._frames["test"], "held_out_cameras": [], "calibration_frames": []}
        settings = self._reconstructions(avatar).settings | fewer
        return Task(f"encoder {avatar.name}", "reconstructions", settings, (avatar,))

    def _uncertainty(self, avatar: Task, seed: int) -> Task:
        settings = {"data": _DATA, "avatar": avatar.name, "frames": self._frames["test"], "samples": 64, "seed": seed}
        return Task(f"uncertainty {avatar.name}", "uncertainty", settings, (avatar,))

    def _density(self, coder: Task, shown: str, flow: str, signal: str) -> Task:
        limits = {"headset_views": "hmc", "keypoints": "keypoints"}
        hidden = {name: AMBIGUOUS[name] for name, limited in limits.items() if limited == signal}
        settings = {
            "data": _DATA,
            "avatar": coder.name,
            "avatar_changes": FLOWS[flow] | (hidden if shown == "ambiguous" else {}) | {"signals": [signal]},
            "whitened": flow == WHITENED,
            "steps": self._study.density_steps,
            "learning_rate": 2e-3,
            "seed": coder.settings["recipe"]["seed"],
        }
        return Task(f"density {shown} {flow} {signal} {coder.name}", "density", settings, (coder,))

    def _samples(self, avatar: Task, seed: int) -> Task:
        settings = {"data": _DATA, "avatar": avatar.name, "count": self._study.samples, "seed": seed}
        return Task(f"samples {avatar.name}", "prior_samples", settings, (avatar,))


def _score(rows: list[Row]) -> float:
    """What choices are made by: the mean logarithm of image and geometry error, so that neither's unit counts."""
    image = sum(row["image_mse"] for row in rows) / len(rows)
    geometry = sum(row["geometry_rmse_mm"] for row in rows) / len(rows)
    return math.log(image) / 4 + math.log(geometry) / 2
