"""Starts vLLM's own OpenAI server in this process: `python -P vllm_launcher.py --model DIR --port PORT ...`.

It is run by its path, so that it also works in a Python environment that has vLLM and not this package. The key
that clients must have is in VLLM_API_KEY: other users of the machine can read a command line.
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
_MEDIA = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    if "RHAPSODY_LIFELINE" in os.environ:
        threading.Thread(target=_end_with_keeper, daemon=True).start()
    os.environ["VLLM_PLUGINS"] = "none"  # plugins of other packages in this environment change the engine
    _hide([name for name in _MEDIA if not _loads(name)])
    sys.path.append(_SITE)
    sys.argv += ["--middleware", "rhapsody_key.KeyForEveryPost"]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)


def _end_with_keeper() -> None:
    """When the keeper is gone without having stopped this server, kill the server with all its processes: it started
    them in a process group of their own."""
    with suppress(FileNotFoundError), open(os.environ["RHAPSODY_LIFELINE"], "rb", buffering=0) as lifeline:
        lifeline.read(1)
    os.killpg(0, signal.SIGKILL)


def _loads(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a library that was built for another torch raises anything
        return False
    return True


def _hide(names: list[str]) -> None:
    """Make libraries look absent, here and in every Python that this process starts: transformers does without a
    missing one, and does not import at all beside one that is installed but cannot load."""
    for module in list(sys.modules):
        if module.partition(".")[0] in names:
            del sys.modules[module]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]  # None is how an import is refused
    if names:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_SITE, os.environ.get("PYTHONPATH")]))
        os.environ["RHAPSODY_HIDDEN_MODULES"] = ",".join(names)


if __name__ == "__main__":
    main()
