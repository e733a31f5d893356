"""A front that asks for tokens, speaks TLS, or both: who is let in, and how files are exchanged while it runs."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from actors.errors import InvalidInput
from cluster.config import AuthConfig, FrontConfig, JobConfig, TlsConfig
from cluster.errors import PermissionDenied, PortInUse, Unauthenticated, Unavailable
from cluster.service.access import Access, open_channel
from cluster.service.auth import ROLES
from cluster.service.client import Client
from cluster.service.server import Front
from cluster.service.tokens import Role, line_of, new_token
from tests.contract.test_front import BY_NAME, METHODS
from tests.fakes.backend import MemoryBackend
from tests.fakes.certificates import Authority
from tests.fakes.front import WAIT_S, run, running_front

Code = grpc.StatusCode
TOKENS = {role: new_token() for role in Role}
NOBODYS = new_token()
GARBAGE = b"\x0a\xff\xff\xff"
DENIED = (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)


def tokens_text(*roles: Role) -> str:
    return "".join(f"{line_of(TOKENS[role], role, f'the-{role}')}\n" for role in roles)


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(tokens_text(*Role))
    return file


def replace_file(file: Path, content: str | bytes) -> None:
    other = file.with_name(f"{file.name}.new")
    other.write_bytes(content.encode() if isinstance(content, str) else content)
    other.rename(file)


def guarded(tokens_file: Path, **changes: object) -> FrontConfig:
    return FrontConfig(port=0, auth=AuthConfig(str(tokens_file)), **changes)


def client(front: Front, token: str = "", **access: str) -> Client:
    return Client(front.target, timeout_s=WAIT_S, max_retries=1, access=Access(token=token, **access))


def send(channel: grpc.Channel, path: str, method: object, token: str | None, data: bytes = b"") -> Code:
    """The status of the first answer."""
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    try:
        if method.server_streaming:
            responses = channel.unary_stream(path)(data, timeout=WAIT_S, metadata=metadata)
            next(iter(responses), None)
            responses.cancel()
        else:
            channel.unary_unary(path)(data, timeout=WAIT_S, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


# --- Tokens --------------------------------------------------------------------------------------------------------


class TestEveryMethod:
    @pytest.fixture(scope="class")
    def channel(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
        file = tmp_path_factory.mktemp("auth") / "tokens"
        file.write_text(tokens_text(*Role))
        with running_front(MemoryBackend(), guarded(file)) as front, grpc.insecure_channel(front.target) as channel:
            yield channel

    @BY_NAME
    @pytest.mark.parametrize("token", [None, NOBODYS, "", TOKENS[Role.ADMIN][:-1]], ids=["no", "wrong", "empty", "cut"])
    def test_nobody_gets_in_without_a_known_token(self, channel, path, method, token):
        # Bytes that are no message: the token is what is looked at first.
        assert send(channel, path, method, token, GARBAGE) is Code.UNAUTHENTICATED

    @BY_NAME
    @pytest.mark.parametrize("role", Role, ids=str)
    def test_a_role_gets_what_it_is_for_and_no_more(self, channel, path, method, role):
        code = send(channel, path, method, TOKENS[role], GARBAGE)
        assert code is (Code.INVALID_ARGUMENT if role >= ROLES[path] else Code.PERMISSION_DENIED)

    def test_a_method_that_does_not_exist(self, channel):
        method = METHODS[0][1]
        path = "/moecluster.v1.ClusterService/Nothing"
        assert send(channel, path, method, None) is Code.UNAUTHENTICATED
        assert send(channel, path, method, TOKENS[Role.INFER]) is Code.UNIMPLEMENTED

    def test_a_refusal_says_what_to_do(self, channel):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/moecluster.v1.ClusterService/GetStatus")(b"", timeout=WAIT_S)
        status = rpc_status.from_call(caught.value)
        assert "--token-file" in status.message
        info = error_details_pb2.ErrorInfo()
        assert any(packed.Unpack(info) for packed in status.details)
        assert info.reason == "UNAUTHENTICATED"
        assert "google.rpc.RequestInfo" in {packed.TypeName() for packed in status.details}


def test_health_is_for_everybody(tokens_file):
    with (
        running_front(MemoryBackend(), guarded(tokens_file)) as front,
        grpc.insecure_channel(front.target) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for status in health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S):
            if status.status == health_pb2.HealthCheckResponse.SERVING:
                break
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


class TestHealthPort:
    """What the kubelet can ask of a front with TLS."""

    @pytest.fixture
    def front(self, tokens_file, tmp_path) -> Iterator[Front]:
        config = FrontConfig(port=0, auth=AuthConfig(str(tokens_file)), tls=Mounted(tmp_path).mutual, health_port=0)
        with running_front(MemoryBackend(), config) as front:
            yield front

    def test_it_answers_without_tls_and_token(self, front):
        with grpc.insecure_channel(front.health_target) as channel, ThreadPoolExecutor(1) as pool:
            health = health_pb2_grpc.HealthStub(channel)
            statuses = health.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
            while next(statuses).status != health_pb2.HealthCheckResponse.SERVING:
                pass
            stopped = pool.submit(run, front.stop(grace_s=WAIT_S))
            assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
            statuses.cancel()
            stopped.result(WAIT_S)

    @BY_NAME
    def test_nothing_else_is_there(self, front, path, method):
        with grpc.insecure_channel(front.health_target) as channel:
            assert send(channel, path, method, TOKENS[Role.ADMIN]) is Code.UNIMPLEMENTED

    def test_a_taken_port_is_named(self, front):
        taken = int(front.health_target.rpartition(":")[2])
        with pytest.raises(PortInUse, match=rf"{taken} is taken.*front\.health_port"):
            run(Front(MemoryBackend(), FrontConfig(port=0, health_port=taken)).start())


def test_a_client_with_a_token(tokens_file):
    backend = MemoryBackend()
    with running_front(backend, guarded(tokens_file)) as front, client(front, TOKENS[Role.TRAIN]) as train:
        job = train.submit_job(JobConfig(steps=3))
        assert [event.kind for event in train.watch_job(job.id)][-1]
        assert "".join(chunk.text for chunk in train.generate("ab"))
        with pytest.raises(
            PermissionDenied, match=r"the-train may not call .*ScaleExperts.*train, and admin is needed"
        ):
            train.scale(2)
        with client(front, TOKENS[Role.INFER]) as infer:
            assert infer.status().ready
            with pytest.raises(PermissionDenied, match="train is needed"):
                infer.submit_job(JobConfig(steps=1))
            with pytest.raises(PermissionDenied):
                next(infer.watch_job(job.id))
        with client(front) as stranger:
            stranger.wait_ready(WAIT_S)
            with pytest.raises(Unauthenticated, match="MOE_CLUSTER_TOKEN"):
                stranger.submit_job(JobConfig(steps=1))
            with pytest.raises(Unauthenticated):
                list(stranger.generate("a"))
        assert len(train.list_jobs()) == 1


def test_tokens_are_exchanged_without_a_restart(tokens_file, caplog):
    with (
        running_front(MemoryBackend(), guarded(tokens_file)) as front,
        client(front, TOKENS[Role.INFER]) as infer,
        client(front, TOKENS[Role.ADMIN]) as admin,
    ):
        assert infer.status().ready
        replace_file(tokens_file, tokens_text(Role.ADMIN))
        with pytest.raises(Unauthenticated, match="not any more"):
            infer.status()
        replace_file(tokens_file, f"{tokens_text(Role.INFER)}infer oops {NOBODYS}\n")
        assert admin.status().ready
        with pytest.raises(Unauthenticated):
            infer.status()
        errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 1
        assert f"{tokens_file} line 2" in errors[0]
        tokens_file.unlink()
        assert admin.status().ready
        replace_file(tokens_file, tokens_text(Role.INFER))
        assert infer.status().ready
        with pytest.raises(Unauthenticated):
            admin.status()
    assert NOBODYS not in caplog.text


def test_the_clients_file_too(tokens_file, tmp_path):
    own = tmp_path / "own"
    own.write_text(f"{NOBODYS}\n")
    with running_front(MemoryBackend(), guarded(tokens_file)) as front, client(front, token_file=str(own)) as one:
        with pytest.raises(Unauthenticated):
            one.status()
        replace_file(own, TOKENS[Role.INFER])
        assert one.status().ready
    for content, why in ((b"", "is empty"), (b"two words", "no single token")):
        own.write_bytes(content)
        with pytest.raises(InvalidInput, match=rf"token_file.*{why}"):
            Client("127.0.0.1:1", access=Access(token_file=str(own)))


def test_logs_name_the_caller_and_never_a_token(tokens_file, caplog):
    caplog.set_level(logging.DEBUG)
    with running_front(MemoryBackend(), guarded(tokens_file)) as front, client(front, TOKENS[Role.INFER]) as infer:
        infer.status()
        with pytest.raises(PermissionDenied) as refused:
            infer.scale(1)
        with client(front, NOBODYS) as stranger, pytest.raises(Unauthenticated) as unknown:
            stranger.status()
        run(front.stop(grace_s=WAIT_S))
    lines = [r.getMessage() for r in caplog.records if r.name == "cluster.service.interceptors"]
    assert [line.split(" in ")[0].rpartition("/")[2] for line in lines] == [
        "GetStatus OK",
        "ScaleExperts PERMISSION_DENIED",
        "GetStatus UNAUTHENTICATED",
    ]
    assert [line.endswith(" by the-infer") for line in lines] == [True, True, False]
    seen = caplog.text + str(refused.value) + str(unknown.value)
    assert not any(token in seen for token in (*TOKENS.values(), NOBODYS))


class TestReflection:
    @staticmethod
    def services(front: Front) -> set[str]:
        with grpc.insecure_channel(front.target) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    def test_it_is_off_where_tokens_are_asked_for(self, tokens_file):
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        codes = {}
        for setting in ("auto", "on", "off"):
            with (
                running_front(MemoryBackend(), guarded(tokens_file, reflection=setting)) as front,
                grpc.insecure_channel(front.target) as channel,
            ):
                for token in (TOKENS[Role.INFER], NOBODYS):
                    call = channel.stream_stream(path)(
                        iter([GARBAGE]), timeout=WAIT_S, metadata=[("authorization", f"Bearer {token}")]
                    )
                    codes[setting, token] = call.code()
        assert [codes[setting, TOKENS[Role.INFER]] for setting in ("auto", "on", "off")] == [
            Code.UNIMPLEMENTED,
            Code.INVALID_ARGUMENT,
            Code.UNIMPLEMENTED,
        ]
        assert {codes[setting, NOBODYS] for setting in ("auto", "on", "off")} == {Code.UNAUTHENTICATED}

    def test_it_may_be_switched_off_anyway(self):
        with running_front(MemoryBackend(), FrontConfig(port=0, reflection="off")) as front:
            with pytest.raises(grpc.RpcError) as caught:
                self.services(front)
            assert caught.value.code() is Code.UNIMPLEMENTED


# --- TLS -----------------------------------------------------------------------------------------------------------


class Mounted:
    """The files of a front and of its clients."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tls = TlsConfig(str(folder / "tls.crt"), str(folder / "tls.key"))
        self.mutual = TlsConfig(self.tls.certificate, self.tls.key, str(folder / "clients.crt"))
        self.authority = self.renew()
        self.clients = self.renew_clients()

    def renew(self, name: str = "localhost") -> Authority:
        """A certificate for the front, signed by somebody new."""
        authority = Authority("front's")
        issued = authority.issue(name)
        replace_file(Path(self.tls.key), issued.key)
        replace_file(Path(self.tls.certificate), issued.certificate)
        return authority

    def renew_clients(self) -> Authority:
        authority = Authority("clients'")
        replace_file(Path(self.mutual.client_ca), authority.certificate)
        return authority

    def access(self, authority: Authority, clients: Authority | None = None, **more: str) -> Access:
        """Of a client that trusts `authority`, with a certificate of `clients`."""
        ca = self._folder / f"ca-{id(authority)}"
        ca.write_bytes(authority.certificate)
        if clients is None:
            return Access(ca=str(ca), **more)
        certificate, key = self._folder / f"own-{id(clients)}.crt", self._folder / f"own-{id(clients)}.key"
        clients.issue("a client").write(certificate, key)
        return Access(ca=str(ca), certificate=str(certificate), key=str(key), **more)


