"""TLS for doors that are not gRPC's, of the same files; new files are used without a restart."""

from __future__ import annotations

import logging
import ssl

from expertmesh.mesh.config_security import TlsConfig
from expertmesh.mesh.rpc_tls import files_stamp

log = logging.getLogger(__name__)


def server_context(tls: TlsConfig, *, asks_for_keys: bool = False) -> ssl.SSLContext | None:
    """None = without TLS. With ``ca_file`` callers need a certificate, unless they are asked for a key too and may show
    either. Handshakes after a change of the files use the new ones; files that cannot be used leave
    everything as it was, and the log says so.

    Raises:
        OSError: a file cannot be used now.
    """
    if tls.cert_file is None:
        return None
    stamp, current = files_stamp(tls), _read(tls, asks_for_keys)

    def on_hello(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
        nonlocal stamp, current
        latest = files_stamp(tls)
        if latest != stamp:
            stamp = latest
            try:
                current = _read(tls, asks_for_keys)
            except OSError as error:  # half-written: it changes once more
                log.error("%s: %s; the certificate that was there stays in use", tls.cert_file, error)
        connection.context = current

    outer = _read(tls, asks_for_keys)
    outer.sni_callback = on_hello
    return outer


def _read(tls: TlsConfig, asks_for_keys: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    assert tls.cert_file is not None
    context.load_cert_chain(tls.cert_file, tls.key_file)
    if tls.ca_file is not None:
        context.load_verify_locations(tls.ca_file)
        context.verify_mode = ssl.CERT_OPTIONAL if asks_for_keys else ssl.CERT_REQUIRED
    return context
