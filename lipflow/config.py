"""Typed, frozen settings of the model, the losses and the fitting. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lipflow.render.backend import BackendName

Method = Literal["dam", "dam-regressor", "conditional", "lipflow", "flow-gaussian"]


def _known_signal(name: str) -> str:
    from lipflow.errors import LipflowError
    from lipflow.model.drivers import find_signal  # not above: the drivers are built from these configs

    try:
        return find_signal(name).name
    except LipflowError as error:
        raise ValueError(str(error)) from error


Signal = Annotated[str, AfterValidator(_known_signal)]
"""The name of a registered driving signal."""


class StrictConfig(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AvatarConfig(StrictConfig):
    """The avatar's architecture. The defaults are the sizes of the public Multiface model.

    Channel widths are listed from the coarsest level, 4 x 4, upwards. A smaller texture uses the first ones; the
    last one is repeated for a larger texture.

    Attributes:
        method: ``dam`` (prior N(0, I), no drivers), ``dam-regressor`` (a trained dam to which drivers were added that
            regress z: its prior stays N(0, I), its fits start at their answer), ``conditional`` (driven prior, no
            flow), ``lipflow``, or ``flow-gaussian`` (N(0, I) in y behind a flow, no drivers).
        texture_size: T, a power of two from 32 upwards.
        latent_size: D, the length of z.
        hidden_size: width of the mesh and texture features.
        view_size: width of the encoded view vector.
        encoder_channels: widths of the texture encoder's convolutions, coarsest first.
        decoder_channels: widths of the texture decoder's features, coarsest first.
        spatial_bias: the decoder's biases have the full shape of their features, not one value a channel.
        residual: a residual 3 x 3 convolution follows every change of resolution.
        upsample: ``transposed`` convolution, or true ``bilinear`` interpolation and a convolution; ``nearest``, which
            the public Multiface code does under the name of bilinear, is there for its weights.
        warp_field: the decoded texture is sampled at a decoded deformation grid.
        warp_kind: ``integrated`` from positive increments, so that texels never flip; ``offset``, a plain field of
            offsets as in the public Multiface code, can fold and is there for its weights.
        warp_channels: widths of the warp decoder's features, coarsest first; their number sets the size of the
            decoded field, ``4 * 2 ** (len - 1)`` (``offset``: half of it), at most T.
        color_correction: of each camera, on the whole ``texture``; ``deviation``, on its difference from the mean
            texture alone as in the public Multiface code, is there for its weights.
        mean_scale: factor of the encoder's mean (public: 0.1).
        log_std_scale: factor of the encoder's log standard deviation (public: 0.01).
        signals: the driving signals that have an encoder; None for all that the capture offers.
        driver_image_size: side to which headset and frontal images are resized for their encoders.
        driver_channels: widths of their convolutions, coarsest first.
        driver_hidden_size: width of the driving encoders' features and of a headset view's token, a multiple of the
            4 attention heads.
        driver_landmark_size: width of a landmark's token, a multiple of the 4 attention heads.
        driver_dropout: probability with which a headset view or a landmark is hidden in training.
        driver_subset_dropout: probability with which only a random subset of a frame's headset views, or only one
            patch of its landmarks, is shown in training.
        headset_views: the headset cameras that drivers and fits may see; None for all that the capture has.
        keypoints: the landmarks that drivers and fits may see; None for all that the capture has.
        flow_steps: coupling steps of f.
        flow_transform: of each coupling, ``affine``, or a rational-quadratic ``spline`` on [-5, 5].
        flow_bins: of each spline.
        flow_hidden_size: width of the coupling networks.
        flow_conditional: the couplings see the mean and log std of the signal's prior P(y | h), N(0, I) without one.
        init_seed: seed of the initial weights and of the coupling masks.
    """

    method: Method = "lipflow"
    texture_size: int = Field(1024, ge=32)
    latent_size: int = Field(128, ge=2)
    hidden_size: int = Field(256, ge=1)
    view_size: int = Field(8, ge=1)
    encoder_channels: tuple[int, ...] = Field((128, 128, 64, 64, 32, 32, 16, 16), min_length=1)
    decoder_channels: tuple[int, ...] = Field((128, 128, 64, 64, 32, 32, 16, 16), min_length=1)
    spatial_bias: bool = True
    residual: bool = False
    upsample: Literal["transposed", "bilinear", "nearest"] = "transposed"
    warp_field: bool = False
    warp_kind: Literal["integrated", "offset"] = "integrated"
    warp_channels: tuple[int, ...] = Field((128, 64, 64, 32, 32, 16), min_length=2)
    color_correction: Literal["texture", "deviation"] = "texture"
    mean_scale: float = Field(0.1, gt=0)
    log_std_scale: float = Field(0.01, gt=0)
    signals: tuple[Signal, ...] | None = None
    driver_image_size: int = Field(256, ge=16)
    driver_channels: tuple[int, ...] = Field((128, 128, 64, 64, 32, 16), min_length=1)
    driver_hidden_size: int = Field(256, ge=4, multiple_of=4)
    driver_landmark_size: int = Field(32, ge=4, multiple_of=4)
    driver_dropout: float = Field(0.1, ge=0, lt=1)
    driver_subset_dropout: float = Field(0.2, ge=0, le=1)
    headset_views: tuple[str, ...] | None = Field(None, min_length=1)
    keypoints: tuple[str, ...] | None = Field(None, min_length=1)
    flow_steps: int = Field(4, ge=2)
    flow_transform: Literal["affine", "spline"] = "affine"
    flow_bins: int = Field(8, ge=2)
    flow_hidden_size: int = Field(64, ge=1)
    flow_conditional: bool = False
    init_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("texture_size", "driver_image_size"):
            size = getattr(self, name)
            if size & (size - 1):
                raise ValueError(f"{name} is {size}, which is no power of two: use one, such as 64 or 1024")
        for name in ("encoder_channels", "decoder_channels", "warp_channels", "driver_channels"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} holds a width below 1: {getattr(self, name)}")
        coarsest = 4 if self.warp_kind == "integrated" else 2
        if self.warp_field and coarsest * 2 ** (len(self.warp_channels) - 1) > self.texture_size:
            raise ValueError(
                f"{len(self.warp_channels)} warp_channels decode a field larger than texture_size "
                f"{self.texture_size}: give fewer warp_channels"
            )
        if not self.has_drivers and self.signals:
            raise ValueError(
                f"method is {self.method}, which has no drivers: leave signals out, or use method conditional"
            )
        if self.flow_conditional and self.method != "lipflow":
            raise ValueError(
                f"flow_conditional is true and method is {self.method}, which has no drivers behind a flow to "
                "condition it on: leave flow_conditional out, or use method lipflow"
            )
        for name in ("signals", "headset_views", "keypoints"):
            listed = getattr(self, name) or ()
            if len(set(listed)) != len(listed):
                raise ValueError(f"{name} lists a name twice: {listed}")
        for name, signal in (("headset_views", "hmc"), ("keypoints", "keypoints")):
            if getattr(self, name) is not None and self.signals is not None and signal not in self.signals:
                raise ValueError(f"{name} limits {signal}, which signals leaves out: leave out {name} too")
        return self

    @property
    def has_drivers(self) -> bool:
        """Whether the signals have encoders: those of the prior, or regressors of z."""
        return self.method in ("dam-regressor", "conditional", "lipflow")

    @property
    def has_driven_prior(self) -> bool:
        """Whether drivers predict y: the method's prior then depends on the signal."""
        return self.method in ("conditional", "lipflow")

    @property
    def has_flow(self) -> bool:
        """Whether a flow lies between z and y; else y = z."""
        return self.method in ("lipflow", "flow-gaussian")

    @classmethod
    def small(cls, **changes) -> Self:
        """Widths for demos on a CPU core, with textures of 64 or 128; any field can be given."""
        widths: dict[str, Any] = {
            "texture_size": 64,
            "latent_size": 32,
            "hidden_size": 64,
            "encoder_channels": (64, 48, 32, 16, 8),
            "decoder_channels": (48, 48, 32, 16, 8),
            "warp_channels": (24, 16, 8),
            "driver_image_size": 64,
            "driver_channels": (48, 32, 16, 8),
            "driver_hidden_size": 96,
        }
        return cls(**(widths | changes))


