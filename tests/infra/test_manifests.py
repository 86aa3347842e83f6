"""What infra/ would be sent to: every document fits its schema, and what it refers to exists.

No Kubernetes and no Docker daemon was at hand: that the manifests work is not shown here, that they are well formed is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.records.redaction import is_secret_name, redact_text
from tests.infra.manifests import (
    COMPOSE,
    INFRA,
    Document,
    all_documents,
    documents,
    manifest_files,
    pod_templates,
    ray_clusters,
    ray_jobs,
    strings,
    validate,
    validate_compose,
)

KEY_SHAPES = re.compile(r"AKIA[0-9A-Z]{12,}|-----BEGIN|\b[0-9a-f]{32,}\b|\b[A-Za-z0-9+/]{40,}={0,2}(?![\w/.-])")


def find(kind: str) -> list[Document]:
    return [document for document in all_documents() if document["kind"] == kind]


@pytest.mark.parametrize("path", manifest_files(), ids=lambda path: str(path.relative_to(INFRA)))
def test_every_document_fits_the_schema_of_its_kind(path: Path):
    found = documents(path)
    assert found
    for document in found:
        validate(document)


def test_every_pod_fits_the_schema_of_pods():
    """The operator's schema holds pods as well, but of the Kubernetes that it was built with."""
    templates = list(pod_templates())
    assert len(templates) >= 12
    different = {str(template): template for template in templates}.values()
    assert len(different) >= 7
    for template in different:
        metadata = template.get("metadata", {}) | {"name": "pod"}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


def test_compose_file_fits_the_compose_specification():
    validate_compose(yaml.safe_load(COMPOSE.read_text()))


def _misspelt(document: Document) -> None:
    document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["priorityClass"] = "x"


def _wrong_type(document: Document) -> None:
    document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "many"


def _missing(document: Document) -> None:
    del document["spec"]["rayClusterSpec"]["headGroupSpec"]


