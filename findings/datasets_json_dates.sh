#!/usr/bin/env bash
# datasets: JSON strings that look like dates are read as times, by part of the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet datasets==5.2.0 pyarrow==26.0.1
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets
import pyarrow

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
DATE = {"prompt": "متى كانت الحرب؟", "answer": "1973-10-06"}
TEXT = {"prompt": "متى كان ذلك؟", "answer": "لا أعرف"}
MANY = 200_000  # rows; a file is read in parts of 10 MB, and each part is given types anew


def read(name, rows, **options):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    options["cache_dir"] = str(folder / "cache")
    return datasets.load_dataset("json", data_files=str(path), split="train", **options)


strings = datasets.Features({name: datasets.Value("string") for name in DATE})
only_dates = read("only_dates", [DATE] * 3)[0]["answer"]
as_strings = read("as_strings", [DATE] * 3, features=strings)[0]["answer"]
text_first = read("text_first", [TEXT] + [DATE] * MANY)
answers = {text_first[row]["answer"] for row in (1, MANY)}
try:
    read("dates_first", [DATE] * MANY + [TEXT])
    dates_first = "read"
except datasets.exceptions.DatasetGenerationError as error:
    dates_first = f"refused: {error.__cause__}"

print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
print(f'expected: the JSON string "{DATE["answer"]}" is the str {DATE["answer"]!r}, wherever it stands')
print(f"seen:     in a column of dates it is {only_dates!r}")
print(f"          with features that say string it is {as_strings!r}")
print(f"          after a row with other text it is, by its place in the file, one of {sorted(answers)}")
print(f"          before a row with other text the file is {dates_first}")
print("so:       read the lines with json.loads, and give them to Dataset.from_list")
as_stated = not isinstance(only_dates, str) and as_strings != DATE["answer"] and len(answers) == 2
sys.exit(0 if as_stated and dates_first != "read" else 1)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/show.py" "$folder"
