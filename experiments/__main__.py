"""List the experiments: `python -m experiments`; keep what they found: `... record WORKDIR`."""

import argparse
import sys
from pathlib import Path

from experiments import METHODS

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the experiments (the default)")
    commands.add_parser("table", help="make README.md's table of methods from RESULTS.md")
    command = commands.add_parser("record", help="put reports into RESULTS.md, and make the table")
    command.add_argument("workdir", nargs="+", type=Path, help="a work directory with a report")
    arguments = parser.parse_args(argv)
    if arguments.command in (None, "list"):
        for method in METHODS:
            print(f"python -m experiments.{method.name}")
            print(f"    {method.title} (arXiv {method.arxiv})")
            print(f"    claim: {method.claim}\n")
        print("Each takes --help and tells its time first. Default presets need no network.")
        return 0

    from rlib.experiment import Report, UsageError, results

    stored, readme = ROOT / "RESULTS.md", ROOT / "README.md"
    file = stored
    try:
        text = stored.read_text()
        for workdir in getattr(arguments, "workdir", ()):
            file = workdir / "report.json"
            text = results.record(text, Report.from_json(file.read_text()))
        file = readme
        page = results.with_table(readme.read_text(), results.table(METHODS, text))
    except (OSError, UsageError) as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, TypeError, KeyError) as error:
        print(f"{file} is no report: {error!r}", file=sys.stderr)
        return 1
    stored.write_text(text)
    readme.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
