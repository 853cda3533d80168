"""llama.cpp's own server, as ``benchmarks.serving`` compares it: the same weights, prompts, lengths and clients.

    python -m benchmarks.llama_cpp MODEL.gguf --port 8080 --slots 64 --tokens 100

runs it. Its clients stream over HTTP. Like the app, it keeps no prompt from one request to the next, and computes all
its slots in one batch. The wheel is made for processors with AVX2, and uses nothing newer.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.loads import ROOM, Answer, Load, prompt
from swarm.hardware import cpu_count
from swarm.weights.bundled import BUNDLED_MODELS, bundled_file
from swarm.weights.gguf_files import gguf_file, is_gguf
from tests.support.processes import Program, running


@dataclass
class Llama:
    """A llama.cpp server that runs."""

    name: str  # "llama.cpp, Q4_1"
    program: Program

    @classmethod
    @contextlib.contextmanager
    def started(cls, name: str, file: Path, slots: int, tokens: int, directory: Path) -> Iterator["Llama"]:
        """Start it, and end it after the ``with`` block.

        :param file: GGUF
        :param slots: how many clients it serves at a time
        :param tokens: of an answer at most
        """
        arguments = ["--port", "{port}", "--slots", str(slots), "--tokens", str(tokens)]
        command = [sys.executable, "-m", "benchmarks.llama_cpp", str(file), *arguments]
        with running(command, directory / f"{name}.log") as program:
            program.wait_ready("/health")
            yield cls(name, program)

    async def load(self, clients: int, tokens: int, seconds: float) -> Load:
        """Let clients stream at the same time; cut off those that are not done after ``seconds``."""
        result = Load()
        start = time.perf_counter()
        streams = (stream(self.program.url, i, tokens, start + seconds, result) for i in range(clients))
        await asyncio.gather(*streams)
        result.seconds = time.perf_counter() - start
        return result

    def memory(self) -> int:
        """Return the server's memory in MiB. What sessions need is reserved from the start."""
        return int(psutil.Process(self.program.process.pid).memory_full_info().pss) >> 20


def servers(model: str, slots: int, tokens: int, directory: Path, stack: contextlib.ExitStack) -> list[Llama]:
    """Start servers of a model, one with its GGUF file and one with the same weights in bfloat16.

    :param directory: for the file in bfloat16 and for logs
    :param stack: ends them
    :return: none if the model is not a GGUF file
    """
    if model in BUNDLED_MODELS:
        file = bundled_file(model, BUNDLED_MODELS[model])
    elif is_gguf(model):
        file = gguf_file(model)
    else:
        return []
    rounded = directory / "bfloat16.gguf"
    write_bfloat16(file, rounded)
    files = {f"llama.cpp, {commonest_type(file)}": file, "llama.cpp, bfloat16": rounded}
    return [stack.enter_context(Llama.started(name, path, slots, tokens, directory)) for name, path in files.items()]


def commonest_type(file: Path) -> str:
    """Return how a GGUF file holds most of its weights, as ``Q4_1``."""
    from gguf import GGUFReader

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return counts.most_common(1)[0][0]


async def stream(url: str, number: int, tokens: int, end: float, result: Load) -> None:
    """Stream one answer, greedily."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = json.dumps(
        {
            "prompt": prompt(number),
            "n_predict": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
    ).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n"
    try:
        answer = Answer(result, end)
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        async for event in events(reader):
            if event["stop"]:
                break
            # An event without text is a token too: half a character.
            if not answer.token():
                break
    finally:
        writer.close()


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Yield what a streamed HTTP reply says: server-sent events of JSON, in chunks.

    :raises ConnectionError: if the server refuses the request
    """
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise ConnectionError(head.decode())
    text = b""
    while size := int(await reader.readline(), 16):
        text += (await reader.readexactly(size + 2))[:-2]
        *whole, text = text.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):  # not a comment, which shows that the server is alive
                yield json.loads(event.removeprefix(b"data: "))


def write_bfloat16(source: Path, target: Path) -> None:
    """Write the model of a GGUF file with its matrices in bfloat16."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, Keys, dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields[Keys.General.ARCHITECTURE].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in (Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Serve until the process is told to end."""
    import xllamacpp

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", help="GGUF")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--slots", type=int, default=1, help="clients at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="longest answer (default: %(default)s)")
    args = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = args.file
    params.port = args.port
    params.n_parallel = args.slots
    params.n_ctx = args.slots * (ROOM + args.tokens)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cpu_count()
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    finally:
        os._exit(0)
