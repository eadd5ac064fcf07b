"""``vllm.grpc.engine.VllmEngine``: the service that gateways of vLLM's ecosystem speak, token ids in and out.

Its messages come from the package smg-grpc-proto, which is imported where the service is asked for. Methods that a mesh
has no answer to (embeddings, profiles, KV events) are not there: gRPC says UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

import expertmesh
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc_door import principal
from expertmesh.router.calls import Calls
from expertmesh.router.pool import LinkPool
from expertmesh.router.vllm_requests import to_requests
from expertmesh.router.wire import Context, answering, call_of, reader, well_formed, write
from expertmesh.v1 import generate_pb2

SERVICE_NAME = "vllm.grpc.engine.VllmEngine"

_FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "abort",
}
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("config.json", "generation_config.json"),
)
_CHUNK_BYTES = 2**20


class VllmEngineService:
    """
    Args:
        why_not_serving: '' while the mesh serves.

    Raises:
        UserError: the package with the messages is missing.
    """

    def __init__(self, calls: Calls, pool: LinkPool, why_not_serving: Callable[[], str]) -> None:
        self._pb, self._common = _messages("vllm_engine_pb2"), _messages("common_pb2")
        self._calls = calls
        self._pool = pool
        self._why_not_serving = why_not_serving
        self._started_s = time.monotonic()
        self._last_request_unix_s = 0.0
        self._running: dict[str, Sequence[str]] = {}  # by the id that was given: those of its choices

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the service to a server; returns its full name."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        pb, common = self._pb, self._common
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Generate": stream(self.generate, reader(pb.GenerateRequest), write),
            "HealthCheck": unary(self.health_check, reader(pb.HealthCheckRequest), write),
            "Abort": unary(self.abort, reader(pb.AbortRequest), write),
            "GetModelInfo": unary(self.get_model_info, reader(pb.GetModelInfoRequest), write),
            "GetServerInfo": unary(self.get_server_info, reader(pb.GetServerInfoRequest), write),
            "GetLoads": unary(self.get_loads, reader(pb.GetLoadsRequest), write),
            "GetTokenizer": stream(self.get_tokenizer, reader(common.GetTokenizerRequest), write),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        return (SERVICE_NAME,)

    async def generate(self, request: Any, context: Context) -> None:
        async with answering(context):
            self._last_request_unix_s = time.time()
            asked = well_formed(request)
            requests = to_requests(asked)
            outputs = [_Output(self._pb, index, request) for index, request in enumerate(requests)]
            turn = asyncio.Lock()  # gRPC has one message of a call under way: it fails a second one, then hangs

            async def emit(index: int, response: generate_pb2.GenerateResponse) -> None:
                messages = outputs[index].add(response, asked.stream)
                async with turn:
                    for message in messages:
                        await context.write(message)

            if asked.request_id:
                self._running[asked.request_id] = [request.request_id for request in requests]
            try:
                await self._calls.run_all(requests, emit, call_of(context))
            finally:
                self._running.pop(asked.request_id, None)

    async def health_check(self, request: Any, context: Context) -> Any:
        reason = self._why_not_serving()
        return self._pb.HealthCheckResponse(healthy=not reason, message=reason)

    async def abort(self, request: Any, context: Context) -> Any:
        async with answering(context):
            for request_id in well_formed(request).request_ids:
                for choice_id in self._running.get(request_id, ()):
                    self._calls.runner.cancel(choice_id, principal())
            return self._pb.AbortResponse()

    async def get_model_info(self, request: Any, context: Context) -> Any:
        spec, defaults = self._calls.model.spec, self._calls.model.limits.defaults
        raw = json.loads((spec.path / "config.json").read_bytes())  # was checked when the spec was made
        sampling = {
            name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        }
        return self._pb.GetModelInfoResponse(
            model_path=str(spec.path),
            tokenizer_path=str(spec.path),
            is_generation=True,
            max_context_length=spec.max_model_len,
            max_req_input_len=spec.max_model_len - 1,
            vocab_size=spec.vocab_size,
            served_model_name=spec.name,
            model_type=str(raw.get("model_type", "")),
            architectures=[str(name) for name in raw.get("architectures") or ()],
            eos_token_ids=spec.eos_token_ids,
            pad_token_id=_token_id(raw, "pad_token_id"),
            bos_token_id=_token_id(raw, "bos_token_id"),
            default_sampling_params_json=json.dumps(sampling),
        )

    async def get_server_info(self, request: Any, context: Context) -> Any:
        return self._pb.GetServerInfoResponse(
            active_requests=len(self._calls.runner.admission),
            is_paused=bool(self._why_not_serving()),
            last_receive_timestamp=self._last_request_unix_s,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="vllm-grpc",  # what speaks the protocol
            data_parallel_size=1,  # which attention server a request goes to is the mesh's to choose
            model_dtype=f"torch.{self._calls.model.spec.dtype_name}",
        )

    async def get_loads(self, request: Any, context: Context) -> Any:
        total = len(self._calls.runner.admission)
        waiting = min(total, self._pool.num_waiting + self._pool.num_unplaced)
        load = self._pb.SchedulerLoad(num_total_reqs=total, num_waiting_reqs=waiting, num_running_reqs=total - waiting)
        return self._pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(), version=expertmesh.__version__, dp_rank_count=1, loads=[load]
        )

    async def get_tokenizer(self, request: Any, context: Context) -> None:
        async with answering(context):
            data = await asyncio.to_thread(_zipped, self._calls.model.spec.path)
            for start in range(0, len(data), _CHUNK_BYTES):
                is_last = start + _CHUNK_BYTES >= len(data)
                await context.write(
                    self._common.GetTokenizerChunk(
                        data=data[start : start + _CHUNK_BYTES],
                        sha256=hashlib.sha256(data).hexdigest() if is_last else "",
                    )
                )


class _Output:
    """One choice: chunks as they come where the caller streams, and at the end the whole."""

    def __init__(self, pb: Any, index: int, request: generate_pb2.GenerateRequest) -> None:
        self._pb = pb
        self._index = index
        self._prompt_tokens = len(request.tokenized.input_ids)  # of a text it is known at the end
        self._token_ids: list[int] = []
        self._logprobs: list[generate_pb2.TokenLogprob] = []

    def add(self, response: generate_pb2.GenerateResponse, stream: bool) -> Sequence[Any]:
        """The messages that it makes."""
        self._token_ids += response.token_ids
        self._logprobs += response.logprobs
        messages = []
        if stream and response.token_ids:
            chunk = self._pb.GenerateStreamChunk(
                token_ids=response.token_ids,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=len(self._token_ids),
                output_logprobs=self._shown(response.logprobs),
                index=self._index,
            )
            messages.append(self._pb.GenerateResponse(chunk=chunk))
        if response.HasField("finish"):
            messages.append(self._pb.GenerateResponse(complete=self._complete(response.finish)))
        return messages

    def _complete(self, finish: generate_pb2.Finish) -> Any:
        complete = self._pb.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=_FINISH_NAMES[finish.reason],
            prompt_tokens=finish.prompt_tokens,
            completion_tokens=finish.completion_tokens,
            cached_tokens=finish.cached_tokens,
            output_logprobs=self._shown(self._logprobs),
            index=self._index,
        )
        matched = finish.WhichOneof("matched_stop")
        if matched is not None:
            setattr(complete, matched, getattr(finish, matched))
        return complete

    def _shown(self, logprobs: Sequence[generate_pb2.TokenLogprob]) -> Any:
        if not logprobs:
            return None
        return self._pb.OutputLogProbs(
            token_logprobs=[entry.logprob for entry in logprobs],
            token_ids=[entry.token_id for entry in logprobs],
            top_logprobs=[
                self._pb.TopLogProbs(
                    values=[top.logprob for top in entry.top_logprobs],
                    token_ids=[top.token_id for top in entry.top_logprobs],
                )
                for entry in logprobs
            ],
        )


def _messages(module: str) -> Any:
    try:
        return importlib.import_module(f"smg_grpc_proto.generated.{module}")
    except ImportError as error:
        raise UserError(
            "router.vllm_grpc", f"its messages cannot be imported ({error})", "install expertmesh[vllm-grpc]"
        ) from None


def _token_id(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    return value if isinstance(value, int) else -1


def _zipped(folder: Path) -> bytes:
    """A zip of what a tokenizer is made of; the same bytes for the same files."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                archive.writestr(zipfile.ZipInfo(name), (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    return data.getvalue()
