"""A library is compiled once, kept under everything that its bytes depend on, and never taken for whole when it isn't.

The compilers, files, locks and processes are real.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import ConfigError, KernelBuildError
from drivetrain.native import SourceBuild, Unit, build_all, find_compiler, probe_compiler
from drivetrain.native.recipe import machine_identity

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "twice.cpp"
    path.write_text('#include "factor.h"\nextern "C" int times(int x) { return FACTOR * x; }\n')
    (tmp_path / "factor.h").write_text("#define FACTOR 2\n")
    return path


class Heard:
    """A progress receiver that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int | None, str]] = []

    def __call__(self, what: str, done: int, total: int | None, unit: str = "bytes") -> None:
        self.told.append((what, done, total, unit))


def files(cache: Path, suffix: str) -> list[Path]:
    return sorted(path for path in cache.glob(f"*{suffix}") if not path.name.startswith("compiler-"))


# --- building and keeping ------------------------------------------------------------------------------------------


def test_a_library_is_compiled_once_and_then_opened_from_the_cache(source: Path, cache: Path) -> None:
    first, second = Heard(), Heard()
    build = SourceBuild("twice", (source,))
    library = build.library(cache=cache, progress=first)
    assert library.times(21) == 42
    assert [done for _, done, _, _ in first.told] == [0, 1, 2]
    assert first.told[0][0].startswith("compiling twice with ")
    assert {(total, unit) for _, _, total, unit in first.told} == {(2, "files")}
    assert build.library(cache=cache, progress=second) is library
    assert second.told == []


def test_opening_a_cached_library_takes_less_than_five_milliseconds(source: Path, cache: Path) -> None:
    SourceBuild("twice", (source,)).build(cache=cache)
    code = f"""
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from drivetrain.native import SourceBuild
started = time.perf_counter()
library = SourceBuild("twice", (Path({str(source)!r}),)).library(cache=Path({str(cache)!r}))
print(time.perf_counter() - started, library.times(2))
"""
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        taken, result = done.stdout.split()
        assert result == "4"
        seconds.append(float(taken))
    assert min(seconds) < 0.005


