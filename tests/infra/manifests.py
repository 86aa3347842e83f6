"""The files of infra/ as the tests read them, and the schemas that they must fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE = INFRA / "services" / "compose.yaml"
SCHEMAS = ROOT.parent / "shared" / "schemas"
KUBERNETES_VERSION = "1.31"
"""The oldest that is meant to take the manifests."""

Document = dict[str, Any]


def manifest_files() -> list[Path]:
    """All Kubernetes manifests."""
    return sorted([*INFRA.glob("kuberay/**/*.yaml"), *INFRA.glob("services/kubernetes/*.yaml")])


def documents(path: Path) -> list[Document]:
    return copy.deepcopy(_documents(path))


@cache
def _documents(path: Path) -> list[Document]:
    return [document for document in yaml.load_all(path.read_text(), _LOADER) if document is not None]


def all_documents() -> list[Document]:
    return [document for path in manifest_files() for document in documents(path)]


def validate(document: Document) -> None:
    """As an API server with strict field validation would: unknown fields are errors.

    Raises:
        jsonschema.ValidationError: the document does not fit its kind.
    """
    if document["apiVersion"].startswith("ray.io/"):
        jsonschema.Draft202012Validator(_ray_schema(document["kind"])).validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def validate_compose(document: Document) -> None:
    jsonschema.Draft7Validator(json.loads(_schema_file("compose-spec.json").read_text())).validate(document)


def ray_clusters() -> list[Document]:
    """The spec of every RayCluster, and of the cluster of every RayJob."""
    found = [document["spec"] for document in all_documents() if document["kind"] == "RayCluster"]
    return found + [job["spec"]["rayClusterSpec"] for job in ray_jobs()]


def ray_jobs() -> list[Document]:
    return [document for document in all_documents() if document["kind"] == "RayJob"]


def pod_templates() -> Iterator[Document]:
    """Every pod template, wherever it stands."""
    for document in all_documents():
        if "template" in document.get("spec", {}):
            yield document["spec"]["template"]
        if "submitterPodTemplate" in document.get("spec", {}):
            yield document["spec"]["submitterPodTemplate"]
    for cluster in ray_clusters():
        yield from (group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]])


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of every text inside nested mappings and lists; ``{name: N, value: V}`` is N's."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and isinstance(value.get("value"), str):
            yield value["name"], value["value"]
            return
        for key, inner in value.items():
            yield from strings(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, name)
    elif isinstance(value, str):
        yield name, value


# PyYAML's own parser takes 20 s for a schema of 1.4 MB.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _schema_file(name: str) -> Path:
    path = SCHEMAS / name
    if not path.exists():
        pytest.skip(f"{path} is missing: the schemas lie outside of the repository")
    return path


@cache
def _ray_schema(kind: str) -> Document:
    definition = yaml.load(_schema_file(f"ray.io_{kind.lower()}s.yaml").read_text(), _LOADER)
    (version,) = [item for item in definition["spec"]["versions"] if item["name"] == "v1"]
    return _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))


def _strict(schema: Any) -> Any:
    """Refuse what the schema does not name, except where it says that unknown fields are kept."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        strict["additionalProperties"] = False
    return strict
