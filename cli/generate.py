"""``expertmesh generate``: text from a router, streamed to the terminal or as JSON lines."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import uvloop

from expertmesh.cli.addresses import router_address
from expertmesh.cli.connection import door_tls, key_for
from expertmesh.cli.constraint_options import CONSTRAINT_KEYS, constraint_options, line_constraint
from expertmesh.mesh.client import Completion, GenerateClient, build_request, status_line
from expertmesh.mesh.config import TlsConfig, load_config
from expertmesh.mesh.errors import UserError, why_unreadable
from expertmesh.v1 import generate_pb2

EXIT_REFUSED = 1
EXIT_INTERRUPTED = 130

_LINE_KEYS: dict[str, type] = {
    "max_tokens": int,
    "min_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "stop": list,
    "ignore_eos": bool,
    "logprobs": int,
    **CONSTRAINT_KEYS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One prompt. ``source``: where it stands, for messages about it."""

    source: str
    request: generate_pb2.GenerateRequest


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", show_default=False, help="Text to go on from; each is a request."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate, as far as they fit; unset = what fits.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 = greedy; unset = the model's default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="In (0, 1].")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 or -1 = off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="In [0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives reported per token; with --json.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is JSON that fits this schema; - = stdin.")
    ] = None,
    json_object: Annotated[bool, typer.Option("--json-object", help="The output is a JSON object.")] = False,
    regex: Annotated[str | None, typer.Option(help="The output matches this regular expression as a whole.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is a sentence of this grammar (Lark); - = stdin.")
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The output is this text, or that of another --choice.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt, one a line.")] = False,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE.jsonl", help='{"prompt": ..., "max_tokens": ...} a line; - = stdin.'),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 1,
    router: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Unset = the mesh that runs here.")] = None,
    model: Annotated[str, typer.Option(help="Unset = the served model.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Seconds a prompt may take.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="mesh.yaml whose api and tls sections connect; unset = no TLS.")
    ] = None,
) -> None:
    """Generate text for each PROMPT and print it as it comes.

    A router that asks for an API key gets that of EXPERTMESH_API_KEY, or of the file EXPERTMESH_API_KEY_FILE.

    Exit status: 0; 1 when the router refused a prompt; 2 for a wrong argument or file; 130 after Ctrl-C.
    """
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise UserError("--timeout", f"is {timeout:g}", "give a number of seconds above 0")
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
        "logprobs": logprobs,
        **constraint_options(
            json_schema=json_schema, json_object=json_object, regex=regex, grammar=grammar, choice=choice
        ),
    }
    jobs = [_job(f"PROMPT {number}", text, model, options) for number, text in enumerate(prompts or [], start=1)]
    if prompts_file is not None:
        jobs += _read_jobs(prompts_file, model, options)
    if not jobs:
        raise UserError("PROMPT", "there is none", "give one or more prompts, or --prompts FILE.jsonl")
    config, address = load_config(config_file), router_address(router)
    tls = door_tls(config)
    key = key_for(address, tls, config.api)
    run = _Run(address, tls, key, jobs, as_json=as_json, concurrency=concurrency, timeout_s=timeout)
    raise typer.Exit(uvloop.run(run.interruptible()))


class _Run:
    """All prompts of one command."""

    def __init__(
        self,
        address: str,
        tls: TlsConfig,
        key: str | None,
        jobs: Sequence[Job],
        *,
        as_json: bool,
        concurrency: int,
        timeout_s: float | None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._key = key
        self._jobs = jobs
        self._as_json = as_json
        self._concurrency = concurrency
        self._timeout_s = timeout_s

    async def interruptible(self) -> int:
        """The exit status; Ctrl-C cancels what runs, on the router too."""
        task = asyncio.create_task(self._run(), name="generate")
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            print("interrupted", file=sys.stderr)  # noqa: T201 - the command line speaks here
            return EXIT_INTERRUPTED

    async def _run(self) -> int:
        async with GenerateClient(self._address, self._tls, self._key) as client:
            if self._as_json or len(self._jobs) > 1:
                return await self._run_many(client)
            return await self._stream_one(client, self._jobs[0])

    async def _stream_one(self, client: GenerateClient, job: Job) -> int:
        ended_line = True
        try:
            async for response in client.stream(job.request, timeout_s=self._timeout_s):
                if response.text:
                    ended_line = response.text.endswith("\n")
                    _write(response.text)
        except grpc.aio.AioRpcError as error:
            _write("" if ended_line else "\n")
            return _refused(error)
        except asyncio.CancelledError:
            _write("" if ended_line else "\n")
            raise
        _write("" if ended_line else "\n")
        return 0

    async def _run_many(self, client: GenerateClient) -> int:
        """Print results in the order of the prompts, each as soon as it and those before it are there."""
        slots = asyncio.Semaphore(self._concurrency)

        async def complete(job: Job) -> Completion | grpc.aio.AioRpcError:
            async with slots:
                try:
                    return await client.complete(job.request, timeout_s=self._timeout_s)
                except grpc.aio.AioRpcError as error:
                    return error

        status = 0
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(complete(job), name=job.source) for job in self._jobs]
            for job, task in zip(self._jobs, tasks, strict=True):
                result = await task
                if isinstance(result, Completion):
                    _write(
                        (json.dumps(_as_object(result), ensure_ascii=False) if self._as_json else result.text) + "\n"
                    )
                    continue
                status = _refused(result, f"{job.source}: " if len(self._jobs) > 1 else "")
                if self._as_json and len(self._jobs) > 1:  # a line a prompt, whatever came of it
                    _write(json.dumps({"error": status_line(result)}) + "\n")
        return status