@pytest.fixture
def mounted(tmp_path):
    return Mounted(tmp_path)


@contextmanager
def secured(tls: TlsConfig, **changes: object) -> Iterator[Front]:
    with running_front(MemoryBackend(), FrontConfig(port=0, tls=tls, **changes)) as front:
        yield front


def reach(front: Front, access: Access | None) -> None:
    """Over a connection of its own."""
    with Client(front.target, timeout_s=WAIT_S, max_retries=1, access=access) as one:
        assert one.status().ready


class TestTls:
    def test_who_trusts_it_gets_in(self, mounted):
        with secured(mounted.tls) as front:
            reach(front, mounted.access(mounted.authority))

    def test_clear_text_does_not(self, mounted):
        with secured(mounted.tls) as front:
            with pytest.raises(Unavailable, match="--ca"):
                reach(front, None)
            host, port = front.target.split(":")
            with socket.create_connection((host, int(port)), timeout=WAIT_S) as plain:
                plain.settimeout(WAIT_S)
                plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64))
                with suppress(ConnectionError):
                    assert not plain.recv(4096).startswith(b"\0\0"), "no settings frame"
            reach(front, mounted.access(mounted.authority))

    def test_who_does_not_trust_it_says_so(self, mounted):
        with secured(mounted.tls) as front, pytest.raises(Unavailable, match=r"could not be trusted; check --ca"):
            reach(front, mounted.access(Authority("somebody else")))

    def test_a_name_that_is_not_in_the_certificate(self, mounted):
        authority = Authority("front's")
        issued = authority.issue("front.example", ips=())
        issued.write(Path(mounted.tls.certificate), Path(mounted.tls.key))
        with secured(mounted.tls) as front:
            with pytest.raises(Unavailable, match="--server-name"):
                reach(front, mounted.access(authority))
            reach(front, mounted.access(authority, server_name="front.example"))

    def test_a_token_over_it(self, mounted, tokens_file):
        with secured(mounted.tls, auth=AuthConfig(str(tokens_file))) as front:
            with pytest.raises(Unauthenticated):
                reach(front, mounted.access(mounted.authority))
            reach(front, mounted.access(mounted.authority, token=TOKENS[Role.INFER]))

    def test_certificates_are_exchanged_without_a_restart(self, mounted):
        before = mounted.authority
        with (
            secured(mounted.tls) as front,
            Client(front.target, timeout_s=WAIT_S, access=mounted.access(before)) as kept,
        ):
            assert kept.status().ready
            after = mounted.renew()
            reach(front, mounted.access(after))
            with pytest.raises(Unavailable, match="trusted"):
                reach(front, mounted.access(before))
            assert kept.status().ready, "a connection that is there stays"

    def test_files_that_do_not_fit_leave_the_last_good_ones(self, mounted, caplog):
        with secured(mounted.tls) as front:
            replace_file(Path(mounted.tls.key), Authority("x").issue("x").key)
            reach(front, mounted.access(mounted.authority))
            reach(front, mounted.access(mounted.authority))
            errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
            assert len(errors) == 1
            assert "front.tls.certificate" in errors[0]
            reach(front, mounted.access(mounted.renew()))


