"""The blob parser under any bytes: a parsed blob that joins to its input again, or one of two errors."""

from __future__ import annotations

from hypothesis import event, given, settings
from hypothesis import strategies as st

from dps_hal.errors import AskOperator, IdentityStale, RetryLater
from dps_hal.tpm.activation import Activation, join_activation, parse_activation, split_activation
from dps_hal.tpm.keys import parse_keyedhash_public, unwrap
from support.vectors import load, unbase64

BLOBS = [unbase64(published["blob"]) for published in load("published")["activation"]]
BLOBS.append(unbase64(load("activation")["blob_base64"]))
SIZE_OFFSETS = (0, 2, 54, 312, 314, 456, 714, 724, 730, 764)

blobs = st.sampled_from(BLOBS)
two_bytes = st.binary(min_size=2, max_size=2)


def overwrite(blob: bytes, offset: int, content: bytes) -> bytes:
    return blob[:offset] + content + blob[offset + len(content) :]


truncated = st.builds(lambda blob, length: blob[:length], blobs, st.integers(0, 960))
extended = st.builds(lambda blob, more: blob + more, blobs, st.binary(min_size=1, max_size=40))
mutated = st.builds(overwrite, blobs, st.integers(0, 950), st.binary(min_size=1, max_size=8))
resized = st.builds(overwrite, blobs, st.sampled_from(SIZE_OFFSETS), two_bytes)
rekeyed = st.builds(overwrite, blobs, st.integers(716, 731), st.binary(min_size=1, max_size=2))
cut_out = st.builds(
    lambda blob, start, count: blob[:start] + blob[start + count :], blobs, st.integers(0, 950), st.integers(1, 60)
)
joined = st.builds(
    lambda first, offset, second: first[:offset] + second[offset:],
    blobs,
    st.sampled_from((54, 312, 456, 714, 764)),
    blobs,
)
refitted = st.builds(
    lambda identity, wrapped, uri, blob: join_activation(
        split_activation(blob)._replace(
            credential=split_activation(blob).credential[:34] + identity,
            duplicate=split_activation(blob).duplicate[:34] + wrapped,
            encrypted_uri=uri,
        )
    ),
    st.binary(max_size=40),
    st.binary(max_size=300),
    st.none() | st.binary(max_size=300),
    blobs,
)
any_blob = st.one_of(
    st.binary(max_size=1000), blobs, truncated, extended, mutated, resized, rekeyed, cut_out, joined, refitted
)


@settings(max_examples=3000, deadline=None)
@given(any_blob)
def test_any_blob_joins_again_or_is_malformed_or_unsuitable(blob: bytes) -> None:
    try:
        activation = parse_activation(blob)
    except RetryLater as error:
        event("malformed")
        assert error.code == "dps.blob_malformed"
        assert error.message.startswith("the key that DPS sent: ")
        return
    except AskOperator as error:
        event("unsuitable")
        assert error.code == "dps.key_unsuitable"
        assert join_activation(split_activation(blob)) == blob
        return
    event("parsed")
    assert isinstance(activation, Activation)
    assert join_activation(activation) == blob


@settings(max_examples=2000, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300), st.builds(lambda blob, rest: blob[714:764] + rest, blobs, st.binary(max_size=200))
    )
)
def test_any_wrapped_key_comes_apart_or_is_stale(wrapped_key: bytes) -> None:
    try:
        public, private = unwrap(wrapped_key)
    except IdentityStale as error:
        assert error.code == "tpm.key_stale"
        return
    assert public + private == wrapped_key


@settings(max_examples=2000, deadline=None)
@given(
    st.one_of(st.binary(max_size=100), st.builds(overwrite, st.just(BLOBS[2][714:764]), st.integers(0, 49), two_bytes))
)
def test_any_public_area_has_fields_or_is_a_value_error(public: bytes) -> None:
    try:
        fields = parse_keyedhash_public(public)
    except ValueError:
        return
    assert fields.attributes == int.from_bytes(public[6:10], "big")
