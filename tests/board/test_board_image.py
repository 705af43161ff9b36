"""What goes into a board's flash: which files, how large, and what runs of them under the other interpreter."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from dps_deploy.copying import CopyError, copy
from dps_deploy.flash_image import littlefs_image
from dps_deploy.heap import IN_FILES_KIB
from dps_deploy.modules import BUSES, PROGRAM, compiled, for_a_board, for_board
from dps_emulator.enrollments import read_enrollments
from dps_emulator.service import Settings
from dps_hal.platform import sha256
from support.board.compiled import CHECKOUT, Image, board_sources, build, der
from support.board.serial_board import HEAP, SerialBoard, boot
from support.cloud.emulator import EmulatorInThread
from support.cloud.ntp import NtpServer
from support.documents import blocks_of
from support.tpm.swtpm import Swtpm

MICROPYTHON = str(Path(sys.executable).with_name("micropython"))
# Bytes of .mpy of a board with SPI and littlefs, and of its errors' words: what there is, and hardly more.
CODE_LIMIT = 84 * 1024
TEXTS_LIMIT = 4_150
BUNDLES = {"dps_base.py", "dps_registration.py", "dps_hub.py"}
EK_CERTIFICATE_INDEX = 0x01C00002


def test_the_compiled_files_stay_small() -> None:
    """Three bundles, what is loaded for a moment, and the heads of packages that name what is public."""
    sources = for_board(PROGRAM, without=[BUSES["i2c"]]).packages
    sizes = {path: len(compiled(source, path)) for path, source in sources.items()}
    for path, size in sorted(sizes.items()):
        print(f"{size:6d} {path}")
    texts = sizes.pop("dps_texts.py")
    print(f"{sum(sizes.values()):6d} in all, and {texts} of texts")
    assert {path for path in sizes if "/" not in path} == BUNDLES
    code = sum(sizes.values())
    assert code <= CODE_LIMIT and texts <= TEXTS_LIMIT, f"{code}, {texts}"
    assert "dps_texts.py" not in for_board(PROGRAM, texts=False).packages


def test_nothing_happens_when_a_boards_file_is_loaded(image: Image, tmp_path: Path) -> None:
    """No file, socket, pin or task at import: the modules that could make one are not even there."""
    sources = board_sources()
    paths = [path for path in [*sources.programs, *sources.packages] if not path.startswith("board_")]
    modules = [path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in paths]
    program = (
        "import sys, builtins\n"
        "def refuse(*_): raise Exception('at import')\n"
        "import socket, ssl, os, asyncio, select\n"
        "builtins.open = refuse\n"
        "sys.modules['machine'] = sys.modules['network'] = None\n"
        f"for name in {sorted(set(modules) - {'main'})!r}:\n    __import__(name)\n"
        "print(asyncio.core.cur_task, len(sys.modules))\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", program],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("None "), done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_only_a_type_checker_reads_and_the_names_of_private_constants_are_left_out_line_for_line() -> None:
    source = '"""A."""\n\nTYPE_CHECKING = False\nif TYPE_CHECKING:\n    from typing import Any\nelse:\n    B = 1\n'
    kept = for_a_board(source)
    assert kept == '"""A."""\n\n\nif False:\n    from typing import Any\nelse:\n    B = 1\n'
    names = '_LIMIT = 1 << 4  # bytes\n_NAME = "a = b"\n_TABLE = {1: 2}\nLIMIT = 3\nx = _LIMIT + f(_NAME)\n'
    kept = names.replace("1 << 4", "const(1 << 4)").replace('"a = b"', 'const("a = b")')
    assert for_a_board(names) == kept
    assert b"LIMIT" in compiled("LIMIT = 16\n", "a.py") and b"LIMIT" not in compiled("_LIMIT = 16\n", "a.py")
    for path, source in board_sources().packages.items():
        assert "TYPE_CHECKING" not in source and "MICROPYTHON" not in source, path


@pytest.mark.parametrize(
    ("raised", "resets"),
    [("ValueError('x')", True), ("Broken('agent.bug', 'x')", True), ("AskOperator('config.invalid', 'x')", False)],
)
def test_whatever_ends_the_example_unforeseen_resets_the_board(image: Image, raised: str, resets: bool) -> None:
    program = (
        "import sys, app\n"
        "from dps_hal.errors import AskOperator, Broken\n"
        "class machine:\n    reset = staticmethod(lambda: print('reset'))\n"
        "sys.modules['machine'] = machine\n"
        f"async def run():\n    raise {raised}\n"
        "app.run, app.RESET_AFTER_S = run, 0\n"
        "app.main()\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", program],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and (lines[-1:] == ["reset"]) == resets, done.stdout + done.stderr
    assert not resets or ("reset within 0 s" in lines[-2] and raised[:5] in done.stdout)


@pytest.mark.parametrize("texts", [True, False])
def test_an_error_has_its_words_where_they_are_and_its_number_and_values_where_not(tmp_path: Path, texts: bool) -> None:
    image = build(tmp_path / "image", texts)
    program = (
        "import sys\n"
        "from dps_hal.errors import AskOperator\n"
        "from dps_hal.store.littlefs import LittleFsStore\n"
        "from dps_board.config import load\n"
        "try:\n load('nowhere.json')\n"
        "except AskOperator as error:\n print(error.code, error, sorted(sys.modules)[-1][:9])\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", program],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    table = [line[5:] for line in deploy_prints("--texts").splitlines()[1:]]
    number = table.index("{}: cannot be read: error {}")
    said = "nowhere.json: cannot be read: error 2" if texts else f"({number}) nowhere.json, 2"
    assert done.stdout.startswith(f"config.unreadable {said} "), done.stdout + done.stderr
    assert "dps_texts" not in done.stdout


def test_a_traceback_can_be_read_by_the_names_that_the_deploy_tool_prints(image: Image, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from dps_board.config import load\n"
        "try:\n load('nowhere.json')\nexcept Exception as error:\n sys.print_exception(error)\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", program],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "config.unreadable" in done.stdout, done.stdout + done.stderr
    public, private = re.findall(r'File "dps_board/config.py", line 1, in (\w+)\n', done.stdout)
    full = dict(line.split(" ", 1) for line in deploy_prints("--names").splitlines())
    assert public == "load" and full[private] == "dps_board.config._content"
    assert "dps_agent.driver.Driver._ask_date" in full.values()


def deploy_prints(option: str) -> str:
    """What tools/deploy prints for every board."""
    done = subprocess.run(
        [sys.executable, "tools/deploy", option],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_the_pieces_work_under_micropython() -> None:
    pieces = "tests/board/test_board_pieces.py"
    done = subprocess.run(
        [MICROPYTHON, "tests/support/run_shared.py", pieces],
        env={**os.environ, "MICROPYPATH": "micropython:.frozen"},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    count = (CHECKOUT / pieces).read_text().count("\ndef test_")
    assert done.stdout.splitlines()[-1:] == [f"{count} passed, 0 failed"], done.stdout + done.stderr


DER = b"\x30\x82\x00\x03\x02\x01\x01"  # as far as a board looks at a certificate


@pytest.fixture
def with_certificate(tmp_path: Path) -> Any:
    with Swtpm(tmp_path / "tpm") as swtpm:
        swtpm.write_nv(EK_CERTIFICATE_INDEX, DER + b"\xff" * 20)
        yield swtpm


def test_the_factorys_line_can_be_imported(image: Image, with_certificate: Swtpm, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "root.pem"))
    (tmp_path / "roots.der").write_bytes(der(tmp_path / "root.pem"))
    (tmp_path / "config.json").write_text(json.dumps({"id_scope": "0ne0", "tpm": {"tcti": with_certificate.tcti}}))
    done = subprocess.run(
        [MICROPYTHON, "-c", "import dps_board.factory as f; f.print_enrolment()"],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (enrolment,) = read_enrollments(done.stdout).enrollments
    assert len(enrolment.registration_id) == 52 and len(enrolment.endorsement_key) == 316
    digest = sha256(DER).hex()
    assert done.stdout.splitlines()[1].split(",")[2:] == ["wire", digest]
    assert with_certificate.leftovers() == []


IMAGE_BYTES = 320 * 1024
CONNECTED = "connected to emulator.azure-devices.net"


class Bench:
    """A TPM on SPI, a service, and what deploys to the board between them."""

    def __init__(self, folder: Path, stack: ExitStack, **settings: Any) -> None:
        self.folder = folder
        self.flash = folder / "flash.img"
        self.settings = folder / "board.toml"
        self.swtpm = stack.enter_context(Swtpm(folder / "tpm"))
        self.ntp = stack.enter_context(NtpServer())
        service = EmulatorInThread(Settings(retry_after_s=0, **settings), state_dir=folder / "cloud")
        self.emulator = stack.enter_context(service)
        self.write_settings()

    def write_settings(self, more: str = "") -> None:
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nconnect_to = "{self.emulator.connect_to}"\n'
            f'ca_file = "{self.emulator.ca_file}"\n[hub]\nconnect_to = "{self.emulator.hub_connect_to}"\n'
            f'[board]\nntp_server = "{self.ntp.address}"\n{more}'
        )

    def deployed(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """What tools/deploy prints, and its exit status."""
        built_at_s = int(time.time()) - 30 * 86400
        return subprocess.run(
            [sys.executable, "tools/deploy", str(self.settings), *words],
            env={**os.environ, "SOURCE_DATE_EPOCH": str(built_at_s)},
            cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def deploy(self, *words: str) -> str:
        """What tools/deploy prints."""
        done = self.deployed(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serial_board(self, cut_after: int = -1, fat: bool = False, heap: str = HEAP) -> SerialBoard:
        return SerialBoard(self.flash, self.swtpm.port, cut_after, fat, heap)

    def boot(self, until: str = "") -> str:
        return boot(self.flash, self.swtpm.port, until)


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack, **getattr(request, "param", {"enroll_any": True}))


def test_a_board_boots_from_the_image_and_gets_its_hub_by_a_tpm_on_spi(bench: Bench) -> None:
    bench.deploy("--image", str(bench.flash), "--image-size", str(IMAGE_BYTES))
    said = bench.boot(until=CONNECTED)
    assert "provisioning: no assignment is stored" in said, said
    asked = len(bench.emulator.log)
    assert asked > 0
    said = bench.boot(until=CONNECTED)
    assert "provisioning" not in said, said
    operations = [line.operation for line in bench.emulator.log[asked:]]
    assert operations == [""], "a record in the image holds over a reboot, DPS says the Date and no more"


MOUNT = """
import os, sys, vfs
from support.board import board_life
board_life.BLOCKS = os.stat(sys.argv[1])[6] // board_life.BLOCK_BYTES
flash = board_life.FileFlash(sys.argv[1])
for written in (b"", b"new" * 400):
    vfs.mount(vfs.VfsLfs2(flash, progsize=int(sys.argv[2]), readsize=int(sys.argv[2])), "/flash")
    with open("/flash/lib/old", "rb") as file:
        assert file.read() == bytes(range(256)) * 9
    if written:
        with open("/flash/new", "rb") as file:
            assert file.read() == written
    with open("/flash/new", "wb") as file:
        file.write(b"new" * 400)
    vfs.umount("/flash")
