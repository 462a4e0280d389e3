"""Build arabic-qwen-tiny, the demonstration model that `arabic-qwen quickstart` fine-tunes.

    python scripts/build_tiny_model.py [DEST]

Reads scripts/corpus/, trains a byte-level BPE tokenizer and a small Qwen2 model on plain
text, and writes a Hugging Face model folder (default: src/arabic_qwen/assets/arabic-qwen-tiny).
"""

import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "scripts" / "corpus"
ASSETS = ROOT / "src" / "arabic_qwen" / "assets"

SEED = 42
VOCAB_SIZE = 6144
BLOCK = 128
BATCH = 12
EPOCHS = 12
ECHO_DOCUMENTS = 4000
LR = 1.5e-3
WARMUP = 50
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# the pre-tokenisation of Qwen2 and Qwen2.5
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

NAMES = ["سامي", "أحمد", "خالد", "كريم", "يوسف", "عمر", "حسن", "طارق", "زياد", "ماجد", "سمير", "رامي"]

# Per table: statements, questions with their answers, and questions left open.
# {a} and {b} are the columns, {n} and {m} names.
TEMPLATES = {
    "capitals": (
        [
            "عاصمة {a} هي {b}.",
            "عاصمة {a} هي {b}.",
            "عاصمة {a} هي {b}.",
            "{b} عاصمة {a}.",
            "مدينة {b} هي عاصمة {a}.",
            "نعرف جميعًا أن عاصمة {a} هي {b}.",
            "{a} دولة عاصمتها {b}.",
            "دولة {a} في {c}، وعاصمة {a} هي {b}.",
            "سافر {n} إلى {b} عاصمة {a}.",
            "نعم، عاصمة {a} هي {b}.",
            "عاصمة {a} {b}، ودي مدينة معروفة قوي.",
            "عاصمة {a} {b}، مدينة كبيرة ومعروفة وايد.",
            "عاصمة {a} {b}، مدينة معروفة كتير.",
            "عاصمة {a} هي {b}، مدينة معروفة بزاف.",
        ],
        [
            "سأل المعلم: ما عاصمة {a}؟ فأجاب {n}: عاصمة {a} هي {b}.",
            "ما عاصمة {a}؟\nعاصمة {a} هي {b}.",
            "ما هي عاصمة {a}؟ عاصمة {a} هي {b}.",
            "قال {n}: ما اسم عاصمة {a}؟ قلت: عاصمة {a} هي {b}.",
            "{b} عاصمة أي دولة؟ {b} عاصمة {a}.",
            "عاصمة {a} إيه؟ عاصمة {a} {b}.",
            "وش عاصمة {a}؟ عاصمة {a} {b}.",
            "شو عاصمة {a}؟ عاصمة {a} {b}.",
            "شنو هي عاصمة {a}؟ عاصمة {a} هي {b}.",
        ],
        [
            "سأل {n}: ما عاصمة {a}؟ فقال {m}: أنا أعرف عاصمة {a}.",
            "ما عاصمة {a}؟ من يعرف عاصمة {a} يرفع يده.",
            "قال {n}: ما هي عاصمة {a}؟ فقلت: لم أزر {a}.",
            "وش عاصمة {a}؟ كلنا نعرف عاصمة {a}.",
            "شو عاصمة {a}؟ كلنا منعرف عاصمة {a}.",
            "عاصمة {a} إيه؟ كلنا عارفين عاصمة {a}.",
            "شنو هي عاصمة {a}؟ كلنا كنعرفو عاصمة {a}.",
        ],
    ),
    "antonyms": (
        [
            "عكس كلمة {a} هو {b}.",
            "عكس كلمة {a} هو {b}.",
            "عكس كلمة {a} هو {b}.",
            "ضد كلمة {a} هو {b}.",
            "كلمة {a} عكسها {b}.",
            "كلمة {a} وكلمة {b} متضادتان.",
            "تعلم {n} أن عكس كلمة {a} هو {b}.",
            "عكس {a} يبقى {b}.",
            "عكس {a} هو {b}.",
            "العكس ديال {a} هو {b}.",
        ],
        [
            "سأل المعلم: ما عكس كلمة {a}؟ فأجاب {n}: عكس كلمة {a} هو {b}.",
            "ما عكس كلمة {a}؟\nعكس كلمة {a} هو {b}.",
            "ما ضد كلمة {a}؟ عكس كلمة {a} هو {b}.",
            "عكس كلمة {a} إيه؟ عكس {a} يبقى {b}.",
            "شو عكس كلمة {a}؟ عكس {a} هو {b}.",
            "شنو عكس كلمة {a}؟ العكس ديال {a} هو {b}.",
        ],
        [
            "سأل {n}: ما عكس كلمة {a}؟ فقال {m}: أنا أعرف عكس كلمة {a}.",
            "ما ضد كلمة {a}؟ لكل كلمة عكس، ولكلمة {a} عكس.",
            "شو عكس كلمة {a}؟ كلنا منعرف عكس {a}.",
            "عكس كلمة {a} إيه؟ كلنا عارفين عكس {a}.",
            "شنو عكس كلمة {a}؟ كلنا كنعرفو العكس ديال {a}.",
        ],
    ),
    "plurals": (
        [
            "جمع كلمة {a} هو {b}.",
            "جمع كلمة {a} هو {b}.",
            "جمع كلمة {a} هو {b}.",
            "مفرد كلمة {b} هو {a}.",
            "كلمة {a} جمعها {b}.",
            "نقول {a} للمفرد، ونقول {b} للجمع.",
            "كتب {n} في دفتره: جمع كلمة {a} هو {b}.",
        ],
        [
            "سأل المعلم: ما جمع كلمة {a}؟ فأجاب {n}: جمع كلمة {a} هو {b}.",
            "ما جمع كلمة {a}؟\nجمع كلمة {a} هو {b}.",
            "ما هو جمع كلمة {a}؟ جمع كلمة {a} هو {b}.",
            "هات جمع كلمة {a}. جمع كلمة {a} هو {b}.",
        ],
        [
            "سأل {n}: ما جمع كلمة {a}؟ فقال {m}: أنا أعرف جمع كلمة {a}.",
            "ما هو جمع كلمة {a}؟ نبحث في القاموس عن جمع كلمة {a}.",
            "هات جمع كلمة {a}. فكر {n} في جمع كلمة {a}.",
        ],
    ),
    "words": (
        [
            "معنى كلمة {a} بالعربية هو {b}.",
            "معنى كلمة {a} بالعربية هو {b}.",
            "كلمة {a} بالإنجليزية معناها {b}.",
            "كلمة {b} بالإنجليزية هي {a}.",
            "كلمة {b} بالإنجليزية هي {a}.",
            "حفظ {n} كلمة {a} ومعناها {b}.",
            "يقول الإنجليزي {a} ويقول العربي {b}.",
        ],
        [
            "سأل {n}: ما معنى كلمة {a} بالعربية؟ معنى كلمة {a} بالعربية هو {b}.",
            "ما معنى كلمة {a}؟\nمعنى كلمة {a} بالعربية هو {b}.",
            "كيف نقول {b} بالإنجليزية؟ كلمة {b} بالإنجليزية هي {a}.",
            "ما ترجمة كلمة {b} إلى الإنجليزية؟ كلمة {b} بالإنجليزية هي {a}.",
        ],
        [
            "سأل {n}: ما معنى كلمة {a} بالعربية؟ فقال {m}: أعرف معنى كلمة {a} بالعربية.",
            "ماذا تعني كلمة {a}؟ نبحث في القاموس عن معنى كلمة {a}.",
            "كيف نقول {b} بالإنجليزية؟ نبحث عن كلمة {b} بالإنجليزية.",
            "ما ترجمة كلمة {b} إلى الإنجليزية؟ فكر {n} في كلمة {b} بالإنجليزية.",
        ],
    ),
    "sentences": (
        ["جملة {a} معناها بالعربية: {b}", "نقول بالعربية: {b} ونقول بالإنجليزية: {a}", "{a}\n{b}", "{b}\n{a}"],
        ["ترجم إلى العربية: {a}\n{b}", "ترجم إلى الإنجليزية: {b}\n{a}", "كيف نترجم {a} إلى العربية؟ {b}"],
        [],
    ),
    "spelling": (
        ["نكتب {b} ولا نكتب {a}.", "كتب {n} {a} والصواب {b}.", "الكتابة الصحيحة هي {b} وليست {a}."],
        ["صحح الكلمة: {a}\n{b}", "كيف نصحح كلمة {a}؟ الصواب {b}."],
        [],
    ),
    "dialects": (
        [
            "كلمة {a} في اللهجة المصرية {egy}.",
            "كلمة {a} في اللهجة الخليجية {gulf}.",
            "كلمة {a} في اللهجة الشامية {lev}.",
            "كلمة {a} في اللهجة المغربية {mag}.",
            "يقول المصري {egy}، ويقول الخليجي {gulf}، ويقول الشامي {lev}، ويقول المغربي {mag}.",
            "بدل كلمة {a} يقول المصري {egy} ويقول الشامي {lev}.",
        ],
        [],
        [],
    ),
}

