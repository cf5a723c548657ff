"""Saves and restores the state that common libraries keep for the whole process."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["PARTS", "Part", "reseed"]

Part = tuple[Callable[[], Any], Callable[[Any], object]]
"""A function that reads a part of the state, and one that restores it. Each may raise any exception if it cannot."""


# --- random numbers


def reseed() -> None:
    """Seed the random number generators anew if a function has seeded them, so that random numbers differ from task to
    task. A seed is detected by its side effect: in `random`, it discards the number that `gauss` has stored; in NumPy,
    an explicit seed replaces the seed sequence."""
    if random._inst.gauss_next is not _stored_gauss[0]:  # type: ignore[attr-defined]
        random.seed()
        random.gauss(0.0, 1.0)
        _stored_gauss[0] = random._inst.gauss_next  # type: ignore[attr-defined]
    if (numpy := sys.modules.get("numpy.random")) is not None:
        source = getattr(numpy, "get_bit_generator", lambda: None)()
        if getattr(source, "seed_seq", source) is None:
            numpy.seed()
    if (torch := sys.modules.get("torch")) is not None and torch.initial_seed() not in _torch_seeds:
        _torch_seeds[:] = [torch.seed()]


_stored_gauss: list[object] = [object()]
_torch_seeds: list[int] = []


# --- logging


_DEFAULT_LOGGER_STATE: tuple[Any, ...] = (logging.NOTSET, [], True, False, [])


def _logging_state() -> dict[str, tuple[object, ...]]:
    """Return the loggers that differ from a new logger, and the level that is disabled for all loggers."""
    root = logging.root
    states = {"": (root.manager.disable,), root.name: _logger_state(root)}
    for logger in root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and (state := _logger_state(logger)) != _DEFAULT_LOGGER_STATE:
            states[logger.name] = state
    return states


def _logger_state(logger: logging.Logger) -> tuple[object, ...]:
    return logger.level, logger.handlers[:], logger.propagate, logger.disabled, logger.filters[:]


def _restore_logging(saved: dict[str, tuple[Any, ...]]) -> None:
    logging.disable(saved[""][0])
    loggers = logging.root.manager.loggerDict.values()
    for logger in [logging.root, *(logger for logger in loggers if isinstance(logger, logging.Logger))]:
        level, handlers, propagate, disabled, filters = saved.get(logger.name, _DEFAULT_LOGGER_STATE)
        for handler in {*logger.handlers} - {*handlers}:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
        logger.propagate, logger.disabled = propagate, disabled


# --- other libraries, if they are loaded


def _have_defaults() -> bool:
    modules = sys.modules
    return (
        ("torch" not in modules or _torch_has_defaults(modules["torch"]))
        and ("matplotlib.pyplot" not in modules or not modules["matplotlib.pyplot"].get_fignums())
        and ("asyncio.events" not in modules or vars(modules["asyncio.events"]).get("_event_loop_policy") is None)
    )


def _restore_defaults(_: object) -> None:
    modules = sys.modules
    if "torch" in modules:
        _reset_torch(modules["torch"])
    if "matplotlib.pyplot" in modules:
        modules["matplotlib.pyplot"].close("all")
    if "asyncio.events" in modules:  # set by a function, or holding the function's event loop
        vars(modules["asyncio.events"])["_event_loop_policy"] = None


def _torch_has_defaults(torch: Any) -> bool:
    has_default_modes = torch.is_grad_enabled() and torch.get_default_dtype() is torch.float32
    return bool(has_default_modes and not torch.are_deterministic_algorithms_enabled())


def _reset_torch(torch: Any) -> None:
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


PARTS: list[Part] = [(_logging_state, _restore_logging), (_have_defaults, _restore_defaults)]
