"""``HOST:PORT``, several of them in one text (where the balancers of a mesh may be found), and whether one is free."""

from __future__ import annotations

import socket


def is_address(text: str) -> bool:
    """Whether it is one ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    has_host = bool(host) and not any(sign in host for sign in ",/ ")
    return has_host and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def split_host_port(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port of a ``HOST:PORT``.

    Raises:
        ValueError: it is none.
    """
    if not is_address(address):
        raise ValueError(f"{address!r} is not HOST:PORT")
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_addresses(text: str) -> tuple[str, ...]:
    """The addresses between commas, in order; none of an empty text."""
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def bind_problem(host: str, port: int) -> str:
    """Why nobody can listen there now, in the system's words; '' where one can. What lingers of an earlier listener is
    no hindrance. IPv6 hosts may be in brackets."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return str(error)
    return ""
