"""What a user reads of a child's log: enough to see what happened, nothing of the machine it happened on."""

import sys
from pathlib import Path

import pytest

from service.settings import Settings
from worker.folder import LOG_TAIL_BYTES, AttemptFolder, write_json
from worker.log_tail import public_log_tail

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "nibble data")


@pytest.fixture
def folder(settings: Settings) -> AttemptFolder:
    folder = AttemptFolder(settings.attempts_dir / "ftjob-1" / "2")
    folder.create()
    spec = {
        "model": {"path": "/srv/models/tiny-1.0"},
        "model_cache": str(settings.data_dir / "models"),
    }
    write_json(folder.spec, spec)
    return folder


def tail_of(folder: AttemptFolder, settings: Settings, text: str) -> str:
    folder.log.write_text(text, encoding="utf-8")
    return public_log_tail(folder, settings)


def test_the_folders_of_this_machine_have_short_names(
    folder: AttemptFolder, settings: Settings
) -> None:
    told = tail_of(
        folder,
        settings,
        "Traceback (most recent call last):\n"
        f'  File "{ROOT}/worker/child/train.py", line 75, in run\n'
        f'  File "{sys.prefix}/lib/python3/site-packages/torch/nn.py", line 9\n'
        f"OSError: '{folder.path}/run/adapter' and '{folder.path.parent}/1/run'\n"
        f"FileNotFoundError: {settings.data_dir}/blobs/files/a\n"
        "ModelWeightsMissing: the folder /srv/models/tiny-1.0 has no weights\n"
        f"no cache at {Path.home()}/.cache/x\n",
    )

    assert told.split("\n") == [
        "Traceback (most recent call last):",
        '  File "<nibble>/worker/child/train.py", line 75, in run',
        '  File "<python>/lib/python3/site-packages/torch/nn.py", line 9',
        "OSError: '<attempt>/run/adapter' and '<job>/1/run'",
        "FileNotFoundError: <data>/blobs/files/a",
        "ModelWeightsMissing: the folder <model> has no weights",
        "no cache at <home>/.cache/x",
    ]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("open /opt/driver/lib64/libcuda.so.1", "open <folder>/libcuda.so.1"),
        ("see file:///opt/driver/notes.txt", "see <folder>/notes.txt"),
        ("cause:/opt/driver/x", "cause:<folder>/x"),
        ("see https://example.org/a/b/c", "see https://example.org/a/b/c"),
        ("3/4 of ./a/b and a/b/c", "3/4 of ./a/b and a/b/c"),
    ],
)
def test_a_folder_that_nobody_knows_is_not_shown_either(
    folder: AttemptFolder, settings: Settings, said: str, told: str
) -> None:
    assert tail_of(folder, settings, said) == told


@pytest.mark.parametrize(
    "secret",
    [
        "value-of-a-variable",
        "postgresql://nibble:pass.word@db/nibble",
        "https://token@example.org",
        "hf_abcdefghijKLMNOP",
        "sk-nibble-0123456789abcdef",
        "Authorization: Bearer abc.def-ghi",
    ],
)
def test_secrets_are_left_out(
    folder: AttemptFolder, settings: Settings, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "value-of-a-variable")

    told = tail_of(folder, settings, f"it said {secret}\nthe end")

    assert "<secret>" in told
    for part in ("value-of", "pass.word", "token@", "hf_a", "sk-nibble", "abc.def"):
        assert part not in told
    assert told.endswith("the end")


def test_it_is_bounded_in_lines_and_bytes_and_ends_with_the_end(
    folder: AttemptFolder, settings: Settings
) -> None:
    many = tail_of(folder, settings, "".join(f"line {n}\n" for n in range(100)))
    long = tail_of(folder, settings, "".join(f"{n} " + "ü" * 250 + "\n" for n in range(30)))
    one = tail_of(folder, settings, "x" * 3000)

    assert many.split("\n") == [f"line {n}" for n in range(80, 100)]
    assert len(long.encode()) <= 4000
    assert long.startswith(("22 ", "23 ", "24 ", "25 "))
    assert one == "x" * 299 + "…"


def test_a_cut_in_the_middle_of_a_line_leaves_no_half_of_a_folder(
    folder: AttemptFolder, settings: Settings
) -> None:
    place = f"{sys.prefix}/a"
    filler = "y" * (LOG_TAIL_BYTES - len(place) + 3)  # the cut takes the place's first letters

    told = tail_of(folder, settings, f"{place} {filler}")

    assert set(told) == {"y", "…"}


def test_what_a_terminal_would_not_show_is_left_out(
    folder: AttemptFolder, settings: Settings
) -> None:
    told = tail_of(folder, settings, "10%\r50%\r\x1b[31m100%\x1b[0m\r\n\n\0end\n")

    assert told == "100%\n\N{REPLACEMENT CHARACTER}end"


def test_no_log_and_no_spec_are_no_trouble(tmp_path: Path, settings: Settings) -> None:
    folder = AttemptFolder(tmp_path / "attempt")
    assert public_log_tail(folder, settings) == ""

    folder.path.mkdir()
    folder.log.write_text("Killed\n")

    assert public_log_tail(folder, settings) == "Killed"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "GET https://cdn.example.org/m?X-Amz-Signature=0a1b2c3d4e5f&part=7",
            "GET https://cdn.example.org/m?X-Amz-Signature=<secret>&part=7",
        ),
        ("GET /m?Expires=17&Signature=a-b~c_", "GET /m?Expires=17&Signature=<secret>"),
        ("sent gho_abcdefgh12345678", "sent <secret>"),
        ("sent github_pat_11ABCDEFG_xyz", "sent <secret>"),
        ("sent glpat-abcdefgh1234567", "sent <secret>"),
        ("sent eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln-x", "sent <secret>"),
    ],
)
def test_signatures_of_addresses_and_tokens_of_known_forms_are_not_shown(
    folder: AttemptFolder, settings: Settings, said: str, told: str
) -> None:
    assert tail_of(folder, settings, said) == told