def _not_a_choice(document: Document) -> None:
    document["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


def _unknown(document: Document) -> None:
    document["spec"]["retries"] = 3


@pytest.mark.parametrize("change", [_misspelt, _wrong_type, _missing, _not_a_choice, _unknown])
def test_ray_schema_refuses_what_an_operator_would(change: Callable[[Document], None]):
    job = copy.deepcopy(ray_jobs()[0])
    validate(job)
    change(job)
    with pytest.raises(jsonschema.ValidationError):
        validate(job)


def test_kubernetes_and_compose_schemas_refuse_unknown_fields_and_wrong_types():
    (deployment,) = find("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        validate(deployment)
    policy = find("NetworkPolicy")[0]
    policy["spec"]["policyTypes"] = "Ingress"
    with pytest.raises(jsonschema.ValidationError):
        validate(policy)
    compose = yaml.safe_load(COMPOSE.read_text())
    compose["services"]["mlflow"]["healtcheck"] = {}
    with pytest.raises(jsonschema.ValidationError, match="healtcheck"):
        validate_compose(compose)


def test_jobs_clusters_are_made_of_the_cluster_that_stays():
    (cluster,) = find("RayCluster")
    whole = cluster["spec"]
    for job in ray_jobs():
        own = job["spec"]["rayClusterSpec"]
        assert {**own, "workerGroupSpecs": None} == {**whole, "workerGroupSpecs": None}
        for group in own["workerGroupSpecs"]:
            assert group in whole["workerGroupSpecs"], (job["metadata"], group["groupName"])


def test_clusters_ask_for_a_token_start_without_workers_and_hold_their_head():
    for cluster in ray_clusters():
        assert cluster["authOptions"]["mode"] == "token"
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        assert "nvidia.com/gpu" not in str(head)
        for group in cluster["workerGroupSpecs"]:
            assert (group["replicas"], group["minReplicas"]) == (0, 0)
            assert group["maxReplicas"] > 0


def test_pods_are_guaranteed_their_resources_unprivileged_and_without_service_links():
    for template in pod_templates():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # With a Service called mlflow, Kubernetes would set MLFLOW_PORT, which MLflow's command line reads.
        assert spec["enableServiceLinks"] is False
        for container in spec["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_what_pods_refer_to_exists():
    classes = {document["metadata"]["name"] for document in find("PriorityClass")}
    accounts = {document["metadata"]["name"] for document in find("ServiceAccount")}
    config_maps = {document["metadata"]["name"] for document in find("ConfigMap")}
    readme = (INFRA / "README.md").read_text()
    for template in pod_templates():
        spec = template["spec"]
        assert spec["priorityClassName"] in classes
        assert spec.get("serviceAccountName", "lipflow-worker") in accounts
        for container in spec["containers"]:
            sources = container.get("envFrom", [])
            assert {source["configMapRef"]["name"] for source in sources if "configMapRef" in source} <= config_maps
            secrets = {source["secretRef"]["name"] for source in sources if "secretRef" in source}
            volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
            claimed = {"database", "objects"}
            for mount in container.get("volumeMounts", []):
                assert mount["name"] in volumes.keys() | claimed
            secrets |= {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
            for secret in secrets:
                assert f"create secret generic {secret} " in readme, f"{secret} is not described in infra/README.md"
    for cluster in ray_clusters():
        assert f"create secret generic {cluster['authOptions']['secretName']} " in readme


def test_network_policies_name_pods_that_exist_and_deny_the_rest():
    policies = {document["metadata"]["name"]: document["spec"] for document in find("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = {f"{key}={value}" for template in pod_templates() for key, value in _labels(template).items()}
    # KubeRay's own, on the pods that it makes.
    labels |= {"ray.io/is-ray-node=yes", "ray.io/node-type=head", "app.kubernetes.io/name=kuberay-operator"}
    selected = set(re.findall(r"'podSelector': {'matchLabels': {'([^']+)': '([^']+)'}}", str(policies)))
    assert len(selected) >= 5
    assert {f"{key}={value}" for key, value in selected} <= labels
    # Jobs run any code: their port is open to submitters and the operator alone.
    ports = {
        name: [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
        for name, spec in policies.items()
    }
    assert [name for name, open_ports in ports.items() if 8265 in open_ports] == ["ray-jobs"]


def _labels(template: Document) -> dict[str, str]:
    return template.get("metadata", {}).get("labels", {})


def test_addresses_name_services_that_exist():
    (environment,) = [item["data"] for item in find("ConfigMap")]
    services = {
        f"http://{item['metadata']['name']}.{item['metadata']['namespace']}.svc:{item['spec']['ports'][0]['port']}"
        for item in find("Service")
    }
    assert environment["MLFLOW_TRACKING_URI"] in services
    assert environment["AWS_ENDPOINT_URL"] in services
    (mlflow,) = find("Deployment")
    variables = dict(strings(mlflow["spec"]["template"]["spec"]["containers"][0]["env"]))
    assert environment["MLFLOW_TRACKING_URI"].removeprefix("http://") in variables["ALLOWED_HOSTS"].split(",")


def test_compose_publishes_ports_on_loopback_alone():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert "ports" not in services["postgres"]
    assert all("healthcheck" in service for name, service in services.items() if name != "mlflow")
    assert "HEALTHCHECK" in (INFRA / "services" / "mlflow" / "Dockerfile").read_text()


def literal_secrets(document: object) -> list[str]:
    """Names of what looks like a secret that stands in the document itself."""
    found = []
    for name, value in strings(document):
        if is_secret_name(name) and not name.lower().endswith(("_file", "_path")) and value not in ("token", ""):
            found.append(name)
        if redact_text(value) != value or KEY_SHAPES.search(value):
            found.append(name)
    return found


def test_no_file_holds_a_secret(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert find("Secret") == []
    for document in [*all_documents(), yaml.safe_load(COMPOSE.read_text())]:
        assert literal_secrets(document) == []
    for path in INFRA.rglob("*"):
        if path.is_file() and "secrets" not in path.relative_to(INFRA).parts:
            text = path.read_text()
            assert redact_text(text) == text, path
            assert not KEY_SHAPES.search(text), path


@pytest.mark.parametrize(
    "document",
    [
        {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "hunter22"}]},
        {"environment": {"POSTGRES_PASSWORD": "hunter22"}},
        {"uri": "postgresql://mlflow:hunter22@postgres/mlflow"},
        {"args": ["--key", "AKIA" + "ABCDEFGHIJKLMNOP"]},
        {"args": ["0123456789abcdef" * 2]},
    ],
)
def test_secrets_would_be_found(document: object):
    assert literal_secrets(document)
