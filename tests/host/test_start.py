"""What a start of each verb loads, exactly, and how the process leaves."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from dps_hal.host.transports import open_wire
from dps_hal.tpm.keys import registration_id_from_ek
from support.cloud.emulator import EmulatorInThread
from support.programs.tools import until
from support.tpm.swtpm import Swtpm

CHECKOUT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
PATIENCE_S = 120
PROGRAM = """\
import atexit, os, sys
before = set(sys.modules)
from dps_agent.host.cli import main
if "token" in sys.argv:  # else it asks DPS what time it is
    from dps_agent.host import clock
    clock.is_synchronised = lambda: True
def loaded():
    with open(os.environ["LOADED"], "w") as file:
        file.write(" ".join(sorted(set(sys.modules) - before)))
atexit.register(loaded)
sys.exit(main())
"""
# Own modules without their packages' names in front: what every verb has, and what it has of its own.
EVERY = """dps_agent dps_agent.fleet dps_agent.host dps_agent.host.cli dps_agent.host.cli.plain_words
dps_agent.host.cli.verb dps_agent.host.config dps_agent.host.error_document dps_agent.host.plain_toml
dps_agent.host.printed dps_agent.host.provisioned dps_agent.host.settings_table dps_agent.settings dps_hal
dps_hal.contracts dps_hal.errors dps_hal.host dps_hal.host.codes dps_hal.host.named_tuples dps_hal.host.regular
dps_hal.named dps_text dps_text.addresses"""
OWN = {
    "--help": """
        dps_agent.host.cli.check dps_agent.host.cli.config dps_agent.host.cli.diag dps_agent.host.cli.enroll
        dps_agent.host.cli.import_key dps_agent.host.cli.install_certificate dps_agent.host.cli.metrics
        dps_agent.host.cli.parser dps_agent.host.cli.provision
        dps_agent.host.cli.reset dps_agent.host.cli.run dps_agent.host.cli.running
        dps_agent.host.cli.status dps_agent.host.cli.token dps_agent.host.cli.version dps_agent.host.cli.wait
    """,
    "version": """
        dps_agent.host.cli.version
    """,
    "status": """
        dps_agent.assignment
        dps_agent.host.cli.running dps_agent.host.cli.status dps_agent.host.local dps_agent.host.local.statefile
        dps_agent.progress dps_agent.values dps_hal.host.files
        dps_hal.host.mounts dps_hal.host.state_dir dps_hal.host.tcti dps_hal.platform dps_hal.store
        dps_hal.store.slots
    """,
    "token": """
        dps_agent.assignment dps_agent.attestation dps_agent.driver dps_agent.effects
        dps_agent.host.cli.running dps_agent.host.cli.token dps_agent.host.clock dps_agent.host.local
        dps_agent.host.local.statefile dps_agent.host.loop dps_agent.host.parts dps_agent.host.runner
        dps_agent.host.worker dps_agent.progress dps_agent.sas dps_agent.signing dps_agent.utc dps_agent.values
        dps_hal.host.files dps_hal.host.libcrypto dps_hal.host.mounts dps_hal.host.service_tpm
        dps_hal.host.state_dir dps_hal.host.tcti dps_hal.host.tpm_node dps_hal.host.transports
        dps_hal.platform dps_hal.store dps_hal.store.slots dps_hal.tpm
        dps_hal.tpm.commands dps_hal.tpm.errors dps_hal.tpm.keys dps_hal.tpm.operations
        dps_hal.tpm.procedure dps_hal.tpm.rules dps_hal.tpm.sessions dps_hal.tpm.tcp dps_hal.tpm.upkeep
        dps_hal.tpm.wire
    """,
    "provision": """
        dps_agent.assignment dps_agent.attestation dps_agent.backoff dps_agent.der dps_agent.driver
        dps_agent.effects dps_agent.host.cli.provision dps_agent.host.cli.running dps_agent.host.clock
        dps_agent.host.kept_key dps_agent.host.local dps_agent.host.local.statefile dps_agent.host.loop
        dps_agent.host.network dps_agent.host.network.dial dps_agent.host.network.heads
        dps_agent.host.network.https dps_agent.host.network.proxy dps_agent.host.network.trust
        dps_agent.host.parts dps_agent.host.runner dps_agent.host.steps dps_agent.host.worker dps_agent.http1
        dps_agent.lifecycle dps_agent.messages dps_agent.patience dps_agent.progress dps_agent.registration
        dps_agent.registration_by_tpm dps_agent.sas dps_agent.signing dps_agent.utc dps_agent.values dps_hal.der
        dps_hal.host.files
        dps_hal.host.libcrypto dps_hal.host.mounts dps_hal.host.service_tpm dps_hal.host.state_dir
        dps_hal.host.tcti dps_hal.host.tpm_node dps_hal.host.transports dps_hal.platform dps_hal.store
        dps_hal.store.slots dps_hal.tpm dps_hal.tpm.activation dps_hal.tpm.commands dps_hal.tpm.errors
        dps_hal.tpm.keys dps_hal.tpm.operations dps_hal.tpm.procedure dps_hal.tpm.rules dps_hal.tpm.sessions
        dps_hal.tpm.tcp dps_hal.tpm.upkeep dps_hal.tpm.wire
    """,
    "run": """
        dps_agent.assignment dps_agent.attestation dps_agent.backoff dps_agent.der dps_agent.driver
        dps_agent.effects dps_agent.host.cli.run dps_agent.host.clock dps_agent.host.counts
        dps_agent.host.hub_ways dps_agent.host.journal dps_agent.host.kept_key dps_agent.host.local
        dps_agent.host.local.batch dps_agent.host.local.events dps_agent.host.local.heads
        dps_agent.host.local.routes dps_agent.host.local.server dps_agent.host.local.shares
        dps_agent.host.local.statefile dps_agent.host.loop dps_agent.host.memory dps_agent.host.network
        dps_agent.host.network.dial dps_agent.host.network.heads dps_agent.host.network.https
        dps_agent.host.network.mqtt dps_agent.host.network.proxy dps_agent.host.network.trust
        dps_agent.host.network.websocket dps_agent.host.next_step dps_agent.host.notify dps_agent.host.parts
        dps_agent.host.runner dps_agent.host.service dps_agent.host.steps dps_agent.host.worker dps_agent.http1
        dps_agent.hub_effects dps_agent.lifecycle dps_agent.messages dps_agent.patience dps_agent.progress
        dps_agent.properties dps_agent.sas dps_agent.session dps_agent.signing dps_agent.twin
        dps_agent.utc dps_agent.values dps_hal.der dps_hal.host.files
        dps_hal.host.libcrypto dps_hal.host.mounts dps_hal.host.service_tpm dps_hal.host.state_dir
        dps_hal.host.tcti dps_hal.host.tpm_node dps_hal.host.transports dps_hal.platform dps_hal.store
        dps_hal.store.slots dps_hal.tpm dps_hal.tpm.commands dps_hal.tpm.errors
        dps_hal.tpm.keys dps_hal.tpm.operations dps_hal.tpm.procedure dps_hal.tpm.rules dps_hal.tpm.sessions
        dps_hal.tpm.tcp dps_hal.tpm.upkeep dps_hal.tpm.wire
    """,
}
# Of the standard library and of others, by verb; a settings file that is not plain brings typing, string and datetime.
NEVER = "email http random urllib pathlib ipaddress dataclasses inspect tempfile calendar logging json"
OFFLINE = f"{NEVER} ssl threading socket hashlib ctypes queue base64 dps_hal.host.libcrypto importlib.metadata"
PLAIN = "argparse gettext"  # is read without
FORBIDDEN = {
    "--help": f"{OFFLINE} typing tomllib datetime ujson decimal struct string",
    "version": f"{PLAIN} ujson decimal ssl ctypes tomllib",
    "status": f"{OFFLINE} {PLAIN} re enum typing tomllib datetime string",
    "token": f"{PLAIN} email http random urllib pathlib ipaddress dataclasses inspect tempfile calendar ssl paho",
    "provision": f"{NEVER} {PLAIN} paho typing tomllib datetime string",
    "run": f"{PLAIN} inspect json",
}


class Device:
    """A device with a TPM on the wire, enrolled, and a hub for it."""

    def __init__(self, folder: Path, machine: Swtpm, emulator: EmulatorInThread) -> None:
        self.emulator = emulator
        tpm = open_wire(machine.tcti)
        ek = tpm.endorsement_key()
        tpm.release()
        emulator.service.enroll(Enrollment(registration_id_from_ek(ek), ek, device_id="press-07"))
        self.loaded = folder / "loaded"
        self.run_folder = folder / "run"
        self.settings = folder / "given.toml"
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nendpoint = "https://localhost"\nconnect_to = "{emulator.connect_to}"\n'
            f'ca_file = "{emulator.ca_file}"\nstate_dir = "{folder / "state"}"\nruntime_dir = "{self.run_folder}"\n'
            f'[tpm]\nbackend = "wire"\ntcti = "{machine.tcti}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "{emulator.ca_file}"\n'
        )

    def start(self, *words: str) -> "subprocess.Popen[str]":
        environ = {k: v for k, v in os.environ.items() if not k.startswith("DPS_AGENT_")}
        environ |= {"PYTHONPATH": PATHS, "LOADED": str(self.loaded)}
        self.loaded.unlink(missing_ok=True)
        command = ["env", "--default-signal=INT,TERM", sys.executable, "-c", PROGRAM, *words]
        return subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def says_connected(self) -> bool:
        try:
            return '"state":"connected"' in (self.run_folder / "state.json").read_text()
        except FileNotFoundError:
            return False

    def modules(self, verb: str) -> set[str]:
        """What a run of `verb` has loaded when it ends."""
        words = [verb] if verb in ("--help", "version") else ["--config", str(self.settings), verb]
        with self.start(*words, *(["--force"] if verb == "provision" else [])) as process:
            if verb == "run":
                assert until(self.says_connected)
                process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, out
        return set(self.loaded.read_text().split())


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    folder = tmp_path_factory.mktemp("start")
    with Swtpm(folder / "tpm") as machine, EmulatorInThread(Settings(retry_after_s=0)) as emulator:
        made = Device(folder, machine, emulator)
        made.modules("provision")
        yield made


@pytest.mark.parametrize("verb", list(OWN))
def test_a_verb_imports_its_own_modules_and_no_others(verb: str, device: Device) -> None:
    found = device.modules(verb)
    own = {name for name in found if name.split(".")[0] in ("dps_agent", "dps_hal", "dps_text")}
    wanted = {*EVERY.split(), *OWN[verb].split()}
    assert (sorted(own - wanted), sorted(wanted - own)) == ([], []), f"{verb}: too many; too few"


@pytest.mark.parametrize("verb", list(FORBIDDEN))
def test_a_verb_leaves_out_of_the_standard_library_what_it_can_do_without(verb: str, device: Device) -> None:
    assert sorted(device.modules(verb) & set(FORBIDDEN[verb].split())) == [], verb


# --- the end


def ended(code: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    program = f"import atexit, sys, threading, time\nfrom dps_agent.host.cli import main\n{code}\nsys.exit(main())"
    command = [sys.executable, "-c", program, "version"]
    environ = {**os.environ, "PYTHONPATH": PATHS}
    return subprocess.run(
        command, env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
    )


def test_the_process_leaves_without_taking_the_interpreter_apart() -> None:
    done = ended("class Told:\n    def __del__(self): print('apart', file=sys.stderr)\nkept = Told()")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dps-agent")


def test_what_the_process_owes_at_its_end_is_done() -> None:
    done = ended("atexit.register(lambda: print('owed'))")
    assert done.returncode == 0 and done.stdout.endswith("\nowed\n")


def test_a_thread_that_is_waited_for_ends_first() -> None:
    code = "def late():\n    threading.main_thread().join()\n    print('late')\nthreading.Thread(target=late).start()"
    done = ended(code)
    assert done.returncode == 0 and done.stdout.endswith("\nlate\n")


def test_output_that_cannot_be_written_at_the_end_is_no_success() -> None:
    with open("/dev/full", "w") as full:
        done = ended("sys.stdout.reconfigure(line_buffering=False)\natexit.register(lambda: print('x'))", full.fileno())
    assert done.returncode != 0 and "No space left on device" in done.stderr
