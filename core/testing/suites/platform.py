"""What every platform has to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, cast

import pytest
import torch

from drivetrain.contracts.kinds import KINDS
from drivetrain.contracts.platform import (
    CapturesPieces,
    MeasuresPeaks,
    MemoryInfo,
    Platform,
    PlatformFacts,
    SharesMachine,
    SupportsGraphs,
    SupportsStreams,
)
from drivetrain.contracts.plugin import ProbeContext
from drivetrain.testing.suite import Suite, about

ABILITIES = {
    "streams": SupportsStreams,
    "graphs": SupportsGraphs,
    "graph_pieces": CapturesPieces,
    "peaks": MeasuresPeaks,
    "shares": SharesMachine,
}
"""Every ability that a platform can claim, and the methods it then has."""

_MIB = 2**20
_COUNTING_SLACK_BYTES = 4 * _MIB
"""Operating systems count pages in batches, and each reading may be off by some of them."""


class PlatformSuite(Suite):
    """Facts without a device; then, where the device is there, work on it.

    allocation_bytes: what is allocated to see whether memory is counted; less than the device has free.
    """

    kind = "platform"
    allocation_bytes: ClassVar[int] = 96 * _MIB

    @classmethod
    def here(cls) -> Platform:
        """An instance that is not activated; ends the test as NOT RUN where there is no such device."""
        cls.require_probe(ProbeContext())
        return cast(Platform, cls.make())

    @pytest.fixture
    def platform(self) -> Any:
        """An activated instance."""
        threads = torch.get_num_threads()
        platform = self.here()
        platform.activate()
        yield platform
        torch.set_num_threads(threads)

    # --- what is said of it without opening it -----------------------------------------------------------------------

    def test_facts_open_no_device(self) -> None:
        """The facts are told without a device context, a thread or a process."""
        self.here()
        breaches = self.manners().breaches
        seen = [text for topic in ("device", "threads", "processes") for text in breaches.get(topic, ())]
        assert not seen, "; ".join(seen)

    def test_facts_are_whole(self) -> None:
        """Name, device type, product, number of devices, architecture and collective library are all told."""
        facts = self.here().facts()
        assert isinstance(facts, PlatformFacts)
        if isinstance(self.plugin, str) and ":" not in self.plugin:
            assert facts.name == self.ref().name, "the facts carry another name than the entry point"
        torch.device(facts.device_type)
        assert facts.device_count >= 1, "a platform without a device must refuse in its probe"
        for field in ("name", "device_name", "architecture", "collective"):
            assert getattr(facts, field).strip(), f"{field} is empty"

    def test_facts_are_repeatable(self) -> None:
        """Asked twice, the facts are the same but for the details, which may hold what changes."""
        platform = self.here()
        first, second = (dataclasses.replace(platform.facts(), details={}) for _ in range(2))
        assert first == second

    def test_dtypes_exist(self) -> None:
        """The listed dtypes are torch's floating-point types, float32 among them."""
        dtypes = self.here().facts().dtypes
        for name in sorted(dtypes):
            dtype = getattr(torch, name, None)
            assert isinstance(dtype, torch.dtype), f"torch has no dtype {name!r}"
            assert dtype.is_floating_point, f"{name} is not a floating-point type"
        assert "float32" in dtypes, "float32 is what every comparison is made in"

    def test_preferences_name_kinds(self) -> None:
        """Preferences are ordered plugin names for kinds that exist, none of them named twice."""
        for kind, names in cast(type[Platform], self.plugin_class()).preferences.items():
            assert kind in KINDS, f"preferences name {kind!r}, which is no kind"
            assert not isinstance(names, str), f"preferences[{kind!r}] is one text instead of a tuple of names"
            assert all(isinstance(name, str) and name for name in names)
            assert len(set(names)) == len(names), f"preferences[{kind!r}] names a plugin twice"

    def test_pci_vendors_are_vendor_ids(self) -> None:
        """PCI vendor ids are 16-bit numbers."""
        for vendor in cast(type[Platform], self.plugin_class()).pci_vendors:
            assert isinstance(vendor, int)
            assert 0 < vendor < 2**16, f"{vendor:#x} is no PCI vendor id"

    def test_claims_match_methods(self) -> None:
        """An ability is claimed if and only if its methods are there."""
        plugin = self.plugin_class()
        unknown = plugin.abilities() - ABILITIES.keys()
        assert not unknown, f"claims {', '.join(sorted(unknown))}, which no platform can claim"
        for ability, protocol in ABILITIES.items():
            has_methods = issubclass(plugin, protocol)
            if self.claims(ability):
                assert has_methods, f"claims {ability!r} without the methods of {protocol.__name__}"
            else:
                assert not has_methods, f"has the methods of {protocol.__name__} and does not claim {ability!r}"

    # --- on the device -----------------------------------------------------------------------------------------------

    def test_device_is_of_the_type_that_the_facts_tell(self, platform: Platform) -> None:
        """Parameters are placed on the device that was chosen, not silently on another."""
        wanted = platform.facts().device_type
        assert platform.device().type == wanted
        assert torch.zeros(1, device=platform.device()).device.type == wanted

    def test_products_are_right_in_every_listed_dtype(self, platform: Platform) -> None:
        """A matrix product on the device equals the one in float64, in each dtype that the facts list."""
        left, right = torch.randn(33, 65, dtype=torch.float64), torch.randn(65, 17, dtype=torch.float64)
        for name in sorted(platform.facts().dtypes):
            dtype = getattr(torch, name)
            if dtype.itemsize < 2:  # torch multiplies 8-bit floats through scaled products only
                continue
            found = (left.to(platform.device(), dtype) @ right.to(platform.device(), dtype)).double().cpu()
            wanted = left.to(dtype).double() @ right.to(dtype).double()
            # 65 products, each rounded once: the square root of 65 roundings of numbers of that size.
            error = 8 * max(torch.finfo(dtype).eps, 1e-6) * float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=0.0, atol=error, msg=about(f"in {name}"))

    def test_memory_makes_sense(self, platform: Platform) -> None:
        """Free memory lies between nothing and the total, and the total is the one that the facts tell."""
        memory = platform.memory()
        assert isinstance(memory, MemoryInfo)
        assert memory.total_bytes > 0
        assert 0 <= memory.free_bytes <= memory.total_bytes
        told = platform.facts().total_memory_bytes
        if told is not None:
            assert abs(told - memory.total_bytes) <= 0.1 * told, "facts and memory() tell of different totals"

    def test_peak_sees_an_allocation(self, platform: Platform) -> None:
        """The peak covers what was held, and does not go down when it is freed."""
        before = platform.peak_memory_bytes()
        held = torch.ones(self.allocation_bytes // 4, dtype=torch.float32, device=platform.device())
        platform.synchronize()
        with_it = platform.peak_memory_bytes()
        del held
        slack = _COUNTING_SLACK_BYTES
        assert with_it >= max(before, self.allocation_bytes) - slack, "the allocation is not in the peak"
        assert platform.peak_memory_bytes() >= with_it - slack, "the peak went down"

    def test_the_peak_of_work_is_what_it_takes_at_once(self, platform: Platform) -> None:
        """What was held before is not in it, nor is what was freed before the next was made; a failure comes out."""
        self.require_claim("peaks")
        measures = cast(MeasuresPeaks, platform)
        num_floats, size = self.allocation_bytes // 4, self.allocation_bytes

        def make(count: int) -> list[torch.Tensor]:
            return [torch.ones(num_floats, dtype=torch.float32, device=platform.device()) for _ in range(count)]

        def work() -> None:
            make(2)
            make(1)

        def fail() -> None:
            make(1)
            raise KeyError("of the work")

        held = make(3)
        highest = platform.peak_memory_bytes()
        found = [measures.peak_of(lambda: None), measures.peak_of(work), measures.peak_of(work)]
        with pytest.raises(KeyError, match="of the work"):
            measures.peak_of(fail)
        # What lies idle between an allocator's tensors may be counted.
        assert found[0] < 2 * size, "the peak counts what was held before"
        assert 2 * size - _COUNTING_SLACK_BYTES <= found[1] < found[0] + 2.5 * size, "two tensors at once are the peak"
        assert abs(found[2] - found[1]) < size / 2, "the same work has another peak"
        assert platform.peak_memory_bytes() >= highest - _COUNTING_SLACK_BYTES, "the peak since the start was forgotten"
        del held
        free = platform.memory().free_bytes
        made = make(1)
        platform.synchronize()
        assert free - platform.memory().free_bytes > size / 2, "what is made after a measurement is not counted"
        del made

    def test_synchronize_waits_for_queued_work(self, platform: Platform) -> None:
        """After synchronize the results of queued work are there."""
        value = torch.full((256, 256), 2.0, device=platform.device())
        for _ in range(8):
            value = value @ torch.eye(256, device=platform.device())
        platform.synchronize()
        assert float(value.sum()) == 2.0 * 256 * 256

    def test_a_stream_runs_work(self, platform: Platform) -> None:
        """Work in a stream's context sees what was queued before, and is done after synchronize."""
        self.require_claim("streams")
        before = torch.arange(1000, dtype=torch.float32, device=platform.device())
        with cast(SupportsStreams, platform).stream():
            after = before * 2
        platform.synchronize()
        assert float(after.sum()) == 999 * 1000

    def test_a_captured_graph_reads_its_buffers_anew(self, platform: Platform) -> None:
        """A replay works on what the buffers hold now, and changes nothing else."""
        self.require_claim("graphs")
        given = torch.zeros(64, device=platform.device())
        result = torch.zeros(64, device=platform.device())

        def work() -> None:
            result.copy_(given * 3)

        replay = cast(SupportsGraphs, platform).capture(work)
        for value in (1.0, 5.0):
            given.fill_(value)
            replay()
            platform.synchronize()
            assert float(result.sum()) == 3 * value * 64

    def test_work_between_captured_pieces_is_done_anew(self, platform: Platform) -> None:
        """In its place, and not while the pieces are captured; memory of a piece lasts into those behind it."""
        self.require_claim("graph_pieces")
        given = torch.zeros(64, device=platform.device())
        handed = torch.zeros(64, device=platform.device())
        result = torch.zeros(64, device=platform.device())
        factor = 2.0
        done: list[float] = []

        def work() -> None:
            done.append(factor)
            handed.mul_(factor)

        def function(between: Callable[[Callable[[], None]], None]) -> None:
            kept = given + 1
            handed.copy_(given * 3)
            between(work)
            handed.add_(kept)
            between(work)
            result.copy_(handed + kept)

        replay = cast(CapturesPieces, platform).capture_pieces(function)
        assert not done
        for value in (1.0, 5.0):
            factor = value + 2
            given.fill_(value)
            replay()
            platform.synchronize()
            wanted = (3 * value * factor + value + 1) * factor + value + 1
            assert float(result.sum()) == wanted * 64
        assert done == [3.0, 3.0, 7.0, 7.0]
