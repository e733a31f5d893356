"""`generate` and `score`."""

from __future__ import annotations

import argparse
import math
import sys

from cluster.backend import Prompt, SamplingParams
from cluster.commands.options import Subparsers, add_remote, token_ids
from cluster.commands.output import print_json, print_line
from cluster.commands.pin import add_version_options, version_of
from cluster.service.client import Client

_DEFAULTS = SamplingParams()


def add_parsers(subparsers: Subparsers) -> None:
    generate = add_remote(
        subparsers, "generate", run_generate, help="continue a prompt, as a stream of text", timeout_s=600.0
    )
    _add_prompt(generate)
    generate.add_argument("--max-tokens", type=int, default=_DEFAULTS.max_tokens, help="default: %(default)s")
    generate.add_argument(
        "--temperature", type=float, default=_DEFAULTS.temperature, help="0 is greedy (default: %(default)s)"
    )
    generate.add_argument("--top-p", type=float, default=_DEFAULTS.top_p, help="default: %(default)s")
    generate.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="default: %(default)s")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    score = add_remote(subparsers, "score", run_score, help="log-probabilities of given text or tokens")
    _add_prompt(score)


def run_generate(args: argparse.Namespace, client: Client) -> int:
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    chunks = []
    for chunk in client.generate(_prompt(args), params, version_of(args)):
        chunks.append(chunk)
        if not args.json:
            print(chunk.text, end="", flush=True)
    if not args.json:
        print()
        return 0
    print_json(
        {
            "text": "".join(chunk.text for chunk in chunks),
            "token_ids": [token_id for chunk in chunks for token_id in chunk.token_ids],
            "finish_reason": chunks[-1].finish_reason if chunks else "",
            "prompt_tokens": chunks[-1].prompt_tokens if chunks else 0,
            "versions": sorted({chunk.version for chunk in chunks}),
        }
    )
    return 0


def run_score(args: argparse.Namespace, client: Client) -> int:
    result = client.score(_prompt(args), version_of(args))
    num_scored = len(result.logprobs)
    nats = -sum(result.logprobs) / num_scored if num_scored else 0.0
    if args.json:
        print_json({"token_ids": result.token_ids, "logprobs": result.logprobs, "version": result.version})
    else:
        print_line(
            f"{len(result.token_ids)} tokens, {nats:.4f} nats a token (perplexity {math.exp(min(nats, 700)):.3f}), "
            f"version {result.version}"
        )
    return 0


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="TEXT", help="the text; - reads it from standard input")
    add_version_options(parser)
    prompt.add_argument("--token-ids", type=token_ids, metavar="ID,ID,...", help="tokens instead of text")


def _prompt(args: argparse.Namespace) -> Prompt:
    if args.token_ids is not None:
        return Prompt(token_ids=args.token_ids)
    return Prompt(text=sys.stdin.read() if args.prompt == "-" else args.prompt)
