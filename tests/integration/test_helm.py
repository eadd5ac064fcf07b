"""The Helm chart without a cluster: lint, schemas, a security scan, and that it means what the mesh does."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from expertmesh.mesh.addresses import split_addresses, split_host_port
from support import helm
from support.helm import CHART, RANK_ROLES, ROOT, VALUES, Document, container, each_values, rendered, tool

pytestmark = pytest.mark.slow

TIMEOUT_S = 180
LWS_SCHEMA = ROOT / "tests/data/leaderworkerset.schema.json"
DIGEST = "image.digest=sha256:" + "0" * 64

CHECKOV_SKIPPED = {
    "CKV_K8S_15": "always pulling: the image is named by a digest, which is one image whenever it is pulled",
}
KINDS = {
    "ConfigMap",
    "Deployment",
    "HorizontalPodAutoscaler",
    "LeaderWorkerSet",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
    "ServiceAccount",
    "StatefulSet",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


# -- as tools see it ------------------------------------------------------------------------------------------------


@each_values
def test_lint(values: Path) -> None:
    result = helm.run("lint", "--strict", CHART, *helm.options(values))
    assert result.returncode == 0, result.stdout + result.stderr


def test_schemas_of_kubernetes(tmp_path: Path) -> None:
    validate = tool("kubernetes", "kubernetes-validate")
    everything = [document for values in VALUES for document in rendered(values).as_plain_kinds()]
    file = helm.write(everything, tmp_path / "all.yaml")
    result = run(validate, "-k", "1.34", "--strict", file)
    lines = (result.stdout + result.stderr).splitlines()
    # A kind that it does not know is a warning to it: there must be a verdict for every document, and no other line.
    passed = [line for line in lines if " passed for resource " in line]
    assert result.returncode == 0, lines
    assert lines == passed
    assert len(passed) == len(everything)
    assert {document["kind"] for values in VALUES for document in rendered(values).documents} == KINDS


def test_a_wrong_field_is_found(tmp_path: Path) -> None:
    validate = tool("kubernetes", "kubernetes-validate")
    (document,) = [d for d in rendered(VALUES[0]).as_plain_kinds() if d["metadata"]["name"].endswith("-router")][:1]
    file = helm.write([{**document, "sepc": {}}], tmp_path / "wrong.yaml")
    assert run(validate, "-k", "1.34", "--strict", file).returncode != 0


@each_values
def test_schema_of_leader_worker_sets(values: Path, tmp_path: Path) -> None:
    sets = rendered(values).of_kind("LeaderWorkerSet").values()
    assert sets
    for number, document in enumerate(sets):
        assert lws_errors(document, tmp_path / f"{number}.json") == ""


def test_a_wrong_leader_worker_set_is_found(tmp_path: Path) -> None:
    document = next(iter(rendered(VALUES[0]).of_kind("LeaderWorkerSet").values()))
    spec = document["spec"]
    for wrong in (
        {**spec, "replica": 1},
        {**spec, "leaderWorkerTemplate": {**spec["leaderWorkerTemplate"], "restartPolicy": "Never"}},
    ):
        assert lws_errors({**document, "spec": wrong}, tmp_path / "wrong.json")


def lws_errors(document: Document, file: Path) -> str:
    file.write_text(json.dumps(document), encoding="utf-8")
    program = "import json,sys,jsonschema\nfor e in jsonschema.Draft202012Validator(json.load(open(sys.argv[1])))"
    program += ".iter_errors(json.load(open(sys.argv[2]))): print(e.json_path, e.message)"
    result = run(tool("kubernetes", "python"), "-c", program, LWS_SCHEMA, file)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_security_scan(tmp_path: Path) -> None:
    checkov = tool("checkov", "checkov")
    for values in VALUES:
        helm.write(rendered(values, DIGEST).as_plain_kinds(), tmp_path / values.name)
    skipped = [word for check in CHECKOV_SKIPPED for word in ("--skip-check", check)]
    options = ["--framework", "kubernetes", "--skip-download", "--quiet", "--compact", "--output", "json", *skipped]
    result = run(checkov, "--directory", tmp_path, *options)
    report = json.loads(result.stdout)
    failed = [f"{f['check_id']} {f['resource']}: {f['check_name']}" for f in report["results"]["failed_checks"]]
    assert not failed, "\n".join(failed)
    assert report["summary"]["passed"] > 100 * len(VALUES), "it looked at everything"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles(name: str) -> None:
    file = ROOT / "deploy/docker" / name
    result = run(tool("kubernetes", "hadolint"), file)
    assert result.returncode == 0, result.stdout
    lines = file.read_text(encoding="utf-8").splitlines()
    bases = [
        line.split("=" if line.startswith("ARG") else " ", 1)[1] for line in lines if re.match("FROM|ARG BASE", line)
    ]
    assert all(re.search(r":\d+\.\d+\.\d+-", base) or base.startswith("${BASE}") for base in bases), bases
    users = [line for line in lines if line.startswith("USER ")]
    assert users == ["USER 10001:10001"]
    assert lines.index("HEALTHCHECK NONE") > 0, "Kubernetes asks gRPC health; the file says why there is none"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("balancer.replicas=2", "balancer"),
        ("attention.gropus=2", "gropus"),
        ("image.tag=latest", "/image/tag"),
        ("mesh.api.keys_file=/x", "/mesh"),
        ("secrets.tls=a b", "/secrets/tls"),
    ],
)
def test_wrong_values_are_refused(setting: str, said: str) -> None:
    result = helm.run("template", "mesh", CHART, "--set", setting)
    assert result.returncode != 0
    assert said in result.stderr


# -- what it means --------------------------------------------------------------------------------------------------


@each_values
def test_the_configuration_is_one_of_ours(values: Path) -> None:
    """``parse_config`` refuses unknown keys and what does not fit together; the rest has to fit what is started."""
    made = rendered(values)
    config = made.config
    counts = {"attention": config.attention.servers, "expert": config.expert.servers, "both": config.both_servers}
    assert {role: started_ranks(made, role) for role in RANK_ROLES} == counts
    balancers = made.of_kind("StatefulSet")["balancer"]
    replicas = balancers["spec"]["replicas"]
    assert config.balancer.state == "etcd" or replicas == 1
    assert config.balancer.address is not None
    addresses = split_addresses(config.balancer.address)
    assert len(addresses) == replicas, "who looks for the one that leads asks each by its name"
    for number, address in enumerate(addresses):
        host, port = split_host_port(address)
        assert port == config.balancer.port
        pod, _, service = host.rpartition(".")
        found = made.services[service]["spec"]
        if pod:
            assert pod == f"{balancers['metadata']['name']}-{number}"
            assert service == balancers["spec"]["serviceName"]
            assert (found["clusterIP"], found["publishNotReadyAddresses"]) == ("None", True)


def started_ranks(made: helm.Rendered, role: str) -> int:
    found = made.of_kind("LeaderWorkerSet").get(role)
    if found is None:
        return 0
    scaler = made.of_kind("HorizontalPodAutoscaler").get(role)
    groups = scaler["spec"]["minReplicas"] if scaler is not None else found["spec"]["replicas"]
    command = container(made.pods[role])["command"]
    in_a_pod = int(command[command.index("--count") + 1]) if "--count" in command else 1
    return int(groups * found["spec"]["leaderWorkerTemplate"]["size"] * in_a_pod)


@each_values
def test_probes_ask_the_port_that_is_configured(values: Path) -> None:
    made = rendered(values)
    config = made.config
    ports = {
        "router": config.router.port,
        "balancer": config.balancer.port,
        "attention": config.attention.port,
        "both": config.attention.port,
        "expert": config.expert.port,
    }
    for role, pod in made.pods.items():
        only = container(pod)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            ((kind, target),) = [(key, value) for key, value in only[probe].items() if key in ("grpc", "tcpSocket")]
            assert target == {"port": ports[role]}, f"{role} {probe}"
            has_tls = config.tls.cert_file is not None
            assert kind == "grpc" or has_tls or role in ("router", "balancer"), (
                "the kubelet speaks no TLS to gRPC health"
            )
        stands_by = role == "balancer" and made.of_kind("StatefulSet")[role]["spec"]["replicas"] > 1
        assert ("grpc" in only["readinessProbe"]) is not (config.tls.cert_file is not None or stands_by)
        listens = {port["containerPort"] for port in only["ports"]}
        assert ports[role] in listens
        assert config.telemetry.metrics_port in listens
        assert len(listens) == len(only["ports"]), "no port twice"


@each_values
def test_services_lead_to_what_listens(values: Path) -> None:
    made = rendered(values)
    for service in made.services.values():
        role = helm.component(service["metadata"]["labels"])
        names = {port["name"]: port["containerPort"] for port in container(made.pods[role])["ports"]}
        assert service["spec"]["selector"].items() <= made.pods[role]["metadata"]["labels"].items()
        for port in service["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]


@each_values
def test_budgets_leave_replicas_and_let_nodes_be_drained(values: Path) -> None:
    made = rendered(values)
    budgets = made.of_kind("PodDisruptionBudget")
    deployments = {role: found["spec"].get("replicas", 2) for role, found in made.of_kind("Deployment").items()}
    sets = {
        role: found["spec"].get("replicas", 2) * found["spec"]["leaderWorkerTemplate"]["size"]
        for role, found in made.of_kind("LeaderWorkerSet").items()
    }
    balancers = made.of_kind("StatefulSet")["balancer"]["spec"]["replicas"]
    for role, pods in {**deployments, **sets, "balancer": balancers}.items():
        assert (role in budgets) is (pods > 1), role
        if role in budgets:
            spec = budgets[role]["spec"]
            assert 0 < spec["maxUnavailable"] < pods
            assert spec["selector"]["matchLabels"].items() <= made.pods[role]["metadata"]["labels"].items()


@each_values
def test_pods_have_no_rights(values: Path) -> None:
    made = rendered(values)
    accounts = {account["metadata"]["name"] for account in made.documents if account["kind"] == "ServiceAccount"}
    used = [pod["spec"]["serviceAccountName"] for pod in made.pods.values()]
    assert set(used) == accounts
    assert len(set(used)) == len(used), "one for each component"
    for pod in made.pods.values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        context = container(pod)["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_names_and_each_pod_gets_its_own_key() -> None:
    made = rendered(CHART / "values-production.yaml")
    assert not [document for document in made.documents if document["kind"] == "Secret"]
    assert made.config.tls.for_service("router", "router-0").key_file == Path("/secrets/tls/router.key")
    for role, pod in made.pods.items():
        (tls,) = [volume["secret"] for volume in pod["spec"]["volumes"] if volume["name"] == "tls"]
        assert {item["path"] for item in tls["items"]} == {"ca.pem", f"{role}.pem", f"{role}.key"}


@pytest.mark.parametrize(
    ("name", "cards"),
    [
        ("values-nvlink-8gpu.yaml", None),
        ("values-efa.yaml", "16"),
        ("nodes/p5.yaml", "32"),
        ("nodes/p6-b200.yaml", "8"),
    ],
)
def test_gpus_cards_and_pages(name: str, cards: str | None) -> None:
    made = rendered(CHART / name)
    has_efa = cards is not None
    for role in made.of_kind("LeaderWorkerSet"):
        only = container(made.pods[role])
        resources = only["resources"]
        assert resources["requests"] == resources["limits"], "guaranteed, so that cores are not shared"
        assert resources["limits"]["nvidia.com/gpu"] == only["command"][only["command"].index("--count") + 1] == "8"
        assert resources["limits"].get("vpc.amazonaws.com/efa") == cards
        mounts = {mount["mountPath"] for mount in only["volumeMounts"]}
        assert "/dev/shm" in mounts
        assert ("hugepages-2Mi" in resources["limits"]) is ("/dev/hugepages" in mounts) is has_efa
        names = {variable["name"] for variable in only["env"]}
        assert ("FI_PROVIDER" in names) is ("NCCL_NET_PLUGIN" in names) is has_efa
        assert ("EP_DISABLE_GIN" in names) is not has_efa
