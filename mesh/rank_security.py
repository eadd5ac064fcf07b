"""Who may be at the other end of a connection between ranks, and what makes it unreadable for others."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from expertmesh.mesh.access import RANK_ROLES
from expertmesh.mesh.config_ranks import DataPlaneConfig
from expertmesh.mesh.config_security import TlsConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.identity import certificate_identity
from expertmesh.mesh.rpc_tls import Stamp, files_stamp
from expertmesh.mesh.secure_stream import SecureStream

log = logging.getLogger(__name__)


class RankSecurity:
    """Mutual TLS of this rank with others. New files are used from the next view on, for KV blocks at the next start.

    Raises:
        UserError: a file cannot be used now.
    """

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._stamp: Stamp = files_stamp(tls)
        try:
            self.called, self.calling = _context(tls, is_caller=False), _context(tls, is_caller=True)
        except OSError as error:
            raise UserError(
                "tls", f"{tls.cert_file}, {tls.key_file} and {tls.ca_file} cannot be used ({error})", "mend them"
            ) from None

    def refresh(self) -> None:
        """Look at the files again; ones that cannot be used leave everything as it was, and the log says so."""
        stamp = files_stamp(self._tls)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.called, self.calling = _context(self._tls, is_caller=False), _context(self._tls, is_caller=True)
        except OSError as error:  # half-written: it changes once more
            log.error("%s: %s; the certificate that was there stays in use", self._tls.cert_file, error)

    def stream(self, sock: socket.socket, *, is_caller: bool) -> SecureStream:
        """Before its handshake."""
        return SecureStream(sock, self.calling if is_caller else self.called, is_caller=is_caller)

    def why_not(self, certificate: Mapping[str, Any], role: str, server_id: str) -> str:
        """Why the peer with this verified certificate cannot be that server; '' when it can."""
        identity = certificate_identity(certificate, self._tls)
        return identity.why_not(role, server_id) if identity is not None else ""

    def why_no_rank(self, certificate: Mapping[str, Any]) -> str:
        """Why the peer with this verified certificate can be no rank of the mesh; '' when it can."""
        identity = certificate_identity(certificate, self._tls)
        if identity is None or identity.roles & RANK_ROLES:
            return ""
        return f"its certificate is for {', '.join(sorted(identity.roles)) or 'no role'}, not for a rank"


def rank_security(dataplane: DataPlaneConfig, tls: TlsConfig) -> RankSecurity | None:
    """What ``dataplane.tls`` asks for; None = ranks speak in the clear.

    Raises:
        UserError: it asks for what ``tls`` has no certificates for, or a file cannot be used.
    """
    is_mutual = tls.cert_file is not None and tls.ca_file is not None
    if dataplane.tls == "off" or (dataplane.tls == "auto" and not is_mutual):
        return None
    if not is_mutual:
        raise UserError(
            "dataplane.tls",
            "is on, and tls.cert_file, tls.key_file and tls.ca_file are not all set",
            "set them, or dataplane.tls: auto",
        )
    return RankSecurity(tls)


def _context(tls: TlsConfig, *, is_caller: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if is_caller else ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both ends are ours
    assert tls.cert_file is not None
    assert tls.ca_file is not None
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.load_verify_locations(tls.ca_file)
    # A rank is known by its role and id, which are looked at after the handshake, not by the address it has today.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if not is_caller:
        context.num_tickets = 0  # nobody resumes; a ticket would be one more thing that a link has to read
    return context
