"""The YAML file of the vLLM backend, and what is made of it before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, Session
from rhapsody_mcp.backends import DragonVllmInferenceBackend
from rhapsody_mcp.backends.vllm.config import VllmConfig, read_config, sample_config
from rhapsody_mcp.backends.vllm.launch_plan import Hardware, Plan, detect_hardware, find_model, plan_servers
from rhapsody_mcp.engine import vllm_launcher
from rhapsody_mcp.model.errors import InvalidSettings, InvalidTask
from rhapsody_mcp.shipped_model import MODEL_DIR, MODEL_NAME

SITE = Path(vllm_launcher.__file__).with_name("vllm_site")
CPU = Hardware((), "cpu")
FOUR_GPUS = Hardware(("0", "1", "2", "3"), "cuda")


def config(text: str, tmp_path: Path, **overrides: dict[str, Any]) -> VllmConfig:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return read_config(file, overrides)


def refusal(text: str, tmp_path: Path) -> str:
    with pytest.raises(InvalidSettings) as raised:
        config(text, tmp_path)
    return str(raised.value)


def plan(settings: VllmConfig, hardware: Hardware = CPU, port: int | None = None) -> Plan:
    model = find_model(settings, [])
    folder = Path("/logs")
    return plan_servers(settings, model, hardware, port=port, api_key="secret", folder=folder, environment=os.environ)


def value_after(arguments: tuple[str, ...], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


# --- reading


def test_a_file_of_the_public_schema_is_read(tmp_path: Path) -> None:
    read = config(
        """
run_type: backend_only
token: t
required: {model_name: m, hf_token: hf_x, tp_size: 2, flask_secret_key: k}
hardware: {num_nodes: -1, num_gpus: 4, num_inf_wrkrs_per_cpu: -1, node_offset: 0, inf_wrkr_queue_maxsize: -1}
llm: {dtype: bfloat16, max_tokens: 100, padding_side: left, truncation_side: left, top_k: 50, top_p: 0.95,
      system_prompt: [Be brief., Be kind.], max_model_len: 512, temperature: 0.5, repetition_penalty: 1.1,
      ignore_eos: false, skip_special_tokens: false, vllm_log_level: ERROR, gpu_memory_utilization: 0.9}
input_batching: {toggle_on: true, type: dynamic, input_batch_wait_seconds: 0.1, max_batch_limit: 60}
guardrails: {toggle_on: false, prompt_guard_model: guard, prompt_guard_sensitivity: 0.5}
dynamic_inf_wrkr: {toggle_on: false, min_active_inf_wrkrs_per_cpu: 1, spin_down_threshold_seconds: 3600,
                   spin_up_threshold_seconds: 3, spin_up_prompt_threshold: 5}
