"""A client that sees every piece of an answer, and can leave at any of them."""

import asyncio
import json


class Answer:
    """A response that is read as it comes."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer
        self.status, self.headers = 0, {}

    async def head(self):
        self.status = int((await self.reader.readline()).split()[1])
        while (line := (await self.reader.readline()).decode().strip()):
            name, value = line.split(":", 1)
            self.headers[name.lower()] = value.strip()

    async def pieces(self):
        """The body, in the pieces in which it comes."""
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))
            return
        while (size := int(await self.reader.readline(), 16)) > 0:
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def body(self):
        return b"".join([piece async for piece in self.pieces()])


async def ask(port, path, body=None, raw=None):
    """Sends a request, with a body as JSON or as it is; the answer is still to be read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None and raw is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return Answer(reader, writer)
