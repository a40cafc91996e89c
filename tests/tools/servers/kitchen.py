"""A real MCP server with tools of every kind, over stdio or, given a port, streamable HTTP."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from typing import Any

from mcp.server.fastmcp import FastMCP, Image
from mcp.types import EmbeddedResource, ResourceLink, TextContent, TextResourceContents

server = FastMCP("kitchen", log_level="ERROR", port=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
said: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def remember(word: str) -> str:
    """Remember a word, and tell all of them."""
    said.append(word)
    return ",".join(said)


@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("the pan is hot")


@server.tool()
def parts() -> list[Any]:
    """Give everything that a result can hold."""
    link = ResourceLink(type="resource_link", name="menu", uri="file:///menu")  # type: ignore[arg-type]
    inside = TextResourceContents(uri="file:///recipe", text="salt")  # type: ignore[arg-type]
    image = Image(data=b"\x89PNG" + b"\0" * 7, format="png").to_image_content()
    return [
        TextContent(type="text", text="é"),
        image,
        link,
        EmbeddedResource(type="resource", resource=inside),
    ]


@server.tool()
async def wait(seconds: float) -> str:
    """Wait, and be there for others."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def freeze(seconds: float) -> str:
    """Wait, and be there for nobody."""
    time.sleep(seconds)
    return "froze"


@server.tool()
def die(status: int = 3) -> str:
    """End this process."""
    print("oh no", file=sys.stderr, flush=True)
    os._exit(status)


@server.tool()
def variables() -> list[str]:
    """Tell the names of the environment's variables."""
    return sorted(os.environ)


@server.tool(name="spawn/child")
def spawn() -> int:
    """Start a process that stays; its number."""
    return subprocess.Popen(["sleep", "600"]).pid


if __name__ == "__main__":
    print("a line that is no message", flush=True)
    print("words for nobody", file=sys.stderr, flush=True)
    if len(sys.argv) > 1:
        server.run("streamable-http")
    else:
        server.run("stdio")
