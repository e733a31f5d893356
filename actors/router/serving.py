"""Serving from the weights that are being trained: streams, scores, embeddings and losses of one router."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actors.errors import InvalidInput
from actors.fairlock import FairLock
from actors.losses import token_losses
from actors.moe.gating import GatePast
from actors.moe.settings import MODEL_GATE
from actors.router import captured
from actors.router.apart import ExpertsApart
from actors.router.batch import Forward, plain_forward
from actors.router.commits import LastCommit
from actors.router.dispatcher import Dispatcher
from actors.router.engine import DecodeEngine
from actors.router.inplace import ExpertsInPlace
from actors.router.learner import Learner
from actors.router.passes import Purpose
from actors.router.pins import PinnedModels
from actors.router.prompt import can_be_chunked
from actors.router.served import Served
from actors.router.versions import VersionGate
from actors.values import NEWEST, Sampling, TokenEvent, VersionChoice

DECODE_BATCH = {"cuda": 32, "cpu": 1}
"""Streams that share a forward, unless told."""
PROMPT_CHUNK = {"cuda": 2048, "cpu": 512}
"""Tokens of a prompt between two turns of the streams that decode, unless told."""
_NEWEST = object()


class Serving:
    """Called by any number of threads; one forward at a time, over links of its own."""

    def __init__(
        self,
        learner: Learner,
        dispatcher: Dispatcher,
        last_commit: LastCommit,
        version: Callable[[], int],
        *,
        max_sessions: int,
        decode_batch: int = 0,
        capture: str = "auto",
        prompt_chunk: int | None = None,
    ) -> None:
        """`version`: of the trunk, now. `decode_batch`, `capture`, `prompt_chunk`: see `router.decode_batch`,
        `router.captured` and `router.prompt_chunk` of a cluster config."""
        self._learner, self._dispatcher, self._last_commit, self._version = learner, dispatcher, last_commit, version
        self._lock = FairLock()
        self._gate = VersionGate()
        text = learner.skeleton.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.max_positions = int(getattr(text, "max_position_embeddings", 1 << 20))
        self.pins = PinnedModels()
        self._capture = capture
        if not can_be_chunked(learner.view):
            prompt_chunk = 0
        self._engine = DecodeEngine(
            learner.view,
            max_sessions=max_sessions,
            max_positions=self.max_positions,
            end_ids=_end_ids(learner.skeleton.config),
            batch=decode_batch or DECODE_BATCH[learner.device.type],
            new_forward=self._new_forward,
            prompt_chunk=PROMPT_CHUNK[learner.device.type] if prompt_chunk is None else prompt_chunk,
        )

    # -- requests -----------------------------------------------------------------------------------------------------

    # `choice`: `VersionGone` if nothing keeps that version.

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        timeout_s: float,
        choice: VersionChoice = NEWEST,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[TokenEvent]:
        """`timeout_s`: TimeoutError if the prompt has not begun by then, or has chunks left. `is_wanted` is asked
        between two chunks too; `StepAborted` if not."""
        self._check_prompt(prompt)
        return self._engine.stream(self._served(choice), prompt, sampling, timeout_s, is_wanted)

    def score(self, ids: Sequence[int], choice: VersionChoice = NEWEST) -> tuple[list[float], int]:
        """Natural log-probability of each token but the first, and the version they are of."""
        self._check_prompt(ids, least=2)
        logits_BSV, version = self._logits(torch.tensor([ids]), choice)
        logprobs_SV = torch.log_softmax(logits_BSV[0, :-1].float(), dim=-1)
        next_S1 = torch.tensor(ids[1:], device=logprobs_SV.device).unsqueeze(1)
        return logprobs_SV.gather(1, next_S1).squeeze(1).tolist(), version

    def logits(self, ids_BS: Tensor, choice: VersionChoice = NEWEST) -> Tensor:
        """[B, S, V] of the serving view."""
        self.check_ids(ids_BS, least=1)
        return self._logits(ids_BS, choice)[0]

    def embed(self, ids: Sequence[int], choice: VersionChoice = NEWEST) -> tuple[list[float], int]:
        """Mean of the last hidden states [D]."""
        self._check_prompt(ids)
        served = self._served(choice)
        with served.guard(len(ids), None) as used_version, torch.no_grad():
            base: nn.Module = served.model().base_model
            ids_BS = torch.tensor([ids], device=self._learner.device)
            hidden_BSD = base(input_ids=ids_BS, use_cache=False).last_hidden_state
            version = used_version()
        return hidden_BSD[0].float().mean(0).tolist(), version

    def evaluate(self, batches: Sequence[Tensor]) -> tuple[float, int]:
        """Mean loss (nats a token) over the batches, and their number of predicted tokens."""
        total, count = 0.0, 0
        for ids_BS in batches:
            self.check_ids(ids_BS)
            logits_BSV, _ = self._logits(ids_BS)
            total += token_losses(logits_BSV, ids_BS.to(logits_BSV.device)).item()
            count += ids_BS.shape[0] * (ids_BS.shape[1] - 1)
        return total / max(count, 1), count

    def queue(self) -> tuple[int, float]:
        """Streams that wait for their turn, and how long the first of them has, in seconds."""
        return self._engine.queue()

    def close(self) -> None:
        self._engine.stop()
        self._dispatcher.links.cut(list(self._dispatcher.links))  # the step at hand may wait for one that is frozen
        self._engine.close()
        self._dispatcher.links.close()
        self.pins.close()

    def _served(self, choice: VersionChoice) -> Served:
        if not choice.is_newest:
            return self.pins.choose(choice, self._version()).served
        guard = partial(self.reading, max_behind=choice.max_behind)
        key = (_NEWEST, choice.max_behind)
        return Served(
            lambda: self._learner.view,
            guard,
            lambda: self._learner.routing.new_pasts(),
            self._gate.hold,
            lambda: self._gate.is_awaited or self._lock.num_waiting > 0,
            key,
            is_lasting=True,
        )

    def _new_forward(self, served: Served) -> Forward:
        """Of a batch of streams."""
        device = self._learner.device
        if self._capture == "off" or not captured.can_capture(device):
            return plain_forward
        is_newest = isinstance(served.key, tuple) and served.key[0] is _NEWEST
        # A gate of ours looks at its scores on the host, so that no graph can hold it.
        inside = is_newest and self._learner.routing.settings.kind == MODEL_GATE
        experts: captured.Experts = captured.Nowhere()
        if inside:
            experts = captured.FirstOf(ExpertsInPlace(self._dispatcher, device), ExpertsApart(self._dispatcher, device))
        return captured.CapturedForward(experts, must=self._capture == "on")

    def _logits(self, ids_BS: Tensor, choice: VersionChoice = NEWEST) -> tuple[Tensor, int]:
        served = self._served(choice)
        with served.guard(ids_BS.shape[1], None) as used_version, torch.no_grad():
            logits_BSV = served.model()(input_ids=ids_BS.to(self._learner.device), use_cache=False).logits
            return logits_BSV, used_version()

    # -- what keeps forwards and updates apart ------------------------------------------------------------------------

    @contextmanager
    def reading(
        self, sequence_length: int = 1, pasts: Sequence[GatePast] | None = None, *, max_behind: int = 0
    ) -> Iterator[Callable[[], int]]:
        """One forward at a time on the serving links, none while a commit goes out.

        -> tells, after the forward, the least version of the experts that it used.
        """
        self._gate.wait_until_open()
        with self._lock, self._gate.reading():
            self.reach()
            version = self._version()
            purpose = Purpose(min_version=version, sequence_length=sequence_length, pasts=pasts, max_behind=max_behind)
            self._dispatcher.begin(purpose)
            yield lambda: self._dispatcher.used_version
            self._dispatcher.finish()

    def reach(self) -> None:
        """Open links, over which every expert actor has confirmed the last commit. Inside `reading` or `stopped`."""
        lost = self._dispatcher.links.lost
        self._dispatcher.reopen()
        if lost - self._dispatcher.links.lost:
            self._last_commit.doubt()
        self._last_commit.bring(self._dispatcher.links, self._version())

    def pausing(self) -> AbstractContextManager[None]:
        """Forwards wait inside. To be entered and left in any thread."""
        return self._gate.writing()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Forwards wait inside, and the links are free for other questions. It does not wait its turn behind all of
        them: the one that is under way ends, and this is next."""
        with self._gate.writing():
            yield

    def shut(self) -> None:
        """Weights are about to be of two models: forwards wait until `open`, whoever dies meanwhile. To be called
        inside `pausing` or `stopped`."""
        self._gate.shut()

    def open(self) -> None:
        """All weights belong together again."""
        self._gate.open()

    @property
    def is_shut(self) -> bool:
        return self._gate.is_shut

    # -- input --------------------------------------------------------------------------------------------------------

    def check_ids(self, ids_BS: Tensor, least: int = 2) -> None:
        if ids_BS.ndim != 2 or ids_BS.shape[0] == 0 or ids_BS.shape[1] < least:
            raise InvalidInput(f"need [B, S] with S of at least {least}", field="token_ids", value=tuple(ids_BS.shape))
        if ids_BS.shape[1] > self.max_positions:
            raise InvalidInput(
                "sequence is longer than the model",
                field="sequence_length",
                value=ids_BS.shape[1],
                remedy=f"use at most {self.max_positions} tokens",
            )
        low, high = int(ids_BS.min()), int(ids_BS.max())
        if low < 0 or high >= self.vocab_size:
            raise InvalidInput(
                "token outside the vocabulary",
                field="token_ids",
                value=low if low < 0 else high,
                remedy=f"ids are 0 to {self.vocab_size - 1}",
            )

    def _check_prompt(self, ids: Sequence[int], least: int = 1) -> None:
        self.check_ids(torch.tensor([list(ids)], dtype=torch.int64), least)


def _end_ids(config: Any) -> list[int]:
    ids = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
