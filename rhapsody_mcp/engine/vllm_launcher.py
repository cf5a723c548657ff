"""Starts vLLM's OpenAI server in this process: `python -P vllm_launcher.py --model DIR --port PORT ...`.

Run this file by its path: that also works in a Python environment with vLLM but without this package. VLLM_API_KEY
holds the key of the clients, because other users of the machine can read a command line.
"""

import importlib
import os
import runpy
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

_SITE = str(Path(__file__).with_name("vllm_site"))
_MEDIA_LIBRARIES = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    if "RHAPSODY_LIFELINE" in os.environ:
        threading.Thread(target=_end_with_keeper, daemon=True).start()
    os.environ["VLLM_PLUGINS"] = "none"  # plugins of other packages in this environment would change the engine
    _hide([name for name in _MEDIA_LIBRARIES if not _can_import(name)])
    sys.path.append(_SITE)
    sys.argv += ["--middleware", "rhapsody_key.KeyForEveryPost"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def _end_with_keeper() -> None:
    """Wait for the end of the keeper, then kill the server with its process group, which the keeper created."""
    with suppress(FileNotFoundError), open(os.environ["RHAPSODY_LIFELINE"], "rb", buffering=0) as lifeline:
        lifeline.read(1)
    os.killpg(0, signal.SIGKILL)


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a library that was built for another torch raises anything
        return False
    return True


def _hide(names: list[str]) -> None:
    """Make these libraries look absent, in this process and in each Python that it starts. transformers works without a
    missing library, but its import fails if a library is installed and cannot be loaded."""
    for module in list(sys.modules):
        if module.partition(".")[0] in names:
            del sys.modules[module]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # None makes an import of the name fail
    if names:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SITE, os.environ.get("PYTHONPATH")]))
        os.environ["RHAPSODY_HIDDEN_MODULES"] = ",".join(names)


if __name__ == "__main__":
    main()
