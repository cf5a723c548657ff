"""What a session tells the scheduler besides nodes and time, and the profiles that preset this."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest, UnknownName, nearest

__all__ = ["AllocationProfile", "SchedulerOptions", "read_options", "read_profiles", "with_profile"]


class SchedulerOptions(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """An empty text leaves the choice to the scheduler.

    `lines` are further options of the submit command. `setup` are lines of bash for the job script, such as module
    loads. `python` is an interpreter that the nodes can see, with this package; empty for the interpreter of this
    process. `allocations` is how many the session may have, one after the other. `profile` names the profile of the
    settings that presets the other options. `hosts` are hosts without a scheduler, as ssh takes their names.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    gpus_per_node: int = 0
    lines: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    python: str = ""
    allocations: int = 1
    profile: str = ""
    hosts: tuple[str, ...] = ()


class AllocationProfile(SchedulerOptions, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The options of a site, with the defaults and limits of the sessions that use them.

    `network_prefix` is a regular expression for the names of the network interfaces by which the nodes reach each
    other.
    """

    nodes: int | None = None
    minutes: int | None = None
    max_nodes: int | None = None
    max_minutes: int | None = None
    network_prefix: str = ""


_EXAMPLES: dict[str, tuple[str, str]] = {
    "partition": ("a text", "'gpu'"),
    "account": ("a text", "'m1234'"),
    "qos": ("a text", "'debug'"),
    "constraint": ("a text", "'gpu'"),
    "reservation": ("a text", "'training'"),
    "gpus_per_node": ("a whole number, 0 or more", "4"),
    "lines": ("a list of texts", "['--exclusive=user']"),
    "setup": ("a list of texts", "['module load python']"),
    "python": ("the full path of an interpreter that the nodes can see", "'/project/me/venv/bin/python'"),
    "allocations": ("a whole number, 1 or more", "3"),
    "profile": ("a text", "'gpu-debug'"),
    "hosts": ("a list of names that ssh takes", "['n1', 'me@n2']"),
    "nodes": ("a whole number, 1 or more", "2"),
    "minutes": ("a whole number, 1 or more", "30"),
    "max_nodes": ("a whole number, 1 or more", "8"),
    "max_minutes": ("a whole number, 1 or more", "120"),
    "network_prefix": ("a text", "'^hsn0$'"),
}
"""What is valid for each key, and an example."""
_OTHER_WORDS = {
    **dict.fromkeys(("queue", "p"), "partition"),
    **dict.fromkeys(("project", "A", "charge", "bank", "allocation"), "account"),
    **dict.fromkeys(("gpus", "gres", "gpus_per_task", "num_gpus"), "gpus_per_node"),
    **dict.fromkeys(("modules", "module", "worker_init", "prologue"), "setup"),
    **dict.fromkeys(("sbatch", "options", "extra", "scheduler_options", "extra_args"), "lines"),
    **dict.fromkeys(("interpreter", "venv", "python_path"), "python"),
    **dict.fromkeys(("host", "hostnames", "nodelist", "machines", "ssh"), "hosts"),
}
"""The words of other systems for the keys."""
_BESIDE = {
    **dict.fromkeys(("nodes", "num_nodes", "N", "nnodes"), "nodes"),
    **dict.fromkeys(("minutes", "time", "walltime", "time_limit", "timelimit", "t"), "minutes"),
}
"""Words for the arguments that stand beside `scheduler`."""
_OF_SCHEDULERS = ("partition", "account", "qos", "constraint", "reservation", "gpus_per_node", "lines")
"""The keys that have no effect with `hosts`."""
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*")  # no option of ssh, and nothing that a shell would read


def read_options(options: Mapping[str, Any]) -> SchedulerOptions:
    """Read options as a client sends them. Raises InvalidRequest, which says what is valid."""
    return _read(options, SchedulerOptions, "scheduler")


def read_profiles(profiles: object) -> dict[str, AllocationProfile]:
    """Read the profiles of the settings, by name. Raises InvalidRequest."""
    if not isinstance(profiles, Mapping):
        raise InvalidRequest(f"profiles by name are needed, as in {{gpu: {{partition: gpu}}}}, not {profiles!r}")
    return {str(name): _read_profile(str(name), options) for name, options in profiles.items()}


def _read_profile(name: str, options: object) -> AllocationProfile:
    if isinstance(options, AllocationProfile):
        return options
    if not isinstance(options, Mapping) or "profile" in options:
        raise InvalidRequest(f"profile {name} needs options with values, as in {{partition: gpu, minutes: 30}}")
    return _read(options, AllocationProfile, f"profile {name}")


def with_profile(
    options: Mapping[str, Any], profiles: Mapping[str, AllocationProfile], default: str | None
) -> tuple[SchedulerOptions, AllocationProfile]:
    """The options over those of the profile that they name, and the profile; an empty profile where there is none.

    Raises InvalidRequest, and UnknownName for a profile that is not in the settings.
    """
    own = read_options(options)
    name = own.profile or default or ""
    if name and name not in profiles:
        raise UnknownName("profile", name, profiles, "" if profiles else "none: the settings have no profiles")
    profile = profiles.get(name, AllocationProfile())
    replaced = _OF_SCHEDULERS if own.hosts else ()
    preset = {key: getattr(profile, key) for key in SchedulerOptions.__struct_fields__ if key not in replaced}
    given = {key: getattr(own, key) for key in options}
    _refuse_with_hosts(own.hosts or profile.hosts, given, "scheduler")
    return SchedulerOptions(**{**preset, **given, "profile": name}), profile


_Options = TypeVar("_Options", bound=SchedulerOptions)


def _read(options: Mapping[str, Any], kind: type[_Options], owner: str) -> _Options:
    known = kind.__struct_fields__
    types = get_type_hints(kind)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise _unknown_key(str(key), known, owner)
        values[key] = _read_value(key, value, types[key], owner)
    _refuse_with_hosts(values.get("hosts"), values, owner)
    return kind(**values)


def _refuse_with_hosts(hosts: tuple[str, ...] | None, options: Mapping[str, Any], owner: str) -> None:
    if hosts and (useless := [key for key in _OF_SCHEDULERS if options.get(key)]):
        wrong = f"{useless[0]} in {owner} has no effect with hosts, which are used without a scheduler: leave it out."
        raise InvalidRequest(wrong, field="scheduler")


def _unknown_key(key: str, known: tuple[str, ...], owner: str) -> InvalidRequest:
    if key in _BESIDE and _BESIDE[key] not in known:
        beside = _BESIDE[key]
        example = f"{beside}={30 if beside == 'minutes' else 2}"
        wrong = f"{key} does not belong into scheduler: give {beside} beside scheduler, as in {example}."
        return InvalidRequest(wrong, field="scheduler")
    meant = _OTHER_WORDS.get(key) or _BESIDE.get(key, "")
    hint = f" (did you mean {meant!r}?)" if meant else nearest(key, known)
    return InvalidRequest(f"{owner} has no option {key!r}{hint}. Valid: {', '.join(known)}.", field="scheduler")


def _read_value(key: str, value: object, kind: Any, owner: str) -> Any:
    if key in ("lines", "setup", "hosts") and isinstance(value, str):
        value = [value]
    try:
        read = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise _wrong_value(key, value, owner) from None
    least = 0 if key == "gpus_per_node" else 1
    if (isinstance(read, int) and read < least) or (key == "python" and read and not os.path.isabs(read)):
        raise _wrong_value(key, value, owner)
    if key == "hosts" and not all(map(_HOST.fullmatch, read)):
        raise _wrong_value(key, value, owner)
    return read


def _wrong_value(key: str, value: object, owner: str) -> InvalidRequest:
    valid, example = _EXAMPLES[key]
    return InvalidRequest(f"{key} in {owner} is {value!r}; valid is {valid}, such as {example}.", field="scheduler")
