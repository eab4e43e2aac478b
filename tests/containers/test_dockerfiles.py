"""The Dockerfiles, held to the tree: every copied path, package, variable and command exists."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest

from service.models.catalog import Catalog
from service.settings import Settings
from tests.containers.conftest import IMAGES, ROOT, Dockerfile, Instruction


def _words(image: list[Instruction], word: str) -> list[str]:
    return [instruction.rest for instruction in image if instruction.word == word]


def _copied(image: list[Instruction]) -> Iterator[tuple[Path, str]]:
    """Each copied path of the repository, and where it goes."""
    for rest in _words(image, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            yield ROOT / source, target if len(sources) == 1 else f"{target}{source}"


def _environment(image: list[Instruction]) -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in _words(image, "ENV") for pair in shlex.split(rest))


def _let_through(path: Path) -> bool:
    """Whether .dockerignore lets a path of the repository pass: the last pattern that matches decides."""
    name = str(path.relative_to(ROOT))
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        if fnmatch(name, pattern.removeprefix("**/")) or f"{name}/".startswith(f"{pattern}/"):
            ignored = not line.startswith("!")
    return not ignored


def test_everything_copied_is_there_and_reaches_the_builder(image: list[Instruction]) -> None:
    for source, _ in _copied(image):
        assert source.exists(), source
        assert _let_through(source), f"{source} is kept back by .dockerignore"


def test_secrets_and_data_never_reach_the_builder() -> None:
    for name in (".env", ".git", ".demo", ".venv", "tests"):
        assert not _let_through(ROOT / name), name


def test_every_package_of_the_project_is_copied(image: list[Instruction]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]

    copied = {source.name for source, _ in _copied(image)}

    assert {pattern.removesuffix("*") for pattern in included} <= copied
    assert project["project"]["readme"] in copied


def test_the_catalog_and_its_local_models_are_copied_where_the_settings_look(
    image: list[Instruction],
) -> None:
    targets = {
        str(Path("/app", target)): source.relative_to(ROOT) for source, target in _copied(image)
    }
    catalog = Catalog.load(ROOT / "models.toml")

    file = targets[_environment(image)["NIBBLE_MODELS_FILE"]]

    assert file == Path("models.toml")
    for model in catalog.all():
        if model.path is not None:
            assert model.path.relative_to(ROOT) in targets.values()


def test_what_is_installed_are_extras_that_exist(image: list[Instruction]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]

    (installed,) = [run for run in _words(image, "RUN") if "pip install" in run]

    match = re.search(r"-c constraints\.txt '\.\[([\w,]+)\]'", installed)
    assert match, installed
    assert set(match[1].split(",")) <= set(extras)


def test_the_api_image_has_no_engine_and_the_workers_have() -> None:
    installs = {
        image: " ".join(_words(Dockerfile(ROOT / image[0]).lineage(image[1]), "RUN"))
        for image in IMAGES
    }

    assert "'.[server]'" in installs["Dockerfile", "api"]
    assert "'.[server,engine]'" in installs["Dockerfile", "worker"]
    assert "'.[server,engine]'" in installs["Dockerfile.gpu", "image"]


def test_its_variables_are_settings(image: list[Instruction]) -> None:
    names = {name for name in _environment(image) if name.startswith("NIBBLE_")}

    assert names
    assert {name.removeprefix("NIBBLE_").lower() for name in names} <= set(Settings.model_fields)


def test_its_command_is_a_module_that_can_be_run(image: list[Instruction]) -> None:
    command = _words(image, "CMD")[-1]

    match = re.fullmatch(r'\["python", "-m", "(\w+)"\]', command)

    assert match, command
    assert find_spec(f"{match[1]}.__main__")


def test_it_does_not_run_as_root_and_owns_what_it_writes(image: list[Instruction]) -> None:
    words = [instruction.word for instruction in image]
    runs = " ".join(_words(image, "RUN"))
    environment = _environment(image)

    user = _words(image, "USER")[-1]

    assert user == "nibble"
    assert f"useradd --uid 10001 --create-home {user}" in runs
    assert "USER" not in words[: words.index("RUN")]
    chown = re.search(rf"chown (?:-R )?{user}: (.+?)(?: &&|$)", runs)
    assert chown
    for written in ("NIBBLE_DATA_DIR", "TRITON_CACHE_DIR"):
        if written in environment:
            folder = Path(environment[written])
            assert any(folder.is_relative_to(owned) for owned in chown[1].split()), written


def test_the_gpu_image_can_compile_tritons_driver() -> None:
    image = Dockerfile(ROOT / "Dockerfile.gpu").lineage("image")
    runs = " ".join(_words(image, "RUN"))

    assert {"gcc", "libc6-dev", "python3-dev"} <= set(runs.split())
    assert _environment(image)["TRITON_CACHE_DIR"] == "/var/cache/nibble/triton"


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.gpu", "docker-compose.yml"])
def test_no_package_index_is_named(file: str) -> None:
    text = (ROOT / file).read_text()

    assert not re.search(r"https?://", text)
