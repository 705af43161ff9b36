"""Does in the guest what the host asks for: one JSON object on a line of the serial port, one line as the answer.

`{"id": 1, "command": "a line for sh", "deadline_s": 5}` is answered by `{"id": 1, "status": 0, "output": "…"}`, status
124 where it took too long. `{"id": 2, "post": "/telemetry", "body": "text", "wait": true}` asks the agent's socket, as
any program on the device does: status and body are the agent's, 0 and why where it gave none; without `wait` the answer
is dropped.
"""

import http.client
import json
import os
import socket
import subprocess
import threading
import tty
from typing import Any

PORT = "/dev/ttyS1"
API = "/run/dps-agent/api.sock"
ANSWER_DEADLINE_S = 60
OUTPUT_LIMIT = 200_000


def run(command: str, deadline_s: float) -> tuple[int, str]:
    """Exit status and the end of what the command wrote, both streams together."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = 124
    return status, output[-OUTPUT_LIMIT:].decode(errors="replace")


def post(path: str, body: str) -> tuple[int, str]:
    """HTTP status and body of the agent's answer; status 0 where it gave none."""
    connection = http.client.HTTPConnection("localhost")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(ANSWER_DEADLINE_S)
            agent.connect(API)
            connection.sock = agent
            connection.request("POST", path, body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, repr(error)


def answer(request: dict[str, Any]) -> tuple[int, str]:
    """Status and output of one request."""
    if "post" not in request:
        return run(request["command"], request["deadline_s"])
    if request["wait"]:
        return post(request["post"], request["body"])
    threading.Thread(target=post, args=(request["post"], request["body"]), daemon=True).start()
    return 0, ""


def main() -> None:
    """Answers for ever; what is no request is dropped."""
    with open(PORT, "r+b", buffering=0) as port:
        tty.setraw(port.fileno())
        pending = b""
        while True:
            pending += port.read(4096)
            *lines, pending = pending.split(b"\n")
            for line in lines:
                try:
                    request = json.loads(line)
                    number = request["id"]
                except (ValueError, KeyError, TypeError):
                    continue
                status, output = answer(request)
                left = json.dumps({"id": number, "status": status, "output": output}).encode() + b"\n"
                while left:
                    left = left[port.write(left) :]


main()
