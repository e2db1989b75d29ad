"""TLS by certificate files."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from splitlearn_core import ConfigurationError, MissingFileError
from splitlearn_core.extension import reason


def server_context(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> ssl.SSLContext:
    """Return the TLS context of a server.

    Args:
        certificate: A PEM file: the server's certificate, then the intermediate certificates.
        key: A PEM file with its private key, without a password.

    Raises:
        MissingFileError: One of the files does not exist.
        ConfigurationError: They cannot be read, hold something else, or do not belong together.
    """
    for path, option in ((certificate, "--tls-cert"), (key, "--tls-key")):
        if not Path(path).exists():
            raise MissingFileError(f"there is no file {os.fspath(path)!r}", hint=f"{option} names a PEM file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the certificate {os.fspath(certificate)!r} cannot be used with the key {os.fspath(key)!r}: "
            f"{_words(error)}",
            hint="--tls-cert is a PEM file with the certificate first, and --tls-key one with its key, unencrypted",
        ) from error
    return context


def _no_password() -> str:
    # Without this, OpenSSL would ask on the terminal.
    raise ValueError("the key has a password")


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        known = {"KEY_VALUES_MISMATCH": "the key is another certificate's"}
        return known.get(error.reason or "", "one of them is not a PEM file of its kind")
    return reason(error)
