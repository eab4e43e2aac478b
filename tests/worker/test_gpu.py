import pytest

from worker.crew import train_places
from worker.gpu import Gpu, _allowed, discover

GPUS = [Gpu("GPU-aa11", "H200", 1), Gpu("GPU-bb22", "H200", 1), Gpu("GPU-bc33", "H200", 1)]


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-aa11", "GPU-bb22", "GPU-bc33"]),
        ("", []),
        ("1", ["GPU-bb22"]),
        ("2, 0", ["GPU-bc33", "GPU-aa11"]),
        ("GPU-aa11", ["GPU-aa11"]),
        ("GPU-a", ["GPU-aa11"]),
        ("GPU-b", []),  # could be two
        ("0,7,1", ["GPU-aa11"]),  # the first unknown one ends the list
        ("-1,0", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    visible: str | None, uuids: list[str]
) -> None:
    assert [gpu.uuid for gpu in _allowed(GPUS, visible)] == uuids


@pytest.mark.parametrize(
    ("gpus", "wanted", "devices"),
    [
        ([], None, ["cpu"]),
        ([], 2, ["cpu", "cpu"]),
        ([], 0, []),
        (GPUS, None, ["cuda", "cuda", "cuda"]),
        (GPUS, 1, ["cuda"]),
        (GPUS, 9, ["cuda", "cuda", "cuda"]),
        (GPUS, 0, []),
    ],
)
def test_there_is_a_training_slot_per_gpu_or_one_on_the_cpu(
    gpus: list[Gpu], wanted: int | None, devices: list[str]
) -> None:
    places = train_places(gpus, wanted)

    assert [place.device for place in places] == devices
    seen = [place.environment["CUDA_VISIBLE_DEVICES"] for place in places]
    assert seen == [gpu.uuid for gpu in gpus[: len(places)]] or set(seen) <= {""}


def test_a_machine_without_a_driver_has_no_gpus(device: str) -> None:
    assert bool(discover()) == (device == "cuda")
