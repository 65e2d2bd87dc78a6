"""Runs qtool commands in this process and tells what they did: python -m tests.trust.watched FILE < COMMANDS

COMMANDS: a JSON list of lists of words.  FILE gets JSON: the `statuses` of the commands; `events`, what Python's audit
hooks told of files that were opened, processes, connections and classes that pickle looked for; `modules`, the files
that modules came from. A connection is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WATCHED = ("open", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn",
           "socket.connect", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "urllib.Request")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
events: list[tuple[str, str]] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in WATCHED:
        told = arguments[0] if event == "open" else " ".join(map(str, arguments))
        events.append((event, str(told)))
        if event in NETWORK:
            raise PermissionError(f"{event} {told}: there is no network in this test")


def main(place: Path) -> None:
    commands = json.load(sys.stdin)
    sys.addaudithook(watch)
    from qtool.cli import main as run

    statuses = []
    for words in commands:
        try:
            run(words)
        except SystemExit as stopped:
            statuses.append(stopped.code or 0)
    modules = [str(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
    place.write_text(json.dumps({"statuses": statuses, "events": events, "modules": modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
