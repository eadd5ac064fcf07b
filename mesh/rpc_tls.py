"""TLS for gRPC: files become credentials, and new files do too without a restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from expertmesh.mesh.config_security import TlsConfig
from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int] | None, ...]


def files_stamp(tls: TlsConfig) -> Stamp:
    """Another one whenever a file has changed: then channels that use them are to be opened anew."""
    return tuple(_stamp_of(path) for path in (tls.cert_file, tls.key_file, tls.ca_file) if path is not None)


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """Of a server; None = without TLS. Handshakes after a change of the files use the new ones; files that cannot be
    used leave everything as it was, and the log says so.

    Raises:
        UserError: a file cannot be used now.
    """
    if tls.cert_file is None or tls.key_file is None:
        if tls.ca_file is not None:
            raise UserError(
                "tls.cert_file", "is unset though tls.ca_file is set", "set cert_file and key_file too, or none"
            )
        return None
    files = _ServerFiles(tls)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # None = nothing new, which the stubs do not know
        require_client_authentication=tls.ca_file is not None,
    )


class _ServerFiles:
    """``changed`` is called by gRPC's threads, one handshake at a time or several."""

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._stamp = files_stamp(tls)

    def read(self) -> grpc.ServerCertificateConfiguration:
        tls = self._tls
        assert tls.cert_file is not None
        assert tls.key_file is not None
        pair = _read_pair(tls.cert_file, tls.key_file)
        return grpc.ssl_server_certificate_configuration([pair], _read_ca(tls.ca_file) if tls.ca_file else None)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        stamp = files_stamp(self._tls)
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            configuration = self.read()
        except UserError as error:  # half-written: it changes once more
            log.error("%s; the certificate that was there stays in use", error)
            return None
        log.info("TLS files were read again: %s", self._tls.cert_file)
        return configuration


def channel_credentials(tls: TlsConfig, section: str = "tls") -> grpc.ChannelCredentials | None:
    """What a client of this mesh connects with; None = without TLS.

    Raises:
        UserError: a TLS file cannot be used.
    """
    if tls.ca_file is None and tls.cert_file is None:
        return None
    ca = _read_ca(tls.ca_file, section) if tls.ca_file is not None else None
    key, certificate = (None, None)
    if tls.cert_file is not None and tls.key_file is not None:
        key, certificate = _read_pair(tls.cert_file, tls.key_file, section)
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _stamp_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _read_pair(cert_file: Path, key_file: Path, section: str = "tls") -> tuple[bytes, bytes]:
    """Private key and certificate chain, tried in OpenSSL: gRPC would find bad ones only at the first handshake."""
    certificate, key = _read(f"{section}.cert_file", cert_file), _read(f"{section}.key_file", key_file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"{section}.cert_file",
            f"{cert_file} and {key_file} are not a certificate and its key ({error})",
            "give PEM files that belong together, the key without a password",
        ) from None
    return key, certificate


def _read_ca(path: Path, section: str = "tls") -> bytes:
    data = _read(f"{section}.ca_file", path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise UserError(f"{section}.ca_file", f"{path} holds no CA certificate ({error})", "give a PEM file") from None
    return data


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            key, f"{path} cannot be read ({error.strerror})", "give a PEM file this user can read"
        ) from None


def _no_password() -> str:
    """Keeps OpenSSL from asking for a pass phrase on the terminal."""
    return ""
