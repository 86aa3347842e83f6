"""Avatars come back from the registry as they went in."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

import lipflow
from cluster.records.card import TrainingData
from cluster.records.evaluations import record_evaluation
from cluster.records.pyfunc_model import driving_signals, input_arrays
from cluster.records.registry import (
    AvatarVersion,
    RegistryError,
    download_model,
    find_version,
    register_avatar,
    registered_version,
)
from cluster.records.tracking import TrackingConfig, open_client, tracked_run
from lipflow.addresses import FETCHERS
from lipflow.checkpoint import load_avatar, save_avatar
from lipflow.config import AvatarConfig
from lipflow.errors import LipflowError
from lipflow.model.avatar import Avatar
from lipflow.model.context import AvatarContext
from lipflow.sampling import decode_meshes, draw_driven_latents, vertex_std_mm
from lipflow.types import Camera, CameraTensors, DrivingSignals, Normalization, Topology
from pipeline import storage

# Raised inside MLflow, about its own use of SQLAlchemy and pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes"),
]

FRAMES = 3


def make_avatar(method: str = "lipflow") -> Avatar:
    rng = np.random.default_rng(0)
    topology = Topology(
        faces=np.array([[0, 1, 2], [0, 2, 3]]),
        uvs=np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32),
        uv_faces=np.array([[0, 1, 2], [0, 2, 3]]),
        weight_mask=np.ones((32, 32), np.float32),
        landmarks={"chin": 0, "nose": 2},
        num_vertices=4,
    )
    normalization = Normalization(
        rng.uniform(0, 255, (3, 32, 32)).astype(np.float32), 20.0, rng.normal(size=(4, 3)).astype(np.float32), 5.0
    )
    headset = Camera("left-eye", np.eye(3), np.eye(3, 4), (12, 16))
    context = AvatarContext(
        topology, normalization, ("a", "b"), ("a",), (headset,), "a", (24, 18), keypoint_names=("chin", "nose")
    )
    config = AvatarConfig.small(texture_size=32, latent_size=4, driver_image_size=16, method=method)
    return Avatar(config, context).eval()


def make_driving() -> DrivingSignals:
    generator = torch.Generator().manual_seed(0)
    return DrivingSignals(
        hmc_images=torch.randint(0, 255, (FRAMES, 1, 1, 12, 16), generator=generator, dtype=torch.uint8),
        hmc_present=torch.tensor([[True], [True], [False]]),
        frontal_images=torch.randint(0, 255, (FRAMES, 3, 24, 18), generator=generator, dtype=torch.uint8),
        frontal_present=torch.tensor([True, False, False]),
        keypoints=torch.rand(FRAMES, 2, 3, generator=generator) * torch.tensor([18.0, 24.0, 1.0]),
        frontal_cameras=CameraTensors(
            torch.tensor([[20.0, 0, 9], [0, 20, 12], [0, 0, 1]]).expand(FRAMES, 3, 3),
            torch.cat([torch.eye(3), torch.tensor([[0.0], [0], [500]])], 1).expand(FRAMES, 3, 4),
        ),
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("avatar") / "model"
    save_avatar(make_avatar(), folder)
    return folder


@pytest.fixture(scope="module")
def config(tracking_config) -> TrackingConfig:
    return tracking_config


@pytest.fixture(scope="module")
def registered(config, model_dir) -> AvatarVersion:
    with tracked_run("train", "train", config=config) as run:
        return register_avatar(model_dir, run, example=make_driving(), shards_digest="d1", name="packaged")


def test_registered_version_has_alias_and_digest(config, registered):
    assert registered_version("models:/packaged@challenger", config) == registered
    found = find_version(open_client(config), "packaged", "challenger")
    assert str(found.version) == registered.version
    assert found.run_id == registered.run_id
    assert found.tags["lipflow.shards_digest"] == "d1"


def test_champion_predicts_in_a_fresh_process_of_mlflow_and_lipflow_without_unpickling(
    config, registered, model_dir, tmp_path
):
    open_client(config).set_registered_model_alias("packaged", "champion", registered.version)
    driving, views = make_driving(), torch.tensor([[0.0, 0.6, 0.8]]).expand(FRAMES, 3)
    avatar = make_avatar()
    np.savez(tmp_path / "in.npz", **input_arrays(driving, views, avatar.signals))
    script = (
        "import sys, mlflow, numpy as np\n"
        "absent = ('cluster', 'pipeline', 'ray', 'webdataset', 's3fs', 'optuna', 'typer')\n"
        "sys.modules |= dict.fromkeys(absent)\n"
        "model = mlflow.pyfunc.load_model('models:/packaged@champion')\n"
        "import lipflow; print(lipflow.__file__)\n"
        "out = model.predict(dict(np.load('in.npz')))\n"
        "alone = model.predict({name: array[1:2] for name, array in np.load('in.npz').items()})\n"
        "more = model.predict(dict(np.load('in.npz')), params={'uncertainty_samples': 500, 'uncertainty_seed': 1})\n"
        "none = model.predict(model.input_example, params={'uncertainty_samples': 0})\n"
        "spreads = {name: item['vertex_std_mm'] for name, item in dict(alone=alone, more=more, none=none).items()}\n"
        "np.savez('out.npz', **spreads, **out)\n"
        "assert not any(sys.modules[name] for name in absent)\n"
    )
    env = os.environ | {
        "MLFLOW_TRACKING_URI": config.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    with torch.inference_mode():
        prior = avatar.fused_prior(avatar.signals, driving)
        decoded = avatar.decode(avatar.start(prior), views[:, None])
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(out["vertices"], decoded.vertices, atol=1e-4)
    np.testing.assert_allclose(out["latent_mean"], prior.mean, atol=1e-5)
    np.testing.assert_allclose(out["latent_std"], prior.log_std.exp(), atol=1e-5)
    # Of 500 samples of P(y | h), and of as many others: each has an error of about 1 / sqrt(2 * 500) = 3 %.
    samples = draw_driven_latents(avatar, avatar.signals, driving, 500, torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = vertex_std_mm(decode_meshes(avatar, samples)).numpy()
    np.testing.assert_allclose(out["more"], expected, rtol=0.15)  # measured 0.061
    np.testing.assert_allclose(out["vertex_std_mm"], expected, rtol=0.7)  # measured 0.27
    np.testing.assert_allclose(out["alone"], out["vertex_std_mm"][1:2], rtol=1e-3)
    assert np.isnan(out["none"]).all()
    assert out["vertex_std_mm"].dtype == np.float32
    assert out["textures"].shape == (FRAMES, 3, 32, 32)
    assert np.abs(out["textures"] - decoded.textures[:, 0].clamp(0, 255).numpy()).max() <= 0.51


def test_packaged_model_holds_no_pickle(config, registered, tmp_path):
    folder = download_model("models:/packaged@challenger", tmp_path, config)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}
    assert (folder / "..").exists()
    requirements = next(tmp_path.rglob("requirements.txt")).read_text()
    assert "torch==" in requirements
    assert "+cpu" not in requirements


@pytest.mark.parametrize("form", ["path", "file", "alias", "version", "run", "run_path"])
def test_every_way_to_name_a_model_gives_the_same_avatar(config, registered, model_dir, tmp_path, form):
    model = {
        "path": str(model_dir),
        "file": model_dir.as_uri(),
        "alias": "models:/packaged@challenger",
        "version": registered.uri,
        "run": f"runs:/{registered.run_id}",
        "run_path": f"runs:/{registered.run_id}/avatar",
    }[form]
    avatar = load_avatar(download_model(model, tmp_path, config))
    ours, theirs = make_avatar().state_dict(), avatar.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def declared_fetchers(monkeypatch, tmp_path) -> list[EntryPoint]:
    """Those of pyproject.toml, as an installation has them."""
    with (Path(__file__).parents[3] / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["entry-points"]
    folder = tmp_path / "site" / "lipflow-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lipflow\nVersion: 0.1.0\n")
    lines = [f"[{FETCHERS}]", *(f"{name} = {value}" for name, value in declared[FETCHERS].items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return [EntryPoint(name, value, FETCHERS) for name, value in declared[FETCHERS].items()]


def test_lipflow_loads_avatars_by_every_address_that_the_package_declares(
    config, registered, model_dir, declared_fetchers, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", config.uri)
    ours = make_avatar().state_dict()
    for address in (
        "models:/packaged@challenger",
        registered.uri,
        f"runs:/{registered.run_id}",
        model_dir.as_uri(),
        model_dir,
    ):
        theirs = lipflow.load_avatar(address).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), address
    assert {entry.name for entry in declared_fetchers} == {"models", "runs", "s3", "file"}
    assert {entry.load() for entry in declared_fetchers} == {download_model}
    with pytest.raises(LipflowError, match="nothing that is installed fetches avatars from gs:/"):
        lipflow.load_avatar("gs://bucket/avatar")


def test_the_card_says_what_was_trained_on_what_and_holds_no_secret(config, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-key")
    data = TrainingData(
        uri="s3://user:hunter22@bucket/very-secret-key/shards",
        digest="d" * 64,
        captures=("s3://domes/m--20180227", "s3://domes/m--20180510"),
        splits={"train": (30, 900), "val": (2, 60), "test": (8, 240)},
        train_cameras=36,
        held_out_cameras=2,
    )
    with tracked_run("train", "train", config=config) as run:
        version = register_avatar(
            model_dir, run, example=make_driving(), shards_digest=data.digest, data=data, name="carded"
        )
        record_evaluation(version, run, metrics={"fitted.psnr_db": 33.25}, shards_digest="e" * 64)
    client = open_client(config)
    written = client.download_artifacts(run.run_id, "avatar/README.md", str(tmp_path))
    described = client.get_model_version("carded", version.version).description
    for card in (Path(written).read_text(), described):
        for words in (
            "Method `lipflow`, driven by hmc, frontal, keypoints",
            "d" * 64,
            "s3://domes/m--20180227, s3://domes/m--20180510",
            "train 900 of 30 segments, val 60 of 2 segments, test 240 of 8 segments",
            "36 for training, 2 held out",
            '"texture_size": 32',
            "## Deviations",
            "## Licence",
            "| fitted.psnr_db | 33.25 |",
            "e" * 64,
        ):
            assert words in card
        assert "secret-key" not in card
        assert "hunter22" not in card
        assert "Not evaluated yet" not in card


def test_the_out_of_a_training_stands_for_its_avatar(model_dir, tmp_path, s3_server):
    """On S3 nothing else of it is fetched."""
    out = tmp_path / "out"
    shutil.copytree(model_dir, out / "avatar")
    (out / "ray").mkdir()
    (out / "ray" / "checkpoint").write_bytes(b"large")
    assert download_model(str(out), tmp_path / "local") == out / "avatar"
    uri = s3_server.uri("trained", "out")
    storage.upload_dir(out, uri)
    for place in (uri, f"{uri}/avatar"):
        folder = download_model(place, tmp_path / "from-s3" / place.rpartition("/")[2])
        assert {path.name for path in folder.iterdir()} == {path.name for path in model_dir.iterdir()}
        load_avatar(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/absent@champion", "no model 'absent'"),
        ("models:/packaged@absent", "no alias 'absent', it has"),
        ("models:/packaged/77", "no version 77, it has"),
        ("models:/packaged", "names no version"),
        ("runs:/" + "0" * 32, "cannot be fetched"),
        ("/no/such/folder", "no model folder"),
    ],
)
def test_model_that_is_not_there_is_a_one_line_error(config, registered, tmp_path, model, message):
    with pytest.raises(LipflowError, match=message) as caught:
        download_model(model, tmp_path, config)
    assert "\n" not in str(caught.value)


def test_avatar_without_drivers_is_not_registered(config, tmp_path):
    save_avatar(make_avatar("dam"), tmp_path / "dam")
    with tracked_run("train", "dam", config=config) as run, pytest.raises(RegistryError, match="without drivers"):
        register_avatar(tmp_path / "dam", run, example=make_driving(), shards_digest="d1")


def test_pyfunc_input_round_trips_and_refuses_what_does_not_fit():
    driving, views = make_driving(), torch.ones(FRAMES, 3)
    arrays = input_arrays(driving, views, ("hmc", "keypoints"))
    assert "frontal_images" not in arrays
    again = driving_signals(arrays, ("hmc", "keypoints"), torch.device("cpu"))
    assert again.available() == ("hmc", "keypoints")
    assert torch.equal(again.keypoints, driving.keypoints)
    with pytest.raises(LipflowError, match="lacks"):
        driving_signals({"keypoints": arrays["keypoints"]}, ("keypoints",), torch.device("cpu"))
    with pytest.raises(LipflowError, match="differ in their number of frames"):
        driving_signals(arrays | {"keypoints": arrays["keypoints"][:1]}, ("keypoints",), torch.device("cpu"))
    with pytest.raises(LipflowError, match="has no hmc_images"):
        input_arrays(DrivingSignals(), views, ("hmc",))


def test_signature_states_the_avatars_shapes(config, registered, tmp_path):
    download_model("models:/packaged@challenger", tmp_path, config)
    from mlflow.models import Model

    model = Model.load(next(tmp_path.rglob("MLmodel")).parent)
    inputs = {spec.name: (spec.shape, str(spec.type)) for spec in model.signature.inputs}
    assert inputs["keypoints"] == ((-1, 2, 3), "float32")
    assert inputs["hmc_images"] == ((-1, 1, 1, 12, 16), "uint8")
    outputs = {spec.name: spec.shape for spec in model.signature.outputs}
    assert outputs == {
        "vertices": (-1, 4, 3),
        "textures": (-1, 3, 32, 32),
        "latent_mean": (-1, 4),
        "latent_std": (-1, 4),
        "vertex_std_mm": (-1, 4),
    }
    assert {param.name: param.default for param in model.signature.params} == {
        "uncertainty_samples": 16,
        "uncertainty_seed": 0,
    }
    assert model.run_id == registered.run_id
    assert json.dumps(model.metadata["signals"]) == '["hmc", "frontal", "keypoints"]'
