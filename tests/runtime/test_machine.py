"""What a container is given of a machine: threads by default, and what is said where memory is short."""

import os
import re
from pathlib import Path

import pytest
from command import run

from healthgpt_edge import control_group, load, machine

GIB = 1 << 30


def groups(monkeypatch, folder, lines, files):
    """A machine whose control groups are these: what /proc says of the process, and files below the mount."""
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "groups").write_text(lines)
    monkeypatch.setattr(control_group, "_GROUPS", folder / "groups")
    monkeypatch.setattr(control_group, "_MOUNT", folder / "mount")


@pytest.mark.parametrize(
    ("lines", "files", "processors", "memory"),
    [
        pytest.param("", {}, None, None, id="none"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": f"{GIB}\n"}, 1.5, GIB, id="of-a-container"),
        pytest.param(
            "0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/b/memory.max": "max\n"}, None, None, id="no-limit"
        ),
        pytest.param(
            "0::/a/b\n",
            {
                "a/cpu.max": "200000 100000\n",
                "a/b/cpu.max": "800000 100000\n",
                "a/memory.max": f"{2 * GIB}\n",
                "a/b/memory.max": f"{GIB}\n",
            },
            2.0,
            GIB,
            id="the-least-of-all-above",
        ),
        pytest.param("0::/../../other\n", {"cpu.max": "50000 100000\n"}, 0.5, None, id="above-what-is-mounted"),
        pytest.param(
            "5:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/box\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "cpu/box/cpu.cfs_quota_us": "300000\n",
                "cpu/box/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/box/memory.limit_in_bytes": f"{GIB}\n",
            },
            3.0,
            GIB,
            id="version-1",
        ),
        pytest.param(
            "3:cpu:/docker/0123\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            2.0,
            None,
            id="version-1-whose-path-is-the-host-s",
        ),
        pytest.param("nonsense\n0::/\n", {"cpu.max": "\n", "memory.max": "?\n"}, None, None, id="nonsense"),
    ],
)
def test_what_control_groups_allow(monkeypatch, tmp_path, lines, files, processors, memory):
    groups(monkeypatch, tmp_path, lines, files)
    assert (control_group.processors(), control_group.memory()) == (processors, memory)


@pytest.mark.parametrize(("quota", "cores"), [(None, 3), (0.2, 1), (1.5, 1), (1.6, 2), (2.0, 2), (64.0, 3)])
def test_cores_are_those_of_the_processors_and_the_quota(monkeypatch, tmp_path, quota, cores):
    """Five processors on three cores."""
    for processor, siblings in {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2"}.items():
        (tmp_path / str(processor)).write_text(siblings)
    monkeypatch.setattr(machine, "_TOPOLOGY", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 4, 5})
    monkeypatch.setattr(control_group, "processors", lambda: quota)
    assert machine.cores() == cores


def test_processors_of_an_unknown_core_count_one_each(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_TOPOLOGY", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 7})
    monkeypatch.setattr(control_group, "processors", lambda: None)
    assert machine.cores() == 2


def test_cores_where_nobody_may_ask(monkeypatch, tmp_path):
    def forbidden(process):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(machine, "_TOPOLOGY", str(tmp_path / "{}"))
    monkeypatch.setattr(os, "sched_getaffinity", forbidden)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(control_group, "processors", lambda: 4.0)
    assert machine.cores() == 4


def test_memory_is_the_machine_s_or_the_container_s(monkeypatch):
    monkeypatch.setattr(control_group, "memory", lambda: None)
    assert 0 < machine.available_memory() <= machine.memory_bytes()
    monkeypatch.setattr(control_group, "memory", lambda: 4096)
    assert machine.available_memory() == machine.memory_bytes() == 4096


@pytest.mark.parametrize("asked", [None, 1, 3])
def test_a_session_has_as_many_threads_as_there_are_cores(golden_bundle, monkeypatch, asked):
    """ONNX Runtime, left to itself, takes all cores of the machine: in a container of one, 16 threads take thirteen
    times as long as one."""
    monkeypatch.setattr("healthgpt_edge.executors.onnx.cores", lambda: 2)
    session = load(golden_bundle("qwen"), threads=asked)
    options = session.executor.session("comprehension", "language").get_session_options()
    assert options.intra_op_num_threads == (asked or 2)


def test_a_command_says_that_memory_is_short(golden_bundle, monkeypatch):
    words = ["answer", golden_bundle("qwen"), "--question", "What?", "--max-new-tokens", "1", "--json"]
    bundle = golden_bundle("qwen")
    weights = sum(path.stat().st_size for path in Path(bundle, "weights").iterdir())
    for memory, said in ((weights - 1, True), (weights, False), (None, False)):
        monkeypatch.setattr(machine, "available_memory", lambda memory=memory: memory)
        outcome = run(*words)
        assert outcome.code == 0
        assert bool(re.fullmatch(r"note: the weights are .* GB and this process may have .*\n", outcome.errors)) == said
        assert said or outcome.errors == ""
