"""Speed and memory of `arabic-qwen data check` on seeded rows of plain Arabic, one process.

    python benchmarks/data_doctor.py [--rows N] [--json]

Rows are instruction and response, 90 words on average out of 60,000 in a Zipf distribution, as in natural text; one row
in fifty has a defect. Prints rows a second, seconds (wall
clock and processor time, user and system) and the peak of the process's memory in MB (10⁶ bytes), the libraries included.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

STEMS = """
في من على إلى عن مع هذا هذه التي الذي كان كانت يمكن يجب أن لا ما كل بعض أكثر خلال بين حتى بعد قبل عند لأن المدينة المدرسة
الكتاب العلم الطالب المعلم الحياة العمل الوقت الناس العالم اللغة العربية التاريخ الثقافة الصحة الغذاء الماء الشمس البحر
الجبل السفر الطريق البيت الأسرة الطفل القراءة الكتابة التعليم التقنية الحاسوب البرنامج الشبكة المعلومات البيانات النموذج
التدريب السؤال الجواب الفكرة المشكلة الحل النتيجة السبب الهدف الخطة المشروع الشركة السوق الاقتصاد المال القانون الحكومة
الدولة المجتمع البيئة الطاقة الهواء الأرض النبات الحيوان الطائر السمك الزهرة الشجرة الغابة النهر القمر النجم الفضاء يكتب
يقرأ يعمل يدرس يسافر يعيش يعرف يفهم يشرح يسأل يجيب يبدأ ينتهي يساعد يتعلم يفكر يبحث يجد يرى يسمع كبير صغير جديد قديم جميل
مهم سهل صعب سريع بطيء طويل قصير عالٍ منخفض حار بارد قريب بعيد واضح مختلف مشترك خاص عام أول ثانٍ أخير كثير قليل
"""

PREFIXES = (
    "",
    "ال",
    "و",
    "ف",
    "ب",
    "ل",
    "ك",
    "وال",
    "بال",
    "فال",
    "كال",
    "لل",
    "ولل",
    "وب",
    "ول",
    "فب",
    "سي",
    "وسي",
    "فسي",
    "أ",
    "ن",
    "ت",
    "وت",
    "ون",
)
SUFFIXES = ("", "ه", "ها", "هم", "هما", "هن", "ك", "كم", "ي", "نا", "ات", "اته", "اتها", "اتهم", "ين", "ون", "ان", "ية", "يته", "تنا", "وا", "تم", "ني")  # fmt: skip
WORDS = 60_000

DEFECTS = (
    lambda text: text.replace("ا", "اـ", 1) + "ا",
    lambda text: "\u200f" + text,
    lambda text: text + "<|im_end|>",
    lambda text: f"<p>{text}</p>",
    lambda text: text.encode().decode("latin-1"),
    lambda text: "",
    lambda text: "كنموذج لغوي، لا أستطيع مساعدتك.",
)


def write_rows(path: Path, number: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    forms = sorted(
        {prefix + stem + suffix for prefix, stem, suffix in itertools.product(PREFIXES, STEMS.split(), SUFFIXES)}
    )
    words = sorted(generator.sample(forms, WORDS), key=len)  # common words are short
    weights = list(itertools.accumulate(1 / rank for rank in range(1, WORDS + 1)))

    def text(shortest: int, longest: int) -> str:
        return " ".join(generator.choices(words, cum_weights=weights, k=generator.randint(shortest, longest))) + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            answer = text(10, 140)
            if generator.random() < 0.02:
                answer = generator.choice(DEFECTS)(answer)
            file.write(json.dumps({"instruction": text(5, 25), "response": answer}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path, args.rows)
        megabytes = path.stat().st_size / 1e6
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        from arabic_qwen.audit.check import check

        audit = check([str(path)], keep=1000)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    peak = after.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    figures = {
        "rows": audit.rows,
        "file_mb": round(megabytes, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "rows_per_s": round(audit.rows / seconds),
        "peak_memory_mb": round(peak),
        "findings": dict(sorted(audit.counts.items())),
    }
    print(json.dumps(figures, ensure_ascii=False) if args.json else "\n".join(f"{k} {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
