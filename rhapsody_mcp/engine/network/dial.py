"""Connects to a process on another node, over any of its addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from rhapsody_mcp.engine.network import tls
from rhapsody_mcp.engine.network.multiplexer import Multiplexer

__all__ = ["dial"]

_TRIAL_S = 10.0


async def dial(
    addresses: Sequence[str], port: int, pem: str, multiplexer: Callable[[], Multiplexer]
) -> Multiplexer | None:
    """Try all addresses at the same time; return the connection with the one that answers first, None if none does.

    `multiplexer` makes the end of a connection, one for each address.
    """
    loop = asyncio.get_running_loop()
    try:
        context = tls.context(pem, server=False)
    except OSError:  # there is no room for its temporary file now
        return None
    trials = [
        asyncio.create_task(loop.create_connection(multiplexer, address, port, ssl=context)) for address in addresses
    ]
    chosen: Multiplexer | None = None
    with suppress(TimeoutError):
        async with asyncio.timeout(_TRIAL_S):
            for trial in asyncio.as_completed(trials):
                with suppress(OSError):
                    _, chosen = await trial
                    break
    for unneeded in trials:
        unneeded.cancel()
    for result in await asyncio.gather(*trials, return_exceptions=True):
        if not isinstance(result, BaseException) and result[1] is not chosen:
            result[1].abort()
    return chosen
