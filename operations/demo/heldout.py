"""The modules that tiny-llama never sees before it is fine-tuned.

One list serves the pre-training corpus, the demo's validation split and every quality benchmark,
so a figure measured on these modules measures learning, never recall. Changing the list makes the
committed weights and all such figures stale: train the model again.
"""

HELD_OUT_MODULES: tuple[str, ...] = (
    "bisect",
    "calendar",
    "copy",
    "csv",
    "difflib",
    "filecmp",
    "fnmatch",
    "fractions",
    "getopt",
    "graphlib",
    "heapq",
    "hmac",
    "json",
    "pprint",
    "queue",
    "random",
    "sched",
    "secrets",
    "shlex",
    "shutil",
    "statistics",
    "tempfile",
    "textwrap",
    "uuid",
    "zipfile",
)
"""Top-level standard-library modules and packages, present in Python 3.11 to 3.14.

Pre-training of `examples/tiny-llama` leaves out their source and docstrings. The demo's validation
split and every later quality benchmark use only them.
"""


def is_held_out(module: str) -> bool:
    """Say whether a dotted module name, such as ``json.decoder``, belongs to a held-out module.

    A private implementation counts as the module it stands behind: ``_json`` and ``_pyjson``
    belong to ``json``.
    """
    top = module.partition(".")[0]
    return top in HELD_OUT_MODULES or _public_name(top) in HELD_OUT_MODULES


def _public_name(top: str) -> str:
    return top.removeprefix("_py") if top.startswith("_py") else top.removeprefix("_")
