"""The Triton provider says no where it can't run, without importing Triton."""

from __future__ import annotations

import importlib.util
import json

import pytest

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.contracts.platform import PlatformFacts
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.errors import ConfigError
from drivetrain.kernels.triton import TritonKernels
from support.distributions import run_python
from support.interpreted import has_triton


def on(device_type: str, dtype: str | None = None) -> ProbeContext:
    facts = PlatformFacts("p", device_type, "device", 1, frozenset({"float32"}), "arch", "gloo")
    return ProbeContext(platform=facts, dtype=dtype)


@has_triton
def test_it_wants_a_gpu() -> None:
    assert TritonKernels.probe(on("cuda")).ok
    for device_type in ("cpu", "xpu"):
        refused = TritonKernels.probe(on(device_type))
        assert (refused.code, refused.wanted, refused.offered) == ("no_device", "cuda", device_type)


@has_triton
def test_it_refuses_dtypes_that_it_does_not_compute_in() -> None:
    assert TritonKernels.probe(on("cuda", "float64")).code == "unsupported_dtype"
    assert TritonKernels.probe(on("cuda", "bfloat16")).ok


def test_without_the_package_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = TritonKernels.probe(on("cuda"))
    assert refused.code == "missing_dependency"
    assert 'pip install "drivetrain[triton]"' in refused.reason


@has_triton
def test_the_interpreter_takes_the_cpu_and_nothing_else() -> None:
    code = """import json, os
os.environ["TRITON_INTERPRET"] = "1"
import sys
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.kernels.triton import TritonKernels
kernels = TritonKernels(TritonKernels.Config())
answers = [kernels.supports(KernelSpec("silu_mul", device, "float32")).ok for device in ("cpu", "cuda")]
print(json.dumps([answers, "triton" in sys.modules]))
"""
    assert json.loads(run_python(code)) == [[True, False], False]


@has_triton
def test_listing_probing_and_asking_import_no_triton() -> None:
    code = """import sys
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.registry import Registry, load
for kind, name in (("kernels", "triton"), ("attention", "paged-triton")):
    plugin = load(Registry().find(kind, name))
    plugin.probe(ProbeContext())
    plugin(plugin.Config())
plugin = load(Registry().find("kernels", "triton"))
plugin(plugin.Config()).supports(KernelSpec("rms_norm", "cuda", "bfloat16", {"E": 576}))
print("triton" in sys.modules)
"""
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (KernelSpec("decoder_layers", "cuda", "float32"), "unknown_operation"),
        (KernelSpec("linear_gguf", "cuda", "float32"), "unsupported_type"),
        (KernelSpec("linear_gguf", "cuda", "float32", params={"type": 20.0}), "unsupported_type"),
        (KernelSpec("linear_gguf_a8", "cuda", "float32", {"I": 96}, {"type": 12.0}), "unsupported_shape"),
        (KernelSpec("rms_norm", "cuda", "float64"), "unsupported_dtype"),
        (KernelSpec("rms_norm", "cpu", "float32"), "no_device"),
        (KernelSpec("rms_norm", "cuda", "float32", {"E": 100_000}), "unsupported_shape"),
        (KernelSpec("linear_int4", "cuda", "float32", params={"group": 16.0}), "unsupported_shape"),
        (KernelSpec("linear_int4", "cuda", "float32", params={"group": 48.0}), "unsupported_shape"),
        (KernelSpec("linear_int3", "cuda", "float32", params={"group": 16.0}), "unsupported_shape"),
        (KernelSpec("linear_int4_a8", "cuda", "float32", params={"group": 48.0}), "unsupported_shape"),
        (KernelSpec("linear_int4_a8", "cuda", "float32"), "unsupported_shape"),
        (KernelSpec("linear_w8a8", "cuda", "float32", {"I": 140_000}), "unsupported_shape"),
        (KernelSpec("gated_linear", "cuda", "float32", params={"activation": 2.0}), "unknown_activation"),
    ],
)
def test_what_it_does_not_cover_is_refused_with_a_code(spec: KernelSpec, code: str) -> None:
    probe = TritonKernels(TritonKernels.Config()).supports(spec)
    assert probe.code == code
    assert probe.wanted
    assert probe.offered


def test_all_operations_but_whole_layers_are_there_on_a_gpu() -> None:
    kernels = TritonKernels(TritonKernels.Config())
    params = {
        "linear_int4": {"group": 64.0},
        "linear_int3": {"group": 128.0},
        "linear_int4_a8": {"group": 192.0},
        "linear_gguf": {"type": 2.0},
        "linear_gguf_a8": {"type": 14.0},
    }
    for name, operation in OPERATIONS.items():
        spec = KernelSpec(name, "cuda", "bfloat16", {}, params.get(name, {}))
        assert kernels.supports(spec).ok != operation.takes_modules, name


def test_an_operation_it_has_not_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="'linear_int8'"):
        TritonKernels(TritonKernels.Config()).make(KernelSpec("linear_int9", "cuda", "float32"))
