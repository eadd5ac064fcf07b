"""What ``expertmesh up`` can tell is wrong before it starts a process."""

from __future__ import annotations

from expertmesh.cli.local_plan import planned_services
from expertmesh.mesh.addresses import bind_problem
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.rpc_tls import server_credentials
from expertmesh.router.tokenizer import load_tokenizer


def check_before_start(config: MeshConfig) -> None:
    """
    Raises:
        UserError: the model cannot be served, its experts do not fit the slots, a certificate is missing, or a port is
            taken.
    """
    spec = load_spec(config.model, mtp=config.speculation.method == "mtp")
    load_tokenizer(spec.path, config.model.chat_template)
    config.slots_per_server(spec.num_experts)
    for role, server_id in planned_services(config):
        server_credentials(config.tls.for_service(role, server_id))
    router, balancer = config.router, config.balancer
    ports = {
        "router.port": (router.host, router.port),
        "router.http.port": (router.http.host or router.host, router.http.port if router.http.enabled else 0),
        "balancer.port": (balancer.host, balancer.port),
        "balancer.page_port": (balancer.host, balancer.page_port or 0),
    }
    for key, (host, port) in ports.items():
        if port and (problem := bind_problem(host, port)):
            remedy = "choose a free port (0 = any) on an address of this machine"
            raise UserError(key, f"{host}:{port} cannot be bound ({problem})", remedy)
