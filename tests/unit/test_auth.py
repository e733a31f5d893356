"""Roles, tokens and the files that hold them."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import pkgutil
from pathlib import Path

import pytest

import protos
from actors.errors import InvalidInput
from cluster.errors import PermissionDenied, Unauthenticated
from cluster.service import auth
from cluster.service.access import Access, is_loopback
from cluster.service.auth import authenticated, authorize
from cluster.service.reload import Reloaded
from cluster.service.tokens import Caller, Role, TokenTable, line_of, new_token, read_tokens

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


def methods_of_our_protos() -> set[str]:
    names = [module.name for module in pkgutil.walk_packages(protos.__path__, "protos.")]
    modules = [importlib.import_module(name) for name in names if name.endswith("_pb2")]
    return {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


# --- Roles ---------------------------------------------------------------------------------------------------------


def test_every_method_has_a_role_and_no_role_is_left_over() -> None:
    methods = methods_of_our_protos()
    assert len(methods) >= 20
    assert methods - set(auth.ROLES) == set(), "give the method a role in cluster.service.auth"
    assert set(auth.ROLES) - methods == {REFLECTION}
    assert not auth.OPEN & set(auth.ROLES)


def test_a_role_may_do_what_those_before_it_may() -> None:
    for method, needed in auth.ROLES.items():
        for role in Role:
            if role >= needed:
                authorize(Caller("alice", role), method)
            else:
                with pytest.raises(PermissionDenied, match=rf"alice.*{method}.*role is {role}, and {needed} is needed"):
                    authorize(Caller("alice", role), method)


def test_who_changes_something() -> None:
    infer = {method for method, role in auth.ROLES.items() if role is Role.INFER} - {REFLECTION}
    assert {m for m in infer if "InferenceService" not in m} == {"/moecluster.v1.ClusterService/GetStatus"}
    looked_at = ("Get", "List", "Watch")
    for method in methods_of_our_protos():
        if "ClusterService" in method and not method.rpartition("/")[2].startswith(looked_at):
            assert auth.ROLES[method] is Role.ADMIN, method


def test_a_method_without_a_role_is_for_nobody() -> None:
    with pytest.raises(PermissionDenied, match="nobody"):
        authorize(Caller("root", Role.ADMIN), "/moecluster.v1.ClusterService/Forgotten")


# --- Tokens --------------------------------------------------------------------------------------------------------


@pytest.fixture
def alice() -> str:
    return new_token()


@pytest.fixture
def table(alice: str) -> TokenTable:
    return TokenTable([(hashlib.sha256(alice.encode()).digest(), Caller("alice", Role.TRAIN))])


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_known_token(table: TokenTable, alice: str, scheme: str) -> None:
    metadata = [("x-request-id", "a"), ("authorization", f"{scheme} {alice}")]
    assert authenticated(table, metadata) == Caller("alice", Role.TRAIN)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "--token-file"),
        (["Bearer"], "one value"),
        (["Bearer "], "one value"),
        (["{token}"], "one value"),
        (["Basic {token}"], "one value"),
        (["Bearer {token}", "Bearer {token}"], "one value"),
        (["Bearer {token}x"], "not known"),
        (["Bearer moe_"], "not known"),
        (["Bearer \udcff\u00e9"], "not known"),
        (["Bearer {digest}"], "not known"),
    ],
)
def test_what_is_no_known_token(table: TokenTable, alice: str, values: list[str], why: str) -> None:
    digest = hashlib.sha256(alice.encode()).hexdigest()
    metadata = [("authorization", value.format(token=alice, digest=digest)) for value in values]
    with pytest.raises(Unauthenticated, match=why) as caught:
        authenticated(table, metadata)
    assert alice not in str(caught.value)


def test_tokens_differ_and_are_long() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 43


def test_a_file_of_tokens(tmp_path: Path) -> None:
    tokens = {name: new_token() for name in ("alice", "bob", "ci.nightly")}
    lines = [line_of(tokens["alice"], Role.INFER, "alice"), "", "# a team", line_of(tokens["bob"], Role.ADMIN, "bob")]
    file = tmp_path / "tokens"
    file.write_text("\n".join([*lines, f"  {line_of(tokens['ci.nightly'], Role.TRAIN, 'ci.nightly')}  "]))
    table = read_tokens(file)
    assert len(table) == 3
    assert table.caller(tokens["alice"]) == Caller("alice", Role.INFER)
    assert table.caller(tokens["bob"]) == Caller("bob", Role.ADMIN)
    assert table.caller(tokens["ci.nightly"]) == Caller("ci.nightly", Role.TRAIN)
    assert not any(token in file.read_text() for token in tokens.values())


def test_a_file_that_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# nobody for now\n")
    assert len(read_tokens(file)) == 0


GOOD = line_of("x", Role.INFER, "x")
DIGEST = hashlib.sha256(b"y").hexdigest()
SECRET = "moe_in-clear"
BROKEN = {
    "no role": (f"{GOOD}\nroot y {DIGEST}", "line 2: begins with no role.*infer, train, admin"),
    "a token in clear": (f"{GOOD}\n\n{SECRET}", "line 3: has 1 words, not 3"),
    "a token for a digest": (f"infer y {SECRET}", "line 1: ends with no SHA-256"),
    "a token for a role": (f"{SECRET} y {DIGEST}", "line 1: begins with no role"),
    "a token and more": (f"infer y {SECRET} {DIGEST}", "line 1: has 4 words"),
    "half a digest": (f"infer y {DIGEST[:32]}", "line 1: ends with no SHA-256"),
    "a name that is none": (f"infer a/{SECRET} {DIGEST}", "line 1: has a name"),
    "the same twice": (f"{GOOD}\n{GOOD}", "same token twice"),
    "nothing": ("", "is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_with_its_line_and_not_shown(tmp_path: Path, what: str) -> None:
    text, why = BROKEN[what]
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=rf"front\.auth\.tokens_file.*{why}") as caught:
        read_tokens(file)
    assert str(file) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"front\.auth\.tokens_file: cannot be read: No such file"):
        read_tokens(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "a b", "a\n", "x" * 129])
def test_names_are_single_words(name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        line_of("x", Role.INFER, name)


# --- Files that change ---------------------------------------------------------------------------------------------


def replace_file(file: Path, text: str) -> None:
    """As a mounted secret changes: another file takes the name."""
    other = file.with_suffix(".new")
    other.write_text(text)
    other.rename(file)


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    file = tmp_path / "number"
    file.write_text("1")
    return file


def reloaded(file: Path) -> Reloaded[int]:
    def read() -> int:
        try:
            return int(file.read_text())
        except (OSError, ValueError) as error:
            raise InvalidInput(f"{file.name}: {error}") from None

    return Reloaded([file], read)


def test_a_file_is_read_again_when_it_has_changed(numbered: Path) -> None:
    value = reloaded(numbered)
    assert value.current() == 1
    replace_file(numbered, "2")
    assert value.current() == 2
    numbered.write_text("33")  # in place
    assert value.current() == 33


def test_a_file_is_not_read_again_when_it_has_not_changed(numbered: Path) -> None:
    reads = []
    value = Reloaded([numbered], lambda: reads.append(1))
    for _ in range(5):
        value.current()
    assert len(reads) == 1


def test_what_cannot_be_used_leaves_the_last_good_value(numbered: Path, caplog: pytest.LogCaptureFixture) -> None:
    value = reloaded(numbered)
    replace_file(numbered, "two")
    for _ in range(3):
        assert value.current() == 1
    assert len([r for r in caplog.records if r.levelno == logging.ERROR and "number" in r.message]) == 1
    numbered.unlink()
    assert value.current() == 1
    replace_file(numbered, "3")
    assert value.current() == 3


def test_a_link_that_is_turned_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes exchanges a mounted secret; size and time may be the same."""
    for number in ("1", "2"):
        (tmp_path / number).write_text(number)
        os.utime(tmp_path / number, (0, 0))
    link = tmp_path / "link"
    link.symlink_to("1")
    value = reloaded(link)
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").rename(link)
    assert value.current() == 2


def test_at_the_start_it_must_be_good(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        reloaded(tmp_path / "nowhere")


# --- The client's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"token": "a", "token_file": "b"}, "token_file"),
        ({"ca": "a", "certificate": "b"}, "certificate"),
        ({"ca": "a", "key": "b"}, "certificate"),
        ({"certificate": "a", "key": "b"}, "certificate"),
        ({"server_name": "a"}, "server_name"),
    ],
)
def test_what_does_not_go_together(values: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Access(**values)
    assert caught.value.field == field


def test_a_token_does_not_show() -> None:
    assert "secret" not in repr(Access(token="secret"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("front.example", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
