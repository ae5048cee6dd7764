"""A command's options as a dataclass: each field is a flag, and its default and its help stand
once.

    @dataclass(frozen=True)
    class Options:
        data: Path = option(help="folder of pictures")              --data, which must be given
        steps: int = option(1000, help="optimizer steps")           --steps
        resume: bool = option(False, help="continue the run")       --resume, which takes no value

    parser = add_options(command("train", __doc__), Options)
    options = Options(**vars(parser.parse_args()))
"""
import argparse
import dataclasses
import typing


def option(default: object = dataclasses.MISSING, *, help: str, **metadata: object) -> typing.Any:
    """A field of a dataclass of options. Without a default the flag must be given. metadata:
    `choices`, the values that it may have; anything else is for the dataclass itself."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def add_options(parser: argparse.ArgumentParser, options: type) -> argparse.ArgumentParser:
    """Give `parser` a flag for each field of a dataclass of options: train_mask becomes
    --train-mask."""
    types = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if types[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        required = field.default is dataclasses.MISSING
        if not required and field.default is not None:
            text += " (default %(default)s)"
        parser.add_argument(flag, type=value_type(types[field.name]), required=required,
                            default=None if required else field.default,
                            choices=field.metadata.get("choices"), help=text)
    return parser


def value_type(annotation: object) -> type:
    """int of `int`, and of `int | None`: what a flag's text is turned into."""
    alternatives = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return alternatives[0] if alternatives else annotation
