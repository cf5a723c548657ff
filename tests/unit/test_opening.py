"""Which backends a session gets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rhapsody_mcp.machine import Dependency, inspect_machine
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest
from rhapsody_mcp.runtime import backend_factory
from rhapsody_mcp.runtime.backend_factory import SessionConfig, open_backends, plan_backends
from rhapsody_mcp.settings import Settings

URL = "http://127.0.0.1:8000/v1"


def on_machine(
    monkeypatch: pytest.MonkeyPatch, *, dragon: str = "", vllm: str = "", gpus: tuple[str, ...] | None = None
) -> None:
    parts = {
        "dragon": Dependency("Dragon", dragon, "pip install dragon"),
        "vllm": Dependency("vLLM", vllm, "pip install vllm"),
    }
    here = inspect_machine()
    machine = msgspec.structs.replace(here, gpus=here.gpus if gpus is None else gpus, **parts)
    monkeypatch.setattr(backend_factory, "inspect_machine", lambda: machine)


def names(config: SessionConfig) -> list[str]:
    return [backend.name for backend in open_backends(config, Settings())]


@pytest.mark.parametrize(
    ("has", "config", "got"),
    [
        ({"dragon": "0.15", "vllm": "0.32"}, SessionConfig(), ["dragon", "vllm"]),
        ({"vllm": "0.32"}, SessionConfig(), ["local", "vllm"]),
        ({}, SessionConfig(), ["local"]),
        ({"vllm": "0.32"}, SessionConfig(endpoint_url=URL), ["local", "endpoint"]),
        ({"dragon": "0.15"}, SessionConfig(backends=("local",), num_workers=2), ["local"]),
    ],
)
def test_a_session_gets_what_works_here_unless_it_says_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, str], config: SessionConfig, got: list[str]
) -> None:
    on_machine(monkeypatch, dragon=has.get("dragon", ""), vllm=has.get("vllm", ""))
    assert names(config) == got


@pytest.mark.parametrize(
    ("config", "error", "told"),
    [
        (
            SessionConfig(backends=("dragon",)),
            BackendUnavailable,
            "Dragon is not installed here. Get it with: pip install",
        ),
        (SessionConfig(model="x"), BackendUnavailable, "vLLM is not installed here"),
        (SessionConfig(backends=("local",), model="x"), InvalidRequest, "model has no effect without the backend vllm"),
        (SessionConfig(backends=("endpoint",), num_workers=3), InvalidRequest, "without the backend dragon or local"),
        (SessionConfig(backends=("endpoint",)), InvalidRequest, "needs endpoint_url"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, config: SessionConfig, error: type[Exception], told: str
) -> None:
    on_machine(monkeypatch)
    with pytest.raises(error, match=told):
        names(config)


def test_a_model_folder_that_is_not_there_is_refused_when_the_session_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_machine(monkeypatch, vllm="0.32")
    with pytest.raises(InvalidRequest, match=r"there is no model folder /no/such"):
        names(SessionConfig(model="/no/such"))
    (tmp_path / "config.yaml").write_text("server: {model: ./none}")
    with pytest.raises(InvalidRequest, match=r"there is no model folder \./none"):
        names(SessionConfig(config_file=str(tmp_path / "config.yaml")))
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidRequest, match=r"none is no model: it has no config\.json"):
        names(SessionConfig(config_file=str(tmp_path / "config.yaml")))


def test_the_key_of_the_settings_goes_to_their_own_address_and_to_no_other() -> None:
    settings = Settings(endpoint_url=URL, endpoint_model="own", endpoint_api_key="secret")
    (own,) = plan_backends(SessionConfig(backends=("endpoint",)), settings)
    (other,) = plan_backends(SessionConfig(backends=("endpoint",), endpoint_url="http://elsewhere/v1"), settings)
    assert own.arguments == {"url": URL, "model": "own", "api_key": "secret"}
    assert other.arguments == {"url": "http://elsewhere/v1", "model": None, "api_key": None}


def test_a_device_that_is_not_there_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_machine(monkeypatch, vllm="0.32", gpus=())
    file = tmp_path / "config.yaml"
    file.write_text("required:\n  model_name: m\nserver:\n  device: cuda\n  model: shipped\n")
    for config in (SessionConfig(device="cuda"), SessionConfig(config_file=str(file))):
        with pytest.raises(InvalidRequest, match=r"this machine has no GPU.*endpoint_url"):
            names(config)
    assert names(SessionConfig(config_file=str(file), device="cpu")) == ["local", "vllm"]
