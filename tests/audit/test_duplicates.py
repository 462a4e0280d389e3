"""Copies are found, exact and near, inside a file and across two; other rows are not taken for copies."""

import random

import pytest

from arabic_qwen.audit.duplicates import SIMILAR, Duplicates, Text, exact_key

WORDS = "كتاب مدرسة طريق بحر جبل مدينة قرية شمس قمر نجم ليل نهار ماء نار هواء تراب شجر زهر طير سمك خبز ملح سكر زيت"


def words(generator, number):
    return [f"{generator.choice(WORDS.split())}{generator.randrange(50)}" for _ in range(number)]


def find(*files):
    duplicates = Duplicates()
    for number, rows in enumerate(files):
        duplicates.add(number, [Text.of(*row) for row in rows], [hash(row) % 2**64 for row in rows])
    pairs = [
        [(copy.row, copy.original, copy.similarity) for copy in found]
        for found in (duplicates.inside(), duplicates.across())
    ]
    return pairs


def test_nothing():
    assert find() == [[], []]
    assert find([]) == [[], []]
    assert find([("سؤال", "جواب")]) == [[], []]


def test_spelling_variants_are_equal():
    inside, across = find(
        [("ما عاصمة الأردن؟", "عَمّان"), ("كم؟", "ثلاثة"), ("ما عاصمه الاردن?", "عمان"), ("ما عاصمة الأردن؟", "عمّان")]
    )
    assert inside == [(2, 0, 1.0), (3, 0, 1.0)]
    assert across == []


def test_only_rows_that_are_equal_to_the_letter_are_exact():
    duplicates = Duplicates()
    rows = [{"instruction": "ما عاصمة الأردن؟", "response": answer} for answer in ("عمّان", "عمان", "عمّان")]
    duplicates.add(0, [Text.of(*row.values()) for row in rows], [exact_key({**row, "id": 7}) for row in rows])
    assert {copy.row: copy.exact for copy in duplicates.inside()} == {1: False, 2: True}


def test_the_white_space_of_code_matters():
    assert find([("اشرح", "`a  b` نعم"), ("اشرح", "`a b` نعم"), ("اشرح", "`a b`  نعم")])[0] == [(2, 1, 1.0)]


def test_across_files_the_prompt_is_enough():
    inside, across = find([("من؟", "أنا"), ("أين؟", "هنا")], [("أين؟", "هناك"), ("متى؟", "الآن"), ("من؟", "أنا")])
    assert inside == []
    assert sorted(across) == [(2, 1, 0.0), (4, 0, 1.0)]


def test_rows_of_different_kinds_are_no_copies():
    inside, _ = find([("من؟", "أنا", "True"), ("من؟", "أنا", "False")])
    assert inside == []


def test_order_within_a_row_matters():
    assert find([("من؟", "أنا"), ("أنا", "من؟")]) == [[], []]


