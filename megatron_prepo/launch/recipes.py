"""Names of the configurations in `examples/`: a model, optionally with a slash and the method.

qwen2.5-7b               examples/paper/qwen2.5-7b/prepo.yaml
qwen2.5-7b/random        examples/paper/qwen2.5-7b/random.yaml
qwen2.5_72b              examples/cluster/qwen2.5-72b/prepo.yaml
mine/run.yaml            any file
"""

from pathlib import Path

from megatron_prepo.config import nearest
from megatron_prepo.errors import NoSuchPath

PACKAGE = Path(__file__).resolve().parents[1]
EXAMPLES = next(
    (folder for folder in (PACKAGE / "examples", PACKAGE.parent / "examples") if folder.is_dir()),
    PACKAGE / "examples",
)
"""`examples/` of the installed package (`setup.py` copies it), or of the clone."""
FOLDERS = ("paper", "cluster")


def recipes() -> dict[str, Path]:
    """Return the configuration file of every recipe by name."""
    return {
        f"{path.parent.name}/{path.stem}": path
        for folder in FOLDERS
        for path in sorted((EXAMPLES / folder).glob("*/*.yaml"))
    }


def find(name: str) -> Path:
    """Return the configuration file of a recipe, or the file with this path.

    Raises NoSuchPath, which lists the recipes unless the name is that of a YAML file.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).suffix in (".yaml", ".yml"):
        raise NoSuchPath(f"no such configuration file: {name}")
    known = recipes()
    assert known, f"{EXAMPLES} has no recipes"
    words = name.replace("_", "-")
    path = known.get(words) or known.get(f"{words}/prepo")
    if path is None:
        raise NoSuchPath(
            f"{name!r} is neither a recipe nor a file{nearest(words, list(known))}; the recipes "
            f"are {', '.join(known)}"
        )
    return path
