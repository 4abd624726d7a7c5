"""The facts about our own data sets, as literals, so that listing them imports nothing."""

from __future__ import annotations

import dataclasses
import difflib
import re

from rlib.data import text

NO_DOWNLOAD = "presets smoke and default need no download"

# name, examples, package, licence, content. The licence is that of the data, where their package or
# source states one; MIT is all that chime and pydataset state, for themselves. A photograph was
# taken by a camera: scikit-image's drawings, test cards and animations are left out. No examples:
# they depend on the machine, and are counted when asked for.
_FACTS = """
auto_mpg                      | 392 | mlxtend | CC BY 4.0 | y: miles per US gallon; x: cylinders,
    displacement, horsepower, weight, acceleration, year, origin (1 USA, 2 Europe, 3 Japan); UCI
boston_housing                | 506 | mlxtend | not stated | y: median price in 1000 USD;
    x: CRIM .. LSTAT, of which B is coded by race (only for comparison); Harrison, Rubinfeld 1978
diabetes                      | 442 | scikit-learn | not stated | y: progression after a year;
    x: age, sex, bmi, bp, s1 .. s6, unscaled; Efron et al., Least Angle Regression, 2004
diamonds                      | 53940 | pydataset | MIT | y: price in USD; x: carat,
    cut, color, clarity, depth, table, x, y, z, grades ordinal, 0 the worst; R package ggplot2
digits                        | 1797 | scikit-learn | CC BY 4.0 | 8x8x1 in 0 .. 16, 10 classes; UCI
mnist_5k                      | 5000 | mlxtend | not stated | 28x28x1, 500 of each class; LeCun
nox_emissions                 | 8088 | pydataset | MIT | y: log of NOx in ppb;
    x: day, log of car emissions, root of wind speed in m/s; R. Locher, R package robustbase
photographs/astronaut         | 1 | scikit-image | public domain | 512x512x3, Eileen Collins, NASA
photographs/brick             | 1 | scikit-image | CC0 | 512x512x1, brick wall, texture
photographs/camera            | 1 | scikit-image | CC0 | 512x512x1, the cameraman
photographs/cell              | 1 | scikit-image | CC0 | 660x550x1, a cell, quantitative phase
photographs/chelsea           | 1 | scikit-image | CC0 | 300x451x3, Chelsea the cat
photographs/china             | 1 | scikit-learn | CC BY 2.0 | 427x640x3, temple, by danielbuechele
photographs/clock_motion      | 1 | scikit-image | public domain | 300x400x1, clock, blurred
photographs/coffee            | 1 | scikit-image | CC0 | 400x600x3, a cup of coffee
photographs/coins             | 1 | scikit-image | none known | 303x384x1, Greek coins
photographs/flower            | 1 | scikit-learn | CC BY 2.0 | 427x640x3, dahlia, by vultilion
photographs/grass             | 1 | scikit-image | CC0 | 512x512x1, grass, texture
photographs/gravel            | 1 | scikit-image | CC0 | 512x512x1, gravel, texture
photographs/hubble_deep_field | 1 | scikit-image | public domain | 872x1000x3, galaxies, NASA
photographs/ihc               | 1 | scikit-image | none known | 512x512x3, stained colonic glands
photographs/microaneurysms    | 1 | scikit-image | CC0 | 102x102x1, detail of a retina
photographs/moon              | 1 | scikit-image | not stated | 512x512x1, the moon, low contrast
photographs/motorcycle_left   | 1 | scikit-image | not stated | 500x741x3, stereo pair, Middlebury
photographs/motorcycle_right  | 1 | scikit-image | not stated | 500x741x3, stereo pair, Middlebury
photographs/page              | 1 | scikit-image | not stated | 191x384x1, scan, uneven light
photographs/retina            | 1 | scikit-image | CC0 | 1411x1411x3, human retina
photographs/rocket            | 1 | scikit-image | public domain | 427x640x3, launch, SpaceX
photographs/text              | 1 | scikit-image | public domain | 172x448x1, text at an angle
python_docs                   | 0 | Python | PSF-2.0 | windows of 256 bytes: the language
    reference in English, as help() shows it; split by topic, a zero ends each
python_source                 | 0 | Python | PSF-2.0 | windows of 256 bytes: sources of
    the running Python's standard library, without tests; split by file, a zero ends each
sounds/big-sur-error          | 1 | chime | MIT | 48000 Hz, 16 bit, 73883x2
sounds/big-sur-info           | 1 | chime | MIT | 48000 Hz, 16 bit, 27077x2
sounds/big-sur-success        | 1 | chime | MIT | 48000 Hz, 16 bit, 79204x2
sounds/big-sur-warning        | 1 | chime | MIT | 48000 Hz, 16 bit, 36370x2
sounds/chime-error            | 1 | chime | MIT | 44100 Hz, 16 bit, 49253x2
sounds/chime-info             | 1 | chime | MIT | 48000 Hz, 24 bit, 69265x1
sounds/chime-success          | 1 | chime | MIT | 48000 Hz, 24 bit, 83180x1
sounds/chime-warning          | 1 | chime | MIT | 44100 Hz, 16 bit, 68604x1
sounds/future-error           | 1 | chime | MIT | 44100 Hz, 16 bit, 154438x2
sounds/future-info            | 1 | chime | MIT | 44100 Hz, 16 bit, 17106x2
sounds/future-success         | 1 | chime | MIT | 44100 Hz, 16 bit, 223130x2
sounds/future-warning         | 1 | chime | MIT | 44100 Hz, 16 bit, 154438x2
sounds/mario-error            | 1 | chime | MIT | 22050 Hz, 16 bit, 72104x1
sounds/mario-info             | 1 | chime | MIT | 22050 Hz, 16 bit, 9241x1
sounds/mario-success          | 1 | chime | MIT | 22050 Hz, 16 bit, 10942x1
sounds/mario-warning          | 1 | chime | MIT | 22050 Hz, 16 bit, 11614x1
sounds/material-error         | 1 | chime | CC BY-ND 4.0 | 48000 Hz, 24 bit, 45715x2, Google
sounds/material-info          | 1 | chime | CC BY-ND 4.0 | 48000 Hz, 24 bit, 91428x2, Google
sounds/material-success       | 1 | chime | CC BY-ND 4.0 | 48000 Hz, 24 bit, 96000x2, Google
sounds/material-warning       | 1 | chime | CC BY-ND 4.0 | 48000 Hz, 24 bit, 45715x2, Google
sounds/pokemon-error          | 1 | chime | MIT | 44100 Hz, 16 bit, 108288x2
sounds/pokemon-info           | 1 | chime | MIT | 44100 Hz, 16 bit, 91055x2
sounds/pokemon-success        | 1 | chime | MIT | 44100 Hz, 16 bit, 179712x2
sounds/pokemon-warning        | 1 | chime | MIT | 44100 Hz, 16 bit, 82944x2
sounds/sonic-error            | 1 | chime | MIT | 44100 Hz, 16 bit, 22785x2
sounds/sonic-info             | 1 | chime | MIT | 44100 Hz, 16 bit, 66816x2
sounds/sonic-success          | 1 | chime | MIT | 44100 Hz, 16 bit, 138240x2
sounds/sonic-warning          | 1 | chime | MIT | 44100 Hz, 16 bit, 40425x2
sounds/zelda-error            | 1 | chime | MIT | 44100 Hz, 8 bit, 49253x1
sounds/zelda-info             | 1 | chime | MIT | 44100 Hz, 8 bit, 18828x1
sounds/zelda-success          | 1 | chime | MIT | 44100 Hz, 8 bit, 83545x1
sounds/zelda-warning          | 1 | chime | MIT | 44100 Hz, 8 bit, 6986x1
"""


