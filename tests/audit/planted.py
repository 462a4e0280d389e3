"""A data set with one defect of each kind, and rows without any."""

import json
from pathlib import Path
from typing import NamedTuple

SUBJECTS = ["القراءة", "الرياضة", "السفر", "الطبخ", "الزراعة", "الموسيقى", "الرسم", "النوم", "الصداقة", "العمل"]


def clean_row(number: int) -> dict:
    """Rows with texts of their own, so that none is a duplicate."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    return {
        "instruction": f"اكتب الفقرة رقم {number} عن فوائد {subject}.",
        "response": f"من فوائد {subject} أنها تفتح بابًا جديدًا في اليوم {number}، وتمنح صاحبها هدوءًا وخبرة.",
    }


class Defect(NamedTuple):
    code: str
    row: object  # values, or a line of text
    file: str = "sft.jsonl"
    level: str = ""  # where it is not the code's own
    example: str = ""  # a part of the finding's example


ANSWER = "هذه إجابة سليمة كتبها إنسان يعرف ما يقول"
LONG = (
    "كان الطريق إلى القرية طويلًا ومتعرجًا بين التلال والبساتين وكان المسافرون يتوقفون عند النبع ليشربوا ويستريحوا "
    "قبل أن يكملوا سيرهم مع الغروب نحو البيوت القديمة التي بناها أجدادهم من الحجر والطين قبل مئات السنين"
)


def sft(instruction: str, response: str) -> dict:
    return {"instruction": instruction, "response": response}


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


QUESTION = "ما الفرق بين النهر والبحيرة في الجغرافيا الطبيعية؟"
AS_LATIN = "العربية لغة جميلة".encode().decode("latin-1")
# DEFECTS holds one of each code; those about two rows come after the row that they are like.
DEFECTS = [
    Defect("broken_row", "{not json"),
    Defect("empty_answer", sft("ما معنى الصبر؟", " ")),
    Defect("placeholder_answer", sft("ما معنى الكرم؟", "[الإجابة]")),
    Defect(
        "stringified_messages",
        {"messages": json.dumps(messages(("user", "ما معنى الوفاء؟"), ("assistant", "حفظ العهد."))["messages"])},
        "chat.jsonl",
    ),
    Defect("translated_role", messages(("مستخدم", "ما معنى الأمل؟"), ("مساعد", "انتظار الخير.")), "chat.jsonl"),
    Defect("swapped_roles", messages(("assistant", "ما معنى الحلم؟"), ("user", "الصفح عن الناس.")), "chat.jsonl"),
    Defect(
        "missing_end_of_turn",
        messages(("user", "ما معنى العدل؟"), ("assistant", "الإنصاف."), ("user", "وما ضده؟")),
        "chat.jsonl",
    ),
    Defect("equal_answers", {"prompt": "ما لون السماء؟", "chosen": "أزرق", "rejected": "أزرق"}, "pairs.jsonl"),
    Defect(
        "nearly_equal_answers",
        {"prompt": "من فتح مصر؟", "chosen": "فتحها عمرو بن العاص.", "rejected": "فتحها عمرو بن العاص"},
        "pairs.jsonl",
    ),
    Defect("mojibake", sft("ما أقدم جامعة؟", AS_LATIN)),
    Defect("template_tokens", sft("ما أكبر قارة؟", "آسيا هي أكبر القارات</s>"), example="</s>"),
    Defect("code_fence", sft("كيف أطبع في بايثون؟", "هكذا:\n```بايثون\nprint(1)\n```"), example="```بايثون"),
    Defect("html", sft("ما أطول نهر؟", "<p>نهر النيل أطول الأنهار</p>"), example="<p>"),
    Defect("presentation_forms", sft("كيف أرحب بضيف؟", "قل له ﻣﺮﺣﺒﺎ بك"), example="ﻣﺮﺣﺒﺎ"),
    Defect("tatweel", sft("كيف أهنئ صديقي؟", "قل له مبـــارك لك"), example="مبـــارك"),
    Defect("bidi_controls", sft("ما رمز الماء؟", "رمزه \u202bH2O\u202c كما نعرف"), example="H2O"),
    Defect("unk_token", sft("ما أصغر كوكب؟", "عطارد هو <unk> أصغر الكواكب"), example="<unk>"),
    Defect("wrong_script", sft("ما عاصمة ماليزيا؟", "عاصمة ماليزيا هي كوالالمبور 当然 بلا شك"), example="当然"),
    Defect(
        "little_arabic",
        sft("What is the longest river of the world?", "The longest river of the world is the Nile."),
        example="The longest",
    ),
    Defect("refusal", sft("ما حكم القانون في هذا؟", "كنموذج لغوي، لا أستطيع مساعدتك في هذا."), example="كنموذج"),
    Defect("prompt_leak", sft(QUESTION, f"{QUESTION} النهر يجري والبحيرة ساكنة.")),
    Defect(
        "dialect_mismatch",
        sft("اكتب جملة عن الطقس باللهجة المصرية.", "سوف يكون الطقس غدًا معتدلًا إن شاء الله."),
        example="سوف يكون",
    ),
    Defect("duplicate", clean_row(3)),
    Defect("near_duplicate", sft("أكمل القصة.", LONG.replace("القديمة", "العتيقة"))),
    Defect("duplicate_across_files", clean_row(4), "validation.jsonl"),
    Defect("near_duplicate_across_files", sft("أكمل القصة التالية.", LONG + " بكثير"), "validation.jsonl"),
]


def write_planted(folder: Path) -> dict[str, tuple[str, int]]:
    """Write the files, each with clean rows around the defects; code → (file, line)."""
    files: dict[str, list] = {
        "sft.jsonl": [*map(clean_row, range(20)), sft("أكمل القصة.", LONG)],
        "chat.jsonl": [messages(("user", "كم عدد الكواكب؟"), ("assistant", "ثمانية."))],
        "pairs.jsonl": [{"prompt": "ما عاصمة الأردن؟", "chosen": "عمّان", "rejected": "إربد"}],
        "validation.jsonl": [clean_row(100)],
    }
    places = {}
    for defect in DEFECTS:
        files[defect.file].append(defect.row)
        places[defect.code] = (str(folder / defect.file), len(files[defect.file]))
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return places


FILES = ("sft.jsonl", "chat.jsonl", "pairs.jsonl", "validation.jsonl")
