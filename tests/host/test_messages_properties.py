"""Messages from anybody: read or refused, never anything else, and what was read is written back unchanged."""

from typing import Any

from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from dps_agent.messages import FIELDS, DeviceRegistrationResult, decode, encode, fields_of
from dps_hal.errors import RetryLater
from dps_hal.platform import NESTING_LIMIT, from_json, nesting, to_json
from support.vectors import load

EXAMPLES = 2000
names = sorted({name for kind in FIELDS for name, _ in fields_of(kind)} | {"generationId", ""})
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names) | text, inner, max_size=5),
    max_leaves=12,
)
json_object = st.dictionaries(st.sampled_from(names) | text, json_value, max_size=8)
message = st.sampled_from(sorted(FIELDS, key=lambda kind: kind.__name__))


def without_nulls(kind: Any, value: dict[str, Any]) -> dict[str, Any]:
    """`value` as `encode` writes it: a null in a known field is an absent one."""
    fields = dict(fields_of(kind))
    out = {}
    for name, field in value.items():
        if name in fields and field is None:
            continue
        nested = fields.get(name)
        out[name] = without_nulls(nested, field) if nested is not None and not isinstance(nested, str) else field
    return out


@given(message, json_object)
@effort(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_any_object_is_read_and_written_back_or_refused_by_field(kind: Any, value: dict[str, Any]) -> None:
    try:
        read = decode(kind, to_json(value).encode())
    except RetryLater as error:
        assert error.code == "dps.malformed_answer" and error.message.startswith(f"{kind.__name__}.")
        return
    assert from_json(encode(read)) == without_nulls(kind, value)


@given(message, st.binary(max_size=200))
@effort(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_any_bytes_are_read_or_refused(kind: Any, body: bytes) -> None:
    try:
        encode(decode(kind, body))
    except RetryLater as error:
        assert error.code == "dps.malformed_answer" and error.message.isprintable()


SAMPLE = to_json(load("status_lookup")["maximum_response"]).encode()


@given(st.integers(0, len(SAMPLE) - 1), st.binary(max_size=3), st.integers(0, 4))
@effort(max_examples=EXAMPLES, deadline=None, derandomize=True)
def test_a_damaged_sample_is_read_or_refused(place: int, patch: bytes, drop: int) -> None:
    try:
        encode(decode(DeviceRegistrationResult, SAMPLE[:place] + patch + SAMPLE[place + drop :]))
    except RetryLater as error:
        assert error.code == "dps.malformed_answer"


@given(st.integers(0, 60), st.sampled_from(("[", '{"a":')))
@effort(max_examples=200, deadline=None, derandomize=True)
def test_nesting_up_to_the_limit_is_read_and_beyond_refused(depth: int, opening: str) -> None:
    body = ('{"payload":' + opening * depth + "1" + ("]" if opening == "[" else "}") * depth + "}").encode()
    assert nesting(body) == depth + 1
    try:
        decode(DeviceRegistrationResult, body)
        assert depth + 1 <= NESTING_LIMIT
    except RetryLater:
        assert depth + 1 > NESTING_LIMIT