""",
        tmp_path,
    )
    assert read.llm.system_text == "Be brief.\nBe kind."
    assert read.llm.request_parameters == {
        "max_tokens": 100,
        "top_k": 50,
        "top_p": 0.95,
        "temperature": 0.5,
        "repetition_penalty": 1.1,
        "ignore_eos": False,
        "skip_special_tokens": False,
    }
    assert read.unused == ["flask_secret_key", "run_type", "token"]


def test_empty_sections_and_an_empty_file_are_all_defaults(tmp_path: Path) -> None:
    assert config("required:\nllm:\n", tmp_path) == config("", tmp_path) == VllmConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("requird: {}", "unknown key 'requird' (did you mean 'required'?)"),
        ("llm: {max_token: 3}", "unknown key 'llm.max_token' (did you mean 'max_tokens'?). Valid there: dtype"),
        ("required: {num_gpus: 3}", "(it belongs in section 'hardware')"),
        ("max_tokens: 3", "(it belongs in section 'llm')"),
        ("llm: {temperature: 3}", "llm.temperature: Input should be less than or equal to 2"),
        ("server: {device: gpu}", "server.device: Input should be 'auto', 'cpu' or 'cuda'"),
        ("guardrails: {toggle_on: true}", "guardrails.toggle_on: this backend has no prompt guard; set it to false"),
        ("dynamic_inf_wrkr: {toggle_on: true}", "dynamic_inf_wrkr.toggle_on: this backend's servers run from start"),
        ("hardware: {num_nodes: 0}", "hardware.num_nodes: valid is a number of nodes from 1, or -1"),
        ("hardware: {node_offset: 1}", "hardware.node_offset: the servers run on the node where the backend is"),
        ("hardware: {num_inf_wrkrs_per_cpu: 2}", "num_gpus / tp_size"),
        ("hardware: {inf_wrkr_queue_maxsize: 2}", "hardware.inf_wrkr_queue_maxsize: tasks wait in the session"),
        ("llm: {truncation_side: right}", "llm.truncation_side: vLLM neither pads prompts nor cuts them"),
        ("llm: {padding_side: right}", "llm.padding_side"),
        ("llm: {use_async_streaming: true}", "llm.use_async_streaming"),
        ("input_batching: {type: pre-batch}", "input_batching.type"),
        ("server: {extra_args: [--port=3]}", "server.extra_args: --port is set by this backend"),
        ("server: {extra_args: [--served_model_name, x]}", "--served-model-name is set by this backend"),
        ("- a list", "holds no sections"),
        ("llm: [", "is no valid YAML"),
    ],
)
def test_what_cannot_be_is_refused_with_file_key_and_what_is_valid(text: str, words: str, tmp_path: Path) -> None:
    message = refusal(text, tmp_path)
    assert words in message
    assert str(tmp_path / "config.yaml") in message


def test_a_secret_is_in_no_error_message(tmp_path: Path) -> None:
    assert "hunter2" not in refusal("required: {hf_token: [hunter2]}", tmp_path)


def test_a_missing_file_is_refused_with_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"none\.yaml cannot be read: No such file.*rhapsody-mcp init"):
        read_config(tmp_path / "none.yaml", {})


def test_arguments_win_over_the_file_and_none_leaves_it(tmp_path: Path) -> None:
    read = config(
        "required: {model_name: a, tp_size: 2}",
        tmp_path,
        required={"model_name": "b", "tp_size": None},
        hardware={"num_gpus": 8},
    )
    assert (read.required.model_name, read.required.tp_size, read.hardware.num_gpus) == ("b", 2, 8)


def test_a_wrong_argument_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"the backend's arguments: required\.tp_size"):
        config("", tmp_path, required={"tp_size": 0})


def test_numbers_in_environment_and_extra_args_need_no_quotes(tmp_path: Path) -> None:
    read = config("server: {environment: {A: 1}, extra_args: [--max-num-seqs, 64]}", tmp_path)
    assert (read.server.environment, read.server.extra_args) == ({"A": "1"}, ["--max-num-seqs", "64"])


# --- the samples


def test_the_sample_for_a_gpu_loads_and_names_a_hub_model(tmp_path: Path) -> None:
    read = config(sample_config(shipped_model=False), tmp_path)
    assert plan(read, FOUR_GPUS).device == "cuda"
    assert find_model(read, []).names == ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")


def test_the_shipped_sample_serves_under_any_name_on_the_cpu_and_holds_no_path(tmp_path: Path) -> None:
    text = sample_config(shipped_model=True)
    asked: dict[str, dict[str, Any]] = {
        "required": {"model_name": "Any-Name", "tp_size": 1},
        "hardware": {"num_nodes": 1, "num_gpus": 1},
    }
    made = plan(config(text, tmp_path, **asked))
    assert made.device == "cpu"
    assert len(made.launches) == 1
    assert made.model.names == ("Any-Name", MODEL_NAME)
    assert value_after(made.launches[0].arguments, "--model") == str(MODEL_DIR.resolve())
    assert str(MODEL_DIR.parent) not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize("shipped_model", [True, False])
def test_every_commented_key_of_a_sample_may_be_switched_on(shipped_model: bool, tmp_path: Path) -> None:
    lines = sample_config(shipped_model).splitlines()
    switched_on = [line.replace("# ", "", 1) if line.startswith("  # ") and ":" in line else line for line in lines]
    keys = [line for line in switched_on if not line.lstrip().startswith(("The small", "the CPU", "For real"))]
    read = config("\n".join(keys), tmp_path)
    assert (read.llm.max_model_len, read.server.environment) == (4096, {"HF_HUB_OFFLINE": "1"})


# --- the model


def test_a_model_folder_may_lie_beside_the_config_file(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    read = config("required: {model_name: pretty}\nserver: {model: models/mine}", tmp_path)
    found = find_model(read, [tmp_path])
    assert (found.source, found.names) == (str(folder), ("pretty", "mine"))


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidSettings, match=r"has no weights \(\*\.safetensors or \*\.bin\)\. Download"):
        find_model(read_config(None, {"server": {"model": str(tmp_path)}}), [tmp_path])


def test_a_folder_that_is_no_model_or_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"it has no config\.json"):
        find_model(read_config(None, {"server": {"model": str(tmp_path)}}), [tmp_path])
    with pytest.raises(InvalidSettings, match=r"there is no model folder \./none"):
        find_model(read_config(None, {"server": {"model": "./none"}}), [tmp_path])


def test_a_hub_name_that_is_not_on_this_machine_is_refused_where_nothing_may_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    wanted = read_config(None, {"server": {"model": "org/model"}})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert find_model(wanted, []).source == "org/model"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InvalidSettings, match=r"no folder org/model here, no model of this name in .*HF_HUB_OFFLINE"):
        find_model(wanted, [])
    (tmp_path / "models--org--model").mkdir()
    assert find_model(wanted, []).source == "org/model"


def test_a_prompt_for_a_model_that_the_settings_do_not_name_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for extra_args, served in (("[]", False), ("[--lora-modules, gpt-4=/adapter]", True)):
        file.write_text(f"server: {{model: shipped, served_model_name: mine, extra_args: {extra_args}}}")
        session = Session([DragonVllmInferenceBackend(file, "pretty")])
        session.accept([AITask("x"), AITask("x", model="mine"), AITask("x", model="pretty")])
        with (
            nullcontext() if served else pytest.raises(InvalidTask, match=r"model 'gpt-4'. Valid: mine, pretty, rhaps")
        ):
            session.accept([AITask("x", model="gpt-4")])


def test_without_any_model_the_three_ways_to_name_one_are_told() -> None:
    with pytest.raises(InvalidSettings, match="a folder, a name on the Hugging Face hub, or 'shipped'"):
        find_model(VllmConfig(), [])


# --- the servers


def settings(**sections: dict[str, Any]) -> VllmConfig:
    return read_config(None, {"required": {"model_name": "org/model"}, **sections})


def test_there_is_one_server_for_each_tp_size_of_the_gpus_each_with_its_own() -> None:
    made = plan(
        settings(required={"model_name": "org/model", "tp_size": 2}, hardware={"num_gpus": 4}), FOUR_GPUS, port=18200
    )
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in made.launches] == ["0,1", "2,3"]
    assert [launch.port for launch in made.launches] == [18200, 18201]
    assert value_after(made.launches[1].arguments, "--port") == "18201"
    assert value_after(made.launches[1].arguments, "--tensor-parallel-size") == "2"


def test_every_visible_gpu_is_taken_where_minus_one_stands_for_all() -> None:
    assert len(plan(settings(hardware={"num_gpus": -1}), FOUR_GPUS).launches) == 4


def test_unasked_one_server_runs_on_a_gpu_where_there_is_one_else_on_the_cpu() -> None:
    assert [plan(settings(), hardware).device for hardware in (FOUR_GPUS, CPU)] == ["cuda", "cpu"]


def test_on_the_cpu_num_gpus_counts_servers() -> None:
    made = plan(settings(hardware={"num_gpus": 2}, server={"device": "cpu"}))
    assert (made.device, len(made.launches)) == ("cpu", 2)


@pytest.mark.parametrize(
    ("sections", "hardware", "words"),
    [
        ({"hardware": {"num_gpus": 1}}, CPU, "num_gpus is 1, and nvidia-smi lists no GPU.*give device cpu"),
        ({"server": {"device": "cuda"}}, CPU, "device is cuda, and nvidia-smi lists no GPU"),
        ({"hardware": {"num_gpus": 8}}, FOUR_GPUS, "8 GPUs are asked for .* and 4 are visible here"),
        ({"hardware": {"num_gpus": 0}, "server": {"device": "cuda"}}, FOUR_GPUS, "num_gpus is 0"),
        ({"hardware": {"num_gpus": 1}}, Hardware(("0",), "cpu"), r"built for the CPU.*rhapsody-mcp\[gpu\]"),
        ({"server": {"device": "cpu"}}, FOUR_GPUS, r"built for GPUs.*rhapsody-mcp\[cpu\]"),
        ({}, Hardware((), "cuda"), "built for GPUs"),
        ({"required": {"model_name": "org/model", "tp_size": 2}}, CPU, "On the CPU, set tp_size to 1"),
    ],
)
def test_hardware_that_is_missing_is_refused_with_what_to_set(
    sections: dict[str, Any], hardware: Hardware, words: str
) -> None:
    with pytest.raises(InvalidSettings, match=words):
        plan(settings(**sections), hardware)


def test_gpus_that_do_not_divide_are_refused_with_numbers_that_do() -> None:
    uneven = settings(required={"model_name": "org/model", "tp_size": 2}, hardware={"num_gpus": 3})
    with pytest.raises(InvalidSettings, match=r"num_gpus is 3 and tp_size 2: .* here 2 or 4"):
        plan(uneven, FOUR_GPUS)


@pytest.mark.parametrize("port", [0, 65536, "8001"])
def test_a_port_that_is_none_is_refused(port: Any) -> None:
    with pytest.raises(InvalidSettings, match="valid is a number from 1 to 65535, or None"):
        plan(settings(), port=port)


def test_settings_of_the_server_become_its_flags_and_variables(tmp_path: Path) -> None:
    read = config(
        """