def test_neither_building_nor_opening_imports_torch(source: Path, cache: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from drivetrain.native import SourceBuild
SourceBuild("twice", (Path({str(source)!r}),)).library(cache=Path({str(cache)!r}))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_units_are_compiled_apart_and_linked_into_one_library(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "part.cpp").write_text('extern "C" int NAME() { return VALUE; }\n')
    (tmp_path / "sum.cpp").write_text('extern "C" { int one(); int two(); int sum() { return one() + two(); } }\n')
    part = tmp_path / "part.cpp"
    units = (Unit(part, defines={"NAME": "one", "VALUE": 1}), Unit(part, ("-DNAME=two",), {"VALUE": 2}))
    heard = Heard()
    library = SourceBuild("sum", (*units, tmp_path / "sum.cpp")).library(cache=cache, progress=heard)
    assert (library.one(), library.two(), library.sum()) == (1, 2, 3)
    assert heard.told[-1][1:] == (4, 4, "files")


def test_several_libraries_are_built_at_once_and_the_good_ones_kept(tmp_path: Path, cache: Path) -> None:
    for name, text in (("a", "{ return 1; }"), ("b", "{ return oops; }"), ("c", "{ return 3; }")):
        (tmp_path / f"{name}.cpp").write_text(f'extern "C" int value() {text}\n')
    builds = [SourceBuild(name, (tmp_path / f"{name}.cpp",)) for name in "cab"]
    with pytest.raises(KernelBuildError, match="oops"):
        build_all(builds, cache=cache)
    heard = Heard()
    paths = build_all([builds[0], builds[1], builds[0]], cache=cache, progress=heard)
    assert [ctypes.CDLL(str(path)).value() for path in paths] == [3, 1, 3]
    assert heard.told == []


def test_what_a_build_leaves_is_its_library_note_and_lock(source: Path, cache: Path) -> None:
    path = SourceBuild("twice", (source,)).build(cache=cache)
    assert {p.name for p in cache.iterdir() if not p.name.startswith("compiler-")} == {
        path.name,
        f"{path.stem}.json",
        f"{path.stem}.lock",
    }
    assert json.loads(path.with_suffix(".json").read_text())["commands"][0][-1] == "0-twice.o"
    assert cache.stat().st_mode & 0o077 == 0


# --- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"flags": ("-DX",)},
        {"defines": {"X": 1}},
        {"standard": "c++20"},
        {"libraries": ("-lm",)},
        {"name": "thrice"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_library_changes_its_key(source: Path, cache: Path, change: dict[str, Any]) -> None:
    cache.mkdir()
    build = SourceBuild("twice", (source,))
    assert dataclasses.replace(build, **change).recipe(None, cache).key != build.recipe(None, cache).key


def test_an_edited_header_is_compiled_anew(source: Path, cache: Path) -> None:
    build = SourceBuild("twice", (source,))
    before = build.library(cache=cache)
    source.with_name("factor.h").write_text("#define FACTOR 3\n")
    assert (before.times(2), build.library(cache=cache).times(2)) == (4, 6)


def test_headers_are_followed_through_folders_and_through_other_headers(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "inc").mkdir()
    cache.mkdir()
    (tmp_path / "a.cpp").write_text("#include <deep.h>\n#include <vector>\n")
    (tmp_path / "inc/deep.h").write_text('#  include "deeper.h"\n#include "deep.h"\n')
    (tmp_path / "inc/deeper.h").write_text("")
    build = SourceBuild("a", (tmp_path / "a.cpp",), include_folders=(tmp_path / "inc",))
    before = build.recipe(None, cache).key
    (tmp_path / "inc/deeper.h").write_text("// another\n")
    assert build.recipe(None, cache).key != before


def test_a_listed_header_counts_though_no_include_names_it(source: Path, cache: Path) -> None:
    cache.mkdir()
    extra = source.with_name("table.inc")
    extra.write_text("1")
    build = SourceBuild("twice", (source,), headers=(extra,))
    before = build.recipe(None, cache).key
    extra.write_text("2")
    assert build.recipe(None, cache).key != before


def test_the_same_package_in_another_folder_has_the_same_key(source: Path, tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    shutil.copytree(source.parent, tmp_path / "other", ignore=shutil.ignore_patterns("cache", "other"))
    keys = {SourceBuild("twice", (f,)).recipe(None, cache).key for f in (source, tmp_path / "other" / source.name)}
    assert len(keys) == 1


def test_the_processor_counts_where_the_compiler_is_asked_to_look_at_it() -> None:
    assert "processor" not in machine_identity(["-mavx2"])
    assert machine_identity(["-march=native"])["processor"]


def test_a_variable_that_compilers_listen_to_is_part_of_the_key(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    monkeypatch.delenv("CPATH", raising=False)
    build = SourceBuild("twice", (source,))
    before = build.recipe(None, cache).key
    monkeypatch.setenv("CPATH", "/somewhere")
    assert build.recipe(None, cache).key != before


def test_another_version_of_the_compiler_is_another_key(source: Path, tmp_path: Path, cache: Path) -> None:
    """A script is asked for its version each time, since what it starts may change under it."""
    real = find_compiler()
    assert real is not None
    script, keys = tmp_path / "my-g++", set()
    cache.mkdir()
    for version in ("1.0", "1.1"):
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo my-g++ {version}; else exec {real.path} "$@"; fi\n'
        )
        script.chmod(0o755)
        build = SourceBuild("twice", (source,))
        keys.add(build.recipe(script, cache).key)
        assert build.library(compiler=script, cache=cache).times(1) == 2
    assert len(keys) == 2


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_source_that_does_not_compile_says_which_line_and_how_to_see_more(tmp_path: Path, cache: Path) -> None:
    bad = tmp_path / "bad.cpp"
    bad.write_text('extern "C" int f() {\n  return undeclared_name;\n}\n')
    with pytest.raises(
        KernelBuildError, match=r"does not compile \(exit status 1\): .*bad\.cpp:2:.*undeclared_name"
    ) as e:
        SourceBuild("bad", (bad,)).build(cache=cache)
    assert e.value.where == str(bad)
    assert e.value.command[0].startswith("/")
    assert "The command was: " in str(e.value)
    assert "undeclared_name" in e.value.output
    assert files(cache, ".so") == files(cache, ".json") == []
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_source_that_does_not_compile_is_not_compiled_again_in_this_process(tmp_path: Path, cache: Path) -> None:
    bad = tmp_path / "bad.cpp"
    bad.write_text("not c++ at all, and never tried twice\n")
    first, second = Heard(), Heard()
    for heard in (first, second):
        with pytest.raises(KernelBuildError, match="does not compile"):
            SourceBuild("bad", (bad,)).build(cache=cache, progress=heard)
    assert first.told
    assert second.told == []
    bad.write_text('extern "C" int f() { return 7; }\n')
    assert SourceBuild("bad", (bad,)).library(cache=cache).f() == 7


def test_a_symbol_that_nothing_defines_is_an_error_of_the_build(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "open.cpp"
    path.write_text('extern "C" { int missing_function(); int f() { return missing_function(); } }\n')
    with pytest.raises(KernelBuildError, match=r"native library open: the library does not link.*missing_function"):
        SourceBuild("open", (path,)).build(cache=cache)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: os.truncate(path, path.stat().st_size // 2), "its bytes are not those"),
        (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "its bytes are not those"),
        (lambda path: path.unlink(), "FileNotFoundError"),
        (lambda path: path.with_suffix(".json").write_text("{"), "JSONDecodeError"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "TypeError"),
        (lambda path: path.with_suffix(".json").unlink(), "FileNotFoundError"),
    ],
    ids=["truncated", "zeros", "library gone", "note cut short", "note of another form", "note gone"],
)
def test_a_damaged_entry_is_said_and_built_again(
    source: Path, cache: Path, caplog: pytest.LogCaptureFixture, harm: Any, reason: str
) -> None:
    build = SourceBuild("twice", (source,))
    harm(build.build(cache=cache))
    heard = Heard()
    with caplog.at_level(logging.WARNING):
        assert build.library(cache=cache, progress=heard).times(4) == 8
    assert [("is damaged and is built again" in r.message, reason in r.message) for r in caplog.records] == [
        (True, True)
    ]
    assert heard.told[-1][1:] == (2, 2, "files")
    caplog.clear()
    build.build(cache=cache)
    assert caplog.records == []


def test_no_compiler_on_the_path_is_a_reason_and_an_error_with_the_next_move(source: Path, cache: Path) -> None:
    code = f"""
from pathlib import Path
from drivetrain.errors import KernelBuildError
from drivetrain.native import SourceBuild, find_compiler, probe_compiler
print(find_compiler(), probe_compiler().reason, probe_compiler().wanted, sep="|")
try:
    SourceBuild("twice", (Path({str(source)!r}),)).library(cache=Path({str(cache)!r}))
except KernelBuildError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": ""}, capture_output=True, text=True, check=True, timeout=60
    )
    found, error = done.stdout.splitlines()
    assert found == "None|no c++ compiler is here|g++, c++, clang++"
    assert error == (
        "native library twice: no c++ compiler is here; found 'none of them on PATH'; allowed: g++, c++, clang++. "
        "Install g++ or clang, or name the compiler by its path."
    )


def test_a_compiler_is_named_by_path_and_a_wrong_one_is_an_error(source: Path, cache: Path, tmp_path: Path) -> None:
    real = find_compiler()
    assert real is not None
    assert SourceBuild("twice", (source,)).library(compiler=real.path, cache=cache).times(2) == 4
    assert find_compiler("c++", "no-such-compiler") is None
    assert probe_compiler("c++", "no-such-compiler").wanted == "no-such-compiler"
    with pytest.raises(KernelBuildError, match="allowed: no-such-compiler"):
        SourceBuild("twice", (source,)).build(compiler="no-such-compiler", cache=cache)
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(KernelBuildError, match="does not tell its version"):
        SourceBuild("twice", (source,)).build(compiler=broken, cache=cache)


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(source: Path, cache: Path, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging-g++"
    hanging.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; else sleep 300 & echo $! > {tmp_path}/child; wait; fi\n'
    )
    hanging.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(KernelBuildError, match=r"took longer than 0\.5 s"):
        SourceBuild("twice", (source,), limit_seconds=0.5).build(compiler=hanging, cache=cache)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def is_gone(process: int) -> bool:
    """Whether a killed process is gone, or a zombie that only waits for whoever adopted it, within ten seconds."""
    for _ in range(200):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_folder_that_can_not_be_written_is_an_error_with_the_next_move(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelBuildError, match=r"cache of native libraries can't be written.*XDG_CACHE_HOME"):
        SourceBuild("twice", (source,)).build(cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"name": "../evil"}, "not a name for a library"),
        ({"sources": ()}, "needs sources"),
        ({"language": "cuda", "architectures": ("sm_90", "gfx942")}, "one maker"),
        ({"language": "cuda", "architectures": ("native",)}, "one maker"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(source: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SourceBuild(**{"name": "twice", "sources": (source,), **parts})


def test_an_unknown_language_and_a_missing_source_are_named(source: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 'cude'; allowed: c\+\+, cuda. Did you mean 'cuda'\?"):
        SourceBuild("twice", (source,), language="cude").build(cache=cache)
    with pytest.raises(KernelBuildError, match="a source file is missing"):
        SourceBuild("twice", (source.with_name("gone.cpp"),)).build(cache=cache)
    with pytest.raises(
        KernelBuildError, match="a source file can't be read: Input/output error; found '/proc/self/mem'"
    ):
        SourceBuild("twice", (source,), headers=(Path("/proc/self/mem"),)).build(cache=cache)


# --- several processes ---------------------------------------------------------------------------------------------


def start_builder(source: Path, cache: Path, compiler: Path) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from drivetrain.native import SourceBuild
def progress(what, done, total, unit="bytes"):
    print(what, done, flush=True)
build = SourceBuild("twice", (Path({str(source)!r}),))
library = build.library(compiler={str(compiler)!r}, cache=Path({str(cache)!r}), progress=progress)
print("result", library.times(5), flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def slow_compiler(tmp_path: Path) -> Path:
    """A real compiler that takes a second more, and notes each time that it compiles a source."""
    real = find_compiler()
    assert real is not None
    script = tmp_path / "slow-g++"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" != --version ]; then echo "$$ $*" >> {tmp_path}/runs; sleep 1; fi\n'
        f'exec {real.path} "$@"\n'
    )
    script.chmod(0o755)
    return script


def test_two_processes_that_build_at_once_compile_once(source: Path, cache: Path, slow_compiler: Path) -> None:
    builders = [start_builder(source, cache, slow_compiler) for _ in range(2)]
    told = [builder.communicate(timeout=60)[0].splitlines() for builder in builders]
    assert [lines[-1] for lines in told] == ["result 10", "result 10"]
    runs = (slow_compiler.parent / "runs").read_text().splitlines()
    assert sum(" -c " in run for run in runs) == 1
    assert sum("waiting for another process that builds twice 0" in lines for lines in told) == 1


def test_builders_of_several_libraries_in_any_order_do_not_wait_for_each_other_for_ever(
    tmp_path: Path, cache: Path, slow_compiler: Path
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.cpp").write_text(f'extern "C" int value() {{ return {ord(name)}; }}\n')
    code = """
import sys
from pathlib import Path
from drivetrain.native import SourceBuild, build_all
folder, compiler, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
builds = [SourceBuild(name, (folder / f"{name}.cpp",)) for name in names]
print(len(build_all(builds, compiler=compiler, cache=folder / "cache")))
"""
    commands = [
        [sys.executable, "-c", code, str(tmp_path), str(slow_compiler), names] for names in ("abc", "cba", "bca")
    ]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [builder.communicate(timeout=60)[0].strip() for builder in builders] == ["3", "3", "3"]
    runs = (slow_compiler.parent / "runs").read_text().splitlines()
    assert sum(" -c " in run for run in runs) == 3


def test_threads_that_build_at_once_compile_once(source: Path, cache: Path, slow_compiler: Path) -> None:
    build = SourceBuild("twice", (source,))
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: build.library(compiler=slow_compiler, cache=cache), range(4)))
    assert len({id(library) for library in libraries}) == 1
    assert libraries[0].times(5) == 10
    runs = (slow_compiler.parent / "runs").read_text().splitlines()
    assert sum(" -c " in run for run in runs) == 1


def test_a_killed_build_holds_nobody_up_and_leaves_nothing(source: Path, cache: Path, slow_compiler: Path) -> None:
    builder = start_builder(source, cache, slow_compiler)
    runs = slow_compiler.parent / "runs"
    while not runs.exists():
        time.sleep(0.02)
    builder.kill()
    builder.communicate(timeout=20)
    assert [path.name for path in cache.iterdir() if path.is_dir()]
    assert SourceBuild("twice", (source,)).library(compiler=slow_compiler, cache=cache).times(5) == 10
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_an_interrupted_build_ends_its_compilers(source: Path, cache: Path, slow_compiler: Path) -> None:
    slow_compiler.write_text(slow_compiler.read_text().replace("sleep 1", "sleep 300"))
    builder = start_builder(source, cache, slow_compiler)
    runs = slow_compiler.parent / "runs"
    while not runs.exists() or not runs.read_text().endswith("\n"):
        time.sleep(0.02)
    builder.send_signal(signal.SIGINT)
    builder.communicate(timeout=20)
    assert builder.returncode != 0
    assert is_gone(int(runs.read_text().split()[0]))
    assert files(cache, ".so") == []


# --- CUDA ----------------------------------------------------------------------------------------------------------

KERNEL = """
__global__ void add(float* x, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] += 1; }
extern "C" int add_one(float* x, int n, void* stream) {
    add<<<(n + 255) / 256, 256, 0, (cudaStream_t)stream>>>(x, n);
    return (int)cudaGetLastError();
}
"""


@pytest.mark.skipif(find_compiler("cuda", names=("nvcc",)) is None, reason="no nvcc")
def test_a_cuda_source_is_built_by_nvcc_for_the_named_architectures(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "add.cu").write_text(KERNEL)
    build = SourceBuild("add", (tmp_path / "add.cu",), language="cuda", architectures=("sm_80", "sm_90"))
    path = build.build(cache=cache)
    content = path.read_bytes()
    assert b"sm_80" in content
    assert b"sm_90" in content
    assert ctypes.CDLL(str(path)).add_one is not None


@pytest.mark.skipif(find_compiler("cuda", names=("nvcc",)) is None, reason="no nvcc")
def test_the_compiler_of_the_host_s_half_is_part_of_the_key_of_a_cuda_source(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    (tmp_path / "add.cu").write_text(KERNEL)
    build = SourceBuild("add", (tmp_path / "add.cu",), language="cuda", architectures=("sm_90",))
    before = build.recipe(None, cache).key
    other = tmp_path / "bin" / "g++"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho g++ 99.1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")
    assert build.recipe(None, cache).key != before


@pytest.mark.skipif(find_compiler("cuda", names=("nvcc",)) is None, reason="no nvcc")
def test_a_cuda_source_that_does_not_compile_says_which_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.cu").write_text("__global__ void f() {\n  undeclared_name = 1;\n}\n")
    with pytest.raises(KernelBuildError, match=r"bad\.cu\(2\): error: .*undeclared_name"):
        SourceBuild("bad", (tmp_path / "bad.cu",), language="cuda", architectures=("sm_90",)).build(cache=cache)


def test_gpus_of_amd_are_never_built_for_by_nvcc(tmp_path: Path, cache: Path) -> None:
    if find_compiler("cuda", names=("hipcc",)) is not None:
        pytest.skip("hipcc is here")
    (tmp_path / "add.cu").write_text(KERNEL)
    with pytest.raises(KernelBuildError, match=r"no cuda compiler is here.*allowed: hipcc"):
        SourceBuild("add", (tmp_path / "add.cu",), language="cuda", architectures=("gfx942",)).build(cache=cache)


def test_a_library_leaves_the_numbers_of_the_process_alone(tmp_path: Path) -> None:
    """Opened with -ffast-math at its link, it would flush subnormal numbers to zero, Python's own too."""
    source = tmp_path / "fast.cpp"
    source.write_text('extern "C" float twice(float x) { return x + x; }')
    library = SourceBuild("fast", (source,), flags=("-ffast-math",)).library(cache=tmp_path / "cache")
    library.twice.restype, library.twice.argtypes = ctypes.c_float, [ctypes.c_float]
    assert library.twice(1.5) == 3.0
    assert 5e-324 / 1.0 > 0.0
    assert sys.float_info.min / 2 > 0.0