class DataUnavailable(RuntimeError):
    """A data set cannot be had; the message is one line: what is missing, and how to get it."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Facts of one of our own data sets.

    Attributes:
      name: as for `arrays`, `"set"` or `"family/config"`.
      examples: their number over all splits; of texts, in the installed package, 0 without it.
      package: the PyPI package that holds the data, or Python.
      licence: of the data, in a word.
      what: shapes, units, encodings and source.

    >>> info("digits").splits, info("sounds/chime-info").splits
    (('train', 'test'), ('train',))
    """

    name: str
    examples: int
    package: str
    licence: str
    what: str

    @property
    def version(self) -> str:
        """The version of the prepared data; two Pythons do not share their sources."""
        return text.version(self.name) if text.is_text(self.name) else "1.0.0"

    @property
    def splits(self) -> tuple[str, ...]:
        """`("train",)` for pictures and sounds, `("train", "test")` for all others."""
        single = self.name.startswith(("photographs/", "sounds/"))
        return ("train",) if single else ("train", "test")


def _parse(entry: str) -> Info:
    name, examples, *rest = re.split(r"\s*\|\s*|\s*\n\s*", entry, maxsplit=4)
    return Info(name, int(examples), *(" ".join(cell.split()) for cell in rest))


_INFOS = {row.name: row for row in map(_parse, re.split(r"\n(?=\S)", _FACTS.strip()))}
for _language in text.LANGUAGES:
    _name = f"messages/{_language}"
    _what = "windows of 256 bytes: Django's messages; split by message, a zero ends each"
    _INFOS[_name] = Info(_name, 0, "django", "BSD-3-Clause", _what)


def names() -> list[str]:
    """The sorted names of our own data sets.

    >>> len(names()), names()[0]
    (86, 'auto_mpg')
    """
    return sorted(_INFOS)


def info(name: str) -> Info:
    """Facts of an own data set: size, package, licence, content.

    Raises:
      DataUnavailable: no own set has this name; the message offers the nearest one.

    >>> info("digits").examples
    1797
    """
    if name not in _INFOS:
        raise unknown(name)
    row = _INFOS[name]
    return row if row.examples else dataclasses.replace(row, examples=text.examples(name))


def unknown(name: str) -> DataUnavailable:
    """The error for a name that nobody has, with the own name most like it."""
    # The last part of a name stands for all of it, so that "camera" finds its family.
    candidates = {key.rpartition("/")[2]: key for key in _INFOS} | {key: key for key in _INFOS}
    closest = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0)[0]
    return DataUnavailable(
        f"no data set is named {name!r}; the nearest of ours is {candidates[closest]!r} "
        f"(python -m rlib.data lists them all); {NO_DOWNLOAD}"
    )
