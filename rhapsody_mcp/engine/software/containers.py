"""Runs a command in an image of Apptainer, Singularity or Podman."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rhapsody_mcp.model.errors import InvalidTask

__all__ = ["Container", "did_not_start", "find_container", "passed_on"]

_RUNTIMES = ("apptainer", "singularity", "podman")
_INITS = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit", "/usr/bin/catatonit")
"""Where the program is with which Podman lets a command end on TERM: as process 1, it would not."""
_OWN = ("PATH", "HOME", "PWD", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables that an image sets for itself, unless the task sets them."""


class Container(NamedTuple):
    """An image, and the full path of the program that runs it."""

    runtime: str
    image: str

    @property
    def _is_podman(self) -> bool:
        return os.path.basename(self.runtime) == "podman"

    def command(
        self, command: Sequence[str], folders: Sequence[str], cwd: str, variables: Sequence[str], *, has_gpus: bool
    ) -> list[str]:
        """The command in the image, which sees the folders under their own names, and the variables."""
        bound = list(dict.fromkeys(map(os.path.normpath, folders)))
        if not self._is_podman:
            gpus = ["--nv"] if has_gpus else []
            binds = [part for folder in bound for part in ("--bind", folder)]
            return [self.runtime, "exec", *gpus, *binds, "--pwd", cwd, self.image, *command]
        gpus = ["--device", "nvidia.com/gpu=all"] if has_gpus else []
        binds = [part for folder in bound for part in ("--volume", f"{folder}:{folder}")]
        env = [part for name in variables for part in ("--env", name)]
        host = ("--network=host", "--ipc=host", "--security-opt=label=disable", "--log-driver=none")
        init = ["--init"] if any(map(os.path.exists, _INITS)) else []
        options = [*init, *host, *gpus, *binds, "--workdir", cwd, *env]
        return [self.runtime, "run", "--rm", *options, self.image, *command]

    def variables(self, env: Mapping[str, str | None]) -> dict[str, str | None]:
        """The variables with which the program that runs the image is started, for these in the image."""
        if self._is_podman:
            return dict(env)
        prefix = f"{os.path.basename(self.runtime).upper()}ENV_"
        return {**env, **{f"{prefix}{name}": value for name, value in env.items() if name not in _OWN}}


def did_not_start(code: int, said: str) -> bool:
    """Whether this exit code and last line of stderr are of the runtime, and nothing has run in the image."""
    return code == _PODMAN_FAILED or (code == _APPTAINER_FAILED and "FATAL" in said)


_PODMAN_FAILED, _APPTAINER_FAILED = 125, 255


def passed_on(env: Mapping[str, str | None], own: Mapping[str, str | None]) -> list[str]:
    """The names of the variables that go into the image; `own` are those that the task sets."""
    return [name for name, value in env.items() if value is not None and (name in own or name not in _OWN)]


def find_container(
    image: str, folder: str, path: str | None = None, runtime: str = "", *, after_setup: bool = False
) -> Container:
    """The image, seen from `folder`, and the runtime, by default the first that is found on `path`; one that is not
    there may come with the setup lines of the task. Raises InvalidTask where something is missing."""
    names = (runtime,) if runtime else _RUNTIMES
    found = [program for name in names if (program := shutil.which(name, path=path))]
    if not found and after_setup:
        found = [names[0]]
    if not found:
        raise InvalidTask(
            f"container needs {' or '.join(names)}, and none is on PATH of "
            f"{os.uname().nodename}. Where a module brings it, give setup, as in module load apptainer; or run the "
            "task without container.",
            field="container",
        )
    file = os.path.join(folder, os.path.expanduser(image))
    if os.path.exists(file):
        if os.path.basename(found[0]) == "podman" and os.path.isfile(file):
            raise InvalidTask(
                f"container is {image!r}, a file, which Podman does not run: give the name of an image of `podman "
                'images`, as in "localhost/mine", or of a registry.',
                field="container",
            )
        return Container(found[0], file)
    if image.endswith((".sif", ".img", ".sqsh")) or image.startswith(("/", "./", "~")):
        raise InvalidTask(
            f"container is {image!r}, and {file} does not exist on {os.uname().nodename}.", field="container"
        )
    return Container(found[0], image)
