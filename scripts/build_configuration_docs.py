"""Writes docs/configuration.md from the configuration classes.

    python scripts/build_configuration_docs.py

`tests/test_docs.py` fails when the file is not what this writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.config.schema import method_schema

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

Every key of every method. `arabic-qwen init METHOD` prints them as YAML to edit; from Python they are arguments of
`SFTConfig`, `DPOConfig` and so on (`arabic_qwen.config`). Unknown keys, bad values and contradictions are errors that
name the line.

```bash
arabic-qwen init sft > sft.yaml
arabic-qwen schema > arabic-qwen.schema.json
```

With the schema an editor that knows yaml-language-server (VS Code, Neovim, Emacs …) completes keys, shows these
descriptions and underlines mistakes. First line of the YAML file:

```yaml
# yaml-language-server: $schema=arabic-qwen.schema.json
method: sft
```

- `arabic-qwen train sft.yaml learning_rate=1e-4` overrides a value.
- `${NAME}` and `${NAME:-default}` in values come from the environment; `$${` is a plain `${`. Secrets
  (variables such as `HF_TOKEN`) are refused: no setting holds one.
- `1e-5` is a number, `no` is the word, and a key that is there twice is an error.

This page is made by `scripts/build_configuration_docs.py`.
"""

_SIGNS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}


def page() -> str:
    """The whole page."""
    properties = {method: method_schema(method)["properties"] for method in METHOD_CONFIGS}
    common = [name for name in BaseConfig.model_fields if name in properties["sft"]]
    parts = [HEAD, "## All methods\n", _table(common, properties["sft"], sections=True)]
    for method, config in METHOD_CONFIGS.items():
        own = [
            name
            for name, field in properties[method].items()
            if name not in ("method", "output_dir") and (name not in common or field != properties["sft"][name])
        ]
        about = (config.__doc__ or "").strip().splitlines()[0]
        parts += [f"## {method}\n", f"{about}\n", _table(own, properties[method])]
    return "\n".join(parts)


def _table(names: list[str], properties: dict[str, Any], sections: bool = False) -> str:
    head = ["| key | type | default | |", "|---|---|---|---|"]
    lines = [] if sections else list(head)
    for name in names:
        if sections and name in BaseConfig.sections:
            lines += ["", f"### {BaseConfig.sections[name]}", "", *head]
        field = properties[name]
        default = "`./checkpoints/<method>`" if name == "output_dir" else f"`{json.dumps(field['default'])}`"
        description = re.sub(r"([|<])", r"\\\1", field["description"])
        lines.append(f"| `{name}` | {_type(field)} | {default} | {description} |")
    return "\n".join(lines).strip("\n") + "\n"


def _type(field: dict[str, Any]) -> str:
    """What a key takes: its choices, or its type and range."""
    limits = ", ".join(sign.format(field[key]) for key, sign in _SIGNS.items() if key in field)
    if "anyOf" in field:
        return f"{' or '.join(_type(option) for option in field['anyOf'])} {limits}".rstrip()
    if "enum" in field or "const" in field:
        choices = field.get("enum", [field.get("const")])
        return ", ".join(f"`{choice if isinstance(choice, str) else json.dumps(choice)}`" for choice in choices)
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    name = {"string": "text", "boolean": "true/false", "null": "`null`"}.get(field["type"], field["type"])
    return f"{name} {limits}".rstrip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
