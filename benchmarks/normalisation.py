"""Speed of `normalize` and of the nearest functions of camel-tools and PyArabic, on the same texts, one core.

    python benchmarks/normalisation.py [--text FILE] [--rounds N] [--json]

The texts are the lines of FILE (UTF-8), or a built-in sample of plain modern standard Arabic. What is compared:

- train: camel-tools' `arclean` map (keeps only characters on its list); PyArabic's `strip_tatweel` and
  `normalize_ligature`. Neither skips code and URLs, keeps هـ or emoji, or knows Persian lines.
- compare: camel-tools' `normalize_unicode`, `dediac_ar`, three folding functions and its `arclean` map; PyArabic's
  `strip_diacritics`, `strip_tatweel`, `normalize_ligature`, `normalize_alef`, `normalize_teh`. PyArabic folds neither
  ى, digits nor punctuation.

`pip install PyArabic camel-tools` for the comparison; what is not installed is left out. MB are 10⁶ bytes of UTF-8.
Each figure is the best of N rounds; the rounds of all functions alternate, so that a busy machine slows all alike.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

from arabic_qwen.text.normalization import normalize

SAMPLE = [
    "استيقظ سالم باكرًا، وغسل وجهه، ثم تناول الفطور مع أسرته، وبعد ذلك حمل حقيبته وذهب إلى المدرسة ماشيًا.",
    "في آخر الشارع مكتبة صغيرة يديرها رجل عجوز، يعرف أسماء الكتب كلها ويحب أن يحدّث الأطفال عن القصص القديمة.",
    "تأسست الجامعة عام 1908، ويدرس فيها اليوم أكثر من 20,000 طالب وطالبة من بلدان كثيرة؛ فهل تعرف اسمها؟",
    "يمكنك تدريب نموذج Qwen2.5 على جهازك: ثبّت الحزمة ثم شغّل `arabic-qwen quickstart` وانتظر دقيقتين.",
]


def in_turn(*functions: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: reduce(lambda result, function: function(result), functions, text)


def contestants() -> dict[str, dict[str, Callable[[str], str]]]:
    """profile → name of the library → its function; only what is installed."""
    found: dict[str, dict[str, Callable[[str], str]]] = {
        profile: {"arabic_qwen": partial(normalize, profile=profile)} for profile in ("train", "compare")
    }
    try:
        from camel_tools.utils import normalize as camel
        from camel_tools.utils.charmap import CharMapper
        from camel_tools.utils.dediac import dediac_ar
    except ImportError:
        pass
    else:
        clean = CharMapper.builtin_mapper("arclean")
        fold = (camel.normalize_alef_ar, camel.normalize_alef_maksura_ar, camel.normalize_teh_marbuta_ar)
        found["train"]["camel_tools"] = clean
        found["compare"]["camel_tools"] = in_turn(camel.normalize_unicode, dediac_ar, *fold, clean)
    try:
        from pyarabic import araby
    except ImportError:
        pass
    else:
        found["train"]["pyarabic"] = in_turn(araby.strip_tatweel, araby.normalize_ligature)
        found["compare"]["pyarabic"] = in_turn(
            araby.strip_diacritics,
            araby.strip_tatweel,
            araby.normalize_ligature,
            araby.normalize_alef,
            araby.normalize_teh,
        )
    return found


def seconds(function: Callable[[str], str], texts: list[str]) -> float:
    start = time.process_time()
    for text in texts:
        function(text)
    return time.process_time() - start


def measure(texts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """profile → library → MB/s."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    functions = contestants()
    best = {(profile, name): float("inf") for profile, libraries in functions.items() for name in libraries}
    for _ in range(rounds):
        for profile, name in best:
            best[profile, name] = min(best[profile, name], seconds(functions[profile][name], texts))
    return {
        profile: {name: round(megabytes / best[profile, name], 2) for name in libraries}
        for profile, libraries in functions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of normalisation, MB/s on one core.")
    parser.add_argument("--text", type=Path, help="a UTF-8 file, a text a line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    texts = args.text.read_text(encoding="utf-8").splitlines() if args.text else SAMPLE * 500
    result = measure(texts, args.rounds)
    if args.json:
        print(json.dumps({"unit": "MB/s", "texts": len(texts), **result}))
        return
    for profile, libraries in result.items():
        for name, speed in libraries.items():
            print(f"{profile:<8} {name:<12} {speed:8.2f} MB/s")


if __name__ == "__main__":
    main()
