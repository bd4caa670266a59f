"""The connection of clients to the fake of Azure: a proxy that answers for Azure's host, with certificates."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

HOST = "management.azure.com"
Answer = Callable[[str, str, Any, Any], tuple[int, Any, dict[str, str]]]


class Refusal(Exception):
    """An error response of Azure: status, code and message, as in its JSON."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


def handler(answered: Answer, context: ssl.SSLContext) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            if self.path != f"{HOST}:443":
                self.send_error(403, f"this proxy leads to {HOST} alone")
                return
            self.send_response(200, "Connection established")
            self.end_headers()
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile = self.connection.makefile("rb")
            self.wfile = self.connection.makefile("wb", 0)
            self.close_connection = False

        def do_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            try:
                status, answer, headers = answered(self.command, self.path, body, self.headers)
            except Refusal as refusal:
                status, answer, headers = refusal.status, refusal.body(), refusal.headers
            except Exception as error:
                print(f"fake: {self.command} {self.path}: {error!r}", file=sys.stderr)
                status, answer, headers = 500, {"error": {"code": "FakeIsWrong", "message": repr(error)}}, {}
            text = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(text)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = do_any

        def log_message(self, *words: object) -> None:
            pass

    return Handler


def certificates(directory: Path) -> ssl.SSLContext:
    """Write ca.pem into a directory, and return the context of a server with a certificate of that CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)

    def signed(name: str, ca: bool, own: Any, issuer: x509.Name, by: Any) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(_name(name)).issuer_name(issuer).public_key(own.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=2))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        identity = x509.SubjectKeyIdentifier.from_public_key(own.public_key())
        builder = builder.add_extension(identity, critical=False)
        above = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
        builder = builder.add_extension(above, critical=False)
        if not ca:
            names = [x509.DNSName(HOST), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(by, hashes.SHA256())

    def _name(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = signed("a test CA", True, root, _name("a test CA"), root)
    certificate = signed(HOST, False, own, authority.subject, root)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(authority.public_bytes(pem))
    key = own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "server.pem").write_bytes(certificate.public_bytes(pem) + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return context