class RenderConfig(StrictConfig):
    """How images are drawn; see :class:`lipflow.render.renderer.Renderer`.

    Attributes:
        backend: ``auto`` by the device, or ``reference``, ``cpu``, ``cuda``.
        filter: ``bilinear``, or ``trilinear`` over mip maps, for textures finer than the image.
        antialias: silhouettes are blended, in training over the photo's own pixels beside them. Not in the papers. In
            small images they are many pixels, and without it their errors drag texture and mesh along.
    """

    backend: BackendName = "auto"
    filter: Literal["bilinear", "trilinear"] = "bilinear"
    antialias: bool = False


class LossConfig(StrictConfig):
    """Weights of the training loss; the reductions are stated in ``lipflow.losses``.

    Attributes:
        image_weight: of the rendered image term.
        geometry_weight: of the vertex term.
        average_texture_weight: of the term that draws the mean of a frame's decoded views to its average texture.
            Not in the papers; it reaches every texel at every step.
        latent_weight: of KL(Q || N(0, I)) for ``dam``, of the regression error for ``dam-regressor``, of the estimate
            of KL(Q || P(. | h)) otherwise; without drivers P is N(0, I) in y.
        latent_estimate: ``kl`` with Q's analytic entropy, or ``likelihood``, -log p(z | h) alone, which does not keep
            Q from shrinking; no choice for ``dam`` and ``dam-regressor``.
        prior_weight: of the reconstruction from z = f^-1(y), y ~ P(. | h), or from the regressed z; no such term
            without drivers.
        reverse_weight: of the reverse term, -log q(z | x) at those z; no such term without driven prior.
        prior_signals_per_step: how many of the present signals, drawn at random, are decoded for that term in a
            step, and all where there are no more; an unbiased estimate of the mean over all of them.
        no_signal_weight: of the estimate of KL(Q || P) with P = N(0, I) in y in every step, by which a driven prior
            also learns what faces are like when nothing is shown; no such term without driven prior, which has its
            ``latent_weight`` for it. Not in the papers.
        min_posterior_std: mean standard deviation of Q below which training stops: its samples then say nothing
            about their neighbourhood any more. 0 lets it go on.
    """

    image_weight: float = Field(1.0, ge=0)
    geometry_weight: float = Field(1.0, ge=0)
    average_texture_weight: float = Field(0.0, ge=0)
    latent_weight: float = Field(0.01, ge=0)
    latent_estimate: Literal["kl", "likelihood"] = "kl"
    prior_weight: float = Field(1.0, ge=0)
    reverse_weight: float = Field(0.0, ge=0)
    prior_signals_per_step: int = Field(1, ge=1)
    no_signal_weight: float = Field(0.0, ge=0)
    min_posterior_std: float = Field(1e-3, ge=0)


