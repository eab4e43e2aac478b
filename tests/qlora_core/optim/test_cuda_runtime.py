"""Calls of CUDA's runtime: what arrives there in both forms, how failures are told, and which library is found."""

import sys
from pathlib import Path

import pytest

from qlora_core.errors import DeviceError
from qlora_core.optim.cuda_runtime import CudaRuntime, loaded_runtime
from tests.qlora_core.optim.runtime_stand_in import RuntimeStandIn

# Beyond 32 bits each, so that a halved argument is seen.
POINTER, N_BYTES, STREAM = 0x7F12_3456_7000, 5 * 2**30 + 4096, 0x5612_9ABC_DEF0


@pytest.mark.parametrize(
    ("version", "to_device", "to_host"),
    [
        (12090, (3, STREAM), (-1, STREAM)),
        (13000, ((1, 3), 0, STREAM), ((2, 0), 0, STREAM)),
        (13050, ((1, 3), 0, STREAM), ((2, 0), 0, STREAM)),
    ],
)
def test_a_prefetch_arrives_in_the_form_of_its_version(
    version: int, to_device: tuple[object, ...], to_host: tuple[object, ...]
) -> None:
    library = RuntimeStandIn(version)
    runtime = CudaRuntime(library)

    runtime.prefetch(POINTER, N_BYTES, to=3, stream=STREAM)
    runtime.prefetch(POINTER, N_BYTES, to=None, stream=STREAM)
    runtime.prefetch(POINTER, N_BYTES, to=0, stream=0)

    assert library.calls[0] == ("prefetch", POINTER, N_BYTES, *to_device)
    assert library.calls[1] == ("prefetch", POINTER, N_BYTES, *to_host)
    assert library.calls[2][-1] == 0


@pytest.mark.parametrize(("version", "host"), [(12000, -1), (13000, (2, 0))])
def test_the_advice_arrives_in_the_form_of_its_version(version: int, host: object) -> None:
    library = RuntimeStandIn(version)

    CudaRuntime(library).prefer_host(POINTER, N_BYTES)

    assert library.calls == [("advise", POINTER, N_BYTES, 3, host)]


@pytest.mark.parametrize("concurrent", [0, 1])
def test_it_tells_whether_both_sides_may_use_managed_memory_at_once(concurrent: int) -> None:
    library = RuntimeStandIn(13000)
    library.concurrent = concurrent

    assert CudaRuntime(library).concurrent_managed_access(1) == bool(concurrent)


def test_memory_is_asked_for_with_every_stream_and_device_and_freed_by_its_address() -> None:
    library = RuntimeStandIn(13000)
    runtime = CudaRuntime(library)

    pointer = runtime.allocate(12345)

    assert list(library.live) == [pointer]
    runtime.free(pointer)
    assert library.calls == [("malloc", 12345, 1), ("free", pointer)]


def test_a_failure_is_one_sentence_and_leaves_no_error_to_torchs_next_call() -> None:
    library = RuntimeStandIn(13000)
    library.failing = {"malloc": 2, "prefetch": 1}
    runtime = CudaRuntime(library)

    with pytest.raises(
        DeviceError, match=r"^cudaMallocManaged failed: out of memory \(CUDA error 2\)\.$"
    ):
        runtime.allocate(1)
    assert library.last_error == 0
    with pytest.raises(DeviceError, match=r"^cudaMemPrefetchAsync failed: .* \(CUDA error 1\)\.$"):
        runtime.prefetch(POINTER, 1, to=None, stream=0)


def test_a_library_without_the_functions_is_refused() -> None:
    class Other:
        """A library without any."""

    with pytest.raises(DeviceError, match="no function cudaRuntimeGetVersion"):
        CudaRuntime(Other())


def test_only_the_library_of_torchs_own_version_is_taken(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    line = "7f2b4c000000-7f2b4c200000 r-xp 00000000 08:01 42                 "
    maps.write_text(
        f"{line}/lib/libcudart.so.11.0\n{line}/a b/libcudart.so.130\n{line}/lib/libc.so.6\n"
        "7f2b4c000000-7f2b4c200000 rw-p 00000000 00:00 0\n"
    )

    for cuda in ("13.0", None):
        with pytest.raises(DeviceError, match="torch has loaded no libcudart of its own"):
            loaded_runtime(maps, cuda)
    # Of the right name, but not there to be opened.
    maps.write_text(f"{line}/a b/libcudart.so.13\n")
    with pytest.raises(DeviceError, match=r"cannot be found: /a b/libcudart\.so\.13"):
        loaded_runtime(maps, "13.0")


@pytest.mark.skipif(sys.platform != "linux", reason="the C library has another name elsewhere")
def test_a_library_that_is_no_runtime_is_refused_by_the_function_it_lacks(tmp_path: Path) -> None:
    found = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libc.so" in line or "/libc-" in line
    )
    library = tmp_path / "libcudart.so.13"
    library.symlink_to(found)
    maps = tmp_path / "maps"
    maps.write_text(f"0-1 r-xp 0 0:0 1 {library}\n")

    with pytest.raises(DeviceError, match="no function cudaRuntimeGetVersion"):
        loaded_runtime(maps, "13.0")


def test_where_there_is_no_memory_map_there_is_no_runtime(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be found"):
        loaded_runtime(tmp_path / "absent", "13.0")


@pytest.mark.gpu
def test_torchs_own_runtime_is_found_and_is_of_its_version() -> None:
    import torch

    torch.cuda.init()

    runtime = loaded_runtime()

    assert torch.version.cuda is not None
    major, minor = (int(part) for part in torch.version.cuda.split(".")[:2])
    assert runtime.version == 1000 * major + 10 * minor
