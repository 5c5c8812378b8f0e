"""What a vLLM server says of its models and adapters, without vLLM: for tests of who keeps and asks it.

As a program (`python stand_in.py PORT`) it is put in vLLM's place, and at SIGUSR1 does as vLLM does when its core
hangs; as `StandIn` it is an engine that someone else runs.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # the probes of a swap come at once


class StandIn:
    """A server on loopback that can be stopped and started again on its port.

    Attributes:
        adapters: Name → path of what is loaded.
        refused: Names that it refuses to load.
        logprob: What it says of every token of a prompt.
        token: What it writes, again and again.
        ranks: How many data-parallel copies of the model it has.
        asked: The copy that each request named (None: none), and its model.
        doors: Whether some routes need no key, as vLLM's own.
    """

    def __init__(self, *, name: str = "base", api_key: str | None = None, port: int = 0) -> None:
        self.name, self.api_key = name, api_key
        self.adapters: dict[str, str] = {}
        self.refused: set[str] = set()
        self.logprob, self.token = -1.0, 7
        self.ranks = 1
        self.asked: list[tuple[str | None, str]] = []
        self.doors = False
        self.works = threading.Event()
        self.works.set()
        self._server: _Server | None = None
        self.start(port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, port: int | None = None) -> None:
        self._server = _Server(("127.0.0.1", self.port if port is None else port), self._handler())
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def said(self, name: str, prompt: list[int]) -> list[float]:
        """The log-probabilities of a prompt's tokens but the first; a test's engine has others."""
        return [self.logprob] * len(prompt[1:])

    def first_tokens(self, name: str, messages: list[dict[str, str]]) -> dict[str, float]:
        """The log-probabilities of an answer's first token."""
        return {"A": self.logprob, "B": self.logprob}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if stand_in.api_key and self.headers["authorization"] != f"Bearer {stand_in.api_key}":
                    self._answer(401, {"error": {"message": "no key"}})
                    return
                rows = [{"id": stand_in.name, "parent": None}]
                rows += [
                    {"id": name, "parent": stand_in.name, "root": root} for name, root in stand_in.adapters.items()
                ]
                if self.path == "/metrics":
                    lines = [f'vllm:num_requests_running{{engine="{n}"}} 0.0\n' for n in range(stand_in.ranks)]
                    self._answer(200, "".join(lines))
                else:
                    self._answer(200, {"data": rows} if self.path == "/v1/models" else {})

            def do_DELETE(self) -> None:
                if stand_in.doors:
                    self._answer(404, {"error": {"message": f"{self.path} cannot be found"}})
                else:
                    self._answer(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if stand_in.doors and not self.path.startswith("/v1/"):
                    self._answer(400, {"error": {"message": "a body is missing"}})
                    return
                name = body.get("lora_name", body.get("model"))
                if "model" in body:
                    stand_in.asked.append((self.headers["x-data-parallel-rank"], name))
                if stand_in.api_key and self.headers["authorization"] != f"Bearer {stand_in.api_key}":
                    self._answer(401, {"error": {"message": "no key"}})
                elif self.path == "/v1/load_lora_adapter":
                    if name in stand_in.refused or name in stand_in.adapters:
                        self._answer(400, {"error": {"message": f"{name} is not welcome"}})
                    else:
                        if (slow := Path(body["lora_path"]) / "seconds").exists():
                            stand_in.works.clear()  # vLLM loads between two steps
                            time.sleep(float(slow.read_text()))
                            stand_in.works.set()
                        stand_in.adapters[name] = body["lora_path"]
                        self._answer(200, {})
                elif name not in (stand_in.name, *stand_in.adapters):
                    self._answer(404, {"error": {"message": f"The model `{name}` does not exist."}})
                else:
                    stand_in.works.wait()
                    if self.path == "/v1/unload_lora_adapter":
                        del stand_in.adapters[name]
                    prompt = body.get("prompt", [])
                    values = stand_in.said(name, prompt)
                    said = [None] + [
                        {str(token): {"logprob": value}} for token, value in zip(prompt[1:], values, strict=True)
                    ]
                    message = {"role": "assistant", "content": f"said by {name}"}
                    choice = {"index": 0, "message": message, "finish_reason": "stop", "prompt_logprobs": said}
                    if body.get("return_token_ids"):
                        tokens = [stand_in.token] * body["max_tokens"]
                        values = stand_in.said(name, [*prompt, *tokens])[-len(tokens) :]
                        choice |= {"token_ids": tokens, "logprobs": {"token_logprobs": values}}
                    elif body.get("logprobs") is True:
                        first = stand_in.first_tokens(name, body["messages"])
                        top = [{"token": token, "logprob": value} for token, value in first.items()]
                        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
                    self._answer(200, {"choices": [choice]})

            def _answer(self, status: int, body: object) -> None:
                text = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


if __name__ == "__main__":
    os.write(1, f"{os.getpid()}\n".encode())
    stand_in = StandIn(port=int(sys.argv[1]), api_key=Path(os.environ["MIXFUSE_ENGINE_KEY_FILE"]).read_text())
    signal.signal(signal.SIGUSR1, lambda *_: stand_in.works.clear())
    threading.Event().wait()