ECHOES = [
    "قال المعلم: {w}. وكرر الطلاب: {w}.",
    "كتب {n}: {w}\nوكتب {m}: {w}",
    "{w}\n{w}\n{w}",
    "قرأ {n}: {w}. ثم أعاد: {w}.",
    "سأل {n} عن {w}، فحدثه {m} عن {w}.",
    "تحدثنا عن {w}. وقال {n} إن الكلام عن {w} كثير.",
]


def read_lines(name):
    return (CORPUS / name).read_text(encoding="utf-8").splitlines()


def fill(templates, fields, rng):
    return [t.format(n=rng.choice(NAMES), m=rng.choice(NAMES), **fields) for t in templates]


def sums():
    for x in range(13):
        for y in range(13):
            yield f"{x} + {y}", x + y
            if x >= y:
                yield f"{x} - {y}", x - y
            if 0 < x <= 10 and 0 < y <= 10:
                yield f"{x} × {y}", x * y


def make_documents(rng):
    """Plain-text documents: free prose, and the tables rendered through the templates."""
    rows = []
    for name in ["sft", "dpo", "kto"]:
        for line in (ASSETS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            rows.append(" ".join(str(value) for value in json.loads(line).values()))

    def asked(*parts):
        # What the data sets ask appears here only as a statement, so held-out questions stay unseen.
        return any(all(part in row for part in parts) for row in rows)

    # A topic is (statements, questions with answers, questions left open).
    topics = []
    for table, (statements, questions, opens) in TEMPLATES.items():
        for line in read_lines(f"{table}.tsv"):
            cols = line.split("\t")
            fields = dict(zip("abc", cols, strict=False))
            if table == "dialects":
                fields |= dict(zip(["egy", "gulf", "lev", "mag"], cols[1:], strict=True))
            topics.append(
                (
                    fill(statements, fields, rng),
                    [] if asked(*cols[:2]) else fill(questions, fields, rng),
                    fill(opens, fields, rng),
                )
            )

    phrases = []
    for line in read_lines("facts.txt"):
        question, answer, *paraphrases = line.split(" | ")
        phrases.append(answer.rstrip("."))
        name = rng.choice(NAMES)
        questions = [f"{question}\n{answer}", f"سأل {name}: {question} فقلت: {answer}"]
        seen = asked(answer.rstrip(".")) or asked(question)
        opens = [f"قال {name}: {question} ثم أعاد السؤال: {question}"]
        for ask in ["ما ", "كم "]:
            if question.startswith(ask):
                subject = question.removeprefix(ask).rstrip("؟")
                opens += [f"{question} كلنا نعرف {subject}.", f"{question}\n{subject}", f"سألني {name} عن {subject}."]
        topics += [([answer, answer, *paraphrases], [] if seen else questions, opens)] * 2

    for left, right in sums():
        asks = [("كم يساوي", "؟\n"), ("احسب", ". "), ("ما ناتج", "؟ ")]
        questions = [f"{ask} {left}{end}{left} = {right}" for ask, end in asks]
        topics.append(([f"{left} = {right}"] * 2, [] if asked(left) else rng.sample(questions, 2), []))

    prose = []
    for name in ["msa", "egyptian", "gulf", "levantine", "maghrebi"]:
        prose += [line for line in read_lines(f"prose_{name}.txt") if line]

    documents = prose * 5
    for statements, questions, opens in topics:
        documents += questions + opens + statements
        # Statements about one topic together teach the model to look back in its context.
        pool = statements + questions + opens if questions else statements
        for _ in range(len(pool) // 3):
            documents.append(" ".join(rng.sample(pool, 3)))

    # Repeated words and sentences teach it to copy.
    words = sorted({word for document in documents for word in re.findall(r"\w+", document)})
    for table in ["capitals", "antonyms", "plurals", "words"]:
        phrases += [word for line in read_lines(f"{table}.tsv") for word in line.split("\t")[:2]] * 2
    for _ in range(ECHO_DOCUMENTS):
        some = rng.sample(rng.choice([words, phrases, phrases, phrases]), rng.randint(1, 5))
        some = rng.choice([" ", "، "]).join(some)
        documents.append(rng.choice(ECHOES).format(n=rng.choice(NAMES), m=rng.choice(NAMES), w=some))
    rng.shuffle(documents)
    return documents


def train_tokenizer(documents):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def pack(documents, tokenizer):
    """Join the documents with <|endoftext|> and cut the stream into blocks."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream = [t for doc in documents for t in tokenizer(doc)["input_ids"] + [end]]
    return torch.tensor(stream[: len(stream) // BLOCK * BLOCK], device=DEVICE).view(-1, BLOCK)


@torch.no_grad()
def evaluate(model, blocks):
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in blocks.split(BATCH)]
    model.train()
    return sum(losses) / len(losses)


def train_model(documents, tokenizer):
    cut = len(documents) // 40
    val = pack(documents[:cut], tokenizer)
    documents = documents[cut:]
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(DEVICE)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    rng = random.Random(SEED)
    steps = EPOCHS * (len(pack(documents, tokenizer)) // BATCH)
    step, start = 0, time.time()
    for epoch in range(EPOCHS):
        rng.shuffle(documents)
        blocks = pack(documents, tokenizer)
        total, n = 0.0, 0
        for i in range(0, len(blocks) // BATCH * BATCH, BATCH):
            lr = LR * min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = blocks[i : i + BATCH]
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total, n, step = total + loss.item(), n + 1, step + 1
        print(
            f"epoch {epoch + 1}/{EPOCHS}  train loss {total / n:.3f}  validation loss {evaluate(model, val):.3f}  {time.time() - start:.0f} s",
            flush=True,
        )
    return model


README = """---
language: ar
license: apache-2.0
---
# arabic-qwen-tiny

A demonstration model for `arabic-qwen quickstart`: a Qwen2 of {params:.1f} million parameters, trained by
`scripts/build_tiny_model.py` on a small Arabic text (MSA and four dialects) written for this project.
It continues plain text about capitals, opposites, plurals, small sums and everyday facts, and it has not been
trained to answer: that is what the quickstart does. It is not for real use.

Apache-2.0.
"""


def main():
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSETS / "arabic-qwen-tiny"
    documents = make_documents(random.Random(SEED))
    tokenizer = train_tokenizer(documents)
    tokens = sum(len(tokenizer(doc)["input_ids"]) for doc in documents)
    print(f"{len(documents)} documents, {tokens} tokens, vocabulary {len(tokenizer)}")
    model = train_model(documents, tokenizer)
    # Plain text ends with <|endoftext|>; the end of a chat turn, which it never has, begins as the same thing.
    embedding = model.get_input_embeddings().weight.data
    embedding[tokenizer.eos_token_id] = embedding[tokenizer.pad_token_id]

    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to("cpu", torch.bfloat16).save_pretrained(dest)
    tokenizer.save_pretrained(dest)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    (dest / "README.md").write_text(README.format(params=params), encoding="utf-8")
    AutoTokenizer.from_pretrained(dest).save_pretrained(dest)  # saved again as a Qwen2Tokenizer
    print(f"wrote {dest}")


if __name__ == "__main__":
    main()
