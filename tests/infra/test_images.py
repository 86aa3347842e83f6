"""Images are pinned, run as nobody special, and hold the Python and the Ray that constraints.txt names."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import COMPOSE, INFRA, ROOT, pod_templates, ray_clusters

DOCKERFILES = [INFRA / "docker" / "Dockerfile.cpu", INFRA / "docker" / "Dockerfile.gpu"]
MLFLOW_DOCKERFILE = INFRA / "services" / "mlflow" / "Dockerfile"
TAG = re.compile(r"^[\w.\-/]+(:\d+)?(/[\w.\-/]+)?:(?P<tag>v?\d+\.\d+[\w.\-]*)$")


def is_pinned(image: str) -> bool:
    """Whether it has a tag with at least major and minor version; ``latest`` and ``18`` move."""
    return TAG.match(image) is not None


def bases(dockerfile: Path) -> list[str]:
    return re.findall(r"^FROM (\S+)", dockerfile.read_text(), re.MULTILINE)


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def instructions(dockerfile: Path) -> list[str]:
    """Instructions with their continued lines, without comments."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("image", ["postgres", "postgres:latest", "postgres:18", "a.example:5000/b", "a/b:main"])
def test_image_without_an_exact_tag_would_be_found(image: str):
    assert not is_pinned(image)


def test_every_image_is_pinned():
    images = {service["image"] for service in yaml.safe_load(COMPOSE.read_text())["services"].values()}
    images |= {container["image"] for template in pod_templates() for container in template["spec"]["containers"]}
    images |= {image for path in (*DOCKERFILES, MLFLOW_DOCKERFILE) for image in bases(path)}
    assert len(images) >= 8
    assert [image for image in sorted(images) if not is_pinned(image)] == []


def test_images_of_compose_and_of_kubernetes_are_the_same():
    def by_name(images: set[str]) -> dict[str, str]:
        return dict(image.removeprefix("registry.example.com/").rsplit(":", 1) for image in images)

    compose = by_name({service["image"] for service in yaml.safe_load(COMPOSE.read_text())["services"].values()})
    pods = by_name({container["image"] for item in pod_templates() for container in item["spec"]["containers"]})
    assert compose.items() <= pods.items()


def test_images_of_a_cluster_have_one_python_and_the_manifests_ray():
    pythons = {image for path in (*DOCKERFILES, MLFLOW_DOCKERFILE) for image in bases(path) if "python" in image}
    assert len(pythons) == 1
    major_minor = pythons.pop().split(":")[1].split(".")[:2]
    # constraints.txt was resolved, and is tested, with this one.
    assert major_minor == [str(part) for part in sys.version_info[:2]] or major_minor == ["3", "11"]
    assert {cluster["rayVersion"] for cluster in ray_clusters()} == {constraints()["ray"]}
    for path in DOCKERFILES:
        assert "--constraint constraints.txt" in path.read_text()
        assert "grep '^torch==' constraints.txt" in path.read_text()


def test_final_stages_run_as_an_ordinary_user_and_hold_no_build_tools():
    for path in (*DOCKERFILES, MLFLOW_DOCKERFILE):
        lines = instructions(path)
        final = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM")) :]
        users = [line for line in final if line.startswith("USER ")]
        assert users == ["USER 10001"]
        assert not any("g++" in line or "cuda-13" in line for line in final)
        # Build arguments stay in an image's history.
        assert not any(re.search(r"(?i)ARG .*(password|secret|token|key)", line) for line in lines)


def test_only_named_files_reach_an_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    for path in (*DOCKERFILES, MLFLOW_DOCKERFILE):
        for line in instructions(path):
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert any(source == name or source.startswith(f"{name}/") for name in allowed), source
                    assert (ROOT / source).exists()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "infra/services/secrets/" in ignored


def test_recipes_lie_where_manifests_look_for_them():
    for path in DOCKERFILES:
        assert "COPY infra/recipes /opt/lipflow/recipes" in instructions(path)


def test_secrets_of_compose_are_made_once_and_closed_to_others(tmp_path: Path):
    script = tmp_path / "make-secrets"
    script.write_bytes((INFRA / "services" / "make-secrets").read_bytes())
    script.chmod(0o755)
    assert os.access(INFRA / "services" / "make-secrets", os.X_OK)
    subprocess.run([str(script)], check=True)
    folder = tmp_path / "secrets"
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert first.keys() == {
        Path(secret["file"]).name for secret in yaml.safe_load(COMPOSE.read_text())["secrets"].values()
    }
    assert len(first["postgres_password"]) == 48
    assert re.fullmatch(
        r"\[default\]\naws_access_key_id = lipflow-\w{8}\naws_secret_access_key = \w{48}\n", first["s3_credentials"]
    )
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    subprocess.run([str(script)], check=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first
