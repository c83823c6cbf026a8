"""JSON Schema of pipeline files, for editors."""

from typing import Any

from compress.config.schema.pipeline import PipelineConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
IDENTIFIER = "urn:compress:pipeline"


def json_schema() -> dict[str, Any]:
    """Return the schema, with `$schema` and `$id`; stages are distinguished by their key `stage`."""
    return {"$schema": DRAFT, "$id": IDENTIFIER, "title": "compress pipeline"} | {
        key: value for key, value in PipelineConfig.model_json_schema().items() if key != "title"
    }
