"""The table of networks, `build`, and networks from a function of the user's own: `mypackage.nets:build`.

Names are known without torch; a network's file is imported when it is built. A factory of the user's is named in a
recipe or on the command line. Building by it imports the module and calls the function, so it runs the user's code.
That is why a factory is used only where the user names it: what a checkpoint says of its factory is never imported, and
the options in a checkpoint are passed on only where the user has given the same ones.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vss.core.errors import VssError, one_line, shown, unknown
from vss.core.registry import Registry, checked_options, keyword_options

if TYPE_CHECKING:
    from vss.models.base import SegModel

MODELS: Registry[Callable[..., SegModel]] = Registry("model")

MODELS.later("unet", "vss.models.unet:UNet")
MODELS.later("segnet", "vss.models.segnet:SegNet")
MODELS.later("segdecnet", "vss.models.segdecnet:SegDecNet")
MODELS.later("resnet18_seg", "vss.models.torchvision:resnet18_seg")
MODELS.later("resnet34_seg", "vss.models.torchvision:resnet34_seg")
MODELS.later("resnet50_seg", "vss.models.torchvision:resnet50_seg")
MODELS.later("resnet101_seg", "vss.models.torchvision:resnet101_seg")
MODELS.later("deeplabv3_resnet50", "vss.models.torchvision:deeplabv3_resnet50")
MODELS.later("deeplabv3_resnet101", "vss.models.torchvision:deeplabv3_resnet101")
MODELS.later("fcn_resnet50", "vss.models.torchvision:fcn_resnet50")
MODELS.later("fcn_resnet101", "vss.models.torchvision:fcn_resnet101")
MODELS.later("lraspp_mobilenet_v3_large", "vss.models.torchvision:LRASPP")

COUNTS = ("num_classes", "classes", "n_classes", "num_labels")
"""Parameters that take the number of classes, as libraries call them."""


def build(name: str, /, num_classes: int, **options: object) -> SegModel:
    """Build a registered network.

    Args:
        name: a name in `MODELS`.
        num_classes: K, 1 to 256 (labels are uint8).
        options: keyword options of that network; an unknown one is refused with the closest name, and one that is not
            what the annotation says by the value.
    """
    factory: Any = MODELS[name]
    if not callable(factory):  # a `Factory` that the user has named
        return factory.build(num_classes, options)
    known = keyword_options(factory)
    for option in options:
        if option not in known:
            raise unknown(f"option of model {name!r}", option, known)
    if not isinstance(num_classes, int) or not 1 <= num_classes <= 256:
        raise VssError(f"num_classes is {shown(num_classes)}; expected 1 to 256, since labels are uint8.")
    options = checked_options(f"model {name!r}", known, options)
    try:
        model = factory(num_classes, **options)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, MemoryError) as error:
        reason = one_line(str(error)).rstrip(".") or "out of memory"
        raise VssError(f"model {name!r} refuses options {shown(options)}: {reason}.") from error
    model.name, model.options = MODELS.canonical(name), dict(options)
    return model


class Factory:
    """The function behind "MODULE:NAME", imported.

    Attributes:
        target: "MODULE:NAME".
        given: options that the user gave.
        task: of the networks that it builds: its own attribute `task`, as a `DefectModel` has it.
    """

    def __init__(self, target: str) -> None:
        self.target, self.given = target, list[dict[str, Any]]()
        with _working_folder():
            self.function = _resolved(target)
        self.task = str(getattr(self.function, "task", "segmentation"))

    def __repr__(self) -> str:
        return f"factory {self.target}"

    def build(self, num_classes: int | None, options: dict[str, Any]) -> Any:
        """The network as a `SegModel`; a plain module is wrapped.

        `num_classes` goes in as the first parameter of `COUNTS` that the function has, unless it is among `options`;
        None: it is what the network gives.
        """
        from torch import nn

        from vss.models.adapter import channels_given, wrap
        from vss.models.base import SegModel

        arguments = self._arguments(num_classes, options)
        try:
            with _working_folder():
                net = self.function(**arguments)
        except (Exception, SystemExit) as error:
            raise VssError(
                f"{self.target} raises {type(error).__name__} when it is called with {shown(arguments)}: "
                f"{one_line(str(error)).rstrip('.')}."
            ) from error
        if not isinstance(net, nn.Module):
            raise VssError(f"{self.target} returns a {type(net).__name__}; expected a torch.nn.Module.")
        if not isinstance(net, SegModel):
            count = next((options[name] for name in COUNTS if type(options.get(name)) is int), num_classes)
            if count is None:
                count = channels_given(net, self.target)
            net = wrap(net, num_classes=count, name=self.target)
        if net.task != self.task:
            raise VssError(
                f"{self.target} builds a network of task {net.task!r}; name its class, or give the function an "
                f"attribute task = {net.task!r}."
            )
        net.name, net.options = self.target, dict(options)
        return net

    def counts(self, options: dict[str, object]) -> bool:
        """Whether the number of classes is passed on, since the function takes it and the options do not say it."""
        return not set(options) & set(COUNTS) and bool(set(COUNTS) & set(self._parameters()[0]))

    def _parameters(self) -> tuple[list[str], bool]:
        """The names that the function takes, and whether it takes any."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # a function of C says nothing
            return [], True
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return named, any(p.kind is p.VAR_KEYWORD for p in parameters)

    def _arguments(self, num_classes: int | None, options: dict[str, object]) -> dict[str, Any]:
        """What the function is called with; an option that it does not take is refused."""
        known, takes_any = self._parameters()
        own = set(COUNTS) & set(known)
        for name in options:
            if name not in known and not takes_any and (name != "num_classes" or own):
                raise unknown(f"option of {self.target}", name, known)
        arguments = {name: value for name, value in options.items() if takes_any or name in known}
        if num_classes is not None and self.counts(options):
            arguments[next(name for name in COUNTS if name in own)] = num_classes
        return arguments


def use(target: str, options: dict[str, object] | None = None) -> str:
    """Make a factory that the user has named a network of `MODELS` by its "MODULE:NAME", which is returned.

    `options` are those that the user gave for it.
    """
    if target not in MODELS:
        MODELS.add(target, Factory(target))  # type: ignore[arg-type]
    factory: Any = MODELS[target]
    if options is not None and options not in factory.given:
        factory.given.append(dict(options))
    return target


def _resolved(target: str) -> Callable[..., Any]:
    module_name, _, path = target.partition(":")
    if not path or not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise VssError(
            f"a factory is MODULE:NAME, such as mypackage.nets:build, and {shown(target)} is none (model.factory, "
            "--model-from)."
        )
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "") in module_name
        advice = "; install it, put its folder on PYTHONPATH or work in that folder" if absent else ""
        if isinstance(error, SystemExit):
            advice = "; it ends the program when it is imported: put that behind if __name__ == '__main__'"
        reason = f"{type(error).__name__}: {one_line(str(error)).rstrip('.')}"
        raise VssError(f"module {module_name!r} of factory {target} cannot be imported ({reason}){advice}.") from error
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if callable(getattr(found, name, None)) and name[0] != "_"]
            raise unknown(f"function of module {module_name!r}", path, names)
        found = getattr(found, part)
    from torch import nn

    if isinstance(found, nn.Module) or not callable(found):
        raise VssError(f"{target} is a {type(found).__name__}; expected a function or class that builds the network.")
    built: Callable[..., Any] = found
    return built


@contextlib.contextmanager
def _working_folder() -> Iterator[None]:
    """Modules in the working folder can be imported in here; installed ones come first."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
