"""The container files, read once."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, continuations joined."""

    word: str
    rest: str


@dataclass
class Stage:
    """One image of a Dockerfile."""

    base: str
    instructions: list[Instruction] = field(default_factory=list)


class Dockerfile:
    """A Dockerfile's stages; `lineage` follows `FROM stage` downwards."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
        text = re.sub(r"\\\n\s*", " ", text)
        self.stages: dict[str, Stage] = {}
        current = Stage("")
        for line in filter(str.strip, text.splitlines()):
            word, rest = line.strip().split(None, 1)
            if word == "FROM":
                base, _, name = rest.partition(" AS ")
                current = self.stages[name or "image"] = Stage(base)
            else:
                current.instructions.append(Instruction(word, rest))

    def lineage(self, name: str) -> list[Instruction]:
        """Every instruction that makes the image, those of the stages below it first."""
        stage = self.stages[name]
        below = self.lineage(stage.base) if stage.base in self.stages else []
        return below + stage.instructions


IMAGES = [("Dockerfile", "api"), ("Dockerfile", "worker"), ("Dockerfile.gpu", "image")]


@pytest.fixture(scope="session")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(params=IMAGES, ids="-".join)
def image(request: pytest.FixtureRequest) -> list[Instruction]:
    """Each image's instructions in turn."""
    file, stage = request.param
    return Dockerfile(ROOT / file).lineage(stage)
