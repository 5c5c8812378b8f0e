"""The gateway as `mixfuse serve` runs it, without an engine beside it: `python -P benchmarks/gateway.py CONFIG`.

Prints its port as the first line and runs until it is ended.
"""

import socket
import sys
from pathlib import Path

import uvicorn

from fusion.config import FusionConfig
from fusion.gateway import create_app
from mixfuse.recipe import load

if __name__ == "__main__":
    app = create_app(load(Path(sys.argv[1]), FusionConfig), None)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", backlog=4096)).run(sockets=[listener])
