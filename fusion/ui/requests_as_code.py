"""A request as code: for a shell, for Python, and as a preset of a config."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from mixfuse.contracts.mode_names import MODE_OF_MODEL


def as_code(body: Mapping[str, Any], url: str, *, keyed: bool) -> dict[str, str]:
    """Returns a request as `curl`, `python` and `yaml`.

    Args:
        body: The body of a chat completion.
        url: The gateway's address.
        keyed: Whether the gateway asks for an API key; it is read from the environment, never written out.
    """
    return {"curl": _curl(body, url, keyed), "python": _python(body, url, keyed), "yaml": _preset(body)}


def _curl(body: Mapping[str, Any], url: str, keyed: bool) -> str:
    lines = [f"curl --fail -s {shlex.quote(url + '/v1/chat/completions')}", "-H 'content-type: application/json'"]
    lines += ['-H "authorization: Bearer $MIXFUSE_API_KEY"'] if keyed else []
    lines.append(f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}")
    return " \\\n  ".join(lines)


def _python(body: Mapping[str, Any], url: str, keyed: bool) -> str:
    key = 'os.environ["MIXFUSE_API_KEY"]' if keyed else '"unused"'
    own = {name: value for name, value in body.items() if name != "fusion"}
    arguments = [f"    {name}={value!r},\n" for name, value in own.items()]
    arguments += [f"    extra_body={ {'fusion': body['fusion']}!r},\n"] if "fusion" in body else []
    return (
        f"{'import os' + chr(10) * 2 if keyed else ''}from openai import OpenAI\n\n"
        f"client = OpenAI(base_url={url + '/v1'!r}, api_key={key})\n"
        f"answer = client.chat.completions.create(\n{''.join(arguments)})\n"
        "print(answer.choices[0].message.content)\n"
    )


def _preset(body: Mapping[str, Any]) -> str:
    options = dict(body.get("fusion", {}))
    if (mode := MODE_OF_MODEL.get(str(body["model"]))) is not None:
        options.setdefault("mode", mode)
    return yaml.safe_dump({"presets": {"my-preset": options}}, sort_keys=False, allow_unicode=True)