class TestMutualTls:
    def test_who_shows_a_certificate_gets_in(self, mounted):
        with secured(mounted.mutual) as front:
            reach(front, mounted.access(mounted.authority, mounted.clients))

    @pytest.mark.parametrize("whose", ["nobody's", "somebody else's"])
    def test_who_does_not_stays_outside(self, mounted, whose):
        clients = None if whose == "nobody's" else Authority("somebody else's")
        with secured(mounted.mutual) as front:
            with pytest.raises(Unavailable):
                reach(front, mounted.access(mounted.authority, clients))
            reach(front, mounted.access(mounted.authority, mounted.clients))

    def test_who_signs_them_is_exchanged_without_a_restart(self, mounted):
        before = mounted.clients
        with secured(mounted.mutual) as front:
            reach(front, mounted.access(mounted.authority, before))
            after = mounted.renew_clients()
            reach(front, mounted.access(mounted.authority, after))
            with pytest.raises(Unavailable):
                reach(front, mounted.access(mounted.authority, before))

    def test_a_service_finds_itself_ready_without_a_certificate_of_its_own(self, mounted):
        from cluster.serve import fronted

        config = FrontConfig(port=0, tls=mounted.mutual)
        with fronted(MemoryBackend(), config, WAIT_S) as target:
            access = mounted.access(mounted.authority, mounted.clients)
            with Client(target, timeout_s=WAIT_S, access=access) as one:
                assert one.status().ready


