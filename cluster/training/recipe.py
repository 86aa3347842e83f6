"""What can be set of a training, and which settings do not go together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.records.tracking import TrackingConfig
from lipflow.config import AvatarConfig, LossConfig, RenderConfig, Signal, StrictConfig
from pipeline.loading.loader import LoaderConfig


class TrainRecipe(StrictConfig):
    """All settings of a training.

    Attributes:
        avatar: the model; with ``add_drivers`` the trained avatar's own, of which driver settings alone may be given.
        add_drivers: signals whose drivers are trained for ``model``, all the rest of which is frozen; empty: a new
            avatar is trained.
        model: a trained avatar: a path, ``file://``, ``s3://``, ``models:/`` or ``runs:/`` URI.
        loss: the objective.
        render: how images are drawn.
        loader: of one micro-batch; a worker that computes several of them shares its threads among them.
        steps: optimiser steps; a step sees ``micro_batches x frames_per_batch x views_per_frame`` views.
        micro_batches: into which the global batch of a step is cut, each with its own place in the order of the data
            and its own random numbers; None: as many as the first submission has ``workers``. The workers take them in
            turn and add up the gradients, so that the result does not depend on how many workers there are.
        learning_rate: Adam's, after ``warmup_steps`` of linear warm-up, then cosine decay to a twentieth.
        color_learning_rate_factor: how much faster the cameras' gains and biases are learned: they have few
            parameters and a long way to go.
        gradient_clip_norm: largest global gradient norm.
        precision: of the encoder, decoder and drivers while they are trained. With ``bfloat16`` the weights, the
            optimiser, the flow, rendering, colours and losses stay float32, as does everything that is validated; it
            has float32's range, so that no gradient has to be scaled.
        channels_last: keep the convolutions' weights in this memory format, which tensor cores prefer.
        compile: compile the encoder and the decoder with ``torch.compile``.
        ema_decay: of the exponential moving average of the weights, which is then what is validated and exported; None:
            the weights themselves.
        checkpoint_every_steps: a checkpoint holds all that the result depends on: weights, optimiser, average and step.
            Learning rate, random numbers and the place in the data follow from the step.
        keep_checkpoints: the latest ones that are kept, besides the best.
        log_every_steps: losses and speeds are of these steps, those of the first worker.
        pictures_every_steps: validation frames beside their reconstruction are logged this often; None: never.
        validation_frames: frames of the validation split on which checkpoints are compared.
        validation_cameras: training cameras on which they are compared, evenly spread.
        validation_loss: weights of the reconstruction by which they are compared; None: those of ``loss``. Trainings
            with other weights have comparable validation losses only if this is the same for all.
        validation_signals: signals whose drivers' answers are judged beside the encoder's; None: all of the avatar's;
            empty: the encoder's reconstruction alone, which is what avatars with and without drivers have in common.
        seed: of latent samples and input dropout; that of the weights is ``avatar.init_seed``.
        workers: processes, each with ``cpus_per_worker`` CPUs, and one GPU if ``use_gpu``; at most ``micro_batches``.
        min_workers: with how many the training goes on while the cluster has no room for all; None: it waits.
        max_failures: how often the workers are started again from the last checkpoint. Workers that leave because they
            are asked to (SIGTERM, a node that is drained) are no failure.
        register_as: name in the model registry under which an avatar with drivers is registered; None: it is not.
        tracking: where MLflow keeps the run.
    """

    avatar: AvatarConfig = AvatarConfig()
    add_drivers: tuple[Signal, ...] = ()
    model: str | None = None
    loss: LossConfig = LossConfig()
    render: RenderConfig = RenderConfig()
    loader: LoaderConfig = LoaderConfig()
    steps: int = Field(2000, gt=0)
    micro_batches: int | None = Field(None, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    color_learning_rate_factor: float = Field(10.0, gt=0)
    gradient_clip_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    ema_decay: float | None = Field(None, gt=0, lt=1)
    checkpoint_every_steps: int = Field(200, gt=0)
    keep_checkpoints: int = Field(2, gt=0)
    log_every_steps: int = Field(10, gt=0)
    pictures_every_steps: int | None = Field(None, gt=0)
    validation_frames: int = Field(8, gt=0)
    validation_cameras: int = Field(4, gt=0)
    validation_loss: LossConfig | None = None
    validation_signals: tuple[Signal, ...] | None = None
    seed: int = 0
    workers: int = Field(2, gt=0)
    min_workers: int | None = Field(None, gt=0)
    cpus_per_worker: float = Field(1, gt=0)
    use_gpu: bool = False
    max_failures: int = Field(2, ge=0)
    register_as: str | None = "lipflow"
    tracking: TrackingConfig = TrackingConfig()

    @property
    def pieces(self) -> int:
        """The number of micro-batches of a step."""
        return self.micro_batches or self.workers

    @model_validator(mode="after")
    def _check(self) -> TrainRecipe:
        gaussian = self.avatar.method == "dam-regressor" or (self.avatar.method == "dam" and not self.add_drivers)
        if gaussian and self.loss.latent_estimate != "kl":
            raise ValueError(
                f"avatar.method is {self.avatar.method}, whose KL to N(0, I) is no estimate: leave "
                "loss.latent_estimate out, or set avatar.method=conditional, lipflow or flow-gaussian"
            )
        if (gaussian or self.avatar.method == "flow-gaussian") and self.loss.reverse_weight > 0:
            raise ValueError(
                f"avatar.method is {self.avatar.method}, whose prior is N(0, I): loss.reverse_weight needs a driven "
                "prior; leave it out, or set avatar.method=conditional or lipflow"
            )
        if self.avatar.method == "dam-regressor" and not self.add_drivers:
            raise ValueError(
                "avatar.method is dam-regressor, which is a trained dam with drivers: train one with"
                " avatar.method=dam, then give it drivers with --add-driver and --model"
            )
        if self.loss.no_signal_weight > 0 and not (self.avatar.has_driven_prior or self.add_drivers):
            raise ValueError(
                f"avatar.method is {self.avatar.method}, which has no driven prior to teach what faces are like without"
                " a signal: leave loss.no_signal_weight out, or set avatar.method=conditional or lipflow"
            )
        self._check_drivers()
        self._check_validation()
        self._check_workers()
        if self.render.backend == "cuda" and not self.use_gpu:
            raise ValueError("render.backend is cuda and use_gpu is false: set use_gpu=true, or render.backend=auto")
        return self

    def _check_validation(self) -> None:
        judged = self.validation_loss or self.loss
        if judged.image_weight == judged.geometry_weight == judged.average_texture_weight == 0:
            named = "loss" if self.validation_loss is None else "validation_loss"
            raise ValueError(
                f"{named} has no weight on the reconstruction, by which checkpoints are compared: raise "
                "validation_loss.image_weight or validation_loss.geometry_weight"
            )
        if self.validation_signals and self.add_drivers:
            raise ValueError("with add_drivers the new drivers alone are judged: leave validation_signals out")
        if self.validation_signals and not self.avatar.has_drivers:
            raise ValueError(
                f"avatar.method is {self.avatar.method}, which has no drivers to be judged: "
                "leave validation_signals out"
            )
        unknown = set(self.validation_signals or ()) - set(self.avatar.signals or self.validation_signals or ())
        if unknown:
            raise ValueError(f"validation_signals names {min(unknown)}, which avatar.signals leaves out: add it there")

    def _check_workers(self) -> None:
        if self.micro_batches is not None and self.workers > self.micro_batches:
            raise ValueError(
                f"workers is {self.workers} and micro_batches is {self.micro_batches}, so that some would have"
                " nothing to do: lower workers, or start a training with more micro_batches"
            )
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, more than the {self.workers} workers: lower min_workers"
            )

    def _check_drivers(self) -> None:
        if bool(self.add_drivers) != (self.model is not None):
            raise ValueError(
                f"add_drivers is {list(self.add_drivers)} and model is {self.model}: give both (--add-driver SIGNAL"
                " --model MODEL), or neither"
            )
        if not self.add_drivers:
            return
        if len(set(self.add_drivers)) != len(self.add_drivers):
            raise ValueError(f"add_drivers names a signal twice: {list(self.add_drivers)}")
        unread = [signal for signal in self.add_drivers if signal not in self.loader.signals]
        if unread:
            raise ValueError(f"loader.signals lacks {unread[0]}, for which a driver is to be trained: add it")
        if self.loss.latent_weight == self.loss.prior_weight == self.loss.reverse_weight == 0:
            raise ValueError("loss has no term for the new drivers: raise loss.latent_weight or loss.prior_weight")
        if self.loss.no_signal_weight > 0:
            raise ValueError(
                "loss.no_signal_weight teaches an avatar's flow and encoder, and with add_drivers the drivers alone are"
                " trained: leave it out"
            )