required: {model_name: org/model, hf_token: hf_x}
llm: {dtype: float16, max_model_len: 512, gpu_memory_utilization: 0.5, vllm_log_level: error}
server: {environment: {A: b}, extra_args: [--max-num-seqs, 8], served_model_name: short}
""",
        tmp_path,
    )
    launch = plan(read).launches[0]
    flags = {flag: value_after(launch.arguments, flag) for flag in ("--dtype", "--max-model-len", "--max-num-seqs")}
    assert flags == {"--dtype": "float16", "--max-model-len": "512", "--max-num-seqs": "8"}
    assert value_after(launch.arguments, "--served-model-name") == "short"
    assert value_after(launch.arguments, "--gpu-memory-utilization") == "0.5"
    variables = {name: launch.environment[name] for name in ("HF_TOKEN", "VLLM_LOGGING_LEVEL", "A")}
    assert variables == {"HF_TOKEN": "hf_x", "VLLM_LOGGING_LEVEL": "ERROR", "A": "b"}


def test_prompts_are_not_cut_in_parts_on_the_cpu_unless_the_config_file_says_so() -> None:
    flag = "--no-enable-chunked-prefill"
    on_gpu, on_cpu = (plan(settings(), hardware).launches[0].arguments for hardware in (FOUR_GPUS, CPU))
    assert (flag in on_gpu, flag in on_cpu) == (False, True)
    asked = plan(settings(server={"extra_args": ["--enable-chunked-prefill"]})).launches[0].arguments
    assert asked.index("--enable-chunked-prefill") > asked.index(flag)


def test_a_server_inherits_no_variable_of_a_dragon_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAGON_INF_PD", "x")
    monkeypatch.setenv("SOME_DRAGON", "x")
    assert not [name for name in plan(settings()).launches[0].environment if "DRAGON" in name]


def test_the_key_is_on_no_command_line() -> None:
    assert "secret" not in " ".join(plan(settings()).launches[0].arguments)


@pytest.mark.anyio
async def test_an_interpreter_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"server\.python is /no/python, which cannot be run: No such file"):
        await detect_hardware(settings(server={"python": "/no/python"}))


@pytest.mark.anyio
async def test_gpus_are_those_that_are_visible_to_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n")
    listing.chmod(0o755)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho vllm 0.32.0\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    chosen = settings(server={"python": str(python)})
    assert await detect_hardware(chosen) == Hardware(("0", "1"), "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert (await detect_hardware(chosen)).gpus == ("1",)


def test_a_hidden_library_looks_absent_and_the_environments_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.own_ran = True")
    program = "import importlib.util as u; print(own_ran, u.find_spec('colorsys'), u.find_spec('wave') is not None)"
    variables = {"PYTHONPATH": f"{SITE}:{tmp_path}", "RHAPSODY_HIDDEN_MODULES": "colorsys"}
    ran = subprocess.run([sys.executable, "-P", "-c", program], env=variables, capture_output=True, check=True)
    assert ran.stdout == b"True None True\n"


def test_neither_vllm_nor_torch_is_imported_with_the_backends() -> None:
    program = (
        "import sys, rhapsody_mcp.backends.vllm.backend, rhapsody_mcp.backends.endpoint;"
        "print([name for name in ('vllm', 'torch', 'transformers', 'dragon') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"[]\n"
