"""The package's own sources in one file, which transformers copies and imports as it stands.

The modules of models are found by the imports in their sources, and kept as text under a package name of their own, so
that they neither need this package nor meet another version of it. `modeling.py` follows as plain code:
transformers saves a model again by copying the file in which its class stands.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import performer_lm

ROOT: Final = Path(performer_lm.__file__).parent
OWN: Final = "performer_lm"
WRAPPER: Final = "performer_lm.interop.export.modeling"
STAND_INS: Final = "performer_lm.interop.export.stand_ins"
PARTS: Final = ("attention", "nn")  # folders of the classes that a config may name
REPLACED: Final = ("annotated_types", "einops")

HEAD: Final = '''\
"""A language model of performer-lm for transformers: its own sources, which need torch and transformers alone.

MIT license, as performer-lm's. Written by export.py of performer-lm: change the sources there.
"""

import importlib
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.util import spec_from_loader

SOURCES = {}  # by the name of the module


class OwnSources(MetaPathFinder, InspectLoader):
    """Imports modules from the texts in SOURCES, and packages that have none as empty ones."""

    def find_spec(self, name, path=None, target=None):
        is_ours = name in SOURCES or any(other.startswith(name + ".") for other in SOURCES)
        return spec_from_loader(name, self) if is_ours else None

    def is_package(self, name):
        return any(other.startswith(name + ".") for other in SOURCES)

    def get_source(self, name):
        return SOURCES.get(name, "")

    def get_code(self, name):
        return self.source_to_code(self.get_source(name), f"{__file__}/{name}.py")


def own(module):
    """Return a module of SOURCES."""
    return importlib.import_module(module)

'''
START: Final = """

if not any(getattr(finder, "package", None) == "{package}" for finder in sys.meta_path):
    sys.meta_path.append(OwnSources())
    sys.meta_path[-1].package = "{package}"

"""


@cache
def assemble() -> str:
    """Return the text of `modeling_performer.py`, which is one for all models of this version."""
    wrapper = _path_of(WRAPPER).read_text()
    texts = {name: _path_of(name).read_text() for name in sorted(_needed(wrapper))}
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in texts.items()).encode()).hexdigest()
    package = f"{OWN}_export_{digest[:12]}"
    sources = [
        f'SOURCES["{package}{name.removeprefix(OWN)}"] = {_quoted(_renamed(text, package))}\n'
        for name, text in texts.items()
    ]
    return "".join([HEAD, *sources, START.format(package=package), _without_imports(wrapper, package)])


def _needed(wrapper: str) -> set[str]:
    """Return the modules that the wrapper imports or a config may name, with all that they import of this package."""
    parts = {f"{OWN}.{folder}.{path.stem}" for folder in PARTS for path in (ROOT / folder).glob("[!_]*.py")}
    found, waiting = {STAND_INS}, [*parts, *_imports(wrapper)]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(_path_of(name).read_text())
    return found


def _imports(text: str) -> Iterator[str]:
    """Yield the modules of this package that a source imports, or imports names from, wherever it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == OWN:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in inner if _path_of(name).exists()]
            yield from found or [str(node.module)]
            if 0 < len(found) < len(inner):
                yield str(node.module)


def _path_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _renamed(text: str, package: str) -> str:
    """Return a source that imports from `package`, where operators of its own are registered too."""
    stand_ins = package + STAND_INS.removeprefix(OWN)
    text = re.sub(rf"^(\s*from ){OWN}(?=[. ])", rf"\g<1>{package}", text, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*from )({'|'.join(REPLACED)})(?= import)", rf"\g<1>{stand_ins}", text, flags=re.MULTILINE)
    return text.replace(f'"{OWN}::', f'"{package}::')


def _quoted(text: str) -> str:
    quoted = f"r'''{text}'''"
    return quoted if ast.literal_eval(quoted) == text else repr(text)


def _without_imports(wrapper: str, package: str) -> str:
    """Return the wrapper with names of this package looked up by a call: transformers wants imports to be installed."""
    lines = wrapper.splitlines()
    for node in reversed(ast.parse(wrapper).body):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OWN):
            module = package + str(node.module).removeprefix(OWN)
            names = [f'{alias.asname or alias.name} = own("{module}").{alias.name}' for alias in node.names]
            lines[node.lineno - 1 : node.end_lineno] = names
    return "\n".join(lines) + "\n"
