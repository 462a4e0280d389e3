"""Train the dialect classifier that comes with the package, and print how well it does on text it has not seen.

    python scripts/build_dialect_model.py [--mediawiki FOLDER]

Sources: `dialect_sentences/`, written for this project, where line n says the same in every dialect, and the prose of
`corpus/`, written for it by somebody else. Translations of MediaWiki's interface are for testing only, since they are
under the GPL: `apt-get download mediawiki && dpkg -x mediawiki_*.deb FOLDER` (the table in docs is of 1.39.17).
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arabic_qwen.text.dialects import (
    DIALECTS,
    Prediction,
    arabic_words,
    fit,
    held_out_predictions,
    score,
)

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "src" / "arabic_qwen" / "assets" / "dialects.safetensors"
SENTENCES = ROOT / "scripts" / "dialect_sentences"
PROSE = {"msa": "MSA", "egyptian": "EGY", "levantine": "LEV", "gulf": "GLF", "maghrebi": "MAG"}
MEDIAWIKI = {"ar": "MSA", "arz": "EGY", "apc": "LEV", "ary": "MAG", "arq": "MAG", "aeb-arab": "MAG", "acm": "IRQ"}

_MARKUP = re.compile(
    r"\{\{.*?\}\}|\[\[(?:[^]|]*\|)?([^]]*)\]\]|\[\S+ ([^]]*)\]|<[^>]*>|\$\d|'{2,}|https?://\S+|[#*=|{}\[\]]"
)


class Text(NamedTuple):
    text: str
    dialect: str
    group: str  # texts of one group are never on both sides of a split


def sentences(folder: Path = SENTENCES) -> list[Text]:
    found = []
    for dialect in DIALECTS:
        lines = (folder / f"{dialect}.txt").read_text(encoding="utf-8").splitlines()
        found += [Text(line, dialect, f"sentence {number}") for number, line in enumerate(lines)]
    return found


def prose() -> list[Text]:
    found = []
    for name, dialect in PROSE.items():
        lines = (ROOT / "scripts" / "corpus" / f"prose_{name}.txt").read_text(encoding="utf-8").splitlines()
        found += [Text(line, dialect, f"{name} {number}") for number, line in enumerate(lines)]
    return found


def mediawiki(folder: Path, standard_words: set[str]) -> list[Text]:
    """Messages in a dialect with a word that standard Arabic lacks, and the standard Arabic of the same messages.

    Many a message of a dialect's catalogue is plain standard Arabic, which would teach that dialect the wrong words.
    """
    catalogues: dict[str, dict[str, str]] = defaultdict(dict)
    for code in MEDIAWIKI:
        for path in sorted(folder.rglob(f"i18n/**/{code}.json")):
            place = path.parent.relative_to(folder).as_posix()
            for key, text in json.loads(path.read_text(encoding="utf-8")).items():
                if isinstance(text, str):
                    catalogues[code][f"{place}/{key}"] = _MARKUP.sub(lambda m: f" {m[1] or m[2] or ''} ", text)
    standard_words = standard_words.union(*(arabic_words(text) for text in catalogues["ar"].values()))
    found, seen = [], set()
    for code in sorted(MEDIAWIKI, key=lambda code: code == "ar"):
        for key, text in catalogues[code].items():
            words = arabic_words(text)
            if len(words) < 4 or tuple(words) in seen:
                continue
            if code != "ar" and len(set(words) - standard_words) < 2:
                continue
            seen.add(tuple(words))
            found.append(Text(" ".join(words), MEDIAWIKI[code], key))
    translated = {text.group for text in found if text.dialect != "MSA"}
    return [text for text in found if text.dialect != "MSA" or text.group in translated]


def columns(texts: list[Text]) -> tuple[list[str], list[str], list[str]]:
    """Texts, labels and groups."""
    return [text.text for text in texts], [text.dialect for text in texts], [text.group for text in texts]


def report(title: str, texts: list[Text], predictions: list[Prediction]) -> None:
    print(f"\n{title}\n{'':8}{'texts':>7}{'precision':>11}{'recall':>8}{'F1':>7}{'unknown':>9}")
    scores = score([text.dialect for text in texts], predictions)
    for dialect, number, precision, recall, f1, unknown in scores:
        print(f"{dialect:8}{number:7,}{precision:11.2f}{recall:8.2f}{f1:7.2f}{unknown:9.2f}")
    print(f"{'macro':8}{len(texts):7,}{'':19}{np.mean([score.f1 for score in scores]):7.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mediawiki", type=Path, help="folder of the unpacked package, to test on")
    parser.add_argument("--output", type=Path, default=MODEL)
    arguments = parser.parse_args()

    own, other = sentences(), prose()
    model = fit(*columns(own + other))
    model.save(arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
    for dialect, threshold in zip(model.labels, model.thresholds, strict=True):
        print(f"{dialect} from probability {threshold:.2f}")

    unseen = held_out_predictions(*columns(own + other))
    report("sentences, lines not seen in any dialect", own, unseen[: len(own)])
    report("prose, none of it seen", other, fit(*columns(own)).predict(columns(other)[0]))
    if arguments.mediawiki:
        standard = {word for text in own + other if text.dialect == "MSA" for word in arabic_words(text.text)}
        translations = mediawiki(arguments.mediawiki, standard)
        report("MediaWiki, none of it seen", translations, model.predict(columns(translations)[0]))


if __name__ == "__main__":
    main()