class FitConfig(StrictConfig):
    """Settings of the inference-time optimisation.

    Attributes:
        optimizer: ``adam``, or ``lbfgs`` with a line search, in each frame by itself.
        space: coordinates that the optimiser moves in: ``z``, or ``y = f(z)``, in which the driven prior is a
            Gaussian. What is sought, and the objective, are the same.
        density: whose prior density counts: of ``y``, which is highest at the driver's own answer, where the fit
            starts, so that a larger ``prior_weight`` always leads back there; or of ``z``, with the flow's
            log-determinant, which may be highest elsewhere.
        iterations: renderings after that of the start: steps of Adam, or trials of L-BFGS's line search.
        learning_rate: of Adam; the RMS over the coordinates of L-BFGS's very first step.
        history: pairs of steps and gradient changes that L-BFGS keeps.
        patience: iterations over which a frame's progress is judged; None: no frame stops before ``iterations``.
        tolerance: a frame stops when the last ``patience`` iterations brought at most this share of all that its fit
            has gained.
        prior_weight: lambda, of the negative log density per latent dimension.
        temporal_weight: of half the squared distance from the previous frame's answer per latent dimension, where a
            sequence is fitted (:func:`lipflow.fitting.fit_sequence`).
        headset_cutoff: error of a headset pixel, in standard deviations of its view, beyond which it counts as hidden
            by something that is no face (Geman-McClure).
        keypoint_noise_mm: standard deviation of a landmark; residuals are measured in it.
        keypoint_cutoff: residual, in standard deviations, beyond which a landmark counts as an outlier
            (Geman-McClure).
        antialias: renderings are blended across silhouettes, whose place then has a gradient too.
    """

    optimizer: Literal["adam", "lbfgs"] = "lbfgs"
    space: Literal["z", "y"] = "z"
    density: Literal["y", "z"] = "y"
    iterations: int = Field(20, ge=0)
    learning_rate: float = Field(0.05, gt=0)
    history: int = Field(10, ge=1)
    patience: int | None = Field(20, ge=1)
    tolerance: float = Field(0.001, ge=0, lt=1)
    prior_weight: float = Field(0.3, ge=0)
    temporal_weight: float = Field(0.0, ge=0)
    headset_cutoff: float = Field(1.0, gt=0)
    keypoint_noise_mm: float = Field(2.0, gt=0)
    keypoint_cutoff: float = Field(3.0, gt=0)
    antialias: bool = True
