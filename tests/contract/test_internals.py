"""What is expected of the internals of Python and of libraries that the package uses. Where a new version fails here,
the module that `test_private_names` lists has to change before the requirement does."""

from __future__ import annotations

import _locale
import _signal  # type: ignore[import-not-found]  # typeshed has it as signal
import _socket
import _thread
import asyncio
import functools
import locale
import multiprocessing
import multiprocessing.context
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, cast

import cloudpickle
import cloudpickle.cloudpickle
import pytest
import uvicorn
from mcp import Client
from mcp.server import Server as LowLevelServer
from mcp.server import ServerRequestContext
from mcp.server.connection import Connection
from mcp.server.mcpserver import MCPServer
from mcp.types import CompleteRequestParams, CompleteResult, Completion, PromptReference
from opentelemetry.sdk.trace import TracerProvider
from radical.asyncflow import WorkflowEngine
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rhapsody_mcp.runtime.telemetry.span_ids import span_ids
from tests.agents import ERAS

# --- Python


def test_the_modules_below_signal_socket_and_locale_have_the_same_functions() -> None:
    assert (_signal.SIGKILL, _signal.SIG_DFL) == (signal.SIGKILL, signal.SIG_DFL)
    assert issubclass(socket.socket, _socket.socket)
    assert _socket.getdefaulttimeout() == socket.getdefaulttimeout()
    assert _locale.setlocale(_locale.LC_ALL) == locale.setlocale(locale.LC_ALL)


def test_the_count_of_threads_has_those_that_run() -> None:
    before, end = _thread._count(), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    assert _thread._count() == before + 1
    end.set()
    thread.join()


def test_a_program_can_end_its_threads_and_run_its_exit_functions_before_its_end() -> None:
    program = """if True:
        import atexit, os, threading, time
        atexit.register(print, "exit function", flush=True)
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread", flush=True))).start()
        threading._shutdown()
        print("all threads", flush=True)
        atexit._run_exitfuncs()
        os._exit(3)
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.stdout.splitlines(), ended.returncode) == (["thread", "all threads", "exit function"], 3)


def test_what_is_registered_with_threading_runs_before_the_standard_executors_end_and_the_last_first() -> None:
    program = """if True:
        import atexit, threading
        from concurrent.futures.thread import ThreadPoolExecutor
        pool = ThreadPoolExecutor()
        atexit.register(print, "exit function")
        threading._register_atexit(print, "first")
        threading._register_atexit(lambda: print(pool.submit(str, "a thread is there").result()))
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["a thread is there", "first", "exit function"], ended.stderr


def test_the_environment_holds_its_variables_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    variables: dict[bytes, bytes] = vars(os.environ)["_data"]
    monkeypatch.setenv("RHAPSODY_TEST", "é")
    assert variables[b"RHAPSODY_TEST"] == os.fsencode("é")
    monkeypatch.delenv("RHAPSODY_TEST")
    assert b"RHAPSODY_TEST" not in variables


