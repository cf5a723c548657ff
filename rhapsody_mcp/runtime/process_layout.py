"""Reads `task_backend_specific_kwargs`: which processes a task gets, and for how long."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.model.errors import InvalidTask, refuse_other_fields, refuse_unknown
from rhapsody_mcp.model.specs import Layout, Needs, RankGroup, Software, Template

__all__ = ["read_layout", "read_software", "read_timeout", "refuse_half_characters", "with_software"]

_NEEDS = ("cores", "gpus", "memory_gb")
_LEAST_CORES, _LEAST_GB, _MOST = 0.01, 0.001, 1_000_000
_SOFTWARE = ("python", "packages", "container", "setup")
_PROCESSES = ("process_template", "process_templates", "type", "ranks", "ranks_per_node", "pmi")
_KEYS = (*_PROCESSES, "timeout", *_NEEDS, *_SOFTWARE)
_TEMPLATE_KEYS = ("env", "cwd", "policy")
_PLACES = {
    "cwd": '"process_template": {"cwd": ...}',
    "env": '"process_template": {"env": {...}}',
    "shell": 'executable="sh", arguments=["-c", "..."]',
}
"""Keys of rhapsody-py, and how they are written here."""
_POLICY_KEYS = ("host_name", "cpu_affinity", "gpu_affinity")
_PMI = ("auto", "pmix", "cray", "none")
_EXAMPLE = "[(2, {}), (2, {})]"


def read_layout(kwargs: Mapping[str, Any], *, native: bool) -> Layout:
    """The layout that the kwargs request. Without kwargs, a function is `native` and a program is a process. A function
    that needs cores, GPUs or memory of its own is a process."""
    if not kwargs:
        return _NATIVE if native else _FORKED
    refuse_other_fields("task_backend_specific_kwargs", kwargs, _PLACES)
    refuse_unknown("key of task_backend_specific_kwargs", kwargs, _KEYS)
    layout = with_software(_processes(kwargs, native), read_software(kwargs))
    if not any(key in kwargs for key in _NEEDS):
        return layout
    own = _PROCESS if layout.mode == "native" else layout
    return replace(own, needs=_read_needs(kwargs))


def with_software(layout: Layout, software: Software) -> Layout:
    """The layout of a task with this software; a function with any has a process of its own."""
    if not software:
        return layout
    return replace(_PROCESS if layout.mode == "native" else layout, software=software)


def read_software(kwargs: Mapping[str, Any]) -> Software:
    """The software that the keys python, packages, container and setup name. Raises InvalidTask."""
    python, container = (_software_text(key, kwargs.get(key)) for key in ("python", "container"))
    packages, setup = (_software_texts(key, kwargs.get(key)) for key in ("packages", "setup"))
    if options := [text for text in packages if text.startswith("-")]:
        raise InvalidTask(
            f"{options[0]!r} in packages is an option of pip; valid are requirements, as in 'humanize==4.*'.",
            field="packages",
        )
    if container and packages:
        raise InvalidTask(
            "container and packages contradict each other: install the packages into the image.", field="packages"
        )
    return Software(python, tuple(sorted(dict.fromkeys(packages))), container, setup)


def _software_text(field: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if text is not None and (not isinstance(text, str) or not text.strip() or "\0" in text or text.startswith("-")):
        raise InvalidTask(f"{field} is {value!r}; valid is {_FORMS[field]}.", field=field)
    refuse_half_characters(field, text or "")
    return text or ""


def _software_texts(field: str, value: Any) -> tuple[str, ...]:
    texts = [] if value is None else value
    if not isinstance(texts, list | tuple) or not all(
        isinstance(text, str) and text.strip() and "\0" not in text for text in texts
    ):
        raise InvalidTask(f"{field} is {value!r}; valid is {_FORMS[field]}.", field=field)
    for text in texts:
        refuse_half_characters(field, text)
    return tuple(text.strip() for text in texts)


_FORMS = {
    "python": 'the path of an interpreter or of an environment, as in "/home/me/env"',
    "packages": 'a list of requirements, as in ["humanize==4.*"]',
    "container": 'an image, as in "image.sif" or "docker://python:3.12"',
    "setup": 'a list of lines for bash, as in ["module load cuda"]',
}


def _read_needs(kwargs: Mapping[str, Any]) -> Needs:
    cores, gpus, memory_gb = (kwargs.get(key) for key in _NEEDS)
    if cores is not None and not _is_number_of_cores(cores):
        raise InvalidTask(
            f"cores is {cores!r}; valid is a whole number from 1, or a part of a core from {_LEAST_CORES}, as in 0.5.",
            field="cores",
        )
    if gpus is not None and (isinstance(gpus, bool) or not isinstance(gpus, int) or not 0 <= gpus <= _MOST):
        raise InvalidTask(f"gpus is {gpus!r}; valid is a whole number.", field="gpus")
    if memory_gb is not None and (
        isinstance(memory_gb, bool) or not isinstance(memory_gb, int | float) or not _LEAST_GB <= memory_gb <= _MOST
    ):
        raise InvalidTask(
            f"memory_gb is {memory_gb!r}; valid is a number of at least {_LEAST_GB} (GB).", field="memory_gb"
        )
    return Needs(cores, gpus or 0, memory_gb)


def _is_number_of_cores(cores: object) -> bool:
    if isinstance(cores, bool) or not isinstance(cores, int | float):
        return False
    return _LEAST_CORES <= cores < 1 or (1 <= cores <= _MOST and cores == int(cores))


def _processes(kwargs: Mapping[str, Any], native: bool) -> Layout:
    chosen = [key for key in ("process_template", "process_templates", "type") if key in kwargs]
    if "process_template" in chosen and "process_templates" in chosen:
        raise InvalidTask(f"{' and '.join(chosen)} contradict each other; give one of them.")
    if "type" in kwargs or ("pmi" in kwargs and "process_templates" in kwargs):
        return _mpi_layout(kwargs)
    if "ranks" in kwargs or "pmi" in kwargs:
        raise InvalidTask(
            'ranks and pmi belong to type="mpi"; a job of other processes has process_templates.', field="ranks"
        )
    if "process_templates" in kwargs:
        return Layout("job", _groups(kwargs["process_templates"]), ranks_per_node=_ranks_per_node(kwargs))
    if "ranks_per_node" in kwargs:
        raise InvalidTask(
            'ranks_per_node belongs to a job: give process_templates, or type="mpi" and ranks.', field="ranks_per_node"
        )
    if "process_template" in kwargs:
        return Layout("process", (RankGroup(1, _template(kwargs["process_template"])),))
    return _NATIVE if native else _FORKED


_NATIVE = Layout("native")
_PROCESS = Layout("process", (RankGroup(1, Template()),))
_FORKED = Layout("process", (RankGroup(1, Template()),), forked=True)


def read_timeout(kwargs: Mapping[str, Any]) -> float | None:
    """The timeout in seconds, or None for no timeout."""
    value = kwargs.get("timeout")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidTask(f"timeout is {value!r}; valid is a number of seconds above 0.", field="timeout")
    return float(value)


def _mpi_layout(kwargs: Mapping[str, Any]) -> Layout:
    if (kind := kwargs.get("type", "mpi")) != "mpi":
        raise InvalidTask(f'type is {kind!r}; the only type is "mpi".', field="type")
    pmi = kwargs.get("pmi", "auto")
    if pmi not in _PMI:
        raise InvalidTask(f"pmi is {pmi!r}; valid: {', '.join(_PMI)}.", field="pmi")
    if "process_templates" in kwargs:
        groups = _groups(kwargs["process_templates"])
        if kwargs.get("ranks") not in (None, count := sum(group.ranks for group in groups)):
            raise InvalidTask(
                f"ranks is {kwargs['ranks']!r}, and process_templates make {count}; leave ranks out.", field="ranks"
            )
        return Layout("job", groups, pmi, ranks_per_node=_ranks_per_node(kwargs))
    if "ranks" not in kwargs:
        raise InvalidTask('type="mpi" needs ranks, the number of its processes.', field="type")
    group = RankGroup(_count("ranks", kwargs["ranks"]), _template(kwargs.get("process_template", {})))
    return Layout("job", (group,), pmi, ranks_per_node=_ranks_per_node(kwargs))


def _groups(templates: Any) -> tuple[RankGroup, ...]:
    if not isinstance(templates, list | tuple) or not templates:
        raise InvalidTask(
            f"process_templates is a list of (ranks, template), as in {_EXAMPLE}.", field="process_templates"
        )
    return tuple(_group(item) for item in templates)


def _group(item: Any) -> RankGroup:
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise InvalidTask(f"{item!r} in process_templates is no pair (ranks, template), as in {_EXAMPLE}.")
    return RankGroup(_count("ranks", item[0]), _template(item[1]))


def _ranks_per_node(kwargs: Mapping[str, Any]) -> int | None:
    value = kwargs.get("ranks_per_node")
    return None if value is None else _count("ranks_per_node", value)


def _count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidTask(f"{field} is {value!r}; valid is a whole number of at least 1.", field=field)
    return value


def _template(fields: Any) -> Template:
    if not isinstance(fields, Mapping):
        raise InvalidTask(f"a process template is a dict (env, cwd, policy), not {fields!r}.")
    refuse_unknown("key of a process template", fields, _TEMPLATE_KEYS)
    policy = _plain_policy(fields.get("policy") or {})
    if not isinstance(policy, Mapping):
        raise InvalidTask(f"policy is a dict with any of {', '.join(_POLICY_KEYS)}, not {policy!r}.", field="policy")
    refuse_unknown("key of a policy", policy, _POLICY_KEYS)
    return Template(
        env=_environment(fields.get("env") or {}),
        cwd=_optional_text("cwd", fields.get("cwd")),
        host_name=_optional_text("host_name", policy.get("host_name")),
        cpu_affinity=_device_numbers("cpu_affinity", policy.get("cpu_affinity") or ()),
        gpu_affinity=_device_numbers("gpu_affinity", policy.get("gpu_affinity") or ()),
    )


def _plain_policy(policy: Any) -> Any:
    """The fields of a Dragon Policy as a dict; another value unchanged."""
    if isinstance(policy, Mapping) or not all(hasattr(policy, key) for key in _POLICY_KEYS):
        return policy
    return {key: value for key in _POLICY_KEYS if (value := getattr(policy, key))}


def _environment(env: Any) -> dict[str, str | None]:
    if not isinstance(env, Mapping):
        raise InvalidTask(f"env is a dict of variables, not {env!r}.", field="env")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise InvalidTask(f"env has no valid name of a variable in {name!r}.", field="env")
        if value is not None and (not isinstance(value, str | int | float) or "\0" in str(value)):
            raise InvalidTask(f"env {name} is {value!r}; valid is a text, or null to remove the variable.", field="env")
        refuse_half_characters("env", f"{name}={value}")
    return {name: None if value is None else str(value) for name, value in env.items()}


def refuse_half_characters(field: str, text: str) -> None:
    """Raise InvalidTask for a text with lone surrogates, such as a file name that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidTask(
            f"{field} holds {text[:80]!r}, which is no Unicode text (the name of a file that is not UTF-8?). Give the "
            "file another name, or have a function open it.",
            field=field,
        ) from None


def _optional_text(field: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidTask(f"{field} is {value!r}; valid is a text.", field=field)
    refuse_half_characters(field, value or "")
    return value


def _is_device_number(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31


def _device_numbers(field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(map(_is_device_number, value)):
        raise InvalidTask(f"{field} is {value!r}; valid is a list of device numbers, as in [0, 1].", field=field)
    return tuple(value)
