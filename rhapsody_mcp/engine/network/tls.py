"""Encrypts connections, with one key and one certificate for both ends.

Whoever has the file with the key is trusted, and nobody else: each end accepts exactly this certificate.
"""

from __future__ import annotations

import os
import ssl
import tempfile

__all__ = ["context"]


def context(pem: str, *, server: bool) -> ssl.SSLContext:
    """Return the context of one end. `pem` holds a private key and a certificate that is signed with this key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is what both ends know of each other
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=pem[pem.index("-----BEGIN CERTIFICATE") :])
    descriptor, path = tempfile.mkstemp()  # only this user can read the file
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(pem)
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context