print("reads and writes")
"""


@pytest.mark.parametrize("programmed_at_once", [32, 128, 256])
def test_a_firmware_mounts_and_writes_the_image_whatever_it_programs_at_once(
    tmp_path: Path, programmed_at_once: int
) -> None:
    (tmp_path / "mount.py").write_text(MOUNT)
    (tmp_path / "flash.img").write_bytes(littlefs_image({"lib/old": bytes(range(256)) * 9}, IMAGE_BYTES))
    done = subprocess.run(
        [MICROPYTHON, str(tmp_path / "mount.py"), str(tmp_path / "flash.img"), str(programmed_at_once)],
        env={**os.environ, "MICROPYPATH": "tests:.frozen"},
        cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "reads and writes\n", done.stdout + done.stderr


def test_a_copy_over_the_console_runs_and_a_second_one_finds_nothing_to_do(bench: Bench) -> None:
    before = {"app.py": b"raise SystemExit('a source hides the module')", "lib/dps_hal/tpm/wire.mpy": bytes(9)}
    bench.flash.write_bytes(littlefs_image(before, IMAGE_BYTES))
    with bench.serial_board() as board:
        said = bench.deploy("--port", board.device)
        assert "copied lib/dps_base.mpy" in said and said.endswith("Reset the board to start it.\n"), said
        assert bench.deploy("--port", board.device).endswith("nothing to copy: all is there\n")
        words = ["connect", board.device, "resume", "fs", "ls", "lib/dps_hal/tpm"]
        there = subprocess.run(
            [sys.executable, "-m", "mpremote", *words], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert "__init__.mpy" in there and "wire.mpy" not in there, "what an earlier deployment left is gone"
        bench.write_settings("led_pin = -1\n")
        said = bench.deploy("--port", board.device)
        copied = [line.removeprefix("copied ") for line in said.splitlines() if line.startswith("copied ")]
        assert copied == ["config.json", "main.py"], "what is there already is left alone"
    bench.boot(until=CONNECTED)


def test_no_copy_begins_on_a_board_whose_file_system_loses_records(bench: Bench) -> None:
    bench.flash.write_bytes(bytes(IMAGE_BYTES))
    with bench.serial_board(fat=True) as board:
        before = bench.flash.read_bytes()
        done = bench.deployed("--port", board.device)
        assert done.returncode == 2 and "came VfsFat" in done.stderr, done.stdout + done.stderr
        assert "[store.unsuitable]. Nothing was changed" in done.stderr and "copied" not in done.stdout
        assert bench.flash.read_bytes() == before
        # A program whose store is on a block device of its own needs no file system for it.
        (bench.folder / "own.py").write_text("from dps_hal.store.block import block_store\ndef main(): pass\n")
        done = bench.deployed("--port", board.device, "--app", str(bench.folder / "own.py"))
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_board_on_fat_is_told_at_its_start(image: Image) -> None:
    code = (
        "import vfs\n"
        "from dps_board import parts\n"
        "class Config:\n values = {'state_dir': '/fat/dps-agent'}\n"
        "class Flash:\n"
        " content = bytearray(131072)\n"
        " def readblocks(self, block, buffer, offset=0):\n"
        "  buffer[:] = self.content[block * 512 + offset :][: len(buffer)]\n"
        " def writeblocks(self, block, buffer, offset=0):\n"
        "  self.content[block * 512 + offset : block * 512 + offset + len(buffer)] = buffer\n"
        " def ioctl(self, operation, argument):\n"
        "  return {4: 256, 5: 512}.get(operation, 0)\n"
        "flash = Flash()\n"
        "vfs.VfsFat.mkfs(flash)\n"
        "vfs.mount(vfs.VfsFat(flash), '/fat')\n"
        "try:\n parts.make_store(Config)\n"
        "except Exception as error:\n print(error.code, error.message)\n"
    )
    done = subprocess.run(
        [MICROPYTHON, "-c", code],
        env={**os.environ, "MICROPYPATH": f"{image.folder}:.frozen"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("store.unsuitable expected a littlefs at /fat/dps-agent"), done.stdout + done.stderr


def test_the_program_of_the_readme_runs_in_the_examples_place(bench: Bench) -> None:
    blocks = blocks_of(CHECKOUT / "micropython" / "README.md")
    program = next(found.text for found in blocks if found.language == "python")
    (bench.folder / "own.py").write_text(program)
    words = ("--app", str(bench.folder / "own.py"), "--image", str(bench.flash), "--image-size", str(IMAGE_BYTES))
    assert " app.mpy\n" in bench.deploy(*words, "--verbose")
    bench.boot(until="sent")
    assert [message["payload"] for message in bench.emulator.await_telemetry(1)] == ['{"celsius": 21.5}']


def included_by(manifest: Path, own: bool) -> tuple[list[str], list[str]]:
    """The modules and manifests that a manifest names; `own`: the board has one of its own."""
    frozen: list[str] = []
    included: list[str] = []

    def include(path: str) -> None:
        if "BOARD_DIR" in path and not own:
            raise FileNotFoundError(path)
        included.append(path)

    exec(manifest.read_text(), {"include": include, "module": lambda path, opt: frozen.append(path)})
    return frozen, included


def py_files(folder: Path) -> list[Path]:
    """What --freeze has written to be frozen."""
    return [path for path in (folder / "firmware").rglob("*.py") if path.name != "manifest.py"]


def test_mip_installs_what_a_board_loads(bench: Bench) -> None:
    bench.flash.write_bytes(littlefs_image({"boot.py": b""}, 2 * IMAGE_BYTES))
    done = subprocess.run(
        [sys.executable, "tools/deploy", "--freeze", str(bench.folder / "firmware")],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for own in (True, False):
        frozen, included = included_by(bench.folder / "firmware" / "manifest.py", own)
        assert included == (["$(BOARD_DIR)/manifest.py"] if own else ["$(PORT_DIR)/boards/manifest.py"])
        assert set(frozen) == {str(path.relative_to(bench.folder / "firmware")) for path in py_files(bench.folder)}
    with bench.serial_board() as board:
        package = str(bench.folder / "firmware" / "package.json")
        words = ["connect", board.device, "resume", "mip", "install", "--target", "/lib", package]
        done = subprocess.run(
            [sys.executable, "-m", "mpremote", *words],
            cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        said = bench.deploy("--frozen", "--port", board.device)
    assert said.count("copied ") == 5, said
    bench.boot(until=CONNECTED)


def test_a_password_goes_over_the_console_only(bench: Bench) -> None:
    secret = bench.folder / "wifi"
    secret.write_text("open-sesame")
    secret.chmod(0o600)
    bench.write_settings(f'wifi_password_file = "{secret}"\n')
    assert "open-sesame" not in bench.deploy("--image", str(bench.flash), "--image-size", str(IMAGE_BYTES))
    assert b"open-sesame" not in bench.flash.read_bytes()
    with bench.serial_board() as board:
        said = bench.deploy("--port", board.device)
    assert "copied config.json\n" in said and "open-sesame" not in said
    assert b"open-sesame" in bench.flash.read_bytes()


def test_a_board_whose_heap_is_too_small_is_refused_and_left_as_it_was(bench: Bench) -> None:
    before = littlefs_image({"main.py": b"print('as it was')\n"}, IMAGE_BYTES)
    bench.flash.write_bytes(before)
    with bench.serial_board(heap="200k") as board:
        done = bench.deployed("--port", board.device)
    assert done.returncode == 2 and "copied" not in done.stdout, done.stdout + done.stderr
    said = rf"this board has about 19\d KiB for heap and TLS, and the agent needs {IN_FILES_KIB} "
    assert re.search(said, done.stderr), done.stderr
    assert done.stderr.endswith(". Nothing was changed\n") and bench.flash.read_bytes() == before


def test_a_copy_that_breaks_off_anywhere_leaves_a_board_that_names_what_is_missing(bench: Bench) -> None:
    files = {"main.py": b"print('all is there')\n", "boot.py": b"#" * 700, "lib/a/b.mpy": bytes(range(256)) * 3}
    files["app.mpy"] = files["config.json"] = bytes(700)
    before = {**dict.fromkeys(files, b"# of the version before\n"), "main.py": b"print('the version before')\n"}
    empty = littlefs_image(before, IMAGE_BYTES)
    bench.flash.write_bytes(empty)
    with bench.serial_board() as board:
        assert copy(files, board.device, lambda path: None) == len(files)
        whole = board.received
    assert bench.boot() == "all is there\n"
    seen = set()
    for cut in range(whole // 40, whole, whole // 20):
        bench.flash.write_bytes(empty)
        with bench.serial_board(cut) as board, pytest.raises(CopyError, match="could not"):
            copy(files, board.device, lambda path: None)
        said = bench.boot()
        guarded = said.startswith("The agent is not complete on this board. Run tools/deploy again.\n")
        assert guarded or said in ("the version before\n", "all is there\n"), f"cut={cut}: {said}"
        seen.add(said.count("\n") - 1 if guarded else said)
        with bench.serial_board() as board:
            copy(files, board.device, lambda path: None)
        assert bench.boot() == "all is there\n", f"cut={cut}"
    assert seen >= {"the version before\n", 0, 1, 2, 3, 4}, "cuts fell before, between and behind all files"


@pytest.mark.parametrize("bench", [{"enroll_any": False}], indirect=True)
def test_the_factorys_line_from_the_console_is_what_lets_a_board_in(bench: Bench) -> None:
    bench.write_settings()
    bench.deploy("--image", str(bench.flash), "--image-size", str(IMAGE_BYTES))
    with bench.serial_board() as board:
        code = "import dps_board.factory as f; f.print_enrolment()"
        printed = subprocess.run(
            [sys.executable, "-m", "mpremote", "connect", board.device, "resume", "exec", code],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    imported = subprocess.run(
        [sys.executable, "-m", "dps_emulator.cli", "enroll-import", "-", "--state-dir", str(bench.folder / "cloud")],
        env={**os.environ, "PYTHONPATH": "tools"},
        cwd=CHECKOUT, input=printed, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert imported.returncode == 0, printed + imported.stderr
    bench.boot(until=CONNECTED)
