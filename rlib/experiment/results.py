"""The stored reports of all methods, and the table of methods that is made of them."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from rlib.experiment.errors import UsageError
from rlib.experiment.report import Report

BEGIN, END = "<!-- made by: python -m experiments table -->\n", "<!-- end -->\n"


class Method(Protocol):
    """What the table needs to know of a method."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def arxiv(self) -> str: ...


def record(results: str, report: Report) -> str:
    """The results with a report in them, in place of that of the same experiment and preset.

    The heading of a section may be followed by one paragraph that begins with "> ": what was found,
    in a sentence, which stays. Figures and the commit are left out.

    Raises:
        UsageError: the report is of some methods or seeds only, or of a changed configuration.
    """
    chosen = {key: value for key, value in report.selection.items() if value}
    if chosen:
        raise UsageError(f"{report.experiment}: not the whole preset, {chosen}; run all of it")
    lead, *sections = re.split(r"(?m)^(?=## )", results)
    body = re.sub(r"(?ms)^## Figures\n.*?(?=^## )", "", report.markdown())
    body = re.sub(r"(?m)^\| commit \|.*\n", "", re.sub(r"(?m)^#", "##", body))
    heading, _, rest = body.partition("\n")
    places = {section.partition("\n")[0]: i for i, section in enumerate(sections)}
    if heading in places:
        old = sections[places[heading]].split("\n\n")
        summary = [part for part in old[1:2] if part.startswith("> ")]
        sections[places[heading]] = "\n\n".join([heading, *summary, rest.strip()]) + "\n\n"
    else:
        sections.append(f"{heading}\n\n{rest.strip()}\n\n")
    return "".join([lead, *sections]).rstrip() + "\n"


def table(methods: Iterable[Method], results: str) -> str:
    """The Markdown table of methods: paper, command, verdicts and summary of the default preset.

    A line below it counts all verdicts.
    """
    head = ["method", "paper", "command", "claims", "measured"]
    lines = [head, ["---"] * len(head)]
    total: Counter[str] = Counter()
    for method in methods:
        section = results.partition(f"## {method.name}, preset default\n\n")[2]
        section = section.partition("\n## ")[0]
        said = re.match(r"(?s)> .*?(?=\n\n|\Z)", section)
        found = Counter(re.findall(r"(?m)\| (held|not held|inconclusive) \|$", section))
        total += found
        paper = f"[{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
        command = f"`python -m experiments.{method.name}`"
        measured = " ".join(re.sub("(?m)^> ?", "", said[0]).split()) if said else ""
        measured = re.sub(r"(?<!\\)\|", r"\|", measured)
        lines.append([method.title, paper, command, _counted(found), measured])
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{rows}\nOf all claims: {_counted(total) or 'none yet'}.\n"


def _counted(verdicts: Counter[str]) -> str:
    order = ("held", "not held", "inconclusive")
    return ", ".join(f"{verdicts[name]} {name}" for name in order if verdicts[name])


def with_table(readme: str, made: str) -> str:
    """The README with the table between its two marks.

    Raises:
        UsageError: it has not both marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"no place for the table: README.md has not the lines {BEGIN}{END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"
