#!/usr/bin/env bash
# pydantic 2.14.4 (the bodies of requests in FastAPI).
# Seen, from JSON into int, float and bool: "5", "5.0", " 7 ", "1_000" and true are whole numbers (5, 5, 7,
#   1000, 1), and so is 1e3, but "1e3" is refused; "1_0.5" is the float 10.5; "off", "f", "0" and 0.0 are False.
#   A whole number of 23 digits passes as an int, 1e30 does not. ge and le refuse nan, multiple_of lets it pass.
#   Written, nan and inf become null.
# A good guess: "5" and 5.0 are taken, as the docs' table says; underscores are Python's source code, not
#   JSON's; true is no number; nan fails any bound; what a model wrote it can read again.
# Why it matters: the field's clients send max_tokens as text, and strict servers refuse what this takes: a
#   request that works here is no proof of a right client. A score or a time that is nan arrives as null.
#   ConfigDict(strict=True) takes none of them (an int for a float excepted).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile pydantic==2.14.4
"$folder/venv/bin/python" - <<'PY'
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Request(BaseModel):
    max_tokens: int | None = None
    temperature: float | None = Field(None, ge=0)
    step: float | None = Field(None, multiple_of=0.5)
    stream: bool | None = None


class StrictRequest(Request):
    model_config = ConfigDict(strict=True)


def read(model, name, text):
    """The value that the field gets from this JSON text, or 'refused'."""
    try:
        return getattr(model.model_validate_json(f'{{"{name}": {text}}}'), name)
    except ValidationError:
        return 'refused'


expected = {
    'max_tokens': {'"5"': 5, '"5.0"': 5, '" 7 "': 7, '"1_000"': 1000, 'true': 1, '1e3': 1000, '"1e3"': 'refused',
                   '12345678901234567890123': 12345678901234567890123, '1e30': 'refused'},
    'temperature': {'"1_0.5"': 10.5, 'true': 1.0, 'NaN': 'refused'},
    'stream': {'"off"': False, '"f"': False, '"0"': False, '0.0': False, '2': 'refused'},
}
for name, values in expected.items():
    for text, value in values.items():
        seen, strict = read(Request, name, text), read(StrictRequest, name, text)
        print(f'{name}: {text} -> {seen!r}, strict {strict!r}')
        assert seen == value and type(seen) is type(value)
        assert strict == 'refused' or text == '12345678901234567890123'

step = read(Request, 'step', 'NaN')
print('multiple_of=0.5 and NaN ->', step)
assert step != step
back = Request(temperature=float('inf'), step=float('nan')).model_dump_json(exclude_none=True)
print('inf and nan written:', back)
assert back == '{"temperature":null,"step":null}'
PY