class TestEveryMethodStaysShut:
    """Whoever speaks clear text to TLS, or has no certificate of ours, gets no call through, whatever token it has."""

    @pytest.fixture(scope="class")
    def channels(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, grpc.Channel]]:
        folder, backend = tmp_path_factory.mktemp("tls"), MemoryBackend()
        mounted, tokens = Mounted(folder), AuthConfig(str(folder / "tokens"))
        Path(tokens.tokens_file).write_text(tokens_text(*Role))
        strangers = mounted.access(mounted.authority, Authority("somebody else's"))
        ways = {
            "clear text to TLS": (mounted.tls, Access()),
            "clear text to mutual TLS": (mounted.mutual, Access()),
            "no certificate": (mounted.mutual, mounted.access(mounted.authority)),
            "somebody else's certificate": (mounted.mutual, strangers),
            "TLS": (mounted.tls, mounted.access(mounted.authority)),
            "mutual TLS": (mounted.mutual, mounted.access(mounted.authority, mounted.clients)),
        }
        with ExitStack() as stack:
            fronts = {
                tls: stack.enter_context(running_front(backend, FrontConfig(port=0, tls=tls, auth=tokens)))
                for tls in (mounted.tls, mounted.mutual)
            }
            channels = {
                way: stack.enter_context(open_channel(fronts[tls].target, access, []))
                for way, (tls, access) in ways.items()
            }
            yield channels
            assert backend.timeouts_s.keys() <= {"status"}, "of the fronts themselves, for health"

    @BY_NAME
    @pytest.mark.parametrize(
        "way", ["clear text to TLS", "clear text to mutual TLS", "no certificate", "somebody else's certificate"]
    )
    def test_without_what_is_asked_for(self, channels, path, method, way):
        assert send(channels[way], path, method, TOKENS[Role.ADMIN], GARBAGE) is Code.UNAVAILABLE

    @BY_NAME
    @pytest.mark.parametrize("way", ["TLS", "mutual TLS"])
    def test_with_it_and_a_token(self, channels, path, method, way):
        assert send(channels[way], path, method, TOKENS[Role.ADMIN], GARBAGE) is Code.INVALID_ARGUMENT
        assert send(channels[way], path, method, None, GARBAGE) is Code.UNAUTHENTICATED


