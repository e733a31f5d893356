"""Requests without end over one channel of gRPC's own, with the retry policy that k8s/README.md gives to clients."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from protos.moecluster.v1 import inference_pb2, inference_pb2_grpc
from tests.manifests.kustomize import K8S

TIMEOUT_S = 60.0
SHORT, LONG = 8, 64
"""Tokens of a stream."""


def retry_policy() -> str:
    """The service config in k8s/README.md."""
    (text,) = re.findall(r"```json\n(.*?)```", (K8S / "README.md").read_text(), flags=re.DOTALL)
    return json.dumps(json.loads(text))


@dataclass
class Asked:
    served: int = 0
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def end(self) -> None:
        """When the requests that are under way have been answered."""
        self.stop.set()
        for thread in self.threads:
            thread.join(TIMEOUT_S)

    def wait_for(self, more: int) -> None:
        """Until so many more have been served."""
        wanted, deadline = self.served + more, time.monotonic() + TIMEOUT_S
        while self.served < wanted:
            assert not self.failed, self.failed[0]
            assert time.monotonic() < deadline, f"{self.served} of {wanted} requests were served"
            time.sleep(0.05)


@contextmanager
def asking(*targets: str) -> Iterator[Asked]:
    """Inside, a score, a short and a long stream are under way at any time; the first target that answers has them."""
    asked = Asked()
    options = [("grpc.service_config", retry_policy()), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"ipv4:{','.join(targets)}", options) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        prompt = inference_pb2.Prompt(text="def main(")

        def score() -> None:
            stub.Score(inference_pb2.ScoreRequest(prompt=prompt), timeout=TIMEOUT_S)

        def stream(tokens: int) -> None:
            params = inference_pb2.SamplingParams(max_tokens=tokens)
            request = inference_pb2.GenerateRequest(prompt=prompt, params=params)
            ids = [token for response in stub.Generate(request, timeout=TIMEOUT_S) for token in response.token_ids]
            if not ids:
                raise ValueError("a stream without a token")

        def run(number: int) -> None:
            ask = (score, lambda: stream(SHORT), lambda: stream(LONG))[number]
            while not asked.stop.is_set():
                try:
                    ask()
                except (grpc.RpcError, ValueError) as error:
                    with asked.lock:
                        asked.failed.append(str(error))
                    time.sleep(0.1)
                else:
                    with asked.lock:
                        asked.served += 1

        asked.threads += [threading.Thread(target=run, args=(number,), daemon=True) for number in range(3)]
        for thread in asked.threads:
            thread.start()
        try:
            yield asked
        finally:
            asked.end()
