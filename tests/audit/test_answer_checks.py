"""Defects of answers to their prompts, and answers that only look like them."""

import pytest

from arabic_qwen.audit.answer_checks import answer_findings, asked_dialect, nearly_equal, too_little_arabic

ENGLISH = "The capital of Jordan is the city of Amman, and it is one of the oldest cities of the world."


def codes(prompt: str, answer: str) -> list[str]:
    return [found.code for found in answer_findings(prompt, answer, prompt)]


@pytest.mark.parametrize(
    ("code", "prompt", "answer"),
    [
        ("wrong_script", "ما عاصمة الأردن؟ اذكر شيئًا عن تاريخها", ENGLISH),
        ("wrong_script", "What is the capital of Jordan? Answer in Arabic.", ENGLISH),
        ("wrong_script", "ترجم إلى العربية: The value is not valid", "lqima li drti machi mzyana"),
        ("wrong_script", "Write it in Moroccan Darija: good morning, friends", "sbah lkhir a sdiqati"),
        ("wrong_script", "ما فوائد القراءة؟", "القراءة توسع المدارك 并且 تنمي الخيال"),
        ("wrong_script", "ما فوائد القراءة؟", "القراءة توسع المدارك и тоже تنمي الخيال"),
        ("wrong_script", "ما فوائد القراءة في حياة الإنسان؟", "阅读可以拓宽视野，也可以培养想象力，帮助人们理解世界，丰富语言，放松心情，提高写作能力，增长知识"),
        ("refusal", "كيف أصنع كعكة؟", "كنموذج لغوي، لا أستطيع أن أخبز."),
        ("refusal", "كيف أصنع كعكة؟", "بصفتي نموذجًا لغويًا فإنني لا أملك رأيًا"),
        ("refusal", "كيف أصنع كعكة؟", "عذرًا، لا أستطيع مساعدتك في ذلك."),
        ("refusal", "كيف أصنع كعكة؟", "بصفتي مساعدًا ذكيًا لا أملك وصفة"),
        ("refusal", "كيف أصنع كعكة؟", "مش هقدر أساعدك في الموضوع ده"),
        ("refusal", "كيف أصنع كعكة؟", "آسف، لكن لا يمكنني الإجابة على هذا السؤال"),
        ("refusal", "How do I bake a cake?", "As an AI language model, I do not eat cake."),
        ("refusal", "How do I bake a cake?", "I'm sorry, but I can't help with that."),
        ("prompt_leak", "ما الفرق بين النهر والبحيرة؟ أجب باختصار", "ما الفرق بين النهر والبحيرة؟ أجب باختصار: النهر يجري."),
        ("prompt_leak", "ما عاصمة الأردن؟", "عمّان.\nالمستخدم: وما عاصمة مصر؟"),
        ("prompt_leak", "What is the capital of Jordan?", "عمّان\nUser: and Egypt?"),
        ("prompt_leak", "ما عاصمة الأردن؟", "عمّان.\n\n### السؤال:\nوما عاصمة مصر؟"),
    ],
)  # fmt: skip
def test_found(code, prompt, answer):
    assert codes(prompt, answer) == [code]


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("ترجم إلى الإنجليزية: عاصمة الأردن هي عمّان وهي من أقدم المدن", ENGLISH),
        ("Translate from Arabic to English: عمّان", ENGLISH),
        ("أجب بالإنجليزية: ما عاصمة الأردن؟ وما تاريخها؟", ENGLISH),
        ("ترجم إلى العربية: Linux kernel module", "Linux kernel module"),
        ("ترجم إلى العربية: abbrev. month Nov.", "نوفمبر"),
        ("اكتب دالة في بايثون تجمع عددين ثم تطبع الناتج", "def add(a, b):\n    return a + b\nprint(add(1, 2)) and the rest is up to you"),
        ("ما اسم عاصمة الصين بلغتها؟", "بكين، وتكتب 北京"),
        ("من كتب الحرب والسلم؟", "كتبها الروائي ليو تولستوي (Лев Толстой) بين عامي 1863 و1869"),
        ("من كتب «الحرب والسلم»؟", "كتبها تولستوي (Лев Толстой) الروسي بعد حرب القرم"),
        ("اكتب سؤالين في الجغرافيا", "### السؤال:\nما عاصمة الأردن؟"),
        ("ما معنى كانجي؟", "رموز مثل 漢字"),
        ("ما رمز المقاومة؟", "رمزها الحرف Ω ووحدتها أوم، ويرمز للزاوية α"),
        ("What is the capital of Jordan?", ENGLISH),
        ("ما البريد؟", "info@example.com"),
        ("من أنت؟", "أنا نموذج لغوي، كيف أساعدك؟"),
        ("ترجم: I'm sorry, I can't help", "آسف، لا أستطيع مساعدتك"),
        ("اكتب قصة عن صديقين", "قال أحمد لصديقه: لا أستطيع السفر هذا العام، فقد ضاع مالي."),
        ("هل يستطيع الإنسان أن يعيش بلا ماء؟", "لا يستطيع الإنسان أن يعيش بلا ماء أكثر من أيام."),
        ("ما عاصمة الأردن؟", "ما عاصمة الأردن؟ عمّان"),
        ("اكتب حوارًا بين المستخدم والمساعد عن السفر", "المستخدم: أين أسافر؟\nالمساعد: إلى عمّان."),
        ("أعد كتابة الجملة التالية كما هي: ذهب الولد", "ذهب الولد"),
    ],
)  # fmt: skip
def test_sound(prompt, answer):
    assert codes(prompt, answer) == []


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["What is the capital of Jordan?", ENGLISH], True),
        (["ترجم إلى العربية: The value is not valid", "القيمة غير صالحة"], False),
        (["ما عاصمة الأردن؟", "Amman"], False),
        (["2 + 2", "4"], False),
        (["Hi", "Hello"], False),
    ],
)
def test_too_little_arabic(texts, found):
    assert bool(too_little_arabic(texts)) == found


