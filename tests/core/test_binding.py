"""An operation is bound once, to the first provider that covers it; whoever was passed over is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from drivetrain.binding import Binding, KernelBinder
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.errors import NoCandidateError
from support.fake_plugins import FakeKernels


def provider(device_type: str = "cpu", *names: str) -> FakeKernels:
    return FakeKernels(FakeKernels.Config(names=names or ("silu_mul",), device_type=device_type))


SILU = KernelSpec("silu_mul", "cpu", "float32", {"E": 8})
ROPE = KernelSpec("rope", "cpu", "float32")


def test_the_first_provider_that_covers_the_use_serves_it() -> None:
    binder = KernelBinder([("one", provider()), ("two", provider())])
    assert binder.bind(SILU)(1, 2) == ("cpu", "silu_mul", (1, 2))
    assert binder.bindings == [Binding(SILU, "one")]


def test_whoever_lacks_or_refuses_the_use_is_passed_over_with_the_reason() -> None:
    binder = KernelBinder([("lacks", provider("cpu", "rope")), ("refuses", provider("cuda")), ("has", provider())])
    binder.bind(SILU)
    assert binder.bindings == [
        Binding(SILU, "has", ("lacks: has no silu_mul", "refuses: works on cuda only")),
    ]


def test_nobody_covers_the_use() -> None:
    binder = KernelBinder([("lacks", provider("cpu", "rope")), ("refuses", provider("cuda"))])
    with pytest.raises(NoCandidateError, match=r"\(lacks: has no silu_mul; refuses: works on cuda only\)"):
        binder.bind(SILU)
    assert binder.bindings == []


def test_an_unknown_operation_names_the_nearest() -> None:
    with pytest.raises(NoCandidateError, match=r"'rms_nrm'; allowed: add_rms_norm, .*Did you mean 'rms_norm'\?"):
        KernelBinder([("one", provider())]).bind(KernelSpec("rms_nrm", "cpu", "float32"))


def test_lookups_and_uses_are_counted() -> None:
    binder = KernelBinder([("one", provider("cpu", "rope")), ("two", provider())])
    for spec in (SILU, SILU, ROPE):
        binder.bind(spec)
    assert binder.num_lookups == 3
    assert binder.by_operation() == {"silu_mul": {"two": 2}, "rope": {"one": 1}}


class Failing(FakeKernels):
    def make(self, spec: KernelSpec) -> Callable[..., Any]:
        raise OSError("no compiler")


def test_an_implementation_that_could_not_be_made_is_not_called_bound() -> None:
    binder = KernelBinder([("failing", Failing(FakeKernels.Config()))])
    with pytest.raises(OSError, match="no compiler"):
        binder.bind(SILU)
    assert binder.bindings == []
