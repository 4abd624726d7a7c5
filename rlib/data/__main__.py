"""Lists the data sets that need no download, or prepares some: python -m rlib.data prepare NAME."""

from __future__ import annotations

import argparse
import sys

from rlib.data import DataUnavailable, data_dir, info, names, prepare


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlib.data", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list our own data sets (the default)")
    command = commands.add_parser("prepare", help="prepare data sets; public ones are downloaded")
    command.add_argument("name", nargs="+", help="a data set, a family (sounds), or a TFDS name")
    arguments = parser.parse_args(argv)

    if arguments.command != "prepare":
        for row in map(info, names()):
            facts = f"{row.name:<29} {row.examples:>6}  {row.package:<12}  {row.licence:<13}"
            print(f"{facts}  {row.what}")
        return 0
    try:
        for given in arguments.name:
            for name in [own for own in names() if own.startswith(f"{given}/")] or [given]:
                prepare(name)
                print(f"{name}: ready in {data_dir()}")
    except DataUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
