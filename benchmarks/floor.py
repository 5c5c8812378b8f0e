"""The floor: the least a fusion gateway can do. Three members at once, then the judging calls, nothing else.

No quorum, no deadline, no ledger, no trace, no checks: what it adds to the calls themselves is one HTTP hop. The
calls are the benchmark's own (`harness.fuse`), so floor and `direct` ask for exactly the same.
Says where it listens and runs until it is ended.
"""

import asyncio
import sys

import uvloop
from aiohttp import ClientSession, web
from harness import fuse, open_session, synthesis, verdicts


async def serve(upstream: str) -> None:
    """Serves until it is ended."""
    session: ClientSession = open_session()

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        answers = await fuse(session, upstream, body["messages"])
        if body["model"] == "best_of":
            await verdicts(session, upstream, answers)
            return web.json_response({"choices": [{"index": 0, "message": {"content": answers[0]}}]})
        async with session.post(
            f"{upstream}/chat/completions", json=synthesis(answers, stream=bool(body.get("stream")))
        ) as reply:
            if not body.get("stream"):
                return web.Response(body=await reply.read(), content_type="application/json")
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            async for piece in reply.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(f"ready: http://127.0.0.1:{runner.addresses[0][1]}/v1", file=sys.stderr, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
