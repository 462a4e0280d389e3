"""JSON Schema of configuration files, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from arabic_qwen.config import METHOD_CONFIGS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _WithoutTitles(GenerateJsonSchema):
    """pydantic's, without a title that repeats each key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def method_schema(method: str) -> dict[str, Any]:
    """Schema of the YAML files of one method."""
    config = METHOD_CONFIGS[method]
    schema = config.model_json_schema(schema_generator=_WithoutTitles)
    properties = {name: field for name, field in schema["properties"].items() if not config.model_fields[name].exclude}
    properties["output_dir"]["default"] = f"./checkpoints/{method}"
    return {
        "$schema": _DIALECT,
        **schema,
        "properties": {"method": {"const": method, "description": "Training method"}, **properties},
        "required": ["method"],
    }


def any_schema() -> dict[str, Any]:
    """Schema of the YAML files of all methods: `method` decides which keys there are."""
    rules = [
        {
            "if": {"properties": {"method": {"const": method}}, "required": ["method"]},
            "then": {"$ref": f"#/$defs/{method}"},
        }
        for method in METHOD_CONFIGS
    ]
    definitions = {}
    for method in METHOD_CONFIGS:
        definitions[method] = method_schema(method)
        del definitions[method]["$schema"]
    return {
        "$schema": _DIALECT,
        "title": "Arabic Qwen",
        "type": "object",
        "properties": {"method": {"enum": list(METHOD_CONFIGS), "description": "Training method"}},
        "required": ["method"],
        "allOf": rules,
        "$defs": definitions,
    }
