"""What common libraries keep for a whole process, put back before the next function runs there."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["PARTS", "Part", "reseed"]

Part = tuple[Callable[[], Any], Callable[[Any], object]]
"""What gives a part of the state, and what puts that back. It may raise anything where it cannot."""


# --- random numbers


def reseed() -> None:
    """Have random numbers differ again from task to task where one has set a seed. In `random`, a seed takes away the
    number that `gauss` has in store; in NumPy, a seed that was given takes the place of a sequence."""
    if random._inst.gauss_next is not _stored[0]:  # type: ignore[attr-defined]
        random.seed()
        random.gauss(0.0, 1.0)
        _stored[0] = random._inst.gauss_next  # type: ignore[attr-defined]
    if (numpy := sys.modules.get("numpy.random")) is not None:
        source = getattr(numpy, "get_bit_generator", lambda: None)()
        if getattr(source, "seed_seq", source) is None:
            numpy.seed()
    if (torch := sys.modules.get("torch")) is not None and torch.initial_seed() not in _torch_seeds:
        _torch_seeds[:] = [torch.seed()]


_stored: list[object] = [object()]
_torch_seeds: list[int] = []


# --- logging


_AS_MADE: tuple[Any, ...] = (logging.NOTSET, [], True, False, [])


def _configured() -> dict[str, tuple[object, ...]]:
    """The loggers that are not as they are made, and what is disabled for all."""
    root = logging.root
    found = {"": (root.manager.disable,), root.name: _facts(root)}
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and (facts := _facts(logger)) != _AS_MADE:
            found[logger.name] = facts
    return found


def _facts(logger: logging.Logger) -> tuple[object, ...]:
    return logger.level, logger.handlers[:], logger.propagate, logger.disabled, logger.filters[:]


def _configure(saved: dict[str, tuple[Any, ...]]) -> None:
    logging.disable(saved[""][0])
    known = logging.root.manager.loggerDict.values()
    for logger in [logging.root, *(logger for logger in known if isinstance(logger, logging.Logger))]:
        level, handlers, propagate, disabled, filters = saved.get(logger.name, _AS_MADE)
        for handler in {*logger.handlers} - {*handlers}:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.propagate, logger.disabled = propagate, disabled


# --- others, where they are loaded


def _are_as_made() -> bool:
    loaded = sys.modules
    return (
        ("torch" not in loaded or _torch_is_as_made(loaded["torch"]))
        and ("matplotlib.pyplot" not in loaded or not loaded["matplotlib.pyplot"].get_fignums())
        and ("asyncio.events" not in loaded or vars(loaded["asyncio.events"]).get("_event_loop_policy") is None)
    )


def _make_anew(_: object) -> None:
    loaded = sys.modules
    if "torch" in loaded:
        _reset_torch(loaded["torch"])
    if "matplotlib.pyplot" in loaded:
        loaded["matplotlib.pyplot"].close("all")
    if "asyncio.events" in loaded:  # a policy that a function has set, or that remembers its event loop
        vars(loaded["asyncio.events"])["_event_loop_policy"] = None


def _torch_is_as_made(torch: Any) -> bool:
    is_usual = torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
    return bool(is_usual and not torch.are_deterministic_algorithms_enabled())


def _reset_torch(torch: Any) -> None:
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


PARTS: list[Part] = [(_configured, _configure), (_are_as_made, _make_anew)]
