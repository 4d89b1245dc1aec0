"""`switchrun` without the seconds of its imports: one process imports everything, and each command is a fork of it.

python tools/preloaded.py serve SOCKET          serves commands until it is ended; an empty line says that it can
python tools/preloaded.py ask SOCKET WORD...    is `switchrun WORD...`, with the asker's streams, folder and variables
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path


def ask(path: str, words: list[str]) -> int:
    """Have the server run a command, and return its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        return int(server.recv(16) or 1)


def serve(path: str) -> None:
    """Run the commands that come in at a socket."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from switchrun.cli import startup

    startup.quieten_libraries()
    startup.let_threads_sleep()
    import switchrun.cli.app
    import switchrun.model.engine  # noqa: F401 - and so torch and transformers

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print(flush=True)
        while True:
            client, _ = server.accept()
            with client:
                if os.fork() == 0:
                    _answer(client)


def _answer(client: socket.socket) -> None:
    """Run one command in a process of its own, say how it ended, and end."""
    data, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    child = os.fork()
    if child == 0:
        _become(json.loads(data), streams)
    client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    os._exit(0)


def _become(request: dict[str, object], streams: list[int]) -> None:
    from switchrun.__main__ import main

    for place, stream in enumerate(streams):
        os.dup2(stream, place)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    sys.argv = ["switchrun", *request["words"]]  # type: ignore[misc]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
