"""The commands against a front in this process, as the command line calls them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import re
from contextlib import closing

import pytest
from matplotlib.image import imread
from rich.console import Console

from actors.errors import InvalidInput
from actors.values import Growth, Placement
from cluster.backend import ExpertCache, GroupMove, Job, JobEvent, JobState, Operation, OperationState, Rebalance
from cluster.commands import heatmap, output, progress, remote
from cluster.commands.options import TARGET_VARIABLE
from cluster.config import AuthConfig, FrontConfig, JobConfig, TlsConfig
from cluster.control.load import LoadWindow
from cluster.errors import Unavailable
from cluster.service.client import Client
from cluster.service.tokens import Caller, Role, line_of, new_token, read_tokens
from tests.fakes.backend import MemoryBackend
from tests.fakes.certificates import Authority
from tests.fakes.front import running_front

NOBODY = "127.0.0.1:1"


@pytest.fixture
def backend():
    return MemoryBackend()


@pytest.fixture
def command(backend, monkeypatch, capsys):
    """Runs a command line; gives exit code, stdout and stderr."""
    with running_front(backend) as front:
        monkeypatch.setenv(TARGET_VARIABLE, front.target)
        monkeypatch.setenv("COLUMNS", "200")

        def run(*argv: str) -> tuple[int, str, str]:
            parser = argparse.ArgumentParser(prog="moe-cluster")
            remote.add_parsers(parser.add_subparsers(required=True))
            args = parser.parse_args(argv)
            code = args.run(args)
            return code, *capsys.readouterr()

        yield run


@pytest.fixture
def job_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("steps: 3\noptimizer: {lr: 0.5}\n")
    return str(path)


def only_line(text: str) -> str:
    assert text.endswith("\n")
    (line,) = text.splitlines()
    return line


class TestStatus:
    def test_table(self, command):
        code, out, err = command("status")
        assert (code, err) == (0, "")
        assert re.search(r"expert-0 .*node-1 .*3\.0 MiB.*socket/ipc", out)
        assert re.search(r"0 .* 10 .* 3 .* 1\.60", out)

    def test_json(self, command):
        status = json.loads(command("status", "--json")[1])
        assert status["owners"] == {"0": "expert-0"}
        assert status["load_LE"] == [[1, 2, 3, 4], [0, 0, 0, 0]]
        assert [actor["id"] for actor in status["actors"]] == ["router-0", "expert-0"]

    def test_an_expert_cache_is_told_in_figures(self, backend, command):
        assert "expert cache" not in command("status")[1]
        backend.cache = ExpertCache(3, 1, 2, 5 << 20, 0.25, 2 << 20)
        out = command("status")[1]
        assert re.search(r"expert cache .* hits", out)
        assert re.search(r"expert-0 .* 2\.0 MiB .* 75\.0% of 4 .* 2 .* 5\.0 MiB .* 0\.2 s", out)
        actors = json.loads(command("status", "--json")[1])["actors"]
        assert [actor["cache"] and actor["cache"]["misses"] for actor in actors] == [None, 1]

    def test_copies_are_told_from_what_an_actor_owns(self, backend, command):
        backend.placement = Placement(1, (("expert-0",), ("expert-1", "expert-0"), ("expert-2", "expert-0")), 1)
        out = command("status")[1]
        assert re.search(r"expert-0 .* 0; copies 1, 2 ", out)
        assert re.search(r"expert-1 .* 1 ", out)
        assert json.loads(command("status", "--json")[1])["copies"] == {"1": ["expert-0"], "2": ["expert-0"]}
        backend.placement = Placement(2, (("expert-1", "expert-0"),), 4)
        assert re.search(r"expert-0 .* copies 0 ", command("status")[1])

    def test_no_front(self, command):
        code, out, err = command("status", "--target", NOBODY)
        assert (code, out) == (1, "")
        assert "moe-cluster up" in only_line(err)
        assert NOBODY in err

    def test_a_front_that_is_late(self, backend, command):
        backend.delays_s["status"] = 60.0
        code, _, err = command("status", "--timeout", "0.2")
        assert code == 1
        assert "moe-cluster:" in only_line(err)


class TestGuardedFront:
    @pytest.fixture
    def token(self, backend, monkeypatch, tmp_path):
        """Of role infer, for the front at `MOE_CLUSTER_TARGET`."""
        token, file = new_token(), tmp_path / "tokens"
        file.write_text(line_of(token, Role.INFER, "alice"))
        with running_front(backend, FrontConfig(port=0, auth=AuthConfig(str(file)))) as front:
            monkeypatch.setenv("GUARDED", front.target)
            yield token

    def test_without_a_token(self, command, token):
        code, out, err = command("status", "--target", os.environ["GUARDED"])
        assert (code, out) == (1, "")
        assert "--token-file" in only_line(err)

    def test_with_one_from_a_file_or_the_environment(self, command, token, monkeypatch, tmp_path):
        guarded = "--target", os.environ["GUARDED"]
        (tmp_path / "own").write_text(f"{token}\n")
        own = str(tmp_path / "own")
        assert command("status", *guarded, "--token-file", own)[0] == 0
        monkeypatch.setenv("MOE_CLUSTER_TOKEN", "moe_nobody")
        assert command("status", *guarded)[0] == 1
        assert command("status", *guarded, "--token-file", own)[0] == 0
        monkeypatch.setenv("MOE_CLUSTER_TOKEN", f"{token}\n")
        assert command("status", *guarded)[0] == 0
        monkeypatch.setenv("MOE_CLUSTER_TOKEN_FILE", str(tmp_path / "nowhere"))
        code, _, err = command("status", *guarded)
        assert code == 2
        assert "nowhere" in only_line(err)

    def test_a_role_that_is_not_enough(self, command, token, monkeypatch):
        monkeypatch.setenv("MOE_CLUSTER_TOKEN", token)
        code, _, err = command("scale", "--experts", "2", "--target", os.environ["GUARDED"])
        assert code == 1
        assert "alice may not call" in only_line(err)

    def test_tls(self, backend, command, monkeypatch, tmp_path):
        authority, clients = Authority("front's"), Authority("clients'")
        files = {name: str(tmp_path / name) for name in ("ca", "crt", "key", "clients", "own.crt", "own.key")}
        authority.issue("localhost").write(tmp_path / "crt", tmp_path / "key")
        clients.issue("alice").write(tmp_path / "own.crt", tmp_path / "own.key")
        (tmp_path / "ca").write_bytes(authority.certificate)
        (tmp_path / "clients").write_bytes(clients.certificate)
        tls = TlsConfig(files["crt"], files["key"], files["clients"])
        with running_front(backend, FrontConfig(port=0, tls=tls)) as front:
            reach = ["--target", front.target, "--ca", files["ca"]]
            own = ["--cert", files["own.crt"], "--key", files["own.key"]]
            assert command("status", *reach)[0] == 1
            assert command("status", *reach, *own)[0] == 0
            assert command("status", *reach, *own[:2])[0] == 2
            line = command("scale", "--experts", "2", "--detach", *reach, *own)[1]
            assert f"operations --target {front.target} --ca {files['ca']} --cert" in line
            for option in ("ca", "cert", "key"):
                monkeypatch.setenv(
                    f"MOE_CLUSTER_{option.upper()}", [*reach, *own][[*reach, *own].index(f"--{option}") + 1]
                )
            assert command("status", "--target", front.target)[0] == 0

    def test_a_token_is_made(self, capsys, tmp_path):
        from cluster.cli import main

        assert main(["token", "--role", "train", "--name", "alice"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert main(["token", "--role", "admin", "--name", "bob", "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        file = tmp_path / "tokens"
        file.write_text(f"{lines[-1]}\n{made['line']}\n")
        table = read_tokens(file)
        assert table.caller(lines[1]) == Caller("alice", Role.TRAIN)
        assert table.caller(made["token"]) == Caller("bob", Role.ADMIN)
        assert main(["token", "--role", "infer", "--name", "two words"]) == 2
        assert "name: is not an id" in only_line(capsys.readouterr().err)


class TestHeatmap:
    @pytest.fixture
    def trained(self, command, job_file):
        """Two steps are in the window of the fake."""
        assert command("train", job_file)[0] == 0

    def test_layers(self, command, trained):
        code, out, err = command("heatmap")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0] == "expert load over 2 steps, up to version 3"
        assert lines[1:4] == ["        experts 0 to 3", "layer 0 ░░░░▒▒▒▒▒▒▒▒▓▓▓▓", "layer 1 ····▓▓▓▓▓▓▓▓····"]
        assert "max_vio: 1.00 at worst, in layer 1; 0.80 on average; 0 is even" in lines
        assert "utilisation std: 1.00 at worst, in layer 1; 0.72 on average; 0 is even" in lines
        assert "tokens an expert: 25.0 a micro-batch, 25.0 a step" in lines
        assert "nodes: node-1 100.0%" in lines
        assert lines[-1].startswith("warning: 2 of 2 MoE layers")

    def test_time(self, command, trained):
        lines = command("heatmap", "--over", "time")[1].splitlines()
        assert lines[2:4] == ["version 2 ░░░░▒▒▒▒▓▓▓▓▒▒▒▒", "version 3 ░░░░▒▒▒▒▓▓▓▓▒▒▒▒"]

    def test_json(self, command, trained):
        code, out, _ = command("heatmap", "--json")
        report = json.loads(out)
        assert code == 0
        assert report["load_LE"] == [[20, 40, 60, 80], [0, 100, 100, 0]]
        assert report["actors"] == {"expert-0": 400}
        assert report["history"][1] == {"version": 3, "time_s": 1e9 + 3, "tokens": 50, "load_E": [10, 70, 80, 40]}

    @pytest.mark.parametrize("over", ["layers", "time"])
    def test_a_picture(self, command, trained, tmp_path, over):
        path = tmp_path / "load.png"
        assert command("heatmap", "--over", over, "--output", str(path))[0] == 0
        height, width = imread(path).shape[:2]
        assert width == 960
        assert height > 200

    def test_before_the_first_step(self, command, tmp_path):
        code, out, err = command("heatmap")
        assert (code, err) == (0, "")
        assert only_line(out).startswith("no load yet")
        assert json.loads(command("heatmap", "--json")[1])["window_steps"] == 0
        path = tmp_path / "load.png"
        code, _, err = command("heatmap", "--output", str(path))
        assert code == 1
        assert "not written" in only_line(err)
        assert not path.exists()

    def test_watch(self, command, job_file, monkeypatch):
        shown = interrupt_after(monkeypatch, reports=3)
        assert command("train", job_file)[0] == 0
        code, out, _ = command("heatmap", "--watch", "0.2")
        assert code == 130
        assert out.count("expert load over 2 steps") == 3
        assert shown == [0.2]

    def test_watch_on_a_terminal_draws_in_place_and_keeps_the_picture_up_to_date(
        self, command, trained, monkeypatch, tmp_path
    ):
        interrupt_after(monkeypatch, reports=2)
        screen = Console(file=io.StringIO(), force_terminal=True, width=40)
        monkeypatch.setattr(heatmap, "console", lambda: screen)
        path = tmp_path / "load.png"
        assert command("heatmap", "--watch", "0.2", "--output", str(path))[:2] == (130, "")
        shown = screen.file.getvalue()
        assert "▓▓▓▓" in shown
        first, second = shown.split("expert load over 2 steps")[1:-1]  # what follows is drawn when the watch ends
        for drawn in (first, second):
            assert drawn.count("\x1b[1A") == drawn.count("\n") > 5, "the cursor goes up to where the report began"
        assert path.exists()

    def test_watch_as_json_is_a_document_a_report(self, command, monkeypatch):
        interrupt_after(monkeypatch, reports=2)
        out = command("heatmap", "--watch", "0.2", "--json")[1]
        first, end = json.JSONDecoder().raw_decode(out)
        assert first == json.loads(out[end:])
        assert first["version"] == 0

    def test_bad_input(self, command, trained, tmp_path):
        code, out, err = command("heatmap", "--watch", "0.1")
        assert (code, out) == (2, "")
        assert "interval_s" in only_line(err)
        code, _, err = command("heatmap", "--output", str(tmp_path / "no-such-folder" / "load.png"))
        assert code == 2
        assert "--output: cannot be written" in only_line(err)
        for argv in (("--output", "load.jpg"), ("--over", "experts"), ("--watch", "often")):
            with pytest.raises(SystemExit) as caught:
                command("heatmap", *argv)
            assert caught.value.code == 2

    def test_wide_models_are_folded_between_groups(self):
        window = LoadWindow(1, 1, 64)
        window.add([[1] * 63 + [65]], 1, 0.0, 64, 1)
        report = window.report(1, Placement(1, (("e0",),) * 8, 8), {})
        lines = heatmap.render(report, "layers", Console(width=40)).plain.splitlines()
        assert lines[1:5] == [
            "        experts 0 to 31",
            f"layer 0 {'▒' * 32}",
            "        experts 32 to 63",
            "layer 0 " + "▒" * 31 + "█",
        ]
        assert len(heatmap.render(report, "layers", Console(width=5)).plain.splitlines()[2]) == len("layer 0 ") + 1

    def test_a_terminal_without_these_characters(self):
        window = LoadWindow(1, 1, 4)
        window.add([[0, 1, 2, 97]], 1, 0.0, 64, 1)
        screen = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=20)
        picture = heatmap.render(window.report(1, Placement(1, (("e0",),), 4), {}), "layers", screen)
        assert picture.plain.splitlines()[2] == "layer 0 ...------###"
        assert picture.plain.isascii()


class TestRebalance:
    @pytest.fixture
    def uneven(self, backend, command, job_file):
        backend.placement = Placement(1, (("expert-0",), ("expert-1",), ("expert-1",), ("expert-0",)), 1)
        assert command("train", job_file)[0] == 0

    def test_a_dry_run_shows_the_moves_and_what_they_bring(self, backend, command, uneven):
        code, out, err = command("rebalance", "--dry-run")
        assert (code, err) == (0, "")
        assert re.search(r"group .*kind .*from .*to .*MB", out)
        assert re.search(r"1 .*move .*expert-1 .*expert-0 .*1\.5", out)
        assert re.search(r"0 .*move .*expert-0 .*expert-1 .*1\.5", out)
        assert out.splitlines()[-2:] == [
            "balance of the actors: 0.67 before, 0.91 after; average over maximum load, 1 is even",
            "to do: 2 moves, 3.0 MB; nothing is moved by a dry run",
        ]
        assert backend.placement.epoch == 1

    def test_it_says_what_was_done_and_then_that_nothing_is_left_to_do(self, backend, command, uneven):
        code, out, err = command("rebalance")
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == "done: 2 moves, 3.0 MB; steps waited 12.5 ms at most; placement epoch 2"
        assert backend.placement.epoch == 2
        assert command("rebalance")[1].splitlines() == [
            "balance of the actors: 0.91; average over maximum load, 1 is even",
            "no move makes the load more even",
        ]

    def test_json(self, command, uneven):
        code, out, _ = command("rebalance", "--dry-run", "--json")
        result = json.loads(out)
        assert code == 0
        assert result["moves"][0] == {
            "group": 1,
            "source": "expert-1",
            "target": "expert-0",
            "num_bytes": 1_500_000,
            "kind": "move",
        }
        assert (result["unmet"], result["stall_s"]) == ([], 0.0)
        assert result["balance_before"] == pytest.approx(2 / 3)
        assert (result["placement_epoch"], result["done"], result["message"]) == (1, False, "")

    def test_moves_that_do_not_pay_are_shown_with_the_reason(self, backend, command, monkeypatch):
        async def rebalance(*, dry_run, timeout_s):
            return Rebalance((GroupMove(3, "a", "b", 2_000_000),), 0.9, 0.91, 4, False, "0.01 is not worth 2 MB")

        monkeypatch.setattr(backend, "rebalance", rebalance)
        out = command("rebalance")[1]
        assert re.search(r"3 .*a .*b .*2\.0", out)
        assert out.splitlines()[-1] == "0.01 is not worth 2 MB"

    def test_copies_and_what_cannot_be_had(self, backend, command, monkeypatch):
        async def rebalance(*, dry_run, timeout_s):
            moves = GroupMove(3, "a", "b", 2_000_000, "copy"), GroupMove(1, "a", "c", 2_000_000, "move")
            unmet = ("redundancy 3 of group 1: the expert actors are on 2 nodes",)
            return Rebalance((*moves, *moves[:1]), 0.5, 0.75, 4, not dry_run, "", unmet, stall_s=0.002)

        monkeypatch.setattr(backend, "rebalance", rebalance)
        out = command("rebalance", "--dry-run")[1]
        assert re.search(r"3 .*copy .*a .*b .*2\.0", out)
        assert re.search(r"1 .*move .*a .*c .*2\.0", out)
        assert out.splitlines()[-3:] == [
            "unmet: redundancy 3 of group 1: the expert actors are on 2 nodes",
            "balance of the actors: 0.50 before, 0.75 after; average over maximum load, 1 is even",
            "to do: 1 move, 2 copies, 6.0 MB; nothing is moved by a dry run",
        ]
        done = command("rebalance")[1].splitlines()[-1]
        assert done == "done: 1 move, 2 copies, 6.0 MB; steps waited 2.0 ms at most; placement epoch 4"

    def test_before_the_first_step(self, command):
        code, out, err = command("rebalance")
        assert (code, out) == (1, "")
        assert "no training step is committed" in only_line(err)


class TestScale:
    @pytest.fixture(autouse=True)
    def quick_looks(self, monkeypatch):
        monkeypatch.setattr("cluster.service.cluster.LOOK_S", 0.01)

    def test_it_shows_how_far_it_is_and_tells_preparation_from_stall(self, backend, command):
        code, out, err = command("scale", "--experts", "2")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert "operation-1   50%  prepared 50% of the groups" in lines
        assert lines[-2] == "operation-1  100%  succeeded  prepared 100% of the groups"
        assert lines[-1] == ("done: 2 expert actors; prepared in 1.5 s in the background; steps waited 12.5 ms at most")
        assert backend.placement.actors == ("expert-0", "expert-1")

    def test_routers(self, backend, command):
        code, out, _ = command("scale", "--routers", "3")
        assert code == 0
        assert out.splitlines()[-1].startswith("done: 3 routers; prepared in 1.5 s")
        code, _, err = command("scale", "--routers", "0")
        assert code == 2
        assert "routers" in only_line(err)
        with pytest.raises(SystemExit):
            command("scale", "--routers", "2", "--experts", "2")

    def test_json_keeps_stdout_for_the_document(self, command):
        code, out, err = command("scale", "--experts", "1", "--json")
        operation = json.loads(out)["operation"]
        assert code == 0
        assert (operation["state"], operation["target"], operation["progress"]) == ("succeeded", 1, 1.0)
        assert (operation["prepare_s"], operation["stall_s"]) == (1.5, 0.0125)
        assert "operation-1   25%" in err

    def test_detach_and_watch_by_the_same_request(self, command):
        scale = "scale", "--experts", "2", "--request-id", "r1"
        code, out, _ = command(*scale, "--detach")
        assert code == 0
        assert only_line(out) == (
            "operation-1 is running; see it: moe-cluster operations, "
            "end it: moe-cluster operations --cancel operation-1"
        )
        assert json.loads(command(*scale, "--detach", "--json")[1])["operation"]["state"] == "running"
        code, out, _ = command(*scale)
        assert code == 0
        assert out.splitlines()[-1].startswith("done: 2 expert actors")

    def test_ctrl_c_detaches_and_says_how_to_cancel(self, backend, command, monkeypatch):
        backend.is_stuck = True

        def interrupted(self, operation_id):
            with closing(watch(self, operation_id)) as changes:
                yield next(changes)
            raise KeyboardInterrupt

        watch = Client.watch_operation
        monkeypatch.setattr(Client, "watch_operation", interrupted)
        code, _, err = command("scale", "--experts", "2")
        assert code == 130
        assert "detached, operation-1 goes on" in only_line(err)
        assert "end it: moe-cluster operations --cancel operation-1" in err
        code, out, _ = command("operations", "--cancel", "operation-1")
        assert (code, only_line(out)) == (0, "operation-1 is cancelling at 0%")

    def test_a_front_that_goes_away_does_not_end_it(self, command, monkeypatch):
        def lost(self, operation_id):
            raise Unavailable("gone")
            yield

        monkeypatch.setattr(Client, "watch_operation", lost)
        code, _, err = command("scale", "--experts", "2")
        assert code == 1
        assert "operation-1 may go on: see it: moe-cluster operations" in only_line(err)

    @pytest.mark.parametrize("json_option", [(), ("--json",)])
    def test_one_that_fails_or_is_cancelled_is_a_failure_for_scripts(self, backend, command, json_option):
        code, out, err = command("scale", "--experts", "5", *json_option)
        assert code == 1
        assert err.splitlines()[-1].endswith("operation-1 failed at 0%: 4 expert groups are too few for 5 actors")
        if json_option:
            assert json.loads(out)["operation"]["error"] == "4 expert groups are too few for 5 actors"
        scale = "scale", "--experts", "2", "--request-id", "r1"
        command(*scale, "--detach")
        command("operations", "--cancel", "operation-2")
        code, out, err = command(*scale, *json_option)
        assert code == 1
        assert err.splitlines()[-1].endswith("operation-2 cancelled at 0%")

    def test_another_one_runs(self, backend, command):
        backend.is_stuck = True
        command("scale", "--experts", "2", "--detach")
        code, out, err = command("scale", "--experts", "3")
        assert (code, out) == (1, "")
        assert "operation-1" in only_line(err)

    def test_bad_input(self, command):
        code, _, err = command("scale", "--experts", "0")
        assert code == 2
        assert "actors" in only_line(err)
        for argv in ((), ("--experts", "two")):
            with pytest.raises(SystemExit) as caught:
                command("scale", *argv)
            assert caught.value.code == 2


class TestDrain:
    @pytest.fixture(autouse=True)
    def quick_looks(self, monkeypatch):
        monkeypatch.setattr("cluster.service.cluster.LOOK_S", 0.01)

    def test_it_follows_the_operation_to_the_empty_node(self, backend, command):
        code, out, err = command("drain", "--node", "node-1", "--timeout-s", "20")
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].startswith("done: node-1 is empty; prepared in 1.5 s")
        assert backend.timeouts_s["drain.deadline"] == 20.0

    def test_json_keeps_stdout_for_the_document(self, command):
        code, out, _ = command("drain", "--node", "node-1", "--json")
        operation = json.loads(out)["operation"]
        assert code == 0
        assert (operation["kind"], operation["node"], operation["state"]) == ("drain_node", "node-1", "succeeded")

    def test_a_node_that_is_not_there(self, command):
        code, out, err = command("drain", "--node", "node-9")
        assert (code, out) == (2, "")
        assert "node-0" in only_line(err)

    def test_what_is_not_carried_out_is_a_failure(self, command, backend):
        backend.is_stuck = True
        drain = "drain", "--node", "node-1", "--request-id", "r"
        with Client(os.environ[TARGET_VARIABLE]) as client:
            operation = client.drain("node-1", request_id="r")
            client.cancel_operation(operation.id)
        backend.is_stuck = False
        code, _, err = command(*drain)
        assert code == 1
        assert "operation-1 cancelled" in err.splitlines()[-1]

    def test_a_time_that_cannot_be(self, command):
        with pytest.raises(SystemExit):
            command("drain", "--node", "node-1", "--timeout-s", "0")


class TestGrow:
    @pytest.fixture(autouse=True)
    def quick_looks(self, monkeypatch):
        monkeypatch.setattr("cluster.service.cluster.LOOK_S", 0.01)

    def test_it_is_watched_to_its_end(self, backend, command):
        code, out, err = command("grow", "--experts", "16")
        assert (code, err) == (0, "")
        assert out.splitlines()[-1].startswith("done: 16 experts a layer; prepared in 1.5 s")
        assert backend.growths == [Growth(16)]
        assert re.search(r"operation-1 .*16 experts a layer .*succeeded", command("operations")[1])

    def test_what_is_asked_for_reaches_the_cluster(self, backend, command):
        options = "--mode", "fresh", "--perturbation", "0.25", "--seed", "7", "--open-steps", "9"
        code, out, _ = command("grow", "--experts", "32", *options, "--detach", "--json")
        assert code == 0
        assert json.loads(out)["operation"]["kind"] == "grow_model"
        assert backend.growths == [Growth(32, "fresh", 0.25, 7, 9)]

    @pytest.mark.parametrize(
        ("options", "field"),
        [(("0",), "num_experts"), (("16", "--perturbation", "1"), "perturbation"), (("16", "--seed", "-1"), "seed")],
    )
    def test_bad_input(self, backend, command, options, field):
        code, _, err = command("grow", "--experts", *options)
        assert code == 2
        assert field in only_line(err)
        assert not backend.growths

    def test_a_refusal_of_the_model(self, backend, command):
        backend.failures["grow"] = [InvalidInput("parts of 4 experts", field="num_experts", value=10)]
        code, _, err = command("grow", "--experts", "10")
        assert code == 2
        assert "num_experts: parts of 4 experts" in only_line(err)


class TestOperations:
    def test_list(self, backend, command, monkeypatch):
        monkeypatch.setattr("cluster.service.cluster.LOOK_S", 0.01)
        assert "no operations yet" in only_line(command("operations")[1])
        command("scale", "--experts", "2")
        command("scale", "--experts", "5")
        command("scale", "--experts", "1", "--detach")
        code, out, err = command("operations")
        assert (code, err) == (0, "")
        assert re.search(r"operation-1 .*2 expert actors .*succeeded .*100% .*1\.5 .*12\.5 .*prepared 100%", out)
        assert re.search(r"operation-2 .*5 expert actors .*failed .*0% .*too few", out)
        assert re.search(r"operation-3 .*1 expert actor .*running .*0%", out)
        listed = json.loads(command("operations", "--json")[1])["operations"]
        assert [operation["id"] for operation in listed] == ["operation-3", "operation-2", "operation-1"]

    def test_cancel(self, command):
        command("scale", "--experts", "2", "--detach")
        code, out, _ = command("operations", "--cancel", "operation-1", "--json")
        assert code == 0
        assert json.loads(out)["operation"]["state"] == "cancelling"
        code, _, err = command("operations", "--cancel", "operation-7")
        assert code == 1
        assert "operation-7" in only_line(err)


class TestLedger:
    def test_before_anything_happened(self, command):
        code, out, err = command("ledger")
        assert (code, err) == (0, "")
        assert "nothing has disturbed" in only_line(out)
        assert json.loads(command("ledger", "--json")[1]) == {"entries": [], "summary": {}}

    @pytest.fixture
    def disturbed(self, backend):
        backend.costs.open("actor_death", "expert-0", 1e9, detected_s=1e9 + 0.125)
        backend.costs.add(1, stall_s=0.5, steps_replayed=2, tokens_recomputed=4096, updates_lost=3)
        backend.costs.add(1, requests_delayed=7, requests_failed=1)
        backend.costs.close(1, 1e9 + 2.0)
        backend.costs.open("scale_up", "4 experts", 1e9 + 10)

    def test_what_each_one_cost_and_the_sum_by_kind(self, command, disturbed):
        code, out, err = command("ledger")
        assert (code, err) == (0, "")
        first, second = out.split("by kind")
        cells = r"125\.0 .*2,000\.0 .*500\.0 .*2 .*4,096 .*3 .*7 / 1 "
        assert re.search(rf"actor_death .*expert-0 .*2001-09-\d\d .*{cells}", first)
        assert re.search(r"scale_up .*4 experts .*goes on .*0\.0 ", first)
        assert re.search(r"actor_death .*1 .*0 .*2,000\.0 .*2,000\.0", second)
        assert re.search(r"scale_up .*1 .*1 ", second)

    def test_json(self, command, disturbed):
        report = json.loads(command("ledger", "--json")[1])
        assert [entry["number"] for entry in report["entries"]] == [1, 2]
        assert report["entries"][0]["tokens_recomputed"] == 4096
        assert report["entries"][1]["recovered_s"] is None
        assert report["summary"]["actor_death"] == {"n": 1, "num_open": 0, "median_s": 2.0, "maximum_s": 2.0}


def interrupt_after(monkeypatch, reports: int) -> list[float]:
    """Ctrl-C after so many reports of a watch; gives the intervals that were asked for."""
    asked: list[float] = []
    watch = Client.watch_load

    def interrupted(self, interval_s):
        asked.append(interval_s)
        with closing(watch(self, interval_s)) as stream:
            yield from itertools.islice(stream, reports)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "watch_load", interrupted)
    return asked


class TestTrain:
    def test_lines(self, command, job_file):
        code, out, err = command("train", job_file)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert "step 2/3  loss 2.5000  tokens/s 1,000" in lines
        assert "step 3/3  held-out loss 2.5000" in lines
        assert lines[-1] == "job job-1 is succeeded at step 3/3"

    def test_json_keeps_stdout_for_the_document(self, command, job_file):
        code, out, err = command("train", job_file, "--json", "--set", "steps=2", "--set", "optimizer.lr=1e-3")
        result = json.loads(out)
        assert code == 0
        assert (result["job"]["state"], result["job"]["step"]) == ("succeeded", 2)
        assert result["job"]["config"]["optimizer"]["lr"] == 0.001
        assert result["metrics"]["loss"] == 2.5
        assert result["eval"]["heldout_loss"] == 2.5
        assert "step 2/2" in err

    def test_a_request_id_submits_once(self, command, job_file):
        ids = {json.loads(command("train", job_file, "--json", "--request-id", "r1")[1])["job"]["id"] for _ in "ab"}
        assert len(ids) == 1
        code, _, err = command("train", job_file, "--request-id", "r1", "--set", "steps=9")
        assert code == 1
        assert "r1" in only_line(err)

    def test_detach_and_watch(self, command, job_file):
        code, out, _ = command("train", job_file, "--detach")
        assert code == 0
        job_id = re.search(r"train --watch (\S+),", out)[1]
        code, out, _ = command("train", "--watch", job_id)
        assert code == 0
        assert out.splitlines()[-1] == f"job {job_id} is succeeded at step 3/3"

    def test_ctrl_c_detaches_and_says_how_to_go_on(self, backend, command, job_file, monkeypatch):
        backend.step_s = 0.01

        def interrupted(self, job_id, *, after=0):
            yield next(watch(self, job_id, after=after))
            raise KeyboardInterrupt

        watch = Client.watch_job
        monkeypatch.setattr(Client, "watch_job", interrupted)
        code, _, err = command("train", job_file, "--set", "steps=10000")
        assert code == 130
        assert "moe-cluster train --watch job-1, end it: moe-cluster cancel job-1" in only_line(err)
        assert command("cancel", "job-1")[0] == 0

    def test_a_cancelled_job_is_a_failure_for_scripts(self, backend, command, job_file):
        backend.step_s = 60.0
        command("train", job_file, "--detach")
        command("train", job_file, "--detach", "--request-id", "second")
        command("cancel", "job-2")
        code, _, err = command("train", "--watch", "job-2")
        assert code == 1
        assert "job job-2 cancelled at step 0" in only_line(err)

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (("train", "no-such-file.yaml"), "no-such-file.yaml"),
            (("train", "{job}", "--set", "optimizer.lrr=1"), "lrr"),
            (("train", "{job}", "--set", "steps=-1"), "steps"),
            (("train", "{job}", "--request-id", "a b"), "request_id"),
            (("train", "--watch", "job-1", "--set", "steps=1"), "--set"),
        ],
    )
    def test_bad_input_is_exit_code_2(self, command, job_file, argv, said):
        code, _, err = command(*(arg.format(job=job_file) for arg in argv))
        assert code == 2
        assert said in only_line(err)

    @pytest.mark.parametrize("argv", [("train",), ("train", "a.yaml", "--watch", "b"), ("train", "a", "--set", "x")])
    def test_bad_usage_is_exit_code_2(self, command, argv):
        with pytest.raises(SystemExit) as caught:
            command(*argv)
        assert caught.value.code == 2


class TestJobs:
    def test_list_and_cancel(self, backend, command, job_file):
        assert "no jobs yet" in command("jobs")[1]
        backend.step_s = 60.0
        for request_id in ("a", "b", "c"):
            command("train", job_file, "--detach", "--request-id", request_id)
        assert [job["id"] for job in json.loads(command("jobs", "--json")[1])["jobs"]] == ["job-3", "job-2", "job-1"]
        assert len(json.loads(command("jobs", "--json", "--limit", "2")[1])["jobs"]) == 2
        assert json.loads(command("cancel", "job-3", "--json")[1])["job"]["state"] == "cancelled"
        assert re.search(r"job-3 .*cancelled .*0/3", command("jobs")[1])

    def test_cancel_of_a_finished_job(self, command, job_file):
        command("train", job_file)
        code, _, err = command("cancel", "job-1")
        assert code == 1
        assert "succeeded already" in only_line(err)


class TestInference:
    def test_generate(self, command):
        assert command("generate", "ab", "--max-tokens", "5") == (0, "ababa\n", "")

    def test_generate_json(self, command):
        code, out, _ = command("generate", "--token-ids", "72,105", "--max-tokens", "2", "--json")
        assert code == 0
        assert json.loads(out) == {
            "text": "Hi",
            "token_ids": [72, 105],
            "finish_reason": "length",
            "prompt_tokens": 2,
            "versions": [0],
        }

    def test_the_prompt_from_standard_input(self, command, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("xy"))
        assert command("generate", "-", "--max-tokens", "3")[1] == "xyx\n"

    def test_bad_parameters(self, command):
        for argv in (["--temperature", "nan"], ["--top-p", "0"], ["--max-tokens", "0"], ["--stop", ""]):
            code, out, err = command("generate", "ab", *argv)
            assert (code, out) == (2, "")
            assert argv[0].removeprefix("--").replace("-", "_") in only_line(err)
        assert command("generate", "")[0] == 2

    def test_score(self, command):
        assert "3 tokens, 0.1500 nats a token" in command("score", "abc")[1]
        assert json.loads(command("score", "abc", "--json")[1])["logprobs"] == [-0.1, -0.2]


class TestModel:
    def test_export_and_import(self, command):
        assert "/storage/out: 2 files, 4.0 KiB" in command("export", "out")[1]
        assert json.loads(command("export", "out", "--json")[1])["size_bytes"] == 4096
        assert "imported out: 1,000 parameters" in command("import", "out")[1]
        assert json.loads(command("import", "out", "--json")[1])["model"] == "memory"

    def test_a_missing_directory(self, command):
        code, _, err = command("import", "missing")
        assert code == 2
        assert "export one first" in only_line(err)


class TestLooks:
    JOB = Job("job-1", "r", JobConfig(steps=4), JobState.RUNNING, step=0, created_s=0.0)
    OPERATION = Operation("operation-1", "r", "scale_experts", OperationState.RUNNING, 4, 0.0, "", created_s=0.0)

    def test_the_bar_of_a_terminal(self, monkeypatch):
        screen = Console(file=io.StringIO(), force_terminal=True, width=160)
        monkeypatch.setattr(progress, "console", lambda *, stderr: screen)
        with progress.open_progress(self.JOB, stderr=False) as show:
            show(JobEvent(1, 0.0, "step", JobState.RUNNING, 3, {"loss": 1.25, "retries": 1.0}))
            show(JobEvent(2, 0.0, "note", JobState.RUNNING, 3, {}, "[router] lost expert-1"))
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
        assert "3/4" in shown
        assert "loss 1.2500  retries 1" in shown
        assert "step 3/4  [router] lost expert-1" in shown

    def test_the_bar_of_an_operation(self, monkeypatch):
        screen = Console(file=io.StringIO(), force_terminal=True, width=160)
        monkeypatch.setattr(progress, "console", lambda *, stderr: screen)
        with progress.open_operation(self.OPERATION, stderr=False) as show:
            show(dataclasses.replace(self.OPERATION, progress=0.5, message="[group 3] travels"))
            show(dataclasses.replace(self.OPERATION, state=OperationState.CANCELLING, progress=0.5))
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
        assert "operation-1" in shown
        assert "50%" in shown
        assert "cancelling" in shown

    def test_the_message_of_an_operation_is_no_markup(self, monkeypatch):
        screen = Console(file=io.StringIO(), force_terminal=True, width=160)
        monkeypatch.setattr(progress, "console", lambda *, stderr: screen)
        with progress.open_operation(self.OPERATION, stderr=False) as show:
            show(dataclasses.replace(self.OPERATION, progress=0.5, message="[group 3] travels"))
        assert "[group 3] travels" in screen.file.getvalue()

    def test_json_has_no_nan(self, capsys):
        output.print_json({"loss": math.nan, "state": JobState.FAILED, "at": (1, math.inf)})
        assert json.loads(capsys.readouterr().out) == {"loss": None, "state": "failed", "at": [1, None]}

    @pytest.mark.parametrize(("num_bytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
    def test_sizes(self, num_bytes, text):
        assert output.size(num_bytes) == text