@pytest.mark.parametrize("length", [60, 100, 400])
def test_one_other_word_in_a_long_text_is_a_near_copy(length):
    generator = random.Random(length)
    text = words(generator, length)
    changed = [*text]
    changed[length // 2] = "مختلف"
    ((row, original, similarity),), _ = find(
        [("اشرح.", " ".join(text)), ("سؤال آخر", "جواب"), ("اشرح.", " ".join(changed))]
    )
    assert (row, original) == (2, 0)
    exact = (length - 3) / (length + 3)
    assert SIMILAR <= similarity < 1 or abs(similarity - exact) < 0.1


def near_copies(generator, number, prompt="اشرح."):
    """One word of a hundred differs."""
    text = words(generator, 100)
    return [(prompt, " ".join([*text[:place], f"مختلف{place}", *text[place + 1 :]])) for place in range(number)]


@pytest.mark.parametrize(("rows", "copies"), [(200, 30), (1000, 60), (2500, 99)])
def test_many_near_copies_of_one_row_do_not_hide_each_other(rows, copies):
    generator = random.Random(0)
    cluster = near_copies(generator, copies)
    others = [(f"سؤال {number}", " ".join(words(generator, 40))) for number in range(rows - copies)]
    mixed = generator.sample(cluster + others, rows)
    places = [place for place, row in enumerate(mixed) if row in cluster]
    inside, _ = find(mixed)
    found = {row for row, *_ in inside}
    assert found <= set(places[1:]) and len(found) > 0.9 * copies


def test_near_copies_that_are_asked_for_with_a_template_are_found():
    generator = random.Random(0)
    template = "أنت كاتب ماهر يكتب بالعربية الفصحى. اكتب قصة عن"
    rows = [(f"{template} {word}", " ".join(words(generator, 60))) for word in words(generator, 60)]
    rows += near_copies(generator, 2, f"{template} البحر")
    assert [pair[:2] for pair in find(rows)[0]] == [(61, 60)]


@pytest.mark.parametrize("batch", [1, 30, 999])
def test_it_makes_no_difference_how_rows_are_added(batch):
    generator = random.Random(0)
    rows = [(f"ترجم إلى العربية: {' '.join(words(generator, 30))}", "نعم") for _ in range(1100)]
    texts = [Text.of(*row) for row in [*rows, *near_copies(generator, 30)]]
    whole, parts = Duplicates(), Duplicates()
    whole.add(0, texts, range(len(texts)))
    for start in range(0, len(texts), batch):
        parts.add(0, texts[start : start + batch], range(len(texts))[start : start + batch])
    assert whole.inside() == parts.inside() != []


def test_near_copies_across_files():
    text = words(random.Random(0), 100)
    _, across = find([("اشرح.", " ".join(text))], [("وضّح.", " ".join(text))])
    assert [pair[:2] for pair in across] == [(1, 0)]


def test_translations_of_different_sentences_are_no_copies():
    generator = random.Random(0)
    rows = [(f"ترجم إلى العربية: {' '.join(words(generator, 8))}", " ".join(words(generator, 8))) for _ in range(3000)]
    rows += [("ترجم إلى العربية: Add a new page to the list", "أضف صفحة جديدة إلى القائمة")]
    rows += [("ترجم إلى العربية: Add a new user to the list", "أضف مستخدمًا جديدًا إلى القائمة")]
    assert find(rows) == [[], []]


def test_rows_of_one_long_template_are_no_copies():
    generator = random.Random(0)
    template = "أنت مساعد يصنّف الجمل. اقرأ الجملة ثم قل إن كانت إيجابية أو سلبية أو محايدة، ولا تكتب غير ذلك. " * 3
    rows = [(f"{template} الجملة: {' '.join(words(generator, 5))}", "إيجابية") for _ in range(100)]
    assert find(rows) == [[], []]


def test_two_questions_about_one_long_text_are_no_copies():
    text = " ".join(words(random.Random(0), 300))
    rows = [(f"{text} من كتب هذا؟", "الجاحظ"), (f"{text} متى كتب هذا؟", "في القرن الثالث")]
    assert find(rows) == [[], []]


def test_the_estimate_is_close_to_the_jaccard_similarity():
    """Pairs far above the threshold are found, pairs far below are not."""
    generator = random.Random(0)
    rows, near = [], set()
    for number in range(300):
        text = words(generator, 120)
        changed = [*text]
        copies = number % 2  # one other word: 0.95; twenty: 0.36 or so
        for position in range(3, 120, 120 if copies else 6):
            changed[position] = "مختلف"
        rows += [("اشرح.", " ".join(text)), ("اشرح.", " ".join(changed))]
        near |= {2 * number + 1} if copies else set()
    inside, _ = find(rows)
    assert {row for row, *_ in inside} == near


def test_an_estimate_of_one_makes_no_copy_equal():
    text = words(random.Random(0), 1000)
    inside, _ = find([("اشرح.", " ".join(text)), ("اشرح.", " ".join([*text, "أخير"]))])
    assert inside == [(1, 0, 0.99)]
