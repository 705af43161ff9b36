"""AES and the platform's functions against published vectors."""

from dps_hal.host.aes import Aes128
from dps_hal.platform import aes128_cfb, from_json, hmac_sha256, random_bytes, same_bytes, sha256, to_json
from support.vectors import unhex


def test_aes_gives_the_blocks_of_fips_197():
    for key, block, expected in (
        (
            "2b7e151628aed2a6abf7158809cf4f3c",  # appendix B
            "3243f6a8885a308d313198a2e0370734",
            "3925841d02dc09fbdc118597196a0b32",
        ),
        (
            "000102030405060708090a0b0c0d0e0f",  # appendix C.1
            "00112233445566778899aabbccddeeff",
            "69c4e0d86a7b0430d8cdb78070b4c55a",
        ),
    ):
        assert Aes128(unhex(key)).encrypt(unhex(block)) == unhex(expected), f"key={key}"


def test_aes_refuses_other_key_and_block_lengths():
    for length in (0, 15, 17, 24, 32):
        assert is_refused(Aes128, bytes(length)), f"key length={length}"
        assert is_refused(Aes128(bytes(16)).encrypt, bytes(length)), f"block length={length}"


def test_cfb_gives_the_segments_of_sp_800_38a():
    key, iv = unhex("2b7e151628aed2a6abf7158809cf4f3c"), unhex("000102030405060708090a0b0c0d0e0f")  # F.3.13, F.3.14
    plain = unhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = unhex(
        "3b3fd92eb72dad20333449f8e83cfb4ac8a64537a0b3a93fcde3cdad9f1ce58b"
        "26751f67a3cbb140b1808cf187a4f4dfc04b05357c5d1c0eeac4c66f9ff7f2e6"
    )
    for length in (0, 1, 15, 16, 17, 18, 64):
        assert aes128_cfb(key, plain[:length], False, iv) == cipher[:length], f"length={length}"
        assert aes128_cfb(key, cipher[:length], True, iv) == plain[:length], f"length={length}"


def test_sha256_gives_the_digest_of_fips_180():
    assert sha256(b"abc") == unhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


def test_hmac_gives_the_digests_of_rfc_4231():
    for key, message, expected in (
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (
            b"\xaa" * 131,
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
    ):
        assert hmac_sha256(key, message) == unhex(expected), f"key length={len(key)}"


def test_random_bytes_differ():
    assert len(random_bytes(32)) == 32
    assert random_bytes(32) != random_bytes(32)


def test_same_bytes_compares_every_byte_and_the_length():
    assert same_bytes(b"", b"")
    assert same_bytes(b"abc", b"abc")
    for other in (b"", b"ab", b"abcd", b"Abc", b"abC"):
        assert not same_bytes(b"abc", other), f"other={other!r}"


def test_json_comes_back_as_it_went():
    value = {"hub": "a/b.azure-devices.net", "text": 'a"\\\n\u00e4', "n": [1, -2, 0, True, None], "empty": {}}
    text = to_json(value)
    assert "a/b" in text
    assert from_json(text) == value
    assert from_json(text.encode()) == value


def test_json_refuses_what_json_cannot_hold():
    for value in (float("nan"), float("inf"), [float("-inf")], {"a": {"b": [float("nan")]}}):
        assert is_refused(to_json, value), f"value={value!r}"


def test_text_that_is_no_json_is_refused():
    for text in (b"", b"\xff{}", b"NaN", b"[Infinity]", b"<html></html>"):
        assert is_refused(from_json, text), f"text={text!r}"


def is_refused(function, argument):
    try:
        function(argument)
    except ValueError:
        return True
    return False
