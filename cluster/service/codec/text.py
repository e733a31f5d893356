"""Prompts and what the model makes of them."""

from __future__ import annotations

from actors.errors import InvalidInput
from cluster.backend import EmbedResult, GenerateChunk, Prompt, SamplingParams, ScoreResult
from cluster.service.codec import checks, enums
from cluster.service.codec.checks import MAX_INT32, MAX_INT64, Range
from protos.moecluster.v1 import inference_pb2 as pb

MAX_PROMPT_CHARS = 4 << 20
MAX_PROMPT_TOKENS = 1 << 20
MAX_STOP_TEXTS = 16
MAX_STOP_CHARS = 256
_FINISH = pb.FinishReason.DESCRIPTOR


def prompt_from_message(message: pb.Prompt) -> Prompt:
    content = message.WhichOneof("content")
    prompt = Prompt(
        text=message.text if content == "text" else None,
        token_ids=tuple(message.token_ids.ids) if content == "token_ids" else None,
    )
    check_prompt(prompt)
    return prompt


def prompt_to_message(prompt: Prompt) -> pb.Prompt:
    check_prompt(prompt)
    if prompt.token_ids is not None:
        return pb.Prompt(token_ids=pb.TokenIds(ids=prompt.token_ids))
    return pb.Prompt(text=prompt.text)


def check_prompt(prompt: Prompt) -> None:
    if (prompt.text is None) == (prompt.token_ids is None):
        raise InvalidInput("give exactly one of text and token_ids", field="prompt", value=prompt)
    if prompt.text is not None:
        checks.text("prompt.text", prompt.text, MAX_PROMPT_CHARS)
    else:
        _check_token_ids(prompt.token_ids or ())


def params_from_message(message: pb.SamplingParams) -> SamplingParams:
    given = {descriptor.name: value for descriptor, value in message.ListFields()}
    params = SamplingParams(**{**given, "stop": tuple(message.stop)})
    check_params(params)
    return params


def params_to_message(params: SamplingParams) -> pb.SamplingParams:
    check_params(params)
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        seed=params.seed,
        stop=params.stop,
    )


def check_params(params: SamplingParams) -> None:
    checks.number("params.max_tokens", params.max_tokens, Range(1, MAX_PROMPT_TOKENS))
    checks.number("params.temperature", params.temperature, Range(0, 100))
    checks.number("params.top_p", params.top_p, Range(0, 1, open_low=True))
    checks.number("params.seed", params.seed, Range(0, MAX_INT64))
    if len(params.stop) > MAX_STOP_TEXTS:
        raise InvalidInput("too many", field="params.stop", value=params.stop, remedy=f"at most {MAX_STOP_TEXTS}")
    for index, stop in enumerate(params.stop):
        checks.text(f"params.stop[{index}]", stop, MAX_STOP_CHARS)


def chunk_to_message(chunk: GenerateChunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        version=chunk.version,
        finish_reason=enums.to_number(_FINISH, chunk.finish_reason),
        prompt_tokens=chunk.prompt_tokens,
    )


def chunk_from_message(message: pb.GenerateResponse) -> GenerateChunk:
    return GenerateChunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        version=message.version,
        finish_reason=enums.to_name(_FINISH, message.finish_reason),
        prompt_tokens=message.prompt_tokens,
    )


def score_to_message(result: ScoreResult) -> pb.ScoreResponse:
    return pb.ScoreResponse(token_ids=result.token_ids, logprobs=result.logprobs, version=result.version)


def score_from_message(message: pb.ScoreResponse) -> ScoreResult:
    return ScoreResult(tuple(message.token_ids), tuple(message.logprobs), message.version)


def embed_to_message(result: EmbedResult) -> pb.EmbedResponse:
    return pb.EmbedResponse(embedding=result.embedding, num_tokens=result.num_tokens, version=result.version)


def embed_from_message(message: pb.EmbedResponse) -> EmbedResult:
    return EmbedResult(tuple(message.embedding), message.num_tokens, message.version)


def _check_token_ids(token_ids: tuple[int, ...]) -> None:
    checks.number("number of prompt.token_ids", len(token_ids), Range(1, MAX_PROMPT_TOKENS))
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id <= MAX_INT32:
            checks.number(f"prompt.token_ids[{index}]", token_id, Range(0, MAX_INT32))