def test_a_warning_is_shown_again_once_the_filters_are_said_to_have_changed() -> None:
    def warn_twice() -> None:
        for _ in range(2):
            warnings.warn("once", UserWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        shown: list[Any] = []
        warnings.showwarning = lambda *args, **options: shown.append(args)
        warn_twice()
        vars(warnings)["_filters_mutated"]()
        warn_twice()
    assert len(shown) == 2


def test_a_seed_takes_away_the_number_that_gauss_has_in_store() -> None:
    generator = cast(Any, vars(random)["_inst"])
    random.gauss(0.0, 1.0)
    random.seed()
    assert generator.gauss_next is None
    random.gauss(0.0, 1.0)
    assert generator.gauss_next is not None


def test_asyncio_keeps_the_policy_that_was_set() -> None:
    program = """if True:
        import asyncio
        policy = asyncio.DefaultEventLoopPolicy()
        asyncio.set_event_loop_policy(policy)
        assert vars(asyncio.events)["_event_loop_policy"] is policy
        vars(asyncio.events)["_event_loop_policy"] = None
        assert asyncio.get_event_loop_policy() is not policy
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_cached_function_can_be_made_of_its_parts() -> None:
    make, cache_info = vars(functools)["_lru_cache_wrapper"], vars(functools)["_CacheInfo"]
    assert isinstance(functools.cache(abs), make)
    made = make(abs, 2, False, cache_info)
    assert [made(-1), made(-1)] == [1, 1]
    assert made.cache_info() == cache_info(hits=1, misses=1, maxsize=2, currsize=1)


def test_multiprocessing_finds_its_start_methods_by_name_in_a_dict() -> None:
    contexts = vars(multiprocessing.context)["_concrete_contexts"]
    assert multiprocessing.get_context("spawn") is contexts["spawn"]


# --- libraries


def test_cloudpickle_knows_the_classes_that_came_by_value_until_it_is_told_to_forget_them() -> None:
    tracked = vars(cloudpickle.cloudpickle)["_DYNAMIC_CLASS_TRACKER_BY_ID"]
    data = cloudpickle.dumps(type("Travels", (), {"__module__": "__main__"}))
    tracked.clear()
    first = cloudpickle.loads(data)
    assert tracked.data and cloudpickle.loads(data) is first
    tracked.clear()
    assert cloudpickle.loads(data) is not first


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_a_handler_of_mcp_reaches_the_connection_below_its_request(era: str) -> None:
    server, connections = MCPServer("test"), list[Connection]()

    async def complete(context: ServerRequestContext[Any, Any], _: CompleteRequestParams) -> CompleteResult:
        connections.append(context.session._connection)
        connections[-1].state["calls"] = connections[-1].state.get("calls", 0) + 1
        connections[-1].exit_stack.callback(left.set)
        return CompleteResult(completion=Completion(values=[]))

    left, low_level = asyncio.Event(), server._lowlevel_server
    assert isinstance(low_level, LowLevelServer)
    low_level.add_request_handler("completion/complete", CompleteRequestParams, complete)
    async with Client(server, mode=cast(Any, era)) as client:
        await client.complete(PromptReference(name="p"), {"name": "a", "value": ""})
    async with asyncio.timeout(5):
        await left.wait()
    assert connections[0].state["calls"] == 1


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    """An application that nobody calls."""


def test_uvicorns_protocol_has_what_ours_reads_of_it() -> None:
    loop = asyncio.new_event_loop()
    config = uvicorn.Config(_answer, lifespan="off", log_config=None)
    config.load()
    protocol = H11Protocol(config, ServerState(), {"key": 1}, loop)
    assert protocol.app_state == {"key": 1} and protocol.loop is loop and not protocol.connections
    assert vars(protocol)["cycle"] is None
    assert str(protocol.conn.their_state) == "IDLE"
    assert {"connection_made", "data_received", "connection_lost", "on_response_complete"} <= vars(H11Protocol).keys()
    loop.close()


def test_uvicorns_server_takes_its_signals_in_a_method_of_its_own() -> None:
    server = uvicorn.Server(uvicorn.Config(_answer))
    assert server.should_exit is False
    assert "capture_signals" in vars(uvicorn.Server)


@pytest.mark.anyio
async def test_the_transport_of_a_process_can_be_closed() -> None:
    process = await asyncio.create_subprocess_exec("true", stdout=asyncio.subprocess.PIPE)
    await process.communicate()
    transport = vars(process)["_transport"]
    transport.close()
    assert transport.is_closing() and process.returncode == 0


@pytest.mark.anyio
async def test_a_flow_of_asyncflow_has_an_event_that_makes_it_look_for_ended_tasks(tmp_path: Path) -> None:
    flow = await WorkflowEngine.create(dry_run=True, work_dir=str(tmp_path))
    assert flow.task_callbacks.__self__ is flow
    assert isinstance(vars(flow)["_component_change_event"], asyncio.Event)
    await flow.shutdown()


# --- OpenTelemetry


def test_a_tracer_takes_the_id_of_each_span_from_its_generator() -> None:
    tracer: Any = TracerProvider(shutdown_on_exit=False).get_tracer("tests")
    ids = span_ids(tracer)
    assert ids is not None and span_ids(tracer) is ids
    ids.given = 0x1234
    assert tracer.start_span("first").get_span_context().span_id == 0x1234
    assert tracer.start_span("second").get_span_context().span_id != 0x1234
