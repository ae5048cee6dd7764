"""A command's options as a dataclass: each field is a flag, and its default and its help stand
once.

    @dataclass(frozen=True)
    class Options:
        data: Path = option(help="folder of pictures")              --data, which must be given
        steps: int = option(1000, help="optimizer steps")           --steps
        resume: bool = option(False, help="continue the run")       --resume, which takes no value
        rates: tuple[float, ...] = option((0.0,), help="rates")     --rates, which takes one or more

    parser = add_options(command("train", __doc__), Options)
    options = Options(**vars(parser.parse_args()))
"""
import argparse
import dataclasses
import inspect
import types
import typing


def option(default: object = dataclasses.MISSING, *, help: str, **metadata: object) -> typing.Any:
    """A field of a dataclass of options. Without a default the flag must be given. metadata:
    `choices`, the values that it may have; anything else is for the dataclass itself."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def add_options(parser: argparse.ArgumentParser, options: type) -> argparse.ArgumentParser:
    """Give `parser` a flag for each field of a dataclass of options: train_mask becomes
    --train-mask. The fields of the class itself come before those that it inherits."""
    hints = typing.get_type_hints(options)
    new = inspect.get_annotations(options)
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name not in new):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        required = field.default is dataclasses.MISSING
        if isinstance(field.default, tuple):
            text += f" (default {' '.join(map(str, field.default))})"
        elif not required and field.default is not None:
            text += " (default %(default)s)"
        kind = not_none(hints[field.name])
        nargs = None
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            nargs = "+"
        parser.add_argument(flag, type=kind, nargs=nargs, required=required,
                            default=None if required else field.default,
                            choices=field.metadata.get("choices"), help=text)
    return parser


def not_none(annotation: object) -> object:
    """int of `int`, and of `int | None`: what a flag's text is turned into."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
