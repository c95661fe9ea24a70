"""A pseudo-terminal in which commands are typed, and a record of what it shows."""

from dataclasses import dataclass, field
import fcntl
import os
from pathlib import Path
import pty
import re
import select
import struct
import subprocess
import termios
import time

ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_])")


@dataclass
class Shown:
    """What a command has shown: its exit code, and its lines with the second each began in.

    A line is what stands between two line ends or returns to its begin, without colours.
    """

    code: int
    lines: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Terminal:
    """A terminal of some columns, in a folder, that writes all it shows to a record.

    Args:
      record: the file, in which each line has the seconds since its command began.
      folder: where commands run.
      environment: of the commands.
    """

    def __init__(self, record: Path, folder: Path, environment: dict[str, str], columns: int = 80):
        self.record, self.folder, self.environment = record, folder, environment
        self.size = struct.pack("HHHH", 24, columns, 0, 0)
        record.write_text("")

    def type(self, command: str) -> Shown:
        """Runs a command to its end."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, self.size)
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )
        shown, rest = Shown(0), b""
        while chunk := _read(ours, process):
            *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in whole:
                self._add(shown, line, time.monotonic() - began)
        self._add(shown, rest, time.monotonic() - began)
        os.close(ours)
        os.close(theirs)
        shown.code = process.wait()
        text = [
            f"{seconds:8.1f}  {line}"
            for line, seconds in zip(shown.lines, shown.seconds, strict=True)
        ]
        with self.record.open("a") as file:
            print(f"$ {command}", *text, f"[exit code {shown.code}]\n", sep="\n", file=file)
        return shown

    def _add(self, shown: Shown, line: bytes, seconds: float) -> None:
        text = ESCAPE.sub("", line.decode(errors="replace")).rstrip()
        if text:
            shown.lines.append(text)
            shown.seconds.append(seconds)


def _read(terminal: int, process: subprocess.Popen) -> bytes:
    """What comes next; nothing when the process has ended and all of it is read.

    The other side is still open here: when it closes, what was last written may be lost.
    """
    ended = False
    while not select.select([terminal], [], [], 0.1)[0]:
        if ended:
            return b""
        ended = process.poll() is not None
    return os.read(terminal, 65536)
