"""Messages and plain values are inverse to one another, and what is wrong with a value is said exactly."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.values import Growth
from cluster.backend import (
    ActorStatus,
    Checkpoint,
    ClusterStatus,
    EmbedResult,
    ExpertCache,
    GenerateChunk,
    GpuUse,
    GroupMove,
    Job,
    JobEvent,
    JobState,
    LedgerReport,
    LinkUse,
    LoadReport,
    LoadStep,
    ModelDirectory,
    Operation,
    OperationState,
    Prompt,
    Rebalance,
    SamplingParams,
    ScoreResult,
)
from cluster.config import BatchConfig, DataConfig, EvalConfig, JobConfig, OptimizerConfig, ScheduleConfig
from cluster.control.ledger import KINDS, Entry, Summary
from cluster.service.codec import checkpoints, config, jobs, ledger, loads, moves, operations, status, text
from cluster.service.codec.checks import MAX_INT32, MAX_INT64, Range
from protos.moecluster.v1 import cluster_pb2, inference_pb2, training_pb2

COUNTS = st.integers(0, MAX_INT64)
SIZES = st.integers(0, MAX_INT32)
TIMES = st.integers(0, 4 * 10**15).map(lambda micros: micros / 1e6)
NAMES = st.text(max_size=20)
UNIT = st.floats(0, 1, exclude_max=True)
CONFIGS = st.builds(
    JobConfig,
    steps=st.integers(1, 10**9),
    batch=st.builds(BatchConfig, st.integers(1, 64), st.integers(2, 1024), st.integers(1, 64)),
    optimizer=st.builds(
        OptimizerConfig,
        lr=st.floats(1e-9, 100),
        beta1=UNIT,
        beta2=UNIT,
        eps=st.floats(1e-12, 1),
        clip_norm=UNIT,
        experts=st.sampled_from(["adamw", "muon"]),
        momentum=UNIT,
        sparse=st.sampled_from(["none", "skip"]),
        delay_correction=st.floats(0, 1000),
        staleness=st.integers(0, 64),
    ),
    schedule=st.builds(ScheduleConfig, st.sampled_from(["cosine", "constant"]), st.just(0), UNIT),
    data=st.builds(
        DataConfig,
        source=st.just("path:data"),
        format=st.sampled_from(["auto", "text", "jsonl", "parquet"]),
        shuffle=st.booleans(),
        seed=COUNTS,
        heldout_every=st.integers(2, 100),
    ),
    eval=st.builds(EvalConfig, st.integers(0, 100), st.integers(1, 100)),
)
JOBS = st.builds(
    Job,
    id=NAMES,
    request_id=NAMES,
    config=CONFIGS,
    state=st.sampled_from(JobState),
    step=COUNTS,
    created_s=TIMES,
    started_s=st.none() | TIMES,
    ended_s=st.none() | TIMES,
    error=NAMES,
    last_event=COUNTS,
)
EVENTS = st.builds(
    JobEvent,
    number=COUNTS,
    time_s=TIMES,
    kind=st.sampled_from(["state", "step", "eval", "note"]),
    state=st.sampled_from(JobState),
    step=COUNTS,
    metrics=st.dictionaries(NAMES, st.floats(allow_nan=False)),
    message=NAMES,
)
TOKENS = st.lists(SIZES, min_size=1, max_size=20).map(tuple)
ACTORS = st.builds(
    ActorStatus,
    id=NAMES,
    role=st.sampled_from(["router", "expert"]),
    node=NAMES,
    pid=COUNTS,
    state=st.sampled_from(["starting", "ready", "lost"]),
    device=NAMES,
    version=COUNTS,
    groups=st.lists(SIZES, max_size=4).map(tuple),
    memory_bytes=COUNTS,
    tokens=COUNTS,
    link=NAMES,
    cache=st.none()
    | st.builds(
        ExpertCache,
        hits=COUNTS,
        misses=COUNTS,
        loaded_ahead=COUNTS,
        loaded_bytes=COUNTS,
        wait_s=st.floats(allow_nan=False),
        device_bytes=COUNTS,
    ),
    zone=NAMES,
    link_use=st.lists(
        st.builds(LinkUse, kind=NAMES, sent_bytes=COUNTS, received_bytes=COUNTS, wait_s=st.floats(allow_nan=False)),
        max_size=2,
    ).map(tuple),
    gpu=st.none()
    | st.builds(
        GpuUse,
        used_bytes=COUNTS,
        total_bytes=COUNTS,
        allocated_bytes=COUNTS,
        busy_ratio=st.none() | st.floats(allow_nan=False),
    ),
    num_waiting=SIZES,
    queue_s=st.floats(allow_nan=False),
    merged_updates=COUNTS,
)
FLOATS = st.floats(allow_nan=False)
STATUSES = st.builds(
    ClusterStatus,
    model=NAMES,
    num_parameters=COUNTS,
    num_experts=SIZES,
    num_moe_layers=SIZES,
    top_k=SIZES,
    version=COUNTS,
    placement_epoch=COUNTS,
    owners=st.dictionaries(SIZES, NAMES, max_size=4),
    group_size=SIZES,
    nodes=st.lists(NAMES, max_size=3).map(tuple),
    actors=st.lists(ACTORS, max_size=3).map(tuple),
    load_LE=st.lists(st.lists(COUNTS, max_size=3).map(tuple), max_size=3).map(tuple),
    jobs=st.dictionaries(NAMES, SIZES, max_size=3),
    ready=st.booleans(),
    message=NAMES,
    max_positions=SIZES,
    vocab_size=SIZES,
    shared_share=FLOATS,
    copies=st.dictionaries(SIZES, st.lists(NAMES, max_size=3).map(tuple), max_size=4),
    staleness_mean=FLOATS,
    staleness_max=COUNTS,
)
LOADS = st.builds(
    LoadReport,
    version=COUNTS,
    window_steps=SIZES,
    group_size=SIZES,
    load_LE=st.lists(st.lists(COUNTS, max_size=3).map(tuple), max_size=3).map(tuple),
    actors=st.dictionaries(NAMES, COUNTS, max_size=3),
    nodes=st.dictionaries(NAMES, COUNTS, max_size=3),
    max_vio_L=st.lists(FLOATS, max_size=3).map(tuple),
    max_vio=FLOATS,
    utilisation_std_L=st.lists(FLOATS, max_size=3).map(tuple),
    utilisation_std=FLOATS,
    microbatch_tokens_per_expert=FLOATS,
    step_tokens_per_expert=FLOATS,
    warning=NAMES,
    history=st.lists(
        st.builds(
            LoadStep, version=COUNTS, time_s=TIMES, tokens=COUNTS, load_E=st.lists(COUNTS, max_size=3).map(tuple)
        ),
        max_size=3,
    ).map(tuple),
)

REBALANCES = st.builds(
    Rebalance,
    moves=st.lists(
        st.builds(
            GroupMove,
            group=SIZES,
            source=NAMES,
            target=NAMES,
            num_bytes=COUNTS,
            kind=st.sampled_from(["move", "copy"]),
        ),
        max_size=3,
    ).map(tuple),
    balance_before=FLOATS,
    balance_after=FLOATS,
    placement_epoch=COUNTS,
    done=st.booleans(),
    message=NAMES,
    unmet=st.lists(NAMES, max_size=3).map(tuple),
    stall_s=FLOATS,
)

OPERATIONS = st.builds(
    Operation,
    id=NAMES,
    request_id=NAMES,
    kind=st.sampled_from(["scale_experts", "scale_routers", "drain_node", "grow_model"]),
    state=st.sampled_from(OperationState),
    target=SIZES,
    created_s=TIMES,
    progress=st.floats(0, 1),
    message=NAMES,
    ended_s=st.none() | TIMES,
    error=NAMES,
    prepare_s=FLOATS,
    stall_s=FLOATS,
    node=NAMES,
)
ENTRIES = st.builds(
    Entry,
    number=COUNTS,
    kind=st.sampled_from(KINDS),
    subject=NAMES,
    started_s=TIMES,
    detected_s=st.none() | TIMES,
    recovered_s=st.none() | TIMES,
    stall_s=FLOATS,
    steps_replayed=COUNTS,
    tokens_recomputed=COUNTS,
    updates_lost=COUNTS,
    requests_delayed=COUNTS,
    requests_failed=COUNTS,
    message=NAMES,
)
CHECKPOINTS = st.builds(
    Checkpoint, version=COUNTS, created_s=TIMES, url=NAMES, size_bytes=COUNTS, job_id=NAMES, job_step=COUNTS
)
LEDGERS = st.builds(
    LedgerReport,
    entries=st.lists(ENTRIES, max_size=3).map(tuple),
    summary=st.dictionaries(
        st.sampled_from(KINDS),
        st.builds(Summary, n=COUNTS, num_open=COUNTS, median_s=st.none() | FLOATS, maximum_s=st.none() | FLOATS),
        max_size=3,
    ),
)


class TestRoundTrips:
    @given(CONFIGS)
    def test_job_configs(self, value):
        assert config.job_config_from_caller(config.job_config_to_message(value)) == value

    @given(JOBS)
    def test_jobs(self, value):
        assert jobs.job_from_message(jobs.job_to_message(value)) == value

    @given(EVENTS)
    def test_events(self, value):
        assert jobs.event_from_message(jobs.event_to_message(value)) == value

    @given(STATUSES)
    def test_status(self, value):
        assert status.status_from_message(status.status_to_message(value)) == value

    @given(LOADS)
    def test_loads(self, value):
        assert loads.report_from_message(loads.report_to_message(value)) == value

    @given(REBALANCES)
    def test_rebalances(self, value):
        assert moves.rebalance_from_message(moves.rebalance_to_message(value)) == value

    @given(OPERATIONS)
    def test_operations(self, value):
        assert operations.operation_from_message(operations.operation_to_message(value)) == value

    @given(CHECKPOINTS)
    def test_checkpoints(self, value):
        assert checkpoints.checkpoint_from_message(checkpoints.checkpoint_to_message(value)) == value

    @given(LEDGERS)
    def test_ledgers(self, value):
        assert ledger.report_from_message(ledger.report_to_message(value)) == value

    @given(TOKENS.map(lambda ids: Prompt(token_ids=ids)) | st.text(min_size=1).map(lambda t: Prompt(text=t)))
    def test_prompts(self, value):
        assert text.prompt_from_message(text.prompt_to_message(value)) == value

    @given(
        st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 1000),
            temperature=st.floats(0, 100),
            top_p=st.floats(0, 1, exclude_min=True),
            seed=COUNTS,
            stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
        )
    )
    def test_sampling(self, value):
        assert text.params_from_message(text.params_to_message(value)) == value

    @pytest.mark.parametrize("reason", ["", "length", "stop", "end_of_text"])
    def test_chunks(self, reason):
        value = GenerateChunk("é", (1, MAX_INT32), 7, reason, 3)
        assert text.chunk_from_message(text.chunk_to_message(value)) == value

    def test_results(self):
        score = ScoreResult((1, 2, 3), (-0.1, -1e-300), 5)
        assert text.score_from_message(text.score_to_message(score)) == score
        embed = EmbedResult((0.5, -2.0), 3, 5)
        assert text.embed_from_message(text.embed_to_message(embed)) == embed
        directory = ModelDirectory("/out", ("config.json",), 1 << 40, 5)
        assert status.directory_from_message(status.directory_to_message(directory)) == directory


class TestJobConfig:
    def test_what_is_not_set_takes_the_schemas_default(self):
        assert config.job_config_from_caller(training_pb2.JobConfig()) == JobConfig()

    def test_zero_is_a_value_and_not_the_default(self):
        message = training_pb2.JobConfig(optimizer={"clip_norm": 0.0}, data={"shuffle": False})
        value = config.job_config_from_caller(message)
        assert (value.optimizer.clip_norm, value.data.shuffle) == (0.0, False)

    def test_every_number_and_text_of_the_schema_has_a_limit(self):
        leaves = dict(_leaves(JobConfig))
        assert set(config.MAXIMA) == {path for path, hint in leaves.items() if hint in (int, float)}
        assert set(config.TEXTS) == {path for path, hint in leaves.items() if hint is str}

    @pytest.mark.parametrize("path", config.MAXIMA)
    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 2**70])
    def test_every_number_is_held_to_it(self, path, value):
        with pytest.raises(InvalidInput) as caught:
            config.check_job_config(_with(JobConfig(), path, value))
        assert caught.value.field == f"config.{path}"
        assert caught.value.remedy

    def test_the_checks_of_the_schema_hold_too(self):
        with pytest.raises(InvalidInput, match="warmup_steps"):
            config.check_job_config(JobConfig(steps=5, schedule=ScheduleConfig(warmup_steps=6)))


class TestPrompts:
    @pytest.mark.parametrize("prompt", [Prompt(), Prompt(text="a", token_ids=(1,))])
    def test_exactly_one_kind(self, prompt):
        with pytest.raises(InvalidInput, match="exactly one"):
            text.prompt_to_message(prompt)

    @pytest.mark.parametrize("bad", [-1, 1 << 31])
    def test_a_token_id_that_is_none_is_named(self, bad):
        with pytest.raises(InvalidInput, match=rf"token_ids\[2\].*{bad}"):
            text.prompt_to_message(Prompt(token_ids=(0, 1, bad)))

    def test_sizes(self):
        with pytest.raises(InvalidInput, match="too many"):
            text.check_prompt(Prompt(text="a" * (text.MAX_PROMPT_CHARS + 1)))
        with pytest.raises(InvalidInput, match=r"token_ids"):
            text.check_prompt(Prompt(token_ids=(0,) * (text.MAX_PROMPT_TOKENS + 1)))

    def test_unset_sampling_is_the_default(self):
        assert text.params_from_message(inference_pb2.SamplingParams()) == SamplingParams()


class TestLoadIntervals:
    def test_unset_is_the_default_and_zero_is_a_value(self):
        assert loads.interval_from_message(cluster_pb2.WatchLoadRequest()) == 1.0
        with pytest.raises(InvalidInput, match=r"interval_s.*\[0\.2, 60\.0\]"):
            loads.interval_from_message(cluster_pb2.WatchLoadRequest(interval_s=0.0))

    @pytest.mark.parametrize("interval_s", [0.2, 60.0])
    def test_its_ends_are_part_of_the_range(self, interval_s):
        assert loads.interval_from_message(loads.interval_to_message(interval_s)) == interval_s

    @pytest.mark.parametrize("interval_s", [0.19, 60.1, -1.0, math.nan, math.inf])
    def test_what_is_beyond_is_refused_before_it_is_sent(self, interval_s):
        with pytest.raises(InvalidInput, match="interval_s"):
            loads.interval_to_message(interval_s)


class TestScale:
    @pytest.mark.parametrize("actors", [1, MAX_INT32])
    def test_its_ends_are_part_of_the_range(self, actors):
        operations.check_scale(actors, "r")

    @pytest.mark.parametrize(("actors", "request_id"), [(0, "r"), (-1, "r"), (MAX_INT32 + 1, "r"), (1, ""), (1, "a b")])
    def test_what_is_wrong_is_named(self, actors, request_id):
        with pytest.raises(InvalidInput) as caught:
            operations.check_scale(actors, request_id)
        assert caught.value.field == ("actors" if request_id == "r" else "request_id")

    @given(
        st.builds(
            Growth,
            num_experts=st.integers(1, MAX_INT32),
            mode=st.sampled_from(["copy", "fresh"]),
            perturbation=st.floats(0, 0.999),
            seed=st.integers(0, 2**63 - 1),
            open_steps=st.integers(1, MAX_INT32),
        )
    )
    def test_growths_cross_whole(self, growth):
        assert operations.growth_from_message(operations.growth_to_message(growth, "r")) == growth

    def test_a_growth_of_which_only_the_number_is_given_has_the_defaults(self):
        message = cluster_pb2.GrowModelRequest(num_experts=16, request_id="r")
        assert operations.growth_from_message(message) == Growth(16)
        for wrong, field in (({"perturbation": 1.0}, "perturbation"), ({"mode": 9}, "mode"), ({"seed": -1}, "seed")):
            with pytest.raises(InvalidInput) as caught:
                operations.growth_from_message(cluster_pb2.GrowModelRequest(num_experts=16, request_id="r", **wrong))
            assert caught.value.field == field

    def test_the_ledger_begins_after_a_number_that_there_can_be(self):
        for after_entry in (0, MAX_INT64):
            ledger.check_after_entry(after_entry)
        for after_entry in (-1, MAX_INT64 + 1):
            with pytest.raises(InvalidInput, match="after_entry"):
                ledger.check_after_entry(after_entry)


class TestPages:
    JOBS: typing.ClassVar = [
        Job(f"job-{i}", "", JobConfig(), JobState.QUEUED, step=0, created_s=0.0) for i in range(5, 0, -1)
    ]

    def test_a_job_submitted_meanwhile_neither_repeats_nor_hides_one(self):
        first, token = jobs.page(self.JOBS, 2, "")
        newer = dataclasses.replace(self.JOBS[0], id="job-6")
        second, token = jobs.page([newer, *self.JOBS], 2, token)
        third, end = jobs.page([newer, *self.JOBS], 2, token)
        assert [job.id for job in (*first, *second, *third)] == ["job-5", "job-4", "job-3", "job-2", "job-1"]
        assert end == ""

    def test_a_full_last_page_has_no_next(self):
        assert jobs.page(self.JOBS, 5, "")[1] == ""
        assert jobs.page([], 5, "") == ([], "")


class TestRange:
    def test_ends(self):
        assert 0 in Range(0, 1)
        assert 0 not in Range(0, 1, open_low=True)
        assert 1 not in Range(0, 1, open_high=True)
        assert math.nan not in Range(0, 1)
        assert math.inf not in Range(0, math.inf)

    def test_large_integers_are_compared_exactly(self):
        assert MAX_INT64 in Range(0, MAX_INT64)
        assert MAX_INT64 + 1 not in Range(0, MAX_INT64)


def _leaves(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, object]]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def _with(value, path: str, leaf):
    name, _, rest = path.partition(".")
    return dataclasses.replace(value, **{name: _with(getattr(value, name), rest, leaf) if rest else leaf})
