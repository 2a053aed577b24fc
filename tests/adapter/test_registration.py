"""FuRA in PEFT's registry: a real enum member on each supported Python, and signatures that must not move."""

import copy
import inspect
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import tuners_utils
from peft.utils import PeftType, peft_types, quantization_utils

import fura_rl
from fura_rl.adapter import FuraConfig, FuraModel, enum_member
from fura_rl.adapter.registration import fura_peft_type, register_fura
from fura_rl.errors import FuraError

CHECK_ENUM = """
import copy, importlib.util, pickle, sys

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

PeftType = load("peft_types", sys.argv[1]).PeftType
extend = load("enum_member", sys.argv[2]).extend_str_enum
before = list(PeftType)
fura = extend(PeftType, "FURA")
assert extend(PeftType, "FURA") is fura
assert isinstance(fura, PeftType) and isinstance(fura, str)
assert fura == "FURA" and fura.value == "FURA" and fura.name == "FURA" and hash(fura) == hash("FURA")
assert PeftType.FURA is fura and PeftType["FURA"] is fura and PeftType("FURA") is fura
assert list(PeftType) == before + [fura] and len(PeftType) == len(before) + 1
assert "FURA" in list(PeftType) and fura in PeftType and "FURA" in PeftType.__members__
assert pickle.loads(pickle.dumps(fura)) is fura
assert copy.deepcopy(fura) is fura and copy.copy(fura) is fura
assert repr(fura) == "<PeftType.FURA: 'FURA'>" and {fura: 1}[PeftType.FURA] == 1
assert repr(PeftType.LORA) == "<PeftType.LORA: 'LORA'>" and PeftType("LORA") is PeftType.LORA
print(sys.version_info[:2])
"""


def interpreter(version: str) -> str | None:
    """Python `version`: this one, one on the path, or a sibling of the base installation, as pyenv keeps them."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    siblings = sorted(Path(sys.base_prefix).parent.glob(f"{version}*/bin/python"))
    return str(siblings[-1]) if siblings else shutil.which(f"python{version}")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_enum_extension(version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not installed")
    files = [peft_types.__file__, enum_member.__file__]
    run = subprocess.run([python, "-c", CHECK_ENUM, *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"({version.replace('.', ', ')})"


def test_registered_once_with_everything():
    fura = PeftType["FURA"]
    assert fura_peft_type() is fura
    assert PEFT_TYPE_TO_CONFIG_MAPPING[fura] is FuraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[fura] is FuraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[fura] == FuraModel.prefix == "fura_"
    register_fura(FuraConfig, FuraModel)  # again: nothing happens
    assert copy.deepcopy(FuraConfig()).peft_type is fura
    assert pickle.loads(pickle.dumps(FuraConfig())).peft_type is fura


def test_steps_aside_for_another_fura(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType["FURA"], peft.LoraConfig)
    with pytest.raises(FuraError, match=r"PEFT already has a FURA method \(peft\..*LoraConfig\)"):
        register_fura(FuraConfig, FuraModel)


def test_import_registers():
    code = "import fura_rl, peft; print(peft.PeftType.FURA, fura_rl.FuraConfig().peft_type.value)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["PeftType.FURA", "FURA"]
    assert fura_rl.FuraConfig is FuraConfig


# What this package overrides or calls of PEFT. A change here must be looked at, not only re-pinned.
SIGNATURES = {
    (peft_types, "register_peft_method"): "name, config_cls, model_cls, prefix, is_mixed_compatible",
    (quantization_utils, "resolve_quantization_backend"): "base_layer, kwargs",
    (quantization_utils, "get_quantization_kwargs"): "model",
    (quantization_utils.QuantizationBackend, "get_base_weight"): "self, base_layer",
    (quantization_utils.QuantizationBackend, "set_base_weight"): "self, peft_layer, weight_data",
    (tuners_utils, "check_adapters_to_merge"): "module, adapter_names",
    (tuners_utils, "_get_in_out_features"): "module",
    (tuners_utils.BaseTuner, "_create_and_replace"): (
        "self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name"
    ),
    (tuners_utils.BaseTuner, "inject_adapter"): (
        "self, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict"
    ),
    (tuners_utils.BaseTuner, "_check_new_adapter_config"): "self, config",
    (tuners_utils.BaseTuner, "_replace_module"): "self, parent, child_name, new_module, child",
    (tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load"): "model, config, adapter_name, state_dict",
    (tuners_utils.BaseTunerLayer, "_get_base_layer_device_and_dtype"): "self, base_layer",
    (tuners_utils.BaseTunerLayer, "merge"): "self, safe_merge, adapter_names",
    (tuners_utils.BaseTunerLayer, "set_adapter"): "self, adapter_names, inference_mode",
    (peft.PeftConfig, "from_pretrained"): "pretrained_model_name_or_path, subfolder, kwargs",
    (peft.PeftModel, "_enable_peft_forward_hooks"): "self, args, kwargs",
    (peft.PeftModel, "save_pretrained"): (
        "self, save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process, "
        "path_initial_model_for_weight_conversion, kwargs"
    ),
}


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", value))
def test_peft_signatures_are_those_relied_upon(owner, name):
    assert ", ".join(inspect.signature(getattr(owner, name)).parameters) == SIGNATURES[owner, name]


OVERRIDES = ["_create_and_replace", "_check_new_adapter_config", "_remap_adapter_state_dict_for_load"]


@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides_have_the_parameters_of_what_they_override(name):
    ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (FuraModel, tuners_utils.BaseTuner))
    assert list(ours) == list(theirs)
