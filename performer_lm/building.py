"""Objects built from plain config sections, and the only names that a section may give, of a config or a checkpoint.

A section is a dict whose `_target_` names the class or function that is called with the other values, sections among
them built first. With `_partial_: true` it stands for a factory, which its user calls with what is still missing.

`_target_` names any importable object, so a config could run any installed code. A name is taken only if it is one
attribute of a module below `ALLOWED`, and the object itself was defined there: a path that walks through a module's
own imports (`performer_lm.checkpoint.shutil.copy`) leads nowhere. Names outside are refused before anything of theirs
is imported.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NotRequired, Unpack, get_args, get_origin, get_type_hints

from performer_lm.wording import did_you_mean, first_line

ALLOWED = (
    "performer_lm",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.trainer",
)
# Of this package too, what reads, writes and deletes files is not for configs to call.
REFUSED = (
    "performer_lm.building",
    "performer_lm.checkpoint",
    "performer_lm.cli",
    "performer_lm.data.run_config",
    "performer_lm.evaluation.measured_text",
    "performer_lm.generation",
    "performer_lm.interop",
    "performer_lm.serving",
    "performer_lm.training.folder",
    "performer_lm.writing",
)
# Of a checkpoint, which may be a stranger's, the classes of a model are built and nothing else.
MODEL = (
    "performer_lm.attention",
    "performer_lm.encoder_decoder",
    "performer_lm.model",
    "performer_lm.nn",
    "performer_lm.performer",
)
TRAINERS = ("lightning.Trainer", "lightning.pytorch.Trainer")
TARGET, PARTIAL = "_target_", "_partial_"


class Factory:
    """A class or function with some of its arguments, as a section with `_partial_: true` builds it.

    Args:
        target: is called with `values` and whatever the caller adds.
        values: its arguments by name.
        key: where the section stands in the config, for messages.
    """

    def __init__(self, target: Callable[..., Any], values: Mapping[str, Any], *, key: str) -> None:
        self.target = target
        self.values = values
        self.key = key

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Build the object.

        Raises:
            ValueError: for arguments that are missing or that the target does not take.
        """
        given = {**self.values, **more}
        try:
            inspect.Signature(list(parameters(self.target).values())).bind(*args, **given)
        except TypeError as error:
            missing = re.fullmatch(r"missing a required .*argument: '(\w+)'", str(error))
            place = self.key or f"{self.target.__module__}.{self.target.__qualname__}"
            raise ValueError(f"{place}.{missing[1]}: missing" if missing else f"{place}: {error}") from error
        return self.target(*args, **given)


def build(
    section: Any,
    *,
    key: str = "",
    find: Callable[[str], Callable[..., Any]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Any:
    """Build a plain section: lists and other dicts item by item, plain values as they are.

    Args:
        section: dicts, lists and scalars, without interpolations.
        key: where it stands in the config: what is refused is told with it.
        find: returns the class or function of a name; `resolve`, where none is given.
        more: arguments of the section itself beside its own, taken as they are.

    Raises:
        ValueError: for a name that may not be built, or values that its constructor refuses.
    """
    if isinstance(section, list | tuple):
        return [build(item, key=f"{key}[{index}]", find=find) for index, item in enumerate(section)]
    if not isinstance(section, Mapping):
        return section
    values = {
        name: build(value, key=f"{key}.{name}" if key else "", find=find)
        for name, value in section.items()
        if name not in (TARGET, PARTIAL)
    } | dict(more or {})
    if TARGET not in section:
        return values
    factory = Factory((find or resolve)(section[TARGET]), values, key=key)
    if section.get(PARTIAL):
        return factory
    try:
        return factory()
    except ValueError as error:
        if not key or type(error) is not ValueError:
            raise
        raise ValueError("\n".join(_placed(line, key, values) for line in str(error).splitlines())) from error


def build_model(section: Any) -> Any:
    """Build the model's section of a checkpoint.

    Raises:
        ValueError: for a target that is not a model class defined in this package, or values that its constructor
            refuses.
    """
    try:
        return build(section, find=_find_model)
    except TypeError as error:
        raise ValueError(first_line(error)) from error


def _find_model(name: object) -> Callable[..., Any]:
    """Return the class that a dotted name stands for, if this package defines it as part of a model."""
    from torch import nn  # here: to be refused, a config needs no torch

    module_name, _, class_name = str(name).rpartition(".")
    found = None
    if _within(module_name, MODEL):
        try:
            found = getattr(importlib.import_module(module_name), class_name, None)
        except ModuleNotFoundError as error:
            if not (error.name and _within(module_name, (error.name,))):
                raise
    if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != module_name:
        raise ValueError(f"{name!r} is not a model class of performer_lm, so it is not built")
    return found


def _placed(line: str, key: str, values: Mapping[str, Any]) -> str:
    """Return a refusal with the key of the section or value that it is about."""
    name = re.match(r"(\w+)(\[\d+\])* must be ", line)
    if line.startswith(f"{key}."):
        return line
    return f"{key}.{line}" if name and name[1] in values else f"{key}: {line}"


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, annotations evaluated where that is possible.

    Of `**options: Unpack[T]` the keys of the TypedDict T count one by one.
    """
    try:
        found = dict(inspect.signature(target, eval_str=True).parameters)
    except NameError:  # a name that exists for type checkers only
        return dict(inspect.signature(target).parameters)
    return {each.name: each for parameter in found.values() for each in _unpacked(parameter)}


def _unpacked(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """Yield a parameter, or one for each key of the TypedDict that `**options: Unpack[T]` names."""
    if get_origin(parameter.annotation) is not Unpack:
        yield parameter
        return
    (options,) = get_args(parameter.annotation)
    for name, wanted in get_type_hints(options, include_extras=True).items():
        wanted = get_args(wanted)[0] if get_origin(wanted) is NotRequired else wanted
        default = inspect.Parameter.empty if name in options.__required_keys__ else ...
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=wanted)


def resolve(path: str, *, allowed: tuple[str, ...] = ALLOWED) -> Callable[..., Any]:
    """Return the class or function that a dotted name stands for.

    Raises:
        ValueError: if the name is not allowed, or there is none.
    """
    module_name, _, name = path.rpartition(".")
    is_allowed = _within(module_name, allowed) and not _within(module_name, REFUSED)
    if not (is_allowed or path in TRAINERS) or name.startswith("_"):
        raise ValueError(f"'{path}' may not be built from a config; allowed: {', '.join(allowed)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and _within(module_name, (error.name,)):
            raise ValueError(f"'{path}': no module '{error.name}'") from error
        raise ValueError(f"'{path}' needs the package '{error.name}', which is not installed") from error
    target = getattr(module, name, None)
    if target is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        raise ValueError(f"'{path}': no such name{did_you_mean(name, public, prefix=module_name + '.')}")
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not _within(target.__module__, allowed):
        raise ValueError(f"'{path}' may not be built from a config: it is not a class or function defined there")
    return target


def escape(text: str) -> str:
    r"""Escape text so that a config reads it as `text`: `${` becomes `\${`, backslashes before it are doubled."""
    if text == "???":  # OmegaConf's word for a value that is yet to be given
        return '??${oc.decode:"?"}'
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _within(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)
