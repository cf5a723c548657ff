"""Package indexes on loopback: a standard one, which has no build of PyTorch for the CPU alone, and PyTorch's own."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

__all__ = ["PackageIndexes", "serve_indexes", "write_torch"]


@dataclass(frozen=True)
class PackageIndexes:
    """Addresses for pip. PyTorch's index has `torch` with the local version `+cpu` and nothing else."""

    standard: str
    pytorch: str


@contextmanager
def serve_indexes(torch: str) -> Iterator[PackageIndexes]:
    """Serve both until the end of the block. `torch` is the version that PyTorch's index has, as in 2.13.0+cpu.

    The standard index has that version without its local part; every other package comes from the index that pip is
    configured with. The wheels of torch are empty.
    """
    wheels = {
        "/simple/torch/": _file_name(torch.partition("+")[0]),
        "/whl/cpu/torch/": _file_name(torch),
    }
    configured = _configured_index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in wheels:
                self._answer("text/html", f'<a href="/files/{wheels[self.path]}">{wheels[self.path]}</a>'.encode())
            elif self.path.startswith("/files/"):
                version = self.path.split("-")[1].replace("%2B", "+")
                self._answer("application/octet-stream", _torch_wheel(version))
            elif self.path.startswith("/simple/"):
                self.send_response(302)
                self.send_header("Location", configured + self.path.removeprefix("/simple"))
                self.end_headers()
            else:
                self.send_error(404)

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield PackageIndexes(f"{address}/simple", f"{address}/whl/cpu")
        finally:
            server.shutdown()


def write_torch(folder: Path, version: str) -> None:
    """Write an empty wheel of torch."""
    (folder / _file_name(version)).write_bytes(_torch_wheel(version))


def _configured_index() -> str:
    """pip's default, its configuration files and environment variables included, as its help text names the index."""
    command = [sys.executable, "-m", "pip", "install", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (address,) = re.findall(r"--index-url <url>.*?\(default\s+(\S+?)/?\)", text, re.DOTALL)
    return str(address)


def _file_name(version: str) -> str:
    return f"torch-{version}-py3-none-any.whl"


def _torch_wheel(version: str) -> bytes:
    folder = f"torch-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "".join(f"{folder}/{name},,\n" for name in ("METADATA", "WHEEL", "RECORD")),
    }
    with zipfile.ZipFile(whole := io.BytesIO(), "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{folder}/{name}", text)
    return whole.getvalue()