def _as_object(completion: Completion) -> dict[str, Any]:
    """The command's contract: ``text``, ``token_ids`` (generated), ``prompt_tokens``, ``finish_reason`` and more."""
    shown: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_tokens": completion.finish.prompt_tokens,
        "finish_reason": completion.finish_reason,
        "ttft_ms": round(completion.finish.ttft_ms, 3),
        "request_id": completion.request_id,
    }
    if completion.logprobs:
        shown["logprobs"] = [
            {
                "token_id": entry.token_id,
                "logprob": entry.logprob,
                "top_logprobs": [{"token_id": top.token_id, "logprob": top.logprob} for top in entry.top_logprobs],
            }
            for entry in completion.logprobs
        ]
    return shown


def _read_jobs(path: Path, model: str, options: dict[str, Any]) -> list[Job]:
    """Prompts of a JSON-lines file; keys of a line go before the command's options.

    Raises:
        UserError: the file cannot be read, or a line is wrong; names it by its number.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts {path}", f"cannot be read ({why_unreadable(error)})", "give a JSON-lines file in UTF-8"
        ) from None
    jobs = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            jobs.append(_parse_line(f"{path}:{number}", line, model, options))
    if not jobs:
        raise UserError(f"--prompts {path}", "holds no prompt", 'write {"prompt": "..."} lines')
    return jobs


def _parse_line(source: str, line: str, model: str, options: dict[str, Any]) -> Job:
    remedy = 'write {"prompt": "...", "max_tokens": 32}'
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(source, f"is not JSON ({error})", remedy) from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str | list):
        raise UserError(source, "holds no prompt", remedy)
    prompt = entry["prompt"]
    if isinstance(prompt, list) and not all(type(item) is int for item in prompt):
        raise UserError(source, "its prompt is a list of other things than token ids", remedy)
    given: dict[str, Any] = {}
    for name, value in entry.items():
        if name in _LINE_KEYS and value is not None:
            given[name] = line_constraint(name, _typed(source, name, value))
    return _job(source, prompt, model, options | given)


def _typed(source: str, name: str, value: Any) -> Any:
    wanted = _LINE_KEYS[name]
    if wanted is float and type(value) is int:
        return float(value)
    if name == "stop" and isinstance(value, str):
        return [value]
    if type(value) is not wanted or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        described = "list of strings" if wanted is list else wanted.__name__
        raise UserError(source, f"{name} is {value!r}", f"give a {described}")
    return value


def _job(source: str, prompt: str | Sequence[int], model: str, options: dict[str, Any]) -> Job:
    try:
        return Job(source=source, request=build_request(prompt, model=model, **options))
    except (ValueError, TypeError) as error:  # beyond int32, or bytes that are no UTF-8
        raise UserError(source, f"cannot be sent ({error})", "use numbers and text in their usual range") from None


def _refused(error: grpc.aio.AioRpcError, prefix: str = "") -> int:
    line = f"error: {prefix}{status_line(error)}{_remedy(error)}"
    print(line, file=sys.stderr)  # noqa: T201 - the command line speaks here
    return EXIT_REFUSED


def _remedy(error: grpc.aio.AioRpcError) -> str:
    """Where gRPC speaks, which knows none; the router gives its own."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
        tls = ", and the TLS that it asks for with --config" if "Socket closed" in details else ""
        return f"; is the mesh running? Give another address with --router or EXPERTMESH_ROUTER{tls}"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "; give it more time with --timeout, or fewer tokens with --max-tokens"
    return ""


def _write(text: str) -> None:
    """To stdout at once, whatever its encoding can hold."""
    if text:
        sys.stdout.buffer.write(text.encode(sys.stdout.encoding, errors="replace"))
        sys.stdout.flush()
