"""How often the process of a server looks for garbage."""

from __future__ import annotations

import gc

__all__ = ["collect_less"]


def collect_less() -> None:
    """Most of what a server makes stays: to look after each 700 new objects, as Python does, took a fifth of the time
    of a large submission."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
