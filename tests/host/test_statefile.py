"""The file through which a running service is seen: written seldom, readable by all, believed only while it lives."""

import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from dps_agent.host.config import Configuration, load
from dps_agent.host.local import statefile
from dps_agent.host.local.statefile import BURST, StateFile, read_live, start_ticks
from dps_hal.errors import AskOperator


def settings(folder: Path) -> Configuration:
    overrides = [f"state_dir={folder}/state", f"runtime_dir={folder}/run", "id_scope=0ne00000000"]
    return load("/dev/null", overrides=overrides, environ={})


def written(folder: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((folder / "run" / "state.json").read_text())
    return document


def show(folder: Path, file: StateFile, **more: object) -> None:
    file.show({"stateDir": f"{folder}/state", "state": "connected", **more})


def test_what_a_live_service_wrote_is_read_by_anybody(tmp_path: Path) -> None:
    show(tmp_path, StateFile(str(tmp_path / "run")))
    live = read_live(settings(tmp_path))
    assert live is not None and (live["state"], live["pid"]) == ("connected", os.getpid())
    path = tmp_path / "run" / "state.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and os.listdir(tmp_path / "run") == ["state.json"]


def test_a_file_of_a_process_that_is_gone_or_another_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show(tmp_path, StateFile(str(tmp_path / "run")))
    with subprocess.Popen(["sleep", "30"]) as other:
        document = {**written(tmp_path), "pid": other.pid}
        (tmp_path / "run" / "state.json").write_text(json.dumps(document))
        assert read_live(settings(tmp_path)) is None, "another process has the number now"
        document["startTicks"] = start_ticks(other.pid)
        (tmp_path / "run" / "state.json").write_text(json.dumps(document))
        assert read_live(settings(tmp_path)) is not None
        other.kill()
    assert read_live(settings(tmp_path)) is None


def test_the_system_s_service_counts_where_proc_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(_pid: int, number: int) -> None:
        assert number == 0
        raise refusal

    show(tmp_path, StateFile(str(tmp_path / "run")))
    monkeypatch.setattr(statefile, "start_ticks", lambda _pid: None)
    monkeypatch.setattr(statefile.os, "kill", kill)
    refusal: OSError = PermissionError()
    assert read_live(settings(tmp_path)) is None, "anybody may write into another folder"
    monkeypatch.setattr(statefile, "SYSTEM_RUNTIME_DIR", str(tmp_path / "run"))
    assert read_live(settings(tmp_path)) is not None
    refusal = ProcessLookupError()
    assert read_live(settings(tmp_path)) is None
    refusal = PermissionError()
    monkeypatch.setattr(statefile, "start_ticks", lambda _pid: 1)
    assert read_live(settings(tmp_path)) is None, "another process has the number now"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"schema":"dps-agent-state/1","pid":"1"}', b"\xff", b"[" * 60000]
)
def test_a_damaged_file_counts_for_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_bytes(content)
    assert read_live(settings(tmp_path)) is None


def test_the_file_of_another_device_counts_for_nothing(tmp_path: Path) -> None:
    show(tmp_path, StateFile(str(tmp_path / "run")))
    assert (
        read_live(
            load(
                "/dev/null",
                overrides=[f"state_dir={tmp_path}/x", f"runtime_dir={tmp_path}/run"],
                environ={},
                need_id_scope=False,
            )
        )
        is None
    )


def test_many_changes_are_few_writes_and_the_last_one_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statefile, "WRITE_EVERY_S", 0.2)
    file = StateFile(str(tmp_path / "run"))
    seen = set()
    for number in range(100):
        show(tmp_path, file, number=number)
        seen.add(written(tmp_path)["number"])
    assert len(seen) <= BURST + 1
    time.sleep(0.25)
    file.write_if_due()
    assert written(tmp_path)["number"] == 99
    file.remove()
    file.write_if_due()
    assert not (tmp_path / "run" / "state.json").exists()


def test_a_folder_that_cannot_be_written_is_a_word_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no folder")
    file = StateFile(str(tmp_path / "run"))
    show(tmp_path, file)
    assert "cannot be written" in file.failure
    nowhere = StateFile("")
    show(tmp_path, nowhere)
    assert nowhere.failure == ""


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("state.json", f"state.json.{os.getpid()}.new"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    show(tmp_path, StateFile(str(tmp_path / "run")))
    assert (tmp_path / "mine").read_text() == "mine"
    assert read_live(settings(tmp_path)) is not None


def refused(folder: Path) -> str:
    """What is said of what is in the file's place."""
    with pytest.raises(AskOperator) as caught:
        read_live(settings(folder))
    assert caught.value.code == "agent.file" and f"{folder}/run/state.json" in caught.value.message
    return caught.value.message


def test_what_is_no_file_of_the_service_is_named_and_holds_nobody_up(tmp_path: Path) -> None:
    show(tmp_path, StateFile(str(tmp_path / "run")))
    path = tmp_path / "run" / "state.json"
    content = path.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "it is a symbolic link" in refused(tmp_path)
    path.unlink()
    path.write_bytes(content + b" " * statefile.SIZE_LIMIT)
    assert "it has more than 65536 bytes" in refused(tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert "it is a FIFO" in refused(tmp_path)
