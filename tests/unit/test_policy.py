"""What agents may run and name, and what tasks do not inherit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rhapsody_mcp.backends.environment import Environment, read_environment
from rhapsody_mcp.model.errors import InvalidRequest, InvalidSettings
from rhapsody_mcp.model.specs import Call, Command, Layout, RankGroup, TaskSpec, Template
from rhapsody_mcp.runtime.backend_factory import SessionConfig, plan_backends
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.settings import SECRETS, Settings


def program(path: str, **template: object) -> TaskSpec:
    groups = (RankGroup(1, Template(**template)),)  # type: ignore[arg-type]  # fields of a template
    return TaskSpec(uid="task.1", work=Command(path), layout=Layout("process", groups))


def function(form: str, code: str) -> TaskSpec:
    return TaskSpec(uid="task.1", work=Call(form, code.encode()), layout=Layout("native"))  # type: ignore[arg-type]


def make_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_without_restrictions_everything_may_run() -> None:
    policy = Policy.of(Settings())
    for spec in (
        program("/no/such", cwd="/no/where"),
        function("source", "def f(): ..."),
        function("module", "os:abort"),
    ):
        assert policy.check(spec) is spec
    policy.check_setup()


def test_a_program_is_known_by_the_full_path_to_which_its_links_lead(tmp_path: Path) -> None:
    allowed, other = make_program(tmp_path / "allowed" / "sim"), make_program(tmp_path / "other" / "sim")
    (tmp_path / "allowed" / "link").symlink_to(other)
    (tmp_path / "link").symlink_to(allowed)
    policy = Policy(executables=(f"{allowed.parent.resolve()}/*",))
    for path in (str(allowed), str(tmp_path / "link"), f"{other.parent}/../allowed/sim"):
        policy.check(program(path))
    with pytest.raises(InvalidRequest, match=rf"link', which is {other.resolve()}, is not allowed here: allowed_exec"):
        policy.check(program(str(tmp_path / "allowed" / "link")))
    with pytest.raises(InvalidRequest, match="is not allowed here"):
        policy.check(program(f"{allowed.parent}/../other/sim"))
    with pytest.raises(InvalidRequest, match="is no program that is known here"):
        policy.check(program(str(allowed.parent / "none")))


def test_a_name_is_looked_for_on_the_path_of_the_task_and_runs_from_there(tmp_path: Path) -> None:
    allowed, other = make_program(tmp_path / "allowed" / "sim"), make_program(tmp_path / "other" / "sim")
    policy = Policy(executables=(f"{allowed.parent.resolve()}/*",))
    work = policy.check(program("sim", env={"PATH": str(allowed.parent)})).work
    assert isinstance(work, Command) and work.executable == str(allowed)
    policy.check(program("./sim", cwd=str(allowed.parent)))
    for path in (str(other.parent), "/none"):
        with pytest.raises(InvalidRequest, match="allowed_executables"):
            policy.check(program("sim", env={"PATH": path}))
    for fields in ({"cwd": str(other.parent)}, {"cwd": "allowed"}, {}):
        with pytest.raises(InvalidRequest, match="allowed_executables"):
            policy.check(program("./sim", **fields))


def test_no_path_leads_out_of_the_folders_that_may_be_named(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "link").symlink_to(outside)
    (tmp_path / "entrance").symlink_to(inside)
    policy = Policy(folders=(inside,))
    for path in (inside, inside / "new" / "folder", tmp_path / "entrance", f"{outside}/../inside"):
        policy.check(program("/bin/true", cwd=str(path)))
    for path in ("inside", "~", "."):
        with pytest.raises(InvalidRequest, match="is no full path"):
            policy.check(program("/bin/true", cwd=path))
    for path in (outside, inside / "link", f"{inside}/../outside", f"{inside}side", "/"):
        with pytest.raises(InvalidRequest, match="outside of the folders that are allowed here: allowed_folders"):
            policy.check(program("/bin/true", cwd=str(path)))


def test_functions_are_imported_from_modules_that_may_be_imported() -> None:
    policy = Policy(source=False, modules=("math:*", "mysim.*"))
    policy.check(function("module", "math:sqrt"))
    policy.check(function("module", "mysim.run:main"))
    policy.check(function("module", "rhapsody_mcp.engine.views.inspection:as_list"))
    policy.check_module("mysim:run")
    policy.check_module("mysim.part:run")
    with pytest.raises(InvalidRequest, match=r"'os:system' is not allowed here: allowed_modules .* is math:\*, mysim"):
        policy.check(function("module", "os:system"))
    with pytest.raises(
        InvalidRequest, match=r"allow_source is false .* Valid are functions of installed modules that m"
    ):
        policy.check(function("source", "def f(): ..."))


@pytest.mark.parametrize("settings", [Settings(allow_source=False), Settings(allowed_executables=("/usr/bin/*",))])
def test_where_programs_or_source_are_restricted_so_are_setup_lines(settings: Settings) -> None:
    session_config = SessionConfig(backends=("local",), environment=Environment(setup=("rm -r /",)))
    with pytest.raises(InvalidRequest, match="setup in environment is not allowed here, because allow"):
        plan_backends(session_config, settings)
    variables = SessionConfig(backends=("local",), environment=Environment(variables={"A": "1"}))
    assert plan_backends(variables, settings)[0].server_arguments["environment"].variables == {"A": "1"}


def test_a_config_file_and_what_it_names_are_in_the_folders_that_may_be_named(tmp_path: Path) -> None:
    inside, model = tmp_path / "inside", tmp_path / "model"
    for folder in (inside, model):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("")
    (inside / "python.yaml").write_text("server: {python: /bin/sh, model: shipped}")
    (inside / "model.yaml").write_text(f"server: {{model: {model}}}")
    settings = Settings(allowed_folders=(inside,), allowed_executables=("/opt/*",))
    for session_config, told in {
        SessionConfig(
            backends=("vllm",), config_file=str(tmp_path / "other.yaml")
        ): "config_file .* is outside of the folders",
        SessionConfig(backends=("vllm",), config_file=str(inside / "model.yaml")): "model .* is outside of the folders",
        SessionConfig(
            backends=("vllm",), config_file=str(inside / "python.yaml")
        ): "python in the section server .*allowed_exec",
        SessionConfig(backends=("vllm",), model=str(model)): "model .* is outside of the folders",
    }.items():
        with pytest.raises(InvalidRequest, match=told):
            plan_backends(session_config, settings)


# --- variables


WITHHELD = Environment(withheld=SECRETS)


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "GITHUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD"),
        *("AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS", "MYSQL_PWD", "SSH_AUTH_SOCK", "db_password"),
    ],
)
def test_what_sounds_like_a_secret_is_withheld(name: str) -> None:
    assert WITHHELD.withholds(name)


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "PWD", "OLDPWD", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "AWS_CA_BUNDLE"),
        *("SLURM_JOB_ID", "KRB5CCNAME", "MODULEPATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "PMI_RANK"),
    ],
)
def test_what_programs_need_is_passed_on(name: str) -> None:
    assert not WITHHELD.withholds(name)


def test_a_vllm_server_keeps_its_token_unless_it_is_withheld_by_name() -> None:
    assert not WITHHELD.withholds("HF_TOKEN", keeps=["HF_TOKEN"])
    assert Environment(withheld=("HF_TOKEN",)).withholds("HF_TOKEN", keeps=["HF_TOKEN"])


@pytest.mark.anyio
async def test_an_engine_has_what_is_here_without_secrets_and_with_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HERE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    built = await Environment({"GIVEN": "2", "MY_TOKEN": "own"}, withheld=SECRETS).build()
    assert (built["HERE"], built["GIVEN"], built["MY_TOKEN"]) == ("1", "2", "own")
    assert "HF_TOKEN" not in built


@pytest.mark.anyio
async def test_plots_need_no_display_unless_something_says_how_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    assert (await Environment().build())["MPLBACKEND"] == "Agg"
    monkeypatch.setenv("MPLBACKEND", "svg")
    assert (await Environment().build())["MPLBACKEND"] == "svg"
    assert (await Environment({"MPLBACKEND": "pdf"}).build())["MPLBACKEND"] == "pdf"


@pytest.mark.anyio
async def test_setup_lines_run_one_after_the_other_in_a_login_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".bash_profile").write_text(
        'echo noise\nexport FOUND_TOKEN=x\nmodule() { export LOADED="$LOADED$2,"; PATH="/modules/$2/bin:$PATH"; }\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"/here/bin:{os.environ['PATH']}")
    lines = ("module load gcc", "module load $WHICH", 'export SAID="two\nlines"', "sleep 300 &")
    built = await Environment({"WHICH": "mpi", "LOADED": ""}, lines, SECRETS).build()
    assert built["LOADED"] == "", "a variable that is given wins"
    built = await Environment({"WHICH": "mpi"}, lines, SECRETS).build()
    assert (built["LOADED"], built["SAID"]) == ("gcc,mpi,", "two\nlines")
    assert built["PATH"].startswith("/modules/mpi/bin:/modules/gcc/bin:/here/bin:")
    assert "FOUND_TOKEN" not in built and built.get("SHLVL") == os.environ.get("SHLVL")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("source /no/such.sh", r"'source /no/such.sh' ended with exit code 1: .*/no/such.sh: No such file"),
        ("exit 3", "'exit 3' ended with exit code 3"),
        ("if", "'if' ended with exit code 2: .*syntax error"),
        ("exec true", "'exec true' ended the shell"),
    ],
)
async def test_a_setup_line_that_fails_is_named_with_what_it_said(line: str, told: str) -> None:
    with pytest.raises(InvalidSettings, match=told):
        await Environment(setup=("true", line, "echo never >&2")).build()


@pytest.mark.anyio
async def test_setup_lines_that_do_not_end_are_ended() -> None:
    with pytest.raises(InvalidSettings, match=r"'sleep 300' did not end within 15 s"):
        await Environment(setup=("sleep 300",)).build(within_s=15)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"vars": {}}, "unknown field `vars`. It may have variables"),
        ({"setup": "module load x"}, "Expected `array`"),
        ({"variables": {"A=": "1"}}, "no valid name"),
        ({"variables": {"PYTHONHOME": "/x"}}, "would break the engine's own Python"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidSettings, match=told):
        read_environment(given)
