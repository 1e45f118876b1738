"""deploy/kuberay: the fields that KubeRay and Kubernetes know, what the operator refuses, and what
our pods must have.

`FIELDS` is kept by hand: the parts of the `ray.io/v1` types of KubeRay 1.7
(https://github.com/ray-project/kuberay, ray-operator/apis/ray/v1) and of Kubernetes' pods that the
manifests use. The generated CRDs hold far more; a folder of them, named by KUBERAY_CRDS, is used as
well.
"""

import copy
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

NAMES = ("raycluster", "rayjob", "rayservice")
FIELDS: dict[str, dict[str, str]] = {
    "RayCluster": {"apiVersion": "str!", "kind": "str!", "metadata": "Meta!", "spec": "Cluster!"},
    "RayJob": {"apiVersion": "str!", "kind": "str!", "metadata": "Meta!", "spec": "Job!"},
    "RayService": {"apiVersion": "str!", "kind": "str!", "metadata": "Meta!", "spec": "Service!"},
    "Meta": {"name": "str!", "namespace": "str", "labels": "map", "annotations": "map"},
    "Cluster": {
        "rayVersion": "str",
        "authOptions": "Auth",
        "enableInTreeAutoscaling": "bool",
        "headGroupSpec": "Head!",
        "workerGroupSpecs": "[Worker]",
    },
    "Auth": {"mode": "disabled|token", "secretName": "str"},
    "Head": {"serviceType": "str", "rayStartParams": "map", "template": "Template!"},
    "Worker": {
        "groupName": "str!",
        "replicas": "int",
        "minReplicas": "int!",
        "maxReplicas": "int!",
        "numOfHosts": "int",
        "rayStartParams": "map",
        "template": "Template!",
    },
    "Job": {
        "entrypoint": "str",
        "submissionMode": "K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
        "submitterConfig": "Submitter",
        "backoffLimit": "int",
        "activeDeadlineSeconds": "int",
        "shutdownAfterJobFinishes": "bool",
        "ttlSecondsAfterFinished": "int",
        "rayClusterSpec": "Cluster",
    },
    "Submitter": {"backoffLimit": "int"},
    "Service": {
        "serveConfigV2": "str",
        "upgradeStrategy": "Upgrade",
        "rayClusterDeletionDelaySeconds": "int",
        "rayClusterConfig": "Cluster!",
    },
    "Upgrade": {"type": "NewCluster|NewClusterWithIncrementalUpgrade|None"},
    "Template": {"metadata": "map", "spec": "Pod!"},
    "Pod": {
        "securityContext": "PodSecurity",
        "terminationGracePeriodSeconds": "int",
        "tolerations": "[Toleration]",
        "nodeSelector": "map",
        "containers": "[Container]!",
        "volumes": "[Volume]",
    },
    "PodSecurity": {
        "runAsNonRoot": "bool",
        "runAsUser": "int",
        "runAsGroup": "int",
        "fsGroup": "int",
        "fsGroupChangePolicy": "OnRootMismatch|Always",
        "seccompProfile": "Seccomp",
    },
    "Seccomp": {"type": "RuntimeDefault|Unconfined|Localhost"},
    "Toleration": {"key": "str", "operator": "Exists|Equal", "value": "str", "effect": "str"},
    "Container": {
        "name": "str!",
        "image": "str",
        "imagePullPolicy": "Always|IfNotPresent|Never",
        "ports": "[Port]",
        "env": "[Env]",
        "securityContext": "Security",
        "livenessProbe": "Probe",
        "readinessProbe": "Probe",
        "resources": "Resources",
        "volumeMounts": "[Mount]",
    },
    "Port": {"containerPort": "int!", "name": "str"},
    "Env": {"name": "str!", "value": "str", "valueFrom": "From"},
    "From": {"secretKeyRef": "KeyRef"},
    "KeyRef": {"name": "str!", "key": "str!", "optional": "bool"},
    "Security": {"allowPrivilegeEscalation": "bool", "capabilities": "Capabilities"},
    "Capabilities": {"add": "list", "drop": "list"},
    "Probe": {
        "httpGet": "Http!",
        "initialDelaySeconds": "int",
        "periodSeconds": "int",
        "timeoutSeconds": "int",
        "failureThreshold": "int",
    },
    "Http": {"path": "str", "port": "int!"},
    "Resources": {"requests": "map", "limits": "map"},
    "Mount": {"name": "str!", "mountPath": "str!", "readOnly": "bool"},
    "Volume": {
        "name": "str!",
        "persistentVolumeClaim": "Claim",
        "emptyDir": "Empty",
        "secret": "Secret",
    },
    "Claim": {"claimName": "str!", "readOnly": "bool"},
    "Empty": {"medium": "str", "sizeLimit": "str"},
    "Secret": {"secretName": "str!", "optional": "bool"},
    "PersistentVolumeClaim": {
        "apiVersion": "str!",
        "kind": "str!",
        "metadata": "Meta!",
        "spec": "ClaimSpec!",
    },
    "ClaimSpec": {"accessModes": "list!", "resources": "Resources!", "storageClassName": "str"},
}
SIMPLE = {"str": str, "int": int, "bool": bool, "map": dict, "list": list}