LONG = " ".join(f"كلمة{number}" for number in range(60))


@pytest.mark.parametrize(
    ("chosen", "rejected", "found"),
    [
        ("عاصمة الأردن هي عمّان.", "عاصمه الاردن هي عمان", True),
        ("عاصمة الأردن هي عمّان.", "عاصمة الأردن هي إربد.", False),
        ("الناتج 3.5", "الناتج 35", False),
        (LONG, LONG.replace("كلمة30", "غيرها"), True),
        (LONG, LONG.replace("كلمة1", "غيرها"), False),  # eleven words
        ("كتب الولد", "الولد كتب", False),
    ],
)
def test_nearly_equal(chosen, rejected, found):
    assert bool(nearly_equal("سؤال", chosen, [rejected])) == found


def test_spelling_is_what_a_question_about_spelling_is_about():
    assert nearly_equal("صحح الإملاء: اين اخي؟", "أين أخي؟", ["اين اخى؟"]) is None


@pytest.mark.parametrize(
    ("prompt", "dialect"),
    [
        ("ترجم إلى العربية المصرية: Hello", "EGY"),
        ("ترجم الى اللهجة المصرية", "EGY"),
        ("بالعامية المصرية", "EGY"),
        ("اكتب باللهجة الخليجية", "GLF"),
        ("اكتب بالدارجة المغربية", "MAG"),
        ("قلها بالدارجة", "MAG"),
        ("باللهجة الشامية", "LEV"),
        ("أجب بالعراقي", "IRQ"),
        ("حوّل إلى العربية الفصحى", "MSA"),
        ("Answer in Egyptian Arabic.", "EGY"),
        ("حوّل من اللهجة المصرية إلى الفصحى", "MSA"),
        ("ترجم إلى العربية: Hello", None),
        ("ما معنى «شو» باللهجة الشامية؟", None),
        ("قارن بين الكلام باللهجة المصرية وباللهجة المغربية", None),
        ("اذكر أشهر الأكلات المصرية", None),
        ("اكتب عن الفريق السعودي", None),
    ],
)
def test_asked_dialect(prompt, dialect):
    assert asked_dialect(prompt) == dialect