# --- Starting ------------------------------------------------------------------------------------------------------


class TestStarting:
    @pytest.mark.parametrize("field", ["certificate", "key", "client_ca"])
    @pytest.mark.parametrize(
        ("content", "why"), [(None, "No such file"), (b"", "is empty"), (b"no PEM", "cannot be used")]
    )
    def test_files_that_cannot_be_used(self, mounted, field, content, why):
        file = Path(getattr(mounted.mutual, field))
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidInput, match=rf"front\.tls\.{field}.*{why}|front\.tls\.certificate.*{why}") as caught:
            run(Front(MemoryBackend(), FrontConfig(port=0, tls=mounted.mutual)).start())
        assert str(file) in str(caught.value)

    def test_a_key_of_another_certificate(self, mounted):
        Path(mounted.tls.key).write_bytes(Authority("x").issue("x").key)
        with pytest.raises(InvalidInput, match=r"front\.tls\.certificate.*front\.tls\.key.*MISMATCH.*belong together"):
            run(Front(MemoryBackend(), FrontConfig(port=0, tls=mounted.tls)).start())

    def test_a_tokens_file_that_is_not_there(self, tmp_path):
        with pytest.raises(InvalidInput, match=r"front\.auth\.tokens_file.*nowhere"):
            run(Front(MemoryBackend(), guarded(tmp_path / "nowhere")).start())

    @pytest.mark.parametrize(
        ("host", "has_tokens", "has_tls", "warning"),
        [
            ("0.0.0.0", False, False, "may do everything"),
            ("0.0.0.0", False, True, "may do everything"),
            ("0.0.0.0", True, False, "clear text"),
            ("0.0.0.0", True, True, ""),
            ("127.0.0.1", False, False, ""),
        ],
    )
    def test_a_front_for_other_hosts_warns(self, mounted, tokens_file, caplog, host, has_tokens, has_tls, warning):
        auth = AuthConfig(str(tokens_file)) if has_tokens else AuthConfig()
        config = FrontConfig(host=host, port=0, auth=auth, tls=mounted.tls if has_tls else TlsConfig())
        with running_front(MemoryBackend(), config):
            warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == (1 if warning else 0)
        assert all(warning in text for text in warnings)
