"""A driving signal of one's own: one more file in the room of drivers."""

import sys
from pathlib import Path

import pytest

from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import FitConfig, LossConfig
from lipflow.errors import LipflowError
from lipflow.fitting import fit
from lipflow.losses import training_loss
from lipflow.model import drivers
from lipflow.model.drivers import signal as register_module
from lipflow.model.gaussian import DiagonalGaussian
from tests.lipflow.driving_scenes import SIGNALS, same, without


@pytest.fixture
def own_signal(monkeypatch):
    """The room of drivers with one more file in it."""
    folder = Path(__file__).parent / "own_signal"
    monkeypatch.setattr(drivers, "__path__", [*drivers.__path__, str(folder)])
    monkeypatch.setattr(register_module, "_REGISTERED", dict(register_module._REGISTERED))
    drivers.import_signals()
    yield "lip-opening"
    del sys.modules["lipflow.model.drivers.lip_opening"]


def test_a_new_signal_is_one_file(own_signal, context, make_avatar, renderer, batch, generator, tmp_path):
    """Offered, configured, trained, fused and saved by its name alone."""
    assert context.offered_signals == (*SIGNALS, own_signal)
    assert make_avatar().signals == (*SIGNALS, own_signal)
    avatar = make_avatar(signals=("hmc", own_signal))
    loss = training_loss(avatar, renderer, batch, LossConfig(prior_signals_per_step=2), generator)
    loss.total.backward()
    assert loss.terms[f"latent_{own_signal}"].isfinite()
    assert all(p.grad.abs().max() > 0 for p in avatar.drivers[own_signal].parameters())
    driving = without(batch.driving, "keypoints", 0, 1)
    assert not avatar.prior(own_signal, driving).mean[0].any()
    fused = avatar.fused_prior(("hmc", own_signal), driving)
    assert same(map_rows(fused, 0), map_rows(avatar.fused_prior(("hmc",), driving), 0))
    assert not same(map_rows(fused, 1), map_rows(avatar.prior("hmc", driving), 1))
    save_avatar(avatar, tmp_path / "avatar")
    assert same(load_avatar(tmp_path / "avatar").prior(own_signal, driving), avatar.prior(own_signal, driving))


def map_rows(gaussian: DiagonalGaussian, row: int) -> DiagonalGaussian:
    return DiagonalGaussian(gaussian.mean[row], gaussian.log_std[row])


@pytest.mark.parametrize("method", ["dam", "lipflow"])
def test_a_signal_of_which_nothing_is_known_to_compare_cannot_be_fitted_to(
    own_signal, make_avatar, renderer, batch, method
):
    """Alone or beside others; its driver still gives a prior."""
    avatar = make_avatar(method=method)
    for signals in (own_signal, ("hmc", own_signal)):
        with pytest.raises(LipflowError, match=r"made to lip-opening: .* fit to hmc, frontal, keypoints"):
            fit(avatar, renderer, batch.driving, signals, FitConfig(iterations=1))


def test_a_name_is_registered_once(own_signal):
    with pytest.raises(LipflowError, match="'lip-opening' already"):
        drivers.register(drivers.find_signal(own_signal))


def test_without_its_file_a_signal_is_unknown(make_avatar, batch):
    with pytest.raises(LipflowError, match="no driving signal 'lip-opening': choose from hmc, frontal, keypoints"):
        make_avatar().prior("lip-opening", batch.driving)