def check(value: Any, kind: str, at: str) -> None:
    """ValueError for a field that is unknown, missing or of another kind."""
    kind = kind.rstrip("!")
    if kind.startswith("["):
        check(value, "list", at)
        for index, item in enumerate(value):
            check(item, kind[1:-1], f"{at}[{index}]")
    elif kind in SIMPLE:
        if type(value) is not SIMPLE[kind]:
            raise ValueError(f"{at}: wanted {kind}, found {value!r}")
    elif "|" in kind:
        if value not in kind.split("|"):
            raise ValueError(f"{at}: wanted {kind}, found {value!r}")
    else:
        fields = FIELDS[kind]
        check(value, "map", at)
        for name, item in value.items():
            if name not in fields:
                raise ValueError(f"{at}: no field {name!r} in {kind}")
            check(item, fields[name], f"{at}.{name}")
        missing = {name for name in fields if fields[name].endswith("!")} - value.keys()
        if missing:
            raise ValueError(f"{at}: {', '.join(sorted(missing))} missing")


@pytest.fixture(params=NAMES)
def whole(request: pytest.FixtureRequest, manifest) -> Any:
    return manifest(f"kuberay/{request.param}.yaml")


@pytest.fixture
def cluster(whole: Any) -> Any:
    spec = whole["spec"]
    return {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
    }[whole["kind"]]


@pytest.fixture
def pods(cluster: Any) -> list[Any]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_every_field_is_one_that_kuberay_has(whole: Any) -> None:
    assert whole["apiVersion"] == "ray.io/v1"
    check(whole, whole["kind"], whole["kind"])


def test_a_field_that_is_none_is_found(whole: Any) -> None:
    wrong = copy.deepcopy(whole)
    wrong["spec"]["rayClusterSpecs"] = {}
    with pytest.raises(ValueError, match="no field 'rayClusterSpecs'"):
        check(wrong, wrong["kind"], "x")
    wrong = copy.deepcopy(whole)
    wrong["metadata"]["name"] = 3
    with pytest.raises(ValueError, match="wanted str"):
        check(wrong, wrong["kind"], "x")


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder")
def test_the_generated_crd_takes_it(whole: Any) -> None:
    folder = Path(os.environ["KUBERAY_CRDS"])
    found = [path for path in folder.iterdir() if f"{whole['kind'].lower()}s" in path.name]
    crd = yaml.load(found[0].read_text(), yaml.CSafeLoader)
    (served,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = served["schema"]["openAPIV3Schema"]
    _close(schema)
    jsonschema.validate(whole, schema)


def _close(schema: Any) -> None:
    """No unknown fields, as the API server's strict validation has it."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    elif isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        if schema.get("x-kubernetes-int-or-string"):
            schema.pop("type", None)
        for item in schema.values():
            _close(item)


def test_the_operator_takes_it(whole: Any, cluster: Any) -> None:
    """What KubeRay's controller checks beside the fields (ray-operator's validation.go)."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", whole["metadata"]["name"])
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    spec = whole["spec"]
    if "ttlSecondsAfterFinished" in spec:
        assert spec["shutdownAfterJobFinishes"]


def test_ray_asks_for_a_token(cluster: Any, pods: list[Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    for pod in pods:  # the operator sets these; a value of ours would go before it
        names = {entry["name"] for box in pod["containers"] for entry in box["env"]}
        assert not names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}


def test_pods_are_bounded_and_watched(pods: list[Any]) -> None:
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for box in pod["containers"]:
            assert box["image"].rpartition(":")[2] not in ("", "latest", box["image"])
            assert box["securityContext"]["allowPrivilegeEscalation"] is False
            asked, most = box["resources"]["requests"], box["resources"]["limits"]
            assert {"cpu", "memory"} <= asked.keys() == most.keys()
            assert asked["memory"] == most["memory"]  # else the kernel picks whom it ends
            assert asked.get("nvidia.com/gpu") == most.get("nvidia.com/gpu")
            for probe in ("livenessProbe", "readinessProbe"):
                # Ray answers these two without a token
                assert box[probe]["httpGet"]["path"] in ("/api/healthz", "/-/healthz")
                assert box[probe]["httpGet"]["port"] in {p["containerPort"] for p in box["ports"]}


def test_volumes_are_there_and_ranks_share_memory(pods: list[Any], root: Path) -> None:
    claims = list(yaml.safe_load_all((root / "deploy/kuberay/storage.yaml").read_text()))
    for claim in claims:
        check(claim, "PersistentVolumeClaim", "claim")
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    names = {claim["metadata"]["name"] for claim in claims}
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "") in {"", *names}
        (box,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
        assert set(mounts.values()) == volumes.keys()
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_job_prefills_a_million_tokens_on_the_devices_that_it_has(manifest, parse) -> None:
    spec = manifest("kuberay/rayjob.yaml")["spec"]
    words = spec["entrypoint"].split()
    assert words[0] == "ringspan"
    asked = parse(words[1:])
    assert asked["limit_tokens"] == 1 << 20
    assert asked["ranks"] == _gpus(spec["rayClusterSpec"])
    mounts = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    roots = {mount["mountPath"] for mount in mounts["volumeMounts"]}
    for path in (asked["model"], *asked["input_"], asked["store"], asked["json"], asked["metrics"]):
        assert f"/{Path(path).parts[1]}" in roots


def test_the_service_has_a_device_for_each_rank(manifest) -> None:
    spec = manifest("kuberay/rayservice.yaml")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["args"]["ranks"] == _gpus(spec["rayClusterConfig"])
    (box,) = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount for mount in box["volumeMounts"]}
    assert str(Path(application["args"]["api_keys"]).parent) in mounts


def _gpus(cluster: Any) -> int:
    """That the workers have at least."""
    return sum(
        group["minReplicas"] * int(box["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
        for box in group["template"]["spec"]["containers"]
    )
